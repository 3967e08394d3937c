"""Blocks: layers that are masked or picked together."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdb_jax
from cdb_jax import Axes, Mode, Policy

pytestmark = pytest.mark.usefixtures("standard_promotion")  # For optax's own optimizers.

SCANNED = {
    "blocks": {
        "attention": {"kernel": jnp.ones((6, 3, 8)), "bias": jnp.ones((6, 8))},
        "mlp": {"kernel": jnp.ones((6, 8, 3))},
    },
    "head": {"kernel": jnp.ones((3, 2))},
}
UNROLLED = {
    "blocks": {
        str(i): {"a": {"kernel": jnp.ones((3, 8))}, "b": {"kernel": jnp.ones((8, 3))}}
        for i in range(6)
    },
    "head": {"kernel": jnp.ones((3, 2))},
}


def scanned(rate=0.0, **settings):
    axes = {"blocks": Axes((), stack=0), "head": Axes(())}
    return Policy(rate, **{"key": 0, "blocks": ("blocks",), "channel_axes": axes} | settings)


def unrolled(rate=0.0, **settings):
    return Policy(rate, **{"key": 0, "blocks": ("blocks/*",), "exempt": ("head",)} | settings)


FROZEN = {"layer_choice": "exact", "other_layers": "frozen"}


@pytest.mark.parametrize("num_layers", [None, 1, 2, 5])
def test_blocks_of_a_stack_are_picked_together(num_layers):
    policy = scanned(num_layers=num_layers, exempt=("head",), **FROZEN)
    picked = np.zeros(6)
    for step in range(40):
        modes = {k: np.asarray(x) for k, x in policy.select(SCANNED, step).modes.items()}
        first, *others = modes.values()
        for mode in others:
            np.testing.assert_array_equal(mode, first)
        assert np.sum(first != Mode.FROZEN) == (num_layers or 1)
        picked += first != Mode.FROZEN
    assert (picked > 0).all() or num_layers is None or num_layers == 1


def test_every_block_is_as_likely():
    policy = scanned(num_layers=2, exempt=("head",), **FROZEN)

    @jax.jit
    @jax.vmap
    def learns(step):
        return policy.select(SCANNED, step).modes["blocks/mlp/kernel"] != Mode.FROZEN

    share = np.mean(learns(jnp.arange(4000)), axis=0)
    sigma = np.sqrt(1 / 3 * 2 / 3 / 4000)
    np.testing.assert_allclose(share, 1 / 3, atol=4 * sigma)


def test_unrolled_blocks_are_picked_together():
    policy = unrolled(num_layers=2, **FROZEN)
    seen = set()
    for step in range(40):
        modes = policy.select(UNROLLED, step).modes
        learning = {path.split("/")[1] for path, mode in modes.items() if mode != Mode.FROZEN}
        assert len(learning) == 2
        for block in learning:
            assert {int(modes[f"blocks/{block}/{x}/kernel"]) for x in "ab"} == {Mode.FULL}
        seen |= learning
    assert len(seen) == 6


@pytest.mark.parametrize("pattern", ["*/layers/*", "*layers/?", "enc/*/layers/*"])
def test_wildcards_may_span_several_names(pattern):
    layers = {str(i): {"a": {"kernel": jnp.ones((3, 4))}} for i in range(4)}
    policy = Policy(0.0, key=0, blocks=(pattern,), **FROZEN)
    modes = policy.select({"enc": {"stack": {"layers": layers}}}, 0).modes
    assert sum(mode != Mode.FROZEN for mode in modes.values()) == 1


@pytest.mark.parametrize("make, params", [(scanned, SCANNED), (unrolled, UNROLLED)])
def test_blocks_are_masked_together(make, params):
    policy = make(1.0, layer_rate=0.5)
    masked = np.zeros(40)
    for step in range(40):
        factors = policy.select(params, step).factors
        blocks = {}
        for path, factor in factors.items():
            if path.startswith("blocks"):
                key = path.split("/")[1] if make is unrolled else ""
                blocks.setdefault(key, []).append(np.asarray(factor).max(axis=-1))
        for key, found in blocks.items():
            for other in found[1:]:
                np.testing.assert_array_equal(other, found[0], key)
        masked[step] = np.mean([np.mean(found[0] == 0) for found in blocks.values()])
    assert 0.3 < masked.mean() < 0.7


def test_a_layer_outside_of_blocks_draws_what_it_always_does():
    axes = {"blocks": Axes(-1, stack=0), "head": -1}
    settings = dict(key=0, channel_choice="exact", channel_axes=axes, share_with_bias=True)
    alone, together = (Policy(0.5, **settings, blocks=blocks) for blocks in ((), ("blocks",)))
    params = {"blocks": {"mlp": SCANNED["blocks"]["mlp"]}, "head": SCANNED["head"]}
    for step in range(3):
        chex.assert_trees_all_equal(
            alone.select(params, step).factors, together.select(params, step).factors
        )


@pytest.mark.parametrize("num_layers", [1, 2])
def test_state_for_the_blocks_that_learn(num_layers):
    policy = scanned(num_layers=num_layers, exempt=("head",), hold=2, **FROZEN)
    tx = cdb_jax.compact(optax.adamw(0.1), policy)
    state = tx.init(SCANNED)
    shapes = jax.tree.map(jnp.shape, state.inner_state[0].mu)
    assert shapes["blocks"]["attention"] == {"kernel": (num_layers, 3, 8), "bias": (num_layers, 8)}
    assert shapes["head"]["kernel"] == (3, 2)
    params, update = SCANNED, jax.jit(tx.update)
    for step in range(6):
        before = params
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        learns = policy.select(params, step).modes["blocks/mlp/kernel"] != Mode.FROZEN
        changed = jax.tree.map(lambda x, y: x != y, before["blocks"], params["blocks"])
        for x in jax.tree.leaves(changed):
            np.testing.assert_array_equal(np.asarray(x).reshape(6, -1).any(axis=1), learns)


def scanning_loss(params, x):
    def body(x, block):
        y = jnp.tanh(x @ block["attention"]["kernel"] + block["attention"]["bias"][None])
        return x + y @ block["mlp"]["kernel"], None

    x, _ = jax.lax.scan(body, x, params["blocks"])
    return jnp.mean((x @ params["head"]["kernel"]) ** 2)


def unrolled_loss(params, x):
    for block in params["blocks"].values():
        x = x + jnp.tanh(x @ block["a"]["kernel"]) @ block["b"]["kernel"]
    return jnp.mean((x @ params["head"]["kernel"]) ** 2)


@pytest.mark.parametrize(
    ("loss", "params", "settings"),
    [
        (scanning_loss, SCANNED, {"stack": {"blocks": 0}}),
        (unrolled_loss, UNROLLED, {"blocks": ("blocks/*",)}),
    ],
    ids=["scanned", "unrolled"],
)
@pytest.mark.parametrize("preset", [cdb_jax.presets.lisa, cdb_jax.presets.badam])
def test_presets_train_the_blocks_they_pick(preset, loss, params, settings):
    policy = preset(key=0, exempt=("head",), hold=2, **settings)
    tx = cdb_jax.compact(optax.adamw(0.1), policy)
    x = jax.random.normal(jax.random.key(0), (16, 3))
    params = jax.tree.map(
        lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )

    def train(compact):
        @jax.jit
        def step(params, state):
            selection = policy.select(params, state.count)
            if compact is None:
                grads = selection.mask(jax.grad(loss)(params, x))
            else:
                grads = cdb_jax.grad(loss, kept_only=compact)(params, x, selection=selection)
            updates, state = tx.update(grads, state, params, selection=selection)
            return optax.apply_updates(params, updates), state

        now, state = params, tx.init(params)
        for _ in range(5):
            now, state = step(now, state)
        return now, state

    expected = train(None)
    chex.assert_trees_all_close(train(False), expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(train(True), expected, rtol=1e-4, atol=1e-6)


def test_the_report_counts_blocks():
    report = cdb_jax.channel_report(
        SCANNED, scanned(num_layers=2, exempt=("head",), **FROZEN), optimizer=optax.adam(0.1)
    )
    assert "blocks a step: 2 of 6, layer_rate 1.0, all channels" in report.summary
    full, kept = report.savings.gradient_bytes
    assert kept == pytest.approx((full - 24) / 3 + 24)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(blocks=("missing/*",)), "blocks.*missing"),
        (dict(num_layers=7, exempt=("head",), **FROZEN), "num_layers=7.*6"),
        (
            dict(
                channel_axes={"blocks": {"attention": Axes((), stack=0), "mlp": -1}, "head": None}
            ),
            "blocks=.*stack",
        ),
    ],
)
def test_mistakes_on_a_tree(settings, message):
    with pytest.raises(ValueError, match=message):
        scanned(**settings).select(SCANNED, 0)


@pytest.mark.bad_input
def test_several_layers_of_a_part_of_the_model():
    policy = Policy(0.0, key=0, num_layers=2, root="encoder", **FROZEN)
    with pytest.raises(ValueError, match="num_layers=2.*part of it.*num_layers=1"):
        policy.select(UNROLLED, 0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(num_layers=2), ValueError, "num_layers=2.*layer_choice"),
        (dict(num_layers=0, layer_choice="exact"), ValueError, "num_layers.*0"),
        (
            dict(num_layers=2, layer_choice="exact", layer_weights="size"),
            ValueError,
            "layer_weight",
        ),
        (dict(num_layers=jnp.int32(2), layer_choice="exact"), TypeError, "num_layers.*static"),
        (dict(blocks="blocks/*"), TypeError, "blocks"),
    ],
)
def test_mistakes(settings, error, message):
    with pytest.raises(error, match=message):
        Policy(0.5, key=0, **settings)
