"""The other designs: each is trained by train.py, saved and opened again, asked by generate.py, and leaves the base as it is."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

import generate
import train
import variants
from bench import recall
from extras.memory_model import DONT_KNOW, question_prompt
from extras.pool import Pool
from extras.settings import read_settings
from gemma import InputError
from memory import GemmaWithMemory
from toy import FACTS, one_thread, toy_base  # noqa: F401 (one_thread is a fixture)
from variants.cross_attention import CrossConfig
from variants.prefix import SLOT, PrefixConfig, with_slots
from variants.shared import PoolLesson, Turns, retrieval_loss

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"prefix": PrefixConfig(slots=3, gist_after=2, heads=2, key_dim=8), "cross": CrossConfig(turns="all", heads=2, head_dim=8), "none": None}
TOLD = ["prefix", "cross"]
SETTINGS = dict(device="cpu", steps=2, batch=8, facts=8, bundles=20, warmup=0, lr=0.02, eval_every=2, tokens=70)


@pytest.fixture(scope="module")
def base(tmp_path_factory, one_thread):  # noqa: F811
    return toy_base(tmp_path_factory.mktemp("variants") / "base", max_position_embeddings=512)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """{name: (folder of the trained design, the base's weights before)}, by train.py's own loop."""
    folders, measured = {}, PoolLesson.evaluate
    few = lambda self, silent=False, **options: measured(self, silent, sizes=(4,), questions=8)
    patch = pytest.MonkeyPatch()
    patch.setattr(PoolLesson, "evaluate", few)
    for name, config in CONFIGS.items():
        out = tmp_path_factory.mktemp(name)
        fresh = variants.find(name).from_pretrained(base=base, config=config)
        pools = None if name == "none" else (pool_for(fresh),) * 2         # one of them draws pools of its own
        model, result = train.train(train.TrainConfig(variant=name, model=str(base), out=str(out), **SETTINGS), fresh.config, fresh, pools)
        folders[name] = out, model, result
    patch.undo()
    return folders


def pool_for(model):
    return Pool(model, "train", 20, SETTINGS["tokens"], 0, texts=4, progress=False, layers=(model.facts_layer, 0))


def logits_of(model, text="Where does Maria live?"):
    with torch.no_grad():
        ids, mask = model.batch([text])
        return model(ids, mask, mask)


# --------------------------------------------------------------------------------------------------------- all designs

@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_opened_again(trained, base, name):
    """Catches weights or settings that are lost on the way to the disk, a folder opened as another design, and answers that differ by a bit."""
    folder, model, result = trained[name]
    assert json.loads((folder / "memory.json").read_text())["variant"] == name and 4 in result
    again = variants.load(folder)
    assert type(again) is type(model) is variants.find(name) and asdict(again.config) == asdict(model.config)
    assert again.trained["variant"] == name
    for m in (model, again):
        m.clear_memory()
        m.add_to_memory(FACTS)
    assert torch.equal(logits_of(model), logits_of(again))
    questions = ["Where does Maria live?", "What is Tom's locker code?"]
    assert model.answer(questions, max_new_tokens=6) == again.answer(questions, max_new_tokens=6)
    with pytest.raises(InputError, match="variants.load"):
        GemmaWithMemory.from_pretrained(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_base_is_as_it_was(trained, base, name):
    """Catches a base that training or asking has touched, or that would be trained, and logits that change while nothing is held."""
    from gemma import Gemma
    model, fresh = variants.load(trained[name][0]), Gemma.from_pretrained(base)
    bare = fresh(model.batch(["Who is Tom?"])[0])
    assert torch.equal(bare, logits_of(model, "Who is Tom?"))
    model.add_to_memory(FACTS)
    model.answer("Who is Tom?", max_new_tokens=3)
    after = trained[name][1].gemma
    for (n, one), two, three in zip(fresh.named_parameters(), model.gemma.parameters(), after.parameters()):
        assert torch.equal(one, two) and torch.equal(one, three) and not two.requires_grad, n
    mine = {id(p) for p in model.gemma.parameters()}
    assert not mine & {id(p) for p in model.trainable_parameters()}
    model.clear_memory()
    assert torch.equal(bare, logits_of(model, "Who is Tom?"))


@pytest.mark.parametrize("name", TOLD)
def test_training_moves_all_that_trains(trained, base, name):
    """Catches a part that no gradient reaches. (o_proj starts at zero: behind it the first step moves nothing, the second does.)"""
    folder, model, _ = trained[name]
    assert sorted(map(id, model.trainable_parameters())) == sorted(id(p) for part, _ in model.parameter_groups() for p in part)
    torch.manual_seed(0)
    start = type(model)(model.gemma, model.tokenizer, CONFIGS[name], str(base)).injection.state_dict()
    for n, p in model.injection.named_parameters():
        assert not torch.equal(p, start[n]), n


@pytest.mark.parametrize("name", TOLD)
def test_facts_are_told_and_forgotten(trained, name):
    """Catches an answer that no fact changes, a forgotten fact that goes on speaking, ids that are given twice, and a memory that leaks
    into the next question of a batch."""
    model = variants.load(trained[name][0])
    assert model.answer("Where does Maria live?") == DONT_KNOW and model.recall("Where?") == ([], 1.0)
    with pytest.raises(InputError):
        model.add_to_memory(["Maria lives in Rome.", " "])
    assert not len(model.memory_graph)
    empty = logits_of(model)
    ids = model.add_to_memory(FACTS)
    full = logits_of(model)
    assert not torch.equal(full, empty)
    found, null = model.recall("Where does Maria live?")
    assert {i for i, _, _ in found} <= set(ids) and all(text == FACTS[ids.index(i)] for i, _, text in found)
    weights = model.weights()[0]
    assert weights.shape == (len(FACTS) + 1,) and weights.sum().item() == pytest.approx(1.0, abs=1e-3) and weights[-1].item() == pytest.approx(null)
    extra = model.add_to_memory("Ben lives in Rome.")
    assert extra not in ids and not torch.equal(logits_of(model), full)
    model.forget(extra)
    assert torch.equal(logits_of(model), full) and model.memory_graph.texts == FACTS
    with pytest.raises(InputError, match="id"):
        model.forget(extra)
    model.config.null_threshold = 1.0
    together = model.answer(["Where does Maria live?", "What is the locker code of Tom, again?"], max_new_tokens=6)
    assert together == [model.answer(q, max_new_tokens=6) for q in ("Where does Maria live?", "What is the locker code of Tom, again?")]


@pytest.mark.parametrize("name", TOLD)
def test_a_base_in_bfloat16(trained, name):
    """Catches weights in float32 that meet a base in bfloat16, as it is on a GPU."""
    model = variants.load(trained[name][0], dtype=torch.bfloat16)
    model.config.null_threshold = 1.0
    bare = logits_of(model)
    model.add_to_memory(FACTS)
    assert not torch.equal(logits_of(model), bare) and model.answer("Where does Maria live?", max_new_tokens=3) != DONT_KNOW


@pytest.mark.parametrize("name", TOLD)
def test_generate_remembers_the_turn(trained, name):
    """Catches a prompt that finds itself, a turn that is not remembered, and padding that becomes part of it."""
    model = variants.load(trained[name][0])
    model.add_to_memory(FACTS[:2])
    ids, mask = model.batch(["Who is Tom?", "Where does the sister of Maria live?"])
    before = model.stream(ids, attention_mask=mask, max_new_tokens=4)
    before = torch.stack([*ids.T, *before], 1)
    made = model.generate(ids, max_new_tokens=4, attention_mask=mask)
    assert torch.equal(made, before) and len(model.memory_graph) == 4
    assert model.memory_graph.texts[2].startswith("Question: Who is Tom?\nAnswer:")


@pytest.mark.parametrize("name", TOLD)
def test_training_sees_what_answers_see(trained, base, name):
    """Catches a training step with another memory, prompt or place in the sequence than `answer` has: it would learn something else."""
    model = variants.load(trained[name][0])
    pool = pool_for(model)
    lesson = type(model).Lesson(model, train.TrainConfig(**SETTINGS), (pool, pool))
    batch = pool.draw(2, 8, 8, 0.0, 0.0, torch.Generator().manual_seed(1))
    model.load_memory(trained[name][0])                                    # the lesson took statistics of its own
    model.eval()
    with torch.no_grad():
        out = lesson.forward(pool, batch)
    seen, tokenizer = 0, model.tokenizer
    text = lambda store, i, start=0, stop=None: tokenizer.decode(store.ids[int(store.starts[i]):][:int(store.lengths[i])][start:stop].tolist())
    for g in range(2):
        model.clear_memory()
        model.add_to_memory([text(pool.facts, int(e)) for e in batch["episodes"][g][batch["valid"][g]]])
        for r in range(4 * g, 4 * g + 4):
            s = int(batch["sequence"][r])
            prompt = int(pool.prompt_length[s])
            question = text(pool.sequences, s, 1, prompt).removeprefix("Question: ").removesuffix("\nAnswer:")
            model.recall(question)
            n = len(model.memory_graph)
            theirs = out["log_weights"][r].exp().mean(0)
            torch.testing.assert_close(model.weights()[0], torch.cat((theirs[:n], theirs[-1:])), rtol=1e-3, atol=1e-4)
            if (out["row"] == r).any():
                first = next(model.stream(model.batch([question])[0], max_new_tokens=1))
                assert first.item() == out["logits"][out["row"] == r][0].argmax().item()
                seen += 1
    assert seen


@pytest.mark.parametrize("name, config", [("prefix", CONFIGS["prefix"]), ("cross", CrossConfig(turns="top:2", package="near", heads=2, head_dim=8))])
def test_long_and_short_questions_apart(base, monkeypatch, name, config):
    """Catches rows that are put back in another order, or hear what another row found, when those of one length go together."""
    torch.manual_seed(0)
    model = variants.find(name).from_pretrained(base=base, config=config)
    pool, losses, grads = pool_for(model.train()), [], []
    lesson = type(model).Lesson(model, train.TrainConfig(**{**SETTINGS, "batch": 64}), (pool, pool))
    for p in model.trainable_parameters():
        p.data += 0.02 * torch.randn_like(p)                               # an output of zero would hide what was heard
    for separable in (True, False):
        monkeypatch.setattr(type(model.injection), "separable", separable)
        model.zero_grad()
        parts = lesson.loss(8, torch.Generator().manual_seed(1))
        parts["loss"].backward()
        losses.append({n: x.item() for n, x in parts.items()})
        grads.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * grads[1].abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_py_opens_each(trained, tmp_path, capsys, name):
    """Catches a design that the command line can't open, and a --memory that is ignored without a word."""
    (tmp_path / "facts.txt").write_text("\n".join(FACTS))
    generate.main(["--model", str(trained[name][0]), "--memory", str(tmp_path / "facts.txt"), "--why", "--max-tokens", "4", "Where does Maria live?"])
    out, err = capsys.readouterr()
    assert out.endswith("\n") and ("--memory is ignored" in err) == (name == "none") and ("none of them" in err) == (name in TOLD), err
    with pytest.raises(SystemExit):
        generate.main(["--model", str(trained[name][0]), "--session", str(tmp_path / "diary")])
    assert "expected a graph memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bench_measures_each(trained, name):
    """Catches memories of a batch that answer for one another: asked side by side or one by one, the replies are the same."""
    model = variants.load(trained[name][0])
    told = [FACTS[:2], FACTS[2:7], FACTS[7:]]
    cell = [(recall.remember(model, facts), [dict(question=q, answer="x", support=[0], kind="lookup") for q in ("Where is she?", "What is it, then?")])
            for facts in told]
    together = recall.ask(model, cell, batch=64, max_new_tokens=5)
    for reply, facts in zip(together[::2], told):
        model.clear_memory()
        model.add_to_memory(facts)
        model.config.null_threshold = 1.0
        assert reply.said == model.answer("Where is she?", max_new_tokens=5)
        if name in TOLD:
            assert reply.null == pytest.approx(model.weights()[0, -1].item(), abs=1e-4)


@pytest.mark.parametrize("name, config, steps, lr", [("prefix", PrefixConfig(slots=4, heads=2, key_dim=16), 240, 0.03),
                                                     ("cross", CrossConfig(turns="all", package="near", heads=2, head_dim=16), 120, 0.015)])
def test_it_learns_to_answer_from_what_it_was_told(tmp_path, monkeypatch, name, config, steps, lr):
    """Catches a design whose training leads nowhere. Three people, each told to live in one of three places: who can't hear what was
    told is right in a third of the cases at most. (The window is wide, or most layers of a toy would not see the slots.)"""
    base = toy_base(tmp_path / "base", sliding_window=128)
    model = variants.find(name).from_pretrained(base=base, config=config)
    encode = lambda text: model.tokenizer.encode(text, bos=False)
    stories = [([model.tokenizer.encode(f"{who} lives in {place}.")], [False],
                [(question_prompt(model.tokenizer, f"Where does {who} live?", False), encode(f" {place}") + encode("\n"), [0], 0, [])], (number, number))
               for number, who in enumerate(("Maria", "Tom", "Ana")) for place in ("Lisbon", "Oslo", "Rome")]
    pool = Pool(model, "train", 20, 40, 0, draw=lambda *_: [stories], progress=False, layers=(model.facts_layer, 0))
    measured = PoolLesson.evaluate
    monkeypatch.setattr(PoolLesson, "evaluate", lambda self, silent=False, **options: measured(self, silent, sizes=(4,), questions=128))
    settings = train.TrainConfig(variant=name, model=str(base), out=str(tmp_path / "out"), device="cpu", steps=steps, batch=16, facts=8, warmup=10, lr=lr, tokens=40,
                                 eval_every=steps, retrieval=1.0, unknown=0.0, text=0.0)
    _, result = train.train(settings, config, model, (pool, pool))
    assert result[4]["recall"] > 0.5 and result[4]["first"] > 0.9 and result[4]["base_alone"] == 0


# ---------------------------------------------------------------------------------------------------------- one design

def test_slots_stand_behind_bos():
    """Catches slots before <bos> or inside padding, and logits taken from the wrong place."""
    ids = torch.tensor([[0, 0, 2, 500, 501], [2, 500, 501, 502, 0], [500, 501, 502, 503, 504]])
    real, answer = ids != 0, ids == 501
    new, mask, moved, now = with_slots(ids, real, 2, answer)
    assert new.tolist() == [[0, 0, 2, SLOT, SLOT, 500, 501], [2, SLOT, SLOT, 500, 501, 502, 0], [SLOT, SLOT, 500, 501, 502, 503, 504]]
    assert mask.tolist() == (new != 0).tolist() and moved.tolist() == (new == 501).tolist() and torch.equal(new.gather(1, now), ids)


def test_one_slot_holds_the_mean(base):
    """Catches a gist other than the plan's: the mean of the embeddings, which starts as an embedding that the base knows."""
    model = variants.find("prefix").from_pretrained(base=base)
    model.add_to_memory(FACTS[0])
    ids = torch.tensor(model.token_ids(FACTS[0])[1:])
    torch.testing.assert_close(model.memory_graph.kept[0][1][0], model.gemma.embed(ids).mean(0))


@pytest.mark.parametrize("turns, read", [("first+last", [0, 3]), ("last:2", [3, 2]), ("all", [0, 1, 2, 3]), ("top:1", [2])])
def test_which_turns_are_read(base, turns, read):
    """Catches turns that are counted from the wrong end, a single turn that is read twice, and a likeness that prefers another turn."""
    model = variants.find("cross").from_pretrained(base=base, config=CrossConfig(turns=turns, heads=2, head_dim=8))
    model.add_to_memory([FACTS[1], FACTS[4], FACTS[0], FACTS[7]])
    ids, _ = model.batch(["Maria lives in Lisbon."])
    model._open()
    choose = lambda: model.injection.choose(model.view, model.injection.weigh(model.view, ids, torch.ones_like(ids).bool()))
    rows, there = choose()
    assert rows[there].tolist() == read
    for fact in (FACTS[0], FACTS[4], FACTS[7]):
        model.forget(model.memory_graph.ids[-1])
    model._open()
    rows, there = choose()
    assert rows[there].tolist() == [0]


def test_text_that_asks_nothing_is_left_alone(trained):
    """Catches a memory that speaks into text in which nobody marked a question, though null is likely; and one that is deaf where it isn't."""
    model = variants.load(trained["cross"][0])
    model.add_to_memory(FACTS)
    ids, mask = model.batch(["Where does Maria live?"])
    injection = model.injection
    with torch.no_grad():
        alone = model.gemma(ids, mask)
        injection.none.fill_(0.0)
        assert not torch.equal(model(ids, mask, mask), alone)
        null = model.weights()[0, -1]
        injection.none.copy_((1 / null - 1).log())                         # now null weighs as much as all turns together
        assert torch.equal(model(ids, mask), alone) and not torch.equal(model(ids, mask, mask), alone)
        injection.none.fill_(-50.0)
        assert not torch.equal(model(ids, mask), alone)


def test_a_question_reads_its_turns_without_gaps(base):
    """Catches a token that is put to another question, turn or place when those that are read are laid end to end."""
    model = variants.find("cross").from_pretrained(base=base, config=CrossConfig(turns="top:2", package="near", heads=2, head_dim=8))
    views = []
    for facts in (FACTS[:4], FACTS[4:7]):
        model.clear_memory()
        model.add_to_memory(facts)
        model._open()
        views.append(model.view)
    view, injection = model.view.side_by_side(views), model.injection
    ids, mask = model.batch(["Who is Tom?", "Where does Maria live, then?", "What is Ana's code?", "Who?"])
    with torch.no_grad():
        memo = injection.open(view, ids, mask.bool())
        rows, _ = injection.choose(view, memo["log_weights"][:, 0])
        for r in range(4):
            g, wanted = r // 2, [[], [], []]
            for turn in rows[r].tolist():
                of = [t for t, real in zip(view.ids[g, turn].tolist(), view.mask[g, turn].tolist()) if real]
                wanted = [a + b for a, b in zip(wanted, ([turn] * len(of), of, [None, *of[:-1]]))]
            L = len(wanted[0])
            assert memo["turn"][r].tolist()[:L] == wanted[0] and memo["tokens"][r].tolist()[:L] == wanted[1]
            assert memo["bias"][r, 0, :-1].isfinite().tolist() == [i < L for i in range(memo["bias"].shape[2] - 1)]
            D = model.gemma.config.hidden_size
            read = memo["packages"][memo["at"][r, :L]]
            torch.testing.assert_close(read[:, D:2 * D], injection.embedded(torch.tensor(wanted[1])))
            for vector, token in zip(read[:, 2 * D:], wanted[2]):
                torch.testing.assert_close(vector, torch.zeros(D) if token is None else injection.embedded(torch.tensor(token)))


def test_retrieval_loss_by_hand():
    """Catches a target on null beside a fact, and only one of two facts wanted."""
    batch = dict(kind=torch.tensor([0, 3, 5]), support=torch.tensor([[1, 0], [0, 1], [0, 0]]),
                 known=torch.tensor([[True, False], [True, True], [False, False]]))
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])
    assert retrieval_loss(batch, weights.log()[:, None]).item() == pytest.approx(-torch.tensor([0.5, 0.7, 0.8]).log().mean().item())


