"""Does AdamW with state for a part of the channels learn as well as AdamW? Sixty pairs of runs.

    python benchmarks/evidence/held.py            # stopped, it goes on; two hours on one core
    python benchmarks/evidence/held.py --tasks digits_few

`compact` at a half, a quarter and an eighth of the channels, held for 20, 100 and 500 steps, with
moments that start again or are carried over, against AdamW. An MLP with two hidden layers of 128,
small enough that all seeds train as one program. Of every row, AdamW included, the same learning
rates are tried with the same tuning seeds, and the best accuracy on validation images wins. Then
the chosen one is run with sixty other seeds, which share images, order and first weights with
AdamW's. "p" is that of a one-sided paired t test that 0.3 points or more are lost, corrected by
Holm's method for all rows of a task: small where such a loss is excluded.

Writes `results/held-<device>.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paths  # noqa: F401
from overhead import machine, publish, results_file, versions
from report import difference, header, holm, interval, p_text
from scipy import stats
from tasks import TASKS

import cdb_jax

MARGIN = 0.003  # Of accuracy: 0.3 points.
STEPS, BATCH, WIDTH = 1000, 50, 128
LEARNING_RATES = tuple(float(f"{x:.2g}") for x in np.geomspace(1e-4, 1e-1, 10))
WEIGHT_DECAY = 1e-2
TUNING_SEEDS, SEEDS = range(6), range(1000, 1060)


class Contender(NamedTuple):
    """AdamW, if it keeps everything, or AdamW inside `compact`."""

    kept: float = 1.0
    hold: int = 1
    on_switch: str = "reset"

    @property
    def name(self) -> str:
        if self.kept == 1.0:
            return "AdamW"
        return f"1/{round(1 / self.kept)} of the channels, {self.hold} steps, {self.on_switch}"


CONTENDERS = [Contender()] + [
    Contender(*numbers)
    for numbers in itertools.product((1 / 2, 1 / 4, 1 / 8), (20, 100, 500), ("reset", "carry"))
]


class Data(NamedTuple):
    """Images of a seed, and the order in which it sees them."""

    images: np.ndarray  # shape=(count, 64)
    labels: np.ndarray
    order: np.ndarray  # shape=(STEPS, BATCH)
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def data_of(task: str, seeds: Sequence[int]) -> Data:
    """The data of all seeds, stacked."""

    def flat(images: Any) -> tuple[np.ndarray, np.ndarray]:
        pixels = images.image.reshape(len(images.label), -1)
        return pixels.astype(np.float32) / 8 - 1, images.label

    def one(seed: int) -> Data:
        split, rng = TASKS[task].split(seed), np.random.default_rng(seed)
        count = len(split.train.label)
        epochs = -(-STEPS * BATCH // count)
        order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
        order = order[: STEPS * BATCH].reshape(STEPS, BATCH)
        return Data(*flat(split.train), order, flat(split.validation), flat(split.test))

    return jax.tree.map(lambda *xs: np.stack(xs), *map(one, seeds))


def logits(params: Any, x: jax.Array) -> jax.Array:
    for name in ("dense1", "dense2"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def accuracy(params: Any, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    images, labels = data
    return jnp.mean(jnp.argmax(logits(params, images), axis=1) == labels)


def train(contender: Contender, seed: jax.Array, learning_rate: jax.Array, data: Data) -> Any:
    """Accuracy on validation and test images at the end of a run."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 20, STEPS)
    tx = optax.adamw(lambda count: learning_rate * rate(count), weight_decay=WEIGHT_DECAY)
    if contender.kept < 1.0:
        policy = cdb_jax.Policy(
            1.0 - contender.kept,
            key=seed,
            channel_choice="window",
            hold=contender.hold,
            exempt=("head",),
        )
        tx = cdb_jax.compact(tx, policy, on_switch=contender.on_switch)
    sizes = {"dense1": (64, WIDTH), "dense2": (WIDTH, WIDTH), "head": (WIDTH, 10)}
    keys = jax.random.split(jax.random.key(seed), 3)
    init = jax.nn.initializers.he_normal()
    params = {
        name: {"kernel": init(key, shape), "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }

    def loss(params: Any, index: jax.Array) -> jax.Array:
        outputs, labels = logits(params, data.images[index]), data.labels[index]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    def step(carry: Any, index: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, index), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), data.order)
    return accuracy(params, data.validation), accuracy(params, data.test)


def measure(contender: Contender, tuning: Data, final: Data) -> dict[str, Any]:
    """Tunes the learning rate, and runs the chosen one with other seeds."""

    @jax.jit
    def run(seeds: jax.Array, learning_rate: jax.Array, data: Data) -> Any:
        return jax.vmap(lambda seed, data: train(contender, seed, learning_rate, data))(seeds, data)

    def of_seeds(seeds: Sequence[int], learning_rate: float, data: Data) -> Any:
        return run(np.array(seeds, np.uint32), np.float32(learning_rate), data)

    validation = [
        float(np.mean(of_seeds(TUNING_SEEDS, rate, tuning)[0])) for rate in LEARNING_RATES
    ]
    best = LEARNING_RATES[int(np.argmax(validation))]
    # As many seeds at once as in tuning, so that nothing is compiled again.
    size, test = len(TUNING_SEEDS), []
    for start in range(0, len(SEEDS), size):
        part = jax.tree.map(lambda x, start=start: x[start : start + size], final)
        test += np.asarray(of_seeds(SEEDS[start : start + size], best, part)[1]).tolist()
    return contender._asdict() | {
        "learning_rate": best,
        "validation": validation,
        "test": [round(x, 6) for x in test],
    }


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their differences to AdamW on the same task."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        base = np.array(mine[0]["test"])
        gaps = [np.array(row["test"]) - base for row in mine]
        tests = [stats.ttest_1samp(x, -MARGIN, alternative="greater").pvalue for x in gaps[1:]]
        for row, gap, p in zip(mine, gaps, [None, *holm(tests)], strict=True):
            at_edge = row["learning_rate"] in (LEARNING_RATES[0], LEARNING_RATES[-1])
            accuracy = interval(np.array(row["test"]))
            found.append(
                row
                | {"accuracy": accuracy, "difference": interval(gap), "p": p}
                | {"at_edge": at_edge}
            )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("task", "optimizer", "learning rate", "accuracy, %", "difference, points", "p")
    lines = [header(columns)]
    for row in compare(rows):
        name = Contender(*(row[field] for field in Contender._fields)).name
        is_base = row["p"] is None
        lines.append(
            f"| {row['task']} | {name} | {row['learning_rate']}{' †' * row['at_edge']} | "
            f"{100 * row['accuracy'][0]:.2f} | "
            f"{'' if is_base else difference(row['difference'], 100, 2)} | "
            f"{'' if is_base else p_text(row['p'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["digits_few", "digits_noisy"])
    parser.add_argument("--output", type=Path, default=results_file("held"))
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    for task in arguments.tasks:
        tuning, final = data_of(task, TUNING_SEEDS), data_of(task, SEEDS)
        for contender in CONTENDERS:
            about = {"task": task} | contender._asdict()
            if any(about.items() <= row.items() for row in rows):
                continue
            rows.append({"task": task} | measure(contender, tuning, final))
            rows = compare(rows)
            report = {"machine": machine(), "versions": versions(), "rows": rows}
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
            print(table(rows).splitlines()[-1], flush=True)
    settings = {"margin": MARGIN, "steps": STEPS, "learning_rates": LEARNING_RATES}
    publish(arguments.output, table(rows), compare(rows), **settings)


if __name__ == "__main__":
    main()
