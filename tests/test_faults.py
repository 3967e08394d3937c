"""Damaged, foreign and missing things: one line that says what to do, and nothing is lost."""

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
import tensorflow_datasets as tfds
import tyro
from stored_runs import assert_same_runs, metrics

import data
import demo
import depth_rates
import display
import errors
import gp_textures
import locations
import models.vit
import processes
import recipes
import run_folder
import train
import training

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
    """All files but the lock, which every run that looks at a folder takes."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock")
    return {file: file.read_bytes() for file in files}


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


def in_metrics(old, new, cut=False):
    def damage(run):
        before, found, after = (run / "metrics.jsonl").read_bytes().partition(old)
        assert found
        (run / "metrics.jsonl").write_bytes(before + (b"" if cut else new + after))

    return damage


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


def flip_often(content):
    return bytes(255 - x if i % 97 == 0 else x for i, x in enumerate(content))


OF_CHECKPOINT = "the checkpoint of step 16 .* cannot be read: .* Move checkpoints/16 to another"
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
    "metrics have a step in words": (in_metrics(b'"step": 8', b'"step": "8"'), OF_FOLDER),
    "metrics are missing": (lambda run: (run / "metrics.jsonl").unlink(), OF_FOLDER),
    "metrics are empty": (write("metrics.jsonl", b""), OF_FOLDER),
    "metrics end after a line": (in_metrics(b'{"epoch": 2', b"", cut=True), OF_FOLDER),
    "settings are missing": (lambda run: (run / "settings.json").unlink(), "of an unknown run"),
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
    before = contents(run)
    with pytest.raises(errors.UserError, match=message) as caught:
        train.train(train.Config(**finished[1], run_dir=run, resume=True))
    assert "\n" not in str(caught.value)
    assert contents(run) == before


@pytest.mark.parametrize("pattern", ["*", "d/*", "_METADATA"])
def test_without_the_damaged_checkpoint_the_run_goes_on(finished, run, pattern):
    expected = metrics(run)
    rewrite(pattern, lambda x: b"")(run)
    config = train.Config(**finished[1], run_dir=run, resume=True)
    with pytest.raises(errors.UserError, match="Move checkpoints/16"):
        train.train(config)
    shutil.rmtree(run / "checkpoints/16")
    train.train(config, brief=True)
    for row, other in zip(metrics(run), expected, strict=True):
        assert row | {"images_per_second": 0} == other | {"images_per_second": 0}


@pytest.mark.parametrize("sign", ["[", "]", "\\"])
def test_a_path_that_checkpoints_cannot_be_read_from(finished, tmp_path, sign):
    """Above the folder that is named, too."""
    folder = tmp_path / f"lr{sign}" / "run"
    with pytest.raises(errors.UserError, match="a path with .* could be saved, but not be read"):
        train.train(train.Config(**finished[1], run_dir=folder))
    assert not folder.exists()


def test_a_first_checkpoint_that_cannot_be_read(finished, tmp_path, monkeypatch):
    def read(run, step, state):
        raise ValueError("NOT_FOUND: no manifest")

    monkeypatch.setattr(run_folder.Run, "_read", read)
    with pytest.raises(errors.UserError) as caught:
        train.train(train.Config(**finished[1], run_dir=tmp_path / "run"))
    assert str(caught.value) == (
        f"the checkpoint of step 8 was saved to {tmp_path}/run, but cannot be read back: "
        "NOT_FOUND: no manifest; choose another --run-dir."
    )


def test_memory_that_does_not_suffice_to_read_back_a_checkpoint(run, monkeypatch):
    """The checkpoint is not blamed, as when a run is resumed."""

    def read(run, step, state):
        raise RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate 8 bytes")

    monkeypatch.setattr(run_folder.Run, "_read", read)
    settings = json.loads((run / "settings.json").read_text())
    with run_folder.Run(run, settings, {}, resume=True) as resumed:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as caught:
            resumed.save(24, {"x": jnp.ones(3)})
    assert "use a smaller --batch-size" in str(errors.meaning(caught.value))


def test_a_checkpoint_of_another_network(finished, run, monkeypatch):
    """Under the same name, as with a network of the user: the checkpoint is not called damaged."""
    monkeypatch.setitem(models.vit.VITS, "vit_nano", (24, 1, 2))
    before = contents(run)
    with pytest.raises(errors.UserError) as caught:
        train.train(train.Config(**finished[1], run_dir=run, resume=True))
    assert str(caught.value) == (
        f"the checkpoint of step 16 in {run} is that of another network, or of other classes "
        "(shape of params/blocks/0/attention/key/bias: (2, 8) in the checkpoint, (2, 12) now); "
        "use the same model and images, or another --run-dir."
    )
    assert contents(run) == before


def test_the_difference_of_two_networks():
    def difference(now):
        then = {"sums/loss": (), "params/head/kernel": (8, 10), "opt/mu": (8, 10)}
        return run_folder._first_difference(then, now)

    same = {"sums/loss": (), "params/head/kernel": (8, 10), "opt/mu": (8, 10)}
    assert difference(same) is None and difference({"weights": (3,)}) is None
    classes = same | {"params/head/kernel": (8, 7), "opt/mu": (8, 7), "params/new": (2,)}
    told = "shape of params/head/kernel: (8, 10) in the checkpoint, (8, 7) now"
    assert difference(classes) == told
    new = same | {"params/new": (2,)}
    assert difference(new) == "shape of params/new: missing in the checkpoint, (2,) now"
    del same["opt/mu"]
    assert difference(same) == "shape of opt/mu: (8, 10) in the checkpoint, missing now"


def test_images_and_classes_are_settings(tmp_path):
    """A run that did not say them may go on."""

    def open_run(**counts):
        return run_folder.Run(tmp_path, {"seed": 0} | counts, {}, resume=True)

    with open_run():
        pass
    with open_run(training_images=21, classes=2):
        pass
    (tmp_path / "settings.json").write_text('{"seed": 0, "training_images": 22, "classes": 2}')
    with pytest.raises(errors.UserError, match=r"run with 22 training images \(now 21\); resume"):
        open_run(training_images=21, classes=2)


def test_a_folder_in_use(finished, run):
    """By a run that ends, and by one that is killed."""
    settings = finished[1]
    held = run_folder.Run(run, json.loads((run / "settings.json").read_text()), {}, resume=True)
    message = rf"run is in use by process {os.getpid()} on .*; wait until that run has ended, or"
    with pytest.raises(errors.UserError, match=message):
        train.train(train.Config(**settings, run_dir=run, resume=True))
    with held:
        pass
    script = "import sys, run_folder; _ = run_folder._lock(run_folder.Path(sys.argv[1])); "
    script += "print('locked', flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", script, run],
        cwd=os.path.dirname(train.__file__),
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout.readline() == b"locked\n"
    with pytest.raises(errors.UserError, match=f"in use by process {owner.pid} on"):
        train.train(train.Config(**settings, run_dir=run, resume=True))
    owner.kill()
    owner.communicate()
    assert len(train.train(train.Config(**settings, run_dir=run, resume=True), brief=True)) == 2


def test_paths_as_people_write_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.toml").write_text('weights = "~/w.npz"\n')
    monkeypatch.setattr(recipes, "FOLDER", folder)
    flags = ["--recipe", "mine", "--run-dir=~/x", "--data-dir", "gs://bucket/data"]
    config = recipes.parse(train.Config, flags)
    assert config.run_dir == tmp_path / "x" and config.weights == tmp_path / "w.npz"
    assert str(config.data_dir) == "gs://bucket/data"
    for example in (demo.Demo, depth_rates.Config, gp_textures.Config):
        assert tyro.cli(example, args=["--run-dir=~/x"]).run_dir == tmp_path / "x"
    with pytest.raises(errors.UserError, match="the path ~nobody-of-that-name/x cannot be used"):
        locations.parse("~nobody-of-that-name/x")


@pytest.mark.parametrize("path", ["hdfs://host/x", "GS://bucket/x", "file:///x", "abfs+x://a/b"])
def test_paths_of_other_file_systems(path):
    """They would become local folders of such names."""
    with pytest.raises(errors.UserError) as caught:
        recipes.parse(train.Config, [f"--run-dir={path}"])
    known = "give a local path, or a bucket that begins with gs:// or s3:// or az://."
    assert str(caught.value) == f"the path {path} cannot be used; {known}"
    with pytest.raises(errors.UserError, match=f"{re.escape(path)} .*; give a local path.$"):
        locations.parse_local(path)
    assert str(locations.parse("s3://bucket/x")) == "s3://bucket/x"


def test_a_bucket_is_never_a_folder_here(finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = train.Config(**finished[1], run_dir=locations.parse("gs://bucket/run"))
    exists = type(config.run_dir).exists

    def unreachable(path):
        if str(path).startswith("gs://"):
            raise ImportError("no way to Google Cloud Storage")
        return exists(path)

    monkeypatch.setattr(type(config.run_dir), "exists", unreachable)
    monkeypatch.setattr(train, "prepare", lambda config: pytest.fail("too late"))
    with pytest.raises(errors.UserError, match="--run-dir gs://bucket/run cannot be used: no way"):
        train.train(config)
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_before_anything_is_prepared(finished, run, monkeypatch):
    def prepare(config):
        raise AssertionError("too late")

    monkeypatch.setattr(train, "prepare", prepare)
    lock, _ = run_folder._lock(run)
    with lock, pytest.raises(errors.UserError, match="is in use by process"):
        train.train(train.Config(**finished[1], run_dir=run, resume=True))


def test_a_folder_in_use_is_tried_again(run, monkeypatch, capsys):
    """The exit code says so, as the other run may only be saving."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--run-dir", str(run), "--resume"])
    lock, _ = run_folder._lock(run)
    with lock, pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == processes.LOST
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run} is in use by process {os.getpid()} on ")


