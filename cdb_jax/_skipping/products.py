r"""Products whose weight gradient is computed for the kept channels only.

A product :math:`y = x \cdot w` (`dot_general`, `conv_general_dilated`) is linear in its weight, and
so is its restriction to some channels of the weight. Output channels of the weight are channels of
the cotangent of :math:`y`; input channels are those of :math:`x`. The transpose of the product of
these parts is the kept part of the weight gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.sharding import PartitionSpec

from cdb_jax import _cpu_order as cpu_order, _explicit as explicit, _parts as parts
from cdb_jax._skipping.reasons import Obstacle, Reason
from cdb_jax.selection import Mode, Part

Axes = tuple[int, ...]


class Operation(NamedTuple):
    """A primitive with two operands, and its parameters. Hashable, so that it can be static."""

    primitive: core.Primitive
    params: tuple[tuple[str, Any], ...]

    @classmethod
    def of_equation(cls, eqn: core.JaxprEqn) -> Operation:
        return cls(eqn.primitive, tuple(eqn.params.items()))

    def replace(self, **changes: Any) -> Operation:
        return self._replace(params=tuple((dict(self.params) | changes).items()))

    @property
    def without_sharding(self) -> Operation:
        return self.replace(out_sharding=None)

    def __call__(self, lhs: Any, rhs: Any) -> jax.Array:
        return self.primitive.bind(lhs, rhs, **dict(self.params))


class Target(NamedTuple):
    """The modes that a layer may have, and the part that it keeps if it is partial."""

    modes: tuple[Mode, ...]
    part: Part | None

    @property
    def compact_part(self) -> Part | None:
        """The part that holds every nonzero gradient; None if the whole weight may have one."""
        return None if Mode.FULL in self.modes else self.part

    def shape(self, shape: tuple[int, ...], channel: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the gradient of a weight."""
        return self.compact_part.shape(shape, channel) if self.compact_part else tuple(shape)

    def spec(self, w: Any, channel: Axes) -> PartitionSpec:
        """The explicit sharding of the gradient of a weight."""
        return explicit.part_spec(w, channel, self.compact_part)

    def take(self, w: jax.Array, channel: Axes, stack: Axes, place: jax.Array) -> jax.Array:
        """The part of a weight that has a gradient."""
        part = self.compact_part
        if part is None:
            return w

        def take(w: jax.Array, place: jax.Array) -> jax.Array:
            return parts.take(w, channel, stack, part, place)

        return explicit.call(take, lambda: self.spec(w, channel), w, place)


class Box(NamedTuple):
    """A part of an array: `size` entries of `axis` from `start`."""

    axis: int
    start: int
    size: int

    @classmethod
    def cut(cls, x: jax.Array, box: Box | None) -> jax.Array:
        return lax.slice_in_dim(x, box.start, box.start + box.size, axis=box.axis) if box else x


class Product(NamedTuple):
    """A product with a weight w; x is its other operand, and y the result. Static.

    Attributes:
      op: the operation on whole operands.
      part_op: the operation on parts.
      side: the position of w among the operands.
      target: what may happen to w.
      w_channel, x_channel, y_channel: the axes that hold the channels of w.
      w_stack, x_stack, y_stack: the axes along which several layers are stacked.
      x_part: the part of x that belongs to the kept part of w.
      w_box, x_box, y_box: where w lies in an operand that joins several weights, and the parts of
        x and y that belong to it. None stands for the whole array.
    """

    op: Operation
    part_op: Operation
    side: int
    target: Target
    w_channel: tuple[int, ...] = ()
    x_channel: tuple[int, ...] = ()
    y_channel: tuple[int, ...] = ()
    w_stack: tuple[int, ...] = ()
    x_stack: tuple[int, ...] = ()
    y_stack: tuple[int, ...] = ()
    x_part: Part | None = None
    w_box: Box | None = None
    x_box: Box | None = None
    y_box: Box | None = None

    @property
    def cuts_early(self) -> bool:
        """Whether only a part of x is ever needed, so that only this part has to be stored."""
        return Mode.FULL not in self.target.modes and bool(self.x_channel)

    def cut(self, x: jax.Array, place: jax.Array) -> jax.Array:
        """The part of x that belongs to the kept part of w."""
        x = Box.cut(x, self.x_box)
        if self.x_part is None:
            return x
        return parts.take(x, self.x_channel, self.x_stack, self.x_part, place)

    def cut_early(self, x: jax.Array, place: jax.Array) -> jax.Array:
        """What has to be stored of x."""
        if not self.cuts_early:
            return x
        return explicit.call(
            self.cut, lambda: explicit.part_spec(x, self.x_channel, self.x_part), x, place
        )


