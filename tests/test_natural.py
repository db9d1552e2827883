"""bench/natural: that the set is fair (every answer can be copied from its sentence), and that its numbers mean what their names say."""

import json
import re
import sys

import pytest
import torch

from bench import natural
from bench.common import run
from bench.recall import Reply
from extras.memory_model import DONT_KNOW
from gemma import Gemma, Tokenizer, read_json
from memory import GemmaWithMemory, MemoryConfig
from toy import one_thread, toy_base  # noqa: F401

MEMORIES = read_json(natural.SET)["memories"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy base with a context long enough for whole sentences in its byte-wise tokens, and an untrained memory beside it."""
    folder = toy_base(tmp_path_factory.mktemp("toy"), max_position_embeddings=4096)
    torch.manual_seed(1)
    config = MemoryConfig(inject_after=2, heads=2, key_dim=16, token_key_dim=8, gat_dim=8, candidates=4, readable=2)
    GemmaWithMemory(Gemma.from_pretrained(folder), Tokenizer(folder), config, folder).save_pretrained(folder)
    return folder


def test_every_answer_stands_in_its_fact():
    """Catches an answer that cannot be copied, an index that is off by one, and an answer that is half a sentence."""
    for memory in MEMORIES:
        for q in memory["questions"]:
            assert 0 <= q["fact"] < len(memory["facts"])
            assert natural.accepted(q)
            for answer in natural.accepted(q):
                assert re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", memory["facts"][q["fact"]]), (q, memory["facts"][q["fact"]])
                assert answer == answer.strip() and 1 <= len(answer.split()) <= 6, answer


def test_shape_of_the_set():
    """Catches memories and questions that stand there twice, and text that is no clean sentence."""
    assert len(MEMORIES) == 12 and len({m["title"] for m in MEMORIES}) == 12
    everything = []
    for memory in MEMORIES:
        assert set(memory) == {"title", "facts", "questions", "unanswerable"}
        assert 12 <= len(memory["facts"]) <= 16 and 10 <= len(memory["questions"]) <= 14 and 3 <= len(memory["unanswerable"]) <= 4
        assert all(set(q) == {"question", "answer", "fact"} for q in memory["questions"])
        assert all(len(set(natural.accepted(q))) == len(natural.accepted(q)) for q in memory["questions"])
        questions = [q["question"] for q in memory["questions"]] + memory["unanswerable"]
        assert all(q.endswith("?") for q in questions)
        everything += memory["facts"] + questions
    assert len(set(map(str.lower, everything))) == len(everything)
    assert all(text == text.strip() and "\n" not in text and "  " not in text for text in everything)
    assert sum(30 <= len(fact.split()) <= 40 for m in MEMORIES for fact in m["facts"]) >= 8


def test_what_counts():
    """Catches a refusal counted as right, alternatives that are ignored, and rightly refused mixed with wrongly refused."""
    known = dict(question="?", answer="in Rome", wordings=["in Rome", "Rome"], support=[0], kind="lookup")
    unknown = dict(question="??", answer=DONT_KNOW, wordings=[], support=[], kind="unanswerable")
    replies = [Reply(known, "Rome", 0.1, True), Reply(known, "rome.", 0.1, True), Reply(known, "Rome", 0.9, True), Reply(known, "Oslo", 0.1),
               Reply(unknown, "Rome", 0.9), Reply(unknown, "Rome", 0.1)]
    got = natural.measure(replies, 0.5)
    assert {name: (s["right"], s["n"]) for name, s in got.items()} == dict(
        exact=(1, 4), kindly=(2, 4), first=(3, 4), refused_wrongly=(1, 4), unrefused=(2, 4), refused_rightly=(1, 2))
    assert [(m["expected"][0], m["said"]) for m in natural.misses(replies, 0.5)] == [
        ("in Rome", "rome."), ("in Rome", DONT_KNOW), ("in Rome", "Oslo"), (DONT_KNOW, "Rome")]


def test_whole_command(folder, tmp_path, capsys):
    """Catches parts that don't work together: the table, the misses, the JSON."""
    natural.main(["--model", str(folder), "--device", "cpu", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "natural.json").read_text(encoding="utf-8"))
    assert [m["title"] for m in result["memories"]] == [m["title"] for m in MEMORIES]
    assert result["all"]["exact"]["n"] == sum(len(m["questions"]) for m in MEMORIES)
    assert result["all"]["refused_rightly"]["n"] == sum(len(m["unanswerable"]) for m in MEMORIES)
    assert result["commit"] and "torch" in result["hardware"]
    assert all(m["title"] in printed for m in MEMORIES) and "all (95% intervals)" in printed
    for memory in result["memories"]:
        assert all(miss["question"] in printed for miss in memory["misses"])


@pytest.mark.parametrize("options", [["--model", "/nowhere"], ["--device", "tpu9"], ["--unknown"], ["--out", __file__]])
def test_bad_input_is_one_sentence(options, folder, capsys, monkeypatch):
    """Catches tracebacks and usage pages."""
    monkeypatch.setattr(sys, "argv", ["natural", "--model", str(folder), *options])
    with pytest.raises(SystemExit) as stopped:
        run(natural.main)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len([line for line in said if line.startswith("error:")]) == 1


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        natural.main(["--help"])
    assert stopped.value.code == 0 and "example: python -m bench.natural" in capsys.readouterr().out
