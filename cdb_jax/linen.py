"""For Flax Linen: the layers `Backdrop` and `DropPath`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from cdb_jax._checks import check_bool, check_call_rate, is_exactly
from cdb_jax.backdrop import backdrop
from cdb_jax.stochastic_depth import drop_path, in_evaluation


class Backdrop(nn.Module):
    """`cdb_jax.backdrop` as a layer: the identity, but it masks the gradient in training.

    Attributes:
      rate: probability that an entry of the mask is dropped.
      axes: the axis or axes along which the mask varies.
      sample_axes: axes along which masks are independent.
      deterministic: whether the layer is in evaluation mode; you can pass it in the call instead.
      rng_collection: name of the stream of keys: `model.apply(..., rngs={"backdrop": key})`.

    Examples:
      >>> import cdb_jax.linen, jax, jax.numpy as jnp
      >>> layer = cdb_jax.linen.Backdrop(0.5, axes=1, deterministic=False)
      >>> def loss(x):
      ...     return jnp.sum(layer.apply({}, x, rngs={"backdrop": jax.random.key(0)}))
      >>> jax.grad(loss)(jnp.ones((1, 4)))
      Array([[2., 0., 0., 2.]], dtype=float32)
    """

    rate: float
    axes: int | Sequence[int]
    sample_axes: int | Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "backdrop"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deterministic: bool | None = None,
        mask: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Returns `x`; a `mask` replaces the random one, for diagnosis."""
        if mask is None and nn.merge_param("deterministic", self.deterministic, deterministic):
            return x
        rate = check_call_rate(self.rate)
        needs_key = mask is None and not is_exactly(rate, 0.0)
        key = self.make_rng(self.rng_collection) if needs_key else None
        settings = dict(axes=self.axes, sample_axes=self.sample_axes)
        return backdrop(x, rate, key=key, mask=mask, **settings)


class DropPath(nn.Module):
    """`cdb_jax.drop_path` as a layer: drops a residual branch in training.

    Attributes:
      rate: probability that the branch is dropped.
      sample_axis: the axis of the samples, or None to drop the whole batch at once.
      scale_by_keep: whether to divide by `1 - rate` in training. If not, the layer multiplies by
        `1 - rate` in evaluation, as the original paper does (timm does not).
      deterministic: whether the layer is in evaluation mode; you can pass it in the call instead.
      rng_collection: name of the stream of keys: `model.apply(..., rngs={"drop_path": key})`.

    Examples:
      >>> import cdb_jax.linen, jax, jax.numpy as jnp
      >>> drop = cdb_jax.linen.DropPath(0.5)
      >>> drop.apply({}, jnp.ones((4, 1)), False, rngs={"drop_path": jax.random.key(0)})
      Array([[2.],
             [0.],
             [0.],
             [2.]], dtype=float32)
    """

    rate: float
    sample_axis: int | None = 0
    scale_by_keep: bool = True
    deterministic: bool | None = None
    rng_collection: str = "drop_path"

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Returns `x`, the output of a branch, or zeros if it is dropped."""
        rate = check_call_rate(self.rate)
        scaling = check_bool("scale_by_keep", self.scale_by_keep)
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return in_evaluation(x, rate, scaling)
        key = None if is_exactly(rate, 0.0) else self.make_rng(self.rng_collection)
        return drop_path(x, rate, key=key, sample_axis=self.sample_axis, scale_by_keep=scaling)
