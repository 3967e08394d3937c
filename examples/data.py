"""Images through TensorFlow Datasets and Grain; TensorFlow itself is needed only to prepare a set.

    python examples/data.py cifar10 --data-dir ~/tensorflow_datasets    # once: download and prepare
    python examples/data.py fashion_mnist --files /usr/share/datasets/fashion-mnist    # offline

A batch is a function of the seed and the step alone: a run resumes by starting at its step, and
with several processes each reads its own share of the same batches.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
import tyro
from absl import flags, logging
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

import idx
import image_folder
from errors import UserError, first_line
from locations import AnyPath, LocalPath


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels of 0 to 16: 1,297 to train on, 500 to
    test on, with equal shares of every class."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {  # A `Tensor`, because preparing an `Image` takes TensorFlow.
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
        train, test = train_test_split(
            np.arange(len(labels)), test_size=500, stratify=labels, random_state=0
        )
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in indices.tolist():
            yield i, {"image": images[i], "label": int(labels[i])}


class Preprocessing(NamedTuple):
    """How the images of a set are brought to one size and augmented."""

    image_shape: tuple[int, int, int]
    max_value: int = 255
    shift: int | None = None  # Random shift in pixels of the file; None: random crop.
    flip: bool = False  # Mirrored digits are other signs, or none.
    rotation: float = 0.0  # By up to so many degrees.
    test_split: str = "test"


PREPROCESSING = {
    "digits": Preprocessing((8, 8, 1), max_value=16, shift=1),
    "mnist": Preprocessing((28, 28, 1), shift=2),
    "fashion_mnist": Preprocessing((28, 28, 1), shift=2, flip=True),
    "cifar10": Preprocessing((32, 32, 3), shift=4, flip=True),
    "cifar100": Preprocessing((32, 32, 3), shift=4, flip=True),
    "svhn_cropped": Preprocessing((32, 32, 3), shift=4),
    "imagenet2012": Preprocessing((224, 224, 3), flip=True, test_split="validation"),
}
FOLDER = Preprocessing((224, 224, 3), flip=True)  # For a folder of images.
READABLE = {"array_record", "parquet"}  # The formats of TensorFlow Datasets with random access.
# What TensorFlow Datasets raises where a download fails, or is not what it should be.
UNPREPARED = (AssertionError, OSError, EOFError, tarfile.TarError, zipfile.BadZipFile)
UNPREPARED += (tfds.download.DownloadError, NonMatchingChecksumError)


class DataSet(NamedTuple):
    """Two sources of examples, and what a model and a step must know about them."""

    name: str
    train: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    num_classes: int
    preprocessing: Preprocessing


def summary(data: DataSet) -> str:
    """How much there is, for those who gave a folder."""
    return (
        f"{len(data.train):,} training images and {len(data.test):,} test images of "
        f"{data.num_classes} classes"
    )


def load(
    name: str,
    data_dir: Path | None = None,
    image_size: int | None = None,
    rotation: float = 0.0,
    folder: Path | None = None,
    colors: bool = False,
) -> DataSet:
    """Opens a prepared set for random access; prepares `digits`, which takes a second.

    Args:
      name: one of `PREPROCESSING`.
      data_dir: where TensorFlow Datasets keeps its sets; None for its default.
      image_size: side of the images that a model sees; None for that of the set.
      rotation: turns training images by up to so many degrees.
      folder: a folder of images to take instead, as `image_folder` describes.
      colors: whether grey images become red, green and blue, as most pretrained weights need.

    Raises:
      UserError: if the set is unknown, not prepared, or not readable.
    """
    if folder is not None:
        train, test, num_classes = image_folder.load(folder)
        preprocessing = _changed(FOLDER, image_size, rotation, colors)
        return DataSet(str(folder), train, test, num_classes, preprocessing)
    if name not in PREPROCESSING:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(PREPROCESSING)}.")
    preprocessing = PREPROCESSING[name]
    builder = _builder(name, data_dir)
    try:
        if name == "digits" and not builder.is_prepared():
            _prepare_quietly(builder)
            builder = _builder(name, data_dir)
        if builder.is_prepared():
            _check_contents(builder, preprocessing)
        train, test = (
            builder.as_data_source(split) for split in ("train", preprocessing.test_split)
        )
        _ = train[0], test[0]  # The files are opened only now.
    except UserError:
        raise
    except Exception as error:  # TensorFlow Datasets raises whatever its parts raise.
        reason, mend = first_line(error), _again(name)
        if name == "digits":
            mend = "choose another --data-dir that can be written to."
        elif not builder.is_prepared():
            reason, mend = "is not prepared", f"prepare it once with {_preparation(name, data_dir)}"
        raise UserError(f"data set {name!r} in {builder.data_path}: {reason}; {mend}") from error
    num_classes = builder.info.features["label"].num_classes
    preprocessing = _changed(preprocessing, image_size, rotation, colors)
    return DataSet(name, train, test, num_classes, preprocessing)


def _changed(
    preprocessing: Preprocessing, image_size: int | None, rotation: float, colors: bool
) -> Preprocessing:
    height, width, channels = preprocessing.image_shape
    if image_size is not None:
        height = width = image_size
    if colors and channels == 1:
        channels = 3
    return preprocessing._replace(image_shape=(height, width, channels), rotation=rotation)


def _builder(name: str, data_dir: Path | None) -> tfds.core.DatasetBuilder:
    """Reads a prepared set, or prepares it in a format with random access.

    Raises:
      UserError: if its description cannot be read, or it is prepared in other formats only.
    """
    logging.set_verbosity(logging.ERROR)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            return tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if not _formats(builder) & READABLE:
            # This one also knows the formats that `tfds convert_format` has added.
            builder = tfds.builder_from_directory(builder.data_path)
    except Exception as error:  # TensorFlow Datasets raises whatever its parts raise.
        place = data_dir or "the default folder"
        raise UserError(
            f"data set {name!r} in {place}: its description cannot be read ({first_line(error)}); "
            f"{_again(name)}"
        ) from error
    formats = _formats(builder)
    if not formats & READABLE:
        folder = shlex.quote(f"--dataset_version_dir={builder.data_path}")
        raise UserError(
            f"data set {name!r} in {builder.data_path}: its format, {', '.join(formats)}, has no "
            "random access; add another with 'pip install tensorflow-cpu apache-beam mlcroissant' "
            f"and 'tfds convert_format {folder} --out_file_format=array_record', or {_again(name)}"
        )
    return builder


def _formats(builder: tfds.core.DatasetBuilder) -> set[str]:
    return {x.value for x in builder.info.available_file_formats()}


def _preparation(name: str, folder: object) -> str:
    option = f" --data-dir {shlex.quote(str(folder))}" if folder else ""
    # The original files need no TensorFlow.
    install = "" if idx.folder_of(name, None) else "'pip install tensorflow-cpu' and "
    return f"{install}'python examples/data.py {name}{option}'."


def _again(name: str) -> str:
    return f"prepare it in another folder with {_preparation(name, 'FOLDER')}"


def _check_contents(builder: tfds.core.DatasetBuilder, preprocessing: Preprocessing) -> None:
    """Raises a UserError for a set without what its entry in `PREPROCESSING` promises."""
    missing = [x for x in ("image", "label") if x not in builder.info.features]
    missing += [x for x in ("train", preprocessing.test_split) if x not in builder.info.splits]
    if missing:
        raise UserError(
            f"data set {builder.name!r} has no {' and no '.join(missing)}; change its entry in "
            "PREPROCESSING of examples/data.py."
        )


def _prepare_quietly(builder: tfds.core.DatasetBuilder) -> None:
    tfds.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            builder.download_and_prepare()
    except OSError:
        if not builder.is_prepared():  # Another process may have been faster.
            raise


def train_batches(
    data: DataSet,
    batch_size: int,
    *,
    seed: int,
    multiple: int | None = None,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Endless shuffled and augmented batches, from batch `start` on.

    Every epoch is a new permutation, cut into `batches_per_epoch` batches.

    Args:
      data: the data set.
      batch_size: examples in a batch, over all processes.
      seed: of the order and the augmentation.
      multiple: as in `batches_per_epoch`.
      start: the first batch to yield; those before it are not read.
      process_index: which share of each batch to yield.
      process_count: the number of shares; divides `batch_size`.
      workers: processes that read and augment; 0 for threads, which suits small images.

    Yields:
      "image" uint8 (batch, height, width, channels) and "label" int32 (batch,).
    """

    def load(indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        # Drawn for the whole batch, so that the number of processes changes nothing.
        share = _share(len(indices), process_index, process_count)
        uniforms = rng.random((len(indices), 5))
        if data.preprocessing.rotation:
            uniforms = np.hstack([uniforms, rng.random((len(indices), 1))])
        uniforms = uniforms[share]
        records = _read(data, "train", indices[share])
        images = augment([record["image"] for record in records], data.preprocessing, uniforms)
        return {"image": images, "label": _labels(records)}

    batches = (
        grain.MapDataset.range(len(data.train))
        .seed(seed)
        .shuffle()
        .slice(slice(0, _images_per_epoch(data, multiple or batch_size)))
        .batch(batch_size)
        .repeat()
        .random_map(load)
        .slice(slice(start, None))
    )
    return _iterate(batches, workers)


def test_batches(
    data: DataSet, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Every test image once; as many batches in every process.

    Yields:
      "image" uint8 (batch, height, width, channels), "label" int32 (batch,) and "weight" float32
      (batch,): 1, or 0 for an entry that only fills up the last batch.
    """
    share = _share(batch_size, process_index, process_count)

    def load(step: int) -> dict[str, np.ndarray]:
        indices = np.arange(step * batch_size, (step + 1) * batch_size)[share]
        last = len(data.test) - 1
        records = _read(data, "test", np.minimum(indices, last))
        return {
            "image": np.stack([fit(record["image"], data.preprocessing) for record in records]),
            "label": _labels(records),
            "weight": (indices <= last).astype(np.float32),
        }

    steps = math.ceil(len(data.test) / batch_size)
    return _iterate(grain.MapDataset.range(steps).map(load), workers=0)


test_batches.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test.


def _read(data: DataSet, split: str, indices: np.ndarray) -> list[dict[str, Any]]:
    return [_record(data, split, i) for i in indices.tolist()]


def _record(data: DataSet, split: str, i: int) -> dict[str, Any]:
    try:
        return getattr(data, split)[i]
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Image libraries and file formats raise what they like.
        raise UserError(
            f"{split} image {i} of {data.name} cannot be read: {first_line(error)}; prepare the "
            "set again, in another --data-dir."
        ) from error


def _share(batch_size: int, index: int, count: int) -> slice:
    """What one process reads of a batch: a run, so that joined they are that of one process."""
    size = batch_size // count
    return slice(index * size, (index + 1) * size)


def _labels(records: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([record["label"] for record in records], np.int32)


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    threads = min(16, os.cpu_count() or 1)
    iterable = batches.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=2 * threads))
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; this script has its own.
        # Otherwise multiprocessing warns, below the error, of what it cleans up after a failed run.
        filters = [x for x in os.environ.get("PYTHONWARNINGS", "").split(",") if x]
        filters = dict.fromkeys([*filters, "ignore:resource_tracker"])
        os.environ["PYTHONWARNINGS"] = ",".join(filters)
        iterable = iterable.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(workers), worker_init_fn=_ignore_signals
        )
    return iter(iterable)


def _ignore_signals(worker: int, workers: int) -> None:
    """A stop of the whole group is for the main process, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches_per_epoch(data: DataSet, batch_size: int, multiple: int | None = None) -> int:
    """Batches in an epoch.

    An epoch has the largest multiple of `multiple` images: of the number of devices, so that these
    can share a last, partial batch; None for full batches only.
    """
    if batch_size > len(data.train):
        raise UserError(
            f"--batch-size {batch_size} is more than the {len(data.train)} training images of "
            f"{data.name}."
        )
    return math.ceil(_images_per_epoch(data, multiple or batch_size) / batch_size)


def _images_per_epoch(data: DataSet, multiple: int) -> int:
    return len(data.train) // multiple * multiple


def redraw(
    labels: np.ndarray, share: float, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Labels of which a share is drawn at random, from all classes: int32."""
    count = len(labels)
    drawn = np.where(rng.random(count) < share, rng.integers(0, num_classes, count), labels)
    return drawn.astype(np.int32)


def pixel_statistics(data: DataSet, most: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of training images, between 0 and 1, (1, 1, 1, channels) each.

    They are taken of `most` images, spread evenly over the set.
    """
    count = min(most, len(data.train))
    indices = np.linspace(0, len(data.train) - 1, count).astype(int)
    total = total_of_squares = np.float64(0.0)
    for i in indices.tolist():  # One at a time: all of them may not fit into memory.
        image = _record(data, "train", i)["image"] / np.float64(data.preprocessing.max_value)
        total = total + image.mean(axis=(0, 1))
        total_of_squares = total_of_squares + np.square(image).mean(axis=(0, 1))
    mean = total / count
    std = np.sqrt(np.maximum(total_of_squares / count - mean**2, 1e-12))
    return mean.astype(np.float32).reshape(1, 1, 1, -1), std.astype(np.float32).reshape(1, 1, 1, -1)


def augment(
    images: Sequence[np.ndarray], preprocessing: Preprocessing, uniforms: np.ndarray
) -> np.ndarray:
    """Random crops, and random flips where the preprocessing allows them.

    Args:
      images: uint8 (height, width, channels) each; of one size if they are shifted.
      preprocessing: what to do.
      uniforms: float64 (images, 5), uniform in [0, 1): all the randomness there is; (images, 6) if
        images are turned.

    Returns:
      uint8 (images, *preprocessing.image_shape).
    """
    if preprocessing.rotation:
        angles = (2 * uniforms[:, 5] - 1) * preprocessing.rotation
        images = [_turn(image, angle) for image, angle in zip(images, angles, strict=True)]
    if preprocessing.shift is None:
        boxes = [_random_box(image, u) for image, u in zip(images, uniforms, strict=True)]
        crops = [_resize(x, preprocessing, box) for x, box in zip(images, boxes, strict=True)]
        crops = np.stack(crops)
    else:
        margin, (height, width, _) = preprocessing.shift, images[0].shape
        padding = ((0, 0), (margin, margin), (margin, margin), (0, 0))
        padded = np.pad(np.stack(images), padding)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
        top, left = (uniforms[:, :2] * (2 * margin + 1)).astype(int).T
        crops = np.moveaxis(windows[np.arange(len(images)), top, left], 1, -1)
    if preprocessing.flip:
        flipped = uniforms[:, 4] < 0.5
        crops = np.where(flipped[:, None, None, None], crops[:, :, ::-1], crops)
    if crops.shape[1:] != preprocessing.image_shape:
        crops = np.stack([_resize(x, preprocessing) for x in crops])
    return np.ascontiguousarray(crops)


def _turn(image: np.ndarray, angle: float) -> np.ndarray:
    """Turns an image by an angle in degrees, and leaves its corners black."""
    is_gray = image.shape[-1] == 1
    picture = PIL.Image.fromarray(image[..., 0] if is_gray else image)
    turned = picture.rotate(angle, PIL.Image.Resampling.BILINEAR)
    return np.asarray(turned).reshape(image.shape)


def fit(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Brings a test image to its size: where training crops, the central seven eighths."""
    if image.shape == preprocessing.image_shape:
        return image
    if preprocessing.shift is not None:
        return _resize(image, preprocessing)
    height, width, _ = image.shape
    side = 0.875 * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(image, preprocessing, (left, top, left + side, top + side))


def _random_box(image: np.ndarray, uniforms: np.ndarray) -> tuple[float, float, float, float]:
    """A box of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, clipped to the image."""
    height, width, _ = image.shape
    area = (0.08 + 0.92 * uniforms[0]) * height * width
    ratio = (4 / 3) ** (2.0 * uniforms[1] - 1.0)
    box_width = min(width, math.sqrt(area * ratio))
    box_height = min(height, math.sqrt(area / ratio))
    left = uniforms[2] * (width - box_width)
    top = uniforms[3] * (height - box_height)
    return left, top, left + box_width, top + box_height


def _resize(
    image: np.ndarray,
    preprocessing: Preprocessing,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """The box of an image, or all of it, at the size of `preprocessing`."""
    height, width, channels = preprocessing.image_shape
    if image.shape[-1] == 1:  # Pillow knows grey images without an axis of channels.
        image = image[..., 0] if channels == 1 else np.repeat(image, channels, axis=-1)
    picture = PIL.Image.fromarray(image)
    resized = picture.resize((width, height), PIL.Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).reshape(preprocessing.image_shape)


def prepare(
    name: tyro.conf.Positional[str],
    data_dir: AnyPath | None = None,
    files: LocalPath | None = None,
) -> None:
    """Download a data set and prepare it for the examples.

    Args:
      name: digits, mnist, fashion_mnist, cifar10, cifar100, svhn_cropped, imagenet2012, or another
        name in PREPROCESSING.
      data_dir: where TensorFlow Datasets keeps its sets.
      files: a folder with the original files of mnist or fashion_mnist, instead of a download.
        Debian's package dataset-fashion-mnist is found without this.
    """
    if name not in PREPROCESSING:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(PREPROCESSING)}.")
    if files and name not in ("mnist", "fashion_mnist"):
        raise UserError(f"--files is for mnist and fashion_mnist, not for {name}; leave it out.")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder = _builder(name, data_dir)
        folder = idx.folder_of(name, files)
        if folder and not builder.is_prepared():
            idx.prepare(builder, folder)
        else:
            builder.download_and_prepare()
    except ModuleNotFoundError as error:
        raise UserError(
            f"preparing {name} needs {error.name}; run 'pip install tensorflow-cpu' and try again."
        ) from error
    except UNPREPARED as error:
        raise UserError(f"{name} could not be prepared: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    try:
        tyro.cli(prepare)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
