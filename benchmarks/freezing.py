"""What `freeze_dropped` costs, read off compiled programs: bytes accessed and temporary memory.

An Adam step on ten square kernels, alone, with the mask before it, and inside `freeze_dropped`;
ratios are to the step alone, temporary memory to the size of the parameters.

    python benchmarks/freezing.py                   # for this machine, some seconds
    tpu/bin/python benchmarks/freezing.py --tpu     # for TPU v5e without a TPU: see tpu_compile.py

Prints a table and writes `results/freezing-<device>.json`. Needs jax, flax, optax,
numpy.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from overhead import publish, results_file  # Puts the library on the path.

import cdb_jax


def measure(sharding: Any) -> list[dict[str, Any]]:
    policy, adam = cdb_jax.Policy(0.5, key=0, channel_choice="window"), optax.adam(1e-3)
    kinds = {
        "adam": adam,
        "channel_drop_back, adam": optax.chain(cdb_jax.channel_drop_back(policy), adam),
        "freeze_dropped(adam)": cdb_jax.freeze_dropped(adam, policy),
    }

    def place(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    kernel = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    params = place({f"layer{i}": kernel for i in range(10)})
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    rows: list[dict[str, Any]] = []
    for name, tx in kinds.items():

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = place(jax.eval_shape(tx.init, params))
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        accessed = compiled.cost_analysis()["bytes accessed"]
        row = {
            "optimizer": name,
            "bytes_accessed": accessed / (rows[0]["bytes"] if rows else accessed),
            "bytes": accessed,
            "temporary_memory": compiled.memory_analysis().temp_size_in_bytes / size,
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", action="store_true", help="compile for TPU v5e")
    args = parser.parse_args()
    sharding = None
    if args.tpu:
        import targets

        sharding = jax.sharding.SingleDeviceSharding(targets.chips("v5e:2x4")[0])
    rows = measure(sharding)
    lines = ["| optimizer | bytes accessed | temporary memory |", "| --- | --- | --- |"]
    lines += [
        f"| {row['optimizer']} | {row['bytes_accessed']:.3f} | {row['temporary_memory']:.3f} |"
        for row in rows
    ]
    publish(results_file("freezing", "tpu-v5e" if args.tpu else ""), "\n".join(lines), rows)


if __name__ == "__main__":
    main()
