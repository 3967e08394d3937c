"""`value_and_grad` and `grad` that do not compute what a selection drops."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cdb_jax._checks import check_bool, check_no_module, short
from cdb_jax._kept import check_same_size
from cdb_jax._skipping import program
from cdb_jax.selection import Mode, Selection, check_selection

# `functools.wraps` without copying attributes, since the function may be a model.
wraps = functools.partial(
    functools.wraps, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=()
)


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    kept_only: bool = False,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` that computes only the part of the gradient that a selection keeps.

    The gradient equals that of `jax.value_and_grad`, up to the order of floating-point additions,
    with zeros in dropped channels. It is never rescaled; only `channel_drop_back` does that. In a
    loop with `channel_drop_back` or `freeze_dropped`, this function saves time and changes nothing
    else.

    If a weight :math:`w` reaches a product :math:`y = x \cdot w` through operations that keep its
    channels apart, such as changes of layout and dtype, scales and masks, the weight gradient is
    computed for its kept channels K only. With :math:`\bar y` the
    cotangent of y,

    .. math:: \bar w_{\cdot K} = x^\top \bar y_{\cdot K} \quad\text{(output channels)},
       \qquad \bar w_{K \cdot} = x_{\cdot K}^\top \bar y \quad\text{(input channels)}.

    For a weight that is read in any other way, the full gradient is computed and masked.
    `channel_report` shows which weights those are.

    Args:
      fun: a function of arrays that returns a float scalar, or with `has_aux` a pair of such a
        scalar and auxiliary data.
      argnums: the position of the argument to differentiate, or several positions. With several,
        the selection must be made for the tuple of these arguments.
      has_aux: whether `fun` returns a pair.
      kept_only: whether to return only the kept part of each gradient, without zeros around it. A
        kernel of shape `(2, 4)` that keeps one output channel then has a gradient of shape
        `(2, 1)`, and a leaf that never learns has an `optax.MaskedNode`. `cdb_jax.compact` is the
        only optimizer that accepts such gradients.

    Returns:
      A function of the arguments of `fun` and of the keyword argument `selection`, a `Selection`
      for the differentiated argument. It returns results like those of `jax.value_and_grad`.
      Call it under `jit`.

    Raises:
      TypeError, ValueError: for a `fun` that cannot be differentiated; when called, for a selection
        that was made for another tree, or whose number of kept channels is not static. Skipping
        needs a rate that is a Python number and a `channel_choice` other than "bernoulli", unless
        the rate is 0 or 1.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
      >>> @jax.jit
      ... def gradient(params, x, step):
      ...     selection = policy.select(params, step)
      ...     return cdb_jax.value_and_grad(loss)(params, x, selection=selection)
      >>> gradient({"kernel": jnp.zeros((2, 4))}, jnp.ones((3, 2)), 0)[1]["kernel"]
      Array([[3., 0., 0., 3.],
             [3., 0., 0., 3.]], dtype=float32)

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_; LayerDropBack,
      `arXiv 2412.18027 <https://arxiv.org/abs/2412.18027>`_.
    """
    check_function(fun)
    check_bool("kept_only", kept_only)
    _argnums_as_list(argnums)

    @wraps(fun)
    def value_and_gradient(*args: Any, selection: Selection | None = None, **kwargs: Any) -> Any:
        chosen = check_can_skip(selection)
        if kept_only and chosen.policy is not None:
            check_same_size(chosen.policy)
        params, call = _differentiated(fun, args, kwargs, argnums)
        value, aux, gradient = program.run(call, params, chosen, has_aux, kept_only)
        return ((value, aux) if has_aux else value), gradient

    return value_and_gradient


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    kept_only: bool = False,
) -> Callable[..., Any]:
    """`jax.grad` that computes only the part of the gradient that a selection keeps.

    Like `value_and_grad`, but the function that it returns gives only the gradient, or with
    `has_aux` a pair of the gradient and the auxiliary data.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((1, 4))}
      >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
      >>> last_two = cdb_jax.Selection.of(params, {"kernel": [2, 3]})
      >>> cdb_jax.grad(loss)(params, jnp.ones((3, 1)), selection=last_two)
      {'kernel': Array([[0., 0., 3., 3.]], dtype=float32)}
    """
    return without_value(value_and_grad(fun, argnums, has_aux, kept_only=kept_only), has_aux)


