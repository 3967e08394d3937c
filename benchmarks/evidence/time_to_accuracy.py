"""What a run that skips work needs to be as good as the tuned baseline: time, FLOPs, accuracy.

    python benchmarks/evidence/run.py speed
    python benchmarks/evidence/time_to_accuracy.py

Three answers for each task and model, from the runs of the grid "speed" (same number of steps,
both tuned, paired by seed):

- time of a step against the baseline's, of both in turns in one process on this machine;
- whether the accuracy at the end is at most 0.3 points lower (non-inferiority: the lower end of
  the 95 % interval of the difference);
- the share of the baseline's whole time after which the mean curve of the seeds reaches the
  baseline's accuracy at the end, less those 0.3 points; and the same for the baseline itself.

Writes `results/time-to-accuracy-<device>.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
sys.path[:0] = [str(HERE.parent.parent / "examples")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from grid import GRIDS, Cell, Job, Row, chosen, final_jobs  # noqa: E402
from overhead import median_interval, publish, results_file  # noqa: E402
from report import BASELINE, RESAMPLES, column, difference, finals, interval  # noqa: E402
from run import read  # noqa: E402
from tasks import TASKS  # noqa: E402
from trial import EVALUATIONS, Settings, batches, compiled  # noqa: E402

MARGIN = 0.003  # Of accuracy: 0.3 points.


def time_steps(jobs: dict[str, Job], rounds: int) -> dict[str, np.ndarray]:
    """Seconds for the steps of one epoch, by contender, in every round: all take turns."""
    runners = {}
    for name, job in jobs.items():
        task, program = TASKS[job.program.task], compiled(job.program)
        numbers = Settings(np.uint32(job.settings.seed), *map(np.float32, job.settings[1:]))
        train = task.split(job.settings.seed).train
        per_epoch = len(train.label) // task.batch_size
        data = [train.take(x) for x in list(batches(task, 0))[:per_epoch]]
        runners[name] = [program.step, numbers, program.initial(numbers), data]
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for i in range(-1, rounds):  # One to warm up.
        order = list(runners) if i % 2 else list(runners)[::-1]
        for name in order:
            step, numbers, state, data = runners[name]
            start = time.perf_counter()
            for batch in data:
                state = step(numbers, state, *batch)
            jax.block_until_ready(state)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
            runners[name][2] = state
    return {name: np.array(values) for name, values in seconds.items()}


def curves(runs: Sequence[Row]) -> np.ndarray:
    """Test accuracy in the course of every run: shape (seeds, evaluations)."""
    return np.array([[float(x) for x in run["curve"].split()] for run in runs])


def crossing(curve: np.ndarray, target: float) -> float:
    """The first point, as a share of the run, at which a curve reaches a target; inf if never."""
    share = np.arange(1, len(curve) + 1) / len(curve)
    above = np.flatnonzero(curve >= target)
    if not len(above):
        return np.inf
    i = above[0]
    if i == 0:
        return float(share[0])
    part = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(share[i - 1] + part * (share[i] - share[i - 1]))


def reach(own: np.ndarray, base: np.ndarray, cost: float) -> tuple[float, float, float]:
    """The share of the baseline's whole cost until the mean curve is as good, and its interval."""

    def of(index: np.ndarray) -> float:
        target = base[index, -1].mean() - MARGIN
        return cost * crossing(own[index].mean(axis=0), target)

    picks = np.random.default_rng(0).integers(0, len(own), (RESAMPLES // 10, len(own)))
    low, high = np.quantile([of(pick) for pick in picks], (0.025, 0.975), method="nearest")
    return of(np.arange(len(own))), float(low), float(high)


def compare(cells: Sequence[Cell], runs: Sequence[Row], rounds: int) -> list[Row]:
    """Rows for the contenders on one task with one model."""
    jobs = {cell.contender: final_jobs(cell, chosen(cell, runs))[0] for cell in cells}
    seconds = time_steps(jobs, rounds)
    (base_cell,) = [cell for cell in cells if cell.contender == BASELINE]
    base = finals(base_cell, runs)
    rows = []
    for cell in cells:
        own = finals(cell, runs)
        ratio = median_interval(seconds[cell.contender] / seconds[BASELINE])
        flops = own[0]["flops"] / base[0]["flops"]
        accuracy = column(own, "test_accuracy")
        gap = interval(accuracy - column(base, "test_accuracy"))
        rows.append(
            cell._asdict()
            | {
                "milliseconds": 1e3
                * float(np.median(seconds[cell.contender]))
                / (len(TASKS[cell.task].split(0).train.label) // TASKS[cell.task].batch_size),
                "step_time": ratio,
                "flops": flops,
                "accuracy": interval(accuracy),
                "difference": gap,
                "non_inferior": gap[1] > -MARGIN,
                "time_to_accuracy": reach(curves(own), curves(base), ratio[0]),
                "flops_to_accuracy": reach(curves(own), curves(base), flops),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| task, model | method | time of a step | FLOPs | accuracy, % | difference, points | "
        "non-inferior | time to accuracy |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        same = row["contender"] == BASELINE
        lines.append(
            f"| {row['task']}, {row['model']} | {row['contender']} | {three(row['step_time'])} | "
            f"{row['flops']:.2f} | {100 * row['accuracy'][0]:.2f} | "
            f"{'' if same else difference(row['difference'], 100, 2)} | "
            f"{'' if same else 'yes' if row['non_inferior'] else 'no'} | "
            f"{three(row['time_to_accuracy'])} |"
        )
    return "\n".join(lines)


def three(values: tuple[float, float, float]) -> str:
    mean, low, high = (f"{x:.2f}" if np.isfinite(x) else "never" for x in values)
    return f"{mean} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=results_file("evidence").with_suffix(".csv"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=results_file("time-to-accuracy"))
    arguments = parser.parse_args()
    runs, rows = read(arguments.runs), []
    for pair in dict.fromkeys((cell.task, cell.model) for cell in GRIDS["speed"]):
        cells = [cell for cell in GRIDS["speed"] if (cell.task, cell.model) == pair]
        rows += compare(cells, runs, arguments.rounds)
    settings = {"margin": MARGIN, "evaluations": EVALUATIONS, "rounds": arguments.rounds}
    publish(arguments.output, table(rows), rows, **settings)


if __name__ == "__main__":
    main()
