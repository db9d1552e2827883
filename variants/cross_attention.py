"""Memory in every layer: each decoder layer attends to the final states of past turns before it attends to the prompt.

      past turns, a MemoryPackage each                            one decoder layer
      (final states and mask of prompt and response)
                                                          h ──────────────┬────────────────► + ──► MLP …
      turn 1  ▪▪▪▪▪▪▪▪                                                    ▼                  ▲
      turn 2  ▪▪▪▪▪           which turns?                         input_layernorm           │
      turn 3  ▪▪▪▪▪▪▪▪▪▪  ──► first and last,                             │x                 │
      turn 4  ▪▪▪▪▪▪          the last K, all,      q_proj(x) ◄───────────┤                  │
                              or the K most            │                  ▼                  │
                              like the question        ▼                  +──► self-attention, frozen
                                   └─ k_proj, v_proj ─► attention          ▲
                                                        └─ o_proj ─► post_memory_layernorm

A layer's own q_proj asks with its normalised hidden states, k_proj and v_proj read the
packages, and what comes back goes through o_proj, which starts at zero, and a norm of its own. It is added to what the frozen
self-attention is about to see. Only these projections and norms train, and what weighs the turns. After a response is complete,
`generate` archives the turn; a fact that is told is a turn without a response. `answer` only asks.

Added to the plan that this design comes from:
  * Turns are weighed before they are read: each token of the question looks for the token of a turn that is most like it (late
    interaction, https://arxiv.org/abs/2004.12832). The log of a turn's weight is added to the scores of its tokens in all layers,
    and held to the right turn in training. "None of them" is weighed too: the model can tell that it wasn't told (`null_threshold`).
  * Each head has a *null* key whose value is nothing, so that it need not listen. Text in which no prompt is marked is left alone
    altogether, unless "none of them" weighs next to nothing: it may be no question, and some heads always hear something.
  * The norm has an epsilon of 1: an ordinary one would blow the first tiny output of a zero-initialised projection up to full size.
  * --package near: beside its final state a token shows its embedding and that of the token before it, and heads start by looking
    for the place after (or at) what was just read. To say a name of three tokens, one has to know what comes after the second.
  * Training says where the answer's words are, too (`copying`): through all layers of the base that is slow to be found out. What
    looks learns faster than what says: as long as the wrong words are read, saying them loudly only disturbs.

Letters: G memories of a batch · R questions, R / G to each · N turns · k of them are read · M tokens of a turn · L = k M · H heads ·
C head width · D hidden size · F width of a token of a package: D, 2 D or 3 D.
"""

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from extras.memory_model import Settings
from gemma import BOS, PAD, Injection, InputError, Places, RMSNorm
from memory import HUSHED
from variants.shared import PoolLesson, Told

PARTS = dict(final=1, both=2, near=3)      # F / D
SEEK = 64                                  # width in which turns are weighed


