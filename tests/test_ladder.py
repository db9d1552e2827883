"""bench/ladder.py: that a rung changes what it says and nothing else, and that no rung is lost or measured twice."""

import importlib.util
import json
import sys
from dataclasses import asdict, fields

import pytest
import torch

import train
from bench import ladder
from bench.common import run, share
from gemma import Gemma, InputError, Tokenizer
from memory import GemmaWithMemory, MemoryConfig
from toy import one_thread, toy_base  # noqa: F401
from train import TrainConfig

SHORT = ["--device", "cpu", "--steps", "2", "--batch", "8", "--bundles", "20", "--facts", "8", "--questions", "8", "--tokens", "200"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy base with a context long enough for whole questions in its byte-wise tokens."""
    return toy_base(tmp_path_factory.mktemp("toy"), max_position_embeddings=1024)


@pytest.fixture
def short(base, tmp_path, monkeypatch):
    """short(*options) runs the ladder on the toy base into tmp_path/out, with next to no training and few questions."""
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *inputs, **options: evaluate(*inputs, **{**options, "questions": 8}))
    monkeypatch.setattr(ladder, "ROWS", 8)
    monkeypatch.setattr(ladder, "HELD_OUT", 20)
    return lambda *options: ladder.main([*SHORT, "--model", str(base), "--out", str(tmp_path / "out"), *options])


def differing(one, other):
    return {name for name in one if one[name] != other[name]}


# ------------------------------------------------------------------------------------------------------------ designs

def test_one_change_a_rung_from_the_plan_to_the_defaults():
    """Catches a rung that brings along something else, a default that moved on without the ladder, and a design that ends elsewhere."""
    rungs = [d for d in ladder.designs() if d.group == ladder.LADDER]
    assert {name: rungs[0].choices[name] for name in ladder.PLAN} == ladder.PLAN
    for before, rung in zip(rungs, rungs[1:]):
        assert differing(before.choices, rung.choices) == set(rung.changes), rung.name
        # The GAT and its edges come together: one without the other changes nothing there.
        # So do the reader and its marks.
        assert len(rung.changes) == 1 or rung.changes in (dict(graph=True, time_edges=True), dict(reading_layers=1, marks=True, follow=True)), rung.name
    settings = dict(model="toy", steps=7, batch=16)
    assert rungs[-1].name == ladder.FINAL and rungs[-1].configs(settings, False) == (TrainConfig(**settings), MemoryConfig(reading_layers=1))
    # Whatever can be switched in a memory is on the road; what is only a size is not.
    switches = {f.name for f in fields(MemoryConfig) if type(f.default) in (bool, str)} - {"chat"}
    assert switches | {"hops", "open_words", "retrieval", "copying", "sentence_layers", "reading_layers"} == set(ladder.PLAN)


def test_the_other_groups_leave_the_final_design_in_one_point():
    """Catches a thing taken away from another rung than the last."""
    every = ladder.designs()
    final = next(d for d in every if d.name == ladder.FINAL)
    others = [d for d in every if d.group != ladder.LADDER]
    assert [d.number for d in every] == list(range(1, len(every) + 1)) and len({d.name for d in every}) == len(every)
    assert len(others) == 12 and all(len(d.changes) == 1 and differing(final.choices, d.choices) == set(d.changes) for d in others)


@pytest.mark.parametrize("layers, final, others", [(26, 8, [2, 4, 12, 16]), (12, 8, [2, 4, 12]), (4, 2, [4])])
def test_layers_that_the_base_has(layers, final, others):
    """Catches an injection after a layer that isn't there, and a layer measured twice."""
    every = ladder.designs(layers)
    assert {d.choices["inject_after"] for d in every if d.group != ladder.AFTER} == {final}
    assert [d.choices["inject_after"] for d in every if d.group == ladder.AFTER] == others


def test_selection():
    """Catches a range that leaves out its last rung, and numbers that depend on the base."""
    assert ladder.selection("1-3,gat") == {"plan", "open-words", "hidden-nodes", "gat"}
    assert ladder.selection("without") == {name for name, *_ in ladder.TAKEN_AWAY}
    assert ladder.selection("29") == {"after-16"} and ladder.selection("without-gat,16") == {"without-gat", "two-hops"}


# ----------------------------------------------------------------------------------------------------------- measuring

def test_measures_what_training_measures(base, monkeypatch):
    """Catches a judge of its own that is kinder or stricter than train.evaluate, or asks other questions."""
    torch.manual_seed(2)
    config = MemoryConfig(inject_after=2, heads=2, key_dim=16, token_key_dim=8, gat_dim=8)
    model = GemmaWithMemory(Gemma.from_pretrained(base), Tokenizer(base), config, base)
    monkeypatch.setattr(ladder, "ROWS", 64)
    pool = train.Pool(model, "validation", 40, 200, 4, progress=False)
    pool.set_statistics(model)
    expected = train.evaluate(model, pool, TrainConfig(batch=ladder.ROWS, tokens=200), questions=ladder.ROWS)
    found = ladder.measure(model, pool, 200, ladder.ROWS - 1)              # rounded up to a whole batch
    assert set(found) == {"16", "64"}
    for N, shares in found.items():
        assert {name: s["share"] and round(s["share"], 4) for name, s in shares.items()} == pytest.approx(expected[int(N)], abs=1e-4)
        assert shares["recall"]["n"] + shares["refused"]["n"] == ladder.ROWS and 0 < shares["first"]["right"]
        assert sum(shares[kind]["n"] for kind in ladder.ANSWERABLE) == shares["recall"]["n"]


def test_interrupted_and_resumed(short, tmp_path, monkeypatch, capsys):
    """Catches a finished rung that is lost or trained again, a pool made twice, and rungs that were asked other questions."""
    trained, pools, real, Pool = [], [], train.train, ladder.Pool

    def counted(settings, config, *rest):
        if len(trained) == 1 and "interrupt" not in trained:
            trained.append("interrupt")
            raise KeyboardInterrupt
        trained.append((settings.open_words, config.hops))
        return real(settings, config, *rest)
    monkeypatch.setattr(train, "train", counted)
    monkeypatch.setattr(ladder, "Pool", lambda model, split, *rest, **options: pools.append(split) or Pool(model, split, *rest, **options))
    rungs = ("--rungs", "two-hops,1-2")
    with pytest.raises(KeyboardInterrupt):
        short(*rungs)
    assert train.tqdm is ladder.tqdm and "print" not in vars(train)        # train.py is left as it was
    file = tmp_path / "out" / "ladder.json"
    first = json.loads(file.read_text())
    assert list(first["rungs"]) == ["plan"] and pools == ["train", "validation", "test", "train"]
    with pytest.raises(InputError, match="--resume"):
        short(*rungs)
    pools.clear()
    result = short(*rungs, "--resume")
    assert trained == [(False, 1), "interrupt", (True, 1), (True, 2)] and pools == ["train", "validation", "test"]
    assert result == json.loads(file.read_text()) and result["rungs"]["plan"] == first["rungs"]["plan"]
    assert list(result["rungs"]) == ["plan", "open-words", "two-hops"] and result["settings"]["steps"] == 2 and result["seeds"]["held_out_pool"] == 1
    for row in result["rungs"].values():
        assert row["steps"] == 2 and row["questions_learnt_from"] == 16 and "torch" in row["hardware"] and row["commit"]
        assert row["choices"] == {**row["choices"], **row["changes"]}
        for where in ("held_out", "unseen_phrasings"):
            assert {N: row[where][N]["recall"]["n"] for N in row[where]} == {N: first["rungs"]["plan"][where][N]["recall"]["n"] for N in ("16", "64")}
    assert short(*rungs, "--resume") == result and len(trained) == 4       # all done: nothing more to train
    with pytest.raises(InputError, match="batch = 8, got 16"):
        short(*rungs, "--resume", "--batch", "16")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ladder.json", "ladder.png"][:1 + bool(importlib.util.find_spec("matplotlib"))]
    assert "the original plan" in capsys.readouterr().out


def test_a_rung_that_explodes_is_a_result(short, monkeypatch, capsys):
    """Catches a night's run that ends at the first design that can't be trained."""
    def exploding(*arguments):
        raise InputError("step 9: the gradient was not finite 5 times in a row; what out holds is good.")
    monkeypatch.setattr(train, "train", exploding)
    result = short("--rungs", "1,without-gat")
    assert set(result["rungs"]) == {"plan", "without-gat"} and all("not finite" in row["failed"] for row in result["rungs"].values())
    assert capsys.readouterr().out.count("failed: step 9") == 2


# -------------------------------------------------------------------------------------------------------------- report

def test_gains(tmp_path):
    """Catches a gain against the wrong rung, and one where there is nothing to compare with."""
    def row(right):
        cell = {name: share(right, 100) for name in ("recall", "first", *ladder.ANSWERABLE)}
        return dict(held_out={"16": cell, "64": cell}, unseen_phrasings={"16": cell, "64": cell}, questions_learnt_from=2000)
    names = {"plan": 1, "open-words": 5, "identity-values": 20, "reading": 80, "without-gat": 70, "after-4": 85}
    result = dict(layers=12, rungs={name: row(right) for name, right in names.items()})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ladder.report(result).splitlines() if line.startswith("| ")]
    gains = [(line[0], line[3]) for line in cells if len(line) == 9 and line[0]]
    assert gains == [("1", "–"), ("2", "+4.0"), ("4", "–"), ("17", "–"), ("17", "–"), ("19", "-10.0"), ("27", "+5.0"), ("17", "–")]
    if importlib.util.find_spec("matplotlib"):
        assert ladder.plot(result, tmp_path / "ladder.png") and (tmp_path / "ladder.png").stat().st_size > 5000
        assert not ladder.plot(dict(layers=12, rungs={"plan": dict(failed="step 9")}), tmp_path / "none.png")


