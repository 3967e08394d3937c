"""The demo: what is compared, and that it continues."""

import json
import sys

import numpy as np
import pytest

import demo
import models
from demo import BASELINE, LABELS, METHODS, Demo
from errors import UserError
from models.resnet import BasicBlock, Size

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")


@pytest.fixture
def results():
    """Made-up results of one family: every method is a little worse and a little faster."""
    found = {}
    for i, method in enumerate(METHODS):
        found[method] = {labels: [0.9 - i / 100, 0.8 - i / 100] for labels in LABELS}
    costs = {}
    for i, method in enumerate(METHODS):
        seconds = [(1 - i / 10) * x for x in (1.0, 3.0)]
        costs[method] = dict(memory=8 - i, temporaries=4.0, compilation=2.0, seconds=seconds)
    return found | {"costs": costs}


def test_figures_are_relative_to_the_optimizer_alone(results):
    clean, noisy, time, memory, temporaries, compilation = demo.figures(results)
    assert clean.values["mask"][0] == pytest.approx(84.0) and noisy.values == clean.values
    for i, method in enumerate(METHODS):
        # The machine was slower in the second round, for all methods alike.
        assert time.values[method] == pytest.approx((1 - i / 10, 0.0), abs=1e-6)
        assert memory.values[method][0] == (8 - i) / 8
    assert temporaries.values[BASELINE] == compilation.values[BASELINE] == (1.0, 0.0)


def test_what_is_there_is_not_computed_again(results, tmp_path, monkeypatch, capsys):
    computed = []

    def accuracy(_, family, method):
        computed.append((family, method))
        return results[method]

    def costs(_, family):
        computed.append((family, "costs"))
        return results["costs"]

    monkeypatch.setattr(demo, "accuracy", accuracy)
    monkeypatch.setattr(demo, "costs", costs)
    settings = Demo(run_dir=tmp_path)
    found = demo.run_all(settings)
    assert len(computed) == 2 * len(METHODS)
    assert "12 of 12: ViT, drop_path_subset; about" in capsys.readouterr().out
    del found["ViT"]["compact"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    computed.clear()
    demo.run_all(settings)
    assert computed == [("ViT", "compact")]
    with pytest.raises(UserError, match="results.json is of other settings"):
        demo.run_all(Demo(seeds=1, run_dir=tmp_path))


def test_every_method_meets_the_same_batches(tmp_path, data_dir):
    settings = Demo(run_dir=tmp_path, data_dir=data_dir, epochs=1)
    seen = []
    for method in ("AdamW alone", "compact"):
        config = settings.config(method, model="vit_mini/4")
        job, _ = demo.train.prepare(config)
        seen.append(list(demo.batches(job, config, 3, demo.NOISE)))
    assert len(seen[0]) == 20
    for a, b in zip(*seen, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    clean = list(demo.batches(job, config, 3, 0.0))
    wrong = [a["label"] != b["label"] for a, b in zip(seen[0], clean, strict=True)]
    share, expected = np.mean(wrong), 0.3 * 0.9
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / np.size(wrong))


@pytest.mark.slow
def test_the_whole_demo(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setitem(models.RESNETS, "resnet_nano", Size(BasicBlock, (1, 1), 4))
    monkeypatch.setitem(models.VITS, "vit_nano", (16, 2, 2))
    small = {"ResNet": {"model": "resnet_nano"}, "ViT": {"model": "vit_nano/4"}}
    monkeypatch.setattr(demo, "PAIRS", {x: demo.Pair(y, y) for x, y in small.items()})
    command = ["demo.py", "--seeds", "2", "--epochs", "2", "--rounds", "2"]
    command += ["--run-dir", str(tmp_path), "--data-dir", str(data_dir)]
    monkeypatch.setattr(sys, "argv", command)
    demo.main()
    shown = capsys.readouterr().out
    assert "ResNet: accuracy of resnet_nano, 2 seeds" in shown and "relative to AdamW" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    for family in ("ResNet", "ViT"):
        memory = {x: y["memory"] for x, y in results[family]["costs"].items()}
        assert memory["compact"] < memory["mask"] == pytest.approx(memory["AdamW alone"], rel=1e-3)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["seeds", "epochs", "rounds"])
def test_too_few(name):
    with pytest.raises(UserError, match=f"--{name} 0 must be at least"):
        Demo(**{name: 0})
