"""Masking and freezing on meshes of eight devices: as on one, where they are, nothing more sent."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from device_meshes import BATCH, MESHES, WIDTH, mesh, placed, sent
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import cdb_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")
ADAM = optax.adamw(0.01, eps=1e-3)  # A larger eps, as tiny gradients are rounding alone.
POLICIES = {
    choice: cdb_jax.Policy(0.5, key=0, channel_choice=choice, layer_rate=0.7)
    for choice in ("bernoulli", "exact", "window", "chunk")
}
drop = cdb_jax.channel_drop_back
OPTIMIZERS = {
    "before, exact": optax.chain(drop(POLICIES["exact"]), ADAM),
    "after, window": optax.chain(
        ADAM, drop(dataclasses.replace(POLICIES["window"], rescale="expected"))
    ),
    "frozen, bernoulli": cdb_jax.freeze_dropped(ADAM, POLICIES["bernoulli"]),
}


def params():
    """Layers that are not square, with biases."""
    sizes = (WIDTH, 2 * WIDTH, 2 * WIDTH, WIDTH)
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        f"dense{i}": {"kernel": 0.1 * jax.random.normal(key, sizes[i : i + 2]), "bias": bias}
        for i, key in enumerate(keys)
        for bias in [jnp.zeros(sizes[i + 1])]
    }


def loss(params, x):
    for layer in params.values():
        x = jnp.sin(x @ layer["kernel"] + layer["bias"][None])
    return jnp.mean(x**2)


def training_step(tx):
    def step(params, state, batch):
        gradients = jax.grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def laid_out(tx, name):
    """Parameters, optimizer state and batch on a mesh; the state as its parameters."""
    grid, of_params, _ = MESHES[name]
    tree, batch = placed(name, params())

    def put(x):
        return jax.device_put(x, NamedSharding(grid, of_params if x.ndim > 1 else P()))

    return tree, jax.tree.map(put, tx.init(params())), batch


@functools.cache
def compiled(name, tx):
    """A training step on a mesh, and its arguments."""
    args = laid_out(tx, name)
    kept = jax.tree.map(lambda x: x.sharding, args[:2])
    return jax.jit(training_step(tx), out_shardings=kept).lower(*args).compile(), args


@functools.cache
def two_steps_alone(tx):
    step = jax.jit(training_step(tx))
    return step(*step(params(), tx.init(params()), BATCH), BATCH)


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", MESHES)
def test_a_step_on_a_mesh(name, tx):
    step, (tree, state, batch) = compiled(name, tx)
    assert not re.search(r"callback|infeed|outfeed| send\(| recv\(", step.as_text())
    for _ in range(2):
        with jax.transfer_guard("disallow"):  # No step waits for the host.
            tree, state = step(tree, state, batch)
    alone, alone_state = two_steps_alone(tx)
    chex.assert_trees_all_close(tree, alone, rtol=1e-4, atol=1e-5)

    def find(state):
        return float(optax.tree.get(state, "dropped_fraction"))

    assert find(state) == find(alone_state)


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", MESHES)
def test_nothing_parameter_sized_is_sent(name, tx):
    """A few vectors of channels at most, where the channels are split over devices."""
    extra = [sent(compiled(name, x)[0]) for x in (tx, ADAM)]
    extra = [sum(size for _, size in found.values()) if found else 0 for found in extra]
    vectors = sum(layer["bias"].nbytes for layer in params().values())
    smallest = min(layer["kernel"].nbytes for layer in params().values())
    assert extra[0] <= extra[1] + 8 * vectors < extra[1] + smallest


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", MESHES)
def test_updates_and_state_stay_where_they_are(name, tx):
    """By itself."""
    tree, state, _ = laid_out(tx, name)
    before, after = (tree, state), jax.jit(tx.update)(tree, state, tree)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("spec", [P("x", None), P(None, "y"), P("x", "y"), P(None, ("x", "y"))])
def test_explicit_sharding(spec, tx):
    grid = mesh((4, 2), ("x", "y"), AxisType.Explicit)
    update = jax.jit(tx.update)
    expected, _ = update(params(), tx.init(params()), params())
    with jax.set_mesh(grid):

        def of(x):
            return spec if x.ndim > 1 else P(None)

        tree = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(grid, of(x))), params())
        updates, state = update(tree, tx.init(tree), tree)
    for x in (*jax.tree.leaves(updates), *jax.tree.leaves(optax.tree.get(state, "mu"))):
        assert x.sharding.spec == of(x)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_inside_shard_map(tx):
    """Replicated parameters, gradients averaged by hand: every device does the same."""
    grid = mesh((8,), ("data",))

    def step(params, state, batch):
        own = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params)
        gradients = jax.lax.pmean(jax.grad(loss)(own, batch), "data")
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    mapped = jax.shard_map(step, mesh=grid, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    mapped = jax.jit(mapped)
    tree, state = mapped(*mapped(params(), tx.init(params()), BATCH), BATCH)
    alone, alone_state = two_steps_alone(tx)
    chex.assert_trees_all_close(tree, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_device_draws_what_one_draws(policy):
    def draw(tree, count):
        return policy.select(tree, count).factors

    alone = draw(params(), 5)
    for name in MESHES:
        for path, factors in jax.jit(draw)(placed(name, params())[0], jnp.int32(5)).items():
            for shard in factors.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(alone[path])[shard.index])
    each = jax.shard_map(
        lambda tree: jax.tree.map(lambda x: x[None], draw(tree, 5)),
        mesh=mesh((8,), ("data",)),
        in_specs=P(),
        out_specs=P("data"),
        check_vma=False,
    )
    for path, rows in jax.jit(each)(params()).items():
        np.testing.assert_array_equal(rows, np.broadcast_to(alone[path], rows.shape))
