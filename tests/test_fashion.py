"""The search for a learning rate in the evidence on Fashion-MNIST, on made-up runs."""

import json

import fashion
import fashion_report
import numpy as np
import pytest
from fashion import FIRST, LADDER, final_jobs, program_of, tuning_jobs
from overhead import fill, publish
from paths import BENCHMARKS

import idx

PROGRAM = program_of("fashion_few", "vit_48/7", "none")


def search(best):
    """Runs what tuning asks for until it chooses; accuracy falls with the distance to `best`."""
    runs = {}
    while True:
        jobs, chosen = tuning_jobs(PROGRAM, runs)
        assert len(jobs) == len(set(jobs))
        if chosen is not None:
            return {job.settings.learning_rate for job in jobs}, chosen, runs
        assert final_jobs(PROGRAM, runs) == []
        for job in jobs:
            distance = abs(np.log(job.settings.learning_rate / best))
            runs[job] = {"validation_accuracy": 0.9 - distance / 100}


@pytest.mark.parametrize("best", LADDER)
def test_the_best_learning_rate_is_found_and_not_at_the_end(best):
    tried, chosen, runs = search(best)
    assert chosen == best and set(FIRST) <= tried
    if best not in (LADDER[0], LADDER[-1]):
        assert min(tried) < best < max(tried)
    finals = final_jobs(PROGRAM, runs)
    assert {job.settings.learning_rate for job in finals} == {best}
    assert len(finals) == 10 and not any(job.tunes for job in finals)
    assert not {job.settings.seed for job in finals} & {job.settings.seed for job in runs}


@pytest.fixture
def rows(monkeypatch):
    """Every method is a point worse in all runs; its steps take half as long, its state half."""
    runs = {}
    for arm in fashion.LONG[:3]:
        program, worse = program_of("fashion_all", "vit_48/7", arm), 0.01 * (arm != "none")
        while tuning_jobs(program, runs)[1] is None:
            for job in tuning_jobs(program, runs)[0]:
                distance = abs(np.log(job.settings.learning_rate / 3e-3))
                runs[job] = {"validation_accuracy": 0.9 - distance / 100}
        for job in final_jobs(program, runs):
            accuracy = 0.9 + job.settings.seed % 3 / 100 - worse
            curve = " ".join(f"{accuracy * x:.4f}" for x in (0.5, 0.9, 1.0))
            runs[job] = {"test_accuracy": accuracy, "curve": curve, "flops": 1.0}

    def is_whole(program):
        return program.contender == "none"

    monkeypatch.setattr(fashion_report, "state_bytes", lambda x: 8 if is_whole(x) else 4)
    monkeypatch.setattr(fashion_report, "peak_bytes", lambda x: 4 if is_whole(x) else 3)
    done = fashion_report.complete(runs)
    times = {"vit_48/7": {arm: [1.0 if arm == "none" else 0.5] * 4 for arm in fashion.LONG[:3]}}
    return fashion_report.compare(done, runs, times)


def test_times_are_used_again_on_the_same_machine_only(tmp_path):
    done = {"vit_48/7": {"fashion_few": {arm: [PROGRAM] for arm in ("none", "early stopping")}}}
    file = tmp_path / "report.json"
    publish(file, "", [], seconds={"vit_48/7": {"none": [1.0]}})
    assert fashion_report.earlier_times(file, done) == {"vit_48/7": {"none": [1.0]}}
    done["resnet_8"] = {"fashion_few": {"none": [PROGRAM], "compact, 1/2": [PROGRAM]}}
    with pytest.raises(SystemExit, match="has no times of compact, 1/2, none"):
        fashion_report.earlier_times(file, done)
    file.write_text(file.read_text().replace('"cpu_count"', '"cores"'))
    with pytest.raises(SystemExit, match="is not from this machine"):
        fashion_report.earlier_times(file, done)


def test_rows_compare_with_the_baseline(rows):
    assert [row["arm"] for row in rows] == list(fashion.LONG[:3])
    base, *others = rows
    assert base["is_baseline"] and base["difference"] == (0.0, 0.0, 0.0)
    for row in others:
        np.testing.assert_allclose(row["difference"], -0.01, atol=1e-9)
        assert row["step_time"] == (0.5, 0.5, 0.5) and row["p_corrected"] == 1.0
        assert (row["state"], row["peak"]) == (0.5, 0.75)


def test_tables_and_figures(rows, tmp_path):
    assert fashion_report.table(rows).count("-1.00 [-1.00, -1.00] | 1.000") == 2
    found = fashion_report.tables(rows)
    name = fashion.LONG[1]
    assert f"| {name} | -1.00 [-1.00, -1.00] |" in found["fashion accuracy"]
    # A point lower at the end, and so never as good as the baseline less 0.3 points.
    assert f"| {name} | never [never, never] |" in found["fashion time"]
    assert f"| {name} | 0.50 [0.50, 0.50] | 0.50 | 0.75 |" in found["fashion costs"]
    for key in ("step_time", "state"):
        fashion_report.draw(rows, tmp_path / f"{key}.png", key, "label")
        assert (tmp_path / f"{key}.png").stat().st_size > 10_000


def test_the_tables_of_the_page_are_those_of_the_results():
    page = fashion_report.PAGE.read_text()
    report = json.loads((BENCHMARKS / "results/fashion-cpu.json").read_text())
    never = {None: float("inf")}
    rows = [
        {k: tuple(never.get(y, y) for y in x) if isinstance(x, list) else x for k, x in row.items()}
        for row in report["rows"]
    ]
    found = fashion_report.tables(rows)
    assert fill(page, found.get) == page
    assert all(f"<!-- {name} -->" in page for name in found)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.skipif(not idx.folder_of("fashion_mnist", None), reason="needs Debian's package")
def test_the_memory_of_a_step_counts_no_images():
    whole, part = (
        fashion_report.state_bytes(program_of("fashion_few", "vit_48/7", arm))
        for arm in ("none", "compact, 1/4")
    )
    parameters = 116_938
    assert whole == pytest.approx(4 * 4 * parameters, rel=1e-3)  # Gradient and two moments too.
    assert 0.4 < part / whole < 0.6
