"""Recipes: each can be run and says what the paper found; mistakes are reported."""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from public_weights import vit_shapes
from stored_runs import metrics

import cdb_jax
import methods
import models.resnet
import models.vit
import recipes
import train
from epochs import Epochs

# Rows of the paper's tables: ChannelDropBack, baseline.
PAPER = {
    "resnet50-cifar10": (89.12, 89.16),
    "resnet50-cifar100": (77.55, 76.51),
    "mobilenet_v2-cifar10": (94.41, 94.04),
    "mobilenet_v2-cifar100": (73.75, 68.08),
    "densenet121-cifar10": (95.52, 95.12),
    "densenet121-cifar100": (77.30, 77.01),
    "resnet50-finetune-svhn": (95.37, 95.31),
    "resnet50-finetune-cifar10": (97.45, 97.38),
    "resnet50-finetune-cifar100": (84.90, 84.20),
    "vit_b16-cifar10": (98.80, 98.95),
    "vit_b16-cifar100": (92.20, 91.67),
    "vit_b16-imagenet": (82.03, 81.32),
    "vit_b16-imagenet-384": (83.90, 83.32),
    "vit_l16-cifar10": (99.08, 99.04),
    "vit_l16-cifar100": (93.44, 93.25),
    "vit_l16-imagenet": (83.13, 82.94),
    "vit_l16-imagenet-384": (85.05, 85.05),
}
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn_cropped": 10, "imagenet2012": 1000}


def test_every_row_has_a_recipe():
    assert recipes.names() == sorted([*PAPER, "resnet50-cifar100-layer_drop_back"])


def test_the_recipe_of_layer_drop_back():
    config = recipes.parse(train.Config, ["--recipe", "resnet50-cifar100-layer_drop_back"])
    assert (config.method, config.rate, config.optimizer) == ("layer_drop_back", 0.5, "sgd")
    assert (config.learning_rate, config.weight_decay, config.decays) == (0.1, 1e-4, "all")
    assert (config.epochs, config.batch_size, config.schedule) == (200, 128, "cosine")
    assert config.drop_epoch_learning_rate == "double"


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_is_quoted_and_nothing_else_is_claimed(name):
    with_cdb, without = (f"{x:.2f}" for x in PAPER[name])
    header = (recipes.FOLDER / f"{name}.toml").read_text().partition("\n\n")[0]
    quoted = f"{with_cdb} % with ChannelDropBack, {without} % without. Not run here."
    assert quoted in header and "\n# Not confirmed: " in header
    row = f"| `{name}` | {with_cdb} | {without} | not run here |"
    assert row in (recipes.FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_sets_what_its_name_says(name):
    config = recipes.parse(train.Config, ["--recipe", name])
    assert config.recipe == name and config.run_dir == Path("runs", name)
    assert config.model.replace("/", "") == name.partition("-")[0]
    data_set = re.search("svhn|cifar100?|imagenet", name)[0]
    assert re.match("svhn|cifar100?|imagenet", config.dataset)[0] == data_set
    assert config.method == "released" and config.rate == 0.3
    assert (config.optimizer, config.schedule) == ("sgd", "step")
    assert config.keep_partial_batch and config.standardise and config.decays == "all"
    assert config.rotation == 15
    assert config.dropout_rate == (0.1 if config.model.startswith("vit") else 0.0)
    scratch = not config.model.startswith("vit") and "finetune" not in name
    assert (config.weights is None) == scratch
    shape = (200, 128, None, 5e-4) if scratch else (85, 1024, 224, 1e-4)
    if name.endswith("384"):
        shape = (85, 1024, 384, 1e-4)
    assert (config.epochs, config.batch_size, config.image_size, config.weight_decay) == shape
    if config.weights:
        assert f"`{config.weights}`" in (recipes.FOLDER / "README.md").read_text()


@functools.cache
def params_of(model, side, classes):
    def build():
        shape = (side, side, 3)
        return models.create(model, num_classes=classes, image_shape=shape, rngs=nnx.Rngs(0))

    return nnx.state(nnx.eval_shape(build), nnx.Param)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] if x.startswith("vit_l16") else []) for x in PAPER],
)
def test_a_recipe_builds_its_model_and_policy(name):
    config = recipes.parse(train.Config, [f"--recipe={name}"])
    params = params_of(config.model, config.image_size or 32, CLASSES[config.dataset])
    epochs = Epochs(config.epochs, 100)
    policy = methods.make_policy(config, epochs)
    assert len(str(cdb_jax.channel_report(params, policy)).splitlines()) > 100
    tx = methods.make_optimizer(config, policy, epochs)
    momentum = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert sum(x.size for x in momentum) > sum(x.size for x in jax.tree.leaves(params))


def test_flags_win():
    flags = "--method layer_drop_back --epochs 3 --run-dir a --weights None --exempt head fc"
    config = recipes.parse(train.Config, [*flags.split(), "--recipe", "vit_b16-cifar10"])
    assert (config.method, config.rate, config.epochs) == ("layer_drop_back", 0.5, 3)
    assert (config.run_dir, config.weights, config.batch_size) == (Path("a"), None, 1024)
    assert config.exempt == ("head", "fc")
    assert recipes.parse(train.Config, []) == train.Config()


