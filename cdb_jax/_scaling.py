"""Multiplying arrays by factors: wide inside, and back in the dtype that came."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def scale(x: jax.Array, factors: jax.Array | float) -> jax.Array:
    """Multiplies in float32 or better and returns to the dtype of `x`."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(scale(x.real, factors), scale(x.imag, factors))
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    return (x.astype(wide) * jnp.asarray(factors, wide)).astype(x.dtype)
