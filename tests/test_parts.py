"""Taking the kept part out of an array, and putting it back, against NumPy.

Nearly all of the time goes into compilation, so one example of hypothesis is a list of cases that
run as one compiled program, which is called with every place of every part.
"""

import itertools
import math
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdb_jax import _parts as parts
from cdb_jax.selection import Arrangement, Group, Mode, Part

WINDOW, CHUNK, SCATTERED = Arrangement


class Kept(NamedTuple):
    """The kept part of a channel axis, as the tests describe it."""

    num_blocks: int
    size: int  # Of each block.
    kept: int  # In each block.
    arrangement: Arrangement


# The tests call the library through these functions only.


def part_shape(part, shape, channel_axes):
    return Part(*part).shape(shape, channel_axes)


def take(x, channel_axes, stack_axes, part, place):
    return parts.take(x, channel_axes, stack_axes, Part(*part), place)


def put(x, shape, channel_axes, stack_axes, part, place):
    return parts.put(x, shape, channel_axes, stack_axes, Part(*part), place)


def move(x, fill, channel_axes, stack_axes, part, before, after):
    return parts.move(x, fill, channel_axes, stack_axes, Part(*part), before, after)


# Parts in NumPy, which `test_products.py` uses too.


def possible_places(part):
    """Every place where a part can lie: the starts of windows or chunks, or sets of positions."""
    if part.arrangement is not SCATTERED:
        stride = part.kept if part.arrangement is CHUNK else 1
        return np.arange(0, part.size, stride, dtype=np.int32)
    return np.array(list(itertools.combinations(range(part.size), part.kept)), np.int32)


def kept_channels(part, place):
    """The channels of a part, in rising order even if a window wraps around."""
    inside = place
    if part.arrangement is not SCATTERED:
        inside = np.sort((place + np.arange(part.kept)) % part.size)
    return np.add.outer(np.arange(part.num_blocks) * part.size, inside).reshape(-1)


def kept_entries(shape, channel_axes, stack_axes, part, place):
    """Which entries of an array of the given shape a part holds.

    Returns:
      The positions of these entries in the flattened array, as an array of the shape of the part.
    """
    entries = np.arange(math.prod(shape)).reshape(shape)
    if not channel_axes:
        return entries
    others = [axis for axis in range(len(shape)) if axis not in (*stack_axes, *channel_axes)]
    order = (*stack_axes, *others, *channel_axes)
    outer = [shape[axis] for axis in (*stack_axes, *others)]
    entries = entries.transpose(order).reshape(*outer, -1)
    kept = np.zeros((*outer, part.num_blocks * part.kept), int)
    for layer in np.ndindex(*outer[: len(stack_axes)]):
        kept[layer] = entries[layer][..., kept_channels(part, place[layer])]
    # The last channel axis holds all channels of the part.
    kept = kept.reshape(*outer, *[1] * (len(channel_axes) - 1), -1)
    return kept.transpose(np.argsort(order))


def scattered(x, shape, entries):
    """Zeros of the given shape, with `x` in the given entries: the inverse of `np.take`."""
    filled = np.zeros(shape, np.asarray(x).dtype)
    np.put(filled, entries, x)
    return filled


@st.composite
def kept_parts(draw, max_blocks=3, max_size=5):
    size = draw(st.integers(1, max_size))
    kept = draw(st.integers(1, size))
    arrangements = [x for x in Arrangement if x is not CHUNK or size % kept == 0]
    return Kept(draw(st.integers(1, max_blocks)), size, kept, draw(st.sampled_from(arrangements)))


@st.composite
def channel_shapes(draw, part, max_axes):
    """The sizes of the axes that together index the channels of a part."""
    sizes, size = [], part.num_blocks * part.size
    for _ in range(draw(st.integers(1, max_axes)) - 1):
        sizes.append(draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])))
        size //= sizes[-1]
    return (*sizes, size)


@st.composite
def stacked_places(draw, part, stack_shape):
    """A place for each layer of a stack."""
    places = possible_places(part)
    size = math.prod(stack_shape)
    index = draw(st.lists(st.integers(0, len(places) - 1), min_size=size, max_size=size))
    return places[np.array(index, int).reshape(stack_shape)]


def one_program(cases, size):
    """Runs a test with one list of cases, all different."""
    lists = st.lists(cases, min_size=size, max_size=size, unique_by=repr)
    settings = hypothesis.settings(max_examples=1, phases=[hypothesis.Phase.generate])
    return lambda test: settings(hypothesis.given(lists)(test))


class Case(NamedTuple):
    """A part, and the array that it is taken out of."""

    part: Kept
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    spread: int  # Between the places of one layer of the stack and the next.

    @property
    def layout(self):
        return self.channel_axes, self.stack_axes, self.part

    def place(self, turn):
        """A place for each layer of the stack; the turns go through all of them."""
        places = possible_places(self.part)
        stack_shape = [self.shape[axis] for axis in self.stack_axes]
        layers = np.arange(math.prod(stack_shape)).reshape(stack_shape)
        return places[(self.spread * layers + turn) % len(places)]

    def entries(self, turn):
        return kept_entries(self.shape, *self.layout, self.place(turn))


