"""One training run: from its settings to its metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contenders import (
    ABLATIONS,
    CONTENDERS,
    NOTHING,
    config_of,
    make_optimizer,
    make_policy,
    model_settings,
)
from flax import nnx
from overhead import peak_bytes
from scipy.special import log_softmax
from tasks import TASKS, Images, Split

import cdb_jax
import models

BINS = 15  # Of the expected calibration error (Guo et al. 2017, arXiv 1706.04599).


class Program(NamedTuple):
    """What is compiled once for all seeds, learning rates and weight decays."""

    task: str
    contender: str
    model: str
    optimizer: str
    rate: float = 0.0
    dropout: float = 0.0
    ablation: bool = False


class Settings(NamedTuple):
    """What runs of one program differ in."""

    seed: int
    learning_rate: float
    weight_decay: float

    def arrays(self) -> Settings:
        """As compiled programs take them."""
        return Settings(np.uint32(self.seed), *map(np.float32, self[1:]))


class State(NamedTuple):
    """What a step changes."""

    params: nnx.State
    rest: nnx.State  # Batch statistics and keys.
    opt_state: Any


class Compiled(NamedTuple):
    """The programs of one `Program`: first state, training step, logits."""

    initial: Callable[..., State]
    step: Any
    predict: Callable[..., jax.Array]


def run(program: Program, settings: Settings, *, test: bool) -> dict[str, Any]:
    """Trains once, and measures on the validation images; on the test images only if asked to."""
    split, curve = TASKS[program.task].split(settings.seed), []
    predict = compiled(program).predict

    def watch(state):
        watched = split.watched or split.test
        return curve.append(measure(predict, state, watched)["accuracy"])

    state = fit(program, settings, split, watch if test else None)
    metrics = {"train_accuracy": measure(predict, state, split.train)["accuracy"]}
    for name in ("validation", "test") if test else ("validation",):
        for metric, value in measure(predict, state, getattr(split, name)).items():
            metrics[f"{name}_{metric}"] = value
    return metrics | {"curve": " ".join(f"{x:.4f}" for x in curve)}


def fit(
    program: Program,
    settings: Settings,
    split: Split,
    watch: Callable[[State], None] | None = None,
) -> State:
    """The weights at the end, or those of the best evaluation if the contender stops early.

    `watch` sees the state at every evaluation.
    """
    task, stops_early = TASKS[program.task], contender_of(program).stops_early
    numbers = settings.arrays()
    initial, step, predict = compiled(program)
    state = initial(numbers)
    if task.start:
        state = start_from(pretrained(task.start, program.model), state)
    best, kept = (-1.0, 0.0), state
    for number, index in enumerate(batches(task, settings.seed), 1):
        state = step(numbers, state, *split.train.take(index))
        if number % (task.steps // task.evaluations):
            continue
        if watch:
            watch(state)
        if stops_early:
            now = score(measure(predict, state, split.validation))
            if now > best:
                best, kept = now, state
    return kept if stops_early else state


def score(metrics: dict[str, float]) -> tuple[float, float]:
    """What tuning and early stopping maximise: accuracy, then likelihood."""
    return metrics["accuracy"], -metrics["nll"]


def contender_of(program: Program) -> Any:
    return (ABLATIONS if program.ablation else CONTENDERS)[program.contender]


def batches(task: Any, seed: int) -> Iterator[np.ndarray]:
    """Indices of every step's images: each image once in an epoch, in an order of the seed's."""
    rng, count = np.random.default_rng(seed), len(task.split(seed).train.label)
    per_epoch = task.epoch_steps
    for step in range(task.steps):
        if step % per_epoch == 0:
            order = rng.permutation(count)
        start = step % per_epoch * task.batch_size
        yield order[start : start + task.batch_size]


@functools.lru_cache(maxsize=8)
def compiled(program: Program) -> Compiled:
    """Steps keep the state that they are given, as early stopping goes back to an earlier one."""
    (initial, step, predict), arguments = functions(program)
    return Compiled(jax.jit(initial), jax.jit(step).lower(*arguments).compile(), jax.jit(predict))


def peak(program: Program) -> int:
    """Bytes that a step needs at once if it updates its state in place."""
    (_, step, _), arguments = functions(program)
    return peak_bytes(jax.jit(step, donate_argnums=1).lower(*arguments).compile())


def functions(program: Program) -> tuple[tuple[Callable, ...], tuple[Any, ...]]:
    """What `compiled` compiles, and the arguments of a step, of which only shapes matter."""
    task, contender = TASKS[program.task], contender_of(program)
    train = task.split(0).train
    epochs = task.epochs
    numbers = Settings(0, 0.0, 0.0).arrays()

    def parts(numbers: Settings) -> tuple[Any, Any, Any]:
        config = config_of(
            contender,
            model=program.model,
            optimizer=program.optimizer,
            rate=program.rate,
            **numbers._asdict(),
        )
        policy = make_policy(contender, config, epochs)
        return config, policy, make_optimizer(contender, config, policy, epochs)

    def build(numbers: Settings) -> nnx.Module:
        keys = jax.random.split(jax.random.key(numbers.seed))
        return models.create(
            program.model,
            num_classes=task.num_classes,
            image_shape=train.image.shape[1:],
            **model_settings(parts(numbers)[0], program.dropout),
            # Of streams of their own, so that every method starts from the same parameters.
            rngs=nnx.Rngs(params=keys[0], default=keys[1]),
        )

    def logits(model: nnx.Module, images: jax.Array) -> jax.Array:
        return model(images.astype(jnp.float32) * (2.0 / task.max_value) - 1.0)

    def graph() -> nnx.Module:
        return nnx.eval_shape(build, numbers)

    def initial(numbers: Settings) -> State:
        _, params, rest = nnx.split(build(numbers), nnx.Param, ...)
        return State(params, rest, parts(numbers)[2].init(params))

    def step(numbers: Settings, state: State, images: jax.Array, labels: jax.Array) -> State:
        config, policy, tx = parts(numbers)
        structure = nnx.graphdef(graph())

        def loss_fn(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(structure, params, state.rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits(model, images), labels)
            return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

        grad, chosen = jax.grad(loss_fn, has_aux=True), {}
        if config.skip_dropped:
            step = cdb_jax.selection_count(state.opt_state)
            chosen = {"selection": policy.select(state.params, step)}
            compact = config.method == "cdb_compact"
            grad = cdb_jax.grad(loss_fn, has_aux=True, kept_only=compact)
            grad = functools.partial(grad, **chosen)
        gradients, rest = grad(state.params)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params, **chosen)
        return State(optax.apply_updates(state.params, updates), rest, opt_state)

    def predict(state: State, images: jax.Array) -> jax.Array:
        model = graph()
        model.eval()
        return logits(nnx.merge(nnx.graphdef(model), state.params, state.rest), images)

    batch = train.take(np.arange(task.batch_size))
    state = jax.eval_shape(initial, numbers)
    return (initial, step, predict), (numbers, state, *batch)


def mean_flops(program: Program) -> float:
    """Of a training step, where the compiler counts the dearer side of a conditional."""

    def flops(program):
        return compiled(program).step.cost_analysis()["flops"]

    share = contender_of(program).settings.get("layer_rate", 0.0)  # Of the layers, left out.
    if not share:
        return flops(program)
    whole = program._replace(contender="none", rate=0.0)
    rest = program._replace(contender=NOTHING, rate=1.0)
    return (1 - share) * flops(whole) + share * flops(rest)


@functools.lru_cache(maxsize=4)
def pretrained(task: str, model: str) -> State:
    """A network trained on another task by AdamW alone: the same for all runs that start there."""
    return fit(Program(task, "none", model, "adamw"), Settings(0, 3e-3, 1e-2), TASKS[task].split(0))


def start_from(trained: State, fresh: State) -> State:
    """The weights and batch statistics of a network that was trained, all but its head."""

    def carry(old: nnx.State, new: nnx.State) -> nnx.State:
        found = dict(nnx.to_flat_state(old))
        return nnx.from_flat_state(
            [
                (path, found[path] if isinstance(x, kinds) and path[0] != "head" else x)
                for path, x in nnx.to_flat_state(new)
            ]
        )

    kinds = (nnx.Param, nnx.BatchStat)
    return fresh._replace(
        params=carry(trained.params, fresh.params), rest=carry(trained.rest, fresh.rest)
    )


def measure(predict: Callable, state: State, images: Images) -> dict[str, float]:
    """Accuracy, negative log-likelihood in nats, and expected calibration error."""
    logits = np.asarray(predict(state, images.image), np.float64)
    log_probabilities = log_softmax(logits, axis=1)
    correct = logits.argmax(axis=1) == images.label
    nll = -np.mean(log_probabilities[np.arange(len(correct)), images.label])
    confidence = np.exp(log_probabilities.max(axis=1))
    return {
        "accuracy": float(correct.mean()),
        "nll": float(nll),
        "ece": calibration_error(confidence, correct),
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over bins of confidence, weighted by their size."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=BINS)
    return float(np.abs(gaps).sum() / len(correct))
