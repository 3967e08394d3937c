"""The evidence: fair comparisons, and statistics that find what is there and nothing else."""

import json
import re
from pathlib import Path

import contenders
import grid
import jax
import numpy as np
import pytest
import report
import run
import time_to_accuracy
import trial
from contenders import ABLATIONS, CONTENDERS, CORE
from flax import nnx
from grid import SEEDS, Cell, Job
from tasks import TASKS
from trial import Program, Settings, batches, calibration_error, compiled

import idx

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")
SETTINGS = Settings(3, 3e-3, 1e-2)
RUNS = Path(__file__).parents[1] / "benchmarks/results/evidence-cpu.csv"


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
    if name.startswith("fashion") and not idx.folder_of("fashion_mnist", None):
        pytest.skip("Fashion-MNIST is not installed")
    first, second = (TASKS[name].split(seed) for seed in (0, 1))
    parts = ("train", "validation", "test")
    rows = {part: {x.tobytes() for x in getattr(first, part).image} for part in parts}
    # A few of the digits are there twice.
    assert len(rows["test"] & rows["train"]) <= 2 and len(rows["test"] & rows["validation"]) <= 2
    assert len(rows["validation"] & rows["train"]) <= 2
    np.testing.assert_array_equal(first.test.image, second.test.image)
    assert (first.train.image != second.train.image).any()
    for part in (getattr(first, part) for part in parts):
        assert set(part.label) == set(range(TASKS[name].num_classes))


def test_only_training_labels_are_wrong():
    task, clean = TASKS["digits_noisy"], TASKS["digits_all"]
    known = {x.tobytes(): y for part in clean.split(0)[:3] for x, y in zip(*part, strict=True)}
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


@pytest.mark.slow
def test_methods_start_from_the_same_weights_and_see_the_same_images(short):
    names = ("none", "Dropout 0.2", "stochastic depth 0.2")
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


@pytest.mark.slow
def test_fine_tuning_starts_from_what_was_learned(short, monkeypatch):
    """All but the head."""
    pretrain = TASKS["pretrain"]._replace(steps=20, batch_size=10)
    monkeypatch.setitem(TASKS, "pretrain", pretrain)
    monkeypatch.setitem(TASKS, "finetune", short._replace(start="pretrain"))
    trial.pretrained.cache_clear()
    program = Program("finetune", "none", short.model, "adamw")
    frozen = SETTINGS._replace(learning_rate=0.0)
    found = trial.fit(program, frozen, short.split(3)).params
    learned = trial.pretrained("pretrain", short.model).params
    fresh = compiled(program).initial(Settings(np.uint32(3), np.float32(0), np.float32(0))).params
    trial.pretrained.cache_clear()
    for path, x in nnx.to_flat_state(found):
        source = fresh if path[0] == "head" else learned
        np.testing.assert_array_equal(x, dict(nnx.to_flat_state(source))[path])
    assert (np.asarray(found["norm"]["scale"]) != np.asarray(fresh["norm"]["scale"])).any()


