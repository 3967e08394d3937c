"""The search for a learning rate in the evidence on Fashion-MNIST, on made-up runs."""

import fashion
import numpy as np
import pytest
from fashion import FIRST, LADDER, final_jobs, program_of, tuning_jobs

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


def test_rows_compare_with_the_baseline(monkeypatch):
    """Every method is a point worse in all runs, and its steps take half as long."""
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
            runs[job] = job.settings._asdict() | dict(
                test_accuracy=accuracy, curve=curve, flops=1.0 - worse
            )
    seconds = {arm: np.full(4, 1.0 if arm == "none" else 0.5) for arm in fashion.LONG}
    monkeypatch.setattr(fashion, "time_steps", lambda jobs, rounds: seconds)
    monkeypatch.setattr(fashion, "memory", lambda program: {"state": 8, "peak": 4})
    rows = fashion.compare("fashion_all", "vit_48/7", runs, 4)
    assert [row["arm"] for row in rows] == list(fashion.LONG[:3])
    base, *others = rows
    assert base["is_baseline"] and base["difference"] == (0.0, 0.0, 0.0)
    for row in others:
        np.testing.assert_allclose(row["difference"], -0.01, atol=1e-9)
        assert row["step_time"] == (0.5, 0.5, 0.5) and row["p_corrected"] == 1.0
        assert row["flops"] == pytest.approx(0.99) and row["state"] == 1.0
    assert fashion.table(rows).count("-1.00 [-1.00, -1.00] | 1.000") == 2


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.skipif(not idx.folder_of("fashion_mnist", None), reason="needs Debian's package")
def test_the_memory_of_a_step_counts_no_images():
    whole, part = (
        fashion.memory(program_of("fashion_few", "vit_48/7", arm))["state"]
        for arm in ("none", "compact, 1/4")
    )
    parameters = 116_938
    assert whole == pytest.approx(4 * 4 * parameters, rel=1e-3)  # Gradient and two moments too.
    assert 0.4 < part / whole < 0.6
