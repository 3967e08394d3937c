"""`value_and_grad` against the full gradient, masked by the same selection."""

import functools
import logging

import chex
import drawn
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax
from jax.experimental import pallas

import cdb_jax
import cdb_jax.nnx
import models


def window(rate=0.5, **settings):
    return cdb_jax.Policy(rate, key=0, channel_choice="window", **settings)


def check(loss, params, policy, *args, counts=3, rtol=1e-5, skips=None):
    """Compares with the masked full gradient, and what is skipped with what should be."""
    skipping = jax.jit(drawn.value_and_grad(loss, policy))
    full_value, full = jax.jit(jax.value_and_grad(loss))(params, *args)

    @jax.jit
    def masked(count):
        selection = policy.select(full, count)
        return selection.factors, selection.mask(full)

    distinct = set()
    for count in range(counts):
        value, gradient = skipping(params, *args, step=count)
        selection, expected = masked(count)
        np.testing.assert_allclose(value, full_value, rtol=rtol)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, full)
        for x, y, whole in zip(
            *(jax.tree.leaves(tree) for tree in (gradient, expected, full)), strict=True
        ):
            x, y, whole = (np.asarray(v, np.float64) for v in (x, y, whole))
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(whole).max())
            assert np.all(x[y == 0] == 0) or rtol > 1e-4  # Dropped channels are exactly zero.
        distinct.add(str(jax.tree.map(np.asarray, selection)))
    assert len(distinct) > 1 or counts == 1
    report = cdb_jax.channel_report(params, policy, loss, *args)
    found = {row.path for row in report.rows if row.gradient.startswith("skipped")}
    if skips is not None:
        assert found == set(skips), str(report)
    return report


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


POLICIES = {
    "window": window(),
    "window 0.9": window(0.9),
    "window in groups": window(window_groups=2),
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
    "one": window(layer_choice="one"),
    "one, others still": window(layer_choice="one", other_layers="frozen"),
    "one in full": cdb_jax.Policy(0.0, key=0, layer_choice="one", other_layers="frozen"),
    "one, sometimes in part": window(
        layer_choice="one", other_layers="frozen", layer_rate=0.5, exempt=("conv",)
    ),
}


def small_params():
    return {
        "conv": {"kernel": normal(0, 3, 3, 4, 8), "bias": normal(1, 8)},
        "dense1": {"kernel": normal(2, 8, 10), "bias": normal(3, 10)},
        "dense2": {"kernel": normal(4, 10, 6)},
    }


def small_loss(params, images):
    y = lax.conv_general_dilated(
        images, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jax.nn.relu(y + params["conv"]["bias"][None, None, None]).mean((1, 2))
    y = jax.nn.gelu(y @ params["dense1"]["kernel"] + params["dense1"]["bias"][None])
    return jnp.mean((y @ params["dense2"]["kernel"]) ** 2)


@pytest.mark.parametrize("name", POLICIES)
def test_equals_the_masked_gradient_under_every_policy(name):
    kernels = {"conv/kernel", "dense1/kernel", "dense2/kernel"}
    if POLICIES[name].exempt:
        kernels -= {"conv/kernel"}
    check(
        small_loss, small_params(), POLICIES[name], normal(9, 2, 5, 5, 4), counts=6, skips=kernels
    )


# Models and frameworks.


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
    loss = lambda params, x: jnp.mean(LinenNet().apply(params, x) ** 2)
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
        window(channel_axes=STACKED, layer_choice="one", other_layers="frozen"),
        cdb_jax.Policy(0.5, key=0, channel_choice="exact", channel_axes=STACKED),
    ],
    ids=["window", "layers", "one", "exact"],
)
def test_scanned_and_rematerialised_layers(policy, remat, standard_promotion):
    x = normal(0, 5, 6)
    params = Stack(remat).init(jax.random.key(0), x)
    loss = lambda params, x: jnp.mean(Stack(remat).apply(params, x) ** 2)
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
    loss = lambda params, x: jnp.mean(nnx.merge(graph, params)(x) ** 2)
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
    loss = lambda params, x: jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)
    for axes in (cdb_jax.output_channels, cdb_jax.input_channels):
        policy = window(channel_axes=axes)
        skips = {"conv/weight", "linear/weight"}
        check(loss, params, policy, normal(1, 4, 3, 6, 6), skips=skips)


# Ways in which a weight reaches a product.


def experts(params, x):  # Stacked layers in one batched product.
    return jnp.einsum("ecd,edf->ecf", x, params["kernel"])


