"""The folder of a training run: its settings, its metrics, and checkpoints to go on from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import locations
import processes
from epochs import Epochs
from errors import PassingError, UserError, first_line, meaning

Row = dict[str, Any]
STEP_METRICS = ("train_loss", "train_accuracy", "dropped_fraction")
MEASURED = (*STEP_METRICS, "test_loss", "test_accuracy", "images_per_second")
# What `flock` fails with on a file system without locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
# What comes of a folder that cannot be used; without the packages for buckets, an ImportError.
UNREACHABLE = (OSError, ValueError, ImportError)
PATIENCE = 10  # Seconds until hosts see what another has written to a network file system.
# Settings that are not flags; a run of an earlier release does not say them.
COUNTS = ("training_images", "classes")
UNREADABLE = "[]\\"  # Orbax saves to paths with these, and cannot read what it has saved.


class Run:
    """A folder with the settings, metrics and checkpoints of one training run.

    No other run can use it until this one has ended. All processes of a run share it.

    Args:
      folder: made if it does not exist.
      settings: what the results depend on, as JSON values. A run resumes only with equal ones.
      defaults: what settings count as that the folder's run, of an earlier release, did not have.
      resume: whether to go on where the folder's run stopped, if it holds one.
      keep: how many checkpoints to keep.

    Raises:
      UserError: if the folder cannot be written, is in use, holds a run that is not to be resumed,
        or one with other settings.
    """

    def __init__(self, folder: Path, settings: Row, defaults: Row, *, resume: bool, keep: int = 2):
        # Orbax logs at length what it raises as well, and so do the loops that it runs in.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.folder = folder if locations.is_bucket(folder) else folder.absolute()
        settings_file = self.folder / "settings.json"
        self._metrics_file = self.folder / "metrics.jsonl"
        self.speaks = jax.process_index() == 0
        self._is_read_back = False
        self._kept = _Kept(keep)
        if bad := [x for x in UNREADABLE if x in str(self.folder)]:
            raise UserError(
                f"--run-dir {folder}: checkpoints below a path with {bad[0]} could be saved, but "
                "not be read; choose another."
            )
        self._lock = _claim(folder)
        try:
            exists = settings_file.exists()
            if exists and not resume:
                raise UserError(f"{folder} holds a run; go on with --resume, or choose --run-dir.")
            if exists:
                _check_settings(folder, defaults | _read_settings(settings_file), settings)
            self.rows = _read_rows(self._metrics_file)
            checkpoints = self.folder / "checkpoints"
            checkpoints.mkdir(parents=True, exist_ok=True)
            self._checkpoints = _Checkpoints(
                checkpoints,
                item_handlers=ocp.StandardCheckpointHandler(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._kept, cleanup_tmp_directories=True
                ),
            )
            self._kept.finite = set(self._checkpoints.all_steps())
            if jax.process_count() > 1:  # No process may take this run's file for an older one's.
                multihost_utils.sync_global_devices("run folder")
            if not exists and self._checkpoints.latest_step() is not None:
                raise UserError(
                    f"{folder} holds checkpoints of an unknown run, as its settings.json is "
                    "missing; choose another --run-dir."
                )
            if self.speaks and not exists:
                write(settings_file, json.dumps(settings, indent=2) + "\n")
        except BaseException as error:
            self._release()
            if isinstance(error, UNREACHABLE):
                raise _unusable(folder, error) from error
            raise

    def restore(self, state: Any, epochs: Epochs) -> tuple[int, Any]:
        """The last checkpoint and its step, on the devices of `state`; without one, 0 and `state`.

        Metrics logged after that checkpoint are forgotten: the run will log them again. Those of
        its own epoch are missing if the run was stopped while it evaluated; then the sums in the
        state are those of this epoch.
        """
        last = self._checkpoints.latest_step()
        if last is not None:
            state = self._read_last(last, state)
        step = last or 0
        self.rows = [row for row in self.rows if row["step"] <= step]
        complete, logged = epochs.epoch_of(step), len(self.rows)
        at_end = step > 0 and step == epochs.start(complete)
        is_pending = logged == complete - 1 and at_end and float(state.sums["train_loss"]) != 0.0
        if at_end and not is_pending:  # The sums were those of an epoch that is now logged.
            state = state._replace(sums=_zeros(state.sums))
        wanted = complete - 1 if is_pending else complete
        if [row["epoch"] for row in self.rows] != list(range(1, wanted + 1)):
            raise UserError(
                f"--run-dir {self.folder} cannot be used: metrics.jsonl lacks epochs before step "
                f"{step}. Choose another."
            )
        return step, state

    def _read_last(self, step: int, state: Any) -> Any:
        checkpoint = f"the checkpoint of step {step} in {self.folder}"
        saved, wanted = self._saved_shapes(step), _shapes(state)
        # Reading would fail as well, but go on in the background when the first array has failed.
        shared = [x for x in saved.keys() & wanted.keys() if x.startswith("params/")]
        if any(saved[name] != wanted[name] for name in shared):
            raise _other_network(checkpoint, saved, wanted)
        try:
            return self._read(step, state)
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            _leave_out_echoes()
            if _has_other_cause(error):
                raise
            if _first_difference(saved, wanted):
                raise _other_network(checkpoint, saved, wanted) from error
            raise UserError(
                f"{checkpoint} cannot be read: {first_line(error)}. Move checkpoints/{step} to "
                "another folder to resume from the one before."
            ) from error

    def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all arrays of a checkpoint, by name; none if its metadata is damaged."""
        try:
            return _shapes(self._checkpoints.item_metadata(step).tree)
        except Exception:  # Orbax raises whatever its storage layers raise.
            return {}

    def _read(self, step: int, state: Any) -> Any:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._checkpoints.restore(step, args=ocp.args.StandardRestore(shapes))

    def save(self, step: int, state: Any, *, is_finite: bool = True) -> None:
        """Starts writing a checkpoint; the newest are kept, and the newest that is finite.

        The first one is read back, so that nobody trains for days on what cannot be resumed.
        """
        if self._checkpoints.latest_step() == step:
            return
        if is_finite:
            self._kept.finite = {step}
        with self._writing(f"the checkpoint of step {step}"):
            # Half a checkpoint would be of no use, and is harder to report.
            needed = sum(x.nbytes for x in jax.tree.leaves(state))
            bucket = locations.is_bucket(self.folder)
            free = math.inf if bucket else shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    f"it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free."
                )
            self._checkpoints.save(step, args=ocp.args.StandardSave(state))
            if not self._is_read_back:
                self._checkpoints.wait_until_finished()
        if not self._is_read_back:
            self._read_back(step, state)

    def _read_back(self, step: int, state: Any) -> None:
        try:
            self._read(step, state)
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            _leave_out_echoes()
            if _has_other_cause(error):
                raise
            raise UserError(
                f"the checkpoint of step {step} was saved to {self.folder}, but cannot be read "
                f"back: {first_line(error)}; choose another --run-dir."
            ) from error
        self._is_read_back = True

    def check(self) -> None:
        """Raises a UserError if the folder is gone, or if a checkpoint could not be written."""
        with self._writing("checkpoints"):
            self._checkpoints.check_for_errors()
            if not locations.is_bucket(self.folder):
                (self.folder / "checkpoints").stat()

    def log(self, row: Row) -> None:
        """Adds a line to `metrics.jsonl`, with null for what is not finite."""
        finite = {name: x if math.isfinite(x) else None for name, x in row.items()}
        self.rows.append(finite)
        if self.speaks:
            with self._writing(self._metrics_file.name):
                write(self._metrics_file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Waits until everything is written, unless that means waiting for a lost process."""
        well = error is None or isinstance(error, processes.StoppedError)
        if jax.process_count() > 1 and not well:
            return  # The lock goes with the process.
        try:
            with self._writing("the last checkpoint"):
                self._checkpoints.wait_until_finished()
        except UserError:
            if well:  # Otherwise what went wrong first is reported.
                raise
        finally:
            with contextlib.suppress(Exception):  # The same once more.
                self._checkpoints.close()
            self._release()

    def _release(self) -> None:
        if self._lock:
            self._lock.close()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            if processes.is_lost(error):
                raise
            raise UserError(
                f"{what} could not be written to {self.folder}: {first_line(error)}. When that is "
                f"mended, {self.way_on()}"
            ) from error

    def way_on(self) -> str:
        """Where a run goes on that has failed, for an error."""
        try:
            complete = max(self._checkpoints.all_steps(read=True), default=0)
        except Exception:  # The folder may be gone.
            complete = 0
        return f"--resume goes on from step {complete}." if complete else "start again."


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints are not deleted: the newest, and those that must not go yet.

    Attributes:
      finite: the step of the newest finite one; all that were there until this process saves one.
    """

    def __init__(self, count: int):
        self._count = count
        self.finite: set[int] = set()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = len(checkpoints) - self._count
        return [i >= newest or x.step in self.finite for i, x in enumerate(checkpoints)]


class _Checkpoints(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: JAX's service goes by one count, and that is the one of `StopRequest`."""
        return False


@jax.jit
def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _unusable(folder: Path, error: Exception) -> UserError:
    return UserError(f"--run-dir {folder} cannot be used: {first_line(error)}. Choose another.")


def check_free(folder: Path) -> None:
    """Raises a UserError at once if a folder cannot be reached, or if another run uses it.

    Does not make the folder. `Run` checks it again, but only after everything that takes time.
    """
    if locations.is_bucket(folder):
        try:
            folder.exists()
        except UNREACHABLE as error:
            raise _unusable(folder, error) from error
        return
    owner = None
    if jax.process_index() == 0:
        with contextlib.suppress(OSError), open(folder / ".lock", "r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(lock)
    refused = owner is not None
    if jax.process_count() > 1:
        refused = bool(multihost_utils.broadcast_one_to_all(np.int32(refused)))
    if refused:
        raise _in_use(folder, owner) if owner else _refused_elsewhere(folder, PassingError)


def _owner(lock: IO[str]) -> str:
    """Who holds a lock."""
    lock.seek(0)
    return lock.read().partition("\n")[0] or "another process"


def _in_use(folder: Path, owner: str) -> UserError:
    return PassingError(
        f"{folder} is in use by {owner}; wait until that run has ended, or choose another "
        "--run-dir."
    )


def _refused_elsewhere(folder: Path, kind: type[UserError]) -> UserError:
    return kind(f"--run-dir {folder} cannot be used by process 0, which says why.")


def _claim(folder: Path) -> IO[str] | None:
    """Locks a folder for this run, and makes sure that all processes of the run see the same one.

    Process 0 holds the lock, which the operating system releases if it dies, and writes a token
    into it that the others read. A bucket cannot be locked, nor can some file systems.
    """
    if locations.is_bucket(folder):
        return None
    lock, failed, token = None, None, 0
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock, token = _lock(folder)
        except UserError as error:
            failed = error
        except OSError as error:
            failed = _unusable(folder, error)
    if jax.process_count() > 1:
        mine = np.array([token, isinstance(failed, PassingError)], np.int32)
        token, passes = multihost_utils.broadcast_one_to_all(mine).tolist()
        if not token and not failed:
            failed = _refused_elsewhere(folder, PassingError if passes else UserError)
        if token:
            sees = multihost_utils.process_allgather(np.array(_sees(folder, token)))
            if not sees.all():
                failed = UserError(
                    f"--run-dir {folder} is not the same folder for process 0 and process "
                    f"{int(np.argmin(sees))}; choose one on a file system that all hosts share."
                )
    if failed:
        if lock:
            lock.close()
        raise failed
    return lock


def _lock(folder: Path) -> tuple[IO[str], int]:
    lock = open(folder / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(lock)
        lock.close()
        raise _in_use(folder, owner) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            lock.close()
            raise
        print(
            f"warning: {folder} cannot be locked ({first_line(error)}); make sure that no other "
            "run uses it.",
            file=sys.stderr,
            flush=True,
        )
    token = 1 + secrets.randbelow(2**31 - 1)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{token}\n")
    lock.flush()
    os.fsync(lock.fileno())  # Until then other hosts read an empty file over NFS.
    return lock, token


def _sees(folder: Path, token: int) -> bool:
    """Whether a folder is that of process 0, whose token may take a while to reach this host."""
    deadline = time.monotonic() + PATIENCE
    while _token(folder) != token:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _token(folder: Path) -> int:
    try:
        return int((folder / ".lock").read_text().split("\n")[1])
    except (OSError, ValueError, IndexError):
        return 0


def _read_settings(file: Path) -> Row:
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} is damaged: it holds no settings")
    return settings


def _check_settings(folder: Path, recorded: Row, settings: Row) -> None:
    recorded = {name: settings[name] for name in COUNTS if name in settings} | recorded
    # As they were written: tuples are lists there.
    recorded, settings = (json.loads(json.dumps(x)) for x in (recorded, settings))
    differing = [
        f"{_setting(name, recorded.get(name))} (now {settings.get(name)})"
        for name in sorted(recorded.keys() | settings.keys())
        if recorded.get(name) != settings.get(name)
    ]
    if differing:
        raise UserError(
            f"{folder} holds a run with {', '.join(differing)}; resume with the same settings, or "
            "choose another --run-dir."
        )


def _setting(name: str, value: Any) -> str:
    """A setting as a person would write it."""
    if name in COUNTS:
        return f"{value} {name.replace('_', ' ')}"
    return f"--{name.replace('_', '-')} {value}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters and optimizer state, by the names that Orbax gives them.

    What else the state holds is left out, as keys have another shape when they are saved.
    """
    tree = ocp.tree.serialize_tree(tree, keep_empty_nodes=True)
    leaves = ocp.tree.to_flat_dict(tree, sep="/").items()
    return {
        name.removesuffix("/value"): x.shape
        for name, x in leaves
        if hasattr(x, "shape") and not name.startswith("rest/")
    }


def _first_difference(saved: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """An array whose shapes differ, or that one side lacks; None if all are the same.

    Also None if no name is the same, as in what another program has saved.
    """
    differing = [name for name in saved | wanted if saved.get(name) != wanted.get(name)]
    if not differing or not saved.keys() & wanted.keys():
        return None

    def rank(name: str) -> tuple[bool, bool]:  # Parameters of both sides say most.
        return name not in saved or name not in wanted, not name.startswith("params/")

    name = min(differing, key=rank)
    there, here = (x.get(name, "missing") for x in (saved, wanted))
    return f"shape of {name}: {there} in the checkpoint, {here} now"


def _other_network(checkpoint: str, saved: dict[str, Any], wanted: dict[str, Any]) -> UserError:
    difference = _first_difference(saved, wanted)
    return UserError(
        f"{checkpoint} is that of another network, or of other classes ({difference}); use the "
        "same model and images, or another --run-dir."
    )


def _has_other_cause(error: Exception) -> bool:
    """Whether a checkpoint that cannot be read may be good: memory is short, or a process gone."""
    return processes.is_lost(error) or meaning(error) is not error


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
        counts = all(isinstance(row[name], int) for row in rows for name in ("epoch", "step"))
        numbers = (row[name] for row in rows for name in MEASURED)
        if counts and all(x is None or isinstance(x, (int, float)) for x in numbers):
            return rows
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file.name} is damaged: {error!r}") from error
    raise ValueError(f"{file.name} is damaged: not all metrics are numbers")


def write(file: Path, text: str) -> None:
    """Replaces a file at once, so that no reader and no crash ever sees half of it."""
    part = file.with_suffix(file.suffix + ".part")
    part.write_text(text)
    part.replace(file)
