"""`selection_count`: the step that an optimizer state has reached."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy_models import window

import cdb_jax
import cdb_jax.nnx

DROP = cdb_jax.channel_drop_back(0.5, key=0)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(DROP, optax.adamw(optax.constant_schedule(1e-3))),
        cdb_jax.freeze_dropped(optax.adam(1e-3), window()),
        optax.MultiSteps(optax.chain(DROP, optax.adam(1e-3)), 1),
        optax.apply_if_finite(DROP, 2),
        optax.inject_hyperparams(cdb_jax.channel_drop_back)(0.5, key=0),
        optax.partition({"a": DROP}, {"kernel": "a"}),
    ],
    ids=["chain", "frozen", "multi_steps", "if_finite", "inject", "partition"],
)
def test_selection_count(tx, standard_promotion):
    params = {"kernel": jnp.ones((2, 4))}
    state = tx.init(params)
    for count in range(3):
        assert cdb_jax.selection_count(state) == count
        assert jax.jit(cdb_jax.selection_count)(state) == count
        _, state = tx.update(params, state, params)


@pytest.mark.bad_input
def test_selection_count_of_several_optimizers():
    state = jax.vmap(lambda x: DROP.init({"kernel": x}))(jnp.ones((3, 2, 4)))
    with pytest.raises(ValueError, match=r"opt_state.*\(3,\)"):
        cdb_jax.selection_count(state)
    np.testing.assert_array_equal(jax.vmap(cdb_jax.selection_count)(state), [0, 0, 0])
    with pytest.raises(ValueError, match=r"opt_state.*\(3,\)"):
        cdb_jax.selection_count((DROP.init({"kernel": jnp.ones((2, 4))}), state))


def test_selection_count_of_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(DROP, optax.adam(1e-3)), wrt=nnx.Param)
    assert cdb_jax.selection_count(optimizer.opt_state) == 0


@pytest.mark.bad_input
def test_states_without_one_count():
    params = {"kernel": jnp.ones((2, 4))}
    tx = optax.chain(DROP, optax.MultiSteps(DROP, 2).gradient_transformation())
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"opt_state.*\[0, 1\]"):
        cdb_jax.selection_count(state)
    with pytest.raises(ValueError, match="opt_state"):
        cdb_jax.selection_count(optax.sgd(1.0).init(jnp.ones(2)))
