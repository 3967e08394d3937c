"""Cutting kept channels out of an array, and putting them back, against NumPy."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax._skipping.parts import put, take
from cdb_jax.selection import Part


@st.composite
def layouts(draw):
    """A part, a shape, its channel axes and a stack axis or none."""
    num_windows = draw(st.integers(1, 3))
    size = draw(st.integers(1, 5))
    kept = draw(st.integers(1, size))
    window = draw(st.booleans())
    if not window:
        num_windows = 1
    channels = num_windows * size
    divisor = draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
    channel_sizes = draw(st.sampled_from([(channels,), (divisor, channels // divisor)]))
    other_sizes = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    stack_size = draw(st.sampled_from([None, 2]))
    sizes = [*channel_sizes, *other_sizes, *([] if stack_size is None else [stack_size])]
    place = draw(st.permutations(range(len(sizes))))
    shape = tuple(sizes[place.index(axis)] for axis in range(len(sizes)))
    channel = tuple(place[: len(channel_sizes)])
    stack = () if stack_size is None else (place[-1],)
    return Part(num_windows, size, kept, window), shape, channel, stack


def all_places(part):
    """Every place where a part can lie: offsets, or sets of positions."""
    if part.contiguous:
        return np.arange(part.size, dtype=np.int32)
    return np.array(list(itertools.combinations(range(part.size), part.kept)), np.int32)


def kept_channels(part, place):
    """The channels that a part keeps, in the order in which it holds them."""
    if not part.contiguous:
        return np.asarray(place)
    inside = np.arange(part.kept)
    # A window that wraps around holds its first channels first.
    wraps = place > part.size - part.kept
    first = np.where(
        inside < place - (part.size - part.kept), inside, inside + part.size - part.kept
    )
    inside = first if wraps else place + inside
    return np.concatenate([group * part.size + inside for group in range(part.blocks)])


def reference_take(x, channel, part, place):
    """`take` without a stack: channels to the last axis, an index, and back."""
    moved = np.moveaxis(x, channel, range(-len(channel), 0))
    others = moved.shape[: moved.ndim - len(channel)]
    cut = moved.reshape(*others, -1)[..., kept_channels(part, place)]
    cut = cut.reshape(*others, *[1] * (len(channel) - 1), part.total)
    return np.moveaxis(cut, range(-len(channel), 0), channel)


@hypothesis.settings(max_examples=40)
@hypothesis.given(layouts(), st.randoms(use_true_random=False))
def test_take_and_put(layout, random):
    part, shape, channel, stack = layout
    x = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    places = all_places(part)
    if stack:  # Two layers, each with a place of its own.
        pairs = [random.sample(range(len(places)), 1) + [i] for i in range(len(places))]
        places = places[np.array(pairs)]

    @jax.jit
    @jax.vmap
    def cut_and_fill(place):
        cut = take(jnp.asarray(x), channel, stack, part, place)
        return cut, put(cut, shape, channel, stack, part, place)

    for place, cut, filled in zip(places, *cut_and_fill(places), strict=True):
        assert cut.shape == part.shape(shape, channel)
        if stack:
            inner = tuple(axis - (axis > stack[0]) for axis in channel)
            layers = zip(np.moveaxis(x, stack[0], 0), place, strict=True)
            expected = [reference_take(layer, inner, part, at) for layer, at in layers]
            expected = np.stack(expected, stack[0])
        else:
            expected = reference_take(x, channel, part, place)
        np.testing.assert_array_equal(cut, expected)
        # What was cut lies where it was, and zeros elsewhere.
        np.testing.assert_array_equal(filled, np.where(np.isin(x, expected), x, 0.0))


def test_without_channels_nothing_is_cut():
    x, part = jnp.ones((2, 3)), Part(1, 3, 2, True)
    assert part.shape((2, 3), ()) == (2, 3)
    assert take(x, (), (), part, jnp.int32(1)) is x
    assert put(x, (2, 3), (), (), part, jnp.int32(1)) is x
