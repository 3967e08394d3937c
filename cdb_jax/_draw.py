"""Draws a selection: which channels of each layer learn in a step.

A layer's draw depends only on the key, the step, and the layer's path, number of channels and
stack, not on the rest of the tree:

    layer key = fold_in(fold_in(fold_in(key, step), layer id), stack index)

`fold_in(layer key, 0)` gives the random words for the layer as a whole, and
`fold_in(layer key, 1 + i)` those for channels 2i and 2i + 1. One vectorised fold computes all of
them for the whole tree. Layers with the same number of channels form one matrix with one row per
layer, so the number of operations does not grow with the depth of the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax import channels
from cdb_jax._checks import probability, short
from cdb_jax._compiling import compiled
from cdb_jax.channels import NoChannels
from cdb_jax.selection import Arrangement, Group, Mode, Part, Selection, positions_of, whole_group

if TYPE_CHECKING:
    from cdb_jax.policy import Policy


CONTIGUOUS = ("window", "chunk")  # They keep a contiguous block, so only its start is drawn.


def draw(layout: channels.Layout, policy: Policy, step: jax.typing.ArrayLike) -> Selection:
    """Draws which channels of the layers of a layout learn in a step."""
    check_layers(policy, layout)
    groups = _draw_groups(policy, layout, _settings_at(policy, jnp.asarray(step)))
    frozen = (leaf for leaf in layout.leaves if is_frozen(policy, leaf))
    groups += whole_group(frozen, Mode.FROZEN)
    return Selection(tuple(groups), policy, layout, policy.freezes_others)


draw_once = compiled(draw)  # Outside `jit`, it runs as one compiled program.


def is_frozen(policy: Policy, leaf: channels.Leaf) -> bool:
    """Whether a leaf without channels is frozen because only the picked layers learn."""
    learns = leaf.reason in (NoChannels.EXEMPT, NoChannels.NO_VALUES)
    return policy.freezes_others and leaf.layer is None and not learns


def check_layers(policy: Policy, layout: channels.Layout) -> None:
    """Raises a ValueError if groups, blocks, counts or weights of layers do not fit a tree."""
    _check_window_groups(policy, layout.layers)
    first_of_block = _first_of_blocks(policy, layout.layers)
    if not layout.partial:
        channels.check_matches("blocks", policy.blocks, [layer.path for layer in layout.layers])
    if policy.layer_choice == "exact":
        _check_num_layers(policy, layout, first_of_block.values())
        _check_layer_weights(policy, layout, set(first_of_block))


def _check_window_groups(policy: Policy, layers: Sequence[channels.Leaf]) -> None:
    groups = policy.window_groups or 1
    for layer in layers:
        if layer.channels % groups and policy.channel_choice in CONTIGUOUS:
            raise ValueError(
                f"window_groups={groups} does not divide the {layer.channels} channels of "
                f"{layer.path!r}; use a divisor, or exempt the leaf."
            )


def _first_of_blocks(policy: Policy, layers: Sequence[channels.Leaf]) -> dict[str, channels.Leaf]:
    """The first layer of each block, by the block's path."""
    first_of_block: dict[str, channels.Leaf] = {}
    for layer in layers:
        first = first_of_block.setdefault(block_of(policy, layer), layer)
        if first.stack_shape != layer.stack_shape:
            raise ValueError(
                f"blocks={policy.blocks!r}: {first.path!r} and {layer.path!r} are in one block but "
                f"have stacks of shapes {first.stack_shape} and {layer.stack_shape}; use a pattern "
                "that separates them, or the same stack axes for both."
            )
    return first_of_block


def _check_num_layers(
    policy: Policy, layout: channels.Layout, firsts: Collection[channels.Leaf]
) -> None:
    total = sum(layer.depth for layer in firsts)
    if firsts and policy.layers_picked > total:
        raise ValueError(
            f"num_layers={policy.num_layers} is more than the {total} layers of this tree (a block "
            "counts as one); use a smaller number. If layers are stacked in one array, specify "
            "the stack axis: Axes(..., stack=0) in channel_axes, or a preset's stack={'blocks': 0}."
        )
    if layout.partial and firsts and policy.layers_picked > 1:
        raise ValueError(
            f"num_layers={policy.num_layers} picks from the whole model, but this tree is only a "
            "part of it (it has MaskedNodes, or the policy has a root); use the whole tree, with "
            "the leaves that always learn in exempt, or num_layers=1."
        )


