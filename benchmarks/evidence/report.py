"""Tables and figures from the runs of the evidence.

    python benchmarks/evidence/report.py

Differences are to the tuned baseline, paired by seed: same images, same order, same first weights.
Intervals are bootstrap intervals over seeds, p values those of all sign flips of the differences,
corrected by Holm's method for all comparisons that a grid plans, whether they are run or not. They
speak of the chosen settings and of these test images. Writes `evidence-<device>.md`, `.json`, and
a figure for each grid, next to the runs, and the tables of `docs/evidence.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import paths
from contenders import ABLATIONS, COMPACT, CONTENDERS
from grid import (
    ABLATED,
    GRIDS,
    MASKED,
    RANGES,
    SEEDS,
    TRIALS,
    Cell,
    Job,
    Row,
    Runs,
    ablation_jobs,
    final_jobs,
    trials,
    unmasked_jobs,
)
from overhead import fill, results_file
from run import read
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.style.use(paths.BENCHMARKS.parent / "examples/figures.mplstyle")
PAGE = paths.BENCHMARKS.parent / "docs/evidence.md"
RESAMPLES = 20_000
BASELINE, ABLATION_BASELINE = "none", "before"
# Other rows of a grid to compare with: does a mask, or learning a part at a time, do more than to
# train less, and does a mask add to Dropout?
RIVALS = {
    "core": {
        "early stopping": ("CDB before", "CDB after", "CDB frozen"),
        "dropout": ("CDB before", "CDB after", "CDB frozen", "CDB before + dropout"),
    },
    "compact": {"early stopping": tuple(COMPACT)},
}
LABELS = {
    "none": "AdamW alone",
    "dropout": "Dropout",
    "CDB before": "ChannelDropBack before AdamW",
    "CDB after": "after AdamW",
    "CDB frozen": "frozen",
    "CDB before + dropout": "before AdamW, with Dropout",
}
MEASURES = ("accuracy", "nll", "ece")


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """The mean and its bootstrap interval over seeds."""
    if np.ptp(values) == 0:
        return (float(values[0]),) * 3
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=level, rng=0
    ).confidence_interval
    return float(values.mean()), float(found.low), float(found.high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided, that the mean is zero: the share of all sign flips with a mean as far from it."""
    sums = np.zeros(1)
    for x in differences:
        sums = np.concatenate([sums + x, sums - x])
    observed = np.abs(differences.sum())
    # Accuracies are written with six digits, so that equal sums differ by some millionths.
    return float(np.mean(np.abs(sums) >= observed - 1e-6 * len(differences)))


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number by the step-down method of Holm (1979)."""
    order = np.argsort(values)
    scaled = np.array(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.tolist()


def finals(jobs: Sequence[Job], runs: Runs) -> list[Row]:
    """The runs of the comparison, in order of seeds; none until all are there."""
    return [runs[job] for job in jobs] if jobs and all(job in runs for job in jobs) else []


def column(runs: Sequence[Row], name: str) -> np.ndarray:
    return np.array([run[name] for run in runs])


Pairs = dict[Cell, tuple[list[Row], list[Row]]]  # A cell's runs, and those to compare with.


def against(baseline: str, cells: dict[Cell, list[Row]]) -> Pairs:
    """Pairs of every cell with the one that holds the baseline in its place."""
    return {cell: (own, cells[cell._replace(contender=baseline)]) for cell, own in cells.items()}


def compare(pairs: Pairs) -> list[Row]:
    """One row for each cell: the setting, the measures, and their differences to the baseline."""
    rows = []
    for cell, (own, base) in pairs.items():
        row = cell._asdict() | {"run": bool(own and base), "is_baseline": own is base}
        if row["run"]:
            row |= {"flops": own[0]["flops"] / base[0]["flops"]}
            row |= {x: own[0][x] for x in ("learning_rate", "weight_decay", "rate", "dropout")}
            row["train_accuracy"] = float(column(own, "train_accuracy").mean())
            for measure in MEASURES:
                values = column(own, f"test_{measure}")
                differences = values - column(base, f"test_{measure}")
                row[measure] = interval(values)
                row[f"{measure}_difference"] = interval(differences)
                if measure == "accuracy":
                    row["p"] = p_value(differences)
        rows.append(row)
    correct(rows)
    return rows


def correct(rows: Sequence[Row]) -> None:
    """Adds p values corrected for all comparisons, those that are not run among them."""
    compared = [row for row in rows if not row["is_baseline"]]
    corrected = holm([row.get("p", 1.0) for row in compared])
    for row, p in zip(compared, corrected, strict=True):
        if row["run"]:
            row["p_corrected"] = p


def at_the_edge(cell: Cell, row: Row) -> list[str]:
    """What was chosen from the end of its range, so that the best may lie beyond."""
    tried = trials(cell)
    edges = []
    for i, name in enumerate(("learning_rate", "weight_decay"), 1):
        values = sorted(trial[i] for trial in tried)
        if not values[0] < row[name] < values[-1]:
            edges.append(name.replace("_", " "))
    contender = CONTENDERS[cell.contender]
    for name, values in (("rate", contender.rates), ("dropout", contender.dropout)):
        if len(values) > 1 and row[name] == values[-1]:  # Below the first lies the baseline.
            edges.append(name)
    return edges


def markdown(rows: Sequence[Row]) -> str:
    """A table for each task, model and optimizer."""
    names = ("method", "accuracy, %", "difference, points", "p, Holm", "NLL", "ECE")
    names += ("accuracy on training labels, %", "FLOPs", "chosen")
    text = []
    for panel, members in panels(rows).items():
        if not any(row["run"] for row in members):
            text += [f"**{panel}**: {len(members)} rows, *not run*", ""]
            continue
        text += [f"**{panel}**", "", header(names)]
        for row in members:
            if not row["run"]:
                text.append(f"| {row['contender']} | *not run* {'| ' * (len(names) - 2)}|")
                continue
            same = row["is_baseline"]
            setting = f"lr {row['learning_rate']:.2g}, decay {row['weight_decay']:.2g}"
            setting += f", rate {row['rate']:g}" * (row["rate"] > 0)
            setting += f", dropout {row['dropout']:g}" * (row["dropout"] > 0)
            setting += "".join(f"; {name} at the end of its range" for name in row.get("edges", ()))
            cells = [
                row["contender"],
                f"{100 * row['accuracy'][0]:.2f}",
                "" if same else difference(row["accuracy_difference"], 100, 2),
                "" if same else p_text(row["p_corrected"]),
                f"{row['nll'][0]:.3f}" if same else difference(row["nll_difference"], 1, 3),
                f"{row['ece'][0]:.3f}" if same else difference(row["ece_difference"], 1, 3),
                f"{100 * row['train_accuracy']:.1f}",
                f"{row['flops']:.2f}",
                setting,
            ]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def header(names: Sequence[str]) -> str:
    return "| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|"


def overview(rows: Sequence[Row], *, training: bool = False) -> str:
    """The differences of all tasks in one table, as `docs/evidence.md` shows them.

    Bold: p < 0.05, corrected. †: chosen from the end of a range. With `training` also how many of
    the training labels were learnt.
    """
    rows = [row for row in rows if row["run"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = [f"`{task}`" for task in tasks]
    lines = [header(["", *names, *["training labels learnt"] * (training * len(tasks))])]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = {row["task"]: row for row in rows if row["contender"] == contender}
        cells = [entry(own[task]) if task in own else "" for task in tasks]
        if training:
            cells += [f"{100 * own[task]['train_accuracy']:.1f} %" for task in tasks]
        label = LABELS.get(contender, contender)
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def entry(row: Row) -> str:
    mark = " †" * bool(row.get("edges"))
    if row["is_baseline"]:
        return f"{100 * row['accuracy'][0]:.2f} %{mark}"
    text = difference(row["accuracy_difference"], 100, 2)
    return (f"**{text}**" if row["p_corrected"] < 0.05 else text) + mark


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row['task'].replace('_', ' ')}, {row['model']}, {row['optimizer']}"
        found.setdefault(title, []).append(row)
    return found


def difference(values: tuple[float, float, float], factor: float, digits: int) -> str:
    mean, low, high = (factor * x for x in values)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def baseline_of(rows: Sequence[Row]) -> str:
    names = {row["contender"] for row in rows if row["is_baseline"]}
    if not names:
        return "the same settings without the mask"
    return "the tuned baseline" if names == {BASELINE} else f"{names.pop()!r}"


def draw(rows: Sequence[Row], file: Path, title: str) -> None:
    """Differences in accuracy and their intervals, a panel for each task, model and optimizer."""
    shown = panels([row for row in rows if row["run"] and not row["is_baseline"]])
    names = list(dict.fromkeys(row["contender"] for row in sum(shown.values(), [])))
    figure, axes = pyplot.subplots(
        1,
        len(shown),
        figsize=(3.2 * len(shown) + 1.6, 0.36 * len(names) + 1.6),
        sharey=True,
        squeeze=False,
    )
    for axis, (panel, members) in zip(axes[0], shown.items(), strict=True):
        for row in members:
            mean, low, high = (100 * x for x in row["accuracy_difference"])
            color, marker = ("C0", "^") if mean > 0 else ("C1", "v")
            if row["p_corrected"] >= 0.05:
                color, marker = "0.6", "o"
            position = names.index(row["contender"])
            axis.plot([low, high], [position] * 2, color=color, linewidth=2)
            axis.plot(mean, position, marker, color=color)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(panel.replace(", ", "\n", 1), fontsize="medium")
        axis.set_xlabel("difference in test accuracy (points)")
        axis.grid(axis="x", alpha=0.3)
    labels = [name.replace("CDB", "ChannelDropBack") for name in names]
    axes[0, 0].set_yticks(range(len(names)), labels)
    axes[0, 0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(file)
    pyplot.close(figure)


def results(runs: Runs) -> dict[str, list[Row]]:
    """The rows of every table, by its title."""

    def chosen(cells):
        return {cell: finals(final_jobs(cell, runs), runs) for cell in cells}

    found = {grid: compare(against(BASELINE, chosen(cells))) for grid, cells in GRIDS.items()}
    for grid, rivals in RIVALS.items():
        for rival, others in rivals.items():
            cells = [cell for cell in GRIDS[grid] if cell.contender in (rival, *others)]
            title = f"{grid}-against-{rival.replace(' ', '-')}"
            found[title] = compare(against(rival, chosen(cells)))
    unmasked = {cell: finals(unmasked_jobs(cell, runs), runs) for cell in MASKED}
    found["masks"] = compare({cell: (own, unmasked[cell]) for cell, own in chosen(MASKED).items()})
    for row in sum(found.values(), []):
        cell = Cell(*(row[name] for name in Cell._fields))
        row["edges"] = at_the_edge(cell, row) if row["run"] else []
    changed = {
        ABLATED._replace(contender=name): finals(ablation_jobs(name, runs), runs)
        for name in ABLATIONS
    }
    found["ablation"] = compare(against(ABLATION_BASELINE, changed))
    return found


def with_tables(page: str, found: dict[str, list[Row]]) -> str:
    """The page with the tables that `<!-- GRID -->` asks for."""

    def of_grid(name: str) -> str | None:
        return overview(found[name], training=name == "ablation") if name in found else None

    return fill(page, of_grid)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=results_file("evidence").with_suffix(".csv"))
    file = parser.parse_args().runs
    runs = read(file)
    found = results(runs)
    text = [f"{len(runs)} runs."]
    for grid, rows in found.items():
        text += [f"## {grid}", "", f"Differences to {baseline_of(rows)}.", "", markdown(rows)]
        if any(row["run"] and not row["is_baseline"] for row in rows):
            title = f"Against {baseline_of(rows)} (coloured where p < 0.05, corrected)"
            draw(rows, file.with_name(f"{file.stem}-{grid}.png"), title)
    about = {name: sorted({row[name] for row in runs.values()}) for name in ("machine", "versions")}
    rows = [{"grid": grid, **row} for grid, rows in found.items() for row in rows]
    report = about | {"seeds": len(SEEDS), "trials": TRIALS, "ranges": RANGES, "rows": rows}
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    file.with_suffix(".md").write_text("\n".join(text) + "\n")
    if file.resolve() == paths.BENCHMARKS / "results/evidence-cpu.csv":
        PAGE.write_text(with_tables(PAGE.read_text(), found))
    print("\n".join(text))


if __name__ == "__main__":
    main()
