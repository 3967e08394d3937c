"""What surrounds a training loop: the mesh, random streams, batches on devices, evaluation."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data import DataSet, test_batches
from epochs import Epochs
from errors import UserError
from processes import StopRequest

SMALLEST_SHARDED = 1024  # Entries; below, sending the shards takes longer than it saves.


def make_mesh(axes: str, batch_size: int) -> jax.sharding.Mesh:
    """All devices of all processes, in the axes that `--mesh` names.

    Args:
      axes: such as "data=4,fsdp=2"; empty for all devices in one axis, "data". Batches are split
        over both axes, parameters and optimizer state over "fsdp".
      batch_size: examples in a batch.

    Raises:
      UserError: if the axes do not hold all devices, or the batch cannot be divided among these.
    """
    devices = jax.device_count()
    try:
        pairs = [axis.split("=") for axis in axes.split(",")] if axes else [("data", devices)]
        sizes = {name: int(size) for name, size in pairs}
        known = len(sizes) == len(pairs) and sizes.keys() <= {"data", "fsdp"}
    except ValueError:
        known = False
    if not known or min(sizes.values()) < 1:
        raise UserError(f"--mesh {axes} must name the axes data and fsdp, as in data=4,fsdp=2.")
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"--mesh {axes} has room for {math.prod(sizes.values())} devices, and there are "
            f"{devices}; the product of the axes must be that."
        )
    if batch_size % devices:
        raise UserError(
            f"--batch-size {batch_size} cannot be divided among {devices} devices; use a multiple."
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """How arrays lie on a mesh: in shards along "fsdp" if they are large, else whole everywhere.

    An array is split along its largest axis that can be; the last, which holds the channels of most
    weights, only if there is no other, so that a run of channels lies on one device.
    """
    shards = mesh.shape.get("fsdp", 1)

    def sharding(x: Any) -> NamedSharding:
        spec = [None] * x.ndim
        able = [axis for axis, size in enumerate(x.shape) if size % shards == 0]
        if shards > 1 and able and x.size >= SMALLEST_SHARDED:
            best = max(able, key=lambda axis: (axis < x.ndim - 1, x.shape[axis]))
            spec[best] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)


def streams(seed: jax.Array) -> dict[str, jax.Array]:
    """A separate key for each layer that drops something."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    names = ("backdrop", "drop_path", "drop_backward")
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def key_of_step(seed: int, step: jax.Array) -> jax.Array:
    """A separate key for what a step draws of the images themselves."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), step)


def process_share() -> dict[str, int]:
    """Which part of each batch this process reads."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def check_epochs(epochs: Epochs) -> None:
    """Raises a UserError for an epoch without steps."""
    if epochs.joined > epochs.batches:
        raise UserError(
            f"--drop-epoch-batch {epochs.joined} joins more batches than the {epochs.batches} of "
            "an epoch; use a smaller --batch-size."
        )


def epoch_batches(
    batches: Iterator[dict[str, np.ndarray]],
    epochs: Epochs,
    epoch: int,
    step: int,
    stop: StopRequest | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of an epoch from a step on, each of one or several batches of the loader.

    They end early if a stop is asked for.
    """
    joined = epochs.batches_in_step(epoch)
    steps = range(step, epochs.start(epoch + 1))
    for _ in steps:
        if stop and stop.is_now():
            return
        try:
            parts = [next(batches) for _ in range(joined)]
        except Exception:
            if stop and stop.signal:  # It may have reached the loader too.
                return
            raise
        yield parts[0] if joined == 1 else jax.tree.map(lambda *x: np.concatenate(x), *parts)
    for _ in range(epochs.batches % joined if steps else 0):
        next(batches)


class StepsInFlight:
    """Steps that the device has yet to compute: at most two.

    JAX would queue dozens. A run that is asked to stop would have to wait for all of them before it
    could save, and each holds a batch.
    """

    def __init__(self) -> None:
        self._results: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> None:
        """Adds a step by what it returns, and waits for the one before the last."""
        self._results.append(result)
        if len(self._results) > 2:
            jax.block_until_ready(self._results.popleft())


def on_mesh(mesh: jax.sharding.Mesh, f: Callable[..., Any], *args: Any) -> Any:
    """The result of `f(*args)`, computed and kept where `shardings` says."""
    return jax.jit(f, out_shardings=shardings(mesh, jax.eval_shape(f, *args)))(*args)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def is_finite(state: Any) -> bool:
    """Whether a run can go on from a state: its parameters, and the loss of all steps so far."""
    return bool(_all_finite((state.params, state.sums)))


def distribute(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Joins the shares of all processes into arrays split along their first axis."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return {
        name: jax.make_array_from_process_local_data(sharding, share)
        for name, share in batch.items()
    }


def evaluate(
    eval_step: Callable,
    state: Any,
    dataset: DataSet,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    share: dict[str, int],
    stop: StopRequest | None = None,
) -> dict[str, float] | None:
    """Mean loss and accuracy over the test images, each counted once; None if asked to stop."""
    parts, in_flight = [], StepsInFlight()
    for batch in test_batches(dataset, batch_size, **share):
        if stop and stop.is_now():
            return None
        parts.append(eval_step(state, distribute(batch, mesh)))
        in_flight.add(parts[-1])
    loss, correct, weight = np.sum(jax.device_get(parts), axis=0).tolist()
    return {"test_loss": loss / weight, "test_accuracy": correct / weight}
