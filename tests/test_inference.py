"""Channels by use: the axes that a loss shows, whatever the names."""

import families
import jax
import pytest
from toy_models import check, window

import cdb_jax
from cdb_jax import Axes


def as_axes(expected):
    return expected and Axes(*expected)


@pytest.mark.parametrize("pattern", families.PATTERNS.values(), ids=families.PATTERNS)
def test_output_channels(pattern, standard_promotion):
    params, loss, args, expected = pattern()
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, args))
    axes = cdb_jax.infer_channel_axes(loss, types[0], *types[1])
    assert {path: x for path, x in axes.items() if x} == {
        path: as_axes(x) for path, x in expected.items()
    }
    check(loss, params, window(channel_axes=axes), *args, counts=3, rtol=1e-5)


def test_input_channels():
    params, loss, args, _ = families.heads()
    axes = cdb_jax.infer_channel_axes(loss, params, *args, channels="input")
    assert axes == {"q": Axes(0), "k": Axes(0), "v": Axes(0), "o": Axes((0, 1))}
    params, loss, args, _ = families.PATTERNS["depthwise"]()
    assert cdb_jax.infer_channel_axes(loss, params, *args, channels="input")["w"] is None
