"""ResNet and ViT on real images, with ChannelDropBack and without, over several seeds.

    python examples/demo.py            # some minutes on two cores; stopped, it goes on when rerun

Prints the comparison and draws it: runs/demo/comparison.png, and the curves of each model.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from matplotlib import pyplot

import display
import processes
import run_folder
import train
from errors import UserError

METHODS = ("none", "cdb", "cdb_after")
LEARNING_RATES = {"resnet_small": 3e-3, "vit_mini/4": 4e-3}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Compare AdamW alone, after ChannelDropBack and before it, on scikit-learn's digits."""

    seeds: int = 3
    """Runs of each method; the same seed means the same initial parameters and batches."""
    epochs: int = 20
    """Passes over the 1,297 training images."""
    rate: float = 0.3
    """Probability that a channel is dropped in a step."""
    run_dir: Path = Path("runs/demo")
    """Where results go."""
    data_dir: Path | None = None
    """Where the data set is kept; None: in the run folder."""


def compare(histories: dict[str, dict[str, list[list[run_folder.Row]]]]) -> list[list[str]]:
    """One line for each model and method: last epoch's accuracy, and its difference to none."""
    lines = []
    for model, methods in histories.items():
        last = {method: [rows[-1] for rows in runs] for method, runs in methods.items()}
        accuracy = {
            method: np.array([row["test_accuracy"] for row in rows])
            for method, rows in last.items()
        }
        for method, rows in last.items():
            same = method == "none"
            difference = "" if same else display.percent(accuracy[method] - accuracy["none"], "+")
            loss = np.mean([row["train_loss"] for row in rows])
            lines.append(
                [
                    f"{model}, {method}",
                    display.percent(accuracy[method]),
                    difference,
                    f"{loss:.4f}",
                ]
            )
    return lines


def plot_comparison(
    histories: dict[str, dict[str, list[list[run_folder.Row]]]], file: Path
) -> None:
    """Draws each seed's final accuracy as a dot, the mean and its interval as a bar."""
    figure, axes = pyplot.subplots(
        1, len(histories), figsize=(4.5 * len(histories), 3.5), layout="constrained", squeeze=False
    )
    for panel, (model, methods) in zip(axes[0], histories.items(), strict=True):
        for position, runs in enumerate(methods.values()):
            values = np.array([100 * rows[-1]["test_accuracy"] for rows in runs])
            mean, half = display.mean_interval(values)
            panel.plot([position] * len(values), values, "o", color="0.6")
            bar = half if np.isfinite(half) else None
            panel.errorbar(position + 0.15, mean, yerr=bar, fmt="s", color="C0", capsize=4)
        panel.set_xticks(range(len(methods)), list(methods))
        panel.set_xlim(-0.5, len(methods) - 0.5)
        panel.set_title(model)
        panel.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("test accuracy (%)")
    figure.suptitle("Last epoch: seeds (dots), mean and 95 % interval (squares)")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def run_all(demo: Demo) -> dict[str, dict[str, list[list[run_folder.Row]]]]:
    """The metrics of every run, by model and method, in order of seeds."""
    out = display.console()
    histories: dict[str, dict[str, list[list[run_folder.Row]]]] = {}
    for model, learning_rate in LEARNING_RATES.items():
        name = model.partition("/")[0]
        histories[name] = {method: [] for method in METHODS}
        for seed in range(demo.seeds):
            for method in METHODS:
                config = train.Config(
                    model=model,
                    method=method,
                    rate=demo.rate,
                    epochs=demo.epochs,
                    learning_rate=learning_rate,
                    seed=seed,
                    run_dir=demo.run_dir / name / method / f"seed{seed}",
                    data_dir=demo.data_dir or demo.run_dir / "data",
                    resume=True,
                )
                start = time.perf_counter()
                rows = train.train(config, brief=True)
                histories[name][method].append(rows)
                out.print(
                    f"{name}, {method}, seed {seed}: test accuracy "
                    f"{rows[-1]['test_accuracy']:.2%} after {time.perf_counter() - start:.0f} s",
                    soft_wrap=True,
                )
    return histories


def main() -> None:
    try:
        demo = tyro.cli(Demo)
        if demo.seeds < 1:
            raise UserError(f"--seeds {demo.seeds} must be positive.")
        # Runs that differ in their seed alone share most of what is compiled.
        jax.config.update("jax_compilation_cache_dir", str(demo.run_dir.absolute() / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        histories = run_all(demo)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except processes.StoppedError as stopped:
        raise SystemExit(f"{stopped}; the same command goes on from there.") from None

    (demo.run_dir / "results.json").write_text(json.dumps(histories, indent=1) + "\n")
    for model, methods in histories.items():
        display.plot_curves(methods, demo.run_dir / f"{model}.png", f"{model} on digits")
    plot_comparison(histories, demo.run_dir / "comparison.png")
    columns = ("", "test accuracy (%)", "against none", "training loss")
    title = f"Last of {demo.epochs} epochs, {demo.seeds} seeds, 95 % intervals, paired by seed"
    display.console().print(display.ResultsTable(title, columns, compare(histories)))
    display.console().print(
        f"pictures: {demo.run_dir}/comparison.png, "
        + ", ".join(f"{demo.run_dir}/{model}.png" for model in histories),
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
