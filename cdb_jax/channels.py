"""Which axis of which leaf holds the channels: a static layout, decided from paths and shapes.

Nothing here touches array values, so everything happens once, when a step is traced.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax._compiling import by_structure

Ints = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Convention:
    """Finds channels by the parameter names and ranks of Flax (NNX, Linen) and Equinox.

    A plain object rather than a function, because `optax.inject_hyperparams` takes every
    callable argument for a schedule.
    """

    direction: str

    def __repr__(self) -> str:
        return f"cdb_jax.{self.direction}_channels"


output_channels = Convention("output")
"""Channels are what a layer puts out: `kernel` axis -1, `weight` axis 0 (Equinox, PyTorch)."""

input_channels = Convention("input")
"""Channels are what a layer takes in: `kernel` axis -2, `weight` axis 1 (Equinox, PyTorch)."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """The channel axes of a leaf, and the axes that stack several layers in one leaf.

    Args:
      channel: an axis, or several that together index the channels, or `output_channels` /
        `input_channels` to find them in the shape that is left without the stack axes. With
        `()` a whole leaf of any rank is one channel, for policies that only drop whole layers.
      stack: the axis or axes along which layers are stacked (scanned blocks, experts). Every
        index is a layer of its own, with a selection of its own.

    Examples:
      >>> import cdb_jax
      >>> cdb_jax.Axes(-1, stack=0)  # a scanned dense kernel (layers, in, out)
      Axes(channel=-1, stack=0)
      >>> cdb_jax.Axes(cdb_jax.output_channels, stack=0)  # a subtree of scanned blocks
      Axes(channel=cdb_jax.output_channels, stack=0)
    """

    channel: Ints | Convention
    stack: Ints = ()


AxisSpec = int | tuple[int, ...] | Axes | Convention | None
Rule = Callable[[str, Any], AxisSpec]


@dataclasses.dataclass(frozen=True)
class SpecTree:
    """A prefix tree of specs by canonical path: hashable, and the same for every framework.

    NNX shows a parameter as `['kernel'].value` in one place and as `['kernel']` in another.
    """

    specs: tuple[tuple[str, AxisSpec], ...]

    def __repr__(self) -> str:
        return repr(dict(self.specs))


ChannelAxes = Any  # AxisSpec, a Rule, or a prefix tree of AxisSpecs.


class Leaf(NamedTuple):
    """One array of the tree, and how a selection reaches it.

    `layer` is the path whose selection applies: the leaf's own, its kernel's for a bias that
    follows, or None for a leaf that is left alone; then `reason` says why.
    """

    path: str
    shape: tuple[int, ...]
    channel: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    layer: str | None = None
    reason: str = ""

    @property
    def source(self) -> str:
        """The path under which a selection has what applies to this leaf, if it has anything."""
        return self.path if self.layer is None else self.layer

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that a selection speaks of, in the order of its shape."""
        return self.stack + self.channel

    @property
    def channels(self) -> int:
        return math.prod(self.shape[axis] for axis in self.channel)

    @property
    def depth(self) -> int:
        """How many layers are stacked in the leaf."""
        return math.prod(self.stack_shape)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.stack)


class Layout(NamedTuple):
    """The leaves of a tree in flattening order.

    `root` is the path of the tree inside a larger model. `partial` is True for a part of a larger
    model: a tree with `optax.MaskedNode`s or a root.
    """

    leaves: tuple[Leaf, ...]
    root: str
    partial: bool

    @property
    def layers(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.layer == leaf.path)


EXEMPT = "exempt"  # The reason of a leaf that the user named, as against one that has no channels.
NOT_NAMED = "not in `only`"
NO_VALUES = "no floating-point values"
FEW_DIMENSIONS = "fewer than two dimensions"
UNSETTLED = {x: f"name and rank do not settle its {x} channels" for x in ("output", "input")}


