"""One process of several: joining the others, stopping together, leaving when one is gone."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from errors import PassingError, UserError, first_line, meaning

START = 300  # Seconds that processes wait for process 0 to start.
PATIENCE = 60  # Seconds until a process that gives no sign of life is taken for dead.
LOST = os.EX_TEMPFAIL  # Exit code of a process that could not go on without another.
# What an error says that comes from talking to another process.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "heartbeat")
SIGNS_OF_LOSS += ("barrier", "remote process exited", "Connection reset", "Connection closed")
# What tells a process how many of its kind a launcher has started.
LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPI",
}
# A name, an IPv4 address, or an IPv6 address in brackets; and a port.
ADDRESS = re.compile(r"(\[[\w:.%]+\]|[\w.-]+):([0-9]{1,5})")


def launcher() -> str | None:
    """What has started this process as one of several, if anything."""
    for variable, name in LAUNCHERS.items():
        if os.environ.get(variable, "1").strip() not in ("", "0", "1"):
            return name
    hosts = (os.environ.get(x, "") for x in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"))
    return "a TPU pod" if any("," in x for x in hosts) else None


def join(
    when: Literal["auto", "always", "never"],
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes, if there are any.

    Args:
      when: "auto" under a launcher, or if the other arguments are given. Some TPU pods do not say
        that they are one; they take "always".
      coordinator: HOST:PORT of process 0. JAX finds the arguments by itself on TPU pods, under
        Slurm and Open MPI 4.
      process_count: how many there are.
      process_id: which one this is, from 0.
    """
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
    if not missing and when == "never":
        raise UserError("--coordinator joins other processes, and --distributed never forbids it.")
    if when == "always" or (when == "auto" and (launcher() or not missing)):
        _join(coordinator, process_count, process_id)
    _check_devices()
    # The TPU runtime counts the hosts of a pod, even if no variable names them.
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} processes, which have not joined each other; "
            "pass --distributed always."
        )


def _join(coordinator: str | None, process_count: int | None, process_id: int | None) -> None:
    if coordinator is not None:
        host, port = _address(coordinator)
        if process_count < 1:
            raise UserError(f"--process-count {process_count} must be positive.")
        if not 0 <= process_id < process_count:
            raise UserError(
                f"--process-id {process_id} must be at least 0 and less than --process-count "
                f"{process_count}."
            )
        # If this process cannot reach process 0, JAX waits for minutes and then aborts.
        with _listener(coordinator, port) if process_id == 0 else contextlib.nullcontext():
            _wait_for(coordinator, host, port)
    _choose_port()
    # Whatever proxy is set, gRPC would look for process 0 behind it, and hang.
    os.environ["grpc_proxy"] = ""
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            heartbeat_timeout_seconds=PATIENCE,
            shutdown_timeout_seconds=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        kind = PassingError if "DEADLINE_EXCEEDED" in str(error) else UserError
        raise kind(
            f"jax.distributed did not start: {first_line(error)}. Where JAX does not find the "
            "others by itself, give --coordinator, --process-count and --process-id; or "
            "--distributed never, for a process that trains alone."
        ) from error


def _address(coordinator: str) -> tuple[str, int]:
    """Host and port of process 0."""
    found = ADDRESS.fullmatch(coordinator)
    if not found or not 0 < int(found[2]) < 65536:
        raise UserError(
            f"--coordinator {coordinator} must be HOST:PORT, as in 10.0.0.1:1234 or [fe80::1]:1234."
        )
    return found[1].strip("[]"), int(found[2])


def _check_devices() -> None:
    """Raises a UserError if JAX has no devices of the platform that it is asked for."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        # Without a plugin for a platform, JAX has an assertion without a text.
        reason = first_line(error) if str(error) else "this JAX knows no such devices"
        raise UserError(
            f"JAX_PLATFORMS={asked or ''} cannot be used: {reason}; leave JAX_PLATFORMS out to use "
            "what this machine has, or install JAX for these devices."
        ) from error


def _choose_port() -> None:
    """Another port for each step of a Slurm job: JAX takes one for all that run side by side.

    Of processes that `mpirun` has started in a Slurm job, only some know a step.
    """
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return
    job, step = (os.environ.get(f"SLURM_{x}_ID", "") for x in ("JOB", "STEP"))
    if job.isdecimal() and step.isdecimal():
        port = 61440 + (int(job) + 97 * int(step)) % 4096
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(port))


def _listener(coordinator: str, port: int) -> socket.socket:
    """Listens at the port of process 0 until JAX does."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"--coordinator {coordinator}: process 0 cannot use that port ({first_line(error)}); "
            "choose another, the same for all processes."
        ) from error


