"""A learned memory bank: N memory tokens, trained like weights and read by cross-attention in some layers of Gemma.

        router: mean state -> chapter logits -> the best k          bank: N tokens in C chapters, M = A · Bᵀ or full
                     │                                             ┌───────────┬───────────┬───────────┬───────────┐
                     └─────────────── which are read ─────────────►│ chapter 1 │ chapter 2 │ chapter 3 │ chapter 4 │
                                                                   └───────────┴─────┬─────┴───────────┴───────────┘
                                                                        keys, values │
     h ──► norm ──► queries ──────────────────────────────► multi-head cross-attention ──► o_proj ──► x rms(h) ──► + h
                                                                                           (zero at first)

     order A:  h ─► self-attention ─► bank ─► MLP ─►              order B:  h ─► self-attention ─► MLP ─► bank ─►

Nothing is told to this memory: what it knows was trained in, so a fact costs minutes where the graph memory needs a
moment, and it can't be forgotten one by one. In return it costs no tokens, and it is the same however much it holds.

The chapters make the reading sparse. What was read from the chosen ones is multiplied by their share of the router's
probability: with one chapter that is Switch Transformer's gate (https://arxiv.org/abs/2101.03961), with all of them it is
1, so that routing to all chapters is no routing at all.

Letters as in gemma.py, and N memory tokens · W their width · C chapters of S = N / C tokens · k chosen · R = B · T rows
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gemma import BOS, Injection, InputError, RMSNorm
from variants.lora import LoRA, LoraConfig, LoraMemory, expect, option

BITS = {"float": None, "int8": 8, "int4": 4}


@dataclass
class ChaptersConfig(LoraConfig):
    """What the bank is made of. Each field says why one would change it. Those of LoRA count where there is one beside it."""

    lora_rank: int = option(0, "r of a LoRA beside the bank; 0: none")
    bank: int = option(4096, "N: memory tokens of a bank; more hold more facts")
    width: int = option(0, "W of a memory token; 0: the base's hidden size; less saves parameters")
    rank: int = option(0, "of the bank, M = A · Bᵀ; 0: full. A low rank makes tokens alike, and saves most of their parameters")
    projection_rank: int = option(0, "of the four projections; 0: full")
    heads: int = option(4, "each reads its own mixture of tokens")
    head_dim: int = option(64, "width of a head")
    placement: str = option("every:4", "layers that read: all, first:K, last:K, every:N, or a list such as 2,5,9. Early layers know the words, late ones what is asked")
    sharing: str = option("one", "one bank for all layers, one for each (layer), or one for every K of them that read (every:K)")
    order: str = option("A", "A: bank before the MLP, which can then work on what was read; B: after it")
    zero_output: bool = option(True, "o_proj starts at zero: the first logits are the base's own. Without it, training starts from noise")
    chapters: int = option(1, "C: parts of a bank that a router chooses among; 1: all of it is read, without a router")
    top_k: int = option(1, "k: chapters that are read; 1 is the sparse mode")
    routing: str = option("sequence", "what the router looks at: the mean over the prompt (sequence), over the last --window tokens (rolling), "
                                      "each token alone (token), or sequence for the prompt and rolling for what is generated (hybrid); "
                                      "a trained bank may be asked by another: change it in memory.json, or in model.config")
    window: int = option(16, "tokens that rolling looks back on, itself included")
    balance: float = option(0.01, "weight of Switch Transformer's load-balance loss: chapters are chosen equally often")
    auxiliary: float = option(0.0, "weight of the importance loss (https://arxiv.org/abs/1701.06538): chapters get equal probability, chosen or not")
    z_loss: float = option(0.001, "weight of the router's z-loss (https://arxiv.org/abs/2202.08906): logits stay small")
    storage: str = option("float", "of the bank's numbers: float, int8, or int4 (two in a byte); training rounds them already")
    bank_lr: float = option(1.0, "the bank's learning rate, as a multiple of --lr: a token is read seldom and may have to go far")
    router_lr: float = option(1.0, "the router's: a slower one is less likely to settle on one chapter early")
    vanilla: bool = option(False, "no bank at all: the base alone, as the yardstick of a run with the same options")

    def check(self, source):
        super().check(source)
        for name, least, most in (("bank", 1, 1 << 18), ("width", 0, 4096), ("rank", 0, 4096), ("projection_rank", 0, 4096), ("heads", 1, 64),
                                  ("head_dim", 1, 512), ("chapters", 1, 4096), ("top_k", 1, 4096), ("window", 1, 1 << 16)):
            expect(source, least <= getattr(self, name) <= most, f"{name} from {least} to {most}", getattr(self, name))
        for name, choices in (("order", "A B"), ("routing", "sequence rolling token hybrid"), ("storage", "float int8 int4")):
            expect(source, getattr(self, name) in choices.split(), f"{name} to be one of {choices}", repr(getattr(self, name)))
        for name in ("balance", "auxiliary", "z_loss", "bank_lr", "router_lr"):
            expect(source, 0 <= getattr(self, name) < 1e6, f"{name} to be an ordinary number of at least 0", getattr(self, name))
        expect(source, self.bank % self.chapters == 0, f"bank to be a multiple of the {self.chapters} chapters", self.bank)
        expect(source, self.top_k <= self.chapters, f"top_k of at most the {self.chapters} chapters", self.top_k)
        expect(source, groups(self.sharing, 1), "sharing to be one, layer or every:K", repr(self.sharing))


def placed(placement, layers):
    """The layers, counted from 1, that a placement names: "last:2" of 12 -> [11, 12]. Raises InputError if it can't be read."""
    how, _, number = placement.partition(":")
    n = int(number) if number.isdecimal() and len(number) < 6 else 0
    every = list(range(1, layers + 1))
    if placement == "all":
        return every
    if how in ("first", "last", "every") and 1 <= n <= layers:
        return {"first": every[:n], "last": every[-n:], "every": every[n - 1::n]}[how]
    listed = placement.split(",")
    named = {int(part) for part in listed if part.strip().isdecimal() and len(part) < 6}
    if len(named) < len(listed) or not named <= set(every):
        raise InputError(f"expected placement to be all, first:K, last:K, every:N or layers from 1 to {layers} with commas, got {placement[:40]!r}.")
    return sorted(named)


