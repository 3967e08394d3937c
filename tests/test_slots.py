"""Which entry of an optimizer state belongs to which parameter: no step is taken here."""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings, strategies as st

import cdb_jax
from cdb_jax import _optax_states as slots, channels

pytestmark = pytest.mark.usefixtures("standard_promotion")  # For optax's own optimizers.

CONTRIB = optax.contrib
KEY = jax.random.key(0)


def last_axis(path, leaf):
    return len(leaf.shape) - 1 if leaf.shape else cdb_jax.Axes(())


def layout_of(updates, channel_axes=last_axis, **settings):
    return channels.resolve(updates, channel_axes, **settings)


def find(tx, params, updates=None, rules=None, **settings):
    """The shapes of a state's entries and the slots that are found for them."""
    updates = params if updates is None else updates
    state = jax.eval_shape(tx.init, params)
    layout = layout_of(updates, **settings)
    found = slots.find((state, updates), layout, slots.checked_rules(rules or {}), "freeze_dropped")
    return jax.tree.leaves(state, is_leaf=lambda x: x is None), found


def by_path(tx, params, **settings):
    """The slots of a state by the paths of its entries; those without an owner are left out."""
    state = jax.eval_shape(tx.init, params)
    paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in with_none(state)]
    _, found = find(tx, params, **settings)
    return {path: tuple(slot) for path, slot in zip(paths, found, strict=True) if slot is not None}


def with_none(tree):
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# Trees of parameters. No two axes have the same size, so the shape of an entry names its owner.


class Pair(NamedTuple):
    mu: object
    nu: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    kernel: object
    weight: object


def trees(min_rank=0):
    names = st.sampled_from(["a", "ab", "b", "mu", "nu", "count", "kernel", "0"])
    ranks = st.integers(min_rank, 3) | st.none()

    def containers(inner):
        return (
            st.dictionaries(names, inner, min_size=1, max_size=3)
            | st.lists(inner, min_size=1, max_size=3)
            | st.tuples(inner, inner)
            | st.builds(Pair, inner, inner)
            | st.builds(Module, inner, inner)
        )

    trees = st.recursive(ranks, containers, max_leaves=6)
    return trees.filter(jax.tree.leaves).map(of_unique_sizes)


def of_unique_sizes(ranks):
    sizes = itertools.count(11)
    return jax.tree.map(lambda rank: array(*itertools.islice(sizes, rank)), ranks)


def expected_slot(shape, updates):
    """The owner of an entry that is not a scalar, by the sizes of its axes."""
    owners = {
        size: (i, axis)
        for i, leaf in enumerate(jax.tree.leaves(updates))
        for axis, size in enumerate(leaf.shape)
    }
    known = [owners.get(size) for size in shape]
    parameters = {owner[0] for owner in known if owner is not None}
    if not parameters:
        return None
    (parameter,) = parameters
    return slots.Slot(parameter, tuple(owner and owner[1] for owner in known))


def check(tx, params, updates=None, rules=None, **settings):
    entries, found = find(tx, params, updates, rules, **settings)
    for entry, slot in zip(entries, found, strict=True):
        if entry is None:
            assert slot is None
        elif entry.shape:
            assert slot == expected_slot(entry.shape, params if updates is None else updates)


# What optax has.


def sm3_axes(field, shape, entry_shape):
    return (shape.index(entry_shape[0]),) if len(entry_shape) == 1 else tuple(range(len(shape)))


def lbfgs_axes(field, shape, entry_shape):
    if field == "weights_memory":
        return None
    return (None,) * field.endswith("_memory") + tuple(range(len(shape)))


SM3 = {type(optax.scale_by_sm3().init({})): sm3_axes}
LBFGS = {type(optax.scale_by_lbfgs().init({})): lbfgs_axes}


def rank_labels(params):
    return jax.tree.map(lambda x: "matrix" if len(x.shape) > 1 else "vector", params)


def is_matrix(params):
    return jax.tree.map(lambda x: len(x.shape) > 1, params)


