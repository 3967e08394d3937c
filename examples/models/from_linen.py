"""Linen networks as NNX models."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import DenyList

# Arguments that tell a network whether it is training, and their values in training.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
NOT_KEPT = DenyList(("params", "intermediates"))  # Collections that a call does not change.


class FromLinen(nnx.Module):
    """A Linen network that is called with images alone.

    `train()` and `eval()` set whichever of the arguments in `MODES` it accepts.

    Raises:
      ValueError: if the network cannot be called like this, or sows values, whose number would grow
        with every call.
    """

    def __init__(
        self, network: linen.Module, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs
    ) -> None:
        name = type(network).__name__
        accepted = inspect.signature(network.__call__).parameters
        self.modes = {mode: value for mode, value in MODES.items() if mode in accepted}
        self.deterministic = False  # Set by `train()` and `eval()`.
        self.network = nnx.bridge.ToNNX(network, rngs=rngs)
        needed = [x.name for x in accepted.values() if x.default is x.empty and x.kind in NAMED]
        if unknown := [x for x in needed[1:] if x not in MODES]:
            raise ValueError(
                f"{name} cannot be called with images alone, as it needs {', '.join(unknown)} too."
            )
        images = jnp.zeros((1, *image_shape))
        try:
            self.network.lazy_init(images, **self.modes)
        except Exception as error:
            raise RuntimeError(f"{name} failed on images of shape {images.shape}") from error
        state = nnx.state(self.network)
        self(images)
        if jax.tree.structure(nnx.state(self.network)) != jax.tree.structure(state):
            raise ValueError(
                f"{name} sows values into its state; sow into 'intermediates', or return them."
            )

    def __call__(self, images: jax.Array) -> Any:
        trains = not self.deterministic
        modes = {mode: value == trains for mode, value in self.modes.items()}
        return self.network(images, mutable=NOT_KEPT if trains else False, **modes)
