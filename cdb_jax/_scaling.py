"""Multiplies arrays or their gradients by factors in a wide dtype, and keeps their dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def scale(x: jax.Array, factors: jax.Array | float) -> jax.Array:
    """Multiplies in float32 or wider, and returns the result in the dtype of `x`."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(scale(x.real, factors), scale(x.imag, factors))
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    return (x.astype(wide) * jnp.asarray(factors, wide)).astype(x.dtype)


def varying_with(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Returns `x`; under `vmap`, it has an entry for each example if one of the others has.

    The result of a custom derivative must vary with all that its backward pass varies with.
    Otherwise JAX hands each example the cotangent of all examples. The compiler removes this.
    """
    for other in others:
        x = jnp.where(jnp.any(other.astype(bool)), x, x)
    return x


@jax.custom_vjp
def scale_gradient(x: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Returns `x`, and multiplies its gradient."""
    return varying_with(x, jnp.asarray(factor))


def _fwd(x: jax.Array, factor: float | jax.Array) -> tuple[jax.Array, float | jax.Array]:
    return varying_with(x, jnp.asarray(factor)), factor


def _bwd(factor: float | jax.Array, dx: jax.Array) -> tuple[jax.Array, None]:
    return scale(dx, factor), None


scale_gradient.defvjp(_fwd, _bwd)