def every_second(params):
    """A prefix of the parameters: True and False in turn for what lies directly in the tree."""
    turns = itertools.cycle([True, False])
    return jax.tree.map(lambda _: next(turns), params, is_leaf=lambda x: x is not params)


ELEMENTWISE = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "adabelief": optax.adabelief(0.1),
    "adadelta": optax.adadelta(0.1),
    "adagrad": optax.adagrad(0.1),
    "adamax": optax.adamax(0.1),
    "adan": optax.adan(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "lion": optax.lion(0.1),
    "novograd": optax.novograd(0.1),
    "radam": optax.radam(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "rprop": optax.rprop(0.1),
    "yogi": optax.yogi(0.1),
    "acprop": CONTRIB.acprop(0.1),
    "ademamix": CONTRIB.ademamix(0.1),
    "adopt": CONTRIB.adopt(0.1),
    "cocob": CONTRIB.cocob(),
    "dadapt_adamw": CONTRIB.dadapt_adamw(0.1),
    "dog": CONTRIB.dog(1.0),
    "dowg": CONTRIB.dowg(1.0),
    "madgrad": CONTRIB.madgrad(0.1),
    "mechanize": CONTRIB.mechanize(optax.adam(0.1)),
    "momo_adam": CONTRIB.momo_adam(0.1),
    "prodigy": CONTRIB.prodigy(0.1),
    "schedule_free": CONTRIB.schedule_free_adamw(0.1),
    "sophia": CONTRIB.sophia(0.1),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_noise(0.1, 0.5, key=0),
        CONTRIB.reduce_on_plateau(),
    ),
    "chain of chains": optax.chain(optax.chain(optax.ema(0.9), optax.trace(0.9)), optax.adam(0.1)),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=lambda count: 0.1),
    "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "sometimes": optax.conditionally_mask(optax.adam(0.1), lambda step: True),
}
OTHERS = {
    "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=1, momentum=0.9), {}),
    "mechanize adafactor": (CONTRIB.mechanize(optax.adafactor(0.1, min_dim_size_to_factor=1)), {}),
    "muon": (CONTRIB.muon(0.1), {}),
    "sm3": (optax.sm3(0.1), SM3),
    "masked": (optax.masked(optax.adam(0.1), is_matrix), {}),
    "masked prefix": (optax.masked(optax.adam(0.1), every_second), {}),
    "masked adafactor": (
        optax.masked(optax.adafactor(0.1, min_dim_size_to_factor=1), is_matrix),
        {},
    ),
    "partition": (
        optax.partition(
            {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1, momentum=0.9)}, rank_labels
        ),
        {},
    ),
    "injected partition": (
        optax.inject_hyperparams(
            lambda rate: optax.partition(
                {"matrix": CONTRIB.muon(rate), "vector": optax.lion(rate)}, rank_labels
            )
        )(0.1),
        {},
    ),
}
EVERY = {name: (tx, {}) for name, tx in ELEMENTWISE.items()} | OTHERS


@settings(max_examples=300)
@given(params=trees(), name=st.sampled_from(sorted(EVERY)))
def test_entries_of_any_tree(params, name):
    tx, rules = EVERY[name]
    check(tx, params, rules=rules)


@pytest.mark.parametrize("name", EVERY)
def test_entries_of_every_optimizer(name):
    """Names that repeat on a path, that begin with other names, and that are fields of a state."""
    tx, rules = EVERY[name]
    ranks = {
        "a": {"a": 2, "ab": 2, "mu": {"a": 3, "kernel": 2}},
        "mu": {"a": 2, "nu": [2, (1, 3)]},
        "nu": Pair(2, None),
        "count": {"mu": Module(2, 1)},
        "v_row": 2,
    }
    check(tx, of_unique_sizes(ranks), rules=rules)