def resolve(
    updates: Any,
    channel_axes: ChannelAxes = output_channels,
    *,
    exempt: Sequence[str] = (),
    only: Sequence[str] | None = None,
    share_with_bias: bool = False,
    root: str = "",
) -> Layout:
    """Finds the layers of a tree and the channel axes of each.

    Args:
      updates: a tree of arrays or `jax.ShapeDtypeStruct`; only paths, shapes and dtypes are read.
      channel_axes: an `Axes`, int, tuple, convention, None, prefix tree of those, or a rule
        `(path, leaf)` that returns one of them.
      exempt: path patterns to leave alone.
      only: path patterns outside of which to leave everything alone; None for no such limit.
      share_with_bias: whether a bias is dropped with the kernel of its layer.
      root: path of `updates` within the model it was cut from.

    Returns:
      The layout of `updates`.

    Raises:
      ValueError: if a spec does not fit the tree, a pattern matches nothing, a kernel cannot be
        settled by name and rank, two leaves share a path, or nothing is left to drop.
    """
    patterns = tuple(exempt), None if only is None else tuple(only)
    return _resolve(updates, as_specs(channel_axes), *patterns, share_with_bias, root)


@by_structure
def _resolve(
    updates: Any,
    channel_axes: AxisSpec | Rule | SpecTree,
    exempt: tuple[str, ...],
    only: tuple[str, ...] | None,
    share_with_bias: bool,
    root: str,
) -> Layout:
    empty = lambda x: x is None or _is_masked(x)
    found = jax.tree_util.tree_flatten_with_path(updates, is_leaf=empty)[0]
    arrays = [(canonical_path(keys, root), x) for keys, x in found if not empty(x)]
    masked = [canonical_path(keys, root) for keys, x in found if _is_masked(x)]
    # Where a model has no parameter, or a step no gradient.
    absent = [canonical_path(keys, root) for keys, x in found if x is None]
    partial = bool(masked) or bool(root)
    paths = [path for path, _ in arrays]
    _check_unique(paths)
    if not partial:
        _check_patterns("exempt", exempt, [*paths, *absent])
        _check_patterns("only", only or (), [*paths, *absent])
    spec_of = _spec_lookup(channel_axes, paths, [*masked, *absent], partial)

    shapes = {path: tuple(getattr(x, "shape", ())) for path, x in arrays}
    leaves = [_resolve_leaf(path, x, spec_of, exempt, only, shapes) for path, x in arrays]
    for direction, reason in UNSETTLED.items():
        if unsettled := [leaf for leaf in leaves if leaf.reason == reason]:
            raise ValueError(_cannot_settle(direction, unsettled, shapes))
    if share_with_bias:
        by_path = {leaf.path: leaf for leaf in leaves}
        leaves = [_follow_kernel(leaf, by_path, masked) for leaf in leaves]
    layout = Layout(tuple(leaves), root, partial)
    _check_ids([layer.path for layer in layout.layers])
    if leaves and not layout.layers and not partial:
        listing = "\n".join(f"  {x.path or '(the tree itself)'}: {x.reason}" for x in leaves[:20])
        mend = "name the channel axis, such as channel_axes=-1"
        if any(leaf.reason in (EXEMPT, NOT_NAMED) for leaf in leaves):
            mend += ", or change exempt or only"
        raise ValueError(
            f"channel_axes={channel_axes!r}, exempt={exempt!r} and only={only!r} leave nothing to "
            f"drop in this tree; {mend}. Its leaves:\n{listing}"
        )
    return layout


@by_structure
def same_layout(tree: Any, layout: Layout) -> Layout:
    """The leaves of a tree, as the layout of the same or of a larger tree has them.

    Raises:
      ValueError: for a leaf that the layout does not have, or has with another shape.
    """
    known = {leaf.path: leaf for leaf in layout.leaves}
    leaves = []
    for keys, x in jax.tree_util.tree_leaves_with_path(tree):
        path, shape = canonical_path(keys, layout.root), tuple(getattr(x, "shape", ()))
        if path not in known:
            raise ValueError(
                f"selection: it has nothing for {path!r} of shape {shape}. It was made for a tree "
                f"with the paths {_shorten(list(known))}; select for the tree that it is used on."
            )
        if shape != known[path].shape:
            raise ValueError(
                f"selection: {path!r} has shape {shape}, and the selection was made for shape "
                f"{known[path].shape}; select for the tree that it is used on."
            )
        leaves.append(known[path])
    return Layout(tuple(leaves), layout.root, layout.partial)


