"""The memory on a toy base: writing, forgetting, asking, saving, and that the base never changes."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gemma import BOS, PAD, Gemma, InputError, KVCache, Tokenizer
from gnn import most_similar_later, time_and_similarity_edges
from memory import DONT_KNOW, GemmaWithMemory, MemoryConfig, MemoryView, TokenStore, pooled
from toy import FACTS, one_thread, toy_base, toy_model  # noqa: F401 (one_thread is a fixture)

QUESTIONS = ["Where does Maria live?", "What is Tom's locker code?", "Who has the red bike that we saw yesterday?", "Who?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def model(folder):
    return GemmaWithMemory.from_pretrained(folder)


@pytest.fixture
def full(model):
    model.add_to_memory(FACTS)
    return model


def fresh(model, facts=()):
    """Another model with the same weights and a memory of its own."""
    other = GemmaWithMemory(model.gemma, model.tokenizer, model.config, model.base_name).eval()
    other.injection.load_state_dict(model.injection.state_dict())
    other.add_to_memory(list(facts))
    return other


def keys(model):
    return model.memory_graph.view(model.injection).keys[0]


def same_memory(a, b):
    """Both memories hold the same texts, tokens, nodes, links and keys (ids may differ; floats up to rounding)."""
    x, y = a.memory_graph, b.memory_graph
    assert x.texts == y.texts
    assert torch.equal(x.tokens.ids, y.tokens.ids) and torch.equal(x.tokens.lengths, y.tokens.lengths)
    assert torch.equal(x.tokens.starts, y.tokens.starts) and x.tokens.longest == y.tokens.longest
    assert torch.equal(x.similar, y.similar)
    for one, other in ((x.states, y.states), (x.tokens.keys, y.tokens.keys), (x.nodes, y.nodes), (x.own, y.own), (x.cosine, y.cosine), (keys(a), keys(b))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ writing

def test_what_was_added_is_recalled(full):
    """Catches a memory whose `add` stores nothing, or whose texts and weights are out of step."""
    found, null = full.recall(QUESTIONS[0], top_k=99)
    assert sorted(found) == sorted((i, w, FACTS[i]) for i, w, _ in found) and len(found) == len(full.memory_graph) == len(FACTS)
    assert [w for _, w, _ in found] == sorted((w for _, w, _ in found), reverse=True)
    assert sum(w for _, w, _ in found) + null == pytest.approx(1, abs=1e-5)
    assert full.recall(QUESTIONS[0], top_k=2)[0] == found[:2]


def test_ids_are_in_order_and_never_used_twice(model):
    """Catches ids handed out in the order of the length-sorted batches, and an id that comes back for another text."""
    assert model.add_to_memory(FACTS[0]) == 0
    assert model.add_to_memory([FACTS[1] * 3, FACTS[2], "x", FACTS[3]]) == [1, 2, 3, 4]
    assert model.memory_graph.texts == [FACTS[0], FACTS[1] * 3, FACTS[2], "x", FACTS[3]]
    model.forget(4)
    assert model.add_to_memory([FACTS[4]]) == [5]
    model.clear_memory()
    assert model.add_to_memory(FACTS[5]) == 6
    assert model.add_to_memory([]) == []


@pytest.mark.parametrize("text", ["  two  spaces ", "tab\tand\u2028line", "Zoë 東京 🚲", "a<end_of_turn>\n<bos>b", "a\u2581b", "e\u0301"])
def test_texts_are_kept_verbatim(model, text):
    """Catches stripping, normalising, and a fact whose spelling of a control token becomes one."""
    model.add_to_memory([FACTS[0], text])
    assert model.recall(QUESTIONS[0], top_k=9)[0] and model.memory_graph.texts[1] == text
    tokens = model.memory_graph.tokens
    ids = tokens.ids[tokens.starts[1]:].tolist()
    assert model.tokenizer.decode(ids) == text and not set(ids) & model.tokenizer.control_ids


@pytest.mark.parametrize("bad", ["", " \n", "word " * 200, 7, None, "\ud800"])
def test_a_bad_text_stores_nothing_of_its_list(full, bad):
    """Catches a list that is stored up to the text that raised."""
    before = copy.deepcopy(full.memory_graph)
    with pytest.raises(InputError):
        full.add_to_memory(["good", bad, "good"])
    assert full.memory_graph.texts == before.texts and full.memory_graph.next_id == before.next_id
    assert torch.equal(full.memory_graph.tokens.ids, before.tokens.ids)


def test_states_of_a_text_alone_and_in_a_batch(model):
    """Catches padding that leaks into a sentence's states, and <bos> kept among them."""
    rows = [model.tokenizer.encode(f) for f in [*FACTS, "x", "word " * 40]]
    for row, together in zip(rows, model.states(rows)):
        assert together.shape == (len(row) - 1, model.gemma.config.hidden_size)
        torch.testing.assert_close(together, model.states([row])[0], rtol=1e-4, atol=1e-4)


