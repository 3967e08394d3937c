"""What a saving costs in accuracy: 60,000 real images, and every method that saves work.

    apt install dataset-fashion-mnist
    python benchmarks/evidence/fashion.py           # eight hours on two cores
    python benchmarks/evidence/fashion.py --models vit_48/7 --tasks fashion_few
    python benchmarks/evidence/fashion_report.py    # the tables, from the runs there are

Fashion-MNIST with 2,000 and 58,000 training images, clean and with 30 % of the labels redrawn, a
small ResNet and a small ViT. Each method has one setting, and the same learning rates are tried of
all, the baseline included: three, and then further ones while the best is the first or the last.
The best mean accuracy on 2,000 validation images wins. Then it is run with other seeds, which share
images, order and first weights with the baseline's runs of the same seeds.

Each run is a line of `results/fashion-<device>.csv` as soon as it ends; stopped, the same command
continues.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paths  # noqa: F401
from contenders import CONTENDERS, FASHION
from grid import Job, Runs
from overhead import results_file
from run import execute, read, start
from trial import Program, Settings

MODELS = ("vit_48/7", "resnet_8")
FEW, ALL = ("fashion_few", "fashion_few_noisy"), ("fashion_all", "fashion_all_noisy")
BASELINE = "none"
# Too few epochs for LayerDropBack, which drops in epochs 2, 4, 6, ..., and for stopping early. What
# saves nothing is left out of the long runs too, but for Dropout.
LONG = (
    BASELINE,
    "Dropout 0.2",
    "stochastic depth 0.4, part of the batch",
    "drop_backward 0.5",
    "window 0.5, skipped",
    "window 0.75, skipped",
    "whole layers 0.5, skipped",
    "compact, 1/2",
    "compact, 1/4",
)
ARMS = dict.fromkeys(FEW, (BASELINE, "early stopping", *FASHION)) | dict.fromkeys(ALL, LONG)
LADDER = tuple(float(f"{3e-3 * 3.0**i:.2g}") for i in range(-5, 5))
FIRST = LADDER[5:8]
WEIGHT_DECAY = 5e-2
TUNING_SEEDS = dict.fromkeys(FEW, range(2)) | dict.fromkeys(ALL, range(1))
# Of sign flips of eight seeds, nine comparisons can be significant.
SEEDS = dict.fromkeys(FEW, range(1000, 1010)) | dict.fromkeys(ALL, range(1000, 1008))


def program_of(task: str, model: str, arm: str) -> Program:
    return Program(task, arm, model, "adamw", CONTENDERS[arm].rates[0])


def tuning_jobs(program: Program, runs: Runs) -> tuple[list[Job], float | None]:
    """The runs that tuning needs so far, and the learning rate it chooses when they are done."""
    tried = list(FIRST)
    while True:
        jobs = {
            rate: _jobs(program, TUNING_SEEDS[program.task], rate, tunes=True) for rate in tried
        }
        if not all(job in runs for job in itertools.chain(*jobs.values())):
            return list(itertools.chain(*jobs.values())), None
        scores = {
            rate: np.mean([runs[job]["validation_accuracy"] for job in own])
            for rate, own in jobs.items()
        }
        best = max(tried, key=lambda rate: scores[rate])
        further = {min(tried): -1, max(tried): 1}.get(best)
        place = LADDER.index(best) + (further or 0)
        if further is None or not 0 <= place < len(LADDER):
            return list(itertools.chain(*jobs.values())), best
        tried.append(LADDER[place])


def _jobs(program: Program, seeds: Sequence[int], rate: float, *, tunes: bool) -> list[Job]:
    return [Job(program, Settings(seed, rate, WEIGHT_DECAY), tunes=tunes) for seed in seeds]


def final_jobs(program: Program, runs: Runs) -> list[Job]:
    """The runs of the comparison; none until tuning is done."""
    _, rate = tuning_jobs(program, runs)
    return [] if rate is None else _jobs(program, SEEDS[program.task], rate, tunes=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = list(dict.fromkeys(itertools.chain(*ARMS.values())))
    parser.add_argument("--tasks", nargs="+", choices=ARMS, default=[*ARMS], metavar="TASK")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--arms", nargs="+", choices=every, default=every, metavar="ARM")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=results_file("fashion").with_suffix(".csv"))
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    )
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path("runs/evidence/cache").absolute())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    start(arguments.output)
    for task, model in itertools.product(arguments.tasks, arguments.models):
        arms = [arm for arm in ARMS[task] if arm in arguments.arms]
        programs = [program_of(task, model, arm) for arm in arms]
        while True:
            runs = read(arguments.output)
            jobs = [x for program in programs for x in tuning_jobs(program, runs)[0]]
            jobs += [x for program in programs for x in final_jobs(program, runs)]
            if set(jobs) <= set(runs):
                break
            execute(jobs, arguments.output, arguments.workers, f"{task}, {model}")


if __name__ == "__main__":
    main()
