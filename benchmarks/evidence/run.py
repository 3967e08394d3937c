"""Runs a grid of the evidence: tunes every contender, then trains with what was chosen.

    python benchmarks/evidence/run.py core              # 3 tasks, 8 methods, 20 seeds
    python benchmarks/evidence/run.py core --workers 8

Each run is a line of `results/evidence-<device>.csv` as soon as it ends; stopped, the same command
goes on. `report.py` draws tables and figures from that file.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS.parent / "examples"), str(BENCHMARKS)]

import jax  # noqa: E402
from grid import (  # noqa: E402
    ABLATED,
    GRIDS,
    Job,
    Row,
    ablation_jobs,
    chosen,
    final_jobs,
    key_of,
    tuning_jobs,
)
from overhead import machine, results_file, versions  # noqa: E402
from rich.progress import Progress  # noqa: E402
from trial import Program, Settings, compiled, run  # noqa: E402

METRICS = [
    f"{part}_{metric}" for part in ("validation", "test") for metric in ("accuracy", "nll", "ece")
]
COLUMNS = [*Program._fields, "trial", *Settings._fields, *METRICS, "train_accuracy", "flops"]
COLUMNS += ["seconds", "curve"]


TEXTS = ("task", "contender", "model", "optimizer", "curve")
WHOLE = ("trial", "seed")


def read(file: Path) -> list[Row]:
    """The runs that are done; each once, should two commands have run side by side."""
    if not file.exists():
        return []

    def value(name: str, text: str) -> Any:
        if name == "ablation":
            return text == "True"
        kind = str if name in TEXTS else int if name in WHOLE else float
        return kind(text) if text or kind is str else None

    with open(file, newline="") as lines:
        rows = [{name: value(name, x) for name, x in row.items()} for row in csv.DictReader(lines)]
    return list({key_of(row): row for row in reversed(rows)}.values())[::-1]


def train_all(jobs: Sequence[Job], file: Path) -> int:
    """Runs jobs of one program one after another; writes a line for each as it ends."""
    for job in jobs:
        flops = compiled(job.program).step.cost_analysis()["flops"]
        start = time.perf_counter()
        metrics = run(job.program, job.settings, test=job.trial < 0)
        row = job.program._asdict() | {"trial": job.trial} | job.settings._asdict() | metrics
        row |= {"flops": flops, "seconds": round(time.perf_counter() - start, 3)}
        append(file, row)
    return len(jobs)


def append(file: Path, row: dict[str, Any]) -> None:
    """Adds a line with one write, which other processes cannot come between."""
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(
        {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
    )
    with open(file, "ab", buffering=0) as out:
        out.write(line.getvalue().encode())


def remaining(jobs: Sequence[Job], runs: Sequence[Row]) -> list[Job]:
    """Those that are not done yet, ordered by program."""
    done = {key_of(run) for run in runs}
    return sorted(job for job in jobs if job.key not in done)


def execute(jobs: Sequence[Job], file: Path, workers: int, title: str) -> None:
    """Runs the jobs that are not done yet."""
    if not file.exists():
        file.write_text(",".join(COLUMNS) + "\n")
    open_jobs = remaining(jobs, read(file))
    groups = [list(x) for _, x in itertools.groupby(open_jobs, lambda job: job.program)]
    context = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(workers, context) as pool:
        task = progress.add_task(title, total=len(open_jobs))
        futures = [pool.submit(train_all, group, file) for group in groups]
        for ended in as_completed(futures):
            progress.update(task, advance=ended.result())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", choices=[*GRIDS, "ablation"])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=results_file("evidence").with_suffix(".csv"))
    arguments = parser.parse_args()

    if jax.default_backend() == "cpu":  # One thread each: these models are too small for more.
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path("runs/evidence/cache").absolute())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    file, workers = arguments.output, arguments.workers

    cells = GRIDS.get(arguments.grid, [ABLATED])
    jobs = [job for cell in cells for job in tuning_jobs(cell)]
    execute(jobs, file, workers, f"{arguments.grid}: tuning")
    best = {cell: chosen(cell, read(file)) for cell in cells}
    jobs = [job for cell in cells for job in final_jobs(cell, best[cell])]
    if arguments.grid == "ablation":
        jobs = ablation_jobs(best[ABLATED])
    execute(jobs, file, workers, f"{arguments.grid}: chosen settings")
    about = {"machine": machine(), "versions": versions()}
    file.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