def groups(sharing, readers):
    """Which bank each of `readers` reading layers uses: "every:2" of 5 -> [0, 0, 1, 1, 2]. None if it can't be read."""
    how, _, number = sharing.partition(":")
    size = {"one": max(1, readers), "layer": 1}.get(sharing) or (int(number) if how == "every" and number.isdecimal() and len(number) < 6 else 0)
    return [i // size for i in range(readers)] if size else None


# ---------------------------------------------------------------------------------------------- matrices, and fewer bits

def quantise(matrix, bits):
    """(n, m) float -> (whole numbers, step (n,)): each row is rounded to multiples of its own step. int8 (n, m) or, two to a
    byte, uint8 (n, ceil(m / 2))."""
    most = 2 ** (bits - 1) - 1                                             # 127 or 7: symmetric, so that zero stays zero
    step = (matrix.float().abs().amax(1) / most).clamp(min=1e-12)
    whole = (matrix.float() / step[:, None]).round().clamp(-most, most)
    if bits == 8:
        return whole.to(torch.int8), step
    nibbles = F.pad((whole + 8).to(torch.uint8), (0, whole.shape[1] % 2), value=8)
    return nibbles[:, ::2] << 4 | nibbles[:, 1::2], step


def dequantise(whole, step, columns):
    """The float matrix (n, columns) that `quantise` rounded to."""
    if whole.dtype == torch.uint8:
        whole = torch.stack((whole >> 4, whole & 15), -1).flatten(1)[:, :columns].float() - 8
    return whole.float() * step[:, None]


class Matrix(nn.Module):
    """A trained (n, m) matrix, full or as the product of two thin ones; its numbers may be kept in 8 or 4 bits.

    Factors are drawn so that entries of the product have the variance that those of the full matrix would have: each is a
    sum of `rank` products, so std² = rank · std(A)² · std(B)².
    """

    def __init__(self, n, m, rank, std, bits=None):
        super().__init__()
        self.shapes, self.bits = {"full": (n, m)} if not rank else {"a": (n, rank), "b": (m, rank)}, bits
        each = std if not rank else (std ** 2 / rank) ** 0.25
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * each))

    def part(self, name):
        """One of the matrices this one is made of, float. While it trains, it is rounded as it will be when packed, and the
        gradient goes through as if it weren't."""
        if f"{name}_step" in self._buffers:
            return dequantise(getattr(self, f"{name}_packed"), getattr(self, f"{name}_step"), self.shapes[name][1])
        full = getattr(self, name)
        if self.bits is None:
            return full
        return full + (dequantise(*quantise(full.detach(), self.bits), full.shape[1]) - full.detach())

    def dense(self):
        return self.part("full") if "full" in self.shapes else self.part("a") @ self.part("b").T

    def forward(self, x):
        """x (…, m) times the transpose -> (…, n), as nn.Linear; by way of the factors, without the product."""
        if "full" in self.shapes:
            return F.linear(x, self.part("full"))
        return F.linear(F.linear(x, self.part("b").T), self.part("a"))

    def through(self, projection):
        """Every row of this matrix through another Matrix, (n, m) -> (n, its rows): M · Pᵀ = A · (P · B)ᵀ."""
        if "full" in self.shapes:
            return projection(self.part("full"))
        return self.part("a") @ projection(self.part("b").T)

    @torch.no_grad()
    def packed(self):
        """What is kept of the parameters: {name: rounded numbers or steps}, the parameters themselves if they aren't rounded."""
        kept = {}
        for name, full in self.named_parameters():
            kept.update(zip((f"{name}_packed", f"{name}_step"), quantise(full, self.bits)) if self.bits else [(name, full)])
        return kept

    def pack(self):
        """Keep the rounded numbers alone: no parameters are left, nothing trains any more."""
        for name, kept in self.packed().items() if self.bits else ():
            self._parameters.pop(name.rpartition("_")[0], None)
            self.register_buffer(name, kept)

    @torch.no_grad()
    def unpack(self):
        """Parameters again, with the values that were packed."""
        for name in self.shapes:
            if f"{name}_step" in self._buffers:
                full = self.part(name)
                self._buffers.pop(f"{name}_packed"), self._buffers.pop(f"{name}_step")
                self.register_parameter(name, nn.Parameter(full))


