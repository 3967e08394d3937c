"""Finds which parameter each entry of an optimizer state belongs to, and along which axes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cdb_jax import channels
from cdb_jax._compiling import by_structure

Shape = tuple[int, ...]
SlotAxes = Callable[[str, Shape | None, Shape], tuple[int | None, ...] | None]
Rules = tuple[tuple[type, SlotAxes], ...]


class Slot(NamedTuple):
    """The parameter that an entry of an optimizer state belongs to.

    Attributes:
      parameter: its position among the leaves of the updates.
      axes: for each axis of the entry, the parameter axis it corresponds to, or None.
    """

    parameter: int
    axes: tuple[int | None, ...]


def checked_rules(slot_axes: Mapping[type, SlotAxes]) -> Rules:
    """Returns the given rules, and the built-in ones for other classes."""
    for owner, rule in slot_axes.items():
        if not isinstance(owner, type) or not callable(rule):
            raise TypeError(
                f"slot_axes must map classes of optimizer states to functions, got {owner!r}: "
                f"{rule!r}; write slot_axes={{StateClass: lambda field, shape, entry_shape: axes}}."
            )
    return tuple((RULES | dict(slot_axes)).items())


@by_structure
def find(
    state_and_updates: tuple[Any, Any], layout: channels.Layout, rules: Rules
) -> tuple[Slot | None, ...]:
    """Finds the slot of each leaf of a state, or None for a leaf without channels.

    None counts as a leaf. The state contains trees that optax maps together with the updates, so
    both have the same nodes. (`optax.tree.map_params` finds such trees, but does not look inside
    `optax.masked`.) Raises a ValueError for an entry whose channels are unknown, and for an
    optimizer that is not supported.
    """
    state, updates = state_and_updates
    positions = jax.tree.unflatten(jax.tree.structure(updates), range(len(layout.leaves)))
    return tuple(_slot(entry, layout, dict(rules)) for entry in entries(state, positions))


_OUTSIDE = object()


class Entry(NamedTuple):
    """A leaf of an optimizer state, or None in its place.

    Attributes:
      nodes: the nodes on the way to it, from the whole state to the entry itself.
      keys: the keys on the way: `keys[i]` leads from `nodes[i]` to `nodes[i + 1]`.
      parameter: the position of its parameter; None or a MaskedNode if the parameter has no update,
        and `_OUTSIDE` if there is no parameter.
    """

    nodes: tuple[Any, ...]
    keys: tuple[Any, ...]
    parameter: Any

    @property
    def path(self) -> str:
        return channels.canonical_path(self.keys)

    @property
    def holder(self) -> Any:
        """The innermost NamedTuple around the entry, or the whole state if there is none."""
        return next((x for x in self.nodes[-2::-1] if hasattr(x, "_fields")), self.nodes[0])


def entries(
    node: Any,
    positions: Any = _OUTSIDE,
    nodes: tuple[Any, ...] = (),
    keys: tuple[Any, ...] = (),
    place: Any = _OUTSIDE,
) -> Iterator[Entry]:
    """Walks through a state; `positions` has the structure of the updates.

    The other arguments say where a node of the state lies, and what `positions` has in its place.
    """
    _check_supported(node)
    nodes = (*nodes, node)
    if place is _OUTSIDE and _matches(node, positions):
        place = positions
    if node is None or jax.tree_util.all_leaves((node,)):
        yield Entry(nodes, keys, place)
    inside = _children(place)
    for key, child in _children(node).items():
        inner = place if place is _OUTSIDE or isinstance(place, int) else inside.get(key)
        yield from entries(child, positions, nodes, (*keys, key), inner)


def _matches(node: Any, positions: Any) -> bool:
    """Whether a tree has an entry, a None or a MaskedNode for every parameter."""
    if any(x is None or isinstance(x, optax.MaskedNode) for x in (node, positions)):
        return True
    children, expected = _children(node), _children(positions)
    if isinstance(positions, int):
        # A parameter may have a container of entries. An empty tuple is `optax.EmptyState`.
        is_empty = isinstance(node, tuple) and not node
        return not is_empty and not any(map(_children, children.values()))
    if isinstance(node, Mapping):  # It may have entries for parameters that are not updated.
        children = {key: child for key, child in children.items() if key in expected}
    is_same = type(node) is type(positions) and children.keys() == expected.keys()
    return is_same and all(_matches(children[key], x) for key, x in expected.items())


def _children(node: Any) -> dict[Any, Any]:
    found = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {keys[0]: child for keys, child in found if keys}


def _slot(entry: Entry, layout: channels.Layout, rules: Mapping[type, SlotAxes]) -> Slot | None:
    is_updated = isinstance(entry.parameter, int)
    is_array = hasattr(entry.nodes[-1], "dtype")
    if not is_array or not (is_updated or entry.parameter is _OUTSIDE):
        return None
    leaf = layout.leaves[entry.parameter] if is_updated else None
    axes = _axes(entry, leaf, len(layout.leaves) == 1, rules)
    return None if axes is None else Slot(entry.parameter, axes)


def _axes(
    entry: Entry, leaf: channels.Leaf | None, is_single: bool, rules: Mapping[type, SlotAxes]
) -> tuple[int | None, ...] | None:
    """`Slot.axes`, or None for an entry without channels."""
    shape = tuple(entry.nodes[-1].shape)
    is_float = jnp.issubdtype(entry.nodes[-1].dtype, jnp.inexact)
    axes = _ruled_axes(entry, leaf, shape, rules) if shape else NotImplemented
    if axes is not NotImplemented:
        return axes
    if leaf is not None:
        if shape == leaf.shape and (shape or is_float):
            return tuple(range(len(shape)))
        # With a single parameter, its entry may look like a number for the whole tree.
        if is_float and not (shape and leaf.axes) and not is_single:
            return (None,) * len(shape)  # Frozen if all of the parameter is.
    if not shape or not is_float or (leaf is not None and leaf.layer is None):
        return None  # A count, a key, or a number for the whole tree.
    name = type(entry.holder).__name__
    mend = f"give slot_axes={{{name}: rule}}"
    if any(hasattr(node, "_fields") for x in entries(entry.holder) for node in x.nodes[1:]):
        mend = f"put the wrapper with the state {name} around freeze_dropped, not inside"
    owner = "no parameter" if leaf is None else f"{leaf.path!r} of shape {leaf.shape}"
    raise ValueError(
        f"inner: its state has an entry {entry.path!r} of shape {shape}, which belongs to {owner}, "
        f"so which of its axes hold channels is unknown; {mend}. To mask gradients only, use "
        "channel_drop_back(policy)."
    )


def _ruled_axes(
    entry: Entry, leaf: channels.Leaf | None, shape: Shape, rules: Mapping[type, SlotAxes]
) -> Any:
    """What the innermost rule returns; NotImplemented if there is none."""
    ruled = [i for i, node in enumerate(entry.nodes[:-1]) if type(node) in rules]
    if not ruled:
        return NotImplemented
    owner, key = type(entry.nodes[ruled[-1]]), entry.keys[ruled[-1]]
    field = jax.tree_util.keystr((key,), simple=True)
    axes = rules[owner](field, None if leaf is None else leaf.shape, shape)
    if axes is NotImplemented or axes is None or leaf is None:
        return NotImplemented if axes is NotImplemented else None
    valid = range(len(leaf.shape))
    try:
        found = tuple(None if axis is None else valid[operator.index(axis)] for axis in axes)
        sizes = {axis: size for size, axis in zip(shape, found, strict=True) if axis is not None}
        fits = len(sizes) + found.count(None) == len(found)  # No axis occurs twice.
        fits = fits and all(size == leaf.shape[axis] for axis, size in sizes.items())
    except (TypeError, ValueError, IndexError):
        fits = False
    if not fits:
        raise ValueError(
            f"slot_axes: the rule for {owner.__name__} returned {axes!r} for {entry.path!r} of "
            f"shape {shape}, which belongs to {leaf.path!r} of shape {leaf.shape}; for each axis "
            "of the entry, return a different parameter axis of the same size, or None."
        )
    return found


# Optimizers that cannot be inside `freeze_dropped`.

_AROUND: dict[type, str] = {
    optax.MultiStepsState: "optax.MultiSteps({}, every_k_schedule=k)",
    optax.ApplyEvery: "optax.MultiSteps({}, every_k_schedule=k)",
    optax.LookaheadState: "optax.lookahead({}, sync_period, slow_step_size)",
    optax.contrib.SAMState: "optax.contrib.sam({}, adv_optimizer)",
}


def several_updates(state_class: type) -> str:
    wrapped = _AROUND[state_class].format("cdb_jax.freeze_dropped(inner, policy)")
    return (
        f"inner: {state_class.__name__.removesuffix('State')} takes one step in several updates, "
        f"and each would drop different channels; put it around freeze_dropped: {wrapped}."
    )


def _check_supported(node: Any) -> None:
    if isinstance(node, optax.contrib.GaLoreState):
        raise ValueError(
            "inner: GaLore keeps moments of a projected gradient, which mixes the channels, so no "
            "channel can be frozen; mask gradients only: optax.chain("
            "cdb_jax.channel_drop_back(policy), optax.contrib.galore(...))."
        )
    is_transparent = isinstance(node, optax.contrib.SAMState) and node.cache is None
    if type(node) in _AROUND and not is_transparent:
        raise ValueError(several_updates(type(node)))


# Rules for states of optax.


def _factored_axes(field: str, shape: Shape | None, entry_shape: Shape) -> Shape | None:
    """Adafactor: `v_row` and `v_col` are averages over one of the two largest axes."""
    if shape is None:
        return NotImplemented
    order = np.argsort(shape)
    averaged = {"v_row": order[-1:], "v_col": order[-2:-1], "v": order[:0]}[field]
    axes = tuple(axis for axis in range(len(shape)) if axis not in averaged)
    # A field that is not used for a parameter has a different shape.
    return axes if entry_shape == tuple(shape[axis] for axis in axes) else None


def _shared(*fields: str) -> SlotAxes:
    """A rule for a state with some fields that belong to all parameters together."""
    return lambda field, shape, entry_shape: None if field in fields else NotImplemented


RULES: dict[type, SlotAxes] = {
    optax.FactoredState: _factored_axes,
    optax.contrib.MechanicState: _shared("r", "m", "v", "s"),
    optax.contrib.MuonState: _shared("ns_coeffs"),
}
