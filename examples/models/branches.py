"""Residual branches that may be dropped, and Backdrop: what the models share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

import cdb_jax.nnx


class Branch(nnx.Module):
    """Computes a residual branch, drops it at random, and multiplies it by a gate.

    Args:
      drop_path: what drops it; None for never.
      skips: whether a branch that is dropped is not computed either.
    """

    def __init__(self, drop_path: cdb_jax.nnx.DropPath | None = None, skips: bool = False):
        self.drop_path = drop_path
        self.skips = skips

    def __call__(
        self, branch: Callable[..., jax.Array], *args: Any, gate: jax.Array | None = None
    ) -> jax.Array:
        if self.drop_path is None:
            y = branch(*args)
        elif self.skips:
            y = self.drop_path.branch(branch, *args)
        else:
            y = self.drop_path(branch(*args))
        return y if gate is None else gate.astype(y.dtype) * y


class Branches(NamedTuple):
    """Stochastic depth for the blocks of a model.

    `rates` has the drop rate of each block, or is empty to drop none. A block is dropped for the
    whole batch and scaled in evaluation, as in arXiv 1603.09382. With `skips`, a dropped block is
    not computed.
    """

    rates: tuple[float, ...] = ()
    skips: bool = False

    def make(self, block: int, depth: int, rngs: nnx.Rngs) -> Branch:
        if not self.rates:
            return Branch()
        if len(self.rates) != depth:
            raise ValueError(
                f"rates has {len(self.rates)} drop rates, but the model has {depth} blocks."
            )
        rate = self.rates[block]
        if rate == 0.0:
            return Branch()
        drop_path = cdb_jax.nnx.DropPath(rate, sample_axis=None, scale_by_keep=False, rngs=rngs)
        return Branch(drop_path, self.skips)


NO_BRANCH_DROPPED = Branches()


def make_backdrop(
    rate: float, axes: int | tuple[int, ...], rngs: nnx.Rngs
) -> cdb_jax.nnx.Backdrop | None:
    """A layer, or None for rate 0, so that such a model has no state for it."""
    return cdb_jax.nnx.Backdrop(rate, axes, rngs=rngs) if rate else None