def without_value(value_and_gradient: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The function that `grad` returns, from the one that `value_and_grad` returns."""

    @wraps(value_and_gradient)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, result = value_and_gradient(*args, **kwargs)
        return (result, value[1]) if has_aux else result

    return gradient


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and a function that puts others in their place.

    All other leaves, such as Python numbers and functions, stay as they are.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def rebuild(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        filled = [next(remaining) if is_array[i] else x for i, x in enumerate(leaves)]
        return jax.tree.unflatten(treedef, filled)

    return [x for x, chosen in zip(leaves, is_array, strict=True) if chosen], rebuild


def check_function(fun: Any) -> None:
    if not callable(fun):
        raise TypeError(
            f"fun must be a function of the parameters that returns a loss, got {short(fun)}."
        )
    try:
        names = inspect.signature(fun).parameters
    except (TypeError, ValueError):
        return
    bound = fun.keywords if isinstance(fun, functools.partial) else {}
    if "selection" in names and "selection" not in bound:
        raise TypeError(
            f"fun {getattr(fun, '__name__', fun)!r} has an argument called selection, which "
            "value_and_grad needs for itself; rename it, or wrap fun."
        )


def can_skip(selection: Selection) -> bool:
    """Whether the number of channels that each layer keeps is static."""
    return all(group.part or Mode.PARTIAL not in group.modes for group in selection.groups)


def check_can_skip(selection: Any) -> Selection:
    """Returns the selection; raises an error for one with which no work can be saved."""
    if selection is None:
        raise TypeError(
            "selection is missing; pass it by name: selection=policy.select(params, step)."
        )
    if can_skip(check_selection(selection)):
        return selection
    rate = selection.policy.rate
    if not isinstance(rate, float):
        kind = "a schedule" if callable(rate) else "an array"
        raise TypeError(
            f"rate must be a Python number to skip what is dropped, got {kind}: skipping needs "
            "static shapes. Use a number and vary layer_rate instead, or use jax.value_and_grad."
        )
    raise ValueError(
        'channel_choice="bernoulli" keeps a different number of channels in every step, but '
        'skipping needs static shapes. Use channel_choice="window" (a contiguous block that wraps '
        'around), "chunk" or "exact" (a fixed number of channels, anywhere); change a preset with '
        "dataclasses.replace(policy, channel_choice=...). Otherwise, use jax.value_and_grad."
    )


def _differentiated(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, argnums: int | Sequence[int]
) -> tuple[Any, Callable[[Any], Any]]:
    """The arguments to differentiate as one tree, and `fun` as a function of that tree."""
    numbers = _checked_argnums(argnums, len(args))
    single = not isinstance(argnums, Sequence)
    params = args[numbers[0]] if single else tuple(args[i] for i in numbers)

    def call(params: Any) -> Any:
        given = list(args)
        for i, value in zip(numbers, [params] if single else params, strict=True):
            given[i] = value
        return fun(*given, **kwargs)

    check_no_module(params, f"argnums={argnums!r} refers to", "cdb_jax.nnx.value_and_grad")
    _check_floats(params, argnums)
    return params, call


def _argnums_as_list(argnums: Any) -> list[int]:
    try:
        several = argnums if isinstance(argnums, Sequence) else [argnums]
        return [operator.index(number) for number in several]
    except TypeError:
        raise TypeError(
            f"argnums must be an int or a sequence of ints, got {short(argnums)}; pass the "
            "parameters to the returned function: value_and_grad(fun)(params, selection=selection)."
        ) from None


def _checked_argnums(argnums: Any, num_args: int) -> list[int]:
    numbers = _argnums_as_list(argnums)
    for number in numbers:
        if not -num_args <= number < num_args:
            raise ValueError(
                f"argnums={argnums!r} names argument {number}, but the number of positional "
                f"arguments is {num_args}; pass the parameters by position."
            )
    numbers = [number % num_args for number in numbers]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"argnums={argnums!r} names an argument twice; list each once.")
    return numbers


def _check_floats(params: Any, argnums: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(
            f"argnums={argnums!r} names an argument without arrays; name the parameters instead."
        )
    for path, x in leaves:
        dtype = getattr(x, "dtype", jnp.result_type(x) if isinstance(x, (int, float)) else None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            where = jax.tree_util.keystr(path, simple=True, separator="/") or "the argument itself"
            raise TypeError(
                f"argnums={argnums!r}: {where} has dtype {dtype}, but only floats have gradients. "
                "Keep counters, keys and functions out of the parameters (for an Equinox model: "
                "eqx.partition(model, eqx.is_inexact_array)), or name another argument."
            )
