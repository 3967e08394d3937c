"""Pretrained weights in the layouts of two public projects, for the models here.

    ViT     .npz files of google-research/vision_transformer
    ResNet  torchvision's names and shapes, in a .safetensors file

Both hold arrays and nothing else: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax import nnx
from scipy import ndimage

import models
from errors import UserError, first_line


class Layout(NamedTuple):
    """How a project names and stores the arrays of a model."""

    project: str
    suffix: str
    names: tuple[tuple[str, str], ...]  # Patterns in our paths, and their names there, in turn.
    unused: str  # Pattern of what a file may hold and no model here has.
    transposed: dict[int, tuple[int, ...]] = {}  # By rank: our axes, as axes of a stored array.

    def axes(self, rank: int) -> tuple[int, ...]:
        return self.transposed.get(rank, tuple(range(rank)))


POSITIONS = "Transformer/posembed_input/pos_embedding"
VISION_TRANSFORMER = Layout(
    "vision_transformer",
    ".npz",
    (
        (r"^cls_token$", "cls"),
        (r"^pos_embed$", POSITIONS),
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
)
TORCHVISION = Layout(
    "torchvision",
    ".safetensors",
    (
        (r"^stem/conv/", "conv1/"),
        (r"^stem/norm/", "bn1/"),
        (r"/conv(\d)/conv/", r"/conv\1/"),
        (r"/conv(\d)/norm/", r"/bn\1/"),
        (r"/shortcut/conv/", "/downsample/0/"),
        (r"/shortcut/norm/", "/downsample/1/"),
        (r"^head/", "fc/"),
        (r"/(kernel|scale)$", "/weight"),
        (r"/(mean|var)$", r"/running_\1"),
        (r"/", "."),
    ),
    unused=r".*\.num_batches_tracked",
    transposed={2: (1, 0), 4: (2, 3, 1, 0)},  # Dense kernels are (out, in) there, others OIHW.
)
# Mean and standard deviation: input from -1 to 1, for which vision_transformer's weights are too,
# and those of red, green and blue for which torchvision's are.
GENERIC = 0.5, 0.5
IMAGENET = tuple(
    np.array(x, np.float32).reshape(1, 1, 1, 3)
    for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
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

    def __str__(self) -> str:
        return f"{self.name} of shape {self.shape}"


def pixel_statistics(file: Path | None) -> tuple[Any, Any]:
    """Mean and standard deviation of pixels, between 0 and 1, by which to standardise images."""
    return IMAGENET if file and file.suffix == TORCHVISION.suffix else GENERIC


def check(file: Path | None, name: str) -> None:
    """Raises an error for a file of the wrong kind, or that is not there, before anything else."""
    if file is None:
        return
    layout, _ = _layout(name)
    if file.suffix != layout.suffix:
        raise UserError(
            f"--weights {file}: {name} takes a {layout.suffix} file of {layout.project}'s layout."
        )
    if not file.exists():
        raise UserError(
            f"--weights {file}: there is no such file; examples/recipes/README.md tells where to "
            "get it."
        )


def read(file: Path | None, name: str, model: nnx.Module) -> Pretrained:
    """Reads the weights of a model; None reads nothing.

    The position embedding is resized to the image. A head for another number of classes is left
    out, so that the model keeps its own. Everything else must be there, and have a place.

    Args:
      file: `--weights`, checked.
      name: of the model, as in `models.create`.
      model: the model; shapes are enough.

    Raises:
      UserError: if the file cannot be read, or is not of this model.
    """
    if file is None:
        return Pretrained({}, None, "")
    layout, blocks = _layout(name)
    arrays, digest = _read(file)
    state = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    wanted = {path: _stored(path, leaf.shape, layout, blocks) for path, leaf in state.items()}

    unused = {x for x in arrays if re.fullmatch(layout.unused, x)}
    bias = wanted["head", "bias"]
    if bias.name in arrays and arrays[bias.name].shape != bias.shape:
        head = {path for path in wanted if path[0] == "head"}
        unused |= {wanted.pop(path).name for path in head} & arrays.keys()

    mend = f"if it is not of {name}, choose another --model or other weights."
    if missing := [stored for stored in wanted.values() if stored.name not in arrays]:
        raise UserError(f"--weights {file} lacks {_first(missing)}; {mend}")
    if left := arrays.keys() - {stored.name for stored in wanted.values()} - unused:
        left = [Stored(x, arrays[x].shape) for x in sorted(left)]
        raise UserError(f"--weights {file} holds {_first(left)}, which {name} lacks; {mend}")
    nested: dict[Any, Any] = {}
    for path, stored in wanted.items():
        *parents, last = path
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        array = _fit(file, stored, arrays[stored.name], name)
        place[last] = array.transpose(layout.axes(array.ndim))
    summary = f"{len(wanted)} arrays loaded from {file}"
    if unused:  # One of the counts of batches says enough, a ResNet has one in each layer.
        told = {re.sub(r"^.*(?=\.num_batches_tracked$)", "*", x) for x in unused}
        summary += f"; not used: {', '.join(sorted(told))}"
    return Pretrained(nested, digest, summary)


def _layout(name: str) -> tuple[Layout, list[str]]:
    """Whose layout the weights of a model have, and what blocks are called there."""
    family = name.partition("/")[0]
    if family not in models.RESNETS:
        return VISION_TRANSFORMER, []
    depths = models.RESNETS[family][1]
    return TORCHVISION, [f"layer{i}/{j}" for i, depth in enumerate(depths, 1) for j in range(depth)]


def _read(file: Path) -> tuple[dict[str, np.ndarray], str]:
    try:
        with file.open("rb") as opened:
            digest = "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
            if file.suffix == TORCHVISION.suffix:
                return safetensors.numpy.load_file(file), digest
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}, digest
    except Exception as error:  # The readers raise what they like.
        raise UserError(
            f"--weights {file} cannot be read: {first_line(error)}; examples/recipes/README.md "
            "tells where such files come from."
        ) from error


def _stored(
    path: tuple[Any, ...], shape: tuple[int, ...], layout: Layout, blocks: list[str]
) -> Stored:
    name = "/".join(map(str, path))
    if blocks:
        name = re.sub(r"^blocks/(\d+)", lambda found: blocks[int(found[1])], name)
    for pattern, replacement in layout.names:
        name = re.sub(pattern, replacement, name)
    sizes = sorted(zip(layout.axes(len(shape)), shape, strict=True))
    return Stored(name, tuple(size for _, size in sizes))


def _fit(file: Path, stored: Stored, array: np.ndarray, name: str) -> np.ndarray:
    """A stored array in float32, checked, and resized if it holds positions."""
    if stored.name == POSITIONS and _is_grid(array.shape) and _is_grid(stored.shape):
        array = resize_positions(array, stored.shape[1])
    if array.shape != stored.shape:
        raise UserError(
            f"--weights {file}: {stored.name} has shape {array.shape}, and {name} takes "
            f"{stored.shape} at this image size; choose another --model, --image-size or weights."
        )
    if array.dtype.kind != "f":
        raise UserError(
            f"--weights {file}: {stored.name} has dtype {array.dtype}; convert it to float32."
        )
    return array.astype(np.float32)


def _is_grid(shape: tuple[int, ...]) -> bool:
    positions = shape[1] - 1 if len(shape) == 3 and shape[0] == 1 else 0
    return positions > 0 and math.isqrt(positions) ** 2 == positions


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
