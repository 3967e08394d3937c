"""What surrounds a training loop: processes and mesh, checkpoints, signals, progress, results."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
import jax
import matplotlib
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from rich import progress, table
from rich.console import Console
from scipy import stats

from data import DataSet, UserError, first_line, test_batches

matplotlib.use("Agg")  # Draws to files; no display is needed.
from matplotlib import pyplot  # noqa: E402

Row = dict[str, Any]
SMALLEST_SHARDED = 1024  # Entries; below, sending the shards takes longer than it saves.
START = 300  # Seconds that processes wait for process 0 to start.
PATIENCE = 60  # Seconds until a process that gives no sign of life is taken for dead.
LOST = os.EX_TEMPFAIL  # Exit code of a process that could not go on without another.
STEP_METRICS = ("train_loss", "train_accuracy", "dropped_fraction")
COLUMNS = ("epoch", "step", *STEP_METRICS, "test_loss", "test_accuracy", "images_per_second")


def start_processes(coordinator: str | None, process_count: int | None, process_id: int | None):
    """Joins the other processes. On TPU pods and under Slurm JAX finds the arguments by itself."""
    flags = {
        "--coordinator": coordinator,
        "--process-count": process_count,
        "--process-id": process_id,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    if missing and len(missing) < len(flags):
        raise UserError(
            f"{' and '.join(missing)} must be given too; or none, where JAX finds them."
        )
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator {coordinator} must be HOST:PORT, as in 10.0.0.1:1234.")
        if process_count < 1:
            raise UserError(f"--process-count {process_count} must be positive.")
        if not 0 <= process_id < process_count:
            raise UserError(
                f"--process-id {process_id} must be at least 0 and less than --process-count "
                f"{process_count}."
            )
        if process_id > 0:
            _wait_for(host, int(port))
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            heartbeat_timeout_seconds=PATIENCE,
            shutdown_timeout_seconds=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"jax.distributed did not start: {first_line(error)}. Where JAX does not find the "
            "others by itself, give --coordinator, --process-count and --process-id."
        ) from error


def _wait_for(host: str, port: int) -> None:
    """Until process 0 listens. JAX itself would abort this process if it never does."""
    deadline = time.monotonic() + START
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator {host}:{port} does not answer ({first_line(error)}); is "
                    "process 0 running, and may this host reach it?"
                ) from error
        time.sleep(0.2)


def leave(error: Exception) -> NoReturn:
    """Ends the program with a line about an error.

    One process of several ends at once: a farewell would wait for others that may be gone, or that
    wait for this one.
    """
    mistake = isinstance(error, UserError)
    if not jax.distributed.is_initialized():
        if mistake:
            raise SystemExit(f"error: {error}") from None
        raise error
    lost = _is_lost(error)
    if mistake:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        if not lost:
            traceback.print_exception(error)
        cause = first_line(error).rpartition("Error dispatching computation: ")[-1]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on: {cause}. "
            "If another one has stopped, start all of them again with --resume.",
            file=sys.stderr,
            flush=True,
        )
    if jax.process_index() == 0:
        time.sleep(2.0)  # The others end with it, and may have something to say.
    os._exit(LOST if lost else 1)


def _is_lost(error: Exception) -> bool:
    """Whether an error comes from talking to another process."""
    words = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "heartbeat", "barrier")
    return jax.process_count() > 1 and any(word in str(error) for word in words)


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


class Run:
    """A folder with the settings, metrics and checkpoints of one training run.

    Args:
      folder: made if it does not exist.
      settings: what the results depend on, as JSON values. A run resumes only with equal ones.
      resume: whether to go on where the folder's run stopped, if it holds one.

    Raises:
      UserError: if the folder cannot be written, holds a run that is not to be resumed, or one
        with other settings.
    """

    def __init__(self, folder: Path, settings: Row, *, resume: bool):
        # Orbax logs at length what it raises as well, and so do the loops that it runs in.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.folder = folder.absolute()
        settings_file = self.folder / "settings.json"
        self._metrics_file = self.folder / "metrics.jsonl"
        self.speaks = jax.process_index() == 0
        try:
            exists = settings_file.exists()
            if exists and not resume:
                raise UserError(f"{folder} holds a run; go on with --resume, or choose --run-dir.")
            if exists:
                _check_settings(folder, _read_settings(settings_file), settings)
            self.rows = _read_rows(self._metrics_file)
            checkpoints = self.folder / "checkpoints"
            checkpoints.mkdir(parents=True, exist_ok=True)
            self._checkpoints = ocp.CheckpointManager(
                checkpoints,
                options=ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True),
            )
            if jax.process_count() > 1:  # No process may take this run's file for an older one's.
                multihost_utils.sync_global_devices("run folder")
            if not exists and self._checkpoints.latest_step() is not None:
                raise UserError(
                    f"{folder} holds checkpoints of an unknown run, as its settings.json is "
                    "missing; choose another --run-dir."
                )
            if self.speaks and not exists:
                _write(settings_file, json.dumps(settings, indent=2) + "\n")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--run-dir {folder} cannot be used: {first_line(error)}. Choose another."
            ) from error

    def restore(self, state: Any, epoch_steps: int) -> tuple[int, Any]:
        """The last checkpoint and its step, on the devices of `state`; without one, 0 and `state`.

        Metrics logged after that checkpoint are forgotten: the run will log them again.
        """
        last = self._checkpoints.latest_step()
        if last is not None:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            hook = sys.unraisablehook
            sys.unraisablehook = lambda x: None if _is_echo(x.exc_value) else hook(x)
            try:
                state = self._checkpoints.restore(last, args=ocp.args.StandardRestore(shapes))
            except Exception as error:  # Orbax raises whatever its storage layers raise.
                raise UserError(
                    f"the checkpoint of step {last} in {self.folder} cannot be read: "
                    f"{first_line(error)}. Remove checkpoints/{last} to resume from the one before."
                ) from error
            sys.unraisablehook = hook
        step = last or 0
        self.rows = [row for row in self.rows if row["step"] <= step]
        if [row["epoch"] for row in self.rows] != list(range(1, step // epoch_steps + 1)):
            raise UserError(
                f"--run-dir {self.folder} cannot be used: metrics.jsonl lacks epochs before step "
                f"{step}. Choose another."
            )
        return step, state

    def save(self, step: int, state: Any) -> None:
        """Starts writing a checkpoint; the two newest are kept."""
        if self._checkpoints.latest_step() == step:
            return
        with self._writing(f"the checkpoint of step {step}"):
            # Half a checkpoint would be of no use, and is harder to report.
            needed = sum(x.nbytes for x in jax.tree.leaves(state))
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    f"it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free."
                )
            self._checkpoints.save(step, args=ocp.args.StandardSave(state))

    def log(self, row: Row) -> None:
        """Adds a line to `metrics.jsonl`."""
        self.rows.append(row)
        if self.speaks:
            with self._writing(self._metrics_file.name):
                _write(self._metrics_file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Waits until everything is written, unless that means waiting for a lost process."""
        well = error is None or isinstance(error, StoppedError)
        if jax.process_count() > 1 and not well:
            return
        try:
            with self._writing("the last checkpoint"):
                self._checkpoints.wait_until_finished()
        except UserError:
            if well:  # Otherwise what went wrong first is told.
                raise
        finally:
            with contextlib.suppress(Exception):  # The same once more.
                self._checkpoints.close()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            if _is_lost(error):
                raise
            complete = max(self._checkpoints.all_steps(read=True), default=0)
            raise UserError(
                f"{what} could not be written to {self.folder}: {first_line(error)}. When that is "
                f"mended, --resume goes on from step {complete}."
            ) from error