@pytest.fixture
def second_process(monkeypatch):
    """Makes this process 1 of 2, and what process 0 tells it what the test says."""

    def pretend(told):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        utils = run_folder.multihost_utils
        monkeypatch.setattr(utils, "broadcast_one_to_all", lambda mine: np.array(told))
        monkeypatch.setattr(utils, "process_allgather", lambda mine: np.array([True, mine]))

    return pretend


@pytest.mark.parametrize(("passes", "kind"), [(1, errors.PassingError), (0, errors.UserError)])
def test_a_folder_that_process_0_refuses(second_process, tmp_path, passes, kind):
    second_process([0, passes])
    with pytest.raises(errors.UserError, match="cannot be used by process 0") as caught:
        run_folder._claim(tmp_path)
    assert caught.type is kind
    second_process(1)
    with pytest.raises(errors.PassingError, match="cannot be used by process 0"):
        run_folder.check_free(tmp_path)


def test_a_token_that_takes_a_while_to_arrive(second_process, tmp_path, monkeypatch):
    """As over a network file system."""
    tokens = iter([0, 0, 4711])
    monkeypatch.setattr(run_folder, "_token", lambda folder: next(tokens, 0))
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    second_process([4711, 0])
    assert run_folder._claim(tmp_path) is None
    monkeypatch.setattr(run_folder, "PATIENCE", 0)
    with pytest.raises(errors.UserError, match="not the same folder for process 0 and process 1"):
        run_folder._claim(tmp_path)


