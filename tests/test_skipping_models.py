"""`value_and_grad` of whole models against the full gradient, masked by the same selection."""

import drawn
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from toy_models import check, normal, small_loss, small_params, window

import cdb_jax
import cdb_jax.nnx
import models

POLICIES = {
    "window": window(),
    "window 0.9": window(0.9),
    "window in groups": window(window_groups=2),
    "chunk": cdb_jax.Policy(0.75, key=0, channel_choice="chunk"),
    "exact": cdb_jax.Policy(0.3, key=0, channel_choice="exact"),
    "input": window(0.25, channel_axes=cdb_jax.input_channels),
    "input exact": cdb_jax.Policy(
        0.5, key=1, channel_choice="exact", channel_axes=cdb_jax.input_channels
    ),
    "rescaled": window(rescale="expected"),
    "realized": window(rescale="realized"),
    "shared with bias": window(share_with_bias=True),
    "some layers": window(layer_rate=0.5),
    "some layers, input": window(layer_rate=0.5, channel_axes=cdb_jax.input_channels),
    "scheduled layers": window(
        layer_rate=lambda step: jnp.float32(0.1) * (3 + step % 3).astype(jnp.float32)
    ),
    "whole layers": cdb_jax.Policy(1.0, key=0, layer_rate=0.5),
    "whole layers, rescaled": cdb_jax.Policy(1.0, key=0, layer_rate=0.5, rescale="expected"),
    "one": window(layer_choice="exact"),
    "one, others frozen": window(layer_choice="exact", other_layers="frozen"),
    "one in full": cdb_jax.Policy(0.0, key=0, layer_choice="exact", other_layers="frozen"),
    "one, sometimes in part": window(
        layer_choice="exact", other_layers="frozen", layer_rate=0.5, exempt=("conv",)
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_equals_the_masked_gradient_under_every_policy(name):
    kernels = {"conv/kernel", "dense1/kernel", "dense2/kernel"}
    if POLICIES[name].exempt:
        kernels -= {"conv/kernel"}
    check(
        small_loss, small_params(), POLICIES[name], normal(9, 2, 5, 5, 4), counts=6, skips=kernels
    )


EXAMPLES = [
    pytest.param("resnet_small", "float32", cdb_jax.output_channels, id="resnet"),
    pytest.param(
        *("vit_mini/4", "float32", cdb_jax.input_channels),
        marks=pytest.mark.slow,
        id="vit-input",
    ),
    pytest.param(
        *("vit_mini/4", "bfloat16", cdb_jax.output_channels),
        marks=pytest.mark.slow,
        id="vit-bfloat16",
    ),
    pytest.param(
        *("resnet_small", "bfloat16", cdb_jax.input_channels),
        marks=pytest.mark.slow,
        id="resnet-bfloat16-input",
    ),
]


@pytest.mark.parametrize("name, dtype, axes", EXAMPLES)
def test_example_models(name, dtype, axes, standard_promotion):
    model = models.create(
        name, num_classes=10, image_shape=(8, 8, 3), dtype=dtype, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    # Scales and kernels that start at zero hide gradients.
    params = jax.tree.map(lambda x: x + 0.1 * normal(1, *x.shape), params)

    def loss(params, images):
        logits = nnx.merge(graph, params, rest, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean()

    policy = window(channel_axes=axes, exempt=("head",))
    rtol = 1e-5 if dtype == "float32" else 0.05
    report = check(loss, params, policy, normal(2, 4, 8, 8, 3), rtol=rtol, counts=2)
    layers = [row for row in report.rows if row.channels]
    assert len(layers) > 8
    assert {row.gradient for row in layers} == {"skipped"}, str(report)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.Conv(8, (3, 3), strides=2, name="conv_strided")(x)
        y = linen.Conv(8, (3, 3), kernel_dilation=2, padding="VALID", name="conv_dilated")(y)
        y = linen.ConvTranspose(6, (2, 2), strides=(2, 2), name="conv_transpose")(linen.relu(y))
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        y = y + linen.MultiHeadDotProductAttention(num_heads=3, name="attention")(y)
        y = linen.DenseGeneral((2, 4), name="dense_general")(y)
        y = linen.Einsum((2, 4, 5), "...ab,abc->...c", name="mix_einsum")(linen.tanh(y))
        return linen.Dense(3, name="dense")(y)


def linen_axes(path, leaf):
    if path == "mix_einsum/kernel":
        return 2
    if path == "dense_general/kernel":
        return (1, 2)
    return cdb_jax.output_channels


def test_linen(standard_promotion):
    x = normal(0, 2, 9, 9, 3)
    params = LinenNet().init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(LinenNet().apply(params, x) ** 2)

    report = check(loss, params, window(channel_axes=linen_axes), x)
    assert {row.gradient for row in report.rows if row.channels} == {"skipped"}, str(report)
    assert sum(bool(row.channels) for row in report.rows) == 10


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        y = linen.Dense(12, name="dense1")(x)
        return x + linen.Dense(6, name="dense2")(linen.gelu(y)), None


class Stack(linen.Module):
    remat: bool = False

    @linen.compact
    def __call__(self, x):
        block = linen.remat(Block) if self.remat else Block
        blocks = linen.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4
        )
        x, _ = blocks(name="blocks")(x, None)
        return linen.Dense(3, name="head")(x)


STACKED = {
    "blocks": cdb_jax.Axes(cdb_jax.output_channels, stack=0),
    "head": cdb_jax.output_channels,
}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        window(channel_axes=STACKED),
        window(channel_axes=STACKED, layer_rate=0.5),
        window(channel_axes=STACKED, layer_choice="exact", other_layers="frozen"),
        cdb_jax.Policy(0.5, key=0, channel_choice="exact", channel_axes=STACKED),
    ],
    ids=["window", "layers", "one", "exact"],
)
def test_scanned_and_rematerialised_layers(policy, remat, standard_promotion):
    x = normal(0, 5, 6)
    params = Stack(remat).init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(Stack(remat).apply(params, x) ** 2)

    skips = {"blocks/dense1/kernel", "blocks/dense2/kernel", "head/kernel"}
    check(loss, params, policy, x, skips=skips, counts=5)


def test_nnx_scan_and_remat(standard_promotion):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return x + nnx.relu(self.dense(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(Layer, axis_size=3)(rngs.split(3))

        def __call__(self, x):
            step = nnx.scan(
                nnx.remat(lambda x, layer: layer(x)),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )
            return step(x, self.layers)

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    def loss(params, x):
        return jnp.mean(nnx.merge(graph, params)(x) ** 2)

    policy = window(channel_axes={"layers": cdb_jax.Axes(cdb_jax.output_channels, stack=0)})
    check(loss, params, policy, normal(1, 4, 6), skips={"layers/dense/kernel"})


def test_equinox(standard_promotion):
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        linear: eqx.nn.Linear

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 8, 3, groups=1, key=key)
            self.linear = eqx.nn.Linear(8, 6, key=key)

        def __call__(self, x):
            return self.linear(jax.nn.relu(self.conv(x)).mean((1, 2)))

    net = Net(jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(params, x):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)

    for axes in (cdb_jax.output_channels, cdb_jax.input_channels):
        policy = window(channel_axes=axes)
        skips = {"conv/weight", "linear/weight"}
        check(loss, params, policy, normal(1, 4, 3, 6, 6), skips=skips)


def test_vmap_over_models():
    policy = window(layer_rate=0.5)
    params, x = {"kernel": normal(0, 3, 4, 6)}, normal(1, 5, 4)

    def loss(params, x):
        return jnp.mean((x @ params["kernel"]) ** 2)

    def each(params):
        return drawn.grad(loss, policy)(params, x, step=0)["kernel"]

    together = jax.vmap(each)(params)
    for i in range(3):
        np.testing.assert_allclose(together[i], each({"kernel": params["kernel"][i]}), rtol=1e-5)


def test_x64(standard_promotion):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), small_params())
        images = normal(9, 2, 5, 5, 4).astype(jnp.float64)
        for name in ("exact", "some layers"):
            check(small_loss, params, POLICIES[name], images, rtol=1e-12, counts=2)