def _wait_for(coordinator: str, host: str, port: int) -> None:
    """Until process 0 listens."""
    deadline = time.monotonic() + START
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except (OSError, UnicodeError) as error:
            # Trying again does not help a name that cannot be looked up.
            is_mistake = isinstance(error, UnicodeError)
            if is_mistake or time.monotonic() > deadline:
                kind = UserError if is_mistake else PassingError
                raise kind(
                    f"--coordinator {coordinator} does not answer ({first_line(error)}); is it the "
                    "host of process 0, is that running, and may this host reach it?"
                ) from error
        time.sleep(0.2)


def device_summary() -> str:
    """The devices that are used, and a warning if GPUs of a node are not; for all to call."""
    kind = jax.devices()[0].device_kind
    alone = jax.process_count() == 1
    host = zlib.crc32(socket.gethostname().encode())
    mine = np.array([host, jax.local_device_count(), num_gpus()])
    found = np.atleast_2d(mine if alone else multihost_utils.process_allgather(mine))
    nodes = [found[found[:, 0] == node] for node in np.unique(found[:, 0])]
    used = [int(rows[:, 1].sum()) for rows in nodes]
    there = [int(rows[:, 2].max()) for rows in nodes]
    text = "1 process" if alone else f"{jax.process_count()} processes"
    if not alone and (name := launcher()):
        text += f", started by {name}"
    text += f"; {jax.device_count()} x {kind}"
    if not alone:
        text += _on_nodes(used)
    if jax.default_backend() != "gpu":
        return text
    idle = [pair for pair in zip(used, there, strict=True) if pair[0] < pair[1]]
    if used == there:
        text += ", all in use"
    elif idle:
        text += "\nwarning: only {} of the {} GPUs of a node are used; ".format(*idle[0])
        text += "start one process for each GPU, or one for all of them."
    return text


def _on_nodes(used: list[int]) -> str:
    """How many devices of each node are used, for the end of a line about all of them."""
    if len(used) == 1:
        return " on one node"
    least, most = min(used), max(used)
    return f", {least if least == most else f'{least} to {most}'} on each of {len(used)} nodes"


def num_gpus() -> int:
    """NVIDIA GPUs of this node that a run may use; 0 if only the user knows."""
    granted = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if granted.isdecimal():
        return int(granted)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    return len(glob.glob("/dev/nvidia[0-9]*"))


def leave(error: Exception, config: Any = None) -> NoReturn:
    """Ends the program with a line about an error, and with the values of flags in `config`.

    One process of several ends at once: a farewell would wait for others that may be gone, or that
    wait for this one.
    """
    error = meaning(error, config)
    mistake = isinstance(error, UserError)
    passes = isinstance(error, PassingError)
    if not jax.distributed.is_initialized():
        if not mistake:
            raise error
        if not passes:
            raise SystemExit(f"error: {error}") from None
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(LOST) from None
    lost, index, count = False, 0, 1
    with contextlib.suppress(RuntimeError, AssertionError):  # Without devices JAX knows none of it.
        lost, index, count = is_lost(error), jax.process_index(), jax.process_count()
    if mistake:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        if not lost:
            traceback.print_exception(error)
        print(
            f"error: process {index} of {count} cannot go on: {first_line(error)}. "
            "If another one has stopped, start all of them again with --resume.",
            file=sys.stderr,
            flush=True,
        )
    if index == 0:
        time.sleep(2.0)  # The others end with it, and may have something to say.
    os._exit(LOST if lost or passes else 1)


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a program, and ends when it has: threads that wait for a dead disk do not keep it."""
    code: object = 1
    try:
        main()
        code = None
    except SystemExit as stopped:
        code = stopped.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exception(error)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if not code:
        raise SystemExit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


def is_lost(error: Exception) -> bool:
    """Whether an error comes from talking to another process."""
    return jax.process_count() > 1 and any(word in str(error) for word in SIGNS_OF_LOSS)


class StoppedError(Exception):
    """The run was asked to stop, and everything is saved."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped and saved at step {step}")
        self.signal = number


class StopRequest:
    """Turns Ctrl-C or SIGTERM into a request to stop.

    A second Ctrl-C acts as usual. More SIGTERMs change nothing, as schedulers send several, and
    kill in the end. Of several processes all must leave the loop at the same step: JAX's preemption
    service, which hears SIGTERM from the moment they join, finds a step that none of them has
    passed.
    """

    def __enter__(self) -> StopRequest:
        self.signal = 0
        self._calls = 0
        self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt)}
        if jax.process_count() == 1:
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.signal = self.signal or number

    def _interrupt(self, number: int, frame: object) -> None:
        self._receive(number, frame)
        signal.signal(number, self._previous[signal.SIGINT])
        if jax.process_count() > 1:  # For the preemption service.
            os.kill(os.getpid(), signal.SIGTERM)

    def is_now(self) -> bool:
        """Whether to stop here. All processes must ask equally often."""
        if jax.process_count() == 1:
            return self.signal > 0
        self._calls += 1
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return False
        interrupted = multihost_utils.process_allgather(np.array(self.signal == signal.SIGINT))
        self.signal = int(signal.SIGINT if interrupted.any() else signal.SIGTERM)
        return True
