"""`value_and_grad` and `grad` with the selection that a policy draws at a step."""

import cdb_jax
import cdb_jax.nnx


def _at_steps(transform, loss, policy, argnums, has_aux):
    transformed = transform(loss, argnums, has_aux)

    def at_step(*args, step, **kwargs):
        numbers = argnums if isinstance(argnums, tuple) else (argnums,)
        params = tuple(args[getattr(number, "argnum", number)] for number in numbers)
        if not isinstance(argnums, tuple):
            (params,) = params
        return transformed(*args, selection=policy.select(params, step), **kwargs)

    return at_step


def value_and_grad(loss, policy, argnums=0, has_aux=False):
    return _at_steps(cdb_jax.value_and_grad, loss, policy, argnums, has_aux)


def grad(loss, policy, argnums=0, has_aux=False):
    return _at_steps(cdb_jax.grad, loss, policy, argnums, has_aux)


def nnx_value_and_grad(loss, policy, argnums=0, has_aux=False):
    return _at_steps(cdb_jax.nnx.value_and_grad, loss, policy, argnums, has_aux)


def nnx_grad(loss, policy, argnums=0, has_aux=False):
    return _at_steps(cdb_jax.nnx.grad, loss, policy, argnums, has_aux)
