"""The part of a tree that may learn, as a tree of smaller arrays.

While a selection is held, gradients and optimizer state are needed for this part only. Its shapes
are static; where it lies is known at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cdb_jax import _explicit as explicit, _parts as parts, channels
from cdb_jax._checks import short
from cdb_jax._compiling import compiled
from cdb_jax._xla import alone_on_cpu
from cdb_jax.policy import Policy
from cdb_jax.selection import Arrangement, Group, Mode, Part, broadcastable, per_layer


class Place(NamedTuple):
    """Where the kept part of a leaf lies. All arrays are int32, so that one vector can hold them.

    Attributes:
      channels: as `Group.place`, for the kept layers; None if all channels are kept.
      layers: the positions of the kept layers in a stack, shape `(kept,)`; None if all are kept.
      learns: 1 for each kept layer that learns in this step and 0 for the others; None if all do.
    """

    channels: jax.Array | None
    layers: jax.Array | None
    learns: jax.Array | None


class Cut(NamedTuple):
    """The part of a leaf that may learn. Static.

    Attributes:
      leaf: the leaf.
      part: the channels that are kept of each layer; None for all.
      layers: the layers that are kept of a stack, as if they were channels; None for all.
      may_rest: whether there are steps in which a kept layer does not learn.
      is_frozen: whether the leaf never learns.
    """

    leaf: channels.Leaf
    part: Part | None = None
    layers: Part | None = None
    may_rest: bool = False
    is_frozen: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all of the leaf learns in every step."""
        return self == Cut(self.leaf)

    @property
    def shape_of_layers(self) -> tuple[int, ...]:
        """The shape of the kept layers, with all of their channels."""
        leaf = self.leaf
        return self.layers.shape(leaf.shape, leaf.stack) if self.layers else leaf.shape

    @property
    def kept_leaf(self) -> channels.Leaf:
        """The kept part as a leaf."""
        shape = self.shape_of_layers
        return self.leaf._replace(
            shape=self.part.shape(shape, self.leaf.channel) if self.part else shape
        )

    def take(self, x: jax.Array, place: Place) -> jax.Array:
        """Takes the kept part out of an array with the shape of the leaf."""
        x = self.take_layers(x, place)
        stack, channel, part = self.leaf.stack, self.leaf.channel, self.part
        if part is None:
            return x

        def take(x: jax.Array, place: jax.Array) -> jax.Array:
            return parts.take(x, channel, stack, part, place)

        return explicit.call(take, lambda: explicit.part_spec(x, channel, part), x, place.channels)

    def take_layers(self, x: jax.Array, place: Place) -> jax.Array:
        """Takes the kept layers out of an array, with all channels that it has."""
        stack, layers = self.leaf.stack, self.layers
        if layers is None:
            return x

        def take(x: jax.Array, place: jax.Array) -> jax.Array:
            return parts.take(x, stack, (), layers, place)

        return explicit.call(take, lambda: explicit.unsharded_spec(x, stack), x, place.layers)

    def put(self, x: jax.Array, place: Place, whole: jax.Array) -> jax.Array:
        """The inverse of `take`, with zeros outside the kept part; `whole` has the sharding."""
        stack, channel = self.leaf.stack, self.leaf.channel

        def put(x: jax.Array, place: Place) -> jax.Array:
            if self.part and place.channels is not None:
                x = parts.put(x, self.shape_of_layers, channel, stack, self.part, place.channels)
            if self.layers and place.layers is not None:
                x = parts.put(x, self.leaf.shape, stack, (), self.layers, place.layers)
            return x

        return explicit.call(put, lambda: jax.typeof(whole).sharding.spec, x, place)

    def move(self, x: jax.Array, fill: jax.Array, before: Place, after: Place) -> jax.Array:
        """Moves a kept part to another place; `fill` has the entries that were not kept before."""
        stack, channel, part, layers = self.leaf.stack, self.leaf.channel, self.part, self.layers
        kept_leaf = self.kept_leaf

        def move(x: jax.Array, fill: jax.Array, before: Place, after: Place) -> jax.Array:
            places, learns = before.channels, before.learns
            if layers and before.layers is not None and after.layers is not None:
                rows = (layers, before.layers, after.layers)
                x = parts.move(x, fill, stack, (), *rows)
                if places is not None:
                    axes = tuple(range(len(stack)))
                    places = parts.move(places, jnp.zeros_like(places), axes, (), *rows)
                if learns is not None:
                    learns = parts.move(learns, jnp.zeros_like(learns), (0,), (), *rows)
            if part and places is not None and after.channels is not None:
                x = parts.move(x, fill, channel, stack, part, places, after.channels)
            return x if learns is None else _where_learns(learns, kept_leaf, x, fill)

        return explicit.call(move, lambda: jax.typeof(x).sharding.spec, x, fill, before, after)

    def mask(self, x: jax.Array, place: Place) -> jax.Array:
        """Sets kept layers that do not learn in this step to zero, in an array of the kept part."""
        if place.learns is None:
            return x
        return _where_learns(place.learns, self.kept_leaf, x, jnp.zeros((), x.dtype))

    def for_entry(self, shape: tuple[int, ...], axes: Sequence[int | None]) -> Cut | None:
        """The cut of an entry of an optimizer state that belongs to the kept part.

        `axes` is `Slot.axes`. None if the entry lacks an axis that is cut, so that several channels
        share its values.
        """
        if not set(self._cut_axes) <= set(axes):
            return None
        whole = tuple(
            n if axis is None else self.leaf.shape[axis]
            for n, axis in zip(shape, axes, strict=True)
        )
        channel, stack = (
            tuple(axes.index(axis) for axis in named if axis in axes)
            for named in (self.leaf.channel, self.leaf.stack)
        )
        return self._replace(leaf=self.leaf._replace(shape=whole, channel=channel, stack=stack))

    @property
    def _cut_axes(self) -> tuple[int, ...]:
        return (self.leaf.stack if self.layers else ()) + (self.leaf.axes if self.part else ())


