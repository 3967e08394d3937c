"""The published variants of ChannelDropBack as policies."""

from __future__ import annotations

from typing import Any

import optax

from cdb_jax import channels
from cdb_jax.policy import Policy, Rate


def released_code(
    *, key: Any, exempt: tuple[str, ...], rate: Rate = 0.3, layer_rate: Rate = 0.3
) -> Policy:
    r"""The rules of the authors' released optimizer.

    Every layer is masked with probability `layer_rate` (`dropback_rate` there); in a masked layer
    each *input* channel is dropped with probability `rate` (`dropback_rate_channels`), and the
    gradient is divided by the fraction of channels kept in this draw. Biases and normalisation are
    left alone.

    Place it before the optimizer: there weight decay and Nesterov momentum come after the mask.

    Args:
      key: as in `channel_drop_back`.
      exempt: path patterns of the first layers. The released code skips the parameters with index
        0 to `skip_init_layers` (3 by default), in order of definition. A JAX tree has no such
        order, so they are named: `("stem",)`, say, or `()` for none.
      rate: drop probability of a channel in a masked layer.
      layer_rate: probability that a layer is masked; `released_layer_rate` is its schedule.

    Returns:
      A `Policy`.

    Examples:
      >>> import cdb_jax, optax
      >>> policy = cdb_jax.released_code(
      ...     key=0, exempt=("stem",), layer_rate=cdb_jax.released_layer_rate(10_000)
      ... )
      >>> tx = optax.chain(
      ...     cdb_jax.channel_drop_back(policy),
      ...     optax.add_decayed_weights(5e-4),
      ...     optax.sgd(0.01, momentum=0.9, nesterov=True),
      ... )

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_.
    """
    return Policy(
        rate,
        key=key,
        channel_axes=channels.input_channels,
        layer_rate=layer_rate,
        rescale="realized",
        exempt=exempt,
    )


def released_layer_rate(
    total_steps: int, *, initial: float = 0.03, final: float = 0.3
) -> optax.Schedule:
    """The released code's schedule of the layer rate, in three phases.

    `initial` for the first 30 % of the steps, `final / 2` until 60 %, then `final`. There the phase
    changes between epochs, so choose `total_steps` as a multiple of ten epochs to meet it exactly.

    Args:
      total_steps: length of training in steps, at least 1.
      initial: layer rate of the first phase.
      final: layer rate of the last phase.

    Returns:
      An optax schedule from count to rate.

    Raises:
      ValueError: if `total_steps` is not a positive int or a rate is not in [0, 1].

    Examples:
      >>> schedule = released_layer_rate(100)
      >>> [round(float(schedule(step)), 3) for step in (0, 29, 30, 59, 60, 99)]
      [0.03, 0.03, 0.15, 0.15, 0.3, 0.3]
    """
    if not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be an int >= 1, got {total_steps!r}.")
    for name, value in (("initial", initial), ("final", final)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be a drop probability between 0 and 1, got {value!r}.")
    phases = [optax.constant_schedule(value) for value in (initial, final / 2, final)]
    return optax.join_schedules(phases, [round(0.3 * total_steps), round(0.6 * total_steps)])


def algorithm_1(
    rate: Rate,
    *,
    key: Any,
    layer_weights: Any = "uniform",
    other_layers: str = "full",
    exempt: tuple[str, ...] = (),
) -> Policy:
    r"""Algorithm 1 of the paper: one layer in each step, and a random subset of its channels.

    The paper's text says "channels or rows", which are output channels. It leaves open what happens
    to the other layers; the released code updates them in full.

    Args:
      rate: drop probability of a channel of the picked layer.
      key: as in `channel_drop_back`.
      layer_weights: how the layer is picked: "uniform" (the common choice), "size", or a dict from
        path to weight.
      other_layers: "full", they learn in full; or "still", the literal reading: nothing learns
        but the kept channels of the picked layer and what is `exempt`.
      exempt: path patterns of leaves that always learn in full and are never picked.

    Returns:
      A `Policy`.

    Examples:
      >>> import cdb_jax
      >>> policy = cdb_jax.algorithm_1(0.5, key=0, other_layers="still")
      >>> policy.layer_choice, policy.channel_choice
      ('one', 'bernoulli')

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_, Algorithm 1.
    """
    return Policy(
        rate,
        key=key,
        layer_choice="one",
        layer_weights=layer_weights,
        other_layers=other_layers,
        exempt=exempt,
    )
