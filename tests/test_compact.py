"""`compact`: the optimizer on the kept part, and on nothing else."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_models
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec as P

import cdb_jax
from cdb_jax import Axes, Policy, compact
from cdb_jax._kept import KeptPart

pytestmark = pytest.mark.usefixtures("standard_promotion")  # For optax's own optimizers.

HOLD = 3
SHAPES = {
    "conv": {"kernel": (3, 3, 2, 8), "bias": (8,)},
    "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
    "dense": {"kernel": (8, 6)},
}
PARAMS = jax.tree.map(
    lambda shape: jax.random.normal(jax.random.key(sum(shape)), shape),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)


def window(rate=0.5, **settings):
    return Policy(rate, **({"key": 0, "channel_choice": "window", "hold": HOLD} | settings))


def gradients(count, params=PARAMS):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(count), len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten(draws)


def run(tx, steps=8, params=PARAMS, state=None, start=0):
    """The parameters and the state after each step, the first ones included."""
    update = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    history = [(params, state)]
    for count in range(start, start + steps):
        updates, state = update(gradients(count, params), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


class Oracle:
    """The kept part in NumPy: one array of kept indices along the flattened channels of a leaf."""

    def __init__(self, policy, params, step):
        self.layout = policy.layout(params)
        self.factors = jax.tree.map(np.asarray, policy.select(params, step).factors)

    def take(self, tree):
        def kept(leaf, x):
            if leaf.layer is None:
                return jnp.asarray(x)
            axes, factor = leaf.channel, self.factors[leaf.layer]
            x = np.moveaxis(np.asarray(x), axes, range(x.ndim - len(axes), x.ndim))
            x = x.reshape(*x.shape[: x.ndim - len(axes)], -1)
            return jnp.asarray(x[..., np.flatnonzero(factor)])

        return self._map(kept, tree)

    def put(self, kept, tree):
        def whole(leaf, x, y):
            if leaf.layer is None:
                return y
            axes, x = leaf.channel, np.array(x)
            moved = np.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
            flat = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1).copy()
            flat[..., np.flatnonzero(self.factors[leaf.layer])] = y
            moved = flat.reshape(moved.shape)
            return jnp.asarray(np.moveaxis(moved, range(x.ndim - len(axes), x.ndim), axes))

        return self._map(whole, tree, kept)

    def _map(self, f, *trees):
        leaves = zip(self.layout.leaves, *map(jax.tree.leaves, trees), strict=True)
        return jax.tree.unflatten(jax.tree.structure(trees[0]), [f(*x) for x in leaves])


OPTIMIZERS = {
    **toy_models.OPTIMIZERS,
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "lamb": optax.lamb(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "partition": optax.partition(
        {"one": optax.adam(0.1), "two": optax.sgd(0.1, momentum=0.9)},
        {"conv": "one", "query": "two", "dense": "one"},
    ),
}


@pytest.mark.parametrize(
    "choice", ["window", pytest.param("chunk", marks=pytest.mark.slow), "exact"]
)
@pytest.mark.parametrize("axes", [cdb_jax.output_channels, cdb_jax.input_channels])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_optimizer_on_the_kept_part(name, axes, choice):
    policy, inner = window(channel_choice=choice, channel_axes=axes), OPTIMIZERS[name]
    history = run(compact(inner, policy, on_switch="reset"))
    params = PARAMS
    for count, (found, _) in enumerate(history[1:]):
        part = Oracle(policy, PARAMS, count)
        if count % HOLD == 0:
            state = inner.init(part.take(params))
        updates, state = inner.update(part.take(gradients(count)), state, part.take(params))
        params = part.put(optax.apply_updates(part.take(params), updates), params)
        # Norms add up in another order.
        chex.assert_trees_all_close(found, params, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("choice", ["window", "chunk", "exact"])
def test_carries_the_moments_of_channels_that_are_kept_again(choice):
    policy = window(channel_choice=choice)
    history = run(compact(optax.adamw(0.1), policy, on_switch="carry"), steps=12)
    whole, params = optax.adamw(0.1), PARAMS
    state = whole.init(params)
    before = policy.select(PARAMS, 0)
    continued = 0
    for count, (found, _) in enumerate(history[1:]):
        now = policy.select(PARAMS, count)
        continued += int(sum(jnp.sum(now.factors[k] * before.factors[k]) for k in now.factors))
        # Moments of the whole tree; those of channels that were not kept before are zero.
        adam = state[0]
        moments = [now.mask(before.mask(x)) for x in (adam.mu, adam.nu)]
        state = (adam._replace(mu=moments[0], nu=moments[1]), *state[1:])
        updates, state = whole.update(now.mask(gradients(count)), state, params)
        params = optax.apply_updates(params, now.mask(updates))
        chex.assert_trees_all_close(found, params, rtol=1e-5, atol=1e-6)
        before = now
    assert continued > 0


def test_the_state_has_the_size_of_what_is_kept():
    policy = window(0.75, exempt=("query",))
    state = compact(optax.adamw(0.1), policy).init(PARAMS)
    expected = {
        "conv": {"kernel": (3, 3, 2, 2), "bias": (8,)},
        "query": SHAPES["query"],
        "dense": {"kernel": (8, 2)},
    }
    for moments in state.inner_state[0].mu, state.inner_state[0].nu:
        assert jax.tree.map(jnp.shape, moments) == expected
    grouped = compact(optax.adam(0.1), window(0.5, window_groups=2)).init(PARAMS)
    assert grouped.inner_state[0].mu["query"]["kernel"].shape == (8, 1, 4)


def test_dropped_weights_keep_their_bits():
    params = jax.tree.map(lambda x: x.at[..., ::2].set(-0.0), PARAMS)
    policy = window()
    history = run(compact(optax.adamw(0.1, weight_decay=0.1), policy), params=params)
    for count, ((before, _), (after, _)) in enumerate(zip(history, history[1:], strict=False)):
        kept = policy.select(params, count).mask(jax.tree.map(jnp.ones_like, params))
        for mask, x, y in zip(*map(jax.tree.leaves, (kept, before, after)), strict=True):
            same = np.asarray(x).view(np.int32) == np.asarray(y).view(np.int32)
            np.testing.assert_array_equal(same, np.asarray(mask) == 0)


def test_a_dropped_nan_does_not_pass():
    policy = window()
    dropped = policy.select(PARAMS, 0).mask(jax.tree.map(jnp.ones_like, PARAMS))
    grads = jax.tree.map(lambda mask, x: jnp.where(mask == 0, jnp.nan, x), dropped, PARAMS)
    tx = compact(OPTIMIZERS["clip"], policy)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    chex.assert_tree_all_finite((updates, state))


@pytest.mark.parametrize("on_switch", ["reset", "carry"])
def test_schedules_run_on_and_bias_correction_begins_again(on_switch):
    schedule = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 1.0 * count)
    inner = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda x: x), schedule)
    for count, (_, state) in enumerate(run(compact(inner, window(), on_switch=on_switch))):
        adam, scheduled, injected = state.inner_state
        in_period = (count - 1) % HOLD + 1 if count else 0
        assert adam.count == (in_period if on_switch == "reset" else count)
        assert scheduled.count == injected.count == state.count == count
        assert cdb_jax.selection_count(state) == count


@pytest.mark.parametrize("params", [jnp.ones((8, 6)), (jnp.ones((8, 6)), jnp.ones((6, 8)))])
def test_schedules_run_on_whatever_the_tree_looks_like(params):
    schedule = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 1.0 * count)
    inner = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda x: x), schedule)
    tx = compact(inner, window(), on_switch="reset")
    for count, (_, state) in enumerate(run(tx, params=params)):
        _, scheduled, injected = state.inner_state
        assert scheduled.count == injected.count == count


def test_a_switch_happens_inside_one_program():
    tx = compact(optax.adamw(0.1), window(channel_choice="exact"), on_switch="carry")
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    held = set()
    grads = gradients(0)
    with jax.transfer_guard("disallow"):
        for _ in range(7):
            _, state = update(grads, state, PARAMS)
            held.add(str(jax.device_get(state.held)))
    assert update._cache_size() == 1 and len(held) == 3


# Whole layers.


STACKED = {
    "blocks": {"kernel": jnp.arange(1.0, 97.0).reshape(4, 3, 8), "scale": jnp.ones((4, 8))},
    "head": {"kernel": jnp.ones((8, 2))},
}


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_one_layer_of_a_stack(rate):
    policy = window(
        rate,
        layer_choice="exact",
        other_layers="frozen",
        channel_axes={"blocks": {"kernel": Axes(-1, stack=0), "scale": None}, "head": -1},
        exempt=("head",),
    )
    kept = 8 if rate == 0.0 else 4
    history = run(compact(optax.adamw(0.1), policy), steps=20, params=STACKED)
    state = history[0][1].inner_state[0].mu
    assert state["blocks"]["kernel"].shape == (1, 3, kept)
    assert state["head"]["kernel"].shape == (8, 2)
    assert isinstance(state["blocks"]["scale"], optax.MaskedNode)
    moved = set()
    for count, ((before, _), (after, _)) in enumerate(zip(history, history[1:], strict=False)):
        changed = np.asarray(before["blocks"]["kernel"] != after["blocks"]["kernel"]).any(axis=1)
        expected = np.asarray(policy.select(STACKED, count).factors["blocks/kernel"]) > 0
        np.testing.assert_array_equal(changed, expected)
        chex.assert_trees_all_equal(before["blocks"]["scale"], after["blocks"]["scale"])
        moved.add(int(changed.any(axis=1).argmax()))
    assert len(moved) > 1


def test_one_of_several_leaves_has_the_state_of_all():
    policy = window(0.0, layer_choice="exact", other_layers="frozen")
    history = run(compact(optax.adamw(0.1), policy), steps=20)
    state = history[0][1].inner_state[0].mu
    assert state["dense"]["kernel"].shape == SHAPES["dense"]["kernel"]
    learned = set()
    for count, ((before, _), (after, _)) in enumerate(zip(history, history[1:], strict=False)):
        changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
        assert sum(jax.tree.leaves(changed)) == 1
        modes = policy.select(PARAMS, count).modes
        picked = [path for path, mode in modes.items() if mode == cdb_jax.Mode.FULL]
        assert changed[picked[0].split("/")[0]]["kernel"]
        learned.update(picked)
    assert len(learned) == 3


@pytest.mark.parametrize("is_stacked", [False, True])
def test_moments_of_a_layer_that_rested_start_from_zero(is_stacked):
    layers = jnp.ones((3, 4, 4))
    params = {"blocks": layers} if is_stacked else {str(i): x for i, x in enumerate(layers)}
    axes = Axes((), stack=0) if is_stacked else Axes(())
    policy = Policy(
        0.0, key=0, layer_choice="exact", other_layers="frozen", channel_axes=axes, hold=2
    )
    tx = compact(optax.sgd(1.0, momentum=0.5), policy)
    ones = jax.tree.map(jnp.ones_like, params)
    state, momentum, learned = tx.init(params), np.zeros(3), None
    for step in range(16):
        updates, state = tx.update(ones, state, params)
        modes = policy.select(params, step).modes
        learns = np.ravel([modes[path] for path in sorted(modes)]) != cdb_jax.Mode.FROZEN
        momentum = np.where(learns & (learns == learned), 0.5 * momentum + 1, 1.0 * learns)
        learned = learns
        found = -np.stack([np.asarray(x) for x in jax.tree.leaves(updates)]).reshape(3, 16)
        np.testing.assert_allclose(found[:, 0], momentum, rtol=1e-6)


def test_frozen_layers_have_no_state():
    policy = Policy(1.0, key=0, only=("conv",), hold=HOLD)
    tx = compact(optax.adamw(0.1), policy)
    state = tx.init(PARAMS)
    assert isinstance(state.inner_state[0].mu["conv"]["kernel"], optax.MaskedNode)
    updates, _ = jax.jit(tx.update)(gradients(0), state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    assert not jnp.any(updates["conv"]["kernel"]) and jnp.all(updates["dense"]["kernel"])


# What surrounds it.


@pytest.mark.parametrize(
    "policy",
    [
        window(),
        window(channel_choice="exact", channel_axes=cdb_jax.input_channels),
        window(share_with_bias=True),
        window(0.0, layer_choice="exact", other_layers="frozen"),
        window(0.5, layer_choice="exact", other_layers="frozen", exempt=("second",)),
    ],
)
def test_the_same_step_with_skipping(policy):
    direction = policy.channel_axes
    axes = {"blocks": Axes(direction, stack=0), "first": direction, "second": direction}
    policy = dataclasses.replace(policy, channel_axes=axes)
    x = jax.random.normal(jax.random.key(5), (16, 8))
    params = {
        "first": {"kernel": PARAMS["dense"]["kernel"], "bias": jnp.ones(6)},
        "second": {"kernel": jnp.ones((6, 6))},
        "blocks": {"kernel": jax.random.normal(jax.random.key(6), (3, 6, 6))},
    }

    def loss(params, x):
        x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
        x, _ = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, params["blocks"]["kernel"])
        return jnp.mean((x @ params["second"]["kernel"]) ** 2)

    def train(skips, **settings):
        tx = compact(optax.adamw(0.1), policy)

        @jax.jit
        def step(params, state):
            selection = policy.select(params, cdb_jax.selection_count(state))
            if skips:
                grads = cdb_jax.grad(loss, **settings)(params, x, selection=selection)
                updates, state = tx.update(grads, state, params, selection=selection)
            else:
                updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        state, now = tx.init(params), params
        for _ in range(7):
            now, state = step(now, state)
        return now, state

    expected = train(False)
    chex.assert_trees_all_close(train(True), expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(train(True, kept_only=True), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_switch", ["reset", "carry"])
def test_channels_that_the_user_chooses(on_switch):
    """The state belongs to the channels of the last step, whatever the policy would draw."""
    policy = Policy(0.75, key=0, channel_choice="exact", only=("dense",), hold=100)
    tx = compact(optax.sgd(0.1, momentum=0.9), policy, on_switch=on_switch)
    state, momentum = tx.init(PARAMS), np.zeros(6)
    for chosen in ([1, 2], [1, 2], [2, 4], [0, 4]):
        chosen = np.array(chosen)
        selection = cdb_jax.Selection.of(PARAMS, {"dense/kernel": chosen})
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        updates, state = tx.update(ones, state, PARAMS, selection=selection)
        kept = np.isin(np.arange(6), chosen)
        if on_switch == "reset" and not momentum[chosen].all():
            momentum[:] = 0.0
        momentum = np.where(kept, 0.9 * momentum + 1.0, 0.0)
        np.testing.assert_allclose(updates["dense"]["kernel"][0], -0.1 * momentum, rtol=1e-6)
    assert state.count == 4


def test_around_and_next_to_other_transformations():
    policy = window()
    accumulating = optax.MultiSteps(compact(optax.adam(0.1), policy), 2)
    history = run(accumulating, steps=8)
    means = [
        jax.tree.map(lambda x, y: (x + y) / 2, gradients(2 * i), gradients(2 * i + 1))
        for i in range(4)
    ]
    tx = compact(optax.adam(0.1), policy)
    params, state = PARAMS, tx.init(PARAMS)
    for mean in means:
        updates, state = tx.update(mean, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(history[-1][0], params, rtol=1e-4, atol=1e-6)

    labels = {"conv": "compact", "query": "full", "dense": "compact"}
    parts = optax.partition({"compact": tx, "full": optax.sgd(0.1)}, labels)
    state = run(parts)[-1][1].inner_states["compact"].inner_state
    assert state.inner_state[0].mu["dense"]["kernel"].shape == (8, 3)
    assert isinstance(state.inner_state[0].mu["query"], optax.MaskedNode)

    rescaled = optax.chain(cdb_jax.channel_drop_back(policy), tx)
    chex.assert_trees_all_close(run(rescaled)[-1][0], run(tx)[-1][0])

    injected = optax.inject_hyperparams(lambda lr: compact(optax.adam(lr), policy))(lr=0.1)
    chex.assert_trees_all_close(run(injected)[-1][0], run(tx)[-1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_switch", ["reset", "carry"])
def test_parameters_without_a_gradient(on_switch):
    whole = {"dense": PARAMS["dense"], "table": jnp.arange(3)}
    grads = {"dense": PARAMS["dense"], "table": None}
    for inner, first in ((optax.adamw(0.1), grads), (optax.sgd(0.1), whole)):
        tx = compact(inner, window(), on_switch=on_switch)
        updates, state = tx.update(grads, tx.init(first), whole)
        assert updates["table"] is None
        selection = window().select(grads, 0)
        given, _ = tx.update(grads, tx.init(first), whole, selection=selection)
        chex.assert_trees_all_equal(given, updates)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(1.0, key=0),
        Policy(0.0, key=0, layer_choice="exact", other_layers="frozen", hold=2),
    ],
)
def test_gradients_that_lack_frozen_leaves_and_nothing_else(policy):
    """No array of theirs differs in shape from its parameter."""
    params = {"a": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, "empty": jnp.ones((0, 3))}
    tx = compact(optax.adamw(0.1), policy)
    state, selection = tx.init(params), policy.select(params, 0)

    def loss(params):
        return jnp.sum(params["a"]["kernel"] ** 2) + jnp.sum(params["a"]["bias"])

    kept = cdb_jax.grad(loss, kept_only=True)(params, selection=selection)
    given, _ = tx.update(kept, state, params, selection=selection)
    expected, _ = tx.update(jax.grad(loss)(params), state, params, selection=selection)
    chex.assert_trees_all_close(given, expected)


def test_muon():
    """Orthogonalises the kept columns among themselves."""
    policy = window(only=("dense",))
    (_, _), (params, state) = run(compact(optax.contrib.muon(0.1), policy), steps=1)
    momentum = jax.tree.leaves(state.inner_state)
    assert (8, 3) in [x.shape for x in momentum]
    change = np.asarray(params["dense"]["kernel"] - PARAMS["dense"]["kernel"])
    change = change[:, change.any(axis=0)]
    assert change.shape == (8, 3)
    singular = np.linalg.svd(change, compute_uv=False)
    assert singular.max() / singular.min() < 2.0  # Of the gradient, the ratio is larger.


def test_nothing_to_hold_can_be_saved(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = compact(optax.adamw(0.1), Policy(0.0, key=0, channel_choice="window"))
    state = tx.init(PARAMS)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        restored = saver.restore(tmp_path / "state", state)
    chex.assert_trees_all_equal(restored, state)
    _, state = tx.update(PARAMS, state, PARAMS)
    assert state.count == 1


def test_nnx():
    model = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    policy = window()
    optimizer = nnx.Optimizer(model, compact(optax.adamw(0.1), policy), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (4, 6))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))

    for count in range(5):
        before = model.kernel[...]
        step(model, optimizer)
        dropped = policy.select(model, count).factors["kernel"] == 0
        np.testing.assert_array_equal((model.kernel[...] == before).all(axis=0), dropped)
    assert optimizer.opt_state.inner_state[0].mu["kernel"].shape == (6, 4)


def test_linen():
    model = linen.Dense(8)
    x = jax.random.normal(jax.random.key(0), (4, 6))
    variables = model.init(jax.random.key(0), x)
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=compact(optax.adamw(0.1), window())
    )

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: jnp.sum(state.apply_fn({"params": params}, x) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads)

    before = state.params["kernel"]
    state = step(state)
    dropped = window().select(state.params, 0).factors["kernel"] == 0
    np.testing.assert_array_equal((state.params["kernel"] == before).all(axis=0), dropped)
    assert state.opt_state.inner_state[0].mu["kernel"].shape == (6, 4)


def test_a_checkpoint_in_the_middle_of_a_held_period(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = compact(optax.adamw(0.1), window(channel_choice="exact"), on_switch="carry")
    history = run(tx, steps=8)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "middle", history[4])
    with checkpoint.StandardCheckpointer() as saver:
        template = jax.eval_shape(lambda: (PARAMS, tx.init(PARAMS)))
        params, state = saver.restore(tmp_path / "middle", template)
    resumed = run(tx, steps=4, params=params, state=state, start=4)
    chex.assert_trees_all_equal(resumed[-1], history[-1])


@pytest.mark.parametrize("spec", [P(None, "data"), P("data"), P()])
@pytest.mark.parametrize("on_switch", ["reset", "carry"])
def test_eight_devices(spec, on_switch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {
        "a": {"kernel": jnp.arange(256.0).reshape(16, 16)},
        "b": {"kernel": jnp.ones((8, 16))},
    }
    groups = 8 if spec == P(None, "data") else None
    tx = compact(optax.adamw(0.1), window(window_groups=groups), on_switch=on_switch)
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), params)
    sharded = run(tx, params=placed)
    chex.assert_trees_all_close(sharded, run(tx, params=params), rtol=1e-5, atol=1e-6)
    moments = sharded[-1][1].inner_state[0].mu["a"]["kernel"]
    assert moments.shape == (16, 8)
    if spec != P():
        assert moments.sharding.shard_shape(moments.shape) in ((16, 1), (2, 8))


@pytest.mark.parametrize("spec", [P(None, "data"), P("data"), P()])
def test_memory_on_eight_devices(spec):
    """Data-parallel, FSDP, groups over sharded channels; with a norm over the whole gradient."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = {f"dense{i}": {"kernel": jnp.ones((512, 512))} for i in range(6)}
    of_params, replicated = NamedSharding(mesh, spec), NamedSharding(mesh, P())
    policy = window(0.75, window_groups=8 if spec == P(None, "data") else None)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return jnp.mean(x**2)

    def full(params, x, state):
        return jax.grad(loss)(params, x), {}

    def skipping(params, x, state):
        selection = policy.select(params, state.count)
        grads = cdb_jax.grad(loss, kept_only=True)(params, x, selection=selection)
        return grads, {"selection": selection}

    def memory(tx, grad):
        """Bytes of the optimizer state, and of temporaries, on each device."""

        def step(params, state, x):
            grads, given = grad(params, x, state)
            updates, state = tx.update(grads, state, params, **given)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(lambda x: jax.device_put(x, of_params), shapes)
        state = jax.jit(tx.init)(params)
        where = jax.tree.map(lambda x: of_params if x.ndim == 2 else replicated, (params, state))
        x = jax.ShapeDtypeStruct((16, 512), jnp.float32, sharding=NamedSharding(mesh, P("data")))
        compiled = jax.jit(step, donate_argnums=(0, 1), in_shardings=(*where, None))
        compiled = compiled.lower(params, state, x).compile().memory_analysis()
        held = sum(x.nbytes for x in jax.tree.leaves(params)) // (1 if spec == P() else 8)
        return compiled.argument_size_in_bytes - held, compiled.temp_size_in_bytes

    whole, part = memory(inner, full), memory(compact(inner, policy), skipping)
    assert part[0] < 0.3 * whole[0]
    # With FSDP, the gathered weights of all layers take more than their gradients.
    assert part[1] < (1.01 if spec == P("data") else 0.75) * whole[1]


