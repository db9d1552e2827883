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
self-attention is about to see. Only these projections and norms train. After a response is complete, `generate` archives the
turn; a fact that is told is a turn without a response. `answer` only asks.

Two things are added to the plan that this design comes from. Each head has a *null* key whose value is nothing, so that it need not listen, and the model
can tell that it was not told (`null_threshold`). And the norm has an epsilon of 1: an ordinary one would blow the first tiny
output of a zero-initialised projection up to full size, in all layers at once.

Letters: G memories of a batch · R questions, R / G to each · N turns · k of them are read · M tokens of a turn · L = k M · H heads ·
C head width · D hidden size · F width of a package: D, or 2 D with the embeddings.
"""

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from gemma import BOS, PAD, Injection, InputError, Places, RMSNorm
from memory import Settings, pooled
from variants.shared import PoolLesson, Told


@dataclass
class CrossConfig(Settings):
    """What the memory in every layer is made of. The plan is turns="first+last", package="final"."""

    turns: str = field(default="first+last", metadata={"help": "which turns are read: first+last, last:K, all, or top:K, those most like the question"})
    package: str = field(default="final", metadata={"help": "what is kept of a token: its final state, or both that and its embedding"})
    heads: int = field(default=4, metadata={"help": "of the attention to packages, in each layer"})
    head_dim: int = field(default=32, metadata={"help": "their width"})
    null_threshold: float = field(default=0.5, metadata={"help": "says it doesn't know when the mean weight of the null keys is above"})
    chat: bool = field(default=False, metadata={"help": "questions as chat turns (instruction-tuned base)"})

    def check(self, source):
        if not re.fullmatch(r"first\+last|all|(last|top):[1-9]\d{0,4}", self.turns):
            raise InputError(f"{source}: expected turns to be first+last, last:K, all or top:K, got {self.turns[:40]!r}.")
        if self.package not in ("final", "both"):
            raise InputError(f"{source}: expected package to be final or both, got {self.package[:40]!r}.")
        for name, most in (("heads", 64), ("head_dim", 1024)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{source}: expected {name} from 1 to {most}, got {str(getattr(self, name))[:20]}.")
        if not 0 <= self.null_threshold <= 1:
            raise InputError(f"{source}: expected null_threshold from 0 to 1, got {str(self.null_threshold)[:20]}.")


@dataclass
class MemoryPackage:
    """What is kept of one turn, or side by side of N turns of G memories: states (M, F) or (G, N, M, F), mask (..., M) of the
    tokens that there are, gist (D,) or (G, N, D), the mean of their embeddings."""

    states: torch.Tensor
    mask: torch.Tensor
    gist: torch.Tensor

    @property
    def valid(self):
        return self.mask.any(-1)                                           # (G, N): which turns there are

    @staticmethod
    def side_by_side(packages):
        """Several views of one memory, (1, N, …) each, as one of G = their number."""
        N, M = (max(p.mask.shape[i] for p in packages) for i in (1, 2))
        grown = [MemoryPackage(F.pad(p.states, (0, 0, 0, M - p.mask.shape[2], 0, N - p.mask.shape[1])),
                               F.pad(p.mask, (0, M - p.mask.shape[2], 0, N - p.mask.shape[1])),
                               F.pad(p.gist, (0, 0, 0, N - p.mask.shape[1]))) for p in packages]
        return MemoryPackage(*(torch.cat([getattr(p, name) for p in grown]) for name in ("states", "mask", "gist")))


class MemoryCrossAttention(nn.Module):
    """That of one layer."""

    def __init__(self, config, D, norm):
        """norm: the layer's input_layernorm, whose gains the memory's norm starts with: it is added to what comes out of it."""
        super().__init__()
        H, C = config.heads, config.head_dim
        width = D * (2 if config.package == "both" else 1)                 # F
        self.heads, self.head_dim = H, C
        self.q_proj, self.o_proj = nn.Linear(D, H * C, bias=False), nn.Linear(H * C, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, H * C, bias=False), nn.Linear(width, H * C, bias=False)
        self.null_key = nn.Parameter(torch.randn(H, 1, C) / C ** 0.5)
        self.post_memory_layernorm = RMSNorm(D, eps=1.0)
        nn.init.zeros_(self.o_proj.weight)
        with torch.no_grad():
            self.post_memory_layernorm.weight.copy_(norm.weight.float())

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(-3, -2)              # (..., T, H * C) -> (..., H, T, C)

    def remember(self, packages):
        """Keys and values of packages (R', L, F), null last: (R', H, L + 1, C) each."""
        k, v = self.split(self.k_proj(packages)), self.split(self.v_proj(packages))
        return torch.cat((k, self.null_key.to(k.dtype).expand(len(k), -1, -1, -1)), 2), F.pad(v, (0, 0, 0, 1))

    def forward(self, x, k, v, mask):
        """x (B, T, D), k and v (R', H, L + 1, C), mask (R', L + 1): B / R' rows read the same packages -> (B, T, D)."""
        B, T, _ = x.shape
        q = self.split(self.q_proj(x.to(self.q_proj.weight.dtype)).view(len(k), -1, self.heads * self.head_dim))       # (R', H, B / R' * T, C)
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask[:, None, None])
        return self.post_memory_layernorm(self.o_proj(out.transpose(1, 2).reshape(B, T, -1))).to(x.dtype)

    def weigh(self, x, k, mask):
        """Attention of one position of each row: x (B, D) -> (B, H, L + 1)."""
        q = self.split(self.q_proj(x.to(self.q_proj.weight.dtype)).view(len(k), -1, self.heads * self.head_dim))       # (R', H, B / R', C)
        scores = (q.float() @ k.float().mT) * self.head_dim ** -0.5
        return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).transpose(1, 2).flatten(0, 1)


