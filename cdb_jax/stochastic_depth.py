"""Stochastic depth: training drops whole residual branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax._checks import (
    check_bool,
    check_call_key,
    check_call_rate,
    check_choice,
    check_positive,
    check_rate,
    is_exactly,
    is_int,
)
from cdb_jax._scaling import scale

RateMode = Literal["uniform", "linear", "sense"]


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
      key: a JAX key for this call. Rates of exactly 0 and 1 need none.
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
    is_kept = _draw(rate, key, shape)
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
      key: a JAX key for this call. Rates of exactly 0 and 1 need none.
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
    return cond(_draw(rate, key, ()), kept, dropped, *args)


def _draw(rate: float | jax.Array, key: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    """Draws whether a branch is kept, for each entry of a shape."""
    key = check_call_key(key, "rngs.drop_path()")
    return jax.random.uniform(key, shape, jnp.float32) >= rate


def _scaled(x: jax.Array, rate: float | jax.Array, scale_by_keep: bool) -> jax.Array:
    """The output of a branch that is kept in training."""
    if not scale_by_keep:
        return x
    # A traced rate may be 1. Nothing is kept then, but a division by zero would give NaN gradients.
    keep = 1.0 - rate if isinstance(rate, float) else jnp.where(rate < 1.0, 1.0 - rate, 1.0)
    return scale(x, 1.0 / keep)


def in_evaluation(x: jax.Array, rate: float | jax.Array, scale_by_keep: bool) -> jax.Array:
    """The output of a branch in evaluation."""
    return x if scale_by_keep or is_exactly(rate, 0.0) else scale(x, 1.0 - rate)


def drop_path_rates(
    depth: int,
    budget: float,
    *,
    mode: RateMode = "linear",
    sensitivities: Sequence[float] | np.ndarray | jax.Array | None = None,
    maximum: float = 1.0,
) -> np.ndarray:
    """Drop rates with which a step keeps `budget` residual branches on average.

    For example, linear rates of 4 branches with a budget of 2.75 are 0.125, 0.25, 0.375 and 0.5,
    because 0.875 + 0.75 + 0.625 + 0.5 = 2.75. If you know the rate r of the last branch instead,
    use the rule of the original paper, `np.linspace(r / depth, r, depth)`, or the rule of timm's
    `calculate_drop_path_rates`, `np.linspace(0, r, depth)`.

    Args:
      depth: number of branches.
      budget: how many branches a step keeps on average: the sum of `1 - rates`.
      mode: "uniform": all rates are equal. "linear": the rate of the l-th branch is proportional to
        l. "sense": the probability of keeping a branch is proportional to its sensitivity. In all
        modes, rates are clipped to [0, maximum] and meet the budget.
      sensitivities: for "sense", `depth` numbers >= 0, such as those that `branch_sensitivities`
        returns. We could not confirm the paper's formula: the one in `branch_sensitivities`, the
        proportionality and the clipping are choices of this library.
      maximum: the highest drop rate.

    Returns:
      A float64 NumPy array of shape `(depth,)`: the rate of each branch, for `drop_path`.

    Raises:
      TypeError, ValueError: for a bad argument, or for a budget that cannot be met.

    Examples:
      >>> import cdb_jax
      >>> cdb_jax.drop_path_rates(4, 2.75)
      array([0.125, 0.25 , 0.375, 0.5  ])
      >>> cdb_jax.drop_path_rates(3, 2.0, mode="sense", sensitivities=[3.0, 1.0, 1.0])
      array([0. , 0.5, 0.5])

    References:
      `arXiv 1603.09382 <https://arxiv.org/abs/1603.09382>`_ (linear);
      `arXiv 2106.03091 <https://arxiv.org/abs/2106.03091>`_ (budget, uniform, sense).
    """
    check_positive("depth", depth)
    check_choice("mode", mode, get_args(RateMode))
    maximum = check_rate("maximum", maximum, schedule=False)
    weights = _weights(depth, mode, sensitivities)
    num_zeros = int(np.sum(weights == 0))
    lowest, highest = depth * (1.0 - maximum), depth - num_zeros * maximum
    slack = 1e-9 * depth  # A budget may be a sum of rounded numbers.
    if not lowest - slack <= budget <= highest + slack:
        reason = f" and {num_zeros} sensitivities of 0" if num_zeros else ""
        raise ValueError(
            f"budget={budget!r} must be between {lowest:g} and {highest:g}, the range of the "
            f"average number of kept branches with depth={depth}, maximum={maximum}{reason}."
        )
    if mode == "sense":
        return 1.0 - _proportional(weights, budget, 1.0 - maximum, 1.0)
    return _proportional(weights, depth - budget, 0.0, maximum)


def _weights(depth: int, mode: RateMode, sensitivities: Any) -> np.ndarray:
    """Weights proportional to the rates or, for "sense", to the probabilities of being kept."""
    if (sensitivities is not None) != (mode == "sense"):
        raise ValueError(
            f"sensitivities={sensitivities!r} with mode={mode!r}: pass sensitivities with "
            'mode="sense", and only then; branch_sensitivities measures them.'
        )
    if mode != "sense":
        return np.arange(1.0, depth + 1) if mode == "linear" else np.ones(depth)
    weights = np.asarray(sensitivities, np.float64)
    if weights.shape != (depth,) or not np.all((weights >= 0) & (weights < np.inf)):
        raise ValueError(
            f"sensitivities must be {depth} finite numbers >= 0, got {sensitivities!r}."
        )
    return weights


def _proportional(weights: np.ndarray, total: float, lowest: float, highest: float) -> np.ndarray:
    """Returns `clip(c * weights, lowest, highest)`, with c chosen so that the sum is `total`."""
    with np.errstate(divide="ignore"):
        logs = np.log2(weights)  # Weights may differ by hundreds of orders of magnitude.

    def values(log_c: float) -> np.ndarray:
        return np.clip(np.exp2(np.minimum(log_c + logs, 0.0)), lowest, highest)

    low, high = -2200.0, 2200.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if values(middle).sum() < total else (low, middle)
    found = values(high)
    is_free = (lowest < found) & (found < highest)
    if is_free.any():  # The clipped entries are now known, so the others can be exact.
        shares = weights[is_free] / weights[is_free].max()
        found[is_free] = shares * ((total - found[~is_free].sum()) / shares.sum())
    return np.clip(found, lowest, highest)


def branch_sensitivities(
    loss: Callable[..., jax.Array], depth: int, *args: Any, **kwargs: Any
) -> jax.Array:
    """Measures how much a loss depends on each residual branch, to first order.

    The sensitivity is the absolute derivative of the loss with respect to a gate of 1 that
    multiplies the branch. Average it over some batches, and measure it again later in training.
    Call `model.eval()` if the loss uses an NNX model, because its state must not change.

    Args:
      loss: a function `loss(gates, *args, **kwargs)` that multiplies the branches by `gates`, of
        shape `(depth,)`, and returns a scalar.
      depth: number of branches.
      *args: other arguments of the loss.
      **kwargs: other arguments of the loss, by name.

    Returns:
      A float32 array of shape `(depth,)`, for `drop_path_rates(..., mode="sense")`.

    Examples:
      >>> import cdb_jax
      >>> def loss(gates, x):
      ...     return x + gates[0] * 3.0 * x - gates[1] * x
      >>> cdb_jax.branch_sensitivities(loss, 2, 1.0)
      Array([3., 1.], dtype=float32)
    """
    gates = jnp.ones(depth, jnp.float32)
    return jnp.abs(jax.grad(loss)(gates, *args, **kwargs))
