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
from cdb_jax._kept import KeptPart, check_same_size
from cdb_jax.policy import Policy, check_policy
from cdb_jax.selection import Selection
from cdb_jax.transform import Given, advance, check_state, layout_and_source

OnSwitch = Literal["carry", "reset"]


class CompactState(NamedTuple):
    """State of `compact`.

    Attributes:
      count: number of steps taken, which is the step of the next selection: int32, a scalar.
      dropped_fraction: `Selection.dropped_fraction` of the last step: float32, a scalar.
      held: the positions of the channels that the inner state belongs to: int32, one vector for the
        whole tree.
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
    on_switch: OnSwitch = "carry",
    slot_axes: Mapping[type, slots.SlotAxes] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that it keeps state for the channels that learn, and for no others.

    A policy with `hold=n` keeps a selection for n steps, during which the optimizer needs state
    only for the kept channels K. With parameters :math:`\theta`, gradients g and a state s of the
    size of :math:`\theta_K`, one step is

    .. math:: (u, s) \leftarrow \mathrm{inner}(g_K,\; s,\; \theta_K), \qquad
       \theta_K \leftarrow \theta_K + u,

    so dropped channels keep their weights bit for bit, and weight decay, clipping and norms see the
    kept part only. Leaves without channels, such as biases and normalisation, have full state. With
    a quarter of the channels, AdamW's moments take a quarter of the memory.

    Gradients of full size may come from any function. Those of
    `cdb_jax.value_and_grad(loss, kept_only=True)` have the size of the kept part; pass them to
    `update` with the same `selection` and with `params`. Never pass them to another optimizer: if
    only one channel is kept, its gradient is broadcast to all channels without an error. Put
    everything that moves parameters into `inner`; wrappers around `compact` need gradients of full
    size.

    Args:
      inner: the optimizer, which may be a chain. Put `optax.MultiSteps` around `compact`, not
        inside it, and then use gradients of full size.
      policy: a `Policy` that keeps the same number of channels in every step. It needs a rate that
        is a Python number, `layer_rate=1`, `rescale="none"`, and a `channel_choice` other than
        "bernoulli" unless the rate is 0 or 1. `layer_choice="exact"` needs `other_layers="frozen"`;
        a leaf that stacks layers then has state for as many of them as can learn at once, and a
        leaf that is a single layer has state even while it is frozen.
      on_switch: what happens when the selection changes. "carry" keeps the moments of channels that
        stay selected; the moments of the others start as in `inner.init`. Adam's bias correction
        does not restart, so the first updates of newly selected channels are too large: up to 6.6
        times, for a constant gradient and the default betas. "reset" reinitialises the optimizer:
        all moments, and the count of their bias correction. Schedules with their own count, as in
        `optax.adamw(schedule)`, continue in both cases.
      slot_axes: with "carry", as in `freeze_dropped`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `CompactState`. Its `update` takes a
      `selection` like that of `channel_drop_back`; one made by `Selection.of` must keep as many
      channels of each layer as the policy.

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
    check_choice("on_switch", on_switch, ("carry", "reset"))
    policy = check_policy(policy)
    check_policy_fits(policy, on_switch)
    inner = optax.with_extra_args_support(inner)
    rules = slots.checked_rules(slot_axes or {})
    begin = _reset if on_switch == "reset" else functools.partial(_carry, rules)

    def init_fn(params: Any) -> CompactState:
        count, fraction = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        if not jax.tree.leaves(params):  # `optax.tree.map_params` passes an empty placeholder.
            return CompactState(count, fraction, jnp.zeros(0, jnp.int32), inner.init(params))
        layout = policy.layout(params)
        groups, _, _ = _advance(layout, policy, count)
        part = KeptPart.from_groups(layout, groups, policy.layers_picked)
        inner_state = inner.init(part.take(params))
        slots.check_supported(inner_state, "compact")
        return CompactState(count, fraction, part.held, inner_state)

    def update_fn(
        updates: Any,
        state: CompactState,
        params: Any = None,
        *,
        selection: Given = None,
        **extra_args: Any,
    ) -> tuple[Any, CompactState]:
        check_state(state, CompactState)
        _check_no_function(extra_args)
        are_kept = _are_kept(updates, params, policy.root, selection)
        whole = params if are_kept else updates
        layout, source = layout_and_source(policy, selection, whole)
        groups, count, fraction = _advance(layout, source, state.count)
        part = KeptPart.from_groups(layout, groups, policy.layers_picked)
        if are_kept:
            part.check(updates)
        gradients = part.mask(updates if are_kept else part.take(updates))
        kept_params = None if params is None else part.take(params)
        template = gradients if params is None else kept_params
        fresh = inner.init(_without_missing(gradients, template))
        is_chosen = isinstance(source, Selection) and source.policy is None
        _check_shapes(part, fresh, state, is_chosen)

        inner_state = begin(part, gradients, fresh, state)
        proposed, new_state = inner.update(gradients, inner_state, kept_params, **extra_args)
        slots.check_updates(proposed, gradients, policy.root, "compact")
        slots.check_states(new_state, state.inner_state, "compact")
        return part.put(proposed, whole), CompactState(count, fraction, part.held, new_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _are_kept(updates: Any, params: Any, root: str, selection: Given) -> bool:
    """Whether updates have the size of the kept part, and not that of the parameters."""
    expected = {} if params is None else channels.shapes_by_path(params, root)
    if isinstance(selection, Selection) and params is None:
        expected = {leaf.path: leaf.shape for leaf in selection.layout.leaves}

    leaves = jax.tree.leaves_with_path(updates, is_leaf=channels.is_masked)
    masked = {channels.canonical_path(keys, root) for keys, x in leaves if channels.is_masked(x)}
    found: dict[str, Any] = dict.fromkeys(masked, "unknown (a MaskedNode)")
    found |= channels.shapes_by_path(updates, root)
    for path, shape in found.items():
        if shape == expected.get(path, shape):
            continue
        missing = [noun for noun, x in (("selection", selection), ("params", params)) if x is None]
        if missing:
            raise ValueError(
                f"{missing[0]} is missing: the shape of the gradient of {path!r} is {shape}, but "
                f"that of its parameter is {expected[path]}. Gradients of value_and_grad(..., "
                "kept_only=True) need params and selection: "
                "tx.update(grads, state, params, selection=selection). (Flax's "
                "TrainState.apply_gradients does not pass on a selection; call state.tx.update.)"
            )
        return True
    return False


def _without_missing(updates: Any, tree: Any) -> Any:
    """A tree without the leaves that have no update."""
    return jax.tree.map(
        lambda update, x: None if update is None else x,
        updates,
        tree,
        is_leaf=lambda x: x is None,
    )


def _check_no_function(extra_args: Mapping[str, Any]) -> None:
    if "value_fn" in extra_args:
        raise ValueError(
            "value_fn: the optimizer inside compact would call it with the kept part of the "
            "parameters only; use an optimizer without a line search, such as "
            "optax.lbfgs(learning_rate, linesearch=None)."
        )


_advance = compiled(advance)


# `_reset` and `_carry` return the inner state with which a step begins. They take the part that
# learns in this step, the gradients of that part, what `inner.init` returns for it, and the state.


def _reset(part: KeptPart, gradients: Any, fresh: Any, state: CompactState) -> Any:
    """Reinitialises the optimizer if the selection has changed."""
    restarting = slots.restarting((state.inner_state, gradients), "compact")
    (new, _), (old, treedef) = slots.flatten(fresh), slots.flatten(state.inner_state)
    has_switched = jnp.any(part.held != state.held)
    # A choice between zeros and an array costs no memory traffic, unlike a conditional.
    return treedef.unflatten(
        y if not restarts or x is None or y is None else jnp.where(has_switched, x, y)
        for restarts, x, y in zip(restarting, new, old, strict=True)
    )


def _carry(
    rules: slots.Rules, part: KeptPart, gradients: Any, fresh: Any, state: CompactState
) -> Any:
    """Moves the entries of channels that stay selected, if the selection has changed."""
    owners = slots.find((state.inner_state, gradients), part.kept_layout, rules, "compact")
    (new, _), (old, treedef) = slots.flatten(fresh), slots.flatten(state.inner_state)
    cuts = [cut for cut in part.cuts if not cut.is_frozen]
    moving = {}
    for i, (slot, x) in enumerate(zip(owners, old, strict=True)):
        cut = slot and cuts[slot.parameter].for_entry(tuple(x.shape), slot.axes)
        if cut and not cut.is_whole:
            moving[i] = cut
    before = part.with_places(state.held)

    def move(entries: dict[int, tuple[jax.Array, jax.Array]]) -> dict[int, jax.Array]:
        """The entries for the channels that learn now, with new values for those that did not."""
        found = {}
        for i, (x, y) in entries.items():
            source = moving[i].leaf.source
            found[i] = moving[i].move(y, x, before.places[source], part.places[source])
        return found

    def stay(entries: dict[int, tuple[jax.Array, jax.Array]]) -> dict[int, jax.Array]:
        return {i: y for i, (_, y) in entries.items()}

    has_switched = jnp.any(part.held != state.held)
    moved = jax.lax.cond(has_switched, move, stay, {i: (new[i], old[i]) for i in moving})
    return treedef.unflatten(moved.get(i, x) for i, x in enumerate(old))


def check_policy_fits(policy: Policy, on_switch: OnSwitch = "carry") -> None:
    """Raises a TypeError or ValueError for a policy that `compact` cannot use."""
    check_same_size(policy)
    if policy.rescale != "none":
        raise ValueError(
            f"policy: compact does not rescale gradients, so rescale={policy.rescale!r} would have "
            'no effect; use rescale="none". To rescale gradients of full size, chain '
            "channel_drop_back, with a policy that differs in rescale only, before compact."
        )
    if on_switch == "reset" and not isinstance(policy.hold, jax.Array) and policy.hold == 1:
        raise ValueError(
            "policy: hold=1 selects other channels in every step, so the optimizer would start "
            'again in every step; set hold, for example hold=100, or on_switch="carry".'
        )


def _check_shapes(part: KeptPart, fresh: Any, state: CompactState, is_chosen: bool) -> None:
    """Raises a ValueError if the state has other shapes than the part that learns now."""
    trees = state._replace(held=part.held, inner_state=fresh), state
    new, old = (
        {entry.path: getattr(entry.nodes[-1], "shape", None) for entry in slots.entries(tree)}
        for tree in trees
    )
    differing = [
        (path, shape, new[path])
        for path, shape in old.items()
        if path in new and None not in (shape, new[path]) and shape != new[path]
    ]
    # A layer that is frozen has MaskedNodes in place of arrays.
    new_treedef, old_treedef = (slots.flatten(tree)[1] for tree in trees)
    if is_chosen and (differing or new_treedef != old_treedef):
        raise ValueError(
            "selection was made by Selection.of, and in some layer it keeps a different number of "
            "channels than the policy of compact; split the parameters, or use freeze_dropped."
        )
    if differing:
        path, shape, kept = differing[0]
        raise ValueError(
            f"state: its entry {path!r} has shape {shape}, but the selection of this step keeps "
            f"{kept}; every selection must keep as many channels of each layer as the policy with "
            "which the state was made. Gradients of value_and_grad(..., kept_only=True) need "
            "params and selection."
        )