class CrossAttentionInjection(nn.Module, Injection):
    """One cross-attention a layer, and the choice of turns that they read."""

    def __init__(self, config, gemma):
        super().__init__()
        self.config, self.embed = config, [gemma.embed]                    # in a list: the base is neither saved nor trained with this
        self.layers = nn.ModuleList(MemoryCrossAttention(config, gemma.config.hidden_size, layer.input_layernorm) for layer in gemma.layers)
        self.view, self.log_weights = None, None

    def choose(self, view, ids, question):
        """Which turns are read: rows of the memory (R', k), and which of them there are (R', k). R' is R where it depends on
        the question, ids (R, T) marked by `question` (R, T), else G."""
        G, N = view.mask.shape[:2]
        there = view.valid                                                 # (G, N)
        count = there.sum(1, keepdim=True)
        how, _, K = self.config.turns.partition(":")
        if how == "all":
            rows = torch.arange(N, device=ids.device).expand(G, N)
        elif how == "first+last":
            rows = torch.cat((torch.where(count > 1, 0, -1), count - 1), 1)
        elif how == "last":
            rows = count - 1 - torch.arange(int(K), device=ids.device)
        else:
            # Cosines of mean embeddings, less what all turns have in common: nothing of this trains.
            asking = pooled(self.embed[0](ids).float(), question & (ids != BOS)).view(G, len(ids) // G, -1)            # (G, S, D)
            common = (view.gist * there[..., None]).sum(1, keepdim=True) / count[..., None] * (count[..., None] > 1)
            like = F.normalize(asking - common, dim=-1) @ F.normalize(view.gist - common, dim=-1).mT                   # (G, S, N)
            best = like.masked_fill(~there[:, None], -torch.inf).topk(min(int(K), N), dim=-1)
            return best.indices.flatten(0, 1), best.values.flatten(0, 1).isfinite()
        return rows.clamp(min=0), (rows >= 0) & there.gather(1, rows.clamp(min=0))

    def open(self, view, ids, question):
        """Choose the turns, and lay their packages end to end: a dict for this request."""
        rows, there = self.choose(view, ids, question)                     # (R', k)
        memory = torch.arange(len(rows), device=ids.device)[:, None] // (len(rows) // len(view.mask))
        mask = (view.mask[memory, rows] & there[..., None]).flatten(1)     # (R', L)
        last = (question * torch.arange(ids.shape[1], device=ids.device)).argmax(1)
        return dict(rows=rows, packages=view.states[memory, rows].flatten(1, 2), mask=F.pad(mask, (0, 1), value=True), last=last, mass=[])

    # -- the socket

    def begin(self, input_ids, attention_mask, question_mask, cache):
        self.memo = None
        if self.view is None:
            return
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        self.silent = ~real | (input_ids == BOS)                           # <bos>, an outlier, hears nothing
        memo = {} if cache is None else cache.memory
        if not memo:                                                       # not while decoding: then the memo knows what was chosen
            memo.update(self.open(self.view, input_ids, real if question_mask is None else question_mask.bool() & real))
        self.memo = memo

    def before_attention(self, layer, x):
        if self.memo is None:
            return x
        memo, block = self.memo, self.layers[layer - 1]
        if layer not in memo:
            memo[layer] = block.remember(memo["packages"])
            at = x[torch.arange(len(x), device=x.device), memo["last"]]
            memo["mass"].append(block.weigh(at, memo[layer][0], memo["mask"]))
            if layer == len(self.layers):
                self.weigh_turns(memo)
        return x + block(x, *memo[layer], memo["mask"]).masked_fill(self.silent[..., None], 0.0)

    def weigh_turns(self, memo):
        """`log_weights` (R, 1, N + 1): the attention at the end of the question, mean over heads and layers, of each turn."""
        mass = torch.cat(memo["mass"], 1).mean(1)                          # (R, L + 1)
        R, k = len(mass), memo["rows"].shape[1]
        rows = memo["rows"].repeat_interleave(R // len(memo["rows"]), 0)
        of_turn = mass.new_zeros(R, self.view.mask.shape[1]).scatter_add(1, rows, mass[:, :-1].unflatten(1, (k, -1)).sum(2))
        self.log_weights = (torch.cat((of_turn, mass[:, -1:]), 1) + 1e-6).log()[:, None]


class CrossAttentionMemory(Told):
    variant, Config, Lesson, with_response = "cross", CrossConfig, PoolLesson, True

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        self.injection = CrossAttentionInjection(self.config, gemma).to(gemma.device)
        self.facts_layer = len(gemma.layers)

    def package(self, ids, states, mask):
        """ids (..., M), the last layer's states (..., M, D), mask (..., M) -> a MemoryPackage in float32."""
        embeddings = self.gemma.embed(ids).float()
        norm = lambda h: F.rms_norm(h.float(), h.shape[-1:])
        kept = torch.cat((norm(states), norm(embeddings)), -1) if self.config.package == "both" else norm(states)
        gist = (embeddings * mask[..., None]).sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)
        return MemoryPackage(kept, mask, gist)

    @torch.no_grad()
    def keep(self, turns):
        longest, device = max(map(len, turns)), self.gemma.device
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in turns], device=device)
        real = torch.arange(longest, device=device) < torch.tensor([len(row) for row in turns], device=device)[:, None]
        h = self.gemma.run_layers(self.gemma.embed(ids), Places(self.gemma.config, *ids.shape, real, None, device))
        return [self.package(i[1:len(row)], s[1:len(row)], m[1:len(row)]) for row, i, s, m in zip(turns, ids, h, real)]

    def make_view(self):
        kept = [MemoryPackage(p.states[None, None], p.mask[None, None], p.gist[None, None]) for p in self.memory_graph.kept]
        turns = MemoryPackage.side_by_side(kept)                           # (N, 1, M, …)
        return MemoryPackage(turns.states.transpose(0, 1), turns.mask.transpose(0, 1), turns.gist.transpose(0, 1))

    def view_of(self, pool, batch):
        facts, valid = batch["episodes"], batch["valid"]
        place, real = pool.facts.places(facts)                             # (G, N, M)
        longest = int(pool.facts.lengths[facts].max())
        place, real = place[..., :longest], real[..., :longest] & valid[..., None]
        view = self.package(pool.facts.ids[place], pool.facts.keys[place], real)
        if self.training:                                                  # what no layer reads can't be learnt: the target is then null
            asked = pool.questions(batch, int(pool.prompt_length[batch["sequence"]].max()))
            rows, there = self.injection.choose(view, asked.ids, asked.question)
            read = torch.zeros(len(rows), valid.shape[1], device=rows.device).scatter_add(1, rows, there.float()) > 0
            batch["known"] &= read.repeat_interleave(len(batch["known"]) // len(read), 0).gather(1, batch["support"])
        return view
