"""Tables and figures of the comparison on Fashion-MNIST, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import paths
from grid import Row
from report import difference, header, p_text
from time_to_accuracy import three

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.style.use(paths.BENCHMARKS.parent / "examples/figures.mplstyle")
PAGE = paths.BENCHMARKS.parent / "docs/evidence.md"
TASKS = {
    "fashion_few": "2,000 images",
    "fashion_few_noisy": "2,000 images, 30 % wrong labels",
    "fashion_all": "58,000 images",
    "fashion_all_noisy": "58,000 images, 30 % wrong labels",
}
MODELS = {"resnet_8": "ResNet", "vit_48/7": "ViT"}
ARMS = {"none": "AdamW alone"}  # As readers call them; the others keep their names.


def table(rows: Sequence[Row]) -> str:
    """All that was measured, a line for each method, task and model."""
    names = ("task, model", "method", "accuracy, %", "difference, points", "p of a loss, Holm")
    names += ("time of a step", "time to the baseline's accuracy", "FLOPs")
    names += ("parameters, gradient, state", "peak memory", "learning rate")
    lines = [header(names)]
    for row in rows:
        cells = [f"{row['task']}, {row['model']}", row["arm"], f"{100 * row['accuracy'][0]:.2f}"]
        if row["is_baseline"]:
            cells += ["", ""]
        else:
            cells += [difference(row["difference"], 100, 2), p_text(row["p_corrected"])]
        cells += [three(row["step_time"]), three(row["time_against_baseline"])]
        cells += [f"{row[x]:.2f}" for x in ("flops", "state", "peak")]
        cells.append(f"{row['learning_rate']:g}" + (" †" if row["at_edge"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy(row: Row) -> str:
    """Bold where a loss of 0.3 points or more is excluded."""
    if row["is_baseline"]:
        return f"{100 * row['accuracy'][0]:.2f} %"
    text = difference(row["difference"], 100, 2)
    return f"**{text}**" if row["p_corrected"] < 0.05 else text


def time(row: Row) -> str:
    return "1" if row["is_baseline"] else three(row["time_against_baseline"])


def costs(row: Row) -> str:
    return " / ".join(f"{row[name]:.2f}" for name in ("flops", "state", "peak"))


TABLES = {"fashion accuracy": accuracy, "fashion time": time}


def matrix(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """A line for each method, a column for each task and model."""
    places = list(dict.fromkeys((row["task"], row["model"]) for row in rows))
    found = {(row["arm"], row["task"], row["model"]): row for row in rows}
    lines = [header(["", *(f"{MODELS[model]}, {TASKS[task]}" for task, model in places)])]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [found.get((arm, *place)) for place in places]
        cells = [cell(row) if row else "" for row in own]
        lines.append("| " + " | ".join([ARMS.get(arm, arm), *cells]) + " |")
    return "\n".join(lines)


def costs_table(rows: Sequence[Row]) -> str:
    """What a step costs does not depend on the images."""
    first = {}
    for row in rows:
        first.setdefault((row["arm"], row["model"]), row)
    models = list(dict.fromkeys(row["model"] for row in rows))
    titles = ("time of a step", "FLOPs / state / peak memory")
    lines = [header(["", *(f"{MODELS[model]}: {title}" for model in models for title in titles)])]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [first.get((arm, model)) for model in models]
        cells = [x for row in own for x in ((three(row["step_time"]), costs(row)) if row else "  ")]
        lines.append("| " + " | ".join([ARMS.get(arm, arm), *cells]) + " |")
    return "\n".join(lines)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The tables of `docs/evidence.md`, by the names that it gives them."""
    found = {name: matrix(rows, cell) for name, cell in TABLES.items()}
    return found | {"fashion costs": costs_table(rows)}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Difference in accuracy against the time of a run, and against memory.

    A panel for each task and model; up and to the left is better.
    """
    for name, label, at in (
        ("time", "time of the run, relative to AdamW alone", lambda row: row["step_time"]),
        ("memory", "peak memory, relative to AdamW alone", lambda row: (row["peak"],) * 3),
    ):
        places = list(dict.fromkeys((row["task"], row["model"]) for row in rows))
        columns = min(2, len(places))
        figure, axes = pyplot.subplots(
            -(-len(places) // columns), columns, figsize=(11, 3.9 * -(-len(places) // columns))
        )
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        for panel, place in zip(np.ravel(axes), places, strict=False):
            for row in rows:
                if (row["task"], row["model"]) != place:
                    continue
                x, left, right = at(row)
                y, low, high = (100 * value for value in row["difference"])
                look = style(arms.index(row["arm"]))
                panel.plot([x, x], [low, high], color=look["color"], linewidth=1.2)
                panel.plot([left, right], [y, y], color=look["color"], linewidth=1.2)
                panel.plot(x, y, **look, linestyle="none", label=ARMS.get(row["arm"], row["arm"]))
            panel.axhspan(-0.3, 0.3, color="0.92", zorder=0)
            panel.set_title(f"{MODELS[place[1]]}, {TASKS[place[0]]}", fontsize="medium")
            panel.set_xlabel(label)
            panel.set_ylabel("points of test accuracy")
        for panel in np.ravel(axes)[len(places) :]:
            panel.set_axis_off()
        handles, labels = np.ravel(axes)[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(file.with_name(f"{file.stem}-{name}.png"))
        pyplot.close(figure)


def style(number: int) -> dict[str, str]:
    """A marker and a colour that no other method has together."""
    return {"color": f"C{number % 6}", "marker": "os^Dv<>P*X"[number % 10]}
