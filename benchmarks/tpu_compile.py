"""What a training step costs on TPUs, read off programs compiled for TPU v5e without a TPU.

Three steps of the same model and optimizer: the full gradient, the full gradient masked by
`channel_drop_back`, and `cdb_jax.value_and_grad`, which skips what is dropped. For each: FLOPs,
bytes accessed and temporary memory of one chip, and its collectives.

    python -m venv tpu && tpu/bin/pip install jax libtpu flax optax
    tpu/bin/python benchmarks/tpu_compile.py                    # half an hour on two cores
    tpu/bin/python benchmarks/tpu_compile.py --rows vit:dp:2x4:window

Models are shortened, as compile time grows with depth: ViT-B/16 to 3 of its 12 blocks, ResNet-50 to
one of each kind of its 16 blocks. Prints a table and writes `results/tpu-compile.json`; rows that
are there already are not compiled again.
"""

import argparse
import functools
import json
import math
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import targets
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from overhead import ROOT  # Puts the library on the path.

import cdb_jax
from models.resnet import Bottleneck, ResNet
from models.vit import ViT

BATCH_PER_CHIP = 32
SIZE = 224
ROWS = [
    "vit:dp:2x4:window",
    "vit:dp:2x4:exact",
    "vit:dp:2x4:input",
    "resnet:dp:2x4:window",
    "resnet:dp:2x4:input",
    "vit:fsdp:2x4:window",
    "vit:fsdp-channels:2x4:window",
    "vit:fsdp-channels:2x4:groups",
    "vit:dp:16x16:window",
]


