"""Caches for calls outside `jit`: compiled programs, and results that depend on tree structures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Keyed:
    """A value that is compared by its key."""

    key: Hashable
    value: Any = dataclasses.field(compare=False)


def compiled(f: Callable[..., Result]) -> Callable[..., Result]:
    """`f(static, *arrays)`, compiled once for each static value and set of array types.

    Inside `jit`, its operations join those around it. If something static is not hashable, `f` is
    called directly.
    """

    @functools.lru_cache(maxsize=128)  # A program that is evicted is freed.
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


NO_ARRAY = object()


def by_structure(f: Callable[..., Result]) -> Callable[..., Result]:
    """`f(tree, *static)`, computed once for each tree structure and set of array types.

    `f` gets a tree of `jax.ShapeDtypeStruct`s, with `NO_ARRAY` in place of other leaves.
    """

    @functools.lru_cache(maxsize=256)
    def remembered(treedef: Any, types: tuple[Any, ...], *static: Any) -> Result:
        leaves = [NO_ARRAY if x is None else jax.ShapeDtypeStruct(*x) for x in types]
        return f(jax.tree.unflatten(treedef, leaves), *static)

    @functools.wraps(f)
    def call(tree: Any, *static: Any) -> Result:
        leaves, treedef = jax.tree.flatten(tree)
        types = tuple((tuple(x.shape), x.dtype) if hasattr(x, "dtype") else None for x in leaves)
        try:
            hash((treedef, static))
        except TypeError:
            return remembered.__wrapped__(treedef, types, *static)
        return remembered(treedef, types, *static)

    return call
