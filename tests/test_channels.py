"""The axis found for every kind of module, by name."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from cdb_jax import Axes, input_channels, output_channels
from cdb_jax.channels import covers, resolve

KEY = jax.random.key(0)


def axes_of(tree, channel_axes=output_channels, **options):
    """Path -> (channel axes, stack axes) of each layer; None where a leaf is left alone."""
    layout = resolve(tree, channel_axes, **options)
    return {x.path: (x.channel, x.stack) if x.layer is not None else None for x in layout.leaves}


def rngs():
    return nnx.Rngs(0)


# module, its input, the path of its weight, output axes, input axes (None: left alone)
NNX = {
    "dense": (lambda: nnx.Linear(3, 4, rngs=rngs()), "m/kernel", (1,), (0,)),
    "conv1d": (lambda: nnx.Conv(3, 4, (5,), rngs=rngs()), "conv/kernel", (2,), (1,)),
    "conv2d": (lambda: nnx.Conv(3, 4, (5, 5), rngs=rngs()), "m/kernel", (3,), (2,)),
    "conv3d": (lambda: nnx.Conv(3, 4, (2, 2, 2), rngs=rngs()), "conv/kernel", (4,), (3,)),
    "grouped": (
        lambda: nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=rngs()),
        "m/kernel",
        (3,),
        (2,),
    ),
    "depthwise": (
        lambda: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs()),
        "m/kernel",
        (3,),
        None,
    ),
    "transposed": (lambda: nnx.ConvTranspose(3, 4, (2, 2), rngs=rngs()), "m/kernel", (3,), (2,)),
    "embedding": (lambda: nnx.Embed(7, 4, rngs=rngs()), "m/embedding", (1,), None),
    "query": (lambda: nnx.MultiHeadAttention(2, 8, rngs=rngs()), "m/query/kernel", (1, 2), (0,)),
    "value": (lambda: nnx.MultiHeadAttention(2, 8, rngs=rngs()), "m/value/kernel", (1, 2), (0,)),
    "out": (lambda: nnx.MultiHeadAttention(2, 8, rngs=rngs()), "m/out/kernel", (2,), (0, 1)),
    "norm": (lambda: nnx.LayerNorm(4, rngs=rngs()), "m/scale", None, None),
}


class Holder(nnx.Module):
    def __init__(self, name, module):
        setattr(self, name, module)
        self.other = nnx.Linear(2, 2, rngs=rngs())


@pytest.mark.parametrize("make, path, output, input", NNX.values(), ids=NNX)
def test_nnx(make, path, output, input):
    params = nnx.state(Holder(path.split("/")[0], make()), nnx.Param)
    for convention, expected in ((output_channels, output), (input_channels, input)):
        found = axes_of(params, convention)
        assert found[path] == (expected and (expected, ()))
        assert found["other/bias"] is None


class Everything(nn.Module):
    @nn.compact
    def __call__(self, image, tokens):
        x = nn.Conv(4, (3, 3))(image)
        x = nn.ConvTranspose(4, (2, 2))(x)
        x = nn.BatchNorm(use_running_average=True)(x).mean((1, 2))
        x = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "m")))(x)
        y = nn.Embed(7, 4)(tokens) + self.param("pos_embedding", nn.initializers.ones, (1, 5, 4))
        y = nn.MultiHeadDotProductAttention(2)(y)
        return x.sum() + y.sum() + nn.Conv(4, (3,))(y).sum()


def test_linen():
    variables = Everything().init(KEY, jnp.ones((1, 4, 4, 3)), jnp.ones((1, 5), jnp.int32))
    found = axes_of({"params": variables["params"]})
    attention = "MultiHeadDotProductAttention_0"
    expected = {
        "Conv_0/kernel": ((3,), ()),
        "Conv_1/kernel": ((2,), ()),
        "ConvTranspose_0/kernel": ((3,), ()),
        "Dense_0/kernel": ((1,), ()),
        "Embed_0/embedding": ((1,), ()),
        f"{attention}/query/kernel": ((1, 2), ()),
        f"{attention}/key/kernel": ((1, 2), ()),
        f"{attention}/value/kernel": ((1, 2), ()),
        f"{attention}/out/kernel": ((2,), ()),
    }
    assert {path: axes for path, axes in found.items() if axes} == expected
    assert found["pos_embedding"] is None and found["BatchNorm_0/scale"] is None


EQUINOX = {
    "linear": (lambda: eqx.nn.Linear(3, 4, key=KEY), "m", (0,), (1,)),
    "conv1d": (lambda: eqx.nn.Conv1d(3, 4, 2, key=KEY), "conv", (0,), (1,)),
    "conv2d": (lambda: eqx.nn.Conv2d(3, 4, 2, key=KEY), "m", (0,), (1,)),
    "conv3d": (lambda: eqx.nn.Conv3d(3, 4, 2, key=KEY), "conv", (0,), (1,)),
    "transposed": (lambda: eqx.nn.ConvTranspose2d(3, 4, 2, key=KEY), "m", (0,), (1,)),
    "depthwise": (lambda: eqx.nn.Conv2d(4, 4, 2, groups=4, key=KEY), "m", (0,), None),
    "embedding": (lambda: eqx.nn.Embedding(7, 4, key=KEY), "embedding", (1,), None),
    "norm": (lambda: eqx.nn.LayerNorm((4, 5)), "norm", None, None),
}


@pytest.mark.parametrize("make, name, output, input", EQUINOX.values(), ids=EQUINOX)
def test_equinox(make, name, output, input):
    tree = eqx.filter({name: make(), "other": eqx.nn.Linear(2, 2, key=KEY)}, eqx.is_inexact_array)
    for convention, expected in ((output_channels, output), (input_channels, input)):
        assert axes_of(tree, convention)[f"{name}/weight"] == (expected and (expected, ()))


def test_scanned_stack():
    tree = {
        "blocks": {"fc": {"kernel": jnp.zeros((3, 8, 6)), "bias": jnp.zeros((3, 6))}},
        "head": {"kernel": jnp.zeros((6, 2))},
    }
    spec = {"blocks": Axes(output_channels, stack=0), "head": output_channels}
    expected = {
        "blocks/fc/kernel": ((2,), (0,)),
        "blocks/fc/bias": None,
        "head/kernel": ((1,), ()),
    }
    assert axes_of(tree, spec) == expected
    assert axes_of(tree, {"blocks": Axes(-1, stack=0), "head": -1}) == expected

    def rule(path, leaf):
        return Axes(output_channels, stack=0) if path.startswith("blocks") else output_channels

    assert axes_of(tree, rule) == expected
    shared = axes_of(tree, spec, share_with_bias=True)
    assert shared["blocks/fc/bias"] == ((1,), (0,))


def test_specs_of_every_form():
    tree = {"a": jnp.zeros((2, 3, 4)), "b": jnp.zeros(5)}
    assert axes_of(tree, -1) == {"a": ((2,), ()), "b": None}
    assert axes_of(tree, (0, -1)) == {"a": ((0, 2), ()), "b": None}
    assert axes_of(tree, {"a": 1, "b": 0}) == {"a": ((1,), ()), "b": ((0,), ())}
    assert axes_of(tree, {"a": (-1, 1), "b": None}) == {"a": ((1, 2), ()), "b": None}
    assert axes_of(tree | {"b": optax.MaskedNode()}, {"a": 1, "b": 0}) == {"a": ((1,), ())}
    assert axes_of([tree["a"]], lambda path, leaf: leaf.ndim - 1) == {"0": ((2,), ())}


def test_nnx_paths_are_the_same_with_and_without_the_variable():
    state = nnx.state(nnx.Linear(3, 4, rngs=rngs()), nnx.Param)
    pure = nnx.to_pure_dict(state)
    assert axes_of(state) == axes_of(pure) == axes_of({"params": pure})


def test_attention_projection_called_value_keeps_its_name():
    tree = {"value": {"kernel": jnp.zeros((8, 2, 4))}, "key": {"kernel": jnp.zeros((8, 2, 4))}}
    assert set(axes_of(tree)) == {"value/kernel", "key/kernel"}


def test_root_and_exempt():
    part = {"0": {"kernel": jnp.zeros((2, 3))}}
    assert set(axes_of(part, root="encoder/blocks")) == {"encoder/blocks/0/kernel"}
    tree = {"stem": part, "head": part, "bias": jnp.zeros(2)}
    found = axes_of(tree, exempt=("stem", "bia*"))
    assert found["stem/0/kernel"] is None and found["head/0/kernel"] is not None
    assert covers("stem", "stem/0/kernel") and covers("*/0", "stem/0/kernel")
    assert not covers("stem", "stem2/kernel") and not covers("0", "stem/0/kernel")


def test_leaves_without_values_are_left_alone():
    tree = {
        "kernel": jnp.zeros((2, 2)),
        "count": jnp.zeros((2, 2), jnp.int32),
        "empty": {"kernel": jnp.zeros((0, 2))},
        "none": None,
    }
    assert axes_of(tree, -1) == {"kernel": ((1,), ()), "count": None, "empty/kernel": None}


def test_layers_with_the_same_id_are_an_error(monkeypatch):
    monkeypatch.setattr("cdb_jax.channels.layer_id", lambda path: 7)
    tree = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"kernel": jnp.zeros((2, 2))}}
    with pytest.raises(ValueError, match="'a/kernel' and 'b/kernel' have the same 32-bit id 0x7"):
        resolve(tree)


def test_layers_without_a_bias_in_a_tree_of_specs():
    """Equinox has None where a layer has no bias, in specs and in gradients."""
    tree = {"a": {"kernel": jnp.zeros((2, 4)), "bias": None}}
    for specs in (
        {"a": {"kernel": -1, "bias": None}},
        {"a": {"kernel": -1, "bias": -1}},
        {"a": -1},
    ):
        assert axes_of(tree, specs) == {"a/kernel": ((1,), ())}
    assert axes_of(tree, exempt=("a/bias",)) == {"a/kernel": ((1,), ())}


def test_a_tree_that_is_one_array():
    assert axes_of(jnp.zeros(4), lambda path, leaf: leaf.ndim - 1) == {"": ((0,), ())}
    assert axes_of(jnp.zeros((2, 4)), -1) == {"": ((1,), ())}
    assert axes_of(jnp.zeros((2, 4)), -1, root="head") == {"head": ((1,), ())}


@pytest.mark.parametrize("name", ["wte", "tok_emb", "vocab", "codebook", "table"])
def test_tables_are_dropped_by_features(name):
    assert axes_of({name: {"weight": jnp.zeros((50, 8))}}) == {f"{name}/weight": ((1,), ())}


@pytest.mark.parametrize("name", ["value", "args/0", "a/b", "b/0"])
def test_a_matrix_of_any_name_is_a_weight(name):
    assert axes_of({name: jnp.zeros((6, 4))}) == {name: ((1,), ())}


def test_a_bias_of_several_dimensions():
    layer = {"w": jnp.zeros((16, 4, 8)), "b": jnp.zeros((4, 8))}
    assert axes_of({"q": layer}) == {"q/w": ((1, 2), ()), "q/b": None}
    stacked = {"w": jnp.zeros((3, 16, 8)), "b": jnp.zeros((3, 8))}
    assert axes_of({"up": stacked}) == {"up/w": ((2,), (0,)), "up/b": None}


@pytest.mark.parametrize("convention", [output_channels, input_channels])
def test_a_bias_that_contradicts_the_name(convention):
    square = {"c_proj": {"kernel": jnp.zeros((60, 60)), "bias": jnp.zeros(60)}}
    wide = {"c_proj": {"kernel": jnp.zeros((6, 3)), "bias": jnp.zeros(6)}}
    assert axes_of(wide, convention)["c_proj/kernel"][0] == (
        (0,) if convention is output_channels else (1,)
    )
    # The square kernel may be the other way round as well.
    with pytest.raises(
        ValueError, match=rf"{convention.direction} channels.*\n.*attn/c_proj/kernel"
    ):
        resolve({"attn": square, "mlp": wide}, convention)
