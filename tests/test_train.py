"""The training script: learning, resuming, stopping, and what it says to mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, strategies as st
from stored_runs import assert_same_runs, final_state, metrics

import data
import display
import errors
import methods
import models.resnet
import models.vit
import processes
import run_folder
import train
import training
from epochs import Epochs, SaveTimes

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")

SCRIPT = Path(train.__file__)
METHODS = tuple(methods.METHODS)
SIMILAR = ("cdb_after", "algorithm_1", "released", "dropout", "skip_update", "backdrop", "none")
WITHOUT_POLICY = ("none", "dropout", "backdrop", "stochastic_depth")
WITHOUT_POLICY += ("drop_path_subset", "drop_backward")


@pytest.fixture(autouse=True)
def nano_models(monkeypatch):
    """Models that compile in a moment."""
    monkeypatch.setitem(models.vit.VITS, "vit_nano", (16, 1, 2))
    block = models.resnet.BasicBlock
    monkeypatch.setitem(models.resnet.RESNETS, "resnet_nano", models.resnet.Size(block, (1,), 8))


@pytest.fixture
def config(tmp_path, data_dir):
    def make(**changes):
        settings = dict(model="vit_nano/4", epochs=2, batch_size=160, run_dir=tmp_path / "run")
        return train.Config(**(settings | {"data_dir": data_dir} | changes))

    return make


def interrupt(monkeypatch, step, number=signal.SIGINT):
    """Sends a signal while the given step (from 0) is being prepared."""
    original, calls = training.distribute, []

    def distribute(batch, mesh):
        if "weight" not in batch:  # Evaluation is not counted.
            calls.append(1)
            if len(calls) == step + 1:
                signal.raise_signal(number)
        return original(batch, mesh)

    monkeypatch.setattr(training, "distribute", distribute)


def test_few_steps_wait_for_a_slow_device(config, monkeypatch):
    """So that a run that is asked to stop does not have to wait for many steps."""
    make_steps, begun, finished, waiting = train.make_steps, [], [], []

    def finish(x):
        time.sleep(0.05)
        finished.append(1)
        return x

    @jax.jit
    def slowly(x):
        return jax.pure_callback(finish, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def make_slow_steps(*arguments):
        train_step, eval_step = make_steps(*arguments)

        def slow_train_step(*arguments):
            begun.append(1)
            state, metrics = train_step(*arguments)
            metrics = metrics | {"train_loss": slowly(metrics["train_loss"])}
            waiting.append(len(begun) - len(finished))
            return state, metrics

        return slow_train_step, eval_step

    monkeypatch.setattr(train, "make_steps", make_slow_steps)
    train.train(config(epochs=1))
    assert len(begun) == len(finished) == 8 and max(waiting) <= 3


@pytest.mark.parametrize(
    "method",
    [
        # The slow ones differ from another one in a setting of the policy alone.
        pytest.param(name, marks=[pytest.mark.slow] * (name in SIMILAR))
        for name in METHODS
    ],
)
def test_every_method_learns(config, method, capsys):
    rows = train.train(config(method=method, epochs=3, learning_rate=1e-2))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < 2.4
    assert rows[-1]["test_accuracy"] > 0.2
    dropped = [row["dropped_fraction"] for row in rows]
    if method in WITHOUT_POLICY:
        assert dropped == [0.0] * 3
        assert "channel axis" not in capsys.readouterr().out
    else:
        assert 0 < max(dropped) < 0.8
        if method == "layer_drop_back":
            assert dropped[0] == dropped[1] == 0.0
        assert "channel axis" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.5, "channel_choice": "window", "model": "resnet_nano"},
        pytest.param(
            {"rate": 1.0, "layer_rate": 0.5, "optimizer": "sgd", "learning_rate": 1e-2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"rate": 0.5, "channel_choice": "exact", "method": "algorithm_1"},
            marks=pytest.mark.slow,
        ),
        {"rate": 0.5, "channel_choice": "window", "method": "cdb_frozen"},
        pytest.param({"method": "layer_drop_back"}, marks=pytest.mark.slow),
    ],
    ids=["window", "layers", "algorithm_1", "frozen", "layer_drop_back"],
)
def test_skipping_trains_as_masking_does(config, tmp_path, changes):
    runs = [
        train.train(config(run_dir=tmp_path / str(skip), skip_dropped=skip, **changes), brief=True)
        for skip in (False, True)
    ]
    for masked, skipped in zip(*runs, strict=True):
        assert skipped["dropped_fraction"] == masked["dropped_fraction"]
        for name in ("train_loss", "test_loss"):
            np.testing.assert_allclose(skipped[name], masked[name], rtol=0.01)


def test_layer_drop_back_doubles_the_learning_rate_on_epochs_with_dropping(config):
    params = {"kernel": jnp.ones((2, 2))}
    settings = dict(optimizer="sgd", weight_decay=0.0, rate=0.0)
    plain = methods.make_optimizer(config(method="none", **settings), None, Epochs(4, 10))
    doubling = config(method="layer_drop_back", exempt=(), **settings)
    policy = methods.make_policy(doubling, Epochs(4, 10))
    tx = methods.make_optimizer(doubling, policy, Epochs(4, 10))
    state, plain_state, factors = tx.init(params), plain.init(params), []
    for _ in range(40):
        updates, state = tx.update(params, state, params)
        expected, plain_state = plain.update(params, plain_state, params)
        factors.append(float(updates["kernel"][0, 0] / expected["kernel"][0, 0]))
    # The warm-up starts from a rate of 0.
    np.testing.assert_allclose(factors[1:], ([1] * 20 + [2] * 10 + [1] * 10)[1:], 1e-5)


@pytest.mark.parametrize(
    ("policy", "factor"), [("double", 2.0), ("fixed", 1.0), ("relative", 1 / 0.6)]
)
def test_the_learning_rate_of_larger_batches_follows_epochs(config, policy, factor):
    """Steps of an epoch with joined batches go as far along the schedule as its batches do."""
    settings = dict(rate=0.4, drop_epoch_batch=3, drop_epoch_learning_rate=policy)
    given = config(method="layer_drop_back", **settings)
    epochs = Epochs(5, 7, joined=3)
    found = methods.with_drop_epochs(lambda batches: 100.0 - batches, given, epochs)
    values = [float(found(step)) for step in range(epochs.total_steps)]
    expected = []
    for epoch in range(5):
        joined = epoch in (2, 4)
        for i in range(2 if joined else 7):
            done = 7 * epoch + (3.5 * i if joined else i)
            expected.append((100 - done) * (factor if joined else 1.0))
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_metrics_show_the_held_period(config, capsys):
    rows = train.train(config(method="cdb_compact", hold=5))  # Epochs of 8 steps.
    assert [row["step"] for row in rows] == [8, 16]
    assert [row["held_period"] for row in rows] == [1, 3]
    assert "held period 3" in capsys.readouterr().out
    assert "held_period" not in train.train(config(run_dir=config().run_dir / "b"))[0]


@given(count=st.integers(1, 7), batches=st.integers(1, 9), joined=st.integers(1, 4))
def test_epochs(count, batches, joined):
    """Against a list of the batches of all steps."""
    epochs = Epochs(count, batches, min(joined, batches))
    steps, first = [], 0
    for epoch in range(count):
        size = epochs.joined if epoch in (2, 4, 6) else 1
        steps += [(epoch, first + size * i) for i in range(batches // size)]
        first += batches
    assert epochs.total_steps == len(steps)
    for step, (epoch, before) in enumerate(steps):
        assert (epochs.epoch_of(step), epochs.batches_before(step)) == (epoch, before)
    assert epochs.epoch_of(len(steps)) == count
    assert epochs.batches_before(len(steps)) == first

    read = iter(range(first))
    loader = ({"label": np.array([i])} for i in read)
    for epoch in range(count):
        step = epochs.start(epoch)
        for batch in training.epoch_batches(loader, epochs, epoch, step):
            before = steps[step][1]
            np.testing.assert_array_equal(
                batch["label"], before + np.arange(epochs.batches_in_step(epoch))
            )
            step += 1
    assert next(read, None) is None


@pytest.mark.slow
def test_a_run_with_larger_batches_goes_on_from_any_step(config, tmp_path, monkeypatch):
    settings = dict(method="layer_drop_back", epochs=4, drop_epoch_batch=3, batch_size=320)
    settings |= dict(keep_partial_batch=True)  # 5 batches: 2 steps of three, and two left out.
    whole = train.train(config(**settings, run_dir=tmp_path / "whole"), brief=True)
    assert [row["step"] for row in whole] == [5, 10, 11, 16]
    interrupt(monkeypatch, 10)
    with pytest.raises(processes.StoppedError):
        train.train(config(**settings), brief=True)
    resumed = train.train(config(**settings, resume=True), brief=True)
    for a, b in zip(whole, resumed, strict=True):
        for name in ("step", "train_loss", "test_loss", "dropped_fraction"):
            assert a[name] == b[name], name


def test_dropped_blocks_are_not_computed(config, tmp_path):
    runs = [
        train.train(
            config(method="stochastic_depth", skip_dropped=skip, run_dir=tmp_path / str(skip)),
            brief=True,
        )
        for skip in (False, True)
    ]
    for masked, skipped in zip(*runs, strict=True):
        np.testing.assert_allclose(skipped["train_loss"], masked["train_loss"], rtol=0.01)


@pytest.mark.parametrize(
    ("model", "methods_of"),
    [
        (
            "vit_nano/4",
            ("none", "cdb_frozen", "backdrop", "stochastic_depth"),
        ),
        pytest.param("vit_nano/4", ("none", "cdb", "skip_update"), marks=pytest.mark.slow),
        pytest.param("resnet_nano", set(METHODS) - {"layer_drop_back"}, marks=pytest.mark.slow),
    ],
    ids=["vit", "vit, masks", "resnet"],
)
def test_rate_zero_trains_bit_for_bit_as_none_does(config, tmp_path, data_dir, model, methods_of):
    """All but layer_drop_back, which doubles the learning rate too."""
    params = {}
    for method in methods_of:
        folder = tmp_path / method
        settings = dict(method=method, rate=0.0, epochs=1, batch_size=640, run_dir=folder)
        train.train(config(model=model, **settings), brief=True)
        _, leaves = final_state(folder, data_dir)
        params[method] = {
            path: leaf.tobytes() for path, leaf in leaves.items() if path.startswith(".params")
        }
        assert 0 < len(params[method]) < len(leaves)
    for method in params:
        assert params[method] == params["none"], method


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "resnet_nano"},
        {"model": "resnet_nano", "dtype": "bfloat16", "optimizer": "sgd"},
        {"optimizer": "lamb", "learning_rate": 1e-2, "clip_norm": 1.0, "mixup": 0.2, "cutmix": 1.0},
        pytest.param(
            {"dtype": "bfloat16", "channel_choice": "window", "layer_rate": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_settings_train_too(config, changes):
    rows = train.train(config(**changes))
    assert [row["epoch"] for row in rows] == [1, 2] and [row["step"] for row in rows] == [8, 16]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.parametrize(
    "step, number, changes",
    [
        (3, signal.SIGINT, {"method": "cdb", "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}),
        pytest.param(11, signal.SIGTERM, {"method": "dropout"}, marks=pytest.mark.slow),
        pytest.param(
            7,
            signal.SIGINT,
            {"model": "resnet_nano", "method": "cdb_after"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    config, tmp_path, data_dir, monkeypatch, step, number, changes
):
    train.train(config(run_dir=tmp_path / "whole", **changes))

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt(patch, step, number)
        with pytest.raises(processes.StoppedError, match=f"saved at step {step + 1}$") as caught:
            train.train(config(**changes))
    assert caught.value.signal == number
    assert signal.getsignal(number) is handler
    train.train(config(resume=True, **changes))
    assert_same_runs(tmp_path / "run", tmp_path / "whole", data_dir)


@pytest.mark.parametrize("step", [8, 16])
def test_a_run_stopped_in_an_evaluation_goes_on_with_it(
    config, tmp_path, data_dir, monkeypatch, step
):
    """And it is saved at once."""
    train.train(config(run_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        evaluate = training.evaluate

        def interrupted(*args):
            if len(rows_of(tmp_path / "run")) + 1 == step // 8:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)  # Schedulers repeat themselves.
            return evaluate(*args)

        patch.setattr(training, "evaluate", interrupted)
        with pytest.raises(processes.StoppedError, match=f"saved at step {step}$"):
            train.train(config())
    assert len(rows_of(tmp_path / "run")) == step // 8 - 1
    rows = train.train(config(resume=True))
    assert rows[step // 8 - 1]["images_per_second"] is None
    assert_same_runs(tmp_path / "run", tmp_path / "whole", data_dir)


def rows_of(folder):
    return metrics(folder) if (folder / "metrics.jsonl").exists() else []


def test_an_error_of_the_loader_during_a_stop_is_that_stop(config, monkeypatch):
    original = data.train_batches

    class Broken:
        def __init__(self, *args, **kwargs):
            self._batches = original(*args, **kwargs)
            self._read = 0

        def __next__(self):
            self._read += 1
            if self._read == 4:
                signal.raise_signal(signal.SIGTERM)
                raise RuntimeError("a worker was killed")
            return next(self._batches)

        def close(self):
            self._batches.close()

    monkeypatch.setattr(data, "train_batches", Broken)
    with pytest.raises(processes.StoppedError, match="saved at step 3$") as caught:
        train.train(config())
    assert caught.value.signal == signal.SIGTERM


def test_checkpoints_between_epochs(config, tmp_path, data_dir, monkeypatch):
    """A run that is killed goes on from the last of them."""
    train.train(config(run_dir=tmp_path / "whole"))
    saved = []
    with monkeypatch.context() as patch:
        save = run_folder.Run.save

        def save_or_die(run, step, state, **given):
            if step == 15:
                raise KeyboardInterrupt
            save(run, step, state, **given)
            saved.append(step)

        patch.setattr(run_folder.Run, "save", save_or_die)
        with pytest.raises(KeyboardInterrupt):
            train.train(config(save_every="3", keep=3))
    assert saved == [3, 6, 8, 9, 12]
    kept = {int(x.name) for x in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {8, 9, 12}
    train.train(config(resume=True))
    assert_same_runs(tmp_path / "run", tmp_path / "whole", data_dir)


def test_minutes_between_checkpoints(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    times = SaveTimes("2m")
    due = []
    for step in range(1, 11):
        now[0] += 50.0
        if times.is_due(step):
            due.append(step)
            times.saved()
    assert due == [3, 6, 9]
    assert not any(SaveTimes(None).is_due(step) for step in range(100))


def test_a_run_killed_before_its_checkpoint_repeats_the_lost_epoch(
    config, tmp_path, data_dir, monkeypatch
):
    train.train(config(run_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        # The second epoch is logged, and then the process dies before anything is saved.
        save = run_folder.Run.save

        def save_early(run, step, state, **given):
            if step < 16:
                save(run, step, state, **given)

        patch.setattr(run_folder.Run, "save", save_early)
        train.train(config())
    assert final_state(tmp_path / "run", data_dir)[0] == 8
    assert len(train.train(config(resume=True))) == 2
    assert_same_runs(tmp_path / "run", tmp_path / "whole", data_dir)


def test_a_finished_run_is_not_trained_again(config):
    rows = train.train(config())
    assert train.train(config(resume=True)) == rows


def test_resume_without_a_run_starts_one(config):
    assert len(train.train(config(resume=True, epochs=1))) == 1


def test_one_device_and_eight_learn_the_same(config, tmp_path, monkeypatch):
    eight = train.train(config(model="resnet_nano"))
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    monkeypatch.setattr(training, "make_mesh", lambda axes, batch_size: mesh)
    one = train.train(config(model="resnet_nano", run_dir=tmp_path / "one"))
    assert eight[-1]["dropped_fraction"] == one[-1]["dropped_fraction"]
    # Sums in another order; batch statistics are those of the whole batch in both.
    for name in ("train_loss", "test_loss"):
        assert abs(eight[-1][name] - one[-1][name]) < 1e-3


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("vit_nano/4", "cdb_frozen"),
        pytest.param("resnet_nano", "cdb", marks=pytest.mark.slow),
    ],
)
def test_sharded_parameters_learn_the_same(config, tmp_path, model, method):
    runs = {}
    for mesh in ("", "data=4,fsdp=2"):
        folder = tmp_path / f"mesh {mesh}"
        settings = dict(model=model, method=method, mesh=mesh, run_dir=folder, epochs=1)
        skips = dict(skip_dropped=True, channel_choice="window")
        runs[mesh] = train.train(config(**settings, **skips), brief=True)
    for rows in runs.values():
        for row, expected in zip(rows, runs[""], strict=True):
            for name in ("train_loss", "test_loss"):
                np.testing.assert_allclose(row[name], expected[name], rtol=0.02)
            assert row["dropped_fraction"] == expected["dropped_fraction"]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(config, tmp_path, monkeypatch):
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    rows = train.train(config(run_dir=alone), brief=True)
    interrupt(monkeypatch, 11)
    with pytest.raises(processes.StoppedError):
        train.train(config(run_dir=moved, mesh="data=2,fsdp=4"), brief=True)
    monkeypatch.undo()
    monkeypatch.setitem(models.vit.VITS, "vit_nano", (16, 1, 2))
    again = train.train(config(run_dir=moved, resume=True, mesh="fsdp=8"), brief=True)
    for row, expected in zip(again, rows, strict=True):
        np.testing.assert_allclose(row["test_loss"], expected["test_loss"], rtol=0.02)


def test_large_arrays_are_split_and_small_ones_are_not():
    mesh = training.make_mesh("data=4,fsdp=2", 8)
    shapes = {"bias": (64,), "kernel": (32, 64), "odd": (3, 1024), "conv": (3, 3, 64, 64)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: tuple(x.spec) for name, x in training.shardings(mesh, tree).items()}
    assert specs == {
        "bias": (None,),
        "kernel": ("fsdp", None),
        "odd": (None, "fsdp"),
        "conv": (None, None, "fsdp", None),
    }


def test_evaluation_is_the_mean_over_the_test_set(config, data_dir):
    dataset = data.load("digits", data_dir)
    model = models.create("vit_nano/4", num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(0), (16, 10))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    _, eval_step = train.make_steps(
        config(), model, optax.identity(), None, train.Pixels(16, 0.5, 0.5)
    )
    state = train.State(params, rest, opt_state=None, sums={})
    mesh = training.make_mesh("", 96)  # Not a divisor of 500.
    found = training.evaluate(eval_step, state, dataset, 96, mesh, {})

    images = np.stack([record["image"] for record in dataset.test]).astype(np.float32)
    labels = np.array([record["label"] for record in dataset.test])
    logits = model(jnp.asarray(images / 8 - 1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert found["test_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).mean()))


def test_the_step_is_compiled_once(config, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train.train(config())
    compiled = [m for m in caplog.messages if m.startswith("Compiling") and "train_step" in m]
    assert len(compiled) == 1


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    train.main()


def test_the_command_leaves_table_plot_metrics_and_settings(
    monkeypatch, capsys, tmp_path, data_dir
):
    folder = tmp_path / "run"
    run_main(
        monkeypatch,
        *("--model", "vit_nano/4", "--epochs", 1, "--batch-size", 160),
        *("--run-dir", folder, "--data-dir", data_dir),
    )
    shown = capsys.readouterr().out
    assert "epoch 1/1" in shown and "test accuracy" in shown and "dropped 3" in shown
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    (row,) = metrics(folder)
    assert row["epoch"] == 1 and row["step"] == 8
    assert 0 < row["test_accuracy"] < 1 and row["images_per_second"] > 0
    assert json.loads((folder / "settings.json").read_text())["method"] == "cdb"


MISTAKES = [
    (
        ["--method", "released", "--layer-rate", "0.5"],
        "--layer-rate has no meaning for --method released; leave it out",
    ),
    (["--method", "none", "--exempt", "stem"], "--exempt has no meaning for --method none"),
    (["--model", "vgg"], "unknown model 'vgg'; choose one of resnet_small"),
    (
        ["--model", "resnet_nano", "--method", "stochastic_depth", "--skip-dropped"],
        "--skip-dropped: convolutions that may be left out run many times slower on CPU",
    ),
    (["--model", "foo", "--method", "stochastic_depth"], "unknown model 'foo'; choose one of"),
    (["--model", "vit_nano/3"], "patch_size=3 does not divide images of 8x8"),
    (["--rate", "1.5"], "--rate 1.5 must be a probability between 0 and 1"),
    (["--rate", "nan"], "--rate nan must be a probability"),
    (["--skip-dropped"], "--skip-dropped needs --channel-choice window, chunk or exact"),
    (["--method", "cdb_after", "--skip-dropped"], "--method cdb_after cannot save work; these"),
    (["--layer-rate", "-0.1"], "layer_rate must be .*got -0.1"),
    (["--method", "dropout", "--rate", "2"], "--rate 2.0 must be a probability"),
    (["--exempt", "hed"], "exempt: the pattern 'hed' matches none of the paths"),
    (["--batch-size", "4096"], "--batch-size 4096 is more than the 1297 training images"),
    (["--batch-size", "12"], "--batch-size 12 cannot be divided among 8 devices"),
    (["--batch-size", "0"], "--batch-size 0 must be positive"),
    (["--mesh", "data=3"], "--mesh data=3 has room for 3 devices, and there are 8"),
    (["--mesh", "model=8"], "--mesh model=8 must name the axes data and fsdp"),
    (["--mesh", "data"], "--mesh data must name the axes"),
    (["--mesh", "data=8,fsdp=0"], "--mesh data=8,fsdp=0 must name the axes"),
    (["--epochs", "-1"], "--epochs -1 must be positive"),
    (["--learning-rate", "0"], "--learning-rate 0.0 must be positive"),
    (["--seed", "-1"], "--seed -1 must be at least 0"),
    (["--image-size", "-8"], "--image-size -8 must be 1 to 4096"),
    (["--image-size", "10"], "patch_size=4 does not divide images of 10x10"),
    (["--weights", "w.npz"], "--weights w.npz: there is no such file"),
    (["--weights", "w.pth"], "--weights w.pth: vit_nano/4 takes a .npz file"),
    (["--dataset", "cifar10"], "data set 'cifar10' in .* is not prepared; prepare it once with"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, message", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES]
)
def test_a_mistake_gets_one_clear_line(monkeypatch, tmp_path, data_dir, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run_main(
            monkeypatch,
            *("--model", "vit_nano/4", "--run-dir", tmp_path / "run", "--data-dir", data_dir),
            *arguments,
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments",
    [["--methd", "cdb"], ["--method", "cbd"], ["--epochs", "many"], ["--rate"]],
    ids=" ".join,
)
def test_a_wrong_flag_is_named(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_explains_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for field in train.dataclasses.fields(train.Config):
        assert "--" + field.name.replace("_", "-") in shown
    assert all(f"{method}:" in shown for method in METHODS)


@pytest.mark.bad_input
class TestRunFolder:
    def test_a_run_is_not_overwritten(self, config):
        train.train(config(epochs=1))
        with pytest.raises(errors.UserError, match="holds a run; go on with --resume, or choose"):
            train.train(config(epochs=1))

    def test_a_checkpoint_of_another_model(self, config):
        train.train(config(epochs=1))
        message = r"holds a run with --model vit_nano/4 \(now resnet_nano\), --rate 0.3 \(now 0.1\)"
        with pytest.raises(errors.UserError, match=message):
            train.train(config(epochs=1, resume=True, model="resnet_nano", rate=0.1))

    def test_settings_that_an_earlier_release_did_not_have(self, config, tmp_path):
        train.train(config(epochs=1))
        file = tmp_path / "run/settings.json"
        settings = json.loads(file.read_text())
        del settings["schedule"], settings["weights"], settings["image_size"]
        file.write_text(json.dumps(settings))
        message = r"holds a run with --image-size None \(now 16\), --schedule cosine \(now step\);"
        with pytest.raises(errors.UserError, match=message):
            train.train(config(epochs=1, resume=True, schedule="step", image_size=16))
        assert len(train.train(config(epochs=1, resume=True))) == 1

    def test_a_folder_that_cannot_be_made(self, config, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(errors.UserError, match="--run-dir .*file cannot be used"):
            train.train(config(run_dir=tmp_path / "file"))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves_and_leaves_quietly(tmp_path, data_dir):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--model", "vit_mini/4", "--epochs", "1000"]
        + ["--run-dir", tmp_path / "run", "--data-dir", data_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in shown and "Traceback" not in errors
    step, _ = final_state(tmp_path / "run", data_dir)
    assert f"saved at step {step};" in shown


@pytest.mark.slow
def test_workers_leave_a_stop_of_the_process_group_to_the_script(tmp_path, data_dir):
    """Ctrl-C reaches the whole group; a scheduler adds signals until all have ended."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--model", "vit_mini/4", "--epochs", "1000", "--workers", "1"]
        + ["--run-dir", tmp_path / "run", "--data-dir", data_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.killpg(process.pid, number)
        time.sleep(0.05)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert shown.count("go on with --resume") == 1 and errors == ""
    step, _ = final_state(tmp_path / "run", data_dir)
    assert f"saved at step {step};" in shown


def test_intervals_over_seeds():
    # t(0.975, 2) = 4.3027, standard error = 1 / sqrt(3).
    mean, half = display.mean_interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0 and half == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert display.percent(np.array([0.5])) == "50.00"
