"""The tasks: small, offline, each split into training, validation and test images by a seed.

The test images are the same for all seeds; training and validation images are drawn by the seed
from the rest. So tuning, which sees validation images only, never meets a test image, and runs of
one seed see the same images whatever the method.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import data
import idx
from epochs import Epochs
from models.resnet import RESNETS, BasicBlock, Size
from models.vit import VITS

HELD_OUT = 797  # Digits to test on; a thousand are left to train and validate on.
WRONG = 0.3  # Share of the training labels that are drawn at random in `digits_noisy`.


class Images(NamedTuple):
    """uint8 images, shape (count, height, width, 1), and int32 labels, shape (count,)."""

    image: np.ndarray
    label: np.ndarray

    def take(self, index: np.ndarray) -> Images:
        return Images(self.image[index], self.label[index])


class Split(NamedTuple):
    train: Images
    validation: Images
    test: Images
    watched: Images | None = None  # A part of the test images, for the course of a run; or all.


class Task(NamedTuple):
    """What to learn, with which model, for how long.

    `start` names the task whose trained weights, all but the head, training starts from.
    """

    split: Callable[[int], Split]
    num_classes: int
    max_value: int
    model: str
    steps: int
    batch_size: int
    start: str = ""
    evaluations: int = 20  # In the course of a run.

    @property
    def epoch_steps(self) -> int:
        return len(self.split(0).train.label) // self.batch_size

    @property
    def epochs(self) -> Epochs:
        if self.steps % self.epoch_steps:
            return Epochs(1, self.steps)
        return Epochs(self.steps // self.epoch_steps, self.epoch_steps)


@functools.cache
def _digits() -> tuple[Images, Images]:
    """All digits but those to test on, and those."""
    images, labels = load_digits(return_X_y=True)
    whole = Images(images.reshape(-1, 8, 8, 1).astype(np.uint8), labels.astype(np.int32))
    pool, test = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0
    )
    return whole.take(pool), whole.take(test)


def _divide(pool: Images, train: int, validation: int, seed: int) -> tuple[Images, Images]:
    parts = train_test_split(
        np.arange(len(pool.label)),
        train_size=train,
        test_size=validation,
        stratify=pool.label,
        random_state=seed,
    )
    return pool.take(parts[0]), pool.take(parts[1])


def digits(train: int, validation: int, wrong: float = 0.0) -> Callable[[int], Split]:
    def split(seed: int) -> Split:
        pool, test = _digits()
        learned, validated = _divide(pool, train, validation, seed)
        learned = learned._replace(
            label=data.redraw(learned.label, wrong, 10, np.random.default_rng(seed))
        )
        return Split(learned, validated, test)

    return split


def half_of_digits(first: int, train: int, validation: int) -> Callable[[int], Split]:
    """Five classes from `first` on, numbered from 0."""

    def split(seed: int) -> Split:
        def five(images: Images) -> Images:
            found = images.take((images.label >= first) & (images.label < first + 5))
            return found._replace(label=found.label - first)

        pool, test = map(five, _digits())
        return Split(*_divide(pool, train, validation, seed), test)

    return split


@functools.cache
def _fashion() -> tuple[Images, Images]:
    """The 60,000 training images and the 10,000 test images of Fashion-MNIST."""
    folder = idx.folder_of("fashion_mnist", None)
    if folder is None:
        raise SystemExit("error: Fashion-MNIST is missing; apt install dataset-fashion-mnist.")
    train, test = (idx.read(folder, prefix) for prefix in idx.FILES.values())
    return tuple(Images(x[..., None], y.astype(np.int32)) for x, y in (train, test))


def fashion(train: int, wrong: float = 0.0) -> Callable[[int], Split]:
    def split(seed: int) -> Split:
        pool, test = _fashion()
        learned, validated = _divide(pool, train, 2000, seed)
        learned = learned._replace(
            label=data.redraw(learned.label, wrong, 10, np.random.default_rng(seed))
        )
        return Split(learned, validated, test, test.take(np.arange(2000)))

    return split


# Wide enough that there is work to save.
RESNETS["resnet_wide"] = Size(BasicBlock, (1, 1), 64)
VITS["vit_wide"] = (192, 3, 3)
# Small enough for many runs with images of 28x28, deep enough for branches to drop.
RESNETS["resnet_8"] = Size(BasicBlock, (1, 1, 1), 16, stem="imagenet")
VITS["vit_48"] = (48, 4, 4)

TASKS = {
    "digits_few": Task(digits(200, 400), 10, 16, "resnet_small", 300, 50),
    "digits_noisy": Task(digits(600, 400, WRONG), 10, 16, "vit_mini/4", 400, 60),
    "finetune": Task(half_of_digits(5, 50, 200), 5, 16, "vit_mini/4", 200, 50, start="pretrain"),
    "digits_all": Task(digits(800, 200), 10, 16, "resnet_small", 400, 50),
    "fashion_few": Task(fashion(2000), 10, 255, "resnet_8", 310, 64, evaluations=10),
    "fashion_few_noisy": Task(fashion(2000, WRONG), 10, 255, "resnet_8", 310, 64, evaluations=10),
    "fashion_all": Task(fashion(58_000), 10, 255, "resnet_8", 1812, 64, evaluations=12),
    "fashion_all_noisy": Task(
        fashion(58_000, WRONG), 10, 255, "resnet_8", 1812, 64, evaluations=12
    ),
    # Not compared: where `finetune` starts.
    "pretrain": Task(half_of_digits(0, 400, 90), 5, 16, "vit_mini/4", 400, 50),
}
