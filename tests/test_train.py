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

import train
from data_gen import KINDS
from gemma import InputError
from memory import GemmaWithMemory, MemoryConfig, Reading
from toy import one_thread  # noqa: F401 (a fixture)

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


@pytest.fixture
def run(shipped, pool, tmp_path, monkeypatch):
    """train() on the shared pool, with evaluations of a few questions: run(**settings) -> the trained model."""
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda model, pool, settings: evaluate(model, pool, settings, questions=16))

    def run(config=None, **changes):
        settings = replace(SETTINGS, **{"out": str(tmp_path / "out"), **changes})
        return train.train(settings, config or MemoryConfig(), shipped, (pool, pool))[0]
    return run


# -------------------------------------------------------------------------------------------------------- what is drawn

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
                torch.testing.assert_close(shipped.weights()[0, :n], out["reading"].asked[-1].exp().mean(1)[r, :n], rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(shipped.weights()[0, n], null[r], rtol=1e-3, atol=1e-4)
                if batch["known"][r].any():
                    expected = text_of(pool.sequences, sequence, shipped.tokenizer, prompt).strip()
                    seen.append((shipped.answer(question) == expected, bool(right[r])))
        assert len(seen) > 6 and all(a == b for a, b in seen), seen
    finally:
        shipped.config.null_threshold = threshold
        shipped.clear_memory()


def test_logits_at_answer_positions_alone_and_no_gradient_below(shipped, pool):
    """Catches logits of the whole sequence (most of a step's time and memory), frozen layers run again, and a gradient in the base."""
    model = untrained(shipped, pool).train()
    torch.nn.init.normal_(model.injection.hop_query[0].weight, std=0.01)   # it starts at zero and lets no gradient through to hop 1
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
    (torch.nn.functional.cross_entropy(out["logits"], out["targets"]) + sum(train.retrieval_loss(batch, out, 2))).backward()
    assert all(p.grad is None for p in model.gemma.parameters()) and not pool.sequences.keys.requires_grad
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0) for p in model.trainable_parameters())


def test_retrieval_loss_by_hand():
    """Catches a target on the wrong fact or hop, a mean where a sum belongs, and answer positions that count where none are."""
    log = lambda *rows: torch.tensor(rows).log()
    # Three rows, one head, three episodes and null; candidates 0 and 2 of each; two positions, of which the second is an answer's.
    hop1 = log([0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.1, 0.3], [0.2, 0.2, 0.2, 0.4])[:, None]
    hop2 = log([0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.1, 0.1, 0.1, 0.7])[:, None]
    near1 = log([0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4])
    near2 = log([0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6])
    positions = lambda near: torch.stack((torch.full((3, 3), 1 / 3).log(), near), 1)[:, :, None]
    reading = Reading(None, [hop1, hop2], [torch.tensor([[0, 2]] * 3)] * 2, [positions(near1), positions(near2)], None)
    # A lookup of episode 2, a two-hop from 0 to 2, and a question that nothing answers.
    batch = dict(kind=torch.tensor([LOOKUP, TWO_HOP, KINDS.index("unanswerable")]), support=torch.tensor([[2, 0], [0, 2], [0, 0]]),
                 known=torch.tensor([[True, False], [True, True], [False, False]]))
    answering = torch.tensor([[False, True], [False, True], [False, False]])
    out = dict(reading=reading, answering=answering, spoken=torch.ones_like(answering), is_text=torch.tensor([False] * 3))
    prompt, answer = train.retrieval_loss(batch, out, 2)
    logs = lambda *values: -sum(map(math.log, values))
    assert prompt.item() == pytest.approx(logs(0.3, 0.1, 0.5, 0.6, 0.4, 0.7) / 6, rel=1e-5)
    assert answer.item() == pytest.approx(logs(0.3, 0.3, 0.6, 0.8) / 6, rel=1e-5)
    # With a single hop, a two-hop question needs the fact that holds the answer; a list is one mass on both its facts.
    batch["kind"] = torch.tensor([LIST, TWO_HOP, train.TEXT])
    batch["known"] = torch.tensor([[True, True], [True, True], [False, False]])
    out["is_text"] = torch.tensor([False, False, True])
    prompt, answer = train.retrieval_loss(batch, out, 1)
    assert prompt.item() == pytest.approx(logs(0.4, 0.1, 0.4) / 3, rel=1e-5)
    assert answer.item() == pytest.approx((logs(0.5) + logs(0.2) + logs(1 / 3, 0.4) / 2) / 3, rel=1e-5)


