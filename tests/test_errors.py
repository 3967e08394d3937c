"""Errors of other libraries: one line that names the flag and what to do."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import errors
import run_folder
import train

pytestmark = [
    pytest.mark.bad_input,
    pytest.mark.usefixtures("standard_promotion", "compilation_cache"),
]
EXAMPLES = Path(train.__file__).parent
CONFIG = types.SimpleNamespace(batch_size=512, image_size=None, workers=4)


def line(error, config=CONFIG):
    found = errors.meaning(error, config)
    assert isinstance(found, errors.UserError) and "\n" not in str(found)
    return str(found)


def out_of_memory(f):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        f()
    return caught.value


def test_memory_that_is_not_there():
    """As XLA, NumPy and Python say it."""
    device = line(out_of_memory(lambda: jnp.ones(10**13).block_until_ready()))
    assert "Out of memory allocating 40000000000000 bytes" in device
    assert "a smaller --batch-size (now 512) or --image-size." in device
    for f in (lambda: np.ones(10**14), lambda: bytearray(10**15)):
        assert "--image-size, or fewer --workers (now 4)." in line(out_of_memory(f))
    assert "728. TiB" in line(out_of_memory(lambda: np.ones(10**14)))


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 137438953472 bytes.",
        "RESOURCE_EXHAUSTED: Failed to allocate request for 16.00GiB (17179869184B) on device 0",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 24.52G of 15.48G hbm.\n\nTotal hbm usage >= 25.00G:",
        "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 4.00G. That "
        "was not possible. There are 2.10G free.; (0x0x0_HBM0)",
        "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "INTERNAL: Error dispatching computation: Out of memory allocating 27264447376 bytes.",
    ],
    ids=["GPU", "GPU, request", "TPU, program", "TPU, array", "CUDA", "dispatch"],
)
def test_memory_that_is_not_there_on_accelerators(text):
    shown = line(jax.errors.JaxRuntimeError(text))
    reason = text.removeprefix("INTERNAL: Error dispatching computation: ").partition("\n")[0]
    assert reason.rstrip(".") in shown and "--batch-size (now 512)" in shown


def test_other_errors_stay_as_they_are():
    for error in (
        ValueError("shapes differ"),
        RuntimeError("RESOURCE_EXHAUSTED: quota"),
        KeyError(1),
    ):
        assert errors.meaning(error, CONFIG) is error
    mistake = errors.UserError("std::bad_alloc")
    assert errors.meaning(mistake, CONFIG) is mistake


def test_a_run_without_memory_ends_with_a_line(monkeypatch, tmp_path, data_dir):
    def make_steps(*args):
        return lambda *_: jnp.ones(10**13), None

    monkeypatch.setattr(train, "make_steps", make_steps)
    flags = [
        "--model",
        "vit_mini/4",
        "--run-dir",
        str(tmp_path / "run"),
        "--data-dir",
        str(data_dir),
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    message = "^error: .* 40000000000000 bytes.*; use a smaller --batch-size .*or --image-size"
    with pytest.raises(SystemExit, match=message) as caught:
        train.main()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_is_not_blamed_for_a_lack_of_memory(monkeypatch, tmp_path, data_dir):
    def read(run, step, state):
        return jnp.ones(10**13).block_until_ready()

    settings = dict(model="vit_mini/4", epochs=1, batch_size=640, data_dir=data_dir)
    train.train(train.Config(**settings, run_dir=tmp_path / "run"), brief=True)
    monkeypatch.setattr(run_folder.Run, "_read", read)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        train.train(train.Config(**settings, run_dir=tmp_path / "run", resume=True))


def test_images_are_not_blamed_for_a_lack_of_memory(monkeypatch, data_dir):
    class Large(list):
        def __getitem__(self, index):
            raise MemoryError

    dataset = data.load("digits", data_dir)._replace(train=Large([0]))
    with pytest.raises(MemoryError):
        data.pixel_statistics(dataset)


WORKERS = """
import contextlib, multiprocessing, sys, types
from pathlib import Path
import data, processes

def read():
    digits = data.load("digits", Path(sys.argv[1]))
    with contextlib.closing(data.train_batches(digits, 64, seed=0, workers=2)) as batches:
        next(batches)
        multiprocessing.active_children()[0].kill()
        for _ in range(1000):
            next(batches)

def main():
    try:
        read()
    except Exception as error:
        processes.leave(error, types.SimpleNamespace(workers=2))

if __name__ == "__main__":
    processes.run(main)
"""


def test_a_worker_that_is_killed(tmp_path, data_dir):
    """Nothing but the line is shown; not what multiprocessing says of what it leaves behind."""
    data.load("digits", data_dir)
    (tmp_path / "script.py").write_text(WORKERS)
    result = subprocess.run(
        [sys.executable, tmp_path / "script.py", data_dir],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == os.EX_TEMPFAIL  # Another attempt may do.
    (shown,) = result.stderr.splitlines()
    assert shown.startswith("error: a data worker was killed by signal 9")
    assert "use fewer --workers (now 2), and go on with --resume." in shown
