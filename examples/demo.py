"""What dropping a part of the backward pass costs and saves, for a ResNet and a ViT.

    python examples/demo.py            # six minutes on two cores; stopped, it continues when rerun

Each method trains small networks on scikit-learn's digits, with clean labels and with 30 % of them
redrawn at random. Runs of one seed have the same first weights, order and labels; a mask drops the
same channels for all seeds. Time, memory and compilation are those of a larger ResNet and ViT, as
small ones spend little time on what is dropped; the methods take turns, so that all of them meet
the same machine.

Prints tables, and draws them in runs/demo/comparison.png.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from matplotlib import pyplot

import data
import display
import models
import run_folder
import train
import training
from config import Config
from errors import UserError
from locations import LocalPath

PANELS = 5  # Compile time is in the table only.
EVALUATED = 512  # Test images at once.
NOISE = 0.3  # The share of the training labels that is redrawn.
LABELS = {"clean labels": 0.0, "noisy labels": NOISE}
# By method: the flags of train.py.
METHODS: dict[str, dict[str, Any]] = {
    "AdamW alone": {"method": "none"},
    "mask": {"method": "cdb", "rate": 0.5, "channel_choice": "window"},
    "mask and skip": {
        "method": "cdb",
        "rate": 0.5,
        "channel_choice": "window",
        "skip_dropped": True,
    },
    "compact": {"method": "cdb_compact", "rate": 0.75, "hold": 20, "skip_dropped": True},
    "drop_backward": {"method": "drop_backward", "rate": 0.5},
    "drop_path_subset": {"method": "drop_path_subset", "rate": 0.4},
}
BASELINE = "AdamW alone"
EXPLANATION = """
mask              channel_drop_back: half of the channels learn in each step
mask and skip     and value_and_grad, which does not compute what is dropped
compact           a quarter of the channels learn, the same for 20 steps
drop_backward     half of the residual branches have no backward pass
drop_path_subset  residual branches run on 60 % of the batch"""
NOTES = """Accuracy is in %, all else relative to AdamW alone; ± is a 95 % interval. Of the noisy
labels, 30 % are redrawn at random. "mask" trains like "mask and skip", so both have the same
accuracy. All seeds drop the same channels. "memory" is that of parameters, gradient and optimizer
state, "temp. memory" that of temporaries; both are counted. The compile time is a single
measurement."""


class Pair(NamedTuple):
    """Two networks of a family: one to train, one to measure, and the flags of each."""

    trained: dict[str, Any]
    measured: dict[str, Any]


models.VITS["vit_demo"] = (384, 4, 6)
PAIRS = {
    "ResNet": Pair(
        {"model": "resnet_small", "learning_rate": 3e-3},
        {"model": "resnet18", "image_size": 32, "batch_size": 8},
    ),
    "ViT": Pair(
        {"model": "vit_mini/4", "learning_rate": 4e-3},
        {"model": "vit_demo/16", "image_size": 64, "batch_size": 32},
    ),
}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Compare methods that drop a part of the backward pass, on scikit-learn's digits."""

    seeds: int = 3
    """Runs of each method; the same seed means the same initial parameters and batches."""
    epochs: int = 7
    """Passes over the 1,297 training images."""
    rounds: int = 4
    """Turns of every method in the measurement of time."""
    run_dir: LocalPath = Path("runs/demo")
    """Where results go."""
    data_dir: LocalPath | None = None
    """Where the data set is kept; None: in the run folder."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("epochs", 1), ("rounds", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)} must be at least {least}.")

    def config(self, method: str, **flags: Any) -> Config:
        data_dir = self.data_dir or self.run_dir / "data"
        return Config(epochs=self.epochs, data_dir=data_dir, **METHODS[method], **flags)


def batches(
    job: train.Job, config: Config, seed: int, wrong: float
) -> Iterator[dict[str, jax.Array]]:
    """The batches of a run on the devices, the same for every method."""
    records = [job.dataset.train[i] for i in range(len(job.dataset.train))]
    images = np.stack([data.fit(x["image"], job.dataset.preprocessing) for x in records])
    labels = np.array([x["label"] for x in records], np.int32)
    rng = np.random.default_rng(seed)
    labels = data.redraw(labels, wrong, job.dataset.num_classes, rng)
    for _ in range(config.epochs):
        order = rng.permutation(len(labels))
        for step in range(job.epochs.batches):
            index = order[step * config.batch_size : (step + 1) * config.batch_size]
            yield training.distribute({"image": images[index], "label": labels[index]}, job.mesh)


def accuracy(demo: Demo, family: str, method: str) -> dict[str, list[float]]:
    """Test accuracy after training, of all seeds, by the labels that were trained on."""
    config = demo.config(method, **PAIRS[family].trained)
    job, initial = train.prepare(config)
    found: dict[str, list[float]] = {labels: [] for labels in LABELS}
    for labels, wrong in LABELS.items():
        for seed in range(demo.seeds):
            state = initial(seed)
            for step, batch in enumerate(batches(job, config, seed, wrong)):
                state, _ = job.train_step(state, batch, np.uint32(step))
            tested = training.evaluate(
                job.eval_step, state, job.dataset, EVALUATED, job.mesh, training.process_share()
            )
            found[labels].append(tested["test_accuracy"])
    return found


class Step(NamedTuple):
    """A compiled training step that can be run again and again."""

    run: Callable[[int], None]
    costs: dict[str, float]


def compiled(demo: Demo, family: str, method: str) -> Step:
    config = demo.config(method, **PAIRS[family].measured)
    job, initial = train.prepare(config)
    state = initial(0)
    batch = next(batches(job, config, 0, 0.0))
    start = time.perf_counter()
    program = job.train_step.lower(state, batch, np.uint32(0)).compile()
    seconds = time.perf_counter() - start
    parameters, moments = (_bytes(x) for x in (state.params, state.opt_state))
    # AdamW has two moments of the size of the gradient.
    memory = parameters + 1.5 * moments
    temporaries = program.memory_analysis().temp_size_in_bytes

    def run(step: int) -> None:
        nonlocal state
        state, metrics = program(state, batch, np.uint32(step))
        jax.block_until_ready(metrics)

    return Step(run, {"memory": memory, "temporaries": temporaries, "compilation": seconds})


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


def costs(demo: Demo, family: str) -> dict[str, dict[str, Any]]:
    """What a step costs, by method; seconds of all rounds."""
    jax.jit(lambda x: x + 1)(0.0)  # The first compilation of all takes longer.
    steps = {method: compiled(demo, family, method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for round_ in range(demo.rounds + 1):  # The first warms up.
        for method, step in steps.items():
            start = time.perf_counter()
            for i in range(2):
                step.run(2 * round_ + i)
            if round_:
                seconds[method].append((time.perf_counter() - start) / 2)
    return {method: steps[method].costs | {"seconds": seconds[method]} for method in METHODS}


def run_all(demo: Demo) -> dict[str, Any]:
    """All results, by family; those that are there already are not computed again."""
    out, file = display.console(), demo.run_dir / "results.json"
    settings = {"seeds": demo.seeds, "epochs": demo.epochs, "rounds": demo.rounds}
    results: dict[str, Any] = {"settings": settings}
    if file.exists():
        results = json.loads(file.read_text())
        if results.get("settings") != settings:
            raise UserError(f"{file} is of other settings; choose another --run-dir.")
    todo: list[tuple[str, str]] = [(family, "costs") for family in PAIRS]
    todo += [(family, method) for family in PAIRS for method in METHODS if method != "mask"]
    start, done = time.perf_counter(), 0.0
    weights = {what: 4.0 if what[1] == "costs" else 1.0 for what in todo}  # Of time, roughly.
    todo = [what for what in todo if what[1] not in results.get(what[0], {})]
    for number, (family, what) in enumerate(todo, 1):
        left = sum(weights[x] for x in todo) - done
        speed = (time.perf_counter() - start) / done if done else 18.0
        out.print(
            f"{number} of {len(todo)}: {family}, {what}; about {left * speed / 60:.0f} min left",
            soft_wrap=True,
        )
        found = costs(demo, family) if what == "costs" else accuracy(demo, family, what)
        results.setdefault(family, {})[what] = found
        file.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write(file, json.dumps(results, indent=1) + "\n")
        done += weights[family, what]
    for family in PAIRS:  # It trains alike, up to rounding; only its costs differ.
        results[family]["mask"] = results[family]["mask and skip"]
    return results


class Figure(NamedTuple):
    """A number for each method, with the half width of its 95 % interval; 0 without one."""

    heading: str  # Of a column, and of a panel, which has more room.
    title: str
    values: dict[str, tuple[float, float]]
    is_accuracy: bool = False

    def cell(self, method: str) -> str:
        value, half = self.values[method]
        digits = 1 if self.is_accuracy else 2
        interval = f" ± {half:.{digits}f}" if 0 < half < float("inf") else ""
        return f"{value:.{digits}f}{interval}"


def figures(found: dict[str, Any]) -> list[Figure]:
    """What the tables and the picture show of a family."""
    base = found["costs"][BASELINE]
    shown = []
    for labels in LABELS:
        values = {x: display.mean_interval(100 * np.array(found[x][labels])) for x in METHODS}
        shown.append(Figure(labels, f"test accuracy (%),\n{labels}", values, is_accuracy=True))
    ratios = {
        x: display.mean_interval(np.divide(found["costs"][x]["seconds"], base["seconds"]))
        for x in METHODS
    }
    shown.append(Figure("step time", "step time", ratios))
    for name, heading, title in (
        ("memory", "memory", "weights, gradient, state"),
        ("temporaries", "temp. memory", "temporaries"),
        ("compilation", "compile time", "compile time"),
    ):
        values = {x: (found["costs"][x][name] / base[name], 0.0) for x in METHODS}
        shown.append(Figure(heading, title, values))
    return shown


def show(family: str, found: dict[str, Any], demo: Demo) -> None:
    trained, measured = (x["model"].partition("/")[0] for x in PAIRS[family])
    title = f"{family}: accuracy of {trained}, {demo.seeds} seeds; costs of {measured}"
    columns = figures(found)
    lines = [[method, *(x.cell(method) for x in columns)] for method in METHODS]
    table = display.ResultsTable(title, ["", *(x.heading for x in columns)], lines)
    display.console().print(table, "")


def draw(results: dict[str, Any], file: Path) -> None:
    """A row of panels for each family: accuracy, time and memory by method."""
    figure, axes = pyplot.subplots(len(PAIRS), PANELS, figsize=(14, 2.8 * len(PAIRS)), sharey=True)
    places = np.arange(len(METHODS))
    for row, family in zip(axes, PAIRS, strict=True):
        for panel, shown in zip(row, figures(results[family])[:PANELS], strict=True):
            values, halves = np.array([shown.values[x] for x in METHODS]).T
            colors = ["0.5" if x == BASELINE else "C0" for x in METHODS]
            bars = np.where(np.isfinite(halves), halves, 0.0)
            if shown.is_accuracy:
                panel.errorbar(values, places, xerr=bars, fmt="none", ecolor="0.5", capsize=3)
                panel.scatter(values, places, c=colors, zorder=3)
            else:
                panel.barh(places, values, xerr=bars, color=colors)
                panel.axvline(1.0, color="black", linewidth=0.8)
            panel.set_xlabel(shown.title)
            panel.grid(axis="x", alpha=0.3)
        row[0].set_yticks(places, list(METHODS))
        row[0].set_ylabel(family)
    axes[0, 0].invert_yaxis()
    figure.suptitle(
        "Test accuracy of small networks (left); costs of larger ones, relative to AdamW alone"
    )
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    try:
        demo = tyro.cli(Demo)
        results = run_all(demo)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues.") from None
    for family in PAIRS:
        show(family, results[family], demo)
    picture = demo.run_dir / "comparison.png"
    draw(results, picture)
    display.console().print(f"{EXPLANATION}\n\n{NOTES}", soft_wrap=True)
    display.console().print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
