"""What a training step costs on GPUs and TPUs, read off programs compiled without one.

The same model and optimizer (AdamW, bfloat16) with each method, compiled for NVIDIA H100 and TPU
v5e: one and eight of the first, eight and 256 of the second. Counted, on one chip: FLOPs, bytes,
temporary memory, and for GPUs kernels, loops and conditionals; bytes of all-reduces. Where a step
decides at random, the mean of what it may do counts.

From these follows a time, *computed and not measured*: a kernel takes as long as its FLOPs at half
the peak of the chip, as its bytes at 80 % of the bandwidth, or as its launch, whichever is longest;
a TPU's program counts as one kernel.

    accelerators/bin/python benchmarks/accelerators.py      # see targets.py for what it needs
    accelerators/bin/python benchmarks/accelerators.py --targets h100:1 --models ViT-S/16

Some models are shortened, as compile time grows with depth: see `MODELS`. Prints a table, and
writes `results/accelerators.json` and the tables of `docs/benchmarks.md`. Programs that are there
already are not compiled again.
"""

import argparse
import collections
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import targets
from depth import FULL, WINDOW, Variant, build, policy, training_step
from flax import nnx
from hlo import Kernel, count, kernels, parse
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from overhead import ROOT, fill, versions  # Puts the library on the path.

import cdb_jax
import models
from models.resnet import RESNETS, Bottleneck, Size
from models.vit import VITS

VITS |= {"vit_b_short": (768, 3, 12), "vit_l_short": (1024, 3, 16)}
RESNETS["resnet50_short"] = Size(Bottleneck, (1, 1, 1, 1), 64)


class Model(NamedTuple):
    """A model of the examples, the side of its images, and how many of them a chip gets."""

    name: str
    size: int
    batch: int


MODELS = {
    "ViT-S/16": Model("vit_s/16", 224, 64),
    "ViT-B/16, 3 of 12 blocks": Model("vit_b_short/16", 224, 64),
    "ViT-L/16, 3 of 24 blocks": Model("vit_l_short/16", 224, 64),
    "3 blocks of width 2048, 1,025 tokens": Model("blocks2048/16", 512, 8),
    "ResNet-50": Model("resnet50", 224, 64),
    "ResNet-50, 4 of 16 blocks": Model("resnet50_short", 224, 64),
}
VARIANTS = (
    FULL,
    Variant("masked", policy=WINDOW),
    Variant("window", policy=WINDOW, use="skip"),
    Variant("chunk", policy=policy(0.5, channel_choice="chunk"), use="skip"),
    Variant("exact", policy=policy(0.5, channel_choice="exact"), use="skip"),
    Variant("input channels", policy=policy(0.5, channel_axes=cdb_jax.input_channels), use="skip"),
    Variant("whole layers", policy=policy(1.0, layer_rate=0.5), use="skip"),
    Variant("compact, 0.75", policy=policy(0.75, hold=100), use="compact"),
    Variant("drop_backward", "backward", rate=0.5),
    Variant("stochastic depth, part of the batch", "subset", rate=0.5),
)
RESULTS, PAGE = ROOT / "benchmarks/results/accelerators.json", ROOT / "docs/benchmarks.md"
TARGETS = ("h100:1", "h100:8", "v5e:2x4", "v5e:16x16")
# Shares of the chip's peak and bandwidth that a good kernel reaches.
COMPUTE, MEMORY = 0.5, 0.8


