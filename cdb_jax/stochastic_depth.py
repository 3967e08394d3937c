"""Stochastic depth: residual branches that are dropped as a whole in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax._checks import check_call_key, check_choice, check_rate
from cdb_jax._scaling import scale

Mode = Literal["uniform", "linear", "sense"]


def drop_path(
    x: jax.Array,
    rate: float | jax.typing.ArrayLike,
    *,
    key: jax.Array | None = None,
    sample_axis: int | None = 0,
    scale_by_keep: bool = True,
) -> jax.Array:
    r"""Drops a residual branch, independently for each sample or for the whole batch.

    With the probability :math:`p = 1 - \mathrm{rate}` of keeping it and :math:`b \sim
    \mathrm{Bernoulli}(p)`, drawn for each index of `sample_axis`,

    .. math:: y = \frac{b}{p}\, x, \qquad \text{or } y = b\, x \text{ without scaling.}

    Apply it to the branch before you add it: `x + drop_path(branch(x), rate, key=key)`. Inside a
    `shard_map` over the batch, fold `jax.lax.axis_index` into the key, or every device draws the
    same for its samples.

    Args:
      x: float array, the output of a branch.
      rate: probability that the branch is dropped, in [0, 1]; may be traced.
      key: a JAX key, for this call alone. Not needed for rate 0 or 1.
      sample_axis: the axis of the samples, each of which draws independently; None for one draw for
        the whole batch, as in the first paper.
      scale_by_keep: whether to divide what is kept by p, so that the mean is x and evaluation needs
        no change. Without it, multiply the branch by p in evaluation.

    Returns:
      An array of the shape and dtype of `x`.

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
    rate = check_rate("rate", rate, schedule=False)
    check_scale_by_keep(scale_by_keep)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"x must be an array of floats, got dtype {x.dtype}.")
    is_int = isinstance(sample_axis, (int, np.integer)) and not isinstance(sample_axis, bool)
    if sample_axis is not None and not (is_int and -x.ndim <= sample_axis < x.ndim):
        raise ValueError(
            f"sample_axis={sample_axis!r} is not an axis of x, whose shape is {x.shape}; give the "
            "axis of the batch, or None for one draw for all."
        )
    if is_certain(rate):
        return x if rate == 0.0 else jnp.zeros_like(x)
    shape = [1] * x.ndim
    if sample_axis is not None:
        shape[sample_axis] = x.shape[sample_axis]
    keep = _draw_keep(rate, key, shape)
    return jnp.where(keep, _scaled(x, rate, scale_by_keep), jnp.zeros((), x.dtype))


def drop_branch(
    branch: Callable[..., jax.Array],
    *args: Any,
    rate: float | jax.typing.ArrayLike,
    key: jax.Array | None = None,
    scale_by_keep: bool = True,
) -> jax.Array:
    """`drop_path(branch(*args), rate, sample_axis=None)` that does not compute what it drops.

    A conditional leaves out the branch, forward and backward, when it is dropped for the whole
    batch. On CPU, XLA runs convolutions inside a conditional far slower, so use `drop_path` for
    those. A dropped branch does not update its random counts or batch statistics.

    Args:
      branch: a function of arrays that returns a float array.
      *args: its arguments, arrays or trees of arrays.
      rate: probability that the branch is dropped, in [0, 1]; may be traced.
      key: a JAX key, for this call alone. Not needed for rate 0 or 1.
      scale_by_keep: as in `drop_path`.

    Returns:
      An array of the shape and dtype of what `branch` returns.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> x = jnp.ones(3)
      >>> x + cdb_jax.drop_branch(jnp.exp, x, rate=0.5, key=jax.random.key(1))
      Array([1., 1., 1.], dtype=float32)
    """
    rate = check_rate("rate", rate, schedule=False)
    check_scale_by_keep(scale_by_keep)
    return run_branch(branch, args, rate, key, scale_by_keep, jax.lax.cond, jax.eval_shape)


def run_branch(
    branch: Callable[..., jax.Array],
    args: Sequence[Any],
    rate: Any,
    key: jax.Array | None,
    scale_by_keep: bool,
    cond: Callable[..., jax.Array],
    eval_shape: Callable[..., Any],
) -> jax.Array:
    """`drop_branch`, with the conditional and the tracing of JAX or those of NNX."""

    def kept(*args: Any) -> jax.Array:
        return _scaled(branch(*args), rate, scale_by_keep)

    def dropped(*args: Any) -> jax.Array:
        return jnp.zeros_like(eval_shape(branch, *args))

    if is_certain(rate):
        return kept(*args) if rate == 0.0 else dropped(*args)
    return cond(_draw_keep(rate, key, ()), kept, dropped, *args)


