"""Drop rates of residual branches by their sensitivity (arXiv 2106.03091), end to end.

    python examples/depth_rates.py                         # some minutes on two cores
    python examples/depth_rates.py --budgets 0.3 --seeds 1

Trains a deep, narrow ViT on scikit-learn's digits for an epoch, measures how much the loss depends
on each block, sets drop rates under a budget, and goes on training. Uniform and linear rates with
the same budget, and training without dropping, are compared with it. Blocks are computed for the
kept samples of a batch only, so the budget is also the share of the blocks' work that is done.

Prints the comparison; writes it to results.json in the run folder, and draws the rates in
rates.png.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib import pyplot

import cdb_jax
import data
import display
import models
import models.vit
from errors import UserError
from locations import LocalPath

DEPTH = 10
models.vit.VITS["vit_deep"] = (32, DEPTH, 4)
MODES = ("uniform", "linear", "sense")


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare drop rates by sensitivity with uniform and linear ones."""

    budgets: tuple[float, ...] = (0.4, 0.8)
    """Shares of the blocks that a step keeps on average."""
    seeds: int = 3
    """Runs of each kind; the same seed means the same parameters and batches."""
    epochs: int = 20
    """Passes over the training images."""
    maximum: float = 0.9
    """The highest drop rate."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 3e-3
    """Of AdamW, falling to zero as a cosine."""
    run_dir: LocalPath = Path("runs/depth")
    """Where results go."""
    data_dir: LocalPath | None = None
    """Where TensorFlow Datasets keeps its sets."""

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not 1 - self.maximum <= budget <= 1:
                raise UserError(
                    f"--budgets {budget} must be between {1 - self.maximum:g} and 1: no rate is "
                    f"higher than --maximum {self.maximum}."
                )
        for name in ("seeds", "epochs", "batch_size"):
            if getattr(self, name) < 1 + (name == "epochs"):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small.")


class State(NamedTuple):
    params: nnx.State
    rest: nnx.State  # Counts of random numbers.
    opt_state: Any


class Run:
    """A training run of one seed, whose drop rates can be changed on the way."""

    def __init__(self, config: Config, dataset: data.DataSet, seed: int):
        self.config, self.dataset, self.seed = config, dataset, seed
        steps = data.batches_per_epoch(dataset, config.batch_size)
        schedule = optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps)
        self.tx = optax.adamw(schedule, weight_decay=1e-2)
        _, params, rest = nnx.split(self._model(()), nnx.Param, ...)
        self.state = State(params, rest, self.tx.init(params))
        self.batches = data.train_batches(dataset, config.batch_size, seed=seed)

    def _model(self, rates: tuple[float, ...]) -> nnx.Module:
        return models.create(
            "vit_deep/2",
            num_classes=self.dataset.num_classes,
            image_shape=self.dataset.preprocessing.image_shape,
            branches=models.Branches(rates, "subset"),
            rngs=nnx.Rngs(self.seed, drop_path=self.seed + 1),
        )

    def _loss(
        self, graph: Any, params: Any, rest: Any, batch: Any, gates: Any = None
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)
        images = batch["image"].astype(jnp.float32) / self.dataset.preprocessing.max_value
        logits = model(images, gates)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (logits, nnx.state(model, nnx.Not(nnx.Param)))

    def train(self, epochs: int, rates: tuple[float, ...]) -> None:
        """Trains with given drop rates, one for each block, or none."""
        model = self._model(rates)
        graph, _, rest = nnx.split(model, nnx.Param, ...)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: State, batch: Any) -> State:
            def loss(params: Any) -> Any:
                return self._loss(graph, params, state.rest, batch)

            grads, (_, rest) = jax.grad(loss, has_aux=True)(state.params)
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
            return State(optax.apply_updates(state.params, updates), rest, opt_state)

        state = self.state._replace(rest=rest)
        for batch in self._next(epochs):
            state = step(state, batch)
        self.state = state

    def _next(self, epochs: int) -> Iterator[Any]:
        for _ in range(epochs * data.batches_per_epoch(self.dataset, self.config.batch_size)):
            yield next(self.batches)

    def sensitivities(self, batches: int = 4) -> np.ndarray:
        """The mean over some batches; these are not trained on."""
        model = self._model(())
        model.eval()
        graph, _, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def measure(params: Any, batch: Any) -> jax.Array:
            def loss(gates: jax.Array) -> jax.Array:
                return self._loss(graph, params, rest, batch, gates)[0]

            return cdb_jax.branch_sensitivities(loss, DEPTH)

        found = [measure(self.state.params, next(self.batches)) for _ in range(batches)]
        return np.mean(found, axis=0)

    def accuracy(self) -> float:
        model = self._model(())
        model.eval()
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        correct = total = 0.0
        evaluate = jax.jit(lambda params, batch: self._loss(graph, params, rest, batch)[1][0])
        for batch in data.test_batches(self.dataset, self.config.batch_size):
            is_right = np.argmax(evaluate(self.state.params, batch), axis=-1) == batch["label"]
            correct += float(np.sum(is_right * batch["weight"]))
            total += float(np.sum(batch["weight"]))
        return correct / total


def result(config: Config, dataset: data.DataSet, seed: int, mode: str, budget: float) -> Any:
    """The rates and the test accuracy of one run: an epoch without dropping, then the others."""
    run = Run(config, dataset, seed)
    run.train(1, ())
    measured = run.sensitivities()  # By all, so that all see the same batches afterwards.
    rates: tuple[float, ...] = ()
    if mode != "none":
        found = cdb_jax.drop_path_rates(
            DEPTH,
            budget * DEPTH,
            mode=mode,
            sensitivities=measured if mode == "sense" else None,
            maximum=config.maximum,
        )
        rates = tuple(found.tolist())
    run.train(config.epochs - 1, rates)
    return {
        "seed": seed,
        "mode": mode,
        "budget": budget,
        "rates": rates,
        "sensitivities": measured.tolist(),
        "test_accuracy": run.accuracy(),
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean accuracy of each kind of run, and its difference to training in full.

    Both come with a 95 % interval, if there are several seeds.
    """

    def accuracies(mode: str, budget: float) -> np.ndarray:
        found = [x for x in runs if (x["mode"], x["budget"]) == (mode, budget)]
        return np.array([x["test_accuracy"] for x in sorted(found, key=lambda x: x["seed"])])

    full = accuracies("none", 1.0)
    rows = []
    for mode, budget in dict.fromkeys((x["mode"], x["budget"]) for x in runs):
        values = accuracies(mode, budget)
        row = {"mode": mode, "budget": budget, "accuracy": interval(values)}
        if len(values) == len(full):
            row["difference"] = interval(values - full)
        rows.append(row)
    return rows