def compile_step(model: Model, variant: Variant, target: str, kept: Any = None) -> Any:
    """The program of one chip of those that share the batch."""
    mesh = Mesh(np.array(targets.chips(target)).reshape(-1), ("data",))
    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: build(model.name, model.size, "bfloat16", variant, mesh.size)),
        nnx.Param,
        ...,
    )
    tx, train = training_step(graph, variant, kept)
    batch = model.batch * mesh.size
    images = jax.ShapeDtypeStruct((batch, model.size, model.size, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    jitted = jax.jit(
        train,
        in_shardings=(whole, whole, whole, whole, split, split),
        out_shardings=whole,
        donate_argnums=(0, 1, 2),
    )
    count_ = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(tx.init, params)
    return jitted.lower(params, state, rest, count_, images, labels).compile()


def extremes(model: Model, variant: Variant) -> list[tuple[Variant, Any]]:
    """Steps without a conditional, of which a step of the variant is the mean.

    The compiler for TPUs counts the longest branch of each conditional.
    """
    if variant.how == "backward":
        branches = models.depth(model.name) * (1 if "resnet" in model.name else 2)
        return [(variant, np.full(branches, x)) for x in (False, True)]
    if variant.name == "whole layers":
        return [(variant._replace(policy=policy(1.0, layer_rate=x)), None) for x in (0.0, 1.0)]
    return []


def measure(model: Model, variant: Variant, target: str) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = compile_step(model, variant, target)
    seconds = time.perf_counter() - start
    program = parse(compiled.as_text())
    found = kernels(program)
    products = [x for x in found if x.flops]
    row: dict[str, Any] = {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "conditionals": count(program, "conditional"),
        "products": len(products),
        "products_in_conditionals": sum(x.is_conditional for x in products),
        "all_reduced": sum(x.sent * x.runs for x in found),
        "compile_seconds": round(seconds, 1),
    }
    chip = targets.CHIPS[target.partition(":")[0]]
    if chip.launch:
        row |= {
            "flops": sum(x.flops * x.runs for x in found),
            "bytes": sum(x.bytes * x.runs for x in found),
            "kernels": sum(x.runs for x in found),
            "loops": count(program, "while"),
        }
    else:
        programs = [compile_step(model, x, target, kept) for x, kept in extremes(model, variant)]
        costs = [x.cost_analysis() for x in programs or [compiled]]
        row |= {
            "flops": float(np.mean([x["flops"] for x in costs])),
            "bytes": float(np.mean([x["bytes accessed"] for x in costs])),
        }
        found = [Kernel("program", row["flops"], row["bytes"], 0, 1, False)]
    return row | roofline(found, chip)


def roofline(found: Iterable[Kernel], chip: targets.Chip) -> dict[str, Any]:
    """The time of a step, and what most of it is spent on."""
    spent = {"products": 0.0, "memory": 0.0, "launches": 0.0}
    for x in found:
        needs = {
            "products": x.flops / (COMPUTE * chip.flops),
            "memory": x.bytes / (MEMORY * chip.bandwidth),
            "launches": chip.launch,
        }
        bound = max(needs, key=lambda name: needs[name])
        spent[bound] += x.runs * needs[bound]
    return {
        "seconds": sum(spent.values()),
        "bound": max(spent, key=lambda name: spent[name]),
        "spent": spent,
    }


RATIOS = ("seconds", "flops", "bytes", "temporaries", "kernels", "all_reduced")


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios to the full step, whose own figures stand in its row."""
    head = ["step", "bound by", "time, computed", "FLOPs", "bytes", "temporaries", "kernels"]
    head += ["all-reduced", "loops", "conditionals", "products in them"]
    full = {(x["model"], x["target"]): x for x in rows if x["variant"] == FULL.name}
    lines = []
    for (model, target), base in full.items():
        lines += [f"\n**{model}, {target}**\n"]
        lines += ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for row in rows:
            if (row["model"], row["target"]) != (model, target):
                continue
            cells = [row["variant"], row["bound"]]
            for key in RATIOS:
                if not base.get(key):
                    cells.append("")
                elif row is base:
                    cells.append(absolute(key, row[key]))
                else:
                    cells.append(f"{row[key] / base[key]:.3f}")
            cells += [str(row.get("loops", "")), str(row["conditionals"])]
            cells += [f"{row['products_in_conditionals']} of {row['products']}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matrix(rows: list[dict[str, Any]], target: str, key: str) -> str:
    """One figure of all steps and models on a target; ratios to the full step, which comes first.

    Models for which there is only one step, or no full one, are left out.
    """
    rows = [row for row in rows if row["target"] == target]
    counts = collections.Counter(row["model"] for row in rows)
    rows = [row for row in rows if counts[row["model"]] > 1]
    found = {(row["variant"], row["model"]): row for row in rows}
    full = {model: found[FULL.name, model] for model in MODELS if (FULL.name, model) in found}
    lines = ["| step | " + " | ".join(full) + " |", "| --- " * (1 + len(full)) + "|"]
    present = {row["variant"] for row in rows}
    for variant in [x.name for x in VARIANTS if x.name in present]:
        cells = [variant]
        for model, base in full.items():
            row = found.get((variant, model))
            if row is None:
                cells.append("not compiled")
            else:
                is_base = row is base
                cells.append(absolute(key, row[key]) if is_base else f"{row[key] / base[key]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bounds(rows: list[dict[str, Any]], target: str) -> str:
    """What the full step of each model spends its time on."""
    found = {(row["model"], row["target"]): row for row in rows if row["variant"] == FULL.name}
    lines = ["| model | matrix units | memory | launches |", "| --- " * 4 + "|"]
    for model in MODELS:
        if row := found.get((model, target)):
            shares = [f"{row['spent'][x] / row['seconds']:.0%}" for x in row["spent"]]
            lines.append(f"| {model} | " + " | ".join(shares).replace("%", " %") + " |")
    return "\n".join(lines)


def with_tables(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the tables that `<!-- TARGET FIGURE -->` asks for."""

    def table(name: str) -> str:
        target, figure = name.split()
        return bounds(rows, target) if figure == "bound" else matrix(rows, target, figure)

    return fill(page, table)


def absolute(key: str, value: float) -> str:
    if key == "seconds":
        return f"{value * 1e3:.2f} ms"
    if key == "kernels":
        return f"{value:.0f}"
    if key == "flops":
        return f"{value / 1e9:,.0f} GFLOP"
    return f"{value / 1e6:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=TARGETS, help="kind:chips")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    names = [x.name for x in VARIANTS]
    parser.add_argument("--variants", nargs="*", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    earlier = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    if earlier.get("versions", versions()) != versions():
        raise SystemExit(f"error: {args.output} has rows of other versions; choose --output.")
    rows = earlier["rows"]
    done = {(x["model"], x["target"], x["variant"]) for x in rows}
    for target in args.targets:
        for name in args.models:
            for variant in VARIANTS:
                key = dict(model=name, target=target, variant=variant.name)
                if variant.name not in args.variants or tuple(key.values()) in done:
                    continue
                rows.append(key | measure(MODELS[name], variant, target))
                print(rows[-1], flush=True)
                report = {"versions": versions(), "rows": rows}
                args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    if args.output == RESULTS:
        PAGE.write_text(with_tables(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
