"""Residual branches that may be dropped, and Backdrop: what the models share."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

import cdb_jax.nnx

How = Literal["mask", "skip", "subset", "backward"]


class Branch(nnx.Module):
    """Computes a residual branch, drops it at random, and multiplies it by a gate.

    Args:
      layer: what drops it; None for never.
      how: as in `Branches`.
      num_shards: as in `Branches`.

    Attributes:
      recomputes: whether the backward pass computes the branch again instead of storing it.
    """

    def __init__(
        self,
        layer: cdb_jax.nnx.DropPath | cdb_jax.nnx.DropBackward | None = None,
        how: How = "mask",
        num_shards: int = 1,
    ):
        self.layer = layer
        self.how = how
        self.num_shards = num_shards
        self.recomputes = False

    def __call__(
        self,
        branch: Callable[..., jax.Array],
        *args: Any,
        gate: jax.Array | None = None,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        if self.recomputes:
            branch = nnx.remat(branch)
        if self.layer is None:
            y = branch(*args)
        elif self.how == "backward":
            y = self.layer(branch, *args, kept=kept)
        elif self.how == "subset":
            y = self.layer.subset(branch, *args, num_shards=self.num_shards)
        elif self.how == "skip":
            y = self.layer.branch(branch, *args)
        else:
            y = self.layer(branch(*args))
        return y if gate is None else gate.astype(y.dtype) * y


class Branches(NamedTuple):
    """What drops the residual blocks of a model in training.

    Attributes:
      rates: the drop rate of each block; empty to drop none.
      how: "mask": stochastic depth for the whole batch, scaled in evaluation (arXiv 1603.09382).
        "skip": the same, but a dropped block is not computed. "subset": stochastic depth for
        samples, of which a fixed number is computed. "backward": only the backward pass of a block
        is dropped (arXiv 2402.17812); a step keeps at least one.
      num_shards: the number of devices that share the batch, for "subset".
    """

    rates: tuple[float, ...] = ()
    how: How = "mask"
    num_shards: int = 1

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
        if self.how == "backward":
            return Branch(cdb_jax.nnx.DropBackward(rate), self.how)
        if self.how == "subset":
            return Branch(cdb_jax.nnx.DropPath(rate, rngs=rngs), self.how, self.num_shards)
        layer = cdb_jax.nnx.DropPath(rate, sample_axis=None, scale_by_keep=False, rngs=rngs)
        return Branch(layer, self.how)

    def draw(self, per_block: int, rngs: nnx.Rngs) -> "KeptBranches | None":
        """What draws the branches whose backward pass a step keeps, if any may be dropped."""
        if self.how != "backward" or not any(self.rates):
            return None
        return KeptBranches([rate for rate in self.rates for _ in range(per_block)], rngs)


def given(index: int, per_block: int, gates: Any, kept: Any) -> dict[str, Any]:
    """What the call of a block gets of the gates and flags of all, if there are any."""
    found = {} if gates is None else {"gate": gates[index]}
    if kept is not None:
        flags = kept[index * per_block : (index + 1) * per_block]
        found["kept"] = flags if per_block > 1 else flags[0]
    return found


class KeptBranches(nnx.Module):
    """Draws the branches whose backward pass a step keeps; None in evaluation."""

    def __init__(self, rates: list[float], rngs: nnx.Rngs):
        self.rates = tuple(rates)
        self.deterministic = False
        self.rngs = rngs.drop_backward.fork()

    def __call__(self) -> jax.Array | None:
        if self.deterministic:
            return None
        return cdb_jax.kept_branches(self.rates, key=self.rngs())


NO_BRANCH_DROPPED = Branches()


def make_backdrop(
    rate: float, axes: int | tuple[int, ...], rngs: nnx.Rngs
) -> cdb_jax.nnx.Backdrop | None:
    """A layer, or None for rate 0, so that such a model has no state for it."""
    return cdb_jax.nnx.Backdrop(rate, axes, rngs=rngs) if rate else None
