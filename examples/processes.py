"""One process of several: joining the others, stopping together, leaving when one is gone."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from errors import UserError, first_line

START = 300  # Seconds that processes wait for process 0 to start.
PATIENCE = 60  # Seconds until a process that gives no sign of life is taken for dead.
LOST = os.EX_TEMPFAIL  # Exit code of a process that could not go on without another.


def join(coordinator: str | None, process_count: int | None, process_id: int | None):
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
    lost = is_lost(error)
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


def is_lost(error: Exception) -> bool:
    """Whether an error comes from talking to another process."""
    words = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "heartbeat", "barrier")
    return jax.process_count() > 1 and any(word in str(error) for word in words)


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