def interval(values: np.ndarray) -> list[float]:
    mean, half = display.mean_interval(values)
    return [mean, mean - half, mean + half] if np.isfinite(half) else [mean]


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for row in rows:
        numbers = [row["accuracy"], [] if row["mode"] == "none" else row["difference"]]
        formats = ("{:.2f}", "{:+.2f}")
        texts = [[f.format(100 * x) for x in xs] for f, xs in zip(formats, numbers, strict=True)]
        cells = [f"{x[0]} [{x[1]}, {x[2]}]" if len(x) > 1 else "".join(x) for x in texts]
        lines.append([row["mode"], f"{row['budget']:.0%}", *cells])
    return lines


def plot_rates(results: list[dict[str, Any]], file: Path) -> None:
    """Draws the rates of each block: lines for uniform and linear ones, dots for seeds."""
    budgets = sorted({x["budget"] for x in results if x["rates"]})
    figure, axes = pyplot.subplots(1, len(budgets), figsize=(5 * len(budgets), 3.5), squeeze=False)
    blocks = np.arange(1, DEPTH + 1)
    for panel, budget in zip(axes[0], budgets, strict=True):
        for color, mode in zip(("C0", "C1", "C2"), MODES, strict=True):
            rows = [x for x in results if (x["mode"], x["budget"]) == (mode, budget)]
            rates = np.array([x["rates"] for x in rows])
            panel.plot(blocks, rates.mean(axis=0), color=color, label=mode)
            if mode == "sense":
                panel.plot(np.tile(blocks, (len(rows), 1)).T, rates.T, ".", color=color, alpha=0.4)
        panel.set(title=f"{budget:.0%} of the blocks kept", xlabel="block", ylim=(-0.03, 1))
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("drop rate")
    axes[0, 0].legend()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    try:
        config = tyro.cli(Config)
        dataset = data.load("digits", config.data_dir)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    config.run_dir.mkdir(parents=True, exist_ok=True)
    # Runs that differ in their seed alone share most of what is compiled.
    jax.config.update("jax_compilation_cache_dir", str(config.run_dir.absolute() / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    kinds = [("none", 1.0), *((mode, x) for x in config.budgets for mode in MODES)]
    out, results = display.console(), []
    for seed in range(config.seeds):
        for mode, budget in kinds:
            results.append(result(config, dataset, seed, mode, budget))
            accuracy = results[-1]["test_accuracy"]
            out.print(f"seed {seed}, {mode}, {budget:.0%} kept: test accuracy {accuracy:.2%}")
            found = {"rows": summarise(results), "runs": results}
            (config.run_dir / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    plot_rates(results, config.run_dir / "rates.png")
    title = f"{config.epochs} epochs, {config.seeds} seeds, 95 % intervals, paired by seed"
    columns = ("rates", "blocks kept", "test accuracy (%)", "against none")
    out.print(display.ResultsTable(title, columns, table(summarise(results))))
    out.print(f"results and rates.png are in {config.run_dir}", soft_wrap=True)


if __name__ == "__main__":
    main()