@settings(max_examples=200)
@given(params=trees(), name=st.sampled_from(sorted(ELEMENTWISE)))
def test_as_optax_maps_parameters(params, name):
    """Scalars too: a number for each parameter belongs to it, and a count to none."""
    tx, leaves = ELEMENTWISE[name], jax.tree.leaves(params)
    assume(len(leaves) > 1)
    indices = jax.tree.unflatten(jax.tree.structure(params), range(len(leaves)))
    owners = optax.tree.map_params(
        tx,
        lambda _, i: i,
        jax.eval_shape(tx.init, params),
        indices,
        transform_non_params=lambda _: None,
    )
    _, found = find(tx, params)
    parameters = [slot and slot.parameter for slot in found]
    assert parameters == jax.tree.leaves(owners, is_leaf=lambda x: x is None)


@settings(max_examples=50)
@given(params=trees(min_rank=1))
def test_the_memory_of_lbfgs(params):
    check(optax.scale_by_lbfgs(memory_size=2), params, rules=LBFGS)


@settings(max_examples=100)
@given(params=trees(), name=st.sampled_from(sorted(EVERY)))
def test_a_part_of_a_model(params, name):
    tx, rules = EVERY[name]
    check(tx, params, rules=rules, root="model/mu")


@settings(max_examples=200)
@given(
    params=trees(min_rank=1),
    name=st.sampled_from(sorted({*ELEMENTWISE, "adafactor", "muon", "masked"})),
    data=st.data(),
)
def test_parameters_without_updates(params, name, data):
    """Their entries belong to nothing, and those of the others are found without them."""
    leaves, treedef = jax.tree.flatten(params)
    given = data.draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)))
    assume(any(given))
    updates = [x if is_given else None for x, is_given in zip(leaves, given, strict=True)]
    tx, rules = EVERY[name]
    check(tx, params, jax.tree.unflatten(treedef, updates), rules)


@pytest.mark.parametrize("name", ["adam", "adafactor", "masked prefix", "chain", "sm3"])
def test_parameters_that_the_updates_leave_out(name):
    """A state may be older than the choice of the parameters to train."""
    params = of_unique_sizes({"a": {"a": 2, "b": 2}, "b": {"a": 2}, "mu": 2})
    tx, rules = EVERY[name]
    check(tx, params, {"a": {"b": params["a"]["b"]}, "mu": params["mu"]}, rules)


@pytest.mark.parametrize("name", ["adam", "adafactor", "masked", "chain", "injected"])
@pytest.mark.parametrize("keys", ["", "kernel", "mu", "mu/mu", "count", "scale", "params/kernel"])
def test_a_single_parameter(name, keys):
    params = array(11, 12)
    for key in reversed(keys.split("/") if keys else []):
        params = {key: params}
    tx, rules = EVERY[name]
    check(tx, params, rules=rules)


def test_scalars_that_all_share():
    """A count or a learning rate called like the only parameter stays out of it."""
    for name in ("count", "learning_rate"):
        assert by_path(ELEMENTWISE["injected"], {name: array(11)}).keys() == {
            f"inner_state/0/mu/{name}",
            f"inner_state/0/nu/{name}",
        }
    assert by_path(optax.scale_by_schedule(lambda count: 1.0), array()) == {}


def test_modules_of_nnx():
    model = nnx.state(nnx.Linear(11, 12, rngs=nnx.Rngs(0)), nnx.Param)
    found = by_path(optax.adam(0.1), model)
    bias, kernel = (0, (0,)), (1, (0, 1))
    assert sorted(found.values()) == [bias, bias, kernel, kernel]


# States that optax does not have.


class Stats(NamedTuple):
    stats: object


class Moments(NamedTuple):
    m: object
    v: object


def keeps(per_parameter):
    """An optimizer whose state has something in place of each parameter."""

    def init(params):
        return Stats(jax.tree.map(per_parameter, params))

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


BELOW = {
    "list": lambda p: [p, p],
    "dictionary": lambda p: {"m": p, "v": p},
    "named": lambda p: Moments(p, p),
}


@settings(max_examples=100)
@given(params=trees(), name=st.sampled_from(sorted(BELOW)))
def test_several_entries_for_each_parameter(params, name):
    check(keeps(BELOW[name]), params)


