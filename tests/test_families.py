"""The names and shapes of public models: the one line accepts them, and never the wrong axis."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cdb_jax import channels

FAMILIES = json.loads((Path(__file__).parent / "data" / "families.json").read_text())
# Names and shapes say nothing, or the biases contradict the names.
REFUSED = ("kan", "s5_layer", "hf_gpt2")


def axes_used_as(uses, *names):
    return {axis for axis, found in enumerate(uses) if {x.split("/")[0] for x in found} & {*names}}


def mistakes(leaf, uses):
    """What is wrong with the channels of a leaf, given how its loss uses it."""
    outputs = axes_used_as(uses, "out")
    features = axes_used_as(uses, "out(gather)")
    stack = axes_used_as(uses, "stack(scan)", "indexed", "batch")
    if not any(uses):  # In no product.
        return ""
    free = set(leaf.channel) | set(leaf.stack)
    if set(leaf.channel) in (outputs, features) or free == outputs:
        return ""
    if (
        set(leaf.channel) <= outputs
        and set(leaf.stack) <= stack | outputs
        and free >= outputs - stack
    ):
        return ""
    return f"{leaf.path} {leaf.shape}: {leaf.channel}, stack {leaf.stack}, but it is used as {uses}"


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes(name):
    leaves = FAMILIES[name]["leaves"]
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape, _ in leaves}
    uses = {path: found for path, _, found in leaves}
    if name in REFUSED:
        with pytest.raises(ValueError) as error:
            channels.resolve(tree)
        first, *others = str(error.value).splitlines()
        assert "channel_axes=cdb_jax.infer_channel_axes(loss_fn, params, batch)" in first
        assert len(others) < 10
        return
    layout = channels.resolve(tree)
    wrong = [m for leaf in layout.layers if (m := mistakes(leaf, uses[leaf.path]))]
    assert not wrong, "\n".join(wrong)
