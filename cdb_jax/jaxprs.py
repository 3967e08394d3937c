"""Evaluating a traced program with some of its operations replaced.

Everything here and in `following.py` that depends on how JAX represents programs is documented in
`jax.extend.core`, except the names of primitives and of their parameters, and what `as_in` reads;
`tests/test_following.py` fails where one of them has moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core


@contextlib.contextmanager
def as_in(eqn: core.JaxprEqn) -> Iterator[None]:
    """The name scopes, `compute_on` and the like under which an equation was traced.

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
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*[x for _, x in named]))


def evaluate(
    closed: core.ClosedJaxpr,
    operands: Sequence[Any],
    replaced: Mapping[str, Callable[..., Any]],
) -> list[Any]:
    """Evaluates a program; an equation named in `replaced` becomes `replaced[name](params, *x)`."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, operands, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
    for eqn in closed.jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        if eqn.primitive.name in replaced:
            results = [replaced[eqn.primitive.name](eqn.params, *given)]
        else:
            results = run(eqn, closed.jaxpr, given)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in closed.jaxpr.outvars]
