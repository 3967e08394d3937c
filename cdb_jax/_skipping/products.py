r"""Products whose weight gradient is computed for the kept channels only.

A product :math:`y = x \cdot w` (`dot_general`, `conv_general_dilated`) is linear in its weight, and
so is its restriction to some channels of the weight. Output channels of the weight are channels of
the cotangent of :math:`y`, input channels those of :math:`x`: cut these, and the transposed product
of the parts is the kept part of the weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from cdb_jax._skipping import jaxprs, parts
from cdb_jax.selection import Mode, Part

BinaryOp = Callable[[jax.Array, jax.Array], jax.Array]


class Target(NamedTuple):
    """What may happen to a layer: its possible modes, and the part it keeps if it is partial."""

    modes: tuple[Mode, ...]
    part: Part | None

    @property
    def compact(self) -> bool:
        """Whether the kept part is all of the gradient there can be."""
        return self.part is not None and Mode.FULL not in self.modes

    def shape(self, shape: tuple[int, ...], channel: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the gradient of a weight."""
        if self.compact:
            assert self.part is not None
            return self.part.shape(shape, channel)
        return tuple(shape)


class Product(NamedTuple):
    """A product with a weight, and where the channels of the weight are.

    `side` is the position of the weight w among the operands; x is the other one, y the result.
    `w_channel`, `x_channel` and `y_channel` are the axes that hold the channels of the weight;
    `w_stack`, `x_stack` and `y_stack` those along which several layers are stacked. `part_op` is
    the operation on parts, and `x_part` the part of x.
    """

    op: BinaryOp
    part_op: BinaryOp
    side: int
    target: Target
    w_channel: tuple[int, ...] = ()
    x_channel: tuple[int, ...] = ()
    y_channel: tuple[int, ...] = ()
    w_stack: tuple[int, ...] = ()
    x_stack: tuple[int, ...] = ()
    y_stack: tuple[int, ...] = ()
    x_part: Part | None = None

    def of(self, op: BinaryOp, x: jax.Array, w: jax.Array) -> jax.Array:
        return op(w, x) if self.side == 0 else op(x, w)


def operation(eqn: core.JaxprEqn) -> Callable[..., jax.Array]:
    """The operation of an equation with two operands, whatever parameters it has."""
    return partial(eqn.primitive.bind, **eqn.params)


def dot_product(
    op: BinaryOp,
    params: dict[str, Any],
    side: int,
    ranks: tuple[int, int],
    channel: tuple[int, ...],
    stack: tuple[int, ...],
    target: Target,
) -> Product | str:
    """Describes a `dot_general` with a weight, or says why the weight is not understood."""
    contract, batch = params["dimension_numbers"]
    lhs_free, rhs_free = (
        [i for i in range(ranks[s]) if i not in contract[s] and i not in batch[s]] for s in (0, 1)
    )
    # The axes of a result: batch, then what is left of the two operands.
    first_free = len(batch[0]) + (len(lhs_free) if side == 1 else 0)
    free = lhs_free if side == 0 else rhs_free
    other = 1 - side

    if any(axis not in batch[side] for axis in stack):
        return "layers of a stack meet in one product"
    if stack and target.modes != (Mode.PARTIAL,):
        return "stacked layers are computed together, but stand still one by one"
    places = [tuple(batch[side]).index(axis) for axis in stack]
    description = Product(
        op,
        op,
        side,
        target,
        w_channel=channel,
        w_stack=stack,
        x_stack=tuple(batch[other][i] for i in places),
        y_stack=tuple(places),
        x_part=target.part,
    )
    if all(axis in free for axis in channel):
        return description._replace(
            y_channel=tuple(first_free + free.index(axis) for axis in channel)
        )
    if all(axis in contract[side] for axis in channel):
        x = tuple(contract[other][tuple(contract[side]).index(axis)] for axis in channel)
        return description._replace(x_channel=x)
    if all(axis in batch[side] for axis in channel):
        y = tuple(tuple(batch[side]).index(axis) for axis in channel)
        return description._replace(x_channel=tuple(batch[other][i] for i in y), y_channel=y)
    return "its channels are partly summed over and partly not"


