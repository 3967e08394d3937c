"""What a run that skips work needs to be as good as the tuned baseline: time, FLOPs, accuracy.

    python benchmarks/evidence/run.py speed
    python benchmarks/evidence/time_to_accuracy.py

Three answers for each task and model, from the runs of the grid "speed" (same number of steps,
both tuned, paired by seed):

- time of a step against the baseline's, of both in turns in one process on this machine;
- whether the accuracy at the end is at most 0.3 points lower: non-inferior, if the lower end of
  the interval of the difference says so, at a level of 95 % for all comparisons together;
- the share of the baseline's whole time after which the mean curve of the seeds reaches the
  baseline's accuracy at the end, less those 0.3 points; and the same for the baseline itself.

Writes `results/time-to-accuracy-<device>.json`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import paths  # noqa: F401
from contenders import CONTENDERS, NOTHING
from grid import GRIDS, Cell, Job, Row, Runs, final_jobs
from overhead import publish, results_file
from report import BASELINE, RESAMPLES, column, difference, finals, header, interval
from run import read
from tasks import TASKS
from trial import EVALUATIONS, Settings, batches, compiled

MARGIN = 0.003  # Of accuracy: 0.3 points.


def time_steps(jobs: dict[str, Job], rounds: int) -> dict[str, np.ndarray]:
    """Seconds for the steps of one epoch, by contender, in every round: all take turns."""
    runners = {}
    for name, job in jobs.items():
        task, program = TASKS[job.program.task], compiled(job.program)
        numbers = Settings(np.uint32(job.settings.seed), *map(np.float32, job.settings[1:]))
        train = task.split(job.settings.seed).train
        data = [train.take(x) for x in itertools.islice(batches(task, 0), task.epoch_steps)]
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


Interval = tuple[float, float, float]


def bootstrap(of: Callable[[np.ndarray, np.ndarray], float], seeds: int, rounds: int) -> Interval:
    """A statistic of resampled seeds and rounds of timing, with its 95 % interval."""
    rng, draws = np.random.default_rng(0), RESAMPLES // 10
    picks = [(rng.integers(0, seeds, seeds), rng.integers(0, rounds, rounds)) for _ in range(draws)]
    low, high = np.quantile([of(*pick) for pick in picks], (0.025, 0.975), method="nearest")
    return of(np.arange(seeds), np.arange(rounds)), float(low), float(high)


def reach(own: np.ndarray, base: np.ndarray, cost: Callable[[np.ndarray], float]) -> Any:
    """A function of seeds and rounds: the share of the baseline's whole cost until the mean curve
    is as good as the baseline's at its end."""
    return lambda seeds, rounds: (
        cost(rounds) * crossing(own[seeds].mean(axis=0), base[seeds, -1].mean() - MARGIN)
    )


def compare(cells: Sequence[Cell], runs: Runs, rounds: int, comparisons: int) -> list[Row]:
    """Rows for the contenders on one task with one model; none until all are there."""
    jobs = {cell.contender: final_jobs(cell, runs) for cell in cells}
    done = {name: finals(own, runs) for name, own in jobs.items()}
    if not all(done.values()):
        return [cell._asdict() | {"run": False} for cell in cells]
    seconds = time_steps({name: own[0] for name, own in jobs.items()}, rounds)
    base, steps = done[BASELINE], TASKS[cells[0].task].epoch_steps
    rows = []
    for cell in cells:
        own = done[cell.contender]
        layer_rate = CONTENDERS[cell.contender].settings.get("layer_rate", 0.0)
        # Where the work varies from step to step, the mean is what a run takes.
        middle = np.mean if layer_rate else np.median
        ratios = seconds[cell.contender] / seconds[BASELINE]
        cost = lambda picks, ratios=ratios, middle=middle: float(middle(ratios[picks]))
        flops = own[0]["flops"] / base[0]["flops"]
        if layer_rate:  # Programs count both branches of a conditional.
            least = jobs[BASELINE][0].program._replace(contender=NOTHING, rate=1.0)
            saved = base[0]["flops"] - compiled(least).step.cost_analysis()["flops"]
            flops = 1 - layer_rate * saved / base[0]["flops"]
        gap = column(own, "test_accuracy") - column(base, "test_accuracy")
        bound = interval(gap, 1 - 0.05 / comparisons)[1]
        curve, target = curves(own), curves(base)
        size = (len(own), rounds)
        rows.append(
            cell._asdict()
            | {
                "run": True,
                "milliseconds": 1e3 * float(np.median(seconds[cell.contender])) / steps,
                "step_time": bootstrap(lambda _, picks, cost=cost: cost(picks), *size),
                "flops": flops,
                "accuracy": interval(column(own, "test_accuracy")),
                "difference": interval(gap),
                "non_inferior": bound > -MARGIN,
                "time_to_accuracy": bootstrap(reach(curve, target, cost), *size),
                "flops_to_accuracy": bootstrap(
                    reach(curve, target, lambda _, flops=flops: flops), *size
                ),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    names = ("task, model", "method", "time of a step", "FLOPs", "accuracy, %")
    lines = [header((*names, "difference, points", "non-inferior", "time to accuracy"))]
    for row in rows:
        if not row["run"]:
            text = f"| {row['task']}, {row['model']} | {row['contender']} | *not run* "
            lines.append(text + "| " * 5 + "|")
            continue
        same = row["contender"] == BASELINE
        lines.append(
            f"| {row['task']}, {row['model']} | {row['contender']} | {three(row['step_time'])} | "
            f"{row['flops']:.2f} | {100 * row['accuracy'][0]:.2f} | "
            f"{'' if same else difference(row['difference'], 100, 2)} | "
            f"{'' if same else 'yes' if row['non_inferior'] else 'no'} | "
            f"{three(row['time_to_accuracy'])} |"
        )
    return "\n".join(lines)


def three(values: Interval) -> str:
    mean, low, high = (f"{x:.2f}" if np.isfinite(x) else "never" for x in values)
    return f"{mean} [{low}, {high}]"


def finite(rows: Sequence[Row]) -> list[Row]:
    """Without infinities, which JSON does not know: null stands for never."""
    number = lambda x: None if isinstance(x, float) and not np.isfinite(x) else x
    return [
        {name: [*map(number, x)] if isinstance(x, tuple) else x for name, x in row.items()}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=results_file("evidence").with_suffix(".csv"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=results_file("time-to-accuracy"))
    arguments = parser.parse_args()
    runs, rows = read(arguments.runs), []
    comparisons = sum(cell.contender != BASELINE for cell in GRIDS["speed"])
    for pair in dict.fromkeys((cell.task, cell.model) for cell in GRIDS["speed"]):
        cells = [cell for cell in GRIDS["speed"] if (cell.task, cell.model) == pair]
        rows += compare(cells, runs, arguments.rounds, comparisons)
    settings = {"margin": MARGIN, "evaluations": EVALUATIONS, "rounds": arguments.rounds}
    publish(arguments.output, table(rows), finite(rows), **settings)


if __name__ == "__main__":
    main()
