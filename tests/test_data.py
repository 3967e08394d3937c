"""The data pipeline: the real code on `digits`, and on the other sets through TFDS's mock."""

import io
import itertools
import os
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

import data
import errors

EXAMPLES = Path(data.__file__).parent


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return data.load("digits", tmp_path_factory.mktemp("tfds"))


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def plain(digits):
    """The set without augmentation, so that images can be recognised."""
    return digits._replace(preprocessing=digits.preprocessing._replace(shift=0))


def multiset(images):
    return sorted(image.tobytes() for image in images)


def test_digits_are_the_real_ones_and_the_split_is_fixed(digits):
    assert (len(digits.train), len(digits.test), digits.num_classes) == (1297, 500, 10)
    images, labels = load_digits(return_X_y=True)
    stored = [*digits.train, *digits.test]
    by_image = {
        image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels, strict=True)
    }
    assert all(by_image[record["image"].tobytes()] == record["label"] for record in stored)
    assert multiset(record["image"] for record in stored) == multiset(images.astype(np.uint8))
    shares = np.bincount([record["label"] for record in digits.test]) / np.bincount(labels)
    np.testing.assert_allclose(shares, 500 / 1797, atol=0.01)


def test_a_batch_has_the_promised_shape_and_dtype(digits):
    (batch,) = take(data.train_batches(digits, 32, seed=0), 1)
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (32, 8, 8, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (32,) and batch["label"].dtype == np.int32
    assert batch["image"].max() == digits.preprocessing.max_value


def test_an_epoch_shows_no_image_twice_and_the_next_one_has_another_order(digits):
    plain_digits = plain(digits)
    steps = data.batches_per_epoch(digits, 64)
    assert steps == 20
    batches = take(data.train_batches(plain_digits, 64, seed=0), 2 * steps)
    known = multiset(record["image"] for record in digits.train)
    orders = []
    for epoch in (batches[:steps], batches[steps:]):
        images = np.concatenate([batch["image"] for batch in epoch])
        shown = multiset(images)
        assert len(shown) == steps * 64
        remaining = list(known)
        for image in shown:  # A multiset difference: each stored image at most once.
            remaining.remove(image)
        orders.append(images)
    assert (orders[0] != orders[1]).any(axis=(1, 2, 3)).mean() > 0.9


def test_the_seed_decides(digits):
    first, again, other = (take(data.train_batches(digits, 16, seed=seed), 3) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert_equal(a, b)
        assert (a["image"] != c["image"]).any()


@pytest.mark.parametrize("multiple", [None, 1])
@pytest.mark.parametrize("start", [1, 19, 20, 45])
def test_a_run_resumes_at_any_batch(digits, start, multiple):
    settings = dict(seed=3, multiple=multiple)
    batches = take(data.train_batches(digits, 64, **settings), start + 2)
    resumed = take(data.train_batches(digits, 64, **settings, start=start), 2)
    for a, b in zip(batches[start:], resumed, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_batch_of_one_process(digits, process_count):
    whole = take(data.train_batches(digits, 32, seed=0, start=38), 4)
    shares = [
        take(
            data.train_batches(
                digits, 32, seed=0, start=38, process_index=i, process_count=process_count
            ),
            4,
        )
        for i in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for name, values in batch.items():
            parts = [share[step][name] for share in shares]
            np.testing.assert_array_equal(np.concatenate(parts), values)


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_partial_batch_ends_an_epoch(digits, multiple):
    count = data.batches_per_epoch(digits, 64, multiple)
    assert count == 21
    batches = take(data.train_batches(plain(digits), 64, seed=0, multiple=multiple), 2 * count)
    sizes = [len(batch["label"]) for batch in batches]
    last = 1297 - 20 * 64 - 1297 % multiple
    assert sizes == 2 * ([64] * 20 + [last])
    known = multiset(record["image"] for record in digits.train)
    for epoch in (batches[:count], batches[count:]):
        shown = multiset(np.concatenate([batch["image"] for batch in epoch]))
        assert len(shown) == 1297 - 1297 % multiple and not Counter(shown) - Counter(known)
    shares = [
        take(
            data.train_batches(
                digits, 64, seed=0, multiple=8, start=20, process_index=i, process_count=2
            ),
            1,
        )[0]
        for i in (0, 1)
    ]
    (whole,) = take(data.train_batches(digits, 64, seed=0, multiple=8, start=20), 1)
    for name, values in whole.items():
        parts = np.concatenate([share[name] for share in shares])
        np.testing.assert_array_equal(parts, values)


def test_images_are_turned():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 4:] = 200  # A line from the centre to the right.
    turned = data.PREPROCESSING["digits"]._replace(image_shape=(9, 9, 1), shift=0, rotation=90.0)
    uniforms = np.full((2, 6), 0.5)
    uniforms[:, 5] = [0.5, 1.0]  # By 0 and by 90 degrees.
    same, upright = data.augment([image, image], turned, uniforms)
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(upright, np.rot90(image))
    colored = np.repeat(image, 3, axis=-1)
    wide = turned._replace(image_shape=(9, 9, 3))
    np.testing.assert_array_equal(data.augment([colored], wide, uniforms[1:])[0], np.rot90(colored))


def test_pixel_statistics(digits):
    mean, std = data.pixel_statistics(digits)
    images = np.stack([record["image"] for record in digits.train]) / 16
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2), keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(std, images.std(axis=(0, 1, 2), keepdims=True), rtol=1e-5)
    few, _ = data.pixel_statistics(digits, most=400)
    np.testing.assert_allclose(few, mean, atol=0.02)


def test_pixel_statistics_hold_one_image_at_a_time(digits):
    images, alive = [], []

    class Source:
        def __len__(self):
            return 100

        def __getitem__(self, i):
            image = np.zeros((8, 8, 1), np.uint8)
            images.append(weakref.ref(image))
            alive.append(sum(x() is not None for x in images))
            return {"image": image}

    data.pixel_statistics(digits._replace(train=Source()))
    assert len(alive) == 100 and max(alive) <= 2  # One that is read, and the one before.


@pytest.mark.parametrize("batch_size", [50, 64, 999])
@pytest.mark.parametrize("process_count", [1, 3])
def test_evaluation_counts_every_test_image_once(digits, batch_size, process_count):
    size = batch_size - batch_size % process_count
    shares = [
        list(data.test_batches(digits, size, process_index=i, process_count=process_count))
        for i in range(process_count)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = list(itertools.chain(*shares))
    images = np.concatenate([batch["image"] for batch in batches])
    weights = np.concatenate([batch["weight"] for batch in batches])
    assert weights.dtype == np.float32 and set(weights.tolist()) <= {0.0, 1.0}
    assert multiset(images[weights == 1]) == multiset(record["image"] for record in digits.test)


def test_processes_may_prepare_the_set_together(tmp_path):
    script = f"""
import data
from pathlib import Path
print(len(data.load("digits", Path({str(tmp_path)!r})).train))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs == ["1297\n"] * 3


@pytest.mark.slow
def test_worker_processes_read_what_threads_read(digits):
    # In a process of its own: forking the many threads of this one would be unsafe.
    script = f"""
import itertools, numpy as np, data
from pathlib import Path
if __name__ == "__main__":
    digits = data.load("digits", Path({str(digits.train.dataset_info.data_dir)!r}).parents[1])
    for a, b in zip(*(itertools.islice(data.train_batches(digits, 64, seed=0, start=5,
                      workers=workers), 7) for workers in (0, 2))):
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    print("same")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == "same", result.stderr


MOCKED = [
    ("cifar10", 10, (32, 32, 3)),
    ("cifar100", 100, (32, 32, 3)),
    ("svhn_cropped", 10, (32, 32, 3)),
    ("imagenet2012", 1000, (224, 224, 3)),
]


@pytest.mark.parametrize("name, num_classes, image_shape", MOCKED)
def test_the_same_code_reads_the_other_sets(name, num_classes, image_shape):
    with tfds.testing.mock_data(num_examples=12):
        dataset = data.load(name)
        assert dataset.num_classes == num_classes
        assert dataset.preprocessing.image_shape == image_shape
        for batch in (
            *take(data.train_batches(dataset, 4, seed=0), 4),
            *data.test_batches(dataset, 5),
        ):
            assert batch["image"].shape[1:] == image_shape and batch["image"].dtype == np.uint8
            assert batch["label"].min() >= 0 and batch["label"].max() < num_classes


class TestAugmentation:
    image = np.arange(1, 1 + 32 * 32 * 3, dtype=np.uint16).reshape(32, 32, 3)

    def draws(self, name, image, count=200):
        uniforms = np.random.default_rng(0).random((count, 5))
        return data.augment([image] * count, data.PREPROCESSING[name], uniforms)

    def test_a_shift_moves_the_image_and_fills_with_zeros(self):
        preprocessing = data.PREPROCESSING["svhn_cropped"]
        offsets = set()
        for draw in self.draws("svhn_cropped", self.image):
            assert draw.shape == preprocessing.image_shape
            values = draw[draw > 0]
            assert np.isin(values, self.image).all() and len(np.unique(values)) == len(values)
            row, column = np.argwhere(draw[..., 0] == self.image[16, 16, 0])[0]
            offsets.add((int(row) - 16, int(column) - 16))
        assert {i for offset in offsets for i in offset} == set(range(-4, 5))

    @pytest.mark.parametrize("name, flips", [("cifar10", True), ("svhn_cropped", False)])
    def test_only_sets_without_signs_are_flipped(self, name, flips):
        number = 200
        right = [
            bool((np.diff(draw[16, 10:20, 0].astype(np.int64)) > 0).all())
            for draw in self.draws(name, self.image, number)
        ]
        if flips:
            assert abs(np.mean(right) - 0.5) < 4 * 0.5 / np.sqrt(number)
        else:
            assert all(right)

    def test_digits_are_not_flipped(self, digits):
        assert not digits.preprocessing.flip

    def test_a_resized_crop_stays_inside_the_image(self):
        ramp = np.linspace(50, 200, 300).astype(np.uint8)
        image = np.broadcast_to(ramp[None, :, None], (200, 300, 3))
        widths = []
        for draw in self.draws("imagenet2012", image, 100):
            assert draw.shape == (224, 224, 3) and draw.min() >= 50 and draw.max() <= 200
            row = draw[0, :, 0].astype(int)
            widths.append(abs(row[-1] - row[0]))
        assert min(widths) < 50 < 100 < max(widths)

    def test_the_test_image_is_the_centre(self):
        image = np.zeros((100, 200, 3), np.uint8)
        image[:, 57:143] = 255  # The central 87.5 % of the shorter side are columns 56.25 to 143.75
        fitted = data.fit(image, data.PREPROCESSING["imagenet2012"])
        assert fitted.shape == (224, 224, 3)
        assert (fitted[:, 5:-5] == 255).all() and (fitted[:, 0] < 255).all()

    @pytest.mark.parametrize("name", ["digits", "cifar10"])
    def test_small_images_are_shifted_and_then_resized(self, name):
        known = data.PREPROCESSING[name]
        side, channels = known.image_shape[0], known.image_shape[-1]
        larger = known._replace(image_shape=(3 * side, 3 * side, channels))
        image = np.zeros(known.image_shape, np.uint8)
        image[side // 2, side // 2] = 15
        uniforms = np.random.default_rng(0).random((50, 5))
        small = data.augment([image] * 50, known, uniforms)
        large = data.augment([image] * 50, larger, uniforms)
        assert large.shape == (50, *larger.image_shape) and large.dtype == np.uint8
        # The middle of each block of nine pixels is a pixel of the small image.
        np.testing.assert_array_equal(large[:, 1::3, 1::3], small)
        np.testing.assert_array_equal(data.fit(image, larger)[1::3, 1::3], image)

    def test_the_image_size_is_that_of_all_batches(self, tmp_path):
        for name, size in (("cifar10", 48), ("imagenet2012", 96)):
            with tfds.testing.mock_data(num_examples=6):
                dataset = data.load(name, image_size=size)
                for batches in (
                    data.train_batches(dataset, 4, seed=0),
                    data.test_batches(dataset, 4),
                ):
                    (batch,) = take(batches, 1)
                    assert batch["image"].shape == (4, size, size, 3)

    def test_grey_images_get_their_channels(self):
        grey = np.full((30, 40, 1), 7, np.uint8)
        assert (data.fit(grey, data.PREPROCESSING["imagenet2012"]) == 7).all()


@pytest.mark.bad_input
class TestMistakes:
    def test_an_unknown_set(self):
        with pytest.raises(
            errors.UserError, match="unknown data set 'emnist'; choose one of digits"
        ):
            data.load("emnist")

    def test_a_set_that_is_not_prepared(self, tmp_path):
        message = r"'cifar10' in .*: is not prepared; prepare it once with 'pip install tensorflow"
        with pytest.raises(errors.UserError, match=message) as caught:
            data.load("cifar10", tmp_path)
        assert "\n" not in str(caught.value)
        assert f"--data-dir {tmp_path}" in str(caught.value)

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(errors.UserError, match="another --data-dir that can be written"):
            data.load("digits", tmp_path / "file")

    def test_a_damaged_set(self, tmp_path):
        data.load("digits", tmp_path)
        next(tmp_path.rglob("digits-train*")).write_bytes(b"")
        with pytest.raises(errors.UserError, match="'digits' in .* another --data-dir") as caught:
            data.load("digits", tmp_path)
        assert "\n" not in str(caught.value)

    def test_a_batch_larger_than_the_set(self, digits):
        with pytest.raises(errors.UserError, match="--batch-size 1298 .* 1297 training images"):
            data.batches_per_epoch(digits, 1298)

    def test_a_download_that_is_a_web_page(self, tmp_path, monkeypatch):
        def get(*args, **kwargs):
            response = requests.Response()
            response.status_code, response.raw = 200, io.BytesIO(b"<html>log in</html>")
            response.url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
            return response

        monkeypatch.setattr(requests.Session, "get", get)
        with pytest.raises(errors.UserError, match="cifar10 could not be prepared: ") as caught:
            data.prepare("cifar10", tmp_path)
        assert "\n" not in str(caught.value)

    def test_preparing_an_unknown_set(self, tmp_path):
        result = subprocess.run(
            [sys.executable, EXAMPLES / "data.py", "emnist", "--data-dir", tmp_path],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 1
        assert result.stderr.startswith("error: unknown data set 'emnist'")


def test_reading_takes_no_tensorflow(digits):
    take(data.train_batches(digits, 8, seed=0), 1)
    assert "tensorflow" not in sys.modules
