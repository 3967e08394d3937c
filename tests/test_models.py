"""The example models: their shapes, sizes, and behaviour in training and evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import NAMES, create
from models.branches import Branch
from models.resnet import BasicBlock

apply = nnx.jit(lambda model, images: model(images))


def small_model(name, **kwargs):
    return create(name, num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0), **kwargs)


@functools.cache
def built(name):
    @nnx.jit
    def build():
        model = small_model(name, dropout_rate=0.5)
        # Away from the initial zeros, which hide whatever lies before them.
        for _, param in nnx.iter_graph(model):
            if isinstance(param, nnx.Param):
                param[...] += 0.1 * jnp.sin(jnp.arange(param.size)).reshape(param.shape)
        return model

    return build()


@pytest.fixture(params=["resnet_small", "vit_mini/2"])
def model(request):
    return nnx.clone(built(request.param))


def num_params(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def small_images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 1))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 3_504_872),
        ("densenet121", 7_978_856),
        ("vit_ti/16", 5_717_416),
        ("vit_s/16", 22_050_664),
        ("vit_b/16", 86_567_656),
        ("vit_l/16", 304_326_632),
    ],
)
def test_parameter_count_is_the_published_one(name, count):
    model = nnx.eval_shape(
        lambda: create(name, num_classes=1000, image_shape=(224, 224, 3), rngs=nnx.Rngs(0))
    )
    assert num_params(model) == count


def test_small_models_are_small(model):
    assert num_params(model) < 100_000


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [
        ("resnet_small", (8, 8, 1)),
        ("resnet18", (32, 64, 3)),
        ("resnet50", (96, 80, 3)),
        ("mobilenet_v2", (32, 32, 3)),
        ("densenet121", (96, 80, 3)),
        ("vit_mini/2", (8, 8, 1)),
        ("vit_mini/8", (96, 80, 3)),
    ],
)
def test_logits_have_one_row_for_each_image(name, image_shape):
    def logits():
        model = create(name, num_classes=7, image_shape=image_shape, rngs=nnx.Rngs(0))
        return model(jnp.zeros((2, *image_shape)))

    out = nnx.eval_shape(logits)
    assert (out.shape, out.dtype) == ((2, 7), jnp.float32)


def test_stem_follows_the_image_size():
    def stem(side):
        model = nnx.eval_shape(
            lambda: create(
                "resnet18", num_classes=10, image_shape=(side, side, 3), rngs=nnx.Rngs(0)
            )
        )
        return model.stem.conv.kernel.shape

    assert stem(32) == (3, 3, 3, 64)
    assert stem(224) == (7, 7, 3, 64)


@pytest.mark.parametrize("name", ["resnet_small", "vit_mini/2"])
def test_bfloat16_is_for_the_computation_only(name):
    def run():
        model = small_model(name, dtype=jnp.bfloat16)
        features = []
        model.blocks.append(lambda x: features.append(x) or x)
        logits = model(small_images())
        return features[0], logits, nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)

    # Flax's own normalisation layers mix bfloat16 and float32.
    with jax.numpy_dtype_promotion("standard"):
        features, *rest = nnx.eval_shape(run)
    assert features.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(rest)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("model", ["resnet_small"], indirect=True)
def test_batch_statistics_move_in_training_only(model):
    def statistics():
        return jax.tree.leaves(nnx.state(model, nnx.BatchStat))

    before = statistics()
    model.eval()
    apply(model, small_images())
    assert all(np.array_equal(a, b) for a, b in zip(statistics(), before, strict=True))
    model.train()
    apply(model, small_images())
    assert not any(np.array_equal(a, b) for a, b in zip(statistics(), before, strict=True))


def test_dropout_acts_in_training_only(model):
    images = small_images()
    assert not np.array_equal(apply(model, images), apply(model, images))
    model.eval()
    np.testing.assert_array_equal(apply(model, images), apply(model, images))


def test_an_image_is_judged_on_its_own_in_evaluation(model):
    images = small_images()
    others = images.at[1:].multiply(-2.0)
    model.eval()
    np.testing.assert_array_equal(apply(model, images)[0], apply(model, others)[0])
    assert not np.array_equal(apply(model, images)[1], apply(model, others)[1])


def test_a_gradient_reaches_every_parameter(model):
    grad = nnx.jit(nnx.grad(lambda model, images: jnp.square(model(images)).mean()))
    grads = nnx.to_pure_dict(grad(model, small_images()))
    unused = [jax.tree_util.keystr(k) for k, g in jax.tree.leaves_with_path(grads) if not g.any()]
    assert unused == []


def test_new_blocks_of_a_resnet_pass_their_input_on():
    block = BasicBlock(4, 4, 1, drop_path=Branch(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.abs(jax.random.normal(jax.random.key(1), (2, 3, 3, 4)))
    np.testing.assert_array_equal(block(x), x)


@pytest.mark.parametrize(
    "name", ["resnet", "resnet18/2", "vit_b", "vit_b/", "vit_b/0", "vit_b/x", "vit_x/16", ""]
)
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; choose one of {NAMES[0]}, "):
        small_model(name)


def test_a_dot_in_place_of_the_colon_is_noticed():
    with pytest.raises(ValueError, match="or my_package.my_module:Network for a network of your"):
        small_model("my_package.my_module.Network")


def test_patch_size_must_divide_the_image():
    with pytest.raises(ValueError, match="patch_size=3 does not divide images of 8x8"):
        small_model("vit_mini/3")
