"""What large trees cost: trace and compile time of the mask and an SGD update, on abstract values.

Trees of 200 to 20,000 leaves, a billion parameters in 400 leaves, and the same billion in layers
that are stacked in four leaves. Nothing is allocated; each program is compared with the same update
without the mask. Temporary memory and bytes are those of the compiled program.

    python benchmarks/size.py                       # some minutes
    tpu/bin/python benchmarks/size.py --tpu         # the stacked tree for 256 chips of TPU v5e

Prints a table and writes `results/size-<device>.json`. Needs jax, flax, optax, numpy.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from overhead import publish, results_file  # Puts the library on the path.

import cdb_jax

STACKED = {
    "attention": (96, 2048, 2048),
    "out": (96, 2048, 1024),
    "up": (96, 1024, 2560),
    "down": (96, 2560, 1024),
}
COMPILES_UP_TO = 2000  # Leaves; beyond, only tracing and lowering are timed.


def trees() -> dict[str, dict[str, tuple[int, ...]]]:
    def square(count, width):
        return {f"layer{i}": (width, width) for i in range(count)}

    return {
        "200 leaves": square(200, 64),
        "2,000 leaves": square(2000, 64),
        "20,000 leaves": square(20_000, 64),
        "a billion in 400 leaves": square(400, 1600),
        "a billion in 4 stacked leaves": STACKED,
    }


def measure(name: str, shapes: dict[str, tuple[int, ...]], place: Any) -> dict[str, Any]:
    stack = (0,) if shapes is STACKED else ()
    policy = cdb_jax.Policy(
        0.5,
        key=0,
        channel_choice="window",
        channel_axes=cdb_jax.Axes(cdb_jax.output_channels, stack=stack),
    )
    params = {
        layer: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for layer, shape in shapes.items()
    }
    params, row = place(params), {"tree": name, "leaves": len(shapes)}
    row["parameters"] = sum(x.size for x in jax.tree.leaves(params))
    sgd = optax.sgd(0.1)
    for kind, tx in (
        ("plain", sgd),
        ("mask", optax.chain(cdb_jax.channel_drop_back(policy), sgd)),
    ):

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(params, state, params)
        row[f"{kind}_trace_s"] = time.perf_counter() - start
        if len(shapes) <= COMPILES_UP_TO:
            start = time.perf_counter()
            compiled = lowered.compile()
            row[f"{kind}_compile_s"] = time.perf_counter() - start
            row[f"{kind}_temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            row[f"{kind}_bytes_accessed"] = compiled.cost_analysis()["bytes accessed"]
    return row


def tpu_place(params: Any) -> Any:
    import targets

    mesh = jax.sharding.Mesh(np.array(targets.chips("v5e:16x16")).reshape(-1), ("fsdp",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec), params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", action="store_true", help="compile for 256 chips of TPU v5e")
    args = parser.parse_args()
    chosen = {k: v for k, v in trees().items() if not args.tpu or v is STACKED}
    rows = []
    for name, shapes in chosen.items():
        rows.append(measure(name, shapes, tpu_place if args.tpu else lambda tree: tree))
        print(rows[-1], flush=True)
    lines = ["| tree | parameters | trace, s | compile, s | temporary bytes |", "| --- " * 5 + "|"]
    for row in rows:

        def pair(key, row=row):
            return " / ".join(
                f"{row[f'{kind}_{key}']:.3g}" if f"{kind}_{key}" in row else "-"
                for kind in ("plain", "mask")
            )

        lines.append(
            f"| {row['tree']} | {row['parameters']:,} | {pair('trace_s')} | {pair('compile_s')} | "
            f"{pair('temporary_bytes')} |"
        )
    lines.append("plain / with the mask")
    output = results_file("size", "tpu-v5e-16x16" if args.tpu else "")
    publish(output, "\n".join(lines), rows)


if __name__ == "__main__":
    main()
