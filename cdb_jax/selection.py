"""Selections: for every layer a short vector of factors, 0 for a dropped channel.

A layer's draw depends on the key, the count and the layer's own path, channel count and stack,
and on nothing else in the tree:

    instance key = fold_in(fold_in(fold_in(key, count), layer id), stack index)

`fold_in(instance key, 0)` holds the words for the layer as a whole, `fold_in(instance key, 1 + i)`
those of channels 2i and 2i + 1. All of them come from one vectorised fold for the whole tree;
layers with the same number of channels then form one matrix, one row for each layer, so the number
of operations does not grow with the depth of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax import channels, scaling
from cdb_jax.policy import Policy, require_policy

Selection = dict[str, jax.Array]

# The most results of one conditional: the time to compile it grows with their square.
TOGETHER = 64


def sample_selection(policy: Policy, updates: Any, count: jax.typing.ArrayLike) -> Selection:
    """Draws the channels that learn in one step.

    Args:
      policy: which channels may be dropped, and how often.
      updates: the tree of gradients, updates or parameters; only its paths, shapes and dtypes are
        read, so `jax.ShapeDtypeStruct` leaves will do.
      count: the step, an int scalar. The same policy and count give the same selection.

    Returns:
      A dict from the canonical path of each layer to its factors, float32 of shape
      `(*stack, channels)`: 0 where the channel is dropped, otherwise what its updates are
      multiplied by. With `other_layers="still"` a leaf without channels that stands still has the
      scalar 0.

    Raises:
      ValueError: if the policy does not fit the tree.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="exact")
      >>> cdb_jax.sample_selection(policy, {"kernel": jnp.ones((3, 4))}, count=7)
      {'kernel': Array([0., 1., 0., 1.], dtype=float32)}
    """
    return as_selection(draw(policy, require_policy(policy).layout(updates), count))


def dropped_fraction(policy: Policy, updates: Any, count: jax.typing.ArrayLike) -> jax.Array:
    """The fraction of the parameters in maskable layers whose channel is dropped in a step.

    `channel_drop_back` keeps it in its state; for logs of a loop without it, such as one that uses
    `value_and_grad`.

    Args:
      policy: which channels may be dropped, and how often.
      updates: the tree of gradients or parameters; only its paths, shapes and dtypes are read.
      count: the step, an int scalar.

    Returns:
      A float32 scalar.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> policy = cdb_jax.Policy(0.25, key=0, channel_choice="exact")
      >>> cdb_jax.dropped_fraction(policy, {"kernel": jnp.ones((3, 8))}, count=7)
      Array(0.25, dtype=float32)
    """
    layout = require_policy(policy).layout(updates)
    return fraction_of(draw(policy, layout, count), layout)


def apply_selection(updates: Any, selection: Mapping[str, Any], policy: Policy) -> Any:
    r"""Multiplies every channel by its factor; a factor of 0 selects zero.

    For a leaf :math:`g` with factors :math:`f` along its channel axes,

    .. math:: g'_{\ldots c \ldots} = f_c\, g_{\ldots c \ldots} \text{ if } f_c \ne 0,
       \text{ else } 0,

    so a NaN in a dropped channel does not pass, and a factor of 1 leaves the bits alone.

    Args:
      updates: a tree of arrays.
      selection: factors by path as `sample_selection` returns them, from there or from anywhere
        else, a recorded selection included.
      policy: supplies the layout: which leaf belongs to which path, along which axes.

    Returns:
      The masked tree: structure, shapes, dtypes and shardings of `updates`.

    Raises:
      ValueError: if the selection lacks a layer of the tree, has one too many, or a wrong shape.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> policy = cdb_jax.Policy(0.5, key=0)
      >>> cdb_jax.apply_selection({"kernel": jnp.ones((2, 3))}, {"kernel": [0.0, 1.0, 2.0]}, policy)
      {'kernel': Array([[0., 1., 2.],
             [0., 1., 2.]], dtype=float32)}
    """
    layout = require_policy(policy).layout(updates)
    factors = {path: jnp.asarray(values, jnp.float32) for path, values in selection.items()}
    for leaf in layout.layers:
        if leaf.path not in factors:
            raise ValueError(
                f"selection has no entry for {leaf.path!r}; add factors of shape "
                f"{(*leaf.stack_shape, leaf.channels)}."
            )
        expected = (*leaf.stack_shape, leaf.channels)
        if factors[leaf.path].shape != expected:
            raise ValueError(
                f"selection[{leaf.path!r}] has shape {factors[leaf.path].shape}; the leaf of shape "
                f"{leaf.shape} needs {expected}."
            )
    for path in factors.keys() - {leaf.path for leaf in layout.leaves}:
        raise ValueError(f"selection has an entry for {path!r}, which is no leaf of the updates.")
    keep = {path: values != 0 for path, values in factors.items()}
    leaves, treedef = jax.tree.flatten(updates)
    return jax.tree.unflatten(treedef, _mask(leaves, keep, factors, layout))


def touched(policy: Policy, layout: channels.Layout, leaves: Sequence[Any]) -> list[Any]:
    """The leaves that a selection may change; None for the others, whatever they are."""
    learns_less = not policy.drops_nothing
    return [
        x if learns_less and (leaf.layer is not None or stands_still(policy, leaf)) else None
        for x, leaf in zip(leaves, layout.leaves, strict=True)
    ]


def mask(
    leaves: Sequence[Any],
    groups: Sequence[Group],
    policy: Policy,
    layout: channels.Layout,
    count: jax.typing.ArrayLike,
    done: Collection[str] = (),
) -> list[Any]:
    """`apply_selection` for the groups that the policy has drawn at `count`.

    A leaf may be None and stays so. The leaves whose paths are in `done` have zeros for dropped
    channels already.
    """
    if policy.drops_nothing:
        return list(leaves)
    wanted = {leaf.source for leaf in layout.leaves if leaf.path not in done}
    keep = {path: x for path, x in kept(groups, count).items() if path in wanted}
    # Without rescaling the factors are 0 and 1, and there is nothing to multiply.
    scales = {} if policy.rescale == "none" else _cut(groups, count)
    return _mask(leaves, keep, scales, layout, done)


def kept(groups: Sequence[Group], count: jax.typing.ArrayLike) -> Selection:
    """By path which channels learn: bool, shape `(*stack, channels)`, or `()` without channels."""
    return _cut([group._replace(factors=group.factors != 0) for group in groups], count)


def _cut(groups: Sequence[Group], count: jax.typing.ArrayLike) -> Selection:
    """`as_selection`, computed once, in runs of `TOGETHER` layers."""
    selection: Selection = {}
    for run in _runs(groups):
        cut = lambda matrices, run=run: as_selection(
            [group._replace(factors=x) for group, x in zip(run, matrices, strict=True)]
        )
        selection |= materialise(cut, [group.factors for group in run], count)
    return selection


def _runs(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The layers of all groups in their order, `TOGETHER` at a time, with their factors only."""
    run: list[Group] = []
    for group in groups:
        layers, stop = group.layers, 0
        while layers:
            room = TOGETHER - sum(len(other.layers) for other in run)
            now, layers = layers[:room], layers[room:]
            start, stop = stop, stop + sum(layer.depth for layer in now)
            run.append(group._replace(layers=now, factors=group.factors[start:stop]))
            if len(now) == room:
                yield run
                run = []
    if run:
        yield run