@dataclass
class CrossConfig(Settings):
    """What the memory in every layer is made of. The plan is turns="first+last", package="final"."""

    turns: str = field(default="first+last", metadata={"help": "which turns are read: first+last, last:K, all, or top:K, those that weigh most"})
    package: str = field(default="final", metadata={"help": "what is read of a token: its final state; both that and its embedding; near: that of the token before it, too"})
    heads: int = field(default=4, metadata={"help": "of the attention to packages, in each layer"})
    head_dim: int = field(default=32, metadata={"help": "their width"})
    null_threshold: float = field(default=0.5, metadata={"help": "says it doesn't know when the mean weight of the null keys is above"})
    chat: bool = field(default=False, metadata={"help": "questions as chat turns (instruction-tuned base)"})

    def check(self, source):
        if not re.fullmatch(r"first\+last|all|(last|top):[1-9]\d{0,4}", self.turns):
            raise InputError(f"{source}: expected turns to be first+last, last:K, all or top:K, got {self.turns[:40]!r}.")
        if self.package not in PARTS:
            raise InputError(f"{source}: expected package to be final, both or near, got {self.package[:40]!r}.")
        for name, most in (("heads", 64), ("head_dim", 1024)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{source}: expected {name} from 1 to {most}, got {str(getattr(self, name))[:20]}.")
        if not 0 <= self.null_threshold <= 1:
            raise InputError(f"{source}: expected null_threshold from 0 to 1, got {str(self.null_threshold)[:20]}.")


@dataclass
class MemoryPackage:
    """What is kept of one turn, or side by side of N turns of G memories: the last layer's states (M, D) or (G, N, M, D), ids
    (..., M), mask (..., M) of the tokens that there are."""

    states: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def valid(self):
        return self.mask.any(-1)                                           # (G, N): which turns there are

    @staticmethod
    def side_by_side(packages):
        """Several views of one memory, (1, N, …) each, as one of G = their number."""
        N, M = (max(p.mask.shape[i] for p in packages) for i in (1, 2))
        grow = lambda p: (0, M - p.mask.shape[2], 0, N - p.mask.shape[1])
        grown = [MemoryPackage(F.pad(p.states, (0, 0, *grow(p))), F.pad(p.ids, grow(p)), F.pad(p.mask, grow(p))) for p in packages]
        return MemoryPackage(*(torch.cat([getattr(p, name) for p in grown]) for name in ("states", "ids", "mask")))


class MemoryCrossAttention(nn.Module):
    """That of one layer."""

    def __init__(self, config, D, norm):
        """norm: the layer's input_layernorm, whose gains the memory's norm starts with: it is added to what comes out of it."""
        super().__init__()
        H, C = config.heads, config.head_dim
        width = D * PARTS[config.package]                                  # F
        self.heads, self.head_dim = H, C
        self.q_proj, self.o_proj = nn.Linear(D, H * C, bias=False), nn.Linear(H * C, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, H * C, bias=False), nn.Linear(width, H * C, bias=False)
        self.null_key = nn.Parameter(torch.randn(H, 1, C) / C ** 0.5)
        self.post_memory_layernorm = RMSNorm(D, eps=1.0)
        gain = 1 + norm.weight.float()
        with torch.no_grad():
            self.o_proj.weight.zero_()
            self.post_memory_layernorm.weight.copy_(norm.weight.float())
            if config.package == "near":                                   # the same random directions on both sides: likes attract
                same = torch.randn(H, C, D, device=self.k_proj.weight.device) / D ** 0.5
                keys = self.k_proj.weight.zero_().view(H, C, 3, D)
                keys[::2, :, 2], keys[1::2, :, 1] = same[::2], same[1::2]  # … the token before, and the token itself
                self.q_proj.weight.copy_(same.flatten(0, 1) / gain.to(same.device).abs().clamp(min=0.1))
                values = self.v_proj.weight.zero_().view(H * C, 3, D)      # what is said is the token itself: of states one learns by heart
                values[:, 1].normal_(std=D ** -0.5)

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(-3, -2)              # (..., T, H * C) -> (..., H, T, C)

    def remember(self, keys, values, at):
        """Keys and values of the tokens `at` (R', L), rows of those of all packages (n, H * C); null last: (R', H, L + 1, C) each."""
        k, v = (self.split(each.index_select(0, at.flatten()).unflatten(0, at.shape)) for each in (keys, values))
        return torch.cat((k, self.null_key.to(k.dtype).expand(len(k), -1, -1, -1)), 2), F.pad(v, (0, 0, 0, 1))

    def forward(self, x, k, v, bias):
        """x (B, T, D), k and v (R', H, L + 1, C), bias (R', S, L + 1) of S = B / R' rows that read the same packages -> (B, T, D)."""
        B, T, _ = x.shape
        q = self.split(self.q_proj(x.to(self.q_proj.weight.dtype)).view(len(k), -1, self.heads * self.head_dim))       # (R', H, S * T, C)
        bias = bias if bias.shape[1] == 1 else bias.repeat_interleave(T, 1)
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=bias[:, None].to(k.dtype))
        return self.post_memory_layernorm(self.o_proj(out.transpose(1, 2).reshape(B, T, -1))).to(x.dtype)

    def attention(self, x, k, bias):
        """Where a few positions look: x (B, A, D), k (R', H, L + 1, C), bias (R', S, L + 1) -> (B, A, L), mean over heads."""
        A, bias = x.shape[1], bias if bias.shape[1] == 1 else bias.repeat_interleave(x.shape[1], 1)
        q = self.split(self.q_proj(x.to(self.q_proj.weight.dtype)).view(len(k), -1, self.heads * self.head_dim))       # (R', H, S * A, C)
        scores = (q.to(k.dtype) @ k.mT).float() * self.head_dim ** -0.5
        return (scores + bias[:, None]).softmax(-1)[..., :-1].mean(1).unflatten(1, (-1, A)).flatten(0, 1)


