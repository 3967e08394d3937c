"""Which axes of each leaf hold its channels: a static layout, determined from paths and shapes.

Nothing here reads the values of arrays, so all of this runs once, when a step is traced.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import _conventions as conventions
from cdb_jax._compiling import by_structure
from cdb_jax._conventions import NoChannels as NoChannels

Ints = int | tuple[int, ...]

_MOST_UNSETTLED = 0.1  # The fraction of the weights that may be left alone without an error.


@dataclasses.dataclass(frozen=True)
class Convention:
    """Finds channels by the names and shapes of parameters and biases.

    It is an object rather than a function because `optax.inject_hyperparams` treats every callable
    argument as a schedule.
    """

    direction: conventions.Direction

    def __repr__(self) -> str:
        return f"cdb_jax.{self.direction}_channels"


output_channels = Convention("output")
"""The output features of each layer: `kernel` axis -1, `weight` axis 0 (Equinox, PyTorch)."""

input_channels = Convention("input")
"""The input features of each layer: `kernel` axis -2, `weight` axis 1 (Equinox, PyTorch)."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """The channel axes of a leaf, and the axes that stack several layers in one leaf.

    Args:
      channel: an axis, or several that together index the channels; or `output_channels` or
        `input_channels`, which then find them in the shape without the stack axes. With `()`, the
        whole leaf is one channel, for policies that only drop whole layers.
      stack: the axis or axes along which layers are stacked (scanned blocks, experts). Each index
        is a separate layer, with a separate selection.

    Examples:
      >>> import cdb_jax
      >>> cdb_jax.Axes(-1, stack=0)  # a scanned dense kernel (layers, in, out)
      cdb_jax.Axes(channel=-1, stack=0)
      >>> cdb_jax.Axes(cdb_jax.output_channels, stack=0)  # a subtree of scanned blocks
      cdb_jax.Axes(channel=cdb_jax.output_channels, stack=0)
    """

    channel: Ints | Convention
    stack: Ints = ()

    def __repr__(self) -> str:
        return f"cdb_jax.Axes(channel={self.channel!r}, stack={self.stack!r})"


AxisSpec = int | tuple[int, ...] | Axes | Convention | None
Rule = Callable[[str, Any], AxisSpec]
ChannelAxes = Any  # AxisSpec, a Rule, or a prefix tree of AxisSpecs.


@dataclasses.dataclass(frozen=True)
class SpecTree:
    """A prefix tree of specs by canonical path: hashable, and the same for every framework.

    NNX shows a parameter as `['kernel'].value` in one place and as `['kernel']` in another.
    """

    specs: tuple[tuple[str, AxisSpec], ...]

    def __repr__(self) -> str:
        return repr(dict(self.specs))


class Leaf(NamedTuple):
    """One array of a tree, and the axes that a selection applies to.

    Attributes:
      path: its canonical path.
      shape: its shape.
      channel: the axes that index its channels.
      stack: the axes along which layers are stacked.
      layer: the path whose selection applies: the leaf's path, or for a bias that follows its
        kernel, the kernel's path. None for a leaf without channels.
      reason: why it has no channels; None if it has some.
      convention: the convention that looks for its channels; None if a spec gives them.
      is_default: whether the convention had nothing to go by but the number of axes.
    """

    path: str
    shape: tuple[int, ...]
    channel: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    layer: str | None = None
    reason: NoChannels | None = None
    convention: Convention | None = None
    is_default: bool = False

    @property
    def source(self) -> str:
        """The path under which a selection may hold an entry for this leaf."""
        return self.path if self.layer is None else self.layer

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which a selection varies, in the order of its arrays."""
        return self.stack + self.channel

    @property
    def channels(self) -> int:
        return math.prod(self.shape[axis] for axis in self.channel)

    @property
    def depth(self) -> int:
        """The number of layers that are stacked in the leaf."""
        return math.prod(self.stack_shape)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.stack)


class Layout(NamedTuple):
    """The leaves of a tree in flattening order.

    Attributes:
      leaves: the leaves.
      root: the path of the tree inside a larger model.
      partial: whether the tree is part of a larger model: it has `optax.MaskedNode`s or a root.
    """

    leaves: tuple[Leaf, ...]
    root: str
    partial: bool

    @property
    def layers(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.layer == leaf.path)


class _Rules(NamedTuple):
    """What a policy says about the channels of any tree; see `resolve`. Hashable."""

    channel_axes: AxisSpec | Rule | SpecTree
    exempt: tuple[str, ...]
    only: tuple[str, ...] | None
    share_with_bias: bool
    root: str


