"""`drop_path_subset`: stochastic depth that computes a branch for the kept samples only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax import _explicit as explicit
from cdb_jax._checks import (
    check_bool,
    check_branch,
    check_call_key,
    check_no_module,
    check_positive,
    check_static_rate,
    is_int,
    short,
)
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

    Use it as in `x + drop_path_subset(branch, x, rate=0.4, key=key)`, with a different key for
    each branch. With B samples in each of S shards, exactly
    :math:`k = \max(1, \mathrm{round}(B (1 - \mathrm{rate})))` random samples of each shard are
    kept, so the time and the memory of the branch fall with the rate. There is no conditional. If
    B is small, the rounding matters: a rate below 1 / (2 B) drops nothing, and B = 1 never drops. A
    layer of the branch that mixes samples, such as batch normalisation, sees the kept samples only.

    Args:
      branch: a function of arrays that returns a float array with one entry for each sample.
      *args: arguments of `branch`: arrays, or trees of arrays, with the same number of samples.
        The branch may close over arrays that have no samples, such as weights.
      rate: the share of the samples that is dropped, in [0, 1]; 1 drops all. It sets shapes, so it
        cannot be traced.
      key: a JAX key for this call. Optional if the rate is the number 0 or 1.
      sample_axis: the axis of the samples, in all arguments and in the result.
      num_shards: the number S of devices that share the samples; it must divide the total number of
        samples. Each shard keeps the same number of samples, so no device needs samples from
        another. Inside a `shard_map`, use 1, and fold `jax.lax.axis_index` into the key.
      scale_by_keep: whether to multiply the result by B / k, so that its mean is that of the
        branch. If False, multiply the branch in evaluation by k / B, which is `1 - rate` rounded.

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
    check_branch(branch, "drop_path_subset(branch, x, rate=0.5, key=key)")
    rate = check_static_rate(rate)
    check_bool("scale_by_keep", scale_by_keep)
    check_no_module(args, "args holds", "cdb_jax.nnx.DropPath and its method subset")
    samples = _Samples.checked(args, sample_axis, num_shards, rate)
    if rate == 0.0:
        return branch(*args)
    if rate == 1.0:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(branch, *args))
    kept = samples.draw(key)
    y = branch(*jax.tree.map(lambda x: samples.in_each_shard(_take, x, kept), args))
    samples.check_result(y)
    if scale_by_keep:
        y = scale(y, samples.total / samples.num_kept)
    return samples.in_each_shard(_put, y, kept)


class _Kept(NamedTuple):
    """Which samples are kept, for each shard.

    Attributes:
      indices: the places of the kept samples, in ascending order.
      is_kept: whether each sample is kept.
      slots: the position of each sample among the kept ones; arbitrary for a dropped one.
    """

    indices: jax.Array
    is_kept: jax.Array
    slots: jax.Array


class _Samples(NamedTuple):
    """The samples of a batch; every shard keeps the same number of them."""

    axis: int
    num_shards: int
    total: int
    num_kept: int

    @classmethod
    def checked(cls, args: Any, axis: int, num_shards: int, rate: float) -> _Samples:
        leaves = jax.tree.leaves(args)
        if not leaves or not all(isinstance(x, (jax.Array, np.ndarray)) for x in leaves):
            raise TypeError(
                f"args must be arrays of samples, got {short(args)}; let the branch close over "
                "everything else, such as settings."
            )
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
                f"sample_axis={axis}: all args must have the same number of samples, got {sizes} "
                "samples; let the branch close over arrays without samples."
            )
        total = sizes[0]
        if total % num_shards or not total:
            raise ValueError(
                f"num_shards={num_shards} does not divide the {total} samples; use the number of "
                "devices that share the batch."
            )
        devices = max(explicit.num_shards(jax.typeof(x).sharding, (axis % x.ndim,)) for x in leaves)
        if num_shards % devices:
            raise ValueError(
                f"num_shards={num_shards}: the samples are sharded over {devices} devices; use "
                f"num_shards={devices}."
            )
        per_shard = total // num_shards
        num_kept = max(1, round(per_shard * (1.0 - rate)))
        return cls(axis, num_shards, total, num_shards * num_kept)

    def check_result(self, y: Any) -> None:
        is_float = isinstance(y, jax.Array) and jnp.issubdtype(y.dtype, jnp.inexact)
        if not is_float or not -y.ndim <= self.axis < y.ndim or y.shape[self.axis] != self.num_kept:
            got = f"shape {y.shape} and dtype {y.dtype}" if isinstance(y, jax.Array) else repr(y)
            raise ValueError(
                f"branch must return one float array with the {self.num_kept} kept samples along "
                f"sample_axis={self.axis}, got {got:.80}."
            )

    def draw(self, key: jax.Array | None) -> _Kept:
        key = check_call_key(key, "rngs.drop_path()")
        shape = self.num_shards, self.total // self.num_shards
        order = jnp.argsort(jax.random.uniform(key, shape, jnp.float32), axis=1)
        num_kept = self.num_kept // self.num_shards
        indices = jnp.sort(order[:, :num_kept], axis=1)
        is_kept = jnp.argsort(order, axis=1) < num_kept
        slots = jnp.maximum(jnp.cumsum(is_kept, axis=1, dtype=jnp.int32) - 1, 0)
        return _Kept(indices, is_kept, slots)

    def in_each_shard(
        self, f: Callable[[jax.Array, _Kept], jax.Array], x: jax.Array, kept: _Kept
    ) -> jax.Array:
        def mapped(x: jax.Array, kept: _Kept) -> jax.Array:
            x = jnp.moveaxis(x, self.axis, 0)
            shards = x.reshape(self.num_shards, -1, *x.shape[1:])
            y = jax.vmap(f)(shards, kept)
            return jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, self.axis)

        return explicit.call(mapped, lambda: jax.typeof(x).sharding.spec, x, kept)


# JAX would transpose each of these gathers to a scatter into zeros, which needs memory for both
# arrays. Each is the transpose of the other, so gathers suffice, which XLA fuses with other work.


@jax.custom_vjp
def _take(x: jax.Array, kept: _Kept) -> jax.Array:
    """The kept samples."""
    return x.at[kept.indices].get(mode="promise_in_bounds")


@jax.custom_vjp
def _put(y: jax.Array, kept: _Kept) -> jax.Array:
    """The kept samples at their places, with zeros for the others."""
    found = y.at[kept.slots].get(mode="promise_in_bounds")
    is_kept = kept.is_kept.reshape(-1, *[1] * (y.ndim - 1))
    return jnp.where(is_kept, found, jnp.zeros((), y.dtype))


_take.defvjp(lambda x, kept: (_take(x, kept), kept), lambda kept, dx: (_put(dx, kept), None))
_put.defvjp(lambda y, kept: (_put(y, kept), kept), lambda kept, dy: (_take(dy, kept), None))
