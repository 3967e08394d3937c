"""DenseNets (Huang et al. 2016, arXiv 1608.06993)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers import classifier, convolution

GROWTH = 32  # Features that a layer adds.
BOTTLENECK = 4 * GROWTH  # Features between its two convolutions.


class NormConv(nnx.Module):
    """Batch normalisation and ReLU, then a convolution without bias."""

    def __init__(
        self,
        in_features: int,
        features: int,
        size: int,
        stride: int = 1,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm = nnx.BatchNorm(in_features, momentum=0.9, dtype=dtype, rngs=rngs)
        self.conv = convolution(in_features, features, size, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(nnx.relu(self.norm(x)))


class DenseLayer(nnx.Module):
    """Adds features, computed from all that came before, to them."""

    def __init__(self, in_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = NormConv(in_features, BOTTLENECK, 1, dtype=dtype, rngs=rngs)
        self.conv2 = NormConv(BOTTLENECK, GROWTH, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, self.conv2(self.conv1(x))], axis=-1)


class Transition(nnx.Module):
    """Halves the features and the sides of the image."""

    def __init__(self, in_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = NormConv(in_features, in_features // 2, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(x)
        batch, height, width, features = y.shape
        y = y[:, : height // 2 * 2, : width // 2 * 2]
        return y.reshape(batch, height // 2, 2, width // 2, 2, features).mean(axis=(2, 4))


class DenseNet(nnx.Module):
    """Blocks in which each layer sees the features of all layers before it.

    Args:
      depths: number of layers in each block.
      num_classes: number of logits.
      in_channels: channels of an image.
      stem: "imagenet" (7x7 convolution of stride 2 and max pooling: a quarter of the side) or
        "cifar" (3x3 convolution at full size, for small images).
      dtype: of the computation; parameters and batch statistics are float32.
      dropout_rate: dropout before the head.
      rngs: streams "params" and "dropout".
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: str = "imagenet",
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        features = 2 * GROWTH
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.stem = convolution(in_channels, features, size, stride, dtype=dtype, rngs=rngs)
        self.pools_stem = stem == "imagenet"
        layer = partial(nnx.BatchNorm, momentum=0.9, dtype=dtype, rngs=rngs)
        self.stem_norm = layer(features) if self.pools_stem else None
        blocks: list[nnx.Module] = []
        for i, depth in enumerate(depths):
            if i > 0:
                blocks.append(Transition(features, dtype=dtype, rngs=rngs))
                features //= 2
            for _ in range(depth):
                blocks.append(DenseLayer(features, dtype=dtype, rngs=rngs))
                features += GROWTH
        self.blocks = nnx.List(blocks)
        self.norm = layer(features)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.head = classifier(features, num_classes, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits."""
        x = self.stem(images)
        if self.stem_norm:
            x = nnx.relu(self.stem_norm(x))
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(nnx.relu(self.norm(x)), axis=(1, 2))
        return self.head(self.dropout(x))
