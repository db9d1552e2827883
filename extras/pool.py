"""What a memory is trained on: sentences, questions and ordinary text that the frozen layers have read once.

Everything below the injection layer is frozen, so its output never changes: a large *pool* is run through those layers
before training, and every step draws memories and questions from it. Designs that plug in elsewhere (variants/) use the
same pool, with states of another layer or none.

Letters as in memory.py, and P bundles of the pool (a bundle is a few sentences that belong together, see data_gen.py),
F sentences and Q questions of a bundle at most.
"""

import itertools
import multiprocessing
import re
import signal
import zlib
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data_gen import KINDS, World, open_vocabulary
from extras.memory_model import question_prompt
from gemma import BOS, PAD, InputError, Places, Tokenizer
from memory import TokenStore, node_features

TEXT = len(KINDS)                       # the kind of a sequence that is ordinary text
HARD = {KINDS.index(kind) for kind in ("list", "update", "unanswerable")}      # what a memory learns last
LONGEST = 8                             # sentences of a bundle; the one in 200 that is longer would not fit into the smallest memories


def answer_tokens(tokenizer, facts, answer):
    """The tokens of an answer as the facts that hold it spell them, so that it can be copied token by token.

    The same word has other tokens after a space than after a quote or at the start of a sentence ("▁Weller", "Well|er"): a
    memory can return what it stored, not what it would have stored. facts: token ids of the one fact with the answer, or of
    the two that hold "A and B". Where its tokens don't begin and end with the answer's, it is encoded anew.
    """
    places = answer_places(tokenizer, facts, answer)
    if None in places:
        return tokenizer.encode(" " + answer, bos=False)
    first, *rest = (fact[start + 1:stop + 1] for fact, (start, stop) in zip(facts, places))
    for second in rest:
        if not tokenizer.pieces.id_to_piece(second[0]).startswith("\u2581"):
            second = tokenizer.encode(" " + tokenizer.decode(second), bos=False)
        first = first + tokenizer.encode(" and", bos=False) + second
    return first


def answer_places(tokenizer, facts, answer):
    """Where the facts (token ids with <bos>) hold an answer, or of two each its part of it: for each (start, stop), of its tokens
    without <bos>, or None where none spell it."""
    if len(facts) == 1:
        return [spelled(tokenizer, facts[0], answer)]
    for at in re.finditer(" and ", answer):
        places = [spelled(tokenizer, fact, part) for fact, part in zip(facts, (answer[:at.start()], answer[at.end():]))]
        if None not in places:
            return places
    return [None, None]


def spelled(tokenizer, fact, words, cased=True):
    """Which tokens of a fact, counted without <bos>, spell `words`, with a space before them if it is there: (start, stop); None if no
    tokens do exactly that. cased: False where `words` are in small letters, whatever the fact's are."""
    pieces = [tokenizer.pieces.id_to_piece(i).replace("\u2581", " ") for i in fact[1:]]
    pieces = pieces if cased else [piece.lower() for piece in pieces]
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    text, at = "".join(pieces), -1
    while (at := text.find(words, at + 1)) >= 0:
        stop = at + len(words)
        for start in (at - 1, at):
            if stop in ends and start in ends and text[start:at] in ("", " "):
                return ends.index(start), ends.index(stop)
    return None


