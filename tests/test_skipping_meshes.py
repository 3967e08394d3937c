"""Skipping on meshes of eight devices: same gradients, and the kept part alone on the wire."""

import operator

import chex
import drawn
import jax
import jax.numpy as jnp
import pytest
from device_meshes import BATCH, MESHES, collectives, loss, mesh, params, placed
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, reshard

import cdb_jax


def window(rate=0.5, **settings):
    return cdb_jax.Policy(rate, key=0, channel_choice="window", **settings)


@pytest.mark.parametrize("layer_rate, groups", [(1.0, 1), (0.5, 8)])
@pytest.mark.parametrize("name", MESHES)
def test_same_gradients_as_one_device(name, layer_rate, groups):
    policy = window(layer_rate=layer_rate, window_groups=groups)
    f = jax.jit(drawn.value_and_grad(loss, policy))
    tree, batch = placed(name)
    for count in range(2):
        alone = f(params(), BATCH, step=count)
        chex.assert_trees_all_close(f(tree, batch, step=count), alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("axes", [cdb_jax.output_channels, cdb_jax.input_channels])
@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_all_reduce_carries_the_kept_part(rate, axes):
    tree, batch = placed("data-parallel")
    full = collectives(jax.grad(loss), tree, batch)
    skip = collectives(
        drawn.grad(loss, window(rate, channel_axes=axes)), tree, batch, step=jnp.int32(0)
    )
    assert set(skip) == set(full) == {"all-reduce"}
    assert skip["all-reduce"][0] <= full["all-reduce"][0]
    assert skip["all-reduce"][1] <= (1 - rate) * full["all-reduce"][1] + 64


def test_windows_in_groups_fit_sharded_channels():
    """A window that runs over the shards gathers the cotangent; one in each shard does not."""
    for name in ("fsdp over channels", "tensor-parallel"):
        tree, batch = placed(name)
        gathered = {}
        for groups in (1, 8):
            policy = window(window_groups=groups)
            skip = collectives(drawn.grad(loss, policy), tree, batch, step=jnp.int32(0))
            gathered[groups] = sum(x[1] for x in skip.values())
            report = str(cdb_jax.channel_report(tree, policy, loss, batch))
            assert ("with an all-gather: the channels are sharded 8 ways" in report) == (
                groups == 1
            )
        assert gathered[8] < 0.5 * gathered[1], (name, gathered)


def test_constrained_weights():
    """A weight that is gathered where it is used: its gradient is reduced in part too."""
    grid, _, _ = MESHES["fsdp"]
    tree, batch = placed("fsdp")

    def gathering(params, x):
        return loss(jax.lax.with_sharding_constraint(params, NamedSharding(grid, P())), x)

    policy = window()
    full = collectives(jax.grad(gathering), tree, batch)
    skip = collectives(drawn.grad(gathering, policy), tree, batch, step=jnp.int32(0))
    assert skip["all-reduce"][1] <= 0.5 * full["all-reduce"][1] + 64
    alone = drawn.grad(loss, policy)(params(), BATCH, step=0)
    step = jax.jit(drawn.grad(gathering, policy))
    chex.assert_trees_all_close(step(tree, batch, step=0), alone, rtol=1e-5, atol=1e-7)


def test_explicit_sharding():
    grid = mesh((8,), ("data",), AxisType.Explicit)
    policy = window()
    with jax.set_mesh(grid):
        tree = jax.tree.map(lambda x: jax.device_put(x, P()), params())
        batch = jax.device_put(BATCH, P("data"))
        value, gradient = jax.jit(drawn.value_and_grad(loss, policy))(tree, batch, step=0)
    alone = jax.jit(drawn.value_and_grad(loss, policy))(params(), BATCH, step=0)
    chex.assert_trees_all_close((value, gradient), alone, rtol=1e-5, atol=1e-7)


def test_explicit_sharding_of_images():
    grid = mesh((8,), ("data",), AxisType.Explicit)
    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return jnp.mean(jnp.sin(y) ** 2)

    kernel = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 8))}
    images = jax.random.normal(jax.random.key(1), (16, 6, 6, 4))
    step = jax.jit(drawn.grad(conv, window()))
    with jax.set_mesh(grid):
        gradient = step(jax.device_put(kernel, P()), jax.device_put(images, P("data")), step=0)
    chex.assert_trees_all_close(gradient, step(kernel, images, step=0), rtol=1e-5, atol=1e-7)


