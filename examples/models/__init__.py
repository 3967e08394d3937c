"""Image classifiers in Flax NNX, built from a name."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import imported
from models.branches import NO_BRANCH_DROPPED, Branches as Branches, How as How
from models.densenet import DenseNet
from models.mobilenet import MobileNetV2
from models.resnet import RESNETS, ResNet
from models.vit import VITS, ViT

NAMES = (
    "resnet_small",
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "vit_mini/2",
    "vit_ti/16",
    "vit_s/16",
    "vit_b/16",
    "vit_l/16",
)
# Networks whose blocks no method here drops.
CONVOLUTIONAL = {"mobilenet_v2": MobileNetV2, "densenet121": partial(DenseNet, (6, 12, 24, 16))}


def create(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    dtype: DTypeLike = jnp.float32,
    dropout_rate: float = 0.0,
    backdrop_rate: float = 0.0,
    branches: Branches = NO_BRANCH_DROPPED,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds a model that maps images (batch, height, width, channels) to logits (batch, classes).

    Args:
      name: one of `NAMES`, or "package.module:function" for a network of your own. The number
        after the slash is the patch size of a ViT, and any that divides the image will do.
      num_classes: number of logits.
      image_shape: (height, width, channels) of one image.
      dtype: of the computation. Parameters, batch statistics and logits are float32 always.
      dropout_rate: probability that dropout zeroes a value in training.
      backdrop_rate: probability that Backdrop drops an entry of the gradient.
      branches: what drops residual blocks in training.
      rngs: source of the initial parameters and of all masks.

    Returns:
      The model in training mode; `model.eval()` switches dropout and batch statistics over.

    Raises:
      ValueError: if the name is unknown, the patch size does not divide the image, or the model
        has nothing that `branches` or `backdrop_rate` could drop.
    """
    stem = "imagenet" if min(image_shape[:2]) > 64 else "cifar"
    if imported.is_path(name) or name in CONVOLUTIONAL:
        if branches.rates or backdrop_rate:
            raise ValueError(
                f"{name} has no residual branches or feature maps that can be dropped."
            )
        shapes = dict(num_classes=num_classes, image_shape=image_shape, dtype=dtype)
        if imported.is_path(name):
            return imported.create(name, dropout_rate=dropout_rate, **shapes, rngs=rngs)
        return CONVOLUTIONAL[name](
            num_classes=num_classes,
            in_channels=image_shape[-1],
            stem=stem,
            dtype=dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
        )
    family, _, patch = name.partition("/")
    settings = dict(dtype=dtype, dropout_rate=dropout_rate, rngs=rngs)
    settings |= dict(backdrop_rate=backdrop_rate, branches=branches)
    if family in RESNETS and not patch:
        size = RESNETS[family]
        return ResNet(
            size.block,
            size.depths,
            size.width,
            num_classes=num_classes,
            in_channels=image_shape[-1],
            stem=size.stem or stem,
            **settings,
        )
    if family in VITS and patch.isdecimal() and int(patch) > 0:
        return ViT(
            *VITS[family],
            num_classes=num_classes,
            image_shape=image_shape,
            patch_size=int(patch),
            **settings,
        )
    path = "package.module:function"
    if "." in name and all(map(str.isidentifier, name.split("."))):
        path = ":".join(name.rsplit(".", 1))
    raise ValueError(
        f"unknown model {name!r}; choose one of {', '.join(NAMES)} (any patch size may follow "
        f"the slash), or {path} for a network of your own."
    )


def depth(name: str) -> int:
    """The number of residual blocks of a model; 0 if the name is unknown."""
    family = name.partition("/")[0]
    return sum(RESNETS[family].depths) if family in RESNETS else VITS.get(family, (0, 0))[1]