class CrossAttentionInjection(nn.Module, Injection):
    """One cross-attention a layer, and the choice of turns that they read."""

    def __init__(self, config, gemma):
        super().__init__()
        D = gemma.config.hidden_size
        self.config, self.embed = config, [gemma.embed]                    # in a list: the base is neither saved nor trained with this
        self.layers = nn.ModuleList(MemoryCrossAttention(config, D, layer.input_layernorm) for layer in gemma.layers)
        self.seek, self.context = nn.Linear(D, SEEK, bias=False), nn.Linear(D, SEEK, bias=False)
        self.matters = nn.Linear(D, 1, bias=False)                         # how much a token of the question does
        self.scale, self.none, self.recent = (nn.Parameter(torch.tensor(x)) for x in (20.0, 10.0, 0.0))
        with torch.no_grad():
            self.seek.weight.normal_(std=D ** -0.5)
            self.context.weight.zero_(), self.matters.weight.zero_()
        self.view, self.log_weights = None, None
        self.speaking, self.heard = None, []                               # training: positions (R, A) of answers' tokens, and where layers look there

    def embedded(self, ids):
        h = self.embed[0](ids).float()
        return F.rms_norm(h, h.shape[-1:])

    def weigh(self, view, ids, question):
        """How much each turn has to do with each question, as log-probabilities (R, N + 1), null last: ids (R, T), marked by
        `question` (R, T)."""
        G, N, M = view.mask.shape
        states = F.rms_norm(view.states[view.mask].float(), view.states.shape[-1:])
        found = F.normalize(self.seek(self.embedded(view.ids[view.mask])) + self.context(states), dim=-1)
        there = found.new_zeros(G, N * M, SEEK).masked_scatter(view.mask.view(G, -1, 1), found)
        asking, care = self.embedded(ids), question & (ids != BOS)
        looking = F.normalize(self.seek(asking), dim=-1).view(G, -1, SEEK)                                              # (G, S * T, C)
        like = (looking @ there.mT).float().unflatten(2, (N, M)).masked_fill(~view.mask[:, None], -1.0).amax(-1)          # (G, S * T, N)
        share = self.matters(asking)[..., 0].float().masked_fill(~care, -1e4).softmax(1)                                # (R, T)
        scores = self.scale * (like.view(*ids.shape, N) * share[..., None]).sum(1)                                      # (R, N)
        valid, each = view.valid, len(ids) // G
        count = valid.sum(1, keepdim=True)
        scores = scores + (self.recent * (torch.arange(N, device=ids.device) + 1 - count) / count.clamp(min=1)).repeat_interleave(each, 0)
        if not self.by_question:                                           # the others are out of reach
            valid = self.within_reach(view)
        scores = scores.masked_fill(~valid.repeat_interleave(each, 0), -torch.inf)
        none = self.none + valid.sum(1, keepdim=True).clamp(min=1).log()   # the best of many is like anything a little
        return torch.cat((scores, none.repeat_interleave(each, 0)), 1).log_softmax(1)

    @property
    def separable(self):
        """Whether rows may go through the layers apart from those that ask the same memory: `part` says which do, and how wide."""
        return self.config.turns.startswith("top")

    @property
    def by_question(self):
        return self.config.turns == "all" or self.config.turns.startswith("top")

    def choose(self, view, log_weights=None):
        """Which turns are read: rows of the memory (R', k), and which of them there are (R', k). R' is R for top:K, by the
        log_weights (R, N + 1) of the questions, else G."""
        G, N = view.mask.shape[:2]
        there = view.valid                                                 # (G, N)
        count = there.sum(1, keepdim=True)
        how, _, K = self.config.turns.partition(":")
        if how == "all":
            rows = torch.arange(N, device=there.device).expand(G, N)
        elif how == "first+last":
            rows = torch.cat((torch.where(count > 1, 0, -1), count - 1), 1)
        elif how == "last":
            rows = count - 1 - torch.arange(int(K), device=there.device)
        else:
            best = log_weights[:, :-1].topk(min(int(K), N), dim=-1)
            return best.indices, best.values.isfinite()
        return rows.clamp(min=0), (rows >= 0) & there.gather(1, rows.clamp(min=0))

    def within_reach(self, view):
        """Which turns are read, whatever is asked: (G, N)."""
        rows, there = self.choose(view)
        return torch.zeros_like(view.valid, dtype=torch.float).scatter_add(1, rows, there.float()) > 0

    def open(self, view, ids, question):
        """Weigh and choose the turns, and lay their packages end to end: a dict for this request."""
        log_weights = self.weigh(view, ids, question)
        rows, there = self.choose(view, log_weights.detach())              # (R', k)
        memory = torch.arange(len(rows), device=ids.device)[:, None] // (len(rows) // len(view.mask))
        # Tokens of turns that anybody reads: each gets its key and value once in a layer, however many questions read it.
        read = torch.zeros(view.valid.shape, device=ids.device).index_put((memory, rows), there.float(), accumulate=True) > 0
        packed = view.mask & read[..., None]
        before = F.pad(view.ids[..., :-1], (1, 0), value=-1)[packed]
        parts = [F.rms_norm(view.states[packed].float(), view.states.shape[-1:])]
        if self.config.package != "final":
            parts += [self.embedded(view.ids[packed]), self.embedded(before.clamp(min=0)) * (before >= 0)[:, None]][:PARTS[self.config.package] - 1]
        packages = F.pad(torch.cat(parts, -1), (0, 0, 0, 1))               # the last one stands where there is nothing
        if torch.is_autocast_enabled(ids.device.type):                     # once, instead of in every layer
            packages = packages.to(torch.get_autocast_dtype(ids.device.type))
        # Those of each question end to end, without gaps: (R', L).
        mask = (view.mask[memory, rows] & there[..., None]).flatten(1)
        order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :max(1, int(mask.sum(1).max()))]
        mask, M = mask.gather(1, order), view.mask.shape[2]
        of = lambda x: x[memory, rows].flatten(1).gather(1, order)
        at = of((packed.flatten().cumsum(0) - 1).view_as(packed)).masked_fill(~mask, len(packages) - 1)
        turn = rows.repeat_interleave(M, 1).gather(1, order).masked_fill(~mask, -1)
        each = log_weights.detach().view(len(rows), -1, log_weights.shape[1])                                           # (R', S, N + 1)
        bias = each.gather(2, turn.clamp(min=0)[:, None].expand(-1, each.shape[1], -1)).clamp(min=-30).masked_fill(~mask[:, None], -torch.inf)
        return dict(packages=packages, at=at, turn=turn, tokens=of(view.ids), bias=F.pad(bias, (0, 1)), log_weights=log_weights[:, None])

    # -- the socket

    def begin(self, input_ids, attention_mask, question_mask, cache):
        self.memo, self.part = None, (slice(None), None)                   # all rows, of full width
        if self.view is None:
            return
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        memo = {} if cache is None else cache.memory
        if not memo:                                                       # not while decoding: then the memo knows what was chosen
            memo.update(self.open(self.view, input_ids, real if question_mask is None else question_mask.bool() & real))
            null = memo["log_weights"][:, :, -1].exp()                     # (R, 1)
            memo["hushed"] = (null >= HUSHED) & (question_mask is None)    # nobody may have asked
        self.memo, self.log_weights = memo, memo["log_weights"]            # (R, 1, N + 1)
        self.silent = ~real | (input_ids == BOS) | memo["hushed"]          # <bos>, an outlier, hears nothing

    def before_attention(self, layer, x):
        if self.memo is None:
            return x
        memo, block, (rows, width) = self.memo, self.layers[layer - 1], self.part
        if layer not in memo:
            memo[layer] = block.k_proj(memo["packages"]), block.v_proj(memo["packages"])
        (k, v), bias = block.remember(*memo[layer], memo["at"][rows]), memo["bias"][rows]
        if self.speaking is not None:
            spoken = x.gather(1, self.speaking[rows].clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))
            self.heard.append((rows, block.attention(spoken, k, bias)))
        return x + block(x, k, v, bias).masked_fill(self.silent[rows, :width, None], 0.0)


