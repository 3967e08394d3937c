"""All methods side by side: the same training step of a ViT and a ResNet, with each of them.

Time, floating-point operations and temporary memory of a step, against the full step with AdamW;
see `depth.py` for how they are measured.

    python benchmarks/methods.py                     # half an hour on two cores
    python benchmarks/methods.py --rounds 0          # counts only

Prints a Markdown table and writes `results/methods-<device>.json`. Needs jax, flax, optax, numpy.
"""

import argparse
from pathlib import Path

from depth import STEPS, WINDOW, Variant, compare, policy, table
from overhead import parse_step, publish, results_file  # Puts the library on the path.

import cdb_jax

VARIANTS = (
    Variant("channels 0.5, masked before AdamW", policy=WINDOW),
    Variant("channels 0.5, masked after AdamW", policy=WINDOW, use="after"),
    Variant("channels 0.5, skipped", policy=WINDOW, use="skip"),
    Variant(
        "channels 0.5 in chunks, skipped", policy=policy(0.5, channel_choice="chunk"), use="skip"
    ),
    Variant("exact channels 0.5, skipped", policy=policy(0.5, channel_choice="exact"), use="skip"),
    Variant("channels 0.75, skipped", policy=policy(0.75), use="skip"),
    Variant(
        "input channels 0.5, skipped",
        policy=policy(0.5, channel_axes=cdb_jax.input_channels),
        use="skip",
    ),
    Variant("channels 0.5, frozen and skipped", policy=WINDOW, use="freeze"),
    Variant("channels 0.75, compact and skipped", policy=policy(0.75, hold=100), use="compact"),
    Variant("whole layers 0.5, skipped", policy=policy(1.0, layer_rate=0.5), use="skip"),
    Variant(
        "one layer learns, others frozen, skipped",
        policy=policy(0.0, layer_choice="exact", other_layers="frozen"),
        use="skip",
    ),
    Variant(
        "SkipUpdate 0.5",
        policy=cdb_jax.presets.skip_update(0.5, key=0, exempt=("head",)),
        use="after",
    ),
    Variant("Backdrop 0.5", backdrop_rate=0.5),
    Variant("stochastic depth 0.4, computed", "mask", rate=0.4),
    Variant("stochastic depth 0.4, on part of the batch", "subset", rate=0.4),
    Variant("drop_backward 0.5", "backward", rate=0.5),
    Variant(
        "drop_backward 0.5, channels 0.5 skipped", "backward", rate=0.5, policy=WINDOW, use="skip"
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="*", type=parse_step)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for name, size, batch in args.steps or [parse_step(x) for x in STEPS]:
        rows += compare(name, size, batch, args.dtype, VARIANTS, args.rounds)
        # Now, in case the next step does not fit the device.
        publish(args.output or results_file("methods"), table(rows), rows)


if __name__ == "__main__":
    main()