# -------------------------------------------------------------------------------------------------------- command line

def test_defaults():
    """Catches --quick that measures with the settings of a long run, or overrules what was asked for."""
    quick, long = (ladder.parse_arguments(["--device", "cpu", "--out", "nowhere", *more]) for more in (["--quick", "--facts", "32"], []))
    assert quick.facts == 32 and long.facts == 64 and quick.bundles < long.bundles and quick.warmup < long.warmup
    assert quick.rungs == ladder.selection("ladder") and long.rungs == {d.name for d in ladder.designs()}
    settings = ladder.Bench.settings(type("Bench", (), dict(args=long)))
    assert settings["minutes"] == long.minutes > 0 and settings["steps"] == settings["eval_every"] == ladder.UNENDING
    assert set(settings) < set(asdict(TrainConfig())) and not set(settings) & set(ladder.PLAN)


@pytest.mark.parametrize("options", [["--rungs", "0-3"], ["--rungs", "x"], ["--rungs", "3-1"], ["--rungs", "after-16"], ["--steps", "0"], ["--minutes", "nan"],
                                     ["--steps", "2", "--minutes", "1"], ["--batch", "1"], ["--facts", "2"], ["--questions", "0"],
                                     ["--model", "/nowhere"], ["--device", "tpu9"], ["--unknown"]])
def test_bad_input_is_one_sentence(base, options, capsys, monkeypatch, tmp_path):
    """Catches tracebacks, usage pages, and output written all the same."""
    given = options if "--model" in options else [*options, "--model", str(base)]
    monkeypatch.setattr(sys, "argv", ["ladder", *given, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        run(ladder.main)
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and said[0].startswith("error:") and not (tmp_path / "out").exists()
