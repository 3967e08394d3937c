"""`Selection`: which channels learn in one step."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax import _scaling, channels
from cdb_jax._checks import check_choice, parameters_of, short
from cdb_jax._compiling import compiled
from cdb_jax._xla import unstack

if TYPE_CHECKING:
    from cdb_jax.policy import Policy


class Mode(enum.IntEnum):
    """What a layer does in one step."""

    FROZEN = 0
    PARTIAL = 1  # Only the kept channels learn.
    FULL = 2


class Arrangement(enum.Enum):
    """How the kept channels of a block are arranged, and what the place of a part holds."""

    # A contiguous run that wraps around. The place is its first channel: an int32 scalar.
    WINDOW = "window"
    # One of the equal chunks of the block. The place is its first channel: an int32 scalar.
    CHUNK = "chunk"
    # Channels anywhere. The place holds their positions in ascending order: int32, `(kept,)`.
    SCATTERED = "scattered"


class Part(NamedTuple):
    """How many channels of a layer are kept, and how they are arranged. Static.

    The channels form `blocks` equal blocks of `size` channels. Each block keeps `kept` channels, at
    the same positions. The *place* of a part says which ones; see `Arrangement`.
    """

    blocks: int
    size: int
    kept: int
    arrangement: Arrangement

    @property
    def total(self) -> int:
        """The number of kept channels."""
        return self.blocks * self.kept

    def shape(self, shape: Sequence[int], channel: Sequence[int]) -> tuple[int, ...]:
        """The shape of the kept part of an array whose channels lie along the axes `channel`."""
        if not channel:
            return tuple(shape)
        left = [1 if axis in channel else size for axis, size in enumerate(shape)]
        left[channel[-1]] = self.total
        return tuple(left)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """Layers with the same number of channels. Each array has one row per layer.

    A leaf that stacks several layers has a row for each of them.

    Attributes:
      mode: what each layer does, as a `Mode`.
      keep: which channels learn.
      scale: what `channel_drop_back` multiplies the kept channels by; None for 1.
      place: where the kept part of a `PARTIAL` layer lies; see `Part`. None if `part` is None.
      layers: the leaves. Static.
      modes: every mode that any of the layers may have. Static.
      part: the part that a `PARTIAL` layer keeps; None if its size is not static. Static.
    """

    mode: jax.Array  # shape=(rows,), dtype=jnp.int32
    keep: jax.Array  # shape=(rows, channels), dtype=jnp.bool
    scale: jax.Array | None  # shape=(rows,), dtype=jnp.float32
    place: jax.Array | None  # shape=(rows,) or (rows, kept), dtype=jnp.int32
    layers: tuple[channels.Leaf, ...] = dataclasses.field(metadata=dict(static=True))
    modes: tuple[Mode, ...] = dataclasses.field(metadata=dict(static=True))
    part: Part | None = dataclasses.field(metadata=dict(static=True))

    @property
    def kept_index(self) -> jax.Array:
        """The index of each channel among the kept ones of its layer; `channels` if it is dropped.

        int32, shape `(rows, channels)`.
        """
        index = jnp.cumsum(self.keep, axis=-1, dtype=jnp.int32) - 1
        return jnp.where(self.keep, index, np.int32(self.keep.shape[-1]))


def positions_of(keep: jax.Array, kept: int) -> jax.Array:
    """The positions of the kept channels of each row, in ascending order: int32, `(rows, kept)`.

    If a row keeps fewer, its last entries are the number of channels.
    """
    width = keep.shape[1]
    channel = np.arange(width, dtype=np.int32)[None]
    return jnp.sort(jnp.where(keep, channel, np.int32(width)), axis=1)[:, :kept]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Which channels learn in one step, and what happens to the others.

    `Policy.select` draws a selection; `Selection.of` makes one from channels that you choose. Pass
    it to everything that takes part in the step: to `cdb_jax.value_and_grad`, and to the `update`
    of an optimizer that contains `channel_drop_back`, `freeze_dropped` or `compact`. A selection is
    a pytree of small arrays, so it can be an argument or a result of any JAX transformation.

    Attributes:
      groups: the layers, grouped by their number of channels.
      policy: the policy that it was drawn from; None if you chose the channels.
      layout: the leaves of the tree that it was made for. Static.
      freezes_others: whether leaves without channels are frozen too. Static.
    """

    groups: tuple[Group, ...]
    policy: Policy | None
    layout: channels.Layout = dataclasses.field(metadata=dict(static=True))
    freezes_others: bool = dataclasses.field(metadata=dict(static=True))

    def __repr__(self) -> str:
        """One line, without waiting for arrays on a device."""
        depth = sum(layer.depth for layer in self.layout.layers)
        source = "with chosen channels" if self.policy is None else "of Policy(...)"
        return f"Selection({depth} {'layer' if depth == 1 else 'layers'} {source})"

    @classmethod
    def of(
        cls,
        params: Any,
        chosen: Mapping[str, Any],
        *,
        channel_axes: channels.ChannelAxes = channels.output_channels,
        others: Literal["full", "frozen"] = "full",
    ) -> Selection:
        """Makes a selection from channels that you choose.

        `cdb_jax.value_and_grad` then computes gradients for these parts of the parameters only.

        Args:
          params: the parameters; only paths, shapes and dtypes are read.
          chosen: a dict from path or path pattern to the channels that learn: a list of ints, or an
            int array of shape `(k,)`, or `(*stack, k)` for stacked layers. Negative channels count
            from the end. The array may be traced: repeated channels then count once, and those out
            of range are ignored (with `kept_only`, k channels must remain). An empty list freezes
            all leaves that the pattern covers, and `...` lets them learn in full.
          channel_axes: which axes hold the channels of the leaves in `chosen`, as in `Policy`. The
            only axis of a vector holds its channels, unless a tree or a rule says otherwise.
          others: whether the other leaves learn in "full" or are "frozen".

        Raises:
          TypeError, ValueError: if `chosen` is empty; for a pattern that matches nothing, a leaf
            without channels, or channels that are out of range or repeated.

        Examples:
          >>> import cdb_jax, jax, jax.numpy as jnp
          >>> params = {"embed": {"embedding": jnp.ones((5, 2))}}
          >>> rows = cdb_jax.Selection.of(params, {"embed/embedding": [1, 4]}, channel_axes=0)
          >>> loss = lambda params, x: jnp.sum(x @ params["embed"]["embedding"].T)
          >>> cdb_jax.grad(loss)(params, jnp.ones((3, 2)), selection=rows)["embed"]["embedding"].T
          Array([[0., 3., 0., 0., 3.],
                 [0., 3., 0., 0., 3.]], dtype=float32)
        """
        check_choice("others", others, ("full", "frozen"))
        if not isinstance(chosen, Mapping):
            raise TypeError(
                "chosen must be a dict from path to channels, such as {'head/kernel': [0, 5]}, got "
                f"{short(chosen)}."
            )
        if not chosen:
            raise ValueError(
                "chosen={} names nothing; give at least one path, such as {'head/kernel': [0, 5]}, "
                "or {'*': ...} for everything."
            )
        for pattern, place in chosen.items():
            _check_not_nested(pattern, place)
            _check_not_ragged(pattern, place)
        params = parameters_of(params)
        paths = [channels.canonical_path(keys) for keys, _ in jax.tree.leaves_with_path(params)]
        channels.check_matches("chosen", chosen, paths)
        specs = _specs_of_chosen(channel_axes, chosen, paths)
        layout = channels.resolve(params, specs, only=tuple(chosen), may_be_empty=True)
        places = _chosen_by_path(layout, chosen)
        groups, full, frozen = [], [], []
        for layer in layout.layers:
            place = places[layer.path]
            if place is ...:
                full.append(layer)
            elif _is_whole(place):
                frozen.append(layer)
            else:
                groups.append(_chosen_group(layer, place))
        if others == "frozen":
            unnamed = channels.NoChannels.NOT_NAMED
            frozen += [leaf for leaf in layout.leaves if leaf.reason is unnamed]
        groups += whole_group(full, Mode.FULL) + whole_group(frozen, Mode.FROZEN)
        return cls(tuple(groups), None, layout, others == "frozen")

    @property
    def factors(self) -> dict[str, jax.Array]:
        """The factor of each channel of each layer, by path.

        Each array is float32 of shape `(*stack, channels)`: 0 for a dropped channel, and 1 or the
        factor of `rescale` for a kept one. A leaf without channel axes, which is frozen or learns
        as a whole, has shape `(1,)`.
        """
        return _factors_once(self.layout, self.groups)

    @property
    def modes(self) -> dict[str, jax.Array]:
        """The `Mode` of each layer, by path: int32, with the shape of its stack."""
        return _modes_once(self.layout, self.groups)

    @property
    def dropped_fraction(self) -> jax.Array:
        """The fraction of the parameters of all layers that is dropped: float32, a scalar."""
        return fraction_of(self.groups, self.layout)

    def mask(self, tree: Any, *, rescale: bool = False) -> Any:
        r"""Sets every dropped channel to zero, even if it holds a NaN.

        Kept channels do not change, unless `rescale=True`.

        Args:
          tree: gradients, updates or parameters: the tree that the selection was made for, or a
            part of it with the same paths and shapes.
          rescale: whether to apply the policy's `rescale`.

        Returns:
          The masked tree, with the structure, shapes, dtypes and shardings of `tree`.

        Raises:
          ValueError: for a leaf whose path or shape the selection was not made for.

        Examples:
          >>> import cdb_jax, jax.numpy as jnp
          >>> params = {"kernel": jnp.ones((2, 4))}
          >>> selection = cdb_jax.Policy(0.5, key=0, channel_choice="exact").select(params, step=7)
          >>> selection.mask(params)
          {'kernel': Array([[0., 1., 0., 1.],
                 [0., 1., 0., 1.]], dtype=float32)}
        """
        leaves, treedef = jax.tree.flatten(tree)
        layout = channels.same_layout(tree, self.layout)
        return jax.tree.unflatten(treedef, _mask_once((layout, rescale), self.groups, leaves))


