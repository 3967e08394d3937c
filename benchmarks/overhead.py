"""What `channel_drop_back` costs, against the same optimizer without it.

Every variant is timed in turns with plain AdamW in one process, on identical input. The ratio is
the median over pairs of neighbouring timings, with a bootstrap 95 % interval. Two kinds of work:
the optimizer alone on a model's parameter tree, and a whole training step. The row that compares
AdamW with itself shows what the machine's noise amounts to.

    python benchmarks/overhead.py                                  # everything
    python benchmarks/overhead.py --parts step --steps vit_b/16:224:64 --repeats 100

Prints a Markdown table and writes `results/overhead-<device>.json`. Needs jax, flax, optax, numpy.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import cdb_jax  # noqa: E402
from models import create  # noqa: E402

BASELINE = "AdamW"


def variants() -> dict[str, optax.GradientTransformation]:
    adamw = optax.adamw(1e-3)

    def cdb(channel_choice: str = "bernoulli") -> optax.GradientTransformation:
        return cdb_jax.channel_drop_back(0.3, key=0, channel_choice=channel_choice)

    return {
        BASELINE: adamw,
        "CDB, AdamW": optax.chain(cdb(), adamw),
        "AdamW, CDB": optax.chain(adamw, cdb()),
        "CDB exact, AdamW": optax.chain(cdb("exact"), adamw),
        "CDB window, AdamW": optax.chain(cdb("window"), adamw),
        "add_noise, AdamW": optax.chain(optax.add_noise(0.01, 0.55, key=0), adamw),
    }


class Work(NamedTuple):
    """Something to time: `carry = step(tx)(carry, *inputs)`, starting from `init(tx)`."""

    part: str
    name: str
    init: Callable[[optax.GradientTransformation], Any]
    step: Callable[[optax.GradientTransformation], Callable[..., Any]]
    inputs: tuple[Any, ...]


def optimizer_alone(name: str) -> Work:
    model = nnx.eval_shape(
        lambda: create(name, num_classes=1000, image_shape=(224, 224, 3), rngs=nnx.Rngs(0))
    )
    shapes = nnx.state(model, nnx.Param)
    filled = jax.jit(lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes))

    def init(tx):
        params = filled()
        return params, jax.jit(tx.init)(params)

    def step(tx):
        def update(carry, grads):
            params, opt_state = carry
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return update

    return Work("optimizer", name, init, step, (filled(),))


def training_step(name: str, size: int, batch: int) -> Work:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def build():
        return create(
            name, num_classes=1000, image_shape=(size, size, 3), dtype=dtype, rngs=nnx.Rngs(0)
        )

    graph = nnx.graphdef(nnx.eval_shape(build))
    init_model = jax.jit(lambda: nnx.split(build(), nnx.Param, ...)[1:])

    def init(tx):
        params, rest = init_model()
        return params, rest, jax.jit(tx.init)(params)

    def step(tx):
        def train_step(carry, images, labels):
            params, rest, opt_state = carry

            def loss_fn(params):
                model = nnx.merge(graph, params, rest, copy=True)
                losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
                return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

            grads, rest = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), rest, opt_state

        return train_step

    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jnp.arange(batch) % 1000
    title = f"{name}, {size} px, batch {batch}, {jnp.dtype(dtype).name}"
    return Work("step", title, init, step, (images, labels))


def compile_variants(
    work: Work, rounds: int
) -> tuple[dict[str, jax.stages.Compiled], dict[str, np.ndarray]]:
    """The programs, and the seconds it took to trace, lower and compile them in every round."""
    programs = {}
    seconds: dict[str, list[float]] = {name: [] for name in variants()}
    for _ in range(rounds):
        for name, tx in variants().items():
            carry = jax.eval_shape(lambda tx=tx: work.init(tx))
            jax.clear_caches()
            start = time.perf_counter()
            step = jax.jit(work.step(tx), donate_argnums=0)
            programs[name] = step.lower(carry, *work.inputs).compile()
            seconds[name].append(time.perf_counter() - start)
    return programs, {name: np.array(values) for name, values in seconds.items()}


class Runner:
    """A compiled step with its state, which is donated from one call to the next."""

    def __init__(self, program: jax.stages.Compiled, carry: Any, inputs: tuple[Any, ...]):
        self.program = program
        self.carry = jax.block_until_ready(carry)
        self.inputs = inputs

    def seconds(self, calls: int) -> float:
        """Mean time of a call. The device may queue the calls, as it does in training."""
        start = time.perf_counter()
        for _ in range(calls):
            self.carry = self.program(self.carry, *self.inputs)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / calls

    def cost(self, name: str) -> float:
        analysis: Any = self.program.cost_analysis()
        return analysis[name]


def time_pairs(base: Runner, other: Runner, pairs: int, least: float) -> np.ndarray:
    """Seconds of both, shape (pairs, 2), each timing lasting `least` seconds or one call."""
    runners = (base, other)
    for runner in runners:
        runner.seconds(1)
    calls = max(1, math.ceil(least / base.seconds(1)))
    times = np.empty((pairs, 2))
    for i in range(pairs):
        for j in (0, 1) if i % 2 == 0 else (1, 0):  # Neither is always the first.
            times[i, j] = runners[j].seconds(calls)
    return times


def median_interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """The median and its bootstrap 95 % interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def measure(work: Work, repeats: int, compile_rounds: int, least: float) -> list[dict[str, Any]]:
    """One row for each variant."""
    programs, compilation = compile_variants(work, compile_rounds)
    base = Runner(programs[BASELINE], work.init(variants()[BASELINE]), work.inputs)
    rows = []
    for name, tx in variants().items():
        print(f"  {work.part}: {work.name}: {name}", file=sys.stderr, flush=True)
        other = Runner(programs[name], work.init(tx), work.inputs)
        times = time_pairs(base, other, repeats, least)
        time_ratio, low, high = median_interval(times[:, 1] / times[:, 0])
        row = {
            "part": work.part,
            "work": work.name,
            "variant": name,
            "milliseconds": 1e3 * float(np.median(times[:, 1])),
            "time_ratio": time_ratio,
            "time_low": low,
            "time_high": high,
            "flops_ratio": other.cost("flops") / base.cost("flops"),
            "bytes_ratio": other.cost("bytes accessed") / base.cost("bytes accessed"),
            "compile_seconds": float(np.median(compilation[name])),
            "compile_ratio": float(np.median(compilation[name] / compilation[BASELINE])),
        }
        rows.append(row | {"missed": missed_targets(row)})
    return rows


