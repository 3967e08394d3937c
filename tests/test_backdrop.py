"""Backdrop: the identity forward, a random mask of mean one on the gradient."""

import functools

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

import cdb_jax.linen
import cdb_jax.nnx

X = jax.random.normal(jax.random.key(0), (4, 5, 6, 3))
G = jax.random.normal(jax.random.key(1), X.shape)


def factors(rate, shape=X.shape, seed=0, **settings):
    """What the gradient is multiplied by."""
    x = jnp.ones(shape)
    key = jax.random.key(seed)
    return jax.grad(lambda x: jnp.sum(cdb_jax.backdrop(x, rate, key=key, **settings)))(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_the_forward_pass_is_the_identity(dtype):
    x = jnp.concatenate([X.ravel(), jnp.array([jnp.nan, jnp.inf, -0.0, 1e-40])]).astype(dtype)
    y = jax.jit(lambda x: cdb_jax.backdrop(x, 0.5, axes=0, key=jax.random.key(0)))(x)
    assert y.dtype == dtype
    assert np.asarray(y).tobytes() == np.asarray(x).tobytes()


@pytest.mark.parametrize("axes", [(1, 2), 0, (0, 1, 2, 3), -1])
@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_the_gradient_against_numpy(axes, rate):
    """m N / sum(m), shared along the other axes."""
    key = jax.random.key(3)
    _, pull = jax.vjp(lambda x: cdb_jax.backdrop(x, rate, axes=axes, key=key), X)
    (dx,) = pull(G)
    mask = np.asarray(factors(rate, seed=3, axes=axes)) > 0
    named = {axis % 4 for axis in (axes if isinstance(axes, tuple) else (axes,))}
    others = tuple({0, 1, 2, 3} - named)
    assert (mask == mask.any(axis=others, keepdims=True)).all()
    one = mask.max(axis=others, keepdims=True)
    expected = np.asarray(G) * one * one.size / one.sum()
    np.testing.assert_allclose(dx, expected, rtol=1e-6)


@given(
    st.floats(0, 1),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 2**20),
    st.data(),
)
@hypothesis.settings(max_examples=12)
def test_every_mask_has_mean_one_and_is_never_empty(rate, shape, seed, data):
    axes = data.draw(st.sets(st.sampled_from(range(len(shape))), min_size=1))
    rest = sorted(set(range(len(shape))) - axes)
    samples = data.draw(st.sets(st.sampled_from(rest))) if rest else set()
    found = np.asarray(
        factors(rate, tuple(shape), seed, axes=tuple(axes), sample_axes=tuple(samples))
    )
    mean = found.mean(axis=tuple(axes))
    np.testing.assert_allclose(mean, 1.0, rtol=1e-5)
    shared = tuple(set(rest) - samples)
    assert (found == found.max(axis=shared, keepdims=True)).all()


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_rate(rate):
    found = np.asarray(factors(rate, (200, 100), axes=1, sample_axes=0)) > 0
    assert abs(found.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / found.size)
    rows = found.mean(axis=1)
    assert rows.std() > 0.5 * np.sqrt(rate * (1 - rate) / 100)  # Each on its own.


def test_the_one_that_stays_is_any():
    found = np.asarray(factors(1.0, (4000, 4), axes=1, sample_axes=0))
    assert set(np.unique(found)) == {0.0, 4.0}
    counts = (found > 0).sum(axis=0)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)


def test_the_mean_over_draws_is_the_gradient():
    def loss(x, key):
        return jnp.sum(cdb_jax.backdrop(x, 0.5, axes=0, key=key))

    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(jax.grad(loss), (None, 0))(jnp.ones(16), keys)
    # The variance of m n / sum(m) is about (1 - p) / p.
    assert np.abs(np.mean(draws, axis=0) - 1).max() < 5 * np.sqrt(1.1 / 4000)


def test_rate_zero_leaves_the_program_alone():
    assert not jax.make_jaxpr(lambda x: cdb_jax.backdrop(x, 0.0, axes=0))(X).jaxpr.eqns
    traced = jax.jit(lambda x, rate: cdb_jax.backdrop(x, rate, axes=0, key=jax.random.key(0)))
    (dx,) = jax.vjp(lambda x: traced(x, 0.0), X)[1](G)
    np.testing.assert_array_equal(dx, G)


def test_bad_values_of_dropped_entries_do_not_pass():
    key = jax.random.key(0)
    dropped = np.asarray(factors(0.5, (8,), axes=0)) == 0
    _, pull = jax.vjp(lambda x: cdb_jax.backdrop(x, 0.5, axes=0, key=key), jnp.ones(8))
    (dx,) = pull(jnp.where(dropped, jnp.nan, 1.0))
    assert np.isfinite(dx).all() and (np.asarray(dx)[dropped] == 0).all()


