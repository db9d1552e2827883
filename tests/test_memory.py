"""The memory on a toy base: writing, forgetting, asking, saving, and that the base never changes."""

import copy
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import memory
from extras import blocks
from extras.memory_model import DONT_KNOW
from gemma import BOS, PAD, Gemma, InputError, KVCache, Tokenizer
from memory import (FOLLOWED, FOUND, HUSHED, LEAST, LOOKBACK, NEAR, NOTHING, WINDOW, WORDS, GemmaWithMemory, MemoryConfig, MemoryInjectionLayer, MemoryView, Question,
                    TokenStore, followed, parted)
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
    """Both memories hold the same texts, tokens, nodes and keys (ids may differ; floats up to rounding)."""
    x, y = a.memory_graph, b.memory_graph
    assert x.texts == y.texts
    assert torch.equal(x.tokens.ids, y.tokens.ids) and torch.equal(x.tokens.lengths, y.tokens.lengths)
    assert torch.equal(x.tokens.starts, y.tokens.starts) and x.tokens.longest == y.tokens.longest
    torch.testing.assert_close(x.tokens.keys.float(), y.tokens.keys.float(), rtol=1e-3, atol=1e-3)         # kept in float16
    for one, other in ((x.nodes, y.nodes), (keys(a), keys(b))):
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
    """Catches edges, starts or cached keys that an incremental write leaves out of date."""
    for fact in FACTS[:3]:
        model.add_to_memory(fact)
        model.recall(QUESTIONS[0])                                         # keys are cached in between
    model.add_to_memory(FACTS[3:])
    same_memory(model, fresh(model, FACTS))


def test_a_thousand_facts_of_all_lengths_at_once(model):
    """Catches states that go to another text where batches are sorted by length, and parts that end at the wrong fact."""
    rng = random.Random(0)
    texts = [f"{rng.choice(FACTS)} {n}" + " and so on" * rng.choice([0, 0, 1, 2, rng.randrange(9)]) for n in range(1000)]
    texts[500] = "x"
    texts[501] = "Ana is" + " very" * 20 + " old."
    one_by_one = fresh(model)
    for text in texts:
        one_by_one.add_to_memory(text)
    model.add_to_memory(texts)
    same_memory(model, one_by_one)


def test_parts_hold_all_facts_in_order():
    """Catches a fact that is lost or told twice at the edge of a part, and one long fact that makes all parts around it small."""
    facts = [[2] * n for n in [5] * 3000 + [30_000] + [5] * 3000 + [2000] * 9]
    parts = list(parted(facts, 1024))
    assert [fact for part in parts for fact in part] == facts
    assert all(len(part) == 1 or len(part) * max(map(len, part)) ** 2 <= 2 ** 24 and len(part) <= 1024 for part in parts)
    assert [len(part) for part in parts] == [1024, 1024, 952, 1, 1024, 1024, 952, 4, 4, 1] and list(parted([], 9)) == []


