"""The original files of MNIST and Fashion-MNIST, such as those of a Debian package."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from errors import UserError, first_line, page_hint

# Where packages put them.
FOLDERS = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
FILES = {"train": "train", "test": "t10k"}


def folder_of(name: str, given: Path | None) -> Path | None:
    """The folder with the files of a set: the given one, or that of a package; None without one."""
    installed = FOLDERS.get(name)
    return given or (installed if installed and installed.exists() else None)


def prepare(official: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Prepares a set of TensorFlow Datasets from original files, without network or TensorFlow.

    Args:
      official: builds the set from a download otherwise; what is written is the same.
      folder: holds train-images-idx3-ubyte and so on, with or without .gz.

    Raises:
      UserError: if a file is missing or is not what its name says.
    """
    splits = {split: read(folder, prefix) for split, prefix in FILES.items()}
    info = official.info

    class FromFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images as PNG, as TensorFlow would have encoded them."""

        name = official.name
        VERSION = official.version

        def _info(self) -> tfds.core.DatasetInfo:
            text, label = tfds.features.Text(), info.features["label"]
            features = tfds.features.FeaturesDict({"image": text, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

        def _generate_examples(
            self, images: np.ndarray, labels: np.ndarray
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                file = io.BytesIO()
                PIL.Image.fromarray(image).save(file, "PNG")
                yield i, {"image": file.getvalue(), "label": label}

    builder = FromFiles(data_dir=official.data_dir_root, file_format="array_record")
    builder.download_and_prepare()
    info.features.save_config(builder.data_path)


def read(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (count, height, width), and labels, uint8 (count,); `prefix` as in `FILES`."""
    images = _array(folder / f"{prefix}-images-idx3-ubyte", 3)
    labels = _array(folder / f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{folder} has {len(images)} {prefix} images and {len(labels)} labels.")
    return images, labels


def _array(file: Path, rank: int) -> np.ndarray:
    """An array of bytes: a magic number with its rank, its sizes, then the values."""
    packed, content = not file.exists(), b""
    if packed:
        file = file.with_name(file.name + ".gz")
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if packed else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read{page_hint(content)}: {first_line(error)}; get it again."
        ) from error
    size = 4 * (rank + 1)
    header = np.frombuffer(content[:size].ljust(size, b"\0"), ">u4")
    if header[0] != 0x800 + rank:
        raise UserError(
            f"{file} is not an idx file of {rank} axes{page_hint(content)}; get it again."
        )
    values = np.frombuffer(content[size:], np.uint8)
    if values.size != np.prod(header[1:]):
        raise UserError(
            f"{file} has {values.size} values, not {np.prod(header[1:])}; get it again."
        )
    return values.reshape(header[1:])
