"""What is shown of runs fits the terminal, however narrow."""

import io
import os
import re
import sys

import jax.numpy as jnp
import matplotlib.figure
import pytest
from etils.epath import backend, gpath
from rich.console import Console

import cdb_jax
import display
import locations

ROW = {
    "epoch": 300,
    "train_loss": 2.24791,
    "test_loss": 2.06781,
    "train_accuracy": 0.1750,
    "test_accuracy": 1.0,
}
STEP = {"train_loss": 2.2479, "train_accuracy": 0.175, "dropped_fraction": 0.3}
COLUMNS = ("", "test accuracy (%)", "against none", "training loss")
LINES = [
    ("resnet_small, none", "97.22 ± 0.41", "", "0.1234"),
    ("resnet_small, stochastic_depth", "97.77 ± 0.32", "+0.55 ± 0.53", "0.4321"),
]
NUMBERS = [entry for _, *entries in LINES for entry in entries]


def shown(renderable, width):
    console = Console(width=width, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize("width", [36, 40, 60, 75, 80, 88, 89, 120])
def test_no_number_is_cut_or_broken(width):
    lines = shown(display.ResultsTable("Two seeds", COLUMNS, LINES), width)
    text = "\n".join(lines)
    assert "…" not in text and all(number in text for number in NUMBERS)
    assert all(word in text for column in COLUMNS for word in column.split())


def test_a_table_is_one_where_there_is_room():
    table = display.ResultsTable("Two seeds", COLUMNS, LINES)
    assert any(re.search("test accuracy .* training loss", x) for x in shown(table, 120))
    assert any(re.search("97.77.*0.53.*0.4321", x) for x in shown(table, 80))
    assert shown(table, 40)[-3:] == [
        "  test accuracy (%)  97.77 ± 0.32",
        "  against none       +0.55 ± 0.53",
        "  training loss      0.4321",
    ]


def test_the_table_of_a_run_at_40_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    display.show_results(tmp_path, "vit_mini/4, cdb", [ROW | {"train_loss": None}, ROW])
    text = capsys.readouterr().out
    assert "…" not in text
    for name, value in (("epoch", "300"), ("train loss", "nan"), ("test accuracy", "100.00%")):
        assert re.search(f"^  {name} +{value}$", text, re.MULTILINE)


@pytest.mark.parametrize("width", [32, 40, 80, 120])
def test_progress_is_not_cut(width):
    out = Console(width=width, force_terminal=True)
    with display.EpochProgress(out, "resnet_small, cdb: epoch 12/300", 12345) as progress:
        progress._shown -= 1.0
        progress.update(6789, 123456, STEP)
        words = " ".join(shown(progress._bar.get_renderable(), width)).split()
    text = " ".join(words)
    assert "…" not in text and "resnet_small, cdb: epoch 12/300 loss 2.248" in text
    assert "images/s dropped 30 %" in text and "6789/12345" in text


def test_a_log_has_a_line_a_minute():
    log = io.StringIO()
    out = Console(file=log, width=40)
    with display.EpochProgress(out, "vit_mini/4, cdb: epoch 12/300", 12345) as progress:
        progress.update(1, 100, STEP)
        assert log.getvalue() == ""
        progress._shown -= display.LOG_EVERY
        progress.update(6789, 123456, STEP)
    (line,) = log.getvalue().splitlines()
    assert line.startswith("vit_mini/4, cdb: epoch 12/300, step 6789/12345  loss 2.248  accuracy")


def test_text_is_never_markup_and_any_stream_takes_it(tmp_path, monkeypatch):
    folder = tmp_path / "[b] :100: é"
    folder.mkdir()
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("COLUMNS", "200")
    display.show_results(folder, "my:Net[/b] :100:", [ROW])
    display.console().print("stopped [/b] ±")
    stdout.flush()
    shown = stdout.buffer.getvalue().decode("ascii")
    assert "my:Net[/b] :100:" in shown and "[b] :100: \\xe9" in shown
    assert "stopped [/b] \\xb1" in shown


class Bucket(backend._OsPathBackend):
    """A folder of this machine in place of a bucket."""

    def __init__(self, folder):
        self._folder = folder

    def open(self, path, mode):
        path = os.fspath(path)
        assert path.startswith("gs://bucket/")
        return open(path.replace("gs://bucket", str(self._folder)), mode)


def test_curves_are_drawn_into_a_bucket(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket(tmp_path))
    display.show_results(locations.parse("gs://bucket"), "a run", [ROW])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "are in gs://bucket" in capsys.readouterr().out


def drawn(monkeypatch, folder, histories, title):
    figures = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self)
    )
    display.plot_curves(histories, folder / "curves.png", title)
    return figures[0]


def test_long_names_do_not_cover_the_curves(monkeypatch, tmp_path):
    rows = [ROW | {"epoch": i} for i in (1, 2)]
    title = "my_package.networks.transformers.variants:VisionTransformerWithRegisters, " * 2
    figure = drawn(monkeypatch, tmp_path, {title: [rows]}, title)
    assert not any(axes.get_legend() for axes in figure.axes)
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().width <= figure.bbox.width
    several = drawn(monkeypatch, tmp_path, {"none": [rows], "cdb": [rows]}, "digits")
    assert several.axes[1].get_legend()


@pytest.mark.parametrize("width", [40, 200])
def test_a_report_fits_the_terminal(width):
    params = {"dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}
    report = cdb_jax.channel_report(params, cdb_jax.Policy(0.5, key=0, channel_choice="exact"))
    console = Console(width=width, markup=False, highlight=False, force_terminal=True)
    with console.capture() as capture:
        display.show_report(console, report)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join([*report.cells[2], report.summary, str(report.savings)]).split()
    assert set(words) - {"-"} <= set(text.split())
    if width == 200:
        assert text == f"{report}\n"
        return
    assert text.splitlines()[:2] == ["dense/kernel", "  shape 2x4  channel axis 1  channels 4 "]
    assert "\n1 other leaf always learns in full.\n" in text and "dense/bias" not in text
