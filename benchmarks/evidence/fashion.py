"""What a saving costs in accuracy: 60,000 real images, and every method that saves work.

    apt install dataset-fashion-mnist
    python benchmarks/evidence/fashion.py              # eight hours on two cores
    python benchmarks/evidence/fashion.py --models vit_48/7 --tasks fashion_few
    python benchmarks/evidence/fashion.py --report     # the tables, from the runs there are

Fashion-MNIST with 2,000 and 58,000 training images, clean and with 30 % of the labels redrawn, a
small ResNet and a small ViT. Each method has one setting, and the same learning rates are tried of
all, the baseline included: three, and then further ones while the best is the first or the last.
The best mean accuracy on 2,000 validation images wins. Then it is run with other seeds, which share
images, order and first weights with the baseline's runs of the same seeds.

Three answers for each method:

- the accuracy at the end, against AdamW: the mean difference, its bootstrap interval, and the p of
  a one-sided sign-flip test that 0.3 points or more are lost, corrected by Holm's method;
- the time until its mean accuracy reaches the baseline's at the end, less 0.3 points: the time of a
  step, of all methods in turns in one process, times the steps;
- the memory of parameters, gradient and optimizer state, and the peak of a step.

Each run is a line of `results/fashion-<device>.csv` as soon as it ends; stopped, the same command
continues. Writes `results/fashion-<device>.json`, its figures, and the tables of
`docs/evidence.md`.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import paths
from contenders import CONTENDERS, FASHION
from fashion_report import PAGE, draw, table, tables
from grid import Job, Row, Runs
from overhead import fill, publish, results_file
from report import correct, finals
from run import execute, read, start
from tasks import TASKS
from time_to_accuracy import MARGIN, finite, time_steps, to_baseline
from trial import Program, Settings, compiled

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


def compare(task: str, model: str, runs: Runs, rounds: int) -> list[Row]:
    """A row for each method whose runs are all there, if the baseline's are."""
    jobs = {arm: final_jobs(program_of(task, model, arm), runs) for arm in ARMS[task]}
    done = {arm: finals(own, runs) for arm, own in jobs.items()}
    done = {arm: own for arm, own in done.items() if own}
    if BASELINE not in done:
        return []
    seconds = time_steps({arm: jobs[arm][0] for arm in done}, rounds)
    needed = {arm: memory(jobs[arm][0].program) for arm in done}
    rows = []
    for arm, own in done.items():
        rate = own[0]["learning_rate"]
        about = {"task": task, "model": model, "arm": arm, "learning_rate": rate}
        about |= {"at_edge": rate in (LADDER[0], LADDER[-1])}
        about |= {"run": True, "is_baseline": arm == BASELINE}
        about |= {name: x / needed[BASELINE][name] for name, x in needed[arm].items()}
        rows.append(about | to_baseline(own, done[BASELINE], seconds[arm] / seconds[BASELINE]))
    correct(rows)
    return rows


def memory(program: Program) -> dict[str, int]:
    """Bytes of parameters, gradient and optimizer state, and the peak of a step."""
    parts = compiled(program)
    state = jax.eval_shape(parts.initial, Settings(0, 0.0, 0.0).arrays())
    parameters, moments = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state)
    )
    # AdamW has two moments, each of the size of the gradient.
    needed = parameters + moments + moments // 2
    return {"state": needed, "peak": parts.peak()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    every = list(dict.fromkeys(itertools.chain(*ARMS.values())))
    parser.add_argument("--arms", nargs="+", choices=every, default=every, metavar="ARM")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--rounds", type=int, default=20, help="of timing")
    parser.add_argument("--output", type=Path, default=results_file("fashion"))
    arguments = parser.parse_args()
    file = arguments.output.with_suffix(".csv")
    if not arguments.report:
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
        )
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path("runs/evidence/cache").absolute())
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        start(file)
        for task, model in itertools.product(arguments.tasks, arguments.models):
            arms = [arm for arm in ARMS[task] if arm in arguments.arms]
            programs = [program_of(task, model, arm) for arm in arms]
            while True:
                runs = read(file)
                jobs = [x for program in programs for x in tuning_jobs(program, runs)[0]]
                jobs += [x for program in programs for x in final_jobs(program, runs)]
                if set(jobs) <= set(runs):
                    break
                execute(jobs, file, arguments.workers, f"{task}, {model}")
    runs = read(file)
    rows = [
        row
        for task, model in itertools.product(arguments.tasks, arguments.models)
        for row in compare(task, model, runs, arguments.rounds)
    ]
    settings = {"margin": MARGIN, "steps": {task: TASKS[task].steps for task in ARMS}}
    publish(arguments.output, table(rows), finite(rows), **settings)
    draw(rows, arguments.output)
    if arguments.output.resolve() == paths.BENCHMARKS / "results/fashion-cpu.json":
        PAGE.write_text(fill(PAGE.read_text(), tables(rows).get))


if __name__ == "__main__":
    main()
