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
      argnums: the position of the model to differentiate, or of a tree of models, or an
        `nnx.DiffState` with a filter of its variables in place of `nnx.Param`, or several.
      has_aux: whether `f` returns a pair.
      **settings: the arguments of `Policy` by name, if `policy` is a rate.

    Returns:
      A function of the arguments of `f` and of `count`, by name: the step whose selection to draw.
      It returns the value (with the auxiliary data) and the gradient, an `nnx.State`, or a tree
      with one in place of each model.

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
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_model)
        models = {i: x for i, x in enumerate(leaves) if _is_model(x)}
        numbered, _ = jax.tree.unflatten(treedef, range(len(leaves)))
        for state in wanted:
            _check_models(state.argnum, args)
        filters = [nnx.All(x.filter, _within(jax.tree.leaves(numbered[x.argnum]))) for x in wanted]
        graph, *split, rest = nnx.split(models, *filters, ...)  # type: ignore[misc]
        for state, found in zip(wanted, split, strict=True):
            if not found:
                raise ValueError(
                    f"argnums={state.argnum}: the model has no variables of {state.filter}."
                )
        params = tuple(
            jax.tree.map(lambda i, found=found: found.get(i, nnx.State({})), numbered[x.argnum])
            for x, found in zip(wanted, split, strict=True)
        )

        def loss(params: Any) -> tuple[Any, Any]:
            states = []
            for x, given in zip(wanted, (params,) if single else params, strict=True):
                found = jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, nnx.State))
                numbers = jax.tree.leaves(numbered[x.argnum])
                both = zip(numbers, found, strict=True)
                states.append(nnx.State({i: state for i, state in both if state}))
            inner: Any = nnx.merge(graph, *states, rest, copy=True)  # type: ignore[arg-type]
            given = [inner.get(i, x) for i, x in enumerate(leaves)]
            inner_args, inner_kwargs = jax.tree.unflatten(treedef, given)
            result = f(*inner_args, **inner_kwargs)
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


def _check_models(argnum: int, args: tuple[Any, ...]) -> None:
    found = args[argnum : argnum + 1] if argnum >= 0 else ()
    leaves = jax.tree.leaves(found, is_leaf=_is_model)
    if not leaves or not all(_is_model(x) for x in leaves):
        raise ValueError(
            f"argnums={argnum} names no NNX model, nor a tree of nothing but models; give the "
            "model by position, or use cdb_jax.value_and_grad for a tree of arrays."
        )


def _within(models: Sequence[int]) -> Callable[[Any, Any], bool]:
    return lambda path, _: path[0] in models