def on_the_left(params, x):
    return params["kernel"].T @ x


def reshaped(params, x):
    return x @ params["kernel"].reshape(2, 3, 8).transpose(2, 0, 1).reshape(8, 6).T


def heads_apart(params, x):  # The channels (4, 2), in two axes that are not neighbours.
    kernel = params["kernel"].reshape(6, 4, 2)
    return jnp.einsum("bi,ihd->hbd", x, kernel)


def squeezed(params, x):
    return x @ jnp.squeeze(params["kernel"][:, None, :], 1)


def in_a_jit(params, x):
    return jax.jit(lambda kernel, x: x @ kernel.astype(jnp.float32))(params["kernel"], x)


def in_a_conditional(params, x):
    return lax.cond(x[0, 0] > 0, lambda k: x @ k, lambda k: 2.0 * x @ k, params["kernel"])


def in_a_loop(params, x):  # One weight in all iterations.
    body = lambda x, _: (jnp.tanh(x @ params["kernel"])[:, :6], None)
    return lax.scan(body, x, length=3)[0]


def twice(params, x):
    return jnp.tanh(x @ params["kernel"]) @ params["kernel"].T


def saved_by_name(params, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(lambda k, x: jnp.sin(x @ k), policy=policy)(params["kernel"], x)


def narrow(params, x):
    y = x.astype(jnp.bfloat16) @ params["kernel"].astype(jnp.bfloat16)
    return y.astype(jnp.float32)


def in_a_batch(params, x):
    return jax.vmap(lambda x: params["kernel"].T @ x)(x)


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize(
    "use",
    [on_the_left, reshaped, squeezed, heads_apart, in_a_jit, in_a_conditional, in_a_loop, twice]
    + [saved_by_name, narrow, in_a_batch],
    ids=lambda f: f.__name__,
)
def test_ways_to_a_product(use, channel):
    x = normal(0, 6, 5) if use is on_the_left else normal(0, 5, 6)
    params = {"kernel": normal(1, 6, 8)}
    loss = lambda params, x: jnp.mean(use(params, x) ** 2)
    rtol = 0.02 if use is narrow else 1e-5
    skips = {"kernel"}
    for policy in (window(channel_axes=channel), window(channel_axes=channel, layer_rate=0.5)):
        check(loss, params, policy, x, rtol=rtol, skips=skips, counts=4)


def test_experts():
    params, x = {"kernel": normal(0, 3, 4, 8)}, normal(1, 3, 5, 4)
    loss = lambda params, x: jnp.mean(experts(params, x) ** 2)
    for channel in (1, 2):
        axes = {"kernel": cdb_jax.Axes(channel, stack=0)}
        for choice in ("window", "exact"):
            policy = cdb_jax.Policy(0.5, key=0, channel_choice=choice, channel_axes=axes)
            check(loss, params, policy, x, skips={"kernel"})
    policy = window(channel_axes=axes, layer_rate=0.5)
    report = check(loss, params, policy, x, skips=())
    assert "stand still one by one" in report.rows[0].gradient


def tied(params, tokens):
    return params["embedding"][tokens] @ params["embedding"].T


def penalised(params, x):
    return x[:, :6] @ params["kernel"] + 0.1 * jnp.sum(params["kernel"] ** 2)


def multiplied(params, x):
    return x[:, :6] @ (params["down"]["kernel"] @ params["up"]["kernel"])


def in_a_custom_rule(params, x):
    @jax.custom_vjp
    def product(k, x):
        return x @ k

    product.defvjp(lambda k, x: (x @ k, (k, x)), lambda s, d: (s[1].T @ d, d @ s[0].T))
    return product(params["kernel"], x[:, :6])


def carried(params, x):
    body = lambda k, x: (0.9 * k, x @ k)
    return lax.scan(body, params["kernel"], x[None, :, :6])[1]


def looped(params, x):
    return lax.scan(lambda _, column: (None, x[:, :6] @ column), None, params["kernel"].T)[1]


def out_of_a_checkpoint(params, x):
    return x[:, :6] @ jax.checkpoint(lambda kernel: kernel[::-1])(params["kernel"])


def out_of_a_conditional(params, x):
    flip = lambda kernel: kernel[::-1]
    return x[:, :6] @ lax.cond(x[0, 0] > 0, flip, flip, params["kernel"])


def placed_by_a_jit(params, x):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.jit(lambda k, x: x @ k, in_shardings=here)(params["kernel"], x[:, :6])


def in_a_transposed_image(params, x):  # The weight is the image, not the kernel.
    image = params["kernel"][None, :, :, None]
    return lax.conv_general_dilated(
        image, x[:2, :2, None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("use", "params", "reasons"),
    [
        (tied, {"embedding": (9, 6)}, {"embedding": "skipped, but not where read by gather"}),
        (penalised, {"kernel": (6, 4)}, {"kernel": "skipped, but not where read by integer_pow"}),
        (
            multiplied,
            {"down": {"kernel": (6, 2)}, "up": {"kernel": (2, 4)}},
            {
                "down/kernel": "masked only: multiplied with another weight",
                "up/kernel": "skipped",
            },
        ),
        (
            in_a_custom_rule,
            {"kernel": (6, 4)},
            {"kernel": "masked only: not understood: inside of custom_vjp_call"},
        ),
        (carried, {"kernel": (6, 4)}, {"kernel": "masked only: carried through a loop"}),
        (looped, {"kernel": (6, 4)}, {"kernel": "masked only: a loop runs over its channels"}),
        (
            out_of_a_checkpoint,
            {"kernel": (6, 4)},
            {"kernel": "masked only: a result of jax.checkpoint"},
        ),
        (
            out_of_a_conditional,
            {"kernel": (6, 4)},
            {"kernel": "masked only: a result of a conditional"},
        ),
        (
            placed_by_a_jit,
            {"kernel": (6, 4)},
            {"kernel": "masked only: inside a jit with shardings of its own"},
        ),
        (
            in_a_transposed_image,
            {"kernel": (6, 4)},
            {"kernel": "masked only: it is the image of a convolution, not the kernel"},
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_other_uses_get_their_full_gradient(use, params, reasons):
    params = jax.tree.map(lambda s: normal(len(s), *s), params, is_leaf=lambda s: type(s) is tuple)
    x = jnp.arange(5) % 9 if use is tied else normal(3, 5, 8)
    for axes in (cdb_jax.output_channels, -1):
        policy = window(channel_axes=axes)
        report = check(lambda p, x: jnp.mean(use(p, x) ** 2), params, policy, x)
    assert {row.path: row.gradient for row in report.rows} == reasons


def test_beside_a_pallas_call():
    def double(x_ref, y_ref):
        y_ref[...] = 2.0 * x_ref[...]

    @jax.custom_vjp
    def kernel(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pallas.pallas_call(double, out_shape=shape, interpret=True)(x)

    kernel.defvjp(lambda x: (kernel(x), None), lambda _, d: (kernel(d),))
    params = {"dense1": {"kernel": normal(0, 4, 6)}, "dense2": {"kernel": normal(1, 6, 4)}}
    loss = lambda p, x: jnp.mean((kernel(x @ p["dense1"]["kernel"]) @ p["dense2"]["kernel"]) ** 2)
    check(loss, params, window(), normal(2, 3, 4), skips={"dense1/kernel", "dense2/kernel"})


# Random stacks of layers.


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    into, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    spec = draw(st.sampled_from([("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")]))
    arguments = dict(
        window_strides=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.sampled_from([((1, 1), (1, 1)), ((1, 2), (0, 1)), ((0, 0), (0, 0))])),
        lhs_dilation=draw(st.tuples(st.integers(1, 2), st.just(1))),
        rhs_dilation=draw(st.tuples(st.just(1), st.integers(1, 2))),
        dimension_numbers=spec,
        feature_group_count=groups,
    )
    size = {
        "H": draw(st.integers(1, 3)),
        "W": draw(st.integers(1, 3)),
        "I": into // groups,
        "O": out,
    }
    kernel = tuple(size[axis] for axis in spec[1])
    size = {"N": 2, "H": 7, "W": 7, "C": into}
    image = tuple(size[axis] for axis in spec[0])
    channel = spec[1].index(draw(st.sampled_from("IO")))
    # Groups of a window that fit the groups of the convolution, or not.
    divisors = [n for n in (1, groups, 2) if kernel[channel] % n == 0]
    return arguments, kernel, image, channel, draw(st.sampled_from(divisors))


@hypothesis.settings(max_examples=4)  # Each takes seconds to compile.
@hypothesis.given(
    convolutions(),
    st.sampled_from([0.25, 0.5, 0.9]),
    st.sampled_from(["all", "layers", "one"]),
    st.booleans(),
)
def test_random_convolutions(convolution, rate, which, exact):
    arguments, kernel, image, channel, groups = convolution
    loss = lambda params, x: jnp.mean(
        jnp.sin(lax.conv_general_dilated(x, params["kernel"], **arguments))
    )
    settings = {"all": {}, "layers": {"layer_rate": 0.5}, "one": {"layer_choice": "one"}}[which]
    choice = {"channel_choice": "exact"} if exact else {"window_groups": groups}
    policy = cdb_jax.Policy(
        rate,
        key=3,
        channel_axes={"kernel": channel},
        **settings,
        **({"channel_choice": "exact"} if exact else {"channel_choice": "window", **choice}),
    )
    check(loss, {"kernel": normal(0, *kernel)}, policy, normal(1, *image), counts=1, rtol=2e-5)


@st.composite
def dots(draw):
    """A dot_general of an activation and a weight, on either side, with its axes in any order."""
    names = draw(st.permutations("bijkl"))
    batch, contract, free = names[:1], names[1:3], names[3:]
    size = {name: draw(st.integers(1, 4)) for name in names}
    w = draw(st.permutations([*batch, *contract, *free]))
    x = draw(st.permutations([*batch, *contract, "z"]))
    size["z"] = 3
    numbers = tuple(
        (tuple(a.index(n) for n in contract), tuple(a.index(n) for n in batch)) for a in (x, w)
    )
    number = draw(st.integers(1, 2))
    kind = draw(st.sampled_from([contract, free, batch]))
    channel = tuple(sorted(w.index(n) for n in kind[:number]))
    return [size[n] for n in x], [size[n] for n in w], numbers, channel, draw(st.booleans())


@hypothesis.settings(max_examples=5)  # Each takes seconds to compile.
@hypothesis.given(dots(), st.sampled_from([0.25, 0.5, 0.9]), st.booleans())
def test_random_products(dot, rate, exact):
    x_shape, w_shape, ((xc, xb), (wc, wb)), channel, weight_first = dot
    choice = "exact" if exact else "window"
    policy = cdb_jax.Policy(rate, key=0, channel_choice=choice, channel_axes={"kernel": channel})

    def loss(params, x):
        w = params["kernel"]
        if weight_first:
            y = lax.dot_general(w, x, ((wc, xc), (wb, xb)))
        else:
            y = lax.dot_general(x, w, ((xc, wc), (xb, wb)))
        return jnp.mean(jnp.sin(y))

    check(loss, {"kernel": normal(0, *w_shape)}, policy, normal(1, *x_shape), counts=1)


# NNX models.


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


def test_nnx_value_and_grad(standard_promotion):
    """Also what the loss changes in the model is what `nnx.value_and_grad` makes of it."""
    policy, x = window(layer_rate=0.5), normal(0, 4, 6, 6, 3)
    loss = lambda model, x: (jnp.mean(model(x) ** 2), "aux")
    ours, theirs = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))

    @nnx.jit
    def skip(model, x, count):
        (value, _), gradient = drawn.nnx_value_and_grad(loss, policy, has_aux=True)(
            model, x, step=count
        )
        return value, gradient

    @nnx.jit
    def full(model, x):
        (value, _), gradient = nnx.value_and_grad(loss, has_aux=True)(model, x)
        return value, gradient

    for count in range(4):
        value, gradient = skip(ours, x, jnp.int32(count))
        other, whole = full(theirs, x)
        selection = policy.select(whole, count)
        expected = selection.mask(whole)
        np.testing.assert_allclose(value, other, rtol=1e-5)
        chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6)
        changed = nnx.Any(nnx.BatchStat, nnx.RngCount)
        chex.assert_trees_all_close(nnx.state(ours, changed), nnx.state(theirs, changed), rtol=1e-5)


def test_nnx_models_in_trees_and_by_name(standard_promotion):
    encoder, decoder = nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1))
    models, noisy, policy = {"encoder": encoder, "decoder": [decoder]}, Noisy(nnx.Rngs(0)), window()

    def loss(models, images, extra):
        x = models["decoder"][0](jnp.sin(models["encoder"](images)))
        return jnp.mean((x + images) ** 2) + jnp.mean(extra["noisy"](images) ** 2)

    images = normal(0, 4, 6, 6, 3)
    before = noisy.norm.mean[...]
    value, gradient = drawn.nnx_value_and_grad(loss, policy)(
        models, images, extra={"noisy": noisy}, step=1
    )
    assert jnp.any(noisy.norm.mean[...] != before)
    noisy = Noisy(nnx.Rngs(0))
    expected, whole = nnx.value_and_grad(loss)(models, images, extra={"noisy": noisy})
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    selection = policy.select(whole, 1)
    assert set(selection.factors) == {"encoder/kernel", "decoder/0/kernel"}
    whole = selection.mask(whole)
    chex.assert_trees_all_close(gradient, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.bad_input
def test_nnx_filters_and_mistakes(standard_promotion):
    model, x, policy = Noisy(nnx.Rngs(0)), normal(0, 4, 6, 6, 3), window()
    loss = lambda scale, model, x: scale * jnp.mean(model(x) ** 2)
    kernels = nnx.DiffState(1, nnx.All(nnx.Param, nnx.PathContains("kernel")))
    gradient = drawn.nnx_grad(loss, policy, argnums=kernels)(2.0, model, x, step=0)
    assert set(gradient) == {"conv", "head"} and set(gradient["conv"]) == {"kernel"}
    by_path = nnx.DiffState(1, lambda path, x: path[0] == "conv" and isinstance(x, nnx.Param))
    assert set(drawn.nnx_grad(loss, policy, argnums=by_path)(2.0, model, x, step=0)) == {"conv"}
    (several,) = drawn.nnx_grad(loss, policy, argnums=(1,))(2.0, model, x, step=0)
    assert set(several) == {"conv", "head", "norm"}
    for argnums, args in ((1, (model,)), (1, ({"student": model},)), ((0, 1), (model,))):
        with pytest.raises(TypeError, match="names an nnx.Module.*use cdb_jax.nnx.value_and_grad"):
            drawn.grad(loss, policy, argnums=argnums)(2.0, *args, x, step=0)
    with pytest.raises(TypeError, match="params is an nnx.Module.*use cdb_jax.nnx.channel_report"):
        cdb_jax.channel_report(model, policy, loss)

    def adds(model, x):
        model.extra = nnx.Param(jnp.ones(3))
        return jnp.mean(model(x))

    with pytest.raises(ValueError, match="new variables"):
        drawn.nnx_grad(adds, policy)(model, x, step=0)
    with pytest.raises(ValueError, match="names no NNX model"):
        cdb_jax.nnx.grad(loss)(2.0, model, x, selection=policy.select(model, 0))
    with pytest.raises(ValueError, match="nothing but models"):
        cdb_jax.nnx.grad(loss)((model, 2.0), model, x, selection=policy.select(model, 0))
    with pytest.raises(TypeError, match="argument called selection"):
        drawn.nnx_grad(lambda model, selection: 0.0, policy)


# What is not done, counted in compiled programs.


def flops(f, *args, **kwargs):
    return jax.jit(f).lower(*args, **kwargs).compile().cost_analysis()["flops"]


def mlp(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return jnp.mean(x**2)


def mlp_params(depth=4, width=64):
    return {f"dense{i}": {"kernel": 0.1 * normal(i, width, width)} for i in range(depth)}


@pytest.mark.parametrize("axes", [cdb_jax.output_channels, cdb_jax.input_channels])
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_flops(rate, axes):
    params, x = mlp_params(), normal(9, 256, 64)
    full = flops(jax.value_and_grad(mlp), params, x)
    skip = flops(drawn.value_and_grad(mlp, window(rate, channel_axes=axes)), params, x, step=0)
    # Of three products for each layer, but two for the first, one is done in part.
    assert skip / full < 1 - 4 * rate / 11 + 0.02


def test_input_channels_store_the_kept_part_only():
    """Activations that only the weight gradient needs are stored in part."""

    def loss(params, x):
        for layer in params.values():
            x = jax.nn.relu(x) @ layer["kernel"]
        return jnp.mean(x**2)

    params, x = mlp_params(8), normal(9, 4096, 64)
    memory = lambda f, **count: (
        jax.jit(f).lower(params, x, **count).compile().memory_analysis().temp_size_in_bytes
    )
    full = memory(jax.grad(loss))
    policy = window(0.75, channel_axes=cdb_jax.input_channels)
    assert memory(drawn.grad(loss, policy), step=0) < 0.8 * full


def test_nothing_below_the_lowest_layer_that_learns():
    """Counted at run time, by a callback in the backward pass of each layer."""
    seen = []

    @jax.custom_vjp
    def watch(x):
        return x

    def report(_, d):
        jax.debug.callback(lambda d: seen.append(bool(np.any(d))), d)
        return (d,)

    watch.defvjp(lambda x: (x, None), report)

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(watch(x) @ layer["kernel"])
        return jnp.mean(x**2)

    policy = cdb_jax.Policy(0.0, key=0, layer_choice="one", other_layers="frozen")
    params, x = mlp_params(), normal(9, 8, 64)
    step = jax.jit(drawn.grad(loss, policy))
    for count in range(8):
        seen.clear()
        gradient = jax.block_until_ready(step(params, x, step=count))
        jax.effects_barrier()
        learns = [bool(np.any(gradient[name]["kernel"])) for name in gradient]
        assert sum(learns) == 1
        # Nothing flows into the input, nor below the layer that learns.
        assert sum(seen) == 3 - learns.index(True)


# The rest of the contract.


def test_auxiliary_data_argnums_and_grad():
    def loss(scale, params, x, *, power):
        y = x @ params["kernel"] * scale
        return jnp.mean(y**power), {"mean": y.mean(), "name": "anything", "none": None}

    params, x, policy = {"kernel": normal(0, 4, 6)}, normal(1, 3, 4), window()
    both = drawn.value_and_grad(loss, policy, argnums=1, has_aux=True)
    (value, aux), gradient = both(2.0, params, x, power=2, step=1)
    assert aux["name"] == "anything" and aux["none"] is None
    np.testing.assert_allclose(aux["mean"], jnp.mean(2 * x @ params["kernel"]), rtol=1e-5)
    only, same = drawn.grad(loss, policy, argnums=1, has_aux=True)(2.0, params, x, power=2, step=1)
    chex.assert_trees_all_equal(only, gradient)
    assert same["name"] == "anything"

    alone = window(exempt=("1",))
    several = drawn.value_and_grad(loss, alone, argnums=(1, 2), has_aux=True)
    with jax.numpy_dtype_promotion("standard"):
        _, (first, second) = several(2.0, params, x, power=2, step=1)
    assert first["kernel"].shape == (4, 6) and second.shape == (3, 4)


def test_higher_derivatives():
    """Derivatives of the masked gradient are the mask of the derivatives."""
    policy = window()
    params, x = {"kernel": normal(0, 3, 4)}, normal(1, 5, 3)
    loss = lambda params: jnp.sum(jnp.sin(x @ params["kernel"]))
    gradient = lambda params: drawn.grad(loss, policy)(params, step=2)
    mask = policy.select(params, 2).factors["kernel"]
    masked = lambda params: jax.tree.map(lambda g: g * mask[None], jax.grad(loss)(params))
    for derivative in (jax.jacfwd, jax.jacrev):
        chex.assert_trees_all_close(derivative(gradient)(params), derivative(masked)(params))


def test_vmap_over_models():
    policy = window(layer_rate=0.5)
    params, x = {"kernel": normal(0, 3, 4, 6)}, normal(1, 5, 4)
    loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
    each = lambda params: drawn.grad(loss, policy)(params, x, step=0)["kernel"]
    together = jax.vmap(each)(params)
    for i in range(3):
        np.testing.assert_allclose(together[i], each({"kernel": params["kernel"][i]}), rtol=1e-5)


@pytest.mark.parametrize("rescale", ["none", "expected", "realized"])
@pytest.mark.parametrize("one", [False, True])
def test_adding_it_to_a_loop_changes_the_time_alone(rescale, one):
    """With `channel_drop_back` and `freeze_dropped` in the loop, for every rescaling."""
    settings = dict(layer_choice="one", other_layers="frozen") if one else {}
    policy = window(rescale=rescale, layer_rate=0.7, **settings)
    x = normal(9, 8, 64)
    drop = cdb_jax.channel_drop_back(policy)
    tx = optax.chain(drop, cdb_jax.freeze_dropped(optax.adam(1e-3), policy))

    def train(skips):
        @jax.jit
        def step(params, state, count):
            selection = policy.select(params, count)
            if skips:
                _, grads = cdb_jax.value_and_grad(mlp)(params, x, selection=selection)
            else:
                _, grads = jax.value_and_grad(mlp)(params, x)
            given = {"selection": selection} if skips else {}
            updates, state = tx.update(grads, state, params, **given)
            return optax.apply_updates(params, updates), state

        params = mlp_params()
        state = tx.init(params)
        for count in range(5):
            params, state = step(params, state, count)
        return params, state

    with jax.numpy_dtype_promotion("standard"):
        chex.assert_trees_all_close(train(False), train(True), atol=2e-5)


def test_gradient_accumulation_shares_the_selection():
    policy = window()
    inner = optax.chain(cdb_jax.channel_drop_back(policy), optax.adam(1e-3))
    tx = optax.MultiSteps(inner, 3)
    params, x = mlp_params(2), normal(9, 8, 64)
    with jax.numpy_dtype_promotion("standard"):
        state, counts = tx.init(params), []
        for _ in range(6):
            counts.append(int(cdb_jax.selection_count(state)))
            grads = drawn.grad(mlp, policy)(params, x, step=counts[-1])
            _, state = tx.update(grads, state, params)
    assert counts == [0, 0, 0, 1, 1, 1]


DROP = cdb_jax.channel_drop_back(0.5, key=0)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(DROP, optax.adamw(optax.constant_schedule(1e-3))),
        cdb_jax.freeze_dropped(optax.adam(1e-3), window()),
        optax.MultiSteps(optax.chain(DROP, optax.adam(1e-3)), 1),
        optax.apply_if_finite(DROP, 2),
        optax.inject_hyperparams(cdb_jax.channel_drop_back)(0.5, key=0),
        optax.partition({"a": DROP}, {"kernel": "a"}),
    ],
    ids=["chain", "frozen", "multi_steps", "if_finite", "inject", "partition"],
)
def test_selection_count(tx, standard_promotion):
    params = {"kernel": jnp.ones((2, 4))}
    state = tx.init(params)
    for count in range(3):
        assert cdb_jax.selection_count(state) == count
        assert jax.jit(cdb_jax.selection_count)(state) == count
        _, state = tx.update(params, state, params)