def test_a_grid_goes_on_where_it_stopped(short, tmp_path):
    file = tmp_path / "runs.csv"
    run.start(file)
    cell = Cell("finetune", "none", short.model)
    jobs = grid.tuning_jobs(cell, {})
    assert len(jobs) == grid.TRIALS * len(grid.TUNING_SEEDS)
    assert run.train_all(jobs[:3], file) == 3
    with open(file, "a") as out:  # Cut off in the middle of a line.
        out.write("finetune,none,vit_m")
    run.start(file)
    left = sum(run.remaining(jobs, run.read(file)), [])
    assert set(left) == set(jobs[3:])
    final = Job(jobs[0].program, SETTINGS)
    run.train_all([final], file)
    last = run.read(file)[final]
    assert 0 <= last["test_accuracy"] <= 1 and last["flops"] > 0 and "jax" in last["versions"]
    assert all(row["test_accuracy"] is None for job, row in run.read(file).items() if job.tunes)
    again = trial.run(final.program, final.settings, test=True)
    assert last["test_nll"] == pytest.approx(again["test_nll"], rel=1e-4)
    assert last["curve"] == again["curve"] and len(last["curve"].split()) == short.evaluations


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content, message",
    [
        ("a,b\n1,2\n", "has other columns"),
        (None, "line 2: .*; remove it"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    file = tmp_path / "runs.csv"
    file.write_text(content or ",".join(run.COLUMNS) + "\ndigits,none\n")
    with pytest.raises(SystemExit, match=message):
        run.start(file)
        run.read(file)


def made_up(jobs, accuracy):
    """Rows of runs that never were; `accuracy` is a function of a job."""
    return {
        job: job.program._asdict()
        | job.settings._asdict()
        | {f"{part}_{metric}": 0.1 for part in ("validation", "test") for metric in ("nll", "ece")}
        | {"validation_accuracy": accuracy(job), "test_accuracy": accuracy(job)}
        | {"flops": 2.0, "train_accuracy": 1.0, "curve": "0.5 0.9", "machine": "m", "versions": "v"}
        for job in jobs
    }


def test_tuning_tries_the_best_again_and_chooses_the_best_of_these():
    cell = Cell("digits_few", "CDB before", "m")
    tried = grid.trials(cell)
    good, better = tried[5], tried[9]

    def accuracy(job):
        trial = (job.program, job.settings.learning_rate, job.settings.weight_decay)
        if trial == good:  # Lucky with the first seeds.
            return 0.95 if job.settings.seed in grid.TUNING_SEEDS else 0.5
        return 0.9 if trial == better else 0.8 - 0.01 * job.settings.seed

    runs = made_up(grid.tuning_jobs(cell, {}), accuracy)
    assert grid.final_jobs(cell, runs) == []
    runs = made_up(grid.tuning_jobs(cell, runs), accuracy)
    assert grid.final_jobs(cell, runs) == []
    jobs = grid.tuning_jobs(cell, runs)
    assert len(jobs) == grid.TRIALS * 3 + grid.FINALISTS * 7 + 6 * 10
    runs = made_up(jobs, accuracy)
    finals = grid.final_jobs(cell, runs)
    assert {job.program for job in finals} == {better[0]}
    assert [job.settings.seed for job in finals] == list(SEEDS)
    assert {job.settings.learning_rate for job in finals} == {better[1]}
    changed = [job._replace(version=job.version + 1) for job in jobs]
    assert sum(run.remaining(changed, runs), []) == sorted(changed)


def test_every_contender_has_the_same_budget():
    tried = {name: grid.trials(Cell("digits_few", name, "resnet_small")) for name in CONTENDERS}
    numbers = [trial[1:] for trial in tried["none"]]
    assert all([trial[1:] for trial in trials] == numbers for trials in tried.values())
    learning_rates = {learning_rate for learning_rate, _ in numbers}
    assert len(learning_rates) == grid.TRIALS
    assert min(learning_rates) < 6e-5 and max(learning_rates) > 1.5e-2
    rates = {trial[0].rate for trial in tried["CDB before"]}
    assert rates == set(CONTENDERS["CDB before"].rates)
    for name, found in tried.items():
        cell = Cell("digits_few", name, "resnet_small")
        near = grid.nearby(cell, found[3])
        assert len(set(near)) == 6 and found[3] not in near
    for cell in grid.GRIDS["speed"]:  # All choose from the same there.
        assert len(set(grid.trials(cell))) == grid.TRIALS and grid.nearby(cell, found[3]) == []


def test_a_better_rate_near_the_best_is_chosen():
    cell = Cell("digits_few", "CDB before", "m")
    best = grid.trials(cell)[5]
    near = grid.nearby(cell, best)[4]

    def accuracy(job):
        trial = (job.program, job.settings.learning_rate, job.settings.weight_decay)
        return {best: 0.9, near: 0.91}.get(trial, 0.8)

    runs = {}
    for _ in range(3):
        runs = made_up(grid.tuning_jobs(cell, runs), accuracy)
    (job, *_) = grid.final_jobs(cell, runs)
    assert job.program == near[0] != best[0] and job.settings.learning_rate == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONTENDERS, *ABLATIONS])
