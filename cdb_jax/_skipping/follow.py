"""Follows weights through a traced program to the products that read them.

A weight may reach a product through operations on layout and dtype only. Such a product becomes one
that computes the kept part of its weight gradient (`products.multiply`); all other operations stay
what they are, and what they contribute to a weight's gradient is found by JAX as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from cdb_jax._skipping import jaxprs, products
from cdb_jax.selection import Mode


class Weight(NamedTuple):
    """A value that is a leaf of the parameters, rearranged: static.

    `channel` and `stack` are the axes of the value that hold the leaf's channels, major first, and
    its stacked layers.
    """

    leaf: int
    channel: tuple[int, ...]
    stack: tuple[int, ...]


class Uses(NamedTuple):
    """What a program does with a leaf: the number of its products, and what else reads it."""

    products: int
    others: tuple[str, ...]


class Change(NamedTuple):
    """What goes with a weight at run time: see `products.multiply`."""

    z: jax.Array
    at: jax.Array
    state: jax.Array


class Flag:
    """A boolean scalar at run time; two flags are the same if they are one object."""

    def __init__(self, value: jax.Array | bool):
        self.value = value


ALWAYS = frozenset([Flag(True)])
NEVER: frozenset[Flag] = frozenset()


class Value(NamedTuple):
    """A value of the program, and the flags of which one is set if its gradient is needed."""

    array: Any
    change: Change | None = None
    needed: frozenset[Flag] = NEVER


Step = Callable[[Sequence[Value]], list[Value]]


class Program(NamedTuple):
    """A traced program; `steps` replace the equations of the same position."""

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    steps: dict[int, Step]


class _Context(NamedTuple):
    targets: Sequence[products.Target]
    gated: bool
    products: list[int]  # Leaves, once for each product.
    others: list[tuple[int, str]]


def follow(
    traced: Any,
    weights: Sequence[Weight | None],
    targets: Sequence[products.Target],
    gated: bool,
) -> tuple[Program, dict[int, Uses]]:
    """Finds the products of weights in a program.

    Args:
      traced: the program, as `jax.make_jaxpr` returns it.
      weights: for each of its inputs the leaf that it is, or None for no weight to follow.
      targets: for each leaf that is followed what may happen to it.
      gated: whether gradients that only feed layers that stand still are to be left out.

    Returns:
      The program with its products replaced, and the uses of each leaf that was followed.
    """
    context = _Context(targets, gated, [], [])
    program, _ = _follow(traced, weights, context)
    leaves = [weight.leaf for weight in weights if weight is not None]
    uses = {
        leaf: Uses(
            context.products.count(leaf),
            tuple(dict.fromkeys(reason for other, reason in context.others if other == leaf)),
        )
        for leaf in leaves
    }
    return program, uses


def evaluate(program: Program, operands: Sequence[Value]) -> list[Value]:
    """Evaluates a program."""
    jaxpr = program.jaxpr
    values: dict[core.Var, Value] = {
        v: Value(x) for v, x in zip(jaxpr.constvars, program.consts, strict=True)
    }
    values.update(zip(jaxpr.invars, operands, strict=True))
    read = lambda v: Value(v.val) if isinstance(v, core.Literal) else values[v]
    for i, eqn in enumerate(jaxpr.eqns):
        given = [read(v) for v in eqn.invars]
        if i in program.steps:
            with jaxprs.as_in(eqn):
                results = program.steps[i](given)
        else:
            results = _anew(jaxprs.run(eqn, jaxpr, [x.array for x in given]), given)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def any_of(flags: frozenset[Flag]) -> jax.Array | bool:
    """Whether one of the flags is set: static where that is known."""
    if flags >= ALWAYS or not flags:
        return bool(flags)
    return functools.reduce(jnp.logical_or, [flag.value for flag in flags])


def _union(values: Sequence[Value]) -> frozenset[Flag]:
    flags = NEVER.union(*(x.needed for x in values))
    return ALWAYS if flags >= ALWAYS else flags


def _anew(arrays: Sequence[Any], made_from: Sequence[Value]) -> list[Value]:
    needed = _union(made_from)
    return [Value(x, None, needed) for x in arrays]


# Finding.


def _follow(
    program: Any, given: Sequence[Weight | None], context: _Context
) -> tuple[Program, list[Weight | None]]:
    """Returns the program, and the weights among its results."""
    jaxpr, consts = jaxprs.opened(program)
    weights: dict[core.Var, Weight] = {
        v: weight for v, weight in zip(jaxpr.invars, given, strict=True) if weight
    }
    read = lambda v: None if isinstance(v, core.Literal) else weights.get(v)
    steps: dict[int, Step] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        inputs = [read(v) for v in eqn.invars]
        step, results = _understood(eqn, jaxpr, inputs, context)
        if step:
            steps[i] = step
        weights.update((v, x) for v, x in zip(eqn.outvars, results, strict=True) if x)
    return Program(jaxpr, consts, steps), [read(v) for v in jaxpr.outvars]


def _understood(
    eqn: core.JaxprEqn, within: core.Jaxpr, weights: list[Weight | None], context: _Context
) -> tuple[Step | None, list[Weight | None]]:
    """`_step`, or nothing where JAX represents an equation in a way that is not known here.

    Then its operations stay what they are, which is right for all of them.
    """
    known = len(context.products), len(context.others)
    try:
        return _step(eqn, within, weights, context)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        del context.products[known[0] :], context.others[known[1] :]
        _used_otherwise(weights, f"not understood: {eqn.primitive.name}", context)
        return None, [None] * len(eqn.outvars)


def _step(
    eqn: core.JaxprEqn, within: core.Jaxpr, weights: list[Weight | None], context: _Context
) -> tuple[Step | None, list[Weight | None]]:
    """What replaces an equation, if anything, and which of its results are weights."""
    name = eqn.primitive.name
    none: list[Weight | None] = [None] * len(eqn.outvars)
    if name in _CALLS:
        step, results = _CALLS[name](eqn, weights, context)
        return step, results or none
    if not any(weights) and not (context.gated and name in _PRODUCTS):
        return None, none
    if name in _PRODUCTS:
        return _product(eqn, weights, context), none
    if name in _LAYOUT and len(eqn.invars) == 1 and weights[0]:
        target = context.targets[weights[0].leaf]
        moved = _LAYOUT[name](eqn, weights[0], target)
        if moved:
            weight, change_z = moved
            return functools.partial(_move, eqn, within, change_z), [weight]
    how = "not understood: inside of" if jaxprs.programs_in(eqn.params) else "read by"
    _used_otherwise(weights, f"{how} {name}", context)
    return None, none


def _shape(v: core.Var | core.Literal) -> tuple[int, ...]:
    return v.aval.shape  # type: ignore[attr-defined]


def _used_otherwise(weights: Sequence[Weight | None], why: str, context: _Context) -> None:
    context.others.extend((weight.leaf, why) for weight in weights if weight)


# Products.

_PRODUCTS = ("dot_general", "conv_general_dilated")


def _product(eqn: core.JaxprEqn, weights: list[Weight | None], context: _Context) -> Step | None:
    name, params, op = eqn.primitive.name, eqn.params, products.operation(eqn)
    shapes = [_shape(v) for v in eqn.invars]
    for side in (1, 0):
        weight = weights[side]
        if weight is None:
            continue
        target = context.targets[weight.leaf]
        if name == "dot_general":
            ranks = (len(shapes[0]), len(shapes[1]))
            found = products.dot_product(
                op, params, side, ranks, weight.channel, weight.stack, target
            )
        else:
            found = products.convolution(
                op, params, side, shapes[side], weight.channel, weight.stack, target
            )
        if isinstance(found, str):
            _used_otherwise([weight], found, context)
            continue
        context.products.append(weight.leaf)
        _used_otherwise([weights[1 - side]], "multiplied with another weight", context)
        return functools.partial(_multiply, found)
    return functools.partial(_gate, op) if context.gated else None


def _multiply(product: products.Product, operands: Sequence[Value]) -> list[Value]:
    x, w = operands[1 - product.side], operands[product.side]
    assert w.change is not None
    below = any_of(x.needed)
    y = products.multiply(product, x.array, w.array, *w.change, below)
    return [Value(y, None, _one_flag(x.needed, below) | w.needed)]


def _gate(op: products.BinaryOp, operands: Sequence[Value]) -> list[Value]:
    x, y = operands
    needed = any_of(x.needed), any_of(y.needed)
    product = products.gate(op, x.array, y.array, needed)
    return [Value(product, None, _one_flag(x.needed, needed[0]) | _one_flag(y.needed, needed[1]))]


def _one_flag(flags: frozenset[Flag], any_set: jax.Array | bool) -> frozenset[Flag]:
    """The same flags as one, so that their number does not grow with the depth of a model."""
    return flags if isinstance(any_set, bool) else frozenset([Flag(any_set)])


# Layout: operations that move the entries of a weight about, or change their dtype.

Moved = tuple[Weight, Callable[[jax.Array], jax.Array]] | None


def _move(
    eqn: core.JaxprEqn,
    within: core.Jaxpr,
    change_z: Callable[[jax.Array], jax.Array],
    operands: Sequence[Value],
) -> list[Value]:
    (w,) = operands
    (array,) = jaxprs.run(eqn, within, [w.array])
    # A weight that ends in no product comes without a change.
    change = w.change and w.change._replace(z=change_z(w.change.z))
    return [Value(array, change, w.needed)]


def _same(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    return weight, lambda z: z


def _constrained(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    """The gradient lies as the weight does, unless a part of its channels could not."""
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return weight, lambda z: z
    spec = (*sharding.spec, *[None] * (len(_shape(eqn.invars[0])) - len(sharding.spec)))
    if any(spec[axis] is not None for axis in weight.channel):
        return weight, lambda z: z
    return weight, lambda z: lax.with_sharding_constraint(z, sharding)


def _varied(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    """Replicated over a mesh axis of a `shard_map`; the gradient is summed over that axis."""
    return weight, lambda z: lax.pcast(z, eqn.params["axes"], to="varying")


def _converted(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return weight, lambda z: lax.convert_element_type(z, dtype)


def _transposed(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    order = eqn.params["permutation"]
    to = lambda axes: tuple(order.index(axis) for axis in axes)
    moved = weight._replace(channel=to(weight.channel), stack=to(weight.stack))
    return moved, lambda z: jnp.transpose(z, order)


def _reversed(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    axes = eqn.params["dimensions"]
    if set(axes) & {*weight.channel, *weight.stack}:
        return None
    return weight, lambda z: lax.rev(z, axes)


def _broadcast(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    place = eqn.params["broadcast_dimensions"]
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if any(before[axis] != after[place[axis]] for axis in (*weight.channel, *weight.stack)):
        return None
    to = lambda axes: tuple(place[axis] for axis in axes)
    moved = weight._replace(channel=to(weight.channel), stack=to(weight.stack))
    shape = target.shape(after, moved.channel)
    return moved, lambda z: lax.broadcast_in_dim(z, shape, place)


def _reshaped(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    is_reshape = eqn.primitive.name == "reshape"
    if 0 in before or (is_reshape and eqn.params["dimensions"] is not None):
        return None
    channel, stack = list(weight.channel), list(weight.stack)
    for old, new in _blocks(before, after):
        if len(old) == len(new) == 1:
            channel = [-1 - new[0] if axis == old[0] else axis for axis in channel]
            stack = [-1 - new[0] if axis == old[0] else axis for axis in stack]
        elif set(old) & set(stack):
            return None
        elif set(old) & set(channel):
            # Axes that are split or joined must be channels all of them, in their order.
            at = channel.index(old[0]) if old[0] in channel else len(channel)
            if channel[at : at + len(old)] != old:
                return None
            channel[at : at + len(old)] = [-1 - axis for axis in new]
    if any(axis >= 0 for axis in (*channel, *stack)):
        return None  # An axis of size 1 that is gone.
    moved = Weight(weight.leaf, tuple(-1 - x for x in channel), tuple(-1 - x for x in stack))
    shape = target.shape(after, moved.channel)
    return moved, lambda z: z.reshape(shape)


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest blocks of axes whose sizes multiply to the same.

    Axes of size 1 are in no block, as they hold nothing.
    """
    olds = [axis for axis, size in enumerate(before) if size != 1]
    news = [axis for axis, size in enumerate(after) if size != 1]
    blocks = []
    while olds and news:
        old, new = [olds.pop(0)], [news.pop(0)]
        m, n = before[old[0]], after[new[0]]
        while m != n:
            if m < n:
                old.append(olds.pop(0))
                m *= before[old[-1]]
            else:
                new.append(news.pop(0))
                n *= after[new[-1]]
        blocks.append((old, new))
    return blocks