@pytest.mark.parametrize(
    "params",
    [
        {"m": array(11, 12), "v": array(13, 14)},
        [array(11, 12), array(13, 14)],
        Moments(array(11, 12), array(13, 14)),
    ],
    ids=["dictionary", "list", "named"],
)
@pytest.mark.parametrize("name", BELOW)
def test_entries_called_like_parameters(params, name):
    check(keeps(BELOW[name]), params)


def test_a_state_that_is_built_like_the_parameters():
    tx = optax.GradientTransformation(lambda params: params, None)
    params = {"a": array(11, 12), "b": [array(13), array(14)]}
    check(tx, params)
    check(optax.chain(tx, tx), params)


def test_integers_of_the_shape_of_a_parameter_belong_to_it():
    tx = keeps(lambda p: jnp.zeros(p.shape, jnp.int8))
    assert by_path(tx, {"a": array(11, 12)}) == {"stats/a": (0, (0, 1))}


def test_what_is_no_array_belongs_to_nothing():
    state = Stats({"a": array(11, 12), "b": "text", "c": 1.0})
    updates = {"a": array(11, 12)}
    assert slots.find((state, updates), layout_of(updates), (), "freeze_dropped") == (
        slots.Slot(0, (0, 1)),
        None,
        None,
    )


# Rules.


def sums(params):
    return {"rows": array(11), "columns": array(12)}


def given_axes(axes):
    return {Stats: lambda field, shape, entry_shape: axes}


def rows(p):
    return jnp.zeros(p.shape[:-1])


def test_a_rule_says_which_axes_an_entry_has():
    params = {"a": array(11, 12), "b": array(13, 14, 15)}
    calls = []

    def rule(field, shape, entry_shape):
        calls.append((field, shape, entry_shape))
        return range(len(entry_shape))

    found = by_path(keeps(rows), params, rules={Stats: rule})
    assert found == {"stats/a": (0, (0,)), "stats/b": (1, (0, 1))}
    assert calls == [("stats", (11, 12), (11,)), ("stats", (13, 14, 15), (13, 14))]


@pytest.mark.parametrize(
    ("axes", "expected"), [((-2,), (0,)), ((None,), (None,)), (None, None)], ids=str
)
def test_axes_that_a_rule_may_return(axes, expected):
    found = by_path(keeps(rows), {"a": array(11, 12)}, rules=given_axes(axes))
    assert found == ({} if expected is None else {"stats/a": (0, expected)})


def test_a_rule_may_pass():
    tx = keeps(lambda p: p)
    assert by_path(tx, {"a": array(11)}, rules=given_axes(NotImplemented)) == {"stats/a": (0, (0,))}


def test_the_innermost_rule_applies():
    inner, params = optax.adafactor(0.1, min_dim_size_to_factor=1), {"a": array(11, 12)}
    outer = optax.GradientTransformation(lambda params: Stats(inner.init(params)), None)
    found = by_path(outer, params, rules=given_axes(None))
    assert found == {f"stats/0/v_{field}/a": (0, (i,)) for i, field in enumerate(["row", "col"])}


@pytest.mark.parametrize("shape", [(11, 12), (12, 11), (11, 11), (3, 12, 11), (12, 3, 11)])
def test_rows_and_columns_of_adafactor(shape):
    """Those of a square kernel have the same shape; the field says which is which."""
    found = by_path(optax.adafactor(0.1, min_dim_size_to_factor=4), {"a": array(*shape)})
    large = sorted(range(len(shape)), key=shape.__getitem__)

    def rest(axis):
        return tuple(i for i in range(len(shape)) if i != axis)

    assert found == {"0/v_row/a": (0, rest(large[-1])), "0/v_col/a": (0, rest(large[-2]))}


def test_parameters_without_channels_need_no_rule():
    """They are frozen or not as a whole, whatever the shape of their entries."""
    params = {"a": array(11, 12), "b": array(13, 14)}

    def rule(path, leaf):
        return cdb_jax.Axes(()) if path == "a" else None

    assert by_path(keeps(rows), params, channel_axes=rule) == {
        "stats/a": (0, (None,)),
        "stats/b": (1, (None,)),
    }