# ------------------------------------------------------------------------------------------------------------ routing

class Route(NamedTuple):
    """Where rows are sent."""

    chosen: torch.Tensor             # (R, k) chapters, the likeliest first
    log_share: torch.Tensor          # (R, k) log of their probability


def router_losses(logits, k):
    """What keeps a router healthy, each a scalar: dict of balance, auxiliary, z_loss. logits (decisions, C).

    balance     C · Σ f_c · P_c: the share f_c of decisions for chapter c times its mean probability P_c; 1 when both are even
    auxiliary   squared coefficient of variation of P_c: 0 when chapters have the same probability on average
    z_loss      mean squared log-sum-exp of the logits
    """
    C = logits.shape[1]
    P = logits.softmax(1).mean(0)                                          # (C,)
    f = torch.bincount(logits.topk(k).indices.flatten(), minlength=C) / (k * len(logits))
    return dict(balance=C * (f * P).sum(), auxiliary=P.var(correction=0) / P.mean() ** 2, z_loss=logits.logsumexp(1).pow(2).mean())


def rolling_mean(x, mask, before, window):
    """Mean of x (B, T, D) over the marked positions of the last `window`, at each position; before: the (x, mask) of up to
    window - 1 positions that came earlier, or None. Returns (B, T, D) and what the next call takes as before."""
    T = x.shape[1]
    if before is not None:
        x, mask = torch.cat((before[0], x), 1), torch.cat((before[1], mask), 1)
    most, window = window, min(window, x.shape[1])
    weight = mask[..., None].float()
    at = lambda sums: (sums - F.pad(sums, (0, 0, window, 0))[:, :sums.shape[1]])[:, -T:]       # now minus `window` ago
    mean = at((x * weight).cumsum(1)) / at(weight.cumsum(1)).clamp(min=1)
    drop = max(0, x.shape[1] - most + 1)
    return mean, (x[:, drop:], mask[:, drop:])


# ------------------------------------------------------------------------------------------------------------ reading

