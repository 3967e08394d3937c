"""The kept part of a weight gradient, for every layout of a product, against NumPy.

A product is linear in its weight. If the weight is zero outside the kept part, the product is zero
outside the kept channels of the result, and in these it equals the product of the parts. Checking
that a description has this property needs no JAX. The transpose of the product of the parts is then
the kept part of the weight gradient.

Nearly all of the time of the other tests goes into compilation, so one example of hypothesis is a
list of cases that run as one compiled program.
"""

import functools
import itertools
import math
import operator
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_parts import (
    Kept,
    channel_shapes,
    kept_entries,
    kept_parts,
    one_program,
    scattered,
    stacked_places,
)

from cdb_jax import _cpu_order
from cdb_jax._skipping import products
from cdb_jax._skipping.reasons import Obstacle
from cdb_jax.selection import Arrangement, Mode, Part

# The tests call the library through the functions from here to `in_order` only.

FROZEN, PARTIAL, FULL = Mode.FROZEN, Mode.PARTIAL, Mode.FULL


class Axes(NamedTuple):
    """Where the channels of a weight are in the other operand and in the result."""

    x_channel: tuple[int, ...]
    y_channel: tuple[int, ...]
    x_stack: tuple[int, ...]
    y_stack: tuple[int, ...]
    x_part: Kept
    feature_groups: int | None


def described(layer):
    """What the library finds out about a layer, in its own terms."""
    part = None if layer.part is None else Part(*layer.part)
    target = products.Target(layer.modes, part)
    product = layer.product
    where = layer.channel_axes, layer.stack_axes, target
    op = operation(product)
    if isinstance(product, Dot):
        ranks = len(product.shapes[0]), len(product.shapes[1])
        return products.dot_product(op, layer.side, ranks, *where)
    return products.convolution(op, layer.side, product.shapes[1], *where)


def operation(product):
    """The product as the library knows it."""
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in product.shapes]
    (eqn,) = jax.make_jaxpr(product.apply)(*operands).eqns
    return products.Operation.of_equation(eqn)


def axes_of_parts(layer):
    """Where the parts of a layer are; None if the library refuses the layer."""
    found = described(layer)
    if isinstance(found, Obstacle):
        return None
    groups = None
    if found.part_op != found.op:
        groups = dict(found.part_op.params)["feature_group_count"]
    x_part = Kept(*found.x_part)
    return Axes(found.x_channel, found.y_channel, found.x_stack, found.y_stack, x_part, groups)


def weight_gradient(layer, x, dy, place, mode):
    """The weight gradient from the cotangent of the result, without a custom gradient."""
    found = described(layer)
    if found.cuts_early:
        x = found.cut(x, place)
    w = jax.typeof(jnp.zeros(layer.w_shape))
    return products.weight_gradient(found, w, x, dy, place, mode)


def weighted(layer, x, w, change, place, mode, needed):
    """The product with a weight, whose gradient is that of `change`."""
    change = products.Change(change, place, mode)
    return products.multiply((described(layer),), x, w, (change,), needed)


def unweighted(product, lhs, rhs, needed):
    """The product of two operands that are not weights."""
    return products.gate(operation(product), lhs, rhs, needed)


def in_order(product, lhs, rhs):
    """The product, with its axes in the order that is fast on a CPU."""
    (eqn,) = jax.make_jaxpr(product.apply)(lhs, rhs).eqns
    rewrite = _cpu_order.dot_in_order
    if isinstance(product, Convolution):
        rewrite = _cpu_order.convolution_in_order
    return rewrite(eqn, lhs, rhs)


# Products, in JAX and in NumPy.


