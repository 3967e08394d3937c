"""Networks of users, found by their import path."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import linen, nnx

from models.from_linen import FromLinen, WithMode, modes_of

EXAMPLES = Path(__file__).resolve().parent.parent


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
      dropout_rate: given if it is not 0 or the function requires it; if it is not 0, the function
        must take it.
      image_shape: (height, width, channels) of one image.
      rngs: of the parameters, and of all that the network draws.
      **settings: `num_classes` and `dtype`.

    Raises:
      ValueError: if there is no such function, it requires another argument, or it does not return
        a model.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(_import(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no network at {path}: {error}.") from error
    if not callable(function):
        raise ValueError(f"{path} is {function!r}, which is no function or class.")
    settings |= {"image_shape": image_shape, "rngs": rngs}
    taken, required = _arguments(function)
    if dropout_rate or "dropout_rate" in required:
        settings["dropout_rate"] = dropout_rate
    if missing := [name for name in required if name not in settings]:
        named = " and ".join(f"`{name}`" for name in missing)
        raise ValueError(
            f"{path} takes {named}, which the script does not pass; it passes num_classes, "
            "image_shape, dtype, rngs and dropout_rate."
        )
    if not any(x.kind is x.VAR_KEYWORD for x in taken.values()):
        if dropout_rate and "dropout_rate" not in taken:
            raise ValueError(f"{path} takes no dropout_rate; leave dropout to the network.")
        settings = {name: value for name, value in settings.items() if name in taken}
    try:
        model = function(**settings)
    except Exception as error:
        arguments = f"with the arguments {', '.join(settings)}" if settings else "without arguments"
        raise RuntimeError(f"{path} failed {arguments}") from error
    if isinstance(model, linen.Module):
        return FromLinen(model, image_shape, rngs=rngs)
    if not isinstance(model, nnx.Module):
        raise ValueError(f"{path} returned {type(model).__name__}, not a Flax model.")
    modes = modes_of(model)
    return WithMode(model, modes) if modes else model


def _import(name: str) -> ModuleType:
    """A module, for which all that the working directory has comes before these examples.

    Both may have a `config.py` or a `data.py`.
    """
    folder = Path.cwd()
    hidden = {}
    if folder != EXAMPLES:
        for loaded, module in list(sys.modules.items()):
            file, top = getattr(module, "__file__", None), folder / loaded.partition(".")[0]
            is_ours = file is not None and Path(file).resolve().is_relative_to(EXAMPLES)
            if is_ours and (top.is_dir() or top.with_suffix(".py").is_file()):
                hidden[loaded] = sys.modules.pop(loaded)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # For what is imported later.
        sys.modules |= hidden


def _arguments(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], list[str]]:
    """The parameters of a function or class by name, and the names of those without a default."""
    if inspect.isclass(function):
        _, *found = inspect.signature(function.__init__).parameters.values()  # All but `self`.
    else:
        found = list(inspect.signature(function).parameters.values())
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [x.name for x in found if x.default is x.empty and x.kind not in variable]
    return {x.name: x for x in found}, required
