"""`backdrop`: the identity whose backward pass drops a random part of the gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax._checks import check_call_key, check_call_rate, is_exactly, is_int
from cdb_jax._scaling import scale, varying_with


def backdrop(
    x: jax.Array,
    rate: jax.typing.ArrayLike,
    *,
    axes: int | Sequence[int],
    key: jax.Array | None = None,
    sample_axes: int | Sequence[int] = (),
    mask: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Returns `x`, and multiplies its gradient by a random mask in the backward pass.

    The mask m varies along `axes` (and `sample_axes`) and is constant along all others. Each of its
    n entries along `axes` is dropped with probability `rate`, and the mask is divided by their
    mean, so that the gradient keeps its size:

    .. math:: y = x, \qquad \bar x = \frac{m}{\frac1n \sum_i m_i} \odot \bar y.

    If every entry would be dropped, one of them is kept at random. The mask is drawn in the
    backward pass, so only the key is stored. Inside a `shard_map` over one of the axes, fold
    `jax.lax.axis_index` into the key.

    Args:
      x: float array of any shape.
      rate: probability that an entry of the mask is dropped, in [0, 1]; may be traced.
      axes: the axis or axes along which the mask varies: the spatial axes of an image to regularise
        the scale that this layer sees; the batch axis for a loss that does not decompose over it.
      key: a JAX key for this call. Not needed with `mask`, or for a rate of exactly 0.
      sample_axes: axes along which masks are independent, each with its own mean; use the batch
        axis to draw a mask for each image.
      mask: for diagnosis, a mask to use instead of a random one: numbers >= 0, not all zero, with
        as many axes as `x`, each of the same size or 1. It is divided by its mean along `axes`.

    Returns:
      `x`, bit for bit.

    Raises:
      TypeError, ValueError: for a bad rate, axes that `x` does not have, repeated axes, a missing
        key, or a mask that does not fit.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> def loss(x):
      ...     return jnp.sum(cdb_jax.backdrop(x, 0.5, axes=1, key=jax.random.key(0)))
      >>> jax.grad(loss)(jnp.ones((2, 4)))
      Array([[2., 2., 0., 0.],
             [2., 2., 0., 0.]], dtype=float32)

    References:
      Backdrop, `arXiv 1806.01337 <https://arxiv.org/abs/1806.01337>`_.
    """
    rate = check_call_rate(rate)
    varying = _positive("axes", check_axes("axes", axes), x.ndim)
    sampled = check_axes("sample_axes", sample_axes, allow_empty=True)
    sampled = _positive("sample_axes", sampled, x.ndim)
    if len({*varying, *sampled}) < len(varying + sampled):
        raise ValueError(
            f"axes={axes!r} and sample_axes={sample_axes!r} name an axis twice; list each once."
        )
    if mask is not None:
        mask = _check_mask(mask, x, varying)
    elif is_exactly(rate, 0.0) or not x.size:
        return x
    else:
        key = check_call_key(key, "rngs.backdrop()")
    shape = [size if axis in varying + sampled else 1 for axis, size in enumerate(x.shape)]
    return _scale_gradient(tuple(shape), varying, x, _Residuals(key, rate, mask))


class _Residuals(NamedTuple):
    """What the backward pass needs to make the mask."""

    key: jax.Array | None
    rate: float | jax.Array
    mask: jax.Array | None  # The user's mask, if there is one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scale_gradient(
    shape: tuple[int, ...], axes: tuple[int, ...], x: jax.Array, residuals: _Residuals
) -> jax.Array:
    """Returns `x`; multiplies its gradient by a mask of a given shape, with mean 1 over `axes`."""
    return _varying(x, residuals)


def _varying(x: jax.Array, residuals: _Residuals) -> jax.Array:
    key, rate, mask = residuals
    if mask is not None:
        return varying_with(x, mask)
    assert key is not None
    return varying_with(x, jax.random.bits(key), jnp.asarray(rate))


def _fwd(
    shape: Any, axes: Any, x: jax.Array, residuals: _Residuals
) -> tuple[jax.Array, _Residuals]:
    return _varying(x, residuals), residuals


def _bwd(
    shape: tuple[int, ...], axes: tuple[int, ...], residuals: _Residuals, dy: jax.Array
) -> tuple[jax.Array, None]:
    key, rate, mask = residuals
    if mask is None:
        assert key is not None
        uniform = jax.random.uniform(key, shape, jnp.float32)
        # If the rate would drop every entry, the one with the largest number is kept. (Two are
        # kept in the rare case that both draw the same one of 2**23 possible numbers.)
        largest = jnp.max(uniform, axis=axes, keepdims=True)
        mask = (uniform >= jnp.minimum(rate, largest)).astype(jnp.float32)
    mean = jnp.mean(mask, axis=axes, keepdims=True)
    factors = mask / jnp.where(mean > 0, mean, 1.0)
    # A factor of 0 selects zero, so that a NaN in a dropped entry does not pass through.
    return jnp.where(factors == 0, jnp.zeros((), dy.dtype), scale(dy, factors)), None


_scale_gradient.defvjp(_fwd, _bwd)


def check_axes(
    name: str, axes: int | Sequence[int], *, allow_empty: bool = False
) -> tuple[int, ...]:
    """Returns one axis or several as a tuple of ints."""
    several = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if not all(map(is_int, several)):
        raise ValueError(f"{name}={axes!r} must be an int or a tuple of ints.")
    if not several and not allow_empty:
        raise ValueError(f"{name} is empty; name the axis or axes along which the mask varies.")
    return tuple(map(int, several))


def _positive(name: str, axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(f"{name}={axes!r} must name axes of x, which has {rank} axes.")
    return tuple(axis % rank for axis in axes)


def _check_mask(mask: Any, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the mask in float32."""
    shape, dtype = jnp.shape(mask), jnp.result_type(mask)
    fits = len(shape) == x.ndim and all(n in (1, x.shape[i]) for i, n in enumerate(shape))
    if not fits or not jnp.isdtype(dtype, ("bool", "integral", "real floating")):
        raise ValueError(
            f"mask has shape {shape} and dtype {dtype}, but x has shape {x.shape}; use real "
            "numbers with as many axes as x, each of the same size or 1."
        )
    if not isinstance(mask, jax.core.Tracer):
        values = np.asarray(mask).astype(np.float32)
        sums = np.sum(values, axis=axes)
        if not np.all(values >= 0) or not np.all((sums > 0) & (sums < np.inf)):
            raise ValueError(
                f"mask must have finite entries >= 0, not all of them 0 along axes={axes}."
            )
    return jnp.asarray(mask).astype(jnp.float32)
