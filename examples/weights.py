"""Pretrained weights in public layouts, for the models here.

    ViT          .npz files of google-research/vision_transformer and google-research/big_vision,
                 and timm's names in a .safetensors file
    ResNet       torchvision's names, which are timm's too, in a .safetensors file
    DenseNet     the same
    MobileNetV2  torchvision's names in a .safetensors file

The names in a file determine its layout. These files hold arrays only, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from flax import nnx
from scipy import ndimage

import models
from errors import UserError, first_line, markup

# Mean and standard deviation of pixels: GENERIC scales images to between -1 and 1, IMAGENET holds
# those of ImageNet's red, green and blue.
GENERIC = 0.5, 0.5
IMAGENET = tuple(
    np.array(x, np.float32).reshape(1, 1, 1, 3)
    for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)


class Layout(NamedTuple):
    """How a project names and stores the arrays of a family of models."""

    project: str
    family: str  # As `_family` has it.
    suffix: str
    sign: str  # Pattern of names that only its files have.
    first: str  # The kernel that sees the images.
    names: tuple[tuple[str, str], ...]  # Patterns in our paths, and their names there, in turn.
    unused: str  # Pattern of what a file may hold and no model here has.
    statistics: tuple[Any, Any]  # Of pixels, in pretraining.
    transposed: dict[int, tuple[int, ...]] = {}  # By rank: our axes, as axes of a stored array.
    merges_heads: bool = False  # Heads have no axis; query, key and value are one array.

    def axes(self, rank: int) -> tuple[int, ...]:
        return self.transposed.get(rank, tuple(range(rank)))


VISION_TRANSFORMER = Layout(
    "vision_transformer",
    "ViT",
    ".npz",
    sign=r"Transformer/encoderblock(_\d+)?/MlpBlock_3/",
    first="embedding/kernel",
    names=(
        (r"^cls_token$", "cls"),
        (r"^pos_embed$", "pos_embedding"),
        (r"^patch_embed/", "embedding/"),
        (r"^norm/", "Transformer/encoder_norm/"),
        (r"^blocks/", "Transformer/encoderblock_"),
        (r"/norm1/", "/LayerNorm_0/"),
        (r"/attention/", "/MultiHeadDotProductAttention_1/"),
        (r"/norm2/", "/LayerNorm_2/"),
        (r"/mlp/fc1/", "/MlpBlock_3/Dense_0/"),
        (r"/mlp/fc2/", "/MlpBlock_3/Dense_1/"),
    ),
    unused=r"pre_logits/(kernel|bias)",  # A layer of pre-training that fine-tuning leaves out.
    statistics=GENERIC,
)
BIG_VISION = VISION_TRANSFORMER._replace(
    project="big_vision",
    sign=r"Transformer/encoderblock(_\d+)?/MlpBlock_0/",
    names=(  # Each kind of layer is numbered separately.
        *VISION_TRANSFORMER.names,
        (r"/MultiHeadDotProductAttention_1/", "/MultiHeadDotProductAttention_0/"),
        (r"/LayerNorm_2/", "/LayerNorm_1/"),
        (r"/MlpBlock_3/", "/MlpBlock_0/"),
    ),
)
TORCH_NAMES = (
    (r"/(kernel|scale)$", "/weight"),
    (r"/(mean|var)$", r"/running_\1"),
    (r"/", "."),
)
TORCH_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # Dense kernels are (out, in) there, others OIHW.
TIMM_VIT = Layout(
    "timm",
    "ViT",
    ".safetensors",
    sign=r"blocks\.\d+\.attn\.qkv\.",
    first="patch_embed.proj.weight",
    names=(
        (r"^patch_embed/", "patch_embed/proj/"),
        (r"/attention/out/", "/attn/proj/"),
        (r"/attention/\w+/", "/attn/qkv/"),
        *TORCH_NAMES,
    ),
    unused=r"pre_logits\.fc\.(weight|bias)",  # As above.
    statistics=GENERIC,
    transposed=TORCH_AXES,
    merges_heads=True,
)
TORCHVISION_RESNET = Layout(
    "torchvision",
    "ResNet",
    ".safetensors",
    sign=r"layer1\.0\.conv1\.",
    first="conv1.weight",
    names=(
        (r"^stem/conv/", "conv1/"),
        (r"^stem/norm/", "bn1/"),
        (r"/conv(\d)/conv/", r"/conv\1/"),
        (r"/conv(\d)/norm/", r"/bn\1/"),
        (r"/shortcut/conv/", "/downsample/0/"),
        (r"/shortcut/norm/", "/downsample/1/"),
        (r"^head/", "fc/"),
        *TORCH_NAMES,
    ),
    unused=r".*\.num_batches_tracked",
    statistics=IMAGENET,
    transposed=TORCH_AXES,
)
TORCHVISION_DENSENET = TORCHVISION_RESNET._replace(
    family="densenet121",
    sign=r"features\.denseblock1\.",
    first="features.conv0.weight",
    names=(
        (r"^stem/", "features/conv0/"),
        (r"^stem_norm/", "features/norm0/"),
        (r"^norm/", "features/norm5/"),
        (r"/conv(\d?)/(conv|norm)/", r"/\2\1/"),
        (r"^head/", "classifier/"),
        *TORCH_NAMES,
    ),
)
TORCHVISION_MOBILENET = TORCHVISION_RESNET._replace(
    family="mobilenet_v2",
    sign=r"features\.1\.conv\.0\.0\.",
    first="features.0.0.weight",
    names=(
        (r"^stem/", "features/0/"),
        (r"^last/", "features/18/"),
        # The first block does not expand.
        (r"^features/1/conv/depthwise/", "features/1/conv/0/"),
        (r"^features/1/conv/project/conv/", "features/1/conv/1/"),
        (r"^features/1/conv/project/norm/", "features/1/conv/2/"),
        (r"/expand/", "/0/"),
        (r"/depthwise/", "/1/"),
        (r"/project/conv/", "/2/"),
        (r"/project/norm/", "/3/"),
        (r"/conv/(\w+)$", r"/0/\1"),
        (r"/norm/(\w+)$", r"/1/\1"),
        (r"^head/", "classifier/1/"),
        *TORCH_NAMES,
    ),
)
LAYOUTS = (
    VISION_TRANSFORMER,
    BIG_VISION,
    TIMM_VIT,
    TORCHVISION_RESNET,
    TORCHVISION_DENSENET,
    TORCHVISION_MOBILENET,
)
# Where big_vision keeps the parameters if the optimizer state is in the same file.
PARAMETERS = r"^(params|opt/target)/"
# What DataParallel, torch.compile and classes with an attribute `model` put before all names.
WRAPPER = r"^(module|_orig_mod|model)\."
# Names that older versions of big_vision and torchvision gave to the same arrays.
RENAMED = (
    (r"^Transformer/(posembed_input/)?(?=pos_embedding$)", ""),
    (r"(denselayer\d+\.(conv|norm))\.(?=\d)", r"\1"),
)
STACK = "Transformer/encoderblock/"  # big_vision's blocks, stacked along the first axis.
POSITIONS = "pos_embedding", "pos_embed"

PICKLES = ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar"
PICKLE = "is a PyTorch pickle, which can run code and is therefore not read"
# What a file that is not weights may be, by its first bytes.
NOT_WEIGHTS = (
    (
        rb"version https://git-lfs",
        "is a Git LFS pointer, a text that stands for the weights; run `git lfs pull` where it "
        "comes from, or download the file itself.",
    ),
    (rb"\x80[\x02-\x05][^\0]|PK\x03\x04.{26}[^\0]*data\.pkl", PICKLE),
)


class Pretrained(NamedTuple):
    """What a file gives to a model."""

    arrays: dict[Any, Any]  # Nested like the model: all of it, or all but the head.
    digest: str | None  # Of the file, for the settings of a run.
    summary: str  # What was loaded and what was not, in a line.


class Stored(NamedTuple):
    """What a file calls an array of the model, and its shape there."""

    name: str
    shape: tuple[int, ...]
    third: int | None = None  # The part to take of query, key and value in one array.

    def __str__(self) -> str:
        return f"{self.name} of shape {self.shape}"


def pixel_statistics(file: Path | None) -> tuple[Any, Any]:
    """Mean and standard deviation of pixels, between 0 and 1, by which to standardise images."""
    if not file:
        return GENERIC
    statistics = _layout(file, _names(file)).statistics
    if input_channels(file) == 3:
        return statistics
    return tuple(float(np.mean(x)) for x in statistics)  # The layout's are those of colors.


def input_channels(file: Path | None) -> int | None:
    """Channels of the images that weights are for; None without weights, or if they lack it."""
    if file is None:
        return None
    layout = _layout(file, _names(file))
    with _opened(file) as (names, load):
        stored = _renamed(names).get(layout.first)
        shape = np.shape(load(stored)) if stored else ()
    return shape[layout.axes(4)[2]] if len(shape) == 4 else None


def check(file: Path | None, name: str) -> None:
    """Raises an error for a file of the wrong kind, or that is not there, before anything else."""
    if file is None:
        return
    family = _family(name)
    suffixes = dict.fromkeys(x.suffix for x in LAYOUTS if x.family == family)
    if not suffixes:
        raise UserError(f"--weights {file}: no public weights are known for --model {name}.")
    if file.suffix not in suffixes:
        takes = " or ".join(f"a {suffix} file" for suffix in suffixes)
        pickled = f"; this {PICKLE}; {_conversion(file)}" if file.suffix in PICKLES else "."
        raise UserError(f"--weights {file}: {name} takes {takes}{pickled}")
    if not file.exists():
        raise UserError(
            f"--weights {file}: there is no such file; examples/recipes/README.md tells where to "
            "get it."
        )
    layout = _layout(file, _names(file))
    if layout.family != family:
        raise UserError(
            f"--weights {file} holds a {layout.family} in {layout.project}'s layout, but {name} is "
            "not one; choose another --model or other weights."
        )


def read(file: Path | None, name: str, model: nnx.Module) -> Pretrained:
    """Reads the weights of a model; None reads nothing.

    The position embedding is resized to the image. A head for another number of classes, or for
    the output of a layer that the model does not have, is left out: the model keeps its own.
    Everything else must be there, and have a place.

    Args:
      file: `--weights`, checked.
      name: of the model, as in `models.create`.
      model: the model; shapes are enough.

    Raises:
      UserError: if the file cannot be read, or is not of this model.
    """
    if file is None:
        return Pretrained({}, None, "")
    arrays, digest = _read(file)
    layout, blocks = _layout(file, arrays), _blocks(name)
    state = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    wanted = {path: _stored(path, leaf.shape, layout, blocks) for path, leaf in state.items()}

    unused = {x for x in arrays if re.fullmatch(layout.unused, x)}
    bias = wanted["head", "bias"]
    misses_layer = any("pre_logits" in x for x in unused)
    if bias.name in arrays and (misses_layer or arrays[bias.name].shape != bias.shape):
        head = {path for path in wanted if path[0] == "head"}
        unused |= {wanted.pop(path).name for path in head} & arrays.keys()

    needed = {stored.name: stored for stored in wanted.values()}
    class_token = wanted.get(("cls_token",))
    if class_token and class_token.name not in arrays:
        raise UserError(
            f"--weights {file} holds a ViT without a class token, but {name} has one; choose other "
            "weights."
        )
    mend = (
        f"if it is not of {name} at this image size, choose another --model, --image-size or "
        "weights."
    )
    if missing := [stored for stored in needed.values() if stored.name not in arrays]:
        raise UserError(f"--weights {file} lacks {_first(missing)}; {mend}")
    if left := arrays.keys() - needed.keys() - unused:
        left = [Stored(x, arrays[x].shape) for x in sorted(left)]
        raise UserError(f"--weights {file} holds {_first(left)}, which {name} lacks; {mend}")
    nested: dict[Any, Any] = {}
    for path, stored in wanted.items():
        *parents, last = path
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        array = _fit(file, stored, arrays[stored.name], name)
        place[last] = array.transpose(layout.axes(array.ndim)).reshape(state[path].shape)
    summary = f"{len(needed)} arrays loaded from {file}"
    if unused:  # One of the counts of batches says enough, a ResNet has one in each layer.
        named = {re.sub(r"^.*(?=\.num_batches_tracked$)", "*", x) for x in unused}
        summary += f"; not used: {', '.join(sorted(named))}"
    return Pretrained(nested, digest, summary)


def _family(name: str) -> str:
    """The family of a model, as in `Layout`."""
    family = name.partition("/")[0]
    if family in models.VITS:
        return "ViT"
    return "ResNet" if family in models.RESNETS else family


def _blocks(name: str) -> list[str]:
    """What torchvision calls the blocks of a model, in our order."""
    if name in models.RESNETS:
        depths = models.RESNETS[name].depths
        return [f"layer{i}/{j}" for i, depth in enumerate(depths, 1) for j in range(depth)]
    if name == "mobilenet_v2":
        return [f"features/{i}/conv" for i in range(1, 18)]
    blocks = []
    if name == "densenet121":
        for i, depth in enumerate((6, 12, 24, 16), 1):
            blocks += [f"features/denseblock{i}/denselayer{j}" for j in range(1, depth + 1)]
            blocks.append(f"features/transition{i}")
    return blocks


def _layout(file: Path, names: Iterable[str]) -> Layout:
    """The layout of a file that has these names."""
    for layout in LAYOUTS:
        if layout.suffix == file.suffix and any(re.match(layout.sign, x) for x in names):
            return layout
    what = f"has names of no known layout, such as {min(names)}" if names else "holds no arrays"
    what = _mistaken(file) or f"{what}; examples/recipes/README.md lists the layouts."
    raise UserError(f"--weights {file} {what}")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[list[str], Callable[[str], np.ndarray]]]:
    """The names in a file, and a function that reads the array of a name."""
    try:
        if file.suffix == ".npz":
            if not zipfile.is_zipfile(file):
                raise ValueError("it is not an archive of NumPy")
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
                yield archive.files, archive.__getitem__
        else:
            with safetensors.safe_open(file, "numpy") as opened:
                yield list(opened.keys()), opened.get_tensor
    except MemoryError:
        raise
    except Exception as error:  # The readers raise what they like.
        what = _mistaken(file) or (
            f"cannot be read: {first_line(error)}; examples/recipes/README.md tells where such "
            "files come from."
        )
        raise UserError(f"--weights {file} {what}") from error


def _mistaken(file: Path) -> str | None:
    """What a file is if it is not weights, and what to do about it."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        start = opened.read(300)
        if found := markup(start):
            return f"is {found}, not weights; download the file itself."
        for pattern, what in NOT_WEIGHTS:
            if re.match(pattern, start, re.DOTALL):
                return f"{what}; {_conversion(file)}" if what == PICKLE else what
    return None