def layer_id(path: str) -> int:
    """The first 32 bits of SHA-256 of a canonical path: what tells layers' draws apart."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")


def covers(pattern: str, path: str) -> bool:
    """Whether a glob pattern matches a path or anything the path lies below."""
    parts = path.split("/")
    return any(
        fnmatch.fnmatchcase("/".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1)
    )


def check_parameters(updates: Any, params: Any, root: str) -> None:
    """Raises a ValueError if updates have other shapes than the parameters of the same paths."""
    shapes = lambda tree: [getattr(x, "shape", None) for x in jax.tree.leaves(tree)]
    if params is None or shapes(updates) == shapes(params):
        return
    by_path = lambda tree: {
        canonical_path(keys, root): tuple(x.shape)
        for keys, x in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(x, "shape")
    }
    expected = by_path(params)
    for path, shape in by_path(updates).items():
        if shape != expected.get(path, shape):
            raise ValueError(
                f"the update of {path!r} has shape {shape} and its parameter {expected[path]}, so "
                "its axes do not say which channels these are; put what brings updates into the "
                "shapes of the parameters first, such as optax.chain("
                "optax.contrib.differentially_private_aggregate(...), "
                "cdb_jax.channel_drop_back(...)) for gradients of each example."
            )


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def canonical_path(keys: Sequence[Any], root: str = "") -> str:
    """The path of a leaf as users write it, whatever boxes and collections it lies in."""
    # Only an *attribute* called `value` is a box (nnx.Variable, nn.Partitioned); the dictionary
    # key `value` names an attention projection.
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    if keys and jax.tree_util.keystr((keys[0],), simple=True) == "params":
        keys = keys[1:]
    path = jax.tree_util.keystr(tuple(keys), simple=True, separator="/")
    return "/".join(part for part in (root, path) if part)


def _check_unique(paths: Sequence[str]) -> None:
    for path, times in collections.Counter(paths).items():
        if times > 1:
            raise ValueError(
                f"{times} leaves of the tree have the path {path!r} once `params` and `.value` are "
                "taken off; rename all but one."
            )


def _check_ids(paths: Sequence[str]) -> None:
    seen: dict[int, str] = {}
    for path in paths:
        other = seen.setdefault(layer_id(path), path)
        if other != path:
            raise ValueError(
                f"the layers {other!r} and {path!r} have the same 32-bit id {layer_id(path):#x}, "
                "so they would always draw the same channels; rename one of them."
            )


def _check_patterns(name: str, patterns: Sequence[str], paths: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(covers(pattern, path) for path in paths):
            raise ValueError(
                f"{name}: the pattern {pattern!r} matches none of the paths {_shorten(paths)}; "
                "correct it or take it out."
            )


def _shorten(paths: Sequence[str], most: int = 12) -> str:
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(repr(path) for path in paths[:most]) + more


# Specs: what the user says about a tree, brought down to one spec for a leaf.


def _is_ints(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(i, int) for i in x) and not hasattr(x, "_fields")


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (int, Axes, Convention)) or _is_ints(x)


def as_specs(channel_axes: ChannelAxes) -> AxisSpec | Rule | SpecTree:
    """Checks what users give as `channel_axes`, and turns a tree of specs into a `SpecTree`."""
    if isinstance(channel_axes, jax.Array):
        raise TypeError(
            "channel_axes must be static, got an array; under inject_hyperparams name it in "
            'static_args=("channel_axes",).'
        )
    if isinstance(channel_axes, (str, bool, float)):
        raise TypeError(
            f"channel_axes must be output_channels, input_channels, an int, a tuple of ints, Axes, "
            f"a tree of those or a rule (path, leaf) -> spec, got {channel_axes!r}."
        )
    if _is_spec(channel_axes) or isinstance(channel_axes, SpecTree):
        return channel_axes
    # A model may be a prefix tree and have a `__call__`; a rule is no tree.
    if callable(channel_axes) and jax.tree_util.all_leaves([channel_axes]):
        return channel_axes
    flat = jax.tree_util.tree_flatten_with_path(channel_axes, is_leaf=_is_spec)[0]
    specs = {canonical_path(keys): spec for keys, spec in flat if not _is_masked(spec)}
    for at, spec in specs.items():
        if not _is_spec(spec):
            raise ValueError(
                f"channel_axes: {spec!r} at {at!r} is no channel spec; use an int, a tuple of "
                "ints, Axes, a convention or None."
            )
    return SpecTree(tuple(specs.items()))


def _spec_lookup(
    channel_axes: AxisSpec | Rule | SpecTree,
    paths: Sequence[str],
    hidden: Sequence[str],
    partial: bool,
) -> Callable[[str, Any], tuple[AxisSpec, bool]]:
    """Returns a function from a leaf to its spec and whether that was given for this very leaf."""
    if callable(channel_axes):
        return lambda path, x: (_checked_rule_result(channel_axes(path, x), path), True)
    if not isinstance(channel_axes, SpecTree):
        return lambda path, x: (channel_axes, False)
    specs = dict(channel_axes.specs)
    for at in specs:
        fits = any(is_below(path, at) for path in paths)
        is_hidden = any(is_below(path, at) or is_below(at, path) for path in hidden)
        if not fits and not is_hidden and not partial:
            raise ValueError(
                f"channel_axes: the tree has a spec at {at!r}, where the updates have nothing; "
                f"their paths are {_shorten(paths)}."
            )

    def lookup(path: str, x: Any) -> tuple[AxisSpec, bool]:
        for at in _above(path):
            if at in specs:
                return specs[at], at == path
        raise ValueError(
            f"channel_axes: the tree has no spec for {path!r}; add one there or above it "
            "(None leaves it alone)."
        )

    return lookup


def _above(path: str) -> list[str]:
    """A path and those above it, up to that of the whole tree, which is the empty string."""
    parts = path.split("/") if path != "" else []
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def is_below(path: str, top: str) -> bool:
    return top == "" or path == top or path.startswith(top + "/")


def _checked_rule_result(spec: Any, path: str) -> AxisSpec:
    if not _is_spec(spec):
        raise ValueError(
            f"channel_axes: the rule returned {spec!r} for {path!r}; return an int, a tuple of "
            "ints, Axes, a convention or None."
        )
    return spec


def _resolve_leaf(
    path: str,
    x: Any,
    spec_of: Callable[[str, Any], tuple[AxisSpec, bool]],
    exempt: Sequence[str],
    only: Sequence[str] | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> Leaf:
    shape = shapes[path]
    dtype = getattr(x, "dtype", None)
    alone = Leaf(path, shape)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact) or 0 in shape:
        return alone._replace(reason=NO_VALUES)
    if any(covers(pattern, path) for pattern in exempt):
        return alone._replace(reason=EXEMPT)
    if only is not None and not any(covers(pattern, path) for pattern in only):
        return alone._replace(reason=NOT_NAMED)
    spec, for_this_leaf = spec_of(path, x)
    if spec is None:
        return alone._replace(reason="channel_axes says None")
    if spec == ():
        raise ValueError(
            f"channel_axes: () for {path!r} names no channel axis; Axes(()) takes the whole leaf "
            "as one channel."
        )
    axes = spec if isinstance(spec, Axes) else Axes(spec)
    stack = _normalise(axes.stack, shape, path)
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    by_convention = isinstance(axes.channel, Convention)
    if axes.channel == ():
        return alone._replace(stack=stack, layer=path)
    if len(rest) < 2 and not by_convention and not for_this_leaf:
        return alone._replace(reason=FEW_DIMENSIONS)

    channel = axes.channel
    if isinstance(channel, Convention):
        by_name = _by_convention(channel.direction, path, tuple(shape[axis] for axis in rest))
        if isinstance(by_name, str):
            return alone._replace(reason=by_name)
        bias = _bias_beside(path, shapes)
        if not stack and (
            _looks_stacked(path, shape, bias) or _output_by_bias(path, shape, bias) is not None
        ):
            return alone._replace(reason=UNSETTLED[channel.direction])
        channel = tuple(rest[axis] for axis in by_name)
    channel = _normalise(channel, shape, path)
    if set(channel) & set(stack):
        raise ValueError(
            f"channel_axes: {spec!r} for {path!r} of shape {shape} uses an axis both as a channel "
            "and as a stack axis."
        )
    return alone._replace(channel=channel, stack=stack, layer=path)


def _normalise(axes: Ints, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else axes
    for axis in axes:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"channel_axes: axis {axis!r} for {path!r} is not an int.")
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"channel_axes: axis {axis} is out of range for {path!r} of shape {shape}; give "
                "an axis it has, or None to leave it alone."
            )
    positive = tuple(sorted(axis % len(shape) for axis in axes))
    if len(set(positive)) < len(positive):
        raise ValueError(
            f"channel_axes: {axes} for {path!r} of shape {shape} repeats an axis; name each once."
        )
    return positive


def _follow_kernel(leaf: Leaf, by_path: dict[str, Leaf], masked: Sequence[str]) -> Leaf:
    """Lets a bias use the selection of the kernel beside it."""
    if _last_names(leaf.path)[1] != "bias" or leaf.reason in (EXEMPT, NOT_NAMED, NO_VALUES):
        return leaf
    beside = [_beside(leaf.path, kernel) for kernel in ("kernel", "weight")]
    for path in beside:
        if path in masked:
            raise ValueError(
                f"share_with_bias: {leaf.path!r} follows {path!r}, which is masked out of this "
                "tree; put both under the same mask or label."
            )
    kernel = next((by_path[path] for path in beside if path in by_path), None)
    if kernel is None or kernel.layer is None:
        return leaf
    lead = kernel.stack_shape + tuple(kernel.shape[axis] for axis in kernel.channel)
    # Equinox convolutions keep trailing ones for the spatial dimensions: (out, 1, 1).
    if leaf.shape != lead + (1,) * (len(leaf.shape) - len(lead)):
        raise ValueError(
            f"share_with_bias: {leaf.path!r} of shape {leaf.shape} cannot follow the channels "
            f"{lead} of {kernel.path!r}; use output channels, or exempt the bias."
        )
    depth = len(kernel.stack)
    return leaf._replace(
        stack=tuple(range(depth)),
        channel=tuple(range(depth, len(lead))),
        layer=kernel.path,
        reason="",
    )


# Conventions. Names settle what rank cannot: a kernel of shape (3, 8, 8) is a 1-D convolution, a
# stack of three dense layers, or a dense layer over (3, 8) inputs.

_POSITION = re.compile(r"(^|_)pos(ition(al)?)?(_|emb|$)|^wpe$", re.IGNORECASE)
_TOKEN = re.compile(r"token|^cls|^class_embed", re.IGNORECASE)
_TABLE = re.compile(r"emb|vocab|lookup|codebook|^wte$|^tok_|(^|_)table$", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln|^bn", re.IGNORECASE)
_CONV = re.compile(r"conv", re.IGNORECASE)
_DENSE = re.compile(r"dense|linear|einsum|^fc|proj|^(query|key|value|out)$", re.IGNORECASE)


def _last_names(path: str) -> tuple[str, str]:
    *_, parent, name = ["", *path.split("/")]
    return parent, name


def _beside(path: str, name: str) -> str:
    """The path of another leaf of the same layer."""
    return f"{path.rpartition('/')[0]}/{name}".lstrip("/")


def _by_convention(direction: str, path: str, shape: tuple[int, ...]) -> tuple[int, ...] | str:
    """Returns the channel axes of a leaf, or the reason why it has none."""
    parent, name = _last_names(path)
    if len(shape) < 2:
        return FEW_DIMENSIONS
    if name in ("bias", "scale") or name.endswith("_bias"):
        return f"a {name}"
    if _NORM.search(parent) and name in ("kernel", "weight"):
        return "normalisation"
    if _POSITION.search(name) or _TOKEN.search(name) or _POSITION.search(parent):
        return "position or class token"
    is_table = name == "weight" and len(shape) == 2 and _TABLE.search(parent)
    if name == "embedding" or (is_table and "patch" not in parent.lower()):
        return (len(shape) - 1,) if direction == "output" else "an embedding has no input channels"

    axes = _kernel_axes(name, parent, len(shape))
    if axes is None:
        return UNSETTLED[direction]
    output, input = axes
    if direction == "output":
        return output
    if math.prod(shape[axis] for axis in input) == 1:
        return "one input channel"
    return input


def _kernel_axes(name: str, parent: str, rank: int) -> tuple[tuple[int, ...], ...] | None:
    """Returns the output and the input axes of a weight, or None if names and rank are not enough.

    A grouped convolution holds its inputs per group, so an input channel there is one of each.
    """
    conv, dense = _CONV.search(parent), _DENSE.search(parent)
    is_product = rank == 2 and not re.search("einsum", parent, re.IGNORECASE)
    is_conv = rank in (3, 4, 5) and (conv or (rank == 4 and not dense))
    if name == "kernel":
        if is_product or is_conv:
            return (rank - 1,), (rank - 2,)
        if rank == 3 and parent in ("query", "key", "value"):  # (in, heads, head_dim)
            return (1, 2), (0,)
        if rank == 3 and parent == "out":  # (heads, head_dim, out)
            return (2,), (0, 1)
    if name in ("weight", "weight_ih", "weight_hh") and (is_product or is_conv):
        return (0,), (1,)
    return None


def _looks_stacked(path: str, shape: tuple[int, ...], bias: tuple[int, ...]) -> bool:
    """Whether the bias beside a kernel tells that both hold several layers, on axis 0.

    By its own shape a stack of convolutions is one convolution with a spatial dimension more. A
    kernel of rank 3 may be taken for a convolution, by its name; others have biases of rank 2.
    """
    if len(shape) <= 3 and not _CONV.search(_last_names(path)[0]):
        return False
    return len(bias) == 2 and bias[0] == shape[0] and bias[1] in shape[1:]


def _bias_beside(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the bias of a layer; empty if it has none."""
    bias = shapes.get(_beside(path, "bias"), ())
    while len(bias) > 1 and bias[-1] == 1:  # Equinox keeps the spatial dimensions: (out, 1, 1).
        bias = bias[:-1]
    return bias


