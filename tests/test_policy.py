"""Bad input: every mistake gets an error that names the argument, the value and the mend."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cdb_jax.nnx
from cdb_jax import Axes, Policy, channel_drop_back
from cdb_jax.channels import resolve

DENSE = {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
STACK = {"fc": {"kernel": jnp.zeros((3, 8, 8))}}

AT_CONSTRUCTION = {
    "negative rate": (dict(rate=-0.1), "rate must be a drop probability.*-0.1"),
    "rate above one": (dict(rate=1.5), "rate must be a drop probability.*1.5"),
    "rate NaN": (dict(rate=float("nan")), "rate must be a drop probability.*nan"),
    "rate a string": (dict(rate="0.3"), "rate must be a drop probability.*'0.3'"),
    "rate a bool": (dict(rate=True), "rate must be a drop probability.*True"),
    "rate None": (dict(rate=None), "rate must be a drop probability.*None"),
    "rate a vector": (dict(rate=jnp.ones(3)), r"rate must be a real scalar.*\(3,\)"),
    "rate a bad array": (dict(rate=jnp.float32(2.0)), "rate must be a drop probability.*2.0"),
    "tree of strings": (dict(channel_axes={"dense": "out"}), "'out' at 'dense'"),
    "rate complex": (dict(rate=jnp.complex64(0.5)), "rate must be a real scalar.*complex64"),
    "hold": (dict(hold=0), "hold.*0"),
    "hold an array": (dict(hold=jnp.int32(0)), "hold.*0"),
    "hold several": (dict(hold=jnp.arange(3)), "hold.*0, 1, 2"),
    "layer_rate": (
        dict(layer_rate=2),
        "layer_rate must be the probability that a layer is masked.*got 2; use 0.3 to mask",
    ),
    "no key": (dict(key=None), r"key is missing.*key=jax.random.key\(0\)"),
    "float key": (dict(key=0.5), "key must be an int or a JAX key, got 0.5"),
    "bool key": (dict(key=True), "key must be an int or a JAX key, got True"),
    "Rngs": (dict(key=nnx.Rngs(0)), r"key must be an int.*Rngs.{,80}; use key=rngs.params\(\)"),
    "string key": (dict(key="seed"), "key must be an int or a JAX key, got 'seed'"),
    "negative key": (dict(key=-1), "key=-1 is not in"),
    "negative word of a key": (dict(key=(-1, 3)), r"key=\(-1, 3\).*not in"),
    "float array key": (dict(key=jnp.ones(2)), "key must be an int or a JAX key.*float32"),
    "many keys": (
        dict(key=jax.random.split(jax.random.key(0), 3)),
        r"key must be one key.*\(3,\).*jax.vmap",
    ),
    "layer_choice": (dict(layer_choice="bernouli"), "layer_choice must be one of.*'bernouli'"),
    "channel_choice": (dict(channel_choice="block"), "channel_choice must be one of.*'block'"),
    "chunks of no number": (dict(rate=0.3, channel_choice="chunk"), "rate=0.3.*1 - 1/m"),
    "chunks of a schedule": (
        dict(rate=optax.constant_schedule(0.5), channel_choice="chunk"),
        "rate=.*channel_choice='chunk'.*Python number",
    ),
    "rescale": (dict(rescale=True), "rescale must be one of.*True"),
    "other_layers": (
        dict(layer_choice="exact", other_layers="still"),
        "other_layers must be one of.*'still'",
    ),
    "other_layers alone": (
        dict(other_layers="frozen"),
        "other_layers='frozen'.*layer_choice='exact'",
    ),
    "layer_weights alone": (
        dict(layer_weights="size"),
        "layer_weights='size'.*layer_choice",
    ),
    "layer_weights name": (
        dict(layer_choice="exact", layer_weights="sizes"),
        "layer_weights must be one of.*'sizes'",
    ),
    "layer_weights number": (
        dict(layer_choice="exact", layer_weights=3),
        "layer_weights must be 'uniform', 'size' or a dict.*3",
    ),
    "negative weight": (
        dict(layer_choice="exact", layer_weights={"a": -1.0}),
        r"layer_weights\['a'\].*-1.0",
    ),
    "no weight": (
        dict(layer_choice="exact", layer_weights={"a": 0.0}),
        "layer_weights must have a positive sum",
    ),
    "window_groups alone": (dict(window_groups=2), "window_groups=2.*channel_choice='window'"),
    "window_groups zero": (
        dict(channel_choice="window", window_groups=0),
        "window_groups must be an int >= 1, got 0",
    ),
    "realized at one": (dict(rate=1.0, rescale="realized"), "rescale='realized'.*rate=1.0"),
    "exempt a string": (dict(exempt="head"), r"exempt=\('head',\)"),
    "exempt None": (dict(exempt=None), r"exempt must be a tuple.*None.*exempt=\(\)"),
    "exempt a number": (dict(exempt=(3,)), "exempt must hold path patterns.*3"),
    "share_with_bias": (dict(share_with_bias=1), "share_with_bias must be a bool, got 1"),
    "bias of inputs": (
        dict(share_with_bias=True, channel_axes=cdb_jax.input_channels),
        "share_with_bias=True.*output_channels",
    ),
    "root": (dict(root=3), "root must be a path.*3"),
    "axes a string": (dict(channel_axes="output"), "channel_axes must be output_channels"),
    "axes an array": (dict(channel_axes=jnp.int32(1)), "channel_axes must be static"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("settings, message", AT_CONSTRUCTION.values(), ids=AT_CONSTRUCTION)
def test_mistakes_at_construction(settings, message):
    settings = {"rate": 0.3, "key": 0} | settings
    with pytest.raises((TypeError, ValueError), match=message):
        channel_drop_back(settings.pop("rate"), **settings)


ON_A_TREE = {
    "axis out of range": (DENSE, dict(channel_axes=2), r"axis 2 is out of range.*dense/kernel"),
    "axis repeated": (DENSE, dict(channel_axes=(1, -1)), "dense/kernel.*repeats an axis"),
    "axis on a scalar": (
        {"x": jnp.zeros(())},
        dict(channel_axes=lambda path, leaf: 0),
        "axis 0 is out of range for 'x'",
    ),
    "axis twice": (
        STACK,
        dict(channel_axes=Axes(0, stack=0)),
        "fc/kernel.*both as a channel and as a stack",
    ),
    "axis a bool": (DENSE, dict(channel_axes=lambda p, x: True), "axis True.*is not an int"),
    "no axis": (DENSE, dict(channel_axes=()), "names no channel axis"),
    "rule returns a string": (
        DENSE,
        dict(channel_axes=lambda p, x: "out"),
        "rule for 'dense/bias' returned 'out'",
    ),
    "tree too small": (
        DENSE | {"head": {"kernel": jnp.zeros((2, 2))}},
        dict(channel_axes={"dense": -1}),
        "channel_axes.*no entry for 'head/kernel'",
    ),
    "tree too large": (DENSE, dict(channel_axes={"dense": -1, "head": -1}), "channel_axes.*'head'"),
    "exempt matches nothing": (DENSE, dict(exempt=("haed",)), "'haed' matches none.*dense/kernel"),
    "only matches nothing": (DENSE, dict(only=("haed",)), "'haed' matches none.*or remove it"),
    "blocks match nothing": (DENSE, dict(blocks=("haed",)), "'haed' matches none.*or remove it"),
    "a deeper pattern": (DENSE, dict(exempt=("kernel",)), r"use '\*/kernel' to match it at any"),
    "a pattern with params": (
        DENSE,
        dict(exempt=("params/dense",)),
        "use 'dense'; a leading params is left out",
    ),
    "a pattern with a slash": (DENSE, dict(only=("dense/",)), "use 'dense'; drop the slash"),
    "a pattern with all of these": (
        DENSE,
        dict(only=("params/kernel/",)),
        r"use '\*/kernel' to match it at any depth; a leading params is left out; drop the slash",
    ),
    "nothing left": (DENSE, dict(exempt=("dense",)), "leave nothing to drop"),
    "only biases": ({"bias": jnp.zeros(3)}, {}, "leave nothing to drop"),
    "stack or convolution": (
        STACK,
        {},
        r"infer_channel_axes(.|\n)*fc/kernel.*\(3, 8, 8\)",
    ),
    "two leaves, one path": (
        {"params": {"kernel": jnp.zeros((2, 2))}, "kernel": jnp.zeros((2, 2))},
        {},
        "2 leaves of the tree have the path 'kernel'",
    ),
    "window_groups": (
        DENSE,
        dict(channel_choice="window", window_groups=3),
        "window_groups=3 does not divide the 4 channels of 'dense/kernel'",
    ),
    "weights too few": (
        DENSE,
        dict(layer_choice="exact", layer_weights={"other/kernel": 1.0}),
        "no weight for the layer 'dense/kernel'",
    ),
    "weights too many": (
        DENSE,
        dict(layer_choice="exact", layer_weights={"dense/kernel": 1.0, "head/kernel": 1.0}),
        "weight for 'head/kernel'",
    ),
    "one layer of a part": (
        DENSE | {"head": optax.MaskedNode()},
        dict(layer_choice="exact"),
        "layer_choice='exact' picks from the whole model",
    ),
    "bias without its kernel": (
        {"a": {"kernel": optax.MaskedNode(), "bias": jnp.zeros(4)}} | DENSE,
        dict(share_with_bias=True),
        "'a/bias' follows 'a/kernel', which is masked out",
    ),
    "bias of another shape": (
        {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(5)},
        dict(share_with_bias=True),
        r"'bias' of shape \(5,\) cannot follow",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("tree, settings, message", ON_A_TREE.values(), ids=ON_A_TREE)
def test_mistakes_on_a_tree(tree, settings, message):
    tx = channel_drop_back(0.3, key=0, **settings)
    frozen = cdb_jax.freeze_dropped(optax.sgd(0.1), Policy(0.3, key=0, **settings))
    for call in (
        lambda: tx.update(tree, tx.init(None)),
        lambda: tx.init(tree),
        lambda: frozen.init(tree),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def returns_none(step):
    return None


def branches(step):
    return 0.5 if step < 3 else 0.1


SCHEDULES = {
    "percents": (dict(layer_rate=lambda step: 30), "layer_rate.*returned 30"),
    "NaN": (dict(layer_rate=lambda step: float("nan")), "schedule returned nan"),
    "None": (dict(rate=returns_none), "^rate: the schedule returned None; return a drop prob"),
    "None of a layer": (
        dict(layer_rate=returns_none),
        "^layer_rate.*returned None; return the probability that a layer is masked",
    ),
    "if": (dict(rate=branches), "^rate: .*must work with traced steps; use jnp.where.*optax"),
    "if of a layer": (dict(layer_rate=branches), "^layer_rate: .*must work with traced steps"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("settings, message", SCHEDULES.values(), ids=SCHEDULES)
def test_mistakes_in_schedules(settings, message):
    policy = Policy(**({"rate": 0.3, "key": 0} | settings))
    tx = channel_drop_back(policy)
    for call in (
        lambda: policy.select(DENSE, 0),
        lambda: tx.update(DENSE, tx.init(DENSE)),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_init_of_what_is_not_arrays():
    tx = channel_drop_back(0.3, key=0, exempt=("haed",))
    for params in (None, {}, {"a": None}, {"a": optax.MaskedNode()}, {"a": "a sharding"}):
        tx.init(params)


@pytest.mark.bad_input
@pytest.mark.parametrize("step", [-1, np.array(-1), 2**32, np.int64(2**33)])
def test_steps_out_of_range(step):
    with pytest.raises(ValueError, match=f"step={step}"):
        Policy(0.5, key=0).select(DENSE, step)


def test_steps_of_few_bits():
    policy = Policy(0.5, key=0, hold=1000)
    chex.assert_trees_all_equal(
        policy.select(DENSE, jnp.int8(3)).factors, policy.select(DENSE, 3).factors
    )


@pytest.mark.bad_input
def test_mistakes_with_a_selection():
    selection = Policy(0.5, key=0).select(DENSE, 0)
    with pytest.raises(ValueError, match=r"'x'.*\(4,\).*dense/kernel"):
        selection.mask(DENSE | {"x": np.ones(4)})
    with pytest.raises(ValueError, match=r"'dense/kernel'.*\(2, 3\).*\(3, 4\)"):
        selection.mask({"dense": {"kernel": np.ones((2, 3))}})
    with pytest.raises(TypeError, match="selection.*got 3"):
        drop = channel_drop_back(0.5, key=0)
        drop.update(DENSE, drop.init(DENSE), selection=3)


@pytest.mark.bad_input
def test_mistakes_with_a_policy():
    policy = Policy(0.5, key=0)
    with pytest.raises(TypeError, match="layer_rate=0.5.*Policy"):
        channel_drop_back(policy, layer_rate=0.5)
    with pytest.raises(TypeError, match="key=1.*Policy"):
        channel_drop_back(policy, key=1)
    with pytest.raises(ValueError, match="rate.*got 30"):
        Policy(30, key=0)
    with pytest.raises(TypeError, match="layer_rate=.*inject_hyperparams"):
        optax.inject_hyperparams(channel_drop_back)(policy).init(DENSE)
    with pytest.raises(TypeError, match="rate is an optax transformation"):
        channel_drop_back(channel_drop_back(policy))
    with pytest.raises(ValueError, match="opt_state"):
        cdb_jax.selection_count(DENSE)


def test_channel_drop_back_and_policy_take_the_same_arguments():
    import inspect

    ours = inspect.signature(channel_drop_back).parameters
    fields = {field.name: field.default for field in dataclasses.fields(Policy)}
    assert list(ours) == list(fields)
    for name, default in fields.items():
        if name != "rate":
            assert ours[name].default == default, name


@pytest.mark.parametrize(
    "key",
    [
        0,
        np.int64(0),
        jnp.int32(0),
        jax.random.key(0),
        jax.random.PRNGKey(0),
        jax.random.key(0, impl="threefry2x32"),
    ],
    ids=str,
)
def test_keys_that_mean_the_same(key):
    assert Policy(0.3, key=key).key == (0, 0)


def test_other_keys_differ_and_policies_can_be_changed():
    keys = [1, 2**32, jax.random.key(7, impl="rbg"), jax.random.key(8, impl="unsafe_rbg")]
    words = {Policy(0.3, key=key).key for key in keys}
    assert len(words) == len(keys)
    policy = Policy(0.3, key=keys[2], layer_choice="exact", layer_weights={"b": 1, "a": 2})
    assert dataclasses.replace(policy, rate=0.3) == policy
    assert hash(policy) == hash(dataclasses.replace(policy))


PARAMS = {"kernel": jnp.ones((2, 4))}
POLICY = cdb_jax.Policy(0.5, key=0, channel_choice="window")


def kernel_sum(params):
    return jnp.sum(params["kernel"])


STEPS = {
    1.5: (TypeError, "step.*1.5"),
    True: (TypeError, "step.*True"),
    "state": (TypeError, "step.*ScaleByAdamState"),
    "array": (TypeError, r"step.*\[0, 1\]"),
    -1: (ValueError, "step=-1"),
    2**32: (ValueError, "step=4294967296"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_count_that_is_no_step(step):
    error, message = STEPS[step]
    values = {"state": optax.adam(0.1).init(PARAMS), "array": jnp.arange(2)}
    with pytest.raises(error, match=message):
        POLICY.select(PARAMS, values.get(step, step))


@pytest.mark.bad_input
def test_arguments_in_each_others_place():
    for module in (cdb_jax, cdb_jax.nnx):
        with pytest.raises(TypeError, match="fun must be .*Policy"):
            module.value_and_grad(POLICY)
    with pytest.raises(TypeError, match="policy must be .*0.5"):
        cdb_jax.freeze_dropped(optax.sgd(0.1), 0.5)
    for params in (nnx.Linear, kernel_sum):
        with pytest.raises(TypeError, match=f"params is a class or function, {params.__name__}"):
            POLICY.select(params, 0)
    many = {str(i): PARAMS for i in range(100)}
    for call in (cdb_jax.value_and_grad, cdb_jax.infer_channel_axes):
        with pytest.raises(TypeError, match="fun must be a function") as caught:
            call(*(many, kernel_sum)[: 1 if call is cdb_jax.value_and_grad else 2])
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name, shape, bias, outputs, inputs, stack",
    [
        ("conv/kernel", (6, 3, 3, 4, 8), (6, 8), (4,), (3,), (0,)),
        ("conv/weight", (6, 8, 4, 3, 3), (6, 8, 1, 1), (1,), (2,), (0,)),
        ("pwconv/kernel", (6, 4, 8), (6, 8), (2,), (1,), (0,)),
        ("q/kernel", (16, 4, 8), (4, 8), (1, 2), (0,), ()),
        ("any/w", (16, 4, 8), (4, 8), (1, 2), (0,), ()),
        ("any/w", (4, 8, 16), (16,), (2,), (0, 1), ()),
        ("any/w", (3, 16, 4, 8), (3, 4, 8), (2, 3), (1,), (0,)),
        ("any/kernel", (8, 3), (8,), (0,), (1,), ()),
    ],
)
@pytest.mark.parametrize("direction", ["output", "input"])
def test_a_bias_shows_heads_and_stacked_layers(
    direction, name, shape, bias, outputs, inputs, stack
):
    tree = {name: jnp.ones(shape), f"{name.split('/')[0]}/bias": jnp.ones(bias)}
    leaves = resolve(tree, getattr(cdb_jax, f"{direction}_channels")).leaves
    (leaf,) = [x for x in leaves if x.path == name]
    assert leaf.channel == (outputs if direction == "output" else inputs)
    assert leaf.stack == stack


def test_an_array_that_is_not_settled_is_left_alone():
    tree = {"layers": {"w": jnp.ones((3, 4, 8))}, "kernel": jnp.ones((20, 30))}
    (row, other) = cdb_jax.channel_report(tree, cdb_jax.Policy(0.5, key=0)).rows[::-1]
    assert "do not show" in row.note and row.channels is None
    assert other.channels == 30
    alone = {"w": jnp.ones((2, 3)), "kernel": jnp.ones((2, 3))}
    assert "2 layers" in str(cdb_jax.channel_report(alone, cdb_jax.Policy(0.5, key=0)))


def stacked(model):
    """What a vmapped constructor makes of a model's shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((6, *x.shape), x.dtype), model)