def _where_learns(
    learns: jax.Array, kept: channels.Leaf, x: jax.Array, other: jax.Array
) -> jax.Array:
    """An array for the kept layers that learn in this step, another for those that do not."""
    return jnp.where(broadcastable(learns == 1, kept, kept.stack), x, other)


def check_same_size(policy: Policy) -> None:
    """Raises a TypeError or ValueError for a policy whose selections may differ in size."""
    rate, layer_rate = policy.rate, policy.layer_rate
    if not isinstance(rate, float):
        raise TypeError(
            f"policy: rate must be a Python number, got {short(rate)}; otherwise the selections "
            "may differ in size."
        )
    if not isinstance(layer_rate, float) or layer_rate != 1.0:
        raise ValueError(
            f"policy: with layer_rate={short(layer_rate)}, some layers learn in full in some steps "
            "and need full optimizer state; use layer_rate=1.0, or freeze_dropped(inner, policy)."
        )
    if policy.channel_choice == "bernoulli" and 0.0 < rate < 1.0:
        raise ValueError(
            'policy: channel_choice="bernoulli" keeps a different number of channels in every '
            'selection; use "window", "chunk" or "exact".'
        )
    if policy.layer_choice == "exact" and not policy.freezes_others:
        raise ValueError(
            'policy: layer_choice="exact" with other_layers="full" lets all other layers learn, so '
            'they need full optimizer state; use other_layers="frozen".'
        )


