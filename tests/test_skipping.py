"""`value_and_grad` and `grad`: arguments, results, errors, and their place in a training loop."""

import functools

import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy_models import mlp, mlp_params, normal, window

import cdb_jax
import cdb_jax.nnx


def test_auxiliary_data_argnums_and_grad():
    def loss(scale, params, x, *, power):
        y = x @ params["kernel"] * scale
        return jnp.mean(y**power), {"mean": y.mean(), "name": "anything", "none": None}

    params, x, policy = {"kernel": normal(0, 4, 6)}, normal(1, 3, 4), window()
    both = drawn.value_and_grad(loss, policy, argnums=1, has_aux=True)
    (value, aux), gradient = both(2.0, params, x, power=2, step=1)
    assert aux["name"] == "anything" and aux["none"] is None
    np.testing.assert_allclose(aux["mean"], jnp.mean(2 * x @ params["kernel"]), rtol=1e-5)
    only, same = drawn.grad(loss, policy, argnums=1, has_aux=True)(2.0, params, x, power=2, step=1)
    chex.assert_trees_all_equal(only, gradient)
    assert same["name"] == "anything"

    alone = window(exempt=("1",))
    several = drawn.value_and_grad(loss, alone, argnums=(1, 2), has_aux=True)
    with jax.numpy_dtype_promotion("standard"):
        _, (first, second) = several(2.0, params, x, power=2, step=1)
    assert first["kernel"].shape == (4, 6) and second.shape == (3, 4)


def test_higher_derivatives():
    """Derivatives of the masked gradient are the mask of the derivatives."""
    policy = window()
    params, x = {"kernel": normal(0, 3, 4)}, normal(1, 5, 3)

    def loss(params):
        return jnp.sum(jnp.sin(x @ params["kernel"]))

    def gradient(params):
        return drawn.grad(loss, policy)(params, step=2)

    mask = policy.select(params, 2).factors["kernel"]

    def masked(params):
        return jax.tree.map(lambda g: g * mask[None], jax.grad(loss)(params))

    for derivative in (jax.jacfwd, jax.jacrev):
        chex.assert_trees_all_close(derivative(gradient)(params), derivative(masked)(params))


@pytest.mark.parametrize("rescale", ["none", "expected", "realized"])
@pytest.mark.parametrize("one", [False, True])
def test_adding_it_to_a_loop_changes_the_time_alone(rescale, one):
    """With `channel_drop_back` and `freeze_dropped` in the loop, for every rescaling."""
    settings = dict(layer_choice="exact", other_layers="frozen") if one else {}
    policy = window(rescale=rescale, layer_rate=0.7, **settings)
    x = normal(9, 8, 64)
    drop = cdb_jax.channel_drop_back(policy)
    tx = optax.chain(drop, cdb_jax.freeze_dropped(optax.adam(1e-3), policy))

    def train(skips):
        @jax.jit
        def step(params, state, count):
            selection = policy.select(params, count)
            if skips:
                _, grads = cdb_jax.value_and_grad(mlp)(params, x, selection=selection)
            else:
                _, grads = jax.value_and_grad(mlp)(params, x)
            given = {"selection": selection} if skips else {}
            updates, state = tx.update(grads, state, params, **given)
            return optax.apply_updates(params, updates), state

        params = mlp_params()
        state = tx.init(params)
        for count in range(5):
            params, state = step(params, state, count)
        return params, state

    with jax.numpy_dtype_promotion("standard"):
        chex.assert_trees_all_close(train(False), train(True), atol=2e-5)


EXACT_POLICIES = {
    "window": window(),
    "window, input channels": window(channel_axes=cdb_jax.input_channels),
    "window groups": window(window_groups=4, rescale="expected"),
    "chunk": cdb_jax.Policy(0.75, key=0, channel_choice="chunk", rescale="realized"),
    "exact": cdb_jax.Policy(0.5, key=0, channel_choice="exact", rescale="expected"),
    "half of the steps": window(layer_rate=0.5, rescale="realized"),
    "one layer": window(layer_choice="exact", rescale="expected"),
    "one layer, others frozen": window(layer_choice="exact", other_layers="frozen"),
    "blocks": window(layer_rate=0.5, blocks=("dense*",), rescale="expected"),
    "held": window(hold=2),
    "with biases": window(share_with_bias=True, rescale="realized"),
    "whole layers": cdb_jax.Policy(1.0, key=0, layer_rate=0.5, rescale="expected"),
    "nothing learns": cdb_jax.Policy(1.0, key=0),
    "nothing is dropped": cdb_jax.Policy(0.0, key=0),
}


@pytest.mark.parametrize("policy", EXACT_POLICIES.values(), ids=EXACT_POLICIES)
@pytest.mark.parametrize("consumer", [cdb_jax.channel_drop_back, cdb_jax.freeze_dropped])
def test_updates_are_the_same_bit_for_bit_where_sums_are_exact(policy, consumer):
    """Sums of small integers have no rounding, in whatever order."""
    rng = np.random.default_rng(0)

    def integers(*shape):
        return jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)

    params = {f"dense{i}": {"kernel": integers(16, 16), "bias": integers(16)} for i in range(2)}
    x = integers(8, 16)

    def loss(params):
        y = x
        for layer in params.values():
            y = y @ layer["kernel"] + layer["bias"][None]
        return jnp.sum(y)

    sgd = optax.sgd(0.5, momentum=0.5)
    if consumer is cdb_jax.freeze_dropped:
        tx = consumer(sgd, policy)
    else:
        tx = optax.chain(consumer(policy), sgd)

    @jax.jit
    def plain(state):
        return tx.update(jax.grad(loss)(params), state, params)

    @jax.jit
    def skipping(state):
        selection = policy.select(params, cdb_jax.selection_count(state))
        grads = cdb_jax.grad(loss)(params, selection=selection)
        return tx.update(grads, state, params, selection=selection)

    state = tx.init(params)
    for _ in range(3):
        expected, found = plain(state), skipping(state)
        chex.assert_trees_all_equal(found, expected)
        state = expected[1]


