"""Pretrained weights: what each public project calls the arrays of a model.

A writer here names and reshapes a model's own arrays by the rules of a project, in NumPy; reading
the file must give these arrays back.
"""

import functools
import io
import pickle
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from public_weights import write

import errors
import models
import weights

VIT, WIDTH, DEPTH, HEADS = "vit_mini/4", 48, 3, 4
VIT_SIDE, SIDE = 8, 72  # The second is large enough for the stem of ImageNet.


@functools.cache
def build(name, side=None):
    """The model; shapes are enough."""
    side = side or (VIT_SIDE if name.startswith("vit") else SIDE)
    return nnx.eval_shape(
        lambda: models.create(name, num_classes=10, image_shape=(side, side, 3), rngs=nnx.Rngs(0))
    )


def flat_arrays(model):
    """Random arrays of the model by path."""
    rng = np.random.default_rng(0)
    state = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return {
        "/".join(map(str, path)): rng.random(leaf.shape, np.float32) for path, leaf in state.items()
    }


def flattened(nested, prefix=""):
    if not isinstance(nested, dict):
        return {prefix.removesuffix("/"): nested}
    parts = [flattened(value, f"{prefix}{name}/") for name, value in nested.items()]
    return {name: array for part in parts for name, array in part.items()}


def read(file, name, **kwargs):
    weights.check(file, name)
    return flattened(weights.read(file, name, build(name, **kwargs)).arrays)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name], err_msg=name, strict=True)


# Writers.


def big_vision(arrays):
    """The parameters of a model with `pool_type="tok"`."""
    named = {
        "embedding/kernel": arrays["patch_embed/kernel"],
        "embedding/bias": arrays["patch_embed/bias"],
        "cls": arrays["cls_token"],
        "pos_embedding": arrays["pos_embed"][:, 1:],
        "Transformer/encoder_norm/scale": arrays["norm/scale"],
        "Transformer/encoder_norm/bias": arrays["norm/bias"],
        "head/kernel": arrays["head/kernel"],
        "head/bias": arrays["head/bias"],
    }
    layers = {
        "norm1": "LayerNorm_0",
        "norm2": "LayerNorm_1",
        "mlp/fc1": "MlpBlock_0/Dense_0",
        "mlp/fc2": "MlpBlock_0/Dense_1",
    }
    for layer in ("query", "key", "value", "out"):
        layers[f"attention/{layer}"] = f"MultiHeadDotProductAttention_0/{layer}"
    for i in range(DEPTH):
        for ours, theirs in layers.items():
            for kind in ("kernel", "scale", "bias"):
                if f"blocks/{i}/{ours}/{kind}" in arrays:
                    array = arrays[f"blocks/{i}/{ours}/{kind}"]
                    named[f"Transformer/encoderblock_{i}/{theirs}/{kind}"] = array
    return named


def stacked(named):
    """Blocks as `scan=True` has them."""
    first = "Transformer/encoderblock_0/"
    parts = [name.removeprefix(first) for name in named if name.startswith(first)]
    rest = {name: array for name, array in named.items() if "encoderblock_" not in name}
    return rest | {
        f"Transformer/encoderblock/{part}": np.stack(
            [named[f"Transformer/encoderblock_{i}/{part}"] for i in range(DEPTH)]
        )
        for part in parts
    }


def prefixed(prefix, named):
    return {prefix + name: array for name, array in named.items()}


def with_optimizer(named):
    state = prefixed("opt/0/mu/", named) | {"opt/0/count": np.array(7)}
    return prefixed("params/", named) | state | {"chrono/train_time": np.array(1.0)}


