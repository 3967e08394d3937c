"""`backdrop`: the identity whose backward pass drops a random part of the gradient."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax._checks import check_call_key, check_rate
from cdb_jax._scaling import scale


def backdrop(
    x: jax.Array,
    rate: float | jax.typing.ArrayLike,
    *,
    axes: int | Sequence[int],
    key: jax.Array | None = None,
    sample_axes: int | Sequence[int] = (),
    mask: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Returns `x`, and multiplies its gradient by a random mask in the backward pass.

    The mask m varies along `axes` and is constant along all others. Each of its n entries is
    dropped with probability `rate`, and the mask is divided by its mean, so that the gradient keeps
    its size:

    .. math:: y = x, \qquad \bar x = \frac{m}{\frac1n \sum_i m_i} \odot \bar y.

    If every entry would be dropped, one of them is kept at random. The mask is drawn in the
    backward pass, so only the key is stored. Inside a `shard_map` over one of the axes, fold
    `jax.lax.axis_index` into the key, or every device draws the same mask for its part.

    Args:
      x: float array of any shape.
      rate: probability that an entry of the mask is dropped, in [0, 1]; may be traced. With 0, no
        entry is dropped; with 1, a single one is kept.
      axes: the axis or axes along which the mask varies: the spatial axes of an image to regularise
        the scale that this layer sees; the batch axis of a loss that does not decompose over it.
      key: a JAX key, for this call alone. Not needed with `mask`.
      sample_axes: axes along which masks are independent, each with its own mean; use the batch
        axis to draw a mask for each image.
      mask: for diagnosis, a mask to use in place of a random one: numbers >= 0, not all zero, of a
        shape that broadcasts to `x`. It is divided by its mean along `axes`.

    Returns:
      `x`, bit for bit.

    Raises:
      TypeError, ValueError: for a bad rate, axes that `x` does not have or that repeat, a missing
        key, or a mask that does not fit.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> loss = lambda x: jnp.sum(cdb_jax.backdrop(x, 0.5, axes=1, key=jax.random.key(0)))
      >>> jax.grad(loss)(jnp.ones((2, 4)))
      Array([[2., 2., 0., 0.],
             [2., 2., 0., 0.]], dtype=float32)

    References:
      Backdrop, `arXiv 1806.01337 <https://arxiv.org/abs/1806.01337>`_.
    """
    rate = check_rate("rate", rate, schedule=False)
    axes = _positive("axes", check_axes("axes", axes), x.ndim)
    samples = _positive("sample_axes", check_axes("sample_axes", sample_axes, some=False), x.ndim)
    if set(axes) & set(samples):
        raise ValueError(f"axes={axes} and sample_axes={samples} share an axis; name each once.")
    if mask is not None:
        mask = _checked_mask(mask, x, axes)
        return _scale_gradient(x, mask, lambda mask: _normalised(mask, axes))
    if (isinstance(rate, float) and rate == 0.0) or not x.size:
        return x
    key = check_call_key(key, "rngs.backdrop()")
    shape = [size if axis in (*axes, *samples) else 1 for axis, size in enumerate(x.shape)]

    def factors(drawn: tuple[jax.Array, Any]) -> jax.Array:
        return _normalised(_draw(*drawn, shape, axes, samples), axes)

    return _scale_gradient(x, (key, rate), factors)


def _scale_gradient(x: jax.Array, source: Any, factors: Callable[[Any], jax.Array]) -> jax.Array:
    """`x`, with a gradient that is multiplied by `factors(source)`; a factor of 0 gives zero."""

    @jax.custom_vjp
    def identity(x: jax.Array, source: Any) -> jax.Array:
        return x

    def forward(x: jax.Array, source: Any) -> tuple[jax.Array, Any]:
        return x, source

    def backward(source: Any, dy: jax.Array) -> tuple[jax.Array, None]:
        mask = factors(source)
        return jnp.where(mask == 0, jnp.zeros((), dy.dtype), scale(dy, mask)), None

    identity.defvjp(forward, backward)
    return identity(x, source)


def _draw(
    key: jax.Array,
    rate: Any,
    shape: Sequence[int],
    axes: tuple[int, ...],
    samples: tuple[int, ...],
) -> jax.Array:
    """A mask of 0 and 1 with at least one 1 for each sample."""
    entries, lead = [shape[axis] for axis in axes], [shape[axis] for axis in samples]
    uniform = jax.random.uniform(key, (math.prod(lead), math.prod(entries)), jnp.float32)
    keep = uniform >= jnp.asarray(rate, jnp.float32)
    # If all are dropped, each entry is equally likely to have the largest number.
    best = jnp.argmax(uniform, axis=1)[:, None] == jnp.arange(uniform.shape[1])[None]
    keep |= best & ~jnp.any(keep, axis=1, keepdims=True)
    order = np.argsort(samples + axes).tolist()
    return jnp.transpose(keep.reshape(lead + entries), order).reshape(shape).astype(jnp.float32)


def _normalised(mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    mean = jnp.mean(mask, axis=axes, keepdims=True)
    return mask / jnp.where(mean > 0, mean, 1.0)


def _checked_mask(mask: Any, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    shape, dtype = jnp.shape(mask), jnp.result_type(mask)
    fits = len(shape) == x.ndim and all(
        size in (1, whole) for size, whole in zip(shape, x.shape, strict=True)
    )
    real_dtypes = (jnp.bool_, jnp.integer, jnp.floating)
    if not fits or not any(jnp.issubdtype(dtype, real) for real in real_dtypes):
        raise ValueError(
            f"mask has shape {shape} and dtype {dtype}, but x has shape {x.shape}; use real "
            "numbers with as many axes as x, each of the same size or 1."
        )
    if not isinstance(mask, jax.core.Tracer):
        values = np.asarray(mask).astype(np.float32)
        if not np.all(values >= 0) or not np.all(np.isfinite(np.sum(values, axis=axes))):
            raise ValueError("mask has entries that are negative or not finite; use numbers >= 0.")
        if not np.all(np.any(values > 0, axis=axes)):
            raise ValueError("mask is 0 all along axes; keep at least one entry.")
    return jnp.asarray(mask).astype(jnp.float32)


def check_axes(name: str, axes: Any, *, some: bool = True) -> tuple[int, ...]:
    """One axis or several as a tuple of ints."""
    several = axes if isinstance(axes, Sequence) else (axes,)
    try:
        found = tuple(operator.index(axis) for axis in several if not isinstance(axis, bool))
    except TypeError:
        found = ()
    if len(found) < len(several):
        raise ValueError(f"{name}={axes!r} must be an int or a tuple of ints.")
    if some and not found:
        raise ValueError(f"{name} is empty; name the axis or axes along which the mask varies.")
    return found


def _positive(name: str, axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(f"{name}={axes!r}: x has {rank} axes, but not {axis!r}.")
    positive = tuple(sorted(axis % rank for axis in axes))
    if len(set(positive)) < len(positive):
        raise ValueError(f"{name}={axes!r} names an axis twice; name each once.")
    return positive
