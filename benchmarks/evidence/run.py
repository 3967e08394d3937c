"""Runs a grid of the evidence: tunes every contender, then trains with what was chosen.

    python benchmarks/evidence/run.py core              # 3 tasks, 8 methods, 20 seeds
    python benchmarks/evidence/run.py core --workers 8
    python benchmarks/evidence/run.py compact --tasks digits_noisy

Each run is a line of `results/evidence-<device>.csv` as soon as it ends; stopped, the same command
goes on. `report.py` draws tables and figures from that file.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import paths  # noqa: F401
from contenders import ABLATIONS
from grid import (
    ABLATED,
    GRIDS,
    MASKED,
    Job,
    Row,
    Runs,
    ablation_jobs,
    final_jobs,
    tuning_jobs,
    unmasked_jobs,
)
from overhead import machine, results_file, versions
from rich.progress import Progress
from tasks import TASKS
from trial import Program, Settings, mean_flops, run

METRICS = [
    f"{part}_{metric}" for part in ("validation", "test") for metric in ("accuracy", "nll", "ece")
]
COLUMNS = [*Program._fields, *Settings._fields, "tunes", "version", *METRICS, "train_accuracy"]
COLUMNS += ["curve", "flops", "machine", "versions"]
TEXTS = ("task", "contender", "model", "optimizer", "curve", "machine", "versions")
WHOLE, FLAGS = ("seed", "version"), ("ablation", "tunes")


def read(file: Path) -> Runs:
    """The runs that are done."""
    if not file.exists():
        return {}
    runs = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(_complete(file.read_text()))), 2):
        try:
            row = {name: _value(name, row[name]) for name in COLUMNS}
        except (KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"error: {file}, line {number}: {error!r}; remove it.") from None
        program = Program(*(row[name] for name in Program._fields))
        settings = Settings(*(row[name] for name in Settings._fields))
        runs[Job(program, settings, row["tunes"], row["version"])] = row
    return runs


def _complete(text: str) -> str:
    """Without a last line that was cut off."""
    return text[: text.rfind("\n") + 1]


def _value(name: str, text: str) -> Any:
    if name in TEXTS:
        return text
    if name in FLAGS:
        return {"True": True, "False": False}[text]
    return (int if name in WHOLE else float)(text) if text else None


def train_all(jobs: Sequence[Job], file: Path) -> int:
    """Runs jobs of one program one after another; writes a line for each as it ends."""
    for job in jobs:
        metrics = run(job.program, job.settings, test=not job.tunes)
        flops = mean_flops(job.program)
        about = machine()
        row = job.program._asdict() | job.settings._asdict() | metrics
        row |= {"tunes": job.tunes, "version": job.version, "flops": flops}
        row |= {"machine": f"{about['device']}, {about['cpu_count']} cores, {about['cpu']}"}
        row |= {"versions": ", ".join(f"{name} {x}" for name, x in versions().items())}
        append(file, row)
    return len(jobs)


def append(file: Path, row: Row) -> None:
    """Adds a line with one write, which other processes cannot come between."""
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(
        {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
    )
    with open(file, "ab", buffering=0) as out:
        out.write(line.getvalue().encode())


def start(file: Path) -> None:
    """Makes the file, or makes it ready for more lines."""
    header = ",".join(COLUMNS) + "\n"
    text = file.read_text() if file.exists() else ""
    if text and not text.startswith(header):
        raise SystemExit(f"error: {file} has other columns; give another --output.")
    if not text:
        file.write_text(header)
    elif not text.endswith("\n"):
        os.truncate(file, len(_complete(text).encode()))


def remaining(jobs: Sequence[Job], runs: Runs) -> list[list[Job]]:
    """Those that are not done yet, by program."""
    left = sorted(set(jobs) - runs.keys())
    return [list(group) for _, group in itertools.groupby(left, lambda job: job.program)]


def execute(jobs: Sequence[Job], file: Path, workers: int, title: str) -> None:
    """Runs the jobs that are not done yet."""
    groups = remaining(jobs, read(file))
    context = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(workers, context) as pool:
        task = progress.add_task(title, total=sum(map(len, groups)))
        futures = [pool.submit(train_all, group, file) for group in groups]
        try:
            for ended in as_completed(futures):
                progress.update(task, advance=ended.result())
        finally:  # A failure ends the stage once the programs that run are done.
            pool.shutdown(cancel_futures=True)


def planned(name: str, runs: Runs) -> list[Job]:
    """All jobs of a grid that the runs so far allow."""
    if name == "masks":
        return [
            job
            for cell in MASKED
            for find in (tuning_jobs, final_jobs, unmasked_jobs)
            for job in find(cell, runs)
        ]
    if name == "ablation":
        tuning = tuning_jobs(ABLATED, runs)
        return tuning + [job for row in ABLATIONS for job in ablation_jobs(row, runs)]
    return [job for cell in GRIDS[name] for job in tuning_jobs(cell, runs) + final_jobs(cell, runs)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", choices=[*GRIDS, "masks", "ablation"])
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=[*TASKS],
        metavar="TASK",
        help="of the grid; all unless given",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=results_file("evidence").with_suffix(".csv"))
    arguments = parser.parse_args()

    if jax.default_backend() == "cpu":  # One thread each: these models are too small for more.
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
        )
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # Workers share a GPU.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path("runs/evidence/cache").absolute())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    start(arguments.output)
    for stage in ("tuning", "finalists", "near the best", "chosen settings"):
        jobs = planned(arguments.grid, read(arguments.output))
        jobs = [job for job in jobs if job.program.task in arguments.tasks]
        execute(jobs, arguments.output, arguments.workers, f"{arguments.grid}: {stage}")


if __name__ == "__main__":
    main()
