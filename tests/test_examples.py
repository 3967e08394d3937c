"""The examples of Backdrop: their data, their losses, and that they run to the end."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import auc
import gaussian_process
import gp_textures
import new_classes

pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_textures_have_the_kernel_they_should(scale):
    keys = jax.random.split(jax.random.key(0), 200)
    samples = np.asarray(jax.vmap(lambda key: gaussian_process.texture(key, 64, scale))(keys))
    np.testing.assert_allclose(samples.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(samples.std(axis=(1, 2)), 1, rtol=1e-5)
    for lag in (0, 1, 2, 4, 8):
        for axis in (1, 2):
            found = (samples * np.roll(samples, lag, axis=axis)).mean(axis=(1, 2))
            error = 4 * found.std() / np.sqrt(len(found)) + 0.01  # Standardising moves it a little.
            assert abs(found.mean() - np.exp(-(lag**2) / (2 * scale**2))) < error + 0.03


def test_classes_differ_in_the_scales_they_name():
    config = gp_textures.Config(size=64, images=8, batch_size=8)
    images, labels = gp_textures.textures(jax.random.key(0), 8, config)
    assert images.shape == (8, 64, 64, 1)
    np.testing.assert_array_equal(labels, [0, 1, 2, 3] * 2)
    (fine, less_fine), (coarse, less_coarse) = gp_textures.length_scales(config)
    assert fine < less_fine < coarse < less_coarse
    full = gp_textures.Config(size=1024)
    np.testing.assert_allclose(gp_textures.length_scales(full), [(9.5, 10), (80, 140)])


@pytest.mark.slow
def test_the_texture_example(monkeypatch, tmp_path, capsys):
    small = ("--size", 32, "--images", 8, "--test-images", 8, "--batch-size", 4, "--width", 4)
    run(gp_textures, monkeypatch, *small, "--epochs", 2, "--seeds", 2, "--run-dir", tmp_path)
    shown = capsys.readouterr().out
    assert "seed 1, Backdrop: training loss" in shown and "Backdrop against without" in shown
    for name in ("textures", "gradients", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "--size 100 must be a power of two"),
        (["--images", "10"], "--images 10 must be a multiple of 4"),
        (["--batch-size", "7"], "--batch-size 7 must divide --images 40"),
        (["--fine-rate", "1.5"], "--fine-rate 1.5 must be a probability"),
        (["--seeds", "0"], "--seeds 0 must be positive"),
        (["--batch-size", "0"], "--batch-size 0 must be positive"),
        (["--learning-rate", "-1"], "--learning-rate -1.0 must be positive"),
        (["--fine-ratio", "0"], "--fine-ratio 0.0 must be more than 1"),
    ],
)
def test_mistakes_with_textures(monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(gp_textures, monkeypatch, *arguments)


def test_the_ranking_loss():
    scores = jax.random.normal(jax.random.key(0), (30,))
    positive = jnp.arange(30) % 3 == 0
    pairs = [
        np.log1p(np.exp(float(scores[n] - scores[p])))
        for p in range(30)
        for n in range(30)
        if positive[p] and not positive[n]
    ]
    loss = auc.ranking_loss(scores, positive)
    np.testing.assert_allclose(loss, np.mean(pairs), rtol=1e-5)
    assert loss / np.log(2) >= 1 - roc_auc_score(positive, scores)


def test_the_ranking_example(monkeypatch, capsys):
    run(auc, monkeypatch, "--seeds", 2, "--steps", 20, "--rates", 0.0, 0.5)
    shown = capsys.readouterr().out
    assert "without" in shown and "backdrop 0.5" in shown
    for arguments, message in (
        (("--rates", 2), r"--rates \(2.0,\) must be probabilities"),
        (("--rates", 0.5, 0.5), "repeats a rate"),
        (("--learning-rate", -1), "--seeds, --steps and --learning-rate must be positive"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run(auc, monkeypatch, *arguments)


def test_new_classes_change_nothing_else(capsys):
    """Two columns of the kernel and two entries of the bias, at most."""
    new_classes.main()
    _, first, second, changed, flops = capsys.readouterr().out.strip().splitlines()
    old_before, new_before = map(float, first.split()[-2:])
    old_after, new_after = map(float, second.split()[-2:])
    assert old_before > 95 and new_before == 0 and old_after > 90 and new_after > 70
    assert 0 < int(changed.split()[0].replace(",", "")) <= 2 * 256 + 2
    assert float(flops.split()[3]) < 50