def _check_layer_weights(policy: Policy, layout: channels.Layout, paths: set[str]) -> None:
    if isinstance(policy.layer_weights, str):
        if layout.partial and paths:
            raise ValueError(
                "layer_choice='exact' picks from the whole model, but this tree is only part of it "
                "(it has MaskedNodes, or the policy has a root); pass layer_weights as a dict with "
                f"the path of every layer of the model, such as {{{min(paths)!r}: 1.0}}."
            )
        return
    weighted = set(dict(policy.layer_weights))
    if unweighted := paths - weighted:
        raise ValueError(f"layer_weights has no weight for the layer {min(unweighted)!r}; add one.")
    if (unknown := weighted - paths) and not layout.partial:
        raise ValueError(
            f"layer_weights has a weight for {min(unknown)!r}, but the tree has no such layer; its "
            f"layers are {sorted(paths)}."
        )


def block_of(policy: Policy, layer: channels.Leaf) -> str:
    """The path of the block that a layer belongs to, or its own if it is in none."""
    found = (channels.matching_prefix(pattern, layer.path) for pattern in policy.blocks)
    return next((path for path in found if path is not None), layer.path)


def num_kept(rate: float | jax.Array, size: int) -> int | jax.Array:
    """How many of `size` channels are kept, if that is fixed: at least one, but none at rate 1."""
    if isinstance(rate, float):
        return 0 if rate == 1.0 else max(1, round((1.0 - rate) * size))
    kept = jnp.round((1.0 - rate) * size).astype(jnp.int32)
    return jnp.where(rate >= 1.0, 0, jnp.maximum(1, kept))


def num_chunks(rate: float) -> int | None:
    """The number m of chunks of which "chunk" keeps one: 1 / (1 - rate), if that is an integer."""
    chunks = round(1.0 / (1.0 - rate))
    return chunks if abs(1.0 - (1.0 - rate) * chunks) < 1e-9 else None


def _arrangement(policy: Policy, rate: float | jax.Array, size: int) -> Arrangement:
    """How the kept ones of `size` channels lie, if their number is fixed."""
    if policy.channel_choice == "exact":
        return Arrangement.SCATTERED
    if policy.channel_choice == "chunk" and isinstance(rate, float) and rate < 1.0:
        chunks = num_chunks(rate)
        if chunks is not None and size % chunks == 0:
            return Arrangement.CHUNK
    return Arrangement.WINDOW


