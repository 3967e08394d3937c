"""Tables and figures from the runs of the evidence.

    python benchmarks/evidence/report.py --runs benchmarks/results/evidence-cpu.csv

Differences are to the tuned baseline, paired by seed: same images, same order, same first weights.
Intervals are bootstrap intervals over seeds; p values come from flipping the signs of the
differences at random, corrected for all comparisons of a grid by Holm's method.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
    str(HERE.parent.parent),
    str(HERE.parent.parent / "examples"),
]

matplotlib.use("Agg")
from contenders import ABLATIONS  # noqa: E402
from grid import ABLATED, GRIDS, SEEDS, Cell, Row, runs_of  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from overhead import results_file  # noqa: E402
from run import read  # noqa: E402

RESAMPLES = 20_000
BASELINE, ABLATION_BASELINE = "none", "before"
MEASURES = ("accuracy", "nll", "ece")


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and its bootstrap 95 % interval over seeds."""
    if np.ptp(values) == 0:
        return (float(values[0]),) * 3
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=0).confidence_interval
    return float(values.mean()), float(found.low), float(found.high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided, that the mean is zero: exact up to resampling if signs are exchangeable."""
    if not differences.any():
        return 1.0
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=0,
    )
    return float(test.pvalue)


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number by the step-down method of Holm (1979)."""
    order = np.argsort(values)
    scaled = np.array(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.tolist()


def finals(cell: Cell, runs: Sequence[Row], ablation: bool = False) -> list[Row]:
    """The runs with the chosen setting, in order of seeds; none until all are there."""
    found = [run for run in runs_of(cell, runs, ablation) if run["trial"] < 0]
    found.sort(key=lambda run: run["seed"])
    return found if [run["seed"] for run in found] == list(SEEDS) else []


def column(runs: Sequence[Row], name: str) -> np.ndarray:
    return np.array([run[name] for run in runs])


def compare(
    cells: Sequence[Cell], runs: Sequence[Row], baseline: str = BASELINE, ablation: bool = False
) -> list[Row]:
    """One row for each cell: the chosen setting, the measures, and their differences."""
    rows = []
    for cell in cells:
        own = finals(cell, runs, ablation)
        base = finals(cell._replace(contender=baseline), runs, ablation)
        if not own or not base:
            rows.append(cell._asdict() | {"run": False})
            continue
        row = cell._asdict() | {"run": True, "flops": own[0]["flops"] / base[0]["flops"]}
        row |= {x: own[0][x] for x in ("learning_rate", "weight_decay", "rate", "dropout")}
        for measure in MEASURES:
            values = column(own, f"test_{measure}")
            differences = values - column(base, f"test_{measure}")
            row[measure] = interval(values)
            row[f"{measure}_difference"] = interval(differences)
            if measure == "accuracy" and cell.contender != baseline:
                row["p"] = p_value(differences)
        rows.append(row)
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p_corrected"] = p
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A table for each task."""
    text = []
    for task in dict.fromkeys((row["task"], row["model"], row["optimizer"]) for row in rows):
        text += [f"**{task[0]}**, {task[1]}, {task[2]}", ""]
        text.append(
            "| method | accuracy, % | difference, points | p | NLL, difference | "
            "ECE, difference | FLOPs | chosen |"
        )
        text.append("| --- " * 8 + "|")
        for row in rows:
            if (row["task"], row["model"], row["optimizer"]) != task:
                continue
            if not row["run"]:
                text.append(f"| {row['contender']} | *not run* " + "| " * 6 + "|")
                continue
            same = "p" not in row
            setting = f"lr {row['learning_rate']:.2g}, decay {row['weight_decay']:.2g}"
            setting += f", rate {row['rate']:g}" * (row["rate"] > 0)
            setting += f", dropout {row['dropout']:g}" * (row["dropout"] > 0)
            cells = [
                row["contender"],
                f"{100 * row['accuracy'][0]:.2f}",
                "" if same else difference(row["accuracy_difference"], 100, 2),
                "" if same else p_text(row["p_corrected"]),
                f"{row['nll'][0]:.3f}" if same else difference(row["nll_difference"], 1, 3),
                f"{row['ece'][0]:.3f}" if same else difference(row["ece_difference"], 1, 3),
                f"{row['flops']:.2f}",
                setting,
            ]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def difference(values: tuple[float, float, float], factor: float, digits: int) -> str:
    mean, low, high = (factor * x for x in values)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def draw(rows: Sequence[Row], file: Path, title: str) -> None:
    """Differences in accuracy and their intervals, a panel for each task."""
    rows = [row for row in rows if row["run"] and "p" in row]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = pyplot.subplots(
        1,
        len(tasks),
        figsize=(3.4 * len(tasks) + 1.6, 0.36 * len(names) + 1.4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for panel, task in zip(axes[0], tasks, strict=True):
        for row in rows:
            if row["task"] != task:
                continue
            mean, low, high = (100 * x for x in row["accuracy_difference"])
            color = "0.6" if row["p_corrected"] >= 0.05 else "C2" if mean > 0 else "C3"
            position = names.index(row["contender"])
            panel.plot([low, high], [position] * 2, color=color, linewidth=2)
            panel.plot(mean, position, "o", color=color)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(task.replace("_", " "))
        panel.set_xlabel("points of test accuracy")
        panel.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=results_file("evidence").with_suffix(".csv"))
    arguments = parser.parse_args()
    runs = read(arguments.runs)
    results, text = {}, []
    for grid, cells in GRIDS.items():
        # A baseline that another grid has run is the same.
        shared = [cell._replace(contender=BASELINE) for cell in cells]
        results[grid] = compare(list(dict.fromkeys([*shared, *cells])), runs)
        text += [f"## {grid}", "", markdown(results[grid])]
        if any("p" in row for row in results[grid]):
            title = "Against the tuned baseline (coloured where p < 0.05, corrected)"
            draw(results[grid], arguments.runs.with_name(f"evidence-{grid}.png"), title)
    cells = [ABLATED._replace(contender=name) for name in ABLATIONS]
    results["ablation"] = compare(cells, runs, ABLATION_BASELINE, ablation=True)
    text += ["## ablation", "", markdown(results["ablation"])]
    about = json.loads(arguments.runs.with_suffix(".json").read_text())
    output = arguments.runs.with_name(arguments.runs.stem + "-summary.json")
    output.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    arguments.runs.with_suffix(".md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
