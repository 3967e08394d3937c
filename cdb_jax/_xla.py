"""Workarounds for what XLA does to small computations whose results many large ones read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_jvp  # JAX cannot transpose loops of this kind.
def alone_on_cpu(tree: Any) -> Any:
    """Returns a tree of arrays that the CPU compiler does not fuse with what reads them.

    That compiler drops optimization barriers before it fuses, but it fuses nothing through a loop.
    A loop works in place, unlike a conditional, whose branches copy what they return. On other
    platforms, either may wait for the host. This is obsolete once the CPU compiler keeps
    optimization barriers until it has fused (`test_lowering.py` counts what it repeats).

    Args:
      tree: the arrays. If the first is constant, the compiler drops the loop.
    """
    first = next((x for x in jax.tree.leaves(tree) if x.size), None)
    if first is None:
        return tree
    entry = first[(0,) * first.ndim]
    if jnp.issubdtype(first.dtype, jnp.inexact):
        entry = jax.lax.bitcast_convert_type(jnp.real(entry).astype(jnp.float32), jnp.int32)
    never = (entry.astype(jnp.int32) | 1) == 0  # The compiler does not know that this is false.

    def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return ~carry[0], jax.tree.map(jnp.zeros_like, carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, (never, tree))[1]


@alone_on_cpu.defjvp
def _alone_on_cpu_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return alone_on_cpu(*primals), tangents[0]


class _Block(NamedTuple):
    """Rows of one of several matrices, as an array whose leading axes have the shape `stack`."""

    matrix: int
    start: int
    stop: int
    stack: tuple[int, ...]


def unstack(
    matrices: Sequence[jax.Array], stacks: Sequence[Sequence[tuple[int, ...]]]
) -> list[list[jax.Array]]:
    """Cuts each matrix into blocks of rows, which XLA computes only once.

    Fused into parameter-sized loops, a draw would be repeated for each weight of a channel, and
    every layer would be a separate loop to compile: four times the compilation time of AdamW on a
    ViT-B.

    The CPU compiler compiles equal loops only once, but slices from different rows are different
    loops. So on CPU, a block of one row is not sliced but picked by comparing row numbers with a
    constant: the loops are equal, and the draw for a ViT-S compiles in a third of the time.

    Both workarounds are obsolete once `benchmarks/overhead.py` shows the same compilation time on
    CPU without them.

    Args:
      matrices: arrays of shape `(rows, ...)` without negative numbers.
      stacks: for each matrix, the shapes into which the rows of its blocks are arranged, in order:
        `()` for a single row, `(12,)` for twelve.
    """
    blocks = []
    for i, shapes in enumerate(stacks):
        stop = 0
        for shape in shapes:
            start, stop = stop, stop + math.prod(shape)
            blocks.append(_Block(i, start, stop, shape))
    if not blocks:
        return [[] for _ in stacks]

    def on_cpu(matrices: Sequence[jax.Array]) -> list[jax.Array]:
        return alone_on_cpu(_cut(blocks, _pick, matrices))

    def elsewhere(matrices: Sequence[jax.Array]) -> list[jax.Array]:
        # A matrix of indices is computed once as a whole, because each cut would be a kernel on a
        # GPU. Masks and starts of windows are cut first: XLA joins loops that read the same matrix,
        # so all gradients would be stored until the last one is known.
        are_indices = [x.ndim > 1 and x.dtype == jnp.int32 for x in matrices]
        drawn = [
            jax.lax.optimization_barrier(x) if is_index else x
            for x, is_index in zip(matrices, are_indices, strict=True)
        ]
        return [
            rows if are_indices[block.matrix] else jax.lax.optimization_barrier(rows)
            for block, rows in zip(blocks, _cut(blocks, _slice, drawn), strict=True)
        ]

    results = iter(jax.lax.platform_dependent(matrices, cpu=on_cpu, default=elsewhere))
    return [list(itertools.islice(results, len(shapes))) for shapes in stacks]


def _cut(
    blocks: Sequence[_Block],
    rows_of: Callable[[jax.Array, int, int], jax.Array],
    matrices: Sequence[jax.Array],
) -> list[jax.Array]:
    found = []
    for block in blocks:
        matrix = matrices[block.matrix]
        rows = rows_of(matrix, block.start, block.stop)
        found.append(rows.reshape(block.stack + matrix.shape[1:]))
    return found


def _slice(matrix: jax.Array, start: int, stop: int) -> jax.Array:
    return matrix[start:stop]


def _pick(matrix: jax.Array, start: int, stop: int) -> jax.Array:
    """`matrix[start:stop]`; a single row is picked from a few rows around it."""
    if stop > start + 1:
        return matrix[start:stop]
    tile = 64 if matrix.ndim == 1 else 8
    first = max(0, min(start // tile * tile, len(matrix) - tile))
    rows = matrix[first : first + tile]
    is_row = np.arange(first, first + len(rows)) == start
    is_row = is_row.reshape(-1, *[1] * (matrix.ndim - 1))
    return jnp.max(rows, axis=0, where=is_row, initial=matrix.dtype.type(0))
