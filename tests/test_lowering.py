"""Every public function runs under strict checks, and lowers for TPU and CUDA without either."""

import drawn
import jax
import jax.numpy as jnp
import optax
import pytest

import cdb_jax

PARAMS = {
    "dense": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)},
    "conv": {"kernel": jnp.ones((3, 3, 4, 8))},
}
X, IMAGES, KEY, COUNT = jnp.ones((8, 16)), jnp.ones((2, 6, 6, 4)), jax.random.key(0), jnp.int32(0)


def loss(params, x, images):
    y = jax.lax.conv_general_dilated(
        images, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    z = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    return jnp.mean(jnp.sin(y)) + jnp.mean(jnp.sin(z))


POLICIES = {
    "bernoulli": cdb_jax.Policy(0.5, key=0),
    "exact": cdb_jax.Policy(0.5, key=0, channel_choice="exact", rescale="expected"),
    "window": cdb_jax.Policy(0.5, key=0, channel_choice="window", layer_rate=0.5),
    "chunk": cdb_jax.Policy(0.5, key=0, channel_choice="chunk"),
    "input": cdb_jax.Policy(
        0.5, key=0, channel_choice="window", channel_axes=cdb_jax.input_channels
    ),
    "layers": cdb_jax.Policy(1.0, key=0, layer_rate=0.5),
    "one": cdb_jax.presets.algorithm_1(0.5, key=0, other_layers="frozen", channel_choice="window"),
    "layer_drop_back": cdb_jax.presets.layer_drop_back(
        key=0, exempt=("dense/bias",), steps_per_epoch=1
    ),
}


def update(tx):
    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step, (PARAMS, PARAMS)


PROGRAMS = {
    "backdrop": (
        jax.grad(lambda x: jnp.sum(cdb_jax.backdrop(x, 0.5, axes=0, key=KEY) ** 2)),
        (X,),
    ),
    "drop_path": (lambda x: cdb_jax.drop_path(x, 0.5, key=KEY), (X,)),
    "drop_branch": (
        jax.grad(lambda x: jnp.sum(cdb_jax.drop_branch(jnp.sin, x, rate=0.5, key=KEY))),
        (X,),
    ),
    "drop_path_subset": (
        jax.grad(lambda x: jnp.sum(cdb_jax.drop_path_subset(jnp.sin, x, rate=0.5, key=KEY))),
        (X,),
    ),
    "drop_backward": (
        jax.grad(
            lambda params, x, images: cdb_jax.drop_backward(
                loss, params, x, images, rate=0.5, key=KEY
            )
        ),
        (PARAMS, X, IMAGES),
    ),
    "dropped_fraction": (
        lambda params, count: POLICIES["exact"].select(params, count).dropped_fraction,
        (PARAMS, COUNT),
    ),
}
for _name, _policy in POLICIES.items():
    PROGRAMS[f"channel_drop_back, {_name}"] = update(cdb_jax.channel_drop_back(_policy))
    frozen = cdb_jax.freeze_dropped(optax.sgd(0.1, momentum=0.9), _policy)
    PROGRAMS[f"freeze_dropped, {_name}"] = update(frozen)
    if _name != "bernoulli":
        _skip = drawn.value_and_grad(loss, _policy)
        PROGRAMS[f"value_and_grad, {_name}"] = (
            lambda params, x, images, count, skip=_skip: skip(params, x, images, step=count),
            (PARAMS, X, IMAGES, COUNT),
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_nans_inside_and_no_leaks(name):
    f, args = PROGRAMS[name]
    with jax.debug_nans(True), jax.checking_leaks():
        results = jax.jit(f)(*args)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(results))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_lowers(name, platform):
    f, args = PROGRAMS[name]
    exported = jax.export.export(jax.jit(f), platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    assert [x.shape for x in exported.out_avals] == [
        x.shape for x in jax.tree.leaves(jax.eval_shape(f, *args))
    ]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_loops(name, platform):
    """A loop is hundreds of launches on a GPU, and no graph of them can hold it."""
    f, args = PROGRAMS[name]
    program = jax.export.export(jax.jit(f), platforms=[platform])(*args).mlir_module()
    # A cumulative sum comes with a loop for compilers that have no scan of their own.
    functions = [x for x in program.split("func.func") if "@chlo.scan.impl" not in x[:80]]
    assert not [x for x in functions if "stablehlo.while" in x]


@pytest.mark.parametrize("name", ["whole", "one"])
def test_every_layer_reads_the_draw_and_none_repeats_it(name):
    """The CPU compiler would fuse the draw into whatever reads it, all of it for every layer."""
    policy = {
        "whole": cdb_jax.Policy(1.0, key=0, layer_rate=0.5),
        "one": cdb_jax.Policy(0.0, key=0, layer_choice="exact", other_layers="frozen"),
    }[name]

    def deep_loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return jnp.mean(x**2)

    def num_slices(depth):
        params = {str(i): {"kernel": jnp.ones((8, 8))} for i in range(depth)}
        gradient = jax.jit(drawn.grad(deep_loss, policy))
        program = gradient.lower(params, jnp.ones((4, 8)), step=jnp.int32(0)).compile()
        return program.as_text().count(" slice(")

    assert num_slices(16) < 2 * num_slices(4)