def timm_vit(arrays):
    named = {
        "cls_token": arrays["cls_token"],
        "pos_embed": arrays["pos_embed"],
        "patch_embed.proj.weight": arrays["patch_embed/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["patch_embed/bias"],
        "norm.weight": arrays["norm/scale"],
        "norm.bias": arrays["norm/bias"],
        "head.weight": arrays["head/kernel"].T,
        "head.bias": arrays["head/bias"],
    }
    for i in range(DEPTH):
        for norm in ("norm1", "norm2"):
            named[f"blocks.{i}.{norm}.weight"] = arrays[f"blocks/{i}/{norm}/scale"]
            named[f"blocks.{i}.{norm}.bias"] = arrays[f"blocks/{i}/{norm}/bias"]
        for fc in ("fc1", "fc2"):
            named[f"blocks.{i}.mlp.{fc}.weight"] = arrays[f"blocks/{i}/mlp/{fc}/kernel"].T
            named[f"blocks.{i}.mlp.{fc}.bias"] = arrays[f"blocks/{i}/mlp/{fc}/bias"]
        layers = [f"blocks/{i}/attention/{layer}" for layer in ("query", "key", "value")]
        kernels = [arrays[f"{layer}/kernel"].reshape(WIDTH, WIDTH).T for layer in layers]
        named[f"blocks.{i}.attn.qkv.weight"] = np.concatenate(kernels)
        biases = [arrays[f"{layer}/bias"].ravel() for layer in layers]
        named[f"blocks.{i}.attn.qkv.bias"] = np.concatenate(biases)
        out = arrays[f"blocks/{i}/attention/out/kernel"]
        named[f"blocks.{i}.attn.proj.weight"] = out.reshape(WIDTH, WIDTH).T
        named[f"blocks.{i}.attn.proj.bias"] = arrays[f"blocks/{i}/attention/out/bias"]
    return contiguous(named)


def contiguous(named):
    return {name: np.ascontiguousarray(array) for name, array in named.items()}


class Torch:
    """Collects the layers of a convolutional network."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.named = {}

    def conv(self, ours, theirs):
        self.named[f"{theirs}.weight"] = self.arrays[f"{ours}/kernel"].transpose(3, 2, 0, 1)

    def norm(self, ours, theirs):
        kinds = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        for kind, name in kinds.items():
            self.named[f"{theirs}.{name}"] = self.arrays[f"{ours}/{kind}"]
        self.named[f"{theirs}.num_batches_tracked"] = np.array(7)

    def conv_norm(self, ours, conv, norm):
        self.conv(f"{ours}/conv", conv)
        self.norm(f"{ours}/norm", norm)

    def dense(self, ours, theirs):
        self.named[f"{theirs}.weight"] = self.arrays[f"{ours}/kernel"].T
        self.named[f"{theirs}.bias"] = self.arrays[f"{ours}/bias"]

    def write(self, file):
        return write(file, contiguous(self.named))


def resnet(arrays):
    torch = Torch(arrays)
    torch.conv_norm("stem", "conv1", "bn1")
    for i in range(3):  # One block in each stage.
        for j in (1, 2):
            block = f"layer{i + 1}.0"
            torch.conv_norm(f"blocks/{i}/conv{j}", f"{block}.conv{j}", f"{block}.bn{j}")
        if i:
            shortcut = f"layer{i + 1}.0.downsample"
            torch.conv_norm(f"blocks/{i}/shortcut", f"{shortcut}.0", f"{shortcut}.1")
    torch.dense("head", "fc")
    return torch


def densenet(arrays, dot=""):
    torch = Torch(arrays)
    torch.conv("stem", "features.conv0")
    torch.norm("stem_norm", "features.norm0")
    block = 0
    for i, depth in enumerate((6, 12, 24, 16), 1):
        for j in range(1, depth + 1):
            layer = f"features.denseblock{i}.denselayer{j}"
            for k in (1, 2):
                torch.norm(f"blocks/{block}/conv{k}/norm", f"{layer}.norm{dot}{k}")
                torch.conv(f"blocks/{block}/conv{k}/conv", f"{layer}.conv{dot}{k}")
            block += 1
        if i < 4:
            torch.norm(f"blocks/{block}/conv/norm", f"features.transition{i}.norm")
            torch.conv(f"blocks/{block}/conv/conv", f"features.transition{i}.conv")
            block += 1
    torch.norm("norm", "features.norm5")
    torch.dense("head", "classifier")
    return torch


def mobilenet(arrays):
    torch = Torch(arrays)
    torch.conv_norm("stem", "features.0.0", "features.0.1")
    for i in range(17):
        ours, theirs = f"blocks/{i}", f"features.{i + 1}.conv"
        layers = iter(range(4))
        for layer in ("depthwise",) if i == 0 else ("expand", "depthwise"):
            number = next(layers)
            torch.conv_norm(f"{ours}/{layer}", f"{theirs}.{number}.0", f"{theirs}.{number}.1")
        torch.conv_norm(f"{ours}/project", f"{theirs}.{next(layers)}", f"{theirs}.{next(layers)}")
    torch.conv_norm("last", "features.18.0", "features.18.1")
    torch.dense("head", "classifier.1")
    return torch


# What is read.


@pytest.fixture
def vit_arrays():
    return flat_arrays(build(VIT))


@pytest.fixture
def patch_positions(vit_arrays):
    """Arrays of a ViT that adds nothing to the class token, as big_vision's."""
    vit_arrays["pos_embed"][:, :1] = 0
    return vit_arrays


BIG_VISION_FILES = {
    "parameters": lambda named: named,
    "parameters and optimizer": with_optimizer,
    "optimizer of Flax": lambda named: (
        prefixed("opt/target/", named) | {"opt/state/step": np.array(7)}
    ),
    "stacked": lambda named: prefixed("params/", stacked(named)),
}


@pytest.mark.parametrize("kind", BIG_VISION_FILES)
def test_a_vit_of_big_vision(tmp_path, patch_positions, kind):
    named = BIG_VISION_FILES[kind](big_vision(patch_positions))
    assert_same(read(write(tmp_path / "w.npz", named), VIT), patch_positions)


@pytest.mark.parametrize(
    "place", ["pos_embedding", "Transformer/pos_embedding"], ids=["new", "before 2022"]
)
def test_positions_of_big_vision_with_a_class_token(tmp_path, vit_arrays, place):
    named = big_vision(vit_arrays)
    del named["pos_embedding"]
    file = write(tmp_path / "w.npz", named | {place: vit_arrays["pos_embed"]})
    assert_same(read(file, VIT), vit_arrays)


def test_positions_without_a_class_token_are_resized(tmp_path, patch_positions):
    file = write(tmp_path / "w.npz", big_vision(patch_positions))
    found = read(file, VIT, side=16)["pos_embed"]
    expected = weights.resize_positions(patch_positions["pos_embed"], 17)
    np.testing.assert_array_equal(found, expected, strict=True)


def test_a_vit_of_timm(tmp_path, vit_arrays):
    assert_same(read(write(tmp_path / "w.safetensors", timm_vit(vit_arrays)), VIT), vit_arrays)


def test_attention_of_timm(tmp_path, vit_arrays):
    named = timm_vit(vit_arrays)
    found = read(write(tmp_path / "w.safetensors", named), VIT)
    x = np.random.default_rng(1).normal(size=(5, WIDTH))
    # As in timm: all features, then query, key and value, then heads, then features of a head.
    qkv = x @ named["blocks.1.attn.qkv.weight"].T + named["blocks.1.attn.qkv.bias"]
    qkv = qkv.reshape(5, 3, HEADS, WIDTH // HEADS)
    for i, layer in enumerate(("query", "key", "value")):
        path = f"blocks/1/attention/{layer}"
        y = np.einsum("nd,dhk->nhk", x, found[f"{path}/kernel"]) + found[f"{path}/bias"]
        np.testing.assert_allclose(y, qkv[:, i], rtol=1e-5, atol=1e-5)
    out = qkv[:, 2].reshape(5, WIDTH) @ named["blocks.1.attn.proj.weight"].T
    y = np.einsum("nhk,hkd->nd", qkv[:, 2], found["blocks/1/attention/out/kernel"])
    np.testing.assert_allclose(y, out, rtol=1e-5, atol=1e-4)


def test_a_vit_of_timm_without_a_position_of_the_class_token(tmp_path, patch_positions):
    named = timm_vit(patch_positions)
    named["pos_embed"] = named["pos_embed"][:, 1:].copy()
    found = read(write(tmp_path / "w.safetensors", named), VIT)
    assert_same(found, patch_positions)


NETWORKS = {
    "ResNet": ("resnet_small", resnet),
    "DenseNet": ("densenet121", densenet),
    "DenseNet, old names": ("densenet121", lambda arrays: densenet(arrays, ".")),
    "MobileNetV2": ("mobilenet_v2", mobilenet),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_torchvision(tmp_path, kind):
    name, writer = NETWORKS[kind]
    arrays = flat_arrays(build(name))
    assert_same(read(writer(arrays).write(tmp_path / "w.safetensors"), name), arrays)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model.module."])
def test_prefixes_of_all_names_are_dropped(tmp_path, vit_arrays, prefix):
    named = prefixed(prefix, timm_vit(vit_arrays))
    assert_same(read(write(tmp_path / "w.safetensors", named), VIT), vit_arrays)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_of_other_types_become_float32(tmp_path, vit_arrays, suffix, dtype):
    arrays = vit_arrays | {
        "pos_embed": np.pad(vit_arrays["pos_embed"][:, 1:], [(0, 0), (1, 0), (0, 0)])
    }
    named = (big_vision if suffix == ".npz" else timm_vit)(arrays)
    file = write(tmp_path / f"w{suffix}", {name: x.astype(dtype) for name, x in named.items()})
    found = read(file, VIT)
    assert_same(found, {name: x.astype(dtype).astype(np.float32) for name, x in arrays.items()})


def test_stacked_blocks_in_bfloat16(tmp_path, patch_positions):
    named = stacked(big_vision(patch_positions))
    named = {name: x.astype(ml_dtypes.bfloat16) for name, x in named.items()}
    file = write(tmp_path / "w.npz", named)
    with np.load(file) as archive:  # The name of the type is lost.
        assert archive["cls"].dtype == np.dtype("V2")
    found = read(file, VIT)["blocks/2/mlp/fc1/kernel"]
    expected = jnp.asarray(patch_positions["blocks/2/mlp/fc1/kernel"], jnp.bfloat16)
    np.testing.assert_array_equal(found, expected.astype(jnp.float32))


def test_a_head_behind_a_layer_that_is_left_out_stays_new(tmp_path, patch_positions):
    named = big_vision(patch_positions)
    named |= {"pre_logits/kernel": np.eye(WIDTH), "pre_logits/bias": np.zeros(WIDTH)}
    file = write(tmp_path / "w.npz", named)
    found = weights.read(file, VIT, build(VIT))
    assert "head" not in found.arrays and "head/kernel, pre_logits/bias" in found.summary


def test_a_merged_array_counts_once(tmp_path, vit_arrays):
    named = timm_vit(vit_arrays)
    file = write(tmp_path / "w.safetensors", named)
    found = weights.read(file, VIT, build(VIT))
    assert found.summary == f"{len(named)} arrays loaded from {file}"


@pytest.mark.parametrize(
    ("model", "writer", "suffix", "statistics"),
    [
        (VIT, big_vision, ".npz", weights.GENERIC),
        (VIT, timm_vit, ".safetensors", weights.GENERIC),
        ("mobilenet_v2", lambda arrays: mobilenet(arrays).named, ".safetensors", weights.IMAGENET),
    ],
    ids=["big_vision", "timm", "MobileNetV2"],
)
def test_pixel_statistics_are_those_of_the_layout(tmp_path, model, writer, suffix, statistics):
    file = write(tmp_path / f"w{suffix}", contiguous(writer(flat_arrays(build(model)))))
    assert weights.pixel_statistics(file) is statistics


# Mistakes.


def assert_refused(message, file, name=VIT, **kwargs):
    with pytest.raises(errors.UserError, match=f"^--weights {file}:? {message}") as caught:
        read(file, name, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("pool", ["gap", "map"])
def test_a_vit_without_a_class_token(tmp_path, vit_arrays, pool):
    named = big_vision(vit_arrays)
    del named["cls"]
    if pool == "map":
        named["MAPHead_0/probe"] = np.zeros((1, 1, WIDTH), "f")
    file = write(tmp_path / "w.npz", prefixed("params/", named))
    assert_refused(f"holds a ViT without a class token, but {VIT} has one", file)


TIMM_FAULTS = {
    "no qkv": (
        lambda named: {k: x for k, x in named.items() if k != "blocks.1.attn.qkv.weight"},
        r"lacks blocks.1.attn.qkv.weight of shape \(144, 48\); if it is not of vit_mini/4",
    ),
    "no bias": (
        lambda named: {k: x for k, x in named.items() if not k.endswith("qkv.bias")},
        r"lacks blocks.\d.attn.qkv.bias of shape \(144,\) and 2 more",
    ),
    "another width": (
        lambda named: named | {"blocks.1.attn.qkv.weight": np.zeros((48, 144), "f")},
        r"blocks.1.attn.qkv.weight has shape \(48, 144\), and vit_mini/4 takes \(144, 48\)",
    ),
    "layer scale": (
        lambda named: named | {"blocks.0.ls1.gamma": np.zeros(48, "f")},
        r"holds blocks.0.ls1.gamma of shape \(48,\), which vit_mini/4 lacks",
    ),
    "distilled": (
        lambda named: named | {"pos_embed": np.zeros((1, 6, 48), "f")},
        r"pos_embed has shape \(1, 6, 48\), and vit_mini/4 takes \(1, 5, 48\)",
    ),
    "a prefix of some": (
        lambda named: prefixed("module.", named) | {"head.bias": named["head.bias"]},
        "has names of no known layout, such as head.bias",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("fault", TIMM_FAULTS)
def test_arrays_of_timm(tmp_path, vit_arrays, fault):
    change, message = TIMM_FAULTS[fault]
    assert_refused(message, write(tmp_path / "w.safetensors", change(timm_vit(vit_arrays))))


@pytest.mark.bad_input
def test_a_stack_that_is_none(tmp_path, patch_positions):
    named = stacked(big_vision(patch_positions))
    named["Transformer/encoderblock/LayerNorm_0/bias"] = np.float32(0)
    assert_refused("cannot be read: ", write(tmp_path / "w.npz", named))


@pytest.mark.bad_input
def test_a_densenet_of_another_image_size(tmp_path):
    name = "densenet121"
    file = densenet(flat_arrays(build(name))).write(tmp_path / "w.safetensors")
    message = (
        "holds features.norm0.bias .* at this image size, choose another --model, --image-size"
    )
    assert_refused(message, file, name, side=32)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["resnet_small", "densenet121"])
def test_weights_of_another_family(tmp_path, vit_arrays, name):
    file = write(tmp_path / "w.safetensors", timm_vit(vit_arrays))
    message = f"holds a ViT in timm's layout, but {name} is not one; choose another --model"
    assert_refused(message, file, name)


@pytest.mark.bad_input
def test_a_network_of_your_own():
    file = weights.Path("w.npz")
    with pytest.raises(errors.UserError, match="^--weights w.npz: .* for --model mine:network"):
        weights.check(file, "mine:network")


def pickled():
    return pickle.dumps({"conv1.weight": 0.0}, protocol=2)


def zipped():
    """What `torch.save` writes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled())
        archive.writestr("archive/data/0", b"\0" * 8)
    return file.getvalue()


PICKLE = r"is a PyTorch pickle, .*; convert it where PyTorch is: .*torch.load\('.*w\..*'"
CONTENTS = {
    "a web page": (
        lambda: b"\n<!DOCTYPE html><html><body>Not found</body></html>",
        "is a web page, not weights; download",
    ),
    "a Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a Git LFS pointer, .*`git lfs pull`",
    ),
    "a pickle": (pickled, PICKLE),
    "a zipped pickle": (zipped, PICKLE),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("content", CONTENTS)
def test_files_that_are_something_else(tmp_path, suffix, content):
    make, message = CONTENTS[content]
    file = tmp_path / f"w{suffix}"
    file.write_bytes(make())
    assert_refused(message, file)


@pytest.fixture
def page_like(tmp_path, vit_arrays):
    """A .safetensors file that begins with the first character of a web page."""
    whole = write(tmp_path / "w.safetensors", timm_vit(vit_arrays)).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    padded = length + (ord("<") - length) % 256
    header = whole[8 : 8 + length].ljust(padded)
    file = tmp_path / "page.safetensors"
    file.write_bytes(padded.to_bytes(8, "little") + header + whole[8 + length :])
    assert file.read_bytes().startswith(b"<")
    return file


def test_weights_that_begin_like_a_web_page(page_like, vit_arrays):
    assert_same(read(page_like, VIT), vit_arrays)


@pytest.mark.bad_input
def test_damaged_weights_that_begin_like_a_web_page(page_like):
    page_like.write_bytes(page_like.read_bytes()[:-1])
    assert_refused("cannot be read: ", page_like)


@pytest.mark.bad_input
def test_a_text_among_the_arrays(tmp_path, patch_positions):
    file = write(tmp_path / "w.npz", big_vision(patch_positions))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("README", b"text")
    assert_refused(r"holds README of shape \(\), which vit_mini/4 lacks", file)
