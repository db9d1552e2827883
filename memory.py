"""An episodic memory for a frozen Gemma: the store, the injection layer, and `GemmaWithMemory`, which joins them.

    facts    -> Gemma layers 1-8 -> token states -> mean -> GNN -> keys of the episodes
    question -> Gemma layers 1-8 -> h --query--> which episodes? -> which of their tokens? -> h + what was read
                                                              -> Gemma layers 9 onward -> answer

Three ideas do the work; `bench/ladder.py` measures what each is worth:
  * the reader first chooses episodes, then tokens inside them: one vector per sentence can't carry a code or a name;
  * what it reads of a token is that token's row of the embedding table, through a map that starts as a small identity:
    the frozen output head is the same table, so the memory speaks its language from the first step;
  * a null episode, whose value is nothing, takes the attention when no episode answers: so the memory can be silent.

Letters: G memories of a batch (1 outside of training) · R rows, R / G questions to each memory · T tokens of a row ·
N episodes · k candidates · M tokens of an episode · H heads · D hidden size · C head width.
"""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from gemma import (BOS, END_OF_TURN, EOS, PAD, Gemma, Injection, InputError, Places, Tokenizer, find_model, read_json,
                   replacing, write_json)
from gnn import EpisodicMemoryGNN, most_similar_later, time_and_similarity_edges

DONT_KNOW = "I don't know."
HERE = Path(__file__).resolve().parent


@dataclass
class MemoryConfig:
    """What the memory is made of. The plan that this project grew from is node_features="embedding", query="pooled",
    read="episode"."""

    inject_after: int = 8            # the decoder layer, counted from 1, whose output asks and is added to
    heads: int = 4                   # H: each with its own key, token key and value map
    key_dim: int = 128               # C of episode keys
    token_key_dim: int = 64          # C of token keys
    gat_dim: int = 64                # C of the graph attention
    candidates: int = 8              # k: episodes whose tokens a question may read
    hops: int = 2                    # 2: what the first reading found is added to the query, which then asks again
    node_features: str = "hidden"    # "hidden": mean state after inject_after; "embedding": mean embedding (the plan's)
    query: str = "token"             # "token": every position asks for itself; "pooled": one question for all (the plan's)
    read: str = "token"              # "token": attention inside an episode; "episode": its mean alone (the plan's)
    graph: bool = True               # False: keys without the GAT
    time_edges: bool = True          # previous <-> next
    similar_edges: int = 2           # to how many later, similar episodes a node listens; 0 for none
    cosine_keys: bool = True         # False: plain dot products
    identity_values: bool = True     # value maps start as identity x value_scale; False: as small random matrices
    value_scale: float = 0.05
    null_threshold: float = 0.5      # answer() says it doesn't know when the null weight is above; chosen on validation data
    chat: bool = False               # questions as Gemma's chat turns (instruction-tuned base) instead of "Question: … Answer:"

    @classmethod
    def from_dict(cls, raw, source):
        """Raises InputError for a missing or unknown field, or one of the wrong type."""
        known = {f.name: type(f.default) for f in fields(cls)}
        for name in known.keys() - raw.keys():
            raise InputError(f"{source}: the memory setting {name} is missing; restore the file that was saved.")
        for name, value in raw.items():
            if name not in known or not (type(value) is known[name] or (known[name] is float and type(value) is int)):
                raise InputError(f"{source}: unexpected memory setting {name} = {value!r}; restore the file that was saved.")
        config = cls(**raw)
        if min(config.inject_after, config.heads, config.key_dim, config.token_key_dim, config.gat_dim, config.candidates,
               config.hops) < 1 or config.similar_edges < 0:
            raise InputError(f"{source}: memory settings must be positive; restore the file that was saved.")
        for name, choices in (("node_features", ("hidden", "embedding")), ("query", ("token", "pooled")), ("read", ("token", "episode"))):
            if getattr(config, name) not in choices:
                raise InputError(f"{source}: expected {name} to be one of {', '.join(choices)}, got {getattr(config, name)!r}.")
        return config


# ------------------------------------------------------------------------------------------------------- the store

