"""Residual networks (He et al. 2015, arXiv 1512.03385)."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.branches import NO_BRANCH_DROPPED, Branch, Branches, given, make_backdrop
from models.layers import ConvNorm, classifier

zeros = nnx.initializers.zeros


class Residual(nnx.Module):
    """A shortcut, and a branch that is added to it: what the blocks of all ResNets share.

    A subclass sets `shortcut`, a layer or None, and `drop_path`, a `Branch`.
    """

    def __call__(
        self, x: jax.Array, gate: jax.Array | None = None, kept: jax.Array | None = None
    ) -> jax.Array:
        y = self.drop_path(type(self).branch, self, x, gate=gate, kept=kept)
        return nnx.relu(y + (self.shortcut(x) if self.shortcut else x))


class BasicBlock(Residual):
    """Two 3x3 convolutions around a shortcut: the block of ResNet-18 and ResNet-34."""

    expansion = 1

    def __init__(
        self,
        in_features: int,
        width: int,
        stride: int,
        *,
        drop_path: Branch,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        layer = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.conv1 = layer(in_features, width, 3, stride)
        # Scale zero makes the block the identity at first, which steadies early training.
        self.conv2 = layer(width, width, 3, scale_init=zeros)
        projects = stride > 1 or in_features != width
        self.shortcut = layer(in_features, width, 1, stride) if projects else None
        self.drop_path = drop_path

    def branch(self, x: jax.Array) -> jax.Array:
        return self.conv2(nnx.relu(self.conv1(x)))


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolutions around a shortcut: the block of ResNet-50.

    The 3x3 convolution carries the stride, as in the variant known as v1.5.
    """

    expansion = 4

    def __init__(
        self,
        in_features: int,
        width: int,
        stride: int,
        *,
        drop_path: Branch,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        features = self.expansion * width
        layer = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.conv1 = layer(in_features, width, 1)
        self.conv2 = layer(width, width, 3, stride)
        self.conv3 = layer(width, features, 1, scale_init=zeros)  # As in BasicBlock.
        projects = stride > 1 or in_features != features
        self.shortcut = layer(in_features, features, 1, stride) if projects else None
        self.drop_path = drop_path

    def branch(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.conv1(x))
        return self.conv3(nnx.relu(self.conv2(y)))


class ResNet(nnx.Module):
    """Stages of residual blocks; each stage after the first halves the image and doubles the width.

    Args:
      block: `BasicBlock` or `Bottleneck`.
      depths: number of blocks in each stage.
      width: width of the first stage.
      num_classes: number of logits.
      in_channels: channels of an image.
      stem: "imagenet" (7x7 convolution of stride 2 and max pooling: a quarter of the side) or
        "cifar" (3x3 convolution at full size, for small images).
      dtype: of the computation; parameters and batch statistics are float32.
      dropout_rate: dropout before the head.
      backdrop_rate: Backdrop over the positions of the last feature map, before it is averaged.
      branches: what drops the blocks.
      rngs: streams "params", "dropout", "backdrop", "drop_path" and "drop_backward".
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, ...],
        width: int = 64,
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: str = "imagenet",
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.0,
        backdrop_rate: float = 0.0,
        branches: Branches = NO_BRANCH_DROPPED,
        rngs: nnx.Rngs,
    ):
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem={stem!r}; choose 'imagenet' or 'cifar'.")
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.stem = ConvNorm(in_channels, width, size, stride, dtype=dtype, rngs=rngs)
        self.pools_stem = stem == "imagenet"

        blocks, features = [], width
        for stage, depth in enumerate(depths):
            stage_width = width * 2**stage
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                drop_path = branches.make(len(blocks), sum(depths), rngs)
                blocks.append(
                    block(
                        features, stage_width, stride, drop_path=drop_path, dtype=dtype, rngs=rngs
                    )
                )
                features = stage_width * block.expansion
        self.blocks = nnx.List(blocks)

        self.draw_kept = branches.draw(1, rngs)
        self.backdrop = make_backdrop(backdrop_rate, (1, 2), rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.head = classifier(features, num_classes, rngs)

    def __call__(
        self,
        images: jax.Array,
        gates: jax.Array | None = None,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        """Maps images to logits.

        Args:
          images: (batch, height, width, channels).
          gates: factors of the branches, (blocks,).
          kept: whether to keep the backward pass of each branch, (blocks,); None to draw it.
        """
        if kept is None and self.draw_kept:
            kept = self.draw_kept()
        x = nnx.relu(self.stem(images))
        if self.pools_stem:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, block in enumerate(self.blocks):
            x = block(x, **given(i, 1, gates, kept))
        x = jnp.mean(self.backdrop(x) if self.backdrop else x, axis=(1, 2))
        return self.head(self.dropout(x))


class Size(NamedTuple):
    """The hyperparameters of a ResNet. If `stem` is None, the size of the images decides."""

    block: type[BasicBlock | Bottleneck]
    depths: tuple[int, ...]
    width: int
    stem: Literal["imagenet", "cifar"] | None = None


RESNETS = {
    "resnet_small": Size(BasicBlock, (1, 1, 1), 16),  # For images of 8x8 to 32x32.
    "resnet18": Size(BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": Size(BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": Size(Bottleneck, (3, 4, 6, 3), 64),
}
