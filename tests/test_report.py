"""The table that says which channels can be dropped, and why not."""

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import cdb_jax
from cdb_jax import Policy

PARAMS = {
    "a": {"kernel": jnp.ones((3, 8)), "bias": jnp.ones(8)},
    "b": {"kernel": jnp.ones((8, 4))},
}


def test_report():
    policy = Policy(0.5, key=0, channel_choice="exact", exempt=("b",), share_with_bias=True)
    report = cdb_jax.channel_report(PARAMS, policy)
    rows = {row.path: row for row in report.rows}
    assert rows["a/kernel"].channels == 8 and rows["a/kernel"].kept == "4"
    assert rows["a/bias"].note == "follows a/kernel"
    assert rows["b/kernel"].note == "exempt" and rows["b/kernel"].kept == "all"
    assert "1 layer, 50.0 % of 64 parameters" in str(report)
    scheduled = Policy(optax.constant_schedule(0.1), key=0)
    assert "rate scheduled" in str(cdb_jax.channel_report(PARAMS, scheduled))


def test_leaves_that_are_not_arrays():
    params = PARAMS | {"scale": 1.0, "activation": jnp.tanh}
    report = cdb_jax.channel_report(params, Policy(0.5, key=0, channel_choice="window"))
    plain = cdb_jax.channel_report(PARAMS, Policy(0.5, key=0, channel_choice="window"))
    assert {row.path for row in report.rows} == {row.path for row in plain.rows} | {
        "scale",
        "activation",
    }
    assert report.savings.gradient_bytes.full == plain.savings.gradient_bytes.full + 4


def test_stack_axes_do_not_count_as_dimensions():
    policy = Policy(0.5, key=0, channel_axes=cdb_jax.Axes(-1, stack=0))
    rows = cdb_jax.channel_report({"a": jnp.ones((8, 8)), "b": jnp.ones((2, 8, 8))}, policy).rows
    assert [row.note for row in rows] == ["fewer than two dimensions besides the stack axis", ""]


def test_a_report_takes_a_model_of_nnx():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    report = cdb_jax.channel_report(model, Policy(0.5, key=0))
    assert {row.path for row in report.rows} == {
        *("layers/0/kernel", "layers/0/bias"),
        *("layers/1/scale", "layers/1/bias"),
    }


def test_kept_channels_and_what_cannot_be_skipped():
    def loss(params, x):
        return jnp.sum(x @ params["a"]["kernel"])

    for rate, kept in ((0.5, "~4.03"), (1.0, "~0"), (jnp.float32(0.5), "an array")):
        row = cdb_jax.channel_report(PARAMS, Policy(rate, key=0)).rows[1]
        assert (row.path, row.kept) == ("a/kernel", kept)
    rows = cdb_jax.channel_report(PARAMS, Policy(0.5, key=0), loss, jnp.ones((2, 3))).rows
    assert rows[0].gradient == "in full" and "not static" in rows[1].gradient


@pytest.mark.bad_input
def test_mistakes():
    with pytest.raises(TypeError, match="policy.*0.5"):
        cdb_jax.channel_report(PARAMS, 0.5)
    with pytest.raises(TypeError, match="policy") as caught:
        cdb_jax.channel_report(Policy(0.5, key=0), {str(i): PARAMS for i in range(100)})
    assert len(str(caught.value)) < 300
    with pytest.raises(
        TypeError, match="optimizer must be the one that would be inside compact.*'adam'"
    ):
        cdb_jax.channel_report(PARAMS, Policy(0.5, key=0), optimizer="adam")
    with pytest.raises(TypeError, match="optimizer=optax"):
        cdb_jax.channel_report(PARAMS, Policy(0.5, key=0), optax.adam(0.1))
    with pytest.raises(ValueError, match="exempt"):
        cdb_jax.channel_report(PARAMS, Policy(0.5, key=0, exempt=("*",)))