@pytest.mark.parametrize("spec", [P(None, "data"), P("data"), P()])
def test_explicit_sharding(spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {"a": {"kernel": jnp.arange(256.0).reshape(16, 16)}}
    tx = compact(optax.adamw(0.1), window(window_groups=8), on_switch="carry")
    alone = run(tx, params=params)[-1]
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, spec), params)
        update = jax.jit(tx.update)
        state = jax.jit(tx.init)(placed)
        for count in range(8):
            grads = jax.tree.map(lambda x: jax.device_put(x, spec), gradients(count, params))
            updates, state = update(grads, state, placed)
            placed = optax.apply_updates(placed, updates)
    assert jax.typeof(placed["a"]["kernel"]).sharding.spec == P(*spec, *[None] * (2 - len(spec)))
    assert jax.typeof(state.inner_state[0].mu["a"]["kernel"]).sharding.spec[0] == (*spec, None)[0]
    chex.assert_trees_all_close((placed, state), alone, rtol=1e-5, atol=1e-6)


def test_shardings_from_those_of_parameters():
    tx = compact(optax.adamw(0.1), window())
    state = jax.eval_shape(tx.init, PARAMS)
    specs = jax.tree.map(lambda x: P(*[None] * x.ndim), PARAMS)
    found = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    assert found.inner_state[0].mu == specs and found.held == found.count == P()


