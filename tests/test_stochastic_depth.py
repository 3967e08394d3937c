"""Stochastic depth: dropped branches, drop rates that meet a budget, sensitivities."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

import cdb_jax.linen
import cdb_jax.nnx
import models

X = jax.random.normal(jax.random.key(0), (64, 3, 2))
KEY = jax.random.key(1)


# Drawing.


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drop_path_against_numpy(rate):
    y = np.asarray(cdb_jax.drop_path(X, rate, key=KEY))
    kept = (y != 0).any(axis=(1, 2))
    assert 0 < kept.sum() < 64
    expected = np.asarray(X) * kept[:, None, None] / (1 - rate)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    plain = cdb_jax.drop_path(X, rate, key=KEY, scale_by_keep=False)
    np.testing.assert_array_equal(plain, np.asarray(X) * kept[:, None, None])
    gradient = jax.grad(lambda x: jnp.sum(cdb_jax.drop_path(x, rate, key=KEY)))(X)
    expected = np.broadcast_to(kept[:, None, None] / (1 - rate), X.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_rate(rate):
    ones = jnp.ones((20_000, 1))
    kept = np.asarray(cdb_jax.drop_path(ones, rate, key=KEY)) > 0
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / kept.size)
    keys = jax.random.split(KEY, 4000)
    whole = jax.vmap(lambda key: cdb_jax.drop_path(X[:2], rate, key=key, sample_axis=None))(keys)
    kept = np.asarray(whole != 0)
    assert (kept.all(axis=(1, 2, 3)) == kept.any(axis=(1, 2, 3))).all()
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / len(keys))


def test_limits_and_bad_values():
    assert cdb_jax.drop_path(X, 0.0) is X
    assert not cdb_jax.drop_path(X, 1.0).any()
    traced = jax.jit(lambda x, rate: cdb_jax.drop_path(x, rate, key=KEY))
    np.testing.assert_array_equal(traced(X, 0.0), X)
    assert not traced(X, 1.0).any()
    assert np.isfinite(jax.grad(lambda x: jnp.sum(traced(x, 1.0)))(X)).all()
    bad = jnp.full_like(X, jnp.nan)
    dropped = np.asarray(cdb_jax.drop_path(X, 0.5, key=KEY) == 0)
    assert (np.asarray(cdb_jax.drop_path(bad, 0.5, key=KEY))[dropped] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_dtype(dtype):
    assert cdb_jax.drop_path(X.astype(dtype), 0.3, key=KEY).dtype == dtype
    rate = jnp.float32(0.3)
    assert cdb_jax.drop_branch(jnp.sin, X.astype(dtype), rate=rate, key=KEY).dtype == dtype


def test_eight_devices_draw_the_same():
    f = jax.jit(lambda x: cdb_jax.drop_path(x, 0.5, key=KEY))
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        with jax.set_mesh(mesh):
            y = f(x)
        np.testing.assert_array_equal(y, f(X))
        assert y.sharding.spec[0] == "data"


# Branches that are not computed.


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_a_branch_that_is_not_computed(scale_by_keep):
    w = jax.random.normal(jax.random.key(2), (2, 2))

    def branch(x, w):
        return jnp.sin(x @ w)

    def skips(w, key):
        settings = dict(rate=0.5, key=key, scale_by_keep=scale_by_keep)
        return jnp.sum(cdb_jax.drop_branch(branch, X, w, **settings) ** 2)

    def masks(w, key):
        settings = dict(key=key, sample_axis=None, scale_by_keep=scale_by_keep)
        return jnp.sum(cdb_jax.drop_path(branch(X, w), 0.5, **settings) ** 2)

    found = set()
    for key in jax.random.split(KEY, 8):
        value, gradient = jax.jit(jax.value_and_grad(skips))(w, key)
        expected = jax.jit(jax.value_and_grad(masks))(w, key)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)
        found.add(bool(value == 0))
    assert found == {True, False}
    assert "conditional" in jax.jit(jax.grad(skips)).lower(w, KEY).compile().as_text()
    np.testing.assert_array_equal(cdb_jax.drop_branch(branch, X, w, rate=0.0), branch(X, w))
    assert not cdb_jax.drop_branch(branch, X, w, rate=1.0).any()


# Layers.


def test_nnx_layer():
    drop = cdb_jax.nnx.DropPath(0.5, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda drop, x: drop(x))
    assert (call(drop, X) != call(drop, X)).any()
    drop.eval()
    np.testing.assert_array_equal(call(drop, X), X)
    original = cdb_jax.nnx.DropPath(0.25, sample_axis=None, scale_by_keep=False, rngs=nnx.Rngs(0))
    outputs = np.stack([original(X) for _ in range(20)])
    assert all((y == 0).all() or (y == np.asarray(X)).all() for y in outputs)
    original.eval()
    np.testing.assert_allclose(original(X), 0.75 * X, rtol=1e-6)
    np.testing.assert_allclose(original.branch(jnp.sin, X), 0.75 * jnp.sin(X), rtol=1e-6)


def test_nnx_branch_with_state(standard_promotion):
    """What a branch changes in its model is changed only where it is computed."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=rngs)
            self.drop = cdb_jax.nnx.DropPath(0.5, sample_axis=None, rngs=rngs)

        def inner(self, x):
            return self.norm(x)

        def __call__(self, x):
            return x + self.drop.branch(Block.inner, self, x)

    block = Block(nnx.Rngs(0))
    step = nnx.jit(nnx.value_and_grad(lambda block, x: jnp.mean(block(x) ** 2)))
    moved = []
    for _ in range(8):
        before = block.norm.mean[...]
        _, gradient = step(block, X + 1)
        moved.append(bool((block.norm.mean[...] != before).all()))
        assert bool(jnp.any(gradient["norm"]["scale"][...] != 0)) == moved[-1]
    assert set(moved) == {True, False}


