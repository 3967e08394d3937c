"""Settings and number formats that large trainings use: the same channels, the same result."""

import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import cdb_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")
POLICY = cdb_jax.Policy(0.5, key=0, channel_choice="window", layer_rate=0.7)
FORMATS = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.float64]


def params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        f"dense{i}": {"kernel": (0.3 * jax.random.normal(key, (16, 16))).astype(dtype)}
        for i, key in enumerate(keys)
    }


X = jax.random.normal(jax.random.key(1), (8, 16))
KEY = jax.random.key(2)


def loss(params, x, scale=1.0):
    for layer in params.values():
        x = jnp.sin(x.astype(layer["kernel"].dtype) @ layer["kernel"])
    return jnp.mean(jnp.abs(x) ** 2).astype(jnp.float32) * scale


def step(tx):
    def run(params):
        gradients = jax.grad(loss)(params, X)
        updates, state = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates), optax.tree.get(state, "mu")

    return run


CONSUMERS = {
    "before": step(optax.chain(cdb_jax.channel_drop_back(POLICY), optax.adamw(0.1))),
    "frozen": step(cdb_jax.freeze_dropped(optax.adamw(0.1), POLICY)),
    "skipped": lambda params: drawn.value_and_grad(loss, POLICY)(params, X, step=3),
    "backdrop": lambda params: jax.grad(
        lambda x: loss(params, cdb_jax.backdrop(x, 0.5, axes=0, key=KEY))
    )(X),
    "drop_path": lambda params: cdb_jax.drop_path(X, 0.5, key=KEY),
    "drop_branch": lambda params: cdb_jax.drop_branch(jnp.sin, X, rate=0.5, key=KEY),
}
# From a key of the caller's, with `jax.random`: these follow JAX's settings.
DRAWN_BY_JAX = ("backdrop", "drop_path", "drop_branch")
SETTINGS = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": ["rbg", "unsafe_rbg"],
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_check_tracer_leaks": True,
    "jax_threefry_partitionable": False,
    "jax_default_matmul_precision": "highest",
}
CASES = [
    (name, value)
    for name, values in SETTINGS.items()
    for value in (values if isinstance(values, list) else [values])
]


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name, value", CASES)
def test_a_setting_changes_nothing(name, value, consumer):
    f, weights, before = CONSUMERS[consumer], params(), getattr(jax.config, name)
    draw = jax.jit(lambda tree: POLICY.select(tree, 3).factors)
    expected, drawn = jax.jit(f)(weights), draw(weights)
    try:
        jax.config.update(name, value)
        found = jax.jit(f)(weights)
        chex.assert_trees_all_equal(draw(weights), drawn)
    finally:
        jax.config.update(name, before)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)
    if name == "jax_threefry_partitionable" and consumer in DRAWN_BY_JAX:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    else:
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators(impl):
    key = jax.random.key(2, impl=impl)
    rows = np.asarray(jax.jit(lambda x: cdb_jax.drop_path(x, 0.5, key=key))(jnp.ones((4096, 3))))
    assert set(np.unique(rows)) == {0.0, 2.0}
    np.testing.assert_array_equal(rows, rows[:, :1] + np.zeros(3))
    assert abs(np.mean(rows[:, 0] == 0) - 0.5) < 4 * np.sqrt(0.25 / 4096)
    seen = jax.grad(lambda x: jnp.sum(cdb_jax.backdrop(x, 0.5, axes=0, key=key)))(
        jnp.ones((4096, 3))
    )
    assert abs(np.mean(np.asarray(seen)[:, 0] == 0) - 0.5) < 4 * np.sqrt(0.25 / 4096)
    branch = jax.jit(lambda x: cdb_jax.drop_branch(jnp.sin, x, rate=0.5, key=key))
    assert np.isfinite(branch(jnp.ones((4, 3)))).all()
    kept = cdb_jax.Policy(0.5, key=key).select({"kernel": jnp.ones((2, 4096))}, 0).factors
    assert abs(np.mean(np.asarray(kept["kernel"]) == 0) - 0.5) < 4 * np.sqrt(0.25 / 4096)


