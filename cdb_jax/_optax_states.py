"""Which entry of an optimizer state belongs to which parameter, and along which axes."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cdb_jax import channels
from cdb_jax._compiling import NO_ARRAY, by_structure

Shape = tuple[int, ...]
SlotAxes = Callable[[str, Shape | None, Shape], tuple[int | None, ...] | None]


class Slot(NamedTuple):
    """An entry of an optimizer state that belongs to a parameter.

    Attributes:
      parameter: its position among the leaves of the updates.
      axes: for each axis of the entry, the parameter axis that it corresponds to, or None.
    """

    parameter: int
    axes: tuple[int | None, ...]


def checked_rules(slot_axes: Mapping[type, SlotAxes]) -> dict[type, SlotAxes]:
    for owner, rule in slot_axes.items():
        if not isinstance(owner, type) or not callable(rule):
            raise TypeError(
                f"slot_axes must map classes of optimizer states to functions, got {owner!r}: "
                f"{rule!r}; write slot_axes={{StateClass: lambda field, shape, entry_shape: axes}}."
            )
    return dict(slot_axes)


def find(
    state: Any, layout: channels.Layout, root: str, rules: Mapping[type, SlotAxes]
) -> tuple[Slot | None, ...]:
    """The parameter that each leaf of a state belongs to; None for leaves that belong to none.

    Optimizers keep copies of the tree of parameters. A copy is a subtree with an entry for every
    parameter, or with a `MaskedNode` or None in its place: `optax.masked` leaves out parameters in
    this way, and a parameter may have no gradient. A copy may have entries for more parameters than
    there are gradients.

    Args:
      state: of an optimizer, with None as a leaf.
      layout: of the updates.
      root: of the policy.
      rules: `slot_axes` of `freeze_dropped`.

    Raises:
      ValueError: for an entry that nothing assigns, and for optimizers that take several updates
        for one step.
    """
    return _find(state, layout, root, tuple(rules.items()))


@by_structure
def _find(
    state: Any, layout: channels.Layout, root: str, rules: tuple[tuple[type, SlotAxes], ...]
) -> tuple[Slot | None, ...]:
    start = len(root) + 1 if root else 0
    positions = {leaf.path[start:]: i for i, leaf in enumerate(layout.leaves)}
    entries = list(_entries(state, dict(rules)))
    copies = _copies(entries, positions)
    slots: list[Slot | None] = []
    for entry in entries:
        if entry.is_masked:
            continue
        owners = _owners(entry, copies, positions, layout)
        if entry.array is None or None in owners[:1]:
            slots.append(None)  # It belongs to a parameter that has no update.
        else:
            parameter = owners[0] if owners else None
            slots.append(_slot(state, entry, parameter, layout, dict(rules)))
    return tuple(slots)


def _owners(
    entry: _Entry, copies: Collection[str], positions: Mapping[str, int], layout: channels.Layout
) -> list[int | None]:
    """The parameters that an entry may belong to, the likeliest first; None for one without update.

    There are several if parameters are named like the fields of a state, or like its lists.
    """
    found = dict(_parameters_at(entry.path, positions))
    owners = [
        found.get(top) for top, _ in _splits(entry.path) if top in copies and (top in found or top)
    ]
    shape = getattr(entry.array, "shape", None)

    def likelihood(owner: int | None) -> int:
        has_shape = owner is not None and layout.leaves[owner].shape == shape
        return 2 if has_shape else 1 if owner is None else 0

    return sorted(owners, key=likelihood, reverse=True)


class _Entry(NamedTuple):
    """A leaf of a state.

    Attributes:
      keys: where it is.
      path: the same as a canonical path.
      array: None if there is none.
      is_masked: whether it is a `MaskedNode`, which is not a leaf.
      owner: the class that has a rule for it, if there is one.
      field: the name of its field in `owner`.
    """

    keys: tuple[Any, ...]
    path: str
    array: Any
    is_masked: bool
    owner: type | None
    field: str


def _is_empty(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _entries(
    state: Any, rules: Mapping[type, SlotAxes], keys: tuple[Any, ...] = ()
) -> Iterator[_Entry]:
    """The entries of a state, or of the one at `keys` inside a larger state, which has a rule."""
    owner, depth = (type(state), len(keys)) if keys or type(state) in rules else (None, 0)

    def has_rule(x: Any) -> bool:
        return x is not state and type(x) in rules

    def is_leaf(x: Any) -> bool:
        return _is_empty(x) or has_rule(x) or _refusal(x) is not None

    for inner_keys, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_leaf):
        if (refusal := _refusal(node)) is not None:
            raise ValueError(refusal)
        path = (*keys, *inner_keys)
        if has_rule(node):
            yield from _entries(node, rules, path)
            continue
        field = jax.tree_util.keystr(path[depth : depth + 1], simple=True)
        is_masked = isinstance(node, optax.MaskedNode)
        array = None if _is_empty(node) or node is NO_ARRAY else node
        yield _Entry(path, channels.canonical_path(path), array, is_masked, owner, field)


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a path into the path of a subtree and the path inside it."""
    parts = path.split("/")
    for i in range(len(parts) + 1):
        yield "/".join(parts[:i]), "/".join(parts[i:])


