"""`channel_drop_back` under everything that optax, Flax, Equinox and JAX wrap around it."""

import dataclasses
import functools
import pathlib
import pickle

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import cdb_jax
from cdb_jax import Policy, channel_drop_back

PARAMS = {
    "a": {"kernel": jnp.arange(24.0).reshape(3, 8) + 1, "bias": jnp.ones(8)},
    "b": {"kernel": jnp.ones((8, 4))},
}


def gradients(dtype=jnp.float32):
    return jax.tree.map(lambda x: x.astype(dtype), PARAMS)


def equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def mask_of(tx, count=0, grads=None):
    """What a transformation does to gradients at a count."""
    grads = PARAMS if grads is None else grads
    state = tx.init(grads)
    for _ in range(count + 1):
        updates, state = tx.update(grads, state)
    return updates


@pytest.mark.usefixtures("standard_promotion")
def test_before_and_after_an_optimizer():
    policy = Policy(0.5, key=0, channel_choice="exact")
    drop = channel_drop_back(policy)
    keep = np.asarray(policy.select(PARAMS, 0).factors["a/kernel"])
    before, after = optax.chain(drop, optax.adam(0.1)), optax.chain(optax.adam(0.1), drop)
    for tx in (before, after):
        updates, state = tx.update(PARAMS, tx.init(PARAMS))
        assert ((np.asarray(updates["a"]["kernel"]) != 0).all(axis=0) == (keep > 0)).all()
        assert (np.asarray(updates["a"]["bias"]) != 0).all()
    _, state = after.update(PARAMS, after.init(PARAMS))
    assert (np.asarray(optax.tree.get(state, "mu")["a"]["kernel"]) != 0).all()  # Dense moments.


def test_twice_in_a_chain():
    first, second = channel_drop_back(0.5, key=0), channel_drop_back(0.5, key=1)
    both = mask_of(optax.chain(first, second))
    equal(both, mask_of(second, grads=mask_of(first)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("rescale", ["none", "expected"])
def test_dtype_and_structure_come_back(dtype, rescale):
    grads = gradients(dtype) | {
        "none": None,
        "masked": optax.MaskedNode(),
        "step": jnp.int32(3),
        "table": jnp.ones((2, 2), jnp.int32),
        "empty": {"kernel": jnp.zeros((0, 4), dtype)},
        "scalar": jnp.ones((), dtype),
    }
    policy = Policy(0.5, key=0, rescale=rescale, channel_choice="exact")
    tx = channel_drop_back(policy)
    updates, _ = tx.update(grads, tx.init(grads))
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), grads
    )
    factor = {"none": 1.0, "expected": 2.0}[rescale]
    kept = np.asarray(updates["b"]["kernel"]).astype(np.complex64)
    assert set(np.unique(kept)) == {0.0, factor}
    assert updates["step"] == 3 and updates["scalar"] == 1


def test_float64():
    with jax.enable_x64(True):
        grads = {"kernel": jnp.full((2, 6), 1 / 3, jnp.float64)}
        updates = mask_of(channel_drop_back(0.5, key=0), grads=grads)["kernel"]
        assert updates.dtype == jnp.float64 and set(np.unique(updates)) == {0.0, 1 / 3}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("rescale", ["none", "realized"])
def test_bad_values_in_dropped_channels_do_not_pass(bad, rescale):
    policy = Policy(0.5, key=0, channel_choice="exact", rescale=rescale)
    keep = np.asarray(policy.select(PARAMS, 0).factors["a/kernel"]) > 0
    poisoned = jnp.where(keep, PARAMS["a"]["kernel"], bad)
    updates = mask_of(channel_drop_back(policy), grads=PARAMS | {"a": {"kernel": poisoned}})
    assert np.isfinite(updates["a"]["kernel"]).all()
    shown = jnp.where(keep, bad, PARAMS["a"]["kernel"])
    updates = mask_of(channel_drop_back(policy), grads=PARAMS | {"a": {"kernel": shown}})
    assert not np.isfinite(updates["a"]["kernel"][:, keep]).any()


def test_rate_zero_is_the_identity_to_the_bit():
    tiny = {"kernel": jnp.array([[1e-40, -0.0, jnp.nan, 3.3]], jnp.float32)}
    for rescale in ("none", "expected", "realized"):
        updates = jax.jit(
            functools.partial(mask_of, channel_drop_back(0.0, key=0, rescale=rescale))
        )

        def bits(x):
            return np.asarray(x["kernel"]).view(np.uint32)

        np.testing.assert_array_equal(bits(updates(grads=tiny)), bits(tiny))