def test_the_learning_rate_falls_in_steps():
    config = train.Config(schedule="step", learning_rate=0.5, optimizer="sgd", weight_decay=0.0)
    tx = methods.make_optimizer(config, None, Epochs(10, 2))
    params = {"kernel": jnp.ones(())}

    @jax.jit
    def run():
        def step(state, _):
            updates, state = tx.update(params, state, params)
            return state, updates["kernel"]

        return jax.lax.scan(step, tx.init(params), length=20)[1]

    momentum, gradients = 0.0, []
    for update in np.asarray(run()):
        momentum = 1 + 0.9 * momentum
        gradients.append(-update / (1 + 0.9 * momentum))
    expected = [0.5] * 6 + [0.05] * 6 + [0.005] * 5 + [0.0005] * 3
    np.testing.assert_allclose(gradients, expected, rtol=1e-5)


# Runs.


@pytest.fixture
def nano_models(monkeypatch):
    monkeypatch.setitem(models.vit.VITS, "vit_nano", (16, 1, 2))
    block = models.resnet.BasicBlock
    monkeypatch.setitem(models.resnet.RESNETS, "resnet_nano", models.resnet.Size(block, (1,), 8))


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


@pytest.mark.usefixtures("standard_promotion", "compilation_cache", "nano_models")
@pytest.mark.parametrize(
    ("recipe", "flags", "classes"),
    [
        pytest.param("resnet50-cifar100", "--model resnet_nano", 100, marks=pytest.mark.slow),
        ("vit_b16-cifar10", "--model vit_nano/4 --image-size 16 --weights w.npz", 10),
    ],
)
def test_a_recipe_trains(monkeypatch, tmp_path, capsys, recipe, flags, classes):
    monkeypatch.chdir(tmp_path)
    shapes = vit_shapes(16, 1, 2, 4, 3, 4, 21)
    np.savez("w.npz", **{name: np.full(shape, 0.1, "f") for name, shape in shapes.items()})
    with tfds.testing.mock_data(num_examples=20):
        run_main(monkeypatch, "--recipe", recipe, *flags.split(), "--epochs", 2, "--batch-size", 8)
    rows = metrics(tmp_path / "runs" / recipe)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert abs(rows[0]["train_loss"] - np.log(classes)) < 1.0
    shown = capsys.readouterr().out
    assert ("arrays loaded from w.npz; not used: head/bias" in shown) == ("--weights" in flags)


# Mistakes.


MISTAKES = {
    "batch = 3": "sets batch; take it out, or see --help for the flags",
    'recipe = "other"': "sets recipe; take it out",
    "[optimizer]\nname = 'sgd'": r"sets optimizer = {'name': 'sgd'}; see --help for its values",
    'epochs = "many"': "sets epochs = 'many'; see --help",
    "epochs = 1.5": "sets epochs = 1.5; see --help",
    "epochs = true": "sets epochs = True; see --help",
    "epochs = [1, 2]": r"sets epochs = \[1, 2\]; see --help",
    'method = "cbd"': "sets method = 'cbd'; see --help",
    "skip_dropped = 1": "sets skip_dropped = 1; see --help",
    "dataset = 2020-01-01": "unknown data set '2020-01-01'; choose one of digits",
    "epochs =": "cannot be read: .*; mend its TOML",
    "epochs = 1\nepochs = 2": "cannot be read: .*; mend its TOML",
    "\xff": "cannot be read: .*; mend its TOML",
    "epochs = -1": "--epochs -1 must be positive",
    "image_size = 0": "--image-size 0 must be 1 to 4096",
    "skip_dropped = true": "--skip-dropped needs --channel-choice",
    'weights = "w.pth"': "--weights w.pth: resnet_small takes a .safetensors file",
}


@pytest.mark.bad_input
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("text", MISTAKES, ids=lambda x: x.encode("ascii", "replace").decode())
def test_a_wrong_recipe_gets_one_line(monkeypatch, tmp_path, data_dir, text):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit, match=f"^error: .*{MISTAKES[text]}") as caught:
        run_main(monkeypatch, "--recipe", "mine", "--data-dir", data_dir)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["", "resnet", "../recipes/resnet50-cifar10", "None", "*"])
def test_an_unknown_recipe(monkeypatch, name):
    with pytest.raises(
        SystemExit, match="^error: unknown --recipe .*; choose one of densenet121-c"
    ):
        run_main(monkeypatch, f"--recipe={name}")


@pytest.mark.bad_input
def test_a_recipe_without_its_weights(monkeypatch, tmp_path, data_dir):
    monkeypatch.chdir(tmp_path)
    message = "--weights ViT-B_16.npz: there is no such file.*README.md tells where"
    with pytest.raises(SystemExit, match=message):  # Before the data are asked for.
        run_main(monkeypatch, "--recipe", "vit_b16-cifar10", "--data-dir", data_dir)
    assert not (tmp_path / "runs").exists()


@pytest.mark.bad_input
def test_a_recipe_must_be_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, "--recipe")
    assert caught.value.code == 2 and "--recipe" in capsys.readouterr().err
