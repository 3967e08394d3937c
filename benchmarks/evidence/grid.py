"""The runs of a grid: the settings that tuning tries, what it chooses, and what is run with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from contenders import COMPACT, CONTENDERS, CORE, SAVING
from scipy.stats import qmc
from tasks import TASKS
from trial import Program, Settings, score

# Raise it when tasks, models or methods change: runs of an earlier one no longer count.
VERSION = 1
TRIALS = 16  # Settings that are tried of every contender, the baseline included,
TUNING_SEEDS = range(3)  # with these seeds;
FINALISTS = 4  # of which the best are tried again,
MORE_SEEDS = range(3, 10)  # with more; then six settings near the best of these, with all.
ALL_SEEDS = (*TUNING_SEEDS, *MORE_SEEDS)
SEEDS = range(1000, 1020)  # Of the comparison: none of those that tuning saw.
# Of learning rate and weight decay, searched on logarithmic scales.
RANGES = ((3e-5, 3e-2), (1e-3, 1.0))

Trial = tuple[Program, float, float]  # With learning rate and weight decay.
Row = dict[str, Any]  # A finished run: its settings and its metrics.


class Job(NamedTuple):
    """One run: of tuning, or of the comparison, which alone sees test images."""

    program: Program
    settings: Settings
    tunes: bool = False
    version: int = VERSION


Runs = dict[Job, Row]  # By all that a run depends on.


class Cell(NamedTuple):
    """A contender on a task, with a model and an optimizer: one row of a table."""

    task: str
    contender: str
    model: str
    optimizer: str = "adamw"


def cells(tasks: Sequence[str], contenders: Sequence[str], model: str = "") -> list[Cell]:
    """Every contender on every task, with the task's own model if none is given."""
    return [
        Cell(task, contender, model or TASKS[task].model)
        for task in tasks
        for contender in contenders
    ]


CORE_TASKS = ("digits_few", "digits_noisy", "finetune")
GRIDS = {
    "core": cells(CORE_TASKS, CORE),
    "compact": cells(CORE_TASKS, ("none", "early stopping", "dropout", *COMPACT)),
    # What a run that skips work needs to be as good.
    "speed": [
        *cells(("digits_all",), ("none", *SAVING), model="vit_wide/4"),
        *cells(("finetune",), ("none", *SAVING), model="vit_wide/4"),
        *cells(("digits_few",), ("none", *SAVING), model="resnet_wide"),
    ],
}


def trials(cell: Cell) -> list[Trial]:
    """Every contender tries the same learning rates and weight decays, and its own rates."""
    contender = CONTENDERS[cell.contender]
    (low, high), (least, most) = RANGES
    found = []
    for x, y, z, w in qmc.Sobol(4, rng=0).random(TRIALS):
        rate = contender.rates[int(z * len(contender.rates))]
        dropout = contender.dropout[int(w * len(contender.dropout))]
        numbers = low * (high / low) ** x, least * (most / least) ** y
        found.append((_program(cell, rate, dropout), *(float(f"{n:.3g}") for n in numbers)))
    return found


def nearby(cell: Cell, best: Trial) -> list[Trial]:
    """Other numbers where a contender did best, and its other rates there.

    `trials` ties each rate to a few of the numbers. A contender that has no rate of its own gets
    more numbers instead. Where no contender chooses a rate, all have tried the same, and that is
    enough.
    """
    if cell in GRIDS["speed"]:
        return []
    program, learning_rate, weight_decay = best
    others = [x for x in CONTENDERS[cell.contender].rates if x != program.rate]
    moves = [(0.5, 1), (2, 1), (1, 2)] + [(1, 0.5), (2, 2), (0.5, 2)] * (not others)
    return [(program, x * learning_rate, y * weight_decay) for x, y in moves] + [
        (program._replace(rate=rate), learning_rate, weight_decay) for rate in others
    ]


def tuning_jobs(cell: Cell, runs: Runs) -> list[Job]:
    """All settings with a few seeds; when these are done, the best with more, then those nearby."""
    jobs = [_tuning(trial, seed) for trial in trials(cell) for seed in TUNING_SEEDS]
    if all(job in runs for job in jobs):
        finalists = _finalists(cell, runs)
        jobs += [_tuning(trial, seed) for trial in finalists for seed in MORE_SEEDS]
        if all(job in runs for job in jobs):
            near = nearby(cell, _best(finalists, runs))
            jobs += [_tuning(trial, seed) for trial in near for seed in ALL_SEEDS]
    return jobs


def final_jobs(cell: Cell, runs: Runs) -> list[Job]:
    """With what tuning has chosen; none until it has."""
    if not all(job in runs for job in tuning_jobs(cell, runs)):
        return []
    finalists = _finalists(cell, runs)
    near = nearby(cell, _best(finalists, runs))
    program, *numbers = _best([*finalists, *near], runs)
    return [Job(program, Settings(seed, *numbers)) for seed in SEEDS]


def _finalists(cell: Cell, runs: Runs) -> list[Trial]:
    return _ranked(trials(cell), TUNING_SEEDS, runs)[-FINALISTS:]


def _best(tried: Sequence[Trial], runs: Runs) -> Trial:
    return _ranked(tried, ALL_SEEDS, runs)[-1]


def _ranked(tried: Sequence[Trial], seeds: Sequence[int], runs: Runs) -> list[Trial]:
    """From the worst to the best."""
    return sorted(tried, key=lambda trial: mean_score(trial, seeds, runs))


def mean_score(trial: Trial, seeds: Sequence[int], runs: Runs) -> Any:
    """The score of mean accuracy and mean likelihood on validation images."""
    found = [runs[_tuning(trial, seed)] for seed in seeds]

    def mean(name):
        return float(np.mean([run[f"validation_{name}"] for run in found]))

    return score({"accuracy": mean("accuracy"), "nll": mean("nll")})


def _tuning(trial: Trial, seed: int) -> Job:
    program, *numbers = trial
    return Job(program, Settings(seed, *numbers), tunes=True)


def _program(cell: Cell, rate: float, dropout: float, ablation: bool = False) -> Program:
    return Program(cell.task, cell.contender, cell.model, cell.optimizer, rate, dropout, ablation)


MASKED = [cell for cell in GRIDS["core"] if cell.contender.startswith("CDB")]


def unmasked_jobs(cell: Cell, runs: Runs) -> list[Job]:
    """What was chosen for a cell, Dropout included, with the mask alone taken out."""

    def unmasked(program: Program) -> Program:
        contender = "dropout" if program.dropout else "none"
        return program._replace(contender=contender, rate=program.dropout, dropout=0.0)

    return [job._replace(program=unmasked(job.program)) for job in final_jobs(cell, runs)]


ABLATED = Cell("digits_noisy", "CDB before", TASKS["digits_noisy"].model)
ABLATION_RATE = 0.5


def ablation_jobs(name: str, runs: Runs) -> list[Job]:
    """All at the learning rate and weight decay that were chosen for the row they change."""
    program = _program(ABLATED._replace(contender=name), ABLATION_RATE, 0.0, ablation=True)
    return [Job(program, job.settings) for job in final_jobs(ABLATED, runs)]
