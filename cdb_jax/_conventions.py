"""Finds the channels of a parameter by its rank and its name in Flax or Equinox.

Names settle what rank cannot: a kernel of shape (3, 8, 8) may be a 1-D convolution, a stack of
three dense layers, or a dense layer over inputs of shape (3, 8).
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]
Axes = tuple[int, ...]


class Reason(enum.Enum):
    """Why a leaf has no channels."""

    EXEMPT = "exempt"
    NOT_NAMED = "not in `only`"
    NO_VALUES = "no floating-point values"
    SPEC_IS_NONE = "channel_axes says None"
    FEW_DIMENSIONS = "fewer than two dimensions"
    BIAS = "a bias"
    SCALE = "a scale"
    NORMALISATION = "normalisation"
    TOKEN = "position or class token"
    EMBEDDING = "an embedding has no input channels"
    ONE_INPUT = "one input channel"
    UNSETTLED_OUTPUT = "name and rank do not settle its output channels"
    UNSETTLED_INPUT = "name and rank do not settle its input channels"


UNSETTLED = {"output": Reason.UNSETTLED_OUTPUT, "input": Reason.UNSETTLED_INPUT}

_POSITION = re.compile(r"(^|_)pos(ition(al)?)?(_|emb|$)|^wpe$", re.IGNORECASE)
_TOKEN = re.compile(r"token|^cls|^class_embed", re.IGNORECASE)
_TABLE = re.compile(r"emb|vocab|lookup|codebook|^wte$|^tok_|(^|_)table$", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln|^bn", re.IGNORECASE)
_CONV = re.compile(r"conv", re.IGNORECASE)
_EINSUM = re.compile(r"einsum", re.IGNORECASE)
_DENSE = re.compile(r"dense|linear|einsum|^fc|proj|^(query|key|value|out)$", re.IGNORECASE)


def last_names(path: str) -> tuple[str, str]:
    """The name of a layer, which is empty at the top level, and the name of its parameter."""
    *_, layer, name = ["", *path.split("/")]
    return layer, name


def sibling(path: str, name: str) -> str:
    """The path of another parameter of the same layer."""
    return f"{path.rpartition('/')[0]}/{name}".lstrip("/")


def is_token(path: str) -> bool:
    """Whether the name of a leaf says that it is a position, a token or a query, not a weight."""
    layer, name = last_names(path)
    return bool(_POSITION.search(name) or _TOKEN.search(name) or _POSITION.search(layer))


def channel_axes(
    direction: str, path: str, shape: Shape, stack: Axes, shapes: Mapping[str, Shape]
) -> Axes | Reason:
    """The channel axes of a leaf, or why it has none.

    Args:
      direction: "output" or "input".
      path: the path of the leaf.
      shape: the shape of the leaf.
      stack: axes along which layers are stacked.
      shapes: the shapes of all leaves of the tree, by path; a bias can contradict the name of its
        kernel.
    """
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    found = _by_name(direction, path, tuple(shape[axis] for axis in rest))
    if isinstance(found, Reason):
        return found
    bias = _bias_shape(path, shapes)
    if not stack and (
        _looks_stacked(path, shape, bias) or _output_by_bias(path, shape, bias) is not None
    ):
        return UNSETTLED[direction]
    return tuple(rest[axis] for axis in found)


def _by_name(direction: str, path: str, shape: Shape) -> Axes | Reason:
    layer, name = last_names(path)
    if len(shape) < 2:
        return Reason.FEW_DIMENSIONS
    if name == "bias" or name.endswith("_bias"):
        return Reason.BIAS
    if name == "scale":
        return Reason.SCALE
    if _NORM.search(layer) and name in ("kernel", "weight"):
        return Reason.NORMALISATION
    if is_token(path):
        return Reason.TOKEN
    is_table = name == "weight" and len(shape) == 2 and _TABLE.search(layer)
    if name == "embedding" or (is_table and "patch" not in layer.lower()):
        return (len(shape) - 1,) if direction == "output" else Reason.EMBEDDING
    axes = _kernel_axes(layer, name, len(shape))
    if axes is None:
        return UNSETTLED[direction]
    output_axes, input_axes = axes
    if direction == "output":
        return output_axes
    if math.prod(shape[axis] for axis in input_axes) == 1:
        return Reason.ONE_INPUT
    return input_axes


def _kernel_axes(layer: str, name: str, rank: int) -> tuple[Axes, Axes] | None:
    """The output and the input axes of a weight, or None if names and rank do not settle them.

    The kernel of a grouped convolution holds the inputs of one group, so each of its input channels
    stands for one channel of every group.
    """
    conv, dense = _CONV.search(layer), _DENSE.search(layer)
    is_product = rank == 2 and not _EINSUM.search(layer)
    is_conv = rank in (3, 4, 5) and (conv or (rank == 4 and not dense))
    if name == "kernel":
        if is_product or is_conv:
            return (rank - 1,), (rank - 2,)
        if rank == 3 and layer in ("query", "key", "value"):  # (in, heads, head_dim)
            return (1, 2), (0,)
        if rank == 3 and layer == "out":  # (heads, head_dim, out)
            return (2,), (0, 1)
    if name in ("weight", "weight_ih", "weight_hh") and (is_product or is_conv):
        return (0,), (1,)
    return None


def _looks_stacked(path: str, shape: Shape, bias: Shape) -> bool:
    """Whether the shape of the bias shows that axis 0 of the kernel and the bias stacks layers.

    From its shape alone, a stack of convolutions looks like one convolution with an extra spatial
    dimension. Kernels of rank 3 are checked only if their name says that they are convolutions,
    because others have biases of rank 2.
    """
    if len(shape) <= 3 and not _CONV.search(last_names(path)[0]):
        return False
    return len(bias) == 2 and bias[0] == shape[0] and bias[1] in shape[1:]


def _bias_shape(path: str, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of the bias of a layer; empty if it has none."""
    bias = shapes.get(sibling(path, "bias"), ())
    while len(bias) > 1 and bias[-1] == 1:  # Equinox keeps the spatial dimensions: (out, 1, 1).
        bias = bias[:-1]
    return bias


