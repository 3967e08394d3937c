"""Which entry of an optimizer state belongs to which parameter, and along which axes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cdb_jax import channels
from cdb_jax._compiling import NO_ARRAY, by_structure

SlotAxes = Callable[[str, tuple[int, ...] | None, tuple[int, ...]], tuple[int | None, ...] | None]


class Slot(NamedTuple):
    """An entry of an optimizer state that belongs to a parameter.

    `parameter` is its position among the leaves of the updates. `axes` are for each axis of the
    entry the axis of the parameter that it is, or None for an axis of its own.
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
    """For each leaf of a state the parameter that it belongs to; None where it belongs to none.

    Optimizers keep trees that are built like the parameters. Such a tree lies at a path under which
    every parameter has an entry, or has none but with all that lies around it: `optax.masked` puts
    a MaskedNode there, and a parameter without a gradient may be None. It may have more entries
    than there are gradients.

    Args:
      state: of an optimizer, with None as a leaf.
      layout: of the updates.
      root: of the policy.
      rules: for each class of states whose entries do not have the shapes of the parameters what
        `slot_axes` of `freeze_dropped` describes.

    Raises:
      ValueError: for an entry that nothing assigns, and for states of a step over several updates.
    """
    return _find(state, layout, root, tuple(rules.items()))


@by_structure
def _find(
    state: Any,
    layout: channels.Layout,
    root: str,
    rules: tuple[tuple[type, SlotAxes], ...],
) -> tuple[Slot | None, ...]:
    shorten = len(root) + 1 if root else 0
    index = {leaf.path[shorten:]: i for i, leaf in enumerate(layout.leaves)}
    by_class = dict(rules)
    entries = list(_entries(state, by_class))
    below: dict[str, set[int]] = {}
    for entry in entries:
        splits = (_covered if entry.array is None else _splits)(entry.path, index)
        for top, parameter in splits:
            below.setdefault(top, set()).add(parameter)
    whole = {top for top, found in below.items() if len(found) == len(index)}
    slots: list[Slot | None] = []
    for entry in entries:
        if entry.is_masked:
            continue
        found = [i for top, i in _splits(entry.path, index) if top in whole]
        if entry.array is None or (not found and _lies_below(entry.path, whole)):
            slots.append(None)  # Of a parameter that has no update.
        else:
            slots.append(_slot(state, entry, found[0] if found else None, layout, by_class))
    return tuple(slots)


class _Entry(NamedTuple):
    keys: tuple[Any, ...]
    path: str
    array: Any  # None where nothing is.
    is_masked: bool  # A MaskedNode, which is no leaf.
    owner: type | None  # The class with a rule that it lies in,
    field: str  # and its path in there.


def _entries(
    state: Any, rules: Mapping[type, SlotAxes], keys: tuple[Any, ...] = ()
) -> Iterator[_Entry]:
    """What a state holds. With `keys`, where it lies, it is one with a rule."""
    owner, depth = (type(state), len(keys)) if keys or type(state) in rules else (None, 0)
    empty = lambda x: x is None or isinstance(x, optax.MaskedNode)
    ruled = lambda x: x is not state and type(x) in rules
    stops = lambda x: empty(x) or ruled(x) or _refusal(x) is not None
    for below, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=stops):
        if (refusal := _refusal(node)) is not None:
            raise ValueError(refusal)
        path = (*keys, *below)
        if ruled(node):
            yield from _entries(node, rules, path)
            continue
        field = jax.tree_util.keystr(path[depth : depth + 1], simple=True)
        is_masked = isinstance(node, optax.MaskedNode)
        array = None if empty(node) or node is NO_ARRAY else node
        yield _Entry(path, channels.canonical_path(path), array, is_masked, owner, field)


def several_updates(name: str, instead: str) -> str:
    return (
        f"freeze_dropped: the optimizer inside takes one step in several updates ({name}), each "
        f"with channels of its own; put that outside: {instead}."
    )


def _refusal(x: Any) -> str | None:
    """Why a state may not be inside: what moves together is not the channels of one step."""
    if isinstance(x, (optax.MultiStepsState, optax.ApplyEvery)):
        return several_updates(type(x).__name__, MULTI_STEPS)
    if isinstance(x, optax.contrib.SAMState):
        return None if x.cache is None else several_updates("SAMState", _SAM)
    if hasattr(x, "steps_since_sync"):
        return several_updates(type(x).__name__, _LOOKAHEAD)
    if isinstance(x, optax.contrib.GaLoreState):
        return (
            "freeze_dropped: the optimizer inside keeps its moments in a projection of the "
            "gradient (GaLoreState), which mixes channels, so none could stand still; mask alone: "
            "optax.chain(cdb_jax.channel_drop_back(policy), optax.contrib.galore(...))."
        )
    return None


