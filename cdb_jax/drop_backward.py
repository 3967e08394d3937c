"""`drop_backward`: residual branches whose backward pass is dropped at random."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core.primitives import name_p, remat_p

from cdb_jax import _cpu_order as cpu_order, _jaxprs as jaxprs
from cdb_jax._checks import (
    check_bool,
    check_branch,
    check_call_rate,
    check_no_module,
    is_exactly,
)
from cdb_jax._scaling import scale_gradient, varying_with
from cdb_jax.stochastic_depth import draw_kept, keep_probability

CALL_NAME = "cdb_jax_drop_backward"  # `value_and_grad` finds branches in a program by this name.


def drop_backward(
    branch: Callable[..., Any],
    *args: Any,
    rate: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
    kept: jax.typing.ArrayLike | None = None,
    scale_by_keep: bool = False,
) -> Any:
    r"""Returns `branch(*args)`, and drops the backward pass of the branch at random.

    Use it for a residual branch, as in `x + drop_backward(branch, x, rate=0.5, key=key)`. Call it
    inside `jit`, with a different key for each branch. The forward pass is exact. With probability
    `rate`, the branch is treated as a constant in the backward pass: its weights have a gradient of
    zero, and the gradient of `x` passes only through the residual connection:

    .. math:: y = x + f(x), \qquad \bar x = \bar y + b \, \bar y f'(x), \qquad b \in \{0, 1\}.

    The backward pass runs inside a conditional, so a dropped branch computes nothing there. Because
    shapes are static, a dropped branch stores as much as a kept one: the results of products and
    convolutions, from which a kept branch recomputes the rest. If the branch itself uses
    `jax.checkpoint` or `checkpoint_name`, that decides what is stored. Under `vmap` with different
    draws, no work is saved, because conditionals become selects. Forward-mode derivatives are not
    defined.

    A gradient of zero does not freeze weights: an optimizer with momentum or weight decay still
    moves them. `branch` must be a function of arrays; for Flax modules, use
    `cdb_jax.nnx.DropBackward` or `cdb_jax.linen.DropBackward`.

    Args:
      branch: a function of arrays that returns an array, or a tree of arrays. It may close over
        others, such as its weights, which are differentiated too.
      *args: arguments of `branch`: arrays, trees of arrays, and settings such as bools.
      rate: probability that the backward pass is dropped, in [0, 1]; may be traced.
      key: a JAX key for this call. Optional if the rate is the number 0 or 1.
      kept: a bool scalar that decides whether to keep the backward pass, instead of a draw; usually
        an entry of the result of `kept_branches`. No key is needed then.
      scale_by_keep: whether to divide the gradient of a kept branch by `1 - rate`, so that the
        expected gradient is that of the branch. The paper does not.

    Returns:
      The result of `branch(*args)`, exactly as `jit` computes it without `drop_backward`.

    Raises:
      TypeError, ValueError: for a bad rate, a missing key, or if neither a rate nor `kept` is
        given.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> def f(x, seed):
      ...     return x + cdb_jax.drop_backward(jnp.square, x, rate=0.5, key=jax.random.key(seed))
      >>> value_and_grad = jax.jit(jax.value_and_grad(f))
      >>> [tuple(map(float, value_and_grad(3.0, seed))) for seed in (0, 1)]
      [(12.0, 7.0), (12.0, 1.0)]

    References:
      DropBP, `arXiv 2402.17812 <https://arxiv.org/abs/2402.17812>`_.
    """
    check_branch(branch, "drop_backward(branch, x, rate=0.5, key=key)")
    check_no_module(args, "args holds", "cdb_jax.nnx.DropBackward")
    check_bool("scale_by_keep", scale_by_keep)
    if rate is not None:
        rate = check_call_rate(rate)
    elif kept is None:
        raise ValueError("rate is missing; pass rate=0.5 and a key by name, or kept.")
    elif scale_by_keep:
        raise ValueError("rate is missing: scale_by_keep=True divides by 1 - rate.")
    if kept is None:
        assert rate is not None
        if is_exactly(rate, 0.0):
            return branch(*args)
        if is_exactly(rate, 1.0):
            return jax.tree.map(jax.lax.stop_gradient, branch(*args))
        kept = draw_kept(rate, key, (), "rngs.drop_backward()")
    kept = _check_kept(kept)
    if not scale_by_keep:
        return differentiated_if(kept, branch, *args)
    assert rate is not None
    factor = 1.0 / keep_probability(rate)

    def scaled(*args: Any) -> Any:
        return jax.tree.map(
            lambda x: scale_gradient(x, factor) if _is_float(x) else x, branch(*args)
        )

    return differentiated_if(kept, scaled, *args)


def differentiated_if(kept: jax.Array, branch: Callable[..., Any], *args: Any) -> Any:
    """`branch(*args)`, which is treated as a constant in the backward pass unless it is kept."""
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jaxprs.ARRAYS)}

    def of_arrays(arrays: dict[int, Any]) -> Any:
        filled = [arrays.get(i, x) for i, x in enumerate(leaves)]
        return branch(*jax.tree.unflatten(treedef, filled))

    closed, types = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
    program, consts = jaxprs.opened(closed)
    function = jaxprs.as_function(
        program.eqns, (*program.constvars, *program.invars), program.outvars, program
    )
    if not _any_equation(program, _decides_what_is_stored):
        # XLA cannot merge a conditional with the operations around it, so all that its branches
        # read is in memory. This stores the results of products and convolutions only.
        saved = jax.checkpoint_policies.dots_saveable
        function = jax.checkpoint(function, policy=saved, prevent_cse=False)

    def call(kept: jax.Array, operands: list[Any]) -> list[jax.Array]:
        return _gated(function, kept, operands)

    call.__name__ = CALL_NAME
    results = jax.jit(call)(kept, [*consts, *arrays.values()])
    return jax.tree.unflatten(jax.tree.structure(types), results)


def _any_equation(program: core.Jaxpr, matches: Callable[[core.JaxprEqn], bool]) -> bool:
    """Whether an equation of a program, or of the programs in it, matches."""
    inner = [x for eqn in program.eqns for x in jaxprs.programs_in(eqn.params)]
    return any(map(matches, program.eqns)) or any(_any_equation(x, matches) for x in inner)


def _decides_what_is_stored(eqn: core.JaxprEqn) -> bool:
    """Whether the user chose what an equation stores, or its results are complex.

    A checkpoint with a policy fails for complex numbers.
    """
    if eqn.primitive in (remat_p, name_p):  # `name_p` is `checkpoint_name`.
        return True
    dtypes = [getattr(v.aval, "dtype", np.bool_) for v in eqn.outvars]
    return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


class _Residuals(NamedTuple):
    kept: jax.Array
    vjp: Callable[[list[Any]], list[Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(function: Callable[..., list[Any]], kept: jax.Array, operands: list[Any]) -> list[Any]:
    return _varying(function(*operands), kept)


def _fwd(
    function: Callable[..., list[Any]], kept: jax.Array, operands: list[Any]
) -> tuple[list[Any], _Residuals]:
    # All floats, needed or not: a program that is traced once may be used for several layers, and
    # XLA leaves out the gradients that nothing reads.
    floats = [x if _is_float(x) else None for x in operands]

    def of_floats(floats: list[Any]) -> tuple[list[Any], list[Any]]:
        given = [y if x is None else x for x, y in zip(floats, operands, strict=True)]
        results = function(*given)
        return [x for x in results if _is_float(x)], results

    _, vjp, results = jax.vjp(of_floats, floats, has_aux=True)
    return _varying(results, kept), _Residuals(kept, vjp)


def _bwd(function: Any, residuals: _Residuals, cotangents: list[Any]) -> tuple[Any, ...]:
    kept, vjp = residuals
    floats = [x for x in cotangents if _is_float(x)]

    def compute(cotangents: list[jax.Array]) -> list[Any]:
        return vjp(cotangents)[0]

    def zeros(cotangents: list[jax.Array]) -> list[Any]:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, cotangents))

    compute_fast = cpu_order.reordered(compute, cpu_order.SLOW_IN_CONDITIONALS)
    return None, jax.lax.cond(kept, compute_fast, zeros, floats)


_gated.defvjp(_fwd, _bwd)


def _varying(results: list[Any], kept: jax.Array) -> list[Any]:
    return [varying_with(x, kept) if _is_float(x) else x for x in results]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _check_kept(kept: Any) -> jax.Array:
    if jnp.shape(kept) != () or jnp.result_type(kept) != np.bool_:
        raise ValueError(
            f"kept must be a bool scalar, got {kept!r}; pass an entry of what kept_branches "
            "returns."
        )
    return jnp.asarray(kept)
