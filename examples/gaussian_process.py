"""Textures: samples of a Gaussian process over the plane."""

import jax
import jax.numpy as jnp


def texture(key: jax.Array, size: int, scale: float) -> jax.Array:
    """A standardised sample of a Gaussian process with a squared-exponential kernel, on a torus.

    With kernel exp(-r^2 / (2 scale^2)) the spectral density falls as exp(-scale^2 k^2 / 2), so
    white noise whose Fourier amplitudes are multiplied by its root is a sample.
    """
    noise = jax.random.normal(key, (size, size))
    k = 2 * jnp.pi * jnp.fft.fftfreq(size)
    square = k[:, None] ** 2 + k[None, : size // 2 + 1] ** 2
    sample = jnp.fft.irfft2(jnp.fft.rfft2(noise) * jnp.exp(-(scale**2) * square / 4), s=noise.shape)
    return (sample - sample.mean()) / sample.std()