def draw_part(task):
    """Some bundles as token ids: list of (facts, follows, [(prompt, answer, support, kind, marks)], hashes of two subjects)."""
    path, chat, split, phrasings, open_words, tokens, seed, n = task
    tokenizer = Tokenizer(path)
    newline = tokenizer.encode("\n", bos=False)
    world = World(split, seed, open_vocabulary(tokenizer) if open_words else (), phrasings)
    part = []
    for bundle in (world.bundle() for _ in range(n)):
        facts, asked = [tokenizer.encode(f) for f in bundle.facts], []
        for q in bundle.questions:
            prompt = question_prompt(tokenizer, q.question, chat)
            holding = q.support if q.kind == "list" else q.support[-1:]
            answer = answer_tokens(tokenizer, [facts[i] for i in holding], q.answer) + newline if q.support else []
            places = answer_places(tokenizer, [facts[i] for i in holding], q.answer) if q.support else []
            if len(q.support) > len(places):        # by way of somebody, whom the first fact names
                third = [name for name in bundle.subjects if name not in q.question.lower()]
                places.insert(0, spelled(tokenizer, facts[q.support[0]], third[0], cased=False) if len(third) == 1 else None)
            if len(prompt) + len(answer) <= tokens:
                asked.append((prompt, answer, q.support, KINDS.index(q.kind), [(place[0], place[1] - 1) if place else (-1, -1) for place in places]))
        if asked and len(facts) <= LONGEST and max(map(len, facts)) <= 1.6 * tokens:
            subjects = [zlib.crc32(s.encode()) for s in sorted(bundle.subjects)] or [zlib.crc32(bundle.facts[0].encode())]
            part.append((facts, bundle.follows, asked, (subjects[0], subjects[-1])))
    return part


