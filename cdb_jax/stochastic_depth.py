"""Stochastic depth: training drops whole residual branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cdb_jax._checks import (
    check_bool,
    check_branch,
    check_call_key,
    check_call_rate,
    is_exactly,
    is_int,
)
from cdb_jax._scaling import scale


def drop_path(
    x: jax.Array,
    rate: jax.typing.ArrayLike,
    *,
    key: jax.Array | None = None,
    sample_axis: int | None = 0,
    scale_by_keep: bool = True,
) -> jax.Array:
    """Drops a residual branch at random, independently for each sample or for the whole batch.

    Apply it to the branch before you add it: `x + drop_path(branch(x), rate, key=key)`. Inside a
    `shard_map` over the batch, fold `jax.lax.axis_index` into the key.

    Args:
      x: float array, the output of a branch.
      rate: probability that the branch is dropped, in [0, 1]; may be traced.
      key: a JAX key for this call. Optional if the rate is the number 0 or 1.
      sample_axis: the axis of the samples; None to drop the whole batch at once, as the original
        paper does.
      scale_by_keep: whether to divide what is kept by `1 - rate`, so that the mean is `x`. If not,
        you have to multiply the branch by `1 - rate` in evaluation.

    Returns:
      An array with the shape and dtype of `x`.

    Raises:
      TypeError, ValueError: for a bad rate, an axis that `x` does not have, or a missing key.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> cdb_jax.drop_path(jnp.ones((4, 2)), 0.5, key=jax.random.key(0))
      Array([[2., 2.],
             [2., 2.],
             [0., 0.],
             [0., 0.]], dtype=float32)

    References:
      Stochastic depth, `arXiv 1603.09382 <https://arxiv.org/abs/1603.09382>`_.
    """
    rate = check_call_rate(rate)
    check_bool("scale_by_keep", scale_by_keep)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"x must be an array of floats, got dtype {x.dtype}.")
    shape = [1] * x.ndim
    if sample_axis is not None:
        if not (is_int(sample_axis) and -x.ndim <= sample_axis < x.ndim):
            raise ValueError(
                f"sample_axis={sample_axis!r} is not an axis of x, which has shape {x.shape}; pass "
                "the axis of the samples, or None to drop all of x at once."
            )
        shape[sample_axis] = x.shape[sample_axis]
    if is_exactly(rate, 0.0, 1.0):
        return x if rate == 0.0 else jnp.zeros_like(x)
    is_kept = draw_kept(rate, key, shape)
    return jnp.where(is_kept, _scaled(x, rate, scale_by_keep), jnp.zeros((), x.dtype))


def drop_branch(
    branch: Callable[..., jax.Array],
    *args: Any,
    rate: jax.typing.ArrayLike,
    key: jax.Array | None = None,
    scale_by_keep: bool = True,
) -> jax.Array:
    """Like `drop_path(branch(*args), rate, sample_axis=None)`, but skips a dropped branch.

    The branch is put into a conditional, and computed only if it is kept. On CPU, XLA runs
    convolutions inside a conditional much more slowly, so use `drop_path` for those.

    Args:
      branch: a function of arrays that returns a float array.
      *args: arguments of `branch`: arrays or trees of arrays.
      rate: probability that the branch is dropped, in [0, 1]; may be traced.
      key: a JAX key for this call. Optional if the rate is the number 0 or 1.
      scale_by_keep: as in `drop_path`.

    Returns:
      An array with the shape and dtype of what `branch` returns.

    Raises:
      TypeError, ValueError: for a bad rate or a missing key.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> x = jnp.ones(3)
      >>> x + cdb_jax.drop_branch(jnp.exp, x, rate=0.5, key=jax.random.key(1))
      Array([1., 1., 1.], dtype=float32)
    """
    check_branch(branch, "drop_branch(branch, x, rate=0.5, key=key)")
    check_bool("scale_by_keep", scale_by_keep)
    return run_branch(branch, args, check_call_rate(rate), key, scale_by_keep)


def run_branch(
    branch: Callable[..., jax.Array],
    args: Sequence[Any],
    rate: float | jax.Array,
    key: jax.Array | None,
    scale_by_keep: bool,
    *,
    cond: Callable[..., jax.Array] = jax.lax.cond,
    eval_shape: Callable[..., jax.ShapeDtypeStruct] = jax.eval_shape,
) -> jax.Array:
    """`drop_branch` with the conditional and the tracing of JAX or of NNX."""

    def kept(*args: Any) -> jax.Array:
        return _scaled(branch(*args), rate, scale_by_keep)

    def dropped(*args: Any) -> jax.Array:
        return jnp.zeros_like(eval_shape(branch, *args))

    if is_exactly(rate, 0.0, 1.0):
        return kept(*args) if rate == 0.0 else dropped(*args)
    return cond(draw_kept(rate, key, ()), kept, dropped, *args)


def draw_kept(
    rate: float | jax.Array,
    key: jax.Array | None,
    shape: Sequence[int],
    source: str = "rngs.drop_path()",
) -> jax.Array:
    """Draws whether a branch is kept, for each entry of a shape."""
    key = check_call_key(key, source)
    return jax.random.uniform(key, shape, jnp.float32) >= rate


def _scaled(x: jax.Array, rate: float | jax.Array, scale_by_keep: bool) -> jax.Array:
    """The output of a branch that is kept in training."""
    if not scale_by_keep:
        return x
    return scale(x, 1.0 / keep_probability(rate))


def keep_probability(rate: float | jax.Array) -> float | jax.Array:
    """Returns the divisor for what is kept: `1 - rate`, or 1 for a rate of 1.

    Nothing is kept at rate 1, but a division by zero would give NaN gradients.
    """
    if isinstance(rate, float):
        return 1.0 - rate if rate < 1.0 else 1.0
    return jnp.where(rate < 1.0, 1.0 - rate, 1.0)


def in_evaluation(x: jax.Array, rate: float | jax.Array, scale_by_keep: bool) -> jax.Array:
    """The output of a branch in evaluation."""
    return x if scale_by_keep or is_exactly(rate, 0.0) else scale(x, 1.0 - rate)
