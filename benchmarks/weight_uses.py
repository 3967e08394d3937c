"""What is skipped for each way in which public models use a weight, and what compiling it costs.

The patterns are those of `tests/families.py`. Compile time is that of the gradient which is not
computed where it is dropped, divided by that of the full gradient with the same mask. The losses
are small, so this is an upper bound.

    python benchmarks/weight_uses.py                # some minutes

Prints a table and writes `results/weight-uses-<device>.json`. Needs jax, flax, optax, chex, numpy.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from overhead import publish, results_file  # Puts the library on the path.

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import families  # noqa: E402

REPEATS = 5


def compile_time(f: Any, tree: Any) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(f).lower(tree).compile()
    return time.perf_counter() - start


def measure(name: str) -> dict[str, Any]:
    tree, masked, skipping, without_weights = families.gradients(name)
    flops = [
        families.product_flops(jax.make_jaxpr(f)(tree)) for f in (masked, skipping, without_weights)
    ]
    # The rate is a half; a weight that another needs whole leaves nothing to skip.
    skippable = 0.5 * (flops[0] - flops[2])
    times = [(compile_time(masked, tree), compile_time(skipping, tree)) for _ in range(REPEATS)]
    return {
        "pattern": name,
        "skipped": round((flops[0] - flops[1]) / skippable, 3) if skippable else None,
        "compile ratio": round(statistics.median(skip / own for own, skip in times), 2),
    }


def main() -> None:
    rows = [measure(name) for name in families.PATTERNS]
    lines = ["| weight | share of the skippable products that is skipped | compile time |"]
    lines += ["| --- | --- | --- |"]
    for row in rows:
        share = "nothing to skip" if row["skipped"] is None else f"{row['skipped']:.2f}"
        lines.append(f"| {row['pattern']} | {share} | {row['compile ratio']:.2f} |")
    publish(results_file("weight-uses"), "\n".join(lines), rows, repeats=REPEATS)


if __name__ == "__main__":
    main()
