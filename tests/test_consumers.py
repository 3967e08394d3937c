"""One selection for all that takes part in a step, and channels that the user chooses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import cdb_jax

PARAMS = {
    "first": {"kernel": jnp.arange(1.0, 25.0).reshape(4, 6), "bias": jnp.ones(6)},
    "second": {"kernel": jnp.arange(1.0, 13.0).reshape(6, 2)},
}
X = jax.random.normal(jax.random.key(0), (5, 4))


def policy(**settings):
    return cdb_jax.Policy(0.5, **({"key": 0, "channel_choice": "window"} | settings))


def loss(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] / 50 + params["first"]["bias"][None])
    return jnp.mean((hidden @ params["second"]["kernel"]) ** 2)


def kept(tree, path):
    """Which output channels of a kernel are not zero."""
    return np.asarray(tree[path]["kernel"] != 0).all(axis=0)


# A selection that is given.


@pytest.mark.parametrize("make", [cdb_jax.channel_drop_back, None], ids=["mask", "freeze"])
def test_a_selection_of_an_equal_policy_is_used(make):
    tx = make(policy()) if make else cdb_jax.freeze_dropped(optax.identity(), policy())
    state = tx.init(PARAMS)
    selection = policy().select(PARAMS, 7)  # The state's own count is 0.
    updates, state = tx.update(PARAMS, state, PARAMS, selection=selection)
    chex.assert_trees_all_equal(updates, selection.mask(PARAMS))
    assert state.count == 1
    np.testing.assert_allclose(state.dropped_fraction, selection.dropped_fraction, rtol=1e-6)


def test_each_mask_of_a_chain_uses_its_own_selection():
    policies = policy(), policy(key=1)
    tx = optax.chain(*map(cdb_jax.channel_drop_back, policies))
    first, second = (x.select(PARAMS, 7) for x in policies)
    expected = second.mask(first.mask(PARAMS))
    for given in ((first, second), [second, first]):
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, selection=given)
        chex.assert_trees_all_equal(updates, expected)
    with pytest.raises(ValueError, match="selection.*a policy that differs"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, selection=first)


@pytest.mark.parametrize("others", ["full", "frozen"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("make", [cdb_jax.channel_drop_back, None], ids=["mask", "freeze"])
def test_chosen_channels_are_used_by_any_transformation(make, rate, others):
    fallback = cdb_jax.Policy(rate, key=0)
    tx = make(fallback) if make else cdb_jax.freeze_dropped(optax.identity(), fallback)
    chosen = cdb_jax.Selection.of(PARAMS, {"first/kernel": [1, 2]}, others=others)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, selection=chosen)
    chex.assert_trees_all_equal(updates, chosen.mask(PARAMS))


def test_policies_with_arrays_are_compared_by_value():
    rates = [policy(layer_rate=jnp.float32(x)) for x in (0.5, 0.5, 0.25)]
    selection = rates[0].select(PARAMS, 7)
    for other in rates[:2]:
        tx = cdb_jax.channel_drop_back(other)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), selection=selection)
        chex.assert_trees_all_equal(updates, selection.mask(PARAMS))
    with pytest.raises(ValueError, match="selection"):
        tx = cdb_jax.channel_drop_back(rates[2])
        tx.update(PARAMS, tx.init(PARAMS), selection=selection)


def test_the_leaves_of_a_policy_may_be_replaced():
    """As trees of axes for `vmap` and of types for `eval_shape`."""
    traced = policy(layer_rate=jnp.float32(1.0))
    axes = jax.tree.map(lambda _: 0, traced)
    several = jax.tree.map(lambda x: jnp.stack([x, x]), traced)
    masked = jax.vmap(lambda p: p.select(PARAMS, 0).mask(PARAMS), in_axes=(axes,))(several)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[1], masked), traced.select(PARAMS, 0).mask(PARAMS)
    )
    types = jax.eval_shape(lambda: traced.select(PARAMS, 0))
    chex.assert_trees_all_equal_structs(types, traced.select(PARAMS, 0))


def test_wrappers_of_optax_and_nnx_pass_it_on():
    selection = policy().select(PARAMS, 7)
    drop = cdb_jax.channel_drop_back(policy())
    for tx in (
        optax.MultiSteps(drop, 1).gradient_transformation(),
        optax.chain(optax.identity(), drop),
        optax.masked(drop, True),
        cdb_jax.freeze_dropped(drop, policy()),
    ):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, selection=selection)
        chex.assert_trees_all_equal(updates, selection.mask(PARAMS))
    model = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
    before = model.kernel[...]
    selection = policy().select(model, 7)
    optimizer = nnx.Optimizer(model, optax.chain(drop, optax.sgd(0.1)), wrt=nnx.Param)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, ones, selection=selection)
    moved = np.asarray(model.kernel[...] != before).any(axis=0)
    np.testing.assert_array_equal(moved, selection.factors["kernel"] == 1)


def test_a_part_of_the_tree_takes_its_part_of_the_selection():
    selection = policy().select(PARAMS, 3)
    part = {"second": PARAMS["second"]}
    chex.assert_trees_all_equal(selection.mask(part)["second"], selection.mask(PARAMS)["second"])
    _, gradient = cdb_jax.value_and_grad(lambda p, x: loss(PARAMS | p, x))(
        part, X, selection=selection
    )
    full = cdb_jax.grad(loss)(PARAMS, X, selection=selection)
    chex.assert_trees_all_close(gradient["second"], full["second"], rtol=1e-6)


def test_rescaling_is_left_to_the_transformation():
    scaled = policy(rescale="expected")
    selection = scaled.select(PARAMS, 0)
    chex.assert_trees_all_equal(selection.mask(PARAMS), policy().select(PARAMS, 0).mask(PARAMS))
    drop = cdb_jax.channel_drop_back(scaled)
    updates, _ = drop.update(PARAMS, drop.init(PARAMS))
    chex.assert_trees_all_equal(updates, selection.mask(PARAMS, rescale=True))
    np.testing.assert_array_equal(np.unique(selection.factors["first/kernel"]), [0.0, 2.0])


# Through the transformations of JAX.


def test_it_is_an_argument_and_a_result_of_jit():
    selection = jax.jit(lambda step: policy().select(PARAMS, step))(4)
    eager = policy().select(PARAMS, 4)
    chex.assert_trees_all_equal(selection, eager)
    gradient = jax.jit(cdb_jax.grad(loss))(PARAMS, X, selection=selection)
    expected = eager.mask(jax.grad(loss)(PARAMS, X))
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_vmap_and_scan_over_selections():
    steps = jnp.arange(4)
    several = jax.vmap(lambda step: policy().select(PARAMS, step))(steps)

    def gradient(selection):
        return cdb_jax.grad(loss)(PARAMS, X, selection=selection)

    mapped = jax.vmap(gradient)(several)
    _, scanned = jax.lax.scan(lambda _, selection: (None, gradient(selection)), None, several)
    full = jax.grad(loss)(PARAMS, X)
    for step in range(4):
        expected = policy().select(PARAMS, step).mask(full)
        for found in (mapped, scanned):
            one = jax.tree.map(lambda x, i=step: x[i], found)
            chex.assert_trees_all_close(one, expected, rtol=1e-5, atol=1e-7)


def test_it_is_an_argument_of_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(1), (8, 4))
    selection = policy().select(PARAMS, 2)

    def gradient(params, x, selection):
        return jax.tree.map(lambda g: g / 4, cdb_jax.grad(loss)(params, x, selection=selection))

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
    expected = selection.mask(jax.grad(loss)(PARAMS, x))
    found = jax.jit(mapped)(PARAMS, x, selection)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


def test_it_is_a_result_of_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def select(params, step):
        return policy().select(params, step[0])

    mapped = jax.shard_map(select, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    found = jax.jit(mapped)(PARAMS, jnp.array([2]))
    chex.assert_trees_all_equal(found.factors, policy().select(PARAMS, 2).factors)


def test_modes():
    one = policy(layer_choice="exact", other_layers="frozen").select(PARAMS, 0)
    assert sorted(one.modes) == ["first/bias", "first/kernel", "second/kernel"]
    counts = {mode: list(map(int, one.modes.values())).count(mode) for mode in cdb_jax.Mode}
    assert counts == {cdb_jax.Mode.FROZEN: 2, cdb_jax.Mode.PARTIAL: 1, cdb_jax.Mode.FULL: 0}
    whole = policy(layer_rate=0.0).select(PARAMS, 0)
    assert set(map(int, whole.modes.values())) == {cdb_jax.Mode.FULL}


# What may be dropped.


def test_only_is_the_opposite_of_exempt():
    selection = policy(only=("second",)).select(PARAMS, 0)
    assert set(selection.factors) == {"second/kernel"}
    both = policy(only=("*",), exempt=("second",)).select(PARAMS, 0)
    assert set(both.factors) == {"first/kernel"}
    report = cdb_jax.channel_report(PARAMS, policy(only=("second",)))
    assert {row.path: row.note for row in report.rows}["first/kernel"] == "not in `only`"
    frozen = policy(only=("first",), layer_choice="exact", other_layers="frozen")
    assert not np.any(frozen.select(PARAMS, 0).mask(PARAMS)["second"]["kernel"])


# Channels that the user chooses.


@pytest.mark.parametrize("others", ["full", "frozen"])
def test_chosen_channels(others):
    chosen = {"first/kernel": [1, -1], "first/bias": range(3)}
    selection = cdb_jax.Selection.of(PARAMS, chosen, others=others)
    gradient = jax.jit(cdb_jax.grad(loss))(PARAMS, X, selection=selection)
    full = jax.grad(loss)(PARAMS, X)
    kernel = full["first"]["kernel"] * jnp.array([0.0, 1, 0, 0, 0, 1])[None]
    bias = full["first"]["bias"] * jnp.array([1.0, 1, 1, 0, 0, 0])
    second = full["second"]["kernel"] * (1.0 if others == "full" else 0.0)
    expected = {"first": {"kernel": kernel, "bias": bias}, "second": {"kernel": second}}
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(selection.mask(full), expected)


def test_chosen_channels_may_be_traced_and_name_many_leaves():
    @jax.jit
    def gradient(channels):
        selection = cdb_jax.Selection.of(PARAMS, {"*/kernel": channels})
        return cdb_jax.grad(loss)(PARAMS, X, selection=selection)

    found = gradient(jnp.array([1]))
    np.testing.assert_array_equal(kept(found, "first"), [False, True, *[False] * 4])
    np.testing.assert_array_equal(kept(found, "second"), [False, True])


@pytest.mark.parametrize(
    "chosen", [[1, 1, 4], [0, 0, 5, 3], [-1, 2], [-9, 2], [7, 7], [4, 1, 0], [2, 2, 0, 0, 5, 5]]
)
@pytest.mark.parametrize("stack", [(), (2,)])
def test_traced_channels_that_are_repeated_or_out_of_range(chosen, stack):
    params = {"kernel": jax.random.normal(jax.random.key(1), (*stack, 4, 6))}
    axes = cdb_jax.Axes(-1, stack=tuple(range(len(stack))))

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["kernel"]) ** 2)

    @jax.jit
    def gradients(channels):
        selection = cdb_jax.Selection.of(params, {"kernel": channels}, channel_axes=axes)
        masked = selection.mask(jax.grad(loss)(params, X))
        return cdb_jax.grad(loss)(params, X, selection=selection), masked

    found, expected = gradients(jnp.array(chosen))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    learns = np.any(np.asarray(found["kernel"]) != 0, axis=(*range(len(stack)), -2))
    assert set(np.flatnonzero(learns)) == {i % 6 for i in chosen if -6 <= i < 6}


def test_chosen_channels_of_any_int_dtype():
    wide = {"kernel": jnp.ones((2, 300))}
    chosen = cdb_jax.Selection.of(wide, {"kernel": np.array([1, 255], np.uint8)})
    assert np.flatnonzero(chosen.factors["kernel"]).tolist() == [1, 255]


def test_chosen_channels_of_stacked_layers():
    params = {"kernel": jnp.ones((3, 2, 4))}
    axes = cdb_jax.Axes(-1, stack=0)
    together = cdb_jax.Selection.of(params, {"kernel": [0]}, channel_axes=axes)
    np.testing.assert_array_equal(together.factors["kernel"], [[1, 0, 0, 0]] * 3)
    apart = cdb_jax.Selection.of(params, {"kernel": [[0], [1], [3]]}, channel_axes=axes)
    np.testing.assert_array_equal(apart.factors["kernel"], np.eye(4)[[0, 1, 3]])


WHOLE = {
    "attention": {"key": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))}},
    "blocks": {"kernel": jnp.ones((3, 6, 6)), "bias": jnp.ones((3, 6))},
    "head": {"kernel": jnp.ones((6, 5))},
    "position": jnp.ones((4, 6)),
    "scale": jnp.ones(()),
}


def learns(selection):
    return {
        name
        for name, masked in selection.mask(WHOLE).items()
        if all(np.all(x) for x in jax.tree.leaves(masked))
    }


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "axes",
    [
        cdb_jax.output_channels,
        lambda path, leaf: None,
        {"": cdb_jax.output_channels, "blocks": cdb_jax.Axes(-1, stack=0)},
    ],
    ids=["convention", "rule", "tree"],
)
def test_whole_leaves_of_any_kind_freeze_or_learn(name, axes):
    frozen = cdb_jax.Selection.of(WHOLE, {name: []}, channel_axes=axes)
    assert learns(frozen) == WHOLE.keys() - {name}
    alone = cdb_jax.Selection.of(WHOLE, {name: ...}, channel_axes=axes, others="frozen")
    assert learns(alone) == {name}


def test_whole_leaves_share_a_group():
    patterns = {"attention": [], "blocks": [], "position": ..., "scale": jnp.zeros((0,), int)}
    selection = cdb_jax.Selection.of(WHOLE, patterns, others="frozen")
    assert len(selection.groups) == 2 and learns(selection) == {"position"}
    traced = jax.jit(lambda x: cdb_jax.Selection.of(WHOLE, {"scale": x}))(jnp.zeros((0,), int))
    assert learns(traced) == WHOLE.keys() - {"scale"}


def test_frozen_integers_are_no_mistake():
    counted = WHOLE | {"count": jnp.arange(2)}
    selection = cdb_jax.Selection.of(counted, {"count": [], "scale": []})
    assert set(selection.factors) == {"scale"}


@pytest.mark.parametrize("kept_only", [False, True])
def test_the_gradient_of_whole_leaves(kept_only):
    selection = cdb_jax.Selection.of(PARAMS, {"second": ...}, others="frozen")
    gradient = jax.jit(cdb_jax.grad(loss, kept_only=kept_only))(PARAMS, X, selection=selection)
    expected = jax.grad(loss)(PARAMS, X)["second"]["kernel"]
    np.testing.assert_allclose(gradient["second"]["kernel"], expected, rtol=1e-5)
    assert kept_only or not np.any(gradient["first"]["kernel"])


def test_all_channels_and_none():
    chosen = {"first/kernel": [], "second/kernel": [0, 1]}
    selection = cdb_jax.Selection.of(PARAMS, chosen)
    assert selection.modes["first/kernel"] == cdb_jax.Mode.FROZEN
    assert selection.modes["second/kernel"] == cdb_jax.Mode.FULL
    gradient = cdb_jax.grad(loss)(PARAMS, X, selection=selection)
    assert not np.any(gradient["first"]["kernel"]) and kept(gradient, "second").all()


def test_a_selection_prints_as_one_line():
    policy = cdb_jax.Policy(jnp.float32(0.5), key=0, channel_axes=cdb_jax.Axes(-1, stack=0))
    with jax.transfer_guard_device_to_host("disallow"):
        drawn = repr(policy.select({"a": jnp.ones((3, 4, 6))}, 0))
    assert drawn == "Selection(3 layers of Policy(...))"
    chosen = cdb_jax.Selection.of(PARAMS, {"first/kernel": [2]})
    assert str(chosen) == "Selection(1 layer with chosen channels)"


def test_chosen_channels_save_work():
    def flops(f, **kwargs):
        return jax.jit(f).lower(PARAMS, X, **kwargs).cost_analysis()["flops"]

    selection = cdb_jax.Selection.of(PARAMS, {"first/kernel": [2]}, others="frozen")
    assert flops(cdb_jax.grad(loss), selection=selection) < 0.9 * flops(jax.grad(loss))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("chosen", "settings", "error", "message"),
    [
        ({"third": [0]}, {}, ValueError, "chosen: .*'third'"),
        (["first/kernel"], {}, TypeError, "chosen must be a dict.*first/kernel"),
        ({}, {}, ValueError, "chosen={}"),
        ({"first": {"kernel": [0]}}, {}, TypeError, r"'first' has a dict.*'first/kernel': \[0\]"),
        ({"first/kernel": [99] * 99}, {}, ValueError, r"'first/kernel'.*99, 99, .*\.\.\.\.$"),
        ({"first/kernel": [6]}, {}, ValueError, r"'first/kernel'.*6 channels.*\[6\]"),
        ({"first/kernel": [0, -6]}, {}, ValueError, r"'first/kernel'.*\[0, -6\]"),
        ({"first/kernel": [0.5]}, {}, TypeError, r"'first/kernel'.*\[0.5\]"),
        ({"first/kernel": [True] * 6}, {}, TypeError, "'first/kernel'.*ints"),
        ({"first/kernel": 3}, {}, TypeError, "'first/kernel'.*3"),
        ({"first/kernel": [[0], [1, 2]]}, {}, ValueError, r"'first/kernel'.*\[\[0\], \[1, 2\]\]"),
        ({"first": [0], "*/kernel": [0]}, {}, ValueError, r"'first/kernel'.*\*/kernel"),
        ({"first/kernel": [0]}, {"others": "still"}, ValueError, "others.*'still'"),
        ({"first/kernel": [0]}, {"channel_axes": 2}, ValueError, "axis 2.*'first/kernel'"),
    ],
)
def test_mistakes(chosen, settings, error, message):
    with pytest.raises(error, match=message):
        cdb_jax.Selection.of(PARAMS, chosen, **settings)


@pytest.mark.bad_input
def test_chosen_channels_of_what_has_none():
    with pytest.raises(ValueError, match=r"chosen: 'a' of shape \(\) has no channels"):
        cdb_jax.Selection.of({"a": jnp.ones(()), "b": jnp.ones((2, 3))}, {"a": [0]})
