"""`compact`: optimizer state for the kept channels only."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import _optax_states as slots, channels
from cdb_jax._checks import check_choice
from cdb_jax._compiling import compiled
from cdb_jax._kept import Cut, KeptPart, Place, check_same_size
from cdb_jax.policy import Policy, check_policy
from cdb_jax.selection import Group, Selection, fraction_of
from cdb_jax.transform import Given, check_state, groups_from, layout_and_source

OnSwitch = Literal["reset", "carry"]


class CompactState(NamedTuple):
    """State of `compact`.

    Attributes:
      count: number of steps taken, which is the step of the next selection: int32, a scalar.
      dropped_fraction: `Selection.dropped_fraction` of the last step: float32, a scalar.
      held: which channels the inner state belongs to: int32, one vector for the whole tree.
      inner_state: the state of the inner optimizer for the kept part of each leaf.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    dropped_fraction: jax.Array  # shape=(), dtype=jnp.float32
    held: jax.Array  # shape=(n,), dtype=jnp.int32
    inner_state: Any


def compact(
    inner: optax.GradientTransformation,
    policy: Policy,
    *,
    on_switch: OnSwitch = "reset",
    slot_axes: Mapping[type, slots.SlotAxes] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that it keeps state for the channels that learn, and for no others.

    A policy with `hold=n` keeps a selection for n steps, and for so long the optimizer needs state
    for the kept channels K only. With parameters :math:`\theta`, gradients g and a state s of the
    size of :math:`\theta_K`, one step is

    .. math:: (u, s) \leftarrow \mathrm{inner}(g_K,\; s,\; \theta_K), \qquad
       \theta_K \leftarrow \theta_K + u,

    so dropped channels keep their weights bit for bit, and weight decay, clipping and norms see the
    kept part only. Leaves without channels, such as biases and normalisation, have full state. With
    a quarter of the channels, AdamW's moments take a quarter of the memory.

    Gradients may come from anywhere. Those of `cdb_jax.value_and_grad(loss, compact=True)` have
    the size of the kept part too; pass their `selection` and `params` to `update`. Gradients are
    not rescaled: if `policy` has a `rescale`, chain `channel_drop_back(policy)` before this. Put
    everything that moves parameters into `inner`.

    Args:
      inner: the optimizer, which may be a chain. Put `optax.MultiSteps` around `compact`, not
        inside it.
      policy: a `Policy` that keeps the same number of channels in every step: a rate that is a
        Python number, `layer_rate=1`, and `channel_choice` "window" or "exact". With
        `layer_choice="exact"` and `other_layers="frozen"`, a leaf that stacks layers has state for
        as many of them as can learn at once; a leaf that is a single layer has full state.
      on_switch: what happens when other channels are selected. "reset" starts the optimizer again:
        all moments, and the count of their bias correction. "carry" keeps them for the channels
        that are kept again; new channels start from zero. The counts of schedules always go on.
      slot_axes: with "carry", as in `freeze_dropped`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `CompactState`. Its `update` takes a
      `selection` like that of `channel_drop_back`.

    Raises:
      TypeError, ValueError: for a bad argument here; when `init` or `update` gets a tree that does
        not fit the policy; for a selection that keeps other numbers of channels.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}
      >>> policy = cdb_jax.Policy(0.75, key=0, channel_choice="window", hold=100)
      >>> tx = cdb_jax.compact(optax.sgd(0.1, momentum=0.9), policy)
      >>> state = tx.init(params)
      >>> jax.tree.map(jnp.shape, state.inner_state[0].trace)
      {'dense': {'bias': (4,), 'kernel': (2, 1)}}
      >>> gradients = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(gradients, state, params)
      >>> updates["dense"]["kernel"]
      Array([[-0. , -0.1, -0. , -0. ],
             [-0. , -0.1, -0. , -0. ]], dtype=float32)

    References:
      BAdam, which resets the state of a block of parameters, `arXiv 2404.02827
      <https://arxiv.org/abs/2404.02827>`_; GRASS, which keeps state for some rows,
      `arXiv 2406.17660 <https://arxiv.org/abs/2406.17660>`_.
    """
    slots.check_inner(inner, "compact")
    check_choice("on_switch", on_switch, ("reset", "carry"))
    policy = check_policy(policy)
    _check_policy(policy, on_switch)
    inner = optax.with_extra_args_support(inner)
    rules = slots.checked_rules(slot_axes or {})
    begin = _reset if on_switch == "reset" else functools.partial(_carry, rules)

    def init_fn(params: Any) -> CompactState:
        count, fraction = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        if not jax.tree.leaves(params):  # `optax.tree.map_params` looks where parameters go.
            return CompactState(count, fraction, jnp.zeros(0, jnp.int32), inner.init(params))
        layout = policy.layout(params)
        groups, _, _ = _draw(layout, policy, count)
        part = KeptPart.of(layout, groups, policy.layers_picked)
        return CompactState(count, fraction, part.held, inner.init(part.take(params)))

    def update_fn(
        updates: Any,
        state: CompactState,
        params: Any = None,
        *,
        selection: Given = None,
        **extra_args: Any,
    ) -> tuple[Any, CompactState]:
        check_state(state, CompactState)
        is_compact = params is not None and selection is not None and not _fit(updates, params)
        whole = params if is_compact else updates
        channels.check_parameters(whole, params, policy.root)
        layout, source = layout_and_source(policy, selection, whole)
        groups, count, fraction = _draw(layout, source, state.count)
        part = KeptPart.of(layout, groups, policy.layers_picked)
        gradients = part.mask(updates if is_compact else part.take(updates))
        kept_params = None if params is None else part.take(params)
        if is_compact:
            channels.check_parameters(gradients, kept_params, policy.root)
        fresh = inner.init(gradients if params is None else kept_params)
        _check_fits(part, fresh, state)

        inner_state = begin(part, gradients, fresh, state)
        proposed, new_state = inner.update(gradients, inner_state, kept_params, **extra_args)
        slots.check_updates(proposed, gradients, policy.root, "compact")
        slots.check_states(new_state, state.inner_state, "compact")
        return part.put(proposed, whole), CompactState(count, fraction, part.held, new_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fit(updates: Any, params: Any) -> bool:
    """Whether updates have the shapes of parameters, rather than those of kept parts."""
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (updates, params)]
    return shapes[0] == shapes[1]


@compiled
def _draw(
    layout: channels.Layout, source: Policy | Selection, count: jax.Array
) -> tuple[tuple[Group, ...], jax.Array, jax.Array]:
    """The groups of this step, the next count, and the dropped fraction."""
    groups = groups_from(source, layout, count)
    return groups, optax.safe_increment(count), fraction_of(groups, layout)


# The inner state with which a step begins. Each function takes the part that learns in this step,
# the gradients of that part, what `inner.init` returns for it, and the state.


def _reset(part: KeptPart, gradients: Any, fresh: Any, state: CompactState) -> Any:
    """Starts the optimizer again if other channels learn now."""
    restarting = slots.restarting((state.inner_state, gradients), "compact")
    (new, _), (old, treedef) = slots.flatten(fresh), slots.flatten(state.inner_state)
    has_switched = jnp.any(part.held != state.held)
    # A choice between zeros and an array costs no memory traffic, unlike a conditional.
    return treedef.unflatten(
        jnp.where(has_switched, x, y) if restarts and y is not None else y
        for restarts, x, y in zip(restarting, new, old, strict=True)
    )


def _carry(
    rules: slots.Rules, part: KeptPart, gradients: Any, fresh: Any, state: CompactState
) -> Any:
    """Moves what belongs to channels that learn again, if other channels learn now."""
    owners = slots.find((state.inner_state, gradients), part.kept_layout, rules, "compact")
    (new, _), (old, treedef) = slots.flatten(fresh), slots.flatten(state.inner_state)
    cuts = [cut for cut in part.cuts if not cut.is_frozen]
    moving = {}
    for i, (slot, x) in enumerate(zip(owners, old, strict=True)):
        cut = slot and cuts[slot.parameter].of_entry(tuple(x.shape), slot.axes)
        if cut and not cut.is_whole:
            moving[i] = cut
    before = part.at(state.held)

    def move(entries: dict[int, tuple[jax.Array, jax.Array]]) -> dict[int, jax.Array]:
        return {
            i: _moved(moving[i], x, y, before.places, part.places) for i, (x, y) in entries.items()
        }

    def stay(entries: dict[int, tuple[jax.Array, jax.Array]]) -> dict[int, jax.Array]:
        return {i: y for i, (_, y) in entries.items()}

    has_switched = jnp.any(part.held != state.held)
    moved = jax.lax.cond(has_switched, move, stay, {i: (new[i], old[i]) for i in moving})
    return treedef.unflatten(moved.get(i, x) for i, x in enumerate(old))


def _moved(
    cut: Cut,
    new: jax.Array,
    old: jax.Array,
    before: Mapping[str, Place],
    after: Mapping[str, Place],
) -> jax.Array:
    """The entry for the channels that are kept now: new values for those that were not before."""
    source = cut.leaf.source
    was_kept = cut.take(cut.put(jnp.ones_like(old, bool), before[source], old), after[source])
    whole = cut.put(old, before[source], old)
    return jnp.where(was_kept, cut.take(whole, after[source]), new)


def _check_policy(policy: Policy, on_switch: OnSwitch) -> None:
    """Raises a TypeError or ValueError for a policy that `compact` cannot use."""
    check_same_size(policy)
    if on_switch == "reset" and not isinstance(policy.hold, jax.Array) and policy.hold == 1:
        raise ValueError(
            "policy: hold=1 selects other channels in every step, so the optimizer would start "
            'again in every step; set hold, for example hold=100, or on_switch="carry".'
        )


def _check_fits(part: KeptPart, fresh: Any, state: CompactState) -> None:
    """Raises a ValueError if the state has other shapes than the part that learns now."""
    new, old = (
        {entry.path: entry.nodes[-1] for entry in slots.entries(tree)}
        for tree in (state._replace(held=part.held, inner_state=fresh), state)
    )
    for path in (path for path in old if path in new):
        if jnp.shape(new[path]) != jnp.shape(old[path]):
            raise ValueError(
                f"state: its entry {path!r} has shape {jnp.shape(old[path])}, but the selection of "
                f"this step keeps {jnp.shape(new[path])}; every selection must keep as many "
                "channels of each layer as the policy with which the state was made."
            )
