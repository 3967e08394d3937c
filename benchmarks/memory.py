"""What a training step keeps in memory: parameters, gradient, optimizer state, temporaries, peak.

All numbers are read off compiled programs; nothing runs but the optimizers that `--update` times.
Steps of ViTs, whose blocks are scanned so that depth costs no compilation, and of a ResNet-50:

- full: the whole gradient;
- mask: the same with `channel_drop_back` before the optimizer;
- skip: `value_and_grad`, which computes the kept part of the gradient;
- compact: `value_and_grad(..., kept_only=True)` and `compact`, which keep no more than that part;
- "input": the same with input channels;
- "elementwise" or "blocks computed again": with `jax.checkpoint` around each block, which keeps the
  results of products with weights, or nothing inside the block.

    python benchmarks/memory.py                             # compiled for this machine: minutes
    python benchmarks/memory.py --update                    # the time of an optimizer's update
    python benchmarks/memory.py --residuals                 # what the blocks of a ViT-B/16 store
    tpu/bin/python benchmarks/memory.py --target tpu        # in the environment of tpu_compile.py
    tpu/bin/python benchmarks/memory.py --target tpu --fit --few  # and what fits 16 GB: an hour

Prints a Markdown table and writes `results/memory-<device>.json`; rows that are there already are
not compiled again. Needs jax, flax, optax, numpy.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from overhead import (  # Puts the library on the path.
    Runner,
    machine,
    median_interval,
    optimizer_alone,
    publish,
    results_file,
    time_pairs,
    versions,
)

import cdb_jax
from models import create

SIZE, CLASSES = 224, 1000
CAPACITY = 16 * 10**9  # Bytes of a TPU v5e chip.
OPTIMIZERS = {"adamw": optax.adamw(1e-3), "sgd": optax.sgd(0.1, momentum=0.9)}


class Step(NamedTuple):
    """A row of the table: what is compiled."""

    model: str = "vit_b/16"
    method: str = "full"  # full, mask, skip or compact
    kept: float = 1.0  # The fraction of the channels.
    direction: str = "output"
    remat: str = "none"  # none, elementwise or blocks
    optimizer: str = "adamw"
    mesh: str = "one"  # one, dp or fsdp
    batch: int = 32  # Of a chip.
    depth: int = 0  # Of a ViT; 0 for that of the model.


WHERE = ("model", "optimizer", "mesh")
METHODS = [
    Step(),
    Step(method="mask", kept=1 / 2),
    Step(method="skip", kept=1 / 2),
    *(Step(method="compact", kept=kept) for kept in (1 / 2, 1 / 4, 1 / 8)),
    *(Step(method="compact", kept=kept, direction="input") for kept in (1 / 2, 1 / 4)),
    *(
        step._replace(remat=remat)
        for remat in ("elementwise", "blocks")
        for step in (
            Step(),
            Step(method="compact", kept=1 / 4),
            Step(method="compact", kept=1 / 4, direction="input"),
        )
    ),
]
REMAT = {
    "none": lambda body: body,
    "elementwise": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "blocks": jax.checkpoint,
}


def steps(models: list[str], optimizers: list[str], meshes: list[str], batch: int) -> list[Step]:
    return [
        step._replace(model=model, optimizer=optimizer, mesh=mesh, batch=batch)
        for model in models
        for optimizer in optimizers
        for mesh in meshes
        for step in METHODS
        if model.startswith("vit") or step.remat == "none"
    ]


def policy_of(step: Step) -> cdb_jax.Policy:
    convention = cdb_jax.input_channels if step.direction == "input" else cdb_jax.output_channels

    def axes(path: str, _: Any) -> Any:
        is_stacked = path.startswith("blocks/0/") and step.model.startswith("vit")
        return cdb_jax.Axes(convention, stack=0) if is_stacked else convention

    return cdb_jax.Policy(
        1.0 - step.kept,
        key=0,
        channel_axes=axes,
        channel_choice="window",
        hold=100,
        exempt=("head",),
    )


class Scanned:
    """The blocks of a ViT as one loop over stacked parameters."""

    def __init__(self, block: nnx.Module, params: Any, remat: str):
        self.graph, _, self.rest = nnx.split(block, nnx.Param, ...)
        self.params, self.remat = params, remat

    def __call__(self, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(self.graph, params, self.rest, copy=True)(x), None

        return jax.lax.scan(REMAT[self.remat](body), x, self.params)[0]


class Model(NamedTuple):
    """Shapes of the parameters and of everything else, and the loss."""

    params: Any
    rest: Any
    loss: Callable[..., jax.Array]


@functools.cache
def build(name: str, depth: int, remat: str, dtype: Any) -> Model:
    is_vit = name.startswith("vit")

    def make() -> nnx.Module:
        model = create(
            name,
            num_classes=CLASSES,
            image_shape=(SIZE, SIZE, 3),
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        if is_vit:
            model.blocks = nnx.List(model.blocks[:1])
        return model

    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    if is_vit:
        depth = depth or {"vit_s": 12, "vit_b": 12, "vit_l": 24}[name.split("/")[0]]

        def stacked(x: Any) -> Any:
            return jax.ShapeDtypeStruct((depth, *x.shape), x.dtype)

        params["blocks"][0] = jax.tree.map(stacked, params["blocks"][0])

    def loss(params: Any, rest: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        outer = jax.tree.map(lambda x: x, params)
        if is_vit:
            outer["blocks"][0] = jax.tree.map(lambda x: x[0], params["blocks"][0])
        model = nnx.merge(graph, outer, rest, copy=True)
        if is_vit:
            scanned = Scanned(model.blocks[0], params["blocks"][0], remat)
            object.__setattr__(model, "blocks", (scanned,))
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    return Model(params, rest, loss)


def meshes(target: str, kind: str) -> Mesh:
    if target == "tpu":
        import targets

        devices = targets.chips("v5e:2x4")[:1] if kind == "one" else targets.chips("v5e:2x4")
    else:
        devices = jax.devices()[:1]
    return Mesh(devices, ("data",))


def shardings(tree: Any, mesh: Mesh, kind: str) -> Any:
    """Replicated, or split along the largest axis but the last and those that stack blocks."""

    def spec(path: Any, x: Any) -> NamedSharding:
        names = [None] * len(x.shape)
        first = 1 if "blocks" in jax.tree_util.keystr(path) and len(x.shape) > 2 else 0
        able = [i for i in range(first, len(x.shape) - 1) if x.shape[i] % mesh.size == 0]
        if kind == "fsdp" and able:
            names[max(able, key=lambda i: x.shape[i])] = "data"
        return NamedSharding(mesh, P(*names))

    return jax.tree_util.tree_map_with_path(spec, tree)


def size_of(tree: Any, sharding: Any) -> int:
    """Bytes on one chip."""
    return sum(
        int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(sharding), strict=True)
    )


def compile_step(step: Step, target: str) -> dict[str, Any]:
    model = build(
        step.model, step.depth, step.remat, jnp.bfloat16 if target == "tpu" else jnp.float32
    )
    mesh, policy = meshes(target, step.mesh), policy_of(step)
    tx = OPTIMIZERS[step.optimizer]
    if step.method == "mask":
        tx = optax.chain(cdb_jax.channel_drop_back(policy), tx)
    if step.method == "compact":
        tx = cdb_jax.compact(tx, policy)
    whole = NamedSharding(mesh, P())
    of_params = shardings(model.params, mesh, step.mesh)

    def gradient(params: Any, count: jax.Array, *rest: Any) -> tuple[Any, dict[str, Any]]:
        loss = model.loss
        if step.mesh == "fsdp":  # Weights are gathered where they are used.

            def loss(params: Any, *rest: Any) -> jax.Array:
                return model.loss(jax.lax.with_sharding_constraint(params, whole), *rest)

        if step.method in ("full", "mask"):
            return jax.grad(loss)(params, *rest), {}
        selection = policy.select(params, count)
        compact = step.method == "compact"
        grad = cdb_jax.grad(loss, kept_only=compact)
        return grad(params, *rest, selection=selection), {"selection": selection} if compact else {}

    def train(params: Any, state: Any, count: jax.Array, *rest: Any) -> Any:
        grads, selection = gradient(params, count, *rest)
        updates, state = tx.update(grads, state, params, **selection)
        return optax.apply_updates(params, updates), state

    batch = step.batch * mesh.size
    rest = (
        model.rest,
        jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(tx.init, model.params)
    of_state = shardings(state, mesh, step.mesh)
    by_batch = NamedSharding(mesh, P("data"))
    jitted = jax.jit(
        train,
        in_shardings=(of_params, of_state, whole, whole, by_batch, by_batch),
        out_shardings=(of_params, of_state),
        donate_argnums=(0, 1),
    )
    start = time.perf_counter()
    memory = jitted.lower(model.params, state, count, *rest).compile().memory_analysis()
    grads = jax.eval_shape(lambda *args: gradient(*args)[0], model.params, count, *rest)
    found = {
        "parameters": size_of(model.params, of_params),
        "gradient": size_of(grads, shardings(grads, mesh, step.mesh)),
        "state": size_of(state, of_state),
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }
    if target == "tpu":  # The compiler for CPUs does not count temporaries in its peak.
        found["peak"] = memory.peak_memory_in_bytes
    return found


def peak(step: Step, target: str) -> float:
    """Bytes; infinite if the compiler says that it needs more than a chip has."""
    try:
        return float(compile_step(step, target)["peak"])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def largest(step: Step, target: str, field: str, start: int, unit: int) -> int:
    """The largest multiple of a unit for a field with which a step fits.

    Brackets it like bisection; but as peaks grow nearly in proportion, tries first where a line
    through two of them says that memory ends.
    """
    peaks = {n: peak(step._replace(**{field: n}), target) for n in (start, 2 * start)}
    while True:
        low = max((n for n, x in peaks.items() if x <= CAPACITY), default=0)
        high = min((n for n, x in peaks.items() if x > CAPACITY), default=math.inf)
        if high - low <= unit:
            return low
        known = sorted((n, x) for n, x in peaks.items() if x < math.inf)[-2:]
        guess = (low + high) / 2  # Not infinite if fewer than two peaks are known.
        if len(known) == 2:
            (m, x), (n, y) = known
            guess = m + (CAPACITY - x) * (n - m) / (y - x)
        n = int(min(max(guess // unit * unit, low + unit), high - unit))
        peaks[n] = peak(step._replace(**{field: n}), target)


def update_row(kept: float, rounds: int) -> dict[str, Any]:
    """The time of AdamW's update inside `compact` against that of AdamW, on the tree of a ViT-B."""
    work = optimizer_alone("vit_b/16")
    adamw = OPTIMIZERS["adamw"]
    policy = cdb_jax.Policy(1.0 - kept, key=0, channel_choice="window", hold=100, exempt=("head",))
    tx = cdb_jax.compact(adamw, policy)
    (grads,) = work.inputs

    def compact_step(carry: Any, kept_grads: Any) -> Any:
        params, state = carry
        selection = policy.select(params, state.count)
        updates, state = tx.update(kept_grads, state, params, selection=selection)
        return optax.apply_updates(params, updates), state

    def zeros(params: Any) -> Any:  # A gradient of the kept size, as `value_and_grad` returns it.
        return jax.tree.map(jnp.zeros_like, tx.init(params).inner_state[0].mu)

    runners, seconds = [], []
    for init, step, inputs in (
        (work.init(adamw), work.step(adamw), grads),
        (work.init(tx), compact_step, jax.jit(zeros)(grads)),
    ):
        start = time.perf_counter()
        program = jax.jit(step, donate_argnums=0).lower(init, inputs).compile()
        seconds.append(time.perf_counter() - start)
        runners.append(Runner(program, init, (inputs,)))
    times = time_pairs(*runners, rounds, 0.0)
    ratio, low, high = median_interval(times[:, 1] / times[:, 0])
    return {
        "kept": kept,
        "ratio": ratio,
        "low": low,
        "high": high,
        "compile": seconds[1] / seconds[0],
        "full_milliseconds": 1e3 * float(np.median(times[:, 0])),
    }


