"""Options of train.py that have nothing to do with dropping: optimizers, targets, mixed images."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mixing
import optimizers
from config import Config
from errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax needs it.


@pytest.fixture
def images():
    return np.random.default_rng(0).random((6, 8, 12, 3), np.float32)


def mixed(images, draws=400, **alphas):
    """Many mixed batches, and the shares that their images kept."""
    keys = jax.random.split(jax.random.key(0), draws)
    found = jax.jit(jax.vmap(lambda key: mixing.mix(key, images, **alphas)))(keys)
    return jax.tree.map(np.asarray, found)


def test_mixup_averages_each_image_with_the_one_before(images):
    found, shares = mixed(images, mixup=0.4, cutmix=0.0)
    weight = shares[:, None, None, None, None]
    np.testing.assert_allclose(
        found, weight * images + (1 - weight) * np.roll(images, 1, axis=0), rtol=1e-6
    )
    variance = 1 / (4 * (2 * 0.4 + 1))  # Of Beta(a, a), whose mean is a half.
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(variance / 400)
    assert shares.var() == pytest.approx(variance, rel=0.25)


def test_cutmix_pastes_a_box_and_counts_its_pixels(images):
    found, shares = mixed(images, mixup=0.0, cutmix=1.0)
    is_own = np.all(found == images, axis=-1)
    is_pasted = np.all(found == np.roll(images, 1, axis=0), axis=-1)
    assert np.all(is_own != is_pasted)  # Every pixel is of one of the two.
    np.testing.assert_allclose(is_own.mean(axis=(2, 3)), np.tile(shares[:, None], 6), rtol=1e-5)
    for pasted in is_pasted[:, 0]:
        rows, columns = pasted.any(axis=1), pasted.any(axis=0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns)
        for inside in (rows, columns):  # One run of ones.
            assert np.abs(np.diff(inside.astype(int))).sum() + inside[0] + inside[-1] in (0, 2)
    assert 0.05 < is_pasted.mean() < 0.5  # At most the mean of the area, which is a half.


def test_a_batch_gets_mixup_or_cutmix(images):
    found, _ = mixed(images, mixup=0.8, cutmix=1.0)
    is_cut = np.all((found == images) | (found == np.roll(images, 1, axis=0)), axis=(1, 2, 3, 4))
    assert abs(is_cut.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)


def test_targets_follow_the_shares():
    labels = jnp.array([0, 2, 1])
    found = mixing.soft_targets(labels, jnp.float32(0.75), 4, smoothing=0.2)
    own, other = 0.8 * 0.75, 0.8 * 0.25
    expected = np.full((3, 4), 0.05)
    for image, (label, partner) in enumerate(zip([0, 2, 1], [1, 0, 2], strict=True)):
        expected[image, label] += own
        expected[image, partner] += other
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb"])
@pytest.mark.parametrize("decays", ["kernels", "all"])
def test_decay_is_where_the_flag_says(name, decays):
    names = {"kernel": True, "w": True, "embedding": True, "kernel_norm": {"scale": False}}
    names |= {"bias": False, "pos_embed": False, "cls_token": False, "gain": False}
    params = jax.tree.map(lambda _: jnp.full((2, 3), 2.0), names)
    params["gain"] = jnp.full(3, 2.0)
    settings = Config(optimizer=name, decays=decays, weight_decay=0.5, learning_rate=0.1)
    tx = optimizers.make(settings, optax.constant_schedule(0.1))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    # Without a gradient, decay alone moves an array.
    moved = jax.tree.map(lambda x: bool((x < 0).all()), updates)
    assert moved == (names if decays == "kernels" else jax.tree.map(lambda _: True, names))


def test_long_gradients_are_clipped():
    params = {"kernel": jnp.ones((3, 4))}
    settings = Config(optimizer="sgd", weight_decay=0.0, clip_norm=0.5)
    tx = optimizers.make(settings, optax.constant_schedule(1.0))
    for size, norm in ((0.01, 0.01), (9.0, 0.5)):
        grads = {"kernel": jnp.full((3, 4), size / np.sqrt(12))}
        updates, _ = tx.update(grads, tx.init(params), params)
        # The first step with Nesterov momentum goes 1 + 0.9 times as far.
        assert optax.tree.norm(updates) == pytest.approx(1.9 * norm, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 30])
def test_schedules_of_few_steps(schedule, total_steps):
    rate = optimizers.learning_rate(Config(schedule=schedule, learning_rate=0.1), total_steps)
    rates = np.array([rate(step) for step in range(total_steps)])
    assert np.isfinite(rates).all() and (rates >= 0).all() and rates.max() <= 0.1 + 1e-7
    assert rates.max() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("mixup", -1.0),
        ("cutmix", float("nan")),
        ("clip_norm", 0.0),
        ("clip_norm", float("inf")),
    ],
)
def test_values_out_of_range_are_refused(flag, value):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {value}"):
        Config(**{flag: value})


def test_a_data_set_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="--data-folder .*; leave out --dataset cifar10"):
        Config(data_folder=tmp_path, dataset="cifar10")
