"""The contenders: methods by name, what is tuned of each, and how it enters the optimizer."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import optax

import cdb_jax
import methods
from epochs import Epochs

CHANNELS = (0.1, 0.3, 0.5, 0.8)
UNITS = (0.1, 0.2, 0.3, 0.5)


class Contender(NamedTuple):
    """A method of `train.py`, and what is changed of it.

    Attributes:
      method: name in `examples/methods.py`.
      rates: drop rates that tuning chooses from; of gradient noise its variance at first.
      dropout: drop rates of Dropout, which is used as well.
      stops_early: whether the weights of the best evaluation are kept, instead of the last.
      adds_noise: whether the rate is the variance of `optax.add_noise` before the optimizer.
      policy: changes to the method's `cdb_jax.Policy`.
      settings: changes to the configuration, such as `skip_dropped`.
    """

    method: str = "none"
    rates: tuple[float, ...] = (0.0,)
    dropout: tuple[float, ...] = (0.0,)
    stops_early: bool = False
    adds_noise: bool = False
    policy: dict[str, Any] = {}
    settings: dict[str, Any] = {}


def ramp(rate: float, total_steps: int) -> Any:
    """From 0 to the rate over the first half."""
    return optax.linear_schedule(0.0, rate, total_steps // 2)


CONTENDERS = {
    "none": Contender(),
    "early stopping": Contender(stops_early=True),
    "dropout": Contender("dropout", UNITS),
    "gradient noise": Contender(rates=(1e-9, 1e-8, 1e-7, 1e-6), adds_noise=True),
    "CDB before": Contender("cdb", CHANNELS),
    "CDB after": Contender("cdb_after", CHANNELS),
    "CDB frozen": Contender("cdb_frozen", CHANNELS),
    "CDB before + dropout": Contender("cdb", CHANNELS, UNITS),
}
CORE = tuple(CONTENDERS)

# Optimizer state for the kept channels only. No run here has 500 steps, so that channels held for
# as long never change.
COMPACT = {
    f"compact, {hold} steps, {on_switch}": Contender(
        "cdb_compact", (0.5, 0.75, 0.875, 0.9375), settings={"hold": hold, "on_switch": on_switch}
    )
    for hold, on_switch in itertools.product((20, 100, 500), ("reset", "carry"))
    if (hold, on_switch) != (500, "reset")
}
CONTENDERS |= COMPACT

# What saves work, for the comparison by time.
SAVING = {
    "skip channels": Contender(
        "cdb", (0.5,), settings={"skip_dropped": True, "channel_choice": "window"}
    ),
    "skip layers": Contender("cdb", (1.0,), settings={"skip_dropped": True, "layer_rate": 0.5}),
}
# No weight gradient at all: what its program does not do, skipping can save.
NOTHING = "skip everything"
CONTENDERS |= SAVING | {NOTHING: Contender("cdb", (1.0,), settings={"skip_dropped": True})}

# What a saving costs in accuracy, on Fashion-MNIST: one setting each.
FASHION = {
    "Dropout 0.2": Contender("dropout", (0.2,)),
    "stochastic depth 0.2": Contender("stochastic_depth", (0.2,)),
    "stochastic depth 0.4, part of the batch": Contender("drop_path_subset", (0.4,)),
    "drop_backward 0.5": Contender("drop_backward", (0.5,)),
    "channels 0.5, before": Contender("cdb", (0.5,)),
    "channels 0.5, after": Contender("cdb_after", (0.5,)),
    "channels 0.5, frozen": Contender("cdb_frozen", (0.5,)),
    "window 0.5, skipped": SAVING["skip channels"],
    "window 0.75, skipped": SAVING["skip channels"]._replace(rates=(0.75,)),
    "whole layers 0.5, skipped": SAVING["skip layers"],
    "LayerDropBack 0.5": Contender("layer_drop_back", (0.5,)),
    "SkipUpdate 0.5": Contender("skip_update", (0.5,)),
} | {
    f"compact, 1/{n}": Contender(
        "cdb_compact", (1 - 1 / n,), settings={"skip_dropped": True, "hold": 20}
    )
    for n in (2, 4, 8)
}
CONTENDERS |= FASHION

# Rows of the ablation: one change each to "CDB before".
ABLATIONS = {
    "before": Contender("cdb"),
    "after": Contender("cdb_after"),
    "frozen": Contender("cdb_frozen"),
    "input channels": Contender("cdb", policy={"channel_axes": cdb_jax.input_channels}),
    "rescale expected": Contender("cdb", policy={"rescale": "expected"}),
    "rescale realized": Contender("cdb", policy={"rescale": "realized"}),
    "half of the layers": Contender("cdb", policy={"layer_rate": 0.5}),
    "one layer a step": Contender("cdb", policy={"layer_choice": "exact"}),
    "head too": Contender("cdb", policy={"exempt": ()}),
    "biases too": Contender("cdb", policy={"share_with_bias": True}),
    "exact": Contender("cdb", policy={"channel_choice": "exact"}),
    "window": Contender("cdb", policy={"channel_choice": "window"}),
    "rate rises": Contender("cdb", policy={"rate": ramp}),
}


def config_of(contender: Contender, **settings: Any) -> SimpleNamespace:
    """What `examples/methods.py` reads of a configuration; numbers may be traced."""
    defaults = dict(
        layer_rate=1.0,
        channel_choice=None,
        hold=100,
        on_switch="carry",
        skip_dropped=False,
        exempt=("head",),
        schedule="cosine",
        decays="kernels",
        dropout_rate=0.0,
        drop_epoch_learning_rate="double",
        clip_norm=None,
    )
    return SimpleNamespace(method=contender.method, **defaults | contender.settings | settings)


def make_policy(
    contender: Contender, config: SimpleNamespace, epochs: Epochs
) -> cdb_jax.Policy | None:
    policy = methods.make_policy(config, epochs)
    changes = {
        name: value(config.rate, epochs.total_steps) if value is ramp else value
        for name, value in contender.policy.items()
    }
    return dataclasses.replace(policy, **changes) if changes else policy


def make_optimizer(
    contender: Contender,
    config: SimpleNamespace,
    policy: cdb_jax.Policy | None,
    epochs: Epochs,
) -> optax.GradientTransformation:
    # Updates are proportional to the learning rate, so that it may be given when all is compiled.
    unit = SimpleNamespace(**vars(config) | {"learning_rate": 1.0})
    optimizer = optax.chain(
        methods.make_optimizer(unit, policy, epochs), optax.scale(config.learning_rate)
    )
    if contender.adds_noise:  # Variance falls as in arXiv 1511.06807.
        noise = optax.add_noise(config.rate, 0.55, jax.random.key(config.seed))
        return optax.chain(noise, optimizer)
    return optimizer


def model_settings(config: SimpleNamespace, dropout: float) -> dict[str, Any]:
    settings = methods.model_settings(config)
    return settings | {"dropout_rate": dropout} if dropout else settings
