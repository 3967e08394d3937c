"""`freeze_dropped`: a dropped channel keeps its weights and its entries of the optimizer state."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cdb_jax import channels, selection
from cdb_jax.policy import Policy, Rate, as_policy

SlotAxes = Callable[[str, tuple[int, ...] | None, tuple[int, ...]], tuple[int | None, ...] | None]


class FreezeDroppedState(NamedTuple):
    """State of `freeze_dropped`: that of the optimizer, and what `ChannelDropBackState` holds.

    Attributes:
      count: the steps taken, and so the count of the next selection; an int32 scalar.
      dropped_fraction: of the last step, by parameters, as in `dropped_fraction`; a float32 scalar.
      inner_state: the state of the optimizer inside.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    dropped_fraction: jax.Array  # shape=(), dtype=jnp.float32
    inner_state: Any


def freeze_dropped(
    inner: optax.GradientTransformation,
    policy: Policy | Rate,
    *,
    slot_axes: Mapping[type, SlotAxes] | None = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that only the channels that learn in a step change at all.

    A zero gradient does not freeze a weight: momentum and weight decay still move it. Here a
    channel that is dropped in a step keeps its weights *and* its entries of the optimizer state,
    bit for bit: the literal reading of "applies weight updates only to them". With parameters
    :math:`\theta`, optimizer state :math:`s` and kept channels K, one step is

    .. math:: (u, s') = \mathrm{inner}(1_K\, g,\; s,\; \theta), \qquad
       \theta \leftarrow \theta + 1_K\, u, \qquad
       s \leftarrow 1_K\, s' + (1 - 1_K)\, s.

    What belongs to no channel advances in every step: counts, schedules, keys, norms over the whole
    tree. An entry that several channels share (a row of Adafactor's second moments, say) stands
    still if all of them are dropped, and advances otherwise. Counts advance for all, so Adam's bias
    correction runs ahead of a channel that is often dropped: until about 1 / (1 - b2) steps its
    steps are up to 1 / sqrt(1 - rate) times as long. It makes no difference whether the
    gradient comes from `jax.value_and_grad` or, masked already, from `cdb_jax.value_and_grad` with
    the same policy. Nothing may move parameters after it: weight decay belongs into `inner`.

    Args:
      inner: the optimizer, chains included. `optax.MultiSteps` goes around `freeze_dropped`, not
        inside.
      policy: a `Policy`, or its `rate`, followed by its other arguments by name. Its `rescale`
        must be "none", as gradients that come masked are rescaled already.
      slot_axes: for states whose entries do not have the shape of their parameter: a dict from
        the class of the state (a NamedTuple) to a function of the field's name, the parameter's
        shape (None for an entry that belongs to no parameter) and the entry's shape. It returns for
        every axis of the entry the axis of the parameter that it is, or None for an axis of its
        own; or None for an entry that belongs to no channel. Those of Adafactor
        (`optax.FactoredState`) and Muon (`optax.contrib.MuonState`) are supplied.
      **settings: the arguments of `Policy` by name, if `policy` is a rate.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `FreezeDroppedState`.

    Raises:
      TypeError, ValueError: for a bad policy, or one that rescales; when updates are first seen,
        for a tree that does not fit the policy, and for a state with entries that nothing assigns
        to channels, such as the memory of L-BFGS.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.zeros((2, 4))}}
      >>> optimizer = optax.sgd(1.0, momentum=0.9)
      >>> tx = cdb_jax.freeze_dropped(optimizer, 0.5, key=0, channel_choice="window")
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["dense"]["kernel"][0]  # Only the third channel was kept twice.
      Array([ 0. , -1. , -2.9, -1. ], dtype=float32)
      >>> state.inner_state[0].trace["dense"]["kernel"][0]
      Array([0. , 1. , 1.9, 1. ], dtype=float32)

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_.
    """
    if isinstance(inner, optax.MultiSteps):
        raise TypeError(_ACCUMULATES.format("MultiSteps"))
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optimizer such as optax.adamw(1e-3), got {inner!r}; the policy is "
            "the second argument."
        )
    policy = as_policy(policy, settings)
    if policy.rescale != "none":
        raise ValueError(
            f"rescale={policy.rescale!r}: freeze_dropped does not rescale, as a gradient from "
            "cdb_jax.value_and_grad is rescaled already. Let that or channel_drop_back(policy), "
            "chained before it, rescale, and give freeze_dropped(inner, "
            'dataclasses.replace(policy, rescale="none")), which drops the same channels.'
        )
    inner = optax.with_extra_args_support(inner)
    rules = _RULES | _checked_rules(slot_axes or {})

    def init_fn(params: Any) -> FreezeDroppedState:
        zeros = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return FreezeDroppedState(*zeros, inner.init(params))

    def update_fn(
        updates: Any, state: FreezeDroppedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, FreezeDroppedState]:
        layout = policy.layout(updates)
        groups = selection.draw(policy, layout, state.count)
        kept = {} if policy.drops_nothing else selection.kept(groups, state.count)
        # For each leaf where it learns, of its rank; None where nothing is ever dropped.
        learns = [
            selection.broadcastable(kept[path], leaf)
            if (path := leaf.layer or leaf.path) in kept
            else None
            for leaf in layout.leaves
        ]
        masked = _where(learns, updates, 0.0)
        proposed, inner_state = inner.update(masked, state.inner_state, params, **extra_args)
        # Adding minus zero leaves every number as it is, minus zero included.
        steps = _where(learns, proposed, -0.0)
        slots = _slots(state.inner_state, layout, policy.root, rules)
        inner_state = _hold(learns, slots, inner_state, state.inner_state)
        fraction = selection.fraction_of(groups, layout)
        count = optax.safe_increment(state.count)
        return steps, FreezeDroppedState(count, fraction, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked_rules(slot_axes: Mapping[type, SlotAxes]) -> dict[type, SlotAxes]:
    for owner, rule in slot_axes.items():
        if not isinstance(owner, type) or not callable(rule):
            raise TypeError(
                f"slot_axes must map classes of optimizer states to functions, got {owner!r}: "
                f"{rule!r}; write slot_axes={{StateClass: lambda field, shape, entry_shape: axes}}."
            )
    return dict(slot_axes)


def _where(learns: Sequence[jax.Array | None], tree: Any, otherwise: float) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [
        x if where is None else jnp.where(where, x, _number(otherwise, x.dtype))
        for where, x in zip(learns, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, chosen)


def _number(x: float, dtype: Any) -> jax.Array:
    return jnp.asarray(complex(x, x) if jnp.issubdtype(dtype, jnp.complexfloating) else x, dtype)


class Slot(NamedTuple):
    """An entry of an optimizer state that belongs to a parameter.

    `parameter` is its position among the leaves of the updates. `axes` are for each axis of the
    entry the axis of the parameter that it is, or None for an axis of its own.
    """

    parameter: int
    axes: tuple[int | None, ...]


def _hold(
    learns: Sequence[jax.Array | None], slots: Sequence[Slot | None], new: Any, old: Any
) -> Any:
    """The new state, with the old values where no channel learns that an entry belongs to."""
    new_leaves, treedef = jax.tree.flatten(new)
    held = []
    for slot, x, before in zip(slots, new_leaves, jax.tree.leaves(old), strict=True):
        where = learns[slot.parameter] if slot else None
        if slot is not None and where is not None:
            named = [axis for axis in slot.axes if axis is not None]
            where = jnp.any(where, axis=tuple(i for i in range(where.ndim) if i not in named))
            where = jnp.transpose(where, [sorted(named).index(axis) for axis in named])
            own = [i for i, axis in enumerate(slot.axes) if axis is None]
            x = jnp.where(jnp.expand_dims(where, own), x, before)
        held.append(x)
    return jax.tree.unflatten(treedef, held)


# Which entry belongs to which parameter.


class _Entry(NamedTuple):
    path: str
    array: Any
    owner: type | None  # The class with a rule that it lies in,
    field: str  # and its path in there.


def _slots(
    state: Any, layout: channels.Layout, root: str, rules: Mapping[type, SlotAxes]
) -> list[Slot | None]:
    """For each leaf of a state the parameter that it belongs to; None where it belongs to none.

    Optimizers keep trees that are built like the parameters. Such a tree lies at a path under which
    every parameter has an entry; those that `optax.masked` leaves out have a MaskedNode there.
    """
    shorten = len(root) + 1 if root else 0
    index = {leaf.path[shorten:]: i for i, leaf in enumerate(layout.leaves)}
    entries = list(_entries(state, rules))
    below: dict[str, set[int]] = {}
    for entry in entries:
        for top, parameter in _splits(entry.path, index):
            below.setdefault(top, set()).add(parameter)
    slots = []
    for entry in entries:
        if isinstance(entry.array, optax.MaskedNode):
            continue
        found = [i for top, i in _splits(entry.path, index) if len(below[top]) == len(index)]
        slots.append(_slot(entry, found[0] if found else None, layout, rules))
    return slots


def _entries(state: Any, rules: Mapping[type, SlotAxes]) -> Iterator[_Entry]:
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    stops = lambda x: type(x) in rules or isinstance(x, (*_ACCUMULATORS, optax.MaskedNode))
    for keys, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=stops):
        if isinstance(node, _ACCUMULATORS):
            raise ValueError(_ACCUMULATES.format(type(node).__name__))
        owner = type(node) if type(node) in rules else None
        inside = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_masked) if owner else []
        for below, x in inside or [((), node)] * (owner is None):
            field = jax.tree_util.keystr(below[:1], simple=True)
            yield _Entry(channels.canonical_path((*keys, *below)), x, owner, field)


_ACCUMULATORS = (optax.MultiStepsState, optax.ApplyEvery)
_ACCUMULATES = (
    "freeze_dropped: the optimizer inside accumulates over several steps ({}), each with channels "
    "of its own; put that outside: optax.MultiSteps(cdb_jax.freeze_dropped(inner, policy), "
    "every_k_schedule=k)."
)


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


def _slot(
    entry: _Entry, parameter: int | None, layout: channels.Layout, rules: Mapping[type, SlotAxes]
) -> Slot | None:
    shape, is_float = tuple(entry.array.shape), jnp.issubdtype(entry.array.dtype, jnp.inexact)
    leaf = None if parameter is None else layout.leaves[parameter]
    if entry.owner is not None and shape:
        given = rules[entry.owner](entry.field, None if leaf is None else leaf.shape, shape)
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
    raise ValueError(
        f"freeze_dropped: the optimizer's state has an entry {entry.path!r} of shape {shape}, "
        f"which {belongs}, and nothing says which of its axes are channels, so a dropped channel "
        "could not stand still. Give slot_axes={StateClass: rule} for its class, or mask alone "
        "with channel_drop_back."
    )


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
    return None if shape is None else tuple(range(len(shape)))


_RULES: dict[type, SlotAxes] = {
    optax.FactoredState: _factored_axes,
    optax.contrib.MuonState: _muon_axes,
}
