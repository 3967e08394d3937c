"""Stochastic depth that computes a branch for the kept samples only."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_meshes import sent
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import cdb_jax.linen
import cdb_jax.nnx
import models

KEY = jax.random.key(1)
X = jax.random.normal(jax.random.key(0), (16, 3, 2))


def kept_samples(y):
    return np.asarray(y != 0).any(axis=(1, 2))


@given(
    rate=st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.99]),
    num_shards=st.sampled_from([1, 2, 4, 16]),
    axis=st.sampled_from([0, 1, -1]),
    scaled=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=20)
def test_against_a_mask(rate, num_shards, axis, scaled, seed):
    """Values and gradients are those of the branch of all samples, times a mask."""
    w = jax.random.normal(jax.random.key(2), (2, 2))
    x = jnp.moveaxis(X, 0, axis)

    def f(w, x):
        def branch(x, scale):  # One sample at a time.
            x = jnp.moveaxis(x, axis, 0)
            return jnp.moveaxis(jnp.sin(x @ w) * jnp.moveaxis(scale["s"], axis, 0), 0, axis)

        y = cdb_jax.drop_path_subset(
            branch,
            x,
            {"s": x},
            rate=rate,
            key=jax.random.key(seed),
            sample_axis=axis,
            num_shards=num_shards,
            scale_by_keep=scaled,
        )
        return jnp.sum(y**2), y

    (value, y), gradient = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(w, x)
    kept = kept_samples(jnp.moveaxis(y, axis, 0))
    in_shard = max(1, round(16 // num_shards * (1 - rate)))
    assert (kept.reshape(num_shards, -1).sum(axis=1) == in_shard).all()
    factor = 16 / kept.sum() if scaled else 1.0

    def masked(w, x):
        x = jnp.moveaxis(x, axis, 0)
        y = jnp.sin(x @ w) * x * (factor * jnp.asarray(kept, jnp.float32))[:, None, None]
        return jnp.sum(y**2), jnp.moveaxis(y, 0, axis)

    (expected_value, expected), slopes = jax.value_and_grad(masked, argnums=(0, 1), has_aux=True)(
        w, x
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(gradient, slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_every_sample_is_kept_equally_often(num_shards):
    keys = jax.random.split(KEY, 4000)

    def kept(key):
        ones = jnp.ones((12, 1))
        settings = dict(rate=0.4, key=key, num_shards=num_shards, scale_by_keep=False)
        return cdb_jax.drop_path_subset(lambda x: x, ones, **settings)[:, 0]

    found = np.asarray(jax.jit(jax.vmap(kept))(keys))
    keep = num_shards * round(12 / num_shards * 0.6) / 12
    assert (np.abs(found.mean(axis=0) - keep) < 4 * np.sqrt(keep * (1 - keep) / len(keys))).all()
    # Two samples of a shard are kept together as often as in a draw without replacement.
    size, number = 12 // num_shards, round(12 / num_shards * 0.6)
    pair = number * (number - 1) / (size * (size - 1))
    together = (found[:, 0] * found[:, 1]).mean()
    assert abs(together - pair) < 4 * np.sqrt(pair * (1 - pair) / len(keys))


def test_the_mean_is_that_of_the_branch():
    keys = jax.random.split(KEY, 4000)
    x = jnp.linspace(1, 2, 10)[:, None]
    f = jax.jit(
        jax.vmap(lambda key: cdb_jax.drop_path_subset(jnp.square, x, rate=0.3, key=key)[:, 0])
    )
    found = np.asarray(f(keys))
    expected = np.asarray(jnp.square(x)[:, 0])
    sigma = found.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(found.mean(axis=0) - expected) < 4 * sigma).all()


def test_limits():
    assert cdb_jax.drop_path_subset(lambda x: x, X, rate=0.0) is X
    assert not cdb_jax.drop_path_subset(jnp.cos, X, rate=1.0).any()
    one = cdb_jax.drop_path_subset(jnp.cos, X, rate=0.999, key=KEY)
    assert kept_samples(one).sum() == 1
    bad = X.at[3].set(jnp.nan)
    y = cdb_jax.drop_path_subset(lambda x: x, bad, rate=0.5, key=jax.random.key(0))
    kept = kept_samples(cdb_jax.drop_path_subset(lambda x: x, X, rate=0.5, key=jax.random.key(0)))
    assert bool(jnp.isnan(y).any()) == bool(kept[3])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_dtype(dtype):
    y = cdb_jax.drop_path_subset(lambda x: x, X.astype(dtype), rate=0.3, key=KEY)
    assert y.dtype == dtype
    kept = kept_samples(y.real)
    expected = np.asarray(X.astype(dtype), np.complex64) * (16 / kept.sum())
    np.testing.assert_allclose(np.asarray(y, np.complex64)[kept], expected[kept], rtol=5e-3)


def test_operations_and_memory_fall_with_the_rate():
    w = jnp.ones((64, 256)), jnp.ones((256, 64))
    x = jnp.ones((500, 64))

    def compiled(rate):
        def f(w, x):
            for _ in range(4):
                x = x + cdb_jax.drop_path_subset(
                    lambda x: jnp.sin(x @ w[0]) @ w[1], x, rate=rate, key=KEY
                )
            return jnp.mean(x**2)

        return jax.jit(jax.grad(f)).lower(w, x).compile()

    full, part = compiled(0.0), compiled(0.4)
    assert part.cost_analysis()["flops"] < 0.62 * full.cost_analysis()["flops"]
    sizes = [each.memory_analysis().temp_size_in_bytes for each in (part, full)]
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_send_no_samples(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x = jax.device_put(jnp.tile(X, (2, 1, 1)), NamedSharding(mesh, P("data")))
    w = jax.random.normal(jax.random.key(2), (2, 2))

    def step(w, x):
        def loss(w):
            settings = dict(rate=0.5, key=KEY, num_shards=8)
            y = x + cdb_jax.drop_path_subset(lambda x: jnp.sin(x @ w), x, **settings)
            return jnp.mean(y**2)

        return jax.value_and_grad(loss)(w)

    expected = jax.jit(step)(w, jnp.tile(X, (2, 1, 1)))
    with jax.set_mesh(mesh):
        w = jax.device_put(w, NamedSharding(mesh, P()))
        compiled = jax.jit(step).lower(w, x).compile()
        found = jax.jit(step)(w, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    assert set(sent(compiled)) == {"all-reduce"}  # Of the loss and the gradient.


def test_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(x):
        key = jax.random.fold_in(KEY, jax.lax.axis_index("data"))
        return cdb_jax.drop_path_subset(lambda x: x, x, rate=0.5, key=key)

    y = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(X)
    kept = kept_samples(y).reshape(8, 2)
    assert (kept.sum(axis=1) == 1).all() and len(np.unique(kept, axis=0)) == 2


# Layers.


def test_nnx_layer(standard_promotion):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, momentum=0.0, use_running_average=False, rngs=rngs)
            self.drop = cdb_jax.nnx.DropPath(0.5, rngs=rngs)

        def inner(self, x):
            return self.norm(x)

        def __call__(self, x):
            return x + self.drop.subset(Block.inner, self, x)

    block = Block(nnx.Rngs(0))
    y = nnx.jit(lambda block, x: block(x))(block, X)
    kept = kept_samples(y - X)
    assert kept.sum() == 8
    # Batch normalisation sees the kept samples.
    np.testing.assert_allclose(block.norm.mean[...], X[kept].mean(axis=(0, 1)), rtol=1e-4)
    assert (kept_samples(block(X) - X) != kept).any()
    block.eval()
    np.testing.assert_allclose(block(X), X + block.norm(X), rtol=1e-6)


def test_linen_layer(standard_promotion):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            drop = cdb_jax.linen.DropPath(0.5, scale_by_keep=False)
            return x + drop.subset(nn.Dense(2), x, deterministic=not train)

    variables = Net().init(jax.random.key(0), X, False)
    rngs = {"drop_path": jax.random.key(1)}
    y = Net().apply(variables, X, True, rngs=rngs)
    full = Net().apply(variables, X, False)
    kept = kept_samples(y - X)
    assert kept.sum() == 8
    np.testing.assert_allclose((y - X)[kept], 2 * (full - X)[kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet_small", "vit_mini/4"])
def test_models(name, standard_promotion):
    def build(rate):
        branches = models.Branches((rate,) * models.depth(name), "subset")
        settings = dict(num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0, drop_path=1))
        return models.create(name, branches=branches, **settings)

    images = jax.random.normal(jax.random.key(1), (10, 8, 8, 1))
    model, plain = build(0.4), build(0.0)
    step = nnx.jit(nnx.value_and_grad(lambda model, images: jnp.mean(model(images) ** 2)))
    for each in (model, plain):
        for _, param in nnx.iter_graph(each):
            if isinstance(param, nnx.Param):
                param[...] += 0.1 * jnp.sin(jnp.arange(param.size)).reshape(param.shape)
    values = {float(step(model, images)[0]) for _ in range(4)}
    assert len(values) == 4
    assert float(step(plain, images)[0]) not in values
    if name.startswith("vit"):  # Batch statistics of a ResNet differ.
        model.eval(), plain.eval()
        np.testing.assert_array_equal(model(images), plain(images))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cdb_jax.drop_path_subset(jnp.sin, X, rate=1.5, key=KEY), "rate must be.*1.5"),
        (lambda: cdb_jax.drop_path_subset(jnp.sin, X, rate=0.5), "key is missing"),
        (
            lambda: cdb_jax.drop_path_subset(X, X, rate=0.5, key=KEY),
            r"branch must be .* an array; .*drop_path_subset\(branch, x.*not its result",
        ),
        (
            lambda: cdb_jax.nnx.DropPath(0.5, rngs=nnx.Rngs(0)).subset(X, X),
            r"branch must be .* an array; .*drop.subset\(branch, x\)",
        ),
        (
            lambda: cdb_jax.linen.DropPath(0.5, deterministic=True).apply(
                {}, X, X, method="subset"
            ),
            r"branch must be .* an array; .*drop.subset\(branch, x\)",
        ),
        (
            lambda: cdb_jax.drop_path_subset(jnp.sin, X, rate=0.5, key=KEY, sample_axis=3),
            "sample_axis=3 is not an axis",
        ),
        (
            lambda: cdb_jax.drop_path_subset(jnp.add, X, X[:4], rate=0.5, key=KEY),
            r"sample_axis=0.*\[4, 16\] samples",
        ),
        (
            lambda: cdb_jax.drop_path_subset(jnp.sin, X, rate=0.5, key=KEY, num_shards=3),
            "num_shards=3 does not divide the 16",
        ),
        (
            lambda: cdb_jax.drop_path_subset(jnp.sin, X, rate=0.5, key=KEY, num_shards=0),
            "num_shards must be.*0",
        ),
        (
            lambda: jax.jit(lambda rate: cdb_jax.drop_path_subset(jnp.sin, X, rate=rate, key=KEY))(
                0.5
            ),
            "rate must be a Python number",
        ),
        (
            lambda: cdb_jax.drop_path_subset(jnp.sum, X, rate=0.5, key=KEY),
            "branch must return one float array with the 8 kept samples",
        ),
        (
            lambda: cdb_jax.drop_path_subset(lambda x: x[:1], X, rate=0.5, key=KEY),
            "branch must return.*8 kept",
        ),
        (
            lambda: cdb_jax.drop_path_subset(lambda x, y: x, X, True, rate=0.5, key=KEY),
            "must be arrays of samples",
        ),
        (
            lambda: cdb_jax.nnx.DropPath(0.5, sample_axis=None, rngs=nnx.Rngs(0)).subset(
                jnp.sin, X
            ),
            "sample_axis=None",
        ),
        (
            lambda: cdb_jax.linen.DropPath(0.5, sample_axis=None).apply(
                {}, jnp.sin, X, deterministic=False, method="subset"
            ),
            "sample_axis=None",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
