"""For Flax Linen: the layers `Backdrop` and `DropPath`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from cdb_jax._checks import check_rate
from cdb_jax.backdrop import backdrop
from cdb_jax.stochastic_depth import at_test, check_rescale, drop_path, is_certain


class Backdrop(nn.Module):
    """`cdb_jax.backdrop` as a layer: the identity, which masks the gradient in training.

    Attributes:
      rate: probability that an entry of the mask is dropped.
      axes: the axis or axes along which the mask varies.
      sample_axes: axes along which masks are independent.
      deterministic: whether the layer is switched off; here or in the call.
      rng_collection: name of the stream of keys: `model.apply(..., rngs={"backdrop": key})`.

    Examples:
      >>> import cdb_jax.linen, jax, jax.numpy as jnp
      >>> layer = cdb_jax.linen.Backdrop(0.5, axes=1, deterministic=False)
      >>> loss = lambda x: jnp.sum(layer.apply({}, x, rngs={"backdrop": jax.random.key(0)}))
      >>> jax.grad(loss)(jnp.ones((1, 4)))
      Array([[2., 0., 0., 2.]], dtype=float32)

    References:
      `arXiv 1806.01337 <https://arxiv.org/abs/1806.01337>`_.
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
        """Returns `x`; with a `mask` for diagnosis, that one masks the gradient."""
        settings: dict[str, Any] = dict(axes=self.axes, sample_axes=self.sample_axes)
        if mask is not None:
            return backdrop(x, self.rate, mask=mask, **settings)
        rate = check_rate("rate", self.rate, schedule=False)
        off = nn.merge_param("deterministic", self.deterministic, deterministic)
        if off or (isinstance(rate, float) and rate == 0.0):
            return x
        return backdrop(x, rate, key=self.make_rng(self.rng_collection), **settings)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch in training, for each sample or the whole batch.

    Attributes:
      rate: probability that the branch is dropped.
      sample_axis: the axis of the samples, each of which draws for itself; None for one draw for
        the whole batch.
      rescale: "train" divides by the survival probability in training, the common practice; "test"
        multiplies by it at test time, as the first paper does.
      deterministic: whether the layer is switched off; here or in the call.
      rng_collection: name of the stream of keys: `model.apply(..., rngs={"drop_path": key})`.

    Examples:
      >>> import cdb_jax.linen, jax, jax.numpy as jnp
      >>> drop = cdb_jax.linen.DropPath(0.5)
      >>> drop.apply({}, jnp.ones((4, 1)), False, rngs={"drop_path": jax.random.key(0)})
      Array([[2.],
             [0.],
             [0.],
             [2.]], dtype=float32)

    References:
      `arXiv 1603.09382 <https://arxiv.org/abs/1603.09382>`_.
    """

    rate: float
    sample_axis: int | None = 0
    rescale: str = "train"
    deterministic: bool | None = None
    rng_collection: str = "drop_path"

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Returns `x`, the output of a branch, or zeros where it is dropped."""
        rate = check_rate("rate", self.rate, schedule=False)
        check_rescale(self.rescale)
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return at_test(x, rate, self.rescale)
        key = None if is_certain(rate) else self.make_rng(self.rng_collection)
        rescale = self.rescale == "train"
        return drop_path(x, rate, key=key, sample_axis=self.sample_axis, rescale=rescale)
