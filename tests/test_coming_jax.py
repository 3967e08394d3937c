"""Programs of JAX that are new or about to come: right gradients, and a note where not followed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import hijax, pallas
from jax.extend.core import primitives
from toy_models import check, normal, window

from cdb_jax._skipping import follow as following, moves
from cdb_jax._skipping.reasons import Obstacle, Reason

PARAMS = {
    "first": {"kernel": normal(0, 4, 6)},
    "stacked": {"kernel": normal(1, 3, 6, 6)},
    "last": {"kernel": normal(2, 6, 4)},
}
POLICY = window(channel_axes=-1)
X = normal(3, 5, 4)
JAX = tuple(map(int, jax.__version__.split(".")[:2]))


@jax.custom_vjp
def doubled(x):
    return 2.0 * x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, d: (2.0 * d,))


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvp(lambda primals, tangents: (cubed(*primals), 3 * primals[0] ** 2 * tangents[0]))


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, d: (d @ saved[1].T, saved[0].T @ d))


def loss(params, x, around=lambda f: f, first=jnp.matmul):
    """A product, a loop over layers, and custom rules, with something around each layer."""
    y = around(lambda w, x: jnp.tanh(first(x, w)))(params["first"]["kernel"], x)

    def body(y, w):
        return around(lambda w, y: cubed(jnp.sin(y @ w)))(w, y), None

    y, _ = lax.scan(body, y, params["stacked"]["kernel"])
    y = around(lambda w, y: doubled(y @ w))(params["last"]["kernel"], y)
    return jnp.mean(y**2)


SWITCHES = ["jax_remat3", "jax_scan3", "jax_custom_vjp3", "jax_custom_jvp3"]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_switches(name, around):
    if not hasattr(jax.config, name) or (name == "jax_custom_vjp3" and JAX < (0, 12)):
        pytest.skip(f"this JAX has no whole {name}")
    uses = [functools.partial(loss, around=around, first=first) for first in (jnp.matmul, product)]
    jax.config.update(name, True)
    try:
        try:
            jax.jit(jax.grad(uses[0])).lower(PARAMS, X)
        except NotImplementedError as error:
            pytest.skip(f"this JAX has no gradient with {name}: {error}")
        for use in uses:
            check(use, PARAMS, POLICY, X, counts=2, rtol=2e-5)
    finally:
        jax.config.update(name, False)


@pytest.mark.skipif(not hasattr(jax, "custom_remat"), reason="this JAX has no custom_remat")
def test_custom_remat():
    recomputed = jax.custom_remat(
        jnp.matmul,
        lambda policy, x, w: (x @ w, None),
        lambda saved, x, w: (x @ w, (x, w)),
        lambda saved, d: (d @ saved[1].T, saved[0].T @ d),
    )
    jax.config.update("jax_remat3", True)
    try:
        uses = functools.partial(loss, around=jax.checkpoint, first=recomputed)
        report = check(uses, PARAMS, POLICY, X, counts=2, rtol=2e-5)
    finally:
        jax.config.update("jax_remat3", False)
    rows = {row.path: row.gradient for row in report.rows}
    assert rows["first/kernel"].startswith("masked only")


def multiply(x_ref, w_ref, y_ref):
    y_ref[...] = x_ref[...] @ w_ref[...]


def test_a_pallas_kernel_that_reads_a_weight():
    shape = jax.ShapeDtypeStruct((5, 6), jnp.float32)
    call = pallas.pallas_call(multiply, out_shape=shape, interpret=True)
    kernel = jax.custom_vjp(lambda x, w: call(x, w))
    kernel.defvjp(
        lambda x, w: (kernel(x, w), (x, w)), lambda saved, d: (d @ saved[1].T, saved[0].T @ d)
    )
    report = check(functools.partial(loss, first=kernel), PARAMS, POLICY, X, counts=2, rtol=2e-5)
    rows = {row.path: row.gradient for row in report.rows}
    assert rows["first/kernel"].startswith("masked only: inside")
    assert rows["last/kernel"] == "skipped"


def moved(*args):
    """What reading a parameter does that JAX has renamed."""
    return {}["renamed"]


@pytest.mark.parametrize(
    ("table", "primitive", "path"),
    [
        (following._CALLS, primitives.scan_p, "stacked/kernel"),
        (following._CALLS, primitives.jit_p, "first/kernel"),
        (moves._LAYOUT, primitives.transpose_p, "last/kernel"),
    ],
)
def test_parameters_of_other_names(table, primitive, path, monkeypatch):
    monkeypatch.setattr(following, "FORM_ERRORS", (KeyError,))
    monkeypatch.setitem(table, primitive, moved)

    def first(x, w):
        return jax.jit(jnp.matmul)(x, w)

    def uses(params, x):
        last = params["last"]["kernel"].T @ normal(4, 6, 6)
        return loss(params | {"last": {"kernel": last.T}}, x, first=first)

    report = check(uses, PARAMS, POLICY, X, counts=2, rtol=2e-5)
    rows = {row.path: row.gradient for row in report.rows}
    assert rows[path] == f"masked only: {Obstacle(Reason.UNKNOWN_FORM, primitive.name)}"


# Types and operations of their own.

Primitive = getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive


@dataclasses.dataclass(frozen=True)
class Pair:
    """A weight as the sum of two arrays."""

    high: jax.Array
    low: jax.Array


@dataclasses.dataclass(frozen=True)
class PairType(hijax.HiType):
    shape: tuple

    def _part(self):
        return jax.core.ShapedArray(self.shape, jnp.dtype("float32"))

    def lo_ty(self):
        return [self._part(), self._part()]

    def lower_val(self, pair):
        return [pair.high, pair.low]

    def raise_val(self, high, low):
        return Pair(high, low)

    def to_tangent_aval(self):
        return self._part()

    def vspace_zero(self):
        return jnp.zeros(self.shape)


hijax.register_hitype(Pair, lambda pair: PairType(pair.high.shape))


class Split(Primitive):
    """From an array to a pair."""

    def __init__(self, x):
        self.in_avals, self.out_aval, self.params = (x,), PairType(x.shape), {}
        super().__init__()

    def expand(self, w):
        return Pair(0.75 * w, 0.25 * w)

    def vjp_fwd(self, needed, w):
        return self(w), None

    def vjp_bwd_retval(self, _, d):
        return (d,)


class Times(Primitive):
    """The product of an array and a pair."""

    def __init__(self, x, pair):
        out = jax.core.ShapedArray((x.shape[0], pair.shape[1]), x.dtype)
        self.in_avals, self.out_aval, self.params = (x, pair), out, {}
        super().__init__()

    def expand(self, x, pair):
        return x @ (pair.high + pair.low)

    def vjp_fwd(self, needed, x, pair):
        return self(x, pair), (x, Joined(jax.typeof(pair))(pair))

    def vjp_bwd_retval(self, saved, d):
        x, w = saved
        return d @ w.T, x.T @ d


class Joined(Primitive):
    """From a pair to its sum."""

    def __init__(self, pair):
        out = jax.core.ShapedArray(pair.shape, jnp.dtype("float32"))
        self.in_avals, self.out_aval, self.params = (pair,), out, {}
        super().__init__()

    def expand(self, pair):
        return pair.high + pair.low


def test_types_of_other_libraries():
    def pairwise(x, w):
        pair = Split(jax.typeof(w))(w)
        return Times(jax.typeof(x), jax.typeof(pair))(x, pair)

    uses = functools.partial(loss, first=pairwise)
    report = check(uses, PARAMS, POLICY, X, counts=2, rtol=2e-5)
    rows = {row.path: row.gradient for row in report.rows}
    assert rows["first/kernel"].startswith("masked only")
    assert rows["last/kernel"] == "skipped"