def test_gradient_accumulation_shares_the_selection():
    policy = window()
    inner = optax.chain(cdb_jax.channel_drop_back(policy), optax.adam(1e-3))
    tx = optax.MultiSteps(inner, 3)
    params, x = mlp_params(2), normal(9, 8, 64)
    with jax.numpy_dtype_promotion("standard"):
        state, counts = tx.init(params), []
        for _ in range(6):
            counts.append(int(cdb_jax.selection_count(state)))
            grads = drawn.grad(mlp, policy)(params, x, step=counts[-1])
            _, state = tx.update(grads, state, params)
    assert counts == [0, 0, 0, 1, 1, 1]


def test_no_tracer_leaks_and_no_host_sync():
    policy, x = window(layer_choice="exact", other_layers="frozen"), normal(9, 8, 64)
    with jax.checking_leaks():
        step = jax.jit(drawn.value_and_grad(lambda p, x: (mlp(p, x), x), policy, has_aux=True))
        compiled = step.lower(mlp_params(), x, step=jnp.int32(0)).compile()
    params, count = mlp_params(), jnp.int32(1)
    with jax.transfer_guard("disallow"):
        compiled(params, x, step=count)


def scalar(params, x):
    return jnp.sum(x @ params["kernel"])


def policy(rate, **settings):
    return cdb_jax.Policy(rate, key=0, **settings)


def uses_selection(params, x, selection):
    return scalar(params, x) * selection


KERNEL, X = {"kernel": jnp.ones((2, 4))}, jnp.ones((3, 2))


CHOSEN = window().select(KERNEL, 0)
LINEAR = nnx.Linear(2, 4, rngs=nnx.Rngs(0))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: drawn.grad(scalar, policy(0.5))(KERNEL, X, step=0), ValueError, "bernoulli"),
        (lambda: drawn.grad(scalar, policy(lambda t: 0.5))(KERNEL, X, step=0), TypeError, "rate"),
        (
            lambda: drawn.grad(scalar, policy(jnp.float32(0.5)))(KERNEL, X, step=0),
            TypeError,
            "rate.*array.*layer_rate",
        ),
        (lambda: cdb_jax.grad(uses_selection), TypeError, "argument called selection"),
        (lambda: cdb_jax.grad(scalar)(KERNEL, X), TypeError, "selection is missing"),
        (lambda: cdb_jax.grad(scalar)(KERNEL, X, selection=0), TypeError, "selection.*got 0"),
        (
            lambda: drawn.grad(lambda p, x: x @ p["kernel"], window())(KERNEL, X, step=0),
            TypeError,
            r"float scalar, got shape \(3, 4\)",
        ),
        (
            lambda: drawn.grad(lambda p, x: (scalar(p, x), x), window())(KERNEL, X, step=0),
            TypeError,
            "has_aux=True",
        ),
        (
            lambda: drawn.grad(scalar, window(), has_aux=True)(KERNEL, X, step=0),
            TypeError,
            r"must return a pair \(value, aux\), got an array; return \(value, aux\), or leave",
        ),
        (
            lambda: cdb_jax.nnx.grad(lambda m, x: jnp.mean(m(x)), has_aux=True)(
                LINEAR, X, selection=window().select(LINEAR, 0)
            ),
            TypeError,
            "must return a pair.*got an array",
        ),
        (
            lambda: cdb_jax.grad(scalar)({"kernel": jnp.ones((2, 4), int)}, X, selection=CHOSEN),
            TypeError,
            "kernel has dtype int32",
        ),
        (
            lambda: cdb_jax.grad(scalar, argnums=(0, -2))(KERNEL, X, selection=CHOSEN),
            ValueError,
            "twice",
        ),
        (
            lambda: cdb_jax.grad(scalar, argnums="0")(KERNEL, X, selection=CHOSEN),
            TypeError,
            "argnums must be",
        ),
        (
            lambda: cdb_jax.grad(scalar, argnums=2)(KERNEL, X, selection=CHOSEN),
            ValueError,
            "argnums=2",
        ),
        (
            lambda: drawn.grad(lambda n, p, x: scalar(p, x), window())(None, KERNEL, X, step=0),
            ValueError,
            "without arrays",
        ),
        (lambda: cdb_jax.grad(scalar, KERNEL), TypeError, "argnums"),
    ],
)
def test_mistakes(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_functions_that_take_anything_may_take_a_selection():
    wrapped = functools.partial(lambda *args, **kwargs: scalar(*args), x=X)
    gradient = drawn.grad(lambda p: wrapped(p, X), window())(KERNEL, step=0)
    assert np.any(gradient["kernel"])