class DotAxes(NamedTuple):
    """The roles of the axes of a `dot_general` whose operands are a weight w and another array x.

    Each field except `side` holds the axes of the first operand, and then those of the second.
    """

    side: int  # The position of w among the operands.
    contract: Sequence[tuple[int, ...]]
    batch: Sequence[tuple[int, ...]]
    free: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, op: Operation, side: int, ranks: tuple[int, int]) -> DotAxes:
        contract, batch = dict(op.params)["dimension_numbers"]
        free = [
            tuple(axis for axis in range(ranks[s]) if axis not in (*contract[s], *batch[s]))
            for s in (0, 1)
        ]
        return cls(side, contract, batch, free)

    def x_axes(self, w_axes: Sequence[int]) -> tuple[int, ...]:
        """Axes of x that correspond to batch or contracted axes of the weight."""
        w, x = self.side, 1 - self.side
        w_order = (*self.batch[w], *self.contract[w])
        x_order = (*self.batch[x], *self.contract[x])
        return tuple(x_order[w_order.index(axis)] for axis in w_axes)

    def y_axes(self, w_axes: Sequence[int]) -> tuple[int, ...]:
        """Axes of the result that correspond to batch or free axes of the weight."""
        # A result has the batch axes first, then the free axes of the first and second operand.
        w_order = [*self.batch[self.side], *self.free[self.side]]
        num_batch = len(self.batch[0])
        offset = len(self.free[0]) if self.side == 1 else 0
        places = [w_order.index(axis) for axis in w_axes]
        return tuple(place if place < num_batch else place + offset for place in places)


def dot_product(
    op: Operation,
    side: int,
    ranks: tuple[int, int],
    channel: tuple[int, ...],
    stack: tuple[int, ...],
    target: Target,
    box: Box | None = None,
) -> Product | Obstacle:
    """Describes a `dot_general` with a weight, or says why it is not skipped."""
    axes = DotAxes.of(op, side, ranks)
    contract, batch, free = (kind[side] for kind in (axes.contract, axes.batch, axes.free))
    is_outer = set(channel) <= set(free) and set(stack) <= {*batch, *free}
    if not is_outer and any(axis not in batch for axis in stack):
        return Obstacle(Reason.STACK_IN_ONE_PRODUCT)
    if stack and target.modes != (Mode.PARTIAL,):
        return Obstacle(Reason.STACK_IN_ONE_BATCH)
    y_box = x_box = None
    if box and box.axis not in contract:
        y_box = box._replace(axis=axes.y_axes([box.axis])[0])
    if box and box.axis not in free:
        x_box = box._replace(axis=axes.x_axes([box.axis])[0])
    product = Product(
        *(op, op, side, target),
        w_channel=channel,
        w_stack=stack,
        y_stack=axes.y_axes(stack),
        x_stack=() if is_outer else axes.x_axes(stack),
        x_part=target.part,
        w_box=box,
        x_box=x_box,
        y_box=y_box,
    )
    if set(channel) <= set(free):
        return product._replace(y_channel=axes.y_axes(channel))
    if set(channel) <= set(contract):
        return product._replace(x_channel=axes.x_axes(channel))
    if set(channel) <= set(batch):
        return product._replace(x_channel=axes.x_axes(channel), y_channel=axes.y_axes(channel))
    return Obstacle(Reason.MIXED_CHANNELS)