def test_linen_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return x + cdb_jax.linen.DropPath(0.5, scale_by_keep=False)(x, deterministic=not train)

    def apply(train, seed):
        return Net().apply({}, X, train, rngs={"drop_path": jax.random.key(seed)})

    assert (apply(True, 0) != apply(True, 1)).any()
    np.testing.assert_allclose(apply(False, 0), 1.5 * X, rtol=1e-6)


# Survival rates.


@given(
    depth=st.integers(1, 40),
    share=st.floats(0, 1),
    maximum=st.floats(0.5, 1),
    mode=st.sampled_from(["uniform", "linear", "sense"]),
    seed=st.integers(0, 1000),
)
def test_the_budget_is_met_exactly(depth, share, maximum, mode, seed):
    budget = depth * (1 - share * maximum)
    settings = {}
    if mode == "sense":
        settings["sensitivities"] = np.random.default_rng(seed).exponential(size=depth) + 1e-3
    rates = cdb_jax.drop_path_rates(depth, budget, mode=mode, maximum=maximum, **settings)
    assert rates.shape == (depth,) and rates.dtype == np.float64
    assert (rates >= 0).all() and (rates <= maximum + 1e-12).all()
    np.testing.assert_allclose((1 - rates).sum(), budget, rtol=1e-12, atol=1e-12)
    if mode == "linear":
        assert (np.diff(rates) >= -1e-12).all()
    if mode == "sense":
        order = np.argsort(settings["sensitivities"])
        assert (np.diff(rates[order]) <= 1e-12).all()
        free = (rates > 1e-9) & (rates < maximum - 1e-9)
        ratios = (1 - rates[free]) / settings["sensitivities"][free]
        if free.any():
            np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "budget"),
    [
        ([1, 1, 1e-100], 1.0),
        ([1, 1, 1e-310], 2.5),
        ([1e15, 2e15, 1e-44], 1.2),
        ([1, 0, 1e300], 1.5),
    ],
)
def test_the_budget_is_met_over_any_range_of_sensitivities(weights, budget):
    keep = 1 - cdb_jax.drop_path_rates(3, budget, mode="sense", sensitivities=weights)
    np.testing.assert_allclose(keep.sum(), budget, rtol=1e-12)
    is_ordered = np.argsort(keep, kind="stable") == np.argsort(weights, kind="stable")
    assert is_ordered.all() or len(set(keep)) < 3


def test_rounded_budgets():
    rates = cdb_jax.drop_path_rates(np.int64(3), 0.3, maximum=0.9)
    np.testing.assert_allclose(rates, 0.9)


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.3])
def test_bfloat16_is_scaled_in_float32(rate):
    x = jnp.linspace(1, 2, 256, dtype=jnp.float32).astype(jnp.bfloat16)[:, None]
    y = cdb_jax.drop_path(x, rate, key=KEY)
    kept = np.asarray(y != 0)
    expected = (np.asarray(x, np.float32) / (1 - rate)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y)[kept], expected[kept])


def test_linear_is_that_of_the_paper():
    depth, last = 54, 0.5
    budget = depth - (1 - last) * (depth + 1) / 2
    rates = cdb_jax.drop_path_rates(depth, budget, mode="linear")
    np.testing.assert_allclose(rates, np.arange(1, depth + 1) / depth * (1 - last), rtol=1e-12)


