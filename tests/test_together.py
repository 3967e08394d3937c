"""Several methods in one training: they do not disturb each other, on one device or eight."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import cdb_jax.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.drop_path = cdb_jax.nnx.DropPath(0.3, rngs=rngs)
        self.backdrop = cdb_jax.nnx.Backdrop(0.3, axes=0, rngs=rngs)

    def __call__(self, x):
        return self.backdrop(x + self.drop_path(jnp.tanh(self.dense(x))))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


POLICY = cdb_jax.Policy(0.25, key=0, channel_choice="window", exempt=("head",))
X = jax.random.normal(jax.random.key(0), (32, 16))
Y = X[:, :4] * X[:, 4:8]


def optimizer():
    """Masks before; frozen channels around; masks after an Adam whose moments are dense."""
    after = cdb_jax.channel_drop_back(cdb_jax.presets.skip_update(0.2, key=1, exempt=()))
    inner = optax.chain(optax.adam(3e-3), after)
    return optax.chain(cdb_jax.channel_drop_back(0.2, key=2), cdb_jax.freeze_dropped(inner, POLICY))


def train(place=lambda x: x, steps=60):
    model = Net(nnx.Rngs(0, drop_path=1, backdrop=2))
    optimiser = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    x, y = place(X), place(Y)

    @nnx.jit
    def step(model, optimiser, count):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        value, grads = drawn.nnx_value_and_grad(loss, POLICY)(model, step=count)
        optimiser.update(model, grads)
        return value

    losses = [float(step(model, optimiser, jnp.int32(count))) for count in range(steps)]
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_they_learn_together_and_again_the_same():
    losses, params = train()
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    again, same = train()
    assert losses == again
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_eight_devices_learn_what_one_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, P("data")))

    losses, params = train(steps=10)
    sharded, others = train(place, steps=10)
    np.testing.assert_allclose(sharded, losses, rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), others, params)


def test_each_frozen_channel_stands_still_in_the_chain():
    params = {"dense": {"kernel": jnp.ones((4, 8))}}
    policy = cdb_jax.Policy(0.5, key=0)
    drop = cdb_jax.channel_drop_back
    inner = optax.chain(optax.adam(0.1), drop(cdb_jax.presets.skip_update(0.5, key=1, exempt=())))
    tx = optax.chain(drop(0.5, key=2), cdb_jax.freeze_dropped(inner, policy))
    state = tx.init(params)
    for count in range(5):
        updates, new = tx.update(params, state, params)
        frozen = np.asarray(policy.select(params, count).factors["dense/kernel"]) == 0
        assert not np.asarray(updates["dense"]["kernel"])[:, frozen].any()
        was, now = (optax.tree.get(x, "mu")["dense"]["kernel"] for x in (state, new))
        np.testing.assert_array_equal(np.asarray(was == now).all(axis=0)[frozen], True)
        state = new
    with pytest.raises(ValueError, match=r"opt_state.*\[0, 1\]"):
        odd = optax.chain(drop(0.5, key=2), optax.MultiSteps(inner, 2).gradient_transformation())
        cdb_jax.selection_count(odd.update(params, odd.init(params), params)[1])