def _output_by_bias(path: str, shape: tuple[int, ...], bias: tuple[int, ...]) -> int | None:
    """The output axis as the size of the bias has it, if the name says another one.

    A kernel may be kept as (output, input) and transposed in its layer.
    """
    parent, name = _last_names(path)
    axes = _kernel_axes(name, parent, len(shape))
    if axes is None or len(bias) != 1 or bias[0] == math.prod(shape[axis] for axis in axes[0]):
        return None
    return next((axis for axis, size in enumerate(shape) if size == bias[0]), None)


def _rules_for(direction: str, leaf: Leaf, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Rules that may be meant for a leaf that is not settled, with their meanings."""
    is_weight = _last_names(leaf.path)[1].startswith("weight")
    # Weights begin with (output, input); kernels end with (input, output).
    of_weight, of_kernel = {"output": (0, -1), "input": (1, -2)}[direction]
    axis = of_weight if is_weight else of_kernel
    rules = {f"Axes({axis})": f"channels on axis {axis}"}
    bias = _bias_beside(leaf.path, shapes)
    if (by_bias := _output_by_bias(leaf.path, leaf.shape, bias)) is not None:
        if direction == "input":
            by_bias = max(i for i in range(len(leaf.shape)) if i != by_bias)
        meaning = f"channels on axis {by_bias}, as the bias of shape {bias} has it"
        return {f"Axes({by_bias})": meaning} | rules
    if len(leaf.shape) > 2:
        if not is_weight:
            heads = (axis - 1, axis)
            rules[f"Axes({heads})"] = f"channels on axes {heads}: heads and their features"
        is_settled = not isinstance(_by_convention(direction, leaf.path, leaf.shape[1:]), str)
        of_each = f"cdb_jax.{direction}_channels" if is_settled else axis + is_weight
        rules[f"Axes({of_each}, stack=0)"] = "layers stacked on axis 0"
    return rules


def _cannot_settle(
    direction: str,
    leaves: Sequence[Leaf],
    shapes: Mapping[str, tuple[int, ...]],
    most: int = 12,
) -> str:
    rules = _rules_for(direction, leaves[0], shapes)
    width = max(map(len, rules))
    rows = "".join(f"    cdb_jax.{rule:{width}}  # {x}\n" for rule, x in rules.items())
    listing = "".join(f"    {leaf.path!r} of shape {leaf.shape}\n" for leaf in leaves[:most])
    if len(leaves) > most:
        listing += f"    and {len(leaves) - most} more\n"
    paths = tuple(leaf.path for leaf in leaves)
    these = f"in {paths}" if len(paths) > 1 else f"== {paths[0]!r}"
    return (
        f"channel_axes: name and rank do not settle which axis holds the {direction} channels of\n"
        f"{listing}Say it with a rule:\n"
        f"    channel_axes=lambda path, leaf: RULE if path {these} else "
        f"cdb_jax.{direction}_channels\n"
        f"where RULE is one of\n{rows}"
        f"(or, if it is right for the whole tree, channel_axes=RULE), or leave alone what has no "
        f"channels with exempt={paths}."
    )