def test_adding_one_by_one_is_adding_at_once(model):
    """Catches edges, starts or similarity links that an incremental write leaves out of date."""
    for fact in FACTS[:3]:
        model.add_to_memory(fact)
        model.recall(QUESTIONS[0])                                         # keys are cached in between
    model.add_to_memory(FACTS[3:])
    same_memory(model, fresh(model, FACTS))


def test_similarity_links_equal_those_of_the_whole(full):
    """Catches an incremental search that misses a pair, links backwards, or keeps a worse one."""
    for end in ("!", " again", "?"):                                       # alike, but no two the same: a tie has no right answer
        full.add_to_memory([f[:-1] + end for f in FACTS])
    graph = full.memory_graph
    S = full.config.similar_edges
    similar, cosine = most_similar_later(graph.own[None], torch.ones(1, len(graph), dtype=torch.bool), S)
    torch.testing.assert_close(graph.cosine, cosine[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(graph.similar, similar[0]) and (graph.similar >= 0).any()
    later = graph.similar > torch.arange(len(graph))[:, None]
    assert bool((later | (graph.similar == -1)).all())


def test_edges_of_a_small_graph():
    """Catches a time edge that points the wrong way, and one that links two graphs of a batch or a padded node."""
    similar = torch.tensor([[[2], [-1], [-1]], [[1], [-1], [-1]]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    index, features = time_and_similarity_edges(similar, torch.full((2, 3, 1), 0.75), valid)
    edges = {(s, t, tuple(f)) for (s, t), f in zip(index.T.tolist(), features.tolist())}
    previous, following, later = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0.75)
    assert edges == {(0, 1, previous), (1, 2, previous), (3, 4, previous), (1, 0, following), (2, 1, following), (4, 3, following),
                     (2, 0, later), (4, 3, later)}


# --------------------------------------------------------------------------------------------------------- forgetting

@pytest.mark.parametrize("gone", [[0], [3], [7], [2, 3], [6, 1, 4], list(range(7))])
def test_forgotten_is_as_if_never_told(full, gone):
    """Catches neighbours that aren't linked to each other, links to rows that moved, and tokens cut at the wrong place."""
    full.recall(QUESTIONS[0])
    for episode in gone:
        full.forget(episode)
    other = fresh(full, [f for i, f in enumerate(FACTS) if i not in gone])
    same_memory(full, other)
    assert full.memory_graph.ids == [i for i in range(len(FACTS)) if i not in gone]
    assert {text for _, _, text in full.recall(QUESTIONS[0], top_k=99)[0]} == set(other.memory_graph.texts)
    assert full.answer(QUESTIONS, max_new_tokens=8) == other.answer(QUESTIONS, max_new_tokens=8)
    with pytest.raises(InputError):
        full.forget(gone[0])


def test_cleared_is_empty_and_can_be_filled_again(full):
    """Catches keys or tokens that survive `clear_memory`."""
    full.recall(QUESTIONS[0])
    full.clear_memory()
    assert len(full.memory_graph) == 0 and full.recall(QUESTIONS[0]) == ([], 1.0)
    assert full.answer(QUESTIONS[:2]) == [DONT_KNOW] * 2
    full.add_to_memory(FACTS[2:])
    same_memory(full, fresh(full, FACTS[2:]))


# ------------------------------------------------------------------------------------------------------------- asking

def test_empty_memory_leaves_every_logit_alone(model):
    """Catches an injection that adds 0 x something instead of nothing, and a memory that still speaks once it is emptied."""
    ids, mask = model.batch(QUESTIONS)
    base = model.gemma(ids, mask)
    for emptied in (False, True):
        assert torch.equal(model(ids, mask), base) and torch.equal(model(ids, mask, mask), base)
        assert torch.equal(model.generate(ids[:, -3:], 5), model.gemma.generate(ids[:, -3:], 5))
        assert model.answer(QUESTIONS[0]) == DONT_KNOW
        if not emptied:
            model.add_to_memory(FACTS)
            assert not torch.equal(model(ids, mask, mask), base) and not torch.equal(model(ids, mask), base)
            model.clear_memory()


def test_answers_depend_on_memory_and_question(full):
    """Catches a reader that ignores its question or its memory, which would make most tests here pass for nothing."""
    answers = full.answer(QUESTIONS, max_new_tokens=8)
    assert len(set(answers)) > 1
    assert fresh(full, FACTS[:2]).answer(QUESTIONS, max_new_tokens=8) != answers


def test_a_batch_of_questions_is_one_by_one(full):
    """Catches padding that asks along, positions counted from the padding, and answers in the wrong order."""
    assert full.answer(QUESTIONS, max_new_tokens=12) == [full.answer(q, max_new_tokens=12) for q in QUESTIONS]
    assert full.answer([]) == []


def test_rows_of_a_batch_are_isolated(full):
    """Catches one row's question reaching another row's pool, candidates or null weight."""
    ids, mask = full.batch(QUESTIONS)
    other = ids.clone()
    other[1:] = other[1:].flip(1).masked_fill(~mask[1:].bool(), PAD)
    for question_mask in (mask, None):
        torch.testing.assert_close(full(ids, mask, question_mask)[0], full(other, mask, question_mask)[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(full(ids, mask, question_mask)[1], full(other, mask, question_mask)[1], atol=1e-2)


def test_bare_forward_is_causal(full):
    """Catches a question pooled over the whole text: a later token would change what an earlier one predicts."""
    ids = torch.tensor([full.tokenizer.encode(FACTS[0] + " " + FACTS[3])])
    whole = full(ids)
    for cut in (1, 4, ids.shape[1] - 1):
        changed = ids.clone()
        changed[:, cut:] = changed[:, cut:].flip(1) + 1
        torch.testing.assert_close(full(changed)[:, :cut], whole[:, :cut], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(full(ids[:, :cut]), whole[:, :cut], rtol=1e-4, atol=1e-4)


def test_bos_is_left_as_it_is(full):
    """Catches <bos>, whose state is an outlier, asking or being added to: its logits are the base's."""
    ids, mask = full.batch(QUESTIONS)
    at_bos = ids == BOS
    for question_mask in (None, mask):
        assert torch.equal(full(ids, mask, question_mask)[at_bos], full.gemma(ids, mask)[at_bos])


def test_cached_equals_uncached(full):
    """Catches a decoding step that pools or chooses its candidates anew, and rows whose padding shifts the cache."""
    ids, mask = full.batch(QUESTIONS)
    T = ids.shape[1]
    new = full.generate(ids, 6, attention_mask=mask, stop=())[:, T:]
    full._open()
    cache = KVCache(full.gemma.config, len(ids), T + 6, full.gemma.dtype, full.gemma.device)
    stepwise = [full.gemma(ids, mask, torch.ones_like(ids), cache, full.injection)]
    stepwise += [full.gemma(new[:, i:i + 1], None, None, cache, full.injection) for i in range(6)]
    ones = torch.ones_like(new)
    uncached = full(torch.cat((ids, new), 1), torch.cat((mask, ones), 1), torch.cat((mask, 0 * ones), 1))
    real = torch.cat((mask, ones), 1).bool()
    torch.testing.assert_close(torch.cat(stepwise, 1)[real], uncached[real], rtol=1e-3, atol=1e-3)
    assert torch.equal(uncached[:, T - 1:-1].argmax(-1), new)


def test_packed_memories_are_separate_memories(full):
    """Catches training batches in which a question reads another graph's episodes, or a padded one."""
    parts = [FACTS[:3], FACTS[3:8]]
    models = [fresh(full, part) for part in parts]
    graphs = [m.memory_graph for m in models]
    N, (keys_a, keys_b) = 5, map(keys, models)
    store = TokenStore(*(torch.cat([getattr(g.tokens, name) for g in graphs]) for name in ("ids", "keys", "lengths")))
    view = MemoryView(torch.stack((F.pad(keys_a, (0, 0, 0, 0, 0, 2)), keys_b)),
                      torch.tensor([[True] * 3 + [False] * 2, [True] * 5]), torch.tensor([[0, 1, 2, 0, 0], [3, 4, 5, 6, 7]]), store)
    torch.manual_seed(0)
    h = torch.randn(4, 6, full.gemma.config.hidden_size)                   # two questions to each memory
    pool = pooled(full.injection.standardise(h), torch.ones(4, 6))[:, None]
    last = torch.tensor([5, 3, 5, 4])
    packed = full.injection.read(h, pool, last, view)
    for row in range(4):
        alone = full.injection.read(h[row:row + 1], pool[row:row + 1], last[row:row + 1], models[row // 2].memory_graph.view(full.injection))
        torch.testing.assert_close(packed.context[row], alone.context[0], rtol=1e-4, atol=1e-4)
        n = len(parts[row // 2])
        assert packed.asked[-1][row, :, n:N].exp().sum() == 0
        torch.testing.assert_close(packed.asked[-1][row, :, -1], alone.asked[-1][0, :, -1], rtol=1e-4, atol=1e-4)


def test_reading_equals_the_slow_way(full):
    """Catches a mistake in the two stages, the second hop, or the values: everything in loops over heads, episodes and tokens."""
    layer, gnn, graph, config = full.injection, full.injection.gnn, full.memory_graph, full.config
    H, D, N, k = config.heads, full.gemma.config.hidden_size, len(graph), config.candidates
    torch.manual_seed(0)
    h, pool = torch.randn(1, 1, D), torch.randn(1, 1, D)
    out = layer.read(h, pool, torch.tensor([0]), graph.view(layer))
    unit = lambda v: v / v.norm()
    head = lambda linear, v, i: linear(v).view(H, -1)[i]
    standard = lambda v: ((v - layer.state_mean) / layer.state_std).clamp(-10, 10)
    x, pool, all_keys = standard(h[0, 0]), pool[0, 0], keys(full)
    added = torch.zeros(H * config.key_dim)
    for hop in range(config.hops):
        context, over_all, tokens = torch.zeros(H, D), torch.zeros(H, N + 1), {}
        for i in range(H):
            query = unit(head(layer.query_own, x, i) + head(layer.query_pool, pool, i) + added.view(H, -1)[i])
            scores = torch.stack([query @ key for key in [*all_keys[:, i], unit(gnn.null_key[i])]])
            sharp = gnn.log_temperature[i].exp() * math.log(N + 2) / math.log(18)
            over_all[i] = (scores * sharp).softmax(0)
        best = over_all.mean(0)[:N].topk(k).indices.tolist()
        found = torch.zeros(D)
        for i in range(H):
            among = over_all[i, [*best, N]] / over_all[i, [*best, N]].sum()              # softmax again, over the candidates and null
            for share, n in zip(among, best):
                start, M = int(graph.tokens.starts[n]), int(graph.tokens.lengths[n])
                states = [standard(s) for s in graph.states[start:start + M]]
                before = [torch.zeros(D), *states[:-1]]
                token_query = unit(head(layer.token_query_own[hop], x, i) + head(layer.token_query_pool[hop], pool, i))
                token_keys = [unit(head(layer.token_key_own, s, i) + head(layer.token_key_before, b, i)) for s, b in zip(states, before)]
                weights = (torch.stack([token_query @ key for key in token_keys]) * layer.log_token_temperature[i].exp()).softmax(0)
                for weight, token in zip(weights, graph.tokens.ids[start:start + M]):
                    value = full.gemma.embed_tokens.weight[token]
                    value = value / value.pow(2).mean().sqrt()
                    context[i] += share * weight * value
                    found += share * weight * value / H
        if hop + 1 < config.hops:
            added = added + layer.hop_query[hop](found)
        torch.testing.assert_close(out.asked[hop][0].exp(), over_all, rtol=1e-3, atol=1e-4)
        assert out.chosen[hop][0].tolist() == best
    torch.testing.assert_close(out.context[0, 0], context, rtol=1e-3, atol=1e-3)
    delta = sum(context[i] @ layer.value_map[i] for i in range(H)) * h.pow(2).mean().sqrt()
    torch.testing.assert_close(layer.inject(h, out.context, torch.tensor([[False]]))[0, 0], h[0, 0] + delta, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer.inject(h, out.context, torch.tensor([[True]])), h)


def test_null_above_its_threshold_is_a_refusal(full):
    """Catches a threshold that is compared the wrong way round, or to another number than the one `recall` shows."""
    null = full.recall(QUESTIONS[0])[1]
    assert 0 < null < 1
    full.config.null_threshold = null + 1e-4
    assert full.answer(QUESTIONS[0], max_new_tokens=4) != DONT_KNOW
    full.config.null_threshold = null - 1e-4
    assert full.answer(QUESTIONS[0], max_new_tokens=4) == DONT_KNOW
    full.config.null_threshold = sorted(full.recall(q)[1] for q in QUESTIONS)[1] + 1e-4
    refused = [full.recall(q)[1] > full.config.null_threshold for q in QUESTIONS]
    assert [a == DONT_KNOW for a in full.answer(QUESTIONS, max_new_tokens=4)] == refused and sum(refused) == 2


@pytest.mark.parametrize("text", ["Zoë 東京 🚲 é!", " two  words ", "bad \ufffd byte", "plain", "e\u0301 \u2581 x"])
def test_streamed_pieces_are_whole_characters(full, monkeypatch, text):
    """Catches a stream that prints half a character as U+FFFD, or differs from `answer` at its ends."""
    tokens = full.tokenizer.encode(text, bos=False) + sorted(full.stop)[:1]
    monkeypatch.setattr(full, "weights", lambda: torch.zeros(1, 1))
    monkeypatch.setattr(full, "stream", lambda ids, **options: iter(torch.tensor(tokens)[:, None]))
    pieces = [piece for (piece,) in full.answer_stream([QUESTIONS[0]])]
    assert "".join(pieces) == full.answer(QUESTIONS[0]) == text.strip()
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(tokens) + 1


@pytest.mark.parametrize("bad", ["", " ", None, 7, "\ud800", "word " * 200])
def test_a_bad_question_is_refused_with_a_sentence(full, bad):
    """Catches a question that becomes a traceback, or is cut silently."""
    for ask in (full.recall, full.answer):
        with pytest.raises((InputError, TypeError) if bad in (None, 7) else InputError):
            ask(bad)


def test_the_longest_question_leaves_room_for_its_answer(full):
    """Catches an answer that runs past the last position the base was trained on, and a limit that is off by one."""
    context, question = full.gemma.config.max_position_embeddings, "word"
    while len(full.prompt(question + " x")) <= context - 5:
        question += " x"
    fits = context - len(full.prompt(question))
    full.answer(question, max_new_tokens=fits)
    for ask in (lambda: full.answer(question, max_new_tokens=fits + 1), lambda: full.answer([QUESTIONS[0], question], max_new_tokens=fits + 1)):
        with pytest.raises(InputError, match=f"at most {context - fits - 1} tokens, got {context - fits}"):
            ask()


# ------------------------------------------------------------------------------------------------------------ training

def step(model, optimizer, question=QUESTIONS[0], target="4821"):
    prompt, value = model.prompt(question), model.tokenizer.encode(" " + target, bos=False)
    ids = torch.tensor([prompt + value])
    asks = torch.tensor([[1] * len(prompt) + [0] * len(value)])
    logits = model(ids, question_mask=asks)[0, len(prompt) - 1:-1]
    loss = F.cross_entropy(logits, ids[0, len(prompt):])
    optimizer.zero_grad()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return loss.item(), grads


def test_training_moves_the_memory_and_never_the_base(full):
    """Catches a base that isn't frozen, a part of the graph network that the loss doesn't reach, and keys cached over a step."""
    base = {name: p.clone() for name, p in full.gemma.named_parameters()}
    memory = {name: p.clone() for name, p in full.injection.named_parameters()}
    full.recall(QUESTIONS[0])                                              # caches keys without a gradient
    full.train()
    assert not full.gemma.training
    optimizer = torch.optim.AdamW(full.trainable_parameters(), lr=1e-2)
    losses = []
    for i in range(8):
        loss, grads = step(full, optimizer)
        losses.append(loss)
        if i == 0:
            assert grads.keys() == {"injection." + name for name in memory}
            assert all(bool(g.abs().sum() > 0) and bool(g.isfinite().all()) for g in grads.values())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[name]) for name, p in full.gemma.named_parameters())
    assert all(p.grad is None for p in full.gemma.parameters())
    assert not any(torch.equal(p, memory[name]) for name, p in full.injection.named_parameters())


def test_episodes_told_before_training_follow_the_new_weights(full):
    """Catches keys and similarity links that still come from the weights before training."""
    full.recall(QUESTIONS[0])
    full.train()
    optimizer = torch.optim.AdamW(full.trainable_parameters(), lr=1e-1)
    step(full, optimizer)
    full.eval()
    same_memory(full, fresh(full, FACTS))


def test_the_optimizer_gets_nothing_of_the_base(full):
    """Catches base weights among the trainable parameters: the embedding table, which the memory reads, above all."""
    base = {p.data_ptr() for p in full.gemma.parameters()}
    mine = full.trainable_parameters()
    assert mine and not any(p.data_ptr() in base for p in mine) and all(p.requires_grad for p in mine)
    assert not any(p.requires_grad for p in full.gemma.parameters())
    assert not any("table" in name for name in full.injection.state_dict())


OPTIONS = [dict(node_features="embedding"), dict(query="pooled"), dict(read="episode"), dict(graph=False), dict(hops=1), dict(hops=3),
           dict(time_edges=False), dict(similar_edges=0), dict(similar_edges=3, time_edges=False), dict(cosine_keys=False),
           dict(identity_values=False), dict(chat=True), dict(candidates=99), dict(time_edges=False, similar_edges=0),
           dict(node_features="embedding", query="pooled", read="episode"), dict(inject_after=4), dict(inject_after=1)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_end_to_end(folder, tmp_path, options):
    """Catches a choice of MemoryConfig that no longer adds, asks, forgets, trains, saves or loads."""
    small = dict(inject_after=2, heads=2, key_dim=16, token_key_dim=8, gat_dim=8, candidates=4, null_threshold=1.0, value_scale=1.0)
    torch.manual_seed(0)
    model = GemmaWithMemory(Gemma.from_pretrained(folder), Tokenizer(folder), MemoryConfig(**{**small, **options}), folder)
    model.add_to_memory(FACTS)
    model.forget(2)
    start = model.injection.value_map.clone()
    _, grads = step(model, torch.optim.AdamW(model.trainable_parameters(), lr=1e-2))
    assert not torch.equal(model.injection.value_map, start)
    if model.config.graph:
        assert grads["injection.gnn.gat.project.weight"].abs().sum() > 0
    model.eval()
    same_memory(model, fresh(model, [f for f in FACTS if f != FACTS[2]]))
    model.save_pretrained(tmp_path)
    again = GemmaWithMemory.from_pretrained(tmp_path)
    assert again.config == model.config
    model.injection.load_state_dict(again.injection.state_dict())          # both as rounded by saving
    model.eval()
    again.add_to_memory(model.memory_graph.texts)
    assert again.answer(QUESTIONS, max_new_tokens=6) == model.answer(QUESTIONS, max_new_tokens=6)


# ------------------------------------------------------------------------------------------------------------- saving

def test_saved_and_loaded_gives_the_same_answers(full, tmp_path):
    """Catches a tensor or setting that isn't saved, rounding beyond bf16, and episodes written to disk."""
    full.trained = {"steps": 3}
    for p in full.trainable_parameters():
        p.data += 0.01 * torch.rand_like(p)                                # nothing that bf16 holds exactly
    full.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]
    again = GemmaWithMemory.from_pretrained(tmp_path)
    assert again.config == full.config and again.trained == full.trained and len(again.memory_graph) == 0
    saved, mine, loaded = load_file(tmp_path / "memory.safetensors"), full.injection.state_dict(), again.injection.state_dict()
    assert saved.keys() == mine.keys() == loaded.keys()
    for name, tensor in mine.items():
        rounded = tensor.bfloat16().float() if tensor.ndim > 1 else tensor
        assert torch.equal(loaded[name], rounded) and torch.equal(saved[name].float(), rounded)
    again.add_to_memory(FACTS)
    full.injection.load_state_dict(loaded)
    assert again.answer(QUESTIONS, max_new_tokens=12) == full.eval().answer(QUESTIONS, max_new_tokens=12)
    assert not any(fact.encode() in p.read_bytes() for p in tmp_path.iterdir() for fact in FACTS)


def test_another_config_or_tokenizer_is_refused(full, tmp_path):
    """Catches a memory that speaks to a base whose layers or tokens mean something else."""
    full.save_pretrained(tmp_path / "memory")
    with pytest.raises(InputError, match="config"):
        GemmaWithMemory.from_pretrained(tmp_path / "memory", base=toy_base(tmp_path / "wider_window", sliding_window=9))
    other = toy_base(tmp_path / "other_tokenizer")
    blob = (other / "tokenizer.model").read_bytes()
    (other / "tokenizer.model").write_bytes(blob.replace(b"<unused7>", b"<unused#>"))
    with pytest.raises(InputError, match="tokenizer"):
        GemmaWithMemory.from_pretrained(tmp_path / "memory", base=other)


def test_other_weights_of_the_same_shape_only_warn(full, folder, tmp_path, capsys):
    """Catches refusing the official bf16 weights under a memory trained on dequantised ones, or saying nothing."""
    GemmaWithMemory.from_pretrained(folder)
    assert capsys.readouterr().err == ""
    GemmaWithMemory.from_pretrained(folder, base=toy_base(tmp_path / "base", seed=5)).answer(QUESTIONS[0])
    assert "other weights" in capsys.readouterr().err


def test_a_fresh_memory_on_a_base(folder):
    """Catches base= alone, the way train.py starts, asking for a memory.json."""
    with pytest.raises(InputError, match="inject_after"):                  # the default is after layer 8; the toy has 4
        GemmaWithMemory.from_pretrained(base=folder)
    with pytest.raises(InputError, match="neither"):
        GemmaWithMemory.from_pretrained()


def damage(change):
    def apply(folder):
        saved = json.loads((folder / "memory.json").read_text())
        change(saved)
        (folder / "memory.json").write_text(json.dumps(saved))
    return apply


@pytest.mark.parametrize("spoil", [
    damage(lambda s: s.pop("memory")), damage(lambda s: s.pop("base")), damage(lambda s: s["base"].pop("name")),
    damage(lambda s: s["base"].update(name=5)), damage(lambda s: s["base"].pop("config")), damage(lambda s: s["base"].update(tokenizer=[])),
    damage(lambda s: s["memory"].pop("inject_after")), damage(lambda s: s["memory"].update(heads="2")), damage(lambda s: s["memory"].update(heads=True)),
    damage(lambda s: s["memory"].update(heads=4)), damage(lambda s: s["memory"].update(hops=0)), damage(lambda s: s["memory"].update(query="both")),
    damage(lambda s: s["memory"].update(speed=9)), damage(lambda s: s["memory"].update(inject_after=5)),
    lambda f: (f / "memory.json").write_text("[1]"), lambda f: (f / "memory.json").write_bytes(b"\xff\xfe{"), lambda f: (f / "memory.json").unlink(),
    lambda f: (f / "memory.safetensors").unlink(), lambda f: (f / "memory.safetensors").write_bytes(b""),
    lambda f: (f / "memory.safetensors").write_bytes((f / "memory.safetensors").read_bytes()[:-9]),
    lambda f: (f / "memory.safetensors").write_bytes((f / "memory.safetensors").read_bytes().replace(b"value_map", b"value_mop")),
    lambda f: (f / "memory.safetensors").write_bytes((f / "memory.safetensors").read_bytes()[:-2] + b"\x80\xff"),      # a NaN
])
def test_damaged_files_are_refused_with_a_sentence(full, tmp_path, spoil):
    """Catches a default that quietly stands in for what is missing, and a traceback instead of a sentence."""
    full.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError) as raised:
        GemmaWithMemory.from_pretrained(tmp_path)
    assert str(raised.value).endswith(".")
