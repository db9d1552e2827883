"""Train a memory on a frozen Gemma:  python train.py            (the tiny model, CPU, a few minutes)
                                      python train.py --model google/gemma-3-1b-it --out out/1b
                                      torchrun --nproc_per_node=4 train.py --accumulate 4 …      (one process a GPU)

Everything below the injection layer is frozen, so its output never changes: a large *pool* of sentences, questions and
ordinary text is run through layers 1..8 once, and every training step draws memories and questions from the pool. A step
then runs the graph network, the injection and the layers above, forward and backward, with logits at answer positions only.

A batch is G memories of up to N episodes with R / G questions each; nothing loops over it. Three losses:
  * cross-entropy on the answer's tokens,
  * retrieval: minus the log of the attention on the episodes that hold the answer, or on the null episode where none does,
  * copying: minus the log of the attention on the tokens, inside those episodes, that the answer goes on with.

Letters as in memory.py, and P bundles of the pool (a bundle is a few sentences that belong together, see data_gen.py),
F sentences and Q questions of a bundle at most.
"""

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch loads: threads that spin starve one another on busy cores

import torch
import torch.nn.functional as F
from torch import distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data_gen import KINDS, World, open_vocabulary
from gemma import BOS, PAD, InputError, Places, Tokenizer, check_device, replacing
from memory import GemmaWithMemory, MemoryConfig, MemoryView, Question, TokenStore, node_features, question_prompt

TEXT = len(KINDS)                       # the kind of a sequence that is ordinary text


