"""Checks for arguments that several parts of the library share."""

from __future__ import annotations

import numbers
import operator
import sys
import types
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def short(x: Any) -> str:
    """The `repr` of an argument on one line, cut to 80 characters."""
    text = " ".join(repr(x).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_rate(name: str, rate: Any, *, schedule: bool = True) -> Any:
    """Turns Python and NumPy numbers into floats; leaves schedules and JAX arrays as they are."""
    if callable(rate) and schedule:
        return rate
    if isinstance(rate, jax.Array):
        is_real = any(jnp.issubdtype(rate.dtype, kind) for kind in (jnp.floating, jnp.integer))
        if rate.shape != () or not is_real:
            raise TypeError(
                f"{name} must be a real scalar, got an array of shape {rate.shape} and dtype "
                f"{rate.dtype}; use jax.vmap for several rates."
            )
        if not isinstance(rate, jax.core.Tracer):
            check_rate(name, float(rate))
        return rate
    if isinstance(rate, np.ndarray) and rate.shape == ():
        rate = rate.item()
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        kinds = "a number, an optax schedule or" if schedule else "a number or"
        raise TypeError(
            f"{name} must be {probability(name)}: {kinds} a scalar array; got {short(rate)}."
        )
    if not 0.0 <= float(rate) <= 1.0:  # False for NaN too.
        mend = "use 0.3 to drop 30 % and 0.7 to keep 30 %"
        if name == "layer_rate":
            mend = "use 0.3 to mask each layer in 30 % of the steps"
        raise ValueError(
            f"{name} must be {probability(name)} between 0 and 1, got {rate!r}; {mend}."
        )
    return float(rate)


def probability(name: str) -> str:
    """What a rate is the probability of, for messages."""
    if name == "layer_rate":
        return "the probability that a layer is masked"
    return "a drop probability"


def check_call_rate(rate: Any) -> float | jax.Array:
    """Checks the rate of a function that draws once; returns a float or a float32 scalar."""
    rate = check_rate("rate", rate, schedule=False)
    return rate if isinstance(rate, float) else jnp.asarray(rate, jnp.float32)


def check_static_rate(rate: Any) -> float:
    """Checks the rate of a function whose shapes depend on it."""
    rate = check_rate("rate", rate, schedule=False)
    if isinstance(rate, jax.core.Tracer):
        raise TypeError(
            "rate must be a Python number, because array shapes depend on it; got the traced "
            f"array {rate}. Pass it as a static argument."
        )
    return float(rate)


def is_exactly(rate: float | jax.Array, *values: float) -> bool:
    """Whether a rate is a Python float, and equal to one of `values`."""
    return isinstance(rate, float) and rate in values


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_positive(name: str, value: Any) -> int:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
    return int(value)


def check_patterns(name: str, patterns: Any) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise TypeError(f"{name} must be a tuple of path patterns; write {name}=({patterns!r},).")
    if not isinstance(patterns, Iterable):
        raise TypeError(
            f"{name} must be a tuple of path patterns, got {patterns!r}; use {name}=() for none."
        )
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{name} must hold path patterns such as 'head' or '*/stem', got {pattern!r}."
            )
    return patterns


def check_step(step: Any) -> Any:
    """Returns the step; a Python int becomes a 32-bit NumPy array."""
    is_array = hasattr(step, "dtype") and jnp.issubdtype(step.dtype, jnp.integer)
    if isinstance(step, bool) or not (isinstance(step, int) or (is_array and step.shape == ())):
        raise TypeError(
            f"step must be an int or an integer scalar, got {short(step)}; count the steps, or use "
            "cdb_jax.selection_count(opt_state)."
        )
    if isinstance(step, jax.Array):  # Reading it would wait for the device.
        return step
    step = int(step)
    if not 0 <= step < 2**32:
        raise ValueError(f"step={step} is not in [0, 2**32); count steps from 0.")
    return np.asarray(step, np.int32 if step < 2**31 else np.uint32)


def check_call_key(key: Any, source: str) -> jax.Array:
    """Returns the key of a function that draws once; `source` says where users get one."""
    if key is None:
        raise TypeError(f"key is missing; pass a JAX key for this call, such as {source}.")
    is_key = isinstance(key, (jax.Array, np.ndarray)) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        mend = source if _is_rngs(key) else "jax.random.key(0)"
        raise TypeError(f"key must be a JAX key, got {short(key)}; use {mend}.")
    return key


