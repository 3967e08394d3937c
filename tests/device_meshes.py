"""Meshes of eight devices, a small model on each, and what its programs send."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

WIDTH, DEPTH = 64, 3
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4}


def params():
    keys = jax.random.split(jax.random.key(0), DEPTH)
    return {
        f"dense{i}": {"kernel": 0.1 * jax.random.normal(key, (WIDTH, WIDTH))}
        for i, key in enumerate(keys)
    }


def loss(params, x):
    for layer in params.values():
        x = jnp.sin(x @ layer["kernel"])
    return jnp.mean(x**2)


def mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


BATCH = jax.random.normal(jax.random.key(1), (32, WIDTH))
# Meshes, and how parameters and batch lie on them.
MESHES = {
    "data-parallel": (mesh((8,), ("data",)), P(), P("data")),
    "fsdp": (mesh((8,), ("data",)), P("data"), P("data")),
    "fsdp over channels": (mesh((8,), ("data",)), P(None, "data"), P("data")),
    "tensor-parallel": (mesh((8,), ("model",)), P(None, "model"), P()),
    "data and tensor": (mesh((2, 4), ("data", "model")), P(None, "model"), P("data")),
    "fsdp and tensor": (mesh((2, 4), ("data", "model")), P("data", "model"), P("data")),
}


def placed(name, tree=None):
    """Parameters and batch on a mesh; vectors lie whole on every device."""
    grid, of_params, of_batch = MESHES[name]

    def put(x):
        return jax.device_put(x, NamedSharding(grid, of_params if x.ndim > 1 else P()))

    tree = jax.tree.map(put, params() if tree is None else tree)
    return tree, jax.device_put(BATCH, NamedSharding(grid, of_batch))


def collectives(f, *args, **kwargs):
    """Count and bytes of each kind of collective, if gradients lie as the parameters do."""
    shardings = jax.tree.map(lambda x: x.sharding, args[0])
    return sent(jax.jit(f, out_shardings=shardings).lower(*args, **kwargs).compile())


def sent(compiled):
    """Count and bytes of each kind of collective in a compiled program."""
    found = collections.defaultdict(lambda: np.zeros(2, int))
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        arrays = re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\]", shapes)
        sizes = [BYTES[dtype] * math.prod(int(n) for n in s.split(",") if n) for dtype, s in arrays]
        found[kind] += 1, sum(sizes)
    return found