@pytest.mark.parametrize("dtype", FORMATS)
def test_number_formats(dtype):
    """Masked, skipped and frozen agree, and give back the format they are given."""
    with jax.enable_x64(dtype == jnp.float64):
        check_number_format(dtype)


def check_number_format(dtype):
    weights = params(dtype)
    full = jax.jit(jax.grad(loss))(weights, X)
    drop = cdb_jax.channel_drop_back(POLICY)
    masked, _ = drop.update(full, drop.init(full))
    skipped = jax.jit(drawn.grad(loss, POLICY))(weights, X, step=0)
    rounding = {jnp.bfloat16: 2e-2, jnp.float16: 2e-3, jnp.float64: 1e-12}.get(dtype, 1e-5)
    for x, y, z in zip(*map(jax.tree.leaves, (masked, skipped, full)), strict=True):
        assert x.dtype == y.dtype == z.dtype == dtype
        wide = [np.asarray(a).astype(np.complex128) for a in (x, y)]
        np.testing.assert_allclose(*wide, rtol=rounding, atol=rounding * np.abs(wide[0]).max())
        np.testing.assert_array_equal((x == 0).all(axis=0), (y == 0).all(axis=0))
    tx = cdb_jax.freeze_dropped(optax.sgd(0.1, momentum=0.9), POLICY)
    updates, state = tx.update(full, tx.init(weights), weights)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype(dtype)}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dynamic_loss_scaling(dtype, skip):
    """Steps that overflow change nothing, the count included: the next try drops the same."""
    drop = cdb_jax.channel_drop_back(POLICY)
    tx = optax.chain(optax.identity() if skip else drop, optax.adam(0.01))

    @jax.jit
    def train_step(scale, params, state):
        def scaled(params):
            half = jax.tree.map(lambda x: x.astype(dtype), params)
            # A gradient in the narrow format, so that a large scale overflows.
            return (loss(half, X).astype(dtype) * scale.scale.astype(dtype)).astype(jnp.float32)

        grad = jax.grad(scaled)
        if skip:
            count = optax.tree_utils.tree_get(state, "count")

            def grad(params):
                return drawn.grad(scaled, POLICY)(params, step=count)

        gradients = jax.tree.map(lambda x: x / scale.scale, grad(params))
        finite = jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(gradients)]).all()
        updates, proposed = tx.update(gradients, state, params)

        def choose(new, old):
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        new_params = choose(optax.apply_updates(params, updates), params)
        return new_params, choose(proposed, state), finite

    scale = DynamicScale(scale=jnp.float32(2.0**20 if dtype == jnp.float16 else 2.0**127))
    weights = params()
    state, finite = tx.init(weights), False
    tries = 0
    while not finite:
        before = weights, state
        weights, state, finite = train_step(scale, weights, state)
        if not finite:
            chex.assert_trees_all_equal((weights, state), before)
            scale = scale.replace(scale=scale.scale / 2)
            tries += 1
    assert tries < 30 and (tries > 0) == (dtype == jnp.float16)
    kept = POLICY.select(weights, 0).factors
    for name, layer in params().items():
        moved = (np.asarray(weights[name]["kernel"]) != np.asarray(layer["kernel"])).any(axis=0)
        np.testing.assert_array_equal(moved, np.asarray(kept[f"{name}/kernel"]) != 0)


def test_flax_dynamic_scale():
    """Its wrapper around jax.value_and_grad, with the mask in the optimizer."""
    tx = optax.chain(cdb_jax.channel_drop_back(POLICY), optax.sgd(0.1))
    scale, weights = DynamicScale(), params()
    state = tx.init(weights)
    scale, finite, value, gradients = scale.value_and_grad(loss)(weights, X)
    updates, state = tx.update(gradients, state, weights)
    expected, _ = tx.update(jax.grad(loss)(weights, X), tx.init(weights), weights)
    assert finite
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
