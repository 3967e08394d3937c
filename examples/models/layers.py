"""Layers that several convolutional networks share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def convolution(
    in_features: int,
    features: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution without bias that keeps the size of an image, but for its stride."""
    return nnx.Conv(
        in_features,
        features,
        kernel_size=(size, size),
        strides=stride,
        padding=size // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=he_normal,
        dtype=dtype,
        rngs=rngs,
    )


class ConvNorm(nnx.Module):
    """A convolution without bias, then batch normalisation."""

    def __init__(
        self,
        in_features: int,
        features: int,
        size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        scale_init: nnx.Initializer = nnx.initializers.ones,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = convolution(
            in_features, features, size, stride, groups=groups, dtype=dtype, rngs=rngs
        )
        self.norm = nnx.BatchNorm(
            features, momentum=0.9, scale_init=scale_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


def classifier(features: int, num_classes: int, rngs: nnx.Rngs) -> nnx.Linear:
    """The head: logits in full precision, whatever the trunk computes in."""
    return nnx.Linear(
        features,
        num_classes,
        kernel_init=nnx.initializers.normal(0.01),
        dtype=jnp.float32,
        rngs=rngs,
    )
