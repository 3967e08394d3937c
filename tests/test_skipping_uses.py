"""Ways from a weight to a product, and uses of a weight that get its full gradient."""

import drawn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas
from toy_models import check, normal, window

import cdb_jax
import cdb_jax.nnx
from cdb_jax._skipping.reasons import Obstacle, Reason


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
    def body(x, _):
        return (jnp.tanh(x @ params["kernel"])[:, :6], None)

    return lax.scan(body, x, length=3)[0]


def twice(params, x):
    return jnp.tanh(x @ params["kernel"]) @ params["kernel"].T


def saved_by_name(params, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(lambda k, x: jnp.sin(x @ k), policy=policy)(params["kernel"], x)


def narrow(params, x):
    y = x.astype(jnp.bfloat16) @ params["kernel"].astype(jnp.bfloat16)
    return y.astype(jnp.float32)


def placed_by_a_jit(params, x):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.jit(lambda k, x: x @ k, in_shardings=here)(params["kernel"], x)


def in_a_batch(params, x):
    return jax.vmap(lambda x: params["kernel"].T @ x)(x)


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize(
    "use",
    [on_the_left, reshaped, squeezed, heads_apart, in_a_jit, in_a_conditional, in_a_loop, twice]
    + [saved_by_name, narrow, placed_by_a_jit, in_a_batch],
    ids=lambda f: f.__name__,
)
def test_ways_to_a_product(use, channel):
    x = normal(0, 6, 5) if use is on_the_left else normal(0, 5, 6)
    params = {"kernel": normal(1, 6, 8)}

    def loss(params, x):
        return jnp.mean(use(params, x) ** 2)

    rtol = 0.02 if use is narrow else 1e-5
    skips = {"kernel"}
    for policy in (window(channel_axes=channel), window(channel_axes=channel, layer_rate=0.5)):
        check(loss, params, policy, x, rtol=rtol, skips=skips, counts=4)


def test_experts():
    params, x = {"kernel": normal(0, 3, 4, 8)}, normal(1, 3, 5, 4)

    def loss(params, x):
        return jnp.mean(experts(params, x) ** 2)

    for channel in (1, 2):
        axes = {"kernel": cdb_jax.Axes(channel, stack=0)}
        for choice in ("window", "chunk", "exact"):
            policy = cdb_jax.Policy(0.5, key=0, channel_choice=choice, channel_axes=axes)
            check(loss, params, policy, x, skips={"kernel"})
    policy = window(channel_axes=axes, layer_rate=0.5)
    report = check(loss, params, policy, x, skips=())
    assert str(Obstacle(Reason.STACK_IN_ONE_BATCH)) in report.rows[0].gradient


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
    def body(k, x):
        return (0.9 * k, x @ k)

    return lax.scan(body, params["kernel"], x[None, :, :6])[1]


def looped(params, x):
    return lax.scan(lambda _, column: (None, x[:, :6] @ column), None, params["kernel"].T)[1]


def out_of_a_checkpoint(params, x):
    return x[:, :6] @ jax.checkpoint(lambda kernel: kernel[::-1])(params["kernel"])


def out_of_a_conditional(params, x):
    def flip(kernel):
        return kernel[::-1]

    return x[:, :6] @ lax.cond(x[0, 0] > 0, flip, flip, params["kernel"])


def in_a_transposed_image(params, x):  # The weight is the image, not the kernel.
    image = params["kernel"][None, :, :, None]
    return lax.conv_general_dilated(
        image, x[:2, :2, None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def masked_only(reason, detail=""):
    return f"masked only: {Obstacle(reason, detail)}"


@pytest.mark.parametrize(
    ("use", "params", "reasons"),
    [
        (tied, {"embedding": (9, 6)}, {"embedding": "skipped, but not where read by gather"}),
        (penalised, {"kernel": (6, 4)}, {"kernel": "skipped, but not where read by reduce_sum"}),
        (
            multiplied,
            {"down": {"kernel": (6, 2)}, "up": {"kernel": (2, 4)}},
            {
                "down/kernel": masked_only(Reason.TWO_WEIGHTS),
                "up/kernel": "skipped",
            },
        ),
        (
            in_a_custom_rule,
            {"kernel": (6, 4)},
            {"kernel": masked_only(Reason.INSIDE, "custom_vjp_call")},
        ),
        (carried, {"kernel": (6, 4)}, {"kernel": masked_only(Reason.CARRIED)}),
        (looped, {"kernel": (6, 4)}, {"kernel": masked_only(Reason.LOOP_OVER_CHANNELS)}),
        (
            out_of_a_checkpoint,
            {"kernel": (6, 4)},
            {"kernel": masked_only(Reason.RESULT, "jax.checkpoint")},
        ),
        (
            out_of_a_conditional,
            {"kernel": (6, 4)},
            {"kernel": masked_only(Reason.RESULT, "a conditional")},
        ),
        (
            in_a_transposed_image,
            {"kernel": (6, 4)},
            {"kernel": masked_only(Reason.CONVOLVED)},
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


# Functions of a weight that keep its output channels apart, and reach a product.


def activated(w):  # `jax.custom_jvp`.
    return jax.nn.relu(w) + jax.nn.softplus(w)


def normalised(w):  # Over the inputs.
    return jax.nn.softmax(w, axis=0) * jnp.max(jnp.abs(w), axis=0)[None]


def split_and_joined(w):
    top, bottom = jnp.split(w, 2)
    return jnp.concatenate([jnp.zeros((1, 8)), bottom * top])


def padded(w):
    return jnp.pad(w[1:], ((0, 1), (0, 0))) + jnp.cumsum(w, axis=0)


def in_order(w):
    return jnp.sort(w, axis=0)[:, None, :].squeeze(1)


def selected(w):
    return jnp.where(jnp.tril(jnp.ones((6, 8))) > 0, w, -0.5).clip(-1.0, 1.0)


@pytest.mark.parametrize("function", [activated, normalised, padded, in_order, selected])
def test_functions_of_a_weight(function):
    params, x = {"w": normal(0, 6, 8)}, normal(1, 5, 6)
    for settings in ({}, {"layer_rate": 0.5}, {"channel_choice": "exact"}):
        policy = cdb_jax.Policy(0.5, key=0, **{"channel_choice": "window"} | settings)
        check(
            lambda p, x: jnp.mean(jnp.tanh(x @ function(p["w"])) ** 2),
            params,
            policy,
            x,
            skips={"w"},
        )


def test_a_weight_that_is_split():
    params, x = {"w": normal(0, 6, 8)}, normal(1, 5, 4)
    check(lambda p, x: jnp.mean(x @ split_and_joined(p["w"])), params, window(), x, skips={"w"})


@pytest.mark.parametrize(
    "function", [jax.nn.softmax, lambda w: jnp.cumsum(w, 1), lambda w: jnp.sort(w, 1)]
)
def test_functions_that_mix_the_channels(function):
    params, x = {"w": normal(0, 6, 8)}, normal(1, 5, 6)
    check(lambda p, x: jnp.mean((x @ function(p["w"])) ** 2), params, window(), x, skips=())


# Stacks of layers.


def sum_of_slices(w, x):  # One slice of each of two stack axes.
    return jnp.einsum("bi,sio->sbo", x, w[0] + jnp.swapaxes(w, 0, 1)[0])


def product_of_slices(w, x):
    return x @ (w[0][1] * jnp.swapaxes(w, 0, 1)[0][1])


def slices_of_one_layer(w, x):
    first = lax.dynamic_index_in_dim(w, 1, keepdims=False)
    return x @ (first[2] * 2.0 + first[2] ** 2)


@pytest.mark.parametrize("use", [sum_of_slices, product_of_slices, slices_of_one_layer])
def test_slices_of_two_stacks(use):
    params, x = {"w": normal(0, 3, 3, 8, 8)}, normal(1, 5, 8)
    for settings in ({}, {"layer_rate": 0.5}):
        policy = window(channel_axes=cdb_jax.Axes(3, stack=(0, 1)), **settings)
        check(lambda p, x: jnp.mean(jnp.tanh(use(p["w"], x)) ** 2), params, policy, x)


@pytest.mark.parametrize("start", [-2, 0, 3, 9])
def test_a_slice_that_starts_outside_of_the_stack(start):
    """XLA moves such a slice inside; JAX counts from the end only where it is asked to."""
    params, x = {"w": normal(0, 4, 8, 8)}, normal(1, 5, 8)

    def loss(params, x, start):
        layer = lax.dynamic_slice_in_dim(params["w"], start, 1, allow_negative_indices=False)
        return jnp.mean(jnp.tanh(x @ layer[0]) ** 2)

    policy = window(channel_axes=cdb_jax.Axes(2, stack=0))
    check(loss, params, policy, x, jnp.int32(start))


def two_slices(w, x):
    def body(x, pair):
        return jnp.tanh(jnp.tanh(x @ pair[0]) @ pair[1]), None

    return lax.scan(body, x, (w[:-1], w[1:]))[0]


def one_layer_as_a_constant(w, x):
    def body(y, layer):
        return y + jnp.tanh(jnp.tanh(x @ first) @ layer), None

    first = w[0]
    return lax.scan(body, x, w[1:])[0]


def results_of_another_loop(w, x):
    y, ys = lax.scan(lambda y, layer: 2 * (jnp.tanh(y @ layer),), x, w)
    return lax.scan(lambda y, pair: (y + jnp.tanh(pair[1] @ pair[0]), None), y, (w, ys[::-1]))[0]


def layers_in_another_order(w, x):
    order = w[jnp.array([1, 2, 3, 0])]
    return lax.scan(lambda x, pair: (jnp.tanh(x @ pair[0] @ pair[1]), None), x, (w, order))[0]


def scaled_by_what_is_carried(w, x):
    def body(carry, layer):
        y = jnp.tanh(x @ (layer * carry[None, 0]))
        return y, None

    return lax.scan(body, x, w)[0]


@pytest.mark.parametrize(
    "use",
    [two_slices, one_layer_as_a_constant, results_of_another_loop, layers_in_another_order]
    + [scaled_by_what_is_carried],
)
def test_loops_that_read_a_stack_twice(use):
    params, x = {"w": 0.5 * normal(0, 4, 8, 8)}, normal(1, 8, 8)
    for settings in ({}, {"layer_choice": "exact", "other_layers": "frozen"}):
        policy = window(channel_axes=cdb_jax.Axes(2, stack=0), **settings)
        check(lambda p, x: jnp.mean(use(p["w"], x) ** 2), params, policy, x, counts=6)


def test_a_custom_derivative_with_a_number():
    @jax.custom_vjp
    def times(w, factor):
        return w * factor

    times.defvjp(lambda w, factor: (w * factor, factor), lambda factor, d: (d * factor, None))
    mixing = jax.custom_vjp(lambda w: w)  # Its gradient mixes the channels.
    mixing.defvjp(lambda w: (w, None), lambda _, d: (jnp.cumsum(d, 1),))
    params, x = {"a": normal(0, 6, 8), "b": normal(1, 8, 4)}, normal(2, 5, 6)

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ times(params["a"], 2.0)) @ mixing(params["b"]))

    check(loss, params, window(), x, skips={"a"})


@pytest.mark.parametrize("layer_rate", [1.0, 0.5])
def test_an_infinite_derivative_of_a_dropped_weight(layer_rate):
    params = {"kernel": jnp.zeros((6, 8))}  # The derivative of the root is infinite.
    policy = window(layer_rate=layer_rate)

    def loss(params, x):
        return jnp.sum(x @ jnp.sqrt(params["kernel"]))

    step = jax.jit(drawn.grad(loss, policy))
    for count in range(4):
        kept = policy.select(params, count).factors["kernel"] != 0
        gradient = step(params, normal(0, 5, 6) ** 2, step=count)["kernel"]
        assert jnp.isinf(gradient[:, kept]).all() and (gradient[:, ~kept] == 0).all()


def test_with_a_pallas_call_in_the_same_loss():
    def double(x_ref, y_ref):
        y_ref[...] = 2.0 * x_ref[...]

    @jax.custom_vjp
    def kernel(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pallas.pallas_call(double, out_shape=shape, interpret=True)(x)

    kernel.defvjp(lambda x: (kernel(x), None), lambda _, d: (kernel(d),))
    params = {"dense1": {"kernel": normal(0, 4, 6)}, "dense2": {"kernel": normal(1, 6, 4)}}

    def loss(p, x):
        return jnp.mean((kernel(x @ p["dense1"]["kernel"]) @ p["dense2"]["kernel"]) ** 2)

    check(loss, params, window(), normal(2, 3, 4), skips={"dense1/kernel", "dense2/kernel"})


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

    def loss(params, x):
        return jnp.mean(jnp.sin(lax.conv_general_dilated(x, params["kernel"], **arguments)))

    settings = {"all": {}, "layers": {"layer_rate": 0.5}, "one": {"layer_choice": "exact"}}[which]
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
@hypothesis.given(
    dots(),
    st.sampled_from([(0.25, "window"), (0.9, "window"), (0.5, "chunk"), (0.5, "exact")]),
)
def test_random_products(dot, chosen):
    x_shape, w_shape, ((xc, xb), (wc, wb)), channel, weight_first = dot
    rate, choice = chosen
    policy = cdb_jax.Policy(rate, key=0, channel_choice=choice, channel_axes={"kernel": channel})

    def loss(params, x):
        w = params["kernel"]
        if weight_first:
            y = lax.dot_general(w, x, ((wc, xc), (wb, xb)))
        else:
            y = lax.dot_general(x, w, ((xc, wc), (xb, wb)))
        return jnp.mean(jnp.sin(y))

    check(loss, {"kernel": normal(0, *w_shape)}, policy, normal(1, *x_shape), counts=1)
