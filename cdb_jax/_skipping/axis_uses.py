"""Finds what a traced program does with each axis of its weights.

Every value that stems from a weight carries, for each of its axes, the axes of the weight that it
runs over. Layout operations rearrange them, and elementwise operations keep them, as long as the
weight is combined with constants or other weights. Products, convolutions, table look-ups, loops
and indexing then say what each axis is for.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend import core
from jax.extend.core import primitives

from cdb_jax import _jaxprs as jaxprs
from cdb_jax._jaxprs import shape_of


class Use(enum.Enum):
    """What a program does with an axis of a weight."""

    FREE = "free in a product"
    SUMMED = "summed over in a product"
    BATCH = "a batch axis of a product"
    SPATIAL = "spatial in a convolution"
    LOOKUP = "looked up"
    FEATURE = "a feature of a table that is looked up"
    STACK = "looped over"
    INDEXED = "indexed"
    COMBINED = "combined into one weight"


class Uses(NamedTuple):
    """What a program does with a weight.

    Attributes:
      axes: for each axis its uses.
      unknown: the primitives that read the weight in a way that is not understood.
      scales: the primitives by which it scales activations, entry by entry.
      shape: the shape of the weight.
    """

    axes: tuple[set[Use], ...]
    unknown: set[str]
    scales: set[str]
    shape: tuple[int, ...]


class Factor(NamedTuple):
    """A part of an axis of a value: some axes of a weight, or none for a broadcast."""

    axes: frozenset[int]
    size: int


class Origin(NamedTuple):
    """A weight that a value stems from.

    Attributes:
      leaf: the position of the weight.
      axes: the factors of each axis of the value, major first.
      entries: the axes of the weight that were indexed, each with something that differs between
        different entries.
    """

    leaf: int
    axes: tuple[tuple[Factor, ...], ...]
    entries: frozenset[tuple[int, Hashable]] = frozenset()

    @property
    def covered(self) -> frozenset[int]:
        return frozenset().union(*(f.axes for factors in self.axes for f in factors))


class Fact(NamedTuple):
    """What is known about a value.

    Attributes:
      origins: the weights that it stems from.
      is_data: whether it depends on the data.
      is_activation: whether it depends on a product of data and a weight.
      varies: the axes along which its entries may differ.
    """

    origins: tuple[Origin, ...]
    is_data: bool
    varies: frozenset[int]
    is_activation: bool = False


def find(
    program: core.Jaxpr, weights: Collection[int], constants: Collection[int] = ()
) -> dict[int, Uses]:
    """The uses of weights, by position among the inputs of a program.

    Inputs that are neither weights nor constants, such as masks of weights, are data.
    """
    uses, facts = {}, []
    for i, shape in enumerate(map(shape_of, program.invars)):
        if i in weights:
            uses[i] = Uses(tuple(set() for _ in shape), set(), set(), shape)
            facts.append(_weight(i, shape))
        else:
            facts.append(Fact((), is_data=i not in constants, varies=_all_axes(shape)))
    _Finder(uses).program(program, facts)
    return uses


def _weight(leaf: int, shape: tuple[int, ...]) -> Fact:
    # Vectors are not followed: they have no channels, and would be mistaken for what they scale.
    is_followed = sum(size > 1 for size in shape) > 1
    axes = tuple((Factor(frozenset([axis]), size),) for axis, size in enumerate(shape))
    origins = (Origin(leaf, axes),) if is_followed else ()
    return Fact(origins, False, _all_axes(shape))


def _all_axes(shape: Sequence[int]) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(shape) if size > 1)


class _Finder:
    """Collects the uses of weights while it walks through a program."""

    def __init__(self, uses: dict[int, Uses]):
        self.uses = uses

    def program(self, program: Any, inputs: Sequence[Fact]) -> list[Fact]:
        """Returns what is known about the results of a program."""
        jaxpr, _ = jaxprs.opened(program)
        facts: dict[core.Var, Fact] = dict(zip(jaxpr.invars, inputs, strict=True))

        def known(v: jaxprs.Atom) -> Fact:
            if isinstance(v, core.Literal) or v not in facts:  # A constant.
                return Fact((), is_data=False, varies=_all_axes(shape_of(v)))
            return facts[v]

        for eqn in jaxpr.eqns:
            given = [known(v) for v in eqn.invars]
            results = self._equation(eqn, given)
            facts.update(zip(eqn.outvars, results, strict=True))
        return [known(v) for v in jaxpr.outvars]

    def _equation(self, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Fact]:
        is_data = any(fact.is_data for fact in facts)
        reads_weight = any(fact.origins for fact in facts)
        is_product = eqn.primitive in jaxprs.PRODUCTS and is_data and reads_weight
        is_activation = is_product or any(fact.is_activation for fact in facts)
        otherwise = [Fact((), is_data, _all_axes(shape_of(v)), is_activation) for v in eqn.outvars]
        name = eqn.primitive.name
        if name == "optimization_barrier":
            return facts
        if eqn.primitive is primitives.broadcast_in_dim_p:
            return [_broadcast(eqn, facts[0])]
        if jaxprs.programs_in(eqn.params):
            return self._call(eqn, facts, otherwise)
        if not reads_weight:
            return otherwise
        if name == "split":
            return [
                x._replace(origins=tuple(_merged(_resized(self, eqn, facts, i))))
                for i, x in enumerate(otherwise)
            ]
        rule = _RULES.get(eqn.primitive) or _RULES_BY_NAME.get(name)
        if rule:
            origins = rule(self, eqn, facts)
        elif jaxprs.is_elementwise(eqn.primitive):
            origins = _elementwise(self, eqn, facts)
        else:
            self.unknown(facts, name)
            origins = []
        return [x._replace(origins=tuple(_merged(origins))) for x in otherwise]

    def use(self, origin: Origin, axis: int, use: Use) -> None:
        """Notes a use of the weight's axes that run along an axis of a value."""
        for factor in origin.axes[axis]:
            for leaf_axis in factor.axes:
                self.uses[origin.leaf].axes[leaf_axis].add(use)

    def unknown(self, facts: Iterable[Fact], name: str) -> None:
        """Notes that a primitive reads weights in a way that is not understood."""
        for fact in facts:
            for origin in fact.origins:
                self.uses[origin.leaf].unknown.add(name)

    def _call(self, eqn: core.JaxprEqn, facts: list[Fact], otherwise: list[Fact]) -> list[Fact]:
        """Equations that contain programs."""
        primitive, name, params = eqn.primitive, eqn.primitive.name, eqn.params
        if primitive is primitives.scan_p:
            return self._scan(eqn, facts, otherwise)
        if primitive is primitives.while_p:
            num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
            consts, state = facts[num_cond : num_cond + num_body], facts[num_cond + num_body :]
            self.unknown(state, name)
            self.program(params["body_jaxpr"], [*consts, *map(_as_data, state)])
            return list(map(_as_data, otherwise))
        if primitive is primitives.cond_p:
            results = [self.program(branch, facts[1:]) for branch in params["branches"]]
            return [_either(several) for several in zip(*results, strict=True)]
        programs = [
            x
            for key in ("jaxpr", "call_jaxpr", "fun_jaxpr")
            if (x := params.get(key)) is not None
            and list(map(shape_of, jaxprs.opened(x)[0].invars)) == list(map(shape_of, eqn.invars))
        ]
        if name == "shard_map" or not programs:
            self.unknown(facts, name)
            return otherwise
        return self.program(programs[0], facts)

    def _scan(self, eqn: core.JaxprEqn, facts: list[Fact], otherwise: list[Fact]) -> list[Fact]:
        num_consts, num_carry = jaxprs.scan_arity(eqn.params)
        first = num_consts + num_carry
        self.unknown(facts[num_consts:first], "scan")
        for fact in facts[first:]:
            for origin in fact.origins:
                self.use(origin, 0, Use.STACK)
        carried = [_as_data(fact) for fact in facts[num_consts:first]]
        sliced = [_sliced(fact) for fact in facts[first:]]
        self.program(eqn.params["jaxpr"], [*facts[:num_consts], *carried, *sliced])
        return list(map(_as_data, otherwise))


