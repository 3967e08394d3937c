"""Small losses that use weights as public models do, under names that say nothing.

Each pattern is a function that returns the parameters, the loss, its other arguments, and the axes
that hold the output channels of each weight: `(channel, stack)`, or None.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from toy_models import normal, window

import cdb_jax
from cdb_jax import _jaxprs as jaxprs


def dense():
    params = {"0": [normal(0, 8, 16), normal(1, 16)], "1": [normal(2, 16, 4), normal(3, 4)]}

    def loss(params, x):
        for w, b in params.values():
            x = jnp.tanh(x @ w + b[None])
        return jnp.mean(x**2)

    return params, loss, (normal(4, 5, 8),), {"0/0": (1, ()), "1/0": (1, ())}


def output_by_input():
    params = {"a": normal(0, 16, 8), "b": normal(1, 4, 16)}

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["a"].T) @ params["b"].T) ** 2)

    return params, loss, (normal(4, 5, 8),), {"a": (0, ()), "b": (0, ())}


def heads():
    params = {
        "q": normal(0, 16, 4, 8), "k": normal(1, 16, 2, 8), "v": normal(2, 16, 2, 8),
        "o": normal(3, 4, 8, 16),
    }  # fmt: skip

    def loss(params, x):
        q = jnp.einsum("btd,dhk->bthk", x, params["q"])
        k, v = (jnp.einsum("btd,dgk->btgk", x, params[name]) for name in "kv")
        k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        y = jnp.einsum("bhts,bshk->bthk", weights, v)
        return jnp.mean(jnp.einsum("bthk,hkd->btd", y, params["o"]) ** 2)

    axes = {"q": ((1, 2), ()), "k": ((1, 2), ()), "v": ((1, 2), ()), "o": (2, ())}
    return params, loss, (normal(4, 2, 5, 16),), axes


def fused_qkv():
    params = {"qkv": normal(0, 16, 3, 4, 4), "flat": normal(1, 16, 48), "bias": normal(2, 3, 4, 4)}

    def loss(params, x):
        qkv = jnp.einsum("btd,dchk->btchk", x, params["qkv"]) + params["bias"][None, None]
        flat = (x @ params["flat"]).reshape(2, 5, 3, 4, 4)
        q, k, v = jnp.split(qkv * flat, 3, axis=2)
        return jnp.mean(q * k + v)

    return params, loss, (normal(4, 2, 5, 16),), {"qkv": ((1, 2, 3), ()), "flat": (1, ())}


def einsum_kv():
    params = {"kv": normal(0, 2, 4, 16, 8)}

    def loss(params, x):
        return jnp.mean(jnp.einsum("btd,ckdh->cbtkh", x, params["kv"]) ** 2)

    return params, loss, (normal(4, 2, 5, 16),), {"kv": ((0, 1, 3), ())}


def convolution(specs, shape, **settings):
    def pattern():
        params = {"w": normal(0, *shape), "scale": normal(1, 1, 1, 1, 8)}

        def loss(params, x):
            y = lax.conv_general_dilated(
                x, params["w"], (1, 1), "SAME", dimension_numbers=specs, **settings
            )
            return jnp.mean((jnp.tanh(y) * params["scale"]) ** 2)

        out = specs[1].index("O")
        return params, loss, (normal(4, 2, 6, 6, 8),), {"w": (out, ())}

    return pattern


def transposed_convolution():
    params = {"w": normal(0, 3, 3, 6, 8)}

    def loss(params, x):
        return jnp.mean(lax.conv_transpose(x, params["w"], (2, 2), "SAME", transpose_kernel=True))

    return params, loss, (normal(4, 2, 6, 6, 8),), {"w": (2, ())}


def one_dimensional_convolution():
    params = {"w": normal(0, 16, 8, 3)}

    def loss(params, x):
        y = lax.conv_general_dilated(x, params["w"], (1,), "SAME")
        return jnp.mean(jnp.tanh(y))

    return params, loss, (normal(4, 2, 8, 10),), {"w": (0, ())}


def table():
    params = {"wte": normal(0, 12, 8), "wpe": normal(1, 5, 8), "w": normal(2, 8, 4)}

    def loss(params, tokens):
        x = params["wte"][tokens] + params["wpe"][None]
        return jnp.mean((x @ params["w"]) ** 2)

    axes = {"wte": (1, ()), "w": (1, ())}
    return params, loss, (jnp.arange(10).reshape(2, 5),), axes


def tied_table():
    params = {"table": normal(0, 12, 8), "probe": normal(1, 1, 1, 8)}

    def loss(params, tokens):
        x = jnp.tanh(params["table"][tokens] + params["probe"])
        return jnp.mean((x @ params["table"].T) ** 2)

    return params, loss, (jnp.arange(10).reshape(2, 5),), {"table": (0, ())}


def scanned_layers():
    params = {"w": normal(0, 3, 8, 8), "scale": normal(1, 3, 8)}

    def loss(params, x):
        def block(x, layer):
            return jnp.tanh(x @ layer["w"] * layer["scale"][None]), None

        return jnp.mean(lax.scan(block, x, params)[0])

    return params, loss, (normal(4, 5, 8),), {"w": (2, 0)}


def layers_in_a_python_loop():
    params = {"w": normal(0, 3, 8, 8), "b": normal(1, 3, 8)}

    def loss(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i] + params["b"][i][None])
        return jnp.mean(x)

    return params, loss, (normal(4, 5, 8),), {"w": (2, 0)}


def experts():
    params = {"router": normal(0, 8, 4), "up": normal(1, 4, 8, 6), "down": normal(2, 4, 6, 8)}

    def loss(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        hidden = jax.nn.gelu(jnp.einsum("td,edf->etf", x, params["up"]))
        y = jnp.einsum("etf,efd->etd", hidden, params["down"])
        return jnp.mean(jnp.einsum("te,etd->td", gates, y) ** 2)

    return params, loss, (normal(4, 5, 8),), {"router": (1, ()), "up": (2, 0), "down": (2, 0)}


def experts_in_a_loop():
    params = {"up": normal(1, 4, 8, 6), "down": normal(2, 4, 6, 8)}

    def loss(params, x):
        outputs = [jax.nn.gelu(x @ params["up"][e]) @ params["down"][e] for e in range(4)]
        return jnp.mean(sum(outputs) ** 2)

    return params, loss, (normal(4, 5, 8),), {"up": (2, 0), "down": (2, 0)}


def ensemble():
    params = {"a": {"w": normal(0, 2, 8, 16)}, "b": {"w": normal(1, 2, 16, 1)}}
    params = {"critic": params}

    def loss(params, x):
        layers = params["critic"]
        member = jax.vmap(lambda a, b: jnp.tanh(x @ a) @ b)
        return jnp.mean(member(layers["a"]["w"], layers["b"]["w"]) ** 2)

    return params, loss, (normal(4, 5, 8),), {"critic/a/w": (2, 0), "critic/b/w": (2, 0)}


def block_diagonal():
    params = {"w": normal(0, 4, 4, 6)}

    def loss(params, x):
        return jnp.mean(jnp.einsum("bgi,gio->bgo", x.reshape(5, 4, 4), params["w"]) ** 2)

    return params, loss, (normal(4, 5, 16),), {"w": (2, 0)}


def low_rank():
    params = {"w": normal(0, 8, 16), "a": normal(1, 8, 2), "b": normal(2, 2, 16)}

    def loss(params, x):
        y = x @ params["w"] + (x @ params["a"]) @ params["b"]
        return jnp.mean(jnp.tanh(y))

    return params, loss, (normal(4, 5, 8),), {"w": (1, ()), "a": (1, ()), "b": (1, ())}


def product_of_weights():
    params = {"w": normal(0, 8, 16), "a": normal(1, 8, 2), "b": normal(2, 2, 16)}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ (params["w"] + params["a"] @ params["b"])))

    # The names of the other two have to tell their axes: they might also be tokens and a weight.
    return params, loss, (normal(4, 5, 8),), {"w": (1, ())}


def scaled_weight():
    params = {"w": normal(0, 16, 8)}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ (params["w"] * np.float32(0.1)).T) ** 2)

    return params, loss, (normal(4, 5, 8),), {"w": (0, ())}


def masked_weight():
    mask = np.tril(np.ones((8, 8), np.float32))
    params = {"w": normal(0, 8, 8)}

    def loss(params, x):
        selected = jnp.where(jnp.asarray(mask) > 0, params["w"], 0.0)
        return jnp.mean(jnp.tanh(x @ (params["w"] * mask)) + x @ selected)

    return params, loss, (normal(4, 5, 8),), {"w": (1, ())}


def standardised_weight():
    params = {"w": normal(0, 3, 3, 8, 16), "gain": normal(1, 16)}

    def loss(params, x):
        w = params["w"]
        mean, variance = jnp.mean(w, (0, 1, 2)), jnp.var(w, (0, 1, 2))
        scale = lax.rsqrt(variance + 1e-4) * params["gain"]
        w = (w - mean[None, None, None]) * scale[None, None, None]
        y = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.tanh(y))

    return params, loss, (normal(4, 2, 6, 6, 8),), {"w": (3, ())}


def standardised_without_a_gain():
    params, loss, args, axes = standardised_weight()
    return {"w": params["w"]}, lambda p, x: loss({"gain": jnp.ones(16)} | p, x), args, axes


def weight_norm():
    params = {"v": normal(0, 16, 8), "g": normal(1, 16, 1)}

    def loss(params, x):
        v = params["v"]
        w = params["g"] * v / jnp.sqrt(jnp.sum(v**2, axis=1, keepdims=True))
        return jnp.mean(jnp.tanh(x @ w.T))

    return params, loss, (normal(4, 5, 8),), {"v": (0, ())}


def lstm_gates():
    params = {name: normal(i, 8, 8) for i, name in enumerate(("ii", "if", "ig", "io", "h"))}

    def loss(params, x):
        kernel = jnp.concatenate([params[name] for name in ("ii", "if", "ig", "io")], axis=1)
        i, f, g, o = jnp.split(x @ kernel, 4, axis=1)
        c = jax.nn.sigmoid(i) * jnp.tanh(g) + jax.nn.sigmoid(f)
        return jnp.mean((jax.nn.sigmoid(o) * jnp.tanh(c)) @ params["h"])

    return params, loss, (normal(4, 5, 8),), {name: (1, ()) for name in params}


def recurrent_cell():
    params = {"w": normal(0, 8, 8), "u": normal(1, 4, 8)}

    def loss(params, xs):
        def cell(h, x):
            return jnp.tanh(h @ params["w"] + x @ params["u"]), None

        return jnp.mean(lax.scan(cell, jnp.zeros((5, 8)), xs)[0])

    return params, loss, (normal(4, 3, 5, 4),), {"w": (1, ()), "u": (1, ())}


def complex_pairs():
    params = {"B": normal(0, 8, 16, 2), "log_step": normal(1, 8, 1)}

    def loss(params, x):
        b = params["B"][..., 0] + 1j * params["B"][..., 1]
        y = (b @ x.T.astype(jnp.complex64)).real
        return jnp.mean(y * jnp.exp(params["log_step"]))

    return params, loss, (normal(4, 5, 16),), {"B": (0, ())}


def rematerialised():
    params = {"a": normal(0, 8, 16), "b": normal(1, 16, 4)}

    def loss(params, x):
        @jax.checkpoint
        def block(params, x):
            return jax.nn.silu(x @ params["a"]) @ params["b"]

        return jnp.mean(block(params, x))

    return params, loss, (normal(4, 5, 8),), {"a": (1, ()), "b": (1, ())}


def custom_derivative():
    @jax.custom_vjp
    def rounded(w):
        return jnp.round(w * 8) / 8

    rounded.defvjp(lambda w: (rounded(w), None), lambda _, dw: (dw,))
    params = {"w": normal(0, 8, 16)}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ rounded(params["w"])))

    return params, loss, (normal(4, 5, 8),), {"w": (1, ())}


def modulated():
    params = {"w": normal(0, 8, 6), "style": normal(1, 4, 8)}

    def loss(params, x, style):
        scale = style @ params["style"]
        w = params["w"][None] * scale[:, :, None]
        return jnp.mean(jnp.tanh(jnp.einsum("bti,bio->bto", x, w)))

    args = (normal(4, 5, 3, 8), normal(5, 5, 4))
    return params, loss, args, {"w": (1, ()), "style": (1, ())}


def norms_and_tokens():
    params = {
        "scale": normal(0, 8), "stacked": normal(1, 1, 1, 8), "tokens": normal(2, 1, 3, 8),
        "positions": normal(3, 8, 8), "w": normal(4, 8, 4),
    }  # fmt: skip

    def loss(params, x):
        tokens = jnp.broadcast_to(params["tokens"], (2, 3, 8))
        x = jnp.concatenate([tokens, x], axis=1) + params["positions"][None]
        x = x * params["scale"][None, None] * params["stacked"]
        return jnp.mean(jnp.tanh(x @ params["w"]))

    return params, loss, (normal(5, 2, 5, 8),), {"w": (1, ())}


_convolve = functools.partial(convolution, shape=(3, 3, 8, 8))
PATTERNS = {
    function.__name__: function
    for function in (
        *(dense, output_by_input, heads, fused_qkv, einsum_kv, transposed_convolution),
        *(one_dimensional_convolution, table, tied_table, scanned_layers),
        *(layers_in_a_python_loop, experts, experts_in_a_loop, ensemble, block_diagonal),
        *(
            low_rank,
            product_of_weights,
            scaled_weight,
            masked_weight,
            standardised_weight,
            standardised_without_a_gain,
            weight_norm,
            lstm_gates,
        ),
        *(recurrent_cell, complex_pairs, rematerialised, custom_derivative, modulated),
        *(norms_and_tokens,),
    )
} | {
    "convolution": _convolve(("NHWC", "HWIO", "NHWC")),
    "kernel (out, in)": _convolve(("NHWC", "HWOI", "NHWC")),
    "grouped": convolution(("NHWC", "HWIO", "NHWC"), (3, 3, 2, 8), feature_group_count=4),
    "depthwise": convolution(("NHWC", "OIHW", "NHWC"), (8, 1, 3, 3), feature_group_count=8),
}

# What is combined with a weight, and learns too, needs the gradient of all of its channels.
COMBINED = {"standardised_weight", "weight_norm", "product_of_weights"}


def gradients(name):
    """A pattern's arguments as a tree, and gradients: masked, skipping, and without its weights.

    The inputs learn too, so that all three need the same gradients of activations.
    """
    params, loss, args, expected = PATTERNS[name]()
    floats = {i: x for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)}

    def whole(tree):
        return loss(tree["params"], *(tree["inputs"].get(i, x) for i, x in enumerate(args)))

    def axes(path, x):
        # A layer with one channel cannot lose a part of it.
        found = expected.get(path.removeprefix("params/"))
        return None if found is None or x.shape[-1] == 1 else cdb_jax.Axes(*found)

    def without_weights(tree):
        def stopped(keys, x):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            return lax.stop_gradient(x) if axes(path, x) else x

        return whole(jax.tree_util.tree_map_with_path(stopped, tree))

    policy = window(channel_axes=axes, window_groups=4 if name == "grouped" else 1)

    def masked(tree):
        return policy.select(tree, 0).mask(jax.grad(whole)(tree))

    def skipping(tree):
        return cdb_jax.grad(whole)(tree, selection=policy.select(tree, 0))

    tree = {"params": params, "inputs": floats}
    return tree, masked, skipping, jax.grad(without_weights)


def product_flops(program):
    """The floating-point operations of the products in a program."""
    total = 0
    for eqn in getattr(program, "jaxpr", program).eqns:
        name, params = eqn.primitive.name, eqn.params
        if eqn.primitive in jaxprs.PRODUCTS:
            total += jaxprs.product_flops(eqn)
        else:
            inner = jaxprs.programs_in(params)
            # The last branch of what depends on the platform is that of all other platforms.
            inner = inner[-1:] if name == "cond" else inner
            total += params.get("length", 1) * sum(map(product_flops, inner))
    return total