MULTI_STEPS = "optax.MultiSteps(cdb_jax.freeze_dropped(inner, policy), every_k_schedule=k)"
_SAM = "optax.contrib.sam(cdb_jax.freeze_dropped(inner, policy), adv_optimizer)"
_LOOKAHEAD = "optax.lookahead(cdb_jax.freeze_dropped(inner, policy), sync_period, slow_step_size)"


def _splits(path: str, index: Mapping[str, int]) -> list[tuple[str, int]]:
    """The ways to find the path of a parameter at the end of a path: what is above, and which.

    A parameter may have several entries in a list or the like, one path below its own.
    """
    parts = path.split("/")
    found = []
    for start in range(len(parts) + 1):
        for stop in (len(parts), len(parts) - 1):
            end = "/".join(parts[start:stop])
            if start <= stop and end in index:
                found.append(("/".join(parts[:start]), index[end]))
    return found


def _covered(path: str, index: Mapping[str, int]) -> list[tuple[str, int]]:
    """The parameters that have no entry because nothing lies at a path, as `_splits` has them."""
    parts = path.split("/")
    found = []
    for start in range(len(parts) + 1):
        end = "/".join(parts[start:])
        top = "/".join(parts[:start])
        found += [(top, i) for other, i in index.items() if channels.is_below(other, end)]
    return found


def _lies_below(path: str, tops: Collection[str]) -> bool:
    return any(channels.is_below(path, top) for top in tops if top != "")


def _slot(
    state: Any,
    entry: _Entry,
    parameter: int | None,
    layout: channels.Layout,
    rules: Mapping[type, SlotAxes],
) -> Slot | None:
    shape, is_float = tuple(entry.array.shape), jnp.issubdtype(entry.array.dtype, jnp.inexact)
    leaf = None if parameter is None else layout.leaves[parameter]
    given: Any = NotImplemented
    if entry.owner is not None and shape:
        given = rules[entry.owner](entry.field, None if leaf is None else leaf.shape, shape)
    if given is not NotImplemented:
        if given is None or leaf is None or parameter is None:
            return None
        return Slot(parameter, _checked_axes(given, entry, leaf))
    if leaf is not None and parameter is not None:
        if shape == leaf.shape:
            return Slot(parameter, tuple(range(len(shape))))
        if shape == () and is_float and len(layout.leaves) > 1:
            return Slot(parameter, ())  # A number for each parameter.
        if leaf.layer is None:
            return None
    if shape == () or not is_float:
        return None  # Counts, keys, what a whole tree shares.
    belongs = f"belongs to {leaf.path!r} of shape {leaf.shape}" if leaf else "belongs to no leaf"
    owner, is_wrapper = holder(state, entry.keys)
    mend = f"give slot_axes={{{owner}: rule}}"
    if is_wrapper:
        mend = f"put what has the state {owner} around freeze_dropped, not inside"
    raise ValueError(
        f"freeze_dropped: the optimizer's state has an entry {entry.path!r} of shape {shape}, "
        f"which {belongs}, and nothing says which of its axes are channels, so a dropped channel "
        f"could not stand still; {mend}, or mask alone with channel_drop_back."
    )


def holder(state: Any, keys: Sequence[Any]) -> tuple[str, bool]:
    """The innermost class of states around an entry, and whether it holds other states too."""
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
    is_state = lambda x: hasattr(x, "_fields") and x is not found
    return type(found).__name__, any(map(is_state, jax.tree.leaves(found, is_leaf=is_state)))


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
            f"slot_axes of {getattr(entry.owner, '__name__', entry.owner)} returns {axes!r} for "
            f"{entry.path!r} of shape {tuple(entry.array.shape)}, which belongs to {leaf.path!r} "
            f"of shape {leaf.shape}; return for each of its axes another axis of the parameter of "
            "that size, or None."
        )
    return found


def _factored_axes(
    field: str, shape: tuple[int, ...] | None, entry: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Adafactor's second moments: averages over one of the two largest axes of a parameter."""
    assert shape is not None
    axes = tuple(range(len(shape)))
    if field != "v" and len(shape) >= 2:
        second, largest = np.argsort(shape)[-2:]
        averaged = {"v_row": largest, "v_col": second}[field]
        axes = tuple(axis for axis in axes if axis != averaged)
    # Fields that are not used for a parameter have another shape.
    return axes if entry == tuple(shape[axis] for axis in axes) else None


def _muon_axes(
    field: str, shape: tuple[int, ...] | None, entry: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Momentum like the parameters, and coefficients that all of them share."""
    return None if shape is None or field == "ns_coeffs" else tuple(range(len(shape)))


def _mechanic_axes(field: str, shape: tuple[int, ...] | None, entry: tuple[int, ...]) -> Any:
    """Its own statistics, one for each decay, are shared; what it wraps is found as elsewhere."""
    return None if field in ("r", "m", "v", "s") else NotImplemented


RULES: dict[type, SlotAxes] = {
    optax.FactoredState: _factored_axes,
    optax.contrib.MechanicState: _mechanic_axes,
    optax.contrib.MuonState: _muon_axes,
}
