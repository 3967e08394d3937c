"""The example networks of other libraries: under the one line, with inference, and skipping.

`make models-check` installs the libraries and runs this; it is not a part of `make test`.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdb_jax

POLICY = cdb_jax.Policy(0.5, key=0, channel_choice="window")
IMAGES = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
TOKENS = jnp.arange(12).reshape(2, 6)


# Each function returns parameters, a loss of parameters and a batch, and the batch.


def equinox_mlp():
    import equinox as eqx

    return of_equinox(eqx.nn.MLP(8, 4, 32, 2, key=jax.random.key(0)), jnp.ones((5, 8)))


def equinox_cnn():
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 8, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.ConvTranspose2d(8, 8, 3, key=keys[1]),
            eqx.nn.LayerNorm((8, 32, 32)),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(8 * 32 * 32, 4, key=keys[2]),
        ]
    )
    return of_equinox(model, jnp.moveaxis(IMAGES, -1, 1))


def equinox_attention():
    import equinox as eqx

    class Block(eqx.Module):
        wte: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        cell: eqx.nn.GRUCell

        def __call__(self, tokens):
            x = jax.vmap(self.wte)(tokens)
            x = x + self.attention(x, x, x)
            x = jax.vmap(self.norm)(x)
            return jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(16), x)[0]

    keys = jax.random.split(jax.random.key(0), 3)
    model = Block(
        eqx.nn.Embedding(20, 16, key=keys[0]),
        eqx.nn.MultiheadAttention(4, 16, key=keys[1]),
        eqx.nn.LayerNorm(16),
        eqx.nn.GRUCell(16, 16, key=keys[2]),
    )
    return of_equinox(model, TOKENS)


def of_equinox(model, x):
    import equinox as eqx

    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p, x: jnp.mean(jax.vmap(eqx.combine(p, rest))(x) ** 2), x


def haiku_mlp():
    import haiku as hk

    return of_haiku(lambda x: hk.nets.MLP([32, 32, 4])(x), jnp.ones((5, 8)))


def haiku_mobilenet():
    import haiku as hk

    return of_haiku(lambda x: hk.nets.MobileNetV1(num_classes=4)(x, is_training=True), IMAGES)


def haiku_resnet():
    import haiku as hk

    return of_haiku(lambda x: hk.nets.ResNet18(4)(x, is_training=True), IMAGES)


def haiku_recurrent():
    import haiku as hk

    def model(x):
        core, vanilla = hk.LSTM(16), hk.GRU(16)
        y, _ = hk.dynamic_unroll(core, jnp.moveaxis(x, 1, 0), core.initial_state(x.shape[0]))
        y, _ = hk.dynamic_unroll(vanilla, y, vanilla.initial_state(x.shape[0]))
        attention = hk.MultiHeadAttention(2, 8, w_init=hk.initializers.VarianceScaling())
        return hk.Linear(4)(attention(y, y, y))

    return of_haiku(model, jnp.ones((3, 5, 8)))


def of_haiku(model, x):
    import haiku as hk

    transformed = hk.transform_with_state(model)
    params, state = transformed.init(jax.random.key(0), x)
    return params, lambda p, x: jnp.mean(transformed.apply(p, state, None, x)[0] ** 2), x


def keras_mlp():
    import keras

    layers = [keras.layers.Dense(32, "relu"), keras.layers.Dropout(0.1), keras.layers.Dense(4)]
    return of_keras(keras.Sequential(layers), jnp.ones((5, 8)))


def keras_resnet50():
    import keras

    return of_keras(keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3)), IMAGES)


def keras_mobilenet_v2():
    import keras

    return of_keras(keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3)), IMAGES)


def keras_transformer():
    import keras

    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 16)(tokens)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(2, 8)(x, x))
    x = keras.layers.LSTM(16)(x)
    return of_keras(keras.Model(tokens, keras.layers.Dense(4)(x)), TOKENS)


def of_keras(model, x):
    model(np.asarray(x))
    params = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def loss(params, x):
        outputs, _ = model.stateless_call(params, rest, x, training=False)
        return jnp.mean(outputs**2)

    return params, loss, x


def penzai_mlp():
    from penzai import pz
    from penzai.models import simple_mlp

    model = simple_mlp.MLP.from_config(jax.random.key(0), [8, 32, 4])
    return of_penzai(model, jnp.ones((5, 8)), lambda x: pz.nx.wrap(x).tag("batch", "features"))


def penzai_llama():
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llamalike

    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=16,
        projection_dim=8,
        mlp_hidden_dim=32,
        num_decoder_blocks=2,
        vocab_size=20,
        mlp_variant="swiglu",
        tie_embedder_and_logits=True,
    )
    model = llamalike.build_llamalike_transformer(config, jax.random.key(0))
    return of_penzai(model, TOKENS, lambda x: pz.nx.wrap(x).tag("batch", "seq"))


def of_penzai(model, x, named):
    from penzai import pz

    unbound, variables = pz.unbind_params(model)
    params = [variable.freeze() for variable in variables]

    def loss(params, x):
        y = pz.bind_variables(unbound, params)(named(x))
        return jnp.mean(y.unwrap(*y.named_shape) ** 2)

    return params, loss, x


# Weights without names; a GRU that splits a weight along its channels.
REFUSED, MASKED_ONLY = {penzai_llama}, {haiku_recurrent: {"gru/w_h"}}
MODELS = [
    *(equinox_mlp, equinox_cnn, equinox_attention),
    *(haiku_mlp, haiku_mobilenet, haiku_resnet, haiku_recurrent),
    *(keras_mlp, keras_resnet50, keras_mobilenet_v2, keras_transformer),
    *(penzai_mlp, penzai_llama),
]


@pytest.mark.parametrize("create", MODELS, ids=lambda f: f.__name__)
def test_one_line(create):
    """Accepted with the right channels, or refused with the line that mends it."""
    params, loss, x = create()
    tx = optax.chain(cdb_jax.channel_drop_back(POLICY), optax.sgd(0.1))
    if create in REFUSED:
        with pytest.raises(ValueError, match="channel_axes=cdb_jax.infer_channel_axes"):
            tx.update(params, tx.init(params))
        return
    tx.update(params, tx.init(params))
    cdb_jax.channel_report(params, POLICY, loss, x)  # Checks them against the loss.


@pytest.mark.parametrize("create", MODELS, ids=lambda f: f.__name__)
def test_inference_and_skipping(create):
    params, loss, x = create()
    axes = cdb_jax.infer_channel_axes(loss, params, x)
    policy = cdb_jax.Policy(0.5, key=0, channel_choice="window", channel_axes=axes)

    @jax.jit
    def both(params, x):
        selection = policy.select(params, 3)
        gradient = cdb_jax.grad(loss)(params, x, selection=selection)
        return gradient, selection.mask(jax.grad(loss)(params, x))

    for found, expected in zip(*map(jax.tree.leaves, both(params, x)), strict=True):
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * largest + 1e-9)
    report = cdb_jax.channel_report(params, policy, loss, x)
    layers = [row for row in report.rows if row.channels and row.channels > 1]
    masked = {row.path for row in layers if not row.gradient.startswith("skipped")}
    tables = {row.path for row in layers if "gather" in row.gradient}
    assert len(masked) < len(layers)
    assert masked - tables == MASKED_ONLY.get(create, set()), str(report)
