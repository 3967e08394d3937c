"""What dropping residual branches saves: time, floating-point operations, temporary memory.

Training steps with uniform drop rates, against the full step:

    mask      stochastic depth for the whole batch; a dropped block is computed all the same
    skip      the same, but a dropped block is not computed
    subset    stochastic depth for samples; a block is computed for the kept ones only
    backward  only the backward pass of a block is dropped, and not computed
    backward, remat   the same, and the forward pass of a block is recomputed if it is kept

All are timed in turns in one process, each step with other draws; ratios are to the full step of
the same round, shown is their mean with a bootstrap 95 % interval over rounds. Operations are those
of an average step, counted by the compiler; memory is what the compiled program reserves for
temporaries.

    python benchmarks/depth.py                          # a quarter of an hour on two cores
    python benchmarks/depth.py --steps vit_b/16:224:64 --dtype bfloat16
    python benchmarks/depth.py --rounds 0               # counts only

Prints a Markdown table and writes `results/depth-<device>.json`. Needs jax, flax, optax, numpy.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from overhead import parse_step, peak_bytes, publish, results_file  # Puts the library on the path.
from skipping import mean_interval

import cdb_jax
import models

# Blocks of language models' width, few enough to compile in minutes.
models.VITS["blocks2048"] = (2048, 3, 16)
STEPS = ("vit_s/16:64:64", "resnet18:64:16")
RATES = (0.4, 0.5)


class Variant(NamedTuple):
    """How a step differs from the full one.

    Attributes:
      name: for the table.
      how: what happens to residual blocks, as in `models.Branches`.
      recomputes: whether blocks are recomputed in the backward pass.
      rate: the drop rate of the blocks.
      policy: what is dropped of the gradient, if anything.
      use: what applies the policy: a mask "before" or "after" the optimizer; or `value_and_grad`,
        which skips what is dropped, before the plain optimizer, `freeze_dropped` or `compact`.
      backdrop_rate: of Backdrop over tokens or positions.
    """

    name: str
    how: models.How = "mask"
    recomputes: bool = False
    rate: float = 0.0
    policy: cdb_jax.Policy | None = None
    use: Literal["before", "after", "skip", "freeze", "compact"] = "before"
    backdrop_rate: float = 0.0

    def optimizer(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        if self.policy is None or self.use == "skip":
            return inner
        if self.use == "freeze":
            return cdb_jax.freeze_dropped(inner, self.policy)
        if self.use == "compact":
            return cdb_jax.compact(inner, self.policy)
        mask = cdb_jax.channel_drop_back(self.policy)
        return optax.chain(mask, inner) if self.use == "before" else optax.chain(inner, mask)


def policy(rate: float, channel_choice: str = "window", **settings: Any) -> cdb_jax.Policy:
    """A policy for all layers but the head."""
    return cdb_jax.Policy(rate, key=0, channel_choice=channel_choice, exempt=("head",), **settings)


FULL = Variant("full")
WINDOW = policy(0.5)
VARIANTS = (
    Variant("mask", "mask"),
    Variant("skip", "skip"),
    Variant("subset", "subset"),
    Variant("backward", "backward"),
    Variant("backward, remat", "backward", True),
)


class Step(NamedTuple):
    """A compiled training step that updates its state in place.

    Attributes:
      seconds: runs it, and returns how long that took.
      flops: its floating-point operations.
      temporaries: bytes that it needs besides its arguments and results.
      peak: bytes of arguments, results and temporaries.
    """

    seconds: Callable[[], float]
    flops: float
    temporaries: int
    peak: int


def compile_step(
    name: str,
    size: int,
    batch_size: int,
    dtype: str,
    variant: Variant,
    kept: Any = None,
    states: dict[Any, list[Any]] | None = None,
) -> Step:
    """Compiles a step.

    Args:
      kept: replaces the draw of the branches that keep their backward pass.
      states: parameters and optimizer states of other steps. The new step goes on from one of them
        if it fits, so that many steps of a large model find room on a GPU.
    """
    graph, params, rest = nnx.split(build(name, size, dtype, variant), nnx.Param, ...)
    batch = jax.random.normal(jax.random.key(0), (batch_size, size, size, 3))
    batch = batch, jnp.arange(batch_size) % 1000
    tx, train = training_step(graph, variant, kept)
    opt_state = tx.init(params)
    state = [params, opt_state, rest]
    jitted = jax.jit(train, donate_argnums=(0, 1, 2))  # As a training loop does.
    compiled = jitted.lower(*state, jnp.int32(0), *batch).compile()
    if states is not None:
        layout = jax.tree.structure(state), tuple(x.shape for x in jax.tree.leaves(state))
        state = states.setdefault(layout, state)
    counts = itertools.count()

    def seconds() -> float:
        start = time.perf_counter()
        *new, _ = jax.block_until_ready(compiled(*state, jnp.int32(next(counts)), *batch))
        elapsed = time.perf_counter() - start
        state[:] = new
        return elapsed

    temporaries = compiled.memory_analysis().temp_size_in_bytes
    flops = compiled.cost_analysis()["flops"]
    return Step(seconds, flops, temporaries, peak_bytes(compiled))


def build(name: str, size: int, dtype: str, variant: Variant, num_shards: int = 1) -> nnx.Module:
    """A model for images of `size` pixels, whose blocks are dropped as the variant says."""
    rates = (variant.rate,) * models.depth(name)
    model = models.create(
        name,
        num_classes=1000,
        image_shape=(size, size, 3),
        dtype=dtype,
        branches=models.Branches(rates, variant.how, num_shards),
        backdrop_rate=variant.backdrop_rate,
        rngs=nnx.Rngs(0, drop_path=1, drop_backward=1, backdrop=1),
    )
    if variant.recomputes:
        recompute_branches(model)
    return model


def training_step(
    graph: Any, variant: Variant, kept: Any = None
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimizer, and `train(params, opt_state, rest, count, images, labels)`."""
    policy, tx = variant.policy, variant.optimizer(optax.adamw(1e-3))

    def train(params: Any, opt_state: Any, rest: Any, count: Any, images: Any, labels: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            logits = model(images, kept=kept)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

        value_and_grad, given = jax.value_and_grad(loss_fn, has_aux=True), {}
        if policy:
            given = {"selection": policy.select(params, count)}
        if policy and variant.use in ("skip", "freeze", "compact"):
            kept_only = variant.use == "compact"
            skipping = cdb_jax.value_and_grad(loss_fn, has_aux=True, kept_only=kept_only)
            value_and_grad = functools.partial(skipping, **given)
        (loss, new_rest), grads = value_and_grad(params)
        if variant.use == "skip":
            given = {}
        updates, opt_state = tx.update(grads, opt_state, params, **given)
        return optax.apply_updates(params, updates), opt_state, new_rest, loss

    return tx, train


def recompute_branches(model: nnx.Module) -> None:
    """Stores only the input of each residual branch, under `nnx.remat`."""
    for block in model.blocks:
        block.drop_path.recomputes = True


def mean_flops(variant: Variant, step: Step, full: Step, *settings: Any) -> float | None:
    """The operations of an average step; None for layers that are frozen at random.

    A compiler cannot know how often it takes a conditional, so those of a step that drops all
    branches are counted too. Each branch takes part in a share of `1 - rate` of the steps.
    """
    rate, policy = variant.rate, variant.policy
    whole = (1.0, "bernoulli")  # Every layer is masked, and none left out at random.
    if policy and variant.use != "after" and (policy.layer_rate, policy.layer_choice) != whole:
        return None
    if variant.how == "skip":
        none = compile_step(*settings, variant._replace(rate=1.0))
        return rate * none.flops + (1 - rate) * full.flops
    if variant.how == "backward":
        name = settings[0]
        depth = models.depth(name) * (1 if name.startswith("resnet") else 2)
        none, every = (
            compile_step(*settings, variant, np.full(depth, kept)) for kept in (False, True)
        )
        return rate * none.flops + (1 - rate) * every.flops
    return step.flops


def is_slow_in_conditionals(name: str) -> bool:
    """Whether it has convolutions, which XLA's CPU compiler runs slowly inside a conditional."""
    return name.startswith("resnet") and jax.default_backend() == "cpu"


def compare(
    name: str, size: int, batch: int, dtype: str, variants: Sequence[Variant], rounds: int
) -> list[dict[str, Any]]:
    settings = name, size, batch, dtype
    states: dict[Any, list[Any]] = {}
    full = compile_step(*settings, FULL, states=states)
    variants = [x for x in variants if x.how != "skip" or not is_slow_in_conditionals(name)]
    steps = {x.name: compile_step(*settings, x, states=states) for x in variants}
    for step in (full, *steps.values()):
        step.seconds()
    base: list[float] = []
    times: dict[str, list[list[float]]] = {x: [] for x in steps}
    for i in range(rounds):
        base.append(full.seconds())
        for j in np.random.default_rng(i).permutation(len(steps)):
            step = steps[variants[j].name]
            times[variants[j].name].append([step.seconds(), step.seconds()])
    rows = []
    for variant in variants:
        step = steps[variant.name]
        flops = mean_flops(variant, step, full, *settings)
        row = {
            "task": f"{name} {size}px batch {batch} adamw" + f" {dtype}" * (dtype != "float32"),
            "variant": variant.name,
            "rate": variant.rate,
            "flops": None if flops is None else flops / full.flops,
            "temporaries": step.temporaries / full.temporaries,
            "peak": step.peak / full.peak,
        }
        if rounds:
            measured = np.array(times[variant.name]) / np.array(base)[:, None]
            ratio, low, high = mean_interval(measured)
            row |= {"ratio": ratio, "low": low, "high": high, "rounds": rounds}
            row |= {"full_ms": float(np.median(base) * 1e3)}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| training step | rate | blocks | time | 95 % interval | FLOPs | temporaries | peak |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        time_, interval = "-", "-"
        flops = "-" if row["flops"] is None else f"{row['flops']:.3f}"
        if "ratio" in row:
            time_, interval = f"{row['ratio']:.3f}", f"[{row['low']:.3f}, {row['high']:.3f}]"
        lines.append(
            f"| {row['task']} | {row['rate']} | {row['variant']} | {time_} | {interval} | "
            f"{flops} | {row['temporaries']:.3f} | {row['peak']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="*", type=parse_step)
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    names = [x.name for x in VARIANTS]
    parser.add_argument("--variants", nargs="*", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for name, size, batch in args.steps or [parse_step(x) for x in STEPS]:
        for rate in args.rates:
            variants = [x._replace(rate=rate) for x in VARIANTS if x.name in args.variants]
            rows += compare(name, size, batch, args.dtype, variants, args.rounds)
    publish(args.output or results_file("depth"), table(rows), rows)


if __name__ == "__main__":
    main()
