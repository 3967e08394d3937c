"""Follows weights through a traced program to the products that read them.

A product that a weight reaches through operations that keep its channels apart (`moves`) is
replaced by one that computes the kept part of its weight gradient (`products.multiply`). All other
operations stay as they are, and JAX computes what they contribute to the gradient of a weight.

If everything but the selected layers is frozen, the gradient of an activation is needed only if
something below it learns in this step. Such a program is *gated*: tracing finds the leaves that
each value depends on, and conditionals skip the gradients that no leaf needs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from cdb_jax import _explicit as explicit, _jaxprs as jaxprs
from cdb_jax._jaxprs import shape_of
from cdb_jax._skipping import moves, products
from cdb_jax._skipping.reasons import Obstacle, Reason
from cdb_jax.drop_backward import CALL_NAME, differentiated_if
from cdb_jax.selection import Mode


class Loop:
    """A value in a loop that changes with each iteration. Instances are compared by identity."""


ALWAYS = Loop()  # Something that learns in every step.
Needs = frozenset[int | Loop]  # The leaves and loops that a value depends on.
NOTHING: Needs = frozenset()


class Fact(NamedTuple):
    """What is known about a value when a program is traced."""

    weights: tuple[moves.Weight, ...] = ()
    needs: Needs = NOTHING


class Uses(NamedTuple):
    """What a program does with a leaf.

    Attributes:
      products: the number of products that read it.
      layout_only: whether it reaches all of them through changes of layout only.
      others: what else reads it.
      flops: the floating-point operations of its products, and of its gradient in full. A loop
        without a fixed number of iterations counts as one.
    """

    products: int
    layout_only: bool
    others: tuple[Obstacle, ...]
    flops: int = 0


class Value(NamedTuple):
    """A value at run time, with a change for each of its weights whose gradient is skipped."""

    array: Any
    changes: tuple[products.Change | None, ...] = ()


class Flags(NamedTuple):
    """Which leaves learn in this step, at run time.

    Attributes:
      learns: whether each leaf learns: bool, shape `(leaves,)`.
      loops: in a loop, whether what is carried depends on anything that learns, and whether each
        slice does.
    """

    learns: jax.Array
    loops: Mapping[Loop, jax.Array | bool]

    def any(self, needs: Needs) -> jax.Array | bool:
        """Whether anything in `needs` learns: a Python bool if this is known at trace time."""
        if ALWAYS in needs or not needs:
            return bool(needs)
        flags = [self.loops[x] for x in needs if isinstance(x, Loop)]
        leaves = [x for x in needs if isinstance(x, int)]
        if leaves:
            # Compared with a constant, so that XLA compiles all of these reductions once.
            flags.append(jnp.any(self.learns & np.isin(np.arange(self.learns.size), leaves)))
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


class _Used(NamedTuple):
    """A product that reads a weight, and the floating-point operations of the weight's part."""

    weight: moves.Weight
    flops: int


class _Context(NamedTuple):
    targets: Sequence[products.Target]
    is_gated: bool
    products: list[_Used]
    others: list[tuple[int, Obstacle]]
    is_gradient: bool = False  # Whether the program is a gradient, and needs none itself.
    repeats: int = 1  # How often the program runs.

    def used_otherwise(self, facts: Sequence[Fact], reason: Reason, detail: object = "") -> None:
        obstacle = Obstacle(reason, detail)
        self.others.extend((weight.leaf, obstacle) for fact in facts for weight in fact.weights)


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
    for leaf in (weight.leaf for fact in facts for weight in fact.weights):
        others = dict.fromkeys(obstacle for other, obstacle in context.others if other == leaf)
        found = [used for used in context.products if used.weight.leaf == leaf]
        layout_only = not any(used.weight.is_whole for used in found)
        flops = sum(used.flops for used in found)
        uses[leaf] = Uses(len(found), layout_only, tuple(others), flops)
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
        results = results or [Fact((), _union(given))] * len(eqn.outvars)
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
    pieces: list[Piece] = []
    run: list[core.JaxprEqn] = []
    for i, eqn in enumerate(jaxpr.eqns):
        if i not in steps:
            run.append(eqn)
            continue
        pieces += _joined(run, reads, jaxpr)
        pieces.append(Piece(steps[i], eqn.invars, eqn.outvars))
        run = []
    return pieces + _joined(run, reads, jaxpr)


