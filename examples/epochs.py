"""How the steps of a run add up to epochs, some of which may have larger batches."""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from errors import UserError


class Epochs(NamedTuple):
    """Epochs counted from 0. Steps of epochs 2, 4, 6, ... may join several batches of the loader.

    Attributes:
      count: number of epochs.
      batches: batches of the loader in each epoch.
      joined: how many of them are joined in a step of epochs 2, 4, 6, ...
    """

    count: int
    batches: int
    joined: int = 1

    def batches_in_step(self, epoch: int) -> int:
        return self.joined if epoch > 0 and epoch % 2 == 0 else 1

    def steps(self, epoch: int) -> int:
        """Steps in an epoch. Batches that are too few to be joined are left out."""
        return self.batches // self.batches_in_step(epoch)

    @property
    def total_steps(self) -> int:
        return self.start(self.count)

    @property
    def steps_per_epoch(self) -> tuple[int, int]:
        """For the schedules in `cdb_jax.presets`."""
        return self.batches, self.batches // self.joined

    def start(self, epoch: int) -> int:
        """The first step of an epoch."""
        return sum(map(self.steps, range(epoch)))

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return next(epoch for epoch in itertools.count() if step < self.start(epoch + 1))

    def batches_before(self, step: int) -> int:
        """Batches of the loader that come before those of a step."""
        epoch = self.epoch_of(step)
        done = step - self.start(epoch)
        return epoch * self.batches + done * self.batches_in_step(epoch)


class SaveTimes:
    """When to save between the ends of epochs.

    Args:
      every: such as "500", steps, or "10m", minutes; None for never.

    Raises:
      UserError: for another text.
    """

    AGREE_EVERY = 10  # Steps; several processes go by the clock of process 0.

    def __init__(self, every: str | None):
        number = (every or "0").removesuffix("m")
        if not number.isdecimal() or (every and int(number) == 0):
            raise UserError(
                f"--save-every {every} must be a positive number of steps, as in 500, or of "
                "minutes, as in 10m."
            )
        is_minutes = bool(every) and every.endswith("m")
        self._steps = 0 if is_minutes else int(number)
        self._seconds = 60.0 * int(number) if is_minutes else 0.0
        self._saved = time.monotonic()

    def saved(self) -> None:
        self._saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after this many steps. All processes must ask at the same steps."""
        if self._steps:
            return step % self._steps == 0
        if not self._seconds:
            return False
        due = time.monotonic() - self._saved >= self._seconds
        if jax.process_count() == 1:
            return due
        if step % self.AGREE_EVERY:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.array(due)))
