"""Workarounds for XLA give what the plain operations give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdb_jax import _xla

STACKS = [[(), (), (3,), (), (2, 2)], [()] * 150]


@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [np.bool, np.int32, np.float32])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_blocks_of_rows(trailing, dtype, platform, monkeypatch):
    """As the compilers of all platforms get them."""

    def chosen(*operands, **branches):
        return branches[platform](*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    rng = np.random.default_rng(0)
    matrices = [rng.integers(0, 9, (n, *trailing)).astype(dtype) for n in (10, 150)]
    if dtype == np.float32:
        matrices[1][3] = np.inf
    numbers = np.arange(10, dtype=np.int32)  # Floats alone have nothing to compare.
    operands = [*map(jnp.asarray, matrices), jnp.asarray(numbers)]
    found = jax.jit(lambda *matrices: _xla.unstack(matrices, [*STACKS, [(10,)]]))(*operands)
    np.testing.assert_array_equal(found[2][0], numbers)
    for matrix, shapes, blocks in zip(matrices, STACKS, found[:2], strict=True):
        stop = 0
        for shape, block in zip(shapes, blocks, strict=True):
            start, stop = stop, stop + int(np.prod(shape))
            expected = matrix[start:stop].reshape(shape + trailing)
            np.testing.assert_array_equal(block, expected, strict=True)
