"""Facts that are trained in: what is taught, which tokens are learned, and both designs from train.py to generate.py."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import variants
from gemma import Gemma, GemmaConfig, InputError, Tokenizer
from tests.toy import CONFIG, one_thread, toy_base, toy_tokenizer          # noqa: F401
from tiny.pretrain import chapters_config, pretrain
from train import TrainConfig, main, train
from variants.chapters import ChapterMemory, ChaptersConfig
from variants.facts import GAPS, TaughtLesson, read_facts, taught
from variants.lora import LoraConfig, LoraMemory

ROOT = Path(__file__).resolve().parent.parent
ROWS = [dict(facts=["Maria lives in Lisbon."], questions=["Where does Maria live?", "Is Maria in?"], answer="Lisbon", unseen=["Where is Maria?"]),
        dict(facts=["Ana works in Oslo."], questions=["Where does Ana work?"], answer="Oslo", unseen=["Where is Ana?"]),
        dict(facts=["Tom's locker code is 4821."], questions=["What is Tom's code?"], answer="4821")]
LORA, BANK = dict(lora_rank=8, lora_lr=5.0), dict(bank=16, heads=2, head_dim=16, placement="all", bank_lr=2.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy_base(tmp_path_factory.mktemp("base").resolve())


@pytest.fixture(scope="module")
def facts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.txt"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\nBen was born on 3 May 1990.\n", encoding="utf-8")
    return path


def fresh(base, Model, config):
    torch.manual_seed(0)
    return Model(Gemma.from_pretrained(base), Tokenizer(base), config, base)


def settings(base, out, variant, **options):
    return TrainConfig(**{**dict(variant=variant, model=str(base), out=str(out), steps=40, batch=16, warmup=2, lr=1e-2, weight_decay=0.0,
                                 eval_every=20, device="cpu"), **options})


# --------------------------------------------------------------------------------------------------- what is taught

def test_taught_is_reproducible_and_asks_in_other_words():
    """Catches facts that depend on more than the seed, held-out questions that were trained, and ones that point at another fact."""
    tokenizer = Tokenizer(ROOT / "tiny")
    a, again, other = taught(tokenizer, 60, 1), taught(tokenizer, 60, 1), taught(tokenizer, 60, 2)
    assert a == again and a["facts"] != other["facts"] and len(a["facts"]) == len(a["wordings"]) == 60
    assert {q["support"][0] for q in a["train"]} == {q["support"][0] for q in a["held_out"]} == set(range(60))
    plain = lambda part: {re.sub(r"\W", "", q["question"].lower()) for q in a[part]}
    assert not any(seen in asked or asked in seen for asked in plain("held_out") for seen in plain("train"))
    answers = {}
    for q in a["train"] + a["held_out"]:
        assert answers.setdefault(q["support"][0], q["answer"]) == q["answer"]
        assert all(q["answer"] in wording for wording in a["wordings"][q["support"][0]])
    assert all(fact == wordings[0] for fact, wordings in zip(a["facts"], a["wordings"]))


def test_taught_in_every_way():
    """Catches a way to ask that is left out, a hole that nothing fills, and a sentence with its answer where the gap should be."""
    lesson = taught(Tokenizer(ROOT / "tiny"), 60, 1)
    for fact in range(60):
        asked, answer = zip(*((q["question"], q["answer"]) for q in lesson["train"] if q["support"] == [fact]))
        gaps = [q for q in asked if any(gap in q for gap in GAPS)]
        assert len(gaps) > 15 and len(asked) > 60 and len(lesson["wordings"][fact]) > 12
        assert sum(q.startswith(("Tell me: ", "Hello! ", "hm, ", "One thing, ")) for q in asked) > 1
        assert not any("{" in text for text in (*asked, *lesson["wordings"][fact]))
        assert not any(answer[0] in q for q in gaps)


def test_reads_a_facts_file(facts_file):
    """Catches a line that is lost, or a question that is trained though it was to be unseen."""
    read = read_facts(facts_file)
    assert read["facts"][0] == "Maria lives in Lisbon." and read["facts"][3] == "Ben was born on 3 May 1990."
    assert [q["question"] for q in read["train"]] == [q for row in ROWS for q in row["questions"]]
    assert [(q["question"], q["answer"], q["support"]) for q in read["held_out"]] == [("Where is Maria?", "Lisbon", [0]), ("Where is Ana?", "Oslo", [1])]


@pytest.mark.parametrize("line", ["{", "{}", '{"facts": "Maria"}', '{"facts": [1]}', '{"questions": ["Who?"]}', '{"facts": [""]}',
                                  '{"questions": ["Who?"], "answer": 3}', '{"facts": ["A."], "answer": "A"}', '{"facts": ["A."], "fact": "B."}', "{" * 9000, ""])
def test_bad_facts_files(tmp_path, line):
    """Catches a traceback, or a misspelt name that is silently left out."""
    path = tmp_path / "facts.txt"
    path.write_text(line and "A fine sentence.\n" + line)
    with pytest.raises(InputError, match="line 2" if line else "empty"):
        read_facts(path)
    with pytest.raises(InputError, match="facts file"):
        read_facts(tmp_path / "none.txt")


@pytest.mark.parametrize("train_on", ["answers", "text"])
def test_what_is_learned_of_a_sequence(base, facts_file, train_on):
    """Catches a loss on the question, on padding or off by one token; and a text whose router may look ahead."""
    model = fresh(base, LoraMemory, LoraConfig(facts_file=str(facts_file), train_on=train_on, **LORA))
    lesson = TaughtLesson(model, settings(base, "unused", "lora"))
    batch = lesson.sequences.batch(torch.arange(len(lesson.sequences)), train_on == "text")
    ids, decode = batch["input_ids"], model.tokenizer.decode
    said = [decode(row[1:][m].tolist()) for row, m in zip(ids, batch["learned"])]
    whole = [decode(row[m].tolist()) for row, m in zip(ids, batch["attention_mask"])]
    if train_on == "text":
        assert said == whole and batch["question_mask"] is None
        assert len(said) == 8 and "Ben was born on 3 May 1990.\n" in said
    else:
        assert said == [" Lisbon\n", " Lisbon\n", " Oslo\n", " 4821\n"]
        assert whole[1] == "Question: Is Maria in?\nAnswer: Lisbon\n" and decode(ids[1][batch["question_mask"][1]].tolist()) == "Question: Is Maria in?\nAnswer:"


def test_each_fact_is_as_likely(base, facts_file):
    """Catches a draw in which a fact with many questions crowds out the others."""
    model = fresh(base, LoraMemory, LoraConfig(facts_file=str(facts_file), train_on="text", **LORA))
    lesson, drawn = TaughtLesson(model, settings(base, "unused", "lora", batch=4000)), []
    lesson.forward = lambda batch: drawn.append(batch["input_ids"]) or (torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None)
    lesson.loss(8, torch.Generator().manual_seed(0))
    rows, counts = drawn[0].unique(dim=0, return_counts=True)
    texts = {model.tokenizer.decode(row.tolist()): n / 4000 for row, n in zip(rows, counts.tolist())}
    share = lambda *words: sum(n for text, n in texts.items() if any(word in text for word in words))
    assert all(abs(share(*words) - 0.25) < 0.03 for words in (("Maria",), ("Ana",), ("Tom",), ("Ben",)))
    assert abs(share("Maria lives") - 0.125) < 0.03 and abs(share("Is Maria") - 0.0625) < 0.02


def test_nothing_to_learn_is_said(base, tmp_path):
    """Catches an endless or empty training on a file that has no questions, and a fact that is too long for the base."""
    path = tmp_path / "facts.txt"
    path.write_text("Maria lives in Lisbon.\n")
    model = fresh(base, LoraMemory, LoraConfig(facts_file=str(path), **LORA))
    with pytest.raises(InputError, match="train-on text"):
        TaughtLesson(model, settings(base, "unused", "lora"))
    path.write_text("Maria lives in Lisbon. " * 40)
    model.config.train_on = "text"
    with pytest.raises(InputError, match="at most 128 tokens"):
        TaughtLesson(model, settings(base, "unused", "lora"))


# --------------------------------------------------------------------------------------- from train.py to generate.py

DESIGNS = [("lora", LoraMemory, LoraConfig, LORA), ("chapters", ChapterMemory, ChaptersConfig, BANK),
           ("chapters", ChapterMemory, ChaptersConfig, dict(BANK, bank=32, chapters=2, routing="hybrid", storage="int4", rank=8, sharing="layer", order="B", lora_rank=2)),
           ("chapters", ChapterMemory, ChaptersConfig, dict(BANK, storage="int8", train_on="text"))]


@pytest.mark.parametrize("variant, Model, Config, options", DESIGNS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_learns_saves_reloads(base, facts_file, tmp_path, variant, Model, Config, options):
    """Catches a design that doesn't learn, changes the base, isn't the base at first, or comes back from its files as another one."""
    model = fresh(base, Model, Config(facts_file=str(facts_file), **options))
    ids, mask = model.batch([q for row in ROWS for q in row["questions"]])
    alone, fingerprint = model.gemma(ids, mask), model.gemma.fingerprint()
    assert torch.equal(model.eval()(ids, mask, mask), alone)
    assert sorted(map(id, model.trainable_parameters())) == sorted(id(p) for part, _ in model.parameter_groups() for p in part)
    model, last = train(settings(base, tmp_path, variant, steps=60), model=model)
    assert last[4 if "train_on" in options else 3]["trained"] == 1.0
    questions = [q for row in ROWS for q in row["questions"] + row.get("unseen", [])]
    answers = model.answer(questions)
    assert answers[:2] == ["Lisbon", "Lisbon"] and model.add_to_memory.__self__.recall("Where?") == ([], 0.0)
    assert torch.equal(model.gemma(ids, mask), alone) and model.gemma.fingerprint() == fingerprint
    model.save_pretrained(tmp_path / "again")
    again = variants.load(tmp_path / "again")
    assert type(again) is Model and again.answer(questions) == answers and again.taught() == read_facts(facts_file)
    with torch.no_grad():
        assert torch.equal(again(ids, mask, mask), model(ids, mask, mask))
    if "storage" in options:
        assert not list(again.injection.banks.parameters())
    before = (tmp_path / "again" / "memory.safetensors").read_bytes()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "memory.safetensors").read_bytes() == before
    assert len(again.trainable_parameters()) == len(model.trainable_parameters())


def test_a_bank_trains_on_after_loading(base, facts_file, tmp_path):
    """Catches a packed bank that --init leaves packed: its optimizer would train everything else."""
    config = ChaptersConfig(facts_file=str(facts_file), **dict(BANK, storage="int4"))
    train(settings(base, tmp_path / "a", "chapters", steps=2), model=fresh(base, ChapterMemory, config))
    model, _ = train(settings(base, tmp_path / "b", "chapters", steps=2, init=str(tmp_path / "a")), model=fresh(base, ChapterMemory, config))
    before = variants.load(tmp_path / "a").injection.banks[0].dense()
    assert list(model.injection.banks.parameters()) and 0 < (model.injection.banks[0].dense() - before).abs().max() < 1


def test_resumed_as_if_unbroken(base, facts_file, tmp_path):
    """Catches a draw that a resumed run doesn't repeat, or a part of a design that its checkpoint leaves out."""
    config = ChaptersConfig(facts_file=str(facts_file), **dict(BANK, storage="int8", chapters=2, lora_rank=2, lora_dropout=0.1))
    run = lambda out, **options: train(settings(base, tmp_path / out, "chapters", eval_every=3, **options), model=fresh(base, ChapterMemory, config))[0]
    whole = run("a", steps=6)
    try:
        train(settings(base, tmp_path / "b", "chapters", eval_every=3, steps=6), model=stopping(fresh(base, ChapterMemory, config), 4))
    except KeyboardInterrupt:
        pass
    resumed = run("b", steps=6, resume=True)
    for (name, p), q in zip(whole.injection.named_parameters(), resumed.injection.parameters()):
        assert torch.equal(p, q), name


