"""`selection_count`: the step that an optimizer state has reached."""

from __future__ import annotations

from typing import Any

import jax

from cdb_jax.compact import CompactState
from cdb_jax.freezing import FreezeDroppedState
from cdb_jax.transform import ChannelDropBackState


def selection_count(opt_state: Any) -> jax.Array:
    """The number of steps that `channel_drop_back`, `freeze_dropped` or `compact` has taken.

    Use it as the `step` of `Policy.select` in a loop that does not count its own steps. The state
    may be inside chains, `optax.MultiSteps` and other wrappers, or in an `nnx.Optimizer`. Under
    `MultiSteps`, all micro-batches of a step share one count.

    Args:
      opt_state: what `tx.init` or `tx.update` returned.

    Returns:
      The count: int32, a scalar.

    Raises:
      ValueError: if the optimizer has no such state, or several with different counts.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(cdb_jax.channel_drop_back(0.5, key=0), optax.adamw(1e-3))
      >>> cdb_jax.selection_count(tx.init({"kernel": jnp.zeros((2, 4))}))
      Array(0, dtype=int32)
    """

    def is_state(x: Any) -> bool:
        return isinstance(x, (ChannelDropBackState, FreezeDroppedState, CompactState))

    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    counts = [jax.tree.leaves(state.count)[0] for state in states]  # NNX puts values into boxes.
    if not counts:
        raise ValueError(
            "opt_state holds no state of channel_drop_back, freeze_dropped or compact. If it comes "
            "from a checkpoint, restore it into tx.init(params) to keep its types. If the "
            "optimizer has none of the three, count the steps yourself."
        )
    for count in counts:
        if count.shape:
            raise ValueError(
                f"opt_state: its count has shape {count.shape}, so it holds the states of several "
                "optimizers; use jax.vmap(cdb_jax.selection_count), or index it."
            )
    if len(counts) > 1:  # A single count is not read: that would wait for the device.
        known = {int(x) for x in counts if not isinstance(x, jax.core.Tracer)}
        if len(known) > 1:
            raise ValueError(
                f"opt_state holds states with different counts, {sorted(known)}; count the steps "
                "yourself."
            )
    return counts[0]