def _parameters_at(path: str, positions: Mapping[str, int]) -> list[tuple[str, int]]:
    """Parameters that an entry may belong to, each with the path of the copy that it is in.

    A parameter may have several entries, in a list or the like at its path.
    """
    return [
        (top, positions[name])
        for top, inner in _splits(path)
        for name in dict.fromkeys((inner, inner.rpartition("/")[0] if inner else inner))
        if name in positions
    ]


def _copies(entries: Sequence[_Entry], positions: Mapping[str, int]) -> set[str]:
    """The paths of the subtrees that are copies of the tree of parameters."""
    found: dict[str, set[int]] = collections.defaultdict(set)
    for entry in entries:
        if entry.array is not None:
            for top, i in _parameters_at(entry.path, positions):
                found[top].add(i)
            continue
        for top, inner in _splits(entry.path):
            found[top] |= {i for name, i in positions.items() if channels.is_below(name, inner)}
    return {top for top, parameters in found.items() if len(parameters) == len(positions)}


# Optimizers that cannot be inside.

MULTI_STEPS = "optax.MultiSteps(cdb_jax.freeze_dropped(inner, policy), every_k_schedule=k)"
_SAM = "optax.contrib.sam(cdb_jax.freeze_dropped(inner, policy), adv_optimizer)"
_LOOKAHEAD = "optax.lookahead(cdb_jax.freeze_dropped(inner, policy), sync_period, slow_step_size)"


def several_updates(name: str, instead: str) -> str:
    return (
        f"freeze_dropped: inner takes several updates for one step ({name}), and each would have "
        f"its own channels; put freeze_dropped inside: {instead}."
    )


def _refusal(x: Any) -> str | None:
    """Why a state cannot be inside: what it updates together is not the channels of one step."""
    if isinstance(x, (optax.MultiStepsState, optax.ApplyEvery)):
        return several_updates(type(x).__name__, MULTI_STEPS)
    if isinstance(x, optax.contrib.SAMState):
        return None if x.cache is None else several_updates("SAMState", _SAM)
    if hasattr(x, "steps_since_sync"):
        return several_updates(type(x).__name__, _LOOKAHEAD)
    if isinstance(x, optax.contrib.GaLoreState):
        return (
            "freeze_dropped: inner keeps its moments in a projection of the gradient "
            "(GaLoreState), which mixes channels, so no channel can be frozen. Mask the gradients "
            "instead: optax.chain(cdb_jax.channel_drop_back(policy), optax.contrib.galore(...))."
        )
    return None


# The axes of an entry.