def test_a_mask_for_diagnosis():
    mask = jnp.zeros((1, 5, 6, 1)).at[0, 2, 3, 0].set(1)
    plain = functools.partial(cdb_jax.backdrop, rate=0.5, axes=(1, 2))
    in_nnx = cdb_jax.nnx.Backdrop(0.5, axes=(1, 2), rngs=nnx.Rngs(0))
    in_nnx.eval()
    in_linen = functools.partial(cdb_jax.linen.Backdrop(0.5, axes=(1, 2)).apply, {})
    for f in (plain, in_nnx, in_linen):
        for given_mask in (mask, mask.astype(bool), 7 * mask):
            (dx,) = jax.vjp(functools.partial(f, mask=given_mask), X)[1](G)
            np.testing.assert_allclose(dx, G * mask * 30, rtol=1e-6)


def test_masks_are_checked_under_jit_too_and_traced_ones_give_no_nan():
    zeros = np.zeros((1, 5, 6, 1), np.float32)

    def f(x, mask):
        return jnp.sum(cdb_jax.backdrop(x, 0.5, axes=(1, 2), mask=mask))

    with pytest.raises(ValueError, match="mask must have.*not all of them 0"):
        jax.jit(lambda x: f(x, zeros))(X)
    assert not jax.jit(jax.grad(f))(X, zeros).any()


def test_numpy_axes_and_empty_batches():
    np.testing.assert_array_equal(factors(0.5, axes=np.int64(1)), factors(0.5, axes=1))
    empty = jnp.ones((0, 3))
    assert cdb_jax.backdrop(empty, 0.5, axes=0, key=jax.random.key(0)) is empty


def test_a_layer_with_rate_zero_draws_nothing_from_anyone():
    def kernel(rate):
        rngs = nnx.Rngs(0)
        cdb_jax.nnx.Backdrop(rate, axes=0, rngs=rngs)
        return nnx.Linear(2, 2, rngs=rngs).kernel[...]

    np.testing.assert_array_equal(kernel(0.0), nnx.Linear(2, 2, rngs=nnx.Rngs(0)).kernel[...])
    with pytest.raises(TypeError, match="rngs must be nnx.Rngs"):
        cdb_jax.nnx.Backdrop(0.5, axes=0, rngs=jax.random.key(0))
    with pytest.raises(ValueError, match="axes is empty"):
        cdb_jax.nnx.Backdrop(0.5, axes=())


def test_only_the_key_is_stored():
    key = jax.random.key(0)
    _, pull = jax.vjp(lambda x: cdb_jax.backdrop(x, 0.5, axes=(0, 1, 2, 3), key=key), X)
    stored = sum(x.size for x in jax.tree.leaves(pull))
    assert stored <= 4, stored


def test_transformations():
    """Under `jit`, `vmap`, `remat`, `scan` and a second derivative the masks are the same."""
    keys = jax.random.split(jax.random.key(5), 3)

    def loss(x, keys, wrap=lambda f: f):
        layer = wrap(lambda x, key: jnp.sin(cdb_jax.backdrop(x, 0.5, axes=0, key=key)))
        for key in keys:
            x = layer(x, key)
        return jnp.sum(x)

    x = X[..., 0]
    expected = jax.grad(loss)(x, keys)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x, keys), expected, rtol=1e-5)
    remat = jax.grad(lambda x: loss(x, keys, jax.checkpoint))(x)
    np.testing.assert_allclose(remat, expected, rtol=1e-5)

    def scanned(x):
        def step(x, key):
            return jnp.sin(cdb_jax.backdrop(x, 0.5, axes=0, key=key)), None

        return jnp.sum(jax.lax.scan(step, x, keys)[0])

    np.testing.assert_allclose(jax.grad(scanned)(x), expected, rtol=1e-5)
    both = jax.vmap(jax.grad(loss), in_axes=(None, 0))(x, jnp.stack([keys, keys[::-1]]))
    np.testing.assert_allclose(both[0], expected, rtol=1e-5)
    np.testing.assert_allclose(both[1], jax.grad(loss)(x, keys[::-1]), rtol=1e-5)
    hessian = jax.jacfwd(jax.grad(lambda x: loss(x, keys)))(x[0, 0])
    assert np.isfinite(hessian).all()


def test_eight_devices_draw_one_mask():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (16, 8))
    f = jax.jit(jax.grad(lambda x: jnp.sum(cdb_jax.backdrop(x, 0.5, axes=0, key=key) ** 2)))
    key = jax.random.key(2)
    sharded = f(jax.device_put(x, NamedSharding(mesh, P("data"))))
    np.testing.assert_array_equal(sharded, f(x))
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        found = f(jax.device_put(x, P("data")))
    np.testing.assert_array_equal(found, f(x))


