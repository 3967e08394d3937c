"""`freeze_dropped`: what is dropped keeps its bits, and nothing else does."""

from typing import NamedTuple

import chex
import drawn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_models
from flax import nnx
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

import cdb_jax
from cdb_jax import Policy, freeze_dropped
from cdb_jax.channels import Leaf
from cdb_jax.freezing import _where

pytestmark = pytest.mark.usefixtures("standard_promotion")  # For optax's own optimizers.

KERNEL = jax.random.normal(jax.random.key(0), (6, 8))
PARAMS = {
    "a": {"kernel": KERNEL, "bias": jnp.ones(8)},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (8, 8))},
}
POLICY = Policy(0.5, key=0, channel_choice="window")


def gradients(count):
    keys = iter(jax.random.split(jax.random.key(count), 3))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), PARAMS)


def bits(x):
    x = np.asarray(x)
    return x.view(np.uint8).reshape(*x.shape, -1) if x.dtype.itemsize > 1 else x


def run(tx, steps=4, grads=gradients, params=PARAMS):
    """The parameters and states after each step, the first ones included."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    history = [(params, state)]
    for count in range(steps):
        updates, state = update(grads(count), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


OPTIMIZERS = {
    **toy_models.OPTIMIZERS,
    "adadelta": optax.adadelta(1.0),
    "radam": optax.radam(0.1),
    "lamb": optax.lamb(0.1),
    "novograd": optax.novograd(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=128),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_noise(0.1, 0.5, key=0)
    ),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=lambda count: 0.1),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "partition": optax.partition(
        {"one": optax.adam(0.1), "two": optax.sgd(0.1, momentum=0.9)},
        {"a": {"kernel": "one", "bias": "two"}, "b": {"kernel": "two"}},
    ),
    "finite": optax.apply_if_finite(optax.adam(0.1), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dropped_channels_keep_their_bits_and_the_others_learn(name):
    history = run(freeze_dropped(OPTIMIZERS[name], POLICY))
    for count, ((before, old), (after, new)) in enumerate(zip(history, history[1:], strict=False)):
        selection = POLICY.select(PARAMS, count).factors
        for path in selection:
            dropped = np.asarray(selection[path]) == 0
            assert 0 < dropped.sum() < dropped.size
            trees = [(before, after), (old.inner_state, new.inner_state)]
            for was, now in ((by_path(x), by_path(y)) for x, y in trees):
                found = [key for key in was if key.endswith(path) and was[key].ndim == 2]
                for key in found:
                    same = (bits(was[key]) == bits(now[key])).all(axis=(0, 2))
                    assert same[dropped].all(), (key, count)
                    assert not same[~dropped].any(), (key, count)
        assert (by_path(before)["a/bias"] != by_path(after)["a/bias"]).all()
        counts = [x for key, x in by_path(new).items() if key.endswith("/count") or key == "count"]
        assert counts and all(x == count + 1 for x in counts)


def test_rate_zero_is_the_optimizer_and_one_is_nothing():
    inner = optax.adamw(0.1)
    plain, state = run(inner)[-1]
    none, none_state = run(freeze_dropped(inner, Policy(0.0, key=0)))[-1]
    chex.assert_trees_all_equal((none, none_state.inner_state), (plain, state))
    frozen, frozen_state = run(freeze_dropped(inner, Policy(1.0, key=0)))[-1]
    chex.assert_trees_all_equal([frozen["a"]["kernel"], frozen["b"]], [KERNEL, PARAMS["b"]])
    assert frozen_state.inner_state[0].count == 4
    assert not jnp.any(frozen_state.inner_state[0].mu["b"]["kernel"])


def test_minus_zero_keeps_its_sign():
    params = {"kernel": jnp.array([[-0.0, 0.0, -0.0, 0.0]])}
    tx = freeze_dropped(optax.sgd(0.1), POLICY)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    dropped = POLICY.select(params, 0).factors["kernel"] == 0
    moved = optax.apply_updates(params, updates)["kernel"][0]
    signs = np.signbit(np.asarray(params["kernel"][0]))
    np.testing.assert_array_equal(np.signbit(moved)[dropped], signs[dropped])


def reference(count, params, mu, nu, gradient, keep, *, rate=0.1, b1=0.9, b2=0.999, decay=0.01):
    """A step of AdamW in NumPy, in which the columns that are not kept are frozen."""
    new_mu, new_nu = b1 * mu + (1 - b1) * gradient, b2 * nu + (1 - b2) * gradient**2
    mean, square = new_mu / (1 - b1**count), new_nu / (1 - b2**count)
    moved = params - rate * (mean / (np.sqrt(square) + 1e-8) + decay * params)
    return (np.where(keep, new, old) for new, old in [(moved, params), (new_mu, mu), (new_nu, nu)])


def test_adamw_against_numpy():
    params = {"kernel": KERNEL}
    tx = freeze_dropped(optax.adamw(0.1, weight_decay=0.01), POLICY)
    given = [jax.random.normal(jax.random.key(i), KERNEL.shape) for i in range(6)]
    history = run(tx, 6, lambda i: {"kernel": given[i]}, params)
    weights = np.asarray(KERNEL, np.float64)
    mu = nu = np.zeros_like(weights)
    for i in range(6):
        keep = np.asarray(POLICY.select(params, i).factors["kernel"])[None] > 0
        gradient = np.asarray(given[i], np.float64)
        weights, mu, nu = reference(i + 1, weights, mu, nu, gradient, keep)
        np.testing.assert_allclose(history[i + 1][0]["kernel"], weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(128, 128), (128, 256), (256, 128), (2, 128, 160)])
@pytest.mark.parametrize("axes", [cdb_jax.output_channels, cdb_jax.input_channels])
def test_the_factors_of_adafactor(shape, axes):
    """Rows and columns of a square kernel have one shape; each is frozen along its own axis."""
    stack = (0,) if len(shape) == 3 else ()
    policy = Policy(
        0.5, key=0, channel_choice="window", channel_axes=cdb_jax.Axes(axes, stack=stack)
    )
    params = {"kernel": jax.random.normal(jax.random.key(0), shape)}
    tx = freeze_dropped(optax.adafactor(0.1), policy)

    def grads(i):
        return {"kernel": jax.random.normal(jax.random.key(i), shape)}

    history = run(tx, 3, grads, params)
    out = axes is cdb_jax.output_channels
    for count, ((_, old), (_, new)) in enumerate(zip(history, history[1:], strict=False)):
        keep = np.asarray(policy.select(params, count).factors["kernel"]) > 0
        # The averages over the axis without channels are those of one channel each.
        sizes = np.argsort(shape)[-2:]
        channel = len(shape) - 1 if out else len(shape) - 2
        own = {sizes[1]: "v_col", sizes[0]: "v_row"}[channel]
        for field in ("v_row", "v_col"):
            was, now = (getattr(x.inner_state[0], field)["kernel"] for x in (old, new))
            changed = np.asarray(was != now)
            np.testing.assert_array_equal(changed, keep if field == own else changed | True)


class Rows(NamedTuple):
    rows: dict


def by_rows():
    """An optimizer that keeps one number for each row of a kernel."""

    def update(updates, state, params=None):
        rows = jax.tree.map(lambda r, g: r + jnp.sum(g**2, axis=-1), state.rows, updates)
        return jax.tree.map(lambda g, r: -g / (1 + r[..., None]), updates, rows), Rows(rows)

    def init(params):
        return Rows(jax.tree.map(lambda p: jnp.zeros(p.shape[:-1]), params))

    return optax.GradientTransformation(init, update)


def test_rules_for_other_states():
    params, policy = {"kernel": KERNEL}, Policy(0.5, key=0, channel_choice="exact")

    def grads(i):
        return {"kernel": KERNEL + i}

    rule = {Rows: lambda field, shape, entry: tuple(range(len(shape) - 1))}
    (_, old), (_, new) = run(freeze_dropped(by_rows(), policy, slot_axes=rule), 1, grads, params)
    assert (old.inner_state.rows["kernel"] != new.inner_state.rows["kernel"]).all()  # Shared.
    rows = Policy(0.5, key=0, channel_choice="exact", channel_axes=cdb_jax.input_channels)
    (_, old), (_, new) = run(freeze_dropped(by_rows(), rows, slot_axes=rule), 1, grads, params)
    keep = np.asarray(rows.select(params, 0).factors["kernel"]) > 0
    np.testing.assert_array_equal(
        np.asarray(old.inner_state.rows["kernel"] != new.inner_state.rows["kernel"]), keep
    )
    none = {Rows: lambda field, shape, entry: None}
    run(freeze_dropped(by_rows(), policy, slot_axes=none), 1, grads, params)


def test_other_optimizers_through_rules():
    """Muon is supplied; SM3 and L-BFGS become possible with a rule each."""

    def whole(shape):
        return tuple(range(len(shape)))

    def by_axis(field, shape, entry):
        return whole(shape) if entry == shape else (shape.index(entry[0]),)

    def memory(field, shape, entry):
        return shape and (None,) * (entry != shape) + whole(shape)

    sm3 = type(optax.sm3(0.1).init(PARAMS)[0])
    lbfgs = type(optax.scale_by_lbfgs().init(PARAMS))
    rules = {sm3: by_axis}, {lbfgs: memory}
    for inner, slot_axes in (
        (optax.contrib.muon(0.1), {}),
        (optax.sm3(0.1), rules[0]),
        (optax.chain(optax.scale_by_lbfgs(memory_size=2), optax.scale(-0.1)), rules[1]),
    ):
        history = run(freeze_dropped(inner, POLICY, slot_axes=slot_axes), 3)
        for count, ((_, old), (_, new)) in enumerate(zip(history, history[1:], strict=False)):
            keep = np.asarray(POLICY.select(PARAMS, count).factors["a/kernel"]) > 0
            pairs = by_path(old.inner_state), by_path(new.inner_state)
            own = [k for k in pairs[0] if "a/kernel" in k and pairs[0][k].shape[-1:] == (8,)]
            assert own
            for key in own:
                changed = np.asarray(pairs[0][key] != pairs[1][key])
                assert not changed[..., ~keep].any(), key


@given(data=st.data())
def test_the_mask_of_an_entry(data):
    """For any axes of a parameter and an entry: what has a kept channel is replaced."""
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple))
    axes = data.draw(st.permutations(range(len(shape))))
    channel = tuple(axes[: data.draw(st.integers(0, len(shape)))])
    leaf = Leaf("a", shape, channel=channel, layer="a")
    sizes = [shape[axis] for axis in channel]
    flags = data.draw(st.lists(st.booleans(), min_size=6, max_size=6))
    keep = np.resize(flags, sizes)
    entry_axes = data.draw(st.permutations([*range(len(shape)), None]))
    entry_axes = entry_axes[: data.draw(st.integers(0, len(entry_axes)))]
    entry = np.zeros([2 if axis is None else shape[axis] for axis in entry_axes], bool)
    for index in np.ndindex(*shape):
        if keep[tuple(index[axis] for axis in channel)]:
            entry[tuple(slice(None) if axis is None else index[axis] for axis in entry_axes)] = True
    found = _where({"a": jnp.asarray(keep)}, leaf, entry_axes, jnp.ones(entry.shape), 0.0)
    np.testing.assert_array_equal(found, entry)


def test_small_factors_of_adafactor_are_frozen():
    params = {"kernel": jnp.ones((5, 1))}
    tx = freeze_dropped(optax.adafactor(0.1, min_dim_size_to_factor=1), Policy(1.0, key=0))
    (_, old), (_, new) = run(tx, 1, lambda i: params, params)
    chex.assert_trees_all_equal(old.inner_state[0].v_row, new.inner_state[0].v_row)
    chex.assert_trees_all_equal(old.inner_state[0].v_col, new.inner_state[0].v_col)


MASKS = {"leaf by leaf": {"a": {"kernel": True, "bias": True}, "b": {"kernel": False}}}
MASKS["prefix"] = {"a": True, "b": False}
MASKS["function"] = lambda params: MASKS["leaf by leaf"]


@pytest.mark.parametrize("name", MASKS)
def test_an_optimizer_of_a_part_of_the_parameters(name):
    """A mask says the same leaf by leaf, as a prefix, and as a function."""
    inner = optax.masked(optax.adam(0.1), MASKS[name])
    history = run(freeze_dropped(inner, POLICY), 3)
    expected = run(freeze_dropped(optax.masked(optax.adam(0.1), MASKS["leaf by leaf"]), POLICY), 3)
    for (params, state), (other, other_state) in zip(history, expected, strict=True):
        chex.assert_trees_all_equal(params, other)
        moments = [optax.tree.get(x, "mu")["a"] for x in (state, other_state)]
        chex.assert_trees_all_equal(*moments)


def test_a_partition_by_prefix_labels():
    labels = {"a": "one", "b": "two"}
    inner = optax.partition({"one": optax.adam(0.1), "two": optax.lion(0.1)}, labels)
    for count, ((before, old), (after, new)) in enumerate(
        zip(*(run(freeze_dropped(inner, POLICY), 3)[i:][:3] for i in (0, 1)), strict=True)
    ):
        selection = POLICY.select(PARAMS, count).factors

        def mu(state):
            return {
                label: by_path(optax.tree.get(state.inner_state.inner_states[label], "mu"))
                for label in ("one", "two")
            }

        for label, path in (("one", "a/kernel"), ("two", "b/kernel")):
            keep = np.asarray(selection[path]) > 0
            was, now = mu(old)[label][path], mu(new)[label][path]
            np.testing.assert_array_equal(np.asarray(was != now).all(axis=0), keep)
            was, now = by_path(before)[path], by_path(after)[path]
            np.testing.assert_array_equal(np.asarray(was != now).all(axis=0), keep)


def test_parameters_without_a_gradient():
    """None, as in what Equinox filters, is no leaf of parameters, gradients and moments."""
    tx = freeze_dropped(optax.adam(0.1), POLICY)
    grads = PARAMS | {"b": {"kernel": None}}
    updates, new = tx.update(grads, tx.init(grads), grads)
    keep = np.asarray(POLICY.select(grads, 0).factors["a/kernel"]) > 0
    np.testing.assert_array_equal(np.asarray(updates["a"]["kernel"] != 0).all(axis=0), keep)
    mu = new.inner_state[0].mu["a"]["kernel"]
    np.testing.assert_array_equal(np.asarray(mu != 0).all(axis=0), keep)
    assert updates["b"]["kernel"] is None


def test_sharpness_and_slow_weights_go_around():
    """What takes a step in several updates works from outside: one selection for each step."""
    base = freeze_dropped(optax.sgd(0.1), POLICY)
    sam = optax.contrib.sam(base, optax.sgd(0.05), sync_period=2)
    (before, _), _, (after, _) = run(sam, 2)
    keep = np.asarray(POLICY.select(PARAMS, 0).factors["b/kernel"]) > 0
    same = np.asarray(before["b"]["kernel"] == after["b"]["kernel"]).all(axis=0)
    assert not same[keep].any()
    np.testing.assert_allclose(  # Back from where the adversary went.
        before["b"]["kernel"][:, ~keep], after["b"]["kernel"][:, ~keep], rtol=1e-6
    )
    pairs = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.lookahead(base, sync_period=2, slow_step_size=0.5)
    state = tx.init(pairs)
    for _ in range(2):
        updates, state = tx.update(PARAMS, state, pairs)
        pairs = optax.apply_updates(pairs, updates)
    ever = sum(np.asarray(POLICY.select(PARAMS, i).factors["b/kernel"]) > 0 for i in (0, 1))
    moved = np.asarray(pairs.slow["b"]["kernel"] != PARAMS["b"]["kernel"]).all(axis=0)
    np.testing.assert_array_equal(moved, ever > 0)


def grows(params):
    """An optimizer whose state changes its dtype in the first step."""

    def update(updates, state, params=None):
        return (updates, jax.tree.map(jnp.bfloat16, updates))

    return optax.GradientTransformation(lambda params: params, update)


EXAMPLES = {"kernel": jnp.ones((3, 6, 8))}
AGGREGATE = optax.contrib.differentially_private_aggregate(1.0, 0.0, key=jax.random.key(0))
MONITOR = optax.monitor({"norm": optax.tree.norm})
ADAM = optax.adam(0.1)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("inner", "params", "grads", "error", "message"),
    [
        (
            optax.chain(ADAM, MONITOR),
            *(PARAMS, PARAMS, TypeError),
            "inner.* state at .* in MonitorState.*optax.chain.cdb_jax.freeze_dropped",
        ),
        (
            optax.chain(AGGREGATE, optax.sgd(0.1)),
            *({"kernel": KERNEL}, EXAMPLES, ValueError),
            r"'kernel'.*\(3, 6, 8\).*\(6, 8\).*differentially_private_aggregate",
        ),
        (
            optax.GradientTransformation(lambda params: (), lambda *args: ({}, ())),
            *(PARAMS, PARAMS, TypeError),
            r"inner.* structure .*'kernel'.* to PyTreeDef\({}\).*around freeze_dropped",
        ),
        (grows(PARAMS), PARAMS, PARAMS, ValueError, "'a/bias' of its state.*float32.*bfloat16"),
    ],
    ids=["monitor", "per example", "structure", "dtype"],
)
def test_what_cannot_be_inside_is_named(inner, params, grads, error, message):
    tx = freeze_dropped(inner, Policy(0.5, key=0, channel_axes=-1))
    with pytest.raises(error, match=message):
        tx.update(grads, tx.init(params))


@pytest.mark.bad_input
def test_states_of_others_are_named():
    tx = freeze_dropped(ADAM, POLICY)
    with pytest.raises(TypeError, match="state must be a FreezeDroppedState"):
        tx.update(PARAMS, ADAM.init(PARAMS), PARAMS)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"count has shape \(2,\).*jax.vmap\(tx.update\)"):
        tx.update(PARAMS, stacked, PARAMS)


def test_minus_zero_of_complex_parameters():
    params = {"kernel": jnp.full((2, 4), complex(-0.0, -0.0), jnp.complex64)}
    tx = freeze_dropped(optax.sgd(0.1), Policy(1.0, key=0))
    updates, _ = tx.update(params, tx.init(params), params)
    moved = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_array_equal(bits(moved), bits(params["kernel"]))


def test_multi_steps_goes_around():
    tx = optax.MultiSteps(freeze_dropped(optax.adam(0.1), POLICY), 2).gradient_transformation()
    history = run(tx, 4)
    first, last = history[2][0]["b"]["kernel"], history[4][0]["b"]["kernel"]
    dropped = POLICY.select(PARAMS, 1).factors["b/kernel"] == 0
    np.testing.assert_array_equal((first == last).all(axis=0), dropped)


def test_inside_a_partition():
    labels = {"a": "frozen", "b": "plain"}
    tx = optax.partition(
        {"frozen": freeze_dropped(optax.adam(0.1), POLICY), "plain": optax.adam(0.1)}, labels
    )
    (before, _), (after, _) = run(tx, 1)
    keep = np.asarray(POLICY.select(PARAMS, 0).factors["a/kernel"]) > 0
    same = np.asarray(before["a"]["kernel"] == after["a"]["kernel"]).all(axis=0)
    np.testing.assert_array_equal(same, ~keep)
    assert (before["b"]["kernel"] != after["b"]["kernel"]).all()


def test_one_layer_learns_and_all_else_keeps_its_bits():
    policy = cdb_jax.presets.algorithm_1(0.5, key=0, other_layers="frozen", channel_choice="exact")
    history = run(freeze_dropped(optax.adamw(0.1), policy), 6)
    for count, ((before, _), (after, _)) in enumerate(zip(history, history[1:], strict=False)):
        selection = policy.select(PARAMS, count).factors
        for path, was in by_path(before).items():
            learns = np.asarray(selection[path]) > 0
            changed = np.asarray(was != by_path(after)[path])
            np.testing.assert_array_equal(changed, np.broadcast_to(learns, changed.shape))


@pytest.mark.parametrize("choice", ["window", "exact"])
def test_skipping_and_freezing_see_the_same_selection(choice):
    """The step with `value_and_grad` is that with the full gradient, up to rounding."""
    policy = Policy(0.5, key=0, channel_choice=choice, layer_rate=0.7)
    x = jax.random.normal(jax.random.key(2), (16, 6))

    def loss(params, x):
        hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)

    def train(value_and_grad):
        tx = freeze_dropped(optax.sgd(0.1, momentum=0.9), policy)

        @jax.jit
        def step(params, state):
            _, grads = value_and_grad(params, x, step=cdb_jax.selection_count(state))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(5):
            params, state = step(params, state)
        return params, state

    def full(params, x, step):
        return jax.value_and_grad(loss)(params, x)

    skip = train(drawn.value_and_grad(loss, policy))
    chex.assert_trees_all_close(skip, train(full), rtol=1e-4, atol=1e-6)
    assert cdb_jax.selection_count(skip[1]) == 5


def test_eight_devices_freeze_what_one_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = freeze_dropped(optax.adamw(0.1), POLICY)

    def place(tree):
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "data"))),
            tree,
        )

    sharded = run(tx, 3, lambda i: place(gradients(i)), place(PARAMS))
    alone = run(tx, 3)
    # Programs for other shapes round in other ways; what is frozen is the same to the bit.
    chex.assert_trees_all_close(sharded, alone, rtol=1e-6, atol=1e-7)
    changed = [
        [jax.tree.map(jnp.not_equal, old, new) for old, new in zip(h, h[1:], strict=False)]
        for h in (sharded, alone)
    ]
    chex.assert_trees_all_equal(*changed)
    assert sharded[-1][1].inner_state[0].mu["b"]["kernel"].sharding.spec == P(None, "data")


def test_nnx_linen_and_saving():
    model = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, freeze_dropped(optax.adam(0.1), POLICY), wrt=nnx.Param)
    before = model.kernel[...]
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(KERNEL.T) ** 2))(model))
    dropped = POLICY.select(nnx.state(model, nnx.Param), 0).factors["kernel"] == 0
    np.testing.assert_array_equal((model.kernel[...] == before).all(axis=0), dropped)

    tx = freeze_dropped(optax.adam(0.1), POLICY)
    (_, start), *_, (_, state) = run(tx)
    saved = flax.serialization.to_bytes(state)
    chex.assert_trees_all_equal(flax.serialization.from_bytes(start, saved), state)


def test_vmap_over_seeds_and_donation():
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    tx = freeze_dropped(optax.adam(0.1), POLICY)

    def stack(tree):
        return jax.tree.map(lambda x: jnp.stack([x, x + 1]), tree)

    states = jax.vmap(tx.init)(stack(PARAMS))
    together = jax.jit(jax.vmap(step), donate_argnums=(0, 1))(
        stack(PARAMS), states, stack(gradients(0))
    )
    alone = jax.jit(step)(PARAMS, tx.init(PARAMS), gradients(0))
    first = jax.tree.map(lambda x: x[0], together)
    chex.assert_trees_all_close(first, alone, rtol=1e-6, atol=1e-7)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: freeze_dropped(optax.sgd(0.1), 0.5), TypeError, "policy must be .*0.5"),
        (
            lambda: freeze_dropped(optax.MultiSteps(optax.sgd(0.1), 2), POLICY),
            TypeError,
            r"MultiSteps.*optax.MultiSteps\(cdb_jax.freeze_dropped",
        ),
        (lambda: freeze_dropped(optax.sgd, POLICY), TypeError, "inner must be an optimizer"),
        (lambda: freeze_dropped(1e-3, POLICY), TypeError, r"inner must be .*got 0.001\.$"),
        (
            lambda: freeze_dropped(POLICY, optax.sgd(0.1)),
            TypeError,
            "inner must be an optimizer.*; the policy is the second argument",
        ),
        (
            lambda: freeze_dropped(optax.sgd(0.1), POLICY, slot_axes={"Rows": 1}),
            TypeError,
            "slot_axes.*'Rows': 1",
        ),
    ],
    ids=["rate", "accumulates", "class", "number", "swapped", "rules"],
)
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()
