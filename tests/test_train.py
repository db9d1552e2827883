"""Training on the tiny base: what a batch is made of, what the losses are, and that a run moves the memory and nothing else."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data_gen import KINDS
from extras.blocks import packed, unpacked
from extras.checkpoint import set_aside
from gemma import InputError, Places
from gnn import by_length
from memory import GemmaWithMemory, MemoryConfig, Reading
from toy import one_thread, toy_base  # noqa: F401 (one_thread is a fixture)

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = train.TrainConfig(model="tiny", device="cpu", steps=24, batch=16, facts=16, bundles=200, warmup=2, weight_decay=0.0,
                             eval_every=20)      # without weight decay: it would move a tensor that no gradient reaches
LOOKUP, UPDATE, TWO_HOP, LIST = map(KINDS.index, ("lookup", "update", "two_hop", "list"))


@pytest.fixture(scope="module")
def shipped(one_thread):  # noqa: F811
    return GemmaWithMemory.from_pretrained("tiny")


@pytest.fixture(scope="module")
def pool(shipped):
    return train.Pool(shipped, "train", 200, SETTINGS.tokens, 0, texts=16, progress=False)


def draw(pool, G, R, N, unknown=0.0, text=0.0, seed=0):
    return pool.draw(G, R, N, unknown, text, torch.Generator().manual_seed(seed))


def untrained(shipped, pool, config=None, seed=SETTINGS.seed):
    """The memory that train() starts from."""
    torch.manual_seed(seed)
    model = GemmaWithMemory(shipped.gemma, shipped.tokenizer, config or MemoryConfig(), shipped.base_name)
    pool.set_statistics(model)
    return model


@torch.no_grad()
def test_rows_above_come_back_in_their_order(shipped):
    """Catches rows that are put together by length for the layers above and come back elsewhere, cut short, or hearing padding."""
    gemma, after, T = shipped.gemma, shipped.config.inject_after, 30
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, T + 1, (60,), generator=generator)
    h, real = torch.randn(60, T, gemma.config.hidden_size, generator=generator), torch.arange(T) < lengths[:, None]
    assert len(by_length(lengths, 3, T)) == 3
    together = train.run_above(gemma, h, real, after)
    for i, n in enumerate(lengths.tolist()):
        alone = gemma.run_layers(h[i:i + 1, :n], Places(gemma.config, 1, n, None, None, h.device), after + 1)[0]
        torch.testing.assert_close(together[i, :n], alone, rtol=1e-3, atol=1e-3)


@pytest.fixture
def run(shipped, pool, tmp_path, monkeypatch):
    """train() on the shared pool, with evaluations of a few questions: run(**settings) -> the trained model."""
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *inputs, **options: evaluate(*inputs, **{**options, "questions": 16}))

    def run(config=None, **changes):
        settings = replace(SETTINGS, **{"out": str(tmp_path / "out"), **changes})
        return train.train(settings, config or MemoryConfig(), shipped, (pool, pool))[0]
    return run


# -------------------------------------------------------------------------------------------------------- what is drawn

@pytest.mark.parametrize("fact, answer, pieces", [
    ("Tom's dog is Weller.", "Weller", " Weller"), ('They call him "Weller" at work.', "Weller", "Weller"), ("Weller is his name.", "Weller", "Weller"),
    ("Unwell Weller waits.", "Weller", " Weller"), ("Dial 4821 at the door.", "4821", " 4821")])
def test_answers_are_spelled_as_their_fact_has_them(shipped, fact, answer, pieces):
    """Catches an answer in tokens that its fact doesn't hold: there would be nothing to copy. After a quote there is no space."""
    tokenizer = shipped.tokenizer
    ids, spelled = tokenizer.encode(fact), train.answer_tokens(tokenizer, [tokenizer.encode(fact)], answer)
    assert any(ids[i:i + len(spelled)] == spelled for i in range(len(ids)))
    assert "".join(tokenizer.pieces.id_to_piece(i) for i in spelled).replace("\u2581", " ") == pieces


def test_answers_that_no_tokens_spell_are_encoded_anew(shipped):
    """Catches half a token, and a list of two answers taken from one fact."""
    tokenizer = shipped.tokenizer
    encode = lambda text, bos=False: tokenizer.encode(text, bos=bos)
    glued = "".join(tokenizer.pieces.id_to_piece(i) for i in encode(" number")).replace("\u2581", "")
    assert train.answer_tokens(tokenizer, [encode(" " + glued, True)], glued[1:-1]) == encode(" " + glued[1:-1])
    facts = [encode("Ana speaks Welsh.", True), encode("Ana also speaks Thai and Lao.", True)]
    assert tokenizer.decode(train.answer_tokens(tokenizer, facts, "Welsh and Thai and Lao")) == " Welsh and Thai and Lao"
    assert train.answer_tokens(tokenizer, facts, "Thai and Welsh") == encode(" Thai and Welsh")
    facts = [encode("Ana speaks Welsh.", True), encode('Ana also speaks "Thai".', True)]
    assert tokenizer.decode(train.answer_tokens(tokenizer, facts, "Welsh and Thai")) == " Welsh and Thai"

def story(pool):
    """For each sentence of the pool: (its bundle, its place there)."""
    return {int(f): (b, i) for b, row in enumerate(pool.facts_of) for i, f in enumerate(row) if f >= 0}


def text_of(store, i, tokenizer, start=0):
    begin = int(store.starts[i])
    return tokenizer.decode(store.ids[begin + start:begin + int(store.lengths[i])].tolist())


