"""Channels by use: the axes that a loss shows, whatever the names, and what they save."""

import families
import jax
import jax.numpy as jnp
import pytest
from jax import lax
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
    assert {path: x for path, x in axes.items() if isinstance(x, Axes)} == {
        path: as_axes(x) for path, x in expected.items()
    }
    check(loss, params, window(channel_axes=axes), *args, counts=3, rtol=1e-5)


@pytest.mark.parametrize("name", [x for x in families.PATTERNS if x not in families.COMBINED])
def test_half_of_the_weight_gradients_is_skipped(name, standard_promotion):
    full, skipped, frozen = (
        families.product_flops(jax.make_jaxpr(f)(tree))
        for tree, *functions in [families.gradients(name)]
        for f in functions
    )
    assert frozen < full
    assert full - skipped >= 0.95 * 0.5 * (full - frozen)


def test_input_channels():
    params, loss, args, _ = families.heads()
    axes = cdb_jax.infer_channel_axes(loss, params, *args, channels="input")
    assert axes == {"q": Axes(0), "k": Axes(0), "v": Axes(0), "o": Axes((0, 1))}
    params, loss, args, _ = families.PATTERNS["depthwise"]()
    assert cdb_jax.infer_channel_axes(loss, params, *args, channels="input")["w"] is None


# Names that mislead.


def image(layout):
    def loss(params, x):
        numbers = ("NHWC", layout, "NHWC")
        (kernel,) = jax.tree.leaves(params)
        return jnp.mean(
            lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        )

    return loss


def product(subscripts):
    return lambda params, x: jnp.mean(jnp.einsum(subscripts, x, *jax.tree.leaves(params)))


def embedding(params, tokens):
    return jnp.mean(params["tok"]["weight"][tokens])


def dense_and_norm(params, x):
    dense, norm = params["layers"]["0"], params["layers"]["1"]
    return jnp.mean(jnp.tanh(x @ dense["weight"].T) * norm["weight"][None])


MISLEADING = [
    (product("bi,oi->bo"), {"fc": {"kernel": (24, 8)}}, (5, 8), "summed over.*Axes.channel=0"),
    (image("HWIO"), {"conv": {"weight": (3, 3, 4, 8)}}, (2, 5, 5, 4), "spatial.*Axes.channel=3"),
    (image("HWOI"), {"deconv": {"kernel": (3, 3, 6, 4)}}, (2, 5, 5, 4), "Axes.channel=2"),
    (embedding, {"tok": {"weight": (20, 8)}}, (5,), "looked up.*Axes.channel=1"),
    (
        product("bd,dchk->bchk"),
        {"qkv": {"kernel": (16, 3, 4, 4)}},
        (5, 16),
        r"only some of them; use cdb_jax.Axes.channel=\(1, 2, 3\)",
    ),
    (
        dense_and_norm,
        {"layers": {"0": {"weight": (6, 8)}, "1": {"weight": (4, 6)}}},
        (5, 4, 8),
        "layers/1/weight.*exempt=",
    ),
]


@pytest.mark.parametrize("loss, shapes, batch, message", MISLEADING)
def test_names_that_mislead(loss, shapes, batch, message):
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    x = jnp.zeros(batch, jnp.int32 if loss is embedding else jnp.float32)
    policy = window()
    with pytest.raises(ValueError, match=message):
        cdb_jax.channel_report(params, policy, loss, x)

    def step(params, x):
        return cdb_jax.grad(loss)(params, x, selection=policy.select(params, 0))

    for function in (step, jax.jit(step)):
        with pytest.raises(ValueError, match=message):
            function(params, x)
    inferred = cdb_jax.infer_channel_axes(loss, params, x)
    cdb_jax.channel_report(params, window(channel_axes=inferred), loss, x)