def check_selection(selection: Any) -> Selection:
    """Returns the selection itself; raises a TypeError for anything else."""
    if isinstance(selection, Selection):
        return selection
    mend = ""
    if isinstance(selection, tuple):
        mend = "; only the optimizer's update takes a tuple of selections"
    raise TypeError(
        f"selection must be a cdb_jax.Selection such as policy.select(params, step), got "
        f"{short(selection)}{mend}."
    )


# What a selection computes. Outside `jit`, each function runs as one compiled program.


@compiled
def _factors_once(_: channels.Layout, groups: Sequence[Group]) -> dict[str, jax.Array]:
    scale = _scales(groups)
    factors = {}
    for path, keep in per_layer(groups, "keep").items():
        factor = scale[path][..., None] if path in scale else np.float32(1.0)
        factors[path] = jnp.where(keep, factor, np.float32(0.0))
    return factors


@compiled
def _modes_once(_: channels.Layout, groups: Sequence[Group]) -> dict[str, jax.Array]:
    return per_layer(groups, "mode")


@compiled
def _mask_once(
    static: tuple[channels.Layout, bool], groups: Sequence[Group], leaves: Sequence[Any]
) -> list[Any]:
    layout, rescale = static
    return mask_leaves(leaves, layout, groups, rescale=rescale)


