"""Linen networks as NNX models."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import DenyList

# How networks are told whether they train, and what they are told then.
MODES = {"train": True, "training": True, "is_training": True, "deterministic": False}
FIXED = DenyList(("params", "intermediates"))  # What the forward pass does not keep.


class FromLinen(nnx.Module):
    """A Linen network, called with images alone.

    `train()` and `eval()` give it that argument of `MODES` which it takes.
    """

    def __init__(
        self, network: linen.Module, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs
    ) -> None:
        taken = inspect.signature(network.__call__).parameters
        self.modes = {name: value for name, value in MODES.items() if name in taken}
        self.deterministic = False  # Set by `train()` and `eval()`.
        self.network = nnx.bridge.ToNNX(network, rngs=rngs)
        self.network.lazy_init(jnp.zeros((1, *image_shape)), **self.modes)

    def __call__(self, images: jax.Array) -> Any:
        trains = not self.deterministic
        modes = {name: value == trains for name, value in self.modes.items()}
        return self.network(images, mutable=FIXED if trains else False, **modes)