def test_nnx_layer():
    layer = cdb_jax.nnx.Backdrop(0.5, axes=(1, 2), sample_axes=0, rngs=nnx.Rngs(0))

    @nnx.jit
    def gradient(layer):
        def loss(layer, x):
            return jnp.sum(layer(x) * G)

        return nnx.grad(loss, argnums=1)(layer, X)

    first, second = gradient(layer), gradient(layer)
    assert (first != second).any() and (first == 0).any()
    layer.eval()
    np.testing.assert_array_equal(gradient(layer), G)
    layer.train()
    assert (gradient(layer) != G).any()
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    off = nnx.view(layer, deterministic=True)
    np.testing.assert_array_equal(off(X), X)
    by_call = cdb_jax.nnx.Backdrop(0.5, axes=1)
    with pytest.raises(ValueError, match="rngs is missing.*Backdrop"):
        by_call(X)
    np.testing.assert_array_equal(by_call(X, rngs=jax.random.key(0)), X)


def test_linen_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return cdb_jax.linen.Backdrop(0.5, axes=(1, 2))(x, deterministic=not train)

    def gradient(train, seed):
        rngs = {"backdrop": jax.random.key(seed)}
        return jax.grad(lambda x: jnp.sum(Net().apply({}, x, train, rngs=rngs) * G))(X)

    assert (gradient(True, 0) != gradient(True, 1)).any()
    np.testing.assert_array_equal(gradient(False, 0), G)
    masked = np.asarray(gradient(True, 0) == 0)
    assert (masked == masked.all(axis=(0, 3), keepdims=True)).all()


def test_the_gradient_of_a_mean_over_draws():
    """An input that the draws share gets the mean of their masks, with a key or a given mask."""
    x = jnp.arange(1.0, 5.0)
    keys = jax.random.split(jax.random.key(0), 6)
    masks = jnp.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])

    def of_key(x, key):
        return jnp.sum(cdb_jax.backdrop(x, 0.5, axes=0, key=key) ** 2)

    def of_mask(x, mask):
        return jnp.sum(cdb_jax.backdrop(x, 0.5, axes=0, mask=mask) ** 2)

    for f, draws in ((of_key, keys), (of_mask, masks)):
        together = jax.grad(lambda x, f=f, d=draws: jnp.mean(jax.vmap(f, (None, 0))(x, d)))(x)
        alone = jax.vmap(jax.grad(f), (None, 0))(x, draws)
        np.testing.assert_allclose(together, alone.mean(axis=0), rtol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(rate=1.5), ValueError, "rate must be a drop probability.*1.5"),
        (dict(rate=lambda step: 0.5), TypeError, "rate must be a drop probability.*lambda"),
        (dict(axes=4), ValueError, r"axes=\(4,\).*4 axes"),
        (dict(axes="x"), ValueError, "axes='x' must be an int or a tuple of ints"),
        (dict(axes=(1, True)), ValueError, "must be an int or a tuple of ints"),
        (dict(axes=(1, -3)), ValueError, r"axes=\(1, -3\).*name an axis twice"),
        (dict(axes=()), ValueError, "axes is empty"),
        (dict(axes=True), ValueError, "axes=True"),
        (dict(sample_axes=1), ValueError, "sample_axes=1 name an axis twice"),
        (dict(sample_axes=-5), ValueError, r"sample_axes=\(-5,\).*4 axes"),
        (dict(key=None), TypeError, "key is missing"),
        (dict(mask=jnp.ones((5, 6))), ValueError, r"mask has shape \(5, 6\)"),
        (dict(mask=jnp.ones((1, 5, 6, 2))), ValueError, r"mask has shape \(1, 5, 6, 2\)"),
        (dict(mask=jnp.ones((1, 5, 6, 1), complex)), ValueError, "mask has .*complex64"),
        (dict(mask=jnp.zeros((1, 5, 6, 1))), ValueError, "mask must have.*not all of them 0 along"),
        (dict(mask=-jnp.ones((1, 5, 6, 1))), ValueError, "mask must have finite entries >= 0"),
        (dict(mask=jnp.full((1, 5, 6, 1), jnp.nan)), ValueError, "mask must have finite entries"),
        (dict(key=3), TypeError, "key must be a JAX key, got 3"),
    ],
)
def test_mistakes(settings, error, message):
    settings = {"rate": 0.5, "axes": (1, 2), "key": jax.random.key(0)} | settings
    with pytest.raises(error, match=message):
        cdb_jax.backdrop(X, settings.pop("rate"), **settings)