def test_half_precision_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = compact(optax.adamw(0.1, mu_dtype=jnp.float32), window(), on_switch="carry")
    (_, start), *_, (found, state) = run(tx, params=params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    assert state.inner_state[0].mu["dense"]["kernel"].dtype == jnp.float32


def test_double_precision():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
        (_, start), *_, (found, state) = run(compact(optax.adamw(0.1), window()), params=params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
        assert found["dense"]["kernel"].dtype == jnp.float64 and state.held.dtype == jnp.int32
    single = run(compact(optax.adamw(0.1), window()))[-1][1]
    np.testing.assert_array_equal(state.held, single.held)


@pytest.mark.parametrize("on_switch", ["reset", "carry"])
def test_several_seeds_at_once(on_switch):
    def tx(seed):
        policy = Policy(0.5, key=seed, channel_choice="exact", hold=HOLD)
        return compact(optax.adamw(0.1), policy, on_switch=on_switch)

    def train(seed):
        params, state = PARAMS, tx(seed).init(PARAMS)
        for count in range(5):
            updates, state = tx(seed).update(gradients(count), state, params)
            params = optax.apply_updates(params, updates)
        return params, state.held

    together = jax.jit(jax.vmap(train))(jnp.arange(3))
    for seed in range(3):
        one = jax.tree.map(lambda x, seed=seed: x[seed], together)
        chex.assert_trees_all_close(one, train(seed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_switch", ["reset", "carry"])
@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_gradient_and_state_take_the_memory_of_what_is_kept(rate, on_switch):
    """With a norm over the whole gradient, all of it is in memory at once."""
    params = {f"dense{i}": {"kernel": jnp.ones((256, 256))} for i in range(8)}
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    policy = window(rate)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return jnp.sum(x)

    def memory(tx, grad):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, x):
            grads, selection = grad(params, x, state)
            given = {} if selection is None else {"selection": selection}
            updates, state = tx.update(grads, state, params, **given)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        found = step.lower(params, state, jnp.ones((4, 256))).compile().memory_analysis()
        return found.argument_size_in_bytes - size, found.temp_size_in_bytes

    def skip(params, x, state):
        selection = policy.select(params, state.count)
        return cdb_jax.grad(loss, kept_only=True)(params, x, selection=selection), selection

    full = memory(inner, lambda params, x, _: (jax.grad(loss)(params, x), None))
    kept = memory(compact(inner, policy, on_switch=on_switch), skip)
    assert kept[0] <= (1 - rate) * full[0] + 2**14
    assert full[1] >= size and kept[1] <= 0.7 * full[1]


def step_with_chosen(chosen, *, others="full", on_switch="carry"):
    tx = compact(optax.adam(0.1), window(), on_switch=on_switch)
    selection = cdb_jax.Selection.of(PARAMS, chosen, others=others)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, selection=selection)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: compact(optax.sgd(0.1), 0.5), TypeError, "policy must be .*0.5"),
        (lambda: compact(optax.sgd, window()), TypeError, "inner must be an optimizer"),
        (
            lambda: compact(window(), optax.sgd(0.1)),
            TypeError,
            "inner must be an optimizer.*; the policy is the second argument",
        ),
        (
            lambda: step_with_chosen({"dense/kernel": [1, 2]}),
            ValueError,
            "selection was made by Selection.of.*; split the parameters, or use freeze_dropped",
        ),
        (
            lambda: step_with_chosen({"dense": []}, others="frozen"),
            ValueError,
            "selection was made by Selection.of",
        ),
        (
            lambda: step_with_chosen({"*": []}, on_switch="reset"),
            ValueError,
            "selection was made by Selection.of",
        ),
        (lambda: compact(optax.MultiSteps(optax.sgd(0.1), 2), window()), TypeError, "MultiSteps"),
        (lambda: compact(optax.sgd(0.1), window(), on_switch="keep"), ValueError, "on_switch.*kee"),
        (
            lambda: compact(optax.sgd(0.1), window(hold=1), on_switch="reset"),
            ValueError,
            "hold=1.*carry",
        ),
        (lambda: compact(optax.sgd(0.1), window(lambda _: 0.5)), TypeError, "rate.*number"),
        (lambda: compact(optax.sgd(0.1), window(layer_rate=0.5)), ValueError, "layer_rate=0.5"),
        (
            lambda: compact(optax.sgd(0.1), Policy(0.5, key=0, hold=9)),
            ValueError,
            "channel_choice.*bernoulli",
        ),
        (
            lambda: compact(optax.sgd(0.1), window(layer_choice="exact")),
            ValueError,
            "other_layers.*frozen",
        ),
        (
            lambda: compact(optax.sgd(0.1), window(rescale="expected")),
            ValueError,
            "rescale='expected' would have no effect",
        ),
    ],
)
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.bad_input
def test_mistakes_of_a_step():
    tx = compact(optax.adam(0.1), window())
    state = tx.init(PARAMS)
    other = compact(optax.adam(0.1), window(0.75)).init(PARAMS)
    with pytest.raises(ValueError, match=r"'inner_state/.*kernel' has shape \(.*keeps \("):
        tx.update(PARAMS, other, PARAMS)
    selection = window().select(PARAMS, 0)
    grads = KeptPart.from_groups(selection.layout, selection.groups, 1).take(PARAMS)
    with pytest.raises(ValueError, match=r"selection.*\(3, 3, 2, 4\).*selection=selection"):
        tx.update(grads, state, PARAMS)
    with pytest.raises(ValueError, match=r"params.*\(3, 3, 2, 4\).*selection=selection"):
        tx.update(grads, state, selection=selection)
    with pytest.raises(ValueError, match="updates: found no array at 'dense/kernel'"):
        missing = {name: x for name, x in grads.items() if name != "dense"}
        tx.update(missing, state, PARAMS, selection=selection)
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(PARAMS, state, PARAMS, value_fn=lambda params: 0.0)
    for dropping, name in (
        (optax.chain(cdb_jax.channel_drop_back(window()), optax.sgd(0.1)), "channel_drop_back"),
        (cdb_jax.freeze_dropped(optax.sgd(0.1), window()), "freeze_dropped"),
        (tx, "compact"),
    ):
        with pytest.raises(ValueError, match=f"inner: it contains {name}, which would drop"):
            compact(dropping, window()).init(PARAMS)
        with pytest.raises(ValueError, match=f"inner: it contains {name}, which would drop"):
            cdb_jax.channel_report(PARAMS, window(), optimizer=dropping)
    with pytest.raises(TypeError, match="state must be a CompactState"):
        tx.update(PARAMS, state.inner_state, PARAMS)
    memory = compact(optax.lbfgs(0.1, linesearch=None), window(), on_switch="carry")
    with pytest.raises(ValueError, match="on_switch"):
        memory.update(PARAMS, memory.init(PARAMS), PARAMS)
    accumulates = compact(optax.chain(optax.apply_every(2)), window())
    with pytest.raises(ValueError, match="around compact"):
        accumulates.init(PARAMS)
