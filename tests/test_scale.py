"""Size and numerics: what large trees cost to trace, and settings that large trainings use."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend import core

import cdb_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")
POLICY = cdb_jax.Policy(0.5, key=0, channel_choice="window")


def tree(leaves, width=64):
    """Abstract values: nothing is allocated."""
    return {
        f"layer{i}": {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)}
        for i in range(leaves)
    }


def step(tx):
    def run(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run


def operations(params, policy=POLICY):
    """The number of equations in the program of a transform and an SGD update."""
    tx = optax.chain(cdb_jax.channel_drop_back(policy), optax.sgd(0.1))
    state = jax.eval_shape(tx.init, params)
    count = 0

    def walk(jaxpr):
        nonlocal count
        for eqn in jaxpr.eqns:
            count += 1
            for inner in core.jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(step(tx))(params, params, state).jaxpr)
    return count


def test_the_program_grows_linearly_in_leaves_and_not_with_stacks():
    small, large = operations(tree(50)), operations(tree(500))
    per_leaf = (large - small) / 450
    assert per_leaf < 40
    assert large < 12 * small
    spec = {"blocks": cdb_jax.Axes(cdb_jax.output_channels, stack=0)}
    policy = cdb_jax.Policy(0.5, key=0, channel_choice="window", channel_axes=spec)

    def stacked(depth):
        return {"blocks": {"kernel": jax.ShapeDtypeStruct((depth, 64, 64), jnp.float32)}}

    assert operations(stacked(1000), policy) == operations(stacked(2), policy)