class CrossAttentionMemory(Told):
    variant, Config, Lesson, with_response = "cross", CrossConfig, PoolLesson, True

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        self.injection = CrossAttentionInjection(self.config, gemma).to(gemma.device)
        self.facts_layer = len(gemma.layers)

    def parameter_groups(self):
        """What looks for the words, and what says them."""
        says = [p for name, p in self.injection.named_parameters() if "o_proj" in name or "post_memory_layernorm" in name]
        return [([p for p in self.trainable_parameters() if all(p is not q for q in says)], 1.0), (says, 0.3)]

    @torch.no_grad()
    def keep(self, turns):
        longest, device = max(map(len, turns)), self.gemma.device
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in turns], device=device)
        real = torch.arange(longest, device=device) < torch.tensor([len(row) for row in turns], device=device)[:, None]
        h = self.gemma.run_layers(self.gemma.embed(ids), Places(self.gemma.config, *ids.shape, real, None, device))
        return [MemoryPackage(*(x[1:len(row)].clone() for x in each)) for row, *each in zip(turns, h, ids, real)]

    def make_view(self):
        kept = [MemoryPackage(p.states[None, None], p.ids[None, None], p.mask[None, None]) for p in self.memory_graph.kept]
        turns = MemoryPackage.side_by_side(kept)                           # (N, 1, M, …)
        return MemoryPackage(*(x.transpose(0, 1) for x in (turns.states, turns.ids, turns.mask)))

    def view_of(self, pool, batch):
        facts, valid = batch["episodes"], batch["valid"]
        place, real = pool.facts.places(facts)                             # (G, N, M)
        longest = int(pool.facts.lengths[facts].max())
        place, real = place[..., :longest], real[..., :longest] & valid[..., None]
        view = MemoryPackage(pool.facts.keys[place], pool.facts.ids[place], real)
        if self.training and not self.injection.by_question:               # what no layer reads can't be learnt: the target is then null
            read = self.injection.within_reach(view)
            batch["known"] &= read.repeat_interleave(len(batch["known"]) // len(read), 0).gather(1, batch["support"])
        return view

    def arranged(self, asked):
        if self.training:                                                  # positions whose next token is the answer's, in order, and some more
            most = max(1, int(asked.answering.sum(1).max()))
            self.injection.speaking, self.injection.heard = asked.answering.byte().argsort(dim=1, descending=True, stable=True)[:, :most], []
        return asked

    def copying(self, pool, batch, out):
        """- log of the attention, mean over heads and layers, on those tokens of the right turns that the answer goes on with."""
        injection, row = self.injection, out["row"]
        nth = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)         # which of its row's answer tokens
        mass, injection.speaking = torch.zeros(*injection.speaking.shape, injection.memo["at"].shape[1], device=row.device), None
        for rows, heard in injection.heard:
            mass[rows] += heard / len(injection.layers)
        mass, injection.heard = mass[row, nth], []                                             # (n, L)
        of = row // (len(batch["known"]) // len(injection.memo["at"]))                         # which packages it reads
        right = (injection.memo["turn"][of][:, None] == batch["support"][row][..., None]) & batch["known"][row][..., None]     # (n, 2, L)
        hit = right.any(1) & (injection.memo["tokens"][of] == out["targets"][:, None])
        return -(((mass * hit).sum(1) + 1e-4).log() * hit.any(1)).sum() / hit.any(1).sum().clamp(min=1)
