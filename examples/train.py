"""Train an image classifier with ChannelDropBack, or without.

    python examples/train.py                                        # digits, offline, a minute
    python examples/train.py --model vit_s/4 --dataset cifar10 --method cdb --rate 0.3
    python examples/train.py --recipe resnet50-cifar100             # a row of the paper's tables
    python examples/train.py --run-dir runs/a --resume              # go on after an interruption
    srun -n 8 python examples/train.py --batch-size 512             # one process for each GPU

Everything is kept in the run folder: settings.json, metrics.jsonl, curves.png and checkpoints. All
devices share each batch, those of other processes too if a launcher has started several.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import cdb_jax
import data
import display
import methods
import mixing
import models
import processes
import recipes
import run_folder
import training
import weights
from config import DEFAULTS, NOT_SETTINGS, Config
from epochs import Epochs, SaveTimes
from errors import UserError

CHECK_EVERY = 50  # Steps; reading the loss waits for the device.
LOOK_EVERY = 5.0  # Seconds; whether the run folder is still there.


class Pixels(NamedTuple):
    """The highest value of a pixel, and what to standardise by, between 0 and 1."""

    max_value: int
    mean: Any
    std: Any


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
    pixels: Pixels,
    layout: Any = None,
) -> tuple[Callable, Callable]:
    """The compiled training step and evaluation step; `layout` holds the state's shardings."""
    model.train()
    train_graph = nnx.graphdef(model)
    model.eval()
    eval_graph = nnx.graphdef(model)
    max_value, mean, std = pixels

    def standardised(images: jax.Array) -> jax.Array:
        return images.astype(jnp.float32) * (1 / (max_value * std)) - mean / std

    def scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Loss and correctness of every image; targets are labels, or shares of all classes."""
        if targets.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        else:
            losses = optax.softmax_cross_entropy(logits, targets)
            targets = jnp.argmax(targets, axis=-1)
        return losses, (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)

    def train_step(state: State, batch: dict[str, jax.Array], step: Any) -> tuple[State, dict]:
        images = standardised(batch["image"])
        mixes = config.mixup > 0 or config.cutmix > 0
        weight = jnp.ones(())
        if mixes:
            key = training.key_of_step(config.seed, step)
            images, weight = mixing.mix(key, images, mixup=config.mixup, cutmix=config.cutmix)

        def loss_fn(params: nnx.State) -> tuple[jax.Array, Any]:
            model = nnx.merge(train_graph, params, state.rest, copy=True)
            logits, targets = model(images), batch["label"]
            if mixes or config.label_smoothing:
                targets = mixing.soft_targets(
                    targets, weight, logits.shape[-1], config.label_smoothing
                )
            losses, correct = scores(logits, targets)
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
        model = nnx.merge(eval_graph, state.params, state.rest)
        losses, correct = scores(model(standardised(batch["image"])), batch["label"])
        weight = batch["weight"]
        return jnp.stack([jnp.sum(losses * weight), jnp.sum(correct * weight), jnp.sum(weight)])

    # The state stays where it is put, whatever the compiler would like better.
    compiled = jax.jit(train_step, donate_argnums=0, out_shardings=(layout, None))
    return compiled, jax.jit(eval_step)


def check_network(name: str, model: nnx.Module, dataset: data.DataSet) -> None:
    """Raises an error if a network of the user's does not return logits for the images."""
    images = jax.ShapeDtypeStruct((2, *dataset.preprocessing.image_shape), jnp.float32)
    try:
        found = nnx.eval_shape(lambda model, images: model(images), model, images)
    except Exception as error:
        raise RuntimeError(f"--model {name} failed on images of shape {images.shape}") from error
    wanted = (2, dataset.num_classes)
    if not hasattr(found, "shape") or found.shape != wanted:
        what = f"shape {found.shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise UserError(
            f"--model {name} returned {what} for {len(wanted)} images; return logits of shape "
            f"{wanted}, as the data set has {dataset.num_classes} classes."
        )


