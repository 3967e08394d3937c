"""Arrays with explicit shardings (`AxisType.Explicit`), which are part of their types.

JAX raises an error if the sharding of a result does not follow from the operands, which can happen
for parts of such arrays. Inside the operations here, XLA chooses the shardings instead, and the
result is sharded like the whole array where that is possible for the part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cdb_jax.selection import Part


def mesh_of(*arrays: Any) -> Any:
    """The mesh of arrays or types that have explicit shardings; None if they have none."""
    for x in jax.tree.leaves(arrays):
        mesh = _sharding_of(x).mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _sharding_of(x: Any) -> NamedSharding:
    """The sharding in a type, or in the type of an array."""
    array_type: Any = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    return array_type.sharding


def plain(array_type: Any) -> Any:
    """A type without its explicit sharding."""
    if mesh_of(array_type) is None:
        return array_type
    return jax.ShapeDtypeStruct(array_type.shape, array_type.dtype)


def num_shards(sharding: NamedSharding, axes: tuple[int, ...]) -> int:
    """The number of shards along some axes of an array."""
    names = [sharding.spec[axis] for axis in axes if axis < len(sharding.spec)]
    return math.prod(sharding.mesh.shape[name] for name in jax.tree.leaves(names))


def part_spec(array: Any, channel: tuple[int, ...], part: Part | None) -> PartitionSpec:
    """The spec of a part of an array; channels stay sharded if all shards keep equally many."""
    sharding = _sharding_of(array)
    shards = num_shards(sharding, channel)
    if part is not None and (len(channel) > 1 or part.blocks % shards):
        return unsharded_spec(array, channel)
    return sharding.spec


def unsharded_spec(array: Any, axes: tuple[int, ...]) -> PartitionSpec:
    """The spec of an array once some of its axes are no longer sharded."""
    names = _sharding_of(array).spec
    return PartitionSpec(*(None if i in axes else name for i, name in enumerate(names)))


def call(f: Callable[..., Any], out_spec: Callable[[], Any], *args: Any) -> Any:
    """`f(*args)`; if arguments are explicitly sharded, XLA finds the shardings inside.

    Args:
      f: a function of arrays.
      out_spec: returns the spec of the result, or a tree of specs. It is called only if arguments
        are explicitly sharded.
      *args: trees of arrays.
    """
    mesh = mesh_of(args)
    if mesh is None:
        return f(*args)
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_spec())
    return jax.sharding.auto_axes(f, out_sharding=sharding)(*args)