@dataclasses.dataclass(frozen=True)
class KeptPart:
    """The part of a tree that a selection lets learn.

    Attributes:
      layout: the leaves of the tree.
      cuts: what may learn of each leaf.
      places: where the kept parts lie, by the path of the layer.
    """

    layout: channels.Layout
    cuts: tuple[Cut, ...]
    places: Mapping[str, Place]

    @classmethod
    def from_groups(
        cls, layout: channels.Layout, groups: Sequence[Group], max_layers: int
    ) -> KeptPart:
        """The part that the groups of a selection keep.

        If others are frozen, at most `max_layers` layers of a stack learn in one step.
        """
        group_of = {layer.path: group for group in groups for layer in group.layers}
        cuts = tuple(_cut(leaf, group_of.get(leaf.source), max_layers) for leaf in layout.leaves)
        return cls(layout, cuts, _places(cuts, groups))

    @property
    def held(self) -> jax.Array:
        """All places as one vector: int32; never empty, as Orbax does not save empty arrays."""
        vectors = [x.reshape(-1) for x in jax.tree.leaves(self.places)]
        filling = 0 if any(x.size for x in vectors) else 1
        return jnp.concatenate([*vectors, jnp.zeros(filling, jnp.int32)])

    def with_places(self, held: jax.Array) -> KeptPart:
        """A part of the same size in the places that a vector holds."""
        leaves, structure = jax.tree.flatten(self.places)
        stops = np.cumsum([x.size for x in leaves]).tolist()
        vectors = [held[stop - x.size : stop] for x, stop in zip(leaves, stops, strict=True)]
        places = [v.reshape(x.shape) for v, x in zip(vectors, leaves, strict=True)]
        return dataclasses.replace(self, places=jax.tree.unflatten(structure, places))

    @property
    def kept_layout(self) -> channels.Layout:
        """The leaves of the part itself."""
        leaves = tuple(cut.kept_leaf for cut in self.cuts if not cut.is_frozen)
        return self.layout._replace(leaves=leaves)

    def take(self, tree: Any) -> Any:
        """Takes the part out of a tree, with a MaskedNode for what never learns.

        Leaves that the layout does not have, such as parameters without a gradient, stay as they
        are.
        """
        by_path = {cut.leaf.path: cut for cut in self.cuts}
        found = jax.tree_util.tree_leaves_with_path(tree)
        paths = [channels.canonical_path(keys, self.layout.root) for keys, _ in found]
        cuts = tuple(by_path.get(path) for path in paths)
        kept = iter(_take_once(cuts, self.places, [x for _, x in found]))
        leaves: list[Any] = []
        for cut, (_, x) in zip(cuts, found, strict=True):
            if cut is None or cut.is_whole:
                leaves.append(x)
            else:
                leaves.append(optax.MaskedNode() if cut.is_frozen else next(kept))
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def kept_gradients(
        self, leaves: Sequence[jax.Array], kept: Mapping[int, jax.Array]
    ) -> list[jax.Array | None]:
        """The part of each leaf, or None for what never learns.

        `kept` maps the positions of some leaves to arrays that hold only the kept channels.
        """
        gradients: list[jax.Array | None] = []
        for i, (cut, x) in enumerate(zip(self.cuts, leaves, strict=True)):
            if cut.is_frozen:
                gradients.append(None)
            elif cut.is_whole:
                gradients.append(x)
            elif i in kept:
                gradients.append(cut.take_layers(kept[i], self.places[cut.leaf.source]))
            else:
                gradients.append(cut.take(x, self.places[cut.leaf.source]))
        return gradients

    def check(self, kept: Any) -> None:
        """Raises a ValueError if a tree does not have the shapes of the kept part."""
        expected = {cut.leaf.path: cut.kept_leaf.shape for cut in self.cuts if not cut.is_frozen}
        found = channels.shapes_by_path(kept, self.layout.root)
        for path in sorted(expected.keys() | found.keys()):
            shapes = [tree.get(path, "no array") for tree in (found, expected)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"updates: found {shapes[0]} at {path!r}, but this selection keeps "
                    f"{shapes[1]}; pass the selection that you passed to "
                    "value_and_grad(..., kept_only=True)."
                )

    def mask(self, kept: Any) -> Any:
        """Sets kept layers that do not learn in this step to zero."""
        cuts = tuple(cut for cut in self.cuts if not cut.is_frozen)
        masked = _mask_once(cuts, self.places, jax.tree.leaves(kept))
        return jax.tree.unflatten(jax.tree.structure(kept), masked)

    def put(self, updates: Any, tree: Any) -> Any:
        """Puts the updates of the part into updates for the whole tree, minus zero elsewhere.

        Adding minus zero keeps the bits of every parameter; adding zero would turn -0.0 into 0.0.
        """
        kept, leaves = jax.tree.leaves(updates), jax.tree.leaves(tree)
        whole = _put_once(self.cuts, self.places, kept, leaves)
        return jax.tree.unflatten(jax.tree.structure(tree), whole)


