"""What optax checks of each of its own optimizers, checked of every public transformation."""

import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import cdb_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # For optax's own optimizers.


def last_axis(path, x):
    return x.ndim - 1  # Of vectors too, and of a tree that is one array.


POLICY = cdb_jax.Policy(0.5, key=0, channel_choice="window", channel_axes=last_axis)
POLICIES = {
    "window": POLICY,
    "one": cdb_jax.Policy(
        0.5, key=0, layer_choice="exact", channel_choice="exact", channel_axes=last_axis
    ),
}


def before(policy, inner):
    return optax.chain(cdb_jax.channel_drop_back(policy), inner)


def after(policy, inner):
    return optax.chain(inner, cdb_jax.channel_drop_back(policy))


def frozen(policy, inner):
    return cdb_jax.freeze_dropped(inner, policy)


PLACES = [before, after, frozen]
everywhere = pytest.mark.parametrize("place", PLACES)

TARGETS = {
    "bare": np.array([1.0, -1.0, 1.0], np.float32),
    "tuple": (np.array([1.0, -1.0, 2.0], np.float32), np.array([[1.0, 0.0], [-1.0, 1.0]], "f")),
}


def distance(params, target):
    return optax.tree.norm(optax.tree.sub(params, target), squared=True)


def zeros(target, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), target)


def step(tx, target, params, state, **extra):
    value, gradient = jax.value_and_grad(distance)(params, target)
    updates, state = tx.update(gradient, state, params, value=value, **extra)
    return optax.apply_updates(params, updates), state


@everywhere
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("target", TARGETS)
def test_it_optimises(place, policy, target):
    tx, target = place(POLICIES[policy], optax.adam(0.05)), TARGETS[target]
    params = zeros(target)
    state = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    chex.assert_trees_all_equal(state, tx.init(params))

    def body(carry, _):
        return (step(tx, target, *carry), None)

    (params, state), _ = jax.jit(lambda carry: lax.scan(body, carry, length=1500))((params, state))
    chex.assert_trees_all_close(params, target, rtol=3e-2, atol=3e-2)
    assert cdb_jax.selection_count(state) == 1500


@everywhere
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_extra_arguments_and_one_compilation(place, jit, caplog):
    tx, target = place(POLICY, optax.with_extra_args_support(optax.sgd(0.1))), TARGETS["tuple"]
    call = functools.partial(tx.update, unexpected=1)
    call = jax.jit(call) if jit else call
    params = zeros(target)
    gradient, state = jax.grad(distance)(params, target), tx.init(params)
    for _ in range(2):  # The first state has no committed arrays.
        _, state = call(gradient, state, params, value=jnp.float32(1.0))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            _, state = call(gradient, state, params, value=jnp.float32(1.0))
    assert not [r.message for r in caplog.records if "ompiling" in r.message]


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@everywhere
def test_hyperparameters_can_be_injected(place, rate):
    def make(learning_rate, rate):
        policy = cdb_jax.Policy(rate, key=0, channel_axes=-1)
        return place(policy, optax.adam(learning_rate))

    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    gradient = jax.tree.map(jnp.negative, params)
    tx = make(0.1, rate)
    injected = optax.inject_hyperparams(make)(learning_rate=0.1, rate=rate)
    state, injected_state = (jax.jit(t.init)(params) for t in (tx, injected))
    updates, state = jax.jit(tx.update)(gradient, state, params)
    injected_updates, injected_state = jax.jit(injected.update)(gradient, injected_state, params)
    chex.assert_trees_all_close(injected_updates, updates, rtol=1e-5)
    chex.assert_trees_all_close(injected_state.inner_state, state, rtol=1e-5, atol=1e-5)


@everywhere
def test_a_schedule_is_the_numbers_that_it_returns(place):
    target = TARGETS["tuple"]

    def make(rate):
        return place(cdb_jax.Policy(rate, key=0, channel_axes=-1), optax.sgd(0.1))

    results = []
    for tx in (make(0.5), make(optax.constant_schedule(0.5))):
        params, state = zeros(target), tx.init(zeros(target))
        for _ in range(10):
            params, state = step(tx, target, params, state)
        results.append(params)
    chex.assert_trees_all_close(*results, rtol=1e-6)


