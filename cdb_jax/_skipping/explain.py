"""How the gradient of each leaf is computed, and why: for `channel_report`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from cdb_jax import channels
from cdb_jax._skipping import api, products, program
from cdb_jax.selection import Mode, Selection


def explain(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, selection: Selection
) -> list[str]:
    """For each leaf of `params`, what `value_and_grad(fun)(params, *args, **kwargs)` computes.

    The function is traced, not run; its arrays may be `jax.ShapeDtypeStruct`s.
    """
    api.check_function(fun)
    api.check_can_skip(selection)
    layout, found = _followed(fun, params, args, kwargs, selection)
    return [_gradient(layout, found, i, x) for i, x in enumerate(jax.tree.leaves(params))]


def _followed(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, selection: Selection
) -> tuple[channels.Layout, program.Followed]:
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}
    found = []

    def fill(arrays: dict[int, Any]) -> None:
        filled = [arrays.get(i, x) for i, x in enumerate(leaves)]
        params, args, kwargs = jax.tree.unflatten(treedef, filled)

        def value(params: Any) -> Any:
            result = fun(params, *args, **kwargs)
            return result[0] if isinstance(result, tuple) else result

        traced = program.trace(value, params, selection, has_aux=False)
        found.append((traced.layout, program.followed(traced, selection.groups)))

    jax.eval_shape(fill, arrays)
    return found[0]


def _gradient(layout: channels.Layout, found: program.Followed, i: int, x: Any) -> str:
    leaf, target = layout.leaves[i], found.targets[i]
    if target.modes == (Mode.FROZEN,):
        return "none: frozen"
    if target.modes == (Mode.FULL,):
        return "in full"
    if leaf.layer != leaf.path:
        return "masked only: a bias"
    uses = found.uses[i]
    others = "; ".join(map(str, uses.others))
    if not uses.products:
        return f"masked only: {others or 'not used'}"
    except_where = f", but not where {others}" if others else ""
    return "skipped" + except_where + _all_gather(target, leaf, x)


def _all_gather(target: products.Target, leaf: channels.Leaf, x: Any) -> str:
    """What a sharded channel axis costs."""
    sharding = getattr(x, "sharding", None)
    if target.part is None or not isinstance(sharding, jax.sharding.NamedSharding):
        return ""
    spec = (*sharding.spec, *[None] * len(leaf.shape))
    names = [spec[axis] for axis in leaf.channel if spec[axis] is not None]
    flat = [n for name in names for n in (name if isinstance(name, tuple) else (name,))]
    shards = math.prod(sharding.mesh.shape[name] for name in flat)
    if target.part.blocks % shards == 0:
        return ""
    advice = f'channel_choice="window" with window_groups a multiple of {shards} avoids it'
    return f", with an all-gather: the channels are sharded {shards} ways; {advice}"