def explicit_losses():
    """Parameters, batches and losses with explicit shardings, and the axis of the channels."""
    normal = jax.random.normal
    key = jax.random.key

    def tensor_parallel(params, x):
        up, down = (x["kernel"] for x in params.values())
        hidden = jnp.dot(x, reshard(up, P(None, "model")), out_sharding=P("data", "model"))
        down = reshard(down, P("model", None))
        return jnp.mean(jnp.dot(jnp.tanh(hidden), down, out_sharding=P("data", None)) ** 2)

    def heads(params, x):
        query, out = params["query"]["kernel"], params["out"]["kernel"]
        y = jnp.einsum("btd,dhk->bthk", x, query, out_sharding=P("data", None, "model", None))
        y = jnp.einsum("bthk,hkd->btd", jnp.tanh(y), out, out_sharding=P("data", None, None))
        return jnp.mean(y**2)

    def scanned(params, x):
        @jax.checkpoint
        def block(x, kernel):
            kernel = 0.5 * reshard(kernel, P(None, "model"))
            x = jnp.dot(x, kernel, out_sharding=P("data", "model"))
            return jnp.tanh(reshard(x, P("data", None))), None

        return jnp.mean(jax.lax.scan(block, x, params["layers"]["kernel"])[0] ** 2)

    def tree(specs, *shapes):
        return {
            name: {"kernel": (normal(key(i), shape), spec)}
            for i, ((name, spec), shape) in enumerate(zip(specs.items(), shapes, strict=True))
        }

    return {
        "tensor parallel": (
            tree({"dense0": P("data", "model"), "dense1": P("model", "data")}, (16, 32), (32, 16)),
            (normal(key(5), (8, 16)), P("data", None)),
            tensor_parallel,
            (-1, -2),
        ),
        "heads": (
            tree({"query": P(None, "model"), "out": P("model")}, (16, 4, 8), (4, 8, 16)),
            (normal(key(5), (8, 5, 16)), P("data")),
            heads,
            None,
        ),
        "scanned": (
            tree({"layers": P(None, "data", "model")}, (3, 16, 16)),
            (normal(key(5), (8, 16)), P("data", None)),
            scanned,
            (cdb_jax.Axes(2, stack=0), cdb_jax.Axes(1, stack=0)),
        ),
    }


EXPLICIT = {
    "window": {},
    "window in groups": {"window_groups": 4},
    "chunk in groups": {"window_groups": 4, "channel_choice": "chunk"},
    "exact": {"channel_choice": "exact"},
    "some layers": {"layer_rate": 0.5},
    "one": {"layer_choice": "exact", "other_layers": "frozen"},
}


@pytest.mark.parametrize("direction", [0, 1], ids=["output", "input"])
@pytest.mark.parametrize("settings", EXPLICIT.values(), ids=EXPLICIT)
@pytest.mark.parametrize("name", explicit_losses())
def test_explicitly_sharded_parameters(name, settings, direction):
    tree, batch, loss, axes = explicit_losses()[name]
    conventions = cdb_jax.output_channels, cdb_jax.input_channels
    settings = {"channel_axes": axes[direction] if axes else conventions[direction], **settings}
    policy = cdb_jax.Policy(0.5, key=0, **{"channel_choice": "window"} | settings)

    def step(tree, batch):
        selection = policy.select(tree, 1)
        gradient = cdb_jax.value_and_grad(loss)(tree, batch, selection=selection)
        return gradient, jax.value_and_grad(loss)(tree, batch), selection

    grid = mesh((2, 4), ("data", "model"), AxisType.Explicit)
    with jax.set_mesh(grid):
        placed = {
            layer: {name: jax.device_put(*x) for name, x in arrays.items()}
            for layer, arrays in tree.items()
        }
        batch = jax.device_put(*batch)
        (value, gradient), (full_value, full), selection = jax.jit(step)(placed, batch)
        expected = jax.jit(selection.mask)(full)
        report = cdb_jax.channel_report(placed, policy, loss, batch)
    assert all(row.gradient.startswith("skipped") for row in report.rows), str(report)
    assert jax.tree.map(jax.typeof, gradient) == jax.tree.map(jax.typeof, placed)
    chex.assert_trees_all_close(
        jax.device_get((value, gradient)),
        jax.device_get((full_value, expected)),
        rtol=1e-5,
        atol=1e-7,
    )