def test_schedule():
    """Catches a rate that never warms up or never falls, and memories that don't grow to the size that was asked for."""
    settings = train.TrainConfig(steps=1000, warmup=50, facts=100, lr=1.0)
    rates, sizes = zip(*(train.schedule(settings, step) for step in range(1000)))
    assert rates[0] == pytest.approx(0.02) and max(rates) > 0.95 and rates[-1] < 0.03
    assert sizes[0] == 8 and sizes[-1] == max(sizes) <= 100 and list(sizes) == sorted(sizes)
    assert all(R % train.groups(R, N) == 0 for R in (1, 7, 16, 100, 128) for N in (4, 8, 64, 10_000))


# ------------------------------------------------------------------------------------------------------------- the loop

def losses(model, pool):
    with torch.no_grad():
        batch = draw(pool, 8, 64, 8, 0.1, 0.1, seed=9)
        out = train.forward(model, pool, batch, SETTINGS.tokens)
        return (torch.nn.functional.cross_entropy(out["logits"], out["targets"]).item(), *map(torch.Tensor.item, train.retrieval_loss(batch, out, 2)))


def test_a_run_moves_the_memory_and_nothing_else(shipped, pool, run, tmp_path):
    """Catches a loss that doesn't fall, a tensor that nothing trains, a base that changes, and files that don't load."""
    base = {name: t.clone() for name, t in shipped.gemma.state_dict().items()}
    start = untrained(shipped, pool)
    model = run(steps=30, facts=8)
    before, after = losses(start, pool), losses(model, pool)
    weigh = lambda answer, at_prompt, at_answer: answer + SETTINGS.retrieval * (at_prompt + at_answer)
    assert weigh(*after) < weigh(*before) - 0.03 and after[1] < before[1] and after[2] < before[2], (before, after)
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
    """Catches anything that a checkpoint leaves out: moments, the step of the schedule, the random state, the best score so far."""
    torch.use_deterministic_algorithms(True)
    try:
        whole = run(out=str(tmp_path / "whole"), batch=8, facts=8)
        forward, saved = train.forward, tmp_path / "broken" / "checkpoint.safetensors"

        def stopped(model, *arguments):
            if saved.exists() and model.training:
                raise KeyboardInterrupt
            return forward(model, *arguments)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "forward", stopped)
            run(out=str(tmp_path / "broken"), batch=8, facts=8)
        torch.rand(5)                                                      # another process has another random state
        resumed = run(out=str(tmp_path / "broken"), batch=8, facts=8, resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, one), other in zip(whole.injection.state_dict().items(), resumed.injection.state_dict().values()):
        assert torch.equal(one, other), name
    read = lambda name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert [(a["step"], a["loss"]) for a in read("whole")] == [(b["step"], b["loss"]) for b in read("broken")]


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
    (["--model", "nonsense"], "'tiny'"), (["--out", "taken"], "taken"), (["--steps", "-1"], "steps"), (["--inject-after", "99"], "layers"),
    (["--resume"], "checkpoint")])
def test_bad_arguments_are_one_sentence(tmp_path, arguments, says):
    """Catches a traceback, and minutes of preparing before the message."""
    (tmp_path / "taken").write_text("a file")
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--bundles", "20", *arguments], capture_output=True, text=True,
                          cwd=tmp_path, timeout=60, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr and says in done.stderr, done.stderr
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and (tmp_path / "taken").read_text() == "a file"
