"""The evidence: fair comparisons, and statistics that find what is there and nothing else."""

import grid
import jax
import numpy as np
import pytest
import report
import run
import time_to_accuracy
import trial
from contenders import ABLATIONS, CONTENDERS, CORE
from grid import SEEDS, Cell, Job
from tasks import TASKS
from trial import Program, Settings, batches, calibration_error, compiled

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")
SETTINGS = Settings(3, 3e-3, 1e-2)


@pytest.fixture
def short(monkeypatch):
    """A task that takes seconds."""
    task = TASKS["finetune"]._replace(steps=20, batch_size=10, start="")
    monkeypatch.setitem(TASKS, "finetune", task)
    compiled.cache_clear()
    yield task
    compiled.cache_clear()


@pytest.mark.parametrize("name", TASKS)
def test_splits_do_not_overlap(name):
    """And the test images are the same for every seed."""
    first, second = (TASKS[name].split(seed) for seed in (0, 1))
    rows = {part: {x.tobytes() for x in getattr(first, part).image} for part in first._fields}
    # A few of the digits are there twice.
    assert len(rows["test"] & rows["train"]) <= 2 and len(rows["test"] & rows["validation"]) <= 2
    assert len(rows["validation"] & rows["train"]) <= 2
    np.testing.assert_array_equal(first.test.image, second.test.image)
    assert (first.train.image != second.train.image).any()
    for part in first:
        assert set(part.label) == set(range(TASKS[name].num_classes))


def test_only_training_labels_are_wrong():
    task, clean = TASKS["digits_noisy"], TASKS["digits_all"]
    known = {x.tobytes(): y for part in clean.split(0) for x, y in zip(*part, strict=True)}
    wrong = []
    for seed in range(5):
        split = task.split(seed)
        for part in (split.validation, split.test):
            true = [known.get(x.tobytes(), y) for x, y in zip(*part, strict=True)]
            assert np.mean(true != part.label) < 0.005
        wrong += [known.get(x.tobytes(), y) != y for x, y in zip(*split.train, strict=True)]
    expected, count = 0.3 * 0.9, len(wrong)
    # Images of neither split of `digits_all` count as right.
    assert abs(np.mean(wrong) - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_tuning_meets_no_test_image(short, monkeypatch):
    blind = short._replace(split=lambda seed: short_split(seed)._replace(test=None))
    short_split = short.split
    monkeypatch.setitem(TASKS, "finetune", blind)
    program = Program("finetune", "none", short.model, "adamw")
    assert "test_accuracy" not in trial.run(program, SETTINGS, test=False)
    with pytest.raises(AttributeError):
        trial.run(program, SETTINGS, test=True)


def test_methods_start_from_the_same_weights_and_see_the_same_images(short):
    names = ("none", "dropout", "CDB before", "Backdrop", "stochastic depth")
    numbers = Settings(np.uint32(3), np.float32(1e-3), np.float32(1e-2))
    params = [
        compiled(
            Program("finetune", name, short.model, "adamw", CONTENDERS[name].rates[-1])
        ).initial(numbers)
        for name in names
    ]
    first, *others = (jax.tree.leaves(state.params) for state in params)
    for other in others:
        for x, y in zip(first, other, strict=True):
            np.testing.assert_array_equal(x, y)
    order = np.concatenate(list(batches(short, 3)))
    assert sorted(order[:50]) == list(range(50)) and (order[:50] != order[50:100]).any()
    np.testing.assert_array_equal(order, np.concatenate(list(batches(short, 3))))


def test_a_grid_goes_on_where_it_stopped(short, tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text(",".join(run.COLUMNS) + "\n")
    cell = Cell("finetune", "none", short.model)
    jobs = grid.tuning_jobs(cell)
    assert len(jobs) == grid.TRIALS * len(grid.TUNING_SEEDS)
    assert run.train_all(jobs[:3], file) == 3
    left = run.remaining(jobs, run.read(file))
    assert set(left) == set(jobs[3:])
    assert grid.chosen(cell, run.read(file)) is None
    final = Job(jobs[0].program, SETTINGS)
    run.train_all([final], file)
    last = run.read(file)[-1]
    assert last["trial"] == -1 and 0 <= last["test_accuracy"] <= 1 and last["flops"] > 0
    again = trial.run(final.program, final.settings, test=True)
    assert last["test_nll"] == pytest.approx(again["test_nll"], rel=1e-4)
    assert last["curve"] == again["curve"] and len(last["curve"].split()) == trial.EVALUATIONS


def test_every_contender_has_the_same_budget():
    tried = {
        name: [job.settings for job in grid.tuning_jobs(Cell("digits_few", name, "resnet_small"))]
        for name in CONTENDERS
    }
    assert all(settings == tried["none"] for settings in tried.values())
    learning_rates = {settings.learning_rate for settings in tried["none"]}
    assert len(learning_rates) == grid.TRIALS
    assert min(learning_rates) < 6e-4 and max(learning_rates) > 1.5e-2
    rates = {job.program.rate for job in grid.tuning_jobs(Cell("finetune", "CDB before", "m"))}
    assert rates == set(CONTENDERS["CDB before"].rates)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONTENDERS, *ABLATIONS])
