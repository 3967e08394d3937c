"""What each method costs in accuracy on Fashion-MNIST, and what it saves: tables and figures.

    python benchmarks/evidence/fashion_report.py               # twenty quiet minutes on two cores
    python benchmarks/evidence/fashion_report.py --rounds 0    # further runs, the old times

Three answers for each method, from the runs of `fashion.py`:

- the accuracy at the end, against AdamW: the mean difference, its bootstrap interval, and the p of
  a one-sided sign-flip test that 0.3 points or more are lost, corrected by Holm's method;
- the time until its mean accuracy reaches the baseline's at the end, less 0.3 points: the time of a
  step, of all methods in turns in one process, times the steps;
- the memory of parameters, gradient and optimizer state, and the peak of a step that updates in
  place.

Writes `results/fashion-<device>.json`, four figures with the same name, and the tables of
`docs/evidence.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import paths
from fashion import ARMS, BASELINE, LADDER, MODELS, final_jobs, program_of
from grid import Job, Row, Runs
from overhead import fill, machine, publish, results_file, versions
from report import correct, difference, finals, header, p_text
from run import read
from tasks import TASKS
from time_to_accuracy import MARGIN, finite, three, time_steps, to_baseline
from trial import Program, Settings, functions, peak as peak_bytes

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.style.use(paths.BENCHMARKS.parent / "examples/figures.mplstyle")
PAGE = paths.BENCHMARKS.parent / "docs/evidence.md"
TASK_LABELS = {
    "fashion_few": "2,000 images",
    "fashion_few_noisy": "2,000 images, 30 % wrong labels",
    "fashion_all": "58,000 images",
    "fashion_all_noisy": "58,000 images, 30 % wrong labels",
}
MODEL_LABELS = dict(zip(MODELS, ("ViT", "ResNet"), strict=True))
# It trains like the baseline, and then returns to an earlier state.
SAME_STEP = {"early stopping": BASELINE}
Jobs = dict[str, list[Job]]  # By method.
Times = dict[str, dict[str, list[float]]]  # Of a step, in each round, by model and method.


class Costs(NamedTuple):
    """What a step costs: seconds in each round of timing, and bytes."""

    seconds: np.ndarray
    state: int
    peak: int


def complete(runs: Runs) -> dict[str, dict[str, Jobs]]:
    """By model and task, the methods whose runs are all there, the baseline among them."""
    done: dict[str, dict[str, Jobs]] = {}
    for model, (task, arms) in itertools.product(MODELS, ARMS.items()):
        jobs = {arm: final_jobs(program_of(task, model, arm), runs) for arm in arms}
        jobs = {arm: own for arm, own in jobs.items() if finals(own, runs)}
        if BASELINE in jobs and len(jobs) > 1:
            done.setdefault(model, {})[task] = jobs
    return done


def steps(tasks: dict[str, Jobs]) -> dict[str, Job]:
    """A job for each step of a model. What it costs does not depend on the images."""
    found = {arm: own[0] for jobs in tasks.values() for arm, own in jobs.items()}
    return {arm: job for arm, job in found.items() if arm not in SAME_STEP}


def compare(done: dict[str, dict[str, Jobs]], runs: Runs, times: Times) -> list[Row]:
    """A row for each method, task and model."""
    rows = []
    for model, tasks in done.items():
        costs = {
            arm: Costs(
                np.array(times[model][arm]), state_bytes(job.program), peak_bytes(job.program)
            )
            for arm, job in steps(tasks).items()
        }
        costs |= {arm: costs[other] for arm, other in SAME_STEP.items()}
        for task, jobs in tasks.items():
            rows += rows_of(task, model, jobs, runs, costs)
    return sorted(rows, key=lambda row: list(ARMS).index(row["task"]))


def earlier_times(file: Path, done: dict[str, dict[str, Jobs]]) -> Times:
    """The times in a report of this machine and these versions."""
    report = json.loads(file.read_text()) if file.exists() else {}
    if not {"machine": machine(), "versions": versions()}.items() <= report.items():
        raise SystemExit(f"error: {file} is not from this machine with these versions.")
    times = report.get("seconds", {})
    needed = {(model, arm) for model, tasks in done.items() for arm in steps(tasks)}
    missing = {arm for model, arm in needed if arm not in times.get(model, {})}
    if missing:
        raise SystemExit(f"error: {file} has no times of {', '.join(sorted(missing))}.")
    return times


def state_bytes(program: Program) -> int:
    """Bytes of parameters, gradient and optimizer state."""
    (initial, _, _), _ = functions(program)
    state = jax.eval_shape(initial, Settings(0, 0.0, 0.0).arrays())
    parameters, moments = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state)
    )
    # AdamW has two moments, each of the size of the gradient.
    return parameters + moments + moments // 2


def rows_of(
    task: str, model: str, jobs: dict[str, list[Job]], runs: Runs, costs: dict[str, Costs]
) -> list[Row]:
    rows, base = [], costs[BASELINE]
    for arm, own in jobs.items():
        rate = own[0].settings.learning_rate
        row = {"task": task, "model": model, "arm": arm, "run": True}
        row |= {"is_baseline": arm == BASELINE, "seeds": len(own)}
        row |= {"learning_rate": rate, "at_edge": rate in (LADDER[0], LADDER[-1])}
        row |= {"state": costs[arm].state / base.state, "peak": costs[arm].peak / base.peak}
        ratios = costs[arm].seconds / base.seconds
        row |= to_baseline(finals(own, runs), finals(jobs[BASELINE], runs), ratios)
        # The compiler counts the dearer side of a conditional, so its FLOPs are not compared.
        del row["flops"], row["flops_against_baseline"]
        rows.append(row)
    correct(rows)
    return rows


# Tables.


def table(rows: Sequence[Row]) -> str:
    """All that was measured, a line for each method, task and model."""
    names = ("task, model", "method", "accuracy, %", "difference, points", "p of a loss, Holm")
    names += ("time of a step", "time to the baseline's accuracy")
    names += ("parameters, gradient, state", "peak memory", "learning rate")
    lines = [header(names)]
    for row in rows:
        cells = [f"{row['task']}, {row['model']}", row["arm"], f"{100 * row['accuracy'][0]:.2f}"]
        if row["is_baseline"]:
            cells += ["", ""]
        else:
            cells += [difference(row["difference"], 100, 2), p_text(row["p_corrected"])]
        cells += [three(row["step_time"]), time_cell(row)]
        cells += [f"{row['state']:.2f}", f"{row['peak']:.2f}"]
        cells.append(f"{row['learning_rate']:g}" + (" †" if row["at_edge"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_cell(row: Row) -> str:
    """Bold where a loss of 0.3 points or more is excluded."""
    if row["is_baseline"]:
        return f"{100 * row['accuracy'][0]:.2f} %"
    text = difference(row["difference"], 100, 2)
    return f"**{text}**" if row["p_corrected"] < 0.05 else text


def time_cell(row: Row) -> str:
    return "1" if row["is_baseline"] else three(row["time_against_baseline"])


def by_task(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """A line for each method, a column for each task and model."""
    places = list(dict.fromkeys((row["task"], row["model"]) for row in rows))
    found = {(row["arm"], row["task"], row["model"]): row for row in rows}
    labels = [f"{MODEL_LABELS[model]}, {TASK_LABELS[task]}" for task, model in places]
    lines = [header(["", *labels])]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [found.get((arm, *place)) for place in places]
        cells = [cell(row) if row else "" for row in own]
        lines.append("| " + " | ".join([label_of(arm), *cells]) + " |")
    return "\n".join(lines)


def by_model(rows: Sequence[Row]) -> str:
    """The time and the memory of a step, relative to the baseline's."""
    first = {(row["arm"], row["model"]): row for row in reversed(rows)}
    models = list(dict.fromkeys(row["model"] for row in rows))
    titles = ("time of a step", "parameters, gradient, state", "peak memory")
    lines = [header(["", *(f"{MODEL_LABELS[x]}: {title}" for x in models for title in titles)])]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for row in (first.get((arm, model)) for model in models):
            if row is None:
                cells += ["", "", ""]
            else:
                time = "1" if arm in (BASELINE, *SAME_STEP) else three(row["step_time"])
                cells += [time, f"{row['state']:.2f}", f"{row['peak']:.2f}"]
        lines.append("| " + " | ".join([label_of(arm), *cells]) + " |")
    return "\n".join(lines)


