"""`value_and_grad` and `grad` that do not compute what a policy throws away."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from cdb_jax import channels, compiling, following, jaxprs, parts, products, selection
from cdb_jax.policy import Policy, Rate, second_argument


def value_and_grad(
    fun: Callable[..., Any],
    policy: Policy | Rate | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **settings: Any,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` that computes only the part of the gradient that is kept.

    Equal, up to the order of float additions, to the gradient of `fun` masked by
    `channel_drop_back` for the same policy and count; so it takes the place of
    `jax.value_and_grad` *and* of `channel_drop_back`. The loss and the model stay as they are.

    Where a weight :math:`w` reaches a product :math:`y = x \cdot w` through operations on layout
    and dtype only, the weight gradient is computed for its kept channels K alone: with
    :math:`\bar y` the cotangent of y,

    .. math:: \bar w_{\cdot K} = x^\top \bar y_{\cdot K} \quad\text{(output channels)},
       \qquad \bar w_{K \cdot} = x_{\cdot K}^\top \bar y \quad\text{(input channels)}.

    Of a step's work on products with weights about a third is their weight gradients, and of these
    a share `rate` is not done. Where a layer is masked in every step that share is not sent
    between devices either, and for input channels only the kept part of x is stored, unless
    something else needs x. With `layer_rate`, or "one" layer a step, a conditional at run time
    leaves out the weight gradient of layers that stand still; with `other_layers="still"`, also
    the products of the backward pass that only feed such layers. (Under `vmap` over models a
    conditional computes both sides.) A weight that is read in any other way gets its full
    gradient, masked; `channel_report` tells which.

    Args:
      fun: a function of arrays that returns a float scalar, or a pair of it and auxiliary data.
      policy: a `Policy`, or its `rate`, followed by its other arguments by name. `rate` must be a
        Python number, so that the number of kept channels is static, and `channel_choice` "exact"
        or "window" unless `rate` is 0 or 1. `layer_rate` may be anything.
      argnums: the position of the argument to differentiate, or several positions. With several
        the gradient is a tuple and the policy's paths start with the rank in it, as in
        "0/dense/kernel"; so other channels are drawn than for the argument alone.
      has_aux: whether `fun` returns a pair.
      **settings: the arguments of `Policy` by name, if `policy` is a rate.

    Returns:
      A function of the arguments of `fun` and of `count`, by name: the step whose selection to
      draw, an int scalar, which `selection_count` finds in an optimizer state. It returns what
      `jax.value_and_grad` would: the value (with the auxiliary data) and the gradient, with zeros
      for what is dropped. Call it under `jit`.

    Raises:
      TypeError, ValueError: for a bad policy, a `fun` with an argument called `count`; when called,
        for a result that is no float scalar, parameters that are not floats, a missing `count`.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
      >>> params, x = {"kernel": jnp.zeros((2, 4))}, jnp.ones((3, 2))
      >>> step = jax.jit(cdb_jax.value_and_grad(loss, policy))
      >>> value, gradient = step(params, x, count=0)
      >>> gradient["kernel"]
      Array([[3., 0., 0., 3.],
             [3., 0., 0., 3.]], dtype=float32)

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_; LayerDropBack,
      `arXiv 2412.18027 <https://arxiv.org/abs/2412.18027>`_.
    """
    check_function(fun)
    policy = second_argument(policy, settings)
    check_policy(policy)

    def value_and_gradient(*args: Any, count: Any = None, **kwargs: Any) -> Any:
        if count is None:
            raise TypeError(
                "count is missing: give the step whose channels to draw by name, such as "
                "count=step or count=cdb_jax.selection_count(opt_state)."
            )
        selection.check_count(count)
        params, call = _differentiated(fun, args, kwargs, argnums)
        traced, consts, unflatten_aux = trace(call, params, policy, has_aux)
        leaves, treedef = jax.tree.flatten(params)
        operands = policy, leaves, consts, count
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
            value, aux, gradient = _evaluate(traced, *operands)
        else:  # Outside of `jit`. An int as count would be a part of the program.
            operands = policy, leaves, consts, jnp.asarray(count)
            program = compiling.Keyed(traced.key(consts, leaves), traced)
            value, aux, gradient = _evaluate_once(program, *operands)
        gradient = jax.tree.unflatten(treedef, gradient)
        return ((value, unflatten_aux(aux)) if has_aux else value), gradient

    return value_and_gradient