def test_every_contender_trains(short, name):
    ablation = name in ABLATIONS
    contender = (ABLATIONS if ablation else CONTENDERS)[name]
    rate = 0.5 if ablation else contender.rates[-1]
    program = Program(
        "finetune", name, short.model, "adamw", rate, contender.dropout[-1], ablation=ablation
    )
    metrics = trial.run(program, SETTINGS, test=True)
    assert metrics["train_accuracy"] > 0.3 and np.isfinite(metrics["test_nll"])


def planted(effects, spread=0.01):
    """Runs of a made-up grid: contenders that differ from the baseline by known amounts."""
    rng, rows = np.random.default_rng(0), []
    common = 0.9 + 0.03 * rng.standard_normal(len(SEEDS))  # What a seed's images are worth.
    for name, effect in {"none": 0.0, **effects}.items():
        for seed, base in zip(SEEDS, common, strict=True):
            accuracy = base + effect + spread * rng.standard_normal()
            rows.append(
                Program("digits_few", name, "m", "adamw", 0.3)._asdict()
                | {"trial": -1, "seed": seed, "learning_rate": 1e-3, "weight_decay": 0.1}
                | {"test_accuracy": accuracy, "test_nll": 1 - accuracy, "test_ece": 0.1}
                | {"flops": 2.0, "curve": ""}
            )
    cells = [Cell("digits_few", name, "m") for name in ("none", *effects)]
    return cells, rows


def test_the_report_finds_what_is_there_and_nothing_else():
    cells, runs = planted({"better": 0.02, "worse": -0.02, "same": 0.0})
    rows = {row["contender"]: row for row in report.compare(cells, runs)}
    for name, effect in {"better": 0.02, "worse": -0.02, "same": 0.0}.items():
        mean, low, high = rows[name]["accuracy_difference"]
        assert low < mean < high and low < effect < high
        assert (rows[name]["p_corrected"] < 0.01) == (effect != 0)
        assert rows[name]["p_corrected"] >= rows[name]["p"]
    # Pairing takes out what the seeds' images are worth: the interval is that of the differences.
    mean, low, high = rows["same"]["accuracy_difference"]
    assert high - low < 2 * 2.5 * np.sqrt(2) * 0.01 / np.sqrt(len(SEEDS))
    text = report.markdown(list(rows.values()))
    assert "| better |" in text and "not run" not in text


def test_a_row_with_a_run_missing_is_not_run():
    cells, runs = planted({"better": 0.02})
    rows = report.compare(cells, runs[:-1])
    assert [row["run"] for row in rows] == [True, False]
    assert "| better | *not run*" in report.markdown(rows)


def test_false_alarms_are_rare():
    rng = np.random.default_rng(0)
    alarms = [report.p_value(rng.standard_normal(20)) < 0.05 for _ in range(200)]
    assert abs(np.mean(alarms) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 200)
    assert report.p_value(np.zeros(20)) == 1.0


def test_correction_for_the_number_of_comparisons():
    # Worked by hand: 3 * 0.01, then 2 * 0.02, then 0.03, which may not be less.
    assert report.holm([0.02, 0.03, 0.01]) == pytest.approx([0.04, 0.04, 0.03])
    assert report.holm([0.6, 0.5]) == [1.0, 1.0] and report.holm([]) == []


def test_calibration_error():
    right = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    assert calibration_error(np.full(8, 0.5), right) == pytest.approx(0.0)
    assert calibration_error(np.full(8, 0.9), right) == pytest.approx(0.4)
    confidence = np.where(right, 1.0, 0.3)
    assert calibration_error(confidence, right) == pytest.approx(0.3 * 0.5)


def test_when_a_curve_reaches_a_target():
    curve = np.array([0.2, 0.6, 0.5, 0.8])
    assert time_to_accuracy.crossing(curve, 0.1) == 0.25
    assert time_to_accuracy.crossing(curve, 0.4) == pytest.approx(0.375)
    assert time_to_accuracy.crossing(curve, 0.8) == pytest.approx(1.0)
    assert time_to_accuracy.crossing(curve, 0.9) == np.inf
    base = np.tile(curve, (20, 1))
    ahead = np.minimum(base + 0.1, 0.95)
    mean, low, high = time_to_accuracy.reach(ahead, base, cost=0.5)
    assert mean == low == high and mean < 0.5 < time_to_accuracy.reach(base, base, 1.0)[0]


def test_core_grid_is_as_large_as_it_says():
    assert len(grid.GRIDS["core"]) == 3 * 8 and len(CORE) == 8 and len(SEEDS) == 20
    assert {cell.optimizer for cell in grid.GRIDS["core"]} == {"adamw"}
    assert not set(SEEDS) & set(grid.TUNING_SEEDS)