def mask_leaves(
    leaves: Sequence[Any],
    layout: channels.Layout,
    groups: Sequence[Group],
    *,
    rescale: bool,
    done: Collection[str] = (),
) -> list[Any]:
    """`Selection.mask` for the leaves of a layout; a leaf that is None stays None.

    Leaves whose paths are in `done` already have zeros in their dropped channels.
    """
    keep = kept_channels(groups)
    scale = _scales(groups) if rescale else {}
    return [
        None if x is None else _masked(x, leaf, {} if leaf.path in done else keep, scale)
        for x, leaf in zip(leaves, layout.leaves, strict=True)
    ]


def _masked(
    x: jax.Array,
    leaf: channels.Leaf,
    keep: Mapping[str, jax.Array],
    scale: Mapping[str, jax.Array],
) -> jax.Array:
    if leaf.source in scale:
        factor = broadcastable(scale[leaf.source], leaf, leaf.stack)
        # Even a product with 1 can flush a subnormal number to zero.
        x = jnp.where(factor == 1, x, _scaling.scale(x, factor))
    if leaf.source in keep:
        # `where` instead of a product with zero, because NaN times zero is NaN.
        where = broadcastable(keep[leaf.source], leaf, leaf.axes)
        x = jnp.where(where, x, jnp.zeros((), x.dtype))
    return x