class Reader(nn.Module):
    """What one layer reads a bank with: its norm, its projections and its router."""

    def __init__(self, config, hidden_size, bank):
        super().__init__()
        D, W, width = hidden_size, config.width or hidden_size, config.heads * config.head_dim
        self.config, self.bank = config, bank                              # bank: its number
        self.norm = RMSNorm(D, 1e-6)
        matrix = lambda n, m: Matrix(n, m, config.projection_rank, m ** -0.5)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = matrix(width, D), matrix(width, W), matrix(width, W), matrix(D, width)
        self.q_norm, self.k_norm = RMSNorm(config.head_dim, 1e-6), RMSNorm(config.head_dim, 1e-6)
        if config.zero_output:                                             # one factor is enough, and two would never move
            nn.init.zeros_(self.o_proj.full if not config.projection_rank else self.o_proj.a)
        self.router = nn.Linear(D, config.chapters, bias=False) if config.chapters > 1 else None

    def keys_and_values(self, bank):
        """(C, S, H, head_dim) each; the same for every question."""
        shape = (self.config.chapters, -1, self.config.heads, self.config.head_dim)
        return self.k_norm(bank.through(self.k_proj).view(shape)), bank.through(self.v_proj).view(shape)

    def attend(self, q, k, v):
        """q (n, H, c) over tokens k, v (S, H, c) -> what was read (n, H, c), and the log of its share before normalising (n, H)."""
        scores = torch.einsum("nhc,shc->nhs", q, k).float() * q.shape[-1] ** -0.5
        return torch.einsum("nhs,shc->nhc", scores.softmax(-1).to(v.dtype), v), scores.logsumexp(-1)

    def forward(self, h, bank, route, kept=None):
        """What is added to h (B, T, D), in units of its RMS. route: the Route of these rows; kept: keys and values."""
        B, T, D = h.shape
        H, c = self.config.heads, self.config.head_dim
        k, v = kept or self.keys_and_values(bank)
        q = self.q_norm(self.q_proj(self.norm(h.float())).view(B * T, H, c))
        if route is None:
            read, _ = self.attend(q, k.flatten(0, 1), v.flatten(0, 1))
        else:
            # One chapter at a time, for those rows alone that chose it. Softmax over a union of chapters is their softmaxes
            # weighted by each one's sum of exponentials.
            parts, sums, row, slot = [], [], [], []
            for chapter in range(self.config.chapters):
                rows, slots = (route.chosen == chapter).nonzero(as_tuple=True)
                if len(rows):
                    part, total = self.attend(q[rows], k[chapter], v[chapter])
                    parts.append(part), sums.append(total), row.append(rows), slot.append(slots)
            order = (torch.cat(row) * self.config.top_k + torch.cat(slot)).argsort()
            parts, sums = (torch.cat(x)[order].unflatten(0, (B * T, -1)) for x in (parts, sums))             # (R, k, H, …)
            # The difference is zero: it changes nothing but lets the router hear which of the chosen would be worth more.
            weights = (sums + (route.log_share - route.log_share.detach())[..., None]).softmax(1)
            read = (weights[..., None] * parts).sum(1) * route.log_share.exp().sum(1)[:, None, None]
        return self.o_proj(read.reshape(B, T, H * c))