def test_selection_count_of_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(DROP, optax.adam(1e-3)), wrt=nnx.Param)
    assert cdb_jax.selection_count(optimizer.opt_state) == 0


def test_x64(standard_promotion):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), small_params())
        images = normal(9, 2, 5, 5, 4).astype(jnp.float64)
        for name in ("exact", "some layers"):
            check(small_loss, params, POLICIES[name], images, rtol=1e-12, counts=2)


def test_no_tracer_leaks_and_no_host_sync():
    policy, x = window(layer_choice="one", other_layers="frozen"), normal(9, 8, 64)
    with jax.checking_leaks():
        step = jax.jit(drawn.value_and_grad(lambda p, x: (mlp(p, x), x), policy, has_aux=True))
        compiled = step.lower(mlp_params(), x, step=jnp.int32(0)).compile()
    params, count = mlp_params(), jnp.int32(1)
    with jax.transfer_guard("disallow"):
        compiled(params, x, step=count)


# Mistakes.


@pytest.mark.bad_input
def test_states_without_one_count():
    params = {"kernel": jnp.ones((2, 4))}
    tx = optax.chain(DROP, optax.MultiSteps(DROP, 2).gradient_transformation())
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"opt_state.*\[0, 1\]"):
        cdb_jax.selection_count(state)
    with pytest.raises(ValueError, match="opt_state"):
        cdb_jax.selection_count(optax.sgd(1.0).init(jnp.ones(2)))