def convolution(
    op: Callable[..., jax.Array],
    params: dict[str, Any],
    side: int,
    kernel_shape: tuple[int, ...],
    channel: tuple[int, ...],
    stack: tuple[int, ...],
    target: Target,
) -> Product | str:
    """Describes a `conv_general_dilated` with a kernel, or says why it is not understood."""
    (_, x_features, *_), (out, into, *_), (_, y_features, *_) = params["dimension_numbers"]
    groups = params["feature_group_count"]
    if side == 0:
        return "it is the image of a convolution, not the kernel"
    if stack or params["batch_group_count"] != 1:
        return "several convolutions in one"
    part = target.part
    description = Product(op, op, side, target, w_channel=channel, x_part=part)
    if part is None:
        return description
    if channel == (into,):
        # The channels of a kernel in groups are the inputs of each group.
        x_part = part._replace(blocks=groups * part.blocks)
        return description._replace(x_channel=(x_features,), x_part=x_part)
    if channel != (out,):
        return "its channels are no feature axis of the convolution"
    description = description._replace(y_channel=(y_features,))
    if part.blocks % groups == 0:
        return description
    if kernel_shape[into] == 1 and kernel_shape[out] == groups:  # Depthwise.
        part_op = partial(op, feature_group_count=part.total)
        return description._replace(x_channel=(x_features,), part_op=part_op)
    return (
        f"a convolution in {groups} groups, of which a part of the channels is none; "
        f'channel_choice="window" with window_groups a multiple of {groups} is'
    )


def multiply(
    product: Product,
    x: jax.Array,
    w: jax.Array,
    z: jax.Array,
    at: jax.Array,
    state: jax.Array,
    needed: jax.Array | bool,
) -> jax.Array:
    """The product of `x` and `w`, differentiable in `x` and `z` only.

    Args:
      product: what to compute.
      x: the other operand.
      w: the weight.
      z: stands for a change of the weight, of shape `product.target.shape(w.shape,
        product.w_channel)`; its values do not matter. Its gradient is that of the weight.
      at: where the kept part lies.
      state: what the layer does in this step.
      needed: whether anything that learns in this step lies below `x`; if not, the gradient of `x`
        is zero. A static False or True saves the conditional.

    Returns:
      The product.
    """
    x_type, w_type = jax.typeof(x), jax.typeof(w)

    @jax.custom_vjp
    def product_of(x: Any, w: Any, z: Any, at: Any, state: Any, needed: Any) -> Any:
        return product.of(product.op, x, w)

    def forward(x: Any, w: Any, z: Any, at: Any, state: Any, flag: Any) -> Any:
        y = product.of(product.op, x.value, w.value)
        kept_x = None
        if z.perturbed:
            # Where only a part of x is needed, that is all that is kept in memory.
            kept_x = _cut(product, x.value, at.value) if _cuts_early(product) else x.value
        kept_w = w.value if x.perturbed and needed is not False else None
        return y, (kept_x, kept_w, at.value, state.value, flag.value)

    def backward(residuals: Any, dy: Any) -> Any:
        x, w, at, state, flag = residuals
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            return (None,) * 6
        by_x = lambda w, x: product.of(product.op, x, w)
        dx = _operand_gradient(by_x, x_type, dy, w, needed, flag)
        dz = None if x is None else _weight_gradient(product, w_type, x, dy, at, state)
        return dx, None, dz, None, None, None

    product_of.defvjp(forward, backward, symbolic_zeros=True)
    return product_of(x, w, z, at, state, jnp.asarray(needed))


