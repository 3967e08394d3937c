"""`examples/depth_rates.py`: drop rates by sensitivity, end to end."""

import json
import sys

import numpy as np
import pytest

import depth_rates
import models.vit

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")


@pytest.mark.slow
def test_end_to_end(monkeypatch, tmp_path, data_dir, capsys):
    """Rates meet the budget, follow the sensitivities, and are trained with."""
    monkeypatch.setattr(depth_rates, "DEPTH", 3)
    monkeypatch.setitem(models.vit.VITS, "vit_deep", (16, 3, 2))
    flags = f"--budgets 0.5 --seeds 2 --epochs 2 --batch-size 320 --run-dir {tmp_path}"
    monkeypatch.setattr(
        sys, "argv", ["depth_rates.py", *flags.split(), "--data-dir", str(data_dir)]
    )
    depth_rates.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["mode"] for row in found["rows"]] == ["none", "uniform", "linear", "sense"]
    assert found["rows"][0]["difference"] == [0.0, 0.0, 0.0]
    for run in found["runs"]:
        rates, sensitivities = np.array(run["rates"]), np.array(run["sensitivities"])
        assert (sensitivities > 0).all()
        if run["mode"] == "none":
            assert rates.size == 0
            continue
        np.testing.assert_allclose((1 - rates).sum(), 1.5, rtol=1e-6)
        if run["mode"] == "sense":
            assert (np.argsort(-rates) == np.argsort(sensitivities)).all()
    by_seed = [run for run in found["runs"] if run["seed"] == 0]
    assert len({tuple(run["sensitivities"]) for run in by_seed}) == 1  # The same first epoch.
    assert len({run["test_accuracy"] for run in by_seed}) > 1
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    assert "uniform" in capsys.readouterr().out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--budgets 0.05", "--budgets 0.05 must be between 0.1 and 1.*--maximum 0.9"),
        ("--budgets 1.5", "--budgets 1.5 must be between"),
        ("--seeds 0", "--seeds 0 is too small"),
        ("--epochs 1", "--epochs 1 is too small"),
    ],
)
def test_mistakes(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["depth_rates.py", *flags.split()])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        depth_rates.main()
