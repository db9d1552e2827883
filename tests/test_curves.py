"""Training curves: that they show what the log says, and that training ends with them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import train
from extras import curves
from gemma import InputError

LOG = Path(__file__).resolve().parent.parent / "bench" / "results" / "train-tiny-cpu.jsonl"
plots = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "log.jsonl").write_text(LOG.read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


@plots
def test_curves_are_the_log(folder, monkeypatch):
    """Catches a curve under another's name, in other units, or of other steps, and a picture in another look than those of bench."""
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append({line.get_label(): line.get_xydata().tolist() for axis in figure.axes for line in axis.lines}))
    curves.draw(folder)
    lines = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    assert figures[0]["weighted sum"] == [[line["step"], line["loss"]] for line in lines]
    assert figures[0]["retrieval"] == [[line["step"], pytest.approx(sum(line["retrieval_loss"]))] for line in lines]
    measured = [line for line in lines if "held_out" in line]
    for label, N, name in (("all kinds, 16 facts", "16", "recall"), ("right episode first, 64 facts", "64", "first"), ("lookups, 64 facts", "64", "lookup")):
        assert figures[0][label] == [[line["step"], pytest.approx(100 * line["held_out"][N][name])] for line in measured]
    from matplotlib import rcParams
    assert rcParams["axes.prop_cycle"].by_key()["color"][0] == "#0b6e99"


@plots
def test_the_command(folder, capsys):
    """Catches a file that isn't a picture, and a run that was stopped before anything was measured."""
    curves.main([str(folder)])
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG" and capsys.readouterr().out.strip() == str(folder / "curves.png")
    first = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (folder / "log.jsonl").write_text(first + "\n", encoding="utf-8")
    assert curves.draw(folder, folder / "other.png").is_file()


@pytest.mark.parametrize("text", [None, "", "no JSON\n", "[1]\n", '{"step": 1}\n', pytest.param("[" * 100_000, id="nested")])
def test_bad_logs(folder, text):
    """Catches a traceback for a folder that train.py didn't write."""
    (folder / "log.jsonl").unlink()
    if text is not None:
        (folder / "log.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        curves.draw(folder)


def test_without_matplotlib(folder, monkeypatch, capsys):
    """Catches training that ends with a traceback where plots aren't installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert curves.draw(folder) is None and "matplotlib is missing" in capsys.readouterr().err and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("first", [True, False])
def test_training_ends_with_its_curves(folder, monkeypatch, first):
    """Catches curves of another folder, none at all, and several processes of torchrun that draw the same file."""
    row = dict(recall=0.5, first=0.5, refused=None, refused_wrongly=0.1, base_alone=0.0)
    monkeypatch.setattr(train, "train", lambda settings, config: (None, {16: row} if first else {}))
    drawn = []
    monkeypatch.setattr(curves, "draw", drawn.append)
    train.main(["--out", str(folder)])
    assert drawn == [str(folder)] * first
