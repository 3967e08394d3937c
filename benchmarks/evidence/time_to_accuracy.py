"""What a run that skips work needs to be as good as the tuned baseline: time, FLOPs, accuracy.

    python benchmarks/evidence/run.py speed
    python benchmarks/evidence/time_to_accuracy.py

Three answers for each task and model, from the runs of the grid "speed" (same number of steps,
the same settings tried of both, paired by seed):

- the time of a step against the baseline's, of both in turns in one process on this machine. As
  both take the same steps, that of a whole run;
- whether a run's accuracy is at most 0.3 points lower at its end: p of the one-sided test of
  non-inferiority, by sign flips as in the report, corrected by Holm's method for all comparisons.
  A large p says that this is not shown, not that the accuracy is lower;
- when the mean curve of the seeds first reaches the baseline's accuracy at the end, less those 0.3
  points: as a share of the baseline's whole time, and against the baseline's own. The learning rate
  falls over the whole run, so that a run planned to end there would have another curve.

Writes `results/time-to-accuracy-<device>.json`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import paths  # noqa: F401
from grid import GRIDS, Cell, Job, Row, Runs, final_jobs
from overhead import publish, results_file
from report import (
    BASELINE,
    RESAMPLES,
    column,
    correct,
    difference,
    finals,
    header,
    interval,
    p_text,
    p_value,
)
from run import read
from tasks import TASKS
from trial import batches, compiled

MARGIN = 0.003  # Of accuracy: 0.3 points.
STEPS = 50  # In a round of timing.


def time_steps(jobs: dict[str, Job], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a step, by contender, in every round: all take turns."""
    runners = {}
    for name, job in jobs.items():
        task, program = TASKS[job.program.task], compiled(job.program)
        numbers, train = job.settings.arrays(), task.split(job.settings.seed).train
        data = [train.take(x) for x in itertools.islice(batches(task, 0), STEPS)]
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
                seconds[name].append((time.perf_counter() - start) / len(data))
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


def p_of_loss(differences: np.ndarray, margin: float) -> float:
    """One-sided p of a mean loss of a margin or more."""
    shifted = differences + margin
    half = p_value(shifted) / 2
    return half if shifted.sum() > 0 else 1 - half


Interval = tuple[float, float, float]
Statistic = Callable[[np.ndarray, np.ndarray], float]  # Of picks of seeds and of rounds.


def bootstrap(of: Statistic, seeds: int, rounds: int) -> Interval:
    """A statistic of resampled seeds and rounds of timing, with its 95 % interval."""
    rng, draws = np.random.default_rng(0), RESAMPLES // 10
    picks = [(rng.integers(0, seeds, seeds), rng.integers(0, rounds, rounds)) for _ in range(draws)]
    low, high = np.quantile([of(*pick) for pick in picks], (0.025, 0.975), method="nearest")
    return of(np.arange(seeds), np.arange(rounds)), float(low), float(high)


def reach(own: np.ndarray, base: np.ndarray, cost: Callable[[np.ndarray], float]) -> Statistic:
    """The share of the baseline's whole cost until the mean curve is as good as the baseline's at
    its end; `cost` is that of a step, by rounds, against the baseline's."""
    return lambda seeds, rounds: (
        cost(rounds) * crossing(own[seeds].mean(axis=0), base[seeds, -1].mean() - MARGIN)
    )


def against(own: Statistic, base: Statistic) -> Statistic:
    return lambda *picks: own(*picks) / base(*picks)


def compare(cells: Sequence[Cell], runs: Runs, rounds: int) -> list[Row]:
    """Rows for the contenders on one task with one model; none until all are there."""

    def about(cell):
        return cell._asdict() | {"is_baseline": cell.contender == BASELINE}

    jobs = {cell.contender: final_jobs(cell, runs) for cell in cells}
    done = {name: finals(own, runs) for name, own in jobs.items()}
    if not all(done.values()):
        return [about(cell) | {"run": False} for cell in cells]
    seconds = time_steps({name: own[0] for name, own in jobs.items()}, rounds)
    return [
        about(cell)
        | {"run": True, "milliseconds": 1e3 * float(np.median(seconds[cell.contender]))}
        | to_baseline(
            done[cell.contender], done[BASELINE], seconds[cell.contender] / seconds[BASELINE]
        )
        for cell in cells
    ]


