"""The authors' released optimizer, replayed: see tests/data/sgd_dropback_cnn.npz."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdb_jax

DATA = pathlib.Path(__file__).parent / "data" / "sgd_dropback_cnn.npz"
STEPS = 8


@pytest.fixture(scope="module")
def recorded():
    with np.load(DATA, allow_pickle=False) as arrays:
        return dict(arrays)


def tree(recorded, kind, step):
    return {
        name: jnp.asarray(recorded[f"{kind}/{step}/{name}"]) for name in map(str, recorded["names"])
    }


def nested(flat):
    out = {}
    for name, value in flat.items():
        module, leaf = name.split(".")
        out.setdefault(module, {})[leaf] = value
    return out


def policy_of(recorded):
    return cdb_jax.presets.released_code(
        key=0,
        exempt=("conv1",),
        rate=float(recorded["channel_drop_rate"]),
        layer_rate=float(recorded["layer_drop_rate"]),
    )


def replayed(selection, factors):
    """A selection with what was recorded in place of what was drawn."""
    groups = []
    for group in selection.groups:
        keep, scale = zip(*(factors[layer.path] for layer in group.layers), strict=True)
        arrays = dict(keep=jnp.stack(keep), scale=jnp.stack(scale).reshape(-1))
        groups.append(dataclasses.replace(group, **arrays))
    return dataclasses.replace(selection, groups=tuple(groups))


def test_eight_steps_match_every_recorded_parameter(recorded):
    policy = policy_of(recorded)
    optimizer = optax.chain(
        optax.add_decayed_weights(float(recorded["weight_decay"])),
        optax.trace(float(recorded["momentum"]), nesterov=True),
        optax.scale(-float(recorded["lr"])),
    )
    params = nested(tree(recorded, "param", 0))
    layers = [leaf.path for leaf in policy.layout(params).layers]
    assert layers == ["conv2/weight", "conv3/weight", "fc/weight"]
    state = optimizer.init(params)
    masked_layers = 0
    for step in range(STEPS):
        factors = {}
        for path in layers:
            name = path.replace("/", ".")
            keep, scale = recorded[f"keep/{step}/{name}"], recorded[f"scale/{step}/{name}"]
            factors[path] = keep, scale.astype(np.float32)
            masked_layers += not keep.all()
        gradients = nested(tree(recorded, "grad", step))
        masked = replayed(policy.select(params, step), factors).mask(gradients, rescale=True)
        updates, state = optimizer.update(masked, state, params)
        params = optax.apply_updates(params, updates)
        expected = nested(tree(recorded, "param", step + 1))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-7), params, expected
        )
    assert masked_layers >= 3, "the recording must mask something for this to be a test"


def test_recorded_scale_is_the_realized_keep_fraction(recorded):
    for step in range(STEPS):
        for name in ("conv2.weight", "conv3.weight", "fc.weight"):
            keep = recorded[f"keep/{step}/{name}"]
            scale = float(recorded[f"scale/{step}/{name}"])
            masked = recorded[f"layer_u/{step}/{name}"].item() < recorded["layer_drop_rate"]
            if not masked:
                assert keep.all()
            np.testing.assert_allclose(scale, 1 / keep.mean(), rtol=1e-6)


def test_sampler_follows_the_released_statistics(recorded):
    policy = policy_of(recorded)
    gradients = nested(tree(recorded, "grad", 0))
    draws = 4000
    sample = jax.jit(jax.vmap(lambda count: policy.select(gradients, count).factors))
    selection = sample(jnp.arange(draws))
    gate_rate, rate = policy.layer_rate, policy.rate
    for path, channels in (("conv2/weight", 8), ("conv3/weight", 12), ("fc/weight", 16)):
        factors = np.asarray(selection[path])
        assert factors.shape == (draws, channels)
        kept = factors > 0
        assert kept.any(axis=1).all()  # Where all would be dropped, none is.
        np.testing.assert_allclose(
            factors, kept / kept.mean(axis=1, keepdims=True), rtol=1e-6
        )  # Divided by what this draw kept.
        everything = (1 - rate) ** channels + rate**channels
        masked = (~kept).any(axis=1).mean() / (1 - everything)
        sigma = np.sqrt(gate_rate * (1 - gate_rate * (1 - everything)) / draws / (1 - everything))
        assert abs(masked - gate_rate) < 4 * sigma
        dropped = gate_rate * (rate - rate**channels)
        sigma = np.sqrt(dropped * (1 - dropped) / draws)
        assert np.abs((~kept).mean(axis=0) - dropped).max() < 4.5 * sigma