def broadcastable(vector: jax.Array, leaf: channels.Leaf, axes: Sequence[int]) -> jax.Array:
    """Reshapes an array over some axes of a leaf to the leaf's rank, with size 1 elsewhere."""
    vector = vector.reshape([leaf.shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return jnp.expand_dims(vector, [i for i in range(len(leaf.shape)) if i not in axes])


def kept_channels(groups: Sequence[Group]) -> dict[str, jax.Array]:
    """Which channels of each layer learn, by path: bool, shape `(*stack, channels)`.

    Layers that always learn in full are left out.
    """
    return per_layer([group for group in groups if group.modes != (Mode.FULL,)], "keep")


def _scales(groups: Sequence[Group]) -> dict[str, jax.Array]:
    """The factor of the kept channels of each layer, by path, where it may differ from 1."""
    return per_layer([group for group in groups if group.scale is not None], "scale")


def per_layer(groups: Sequence[Group], field: str) -> dict[str, jax.Array]:
    """Each layer's rows of an array of its group, by path; XLA computes the array only once.

    The rows of a layer have shape `(*stack, ...)`.
    """
    matrices = [getattr(group, field) for group in groups]
    stacks = [[layer.stack_shape for layer in group.layers] for group in groups]
    return {
        layer.path: rows
        for group, blocks in zip(groups, unstack(matrices, stacks), strict=True)
        for layer, rows in zip(group.layers, blocks, strict=True)
    }


def fraction_of(groups: Sequence[Group], layout: channels.Layout) -> jax.Array:
    """`Selection.dropped_fraction`, counting only the leaves of a layout."""
    size: dict[str, int] = {}
    for leaf in layout.leaves:  # A bias that is dropped with its kernel counts with it.
        size[leaf.source] = size.get(leaf.source, 0) + leaf.size
    total = sum(size.get(layer.path, 0) for group in groups for layer in group.layers)
    fraction = jnp.zeros((), jnp.float32)
    for group in groups:
        shares = [size.get(layer.path, 0) / layer.depth / max(total, 1) for layer in group.layers]
        weights = np.repeat(shares, [layer.depth for layer in group.layers]).astype(np.float32)
        fraction += jnp.sum(weights * jnp.mean(~group.keep, axis=1, dtype=jnp.float32))
    return fraction


def whole_group(leaves: Iterable[channels.Leaf], mode: Mode) -> list[Group]:
    """Returns one group of leaves that are frozen or learn in full; none if there are no leaves."""
    layers = tuple(leaves)
    if not layers:
        return []
    modes = jnp.full(len(layers), mode, jnp.int32)
    keep = jnp.full((len(layers), 1), mode == Mode.FULL)
    return [Group(modes, keep, None, None, layers, (mode,), None)]


# Channels that the user chooses.


def _chosen_by_path(layout: channels.Layout, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The channels that were chosen for each layer, by path."""
    found = {}
    for leaf in layout.leaves:
        patterns = [pattern for pattern in chosen if channels.covers(pattern, leaf.path)]
        if not patterns:
            continue
        if len(patterns) > 1:
            raise ValueError(
                f"chosen: {leaf.path!r} matches several patterns, {patterns}; keep one of them."
            )
        if leaf.reason is channels.NoChannels.NO_VALUES and _is_whole(chosen[patterns[0]]):
            continue  # It has nothing to differentiate.
        if leaf.reason:
            raise ValueError(
                f"chosen: {leaf.path!r} of shape {leaf.shape} has no channels "
                f"({leaf.reason.value}); use [] to freeze the whole leaf or the Ellipsis `...` to "
                "train it, or set channel_axes."
            )
        found[leaf.path] = chosen[patterns[0]]
    return found


def _chosen_group(layer: channels.Leaf, chosen: Any) -> Group:
    """A group of one layer with the given channels."""
    width, stack = layer.channels, layer.stack_shape
    place = _checked_channels(layer, chosen)
    kept = place.shape[-1]
    place = jnp.broadcast_to(place, (*stack, kept)).reshape(layer.depth, kept)
    is_traced = isinstance(place, jax.core.Tracer)
    mode = Mode.FULL if kept == width and not is_traced else Mode.PARTIAL
    keep = jnp.zeros((layer.depth, width), bool)
    keep = keep.at[jnp.arange(layer.depth)[:, None], place].set(True)
    modes = jnp.full(layer.depth, mode, jnp.int32)
    if mode == Mode.FULL:
        return Group(modes, keep, None, None, (layer,), (mode,), None)
    # Traced channels may be repeated or out of range, so what is computed must follow from `keep`.
    part = Part(1, width, kept, Arrangement.SCATTERED)
    return Group(modes, keep, None, positions_of(keep, kept), (layer,), (mode,), part)


def _checked_channels(layer: channels.Leaf, chosen: Any) -> jax.Array | np.ndarray:
    """The channels of a layer as an int array, checked if their values are known."""
    is_traced = isinstance(chosen, jax.core.Tracer)
    place = chosen if is_traced else np.asarray(chosen)
    if not is_traced and place.dtype.kind == "u":
        place = place.astype(np.int64)
    shapes = {place.shape[-1:], (*layer.stack_shape, *place.shape[-1:])}
    if not jnp.issubdtype(place.dtype, jnp.integer) or not place.shape or place.shape not in shapes:
        stack = "".join(f"{size}, " for size in layer.stack_shape)
        raise TypeError(
            f"chosen: the channels of {layer.path!r} must be ints of shape (k,)"
            f"{f' or ({stack}k)' if stack else ''}, got {short(chosen)}; use [3] for one channel, "
            "range(4) for the first four, np.flatnonzero(mask) for a mask, or the Ellipsis `...` "
            "for all channels."
        )
    if is_traced:
        return place
    width = layer.channels
    if place.min() < -width or place.max() >= width:
        raise ValueError(
            f"chosen: {layer.path!r} has {width} channels, so use indices from 0 to {width - 1}; "
            f"got {short(chosen)}."
        )
    place = np.sort(place % width, axis=-1)
    if np.any(place[..., 1:] == place[..., :-1]):
        raise ValueError(
            f"chosen: {layer.path!r} has repeated channels, got {short(chosen)}; list each only "
            "once."
        )
    return place.astype(np.int32)


def _specs_of_chosen(
    channel_axes: channels.ChannelAxes, chosen: Mapping[str, Any], paths: Iterable[str]
) -> channels.ChannelAxes:
    """The channel axes of chosen leaves; those that learn in full or not at all need none."""
    spec = channels.as_specs(channel_axes)
    whole = tuple(pattern for pattern, place in chosen.items() if _is_whole(place))
    if isinstance(spec, channels.SpecTree):
        covered = (path for path in paths if channels.is_covered(whole, path))
        return channels.SpecTree((*spec.specs, *((path, channels.Axes(())) for path in covered)))
    return _ChosenAxes(spec, whole)


def _check_not_nested(pattern: str, place: Any) -> None:
    path, inner = pattern, place
    while isinstance(inner, Mapping) and inner:
        key, inner = next(iter(inner.items()))
        path = f"{path}/{key}"
    if isinstance(place, Mapping):
        raise TypeError(
            f"chosen: {pattern!r} has a dict, got {short(place)}; use paths as keys, and write "
            f"{path!r}: {short(inner)}."
        )


def _check_not_ragged(pattern: str, place: Any) -> None:
    try:
        np.shape(place)
    except ValueError:
        raise ValueError(
            f"chosen: {pattern!r} has lists of different lengths, got {short(place)}; choose "
            "equally many channels for each of the stacked layers."
        ) from None


def _is_whole(place: Any) -> bool:
    """Whether a choice is `...`, which means all channels, or empty."""
    return place is ... or np.size(place) == 0


@dataclasses.dataclass(frozen=True)
class _ChosenAxes:
    """A hashable rule, so that each layout is resolved only once."""

    spec: channels.AxisSpec | channels.Rule
    whole: tuple[str, ...]

    def __repr__(self) -> str:
        return repr(self.spec)

    def __call__(self, path: str, leaf: Any) -> channels.AxisSpec:
        if channels.is_covered(self.whole, path):
            return channels.Axes(())
        if callable(self.spec):
            return self.spec(path, leaf)
        return 0 if len(leaf.shape) == 1 else self.spec
