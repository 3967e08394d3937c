"""Finds the channels of a parameter by its name, its shape, and the shape of its bias.

Names settle what shapes cannot: a kernel of shape (3, 8, 8) may be a 1-D convolution, a stack of
three dense layers, or a dense layer over inputs of shape (3, 8). A leaf that neither settles is
left alone, but it is an error if such leaves make up much of a model.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Direction = Literal["output", "input"]
Shape = tuple[int, ...]
Axes = tuple[int, ...]


class NoChannels(enum.Enum):
    """Why a leaf has no channels."""

    EXEMPT = "exempt"
    NOT_NAMED = "not in `only`"
    NO_VALUES = "no floating-point values"
    SPEC_IS_NONE = "channel_axes says None"
    FEW_DIMENSIONS = "fewer than two dimensions"
    FEW_BESIDES_STACK = "fewer than two dimensions besides the stack axis"
    VECTOR = "all axes but one have size 1"
    BIAS = "a bias"
    SCALE = "a scale"
    NORMALISATION = "normalisation"
    TOKEN = "position or class token"
    EMBEDDING = "an embedding has no input channels"
    ONE_INPUT = "one input channel"
    CONTRADICTED = "biases of other layers contradict what the name says"
    UNSETTLED = "its name and shape do not show its channels"


UNSETTLED = (NoChannels.UNSETTLED, NoChannels.CONTRADICTED)

_POSITION = re.compile(r"(^|_)pos(ition(al)?)?(_|emb|$)|^wpe$", re.IGNORECASE)
_TOKEN = re.compile(r"token|^cls|^class_embed", re.IGNORECASE)
_TABLE = re.compile(r"emb|vocab|lookup|codebook|^wte$|^tok_|(^|_)table$", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln|^bn", re.IGNORECASE)
_CONV = re.compile(r"conv", re.IGNORECASE)
_EINSUM = re.compile(r"einsum", re.IGNORECASE)
_DENSE = re.compile(r"dense|linear|einsum|^fc|proj|^(query|key|value|out)$", re.IGNORECASE)
_UNCLEAR = re.compile(r"basis|coef|spline", re.IGNORECASE)
_IMAGE = re.compile(r"conv|patch|stem", re.IGNORECASE)
_BIASES = ("bias", "b", "beta", "offset")
_WEIGHTS = ("kernel", "weight", "w")
_TABLES = ("embedding", "embeddings", "table", "input_embedding")
_BOXED = ("kernel", "weight", "bias")
_WRAPPERS = ("value", "data_array", "array", "args")  # Attributes in which boxes keep arrays.


class Roles(NamedTuple):
    """The axes of a weight. `is_default`: whether only the number of axes determined them."""

    outputs: Axes
    inputs: Axes
    stack: Axes = ()
    is_default: bool = False


class Found(NamedTuple):
    """The channel axes of a leaf, the axes of its stack, and `Roles.is_default`."""

    channel: Axes
    stack: Axes
    is_default: bool = False


# Weights of three and four dimensions: attention heads, experts, and the einsums of Gemma.
_HEADS_OUT, _HEADS_IN = Roles((1, 2), (0,)), Roles((2,), (0, 1))
_EXPERTS = Roles((2,), (1,), stack=(0,))
_BY_NAME = {
    3: {
        **dict.fromkeys("q k v wq wk wv query key value q_proj k_proj v_proj".split(), _HEADS_OUT),
        **dict.fromkeys(
            "o out o_proj out_proj attn_out_proj attn_vec_einsum".split(), _HEADS_IN
        ),
        **dict.fromkeys("wi wi_0 wi_1 gate_proj up_proj down_proj".split(), _EXPERTS),
        **dict.fromkeys("w_gate w_up w_down".split(), _EXPERTS),
        "q_einsum": Roles((0, 2), (1,)),
    },
    4: dict.fromkeys(("kv_einsum", "qkv_einsum"), Roles((0, 1, 3), (2,))),
}  # fmt: skip


def last_names(path: str) -> tuple[str, str]:
    """The name of a layer, which is empty at the top level, and the name of its parameter."""
    *_, layer, name = ["", *_unwrapped(path)]
    return layer, name


def sibling(path: str, name: str) -> str:
    """The path of another parameter of the same layer."""
    return f"{path.rpartition('/')[0]}/{name}".lstrip("/")


def _unwrapped(path: str) -> list[str]:
    """The parts of a path without those that a box adds to a parameter: `weight/args/1`."""
    parts = path.split("/")
    end = len(parts)
    while end > 1 and (parts[end - 1] in _WRAPPERS or parts[end - 1].isdigit()):
        end -= 1
    return parts[:end] if parts[end - 1] in _BOXED else parts


class Tree:
    """The shapes of a tree's arrays, by path, and what biases reveal about weights."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = shapes
        self._biases = {}
        for path, shape in shapes.items():
            *prefix, name = _unwrapped(path)
            if name in _BIASES:
                self._biases["/".join(prefix)] = shape
        # Whether kernels are (output, input). Only a kernel that is not square can reveal this.
        self.has_transposed = any(map(self._contradicts, shapes, shapes.values()))

    def _contradicts(self, path: str, shape: Shape) -> bool:
        bias = self.bias_shape(path)
        is_kernel = len(shape) == 2 and last_names(path)[1] == "kernel" and len(bias) == 1
        return is_kernel and bias[0] == shape[0] != shape[1]

    def bias_shape(self, path: str) -> Shape:
        """The shape of the bias of a layer; empty if it has none."""
        *prefix, name = _unwrapped(path)
        bias = self._biases.get("/".join(prefix), ())
        if name.isdigit() and not bias:  # Lists of weights and biases in turn.
            bias = self.shapes.get("/".join([*prefix, str(int(name) + 1)]), ())
            if len(bias) >= len(self.shapes[path]) or not _ends_with(self.shapes[path], bias):
                return ()
        return bias

    def is_bias(self, path: str, shape: Shape) -> bool:
        """Whether an array is the bias of a weight: by name, or because of what is next to it."""
        *prefix, name = _unwrapped(path)

        def shape_of(other: str) -> Shape:
            return self.shapes.get("/".join([*prefix, other]), ())

        if name == "b":  # Also half of a low-rank pair, or any matrix.
            return any(len(shape_of(weight)) > len(shape) for weight in _WEIGHTS)
        if name.isdigit():
            weight = shape_of(str(int(name) - 1))
            return len(weight) > len(shape) and _ends_with(weight, shape)
        return name in _BIASES or name.endswith("_bias")


