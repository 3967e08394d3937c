"""One compiled program for calls outside of `jit`, which would build theirs again every time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


def compiled(f: Callable[..., Result]) -> Callable[..., Result]:
    """`f(static, *arrays)`, compiled once for what is static and the types of the arrays.

    Inside of `jit` its operations join those around it. What has no hash cannot be remembered, and
    is then computed as it comes.
    """
    jitted = jax.jit(f, static_argnums=0, inline=True)

    @functools.wraps(f)
    def call(static: Any, *arrays: Any) -> Result:
        try:
            hash((static, jax.tree.structure(arrays)))
        except TypeError:
            return f(static, *arrays)
        return jitted(static, *arrays)

    return call