_LAYOUT: dict[str, Callable[[core.JaxprEqn, Weight, products.Target], Moved]] = {
    "copy": _same,
    "name": _same,
    "optimization_barrier": _same,
    "sharding_constraint": _constrained,
    "pvary": _varied,
    "convert_element_type": _converted,
    "transpose": _transposed,
    "rev": _reversed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "squeeze": _reshaped,
}


# Calls: equations that hold programs of their own.

Called = tuple[Step | None, list[Weight | None] | None]


def _jit(eqn: core.JaxprEqn, weights: list[Weight | None], context: _Context) -> Called:
    unspecified = [type(x).__name__ == "UnspecifiedValue" for x in _shardings(eqn)]
    if not all(unspecified):
        _used_otherwise(weights, "inside a jit with shardings of its own", context)
        return None, None
    program, results = _follow(eqn.params["jaxpr"], weights, context)
    # Its operations join those around it.
    changed = program.steps or any(results)
    return functools.partial(evaluate, program) if changed else None, results


def _shardings(eqn: core.JaxprEqn) -> list[Any]:
    return [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]


def _checkpoint(eqn: core.JaxprEqn, weights: list[Weight | None], context: _Context) -> Called:
    program, results = _follow(eqn.params["jaxpr"], weights, context)
    _used_otherwise(results, "a result of jax.checkpoint", context)
    settings = {name: eqn.params[name] for name in ("prevent_cse", "policy")}

    def step(operands: Sequence[Value]) -> list[Value]:
        again = jax.checkpoint(_as_function(program, operands), **settings)
        return _anew(again(*_contents(operands)), operands)

    return step if program.steps else None, None


