"""Which parameter an entry of an optimizer state belongs to: found from structures alone.

Every parameter has a shape of its own, so an entry with the shape of a parameter can belong to no
other. Nothing is computed: `jax.eval_shape` gives the states.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import optax
import pytest

from cdb_jax import _optax_states as slots, channels

# Names that are prefixes of others, occur twice on a path, or are fields of optax states.
NAMES = st.sampled_from(["a", "b", "ab", "mu", "nu", "kernel", "0", "trace", "inner_state"])


def trees():
    leaf = st.just(None)
    return st.recursive(
        st.dictionaries(NAMES, leaf, min_size=1, max_size=3),
        lambda inner: st.one_of(
            st.dictionaries(NAMES, inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=2),
            st.tuples(inner, inner),
        ),
        max_leaves=5,
    )


def parameters(tree):
    """The tree with arrays of different shapes in place of None."""
    count = iter(range(100))

    def new(_):
        i = next(count)
        return jax.ShapeDtypeStruct((2 + i, 60 + i), jnp.float32)

    return jax.tree.map(new, tree, is_leaf=lambda x: x is None)


def layout_of(params, root=""):
    return channels.resolve(params, -1, root=root)


def entries_of(state):
    return jax.tree.leaves(state, is_leaf=lambda x: x is None)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "adagrad": optax.adagrad(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lamb": optax.lamb(0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "yogi": optax.yogi(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9), optax.adam(0.1)),
    "schedule": optax.adam(optax.linear_schedule(0.1, 0.0, 10)),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(0.1),
    "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "mechanic": optax.contrib.mechanize(optax.adam(0.1)),
    "prodigy": optax.contrib.prodigy(0.1),
}


def check(state, params, found):
    """Entries with the shape of a parameter belong to it; all others are shared."""
    position = {x.shape: i for i, x in enumerate(jax.tree.leaves(params))}
    for entry, slot in zip(entries_of(state), found, strict=True):
        if entry is None or entry.shape not in position:
            assert slot is None, (entry, slot)
        else:
            assert slot == slots.Slot(position[entry.shape], (0, 1)), (entry, slot)


@pytest.mark.parametrize("name", OPTIMIZERS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(tree=trees(), root=st.sampled_from(["", "model/stage"]))
def test_entries_of_any_tree(name, tree, root):
    params = parameters(tree)
    state = jax.eval_shape(OPTIMIZERS[name].init, params)
    found = slots.find(state, layout_of(params, root), root, slots.RULES)
    check(state, params, found)
    if name != "sgd":
        assert any(found)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(tree=trees(), data=st.data())
def test_masked_parameters_have_no_entry(tree, data):
    params = parameters(tree)
    mask = jax.tree.map(lambda _: data.draw(st.booleans()), params)
    tx = optax.masked(optax.adam(0.1), mask)
    state = jax.eval_shape(tx.init, params)
    check(state, params, slots.find(state, layout_of(params), "", slots.RULES))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(tree=trees(), data=st.data())
def test_optimizers_of_parts(tree, data):
    params = parameters(tree)
    labels = jax.tree.map(lambda _: data.draw(st.sampled_from(["x", "y"])), params)
    tx = optax.partition({"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}, labels)
    state = jax.eval_shape(tx.init, params)
    check(state, params, slots.find(state, layout_of(params), "", slots.RULES))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(tree=trees(), data=st.data())
def test_parameters_without_a_gradient(tree, data):
    """The state knows all parameters; the updates have None for some."""
    params = parameters(tree)
    leaves, treedef = jax.tree.flatten(params)
    kept = [data.draw(st.booleans()) for _ in leaves[1:]] + [True]
    updates = [x if is_kept else None for x, is_kept in zip(leaves, kept, strict=True)]
    updates = jax.tree.unflatten(treedef, updates)
    state = jax.eval_shape(optax.adam(0.1).init, params)
    found = slots.find(state, layout_of(updates), "", slots.RULES)
    check(state, updates, found)


SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(shapes=st.lists(SHAPES, min_size=1, max_size=4), least=st.sampled_from([1, 3]))
def test_averages_of_adafactor(shapes, least):
    """An average over one axis has all other axes, in their order."""
    shapes = [*shapes, (4, 6)]
    params = {f"x{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=least)
    state = jax.eval_shape(tx.init, params)
    found = slots.find(state, layout_of(params), "", slots.RULES)
    by_field = jax.tree.unflatten(jax.tree.structure(state), found)
    for i, shape in enumerate(shapes):
        name, whole = f"x{i}", tuple(range(len(shape)))
        row, column, full = (by_field._asdict()[f][name] for f in ("v_row", "v_col", "v"))
        factors = state.v_row[name].shape != (1,) or shape == (1,)
        if state.v[name].shape == shape:
            assert full == slots.Slot(i, whole) or shape == ()
        if row is not None and factors and len(shape) > 1:
            assert [shape[axis] for axis in row.axes] == list(state.v_row[name].shape)
            assert [shape[axis] for axis in column.axes] == list(state.v_col[name].shape)
            (averaged,) = set(whole) - set(row.axes)
            assert shape[averaged] == max(shape)


def test_several_entries_for_each_parameter():
    """In a list at the path of the parameter, as Sm3 keeps one for each axis."""
    params = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    state = {"memory": {"a": [params["a"], params["a"]]}}
    found = slots.find(state, layout_of(params), "", {})
    assert found == (slots.Slot(0, (0, 1)),) * 2


def test_a_number_for_each_parameter():
    params = parameters({"a": None, "b": None})
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    state = {"norms": {"a": scalar, "b": scalar}, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    found = slots.find(state, layout_of(params), "", {})
    assert found == (None, slots.Slot(0, ()), slots.Slot(1, ()))


def test_a_tree_that_is_one_array():
    params = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    state = jax.eval_shape(optax.adam(0.1).init, params)
    check(state, params, slots.find(state, layout_of(params), "", slots.RULES))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"memory": {"a": jax.ShapeDtypeStruct((3, 5, 2), jnp.float32)}}, "memory/a.*slot_axes"),
        ({"basis": jax.ShapeDtypeStruct((7,), jnp.float32)}, "basis.*slot_axes"),
    ],
)
def test_entries_that_nothing_assigns(state, words):
    params = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    with pytest.raises(ValueError, match=words):
        slots.find(state, layout_of(params), "", {})