def inferred_axes(model: nnx.Module, dataset: data.DataSet) -> Any:
    """The channel axes of a network that names may not tell us about."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    shape = (2, *dataset.preprocessing.image_shape)

    def loss(params: nnx.State, rest: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest, copy=True)(images).sum()

    return cdb_jax.infer_channel_axes(loss, params, rest, jax.ShapeDtypeStruct(shape, jnp.float32))


class Job(NamedTuple):
    """What a run trains, before its folder is opened.

    Attributes:
      dataset: the images.
      mesh: the devices.
      epochs: how its steps add up.
      train_step: see `make_steps`.
      eval_step: likewise.
      settings: what the results depend on, as JSON values.
      report: what the method can drop, if it has a policy.
      loaded: a line on the pretrained weights; empty without.
    """

    dataset: data.DataSet
    mesh: jax.sharding.Mesh
    epochs: Epochs
    train_step: Callable[..., tuple[State, dict]]
    eval_step: Callable[..., jax.Array]
    settings: dict[str, Any]
    report: Any
    loaded: str


def prepare(config: Config) -> tuple[Job, Callable[..., State]]:
    """What a run trains, and what makes its first state on the devices, also for other seeds.

    Raises:
      UserError: if anything is wrong with the configuration, the data set or the weights.
    """
    weights.check(config.weights, config.model)
    dataset = data.load(
        config.dataset,
        config.data_dir,
        config.image_size,
        config.rotation,
        config.data_folder,
        colors=weights.input_channels(config.weights) == 3,
    )
    mesh, seed = training.make_mesh(config.mesh, config.batch_size), np.uint32(config.seed)
    num_batches = data.batches_per_epoch(dataset, config.batch_size, _multiple(config))
    epochs = Epochs(config.epochs, num_batches, config.drop_epoch_batch)
    training.check_epochs(epochs)

    def build(seed: jax.Array) -> nnx.Module:
        return models.create(
            config.model,
            num_classes=dataset.num_classes,
            image_shape=dataset.preprocessing.image_shape,
            dtype=config.dtype,
            **methods.model_settings(config),
            # Separate streams, so that every method starts from the same parameters.
            rngs=nnx.Rngs(jax.random.key(seed), **training.streams(seed)),
        )

    def initial_state(seed: jax.Array, arrays: Any) -> State:
        model = build(seed)
        nnx.update(model, arrays)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return State(params, rest, tx.init(params), no_sums())

    try:
        model = nnx.eval_shape(build, seed)
        axes = None
        if models.imported.is_path(config.model):
            check_network(config.model, model, dataset)
            axes = inferred_axes(model, dataset)
        policy = methods.make_policy(config, epochs, axes)
        report = policy and cdb_jax.channel_report(nnx.state(model, nnx.Param), policy)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    tx = methods.make_optimizer(config, policy, epochs)
    pretrained = weights.read(config.weights, config.model, model)
    layout = training.shardings(mesh, jax.eval_shape(initial_state, seed, pretrained.arrays))
    statistics = weights.pixel_statistics(config.weights)
    if config.standardise:
        statistics = data.pixel_statistics(dataset)
    pixels = Pixels(dataset.preprocessing.max_value, *statistics)
    train_step, eval_step = make_steps(config, model, tx, policy, pixels, layout)

    settings = dataclasses.asdict(config) | {"weights": pretrained.digest}
    # The folder may move.
    settings["data_folder"] = config.data_folder and config.data_folder.name
    settings = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
    settings |= {"training_images": len(dataset.train), "classes": dataset.num_classes}

    def initial(seed: int = config.seed) -> State:
        return training.on_mesh(mesh, initial_state, np.uint32(seed), pretrained.arrays)

    job = Job(dataset, mesh, epochs, train_step, eval_step, settings, report, pretrained.summary)
    return job, initial


def _multiple(config: Config) -> int:
    """What the number of images of an epoch is a multiple of."""
    return jax.device_count() if config.keep_partial_batch else config.batch_size


def no_sums() -> dict[str, np.ndarray]:
    return dict.fromkeys(run_folder.STEP_METRICS, np.float32(0.0))


class Saver:
    """Saves the state of a run, at the times that its flags name and when it is asked to stop."""

    def __init__(self, config: Config, run: run_folder.Run, stop: processes.StopRequest):
        self._run, self.stop = run, stop
        self._times = SaveTimes(config.save_every)
        self._checks = not config.go_on_if_not_finite
        self._looked = time.monotonic()

    def check(self, step: int, state: State, test_loss: float = 0.0) -> None:
        """Raises a UserError if a state should not be saved, as nothing can go on from it."""
        if self._checks and not (training.is_finite(state) and math.isfinite(test_loss)):
            raise UserError(
                f"the loss or a parameter is not finite at step {step}. Start again with a lower "
                "--learning-rate in another --run-dir, as the same settings lead here again. With "
                f"--go-on-if-not-finite, {self._run.way_on()}"
            )

    def save(self, step: int, state: State) -> None:
        self.check(step, state)
        self._run.save(step, state, is_finite=self._checks or training.is_finite(state))
        self._times.saved()

    def save_and_stop(self, step: int, state: State) -> NoReturn:
        self.save(step, state)
        raise processes.StoppedError(step, self.stop.signal)

    def after_step(self, step: int, state: State, *, is_last: bool) -> None:
        """What is due between two steps; after the last one of an epoch, it is saved anyway."""
        if step % CHECK_EVERY == 0:
            self.check(step, state)
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._run.check()
            self._looked = time.monotonic()
        if not is_last and self._times.is_due(step):
            self.save(step, state)


def train(config: Config, *, brief: bool = False) -> list[run_folder.Row]:
    """Trains, and returns the metrics of every epoch. When brief, shows nothing but progress.

    Raises:
      UserError: if the configuration, the data set or the run folder does not allow it.
      StoppedError: if asked to stop, when everything is saved.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.StopRequest())
        run_folder.check_free(config.run_dir)
        job, initial = prepare(config)
        run = stack.enter_context(
            run_folder.Run(
                config.run_dir, job.settings, DEFAULTS, resume=config.resume, keep=config.keep
            )
        )
        out = display.console()
        if not brief:
            out.print(processes.device_summary(), soft_wrap=True)
        if config.data_folder and not brief:
            out.print(data.summary(job.dataset), soft_wrap=True)
        if job.report and not brief:
            display.show_report(out, job.report)
        step, state = run.restore(initial(), job.epochs)
        del initial  # It holds the pretrained weights, which are in the state.
        if job.loaded and step == 0 and not brief:
            out.print(job.loaded, soft_wrap=True)
        batches = data.train_batches(
            job.dataset,
            config.batch_size,
            seed=config.seed,
            multiple=_multiple(config),
            start=job.epochs.batches_before(step),
            workers=config.workers,
            **training.process_share(),
        )
        stack.enter_context(contextlib.closing(batches))
        saver = Saver(config, run, stop)
        for epoch in range(len(run.rows), config.epochs):
            step, state, row = train_epoch(config, job, saver, batches, epoch, step, state)
            run.log(row)
            if not brief:
                # In a terminal it wraps between words; in a log it stays one line.
                out.print(display.summary(row, config.epochs), soft_wrap=not out.is_terminal)
            # The sums show a loss that was not finite, so they are checked before they are reset.
            saver.check(step, state, row["test_loss"])
            state = state._replace(sums=training.on_mesh(job.mesh, no_sums))
            saver.save(step, state)
    return run.rows


