"""`compact`: the optimizer on the kept part, and on nothing else."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdb_jax
from cdb_jax import Axes, Policy, compact

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
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "lamb": optax.lamb(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "partition": optax.partition(
        {"one": optax.adam(0.1), "two": optax.sgd(0.1, momentum=0.9)},
        {"conv": "one", "query": "two", "dense": "one"},
    ),
}


@pytest.mark.parametrize("choice", ["window", "exact"])
@pytest.mark.parametrize("axes", [cdb_jax.output_channels, cdb_jax.input_channels])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_optimizer_on_the_kept_part(name, axes, choice):
    policy, inner = window(channel_choice=choice, channel_axes=axes), OPTIMIZERS[name]
    history = run(compact(inner, policy))
    params = PARAMS
    for count, (found, _) in enumerate(history[1:]):
        part = Oracle(policy, PARAMS, count)
        if count % HOLD == 0:
            state = inner.init(part.take(params))
        updates, state = inner.update(part.take(gradients(count)), state, part.take(params))
        params = part.put(optax.apply_updates(part.take(params), updates), params)
        # Norms add up in another order.
        chex.assert_trees_all_close(found, params, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("choice", ["window", "exact"])
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
        layer_choice="one",
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
    policy = window(0.0, layer_choice="one", other_layers="frozen")
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


def test_frozen_layers_have_no_state():
    policy = Policy(1.0, key=0, only=("conv",), hold=HOLD)
    tx = compact(optax.adamw(0.1), policy)
    state = tx.init(PARAMS)
    assert isinstance(state.inner_state[0].mu["conv"]["kernel"], optax.MaskedNode)
    updates, _ = jax.jit(tx.update)(gradients(0), state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    assert not jnp.any(updates["conv"]["kernel"]) and jnp.all(updates["dense"]["kernel"])
