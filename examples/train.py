"""Train an image classifier with ChannelDropBack, or without.

    python examples/train.py                                        # digits, offline, a minute
    python examples/train.py --model vit_s/4 --dataset cifar10 --method cdb --rate 0.3
    python examples/train.py --recipe resnet50-cifar100             # a row of the paper's tables
    python examples/train.py --run-dir runs/a --resume              # go on after an interruption

Everything is kept in the run folder: settings.json, metrics.jsonl, curves.png and checkpoints. All
devices share each batch; with several processes start one command on each host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import cdb_jax
import data
import display
import methods
import models
import processes
import recipes
import run_folder
import training
import weights
from errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an image classifier with a stochastic backward pass, or without."""

    recipe: str | None = None
    """Flags for a row of the paper's tables: a file in examples/recipes. Flags given here win."""
    model: str = "resnet_small"
    """resnet_small, resnet18, resnet34, resnet50;
    vit_mini, vit_ti, vit_s, vit_b, vit_l with a patch size, as in vit_mini/2."""
    dataset: Literal["digits", "cifar10", "cifar100", "svhn_cropped", "imagenet2012"] = "digits"
    """digits comes with scikit-learn; the others are prepared once with examples/data.py."""
    image_size: int | None = None
    """Side of the images, resized to it; None: that of the data set."""
    weights: Path | None = None
    """Pretrained weights to begin with, as examples/recipes/README.md describes: a .npz file for a
    ViT, .safetensors for a ResNet. With another number of classes the head is new."""
    method: Annotated[methods.Name, tyro.conf.arg(help=methods.HELP)] = "cdb"
    rate: float | None = None
    """Probability of dropping; None: that of the method, named above."""
    layer_rate: float = 1.0
    """Probability that a layer is masked in a step (cdb, cdb_after, cdb_frozen)."""
    channel_choice: Literal["bernoulli", "exact", "window"] | None = None
    """Draws each channel independently, a fixed number, or a block that wraps around (cdb*,
    algorithm_1); None: window for cdb_compact, else bernoulli."""
    hold: int = 100
    """Steps for which the same channels learn (cdb_compact)."""
    on_switch: Literal["carry", "reset"] = "carry"
    """When other channels learn: moments stay with those that are kept again, or all start again
    (cdb_compact)."""
    skip_dropped: bool = False
    """Do not compute what is dropped: saves time."""
    exempt: tuple[str, ...] = ("head",)
    """Paths of layers that always learn in full. released exempts the first ones instead."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step, over all devices."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 3e-3
    """The highest of the schedule."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: rises over a twentieth of the steps, then falls to zero.
    step: times 0.1 after 30, 60 and 85 % of the steps."""
    weight_decay: float = 1e-2
    """Of kernels only: decoupled with adamw, added to the gradient with sgd."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass. Parameters are float32 always."""
    seed: int = 0
    """Of initial parameters, order of the data, augmentation, dropout and dropped channels."""
    run_dir: Path = Path("runs/train")
    """Where results and checkpoints go."""
    resume: bool = False
    """Go on from the last checkpoint in --run-dir, if there is one."""
    data_dir: Path | None = None
    """Where TensorFlow Datasets keeps its sets."""
    workers: int = 0
    """Processes that read and augment images; 0 uses threads."""
    mesh: str = ""
    """Axes of devices, such as data=4,fsdp=2: batches are split over both, parameters and optimizer
    state over fsdp. Empty: all devices in data."""
    distributed: bool = False
    """Join other processes: JAX finds them on TPU pods and under Slurm; else give all three:"""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    process_count: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "learning_rate", "hold")
        for name in (*positive, "weight_decay", "workers"):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if name in positive and not 0 < value < float("inf"):
                raise UserError(f"{flag} {value} must be positive, and finite.")
            if not 0 <= value < float("inf"):
                raise UserError(f"{flag} {value} must be at least 0, and finite.")
        if self.workers > MOST_WORKERS:
            raise UserError(f"--workers {self.workers} must be at most {MOST_WORKERS}.")
        if self.image_size is not None and not 0 < self.image_size <= LARGEST_IMAGE:
            raise UserError(f"--image-size {self.image_size} must be 1 to {LARGEST_IMAGE}.")
        if self.rate is None:
            object.__setattr__(self, "rate", methods.METHODS[self.method].rate)
        if not 0.0 <= self.rate <= 1.0:
            raise UserError(f"--rate {self.rate} must be a probability between 0 and 1.")
        methods.check(self)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must be at least 0 and less than 2**32.")


