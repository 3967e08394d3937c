"""Networks of users, found by their import path."""

import importlib
import inspect
import sys
from typing import Any

from flax import linen, nnx

from models.from_linen import FromLinen


def is_path(name: str) -> bool:
    return ":" in name


def create(
    path: str,
    *,
    dropout_rate: float,
    image_shape: tuple[int, int, int],
    rngs: nnx.Rngs,
    **settings: Any,
) -> nnx.Module:
    """Calls what `path` names, with those of the settings that it takes.

    Args:
      path: such as "package.module:function"; the working directory is searched too. The function,
        or class, returns a Flax model, NNX or Linen, that maps images (batch, height, width,
        channels) to logits.
      dropout_rate: given only if it is not 0; then the function must take it.
      image_shape: (height, width, channels) of one image.
      rngs: of the parameters, and of all that the network draws.
      **settings: `num_classes` and `dtype`.

    Raises:
      ValueError: if there is no such function, or it does not return a model.
    """
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # The working directory.
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no network at {path}: {error}.") from error
    if not callable(function):
        raise ValueError(f"{path} is {function!r}, which is no function or class.")
    settings |= {"image_shape": image_shape, "rngs": rngs}
    if dropout_rate:
        settings["dropout_rate"] = dropout_rate
    called = function.__init__ if inspect.isclass(function) else function
    taken = inspect.signature(called).parameters
    if not any(x.kind is x.VAR_KEYWORD for x in taken.values()):
        if dropout_rate and "dropout_rate" not in taken:
            raise ValueError(f"{path} takes no dropout_rate; leave dropout to the network.")
        settings = {name: value for name, value in settings.items() if name in taken}
    try:
        model = function(**settings)
    except Exception as error:
        raise RuntimeError(f"{path} failed with the arguments {', '.join(settings)}") from error
    if isinstance(model, linen.Module):
        return FromLinen(model, image_shape, rngs=rngs)
    if not isinstance(model, nnx.Module):
        raise ValueError(f"{path} returned {type(model).__name__}, not a Flax model.")
    return model
