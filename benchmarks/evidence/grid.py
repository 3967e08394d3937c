"""The runs of a grid: the settings that tuning tries, what it chooses, and what is run with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from contenders import ABLATIONS, CONTENDERS, CORE, SAVING
from scipy.stats import qmc
from tasks import TASKS
from trial import Program, Settings

TRIALS = 16  # Settings that are tried of every contender, the baseline included.
TUNING_SEEDS = range(3)
SEEDS = range(1000, 1020)  # None of those that tuning saw.
RANGES = {  # Of learning rate and weight decay, searched on logarithmic scales.
    "adamw": ((3e-4, 3e-2), (1e-3, 1.0)),
    "sgd": ((3e-3, 1.0), (1e-6, 1e-2)),
}


Row = dict[str, Any]  # A finished run: its settings and its metrics.
KEY = ("task", "model", "optimizer", "ablation", "contender", "trial", "seed")


class Job(NamedTuple):
    """One run. `trial` is the number of the setting that tuning tries; -1 is the chosen one."""

    program: Program
    settings: Settings
    trial: int = -1

    @property
    def key(self) -> tuple[Any, ...]:
        """What a finished run is recognised by, whatever was chosen for it."""
        return key_of({**self.program._asdict(), "trial": self.trial, "seed": self.settings.seed})


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


class Cell(NamedTuple):
    """A contender on a task, with a model and an optimizer: one row of a table."""

    task: str
    contender: str
    model: str
    optimizer: str = "adamw"


def cells(tasks: Sequence[str], contenders: Sequence[str], model: str = "", optimizer="adamw"):
    return [
        Cell(task, contender, model or TASKS[task].model, optimizer)
        for task in tasks
        for contender in contenders
    ]


CORE_TASKS = ("digits_few", "digits_noisy", "finetune")
GRIDS = {
    "core": cells(CORE_TASKS, CORE),
    "methods": cells(CORE_TASKS, [name for name in CONTENDERS if name not in (*CORE, *SAVING)]),
    "tasks": cells(("digits_all", "textures"), CORE),
    "sgd": cells(CORE_TASKS, CORE, optimizer="sgd"),
    # What a run that skips work needs to be as good.
    "speed": [
        *cells(("digits_all",), ("none", *SAVING), model="vit_wide/4"),
        *cells(("digits_noisy",), ("none", *SAVING), model="vit_wide/4"),
        *cells(("digits_all",), ("none", *SAVING), model="resnet_wide"),
    ],
    # For a GPU.
    "resnet18": cells((*CORE_TASKS, "digits_all", "textures"), CORE, model="resnet18"),
    "vit_ti": cells((*CORE_TASKS, "digits_all", "textures"), CORE, model="vit_ti/4"),
}


def tuning_jobs(cell: Cell) -> list[Job]:
    """Every contender tries the same learning rates and weight decays, and its own rates."""
    contender = CONTENDERS[cell.contender]
    (low, high), (least, most) = RANGES[cell.optimizer]
    jobs = []
    for trial, point in enumerate(qmc.Sobol(4, seed=0).random(TRIALS)):
        learning_rate, weight_decay = (
            float(f"{start * (stop / start) ** x:.3g}")
            for x, start, stop in zip(point, (low, least), (high, most), strict=False)
        )
        rate, dropout = (
            levels[int(x * len(levels))]
            for x, levels in zip(point[2:], (contender.rates, contender.dropout), strict=True)
        )
        program = Program(*_parts(cell), rate, dropout)
        jobs += [
            Job(program, Settings(seed, learning_rate, weight_decay), trial)
            for seed in TUNING_SEEDS
        ]
    return jobs


def chosen(cell: Cell, runs: Sequence[Row]) -> Row | None:
    """A run with the setting that has the best mean accuracy on validation images, then likelihood.

    None until all settings are tried.
    """
    found = [run for run in runs_of(cell, runs) if run["trial"] >= 0]
    if len(found) < TRIALS * len(TUNING_SEEDS):
        return None

    def score(trial: int) -> tuple[float, float]:
        same = [run for run in found if run["trial"] == trial]
        mean = lambda name: float(np.mean([run[name] for run in same]))
        return mean("validation_accuracy"), -mean("validation_nll")

    best = max(range(TRIALS), key=score)
    return next(run for run in found if run["trial"] == best)


def final_jobs(cell: Cell, best: Row) -> list[Job]:
    program = Program(*_parts(cell), best["rate"], best["dropout"])
    numbers = best["learning_rate"], best["weight_decay"]
    return [Job(program, Settings(seed, *numbers)) for seed in SEEDS]


ABLATED = Cell("digits_noisy", "CDB before", TASKS["digits_noisy"].model)
ABLATION_RATE = 0.5


def ablation_jobs(best: Row) -> list[Job]:
    """All at the learning rate and weight decay that were chosen for the row they change."""
    return [
        Job(
            Program(*_parts(ABLATED._replace(contender=name)), ABLATION_RATE, ablation=True),
            Settings(seed, best["learning_rate"], best["weight_decay"]),
        )
        for name in ABLATIONS
        for seed in SEEDS
    ]


def runs_of(cell: Cell, runs: Sequence[Row], ablation: bool = False) -> list[Row]:
    wanted = {**cell._asdict(), "ablation": ablation}
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def _parts(cell: Cell) -> tuple[str, str, str, str]:
    return cell.task, cell.contender, cell.model, cell.optimizer