class Dot(NamedTuple):
    """A `dot_general`."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def params(self):
        return dict(dimension_numbers=(self.contracting, self.batch))

    @property
    def apply(self):
        return functools.partial(lax.dot_general, **self.params)

    @property
    def subscripts(self):
        """The axes of both operands and of the result, as letters for `np.einsum`."""
        lhs = [chr(ord("a") + axis) for axis in range(len(self.shapes[0]))]
        rhs = [chr(ord("A") + axis) for axis in range(len(self.shapes[1]))]
        for left, right in (self.contracting, self.batch):
            for i, j in zip(left, right, strict=True):
                rhs[j] = lhs[i]
        batch = [lhs[axis] for axis in self.batch[0]]
        left = [letter for letter in lhs if letter not in rhs]
        right = [letter for letter in rhs if letter not in lhs]
        return "".join(lhs), "".join(rhs), "".join(batch + left + right)

    def __call__(self, lhs, rhs):
        left, right, result = self.subscripts
        return np.einsum(f"{left},{right}->{result}", lhs, rhs)

    def gradient(self, side, other, dy):
        """The gradient of one operand, from the other one and the cotangent of the result."""
        left, right, result = self.subscripts
        mine, others = (left, right) if side == 0 else (right, left)
        return np.einsum(f"{others},{result}->{mine}", other, dy)


class Convolution(NamedTuple):
    """A `conv_general_dilated`."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int = 1

    @property
    def params(self):
        return {name: size for name, size in self._asdict().items() if name != "shapes"}

    @property
    def apply(self):
        return functools.partial(lax.conv_general_dilated, **self.params)

    def __call__(self, x, w):
        lhs, rhs, out = self.dimension_numbers
        x, w = np.transpose(x, lhs), np.transpose(w, rhs)
        # Each group of the batch meets one group of the output features.
        pairs = zip(*(np.split(a, self.batch_group_count) for a in (x, w)), strict=True)
        y = np.concatenate([self._forward(x, w) for x, w in pairs], axis=1)
        return np.transpose(y, np.argsort(out))

    def _forward(self, x, w):
        groups = self.feature_group_count
        w = w.reshape(groups, -1, *w.shape[1:])
        sums = sum(
            np.einsum("ngis,goi->ngos", patch, w[(..., *position)])
            for position, patch in self._patches(x, w.shape[3:])
        )
        return sums.reshape(len(x), -1, *self._out_sizes(x, w.shape[3:]))

    def gradient(self, side, other, dy):
        """Like `Dot.gradient`, but only if there is a single group of the batch."""
        lhs, rhs, out = self.dimension_numbers
        groups = self.feature_group_count
        dy = np.transpose(dy, out)
        dy = dy.reshape(dy.shape[0], groups, dy.shape[1] // groups, -1)
        kernel_shape = [self.shapes[1][axis] for axis in rhs]
        if side == 1:
            dw = np.zeros(kernel_shape, dy.dtype)
            for position, patch in self._patches(np.transpose(other, lhs), kernel_shape[2:]):
                product = np.einsum("ngis,ngos->goi", patch, dy)
                dw[(..., *position)] = product.reshape(kernel_shape[:2])
            return np.transpose(dw, np.argsort(rhs))
        w = np.transpose(other, rhs)
        w = w.reshape(groups, -1, *w.shape[1:])
        # Which entry of the image each entry of a patch is; 0 for padding.
        entries = np.arange(1, math.prod(self.shapes[0]) + 1).reshape(self.shapes[0])
        dx = np.zeros(entries.size + 1, dy.dtype)
        for position, patch in self._patches(np.transpose(entries, lhs), kernel_shape[2:]):
            np.add.at(dx, patch, np.einsum("ngos,goi->ngis", dy, w[(..., *position)]))
        return dx[1:].reshape(self.shapes[0])

    def _padded_sizes(self, x):
        """The sizes of an image after dilation and padding."""
        sizes = zip(x.shape[2:], self.lhs_dilation, self.padding, strict=True)
        return [(size - 1) * step + 1 + low + high for size, step, (low, high) in sizes]

    def _out_sizes(self, x, kernel_sizes):
        sizes = zip(
            self._padded_sizes(x), kernel_sizes, self.rhs_dilation, self.window_strides, strict=True
        )
        return [
            (size - (kernel - 1) * step - 1) // stride + 1 for size, kernel, step, stride in sizes
        ]

    def _patches(self, x, kernel_sizes):
        """For each position in the kernel, what it meets: (batch, groups, features, positions)."""
        dilated = np.zeros((*x.shape[:2], *self._padded_sizes(x)), x.dtype)
        inside = zip(self.padding, self.lhs_dilation, x.shape[2:], strict=True)
        where = [slice(low, low + (size - 1) * step + 1, step) for (low, _), step, size in inside]
        dilated[(..., *where)] = x
        out_sizes = self._out_sizes(x, kernel_sizes)
        for position in np.ndindex(*kernel_sizes):
            starts = [k * step for k, step in zip(position, self.rhs_dilation, strict=True)]
            window = [
                slice(start, start + (size - 1) * stride + 1, stride)
                for start, size, stride in zip(starts, out_sizes, self.window_strides, strict=True)
            ]
            patch = dilated[(..., *window)]
            groups = self.feature_group_count
            yield position, patch.reshape(len(x), groups, x.shape[1] // groups, -1)


class Layer(NamedTuple):
    """A product with a weight, of which a part is kept."""

    product: Dot | Convolution
    side: int  # The position of the weight among the operands.
    channel_axes: tuple[int, ...]  # Of the weight.
    stack_axes: tuple[int, ...]
    part: Kept | None
    place: Any
    modes: tuple[Mode, ...] = (PARTIAL,)

    @property
    def w_shape(self):
        return self.product.shapes[self.side]

    @property
    def x_shape(self):
        return self.product.shapes[1 - self.side]

    @property
    def entries(self):
        """The entries of the weight that are kept."""
        return kept_entries(self.w_shape, self.channel_axes, self.stack_axes, self.part, self.place)

    @property
    def y_shape(self):
        return result_shape(self.product)

    @property
    def gradient_shape(self):
        return self.w_shape if FULL in self.modes else self.entries.shape

    def operands(self, x, w):
        return (w, x) if self.side == 0 else (x, w)

    def weight_gradient(self, x, dy, mode):
        """The weight gradient in NumPy: just its kept part if no mode needs all of it."""
        dw = self.product.gradient(self.side, x, dy)
        if FULL not in self.modes:
            kept = np.take(dw, self.entries)
            return kept if mode == PARTIAL else np.zeros_like(kept)
        if mode == PARTIAL:
            return scattered(np.take(dw, self.entries), dw.shape, self.entries)
        return dw if mode == FULL else np.zeros_like(dw)


def digits(*shapes):
    """Arrays of small integers, so that sums are exact in any order."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 10, shape).astype(np.float32) for shape in shapes]


def result_shape(product):
    return product(*digits(*product.shapes)).shape


def permuted(sizes, axes):
    """The shape in which axis `axes[i]` has size `sizes[i]`."""
    return tuple(sizes[axes.index(axis)] for axis in range(len(axes)))


def unzipped(pairs):
    return tuple(left for left, _ in pairs), tuple(right for _, right in pairs)


@st.composite
def dots(draw, modes=((PARTIAL,),)):
    """A `dot_general` with a weight, whose channel axes are all batch, contracting or free."""
    part = draw(kept_parts(max_size=4))
    channel_shape = draw(channel_shapes(part, max_axes=2))
    kind = draw(st.sampled_from(["batch", "contracting", "free"]))
    modes = draw(st.sampled_from(modes))
    stack_shape = ()
    if modes == (PARTIAL,):
        stack_shape = tuple(draw(st.lists(st.integers(1, 2), max_size=2)))
    batch, contracting, w_free, x_free = (
        tuple(draw(st.lists(st.integers(1, 3), max_size=2))) for _ in range(4)
    )
    # The axes of the weight by kind, before they are permuted. Stacks of layers with the same input
    # are free too.
    is_batched = kind != "free" or draw(st.booleans())
    kinds = {"batch": batch, "contracting": contracting, "stack": stack_shape, "free": w_free}
    kinds[kind] = channel_shape + kinds[kind]
    if is_batched:
        kinds = {"stack": kinds.pop("stack")} | kinds
    w_sizes = sum(kinds.values(), ())
    starts = dict(
        zip(kinds, itertools.accumulate(map(len, kinds.values()), initial=0), strict=False)
    )
    num_batch = starts["contracting"]
    num_shared = num_batch + len(kinds["contracting"])
    x_sizes = w_sizes[:num_shared] + x_free
    w_axes = tuple(draw(st.permutations(range(len(w_sizes)))))
    x_axes = tuple(draw(st.permutations(range(len(x_sizes)))))
    channel_axes = w_axes[starts[kind] :][: len(channel_shape)]
    stack_axes = w_axes[starts["stack"] :][: len(stack_shape)]

    # The dimension numbers list pairs of axes in any order.
    pairs = list(zip(w_axes, x_axes, strict=False))
    batch_pairs = draw(st.permutations(pairs[:num_batch]))
    contracting_pairs = draw(st.permutations(pairs[num_batch:num_shared]))
    w_batch, x_batch = unzipped(batch_pairs)
    w_contracting, x_contracting = unzipped(contracting_pairs)
    product = Dot(
        shapes=(permuted(w_sizes, w_axes), permuted(x_sizes, x_axes)),
        contracting=(w_contracting, x_contracting),
        batch=(w_batch, x_batch),
    )
    side = draw(st.integers(0, 1))
    if side == 1:
        product = Dot(*(pair[::-1] for pair in product))
    place = draw(stacked_places(part, stack_shape))
    return Layer(product, side, channel_axes, stack_axes, part, place, modes)


@st.composite
def convolution_layouts(draw, in_features, out_features, groups):
    """A convolution with the given numbers of features, in any layout.

    As in a kernel, `in_features` counts the input features of each group.
    """
    dims = draw(st.integers(0, 2))
    kernel = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    image = draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
    strides, lhs_dilation, rhs_dilation = (
        tuple(draw(st.lists(st.integers(1, 2), min_size=dims, max_size=dims))) for _ in range(3)
    )
    padding = []
    for size, length, step, dilation in zip(image, kernel, lhs_dilation, rhs_dilation, strict=True):
        low, high = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        # The padded image must be at least as long as the kernel.
        missing = (length - 1) * dilation - (size - 1) * step - low - high
        padding.append((low, high + max(missing, 0)))
    lhs, rhs, out = (tuple(draw(st.permutations(range(dims + 2)))) for _ in range(3))
    x_sizes = [draw(st.integers(1, 2)), groups * in_features, *image]
    w_sizes = [out_features, in_features, *kernel]
    return Convolution(
        (permuted(x_sizes, lhs), permuted(w_sizes, rhs)),
        strides,
        tuple(padding),
        lhs_dilation,
        rhs_dilation,
        lax.ConvDimensionNumbers(lhs, rhs, out),
        groups,
    )


@st.composite
def convolutions(draw, modes=((PARTIAL,),)):
    """A convolution with a kernel, whose channels are one of its feature axes."""
    part = draw(kept_parts(max_size=4))
    num_channels = part.num_blocks * part.size
    kind = draw(st.sampled_from(["in", "out", "depthwise"]))
    if kind == "in":
        groups, out_features = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 4), (3, 3)]))
        features = (num_channels, out_features, groups)
    elif kind == "out":
        groups = draw(st.sampled_from([n for n in (1, 2, 3) if part.num_blocks % n == 0]))
        features = (draw(st.integers(1, 3)), num_channels, groups)
    else:
        features = (1, num_channels, num_channels)
    product = draw(convolution_layouts(*features))
    out, into, *_ = product.dimension_numbers.rhs_spec
    channel_axes = (into,) if kind == "in" else (out,)
    place = draw(stacked_places(part, ()))
    modes = draw(st.sampled_from(modes))
    return Layer(product, 1, channel_axes, (), part, place, modes)


# Descriptions, without JAX.


def check_product_of_parts(layer):
    x, w = digits(layer.x_shape, layer.w_shape)
    axes = axes_of_parts(layer)
    kept_w = np.take(w, layer.entries)
    y = layer.product(*layer.operands(x, scattered(kept_w, w.shape, layer.entries)))

    x_entries = kept_entries(x.shape, axes.x_channel, axes.x_stack, axes.x_part, layer.place)
    y_entries = kept_entries(y.shape, axes.y_channel, axes.y_stack, layer.part, layer.place)
    product = layer.product
    if axes.feature_groups is not None:
        product = product._replace(feature_group_count=axes.feature_groups)
    kept_y = product(*layer.operands(np.take(x, x_entries), kept_w))
    np.testing.assert_array_equal(scattered(kept_y, y.shape, y_entries), y)


@hypothesis.settings(max_examples=200)
@hypothesis.given(dots())
def test_dot_product_of_parts(layer):
    check_product_of_parts(layer)


@hypothesis.settings(max_examples=150)
@hypothesis.given(convolutions())
def test_convolution_of_parts(layer):
    check_product_of_parts(layer)


DOT = Dot(shapes=((2, 3, 4), (2, 3, 5)), contracting=((1,), (1,)), batch=((0,), (0,)))
CONVOLUTION = Convolution(
    shapes=((2, 5, 6), (3, 6, 12)),  # (batch, position, feature) and (position, in, out).
    window_strides=(1,),
    padding=((1, 1),),
    lhs_dilation=(1,),
    rhs_dilation=(1,),
    dimension_numbers=lax.ConvDimensionNumbers((0, 2, 1), (2, 1, 0), (0, 2, 1)),
    feature_group_count=1,
)
WINDOW = Kept(num_blocks=1, size=12, kept=2, arrangement=Arrangement.WINDOW)


def grouped(groups, in_features, out_features):
    """A convolution in groups, each of which has `in_features`."""
    shapes = (2, 5, groups * in_features), (3, in_features, out_features)
    return CONVOLUTION._replace(shapes=shapes, feature_group_count=groups)


def is_refused(product, side, channel_axes, stack_axes=(), **fields):
    layer = Layer(product, side, channel_axes, stack_axes, WINDOW, None)
    return axes_of_parts(layer._replace(**fields)) is None


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("channel_axes", [(0, 1), (1, 2), (2, 0), (0, 1, 2)])
def test_channels_of_several_kinds_are_refused(side, channel_axes):
    assert is_refused(DOT, side, channel_axes)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("channel_axes", "stack_axes"), [((1,), (2,)), ((2,), (1,)), ((2,), (0, 1))]
)
def test_layers_that_meet_in_one_product_are_refused(side, channel_axes, stack_axes):
    assert is_refused(DOT, side, channel_axes, stack_axes)


@pytest.mark.parametrize("modes", [(PARTIAL, FULL), (FROZEN, PARTIAL), (FULL,), (FROZEN,)])
def test_stacked_layers_in_different_modes_are_refused(modes):
    assert not is_refused(DOT, 0, (2,), (0,))
    assert is_refused(DOT, 0, (2,), (0,), modes=modes)


def test_an_image_as_the_weight_of_a_convolution_is_refused():
    assert not is_refused(CONVOLUTION, 1, (2,))
    assert is_refused(CONVOLUTION, 0, (2,))


def test_convolutions_in_groups_of_the_batch_are_refused():
    assert is_refused(CONVOLUTION._replace(batch_group_count=2), 1, (2,))


def test_stacks_of_convolutions_are_refused():
    assert is_refused(CONVOLUTION, 1, (2,), stack_axes=(0,))


@pytest.mark.parametrize("channel_axes", [(0,), (0, 2), (1, 2), (2, 1)])
def test_axes_of_a_kernel_that_are_not_one_feature_axis_are_refused(channel_axes):
    assert is_refused(CONVOLUTION, 1, channel_axes)


@pytest.mark.parametrize(
    "num_blocks, refused", [(1, True), (2, True), (3, False), (4, True), (6, False)]
)
def test_blocks_must_fill_the_groups_of_a_convolution(num_blocks, refused):
    part = Kept(num_blocks, 12 // num_blocks, 1, Arrangement.WINDOW)
    assert is_refused(grouped(3, 2, 12), 1, (2,), part=part) == refused


@pytest.mark.parametrize(
    "in_features, out_features, refused", [(1, 12, False), (2, 12, True), (1, 24, True)]
)
def test_one_block_needs_a_depthwise_convolution(in_features, out_features, refused):
    part = Kept(1, out_features, 2, Arrangement.WINDOW)
    product = grouped(12, in_features, out_features)
    assert is_refused(product, 1, (2,), part=part) == refused


# Weight gradients: one compiled program for each list of layers.


def check_weight_gradients(layers):
    operands = [digits(layer.x_shape, layer.y_shape) for layer in layers]
    places = [layer.place for layer in layers]

    @jax.jit
    def program(operands, places, modes):
        return [
            weight_gradient(layer, x, dy, place, mode)
            for layer, (x, dy), place, mode in zip(layers, operands, places, modes, strict=True)
        ]

    for turn in range(max(len(layer.modes) for layer in layers)):
        modes = [layer.modes[turn % len(layer.modes)] for layer in layers]
        gradients = program(operands, places, [np.int32(mode) for mode in modes])
        for layer, mode, (x, dy), dw in zip(layers, modes, operands, gradients, strict=True):
            expected = layer.weight_gradient(x, dy, mode)
            np.testing.assert_array_equal(dw, expected, f"{layer}, {mode=}", strict=True)


@one_program(dots(), 40)
def test_weight_gradients_of_dot_products(layers):
    check_weight_gradients(layers)


@one_program(convolutions(), 30)
def test_weight_gradients_of_convolutions(layers):
    check_weight_gradients(layers)


MODES = [(PARTIAL, FULL), (FROZEN, PARTIAL), (FROZEN, PARTIAL, FULL)]


@one_program(st.one_of(dots(MODES), convolutions(MODES)), 20)
def test_weight_gradients_in_several_modes(layers):
    check_weight_gradients(layers)


@pytest.mark.parametrize("modes", [(FULL,), (FROZEN, FULL)])
def test_weight_gradients_without_a_part(modes):
    check_weight_gradients([Layer(DOT, 1, (), (), None, 0, modes)])


# The order of axes that is fast on a CPU.


def check_in_order(cases):
    operands = [digits(*product.shapes) for product in cases]

    @jax.jit
    def program(operands):
        return [in_order(product, *pair) for product, pair in zip(cases, operands, strict=True)]

    for product, pair, actual in zip(cases, operands, program(operands), strict=True):
        np.testing.assert_array_equal(actual, product(*pair), f"{product}", strict=True)


@one_program(dots(), 40)
def test_dot_products_in_order(layers):
    check_in_order([layer.product for layer in layers])


plain_convolutions = convolutions().map(operator.attrgetter("product"))


@st.composite
def convolutions_in_batch_groups(draw):
    groups = draw(st.sampled_from([2, 3]))
    in_features, multiple = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    product = draw(convolution_layouts(in_features, groups * multiple, groups=1))
    (batch, *_), _, _ = product.dimension_numbers
    image, kernel = product.shapes
    image = tuple(size * groups if axis == batch else size for axis, size in enumerate(image))
    return product._replace(shapes=(image, kernel), batch_group_count=groups)


@one_program(st.one_of(plain_convolutions, convolutions_in_batch_groups()), 40)
def test_convolutions_in_order(cases):
    check_in_order(cases)


def equations(product):
    """The primitives that compute a product in order, with their parameters."""
    operands = digits(*product.shapes)
    jaxpr = jax.make_jaxpr(lambda lhs, rhs: in_order(product, lhs, rhs))(*operands)
    return {eqn.primitive.name: eqn.params for eqn in jaxpr.eqns}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_neighbouring_axes_are_summed_over_as_one(order):
    lhs, rhs = np.array([1, 2, 3])[[*order]], np.array([0, 1, 2])[[*order]]
    product = Dot(((5, 2, 3, 4), (2, 3, 4, 6)), (tuple(lhs), tuple(rhs)), ((), ()))
    found = equations(product)["dot_general"]["dimension_numbers"]
    assert found == (((1,), (0,)), ((), ()))


def test_axes_in_different_orders_are_left_alone():
    product = Dot(((5, 2, 3), (3, 2, 6)), ((1, 2), (1, 0)), ((), ()))
    found = equations(product)["dot_general"]["dimension_numbers"]
    assert found == (product.contracting, product.batch)


def test_features_of_convolutions_come_last():
    numbers = lax.ConvDimensionNumbers((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))
    product = Convolution(
        ((2, 3, 5, 5), (4, 3, 2, 2)), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), numbers, 1
    )
    found = equations(product)["conv_general_dilated"]["dimension_numbers"]
    assert found == lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


# Products and their derivatives.


class Needed(NamedTuple):
    """Whether the gradient of an operand is needed, which may be known at run time only."""

    value: bool
    static: bool

    def flag(self, run_time_value):
        return self.value if self.static else run_time_value


needed_or_not = st.builds(Needed, st.booleans(), st.booleans())


def value_and_gradients(f, operands, dy):
    y, transpose = jax.vjp(f, *operands)
    return y, *transpose(dy)


def weighted_and_gradients(layer, x, w, dy, place, mode, flag):
    """The product, the gradient of `x` and the weight gradient."""

    def result(x, change):
        return weighted(layer, x, w, change, place, mode, flag)

    return value_and_gradients(result, (x, jnp.zeros(layer.gradient_shape, jnp.float32)), dy)


@one_program(st.tuples(st.one_of(dots(), convolutions(), dots(MODES)), needed_or_not), 25)
def test_products_with_weights(cases):
    arrays = [digits(layer.x_shape, layer.w_shape, layer.y_shape) for layer, _ in cases]
    states = [(layer.place, np.int32(layer.modes[-1]), needed.value) for layer, needed in cases]

    @jax.jit
    def program(arrays, states):
        results = []
        for (layer, needed), operands, state in zip(cases, arrays, states, strict=True):
            place, mode, value = state
            flag = needed.flag(value)
            results.append(weighted_and_gradients(layer, *operands, place, mode, flag))
        return results

    results = zip(cases, arrays, program(arrays, states), strict=True)
    for (layer, needed), (x, w, dy), (y, dx, dw) in results:
        np.testing.assert_array_equal(y, layer.product(*layer.operands(x, w)), f"{layer}")
        expected = layer.product.gradient(1 - layer.side, w, dy)
        expected = expected if needed.value else np.zeros_like(expected)
        np.testing.assert_array_equal(dx, expected, f"{layer}, {needed}")
        expected = layer.weight_gradient(x, dy, layer.modes[-1])
        np.testing.assert_array_equal(dw, expected, f"{layer}")


def unweighted_and_gradients(product, lhs, rhs, dy, flags):
    """The product and the gradients of its operands."""

    def result(lhs, rhs):
        return unweighted(product, lhs, rhs, flags)

    return value_and_gradients(result, (lhs, rhs), dy)


plain_products = st.one_of(dots(), convolutions()).map(operator.attrgetter("product"))


@one_program(st.tuples(plain_products, st.tuples(needed_or_not, needed_or_not)), 25)
def test_products_without_weights(cases):
    arrays = [digits(*product.shapes, result_shape(product)) for product, _ in cases]
    values = [[needed.value for needed in pair] for _, pair in cases]

    @jax.jit
    def program(arrays, values):
        results = []
        for (product, pair), operands, pair_values in zip(cases, arrays, values, strict=True):
            flags = [needed.flag(value) for needed, value in zip(pair, pair_values, strict=True)]
            results.append(unweighted_and_gradients(product, *operands, tuple(flags)))
        return results

    results = zip(cases, arrays, program(arrays, values), strict=True)
    for (product, pair), (lhs, rhs, dy), (y, *gradients) in results:
        np.testing.assert_array_equal(y, product(lhs, rhs), f"{product}")
        for side, other in enumerate([rhs, lhs]):
            expected = product.gradient(side, other, dy)
            expected = expected if pair[side].value else np.zeros_like(expected)
            np.testing.assert_array_equal(gradients[side], expected, f"{product}, {pair}")


# What a product with a weight saves for its gradients.

DENSE = Dot(shapes=((8, 6), (6, 4)), contracting=((1,), (0,)), batch=((), ()))
INPUTS = Layer(DENSE, 1, (0,), (), Kept(1, 6, 2, Arrangement.WINDOW), np.int32(5))
OUTPUTS = Layer(DENSE, 1, (1,), (), Kept(1, 4, 3, Arrangement.WINDOW), np.int32(2))


def saved_shapes(layer, *, x_needed=True, varied=("x", "change")):
    """The shapes of what `weighted` saves for the gradients of the operands in `varied`."""

    def saved(operands):
        def result(varied_operands):
            x, w, change = ({**operands, **varied_operands}[name] for name in ("x", "w", "change"))
            return weighted(layer, x, w, change, layer.place, np.int32(PARTIAL), x_needed)

        return jax.vjp(result, {name: operands[name] for name in varied})[1]

    arrays = digits(layer.x_shape, layer.w_shape, layer.gradient_shape)
    leaves = jax.tree.leaves(
        jax.eval_shape(saved, dict(zip(("x", "w", "change"), arrays, strict=True)))
    )
    return {leaf.shape for leaf in leaves if leaf.shape}


def test_only_the_kept_input_channels_are_saved():
    assert saved_shapes(INPUTS) == {(8, 2), (6, 4)}


@pytest.mark.parametrize("modes", [(PARTIAL, FULL), (FROZEN, PARTIAL, FULL)])
def test_all_input_channels_are_saved_if_the_weight_may_learn_in_full(modes):
    assert saved_shapes(INPUTS._replace(modes=modes)) == {(8, 6), (6, 4)}


def test_all_input_channels_are_saved_for_output_channels():
    assert saved_shapes(OUTPUTS) == {(8, 6), (6, 4)}


def test_the_weight_is_not_saved_if_nothing_below_learns():
    assert saved_shapes(INPUTS, x_needed=False) == {(8, 2)}


def test_the_weight_is_not_saved_for_a_constant_input():
    assert saved_shapes(INPUTS, varied=("change",)) == {(8, 2)}


def test_the_input_is_not_saved_if_the_weight_does_not_learn():
    assert saved_shapes(INPUTS, varied=("x",)) == {(6, 4)}