def _read_settings(file: Path) -> Row:
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} is damaged: it holds no settings")
    return settings


def _check_settings(folder: Path, recorded: Row, settings: Row) -> None:
    settings = json.loads(json.dumps(settings))  # As they were written: tuples are lists there.
    differing = [
        f"--{name.replace('_', '-')} {recorded.get(name)} (now {settings.get(name)})"
        for name in sorted(recorded.keys() | settings.keys())
        if recorded.get(name) != settings.get(name)
    ]
    if differing:
        raise UserError(
            f"{folder} holds a run with {', '.join(differing)}; resume with the same settings, or "
            "choose another --run-dir."
        )


def _is_echo(error: BaseException | None) -> bool:
    """Whether an error is of a read that Orbax gave up when another one had failed."""
    return isinstance(error, RuntimeError) and "loop is closed" in str(error)


def _read_rows(file: Path) -> list[Row]:
    try:
        rows = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
        if all(isinstance(row[name], (int, float)) for row in rows for name in COLUMNS):
            return rows
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file.name} is damaged: {error!r}") from error
    raise ValueError(f"{file.name} is damaged: not all metrics are numbers")


def _write(file: Path, text: str) -> None:
    """Replaces a file at once, so that no reader and no crash ever sees half of it."""
    part = file.with_suffix(file.suffix + ".part")
    part.write_text(text)
    part.replace(file)


class StoppedError(Exception):
    """The run was asked to stop, and everything is saved."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped and saved at step {step}")
        self.signal = number


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second acts as usual.

    With several processes all of them must leave the loop at the same step, so they compare notes
    every `AGREE_EVERY` steps.
    """

    AGREE_EVERY = 20

    def __enter__(self) -> StopRequest:
        self.signal = 0
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, self._previous[signal.Signals(number)])

    def at(self, step: int) -> bool:
        """Whether to stop before this step."""
        if jax.process_count() > 1 and step % self.AGREE_EVERY == 0:
            agreed = int(multihost_utils.process_allgather(np.array(self.signal)).max())
            # One that arrives meanwhile is for the next time.
            self.signal = agreed or self.signal
            return agreed > 0
        return jax.process_count() == 1 and self.signal > 0


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
