"""Runs a loss so that its backward pass computes only what a selection keeps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from cdb_jax import _explicit as explicit, _jaxprs as jaxprs, _parts as parts, channels
from cdb_jax._checks import check_pair
from cdb_jax._compiling import Keyed, compiled
from cdb_jax._kept import KeptPart
from cdb_jax._skipping import axis_uses, follow, moves, products, roles
from cdb_jax._xla import alone_on_cpu
from cdb_jax.selection import Arrangement, Group, Mode, Selection, mask_leaves, per_layer


def run(
    call: Callable[[Any], Any], params: Any, selection: Selection, has_aux: bool, kept_only: bool
) -> tuple[jax.Array, Any, Any]:
    """Returns the value of `call(params)`, its auxiliary data, and the masked gradient.

    If `kept_only`, the gradient has the kept part of each leaf only.
    """
    traced = trace(call, params, selection, has_aux)._replace(kept_only=kept_only)
    leaves, treedef = jax.tree.flatten(params)
    operands = selection.groups, leaves, list(traced.consts)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        results, gradient = _evaluate(traced, *operands)
    else:  # Outside of `jit`.
        results, gradient = _evaluate_once(Keyed(traced.key(leaves), traced), *operands)
    value, aux = jax.tree.unflatten(traced.results, results)

    def without_box(x: Any) -> Any:
        return x.value if isinstance(x, _Static) else x

    aux = jax.tree.map(without_box, aux, is_leaf=lambda x: isinstance(x, _Static))
    leaves = [optax.MaskedNode() if x is None else x for x in gradient]
    return value, aux, jax.tree.unflatten(treedef, leaves)


class Traced(NamedTuple):
    """A function of the parameters as a program.

    Attributes:
      jaxpr: the program, whose first inputs are the constants of the function.
      consts: these constants.
      results: the structure of the value and the auxiliary data.
      layout: the leaves of the parameters.
      freezes_others: whether the selection freezes leaves without channels.
      layers_picked: how many layers of a stack learn at most, if others are frozen.
      kept_only: whether the gradient has the kept part of each leaf only.
    """

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    results: Any
    layout: channels.Layout
    freezes_others: bool
    layers_picked: int
    kept_only: bool = False

    def key(self, leaves: Sequence[Any]) -> Hashable:
        """A key that functions share only if they have the same results and gradients."""
        gradient = jaxprs.differentiated(self.jaxpr, self.consts, leaves)
        programs = jaxprs.identity(self.jaxpr), jaxprs.identity(gradient)
        return programs, self[3:]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """Auxiliary data that is not an array, as a part of the structure of the results."""

    value: Any


def trace(call: Callable[[Any], Any], params: Any, selection: Selection, has_aux: bool) -> Traced:
    """Traces a function of the parameters."""

    def checked(params: Any) -> tuple[Any, Any]:
        result = call(params)
        if not has_aux:
            return _check_value(result), None
        value, aux = check_pair(result)
        return _check_value(value), jax.tree.map(_as_result, aux)

    closed, shapes = jax.make_jaxpr(checked, return_shape=True)(params)
    jaxpr, consts = jaxprs.opened(closed)
    jaxpr = jaxpr.replace(constvars=(), invars=[*jaxpr.constvars, *jaxpr.invars])
    layout = channels.same_layout(params, selection.layout)
    if any(leaf.convention for leaf in layout.layers):
        _check_names(layout, jaxpr, consts, jax.tree.leaves(params))
    return Traced(
        jaxpr,
        consts,
        jax.tree.structure(shapes),
        layout,
        selection.freezes_others,
        selection.policy.layers_picked if selection.policy else 0,
    )


def _check_names(
    layout: channels.Layout, jaxpr: core.Jaxpr, consts: Sequence[Any], leaves: Sequence[Any]
) -> None:
    """Compares the channels that names show with what the program does with the weights.

    Under `jit`, arrays that are not traced are constants, such as masks of weights. Outside of
    `jit`, none is taken for a constant, since any may hold the batch.
    """
    traced = [isinstance(x, jax.core.Tracer) for x in (*consts, *leaves)]
    first = len(consts)
    constants = [i for i in range(first) if any(traced) and not traced[i]]
    uses = axis_uses.find(jaxpr, range(first, first + len(leaves)), constants)
    roles.check_names(layout, [uses[first + i] for i in range(len(leaves))])


def _as_result(x: Any) -> Any:
    return x if isinstance(x, jaxprs.ARRAYS) else _Static(x)


def _check_value(value: Any) -> jax.Array:
    if isinstance(value, (float, *jaxprs.ARRAYS)):
        x = jnp.asarray(value)
        if x.shape == () and jnp.issubdtype(x.dtype, jnp.floating):
            return x
        got = f"shape {x.shape} and dtype {x.dtype}"
    else:
        got = f"a {type(value).__name__}"
    raise TypeError(
        f"fun must return a float scalar, got {got}; take the mean of the losses, or set "
        "has_aux=True if fun returns a pair."
    )


class Followed(NamedTuple):
    """A program in which the products of weights have been found.

    Attributes:
      program: the program with these products replaced.
      targets: for each leaf, what may happen to it.
      is_followed: whether each leaf was followed.
      uses: what the program does with each leaf that may lose part of its gradient, by position.
    """

    program: follow.Program
    targets: tuple[products.Target, ...]
    is_followed: tuple[bool, ...]
    uses: dict[int, follow.Uses]


def followed(traced: Traced, groups: Sequence[Group]) -> Followed:
    """Follows parameters to the products that read them."""
    leaves = traced.layout.leaves
    by_path = {
        layer.path: products.Target(group.modes, group.part)
        for group in groups
        for layer in group.layers
    }
    learns = products.Target((Mode.FULL,), None)
    targets = tuple(by_path.get(leaf.source, learns) for leaf in leaves)
    facts = [follow.Fact()] * len(traced.consts)
    for i, (leaf, target) in enumerate(zip(leaves, targets, strict=True)):
        weights: tuple[moves.Weight, ...] = ()
        if leaf.layer == leaf.path and target.modes not in ((Mode.FULL,), (Mode.FROZEN,)):
            of_leaf = tuple(range(len(leaf.stack)))
            weights = (moves.Weight(i, leaf.channel, leaf.stack, of_leaf),)
        facts.append(follow.Fact(weights, _needs(i, target)))
    program, uses = follow.follow(traced.jaxpr, facts, targets, traced.freezes_others)
    is_followed = tuple(bool(fact.weights) for fact in facts[len(traced.consts) :])
    return Followed(program, targets, is_followed, uses)


def weight_flops(traced: Traced) -> list[int]:
    """The floating-point operations of the full gradient of each leaf, counting products only."""
    leaves = traced.layout.leaves
    whole = products.Target((Mode.FROZEN, Mode.FULL), None)  # Any use of a whole leaf is followed.
    facts = [follow.Fact()] * len(traced.consts)
    for i, leaf in enumerate(leaves):
        weight = moves.Weight(i, (), leaf.stack, tuple(range(len(leaf.stack))))
        facts.append(follow.Fact((weight,), frozenset([i])))
    _, uses = follow.follow(traced.jaxpr, facts, [whole] * len(leaves), is_gated=False)
    return [uses[i].flops for i in range(len(leaves))]


def _needs(i: int, target: products.Target) -> follow.Needs:
    """The leaves of which at least one must learn for the gradient of this leaf to be needed."""
    if target.modes == (Mode.FROZEN,):
        return follow.NOTHING
    return frozenset([i if Mode.FROZEN in target.modes else follow.ALWAYS])


class _Drawn(NamedTuple):
    """The mode of a layer, and where its kept part lies: arrays over its stack.

    Attributes:
      mode: the `Mode`.
      place, kept_index: as in `Group`; `kept_index` is None unless the kept channels are scattered.
    """

    mode: jax.Array
    place: jax.Array
    kept_index: jax.Array | None


class _Input(NamedTuple):
    """What one leaf is differentiated by.

    Attributes:
      direct: the leaf itself; None if JAX computes no gradient of it directly.
      zeros: what receives the gradient that products compute; None if they compute none.
    """

    direct: Any
    zeros: jax.Array | None


class _Plan(NamedTuple):
    """How one leaf takes part in a step.

    Attributes:
      leaf: its entry in the layout.
      target: what may happen to it.
      drawn: what happens to it in this step; None if that is known in advance.
      is_followed: whether the leaf was followed to products.
      is_skipped: whether products compute the kept part of its gradient.
      is_direct: whether JAX computes its gradient directly, in addition or instead.
      has_zeros: whether its gradient already has zeros in dropped channels. Otherwise it has to be
        masked: a function of the weight can have an infinite derivative, and zero times infinity is
        NaN.
    """

    leaf: channels.Leaf
    target: products.Target
    drawn: _Drawn | None
    is_followed: bool
    is_skipped: bool
    is_direct: bool
    has_zeros: bool

    @property
    def is_kept_only(self) -> bool:
        """Whether products give the gradient of the kept channels, and there is no other."""
        return self.is_skipped and self.has_zeros and self.target.compact_part is not None

    def input(self, weight: Any) -> _Input:
        leaf, target = self.leaf, self.target

        def zeros(weight: Any) -> jax.Array:
            return jnp.zeros_like(weight, shape=target.shape(leaf.shape, leaf.channel))

        received = None
        if self.is_skipped:
            received = explicit.call(zeros, lambda: target.spec(weight, leaf.channel), weight)
        return _Input(weight if self.is_direct else None, received)

    def value(self, weight: Any, given: _Input) -> follow.Value:
        """The leaf as the program reads it."""
        if self.is_direct:
            weight = given.direct
        if not self.is_followed:
            return follow.Value(weight)
        change = None
        if given.zeros is not None and self.drawn:
            change = products.Change(given.zeros, self.drawn.place, self.drawn.mode)
        return follow.Value(weight, (change,))


@compiled
def _evaluate_once(traced: Keyed, *operands: Any) -> Any:
    return _evaluate(traced.value, *operands)


def _evaluate(
    traced: Traced, groups: Sequence[Group], leaves: Sequence[Any], consts: Sequence[Any]
) -> tuple[list[jax.Array], Sequence[jax.Array | None]]:
    """Returns the results of the program, and the masked gradient.

    With `kept_only`, the gradient of a leaf that never learns is None.
    """
    found = followed(traced, groups)
    plans = _plans(found, traced.layout, _drawn(groups))
    flags = follow.Flags(_learning(plans), {})

    def fun(inputs: list[_Input]) -> tuple[jax.Array, list[Any]]:
        values = [follow.Value(x) for x in consts]
        values += [plan.value(x, y) for plan, x, y in zip(plans, leaves, inputs, strict=True)]
        value, *aux = (x.array for x in follow.evaluate(found.program, values, flags))
        return value, aux

    inputs = [plan.input(x) for plan, x in zip(plans, leaves, strict=True)]
    (value, aux), derivatives = jax.value_and_grad(fun, has_aux=True)(inputs)
    skipped = {i: x.zeros for i, x in enumerate(derivatives) if x.zeros is not None}
    kept: dict[int, jax.Array] = {}
    if traced.kept_only:
        kept = {i: skipped.pop(i) for i, plan in enumerate(plans) if plan.is_kept_only}
    skipped = _put_back(skipped, plans, leaves)
    gradient = [_sum(x, skipped.get(i), derivatives[i].direct) for i, x in enumerate(leaves)]
    have_zeros = {plan.leaf.path for plan in plans if plan.has_zeros}
    gradient = mask_leaves(gradient, traced.layout, groups, rescale=False, done=have_zeros)
    if traced.kept_only:
        part = KeptPart.from_groups(traced.layout, groups, traced.layers_picked)
        return [value, *aux], part.kept_gradients(gradient, kept)
    return [value, *aux], gradient


def _sum(leaf: jax.Array, *gradients: jax.Array | None) -> jax.Array:
    found = [x for x in gradients if x is not None]
    return functools.reduce(jnp.add, found) if found else jnp.zeros_like(leaf)


def _plans(
    found: Followed, layout: channels.Layout, drawn: Mapping[str, _Drawn]
) -> tuple[_Plan, ...]:
    plans = []
    for i, (leaf, target) in enumerate(zip(layout.leaves, found.targets, strict=True)):
        uses = found.uses.get(i, follow.Uses(0, True, ()))
        is_skipped = uses.products > 0
        # A leaf that only products read needs no other gradient.
        is_direct = target.modes != (Mode.FROZEN,) and (not is_skipped or bool(uses.others))
        has_zeros = is_skipped and uses.layout_only and not is_direct
        flags = found.is_followed[i], is_skipped, is_direct, has_zeros
        plans.append(_Plan(leaf, target, drawn.get(leaf.source), *flags))
    return tuple(plans)


def _learning(plans: Sequence[_Plan]) -> jax.Array:
    """Whether each leaf learns in this step: bool, shape `(leaves,)`."""
    return jnp.stack(
        [
            jnp.any(plan.drawn.mode != Mode.FROZEN)
            if plan.drawn and Mode.FROZEN in plan.target.modes
            else jnp.asarray(plan.target.modes != (Mode.FROZEN,))
            for plan in plans
        ]
    )


def _drawn(groups: Sequence[Group]) -> dict[str, _Drawn]:
    """What is drawn for each layer, by path."""
    modes = per_layer([group for group in groups if len(group.modes) > 1], "mode")
    places = per_layer([group for group in groups if group.part], "place")
    scattered = [
        group for group in groups if group.part and group.part.arrangement is Arrangement.SCATTERED
    ]
    kept_index = per_layer(scattered, "kept_index")
    drawn = {}
    for layer in (layer for group in groups for layer in group.layers):
        path = layer.path
        if path in modes or path in places:
            mode = modes.get(path, jnp.full(layer.stack_shape, Mode.PARTIAL, jnp.int32))
            place = places.get(path, jnp.zeros_like(mode))
            drawn[path] = _Drawn(mode, place, kept_index.get(path))
    return drawn


def _put_back(
    kept: dict[int, jax.Array], plans: Sequence[_Plan], weights: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """Expands the gradients of kept parts to the shapes of their weights."""
    expanded = {
        i: (x, drawn.place, drawn.kept_index)
        for i, x in kept.items()
        if plans[i].target.compact_part and (drawn := plans[i].drawn)
    }
    if not expanded:
        return kept

    def put(operands: dict[int, tuple[Any, ...]]) -> dict[int, jax.Array]:
        full = {}
        for i, (x, place, kept_index) in operands.items():
            leaf, part = plans[i].leaf, plans[i].target.compact_part
            assert part is not None
            full[i] = parts.put(x, leaf.shape, leaf.channel, leaf.stack, part, place, kept_index)
        return full

    # This is best done in the loops of the optimizer, where it costs no memory traffic. On CPU, the
    # compiler would repeat it several times per entry there, more slowly than in a separate loop.
    def put_on_any(operands: dict[int, tuple[Any, ...]]) -> dict[int, jax.Array]:
        return jax.lax.platform_dependent(operands, cpu=lambda x: alone_on_cpu(put(x)), default=put)

    def specs() -> dict[int, Any]:
        return {i: jax.typeof(weights[i]).sharding.spec for i in expanded}

    return kept | explicit.call(put_on_any, specs, expanded)