def grad(
    fun: Callable[..., Any],
    policy: Policy | Rate | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **settings: Any,
) -> Callable[..., Any]:
    """`jax.grad` that computes only the part of the gradient that is kept.

    Like `value_and_grad`, but the function it returns gives the gradient alone, or with `has_aux`
    a pair of the gradient and the auxiliary data.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
      >>> gradient = cdb_jax.grad(loss, 0.5, key=0, channel_choice="window")
      >>> gradient({"kernel": jnp.zeros((1, 4))}, jnp.ones((3, 1)), count=1)
      {'kernel': Array([[3., 3., 0., 0.]], dtype=float32)}
    """
    return without_value(value_and_grad(fun, policy, argnums, has_aux, **settings), has_aux)


def without_value(value_and_gradient: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The function that `grad` returns, from the one that `value_and_grad` returns."""

    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, result = value_and_gradient(*args, **kwargs)
        return (result, value[1]) if has_aux else result

    return gradient


# Policies: what may happen to a layer must be known when the program is built.


def check_policy(policy: Policy) -> None:
    """Raises an error for a policy under which no work can be saved."""
    rate = policy.rate
    if not isinstance(rate, float):
        kind = "a schedule" if callable(rate) else "an array"
        raise TypeError(
            f"rate must be a Python number to skip what is dropped, got {kind}: the number of kept "
            "channels decides the shapes of the program. Give a number, and vary layer_rate "
            "instead; or use jax.value_and_grad with channel_drop_back, which takes any rate."
        )
    if policy.channel_choice == "bernoulli" and 0.0 < rate < 1.0:
        raise ValueError(
            'channel_choice="bernoulli" keeps another number of channels in every step, and '
            "programs have fixed shapes, so no work could be skipped. Use "
            'channel_choice="exact" (all subsets of k channels equally likely) or "window" (a run '
            "of k, which is fastest), of a preset by dataclasses.replace(policy, "
            "channel_choice=...); or jax.value_and_grad with channel_drop_back."
        )


def target_of(policy: Policy, leaf: channels.Leaf) -> products.Target:
    """What may happen to a layer under a policy."""
    assert isinstance(policy.rate, float)
    groups = policy.window_groups or 1
    size = leaf.channels // groups
    kept = int(selection.kept_channels(policy.rate, size))
    masked = products.STILL if kept == 0 else products.FULL if kept == size else products.PARTLY
    # A schedule or an array may be anything between 0 and 1.
    layer_rate = policy.layer_rate if isinstance(policy.layer_rate, float) else 0.5
    states = {masked} if layer_rate > 0.0 else set()
    if layer_rate < 1.0:
        states.add(products.FULL)
    if policy.layer_choice == "one":
        states.add(products.STILL if policy.others_stand_still else products.FULL)
    part = None
    if products.PARTLY in states:
        part = parts.Part(groups, size, kept, policy.channel_choice == "window")
    return products.Target(tuple(sorted(states)), masked, part)


# Functions: what is differentiated, and the program that it runs.


def check_function(fun: Callable[..., Any]) -> None:
    if not callable(fun):
        raise TypeError(
            f"fun must be a function of the parameters that returns a loss, got {fun!r}; the "
            "policy is the second argument."
        )
    try:
        names = inspect.signature(fun).parameters
    except (TypeError, ValueError):
        return
    bound = fun.keywords if isinstance(fun, functools.partial) else {}
    if "count" in names and "count" not in bound:
        raise TypeError(
            f"fun {getattr(fun, '__name__', fun)!r} has an argument called count, and count= is "
            "the step whose channels to draw; rename the argument of fun, or wrap it: "
            "lambda params, batch, n: fun(params, batch, count=n)."
        )


def _differentiated(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, argnums: int | Sequence[int]
) -> tuple[Any, Callable[[Any], Any]]:
    """The arguments to differentiate as one tree, and `fun` as a function of that tree."""
    single = not isinstance(argnums, Sequence)
    try:
        several = argnums if isinstance(argnums, Sequence) else [argnums]
        numbers = [operator.index(number) for number in several]
    except TypeError:
        raise TypeError(f"argnums must be an int or several, got {argnums!r}.") from None
    for number in numbers:
        if not -len(args) <= number < len(args):
            raise ValueError(
                f"argnums={argnums!r} names argument {number}, and {len(args)} were given by "
                "position; give the parameters by position."
            )
    numbers = [number % len(args) for number in numbers]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"argnums={argnums!r} names an argument twice; name each once.")
    params = args[numbers[0]] if single else tuple(args[i] for i in numbers)

    def call(params: Any) -> Any:
        given = list(args)
        for i, value in zip(numbers, [params] if single else params, strict=True):
            given[i] = value
        return fun(*given, **kwargs)

    check_no_module(
        params, f"argnums={argnums!r} names", "value_and_grad, which keeps what fun changes in it"
    )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(
            f"argnums={argnums!r} names an argument without arrays; name the parameters."
        )
    for path, x in leaves:
        dtype = getattr(x, "dtype", jnp.result_type(x) if isinstance(x, (int, float)) else None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            where = jax.tree_util.keystr(path, simple=True, separator="/") or "the argument itself"
            raise TypeError(
                f"argnums={argnums!r}: {where} has dtype {dtype}, and only floats have a "
                "gradient; keep counters, keys and functions out of the parameters (of an Equinox "
                "model with eqx.partition(model, eqx.is_inexact_array)), or name another argument."
            )
    return params, call


def check_no_module(tree: Any, found: str, instead: str) -> None:
    """Raises an error if there is a model of Flax NNX, of which parameters are only a part."""
    nnx = sys.modules.get("flax.nnx")  # If there is a model of it, it is loaded.
    is_module = lambda x: nnx is not None and isinstance(x, nnx.Module)
    if any(is_module(x) for x in jax.tree.leaves(tree, is_leaf=is_module)):
        raise TypeError(
            f"{found} an nnx.Module, which holds batch statistics and keys beside its parameters; "
            f"use cdb_jax.nnx.{instead}."
        )


_ARRAYS = (jax.Array, np.ndarray, np.generic)


class Traced(NamedTuple):
    """A function of parameters as a program, whose first inputs are the constants of the function.

    `explicit` are the leaves of the parameters with explicit shardings.
    """

    jaxpr: core.Jaxpr
    layout: channels.Layout
    explicit: frozenset[int]

    def key(self, consts: Sequence[Any], leaves: Sequence[Any]) -> Hashable:
        """Shared only by functions with the same results and the same gradients."""
        gradient = jaxprs.differentiated(self.jaxpr, consts, leaves)
        programs = jaxprs.identity(self.jaxpr), jaxprs.identity(gradient)
        return programs, self.layout, self.explicit


class Followed(NamedTuple):
    """A program in which the products of weights are found."""

    program: following.Program
    layout: channels.Layout
    targets: dict[int, products.Target]  # Of the leaves that are layers.
    uses: dict[int, following.Uses]


def trace(
    call: Callable[[Any], Any], params: Any, policy: Policy, has_aux: bool
) -> tuple[Traced, Sequence[Any], Callable[[Sequence[Any]], Any]]:
    """Traces a function of parameters.

    Returns the program, the constants that it takes first, and a function that puts auxiliary data
    together from the arrays of it.
    """
    layout = policy.layout(params)
    selection.check_layers(policy, layout)
    unflatten_aux: Callable[[Sequence[Any]], Any] = lambda arrays: None

    def flat(params: Any) -> tuple[Any, list[Any]]:
        nonlocal unflatten_aux
        result = call(params)
        if not has_aux:
            return _check_value(result), []
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"has_aux=True: fun must return a pair (value, aux), got {type(result).__name__}."
            )
        value, aux = result
        leaves, treedef = jax.tree.flatten(aux)
        # Anything may be auxiliary data; only arrays can be results of a program.
        arrays = [i for i, x in enumerate(leaves) if isinstance(x, _ARRAYS)]
        others = {i: x for i, x in enumerate(leaves) if i not in arrays}

        def unflatten(results: Sequence[Any]) -> Any:
            filled = others | dict(zip(arrays, results, strict=True))
            return jax.tree.unflatten(treedef, [filled[i] for i in range(len(filled))])

        unflatten_aux = unflatten
        return _check_value(value), [leaves[i] for i in arrays]

    jaxpr, consts = jaxprs.opened(jax.make_jaxpr(flat)(params))
    jaxpr = jaxpr.replace(constvars=(), invars=[*jaxpr.constvars, *jaxpr.invars])
    explicit = (
        i for i, x in enumerate(jax.tree.leaves(params)) if any(jax.typeof(x).sharding.spec)
    )
    return Traced(jaxpr, layout, frozenset(explicit)), consts, unflatten_aux


def follow(traced: Traced, policy: Policy) -> Followed:
    """Follows parameters to the products that read them."""
    targets = {
        i: target_of(policy, leaf)
        for i, leaf in enumerate(traced.layout.leaves)
        if leaf.layer == leaf.path
    }
    followed = {
        i
        for i, target in targets.items()
        if target.states not in ((products.FULL,), (products.STILL,))
    }
    weights = [
        following.Weight(i, leaf.channel, leaf.stack) if i in followed - traced.explicit else None
        for i, leaf in enumerate(traced.layout.leaves)
    ]
    consts: list[following.Weight | None] = [None] * (len(traced.jaxpr.invars) - len(weights))
    program, uses = following.follow(
        traced.jaxpr, [*consts, *weights], targets, policy.others_stand_still
    )
    explicit = followed & traced.explicit
    uses |= {i: following.Uses(0, ("its sharding is explicit",)) for i in explicit}
    return Followed(program, traced.layout, targets, uses)


def follow_abstract(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, policy: Policy
) -> Followed:
    """`follow` for `fun(params, *args, **kwargs)`, whose arrays may be `jax.ShapeDtypeStruct`."""
    check_function(fun)
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}
    found = []

    def fill(arrays: dict[int, Any]) -> None:
        filled = [arrays.get(i, x) for i, x in enumerate(leaves)]
        params, args, kwargs = jax.tree.unflatten(treedef, filled)
        params, call = _differentiated(fun, (params, *args), kwargs, 0)
        first = lambda result: result[0] if isinstance(result, tuple) else result
        traced, *_ = trace(lambda params: first(call(params)), params, policy, has_aux=False)
        found.append(follow(traced, policy))

    jax.eval_shape(fill, arrays)
    return found[0]


def _check_value(value: Any) -> jax.Array:
    if isinstance(value, (float, *_ARRAYS)):
        x = jnp.asarray(value)
        if x.shape == () and jnp.issubdtype(x.dtype, jnp.floating):
            return x
        got = f"shape {x.shape} and dtype {x.dtype}"
    else:
        got = f"a {type(value).__name__}"
    raise TypeError(
        f"fun must return a float scalar, got {got}; take the mean of the losses, say, and set "
        "has_aux=True if fun returns a pair."
    )


# Evaluation.


@compiling.compiled
def _evaluate_once(traced: compiling.Keyed, *operands: Any) -> Any:
    return _evaluate(traced.value, *operands)


def _evaluate(
    program: Traced, policy: Policy, leaves: Sequence[Any], consts: Sequence[Any], count: Any
) -> tuple[jax.Array, list[Any], list[Any]]:
    """The value, the arrays among the auxiliary data, and the masked gradient."""
    traced = follow(program, policy)
    layers = traced.layout.leaves
    groups = selection.draw(policy, traced.layout, count)
    drawn = _drawn(traced, groups, count)
    needed = _needed(traced, policy, drawn)
    skipped = {i for i, uses in traced.uses.items() if uses.products}
    # A leaf that is only read by products needs no gradient beside theirs.
    direct = {
        i
        for i in range(len(leaves))
        if needed[i] and not (i in skipped and not traced.uses[i].others)
    }
    zs = {i: _zeros(leaves[i], layers[i], traced.targets[i]) for i in skipped}

    def fun(zs: dict[int, jax.Array], given: dict[int, Any]) -> tuple[jax.Array, list[Any]]:
        values = [
            following.Value(
                given.get(i, x),
                following.Change(zs[i], *drawn[i]) if i in skipped else None,
                needed[i],
            )
            for i, x in enumerate(leaves)
        ]
        values = [*map(following.Value, consts), *values]
        value, *aux = (x.array for x in following.evaluate(traced.program, values))
        return value, aux

    results, (of_z, of_leaf) = jax.value_and_grad(fun, argnums=(0, 1), has_aux=True)(
        zs, {i: leaves[i] for i in direct}
    )
    of_z = _put_back(traced, of_z, {i: drawn[i][0] for i in skipped}, count)
    gradient = []
    for i, x in enumerate(leaves):
        both = [of[i] for of in (of_z, of_leaf) if i in of]
        gradient.append(functools.reduce(jnp.add, both) if both else jnp.zeros_like(x))
    done = {layers[i].path for i in skipped - direct}
    masked = selection.mask(gradient, groups, policy, traced.layout, count, done)
    return *results, masked


def _put_back(
    traced: Followed, kept: dict[int, jax.Array], at: dict[int, jax.Array], count: Any
) -> dict[int, jax.Array]:
    """Gradients in the shapes of their weights, from gradients of the parts that are kept."""

    def put(parts_at: dict[int, tuple[jax.Array, jax.Array]]) -> dict[int, jax.Array]:
        full = {}
        for i, (x, place) in parts_at.items():
            target, leaf = traced.targets[i], traced.layout.leaves[i]
            assert target.part is not None
            full[i] = parts.put(x, leaf.shape, leaf.channel, leaf.stack, target.part, place)
        return full

    compact = {i: (x, at[i]) for i, x in kept.items() if traced.targets[i].compact}
    # Best done in the loops of the optimizer, where that costs no memory traffic. The CPU compiler
    # does it there several times for each entry, and slower than a loop of its own.
    return kept | selection.materialise(put, compact, count, cpu_only=True)


def _zeros(x: Any, leaf: channels.Leaf, target: products.Target) -> jax.Array:
    return jnp.zeros_like(x, shape=target.shape(leaf.shape, leaf.channel))


def _drawn(
    traced: Followed, groups: Sequence[selection.Group], count: Any
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """For each layer where its kept part lies, and what it does: arrays over its stack."""
    index = {leaf.path: i for i, leaf in enumerate(traced.layout.leaves)}

    def cut(arrays: Sequence[tuple[Any, ...]]) -> dict[int, tuple[jax.Array, jax.Array]]:
        drawn = {}
        for group, (factors, masked, start) in zip(groups, arrays, strict=True):
            for layer, rows in selection.rows_of(group):
                i = index[layer.path]
                if i not in traced.targets:
                    continue
                part, when_masked = traced.targets[i].part, traced.targets[i].masked
                whole = jnp.where(factors[rows, 0] == 0, products.STILL, products.FULL)
                state = jnp.where(masked[rows], when_masked, whole).astype(jnp.int32)
                at = _place(part, factors[rows], None if start is None else start[rows])
                stack = layer.stack_shape
                drawn[i] = at.reshape(stack + at.shape[1:]), state.reshape(stack)
        return drawn

    arrays = [(group.factors, group.masked, group.start) for group in groups]
    return selection.materialise(cut, arrays, count)


def _place(part: parts.Part | None, factors: jax.Array, start: jax.Array | None) -> jax.Array:
    """Where the kept parts of some rows lie, as `parts.take` wants it."""
    if part is None or start is not None:
        return jnp.zeros(len(factors), jnp.int32) if start is None else start
    channels = jnp.arange(part.size, dtype=jnp.int32)[None]
    return jnp.sort(jnp.where(factors != 0, channels, np.int32(part.size)), axis=1)[:, : part.kept]


def _needed(
    traced: Followed, policy: Policy, drawn: dict[int, tuple[jax.Array, jax.Array]]
) -> list[frozenset[following.Flag]]:
    """For each leaf whether it learns in this step."""
    index = {leaf.path: i for i, leaf in enumerate(traced.layout.leaves)}

    def flags(leaf: channels.Leaf) -> frozenset[following.Flag]:
        if leaf.layer is None:
            still = selection.stands_still(policy, leaf)
            return following.NEVER if still else following.ALWAYS
        i = index[leaf.layer]  # For a bias that follows, its kernel's.
        target = traced.targets[i]
        if target.states == (products.STILL,):
            return following.NEVER
        if not policy.others_stand_still or products.STILL not in target.states:
            return following.ALWAYS
        return frozenset([following.Flag(jnp.any(drawn[i][1] != products.STILL))])

    return [flags(leaf) for leaf in traced.layout.leaves]