def _joined(
    eqns: Sequence[core.JaxprEqn], reads: Mapping[core.Var, int], jaxpr: core.Jaxpr
) -> list[Piece]:
    """One piece for all equations of a run; none for an empty run."""
    if not eqns:
        return []
    made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
    inside = Counter(v for eqn in eqns for v in eqn.invars if jaxprs.is_variable(v))
    inputs = [v for v in inside if v not in made]
    outputs = [v for v in made if reads[v] > inside[v]]
    function = jaxprs.as_function(eqns, inputs, outputs, jaxpr)
    return [Piece(functools.partial(_run, function), inputs, outputs)]


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
FORM_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError)

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
    primitive = eqn.primitive
    if primitive in _CALLS:
        return _CALLS[primitive](eqn, facts, context)
    if primitive in jaxprs.PRODUCTS:
        return _product(eqn, facts, context), None
    if not any(fact.weights for fact in facts):
        return None, None
    weights, learns = [fact.weights for fact in facts], [bool(fact.needs) for fact in facts]
    if jaxprs.programs_in(eqn.params):
        move = _move_in_call(eqn, program, facts, context)
    else:
        move = moves.find(eqn, weights, learns, context.targets)
    if move is None:
        context.used_otherwise(facts, *_obstacle(eqn, facts))
        return None, None
    step = _MoveStep(move, eqn, program, weights, context.targets)
    return step.run, [Fact(weights, _union(facts)) for weights in move.weights]


def _obstacle(eqn: core.JaxprEqn, facts: Sequence[Fact]) -> Obstacle:
    if any(fact.needs and not fact.weights for fact in facts):
        return Obstacle(Reason.COMBINED, eqn.primitive.name)
    is_call = bool(jaxprs.programs_in(eqn.params))
    return Obstacle(Reason.INSIDE if is_call else Reason.READ_BY, eqn.primitive.name)


# Products.


