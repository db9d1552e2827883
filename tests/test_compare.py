"""bench.compare: every design is trained and measured on the same facts, a call that ends early is gone on with, and tables say what was measured."""

import json

import pytest

import train
from bench import compare, prefix, readme
from gemma import InputError
from toy import one_thread, toy_base  # noqa: F401 (one_thread is a fixture)
from variants.facts import TaughtLesson
from variants.shared import PoolLesson


@pytest.fixture(scope="module")
def measured(tmp_path_factory, one_thread):  # noqa: F811
    """(arguments, the folder of a comparison that took two calls, standard output of the last)."""
    folder = tmp_path_factory.mktemp("compare")
    base, out = toy_base(folder / "base", max_position_embeddings=4096), folder / "out"
    patch = pytest.MonkeyPatch()
    nothing = lambda *self, silent=False, **options: {4: dict(recall=0.0)}  # training's own figures take longer than all the rest
    patch.setattr(train, "evaluate", nothing)
    patch.setattr(PoolLesson, "evaluate", nothing)
    patch.setattr(TaughtLesson, "evaluate", nothing)
    arguments = ["--model", str(base), "--device", "cpu", "--quick", "--out", str(out), "--designs", "prefix,lora,prompt,none", "--turns", "2",
                 "--questions", "4", "--examples", "8", "--taught-examples", "8", "--batch-size", "8"]
    compare.main([*arguments, "--limit", "1e-9"])
    begun = json.loads((out / "compare.json").read_text())
    compare.main([*arguments, "--limit", "0", "--designs", "none,prompt"])                 # as a process of its own would
    compare.main([*arguments, "--limit", "0"])
    patch.undo()
    return arguments, begun, out


def test_all_jobs_are_done_over_several_calls(measured):
    """Catches a limit that is ignored, a job that is done twice, and one that is never done."""
    arguments, begun, out = measured
    result = json.loads((out / "compare.json").read_text())
    assert sum(len(jobs) for jobs in begun["designs"].values()) == 1
    assert begun["designs"]["prefix"]["train"] == result["designs"]["prefix"]["train"]
    assert result["designs"].keys() == {"prefix", "lora", "prompt", "none"}
    assert result["designs"]["prefix"].keys() == {"train", "recall 4", "update", "turns 2", "refusal", "locality", "cost"}
    assert result["designs"]["lora"].keys() == {"train 4", "recall 4", "locality", "cost"}
    assert result["designs"]["none"].keys() == {"recall 4", "update", "turns 2", "cost"}
    assert result["designs"]["prefix"]["recall 4"]["recall"]["n"] == result["designs"]["prompt"]["recall 4"]["recall"]["n"] >= 4
    assert result["designs"]["prefix"]["cost"]["bytes_per_fact"] > 0 and result["designs"]["none"]["cost"]["parameters"] == 0


def test_the_report_has_a_column_for_each(measured):
    """Catches a design or a measurement that is left out of the table, and figures in the wrong column."""
    _, _, out = measured
    result = json.loads((out / "compare.json").read_text())
    result["designs"]["prefix"]["recall 4"]["recall"] = dict(share=0.5, low=0.25, high=0.75, right=2, n=4)
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in compare.report(result).splitlines()}
    assert lines["%"] == ["prefix", "LoRA", "facts in the prompt", "no memory"]
    assert lines["recall, 4 facts"][0] == "50.0 (25.0–75.0)" and lines["examples trained on"] == ["8", "8", "–", "–"]
    assert lines["told in turn 1, 2 turns later"][1] == "–" != lines["told in turn 1, 2 turns later"][2]
    assert lines["seconds to remember a fact"][0] != "–" != lines["seconds to remember a fact"][1]


def test_the_short_table_has_a_row_for_each(measured, monkeypatch, tmp_path):
    """Catches figures in the wrong column of README.md's table of designs, and a plot that a page in docs/ doesn't find."""
    _, _, out = measured
    result = json.loads((out / "compare.json").read_text())
    result["designs"]["prefix"]["recall 4"]["recall"] = dict(share=0.5, low=0.25, high=0.75, right=2, n=4)
    result["designs"]["prefix"]["cost"]["bytes_per_fact"] = 1234
    monkeypatch.setattr(readme, "HERE", tmp_path)
    assert readme.designs_in_short() == readme.compared("gemma-3-270m") and "not been measured" in readme.designs_in_short()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "compare-gemma-3-270m.json").write_text(json.dumps(result))
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.designs_in_short().splitlines() if line.startswith("|")]
    assert [row[0] for row in rows] == ["prefix", "LoRA", "facts in the prompt", "no memory"]
    prefix, lora = (dict(zip(head, row)) for row in rows[:2])
    assert prefix["recall, 4 facts"] == "50.0" and prefix["bytes a fact"] == "1,234" and lora["update"] == "–" != prefix["update"]
    assert "](../bench/results/compare-gemma-3-270m.png)" in readme.compared("gemma-3-270m")


def test_other_settings_are_not_mixed_in(measured):
    """Catches a comparison of designs that were trained on more examples than others."""
    arguments, _, _ = measured
    with pytest.raises(InputError, match="examples = 8, got 16"):
        compare.main([*arguments[:-6], "--examples", "16", "--batch-size", "8"])


def test_what_keeps_the_prefix_from_answering(measured, tmp_path, monkeypatch):
    """Catches a row of the ablation that is lost, done twice or mixed with one of other settings, questions that are asked without
    their fact, and a page that doesn't show the table."""
    monkeypatch.setattr(PoolLesson, "evaluate", lambda *self, silent=False, **options: {4: dict(recall=0.0)})
    monkeypatch.setattr(readme, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    assert "not measured" in readme.ablated("toy").lower()
    arguments = ["--model", measured[0][1], "--device", "cpu", "--quick", "--out", str(tmp_path / "out"), "--questions", "4", "--examples", "8", "--batch-size", "8"]
    first = prefix.main([*arguments, "--slots", "2"])
    both = prefix.main([*arguments, "--slots", "1,2"])
    assert list(both["rows"]) == ["oracle", "examples", "2", "1"] and all(both["rows"][name] == row for name, row in first["rows"].items())
    assert both["rows"]["2"]["told"]["n"] == both["rows"]["2"]["alone"]["n"] == both["rows"]["oracle"]["untrained"]["n"] >= 4
    assert both["rows"]["2"]["parameters"] > both["rows"]["1"]["parameters"]
    (tmp_path / "results" / "prefix-toy.json").write_text(json.dumps(both))
    lines = [line for line in readme.ablated("toy").splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["1 slot", "2 slots"] and len(lines) == 6
    with pytest.raises(InputError, match="other settings"):
        prefix.main([*arguments[:-4], "--examples", "16"])
    cell = [(["Ana works in Oslo.", "Tom is 40."], [dict(question="How old is Tom?", answer="40", support=[1], kind="lookup")])]
    assert prefix.by_itself(cell) == [(["Tom is 40."], [dict(question="How old is Tom?", answer="40", support=[0], kind="lookup")])]


def test_a_conversation_begins_with_the_fact(measured):
    """Catches a question about another turn than the first, and a conversation of another length."""
    args = compare.parse_arguments(["--quick", "--device", "cpu"])
    tokenizer = compare.variants.find("none").from_pretrained(base=measured[0][1]).tokenizer
    for facts, (q,) in compare.conversations(args, tokenizer, 5):
        assert len(facts) == 6 and q["support"] == [0] and q["answer"] in facts[0] and len(set(facts)) == 6