def convolution(
    op: Operation,
    side: int,
    kernel_shape: tuple[int, ...],
    channel: tuple[int, ...],
    stack: tuple[int, ...],
    target: Target,
    box: Box | None = None,
) -> Product | Obstacle:
    """Describes a `conv_general_dilated` with a kernel, or says why it is not skipped."""
    params = dict(op.params)
    x_spec, kernel_spec, y_spec = params["dimension_numbers"]
    output_axis, input_axis = kernel_spec[:2]
    feature_groups = params["feature_group_count"]
    if side == 0:
        return Obstacle(Reason.CONVOLVED)
    if box:
        return Obstacle(Reason.JOINED)
    if stack or params["batch_group_count"] != 1:
        return Obstacle(Reason.SEVERAL_CONVOLUTIONS)
    part = target.part
    product = Product(op, op, side, target, w_channel=channel, x_part=part)
    if part is None:
        return product
    if channel == (input_axis,):
        # A kernel holds the inputs of one feature group, and every group keeps the same ones.
        x_part = part._replace(blocks=feature_groups * part.blocks)
        return product._replace(x_channel=(x_spec[1],), x_part=x_part)
    if channel != (output_axis,):
        return Obstacle(Reason.NO_FEATURE_AXIS)
    product = product._replace(y_channel=(y_spec[1],))
    if part.blocks % feature_groups == 0:
        return product
    if kernel_shape[input_axis] == 1 and kernel_shape[output_axis] == feature_groups:  # Depthwise.
        part_op = op.replace(feature_group_count=part.total)
        return product._replace(x_channel=(x_spec[1],), part_op=part_op)
    return Obstacle(Reason.FEATURE_GROUPS, feature_groups)


class Change(NamedTuple):
    """What accompanies a weight at run time.

    Attributes:
      z: the array that receives the gradient. It has shape `Target.shape`, and its values do not
        matter. After an operation that changes more than the layout, it is the whole weight.
      place: where the kept part lies.
      mode: what the layer does in this step.
    """

    z: jax.Array
    place: jax.Array
    mode: jax.Array


def multiply(
    products: tuple[Product, ...],
    x: jax.Array,
    w: jax.Array,
    changes: Sequence[Change],
    needed: jax.Array | bool,
) -> jax.Array:
    """The product of `x` and `w`, differentiable in `x` and in `z` of each change only.

    There is one product for each weight in `w`; only a value that joins several has more than one.
    `needed` is whether anything that `x` depends on learns in this step; if not, the gradient of
    `x` is zero. A Python bool saves a conditional.
    """
    op, side = products[0].op, products[0].side
    operands, flags = _ordered(side, w, x), _ordered(side, False, needed)
    return _apply(_Call.of(op, operands, flags, products), *operands, tuple(changes), flags)


