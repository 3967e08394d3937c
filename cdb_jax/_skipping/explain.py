"""How the gradient of each leaf is computed, and why: for `channel_report`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from cdb_jax import _explicit as explicit, channels
from cdb_jax._skipping import api, follow, products, program
from cdb_jax._skipping.reasons import Obstacle, Reason
from cdb_jax.selection import Mode, Selection


class Explained(NamedTuple):
    """How the gradient of a leaf is computed.

    Attributes:
      text: the description that `channel_report` shows.
      is_skipped: whether products compute only the kept part of the gradient.
      flops: the floating-point operations of the full gradient, counting products only.
    """

    text: str
    is_skipped: bool
    flops: int


def explain(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, selection: Selection
) -> list[Explained]:
    """What `value_and_grad(fun)(params, *args, **kwargs)` computes for each leaf of `params`.

    The function is traced, not run; arrays may be `jax.ShapeDtypeStruct`s.
    """
    api.check_function(fun)
    arrays, rebuild = api.split_arrays((params, args, kwargs))
    explained: list[Explained] = []

    def trace(arrays: list[Any]) -> None:
        traced_params, traced_args, traced_kwargs = rebuild(arrays)

        def value(params: Any) -> Any:
            result = fun(params, *traced_args, **traced_kwargs)
            return result[0] if isinstance(result, tuple) else result

        traced = program.trace(value, traced_params, selection, has_aux=False)
        flops = program.weight_flops(traced)
        if not api.can_skip(selection):
            explained.extend(map(_not_skipped, traced.layout.leaves, flops))
            return
        found = program.followed(traced, selection.groups)
        for i, x in enumerate(jax.tree.leaves(params)):
            leaf, target = traced.layout.leaves[i], found.targets[i]
            explained.append(_explained(leaf, target, found.uses.get(i), x, flops[i]))

    jax.eval_shape(trace, arrays)
    return explained


def _not_skipped(leaf: channels.Leaf, flops: int) -> Explained:
    masked = f"masked only: {Obstacle(Reason.NOT_STATIC)}"
    return Explained("in full" if leaf.layer is None else masked, False, flops)


def _explained(
    leaf: channels.Leaf, target: products.Target, uses: follow.Uses | None, x: Any, flops: int
) -> Explained:
    if target.modes == (Mode.FROZEN,):
        return Explained("none: frozen", True, flops)
    if target.modes == (Mode.FULL,):
        return Explained("in full", False, flops)
    if uses is None:
        return Explained("masked only: a bias", False, flops)
    others = "; ".join(map(str, uses.others))
    if not uses.products:
        return Explained(f"masked only: {others or 'not used'}", False, flops)
    exception = f", but not where {others}" if others else ""
    return Explained("skipped" + exception + _all_gather(target, leaf, x), True, flops)


def _all_gather(target: products.Target, leaf: channels.Leaf, x: Any) -> str:
    """A note on the cost of a sharded channel axis; empty if there is none."""
    sharding = getattr(x, "sharding", None)
    if target.part is None or not isinstance(sharding, jax.sharding.NamedSharding):
        return ""
    shards = explicit.num_shards(sharding, leaf.channel)
    if shards == 1 or (len(leaf.channel) == 1 and target.part.blocks % shards == 0):
        return ""
    advice = f'channel_choice="window" with window_groups a multiple of {shards} avoids it'
    if len(leaf.channel) > 1:
        advice = "shard another axis to avoid it"
    return f", with an all-gather: the channels are sharded {shards} ways; {advice}"