def resolve(
    updates: Any,
    channel_axes: ChannelAxes = output_channels,
    *,
    exempt: Sequence[str] = (),
    only: Sequence[str] | None = None,
    share_with_bias: bool = False,
    root: str = "",
    may_be_empty: bool = False,
) -> Layout:
    """Finds the layers of a tree and the channel axes of each.

    Args:
      updates: a tree of arrays or `jax.ShapeDtypeStruct`; only paths, shapes and dtypes are read.
      channel_axes: an `Axes`, int, tuple, convention or None; a prefix tree of these; or a rule
        `(path, leaf)` that returns one of these.
      exempt: path patterns of leaves to leave alone.
      only: path patterns that limit the search; None for no limit.
      share_with_bias: whether a bias is dropped with the kernel of its layer.
      root: path of `updates` within the model it was cut from.
      may_be_empty: whether to accept a tree in which no leaf has channels.

    Raises:
      TypeError, ValueError: if a spec is malformed or does not fit the tree, a pattern matches
        nothing, names and shapes do not determine the channels of many weights, two leaves share a
        path, or nothing can be dropped.
    """
    only = None if only is None else tuple(only)
    rules = _Rules(as_specs(channel_axes), tuple(exempt), only, share_with_bias, root)
    layout = _resolve(updates, rules)
    if layout.leaves and not layout.layers and not layout.partial and not may_be_empty:
        raise ValueError(_nothing_to_drop(rules, layout.leaves))
    return layout


@by_structure
def _resolve(updates: Any, rules: _Rules) -> Layout:
    arrays, masked, absent = _parts_of(updates, rules.root)
    is_partial = bool(masked) or bool(rules.root)
    _check_unique(arrays)
    if not is_partial:
        check_matches("exempt", rules.exempt, [*arrays, *absent])
        check_matches("only", rules.only or (), [*arrays, *absent])
        _check_specs(rules.channel_axes, list(arrays), [*masked, *absent])
    shapes = {path: tuple(getattr(x, "shape", ())) for path, (x, *_) in arrays.items()}
    tree = conventions.Tree(shapes)
    leaves = [_resolve_leaf(path, x, rules, tree) for path, (x, *_) in arrays.items()]
    _check_settled(leaves)
    if rules.share_with_bias:
        by_path = {leaf.path: leaf for leaf in leaves}
        leaves = [_follow_kernel(leaf, by_path, masked) for leaf in leaves]
    layout = Layout(tuple(leaves), rules.root, is_partial)
    _check_ids([layer.path for layer in layout.layers])
    return layout


def _parts_of(updates: Any, root: str) -> tuple[dict[str, list[Any]], list[str], list[str]]:
    """Returns the arrays by path, the paths of `MaskedNode`s, and the paths of Nones.

    None stands for a parameter that the model does not have or that has no gradient.
    """

    def is_empty(x: Any) -> bool:
        return x is None or is_masked(x)

    arrays: dict[str, list[Any]] = collections.defaultdict(list)
    masked, absent = [], []
    for keys, x in jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_empty):
        path = canonical_path(keys, root)
        if is_masked(x):
            masked.append(path)
        elif x is None:
            absent.append(path)
        else:
            arrays[path].append(x)
    return arrays, masked, absent


def _nothing_to_drop(rules: _Rules, leaves: Sequence[Leaf]) -> str:
    listing = "\n".join(
        f"  {leaf.path or '(the tree itself)'}: {leaf.reason and leaf.reason.value}"
        for leaf in leaves[:20]
    )
    mend = "name the channel axis, such as channel_axes=-1"
    if any(leaf.reason in (NoChannels.EXEMPT, NoChannels.NOT_NAMED) for leaf in leaves):
        mend += ", or change exempt or only"
    return (
        f"channel_axes={rules.channel_axes!r}, exempt={rules.exempt!r} and only={rules.only!r} "
        f"leave nothing to drop in this tree; {mend}. Its leaves:\n{listing}"
    )