def is_token(path: str) -> bool:
    """Whether the name of a leaf says that it is a position or a token, not a weight."""
    layer, name = last_names(path)
    return bool(_POSITION.search(name) or _TOKEN.search(name) or _POSITION.search(layer))


def channel_axes(
    direction: Direction, path: str, shape: Shape, stack: Axes, tree: Tree
) -> Found | NoChannels:
    """The channel axes of a leaf, or why it has none.

    Args:
      direction: which channels to find.
      path: the path of the leaf.
      shape: the shape of the leaf.
      stack: axes along which layers are known to be stacked.
      tree: the tree that the leaf is in.
    """
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    inner = tuple(shape[axis] for axis in rest)
    if len(inner) < 2:
        return few_dimensions(stack)
    reason = _without_channels(path, inner, tree)
    if reason:
        return reason
    if _is_table(path, inner):
        return Found((rest[-1],), stack) if direction == "output" else NoChannels.EMBEDDING
    roles = _roles(path, inner, tree, () if stack else tree.bias_shape(path))
    if isinstance(roles, NoChannels):
        return roles
    axes = roles.outputs if direction == "output" else roles.inputs
    if direction == "input" and math.prod(inner[axis] for axis in axes) == 1:
        return NoChannels.ONE_INPUT
    channel = tuple(rest[axis] for axis in axes)
    stack = (*stack, *(rest[axis] for axis in roles.stack))
    return Found(channel, stack, roles.is_default)


def few_dimensions(stack: Axes) -> NoChannels:
    """Why a leaf without two dimensions, not counting a stack, has no channels."""
    return NoChannels.FEW_BESIDES_STACK if stack else NoChannels.FEW_DIMENSIONS


def _without_channels(path: str, shape: Shape, tree: Tree) -> NoChannels | None:
    layer, name = last_names(path)
    if tree.is_bias(path, shape):
        return NoChannels.BIAS
    if name == "scale":
        return NoChannels.SCALE
    if _NORM.search(layer) and name in ("kernel", "weight"):
        return NoChannels.NORMALISATION
    if is_token(path):
        return NoChannels.TOKEN
    if name not in _WEIGHTS and sum(size > 1 for size in shape) < 2:
        return NoChannels.VECTOR
    return None


def _is_table(path: str, shape: Shape) -> bool:
    layer, name = last_names(path)
    by_layer = name == "weight" and len(shape) == 2 and _TABLE.search(layer)
    return len(shape) == 2 and name in _TABLES or bool(by_layer and "patch" not in layer.lower())


