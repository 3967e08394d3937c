"""Runs of earlier releases go on: the same arrays, the same channels, the same learning."""

import json
import tarfile
from pathlib import Path

import pytest
from stored_runs import digests, final_state

import models.vit
import train

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")
RUNS = sorted((Path(__file__).parent / "fixtures").glob("run-*.tar.gz"))


@pytest.mark.parametrize("archive", RUNS, ids=lambda file: file.name)
def test_a_run_of_an_earlier_release_goes_on(archive, tmp_path, data_dir, monkeypatch):
    monkeypatch.setitem(models.vit.VITS, "vit_nano", (16, 1, 2))
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    expected = json.loads((tmp_path / "expected.json").read_text())

    step, leaves = final_state(tmp_path / "run", data_dir)
    assert step == expected["step"]
    assert len(leaves) > 50
    assert digests(leaves) == expected["digests"]

    settings = json.loads((tmp_path / "run/settings.json").read_text())
    settings["exempt"] = tuple(settings["exempt"])
    config = train.Config(**settings, run_dir=tmp_path / "run", data_dir=data_dir, resume=True)
    rows = train.train(config, brief=True)
    for row, known in zip(rows, expected["rows"], strict=True):
        assert row["step"] == known["step"]
        assert row["dropped_fraction"] == pytest.approx(known["dropped_fraction"], rel=1e-6)
        # Compilers may add in another order.
        for name in ("train_loss", "test_loss"):
            assert row[name] == pytest.approx(known[name], rel=0.02)


def test_a_run_is_kept():
    assert RUNS