def gate(
    op: BinaryOp, x: jax.Array, y: jax.Array, needed: tuple[jax.Array | bool, jax.Array | bool]
) -> jax.Array:
    """A product without a weight, whose gradients are zero where nothing that learns lies below."""
    x_type, y_type = jax.typeof(x), jax.typeof(y)

    @jax.custom_vjp
    def product_of(x: Any, y: Any, needed: Any) -> Any:
        return op(x, y)

    def forward(x: Any, y: Any, flags: Any) -> Any:
        for_x = y.value if x.perturbed and needed[0] is not False else None
        for_y = x.value if y.perturbed and needed[1] is not False else None
        return op(x.value, y.value), (for_x, for_y, [flag.value for flag in flags])

    def backward(residuals: Any, d: Any) -> Any:
        y, x, flags = residuals
        if isinstance(d, jax.custom_derivatives.SymbolicZero):
            return (None,) * 3
        dx = _operand_gradient(lambda y, x: op(x, y), x_type, d, y, needed[0], flags[0])
        dy = _operand_gradient(lambda x, y: op(x, y), y_type, d, x, needed[1], flags[1])
        return dx, dy, None

    product_of.defvjp(forward, backward, symbolic_zeros=True)
    return product_of(x, y, [jnp.asarray(flag) for flag in needed])


def _operand_gradient(
    linear: Callable[[Any, Any], Any],
    of: Any,
    cotangent: jax.Array,
    other: jax.Array | None,
    needed: jax.Array | bool,
    flag: jax.Array,
) -> jax.Array | None:
    """The gradient of an operand of type `of`; none if the other operand was not saved for it.

    `flag` holds the value of `needed` as a residual, which is looked at if it is not static.
    """
    if other is None:
        return None
    if isinstance(needed, bool):
        return _transpose(linear, of, ())(cotangent, other)
    transposed = _transpose(linear, of, SLOW_IN_CONDITIONALS)
    return _if(flag, transposed, of, cotangent, other)


def _cuts_early(product: Product) -> bool:
    """Whether only a part of x is ever needed."""
    return Mode.FULL not in product.target.modes and bool(product.x_channel)


def _cut(product: Product, x: jax.Array, at: jax.Array) -> jax.Array:
    if product.x_part is None:
        return x
    return parts.take(x, product.x_channel, product.x_stack, product.x_part, at)


def _weight_gradient(
    product: Product, w_type: Any, x: jax.Array, dy: jax.Array, at: jax.Array, state: jax.Array
) -> jax.Array:
    """The gradient of a weight of type `w_type`; `x` is cut already if it is cut early."""
    target = product.target
    ordered = SLOW_IN_CONDITIONALS if len(target.modes) > 1 else SLOW_ANYWHERE

    def partly(x: jax.Array, dy: jax.Array, at: jax.Array) -> jax.Array:
        part = target.part
        assert part is not None
        kept_x = x if _cuts_early(product) else _cut(product, x, at)
        dy = parts.take(dy, product.y_channel, product.y_stack, part, at)
        kept_shape = part.shape(w_type.shape, product.w_channel)
        by_w = lambda x, w: product.of(product.part_op, x, w)
        kept = jnp.zeros_like(dy, w_type.dtype, kept_shape)  # Varies as `dy` in a `shard_map`.
        dw = _transpose(by_w, kept, ordered)(dy, kept_x)
        if target.compact:
            return dw
        return parts.put(dw, w_type.shape, product.w_channel, product.w_stack, part, at)

    def full(x: jax.Array, dy: jax.Array, at: jax.Array) -> jax.Array:
        by_w = lambda x, w: product.of(product.op, x, w)
        return _transpose(by_w, w_type, ordered)(dy, x)

    def learns(x: jax.Array, dy: jax.Array, at: jax.Array) -> jax.Array:
        if Mode.FULL not in target.modes:
            return partly(x, dy, at)
        if Mode.PARTIAL not in target.modes:
            return full(x, dy, at)
        return lax.cond(state == Mode.FULL, full, partly, x, dy, at)

    if Mode.FROZEN not in target.modes:
        return learns(x, dy, at)
    of = jax.ShapeDtypeStruct(target.shape(w_type.shape, product.w_channel), w_type.dtype)
    return _if(state != Mode.FROZEN, learns, of, x, dy, at)


def _if(flag: jax.Array, f: Callable[..., jax.Array], of: Any, *operands: Any) -> jax.Array:
    """`f(*operands)`, of type `of`, if the flag is set at run time, else zeros."""
    # Like an operand, to vary where it does inside a `shard_map`.
    zeros = lambda x, *_: jnp.zeros_like(x, of.dtype, of.shape)
    return lax.cond(flag, f, zeros, *operands)


