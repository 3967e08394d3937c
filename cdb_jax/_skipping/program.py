"""Running a loss so that its backward pass computes only what a selection keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from cdb_jax import channels
from cdb_jax._compiling import Keyed, compiled
from cdb_jax._skipping import follow, jaxprs, parts, products
from cdb_jax._xla import materialise
from cdb_jax.selection import Group, Mode, Selection, mask_leaves, rows_of

_ARRAYS = (jax.Array, np.ndarray, np.generic)


def run(
    call: Callable[[Any], Any], params: Any, selection: Selection, has_aux: bool
) -> tuple[jax.Array, Any, Any]:
    """The value of `call(params)`, its auxiliary data, and the masked gradient."""
    traced = trace(call, params, selection, has_aux)
    leaves, treedef = jax.tree.flatten(params)
    operands = selection.groups, leaves, list(traced.consts)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        results, gradient = _evaluate(traced, *operands)
    else:  # Outside of `jit`.
        results, gradient = _evaluate_once(Keyed(traced.key(leaves), traced), *operands)
    value, aux = jax.tree.unflatten(traced.results, results)
    is_static = lambda x: isinstance(x, _Static)
    aux = jax.tree.map(lambda x: x.value if is_static(x) else x, aux, is_leaf=is_static)
    return value, aux, jax.tree.unflatten(treedef, gradient)


class Traced(NamedTuple):
    """A function of parameters as a program.

    Attributes:
      jaxpr: the program, whose first inputs are the constants of the function.
      consts: these constants.
      results: the structure of the value and the auxiliary data.
      layout: the leaves of the parameters.
      freezes_others: whether the selection freezes leaves without channels.
      explicit: the positions of leaves with explicit shardings.
    """

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    results: Any
    layout: channels.Layout
    freezes_others: bool
    explicit: frozenset[int]

    def key(self, leaves: Sequence[Any]) -> Hashable:
        """Shared only by functions with the same results and the same gradients."""
        gradient = jaxprs.differentiated(self.jaxpr, self.consts, leaves)
        programs = jaxprs.identity(self.jaxpr), jaxprs.identity(gradient)
        return programs, self.layout, self.freezes_others, self.explicit


@jax.tree_util.register_pytree_node_class
class _Static:
    """A result that is no array, as a part of the structure of the results."""

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        return (), self.value

    @classmethod
    def tree_unflatten(cls, value: Any, _: Any) -> _Static:
        return cls(value)


def trace(call: Callable[[Any], Any], params: Any, selection: Selection, has_aux: bool) -> Traced:
    """Traces a function of parameters."""

    def checked(params: Any) -> tuple[Any, Any]:
        result = call(params)
        if not has_aux:
            return _check_value(result), None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"has_aux=True: fun must return a pair (value, aux), got {type(result).__name__}."
            )
        value, aux = result
        # Anything may be auxiliary data; only arrays can be results of a program.
        as_result = lambda x: x if isinstance(x, _ARRAYS) else _Static(x)
        return _check_value(value), jax.tree.map(as_result, aux)

    closed, shapes = jax.make_jaxpr(checked, return_shape=True)(params)
    jaxpr, consts = jaxprs.opened(closed)
    jaxpr = jaxpr.replace(constvars=(), invars=[*jaxpr.constvars, *jaxpr.invars])
    explicit = (
        i for i, x in enumerate(jax.tree.leaves(params)) if any(jax.typeof(x).sharding.spec)
    )
    return Traced(
        jaxpr,
        consts,
        jax.tree.structure(shapes),
        selection.layout_of(params),
        selection.freezes_others,
        frozenset(explicit),
    )


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


class Followed(NamedTuple):
    """A program in which the products of weights are found.

    Attributes:
      program: the program with these products replaced.
      targets: for each leaf, what may happen to it.
      uses: by position, what the program does with each leaf that was followed.
    """

    program: follow.Program
    targets: tuple[products.Target, ...]
    uses: dict[int, follow.Uses]


def followed(traced: Traced, groups: Sequence[Group]) -> Followed:
    """Follows parameters to the products that read them."""
    layers = traced.layout.leaves
    by_path = {
        layer.path: products.Target(group.modes, group.part)
        for group in groups
        for layer in group.layers
    }
    learns = products.Target((Mode.FULL,), None)
    targets = tuple(by_path.get(leaf.source, learns) for leaf in layers)
    changing = {
        i
        for i, (leaf, target) in enumerate(zip(layers, targets, strict=True))
        if leaf.layer == leaf.path and target.modes not in ((Mode.FULL,), (Mode.FROZEN,))
    }
    weights = [
        follow.Weight(i, leaf.channel, leaf.stack) if i in changing - traced.explicit else None
        for i, leaf in enumerate(layers)
    ]
    consts: list[follow.Weight | None] = [None] * len(traced.consts)
    program, uses = follow.follow(traced.jaxpr, [*consts, *weights], targets, traced.freezes_others)
    uses |= {i: follow.Uses(0, ("its sharding is explicit",)) for i in changing & traced.explicit}
    return Followed(program, targets, uses)


class _LeafPlan(NamedTuple):
    """How one leaf takes part in a step.

    Attributes:
      drawn: its mode and where its kept part lies, if it is followed.
      needed: the flags of which one is set if it learns.
      skipped: whether products compute the kept part of its gradient.
      direct: whether JAX computes a gradient of it, too, or instead.
    """

    drawn: _Drawn | None
    needed: frozenset[follow.Flag]
    skipped: bool
    direct: bool


class _Drawn(NamedTuple):
    place: jax.Array
    mode: jax.Array


@compiled
def _evaluate_once(traced: Keyed, *operands: Any) -> Any:
    return _evaluate(traced.value, *operands)


def _evaluate(
    traced: Traced, groups: Sequence[Group], leaves: Sequence[Any], consts: Sequence[Any]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The results of the program, and the masked gradient."""
    found = followed(traced, groups)
    layers = traced.layout.leaves
    drawn = _drawn(groups)
    plans = [_plan(i, leaf, found, drawn, traced) for i, leaf in enumerate(layers)]
    direct = {i: x for i, x in enumerate(leaves) if plans[i].direct}
    changes = {
        i: jnp.zeros_like(x, shape=found.targets[i].shape(layers[i].shape, layers[i].channel))
        for i, x in enumerate(leaves)
        if plans[i].skipped
    }

    def fun(changes: dict[int, jax.Array], direct: dict[int, Any]) -> tuple[jax.Array, list[Any]]:
        values = [follow.Value(x) for x in consts]
        for i, (x, plan) in enumerate(zip(leaves, plans, strict=True)):
            change = None
            if plan.skipped and plan.drawn:
                change = follow.Change(changes[i], *plan.drawn)
            values.append(follow.Value(direct.get(i, x), change, plan.needed))
        value, *aux = (x.array for x in follow.evaluate(found.program, values))
        return value, aux

    both = jax.value_and_grad(fun, argnums=(0, 1), has_aux=True)
    (value, aux), (of_changes, of_leaves) = both(changes, direct)
    of_changes = _put_back(of_changes, found, layers, drawn)
    gradient = [
        functools.reduce(jnp.add, [of[i] for of in (of_changes, of_leaves) if i in of])
        if i in of_changes or i in of_leaves
        else jnp.zeros_like(x)
        for i, x in enumerate(leaves)
    ]
    done = {
        leaf.path
        for leaf, plan in zip(layers, plans, strict=True)
        if plan.skipped and not plan.direct
    }
    return [value, *aux], mask_leaves(gradient, traced.layout, groups, rescale=False, done=done)


