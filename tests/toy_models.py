"""Small models and losses that several files test with, and how they compare gradients."""

import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import cdb_jax
import cdb_jax.nnx


def window(rate=0.5, **settings):
    return cdb_jax.Policy(rate, key=0, channel_choice="window", **settings)


def check(loss, params, policy, *args, counts=3, rtol=1e-5, skips=None):
    """Compares with the masked full gradient, and what is skipped with what should be."""
    skipping = jax.jit(drawn.value_and_grad(loss, policy))
    full_value, full = jax.jit(jax.value_and_grad(loss))(params, *args)

    @jax.jit
    def masked(count):
        selection = policy.select(full, count)
        kept = selection.mask(jax.tree.map(jnp.ones_like, full))
        return selection.factors, selection.mask(full), kept

    distinct = set()
    for count in range(counts):
        value, gradient = skipping(params, *args, step=count)
        selection, expected, kept = masked(count)
        np.testing.assert_allclose(value, full_value, rtol=rtol)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, full)
        trees = [
            jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
            for tree in (gradient, expected, full, kept)
        ]
        largest = max(np.abs(whole).max() for whole in jax.tree.leaves(trees[2]))
        for x, y, whole, is_kept in zip(*map(jax.tree.leaves, trees), strict=True):
            # Some gradients, as that of a key bias, are zero except for rounding.
            atol = max(rtol * np.abs(whole).max(), 2.0**-22 * largest)
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
            assert np.all(x[is_kept == 0] == 0)  # Dropped channels are exactly zero.
        distinct.add(str(jax.tree.map(np.asarray, selection)))
    assert len(distinct) > 1 or counts == 1
    report = cdb_jax.channel_report(params, policy, loss, *args)
    found = {row.path for row in report.rows if row.gradient.startswith("skipped")}
    if skips is not None:
        assert found == set(skips), str(report)
    return report


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


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


def mlp(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return jnp.mean(x**2)


def mlp_params(depth=4, width=64):
    return {f"dense{i}": {"kernel": 0.1 * normal(i, width, width)} for i in range(depth)}


def compilations(caplog):
    return [r.message for r in caplog.records if r.message.startswith("Compiling")]


# Optimizers with states of the shape of the parameters.
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
}
