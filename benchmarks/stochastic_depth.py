"""What not computing dropped residual blocks saves: computed and masked, or not computed.

Training steps of a ViT with stochastic depth, with linear drop rates of up to one half: of all
blocks, of blocks whose output is dropped (`mask`), and of blocks that are not computed when they
are dropped (`skip`). All are timed in turns in one process, each step with other draws; ratios are
to the full step of the same round, shown is their mean with a bootstrap 95 % interval over rounds.

    python benchmarks/stochastic_depth.py                     # some minutes on two cores
    python benchmarks/stochastic_depth.py --steps vit_b/16:224:64 --dtype bfloat16

Prints a Markdown table and writes `results/stochastic-depth-<device>.json`. Needs jax, flax, optax,
numpy.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from overhead import parse_step, publish, results_file  # Puts the library on the path.
from skipping import mean_interval

import cdb_jax
import models

STEPS = ("vit_s/16:64:64", "resnet18:64:2")


def compiled_step(name: str, size: int, batch: int, dtype: str, branches: models.Branches) -> Any:
    """A function from the number of a step to its seconds."""
    model = models.create(
        name,
        num_classes=1000,
        image_shape=(size, size, 3),
        dtype=dtype,
        branches=branches,
        rngs=nnx.Rngs(0, drop_path=1),
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jnp.arange(batch) % 1000
    tx = optax.adamw(1e-3)

    def train(params: Any, opt_state: Any, rest: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
            return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

        (loss, new_rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, new_rest, loss

    opt_state = tx.init(params)
    compiled = jax.jit(train).lower(params, opt_state, rest).compile()
    state = {"rest": rest}

    def seconds() -> float:
        start = time.perf_counter()
        *_, new_rest, _ = jax.block_until_ready(compiled(params, opt_state, state["rest"]))
        elapsed = time.perf_counter() - start
        state["rest"] = new_rest  # Its counts of draws; the next step drops other blocks.
        return elapsed

    return seconds


def compare(name: str, size: int, batch: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    depth = models.depth(name)
    budget = depth - (depth + 1) / 4  # Drops the last block at rate 0.5.
    rates = tuple(cdb_jax.drop_path_rates(depth, budget, mode="linear").tolist())
    kinds = {
        "mask": models.Branches(rates),
        "skip": models.Branches(rates, skips=True),
    }
    full = compiled_step(name, size, batch, dtype, models.Branches())
    steps = {kind: compiled_step(name, size, batch, dtype, x) for kind, x in kinds.items()}
    for step in (full, *steps.values()):
        step()
    base, times = [], {kind: [] for kind in kinds}
    for i in range(rounds):
        base.append(full())
        for j in np.random.default_rng(i).permutation(len(steps)):
            kind = list(steps)[j]
            times[kind].append([steps[kind](), steps[kind]()])
    rows = []
    for kind in kinds:
        ratio, low, high = mean_interval(np.array(times[kind]) / np.array(base)[:, None])
        rows.append(
            {
                "task": f"{name} {size}px batch {batch} adamw" + f" {dtype}" * (dtype != "float32"),
                "variant": kind,
                "ratio": ratio,
                "low": low,
                "high": high,
                "expected_depth": 1 - float(np.mean(rates)),
                "full_ms": float(np.median(base) * 1e3),
                "rounds": rounds,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| training step | dropped blocks | time | 95 % interval | blocks computed |"]
    lines.append("| --- " * 5 + "|")
    for row in rows:
        share = row["expected_depth"] if row["variant"] == "skip" else 1.0
        lines.append(
            f"| {row['task']} | {row['variant']} | {row['ratio']:.3f} | [{row['low']:.3f}, "
            f"{row['high']:.3f}] | {share:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="*", type=parse_step)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for name, size, batch in args.steps or [parse_step(x) for x in STEPS]:
        rows += compare(name, size, batch, args.dtype, args.rounds)
    publish(args.output or results_file("stochastic-depth"), table(rows), rows)


if __name__ == "__main__":
    main()