# What XLA's CPU compiler has fast kernels for only in one order of axes. It brings convolutions
# into that order itself, but not inside a conditional, where a weight gradient then takes a hundred
# times as long; and a sum over several axes at once takes up to twice as long as one over a single
# axis, which weight gradients of batches of sequences are.
SLOW_ANYWHERE = ("dot_general",)
SLOW_IN_CONDITIONALS = ("dot_general", "conv_general_dilated")


def _transpose(
    linear: Callable[[Any, Any], Any], of: Any, ordered: Sequence[str]
) -> Callable[[jax.Array, Any], jax.Array]:
    """The transpose of `linear(other, x)` in x, as a function of the cotangent and `other`.

    On CPU the operations named in `ordered` get their axes in the order that is fast there.
    """

    def transposed(cotangent: jax.Array, other: Any) -> jax.Array:
        (result,) = jax.linear_transpose(lambda x: linear(other, x), of)(cotangent)
        return result

    def either(cotangent: jax.Array, other: Any) -> jax.Array:
        closed = jax.make_jaxpr(transposed)(cotangent, other)
        slow = {
            name: f
            for name, f in _IN_ORDER.items()
            if name in ordered and any(_is_slow(eqn, name) for eqn in jaxprs.opened(closed)[0].eqns)
        }
        if not slow:
            return transposed(cotangent, other)
        return lax.platform_dependent(
            cotangent,
            other,
            cpu=lambda *operands: jaxprs.evaluate(closed, operands, slow)[0],
            default=transposed,
        )

    return either


def _is_slow(eqn: Any, name: str) -> bool:
    if eqn.primitive.name != name:
        return False
    return name != "dot_general" or len(eqn.params["dimension_numbers"][0][0]) > 1


def _dot_in_order(eqn: core.JaxprEqn, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product summed over one axis, where those that it is summed over are neighbours."""
    (of_x, of_y), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    neighbours = lambda axes: tuple(axes) == tuple(range(axes[0], axes[0] + len(axes)))
    order = sorted(range(len(of_x)), key=lambda i: of_x[i])
    of_x, of_y = ([axes[i] for i in order] for axes in (of_x, of_y))
    if len(of_x) < 2 or not neighbours(of_x) or not neighbours(of_y):
        return operation(eqn)(x, y)

    def merge(x: jax.Array, axes: Sequence[int], batch: Sequence[int]) -> tuple[jax.Array, Any]:
        lead, tail = x.shape[: axes[0]], x.shape[axes[-1] + 1 :]
        moved = [axis - (len(axes) - 1) * (axis > axes[0]) for axis in batch]
        return x.reshape(*lead, -1, *tail), moved

    x, x_batch = merge(x, of_x, x_batch)
    y, y_batch = merge(y, of_y, y_batch)
    numbers = (((of_x[0],), (of_y[0],)), (tuple(x_batch), tuple(y_batch)))
    return operation(eqn)(x, y, dimension_numbers=numbers)


def _convolution_in_order(eqn: core.JaxprEqn, x: jax.Array, w: jax.Array) -> jax.Array:
    """A convolution with axes (batch, ..., features) and (..., in, out), as XLA's CPU has it."""
    lhs, rhs, out = eqn.params["dimension_numbers"]
    last = lambda spec: (spec[0], *spec[2:], spec[1])
    x = jnp.transpose(x, last(lhs))
    w = jnp.transpose(w, (*rhs[2:], rhs[1], rhs[0]))
    rank = x.ndim
    axes = (0, rank - 1, *range(1, rank - 1))
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    numbers = lax.ConvDimensionNumbers(axes, kernel, axes)
    y = operation(eqn)(x, w, dimension_numbers=numbers)
    order = last(out)
    return jnp.transpose(y, [order.index(axis) for axis in range(rank)])


_IN_ORDER: dict[str, Callable[..., jax.Array]] = {
    "dot_general": _dot_in_order,
    "conv_general_dilated": _convolution_in_order,
}
