"""`value_and_grad` and `grad` for Flax NNX models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from cdb_jax import skipping
from cdb_jax.policy import Policy, Rate, as_policy

Argnum = int | nnx.DiffState


def value_and_grad(
    f: Callable[..., Any],
    policy: Policy | Rate,
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    **settings: Any,
) -> Callable[..., Any]:
    """`nnx.value_and_grad` that computes only the part of the gradient that is kept.

    What `f` changes in its models, such as batch statistics and random counts, stays changed, as
    with `nnx.value_and_grad`; the variables that it differentiates are left alone.

    Args:
      f: a function of models and arrays that returns a float scalar, or a pair with auxiliary data.
      policy: a `Policy`, or its `rate`, followed by its other arguments by name; see
        `cdb_jax.value_and_grad` for what it must fulfil.
      argnums: the position of the model to differentiate, or an `nnx.DiffState` with a filter of
        its variables in place of `nnx.Param`, or several.
      has_aux: whether `f` returns a pair.
      **settings: the arguments of `Policy` by name, if `policy` is a rate.

    Returns:
      A function of the arguments of `f` and of `count`, by name: the step whose selection to draw.
      It returns the value (with the auxiliary data) and the gradient, an `nnx.State`.

    Raises:
      TypeError, ValueError: as `cdb_jax.value_and_grad`, and if `f` gives a model new variables.

    Examples:
      >>> import cdb_jax.nnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.mean(model(x))
      >>> value, grads = cdb_jax.nnx.value_and_grad(loss, policy)(model, jnp.ones((3, 2)), count=0)
      >>> grads["kernel"][...]
      Array([[0.25, 0.  , 0.  , 0.25],
             [0.25, 0.  , 0.  , 0.25]], dtype=float32)
    """
    policy = as_policy(policy, settings)
    skipping.check_policy(policy)
    skipping.check_function(f)
    single = isinstance(argnums, (int, nnx.DiffState))
    several = [argnums] if isinstance(argnums, (int, nnx.DiffState)) else list(argnums)
    wanted = [nnx.DiffState(x, nnx.Param) if isinstance(x, int) else x for x in several]

    def value_and_gradient(*args: Any, count: Any = None, **kwargs: Any) -> Any:
        models = {i: x for i, x in enumerate(args) if isinstance(x, nnx.Pytree)}
        for state in wanted:
            if state.argnum not in models:
                raise ValueError(
                    f"argnums={state.argnum} names no NNX model; give the model by position, or "
                    "use cdb_jax.value_and_grad for a tree of arrays."
                )
        if any(isinstance(x, nnx.Pytree) for x in jax.tree.leaves(kwargs, is_leaf=_is_model)):
            raise ValueError("models must be given by position, and one was given by name.")
        filters = [nnx.All(x.filter, _within(x.argnum)) for x in wanted]
        graph, *split, rest = nnx.split(models, *filters, ...)  # type: ignore[misc]
        for state, found in zip(wanted, split, strict=True):
            if not found:
                raise ValueError(
                    f"argnums={state.argnum}: the model has no variables of {state.filter}."
                )
        params = tuple(x[state.argnum] for x, state in zip(split, wanted, strict=True))

        def loss(params: Any) -> tuple[Any, Any]:
            params = (params,) if single else params
            states = [nnx.State({state.argnum: x}) for x, state in zip(params, wanted, strict=True)]
            inner: Any = nnx.merge(graph, *states, rest, copy=True)  # type: ignore[arg-type]
            result = f(*(inner.get(i, x) for i, x in enumerate(args)), **kwargs)
            value, aux = result if has_aux else (result, None)
            changed, *_, new_rest = nnx.split(inner, *filters, ...)  # type: ignore[misc]
            if changed != graph:
                raise ValueError(
                    "f gives a model new variables or other parts, which a gradient cannot return; "
                    "call the model once before training, so that they are there."
                )
            return value, (aux, new_rest)

        transformed = skipping.value_and_grad(loss, policy, has_aux=True)
        (value, (aux, new_rest)), gradient = transformed(
            params[0] if single else params, count=count
        )
        nnx.update(models, new_rest)
        return ((value, aux) if has_aux else value), gradient

    return value_and_gradient


def grad(
    f: Callable[..., Any],
    policy: Policy | Rate,
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    **settings: Any,
) -> Callable[..., Any]:
    """Like `value_and_grad`, but returns the gradient alone, or with `has_aux` it and the data."""
    both = value_and_grad(f, policy, argnums, has_aux, **settings)
    return skipping.without_value(both, has_aux)


def _is_model(x: Any) -> bool:
    return isinstance(x, nnx.Pytree)


def _within(argnum: int) -> Callable[[Any, Any], bool]:
    return lambda path, _: path[0] == argnum
