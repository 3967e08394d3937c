"""What is shown of training runs: progress, tables, curves."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from rich import box, progress, table, text
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from scipy import stats

from cdb_jax.report import ChannelReport
from run_folder import STEP_METRICS, Row

matplotlib.use("Agg")  # Draws to files; no display is needed.
from matplotlib import pyplot  # noqa: E402

pyplot.style.use(Path(__file__).with_name("figures.mplstyle"))

LOG_EVERY = 60.0  # Seconds between lines of progress where nobody watches.


def console() -> Console:
    """Where to print: one process speaks for all. What is printed is text, never markup."""
    if hasattr(sys.stdout, "reconfigure"):  # A stream may lack signs that a path has.
        sys.stdout.reconfigure(errors="backslashreplace")
    # A launcher may give its processes a terminal, and then collect what they print in a file.
    terminal = False if jax.process_count() > 1 else None
    quiet = jax.process_index() > 0
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False, force_terminal=terminal)


class _Bar(progress.Progress):
    """A bar below its description, which wraps where the terminal is narrow."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield text.Text(f"{task.description}  {task.fields['now']}")
        yield self.make_tasks_table(self.tasks)


class EpochProgress:
    """A bar for the steps of one epoch, which disappears when the epoch is over.

    Where nobody watches, a line each minute.
    """

    def __init__(self, out: Console, title: str, steps: int):
        self._out, self._title, self._steps = out, title, steps
        self._bar = _Bar(
            progress.BarColumn(bar_width=max(4, min(40, out.width - 30))),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=out,
            transient=True,
            disable=not out.is_terminal or out.quiet,
        )
        self._task = self._bar.add_task(title, total=steps, now="")
        self._shown = time.perf_counter()
        self._images = 0

    def __enter__(self) -> EpochProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, images: int, metrics: Mapping[str, jax.Array]) -> None:
        """Shows the metrics of a step, a few times a second: reading them waits for the device."""
        passed = time.perf_counter() - self._shown
        if self._out.quiet or passed < (LOG_EVERY if self._bar.disable else 0.3):
            return
        loss, accuracy, dropped = (float(metrics[name]) for name in STEP_METRICS)
        speed = (images - self._images) / passed
        now = f"loss {loss:.3f}  accuracy {100 * accuracy:.1f} %  {speed:,.0f} images/s  "
        now += f"dropped {100 * dropped:.0f} %"
        if self._bar.disable:
            self._out.print(f"{self._title}, step {step}/{self._steps}  {now}", soft_wrap=True)
        else:
            self._bar.update(self._task, completed=step, now=now)
        self._shown, self._images = time.perf_counter(), images


def summary(row: Row, epochs: int) -> str:
    """One line for an epoch."""
    held = f"  held period {row['held_period']}" if "held_period" in row else ""
    x = {name: number(value) for name, value in row.items()}
    return (
        f"epoch {row['epoch']}/{epochs}  loss {x['train_loss']:.4f}  "
        f"accuracy {100 * x['train_accuracy']:.2f} %  test loss {x['test_loss']:.4f}  "
        f"test accuracy {100 * x['test_accuracy']:.2f} %  "
        f"{x['images_per_second']:,.0f} images/s  "
        f"dropped {100 * x['dropped_fraction']:.1f} %{held}"
    )


def number(value: float | None) -> float:
    """A metric; NaN for what was not finite."""
    return float("nan") if value is None else value


def show_results(folder: Path, title: str, rows: Sequence[Row]) -> None:
    """Prints the final table and draws the curves of one run."""
    if jax.process_index() > 0 or not rows:
        return
    rows = [{name: number(value) for name, value in row.items()} for row in rows]
    last, best = rows[-1], max(rows, key=lambda row: row["test_accuracy"])
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    formats = ("{:.4f}", "{:.4f}", "{:.2%}", "{:.2%}")
    lines = [
        (
            label,
            f"{row['epoch']:.0f}",
            *(f.format(row[n]) for n, f in zip(names, formats, strict=True)),
        )
        for label, row in (("last", last), ("best", best))
    ]
    columns = ("", "epoch", *(name.replace("_", " ") for name in names))
    console().print(ResultsTable(title, columns, lines))
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


def show_report(out: Console, report: ChannelReport) -> None:
    """Prints what a method can drop; in a list if the terminal is too narrow for the table.

    The list has the leaves that can be dropped, and only counts the others.
    """
    lines = str(report).splitlines()
    if not out.is_terminal or len(lines[1]) <= out.width:  # The rule below the headings.
        out.print(*lines, sep="\n", soft_wrap=True)
        return
    header, *cells = report.cells
    for row, (path, *entries) in zip(report.rows, cells, strict=True):
        if row.channels is None:
            continue
        named = zip(header[1:], entries, strict=True)
        fields = (f"{name} {entry}" for name, entry in named if entry not in ("", "-"))
        out.print(path, f"  {'  '.join(fields)}", sep="\n")
    others = sum(row.channels is None for row in report.rows)
    noun = "leaf always learns" if others == 1 else "leaves always learn"
    out.print(f"{others} other {noun} in full.")
    out.print(report.summary, str(report.savings), sep="\n")


class ResultsTable:
    """A table to print: the first column holds names, the others numbers.

    On a terminal that is too narrow, each line becomes a list, so that no number is cut.
    """

    def __init__(self, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]):
        self._title, self._columns, self._lines = title, columns, lines

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        for separator in (" ", "\n"):
            result = self._as_table(separator)
            width = Measurement.get(console, options.update_width(1000), result).maximum
            if width <= options.max_width:
                yield result
                return
        yield text.Text("\n".join((self._title, *self._as_lists())))

    def _as_table(self, separator: str) -> table.Table:
        """A table whose headings have this separator between their words."""
        look = dict(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        result = table.Table(title=self._title, title_justify="left", **look)
        for i, column in enumerate(self._columns):
            heading = column.replace(" ", separator)
            result.add_column(heading, justify="right" if i else "left", no_wrap=True)
        for line in self._lines:
            result.add_row(*line)
        return result

    def _as_lists(self) -> Iterator[str]:
        width = max(map(len, self._columns))
        for name, *entries in self._lines:
            yield name
            for column, entry in zip(self._columns[1:], entries, strict=True):
                yield f"  {column:{width}}  {entry}".rstrip()


def plot_curves(histories: Mapping[str, Sequence[Sequence[Row]]], file: Path, title: str) -> None:
    """Draws training loss and test accuracy over epochs.

    Args:
      histories: for each label the metrics of one or more runs: their mean is drawn, and their
        range as a band.
      file: the PNG to write.
      title: of the picture.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    panels = (
        (axes[0], "train_loss", 1.0, "training loss"),
        (axes[1], "test_accuracy", 100.0, "test accuracy (%)"),
    )
    for panel, name, factor, label in panels:
        for method, runs in histories.items():
            epochs = [row["epoch"] for row in runs[0]]
            values = factor * np.array([[number(row[name]) for row in rows] for rows in runs])
            (line,) = panel.plot(epochs, values.mean(axis=0), label=method)
            low, high = values.min(axis=0), values.max(axis=0)
            panel.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    losses = [number(row["train_loss"]) for runs in histories.values() for x in runs for row in x]
    if any(np.isfinite(x) and x > 0 for x in losses):
        axes[0].set_yscale("log")
    if len(histories) > 1:  # Otherwise the title says it.
        axes[1].legend()
    figure.suptitle(title, wrap=True)
    with file.open("wb") as opened:  # Also in a bucket.
        figure.savefig(opened, format="png")
    pyplot.close(figure)