def _conversion(file: Path) -> str:
    return (
        "convert it where PyTorch is: `import torch, safetensors.torch; safetensors.torch."
        f"save_file(torch.load({str(file)!r}, weights_only=True), 'weights.safetensors')`."
    )


def _renamed(names: Iterable[str]) -> dict[str, str]:
    """The names in a file by their plain names; an optimizer state is left out."""
    parameters = {re.sub(PARAMETERS, "", x): x for x in names if re.match(PARAMETERS, x)}
    plain = parameters or {x: x for x in names}
    while plain and all(re.match(WRAPPER, x) for x in plain):
        plain = {re.sub(WRAPPER, "", x): name for x, name in plain.items()}
    for pattern, replacement in RENAMED:
        plain = {re.sub(pattern, replacement, x): name for x, name in plain.items()}
    return plain


def _names(file: Path) -> list[str]:
    """The plain names in a file; stacked blocks stay stacked."""
    with _opened(file) as (names, _):
        return list(_renamed(names))


def _read(file: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays in a file by their plain names, and its digest."""
    with _opened(file) as (names, load):
        with file.open("rb") as opened:
            digest = "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
        arrays = {name: np.asarray(load(stored)) for name, stored in _renamed(names).items()}
        for name in [x for x in arrays if x.startswith(STACK)]:
            for i, array in enumerate(arrays.pop(name)):
                arrays[f"Transformer/encoderblock_{i}/{name.removeprefix(STACK)}"] = array
        return arrays, digest


def _stored(
    path: tuple[Any, ...], shape: tuple[int, ...], layout: Layout, blocks: list[str]
) -> Stored:
    name = "/".join(map(str, path))
    if blocks:
        name = re.sub(r"^blocks/(\d+)", lambda found: blocks[int(found[1])], name)
    for pattern, replacement in layout.names:
        name = re.sub(pattern, replacement, name)
    third = None
    if layout.merges_heads and "attention" in path:
        shape, third = _without_heads(shape, *path[-2:])
    sizes = [size for _, size in sorted(zip(layout.axes(len(shape)), shape, strict=True))]
    if third is not None:
        sizes[0] *= 3
    return Stored(name, tuple(sizes), third)


def _without_heads(
    shape: tuple[int, ...], layer: str, kind: str
) -> tuple[tuple[int, ...], int | None]:
    """An attention parameter's shape without an axis of heads, and its third of query-key-value."""
    if layer == "out":
        return shape if kind == "bias" else (shape[0] * shape[1], shape[2]), None
    third = ("query", "key", "value").index(layer)
    return (*shape[:-2], shape[-2] * shape[-1]), third


def _fit(file: Path, stored: Stored, array: np.ndarray, name: str) -> np.ndarray:
    """A stored array in float32, checked, and resized if it holds positions."""
    if array.dtype == np.dtype("V2"):  # A .npz file does not keep the name of this type.
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        raise UserError(
            f"--weights {file}: {stored.name} has dtype {array.dtype}; convert it to float32."
        )
    array = array.astype(np.float32)
    if stored.name in POSITIONS and array.ndim == 3 and len(array) == 1:
        array = _fit_positions(array, stored.shape[1])
    if array.shape != stored.shape:
        raise UserError(
            f"--weights {file}: {stored.name} has shape {array.shape}, and {name} takes "
            f"{stored.shape} at this image size; choose another --model, --image-size or weights."
        )
    return array if stored.third is None else np.split(array, 3)[stored.third]


def _is_square(size: int) -> bool:
    return size > 0 and math.isqrt(size) ** 2 == size


def _fit_positions(embedding: np.ndarray, tokens: int) -> np.ndarray:
    """Resizes the position embedding if old and new patches form squares."""
    if _is_square(embedding.shape[1]):  # The class token has no position, so zeros are right.
        embedding = np.pad(embedding, ((0, 0), (1, 0), (0, 0)))
    if _is_square(embedding.shape[1] - 1) and _is_square(tokens - 1):
        return resize_positions(embedding, tokens)
    return embedding


def resize_positions(embedding: np.ndarray, tokens: int) -> np.ndarray:
    """Resizes the square grid of position embeddings, as vision_transformer does.

    Linear interpolation, corners on corners; the class token, the first, stays.

    Args:
      embedding: (1, 1 + side * side, width).
      tokens: 1 + side * side of the result.
    """
    if embedding.shape[1] == tokens:
        return embedding
    old, new = (math.isqrt(size - 1) for size in (embedding.shape[1], tokens))
    grid = ndimage.zoom(embedding[0, 1:].reshape(old, old, -1), (new / old, new / old, 1), order=1)
    return np.concatenate([embedding[:, :1], grid.reshape(1, new * new, -1)], axis=1)


def _first(arrays: list[Stored]) -> str:
    return f"{arrays[0]}" + (f" and {len(arrays) - 1} more" if len(arrays) > 1 else "")