def test_turns_keep_their_ids():
    """Catches an id that is given again once its turn is forgotten."""
    turns = Turns()
    assert turns.add(["a", "b"], [1, 2]) == [0, 1]
    turns.forget(1)
    assert turns.add(["c"], [3]) == [2] and (turns.texts, turns.kept, len(turns)) == (["a", "c"], [1, 3], 2)


# ------------------------------------------------------------------------------------------------------------ settings

def test_a_config_file_and_what_counts_more(tmp_path):
    """Catches a command line that the file overrides, options of another design, and a wrong type or name that passes."""
    file = tmp_path / "c.json"
    file.write_text(json.dumps(dict(variant="prefix", steps=7, slots=5, lr=1)))
    settings, config = read_settings(["--config", str(file), "--steps", "9"], train.TrainConfig, "", "")
    assert (settings.variant, settings.steps, settings.lr, config.slots, type(config)) == ("prefix", 9, 1, 5, PrefixConfig)
    for text, says in ((dict(variant="prefix", turns="all"), "turns"), (dict(steps="7"), "steps"), (dict(steps=True), "steps"),
                       (dict(variant="other"), "variant"), ([1], "object")):
        file.write_text(json.dumps(text))
        with pytest.raises(InputError, match=says):
            read_settings(["--config", str(file)], train.TrainConfig, "", "")
    with pytest.raises(InputError, match="slots"):
        read_settings(["--variant", "prefix", "--slots", "0"], train.TrainConfig, "", "")