def to_baseline(own: Sequence[Row], base: Sequence[Row], ratios: np.ndarray) -> Row:
    """Runs of a contender against those of the baseline with the same seeds.

    `ratios` are those of the times of a step, by rounds.
    """

    def time_cost(picks: np.ndarray) -> float:
        return float(np.median(ratios[picks]))

    target, curve, size = curves(base), curves(own), (len(base), len(ratios))
    flops = own[0]["flops"] / base[0]["flops"]
    base_reach = reach(target, target, lambda _: 1.0)
    time_reach = reach(curve, target, time_cost)
    flops_reach = reach(curve, target, lambda _: flops)
    gap = column(own, "test_accuracy") - column(base, "test_accuracy")
    return {
        "step_time": bootstrap(lambda _, picks: time_cost(picks), *size),
        "flops": flops,
        "accuracy": interval(column(own, "test_accuracy")),
        "difference": interval(gap),
        "p": p_of_loss(gap, MARGIN),
        "time_to_accuracy": bootstrap(time_reach, *size),
        "time_against_baseline": bootstrap(against(time_reach, base_reach), *size),
        "flops_against_baseline": bootstrap(against(flops_reach, base_reach), *size),
    }


def table(rows: Sequence[Row]) -> str:
    names = ("task, model", "method", "time of a step", "FLOPs", "accuracy, %")
    names += ("difference, points", "non-inferiority: p, Holm")
    names += ("time to accuracy, of the baseline's run", "of the baseline's own", "FLOPs to it")
    lines = [header(names)]
    for row in rows:
        if not row["run"]:
            text = f"| {row['task']}, {row['model']} | {row['contender']} | *not run* "
            lines.append(text + "| " * (len(names) - 3) + "|")
            continue
        same = row["is_baseline"]
        lines.append(
            f"| {row['task']}, {row['model']} | {row['contender']} | {three(row['step_time'])} | "
            f"{row['flops']:.2f} | {100 * row['accuracy'][0]:.2f} | "
            f"{'' if same else difference(row['difference'], 100, 2)} | "
            f"{'' if same else p_text(row['p_corrected'])} | "
            f"{three(row['time_to_accuracy'])} | "
            f"{'' if same else three(row['time_against_baseline'])} | "
            f"{'' if same else three(row['flops_against_baseline'])} |"
        )
    return "\n".join(lines)


def three(values: Interval) -> str:
    mean, low, high = ("never" if np.isinf(x) else f"{x:.2f}" for x in values)
    return f"{mean} [{low}, {high}]"


def finite(rows: Sequence[Row]) -> list[Row]:
    """Without infinities, which JSON does not know: null stands for never."""

    def number(x):
        return None if isinstance(x, float) and np.isinf(x) else x

    return [
        {name: [*map(number, x)] if isinstance(x, tuple) else x for name, x in row.items()}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=results_file("evidence").with_suffix(".csv"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=results_file("time-to-accuracy"))
    arguments = parser.parse_args()
    runs, rows = read(arguments.runs), []
    for pair in dict.fromkeys((cell.task, cell.model) for cell in GRIDS["speed"]):
        cells = [cell for cell in GRIDS["speed"] if (cell.task, cell.model) == pair]
        rows += compare(cells, runs, arguments.rounds)
    correct(rows)
    settings: dict[str, float] = {"margin": MARGIN}
    settings |= {"rounds": arguments.rounds, "steps": STEPS}
    publish(arguments.output, table(rows), finite(rows), **settings)


if __name__ == "__main__":
    main()
