"""Rates that depend on the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import cdb_jax
from cdb_jax import Policy


def dense(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}


def test_schedules_follow_the_count():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    policy = Policy(schedule, key=0)
    tree = dense(2, 4000)
    for count in (0, 3, 10):
        kept = np.asarray(policy.select(tree, count).factors["kernel"]).mean()
        assert abs(kept - (1 - count / 10)) < 4 * np.sqrt(0.25 / 4000)


def test_scheduled_layer_rate():
    def two_steps(count):
        return jnp.where(count < 2, 1.0, 0.0)

    policy = Policy(0.5, key=0, layer_rate=two_steps, channel_choice="exact")
    dropped = [
        int((np.asarray(policy.select(dense(2, 8), count).factors["kernel"]) == 0).sum())
        for count in range(4)
    ]
    assert dropped == [4, 4, 0, 0]


def test_released_schedule():
    """The rates of epochs in the authors' code: two epochs after 30 and 60 % of all."""
    schedule = cdb_jax.presets.released_layer_rate(epochs=85, steps_per_epoch=7)
    phases = [0.03 if e < 26 + 2 else 0.15 if e < 51 + 2 else 0.3 for e in range(90)]
    for step in (0, 6):
        values = [float(schedule(7 * epoch + step)) for epoch in range(90)]
        np.testing.assert_allclose(values, phases, rtol=1e-6)


def test_schedules_on_every_nth_epoch():
    cosine = optax.cosine_decay_schedule(0.1, 40)

    def doubled(count):
        return 2 * cosine(count)

    schedule = cdb_jax.presets.every_nth_epoch(doubled, cosine, steps_per_epoch=10)
    factors = [float(schedule(step) / cosine(step)) for step in range(39)]
    expected = [2.0 if step // 10 == 2 else 1.0 for step in range(39)]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    for name in ("steps_per_epoch", "n"):
        with pytest.raises(ValueError, match=f"{name} must be an int >= 1, got 0"):
            cdb_jax.presets.every_nth_epoch(1.0, 0.0, **({"steps_per_epoch": 10} | {name: 0}))
    with pytest.raises(ValueError, match="steps_per_epoch must be an int or two"):
        cdb_jax.presets.every_nth_epoch(1.0, 0.0, steps_per_epoch=(1, 2, 3))


@given(n=st.integers(1, 4), steps=st.integers(1, 30), nth=st.integers(1, 30), jitted=st.booleans())
def test_epochs_of_two_lengths(n, steps, nth, jitted):
    """Against a list of all steps, with the rule of the authors' code for LayerDropBack."""
    positions, drops = [], []
    for epoch in range(9):
        is_nth = epoch % n == 0 and epoch > 0
        length = nth if is_nth else steps
        positions += [epoch + i / length for i in range(length)]
        drops += [is_nth] * length
    settings = dict(steps_per_epoch=(steps, nth), n=n)
    is_nth = cdb_jax.presets.every_nth_epoch(1.0, 0.0, **settings)
    position = cdb_jax.presets.by_epoch(lambda epochs: epochs, **settings)
    counts = np.arange(len(drops), dtype=np.int32)
    found = [jax.jit(f)(counts) if jitted else f(counts) for f in (is_nth, position)]
    np.testing.assert_array_equal(found[0], np.array(drops, np.float32))
    np.testing.assert_allclose(found[1], positions, rtol=1e-5, atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [np.float32(5.0), jnp.float32(-0.1), jnp.nan, jnp.ones(3)])
def test_values_that_are_no_probabilities(value):
    with pytest.raises(ValueError, match="layer_rate: the schedule returned"):
        Policy(0.5, key=0, layer_rate=lambda step: value).select(dense(2, 8), 0)


@pytest.mark.bad_input
def test_mistakes():
    for name in ("epochs", "steps_per_epoch"):
        with pytest.raises(ValueError, match=f"{name} must be an int >= 1, got 0"):
            cdb_jax.presets.released_layer_rate(**(dict(epochs=1, steps_per_epoch=1) | {name: 0}))
    with pytest.raises(ValueError, match="final.*1.3"):
        cdb_jax.presets.released_layer_rate(epochs=10, steps_per_epoch=1, final=1.3)
