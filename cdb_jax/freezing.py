"""`freeze_dropped`: a dropped channel keeps its weights and its entries of the optimizer state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import _optax_states as slots, channels
from cdb_jax._compiling import compiled
from cdb_jax.policy import Policy, check_policy
from cdb_jax.selection import Selection, broadcastable, fraction_of, kept_channels
from cdb_jax.transform import check_state, groups_from, layout_and_source, touched_leaves


class FreezeDroppedState(NamedTuple):
    """State of `freeze_dropped`.

    Attributes:
      count: number of steps taken, and so the step of the next selection: int32, a scalar.
      dropped_fraction: `Selection.dropped_fraction` of the last step: float32, a scalar.
      inner_state: the state of the inner optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    dropped_fraction: jax.Array  # shape=(), dtype=jnp.float32
    inner_state: Any


def freeze_dropped(
    inner: optax.GradientTransformation,
    policy: Policy,
    *,
    slot_axes: Mapping[type, slots.SlotAxes] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that dropped channels do not change at all.

    A zero gradient does not freeze a weight: momentum and weight decay still move it. With this
    wrapper, a channel that is dropped in a step keeps its weights and its entries of the optimizer
    state, bit for bit. With parameters :math:`\theta`, optimizer state :math:`s` and kept channels
    K, one step is

    .. math:: (u, s') = \mathrm{inner}(1_K\, g,\; s,\; \theta), \qquad
       \theta \leftarrow \theta + 1_K\, u, \qquad
       s \leftarrow 1_K\, s' + (1 - 1_K)\, s.

    What belongs to no channel advances in every step: counts, schedules, keys, norms over the whole
    tree. An entry that several channels share, such as a row of Adafactor's second moments, is
    frozen only if all of them are dropped. Since counts advance for every channel, Adam's bias
    correction is too small for a channel that is often dropped: for about 1 / (1 - b2) steps, its
    updates are up to 1 / sqrt(1 - rate) times as long.

    This wrapper does not rescale gradients. If the policy asks for it, chain
    `channel_drop_back(policy)` before it. Put everything that moves parameters, such as weight
    decay, into `inner`.

    Args:
      inner: the optimizer, chains included. `optax.MultiSteps` goes around `freeze_dropped`, not
        inside.
      policy: a `Policy`.
      slot_axes: for states whose entries do not have the shape of their parameter: a dict from
        the class of the state (a NamedTuple) to a function of the field's name, the parameter's
        shape (None for an entry that belongs to no parameter) and the entry's shape. For each axis
        of the entry, it returns the parameter axis it corresponds to, or None if there is none.
        It returns None alone for an entry that belongs to no channel, and NotImplemented to treat
        the entry as if there were no rule. Rules for Adafactor (`optax.FactoredState`), Muon and
        Mechanic (`optax.contrib.MuonState`, `MechanicState`) are built in.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `FreezeDroppedState`. Its `update` takes
      a `selection` like that of `channel_drop_back`, and passes it on to `inner`.

    Raises:
      TypeError, ValueError: for a bad argument; when `update` is called, for a tree that does not
        fit the policy, and for a state with entries that cannot be assigned to channels, such as
        the memory of L-BFGS.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.zeros((2, 4))}}
      >>> optimizer = optax.sgd(1.0, momentum=0.9)
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> tx = cdb_jax.freeze_dropped(optimizer, policy)
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
        raise TypeError(slots.several_updates("MultiSteps", slots.MULTI_STEPS))
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optimizer such as optax.adamw(1e-3), got {inner!r}; pass the policy "
            "as the second argument."
        )
    policy = check_policy(policy)
    inner = optax.with_extra_args_support(inner)
    rules = slots.RULES | slots.checked_rules(slot_axes or {})

    def init_fn(params: Any) -> FreezeDroppedState:
        zeros = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return FreezeDroppedState(*zeros, inner.init(params))

    def update_fn(
        updates: Any,
        state: FreezeDroppedState,
        params: Any = None,
        *,
        selection: Selection | None = None,
        **extra_args: Any,
    ) -> tuple[Any, FreezeDroppedState]:
        check_state(state, FreezeDroppedState)
        channels.check_parameters(updates, params, policy.root)
        layout, source = layout_and_source(policy, selection, updates)
        extra_args |= {} if selection is None else {"selection": selection}
        owners = slots.find(state.inner_state, layout, policy.root, rules)
        leaves, treedef = jax.tree.flatten(updates)

        touched = touched_leaves(policy, layout, leaves)
        learns, masked, count, fraction = _mask(layout, source, touched, state.count)
        masked = jax.tree.unflatten(treedef, _filled(masked, leaves))
        proposed, inner_state = inner.update(masked, state.inner_state, params, **extra_args)
        _check_updates(proposed, updates, layout)
        _check_states(inner_state, state.inner_state)

        steps = jax.tree.leaves(proposed)
        new, state_treedef = _leaves(inner_state)
        old, _ = _leaves(state.inner_state)
        # Only what may be frozen goes through the program; a state may hold anything else, too.
        entries = [
            (x, before) if slot and x is not None and before is not None else None
            for slot, x, before in zip(owners, new, old, strict=True)
        ]
        touched = touched_leaves(policy, layout, steps)
        steps, entries = _freeze((layout, owners), learns, touched, entries)
        proposed = jax.tree.unflatten(treedef, _filled(steps, jax.tree.leaves(proposed)))
        inner_state = jax.tree.unflatten(state_treedef, _filled(entries, new))
        return proposed, FreezeDroppedState(count, fraction, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@compiled
def _mask(
    layout: channels.Layout, source: Policy | Selection, leaves: list[Any], count: jax.Array
) -> tuple[dict[str, jax.Array], list[Any], jax.Array, jax.Array]:
    """Which channels learn, the masked updates, the next count and the dropped fraction."""
    groups = groups_from(source, layout, count)
    learns = kept_channels(groups)
    masked = _where(learns, layout, leaves, 0.0)
    return learns, masked, optax.safe_increment(count), fraction_of(groups, layout)


@compiled
def _freeze(
    static: tuple[channels.Layout, tuple[slots.Slot | None, ...]],
    learns: dict[str, jax.Array],
    steps: list[Any],
    entries: list[Any],
) -> tuple[list[Any], list[Any]]:
    """The updates and entries of the state that `inner` proposes, with dropped channels frozen.

    Each of `entries` is a pair of the new and the old value, or None.
    """
    layout, owners = static
    # Adding minus zero leaves every number as it is, including minus zero.
    steps = _where(learns, layout, steps, -0.0)
    frozen = [
        None if slot is None or pair is None else _freeze_entry(layout, slot, learns, *pair)
        for slot, pair in zip(owners, entries, strict=True)
    ]
    return steps, frozen


def _freeze_entry(
    layout: channels.Layout, slot: slots.Slot, learns: dict[str, jax.Array], new: Any, old: Any
) -> jax.Array | None:
    leaf = layout.leaves[slot.parameter]
    if leaf.source not in learns:
        return None
    where = broadcastable(learns[leaf.source], leaf, leaf.axes)
    named = [axis for axis in slot.axes if axis is not None]
    where = jnp.any(where, axis=tuple(i for i in range(where.ndim) if i not in named))
    where = jnp.transpose(where, [sorted(named).index(axis) for axis in named])
    unnamed = [i for i, axis in enumerate(slot.axes) if axis is None]
    return jnp.where(jnp.expand_dims(where, unnamed), new, old)


def _where(
    learns: dict[str, jax.Array], layout: channels.Layout, leaves: Sequence[Any], otherwise: float
) -> list[Any]:
    """The leaves, with a number in place of what does not learn."""

    def replaced(x: Any, leaf: channels.Leaf) -> Any:
        if x is None or leaf.source not in learns:
            return x
        where = broadcastable(learns[leaf.source], leaf, leaf.axes)
        return jnp.where(where, x, _number(otherwise, x.dtype))

    return [replaced(x, leaf) for x, leaf in zip(leaves, layout.leaves, strict=True)]


def _number(x: float, dtype: Any) -> jax.Array:
    return jnp.asarray(complex(x, x) if jnp.issubdtype(dtype, jnp.complexfloating) else x, dtype)


def _filled(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The first list, with the values of the second in place of None."""
    return [y if x is None else x for x, y in zip(some, others, strict=True)]


def _leaves(state: Any) -> tuple[list[Any], Any]:
    """The leaves of a state; None where a parameter has no gradient."""
    return jax.tree.flatten(state, is_leaf=lambda x: x is None)


def _check_updates(proposed: Any, updates: Any, layout: channels.Layout) -> None:
    """Raises a TypeError or ValueError if updates do not have the structure of the gradient."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (proposed, updates)]
    if structures[0] != structures[1]:
        returned, given = (textwrap.shorten(str(tree), 120) for tree in structures)
        raise TypeError(
            f"inner returned updates of another structure than it was given: {returned} instead of "
            f"{given}. Put the wrapper that changes the structure around freeze_dropped, such as "
            "optax.lookahead(cdb_jax.freeze_dropped(inner, policy), 5, 0.5)."
        )
    for x, leaf in zip(jax.tree.leaves(proposed), layout.leaves, strict=True):
        if hasattr(x, "shape") and tuple(x.shape) != leaf.shape:
            raise ValueError(
                f"inner returned an update of shape {tuple(x.shape)} for {leaf.path!r} of shape "
                f"{leaf.shape}; put what changes shapes before freeze_dropped, such as optax.chain("
                "optax.contrib.differentially_private_aggregate(...), "
                "cdb_jax.freeze_dropped(inner, policy))."
            )


def _check_states(new: Any, old: Any) -> None:
    """Raises a TypeError or ValueError if a step changed the structure or types of a state."""
    now, before = (
        dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None))
        for tree in (new, old)
    )
    if _leaves(new)[1] != _leaves(old)[1]:
        changed = [(new, keys) for keys in now if keys not in before]
        changed += [(old, keys) for keys in before if keys not in now]
        where = ""
        if changed:
            owner, _ = slots.holder(*changed[0])
            where = f", at {channels.canonical_path(changed[0][1])!r} in {owner}"
        raise TypeError(
            f"inner returned a state of another structure than it was given{where}, so its entries "
            "cannot be assigned to channels; put the transformation with that state outside: "
            "optax.chain(cdb_jax.freeze_dropped(inner, policy), other)."
        )
    for keys, x in now.items():
        types = [(tuple(a.shape), str(a.dtype)) for a in (x, before[keys]) if hasattr(a, "dtype")]
        if len(types) == 2 and types[0] != types[1]:
            raise ValueError(
                f"inner changed the entry {channels.canonical_path(keys)!r} of its state from "
                f"shape and dtype {types[1]} to {types[0]}, but a dropped channel must keep its "
                "entry; give the optimizer the dtype of its state, such as mu_dtype."
            )
