"""How the steps of a run add up to epochs, some of which may have larger batches."""

from __future__ import annotations

import itertools
from typing import NamedTuple


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