class Pool:
    """Bundles of one split with their frozen states: what a batch is drawn from. Lives on the model's device."""

    def __init__(self, model, split, P, tokens, seed, open_words=True, phrasings=None, texts=0, hard=1.0, draw=map, progress=True, layers=None):
        """texts: how many pieces of ordinary text to add, written by the base itself; hard: how often a hard question is drawn against
        an easy one (see HARD; which of several values of a sentence is meant is hard too); draw: a map of one or more processes;
        layers: up to which sentences and questions are run, 0 for not at all; default: to where the graph memory plugs in."""
        device = model.gemma.device
        parts = max(1, min(64, P // 500))              # each with a seed of its own: the number of workers changes nothing
        tasks = [(model.tokenizer.path, model.config.chat, split, phrasings, open_words, tokens, seed * 1000 + i, P // parts) for i in range(parts)]
        facts, sequences, weights, self.bundles = [], [], [], []
        for part in tqdm(draw(draw_part, tasks), desc=f"drawing {split} sentences", unit="part", total=parts, disable=not progress, leave=False):
            for fact_ids, follows, asked, subjects in part:
                self.bundles.append((range(len(facts), len(facts) + len(fact_ids)), follows,
                                     range(len(sequences), len(sequences) + len(asked)), subjects))
                facts += fact_ids
                sequences += asked
                answers = defaultdict(set)                                 # of the sentence that answers: all that it does
                for _, answer, support, *_ in asked:
                    answers[tuple(support[-1:])].add(tuple(answer))
                weights += [hard if kind in HARD or len(answers[tuple(support[-1:])]) > 1 else 1.0 for _, _, support, kind, _ in asked]
        if not self.bundles:
            raise InputError(f"expected sentences and questions of at most --tokens {tokens} tokens, but none of {P} bundles fit; give more --tokens, or more --bundles.")
        self.asked = len(sequences)
        sequences += [(ids, [], [], TEXT, []) for ids in ordinary_text(model, texts, tokens, seed)]
        P, F_ = len(self.bundles), max(len(b[0]) for b in self.bundles)
        Q = max(len(b[2]) for b in self.bundles)
        fill = lambda rows, width: torch.tensor([list(r) + [-1] * (width - len(r)) for r in rows], device=device)
        self.facts_of = fill([b[0] for b in self.bundles], F_)                                 # (P, F) or -1
        self.follows = fill([[int(x) for x in b[1]] for b in self.bundles], F_) == 1
        self.questions_of = fill([b[2] for b in self.bundles], Q)                              # (P, Q) or -1
        self.subjects = torch.tensor([b[3] for b in self.bundles], device=device)              # (P, 2) hashes
        self.support = fill([s[2][:2] for s in sequences], 2)                                  # (all, 2) slots of the bundle or -1
        self.marks = torch.tensor([[*s[4][:2], *[(-1, -1)] * 2][:2] for s in sequences], device=device)      # (all, 2, 2) first and last token in each, or -1
        self.kind = torch.tensor([s[3] for s in sequences], device=device)
        self.prompt_length = torch.tensor([len(s[0]) for s in sequences], device=device)
        self.longest = max(len(s[0]) for s in sequences)                                       # tokens of a prompt
        self.weight = torch.tensor(weights + [1.0] * (len(sequences) - self.asked) + [0.0], device=device)      # the last: of no question
        # Sentences without <bos>, questions with it: the layers above attend to it.
        below = layers or (model.config.inject_after,) * 2
        self.facts = self.encode(model, facts, 1, progress, below[0])
        self.nodes = self.node_features(model) if layers is None else None
        self.sequences = self.encode(model, [p + a for p, a, *_ in sequences], 0, progress, below[1])

    @staticmethod
    @torch.no_grad()
    def encode(model, rows, skip, progress, last):
        """Run token ids through the layers up to `last`. Returns a TokenStore, the first `skip` tokens left out, with the
        states (all, D) in the place of keys: none if `last` is 0."""
        device, config = model.gemma.device, model.gemma.config
        lengths = torch.tensor([len(r) - skip for r in rows], device=device)
        ids = torch.tensor([t for r in rows for t in r[skip:]], device=device)
        store = TokenStore(ids, torch.empty(len(ids) if last else 0, config.hidden_size, dtype=model.gemma.dtype, device=device), lengths)
        if not last:
            return store
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = 2048 if device.type == "cuda" else 128
        for start in tqdm(range(0, len(order), size), desc="frozen layers", unit="batch", disable=not progress, leave=False):
            batch = order[start:start + size]
            T = len(rows[batch[-1]])
            padded = torch.tensor([rows[i] + [PAD] * (T - len(rows[i])) for i in batch], device=device)
            real = torch.arange(T, device=device) < torch.tensor([len(rows[i]) for i in batch], device=device)[:, None]
            h = model.gemma.run_layers(model.gemma.embed(padded), Places(config, *padded.shape, real, None, device),
                                       1, last)
            place = (store.starts[torch.tensor(batch, device=device)][:, None] - skip + torch.arange(T, device=device))
            keep = real & (torch.arange(T, device=device) >= skip)
            store.keys[place[keep]] = h[keep]
        return store

    def node_features(self, model):
        """(facts, D): GemmaWithMemory.node_features for all sentences at once."""
        lengths = self.facts.lengths
        owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        total = torch.zeros(len(lengths), model.injection.gnn.mean.shape[0], device=lengths.device)
        for start in range(0, len(owner), 1 << 18):    # a part at a time: all tokens' features at once would be as large again
            at = slice(start, start + (1 << 18))
            embeddings = F.embedding(self.facts.ids[at], model.gemma.embed_tokens.weight)
            total.index_add_(0, owner[at], node_features(model.config, self.facts.keys[at], embeddings))
        return total / lengths[:, None]

    def set_statistics(self, model):
        """Save in the memory what states and nodes look like on average (buffers, not trained)."""
        injection = model.injection
        some = self.facts.keys[:: max(1, len(self.facts.keys) // 100_000)].float()
        injection.state_mean.copy_(some.mean(0)), injection.state_std.copy_(some.std(0) + 1e-6)
        injection.gnn.mean.copy_(self.nodes.mean(0)), injection.gnn.std.copy_(self.nodes.std(0) + 1e-6)

    def draw(self, G, R, N, unknown, text, generator):
        """G memories of at most N sentences, R questions (R / G to each memory). Returns a dict of tensors.

        Bundles are drawn until N is full; their sentences are shuffled into each other, but each bundle's own order stays,
        and a sentence that must follow another does. A share of questions comes from bundles outside (`unknown`), another is
        ordinary `text`; for both, and for unanswerable ones, the target is the null episode.
        """
        device, F_ = self.facts_of.device, self.facts_of.shape[1]
        rand = lambda *shape: torch.rand(*shape, generator=generator, device=device, dtype=torch.float64)
        pick = lambda n, *shape: (rand(*shape) * n).long()
        per_bundle = (self.facts_of >= 0).sum(1)
        picked = pick(len(self.facts_of), G, N // 2 + 2)                                       # (G, B) bundles
        size = per_bundle[picked]
        limit = N - pick(N // 2 + 1, G, 1)                                                     # memories differ in size
        who = self.subjects[picked]                                                            # (G, B, 2)
        same = (who[:, :, None, :, None] == who[:, None, :, None, :]).any(-1).any(-1)          # (G, B, B): about the same person
        size = size * ~same.tril(-1).any(2)                                                    # a person is told about once
        kept = (size.cumsum(1) <= limit.clamp(min=F_)) & (size > 0)
        kept[:, 0] = True
        # Where each sentence stands: random moments, sorted within the bundle; one that follows comes right after.
        moment = rand(*picked.shape, F_).sort(-1).values
        for f in range(1, F_):
            moment[..., f] = torch.where(self.follows[picked][..., f], moment[..., f - 1] + 1e-9, moment[..., f])
        facts = self.facts_of[picked]
        moment = moment.masked_fill((facts < 0) | ~kept[..., None], torch.inf).flatten(1)
        order = moment.argsort(1)
        place = order.argsort(1)                                                               # slot -> row of the memory
        order = order[:, :N]
        valid = moment.gather(1, order).isfinite()
        episodes = facts.flatten(1).gather(1, order).clamp(min=0)

        # Questions: of a bundle that is in the memory, or (unknown) of one that is not.
        S = R // G
        slot = torch.multinomial(self.weight[self.questions_of[picked]].sum(-1) * kept, S, replacement=True, generator=generator)        # (G, S)
        outside = rand(G, S) < unknown
        elsewhere = pick(len(self.facts_of), G, S)
        heard_of = self.subjects[elsewhere][:, :, None, :, None] == who[:, None, :, None, :]   # (G, S, B, 2, 2)
        outside &= ~(heard_of.any(-1).any(-1) & kept[:, None]).any(2)                          # about somebody told of here: no stranger
        bundle = torch.where(outside, elsewhere, picked.gather(1, slot))
        questions = self.questions_of[bundle]
        which = torch.multinomial(self.weight[questions].flatten(0, 1), 1, generator=generator)                # (G * S, 1)
        sequence = questions.flatten(0, 1).gather(1, which).view(G, S)
        if text and len(self.kind) > self.asked:
            is_text = rand(G, S) < text
            sequence = torch.where(is_text, self.asked + pick(len(self.kind) - self.asked, G, S), sequence)
            outside = outside | is_text
        support = self.support[sequence]                                                       # (G, S, 2) slots
        known = (support >= 0) & ~outside[..., None]
        rows = place.gather(1, (slot[..., None] * F_ + support.clamp(min=0)).flatten(1)).view(G, S, 2)
        told, rows = rows < valid.shape[1], rows.clamp(max=valid.shape[1] - 1)                 # the smallest memories cut a bundle short
        told &= valid.gather(1, rows.flatten(1)).view(G, S, 2)
        known &= (told | (support < 0)).all(-1, keepdim=True)                                  # half of what an answer needs is no answer
        return dict(episodes=episodes, valid=valid, sequence=sequence.flatten(), kind=self.kind[sequence].flatten(),
                    support=rows.flatten(0, 1), known=known.flatten(0, 1), marks=self.marks[sequence.flatten()])

    def pairs(self, R, generator):
        """R questions, each with a memory of two sentences of its own bundle at most, those that answer it among them. Returns a dict of
        tensors as `draw` does.

        To read a sentence aright, and to tell it from what else is told of the same person, is most of what a memory has to learn, and
        there it is cheap: nothing has to be found first, and little else is read. Where one sentence answers, or none, the others are
        drawn, but for what stands before a "she", which is who she is; and a "she" without it, who would be somebody else.
        """
        sequence = torch.multinomial(self.weight[:self.asked], R, replacement=True, generator=generator)
        bundle = torch.searchsorted(self.questions_of[:, 0].contiguous(), sequence, right=True) - 1
        facts, follows, support = self.facts_of[bundle], self.follows[bundle], self.support[sequence]      # (R, F), (R, F), (R, 2) slots or -1
        known, slot = support >= 0, torch.arange(facts.shape[1], device=facts.device)
        needed = (slot == support[..., None]).any(1)                                           # (R, F)
        behind, before = F.pad(needed, (1, -1)), F.pad(needed & follows, (-1, 1))              # what stands next after these; and before, of a "she"
        rank = torch.rand(facts.shape, generator=generator, device=facts.device) + 2 * before + 4 * needed
        rank = rank.masked_fill((facts < 0) | follows & ~(needed | before | behind), -1.0)
        best, slots = F.pad(rank, (0, 1), value=-1.0).topk(2)                                  # even of a bundle of one
        slots = slots.masked_fill(best < 0, LONGEST).sort(dim=1).values                        # in the order they were told, and what isn't there last
        valid = slots < LONGEST
        episodes = torch.where(valid, facts.gather(1, slots.clamp(max=facts.shape[1] - 1)), self.facts.lengths.argmin())   # where there is no second, the least work
        return dict(episodes=episodes, valid=valid, sequence=sequence, kind=self.kind[sequence], known=known,
                    support=(slots[:, None] == support[..., None]).byte().argmax(2), marks=self.marks[sequence])

    def questions(self, batch, T):
        """The questions of a drawn batch with their answers, cut to T tokens: an Asked."""
        sequence, store = batch["sequence"], self.sequences
        offset = torch.arange(T, device=sequence.device)
        place = (store.starts[sequence][:, None] + offset).clamp(max=len(store.ids) - 1)
        real = offset < store.lengths[sequence][:, None]                                       # (R, T)
        prompt = self.prompt_length[sequence]
        spoken = real & (offset > 0)                                                           # all but <bos>
        # The next token is the answer's; where the memory can't know it, nothing is to be said.
        answering = F.pad(real[:, 1:] & (offset[1:] >= prompt[:, None]) & batch["known"].any(1)[:, None], (0, 1))
        return Asked(store.ids[place], place, real, spoken, spoken & (offset < prompt[:, None]), answering, self.longest)


@dataclass
class Asked:
    """R questions and their answers, padded on the right."""

    ids: torch.Tensor                # (R, T)
    place: torch.Tensor              # (R, T) where they stand in the pool's sequences
    real: torch.Tensor               # (R, T) no padding
    spoken: torch.Tensor             # (R, T) no padding and no <bos>
    question: torch.Tensor           # (R, T) the prompt, without <bos>
    answering: torch.Tensor          # (R, T) positions whose next token is the answer's
    longest: int                     # tokens of the pool's longest prompt

    def answers(self, gemma, h):
        """Logits where the answer is spoken, of the last layer's states h (R, T, D), with their targets and where they stand."""
        row, position = self.answering.nonzero().unbind(1)                                     # (answer tokens,) each
        return dict(logits=gemma.logits(h[row, position]), targets=self.ids[row, position + 1], row=row, position=position)


def pools(model, settings, progress=True, **options):
    """(training pool, held-out pool) as train.py's settings say; options as of Pool."""
    # Ctrl-C is this process's to hear: its workers would each print a traceback.
    spawn = lambda: multiprocessing.get_context("spawn").Pool(settings.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with spawn() if settings.workers else nullcontext() as workers:
        options.update(draw=workers.imap if workers else map, progress=progress)
        return (Pool(model, "train", settings.bundles, settings.tokens, settings.seed, settings.open_words,
                     texts=min(4096, settings.bundles // 8), hard=settings.hard, **options),
                Pool(model, "validation", max(200, settings.bundles // 20), settings.tokens, settings.seed + 1, **options))


@torch.no_grad()
def ordinary_text(model, n, length, seed):
    """n pieces of text that the base itself writes, as token ids: what it finds ordinary, the memory should leave alone."""
    rows = []
    generator = torch.Generator().manual_seed(seed)
    most = 1024 if model.gemma.device.type == "cuda" else 256
    for start in range(0, n, most):
        size = min(most, n - start)
        ids = torch.full((size, 1), BOS, device=model.gemma.device)
        ids = model.gemma.generate(ids, max_new_tokens=length - 1, temperature=1.0, top_p=0.98, stop=(), seed=seed + start)
        cuts = torch.randint(4, length, (size,), generator=generator).tolist()
        rows += [row[:cut] for row, cut in zip(ids.tolist(), cuts)]
    return rows


# ----------------------------------------------------------------------------------------------------- right or wrong

def wanted(batch, hop, hops, N):
    """Which episodes a hop should attend to, (R, N + 1) bool, null last.

    A question of two hops needs the first fact first and the second last; all others need all their facts at every hop.
    """
    two_hop = batch["kind"] == KINDS.index("two_hop")
    turn = torch.stack([~two_hop if not of_this else torch.ones_like(two_hop) for of_this in (hop == 0 and hops > 1, hop == hops - 1)], 1)
    needed = batch["known"] & turn                                                             # (R, 2)
    target = (F.one_hot(batch["support"], N + 1).bool() & needed[..., None]).any(1)
    target[:, -1] = ~needed.any(1)
    return target


@torch.no_grad()
def judged(batch, out, first, null):
    """Per row: whether the whole answer is right (greedy decoding would give it), whether the right episode came first, and
    the null weight. first (R,): the episode that did, a row of the memory; null (R,)."""
    right = torch.ones(len(batch["known"]), dtype=torch.long, device=out["row"].device)
    right.scatter_reduce_(0, out["row"], (out["logits"].argmax(-1) == out["targets"]).long(), "amin")
    last = batch["known"].long().sum(1) - 1                                                    # the fact with the answer is listed last
    either = (first[:, None] == batch["support"]) & batch["known"]
    is_list = batch["kind"] == KINDS.index("list")
    found = torch.where(is_list, either.any(1), either.gather(1, last.clamp(min=0)[:, None])[:, 0])
    return right.bool(), found, null


@torch.no_grad()
def summary(model, pool, settings, score, sizes=(16, 64), questions=512, seed=1):
    """Held-out exact match, right episode first, and null weights, as a dict per memory size and kind. score: a drawn batch
    -> what `judged` returns."""
    result = {}
    for N in sizes:
        generator = torch.Generator(model.gemma.device).manual_seed(seed)
        right, found, null, kind, known = [], [], [], [], []
        R = min(settings.batch, 128)
        for _ in range(max(1, questions // R)):
            batch = pool.draw(max(1, R // 8), R, N, 0.1, 0.0, generator)
            with autocast(model):
                for values, value in zip((right, found, null), score(batch)):
                    values.append(value)
            kind.append(batch["kind"]), known.append(batch["known"].any(1))
        right, found, null, kind, known = map(torch.cat, (right, found, null, kind, known))
        mean = lambda x: round(x.float().mean().item(), 4) if len(x) else None
        result[N] = dict(recall=mean(right[known]), first=mean(found[known]), refused=mean(null[~known] > 0.5),
                         refused_wrongly=mean(null[known] > 0.5),
                         **{name: mean(right[known & (kind == i)]) for i, name in enumerate(KINDS[:-1])})
    return result


def groups(R, N):
    """G, the number of memories a batch of R questions is divided among: fewer of large ones."""
    G = max(2, min(R // 8, 8192 // N))
    while R % G:
        G -= 1
    return G


def autocast(model):
    device = model.gemma.device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
