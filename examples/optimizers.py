"""The optimizers of train.py and their learning rates, before a method adds anything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import jax
import optax

if TYPE_CHECKING:
    from config import Config

Name = Literal["adamw", "sgd", "lion", "lamb"]
# Names of arrays that do not decay, whatever their rank: biases of attention have two axes.
NOT_DECAYED = {"bias", "scale", "pos_embed", "cls_token"}


def learning_rate(config: Config, total_steps: int) -> optax.Schedule:
    """The learning rate by step: `--schedule`."""
    if config.schedule == "step":
        phases = [optax.constant_schedule(config.learning_rate * 0.1**i) for i in range(4)]
        ends = [max(1, round(part * total_steps)) for part in (0.3, 0.6, 0.85)]
        return optax.join_schedules(phases, ends)
    warmup = min(max(1, total_steps // 20), total_steps - 1)  # A single step has the full rate.
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, total_steps)


def _names(path: Any) -> set[str]:
    """The last names on the path of an array; Flax may add that of a variable's value."""
    return set(re.findall(r"\w+", jax.tree_util.keystr(path))[-2:])


def make(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer with weight decay, preceded by clipping if `--clip-norm` is set."""

    def decaying(params: Any) -> Any:
        def decays(path: Any, x: jax.Array) -> bool:
            return config.decays == "all" or (x.ndim > 1 and not NOT_DECAYED & _names(path))

        return jax.tree_util.tree_map_with_path(decays, params)

    decoupled: dict[str, Any] = {"weight_decay": config.weight_decay, "mask": decaying}
    match config.optimizer:
        case "adamw":
            optimizer = optax.adamw(schedule, **decoupled)
        case "lion":
            optimizer = optax.lion(schedule, **decoupled)
        case "lamb":
            optimizer = optax.lamb(schedule, **decoupled)
        case "sgd":
            optimizer = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decaying),
                optax.sgd(schedule, momentum=0.9, nesterov=True),
            )
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