INSIDE = {
    "window": window(),
    "exact": cdb_jax.Policy(0.5, key=0, channel_choice="exact"),
    "layers": window(1.0, layer_rate=0.5),
    "one": cdb_jax.presets.algorithm_1(0.5, key=0, other_layers="frozen", channel_choice="window"),
}


@pytest.mark.parametrize("check", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", INSIDE)
def test_inside_shard_map_with_weights_of_each_device(name, check):
    grid, policy = mesh((8,), ("data",)), INSIDE[name]
    tree = jax.tree.map(lambda x: x[None] + 0.01 * jnp.arange(8.0)[:, None, None], params())

    def inside(tree, x):
        tree = jax.tree.map(lambda x: x[0], tree)
        value, gradient = drawn.value_and_grad(loss, policy)(tree, x, step=1)
        return value[None], jax.tree.map(lambda x: x[None], gradient)

    mapped = jax.shard_map(
        inside, mesh=grid, in_specs=P("data"), out_specs=P("data"), check_vma=check
    )
    values, gradients = jax.jit(mapped)(tree, BATCH)
    alone = jax.jit(drawn.value_and_grad(loss, policy))
    for i in range(8):
        of_device, own = jax.tree.map(operator.itemgetter(i), (tree, (values, gradients)))
        expected = alone(of_device, BATCH[4 * i : 4 * i + 4], step=1)
        chex.assert_trees_all_close(own, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", INSIDE)
def test_inside_shard_map_with_replicated_weights(name):
    """The sum over devices of a gradient, which JAX inserts, carries the kept part alone."""
    grid, policy = mesh((8,), ("data",)), INSIDE[name]

    def mapped(f):
        def inside(tree, x):
            return jax.tree.map(lambda x: x / 8, f(tree, x))

        return jax.shard_map(inside, mesh=grid, in_specs=(P(), P("data")), out_specs=P())

    skip = mapped(lambda tree, x: drawn.grad(loss, policy)(tree, x, step=1))
    expected = jax.jit(drawn.grad(loss, policy))(params(), BATCH, step=1)
    chex.assert_trees_all_close(jax.jit(skip)(params(), BATCH), expected, rtol=1e-5, atol=1e-7)
    if name == "window":
        tree, batch = placed("data-parallel")
        kept = collectives(skip, tree, batch)
        full = collectives(mapped(jax.grad(loss)), tree, batch)
        assert set(kept) == {"all-reduce"}
        assert kept["all-reduce"][1] <= 0.5 * full["all-reduce"][1] + 64


def test_with_shard_map_in_the_same_loss():
    """Products outside of a `shard_map` are skipped, weights inside of it masked."""
    grid = mesh((8,), ("data",))

    def inside(kernel, x):
        return jnp.sin(x @ kernel)

    def both(params, x):
        x = jax.shard_map(inside, mesh=grid, in_specs=(P(), P("data")), out_specs=P("data"))(
            params["dense0"]["kernel"], x
        )
        return jnp.mean((x @ params["dense1"]["kernel"]) ** 2)

    policy, tree = window(), params()
    tree.pop("dense2")
    skip = jax.jit(drawn.grad(both, policy))(tree, BATCH, step=1)
    full = jax.jit(jax.grad(both))(tree, BATCH)
    masked = policy.select(full, 1).mask(full)
    chex.assert_trees_all_close(skip, masked, rtol=1e-5, atol=1e-7)
    report = cdb_jax.channel_report(tree, policy, both, BATCH)
    assert [row.gradient for row in report.rows] == [
        "masked only: inside shard_map, which cannot be followed",
        "skipped",
    ]
