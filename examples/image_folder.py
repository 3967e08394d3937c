"""A folder of images with one subfolder for each class, as people have them.

    photos/train/cat/1.jpg          or, without splits,          photos/cat/1.jpg
    photos/train/dog/2.png                                       photos/dog/2.png
    photos/test/cat/3.jpg

Splits are called train and test, or val, valid, dev, and so on. Without them, a tenth of each class
is set aside to test on: the same images on every machine. Names that begin with a dot and
__MACOSX, which archives made on a Mac contain, are skipped, as is a folder of test images that has
no subfolders, and so no labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from errors import UserError, first_line, page_hint

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
UNSUPPORTED = (".heic", ".heif", ".avif", ".jxl")  # Pictures that Pillow may be unable to decode.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval")


class Images(Sequence[dict[str, Any]]):
    """Examples by index: "image" uint8 (height, width, 3), "label", read when asked for."""

    def __init__(self, files: list[tuple[Path, int]]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        file, label = self._files[index]
        try:
            with PIL.Image.open(file) as image:
                return {"image": np.asarray(to_rgb(image)), "label": label}
        except MemoryError:
            raise
        except Exception as error:  # Image libraries raise what they like.
            raise UserError(
                f"{file} cannot be read{_page_hint(file)}: {first_line(error)}; replace it with a "
                "good image of the same name. If you remove it instead, choose another --run-dir: "
                "no run can be resumed with fewer images."
            ) from error


def _page_hint(file: Path) -> str:
    try:
        with open(file, "rb") as content:
            return page_hint(content.read(100))
    except OSError:
        return ""


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Red, green and blue of 8 bits, from any kind of image, turned as its camera was held.

    What is transparent becomes white, as most viewers show it. Grey values of 16 bits lose the
    lower half of their bits.

    Raises:
      ValueError: for values that have no natural range.
    """
    file_format = image.format  # A turned image does not have it any more.
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # Pillow reads 16 bits of a PPM file, too, as if they were 32.
        if not image.mode.startswith("I;16") and (image.mode, file_format) != ("I", "PPM"):
            raise ValueError("its values have 32 bits, and no natural range")
        values = np.asarray(image)
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def load(folder: Path) -> tuple[Images, Images, int]:
    """Training images, test images, and the number of classes.

    Raises:
      UserError: if there are no images, or the splits have other classes.
    """
    if not folder.is_dir():
        raise UserError(f"--data-folder {folder} is no folder.")
    splits = _splits(folder)
    if len(splits) == 1:
        (folder,) = splits
    classes = [_classes(x) for x in splits or [folder]]
    if classes[0] != classes[-1]:
        first, last = (x.name for x in splits)
        differing = ", ".join(sorted(set(classes[0]) ^ set(classes[-1])))
        raise UserError(f"--data-folder {folder}: {first} and {last} differ in {differing}.")
    if len(classes[0]) < 2:
        raise UserError(
            f"--data-folder {folder} must have a subfolder with images for each class, at least "
            "two: class/image.jpg, or train/class/image.jpg and test/class/image.jpg."
        )
    if len(splits) == 2:
        train, test = (_files(x, classes[0]) for x in splits)
    else:
        train, test = _split(folder, classes[0])
    return Images(train), Images(test), len(classes[0])


def _splits(folder: Path) -> list[Path]:
    """The folders of training and test images, or of the first alone; none if there are no splits.

    A split has subfolders; without, "train" is a class, say of railways.
    """
    names = [x for x in _classes(folder) if _classes(folder / x)]
    train, test = (
        next((x for wanted in group for x in names if x.lower() == wanted), None)
        for group in (TRAIN_NAMES, TEST_NAMES)
    )
    if test and not train:
        raise UserError(f"--data-folder {folder} has {test}, but no train, among its folders.")
    others = [x for x in names if x.lower() not in (*TRAIN_NAMES, *TEST_NAMES)]
    if train and (alike := [x for x in others if _classes(folder / x) == _classes(folder / train)]):
        raise UserError(
            f"--data-folder {folder}: {alike[0]} has the same subfolders as {train}, but is not "
            "called test or val; rename it, or move it elsewhere."
        )
    return [folder / x for x in (train, test) if x]


def _classes(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir() if x.is_dir() and not _is_skipped(x.name))


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _images(folder: Path) -> list[Path]:
    """The images of a class, in the order of their names."""
    files = [x for x in folder.rglob("*") if not any(map(_is_skipped, x.relative_to(folder).parts))]
    images = sorted(x for x in files if x.suffix.lower() in SUFFIXES)
    if others := sorted(x for x in files if x.suffix.lower() in UNSUPPORTED):
        raise UserError(
            f"{folder} has images that cannot be read ({len(others)}, such as {others[0].name}); "
            "convert them to JPEG or PNG, or remove them."
        )
    if not images:
        raise UserError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    return images


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    return [(x, label) for label, name in enumerate(classes) for x in _images(folder / name)]


def _split(folder: Path, classes: list[str]) -> tuple[list, list]:
    """A tenth of each class is for testing, chosen by the names of the files."""
    train: list[tuple[Path, int]] = []
    test: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        images = _images(folder / name)
        if len(images) == 1:
            raise UserError(
                f"{folder / name} has one image; each class needs two, one of them to test on."
            )
        images.sort(key=lambda x: hashlib.sha256(x.name.encode()).digest())
        count = max(1, len(images) // 10)
        test += [(x, label) for x in images[:count]]
        train += [(x, label) for x in images[count:]]
    return sorted(train), sorted(test)