class TokenStore:
    """Tokens of many episodes, end to end, without padding: ids (all,), keys (all, H * C), and where each episode lies.

    The <bos> that every episode was encoded with is left out: its state is an outlier that would drown the others.
    """

    def __init__(self, ids, keys, lengths):
        self.ids, self.keys, self.lengths = ids, keys, lengths
        self.starts = lengths.cumsum(0) - lengths
        self.longest = int(lengths.max()) if len(lengths) else 0

    def places(self, episodes):
        """episodes (R, k) -> where their tokens are (R, k, M), and which of them are real (R, k, M)."""
        offset = torch.arange(self.longest, device=episodes.device)
        place = (self.starts[episodes][..., None] + offset).clamp(max=len(self.ids) - 1)
        return place, offset < self.lengths[episodes][..., None]


@dataclass
class MemoryView:
    """What the injection layer sees of G memories: keys (G, N, H, C), valid (G, N), and where their tokens are."""

    keys: torch.Tensor
    valid: torch.Tensor
    episodes: torch.Tensor           # (G, N) rows of `tokens`
    tokens: TokenStore


class EpisodeGraph:
    """The episodes of one memory in the order they were told, and the links between them, as tensors.

    Edges are not stored: time edges follow from the order, similarity edges from `similar`. `keys` are worked out at the
    next question after a change and kept until the next change; while training, whose every step is one, they are not kept.
    `states` (all tokens, D) stay so that the tokens' keys can be worked out anew when the weights have changed.
    """

    def __init__(self, config, hidden_size, device):
        self.config, self.device = config, device
        self.next_id = 0
        self.clear(hidden_size)

    def clear(self, hidden_size):
        long = lambda *shape: torch.zeros(*shape, dtype=torch.long, device=self.device)
        self.ids, self.texts = [], []
        self.tokens = TokenStore(long(0), torch.zeros(0, self.config.heads * self.config.token_key_dim, device=self.device), long(0))
        self.states = torch.zeros(0, hidden_size, device=self.device)                      # (all tokens, D)
        self.nodes = torch.zeros(0, hidden_size, device=self.device)                       # (N, D)
        self.own = torch.zeros(0, self.config.heads * self.config.key_dim, device=self.device)
        self.similar = long(0, self.config.similar_edges)                                  # (N, S) rows, -1 for none
        self.cosine = torch.zeros(0, self.config.similar_edges, device=self.device)        # (N, S)
        self.keys = None

    def __len__(self):
        return len(self.ids)

    def add(self, texts, token_ids, states, nodes, injection):
        """Append episodes. token_ids: list of (M,); states: list of (M, D); nodes (n, D). Returns their ids."""
        new_ids = list(range(self.next_id, self.next_id + len(texts)))
        self.next_id += len(texts)
        self.ids += new_ids
        self.texts += texts
        lengths = torch.tensor([len(t) for t in token_ids], device=self.device)
        states = torch.cat(states)
        self.states = torch.cat((self.states.to(states.dtype), states))
        self.tokens = TokenStore(torch.cat((self.tokens.ids, *token_ids)),
                                 torch.cat((self.tokens.keys, injection.token_keys(states, lengths))),
                                 torch.cat((self.tokens.lengths, lengths)))
        self.nodes = torch.cat((self.nodes, nodes))
        self._relate(injection.gnn)
        return new_ids

    @torch.no_grad()
    def refresh(self, injection):
        """Work out again what depends on the trained weights."""
        self.tokens.keys = injection.token_keys(self.states, self.tokens.lengths)
        self.own, self.similar, self.cosine = self.own[:0], self.similar[:0], self.cosine[:0]
        self._relate(injection.gnn)

    @torch.no_grad()
    def _relate(self, gnn):
        """Own keys and similarity links of the nodes that have none yet."""
        before, S = len(self.own), self.config.similar_edges
        self.own = torch.cat((self.own, F.normalize(gnn.own_keys(self.nodes[before:]), dim=-1)))
        new = len(self.own) - before
        self.similar = torch.cat((self.similar, self.similar.new_full((new, S), -1)))
        self.cosine = torch.cat((self.cosine, self.cosine.new_zeros(new, S)))
        for start in range(before, len(self.own), 1024) if S else ():       # new rows, a block at a time, against all
            self._link(torch.arange(len(self.own), device=self.device), start, min(start + 1024, len(self.own)))
        self.keys = None

    def _link(self, rows, start, stop, floor=0.5):
        """Let `rows` know of the later episodes start..stop that are most like them, beside those they know already."""
        S = self.config.similar_edges
        candidates = torch.arange(start, stop, device=self.device)
        cosine = self.own[rows] @ self.own[start:stop].T                                   # (rows, stop - start)
        cosine = cosine.masked_fill((candidates[None, :] <= rows[:, None]) | (cosine < floor), 0.0)
        best, which = cosine.topk(min(S, stop - start), dim=1)
        known = torch.cat((self.cosine[rows], best), 1)
        names = torch.cat((self.similar[rows], (which + start).masked_fill(best == 0, -1)), 1)
        self.cosine[rows], order = known.topk(S, dim=1)
        self.similar[rows] = names.gather(1, order)

    def forget(self, episode_id):
        """Remove an episode; its neighbours in time become each other's. Raises InputError for an unknown id."""
        if episode_id not in self.ids:
            raise InputError(f"expected the id of a stored episode, got {episode_id!r}; recall() lists them.")
        row = self.ids.index(episode_id)
        keep = torch.arange(len(self.ids), device=self.device) != row
        start, length = int(self.tokens.starts[row]), int(self.tokens.lengths[row])
        cut = lambda flat: torch.cat((flat[:start], flat[start + length:]))
        self.states = cut(self.states)
        self.tokens = TokenStore(cut(self.tokens.ids), cut(self.tokens.keys), self.tokens.lengths[keep])
        del self.ids[row], self.texts[row]
        orphans = (self.similar == row).any(1)[keep].nonzero()[:, 0]       # they listened to it: let them look again
        self.nodes, self.own, self.similar, self.cosine = (t[keep] for t in (self.nodes, self.own, self.similar, self.cosine))
        self.similar -= (self.similar > row).long()
        if len(orphans):
            self.similar[orphans], self.cosine[orphans] = -1, 0.0
            for block in range(0, len(self.own), 1024):
                self._link(orphans, block, min(block + 1024, len(self.own)))
        self.keys = None

    def view(self, injection):
        """The MemoryView of this one memory (G = 1), with gradients while the injection layer trains."""
        N, training = len(self), injection.training
        valid = torch.ones(1, N, dtype=torch.bool, device=self.device)
        if self.keys is None or training:
            edges = time_and_similarity_edges(self.similar[None], self.cosine[None], valid, self.config.time_edges)
            self.keys = injection.gnn.keys(self.nodes, *edges)
        if training:
            self.tokens.keys = injection.token_keys(self.states, self.tokens.lengths)
        return MemoryView(self.keys[None], valid, torch.arange(N, device=self.device)[None], self.tokens)


