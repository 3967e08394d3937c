"""Multiplies arrays by factors in a wide dtype, without changing the dtype of the result."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def scale(x: jax.Array, factors: jax.Array | float) -> jax.Array:
    """Multiplies in float32 or wider, and returns the result in the dtype of `x`."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(scale(x.real, factors), scale(x.imag, factors))
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    return (x.astype(wide) * jnp.asarray(factors, wide)).astype(x.dtype)