def test_every_contender_trains(short, name, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # As in the runs, each of which has one.
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
    rng = np.random.default_rng(0)
    common = dict(zip(SEEDS, 0.9 + 0.03 * rng.standard_normal(len(SEEDS)), strict=True))
    found = {}
    for name, effect in {"none": 0.0, **effects}.items():
        program = Program("digits_few", name, "m", "adamw", 0.3)
        jobs = [Job(program, Settings(seed, 1e-3, 0.1)) for seed in SEEDS]
        noise = dict(zip(jobs, spread * rng.standard_normal(len(jobs)), strict=True))
        runs = made_up(jobs, lambda job, e=effect, n=noise: common[job.settings.seed] + e + n[job])
        found[Cell("digits_few", name, "m")] = report.finals(jobs, runs)
    return found


def test_the_report_finds_what_is_there_and_nothing_else(tmp_path):
    effects = {"better": 0.02, "worse": -0.02, "same": 0.0}
    rows = {
        row["contender"]: row for row in report.compare(report.against("none", planted(effects)))
    }
    for name, effect in effects.items():
        mean, low, high = rows[name]["accuracy_difference"]
        assert low < mean < high and low < effect < high
        assert (rows[name]["p_corrected"] < 0.01) == (effect != 0)
        assert rows[name]["p_corrected"] >= rows[name]["p"]
    # Pairing takes out what the seeds' images are worth: the interval is that of the differences.
    mean, low, high = rows["same"]["accuracy_difference"]
    assert high - low < 2 * 2.5 * np.sqrt(2) * 0.01 / np.sqrt(len(SEEDS))
    text = report.markdown(list(rows.values()))
    assert "| better |" in text and "not run" not in text
    table = report.overview(list(rows.values())).splitlines()
    assert table[0] == "|  | `digits_few` |" and table[2].startswith("| AdamW alone | 8")
    bold = {line.split(" | ")[0][2:] for line in table if "**" in line}
    assert bold == {"better", "worse"} and len(table) == 6
    report.draw(list(rows.values()), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_row_with_a_run_missing_is_not_run_but_counts_as_a_comparison():
    cells = planted({"better": 0.02, "worse": -0.02})
    whole = {row["contender"]: row for row in report.compare(report.against("none", cells))}
    cells[Cell("digits_few", "worse", "m")] = []
    rows = {row["contender"]: row for row in report.compare(report.against("none", cells))}
    assert not rows["worse"]["run"] and rows["better"]["run"]
    assert "| worse | *not run*" in report.markdown(list(rows.values()))
    assert rows["better"]["p_corrected"] == 2 * rows["better"]["p"] >= whole["better"]["p"]


def test_a_choice_from_the_end_of_its_range_is_marked():
    cell = Cell("digits_few", "CDB before + dropout", "resnet_small")
    rates, decays = (sorted(trial[i] for trial in grid.trials(cell)) for i in (1, 2))
    row = {"learning_rate": rates[3], "weight_decay": decays[3], "rate": 0.1, "dropout": 0.1}
    assert report.at_the_edge(cell, row) == []
    assert report.at_the_edge(cell, row | {"learning_rate": rates[0]}) == ["learning rate"]
    assert report.at_the_edge(cell, row | {"weight_decay": decays[-1]}) == ["weight decay"]
    assert report.at_the_edge(cell, row | {"rate": 0.8, "dropout": 0.5}) == ["rate", "dropout"]
    assert report.at_the_edge(cell._replace(contender="none"), row | {"rate": 0.0}) == []


def test_a_mask_is_taken_out_and_all_else_stays():
    cell = Cell("finetune", "CDB before + dropout", "vit_mini/4")
    runs = made_up(grid.tuning_jobs(cell, {}), lambda job: job.settings.learning_rate)
    for _ in range(2):
        runs |= made_up(grid.tuning_jobs(cell, runs), lambda job: job.settings.learning_rate)
    chosen, unmasked = grid.final_jobs(cell, runs), grid.unmasked_jobs(cell, runs)
    assert [job.settings for job in unmasked] == [job.settings for job in chosen]
    ((with_mask,), (without,)) = ({job.program for job in jobs} for jobs in (chosen, unmasked))
    assert (without.contender, without.rate, without.dropout) == ("dropout", with_mask.dropout, 0)
    settings = [
        contenders.model_settings(
            contenders.config_of(CONTENDERS[x.contender], rate=x.rate), x.dropout
        )
        for x in (with_mask, without)
    ]
    assert settings[0] == settings[1]


def test_the_tables_of_the_page_are_those_of_the_report():
    page = report.PAGE.read_text()
    rows = json.loads(RUNS.with_suffix(".json").read_text())["rows"]
    found = {row["grid"]: [x for x in rows if x["grid"] == row["grid"]] for row in rows}
    assert report.with_tables(page, found) == page
    assert page.count("<!-- -->") > 3
    marked = set(re.findall(r"<!-- (\S.*?) -->", page))
    assert {name for name in marked if not name.startswith("fashion ")} <= set(found)
    empty = {name: [] for name in found}
    assert report.with_tables(page, empty).count("[") < page.count("[") - 50


@pytest.mark.slow
def test_the_committed_report_follows_from_the_committed_runs():
    found = report.results(run.read(RUNS))
    fresh = [{"grid": grid, **row} for grid, rows in found.items() for row in rows]
    committed = json.loads(RUNS.with_suffix(".json").read_text())["rows"]
    assert len(fresh) == len(committed)
    for row, kept in zip(fresh, committed, strict=True):
        assert row.keys() == kept.keys()
        numbers = {name for name, x in row.items() if isinstance(x, (float, tuple))}
        assert all(row[name] == kept[name] for name in row.keys() - numbers)
        for name in numbers:  # Intervals to what another version of SciPy may change.
            np.testing.assert_allclose(row[name], kept[name], rtol=0.02, atol=1e-4)


def test_all_grids_are_reported_though_none_is_run():
    cell = Cell("digits_few", "none", "resnet_small")
    rows = report.results(made_up(grid.tuning_jobs(cell, {}), lambda job: 0.5))
    rivals = {"core-against-early-stopping", "core-against-dropout"}
    rivals |= {"compact-against-early-stopping"}
    assert rows.keys() == {*grid.GRIDS, *rivals, "masks", "ablation"}
    assert not any(row["run"] for found in rows.values() for row in found)


def test_p_values():
    # Of the eight ways to sign 1, 2 and 3, two have a sum as large as 6.
    assert report.p_value(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert report.p_value(np.zeros(20)) == 1.0
    # As accuracies are written: multiples of a seven hundred and ninety-seventh, to six digits.
    k = np.array([3, -1, 2, -4, 1, 5, 2, 3])
    assert report.p_value((k / 797).round(6)) == report.p_value(k.astype(float))
    rng = np.random.default_rng(0)
    alarms = [report.p_value(rng.standard_normal(10)) < 0.05 for _ in range(2000)]
    assert abs(np.mean(alarms) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


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

    def share(own, cost):
        reach = time_to_accuracy.reach(own, base, lambda rounds: cost)
        return time_to_accuracy.bootstrap(reach, 20, 5)

    mean, low, high = share(ahead, 0.5)
    assert mean == low == high and mean < 0.5 < share(base, 1.0)[0]
    never = share(base - 0.2, 1.0)
    assert time_to_accuracy.three(never) == "never [never, never]"
    assert time_to_accuracy.finite([{"a": never, "b": "x"}]) == [{"a": [None] * 3, "b": "x"}]


def test_what_counts_as_not_inferior():
    rng = np.random.default_rng(0)

    def p(mean):
        return time_to_accuracy.p_of_loss(mean + 1e-3 * rng.standard_normal(20), 0.003)

    assert p(0.0) < 1e-3 and p(-0.002) < 0.01 and p(-0.004) > 0.99
    alarms = [p(-0.003) < 0.05 for _ in range(400)]
    assert abs(np.mean(alarms) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.slow
def test_time_and_work_to_accuracy(short, monkeypatch):
    """On made-up accuracies, with real programs."""
    monkeypatch.setattr(time_to_accuracy, "STEPS", 5)
    names = ("none", "skip channels", "skip layers")
    cells = [Cell("finetune", name, short.model) for name in names]
    worse = {"none": 0.0, "skip channels": 0.001, "skip layers": 0.1}

    def accuracy(job):
        return 0.8 + 1e-3 * (job.settings.seed % 7) - worse[job.program.contender]

    runs = {}
    for _ in range(4):
        jobs = [j for c in cells for j in grid.tuning_jobs(c, runs) + grid.final_jobs(c, runs)]
        runs = made_up(jobs, accuracy)
    for job, row in runs.items():
        row["flops"] = trial.mean_flops(job.program)
        end = 0.9 - worse[job.program.contender]
        row["curve"] = f"{end - 0.4} {end}"
    rows = time_to_accuracy.compare(cells, runs, rounds=3)
    unrun = Cell("digits_few", "skip layers", "m")
    rows += time_to_accuracy.compare([unrun._replace(contender="none"), unrun], {}, rounds=3)
    time_to_accuracy.correct(rows)
    none, channels, layers, *_ = rows
    assert none["step_time"][0] == none["flops"] == none["time_against_baseline"][0] == 1.0
    # Half of the weights' gradients, which are a third of the work, of all layers but the head.
    for row in (channels, layers):
        assert 0.8 < row["flops"] < 0.93 and row["step_time"][0] > 0
    assert channels["p_corrected"] < 1e-3 and layers["p_corrected"] == 1.0
    # Between the points at half of a run and at its end: 0.897 lies between 0.5 and 0.9 here, and
    # between 0.499 and 0.899 there.
    ratio = (0.5 + 0.5 * 0.398 / 0.4) / (0.5 + 0.5 * 0.397 / 0.4)
    assert channels["flops_against_baseline"] == pytest.approx((ratio * channels["flops"],) * 3)
    assert np.isinf(layers["time_to_accuracy"]).all()
    table = time_to_accuracy.table(rows)
    assert "| skip layers | *not run* |" in table and "never [never, never]" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_core_grid_is_as_large_as_it_says():
    assert len(grid.GRIDS["core"]) == 3 * 8 and len(CORE) == 8 and len(SEEDS) == 20
    assert {cell.optimizer for cell in grid.GRIDS["core"]} == {"adamw"}
    assert not set(SEEDS) & {*grid.TUNING_SEEDS, *grid.MORE_SEEDS}
