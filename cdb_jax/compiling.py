"""One compiled program for calls outside of `jit`, which would build theirs again every time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Keyed:
    """A value that is the same as any other with an equal key."""

    key: Hashable
    value: Any = dataclasses.field(compare=False)


def compiled(f: Callable[..., Result]) -> Callable[..., Result]:
    """`f(static, *arrays)`, compiled once for what is static and the types of the arrays.

    Inside of `jit` its operations join those around it. What has no hash cannot be remembered, and
    is then computed as it comes.
    """

    @functools.lru_cache(maxsize=128)  # A program that is forgotten leaves the memory.
    def jitted(static: Any) -> Callable[..., Result]:
        return jax.jit(functools.wraps(f)(functools.partial(f, static)), inline=True)

    @functools.wraps(f)
    def call(static: Any, *arrays: Any) -> Result:
        try:
            hash((static, jax.tree.structure(arrays)))
        except TypeError:
            return f(static, *arrays)
        return jitted(static)(*arrays)

    return call