def scalar(params, x):
    return jnp.sum(x @ params["kernel"])


def uses_selection(params, x, selection):
    return scalar(params, x) * selection


KERNEL, X = {"kernel": jnp.ones((2, 4))}, jnp.ones((3, 2))
CHOSEN = window().select(KERNEL, 0)


def policy(rate, **settings):
    return cdb_jax.Policy(rate, key=0, **settings)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: drawn.grad(scalar, policy(0.5))(KERNEL, X, step=0), ValueError, "bernoulli"),
        (lambda: drawn.grad(scalar, policy(lambda t: 0.5))(KERNEL, X, step=0), TypeError, "rate"),
        (
            lambda: drawn.grad(scalar, policy(jnp.float32(0.5)))(KERNEL, X, step=0),
            TypeError,
            "rate.*array.*layer_rate",
        ),
        (lambda: cdb_jax.grad(uses_selection), TypeError, "argument called selection"),
        (lambda: cdb_jax.grad(scalar)(KERNEL, X), TypeError, "selection is missing"),
        (lambda: cdb_jax.grad(scalar)(KERNEL, X, selection=0), TypeError, "selection.*got 0"),
        (
            lambda: drawn.grad(lambda p, x: x @ p["kernel"], window())(KERNEL, X, step=0),
            TypeError,
            r"float scalar, got shape \(3, 4\)",
        ),
        (
            lambda: drawn.grad(lambda p, x: (scalar(p, x), x), window())(KERNEL, X, step=0),
            TypeError,
            "has_aux=True",
        ),
        (
            lambda: drawn.grad(scalar, window(), has_aux=True)(KERNEL, X, step=0),
            TypeError,
            "must return a pair",
        ),
        (
            lambda: cdb_jax.grad(scalar)({"kernel": jnp.ones((2, 4), int)}, X, selection=CHOSEN),
            TypeError,
            "kernel has dtype int32",
        ),
        (
            lambda: cdb_jax.grad(scalar, argnums=(0, -2))(KERNEL, X, selection=CHOSEN),
            ValueError,
            "twice",
        ),
        (
            lambda: cdb_jax.grad(scalar, argnums="0")(KERNEL, X, selection=CHOSEN),
            TypeError,
            "argnums must be",
        ),
        (
            lambda: cdb_jax.grad(scalar, argnums=2)(KERNEL, X, selection=CHOSEN),
            ValueError,
            "argnums=2",
        ),
        (
            lambda: drawn.grad(lambda n, p, x: scalar(p, x), window())(None, KERNEL, X, step=0),
            ValueError,
            "without arrays",
        ),
        (
            lambda: cdb_jax.channel_report(KERNEL, cdb_jax.Policy(0.5, key=0), scalar, X),
            ValueError,
            "bernoulli",
        ),
    ],
)
def test_mistakes(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_functions_that_take_anything_may_take_a_selection():
    wrapped = functools.partial(lambda *args, **kwargs: scalar(*args), x=X)
    gradient = drawn.grad(lambda p: wrapped(p, X), window())(KERNEL, step=0)
    assert np.any(gradient["kernel"])


# Outside of `jit`.


def compilations(caplog):
    return [r.message for r in caplog.records if r.message.startswith("Compiling")]


@jax.custom_vjp
def scaled(x):
    return 3.0 * x


scaled.defvjp(lambda x: (scaled(x), None), lambda _, d: (3.0 * d,))


def test_eager_calls_share_one_program(caplog):
    """One for each shape, whatever arrays the function has captured."""
    policy, kernel = window(), {"kernel": normal(0, 4, 6)}

    def step(scale, x, count):
        loss = lambda params, x: jnp.mean(scaled(scale * jnp.sin(x @ params["kernel"])) ** 2)
        found = drawn.value_and_grad(loss, policy)(kernel, x, step=count)
        return found, jax.value_and_grad(loss)(kernel, x)

    def test(count):
        x, scale = normal(count, 5, 4), jnp.float32(count + 1)
        (value, gradient), (expected, full) = step(scale, x, count)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        masked = policy.select(kernel, count).mask(full)
        chex.assert_trees_all_close(gradient, masked, rtol=1e-5, atol=1e-6)

    for count in range(3):
        test(count)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for count in range(3, 7):
            test(count)
        assert not compilations(caplog)
        step(jnp.float32(1.0), normal(0, 7, 4), 0)  # A batch of another size.
        assert compilations(caplog)


def test_eager_calls_of_other_functions_are_other_programs():
    """Functions that differ in a number, in a rule of their own, or in a captured array."""
    results = []
    for power in (2, 3):
        for rule in (1.0, 5.0):
            for scale in (1.0, 10.0):
                f = jax.custom_vjp(lambda x: 2.0 * x)
                f.defvjp(lambda x: (2.0 * x, None), lambda _, d, rule=rule: (rule * d,))
                array = jnp.full((6,), scale)[None]
                loss = lambda p, x, f=f, a=array, n=power: jnp.sum(f(a * (x @ p["kernel"])) ** n)
                params, x = {"kernel": normal(0, 4, 6)}, normal(1, 5, 4)
                _, gradient = drawn.value_and_grad(loss, window())(params, x, step=0)
                keep = window().select(params, 0).factors["kernel"][None] > 0
                full = jax.grad(loss)(params, x)["kernel"]
                np.testing.assert_allclose(gradient["kernel"], jnp.where(keep, full, 0), rtol=1e-5)
                results.append(float(jnp.sum(jnp.abs(gradient["kernel"]))))
    assert len(set(results)) == 8


def test_eager_nnx_shares_one_program(caplog, standard_promotion):
    model, x = Noisy(nnx.Rngs(0)), normal(0, 4, 6, 6, 3)
    call = drawn.nnx_value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), window())
    for count in range(3):
        call(model, x, step=count)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for count in range(3):
            call(model, x, step=count)
    assert not compilations(caplog)