def test_names_that_no_use_contradicts(standard_promotion):
    """A layer that is not used, one that is used both ways, and a tied table."""
    params = {
        "unused": {"kernel": jnp.ones((8, 4))},
        "code": {"kernel": jnp.ones((8, 6))},
        "embed": {"embedding": jnp.ones((20, 8))},
        "masked": {"kernel": jnp.ones((8, 8))},
    }

    def loss(params, tokens, mask):
        x = params["embed"]["embedding"][tokens]
        x = x @ params["code"]["kernel"] @ params["code"]["kernel"].T
        x = x @ (params["masked"]["kernel"] * mask) + jnp.sum(params["code"]["kernel"] ** 2)
        return jnp.mean(x @ params["embed"]["embedding"].T)

    args = jnp.arange(5), jnp.ones((8, 8))
    report = cdb_jax.channel_report(params, window(), loss, *args)
    assert {row.path: row.channel_axes for row in report.rows} == dict.fromkeys(
        ("code/kernel", "embed/embedding", "masked/kernel", "unused/kernel"), (1,)
    )


def attention_of_tokens(params, x):
    query = jnp.broadcast_to(params["latents"][None], (5, 3, 8)) @ params["wq"]["kernel"]
    key, value = x @ params["wk"]["kernel"], x @ params["wv"]["kernel"]
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", query, key))
    return jnp.mean(jnp.tanh(weights @ value) @ params["wo"]["kernel"])


def drop_connect(params, x):
    def layer(x, key):
        mask = jax.random.bernoulli(key, 0.5, (8, 8))
        return (
            x
            @ (params["wq"]["kernel"] * mask[:, :6])
            @ jnp.where(mask[:6], params["wo"]["kernel"], 0.0)
        )

    keys = jax.random.split(jax.random.key(x.shape[0]), x.shape[0])
    return jnp.mean(jax.vmap(layer)(x, keys))


@pytest.mark.parametrize("loss", [attention_of_tokens, drop_connect])
def test_uses_that_show_nothing_are_left_to_names(loss, standard_promotion):
    shapes = {"wq": (8, 6), "wk": (8, 6), "wv": (8, 6), "wo": (6, 8)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    params["latents"] = jnp.ones((3, 8))
    report = cdb_jax.channel_report(params, window(), loss, jnp.ones((5, 4, 8)))
    assert {row.channel_axes for row in report.rows} == {(1,)}
    axes = cdb_jax.infer_channel_axes(loss, params, jnp.ones((5, 4, 8)))
    assert axes["wq/kernel"] in (cdb_jax.output_channels, Axes(1))


def test_a_batch_that_the_loss_closes_over():
    x = jnp.ones((5, 8))
    params = {"a": jnp.ones((8, 4))}
    assert cdb_jax.infer_channel_axes(lambda p: jnp.mean((2 * x) @ p["a"]), params) == {
        "a": Axes(1)
    }


def test_inferred_axes_print_as_code():
    params = {"a": jnp.ones((8, 4)), "b": jnp.ones(4)}
    found = cdb_jax.infer_channel_axes(lambda p, x: jnp.mean(x @ p["a"]), params, jnp.ones((3, 8)))
    assert eval(repr(found), {"cdb_jax": cdb_jax}) == found and "cdb_jax.Axes" in repr(found)


def test_names_that_say_nothing():
    params = {"enc": {"w_in": jnp.ones((8, 4))}}
    report = cdb_jax.channel_report(params, window())
    assert report.rows[0].note == "the last axis, by default"
    inferred = cdb_jax.infer_channel_axes(
        lambda p, x: jnp.mean(x @ p["enc"]["w_in"]), params, jnp.ones((3, 8))
    )
    report = cdb_jax.channel_report(params, window(channel_axes=inferred))
    assert report.rows[0].note == ""
    left = {"enc/w_in": cdb_jax.output_channels}  # As inference leaves what it cannot settle.
    report = cdb_jax.channel_report(params, window(channel_axes=left))
    assert report.rows[0].note == "the last axis, by default"
    params = {"enc": {"kernel": jnp.ones((8, 4))}}
    report = cdb_jax.channel_report(params, window(channel_axes={"enc": cdb_jax.output_channels}))
    assert report.rows[0].note == "by name and shape"