def label(step: Step) -> str:
    name = step.method
    if step.method != "full":
        name += f", 1/{1 / step.kept:.0f} of the channels"
    if step.direction == "input":
        name += ", input"
    return name if step.remat == "none" else f"{name}, {step.remat} computed again"


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the table: after the full step that it is compared with."""
    step = Step(*(row[name] for name in Step._fields))
    order = METHODS.index(
        step._replace(**{name: getattr(Step(), name) for name in (*WHERE, "batch", "depth")})
    )
    return (*(row[name] for name in WHERE), row["batch"], list(REMAT).index(step.remat), order)


def table(rows: list[dict[str, Any]]) -> str:
    """Bytes against those of the full step with the same remat; of full steps in MB."""
    columns = ("parameters", "gradient", "state", "temporaries", "peak")
    lines = [
        f"| step | {' | '.join(columns)} | parameters + gradient + state | batch | depth |",
        "| --- " * 9 + "|",
    ]
    full: dict[str, float] = {}
    for row in rows:
        step = Step(*(row[name] for name in Step._fields))
        held = sum(row[name] for name in columns[:3])
        if step.method == "full":
            full = row | {"held": held}
            cells = [f"{row[name] / 1e6:,.0f} MB" for name in columns] + [f"{held / 1e6:,.0f} MB"]
        else:
            cells = [f"{row[name] / full[name]:.2f}" for name in columns]
            cells.append(f"{held / full['held']:.3f}")
        cells += [str(row.get(f"largest_{name}", "")) for name in ("batch", "depth")]
        title = f"{step.model}, {step.optimizer}, {step.mesh}, batch {step.batch}: {label(step)}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--models", nargs="+", default=["vit_s/16", "vit_b/16", "resnet50"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"])
    parser.add_argument("--meshes", nargs="+", choices=("one", "dp", "fsdp"), default=["one"])
    parser.add_argument("--batch", type=int, default=32, help="images of a chip")
    parser.add_argument("--few", action="store_true", help="only full steps and a quarter")
    parser.add_argument("--fit", action="store_true", help="also find what fits 16 GB")
    parser.add_argument("--update", action="store_true", help="time the update of AdamW instead")
    parser.add_argument("--residuals", action="store_true", help="list what blocks store instead")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if args.update:
        return time_updates(args.rounds)
    if args.residuals:
        return count_residuals()
    output = results_file("memory", "tpu-v5e" if args.target == "tpu" else "cpu")
    before = json.loads(output.read_text()) if output.exists() else {}
    rows = before.get("rows", [])

    def keep() -> None:
        rows.sort(key=place)
        report = {"machine": machine(), "versions": versions(), "rows": rows}
        output.write_text(json.dumps(report, indent=1) + "\n")

    chosen = steps(args.models, args.optimizers, args.meshes, args.batch)
    if args.few:
        chosen = [x for x in chosen if x.remat != "elementwise" and x.kept in (1.0, 1 / 4)]
    for step in chosen:
        row = next((x for x in rows if step._asdict().items() <= x.items()), None)
        if row is None:
            row = step._asdict() | compile_step(step, args.target)
            rows.append(row)
            print(label(step), row, flush=True)
            keep()
        if args.fit and "largest_batch" not in row:
            row["largest_batch"] = largest(step, args.target, "batch", 16, 8)
            if step.model.startswith("vit"):
                row["largest_depth"] = largest(step, args.target, "depth", 8, 1)
            print(label(step), row, flush=True)
            keep()
    publish(output, table(rows), rows)


def residuals(step: Step) -> dict[str, Any]:
    """What the blocks of a ViT store for their backward pass, read off the traced program."""
    model, policy = build(step.model, step.depth, step.remat, jnp.bfloat16), policy_of(step)

    def gradient(params: Any, *rest: Any) -> Any:
        if step.method == "full":
            return jax.grad(model.loss)(params, *rest)
        selection = policy.select(params, 0)
        return cdb_jax.grad(model.loss, kept_only=True)(params, *rest, selection=selection)

    images = jax.ShapeDtypeStruct((step.batch, SIZE, SIZE, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((step.batch,), jnp.int32)
    program = jax.make_jaxpr(gradient)(model.params, model.rest, images, labels).jaxpr
    _, *stored = next(scans(program)).outvars  # The first are the tokens after the last block.
    sizes: dict[str, int] = {}
    for x in (v.aval for v in stored):
        name = f"{x.dtype}{list(x.shape)}"
        sizes[name] = sizes.get(name, 0) + x.size * x.dtype.itemsize
    arrays = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    return step._asdict() | {"stored": sum(sizes.values()), "arrays": arrays}


def scans(program: Any) -> Iterator[Any]:
    for eqn in program.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                yield from scans(inner)


def count_residuals() -> None:
    chosen = [
        step for step in METHODS if step.remat != "blocks" and step.method in ("full", "compact")
    ]
    rows = [residuals(step) for step in chosen]
    lines = ["| step | stored for the backward pass | the largest |", "| --- " * 3 + "|"]
    for step, row in zip(chosen, rows, strict=True):
        largest = ", ".join(
            f"{x / 1e6:,.0f} MB {name}" for name, x in list(row["arrays"].items())[:4]
        )
        lines.append(f"| {label(step)} | {row['stored'] / 1e6:,.0f} MB | {largest} |")
    publish(results_file("residuals"), "\n".join(lines), rows)


def time_updates(rounds: int) -> None:
    rows = [update_row(kept, rounds) for kept in (1 / 2, 1 / 4, 1 / 8)]
    lines = ["| channels kept | time of the update | 95 % interval | compilation |"]
    lines += ["| --- " * 4 + "|"]
    for row in rows:
        ratio, interval = f"{row['ratio']:.3f}", f"[{row['low']:.3f}, {row['high']:.3f}]"
        lines.append(f"| 1/{1 / row['kept']:.0f} | {ratio} | {interval} | {row['compile']:.2f} |")
    publish(results_file("update"), "\n".join(lines), rows)


if __name__ == "__main__":
    main()
