"""Stochastic depth: residual branches that are dropped as a whole in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax._checks import check_call_key, check_rate
from cdb_jax._scaling import scale

MODES = ("uniform", "linear", "sense")
RESCALES = ("train", "test")


def drop_path(
    x: jax.Array,
    rate: float | jax.typing.ArrayLike,
    *,
    key: jax.Array | None = None,
    sample_axis: int | None = 0,
    rescale: bool = True,
) -> jax.Array:
    r"""Drops a residual branch: for each sample on its own, or for the whole batch.

    With survival probability :math:`p = 1 - \mathrm{rate}` and :math:`b \sim
    \mathrm{Bernoulli}(p)`, drawn for each index of `sample_axis`,

    .. math:: y = \frac{b}{p}\, x, \qquad \text{or } y = b\, x \text{ without rescaling.}

    To be applied to the branch before it is added: `x + drop_path(branch(x), rate, key=key)`.
    Inside a `shard_map` over the batch fold `jax.lax.axis_index` into the key, or every device
    draws the same for its samples.

    Args:
      x: float array, the output of a branch.
      rate: probability that the branch is dropped, in [0, 1]; may be traced.
      key: a JAX key, for this call alone. Not needed for rate 0 or 1.
      sample_axis: the axis of the samples of a batch, each of which draws for itself; None for one
        draw for all of them, as in the first paper.
      rescale: whether to divide by p, so that the mean over draws is x and nothing is to be done at
        test time. Without it the branch must be multiplied by p at test time.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      TypeError, ValueError: for a bad rate, an axis that `x` does not have, a missing key.

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
    _check_float(x)
    _check_bool(rescale)
    is_int = isinstance(sample_axis, (int, np.integer)) and not isinstance(sample_axis, bool)
    if sample_axis is not None and not (is_int and -x.ndim <= sample_axis < x.ndim):
        raise ValueError(
            f"sample_axis={sample_axis!r} is no axis of x, whose shape is {x.shape}; give the axis "
            "of the batch, or None for one draw for all."
        )
    if is_certain(rate):
        return x if rate == 0.0 else jnp.zeros_like(x)
    shape = [1] * x.ndim
    if sample_axis is not None:
        shape[sample_axis] = x.shape[sample_axis]
    keep = survives(rate, key, shape)
    return jnp.where(keep, rescaled(x, rate) if rescale else x, jnp.zeros((), x.dtype))


def drop_branch(
    branch: Callable[..., jax.Array],
    *args: Any,
    rate: float | jax.typing.ArrayLike,
    key: jax.Array | None = None,
    rescale: bool = True,
) -> jax.Array:
    """`drop_path(branch(*args), rate, sample_axis=None)` that does not compute what it drops.

    A conditional at run time leaves out the branch, forward and backward, where it is dropped for
    the whole batch. XLA's CPU compiler runs convolutions inside of a conditional far slower, so
    use `drop_path` for those there. What a branch would change beside its output (random counts,
    batch statistics) is not changed when it is dropped.

    Args:
      branch: a function of arrays that returns an array.
      *args: its arguments, arrays or trees of arrays.
      rate: probability that the branch is dropped, in [0, 1]; may be traced.
      key: a JAX key, for this call alone. Not needed for rate 0 or 1.
      rescale: as in `drop_path`.

    Returns:
      An array of the shape and dtype of what `branch` returns.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> x = jnp.ones(3)
      >>> x + cdb_jax.drop_branch(jnp.exp, x, rate=0.5, key=jax.random.key(1))
      Array([1., 1., 1.], dtype=float32)
    """
    rate = check_rate("rate", rate, schedule=False)
    _check_bool(rescale)
    return run_branch(branch, args, rate, key, rescale, jax.lax.cond, jax.eval_shape)


def run_branch(
    branch: Callable[..., jax.Array],
    args: Sequence[Any],
    rate: Any,
    key: jax.Array | None,
    rescale: bool,
    cond: Callable[..., jax.Array],
    eval_shape: Callable[..., Any],
) -> jax.Array:
    """`drop_branch`, with the conditional and the tracing of JAX or those of NNX."""

    def kept(*args: Any) -> jax.Array:
        y = branch(*args)
        return rescaled(y, rate) if rescale else y

    def dropped(*args: Any) -> jax.Array:
        return jnp.zeros_like(eval_shape(branch, *args))

    if is_certain(rate):
        return kept(*args) if rate == 0.0 else dropped(*args)
    return cond(survives(rate, key), kept, dropped, *args)