def materialise(
    f: Callable[[Any], Any], x: Any, count: jax.typing.ArrayLike, *, cpu_only: bool = False
) -> Any:
    """`f(x)`, which XLA computes once, instead of anew for every weight it is applied to.

    Fused into the parameter-sized loops, the draw would be repeated for each weight of a channel,
    and every layer would become a loop of its own to compile: four times the compilation time of
    AdamW on a ViT-B. The CPU compiler drops barriers before it fuses, but fuses nothing through a
    conditional; on other platforms a conditional may wait for the host, and barriers hold.
    """

    def zeros(x: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(f, x))

    barrier = (lambda x: x) if cpu_only else jax.lax.optimization_barrier
    return jax.lax.platform_dependent(
        x,
        (jnp.asarray(count) | 1) != 0,  # Always, but no compiler knows.
        cpu=lambda x, always: jax.lax.cond(always, f, zeros, x),
        default=lambda x, always: barrier(f(x)),
    )


def _mask(
    leaves: Sequence[Any],
    keep: Mapping[str, jax.Array],
    factors: Mapping[str, jax.Array],
    layout: channels.Layout,
    done: Collection[str] = (),
) -> list[Any]:
    masked: list[Any] = []
    for x, leaf in zip(leaves, layout.leaves, strict=True):
        path = leaf.source
        if x is None:
            masked.append(None)
            continue
        if path in factors:
            scale = broadcastable(factors[path], leaf)
            # Even a product with 1 can flush a subnormal number to zero.
            x = jnp.where(scale == 1, x, scaling.scale(x, scale))
        if path in keep and leaf.path not in done:
            # Selected, not multiplied by zero: NaN times zero is NaN.
            x = jnp.where(broadcastable(keep[path], leaf), x, jnp.zeros((), x.dtype))
        masked.append(x)
    return masked