@pytest.mark.parametrize("file", sorted((ROOT / "variants" / "configs").glob("*.json")), ids=lambda file: file.stem)
def test_example_configs_are_good(file):
    """Catches an example that names a setting which is no more."""
    settings, _ = read_settings(["--config", str(file)], train.TrainConfig, "", "")
    assert settings.variant == file.stem


@pytest.mark.parametrize("name", TOLD)
def test_names_are_told_apart(name):
    """Catches a setting of a design that has the name of one of train.py's."""
    assert not {f.name for f in fields(variants.find(name).Config)} & {f.name for f in fields(train.TrainConfig)}


def test_the_bench_finishes_each(base, tmp_path):
    """Catches parts of bench.recall that only the graph has: a search among states after its layer; and a plot of what nobody was asked."""
    variants.find("prefix").from_pretrained(base="tiny", config=CONFIGS["prefix"]).save_pretrained(tmp_path / "prefix")
    recall.main(["--quick", "--model", str(tmp_path / "prefix"), "--only", "controls", "--sizes", "2", "--questions", "4", "--out", str(tmp_path / "controls")])
    assert len({r["method"] for r in json.loads((tmp_path / "controls" / "recall.json").read_text())["controls"]}) > 5
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps(dict(facts=["Maria lives in Lisbon."], questions=["Where does Maria live?"], answer="Lisbon")) + "\n")
    train.main(["--variant", "lora", "--facts-file", str(facts), "--model", str(base), "--device", "cpu", "--steps", "1", "--batch", "8", "--out", str(tmp_path / "lora")])
    recall.main(["--quick", "--model", str(tmp_path / "lora"), "--only", "recall", "--sizes", "4", "--out", str(tmp_path / "asked")])
    with pytest.raises(InputError, match="--known|--facts-file"):
        train.main(["--variant", "lora", "--known", "2", "--model", str(base), "--device", "cpu", "--steps", "2", "--batch", "8", "--resume", "--out", str(tmp_path / "lora")])


