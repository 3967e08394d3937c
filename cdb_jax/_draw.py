"""Drawing a selection: which channels of which layers learn in a step.

A layer's draw depends on the key, the step and the layer's own path, number of channels and stack,
and on nothing else in the tree:

    layer key = fold_in(fold_in(fold_in(key, step), layer id), stack index)

`fold_in(layer key, 0)` has the words for the layer as a whole, `fold_in(layer key, 1 + i)` those of
channels 2i and 2i + 1. One vectorised fold makes all of them for the whole tree. Layers with the
same number of channels then form one matrix, one row for each layer, so the number of operations
does not grow with the depth of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax import channels
from cdb_jax._compiling import compiled
from cdb_jax.selection import Group, Mode, Part, Selection, frozen_group

if TYPE_CHECKING:
    from cdb_jax.policy import Policy


@compiled
def draw_once(layout: channels.Layout, policy: Policy, step: jax.Array) -> Selection:
    """`draw`, as one program outside of `jit`."""
    return draw(policy, layout, step)


def draw(policy: Policy, layout: channels.Layout, step: jax.typing.ArrayLike) -> Selection:
    """Draws which channels of the layers of a layout learn in a step."""
    check_layers(policy, layout)
    step = jnp.asarray(step)
    hold = jnp.asarray(policy.hold, step.dtype)
    # A selection that is kept for several steps has the rates of the first of them.
    period, first_step = step // hold, step - step % hold
    rate = _value_at("rate", policy.rate, first_step)
    layer_rate = _value_at("layer_rate", policy.layer_rate, first_step)
    groups: list[Group] = []
    if layout.layers:
        widths = sorted({layer.channels for layer in layout.layers})
        by_width = {
            width: tuple(
                sorted(
                    (layer for layer in layout.layers if layer.channels == width),
                    key=lambda layer: layer.path,
                )
            )
            for width in widths
        }
        layers = [layer for members in by_width.values() for layer in members]
        base_key = jax.random.wrap_key_data(_words(policy.key), impl="threefry2x32")
        step_key = jax.random.fold_in(base_key, period)
        chosen, chance = _choose_layers(policy, layers, step_key)
        survival = 1.0 - layer_rate * chance
        rows = {width: sum(x.depth for x in members) for width, members in by_width.items()}
        words = _random_words(policy, _layer_keys(layers, step_key), rows)
        stop = 0
        for width, members in by_width.items():
            start, stop = stop, stop + rows[width]
            layer_words, channel_words = words[width]
            masked = chosen[start:stop] & (_uniform(layer_words[:, 0]) < layer_rate)
            kept = _choose_channels(policy, rate, width, layer_words[:, 1], channel_words)
            groups.append(
                _group(
                    policy, rate, members, chosen[start:stop], masked, survival[start:stop], kept
                )
            )
    if policy.freezes_others:
        groups += frozen_group(leaf for leaf in layout.leaves if is_frozen(policy, leaf))
    return Selection(tuple(groups), policy, layout, policy.freezes_others)


def is_frozen(policy: Policy, leaf: channels.Leaf) -> bool:
    """Whether a leaf without channels is frozen, because only one layer learns in a step."""
    learns = leaf.reason in (channels.EXEMPT, channels.NO_VALUES)
    return policy.freezes_others and leaf.layer is None and not learns


def check_layers(policy: Policy, layout: channels.Layout) -> None:
    """Raises a ValueError if `window_groups` or `layer_weights` do not fit the layers of a tree."""
    groups = policy.window_groups or 1
    for layer in layout.layers:
        if layer.channels % groups and policy.channel_choice == "window":
            raise ValueError(
                f"window_groups={groups} does not divide the {layer.channels} channels of "
                f"{layer.path!r}; give a divisor, or exempt the leaf."
            )
    if policy.layer_choice != "one":
        return
    paths = {layer.path for layer in layout.layers}
    if isinstance(policy.layer_weights, str):
        if layout.partial:
            raise ValueError(
                "layer_choice='one' picks one layer of the whole model, and this tree holds a part "
                "of it (it has MaskedNodes, or the policy has a root); give layer_weights as a "
                f"dict with the path of every layer of the model, such as {{{min(paths)!r}: 1.0}}."
            )
        return
    weighted = set(dict(policy.layer_weights))
    for path in sorted(paths - weighted):
        raise ValueError(f"layer_weights has no weight for the layer {path!r}; add one.")
    for path in () if layout.partial else sorted(weighted - paths):
        raise ValueError(
            f"layer_weights has a weight for {path!r}, but the tree has no such layer; its layers "
            f"are {sorted(paths)}."
        )


def num_kept(rate: float | jax.Array, size: int) -> int | jax.Array:
    """How many of `size` channels "exact" and "window" keep: at least one, none at rate 1."""
    if isinstance(rate, float):
        return 0 if rate == 1.0 else max(1, round((1.0 - rate) * size))
    kept = jnp.round((1.0 - rate) * size).astype(jnp.int32)
    return jnp.where(rate >= 1.0, 0, jnp.maximum(1, kept))


def masked_mode(policy: Policy, rate: float | jax.Array, width: int) -> tuple[Mode, Part | None]:
    """What a layer does when it is masked, and which part it keeps if its size is static."""
    if not isinstance(rate, float):
        return Mode.PARTIAL, None
    blocks = policy.window_groups or 1
    size = width // blocks
    kept = num_kept(rate, size)
    if kept == 0:
        return Mode.FROZEN, None
    if policy.channel_choice == "bernoulli":
        return (Mode.FULL if rate == 0.0 else Mode.PARTIAL), None
    if kept == size:
        return Mode.FULL, None
    assert isinstance(kept, int)
    return Mode.PARTIAL, Part(blocks, size, kept, policy.channel_choice == "window")


def possible_modes(policy: Policy, when_masked: Mode) -> tuple[Mode, ...]:
    """Every mode that a layer may have in some step."""
    # A schedule or an array may be anything between 0 and 1.
    layer_rate = policy.layer_rate if isinstance(policy.layer_rate, float) else 0.5
    modes = set()
    if layer_rate > 0.0:
        modes.add(when_masked)
    if layer_rate < 1.0:
        modes.add(Mode.FULL)
    if policy.layer_choice == "one":
        modes.add(Mode.FROZEN if policy.freezes_others else Mode.FULL)
    return tuple(sorted(modes))


class _Kept(NamedTuple):
    """Which channels masked layers keep: `Group` describes `keep` and `place`.

    `probability` is the probability that a channel is kept.
    """

    keep: jax.Array | np.ndarray
    probability: Any
    place: jax.Array | None


def _group(
    policy: Policy,
    rate: float | jax.Array,
    layers: tuple[channels.Leaf, ...],
    chosen: jax.Array | np.ndarray,
    masked: jax.Array | np.ndarray,
    survival: jax.Array | np.ndarray,
    kept: _Kept,
) -> Group:
    """Combines the draws of layers with the same number of channels.

    Args:
      policy: the policy.
      rate: its rate in this step.
      layers: the leaves.
      chosen: which rows may be masked in this step: all, or the "one".
      masked: which rows are masked.
      survival: the probability that a row is not masked.
      kept: what the rows keep if they are masked.
    """
    when_masked, part = masked_mode(policy, rate, layers[0].channels)
    learns_in_full = jnp.asarray(chosen) | (not policy.freezes_others)
    otherwise = jnp.where(learns_in_full, np.int32(Mode.FULL), np.int32(Mode.FROZEN))
    masked = jnp.asarray(masked)
    mode = jnp.where(masked, np.int32(when_masked), otherwise)
    keep = jnp.where(masked[:, None], kept.keep, learns_in_full[:, None])
    scale = None
    if policy.rescale != "none":
        whole = jnp.ones(survival.shape, jnp.float32)
        if policy.rescale == "expected":
            # With rate 1 whole layers are frozen, and those that learn make up for it.
            whole = jnp.where(rate >= 1.0, 1.0 / jnp.where(survival > 0, survival, 1.0), whole)
        scale = jnp.where(masked, _inverse(_probability(policy, kept)), whole)
    modes = possible_modes(policy, when_masked)
    part = part if Mode.PARTIAL in modes else None
    return Group(mode, keep, scale, kept.place if part else None, layers, modes, part)


def _probability(policy: Policy, kept: _Kept) -> jax.Array:
    """What `rescale` divides the kept channels of a masked layer by."""
    if policy.rescale == "realized":
        return jnp.mean(kept.keep, axis=1, dtype=jnp.float32)
    return jnp.asarray(kept.probability, jnp.float32)


def _inverse(probability: jax.Array) -> jax.Array:
    # Where nothing is kept the quotient is not used, and must not be a NaN.
    return 1.0 / jnp.where(probability > 0, probability, 1.0)


def _value_at(name: str, rate: Any, step: jax.Array) -> float | jax.Array:
    """A Python rate as it is, a schedule at its step, arrays in float32."""
    value = rate(step) if callable(rate) else rate
    if not isinstance(value, (int, float)):
        return jnp.asarray(value, jnp.float32)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} must be a drop probability between 0 and 1, and its schedule returned {value}."
        )
    return float(value)


def _words(key: Any) -> jax.Array:
    return jnp.asarray(key if isinstance(key, jax.Array) else np.array(key, np.uint32))


_fold_pairwise = jax.vmap(jax.random.fold_in)  # One number into each key.
_fold_many = jax.vmap(jax.random.fold_in, in_axes=(None, 0))  # Many numbers into one key.


def _layer_keys(layers: Sequence[channels.Leaf], step_key: jax.Array) -> jax.Array:
    """One key for each layer and stack index, in order of layers."""
    rows = [layer.depth for layer in layers]
    ids = np.repeat(np.array([channels.layer_id(x.path) for x in layers], np.uint32), rows)
    return _fold_pairwise(_fold_many(step_key, ids), _stack_index(rows))


def _stack_index(rows: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.arange(n, dtype=np.uint32) for n in rows])


def _random_words(
    policy: Policy, keys: jax.Array, rows: Mapping[int, int]
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """All random words of a step, dtype uint32, from one vectorised fold for the whole tree.

    Returns for each width the words of its layers as a whole, of shape `(rows, 2)`, and those of
    their channels, of shape `(rows, width)`. A window needs none of the latter.
    """
    needs_channels = policy.channel_choice != "window"
    folds = {width: 1 + (width + 1) // 2 if needs_channels else 1 for width in rows}
    flat_keys, flat_index, stop = [], [], 0
    for width, number in rows.items():
        start, stop = stop, stop + number
        shape = (number, folds[width])
        flat_keys.append(jnp.broadcast_to(keys[start:stop, None], shape).ravel())
        flat_index.append(jax.lax.broadcasted_iota(jnp.uint32, shape, 1).ravel())
    folded = _fold_pairwise(jnp.concatenate(flat_keys), jnp.concatenate(flat_index))
    flat = jax.random.key_data(folded)
    words, stop = {}, 0
    for width, number in rows.items():
        start, stop = stop, stop + number * folds[width]
        pairs = flat[start:stop].reshape(number, folds[width], 2)
        words[width] = pairs[:, 0], pairs[:, 1:].reshape(number, -1)[:, :width]
    return words


def _uniform(words: jax.Array) -> jax.Array:
    """Uniform in [0, 1): 24 bits, so that float32 holds them exactly and 1 is never reached."""
    return (words >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _choose_layers(
    policy: Policy, layers: Sequence[channels.Leaf], step_key: jax.Array
) -> tuple[jax.Array | np.ndarray, np.ndarray]:
    """Which rows may be masked in this step, and the probability of each: both of shape (rows,)."""
    rows = np.array([layer.depth for layer in layers])
    if policy.layer_choice == "bernoulli":
        return np.ones(rows.sum(), bool), np.ones(rows.sum(), np.float32)

    weights = _layer_weights(policy, layers)
    paths = sorted(weights)
    probabilities = np.array([weights[path] for path in paths]) / sum(weights.values())
    # Canonical paths have no empty parts, so no layer has this one.
    pick_key = jax.random.fold_in(step_key, channels.layer_id("//layer_choice"))
    first, second = jax.random.key_data(pick_key)
    bounds = np.cumsum(probabilities)[:-1].astype(np.float32)
    picked = jnp.sum(_uniform(first) >= bounds)
    position = np.repeat([paths.index(layer.path) for layer in layers], rows)
    # Within a stack every index is equally likely.
    depth = np.repeat(rows, rows).astype(np.uint32)
    in_stack = _stack_index(rows.tolist()) == second % depth
    chance = probabilities[position] / np.repeat(rows, rows)
    return (picked == position) & in_stack, chance.astype(np.float32)


def _layer_weights(policy: Policy, layers: Sequence[channels.Leaf]) -> dict[str, float]:
    if policy.layer_weights == "uniform":
        return {layer.path: float(layer.depth) for layer in layers}
    if policy.layer_weights == "size":
        return {layer.path: float(layer.size) for layer in layers}
    return dict(policy.layer_weights)


def _choose_channels(
    policy: Policy,
    rate: float | jax.Array,
    width: int,
    offset_words: jax.Array,
    channel_words: jax.Array,
) -> _Kept:
    if policy.channel_choice == "bernoulli":
        keep = _uniform(channel_words) >= rate
        # Where all would be dropped none is, so a channel learns a little more often than 1 - rate.
        spared = ~jnp.any(keep, axis=1, keepdims=True) & (rate < 1.0)
        return _Kept(keep | spared, 1.0 - rate + rate**width, None)

    if policy.channel_choice == "exact":
        kept = num_kept(rate, width)
        keep = _smallest(channel_words, kept)
        place = _positions(keep, kept) if isinstance(kept, int) else None
        return _Kept(keep, kept / width, place)

    size = width // (policy.window_groups or 1)
    kept = num_kept(rate, size)
    # The remainder favours some offsets by less than size / 2**32.
    start = (offset_words % np.uint32(size)).astype(jnp.int32)
    position = np.arange(width, dtype=np.int32)[None, :] % size
    return _Kept((position - start[:, None]) % size < kept, kept / size, start)


def _smallest(words: jax.Array, kept: int | jax.Array) -> jax.Array:
    """Marks the `kept` smallest words of each row; of equal words the first.

    Sorting the words alone is several times cheaper than ranking them with `argsort`.
    """
    ordered = jnp.sort(words, axis=1)
    last = jnp.take(ordered, jnp.maximum(kept - 1, 0), axis=1)[:, None]
    below, equal = words < last, words == last
    room = kept - jnp.sum(below, axis=1, keepdims=True, dtype=jnp.int32)
    return below | (equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= room))


def _positions(keep: jax.Array, kept: int) -> jax.Array:
    """The positions of the kept channels of each row, in rising order: int32, `(rows, kept)`."""
    width = keep.shape[1]
    channel = np.arange(width, dtype=np.int32)[None]
    return jnp.sort(jnp.where(keep, channel, np.int32(width)), axis=1)[:, :kept]