@by_structure
def same_layout(tree: Any, layout: Layout) -> Layout:
    """Looks up the leaves of a tree in the layout of the same tree or of a larger one.

    Raises:
      ValueError: for a leaf that the layout does not have, or whose shape is different there.
    """
    known = {leaf.path: leaf for leaf in layout.leaves}
    leaves = []
    for keys, x in jax.tree_util.tree_leaves_with_path(tree):
        path, shape = canonical_path(keys, layout.root), tuple(getattr(x, "shape", ()))
        if path not in known:
            raise ValueError(
                f"selection has no entry for {path!r} of shape {shape}; it was made for a tree "
                f"with the paths {_shorten(known)}. Make it from the tree that you use it on."
            )
        if shape != known[path].shape:
            raise ValueError(
                f"selection: {path!r} has shape {shape}, but the selection was made for shape "
                f"{known[path].shape}; make it from the tree that you use it on."
            )
        leaves.append(known[path])
    return Layout(tuple(leaves), layout.root, layout.partial)


def check_parameters(
    updates: Any, params: Any, root: str, source: str = "its parameter has"
) -> None:
    """Raises a ValueError if the shape of an update differs from that of its parameter."""

    def shapes(tree: Any) -> list[Any]:
        return [getattr(x, "shape", None) for x in jax.tree.leaves(tree)]

    if params is None or shapes(updates) == shapes(params):
        return
    expected = shapes_by_path(params, root)
    for path, shape in shapes_by_path(updates, root).items():
        if shape != expected.get(path, shape):
            raise ValueError(
                f"updates: {path!r} has shape {shape}, but {source} shape {expected[path]}, so its "
                "channels are unknown. "
                f"{_shape_advice(shape, expected[path])}"
            )