def broadcastable(vector: jax.Array, leaf: channels.Leaf) -> jax.Array:
    """Gives a vector the rank of its leaf, with size 1 along the axes it does not speak of."""
    if vector.ndim:
        sizes = [leaf.shape[axis] for axis in leaf.axes]
        vector = vector.reshape(sizes).transpose(np.argsort(leaf.axes))
    return jnp.expand_dims(vector, [i for i in range(len(leaf.shape)) if i not in leaf.axes])


class Group(NamedTuple):
    """Layers with the same number of channels, and their factors as the rows of one matrix."""

    layers: tuple[channels.Leaf, ...]
    factors: jax.Array  # shape=(rows, channels), dtype=jnp.float32
    masked: jax.Array  # shape=(rows,), dtype=jnp.bool: whether `rate` applies.
    start: jax.Array | None = None  # shape=(rows,), dtype=jnp.int32: of a window, in each group.


def check_layers(policy: Policy, layout: channels.Layout) -> None:
    """Raises a ValueError if the layers of a layout do not allow what the policy asks for."""
    groups = policy.window_groups or 1
    for layer in layout.layers:
        if layer.channels % groups:
            raise ValueError(
                f"window_groups={groups} does not divide the {layer.channels} channels of "
                f"{layer.path!r}; use a divisor of every layer's channels, or exempt that layer."
            )
    if policy.layer_choice != "one" or not layout.layers:
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
    weighted = {path for path, _ in policy.layer_weights}
    for path in sorted(paths - weighted):
        raise ValueError(f"layer_weights has no weight for the layer {path!r}; add one.")
    for path in () if layout.partial else sorted(weighted - paths):
        raise ValueError(
            f"layer_weights has a weight for {path!r}, which is no layer of the tree; its layers "
            f"are {sorted(paths)}."
        )


def check_count(count: Any) -> None:
    """Raises a TypeError or ValueError if a count is no step."""
    whole = hasattr(count, "dtype") and jnp.issubdtype(count.dtype, jnp.integer)
    if not (isinstance(count, int) or (whole and count.shape == ())) or isinstance(count, bool):
        raise TypeError(
            f"count must be the step, an int or an integer scalar, got {count!r}; use count=step "
            "or count=cdb_jax.selection_count(opt_state)."
        )
    if isinstance(count, (int, np.integer)) and not 0 <= count < 2**32:
        raise ValueError(f"count={count} is not in [0, 2**32); count steps from 0.")


def draw(policy: Policy, layout: channels.Layout, count: jax.typing.ArrayLike) -> list[Group]:
    """Draws the factors of every layer of a layout, grouped by number of channels."""
    check_layers(policy, layout)
    check_count(count)
    period, count = _period(policy, count)
    by_channels: dict[int, list[channels.Leaf]] = {}
    for layer in sorted(layout.layers, key=lambda layer: (layer.channels, layer.path)):
        by_channels.setdefault(layer.channels, []).append(layer)
    layers = list(itertools.chain(*by_channels.values()))
    groups = []
    if layers:
        rate = _at("rate", policy.rate, count)
        layer_rate = _at("layer_rate", policy.layer_rate, count)
        step_key = jax.random.fold_in(
            jax.random.wrap_key_data(_words(policy.key), impl="threefry2x32"), period
        )
        chosen, chance = _choose_layers(policy, layers, step_key)
        survival = 1.0 - layer_rate * chance
        rows = {width: sum(x.depth for x in members) for width, members in by_channels.items()}
        words = _random_words(policy, _instance_keys(layers, step_key), rows)
        stop = 0
        for (width, members), (own, each) in zip(by_channels.items(), words, strict=True):
            start, stop = stop, stop + rows[width]
            masked = chosen[start:stop] & (_uniform(own[:, 0]) < layer_rate)
            keep, probability, at = _choose_channels(policy, rate, width, own[:, 1], each)
            kept = _kept_factors(policy.rescale, keep, probability)
            whole = _whole_factors(policy, rate, chosen[start:stop], survival[start:stop])
            factors = jnp.where(masked[:, None], kept, whole[:, None])
            groups.append(Group(tuple(members), factors, jnp.asarray(masked), at))
    if policy.others_stand_still:
        still = tuple(leaf for leaf in layout.leaves if stands_still(policy, leaf))
        zeros = jnp.zeros((len(still), 1), jnp.float32)
        groups.append(Group(still, zeros, masked=jnp.zeros(len(still), bool)))
    return groups