# Errors.

MATRIX = {"kernel": array(11, 12)}


@pytest.mark.bad_input
@pytest.mark.parametrize("axes", [(1,), (0, 1), (7,), (0, 0), "rows", (0.5,), 3], ids=str)
def test_axes_that_do_not_fit(axes):
    message = r"slot_axes.*Stats.*'stats/kernel' of shape \(11,\).*'kernel' of shape \(11, 12\)"
    with pytest.raises(ValueError, match=message):
        find(keeps(rows), MATRIX, rules=given_axes(axes))


@pytest.mark.bad_input
@pytest.mark.parametrize("slot_axes", [{"Stats": sm3_axes}, {Stats: 1}, {Stats(0): sm3_axes}])
def test_rules_are_functions_for_classes(slot_axes):
    with pytest.raises(TypeError, match="slot_axes.*(Stats.*1|Stats.*sm3_axes).*slot_axes={"):
        slots.checked_rules(slot_axes)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (keeps(rows), r"'stats/kernel' .* shape \(11,\).*'kernel' of shape.*slot_axes={Stats: "),
        (optax.sm3(0.1), r"'0/mu/kernel/0' .* shape \(11,\).*slot_axes={ScaleBySM3State: "),
        (optax.scale_by_lbfgs(), "'diff_params_memory/kernel' .* shape.*slot_axes={ScaleByLBFGS"),
        (
            optax.GradientTransformation(lambda params: Stats(jnp.zeros(7)), None),
            r"'stats' .* shape \(7,\).*no parameter.*slot_axes={Stats: ",
        ),
        (
            optax.GradientTransformation(lambda p: Moments(jnp.zeros(7), Stats(p)), None),
            r"'m' .* shape \(7,\).*Moments.*around freeze_dropped",
        ),
    ],
    ids=["axes", "sm3", "lbfgs", "alone", "wrapper"],
)
def test_entries_that_nothing_assigns(tx, message):
    with pytest.raises(ValueError, match=message):
        find(tx, MATRIX)


@pytest.mark.bad_input
def test_adafactor_of_other_parameters():
    state = jax.eval_shape(optax.adafactor(0.1, min_dim_size_to_factor=1).init, MATRIX)
    updates = {"other": array(11, 12)}
    with pytest.raises(ValueError, match=r"'0/v_row/kernel' .* shape \(11,\).*no parameter"):
        slots.find((state, updates), layout_of(updates), slots.checked_rules({}), "freeze_dropped")


ADAM = optax.adam(0.1)
REFUSED = {
    "MultiSteps": (optax.MultiSteps(ADAM, 2), r"optax.MultiSteps\(cdb_jax.freeze_dropped"),
    "ApplyEvery": (optax.apply_every(2), r"optax.MultiSteps\(cdb_jax.freeze_dropped"),
    "SAM": (CONTRIB.sam(ADAM, ADAM), r"optax.contrib.sam\(cdb_jax.freeze_dropped"),
    "Lookahead": (optax.lookahead(ADAM, 5, 0.5), r"optax.lookahead\(cdb_jax.freeze_dropped"),
    "GaLore": (CONTRIB.galore(0.1, rank=2), "optax.chain.*channel_drop_back.*galore"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "wrapped"])
def test_states_that_cannot_be_inside(name, wrapped):
    tx, message = REFUSED[name]
    if wrapped:
        inner = optax.GradientTransformation(tx.init, tx.update)
        tx = optax.chain(optax.clip(1.0), optax.masked(inner, True))
    params = MATRIX
    if name == "Lookahead":
        params = optax.LookaheadParams(MATRIX, MATRIX)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        find(tx, params)


def test_a_transparent_sharpness_aware_state_can_be_inside():
    tx = CONTRIB.sam(ADAM, ADAM, opaque_mode=True)
    found = by_path(tx, MATRIX)
    assert set(found.values()) == {(0, (0, 1))}
