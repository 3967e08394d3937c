"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers import ConvNorm, classifier

# Expansion, features, blocks, stride of the first one.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nnx.Module):
    """Widens, convolves each channel on its own, narrows; around a shortcut where shapes allow."""

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        expansion: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        width = expansion * in_features
        layer = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.expand = layer(in_features, width, 1) if expansion > 1 else None
        self.depthwise = layer(width, width, 3, stride, groups=width)
        self.project = layer(width, features, 1)
        self.adds = stride == 1 and in_features == features

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu6(self.expand(x)) if self.expand else x
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """Seventeen inverted residual blocks.

    Args:
      num_classes: number of logits.
      in_channels: channels of an image.
      stem: "imagenet", or "cifar" for small images: the first two strides are 1 then.
      dtype: of the computation; parameters and batch statistics are float32.
      dropout_rate: dropout before the head.
      rngs: streams "params" and "dropout".
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: str = "imagenet",
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        small = stem == "cifar"
        self.stem = ConvNorm(in_channels, 32, 3, 1 if small else 2, dtype=dtype, rngs=rngs)
        blocks, features = [], 32
        for stage, (expansion, width, count, stride) in enumerate(STAGES):
            for i in range(count):
                steps = stride if i == 0 and not (small and stage == 1) else 1
                blocks.append(
                    InvertedResidual(features, width, steps, expansion, dtype=dtype, rngs=rngs)
                )
                features = width
        self.blocks = nnx.List(blocks)
        self.last = ConvNorm(features, 1280, 1, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.head = classifier(1280, num_classes, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits."""
        x = nnx.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(nnx.relu6(self.last(x)), axis=(1, 2))
        return self.head(self.dropout(x))
