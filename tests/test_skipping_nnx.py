"""`cdb_jax.nnx.value_and_grad`: models, filters and state."""

import logging

import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import compilations, normal, window

import cdb_jax
import cdb_jax.nnx


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

    def loss(model, x):
        return (jnp.mean(model(x) ** 2), "aux")

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


class Rematerialised(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 512, rngs=rngs)
        self.second = nnx.Linear(512, 512, rngs=rngs)

    def __call__(self, x):
        hidden = nnx.remat(lambda model, x: nnx.relu(model.first(x)))(self, x)
        return nnx.remat(lambda layer, x: layer(x))(self.second, hidden)


def test_nnx_remat_takes_no_full_gradient(standard_promotion):
    """`nnx.remat` returns the parameters too, and of the whole model where it is given."""
    model, x, policy = Rematerialised(nnx.Rngs(0)), normal(0, 4, 8), window(0.875)

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    report = cdb_jax.nnx.channel_report(model, policy, loss, x)
    gradients = {row.path: row.gradient for row in report.rows if row.path.endswith("kernel")}
    assert set(gradients.values()) == {"skipped"}, gradients

    graph, params = nnx.split(model)

    def gradient(params, x):
        model = nnx.merge(graph, params)
        kept = cdb_jax.nnx.grad(loss, kept_only=True)
        return kept(model, x, selection=policy.select(model, 0))

    memory = jax.jit(gradient).lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 512 * 4 / 2  # Half of the larger kernel.

    full, skipped = nnx.grad(loss)(model, x), drawn.nnx_grad(loss, policy)(model, x, step=0)
    masked = policy.select(full, 0).mask(full)
    chex.assert_trees_all_close(skipped, masked, rtol=1e-4, atol=1e-6)


@pytest.mark.bad_input
def test_nnx_filters_and_mistakes(standard_promotion):
    model, x, policy = Noisy(nnx.Rngs(0)), normal(0, 4, 6, 6, 3), window()

    def loss(scale, model, x):
        return scale * jnp.mean(model(x) ** 2)

    kernels = nnx.DiffState(1, nnx.All(nnx.Param, nnx.PathContains("kernel")))
    gradient = drawn.nnx_grad(loss, policy, argnums=kernels)(2.0, model, x, step=0)
    assert set(gradient) == {"conv", "head"} and set(gradient["conv"]) == {"kernel"}
    by_path = nnx.DiffState(1, lambda path, x: path[0] == "conv" and isinstance(x, nnx.Param))
    assert set(drawn.nnx_grad(loss, policy, argnums=by_path)(2.0, model, x, step=0)) == {"conv"}
    (several,) = drawn.nnx_grad(loss, policy, argnums=(1,))(2.0, model, x, step=0)
    assert set(several) == {"conv", "head", "norm"}
    (last,) = drawn.nnx_grad(lambda scale, model: loss(scale, model, x), policy, argnums=(-1,))(
        2.0, model, step=0
    )
    assert set(last) == {"conv", "head", "norm"}
    for argnums, args in ((1, (model,)), (1, ({"student": model},)), ((0, 1), (model,))):
        with pytest.raises(
            TypeError, match="refers to an nnx.Module.*use cdb_jax.nnx.value_and_grad"
        ):
            drawn.grad(loss, policy, argnums=argnums)(2.0, *args, x, step=0)
    with pytest.raises(TypeError, match="params is an nnx.Module.*use cdb_jax.nnx.channel_report"):
        cdb_jax.channel_report(model, policy, loss)

    with pytest.raises(ValueError, match="argnums=0 .*model"):
        cdb_jax.nnx.grad(loss)(2.0, model, x, selection=policy.select(model, 0))
    with pytest.raises(ValueError, match="argnums=1.*twice"):
        drawn.nnx_grad(loss, policy, argnums=(1, 1))(2.0, model, x, step=0)
    with pytest.raises(ValueError, match="argnums=3 .*model"):
        cdb_jax.nnx.grad(loss, argnums=3)(2.0, model, x, selection=policy.select(model, 0))
    with pytest.raises(ValueError, match="argnums=0"):
        cdb_jax.nnx.grad(loss)((model, 2.0), model, x, selection=policy.select(model, 0))
    with pytest.raises(TypeError, match="argument called selection"):
        drawn.nnx_grad(lambda model, selection: 0.0, policy)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_what_a_loss_changes_in_a_model(wrap, standard_promotion):
    model, x, policy = Noisy(nnx.Rngs(0)), normal(0, 4, 6, 6, 3), window()
    kernel = model.head.kernel
    doubled = 2 * kernel[...]

    def loss(model, x):
        model.eval()
        model.head.kernel[...] = 2 * model.head.kernel[...]
        model.calls = 1
        model.extra = nnx.Param(jnp.ones(3))
        model.cache = nnx.Cache(jnp.mean(x))
        return jnp.mean(model(x) ** 2)

    @wrap
    def gradient(model, x):
        return cdb_jax.nnx.grad(loss)(model, x, selection=policy.select(model, 0))

    assert set(gradient(model, x)) == {"conv", "head", "norm"}
    assert model.head.kernel is kernel and model.calls == 1 and model.norm.use_running_average
    np.testing.assert_array_equal(kernel[...], doubled)
    np.testing.assert_array_equal(model.extra[...], 1.0)
    np.testing.assert_allclose(model.cache[...], jnp.mean(x), rtol=1e-6)


def test_eager_nnx_shares_one_program(caplog, standard_promotion):
    model, x = Noisy(nnx.Rngs(0)), normal(0, 4, 6, 6, 3)
    call = drawn.nnx_value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), window())
    for count in range(3):
        call(model, x, step=count)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for count in range(3):
            call(model, x, step=count)
    assert not compilations(caplog)