def _cond(eqn: core.JaxprEqn, weights: list[Weight | None], context: _Context) -> Called:
    followed = [_follow(branch, weights[1:], context) for branch in eqn.params["branches"]]
    for _, results in followed:
        _used_otherwise(results, "a result of a conditional", context)

    def step(operands: Sequence[Value]) -> list[Value]:
        index, *rest = operands
        branches = [_as_function(program, rest) for program, _ in followed]
        return _anew(lax.switch(index.array, branches, *_contents(rest)), operands)

    return step if any(program.steps for program, _ in followed) else None, None


def _contents(values: Sequence[Value]) -> tuple[list[Any], list[Change | None]]:
    """The arrays of values, as arguments of `_as_function`."""
    return [x.array for x in values], [x.change for x in values]


def _as_function(program: Program, like: Sequence[Value]) -> Callable[..., list[Any]]:
    """A program as a function of arrays, for operands that are needed where those of `like` are."""

    def f(arrays: Sequence[Any], changes: Sequence[Change | None]) -> list[Any]:
        inputs = [
            Value(array, change, x.needed)
            for array, change, x in zip(arrays, changes, like, strict=True)
        ]
        return [x.array for x in evaluate(program, inputs)]

    return f


def _scan(eqn: core.JaxprEqn, weights: list[Weight | None], context: _Context) -> Called:
    consts, carry = _arity(eqn.params)
    first_x = consts + carry
    _used_otherwise(weights[consts:first_x], "carried through a loop", context)
    sliced = [_slice(weight, context) for weight in weights[first_x:]]
    inner = [*weights[:consts], *[None] * (first_x - consts), *sliced]
    program, results = _follow(eqn.params["jaxpr"], inner, context)
    _used_otherwise(results, "a result of a loop", context)
    settings = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}

    def step(operands: Sequence[Value]) -> list[Value]:
        constants, carried, scanned = (
            operands[:consts],
            operands[consts:first_x],
            operands[first_x:],
        )
        length = eqn.params["length"]
        changes = [
            _per_iteration(x.change, weight, length) if own else None
            for x, weight, own in zip(scanned, weights[first_x:], sliced, strict=True)
        ]

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            arrays, below = carry
            flags = frozenset([Flag(below)]) if context.gated else _union(operands)
            inputs = [*constants, *(Value(x, None, flags) for x in arrays)]
            learns = []
            for x, array, change in zip(scanned, *xs, strict=True):
                needed = x.needed
                if context.gated and change is not None:
                    needed = frozenset([Flag(jnp.any(change.state != Mode.FROZEN))])
                learns.append(needed)
                inputs.append(Value(array, change, needed))
            outs = [x.array for x in evaluate(program, inputs)]
            if context.gated:
                below = jnp.logical_or(below, any_of(NEVER.union(*learns)))
            return (outs[: len(arrays)], below), outs[len(arrays) :]

        start = jnp.asarray(any_of(_union([*constants, *carried])))
        xs = ([x.array for x in scanned], changes)
        (arrays, below), ys = lax.scan(body, ([x.array for x in carried], start), xs, **settings)
        needed = frozenset([Flag(below)]) if context.gated else _union(operands)
        return [Value(x, None, needed) for x in (*arrays, *ys)]

    return step if program.steps else None, None