@dataclass
class TrainConfig:
    """How to train; each field is an option of the command line."""

    variant: str = field(default="graph", metadata={"help": "the design of the memory; graph is the only one so far"})
    model: str = field(default="tiny", metadata={"help": "the base: tiny, gemma-3-270m, a folder, or a Hub id"})
    out: str = field(default="out/memory", metadata={"help": "folder for the trained memory, its checkpoint and log"})
    steps: int = field(default=170, metadata={"help": "optimizer steps"})
    minutes: float = field(default=0.0, metadata={"help": "end after so many minutes of training if the steps are not done by then; 0: never"})
    batch: int = field(default=128, metadata={"help": "R: questions a step"})
    accumulate: int = field(default=1, metadata={"help": "batches whose gradients are added up to one step; several processes share them out"})
    bundles: int = field(default=4000, metadata={"help": "P: bundles of sentences and questions in the pool"})
    facts: int = field(default=32, metadata={"help": "the largest memory in training; memories grow up to it"})
    lr: float = field(default=2e-3, metadata={"help": "highest learning rate of AdamW"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW, on matrices"})
    warmup: int = field(default=50, metadata={"help": "steps of linear warm-up; cosine decay follows"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    retrieval: float = field(default=0.3, metadata={"help": "weight of the retrieval loss"})
    copying: float = field(default=0.5, metadata={"help": "weight of the copying loss"})
    unknown: float = field(default=0.1, metadata={"help": "share of questions about somebody the memory never heard of"})
    text: float = field(default=0.06, metadata={"help": "share of rows that are ordinary text, for which the memory is to be silent"})
    tokens: int = field(default=40, metadata={"help": "T: longest question with its answer, longer ones are left out; sentences may be 1.6 times as long"})
    open_words: bool = field(default=True, metadata={"help": "values from the whole vocabulary; without them the memory learns to classify, not to copy"})
    eval_every: int = field(default=85, metadata={"help": "steps between evaluations on held-out people and values"})
    seed: int = field(default=0, metadata={"help": "of every random draw"})
    device: str = field(default="", metadata={"help": "cpu, cuda, mps; default: a GPU if there is one"})
    workers: int = field(default=0, metadata={"help": "processes that draw the pool's sentences; 0: this one"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the layers above the injection"})
    init: str = field(default="", metadata={"help": "folder of a trained memory to start from, with a fresh optimizer; default: from nothing"})
    resume: bool = field(default=False, metadata={"help": "go on from the checkpoint in --out"})


    def check(self):
        """Raise InputError for settings that can't be trained with."""
        if self.variant != "graph":
            raise InputError(f"expected --variant graph, got {self.variant!r}; it is the only one so far.")
        for name, least in dict(steps=1, batch=8, accumulate=1, bundles=1, facts=8, eval_every=1, tokens=16, workers=0, warmup=0, minutes=0,
                                lr=0, weight_decay=0, clip=0, retrieval=0, copying=0, unknown=0, text=0).items():
            if not getattr(self, name) >= least:
                raise InputError(f"expected --{name.replace('_', '-')} of at least {least}, got {getattr(self, name)}.")
        if self.accumulate % processes():
            raise InputError(f"expected --accumulate to be a multiple of the {processes()} processes, which share these batches out, got {self.accumulate}.")
        if self.unknown + self.text > 1:
            raise InputError(f"expected --unknown and --text to be shares of the questions, got {self.unknown} and {self.text}.")
        out = Path(self.out)
        if out.exists() and not out.is_dir():
            raise InputError(f"expected a folder as --out, got the file {out}; name another.")
        if self.init and not (Path(self.init) / "memory.json").is_file():
            raise InputError(f"expected a folder that save_pretrained wrote as --init, got {self.init!r}, which holds no memory.json.")
        if self.resume and not (out / "checkpoint.safetensors").is_file():
            raise InputError(f"{out}: expected a checkpoint to resume from, but there is none; train without --resume first.")


def processes():
    """How many processes train together: what torchrun says, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------------------------------------ pool

def answer_tokens(tokenizer, facts, answer):
    """The tokens of an answer as the facts that hold it spell them, so that it can be copied token by token.

    The same word has other tokens after a space than after a quote or at the start of a sentence ("▁Weller", "Well|er"): a
    memory can return what it stored, not what it would have stored. facts: token ids of the one fact with the answer, or of
    the two that hold "A and B". Where its tokens don't begin and end with the answer's, it is encoded anew.
    """
    if len(facts) == 2:
        for at in re.finditer(" and ", answer):
            first, second = (spelled(tokenizer, fact, part) for fact, part in zip(facts, (answer[:at.start()], answer[at.end():])))
            if first and second:
                second = second if tokenizer.pieces.id_to_piece(second[0]).startswith("\u2581") else tokenizer.encode(" " + answer[at.end():], bos=False)
                return first + tokenizer.encode(" and", bos=False) + second
        return tokenizer.encode(" " + answer, bos=False)
    return spelled(tokenizer, facts[0], answer) or tokenizer.encode(" " + answer, bos=False)


def spelled(tokenizer, fact, words):
    """Those tokens of a fact that spell `words`, with a space before them if it is there; None if no tokens do exactly that."""
    pieces = [tokenizer.pieces.id_to_piece(i).replace("\u2581", " ") for i in fact[1:]]
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    text, at = "".join(pieces), -1
    while (at := text.find(words, at + 1)) >= 0:
        stop = at + len(words)
        for start in (at - 1, at):
            if stop in ends and start in ends and text[start:at] in ("", " "):
                return fact[1 + ends.index(start):1 + ends.index(stop)]
    return None


def draw_part(task):
    """Some bundles as token ids: list of (facts, follows, [(prompt, answer, support, kind)], hashes of two subjects)."""
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
            if len(prompt) + len(answer) <= tokens:
                asked.append((prompt, answer, q.support, KINDS.index(q.kind)))
        if asked and max(map(len, facts)) <= 1.6 * tokens:
            subjects = [zlib.crc32(s.encode()) for s in sorted(bundle.subjects)] or [zlib.crc32(bundle.facts[0].encode())]
            part.append((facts, bundle.follows, asked, (subjects[0], subjects[-1])))
    return part


class Pool:
    """Bundles of one split with their frozen states: what a batch is drawn from. Lives on the model's device."""

    def __init__(self, model, split, P, tokens, seed, open_words=True, phrasings=None, texts=0, draw=map, progress=True):
        """texts: how many pieces of ordinary text to add, written by the base itself; draw: a map of one or more processes."""
        device = model.gemma.device
        parts = max(1, min(64, P // 500))              # each with a seed of its own: the number of workers changes nothing
        tasks = [(model.tokenizer.path, model.config.chat, split, phrasings, open_words, tokens, seed * 1000 + i, P // parts) for i in range(parts)]
        facts, sequences, self.bundles = [], [], []
        for part in tqdm(draw(draw_part, tasks), desc=f"drawing {split} sentences", unit="part", total=parts, disable=not progress, leave=False):
            for fact_ids, follows, asked, subjects in part:
                self.bundles.append((range(len(facts), len(facts) + len(fact_ids)), follows,
                                     range(len(sequences), len(sequences) + len(asked)), subjects))
                facts += fact_ids
                sequences += asked
        self.asked = len(sequences)
        sequences += [(ids, [], [], TEXT) for ids in ordinary_text(model, texts, tokens, seed)]
        P, F_ = len(self.bundles), max(len(b[0]) for b in self.bundles)
        Q = max(len(b[2]) for b in self.bundles)
        fill = lambda rows, width: torch.tensor([list(r) + [-1] * (width - len(r)) for r in rows], device=device)
        self.facts_of = fill([b[0] for b in self.bundles], F_)                                 # (P, F) or -1
        self.follows = fill([[int(x) for x in b[1]] for b in self.bundles], F_) == 1
        self.questions_of = fill([b[2] for b in self.bundles], Q)                              # (P, Q) or -1
        self.subjects = torch.tensor([b[3] for b in self.bundles], device=device)              # (P, 2) hashes
        self.support = fill([s[2][:2] for s in sequences], 2)                                  # (all, 2) slots of the bundle or -1
        self.kind = torch.tensor([s[3] for s in sequences], device=device)
        self.prompt_length = torch.tensor([len(s[0]) for s in sequences], device=device)
        # Sentences without <bos>, questions with it: the layers above attend to it.
        self.facts = self.encode(model, facts, 1, progress)
        self.nodes = self.node_features(model)
        self.sequences = self.encode(model, [p + a for p, a, *_ in sequences], 0, progress)

    @staticmethod
    @torch.no_grad()
    def encode(model, rows, skip, progress):
        """Run token ids through the layers up to the injection. Returns a TokenStore, the first `skip` tokens left out, with
        the states (all, D) in the place of keys."""
        device, config = model.gemma.device, model.gemma.config
        lengths = torch.tensor([len(r) - skip for r in rows], device=device)
        ids = torch.tensor([t for r in rows for t in r[skip:]], device=device)
        store = TokenStore(ids, torch.empty(len(ids), config.hidden_size, dtype=model.gemma.dtype, device=device), lengths)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = 2048 if device.type == "cuda" else 128
        for start in tqdm(range(0, len(order), size), desc="frozen layers", unit="batch", disable=not progress, leave=False):
            batch = order[start:start + size]
            T = len(rows[batch[-1]])
            padded = torch.tensor([rows[i] + [PAD] * (T - len(rows[i])) for i in batch], device=device)
            real = torch.arange(T, device=device) < torch.tensor([len(rows[i]) for i in batch], device=device)[:, None]
            h = model.gemma.run_layers(model.gemma.embed(padded), Places(config, *padded.shape, real, None, device),
                                       1, model.config.inject_after)
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
        slot = torch.multinomial(kept.float(), S, replacement=True, generator=generator)       # (G, S)
        outside = rand(G, S) < unknown
        elsewhere = pick(len(self.facts_of), G, S)
        heard_of = self.subjects[elsewhere][:, :, None, :, None] == who[:, None, :, None, :]   # (G, S, B, 2, 2)
        outside &= ~(heard_of.any(-1).any(-1) & kept[:, None]).any(2)                          # about somebody told of here: no stranger
        bundle = torch.where(outside, elsewhere, picked.gather(1, slot))
        questions = self.questions_of[bundle]
        which = (rand(G, S) * (questions >= 0).sum(-1)).long()
        sequence = questions.gather(2, which[..., None])[..., 0]
        if text and len(self.kind) > self.asked:
            is_text = rand(G, S) < text
            sequence = torch.where(is_text, self.asked + pick(len(self.kind) - self.asked, G, S), sequence)
            outside = outside | is_text
        support = self.support[sequence]                                                       # (G, S, 2) slots
        known = (support >= 0) & ~outside[..., None]
        rows = place.gather(1, (slot[..., None] * F_ + support.clamp(min=0)).flatten(1)).view(G, S, 2).clamp(max=valid.shape[1] - 1)
        known &= valid.gather(1, rows.flatten(1)).view(G, S, 2)
        return dict(episodes=episodes, valid=valid, sequence=sequence.flatten(), kind=self.kind[sequence].flatten(),
                    support=rows.flatten(0, 1), known=known.flatten(0, 1))


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


# ------------------------------------------------------------------------------------------------------------ step

def memories(model, pool, batch):
    """The MemoryView of a drawn batch: keys with gradient, from the pool's node features."""
    injection, valid = model.injection, batch["valid"]
    G, N = valid.shape
    facts = batch["episodes"].flatten()
    x = pool.nodes[facts]                                                                      # (G * N, D)
    # The tokens of these episodes alone, end to end: their keys are worked out once, however many questions read them.
    lengths = pool.facts.lengths[facts]
    owner = torch.arange(G * N, device=x.device).repeat_interleave(lengths)
    place = pool.facts.starts[facts][owner] + torch.arange(len(owner), device=x.device) - (lengths.cumsum(0) - lengths)[owner]
    ids = pool.facts.ids[place]
    tokens = TokenStore(ids, injection.token_keys(ids, pool.facts.keys[place], lengths), lengths)
    return MemoryView(injection.gnn.keys(x, *injection.edges(valid)).unflatten(0, (G, N)), x.view(G, N, -1),
                      valid, torch.arange(G * N, device=x.device).view(G, N), tokens)


def forward(model, pool, batch, T, silent=False):
    """One batch through graph, injection and the layers above. Returns what losses and scores are made of.

    silent: nothing of what was read is added, the base answers alone."""
    gemma, injection = model.gemma, model.injection
    sequence, device = batch["sequence"], gemma.device
    R = len(sequence)
    store, offset = pool.sequences, torch.arange(T, device=device)
    length, prompt = store.lengths[sequence], pool.prompt_length[sequence]
    place = (store.starts[sequence][:, None] + offset).clamp(max=len(store.ids) - 1)
    real = offset < length[:, None]                                                            # (R, T)
    ids, h = store.ids[place], store.keys[place].masked_fill(~real[..., None], 0.0)
    spoken = real & (offset > 0)                                                               # all but <bos>
    question = spoken & (offset < prompt[:, None])
    x, longest = injection.features(ids, h), int(prompt.max())
    reading = injection.read(x, Question(x[:, :longest], question[:, :longest]), memories(model, pool, batch))
    h = h if silent else injection.inject(h, reading.context, ~spoken)
    places = Places(gemma.config, R, T, real, None, device)
    h = gemma.run_layers(h, places, model.config.inject_after + 1) if model.config.inject_after < len(gemma.layers) else h
    answering = real[:, 1:] & (offset[1:] >= prompt[:, None]) & batch["known"].any(1)[:, None]  # (R, T - 1): next token is the answer's
    where = answering.nonzero()                                                                # (answer tokens, 2)
    logits = gemma.logits(h[where[:, 0], where[:, 1]])
    return dict(logits=logits, targets=ids[where[:, 0], where[:, 1] + 1], row=where[:, 0], position=where[:, 1], reading=reading,
                spoken=spoken, answering=F.pad(answering, (0, 1)))


def wanted(batch, hop, hops, N):
    """Which episodes a hop should attend to, (R, N + 1) bool, null last.

    A question of two hops needs the first fact first and the second last; all others need all their facts at every hop.
    """
    needed, two_hop = batch["known"].clone(), batch["kind"] == KINDS.index("two_hop")
    needed[two_hop] &= torch.tensor([hop == 0 and hops > 1, hop == hops - 1], device=needed.device)
    target = torch.zeros(len(needed), N + 1, dtype=torch.bool, device=needed.device)
    for i in range(2):
        rows = needed[:, i].nonzero()[:, 0]
        target[rows, batch["support"][rows, i]] = True
    target[:, -1] = ~needed.any(1)
    return target


def retrieval_loss(batch, out, hops):
    """- log attention on what should be attended to, mean over heads and hops: (over all episodes, over the candidates
    compared word by word, at answer positions). The right episode may be missing among the candidates: then only the first counts."""
    reading, is_text = out["reading"], (batch["kind"] == TEXT)[:, None]
    at_prompt, at_candidates, at_answer = 0.0, 0.0, 0.0
    among = lambda target, rows: torch.cat((target[:, :-1].gather(1, rows), target[:, -1:]), 1)
    for hop in range(hops):
        asked = reading.asked[hop]                                                             # (R, H, N + 1)
        target = wanted(batch, hop, hops, asked.shape[-1] - 1)
        at_prompt = at_prompt - asked.masked_fill(~target[:, None], -torch.inf).logsumexp(-1).mean()
        right = among(target, reading.candidates[hop])                                         # (R, k + 1)
        mass = reading.ranked[hop].masked_fill(~right[:, None], -1e4).logsumexp(-1).mean(1)    # (R,)
        at_candidates = at_candidates - (mass * right.any(1)).mean()
        right = among(target, reading.chosen[hop])                                             # (R, r + 1)
        mass = reading.weights[hop].masked_fill(~right[:, None, None], -1e4).logsumexp(-1).mean(-1)        # (R, T)
        care = torch.where(is_text, out["spoken"], out["answering"]) & right.any(1)[:, None]
        at_answer = at_answer - ((mass * care).sum(1) / care.sum(1).clamp(min=1)).mean()
    return at_prompt / hops, at_candidates / hops, at_answer / hops


def copying_loss(batch, out, hops):
    """- log of the attention on those tokens of the right episodes that the answer goes on with, mean over heads: each has
    to be right, since the frozen layers above hear their sum and can't tell which of two words was meant.

    Where none of them does, as at the answer's end, there is nothing to copy and nothing is counted.
    """
    reading, row, position = out["reading"], out["row"], out["position"]
    target = wanted(batch, hops - 1, hops, reading.asked[-1].shape[-1] - 1)
    right = target.gather(1, reading.chosen[-1])[row]                                          # (n, r)
    hit = (reading.token_ids[row] == out["targets"][:, None, None]) & right[..., None]         # (n, r, M)
    weights = reading.weights[-1][row, position][..., :-1].exp()                               # (n, H, r)
    mass = (weights[..., None] * reading.token_weights[row, position].float() * hit[:, None]).flatten(2).sum(-1)   # (n, H)
    can = hit.flatten(1).any(1)
    return -((mass + 1e-6).log().mean(1) * can).sum() / can.sum().clamp(min=1)


@torch.no_grad()
def scores(batch, out):
    """Per row: whether the whole answer is right (greedy decoding would give it), whether the right episode came first,
    and the null weight."""
    right = torch.ones(len(batch["known"]), dtype=torch.long, device=out["row"].device)
    right.scatter_reduce_(0, out["row"], (out["logits"].argmax(-1) == out["targets"]).long(), "amin")
    reading = out["reading"]
    weights = reading.ranked[-1].exp().mean(1)                                                 # (R, k + 1)
    first = reading.candidates[-1].gather(1, weights[:, :-1].argmax(1, keepdim=True))[:, 0]
    last = batch["known"].long().sum(1) - 1                                                    # the fact with the answer is listed last
    either = (first[:, None] == batch["support"]) & batch["known"]
    is_list = batch["kind"] == KINDS.index("list")
    found = torch.where(is_list, either.any(1), either.gather(1, last.clamp(min=0)[:, None])[:, 0])
    return right.bool(), found, weights[:, -1]


@torch.no_grad()
def evaluate(model, pool, settings, sizes=(16, 64), questions=512, seed=1, silent=False):
    """Held-out exact match, right episode first, and null weights, as a dict per memory size and kind. silent: the base alone."""
    model.eval()
    result = {}
    for N in sizes:
        generator = torch.Generator(model.gemma.device).manual_seed(seed)
        right, found, null, kind, known = [], [], [], [], []
        R = min(settings.batch, 128)
        for _ in range(max(1, questions // R)):
            batch = pool.draw(max(1, R // 8), R, N, 0.1, 0.0, generator)
            with autocast(model):
                out = forward(model, pool, batch, settings.tokens, silent)
            for values, value in zip((right, found, null), scores(batch, out)):
                values.append(value)
            kind.append(batch["kind"]), known.append(batch["known"].any(1))
        right, found, null, kind, known = map(torch.cat, (right, found, null, kind, known))
        mean = lambda x: round(x.float().mean().item(), 4) if len(x) else None
        result[N] = dict(recall=mean(right[known]), first=mean(found[known]), refused=mean(null[~known] > 0.5),
                         refused_wrongly=mean(null[known] > 0.5),
                         **{name: mean(right[known & (kind == i)]) for i, name in enumerate(KINDS[:-1])})
    return result


def autocast(model):
    device = model.gemma.device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


# ------------------------------------------------------------------------------------------------------------ loop

def schedule(settings, step, seconds):
    """(learning rate, N, done): warm-up and cosine; memories grow from 8 facts to settings.facts by doubling.

    What is done (0 to 1) is the share of the steps or of the minutes, whichever is larger.
    """
    done = max(step / settings.steps, seconds / (60 * settings.minutes) if settings.minutes else 0.0)
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    rate = settings.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    stages = max(1, int(math.log2(max(8, settings.facts) / 8)) + 1)
    # small memories are quick to learn from: the first stages are short
    stage = min(stages - 1, int(stages * done ** 0.5 * 1.1))
    return rate, min(settings.facts, 8 * 2 ** stage), done


def groups(R, N):
    """G, the number of memories a batch of R questions is divided among: fewer of large ones."""
    G = max(2, min(R // 8, 8192 // N))
    while R % G:
        G -= 1
    return G


def save_checkpoint(folder, model, optimizer, progress):
    """Everything that --resume needs, in one file that is replaced whole. progress: a dict for JSON."""
    tensors = {f"model.{n}": t.detach().cpu().contiguous().clone() for n, t in model.injection.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{n}": t.detach().cpu().contiguous().clone() for n, t in state.items()})
    progress = json.dumps(progress)
    with replacing(folder / "checkpoint.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"progress": progress, "sha256": fingerprint(tensors, progress)})


def fingerprint(tensors, progress):
    """A hash of all that a checkpoint holds."""
    digest = hashlib.sha256(progress.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(folder, model, optimizer):
    """Put a checkpoint's weights and moments in their places. Returns what was saved as its progress."""
    file = folder / "checkpoint.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            every = {name: tensors.get_tensor(name) for name in tensors.keys()}
            meta = tensors.metadata()
        if fingerprint(every, meta["progress"]) != meta["sha256"]:
            raise ValueError("it is not what was saved")
        model.injection.load_state_dict({n[6:]: t for n, t in every.items() if n.startswith("model.")})
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: expected a checkpoint of a memory with these settings ({str(error)[:120]!r}); "
                         "resume with the settings it was made with, or train anew.") from None
    state = optimizer.state_dict()
    for name, tensor in every.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict(state)
    return json.loads(meta["progress"])


def add_up(parameters):
    """Replace gradients by their sum over all processes."""
    parameters = [p for p in parameters if p.grad is not None]             # the same in every process: what the design leaves unused has none
    flat = torch.cat([p.grad.flatten() for p in parameters])
    distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def train(settings, memory_config=None, model=None, pools=None):
    """Train and save a memory; the folder keeps the weights of the best evaluation. Returns (model as it is after the last
    step, last evaluation). pools: (training, held-out), to share among runs.

    Under torchrun every process holds the whole pool and takes its share of the `accumulate` batches of a step; with the
    gradients added up, all of them take the step that one process would have taken. The first measures, saves and speaks.
    """
    settings.check()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, together = int(os.environ.get("RANK", 0)), processes()
    if together > 1:
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    device, first = check_device(device), rank == 0
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    if model is None:
        model = GemmaWithMemory.from_pretrained(base=settings.model, device=device, config=memory_config)
    elif memory_config is not None:
        model = GemmaWithMemory(model.gemma, model.tokenizer, memory_config, model.base_name)
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp") if first else ():                    # half a file that a killed run was writing
        left.unlink()
    started = time.time()
    if pools is None:
        # Ctrl-C is this process's to hear: its workers would each print a traceback.
        spawn = lambda: multiprocessing.get_context("spawn").Pool(settings.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        with spawn() if settings.workers else nullcontext() as workers:
            draw = workers.imap if workers else map
            pools = (Pool(model, "train", settings.bundles, settings.tokens, settings.seed, settings.open_words,
                          texts=min(4096, settings.bundles // 8), draw=draw, progress=first),
                     Pool(model, "validation", max(200, settings.bundles // 20), settings.tokens, settings.seed + 1, draw=draw, progress=first))
    pool, held_out = pools
    pool.set_statistics(model)
    if settings.init:
        model.load_memory(settings.init)
    parameters = model.trainable_parameters()
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1]},
                                   {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}],
                                  lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay,
                                  fused=device.type == "cuda")
    progress = load_checkpoint(folder, model, optimizer) if settings.resume else dict(step=0, best=None, seconds=0.0, broken=0, skipped=0)
    if first and not settings.resume:   # a run that is killed before its first evaluation can be resumed too
        save_checkpoint(folder, model, optimizer, progress)
    start, best, spent, broken, skipped = (progress[name] for name in ("step", "best", "seconds", "broken", "skipped"))
    if settings.compile:
        for layer in model.gemma.layers[model.config.inject_after:]:
            layer.compile()
    ready = time.time()
    seen, last, lines, log = 0, {}, [], folder / "log.jsonl"
    if settings.resume and log.is_file():
        try:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= start]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{log}: expected a JSON object with a step on each line; move this file away, the checkpoint is good without it.") from None
    step, bar = start - 1, tqdm(range(start, settings.steps), desc="training", unit="step", initial=start, total=settings.steps, disable=not first)
    for step in bar:
        elapsed = spent + time.time() - ready
        if together > 1:                # one clock for all, or they would end at different steps
            clock = torch.tensor([elapsed], dtype=torch.float64, device=device)
            distributed.broadcast(clock, 0)
            elapsed = clock.item()
        rate, N, done = schedule(settings, step, elapsed)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        for part in range(rank, settings.accumulate, together):
            # Every draw is a function of seed and step: a resumed run sees what the unbroken one would have.
            generator = torch.Generator(device).manual_seed((settings.seed * 1_000_003 + step) * 64 + part)
            torch.manual_seed((settings.seed * 1_000_003 + step) * 64 + part)                # for dropout
            batch = pool.draw(groups(settings.batch, N), settings.batch, N, settings.unknown, settings.text, generator)
            with autocast(model):
                out = forward(model, pool, batch, settings.tokens)
                answer_loss = F.cross_entropy(out["logits"].float(), out["targets"])
                retrieval = retrieval_loss(batch, out, model.config.hops)
                copying = copying_loss(batch, out, model.config.hops)
                loss = answer_loss + settings.retrieval * sum(retrieval) + settings.copying * copying
            (loss / settings.accumulate).backward()
        if together > 1:
            add_up(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        broken = 0 if norm.isfinite() else broken + 1
        if broken == 5:
            raise InputError(f"step {step + 1}: the gradient was not finite 5 times in a row; what {folder} holds "
                             "from before is good: train with a lower --lr.")
        if broken:
            skipped += 1
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += settings.batch * settings.accumulate
        last_step = step + 1 == settings.steps or done >= 1
        measure = (step + 1) % settings.eval_every == 0 or last_step
        if first and (step % 20 == 0 or measure):
            values = dict(step=step + 1, facts=N, loss=round(loss.item(), 4), answer_loss=round(answer_loss.item(), 4),
                          retrieval_loss=[round(part.item(), 4) for part in retrieval], copying_loss=round(copying.item(), 4), seconds=round(time.time() - ready, 1),
                          examples_per_second=round(seen / (time.time() - ready)))
            if measure:
                last = evaluate(model, held_out, settings, questions=2048 if device.type == "cuda" else 512)
                values["held_out"] = last
                if last_step:
                    for N, alone in evaluate(model, held_out, settings, silent=True).items():
                        last[N]["base_alone"] = alone["recall"]
                score = sum(r["recall"] or 0.0 for r in last.values())
                if best is None or score >= best:
                    best = score
                    model.trained = dict({k: v for k, v in asdict(settings).items() if k not in ("out", "init", "device", "resume", "workers")},
                                         init=Path(settings.init).name,
                                         step=step + 1, held_out=last)
                    model.save_pretrained(folder)
            values["skipped"] = skipped
            values["pool_seconds"] = round(ready - started, 1)
            lines.append(json.dumps(values))
            with replacing(log) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            if measure:
                save_checkpoint(folder, model, optimizer, dict(step=step + 1, best=best, seconds=elapsed, broken=broken, skipped=skipped))
            shown = {f"recall@{n}": f"{r['recall']:.0%}" for n, r in last.items() if r["recall"] is not None}
            bar.set_postfix(N=N, loss=f"{loss.item():.3f}", **shown)
        if last_step:
            break
    bar.close()
    model.eval()
    if together > 1:
        distributed.destroy_process_group()
    if first:
        without = f" ({skipped} of them skipped: their gradients were not finite)" if skipped else ""
        where = f"{together} x {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}"
        print(f"trained {step + 1} steps{without}, {seen:,} examples in {time.time() - ready:.0f} s (and {ready - started:.0f} s for the pool) "
              f"on {where}; saved in {folder}", file=sys.stderr)
    return model, last


def options(parser, config_class):
    """One command-line option for each field of a dataclass of settings."""
    for f in fields(config_class):
        name, text = "--" + f.name.replace("_", "-"), f.metadata.get("help", "see MemoryConfig")
        if isinstance(f.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(name, type=type(f.default), default=f.default, help=f"{text} (default: {f.default if f.default != '' else 'automatic'})")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Train a memory on a frozen Gemma.",
                                     epilog="example: python train.py --model gemma-3-270m --minutes 6 --steps 20000 --batch 1024 --out out/270m",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser.add_argument_group("training"), TrainConfig)
    options(parser.add_argument_group("memory"), MemoryConfig)
    values = vars(parser.parse_args(arguments))
    settings = TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)})
    settings.check()
    values["chat"] = values["chat"] or settings.model.rstrip("/").endswith("-it")         # instruction-tuned bases are asked in turns
    config = MemoryConfig.from_dict({f.name: values[f.name] for f in fields(MemoryConfig)}, "command line")
    try:
        _, result = train(settings, config)
    except KeyboardInterrupt:
        saved = (Path(settings.out) / "checkpoint.safetensors").is_file()
        sys.exit(print(f"\nstopped; {f'--resume goes on from the checkpoint in {settings.out}' if saved else 'nothing was saved yet'}.", file=sys.stderr) or 130)
    share = lambda value: "none asked" if value is None else f"{value:.1%}"
    for N, r in result.items():
        print(f"{N:4d} facts: exact match {share(r['recall'])} (the base alone {share(r['base_alone'])}), right episode first "
              f"{share(r['first'])}, refused {share(r['refused'])} of the unanswerable and {share(r['refused_wrongly'])} of the answerable")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