def test_share_with_bias():
    policy = Policy(0.5, key=0, channel_choice="exact", share_with_bias=True)
    updates = mask_of(channel_drop_back(policy))
    kernel, bias = updates["a"]["kernel"], updates["a"]["bias"]
    assert ((np.asarray(kernel) != 0).all(axis=0) == (np.asarray(bias) != 0)).all()


def test_dropped_fraction_and_count():
    tx = channel_drop_back(0.25, key=0, channel_choice="exact")
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS, state)
    assert state.count == 1 and state.count.dtype == jnp.int32
    np.testing.assert_allclose(state.dropped_fraction, 0.25, rtol=1e-6)
    assert state.dropped_fraction.dtype == jnp.float32
    nothing = channel_drop_back(1.0, key=0)
    np.testing.assert_allclose(nothing.update(PARAMS, state)[1].dropped_fraction, 1.0, rtol=1e-6)


# optax


@pytest.mark.usefixtures("standard_promotion")
def test_optax_contract():
    tx = optax.chain(channel_drop_back(0.3, key=0), optax.adamw(1e-3))
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        return tx.update(params, state, params, value=1.0, another_argument=None)

    state = tx.init(PARAMS)
    equal(optax.tree.map_params(tx, lambda x: x, state), state)
    assert jax.eval_shape(tx.init, PARAMS)[0].count.shape == ()
    updates, after = step(PARAMS, state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), after) == jax.tree.map(
        lambda x: (x.dtype, x.weak_type), state
    )
    step(updates, after)
    assert len(traces) == 1
    no_params = channel_drop_back(0.3, key=0)
    equal(no_params.update(PARAMS, no_params.init(None))[0], mask_of(no_params))


@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps_uses_one_mask_for_an_accumulated_step():
    drop = channel_drop_back(0.5, key=0, channel_choice="exact")
    tx = optax.MultiSteps(optax.chain(drop, optax.sgd(1.0)), every_k_schedule=2)
    state = tx.init(PARAMS)
    for count in range(2):
        for _ in range(2):
            updates, state = tx.update(PARAMS, state, PARAMS)
        expected = jax.tree.map(lambda x: -x, mask_of(drop, count))
        equal(updates, expected)


def test_inject_hyperparams():
    tx = optax.inject_hyperparams(channel_drop_back, hyperparam_dtype=jnp.float32)(
        rate=optax.constant_schedule(0.3), key=0
    )
    expected = channel_drop_back(0.3, key=0)
    state = jax.jit(tx.init)(PARAMS)
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    equal(updates, mask_of(expected))
    rate = state.hyperparams["rate"]
    np.testing.assert_allclose(rate, 0.3, rtol=1e-6)
    axes = optax.inject_hyperparams(channel_drop_back, static_args=("channel_axes",))(
        rate=0.3, key=0, channel_axes=lambda path, leaf: -1 if "kernel" in path else None
    )
    updates, _ = axes.update(PARAMS, axes.init(PARAMS), PARAMS)
    equal(updates, mask_of(expected))
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(channel_drop_back)(rate=0.3, key=0, channel_axes=-1).init(PARAMS)


def test_an_injected_rate_follows_the_hyperparam_dtype_in_bfloat16():
    grads = {"kernel": jnp.ones((2, 4096), jnp.bfloat16)}
    inject = functools.partial(optax.inject_hyperparams, channel_drop_back)
    exact = inject(hyperparam_dtype=jnp.float32)(rate=0.3, key=0, channel_choice="exact")
    updates, state = exact.update(grads, exact.init(grads))
    assert state.hyperparams["rate"].dtype == jnp.float32
    assert np.count_nonzero(np.asarray(updates["kernel"])[0]) == round(0.7 * 4096)
    # Without it optax rounds the rate to the dtype of the updates: 0.3 becomes 0.3008.
    rounded = inject()(rate=0.3, key=0, channel_choice="exact")
    updates, state = rounded.update(grads, rounded.init(grads))
    assert updates["kernel"].dtype == state.hyperparams["rate"].dtype == jnp.bfloat16
    kept = np.count_nonzero(np.asarray(updates["kernel"])[0])
    assert kept == round((1 - float(jnp.bfloat16(0.3))) * 4096)