def is_certain(rate: Any) -> bool:
    """Whether nothing is to be drawn."""
    return isinstance(rate, float) and rate in (0.0, 1.0)


def survives(rate: Any, key: jax.Array | None, shape: Sequence[int] = ()) -> jax.Array:
    """Whether a branch survives, drawn for each entry of a shape: bool."""
    key = check_call_key(key, "rngs.drop_path()")
    return jax.random.uniform(key, shape, jnp.float32) >= jnp.asarray(rate, jnp.float32)


def _check_bool(rescale: Any) -> None:
    if not isinstance(rescale, bool):
        raise TypeError(
            f"rescale must be True or False, got {rescale!r}; layers take 'train' or 'test'."
        )


def _check_float(x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"x must be an array of floats, got dtype {x.dtype}.")


def rescaled(x: jax.Array, rate: Any) -> jax.Array:
    """What survives, divided by the probability that it does."""
    _check_float(x)
    if isinstance(rate, float):
        return scale(x, 1.0 / (1.0 - rate))
    survival = 1.0 - jnp.asarray(rate, jnp.float32)
    # With rate 1 nothing survives, and nothing may become a NaN.
    return scale(x, 1.0 / jnp.where(survival > 0, survival, 1.0))


def at_test(x: jax.Array, rate: Any, rescale: str) -> jax.Array:
    """What a layer makes of a branch at test time."""
    if rescale == "train" or (isinstance(rate, float) and rate == 0.0):
        return x
    return scale(x, 1.0 - rate if isinstance(rate, float) else 1.0 - jnp.asarray(rate, jnp.float32))


def check_rescale(rescale: Any) -> str:
    if rescale not in RESCALES:
        raise ValueError(f"rescale must be 'train' or 'test', got {rescale!r}.")
    return rescale


