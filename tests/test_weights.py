"""Pretrained weights: files of the public layouts, against forward passes written from these."""

import contextlib
import io
import itertools
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from public_weights import (
    random_arrays,
    resnet_forward,
    resnet_shapes,
    vit_forward,
    vit_shapes,
    write,
)
from stored_runs import assert_same_runs

import errors
import models
import models.resnet
import models.vit
import processes
import run_folder
import train
import weights
from models.resnet import BasicBlock, Bottleneck, Size

SIDE = 72  # Large enough for the stem of ImageNet.
WIDTH, DEPTH, HEADS, PATCH = 16, 2, 2, 4


@pytest.fixture(autouse=True)
def nano_models(monkeypatch):
    monkeypatch.setitem(models.vit.VITS, "vit_nano", (WIDTH, DEPTH, HEADS))
    resnets = models.resnet.RESNETS
    monkeypatch.setitem(resnets, "basic_nano", Size(BasicBlock, (1, 2), 4))
    monkeypatch.setitem(resnets, "bottleneck_nano", Size(Bottleneck, (2, 1), 4))


def vit_arrays(positions=4, classes=10, channels=1):
    return random_arrays(vit_shapes(WIDTH, DEPTH, HEADS, PATCH, channels, positions, classes))


def resnet_arrays(name, classes=10):
    block, depths, width, _ = models.resnet.RESNETS[name]
    arrays = random_arrays(resnet_shapes(block.expansion == 4, depths, width, classes))
    norms = [x.removesuffix("running_var") for x in arrays if x.endswith("running_var")]
    return arrays | {f"{norm}num_batches_tracked": np.array(7) for norm in norms}


def build(name, classes=10, side=8, channels=1):
    shape = (side, side, channels)
    return models.create(name, num_classes=classes, image_shape=shape, rngs=nnx.Rngs(0))


def read(file, name, **kwargs):
    return weights.read(file, name, nnx.eval_shape(lambda: build(name, **kwargs)))


def logits(arrays, images, name, **kwargs):
    @jax.jit
    def compute(arrays, images):
        model = build(name, **kwargs)
        nnx.update(model, arrays)
        model.eval()
        return model(images)

    return compute(arrays, images)


# Numbers.


def test_a_vit_computes_what_the_layout_means(tmp_path):
    arrays = vit_arrays()
    # Tokens of little variance, for which the epsilon of the first normalisation matters.
    for name in ("embedding/kernel", "embedding/bias", "cls"):
        arrays[name] *= 2e-3
    arrays["Transformer/posembed_input/pos_embedding"] *= 2e-3
    found = read(write(tmp_path / "w.npz", arrays), "vit_nano/4")
    images = np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    expected = vit_forward(arrays, images)
    computed = logits(found.arrays, images, "vit_nano/4")
    np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
    assert found.summary == f"{len(arrays)} arrays loaded from {tmp_path / 'w.npz'}"


@pytest.mark.parametrize("name", ["basic_nano", "bottleneck_nano"])
def test_a_resnet_computes_what_the_layout_means(tmp_path, name):
    arrays = resnet_arrays(name)
    arrays["bn1.running_var"] *= 1e-4  # So that epsilon matters.
    arrays["bn1.weight"] *= 1e-2
    found = read(write(tmp_path / "w.safetensors", arrays), name, side=SIDE, channels=3)
    images = np.random.default_rng(1).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    block, depths, *_ = models.resnet.RESNETS[name]
    expected = resnet_forward(arrays, images, block.expansion == 4, depths)
    computed = logits(found.arrays, images, name, side=SIDE, channels=3)
    np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
    assert found.summary.endswith("not used: *.num_batches_tracked")


def test_batch_statistics_move_as_in_torchvision():
    norm = models.resnet.ConvNorm(4, 4, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)).norm
    x = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None], (8, 2, 2, 4))
    norm(x)
    np.testing.assert_allclose(norm.mean[...], 0.1 * 3.5, rtol=1e-6)  # PyTorch's momentum is 0.1.


