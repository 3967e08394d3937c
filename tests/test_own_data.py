"""Networks and images of users: by import path, from folders, from original files."""

import gzip
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
import tyro
from flax import linen, nnx
from public_weights import random_arrays, resnet_shapes, write

import data
import idx
import image_folder
import locations
import models
import models.resnet
import recipes
import train
from errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")
NETWORK = """
from flax import nnx

class Tiny(nnx.Module):
    def __init__(self, num_classes, image_shape, rngs):
        height, width, channels = image_shape
        self.w = nnx.Param(rngs.params.normal((height * width * channels, 24)) * 0.1)
        self.out = nnx.Linear(24, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(images.reshape(len(images), -1) @ self.w))

def nothing(num_classes):
    return num_classes
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A module of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "my_network.py").write_text(NETWORK)


def test_a_network_by_its_import_path(network, tmp_path, data_dir, capsys):
    settings = dict(batch_size=160, epochs=2, data_dir=data_dir, exempt=("out",))
    rows = train.train(
        train.Config(model="my_network:Tiny", run_dir=tmp_path / "run", rate=0.5, **settings)
    )
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[0]["dropped_fraction"] > 0.3
    assert "w           64x24" in capsys.readouterr().out  # No name says so: it was inferred.


class Told(nnx.Module):
    """Its call is told whether it trains, and does not by default."""

    def __init__(self, num_classes, image_shape, rngs):
        self.norm = nnx.BatchNorm(image_shape[-1], use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(image_shape[-1], num_classes, rngs=rngs)

    def __call__(self, images, training=False):
        return self.out(self.norm(images, use_running_average=not training).mean((1, 2)))


def test_an_nnx_network_that_is_told_whether_it_trains():
    settings = dict(num_classes=3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    model = models.create("test_own_data:Told", **settings)
    images = 5 + jax.random.normal(jax.random.key(2), (16, 8, 8, 1))
    model(images)
    mean = model.network.norm.mean[...]
    assert mean > 0.01
    model.eval()
    np.testing.assert_array_equal(model(images), model.network(images))
    np.testing.assert_array_equal(model.network.norm.mean[...], mean)


def test_modules_of_the_user_come_before_those_of_the_examples(tmp_path, monkeypatch):
    """Whose names are common: here `models` and `config`."""
    (tmp_path / "config.py").write_text("WIDTH = 5")
    (tmp_path / "models.py").write_text(
        "import config\nfrom flax import nnx\n"
        "def net(num_classes, rngs): return nnx.Linear(config.WIDTH, num_classes, rngs=rngs)"
    )
    monkeypatch.chdir(tmp_path)
    settings = dict(num_classes=3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    model = models.create("models:net", **settings)
    assert model.kernel.shape == (5, 3)
    assert sys.modules["models"] is models and sys.modules["config"].Config is train.Config


class Linen(linen.Module):
    num_classes: int

    @linen.compact
    def __call__(self, images, train=True):
        x = linen.Conv(8, (3, 3))(images)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = linen.Dropout(0.5, deterministic=not train)(linen.relu(x).mean((1, 2)))
        return linen.Dense(self.num_classes, name="head")(x)


def test_a_linen_network_computes_and_keeps_what_it_does_alone():
    settings = dict(num_classes=3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0, dropout=1))
    model = models.create("test_own_data:Linen", **settings)
    images = jax.random.normal(jax.random.key(2), (16, 8, 8, 1))
    variables = nnx.to_pure_dict(nnx.state(model.network, (nnx.Param, nnx.BatchStat)))
    first = nnx.state(model.network, nnx.BatchStat)
    params = {"Conv_0": variables["Conv_0"], "head": variables["head"]}
    norm = variables["BatchNorm_0"]
    params["BatchNorm_0"] = {name: norm[name] for name in ("scale", "bias")}
    stats = {"BatchNorm_0": {name: norm[name] for name in ("mean", "var")}}

    def alone(stats, train, **rngs):
        variables = {"params": params, "batch_stats": stats}
        return Linen(3).apply(variables, images, train, mutable=["batch_stats"], **rngs)

    found = [model(images) for _ in range(2)]
    assert not np.array_equal(*found)  # Other units are zeroed.
    for _ in range(2):
        stats = alone(stats, True, rngs={"dropout": jax.random.key(0)})[1]["batch_stats"]
    kept = nnx.to_pure_dict(nnx.state(model.network, nnx.BatchStat))
    chex.assert_trees_all_close(kept, stats, rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, nnx.state(model.network, nnx.BatchStat))
    model.eval()
    for _ in range(2):
        np.testing.assert_allclose(model(images), alone(stats, False)[0], rtol=1e-5)


class Averages(linen.Module):
    num_classes: int

    @linen.compact
    def __call__(self, images, use_running_average):
        x = linen.BatchNorm(use_running_average=use_running_average)(images)
        return linen.Dense(self.num_classes)(x.mean((1, 2)))


class Sows(linen.Module):
    num_classes: int

    @linen.compact
    def __call__(self, images):
        self.sow("losses", "penalty", images.sum())
        return linen.Dense(self.num_classes)(images.mean((1, 2)))


class Few(linen.Module):
    @linen.compact
    def __call__(self, images):
        return linen.Dense(7)(images.mean((1, 2)))


class Pair(linen.Module):
    @linen.compact
    def __call__(self, images):
        x = linen.Dense(10)(images.mean((1, 2)))
        return x, x


class Crashes(linen.Module):
    @linen.compact
    def __call__(self, images):
        return linen.Dense(10)(images) @ jnp.ones(3)


class Needs(linen.Module):
    @linen.compact
    def __call__(self, images, tokens):
        return images


class Classes(linen.Module):
    classes: int
    width: int

    @linen.compact
    def __call__(self, images):
        return linen.Dense(self.classes)(images.mean((1, 2)))


class Dropout(linen.Module):
    num_classes: int
    dropout_rate: float

    @linen.compact
    def __call__(self, images):
        return linen.Dense(self.num_classes)(images.mean((1, 2)) * self.dropout_rate)


def test_a_network_that_requires_a_dropout_rate_gets_it():
    settings = dict(num_classes=3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    network = models.create("test_own_data:Dropout", **settings).network
    assert network.to_nnx__module.dropout_rate == 0.0


def test_a_linen_network_that_is_asked_for_running_averages():
    settings = dict(num_classes=3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    model = models.create("test_own_data:Averages", **settings)
    images = jax.random.normal(jax.random.key(2), (16, 8, 8, 1)) + 5
    trained = model(images)
    model.eval()
    assert jnp.abs(trained).max() < 1 < jnp.abs(model(images)).max()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sows", "Sows sows values into its state"),
        ("Needs", "Needs cannot be called with images"),
        (
            "Classes",
            "Classes takes `classes` and `width`, which the script does not pass; it",
        ),
        ("Few", r"Few returned shape \(2, 7\) for 2 images; return logits of shape \(2, 10\)"),
        ("Pair", "Pair returned a tuple for 2 images; return logits"),
        ("Averages", "--exempt is head by default, and .*Averages has no layer of that name"),
    ],
)
def test_linen_networks_that_cannot_be_trained(tmp_path, data_dir, name, message):
    config = train.Config(model=f"test_own_data:{name}", data_dir=data_dir, run_dir=tmp_path / "r")
    with pytest.raises(UserError, match=message):
        train.train(config)


def test_errors_of_a_network_keep_their_traceback(tmp_path, data_dir):
    config = train.Config(model="test_own_data:Crashes", data_dir=data_dir, run_dir=tmp_path / "r")
    with pytest.raises(RuntimeError, match="Crashes failed") as caught:
        train.train(config)
    assert isinstance(caught.value.__cause__, (TypeError, ValueError))


def test_a_linen_network_trains(tmp_path, data_dir):
    settings = dict(data_dir=data_dir, run_dir=tmp_path / "run")  # Its head is exempt by default.
    settings |= dict(batch_size=160, epochs=2, learning_rate=1e-2)
    rows = train.train(train.Config(model="test_own_data:Linen", **settings))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[0]["dropped_fraction"] > 0.2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:f", "no network at no_such_module:f: No module named"),
        ("my_network:Big", "no network at my_network:Big: module 'my_network' has no attribute"),
        ("my_network:nothing", "my_network:nothing returned int, not a Flax model"),
        ("my_network:NETWORK", "no network at"),
    ],
)
def test_a_network_that_is_none(network, tmp_path, data_dir, model, message):
    with pytest.raises(UserError, match=message):
        train.train(train.Config(model=model, data_dir=data_dir, run_dir=tmp_path / "run"))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("method", "message"),
    [("stochastic_depth", "has no residual branches"), ("released", "leaves out the first layers")],
)
def test_a_method_that_a_network_has_nothing_for(network, tmp_path, data_dir, method, message):
    settings = dict(model="my_network:Tiny", method=method, data_dir=data_dir)
    with pytest.raises(UserError, match=message):
        train.train(train.Config(**settings, run_dir=tmp_path / "run"))


def save(file, mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, (20, 16)).save(file)


@pytest.fixture
def photos(tmp_path):
    """Two classes with files of all kinds."""
    folder = tmp_path / "photos"
    for i in range(12):
        save(folder / "cat" / f"{i}.png", ("RGB", "L", "LA")[i % 3])
        save(folder / "dog" / f"{i}.jpg", ("CMYK", "L")[i % 2])
    (folder / "cat" / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_of_images(photos):
    dataset = data.load("digits", image_size=8, folder=photos)
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (22, 2, 2)
    assert sorted(record["label"] for record in dataset.test) == [0, 1]
    assert {record["image"].shape for record in dataset.train} == {(16, 20, 3)}
    batch = next(data.train_batches(dataset, 10, seed=0))
    assert batch["image"].shape == (10, 8, 8, 3) and set(batch["label"].tolist()) == {0, 1}


def pixel(file):
    """The first pixel of an image file, as it is trained on."""
    return image_folder.Images([(file, 0)])[0]["image"][0, 0].tolist()


WHITE = [255, 255, 255]
BITS_16 = np.full((4, 4), 0x7F80, np.uint16)
KINDS = {  # Mode, value, suffix, options of `save`: what is trained on.
    "CMYK, JPEG": (("CMYK", (245, 235, 225, 0), "jpg", {}), [10, 20, 30]),
    "CMYK, TIFF": (("CMYK", (245, 235, 225, 0), "tif", {}), [10, 20, 30]),
    "palette": (("P", 0, "png", {}), [200, 100, 50]),
    "palette, transparent": (("P", 0, "png", {"transparency": 0}), WHITE),
    "palette, GIF": (("P", 0, "gif", {"transparency": 0}), WHITE),
    "opaque": (("RGBA", (10, 20, 30, 255), "png", {}), [10, 20, 30]),
    "transparent": (("RGBA", (10, 20, 30, 0), "png", {}), WHITE),
    "half transparent": (("RGBA", (0, 100, 200, 51), "webp", {"lossless": True}), [204, 224, 244]),
    "grey, transparent": (("LA", (10, 0), "png", {}), WHITE),
    "grey, one transparent": (("L", 30, "png", {"transparency": 30}), WHITE),
    "one bit": (("1", 1, "png", {}), WHITE),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images(tmp_path, name):
    (mode, value, suffix, options), expected = KINDS[name]
    picture = PIL.Image.new(mode, (4, 4), value)
    if mode == "P":
        picture.putpalette([200, 100, 50, 1, 2, 3])
    picture.save(tmp_path / f"x.{suffix}", **options)
    assert pixel(tmp_path / f"x.{suffix}") == expected


def test_photos_are_turned_as_the_camera_was_held(tmp_path):
    file, exif = tmp_path / "photos/a/1.png", PIL.Image.Exif()
    file.parent.mkdir(parents=True)
    exif[0x0112] = 6  # The top of the scene is on the right.
    PIL.Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(file, exif=exif)
    image = image_folder.Images([(file, 0)])[0]["image"]
    np.testing.assert_array_equal(image[..., 0], [[3, 0], [4, 1], [5, 2]])


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_grey_images_of_16_bits(tmp_path, suffix):
    """Pillow itself would make white of all but the darkest."""
    file = tmp_path / f"x.{suffix}"
    if suffix == "ppm":
        file.write_bytes(b"P5 4 4 65535 " + BITS_16.astype(">u2").tobytes())
    else:
        PIL.Image.fromarray(BITS_16).save(file)
    assert pixel(file) == [127, 127, 127]


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_32_bits(tmp_path, dtype):
    PIL.Image.fromarray(np.full((4, 4), 200, dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="x.tif cannot be read: its values have 32 bits"):
        pixel(tmp_path / "x.tif")


def test_a_folder_with_splits(photos, tmp_path):
    (tmp_path / "both/val").mkdir(parents=True)
    photos.rename(tmp_path / "both/train")
    for name in ("cat", "dog"):
        for i in range(3):
            save(tmp_path / "both/val" / name / f"{i}.png")
    dataset = data.load("digits", folder=tmp_path / "both")
    assert (len(dataset.train), len(dataset.test)) == (24, 6)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("train", "dev")])
def test_splits_by_any_usual_name(photos, tmp_path, names):
    for name in names:
        shutil.copytree(photos, tmp_path / "both" / name)
    train, test, num_classes = image_folder.load(tmp_path / "both")
    assert len(train) == len(test) > 0 and num_classes == 2


@pytest.mark.bad_input
def test_a_split_of_another_name_is_not_left_out_silently(photos, tmp_path):
    for name in ("train", "fold2"):
        shutil.copytree(photos, tmp_path / "both" / name)
    with pytest.raises(
        UserError, match="fold2 has the same subfolders as train, but is not called"
    ):
        image_folder.load(tmp_path / "both")


@pytest.mark.bad_input
def test_folders_that_are_wrong(photos, tmp_path):
    dataset = data.load("digits", image_size=8, folder=photos)
    whole = (photos / "cat/3.png").read_bytes()
    contents = {
        b"GET / HTTP/1.1": ": cannot identify image file",
        b"\n<!DOCTYPE html>": ", as it holds a web page: cannot identify image file",
        whole[: len(whole) // 2]: ": ",
    }
    for content, reason in contents.items():
        (photos / "cat/3.png").write_bytes(content)
        with pytest.raises(
            UserError, match=f"cat/3.png cannot be read{reason}.*; replace it with a good"
        ):
            list(dataset.train)
    with pytest.raises(UserError, match="--data-folder .*nowhere is no folder"):
        data.load("digits", folder=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="must have a subfolder with images for each class"):
        data.load("digits", folder=tmp_path / "empty")
    (photos / "bird").mkdir()
    with pytest.raises(UserError, match="bird has no images"):
        data.load("digits", folder=photos)
    save(photos / "bird/0.png")
    with pytest.raises(UserError, match="photos/bird has one image; each class needs two"):
        data.load("digits", folder=photos)


def test_a_class_may_be_called_train(photos):
    (photos / "cat").rename(photos / "train")
    assert image_folder.load(photos)[2] == 2


def test_images_of_other_kinds_are_not_left_out_silently(photos):
    (photos / "dog/IMG_1.HEIC").write_bytes(b"")
    with pytest.raises(
        UserError, match="dog has images .*1, such as IMG_1.HEIC.*; convert them to JPEG"
    ):
        image_folder.load(photos)


def test_what_archives_of_a_mac_bring_along_is_skipped(photos):
    hidden = photos.rename(photos.with_name(".hidden"))  # Above the classes it does not matter.
    for name in ("__MACOSX", "cat/__MACOSX", "cat/.thumbnails", ".cache"):
        save(hidden / name / "1.png")
    (hidden / "dog/._1.jpg").write_bytes(b"resource fork")
    train, test, num_classes = image_folder.load(hidden)
    assert (len(train), len(test), num_classes) == (22, 2, 2)


def write_idx(folder, images, labels, prefix):
    for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
        header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
        file = folder / f"{prefix}-{name}-ubyte.gz"
        file.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def originals(tmp_path):
    folder, rng = tmp_path / "originals", np.random.default_rng(0)
    folder.mkdir()
    arrays = {}
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[prefix] = images, (np.arange(count) % 10).astype(np.uint8)
        write_idx(folder, *arrays[prefix], prefix)
    return folder, arrays


def test_original_files(originals, tmp_path):
    """They become what TensorFlow Datasets reads as its own."""
    tfds.disable_progress_bar()
    folder, arrays = originals
    data.prepare("fashion_mnist", tmp_path / "tfds", folder)
    dataset = data.load("fashion_mnist", tmp_path / "tfds")
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (30, 10, 10)
    found = {record["image"].tobytes(): record["label"] for record in dataset.train}
    assert found == {x.tobytes(): y for x, y in zip(*arrays["train"], strict=True)}
    colors = data.load("fashion_mnist", tmp_path / "tfds", image_size=32, colors=True)
    assert next(data.train_batches(colors, 4, seed=0))["image"].shape == (4, 32, 32, 3)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_progress_bar_goes_into_a_pipe(originals, tmp_path, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    disabled = []
    monkeypatch.setattr(tfds, "disable_progress_bar", lambda: disabled.append(True))
    data.prepare("fashion_mnist", tmp_path / "tfds", originals[0])
    assert bool(disabled) != is_terminal


@pytest.mark.parametrize("channels", [3, 1])
def test_grey_images_get_the_channels_of_the_weights(tmp_path, data_dir, monkeypatch, channels):
    size = models.resnet.Size(models.resnet.BasicBlock, (1, 1), 4)
    monkeypatch.setitem(models.resnet.RESNETS, "basic_nano", size)
    arrays = random_arrays(resnet_shapes(False, (1, 1), 4, 10))
    arrays["conv1.weight"] = np.ascontiguousarray(arrays["conv1.weight"][:, :channels])
    file = write(tmp_path / "w.safetensors", arrays)
    settings = dict(data_dir=data_dir, run_dir=tmp_path / "run", batch_size=640, image_size=72)
    job, initial = train.prepare(train.Config(model="basic_nano", weights=file, **settings))
    assert job.dataset.preprocessing.image_shape == (72, 72, channels)
    batch = next(data.test_batches(job.dataset, 8))
    assert np.isfinite(job.eval_step(initial(), batch)).all()


@pytest.mark.bad_input
def test_original_files_that_are_wrong(originals, tmp_path):
    folder, arrays = originals
    builder = tfds.builder("mnist", data_dir=tmp_path / "tfds", file_format="array_record")
    write_idx(folder, arrays["train"][0], arrays["train"][1][:29], "train")
    with pytest.raises(UserError, match="has 30 train images and 29 labels"):
        idx.prepare(builder, folder)
    (folder / "train-images-idx3-ubyte").write_bytes(b"<html>")
    with pytest.raises(
        UserError, match="is not an idx file of 3 axes, as it holds a web page; get"
    ):
        idx.prepare(builder, folder)
    (folder / "train-images-idx3-ubyte").unlink()
    packed = folder / "train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    contents = {  # What a download may end with.
        whole[: len(whole) // 2]: "ubyte.gz cannot be read: Compressed file ended before",
        b"<html>": "ubyte.gz cannot be read, as it holds a web page: Not a gzipped file",
        whole[:10] + b"\x07" + whole[11:]: "ubyte.gz cannot be read: Error -3 while",
        b"": "is not an idx file of 3 axes; get it again",
    }
    for content, message in contents.items():
        packed.write_bytes(content)
        with pytest.raises(UserError, match=message):
            idx.prepare(builder, folder)
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    write_idx(folder, *arrays["train"], "train")
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz cannot be read: .*No such file"):
        idx.prepare(builder, folder)
    with pytest.raises(UserError, match="--files is for mnist and fashion_mnist, not for cifar10"):
        data.prepare("cifar10", files=folder)


@pytest.mark.bad_input
@pytest.mark.parametrize("flag", ["--weights", "--data-folder"])
@pytest.mark.parametrize("path", ["gs://bucket/x.npz", "s3://bucket/photos"])
def test_only_the_run_folder_may_be_in_a_bucket(flag, path):
    with pytest.raises(UserError, match=f"the path {path} is in a bucket, which only --run-dir"):
        recipes.parse(train.Config, [f"{flag}={path}"])
    with pytest.raises(UserError, match="in a bucket"):
        tyro.cli(data.prepare, args=["mnist", f"--files={path}"])


@pytest.mark.bad_input
def test_a_data_set_in_a_bucket_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(tfds, "builder", unreachable)
    message = "data set 'digits' in gs://bucket/x: .*Please install gcsfs"
    with pytest.raises(UserError, match=message):
        data.load("digits", locations.parse("gs://bucket/x"))


def test_networks_without_branches_say_so():
    with pytest.raises(ValueError, match="mobilenet_v2 has no residual branches"):
        models.create(
            "mobilenet_v2",
            num_classes=10,
            image_shape=(32, 32, 3),
            dtype=jnp.float32,
            branches=models.Branches((0.5,)),
            rngs=None,
        )


@pytest.mark.slow
@pytest.mark.skipif(not idx.folder_of("fashion_mnist", None), reason="needs Debian's package")
def test_a_run_on_real_images(tmp_path):
    data.prepare("fashion_mnist", tmp_path / "tfds")
    settings = dict(dataset="fashion_mnist", data_dir=tmp_path / "tfds", run_dir=tmp_path / "run")
    settings |= dict(model="vit_mini/7", epochs=1, method="cdb", rate=0.5, skip_dropped=True)
    (row,) = train.train(train.Config(**settings, channel_choice="chunk"))
    assert row["step"] == 937 and row["test_accuracy"] > 0.7