def survival_rates(
    depth: int,
    budget: float,
    *,
    mode: str = "linear",
    sensitivities: Sequence[float] | np.ndarray | None = None,
    minimum: float = 0.0,
) -> np.ndarray:
    r"""Survival probabilities of residual branches whose sum, the expected depth, is `budget`.

    With L branches, numbered l = 1 to L from the input, and a constant c that meets the budget
    :math:`\sum_l p_l` exactly,

    .. math:: p_l = \text{budget} / L \;\text{(uniform)}, \qquad
       p_l = 1 - c\, l \;\text{(linear)}, \qquad
       p_l = c\, s_l \;\text{(sense)},

    each clipped to between `minimum` and 1. Linear with survival :math:`p_L` of the last branch has
    the budget :math:`L - (1 - p_L)(L + 1) / 2`. Sense gives the budget to the branches with high
    sensitivity :math:`s_l`. That the loss's first derivative with respect to a gate on the branch
    measures it (`branch_sensitivities`), that rates are proportional to it and how they are
    clipped are this library's choices, made where the paper's formula is not confirmed. The paper
    expects sense to do better under small budgets, and uniform, which regularises most, under large
    ones.

    Args:
      depth: number of branches L.
      budget: expected number of branches that survive a step, from `minimum * depth` to `depth`.
      mode: "uniform", "linear" or "sense".
      sensitivities: for "sense", L numbers >= 0, not all of them 0.
      minimum: the least survival probability.

    Returns:
      A float64 NumPy array of shape `(depth,)`. *Survival* probabilities: `drop_path` takes the
      probability of dropping, `1 - survival`.

    Raises:
      ValueError: for a depth, budget, mode, minimum or sensitivities that do not fit.

    Examples:
      >>> import cdb_jax
      >>> cdb_jax.survival_rates(4, 2.75, mode="linear")
      array([0.875, 0.75 , 0.625, 0.5  ])
      >>> cdb_jax.survival_rates(3, 2.0, mode="sense", sensitivities=[3.0, 1.0, 1.0])
      array([1. , 0.5, 0.5])

    References:
      `arXiv 1603.09382 <https://arxiv.org/abs/1603.09382>`_ (linear);
      `arXiv 2106.03091 <https://arxiv.org/abs/2106.03091>`_ (budget, uniform, sense).
    """
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 1:
        raise ValueError(f"depth must be an int >= 1, got {depth!r}.")
    if not 0.0 <= minimum <= 1.0:
        raise ValueError(f"minimum must be a probability between 0 and 1, got {minimum!r}.")
    slack = 1e-9 * depth  # For sums of rounded numbers.
    if not minimum * depth - slack <= budget <= depth + slack:
        raise ValueError(
            f"budget={budget!r} is the expected number of {depth} branches that survive; with "
            f"minimum={minimum} it lies between {minimum * depth:g} and {depth}."
        )
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    if (sensitivities is not None) != (mode == "sense"):
        raise ValueError(
            f"mode={mode!r} and sensitivities={sensitivities!r}: sensitivities go with "
            'mode="sense", and with no other; branch_sensitivities measures them.'
        )
    if mode == "uniform":
        return np.full(depth, min(1.0, budget / depth))
    if mode == "linear":
        places = np.arange(1.0, depth + 1)
        return _meet(lambda c: np.clip(1.0 - c * places, minimum, 1.0), 1.0, 0.0, budget)
    weights = np.asarray(sensitivities, np.float64)
    if weights.shape != (depth,) or not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError(
            f"sensitivities must be {depth} finite numbers >= 0, got {sensitivities!r}."
        )
    reachable = np.where(weights > 0, 1.0, minimum).sum()
    if budget > reachable + slack:
        raise ValueError(
            f"budget={budget!r} cannot be met: {np.sum(weights == 0)} of the sensitivities are 0, "
            f"and their branches survive with probability minimum={minimum}; the budget may be "
            f"{reachable:g} at most."
        )
    # Sensitivities may differ by hundreds of orders of magnitude, so the constant is sought by its
    # logarithm; that of a sensitivity of 0 stays below all.
    logs = np.log2(weights, out=np.full(depth, -np.inf), where=weights > 0)
    rates = lambda x: np.clip(np.exp2(np.minimum(x + logs, 0.0)), minimum, 1.0)
    return _meet(rates, -1100.0, 1100.0, budget)


def _meet(
    rates: Callable[[float], np.ndarray], low: float, high: float, budget: float
) -> np.ndarray:
    """The rates whose sum is the budget; it is below at `low`, above at `high`, and monotone."""
    middle = (low + high) / 2
    while middle not in (low, high):
        low, high = (middle, high) if rates(middle).sum() < budget else (low, middle)
        middle = (low + high) / 2
    found = rates(high)
    # What rounding leaves over goes to the branches that are not clipped.
    free = (found > found.min()) & (found < 1.0)
    free = free if free.any() else (found > 0.0) & (found < 1.0)
    if free.any():
        found[free] += (budget - found.sum()) / free.sum()
    return np.clip(found, 0.0, 1.0)


def branch_sensitivities(
    loss: Callable[..., jax.Array], depth: int, *args: Any, **kwargs: Any
) -> jax.Array:
    r"""How much a loss depends on each residual branch, to first order.

    With a gate :math:`g_l` that multiplies branch l, the sensitivity is
    :math:`s_l = |\partial \mathcal L / \partial g_l|` at :math:`g = 1`. Average it over some
    batches, and again later in training. An NNX model that the loss calls must be in evaluation
    mode (`model.eval()`), so that it has no state to change.

    Args:
      loss: a function `loss(gates, *args, **kwargs)` that returns a scalar, where `gates` has shape
        `(depth,)` and multiplies the branches.
      depth: number of branches.
      *args: other arguments of the loss.
      **kwargs: other arguments of the loss, by name.

    Returns:
      A float32 array of shape `(depth,)`, for `survival_rates(..., mode="sense")`.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> loss = lambda gates, x: (x + gates[0] * 2.0 * x + gates[1] * jnp.sin(x)) ** 2
      >>> cdb_jax.branch_sensitivities(loss, 2, 0.0)
      Array([0., 0.], dtype=float32)
    """
    gates = jnp.ones(depth, jnp.float32)
    return jnp.abs(jax.grad(loss)(gates, *args, **kwargs))
