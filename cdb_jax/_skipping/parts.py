"""The part of a channel axis that is kept: cutting it out of an array, and putting it back.

A kept part has a fixed size, so that what is dropped need not be computed. Where several axes
together index the channels, the part of a shape has size 1 along all of them but the last, which
holds all kept channels: a product's dimension numbers then hold for parts as for the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from cdb_jax.selection import Part


def take(
    x: jax.Array, channel: tuple[int, ...], stack: tuple[int, ...], part: Part, at: jax.Array
) -> jax.Array:
    """Cuts the kept part out of an array.

    Args:
      x: an array whose axes `channel`, major first, together index the channels.
      channel: those axes; without any, `x` is returned.
      stack: axes of `x` along which layers are stacked, each with a part of its own.
      part: how many channels are kept, and how they lie.
      at: where they lie, for each index of the stack: shape `(*stack shape, *shape of one)`.

    Returns:
      An array of shape `part.shape(x.shape, channel)`.
    """
    if not channel:
        return x
    if stack:
        cut = lambda x, at: take(x, *_without(stack[0], channel, stack[1:]), part, at)
        return jax.vmap(cut, in_axes=(stack[0], 0), out_axes=stack[0])(x, at)
    left = part.shape(x.shape, channel)
    x, axis, order = _merge(x, channel, part.blocks, part.size)
    if part.contiguous:
        x = _take_window(x, axis, part.kept, at)
    else:
        x = jnp.take(x, at, axis=axis, unique_indices=True, indices_are_sorted=True, mode="clip")
    return _split(x, left, order)


def put(
    x: jax.Array,
    shape: tuple[int, ...],
    channel: tuple[int, ...],
    stack: tuple[int, ...],
    part: Part,
    at: jax.Array,
) -> jax.Array:
    """Puts a kept part where `take` cut it out, into zeros of the given shape.

    Without channel axes nothing was cut, and `x` is returned.
    """
    if not channel:
        return x
    if stack:
        inner = tuple(size for axis, size in enumerate(shape) if axis != stack[0])
        fill = lambda x, at: put(x, inner, *_without(stack[0], channel, stack[1:]), part, at)
        return jax.vmap(fill, in_axes=(stack[0], 0), out_axes=stack[0])(x, at)
    x, axis, order = _merge(x, channel, part.blocks, part.kept)
    if part.contiguous:
        x = _put_window(x, axis, part.size, at)
    else:
        # Read, not written: a gather joins the loop of the optimizer that follows, a scatter not.
        channels = jnp.arange(part.size, dtype=jnp.int32)
        # Unrolled: a loop for each layer would be many launches, and cut the graph of a GPU.
        nearest = jnp.searchsorted(at, channels, method="scan_unrolled").astype(jnp.int32)
        nearest = jnp.minimum(nearest, part.kept - 1)
        is_kept = _along(axis, x.ndim, at[nearest] == channels)
        x = jnp.take(x, nearest, axis=axis, indices_are_sorted=True, mode="clip")
        x = jnp.where(is_kept, x, jnp.zeros((), x.dtype))
    return _split(x, shape, order)


def _take_window(x: jax.Array, axis: int, kept: int, start: jax.Array) -> jax.Array:
    """`kept` entries from `start` on, cyclically: two slices, and a choice between them.

    A window that runs over the end consists of the last entries, from `start` on, and of the first.
    Both lie where they should in one of two slices of full length, so nothing has to be moved.
    """
    last = x.shape[axis] - kept
    run = lax.dynamic_slice_in_dim(x, jnp.minimum(start, last), kept, axis)
    first = lax.slice_in_dim(x, 0, kept, axis=axis)
    wrapped = jnp.arange(kept, dtype=jnp.int32) < start - last
    return jnp.where(_along(axis, x.ndim, wrapped), first, run)


def _put_window(x: jax.Array, axis: int, size: int, start: jax.Array) -> jax.Array:
    """The inverse of `_take_window`, with pads and slices that join the loop that reads them."""
    kept = x.shape[axis]
    last = size - kept
    zero = jnp.zeros((), x.dtype)
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (last, last, 0)
    begin = jnp.minimum(start, last)
    run = lax.dynamic_slice_in_dim(lax.pad(x, zero, pad), last - begin, size, axis)
    pad[axis] = (0, last, 0)
    first = lax.pad(x, zero, pad)
    position = jnp.arange(size, dtype=jnp.int32)
    run = jnp.where(_along(axis, x.ndim, position >= start), run, zero)
    return jnp.where(_along(axis, x.ndim, position < start - last), first, run)


def _along(axis: int, rank: int, vector: jax.Array) -> jax.Array:
    """A vector as an array of the given rank that varies along one axis only."""
    return jnp.expand_dims(vector, [i for i in range(rank) if i != axis])


def _without(
    axis: int, channel: tuple[int, ...], stack: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of an array after one other axis is gone."""
    shift = lambda axes: tuple(other - (other > axis) for other in axes)
    return shift(channel), shift(stack)


def _merge(
    x: jax.Array, channel: tuple[int, ...], groups: int, size: int
) -> tuple[jax.Array, int, tuple[int, ...]]:
    """Replaces the channel axes by one for the groups, if there are several, and one within these.

    Returns the array, the axis within groups, and the order that the axes were brought into.
    """
    sizes = (size,) if groups == 1 else (groups, size)
    others = [axis for axis in range(x.ndim) if axis not in channel]
    before = [axis for axis in others if axis < channel[-1]]
    after = [axis for axis in others if axis > channel[-1]]
    order = (*before, *channel, *after)
    if order != tuple(range(x.ndim)):
        x = jnp.transpose(x, order)
    lead, tail = x.shape[: len(before)], x.shape[len(before) + len(channel) :]
    return x.reshape(lead + sizes + tail), len(before) + len(sizes) - 1, order


def _split(x: jax.Array, shape: Sequence[int], order: tuple[int, ...]) -> jax.Array:
    """Undoes `_merge`: to the given shape, whose axes were brought into `order`."""
    x = x.reshape([shape[axis] for axis in order])
    if order == tuple(range(len(order))):
        return x
    return jnp.transpose(x, [order.index(axis) for axis in range(len(order))])