def test_nodes_and_token_keys_by_hand(full):
    """Catches a node of states or embeddings alone, <bos> in the mean, a token that hears the sentence before, and read and
    match keys and meanings in each other's place."""
    graph, layer, table = full.memory_graph, full.injection, full.gemma.embed_tokens.weight
    width = full.config.heads * full.config.token_key_dim
    unit = lambda key: F.normalize(key.unflatten(-1, (full.config.heads, -1)), dim=-1).flatten(-2)
    for i, fact in enumerate(FACTS):
        ids = full.tokenizer.encode(fact, bos=False)
        start = int(graph.tokens.starts[i])
        at = slice(start, start + len(ids))
        assert graph.tokens.ids[at].tolist() == ids
        states, rows = full.states([[BOS, *ids]])[0], table[ids]
        torch.testing.assert_close(graph.nodes[i], torch.cat((states.mean(0), rows.mean(0))), rtol=1e-3, atol=1e-4)
        x = torch.cat((((states - layer.state_mean) / layer.state_std).clamp(-10, 10), rows / rows.pow(2).mean(-1, keepdim=True).sqrt()), -1)
        x = torch.cat((x, layer.sentence(x, torch.tensor([len(x)]))), -1)                          # this sentence's words alone
        one, two = (torch.cat((torch.zeros(back, x.shape[1]), x))[:len(x)] for back in (1, 2))
        read, match = layer.token_key_own(x) + layer.token_key_before[0](one) + layer.token_key_before[1](two), layer.match_key(x)
        torch.testing.assert_close(graph.tokens.keys[at, :width].float(), unit(read), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(graph.tokens.keys[at, width:2 * width].float(), unit(match), rtol=1e-3, atol=1e-3)
        meaning = layer.meaning(x)
        torch.testing.assert_close(graph.tokens.keys[at, 2 * width:].float(), meaning / meaning.pow(2).mean(-1, keepdim=True).sqrt(), rtol=1e-3, atol=2e-3)


# --------------------------------------------------------------------------------------------------------- forgetting

@pytest.mark.parametrize("gone", [[0], [3], [7], [2, 3], [6, 1, 4], list(range(7))])
def test_forgotten_is_as_if_never_told(full, gone):
    """Catches neighbours that aren't linked to each other, nodes of rows that moved, and tokens cut at the wrong place."""
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


def test_text_that_asks_nothing_is_left_as_it_is(full):
    """Catches a memory that murmurs: a position whose null weighs something, though it doesn't take all, keeps the base's logits."""
    ids = torch.tensor([full.tokenizer.encode(FACTS[0] + " " + FACTS[3])])
    with torch.no_grad():
        base = full.gemma(ids)
        assert not torch.equal(full(ids), base)
        for _ in range(100):                                               # until no position finds anything alike enough
            if torch.equal(full(ids), base):
                break
            full.injection.match_threshold += 0.02
        assert torch.equal(full(ids), base)
        assert not torch.equal(full(ids, None, torch.ones_like(ids)), base)    # asked as a question, the same text still hears something


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


def matches(layer, *arguments):
    return layer.compare(0, *arguments)[0]


def random_question(full, R, T=3 * WORDS, seed=0):
    """R random questions of T tokens, of which the first and some others don't ask; each ends somewhere else."""
    torch.manual_seed(seed)
    x = torch.randn(R, T, 2 * full.gemma.config.hidden_size)
    mask = torch.rand(R, T) < 0.8
    mask[:, 0] = False
    for row in range(R):
        mask[row, T - 1 - row % 3:] = False
        mask[row, T - 2 - row % 3] = True
    assert mask.sum(1).min() > WORDS
    return x, Question(x, mask, torch.randint(full.tokenizer.vocab_size, (R, T)))


def packed(full, parts):
    """Memories of these parts as one MemoryView, padded with what must not count; and each by itself."""
    alone = [fresh(full, part).memory_graph for part in parts]
    views, N = [graph.view(full.injection) for graph in alone], max(map(len, parts))
    store = TokenStore(*(torch.cat([getattr(graph.tokens, name) for graph in alone]) for name in ("ids", "keys", "lengths")))
    pad = lambda t: torch.cat((t, t[:, :1].expand(-1, N - t.shape[1], *t.shape[2:])), 1)   # as in training: some other sentence
    first = [sum(map(len, parts[:g])) for g in range(len(parts))]
    view = MemoryView(*(torch.cat([pad(getattr(v, name)) for v in views]) for name in ("keys", "nodes")),
                      torch.tensor([[n < len(part) for n in range(N)] for part in parts]),
                      torch.cat([pad(v.episodes + f) for v, f in zip(views, first)]), store)
    return view, views


@torch.no_grad()
@pytest.mark.parametrize("similar_edges", [False, True])
def test_packed_memories_are_separate_memories(full, similar_edges):
    """Catches training batches in which a question reads or compares another memory's episodes, or a padded one, which also
    must not silence others; and rows that answer with another row's candidates or words."""
    full.injection.config = replace(full.config, similar_edges=similar_edges)
    full.injection.similarity.bias.fill_(0.0), full.injection.outdated.bias.fill_(5.0)
    parts = [FACTS[:3], FACTS[3:8], ["x"]]                                 # fewer than there are candidates, just enough, fewer than are read
    view, views = packed(full, parts)
    x, question = random_question(full, 6)                                 # two questions to each memory
    together = full.injection.read(x, question, view)
    for row in range(6):
        n = len(parts[row // 2])
        single = full.injection.read(x[row:row + 1], Question(x[row:row + 1], question.mask[row:row + 1], question.ids[row:row + 1]), views[row // 2])
        assert together.asked[-1][row, :, n:-1].exp().sum() == 0
        for hop in range(2):
            k = min(n, full.config.candidates)
            assert together.candidates[hop][row, :k].tolist() == single.candidates[hop][0].tolist()
            torch.testing.assert_close(together.ranked[hop][row][:, [*range(k), -1]], single.ranked[hop][0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together.asked[hop][row, :, -1], single.asked[hop][0, :, -1], rtol=1e-4, atol=1e-4)
            r = min(n, full.config.readable)                               # of an empty place nothing is said
            torch.testing.assert_close(together.fits[hop][row, :, :r], single.fits[hop][0], rtol=1e-4, atol=1e-4)
            assert (together.fits[hop][row, :, r:] == -1e4).all()
        torch.testing.assert_close(together.context[row], single.context[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_candidate_is_compared_for_itself(full):
    """Catches a match, or what was said, that goes to another candidate or row where comparisons are shared and done 256 sentences at a time."""
    layer = full.injection
    layer.config = replace(full.config, similar_edges=False)
    view = fresh(full, [f"{fact} {i}" for i in range(45) for fact in FACTS]).memory_graph.view(layer)
    x, question = random_question(full, 3)
    best = torch.stack([torch.randperm(360)[:120] for _ in range(3)])
    memory = torch.zeros(3, 1, dtype=torch.long)
    together = matches(layer, question, None, view, memory, best)
    assert together.std(-1).min() > 1e-3
    for i in range(0, 120, 7):
        alone = matches(layer, question, None, view, memory, best[:, i:i + 1])
        torch.testing.assert_close(together[..., i:i + 1], alone, rtol=1e-4, atol=1e-4)
    _, said = layer.compare(0, question, None, view, memory, best)
    _, said_alone = layer.compare(0, question, None, view, memory, best[:, 99:])
    torch.testing.assert_close(said[:, :, 99:], said_alone, rtol=1e-4, atol=1e-4)


def test_words_said_before_are_of_the_same_memory():
    """Catches words of the sentence itself, of another memory's, the two sentences before in the wrong order, and a first sentence that
    has others before it."""
    store = TokenStore(torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.zeros(7, 1), torch.tensor([2, 1, 3, 1]))             # "1 2", "3", "4 5 6", "7"
    view = MemoryView(None, None, torch.ones(2, 3).bool(), torch.tensor([[1, 0, 2], [3, 2, 0]]), store)
    question = Question(None, None, torch.tensor([[3, 2, 9], [5, 7, 1]]))
    layer = SimpleNamespace(word=torch.arange(10))
    said = MemoryInjectionLayer.said_before(layer, question, view, torch.tensor([[0], [1]]), torch.tensor([[2, 0], [1, 2]]))
    no = [False, False]
    assert said.tolist() == [[[[False, True], [True, False], no], [no, no, no]], [[no, [True, False], no], [[True, False], [False, True], no]]]


@torch.no_grad()
def test_borrowing_stops_at_the_first_sentence(full):
    """Catches a second sentence that borrows, as "the one two before", the words of the first; also where another memory ends there."""
    layer, (x, question) = full.injection, random_question(full, 4)
    layer.config = replace(full.config, similar_edges=False)
    layer.lookback.weight.zero_()
    view, _ = packed(full, [FACTS[:4], FACTS[4:]])
    best, memory = torch.arange(4).expand(4, -1), torch.tensor([[0], [0], [1], [1]])
    with_gate = []
    for back in range(LOOKBACK + 1):                                       # which gate is open: none, that of the sentence before, of two before
        layer.lookback.bias.copy_(torch.tensor([100.0 if b == back else -100.0 for b in range(1, LOOKBACK + 1)]).repeat_interleave(2))
        with_gate.append(matches(layer, question, None, view, memory, best))
    for back in range(1, LOOKBACK + 1):
        assert torch.equal(with_gate[back][..., :back], with_gate[0][..., :back])
        more = with_gate[back] > with_gate[0]
        assert (with_gate[back] >= with_gate[0]).all() and more[..., back:].flatten(1).any(1).all()
    layer.config = replace(full.config, similar_edges=False, time_edges=False)
    torch.testing.assert_close(matches(layer, question, None, view, memory, best), with_gate[0])


@torch.no_grad()
def test_no_word_counts_against_an_episode(full):
    """Catches a likeness below 0, and with it evidence that depends on how long the longest episode happens to be."""
    width = full.config.heads * full.config.token_key_dim
    ones = torch.ones(3, 2 * width) / full.config.token_key_dim ** 0.5
    q = -F.normalize(torch.ones(1, 2, full.config.heads, full.config.token_key_dim), dim=-1)
    for lengths, episodes in (([1, 1, 1], 3), ([1, 2], 2)):
        store = TokenStore(torch.zeros(3, dtype=torch.long), ones, torch.tensor(lengths))
        like, said = full.injection.likeness(q, 2, store, torch.arange(episodes)[None])
        assert like.shape == (1, full.config.heads, 2, episodes) and said.shape == (1, full.config.heads, episodes, max(lengths))
        assert (like == 0).all() and (said == 0).all()


@torch.no_grad()
def test_reading_equals_the_slow_way(full):
    """Catches a mistake in any of the five stages, in the second hop, or in the values: everything in loops over heads,
    episodes, words and tokens, but for the attention between question and episode, which test_gnn.py has in loops."""
    layer, gnn, graph, config, table = full.injection, full.injection.gnn, full.memory_graph, full.config, full.gemma.embed_tokens.weight
    similarity = layer.similarity
    layer.match_threshold.copy_(torch.tensor([0.5, 0.8]))
    similarity.bias.fill_(0.0), layer.outdated.bias.fill_(0.0)
    layer.lookback.bias.fill_(2.0)
    layer.understood_key.weight.mul_(5.0), layer.fits.weight.mul_(5.0), layer.marks.weight.mul_(5.0)
    for linear in (*layer.mark_query, *layer.by_way, layer.goes_on):
        torch.nn.init.normal_(linear.weight, std=0.02), torch.nn.init.normal_(linear.bias)
    layer.understand.echo.normal_(), layer.understand.before.normal_()
    bounded = lambda x: 4 * torch.tanh(x / 4)
    H, D, N, k, r = config.heads, full.gemma.config.hidden_size, len(graph), config.candidates, config.readable
    assert r < k < N and config.hops == 2
    x, question = random_question(full, 1)
    question.ids[:, ::2] = graph.tokens.ids[:question.ids[:, ::2].shape[1]]                     # words that are told
    spelt = {word: i for i, word in enumerate(full.tokenizer.words())}                         # otherwise, where they can be
    question.ids[:, ::4] = torch.tensor([[spelt[full.tokenizer.words()[i]] for i in question.ids[0, ::4].tolist()]])
    word_of = lambda ids: torch.tensor([full.tokenizer.words()[i] for i in ids])
    before = layer.read(x, question, graph.view(layer))
    common = before.token_ids[0, 0, before.marks[1][0, 0, :, 0].argmax()].item()               # said after the question: where an answer may begin
    out = layer.read(x, question, graph.view(layer), ids=torch.full((1, x.shape[1]), common))
    x, asking = x[0], question.mask[0].nonzero()[:, 0].tolist()
    last, after = asking[-1], len(x) - 1                                   # the position that asks, and one of the answer
    unit = lambda v: v / v.norm()
    head = lambda linear, v, i: linear(v).view(-1, H, linear(v).numel() // H)[0, i]
    value = lambda token: table[token] / table[token].pow(2).mean().sqrt()
    clamped = lambda v, mean, std: ((v - mean) / std).clamp(-10, 10)
    pool, all_keys, nodes = x[asking].mean(0), keys(full), clamped(graph.nodes, gnn.mean, gnn.std)
    nothing = torch.zeros(layer.token_key_own.in_features)
    tokens = []                                                            # of each episode: (id, features, features of the two before)
    for fact in graph.texts:
        _, *ids = full.token_ids(fact)
        (states,), M = full.states([[BOS, *ids]]), len(ids)
        features = [torch.cat((clamped(states[m], layer.state_mean, layer.state_std), value(ids[m]))) for m in range(M)]
        features = list(torch.cat((torch.stack(features), layer.sentence(torch.stack(features), torch.tensor([M]))), -1))
        tokens.append(list(zip(ids, features, zip([nothing, *features], [nothing, nothing, *features]))))
    sharp = [gnn.log_temperature[i].exp() * math.log(N + 2) / math.log(18) for i in range(H)]
    followed_any = said_any = False
    added, found, read = torch.zeros(H, config.key_dim), None, []          # read: (how much, episode, token)
    for hop in range(2):
        score = {(p, i): [float(sharp[i] * unit(head(layer.query_own, x[p], i) + head(layer.query_pool, pool, i) + added[i]) @ key)
                          for key in [*all_keys[:, i], unit(gnn.null_key[i])]] for p in (last, after) for i in range(H)}
        # 1. The best k by their keys.
        over_all = torch.tensor([score[last, i] for i in range(H)]).softmax(-1)
        torch.testing.assert_close(out.asked[hop][0].exp(), over_all, rtol=1e-3, atol=1e-4)
        candidates = over_all.mean(0)[:N].topk(k).indices.tolist()
        assert out.candidates[hop][0].tolist() == candidates
        # 2. Word by word: the most telling words of the question, and after them the tokens that the hop before read most.
        most_read = sorted(read, reverse=True)[:FOUND]
        words = sorted(asking, key=lambda t: -layer.match_weight[hop](x[t]).mean())[:WORDS]
        assert len(words) < len(asking)
        match, said = torch.zeros(H, N), {}                                # said: how like a token is to what the question says
        for i in range(H):
            telling = [layer.match_weight[hop](x[t])[i] for t in words] + [math.log(w + 1e-8) + layer.by_way[0](pool)[i] for w, _, _ in most_read]
            asks = [unit(head(layer.match_query[hop], x[t], i)) for t in words]
            like = lambda word, n: max(0.0, *(float(word @ unit(head(layer.match_key, f, i))) for _, f, _ in tokens[n]))
            for n in candidates:
                gates = torch.sigmoid(layer.lookback(nodes[n]) - 1).view(LOOKBACK, H)[:, i].tolist()
                said[i, n] = [max(0.0, *(float(word @ unit(head(layer.match_key, f, i))) for word in asks)) for _, f, _ in tokens[n]]
                also = [unit(head(layer.match_key, tokens[n][m][1], i)) for _, n, m in most_read]
                for weight, word in zip(torch.stack(telling).softmax(0), asks + also):
                    borrowed = [gates[b - 1] * like(word, n - b) for b in range(1, LOOKBACK + 1) if n >= b]
                    match[i, n] += weight * max([like(word, n), *borrowed])
        evidence = torch.zeros(H, N)
        for n in candidates:
            silenced = 0.0
            for j in candidates:
                if j > n:
                    alike = sum(all_keys[n, i] @ all_keys[j, i] for i in range(H)) / H
                    better = match.mean(0)[j] - match.mean(0)[n]
                    replaces = (similarity.fits * better + similarity.alike * alike + similarity.bias
                                + bounded(similarity.says(nodes[j])[0]) + bounded(similarity.says(nodes[n])[1]))
                    silenced += math.log(1 - torch.sigmoid(replaces))
            for i in range(H):
                evidence[i, n] = layer.log_match_temperature[i].exp() * (match[i, n] - layer.match_threshold[i]) + silenced
        among = lambda p, some: torch.stack([torch.tensor([score[p, i][n] + float(evidence[i, n]) for n in some] + [score[p, i][N]]).softmax(0)
                                             for i in range(H)])
        ranked = among(last, candidates)
        chosen = [candidates[c] for c in ranked.mean(0)[:k].topk(r).indices.tolist()]
        assert out.chosen[hop][0].tolist() == chosen
        # 3. These side by side with the question: what their tokens are read by, and how well they fit.
        told, fits = {}, torch.zeros(H, N)
        for n in chosen:
            meaning = torch.stack([unit(layer.meaning(f)) * config.reading_dim ** 0.5 for _, f, _ in tokens[n]])[None, None]
            asked_words, earlier = word_of(question.ids[0, asking].tolist()), [word_of([i for i, *_ in tokens[n - b]]).tolist() if n >= b else [] for b in range(1, LOOKBACK + 1)]
            said_before = torch.tensor([[word in words for words in earlier] for word in asked_words.tolist()])[None, None]
            said_any |= bool(said_before.any())
            told[n] = layer.understand(x[asking][None], torch.ones(1, len(asking), dtype=torch.bool), found[None] if hop else None,
                                       meaning, torch.ones(1, 1, meaning.shape[2], dtype=torch.bool), asked_words[None],
                                       word_of([i for i, *_ in tokens[n]])[None, None], said_before)[0, 0]
            fits[:, n] = layer.fits(told[n]).exp().mean(0).log()
        before = evidence.clone()
        for n in chosen:
            silenced = 0.0
            for j in chosen:
                if j > n:
                    alike = sum(all_keys[n, i] @ all_keys[j, i] for i in range(H)) / H
                    replaces = (layer.outdated.fits * (fits.mean(0)[j] - fits.mean(0)[n]) + layer.outdated.alike * alike + layer.outdated.bias
                                + bounded(layer.outdated.says(told[j].mean(0))[0]) + bounded(layer.outdated.says(told[n].mean(0))[1]))
                    silenced += math.log(1 - torch.sigmoid(replaces))
            evidence[:, n] = before[:, n] + fits[:, n] + silenced
        torch.testing.assert_close(out.ranked[hop][0].exp(), among(last, candidates), rtol=1e-3, atol=1e-4)
        begins, ends = ({n: torch.stack([layer.marks(t)[side] for t in told[n]]).softmax(0) for n in chosen} for side in (0, 1))
        part_of = {n: [float(begins[n][:m + 1].sum() * ends[n][m:].sum()) for m in range(len(told[n]))] for n in chosen}
        relative = lambda p: [max(LEAST, math.log(one / max(p))) for one in p]
        read = []
        # 4. and 5. Every position weighs these, and the tokens inside them.
        context = {p: torch.zeros(H, D) for p in (last, after)}
        for p in (last, after):
            shares = among(p, chosen)
            if hop == 1 or p == last:                                      # the first hop is the question's alone
                torch.testing.assert_close(out.weights[hop][0, p if hop else 0].exp(), shares, rtol=5e-3, atol=2e-3)
            for i in range(H):
                asks = unit(head(layer.token_query_own, x[p], i) + head(layer.token_query_pool[hop], pool, i))
                for c, n in enumerate(chosen):
                    own = [unit(head(layer.token_key_own, f, i) + sum(head(key, b, i) for key, b in zip(layer.token_key_before, before)))
                           for _, f, before in tokens[n]]
                    own = [unit(key + head(layer.understood_key, t, i)) for key, t in zip(own, told[n])]
                    inside = torch.stack([asks @ key for key in own])
                    around = [0.0] * NEAR + said[i, n] + [0.0] * NEAR
                    heard = [sum(layer.said_weight[hop, i, d] * around[m + d] for d in range(2 * NEAR + 1)) for m in range(len(inside))]
                    end = asks @ unit(layer.end_key[i])                     # behind the last token
                    inside = torch.cat((inside + torch.stack(heard), end[None])) * layer.log_token_temperature[i].exp()
                    # What stands behind what was just said, as far back as it does, to where the answer may have begun.
                    spoken = [NOTHING if t in asking else common for t in range(p + 1)]
                    again = [LEAST / 2 * (spoken[p - back - 1] != NOTHING and back < FOLLOWED - 1) for back in range(FOLLOWED)]
                    stands = [max([LEAST, *(max(LEAST, relative(begins[n].tolist())[m - back] + again[back]) / 2 ** back for back in range(min(FOLLOWED, m + 1))
                                            if all(spoken[p - j] == tokens[n][m - j][0] for j in range(back + 1)))]) for m in range(len(told[n]))]
                    over = max(LEAST, *(stand + out_ for stand, out_ in zip(stands, relative(ends[n].tolist()))))
                    follow = [LEAST, *stands[:-1], over]
                    followed_any |= hop == 1 and max(follow) > LEAST
                    first, any_ = layer.mark_query[hop](x[p]).view(H, 2)[i]
                    marks = [first * a + any_ * b for a, b in zip(relative(begins[n].tolist()), relative(part_of[n]))]
                    inside = inside + torch.tensor([*marks, 0.0])
                    if hop == 1:                                           # the first finds, the last one speaks
                        inside = inside + layer.goes_on(x[p])[i] * torch.tensor(follow)
                    inside = inside.softmax(0)
                    if p == last:
                        read += [[float(shares[i, c] * inside[m]) / H, n, m] for m in range(len(told[n]))]
                    values = [value(token) for token, _, _ in tokens[n]] + [value(layer.end)]
                    context[p][i] += shares[i, c] * sum(weight * v for weight, v in zip(inside, values))
                    if hop == 1:
                        M = len(inside) - 1
                        torch.testing.assert_close(out.end_weights[0, p, i, c], inside[-1], rtol=5e-3, atol=2e-3)
                        inside = inside[:-1]
                        torch.testing.assert_close(out.token_weights[0, p, i, c, :M], inside, rtol=5e-3, atol=2e-3)
                        assert out.token_ids[0, c].tolist() == [t for t, _, _ in tokens[n]] + [-1] * (graph.tokens.longest - M)
        if hop == 0:
            read = [(sum(w for w, *at in read if at == [n, m]), n, m) for n in chosen for m in range(len(told[n]))]
            found = context[last].mean(0)
            added = layer.hop_query[0](found).view(H, -1)
    assert followed_any and said_any
    for p in context:
        torch.testing.assert_close(out.context[0, p], context[p], rtol=5e-3, atol=5e-3)
    h = torch.randn(1, 1, D)
    delta = context[after].sum(0) @ layer.value_map * h.pow(2).mean().sqrt()
    added = layer.inject(h, out.context[:, after:after + 1], torch.tensor([[False]]))
    torch.testing.assert_close(added[0, 0], h[0, 0] + delta, rtol=5e-3, atol=5e-3)
    assert torch.equal(layer.inject(h, out.context[:, :1], torch.tensor([[True]])), h)


def test_followed_by_hand():
    """Catches a word that stands elsewhere too, what stands before it left out, a run across the question or past the episode's start,
    one that didn't begin where the answer may, and an end where nothing ends."""
    code = torch.tensor([[[3, 11, 3, 10, 9, 10, -1], [7, 3, 11, 5, -1, -1, -1]]])              # 3B3J9J, and another with 3B in it
    begins = torch.full(code.shape, LEAST)
    begins[0, 0, 0], begins[0, 1, 1] = 0.0, -4.0
    ends = torch.full(code.shape, LEAST)
    ends[0, 0, 5] = -1.0
    said = torch.tensor([[NOTHING] * (FOLLOWED - 1) + [NOTHING, 3, 11, 3, 10, 9, 10, 4]])
    out = followed(said, code, begins, ends)
    L = LEAST
    assert out.shape == (1, 8, 2, 8) and (out[0, 0] == L).all() and (out[0, 7] == L).all()     # nothing said; what stands nowhere
    assert out[0, 1, 0].tolist() == [L, 0, L, L, L, L, L, L] and out[0, 1, 1].tolist() == [L, L, -4, L, L, L, L, L]
    assert out[0, 2, 1].tolist() == [L, L, L, -2, L, L, L, L] and out[0, 4, 1].tolist() == [L] * 8           # said more of it: likelier; then not
    assert out[0, 3, 0].tolist() == [L, L / 2, L, 0, L, L, L, L]           # the second 3 is known by what stands before it
    assert out[0, 4, 0].tolist() == [L, L, L, L, 0, L, L, L]               # and the first J
    assert out[0, 6, 0].tolist() == [L, L, L, L, L, L, 0, -1]              # the last one: there the answer may end
    unmarked = followed(said, code, torch.full(code.shape, L), torch.zeros(code.shape))
    assert unmarked[0, 3, 0].tolist() == [L, L, L, L / 4, L, L, L, L / 4]             # the longest run counts, where nothing is marked
    long = torch.arange(20).view(1, 1, 20)
    run = followed(torch.arange(19).view(1, -1), long, torch.full((1, 1, 20), L), torch.full((1, 1, 20), L))
    assert run[0, -1, 0].tolist() == [L] * 19 + [L / 2 ** (FOLLOWED - 1), L]                   # no further back than this


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(marks=False), dict(reading_layers=0)])
def test_what_nobody_marked_begins_and_ends_anywhere(tmp_path, monkeypatch, options):
    """Catches begins and ends mixed up, and a first word that counts as much as a run."""
    model, seen = GemmaWithMemory.from_pretrained(toy_model(tmp_path, **options)), []
    model.add_to_memory(FACTS)
    monkeypatch.setattr(memory, "followed", lambda answer, ids, begins, ends: seen.append((begins, ends)) or followed(answer, ids, begins, ends))
    model.answer(QUESTIONS[0], max_new_tokens=2)
    assert seen and all((begins == LEAST / 2).all() and (ends == 0).all() for begins, ends in seen)


@torch.no_grad()
def test_what_was_said_is_followed_step_by_step_as_at_once(full):
    """Catches words of the answer that are forgotten from one step to the next, or counted twice where a step is run once more; and steps
    of several tokens, fewer and more than are followed."""
    layer = full.injection
    torch.nn.init.normal_(layer.goes_on.weight, std=0.1)
    layer.goes_on.bias.fill_(2.0)
    prompt, answer = full.prompt("Where does Maria live?"), full.tokenizer.encode(" Her brother is Tom. Ana works in Oslo.", bos=False)
    ids = torch.tensor([prompt + answer])
    asks = (torch.arange(ids.shape[1]) < len(prompt))[None]
    full._open()
    whole = full.gemma(ids, question_mask=asks, injection=layer)[0, len(prompt):]
    layer.goes_on.bias.fill_(0.0), layer.goes_on.weight.zero_()
    assert (full.gemma(ids, question_mask=asks, injection=layer)[0, len(prompt):] - whole).abs().max() > 1e-3
    torch.nn.init.normal_(layer.goes_on.weight, std=0.1), layer.goes_on.bias.fill_(2.0)
    whole = full.gemma(ids, question_mask=asks, injection=layer)[0, len(prompt):]
    for sizes in ([1] * len(answer), [2, 3] * len(answer), [FOLLOWED + 2] * len(answer)):
        cache, parts, at = KVCache(full.gemma.config, 1, 128, torch.float32, "cpu"), [], len(prompt)
        full.gemma(ids[:, :at], question_mask=asks[:, :at], cache=cache, injection=layer)
        while at < ids.shape[1]:
            step = ids[:, at:at + sizes.pop(0)]
            position, seen = cache.position.clone(), cache.seen.clone()
            if step.shape[1] == 1:                                         # one that is recorded or failed to compile runs again
                full.gemma(step, cache=cache, injection=layer)
                cache.position.copy_(position), cache.seen.copy_(seen)
            parts.append(full.gemma(step, cache=cache, injection=layer)[0])
            at += step.shape[1]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_a_prompt_each_position_asks_with_its_window(full):
    """Catches a window that is too long or ends elsewhere, padding that asks, and parts of 256 put together in the wrong order."""
    layer, T = full.injection, WINDOW + 9
    layer.view = full.memory_graph.view(layer)
    x = torch.randn(7, T, 2 * full.gemma.config.hidden_size)               # 7 * T > 256
    layer.speaking, layer.input_ids = torch.arange(T) >= torch.arange(7)[:, None], full.memory_graph.tokens.ids[torch.randint(len(full.memory_graph.tokens.ids), (7, T))]
    layer.understand.echo.normal_()
    context, heard = layer.read_everywhere(x)
    for row, t in ((0, 0), (0, WINDOW + 5), (3, 4), (6, T - 1), (6, 8)):
        window = slice(max(0, t - WINDOW + 1), t + 1)
        alone = layer.read(x[row:row + 1, t:t + 1], Question(*(each[row:row + 1, window] for each in (x, layer.speaking, layer.input_ids))), layer.view)
        torch.testing.assert_close(context[row, t], alone.context[0, 0], rtol=1e-4, atol=1e-4)
        assert bool(heard[row, t]) == (alone.ranked[-1][0, :, -1].exp().mean().item() < HUSHED)


@torch.no_grad()
def test_features_drop_out_while_training_alone(full):
    """Catches answers that differ from one time to the next, keys of dropped-out features that stay, and training without dropout."""
    full.injection.config = full.config = replace(full.config, dropout=0.5)
    ids, before = full.memory_graph.tokens.ids, full.recall(QUESTIONS[0])
    states = full.encode([full.token_ids(fact) for fact in FACTS])
    features = lambda: full.injection.features(ids, states)
    plain = features()
    assert torch.equal(features(), plain)
    full.train()
    dropped = features()
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(dropped[dropped != 0], 2 * plain[dropped != 0])
    full.recall(QUESTIONS[0])
    full.eval()
    assert torch.equal(features(), plain) and full.recall(QUESTIONS[0]) == before


@torch.no_grad()
def test_weights_of_the_candidates_stand_at_their_episodes(full):
    """Catches weights in the order of the candidates, or of another hop, and episodes that weigh without being one."""
    full.recall(QUESTIONS[2])
    reading = full.injection.reading
    for hop in range(full.config.hops):
        weights, candidates = full.weights(hop)[0], reading.candidates[hop][0].tolist()
        expected = dict(zip([*candidates, len(FACTS)], reading.ranked[hop][0].exp().mean(0).tolist()))
        assert weights.tolist() == pytest.approx([expected.get(n, 0.0) for n in range(len(FACTS) + 1)])
    assert len(candidates) == full.config.candidates < len(FACTS)
    assert torch.equal(full.weights(), full.weights(1)) and not torch.equal(full.weights(0), full.weights(1))


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
        if i == 1:                                                         # marks are heard after a step
            assert grads.keys() == {"injection." + name for name in memory}
            assert all(bool(g.abs().sum() > 0) and bool(g.isfinite().all()) for g in grads.values())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[name]) for name, p in full.gemma.named_parameters())
    assert all(p.grad is None for p in full.gemma.parameters())
    assert not any(torch.equal(p, memory[name]) for name, p in full.injection.named_parameters())


def test_episodes_told_before_training_follow_the_new_weights(full):
    """Catches keys of episodes or tokens that still come from the weights before training."""
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


OPTIONS = [dict(node_features="hidden"), dict(node_features="embedding"), dict(query="pooled"), dict(read="episode"), dict(graph=False),
           dict(hops=1), dict(hops=3), dict(time_edges=False), dict(similar_edges=False), dict(match=False), dict(match=False, read="episode"), dict(said=False),
           dict(cosine_keys=False), dict(identity_values=False), dict(chat=True), dict(candidates=99, readable=99), dict(readable=1),
           dict(candidates=1), dict(time_edges=False, similar_edges=False), dict(inject_after=4), dict(inject_after=1),
           dict(node_features="embedding", query="pooled", read="episode", match=False)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_end_to_end(folder, tmp_path, options):
    """Catches a choice of MemoryConfig that no longer adds, asks, forgets, trains, saves or loads."""
    small = dict(inject_after=2, heads=2, key_dim=16, token_key_dim=8, gat_dim=8, candidates=4, readable=2, null_threshold=1.0, value_scale=1.0)
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
    model.train()
    model.injection.load_state_dict(again.injection.state_dict())          # both as rounded by saving
    model.eval()                                                           # keys are made anew
    again.add_to_memory(model.memory_graph.texts)
    assert again.answer(QUESTIONS, max_new_tokens=6) == model.answer(QUESTIONS, max_new_tokens=6)


# ------------------------------------------------------------------------------------------------------------- saving

def test_saved_and_loaded_gives_the_same_answers(full, tmp_path):
    """Catches a tensor or setting that isn't saved, rounding beyond eight bits, and episodes written to disk."""
    full.trained = {"steps": 3}
    for p in full.trainable_parameters():
        p.data += 0.01 * torch.rand_like(p)                                # nothing that eight bits hold exactly
    full.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]
    again = GemmaWithMemory.from_pretrained(tmp_path)
    assert again.config == full.config and again.trained == full.trained and len(again.memory_graph) == 0
    saved, mine, loaded = load_file(tmp_path / "memory.safetensors"), full.injection.state_dict(), again.injection.state_dict()
    rounded = blocks.packed(mine)
    assert saved.keys() == rounded.keys() and mine.keys() == loaded.keys()
    for name, tensor in blocks.unpacked(rounded).items():
        assert torch.equal(loaded[name], tensor) and torch.equal(saved[name], rounded[name])
    again.add_to_memory(FACTS)
    full.injection.load_state_dict(loaded)
    assert again.answer(QUESTIONS, max_new_tokens=12) == full.train().eval().answer(QUESTIONS, max_new_tokens=12)
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
    damage(lambda s: s["memory"].update(heads=4)), damage(lambda s: s["memory"].update(hops=0)), damage(lambda s: s["memory"].update(dropout=1.5)), damage(lambda s: s["memory"].update(query="half")),
    damage(lambda s: s["memory"].update(similar_edges=3)), damage(lambda s: s["memory"].update(readable=0)), damage(lambda s: s["memory"].update(match=False)),
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