def label_of(arm: str) -> str:
    return "AdamW alone" if arm == BASELINE else arm


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The tables of `docs/evidence.md`, by the names that it gives them."""
    return {
        "fashion accuracy": by_task(rows, accuracy_cell),
        "fashion time": by_task(rows, time_cell),
        "fashion costs": by_model(rows),
    }


# Figures.


def draw(rows: Sequence[Row], file: Path, key: str, label: str) -> None:
    """Differences in accuracy against what a step costs, a panel for each task and model.

    Left is cheaper. Within the grey band, accuracy differs by less than the margin. Methods that
    take the memory of the baseline would all lie on one line, and are left out.
    """
    if key != "step_time":
        rows = [row for row in rows if row["is_baseline"] or abs(row[key] - 1) > 0.005]
    figure, panels = panels_of(rows, height=3.3, margin=1.6)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for panel, own in panels:
        draw_panel(panel, own, arms, key)
        panel.set(xlabel=label, ylabel="difference in test accuracy (points)")
    shown = {}
    for panel, _ in panels:
        shown |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)
    pyplot.close(figure)


def panels_of(
    rows: Sequence[Row], *, height: float, margin: float
) -> tuple[Any, list[tuple[Any, list[Row]]]]:
    """A figure with a panel for each task and model, and the rows of each."""
    places = list(dict.fromkeys((row["task"], row["model"]) for row in rows))
    columns = min(2, len(places))
    lines = -(-len(places) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(max(9, 5.5 * columns), height * lines + margin), squeeze=False
    )
    panels = []
    for panel, (task, model) in zip(axes.flat, places, strict=False):
        panel.set_title(f"{MODEL_LABELS[model]}, {TASK_LABELS[task]}", fontsize="medium")
        own = [row for row in rows if (row["task"], row["model"]) == (task, model)]
        panels.append((panel, own))
    for panel in axes.flat[len(places) :]:
        panel.set_axis_off()
    return figure, panels


def draw_panel(panel: Any, rows: Sequence[Row], arms: Sequence[str], key: str) -> None:
    panel.axhspan(-100 * MARGIN, 100 * MARGIN, color="0.92", zorder=0)
    for row in rows:
        number = arms.index(row["arm"])
        # No two methods have both in common.
        color, marker = f"C{number % 6}", "os^Dv<>P*X"[number % 10]
        x, left, right = row[key] if isinstance(row[key], tuple) else (row[key],) * 3
        y, low, high = (100 * value for value in row["difference"])
        panel.plot([x, x], [low, high], color=color, linewidth=1.2)
        panel.plot([left, right], [y, y], color=color, linewidth=1.2)
        # Early stopping may lie on the baseline, which is a ring around it.
        look = dict(markersize=12, fillstyle="none", zorder=3) if row["is_baseline"] else {}
        panel.plot(x, y, marker, color=color, label=label_of(row["arm"]), **look)


def draw_times(rows: Sequence[Row], file: Path) -> None:
    """The time until each method has the baseline's accuracy; an arrow if it never has."""
    arms = list(dict.fromkeys(row["arm"] for row in rows if not row["is_baseline"]))
    figure, panels = panels_of(rows, height=0.25 * len(arms) + 0.9, margin=0.4)
    limits = 0.5, 1.3
    for number, (panel, own) in enumerate(panels):
        panel.axvline(1.0, color="0.6", linewidth=1, zorder=0)
        for row in own:
            if not row["is_baseline"]:
                draw_time(panel, arms.index(row["arm"]), row["time_against_baseline"], limits)
        panel.set(xlim=limits, ylim=(len(arms) - 0.5, -0.5))
        # The left column has the names.
        names = ["" if number % 2 else label_of(arm) for arm in arms]
        panel.set_yticks(range(len(arms)), names, fontsize="small")
        panel.set_xlabel("time to the baseline's accuracy,\nrelative to the baseline's own")
    figure.savefig(file)
    pyplot.close(figure)


