"""What `value_and_grad` does not compute and does not store, counted in compiled programs."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import mlp, mlp_params, normal, window

import cdb_jax
import cdb_jax.nnx


def flops(f, *args, **kwargs):
    return jax.jit(f).lower(*args, **kwargs).compile().cost_analysis()["flops"]


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

    def memory(f, **count):
        return jax.jit(f).lower(params, x, **count).compile().memory_analysis().temp_size_in_bytes

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

    policy = cdb_jax.Policy(0.0, key=0, layer_choice="exact", other_layers="frozen")
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