def _slot(
    state: Any,
    entry: _Entry,
    parameter: int | None,
    layout: channels.Layout,
    rules: Mapping[type, SlotAxes],
) -> Slot | None:
    shape, is_float = tuple(entry.array.shape), jnp.issubdtype(entry.array.dtype, jnp.inexact)
    leaf = None if parameter is None else layout.leaves[parameter]
    if entry.owner is not None and shape:
        axes: Any = rules[entry.owner](entry.field, leaf and leaf.shape, shape)
        if axes is not NotImplemented:
            if axes is None or leaf is None or parameter is None:
                return None
            return Slot(parameter, _checked_axes(axes, entry, leaf))
    if leaf is not None and parameter is not None:
        if shape == leaf.shape:
            return Slot(parameter, tuple(range(len(shape))))
        if shape == () and is_float and len(layout.leaves) > 1:
            return Slot(parameter, ())  # A number for each parameter.
        if leaf.layer is None:
            return None
    if shape == () or not is_float:
        return None  # Counts, keys, and what a whole tree shares.
    belongs = f"belongs to {leaf.path!r} of shape {leaf.shape}" if leaf else "belongs to no leaf"
    owner, is_wrapper = holder(state, entry.keys)
    mend = f"give slot_axes={{{owner}: rule}}"
    if is_wrapper:
        mend = f"put the wrapper with the state {owner} around freeze_dropped"
    raise ValueError(
        f"freeze_dropped: the state of inner has an entry {entry.path!r} of shape {shape}, which "
        f"{belongs}, and which of its axes are channels is not known, so a dropped channel could "
        f"not be frozen; {mend}, or mask the gradients only, with channel_drop_back."
    )


def holder(state: Any, keys: Sequence[Any]) -> tuple[str, bool]:
    """The innermost class of states around an entry, and whether it contains other states."""
    node = found = state
    for key in keys:
        if hasattr(node, "_fields"):
            found = node
        match key:
            case jax.tree_util.GetAttrKey():
                node = getattr(node, key.name)
            case jax.tree_util.SequenceKey():
                node = node[key.idx]
            case jax.tree_util.DictKey():
                node = node[key.key]
            case _:
                break

    def is_inner_state(x: Any) -> bool:
        return hasattr(x, "_fields") and x is not found

    leaves = jax.tree.leaves(found, is_leaf=is_inner_state)
    return type(found).__name__, any(map(is_inner_state, leaves))


def _checked_axes(axes: Any, entry: _Entry, leaf: channels.Leaf) -> tuple[int | None, ...]:
    rank = len(leaf.shape)
    try:
        found = tuple(None if axis is None else range(rank)[operator.index(axis)] for axis in axes)
        named = [axis for axis in found if axis is not None]
        sizes = [
            size if axis is None else leaf.shape[axis]
            for size, axis in zip(entry.array.shape, found, strict=True)
        ]
        fits = len(set(named)) == len(named) and tuple(sizes) == tuple(entry.array.shape)
    except (TypeError, ValueError, IndexError):
        fits = False
    if not fits:
        raise ValueError(
            f"slot_axes: the rule of {getattr(entry.owner, '__name__', entry.owner)} returned "
            f"{axes!r} for {entry.path!r} of shape {tuple(entry.array.shape)}, which belongs to "
            f"{leaf.path!r} of shape {leaf.shape}; for each axis, return a parameter axis of the "
            "same size, each at most once, or None."
        )
    return found


# Rules for states of optax whose entries do not have the shape of their parameter.


def _factored_axes(field: str, shape: Shape | None, entry: Shape) -> Shape | None:
    """Adafactor's second moments are averages over one of the two largest axes of a parameter."""
    assert shape is not None
    axes = tuple(range(len(shape)))
    if field != "v" and len(shape) >= 2:
        second, largest = np.argsort(shape)[-2:]
        averaged = {"v_row": largest, "v_col": second}[field]
        axes = tuple(axis for axis in axes if axis != averaged)
    # A field that is not used for a parameter has another shape.
    return axes if entry == tuple(shape[axis] for axis in axes) else None


def _muon_axes(field: str, shape: Shape | None, entry: Shape) -> Shape | None:
    """The momentum has the shapes of the parameters; all of them share the coefficients."""
    return None if shape is None or field == "ns_coeffs" else tuple(range(len(shape)))


def _mechanic_axes(field: str, shape: Shape | None, entry: Shape) -> Any:
    """All parameters share its statistics; there is one for each decay."""
    return None if field in ("r", "m", "v", "s") else NotImplemented


RULES: dict[type, SlotAxes] = {
    optax.FactoredState: _factored_axes,
    optax.contrib.MechanicState: _mechanic_axes,
    optax.contrib.MuonState: _muon_axes,
}
