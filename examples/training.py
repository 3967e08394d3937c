"""What surrounds a training loop: the mesh, evaluation, progress, results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich import progress, table
from rich.console import Console
from scipy import stats

from data import DataSet, UserError, test_batches
from run_folder import STEP_METRICS, Row

matplotlib.use("Agg")  # Draws to files; no display is needed.
from matplotlib import pyplot  # noqa: E402

SMALLEST_SHARDED = 1024  # Entries; below, sending the shards takes longer than it saves.


def console() -> Console:
    """Where to print: one process speaks for all."""
    return Console(quiet=jax.process_index() > 0, highlight=False)


def make_mesh(axes: str, batch_size: int) -> jax.sharding.Mesh:
    """All devices of all processes, in the axes that `--mesh` names.

    Args:
      axes: such as "data=4,fsdp=2"; empty for all devices in one axis, "data". Batches are split
        over both axes, parameters and optimizer state over "fsdp".
      batch_size: examples in a batch.

    Raises:
      UserError: if the axes do not hold all devices, or the batch cannot be divided among these.
    """
    devices = jax.device_count()
    try:
        pairs = [axis.split("=") for axis in axes.split(",")] if axes else [("data", devices)]
        sizes = {name: int(size) for name, size in pairs}
        known = len(sizes) == len(pairs) and sizes.keys() <= {"data", "fsdp"}
    except ValueError:
        known = False
    if not known or min(sizes.values()) < 1:
        raise UserError(f"--mesh {axes} must name the axes data and fsdp, as in data=4,fsdp=2.")
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"--mesh {axes} has room for {math.prod(sizes.values())} devices, and there are "
            f"{devices}; the product of the axes must be that."
        )
    if batch_size % devices:
        raise UserError(
            f"--batch-size {batch_size} cannot be divided among {devices} devices; use a multiple."
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """How arrays lie on a mesh: in shards along "fsdp" if they are large, else whole everywhere.

    An array is split along its largest axis that can be; the last, which holds the channels of most
    weights, only if there is no other, so that a run of channels lies on one device.
    """
    shards = mesh.shape.get("fsdp", 1)

    def sharding(x: Any) -> NamedSharding:
        spec = [None] * x.ndim
        able = [axis for axis, size in enumerate(x.shape) if size % shards == 0]
        if shards > 1 and able and x.size >= SMALLEST_SHARDED:
            best = max(able, key=lambda axis: (axis < x.ndim - 1, x.shape[axis]))
            spec[best] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)


def streams(seed: jax.Array, *names: str) -> dict[str, jax.Array]:
    """A key of its own for each name."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(names))
    return dict(zip(names, keys, strict=True))


def on_mesh(mesh: jax.sharding.Mesh, f: Callable[..., Any], *args: Any) -> Any:
    """The result of `f(*args)`, computed and kept where `shardings` says."""
    return jax.jit(f, out_shardings=shardings(mesh, jax.eval_shape(f, *args)))(*args)


def distribute(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Joins the shares of all processes into arrays split along their first axis."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return {
        name: jax.make_array_from_process_local_data(sharding, share)
        for name, share in batch.items()
    }


def evaluate(
    eval_step: Callable,
    state: Any,
    dataset: DataSet,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    share: dict[str, int],
) -> dict[str, float]:
    """Mean loss and accuracy over the test images, each counted once."""
    batches = test_batches(dataset, batch_size, **share)
    parts = [eval_step(state, distribute(batch, mesh)) for batch in batches]
    loss, correct, weight = np.sum(jax.device_get(parts), axis=0).tolist()
    return {"test_loss": loss / weight, "test_accuracy": correct / weight}


class EpochProgress:
    """A bar for the steps of one epoch, which disappears when the epoch is over."""

    def __init__(self, out: Console, title: str, steps: int):
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[now]}"),
            console=out,
            transient=True,
            disable=not out.is_terminal or out.quiet,
        )
        self._task = self._bar.add_task(title, total=steps, now="")
        self._shown = time.perf_counter()
        self._step = 0

    def __enter__(self) -> EpochProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, batch_size: int, metrics: Mapping[str, jax.Array]) -> None:
        """Shows the metrics of a step, a few times a second: reading them waits for the device."""
        passed = time.perf_counter() - self._shown
        if self._bar.disable or passed < 0.3:
            return
        loss, accuracy, dropped = (float(metrics[name]) for name in STEP_METRICS)
        speed = (step - self._step) * batch_size / passed
        self._bar.update(
            self._task,
            completed=step,
            now=f"loss {loss:.3f}  accuracy {100 * accuracy:.1f} %  {speed:,.0f} images/s  "
            f"dropped {100 * dropped:.0f} %",
        )
        self._shown, self._step = time.perf_counter(), step


def summary(row: Row, epochs: int) -> str:
    """One line for an epoch."""
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  "
        f"accuracy {100 * row['train_accuracy']:.2f} %  held-out loss {row['test_loss']:.4f}  "
        f"held-out accuracy {100 * row['test_accuracy']:.2f} %  "
        f"{row['images_per_second']:,.0f} images/s  dropped {100 * row['dropped_fraction']:.1f} %"
    )


def show_results(folder: Path, title: str, rows: Sequence[Row]) -> None:
    """Prints the final table and draws the curves of one run."""
    if jax.process_index() > 0 or not rows:
        return
    last, best = rows[-1], max(rows, key=lambda row: row["test_accuracy"])
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    formats = ("{:.4f}", "{:.4f}", "{:.2%}", "{:.2%}")
    lines = [
        (label, str(row["epoch"]), *(f.format(row[n]) for n, f in zip(names, formats, strict=True)))
        for label, row in (("last", last), ("best", best))
    ]
    columns = ("", "epoch", *(name.replace("_", " ") for name in names))
    console().print(results_table(title, columns, lines))
    plot_curves({title: [rows]}, folder / "curves.png", title)
    console().print(f"metrics, curves and checkpoints are in {folder}", soft_wrap=True)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The mean and the half width of its 95 % t interval; infinite for a single value."""
    if len(values) < 2:
        return float(values.mean()), float("inf")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def percent(values: np.ndarray, sign: str = "") -> str:
    """The mean and its interval as text, in percent or percentage points."""
    mean, half = mean_interval(100 * values)
    return f"{mean:{sign}.2f}" + (f" ± {half:.2f}" if len(values) > 1 else "")


def results_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    """A table to print: the first column holds names, the others numbers."""
    result = table.Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for line in lines:
        result.add_row(*line)
    return result


def plot_curves(histories: Mapping[str, Sequence[Sequence[Row]]], file: Path, title: str) -> None:
    """Draws training loss and held-out accuracy over epochs.

    Args:
      histories: for each label the metrics of one or more runs: their mean is drawn, and their
        range as a band.
      file: the PNG to write.
      title: of the picture.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (
        (axes[0], "train_loss", 1.0, "training loss"),
        (axes[1], "test_accuracy", 100.0, "held-out accuracy (%)"),
    )
    for panel, name, factor, label in panels:
        for method, runs in histories.items():
            epochs = [row["epoch"] for row in runs[0]]
            values = factor * np.array([[row[name] for row in rows] for rows in runs])
            (line,) = panel.plot(epochs, values.mean(axis=0), label=method)
            low, high = values.min(axis=0), values.max(axis=0)
            panel.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
