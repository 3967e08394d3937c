"""`drop_path_subset`: stochastic depth that computes a branch for the kept samples only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cdb_jax import _explicit as explicit
from cdb_jax._checks import check_bool, check_call_key, check_positive, check_static_rate, is_int
from cdb_jax._scaling import scale


def drop_path_subset(
    branch: Callable[..., jax.Array],
    *args: Any,
    rate: float,
    key: jax.Array | None = None,
    sample_axis: int = 0,
    num_shards: int = 1,
    scale_by_keep: bool = True,
) -> jax.Array:
    r"""Like `drop_path(branch(*args), rate)`, but runs the branch on the kept samples only.

    Use it as in `x + drop_path_subset(branch, x, rate=0.4, key=key)`. Exactly
    :math:`k = \max(1, \mathrm{round}(B (1 - \mathrm{rate})))` of B random samples are kept, so
    the time and the memory of the branch fall with the rate. There is no conditional. A layer of
    the branch that mixes samples, such as batch normalisation, sees the kept samples only.

    Args:
      branch: a function of arrays that returns a float array with one entry for each sample.
      *args: arguments of `branch`: arrays, or trees of arrays, with the same number of samples.
        The branch may close over arrays that have no samples, such as weights.
      rate: the share of the samples that is dropped, in [0, 1]. It sets shapes, so it cannot be
        traced.
      key: a JAX key for this call. Rates of exactly 0 and 1 need none.
      sample_axis: the axis of the samples, in all arguments and in the result.
      num_shards: the number of devices that share the samples. Each shard keeps the same number
        of samples, so no device needs samples of another. Must divide B. Inside a `shard_map`, use
        1, and fold `jax.lax.axis_index` into the key.
      scale_by_keep: whether to multiply the result by B / k, so that its mean is that of the
        branch. If not, you have to multiply the branch by `1 - rate` in evaluation.

    Returns:
      The result of the branch, with zeros for the dropped samples.

    Raises:
      TypeError, ValueError: for a bad rate, a missing key, arguments without a common number of
        samples, or shards that do not divide it.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> x = jnp.ones((4, 2))
      >>> x + cdb_jax.drop_path_subset(jnp.exp2, x, rate=0.5, key=jax.random.key(0))
      Array([[1., 1.],
             [1., 1.],
             [5., 5.],
             [5., 5.]], dtype=float32)

    References:
      DINOv2, `arXiv 2304.07193 <https://arxiv.org/abs/2304.07193>`_, whose released code does this.
    """
    rate = check_static_rate(rate)
    check_bool("scale_by_keep", scale_by_keep)
    samples = _Samples.of(args, sample_axis, num_shards, rate)
    if rate == 0.0:
        return branch(*args)
    if rate == 1.0:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(branch, *args))
    indices = samples.draw(key)
    y = branch(*jax.tree.map(lambda x: samples.take(x, indices), args))
    if scale_by_keep:
        y = scale(y, samples.total / samples.kept)
    return samples.put(y, indices)


class _Samples(NamedTuple):
    """Some samples of a batch, of which each shard keeps the same number."""

    axis: int
    num_shards: int
    total: int
    kept: int

    @classmethod
    def of(cls, args: Any, axis: int, num_shards: int, rate: float) -> _Samples:
        leaves = jax.tree.leaves(args)
        check_positive("num_shards", num_shards)
        if not is_int(axis) or not all(-x.ndim <= axis < x.ndim for x in leaves):
            shapes = [x.shape for x in leaves]
            raise ValueError(
                f"sample_axis={axis!r} is not an axis of every argument of the branch, which have "
                f"shapes {shapes}; pass the axis of the samples, and close over other arrays."
            )
        sizes = sorted({x.shape[axis] for x in leaves})
        if len(sizes) != 1:
            raise ValueError(
                f"sample_axis={axis}: the arguments of the branch have {sizes} samples; pass "
                "arrays with one number of samples, and close over all others."
            )
        total = sizes[0]
        if total % num_shards or not total:
            raise ValueError(
                f"num_shards={num_shards} does not divide the {total} samples; use the number of "
                "devices that share the batch."
            )
        per_shard = total // num_shards
        kept = max(1, round(per_shard * (1.0 - rate)))
        return cls(axis, num_shards, total, num_shards * kept)

    def draw(self, key: jax.Array | None) -> jax.Array:
        """The places of the kept samples in each shard, in ascending order."""
        key = check_call_key(key, "rngs.drop_path()")
        shape = self.num_shards, self.total // self.num_shards
        order = jnp.argsort(jax.random.uniform(key, shape, jnp.float32), axis=1)
        return jnp.sort(order[:, : self.kept // self.num_shards], axis=1)

    def take(self, x: jax.Array, indices: jax.Array) -> jax.Array:
        def take(x: jax.Array, indices: jax.Array) -> jax.Array:
            return x.at[indices].get(**_KNOWN_INDICES)

        return self._in_each_shard(take, x, indices)

    def put(self, x: jax.Array, indices: jax.Array) -> jax.Array:
        def put(x: jax.Array, indices: jax.Array) -> jax.Array:
            zeros = jnp.zeros((self.total // self.num_shards, *x.shape[1:]), x.dtype)
            return zeros.at[indices].set(x, **_KNOWN_INDICES)

        return self._in_each_shard(put, x, indices)

    def _in_each_shard(
        self, f: Callable[..., jax.Array], x: jax.Array, indices: jax.Array
    ) -> jax.Array:
        def mapped(x: jax.Array, indices: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, self.axis, 0)
            shards = x.reshape(self.num_shards, -1, *x.shape[1:])
            y = jax.vmap(f)(shards, indices)
            return jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, self.axis)

        return explicit.call(mapped, lambda: jax.typeof(x).sharding.spec, x, indices)


_KNOWN_INDICES: Any = dict(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)
