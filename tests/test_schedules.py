"""Rates that depend on the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    schedule = cdb_jax.presets.released_layer_rate(200)
    values = [float(schedule(count)) for count in (0, 59, 60, 119, 120, 10_000)]
    np.testing.assert_allclose(values, [0.03, 0.03, 0.15, 0.15, 0.3, 0.3], rtol=1e-6)


def test_schedules_on_every_nth_epoch():
    cosine = optax.cosine_decay_schedule(0.1, 40)

    def doubled(count):
        return 2 * cosine(count)

    schedule = cdb_jax.presets.every_nth_epoch(doubled, cosine, steps_per_epoch=10)
    factors = [float(schedule(step) / cosine(step)) for step in range(39)]
    expected = [2.0 if step // 10 % 2 else 1.0 for step in range(39)]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    for name in ("steps_per_epoch", "n"):
        with pytest.raises(ValueError, match=f"{name} must be an int >= 1, got 0"):
            cdb_jax.presets.every_nth_epoch(1.0, 0.0, **({"steps_per_epoch": 10} | {name: 0}))


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [np.float32(5.0), jnp.float32(-0.1), jnp.nan, jnp.ones(3)])
def test_values_that_are_no_probabilities(value):
    with pytest.raises(ValueError, match="layer_rate: the schedule returned"):
        Policy(0.5, key=0, layer_rate=lambda step: value).select(dense(2, 8), 0)


@pytest.mark.bad_input
def test_mistakes():
    with pytest.raises(ValueError, match="total_steps.*0"):
        cdb_jax.presets.released_layer_rate(0)
    with pytest.raises(ValueError, match="final.*1.3"):
        cdb_jax.presets.released_layer_rate(10, final=1.3)