@st.composite
def cases(draw):
    part = draw(kept_parts())
    channel_shape = draw(channel_shapes(part, max_axes=3))
    stack_shape = draw(st.lists(st.integers(1, 3), max_size=2))
    other_shape = draw(st.lists(st.integers(1, 3), max_size=2))
    sizes = [*channel_shape, *stack_shape, *other_shape]
    axes = tuple(draw(st.permutations(range(len(sizes)))))
    shape = tuple(sizes[axes.index(axis)] for axis in range(len(sizes)))
    channel_axes, rest = axes[: len(channel_shape)], axes[len(channel_shape) :]
    return Case(part, shape, channel_axes, rest[: len(stack_shape)], draw(st.integers(0, 4)))


# The largest number of places of one part that `cases` draws.
NUM_TURNS = math.comb(5, 2)


def numbered(shape):
    """An array of different entries, one of which is not finite, to see it spread."""
    x = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)
    x.flat[-1] = np.nan
    return x


@hypothesis.settings(max_examples=300)
@hypothesis.given(cases())
def test_shape_of_a_part(case):
    assert part_shape(case.part, case.shape, case.channel_axes) == case.entries(0).shape


@one_program(cases(), 60)
def test_take(drawn):
    arrays = [numbered(case.shape) for case in drawn]

    @jax.jit
    def program(arrays, places):
        operands = zip(drawn, arrays, places, strict=True)
        return [take(x, *case.layout, place) for case, x, place in operands]

    for turn in range(NUM_TURNS):
        taken = program(arrays, [case.place(turn) for case in drawn])
        for case, x, actual in zip(drawn, arrays, taken, strict=True):
            expected = np.take(x, case.entries(turn))
            np.testing.assert_array_equal(actual, expected, f"{case}, {turn=}", strict=True)


@one_program(cases(), 50)
def test_put(drawn):
    arrays = [numbered(case.entries(0).shape) for case in drawn]

    @jax.jit
    def program(arrays, places):
        operands = zip(drawn, arrays, places, strict=True)
        return [put(x, case.shape, *case.layout, place) for case, x, place in operands]

    for turn in range(NUM_TURNS):
        filled = program(arrays, [case.place(turn) for case in drawn])
        for case, x, actual in zip(drawn, arrays, filled, strict=True):
            expected = scattered(x, case.shape, case.entries(turn))
            np.testing.assert_array_equal(actual, expected, f"{case}, {turn=}", strict=True)


@one_program(cases(), 40)
def test_move(drawn):
    arrays = [numbered(case.entries(0).shape) for case in drawn]

    @jax.jit
    def program(arrays, before, after):
        operands = zip(drawn, arrays, before, after, strict=True)
        return [move(x, -x, *case.layout, old, new) for case, x, old, new in operands]

    for turns in itertools.product(range(NUM_TURNS), repeat=2):
        places = ([case.place(turn) for case in drawn] for turn in turns)
        for case, x, actual in zip(drawn, arrays, program(arrays, *places), strict=True):
            before, after = (case.entries(turn) for turn in turns)
            was_kept = np.isin(after, before)
            expected = np.where(was_kept, np.take(scattered(x, case.shape, before), after), -x)
            np.testing.assert_array_equal(actual, expected, f"{case}, {turns=}", strict=True)


@pytest.mark.parametrize("start, channels", [(0, [0, 1, 2]), (3, [0, 3, 4]), (4, [0, 1, 4])])
def test_window_that_wraps_around(start, channels):
    part = Kept(num_blocks=2, size=5, kept=3, arrangement=WINDOW)
    kept = take(jnp.arange(10), (0,), (), part, jnp.int32(start))
    np.testing.assert_array_equal(kept, [*channels, *(5 + np.array(channels))])


def test_without_channel_axes_take_and_put_return_their_operand():
    x, part = jnp.ones((2, 3)), Kept(1, 3, 2, WINDOW)
    assert part_shape(part, (2, 3), ()) == (2, 3)
    np.testing.assert_array_equal(take(x, (), (), part, jnp.int32(1)), x)
    np.testing.assert_array_equal(put(x, (2, 3), (), (), part, jnp.int32(1)), x)


@pytest.mark.parametrize("size", [600, 1600])  # On both sides of the bound for one comparison.
def test_scattered_channels_of_wide_layers(size):
    rng = np.random.default_rng(0)
    place = np.sort(rng.permutation(size)[: size // 2]).astype(np.int32)
    x = rng.normal(size=(2, size // 2)).astype(np.float32)
    part = Kept(1, size, size // 2, SCATTERED)
    expected = np.zeros((2, size), np.float32)
    expected[:, place] = x
    full = put(jnp.asarray(x), (2, size), (1,), (), part, jnp.asarray(place))
    np.testing.assert_array_equal(full, expected)
    np.testing.assert_array_equal(take(full, (1,), (), part, jnp.asarray(place)), x)


def test_put_by_index_equals_put_by_a_search():
    """`Group.kept_index` says where the kept part of each layer stores a channel."""
    keep = jnp.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 1]], bool)
    places = jnp.array([[0, 3], [1, 2], [2, 4]], jnp.int32)
    kept_index = Group(
        jnp.ones(3, jnp.int32), keep, None, places, (), (Mode.PARTIAL,), None
    ).kept_index
    np.testing.assert_array_equal(kept_index, [[0, 5, 5, 1, 5], [5, 0, 1, 5, 5], [5, 5, 0, 5, 1]])
    x = jnp.arange(1.0, 13.0).reshape(2, 3, 2)
    axes = (2, 3, 5), (2,), (1,), Part(1, 5, 2, SCATTERED)
    np.testing.assert_array_equal(
        parts.put(x, *axes, places, kept_index), parts.put(x, *axes, places)
    )
