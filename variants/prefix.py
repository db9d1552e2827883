"""Prefix memory: what a graph of past turns returns is put in front of the prompt, as embeddings.

                       past turns: a node each, linked in time
                       (o)──(o)──(o)──(o)
                         │   │    │    │  GNN keys
    "Where does Maria live?" ── gist ──query──► which turns? ──► K vectors, a weighted sum over the turns
                │                                                    │
                │                     <bos> [slot] … [slot] Where does Maria live?
                │                            ▲ the slots' embeddings are replaced by these vectors
                ▼ after the retrieval, or it would find itself                                │
         a new node of the graph                                              Gemma, frozen ──► answer

`generate` follows the plan that this design comes from to the letter: it takes the prompt's gist, asks the graph, puts what it
finds in front, generates, and remembers the prompt as one more turn. `answer` only asks. A turn's gist is its pooled embeddings:
one mean by default, which has to carry a whole sentence, in no order. With --slots K a turn keeps K vectors, each pooled by an
attention over its tokens that learns what is worth keeping (compare gist tokens, https://arxiv.org/abs/2304.08467), and so is the
gist; --gist-after shows that attention, and the query, what a token means in its sentence. The answer is told to training as
what is worth keeping, too (`copying`): through all layers of the base that is slow to be found out.

Letters: G memories of a batch · R questions, R / G to each · N turns · M tokens of a turn · K slots · H heads · D hidden size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from extras.memory_model import Settings
from extras.pool import Asked
from gemma import BOS, PAD, Injection, InputError, Places
from gnn import EpisodicMemoryGNN, time_edges
from memory import pooled
from variants.shared import PoolLesson, Told

SLOT = 6                                 # <unused0>: no text ever makes it


@dataclass
class PrefixConfig(Settings):
    """What the prefix memory is made of; the defaults are the plan's."""

    slots: int = field(default=1, metadata={"help": "K: vectors that are kept of a turn and put before the prompt; 1: the mean of its embeddings"})
    gist_after: int = field(default=0, metadata={"help": "the layer whose states the query and the pooling see beside the embeddings; 0: none"})
    heads: int = field(default=4, metadata={"help": "of the attention over turns"})
    key_dim: int = field(default=64, metadata={"help": "width of a turn's key in each of them"})
    graph: bool = field(default=True, metadata={"help": "turns hear their neighbours in time, through a GAT"})
    null_threshold: float = field(default=0.5, metadata={"help": "says it doesn't know when the weight of no turn at all is above"})
    chat: bool = field(default=False, metadata={"help": "questions as chat turns (instruction-tuned base)"})

    def check(self, source):
        for name, least, most in (("slots", 1, 256), ("gist_after", 0, 4096), ("heads", 1, 64), ("key_dim", 1, 4096)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{source}: expected {name} from {least} to {most}, got {str(getattr(self, name))[:20]}.")
        if not 0 <= self.null_threshold <= 1:
            raise InputError(f"{source}: expected null_threshold from 0 to 1, got {str(self.null_threshold)[:20]}.")


@dataclass
class PrefixView:
    """What the injection sees of G memories."""

    keys: torch.Tensor                   # (G, N, H, C)
    values: torch.Tensor                 # (G, N, K, D) what each turn would put into the slots
    valid: torch.Tensor                  # (G, N)
    questions: bool = False              # training: the R / G questions are turns too, and each sees those before it

    @staticmethod
    def side_by_side(views):
        """Several views of one memory as one of G = their number."""
        N = max(view.valid.shape[1] for view in views)
        pad = lambda t: F.pad(t, (0, 0) * (t.ndim - 2) + (0, N - t.shape[1]))
        return PrefixView(*(torch.cat([pad(getattr(view, name)) for view in views]) for name in ("keys", "values", "valid")))


class PrefixInjection(nn.Module, Injection):
    """The graph of turns, what it keeps of them, and the slots."""

    separable = True                     # rows may go through the layers a few at a time: the slots are filled before

    def __init__(self, config, gemma):
        super().__init__()
        self.config, D = config, gemma.config.hidden_size
        some = gemma.embed(torch.arange(107, min(4096, gemma.config.vocab_size), device=gemma.device)).float()
        self.register_buffer("size", some.pow(2).mean().sqrt())            # RMS of an embedding as the layers see it
        width = D * (2 if config.gist_after else 1)                        # F: features of a token
        self.gnn = EpisodicMemoryGNN(width, config.heads, config.key_dim, use_graph=config.graph)
        self.query = nn.Linear(width, config.heads * config.key_dim, bias=False)
        with torch.no_grad():
            self.query.weight.copy_(self.gnn.own.weight)                   # starts by looking for turns like the question
        if config.slots > 1:
            self.worth = nn.Linear(width, config.slots + 1)                # of each token to each slot, and to the gist
            self.place = nn.Parameter(torch.zeros(config.slots, 64))       # and to a slot of its place, from 0 (first) to 63 (last)
            # They start with neighbouring tokens each, in order, so that a turn's words stand in the prompt, as well as K slots can say them.
            with torch.no_grad():
                share = 64 / config.slots
                self.place.copy_(-8 * ((torch.arange(64) + 0.5 - share * (torch.arange(config.slots)[:, None] + 0.5)) / share) ** 2)
                self.worth.weight.mul_(0.1)
                self.worth.weight[-1].zero_(), self.worth.bias.zero_()     # the gist starts as a mean
        self.value_map = nn.Parameter(torch.eye(D).repeat(config.slots, 1, 1))     # (K, D, D): slots start as embeddings that the base knows
        self.view, self.log_weights, self.slots = None, None, None

    def turns(self, embeddings, states, real):
        """Gists (P, F) and slot values (P, K, D) of P turns: embeddings (P, M, D), states (P, M, D) or None, real (P, M)."""
        embeddings, x = embeddings.float(), self.features(embeddings, states)
        if self.config.slots == 1:
            return pooled(x, real), pooled(embeddings, real)[:, None] @ self.value_map
        nth, count = real.cumsum(1) - 0.5, real.sum(1, keepdim=True).clamp(min=1)
        place = self.place.T[(64 * nth / count).long().clamp(0, 63)]       # (P, M, K)
        scores = (self.worth(x).float() + F.pad(place, (0, 1))).masked_fill(~real[..., None], -1e4)
        self.pooling, for_gist = scores.softmax(1).split((self.config.slots, 1), -1)           # (P, M, K) is kept for `copying`
        return (for_gist * x).sum(1), torch.einsum("pmk,pmd,kde->pke", self.pooling, embeddings, self.value_map)

    def features(self, embeddings, states):
        """(…, D), and (…, D) or None -> (…, F), all tokens of one size."""
        norm = lambda h: F.rms_norm(h.float(), h.shape[-1:])
        return norm(embeddings) if states is None else torch.cat((norm(embeddings), norm(states)), -1)

    def keys(self, gists, valid):
        """(G, N, F), (G, N) -> (G, N, H, C): each turn hears those before and after it."""
        edges = time_edges(valid if self.config.graph else valid[:, :1])
        return self.gnn.keys(gists.flatten(0, 1), *edges).unflatten(0, valid.shape)

    def retrieve(self, gists, values):
        """Ask: gists (R, F) of the prompts -> what goes into the slots, (R, K, D). `log_weights` keeps (R, H, N + 1), null last.

        values (R, K, D) of the prompts themselves are looked at only in training, where they become turns of their memory.
        """
        view, heads = self.view, self.config.heads
        G, N = view.valid.shape
        S = len(gists) // G
        keys, held, valid, query = view.keys, view.values, view.valid, self.heads(self.query(self.gnn.standardise(gists)))   # (R, H, C)
        if view.questions:                                                 # turn by turn: question s is stored once it was asked
            every = torch.ones(G, S, dtype=torch.bool, device=gists.device)
            keys = torch.cat((keys, self.keys(gists.view(G, S, -1), every)), 1).repeat_interleave(S, 0)        # (R, N + S, H, C)
            held = torch.cat((held, values.view(G, S, *values.shape[1:])), 1)
            valid = torch.cat((valid[:, None].expand(G, S, N), every[:, None].expand(G, S, S).tril(-1)), 2).flatten(0, 1)
        log_weights = self.gnn.log_weights(query.view(len(keys), -1, heads, query.shape[-1]), keys, valid, valid.sum(1)).flatten(0, 1)
        # Earlier questions answer nothing: to look at them is to find nothing.
        self.log_weights = torch.cat((log_weights[..., :N], log_weights[..., N:].logsumexp(-1, keepdim=True)), -1)
        # Null is for refusing. What is put before the prompt is as large as embeddings are, however little of it was found.
        weights = log_weights[..., :-1].exp().mean(1).view(G, S, -1).to(held.dtype)
        found = torch.einsum("gsn,gnkd->gskd", weights, held).flatten(0, 1)
        return F.rms_norm(found, found.shape[-1:], eps=1e-12) * self.size

    def heads(self, x):
        return x.unflatten(-1, (self.config.heads, -1))                    # (..., H * C) -> (..., H, C)

    # -- the socket

    def begin(self, input_ids, attention_mask, question_mask, cache):
        self.at = (input_ids == SLOT) if self.view is not None and (cache is None or not cache.memory) else None
        if cache is not None:
            cache.memory["asked"] = True                                   # later tokens are the answer's: none of them is a slot

    def on_embeddings(self, h):
        if self.at is None:
            return h
        return h.masked_scatter(self.at[..., None], self.slots.to(h.dtype))


def with_slots(ids, real, K, *masks):
    """Put K slots after each row's <bos>: ids, real and other masks (B, T) -> the same with (B, T + K), and where the old
    tokens are now (B, T)."""
    B, T = ids.shape
    first = real.long().argmax(1, keepdim=True)
    first = first + (ids.gather(1, first) == BOS)                          # (B, 1): the slots begin here
    now = torch.arange(T, device=ids.device).expand(B, T)
    now = now + K * (now >= first)
    put = lambda old, new: torch.full((B, T + K), new, dtype=old.dtype, device=ids.device).scatter(1, now, old)
    return put(ids, SLOT), put(real, True), *(put(mask, False) for mask in masks), now


class PrefixMemory(Told):
    variant, Config, Lesson = "prefix", PrefixConfig, PoolLesson

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        if self.config.gist_after > len(gemma.layers):
            raise InputError(f"expected gist_after to be one of the base's {len(gemma.layers)} layers, or 0, got {self.config.gist_after}.")
        self.injection = PrefixInjection(self.config, gemma).to(gemma.device)
        self.facts_layer = self.config.gist_after

    def parameter_groups(self):
        own = self.injection.value_map                                     # starts as good as the base's own embeddings: full steps would first spoil that
        return [([p for p in self.trainable_parameters() if p is not own], 1.0), ([own], 0.2)]

    # -- turns

    def turns(self, ids, real, states=None):
        """Gists and slot values of turns: ids (P, M), real (P, M) which tokens count, states (P, M, D) if they are known."""
        if states is None and self.config.gist_after:
            places = Places(self.gemma.config, *ids.shape, real | (ids == BOS), None, ids.device)
            states = self.gemma.run_layers(self.gemma.embed(ids), places, 1, self.config.gist_after)
        return self.injection.turns(self.gemma.embed(ids), states, real)

    @torch.no_grad()
    def keep(self, turns):
        longest = max(map(len, turns))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in turns], device=self.gemma.device)
        return list(zip(*self.turns(ids, (ids != PAD) & (ids != BOS))))

    def make_view(self):
        gists, values = map(torch.stack, zip(*self.memory_graph.kept))
        valid = torch.ones(1, len(gists), dtype=torch.bool, device=gists.device)
        return PrefixView(self.injection.keys(gists[None], valid), values[None], valid)

    def of_pool(self, pool, facts):
        """As `turns`, of facts (P,) of a pool."""
        place, real = (x[:, 0] for x in pool.facts.places(facts[:, None]))
        return self.turns(pool.facts.ids[place], real, pool.facts.keys[place] if self.config.gist_after else None)

    def view_of(self, pool, batch):
        valid = batch["valid"]
        gists, values = self.of_pool(pool, batch["episodes"].flatten())    # (G * N, …)
        self.pooled = self.injection.pooling if self.config.slots > 1 else None
        return PrefixView(self.injection.keys(gists.unflatten(0, valid.shape), valid), values.unflatten(0, valid.shape), valid, self.training)

    @torch.no_grad()
    def set_statistics(self, pool):
        n, gnn = len(pool.facts.lengths), self.injection.gnn
        gists, _ = self.of_pool(pool, torch.arange(0, n, max(1, n // 2000), device=self.gemma.device))
        gnn.mean.copy_(gists.mean(0)), gnn.std.copy_(gists.std(0) + 1e-6)

    def copying(self, pool, batch, out):
        """- log of the attention that some slot has on the tokens of a turn that its answers are made of, mean over those tokens."""
        if self.pooled is None:
            return 0.0
        G, N = batch["valid"].shape
        row = out["row"]
        turn = (row[:, None] // (len(batch["known"]) // G)) * N + batch["support"][row]        # (n, 2)
        place, real = pool.facts.places(batch["episodes"].flatten()[turn])                     # (n, 2, M)
        hit = real & (pool.facts.ids[place] == out["targets"][:, None, None]) & batch["known"][row][..., None]
        on = (self.pooled[turn] * hit[..., None]).sum((1, 2)).clamp(max=1)                  # (n, K)
        missed = (1 - on).prod(1)
        can = hit.flatten(1).any(1)
        return -((1 - missed + 1e-6).log() * can).sum() / can.sum().clamp(min=1)

    # -- asking

    def ask(self, ids, real, question):
        """Retrieve for the prompts, which `question` (B, T) marks, and put slots for the answer before them; as `with_slots`."""
        self.injection.slots = self.injection.retrieve(*self.turns(ids, question & (ids != BOS)))
        return with_slots(ids, real, self.config.slots, question)

    def arranged(self, asked):
        cut = lambda x: x[:, :asked.longest]                               # the prompts: what comes after them is the answer
        *_, now = self.ask(cut(asked.ids), cut(asked.real), cut(asked.question))
        ids, real, *masks, now = with_slots(asked.ids, asked.real, self.config.slots, asked.spoken, asked.question, asked.answering)
        return Asked(ids, asked.place, real, *masks, asked.longest + self.config.slots)

    def batch(self, questions, room=0):
        return super().batch(questions, room + self.config.slots)

    def forward(self, input_ids, attention_mask=None, question_mask=None):
        """As MemoryModel.forward. What stands in front is of the whole prompt: without question_mask, of the whole input."""
        self._open()
        if self.injection.view is None:
            return self.gemma(input_ids, attention_mask)
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        ids, mask, _, now = self.ask(input_ids, real, real if question_mask is None else question_mask.bool())
        return self.gemma(ids, mask, injection=self.injection).gather(1, now[..., None].expand(-1, -1, self.gemma.config.vocab_size))

    def stream(self, input_ids, attention_mask=None, **options):
        self._open()
        if self.injection.view is None:
            return self.gemma.stream(input_ids, attention_mask=attention_mask, **options)
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        with torch.no_grad():
            ids, mask, *_ = self.ask(input_ids, real, real)
        return self.gemma.stream(ids, attention_mask=mask, injection=self.injection, **options)
