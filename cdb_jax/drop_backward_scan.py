"""`drop_backward_scan`: stacked residual blocks, of which a fixed number has a backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cdb_jax import _jaxprs as jaxprs
from cdb_jax._checks import check_bool, check_branch, check_call_key, check_static_rate
from cdb_jax._scaling import scale


def drop_backward_scan(
    branch: Callable[[Any, jax.Array], jax.Array],
    blocks: Any,
    x: jax.Array,
    *,
    rate: float,
    key: jax.Array | None = None,
    scale_by_keep: bool = False,
) -> jax.Array:
    r"""Runs `x = x + branch(block, x)` for stacked blocks, some without a backward pass.

    The result is that of `jax.lax.scan` over the blocks. In the backward pass, exactly
    :math:`k = \max(1, \mathrm{round}(L (1 - \mathrm{rate})))` random blocks of the L take part;
    the others count as constants. Because k is static, there is no conditional, and only the inputs
    of these k blocks are stored. Values inside a block are recomputed, as under `jax.checkpoint`.
    Forward-mode and second derivatives are not defined. A gradient of zero does not freeze weights:
    an optimizer with momentum or weight decay still moves them.

    Args:
      branch: a function of a block and an array like `x` that returns an array like `x`, without
        the residual connection. It may close over other arrays, which are differentiated too.
      blocks: a tree of arrays whose first axis stacks L blocks.
      x: the input of the first block.
      rate: the share of the blocks whose backward pass is dropped, in [0, 1]; 1 drops all. It sets
        shapes, so it cannot be traced.
      key: a JAX key for this call. Optional if the rate is the number 0 or 1.
      scale_by_keep: whether to multiply the gradient of a kept branch by L / k. The paper does not.

    Returns:
      The output of the last block.

    Raises:
      TypeError, ValueError: for a bad rate, a missing key, blocks without a common first axis, or a
        branch whose result differs from `x` in shape or dtype.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> def f(blocks, x):
      ...     branch = lambda w, x: w * x
      ...     return cdb_jax.drop_backward_scan(branch, blocks, x, rate=0.5, key=jax.random.key(0))
      >>> value, gradient = jax.value_and_grad(f)(jnp.ones(4), 1.0)
      >>> value, gradient, jax.grad(f, argnums=1)(jnp.ones(4), 1.0)
      (Array(16., dtype=float32), Array([2., 2., 0., 0.], dtype=float32), Array(4., dtype=float32))

    References:
      DropBP, `arXiv 2402.17812 <https://arxiv.org/abs/2402.17812>`_.
    """
    check_branch(branch, "drop_backward_scan(branch, blocks, x, rate=0.5, key=key)")
    rate = check_static_rate(rate)
    check_bool("scale_by_keep", scale_by_keep)
    x = jnp.asarray(x)
    depth = _check_depth(blocks)
    first = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), blocks)
    closed, result = jax.make_jaxpr(branch, return_shape=True)(first, x)
    is_array = isinstance(result, jax.ShapeDtypeStruct)
    if not is_array or (result.shape, result.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"branch returned {result}, but x has shape {x.shape} and dtype {x.dtype}; a residual "
            "branch returns an array like its input."
        )
    program, consts = jaxprs.opened(closed)
    function = jaxprs.as_function(
        program.eqns, (*program.constvars, *program.invars), program.outvars, program
    )
    num_kept = max(1, round(depth * (1.0 - rate))) if rate < 1.0 else 0
    indices = jnp.arange(num_kept)
    if 0 < num_kept < depth:
        key = check_call_key(key, "rngs.drop_backward()")
        indices = jnp.sort(jax.random.permutation(key, depth)[:num_kept])
    call = _Call(function, depth, depth / num_kept if scale_by_keep and num_kept else 1.0)
    return _run(call, indices, list(consts), jax.tree.leaves(blocks), x)


def _check_depth(blocks: Any) -> int:
    shapes = [jnp.shape(w) for w in jax.tree.leaves(blocks)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or not all(sizes) or sizes == {(0,)}:
        raise ValueError(
            f"blocks must be arrays whose first axis stacks the blocks, got shapes {shapes}; stack "
            "them with jax.tree.map(lambda *x: jnp.stack(x), *blocks)."
        )
    return shapes[0][0]


class _Call(NamedTuple):
    """What is static: the branch, the number of blocks, the factor of kept gradients."""

    function: Callable[..., list[jax.Array]]
    depth: int
    factor: float

    def branch(self, consts: list[Any], block: list[Any], x: jax.Array) -> jax.Array:
        return self.function(*consts, *block, x)[0]

    def advance(
        self, consts: list[Any], blocks: list[Any], x: jax.Array, start: Any, stop: Any
    ) -> jax.Array:
        """Runs the blocks from `start` to `stop`."""

        def body(i: Any, x: jax.Array) -> jax.Array:
            return x + self.branch(consts, _block(blocks, i), x)

        return jax.lax.fori_loop(start, stop, body, x)


def _block(blocks: list[Any], i: Any) -> list[Any]:
    return [jax.lax.dynamic_index_in_dim(w, i, keepdims=False) for w in blocks]


class _Residuals(NamedTuple):
    indices: jax.Array  # The indices of the kept blocks, in ascending order.
    inputs: jax.Array  # The inputs of the kept blocks, stacked.
    consts: list[Any]
    blocks: list[Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    call: _Call, indices: jax.Array, consts: list[Any], blocks: list[Any], x: jax.Array
) -> jax.Array:
    return call.advance(consts, blocks, x, 0, call.depth)


def _fwd(
    call: _Call, indices: jax.Array, consts: list[Any], blocks: list[Any], x: jax.Array
) -> tuple[jax.Array, _Residuals]:
    def to_next_kept(carry: tuple[jax.Array, Any], stop: jax.Array) -> tuple[Any, jax.Array]:
        x, start = carry
        x = call.advance(consts, blocks, x, start, stop)
        return (x, stop), x

    (x, start), inputs = jax.lax.scan(to_next_kept, (x, jnp.zeros((), indices.dtype)), indices)
    x = call.advance(consts, blocks, x, start, call.depth)
    return x, _Residuals(indices, inputs, consts, blocks)


def _bwd(call: _Call, residuals: _Residuals, dx: jax.Array) -> tuple[Any, ...]:
    indices, inputs, consts, blocks = residuals

    def through_block(carry: Any, kept: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        dx, dconsts, dblocks = carry
        i, x = kept
        _, vjp = jax.vjp(call.branch, consts, _block(blocks, i), x)
        dy = scale(dx, call.factor) if call.factor != 1.0 else dx
        branch_dconsts, dblock, branch_dx = vjp(dy)
        dconsts = jax.tree.map(_add, dconsts, branch_dconsts)
        dblocks = [
            w if _is_float0(dw) else jax.lax.dynamic_update_index_in_dim(w, dw, i, 0)
            for w, dw in zip(dblocks, dblock, strict=True)
        ]
        return (dx + branch_dx, dconsts, dblocks), None

    zeros = jax.tree.map(jnp.zeros_like, (consts, blocks))
    (dx, dconsts, dblocks), _ = jax.lax.scan(
        through_block, (dx, *zeros), (indices, inputs), reverse=True
    )
    return None, _floats(dconsts), _floats(dblocks), dx


_run.defvjp(_fwd, _bwd)


def _is_float0(x: Any) -> bool:
    return x.dtype == jax.dtypes.float0


def _add(x: jax.Array, y: Any) -> jax.Array:
    return x if _is_float0(y) else x + y


def _floats(xs: list[jax.Array]) -> list[jax.Array | None]:
    """Replaces the gradients of integers by None."""
    return [x if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in xs]