def test_a_prefix_tree_for_the_whole_model_serves_its_parts():
    axes = {"a": cdb_jax.output_channels, "b": {"kernel": 0}}
    drop = channel_drop_back(0.5, key=0, channel_axes=axes)
    whole = mask_of(drop)
    assert set(np.unique(np.asarray(whole["b"]["kernel"]).std(axis=1))) == {0.0}  # Whole rows.
    parts = optax.partition({"x": drop, "y": drop}, {"a": "x", "b": "y"})
    equal(mask_of(parts), whole)
    in_spec = channel_drop_back(0.5, key=0, channel_axes={"a": axes["a"], "b": optax.MaskedNode()})
    grads = {"a": PARAMS["a"], "b": optax.MaskedNode()}
    equal(mask_of(in_spec, grads=grads)["a"], whole["a"])


def test_partition_and_masked_draw_what_the_whole_draws():
    drop = channel_drop_back(0.5, key=0)
    whole = mask_of(drop)
    labels = {"a": "x", "b": "y"}
    parts = optax.partition({"x": drop, "y": drop}, labels)
    equal(mask_of(parts), whole)
    masked = optax.masked(drop, {"a": True, "b": False})
    equal(mask_of(masked), whole | {"b": PARAMS["b"]})


def test_apply_if_finite_and_cond():
    drop = channel_drop_back(0.5, key=0)
    equal(mask_of(optax.apply_if_finite(drop, 2)), mask_of(drop))
    state = drop.init(PARAMS)
    taken = jax.jit(
        lambda flag: jax.lax.cond(flag, lambda: drop.update(PARAMS, state), lambda: (PARAMS, state))
    )
    equal(taken(True)[0], mask_of(drop))
    equal(taken(False)[0], PARAMS)


def test_scan_equals_a_loop():
    drop = channel_drop_back(0.5, key=0, channel_choice="window")

    def body(state, _):
        return drop.update(PARAMS, state)[::-1]

    state, updates = jax.lax.scan(body, drop.init(PARAMS), length=3)
    assert state.count == 3
    for count in range(3):
        equal(jax.tree.map(lambda x, i=count: x[i], updates), mask_of(drop, count))


def test_vmap_over_keys_and_rates():
    def updates(key, rate):
        return mask_of(channel_drop_back(rate, key=key))

    keys, rates = jax.random.split(jax.random.key(3), 4), jnp.array([0.0, 0.3, 0.6, 1.0])
    batched = jax.jit(jax.vmap(updates))(keys, rates)
    for i in range(4):
        equal(jax.tree.map(lambda x, i=i: x[i], batched), updates(keys[i], rates[i]))
    assert not np.asarray(batched["a"]["kernel"][3]).any()


# Frameworks


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Linear(3, 8, rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.stem(x)))

    model = Model(nnx.Rngs(0))
    policy = Policy(0.5, key=0, channel_choice="exact", exempt=("head",))
    optimizer = nnx.Optimizer(
        model, optax.chain(channel_drop_back(policy), optax.sgd(0.1)), wrt=nnx.Param
    )
    before = np.asarray(model.stem.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.sum(model(jnp.ones((4, 3))) ** 2 + model.stem.kernel[...].sum())

        optimizer.update(model, nnx.grad(loss)(model))

    step(model, optimizer)
    moved = (np.asarray(model.stem.kernel[...]) != before).any(axis=0)
    expected = policy.select(nnx.state(model, nnx.Param), 0).factors["stem/kernel"]
    np.testing.assert_array_equal(moved, np.asarray(expected) > 0)


def test_linen_train_state():
    model = nn.Dense(6)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = optax.chain(channel_drop_back(0.5, key=0, channel_choice="exact"), optax.sgd(0.1))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    after = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    moved = (np.asarray(after.params["kernel"]) != np.asarray(params["kernel"])).any(axis=0)
    assert moved.sum() == 3


def test_equinox():
    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = channel_drop_back(0.5, key=0, channel_choice="exact")
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
    model = eqx.apply_updates(model, updates)
    kept = np.asarray(updates.layers[0].weight)
    assert ((kept == 1).all(axis=1) | (kept == 0).all(axis=1)).all()
    assert (kept[:, 0] == 1).sum() == 4


# Restarts, devices, the compiled program


def test_saved_and_restored():
    drop = channel_drop_back(0.5, key=0)
    _, state = drop.update(PARAMS, drop.init(PARAMS))
    expected, _ = drop.update(PARAMS, state)
    blank = channel_drop_back(0.5, key=0)
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(blank.init(PARAMS), saved)
    equal(blank.update(PARAMS, restored)[0], expected)
    equal(blank.update(PARAMS, pickle.loads(pickle.dumps(state)))[0], expected)


def test_saved_and_restored_by_orbax(tmp_path):
    tx = optax.chain(channel_drop_back(0.5, key=0), optax.trace(0.9))
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(PARAMS))
    assert restored[0].count == 3 and restored[0].count.dtype == jnp.int32
    for old, new in zip(tx.update(PARAMS, state), tx.update(PARAMS, restored), strict=True):
        equal(old, new)


