"""Drop rates of residual branches, and which branches a step keeps."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax._checks import check_call_key, check_choice, check_positive, check_rate

RateMode = Literal["uniform", "linear", "sense"]
BranchChoice = Literal["bernoulli", "exact"]


def drop_path_rates(
    depth: int,
    budget: float,
    *,
    mode: RateMode = "linear",
    sensitivities: Sequence[float] | np.ndarray | jax.Array | None = None,
    costs: Sequence[float] | np.ndarray | jax.Array | None = None,
    maximum: float = 1.0,
) -> np.ndarray:
    """Drop rates with which a step keeps `budget` residual branches on average.

    They are meant for `drop_path`, `drop_path_subset` and `drop_backward`.

    For example, linear rates of 4 branches with a budget of 2.75 are 0.125, 0.25, 0.375 and 0.5,
    because 0.875 + 0.75 + 0.625 + 0.5 = 2.75. If you know the rate r of the last branch instead,
    use the rule of the original paper, `np.linspace(r / depth, r, depth)`, or the rule of timm's
    `calculate_drop_path_rates`, `np.linspace(0, r, depth)`.

    Args:
      depth: number of branches.
      budget: how many branches a step keeps on average: the sum of `1 - rates`. With `costs`, what
        the kept branches cost on average: the sum of `costs * (1 - rates)`.
      mode: "uniform": all rates are equal. "linear": the rate of the l-th branch is proportional to
        l. "sense": the probability of keeping a branch is proportional to its sensitivity, divided
        by its cost. In all modes, rates are clipped to [0, maximum] and meet the budget.
      sensitivities: for "sense", `depth` numbers >= 0, such as those that `branch_sensitivities` or
        `drop_backward_sensitivities` returns. We could not confirm the paper's formula: the one in
        `branch_sensitivities`, the proportionality and the clipping are choices of this library.
      costs: what each branch costs, `depth` numbers > 0, such as its floating-point operations in
        units of your choice; None if all cost 1.
      maximum: the highest drop rate.

    Returns:
      A float64 NumPy array of shape `(depth,)`: the rate of each branch.

    Raises:
      TypeError, ValueError: for a bad argument, or for a budget that cannot be met.

    Examples:
      >>> import cdb_jax
      >>> cdb_jax.drop_path_rates(4, 2.75)
      array([0.125, 0.25 , 0.375, 0.5  ])
      >>> cdb_jax.drop_path_rates(3, 2.0, mode="sense", sensitivities=[3.0, 1.0, 1.0])
      array([0. , 0.5, 0.5])
      >>> cdb_jax.drop_path_rates(2, 2.0, mode="uniform", costs=[1.0, 3.0])
      array([0.5, 0.5])

    References:
      `arXiv 1603.09382 <https://arxiv.org/abs/1603.09382>`_ (linear);
      `arXiv 2106.03091 <https://arxiv.org/abs/2106.03091>`_ (budget, uniform, sense).
    """
    check_positive("depth", depth)
    check_choice("mode", mode, get_args(RateMode))
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget must be a number of branches, got {budget!r}.")
    maximum = check_rate("maximum", maximum, schedule=False)
    costs = np.ones(depth) if costs is None else _numbers("costs", costs, depth)
    if not np.all(costs > 0):
        raise ValueError(f"costs must be > 0, got {costs}.")
    weights = _weights(depth, mode, sensitivities)
    num_zeros = int(np.sum(weights == 0))
    total = costs.sum()
    lowest, highest = total * (1.0 - maximum), total - costs[weights == 0].sum() * maximum
    slack = 1e-9 * total  # A budget may be a sum of rounded numbers.
    if not lowest - slack <= budget <= highest + slack:
        reason = f" and {num_zeros} sensitivities of 0" if num_zeros else ""
        raise ValueError(
            f"budget={budget!r} must be between {lowest:g} and {highest:g}, the range of what "
            f"a step keeps on average with depth={depth}, maximum={maximum}{reason}."
        )
    if mode == "sense":
        return 1.0 - _proportional(weights / costs, costs, budget, 1.0 - maximum, 1.0)
    return _proportional(weights, costs, total - budget, 0.0, maximum)


def _weights(depth: int, mode: RateMode, sensitivities: Any) -> np.ndarray:
    """Weights proportional to the rates or, for "sense", to the probabilities of being kept."""
    if (sensitivities is not None) != (mode == "sense"):
        raise ValueError(
            f"sensitivities={sensitivities!r} with mode={mode!r}: pass sensitivities with "
            'mode="sense", and only then; branch_sensitivities measures them.'
        )
    if mode != "sense":
        return np.arange(1.0, depth + 1) if mode == "linear" else np.ones(depth)
    return _numbers("sensitivities", sensitivities, depth)


def _numbers(name: str, values: Any, depth: int) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.shape != (depth,) or not np.all((found >= 0) & (found < np.inf)):
        raise ValueError(f"{name} must be {depth} finite numbers >= 0, got {values!r}.")
    return found


def _proportional(
    weights: np.ndarray, costs: np.ndarray, total: float, lowest: float, highest: float
) -> np.ndarray:
    """Returns `x = clip(c * weights, lowest, highest)` with `sum(costs * x)` equal to `total`."""
    with np.errstate(divide="ignore"):
        logs = np.log2(weights)  # Weights may differ by hundreds of orders of magnitude.

    def values(log_c: float) -> np.ndarray:
        return np.clip(np.exp2(np.minimum(log_c + logs, 0.0)), lowest, highest)

    low, high = -2200.0, 2200.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if costs @ values(middle) < total else (low, middle)
    found = values(high)
    is_free = (lowest < found) & (found < highest)
    if is_free.any():  # The clipped entries are now known, so the others can be exact.
        shares = weights[is_free] / weights[is_free].max()
        rest = total - costs[~is_free] @ found[~is_free]
        found[is_free] = shares * (rest / (costs[is_free] @ shares))
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


def drop_backward_sensitivities(
    gradient: Callable[..., Any], depth: int, *args: Any, **kwargs: Any
) -> jax.Array:
    r"""Measures how much the gradient changes when the backward pass of one branch is dropped.

    With :math:`g_i` the gradient of the i-th parameter, and :math:`g_i^{(l)}` the same with branch
    l dropped, the sensitivity is

    .. math:: s_l = \sum_i \left(\lVert g_i \rVert - \lVert g_i^{(l)} \rVert\right)^2.

    DropBP measures such changes after a tenth of the training and derives the rates from them; see
    `drop_path_rates(..., mode="sense", costs=...)`. Summing over parameters is a choice of this
    library. The measurement computes `depth + 1` gradients.

    Args:
      gradient: a function `gradient(kept, *args, **kwargs)` that returns a gradient, a tree of
        arrays. It is compiled with `jax.jit`. `kept` is a bool array of shape `(depth,)` that says
        which branches to keep: pass its entries to `drop_backward(..., kept=kept[l])`.
      depth: number of branches.
      *args: other arguments of `gradient`.
      **kwargs: other arguments of `gradient`, by name.

    Returns:
      A float32 array of shape `(depth,)`.

    Examples:
      >>> import cdb_jax, jax
      >>> def loss(w, kept, x):
      ...     for l in range(2):
      ...         x = x + cdb_jax.drop_backward(lambda x: w[l] * x, x, kept=kept[l])
      ...     return x
      >>> gradient = lambda kept, w, x: jax.grad(loss)(w, kept, x)
      >>> cdb_jax.drop_backward_sensitivities(gradient, 2, [1.0, 3.0], 1.0)
      Array([16., 13.], dtype=float32)

    References:
      DropBP, `arXiv 2402.17812 <https://arxiv.org/abs/2402.17812>`_.
    """
    check_positive("depth", depth)

    @jax.jit
    def norms(kept: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(gradient(kept, *args, **kwargs))
        return jnp.stack([jnp.linalg.norm(x.ravel()).astype(jnp.float32) for x in leaves])

    everything = norms(jnp.ones(depth, bool))
    changes = [norms(jnp.arange(depth) != branch) - everything for branch in range(depth)]
    return jnp.sum(jnp.square(jnp.stack(changes)), axis=1)


def kept_branches(
    rates: Sequence[float] | np.ndarray | jax.Array,
    *,
    key: jax.Array,
    choice: BranchChoice = "bernoulli",
) -> jax.Array:
    """Draws which residual branches a step keeps: at least one of them.

    Args:
      rates: the drop rate of each branch, shape `(depth,)`; may be traced.
      key: a JAX key for this step.
      choice: "bernoulli": each branch is dropped independently. "exact": each branch is dropped
        with its rate, and the number of kept branches is always the average, `sum(1 - rates)`,
        rounded up or down at random if it is not a whole number. So each step takes the same time.
        In both cases, if all would be dropped, one of those with a rate below 1 is kept at random
        (any one, if all rates are 1). So if there are few branches with high rates, branches are
        kept more often than their rates imply.

    Returns:
      A bool array of shape `(depth,)`, for `drop_backward(..., kept=kept[l])`.

    Raises:
      TypeError, ValueError: for rates that are not drop probabilities, a bad key or choice.

    Examples:
      >>> import cdb_jax, jax
      >>> cdb_jax.kept_branches([0.5] * 6, key=jax.random.key(0), choice="exact").sum()
      Array(3, dtype=int32)
    """
    check_choice("choice", choice, get_args(BranchChoice))
    key = check_call_key(key, "rngs.drop_backward()")
    if isinstance(rates, Sequence) and any(isinstance(x, jax.core.Tracer) for x in rates):
        rates = jnp.stack([jnp.asarray(x, jnp.float32) for x in rates])
    if not isinstance(rates, jax.core.Tracer):
        rates = np.asarray(rates, np.float32)
        if not np.all((rates >= 0) & (rates <= 1)):
            raise ValueError(f"rates must be drop probabilities between 0 and 1, got {rates}.")
    if jnp.ndim(rates) != 1 or not jnp.size(rates):
        raise ValueError(f"rates must have one entry for each branch, got shape {rates.shape}.")
    rates = jnp.asarray(rates, jnp.float32)
    first, second, third = jax.random.split(key, 3)
    if choice == "exact":
        kept = _keep_exactly(1.0 - rates, first, second)
    else:
        kept = jax.random.uniform(first, rates.shape, jnp.float32) >= rates
    # A rate of 1 is the last resort.
    order = jax.random.uniform(third, rates.shape, jnp.float32)
    last = jnp.argmax(jnp.where(rates < 1.0, order, order - 1.0))
    return kept | (~jnp.any(kept) & (jnp.arange(rates.size) == last))


def _keep_exactly(keep: jax.Array, order_key: jax.Array, key: jax.Array) -> jax.Array:
    """Systematic sampling in random order.

    The probabilities of being kept lie side by side on a line, and a branch is kept if its segment
    contains one of the points u, u + 1, ...
    """
    order = jax.random.permutation(order_key, keep.size)
    ends = jnp.cumsum(keep[order])
    nearest = jnp.round(ends)
    ends = jnp.where(jnp.abs(ends - nearest) < 1e-5, nearest, ends)  # Whole but for rounding.
    counts = jnp.floor(ends + jax.random.uniform(key, (), jnp.float32))
    is_hit = jnp.diff(counts, prepend=0.0) > 0
    return jnp.zeros(keep.shape, bool).at[order].set(is_hit) | (keep == 1.0)
