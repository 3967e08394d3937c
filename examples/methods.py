"""What `train.py --method` offers: each method's defaults, policy, optimizer and model settings."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import optax

import cdb_jax
import cdb_jax.policy
import models
import optimizers
from errors import UserError

if TYPE_CHECKING:
    from config import Config
    from epochs import Epochs

Name = Literal[
    "none",
    "dropout",
    "cdb",
    "cdb_after",
    "cdb_frozen",
    "cdb_compact",
    "released",
    "algorithm_1",
    "layer_drop_back",
    "skip_update",
    "backdrop",
    "stochastic_depth",
    "drop_path_subset",
    "drop_backward",
]


class Method(NamedTuple):
    """A line of help, the method's rate, the flags that it reads besides --rate."""

    help: str
    rate: float
    reads: tuple[str, ...] = ()
    skips: bool = False  # Whether --skip-dropped can save its work.
    channel_choice: Literal["bernoulli", "window"] = "bernoulli"  # Unless a flag says otherwise.


POLICY_FLAGS = ("exempt", "channel_choice", "layer_rate")
HOLD_FLAGS = ("exempt", "channel_choice", "hold", "on_switch")
DROP_EPOCH_FLAGS = ("drop_epoch_batch", "drop_epoch_learning_rate")
METHODS: dict[str, Method] = {
    "none": Method("the optimizer alone", 0.0),
    "dropout": Method("zeroes units in the forward pass", 0.3),
    "cdb": Method("masks channels of the gradient, before the optimizer", 0.3, POLICY_FLAGS, True),
    "cdb_after": Method("masks channels of the update, after the optimizer", 0.3, POLICY_FLAGS),
    "cdb_frozen": Method(
        "dropped channels keep weights and optimizer state", 0.3, POLICY_FLAGS, True
    ),
    "cdb_compact": Method(
        "keeps optimizer state for the channels that learn only", 0.75, HOLD_FLAGS, True, "window"
    ),
    "released": Method("rules and schedule of the ChannelDropBack authors' code", 0.3),
    "algorithm_1": Method(
        "of one layer a step, masks channels (arXiv 2411.10891)",
        0.3,
        ("exempt", "channel_choice"),
        True,
    ),
    "layer_drop_back": Method(
        "tensors are frozen in every second epoch (arXiv 2412.18027)",
        0.5,
        ("exempt", *DROP_EPOCH_FLAGS),
        True,
    ),
    "skip_update": Method(
        "masks the update and makes up for it (arXiv 2602.15322)", 0.5, ("exempt",)
    ),
    "backdrop": Method("masks positions of a feature map's gradient (arXiv 1806.01337)", 0.3),
    "stochastic_depth": Method(
        "drops residual branches, the last at this rate (arXiv 1603.09382)", 0.5, skips=True
    ),
    "drop_path_subset": Method("runs residual branches on a part of each batch only", 0.4),
    "drop_backward": Method("drops the backward pass of residual branches (arXiv 2402.17812)", 0.5),
}
assert tuple(METHODS) == get_args(Name)

HELP = "\n".join(
    f"{name}: {method.help}" + f"; {method.rate}" * (name != "none")
    for name, method in METHODS.items()
)


def check(config: Config) -> None:
    """Raises a UserError for settings that do not go together."""
    method = METHODS[config.method]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in dict.fromkeys(POLICY_FLAGS + HOLD_FLAGS + DROP_EPOCH_FLAGS):
        if name not in method.reads and getattr(config, name) != defaults[name]:
            raise UserError(
                f"--{name.replace('_', '-')} has no meaning for --method {config.method}; leave it "
                "out."
            )
    by_channel = config.method in ("cdb", "cdb_frozen", "cdb_compact", "algorithm_1")
    varies = channel_choice(config) == "bernoulli" and 0.0 < config.rate < 1.0
    if config.method == "cdb_compact" and varies:
        raise UserError("--method cdb_compact needs --channel-choice window, chunk or exact.")
    if not config.skip_dropped:
        return
    if not method.skips:
        able = ", ".join(name for name, method in METHODS.items() if method.skips)
        raise UserError(
            f"--skip-dropped: --method {config.method} cannot save work; these can: {able}."
        )
    if by_channel and varies:
        raise UserError("--skip-dropped needs --channel-choice window, chunk or exact.")


def channel_choice(config: Config) -> cdb_jax.policy.ChannelChoice:
    """What the flag says, or else the method."""
    return config.channel_choice or METHODS[config.method].channel_choice


# With `skip_init_layers` 3: the arrays of index 0 to 3 in PyTorch's order.
FIRST_LAYERS = {
    "resnet": ("stem", "blocks/0/conv1"),
    "vit": ("patch_embed",),
    "mobilenet": ("stem", "blocks/0/depthwise"),
    "densenet": ("stem", "blocks/0/conv1"),
}


def make_policy(config: Config, epochs: Epochs, channel_axes: Any = None) -> cdb_jax.Policy | None:
    """What the method drops of gradients or updates; None if it leaves them alone."""
    policy = _make_policy(config, epochs)
    if policy is None or channel_axes is None:
        return policy
    if config.method == "released":
        raise UserError(
            "--method released leaves out the first layers, which it knows for the models of the "
            "examples only; choose another --method."
        )
    exempt = config.exempt
    if exempt == HEAD:
        exempt = _head_of(config.model, channel_axes)
    return dataclasses.replace(policy, channel_axes=channel_axes, exempt=exempt)