def test_a_token_is_sent_to_the_file_server(tmp_path, monkeypatch):
    """Which closing the file would do, but the lock keeps it open."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(run_folder._token(tmp_path)))
    lock, token = run_folder._lock(tmp_path)
    lock.close()
    assert synced == [token]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(finished, run, monkeypatch, capsys, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    config = train.Config(**finished[1], run_dir=run, resume=True)
    assert len(train.train(config, brief=True)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {run} cannot be locked ([Errno {number}]")


def test_a_run_folder_that_is_removed_while_training(finished, tmp_path, monkeypatch):
    distribute, folder = training.distribute, tmp_path / "run"

    def remove_and_distribute(batch, mesh):
        shutil.rmtree(folder, ignore_errors=True)
        return distribute(batch, mesh)

    monkeypatch.setattr(training, "distribute", remove_and_distribute)
    message = "metrics.jsonl could not be written to .*run: .*No such file.* start again"
    with pytest.raises(errors.UserError, match=message) as caught:
        train.train(train.Config(**finished[1], run_dir=folder), brief=True)
    assert "\n" not in str(caught.value)


def test_a_run_folder_that_is_removed_is_missed_before_the_next_checkpoint(
    finished, tmp_path, monkeypatch
):
    distribute, batches, folder = training.distribute, [], tmp_path / "run"

    def remove_and_distribute(batch, mesh):
        batches.append(batch)
        shutil.rmtree(folder, ignore_errors=True)
        return distribute(batch, mesh)

    monkeypatch.setattr(training, "distribute", remove_and_distribute)
    monkeypatch.setattr(train, "LOOK_EVERY", 0.0)
    message = "checkpoints could not be written to .*run: .*No such file.* start again"
    with pytest.raises(errors.UserError, match=message):
        train.train(train.Config(**finished[1], run_dir=folder), brief=True)
    assert len(batches) == 1


def test_a_loss_that_is_not_finite(finished, tmp_path, monkeypatch):
    """It ends the run, or is null in the metrics; the last finite checkpoint stays."""
    distribute, batches = training.distribute, []

    def spoil(batch, mesh):
        batches.append("weight" not in batch)
        spoilt = distribute(batch, mesh)
        if sum(batches) == 12 and batches[-1]:
            spoilt["image"] = jnp.full(spoilt["image"].shape, jnp.nan)
        return spoilt

    monkeypatch.setattr(training, "distribute", spoil)
    folder = tmp_path / "run"
    message = "the loss or a parameter is not finite at step 16. .* --resume goes on from step 8"
    with pytest.raises(errors.UserError, match=message):
        train.train(train.Config(**finished[1], run_dir=folder), brief=True)
    assert [x.name for x in (folder / "checkpoints").iterdir()] == ["8"]
    batches.clear()
    goes_on = train.Config(**finished[1], run_dir=tmp_path / "b", go_on_if_not_finite=True, keep=1)
    train.train(goes_on)
    assert sorted(x.name for x in (tmp_path / "b/checkpoints").iterdir()) == ["16", "8"]
    first, second = metrics(tmp_path / "b")
    assert first["train_loss"] > 0 and second["train_loss"] is None
    display.show_results(tmp_path / "b", "a run", metrics(tmp_path / "b"))
    display.show_results(tmp_path / "b", "a run", [second])  # With no loss to draw.
    assert "NaN" not in (tmp_path / "b/metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["train_loss", "test_loss"])
def test_a_loss_that_is_not_finite_in_the_last_step_of_an_epoch(
    finished, tmp_path, monkeypatch, name
):
    """While all parameters are still finite."""
    evaluate = training.evaluate

    def spoilt(step, state, *args):
        if name == "train_loss":
            state.sums[name] = jnp.full_like(state.sums[name], jnp.nan)
            return evaluate(step, state, *args)
        return evaluate(step, state, *args) | {"test_loss": float("nan")}

    monkeypatch.setattr(training, "evaluate", spoilt)
    with pytest.raises(errors.UserError, match="the loss or a parameter is not finite at step 8"):
        train.train(train.Config(**finished[1], run_dir=tmp_path / "run"), brief=True)


# Disks.


def in_namespace(script, tmp_path):
    """Runs a shell script that may mount things; nothing of that is seen outside."""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-euc", script]
    if not shutil.which("unshare") or subprocess.run([*command[:-1], "true"]).returncode != 0:
        pytest.skip("needs Linux with user namespaces")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    # Threads that a save leaves behind when it fails may tell of it, on their own.
    assert train.__file__ not in result.stderr, result.stderr
    return result


def command(folder, data_dir, *more):
    flags = ["--model", "vit_mini/4", "--epochs", "2", "--batch-size", "640"]
    flags += ["--run-dir", str(folder), "--data-dir", str(data_dir), *more]
    return shlex.join([sys.executable, train.__file__, *flags])


# By the size of the disk: what is reported, how the run goes on, and what is left until then.
FULL = {
    "900k": (
        "the checkpoint of step 2 could not .*: it takes 1.* MB, and 0.* MB are free",
        "start again.",
        "",
    ),
    "1600k": (  # What is free depends on how far the first checkpoint has been tidied up.
        "the (last checkpoint|checkpoint of step 4) could not .*: (RESOURCE_EXHAUSTED|it takes)",
        "--resume goes on from step 2.",
        r" 2( 4\.orbax-checkpoint-tmp\S*)?",  # What is not complete goes with the next start.
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", FULL)
def test_a_full_disk(tmp_path, data_dir, monkeypatch, size):
    monkeypatch.setenv("XLA_FLAGS", "")
    data.load("digits", data_dir)
    (tmp_path / "disk").mkdir()
    train_there = command("disk/run", data_dir, "--resume")
    script = f"""
        mount -t tmpfs -o size={size} none disk
        {train_there} || echo first $?
        echo left $(ls disk/run/checkpoints)
        mount -o remount,size=100m disk
        {train_there}
        cp -r disk/run kept
        {command("whole", data_dir)}
    """
    message, way_on, left = FULL[size]
    result = in_namespace(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert f"When that is mended, {way_on}" in result.stderr
    assert re.search(rf"first 1\nleft{left}\n", result.stdout), result.stdout
    assert_same_runs(tmp_path / "kept", tmp_path / "whole", data_dir)


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
def test_a_disk_that_is_read_only(tmp_path, data_dir, resume):
    data.load("digits", data_dir)
    (tmp_path / "disk").mkdir()
    script = f"""
        mount -t tmpfs -o ro none disk
        {command("disk/run", data_dir, *resume)}
    """
    result = in_namespace(script, tmp_path)
    assert result.returncode == 1
    assert "error: --run-dir disk/run cannot be used: [Errno 30] Read-only" in result.stderr


# Data sets.


class Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A few images in the files of CIFAR-10, as TensorFlow would encode them."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
        text, label = tfds.features.Text(), tfds.features.ClassLabel(num_classes=10)
        features = tfds.features.FeaturesDict({"id": text, "image": text, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(20) for split in ("train", "test")}

    def _generate_examples(self, number):
        rng = np.random.default_rng(0)
        for i in range(number):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(file, "PNG")
            yield i, {"id": str(i), "image": self.spoil(i, file.getvalue()), "label": i % 10}

    def spoil(self, i, encoded):
        return encoded


def write_images(folder, builder=Images):
    builder = builder(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    tfds.builder("cifar10").info.features.save_config(builder.data_path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    tfds.disable_progress_bar()
    return write_images(tmp_path_factory.mktemp("images"))


def read_everything(name, folder, workers=0):
    dataset = data.load(name, folder)
    batches = data.train_batches(dataset, 10, seed=0, workers=workers)
    with contextlib.closing(batches):
        for _ in range(data.batches_per_epoch(dataset, 10)):
            next(batches)
    return len(list(data.test_batches(dataset, 10)))


def of_set(pattern, change):
    """Changes all files of a prepared set that fit a pattern; None removes them."""

    def damage(folder):
        files = [file for file in folder.rglob(pattern) if file.is_file()]
        assert files
        for file in files:
            content = change(file.read_bytes())
            file.unlink() if content is None else file.write_bytes(content)

    return damage


def in_format(name, alternatives=()):
    """As TensorFlow Datasets would have prepared the set in another format of files."""

    def change(folder):
        (file,) = folder.rglob("dataset_info.json")
        formats = {"fileFormat": name, "alternativeFileFormats": alternatives}
        file.write_text(json.dumps(json.loads(file.read_text()) | formats))
        for x in folder.rglob("*array_record*"):
            if "array_record" not in alternatives:
                x.rename(x.with_name(x.name.replace("array_record", name)))

    return change


def rename(name):
    return lambda folder: (folder / "cifar10/3.0.2").rename(folder / "cifar10" / name)


UNPREPARED = "'cifar10' in .*: is not prepared; prepare it once with"
OF_SET = "'cifar10' in .*; prepare it in another folder with 'pip install tensorflow-cpu' and"
OF_FORMAT = "its format, {}, has no random access; .* 'tfds convert_format --dataset_version_dir="
DATA_FAULTS = {
    "missing": (lambda folder: shutil.rmtree(folder / "cifar10"), UNPREPARED),
    "half-prepared": (rename("incomplete.ABCDEF_3.0.2"), UNPREPARED),
    "an older version": (rename("1.0.0"), UNPREPARED),
    "a newer version": (rename("4.0.0"), UNPREPARED),
    "no version": (rename("abc"), UNPREPARED),
    "information is no JSON": (of_set("dataset_info.json", lambda x: b"{"), OF_SET),
    "information is empty": (of_set("dataset_info.json", lambda x: b""), OF_SET),
    "information is missing": (of_set("dataset_info.json", lambda x: None), UNPREPARED),
    "information of another set": (of_set("dataset_info.json", lambda x: b"{}"), OF_SET),
    "files are missing": (of_set("*array_record*", lambda x: None), OF_SET),
    "test files are missing": (of_set("*test.array_record*", lambda x: None), OF_SET),
    "files are empty": (of_set("*array_record*", lambda x: b""), OF_SET),
    "files are cut": (of_set("*array_record*", lambda x: x[: len(x) // 2]), OF_SET),
    "files are something else": (of_set("*array_record*", lambda x: b"PK" * 5000), OF_SET),
    "flipped bits": (of_set("*array_record*", flip_often), "cannot be read|prepare it in another"),
    "TFRecord files": (in_format("tfrecord"), OF_FORMAT.format("tfrecord")),
    "Riegeli files": (in_format("riegeli"), OF_FORMAT.format("riegeli")),
}


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_a_data_folder(images, tmp_path, name):
    folder = shutil.copytree(images, tmp_path / "data")
    assert read_everything("cifar10", folder) == 2
    damage, message = DATA_FAULTS[name]
    damage(folder)
    with pytest.raises(errors.UserError, match=message) as caught:
        read_everything("cifar10", folder)
    assert not re.search(r"\n|\bremove\b|\bdelete\b", str(caught.value))


def test_a_data_folder_that_cannot_be_prepared_again(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "data")
    in_format("tfrecord")(folder)
    with pytest.raises(errors.UserError, match="its format, tfrecord, has no random access"):
        data.prepare("cifar10", folder)
    of_set("dataset_info.json", lambda x: b"{")(folder)
    with pytest.raises(errors.UserError, match="its description cannot be read"):
        data.prepare("cifar10", folder)


def test_formats_with_random_access_are_read(images, tmp_path):
    tfds.disable_progress_bar()
    builder = Images(data_dir=tmp_path, file_format="parquet")
    builder.download_and_prepare()
    tfds.builder("cifar10").info.features.save_config(builder.data_path)
    assert read_everything("cifar10", tmp_path) == 2
    converted = shutil.copytree(images, tmp_path / "converted")
    in_format("tfrecord", ["array_record"])(converted)  # As `tfds convert_format` leaves it.
    assert read_everything("cifar10", converted) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"test_split": "validation"}, "no validation"), ({"test_split": "train"}, "no label")],
    ids=["split", "feature"],
)
def test_a_set_without_what_its_entry_says(images, tmp_path, monkeypatch, changes, message):
    folder = shutil.copytree(images, tmp_path / "data")
    if message == "no label":
        of_set("features.json", lambda x: x.replace(b'"label"', b'"coarse"'))(folder)
        monkeypatch.setattr(tfds, "builder", lambda *_, **__: from_folder(folder))
    entry = data.PREPROCESSING["cifar10"]._replace(**changes)
    monkeypatch.setitem(data.PREPROCESSING, "cifar10", entry)
    with pytest.raises(errors.UserError, match=f"'cifar10' has {message}; change its entry in"):
        data.load("cifar10", folder)


def from_folder(folder):
    return tfds.builder_from_directory(folder / "cifar10/3.0.2")


IMAGE_FAULTS = {
    "half of an image": lambda x: x[: len(x) // 2],
    "flipped bits": flip,
    "no image": lambda x: b"GET / HTTP/1.1",
    "empty": lambda x: b"",
    "the first bytes alone": lambda x: x[:20],
}


@pytest.mark.parametrize(
    ("name", "workers"),
    [(name, 0) for name in IMAGE_FAULTS]
    + [
        pytest.param(name, 1, marks=[] if name == "flipped bits" else [pytest.mark.slow])
        for name in IMAGE_FAULTS
    ],
)
def test_an_image(tmp_path, name, workers):
    class Spoiled(Images, skip_registration=True):
        name = "cifar10"

        def spoil(self, i, encoded):
            return IMAGE_FAULTS[name](encoded) if i == 7 else encoded

    tfds.disable_progress_bar()
    folder = write_images(tmp_path, Spoiled)
    message = r"train image \d+ of cifar10 cannot be read: .*; prepare the set again, in another"
    with pytest.raises(errors.UserError, match=message):
        read_everything("cifar10", folder, workers)


# Flags.


class AcceptedError(Exception):
    """Training would have begun."""


NASTY = ["", " ", "-1", "0", "0.5", "1e400", "nan", "inf", "-inf", "abc", "None", "None None"]
NASTY += ["9" * 40, "\u0663", "\U0001f4a5", "--", "../..", "'; true #", "a=b", "%s", "\\x00", "*"]
PROCESSES = ("distributed", "coordinator", "process_count", "process_id")
SWITCHES = ("skip_dropped", "resume", "keep_partial_batch", "standardise")
SWITCHES += ("go_on_if_not_finite",)
FLAGS = [field.name for field in dataclasses.fields(train.Config)]


@pytest.mark.parametrize("name", sorted({*FLAGS} - {*PROCESSES} - {*SWITCHES}))
def test_a_flag(monkeypatch, capsys, tmp_path, data_dir, name):
    """Every value is taken or explained."""

    def begin(*args, **kwargs):
        raise AcceptedError

    monkeypatch.setitem(models.vit.VITS, "vit_nano", (16, 1, 2))
    # The run folder is made if that is what the flag is about.
    late = name in ("run_dir", "exempt", "seed")
    monkeypatch.setattr(*((data, "train_batches") if late else (run_folder, "Run")), begin)
    data.load("digits", data_dir)
    explained = 0
    for i, value in enumerate(NASTY):
        folder = tmp_path / str(i) / "a" / "b"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        flags = ["--model", "vit_nano/4", "--batch-size", "160", "--data-dir", str(data_dir)]
        flag = f"--{name.replace('_', '-')}"
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"{flag}={value}"])
        capsys.readouterr()
        with pytest.raises((AcceptedError, SystemExit)) as caught:
            train.main()
        if caught.type is AcceptedError:
            continue
        explained += 1
        shown = capsys.readouterr().err
        if caught.value.code == 2:
            assert flag in shown, value
        else:
            message = str(caught.value)
            assert message.startswith("error: ") and "Traceback" not in message
            assert "\n" not in message or name == "exempt", value  # That lists the leaves.
    # Any word is a folder, but for the empty one in some places.
    assert explained >= 2 or name in ("run_dir", "data_dir")


ADDRESSES = [
    "abc",
    "a:b",
    "",
    ":1",
    "a:",
    "a:0",
    "a:65536",
    "a:-1",
    "a:\u0663",
    "a b:1",
    "::1:1234",
]
ADDRESSES += ["[::1]", "[::1:1", "http://a:1", "a:1/", "a:" + "9" * 40]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "127.0.0.1:1"], "--process-count and --process-id"),
        (["--process-id", "0"], "--coordinator"),
        *(
            (["--coordinator", x, "--process-count", "2", "--process-id", "0"], "HOST:PORT")
            for x in ADDRESSES
        ),
        (
            ["--coordinator", "no-host.invalid:1234", "--process-count", "2", "--process-id", "0"],
            "--coordinator no-host.invalid:1234 does not answer",
        ),
        (
            ["--coordinator", "a:1", "--process-count", "0", "--process-id", "0"],
            "--process-count 0",
        ),
        (["--coordinator", "a:1", "--process-count", "2", "--process-id", "2"], "--process-id 2"),
        (["--coordinator", "a:1", "--process-count", "2", "--process-id", "-1"], "--process-id -1"),
        (["--coordinator", "127.0.0.1:1", "--process-count", "2", "--process-id", "1"], "answer"),
        (["--distributed", "always"], "jax.distributed did not start"),
        (
            ["--distributed", "never", "--coordinator", "a:1", "--process-count", "2"]
            + ["--process-id", "0"],
            "--distributed never forbids it",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_flags_of_processes(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    monkeypatch.setattr(processes, "START", 0.5)
    with pytest.raises(SystemExit) as caught:
        train.main()
    code, passes = caught.value.code, "answer" in message  # Process 0 may only be late.
    shown = capsys.readouterr().err if passes else code
    assert re.match(f"error: .*{message}", shown)
    assert (code == processes.LOST) == passes