def _arity(params: Mapping[str, Any]) -> tuple[int, int]:
    """The number of constants and of carried values of a scan, which come before what it slices."""
    if "num_consts" in params:  # Before JAX 0.11.
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = map(len, params["ft_in"].unpack())
    return consts, carry


def _slice(weight: Weight | None, context: _Context) -> Weight | None:
    """A weight as one iteration of a loop over its first axis sees it."""
    if weight is None:
        return None
    if 0 in weight.channel:
        _used_otherwise([weight], "a loop runs over its channels", context)
        return None
    return weight._replace(
        channel=tuple(axis - 1 for axis in weight.channel),
        stack=tuple(axis - 1 for axis in weight.stack if axis),
    )


def _per_iteration(change: Change | None, weight: Weight | None, length: int) -> Change | None:
    """What each iteration of a loop has of a change."""
    if change is None or weight is None:
        return None
    z, *drawn = change
    if 0 in weight.stack:
        axis = weight.stack.index(0)
        return Change(z, *(jnp.moveaxis(x, axis, 0) for x in drawn))
    return Change(z, *(jnp.broadcast_to(x, (length, *x.shape)) for x in drawn))


_CALLS: dict[str, Callable[[core.JaxprEqn, list[Weight | None], _Context], Called]] = {
    "jit": _jit,
    "checkpoint": _checkpoint,  # The name of "remat2" in other releases.
    "remat2": _checkpoint,
    "cond": _cond,
    "scan": _scan,
}
