"""Finds which parameter each entry of an optimizer state belongs to, and along which axes."""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cdb_jax import channels
from cdb_jax._checks import short
from cdb_jax._compiling import by_structure
from cdb_jax.policy import Policy

Shape = tuple[int, ...]
SlotAxes = Callable[[str, Shape | None, Shape], tuple[int | None, ...] | None]
Rules = tuple[tuple[type, SlotAxes], ...]
Wrapper = Literal["freeze_dropped", "compact"]  # What `inner` is inside of, for messages.


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


def flatten(state: Any) -> tuple[list[Any], Any]:
    """Flattens a state. None is a leaf: optax returns None for a parameter without a gradient."""
    return jax.tree.flatten(state, is_leaf=lambda x: x is None)


@by_structure
def find(
    state_and_updates: tuple[Any, Any], layout: channels.Layout, rules: Rules, wrapper: Wrapper
) -> tuple[Slot | None, ...]:
    """Finds the slot of each leaf of a state, or None for a leaf without channels.

    None counts as a leaf. The state contains trees that optax maps together with the updates, so
    both have the same nodes. (`optax.tree.map_params` finds such trees, but does not look inside
    `optax.masked`.) Raises a ValueError for an entry whose channels are unknown, and for an
    optimizer that is not supported.
    """
    checked = _checked_entries(state_and_updates, wrapper)
    return tuple(_slot(entry, layout, dict(rules), wrapper) for entry in checked)


@by_structure
def restarting(state_and_updates: tuple[Any, Any], wrapper: Wrapper) -> tuple[bool, ...]:
    """Whether each leaf of a state starts over when other channels are selected.

    Entries that belong to parameters do, and so does whatever the same NamedTuple holds, such as
    the count of Adam's bias correction. Schedules keep their counts in a separate state.
    """
    found = list(_checked_entries(state_and_updates, wrapper))
    # If the parameters are a single array, a count looks like an entry of it, so only entries with
    # dimensions make their NamedTuple a holder.
    holders = {
        id(entry.holder)
        for entry in found
        if isinstance(entry.parameter, int) and getattr(entry.nodes[-1], "shape", False)
    }
    return tuple(id(entry.holder) in holders for entry in found)


def _checked_entries(state_and_updates: tuple[Any, Any], wrapper: Wrapper) -> Iterator[Entry]:
    state, updates = state_and_updates
    treedef: Any = jax.tree.structure(updates)
    for entry in entries(state, jax.tree.unflatten(treedef, range(treedef.num_leaves))):
        _check_entry(entry, wrapper)
        yield entry


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


def _slot(
    entry: Entry, layout: channels.Layout, rules: Mapping[type, SlotAxes], wrapper: Wrapper
) -> Slot | None:
    is_updated = isinstance(entry.parameter, int)
    is_array = hasattr(entry.nodes[-1], "dtype")
    if not is_array or not (is_updated or entry.parameter is _OUTSIDE):
        return None
    leaf = layout.leaves[entry.parameter] if is_updated else None
    axes = _axes(entry, leaf, len(layout.leaves) == 1, rules, wrapper)
    return None if axes is None else Slot(entry.parameter, axes)


_INSTEAD: dict[Wrapper, str] = {
    "freeze_dropped": "To mask gradients only, use channel_drop_back(policy)",
    "compact": 'With on_switch="reset", no axes are needed',
}


