"""`freeze_dropped`: dropped channels keep their weights and their optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import _optax_states as slots, channels
from cdb_jax._compiling import compiled
from cdb_jax.policy import Policy, check_policy
from cdb_jax.selection import Selection, broadcastable, kept_channels
from cdb_jax.transform import (
    Given,
    advance,
    check_fits,
    check_state,
    layout_and_source,
    touched_leaves,
)


class FreezeDroppedState(NamedTuple):
    """State of `freeze_dropped`.

    Attributes:
      count: number of steps taken, which is the step of the next selection: int32, a scalar.
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
    r"""Wraps an optimizer so that dropped channels keep their weights and their optimizer state.

    A zero gradient does not freeze a weight: momentum and weight decay still move it. With
    parameters :math:`\theta`, optimizer state :math:`s` and kept channels K, one step is

    .. math:: (u, s') = \mathrm{inner}(1_K\, g,\; s,\; \theta), \qquad
       \theta \leftarrow \theta + 1_K\, u, \qquad
       s \leftarrow 1_K\, s' + (1 - 1_K)\, s,

    so dropped channels keep both bit for bit. Entries of the state that belong to no channel, such
    as counts and norms over the whole tree, advance in every step. An entry that several channels
    share, such as a row of Adafactor's second moments, is frozen if all of them are dropped.

    Gradients are not rescaled: if `policy` has a `rescale`, chain `channel_drop_back(policy)`
    before this. Put everything that moves parameters, such as weight decay, into `inner`.

    Args:
      inner: the optimizer, which may be a chain. Put `optax.MultiSteps` around `freeze_dropped`,
        not inside it.
      policy: a `Policy`.
      slot_axes: rules for states whose entries do not have the shape of their parameter: a dict
        from the class of a state (a NamedTuple) to a function of the field's name, the parameter's
        shape (None for an entry without a parameter) and the entry's shape. For each axis of the
        entry, return the parameter axis it corresponds to, or None if there is none. Return None
        instead of the axes for an entry without channels, and NotImplemented for an entry that
        needs no rule. Rules for Adafactor, Muon and Mechanic are built in.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `FreezeDroppedState`. Its `update`
      takes a `selection` like that of `channel_drop_back`, and passes it on to `inner`.

    Raises:
      TypeError, ValueError: for a bad argument; when `init` or `update` gets a tree that does not
        fit the policy, or `update` a state entry whose channels are unknown, such as the memory of
        L-BFGS.

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
    slots.check_inner(inner, "freeze_dropped")
    policy = check_policy(policy)
    inner = optax.with_extra_args_support(inner)
    rules = slots.checked_rules(slot_axes or {})

    def init_fn(params: Any) -> FreezeDroppedState:
        check_fits(policy, params)
        count, fraction = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return FreezeDroppedState(count, fraction, inner.init(params))

    def update_fn(
        updates: Any,
        state: FreezeDroppedState,
        params: Any = None,
        *,
        selection: Given = None,
        **extra_args: Any,
    ) -> tuple[Any, FreezeDroppedState]:
        check_state(state, FreezeDroppedState)
        channels.check_parameters(updates, params, policy.root)
        layout, source = layout_and_source(policy, selection, updates)
        owners = slots.find((state.inner_state, updates), layout, rules, "freeze_dropped")
        if selection is not None:
            extra_args["selection"] = selection

        gradients, treedef = jax.tree.flatten(updates)
        touched = touched_leaves(source, layout, gradients)
        keep, masked, count, fraction = _mask(layout, source, touched, state.count)
        masked_updates = _filled(treedef, masked, gradients)
        proposed, inner_state = inner.update(
            masked_updates, state.inner_state, params, **extra_args
        )
        slots.check_updates(proposed, updates, policy.root, "freeze_dropped")
        slots.check_states(inner_state, state.inner_state, "freeze_dropped")

        steps = jax.tree.leaves(proposed)
        old, _ = slots.flatten(state.inner_state)
        new, state_treedef = slots.flatten(inner_state)
        # Entries without channels may be anything, so they stay out of the compiled program.
        triples = zip(owners, new, old, strict=True)
        pairs = [(x, y) if slot and x is not None else None for slot, x, y in triples]
        touched = touched_leaves(source, layout, steps)
        frozen_steps, frozen_entries = _freeze((layout, owners), keep, touched, pairs)
        inner_state = _filled(state_treedef, frozen_entries, new)
        new_state = FreezeDroppedState(count, fraction, inner_state)
        return _filled(treedef, frozen_steps, steps), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@compiled
def _mask(
    layout: channels.Layout, source: Policy | Selection, leaves: list[Any], count: jax.Array
) -> tuple[dict[str, jax.Array], list[Any], jax.Array, jax.Array]:
    """Returns the kept channels, the masked gradients, the next count and the dropped fraction."""
    groups, count, fraction = advance(layout, source, count)
    keep = kept_channels(groups)
    return keep, _replace_dropped(leaves, layout, keep, 0.0), count, fraction


@compiled
def _freeze(
    static: tuple[channels.Layout, tuple[Any, ...]],
    keep: dict[str, jax.Array],
    leaves: list[Any],
    pairs: list[Any],
) -> tuple[list[Any], list[Any]]:
    """Freezes dropped channels in updates and state entries; returns None for those without any.

    `static` holds the layout and the slots. Each item of `pairs` holds the new and the old value of
    an entry, or is None.
    """
    layout, owners = static
    entries = [
        pair and _where(keep, layout.leaves[slot.parameter], slot.axes, *pair)
        for slot, pair in zip(owners, pairs, strict=True)
    ]
    # Adding minus zero keeps the bits of every parameter; adding zero would turn -0.0 into 0.0.
    return _replace_dropped(leaves, layout, keep, -0.0), entries


def _replace_dropped(
    leaves: Sequence[Any], layout: channels.Layout, keep: Mapping[str, jax.Array], zero: float
) -> list[Any]:
    """Puts zero or minus zero into dropped channels; returns None for leaves that always learn."""

    def replaced(x: Any, leaf: channels.Leaf) -> jax.Array | None:
        number = complex(zero, zero) if jnp.iscomplexobj(x) else zero
        return _where(keep, leaf, range(x.ndim), x, jnp.asarray(number, x.dtype))

    pairs = zip(leaves, layout.leaves, strict=True)
    return [None if x is None else replaced(x, leaf) for x, leaf in pairs]


def _where(
    keep: Mapping[str, jax.Array], leaf: channels.Leaf, axes: Sequence[int | None], x: Any, y: Any
) -> jax.Array | None:
    """Returns `x` in kept channels and `y` elsewhere, or None if `leaf` always learns in full.

    `axes` are the axes of `leaf` that the axes of `x` correspond to.
    """
    if leaf.source not in keep:
        return None
    mask = broadcastable(keep[leaf.source], leaf, leaf.axes)
    named = [axis for axis in axes if axis is not None]
    mask = jnp.any(mask, axis=[axis for axis in range(mask.ndim) if axis not in named])
    mask = jnp.transpose(mask, [sorted(named).index(axis) for axis in named])
    mask = jnp.expand_dims(mask, [i for i, axis in enumerate(axes) if axis is None])
    return jnp.where(mask, x, y)


def _filled(treedef: Any, some: Sequence[Any], others: Sequence[Any]) -> Any:
    """Returns a tree of the leaves `some`, with leaves of `others` where these are None."""
    leaves = [y if x is None else x for x, y in zip(some, others, strict=True)]
    return jax.tree.unflatten(treedef, leaves)
