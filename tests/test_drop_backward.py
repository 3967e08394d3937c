"""Branches without a backward pass: `drop_backward`, its layers, `drop_backward_scan`."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import cdb_jax.linen
import cdb_jax.nnx
import models

KEY = jax.random.key(1)
DEPTH, WIDTH = 3, 8
X = jax.random.normal(jax.random.key(0), (4, WIDTH))


def network(seed=2, width=WIDTH):
    keys = jax.random.split(jax.random.key(seed), 2 * DEPTH)
    return {
        f"block{i}": {
            "up": {"kernel": 0.3 * jax.random.normal(keys[2 * i], (width, 2 * width))},
            "down": {"kernel": 0.3 * jax.random.normal(keys[2 * i + 1], (2 * width, width))},
        }
        for i in range(DEPTH)
    }


def branch(block, x):
    return jnp.sin(x @ block["up"]["kernel"]) @ block["down"]["kernel"]


def loss(params, kept, x=X, scale_by_keep=False):
    for block, is_kept in zip(params.values(), kept, strict=True):
        rate = 0.5 if scale_by_keep else None
        settings = dict(kept=is_kept, rate=rate, scale_by_keep=scale_by_keep)
        x = x + cdb_jax.drop_backward(branch, block, x, **settings)
    return jnp.mean(x**2)


def reference(params, kept, x=X, factor=1.0):
    """The same, with a gradient that is computed in full and then replaced by zero."""
    for block, is_kept in zip(params.values(), kept, strict=True):
        y = branch(block, x)
        constant = jax.lax.stop_gradient(y)
        x = x + jnp.where(is_kept, constant + factor * (y - constant), constant)
    return jnp.mean(x**2)


step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)), static_argnums=3)
reference_step = jax.jit(jax.value_and_grad(reference, argnums=(0, 2)))
flags = st.lists(st.booleans(), min_size=DEPTH, max_size=DEPTH)


# The function.


@given(kept=flags, scaled=st.booleans(), seed=st.integers(0, 100))
def test_against_a_gradient_that_is_computed_and_dropped(kept, scaled, seed):
    params, kept = network(seed), jnp.array(kept)
    value, gradient = step(params, kept, X, scaled)
    expected = reference_step(params, kept, X, 2.0 if scaled else 1.0)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    chex.assert_trees_all_close(gradient, expected[1], rtol=1e-5, atol=1e-6)
    for block, is_kept in zip(gradient[0].values(), kept, strict=True):
        assert all(bool(jnp.any(g != 0)) == bool(is_kept) for g in jax.tree.leaves(block))


def test_against_numpy():
    """One branch x * w: y = x + b w x, so dx = dy (1 + b w) and dw = b sum(dy x)."""
    w, x, dy = 3.0, np.array([1.0, 2.0]), np.array([5.0, 7.0])
    for kept in (0.0, 1.0):

        def f(w, x, kept=kept):
            return x + cdb_jax.drop_backward(lambda x: w * x, x, kept=jnp.bool_(kept))

        y, vjp = jax.vjp(f, jnp.float32(w), jnp.array(x, jnp.float32))
        np.testing.assert_array_equal(y, x + w * x)
        dw, dx = vjp(jnp.array(dy, jnp.float32))
        np.testing.assert_allclose(dx, dy * (1 + kept * w))
        np.testing.assert_allclose(dw, kept * np.sum(dy * x))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("scaled", [False, True])
def test_rate(rate, scaled):
    keys = jax.random.split(KEY, 4000)

    def slope(key):
        def f(x):
            return cdb_jax.drop_backward(jnp.sin, x, rate=rate, key=key, scale_by_keep=scaled)

        return jax.grad(f)(0.0)

    slopes = np.asarray(jax.vmap(slope)(keys))
    height = 1 / (1 - rate) if scaled else 1.0
    np.testing.assert_allclose(slopes[slopes != 0], height, rtol=1e-6)
    share = (slopes != 0).mean()
    assert abs(share - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / len(keys))


def test_limits():
    plain = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(x))))(X)
    none = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(cdb_jax.drop_backward(jnp.sin, x, rate=0.0))))(
        X
    )
    assert str(plain) == str(none)
    every = jax.grad(lambda x: jnp.sum(cdb_jax.drop_backward(jnp.sin, x, rate=1.0)))
    np.testing.assert_array_equal(every(X), jnp.zeros_like(X))
    drawn = jax.grad(
        lambda x, kept: jnp.sum(
            cdb_jax.drop_backward(jnp.sin, x, rate=1.0, kept=kept, scale_by_keep=True)
        )
    )
    np.testing.assert_array_equal(drawn(X, jnp.array(False)), jnp.zeros_like(X))
    for rate, slope in ((0.0, 1.0), (1.0, 0.0)):
        f = jax.jit(
            jax.grad(
                lambda x, rate: cdb_jax.drop_backward(
                    jnp.sin, x, rate=rate, key=KEY, scale_by_keep=True
                )
            )
        )
        assert f(0.0, rate) == slope


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_forward_is_exact(dtype):
    x = X.astype(dtype)
    w = jax.random.normal(KEY, (WIDTH, WIDTH)).astype(dtype)
    plain = jax.jit(lambda x: jnp.tanh(x @ w))
    dropped = jax.jit(
        lambda x: cdb_jax.drop_backward(lambda x: jnp.tanh(x @ w), x, rate=0.5, key=KEY)
    )
    np.testing.assert_array_equal(plain(x), dropped(x))
    assert dropped(x).dtype == dtype
    (value, _) = jax.jit(lambda x: jax.vjp(dropped, x)[0::1])(x)
    np.testing.assert_array_equal(value, plain(x))


def test_what_a_branch_may_take_and_return():
    """Closures, integers, keys, None and trees, of which only floats have gradients."""

    def f(w, x, kept):
        def branch(x, extra):
            noise = jax.random.normal(extra["key"], x.shape)
            y = w["a"] * x + noise
            return {"y": y, "argmax": jnp.argmax(y), "none": None}

        extra = {"key": jax.random.key(3), "count": jnp.arange(3), "none": None}
        result = cdb_jax.drop_backward(branch, x, extra, kept=kept)
        assert result["none"] is None and result["argmax"].dtype == jnp.int32
        return jnp.sum(result["y"]) + result["argmax"].astype(jnp.float32)

    for kept in (True, False):
        gradient = jax.jit(jax.grad(f))({"a": jnp.float32(2.0), "b": jnp.ones(2)}, X, kept)
        np.testing.assert_allclose(gradient["a"], jnp.sum(X) if kept else 0.0, rtol=1e-5)
        np.testing.assert_array_equal(gradient["b"], jnp.zeros(2))


def test_inside_other_transformations():
    params, kept = network(), jnp.array([True, False, True])
    expected = jax.grad(reference)(params, kept)
    checkpointed = jax.grad(lambda params: jax.checkpoint(loss)(params, kept))(params)
    chex.assert_trees_all_close(checkpointed, expected, atol=1e-6)

    several = jnp.array([[True, True, False], [False, False, True]])
    batched = jax.vmap(jax.grad(loss), (None, 0))(params, several)
    for i, one in enumerate(several):
        found = jax.tree.map(lambda g, i=i: g[i], batched)
        chex.assert_trees_all_close(found, jax.grad(reference)(params, one), atol=1e-6)

    stacked = jax.tree.map(lambda *w: jnp.stack(w), *params.values())

    def scanned(blocks, kept):
        def body(x, slices):
            block, is_kept = slices
            return x + cdb_jax.drop_backward(branch, block, x, kept=is_kept), None

        return jnp.mean(jax.lax.scan(body, X, (blocks, kept))[0] ** 2)

    gradient = jax.jit(jax.grad(scanned))(stacked, kept)
    expected = jax.tree.map(lambda *w: jnp.stack(w), *expected.values())
    chex.assert_trees_all_close(gradient, expected, atol=1e-6)

    def slope(f):
        return lambda w: jax.grad(lambda x: jnp.sum(f(lambda x: jnp.sin(w * x), x)))(1.0)

    second = jax.grad(slope(lambda f, x: cdb_jax.drop_backward(f, x, kept=jnp.bool_(True))))(2.0)
    np.testing.assert_allclose(second, jax.grad(slope(lambda f, x: f(x)))(2.0), rtol=1e-6)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
@pytest.mark.parametrize("freezes_first", [False, True])
def test_a_block_that_is_traced_once_and_used_twice(wrap, freezes_first):
    """Its first use may need other gradients than its second."""

    @wrap
    def block(w, x, kept):
        return x + cdb_jax.drop_backward(lambda w, x: jnp.tanh(x @ w), w, x, kept=kept)

    def f(weights, block):
        x = X
        for i, w in enumerate(weights):
            w = jax.lax.stop_gradient(w) if freezes_first and i == 0 else w
            x = block(w, x, jnp.array(True))
        return jnp.sum(x**2)

    weights = [jnp.eye(WIDTH), 0.5 * jnp.eye(WIDTH)]
    found = jax.jit(jax.grad(f), static_argnums=1)(weights, block)
    expected = jax.grad(f)(weights, lambda w, x, kept: x + jnp.tanh(x @ w))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_value_and_grad_under_vmap():
    policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
    params = network()

    def several(params):
        kept = jnp.array([[True, False, True], [False, True, True]])
        return jnp.mean(jax.vmap(lambda kept: loss(params, kept))(kept))

    selection = policy.select(params, 0)
    found = jax.jit(cdb_jax.grad(several))(params, selection=selection)
    chex.assert_trees_all_close(found, selection.mask(jax.grad(several)(params)), atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_of_a_mean_over_draws(scaled):
    """What the draws share, such as the input of the first branch, gets the sum over draws."""
    params, kept = network(), jnp.array([[True, False, True], [False, True, True]])
    factor = 2.0 if scaled else 1.0

    def mean(loss, *settings):
        return lambda params: jnp.mean(jax.vmap(lambda k: loss(params, k, X, *settings))(kept))

    found = jax.jit(jax.grad(mean(loss, scaled)))(params)
    expected = jax.jit(jax.grad(mean(reference, factor)))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)

    def scanned(keys, map_over):
        blocks = jax.tree.map(lambda *w: jnp.stack(w), *params.values())

        def one(blocks, key):
            y = cdb_jax.drop_backward_scan(branch, blocks, X, rate=0.5, key=key)
            return jnp.mean(y**2)

        return map_over(one, blocks, keys)

    keys = jax.random.split(KEY, 5)
    together = scanned(
        keys, lambda f, w, k: jax.grad(lambda w: jnp.sum(jax.vmap(f, (None, 0))(w, k)))(w)
    )
    alone = scanned(keys, lambda f, w, k: jax.vmap(jax.grad(f), (None, 0))(w, k))
    alone = jax.tree.map(lambda x: jnp.sum(x, axis=0), alone)
    chex.assert_trees_all_close(together, alone, rtol=1e-4, atol=1e-6)


# What is saved.


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def test_a_dropped_branch_computes_nothing_in_the_backward_pass():
    params = network(width=64)
    x = jax.random.normal(KEY, (32, 64))

    def gradient(kept):
        return jax.value_and_grad(lambda params: loss(params, np.array(kept), x))

    program = jax.jit(jax.grad(loss)).lower(params, jnp.ones(DEPTH, bool), x).compile().as_text()
    assert program.count(" conditional(") == DEPTH
    forward = flops(lambda params: loss(params, np.ones(DEPTH, bool), x), params)
    every, two = flops(gradient([True] * 3), params), flops(gradient([True, False, True]), params)
    none = flops(gradient([False] * 3), params)
    products = 2 * 2 * 32 * 64 * 128  # Of a branch, forward.
    assert none < forward + 0.1 * products
    assert every - none > 5.5 * products  # The first block has no input gradient.
    assert every - two > 1.9 * products


def test_memory_is_that_of_products_or_as_jax_checkpoint_says():
    """Elementwise results are not stored; a checkpoint in the branch decides instead."""
    params = network(width=64)
    x = jax.random.normal(KEY, (64, 64))

    def chain(block, x):
        h = x @ block["up"]["kernel"]
        for _ in range(4):
            h = jnp.sin(h) + jnp.cos(h) ** 2
        return h @ block["down"]["kernel"]

    def stored(branch):
        def f(params, kept):
            y = x
            for i, block in enumerate(params.values()):
                y = y + cdb_jax.drop_backward(branch, block, y, kept=kept[i])
            return jnp.mean(y**2)

        _, vjp = jax.eval_shape(lambda params: jax.vjp(f, params, jnp.ones(3, bool)), params)
        arrays = [r for r in jax.tree.leaves(vjp) if r.shape and r.shape[0] == 64]
        return sum(r.size for r in arrays if r.shape in ((64, 64), (64, 128)))

    weights = DEPTH * 2 * 64 * 128
    plain, recomputed = stored(chain) - weights, stored(jax.checkpoint(chain)) - weights
    # The hidden product, the input of the block; and what the mean of squares keeps.
    assert plain <= (DEPTH * (64 * 128 + 2 * 64 * 64)) + 64 * 64
    assert recomputed <= DEPTH * 64 * 64 + 64 * 64


def test_convolutions_in_a_conditional_have_the_order_that_is_fast_on_cpu():
    w = jax.random.normal(KEY, (3, 3, 4, 4))
    images = jax.random.normal(KEY, (2, 6, 6, 4))

    def convolve(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    def f(w, kept, checkpointed):
        branch = jax.checkpoint(convolve) if checkpointed else convolve
        return jnp.sum(cdb_jax.drop_backward(jax.jit(branch), images, w, kept=kept) ** 2)

    for checkpointed in (False, True):
        gradient = jax.jit(jax.grad(f), static_argnums=2)
        text = gradient.lower(w, True, checkpointed).as_text()
        orders = [line.split("dim_numbers = ")[1][:30] for line in text.splitlines()
                  if "stablehlo.convolution" in line]  # fmt: skip
        slow = [order for order in orders if not order.startswith("[b, 0, 1, f]x[0, 1, i, o]->[b")]
        # The order of JAX's transpose is left in the branch for other platforms only.
        assert not slow, slow
        expected = jax.grad(lambda w: jnp.sum(convolve(images, w) ** 2))(w)
        np.testing.assert_allclose(gradient(w, True, checkpointed), expected, rtol=1e-4)
        assert not gradient(w, False, checkpointed).any()


# Meshes.


def on_devices(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jax.device_put(network(), NamedSharding(mesh, P()))
    x = jax.device_put(jnp.tile(X, (4, 1)), NamedSharding(mesh, P("data")))
    return mesh, params, x


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices(kind):
    mesh, params, x = on_devices(kind)
    kept = jnp.array([True, False, True])
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss))(params, kept, x)
    chex.assert_trees_all_close(gradient, jax.grad(reference)(network(), kept), atol=1e-6)


def test_dropped_gradients_are_not_sent():
    """The gradient of each block is summed over devices in the branch of a conditional."""
    _, params, x = on_devices(AxisType.Auto)
    everywhere = jax.tree.map(lambda w: w.sharding, params)
    gradient = jax.jit(jax.grad(loss), out_shardings=everywhere)
    program = gradient.lower(params, jnp.ones(3, bool), x).compile().as_text()
    branches, _, entry = program.partition("ENTRY")
    assert len(re.findall(r" all-reduce(?:-start)?\(", branches)) == DEPTH
    assert not re.findall(r" all-reduce(?:-start)?\(", entry)


def test_shard_map():
    mesh, params, x = on_devices(AxisType.Auto)
    kept = jnp.array([True, False, True])

    def local(params, x):
        value, gradient = jax.value_and_grad(loss)(params, kept, x)
        return jax.lax.pmean((value, gradient), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    value, gradient = jax.jit(mapped)(params, x)
    expected = jax.value_and_grad(reference)(network(), kept)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    # Gradients of replicated arrays are sums over devices.
    summed = jax.tree.map(lambda g: 8 * g, expected[1])
    chex.assert_trees_all_close(gradient, summed, atol=1e-5)


# With the rest of the library.


POLICIES = {
    "window": cdb_jax.Policy(0.5, key=0, channel_choice="window"),
    "exact": cdb_jax.Policy(0.5, key=0, channel_choice="exact", layer_rate=0.5),
    "one layer": cdb_jax.Policy(
        0.5, key=0, channel_choice="window", layer_choice="exact", other_layers="frozen"
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_value_and_grad_saves_inside_of_kept_branches(name):
    policy, params = POLICIES[name], network()
    gradient = jax.jit(jax.grad(loss))

    @jax.jit
    def skipping(params, kept, count):
        selection = policy.select(params, count)
        grads = cdb_jax.grad(loss)(params, kept, selection=selection)
        return grads, selection.mask(gradient(params, kept))

    for count in range(4):
        kept = jnp.array([True, count % 2 == 0, count < 2])
        found, expected = skipping(params, kept, count)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    report = cdb_jax.channel_report(params, policy, loss, jnp.ones(3, bool))
    assert all(row.gradient.startswith("skipped") for row in report.rows), str(report)


def test_value_and_grad_in_a_scan():
    policy = cdb_jax.Policy(
        0.5,
        key=0,
        channel_choice="window",
        channel_axes={"up": cdb_jax.Axes(-1, 0), "down": cdb_jax.Axes(-1, 0)},
    )
    blocks = jax.tree.map(lambda *w: jnp.stack(w), *network().values())
    kept = jnp.array([True, False, True])

    def scanned(blocks):
        def body(x, slices):
            block, is_kept = slices
            return x + cdb_jax.drop_backward(branch, block, x, kept=is_kept), None

        return jnp.mean(jax.lax.scan(body, X, (blocks, kept))[0] ** 2)

    selection = policy.select(blocks, 0)
    found = jax.jit(cdb_jax.grad(scanned))(blocks, selection=selection)
    expected = selection.mask(jax.grad(scanned)(blocks))
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    report = cdb_jax.channel_report(blocks, policy, scanned)
    assert all(row.gradient.startswith("skipped") for row in report.rows), str(report)


def test_compact(standard_promotion):
    policy = cdb_jax.Policy(0.75, key=0, channel_choice="window", hold=2)
    params = network()
    tx = cdb_jax.compact(optax.adamw(1e-2), policy)
    state = tx.init(params)
    kept = jnp.array([True, False, True])

    @jax.jit
    def train(params, state):
        selection = policy.select(params, cdb_jax.selection_count(state))
        grads = cdb_jax.grad(loss, kept_only=True)(params, kept, selection=selection)
        updates, state = tx.update(grads, state, params, selection=selection)
        return optax.apply_updates(params, updates), state, selection.mask(updates), updates

    for _ in range(4):
        params, state, masked, updates = train(params, state)
        chex.assert_trees_all_equal(masked, updates)
    assert jnp.any(updates["block0"]["up"]["kernel"] != 0)


# Layers.


class Block(nnx.Module):
    def __init__(self, drop, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.drop = drop

    def inner(self, x):
        return self.dropout(self.norm(self.linear(x)))

    def __call__(self, x):
        return x + (self.drop(self.inner, x) if self.drop else self.inner(x))


def test_nnx_layer(standard_promotion):
    """Values, batch statistics and counts are those without the layer."""
    drop = cdb_jax.nnx.DropBackward(0.5, rngs=nnx.Rngs(1))
    block, plain = Block(drop, nnx.Rngs(0)), Block(None, nnx.Rngs(0))
    step = nnx.jit(nnx.value_and_grad(lambda block, x: jnp.mean(block(x) ** 2)))
    is_kept = []
    for _ in range(8):
        (value, gradient), (expected, full) = step(block, X), step(plain, X)
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(block.norm.mean[...], plain.norm.mean[...])
        assert block.dropout.rngs.count[...] == plain.dropout.rngs.count[...]
        slope = gradient["linear"]["kernel"][...]
        is_kept.append(bool(jnp.any(slope != 0)))
        expected = full["linear"]["kernel"][...] if is_kept[-1] else jnp.zeros_like(slope)
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)
    assert set(is_kept) == {True, False}
    block.eval(), plain.eval()
    np.testing.assert_array_equal(block(X), plain(X))
    evaluated = nnx.grad(lambda block: jnp.mean(block(X) ** 2))(block)
    assert jnp.any(evaluated["linear"]["kernel"][...] != 0)


def test_nnx_variables_that_hold_trees_and_bare_variables(standard_promotion):
    class Counter(nnx.Module):
        def __init__(self):
            self.seen = nnx.Variable({"count": jnp.zeros(()), "other": jnp.ones(())})

        def __call__(self, x, calls):
            seen = self.seen.get_value()
            self.seen.set_value({"count": seen["count"] + 1, "other": seen["other"]})
            calls[...] += 1
            return x

    counter, calls = Counter(), nnx.Variable(jnp.zeros(()))
    drop = cdb_jax.nnx.DropBackward(0.5, rngs=nnx.Rngs(0))
    for _ in range(2):
        drop(counter, X, calls)
    assert counter.seen.get_value() == {"count": 2, "other": 1} and calls[...] == 2


def test_nnx_layer_with_a_given_draw(standard_promotion):
    branch = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    drop = cdb_jax.nnx.DropBackward(0.5)  # Needs no keys.
    f = nnx.jit(nnx.grad(lambda branch, x, kept: jnp.sum(drop(branch, x, kept=kept))))
    for kept in (True, False):
        assert bool(jnp.any(f(branch, X, kept)["kernel"][...] != 0)) == kept
    none = cdb_jax.nnx.DropBackward(0.0, rngs=nnx.Rngs(0))
    assert none.rngs is None
    assert jnp.any(nnx.grad(lambda branch: jnp.sum(none(branch, X)))(branch)["kernel"][...] != 0)


@pytest.mark.parametrize("how", ["compact", "setup", "inline"])
def test_linen_layer(how, standard_promotion):
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(momentum=0.5, use_running_average=not train)(nn.Dense(WIDTH)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    class Compact(nn.Module):
        drops: bool

        @nn.compact
        def __call__(self, x, train):
            branch = Branch(name="branch")
            drop = cdb_jax.linen.DropBackward(0.5 if self.drops else 0.0)
            return x + drop(branch, x, train, deterministic=not train)

    class Setup(nn.Module):
        drops: bool

        def setup(self):
            self.branch = Branch()
            self.drop = cdb_jax.linen.DropBackward(0.5 if self.drops else 0.0)

        def __call__(self, x, train):
            def inner(self, x):
                return self.branch(x, train)

            return x + self.drop(inner, self, x, deterministic=not train)

    class Inline(nn.Module):
        drops: bool

        @nn.compact
        def __call__(self, x, train):
            def inner(self, x):
                return Branch(name="branch")(x, train)

            drop = cdb_jax.linen.DropBackward(0.5 if self.drops else 0.0, name="drop")
            return x + drop(inner, self, x, deterministic=not train)

    class_ = {"compact": Compact, "setup": Setup, "inline": Inline}[how]
    variables = class_(True).init(jax.random.key(0), X, False)
    chex.assert_trees_all_equal(variables, class_(False).init(jax.random.key(0), X, False))

    @jax.jit
    def step(params, seed):
        rngs = {"dropout": jax.random.key(0), "drop_backward": jax.random.key(seed)}

        def value(params, drops):
            y, state = class_(drops).apply(
                variables | {"params": params}, X, True, rngs=rngs, mutable=["batch_stats"]
            )
            return jnp.mean(y**2), state

        grad = jax.value_and_grad(value, has_aux=True)
        return grad(params, True), grad(params, False)

    is_kept = set()
    for seed in range(6):
        ((value, state), gradient), ((expected, plain), full) = step(variables["params"], seed)
        np.testing.assert_array_equal(value, expected)
        chex.assert_trees_all_equal(state, plain)
        kept = bool(jnp.any(gradient["branch"]["Dense_0"]["kernel"] != 0))
        full = full if kept else jax.tree.map(jnp.zeros_like, full)
        # The gradient of a bias in front of a normalisation is zero, up to rounding.
        chex.assert_trees_all_close(gradient, full, rtol=1e-5, atol=1e-6)
        is_kept.add(kept)
    assert is_kept == {True, False}
    evaluated = class_(True).apply(variables, X, False)
    np.testing.assert_array_equal(evaluated, class_(False).apply(variables, X, False))


@pytest.mark.parametrize("name", ["resnet_small", "vit_mini/4"])
def test_models(name, standard_promotion):
    """The forward pass is that without; some branches of each step have no gradient."""

    def build(rate):
        return models.create(
            name,
            num_classes=10,
            image_shape=(8, 8, 1),
            branches=models.Branches((rate,) * models.depth(name), "backward"),
            rngs=nnx.Rngs(0, drop_backward=1),
        )

    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    model, plain = build(0.6), build(0.0)
    assert plain.draw_kept is None
    for each in (model, plain):
        for _, param in nnx.iter_graph(each):
            if isinstance(param, nnx.Param):
                param[...] += 0.1 * jnp.sin(jnp.arange(param.size)).reshape(param.shape)
    step = nnx.jit(nnx.value_and_grad(lambda model, images: jnp.mean(model(images) ** 2)))
    patterns = set()
    for _ in range(6):
        (value, gradient), (expected, _) = step(model, images), step(plain, images)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        blocks = nnx.to_pure_dict(gradient["blocks"])
        layers = ("conv1",) if name.startswith("resnet") else ("attention", "mlp")
        found = [
            any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(block[layer]))
            for block in blocks.values()
            for layer in layers
        ]
        assert any(found)  # A step keeps at least one.
        patterns.add(tuple(found))
    assert len(patterns) > 1
    state = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    for x, y in zip(state, jax.tree.leaves(nnx.state(plain, nnx.BatchStat)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)  # Two programs round differently.
    model.eval(), plain.eval()
    np.testing.assert_allclose(model(images), plain(images), rtol=1e-4, atol=1e-6)


# Draws for all branches of a step.


@given(
    rates=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=8),
    choice=st.sampled_from(["bernoulli", "exact"]),
)
@settings(max_examples=20)
def test_kept_branches(rates, choice):
    keys = jax.random.split(KEY, 3000)
    draw = jax.jit(jax.vmap(lambda key: cdb_jax.kept_branches(rates, key=key, choice=choice)))
    kept = np.asarray(draw(keys))
    assert kept.any(axis=1).all()
    keep = 1 - np.array(rates)
    if keep.sum() >= 1 and choice == "exact":
        low, high = np.floor(keep.sum() + 1e-6), np.ceil(keep.sum() - 1e-6)
        assert set(kept.sum(axis=1)) <= {low, high}
        expected = keep
    elif choice == "exact":
        return  # One is always kept, so more often than the rates say.
    else:
        all_dropped = np.prod(rates)
        can_be_last = (keep > 0) if (keep > 0).any() else np.ones_like(keep, bool)
        expected = keep + all_dropped * can_be_last / can_be_last.sum()
    sigma = np.sqrt(expected * (1 - expected) / len(keys)) + 1e-9
    assert (np.abs(kept.mean(axis=0) - expected) <= 4 * sigma).all()


@pytest.mark.parametrize("choice", ["bernoulli", "exact"])
def test_equal_rates_that_keep_less_than_one_branch(choice):
    draw = jax.jit(jax.vmap(lambda key: cdb_jax.kept_branches([0.9] * 4, key=key, choice=choice)))
    share = np.asarray(draw(jax.random.split(KEY, 20_000))).mean(axis=0)
    expected = 0.25 if choice == "exact" else 0.1 + 0.9**4 / 4
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000)).all()


def test_kept_branches_of_equal_rates_are_all_subsets():
    draw = jax.jit(jax.vmap(lambda key: cdb_jax.kept_branches([0.5] * 4, key=key, choice="exact")))
    kept = np.asarray(draw(jax.random.split(KEY, 6000)))
    _, counts = np.unique(kept, axis=0, return_counts=True)
    assert len(counts) == 6
    assert (np.abs(counts - 1000) < 4 * np.sqrt(6000 * (1 / 6) * (5 / 6))).all()


def test_sensitivities_against_gradients_one_by_one():
    params = network()

    def gradient(kept, params):
        return jax.grad(loss)(params, kept)

    found = cdb_jax.drop_backward_sensitivities(gradient, DEPTH, params)

    def norms(kept):
        leaves = jax.tree.leaves(jax.grad(reference)(params, jnp.array(kept)))
        return np.array([np.linalg.norm(g) for g in leaves])

    for i in range(DEPTH):
        change = norms([j != i for j in range(DEPTH)]) - norms([True] * DEPTH)
        np.testing.assert_allclose(found[i], np.sum(change**2), rtol=1e-4)
    rates = cdb_jax.drop_path_rates(3, 1.5, mode="sense", sensitivities=found)
    assert np.argmin(rates) == np.argmax(found)


# Stacked blocks.


@given(
    rate=st.sampled_from([0.0, 0.3, 0.5, 0.99, 1.0]), scaled=st.booleans(), seed=st.integers(0, 9)
)
@settings(max_examples=12)
def test_scan_against_a_loop(rate, scaled, seed):
    depth, key = 5, jax.random.key(seed)
    blocks = {
        "w": 0.3 * jax.random.normal(key, (depth, WIDTH, WIDTH)),
        "seed": jnp.arange(depth, dtype=jnp.uint32),
    }
    bias = jnp.linspace(0, 1, WIDTH)

    def scanned(w, bias, x):
        def branch(block, x):
            noise = jax.random.uniform(jax.random.key(block["seed"]), x.shape)
            return jnp.sin(x @ block["w"] + bias[None]) * noise

        settings = dict(rate=rate, key=key, scale_by_keep=scaled)
        y = cdb_jax.drop_backward_scan(branch, blocks | {"w": w}, x, **settings)
        return jnp.mean(y**2)

    num_kept = 0 if rate == 1 else max(1, round(depth * (1 - rate)))
    factor = depth / num_kept if scaled and num_kept else 1.0
    args = blocks["w"], bias, X
    value, gradient = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1, 2)))(*args)
    kept = np.asarray(jnp.any(gradient[0] != 0, axis=(1, 2)))
    assert kept.sum() == num_kept

    def looped(w, bias, x):
        for i in range(depth):
            noise = jax.random.uniform(jax.random.key(i), x.shape)
            y = jnp.sin(x @ w[i] + bias[None]) * noise
            constant = jax.lax.stop_gradient(y)
            x = x + (constant + factor * (y - constant) if kept[i] else constant)
        return jnp.mean(x**2)

    expected_value, expected = jax.jit(jax.value_and_grad(looped, argnums=(0, 1, 2)))(*args)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_scan_keeps_every_block_equally_often():
    blocks, depth, num = jnp.ones((5, 1)), 5, 2000

    def kept(key):
        def f(blocks):
            branch = lambda w, x: w * x  # noqa: E731
            return jnp.sum(cdb_jax.drop_backward_scan(branch, blocks, X[0, :1], rate=0.6, key=key))

        return jax.grad(f)(blocks)[:, 0] != 0

    found = np.asarray(jax.jit(jax.vmap(kept))(jax.random.split(KEY, num)))
    assert (found.sum(axis=1) == 2).all()
    assert (np.abs(found.mean(axis=0) - 2 / depth) < 4 * np.sqrt(0.4 * 0.6 / num)).all()


def test_scan_stores_inputs_of_kept_blocks_only():
    depth = 12
    blocks = jnp.zeros((depth, 32, 32))
    x = jnp.ones((64, 32))

    def stored(rate):
        def f(blocks, x):
            return cdb_jax.drop_backward_scan(
                lambda w, x: jnp.sin(x @ w), blocks, x, rate=rate, key=KEY
            )

        _, vjp = jax.eval_shape(lambda blocks, x: jax.vjp(f, blocks, x), blocks, x)
        return sum(r.size for r in jax.tree.leaves(vjp) if r.shape[1:] == x.shape)

    assert [stored(rate) for rate in (0.0, 0.5, 0.75)] == [k * x.size for k in (12, 6, 3)]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_scan_on_eight_devices(kind):
    mesh, params, x = on_devices(kind)
    blocks = jax.tree.map(lambda *w: jnp.stack(w), *network().values())

    def f(blocks, x):
        return jnp.mean(cdb_jax.drop_backward_scan(branch, blocks, x, rate=0.5, key=KEY) ** 2)

    expected = jax.jit(jax.grad(f))(blocks, jnp.tile(X, (4, 1)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(blocks, NamedSharding(mesh, P()))
        found = jax.jit(jax.grad(f))(placed, x)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def closed_over(dropout):
    drop = cdb_jax.nnx.DropBackward(0.5, rngs=nnx.Rngs(0))
    return drop(lambda x: dropout(x), X)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cdb_jax.drop_backward(jnp.sin, X, rate=1.5, key=KEY), "rate must be.*1.5"),
        (lambda: cdb_jax.drop_backward(jnp.sin, X, rate=0.5), "key is missing"),
        (lambda: cdb_jax.drop_backward(jnp.sin, X), "rate is missing"),
        (
            lambda: cdb_jax.drop_backward(jnp.sin, X, kept=True, scale_by_keep=True),
            "rate is missing",
        ),
        (lambda: cdb_jax.drop_backward(jnp.sin, X, kept=jnp.ones(2, bool)), "kept must be"),
        (lambda: cdb_jax.drop_backward(jnp.sin, X, kept=1.0), "kept must be.*1.0"),
        (
            lambda: cdb_jax.drop_backward(jnp.sin, X, rate=0.5, key=KEY, scale_by_keep=1),
            "scale_by_keep.*1",
        ),
        (lambda: cdb_jax.nnx.DropBackward(0.5)(jnp.sin, X), "rngs is missing.*DropBackward"),
        (lambda: cdb_jax.nnx.DropBackward(2), "rate must be.*2"),
        (
            lambda: cdb_jax.drop_backward(jnp.sin(X), rate=0.5, key=KEY),
            "branch must be a function.*not its result",
        ),
        (
            lambda: cdb_jax.nnx.DropBackward(0.5, deterministic=True)(X, X),
            r"branch must be .* an array; .*drop\(branch, x\)",
        ),
        (
            lambda: cdb_jax.drop_backward_scan(X, X, X, rate=0.5, key=KEY),
            r"branch must be .* an array; .*drop_backward_scan\(branch, blocks, x",
        ),
        (
            lambda: cdb_jax.drop_backward(
                lambda m, x: m(x), nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), X, rate=0.5, key=KEY
            ),
            "args holds an nnx.Module.*use cdb_jax.nnx.DropBackward",
        ),
        (
            lambda: closed_over(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
            "changes a model that it closes over; pass the model",
        ),
        (
            lambda: cdb_jax.linen.DropBackward(0.5, deterministic=True).apply({}, jnp.sin, X),
            "branch must be a module.*use drop",
        ),
        (lambda: cdb_jax.kept_branches([0.5, 1.5], key=KEY), "rates must be.*1.5"),
        (lambda: cdb_jax.kept_branches(0.5, key=KEY), "rates must have.*shape"),
        (lambda: cdb_jax.kept_branches([0.5], key=KEY, choice="all"), "choice must be.*'all'"),
        (lambda: cdb_jax.kept_branches([0.5], key=None), "key is missing"),
        (lambda: cdb_jax.drop_path_rates(2, 1, costs=[1, 0]), "costs must be > 0"),
        (lambda: cdb_jax.drop_path_rates(2, 1, costs=[1]), r"costs must be 2 .*\[1\]"),
        (
            lambda: cdb_jax.drop_backward_scan(lambda w, x: x, {}, X, rate=0.5, key=KEY),
            "blocks must be arrays",
        ),
        (
            lambda: cdb_jax.drop_backward_scan(lambda w, x: x, [X, X[:2]], X, rate=0.5, key=KEY),
            "blocks must be arrays.*first axis",
        ),
        (
            lambda: cdb_jax.drop_backward_scan(lambda w, x: x[0], X, X, rate=0.5, key=KEY),
            "branch returned",
        ),
        (
            lambda: cdb_jax.drop_backward_scan(lambda w, x: (x, None), X, X, rate=0.5, key=KEY),
            "branch returned",
        ),
        (
            lambda: jax.jit(
                lambda rate: cdb_jax.drop_backward_scan(lambda w, x: x, X, X, rate=rate, key=KEY)
            )(0.5),
            "rate must be a Python number",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