def _as_data(fact: Fact) -> Fact:
    return Fact((), True, fact.varies, fact.is_activation)


def _either(facts: Sequence[Fact]) -> Fact:
    origins = _merged([origin for fact in facts for origin in fact.origins])
    varies = frozenset().union(*(fact.varies for fact in facts))
    return Fact(tuple(origins), True, varies, any(fact.is_activation for fact in facts))


def _sliced(fact: Fact) -> Fact:
    """An operand of a loop over its first axis, as one iteration sees it."""
    origins = tuple(x._replace(axes=x.axes[1:]) for x in fact.origins)
    varies = frozenset(axis - 1 for axis in fact.varies if axis > 0)
    return fact._replace(origins=origins, varies=varies)


def _merged(origins: Iterable[Origin]) -> list[Origin]:
    """One origin for each weight: that which covers most of its axes.

    A statistic of a weight that scales the weight covers fewer; a sum over all axes covers none.
    """
    best: dict[int, Origin] = {}
    for origin in origins:
        if not origin.covered:
            continue
        other = best.get(origin.leaf)
        if other is None or len(origin.covered) > len(other.covered):
            best[origin.leaf] = origin
    return list(best.values())


# Operations on layout: what becomes of the axes.


def _broadcast(eqn: core.JaxprEqn, fact: Fact) -> Fact:
    new_axes, shape = eqn.params["broadcast_dimensions"], shape_of(eqn.outvars[0])
    old_shape = shape_of(eqn.invars[0])
    origins = []
    for origin in fact.origins:
        axes = [(Factor(frozenset(), size),) for size in shape]
        for axis, new_axis in enumerate(new_axes):
            if old_shape[axis] == shape[new_axis]:
                axes[new_axis] = origin.axes[axis]  # type: ignore[assignment]
        origins.append(origin._replace(axes=tuple(axes)))
    varies = frozenset(new_axes[axis] for axis in fact.varies)
    return Fact(tuple(origins), fact.is_data, varies, fact.is_activation)