@pytest.mark.parametrize("options", [["none", "--bundles", "20"], ["lora", "--known", "2"], ["prefix", "--bundles", "20", "--gist-after", "1"]])
def test_there_may_be_nothing_to_compile_and_nothing_to_draw(base, tmp_path, monkeypatch, capsys, options):
    """Catches a design whose lesson has no layers, which --compile trips over, and a run without a log, of which no curves can be drawn."""
    measured = PoolLesson.evaluate
    monkeypatch.setattr(PoolLesson, "evaluate", lambda self, silent=False, **kind: measured(self, silent, sizes=(4,), questions=8))
    train.main(["--variant", *options, "--model", str(base), "--device", "cpu", "--compile", "--steps", "1", "--batch", "8", "--facts", "8", "--tokens", "40",
                "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert "facts: exact match" in out and "error" not in err and (tmp_path / "out" / "memory.json").is_file()
    assert (tmp_path / "out" / "log.jsonl").is_file() == (options[0] != "none")


def test_patience(trained, base, tmp_path, monkeypatch):
    """Catches a run that goes on after it stopped getting better, or ends at the first evaluation."""
    recalls = iter([0.1, 0.2, 0.2, 0.1, 0.0, 0.9])
    monkeypatch.setattr(PoolLesson, "evaluate", lambda self, silent=False, **options: {4: dict(recall=0.0 if silent else next(recalls))})
    settings = train.TrainConfig(**{**SETTINGS, "steps": 9, "eval_every": 1}, variant="prefix", model=str(base), out=str(tmp_path), patience=2)
    model = trained["prefix"][1]
    train.train(settings, CONFIGS["prefix"], model, (pool_for(model),) * 2)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
