"""What `cdb_jax.value_and_grad` saves, against the full gradient and against the mask alone.

All variants are timed in turns with the full step in one process, on identical input: training
steps of ResNets and ViTs with SGD and AdamW. Ratios are to the full step of the same round; shown
is their median, or where the work differs from step to step (layer rates, one layer a step) their
mean, with a bootstrap 95 % interval over rounds. `FLOPs` is the ratio that counting predicts: of
the programs, or for work decided at run time of its expectation.

    python benchmarks/skipping.py                                    # everything: an hour, 2 cores
    python benchmarks/skipping.py --steps vit_s/16:64:32 --rates 0.5 --rounds 50
    python benchmarks/skipping.py --dtype bfloat16                      # on an accelerator

Prints a Markdown table and writes `results/skipping-<device>.json`, where rows of other steps taken
on the same machine with the same versions, stay. Needs jax, flax, optax, numpy.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from overhead import parse_step, publish, results_file, with_earlier  # Sets the path.

import cdb_jax
from models import create

STEPS = ("vit_s/16:64:64", "resnet18:64:8", "vit_s/16:224:4", "resnet50:64:8")


class Variant(NamedTuple):
    """How a step computes its gradient, and what counting expects of it."""

    name: str
    policy: cdb_jax.Policy | None
    skips: bool
    changes: bool = False  # Whether the work differs from step to step.
    compact: bool = False  # Whether gradient and optimizer state have the kept size.


def variants(rates: list[float], layer_rates: list[float]) -> list[Variant]:
    def policy(rate: float, **settings: Any) -> cdb_jax.Policy:
        return cdb_jax.Policy(rate, key=0, **settings)

    found = []
    for rate in rates:
        found.append(Variant(f"window {rate}", policy(rate, channel_choice="window"), True))
    for rate in rates:
        held = policy(rate, channel_choice="window", hold=100)
        found.append(Variant(f"window {rate}, compact", held, True, compact=True))
    middle = 0.5 if 0.5 in rates else rates[0]
    window = policy(middle, channel_choice="window")
    into = policy(middle, channel_choice="window", channel_axes=cdb_jax.input_channels)
    grouped = policy(middle, channel_choice="window", window_groups=8)
    found += [
        Variant(f"mask alone, window {middle}", window, False),
        Variant(f"window {middle} in 8 groups", grouped, True),
        Variant(f"window {middle}, input channels", into, True),
        Variant(f"exact {middle}", policy(middle, channel_choice="exact"), True),
    ]
    for rate in layer_rates:
        whole = policy(1.0, layer_rate=rate)
        found.append(Variant(f"whole layers {rate}", whole, True, changes=True))
    one = policy(0.0, layer_choice="exact", other_layers="frozen")
    found.append(Variant("one layer, others frozen", one, True, changes=True))
    return found


class Step(NamedTuple):
    """A compiled training step, and what to call it with."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    temporary_bytes: int
    compile_seconds: float

    def seconds(self, count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.run(*self.arguments, jnp.int32(count)))
        return time.perf_counter() - start


