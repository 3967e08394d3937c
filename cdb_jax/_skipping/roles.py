"""The channel axes of weights from what a loss does with each axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cdb_jax import _conventions as conventions, channels
from cdb_jax._skipping import axis_uses
from cdb_jax._skipping.axis_uses import Use

InferredAxes = dict[str, channels.Axes | channels.Convention | None]

_STACKS = {Use.BATCH, Use.STACK, Use.INDEXED}
_CONVENTIONS: dict[conventions.Direction, channels.Convention] = {
    "output": channels.output_channels,
    "input": channels.input_channels,
}


def axes(
    direction: conventions.Direction, uses: Mapping[str, axis_uses.Uses | None]
) -> InferredAxes:
    """The channel axes of each leaf, given its uses by path; None for a leaf without channels.

    A leaf that its uses do not settle is left to a convention.
    """
    stacked = _stacked_modules(uses)
    return {
        path: None if use is None else _axes_of(direction, path, use, stacked)
        for path, use in uses.items()
    }


def _axes_of(
    direction: conventions.Direction, path: str, uses: axis_uses.Uses, stacked: set[str]
) -> channels.Axes | channels.Convention | None:
    if conventions.is_token(path):
        return None
    by_use = {
        use: tuple(axis for axis, found in enumerate(uses.axes) if use in found) for use in Use
    }
    outputs, inputs = by_use[Use.FREE], by_use[Use.SUMMED]
    stack = tuple(
        axis
        for axis, found in enumerate(uses.axes)
        if found & _STACKS and Use.COMBINED not in found
    )
    if set(outputs) & set(inputs):  # Used in both directions, as in an autoencoder.
        return _CONVENTIONS[direction]
    if not inputs and by_use[Use.FEATURE]:
        outputs = by_use[Use.FEATURE]
    elif not inputs:
        return _CONVENTIONS[direction] if uses.unknown else None
    first = min(inputs, default=0)
    if outputs and outputs[0] == 0 < first and outputs[-1] > first and _parent(path) in stacked:
        stack, outputs = (0, *stack), outputs[1:]  # An ensemble whose input is not stacked.
    found = outputs if direction == "output" else inputs
    found = tuple(axis for axis in found if axis not in stack)
    if not found or (direction == "input" and math.prod(uses.shape[axis] for axis in found) == 1):
        return None
    channel = found if len(found) > 1 else found[0]
    return channels.Axes(channel, stack if len(stack) != 1 else stack[0])


def _parent(path: str) -> str:
    """The path of the module that holds the layer of a leaf."""
    return "/".join(path.split("/")[:-2])


def _stacked_modules(uses: Mapping[str, axis_uses.Uses | None]) -> set[str]:
    """The modules with a layer that is stacked along its first axis."""
    return {
        _parent(path)
        for path, use in uses.items()
        if use is not None and use.axes and use.axes[0] & _STACKS
    }


# Names and shapes may be misleading.


def check_names(layout: channels.Layout, uses: Sequence[axis_uses.Uses]) -> None:
    """Raises a ValueError if a convention took the wrong axes for the channels of a leaf.

    Args:
      layout: the leaves of the parameters.
      uses: what the loss does with each of them.
    """
    by_path = {leaf.path: x for leaf, x in zip(layout.leaves, uses, strict=True)}
    for direction, convention in _CONVENTIONS.items():
        leaves = [leaf for leaf in layout.layers if leaf.convention == convention]
        inferred = axes(direction, {leaf.path: by_path[leaf.path] for leaf in leaves})
        mistakes = []
        for leaf in leaves:
            mistake = _mistake(leaf, inferred[leaf.path], by_path[leaf.path])
            if mistake is not None:
                axis = "axis" if len(leaf.channel) == 1 else "axes"
                listed = " and ".join(map(str, leaf.channel))
                mistakes.append(
                    f"{leaf.path!r} of shape {leaf.shape}: by its name and shape, its channels are "
                    f"on {axis} {listed}, {mistake}"
                )
        if mistakes:
            complaint = "; by their names, these would be wrong:"
            raise ValueError(conventions.message(direction, complaint, mistakes))


def _mistake(
    leaf: channels.Leaf,
    inferred: channels.Axes | channels.Convention | None,
    uses: axis_uses.Uses,
) -> str | None:
    """What is wrong with the channels of a leaf, and the mend; None if nothing is wrong."""
    if isinstance(inferred, channels.Convention):
        return None
    if inferred is None:
        only_scales = uses.scales and not uses.unknown and not any(uses.axes)
        mend = f"but it only scales activations; use exempt=({leaf.path!r},)"
        return mend if only_scales else None
    right, stack = (_as_set(x) for x in (inferred.channel, inferred.stack))
    taken = set(leaf.channel)
    # An axis that is free in its product may stack layers or hold channels.
    is_nested = taken <= right or right <= taken
    is_same = taken == right or (is_nested and taken | set(leaf.stack) == right | stack)
    is_tied = all(Use.FEATURE in uses.axes[axis] for axis in taken)
    if is_same or is_tied:
        return None
    wrong = sorted({use.value for axis in taken - right for use in uses.axes[axis]})
    if not wrong:
        verb = "holds" if len(taken) == 1 else "hold"
        return f"which {verb} only some of them; use {inferred}"
    return f"which {'is' if len(taken) == 1 else 'are'} {' and '.join(wrong)}; use {inferred}"


def _as_set(axes: Any) -> set[int]:
    return {axes} if isinstance(axes, int) else set(axes)