def _axes(
    entry: Entry,
    leaf: channels.Leaf | None,
    is_single: bool,
    rules: Mapping[type, SlotAxes],
    wrapper: Wrapper,
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
    mend = f"pass slot_axes={{{name}: rule}}"
    if any(hasattr(node, "_fields") for x in entries(entry.holder) for node in x.nodes[1:]):
        mend = f"put the wrapper with the state {name} around {wrapper}, not inside"
    owner = "no parameter" if leaf is None else f"{leaf.path!r} of shape {leaf.shape}"
    raise ValueError(
        f"inner: the entry {entry.path!r} of its state has shape {shape} and belongs to {owner}, "
        f"so its channel axes are unknown; {mend}. {_INSTEAD[wrapper]}."
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


# What the optimizer inside a wrapper must be like.

_DROPPING = {
    "ChannelDropBackState": "channel_drop_back",
    "FreezeDroppedState": "freeze_dropped",
    "CompactState": "compact",
}
_AROUND: dict[type, str] = {
    optax.MultiStepsState: "optax.MultiSteps({}, every_k_schedule=k)",
    optax.ApplyEvery: "optax.MultiSteps({}, every_k_schedule=k)",
    optax.LookaheadState: "optax.lookahead({}, sync_period, slow_step_size)",
    optax.contrib.SAMState: "optax.contrib.sam({}, adv_optimizer)",
}


def check_inner(inner: Any, wrapper: Wrapper) -> None:
    """Raises a TypeError if `inner` is not an optimizer that fits into a wrapper."""
    if isinstance(inner, optax.MultiSteps):
        raise TypeError(_several_updates(optax.MultiStepsState, wrapper))
    if not isinstance(inner, optax.GradientTransformation):
        mend = "; the policy is the second argument" if isinstance(inner, Policy) else ""
        raise TypeError(
            f"inner must be an optimizer such as optax.adamw(1e-3), got {short(inner)}{mend}."
        )


def _several_updates(state_class: type, wrapper: Wrapper) -> str:
    wrapped = _AROUND[state_class].format(f"cdb_jax.{wrapper}(inner, policy)")
    return (
        f"inner: {state_class.__name__.removesuffix('State')} combines several updates, and each "
        f"would drop different channels; put it around {wrapper}: {wrapped}."
    )


def check_supported(state: Any, wrapper: Wrapper) -> None:
    """Raises a ValueError for the state of an optimizer that a wrapper cannot have inside."""
    for entry in entries(state):
        _check_entry(entry, wrapper)


def _check_entry(entry: Entry, wrapper: Wrapper) -> None:
    """Raises a ValueError if an entry is part of a state that a wrapper cannot have inside."""
    for node in entry.nodes:
        if isinstance(node, optax.contrib.GaLoreState) and wrapper == "freeze_dropped":
            raise ValueError(
                "inner: GaLore keeps moments of a projected gradient, which mixes the channels, so "
                "no channel can be frozen; mask gradients only: optax.chain("
                "cdb_jax.channel_drop_back(policy), optax.contrib.galore(...))."
            )
        # By name, as some of their modules import this one.
        if wrapper == "compact" and (found := _DROPPING.get(type(node).__name__)):
            raise ValueError(
                f"inner: it contains {found}, which would drop channels of the kept part again; "
                "pass the optimizer itself, such as optax.adamw(1e-3)."
            )
        is_transparent = isinstance(node, optax.contrib.SAMState) and node.cache is None
        if type(node) in _AROUND and not is_transparent:
            raise ValueError(_several_updates(type(node), wrapper))


def check_updates(proposed: Any, updates: Any, root: str, wrapper: Wrapper) -> None:
    """Raises a TypeError or ValueError if `inner` changes the structure or shapes of updates."""
    trees: list[Any] = [jax.tree.structure(tree) for tree in (updates, proposed)]
    if trees[0] != trees[1]:
        given, returned = (textwrap.shorten(str(tree), 120) for tree in trees)
        raise TypeError(
            f"inner changes the structure of the updates from {given} to {returned}; put the "
            f"wrapper that does so around {wrapper}, for example "
            f"optax.lookahead(cdb_jax.{wrapper}(inner, policy), 5, 0.5)."
        )
    channels.check_parameters(updates, proposed, root, "inner returns")


def check_states(new: Any, old: Any, wrapper: Wrapper) -> None:
    """Raises a TypeError or ValueError if `inner` changes the structure or types of its state."""
    (new_leaves, new_treedef), (old_leaves, old_treedef) = flatten(new), flatten(old)
    if new_treedef != old_treedef:
        new_holders, old_holders = _holders(new), _holders(old)
        differing = sorted(new_holders.items() ^ old_holders.items())
        changed = "".join(f" at {path!r} in {name}" for path, name in differing[:1])
        raise TypeError(
            f"inner changes the structure of its state{changed}; put the transformation that does "
            f"so after {wrapper}: optax.chain(cdb_jax.{wrapper}(inner, policy), other)."
        )
    for i, pair in enumerate(zip(old_leaves, new_leaves, strict=True)):
        types = [(tuple(x.shape), str(x.dtype)) for x in pair if hasattr(x, "dtype")]
        if len(types) == 2 and types[0] != types[1]:
            path = [entry.path for entry in entries(new)][i]
            raise ValueError(
                f"inner changes the entry {path!r} of its state from shape and dtype {types[0]} to "
                f"{types[1]}; set the dtype of its state, for example with mu_dtype."
            )


def _holders(state: Any) -> dict[str, str]:
    """The class of the node that holds each entry of a state, by the path of the entry."""
    return {entry.path: type(entry.holder).__name__ for entry in entries(state)}


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
