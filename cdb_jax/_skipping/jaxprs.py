"""Evaluating a traced program with some of its operations replaced.

Everything here and in `follow.py` that depends on how JAX represents programs is documented in
`jax.extend.core`, except the names of primitives and of their parameters, and what `as_in` reads;
`tests/test_following.py` fails where one of them has moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core


@contextlib.contextmanager
def as_in(eqn: core.JaxprEqn) -> Iterator[None]:
    """The name scopes, XLA metadata and the like under which an equation was traced.

    `run` evaluates under them as well; this is for what takes an equation's place.
    """
    scopes = str(eqn.source_info.name_stack)
    with eqn.ctx.manager, jax.named_scope(scopes) if scopes else contextlib.nullcontext():
        yield


def run(eqn: core.JaxprEqn, within: core.Jaxpr, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a program as it is."""
    named = [
        (v, x) for v, x in zip(eqn.invars, operands, strict=True) if not isinstance(v, core.Literal)
    ]
    alone = within.replace(
        constvars=(),
        invars=[v for v, _ in named],
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
    )
    if not hasattr(alone, "consts"):  # Before JAX 0.11 constants were kept beside a program.
        alone = core.ClosedJaxpr(alone, ())
    return list(core.jaxpr_as_fun(alone)(*[x for _, x in named]))


def opened(program: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A program, and its constants, whether or not it is one object with them."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def programs_in(params: Mapping[str, Any]) -> list[core.Jaxpr]:
    """The programs among the parameters of an equation."""
    values = [y for x in params.values() for y in (x if isinstance(x, (tuple, list)) else [x])]
    return [opened(x)[0] for x in values if isinstance(opened(x)[0], core.Jaxpr)]


def evaluate(
    program: Any, operands: Sequence[Any], replaced: Mapping[str, Callable[..., Any]]
) -> list[Any]:
    """Evaluates a program; an equation named in `replaced` becomes `replaced[name](eqn, *x)`."""
    jaxpr, consts = opened(program)
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, operands, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
    for eqn in jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        if eqn.primitive.name in replaced:
            results = [replaced[eqn.primitive.name](eqn, *given)]
        else:
            results = run(eqn, jaxpr, given)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


# Parameters that hold the rules of `jax.custom_jvp` and `jax.custom_vjp`.
_RULES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees")


def differentiated(program: Any, consts: Sequence[Any], args: Sequence[Any]) -> core.Jaxpr:
    """A program of `consts` and `args`, and its gradient by `args`, as one program.

    Where it depends on them, no custom rules are left.
    """

    def value(args: Sequence[Any], consts: Sequence[Any]) -> tuple[Any, list[Any]]:
        first, *others = evaluate(program, [*consts, *args], {})
        return first, others

    both = jax.value_and_grad(value, has_aux=True)
    return opened(jax.make_jaxpr(both)(list(args), list(consts)))[0]


def identity(x: Any) -> Hashable:
    """A key that two programs share only if they compute the same, custom rules aside.

    For a program, or a parameter of one. Arrays that are no arguments are the same if they are one
    object, and so are functions.
    """
    if isinstance(opened(x)[0], core.Jaxpr):
        jaxpr, consts = opened(x)
        return _identity_of_program(jaxpr), tuple(map(_Same, consts))
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(identity, x))
    if isinstance(x, dict):
        return tuple((name, identity(value)) for name, value in x.items() if name not in _RULES)
    try:
        hash(x)
    except TypeError:
        return _Same(x)
    return type(x), x  # 1 and True are equal.


def _identity_of_program(jaxpr: core.Jaxpr) -> Hashable:
    number: dict[core.Var, int] = {}

    def named(v: Any) -> Hashable:
        if isinstance(v, core.Literal):
            x = np.asarray(v.val)
            return v.aval, x.dtype, x.tobytes()
        return number[v]

    def new(v: core.Var) -> Hashable:
        number[v] = len(number)
        return v.aval

    inputs = tuple(new(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    equations = tuple(
        (
            eqn.primitive,
            tuple(named(v) for v in eqn.invars),
            tuple(new(v) for v in eqn.outvars),
            identity(eqn.params),
            eqn.ctx,
        )
        for eqn in jaxpr.eqns
    )
    return inputs, equations, tuple(named(v) for v in jaxpr.outvars)


class _Same:
    """Equal to another one of the same object, which it keeps alive."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)