def _cut(leaf: channels.Leaf, group: Group | None, max_layers: int) -> Cut:
    """The cut of a leaf, if at most `max_layers` layers of a stack learn in one step."""
    if group is None or group.modes == (Mode.FULL,):
        return Cut(leaf)
    if group.modes == (Mode.FROZEN,):
        return Cut(leaf, is_frozen=True)
    may_rest = Mode.FROZEN in group.modes
    layers = None
    if may_rest and leaf.depth > max_layers:
        layers = Part(1, leaf.depth, max_layers, Arrangement.SCATTERED)
    part = group.part if Mode.PARTIAL in group.modes else None
    return Cut(leaf, part, layers, may_rest)


def _places(cuts: Sequence[Cut], groups: Sequence[Group]) -> dict[str, Place]:
    """Where the kept parts lie, by the path of the layer."""
    modes = per_layer([group for group in groups if len(group.modes) > 1], "mode")
    channel_places = per_layer([group for group in groups if group.part], "place")
    places = {}
    for cut in cuts:
        layer = cut.leaf.layer
        if layer != cut.leaf.path or cut.is_whole or cut.is_frozen:
            continue
        chosen = channel_places[layer] if cut.part else None
        indices = learns = None
        if cut.may_rest:
            learns = (modes[layer] != Mode.FROZEN).astype(jnp.int32).reshape(-1)
        if cut.layers and learns is not None:
            first = jnp.argsort(learns, descending=True, stable=True)[: cut.layers.kept]
            indices = jnp.sort(first).astype(jnp.int32)
            learns = learns[indices]
            if chosen is not None:
                stack = cut.layers.shape(cut.leaf.stack_shape, range(len(cut.leaf.stack)))
                rows = chosen.reshape(-1, *chosen.shape[len(stack) :])[indices]
                chosen = rows.reshape(*stack, *rows.shape[1:])
        places[layer] = Place(chosen, indices, learns)
    return places


@compiled
def _take_once(
    cuts: Sequence[Cut | None], places: Mapping[str, Place], leaves: Sequence[Any]
) -> list[jax.Array]:
    """The kept parts of the leaves that are neither whole nor frozen."""
    return [
        cut.take(x, places[cut.leaf.source])
        for cut, x in zip(cuts, leaves, strict=True)
        if cut is not None and not cut.is_whole and not cut.is_frozen
    ]


@compiled
def _put_once(
    cuts: Sequence[Cut],
    places: Mapping[str, Place],
    kept: Sequence[jax.Array],
    whole: Sequence[jax.Array],
) -> list[jax.Array]:
    """Updates for whole leaves; `kept` has none for frozen ones."""
    remaining = iter(_computed_first(list(kept)))
    updates = []
    for cut, x in zip(cuts, whole, strict=True):
        if cut.is_frozen:
            updates.append(-jnp.zeros_like(x))
        elif cut.is_whole:
            updates.append(next(remaining))
        else:
            place = places[cut.leaf.source]
            updates.append(-cut.put(cut.mask(-next(remaining), place), place, x))
    return updates


def _computed_first(kept: list[jax.Array]) -> list[jax.Array]:
    """Updates that the CPU compiler computes once, not for every entry of the whole leaves."""
    if not kept:
        return kept

    def on_any(kept: list[jax.Array]) -> list[jax.Array]:
        return jax.lax.platform_dependent(kept, cpu=alone_on_cpu, default=lambda x: x)

    return explicit.call(on_any, lambda: [jax.typeof(x).sharding.spec for x in kept], kept)


@compiled
def _mask_once(
    cuts: Sequence[Cut], places: Mapping[str, Place], kept: Sequence[jax.Array]
) -> list[jax.Array]:
    return [
        cut.mask(x, places[cut.leaf.source]) if cut.may_rest else x
        for cut, x in zip(cuts, kept, strict=True)
    ]
