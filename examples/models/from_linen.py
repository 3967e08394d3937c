"""Linen networks as NNX models, and networks that have to be told whether they train."""

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


def modes_of(network: Any) -> dict[str, bool]:
    """Those of `MODES` that a network's call accepts.

    Raises:
      ValueError: if the call needs any other argument but images.
    """
    accepted = inspect.signature(network.__call__).parameters
    needed = [x.name for x in accepted.values() if x.default is x.empty and x.kind in NAMED]
    if unknown := [x for x in needed[1:] if x not in MODES]:
        raise ValueError(
            f"{type(network).__name__} cannot be called with images alone, as it needs "
            f"{', '.join(unknown)} too."
        )
    return {mode: value for mode, value in MODES.items() if mode in accepted}


class WithMode(nnx.Module):
    """An NNX network that is called with images alone.

    `train()` and `eval()` set the arguments of its call that are in `modes`.
    """

    def __init__(self, network: nnx.Module, modes: dict[str, bool]) -> None:
        self.network, self.modes = network, modes
        self.deterministic = False  # Set by `train()` and `eval()`.

    def __call__(self, images: jax.Array) -> Any:
        return self.network(images, **_now(self.modes, trains=not self.deterministic))


def _now(modes: dict[str, bool], *, trains: bool) -> dict[str, bool]:
    return {mode: value == trains for mode, value in modes.items()}


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
        self.modes = modes_of(network)
        self.deterministic = False  # Set by `train()` and `eval()`.
        self.network = nnx.bridge.ToNNX(network, rngs=rngs)
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
        modes = _now(self.modes, trains=trains)
        return self.network(images, mutable=NOT_KEPT if trains else False, **modes)