@pytest.mark.parametrize("N", [8, 16, 64])
def test_supports_hold_the_answer(shipped, pool, N):
    """Catches rows that are off after shuffling or cut with the memory, and a support that isn't in the memory."""
    kinds = set()
    for seed in range(4):
        batch = draw(pool, 8, 64, N, seed=seed)
        for r in range(64):
            sequence, known = int(batch["sequence"][r]), batch["known"][r]
            answer = text_of(pool.sequences, sequence, shipped.tokenizer, int(pool.prompt_length[sequence])).strip()
            assert bool(known.any()) == (answer != ""), answer
            told = [text_of(pool.facts, int(batch["episodes"][r // 8, row]), shipped.tokenizer)
                    for row, k in zip(batch["support"][r].tolist(), known) if k]
            assert all(bool(batch["valid"][r // 8, row]) for row, k in zip(batch["support"][r].tolist(), known) if k)
            kind = int(batch["kind"][r])
            kinds.add(kind)
            if kind == LIST:
                assert len(told) == 2 and any(part in told[0] for part in answer.split(" and ")) and told[0] != told[1]
                assert answer.endswith(tuple(" and " + w for w in [answer.split(" and ", 1)[1]])) and answer.split(" and ")[-1] in told[1]
            elif told:
                assert answer in told[-1], (answer, told)
                assert len(told) == 1 + (kind == TWO_HOP)
    assert {LOOKUP, UPDATE} <= kinds


@pytest.mark.parametrize("alone", [False, True])
def test_marks_spell_the_answer_and_the_name_on_the_way(shipped, pool, alone):
    """Catches marks that are off by the <bos>, in the other sentence of two, or at the wrong name of two; and drawn ones that are another
    question's. alone: in pairs of a question and two sentences."""
    seen, tokenizer = {kind: 0 for kind in (LOOKUP, UPDATE, TWO_HOP, LIST)}, shipped.tokenizer
    batch = pool.pairs(4096, torch.Generator().manual_seed(0)) if alone else draw(pool, 16, 4096, 16)
    for r, (sequence, kind) in enumerate(zip(batch["sequence"].tolist(), batch["kind"].tolist())):
        known, marks = batch["known"][r], batch["marks"][r].tolist()
        if not known.any() or [-1, -1] in marks[:int(known.sum())]:
            continue
        assert marks[int(known.sum()):] == [[-1, -1]] * (2 - int(known.sum()))
        facts = [int(batch["episodes"][r if alone else r // 256, row]) for row, k in zip(batch["support"][r].tolist(), known) if k]
        said = [tokenizer.decode(pool.facts.ids[int(pool.facts.starts[f]) + a:int(pool.facts.starts[f]) + b + 1].tolist()).strip() for f, (a, b) in zip(facts, marks)]
        prompt = int(pool.prompt_length[sequence])
        answer = text_of(pool.sequences, sequence, tokenizer, prompt).strip()
        if kind == TWO_HOP:                                                # whom the first names and the second tells of, but not the question
            name = said.pop(0).lower()
            assert name in text_of(pool.facts, facts[1], tokenizer).lower() and name not in tokenizer.decode(
                pool.sequences.ids[int(pool.sequences.starts[sequence]):][:prompt].tolist()).lower()
        assert " and ".join(said) == answer
        seen[kind] = seen.get(kind, 0) + 1
    assert all(n > 10 for n in seen.values()), seen


def test_pairs_are_of_one_story(pool):
    """Catches two sentences of different bundles, out of order or the same twice, an answer that isn't there, a "she" without whoever she is,
    and pairs that never hold more than the answer, or nothing but."""
    of, batch = story(pool), pool.pairs(4096, torch.Generator().manual_seed(0))
    more = follower = silent = 0
    for r, (episodes, valid) in enumerate(zip(batch["episodes"], batch["valid"].tolist())):
        assert valid[0]
        (b, first), (other, second) = (of[int(e)] for e in episodes)
        if valid[1]:
            assert b == other and first < second
        else:
            others = [i for i, f in enumerate(pool.facts_of[b].tolist()) if f >= 0 and i != first]
            assert all(pool.follows[b, i] and i != first + 1 for i in others) or not pool.follows[b, first] and not batch["known"][r].any()
        sequence = int(batch["sequence"][r])
        assert sequence in pool.questions_of[b]
        slots = (first, second)
        needed = [int(s) for s in pool.support[sequence] if s >= 0]
        assert batch["known"][r].tolist() == (pool.support[sequence] >= 0).tolist()
        assert [slots[row] for row, k in zip(batch["support"][r].tolist(), batch["known"][r]) if k] == needed
        for slot, there in zip(slots, valid):
            if there and pool.follows[b, slot]:
                follower += 1
                assert len(needed) == 2 or slot - 1 in slots or slot + 1 in needed
        more, silent = more + (len(needed) == 1 and valid[1]), silent + (not needed)
    assert min(more, follower, silent) > 100


@pytest.mark.parametrize("N", [8, 16, 64])
def test_memories_are_whole_stories_in_order(pool, N):
    """Catches memories beyond their size, a story cut or told out of order, "she" torn from whoever she is, and a sentence twice."""
    of, sizes = story(pool), set()
    for seed in range(4):
        batch = draw(pool, 8, 8, N, seed=seed)
        for episodes, valid in zip(batch["episodes"], batch["valid"]):
            n = int(valid.sum())
            sizes.add(n)
            assert 1 <= n <= N == len(valid) and bool(valid[:n].all())
            told = [of[int(e)] for e in episodes[:n]]
            assert len(set(told)) == n
            for b in {b for b, _ in told}:
                assert [i for other, i in told if other == b] == list(range(int((pool.facts_of[b] >= 0).sum())))
            for (b, i), before in zip(told, [None, *told]):
                assert not pool.follows[b, i] or before == (b, i - 1)
    assert len(sizes) > 1


def test_a_memory_tells_of_a_person_once(pool):
    """Catches two stories about the same person in one memory: both would answer, and only one is the target."""
    of = story(pool)
    for seed in range(6):
        batch = draw(pool, 8, 8, 64, seed=seed)
        for episodes, valid in zip(batch["episodes"], batch["valid"]):
            subjects = [set(pool.subjects[b].tolist()) for b in {of[int(e)][0] for e in episodes[valid]}]
            assert len(set().union(*subjects)) == sum(map(len, subjects))


def test_hard_questions_are_drawn_more_often(shipped):
    """Catches weights that go to the wrong questions: an update, a list, one of several values of a sentence, and what was not told are
    hard; the same answer twice is not. And a draw that doesn't heed them."""
    fact, prompt, answers = shipped.tokenizer.encode("Maria lives in Oslo."), shipped.tokenizer.encode("Where?"), [[900], [901]]
    asked = [[(prompt, answers[0], [0], LOOKUP, []), (prompt, answers[1], [0], LOOKUP, [])],   # two values of a sentence
             [(prompt, answers[0], [0], LOOKUP, []), (prompt, answers[0], [0], LOOKUP, []), (prompt, [], [], KINDS.index("unanswerable"), [])],
             [(prompt, answers[0], [0], UPDATE, [])], [(prompt, answers[0], [0, 0], LIST, [])]]
    part = [([fact], [False], questions, (n, n)) for n, questions in enumerate(asked)]
    pool = train.Pool(shipped, "train", 20, 40, 0, hard=4.0, draw=lambda *_: [part], progress=False)
    expected = torch.tensor([4.0, 4.0, 1.0, 1.0, 4.0, 4.0, 4.0])
    assert pool.weight.tolist() == [*expected.tolist(), 0.0]
    drawn = torch.cat([draw(pool, 256, 2048, 8, seed=seed)["sequence"] for seed in range(2)]).bincount(minlength=7)
    several = torch.stack([drawn[[0, 1, 4, 5, 6]].sum(), drawn[2:4].sum()]).float()
    assert 4 * 5 / 2 * 0.7 < several[0] / several[1] < 4 * 5 / 2 * 1.3     # memories hold some of the bundles, not always all
    assert (drawn[0] / drawn[1] - 1).abs() < 0.2


@pytest.mark.parametrize("N", [1, 2, 4, 8])
def test_the_smallest_memories_know_what_they_hold(pool, N):
    """Catches an answer that was cut off with the rest of its bundle and is looked for in another sentence, and one half of what two
    sentences answer that counts as known."""
    owner = {int(q): b for b, row in enumerate(pool.questions_of) for q in row if q >= 0}
    known = 0
    for seed in range(4):
        batch = draw(pool, 16, 128, N, seed=seed)
        for r, sequence in enumerate(batch["sequence"].tolist()):
            for row, is_known, slot in zip(batch["support"][r], batch["known"][r], pool.support[sequence]):
                if is_known:
                    assert batch["episodes"][r // 8, row] == pool.facts_of[owner[sequence], slot] and batch["valid"][r // 8, row]
            known += int(batch["known"][r].any())
            assert not batch["known"][r].any() or batch["known"][r].sum() == (pool.support[sequence] >= 0).sum()
    assert known > 40


@pytest.mark.parametrize("options, said", [(["--hard", "0"], "--hard"), (["--hard", "inf"], "--hard"), (["--lr", "inf"], "--lr"), (["--lr", "nan"], "--lr"),
                                           (["--seed", "100000000000000000000"], "--seed"), (["--tokens", "100000"], "--tokens"), (["--accumulate", "65"], "--accumulate"),
                                           (["--device", "meta"], "device"), (["--tokens", "16", "--bundles", "1", "--steps", "1"], "none of 1 bundles")])
def test_settings_that_no_training_survives(tmp_path, options, said):
    """Catches a traceback in the middle of what could have been refused at the start."""
    with pytest.raises(InputError, match=said):
        train.main([*options, "--out", str(tmp_path / "out")])


def test_another_design_or_other_settings_are_no_start(run, tmp_path):
    """Catches weights that fit and mean something else: of another layer, of another design; and a file that gets the blame for it."""
    config = MemoryConfig(inject_after=7)
    run(config=config, steps=1, batch=8, facts=8, out=str(tmp_path / "seven"))
    with pytest.raises(InputError, match="--inject-after 7, got 8"):
        run(steps=1, batch=8, facts=8, init=str(tmp_path / "seven"), out=str(tmp_path / "eight"))
    with pytest.raises(InputError, match="--inject-after 7, got 8"):
        run(steps=2, batch=8, facts=8, resume=True, out=str(tmp_path / "seven"))
    with pytest.raises(InputError, match="variant prefix as --init"):
        train.main(["--variant", "prefix", "--init", str(tmp_path / "seven"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("recalls, kept", [([0.5, 0.498, 0.3], 2), ([0.5, 0.49, 0.489], 1), ([0.5, 0.498, 0.496], 3), ([0.5, 0.497, 0.494], 2), ([0.1, 0.2, 0.3], 3)])
def test_the_best_is_kept_and_of_equals_the_last(run, tmp_path, monkeypatch, recalls, kept):
    """Catches the first of several that chance alone tells apart, one that is worse, and a best that drifts down step by step."""
    told = iter(recalls)
    monkeypatch.setattr(train.GraphLesson, "evaluate", lambda self, silent=False, **options: {16: dict(recall=0.0 if silent else next(told))})
    run(steps=3, eval_every=1, batch=8, facts=8, out=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "memory.json").read_text())["trained"]["step"] == kept


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch):
    """Catches a good memory and a good checkpoint that are replaced by some that can't be opened."""
    out = tmp_path / "out"
    run(steps=1, batch=8, facts=8, out=str(out))
    before = {name: (out / name).read_bytes() for name in ("memory.safetensors", "memory.json", "checkpoint.safetensors")}

    def spoil(self, *inputs, **options):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.fill_(math.inf)
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(InputError, match="weights are no longer finite"):
        run(steps=2, batch=8, facts=8, resume=True, out=str(out))
    assert {name: (out / name).read_bytes() for name in before} == before


def test_only_halves_of_its_own_files_are_cleared_away(run, tmp_path):
    """Catches a user's file that is deleted because of its name."""
    out = tmp_path / "out"
    (out / ".dir.tmp").mkdir(parents=True)
    for name in (".notes.tmp", ".memory.json.tmp", ".memory.json.12.tmp", ".checkpoint.safetensors.7.tmp"):
        (out / name).write_text("mine")
    run(steps=1, batch=8, facts=8, out=str(out))
    assert sorted(file.name for file in out.glob(".*")) == [".dir.tmp", ".memory.json.tmp", ".notes.tmp"]


def test_unknown_questions_and_text_have_null_as_their_target(pool):
    """Catches a question "about somebody the memory never heard of" whose story it holds after all."""
    of = story(pool)
    owner = {int(q): b for b, row in enumerate(pool.questions_of) for q in row if q >= 0}
    texts = known = 0
    for seed in range(6):
        batch = draw(pool, 8, 64, 64, unknown=1.0, text=0.2, seed=seed)
        known += int(batch["known"].any(1).sum())
        for r, sequence in enumerate(batch["sequence"].tolist()):
            texts += batch["kind"][r] == train.TEXT
            if batch["kind"][r] != train.TEXT and not batch["known"][r].any() and bool((pool.support[sequence] >= 0).any()):
                told = {of[int(e)][0] for e in batch["episodes"][r // 8][batch["valid"][r // 8]]}
                heard_of = set(pool.subjects[list(told)].flatten().tolist())
                assert heard_of.isdisjoint(pool.subjects[owner[sequence]].tolist())
            elif batch["kind"][r] == train.TEXT:
                assert not batch["known"][r].any()
    assert known < 200                                                     # where somebody it did hear of was drawn, if at all
    assert 20 < texts < 140


def test_draws_come_from_the_generator_alone(pool):
    """Catches a draw that uses the global random state: a resumed run would see other examples."""
    one, again, other = draw(pool, 4, 16, 16, 0.1, 0.1), draw(pool, 4, 16, 16, 0.1, 0.1), draw(pool, 4, 16, 16, 0.1, 0.1, seed=1)
    assert all(torch.equal(one[name], again[name]) for name in one) and not torch.equal(one["sequence"], other["sequence"])


# ------------------------------------------------------------------------------------------------- forward and losses

def test_scores_agree_with_answers(shipped, pool):
    """Catches a training step that sees another memory, prompt or reading than `answer` does: its figures would be about something else."""
    shipped.eval()
    threshold, shipped.config.null_threshold = shipped.config.null_threshold, 1.0
    try:
        seen = []
        batch = draw(pool, 2, 16, 16, unknown=0.2, seed=3)
        with torch.no_grad():
            right, _, null = train.scores(batch, train.forward(shipped, pool, batch, SETTINGS.tokens))
        out = train.forward(shipped, pool, batch, SETTINGS.tokens)
        for g in range(2):
            shipped.clear_memory()
            shipped.add_to_memory([text_of(pool.facts, int(e), shipped.tokenizer) for e in batch["episodes"][g][batch["valid"][g]]])
            for r in range(8 * g, 8 * g + 8):
                sequence = int(batch["sequence"][r])
                prompt = int(pool.prompt_length[sequence])
                begin = int(pool.sequences.starts[sequence])
                question = shipped.tokenizer.decode(pool.sequences.ids[begin + 1:begin + prompt].tolist())
                question = question.removeprefix("Question: ").removesuffix("\nAnswer:")
                assert shipped.prompt(question) == pool.sequences.ids[begin:begin + prompt].tolist()
                n = len(shipped.memory_graph)
                shipped.recall(question)
                reading, mine = out["reading"], shipped.weights()[0]
                for row, weight in zip(reading.candidates[-1][r].tolist(), reading.ranked[-1].exp().mean(1)[r].tolist()):
                    assert weight == pytest.approx(mine[row].item() if row < n else 0.0, rel=4e-3, abs=1e-4)       # rounding is another in another batch
                torch.testing.assert_close(mine[n], null[r], rtol=4e-3, atol=1e-4)
                if batch["known"][r].any():
                    mine = out["row"] == r
                    forced, targets = out["logits"][mine].argmax(-1).tolist(), out["targets"][mine].tolist()
                    spoken = [t.item() for t in shipped.stream(*shipped.batch([question])[:1], max_new_tokens=len(targets), stop=())]
                    agree = next((i for i, (a, b) in enumerate(zip(forced, targets)) if a != b), len(targets) - 1) + 1
                    assert spoken[:agree] == forced[:agree]                # the two see the same until one leaves the target
                    assert bool(right[r]) == (forced == targets)
                    if right[r]:
                        assert shipped.answer(question) == text_of(pool.sequences, sequence, shipped.tokenizer, prompt).strip()
                    seen.append(bool(right[r]))
        assert len(seen) > 6 and any(seen), seen
    finally:
        shipped.config.null_threshold = threshold
        shipped.clear_memory()


def test_logits_at_answer_positions_alone_and_no_gradient_below(shipped, pool):
    """Catches logits of the whole sequence (most of a step's time and memory), frozen layers run again, and a gradient in the base."""
    model = untrained(shipped, pool).train()
    torch.nn.init.normal_(model.injection.hop_query[0].weight, std=0.01)   # it starts at zero and lets no gradient through to hop 1
    batch_loss = lambda out: (torch.nn.functional.cross_entropy(out["logits"], out["targets"]) + sum(train.retrieval_loss(batch, out, 2))
                              + train.copying_loss(batch, out, 2))
    batch = draw(pool, 4, 32, 16, unknown=0.2, text=0.1)
    ran = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.gemma.layers, 1)]
    out = train.forward(model, pool, batch, SETTINGS.tokens)
    for hook in hooks:
        hook.remove()
    expected = [(r, int(t)) for r, s in enumerate(batch["sequence"].tolist()) if batch["known"][r].any() for t in
                pool.sequences.ids[int(pool.sequences.starts[s]):][int(pool.prompt_length[s]):int(pool.sequences.lengths[s])]]
    assert list(zip(out["row"].tolist(), out["targets"].tolist())) == expected and len(out["logits"]) == len(expected) > 20
    assert ran == list(range(model.config.inject_after + 1, len(model.gemma.layers) + 1))
    at = pool.sequences.starts[batch["sequence"][out["row"]]] + out["position"]
    assert torch.equal(pool.sequences.ids[at + 1], out["targets"])         # the position is the one before the token
    batch_loss(out).backward()
    assert all(p.grad is None for p in model.gemma.parameters()) and not pool.sequences.keys.requires_grad
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0) for p in model.trainable_parameters())


def log(*rows):
    return torch.tensor(rows).log()


# Three rows, one head, three episodes and null; candidates 0 and 2 of each; two positions, of which the second is an answer's:
# a lookup of episode 2, a two-hop from 0 to 2, and a question that nothing answers.
ROWS = dict(kind=torch.tensor([LOOKUP, TWO_HOP, KINDS.index("unanswerable")]), support=torch.tensor([[2, 0], [0, 2], [0, 0]]),
            known=torch.tensor([[True, False], [True, True], [False, False]]))
LISTS = dict(kind=torch.tensor([LIST, TWO_HOP, train.TEXT]), support=ROWS["support"], known=torch.tensor([[True, True], [True, True], [False, False]]))


def test_wanted_by_hand():
    """Catches both facts of a two-hop question wanted at once, the first at the last hop, and null wanted beside a fact."""
    hot = lambda *rows: [[n in row for n in range(4)] for row in rows]
    assert train.wanted(ROWS, 0, 2, 3).tolist() == hot({2}, {0}, {3})
    assert train.wanted(ROWS, 1, 2, 3).tolist() == hot({2}, {2}, {3})
    assert train.wanted(ROWS, 0, 1, 3).tolist() == hot({2}, {2}, {3})
    assert train.wanted(ROWS, 1, 3, 3).tolist() == hot({2}, {3}, {3})      # of three hops the one between has nothing to find
    assert train.wanted(LISTS, 0, 2, 3).tolist() == hot({0, 2}, {0}, {3})
    assert ROWS["known"].tolist() == [[True, False], [True, True], [False, False]]


def test_retrieval_loss_by_hand():
    """Catches a target on the wrong fact or hop, a mean where a sum belongs, rows without the right candidate or episode that
    count all the same, and answer positions that count where none are."""
    hop1 = log([0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.1, 0.3], [0.2, 0.2, 0.2, 0.4])[:, None]
    hop2 = log([0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.1, 0.1, 0.1, 0.7])[:, None]
    rank1 = log([0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4])[:, None]
    rank2 = log([0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6])[:, None]
    near1, near2 = log([0.9, 0.1], [0.7, 0.3], [0.8, 0.2]), log([0.6, 0.4], [0.2, 0.8], [0.3, 0.7])
    positions = lambda near: torch.stack((log([0.5, 0.5]).expand(3, 2), near), 1)[:, :, None]
    chosen = [torch.tensor([[2], [0], [0]]), torch.tensor([[2], [0], [2]])]    # the two-hop question misses its second episode
    reading = Reading(None, [hop1, hop2], [torch.tensor([[0, 2]] * 3)] * 2, [rank1, rank2], chosen, [positions(near1), positions(near2)], None, None)
    answering = torch.tensor([[False, True], [False, True], [False, False]])
    out = dict(reading=reading, answering=answering, spoken=torch.ones_like(answering))
    parts = lambda batch, hops: [part.item() for part in train.retrieval_loss(batch, out, hops)]
    logs = lambda *values: -sum(map(math.log, values))
    assert parts(ROWS, 2) == pytest.approx([logs(0.3, 0.5, 0.4, 0.1, 0.6, 0.7) / 6, logs(0.3, 0.6, 0.4, 0.3, 0.8, 0.6) / 6,
                                            logs(0.6) / 3], rel=1e-5)
    # With a single hop, a two-hop question needs the fact that holds the answer; a list is one mass on both its facts; ordinary
    # text is to be left alone at all its positions.
    assert parts(LISTS, 1) == pytest.approx([logs(0.4, 0.1, 0.4) / 3, logs(0.5, 0.2, 0.4) / 3, (logs(0.9) + logs(0.5, 0.2) / 2) / 3], rel=1e-5)
    reading.candidates[0] = torch.tensor([[0, 1]] * 3)                     # episode 2 isn't among them
    assert parts(ROWS, 1)[:2] == pytest.approx([logs(0.3, 0.1, 0.4) / 3, logs(0.4) / 3], rel=1e-5)


def test_copying_loss_by_hand():
    """Catches tokens of the wrong episode or padding that count, a mean where the sum over tokens belongs, the end of another
    episode, a token that counts though nothing can be copied, and heads averaged before the logarithm, so that one may be wrong if another is right."""
    # One row of a lookup of episode 2, and an unanswerable one; chosen are 0 and 2; two heads; two tokens in each, 7 twice in 2.
    batch = {name: value[[0, 2]] for name, value in ROWS.items()}
    weights = torch.stack((log([0.1, 0.2, 0.7], [0.3, 0.4, 0.3]), log([0.5, 0.25, 0.25], [0.2, 0.6, 0.2])))           # (T, H, r + 1)
    inside = torch.tensor([[[[0.5, 0.5], [0.1, 0.9]], [[0.4, 0.6], [0.2, 0.8]]], [[[1.0, 0.0], [0.3, 0.7]], [[0.1, 0.9], [0.6, 0.4]]]])   # (T, H, r, M)
    reading = Reading(None, [torch.zeros(2, 2, 4)], None, None, [torch.tensor([[0, 2], [0, 2]])], [torch.stack((weights, weights))],
                      torch.tensor([[[7, -1], [7, 8]]] * 2), torch.stack((inside, inside)), torch.tensor([[[[0.3, 0.8], [0.6, 0.5]]] * 2] * 2), 5)
    out = lambda *targets: dict(reading=reading, row=torch.tensor([0] * len(targets)), position=torch.tensor([0, 1, 1])[:len(targets)], targets=torch.tensor(targets))
    loss = lambda *targets: train.copying_loss(batch, out(*targets), 1).item()
    first, second = math.sqrt(0.2 * 0.1 * 0.4 * 0.2), math.sqrt(0.25 * 0.7 * 0.6 * 0.4)      # 7 by the first position, 8 by the second
    assert loss(7) == pytest.approx(-math.log(first), rel=1e-4)
    assert loss(7, 8, 9) == pytest.approx(-math.log(first * second) / 2, rel=1e-4)
    assert loss(5) == pytest.approx(-math.log(0.2 * 0.8 * 0.4 * 0.5) / 2, rel=1e-4)           # the end of episode 2
    reading.token_ids[0, 1] = 8
    assert loss(8) == pytest.approx(-math.log(0.2 * 0.4) / 2, rel=1e-4) and loss(7) == loss(9, 9) == 0


def test_judging_loss_by_hand():
    """Catches a null that isn't worth 0, a right episode that wasn't read and counts all the same, heads added up before the logarithm,
    and one hop's questions held against the other's."""
    fits = log([4.0, 2.0], [1.0, 0.5])[None].expand(3, -1, -1)                                 # (R, H, r), over 4 + 2 + 1 and 1 + 0.5 + 1
    chosen = [torch.tensor([[2, 0], [1, 0], [0, 1]]), torch.tensor([[0, 1], [2, 1], [0, 1]])]
    reading = Reading(None, [torch.zeros(3, 2, 4)] * 2, None, None, chosen, None, None, None, fits=[fits] * 2)
    # As in ROWS: a lookup of episode 2, two hops by way of 0 to 2, and one that can't be answered. At the second hop the lookup's isn't read.
    loss = lambda one, other: -(math.log(one / 7) + math.log(other / 2.5)) / 2
    first, second, null = loss(4, 1), loss(2, 0.5), loss(1, 1)
    assert train.judging_loss(ROWS, dict(reading=reading), 2).item() == pytest.approx(((first + second + null) / 3 + (first + null) / 2) / 2, rel=1e-4)
    reading.fits = []                                                      # a design without a reader
    assert train.judging_loss(ROWS, dict(reading=reading), 2) == 0


def test_marking_loss_by_hand():
    """Catches a mark in another episode or hop than the right one, rows that have none or whose sentence wasn't read and count all
    the same, and the two hops of a two-hop question mixed up."""
    begins, ends = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.6, 0.3])
    marks = torch.stack([torch.stack([begins.roll(e), ends.roll(e)], -1) for e in range(2)]).log()         # (r, M, 2): the second episode's are moved by one
    chosen = [torch.tensor([[2, 0], [0, 1], [0, 1]]), torch.tensor([[0, 2], [2, 1], [0, 1]])]
    reading = Reading(None, [torch.zeros(3, 2, 4)] * 2, None, None, chosen, None, None, None, marks=[marks.expand(3, -1, -1, -1)] * 2)
    batch = dict(ROWS, marks=torch.tensor([[[0, 1], [-1, -1]], [[1, 1], [0, 2]], [[0, 0], [0, 0]]]))
    # In ROWS a lookup of episode 2, two hops by way of 0 to 2, and one that can't be answered.
    hop1 = -math.log(0.2 * 0.6), -math.log(0.3 * 0.6)                      # the lookup's in its first, the name in episode 0
    hop2 = -math.log(0.5 * 0.1), -math.log(0.2 * 0.3)
    support = batch["support"].tolist()
    assert support[0][0] == 2 and support[1] == [0, 2], support
    assert train.marking_loss(batch, dict(reading=reading), 2).item() == pytest.approx((sum(hop1) / 2 + hop2[0] + hop2[1]) / 2, rel=1e-4)
    batch["marks"][:] = -1
    assert train.marking_loss(batch, dict(reading=reading), 2) == 0
    reading.marks = []                                                     # a design without marks
    assert train.marking_loss(batch, dict(reading=reading), 2) == 0


def test_the_loss_holds_its_parts_by_their_weights(shipped, pool):
    """Catches a part that is worked out and logged, and that nothing learns from."""
    model = untrained(shipped, pool, MemoryConfig(reading_layers=1))
    part = lambda **weights: train.GraphLesson(model, replace(SETTINGS, **{**dict(retrieval=0, copying=0, judging=0, marking=0), **weights}), (pool, pool)).loss(
        8, torch.Generator().manual_seed(1))
    alone = part()
    assert alone["loss"] == alone["answer_loss"] and alone["marking_loss"] > 1
    for name in ("retrieval", "copying", "judging", "marking"):
        assert (part(**{name: 2.0})["loss"] - alone["loss"]).item() == pytest.approx(2 * alone[f"{name}_loss"].sum().item(), rel=1e-3)
    pairs = part(pairs=64, marking=2.0, judging=3.0, retrieval=4.0)        # whose losses are added to the batch's
    for name, n in dict(retrieval=4, judging=1, marking=1).items():
        assert pairs[f"{name}_loss"].numel() == n and pairs[f"{name}_loss"].sum() > alone[f"{name}_loss"].sum() + 0.3
    parts = sum(weight * pairs[f"{name}_loss"].sum() for name, weight in dict(retrieval=4, judging=3, marking=2).items())
    assert (pairs["loss"] - alone["loss"]).item() == pytest.approx(parts.item(), rel=1e-3)
    model = untrained(shipped, pool, MemoryConfig())                       # nothing would learn from them
    with pytest.raises(InputError, match="--pairs 0 .* got 64"):
        part(pairs=64)


def test_scores_by_hand():
    """Catches a first place by the keys alone, a place among the candidates taken for an episode, and one right token of many that is enough."""
    ranked = log([0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7])[:, None]
    reading = Reading(None, [None], [torch.tensor([[1, 2], [2, 0], [0, 1]])], [ranked], None, None, None, None)
    logits = torch.nn.functional.one_hot(torch.tensor([1, 2, 2, 3]), 5).float()
    right, found, null = train.scores(ROWS, dict(reading=reading, logits=logits, targets=torch.tensor([1, 2, 2, 4]), row=torch.tensor([0, 0, 1, 1])))
    assert right.tolist() == [True, False, True] and found.tolist() == [True, True, False]
    assert null.tolist() == pytest.approx([0.3, 0.1, 0.7])
    reading.candidates[0][1] = torch.tensor([0, 2])                        # the first fact of two hops: the answer isn't there
    either = dict(ROWS, kind=torch.tensor([LOOKUP, LIST, LOOKUP]))
    same = dict(reading=reading, logits=logits, targets=torch.tensor([1, 2, 2, 4]), row=torch.tensor([0, 0, 1, 1]))
    assert not train.scores(ROWS, same)[1][1] and train.scores(either, same)[1][1]


def test_schedule():
    """Catches a rate that never warms up or never falls, and memories that don't grow to the size that was asked for."""
    settings = train.TrainConfig(steps=1000, warmup=50, facts=100, lr=1.0)
    rates, sizes, done = zip(*(train.schedule(settings, step, 1e9) for step in range(1000)))
    assert rates[0] == pytest.approx(0.02) and max(rates) > 0.95 and rates[-1] < 0.03
    assert sizes[0] == 8 and sizes[-1] == max(sizes) == 100 and list(sizes) == sorted(sizes)
    assert done == tuple(step / 1000 for step in range(1000))              # without --minutes, time doesn't matter
    assert all(R % train.groups(R, N) == 0 for R in (1, 7, 16, 100, 128) for N in (4, 8, 64, 10_000))


def test_schedule_follows_the_clock():
    """Catches minutes taken for seconds, a run on a slow machine cut off at a high rate, and one on a fast machine that waits for the clock."""
    settings = train.TrainConfig(steps=1000, warmup=0, facts=64, minutes=2.0, lr=1.0)
    at_half = train.schedule(settings, 500, 0.0)
    assert train.schedule(settings, 10, 60.0) == train.schedule(settings, 500, 60.0) == at_half and at_half[2] == 0.5
    rate, size, done = train.schedule(settings, 20, 120.0)
    assert (size, done) == (64, 1.0) and rate == pytest.approx(0.02)
    assert train.schedule(settings, 20, 1e6)[:2] == (rate, size) and train.schedule(settings, 20, 1e6)[2] > 1


# ------------------------------------------------------------------------------------------------------------- the loop

def losses(model, pool, batch):
    with torch.no_grad():
        out = train.forward(model, pool, batch, SETTINGS.tokens)
        parts = torch.nn.functional.cross_entropy(out["logits"], out["targets"]), *train.retrieval_loss(batch, out, 2), train.copying_loss(batch, out, 2)
        return [part.item() for part in parts]


def test_a_run_moves_the_memory_and_nothing_else(shipped, pool, run, tmp_path, monkeypatch):
    """Catches a part of the loss that doesn't fall even on examples seen again and again, a tensor that nothing trains, a base that changes, and files that don't load."""
    base = {name: t.clone() for name, t in shipped.gemma.state_dict().items()}
    start = untrained(shipped, pool)
    batch = draw(pool, 2, 16, 16, 0.1, 0.1)
    monkeypatch.setattr(pool, "draw", lambda *_: batch)
    model = run(steps=30)
    before, after = losses(start, pool, batch), losses(model, pool, batch)
    assert all(a < b - 0.1 for a, b in zip(after, before)), (before, after)
    assert all(torch.equal(t, base[name]) for name, t in shipped.gemma.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.gemma.parameters()) and not model.training
    untouched = dict(start.injection.named_parameters())
    assert [name for name, p in model.injection.named_parameters() if torch.equal(p, untouched[name])] == []
    saved = GemmaWithMemory.from_pretrained(tmp_path / "out")
    assert saved.config == model.config and saved.trained["step"] <= 30
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1 and lines[-1]["step"] == 30 and set(lines[-1]["held_out"]) == {"16", "64"}
    assert str(tmp_path) not in (tmp_path / "out" / "memory.json").read_text(), "the folder of whoever trained it is nobody's business"


def test_resumed_is_unbroken(run, tmp_path, monkeypatch):
    """Catches anything that a checkpoint leaves out: moments, the step of the schedule, the random state, the best score so far;
    and --deterministic that is accepted and ignored."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        whole = run(out=str(tmp_path / "whole"), batch=8, facts=8, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        forward, steps = train.forward, []

        def stopped(model, *arguments):
            steps.append(model.training)
            if sum(steps) == SETTINGS.eval_every + 2:
                raise KeyboardInterrupt
            return forward(model, *arguments)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "forward", stopped)
            run(out=str(tmp_path / "broken"), batch=8, facts=8, deterministic=True)
        torch.rand(5)                                                      # another process has another random state
        resumed = run(out=str(tmp_path / "broken"), batch=8, facts=8, deterministic=True, resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    for (name, one), other in zip(whole.injection.state_dict().items(), resumed.injection.state_dict().values()):
        assert torch.equal(one, other), name
    read = lambda name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert [(a["step"], a["loss"]) for a in read("whole")] == [(b["step"], b["loss"]) for b in read("broken")]


def test_every_operation_of_a_step_can_be_deterministic(shipped, pool):
    """Catches an operation that --deterministic makes an error on a GPU (see torch.use_deterministic_algorithms), where CI has none."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name, out = function.overloadpacket.__name__, function(*arguments, **(options or {}))
            used.add(f"{name} of floats" if name == "cumsum" and out.is_floating_point() else name)
            return out
    used, model, batch = set(), untrained(shipped, pool, MemoryConfig(dropout=0.1, reading_layers=1)).train(), draw(pool, 2, 8, 8, 0.2, 0.2)
    with Watch():
        out = train.forward(model, pool, batch, SETTINGS.tokens)
        loss = F.cross_entropy(out["logits"].float(), out["targets"]) + sum(train.retrieval_loss(batch, out, 2)) + train.copying_loss(batch, out, 2)
        (loss + train.judging_loss(batch, out, 2) + train.marking_loss(batch, out, 2)).backward()
    assert used > {"scatter_reduce", "index_add", "nll_loss_backward"}
    assert not used & {"put", "put_", "histc", "bincount", "median", "nanmedian", "kthvalue", "cumsum of floats", "nll_loss2d_forward", "_embedding_bag"}


def test_compiled_steps_are_the_same_and_compiled_once(shipped, pool, run, tmp_path, monkeypatch):
    """Catches a layer that is compiled anew for every length or memory size or for each of its kind, one that --compile leaves out or
    compiles for the few batches of an evaluation, and a step that comes out differently."""
    graphs, calls, compiler = [], [], torch.compile

    def traced(f, dynamic):
        fast = compiler(f, dynamic=dynamic, backend=lambda module, inputs: graphs.append(module) or module.forward)
        return lambda *inputs: calls.append(torch.is_grad_enabled()) or fast(*inputs)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traced)
    settings = dict(config=MemoryConfig(sentence_layers=1, reading_layers=1, reading_dim=16), steps=3, batch=16, facts=16, first_facts=8)
    one = run(**settings, out=str(tmp_path / "one"))
    assert not calls
    other = run(**settings, out=str(tmp_path / "other"), compile=True)
    above = shipped.gemma.layers[8:]
    for layer in above:
        del layer.forward
    assert not any("forward" in vars(layer) for layer in shipped.gemma.layers)
    assert len(graphs) == 4                                                # the base's of either kind, a sentence's, the reader's
    assert len(calls) >= 3 * (len(above) + 1 + 2) and all(calls)           # of these two readings
    for (name, a), b in zip(one.injection.state_dict().items(), other.injection.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_where_nothing_can_be_compiled_it_trains_without(run, tmp_path, monkeypatch, capsys):
    """Catches a run that ends because a compiler fails in the middle of a step, one that takes that step's gradients twice, and silence."""
    def failing(f, dynamic):
        def fail(*inputs):
            raise AssertionError("expected size 104==40\nand more")
        return fail if f.__qualname__ != "DecoderLayer.forward" else f     # the reader fails after the base has worked
    monkeypatch.setattr(torch, "compile", failing)
    settings = dict(steps=2, batch=16, facts=16, first_facts=8)
    one, other = (run(**settings, out=str(tmp_path / name), compile=name == "other") for name in ("one", "other"))
    said = capsys.readouterr().err
    assert said.count("going on without") == 1 and "expected size 104==40" in said and "and more" not in said
    for (name, a), b in zip(one.injection.state_dict().items(), other.injection.state_dict().values()):
        assert torch.equal(a, b), name


def test_deterministic_runs_know_no_clock(run):
    """Catches two runs with the same settings that can't end alike."""
    with pytest.raises(InputError, match="--minutes"):
        run(deterministic=True, minutes=1.0)


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Catches gradients that are averaged instead of added, processes that draw the same batches, and two that write one folder."""
    base = toy_base(tmp_path / "base")
    command = ["train.py", "--model", str(base), "--device", "cpu", "--steps", "3", "--batch", "8", "--accumulate", "2", "--facts", "8", "--bundles", "60",
               "--eval-every", "3", "--inject-after", "2", "--key-dim", "8", "--token-key-dim", "8", "--dropout", "0.1", "--tokens", "80"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (("one", [sys.executable]), ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        done = subprocess.run([*start, *command, "--out", str(tmp_path / name)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and done.stderr.count("saved in") == 1, done.stderr
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)


def test_processes_share_out_whole_batches(monkeypatch):
    """Catches a batch that no process takes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    replace(SETTINGS, accumulate=4).check()
    with pytest.raises(InputError, match="multiple of the 2 processes"):
        replace(SETTINGS, accumulate=3).check()


def test_a_run_ends_after_its_minutes(run, tmp_path, monkeypatch):
    """Catches --minutes that is ignored, a run that ends unmeasured and unsaved, and one that gets its minutes again when resumed."""
    clock = iter(range(10 ** 6))                                           # every look at the clock takes a second
    monkeypatch.setattr(train.time, "time", lambda: float(next(clock)))
    run(batch=8, facts=8, steps=1000, minutes=0.1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert "held_out" in lines[-1] and 1 < lines[-1]["step"] < 10 and (tmp_path / "out" / "memory.safetensors").is_file()
    run(batch=8, facts=8, steps=1000, minutes=0.1, resume=True)
    again = [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert again[-1] == lines[-1]["step"] + 1


def test_a_run_can_start_from_a_trained_memory(run, tmp_path):
    """Catches --init that starts from nothing all the same, forgets what inputs look like on average, or names a folder in the memory."""
    first = run(out=str(tmp_path / "first"), steps=2, batch=8, facts=8)
    again = run(out=str(tmp_path / "again"), steps=1, batch=8, facts=8, lr=0.0, init=str(tmp_path / "first"))
    for (name, one), other in zip(unpacked(packed(first.injection.state_dict())).items(), again.injection.state_dict().values()):
        assert torch.equal(one, other), name
    assert again.trained["init"] == "first"
    with pytest.raises(InputError, match="--init"):
        run(init=str(tmp_path / "nowhere"))


def test_an_earlier_run_is_kept(run, tmp_path, monkeypatch, capsys):
    """Catches a second run that writes over the first, a resumed one that doesn't find its own, --init of the folder that is renamed, and
    the working folder, which keeps being that by another name."""
    out, quick = tmp_path / "out", dict(steps=1, batch=8, facts=8, eval_every=1)
    run(**quick, out=str(out))
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    run(**quick, out=str(out), resume=True)
    with pytest.raises(InputError, match="outside of --out"):
        run(**quick, out=str(out), init=str(out))
    monkeypatch.chdir(out)
    with pytest.raises(InputError, match="the working folder"):
        run(**quick, out=".")
    monkeypatch.chdir(tmp_path)
    assert not list(tmp_path.glob("out-*")) and "earlier run" not in capsys.readouterr().err
    for number in (1, 2):
        run(**quick, out=str(out), seed=number)
        assert f"is in {tmp_path}/out-{number} now" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out-1").iterdir()}["memory.safetensors"] == first["memory.safetensors"]
    assert len({(tmp_path / name / "memory.safetensors").read_bytes() for name in ("out", "out-1", "out-2")}) == 3


def test_a_log_alone_and_what_a_link_leads_to_are_kept(tmp_path):
    """Catches a log that is written over where the memory beside it was moved away, and a link that leads nowhere once its folder is renamed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to("out", target_is_directory=True)
    set_aside(tmp_path / "link")
    assert (tmp_path / "out-1" / "log.jsonl").read_text() == "{}\n" and (tmp_path / "link").is_dir() and not list((tmp_path / "out").iterdir())
    set_aside(tmp_path / "link")                                           # where nothing was, nothing is renamed
    assert not (tmp_path / "out-2").exists()


def test_no_checkpoint_to_resume(run, tmp_path):
    """Catches a run that quietly starts from nothing."""
    with pytest.raises(InputError, match="checkpoint"):
        run(resume=True)


@pytest.mark.parametrize("bad, ends", [({2}, False), ({1, 2, 3, 4}, False), ({3, 4, 5, 6, 7}, True)])
def test_gradients_that_are_not_finite(run, monkeypatch, bad, ends):
    """Catches a NaN that reaches the weights or AdamW's moments, and a run that goes on for hours without learning."""
    forward, seen = train.forward, []

    def broken(model, *arguments):
        out = forward(model, *arguments)
        if model.training:
            seen.append(model.injection.value_map.detach().clone())
            if len(seen) - 1 in bad:
                out["logits"] = out["logits"] * float("nan")
        return out
    monkeypatch.setattr(train, "forward", broken)
    if ends:
        with pytest.raises(InputError, match="5 times in a row"):
            run(steps=20, batch=8, facts=8)
        assert len(seen) == 8
    else:
        model = run(steps=7, batch=8, facts=8)
        assert all(bool(p.isfinite().all()) for p in model.trainable_parameters())
    for i in range(len(seen) - 1):
        assert torch.equal(seen[i], seen[i + 1]) == (i in bad)


# -------------------------------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("arguments, says", [
    (["--model", "nonsense"], "'tiny'"), (["--out", "taken"], "taken"), (["--steps", "-1"], "steps"), (["--dropout", "2"], "dropout"), (["--readable", "0"], "readable"), (["--inject-after", "99"], "layers"),
    (["--resume"], "checkpoint")])
def test_bad_arguments_are_one_sentence(tmp_path, arguments, says):
    """Catches a traceback, and minutes of preparing before the message."""
    (tmp_path / "taken").write_text("a file")
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--bundles", "20", *arguments], capture_output=True, text=True,
                          cwd=tmp_path, timeout=60, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr and says in done.stderr, done.stderr
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and (tmp_path / "taken").read_text() == "a file"
