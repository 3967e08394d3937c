"""Why the gradient of a weight is not skipped, for `channel_report`."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Reason(enum.Enum):
    """Why a gradient is computed in full; `{}` is the detail of an `Obstacle`."""

    READ_BY = "read by {}"
    INSIDE = "inside {}, which cannot be followed"
    UNKNOWN_FORM = "{} has a form that this version does not know"
    TWO_WEIGHTS = "multiplied by another weight"
    COMBINED = "combined by {} with something else that learns"
    NOT_STATIC = (
        "the number of kept channels is not static; use a number as the rate, and "
        'channel_choice="window", "chunk" or "exact"'
    )
    RESULT = "returned from {}"
    CARRIED = "carried through a loop"
    LOOP_OVER_CHANNELS = "a loop runs over its channels"
    STACK_IN_ONE_PRODUCT = "one product combines its stacked layers"
    STACK_IN_ONE_BATCH = "its stacked layers are computed together, but frozen one by one"
    MIXED_CHANNELS = "a product sums over only some of its channel axes"
    CONVOLVED = "a convolution reads it as its input, not as its kernel"
    JOINED = "joined with other weights along an axis of a convolution"
    SEVERAL_CONVOLUTIONS = "one operation computes several convolutions"
    NO_FEATURE_AXIS = "its channels are not on a feature axis of the convolution"
    FEATURE_GROUPS = (
        "a convolution has {0} feature groups, and the kept channels may be spread unevenly over "
        'them; use channel_choice="window" and set window_groups to a multiple of {0}'
    )


class Obstacle(NamedTuple):
    """A reason, and what it applies to."""

    reason: Reason
    detail: object = ""

    def __str__(self) -> str:
        return self.reason.value.format(self.detail)
