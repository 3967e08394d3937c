"""Follows weights through a traced program to the products that read them.

A product that a weight reaches only through changes of layout and dtype is replaced by one that
computes the kept part of its weight gradient (`products.multiply`). All other operations stay as
they are, and JAX computes what they contribute to the gradient of a weight.

If everything but one layer is frozen, the gradient of an activation is needed only if something
below it learns in this step. Such a program is *gated*: tracing finds the leaves that each value
depends on, and conditionals leave out the gradients that no leaf needs.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from cdb_jax._skipping import jaxprs, products
from cdb_jax._skipping.reasons import Obstacle, Reason
from cdb_jax.selection import Mode


class Weight(NamedTuple):
    """A value that is a leaf of the parameters with its axes rearranged.

    `channel` and `stack` are the axes of the value that hold the leaf's channels, major first, and
    its stacked layers.
    """

    leaf: int
    channel: tuple[int, ...]
    stack: tuple[int, ...]


class Loop:
    """What a loop depends on from outside. Instances are compared by identity."""


ALWAYS = Loop()  # Something that learns in every step.
Needs = frozenset[int | Loop]  # The leaves and loops that a value depends on.
NOTHING: Needs = frozenset()


class Fact(NamedTuple):
    """What is known about a value when a program is traced."""

    weight: Weight | None = None
    needs: Needs = NOTHING


class Uses(NamedTuple):
    """What a program does with a leaf: the number of its products, and what else reads it."""

    products: int
    others: tuple[Obstacle, ...]


class Value(NamedTuple):
    """A value at run time; a weight whose gradient is skipped comes with a change."""

    array: Any
    change: products.Change | None = None


class Flags(NamedTuple):
    """Which leaves learn in this step, at run time.

    Attributes:
      learns: whether each leaf learns: bool, shape `(leaves,)`.
      inner: in a loop, the flags that replace those of sliced leaves, and the flag of the loop.
    """

    learns: jax.Array
    inner: dict[int | Loop, jax.Array]

    def any(self, needs: Needs) -> jax.Array | bool:
        """Whether anything in `needs` learns: a Python bool if this is known at trace time."""
        if ALWAYS in needs or not needs:
            return bool(needs)
        flags = [self.inner[x] for x in needs if x in self.inner]
        outer = [x for x in needs if isinstance(x, int) and x not in self.inner]
        if outer:
            # Compared with a constant, so that XLA compiles all of these reductions once.
            flags.append(jnp.any(self.learns & np.isin(np.arange(self.learns.size), outer)))
        return functools.reduce(jnp.logical_or, flags)


Step = Callable[[Sequence[Value], Flags], list[Value]]


class Piece(NamedTuple):
    """Equations that are evaluated together: one that is replaced, or a run of others."""

    step: Step
    inputs: Sequence[jaxprs.Atom]
    outputs: Sequence[core.Var]


class Program(NamedTuple):
    """A traced program with some of its equations replaced."""

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    pieces: Sequence[Piece]
    is_changed: bool


class _Context(NamedTuple):
    targets: Sequence[products.Target]
    is_gated: bool
    products: list[int]  # Leaves, once for each product.
    others: list[tuple[int, Obstacle]]

    def used_otherwise(self, facts: Sequence[Fact], reason: Reason, detail: object = "") -> None:
        obstacle = Obstacle(reason, detail)
        self.others.extend((fact.weight.leaf, obstacle) for fact in facts if fact.weight)


def follow(
    program: Any, facts: Sequence[Fact], targets: Sequence[products.Target], is_gated: bool
) -> tuple[Program, dict[int, Uses]]:
    """Finds the products of weights in a program.

    Args:
      program: the program, as `jax.make_jaxpr` returns it.
      facts: for each of its inputs, whether it is a weight to follow, and what it depends on.
      targets: for each leaf, what may happen to it.
      is_gated: whether to leave out gradients that only frozen layers need.

    Returns:
      The program with its products replaced, and the uses of each leaf that was followed.
    """
    context = _Context(targets, is_gated, [], [])
    followed, _ = _follow(program, facts, context)
    uses = {}
    for leaf in (fact.weight.leaf for fact in facts if fact.weight):
        others = dict.fromkeys(obstacle for other, obstacle in context.others if other == leaf)
        uses[leaf] = Uses(context.products.count(leaf), tuple(others))
    return followed, uses


def evaluate(program: Program, operands: Sequence[Value], flags: Flags) -> list[Value]:
    """Evaluates a program."""
    values: dict[core.Var, Value] = {
        v: Value(x) for v, x in zip(program.jaxpr.constvars, program.consts, strict=True)
    }
    values.update(zip(program.jaxpr.invars, operands, strict=True))

    def read(v: jaxprs.Atom) -> Value:
        return Value(v.val) if isinstance(v, core.Literal) else values[v]

    for piece in program.pieces:
        results = piece.step([read(v) for v in piece.inputs], flags)
        values.update(zip(piece.outputs, results, strict=True))
    return [read(v) for v in program.jaxpr.outvars]


# Finding.


def _follow(program: Any, inputs: Sequence[Fact], context: _Context) -> tuple[Program, list[Fact]]:
    """Returns the program with its products replaced, and what is known about its results."""
    jaxpr, consts = jaxprs.opened(program)
    facts: dict[core.Var, Fact] = dict(zip(jaxpr.invars, inputs, strict=True))

    def known(v: jaxprs.Atom) -> Fact:
        return Fact() if isinstance(v, core.Literal) else facts.get(v, Fact())

    steps: dict[int, Step] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        given = [known(v) for v in eqn.invars]
        step, results = _understood(eqn, jaxpr, given, context)
        if step:
            steps[i] = _in_scopes_of(eqn, step)
        results = results or [Fact(None, _union(given))] * len(eqn.outvars)
        facts.update(zip(eqn.outvars, results, strict=True))
    pieces = _pieces(jaxpr, steps)
    return Program(jaxpr, consts, pieces, bool(steps)), [known(v) for v in jaxpr.outvars]


def _union(facts: Sequence[Fact]) -> Needs:
    needs = NOTHING.union(*(fact.needs for fact in facts))
    return frozenset([ALWAYS]) if ALWAYS in needs else needs


def _pieces(jaxpr: core.Jaxpr, steps: Mapping[int, Step]) -> list[Piece]:
    """Joins the equations between those that are replaced into runs."""
    reads = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if jaxprs.is_variable(v))
    reads.update(v for v in jaxpr.outvars if jaxprs.is_variable(v))
    pieces = []
    indexed = enumerate(jaxpr.eqns)
    for index, run in itertools.groupby(indexed, lambda pair: pair[0] if pair[0] in steps else -1):
        eqns = [eqn for _, eqn in run]
        if index in steps:
            pieces.append(Piece(steps[index], eqns[0].invars, eqns[0].outvars))
            continue
        made = [v for eqn in eqns for v in eqn.outvars]
        inside = Counter(v for eqn in eqns for v in eqn.invars if jaxprs.is_variable(v))
        inputs = [v for v in inside if v not in set(made)]
        outputs = [v for v in made if reads[v] > inside[v]]
        function = jaxprs.as_function(eqns, inputs, outputs, jaxpr)
        pieces.append(Piece(functools.partial(_run, function), inputs, outputs))
    return pieces


def _run(
    function: Callable[..., list[Any]], operands: Sequence[Value], flags: Flags
) -> list[Value]:
    return [Value(x) for x in function(*(x.array for x in operands))]


def _in_scopes_of(eqn: core.JaxprEqn, step: Step) -> Step:
    def scoped(operands: Sequence[Value], flags: Flags) -> list[Value]:
        with jaxprs.scopes_of(eqn):
            return step(operands, flags)

    return scoped


# What a rule raises for an equation of a form that it does not know.
FORM_ERRORS: tuple[type[Exception], ...] = (
    *(AttributeError, IndexError, KeyError, TypeError, ValueError),
)

# What replaces an equation, and what is known about its results, if that is more than their needs.
Found = tuple[Step | None, list[Fact] | None]


def _understood(
    eqn: core.JaxprEqn, program: core.Jaxpr, facts: list[Fact], context: _Context
) -> Found:
    """What replaces an equation, or nothing if JAX represents it in a form that is unknown here.

    Leaving an equation as it is always gives the right gradient.
    """
    num_products, num_others = len(context.products), len(context.others)
    try:
        return _replaced(eqn, program, facts, context)
    except FORM_ERRORS:
        del context.products[num_products:], context.others[num_others:]
        context.used_otherwise(facts, Reason.UNKNOWN_FORM, eqn.primitive.name)
        return None, None


def _replaced(
    eqn: core.JaxprEqn, program: core.Jaxpr, facts: list[Fact], context: _Context
) -> Found:
    primitive, name = eqn.primitive, eqn.primitive.name
    if primitive in _CALLS:
        return _CALLS[primitive](eqn, facts, context)
    if primitive in _PRODUCTS:
        return _product(eqn, facts, context), None
    if not any(fact.weight for fact in facts):
        return None, None
    rule = _LAYOUT.get(primitive) or _LAYOUT_BY_NAME.get(name)
    if rule and len(facts) == 1 and facts[0].weight:
        moved = rule(eqn, facts[0].weight, context.targets[facts[0].weight.leaf])
        if moved:
            weight, change_z = moved
            step = functools.partial(_move, eqn, program, change_z)
            return step, [Fact(weight, facts[0].needs)]
    reason = Reason.INSIDE if jaxprs.programs_in(eqn.params) else Reason.READ_BY
    context.used_otherwise(facts, reason, name)
    return None, None


def _shape(v: jaxprs.Atom) -> tuple[int, ...]:
    return v.aval.shape  # type: ignore[attr-defined]


# Products.

_PRODUCTS = (primitives.dot_general_p, primitives.conv_general_dilated_p)


def _product(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Step | None:
    op = products.Operation.of_equation(eqn)
    shapes = [_shape(v) for v in eqn.invars]
    needs = (facts[0].needs, facts[1].needs) if context.is_gated else None
    for side in (1, 0):
        weight = facts[side].weight
        if weight is None:
            continue
        layer = weight.channel, weight.stack, context.targets[weight.leaf]
        if eqn.primitive is primitives.dot_general_p:
            found = products.dot_product(op, side, (len(shapes[0]), len(shapes[1])), *layer)
        else:
            found = products.convolution(op, side, shapes[side], *layer)
        if isinstance(found, Obstacle):
            context.others.append((weight.leaf, found))
            continue
        context.products.append(weight.leaf)
        context.used_otherwise([facts[1 - side]], Reason.TWO_WEIGHTS)
        return functools.partial(_multiply, found, needs and needs[1 - side])
    return functools.partial(_gate, op, needs) if needs else None


def _multiply(
    product: products.Product, needs: Needs | None, operands: Sequence[Value], flags: Flags
) -> list[Value]:
    x, w = operands[1 - product.side], operands[product.side]
    assert w.change is not None
    needed = True if needs is None else flags.any(needs)
    return [Value(products.multiply(product, x.array, w.array, w.change, needed))]


def _gate(
    op: products.Operation, needs: tuple[Needs, Needs], operands: Sequence[Value], flags: Flags
) -> list[Value]:
    lhs, rhs = operands
    needed = flags.any(needs[0]), flags.any(needs[1])
    return [Value(products.gate(op, lhs.array, rhs.array, needed))]


# Layout: operations that rearrange the entries of a weight or change their dtype. Each rule returns
# the moved weight and what happens to `Change.z`, or None if the weight cannot be followed.

Moved = tuple[Weight, Callable[[jax.Array], jax.Array]] | None


def _move(
    eqn: core.JaxprEqn,
    program: core.Jaxpr,
    change_z: Callable[[jax.Array], jax.Array],
    operands: Sequence[Value],
    flags: Flags,
) -> list[Value]:
    (w,) = operands
    (array,) = jaxprs.apply(eqn, program, [w.array])
    # A weight that reaches no product comes without a change.
    change = w.change and w.change._replace(z=change_z(w.change.z))
    return [Value(array, change)]


def _same(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    return weight, lambda z: z


def _constrained(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    """The gradient is sharded like the weight, unless its channel axes are sharded."""
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return weight, lambda z: z
    spec = (*sharding.spec, *[None] * (len(_shape(eqn.invars[0])) - len(sharding.spec)))
    if any(spec[axis] is not None for axis in weight.channel):
        return weight, lambda z: z
    return weight, lambda z: lax.with_sharding_constraint(z, sharding)


def _varied(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    """In a `shard_map`, the gradient of a value replicated over an axis is summed over the axis."""
    return weight, lambda z: lax.pcast(z, eqn.params["axes"], to="varying")


def _converted(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return weight, lambda z: lax.convert_element_type(z, dtype)


def _transposed(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    order = eqn.params["permutation"]
    channel = tuple(order.index(axis) for axis in weight.channel)
    stack = tuple(order.index(axis) for axis in weight.stack)
    return Weight(weight.leaf, channel, stack), lambda z: jnp.transpose(z, order)


def _reversed(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    axes = eqn.params["dimensions"]
    if set(axes) & {*weight.channel, *weight.stack}:
        return None
    return weight, lambda z: lax.rev(z, axes)


def _broadcast(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    new_axes = eqn.params["broadcast_dimensions"]
    old_shape, new_shape = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if any(
        old_shape[axis] != new_shape[new_axes[axis]] for axis in (*weight.channel, *weight.stack)
    ):
        return None
    channel = tuple(new_axes[axis] for axis in weight.channel)
    stack = tuple(new_axes[axis] for axis in weight.stack)
    shape = target.shape(new_shape, channel)
    moved = Weight(weight.leaf, channel, stack)
    return moved, lambda z: lax.broadcast_in_dim(z, shape, new_axes)


def _reshaped(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved:
    old_shape, new_shape = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if 0 in old_shape or eqn.params.get("dimensions") and eqn.primitive is primitives.reshape_p:
        return None
    by_first = {old[0]: (old, new) for old, new in _matched_axes(old_shape, new_shape)}
    stack = []
    for axis in weight.stack:
        old, new = by_first.get(axis, ([], []))
        if len(old) != 1 or len(new) != 1:
            return None
        stack += new
    channel, left = [], list(weight.channel)
    while left:
        # Channel axes may be split and joined among themselves, in order.
        old, new = by_first.get(left[0], ([], []))
        if not old or left[: len(old)] != old:
            return None
        channel += new
        left = left[len(old) :]
    shape = target.shape(new_shape, tuple(channel))
    return Weight(weight.leaf, tuple(channel), tuple(stack)), lambda z: z.reshape(shape)


def _matched_axes(
    old_shape: Sequence[int], new_shape: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest groups of axes whose sizes have the same product.

    Axes of size 1 belong to no group.
    """
    olds = [axis for axis, size in enumerate(old_shape) if size != 1]
    news = [axis for axis, size in enumerate(new_shape) if size != 1]
    matched = []
    while olds and news:
        old, new = [olds.pop(0)], [news.pop(0)]
        old_size, new_size = old_shape[old[0]], new_shape[new[0]]
        while old_size != new_size:
            if old_size < new_size:
                old.append(olds.pop(0))
                old_size *= old_shape[old[-1]]
            else:
                new.append(news.pop(0))
                new_size *= new_shape[new[-1]]
        matched.append((old, new))
    return matched