@pytest.mark.parametrize(
    ("name", "shapes", "kept"),
    [
        ("resnet50", resnet_shapes(True, (3, 4, 6, 3), 64, 1000), True),
        ("vit_b/16", vit_shapes(768, 12, 12, 16, 3, 196, 21843), False),
    ],
    ids=["resnet50", "vit_b/16"],
)
def test_the_real_models_are_complete(monkeypatch, name, shapes, kept):
    if not kept:  # As the files of ImageNet-21k have it.
        shapes = shapes | {"pre_logits/kernel": (768, 768), "pre_logits/bias": (768,)}
    nothing = np.float32(0.0)
    arrays = {k: np.broadcast_to(nothing, shape) for k, shape in shapes.items()}
    arrays = {plain: arrays[stored] for plain, stored in weights._renamed(arrays).items()}
    monkeypatch.setattr(weights, "_read", lambda file: (arrays, "sha256:0"))
    file = weights.Path("w.npz" if name.startswith("vit") else "w.safetensors")
    model = nnx.eval_shape(lambda: build(name, classes=1000, side=224, channels=3))
    found = weights.read(file, name, model)
    loaded = jax.tree.leaves(found.arrays)
    total = sum(x.size for x in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    if kept:
        assert len(loaded) == 53 * 5 + 2 and sum(x.size for x in loaded) == total
    else:
        assert sum(x.size for x in loaded) == total - 769 * 1000
        unused = "head/bias, head/kernel, pre_logits/bias, pre_logits/kernel"
        assert found.summary == f"{len(loaded)} arrays loaded from w.npz; not used: {unused}"


def test_a_head_for_other_classes_stays_new(tmp_path):
    file = write(tmp_path / "w.npz", vit_arrays(classes=21))
    found = read(file, "vit_nano/4")
    assert "head" not in found.arrays and "not used: head/bias, head/kernel" in found.summary
    assert read(file, "vit_nano/4", classes=21).arrays["head"].keys() == {"kernel", "bias"}


def test_half_precision_becomes_float32(tmp_path):
    arrays = {name: x.astype(np.float16) for name, x in vit_arrays().items()}
    found = read(write(tmp_path / "w.npz", arrays), "vit_nano/4").arrays
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("old", "new"), [(2, 4), (14, 24), (7, 3), (1, 3)])
def test_positions_are_resized_corner_on_corner(old, new):
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(old, old, 3)).astype(np.float32)
    embedding = np.concatenate([np.full((1, 1, 3), 9.0, np.float32), grid.reshape(1, -1, 3)], 1)
    resized = weights.resize_positions(embedding, 1 + new * new)
    at = np.linspace(0, old - 1, new)
    rows = np.stack(
        [[np.interp(at, range(old), grid[i, :, c]) for c in range(3)] for i in range(old)]
    )
    expected = [[np.interp(at, range(old), rows[:, c, j]) for c in range(3)] for j in range(new)]
    assert resized.dtype == np.float32 and (resized[0, 0] == 9.0).all()
    expected = np.transpose(expected, (2, 0, 1)).reshape(-1, 3)
    np.testing.assert_allclose(resized[0, 1:], expected, rtol=1e-5, atol=1e-6)