@pytest.mark.parametrize(
    "name", ["resnet_small", pytest.param("vit_mini/4", marks=pytest.mark.slow)]
)
def test_sensitivities_of_the_models(name, standard_promotion):
    """Against finite differences; a block that adds nothing has none."""
    model = models.create(name, num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    for _, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            param[...] += 0.1 * jnp.sin(jnp.arange(param.size)).reshape(param.shape)
    model.eval()
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    loss = jax.jit(lambda gates: jnp.mean(model(images, gates) ** 2))
    depth = models.depth(name)
    np.testing.assert_allclose(loss(jnp.ones(depth)), jnp.mean(model(images) ** 2), rtol=1e-5)
    found = cdb_jax.branch_sensitivities(loss, depth)
    assert found.shape == (depth,)
    for block in range(depth):
        step = 1e-2 * jnp.eye(depth)[block]
        difference = (loss(1 + step) - loss(1 - step)) / 2e-2
        np.testing.assert_allclose(found[block], abs(difference), rtol=0.05, atol=1e-3)
    rates = cdb_jax.drop_path_rates(depth, 0.7 * depth, mode="sense", sensitivities=found)
    assert np.argmin(rates) == np.argmax(found)


@pytest.mark.parametrize("name", ["resnet_small", "vit_mini/4"])
@pytest.mark.parametrize("skips", [False, True])
def test_models_drop_blocks(name, skips, standard_promotion):
    def build(branches):
        return models.create(
            name,
            num_classes=10,
            image_shape=(8, 8, 1),
            branches=branches,
            rngs=nnx.Rngs(0, drop_path=1),
        )

    plain = build(models.Branches())
    depth = models.depth(name)
    model = build(models.Branches((0.5,) * depth, skips))
    same = nnx.state(plain, nnx.Param), nnx.state(model, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, *same)
    model.head.kernel[...] = plain.head.kernel[...] = jnp.ones(model.head.kernel.shape)
    for each in (model, plain):
        for _, param in nnx.iter_graph(each):
            if isinstance(param, nnx.Param):
                param[...] += 0.1 * jnp.sin(jnp.arange(param.size)).reshape(param.shape)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    step = nnx.jit(nnx.value_and_grad(lambda model, images: jnp.mean(model(images) ** 2)))
    values, gone = zip(*(step(model, images) for _ in range(6)), strict=True)
    assert len({float(value) for value in values}) > 1
    kernels = [x["blocks"][0] for x in gone]
    zero = [not any(jnp.any(g) for g in jax.tree.leaves(nnx.to_pure_dict(x))) for x in kernels]
    assert len(set(zero)) == 2 or name.startswith("vit")
    always = build(models.Branches((0.0,) * depth, skips))
    twin = build(models.Branches())
    np.testing.assert_array_equal(always(images), twin(images))
    with pytest.raises(ValueError, match="rates has 1 .*blocks"):
        build(models.Branches((0.5,)))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cdb_jax.drop_path(X, 2.0, key=KEY), "rate must be a drop probability.*2.0"),
        (lambda: cdb_jax.drop_path(X, 0.5), "key is missing"),
        (
            lambda: cdb_jax.drop_path(X, 0.5, key=KEY, sample_axis=3),
            "sample_axis=3 .*axis of x",
        ),
        (lambda: cdb_jax.drop_path(X, 0.5, key=KEY, sample_axis="a"), "sample_axis='a'"),
        (
            lambda: cdb_jax.drop_path(jnp.arange(3), 0.5, key=KEY),
            "array of floats, got dtype int32",
        ),
        (lambda: cdb_jax.drop_path(X, 0.5, key=KEY, scale_by_keep="no"), "scale_by_keep.*'no'"),
        (lambda: cdb_jax.drop_path(X, 0.5, key=3), "key must be a JAX key, got 3"),
        (
            lambda: cdb_jax.drop_path(X, 0.5, key=nnx.Rngs(0)),
            r"key must be a JAX key, got Rngs.{,80}; use rngs.drop_path\(\)",
        ),
        (lambda: cdb_jax.drop_branch(jnp.sin, X, rate=0.5), "key is missing"),
        (
            lambda: cdb_jax.drop_branch(X, X, rate=0.5, key=KEY),
            r"branch must be .* an array; .*drop_branch\(branch, x.*not its result",
        ),
        (
            lambda: cdb_jax.nnx.DropPath(0.5, sample_axis=None).branch(X, deterministic=True),
            r"branch must be .* an array; .*drop.branch\(branch, x\)",
        ),
        (lambda: cdb_jax.nnx.DropPath(0.5, scale_by_keep=2), "scale_by_keep.*2"),
        (lambda: cdb_jax.nnx.DropPath(0.5).branch(jnp.sin, X), "sample_axis=0.*branch"),
        (lambda: cdb_jax.nnx.DropPath(0.5)(X), "rngs is missing.*DropPath"),
        (lambda: cdb_jax.drop_path_rates(0, 0), "depth must be.*got 0"),
        (lambda: cdb_jax.drop_path_rates(4, "a"), "budget.*'a'"),
        (lambda: cdb_jax.drop_path_rates(4, 5), "budget=5 .*between 0 and 4"),
        (lambda: cdb_jax.drop_path_rates(4, 1, maximum=0.5), "budget=1 .*between 2 and 4"),
        (lambda: cdb_jax.drop_path_rates(4, 3, mode="cubic"), "mode must be.*'cubic'"),
        (lambda: cdb_jax.drop_path_rates(4, 3, mode="sense"), "sensitivities=None"),
        (lambda: cdb_jax.drop_path_rates(4, 3, sensitivities=[1] * 4), "sensitivities=.1, 1, 1, 1"),
        (
            lambda: cdb_jax.drop_path_rates(4, 3, mode="sense", sensitivities=[1, 2]),
            r"sensitivities must be 4 .*\[1, 2\]",
        ),
        (
            lambda: cdb_jax.drop_path_rates(2, 1.5, mode="sense", sensitivities=[1, 0]),
            "budget=1.5 .*between 0 and 1.*1 sensitivities of 0",
        ),
        (lambda: cdb_jax.drop_path_rates(2, 1, maximum=2), "maximum must be.*2"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