# ---------------------------------------------------------------------------------------------- the injection layer

@dataclass
class Reading:
    """What a question found. Weights are log-probabilities, the null episode last."""

    context: torch.Tensor            # (R, T, H, D) what was read, before the value maps
    asked: list                      # per hop (R, H, N + 1): over all episodes, at the last position of the prompt
    chosen: list                     # per hop (R, k): the candidates, rows of the memory
    weights: list                    # per hop (R, T, H, k + 1): over the candidates, at every position
    token_weights: torch.Tensor      # (R, T, H, k, M): inside each candidate, at the last hop


class MemoryInjectionLayer(nn.Module, Injection):
    """Reads the memory with the hidden states after layer `inject_after` and adds what it read to them."""

    def __init__(self, config, hidden_size, embedding):
        """embedding: the base's frozen table, (V, D), kept out of this module's parameters."""
        super().__init__()
        D, H = hidden_size, config.heads
        self.config = config
        self.table = [embedding]     # in a list, so that it is neither saved nor trained with this module
        self.gnn = EpisodicMemoryGNN(D, H, config.key_dim, config.gat_dim, config.graph, config.cosine_keys)
        self.register_buffer("state_mean", torch.zeros(D))
        self.register_buffer("state_std", torch.ones(D))
        linear = lambda width: nn.Linear(D, H * width, bias=False)
        self.query_own, self.query_pool = linear(config.key_dim), linear(config.key_dim)
        self.hop_query = nn.ModuleList(linear(config.key_dim) for _ in range(config.hops - 1))
        for hop in self.hop_query:
            nn.init.zeros_(hop.weight)                                     # hop 2 starts by asking what hop 1 asked
        if config.read == "token":
            self.token_query_own = nn.ModuleList(linear(config.token_key_dim) for _ in range(config.hops))
            self.token_query_pool = nn.ModuleList(linear(config.token_key_dim) for _ in range(config.hops))
            self.token_key_own, self.token_key_before = linear(config.token_key_dim), linear(config.token_key_dim)
            self.log_token_temperature = nn.Parameter(torch.full((H,), 5.0).log())
        start = torch.eye(D) * config.value_scale if config.identity_values else torch.randn(D, D) * config.value_scale / D ** 0.5
        self.value_map = nn.Parameter(start.repeat(H, 1, 1))               # (H, D, D)
        self.view = None                                                   # the MemoryView to read; None: stay silent
        self.reading = None                                                # the last Reading, for recall and --why

    # -- asking

    def heads(self, x):
        return x.unflatten(-1, (self.config.heads, -1))                    # (..., H * C) -> (..., H, C)

    def standardise(self, states):
        return ((states.float() - self.state_mean) / self.state_std).clamp(-10, 10)

    def read(self, h, pool, last, view, memo=None):
        """h (R, T, D) states, pool (R, 1 or T, D) standardised question states, last (R,) index of the last prompt position.

        memo: a dict that keeps what the question chose; full, it is used again instead of choosing. Returns a Reading.
        """
        R, T, D = h.shape
        G, N = view.valid.shape
        config, rows = self.config, torch.arange(R, device=h.device)
        graph = rows // (R // G)
        count = view.valid.sum(1)
        x = self.standardise(h)
        query = self.query_pool(pool)
        query = query + self.query_own(x) if config.query == "token" else query.expand(R, T, -1)
        asked, chosen, weights = [], [], []
        for hop in range(config.hops):
            kept = memo.get(hop) if memo is not None else None
            if kept is None:
                # 1. Which episodes? The last position of the prompt asks all, and keeps the best k.
                at = self.heads(query[rows, last]).view(G, R // G, config.heads, -1)
                over_all = self.gnn.log_weights(at, view.keys, view.valid, count).view(R, config.heads, N + 1)
                best = over_all[..., :-1].exp().mean(1).topk(min(config.candidates, N), dim=-1).indices     # (R, k)
                keys, valid = view.keys[graph[:, None], best], view.valid[graph[:, None], best]
                kept = (over_all, best, keys, valid, *self.token_side(view.tokens, view.episodes[graph[:, None], best]))
                if memo is not None:
                    memo[hop] = kept
            over_all, best, keys, valid, values, token_keys, real = kept
            # 2. Every position weighs the candidates, and null, for itself.
            over_best = self.gnn.log_weights(self.heads(query), keys, valid, count[graph])     # (R, T, H, k + 1)
            # 3. Which tokens inside them?
            inside = self.weigh_tokens(hop, x, pool, token_keys, real)                                     # (R, T, H, k, M)
            mass = over_best[..., :-1].exp()[..., None].to(inside.dtype) * inside
            asked.append(over_all), chosen.append(best), weights.append(over_best)
            if hop + 1 < config.hops:
                # What was found asks on: "Maria's brother is Tom" turns a question about Maria into one about Tom.
                query = query + self.hop_query[hop](torch.einsum("rtn,rnd->rtd", mass.mean(2).flatten(2), values.to(mass.dtype)))
        context = torch.einsum("rthn,rnd->rthd", mass.flatten(3), values.to(mass.dtype))
        return Reading(context, asked, chosen, weights, inside)

    def token_side(self, tokens, episodes):
        """Of the candidates (R, k): token values (R, k * M, D), token keys (R, k, M, H, C), and which are real (R, k, M).

        The value of a token is its row of the embedding table, at the size that RMSNorm gives it.
        """
        place, real = tokens.places(episodes)
        values = F.embedding(tokens.ids[place].flatten(1), self.table[0])
        return F.rms_norm(values, values.shape[-1:]), self.heads(tokens.keys[place]), real

    def token_keys(self, states, lengths):
        """Keys of the tokens of episodes that lie end to end: states (all, D), lengths (episodes,) -> (all, H * C).

        A token's key also says what stands before it: "the token after the one I just said" is then one lookup, as in
        an induction head (https://arxiv.org/abs/2209.11895).
        """
        if self.config.read == "episode":
            return states.new_zeros(len(states), self.config.heads * self.config.token_key_dim)
        x = self.standardise(states)
        before = self.token_key_before(x).roll(1, 0).index_fill(0, lengths.cumsum(0) - lengths, 0.0)   # nothing before the first
        return F.normalize(self.heads(self.token_key_own(x) + before), dim=-1).flatten(1)

    def weigh_tokens(self, hop, x, pool, keys, real):
        """Attention over the tokens of each candidate: (R, T, H, k, M). With read="episode" all tokens weigh the same."""
        if self.config.read == "episode":
            uniform = real / real.sum(-1, keepdim=True).clamp(min=1)
            return uniform[:, None, None].expand(-1, x.shape[1], self.config.heads, -1, -1)
        query = self.token_query_pool[hop](pool)
        query = query + self.token_query_own[hop](x) if self.config.query == "token" else query.expand(*x.shape[:2], -1)
        query = F.normalize(self.heads(query), dim=-1) * self.log_token_temperature.exp()[:, None]
        scores = torch.einsum("rthc,rkmhc->rthkm", query, keys.to(query.dtype))
        return scores.masked_fill(~real[:, None, None], -1e4).softmax(-1)

    def inject(self, h, context, silent):
        """h + what was read, at the scale of each hidden state; `silent` (R, T) positions stay as they are."""
        delta = torch.einsum("rthd,hde->rte", context, self.value_map)
        size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
        return h + (delta.float() * size).masked_fill(silent[..., None], 0.0).to(h.dtype)

    # -- the socket

    def begin(self, input_ids, attention_mask, question_mask, cache):
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        self.speaking = real & (input_ids != BOS)                          # <bos>, an outlier, neither asks nor listens
        self.question = None if question_mask is None else question_mask.bool() & self.speaking
        self.memo = None if cache is None else cache.memory

    def after_layer(self, layer, h):
        if layer != self.config.inject_after or self.view is None:
            return h
        B, T, D = h.shape
        if self.memo is not None and "pool" in self.memo:                  # decoding: the question was put at prefill
            reading = self.read(h, self.memo["pool"], None, self.view, self.memo)
        elif self.question is not None:
            pool = pooled(self.standardise(h), self.question)[:, None]     # (B, 1, D)
            last = (self.question * torch.arange(T, device=h.device)).argmax(1)
            if self.memo is not None:
                self.memo["pool"] = pool
            reading = self.read(h, pool, last, self.view, self.memo)
        else:
            # No prompt marked: every position is its own question about what came before it, so none sees its future.
            x = self.standardise(h) * self.speaking[..., None]
            pool = x.cumsum(1) / self.speaking.cumsum(1).clamp(min=1)[..., None]
            zero = torch.zeros(1, dtype=torch.long, device=h.device)
            parts = [self.read(a, b, zero.expand(len(a)), self.view).context
                     for a, b in zip(h.reshape(-1, 1, D).split(256), pool.reshape(-1, 1, D).split(256))]
            return self.inject(h, torch.cat(parts).view(B, T, -1, D), ~self.speaking)
        self.reading = reading
        return self.inject(h, reading.context, ~self.speaking)


def pooled(x, mask):
    """Mean of x (B, T, D) over the marked positions (B, T) -> (B, D)."""
    mask = mask.to(x.dtype)[..., None]
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------ Gemma with memory

def question_prompt(tokenizer, question, chat):
    """Token ids that ask `question`: as a chat turn, or in the words that a base model continues with an answer."""
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"expected a question, got {question!r}; ask something.")
    if chat:
        return tokenizer.chat([("user", question)])
    return tokenizer.encode(f"Question: {' '.join(question.split())}\nAnswer:")


