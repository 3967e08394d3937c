"""What the library knows of the programs that JAX makes: fails where a name has moved."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import PartitionSpec as P

from cdb_jax import _jaxprs as jaxprs
from cdb_jax._skipping import follow as following, moves

X = jnp.ones((2, 3))
W = jnp.ones((3, 4))


def equation(f, *args):
    """The one equation of a function."""
    (eqn,) = jax.make_jaxpr(f)(*args).jaxpr.eqns
    return eqn


def convolve(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("f", "args", "params"),
    [
        (lambda x, w: x @ w, (X, W), {"dimension_numbers", "precision", "preferred_element_type"}),
        (
            convolve,
            (jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))),
            {"window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"}
            | {"feature_group_count", "batch_group_count", "precision", "preferred_element_type"}
            | {"out_sharding"},
        ),
    ],
)
def test_products(f, args, params):
    eqn = equation(f, *args)
    assert eqn.primitive in jaxprs.PRODUCTS
    assert params <= set(eqn.params)


@pytest.mark.parametrize(
    ("f", "params"),
    [
        (jax.jit(jnp.sin), {"jaxpr", "in_shardings", "out_shardings"}),
        (jax.checkpoint(jnp.sin), {"jaxpr", "prevent_cse", "policy"}),
        (
            lambda x: lax.scan(lambda c, x: (c, jnp.sin(x)), None, x)[1],
            {"jaxpr", "length", "reverse", "unroll"},
        ),
    ],
)
def test_calls(f, params):
    eqn = equation(f, X)
    assert eqn.primitive in following._CALLS
    assert params <= set(eqn.params)


def test_what_a_loop_keeps_carries_and_slices():
    def f(x, carry, rows):
        return lax.scan(lambda c, row: ((c[0] + row @ x, c[1] + 1), row), (carry, 0), rows)

    assert jaxprs.scan_arity(equation(f, W, jnp.ones(4), X).params) == (1, 2)


def test_conditionals():
    traced = jax.make_jaxpr(lambda i, x: lax.switch(i, [jnp.sin, jnp.cos], x))(0, X)
    eqn = traced.jaxpr.eqns[-1]  # After others that bring the index into range.
    assert eqn.primitive in following._CALLS
    assert len(eqn.params["branches"]) == 2 and eqn.invars[0].aval.shape == ()


def test_shardings_of_a_jit():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = equation(jax.jit(jnp.sin, in_shardings=device), X).params
    assert params["in_shardings"] == (device,)
    assert not following._is_sharding(*params["out_shardings"])


@pytest.mark.parametrize(
    "f",
    [
        jnp.copy,
        lambda x: lax.optimization_barrier(x),
        lambda x: x.astype(jnp.bfloat16),
        lambda x: x.T,
        lambda x: lax.rev(x, (0,)),
        lambda x: lax.broadcast_in_dim(x, (5, 2, 3), (1, 2)),
        lambda x: x.reshape(3, 2),
        lambda x: lax.expand_dims(x, (0,)),
        lambda x: lax.squeeze(lax.expand_dims(x, (0,)), (0,)),
    ],
)
def test_layout(f):
    primitive = jax.make_jaxpr(f)(X).jaxpr.eqns[-1].primitive
    assert primitive in moves._LAYOUT or primitive.name in moves._LAYOUT_BY_NAME


def test_replicated_over_a_mesh_axis():
    found = []

    def inside(x):
        eqn = equation(lambda x: lax.pcast(x, ("data",), to="varying"), x)
        found.append((eqn.primitive.name, eqn.params["axes"]))
        return x

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.shard_map(inside, mesh=mesh, in_specs=P(), out_specs=P())(X)
    ((name, axes),) = found
    assert name in moves._LAYOUT_BY_NAME and axes == ("data",)


def test_name_scopes_and_metadata():
    def f(x):
        with jax.named_scope("block"), set_xla_metadata(place="here"):
            return jnp.sin(x)

    eqn = equation(f, X)

    def again(x):
        with jaxprs.scopes_of(eqn):
            return jnp.cos(x)

    assert str(equation(again, X).source_info.name_stack) == "block"
    assert 'place = "here"' in jax.jit(again).lower(X).as_text()


@pytest.mark.parametrize(
    ("before", "after", "matched"),
    [
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((6, 4), (2, 3, 4), [([0], [0, 1]), ([1], [2])]),
        ((1, 6), (6, 1), [([1], [0])]),
        ((4, 6), (8, 3), [([0, 1], [0, 1])]),
        ((2, 2), (2, 2), [([0], [0]), ([1], [1])]),
    ],
)
def test_matched_axes_of_a_reshape(before, after, matched):
    assert moves._matched_axes(before, after) == matched