HEAD = ("head",)  # What `--exempt` is by default.


def _head_of(model: str, channel_axes: Any) -> tuple[str, ...]:
    """The default of `--exempt` for a network of the user's."""
    layers = sorted({path.rpartition("/")[0] or path for path in channel_axes})
    for layer in layers:
        if layer.rpartition("/")[2] == "head":
            return (layer,)
    raise UserError(
        f"--exempt is head by default, and {model} has no layer of that name; name its last layer, "
        f"as in --exempt {layers[-1]}, or give --exempt alone to exempt nothing. Its layers are "
        f"{', '.join(layers)}."
    )


def _make_policy(config: Config, epochs: Epochs) -> cdb_jax.Policy | None:
    key, exempt = config.seed, config.exempt
    match config.method:
        case "cdb" | "cdb_after" | "cdb_frozen":
            return cdb_jax.Policy(
                config.rate,
                key=key,
                layer_rate=config.layer_rate,
                channel_choice=channel_choice(config),
                exempt=exempt,
            )
        case "cdb_compact":
            return cdb_jax.Policy(
                config.rate,
                key=key,
                channel_choice=channel_choice(config),
                exempt=exempt,
                hold=config.hold,
            )
        case "released":
            family = re.match("[a-z]*", config.model)[0]
            first = FIRST_LAYERS.get(family, ())
            schedule = cdb_jax.presets.released_layer_rate(
                epochs=epochs.count, steps_per_epoch=epochs.batches
            )
            return cdb_jax.presets.released_code(
                key=key, exempt=first, rate=config.rate, layer_rate=schedule
            )
        case "algorithm_1":
            return cdb_jax.presets.algorithm_1(
                config.rate, key=key, exempt=exempt, channel_choice=channel_choice(config)
            )
        case "layer_drop_back":
            return cdb_jax.presets.layer_drop_back(
                key=key,
                exempt=exempt,
                steps_per_epoch=epochs.steps_per_epoch,
                layer_rate=config.rate,
            )
        case "skip_update":
            return cdb_jax.presets.skip_update(config.rate, key=key, exempt=exempt)
    return None


def make_optimizer(
    config: Config, policy: cdb_jax.Policy | None, epochs: Epochs
) -> optax.GradientTransformation:
    """The optimizer, and what the method puts around it."""
    total_steps = epochs.count * epochs.batches  # If no epoch had larger batches.
    schedule = optimizers.learning_rate(config, total_steps)
    if config.method == "layer_drop_back":
        schedule = with_drop_epochs(schedule, config, epochs)
    optimizer = optimizers.make(config, schedule)
    if policy is None:
        return optimizer
    if config.method in ("cdb_frozen", "layer_drop_back"):
        return cdb_jax.freeze_dropped(optimizer, policy)
    if config.method == "cdb_compact":
        return cdb_jax.compact(optimizer, policy, on_switch=config.on_switch)
    if config.method in ("cdb_after", "skip_update"):
        return optax.chain(optimizer, cdb_jax.channel_drop_back(policy))
    return optax.chain(cdb_jax.channel_drop_back(policy), optimizer)


def with_drop_epochs(schedule: optax.Schedule, config: Config, epochs: Epochs) -> optax.Schedule:
    """A schedule of the learning rate with the changes of LayerDropBack.

    It runs by epochs, as those with dropping may have fewer steps.
    """
    if config.drop_epoch_learning_rate == "relative" and config.rate == 1.0:
        raise UserError("--drop-epoch-learning-rate relative needs a --rate below 1.")
    steps_per_epoch = epochs.steps_per_epoch
    base = schedule
    if epochs.joined > 1:
        base = cdb_jax.presets.by_epoch(
            lambda epoch: schedule(epoch * epochs.batches), steps_per_epoch=steps_per_epoch
        )

    def in_drop_epochs(count):
        match config.drop_epoch_learning_rate:
            case "double":
                return 2 * base(count)
            case "relative":
                return base(count) / (1 - config.rate)
        return base(count)

    return cdb_jax.presets.every_nth_epoch(in_drop_epochs, base, steps_per_epoch=steps_per_epoch)


def model_settings(config: Config) -> dict[str, Any]:
    """What the method asks of the model."""
    if config.method == "dropout":
        return {"dropout_rate": config.rate}
    settings = {"dropout_rate": config.dropout_rate}
    if config.method == "backdrop":
        return settings | {"backdrop_rate": config.rate}
    if config.method in ("stochastic_depth", "drop_path_subset", "drop_backward"):
        return settings | {"branches": _branches(config)}
    return settings


def _branches(config: Config) -> models.Branches:
    depth = models.depth(config.model) or 1  # Unknown names are reported later.
    if config.method == "drop_backward":
        return models.Branches((config.rate,) * depth, "backward")
    if config.method == "drop_path_subset":
        return models.Branches((config.rate,) * depth, "subset", jax.device_count())
    convolves = config.model.startswith("resnet")
    if config.skip_dropped and convolves and jax.default_backend() == "cpu":
        raise UserError(
            "--skip-dropped: convolutions that may be left out run many times slower on CPU; "
            "choose a ViT, or --method drop_path_subset."
        )
    budget = depth - config.rate * (depth + 1) / 2  # Drops the last block at `rate`.
    rates = cdb_jax.drop_path_rates(depth, budget, mode="linear")
    return models.Branches(tuple(rates.tolist()), "skip" if config.skip_dropped else "mask")
