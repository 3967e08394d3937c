"""Operations that a weight passes through on the way to its products, and where they leave it.

Two kinds of operations keep the channels of a weight apart. Those that change its *layout* (the
order of its entries, or their dtype) do the same to the kept part of its gradient. All others (a
scale, a mask, weight standardisation, a custom derivative) are computed for the whole weight, and
JAX finds their gradients: the gradient of each channel of the result is needed only for the same
channel of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from cdb_jax import _jaxprs as jaxprs
from cdb_jax._jaxprs import shape_of
from cdb_jax._skipping import products

Axes = tuple[int, ...]


class Weight(NamedTuple):
    """What is known about a value that stems from a leaf of the parameters.

    Attributes:
      leaf: the position of the leaf.
      channel: the axes of the value that hold the channels of the leaf, major first.
      stack: the axes of the value along which layers are stacked.
      stack_of_leaf: for each of them, its position in the stack of the leaf.
      layers: the slices that were taken along the stack of the leaf.
      box: where the weight lies in the value, if the value joins several.
      is_whole: whether `Change.z` is the whole weight, from which the kept part is taken later.
    """

    leaf: int
    channel: Axes
    stack: Axes
    stack_of_leaf: Axes
    layers: frozenset[Hashable] = frozenset()
    box: products.Box | None = None
    is_whole: bool = False

    @property
    def axes(self) -> set[int]:
        return {*self.channel, *self.stack}

    def has_same_channels(self, other: Weight) -> bool:
        """Whether the channels of both values are the same, at the same places."""
        return self._replace(is_whole=False) == other._replace(is_whole=False)


Operands = Sequence[Any]  # The arrays that an equation reads, at run time.


# Computes the new `Change.z` of a weight from the old one.
MovePart = Callable[[jax.Array, Operands], jax.Array]
# Computes the new `Change.place` or `Change.mode` of a weight from the old one.
MoveLayers = Callable[[jax.Array, Operands], jax.Array]


class Move(NamedTuple):
    """What becomes of weights in an equation.

    Attributes:
      weights: the weights in each result.
      parts: for each of them, in order, how its part moves; None if the equation has to be computed
        for the whole weight.
      layers: what happens to the layers of a stack; None if nothing does.
    """

    weights: Sequence[tuple[Weight, ...]]
    parts: Sequence[MovePart] | None
    layers: MoveLayers | None


def find(
    eqn: core.JaxprEqn,
    operands: Sequence[tuple[Weight, ...]],
    learns: Sequence[bool],
    targets: Sequence[products.Target],
) -> Move | None:
    """Finds where an equation leaves the weights among its operands.

    Args:
      eqn: an equation that contains no other program.
      operands: the weights in each operand.
      learns: whether each operand needs a gradient.
      targets: for each leaf, what may happen to it.

    Returns:
      A move, or None if the equation does not keep the channels of a weight apart from each other
      and from everything else that learns.
    """
    first, *others = operands
    layout = _LAYOUT.get(eqn.primitive) or _LAYOUT_BY_NAME.get(eqn.primitive.name)
    if layout and first and not any(others) and len(eqn.outvars) == 1:
        moved = _moved(layout, eqn, first, targets)
        if moved:
            return moved
    if is_alone(operands, learns):
        weight = next(weights[0] for weights in operands if weights)
        if jaxprs.is_elementwise(eqn.primitive):
            return whole([weight] * len(eqn.outvars))
        local = _LOCAL.get(eqn.primitive) or _LOCAL_BY_NAME.get(eqn.primitive.name)
        left = local and local(eqn, weight)
        if left:
            return whole([left] * len(eqn.outvars))
    if eqn.primitive is primitives.concatenate_p:
        return _joined(eqn, operands, learns)
    return None


def _moved(
    rule: _LayoutRule,
    eqn: core.JaxprEqn,
    weights: tuple[Weight, ...],
    targets: Sequence[products.Target],
) -> Move | None:
    if any(weight.box for weight in weights) and rule not in _FOR_JOINED:
        return None
    found = [rule(eqn, weight, targets[weight.leaf]) for weight in weights]
    moved = [x for x in found if x]
    if len(moved) < len(found):
        return None
    return Move([tuple(x.weight for x in moved)], [x.part for x in moved], moved[0].layers)


def is_alone(operands: Sequence[tuple[Weight, ...]], learns: Sequence[bool]) -> bool:
    """Whether one weight, which may occur several times, is all that learns."""
    found = [weight for weights in operands for weight in weights]
    if any(learns[i] and len(weights) != 1 for i, weights in enumerate(operands)):
        return False
    return all(x.box is None and x.has_same_channels(found[0]) for x in found)


def whole(weights: Sequence[Weight | None]) -> Move:
    """A move for which an equation is computed with the whole weight."""
    return Move([(x._replace(is_whole=True),) if x else () for x in weights], None, None)


# Layout. A rule returns None if the weight cannot be followed.


class Moved(NamedTuple):
    """The weight in the result, and how its part and its layers move."""

    weight: Weight
    part: MovePart
    layers: MoveLayers | None = None


def _same(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    return Moved(weight, lambda z, _: z)


def _constrained(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    """The gradient is sharded like the weight, unless its channel axes are sharded."""
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return _same(eqn, weight, target)
    spec = (*sharding.spec, *[None] * (len(shape_of(eqn.invars[0])) - len(sharding.spec)))
    if any(spec[axis] is not None for axis in weight.channel):
        return _same(eqn, weight, target)
    return Moved(weight, lambda z, _: lax.with_sharding_constraint(z, sharding))


def _varied(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    """In a `shard_map`, the gradient of a value replicated over an axis is summed over the axis."""
    return Moved(weight, lambda z, _: lax.pcast(z, eqn.params["axes"], to="varying"))


def _converted(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return Moved(weight, lambda z, _: lax.convert_element_type(z, dtype))


def _transposed(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    order = eqn.params["permutation"]
    moved = weight._replace(
        channel=tuple(order.index(axis) for axis in weight.channel),
        stack=tuple(order.index(axis) for axis in weight.stack),
        box=weight.box and weight.box._replace(axis=order.index(weight.box.axis)),
    )
    return Moved(moved, lambda z, _: jnp.transpose(z, order))


def _reversed(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    axes = eqn.params["dimensions"]
    if set(axes) & weight.axes:
        return None
    return Moved(weight, lambda z, _: lax.rev(z, axes))


def _broadcast(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    new_axes = eqn.params["broadcast_dimensions"]
    old_shape, new_shape = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if any(old_shape[axis] != new_shape[new_axes[axis]] for axis in weight.axes):
        return None
    channel = tuple(new_axes[axis] for axis in weight.channel)
    stack = tuple(new_axes[axis] for axis in weight.stack)
    shape = target.shape(new_shape, channel)
    moved = weight._replace(channel=channel, stack=stack)
    return Moved(moved, lambda z, _: lax.broadcast_in_dim(z, shape, new_axes))


def _reshaped(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    old_shape, new_shape = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    has_order = eqn.primitive is primitives.reshape_p and eqn.params.get("dimensions")
    if 0 in old_shape or has_order:
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
    moved = weight._replace(channel=tuple(channel), stack=tuple(stack))
    return Moved(moved, lambda z, _: z.reshape(shape))


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


def _sliced(eqn: core.JaxprEqn, weight: Weight, target: products.Target) -> Moved | None:
    """A slice that leaves the channels whole, such as one layer of a stack.

    The starts of a `dynamic_slice` are operands; those of a `slice` are parameters.
    """
    old_shape, sizes = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    cut = {axis for axis, size in enumerate(sizes) if size != old_shape[axis]}
    if cut & set(weight.channel):
        return None
    # A single layer is no longer stacked.
    single = [i for i, axis in enumerate(weight.stack) if axis in cut and sizes[axis] == 1]
    cut_layers = {i: axis for i, axis in enumerate(weight.stack) if axis in cut}

    def move_part(z: jax.Array, operands: Operands) -> jax.Array:
        return _slice(eqn, z, {axis: axis for axis in cut}, operands)

    def move_layers(x: jax.Array, operands: Operands) -> jax.Array:
        x = _slice(eqn, x, {axis: i for i, axis in cut_layers.items()}, operands)
        return jnp.squeeze(x, single)

    bounds = {(weight.stack_of_leaf[i], _bounds(eqn, axis)) for i, axis in cut_layers.items()}
    left = [i for i in range(len(weight.stack)) if i not in single]
    moved = weight._replace(
        stack=tuple(weight.stack[i] for i in left),
        stack_of_leaf=tuple(weight.stack_of_leaf[i] for i in left),
        layers=weight.layers | {(bound, len(weight.layers)) for bound in bounds},
    )
    return Moved(moved, move_part, move_layers)


def _slice(
    eqn: core.JaxprEqn, x: jax.Array, axes: Mapping[int, int], operands: Operands
) -> jax.Array:
    """Slices an array like a weight; `axes` maps axes of the weight to those of the array."""
    for axis, x_axis in axes.items():
        size = shape_of(eqn.outvars[0])[axis]
        if eqn.primitive is primitives.dynamic_slice_p:
            start = operands[1 + axis]
            # JAX has already counted negative starts from the end; those that are left are clamped.
            x = lax.dynamic_slice_in_dim(x, start, size, x_axis, allow_negative_indices=False)
        else:
            start, limit, stride = _static_bounds(eqn, axis)
            x = lax.slice_in_dim(x, start, limit, stride, x_axis)
    return x


def _static_bounds(eqn: core.JaxprEqn, axis: int) -> tuple[int, int, int]:
    strides = eqn.params["strides"]
    start, limit = (eqn.params[name][axis] for name in ("start_indices", "limit_indices"))
    return start, limit, strides[axis] if strides else 1


def _bounds(eqn: core.JaxprEqn, axis: int) -> Hashable:
    """The bounds of a slice, equal only for slices that certainly have the same layers."""
    return object() if eqn.primitive is primitives.dynamic_slice_p else _static_bounds(eqn, axis)


def _joined(
    eqn: core.JaxprEqn, operands: Sequence[tuple[Weight, ...]], learns: Sequence[bool]
) -> Move | None:
    """Several weights in one value, as the gates of a recurrent cell."""
    axis = eqn.params["dimension"]
    start, joined = 0, []
    for v, weights, learn in zip(eqn.invars, operands, learns, strict=True):
        size = shape_of(v)[axis]
        if (learn and not weights) or any(x.box or axis in x.stack for x in weights):
            return None
        joined += [weight._replace(box=products.Box(axis, start, size)) for weight in weights]
        start += size
    return Move([tuple(joined)], [lambda z, _: z] * len(joined), None)


_LayoutRule = Callable[[core.JaxprEqn, Weight, products.Target], Moved | None]
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
    primitives.slice_p: _sliced,
    primitives.dynamic_slice_p: _sliced,
}
# `jax.extend` does not export these.
_LAYOUT_BY_NAME: dict[str, _LayoutRule] = {
    "optimization_barrier": _same,
    "pvary": _varied,
    "reshard": _same,  # `explicit` shards the part like the result.
}
_FOR_JOINED = (_same, _varied, _converted, _transposed)


# Other operations that work along some axes only. Each rule returns the weight in the result.


def _reduced(eqn: core.JaxprEqn, weight: Weight) -> Weight | None:
    removed = set(eqn.params["axes"])
    if removed & weight.axes:
        return None

    def left(axes: Axes) -> Axes:
        return tuple(axis - sum(x < axis for x in removed) for axis in axes)

    return weight._replace(channel=left(weight.channel), stack=left(weight.stack))


def _along(name: str) -> _LocalRule:
    """The rule of an operation along the axis that a parameter names."""

    def rule(eqn: core.JaxprEqn, weight: Weight) -> Weight | None:
        return None if eqn.params[name] in weight.axes else weight

    return rule


def _padded(eqn: core.JaxprEqn, weight: Weight) -> Weight | None:
    padded = {axis for axis, pad in enumerate(eqn.params["padding_config"]) if any(pad)}
    return None if padded & weight.axes else weight


_LocalRule = Callable[[core.JaxprEqn, Weight], Weight | None]
_LOCAL: dict[core.Primitive, _LocalRule] = {
    primitives.reduce_sum_p: _reduced,
    primitives.reduce_max_p: _reduced,
    primitives.reduce_min_p: _reduced,
    primitives.reduce_prod_p: _reduced,
    primitives.argmax_p: _reduced,
    primitives.argmin_p: _reduced,
    primitives.cumsum_p: _along("axis"),
    primitives.cumprod_p: _along("axis"),
    primitives.cummax_p: _along("axis"),
    primitives.sort_p: _along("dimension"),
    primitives.concatenate_p: _along("dimension"),
    primitives.pad_p: _padded,
}
_LOCAL_BY_NAME = {"split": _along("axis")}  # `jax.extend` does not export it.