def test_positions_of_the_same_grid_stay_bit_for_bit(tmp_path):
    arrays = vit_arrays()
    found = read(write(tmp_path / "w.npz", arrays), "vit_nano/4").arrays
    stored = arrays["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(found["pos_embed"], stored)
    larger = read(tmp_path / "w.npz", "vit_nano/4", side=16).arrays
    assert larger["pos_embed"].shape == (1, 17, WIDTH)


# Training.


@pytest.fixture
def config(tmp_path, data_dir):
    file = write(tmp_path / "w.npz", vit_arrays(classes=10))

    def make(**changes):
        settings = dict(model="vit_nano/4", epochs=2, batch_size=160, run_dir=tmp_path / "run")
        settings |= {"data_dir": data_dir, "weights": file, "method": "none"}
        return train.Config(**(settings | changes))

    return make


in_training = pytest.mark.usefixtures("standard_promotion", "compilation_cache")


class BeginError(Exception):
    """Ends a run where training would begin."""


@pytest.fixture
def begun(monkeypatch):
    """Runs begin and end at once, and leave their states here."""
    states = []

    def restore(run, state, epochs):
        states.append(state)
        raise BeginError

    monkeypatch.setattr(run_folder.Run, "restore", restore)
    return states


@in_training
def test_training_begins_with_the_weights(config, begun):
    with pytest.raises(BeginError):
        train.train(config(image_size=16, mesh="data=4,fsdp=2"), brief=True)
    ((params, _, opt_state, _),) = begun
    arrays = vit_arrays()
    kernel = params["blocks"][1]["mlp"]["fc1"]["kernel"]
    stored = arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"]
    np.testing.assert_array_equal(kernel, stored)
    assert not kernel.get_value().sharding.is_fully_replicated
    np.testing.assert_array_equal(params["head"]["kernel"], arrays["head/kernel"])
    assert params["pos_embed"].shape == (1, 17, WIDTH)
    assert not any(np.any(x) for x in jax.tree.leaves(opt_state))


@in_training
def test_training_begins_with_the_weights_and_statistics_of_a_resnet(config, tmp_path, begun):
    arrays = resnet_arrays("basic_nano", classes=1000)
    file = write(tmp_path / "w.safetensors", arrays)
    settings = dict(model="basic_nano", dataset="cifar10", image_size=SIDE, batch_size=8)
    with tfds.testing.mock_data(num_examples=8), pytest.raises(BeginError):
        train.train(config(weights=file, **settings), brief=True)
    ((params, rest, _, _),) = begun
    block, stem = params["blocks"][1], rest["stem"]["norm"]
    kernel = block["shortcut"]["conv"]["kernel"]
    stored = arrays["layer2.0.downsample.0.weight"]
    np.testing.assert_array_equal(kernel, np.transpose(stored, (2, 3, 1, 0)))
    np.testing.assert_array_equal(block["conv2"]["norm"]["scale"], arrays["layer2.0.bn2.weight"])
    np.testing.assert_array_equal(stem["mean"], arrays["bn1.running_mean"])
    np.testing.assert_array_equal(stem["var"], arrays["bn1.running_var"])
    assert params["head"]["kernel"].shape == (8, 10) and np.any(params["head"]["kernel"])


@in_training
@pytest.mark.slow
def test_a_run_with_weights_goes_on_bit_for_bit(config, tmp_path, data_dir, monkeypatch, capsys):
    train.train(config(run_dir=tmp_path / "whole"))
    assert f"arrays loaded from {tmp_path / 'w.npz'}" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        steps = itertools.count()
        patch.setattr(processes.StopRequest, "is_now", lambda request: next(steps) == 3)
        with pytest.raises(processes.StoppedError):
            train.train(config())
    moved = (tmp_path / "w.npz").rename(tmp_path / "renamed.npz")
    capsys.readouterr()
    train.train(config(resume=True, weights=moved))
    assert "arrays loaded" not in capsys.readouterr().out
    assert_same_runs(tmp_path / "run", tmp_path / "whole", data_dir, weights=moved)


@pytest.mark.bad_input
@in_training
def test_a_run_goes_on_with_its_own_weights_alone(config, tmp_path, begun):
    other = write(tmp_path / "other.npz", vit_arrays() | {"cls": np.zeros((1, 1, WIDTH), "f")})
    with pytest.raises(BeginError):
        train.train(config(), brief=True)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert re.fullmatch("sha256:[0-9a-f]{64}", settings["weights"])
    for changes, now in (({"weights": other}, "sha256:"), ({"weights": None}, "None")):
        message = rf"holds a run with --weights sha256:\w+ \(now {now}"
        with pytest.raises(errors.UserError, match=message):
            train.train(config(resume=True, **changes), brief=True)


@pytest.mark.parametrize(
    ("name", "arrays", "mean", "std"),
    [
        (
            "w.safetensors",
            lambda: resnet_arrays("basic_nano"),
            [0.485, 0.456, 0.406],
            [0.229, 0.224, 0.225],
        ),
        ("w.npz", vit_arrays, 0.5, 0.5),
        (None, None, 0.5, 0.5),
    ],
    ids=["ResNet", "ViT", "none"],
)
def test_images_are_standardised_as_the_weights_expect(tmp_path, name, arrays, mean, std):
    file = name and write(tmp_path / name, arrays())

    class Sees(nnx.Module):
        def __call__(self, images):
            return images.reshape(8, 12)

    images = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
    labels = np.arange(8, dtype=np.int32)
    pixels = train.Pixels(255, *weights.pixel_statistics(file))
    _, eval_step = train.make_steps(
        train.Config(weights=file), Sees(), optax.identity(), None, pixels
    )
    state = train.State(nnx.State({}), nnx.State({}), opt_state=None, sums={})
    found = eval_step(state, {"image": images, "label": labels, "weight": np.ones(8, np.float32)})
    seen = ((images / 255 - np.array(mean)) / np.array(std)).reshape(8, 12).astype(np.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(seen, labels)
    np.testing.assert_allclose(found[0], losses.sum(), rtol=1e-5)


# Mistakes.


def without(name):
    return lambda arrays: {k: x for k, x in arrays.items() if k != name}


def with_array(name, array):
    return lambda arrays: arrays | {name: array}


def assert_refused(message, file, *model, **image):
    with pytest.raises(errors.UserError, match=f"^--weights {file}:? {message}") as caught:
        read(file, *model, **image)
    assert "\n" not in str(caught.value)


VIT_FAULTS = {
    "one missing": (
        without("Transformer/encoderblock_1/LayerNorm_2/bias"),
        r"lacks Transformer/encoderblock_1/LayerNorm_2/bias of shape \(16,\); if it is not of",
    ),
    "no head": (without("head/bias"), r"lacks head/bias of shape \(10,\)"),
    "a shallower model": (
        lambda arrays: {k: x for k, x in arrays.items() if "block_1" not in k},
        r"lacks Transformer/encoderblock_1/\S+ of shape \S+ \d+\) and 15 more",
    ),
    "a deeper model": (
        with_array("Transformer/encoderblock_2/LayerNorm_0/bias", np.zeros(16, "f")),
        r"holds Transformer/encoderblock_2/LayerNorm_0/bias of shape \(16,\), which vit_nano/4",
    ),
    "another patch size": (
        with_array("embedding/kernel", np.zeros((2, 2, 1, 16), "f")),
        r"embedding/kernel has shape \(2, 2, 1, 16\), and vit_nano/4 takes \(4, 4, 1, 16\)",
    ),
    "positions not in a square": (
        with_array("Transformer/posembed_input/pos_embedding", np.zeros((1, 7, 16), "f")),
        r"pos_embedding has shape \(1, 7, 16\), and vit_nano/4 takes \(1, 5, 16\) at this image",
    ),
    "no positions": (
        with_array("Transformer/posembed_input/pos_embedding", np.zeros((1, 0, 16), "f")),
        r"pos_embedding has shape \(1, 0, 16\)",
    ),
    "wider positions": (
        with_array("Transformer/posembed_input/pos_embedding", np.zeros((1, 10, 8), "f")),
        r"pos_embedding has shape \(1, \d+, 8\), and vit_nano/4 takes \(1, 5, 16\)",
    ),
    "a number": (with_array("cls", np.float32(0)), r"cls has shape \(\), and"),
    "integers": (with_array("cls", np.zeros((1, 1, 16), int)), "cls has dtype int64; convert it"),
    "objects": (with_array("cls", np.array({})), "cannot be read: .*allow_pickle=False"),
    "another program's": (
        lambda arrays: {"w": np.zeros(3)},
        "has names of no known layout, such as w; examples/recipes/README.md lists",
    ),
    "nothing": (lambda arrays: {}, "holds no arrays"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", VIT_FAULTS)
def test_arrays_of_a_vit(tmp_path, name):
    change, message = VIT_FAULTS[name]
    file = write(tmp_path / "w.npz", change(vit_arrays()))
    assert_refused(message, file, "vit_nano/4")


RESNET_FAULTS = {
    "one missing": (
        without("layer1.0.bn2.running_var"),
        r"lacks layer1.0.bn2.running_var of shape \(4,\); if it is not of basic_nano at",
    ),
    "no shortcut": (
        without("layer2.0.downsample.0.weight"),
        r"lacks layer2.0.downsample.0.weight of shape \(8, 4, 1, 1\)",
    ),
    "one more": (
        with_array("layer1.0.se.weight", np.zeros(3, "f")),
        r"holds layer1.0.se.weight of shape \(3,\), which basic_nano lacks",
    ),
    "a convolution of Flax": (
        with_array("layer2.0.conv1.weight", np.zeros((3, 3, 4, 8), "f")),
        r"layer2.0.conv1.weight has shape \(3, 3, 4, 8\), and basic_nano takes \(8, 4, 3, 3\)",
    ),
    "a dense layer of Flax": (
        with_array("fc.weight", np.zeros((8, 10), "f")),
        r"fc.weight has shape \(8, 10\), and basic_nano takes \(10, 8\)",
    ),
    "another block": (lambda arrays: resnet_arrays("bottleneck_nano"), "lacks .* more; if it is"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", RESNET_FAULTS)
def test_arrays_of_a_resnet(tmp_path, name):
    change, message = RESNET_FAULTS[name]
    file = write(tmp_path / "w.safetensors", change(resnet_arrays("basic_nano")))
    assert_refused(message, file, "basic_nano", side=SIDE, channels=3)


@pytest.mark.bad_input
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (SIDE, 1)])
def test_images_of_another_kind(tmp_path, side, channels):
    file = write(tmp_path / "w.safetensors", resnet_arrays("basic_nano"))
    message = r"conv1.weight has shape \(4, 3, 7, 7\), and .* choose another --model, --image-size"
    with pytest.raises(errors.UserError, match=message):
        read(file, "basic_nano", side=side, channels=channels)


class Harmful:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def npy(tmp_path):
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


FILES = {
    "text": lambda tmp_path: b"weights",
    "empty": lambda tmp_path: b"",
    "one array": npy,
    "a pickle": lambda tmp_path: pickle.dumps(Harmful(tmp_path / "trace")),
}
MESSAGES = {"a pickle": "is a PyTorch pickle, .* convert it"}


@pytest.mark.bad_input
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("content", [*FILES, "half", "flipped", "missing", "a folder"])
def test_files(tmp_path, suffix, content):
    name = "vit_nano/4" if suffix == ".npz" else "basic_nano"
    arrays = vit_arrays() if suffix == ".npz" else resnet_arrays("basic_nano")
    file = write(tmp_path / f"w{suffix}", arrays)
    whole = file.read_bytes()
    if content in FILES:
        file.write_bytes(FILES[content](tmp_path))
    elif content == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":  # Where zip files and safetensors begin.
        file.write_bytes(bytes(255 - x for x in whole[:64]) + whole[64:])
    else:
        file.unlink()
        if content == "a folder":
            file.mkdir()
    cannot_be_read = "cannot be read: .*; examples/recipes/README.md tells where"
    message = f"^--weights {file} {MESSAGES.get(content, cannot_be_read)}"
    with pytest.raises(errors.UserError, match=message) as caught:
        read(file, name)
    assert "\n" not in str(caught.value) and not (tmp_path / "trace").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "file", "takes"),
    [
        ("vit_nano/4", "w", "a .npz file or a .safetensors file.$"),
        ("basic_nano", "w.npz", "a .safetensors file.$"),
        ("densenet121", "w.npz", "a .safetensors file.$"),
        (
            "basic_nano",
            "a/resnet50.pth",
            "a .safetensors file; this is a PyTorch pickle, .*; convert it where PyTorch is: .*"
            r"torch.load\('a/resnet50.pth', weights_only=True\), 'weights.safetensors'",
        ),
    ],
)
def test_files_of_another_kind(name, file, takes):
    with pytest.raises(errors.UserError, match=f"^--weights {file}: {name} takes {takes}"):
        weights.check(weights.Path(file), name)


def test_a_harmful_pickle_is_one(tmp_path):
    with contextlib.closing(pickle.loads(pickle.dumps(Harmful(tmp_path / "trace")))):
        assert (tmp_path / "trace").exists()