def missed_targets(row: dict[str, Any]) -> list[str] | None:
    """The targets that a row misses; None for a row without targets."""
    if "CDB" not in row["variant"]:
        return None
    if row["part"] == "optimizer":
        met = {"time <= 1.05": row["time_ratio"] <= 1.05}
    else:
        met = {
            "time, upper end < 1.03": row["time_high"] < 1.03,
            "FLOPs within 0.1 %": abs(row["flops_ratio"] - 1) <= 0.001,
            "bytes within 1 %": abs(row["bytes_ratio"] - 1) <= 0.01,
            "compilation <= 1.10": row["compile_ratio"] <= 1.10,
        }
    return [target for target, ok in met.items() if not ok]


def table(rows: list[dict[str, Any]]) -> str:
    head = ["part", "work", "optimizer", "ms", "time ratio [95 %]", "FLOPs ratio", "bytes ratio"]
    head += ["compile s", "compile ratio", "targets"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        missed = row["missed"]
        cells = [
            row["part"],
            row["work"],
            row["variant"],
            f"{row['milliseconds']:.1f}",
            f"{row['time_ratio']:.3f} [{row['time_low']:.3f}, {row['time_high']:.3f}]",
            f"{row['flops_ratio']:.4f}",
            f"{row['bytes_ratio']:.4f}",
            f"{row['compile_seconds']:.2f}",
            f"{row['compile_ratio']:.3f}",
            "" if missed is None else "missed: " + "; ".join(missed) if missed else "met",
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": model[1] if model else platform.processor(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
    }


def fill(page: str, table: Callable[[str], str | None]) -> str:
    """A page with new tables: `table` makes those between `<!-- NAME -->` and `<!-- -->`.

    It returns None for those that are not its own.
    """

    def filled(found: re.Match[str]) -> str:
        text = table(found[1])
        return found[0] if text is None else f"<!-- {found[1]} -->\n{text}\n<!-- -->"

    return re.sub(r"<!-- (\S.*?) -->\n.*?<!-- -->", filled, page, flags=re.DOTALL)


def peak_bytes(compiled: Any) -> int:
    """Bytes of arguments, results and temporaries of a program; what is donated counts once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def results_file(benchmark: str, device: str = "") -> Path:
    """Where the results of a benchmark belong, on this device or one that is compiled for."""
    device = device or jax.devices()[0].device_kind
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{benchmark}-{slug}.json"


def publish(output: Path, text: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Prints a table, and writes its rows with the machine and the versions."""
    report = {"machine": machine(), "versions": versions()}
    output.write_text(json.dumps(report | settings | {"rows": rows}, indent=2) + "\n")
    print(text)
    print(f"\n{report['machine']}\n{report['versions']}\nwritten to {output}")


def with_earlier(output: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of other tasks in a file from this machine and these versions, and the new rows."""
    report = {"machine": machine(), "versions": versions()}
    before = json.loads(output.read_text()) if output.exists() else {}
    measured = {row["task"] for row in rows}
    is_same = report.items() <= before.items()
    return [x for x in before["rows"] if x["task"] not in measured] + rows if is_same else rows


def versions() -> dict[str, str]:
    packages = (jax, flax, optax, np, cdb_jax)
    return {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages}


def parse_step(text: str) -> tuple[str, int, int]:
    try:
        name, size, batch = text.split(":")
        return name, int(size), int(batch)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not model:image size:batch size") from None


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    steps = (
        ["resnet50:96:16", "vit_s/16:112:16"] if on_cpu else ["resnet50:224:128", "vit_b/16:224:64"]
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", default=["optimizer", "step"], choices=["optimizer", "step"]
    )
    parser.add_argument(
        "--trees",
        nargs="+",
        default=["resnet50", "vit_b/16"],
        help="models for the optimizer alone",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=parse_step,
        default=[parse_step(s) for s in steps],
        help="training steps, each as model:image size:batch size",
    )
    parser.add_argument(
        "--repeats", type=int, default=50, help="pairs of timings (default: %(default)s)"
    )
    parser.add_argument(
        "--compile-rounds",
        type=int,
        default=5,
        help="compilations of each variant (default: %(default)s)",
    )
    parser.add_argument(
        "--least", type=float, default=0.1, help="seconds of one timing (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: results/overhead-<device>.json)"
    )
    args = parser.parse_args()

    # A cache on disk would hide the compilation that is to be timed.
    jax.config.update("jax_enable_compilation_cache", False)

    works = []
    if "optimizer" in args.parts:
        works += [optimizer_alone(name) for name in args.trees]
    if "step" in args.parts:
        works += [training_step(*step) for step in args.steps]
    rows = []
    for work in works:
        rows += measure(work, args.repeats, args.compile_rounds, args.least)

    settings = {"repeats": args.repeats, "compile_rounds": args.compile_rounds}
    publish(args.output or results_file("overhead"), table(rows), rows, **settings)


if __name__ == "__main__":
    main()
