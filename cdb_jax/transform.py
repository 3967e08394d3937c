"""`channel_drop_back`: the optax transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import _draw, channels
from cdb_jax._checks import short
from cdb_jax._compiling import compiled
from cdb_jax.policy import (
    ChannelChoice,
    Key,
    LayerChoice,
    LayerWeights,
    OtherLayers,
    Policy,
    Rate,
    Rescale,
)
from cdb_jax.selection import Group, Selection, check_selection, fraction_of, mask_leaves

Given = Selection | Sequence[Selection] | None  # The extra argument `selection`.


class ChannelDropBackState(NamedTuple):
    """State of `channel_drop_back`: plain arrays, which any checkpoint library can save.

    The key belongs to the policy, so training draws the same selections after a restart.

    Attributes:
      count: number of steps taken, which is the step of the next selection: int32, a scalar.
      dropped_fraction: `Selection.dropped_fraction` of the last step: float32, a scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    dropped_fraction: jax.Array  # shape=(), dtype=jnp.float32


def channel_drop_back(
    rate: Rate | Policy,
    key: Key | None = None,
    *,
    channel_axes: channels.ChannelAxes = channels.output_channels,
    layer_rate: Rate = 1.0,
    layer_choice: LayerChoice = "bernoulli",
    num_layers: int | None = None,
    layer_weights: LayerWeights = "uniform",
    other_layers: OtherLayers = "full",
    blocks: tuple[str, ...] = (),
    channel_choice: ChannelChoice = "bernoulli",
    window_groups: int | None = None,
    rescale: Rescale = "none",
    exempt: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
    share_with_bias: bool = False,
    hold: int | jax.Array = 1,
    root: str = "",
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a random subset of the channels learn in each step.

    With :math:`b_{lc} = 0` for a dropped channel :math:`c` of layer :math:`l`, and 1 otherwise, the
    updates become

    .. math:: g'_{lc} = \frac{b_{lc}}{s_l}\, g_{lc},

    where :math:`s_l` is 1 unless `rescale` says otherwise. The forward pass does not change. Before
    an optimizer, this masks gradients: momentum and weight decay still move a dropped channel.
    After an optimizer, it masks updates: a dropped channel keeps its weights, but its gradient
    still enters the optimizer's moments.

    Args:
      rate: a drop rate, as in `Policy`; or a `Policy` and no other argument.
      key: this and all the following arguments are settings of `Policy`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `ChannelDropBackState`. Its `update`
      does not need `params`. Without the extra argument `selection`, it draws a selection at the
      state's count. Otherwise `selection` must be drawn from an equal policy or made by
      `Selection.of`; a tuple of selections may also hold those of other policies. `update` ignores
      all other extra arguments.

    Raises:
      TypeError, ValueError: for a bad argument; when `init` or `update` gets a tree that does not
        fit the policy, or `update` a selection from another policy.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}
      >>> tx = optax.chain(
      ...     cdb_jax.channel_drop_back(0.5, key=jax.random.key(0)), optax.sgd(1.0)
      ... )
      >>> state = tx.init(params)
      >>> gradients = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(gradients, state, params)
      >>> updates["dense"]["kernel"]  # Two of the four output channels are dropped.
      Array([[-1., -0., -0., -1.],
             [-1., -0., -0., -1.]], dtype=float32)
      >>> state[0].dropped_fraction
      Array(0.5, dtype=float32)

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_, ICPR 2024.
    """
    # Here, `locals()` holds exactly the arguments.
    policy = _as_policy(**locals())

    def init_fn(params: Any) -> ChannelDropBackState:
        _check_not_paired(params)
        check_fits(policy, params)
        return ChannelDropBackState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update_fn(
        updates: Any,
        state: ChannelDropBackState,
        params: Any = None,
        *,
        selection: Given = None,
        **extra_args: Any,
    ) -> tuple[Any, ChannelDropBackState]:
        del extra_args
        check_state(state, ChannelDropBackState)
        _check_not_paired(updates)
        channels.check_parameters(updates, params, policy.root)
        layout, source = layout_and_source(policy, selection, updates)
        leaves, treedef = jax.tree.flatten(updates)
        touched = touched_leaves(source, layout, leaves)
        masked, count, fraction = _mask(layout, source, touched, state.count)
        leaves = [x if y is None else y for x, y in zip(leaves, masked, strict=True)]
        return jax.tree.unflatten(treedef, leaves), ChannelDropBackState(count, fraction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_fits(policy: Policy, params: Any) -> None:
    """Raises an error for parameters that a policy does not fit, before the first step does.

    `update` finds the layers again: frameworks may wrap parameters and updates differently.
    """
    # `optax.tree.map_params` passes an empty placeholder.
    if any(hasattr(x, "dtype") for x in jax.tree.leaves(params)):
        _draw.check_layers(policy, policy.layout(params))


@compiled
def _mask(
    layout: channels.Layout, source: Policy | Selection, leaves: list[Any], count: jax.Array
) -> tuple[list[Any], jax.Array, jax.Array]:
    groups, count, fraction = advance(layout, source, count)
    return mask_leaves(leaves, layout, groups, rescale=True), count, fraction


def layout_and_source(
    policy: Policy, given: Given, updates: Any
) -> tuple[channels.Layout, Policy | Selection]:
    """The leaves, and what decides about them: the selection that was given, or the policy.

    Several masks in one chain have different policies, and each uses its own selection.
    """
    if given is None:
        return policy.layout(updates), policy
    several = given if isinstance(given, (tuple, list)) else (given,)
    for selection in map(check_selection, several):
        if selection.policy is None or policy.draws_like(selection.policy):
            return channels.same_layout(updates, selection.layout), selection
    raise ValueError(
        "selection was drawn from a policy that differs from the one that channel_drop_back, "
        "freeze_dropped or compact uses, so they would drop different channels; use the same "
        "Policy object for both (two schedules are equal only if they are the same object). If a "
        "chain has several policies, pass a tuple with one selection for each. If selection is not "
        "passed, each transformation draws its own."
    )


def advance(
    layout: channels.Layout, source: Policy | Selection, count: jax.Array
) -> tuple[tuple[Group, ...], jax.Array, jax.Array]:
    """The groups of the given selection, or of one that the policy draws for this step.

    Also returns the next count and the dropped fraction.
    """
    selection = source if isinstance(source, Selection) else _draw.draw(layout, source, count)
    fraction = fraction_of(selection.groups, layout)
    return selection.groups, optax.safe_increment(count), fraction


def touched_leaves(
    source: Policy | Selection, layout: channels.Layout, leaves: Sequence[Any]
) -> list[Any]:
    """The leaves that a selection may change, and None in place of the others."""
    if isinstance(source, Selection):
        paths = {layer.path for group in source.groups for layer in group.layers}
    else:
        frozen = {leaf.path for leaf in layout.leaves if _draw.is_frozen(source, leaf)}
        layers = {leaf.path for leaf in layout.layers}
        paths = set() if source.drops_nothing else layers | frozen
    return [
        x if leaf.source in paths else None for x, leaf in zip(leaves, layout.leaves, strict=True)
    ]


def _as_policy(rate: Any, **settings: Any) -> Policy:
    """Returns the policy itself, or the one that `rate` and `settings` describe."""
    if isinstance(rate, optax.GradientTransformation):
        raise TypeError(
            "rate is an optax transformation; pass a drop rate or a Policy, such as "
            "cdb_jax.Policy(0.3, key=0)."
        )
    if not isinstance(rate, Policy):
        return Policy(rate, **settings)
    for field in dataclasses.fields(Policy)[1:]:
        value = settings[field.name]
        if type(value) is not type(field.default) or value != field.default:
            raise TypeError(
                f"{field.name}={short(value)} was given in addition to a Policy; set it in the "
                f"policy instead: dataclasses.replace(policy, {field.name}=...). "
                "optax.inject_hyperparams passes every number as an argument, so give it the rate "
                "and the settings instead of a Policy."
            )
    return rate


def check_state(state: Any, expected: type) -> None:
    """Raises a TypeError or ValueError if a state is not one that `init` returns."""
    name = expected.__name__
    if not isinstance(state, expected):
        raise TypeError(
            f"state must be a {name}, got a {type(state).__name__}; use the state returned by init "
            "of the same transformation."
        )
    shape = jnp.shape(state.count)  # type: ignore[attr-defined]
    if shape != ():
        raise ValueError(
            f"state: count has shape {shape}, so this {name} holds the states of several "
            "optimizers; use jax.vmap(tx.update), or index the state."
        )


def _check_not_paired(updates: Any) -> None:
    """Raises a TypeError for updates of `optax.lookahead`, which has two copies of the parameters.

    Their paths differ, so they would draw different channels.
    """

    def is_pair(x: Any) -> bool:
        return isinstance(x, optax.LookaheadParams)

    if any(map(is_pair, jax.tree.leaves(updates, is_leaf=is_pair))):
        raise TypeError(
            "updates are optax.LookaheadParams, whose fast and slow copies would draw different "
            "channels; move channel_drop_back inside the wrapper: optax.lookahead(optax.chain("
            "cdb_jax.channel_drop_back(...), optax.sgd(0.1)), 5, 0.5)."
        )