def train_epoch(
    config: Config,
    job: Job,
    saver: Saver,
    batches: Iterator[dict[str, np.ndarray]],
    epoch: int,
    step: int,
    state: State,
) -> tuple[int, State, run_folder.Row]:
    """Trains to the end of an epoch, and evaluates; returns the metrics as well."""
    start, end = time.perf_counter(), job.epochs.start(epoch + 1)
    num_images = untimed = 0
    title = f"{config.model}, {config.method}: epoch {epoch + 1}/{config.epochs}"
    steps, in_flight = job.epochs.steps(epoch), training.StepsInFlight()
    with display.EpochProgress(display.console(), title, steps) as progress:
        for batch in training.epoch_batches(batches, job.epochs, epoch, step, saver.stop):
            batch = training.distribute(batch, job.mesh)
            state, metrics = job.train_step(state, batch, np.uint32(step))
            in_flight.add(metrics)
            step += 1
            num_images += batch["label"].size
            if not untimed and step < end:
                # The first step may compile, which says nothing of the speed of the others.
                jax.block_until_ready(metrics)
                start, untimed = time.perf_counter(), num_images
            progress.update(step - job.epochs.start(epoch), num_images, metrics)
            saver.after_step(step, state, is_last=step == end)
    if step < end:
        saver.save_and_stop(step, state)
    sums = jax.device_get(state.sums)
    seconds = time.perf_counter() - start
    tested = training.evaluate(
        job.eval_step,
        state,
        job.dataset,
        config.batch_size,
        job.mesh,
        training.process_share(),
        saver.stop,
    )
    if tested is None:
        saver.save_and_stop(step, state)
    row: run_folder.Row = {
        "epoch": epoch + 1,
        "step": step,
        **{name: float(total) / steps for name, total in sums.items()},
        **tested,
        # Unknown if the run was stopped in the evaluation and has only gone on with that.
        "images_per_second": (num_images - untimed) / seconds if num_images else math.nan,
    }
    if config.method == "cdb_compact":
        row["held_period"] = (step - 1) // config.hold  # Of the last step, from 0.
    return step, state, row


def main() -> None:
    config = None
    try:
        config = recipes.parse(Config, sys.argv[1:])
        given = (config.coordinator, config.process_count, config.process_id)
        processes.join(config.distributed, *given)
        rows = train(config)
        display.show_results(config.run_dir, f"{config.model}, {config.method}", rows)
    except processes.StoppedError as stopped:
        display.console().print(f"{stopped}; go on with --resume.")
        raise SystemExit(128 + stopped.signal) from None
    except Exception as error:
        processes.leave(error, config)


if __name__ == "__main__":
    processes.run(main)
