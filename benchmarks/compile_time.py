"""How long a training step takes to trace and to compile with skipping, against the full step.

All variants are traced and compiled in turns in one process. Ratios are to the full step of the
same round; shown is their median over the rounds, and their range. CPU time counts all threads of
the process, so it hardly depends on what else runs.

    python benchmarks/compile_time.py                                # half an hour, 2 cores
    python benchmarks/compile_time.py --steps vit_s/16:64:64 --rounds 3

Prints a Markdown table and writes `results/compile-time-<device>.json`, where rows of other steps
taken on the same machine with the same versions, stay. Needs jax, flax, optax, numpy.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from overhead import parse_step, publish, results_file, with_earlier  # Sets the path.
from skipping import Task, Variant, variants

STEPS = ("vit_s/16:64:64", "resnet18:64:8", "resnet50:64:8")
VARIANTS = (
    "mask alone, window 0.5",
    "window 0.5",
    "window 0.5, input channels",
    "exact 0.5",
    "whole layers 0.5",
    "one layer, others frozen",
    "window 0.5, compact",
)


def seconds(task: Task, variant: Variant | None) -> dict[str, float]:
    """The time that one step takes to trace and to compile."""
    train, arguments = task.training_step(variant)
    jax.clear_caches()
    start, cpu_start = time.perf_counter(), time.process_time()
    lowered = jax.jit(train).lower(*arguments, jnp.int32(0))
    traced, cpu_traced = time.perf_counter(), time.process_time()
    lowered.compile()
    return {
        "trace": traced - start,
        "compile": time.perf_counter() - traced,
        "cpu": time.process_time() - cpu_traced,
        "total": time.perf_counter() - start,
        "total_cpu": time.process_time() - cpu_start,
    }


def compare(task: Task, chosen: list[Variant], rounds: int) -> list[dict[str, Any]]:
    every = [None, *chosen]  # None is the full step.
    found: list[list[dict[str, float]]] = [[] for _ in every]
    seconds(task, None)  # What only the first trace of a process does is done.
    for i in range(rounds):
        for j in np.random.default_rng(i).permutation(len(every)):
            found[j].append(seconds(task, every[j]))
    full, *others = found
    rows = []
    for variant, times in zip(chosen, others, strict=True):
        row: dict[str, Any] = {"task": task.name, "variant": variant.name, "rounds": rounds}
        for key in full[0]:
            ratios = [x[key] / base[key] for x, base in zip(times, full, strict=True)]
            row[key] = [float(np.median(ratios)), min(ratios), max(ratios)]
        row["full_seconds"] = float(np.median([base["total"] for base in full]))
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| training step | gradient | tracing | compilation | both | both, CPU time |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        ratios = [row[key] for key in ("trace", "compile", "total", "total_cpu")]
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*x) for x in ratios]
        lines.append("| " + " | ".join([row["task"], row["variant"], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = [parse_step(x) for x in STEPS]
    help_ = "model:image size:batch size"
    parser.add_argument("--steps", nargs="*", type=parse_step, default=steps, help=help_)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results_file("compile-time"))
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # It would hide what is to be timed.
    rows = []
    for name, size, batch in args.steps:
        task = Task(name, size, batch, args.optimizer, "float32")
        chosen = [x for x in variants([0.5], [0.5]) if x.name in args.variants]
        rows += compare(task, chosen, args.rounds)
    rows = with_earlier(args.output, rows)
    publish(args.output, table(rows), rows)


if __name__ == "__main__":
    main()
