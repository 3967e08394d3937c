"""Damaged, foreign and missing things: one line that says what to do, and nothing is lost."""

import shutil

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import data
import models.vit
import train

pytestmark = [
    pytest.mark.bad_input,
    pytest.mark.usefixtures("standard_promotion", "compilation_cache"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A run folder with checkpoints of steps 8 and 16, and its configuration."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.vit.VITS, "vit_nano", (16, 1, 2))
        settings = dict(model="vit_nano/4", epochs=2, batch_size=160, data_dir=data_dir)
        with jax.numpy_dtype_promotion("standard"):
            train.train(train.Config(**settings, run_dir=folder), brief=True)
        yield folder, settings


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that folder, to damage."""
    return shutil.copytree(finished[0], tmp_path / "run")


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rewrite(pattern, change):
    """Changes the bytes of all files of the last checkpoint that fit a pattern."""

    def damage(run):
        files = [file for file in (run / "checkpoints/16").rglob(pattern) if file.is_file()]
        assert files
        for file in files:
            file.write_bytes(change(file.read_bytes()))

    return damage


def write(name, content):
    return lambda run: (run / name).write_bytes(content)


def replace_by_folder(name):
    def damage(run):
        (run / name).unlink()
        (run / name).mkdir()

    return damage


def remove(pattern):
    def damage(run):
        found = list((run / "checkpoints/16").rglob(pattern))
        assert found
        for x in found:
            shutil.rmtree(x) if x.is_dir() else x.unlink(missing_ok=True)

    return damage


def foreign(tree):
    """A checkpoint that another program wrote."""

    def damage(run):
        shutil.rmtree(run / "checkpoints/16")
        with ocp.CheckpointManager(run / "checkpoints") as checkpoints:
            checkpoints.save(16, args=ocp.args.StandardSave(tree))

    return damage


def checkpoints_are_a_file(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")


def flip(content):
    """Other bits, in the middle of a file."""
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(255 - x for x in content[middle : middle + 64])
        + content[middle + 64 :]
    )


OF_CHECKPOINT = "the checkpoint of step 16 .* cannot be read: .* Remove checkpoints/16 to resume"
OF_FOLDER = "--run-dir .* cannot be used: "
RUN_FAULTS = {
    "settings are no JSON": (write("settings.json", b"{"), OF_FOLDER),
    "settings are a list": (write("settings.json", b"[]"), OF_FOLDER),
    "settings are not UTF-8": (write("settings.json", b"\xff\xfe\x00"), OF_FOLDER),
    "settings are empty": (write("settings.json", b""), OF_FOLDER),
    "settings are a folder": (replace_by_folder("settings.json"), OF_FOLDER),
    "settings of another program": (write("settings.json", b'{"lr": 1}'), "holds a run with"),
    "metrics are no JSON": (write("metrics.jsonl", b"loss: 1\n"), OF_FOLDER),
    "metrics are lists": (write("metrics.jsonl", b"[1]\n"), OF_FOLDER),
    "metrics lack a step": (write("metrics.jsonl", b'{"epoch": 1}\n'), OF_FOLDER),
    "metrics have a step in words": (write("metrics.jsonl", b'{"step": "a"}\n'), OF_FOLDER),
    "metrics are not UTF-8": (write("metrics.jsonl", b"\xff\xfe\n"), OF_FOLDER),
    "metrics end within a line": (write("metrics.jsonl", b'{"epoch": 1, "st'), OF_FOLDER),
    "metrics are a folder": (replace_by_folder("metrics.jsonl"), OF_FOLDER),
    "checkpoints are a file": (checkpoints_are_a_file, OF_FOLDER),
    "half of every file": (rewrite("*", lambda x: x[: len(x) // 2]), OF_CHECKPOINT),
    "every file empty": (rewrite("*", lambda x: b""), OF_CHECKPOINT),
    "half of the arrays": (rewrite("d/*", lambda x: x[: len(x) // 2]), OF_CHECKPOINT),
    "flipped bits in the arrays": (rewrite("d/*", flip), OF_CHECKPOINT),
    "flipped bits in the manifest": (rewrite("manifest.ocdbt", flip), OF_CHECKPOINT),
    "flipped bits in the metadata": (rewrite("_METADATA", flip), OF_CHECKPOINT),
    "without arrays": (remove("d"), OF_CHECKPOINT),
    "without a manifest": (remove("manifest.ocdbt"), OF_CHECKPOINT),
    "without metadata": (remove("_METADATA"), OF_CHECKPOINT),
    "an empty folder": (remove("*"), OF_CHECKPOINT),
    "of another program": (foreign({"weights": jnp.ones(3)}), OF_CHECKPOINT),
    "of one array": (foreign([jnp.ones(3)]), OF_CHECKPOINT),
}


@pytest.mark.parametrize("name", RUN_FAULTS)
def test_a_run_folder(finished, run, name):
    damage, message = RUN_FAULTS[name]
    damage(run)
    older = contents(run / "checkpoints/8") if (run / "checkpoints").is_dir() else {}
    with pytest.raises(data.UserError, match=message) as caught:
        train.train(train.Config(**finished[1], run_dir=run, resume=True))
    assert "\n" not in str(caught.value)
    assert older == (contents(run / "checkpoints/8") if older else {})
