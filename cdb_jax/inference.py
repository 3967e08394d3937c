"""`infer_channel_axes`: the channels of a model by what its loss does with each weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cdb_jax import _jaxprs as jaxprs, channels
from cdb_jax._checks import check_choice, check_no_module
from cdb_jax._skipping import api, axis_uses, roles
from cdb_jax._skipping.roles import InferredAxes as InferredAxes


def infer_channel_axes(
    fun: Callable[..., Any],
    params: Any,
    *args: Any,
    channels: Literal["output", "input"] = "output",
    **kwargs: Any,
) -> InferredAxes:
    """Finds the channel axes of every weight from how a loss uses it.

    In a product, the free axes of a weight are its output channels, and the axes that are summed
    over are its input channels. Axes that are batched, looped over or indexed are stack axes.
    The output channels of a table that is only looked up are its features. A weight that is in no
    product (normalisation, biases, position embeddings) is left alone, and so is one whose name
    says that it is a position embedding or a token.

    Args:
      fun: the loss, `fun(params, *args, **kwargs)`. It may return a pair with auxiliary data. It is
        traced, not run.
      params: the parameters: a tree of arrays or `jax.ShapeDtypeStruct`. For a Flax NNX model, use
        `cdb_jax.nnx.infer_channel_axes`.
      *args: the other arguments; arrays may be `jax.ShapeDtypeStruct` too. Pass the batch here, so
        that arrays that `fun` closes over, such as masks, can be treated as constants.
      channels: which channels to find, "output" or "input".
      **kwargs: other arguments by name.

    Returns:
      A dict from the path of each leaf to its `Axes`, or to None if it has no channels. If the loss
      does not determine the axes of a leaf, its entry is the convention `output_channels` or
      `input_channels`, which uses its name and shape. Use the dict as `channel_axes`. Its `repr` is
      the code that creates it after `import cdb_jax`, so you can keep it in a configuration file.

    Raises:
      TypeError, ValueError: for a bad argument.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> params = {"q": jnp.ones((8, 2, 4)), "b": jnp.ones((2, 4)), "table": jnp.ones((9, 8))}
      >>> def loss(params, tokens):
      ...     x = params["table"][tokens]
      ...     return jnp.mean(jnp.einsum("bi,ihd->bhd", x, params["q"]) + params["b"][None])
      >>> found = cdb_jax.infer_channel_axes(loss, params, jax.ShapeDtypeStruct((5,), jnp.int32))
      >>> found["q"], found["table"], found["b"]
      (cdb_jax.Axes(channel=(1, 2), stack=()), cdb_jax.Axes(channel=1, stack=()), None)
    """
    check_choice("channels", channels, ("output", "input"))
    api.check_function(fun)
    check_no_module(params, "params is", "cdb_jax.nnx.infer_channel_axes")
    return roles.axes(channels, _uses(fun, params, args, kwargs))


def _uses(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any
) -> dict[str, axis_uses.Uses | None]:
    """The uses of each leaf by its path; None for a leaf without float values."""
    arrays, rebuild = api.split_arrays((params, args, kwargs))

    def call(arrays: list[Any]) -> Any:
        traced_params, traced_args, traced_kwargs = rebuild(arrays)
        result = fun(traced_params, *traced_args, **traced_kwargs)
        return result[0] if isinstance(result, tuple) else result

    keyed = jax.tree_util.tree_leaves_with_path(params)
    is_float = [hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) for _, x in keyed]
    param_arrays, _ = api.split_arrays(params)
    weights = [i for i, x in enumerate(param_arrays) if jnp.issubdtype(x.dtype, jnp.inexact)]
    jaxpr, _ = jaxprs.opened(jax.make_jaxpr(call)(arrays))
    # If the batch is not an argument, any constant may hold it, so all constants become inputs.
    if len(arrays) == len(param_arrays):
        jaxpr = jaxpr.replace(constvars=(), invars=[*jaxpr.invars, *jaxpr.constvars])
    found = iter(axis_uses.find(jaxpr, weights).values())
    return {
        channels.canonical_path(keys): next(found) if chosen else None
        for (keys, _), chosen in zip(keyed, is_float, strict=True)
    }