def draw_time(
    panel: Any, line: int, interval: Sequence[float], limits: tuple[float, float]
) -> None:
    reached = [value is not None and np.isfinite(value) for value in interval]
    middle, low, high = (
        value if there else limits[1] for value, there in zip(interval, reached, strict=True)
    )
    if reached[1]:
        panel.plot([low, high], [line, line], color="C0", linewidth=1.2)
    panel.plot(
        middle, line, "o" if reached[0] else ">", color="C0" if reached[0] else "0.6", clip_on=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=results_file("fashion").with_suffix(".csv"))
    parser.add_argument("--rounds", type=int, default=20, help="of timing; 0: as last time")
    arguments = parser.parse_args()
    runs, output = read(arguments.runs), arguments.runs.with_suffix(".json")
    done = complete(runs)
    if not done:
        raise SystemExit(f"error: {arguments.runs} has no comparison whose runs are all there.")
    if arguments.rounds:
        times = {model: time_steps(steps(x), arguments.rounds) for model, x in done.items()}
        times = {model: {arm: x.tolist() for arm, x in own.items()} for model, own in times.items()}
    else:
        times = earlier_times(output, done)
    rows = compare(done, runs, times)
    settings = dict(margin=MARGIN, steps={task: TASKS[task].steps for task in ARMS})
    publish(output, table(rows), finite(rows), **settings, seconds=times)
    for name, key, cost in (
        ("time", "step_time", "time of the run"),
        ("memory", "state", "parameters, gradient and state"),
        ("peak", "peak", "peak memory of a step"),
    ):
        file = output.with_name(f"{output.stem}-{name}.png")
        draw(rows, file, key, f"{cost}, relative to AdamW alone")
    draw_times(rows, output.with_name(f"{output.stem}-to-accuracy.png"))
    if output.resolve() == paths.BENCHMARKS / "results/fashion-cpu.json":
        PAGE.write_text(fill(PAGE.read_text(), tables(rows).get))


if __name__ == "__main__":
    main()
