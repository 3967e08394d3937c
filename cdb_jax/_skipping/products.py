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
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from cdb_jax._skipping import jaxprs, parts
from cdb_jax._skipping.reasons import Obstacle, Reason
from cdb_jax.selection import Mode, Part


class Operation(NamedTuple):
    """A primitive with two operands, and its parameters. Hashable, so that it can be static."""

    primitive: core.Primitive
    params: tuple[tuple[str, Any], ...]

    @classmethod
    def of_equation(cls, eqn: core.JaxprEqn, **changes: Any) -> Operation:
        return cls(eqn.primitive, tuple((eqn.params | changes).items()))

    def replace(self, **changes: Any) -> Operation:
        return self._replace(params=tuple((dict(self.params) | changes).items()))

    def __call__(self, lhs: Any, rhs: Any) -> jax.Array:
        return self.primitive.bind(lhs, rhs, **dict(self.params))


class Target(NamedTuple):
    """The modes that a layer may have, and the part that it keeps if it is partial."""

    modes: tuple[Mode, ...]
    part: Part | None

    @property
    def is_compact(self) -> bool:
        """Whether nothing outside the kept part ever has a gradient."""
        return self.part is not None and Mode.FULL not in self.modes

    def shape(self, shape: tuple[int, ...], channel: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the gradient of a weight."""
        if self.part is None or not self.is_compact:
            return tuple(shape)
        return self.part.shape(shape, channel)


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

    @property
    def cuts_early(self) -> bool:
        """Whether only a part of x is ever needed, so that only this part has to be stored."""
        return Mode.FULL not in self.target.modes and bool(self.x_channel)

    def cut(self, x: jax.Array, place: jax.Array) -> jax.Array:
        if self.x_part is None:
            return x
        return parts.take(x, self.x_channel, self.x_stack, self.x_part, place)


def dot_product(
    op: Operation,
    side: int,
    ranks: tuple[int, int],
    channel: tuple[int, ...],
    stack: tuple[int, ...],
    target: Target,
) -> Product | Obstacle:
    """Describes a `dot_general` with a weight, or says why it is not skipped."""
    contract, batch = dict(op.params)["dimension_numbers"]
    free = [
        [axis for axis in range(ranks[s]) if axis not in (*contract[s], *batch[s])] for s in (0, 1)
    ]
    # A result has the batch axes first, then the free axes of the first and the second operand.
    first_free = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    if any(axis not in batch[side] for axis in stack):
        return Obstacle(Reason.STACK_IN_ONE_PRODUCT)
    if stack and target.modes != (Mode.PARTIAL,):
        return Obstacle(Reason.STACK_IN_ONE_BATCH)

    def place(axes: tuple[int, ...], among: Sequence[int]) -> tuple[int, ...]:
        return tuple(tuple(among).index(axis) for axis in axes)

    product = Product(op, op, side, target, w_channel=channel, w_stack=stack, x_part=target.part)
    y_stack = place(stack, batch[side])
    product = product._replace(y_stack=y_stack, x_stack=tuple(batch[1 - side][i] for i in y_stack))
    if set(channel) <= set(free[side]):
        y_channel = tuple(first_free + i for i in place(channel, free[side]))
        return product._replace(y_channel=y_channel)
    if set(channel) <= set(contract[side]):
        x_channel = tuple(contract[1 - side][i] for i in place(channel, contract[side]))
        return product._replace(x_channel=x_channel)
    if set(channel) <= set(batch[side]):
        y_channel = place(channel, batch[side])
        x_channel = tuple(batch[1 - side][i] for i in y_channel)
        return product._replace(x_channel=x_channel, y_channel=y_channel)
    return Obstacle(Reason.MIXED_CHANNELS)


def convolution(
    op: Operation,
    side: int,
    kernel_shape: tuple[int, ...],
    channel: tuple[int, ...],
    stack: tuple[int, ...],
    target: Target,
) -> Product | Obstacle:
    """Describes a `conv_general_dilated` with a kernel, or says why it is not skipped."""
    params = dict(op.params)
    x_spec, kernel_spec, y_spec = params["dimension_numbers"]
    output_axis, input_axis = kernel_spec[:2]
    feature_groups = params["feature_group_count"]
    if side == 0:
        return Obstacle(Reason.CONVOLVED)
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
      z: an array of the shape of the weight's gradient, `Target.shape`, whose values do not matter.
        It receives the gradient.
      place: where the kept part lies.
      mode: what the layer does in this step.
    """

    z: jax.Array
    place: jax.Array
    mode: jax.Array


def multiply(
    product: Product, x: jax.Array, w: jax.Array, change: Change, needed: jax.Array | bool
) -> jax.Array:
    """The product of `x` and a weight, differentiable in `x` and `change.z` only.

    `needed` is whether anything that `x` depends on learns in this step; if not, the gradient of
    `x` is zero. A Python bool saves a conditional.
    """
    operands, flags = _ordered(product.side, w, x), _ordered(product.side, False, needed)
    return _apply(_Call.of(product.op, operands, flags, product), *operands, change, flags)


def gate(
    op: Operation, lhs: jax.Array, rhs: jax.Array, needed: tuple[jax.Array | bool, ...]
) -> jax.Array:
    """A product without a weight; `needed` has one flag per operand, as in `multiply`."""
    return _apply(_Call.of(op, (lhs, rhs), needed, None), lhs, rhs, None, needed)


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
      product: the product with a weight; None for other products.
    """

    op: Operation
    types: tuple[Any, ...]
    needed: tuple[bool | None, ...]
    product: Product | None

    @classmethod
    def of(cls, op: Operation, operands: Any, flags: Any, product: Product | None) -> _Call:
        needed = tuple(flag if isinstance(flag, bool) else None for flag in flags)
        return cls(op, tuple(map(jax.typeof, operands)), needed, product)


class _Residuals(NamedTuple):
    operands: tuple[jax.Array | None, ...]  # None if the other one needs no gradient.
    x: jax.Array | None  # x or its part, if the weight needs a gradient.
    place: jax.Array | None
    mode: jax.Array | None
    needed: tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(call: _Call, lhs: Any, rhs: Any, change: Any, needed: Any) -> jax.Array:
    return call.op(lhs, rhs)


def _apply_fwd(
    call: _Call, lhs: Any, rhs: Any, change: Any, needed: Any
) -> tuple[jax.Array, _Residuals]:
    saved = (
        lhs.value if rhs.perturbed and call.needed[1] is not False else None,
        rhs.value if lhs.perturbed and call.needed[0] is not False else None,
    )
    x = place = mode = None
    if call.product and change.z.perturbed:
        x, place, mode = (
            (lhs, rhs)[1 - call.product.side].value,
            change.place.value,
            change.mode.value,
        )
        if call.product.cuts_early:
            x = call.product.cut(x, place)
    flags = tuple(flag.value for flag in needed)
    return call.op(lhs.value, rhs.value), _Residuals(saved, x, place, mode, flags)


def _apply_bwd(call: _Call, saved: _Residuals, dy: Any) -> tuple[Any, ...]:
    if isinstance(dy, SymbolicZero):
        return (None,) * 4
    gradients: list[jax.Array | None] = [None, None]
    for side in (0, 1):
        other = saved.operands[1 - side]
        if other is not None:
            gradient = Gradient(call.op, side, call.types[side])
            if call.needed[side]:
                gradients[side] = gradient.compute(dy, other)
            else:
                compute = functools.partial(gradient.compute, slow=_SLOW_IN_CONDITIONALS)
                gradients[side] = _if(saved.needed[side], compute, call.types[side], dy, other)
    change = None
    if call.product and saved.x is not None:
        w_type = call.types[call.product.side]
        dz = weight_gradient(call.product, w_type, saved.x, dy, saved.place, saved.mode)
        change = Change(dz, None, None)  # type: ignore[arg-type]
    return *gradients, change, None


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
    kept_dy = parts.take(dy, product.y_channel, product.y_stack, part, place)
    kept_shape = part.shape(w_type.shape, product.w_channel)
    kept_type = jax.typeof(jnp.zeros_like(dy, w_type.dtype, kept_shape))  # Varies like `dy`.
    gradient = Gradient(product.part_op, product.side, kept_type)
    dw = gradient.compute(kept_dy, kept_x, _slow(product))
    if product.target.is_compact:
        return dw
    return parts.put(dw, w_type.shape, product.w_channel, product.w_stack, part, place)


def _full_gradient(
    product: Product, w_type: Any, x: jax.Array, dy: jax.Array, place: jax.Array
) -> jax.Array:
    gradient = Gradient(product.op, product.side, w_type)
    return gradient.compute(dy, x, _slow(product))


# Gradients of an operand, which JAX finds by transposing the product.


class Gradient(NamedTuple):
    """The gradient of the operand at position `side`. Static."""

    op: Operation
    side: int
    operand_type: Any

    def compute(
        self, dy: jax.Array, other: jax.Array, slow: tuple[core.Primitive, ...] = ()
    ) -> jax.Array:
        """The gradient, given the cotangent of the product and the other operand.

        On CPU, operations named in `slow` get their axes in the order that is fast there.
        """
        return _transposed(self, slow, dy, other)


def _if(flag: jax.Array, f: Any, out_type: Any, *operands: jax.Array) -> jax.Array:
    """`f(*operands)` if the flag is set at run time, else zeros."""

    def zeros(x: jax.Array, *_: jax.Array) -> jax.Array:
        # Made from an operand, so that it varies over the same axes of a `shard_map`.
        return jnp.zeros_like(x, out_type.dtype, out_type.shape)

    return lax.cond(flag, f, zeros, *operands)


# XLA's CPU compiler has fast kernels for one order of axes only. It reorders convolutions, but not
# inside a conditional, where a weight gradient then takes a hundred times as long. A sum over
# several axes, as in weight gradients of batches of sequences, takes up to twice as long as one
# over a single axis.
_SLOW = (dot_general_p,)
_SLOW_IN_CONDITIONALS = (dot_general_p, conv_general_dilated_p)


def _slow(product: Product) -> tuple[core.Primitive, ...]:
    """The primitives that are slow in the weight gradient of a product."""
    return _SLOW_IN_CONDITIONALS if len(product.target.modes) > 1 else _SLOW


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _transposed(
    gradient: Gradient, slow: tuple[core.Primitive, ...], dy: jax.Array, other: jax.Array
) -> jax.Array:
    """`Gradient.compute`, traced once for equal products."""

    def product(x: Any, other: Any) -> jax.Array:
        return gradient.op(*_ordered(gradient.side, x, other))

    def transposed(dy: jax.Array, other: jax.Array) -> jax.Array:
        transpose = jax.linear_transpose(lambda x: product(x, other), gradient.operand_type)
        return transpose(dy)[0]

    program, consts = jaxprs.opened(jax.make_jaxpr(transposed)(dy, other))

    def in_order(dy: jax.Array, other: jax.Array) -> jax.Array:
        values = dict(zip(program.constvars, consts, strict=True))
        values |= dict(zip(program.invars, (dy, other), strict=True))
        for eqn in program.eqns:
            operands = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
            if _is_slow(eqn, slow):
                results = [_IN_ORDER[eqn.primitive](eqn, *operands)]
            else:
                results = jaxprs.apply(eqn, program, operands)
            values.update(zip(eqn.outvars, results, strict=True))
        (result,) = filter(jaxprs.is_variable, program.outvars)
        return values[result]

    if not any(_is_slow(eqn, slow) for eqn in program.eqns):
        return transposed(dy, other)
    return lax.platform_dependent(dy, other, cpu=in_order, default=transposed)


def _is_slow(eqn: core.JaxprEqn, slow: tuple[core.Primitive, ...]) -> bool:
    if eqn.primitive is dot_general_p and len(eqn.params["dimension_numbers"][0][0]) < 2:
        return False
    return eqn.primitive in slow


def _dot_in_order(eqn: core.JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A product that sums over one axis instead of several adjacent ones."""
    contract, batch = eqn.params["dimension_numbers"]
    order = sorted(range(len(contract[0])), key=lambda i: contract[0][i])
    contract = [[axes[i] for i in order] for axes in contract]
    are_adjacent = all(list(np.diff(axes)) == [1] * (len(axes) - 1) for axes in contract)
    if len(order) < 2 or not are_adjacent:
        return Operation.of_equation(eqn)(lhs, rhs)
    merged = [
        x.reshape(*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :])
        for x, axes in zip((lhs, rhs), contract, strict=True)
    ]
    removed = len(order) - 1
    batch = [
        tuple(axis - removed if axis > summed[0] else axis for axis in axes)
        for axes, summed in zip(batch, contract, strict=True)
    ]
    numbers = (tuple((axes[0],) for axes in contract), tuple(batch))
    return Operation.of_equation(eqn, dimension_numbers=numbers)(*merged)


def _convolution_in_order(eqn: core.JaxprEqn, x: jax.Array, w: jax.Array) -> jax.Array:
    """A convolution with axes (batch, ..., features) and (..., in, out), the order of XLA's CPU."""
    x_spec, kernel_spec, y_spec = eqn.params["dimension_numbers"]
    rank = x.ndim
    axes = (0, rank - 1, *range(1, rank - 1))
    numbers = lax.ConvDimensionNumbers(axes, (rank - 1, rank - 2, *range(rank - 2)), axes)
    y = Operation.of_equation(eqn, dimension_numbers=numbers)(
        jnp.transpose(x, _features_last(x_spec)),
        jnp.transpose(w, (*kernel_spec[2:], kernel_spec[1], kernel_spec[0])),
    )
    order = _features_last(y_spec)
    return jnp.transpose(y, [order.index(axis) for axis in range(rank)])


def _features_last(spec: Sequence[int]) -> tuple[int, ...]:
    return (spec[0], *spec[2:], spec[1])


_IN_ORDER = {dot_general_p: _dot_in_order, conv_general_dilated_p: _convolution_in_order}
