"""`channel_drop_back`: the optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import channels, selection
from cdb_jax.compiling import compiled
from cdb_jax.policy import Policy, Rate, as_policy


class ChannelDropBackState(NamedTuple):
    """State of `channel_drop_back`: plain arrays, and no key.

    The key is part of the program and the count is all that changes, so the state can be saved
    by anything that saves arrays, and a restart continues with the same selections.

    Attributes:
      count: the steps taken, and so the count of the next selection; an int32 scalar.
      dropped_fraction: of the last step, by parameters, as in `dropped_fraction`; a float32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    dropped_fraction: jax.Array  # shape=(), dtype=jnp.float32


def channel_drop_back(
    rate: Rate | Policy,
    *,
    key: Any = None,
    channel_axes: channels.ChannelAxes = channels.output_channels,
    layer_rate: Rate = 1.0,
    layer_choice: str = "bernoulli",
    layer_weights: Any = "uniform",
    other_layers: str = "full",
    channel_choice: str = "bernoulli",
    window_groups: int | None = None,
    rescale: str = "none",
    exempt: tuple[str, ...] = (),
    share_with_bias: bool = False,
    hold: int = 1,
    root: str = "",
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a random subset of the channels learn in each step.

    In every step each layer :math:`l` is masked with probability `layer_rate`, and each channel
    :math:`c` of a masked layer is dropped with probability `rate`. With :math:`b_{lc} = 0` for a
    dropped channel and 1 otherwise, the updates become

    .. math:: g'_{lc} = \frac{b_{lc}}{s_l}\, g_{lc},

    where :math:`s_l` is 1 or set by `rescale`. Forward pass and model are not touched. Placed
    before an optimizer it masks gradients, and a dropped channel still moves by momentum and weight
    decay; placed after one it masks updates, and a dropped channel stands still while its moments
    stay dense. If every channel of a masked layer would be dropped, none is, except with `rate=1`.

    Args:
      rate: probability that a channel of a masked layer is dropped; in [0, 1]. A number, an optax
        schedule of the count, or a scalar array, which may be traced. Alternatively a `Policy`, and
        then no other argument. With `rate=1` a masked layer stands still.
      key: an int, a JAX key of any implementation, or a legacy `jax.random.PRNGKey`. Required. The
        same key and count give the same selection, on every device and after any restart.
      channel_axes: which axis holds the channels: `output_channels` or `input_channels` (by the
        names of Flax and Equinox), an int or tuple for every leaf of two or more dimensions,
        `Axes`, a tree of those that is a prefix of the updates (None leaves alone), or a rule
        `(path, leaf)` that returns one of them.
      layer_rate: probability that a layer is masked in a step. A layer that is not learns in full.
        Number, schedule or scalar array.
      layer_choice: "bernoulli", every layer on its own; or "one", one layer picked in each step
        (Algorithm 1 of the paper), which is masked with probability `layer_rate`.
      layer_weights: how "one" picks: "uniform", "size" (by number of parameters) or a dict from
        path to weight.
      other_layers: with "one", whether the layers that are not picked learn in "full" or stand
        "still". In the latter case everything that is not `exempt` does: biases and normalisation
        too.
      channel_choice: "bernoulli", each channel on its own; "exact", k kept, all subsets equally
        likely; "window", a cyclic run of k, so that each channel is kept with probability k/C. Here
        :math:`k = \max(1, \mathrm{round}((1 - \mathrm{rate})\, C))`, and k = 0 for `rate=1`;
        with a rate that is an array or a schedule the rounding may differ by one.
      window_groups: the number g of equal groups of channels that share one window of k/g each.
      rescale: "none"; "expected", which divides by the probability that a channel of a masked layer
        learns: k/C, or :math:`1 - r + r^C` for "bernoulli" with rate r, where the last term is the
        all-dropped rule, and by `1 - layer_rate` for layers that learn when `rate=1`; or
        "realized", which divides by the fraction kept in this draw, as the released code does.
      exempt: glob patterns of paths to leave alone, such as `("head", "*/stem/kernel")`; a pattern
        also covers all that lies below what it matches.
      share_with_bias: whether a `bias` follows the kernel beside it, instead of learning always.
      hold: for how many steps a selection holds before the next one is drawn. With a wrapper around
        the optimizer that takes one step in several updates, such as
        `chain(optax.contrib.sam(..., sync_period=n), channel_drop_back(...))`, the number n of
        these; alternatively put `channel_drop_back` inside of the wrapper.
      root: path of the given tree inside a larger model, so that a part of the model, such as a
        pipeline stage, draws what the whole would.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `ChannelDropBackState`. It never needs
      `params`, and accepts any extra arguments.

    Raises:
      TypeError, ValueError: for a bad argument here; when updates are first seen, for a tree that
        does not fit `channel_axes`, `exempt`, `layer_weights` or `window_groups`.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}
      >>> tx = optax.chain(
      ...     cdb_jax.channel_drop_back(0.5, key=jax.random.key(0)), optax.sgd(1.0)
      ... )
      >>> state = tx.init(params)
      >>> gradients = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(gradients, state, params)
      >>> updates["dense"]["kernel"]  # Two of the four output channels stand still.
      Array([[-1., -0., -0., -1.],
             [-1., -0., -0., -1.]], dtype=float32)
      >>> state[0].dropped_fraction
      Array(0.5, dtype=float32)

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_, ICPR 2024.
    """
    settings = dict(
        key=key,
        channel_axes=channel_axes,
        layer_rate=layer_rate,
        layer_choice=layer_choice,
        layer_weights=layer_weights,
        other_layers=other_layers,
        channel_choice=channel_choice,
        window_groups=window_groups,
        rescale=rescale,
        exempt=exempt,
        share_with_bias=share_with_bias,
        hold=hold,
        root=root,
    )
    policy = as_policy(rate, settings)

    def init_fn(params: Any) -> ChannelDropBackState:
        # Layouts are resolved on updates: frameworks may wrap parameters differently in the two,
        # and `optax.tree.map_params` calls `init` with placeholders.
        del params
        return ChannelDropBackState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update_fn(
        updates: Any, state: ChannelDropBackState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ChannelDropBackState]:
        del extra_args
        check_state(state, ChannelDropBackState)
        check_not_paired(updates)
        channels.check_parameters(updates, params, policy.root)
        layout = policy.layout(updates)
        leaves, treedef = jax.tree.flatten(updates)
        touched = selection.touched(policy, layout, leaves)
        masked, count, fraction = _mask(layout, policy, touched, state.count)
        leaves = [x if y is None else y for x, y in zip(leaves, masked, strict=True)]
        return jax.tree.unflatten(treedef, leaves), ChannelDropBackState(count, fraction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@compiled
def _mask(
    layout: channels.Layout, policy: Policy, leaves: list[Any], count: jax.Array
) -> tuple[list[Any], jax.Array, jax.Array]:
    groups = selection.draw(policy, layout, count)
    masked = selection.mask(leaves, groups, policy, layout, count)
    return masked, optax.safe_increment(count), selection.fraction_of(groups, layout)


def check_state(state: Any, expected: type) -> None:
    """Raises a TypeError or ValueError if a state is not one that `init` makes."""
    name = expected.__name__
    if not isinstance(state, expected):
        raise TypeError(
            f"state must be the {name} that init of this transformation returned, got a "
            f"{type(state).__name__}, which is the state of another one; give the state of "
            "tx.init(params), with the same tx."
        )
    shape = jnp.shape(state.count)  # type: ignore[attr-defined]
    if shape != ():
        raise ValueError(
            f"state: the count of this {name} has shape {shape}, so it holds the states of several "
            "optimizers; use jax.vmap(tx.update), or index it."
        )


def check_not_paired(updates: Any) -> None:
    """Raises a TypeError for updates of `optax.lookahead`, in which each parameter is twice."""
    is_pair = lambda x: isinstance(x, optax.LookaheadParams)
    if any(map(is_pair, jax.tree.leaves(updates, is_leaf=is_pair))):
        raise TypeError(
            "updates are LookaheadParams, in which each parameter has a fast and a slow copy, and "
            "these would draw different channels; put it inside of the wrapper: optax.lookahead("
            "optax.chain(cdb_jax.channel_drop_back(...), optax.sgd(0.1)), 5, 0.5)."
        )


def selection_count(opt_state: Any) -> jax.Array:
    """The step that an optimizer state has reached: the `count` of `value_and_grad`.

    Finds the count of `channel_drop_back` in any nesting of chains, `optax.MultiSteps` and
    wrappers; where there is none, the `count` that Adam, schedules and other transformations keep.
    Under `MultiSteps` all micro-batches of a step share it and so add up under one selection.

    Args:
      opt_state: what `tx.init` or `tx.update` returned.

    Returns:
      The count, an int scalar.

    Raises:
      TypeError: for an optimizer in place of its state.
      ValueError: if the state has no count, or several that need not agree: some inside and some
        outside of a wrapper that holds steps back, or outside of `jit` different numbers. Then
        count steps yourself.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
      >>> cdb_jax.selection_count(tx.init({"kernel": jnp.zeros((2, 4))}))
      Array(0, dtype=int32)
    """
    by_path = {}
    if isinstance(opt_state, optax.GradientTransformation):
        raise TypeError(
            "opt_state is an optimizer; give its state, which tx.init and tx.update returned."
        )
    for keys, x in jax.tree_util.tree_leaves_with_path(opt_state):
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        by_path[path[:-1] if path[-1:] == ("value",) else path] = x  # NNX puts values into boxes.
    counts = {
        path[:-1]: x
        for path, x in by_path.items()
        if path[-1:] == ("count",)
        and jnp.shape(x) == ()
        and jnp.issubdtype(jnp.result_type(x), jnp.integer)
        # That of `reduce_on_plateau` starts anew again and again.
        and (*path[:-1], "plateau_count") not in by_path
    }
    counts = {at: x for at, x in counts.items() if (*at, "dropped_fraction") in by_path} or counts
    if not counts:
        raise ValueError(
            "opt_state has no count: it is no optimizer state, or nothing in the optimizer depends "
            "on the step; then count the steps yourself and give count=step."
        )
    # Some wrappers hold steps back, so that what is inside counts less than what is outside.
    wrappers = {path[: path.index("inner_state")] for path in by_path if "inner_state" in path}
    holders = {path[:-1] for path in by_path if path[-1] in ("mini_step", "notfinite_count")}
    holders |= {at for at in wrappers if (*at, "step") in by_path}  # optax.conditionally_*
    inside = {frozenset(h for h in holders if at[: len(h)] == h) for at in counts}
    known = {int(x) for x in counts.values() if not isinstance(x, jax.core.Tracer)}
    if len(inside) > 1 or len(known) > 1:
        listing = ", ".join("/".join((*at, "count")) for at in counts)
        raise ValueError(
            f"this optimizer state has several counts that need not agree ({listing}); give the "
            "one that is meant, or count the steps yourself."
        )
    return next(iter(counts.values()))
