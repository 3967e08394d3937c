"""How the gradient of each leaf is computed, and why: for `channel_report`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from cdb_jax import _explicit as explicit, channels
from cdb_jax._skipping import api, follow, products, program
from cdb_jax._skipping.reasons import Obstacle, Reason
from cdb_jax.selection import Mode, Selection


def explain(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, selection: Selection
) -> list[str]:
    """What `value_and_grad(fun)(params, *args, **kwargs)` computes for each leaf of `params`.

    The function is traced, not run; arrays may be `jax.ShapeDtypeStruct`s.
    """
    api.check_function(fun)
    if not api.can_skip(selection):
        layers = {layer.path for group in selection.groups for layer in group.layers}
        masked = f"masked only: {Obstacle(Reason.NOT_STATIC)}"
        return [masked if x.source in layers else "in full" for x in selection.layout.leaves]
    arrays, rebuild = api.split_arrays((params, args, kwargs))
    explained: list[str] = []

    def trace(arrays: list[Any]) -> None:
        traced_params, traced_args, traced_kwargs = rebuild(arrays)

        def value(params: Any) -> Any:
            result = fun(params, *traced_args, **traced_kwargs)
            return result[0] if isinstance(result, tuple) else result

        traced = program.trace(value, traced_params, selection, has_aux=False)
        found = program.followed(traced, selection.groups)
        for i, x in enumerate(jax.tree.leaves(params)):
            explained.append(
                _gradient(traced.layout.leaves[i], found.targets[i], found.uses.get(i), x)
            )

    jax.eval_shape(trace, arrays)
    return explained


def _gradient(
    leaf: channels.Leaf, target: products.Target, uses: follow.Uses | None, x: Any
) -> str:
    if target.modes == (Mode.FROZEN,):
        return "none: frozen"
    if target.modes == (Mode.FULL,):
        return "in full"
    if uses is None:
        return "masked only: a bias"
    others = "; ".join(map(str, uses.others))
    if not uses.products:
        return f"masked only: {others or 'not used'}"
    exception = f", but not where {others}" if others else ""
    return "skipped" + exception + _all_gather(target, leaf, x)


def _all_gather(target: products.Target, leaf: channels.Leaf, x: Any) -> str:
    """A note on the cost of a sharded channel axis; empty if there is none."""
    sharding = getattr(x, "sharding", None)
    if target.part is None or not isinstance(sharding, jax.sharding.NamedSharding):
        return ""
    shards = explicit.num_shards(sharding, leaf.channel)
    if target.part.blocks % shards == 0:
        return ""
    advice = f'channel_choice="window" with window_groups a multiple of {shards} avoids it'
    return f", with an all-gather: the channels are sharded {shards} ways; {advice}"