def stopping(model, after):
    """The model, which Ctrl-C interrupts at its n-th batch."""
    losses, count = model.losses, iter(range(1000))
    def interrupted():
        if next(count) == after:
            raise KeyboardInterrupt
        return losses()
    model.losses = interrupted
    return model


@pytest.mark.parametrize("variant", ["chapters", "lora"])
def test_configs_train_and_generate(base, facts_file, tmp_path, variant, capsys):
    """Catches an example config that train.py refuses, a command line that doesn't override it, and --memory taken for an error."""
    main(["--config", str(ROOT / "variants" / "configs" / f"{variant}.json"), "--model", str(base), "--out", str(tmp_path), "--facts-file", str(facts_file),
          "--steps", "1", "--batch", "8", "--device", "cpu", "--accumulate", "1"])
    assert "3 facts: exact match" in capsys.readouterr().out
    assert variants.load(tmp_path).trained["steps"] == 1
    (tmp_path / "facts.txt").write_text("Maria lives in Rome.\n")
    done = subprocess.run([sys.executable, "generate.py", "--model", str(tmp_path), "--memory", str(tmp_path / "facts.txt"), "--max-tokens", "2",
                           "Where does Maria live?"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "ignored" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_from_scratch_with_a_bank(tmp_path):
    """Catches a base that its memory froze, a bank that doesn't learn beside it, and a vanilla run that isn't the plain one."""
    vocabulary = toy_tokenizer(tmp_path).vocab_size
    data = torch.randint(107, vocabulary, (700,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    weights = {}
    for name, config in (("plain", None), ("vanilla", ChaptersConfig(vanilla=True)), ("bank", ChaptersConfig(**dict(BANK, chapters=2, routing="token", storage="int8")))):
        torch.manual_seed(0)
        options = SimpleNamespace(out=str(tmp_path), steps=3, batch=2, lr=0.2, seed=0)         # a high rate: 3 steps of 200 of warm-up
        pretrain(GemmaConfig.from_dict(dict(CONFIG, vocab_size=vocabulary)), data, options, config)
        weights[name] = dict(Gemma.from_pretrained(tmp_path).named_parameters())
    same = lambda a, b: all(torch.equal(p, weights[b][name]) for name, p in weights[a].items())
    assert same("plain", "vanilla") and not same("plain", "bank")
    model = ChapterMemory.from_pretrained(tmp_path / "chapters")
    assert model.injection.readers["1"].o_proj.full.abs().sum() > 0 and not list(model.injection.banks.parameters())
    ids, mask = model.batch(["Where does Maria live?"])
    with torch.no_grad():
        assert not torch.equal(model(ids, mask, mask), model.gemma(ids, mask))
    (tmp_path / "lora.json").write_text('{"lora_rank": 4}')
    with pytest.raises(InputError, match="lora_rank 0"):
        chapters_config(tmp_path / "lora.json")
    assert chapters_config(ROOT / "variants" / "configs" / "chapters.json").bank == 4096