CONVOLUTIONS = {  # Flax and Equinox; kernels of one and two dimensions, and their biases.
    "flax 1-D": ("kernel", (3, 4, 8), (8,)),
    "flax 2-D": ("kernel", (3, 3, 4, 8), (8,)),
    "equinox 1-D": ("weight", (8, 4, 3), (8, 1)),
    "equinox 2-D": ("weight", (8, 4, 3, 3), (8, 1, 1)),
    "as many in as out": ("weight", (6, 6, 3, 3), (6, 1, 1)),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("direction", ["output_channels", "input_channels"])
@pytest.mark.parametrize("name, kernel, bias", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_stacked_convolutions_are_told_from_those_of_more_dimensions(name, kernel, bias, direction):
    convention = getattr(cdb_jax, direction)
    layer = {name: jnp.ones(kernel), "bias": jnp.ones(bias)}
    policy = cdb_jax.Policy(0.5, key=0, channel_axes=convention)
    text = str(cdb_jax.channel_report({"conv": layer}, policy))
    assert f"{'x'.join(map(str, kernel))} " in text and "1 layer," in text
    many = stacked({"conv": layer})
    assert "6 layers," in str(cdb_jax.channel_report(many, policy))
    assert "6 layers," in str(cdb_jax.channel_report(many["conv"], policy))
    policy = cdb_jax.Policy(0.5, key=0, channel_axes=cdb_jax.Axes(convention, stack=0))
    assert "6 layers," in str(cdb_jax.channel_report(many, policy))


@pytest.mark.bad_input
@pytest.mark.parametrize("direction", ["output", "input"])
def test_many_arrays_that_are_not_settled(direction):
    tree = {f"w{i:02}": jnp.ones((2, 3, 5)) for i in range(14)} | {"kernel": jnp.ones((2, 3))}
    convention = getattr(cdb_jax, f"{direction}_channels")
    policy = cdb_jax.Policy(0.5, key=0, channel_axes=convention)
    with pytest.raises(ValueError, match=r"^channel_axes=.*\(loss_fn, params, batch") as caught:
        cdb_jax.channel_report(tree, policy)
    message = str(caught.value)
    assert ('channels="input"' in message) == (direction == "input")
    assert "'w00' of shape (2, 3, 5)" in message and "and 10 more" in message
    assert len(message.splitlines()) <= 10


def test_equal_policies_are_one_key():
    """A tree of specs too: a program is remembered by what decides it."""

    def specs():
        return {"a": {"kernel": cdb_jax.Axes(-1), "bias": None}, "b": [0, (0, 1)]}

    def make(**settings):
        return cdb_jax.Policy(0.5, key=0, channel_axes=specs(), **settings)

    assert make() == make() and hash(make()) == hash(make())
    assert make() != make(hold=2)