def _period(policy: Policy, count: jax.typing.ArrayLike) -> tuple[Any, Any]:
    """The number of the selection, and the first step that it is for, whose rates it has."""
    if isinstance(policy.hold, int) and policy.hold == 1:
        return count, count
    step = jnp.asarray(count)
    hold = jnp.asarray(policy.hold, step.dtype)
    return step // hold, step - step % hold


def as_selection(groups: Sequence[Group]) -> Selection:
    """Cuts the matrices of the groups into one entry for each layer."""
    selection = {}
    for group in groups:
        for layer, rows in rows_of(group):
            shape = (*layer.stack_shape, layer.channels) if layer.layer is not None else ()
            selection[layer.path] = group.factors[rows].reshape(shape)
    return selection


def rows_of(group: Group) -> Iterator[tuple[channels.Leaf, slice]]:
    """The layers of a group, and the rows of its matrix that are theirs."""
    stop = 0
    for layer in group.layers:
        start, stop = stop, stop + layer.depth
        yield layer, slice(start, stop)


def fraction_of(groups: Sequence[Group], layout: channels.Layout) -> jax.Array:
    """`dropped_fraction` of groups that are drawn."""
    size: dict[str, int] = {}
    for leaf in layout.leaves:  # A bias that follows counts with its layer.
        path = leaf.source
        size[path] = size.get(path, 0) + leaf.size
    total = sum(size[layer.path] for group in groups for layer in group.layers)
    fraction = jnp.zeros((), jnp.float32)
    for layers, factors, *_ in groups:
        shares = [size[layer.path] / layer.depth / total for layer in layers]
        weights = np.repeat(shares, [layer.depth for layer in layers]).astype(np.float32)
        fraction += jnp.sum(weights * jnp.mean(factors == 0, axis=1, dtype=jnp.float32))
    return fraction


def kept_channels(rate: float | jax.Array, width: int) -> int | jax.Array:
    """How many of `width` channels "exact" and "window" keep: at least one, none at rate 1."""
    if isinstance(rate, float):
        return 0 if rate == 1.0 else max(1, round((1.0 - rate) * width))
    kept = jnp.round((1.0 - rate) * width).astype(jnp.int32)
    return jnp.where(rate >= 1.0, 0, jnp.maximum(1, kept))


def _at(name: str, rate: Any, count: jax.typing.ArrayLike) -> float | jax.Array:
    """A Python rate as it is, a schedule at its count, arrays in float32."""
    value = rate(count) if callable(rate) else rate
    if not isinstance(value, (int, float)):
        return jnp.asarray(value, jnp.float32)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} must be a drop probability between 0 and 1, and its schedule returned {value}."
        )
    return float(value)


def _words(key: tuple[int, int] | jax.Array) -> jax.Array:
    return jnp.asarray(key if isinstance(key, jax.Array) else np.array(key, np.uint32))


_fold_each = jax.vmap(jax.random.fold_in)  # One number into each key.
_fold_many = jax.vmap(jax.random.fold_in, in_axes=(None, 0))  # Many numbers into one key.


def _instance_keys(layers: Sequence[channels.Leaf], step_key: jax.Array) -> jax.Array:
    """One key for each layer and stack index, in order of layers."""
    rows = [layer.depth for layer in layers]
    ids = np.repeat(np.array([channels.layer_id(x.path) for x in layers], np.uint32), rows)
    index = np.concatenate([np.arange(n, dtype=np.uint32) for n in rows])
    return _fold_each(_fold_many(step_key, ids), index)


