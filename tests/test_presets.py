"""The rules of the published variants."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdb_jax

TREE = {
    "blocks": {"fc": {"kernel": jnp.ones((4, 3, 5)), "bias": jnp.ones((4, 5))}},
    "gate": jnp.ones((4,)),
    "head": {"kernel": jnp.ones((5, 2)), "bias": jnp.ones(2)},
    "temperature": jnp.ones(()),
}


def layer_drop_back(**settings):
    return cdb_jax.presets.layer_drop_back(key=0, steps_per_epoch=10, exempt=("head",), **settings)


def test_layer_drop_back_takes_every_tensor_whole():
    policy = layer_drop_back(stack={"blocks": 0})
    tx = cdb_jax.channel_drop_back(policy)
    learns = []
    for count in range(20, 30):
        selection = policy.select(TREE, count).factors
        assert {path: x.shape for path, x in selection.items()} == {
            "blocks/fc/kernel": (4, 1),
            "blocks/fc/bias": (4, 1),
            "gate": (1,),
            "temperature": (1,),
        }
        state = tx.init(TREE)._replace(count=jnp.int32(count))
        masked, _ = tx.update(TREE, state)
        kernel = masked["blocks"]["fc"]["kernel"]
        np.testing.assert_array_equal(kernel, jnp.broadcast_to(kernel[:, :1, :1], kernel.shape))
        np.testing.assert_array_equal(masked["temperature"], selection["temperature"][0])
        np.testing.assert_array_equal(masked["head"]["kernel"], 1.0)
        learns.append(np.concatenate([x.ravel() for x in selection.values()]))
    share = np.mean(learns)  # Of 10 steps and 10 tensors.
    assert abs(share - 0.5) < 4 * 0.05
    assert len({tuple(x) for x in learns}) > 5


def test_layer_rates_of_other_kinds():
    for rate in (jnp.float32(0.25), lambda count: jnp.float32(0.25), 0.25):
        policy = layer_drop_back(layer_rate=rate)
        assert [float(policy.layer_rate(step)) for step in (10, 20)] == [0.0, 0.25]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_layer_drop_back_alternates(every):
    policy = layer_drop_back(every=every, layer_rate=np.float32(0.25))
    rates = [float(policy.layer_rate(jnp.int32(step))) for step in range(60)]
    drops = [epoch % every == 0 and epoch > 0 for epoch in range(6) for _ in range(10)]
    np.testing.assert_array_equal(rates, np.where(drops, 0.25, 0.0))


def test_layer_drop_back_skips_whole_layers():
    policy = layer_drop_back(stack={"blocks": 0})

    def loss(params, x):
        def block(x, layer):
            fc = layer["fc"]
            return jnp.sin(x + (x @ fc["kernel"] + fc["bias"][None]) @ jnp.ones((5, 3))), None

        x, _ = jax.lax.scan(block, x, params["blocks"])
        return params["temperature"] * jnp.mean(x**2) + jnp.mean(params["gate"])

    x = jax.random.normal(jax.random.key(0), (6, 3))
    tree = {key: value for key, value in TREE.items() if key != "head"} | {
        "head": {"unused": jnp.ones(3)}
    }
    for count in (0, 21, 22):
        gradient = drawn.grad(loss, policy)(tree, x, step=count)
        full = jax.grad(loss)(tree, x)
        expected = policy.select(tree, count).mask(full)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradient, expected
        )
    report = {r.path: r.gradient for r in cdb_jax.channel_report(tree, policy, loss, x).rows}
    assert report["blocks/fc/kernel"] == "skipped"
    assert report["blocks/fc/bias"].startswith("masked only: combined by add")
    assert report["head/unused"] == "in full"


def test_skip_update_by_tensor(standard_promotion):
    """A draw is shared by a tensor, biases have their own, and embeddings are left alone."""
    params = {"embed": jnp.ones((4, 3)), "fc": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    policy = cdb_jax.presets.skip_update(0.4, key=0, exempt=("embed",))
    tx = optax.chain(optax.sgd(1.0), cdb_jax.channel_drop_back(policy))
    step = jax.jit(lambda state: tx.update(params, state, params))
    state, found = tx.init(params), []
    for _ in range(400):
        updates, state = step(state)
        assert (updates["embed"] == -1).all()
        factors = [-np.asarray(x) for x in updates["fc"].values()]
        assert all(len(np.unique(x)) == 1 for x in factors)
        found.append([x.ravel()[0] for x in factors])
    found = np.array(found)
    np.testing.assert_allclose(np.unique(found), [0, 1 / 0.6], rtol=1e-6)
    assert (abs(found.mean(axis=0) - 1) < 4 * np.sqrt((1 / 0.6 - 1) / 400)).all()
    assert len(np.unique(found, axis=0)) == 4


def test_skip_update_is_unbiased_and_leaves_the_moments_dense(standard_promotion):
    params = {"kernel": jnp.ones((3, 32))}
    policy = cdb_jax.presets.skip_update(0.4, key=0, exempt=(), by_column=True)
    factors = np.array([policy.select(params, step).factors["kernel"] for step in range(400)])
    kept = 0.6 + 0.4**32
    assert set(np.unique(factors)) == {np.float32(0.0), np.float32(1 / kept)}
    error = np.sqrt((1 / kept - 1) / factors.size)
    assert abs(factors.mean() - 1) < 4 * error

    adam = optax.adam(0.1)
    tx = optax.chain(adam, cdb_jax.channel_drop_back(policy))
    updates, state = tx.update(params, tx.init(params))
    plain, plain_state = adam.update(params, adam.init(params))
    np.testing.assert_allclose(updates["kernel"], plain["kernel"] * factors[:1], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state[0], plain_state)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(every=0), "every must be an int >= 1, got 0"),
        (dict(layer_rate=1.5), "layer_rate must be the probability.*1.5"),
        (dict(layer_rate="often"), "layer_rate must be the probability.*often"),
        (dict(layer_rate=True), "layer_rate must be the probability.*True"),
        (dict(stack=0), "stack must be a dict from path to axes, got 0"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        layer_drop_back(**settings)


@pytest.mark.bad_input
@pytest.mark.parametrize("preset", [cdb_jax.presets.lisa, cdb_jax.presets.badam])
def test_mistakes_about_blocks(preset):
    with pytest.raises(ValueError, match="blocks and stack are empty"):
        preset(key=0, exempt=())
    with pytest.raises(TypeError, match="stack must be a dict.*0"):
        preset(key=0, exempt=(), stack=0)
    with pytest.raises(TypeError, match="blocks must be a tuple"):
        preset(key=0, exempt=(), blocks="blocks/*")
    with pytest.raises(ValueError, match="stack has the path '', which is the whole tree"):
        preset(key=0, exempt=(), stack={"": 0})


def test_stacks_that_are_not_there():
    policy = layer_drop_back(stack={"layers": 0})
    with pytest.raises(ValueError, match="channel_axes.*'layers'"):
        policy.select(TREE, 0)
    policy = layer_drop_back(stack={"blocks": (0, 2)})
    with pytest.raises(ValueError, match="axis 2 is out of range for 'blocks/fc/bias'"):
        policy.select(TREE, 0)