def count_flops(f: Callable[..., Any], *arguments: Any) -> float:
    """Of the program for a CPU: on a GPU XLA does not count products that libraries compute."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(f).lower(*shapes).cost_analysis()["flops"]


class Task:
    """A model, an optimizer and a batch."""

    def __init__(self, name: str, size: int, batch: int, optimizer: str, dtype: str):
        model = create(
            name, num_classes=1000, image_shape=(size, size, 3), dtype=dtype, rngs=nnx.Rngs(0)
        )
        self.graph, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        self.images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
        self.labels = jnp.arange(batch) % 1000
        self.tx = {
            "sgd": optax.sgd(0.01, momentum=0.9),
            "adamw": optax.adamw(1e-3),
        }[optimizer]
        self.name = f"{name} {size}px batch {batch} {optimizer}"
        self.name += "" if dtype == "float32" else f" {dtype}"

    def loss(self, params: Any, rest: Any, images: jax.Array, labels: jax.Array) -> Any:
        model = nnx.merge(self.graph, params, rest, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

    def training_step(self, variant: Variant | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A step, and its arguments but for the number of the step; None computes all gradients."""
        tx = self.tx
        if variant and not variant.skips:
            tx = optax.chain(cdb_jax.channel_drop_back(variant.policy), tx)
        compact = variant is not None and variant.compact
        if compact:
            tx = cdb_jax.compact(tx, variant.policy)

        def train(params, opt_state, rest, images, labels, count):
            if variant and variant.skips:
                value_and_grad = cdb_jax.value_and_grad(self.loss, has_aux=True, kept_only=compact)
                selection = variant.policy.select(params, count)
                (loss, rest), grads = value_and_grad(
                    params, rest, images, labels, selection=selection
                )
            else:
                value_and_grad = jax.value_and_grad(self.loss, has_aux=True)
                (loss, rest), grads = value_and_grad(params, rest, images, labels)
            given = {"selection": selection} if compact else {}
            updates, opt_state = tx.update(grads, opt_state, params, **given)
            return optax.apply_updates(params, updates), opt_state, rest, loss

        state = tx.init(self.params)
        return train, (self.params, state, self.rest, self.images, self.labels)

    def step(self, variant: Variant | None) -> Step:
        train, arguments = self.training_step(variant)
        lowered = jax.jit(train).lower(*arguments, jnp.int32(0))
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis().temp_size_in_bytes
        flops = count_flops(train, *arguments, jnp.int32(0))
        return Step(compiled, arguments, flops, memory, seconds)

    def expected_flops(self, full: Step, step: Step, variant: Variant) -> float:
        """The ratio of FLOPs to those of the full step.

        Programs count both branches of a conditional, so work decided at run time is put together
        from programs: without any weight gradient, and without any gradient.
        """
        if not variant.changes:
            return step.flops / full.flops

        def loss(params, *rest):
            return self.loss(params, *rest)[0]

        arguments = (self.params, *full.arguments[2:])
        nothing = cdb_jax.Policy(1.0, key=0)

        def skip(params: Any, *rest: Any) -> Any:
            return cdb_jax.grad(loss)(params, *rest, selection=nothing.select(params, 0))

        none = count_flops(skip, *arguments)
        weights = count_flops(jax.grad(loss), *arguments) - none
        if variant.policy.layer_choice == "bernoulli":
            return 1 - variant.policy.layer_rate * weights / full.flops
        forward = count_flops(loss, *arguments)
        # On average half of the layers lie above the one that learns; of weight gradients, one.
        return 1 - ((none - forward) / 2 + weights) / full.flops


def compare(task: Task, chosen: list[Variant], rounds: int) -> list[dict[str, Any]]:
    full = task.step(None)
    steps = [task.step(variant) for variant in chosen]
    for step in (full, *steps):
        step.seconds(0)
    base, others = [], [[] for _ in steps]
    for i in range(rounds):
        base.append(full.seconds(i))
        # In another order in every round, so that no variant always follows the same one.
        for j in np.random.default_rng(i).permutation(len(steps)):
            others[j].append([steps[j].seconds(count) for count in (2 * i, 2 * i + 1)])
    rows = []
    for variant, step, times in zip(chosen, steps, others, strict=True):
        summarise = mean_interval if variant.changes else median_interval
        ratio, low, high = summarise(np.array(times) / np.array(base)[:, None])
        row = {
            "task": task.name,
            "variant": variant.name,
            "ratio": ratio,
            "low": low,
            "high": high,
            "flops": task.expected_flops(full, step, variant),
            "temporary_memory": step.temporary_bytes / full.temporary_bytes,
            "compile": step.compile_seconds / full.compile_seconds,
            "full_ms": float(np.median(base) * 1e3),
            "rounds": rounds,
        }
        rows.append(row)
        print(f"{task.name:32} {variant.name:32} {ratio:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    return rows


def median_interval(ratios: np.ndarray) -> tuple[float, float, float]:
    return interval(ratios, np.median)


def mean_interval(ratios: np.ndarray) -> tuple[float, float, float]:
    return interval(ratios, np.mean)


def interval(ratios: np.ndarray, of: Callable[..., Any]) -> tuple[float, float, float]:
    """A statistic of the ratios, shape (rounds, 2), with a bootstrap 95 % interval over rounds."""
    picks = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile([of(ratios[pick]) for pick in picks], [0.025, 0.975])
    return float(of(ratios)), float(low), float(high)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| training step | gradient | time | 95 % interval | FLOPs | memory | compilation |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['task']} | {row['variant']} | {row['ratio']:.3f} | [{row['low']:.3f}, "
            f"{row['high']:.3f}] | {row['flops']:.3f} | {row['temporary_memory']:.3f} | "
            f"{row['compile']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps",
        nargs="*",
        type=parse_step,
        default=[parse_step(x) for x in STEPS],
        help="model:image size:batch size",
    )
    parser.add_argument("--optimizers", nargs="*", default=["sgd", "adamw"])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--layer-rates", nargs="*", type=float, default=[0.5])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    rows = []
    for name, size, batch in args.steps:
        for optimizer in args.optimizers:
            task = Task(name, size, batch, optimizer, args.dtype)
            rows += compare(task, variants(args.rates, args.layer_rates), args.rounds)
    output = args.output or results_file("skipping")
    rows = with_earlier(output, rows)
    publish(output, table(rows), rows)


if __name__ == "__main__":
    main()
