"""Images mixed in pairs, mixup and CutMix, and the targets of a classifier that sees them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mix(
    key: jax.Array, images: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    r"""Mixes each image of a batch with the one at the mirrored place of the batch.

    mixup (arXiv 1710.09412) takes $\lambda x_1 + (1 - \lambda) x_2$ with one
    $\lambda \sim \mathrm{Beta}(a, a)$ for the batch. CutMix (arXiv 1905.04899) pastes a box of
    $x_2$ into $x_1$; $1 - \lambda$ is the area of the box. If both are asked for, each gets half of
    the batches.

    Args:
      key: decides everything.
      images: float (batch, height, width, channels).
      mixup: a of mixup; 0 for none.
      cutmix: a of CutMix; 0 for none.

    Returns:
      The mixed images, and the share of each that is its own: float32, a scalar.
    """
    choice_key, share_key, box_key = jax.random.split(key, 3)
    cuts = jax.random.bernoulli(choice_key, (cutmix > 0) * (0.5 if mixup > 0 else 1.0))
    a = jnp.where(cuts, cutmix, mixup)
    share = jax.random.beta(share_key, a, a)
    inside = _box(box_key, images.shape[1:3], 1 - share)
    own = jnp.where(cuts, 1 - inside, share)  # The weight of an image in each of its pixels.
    share = jnp.where(cuts, own.mean(), share)  # A part of the box may lie outside the image.
    own = own[None, ..., None]
    return own * images + (1 - own) * images[::-1], share


def _box(key: jax.Array, shape: tuple[int, int], area: jax.Array) -> jax.Array:
    """1 inside a box, 0 outside: float32, of the given shape.

    The box has the proportions of the image and this part of its area. Its centre lies anywhere in
    the image; what lies outside the image is cut off.
    """
    half = jnp.sqrt(area) / 2
    inside = []
    for size, centre in zip(shape, jax.random.uniform(key, (2,)), strict=True):
        low, high = jnp.round((centre - half) * size), jnp.round((centre + half) * size)
        pixel = jnp.arange(size, dtype=jnp.float32)
        inside.append((pixel >= low) & (pixel < high))
    return (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)


def soft_targets(
    labels: jax.Array, share: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
    """Shares of all classes in each image of a batch, of which `mix` left `share` its own.

    A part `smoothing` of the target is spread over all classes (arXiv 1512.00567).

    Returns:
      float32 (batch, num_classes).
    """
    target = jax.nn.one_hot(labels, num_classes)
    target = share * target + (1 - share) * target[::-1]
    return (1 - smoothing) * target + smoothing / num_classes
