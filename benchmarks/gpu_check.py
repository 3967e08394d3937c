"""Whether the library does on this GPU what it does on the CPU: `make gpu-check`.

Every way to mask, freeze and skip runs on both, on the same values:

- selections are equal bit for bit, results to the rounding of the GPU's products;
- a compiled update waits for no host, and a mask holds no temporary as large as a layer;
- gradients that skip do at most as many FLOPs as full ones.

    python benchmarks/gpu_check.py

Prints every check, writes `results/gpu-check-<device>.json`, and fails if any of them does. Needs
jax, flax, optax, numpy.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from overhead import publish, results_file  # Puts the library on the path.
from skipping import count_flops

import cdb_jax

WIDTH, LAYERS, BATCH = 256, 4, 64
POLICIES = {
    "bernoulli": cdb_jax.Policy(0.5, key=0, layer_rate=0.7),
    "exact": cdb_jax.Policy(0.5, key=0, channel_choice="exact"),
    "window": cdb_jax.Policy(0.5, key=0, channel_choice="window"),
    "whole layers": cdb_jax.Policy(1.0, key=0, layer_rate=0.5),
    "one layer": cdb_jax.presets.algorithm_1(
        0.5, key=0, other_layers="frozen", channel_choice="window"
    ),
}


def problem(device: jax.Device) -> tuple[Any, jax.Array]:
    """Dense layers and a convolution, and their input; the same numbers on every device."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jax.device_put(rng.normal(0, 0.1, shape).astype(np.float32), device)

    params = {f"dense{i}": {"kernel": normal(WIDTH, WIDTH)} for i in range(LAYERS)}
    params["conv"] = {"kernel": normal(3, 3, 1, 64)}
    return params, normal(BATCH, WIDTH)


def loss(params: Any, x: jax.Array) -> jax.Array:
    images = jax.lax.conv_general_dilated(
        x.reshape(BATCH, 16, 16, 1),
        params["conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    for i in range(LAYERS):
        x = jnp.sin(x @ params[f"dense{i}"]["kernel"])
    return jnp.mean(x**2) + jnp.mean(jnp.sin(images) ** 2)


# Adam divides by the size of the gradient, and so makes rounding of any size out of rounding.
MOMENTUM = optax.sgd(1e-2, momentum=0.9)
ADAM = optax.adam(1e-2)


def transformations(
    policy: cdb_jax.Policy, inner: optax.GradientTransformation
) -> dict[str, optax.GradientTransformation]:
    drop = cdb_jax.channel_drop_back(policy)
    return {
        "before": optax.chain(drop, inner),
        "after": optax.chain(inner, drop),
        "frozen": cdb_jax.freeze_dropped(inner, policy),
    }


def check(passed: bool, figure: Any) -> dict[str, Any]:
    return {"passed": bool(passed), "figure": figure}


def same_selection(policy: cdb_jax.Policy, devices: list[jax.Device]) -> dict[str, Any]:
    drawn = [
        jax.jit(lambda tree: [policy.select(tree, i).factors for i in range(5)])(problem(device)[0])
        for device in devices
    ]
    differing = sum(
        int(np.sum(np.asarray(x) != np.asarray(y)))
        for x, y in zip(*map(jax.tree.leaves, drawn), strict=True)
    )
    return check(differing == 0, f"{differing} factors differ")


def same_result(f: Callable[..., Any], devices: list[jax.Device]) -> dict[str, Any]:
    with jax.default_matmul_precision("highest"):
        results = [jax.device_get(jax.jit(f)(*problem(device))) for device in devices]
    errors = [
        np.max(np.abs(x - y)) / (np.max(np.abs(y)) + 1e-30)
        for x, y in zip(*map(jax.tree.leaves, results), strict=True)
    ]
    error = float(np.max(errors))  # NaN if any is, and then not small.
    return check(error < 1e-4, f"largest relative difference {error:.1e}")


def lean_update(
    tx: optax.GradientTransformation, device: jax.Device, limit: float
) -> dict[str, Any]:
    params, _ = problem(device)
    state = jax.device_put(tx.init(params), device)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = update.lower(params, state, params).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    gradients = jax.tree.map(jnp.copy, params)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(gradients, state, params))
    return check(temporary < limit, f"{temporary:,} bytes of temporaries")


def fewer_flops(policy: cdb_jax.Policy) -> dict[str, Any]:
    params, x = problem(jax.devices("cpu")[0])

    def skip(params, x, step):
        return cdb_jax.grad(loss)(params, x, selection=policy.select(params, step))

    flops = [count_flops(skip, params, x, jnp.int32(0)), count_flops(jax.grad(loss), params, x)]
    return check(flops[0] <= flops[1], f"{flops[0] / flops[1]:.3f} of the FLOPs")


def checks(devices: list[jax.Device]) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, policy in POLICIES.items():
        found[f"selection, {name}"] = lambda policy=policy: same_selection(policy, devices)
        for place, tx in transformations(policy, MOMENTUM).items():

            def two_steps(params: Any, x: jax.Array, tx: Any = tx) -> Any:
                state = tx.init(params)
                for _ in range(2):
                    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
                    params = optax.apply_updates(params, updates)
                return updates

            found[f"{place}, {name}"] = lambda f=two_steps: same_result(f, devices)
        for place, tx in transformations(policy, ADAM).items():
            # What freezing holds depends on the compiler: it is reported.
            limit = float("inf") if place == "frozen" else 4 * WIDTH * WIDTH
            found[f"{place}, {name}: cost"] = lambda tx=tx, limit=limit: lean_update(
                tx, devices[0], limit
            )
        if name != "bernoulli":

            def skip(params, x, policy=policy):
                return cdb_jax.grad(loss)(params, x, selection=policy.select(params, 3))

            found[f"skipped, {name}"] = lambda f=skip: same_result(f, devices)
        if name in ("exact", "window"):
            found[f"skipped, {name}: cost"] = lambda policy=policy: fewer_flops(policy)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", default="gpu", help="what is checked, against the CPU")
    args = parser.parse_args()
    try:
        device = jax.devices(args.platform)[0]
    except RuntimeError as error:
        raise SystemExit(f"error: no {args.platform} was found: {error}") from None
    rows = []
    for name, run in checks([device, jax.devices("cpu")[0]]).items():
        try:
            row = run()
        except Exception as error:
            row = check(False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        rows.append({"check": name, **row})
        print("ok    " if row["passed"] else "FAILED", name, "--", row["figure"], flush=True)
    failed = sum(not row["passed"] for row in rows)
    kind = device.device_kind.lower().replace(" ", "-")
    summary = f"{len(rows) - failed} of {len(rows)} checks passed on {device.device_kind}"
    publish(results_file("gpu-check", kind), summary, rows)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