def _random_words(
    policy: Policy, keys: jax.Array, rows: Mapping[int, int]
) -> list[tuple[jax.Array, jax.Array]]:
    """All random words of a step, dtype uint32, from one vectorised fold for the whole tree.

    Returns for each width the words of its layers as a whole, shape `(rows, 2)`, and those of their
    channels, shape `(rows, width)`; a window needs none of the latter.
    """
    folds = {
        width: 1 if policy.channel_choice == "window" else 1 + (width + 1) // 2 for width in rows
    }
    flat_keys, flat_index, stop = [], [], 0
    for width, number in rows.items():
        start, stop = stop, stop + number
        shape = (number, folds[width])
        flat_keys.append(jnp.broadcast_to(keys[start:stop, None], shape).ravel())
        flat_index.append(jax.lax.broadcasted_iota(jnp.uint32, shape, 1).ravel())
    folded = _fold_each(jnp.concatenate(flat_keys), jnp.concatenate(flat_index))
    flat = jax.random.key_data(folded)
    words, stop = [], 0
    for width, number in rows.items():
        start, stop = stop, stop + number * folds[width]
        of_row = flat[start:stop].reshape(number, folds[width], 2)
        words.append((of_row[:, 0], of_row[:, 1:].reshape(number, -1)[:, :width]))
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
    index = np.concatenate([np.arange(n) for n in rows]).astype(np.uint32)
    # Within a stack every index is equally likely.
    within = index == second % np.repeat(rows, rows).astype(np.uint32)
    chance = probabilities[position] / np.repeat(rows, rows)
    return (picked == position) & within, chance.astype(np.float32)


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
    offset: jax.Array,
    words: jax.Array,
) -> tuple[jax.Array | np.ndarray, Any, jax.Array | None]:
    """Which channels a masked layer keeps, bool (rows, width), and the probability of each.

    The third result is where a window starts.
    """
    if policy.channel_choice == "bernoulli":
        keep = _uniform(words) >= rate
        # Where all would be dropped none is, so a channel learns a little more often than 1 - rate.
        spared = ~jnp.any(keep, axis=1, keepdims=True) & (rate < 1.0)
        return keep | spared, 1.0 - rate + rate**width, None

    if policy.channel_choice == "exact":
        kept = kept_channels(rate, width)
        return _smallest(words, kept), kept / width, None

    size = width // (policy.window_groups or 1)
    kept = kept_channels(rate, size)
    # The remainder favours some offsets by less than size / 2**32.
    start = (offset % np.uint32(size)).astype(jnp.int32)
    position = np.arange(width, dtype=np.int32)[None, :] % size
    return (position - start[:, None]) % size < kept, kept / size, start


def _smallest(words: jax.Array, kept: int | jax.Array) -> jax.Array:
    """Marks the `kept` smallest words of each row; of equal words the first.

    Sorting the words alone is several times cheaper than ranking them with `argsort`.
    """
    ordered = jnp.sort(words, axis=1)
    last = jnp.take(ordered, jnp.maximum(kept - 1, 0), axis=1)[:, None]
    below, equal = words < last, words == last
    room = kept - jnp.sum(below, axis=1, keepdims=True, dtype=jnp.int32)
    return below | (equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= room))


def _kept_factors(rescale: str, keep: jax.Array | np.ndarray, probability: Any) -> jax.Array:
    if rescale == "none":
        return jnp.asarray(keep, jnp.float32)
    if rescale == "realized":
        probability = jnp.mean(keep, axis=1, keepdims=True, dtype=jnp.float32)
    # Where nothing is kept the quotient is not used, and must not be a NaN.
    probability = jnp.asarray(probability, jnp.float32)
    return jnp.where(keep, 1.0 / jnp.where(probability > 0, probability, 1.0), np.float32(0.0))


def _whole_factors(
    policy: Policy, rate: float | jax.Array, chosen: Any, survival: Any
) -> jax.Array:
    """The factors of layers that are not masked in this step: shape (rows,)."""
    ones = jnp.ones(survival.shape, jnp.float32)
    if policy.rescale == "expected":
        # With rate 1 whole layers stand still, and those that learn make up for it.
        survival = jnp.where(survival > 0, survival, 1.0)
        ones = jnp.where(rate >= 1.0, 1.0 / survival, ones)
    if policy.others_stand_still:
        return jnp.where(chosen, ones, 0.0)
    return ones


def stands_still(policy: Policy, leaf: channels.Leaf) -> bool:
    """Whether a leaf without channels may not learn, because a layer does instead."""
    may_learn = leaf.layer is not None or leaf.reason in (channels.EXEMPT, channels.NO_VALUES)
    return policy.others_stand_still and not may_learn