def _shape_advice(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    advice = "First apply the transformation that gives updates the shapes of the parameters"
    if shape[1:] == expected:
        return (
            f"{advice}; for per-example gradients: optax.chain("
            "optax.contrib.differentially_private_aggregate(...), cdb_jax.channel_drop_back(...))."
        )
    if len(shape) == len(expected):
        return (
            f"{advice}. Only cdb_jax.compact accepts the gradients of value_and_grad(..., "
            "kept_only=True)."
        )
    return f"{advice}."


def shapes_by_path(tree: Any, root: str) -> dict[str, tuple[int, ...]]:
    """The shape of each array, by canonical path."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {canonical_path(keys, root): x.shape for keys, x in pairs if hasattr(x, "shape")}


# Paths.


def canonical_path(keys: Sequence[Any], root: str = "") -> str:
    """The path of a leaf as users write it, without boxes or the collection `params`."""
    # Only an *attribute* called `value` is a box (nnx.Variable, nn.Partitioned); the dictionary
    # key `value` names an attention projection.
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    if keys and jax.tree_util.keystr((keys[0],), simple=True) == "params":
        keys = keys[1:]
    path = jax.tree_util.keystr(tuple(keys), simple=True, separator="/")
    return "/".join(part for part in (root, path) if part)


def is_below(path: str, top: str) -> bool:
    return top == "" or path == top or path.startswith(top + "/")


def covers(pattern: str, path: str) -> bool:
    """Whether a glob pattern matches a path or anything above it."""
    return matching_prefix(pattern, path) is not None


def is_covered(patterns: Iterable[str], path: str) -> bool:
    """Whether any of several patterns covers a path."""
    return any(covers(pattern, path) for pattern in patterns)


def matching_prefix(pattern: str, path: str) -> str | None:
    """The shortest path that a glob pattern matches, from the given one and those above it."""
    parts = path.split("/")
    prefixes = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if fnmatch.fnmatchcase(prefix, pattern)), None)


def layer_id(path: str) -> int:
    """The first 32 bits of the SHA-256 of a canonical path; each layer's draw depends on them."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")


def _check_unique(arrays: Mapping[str, Sequence[Any]]) -> None:
    for path, found in arrays.items():
        if len(found) > 1:
            raise ValueError(
                f"{len(found)} leaves of the tree have the path {path!r} once `params` and "
                "`.value` are removed; rename all but one."
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


def check_matches(name: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    for pattern in patterns:
        if not _matches_any(pattern, paths):
            raise ValueError(
                f"{name}: the pattern {pattern!r} matches none of the paths {_shorten(paths)}; "
                f"{_pattern_advice(pattern, paths)}."
            )


def _matches_any(pattern: str, paths: Sequence[str]) -> bool:
    return any(covers(pattern, path) for path in paths)


def _pattern_advice(pattern: str, paths: Sequence[str]) -> str:
    """What to write in place of a pattern that matches nothing."""
    better, notes = pattern.removeprefix("params/"), ""
    if better != pattern:
        notes += "; a leading params is left out"
    if better.endswith("/"):
        better, notes = better.rstrip("/"), f"{notes}; drop the slash at the end"
    if not _matches_any(better, paths):
        better, notes = f"*/{better}", f" to match it at any depth{notes}"
    return f"use {better!r}{notes}" if _matches_any(better, paths) else "correct it or remove it"


def _shorten(paths: Collection[str], most: int = 12) -> str:
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(repr(path) for path in list(paths)[:most]) + more


# Specs: what the user says about a tree, as one spec per leaf.


def is_masked(x: Any) -> bool:
    """Whether a node is what `optax.masked` puts in place of a leaf."""
    return isinstance(x, optax.MaskedNode)


def _is_spec(x: Any) -> bool:
    if isinstance(x, tuple):
        return all(isinstance(i, int) for i in x) and not hasattr(x, "_fields")
    return x is None or isinstance(x, (int, Axes, Convention))


def as_specs(channel_axes: ChannelAxes) -> AxisSpec | Rule | SpecTree:
    """Checks the argument `channel_axes`, and turns a tree of specs into a `SpecTree`."""
    if isinstance(channel_axes, jax.Array):
        raise TypeError(
            "channel_axes must be static, got an array; under inject_hyperparams, list it in "
            'static_args=("channel_axes",).'
        )
    if isinstance(channel_axes, (str, bool, float)):
        raise TypeError(
            f"channel_axes must be output_channels, input_channels, an int, a tuple of ints, Axes, "
            f"a tree of these or a rule (path, leaf) -> spec, got {channel_axes!r}."
        )
    if _is_spec(channel_axes) or isinstance(channel_axes, SpecTree):
        return channel_axes
    # A model that serves as a prefix tree may have a `__call__`; a rule is not a tree.
    if callable(channel_axes) and jax.tree_util.all_leaves([channel_axes]):
        return channel_axes
    pairs = jax.tree_util.tree_leaves_with_path(channel_axes, is_leaf=_is_spec)
    specs = {canonical_path(keys): spec for keys, spec in pairs if not is_masked(spec)}
    for path, spec in specs.items():
        _check_spec(spec, f"the tree of specs has {spec!r} at {path!r}")
    return SpecTree(tuple(specs.items()))


def _check_spec(spec: Any, found: str) -> None:
    if not _is_spec(spec):
        raise ValueError(
            f"channel_axes: {found}; expected an int, a tuple of ints, Axes, a convention such as "
            "cdb_jax.output_channels, or None."
        )


def _check_specs(specs: Any, paths: Sequence[str], hidden: Sequence[str]) -> None:
    """Raises a ValueError for a tree of specs with a path that the tree of updates does not have.

    Updates may lie below a spec; `hidden` nodes (MaskedNode or None) may also lie above one.
    """
    for top, _ in specs.specs if isinstance(specs, SpecTree) else ():
        is_found = any(is_below(path, top) for path in [*paths, *hidden])
        if not is_found and not any(is_below(top, path) for path in hidden):
            raise ValueError(
                f"channel_axes: the tree of specs has {top!r}, but the updates have no such path; "
                f"their paths are {_shorten(paths)}."
            )


def _spec_of(path: str, x: Any, channel_axes: AxisSpec | Rule | SpecTree) -> tuple[AxisSpec, bool]:
    """Returns the spec of a leaf, and whether it was given for exactly this leaf."""
    if callable(channel_axes):
        spec = channel_axes(path, x)
        _check_spec(spec, f"the rule for {path!r} returned {spec!r}")
        return spec, True
    if not isinstance(channel_axes, SpecTree):
        return channel_axes, False
    specs, top = dict(channel_axes.specs), path
    while top not in specs:
        if not top:
            raise ValueError(
                f"channel_axes: the tree of specs has no entry for {path!r}; add a spec there or "
                "above it (None leaves a leaf alone)."
            )
        top = top.rpartition("/")[0]
    return specs[top], top == path


# Leaves.


def _check_settled(leaves: Sequence[Leaf]) -> None:
    """Raises a ValueError if much of a tree is not settled; a single odd leaf is left alone."""
    settled = sum(leaf.size for leaf in leaves if leaf.layer is not None)
    for convention in (output_channels, input_channels):
        asked = [leaf for leaf in leaves if leaf.convention == convention]
        unsettled = [leaf for leaf in asked if leaf.reason in conventions.UNSETTLED]
        size = sum(leaf.size for leaf in unsettled)
        is_odd = size <= _MOST_UNSETTLED * (settled + size) or (len(unsettled) == 1 and settled)
        if not is_odd or any(leaf.reason is NoChannels.CONTRADICTED for leaf in unsettled):
            lines = [f"{leaf.path!r} of shape {leaf.shape}" for leaf in unsettled]
            complaint = ", which names and shapes do not determine for:"
            raise ValueError(conventions.message(convention.direction, complaint, lines))


def _resolve_leaf(path: str, x: Any, rules: _Rules, tree: conventions.Tree) -> Leaf:
    leaf = Leaf(path, tree.shapes[path])
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact) or 0 in leaf.shape:
        return leaf._replace(reason=NoChannels.NO_VALUES)
    if is_covered(rules.exempt, path):
        return leaf._replace(reason=NoChannels.EXEMPT)
    if rules.only is not None and not is_covered(rules.only, path):
        return leaf._replace(reason=NoChannels.NOT_NAMED)
    spec, is_for_leaf = _spec_of(path, x, rules.channel_axes)
    if spec is None:
        return leaf._replace(reason=NoChannels.SPEC_IS_NONE)
    if spec == ():
        raise ValueError(
            f"channel_axes: () for {path!r} names no channel axis; use Axes(()) to treat the whole "
            "leaf as one channel."
        )
    axes = spec if isinstance(spec, Axes) else Axes(spec)
    stack = _normalise(axes.stack, leaf)
    if isinstance(axes.channel, Convention):
        direction = axes.channel.direction
        by_name = conventions.channel_axes(direction, path, leaf.shape, stack, tree)
        leaf = leaf._replace(convention=axes.channel)
        if isinstance(by_name, NoChannels):
            return leaf._replace(reason=by_name)
        found, stack = by_name.channel, by_name.stack
        leaf = leaf._replace(is_default=by_name.is_default)
    elif len(leaf.shape) - len(stack) < 2 and not is_for_leaf and axes.channel != ():
        return leaf._replace(reason=conventions.few_dimensions(stack))
    else:
        found = _normalise(axes.channel, leaf)
    if set(found) & set(stack):
        raise ValueError(
            f"channel_axes: {spec!r} for {path!r} of shape {leaf.shape} uses an axis both as a "
            "channel and as a stack axis."
        )
    return leaf._replace(channel=found, stack=stack, layer=path)


def _normalise(axes: Ints, leaf: Leaf) -> tuple[int, ...]:
    axes, rank = (axes,) if isinstance(axes, int) else axes, len(leaf.shape)
    for axis in axes:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"channel_axes: axis {axis!r} for {leaf.path!r} is not an int.")
        if not -rank <= axis < rank:
            raise ValueError(
                f"channel_axes: axis {axis} is out of range for {leaf.path!r} of shape "
                f"{leaf.shape}; name one of its axes, or None to leave it alone."
            )
    positive = tuple(sorted(axis % rank for axis in axes))
    if len(set(positive)) < len(positive):
        raise ValueError(
            f"channel_axes: {axes} for {leaf.path!r} of shape {leaf.shape} repeats an axis; name "
            "each axis once."
        )
    return positive


def _follow_kernel(leaf: Leaf, by_path: Mapping[str, Leaf], masked: Sequence[str]) -> Leaf:
    """Lets a bias use the selection of the kernel of its layer."""
    is_excluded = leaf.reason in (NoChannels.EXEMPT, NoChannels.NOT_NAMED, NoChannels.NO_VALUES)
    if conventions.last_names(leaf.path)[1] != "bias" or is_excluded:
        return leaf
    kernels = [conventions.sibling(leaf.path, name) for name in ("kernel", "weight")]
    for path in kernels:
        if path in masked:
            raise ValueError(
                f"share_with_bias: {leaf.path!r} follows {path!r}, which is masked out of this "
                "tree; put both under the same mask or label."
            )
    kernel = next((by_path[path] for path in kernels if path in by_path), None)
    if kernel is None or kernel.layer is None:
        return leaf
    lead = kernel.stack_shape + tuple(kernel.shape[axis] for axis in kernel.channel)
    # Equinox convolutions keep trailing ones for the spatial dimensions: (out, 1, 1).
    if leaf.shape != lead + (1,) * (len(leaf.shape) - len(lead)):
        raise ValueError(
            f"share_with_bias: {leaf.path!r} of shape {leaf.shape} cannot follow the channels "
            f"{lead} of {kernel.path!r}; use output channels, or exempt the bias."
        )
    axes, depth = tuple(range(len(lead))), len(kernel.stack)
    return leaf._replace(stack=axes[:depth], channel=axes[depth:], layer=kernel.path, reason=None)