_LayoutRule = Callable[[core.JaxprEqn, Weight, products.Target], Moved]
_LAYOUT: dict[core.Primitive, _LayoutRule] = {
    primitives.copy_p: _same,
    primitives.name_p: _same,
    primitives.sharding_constraint_p: _constrained,
    primitives.convert_element_type_p: _converted,
    primitives.transpose_p: _transposed,
    primitives.rev_p: _reversed,
    primitives.broadcast_in_dim_p: _broadcast,
    primitives.reshape_p: _reshaped,
    primitives.squeeze_p: _reshaped,
}
# `jax.extend` does not export these.
_LAYOUT_BY_NAME: dict[str, _LayoutRule] = {"optimization_barrier": _same, "pvary": _varied}


# Calls: equations that contain programs.


def _jit(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    if _has_shardings(eqn):
        context.used_otherwise(facts, Reason.SHARDED_JIT)
        return None, None
    program, results = _follow(eqn.params["jaxpr"], facts, context)
    # The operations of a nested jit join those around it.
    is_changed = program.is_changed or any(fact.weight for fact in results)
    return functools.partial(evaluate, program) if is_changed else None, results


def _has_shardings(eqn: core.JaxprEqn) -> bool:
    shardings = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    return not all(type(x).__name__ == "UnspecifiedValue" for x in shardings)


def _checkpoint(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    program, results = _follow(eqn.params["jaxpr"], facts, context)
    context.used_otherwise(results, Reason.RESULT, "jax.checkpoint")
    settings = {name: eqn.params[name] for name in ("prevent_cse", "policy")}

    def step(operands: Sequence[Value], flags: Flags) -> list[Value]:
        function = jax.checkpoint(_on_arrays(program, flags), **settings)
        return [Value(x) for x in function(*_arrays_and_changes(operands))]

    return step if program.is_changed else None, None


def _cond(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    followed = [_follow(branch, facts[1:], context) for branch in eqn.params["branches"]]
    for _, results in followed:
        context.used_otherwise(results, Reason.RESULT, "a conditional")

    def step(operands: Sequence[Value], flags: Flags) -> list[Value]:
        index, *rest = operands
        branches = [_on_arrays(program, flags) for program, _ in followed]
        results = lax.switch(index.array, branches, *_arrays_and_changes(rest))
        return [Value(x) for x in results]

    is_changed = any(program.is_changed for program, _ in followed)
    return step if is_changed else None, None


def _arrays_and_changes(values: Sequence[Value]) -> tuple[list[Any], list[products.Change | None]]:
    return [x.array for x in values], [x.change for x in values]


def _on_arrays(program: Program, flags: Flags) -> Callable[..., list[Any]]:
    """A program as a function of arrays and changes."""

    def function(arrays: Sequence[Any], changes: Sequence[products.Change | None]) -> list[Any]:
        values = [Value(*pair) for pair in zip(arrays, changes, strict=True)]
        return [x.array for x in evaluate(program, values, flags)]

    return function


# Loops.


class _Scan(NamedTuple):
    """A scan whose body has products of weights."""

    body: Program
    num_consts: int
    num_carry: int
    facts: Sequence[Fact]  # Of its operands.
    sliced: Sequence[Weight | None]  # The weights that it slices, as one iteration sees them.
    settings: Mapping[str, Any]
    loop: Loop | None  # None without gates.


def _scan(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    num_consts, num_carry = jaxprs.scan_arity(eqn.params)
    first = num_consts + num_carry
    consts, carried, scanned = facts[:num_consts], facts[num_consts:first], facts[first:]
    context.used_otherwise(carried, Reason.CARRIED)
    sliced = [fact.weight and _slice(fact, context) for fact in scanned]
    loop = Loop() if context.is_gated else None
    inner_needs = frozenset([loop]) if loop else NOTHING
    inputs = [
        *consts,
        *(Fact(None, inner_needs) for _ in carried),
        *(Fact(weight, fact.needs) for weight, fact in zip(sliced, scanned, strict=True)),
    ]
    body, results = _follow(eqn.params["jaxpr"], inputs, context)
    context.used_otherwise(results, Reason.RESULT, "a loop")
    settings = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    scan = _Scan(body, num_consts, num_carry, facts, sliced, settings, loop)
    step = functools.partial(_run_scan, scan) if body.is_changed else None
    return step, None


def _run_scan(scan: _Scan, operands: Sequence[Value], flags: Flags) -> list[Value]:
    first = scan.num_consts + scan.num_carry
    consts, carried = operands[: scan.num_consts], operands[scan.num_consts : first]
    scanned = operands[first:]
    changes = [
        _per_iteration(x.change, fact.weight, scan.settings["length"]) if weight else None
        for x, fact, weight in zip(scanned, scan.facts[first:], scan.sliced, strict=True)
    ]

    def body(carry: Any, slices: Any) -> tuple[Any, Any]:
        (arrays, needed_below), (xs, changes) = carry, slices
        learning: dict[int | Loop, jax.Array] = {
            weight.leaf: jnp.any(change.mode != Mode.FROZEN)
            for weight, change in zip(scan.sliced, changes, strict=True)
            if weight and change
        }
        inner = flags
        if scan.loop:
            inner = flags._replace(inner={**flags.inner, **learning, scan.loop: needed_below})
            needed_below = functools.reduce(jnp.logical_or, learning.values(), needed_below)
        inputs = [*consts, *map(Value, arrays), *map(Value, xs, changes)]
        results = [x.array for x in evaluate(scan.body, inputs, inner)]
        return (results[: len(arrays)], needed_below), results[len(arrays) :]

    # What constants and carries depend on, and slices without separate flags.
    outside = [*scan.facts[:first]]
    outside += [
        fact for fact, change in zip(scan.facts[first:], changes, strict=True) if change is None
    ]
    needed_below = jnp.asarray(flags.any(_union(outside)) if scan.loop else False)
    carry, xs = ([x.array for x in carried], needed_below), ([x.array for x in scanned], changes)
    (arrays, _), ys = lax.scan(body, carry, xs, **scan.settings)
    return [Value(x) for x in (*arrays, *ys)]


def _slice(fact: Fact, context: _Context) -> Weight | None:
    """A weight as one iteration of a loop over its first axis sees it."""
    weight = fact.weight
    assert weight is not None
    if 0 in weight.channel:
        context.used_otherwise([fact], Reason.LOOP_OVER_CHANNELS)
        return None
    return weight._replace(
        channel=tuple(axis - 1 for axis in weight.channel),
        stack=tuple(axis - 1 for axis in weight.stack if axis),
    )


def _per_iteration(change: products.Change | None, weight: Weight | None, length: int) -> Any:
    """A change in the form that a scan slices."""
    if change is None or weight is None:
        return None

    def per_iteration(x: jax.Array) -> jax.Array:
        if 0 in weight.stack:
            return jnp.moveaxis(x, weight.stack.index(0), 0)
        return jnp.broadcast_to(x, (length, *x.shape))

    place, mode = per_iteration(change.place), per_iteration(change.mode)
    return products.Change(change.z, place, mode)


_CallRule = Callable[[core.JaxprEqn, list[Fact], _Context], Found]
_CALLS: dict[core.Primitive, _CallRule] = {
    primitives.jit_p: _jit,
    primitives.remat_p: _checkpoint,
    primitives.cond_p: _cond,
    primitives.scan_p: _scan,
}