def find_base(name):
    """The two bases that need no account, by name; anything else is a folder or a Hub id."""
    if str(name) == "tiny":
        return HERE / "tiny"
    if str(name) == "gemma-3-270m":
        from extras.weights_270m import ensure
        return ensure()
    return name


SHIPPED = {"tiny": HERE / "tiny" / "memory", "gemma-3-270m": HERE / "extras" / "gemma-3-270m"}


class GemmaWithMemory(nn.Module):
    """A frozen Gemma and the memory that it answers from.

    gemma: a Gemma; tokenizer: its Tokenizer; config: a MemoryConfig; base_name: what find_base() finds it by.
    """

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__()
        self.config = config or MemoryConfig()
        if self.config.inject_after > len(gemma.layers):
            raise InputError(f"expected inject_after to be one of the base's {len(gemma.layers)} layers, got {self.config.inject_after}.")
        self.gemma = gemma.eval().requires_grad_(False)
        self.tokenizer, self.base_name = tokenizer, base_name
        self.injection = MemoryInjectionLayer(self.config, gemma.config.hidden_size, gemma.embed_tokens.weight).to(gemma.device)
        self.memory_graph = EpisodeGraph(self.config, gemma.config.hidden_size, gemma.device)
        self.trained = {}                                                  # how the weights were made, saved with them
        newlines = [i for i in range(END_OF_TURN + 1, tokenizer.vocab_size) if tokenizer.pieces.id_to_piece(i).startswith("\n")]
        self.stop = {EOS, END_OF_TURN, *tokenizer.encode("\n", bos=False), *newlines, tokenizer.pieces.piece_to_id("<0x0A>")}

    def train(self, mode=True):
        super().train(mode)
        self.gemma.eval()                                                  # the base stays in eval, whatever its parent does
        self.memory_graph.refresh(self.injection)                      # training changed what the keys are made with
        return self

    def trainable_parameters(self):
        """The graph network's and the injection layer's parameters; the optimizer gets these and nothing else."""
        return list(self.injection.parameters())

    # -- writing

    @torch.no_grad()
    def states(self, batch):
        """Token ids (lists, each with <bos>) -> states after layer `inject_after`, without <bos>: a list of (M, D)."""
        longest = max(map(len, batch))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in batch], device=self.gemma.device)
        mask = torch.arange(longest, device=ids.device) < torch.tensor([len(row) for row in batch], device=ids.device)[:, None]
        h = self.gemma.embed(ids)
        h = self.gemma.run_layers(h, Places(self.gemma.config, *ids.shape, mask, None, ids.device), 1, self.config.inject_after)
        return [h[i, 1:len(row)] for i, row in enumerate(batch)]

    def node_features(self, ids, states):
        """One vector per episode: the mean state of its tokens, or the plan's mean embedding. (M,), (M, D) -> (D,)."""
        source = states if self.config.node_features == "hidden" else self.gemma.embed_tokens.weight[ids]
        return source.float().mean(0)

    @torch.no_grad()
    def add_to_memory(self, text, progress=False):
        """Remember a text, or a list of texts, each as one episode. Returns its id, or the list of ids in order.

        Raises InputError, with nothing stored, for an empty text, one that is no str, or one longer than the context.
        """
        texts = [text] if isinstance(text, str) else list(text)
        encoded = []
        for t in texts:
            ids = self.tokenizer.encode(t)
            if not t.strip():
                raise InputError("expected a fact, got an empty text; leave it out.")
            if len(ids) > self.gemma.config.max_position_embeddings:
                raise InputError(f"expected a fact of at most {self.gemma.config.max_position_embeddings} tokens, got {len(ids)} "
                                 f"({t[:40]!r}…); split it into sentences.")
            encoded.append(ids)
        # Sentences of like length together: less padding. Long ones in smaller batches: bounded memory.
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        states = [None] * len(texts)
        bar = tqdm(total=len(texts), desc="remembering", unit="fact", disable=not progress, file=sys.stderr, leave=False, delay=2)
        while order:
            size = max(1, min(256, 8192 // len(encoded[order[-1]]))) if len(order) < 256 else max(1, min(256, 8192 // len(encoded[order[255]])))
            batch, order = order[:size], order[size:]
            for i, s in zip(batch, self.states([encoded[i] for i in batch])):
                states[i] = s
            bar.update(len(batch))
        bar.close()
        ids = [torch.tensor(e[1:], device=self.gemma.device) for e in encoded]
        if not texts:
            return []
        nodes = torch.stack([self.node_features(i, s) for i, s in zip(ids, states)])
        new = self.memory_graph.add(texts, ids, states, nodes, self.injection)
        return new[0] if isinstance(text, str) else new

    def forget(self, episode_id):
        """Remove one episode. Raises InputError for an unknown id."""
        self.memory_graph.forget(episode_id)

    def clear_memory(self):
        self.memory_graph.clear(self.gemma.config.hidden_size)

    # -- asking

    def _open(self):
        """Point the injection layer at this model's own memory, as it is now."""
        self.injection.reading = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            self.injection.view = self.memory_graph.view(self.injection) if len(self.memory_graph) else None

    def forward(self, input_ids, attention_mask=None, question_mask=None):
        """Logits (B, T, V) of the base with its own memory; with an empty memory, bit-identical to the base.

        question_mask (B, T) marks the prompt, which asks as a whole; without it every position asks for itself.
        """
        self._open()
        return self.gemma(input_ids, attention_mask, question_mask, injection=self.injection)

    def stream(self, input_ids, **options):
        """As Gemma.stream, with the memory. The whole of input_ids is the question."""
        self._open()
        return self.gemma.stream(input_ids, injection=self.injection, **options)

    def generate(self, input_ids, max_new_tokens=32, temperature=0.0, **options):
        """Prompt and continuation, (B, T + new). Never refuses; see `answer`."""
        new = self.stream(input_ids, max_new_tokens=max_new_tokens, temperature=temperature, **options)
        return torch.stack([*input_ids.T, *new], dim=1)

    def prompt(self, question):
        """Token ids that ask `question` of this base."""
        return question_prompt(self.tokenizer, question, self.config.chat)

    def batch(self, questions, room=0):
        """Prompts padded on the left: input_ids (B, T), attention_mask (B, T).

        Raises InputError for a question so long that it leaves no `room` in the context for that many tokens of an answer.
        """
        prompts = [self.prompt(q) for q in questions]
        longest, most = max(map(len, prompts)), self.gemma.config.max_position_embeddings - room
        if longest > most:
            raise InputError(f"expected a question of at most {most} tokens, got {longest}; shorten it"
                             f"{f', or the {room} tokens of an answer' if room else ''}.")
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=self.gemma.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.gemma.device)
        return ids, mask

    def weights(self):
        """Of the last question(s): episode weights at the last prompt position and last hop, (B, N + 1), null last."""
        return self.injection.reading.asked[-1].exp().mean(1)

    @torch.no_grad()
    def recall(self, text, top_k=5):
        """Which episodes a question draws on: ([(episode id, weight, text), ...] best first, null weight). Generates nothing."""
        if not len(self.memory_graph):
            return [], 1.0
        self._open()
        ids, mask = self.batch([text])
        self.injection.begin(ids, mask, torch.ones_like(ids), None)
        h = self.gemma.run_layers(self.gemma.embed(ids), Places(self.gemma.config, *ids.shape, mask, None, ids.device),
                                  1, self.config.inject_after)
        self.injection.after_layer(self.config.inject_after, h)
        weights = self.weights()[0]
        best = weights[:-1].topk(min(top_k, len(self.memory_graph)))
        graph = self.memory_graph
        return ([(graph.ids[i], w, graph.texts[i]) for w, i in zip(best.values.tolist(), best.indices.tolist())], weights[-1].item())

    def answer(self, question, **options):
        """The answer to a question, or the list of answers to a list of questions, which are asked in one batch.

        Greedy unless options (max_new_tokens, temperature, top_k, top_p, seed) say otherwise. DONT_KNOW where the null
        episode's weight passes the threshold, and whenever the memory is empty.
        """
        questions = [question] if isinstance(question, str) else list(question)
        answers = ["".join(pieces) for pieces in zip(*self.answer_stream(questions, **options))]
        return answers[0] if isinstance(question, str) else answers

    @torch.no_grad()
    def answer_stream(self, questions, max_new_tokens=64, **options):
        """As `answer` for a list of questions, but yields the answers as they grow: at every step a list of new pieces."""
        ids, mask = self.batch(questions, max_new_tokens) if questions else (None, None)
        if not questions or not len(self.memory_graph):
            yield [DONT_KNOW] * len(questions)
            return
        tokens, said = [[] for _ in questions], [""] * len(questions)
        for token in self.stream(ids, attention_mask=mask, max_new_tokens=max_new_tokens, stop=self.stop, **options):
            if not tokens[0]:
                known = (self.weights()[:, -1] <= self.config.null_threshold).tolist()
            for row, t in zip(tokens, token.tolist()):
                row.append(t)
            now = [self.text(row, growing=True) if k else DONT_KNOW for row, k in zip(tokens, known)]
            yield [new[len(old):] for new, old in zip(now, said)]
            said = now
            if not any(known):
                return
        yield [self.text(row)[len(old):] if k else "" for row, old, k in zip(tokens, said, known)]

    def text(self, tokens, growing=False):
        """The text of generated tokens up to the first stop token; `growing`: as far as no further token can change it."""
        end = next((i for i, t in enumerate(tokens) if t in self.stop), len(tokens))
        text = self.tokenizer.decode(tokens[:end])
        # Bytes that are not yet a whole character decode to U+FFFD; a space may turn out to be the last one.
        return (text.rstrip("\ufffd") if growing else text).strip()

    # -- saving and loading

    def save_pretrained(self, folder):
        """Write memory.safetensors (bf16) and memory.json: the memory's weights, its config, and which base they belong to.

        Not the base, and not the episodes: their text is the user's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "memory.safetensors") as temporary:
            save_file({name: t.detach().to("cpu", torch.bfloat16 if t.ndim > 1 else torch.float32).contiguous()
                       for name, t in self.injection.state_dict().items()}, temporary)
        write_json(folder / "memory.json", dict(
            variant="graph", memory=asdict(self.config), trained=self.trained,
            base=dict(name=str(self.base_name), config=self.gemma.config.fingerprint(), tokenizer=self.tokenizer.hash,
                      weights=self.gemma.fingerprint())))

    @classmethod
    def from_pretrained(cls, name=None, base=None, memory=None, dtype=None, device="cpu"):
        """A trained memory on its base: "tiny", "gemma-3-270m", or a folder that save_pretrained wrote.

        base: another place to find the base (a folder or Hub id); with memory=None and name=None, a fresh memory on it.
        Raises InputError where something is missing or damaged, or the memory was made for another config or tokenizer.
        """
        folder = memory or SHIPPED.get(str(name), name)
        if folder is not None and not (Path(folder) / "memory.json").is_file():
            raise InputError(f"expected 'tiny', 'gemma-3-270m' or a folder that save_pretrained wrote, got {str(folder)!r}, "
                             "which holds no memory.json.")
        saved = read_json(Path(folder) / "memory.json") if folder is not None else None
        if saved is not None:
            base_of = saved.get("base")
            if not isinstance(base_of, dict) or not isinstance(saved.get("memory"), dict) or not isinstance(base_of.get("name"), str):
                raise InputError(f"{folder}/memory.json: expected the entries 'memory' and 'base'; restore the file that was saved.")
            base = base_of["name"] if base is None else base
        if base is None:
            raise InputError("expected the name of a memory or of a base model, got neither; try 'tiny'.")
        found = find_base(base)
        gemma = Gemma.from_pretrained(found, dtype=dtype, device=device)
        tokenizer = Tokenizer(find_model(found))
        if saved is None:
            return cls(gemma, tokenizer, MemoryConfig(chat=str(base).endswith("-it")), base).eval()
        for what, mine in (("config", gemma.config.fingerprint()), ("tokenizer", tokenizer.hash)):
            if base_of.get(what) != mine:
                raise InputError(f"{folder}: this memory was made for a base with {what} {base_of.get(what)!r}, got {mine!r}; "
                                 "use its own base or train a memory for this one.")
        if base_of.get("weights") != gemma.fingerprint():
            print(f"note: the memory in {folder} was trained on other weights of the same shape; recall may suffer.", file=sys.stderr)
        model = cls(gemma, tokenizer, MemoryConfig.from_dict(saved["memory"], f"{folder}/memory.json"), base)
        model.trained = saved.get("trained", {})
        model.load_memory(Path(folder) / "memory.safetensors")
        return model.eval()

    def load_memory(self, file):
        """Load the memory's weights, strictly. Raises InputError naming the tensor that is missing, unexpected or misshapen."""
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: expected a whole safetensors file ({str(error)[:100]}); restore the one that was saved.") from None
        mine = self.injection.state_dict()
        for name in sorted(set(mine) ^ set(tensors)):
            raise InputError(f"{file}: tensor {name} is {'missing' if name in mine else 'unexpected'}; restore the file that was saved.")
        for name, tensor in tensors.items():
            if tensor.shape != mine[name].shape or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise InputError(f"{file}: expected {name} to be finite, of shape {tuple(mine[name].shape)}, got {tensor.dtype} "
                                 f"{tuple(tensor.shape)}; restore the file that was saved.")
        self.injection.load_state_dict(tensors)