MOST_WORKERS = 512
LARGEST_IMAGE = 4096
# What may differ between a run and its continuation.
NOT_SETTINGS = {"recipe", "run_dir", "resume", "data_dir", "workers", "mesh"}
NOT_SETTINGS |= {"distributed", "coordinator", "process_count", "process_id"}
DEFAULTS = {x.name: x.default for x in dataclasses.fields(Config) if x.name not in NOT_SETTINGS}


class State(NamedTuple):
    """Everything a step changes, and all that a checkpoint needs to hold."""

    params: nnx.State
    rest: nnx.State  # Batch statistics and the dropout key.
    opt_state: Any
    sums: dict[str, jax.Array]  # Of the metrics of this epoch's steps.


def make_steps(
    config: Config,
    model: nnx.Module,
    tx: optax.GradientTransformation,
    policy: cdb_jax.Policy | None,
    max_value: int,
    layout: Any = None,
) -> tuple[Callable, Callable]:
    """The compiled training step and evaluation step; `layout` holds the state's shardings."""
    model.train()
    train_graph = nnx.graphdef(model)
    model.eval()
    eval_graph = nnx.graphdef(model)
    mean, std = weights.pixel_statistics(config.weights)

    def scores(model: nnx.Module, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Loss and correctness of every image."""
        logits = model(batch["image"].astype(jnp.float32) * (1 / (max_value * std)) - mean / std)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)

    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict]:
        def loss_fn(params: nnx.State) -> tuple[jax.Array, Any]:
            model = nnx.merge(train_graph, params, state.rest, copy=True)
            losses, correct = scores(model, batch)
            return losses.mean(), (correct.mean(), nnx.split(model, nnx.Param, ...)[2])

        value_and_grad, chosen = jax.value_and_grad(loss_fn, has_aux=True), {}
        dropped = jnp.zeros(())
        if policy:
            selection = policy.select(state.params, cdb_jax.selection_count(state.opt_state))
            dropped, chosen = selection.dropped_fraction, {"selection": selection}
        if config.skip_dropped and policy:
            compact = config.method == "cdb_compact"
            value_and_grad = cdb_jax.value_and_grad(loss_fn, has_aux=True, kept_only=compact)
            value_and_grad = functools.partial(value_and_grad, **chosen)
        (loss, (accuracy, rest)), grads = value_and_grad(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **chosen)
        params = optax.apply_updates(state.params, updates)
        metrics = {"train_loss": loss, "train_accuracy": accuracy, "dropped_fraction": dropped}
        sums = jax.tree.map(jnp.add, state.sums, metrics)
        return State(params, rest, opt_state, sums), metrics

    def eval_step(state: State, batch: dict[str, jax.Array]) -> jax.Array:
        """Sums of loss, correctness and weight."""
        losses, correct = scores(nnx.merge(eval_graph, state.params, state.rest), batch)
        weight = batch["weight"]
        return jnp.stack([jnp.sum(losses * weight), jnp.sum(correct * weight), jnp.sum(weight)])

    # The state stays where it is put, whatever the compiler would like better.
    compiled = jax.jit(train_step, donate_argnums=0, out_shardings=(layout, None))
    return compiled, jax.jit(eval_step)


def train(config: Config, *, brief: bool = False) -> list[run_folder.Row]:
    """Trains, and returns the metrics of every epoch. When brief, shows nothing but progress.

    Raises:
      UserError: if the configuration, the data set or the run folder does not allow it.
      StoppedError: if asked to stop, when everything is saved.
    """
    out = display.console()
    weights.check(config.weights, config.model)
    dataset = data.load(config.dataset, config.data_dir, config.image_size)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    size, seed = config.batch_size, np.uint32(config.seed)
    mesh = training.make_mesh(config.mesh, size)
    epoch_steps = data.steps_per_epoch(dataset, size)
    total_steps = config.epochs * epoch_steps

    def build(seed: jax.Array) -> nnx.Module:
        return models.create(
            config.model,
            num_classes=dataset.num_classes,
            image_shape=dataset.preprocessing.image_shape,
            dtype=config.dtype,
            **methods.model_settings(config),
            # Streams of their own, so that every method starts from the same parameters.
            rngs=nnx.Rngs(jax.random.key(seed), **training.streams(seed, "backdrop", "drop_path")),
        )

    def initial_state(seed: jax.Array, pretrained: Any) -> State:
        model = build(seed)
        nnx.update(model, pretrained)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return State(params, rest, tx.init(params), dict(zeros))

    zeros = dict.fromkeys(run_folder.STEP_METRICS, np.float32(0.0))
    try:
        model = nnx.eval_shape(build, seed)
        policy = methods.make_policy(config, total_steps, epoch_steps)
        report = policy and cdb_jax.channel_report(nnx.state(model, nnx.Param), policy)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    tx = methods.make_optimizer(config, policy, total_steps, epoch_steps)
    pretrained = weights.read(config.weights, config.model, model)
    layout = training.shardings(mesh, jax.eval_shape(initial_state, seed, pretrained.arrays))
    max_value = dataset.preprocessing.max_value
    train_step, eval_step = make_steps(config, model, tx, policy, max_value, layout)

    settings = dataclasses.asdict(config) | {"weights": pretrained.digest}
    settings = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
    run = run_folder.Run(config.run_dir, settings, DEFAULTS, resume=config.resume)
    if report and not brief:
        out.print(str(report), soft_wrap=True)
    state = training.on_mesh(mesh, initial_state, seed, pretrained.arrays)
    step, state = run.restore(state, epoch_steps)
    if pretrained.summary and step == 0 and not brief:
        out.print(pretrained.summary, soft_wrap=True)
    del pretrained  # Large, and in the state if it is needed.
    batches = data.train_batches(
        dataset, size, seed=config.seed, start_step=step, workers=config.workers, **share
    )
    with run, contextlib.closing(batches), processes.StopRequest() as stop:
        for epoch in range(step // epoch_steps + 1, config.epochs + 1):
            start, first = time.perf_counter(), step
            title = f"{config.model}, {config.method}: epoch {epoch}/{config.epochs}"
            with display.EpochProgress(out, title, epoch_steps) as progress:
                while step < epoch * epoch_steps:
                    if stop.at(step):
                        run.save(step, state)
                        raise processes.StoppedError(step, stop.signal)
                    batch = training.distribute(next(batches), mesh)
                    state, metrics = train_step(state, batch)
                    step += 1
                    progress.update(step - first, size, metrics)
            sums = jax.device_get(state.sums)
            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch,
                "step": step,
                **{name: float(total) / epoch_steps for name, total in sums.items()},
                **training.evaluate(eval_step, state, dataset, size, mesh, share),
                "images_per_second": (step - first) * size / seconds,
            }
            run.log(row)
            state = state._replace(sums=training.on_mesh(mesh, lambda: dict(zeros)))
            run.save(step, state)
            if not brief:
                out.print(display.summary(row, config.epochs), soft_wrap=True)
    return run.rows


def main() -> None:
    try:
        config = recipes.parse(Config, sys.argv[1:])
        given = (config.coordinator, config.process_count, config.process_id)
        if config.distributed or given != (None, None, None):
            processes.join(*given)
        rows = train(config)
        display.show_results(config.run_dir, f"{config.model}, {config.method}", rows)
    except processes.StoppedError as stopped:
        display.console().print(f"{stopped}; go on with --resume.")
        raise SystemExit(128 + stopped.signal) from None
    except Exception as error:
        processes.leave(error)


if __name__ == "__main__":
    main()