class Chapters(nn.Module, Injection):
    """The banks and their readers, in the sockets of a Gemma."""

    def __init__(self, config, hidden_size, layers):
        super().__init__()
        self.config = config
        where = [] if config.vanilla else placed(config.placement, layers)
        shared = groups(config.sharing, len(where))
        self.banks = nn.ModuleList(Matrix(config.bank, config.width or hidden_size, config.rank, 1.0, BITS[config.storage])
                                   for _ in range(max(shared, default=-1) + 1))
        self.readers = nn.ModuleDict({str(layer): Reader(config, hidden_size, bank) for layer, bank in zip(where, shared)})
        self.logits = []                                                   # of the last pass: (decisions, C) for each layer that routes

    def parameter_groups(self):
        """[(parameters, multiple of the learning rate)] of bank, router, LoRA, and the readers."""
        parts = {"bank": [], "router": [], "lora": [], "reader": []}
        for name, p in self.named_parameters():
            parts["bank" if name.startswith("banks.") else "lora" if name.startswith("lora.") else "router" if ".router." in name else "reader"].append(p)
        rates = dict(bank=self.config.bank_lr, router=self.config.router_lr, lora=self.config.lora_lr, reader=1.0)
        return [(parts[name], rates[name]) for name in parts]

    def begin(self, input_ids, attention_mask, question_mask, cache):
        # <bos> is left alone, and out of means: its state is an outlier, far larger than all others.
        self.spoken = (input_ids != BOS) if attention_mask is None else (input_ids != BOS) & attention_mask.bool()
        self.question = None if question_mask is None else question_mask.bool() & self.spoken
        self.memory = {} if cache is None else cache.memory                # of one request: what later tokens need again
        self.keep = cache is not None
        self.logits = []

    def after_attention(self, layer, h):
        return self.read(layer, h) if self.config.order == "A" else h

    def after_layer(self, layer, h):
        return self.read(layer, h) if self.config.order == "B" else h

    def read(self, layer, h):
        if str(layer) not in self.readers:
            return h
        reader = self.readers[str(layer)]
        bank = self.banks[reader.bank]
        kept = self.memory.get(("bank", layer))
        if kept is None and self.keep:
            kept = self.memory["bank", layer] = reader.keys_and_values(bank)
        route = self.route(reader, layer, h.float()) if reader.router is not None else None
        read = reader(h, bank, route, kept)
        rms = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
        return h + (read * rms * self.spoken[..., None]).to(h.dtype)

    def route(self, reader, layer, h):
        """The Route of all rows of h (B, T, D), by the kind of routing that the config names."""
        B, T, _ = h.shape
        h = reader.norm(h)
        state = self.state(layer, h)                                       # (B, T, D), or (B, 1, D): one for the whole row
        with torch.autocast(h.device.type, enabled=False):                 # small differences between chapters decide: float32
            logits = reader.router(state)                                  # (B, T or 1, C)
        self.logits.append(logits[self.spoken] if logits.shape[1] == T else logits[:, 0])
        best = logits.log_softmax(-1).topk(self.config.top_k)
        whole = lambda x: x.expand(B, T, -1).flatten(0, 1)
        return Route(whole(best.indices), whole(best.values))

    def state(self, layer, h):
        """What the router looks at, never later than the token it decides for, except inside of a prompt."""
        how, prompt = self.config.routing, ("prompt", layer)
        if how == "token":
            return h
        if self.question is not None and how in ("sequence", "hybrid"):
            mask = self.question[..., None].float()
            self.memory[prompt] = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)     # (B, 1, D)
        if how == "sequence" and prompt in self.memory:
            return self.memory[prompt]
        # A text without a marked prompt is a sequence that isn't finished: its mean so far.
        window = self.config.window if how != "sequence" else 1 << 20
        mean, self.memory["before", layer] = rolling_mean(h, self.spoken, self.memory.get(("before", layer)), window)
        if how == "hybrid" and self.question is not None:
            return torch.where(self.question[..., None], self.memory[prompt], mean)
        return mean

    def losses(self):
        """What the last forward pass adds to the loss: (weighted sum, dict of each, mean over the layers that route)."""
        each = [router_losses(logits, self.config.top_k) for logits in self.logits]
        mean = {name: sum(e[name] for e in each) / len(each) for name in (each[0] if each else ())}
        return sum(getattr(self.config, name) * value for name, value in mean.items()), mean


class ChapterMemory(LoraMemory):
    """A Gemma with banks in its sockets, and a LoRA beside them if its rank isn't 0."""

    variant, Config = "chapters", ChaptersConfig

    def make_injection(self):
        injection = Chapters(self.config, self.gemma.config.hidden_size, len(self.gemma.layers)).to(self.gemma.device)
        injection.lora = LoRA(self.config, self.gemma)
        return injection

    @property
    def adapted(self):
        return self.injection.lora.gemma

    def trainable_parameters(self):
        for bank in self.injection.banks:
            bank.unpack()                                                  # what is packed can't train
        return super().trainable_parameters()

    def parameter_groups(self):
        self.trainable_parameters()
        return self.injection.parameter_groups()

    def losses(self):
        return self.injection.losses()

    def to_save(self):
        kept = {name: t for name, t in super().to_save().items() if not name.startswith("banks.")}
        for i, bank in enumerate(self.injection.banks):
            kept.update({f"banks.{i}.{name}": t for name, t in {**dict(bank.named_buffers()), **bank.packed()}.items()})
        return kept

    def load_memory(self, folder):
        for bank in self.injection.banks:
            bank.pack()
        super().load_memory(folder)