def check_policy_key(key: Any) -> tuple[int, int] | jax.Array:
    """Reduces any key to the two words of one threefry key.

    Concrete keys are copied to the host: donation could delete the buffer of an array, and `jit`
    would have to close over it.
    """
    if key is None:
        raise TypeError(
            "key is missing; pass an int or a JAX key, such as key=0 or key=jax.random.key(0). "
            "With the same key, training draws the same channels after a restart."
        )
    if isinstance(key, tuple) and len(key) == 2 and all(map(is_int, key)):
        if any(not 0 <= word < 2**32 for word in key):
            raise ValueError(f"key={key} holds a word that is not in [0, 2**32); use key=0.")
        return key  # The words of another policy.
    if isinstance(key, (jax.Array, np.ndarray)):
        if isinstance(key, jax.core.Tracer):
            return _threefry_words(key)
        with jax.ensure_compile_time_eval():
            high, low = np.asarray(_threefry_words(key)).tolist()
        return high, low
    try:
        seed = None if isinstance(key, bool) else operator.index(key)
    except TypeError:
        seed = None
    if seed is None:
        mend = "key=rngs.params()" if _is_rngs(key) else "key=0 or key=jax.random.key(0)"
        raise TypeError(f"key must be an int or a JAX key, got {short(key)}; use {mend}.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"key={seed} is not in [0, 2**64); use a seed in that range.")
    return seed >> 32, seed & 0xFFFFFFFF


def _threefry_words(key: jax.Array | np.ndarray) -> jax.Array:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise TypeError(
                f"key must be one key, got an array of keys of shape {key.shape}; use jax.vmap for "
                "several keys, or index the array."
            )
        words = jnp.ravel(jax.random.key_data(key))
    elif jnp.issubdtype(key.dtype, jnp.integer) and key.shape == ():
        seed = jnp.asarray(key)  # A Python int that passed through `inject_hyperparams`.
        high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.zeros_like(seed)
        words = jnp.stack([high.astype(jnp.uint32), seed.astype(jnp.uint32)])
    elif key.dtype == jnp.uint32 and key.ndim == 1 and key.size >= 2:
        words = jnp.asarray(key)  # A legacy `jax.random.PRNGKey`.
    else:
        raise TypeError(
            f"key must be an int or a JAX key, got an array of shape {key.shape} and dtype "
            f"{key.dtype}; use key=0 or key=jax.random.key(0)."
        )
    reduced = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for i in range(2, words.size):
        reduced = jax.random.fold_in(reduced, words[i])
    return jax.random.key_data(reduced)


def _kind(x: Any) -> str:
    return "an array" if isinstance(x, jax.Array) else f"a {type(x).__name__}"


def check_branch(branch: Any, call: str) -> None:
    """Raises a TypeError for the result of a branch in place of the branch; `call` is the mend."""
    if not callable(branch):
        raise TypeError(
            f"branch must be a function, got {_kind(branch)}; pass the branch and its arguments, "
            f"as in {call}, not its result."
        )


def check_pair(result: Any) -> tuple[Any, Any]:
    """Checks that a function with auxiliary data returned a pair, and returns the pair."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"has_aux=True: fun must return a pair (value, aux), got {_kind(result)}; return "
            "(value, aux), or leave has_aux out."
        )
    return result


def _is_module(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # If there is a Flax NNX model, it is loaded.
    return nnx is not None and isinstance(x, nnx.Module)


def _is_rngs(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, (nnx.Rngs, nnx.RngStream))


def parameters_of(tree: Any) -> Any:
    """Returns the tree with each Flax NNX model replaced by the state of its `nnx.Param`s."""
    if isinstance(tree, (type, types.FunctionType)):
        raise TypeError(
            f"params is a class or function, {tree.__qualname__}; pass an instance, or a tree of "
            "arrays."
        )
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree

    def state(x: Any) -> Any:
        return nnx.state(x, nnx.Param) if _is_module(x) else x

    return jax.tree.map(state, tree, is_leaf=_is_module)


def check_no_module(tree: Any, argument: str, instead: str) -> None:
    """Raises a TypeError for a Flax NNX model, which holds more than parameters."""
    if any(map(_is_module, jax.tree.leaves(tree, is_leaf=_is_module))):
        raise TypeError(
            f"{argument} an nnx.Module, which holds batch statistics and RNG state in addition to "
            f"parameters; use {instead}."
        )
