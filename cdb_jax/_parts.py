"""Takes the kept part of a channel axis out of an array, and puts it back.

A kept part has a static size, so that the dropped part need not be computed. If several axes
together index the channels, a part has size 1 along all of them but the last, which holds all kept
channels. The dimension numbers of a product are then valid for parts as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cdb_jax.selection import Arrangement, Part

Axes = tuple[int, ...]


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)  # Traced once for equal layers.
def take(x: jax.Array, channel: Axes, stack: Axes, part: Part, place: jax.Array) -> jax.Array:
    """Takes the kept part out of an array.

    Args:
      x: an array whose axes `channel`, major first, together index the channels.
      channel: those axes; if there are none, `x` is returned.
      stack: axes of `x` along which layers are stacked, each with a separate part.
      part: how many channels are kept, and how they are arranged.
      place: where they lie; the axes of the stack come first.

    Returns:
      An array of shape `part.shape(x.shape, channel)`.
    """
    if not channel:
        return x
    if stack:
        inner = _without(stack[0], channel), _without(stack[0], stack[1:])

        def take_from_layer(x: jax.Array, place: jax.Array) -> jax.Array:
            return take(x, *inner, part, place)

        return jax.vmap(take_from_layer, in_axes=(stack[0], 0), out_axes=stack[0])(x, place)
    shape = part.shape(x.shape, channel)
    x, axis, order = _merge(x, channel, part.blocks, part.size)
    match part.arrangement:
        case Arrangement.WINDOW:
            x = _take_window(x, axis, part.kept, place)
        case Arrangement.CHUNK:
            x = _slice(x, place, part.kept, axis)
        case Arrangement.SCATTERED:
            x = jnp.take(
                x, place, axis=axis, unique_indices=True, indices_are_sorted=True, mode="clip"
            )
    return _split(x, shape, order)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def put(
    x: jax.Array,
    shape: Axes,
    channel: Axes,
    stack: Axes,
    part: Part,
    place: jax.Array,
    kept_index: jax.Array | None = None,
) -> jax.Array:
    """The inverse of `take`: an array of the given shape, with zeros outside the kept part.

    `kept_index` is that of `Group`, for scattered channels; without it, each layer takes a search.
    """
    if not channel:
        return x
    if stack:
        inner_shape = tuple(size for axis, size in enumerate(shape) if axis != stack[0])
        inner = _without(stack[0], channel), _without(stack[0], stack[1:])

        def put_into_layer(
            x: jax.Array, place: jax.Array, kept_index: jax.Array | None
        ) -> jax.Array:
            return put(x, inner_shape, *inner, part, place, kept_index)

        axes = (stack[0], 0, 0)
        return jax.vmap(put_into_layer, in_axes=axes, out_axes=stack[0])(x, place, kept_index)
    x, axis, order = _merge(x, channel, part.blocks, part.kept)
    match part.arrangement:
        case Arrangement.WINDOW:
            x = _put_window(x, axis, part.size, place)
        case Arrangement.CHUNK:
            x = _put_run(x, axis, part.size, place)
        case Arrangement.SCATTERED:
            # A gather: unlike a scatter, it fuses into the optimizer.
            if kept_index is None:
                nearest, is_kept = _find(place, jnp.arange(part.size, dtype=jnp.int32))
                kept_index = jnp.where(is_kept, nearest, np.int32(part.size))
            x = jnp.take(x, kept_index, axis=axis, mode="fill", fill_value=0)
    return _split(x, shape, order)


@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def move(
    x: jax.Array,
    fill: jax.Array,
    channel: Axes,
    stack: Axes,
    part: Part,
    before: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """A part for another place: like `take(put(x, before), after)`, but with nothing of full size.

    Channels that were kept before keep their entries; the others have those of `fill`.
    """
    if not channel:
        return x
    if stack:
        inner = _without(stack[0], channel), _without(stack[0], stack[1:])

        def move_in_layer(x: jax.Array, fill: jax.Array, *places: jax.Array) -> jax.Array:
            return move(x, fill, *inner, part, *places)

        axes = (stack[0], stack[0], 0, 0)
        return jax.vmap(move_in_layer, in_axes=axes, out_axes=stack[0])(x, fill, before, after)
    shape, axis = x.shape, channel[-1]
    if part.blocks > 1:
        blocks = (*shape[:axis], part.blocks, part.kept, *shape[axis + 1 :])
        x, fill, axis = x.reshape(blocks), fill.reshape(blocks), axis + 1
    match part.arrangement:
        case Arrangement.WINDOW:
            x = _move_window(x, fill, axis, part.size, before, after)
        case Arrangement.CHUNK:  # Two chunks are equal or disjoint.
            x = jnp.where(before == after, x, fill)
        case Arrangement.SCATTERED:
            x = _pick_channels(x, fill, axis, before, after)
    return x.reshape(shape)


def _find(ascending: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index of each wanted number in an ascending vector, and whether it occurs there."""
    # One comparison compiles faster than a search, and is cheap unless the layer is wide. The
    # search is unrolled, since a loop for each layer would launch many kernels on a GPU.
    method = "compare_all" if ascending.size * wanted.size <= 2**20 else "scan_unrolled"
    nearest = jnp.searchsorted(ascending, wanted, method=method).astype(jnp.int32)
    nearest = jnp.minimum(nearest, ascending.size - 1)
    return nearest, ascending[nearest] == wanted