def _roles(path: str, shape: Shape, tree: Tree, bias: Shape) -> Roles | NoChannels:
    """The axes of a weight, or why they are unknown."""
    layer, name = last_names(path)
    if _UNCLEAR.search(name):
        return NoChannels.UNSETTLED
    known = _known(layer, name, len(shape))
    inner = _known(layer, name, len(shape) - 1)
    found = _by_bias(shape, bias, inner, name) or _by_bias(shape, _without_ones(bias), inner, name)
    if len(found) > 1:
        return NoChannels.UNSETTLED
    if known and (not found or _fits(known, shape, bias)):
        is_square = len(shape) == 2 and shape[0] == shape[1]
        return NoChannels.CONTRADICTED if is_square and tree.has_transposed else known
    if found:
        return found[0]
    if _EINSUM.search(layer) or _EINSUM.search(name):
        return NoChannels.UNSETTLED
    if len(shape) == 2:
        return Roles((1,), (0,), is_default=True)
    is_image = bool(_IMAGE.search(layer)) or shape[0] <= 7
    if len(shape) == 4 and shape[0] == shape[1] and is_image and shape[0] <= 32:
        return Roles((2,), (3,)) if shape[3] == 1 < shape[2] else Roles((3,), (2,))
    return NoChannels.UNSETTLED


def _fits(roles: Roles, shape: Shape, bias: Shape) -> bool:
    """Whether a bias has an entry for each output channel."""
    return not bias or math.prod(shape[axis] for axis in roles.outputs) == math.prod(bias)


def _known(layer: str, name: str, rank: int) -> Roles | None:
    """The axes of a weight whose name is known; None for any other name.

    The kernel of a grouped convolution holds the inputs of one group, so each of its input channels
    stands for one channel of every group.
    """
    conv, dense = _CONV.search(layer), _DENSE.search(layer)
    by_name = _BY_NAME.get(rank, {}).get(layer if name in _WEIGHTS else name)
    if by_name:
        return by_name
    is_product = rank == 2 and not _EINSUM.search(layer)
    is_conv = rank in (3, 4, 5) and (conv or (rank == 4 and not dense))
    if not is_product and not is_conv:
        return None
    if name == "kernel" or (name == "w" and (is_product or conv)):
        return Roles((rank - 1,), (rank - 2,))
    if name in ("weight", "weight_ih", "weight_hh"):
        return Roles((0,), (1,))
    return None


def _by_bias(shape: Shape, bias: Shape, inner: Roles | None, name: str) -> list[Roles]:
    """The axes that the shape of a bias allows: none if it says nothing, several if it is unclear.

    `inner` are the axes of one layer of a stack, if the name tells them.
    """
    rank, size = len(shape), len(bias)
    found = []
    if 0 < size < rank and bias == shape[-size:]:
        is_image = rank >= 4 and size == 1 and shape[0] == shape[1]
        inputs = (rank - 2,) if is_image else tuple(range(rank - size))
        found.append(Roles(tuple(range(rank - size, rank)), inputs))
    elif size == 1 and bias[0] == shape[0]:
        found.append(Roles((0,), (1,)))
    if size >= 2 and rank > size and bias[0] == shape[0]:
        is_weight = name.startswith("weight")
        rest = shape[1:size] if is_weight else shape[-(size - 1) :]
        if bias[1:] == rest:
            start = 1 if is_weight else rank - size + 1
            outputs = tuple(range(start, start + size - 1))
            others = tuple(axis for axis in range(1, rank) if axis not in outputs)
            if inner and tuple(axis + 1 for axis in inner.outputs) == outputs:
                others = tuple(axis + 1 for axis in inner.inputs)
            found.append(Roles(outputs, others, stack=(0,)))
    return found


def _ends_with(shape: Shape, end: Shape) -> bool:
    return shape[len(shape) - len(end) :] == end


def _without_ones(shape: Shape) -> Shape:
    """A shape without the trailing ones of the biases of Equinox convolutions: (out, 1, 1)."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def message(direction: Direction, complaint: str, lines: Sequence[str], most: int = 4) -> str:
    """Returns an error message that says what to do, and then lists leaves, one on each line."""
    side = "" if direction == "output" else ', channels="input"'
    listing = "".join(f"    {line}\n" for line in lines[:most])
    if len(lines) > most:
        listing += f"    and {len(lines) - most} more\n"
    return (
        f"channel_axes=cdb_jax.infer_channel_axes(loss_fn, params, batch{side}) finds the "
        f"{direction} channels{complaint}\n{listing}"
        "Alternatively, set channel_axes to a dict from path to cdb_jax.Axes, or to a rule "
        "(path, leaf) -> Axes; None leaves an array alone."
    )
