"""Workarounds for what XLA does to small computations that many large ones read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The most results of one conditional: the time to compile it grows with their square.
MAX_RESULTS = 64


def materialise(f: Callable[[Any], Any], x: Any, *, cpu_only: bool = False) -> Any:
    """Returns `f(x)`, which XLA computes once instead of once for every array that reads it.

    Fused into parameter-sized loops, a draw would be repeated for each weight of a channel, and
    every layer would become a loop of its own to compile: four times the compilation time of
    AdamW on a ViT-B. The CPU compiler drops optimization barriers before it fuses, but it fuses
    nothing through a conditional. On other platforms a conditional may wait for the host, and
    barriers hold. The workaround is obsolete once `benchmarks/overhead.py` shows the same
    compilation time on CPU without it.

    Args:
      f: a function of a tree of arrays, at least one of them of ints or bools.
      x: its argument.
      cpu_only: whether other platforms may fuse `f` with what reads it.
    """

    def zeros(x: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(f, x))

    def computed_once(x: Any) -> Any:
        return f(x) if cpu_only else jax.lax.optimization_barrier(f(x))

    if not jax.tree.leaves(x):
        return f(x)
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: jax.lax.cond(_true_at_run_time(x), f, zeros, x),
        default=computed_once,
    )


def _true_at_run_time(x: Any) -> jax.Array:
    """True, but no compiler knows, unless all of `x` is constant: else it would drop the branch."""
    is_whole = lambda leaf: leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.integer)
    whole = filter(is_whole, jax.tree.leaves(x))
    entries = [leaf[(0,) * leaf.ndim].astype(jnp.int32) for leaf in whole]
    return (functools.reduce(jnp.bitwise_or, entries) | 1) != 0
