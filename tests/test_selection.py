"""What is drawn: probabilities, rescaling, and what a draw may depend on."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import cdb_jax
from cdb_jax import Axes, Policy

DRAWS = 4000


def dense(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}


def draws(policy, tree, number=DRAWS):
    sample = jax.jit(jax.vmap(lambda count: policy.select(tree, count).factors))
    return jax.tree.map(np.asarray, sample(jnp.arange(number)))


def assert_rate(hits, probability, sigmas=4.0):
    """Means over the first axis agree with a probability; Bonferroni-wide for many channels."""
    sigma = np.sqrt(probability * (1 - probability) / hits.shape[0])
    many = np.sqrt(2 * np.log(max(hits[0].size, 1)))
    assert np.abs(hits.mean(axis=0) - probability).max() <= max(sigmas, 3 + many) * sigma + 1e-9


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_bernoulli_rate(rate):
    kept = draws(Policy(rate, key=1), dense(2, 12))["kernel"] > 0
    assert_rate(kept, 1 - rate + rate**12)
    assert kept.any(axis=1).all()


@pytest.mark.parametrize(
    "choice, groups, rate, places",
    [
        *[("exact", None, rate, None) for rate in (0.25, 0.5, 0.8)],
        *[("window", None, rate, 12) for rate in (0.25, 0.5, 0.8)],
        *[("window", 3, rate, 4) for rate in (0.25, 0.5, 0.8)],
        ("chunk", None, 0.5, 2),
        ("chunk", None, 0.75, 4),
        ("chunk", 3, 0.75, 4),
        ("chunk", None, 0.8, 12),  # 12 channels cannot be split into five: a window.
    ],
)
def test_fixed_number_of_channels(choice, groups, rate, places):
    width = 12
    policy = Policy(rate, key=2, channel_choice=choice, window_groups=groups)
    kept = draws(policy, dense(2, width))["kernel"] > 0
    size = width // (groups or 1)
    number = (groups or 1) * max(1, round((1 - rate) * size))
    assert (kept.sum(axis=1) == number).all()
    assert_rate(kept, number / width)
    if choice in ("window", "chunk"):
        grouped = kept.reshape(DRAWS, groups or 1, size)
        assert (grouped == grouped[:, :1]).all()  # The same window in each group.
        starts = grouped[:, 0] & ~np.roll(grouped[:, 0], 1, axis=1)
        assert (starts.sum(axis=1) == 1).all()  # One cyclic run.
        assert len(np.unique(starts.argmax(axis=1))) == places


def test_exact_subsets_are_equally_likely():
    kept = draws(Policy(0.5, key=3, channel_choice="exact"), dense(2, 4), 6000)["kernel"] > 0
    _, counts = np.unique(kept @ (1 << np.arange(4)), return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts / 6000 - 1 / 6).max() < 4 * np.sqrt(5 / 36 / 6000)


@pytest.mark.parametrize("choice", ["bernoulli", "exact", "window"])
def test_limits(choice):
    tree = dense(2, 5)
    for layer_rate in (0.0, 0.5, 1.0):
        whole = Policy(0.0, key=0, channel_choice=choice, layer_rate=layer_rate)
        assert (draws(whole, tree, 50)["kernel"] == 1).all()
    factors = draws(Policy(1.0, key=0, channel_choice=choice), tree, 50)["kernel"]
    assert (factors == 0).all()
    half = draws(Policy(1.0, key=0, channel_choice=choice, layer_rate=0.5), tree)["kernel"]
    assert (half == half[:, :1]).all()
    assert_rate(half[:, :1] == 0, 0.5)


def test_never_everything():
    almost = draws(Policy(0.999, key=0), dense(2, 3), 500)["kernel"]
    assert (almost > 0).any(axis=1).all()


@pytest.mark.parametrize("choice", ["bernoulli", "exact", "window"])
@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_expected_rescaling_is_unbiased(choice, rate):
    policy = Policy(rate, key=4, channel_choice=choice, rescale="expected", layer_rate=0.6)
    factors = draws(policy, dense(2, 3), 20_000)["kernel"]
    error = factors.std(axis=0) / np.sqrt(20_000)
    assert (np.abs(factors.mean(axis=0) - 1) < 4.5 * error).all()


def test_expected_rescaling_of_whole_layers():
    policy = Policy(1.0, key=4, rescale="expected", layer_rate=0.25)
    factors = draws(policy, dense(2, 3))["kernel"]
    np.testing.assert_allclose(np.unique(factors), [0, 1 / 0.75], rtol=1e-6)
    assert_rate(factors[:, 0] == 0, 0.25)


def test_realized_rescaling_keeps_the_sum():
    factors = draws(Policy(0.6, key=5, rescale="realized"), dense(2, 9), 500)["kernel"]
    np.testing.assert_allclose(factors.sum(axis=1), 9, rtol=1e-5)


@given(
    rate=st.floats(0, 1),
    layer_rate=st.floats(0, 1),
    width=st.integers(1, 40),
    choice=st.sampled_from(["bernoulli", "exact", "window"]),
    rescale=st.sampled_from(["none", "expected"]),
    key=st.integers(0, 2**64 - 1),
)
@hypothesis.settings(max_examples=12)
def test_factors_are_finite_and_shaped(rate, layer_rate, width, choice, rescale, key):
    settings = dict(key=key, layer_rate=layer_rate, channel_choice=choice, rescale=rescale)
    tree = {"a": {"kernel": jnp.zeros((2, width))}, "b": {"kernel": jnp.zeros((3, width, 2))}}
    spec = {"a": -1, "b": Axes(1, stack=0)}
    selection = Policy(rate, channel_axes=spec, **settings).select(tree, 3).factors
    assert selection["a/kernel"].shape == (width,)
    assert selection["b/kernel"].shape == (3, width)
    for factors in selection.values():
        assert factors.dtype == jnp.float32
        assert np.isfinite(factors).all() and (np.asarray(factors) >= 0).all()


def test_one_layer_a_step():
    tree = {name: dense(2, 6) for name in "abc"}
    weights = {"a/kernel": 1.0, "b/kernel": 2.0, "c/kernel": 5.0}
    policy = Policy(0.5, key=6, layer_choice="exact", layer_weights=weights, channel_choice="exact")
    selection = draws(policy, tree)
    masked = np.stack([(selection[path] == 0).any(axis=1) for path in sorted(weights)], axis=1)
    assert (masked.sum(axis=1) == 1).all()
    for column, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert_rate(masked[:, column : column + 1], share)


@pytest.mark.parametrize("others", ["full", "frozen"])
def test_the_expected_update_of_whole_layers_is_unbiased(others):
    tree = {name: dense(2, 6) for name in "ab"}
    settings = dict(layer_rate=0.5, layer_choice="exact", other_layers=others, rescale="expected")
    factors = draws(Policy(1.0, key=0, **settings), tree)["a/kernel"][:, :1]
    assert_rate(factors > 0, learns := 0.75 if others == "full" else 0.25)
    np.testing.assert_allclose(factors.max(), 1 / learns, rtol=1e-6)


def test_one_layer_of_a_part_is_the_one_of_the_whole():
    tree = {name: dense(2, 6) for name in "abc"}
    weights = {f"{name}/kernel": 1.0 for name in "abc"}
    policy = Policy(0.5, key=6, layer_choice="exact", layer_weights=weights)
    part = tree | {"b": optax.MaskedNode()}
    whole, some = draws(policy, tree, 200), draws(policy, part, 200)
    for path, factors in some.items():
        np.testing.assert_array_equal(factors, whole[path])


def test_others_are_frozen():
    tree = {
        "a": dense(2, 6) | {"bias": jax.ShapeDtypeStruct((6,), jnp.float32)},
        "b": dense(2, 6),
        "head": dense(6, 2) | {"bias": jax.ShapeDtypeStruct((2,), jnp.float32)},
    }
    policy = cdb_jax.presets.algorithm_1(0.5, key=7, other_layers="frozen", exempt=("head",))
    selection = draws(policy, tree, 200)
    assert set(selection) == {"a/kernel", "b/kernel", "a/bias"}
    assert (selection["a/bias"] == 0).all()
    learns = np.stack([selection[f"{x}/kernel"].any(axis=1) for x in "ab"], axis=1)
    assert (learns.sum(axis=1) == 1).all()


def test_stacked_layers_draw_each_for_itself():
    tree = dense(50, 3, 8)
    policy = Policy(0.5, key=8, channel_axes=Axes(-1, stack=0), channel_choice="exact")
    factors = np.asarray(policy.select(tree, 0).factors["kernel"])
    assert factors.shape == (50, 8)
    assert len(np.unique(factors, axis=0)) > 20


def test_neighbours_in_space_and_time_are_independent():
    tree = {"a": dense(2, 8), "b": dense(2, 8)}
    selection = draws(Policy(0.5, key=9, channel_choice="exact"), tree)
    a, b = selection["a/kernel"], selection["b/kernel"]
    bound = 5 / np.sqrt(DRAWS)
    for other in (b, np.roll(a, 1, axis=0)):
        correlation = np.corrcoef(a.T, other.T)[:8, 8:]
        assert np.abs(correlation).max() < bound


# What a draw may depend on.

MODEL = {
    "a": {"kernel": jnp.ones((3, 8))},
    "b": {"kernel": jnp.ones((3, 3, 8, 5))},
    "c": {"kernel": jnp.ones((2, 8)), "bias": jnp.ones(8)},
}
CHOICES = ["bernoulli", "exact", "window"]


def policy_for(choice, key=0):
    return Policy(0.4, key=key, channel_choice=choice, layer_rate=0.7, rescale="realized")


def same(x, y):
    assert x.keys() == y.keys()
    for path in x:
        np.testing.assert_array_equal(x[path], y[path])


@pytest.mark.parametrize("choice", CHOICES)
def test_nothing_but_key_count_and_layer(choice):
    policy = policy_for(choice)
    whole = policy.select(MODEL, 5).factors
    alone = policy.select({"b": MODEL["b"]}, 5).factors
    np.testing.assert_array_equal(alone["b/kernel"], whole["b/kernel"])
    masked = policy.select(MODEL | {"a": optax.MaskedNode()}, 5).factors
    np.testing.assert_array_equal(masked["c/kernel"], whole["c/kernel"])
    cut = Policy(0.4, key=0, channel_choice=choice, layer_rate=0.7, rescale="realized", root="b")
    np.testing.assert_array_equal(cut.select(MODEL["b"], 5).factors["b/kernel"], whole["b/kernel"])
    assert any(
        not np.array_equal(whole[path], policy_for(choice, 1).select(MODEL, 5).factors[path])
        for path in whole
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_jit_x64_partitionable_and_default_implementation_change_nothing(choice):
    policy = policy_for(choice)
    expected = policy.select(MODEL, 5).factors

    def sample(step):
        return policy.select(MODEL, step).factors

    same(jax.jit(sample)(5), expected)
    with jax.enable_x64(True):
        same(jax.jit(sample)(5), expected)
    for partitionable in (False, True):
        with jax.threefry_partitionable(partitionable):
            same(jax.jit(sample)(5), expected)
    with jax.default_prng_impl("rbg"):
        same(policy_for(choice).select(MODEL, 5).factors, expected)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_number_of_devices_draws_the_same(devices):
    policy = policy_for("exact")
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        selection = jax.jit(lambda step: policy.select(MODEL, step).factors)(5)
    same(selection, policy.select(MODEL, 5).factors)
    for factors in jax.tree.leaves(selection):
        shards = [np.asarray(shard.data) for shard in factors.addressable_shards]
        assert all(np.array_equal(shard, shards[0]) for shard in shards)


def test_traced_keys_and_rates():
    keys = jax.random.split(jax.random.key(0), 3)
    rates = jnp.array([0.2, 0.5, 0.8])

    def sample(key, rate):
        return Policy(rate, key=key).select(MODEL, 2).factors

    batched = jax.jit(jax.vmap(sample))(keys, rates)
    for i in range(3):
        alone = sample(keys[i], float(rates[i]))
        for path in alone:
            np.testing.assert_array_equal(batched[path][i], alone[path])
