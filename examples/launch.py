"""Run train.py as several processes on the CPU of one machine, and say which of them fails.

    python examples/launch.py --processes 4 --model vit_mini/2 --run-dir runs/four

All other flags go to train.py. A tool for tests: it shows on one machine what happens on a pod. On
a cluster, Slurm, MPI or the launcher of a TPU pod starts train.py itself; see docs/cluster.md.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

SCRIPT = Path(__file__).with_name("train.py")
GRACE = 120.0  # Seconds that the others have to stop after one has failed.
# How a process ends that has lost another: by itself (processes.leave), or aborted by JAX.
FOLLOWED = (os.EX_TEMPFAIL, -signal.SIGABRT)


@dataclasses.dataclass(frozen=True)
class Options:
    """Run train.py as several processes on the CPU of this machine. All other flags go to it."""

    processes: int = 2
    """Number of processes, which share each batch."""


def start(processes: int, arguments: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Starts the processes, which find each other at a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    together = ("--coordinator", address, "--process-count", str(processes), "--process-id")
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, *arguments, *together, str(i)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C reaches each of them once: from here.
        )
        for i in range(processes)
    ]


def wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, str]]:
    """Waits until all have ended; those that failed and how, first the one where it began."""
    running = dict(enumerate(processes))
    failed: list[tuple[int, str]] = []
    own, stuck, followed = range(3)
    rank: dict[int, int] = {}
    deadline = float("inf")
    while running:
        time.sleep(0.05)
        for i in [i for i, process in running.items() if process.poll() is not None]:
            code = running.pop(i).returncode
            if code != 0:
                how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                rank.setdefault(i, followed if code in FOLLOWED else own)
                failed.append((i, f"killed after {GRACE:.0f} s" if rank[i] == stuck else how))
                deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for i, process in running.items():
                rank[i] = stuck
                process.kill()
    # The others may notice before the operating system has buried the one that they lost.
    return sorted(failed, key=lambda x: rank[x[0]])


def outcome(processes: Sequence[subprocess.Popen[bytes]]) -> int | str:
    """What to exit with when all have ended: a code, or a sentence about the first that failed."""
    failed = wait(processes)
    codes = {process.returncode for process in processes}
    if len(codes) == 1 and min(codes) >= 0:  # Success, or a reason that all of them have given.
        return codes.pop()
    number, how = failed[0]
    return (
        f"error: process {number} of {len(processes)} failed first ({how}), and the others have "
        "stopped. When it is mended, go on with --resume."
    )


def main() -> None:
    options, arguments = tyro.cli(Options, return_unknown_args=True)
    if options.processes < 1:
        raise SystemExit(f"error: --processes {options.processes} must be positive.")
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        processes += start(options.processes, arguments)
        code = outcome(processes)
    finally:
        for process in processes:
            process.kill()
    raise SystemExit(128 + received[0] if received and code != 0 else code)


if __name__ == "__main__":
    main()
