"""Images mixed in pairs, mixup and CutMix, and the targets of a classifier that sees them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mix(
    key: jax.Array, images: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    r"""Mixes each image of a batch with the one before it.

    mixup (arXiv 1710.09412) takes $\lambda x_1 + (1 - \lambda) x_2$ with one
    $\lambda \sim \mathrm{Beta}(a, a)$ for the batch. CutMix (arXiv 1905.04899) pastes a box of
    $x_2$ into $x_1$; $1 - \lambda$ is the area of the box. If both are asked for, each gets half of
    the batches.

    Args:
      key: a PRNG key.
      images: float (batch, height, width, channels).
      mixup: a of mixup; 0 for none.
      cutmix: a of CutMix; 0 for none.

    Returns:
      The mixed images, and the weight $\lambda$ of the first of the two: float32, a scalar.
    """
    choice_key, weight_key, box_key = jax.random.split(key, 3)
    cuts = jax.random.bernoulli(choice_key, (cutmix > 0) * (0.5 if mixup > 0 else 1.0))
    a = jnp.where(cuts, cutmix, mixup)
    weight = jax.random.beta(weight_key, a, a)
    pixel_weights = jnp.where(cuts, 1 - _box(box_key, images.shape[1:3], 1 - weight), weight)
    # A part of the box may lie outside the image.
    weight = jnp.where(cuts, pixel_weights.mean(), weight)
    pixel_weights = pixel_weights[None, ..., None]
    return pixel_weights * images + (1 - pixel_weights) * _partners(images), weight


def _partners(x: jax.Array) -> jax.Array:
    """What each entry of a batch is mixed with."""
    return jnp.roll(x, 1, axis=0)


def _box(key: jax.Array, shape: tuple[int, int], area: jax.Array) -> jax.Array:
    """1 inside a box, 0 outside: float32, of the given shape.

    The box has the proportions of the image and this part of its area. Its centre lies anywhere in
    the image; what lies outside the image is cut off.
    """
    half = jnp.sqrt(area) / 2
    is_inside = []
    for size, centre in zip(shape, jax.random.uniform(key, (2,)), strict=True):
        low, high = jnp.round((centre - half) * size), jnp.round((centre + half) * size)
        pixel = jnp.arange(size, dtype=jnp.float32)
        is_inside.append((pixel >= low) & (pixel < high))
    return (is_inside[0][:, None] & is_inside[1][None, :]).astype(jnp.float32)


def soft_targets(
    labels: jax.Array, weight: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
    """Soft targets for a batch from `mix`, with label smoothing (arXiv 1512.00567).

    Args:
      labels: int (batch,), of the images before they were mixed.
      weight: what `mix` returned; 1 for images that were not mixed.
      num_classes: number of classes.
      smoothing: the part of the target that is spread over all classes.

    Returns:
      float32 (batch, num_classes).
    """
    target = jax.nn.one_hot(labels, num_classes)
    target = weight * target + (1 - weight) * _partners(target)
    return (1 - smoothing) * target + smoothing / num_classes