def test_the_callers_key_survives_donation():
    key = jax.random.key(0)
    drop = channel_drop_back(0.5, key=key)
    step = jax.jit(lambda grads, state: drop.update(grads, state), donate_argnums=1)
    step(PARAMS, drop.init(PARAMS))
    assert drop.init(PARAMS).count == 0 and jax.random.key_data(key).shape == (2,)


def test_no_parameter_sized_temporary_and_no_host_sync():
    grads = {str(i): {"kernel": jnp.ones((512, 512))} for i in range(4)}
    drop = channel_drop_back(0.5, key=0, rescale="realized")
    state = drop.init(grads)
    compiled = jax.jit(drop.update, donate_argnums=0).lower(grads, state).compile()
    leaf = 512 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < leaf / 10
    with jax.transfer_guard("disallow"):
        compiled(grads, state)


def test_one_draw_for_a_whole_tree():
    """The program's random part grows neither with the layers nor with their widths."""

    def folds(tree):
        drop = channel_drop_back(0.5, key=0)
        return str(jax.make_jaxpr(drop.update)(tree, drop.init(tree))).count("random_fold_in")

    few = {"a": {"kernel": jnp.ones((4, 8))}}
    many = {str(i): {"kernel": jnp.ones((4, 3 + i))} for i in range(12)}
    assert 0 < folds(few) == folds(many)


@pytest.mark.slow
def test_memory_stays_flat_outside_of_jit():
    tx = optax.chain(channel_drop_back(0.5, key=0, channel_choice="exact"), optax.sgd(0.1))
    state = tx.init(PARAMS)

    def pages():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

    for step in range(1050):
        if step == 50:
            before = pages()
        _, state = tx.update(PARAMS, state)
    assert (pages() - before) * 4096 < 20e6  # 1.5 MB a step, were each to be compiled.


def test_a_selection_that_holds_for_several_steps():
    policy = Policy(0.5, key=0, channel_choice="exact")
    one, three = (channel_drop_back(dataclasses.replace(policy, hold=n)) for n in (1, 3))
    masks = [mask_of(three, count) for count in range(7)]
    for count, mask in enumerate(masks):
        equal(mask, mask_of(one, count // 3))


@pytest.mark.usefixtures("standard_promotion")
def test_around_a_step_that_takes_several_updates():
    """SAM's ascent and descent see one selection, so that a dropped channel comes back."""
    drop = channel_drop_back(0.5, key=0, channel_choice="exact", hold=2)
    tx = optax.chain(optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.5), sync_period=2), drop)
    params, state, start = PARAMS, tx.init(PARAMS), PARAMS
    for count in range(4):
        keep = np.asarray(drop_policy(2).select(PARAMS, count).factors["b/kernel"]) > 0
        updates, state = tx.update(PARAMS, state, params)
        np.testing.assert_array_equal(np.asarray(updates["b"]["kernel"] != 0).all(axis=0), keep)
        params = optax.apply_updates(params, updates)
        if count % 2:
            same = np.isclose(params["b"]["kernel"], start["b"]["kernel"]).all(axis=0)
            np.testing.assert_array_equal(same, ~keep)
            start = params


def drop_policy(hold):
    return Policy(0.5, key=0, channel_choice="exact", hold=hold)


@pytest.mark.bad_input
@pytest.mark.usefixtures("standard_promotion")
def test_states_and_updates_of_others_are_named():
    tx = channel_drop_back(0.5, key=0)
    with pytest.raises(TypeError, match="state must be a ChannelDropBackState"):
        tx.update(PARAMS, optax.EmptyState())
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"count has shape \(2,\)"):
        tx.update(PARAMS, stacked)
    pairs = optax.LookaheadParams.init_synced(PARAMS)
    after = optax.chain(optax.lookahead(optax.sgd(0.1), 1, 0.5), tx)
    with pytest.raises(TypeError, match="LookaheadParams.*inside the wrapper"):
        after.update(PARAMS, after.init(pairs), pairs)
    per_example = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    specs = channel_drop_back(0.5, key=0, channel_axes=-1)
    with pytest.raises(ValueError, match="differentially_private_aggregate"):
        specs.update(per_example, specs.init(PARAMS), PARAMS)
