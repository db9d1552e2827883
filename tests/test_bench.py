"""bench/: that its numbers mean what their names say. Perfect answers get 100%, nonsense 0%, and the fast ways equal the slow."""

import argparse
import json
import math
import sys

import pytest
import torch

from bench import recall
from bench.common import numbers, percent, share, some_of, table, wilson
from data_gen import World, open_vocabulary
from gemma import Gemma, InputError, Tokenizer
from memory import GemmaWithMemory, MemoryConfig
from toy import one_thread, toy_base  # noqa: F401

QUICK = ["--sizes", "4,16", "--questions", "8", "--edits", "5", "--batch", "16", "--quick"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy base with a context long enough for whole facts in its byte-wise tokens, and an untrained memory beside it."""
    folder = toy_base(tmp_path_factory.mktemp("toy"), max_position_embeddings=4096)
    torch.manual_seed(1)
    config = MemoryConfig(inject_after=2, heads=2, key_dim=16, token_key_dim=8, gat_dim=8, candidates=4, readable=2, value_scale=2.0)
    model = GemmaWithMemory(Gemma.from_pretrained(folder), Tokenizer(folder), config, folder)
    for name, p in model.injection.named_parameters():
        if "temperature" in name:
            p.data.fill_(3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return GemmaWithMemory.from_pretrained(folder)


class Scripted(GemmaWithMemory):
    """Stores for real, but answers and weighs from a script: question -> (answer, null weight)."""

    script = None

    def answer(self, questions, max_new_tokens=64):
        self._open()
        self.asked = questions
        return [self.script(q)[0] for q in questions]

    def weights(self):
        N = self.injection.view.valid.shape[1]
        null = torch.tensor([self.script(q)[1] for q in self.asked])[:, None]
        return torch.cat(((1 - null) / N * torch.ones(len(self.asked), N), null), 1)


def scripted(folder, monkeypatch, script_of):
    """A Scripted model; script_of(truths) makes its script from a dict that learns every answer as questions are drawn."""
    truths, draw = {}, World.memory

    def memory(self, *args):
        facts, asked = draw(self, *args)
        truths.update({q["question"]: q["answer"] for q in asked})
        return facts, asked
    monkeypatch.setattr(World, "memory", memory)
    base = GemmaWithMemory.from_pretrained(folder)
    model = Scripted(base.gemma, base.tokenizer, base.config, folder)
    model.script = script_of(truths)
    return model


def measured(model, *options):
    return recall.Bench(model, recall.parse_arguments([*QUICK, "--model", "toy", *options])).run()


# ------------------------------------------------------------------------------------------------------------- numbers

def test_wilson():
    """Catches a normal-approximation interval, which says (0, 0) for 0 of 10. Values from Newcombe 1998, table I, and by hand."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


def test_percent_and_table():
    """Catches a cell without trials that shows as 0, and columns that don't line up."""
    assert percent(share(0, 0)) == "–" and percent(share(1, 1)) == "100.0"
    assert percent(share(81, 263), interval=True) == "30.8 (25.5–36.6)"
    lines = table(["a", "bb"], [["x", 1], ["longer", 22]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1] == "|--------|----:|"


def test_threshold_on_a_curve_made_by_hand():
    """Catches a threshold at the edge of the gap, >= for > (answer() refuses above it), and precision mixed up with recall."""
    known, unknown = [0.1, 0.2, 0.3], [0.8, 0.9]
    assert recall.choose_threshold(known, unknown) == pytest.approx(0.55)
    both = recall.refusals(known, unknown, 0.2)
    assert both["precision"]["share"] == pytest.approx(2 / 3) and both["recall"]["share"] == 1
    # One answerable question at 0.85: refusing 0.9 alone has F1 2/3, refusing all three 4/5: no more than a standard error of 0.28 apart.
    assert recall.choose_threshold([0.1, 0.85], [0.8, 0.9]) == pytest.approx(0.875)
    # The same 50 times over: now 4/5 is better beyond chance.
    assert recall.choose_threshold([0.1, 0.85] * 50, [0.8, 0.9] * 50) == pytest.approx(0.45)
    # Separable but crowded near 1.
    threshold = recall.choose_threshold([0.9, 0.991], [0.999, 0.9999])
    assert 0.991 < threshold < 0.999
    points = recall.curve(known, unknown)
    assert [p["threshold"] for p in points] == sorted(p["threshold"] for p in points)
    assert all(a["recall"] >= b["recall"] for a, b in zip(points, points[1:]))
    with pytest.raises(InputError):
        recall.choose_threshold(known, [])


def test_set_threshold_keeps_the_rest(folder, tmp_path):
    """Catches a rewrite that loses entries of memory.json or leaves a temporary file behind."""
    before = json.loads((folder / "memory.json").read_text())
    (tmp_path / "memory.json").write_text(json.dumps(before))
    recall.set_threshold(tmp_path, 0.25)
    after = json.loads((tmp_path / "memory.json").read_text())
    assert after["memory"].pop("null_threshold") == 0.25 and before["memory"].pop("null_threshold") == 0.5
    assert after == before and [f.name for f in tmp_path.iterdir()] == ["memory.json"]


# ------------------------------------------------------------------------------------------------- perfect and nonsense

def test_a_perfect_model_gets_everything(folder, monkeypatch):
    """Catches questions that lose their truth on the way: cut answers, wrong rows, retold or edited facts with the old value."""
    perfect = scripted(folder, monkeypatch, lambda truths: lambda q: (truths.get(q, ""), 0.0 if truths.get(q) else 1.0))
    result = measured(perfect, "--only", "recall,refusal,edits")
    assert len(result["recall"]) == 12
    assert all(r["recall"]["share"] == 1 and r["recall"]["n"] >= 8 and r["refused"]["share"] == 0 for r in result["recall"])
    assert 0.4 < result["refusal"]["chosen"] < 0.6
    for row in result["refusal"]["rows"]:
        assert row["saved"]["precision"]["share"] == row["saved"]["recall"]["share"] == row["saved"]["right"]["share"] == 1
        assert row["unknown"] == pytest.approx(row["known"] / 4, abs=1)
    again, forgotten, replaced, told = result["edits"]
    assert again["recall"]["share"] == 1
    # It knows nothing of forgetting and editing: that must show.
    assert forgotten["gone"]["share"] == 0 and forgotten["others_kept"]["share"] == 1
    # Where new values are drawn, what is asked of nobody ("How much cash do I have?") may be asked again, with another truth.
    assert replaced["before"]["share"] > 0.8 and replaced["edited"]["share"] < replaced["before"]["share"]
    assert replaced["untouched"] == replaced["untouched_before"] and replaced["untouched"]["share"] > 0.8
    assert replaced["facts_at_the_end"] == 16 < told["facts_at_the_end"] <= 21


@pytest.mark.parametrize("replace", [True, False])
def test_what_an_edit_retains(folder, monkeypatch, replace):
    """Catches a truth right after an edit that is not the last one's, another row of the memory, and what was never right counted as lost."""
    cells = []

    def ask(self, cell, **options):                                        # before any edit; at the end, each second wrong; right after, each fourth
        cells.append([(view, q) for view, asked in cell for q in asked])
        return [recall.Reply(q, q["answer"] if i % (0, 99, 2, 4)[len(cells)] else "?") for i, (_, q) in enumerate(cells[-1])]
    bench = recall.Bench(scripted(folder, monkeypatch, lambda truths: None), recall.parse_arguments([*QUICK, "--model", "toy", "--edits", "30"]))
    bench.result = dict(edits=[])
    monkeypatch.setattr(recall.Bench, "ask", ask)
    bench.many_edits(16, replace)
    (row,), (_, end, once) = bench.result["edits"], cells
    last = {q["question"]: q["answer"] for _, q in end}
    assert once and all(q["answer"] == last[q["question"]] for _, q in once)
    assert len({id(view) for view, _ in once}) > 1 == len({id(view) for view, _ in end})
    assert all(q["support"][0] < view.valid.shape[1] for view, q in once) and any(q["support"][0] >= 16 for _, q in once) == (not replace)
    right = {q["question"] for i, (_, q) in enumerate(once) if i % 4}
    kept = [i % 2 for i, (_, q) in enumerate(end) if q["question"] in right]
    assert 0 < row["retained"]["right"] == sum(kept) < row["retained"]["n"] == len(kept) < row["edited"]["n"] == len(once)


def test_nonsense_gets_nothing(folder, monkeypatch):
    nonsense = scripted(folder, monkeypatch, lambda truths: lambda q: ("nonsense", 0.0))
    result = measured(nonsense, "--only", "recall,edits")
    assert all(r["recall"]["right"] == r["unrefused"]["right"] == 0 for r in result["recall"])
    assert result["edits"][0]["recall"]["right"] == 0 and result["edits"][1]["gone"]["n"] == 0


def test_a_refusal_is_a_wrong_answer(folder, monkeypatch):
    """Catches a headline that leaves out the questions which the model refused."""
    shy = scripted(folder, monkeypatch, lambda truths: lambda q: (truths.get(q, ""), 0.9))
    for row in measured(shy, "--only", "recall")["recall"]:
        assert row["recall"]["share"] == 0 and row["unrefused"]["share"] == 1 and row["refused"]["share"] == 1


# ------------------------------------------------------------------------------------------------------- fast and slow

def drawn(model, sizes, kind=None):
    world = World("test", 5, open_vocabulary(model.tokenizer))
    return [world.memory(N, 4, kind) for N in sizes]


def test_memories_side_by_side_answer_as_one_by_one(model):
    """Catches rows that read their neighbour's memory, and padded episodes that count."""
    cell = drawn(model, (4, 7, 16))
    together = recall.ask(model, [(recall.remember(model, facts), asked) for facts, asked in cell], 64, 12)
    model.config.null_threshold = math.inf
    i = 0
    for facts, asked in cell:
        recall.remember(model, facts)
        for q in asked:
            assert together[i].said == model.answer(q["question"], max_new_tokens=12)
            assert together[i].null == pytest.approx(model.weights()[0, -1].item(), abs=1e-5)
            i += 1
    assert i == len(together)


def test_asking_leaves_the_model_as_it_was(model):
    """Catches a model that after the bench never refuses, or answers from a snapshot instead of its own memory."""
    (facts, asked), = drawn(model, (8,))
    view = recall.remember(model, facts)
    model.clear_memory()
    model.add_to_memory("something else")
    recall.ask(model, [(view, asked)], 64, 2)
    model.clear_memory()
    assert model.config.null_threshold == 0.5 and model.answer(asked[0]["question"]) == "I don't know."
    model.add_to_memory(facts[:2])
    model.recall(asked[0]["question"])
    assert model.injection.view.valid.shape == (1, 2)


def test_retrieval_counts(model, monkeypatch):
    """Catches the wrong fact of a two-hop question, and lists of which half was found."""
    view = recall.remember(model, ["a", "b", "c", "d", "e", "f", "g"])
    monkeypatch.setattr(model, "answer", lambda questions, **_: [""] * len(questions))
    monkeypatch.setattr(model, "weights", lambda: torch.tensor([[0.3, 0.2, 0.1, 0.09, 0.08, 0.02, 0.01, 0.2]] * 4))
    ask = lambda kind, support: dict(question=kind, answer="x", support=support, kind=kind)
    replies = recall.ask(model, [(view, [ask("two_hop", [0, 1]), ask("two_hop", [6, 0]), ask("list", [0, 6]), ask("list", [4, 0])])])
    assert [r.first for r in replies] == [False, True, True, True]
    assert [r.five for r in replies] == [True, True, False, True]


def test_complete_is_greedy_decoding(model):
    """Catches a shared beginning that is computed wrongly: off by one, at wrong positions, leaking between rows, or further
    away from sliding windows where a row is padded in the middle."""
    context = "Tom's locker code is 4821.\n" * 100                          # longer than one piece of the prefill
    prompts = [recall.prompt_with(model, q, context) for q in ("Who?", "Where does Maria live?", "What is the code of Tom?")]
    assert len(prompts[0]) > 1100
    model.gemma.double()
    said = recall.complete(model, prompts, 10, batch=2)
    few = [recall.prompt_with(model, q) for q in ("Who?", "Where does Maria live?")]       # next to nothing in common
    for prompt, text in zip(prompts + few, said + recall.complete(model, few, 10)):
        new = [t.item() for t in model.gemma.stream(torch.tensor([prompt]), max_new_tokens=10, stop=model.stop)]
        assert text == model.text(new)
    assert recall.complete(model, prompts[:1], 10) == said[:1]
    assert recall.prompt_with(model, "Who?") == model.prompt("Who?")


def test_search_finds_the_fact_itself(model):
    facts = drawn(model, (16,), "lookup")[0][0]
    for how in ("embedding", "hidden"):
        assert [best[0] for best in recall.search(model, facts, facts, how)] == list(range(16))


def test_stranger_questions_are_about_strangers(model):
    """Catches an "unanswerable" question that the memory does answer, and a share other than a fifth."""
    known = unknown = 0
    sorts = set()
    for facts, asked in recall.mixed(World("test", 3, open_vocabulary(model.tokenizer)), 16, 100):
        known += sum(bool(q["support"]) for q in asked)
        unknown += sum(not q["support"] for q in asked)
        sorts |= {q["sort"] for q in asked if not q["support"]}
    assert 0.18 < unknown / (known + unknown) < 0.22 and sorts == {"near", "unknown", "world"}


# -------------------------------------------------------------------------------------------------------- command line

def test_whole_command(folder, tmp_path, capsys):
    """Catches parts that don't work together: every table is printed, the JSON is whole, an empty memory changes nothing."""
    (tmp_path / "memory").mkdir()
    for name in ("memory.json", "memory.safetensors"):
        (tmp_path / "memory" / name).write_bytes((folder / name).read_bytes())
    recall.main(["--model", str(tmp_path / "memory"), "--device", "cpu", "--out", str(tmp_path / "out"), "--set-threshold", *QUICK])
    printed = capsys.readouterr().out
    for heading in ("Recall, exact match", "Right episode first", "number of tokens", "Refusal with", "Edits", "Perplexity", "answered in other ways"):
        assert heading in printed
    result = json.loads((tmp_path / "out" / "recall.json").read_text())
    saved = json.loads((tmp_path / "memory" / "memory.json").read_text())["memory"]["null_threshold"]
    assert saved == result["refusal"]["chosen"] == result["refusal"]["threshold"]
    assert result["locality"]["rows"][0]["change"] == 0 and result["locality"]["rows"][1]["change"] != 0
    assert {r["method"] for r in result["controls"]} == set(recall.METHODS)
    assert result["seed"] == 0 and result["commit"] and "torch" in result["hardware"]
    with_plots = __import__("importlib.util").util.find_spec("matplotlib")
    assert (tmp_path / "out" / "recall.png").is_file() == bool(with_plots)
    GemmaWithMemory.from_pretrained(tmp_path / "memory")                   # still loads, strictly


def test_a_part_by_itself_measures_the_same(folder):
    """Catches draws that depend on which parts ran before."""
    of = lambda *only: measured(GemmaWithMemory.from_pretrained(folder), "--sizes", "4", "--only", ",".join(only))
    both, alone = of("recall", "edits"), of("edits")
    assert both["edits"] == alone["edits"]


@pytest.mark.parametrize("options", [["--sizes", "4,x"], ["--sizes", "1"], ["--only", "recal"], ["--questions", "0"], ["--set-threshold", "--only", "recall"],
                                     ["--model", "/nowhere"], ["--device", "tpu9"], ["--unknown"], ["--text", "/nowhere.txt", "--only", "locality"]])
def test_bad_input_is_one_sentence(folder, options, capsys, monkeypatch, tmp_path):
    """Catches tracebacks, usage pages, and output written all the same."""
    given = options if "--model" in options else [*options, "--model", str(folder)]
    monkeypatch.setattr(sys, "argv", ["recall", *given, "--out", str(tmp_path / "out")])
    from bench.common import run
    with pytest.raises(SystemExit) as stopped:
        run(recall.main)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(said) == 1 and not (tmp_path / "out").exists()


def test_lists_on_the_command_line():
    """Catches a list that isn't in order or has something twice, and one that nothing can be done with."""
    assert numbers(2)("16,4,16") == [4, 16] and some_of(("recall", "edits", "controls"))("controls,recall") == ["recall", "controls"]
    for read, text in [*((numbers(2), text) for text in ("", ",", "a", "1,4", "4.5")), *((some_of(("a", "b")), text) for text in ("", "a,", "c"))]:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            read(text)