def expected_shares(policy: Policy, layout: channels.Layout) -> dict[str, float | None]:
    """The share of each layer that learns in an average step, by path; None if it is not fixed."""
    if not isinstance(policy.rate, float) or not isinstance(policy.layer_rate, float):
        return dict.fromkeys([layer.path for layer in layout.layers])
    shares: dict[str, float | None] = {}
    for layer, chance in zip(layout.layers, _chances(policy, layout.layers), strict=True):
        groups = policy.window_groups or 1
        kept = num_kept(policy.rate, layer.channels // groups)
        masked = 1.0 - policy.layer_rate * (1.0 - int(kept) * groups / layer.channels)
        otherwise = 0.0 if policy.freezes_others else 1.0
        shares[layer.path] = chance * masked + (1.0 - chance) * otherwise
    return shares


def masked_mode(policy: Policy, rate: float | jax.Array, width: int) -> tuple[Mode, Part | None]:
    """What a layer does when it is masked, and the part it keeps, if the part's size is static."""
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
    return Mode.PARTIAL, Part(blocks, size, kept, _arrangement(policy, rate, size))


def possible_modes(policy: Policy, when_masked: Mode) -> tuple[Mode, ...]:
    """Every mode that a layer may have in some step."""
    # A schedule or an array may be anything between 0 and 1.
    layer_rate = policy.layer_rate if isinstance(policy.layer_rate, float) else 0.5
    modes = set()
    if layer_rate > 0.0:
        modes.add(when_masked)
    if layer_rate < 1.0:
        modes.add(Mode.FULL)
    if policy.layer_choice == "exact":
        modes.add(Mode.FROZEN if policy.freezes_others else Mode.FULL)
    return tuple(sorted(modes))


class _Settings(NamedTuple):
    """The rates of a policy at a step, and the key of the step. Python floats are static."""

    rate: float | jax.Array
    layer_rate: float | jax.Array
    key: jax.Array


def _settings_at(policy: Policy, step: jax.Array) -> _Settings:
    if step.dtype.itemsize < 4:  # `hold` need not fit into it.
        step = step.astype(jnp.int32)
    hold = jnp.asarray(policy.hold, step.dtype)
    period, first_step = step // hold, step - step % hold
    words = policy.key if isinstance(policy.key, jax.Array) else np.array(policy.key, np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return _Settings(
        # A selection that is held for several steps uses the rates of the first of these steps.
        _rate_at("rate", policy.rate, first_step),
        _rate_at("layer_rate", policy.layer_rate, first_step),
        jax.random.fold_in(key, period),
    )


def _rate_at(name: str, rate: Any, step: jax.Array) -> float | jax.Array:
    """Returns a number as it is, a schedule's value at the step, or an array as float32."""
    if not callable(rate):
        return rate if isinstance(rate, float) else jnp.asarray(rate, jnp.float32)
    try:
        value = rate(step)
    except jax.errors.JAXTypeError as error:  # For example, a Python `if`.
        raise TypeError(
            f"{name}: the schedule must work with traced steps; use jnp.where instead of `if`, "
            "jnp instead of math and np, or an optax schedule."
        ) from error
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        raise TypeError(
            f"{name}: the schedule returned {short(value)}; return {probability(name)}, a number "
            "or a scalar array."
        )
    is_known = not isinstance(value, jax.core.Tracer)
    if jnp.shape(value) != () or (is_known and not 0.0 <= float(value) <= 1.0):
        raise ValueError(
            f"{name}: the schedule returned {value}; return {probability(name)} between 0 and 1."
        )
    return float(value) if isinstance(value, (int, float)) else jnp.asarray(value, jnp.float32)


class _Rows(NamedTuple):
    """Layers with the same number of channels, one row for each index of their stacks.

    Attributes:
      layers: the leaves.
      may_be_masked: which rows may be masked in this step: all, or those that "exact" picked.
      chance: for each row, the probability that it may be masked.
      mask_words: random words that decide whether a layer is masked, shape `(rows,)`.
      offset_words: random words for the place of a window or chunk, shape `(rows,)`.
      channel_words: random words of their channels, shape `(rows, channels)`; empty for windows
        and chunks.
    """

    layers: tuple[channels.Leaf, ...]
    may_be_masked: jax.Array | np.ndarray
    chance: np.ndarray
    mask_words: jax.Array
    offset_words: jax.Array
    channel_words: jax.Array


def _draw_groups(policy: Policy, layout: channels.Layout, settings: _Settings) -> list[Group]:
    widths = sorted({layer.channels for layer in layout.layers})
    if not widths:
        return []
    layers = sorted(layout.layers, key=lambda layer: (layer.channels, layer.path))
    by_width = [tuple(layer for layer in layers if layer.channels == width) for width in widths]
    num_rows = [sum(layer.depth for layer in members) for members in by_width]
    may_be_masked, chance = (
        _split(x, num_rows) for x in _choose_layers(policy, layers, settings.key)
    )
    depths = [layer.depth for layer in layers]
    keys = _keys_of([layer.path for layer in layers], depths, settings.key)
    layer_words, channel_words = _random_words(policy, keys, widths, num_rows)
    mask_words = [words[:, 0] for words in layer_words]
    if policy.blocks:  # One decision for all layers of a block.
        keys = _keys_of([block_of(policy, layer) for layer in layers], depths, settings.key)
        folded = _fold_pairwise(keys, np.zeros(sum(depths), np.uint32))
        mask_words = _split(jax.random.key_data(folded)[:, 0], num_rows)
    rows = [
        _Rows(
            layers=members,
            may_be_masked=may_be_masked[i],
            chance=chance[i],
            mask_words=mask_words[i],
            offset_words=layer_words[i][:, 1],
            channel_words=channel_words[i],
        )
        for i, members in enumerate(by_width)
    ]
    return [_draw_group(policy, settings, x) for x in rows]


def _split(x: Any, sizes: Sequence[int]) -> list[Any]:
    """Cuts an array into consecutive parts along its first axis."""
    stops = np.cumsum(sizes).tolist()
    return [x[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]


class _Kept(NamedTuple):
    """The channels that masked layers keep.

    Attributes:
      keep: which channels; bool, shape `(rows, channels)`.
      probability: the probability that a channel is kept.
      place: as in `Group`; None if the number of kept channels is not static.
    """

    keep: jax.Array | np.ndarray
    probability: Any
    place: jax.Array | None


def _draw_group(policy: Policy, settings: _Settings, rows: _Rows) -> Group:
    width, rate = rows.layers[0].channels, settings.rate
    kept = _choose_channels(policy, rate, width, rows.offset_words, rows.channel_words)
    masked = rows.may_be_masked & (_uniform(rows.mask_words) < settings.layer_rate)
    when_masked, part = masked_mode(policy, rate, width)
    learns_in_full = jnp.asarray(rows.may_be_masked) | (not policy.freezes_others)
    otherwise = jnp.where(learns_in_full, np.int32(Mode.FULL), np.int32(Mode.FROZEN))
    mode = jnp.where(masked, np.int32(when_masked), otherwise)
    keep = jnp.where(masked[:, None], kept.keep, learns_in_full[:, None])
    scale = None
    if policy.rescale != "none":
        learns = 1.0 - settings.layer_rate  # If it may be masked; the others are frozen or full.
        others = 0.0 if policy.freezes_others else 1.0 - rows.chance
        survival = rows.chance * learns + others
        scale = jnp.where(masked, *_scales(policy, rate, kept, survival))
    modes = possible_modes(policy, when_masked)
    part = part if Mode.PARTIAL in modes else None
    return Group(mode, keep, scale, kept.place if part else None, rows.layers, modes, part)


def _scales(
    policy: Policy, rate: float | jax.Array, kept: _Kept, survival: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """The factors of rows that are masked, and of rows that are not."""
    ones = jnp.ones(survival.shape, jnp.float32)
    if policy.rescale == "realized":
        return _inverse(jnp.mean(kept.keep, axis=1, dtype=jnp.float32)), ones
    # At rate 1, masked layers are frozen as a whole, and the layers that learn are scaled instead.
    when_whole = jnp.where(rate >= 1.0, _inverse(survival), ones)
    return _inverse(jnp.asarray(kept.probability, jnp.float32)), when_whole


def _inverse(probability: Any) -> jax.Array:
    # Where nothing is kept, the quotient is not used, but it must not be NaN.
    return 1.0 / jnp.where(probability > 0, probability, 1.0)


_fold_pairwise = jax.vmap(jax.random.fold_in)  # Folds one number into each key.
_fold_many = jax.vmap(jax.random.fold_in, in_axes=(None, 0))  # Folds many numbers into one key.


def _keys_of(paths: Sequence[str], depths: Sequence[int], key: jax.Array) -> jax.Array:
    """One key for each path and stack index."""
    ids = np.repeat(np.array([channels.layer_id(path) for path in paths], np.uint32), depths)
    return _fold_pairwise(_fold_many(key, ids), _stack_index(depths))


def _stack_index(depths: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.arange(depth, dtype=np.uint32) for depth in depths])


def _random_words(
    policy: Policy, keys: jax.Array, widths: Sequence[int], num_rows: Sequence[int]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """All random words of a step, dtype uint32, from one vectorised fold for the whole tree.

    For each width, returns the words of its layers and those of their channels; see `_Rows`.
    """
    needs_channels = policy.channel_choice not in CONTIGUOUS
    shapes = [
        (rows, 1 + (width + 1) // 2 if needs_channels else 1)
        for width, rows in zip(widths, num_rows, strict=True)
    ]
    flat_keys = [
        jnp.broadcast_to(key[:, None], shape).ravel()
        for key, shape in zip(_split(keys, num_rows), shapes, strict=True)
    ]
    flat_index = [jax.lax.broadcasted_iota(jnp.uint32, shape, 1).ravel() for shape in shapes]
    folded = _fold_pairwise(jnp.concatenate(flat_keys), jnp.concatenate(flat_index))
    words = _split(jax.random.key_data(folded), [math.prod(shape) for shape in shapes])
    pairs = [x.reshape(*shape, 2) for x, shape in zip(words, shapes, strict=True)]
    of_channels = [
        x[:, 1:].reshape(len(x), -1)[:, :width] for x, width in zip(pairs, widths, strict=True)
    ]
    return [x[:, 0] for x in pairs], of_channels


def _uniform(words: jax.Array) -> jax.Array:
    """Uniform in [0, 1): 24 bits, so that float32 holds them exactly and 1 is never reached."""
    return (words >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _choose_layers(
    policy: Policy, layers: Sequence[channels.Leaf], step_key: jax.Array
) -> tuple[jax.Array | np.ndarray, np.ndarray]:
    """Which rows may be masked in this step, and the probability of each; shape `(rows,)`."""
    depths = [layer.depth for layer in layers]
    if policy.layer_choice == "bernoulli":
        return np.ones(sum(depths), bool), np.ones(sum(depths), np.float32)

    blocks = depth_of_blocks(policy, layers)
    # Canonical paths have no empty parts, so no layer has this one.
    pick_key = jax.random.fold_in(step_key, channels.layer_id("//layer_choice"))
    if policy.layers_picked == 1:
        is_picked = _pick_one(policy, layers, blocks, pick_key)
    else:
        keys = _keys_of(list(blocks), list(blocks.values()), pick_key)
        words = jax.random.key_data(keys)[:, 0]
        is_picked = _smallest(words[None], policy.layers_picked)[0]
    first_row = dict(zip(blocks, np.cumsum([0, *blocks.values()]), strict=False))
    first = np.repeat([first_row[block_of(policy, layer)] for layer in layers], depths)
    rows = first + _stack_index(depths)
    return is_picked[rows], np.repeat(_chances(policy, layers), depths).astype(np.float32)


def depth_of_blocks(policy: Policy, layers: Sequence[channels.Leaf]) -> dict[str, int]:
    """The number of layers that each block stacks, sorted by path."""
    return dict(sorted((block_of(policy, layer), layer.depth) for layer in layers))


def _pick_one(
    policy: Policy, layers: Sequence[channels.Leaf], blocks: Mapping[str, int], pick_key: jax.Array
) -> jax.Array:
    """Marks one row of the blocks, which are sorted by path."""
    weights = _layer_weights(policy, layers)
    paths = sorted(weights)
    depths = [blocks.get(path, 0) for path in paths]  # Other parts of the model have weights too.
    probabilities = np.array([weights[path] for path in paths]) / sum(weights.values())
    layer_word, stack_word = jax.random.key_data(pick_key)
    bounds = np.cumsum(probabilities)[:-1].astype(np.float32)
    picked = jnp.sum(_uniform(layer_word) >= bounds)
    position = np.repeat(np.arange(len(paths)), depths)
    # Within a stack, every index is equally likely.
    depth = np.repeat(depths, depths).astype(np.uint32)
    return (picked == position) & (_stack_index(depths) == stack_word % depth)


def _chances(policy: Policy, layers: Sequence[channels.Leaf]) -> list[float]:
    """For each layer, the probability that it is among those that may be masked."""
    if policy.layer_choice == "bernoulli":
        return [1.0] * len(layers)
    if policy.layers_picked > 1:
        num_rows = sum(depth_of_blocks(policy, layers).values())
        return [policy.layers_picked / num_rows] * len(layers)
    weights = _layer_weights(policy, layers)
    total = sum(weights.values())
    return [weights[block_of(policy, layer)] / total / layer.depth for layer in layers]


def _layer_weights(policy: Policy, layers: Sequence[channels.Leaf]) -> dict[str, float]:
    """The weight of each block, by path."""
    if not isinstance(policy.layer_weights, str):
        return dict(policy.layer_weights)
    weights: dict[str, float] = {}
    for layer in layers:
        path = block_of(policy, layer)
        if policy.layer_weights == "size":
            weights[path] = weights.get(path, 0.0) + float(layer.size)
        else:
            weights[path] = float(layer.depth)
    return weights


def _choose_channels(
    policy: Policy,
    rate: float | jax.Array,
    width: int,
    offset_words: jax.Array,
    channel_words: jax.Array,
) -> _Kept:
    if policy.channel_choice == "bernoulli":
        keep = _uniform(channel_words) >= rate
        # If all would be dropped, none is, so a channel learns slightly more often than 1 - rate.
        spared = ~jnp.any(keep, axis=1, keepdims=True) & (rate < 1.0)
        return _Kept(keep | spared, 1.0 - rate + rate**width, None)

    if policy.channel_choice == "exact":
        kept = num_kept(rate, width)
        keep = _smallest(channel_words, kept)
        place = positions_of(keep, kept) if isinstance(kept, int) else None
        return _Kept(keep, kept / width, place)

    size = width // (policy.window_groups or 1)
    kept, stride = num_kept(rate, size), 1
    if isinstance(kept, int) and _arrangement(policy, rate, size) is Arrangement.CHUNK:
        stride = kept
    # The remainder favours some offsets by less than size / 2**32.
    start = (offset_words % np.uint32(size // stride)).astype(jnp.int32) * stride
    position = np.arange(width, dtype=np.int32)[None, :] % size
    return _Kept((position - start[:, None]) % size < kept, kept / size, start)


def _smallest(words: jax.Array, kept: int | jax.Array) -> jax.Array:
    """Marks the `kept` smallest words of each row; the first ones win ties.

    Sorting the words alone is several times cheaper than ranking them with `argsort`.
    """
    ordered = jnp.sort(words, axis=1)
    last = jnp.take(ordered, jnp.maximum(kept - 1, 0), axis=1)[:, None]
    below, equal = words < last, words == last
    room = kept - jnp.sum(below, axis=1, keepdims=True, dtype=jnp.int32)
    return below | (equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= room))
