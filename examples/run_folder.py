"""The folder of a training run: its settings, its metrics, and checkpoints to go on from."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import processes
from epochs import Epochs
from errors import UserError, first_line

Row = dict[str, Any]
STEP_METRICS = ("train_loss", "train_accuracy", "dropped_fraction")
COLUMNS = ("epoch", "step", *STEP_METRICS, "test_loss", "test_accuracy", "images_per_second")


class Run:
    """A folder with the settings, metrics and checkpoints of one training run.

    Args:
      folder: made if it does not exist.
      settings: what the results depend on, as JSON values. A run resumes only with equal ones.
      defaults: what settings count as that the folder's run, of an earlier release, did not have.
      resume: whether to go on where the folder's run stopped, if it holds one.

    Raises:
      UserError: if the folder cannot be written, holds a run that is not to be resumed, or one
        with other settings.
    """

    def __init__(self, folder: Path, settings: Row, defaults: Row, *, resume: bool):
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
                _check_settings(folder, defaults | _read_settings(settings_file), settings)
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

    def restore(self, state: Any, epochs: Epochs) -> tuple[int, Any]:
        """The last checkpoint and its step, on the devices of `state`; without one, 0 and `state`.

        Metrics logged after that checkpoint are forgotten: the run will log them again.
        """
        last = self._checkpoints.latest_step()
        if last is not None:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            try:
                state = self._checkpoints.restore(last, args=ocp.args.StandardRestore(shapes))
            except Exception as error:  # Orbax raises whatever its storage layers raise.
                _leave_out_echoes()
                raise UserError(
                    f"the checkpoint of step {last} in {self.folder} cannot be read: "
                    f"{first_line(error)}. Remove checkpoints/{last} to resume from the one before."
                ) from error
        step = last or 0
        self.rows = [row for row in self.rows if row["step"] <= step]
        if [row["epoch"] for row in self.rows] != list(range(1, epochs.epoch_of(step) + 1)):
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
        well = error is None or isinstance(error, processes.StoppedError)
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
            if processes.is_lost(error):
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
    # As they were written: tuples are lists there.
    recorded, settings = (json.loads(json.dumps(x)) for x in (recorded, settings))
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


def _leave_out_echoes() -> None:
    """Does not report reads that Orbax gave up when one had failed.

    They end whenever Python collects them, up to the end of the program: hundreds of them.
    """
    hook = sys.unraisablehook

    def is_echo(e):
        return isinstance(e, RuntimeError) and "loop is closed" in str(e)

    sys.unraisablehook = lambda found: None if is_echo(found.exc_value) else hook(found)


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