def _output_by_bias(path: str, shape: Shape, bias: Shape) -> int | None:
    """The output axis that the size of the bias suggests, if it contradicts the name; else None.

    Some layers store their kernel as (output, input) and transpose it.
    """
    axes = _kernel_axes(*last_names(path), len(shape))
    if axes is None or len(bias) != 1 or bias[0] == math.prod(shape[axis] for axis in axes[0]):
        return None
    return next((axis for axis, size in enumerate(shape) if size == bias[0]), None)


def unsettled_message(
    direction: str, paths: Sequence[str], shapes: Mapping[str, Shape], most: int = 12
) -> str:
    """The error message for unsettled leaves, with the rules that the user may mean."""
    rules = _possible_rules(direction, paths[0], shapes)
    width = max(map(len, rules))
    rows = "".join(f"    cdb_jax.{rule:{width}}  # {x}\n" for rule, x in rules.items())
    listing = "".join(f"    {path!r} of shape {shapes[path]}\n" for path in paths[:most])
    if len(paths) > most:
        listing += f"    and {len(paths) - most} more\n"
    condition = f"in {tuple(paths)}" if len(paths) > 1 else f"== {paths[0]!r}"
    return (
        f"channel_axes: name and rank do not settle which axis holds the {direction} channels of\n"
        f"{listing}Name the axis with a rule:\n"
        f"    channel_axes=lambda path, leaf: RULE if path {condition} else "
        f"cdb_jax.{direction}_channels\n"
        f"where RULE is one of\n{rows}"
        "(or, if one is right for the whole tree, channel_axes=RULE). To leave them alone because "
        f"they have no channels, use exempt={tuple(paths)}."
    )


def _possible_rules(direction: str, path: str, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Rules that the user may mean for an unsettled leaf, with their meanings."""
    shape, bias = shapes[path], _bias_shape(path, shapes)
    is_weight = last_names(path)[1].startswith("weight")
    # Weights begin with (output, input); kernels end with (input, output).
    weight_axis, kernel_axis = {"output": (0, -1), "input": (1, -2)}[direction]
    axis = weight_axis if is_weight else kernel_axis
    rules = {f"Axes({axis})": f"channels on axis {axis}"}
    by_bias = _output_by_bias(path, shape, bias)
    if by_bias is not None:
        if direction == "input":
            by_bias = max(i for i in range(len(shape)) if i != by_bias)
        meaning = f"channels on axis {by_bias}, which the bias of shape {bias} suggests"
        return {f"Axes({by_bias})": meaning} | rules
    if len(shape) > 2:
        if not is_weight:
            heads = (axis - 1, axis)
            rules[f"Axes({heads})"] = f"channels on axes {heads}: heads and their features"
        inner: object = f"cdb_jax.{direction}_channels"
        if isinstance(_by_name(direction, path, shape[1:]), Reason):
            inner = axis + 1 if is_weight else axis
        rules[f"Axes({inner}, stack=0)"] = "layers stacked on axis 0"
    return rules