def _product(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Step | None:
    op = products.Operation.of_equation(eqn)
    needs = (facts[0].needs, facts[1].needs) if context.is_gated else None
    for side in (1, 0):
        weights = facts[side].weights
        if not weights:
            continue
        outcomes = [_product_with(eqn, op, side, weight, context) for weight in weights]
        obstacles = [x for x in outcomes if isinstance(x, Obstacle)]
        if obstacles:
            context.used_otherwise([facts[side]], *obstacles[-1])
            continue
        found = [x for x in outcomes if isinstance(x, products.Product)]
        flops = context.repeats * jaxprs.product_flops(eqn)
        context.products.extend(
            _Used(x, round(flops * _share(x, shape_of(eqn.invars[side])))) for x in weights
        )
        context.used_otherwise([facts[1 - side]], Reason.TWO_WEIGHTS)
        return functools.partial(_multiply, found, weights, needs and needs[1 - side])
    return functools.partial(_gate, op, needs) if needs else None


def _share(weight: moves.Weight, shape: tuple[int, ...]) -> float:
    """The share of an operand that a weight takes up."""
    return weight.box.size / shape[weight.box.axis] if weight.box else 1.0


def _product_with(
    eqn: core.JaxprEqn,
    op: products.Operation,
    side: int,
    weight: moves.Weight,
    context: _Context,
) -> products.Product | Obstacle:
    shapes = [shape_of(v) for v in eqn.invars]
    layer = weight.channel, weight.stack, context.targets[weight.leaf], weight.box
    if eqn.primitive is primitives.dot_general_p:
        return products.dot_product(op, side, (len(shapes[0]), len(shapes[1])), *layer)
    return products.convolution(op, side, shapes[side], *layer)


def _multiply(
    found: Sequence[products.Product],
    weights: Sequence[moves.Weight],
    needs: Needs | None,
    operands: Sequence[Value],
    flags: Flags,
) -> list[Value]:
    side = found[0].side
    x, w = operands[1 - side], operands[side]
    changes = []
    for product, weight, change in zip(found, weights, w.changes, strict=True):
        assert change is not None
        if weight.is_whole:
            z = product.target.take(change.z, weight.channel, weight.stack, change.place)
            change = change._replace(z=z)
        changes.append(change)
    needed = True if needs is None else flags.any(needs)
    return [Value(products.multiply(tuple(found), x.array, w.array, changes, needed))]


def _gate(
    op: products.Operation, needs: tuple[Needs, Needs], operands: Sequence[Value], flags: Flags
) -> list[Value]:
    lhs, rhs = operands
    needed = flags.any(needs[0]), flags.any(needs[1])
    return [Value(products.gate(op, lhs.array, rhs.array, needed))]


# Moves.


class _MoveStep(NamedTuple):
    """An equation that moves weights, at run time.

    Attributes:
      move: what becomes of the weights.
      eqn, program: the equation, and the program that it is in.
      weights: the weights in each operand.
      targets: for each leaf, what may happen to it.
    """

    move: moves.Move
    eqn: core.JaxprEqn
    program: core.Jaxpr
    weights: Sequence[tuple[moves.Weight, ...]]
    targets: Sequence[products.Target]

    def run(self, operands: Sequence[Value], flags: Flags) -> list[Value]:
        results = self._compute([x.array for x in operands])
        if self.move.parts is None:
            changes = self._changes_of_wholes(operands)
        else:
            changes = [self._changes_of_parts(operands, self.move.parts)]
        return [Value(*pair) for pair in zip(results, changes, strict=True)]

    def _compute(self, arrays: Sequence[Any]) -> list[Any]:
        return jaxprs.apply(self.eqn, self.program, arrays)

    def _changes_of_parts(
        self, operands: Sequence[Value], parts: Sequence[moves.MovePart]
    ) -> tuple[products.Change | None, ...]:
        """The changes of the result of an equation that moves each part on its own."""
        arrays = [x.array for x in operands]
        olds = [weight for weights in self.weights for weight in weights]
        changes = [change for x in operands for change in x.changes]
        moved: list[products.Change | None] = []
        for old, new, part, change in zip(olds, self.move.weights[0], parts, changes, strict=True):
            if change is None:  # The weight reaches no product.
                moved.append(None)
                continue
            # A whole weight goes through the equation itself, unless that joins it with others.
            if old.is_whole and not new.box:
                (z,) = self._compute([change.z, *arrays[1:]])
            else:
                target, out = self.targets[new.leaf], self.eqn.outvars[0].aval
                out_spec = functools.partial(target.spec, out, new.channel)
                z = explicit.call(part, out_spec, change.z, arrays)
            place, mode = change.place, change.mode
            if self.move.layers:
                place, mode = (self.move.layers(x, arrays) for x in (place, mode))
            moved.append(products.Change(z, place, mode))
        return tuple(moved)

    def _changes_of_wholes(
        self, operands: Sequence[Value]
    ) -> list[tuple[products.Change | None, ...]]:
        """The changes of the results of an equation that is computed for the whole weight.

        The weight may occur several times, always with the same channels at the same places.
        """
        arrays, found = [], None
        for x, weights in zip(operands, self.weights, strict=True):
            array = x.array
            if weights and (change := x.changes[0]):
                (weight,), found = weights, change
                layer = weight.channel, weight.stack, self.targets[weight.leaf]
                array = change.z
                if not weight.is_whole:
                    array = products.whole(*layer, x.array, change.z, change.place)
            arrays.append(array)
        if found is None:  # The weight reaches no product.
            return [(None,) * len(x) for x in self.move.weights]
        pairs = zip(self._compute(arrays), self.move.weights, strict=True)
        return [(found._replace(z=z),) if weights else () for z, weights in pairs]


def _move_in_call(
    eqn: core.JaxprEqn, program: core.Jaxpr, facts: Sequence[Fact], context: _Context
) -> moves.Move | None:
    """A call that only moves a weight, such as a custom derivative; None for any other call.

    The rules of derivatives can be anything, so the gradient is followed too.
    """
    weights = [fact.weights for fact in facts]
    if not moves.is_alone(weights, [bool(fact.needs) for fact in facts]):
        return None
    inner = eqn.params.get("call_jaxpr")
    if inner is None:
        return None
    results = _moved_by(inner, facts, context)
    if results is None or not any(fact.weights for fact in results):
        return None
    if context.is_gradient or _has_local_gradient(eqn, program, facts, results, context):
        return moves.whole([fact.weights[0] if fact.weights else None for fact in results])
    return None


def _has_local_gradient(
    eqn: core.JaxprEqn,
    program: core.Jaxpr,
    facts: Sequence[Fact],
    results: Sequence[Fact],
    context: _Context,
) -> bool:
    """Whether the gradient of an equation keeps the channels of its weight apart."""
    given = list(dict.fromkeys(v for v in eqn.invars if jaxprs.is_variable(v)))
    function = jaxprs.as_function([eqn], given, eqn.outvars, program)
    pairs = zip(eqn.invars, facts, strict=True)
    fact_of = {v: fact for v, fact in pairs if jaxprs.is_variable(v)}
    moved = [i for i, v in enumerate(given) if fact_of[v].weights]

    def gradient(inputs: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        def of_weights(*weights: Any) -> list[Any]:
            filled = list(inputs)
            for i, x in zip(moved, weights, strict=True):
                filled[i] = x
            return function(*filled)

        return list(jax.vjp(of_weights, *(inputs[i] for i in moved))[1](list(cotangents)))

    types = [list(map(jaxprs.type_of, vs)) for vs in (given, eqn.outvars)]
    backward = jax.make_jaxpr(gradient)(*types)
    inputs = [*(fact_of[v] for v in given), *results]
    found = _moved_by(backward, inputs, context._replace(is_gradient=True))
    return found is not None and all(
        x.weights and x.weights[0].has_same_channels(fact_of[given[i]].weights[0])
        for i, x in zip(moved, found, strict=True)
    )


def _moved_by(program: Any, facts: Sequence[Fact], context: _Context) -> list[Fact] | None:
    """Where a program leaves weights; None if it does anything else with them."""
    inside = context._replace(is_gated=False, products=[], others=[])
    _, results = _follow(program, facts, inside)
    return None if inside.products or inside.others else results


# Calls: equations that contain programs.


def _jit(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    if eqn.params["name"] == CALL_NAME:
        if shape_of(eqn.invars[0]):  # Under `vmap`, both sides of a conditional are computed.
            context.used_otherwise(facts, Reason.INSIDE, "drop_backward under vmap")
            return None, None
        return _drop_backward(eqn, facts, context)
    # The operations of a nested jit join those around it.
    program, results = _follow(eqn.params["jaxpr"], facts, context)
    is_changed = program.is_changed or any(fact.weights for fact in results)
    shardings = eqn.params["in_shardings"], eqn.params["out_shardings"]

    def step(operands: Sequence[Value], flags: Flags) -> list[Value]:
        return _placed(evaluate(program, _placed(operands, shardings[0]), flags), shardings[1])

    return step if is_changed else None, results


def _placed(values: Sequence[Value], shardings: Sequence[Any]) -> list[Value]:
    return [
        x._replace(array=lax.with_sharding_constraint(x.array, where)) if _is_sharding(where) else x
        for x, where in zip(values, shardings, strict=True)
    ]


def _is_sharding(x: Any) -> bool:
    """Whether the user gave a sharding; JAX has an internal type for one that was not given."""
    return type(x).__name__ != "UnspecifiedValue"


def _drop_backward(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    """A branch whose backward pass may be dropped as a whole."""
    (inner,) = jaxprs.opened(eqn.params["jaxpr"])[0].eqns
    program, results = _follow(inner.params["call_jaxpr"], facts, context)
    context.used_otherwise(results, Reason.RESULT, "drop_backward")

    def step(operands: Sequence[Value], flags: Flags) -> list[Value]:
        kept = operands[0].array
        branch = _on_arrays(program, flags)
        return [Value(x) for x in differentiated_if(kept, branch, *_arrays_and_changes(operands))]

    return step if program.is_changed else None, None


def _checkpoint(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    program, results = _follow(eqn.params["jaxpr"], facts, context)
    # `nnx.remat` also returns the parameters, which need not pass through the checkpoint.
    inputs = {v: i for i, v in enumerate(program.jaxpr.invars)}
    passed = [inputs.get(v) if jaxprs.is_variable(v) else None for v in program.jaxpr.outvars]
    made = [fact for fact, i in zip(results, passed, strict=True) if i is None]
    context.used_otherwise(made, Reason.RESULT, "jax.checkpoint")
    settings = {name: eqn.params[name] for name in ("prevent_cse", "policy")}

    def step(operands: Sequence[Value], flags: Flags) -> list[Value]:
        function = jax.checkpoint(_on_arrays(program, flags), **settings)
        arrays = function(*_arrays_and_changes(operands))
        pairs = zip(arrays, passed, strict=True)
        return [Value(x) if i is None else operands[i] for x, i in pairs]

    learns = Fact((), _union(facts))
    found = [learns if i is None else facts[i] for i in passed]
    is_changed = program.is_changed or any(fact.weights for fact in found)
    return step if is_changed else None, found


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


def _arrays_and_changes(values: Sequence[Value]) -> tuple[list[Any], list[Any]]:
    return [x.array for x in values], [x.changes for x in values]


def _on_arrays(program: Program, flags: Flags) -> Callable[..., list[Any]]:
    """A program as a function of arrays and changes."""

    def function(arrays: Sequence[Any], changes: Sequence[Any]) -> list[Any]:
        values = [Value(*pair) for pair in zip(arrays, changes, strict=True)]
        return [x.array for x in evaluate(program, values, flags)]

    return function


# Loops.


class _Scan(NamedTuple):
    """A scan whose body has products of weights."""

    body: Program
    num_consts: int
    num_carry: int
    facts: Sequence[Fact]  # What is known about each operand.
    sliced: Sequence[Fact]  # What one iteration knows about each operand that is sliced.
    settings: Mapping[str, Any]
    carried: Loop
    is_gated: bool


def _scan(eqn: core.JaxprEqn, facts: list[Fact], context: _Context) -> Found:
    num_consts, num_carry = jaxprs.scan_arity(eqn.params)
    first = num_consts + num_carry
    consts, carried, scanned = facts[:num_consts], facts[num_consts:first], facts[first:]
    context.used_otherwise(carried, Reason.CARRIED)
    sliced = [_iterated(fact, context) for fact in scanned]
    loop = Loop()
    # What is carried depends on earlier iterations, in which anything may learn.
    inputs = [*consts, *(Fact((), frozenset([loop])) for _ in carried), *sliced]
    inside = context._replace(repeats=context.repeats * eqn.params["length"])
    body, results = _follow(eqn.params["jaxpr"], inputs, inside)
    context.used_otherwise(results, Reason.RESULT, "a loop")
    settings = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    scan = _Scan(body, num_consts, num_carry, facts, sliced, settings, loop, context.is_gated)
    step = functools.partial(_run_scan, scan) if body.is_changed else None
    return step, None


def _run_scan(scan: _Scan, operands: Sequence[Value], flags: Flags) -> list[Value]:
    first = scan.num_consts + scan.num_carry
    consts, carried = operands[: scan.num_consts], operands[scan.num_consts : first]
    scanned = operands[first:]
    changes = [
        tuple(
            change and _per_iteration(change, weight, scan.settings["length"])
            for change, weight in zip(x.changes, fact.weights, strict=True)
        )
        if inner.weights
        else ()
        for x, fact, inner in zip(scanned, scan.facts[first:], scan.sliced, strict=True)
    ]

    # Whether each operand learns, as far as that is known before the loop.
    outside = [flags.any(fact.needs) if scan.is_gated else False for fact in scan.facts]

    def body(carry: Any, slices: Any) -> tuple[Any, Any]:
        (arrays, needed_below), (xs, changes) = carry, slices
        inner = flags
        if scan.is_gated:
            learning = {
                loop: _any_learns(change, known)
                for fact, change, known in zip(scan.sliced, changes, outside[first:], strict=True)
                for loop in fact.needs
                if isinstance(loop, Loop) and fact.weights
            }
            inner = Flags(flags.learns, {**flags.loops, **learning, scan.carried: needed_below})
            needed_below = functools.reduce(jnp.logical_or, learning.values(), needed_below)
        inputs = [*consts, *map(Value, arrays), *map(Value, xs, changes)]
        results = [x.array for x in evaluate(scan.body, inputs, inner)]
        return (results[: len(arrays)], needed_below), results[len(arrays) :]

    needed_below = functools.reduce(jnp.logical_or, outside, jnp.zeros((), bool))
    carry, xs = ([x.array for x in carried], needed_below), ([x.array for x in scanned], changes)
    (arrays, _), ys = lax.scan(body, carry, xs, **scan.settings)
    return [Value(x) for x in (*arrays, *ys)]


def _any_learns(
    changes: Sequence[products.Change | None], known: jax.Array | bool
) -> jax.Array | bool:
    """Whether any of the layers in a slice learns; `known` is the answer for those without."""
    flags = [jnp.any(change.mode != Mode.FROZEN) if change else known for change in changes]
    return functools.reduce(jnp.logical_or, flags)


def _iterated(fact: Fact, context: _Context) -> Fact:
    """An operand as one iteration of a loop over its first axis sees it."""
    if not fact.weights:
        return fact
    if any(0 in weight.channel or (weight.box and weight.box.axis == 0) for weight in fact.weights):
        context.used_otherwise([fact], Reason.LOOP_OVER_CHANNELS)
        return Fact((), fact.needs)
    # Each iteration has a separate layer, which may learn when others do not.
    return Fact(tuple(map(_iterated_weight, fact.weights)), frozenset([Loop()]))


def _iterated_weight(weight: moves.Weight) -> moves.Weight:
    left = [i for i, axis in enumerate(weight.stack) if axis]
    is_stacked = len(left) < len(weight.stack)
    return weight._replace(
        channel=tuple(axis - 1 for axis in weight.channel),
        stack=tuple(weight.stack[i] - 1 for i in left),
        stack_of_leaf=tuple(weight.stack_of_leaf[i] for i in left),
        layers=weight.layers | {object()} if is_stacked else weight.layers,
        box=weight.box and weight.box._replace(axis=weight.box.axis - 1),
    )


def _per_iteration(change: products.Change, weight: moves.Weight, length: int) -> products.Change:
    """A change in the form that a scan slices."""

    def per_iteration(x: jax.Array) -> jax.Array:
        if 0 in weight.stack:
            return jnp.moveaxis(x, weight.stack.index(0), 0)
        return jnp.broadcast_to(x, (length, *x.shape))

    return change._replace(place=per_iteration(change.place), mode=per_iteration(change.mode))


_CallRule = Callable[[core.JaxprEqn, list[Fact], _Context], Found]
_CALLS: dict[core.Primitive, _CallRule] = {
    primitives.jit_p: _jit,
    primitives.remat_p: _checkpoint,
    primitives.cond_p: _cond,
    primitives.scan_p: _scan,
}