def is_certain(rate: Any) -> bool:
    """Whether a rate leaves nothing to draw."""
    return isinstance(rate, float) and rate in (0.0, 1.0)


def check_scale_by_keep(scale_by_keep: Any) -> bool:
    if not isinstance(scale_by_keep, bool):
        raise TypeError(f"scale_by_keep must be True or False, got {scale_by_keep!r}.")
    return scale_by_keep


def _draw_keep(rate: Any, key: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    """Whether a branch is kept, for each entry of a shape: bool."""
    key = check_call_key(key, "rngs.drop_path()")
    return jax.random.uniform(key, shape, jnp.float32) >= jnp.asarray(rate, jnp.float32)


def _scaled(x: jax.Array, rate: Any, scale_by_keep: bool) -> jax.Array:
    """A branch that is kept, divided by the probability of that."""
    if not scale_by_keep:
        return x
    if isinstance(rate, float):
        return scale(x, 1.0 / (1.0 - rate))
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    # With rate 1 nothing is kept, and nothing may become a NaN.
    return scale(x, 1.0 / jnp.where(keep > 0, keep, 1.0))


def in_evaluation(x: jax.Array, rate: Any, scale_by_keep: bool) -> jax.Array:
    """What a layer makes of a branch in evaluation."""
    if scale_by_keep or (isinstance(rate, float) and rate == 0.0):
        return x
    return scale(x, 1.0 - rate if isinstance(rate, float) else 1.0 - jnp.asarray(rate, jnp.float32))


def drop_path_rates(
    depth: int,
    budget: float,
    *,
    mode: Mode = "linear",
    sensitivities: Sequence[float] | np.ndarray | None = None,
    maximum: float = 1.0,
) -> np.ndarray:
    r"""Drop rates of residual branches that keep `budget` of them in an average step.

    With L branches, numbered l = 1 to L from the input, and a constant c that makes
    :math:`\sum_l (1 - r_l)` exactly the budget,

    .. math:: r_l = 1 - \text{budget} / L \;\text{(uniform)}, \qquad
       r_l = c\, l \;\text{(linear)}, \qquad
       r_l = 1 - c\, s_l \;\text{(sense)},

    each clipped to between 0 and `maximum`. To drop the last branch with rate r and the others
    linearly less, use the budget :math:`L - r (L + 1) / 2`. "sense" keeps the branches with high
    sensitivity :math:`s_l`, as `branch_sensitivities` measures it.

    Args:
      depth: number of branches L.
      budget: the average number of branches that a step keeps, from `(1 - maximum) * depth` to
        `depth`.
      mode: "uniform", "linear" or "sense".
      sensitivities: for "sense", L numbers >= 0, not all of them 0.
      maximum: the highest drop rate.

    Returns:
      A float64 NumPy array of shape `(depth,)`: the rate of each branch, for `drop_path`.

    Raises:
      ValueError: for a depth, budget, mode, maximum or sensitivities that do not fit.

    Examples:
      >>> import cdb_jax
      >>> cdb_jax.drop_path_rates(4, 2.75, mode="linear")  # A step keeps 2.75 of 4 on average.
      array([0.125, 0.25 , 0.375, 0.5  ])
      >>> cdb_jax.drop_path_rates(3, 2.0, mode="sense", sensitivities=[3.0, 1.0, 1.0])
      array([0. , 0.5, 0.5])

    References:
      `arXiv 1603.09382 <https://arxiv.org/abs/1603.09382>`_ (linear);
      `arXiv 2106.03091 <https://arxiv.org/abs/2106.03091>`_ (budget, uniform, sense).
    """
    _check_budget(depth, budget, maximum)
    check_choice("mode", mode, ("uniform", "linear", "sense"))
    if (sensitivities is not None) != (mode == "sense"):
        raise ValueError(
            f"mode={mode!r} and sensitivities={sensitivities!r}: sensitivities are for "
            'mode="sense" only, which needs them; branch_sensitivities measures them.'
        )
    dropped = min(max(depth - budget, 0.0), maximum * depth)
    if mode == "uniform":
        return np.full(depth, dropped / depth)
    if mode == "linear":
        places = np.arange(1.0, depth + 1)
        return _meet(lambda c: np.clip(c * places, 0.0, maximum), 0.0, 1.0, dropped)
    weights = _checked_sensitivities(sensitivities, depth, budget, maximum)
    # Sensitivities may differ by hundreds of orders of magnitude, so the search is for the
    # logarithm of the constant. That of a sensitivity of 0 is below all others.
    logs = np.log2(weights, out=np.full(depth, -np.inf), where=weights > 0)

    def rates(log_c: float) -> np.ndarray:
        return np.clip(1.0 - np.exp2(np.minimum(logs - log_c, 0.0)), 0.0, maximum)

    return _meet(rates, -1100.0, 1100.0, dropped)


def _check_budget(depth: Any, budget: float, maximum: float) -> None:
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 1:
        raise ValueError(f"depth must be an int >= 1, got {depth!r}.")
    if not 0.0 <= maximum <= 1.0:
        raise ValueError(f"maximum must be a drop rate between 0 and 1, got {maximum!r}.")
    lowest, slack = (1.0 - maximum) * depth, 1e-9 * depth  # For sums of rounded numbers.
    if not lowest - slack <= budget <= depth + slack:
        raise ValueError(
            f"budget={budget!r} must be the number of {depth} branches that a step keeps on "
            f"average; with maximum={maximum} it is between {lowest:g} and {depth}."
        )


def _checked_sensitivities(
    sensitivities: Any, depth: int, budget: float, maximum: float
) -> np.ndarray:
    weights = np.asarray(sensitivities, np.float64)
    if weights.shape != (depth,) or not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError(
            f"sensitivities must be {depth} finite numbers >= 0, got {sensitivities!r}."
        )
    reachable = np.where(weights > 0, 1.0, 1.0 - maximum).sum()
    if budget > reachable + 1e-9 * depth:
        raise ValueError(
            f"budget={budget!r} cannot be met: {np.sum(weights == 0)} of the sensitivities are 0, "
            f"and their branches are dropped at rate maximum={maximum}; the budget can be at most "
            f"{reachable:g}."
        )
    return weights


def _meet(
    rates: Callable[[float], np.ndarray], low: float, high: float, total: float
) -> np.ndarray:
    """The rates with a given sum, which is below it at `low`, above at `high`, and monotone."""
    middle = (low + high) / 2
    while middle not in (low, high):
        low, high = (middle, high) if rates(middle).sum() < total else (low, middle)
        middle = (low + high) / 2
    found = rates(high)
    # What rounding leaves over goes to the branches that are not clipped.
    is_free = (found > 0.0) & (found < found.max())
    if not is_free.any():
        is_free = (found > 0.0) & (found < 1.0)
    if is_free.any():
        found[is_free] += (total - found.sum()) / is_free.sum()
    return np.clip(found, 0.0, 1.0)


def branch_sensitivities(
    loss: Callable[..., jax.Array], depth: int, *args: Any, **kwargs: Any
) -> jax.Array:
    r"""How much a loss depends on each residual branch, to first order.

    With a gate :math:`g_l` that multiplies branch l, the sensitivity is
    :math:`s_l = |\partial \mathcal L / \partial g_l|` at :math:`g = 1`. Average it over some
    batches, and measure it again later in training. An NNX model that the loss calls must be in
    evaluation mode (`model.eval()`), so that it has no state to change.

    Args:
      loss: a function `loss(gates, *args, **kwargs)` that returns a scalar; `gates` has shape
        `(depth,)` and multiplies the branches.
      depth: number of branches.
      *args: other arguments of the loss.
      **kwargs: other arguments of the loss, by name.

    Returns:
      A float32 array of shape `(depth,)`, for `drop_path_rates(..., mode="sense")`.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> loss = lambda gates, x: (x + gates[0] * 2.0 * x + gates[1] * jnp.sin(x)) ** 2
      >>> cdb_jax.branch_sensitivities(loss, 2, 0.0)
      Array([0., 0.], dtype=float32)
    """
    gates = jnp.ones(depth, jnp.float32)
    return jnp.abs(jax.grad(loss)(gates, *args, **kwargs))