def _plan(
    i: int, leaf: channels.Leaf, found: Followed, drawn: dict[str, _Drawn], traced: Traced
) -> _LeafPlan:
    target = found.targets[i]
    mine = drawn.get(leaf.source)
    if target.modes == (Mode.FROZEN,):
        needed = follow.NEVER
    elif not traced.freezes_others or Mode.FROZEN not in target.modes:
        needed = follow.ALWAYS
    else:
        assert mine is not None
        needed = frozenset([follow.Flag(jnp.any(mine.mode != Mode.FROZEN))])
    uses = found.uses.get(i)
    skipped = uses is not None and bool(uses.products)
    # A leaf that only products read needs no other gradient.
    direct = bool(needed) and not (uses is not None and skipped and not uses.others)
    return _LeafPlan(mine, needed, skipped, direct)


def _drawn(groups: Sequence[Group]) -> dict[str, _Drawn]:
    """By path of each layer, its mode and where its kept part lies: arrays over its stack."""
    changing = [group for group in groups if len(group.modes) > 1 or group.part]

    def cut(arrays: Sequence[tuple[jax.Array, jax.Array]]) -> dict[str, _Drawn]:
        drawn = {}
        for group, (place, mode) in zip(changing, arrays, strict=True):
            for layer, rows in rows_of(group):
                stack = layer.stack_shape
                at = place[rows]
                drawn[layer.path] = _Drawn(
                    at.reshape(stack + at.shape[1:]), mode[rows].reshape(stack)
                )
        return drawn

    arrays = [
        (jnp.zeros_like(group.mode) if group.place is None else group.place, group.mode)
        for group in changing
    ]
    return materialise(cut, arrays)


def _put_back(
    kept: dict[int, jax.Array],
    found: Followed,
    layers: Sequence[channels.Leaf],
    drawn: dict[str, _Drawn],
) -> dict[int, jax.Array]:
    """Gradients in the shapes of their weights, from gradients of the parts that are kept."""

    def put(parts_and_places: dict[int, tuple[jax.Array, jax.Array]]) -> dict[int, jax.Array]:
        full = {}
        for i, (x, place) in parts_and_places.items():
            leaf, part = layers[i], found.targets[i].part
            assert part is not None
            full[i] = parts.put(x, leaf.shape, leaf.channel, leaf.stack, part, place)
        return full

    compact = {
        i: (x, drawn[layers[i].path].place) for i, x in kept.items() if found.targets[i].compact
    }
    # Best done in the loops of the optimizer, where that costs no memory traffic. The CPU compiler
    # does it there several times for each entry, and slower than a loop of its own.
    return kept | materialise(put, compact, cpu_only=True)
