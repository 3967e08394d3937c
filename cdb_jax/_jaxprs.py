"""Evaluates parts of a traced program.

This module, `_cpu_order` and `_skipping` contain nearly all code that depends on how JAX represents
programs. `jax.extend.core` documents the representation, except for the parameters of primitives
and what `scopes_of` reads; `tests/test_following.py` fails if one of these changes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from cdb_jax._compiling import Keyed

ARRAYS = (jax.Array, np.ndarray, np.generic)
Atom = core.Var | core.Literal  # What an equation reads.

PRODUCTS = (primitives.dot_general_p, primitives.conv_general_dilated_p)

_ELEMENTWISE = frozenset(
    getattr(primitives, f"{name}_p")
    for name in (
        "abs add atan2 cbrt ceil clamp complex conj convert_element_type copy cos cosh div erf "
        "erf_inv exp exp2 expm1 floor imag integer_pow log log1p logistic max min mul name neg pow "
        "real reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient "
        "sub tan tanh eq ne lt le gt ge is_finite and or not xor"
    ).split()
)
_ELEMENTWISE_BY_NAME = ("copy_p", "pvary")  # JAX does not export these.


def is_elementwise(primitive: core.Primitive) -> bool:
    """Whether it works on corresponding entries; a scalar operand applies to every entry."""
    return primitive in _ELEMENTWISE or primitive.name in _ELEMENTWISE_BY_NAME


@contextlib.contextmanager
def scopes_of(eqn: core.JaxprEqn) -> Iterator[None]:
    """The name scopes, XLA metadata and other context under which an equation was traced.

    `as_function` restores these by itself; this is for code that replaces an equation.
    """
    scopes = str(eqn.source_info.name_stack)
    with eqn.ctx.manager, jax.named_scope(scopes) if scopes else contextlib.nullcontext():
        yield


def as_function(
    eqns: Sequence[core.JaxprEqn],
    inputs: Sequence[core.Var],
    outputs: Sequence[Atom],
    program: core.Jaxpr,
) -> Callable[..., list[Any]]:
    """Turns some equations of a program into a function from `inputs` to `outputs`."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    part: Any = program.replace(
        constvars=(), invars=list(inputs), outvars=list(outputs), eqns=list(eqns), effects=effects
    )
    if not hasattr(part, "consts"):  # Before JAX 0.11, constants were separate from a program.
        part = core.ClosedJaxpr(part, ())
    return core.jaxpr_as_fun(part)


def apply(eqn: core.JaxprEqn, program: core.Jaxpr, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a program."""
    given = {v: x for v, x in zip(eqn.invars, operands, strict=True) if is_variable(v)}
    return list(as_function([eqn], list(given), eqn.outvars, program)(*given.values()))


def product_flops(eqn: core.JaxprEqn) -> int:
    """The floating-point operations of a product; its gradient for either operand has as many."""
    lhs, rhs = (shape_of(v) for v in eqn.invars)
    out = math.prod(shape_of(eqn.outvars[0]))
    if eqn.primitive is primitives.dot_general_p:
        (contracting, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(lhs[axis] for axis in contracting)
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * out * math.prod(rhs) // max(rhs[out_axis], 1)


def type_of(v: Atom) -> jax.ShapeDtypeStruct:
    aval: Any = v.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def shape_of(v: Atom) -> tuple[int, ...]:
    """The shape of an array; `()` for anything else, such as a token."""
    return tuple(getattr(v.aval, "shape", ()))


def is_variable(v: Atom) -> TypeGuard[core.Var]:
    return not isinstance(v, core.Literal)


def opened(program: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A program and its constants, which newer versions of JAX keep in one object."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def programs_in(params: Mapping[str, Any]) -> list[core.Jaxpr]:
    """The programs among the parameters of an equation."""
    values = [y for x in params.values() for y in (x if isinstance(x, (tuple, list)) else [x])]
    return [opened(x)[0] for x in values if isinstance(opened(x)[0], core.Jaxpr)]


def scan_arity(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values, which come before the sliced ones."""
    if "num_consts" in params:  # Before JAX 0.11.
        return params["num_consts"], params["num_carry"]
    num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    return num_consts, num_carry


# Parameters that hold the rules of `jax.custom_jvp` and `jax.custom_vjp`.
_RULES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees")


def differentiated(program: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> core.Jaxpr:
    """One program for the results of a program and for its gradient with respect to `args`.

    Custom differentiation rules are expanded where the gradient depends on them.
    """
    function = as_function(program.eqns, program.invars, program.outvars, program)

    def value(args: Sequence[Any], consts: Sequence[Any]) -> tuple[Any, list[Any]]:
        first, *others = function(*consts, *args)
        return first, others

    with_gradient = jax.value_and_grad(value, has_aux=True)
    return opened(jax.make_jaxpr(with_gradient)(list(args), list(consts)))[0]


def identity(x: Any) -> Hashable:
    """A key for a program, or for a parameter of one; only identical programs share a key.

    Custom differentiation rules are left out. Constant arrays and functions are identical only if
    they are the same object.
    """
    if isinstance(opened(x)[0], core.Jaxpr):
        jaxpr, consts = opened(x)
        return _identity_of_program(jaxpr), tuple(Keyed(id(c), c) for c in consts)
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(identity, x))
    if isinstance(x, dict):
        return tuple((name, identity(value)) for name, value in x.items() if name not in _RULES)
    try:
        hash(x)
    except TypeError:
        return Keyed(id(x), x)  # Holding the object prevents its id from being used again.
    return type(x), x  # Without the type, 1 and True would have the same key.


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