def build(name: str) -> nnx.Module:
    common = dict(num_classes=1000, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    if name == "vit":
        return ViT(768, 3, 12, image_shape=(SIZE, SIZE, 3), patch_size=16, **common)
    return ResNet(Bottleneck, (1, 1, 1, 1), **common)


def policy_of(choice: str, rate: float, chips: int) -> cdb_jax.Policy:
    settings: dict[str, Any] = dict(channel_choice="exact" if choice == "exact" else "window")
    if choice == "input":
        settings["channel_axes"] = cdb_jax.input_channels
    if choice == "groups":
        settings["window_groups"] = chips
    return cdb_jax.Policy(rate, key=0, **settings)


def shardings(params: Any, layout: str, mesh: Mesh) -> Any:
    """Replicated; or each kernel split along its largest other axis, or along its channels."""

    def of(x: Any) -> NamedSharding:
        axes = range(len(x.shape) - 1) if layout == "fsdp" else [len(x.shape) - 1]
        fitting = [i for i in axes if x.shape[i] % mesh.size == 0]
        if layout == "dp" or len(x.shape) < 2 or not fitting:
            return NamedSharding(mesh, P())
        best = max(fitting, key=lambda i: x.shape[i])
        return NamedSharding(mesh, P(*[None] * best, "data"))

    return jax.tree.map(of, params)


def compile_step(name: str, layout: str, topology: str, method: str, policy: Any) -> Any:
    devices = targets.chips(f"v5e:{topology}")
    mesh = Mesh(devices, ("data",))
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: build(name)), nnx.Param, ...)
    tx = optax.adamw(1e-3)
    if method == "mask":
        tx = optax.chain(cdb_jax.channel_drop_back(policy), tx)

    everywhere = NamedSharding(mesh, P())

    def loss(params: Any, rest: Any, images: jax.Array, labels: jax.Array) -> Any:
        if layout != "dp":  # Weights are gathered where they are used, and activations never.
            params = jax.lax.with_sharding_constraint(params, everywhere)
        model = nnx.merge(graph, params, rest, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

    def step(params: Any, opt_state: Any, rest: Any, images: Any, labels: Any, count: Any) -> Any:
        if method == "skip":
            value_and_grad = cdb_jax.value_and_grad(loss, has_aux=True)
            selection = policy.select(params, count)
            (_, rest), grads = value_and_grad(params, rest, images, labels, selection=selection)
        else:
            (_, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, rest

    split = shardings(params, layout, mesh)
    opt_state = jax.eval_shape(tx.init, params)
    split_state = optax.tree.map_params(
        tx, lambda _, s: s, opt_state, split, transform_non_params=lambda _: everywhere
    )
    rest_sharding = jax.tree.map(lambda _: everywhere, rest)
    by_batch = NamedSharding(mesh, P("data"))
    batch = BATCH_PER_CHIP * mesh.size
    images = jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    jitted = jax.jit(
        step,
        in_shardings=(split, split_state, rest_sharding, by_batch, by_batch, everywhere),
        out_shardings=(split, split_state, rest_sharding),
        donate_argnums=(0, 1, 2),
    )
    return jitted.lower(params, opt_state, rest, images, labels, count).compile()


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
# Such as `%name = (f32[8,4]{1,0:T(8,128)}, f32[4]{0}) all-reduce(%a, %b), ...`.
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(([^)]*)\)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count and bytes of the operands of each kind of collective of one chip."""
    # Operands are named without their types, so types are read where values are made.
    made = dict(re.findall(r"(%[\w.-]+) = (\(?[^=]*?\)?) [\w-]+\(", text))
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for _, kind, _, operands in COLLECTIVE.findall(text):
        found[kind]["count"] += 1
        for operand in re.findall(r"%[\w.-]+", operands):
            for dtype, shape in ARRAY.findall(made.get(operand, "")):
                size = math.prod(int(n) for n in shape.split(",") if n)
                found[kind]["bytes"] += size * WIDTHS.get(dtype, 4)
    return dict(found)


@functools.cache
def measure(name: str, layout: str, topology: str, method: str, policy: Any) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = compile_step(name, layout, topology, method, policy)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def measure_row(row: str, rate: float) -> dict[str, Any]:
    name, layout, topology, choice = row.split(":")
    chips = math.prod(int(n) for n in topology.split("x"))
    policy = policy_of(choice, rate, chips)
    result: dict[str, Any] = {"row": row, "rate": rate, "chips": chips}
    for method in ("full", "mask", "skip"):
        used = None if method == "full" else policy
        result[method] = measure(name, layout, topology, method, used)
        print(row, method, result[method], flush=True)
    return result


def traffic(program: dict[str, Any], kinds: tuple[str, ...] = KINDS) -> tuple[int, int]:
    chosen = [x for kind, x in program["collectives"].items() if kind in kinds]
    return sum(x["bytes"] for x in chosen), sum(x["count"] for x in chosen)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model : sharding : chips : choice | | FLOPs | bytes accessed | temporary memory | "
        "bytes reduced | bytes of all collectives | collectives |",
        "| --- " * 8 + "|",
    ]
    for result in results:
        full = result["full"]
        for method in ("mask", "skip"):
            one = result[method]
            ratios = [
                one[key] / full[key] for key in ("flops", "bytes_accessed", "temporary_bytes")
            ]
            reduced = ("all-reduce", "reduce-scatter")
            ratios.append(traffic(one, reduced)[0] / traffic(full, reduced)[0])
            ratios.append(traffic(one)[0] / traffic(full)[0])
            cells = [f"{ratio:.3f}" for ratio in ratios]
            counts = f"{traffic(one)[1]} (full: {traffic(full)[1]})"
            lines.append(f"| {result['row']} | {method} | {' | '.join(cells)} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=ROWS, help="model:sharding:chips:choice")
    parser.add_argument("--rate", type=float, default=0.5, help="drop rate")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/tpu-compile.json")
    args = parser.parse_args()
    results = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    done = {(result["row"], result["rate"]) for result in results}
    for row in args.rows:
        if (row, args.rate) not in done:
            results.append(measure_row(row, args.rate))
        versions = {"jax": jax.__version__, "optax": optax.__version__}
        report = {"target": "TPU v5e", "versions": versions, "rows": results}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