def _take_window(x: jax.Array, axis: int, kept: int, start: jax.Array) -> jax.Array:
    """Takes `kept` entries from `start` on, wrapping around: two slices and a choice between them.

    A window that wraps around consists of the last entries, from `start` on, and of the first ones.
    Each entry is already in place in one of two slices of full length, so nothing has to be moved.
    """
    last = x.shape[axis] - kept
    run = _slice(x, jnp.minimum(start, last), kept, axis)
    first = lax.slice_in_dim(x, 0, kept, axis=axis)
    wrapped = jnp.arange(kept, dtype=jnp.int32) < start - last
    return jnp.where(_along(axis, x.ndim, wrapped), first, run)


def _put_window(x: jax.Array, axis: int, size: int, start: jax.Array) -> jax.Array:
    """The inverse of `_take_window`, by pads and slices that fuse into the loop that reads them."""
    last = size - x.shape[axis]
    zero = jnp.zeros((), x.dtype)
    run = _put_run(x, axis, size, jnp.minimum(start, last))
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (0, last, 0)
    first = lax.pad(x, zero, pad)
    position = jnp.arange(size, dtype=jnp.int32)
    run = jnp.where(_along(axis, x.ndim, position >= start), run, zero)
    return jnp.where(_along(axis, x.ndim, position < start - last), first, run)


def _put_run(x: jax.Array, axis: int, size: int, start: jax.Array) -> jax.Array:
    """Puts entries at `start` into zeros, where they do not wrap around: one pad and one slice."""
    last = size - x.shape[axis]
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (last, last, 0)
    return _slice(lax.pad(x, jnp.zeros((), x.dtype), pad), last - start, size, axis)


def _move_window(
    x: jax.Array, fill: jax.Array, axis: int, size: int, before: jax.Array, after: jax.Array
) -> jax.Array:
    """Moves a window to another start; entries that it did not hold before come from `fill`.

    This takes pads and slices. A gather would also work, but for a gather, the CPU compiler
    transposes the arrays and everything that depends on them.
    """
    kept = x.shape[axis]
    # Where a window wraps around, its last channels are stored behind its first ones.
    first_before, first_after = before - (size - kept), after - (size - kept)
    shift_before, shift_after = jnp.minimum(before, size - kept), jnp.minimum(after, size - kept)
    position = jnp.arange(kept, dtype=jnp.int32)
    is_first = position < first_after
    channel = jnp.where(is_first, position, position + shift_after)
    was_first = channel < first_before
    source = channel - shift_before
    was_kept = (source >= jnp.maximum(first_before, 0)) & (source < kept)

    def shifted(low: int, high: int, shift: jax.Array) -> jax.Array:
        """`x[i + shift]` for each position i; `shift` is at least `-low` and at most `high`."""
        pad = [(0, 0, 0)] * x.ndim
        pad[axis] = (low, high, 0)
        padded = lax.pad(x, jnp.zeros((), x.dtype), pad)
        return _slice(padded, low + jnp.clip(shift, -low, high), kept, axis)

    for chosen, y in (  # No pad occurs twice, so that each fuses into its slice.
        (is_first & was_first, x),
        (is_first & ~was_first & was_kept, shifted(kept, 0, -shift_before)),
        (~is_first & was_first, shifted(0, kept, shift_after)),
        (~is_first & ~was_first & was_kept, shifted(kept, kept, shift_after - shift_before)),
    ):
        fill = jnp.where(_along(axis, x.ndim, chosen), y, fill)
    return fill


def _pick_channels(
    x: jax.Array, fill: jax.Array, axis: int, place: jax.Array, wanted: jax.Array
) -> jax.Array:
    """Entries of an array that holds the channels at `place`; `fill` has those that it lacks."""
    nearest, is_kept = _find(place, wanted)
    x = jnp.take(x, nearest, axis=axis, indices_are_sorted=True, mode="clip")
    return jnp.where(_along(axis, x.ndim, is_kept), x, fill)


def _slice(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)


def _along(axis: int, rank: int, vector: jax.Array) -> jax.Array:
    """A vector as an array of the given rank that varies along one axis only."""
    return jnp.expand_dims(vector, [i for i in range(rank) if i != axis])


def _without(removed: int, axes: Axes) -> Axes:
    """Axes of an array after another axis has been removed."""
    return tuple(axis - 1 if axis > removed else axis for axis in axes)


def _merge(x: jax.Array, channel: Axes, blocks: int, size: int) -> tuple[jax.Array, int, Axes]:
    """Replaces the channel axes with one for the blocks, if there are several, and one inside them.

    Returns the array, the axis inside the blocks, and the new order of the original axes.
    """
    sizes = (size,) if blocks == 1 else (blocks, size)
    others = [axis for axis in range(x.ndim) if axis not in channel]
    before = [axis for axis in others if axis < channel[-1]]
    after = [axis for axis in others if axis > channel[-1]]
    order = (*before, *channel, *after)
    if order != tuple(range(x.ndim)):
        x = jnp.transpose(x, order)
    lead, tail = x.shape[: len(before)], x.shape[len(before) + len(channel) :]
    return x.reshape(lead + sizes + tail), len(before) + len(sizes) - 1, order


def _split(x: jax.Array, shape: Sequence[int], order: Axes) -> jax.Array:
    """Undoes `_merge`, given the original shape and the order of the axes."""
    x = x.reshape([shape[axis] for axis in order])
    if order == tuple(range(len(order))):
        return x
    return jnp.transpose(x, [order.index(axis) for axis in range(len(order))])