@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtypes_and_shapes_stay(place, dtype):
    rescale = "none" if place is frozen else "expected"
    with jax.enable_x64(dtype == "float64"):
        policy = cdb_jax.Policy(
            0.5, key=0, channel_choice="window", channel_axes=-1, rescale=rescale
        )
        tx = place(policy, optax.adamw(1e-2))
        params = zeros(TARGETS["tuple"], jnp.dtype(dtype))
        state = tx.init(params)

        def types(tree):
            return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

        gradient = jax.tree.map(jnp.ones_like, params)
        coin = jnp.array(True)

        @jax.jit
        def update(params, state):  # A conditional takes no states of two types.
            def go():
                return tx.update(gradient, state, params)

            return lax.cond(coin, go, lambda: (params, state))

        for _ in range(2):
            updates, new_state = update(params, state)
            assert types(updates) == types(params) and types(new_state) == types(state)
            state = new_state
        updates, _ = tx.update(gradient, state, params)  # Outside of `jit` as inside.
        assert types(updates) == types(params)


@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_accumulate(place, dtype):
    tx = optax.MultiSteps(place(POLICY, optax.sgd(0.1)), every_k_schedule=4)
    params = jnp.array([1.0, 2.0], jnp.dtype(dtype))
    state = jax.jit(tx.init)(params)
    for i in range(4):
        updates, state = jax.jit(tx.update)(params, state, params)
        assert updates.dtype == params.dtype
        moved = np.asarray(updates != 0)
        assert moved.sum() == (1 if i == 3 else 0)


CONTRIB = optax.contrib
OPTIMIZERS = {
    "acprop": CONTRIB.acprop(1e-3),
    "ademamix": CONTRIB.ademamix(1e-3),
    "simplified_ademamix": CONTRIB.simplified_ademamix(1e-3),
    "adopt": CONTRIB.adopt(1e-2),
    "cocob": CONTRIB.cocob(weight_decay=1e-2),
    "dadapt_adamw": CONTRIB.dadapt_adamw(0.1),
    "dog": CONTRIB.dog(1.0),
    "dowg": CONTRIB.dowg(1.0),
    "madgrad": CONTRIB.madgrad(1e-2),
    "mechanize": CONTRIB.mechanize(optax.adam(0.1), weight_decay=0.1),
    "mechanize adafactor": CONTRIB.mechanize(optax.adafactor(0.1, min_dim_size_to_factor=2)),
    "momo": CONTRIB.momo(0.1),
    "momo_adam": CONTRIB.momo_adam(0.1),
    "muon": CONTRIB.muon(1e-2),
    "prodigy": CONTRIB.prodigy(0.1),
    "reduce_on_plateau": optax.chain(optax.sgd(1e-3), CONTRIB.reduce_on_plateau()),
    "schedule_free": CONTRIB.schedule_free(optax.sgd(1e-2), 1e-2),
    "sophia": CONTRIB.sophia(1e-2),
}


# One of each kind of state; the rest is slow.
QUICK = ("mechanize adafactor", "momo_adam", "muon", "prodigy", "schedule_free")
NAMES = [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in OPTIMIZERS]


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_channel_stands_still_under_every_optimizer(name):
    target = (np.array([[2.0, -2.0, 1.0], [3.0, 3.0, 3.0]], np.float32), np.ones(3, np.float32))
    tx = frozen(POLICY, OPTIMIZERS[name])
    extra = {"obj_fn": lambda p: distance(p, target)} if name == "sophia" else {}
    params, state = jax.tree.map(lambda x: x * 0.5, target), tx.init(target)
    update = jax.jit(functools.partial(step, tx, target, **extra))
    learned = 0
    for count in range(4):
        moved, state = update(params, state)
        kept = POLICY.select(params, count).factors
        for path, was, now in zip(("0", "1"), params, moved, strict=True):
            dropped = np.asarray(kept[path]) == 0
            assert 0 < dropped.sum() < dropped.size
            np.testing.assert_array_equal(was[..., dropped], now[..., dropped])
            learned += np.any(np.asarray(was != now))
        params = moved
    assert learned >= 4  # Adopt takes its first step to look around.