def _transposed(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    order = eqn.params["permutation"]
    return [x._replace(axes=tuple(x.axes[axis] for axis in order)) for x in facts[0].origins]


def _reshaped(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    shape = shape_of(eqn.outvars[0])
    origins = []
    for origin in facts[0].origins:
        flat = [factor for factors in origin.axes for factor in factors if factor.size > 1]
        axes = _regrouped(flat, shape)
        if axes is None:
            finder.uses[origin.leaf].unknown.add("reshape")
        else:
            origins.append(origin._replace(axes=axes))
    return origins


def _regrouped(flat: list[Factor], shape: tuple[int, ...]) -> tuple[tuple[Factor, ...], ...] | None:
    """Deals factors, in row-major order, to the axes of a new shape; None if one would be cut."""
    flat, axes = list(flat), []
    for size in shape:
        group: list[Factor] = []
        left = size
        while left > 1:
            factor = flat.pop(0)
            taken = math.gcd(left, factor.size)
            if taken == 1 or (taken < factor.size and taken < left):
                return None
            # The major part of an axis that is split comes first.
            group.append(factor._replace(size=taken))
            if taken < factor.size:
                flat.insert(0, factor._replace(size=factor.size // taken))
            left //= taken
        axes.append(tuple(group))
    return tuple(axes)


def _resized(
    finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact], result: int = 0
) -> list[Origin]:
    """Slices, pads and concatenations: other sizes along the same axes; size 1 is an index."""
    if eqn.primitive is primitives.concatenate_p and any(fact.is_data for fact in facts):
        return []  # Tokens, not weights.
    old_shapes = [shape_of(v) for v in eqn.invars]
    new_shape = shape_of(eqn.outvars[result])
    origins = []
    for fact, old_shape in zip(facts, old_shapes, strict=True):
        for origin in fact.origins:
            axes, entries = [], origin.entries
            for axis, factors in enumerate(origin.axes):
                if old_shape[axis] == new_shape[axis]:
                    axes.append(factors)
                    continue
                union = frozenset().union(*(f.axes for f in factors))
                if new_shape[axis] == 1:
                    finder.use(origin, axis, Use.INDEXED)
                    entries |= {(i, _entry(eqn, axis)) for i in union}
                    union = frozenset()
                axes.append((Factor(union, new_shape[axis]),))
            origins.append(origin._replace(axes=tuple(axes), entries=entries))
    return origins


def _entry(eqn: core.JaxprEqn, axis: int) -> Hashable:
    """Something that differs between different entries along an axis."""
    return eqn.params["start_indices"][axis] if eqn.primitive is primitives.slice_p else object()


def _reduced(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    axes = eqn.params["axes"]
    return [
        x._replace(axes=tuple(y for axis, y in enumerate(x.axes) if axis not in axes))
        for x in facts[0].origins
    ]


def _kept(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    return list(facts[0].origins)


def _elementwise(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    """Which operands are still weights in the result.

    A weight may be combined with weights and constants, and be scaled by data that does not vary
    along all of its axes. Otherwise it is itself a scale or a bias, and the result is data.
    """
    shape = shape_of(eqn.outvars[0])
    data = [fact for fact in facts if fact.is_data]
    origins = []
    for fact in facts:
        for origin in (_spread(x, shape) for x in fact.origins):
            varying = {axis for axis, fs in enumerate(origin.axes) if any(f.axes for f in fs)}
            varying &= _all_axes(shape)
            scaled = eqn.primitive in (primitives.mul_p, primitives.div_p)
            if all(x is fact or (scaled and varying - x.varies) for x in data):
                origins.append(origin)
            elif varying == _all_axes(shape):  # Noise, or a mask that is drawn for each step.
                finder.uses[origin.leaf].unknown.add(eqn.primitive.name)
            elif scaled and all(x.is_activation for x in data):
                finder.uses[origin.leaf].scales.add(eqn.primitive.name)
    for first, second in itertools.combinations(origins, 2):
        if first.leaf == second.leaf:
            for axis, _ in first.entries ^ second.entries:
                finder.uses[first.leaf].axes[axis].add(Use.COMBINED)
    return origins


def _spread(origin: Origin, shape: tuple[int, ...]) -> Origin:
    """Elementwise operations broadcast axes of size 1."""
    axes = tuple(
        x if math.prod(f.size for f in x) == size else (Factor(frozenset(), size),)
        for x, size in zip(origin.axes, shape, strict=True)
    )
    return origin._replace(axes=axes)


# Operations that say what the axes are for.


def _product(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    contract, batch = eqn.params["dimension_numbers"]
    if all(fact.origins and not fact.is_data for fact in facts):
        # A low-rank update, or learned tokens and the weight that reads them: only names differ.
        finder.unknown(facts, "a product of two weights")
        return []
    for side, fact in enumerate(facts):
        for origin in fact.origins:
            for axis in range(len(origin.axes)):
                use = Use.FREE
                if axis in contract[side]:
                    use = Use.SUMMED
                elif axis in batch[side]:
                    use = Use.BATCH
                finder.use(origin, axis, use)
    return []


def _convolution(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    out_axis, in_axis, *spatial = eqn.params["dimension_numbers"][1]
    for origin in facts[1].origins:
        finder.use(origin, out_axis, Use.FREE)
        finder.use(origin, in_axis, Use.SUMMED)
        for axis in spatial:
            finder.use(origin, axis, Use.SPATIAL)
    finder.unknown(facts[:1], eqn.primitive.name)
    return []


def _gather(finder: _Finder, eqn: core.JaxprEqn, facts: list[Fact]) -> list[Origin]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand_shape = shape_of(eqn.invars[0])
    batching = tuple(numbers.operand_batching_dims)
    removed = (*numbers.collapsed_slice_dims, *batching)
    is_index = len(shape_of(eqn.invars[1])) == 1
    origins = []
    for origin in facts[0].origins:
        for axis, size in enumerate(sizes):
            is_whole = size == operand_shape[axis]
            if is_index and not is_whole:
                finder.use(origin, axis, Use.INDEXED)
            elif axis in batching:
                finder.use(origin, axis, Use.BATCH)
            elif not is_index:
                finder.use(origin, axis, Use.FEATURE if is_whole else Use.LOOKUP)
        if is_index:
            left = [
                x if sizes[axis] == operand_shape[axis] else (Factor(frozenset(), sizes[axis]),)
                for axis, x in enumerate(origin.axes)
                if axis not in removed
            ]
            origins.append(origin._replace(axes=tuple(left)))
    return origins


_Rule = Callable[[_Finder, core.JaxprEqn, list[Fact]], list[Origin]]
_RULES: dict[core.Primitive, _Rule] = {
    primitives.transpose_p: _transposed,
    primitives.reshape_p: _reshaped,
    primitives.squeeze_p: _reshaped,
    primitives.slice_p: _resized,
    primitives.pad_p: _resized,
    primitives.concatenate_p: _resized,
    primitives.dynamic_slice_p: _resized,
    primitives.rev_p: _kept,
    primitives.sharding_constraint_p: _kept,
    primitives.reduce_sum_p: _reduced,
    primitives.reduce_max_p: _reduced,
    primitives.reduce_min_p: _reduced,
    primitives.reduce_prod_p: _reduced,
    primitives.reduce_and_p: _reduced,
    primitives.reduce_or_p: _reduced,
    primitives.argmax_p: _reduced,
    primitives.argmin_p: _reduced,
    primitives.dot_general_p: _product,
    primitives.conv_general_dilated_p: _convolution,
    primitives.gather_p: _gather,
}
_RULES_BY_NAME: dict[str, _Rule] = {"reshard": _kept}  # `jax.extend` does not export it.
