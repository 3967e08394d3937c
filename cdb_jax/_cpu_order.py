"""Products with their axes in the order for which XLA's CPU compiler has fast kernels.

That compiler reorders the axes of convolutions, but not inside a conditional, where a weight
gradient then takes a hundred times as long. A sum over several axes, as in weight gradients of
batches of sequences, takes up to twice as long as one over a single axis. This is obsolete once
`benchmarks/skipping.py` shows the same times for whole layers on CPU without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p, jit_p, remat_p

from cdb_jax import _jaxprs as jaxprs

Primitives = tuple[core.Primitive, ...]
SLOW: Primitives = (dot_general_p,)
SLOW_IN_CONDITIONALS: Primitives = (dot_general_p, conv_general_dilated_p)


def reordered(f: Callable[..., Any], slow: Primitives) -> Callable[..., Any]:
    """Returns `f`; on CPU, the primitives in `slow` get their axes in the order that is fast.

    Nested calls of `jit` and `jax.checkpoint` are inlined. Use this only for gradients that are not
    differentiated again, and only where XLA cannot merge what a checkpoint recomputes with the
    forward pass, as in a branch of a conditional.
    """

    def call(*args: Any) -> Any:
        closed, types = jax.make_jaxpr(f, return_shape=True)(*args)
        program, consts = jaxprs.opened(closed)
        if not _has_slow(program, slow):
            return f(*args)

        def in_order(*args: Any) -> Any:
            results = _evaluate(program, consts, jax.tree.leaves(args), slow)
            return jax.tree.unflatten(jax.tree.structure(types), results)

        return lax.platform_dependent(*args, cpu=in_order, default=f)

    return call


def _evaluate(
    program: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any], slow: Primitives
) -> list[Any]:
    values: dict[core.Var, Any] = dict(zip(program.constvars, consts, strict=True))
    values.update(zip(program.invars, args, strict=True))

    def read(v: jaxprs.Atom) -> Any:
        return v.val if isinstance(v, core.Literal) else values[v]

    for eqn in program.eqns:
        operands = [read(v) for v in eqn.invars]
        if not _is_slow(eqn, slow):
            results = jaxprs.apply(eqn, program, operands)
        elif eqn.primitive in _IN_ORDER:
            results = [_IN_ORDER[eqn.primitive](eqn, *operands)]
        else:
            results = _evaluate(*jaxprs.opened(eqn.params["jaxpr"]), operands, slow)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in program.outvars]


def _has_slow(program: Any, slow: Primitives) -> bool:
    return any(_is_slow(eqn, slow) for eqn in jaxprs.opened(program)[0].eqns)


def _is_slow(eqn: core.JaxprEqn, slow: Primitives) -> bool:
    if eqn.primitive in (jit_p, remat_p):
        return _has_slow(eqn.params["jaxpr"], slow)
    if eqn.primitive is dot_general_p and len(eqn.params["dimension_numbers"][0][0]) < 2:
        return False
    return eqn.primitive in slow


def dot_in_order(eqn: core.JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A product that sums over one axis instead of several adjacent ones."""
    contract, batch = eqn.params["dimension_numbers"]
    order = sorted(range(len(contract[0])), key=lambda i: contract[0][i])
    contract = [[axes[i] for i in order] for axes in contract]
    are_adjacent = all(list(np.diff(axes)) == [1] * (len(axes) - 1) for axes in contract)
    if len(order) < 2 or not are_adjacent:
        return _bind(eqn, lhs, rhs)
    merged = [
        x.reshape(*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :])
        for x, axes in zip((lhs, rhs), contract, strict=True)
    ]
    removed = len(order) - 1
    batch = [
        tuple(axis - removed if axis > summed[0] else axis for axis in axes)
        for axes, summed in zip(batch, contract, strict=True)
    ]
    numbers = (tuple((axes[0],) for axes in contract), tuple(batch))
    return _bind(eqn, *merged, dimension_numbers=numbers)


def convolution_in_order(eqn: core.JaxprEqn, x: jax.Array, w: jax.Array) -> jax.Array:
    """A convolution with axes (batch, ..., features) and (..., in, out), which is fast on CPU."""
    x_spec, kernel_spec, y_spec = eqn.params["dimension_numbers"]
    rank = x.ndim
    axes = (0, rank - 1, *range(1, rank - 1))
    numbers = lax.ConvDimensionNumbers(axes, (rank - 1, rank - 2, *range(rank - 2)), axes)
    y = _bind(
        eqn,
        jnp.transpose(x, _features_last(x_spec)),
        jnp.transpose(w, (*kernel_spec[2:], kernel_spec[1], kernel_spec[0])),
        dimension_numbers=numbers,
    )
    order = _features_last(y_spec)
    return jnp.transpose(y, [order.index(axis) for axis in range(rank)])


def _features_last(spec: Sequence[int]) -> tuple[int, ...]:
    return (spec[0], *spec[2:], spec[1])


def _bind(eqn: core.JaxprEqn, lhs: jax.Array, rhs: jax.Array, **changes: Any) -> jax.Array:
    return eqn.primitive.bind(lhs, rhs, **(eqn.params | changes))


_IN_ORDER = {dot_general_p: dot_in_order, conv_general_dilated_p: convolution_in_order}