def gate(
    op: Operation, lhs: jax.Array, rhs: jax.Array, needed: tuple[jax.Array | bool, ...]
) -> jax.Array:
    """A product without a weight; `needed` has one flag per operand, as in `multiply`."""
    return _apply(_Call.of(op, (lhs, rhs), needed, ()), lhs, rhs, (), needed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def whole(
    channel: Axes, stack: Axes, target: Target, w: jax.Array, z: jax.Array, place: jax.Array
) -> jax.Array:
    """A weight whose gradient goes to `z`; see `Change`."""
    return w


def _whole_fwd(
    channel: Axes, stack: Axes, target: Target, w: jax.Array, z: jax.Array, place: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return w, place


def _whole_bwd(
    channel: Axes, stack: Axes, target: Target, place: jax.Array, dw: jax.Array
) -> tuple[Any, ...]:
    return None, target.take(dw, channel, stack, place), None


whole.defvjp(_whole_fwd, _whole_bwd)


def _ordered(side: int, operand: Any, other: Any) -> tuple[Any, Any]:
    """The two operands of a product, with `operand` at position `side`."""
    return (operand, other) if side == 0 else (other, operand)


class _Call(NamedTuple):
    """What is static in the product of two operands.

    Attributes:
      op: the operation.
      types: the types of the operands.
      needed: for each operand, whether its gradient is needed; None if that is known only at run
        time. False for a weight, whose gradient goes to its change.
      products: the product with each weight; empty if both operands are something else.
    """

    op: Operation
    types: tuple[Any, ...]
    needed: tuple[bool | None, ...]
    products: tuple[Product, ...]

    @classmethod
    def of(cls, op: Operation, operands: Any, flags: Any, products: tuple[Product, ...]) -> _Call:
        needed = tuple(flag if isinstance(flag, bool) else None for flag in flags)
        return cls(op, tuple(map(jax.typeof, operands)), needed, products)


class _Saved(NamedTuple):
    """What the gradient of one weight needs; `x` is only a part if the product cuts early."""

    x: jax.Array
    place: jax.Array
    mode: jax.Array


class _Residuals(NamedTuple):
    operands: tuple[jax.Array | None, ...]  # None if the other one needs no gradient.
    weights: tuple[_Saved | None, ...]  # None for a weight that needs no gradient.
    needed: tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(call: _Call, lhs: Any, rhs: Any, changes: Any, needed: Any) -> jax.Array:
    return call.op(lhs, rhs)


def _apply_fwd(
    call: _Call, lhs: Any, rhs: Any, changes: Any, needed: Any
) -> tuple[jax.Array, _Residuals]:
    operands = (
        lhs.value if rhs.perturbed and call.needed[1] is not False else None,
        rhs.value if lhs.perturbed and call.needed[0] is not False else None,
    )
    weights: list[_Saved | None] = []
    for product, change in zip(call.products, changes, strict=True):
        if not change.z.perturbed:
            weights.append(None)
            continue
        x, place = (lhs, rhs)[1 - product.side].value, change.place.value
        weights.append(_Saved(product.cut_early(x, place), place, change.mode.value))
    flags = tuple(flag.value for flag in needed)
    return call.op(lhs.value, rhs.value), _Residuals(operands, tuple(weights), flags)


def _apply_bwd(call: _Call, residuals: _Residuals, dy: Any) -> tuple[Any, ...]:
    if isinstance(dy, SymbolicZero):
        return (None,) * 4
    gradients: list[jax.Array | None] = [None, None]
    for side in (0, 1):
        other = residuals.operands[1 - side]
        if other is not None:
            if call.needed[side]:
                gradients[side] = _transposed(call.op, side, call.types[side], (), dy, other)
            else:
                gradients[side] = _gradient_if(call, side, residuals.needed[side], dy, other)
    changes = tuple(
        saved and _gradient_of_change(call, product, saved, dy)
        for product, saved in zip(call.products, residuals.weights, strict=True)
    )
    return *gradients, changes, None


def _gradient_if(
    call: _Call, side: int, needed: jax.Array, dy: jax.Array, other: jax.Array
) -> jax.Array:
    """The gradient of an operand if it is needed, which is known only at run time."""
    operand_type = call.types[side]
    op, plain_type = call.op, operand_type
    if explicit.mesh_of(dy, other):
        op, plain_type = op.without_sharding, explicit.plain(operand_type)
    compute = functools.partial(_transposed, op, side, plain_type, cpu_order.SLOW_IN_CONDITIONALS)

    def computed(needed: jax.Array, dy: jax.Array, other: jax.Array) -> jax.Array:
        return _if(needed, compute, operand_type, dy, other)

    return explicit.call(computed, lambda: operand_type.sharding.spec, needed, dy, other)


def _gradient_of_change(call: _Call, product: Product, saved: _Saved, dy: jax.Array) -> Change:
    w_type = call.types[product.side]
    if product.w_box:
        shape = list(w_type.shape)
        shape[product.w_box.axis] = product.w_box.size
        w_type = w_type.update(shape=tuple(shape))
    operands = saved.x, dy, saved.place, saved.mode
    plain: tuple[Product, Any] = product, w_type
    if explicit.mesh_of(operands):
        op, part_op = (x.without_sharding for x in (product.op, product.part_op))
        plain = product._replace(op=op, part_op=part_op), explicit.plain(w_type)
    dz = explicit.call(
        functools.partial(weight_gradient, *plain),
        lambda: product.target.spec(w_type, product.w_channel),
        *operands,
    )
    return Change(dz, None, None)  # type: ignore[arg-type]


_apply.defvjp(_apply_fwd, _apply_bwd, symbolic_zeros=True)


# The gradient of a weight.


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)  # Traced once for equal layers.
def weight_gradient(
    product: Product, w_type: Any, x: jax.Array, dy: jax.Array, place: jax.Array, mode: jax.Array
) -> jax.Array:
    """The gradient of a weight; `x` is already cut if the product cuts early."""
    modes = product.target.modes
    operands = x, dy, place
    kept = functools.partial(_kept_gradient, product, w_type)
    full = functools.partial(_full_gradient, product, w_type)

    def learns(x: jax.Array, dy: jax.Array, place: jax.Array) -> jax.Array:
        if Mode.FULL not in modes:
            return kept(x, dy, place)
        if Mode.PARTIAL not in modes:
            return full(x, dy, place)
        return lax.cond(mode == Mode.FULL, full, kept, x, dy, place)

    if Mode.FROZEN not in modes:
        return learns(*operands)
    shape = product.target.shape(w_type.shape, product.w_channel)
    return _if(mode != Mode.FROZEN, learns, jax.ShapeDtypeStruct(shape, w_type.dtype), *operands)


def _kept_gradient(
    product: Product, w_type: Any, x: jax.Array, dy: jax.Array, place: jax.Array
) -> jax.Array:
    part = product.target.part
    assert part is not None
    kept_x = x if product.cuts_early else product.cut(x, place)
    kept_dy = parts.take(
        Box.cut(dy, product.y_box), product.y_channel, product.y_stack, part, place
    )
    kept_shape = part.shape(w_type.shape, product.w_channel)
    kept_type = jax.typeof(jnp.zeros_like(dy, w_type.dtype, kept_shape))  # Varies like `dy`.
    operation = product.part_op, product.side, kept_type
    dw = _transposed(*operation, _slow(product), kept_dy, kept_x)
    if product.target.compact_part:
        return dw
    return parts.put(dw, w_type.shape, product.w_channel, product.w_stack, part, place)


def _full_gradient(
    product: Product, w_type: Any, x: jax.Array, dy: jax.Array, place: jax.Array
) -> jax.Array:
    x, dy = Box.cut(x, product.x_box), Box.cut(dy, product.y_box)
    return _transposed(product.op, product.side, w_type, _slow(product), dy, x)


# Gradients of an operand, which JAX finds by transposing the product.


def _if(flag: jax.Array, f: Any, out_type: Any, *operands: jax.Array) -> jax.Array:
    """`f(*operands)` if the flag is set at run time, else zeros."""

    def zeros(x: jax.Array, *_: jax.Array) -> jax.Array:
        # Made from an operand, so that it varies over the same axes of a `shard_map`.
        return jnp.zeros_like(x, out_type.dtype, out_type.shape)

    return lax.cond(flag, f, zeros, *operands)


def _slow(product: Product) -> tuple[core.Primitive, ...]:
    """The primitives that are slow in the weight gradient of a product."""
    return cpu_order.SLOW_IN_CONDITIONALS if len(product.target.modes) > 1 else cpu_order.SLOW


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)  # Once for equal products.
def _transposed(
    op: Operation,
    side: int,
    operand_type: Any,
    slow: tuple[core.Primitive, ...],
    dy: jax.Array,
    other: jax.Array,
) -> jax.Array:
    """The gradient of the operand at position `side`, given that of the product and the other one.

    On CPU, the primitives in `slow` get their axes in the order that is fast there.
    """

    def transposed(dy: jax.Array, other: jax.Array) -> jax.Array:
        def product(x: Any) -> jax.Array:
            return op(*_ordered(side, x, other))

        return jax.linear_transpose(product, operand_type)(dy)[0]

    return cpu_order.reordered(transposed, slow)(dy, other)
