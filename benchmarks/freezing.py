"""What `freeze_dropped` costs, read off compiled programs: bytes accessed and temporary memory.

An Adam step on ten square kernels, alone, with the mask before it, and inside `freeze_dropped`;
ratios are to the step alone, temporary memory to the size of the parameters.

    python benchmarks/freezing.py                   # for this machine, some seconds
    tpu/bin/python benchmarks/freezing.py --tpu     # for TPU v5e without a TPU: see tpu_compile.py

Prints a table and writes `results/freezing-<platform>.json`. Needs jax, optax, numpy.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def describe_tpu() -> Any:
    """A sharding on one chip of a TPU v5e that is not there."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("v5e:2x4", "tpu")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def measure(sharding: Any) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import optax

    import cdb_jax

    policy, adam = cdb_jax.Policy(0.5, key=0, channel_choice="window"), optax.adam(1e-3)
    kinds = {
        "adam": adam,
        "channel_drop_back, adam": optax.chain(cdb_jax.channel_drop_back(policy), adam),
        "freeze_dropped(adam)": cdb_jax.freeze_dropped(adam, policy),
    }
    place = lambda tree: jax.tree.map(
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
    sharding = describe_tpu() if args.tpu else None
    rows = measure(sharding)
    import jax
    import optax

    platform = "tpu-v5e" if args.tpu else jax.default_backend()
    report = {"platform": platform, "jax": jax.__version__, "optax": optax.__version__}
    output = ROOT / "benchmarks" / "results" / f"freezing-{platform}.json"
    output.write_text(json.dumps(report | {"rows": rows}, indent=2) + "\n")
    print("| optimizer | bytes accessed | temporary memory |\n| --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['optimizer']} | {row['bytes_accessed']:.3f} | {row['temporary_memory']:.3f} |"
        )
    print(f"\n{report}\n{output}")


if __name__ == "__main__":
    main()
