"""Outside of `jit`, calls of the same function share one compiled program."""

import logging

import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
from toy_models import compilations, normal, window


@jax.custom_vjp
def scaled(x):
    return 3.0 * x


scaled.defvjp(lambda x: (scaled(x), None), lambda _, d: (3.0 * d,))


def test_eager_calls_share_one_program(caplog):
    """One for each shape, whatever arrays the function has captured."""
    policy, kernel = window(), {"kernel": normal(0, 4, 6)}

    def step(scale, x, count):
        def loss(params, x):
            return jnp.mean(scaled(scale * jnp.sin(x @ params["kernel"])) ** 2)

        found = drawn.value_and_grad(loss, policy)(kernel, x, step=count)
        return found, jax.value_and_grad(loss)(kernel, x)

    def test(count):
        x, scale = normal(count, 5, 4), jnp.float32(count + 1)
        (value, gradient), (expected, full) = step(scale, x, count)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        masked = policy.select(kernel, count).mask(full)
        chex.assert_trees_all_close(gradient, masked, rtol=1e-5, atol=1e-6)

    for count in range(3):
        test(count)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for count in range(3, 7):
            test(count)
        assert not compilations(caplog)
        step(jnp.float32(1.0), normal(0, 7, 4), 0)  # A batch of another size.
        assert compilations(caplog)


def test_eager_calls_of_other_functions_are_other_programs():
    """Functions that differ in a number, in a rule of their own, or in a captured array."""
    results = []
    for power in (2, 3):
        for rule in (1.0, 5.0):
            for scale in (1.0, 10.0):
                f = jax.custom_vjp(lambda x: 2.0 * x)
                f.defvjp(lambda x: (2.0 * x, None), lambda _, d, rule=rule: (rule * d,))
                array = jnp.full((6,), scale)[None]

                def loss(p, x, f=f, a=array, n=power):
                    return jnp.sum(f(a * (x @ p["kernel"])) ** n)

                params, x = {"kernel": normal(0, 4, 6)}, normal(1, 5, 4)
                _, gradient = drawn.value_and_grad(loss, window())(params, x, step=0)
                keep = window().select(params, 0).factors["kernel"][None] > 0
                full = jax.grad(loss)(params, x)["kernel"]
                np.testing.assert_allclose(gradient["kernel"], jnp.where(keep, full, 0), rtol=1e-5)
                results.append(float(jnp.sum(jnp.abs(gradient["kernel"]))))
    assert len(set(results)) == 8
