"""An episodic memory for a frozen Gemma: the store, the injection layer, and `GemmaWithMemory`, which joins them.

    facts    -> Gemma layers 1-8 -> token states -> mean -> GNN -> keys of the episodes
    question -> Gemma layers 1-8 -> h --query--> which episodes? -> do their words match? -> which tokens? -> h + what was read
                                                              -> Gemma layers 9 onward -> answer

Four ideas do the work; `bench/ladder.py` measures what each is worth:
  * the reader first chooses episodes, then tokens inside them: one vector per sentence can't carry a code or a name;
  * nor can it tell Juraj from Juzaj: the best candidates are compared with the question word by word;
  * what it reads of a token is that token's row of the embedding table, through a map that starts as a small identity:
    the frozen output head is the same table, so the memory speaks its language from the first step;
  * a null episode, whose value is nothing, takes the attention when no episode answers: so the memory can be silent.
With `reading_layers`, as in the memories that are shipped, the few episodes that are read are laid beside the question first: in
"Since 2019 it takes 12 minutes" it depends on the question which number is the answer.

Letters: G memories of a batch (1 outside of training) · R rows, R / G questions to each memory · T tokens of a row ·
N episodes · k candidates, of which some are read · M tokens of an episode · H heads · D hidden size · F = 2 D features of a
token · C head width. Where words are compared: W words of a question · U episodes that questions on one memory look at.
"""

import hashlib
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn
from tqdm import tqdm

from gemma import (BOS, END_OF_TURN, EOS, PAD, Gemma, Injection, InputError, Places, Tokenizer, find_model, read_json,
                   replacing, write_json)
from gnn import EpisodicMemoryGNN, ReadingAttention, SentenceAttention, SimilarityEdges, time_edges

DONT_KNOW = "I don't know."
PART = 1024                          # facts that are written at a time
BLOCK = 2 ** 16                      # episodes whose keys are worked out at a time
ON_DEVICE = 2 ** 31                  # bytes of token keys that a GPU holds; more of them live in the host's memory
HERE = Path(__file__).resolve().parent


class Settings:
    """What a dataclass of settings inherits to be read from a file: fields are bool, int, float or str, each with a default."""

    @classmethod
    def from_dict(cls, raw, source):
        """Raises InputError for a missing or unknown field, or one of the wrong type, and whatever `check` finds."""
        known = {f.name: type(f.default) for f in fields(cls)}
        for name in known.keys() - raw.keys():
            raise InputError(f"{source}: the memory setting {name} is missing; restore the file that was saved.")
        for name, value in raw.items():
            if name not in known or not (type(value) is known[name] or (known[name] is float and type(value) is int)):
                raise InputError(f"{source}: unexpected memory setting {name} = {value!r}; restore the file that was saved.")
        config = cls(**raw)
        config.check(source)
        return config

    def check(self, source):
        """Raise InputError, with `source` in front, for values that make no sense."""


@dataclass
class MemoryConfig(Settings):
    """What the memory is made of. The plan that this project grew from is node_features="embedding", query="pooled",
    read="episode"."""

    inject_after: int = 8            # the decoder layer, counted from 1, whose output asks and is added to
    heads: int = 4                   # H: each with its own key, token key and value map
    key_dim: int = 64                # C of episode keys
    token_key_dim: int = 48          # C of token keys
    gat_dim: int = 32                # C of the graph attention
    sentence_layers: int = 1         # of attention among an episode's tokens, in both directions; 0: frozen states alone
    sentence_dim: int = 128          # width of these
    reading_layers: int = 0          # of attention between the question and the episodes that are read: slow to learn, doubles a step on a CPU
    reading_dim: int = 64            # width of these
    candidates: int = 16             # k: episodes that are compared with the question word by word
    readable: int = 4                # how many of these are then read
    hops: int = 2                    # 2: what the first reading found is added to the query, which then asks again
    node_features: str = "both"      # "hidden": mean state after inject_after; "embedding": mean embedding (the plan's); "both"
    query: str = "token"             # "token": every position asks for itself; "pooled": one question for all (the plan's)
    read: str = "token"              # "token": attention inside an episode; "episode": its mean alone (the plan's)
    match: bool = True               # False: candidates are ranked by their keys alone
    said: bool = True                # False: readers don't know which words of an episode the question has said itself
    graph: bool = True               # False: keys without the GAT
    time_edges: bool = True          # previous <-> next; and a pronoun's sentence borrows the words of the two before it
    similar_edges: bool = True       # later candidates may silence earlier ones; this, said and borrowing need match
    cosine_keys: bool = True         # False: plain dot products
    identity_values: bool = True     # value maps start as identity x value_scale; False: as small random matrices
    value_scale: float = 0.05
    dropout: float = 0.0             # of features, while training
    null_threshold: float = 0.5      # answer() says it doesn't know when the null weight is above; chosen on validation data
    chat: bool = False               # questions as Gemma's chat turns (instruction-tuned base) instead of "Question: … Answer:"

    def check(self, source):
        most = dict(heads=64, sentence_layers=64, reading_layers=64, hops=8)   # a file could ask for more than any machine has
        for name in ("inject_after", "heads", "key_dim", "token_key_dim", "gat_dim", "sentence_dim", "reading_dim", "candidates", "readable", "hops"):
            if not 1 <= getattr(self, name) <= most.get(name, 4096):
                raise InputError(f"{source}: expected {name} from 1 to {most.get(name, 4096)}, got {str(getattr(self, name))[:20]}.")
        for layers, dim in (("sentence_layers", "sentence_dim"), ("reading_layers", "reading_dim")):
            if not 0 <= getattr(self, layers) <= most[layers] or getattr(self, dim) % 4:
                raise InputError(f"{source}: expected {layers} from 0 to {most[layers]} and {dim} a multiple of 4, "
                                 f"got {str(getattr(self, layers))[:20]} and {getattr(self, dim)}.")
        for name in ("value_scale", "null_threshold"):
            if not abs(getattr(self, name)) < 1e6:                       # nor is NaN
                raise InputError(f"{source}: expected {name} to be an ordinary number, got {str(getattr(self, name))[:20]}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"{source}: expected dropout from 0 to below 1, got {self.dropout}.")
        for name, choices in (("node_features", ("both", "hidden", "embedding")), ("query", ("token", "pooled")), ("read", ("token", "episode"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{source}: expected {name} to be one of {', '.join(choices)}, got {getattr(self, name)!r}.")


# ------------------------------------------------------------------------------------------------------- the store

class TokenStore:
    """Tokens of many episodes, end to end, without padding: ids (all,), keys (all, 2 * H * C + reading_dim): what they are read
    by, what they are matched by, and what they mean (see `key_widths`); and where each episode lies.

    The <bos> that every episode was encoded with is left out: its state is an outlier that would drown the others. Keys are
    most of what a memory takes. They are small numbers, so float16 keeps them to a few parts in ten thousand in half the room.
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

    def keys_at(self, place, part):
        """A part (a slice) of the keys of the tokens at `place` (...): (..., width), on the device of `place`, wherever they
        are kept. What is kept in half precision is computed with in full."""
        keys = self.keys[:, part][place.to(self.keys.device)].to(place.device)
        return keys.float() if keys.dtype == torch.float16 else keys

    def joined(self, others):
        """These tokens, then those of other stores."""
        return TokenStore(*(torch.cat([getattr(store, name) for store in (self, *others)]) for name in ("ids", "keys", "lengths")))


@dataclass
class MemoryView:
    """What the injection layer sees of G memories, each in the order it was told."""

    keys: torch.Tensor               # (G, N, H, C)
    nodes: torch.Tensor              # (G, N, D)
    valid: torch.Tensor              # (G, N)
    episodes: torch.Tensor           # (G, N) rows of `tokens`
    tokens: TokenStore


class Growing:
    """Tensors with room behind their end: to append to one copies what is new, and the old only now and then, as in a list."""

    def __init__(self):
        self.buffers, self.used = {}, {}

    def append(self, name, old, new):
        """`old` (N, ...), usually what the last call of this name returned, with `new` (n, ...) behind it, on the device of `new`."""
        buffer, n = self.buffers.get(name), len(old) + len(new)
        if buffer is None or buffer.data_ptr() != old.data_ptr() or self.used[name] != len(old) or n > len(buffer) or buffer.device != new.device:
            buffer = new.new_empty(max(n, 3 * len(old) // 2), *new.shape[1:])
            buffer[:len(old)] = old
            self.buffers[name] = buffer
        buffer[len(old):n] = new
        self.used[name] = n
        return buffer[:n]


class EpisodeGraph:
    """The episodes of one memory in the order they were told, as tensors.

    Edges are not stored: those in time follow from the order, those of similarity are drawn when a question is asked. `keys`
    are worked out at the next question after a change, of those episodes whose neighbourhood changed; while training, whose
    every step is a change, they are not kept. Nor are the states that token keys are made of, but while training: `states` (all tokens, D).
    """

    def __init__(self, config, hidden_size, device):
        self.config, self.device = config, device
        self.next_id = 0
        self.clear(hidden_size)

    def clear(self, hidden_size):
        long = lambda *shape: torch.zeros(*shape, dtype=torch.long, device=self.device)
        self.ids, self.texts, self.room = [], [], Growing()
        self.tokens = TokenStore(long(0), torch.zeros(0, sum(key_widths(self.config)), dtype=torch.float16, device=self.device), long(0))
        self.states = None
        self.nodes = torch.zeros(0, node_width(self.config, hidden_size), device=self.device)   # (N, D or 2 D)
        self.keys = None

    def __len__(self):
        return len(self.ids)

    def add(self, texts, parts):
        """Append episodes. parts: what GemmaWithMemory.written made of the texts. Returns their ids."""
        new_ids = list(range(self.next_id, self.next_id + len(texts)))
        self.next_id += len(texts)
        self.ids += new_ids
        self.texts += texts
        ids, keys, tokens = self.tokens.ids, self.tokens.keys, sum(len(store.ids) for store, _ in parts)
        home = self.device if (len(ids) + tokens) * keys.shape[1] * keys.itemsize <= ON_DEVICE else "cpu"
        for store, nodes in parts:
            ids, keys = self.room.append("ids", ids, store.ids), self.room.append("token keys", keys, store.keys.to(home))
            self.nodes = self.room.append("nodes", self.nodes, nodes)
        self.tokens = TokenStore(ids, keys, torch.cat((self.tokens.lengths, *(store.lengths for store, _ in parts))))
        self.states = None
        self.keys = None if self.keys is None else self.keys[:-1]          # the last one has got another neighbour
        return new_ids

    def forget(self, episode_id):
        """Remove an episode; its neighbours in time become each other's. Raises InputError for an unknown id."""
        if episode_id not in self.ids:
            raise InputError(f"expected the id of a stored episode, got {episode_id!r}; recall() lists them.")
        row = self.ids.index(episode_id)
        keep = torch.arange(len(self.ids), device=self.device) != row
        start, length = int(self.tokens.starts[row]), int(self.tokens.lengths[row])
        cut = lambda flat: torch.cat((flat[:start], flat[start + length:]))
        self.tokens = TokenStore(cut(self.tokens.ids), cut(self.tokens.keys), self.tokens.lengths[keep])
        del self.ids[row], self.texts[row]
        self.nodes = self.nodes[keep]
        self.states = self.keys = None

    def view(self, injection):
        """The MemoryView of this one memory (G = 1), with gradients while the injection layer trains."""
        N, training = len(self), injection.training
        valid = torch.ones(1, N, dtype=torch.bool, device=self.device)
        if training:
            self.keys = injection.gnn.keys(self.nodes, *injection.edges(valid))
        done = 0 if self.keys is None else len(self.keys)
        for start in range(done, N, BLOCK):                                # with a neighbour on either side
            stop, first, last = min(N, start + BLOCK), max(0, start - 1), min(N, start + BLOCK + 1)
            keys = injection.gnn.keys(self.nodes[first:last], *injection.edges(valid[:, first:last]))[start - first:stop - first]
            self.keys = self.room.append("keys", keys[:0] if self.keys is None else self.keys, keys)
        if training:
            self.tokens.keys = injection.token_keys(self.tokens.ids, self.states, self.tokens.lengths)
        return MemoryView(self.keys[None], self.nodes[None], valid, torch.arange(N, device=self.device)[None], self.tokens)


def node_width(config, hidden_size):
    """Width of an episode's node, of `node_features`."""
    return hidden_size * (2 if config.node_features == "both" else 1)


def key_widths(config):
    """Widths of the three parts of a token's key: what it is read by, what it is matched by, what it means to a reader."""
    width = config.heads * config.token_key_dim
    return width, width, config.reading_dim if config.reading_layers and config.read == "token" else 0


def node_features(config, states, embeddings):
    """What the mean of is an episode's node: states and embeddings, each (tokens, D) -> (tokens, D or 2 D)."""
    if config.node_features == "both":
        return torch.cat((states, embeddings), -1).float()
    return (states if config.node_features == "hidden" else embeddings).float()


def working_dtype(device):
    """What features and keys are computed in: float32, but while training on a GPU."""
    return torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32


# ---------------------------------------------------------------------------------------------- the injection layer

LOOKBACK = 2                         # sentences before a pronoun's that may say who is meant
NEAR = 2                             # tokens before and after one that may be what the question says
WORDS = 12                           # the most telling words of a question are compared
WINDOW = 32                          # tokens that ask together where no prompt is marked
HUSHED = 0.1                         # and what they find is heard where null weighs less than this: nobody may have asked


@dataclass
class Question:
    """What asks: R questions of up to T tokens."""

    features: torch.Tensor           # (R, T, F)
    mask: torch.Tensor               # (R, T): which tokens belong to the question

    def pool(self):
        return pooled(self.features, self.mask)[:, None]                                       # (R, 1, F)

    def last(self):
        """Index of each question's last token, (R,)."""
        return (self.mask * torch.arange(self.mask.shape[1], device=self.mask.device)).argmax(1)


@dataclass
class Reading:
    """What a question found. Weights are log-probabilities, the null episode last; lists hold one entry a hop."""

    context: torch.Tensor            # (R, T, H, D) what was read, before the value maps
    asked: list                      # (R, H, N + 1): over all episodes by their keys, at the last position of the question
    candidates: list                 # (R, k): the best of them, rows of the memory
    ranked: list                     # (R, H, k + 1): over the candidates, compared word by word, at the same position
    chosen: list                     # (R, r): the best of those, rows of the memory
    weights: list                    # (R, T, H, r + 1): over these, at every position
    token_ids: torch.Tensor          # (R, r, M) what stands in them; -1 where nothing does; at the last hop
    token_weights: torch.Tensor      # (R, T, H, r, M): inside each of them, at the last hop
    end_weights: torch.Tensor = None # (R, T, H, r): on the end that stands behind each, "I have nothing more to say"
    end: int = -1                    # the token that this end is


class MemoryInjectionLayer(nn.Module, Injection):
    """Reads the memory with the hidden states after layer `inject_after` and adds what it read to them."""

    def __init__(self, config, hidden_size, embedding, end=0):
        """embedding: the base's frozen table, (V, D), kept out of this module's parameters; end: the token that ends an answer."""
        super().__init__()
        D, H = hidden_size, config.heads
        self.config, self.end = config, end
        read, match, meaning = key_widths(config)
        self.read_by, self.match_by, self.mean_by = slice(read), slice(read, read + match), slice(read + match, None)
        self.table = [embedding]     # in a list, so that it is neither saved nor trained with this module
        nodes = node_width(config, D)
        self.gnn = EpisodicMemoryGNN(nodes, H, config.key_dim, config.gat_dim, config.graph, config.cosine_keys)
        self.register_buffer("state_mean", torch.zeros(D))
        self.register_buffer("state_std", torch.ones(D))
        self.sentence = SentenceAttention(2 * D, config.sentence_dim, config.sentence_layers) if config.sentence_layers else None
        linear = lambda width, more=0: nn.Linear(2 * D + more, H * width, bias=False)
        key = lambda: linear(config.token_key_dim, config.sentence_dim if self.sentence else 0)
        each_hop = lambda make: nn.ModuleList(make() for _ in range(config.hops))
        self.query_own, self.query_pool = linear(config.key_dim), linear(config.key_dim)
        self.hop_query = nn.ModuleList(nn.Linear(D, H * config.key_dim, bias=False) for _ in range(config.hops - 1))
        for hop in self.hop_query:
            nn.init.zeros_(hop.weight)                                     # hop 2 starts by asking what hop 1 asked
        if config.read == "token":
            self.token_query_own = linear(config.token_key_dim)
            self.token_query_pool = each_hop(lambda: linear(config.token_key_dim))
            self.token_key_own, self.token_key_before = key(), key()
            self.log_token_temperature = nn.Parameter(torch.full((H,), 5.0).log())
            self.end_key = nn.Parameter(torch.randn(H, config.token_key_dim) / config.token_key_dim ** 0.5)
        if meaning:
            self.meaning = nn.Linear(2 * D + (config.sentence_dim if self.sentence else 0), meaning, bias=False)
            self.understand = ReadingAttention(2 * D, D, meaning, config.reading_layers)
            self.understood_key = nn.Linear(meaning, read, bias=False)
            self.fits = nn.Linear(meaning, H)
            with torch.no_grad():                                          # the other parts lead at first
                self.understood_key.weight.mul_(0.2), self.fits.weight.mul_(0.2)
            if config.similar_edges:
                self.outdated = SimilarityEdges(meaning)
        if config.match:
            self.match_query, self.match_key = each_hop(lambda: linear(config.token_key_dim)), key()
            self.match_weight = each_hop(lambda: nn.Linear(2 * D, H))
            self.match_found = nn.ModuleList(nn.Linear(D, H * config.token_key_dim) for _ in range(config.hops - 1))
            self.match_threshold = nn.Parameter(torch.full((H,), 0.4))
            self.log_match_temperature = nn.Parameter(torch.full((H,), 8.0).log())
            if config.said and config.read == "token":
                self.said_weight = nn.Parameter(torch.zeros(config.hops, H, 2 * NEAR + 1))
                with torch.no_grad():
                    self.said_weight[..., NEAR] = -1.0                     # of the token itself
            if config.time_edges:
                self.lookback = nn.Linear(nodes, LOOKBACK * H)
            if config.similar_edges:
                self.similarity = SimilarityEdges(nodes)
        start = torch.eye(D) * config.value_scale if config.identity_values else torch.randn(D, D) * config.value_scale / D ** 0.5
        self.value_map = nn.Parameter(start)                               # (D, D)
        self.view = None                                                   # the MemoryView to read; None: stay silent
        self.reading = None                                                # the last Reading, for recall and --why

    def edges(self, valid):
        """The GAT's edges in G memories, valid (G, N); none without a graph or without edges in time."""
        return time_edges(valid if self.config.time_edges and self.config.graph else valid[:, :1])

    # -- tokens

    def heads(self, x):
        return x.unflatten(-1, (self.config.heads, -1))                    # (..., H * C) -> (..., H, C)

    def values(self, ids):
        """The value of a token: its row of the embedding table, at the size that RMSNorm gives it. (...,) -> (..., D)."""
        rows = F.embedding(ids, self.table[0])
        return F.rms_norm(rows, rows.shape[-1:])

    def features(self, ids, states):
        """What asks and what is asked: a token's state in its sentence, and the token as such. (...,), (..., D) -> (..., F)."""
        x = torch.cat((((states.float() - self.state_mean) / self.state_std).clamp(-10, 10), self.values(ids).float()), -1)
        return F.dropout(x.to(working_dtype(x.device)), self.config.dropout, self.training)

    def token_keys(self, ids, states, lengths):
        """Keys of the tokens of episodes that lie end to end: ids (all,), states (all, D), lengths (episodes,) -> (all, 2 * H * C + reading_dim).

        The key that a token is read by also says what stands before it: "the token after the one I just said" is then one
        lookup, as in an induction head (https://arxiv.org/abs/2209.11895).
        """
        x = self.features(ids, states)
        if self.sentence is not None:
            x = torch.cat((x, self.sentence(x, lengths).to(x.dtype)), -1)
        nothing = states.new_zeros(len(ids), self.config.heads * self.config.token_key_dim)
        unit = lambda key: F.normalize(self.heads(key).float(), dim=-1).flatten(1)
        read = match = nothing.float()
        if self.config.read == "token":
            before = self.token_key_before(x).roll(1, 0).index_fill(0, lengths.cumsum(0) - lengths, 0.0)   # nothing before the first
            read = unit(self.token_key_own(x) + before)
        if self.config.match:
            match = unit(self.match_key(x))
        meaning = F.rms_norm(self.meaning(x).float(), (self.config.reading_dim,)) if hasattr(self, "meaning") else nothing[:, :0].float()
        return torch.cat((read, match, meaning), 1).to(working_dtype(ids.device))

    # -- asking

    def read(self, x, question, view, memo=None):
        """x (R, T, F) features of the positions that read; question: a Question. Returns a Reading.

        memo: a dict that keeps what the question chose, for `read_on` at later positions.
        """
        R, T, _ = x.shape
        rows, last = torch.arange(R, device=x.device), question.last() if T > 1 else torch.zeros(R, dtype=torch.long, device=x.device)
        pool = question.pool()
        of_all = self.query_pool(pool)                                     # what the question as a whole asks
        query, found, kept = self.queries(x, of_all), None, []
        spare = 0 if memo is None else -(view.tokens.longest + 1) % 32     # what is kept differs less in shape: see gemma.Decoder
        reading = Reading(None, [], [], [], [], [], None, None, None, self.end)
        for hop in range(self.config.hops):
            # The last position of the question chooses for all.
            choice = self.choose(hop, question, pool, self.heads(query[rows, last]), found[rows, last] if hop else None, view, spare)
            kept.append(choice["kept"])
            weights, inside, reading.context = self.attend(hop, x, query, kept[-1])
            reading.weights.append(weights)
            for name in ("asked", "candidates", "ranked", "chosen"):
                getattr(reading, name).append(choice[name])
            if hop + 1 < self.config.hops:
                # What was found asks on: "Maria's brother is Tom" turns a question about Maria into one about Tom.
                found = reading.context.mean(2)
                query = query + self.hop_query[hop](found)
        reading.token_ids, reading.token_weights, reading.end_weights = choice["token_ids"], inside[..., :-1], inside[..., -1]
        if memo is not None:
            memo.update({name: torch.stack([of[name] for of in kept]) for name in kept[0]}, query=of_all)
        return reading

    def choose(self, hop, question, pool, at, found, view, spare):
        """Which episodes are read. pool (R, 1, F) the whole question; at (R, H, C) what asks; found (R, D) by the hop before, or
        None; spare: empty places behind an episode's tokens. Returns what a Reading has of these names, and `kept`, what
        `attend` needs to know of those that are read."""
        config, (G, N), R = self.config, view.valid.shape, len(at)
        graph, count = torch.arange(R, device=at.device) // (R // G), view.valid.sum(1)
        # 1. Which episodes? The best k by their keys.
        asked = self.gnn.log_weights(at.view(G, R // G, config.heads, -1), view.keys, view.valid, count).view(R, config.heads, N + 1)
        best = asked[..., :-1].exp().mean(1).topk(min(config.candidates, N), dim=-1).indices               # (R, k)
        keys, valid = view.keys[graph[:, None], best], view.valid[graph[:, None], best]
        weigh = lambda evidence: self.gnn.log_weights(at[:, None], keys, valid, count[graph], evidence)[:, 0]          # (R, H, k + 1)
        # 2. Compared word by word, which of these? The best few will be read.
        evidence, said_of = self.compare(hop, question, found, view, graph, best, keys) if config.match \
            else (keys.new_zeros(R, config.heads, best.shape[1]), None)
        ranked = weigh(evidence)
        top = ranked[..., :-1].exp().mean(1).topk(min(config.readable, best.shape[1]), dim=-1).indices     # (R, r)
        chosen, each = best.gather(1, top), top[:, None].expand(-1, config.heads, -1)
        place, real = (F.pad(t, (0, spare)) for t in view.tokens.places(view.episodes[graph[:, None], chosen]))        # (R, r, M)
        ids, token_keys = view.tokens.ids[place], self.heads(view.tokens.keys_at(place, self.read_by))
        kept = dict(keys=keys.gather(1, top[..., None, None].expand(-1, -1, *keys.shape[2:])), valid=valid.gather(1, top), count=count[graph],
                    real=F.pad(real, (0, 1), value=True), values=self.values(F.pad(ids, (0, 1), value=self.end)).flatten(1, 2).to(at.dtype))
        if hasattr(self, "meaning"):
            # 3. Side by side with the question, what do these say to it?
            told = self.understand(question.features, question.mask, found, view.tokens.keys_at(place, self.mean_by), real)    # (R, r, M, dim)
            token_keys = F.normalize(token_keys + self.heads(self.understood_key(told)).float(), dim=-1).to(token_keys.dtype)
            at_hand = chosen.masked_fill(~kept["valid"], -1)                                               # an empty place silences nobody
            evidence = evidence.scatter_add(2, each, self.judge(told, real, kept["keys"], at_hand))
            ranked = weigh(evidence)
        kept["evidence"] = evidence.gather(2, each)
        if config.read == "token":
            end = F.normalize(self.end_key, dim=-1).to(token_keys.dtype).expand(*token_keys.shape[:2], 1, -1, -1)
            kept.update(of_all=self.token_query_pool[hop](pool), token_keys=torch.cat((token_keys, end), 2))           # (R, r, M + 1, H, C)
        if hasattr(self, "said_weight"):
            kept["said"] = F.pad(said_of(chosen), (0, spare))                                              # (R, H, r, M)
        return dict(asked=asked, candidates=best, ranked=ranked, chosen=chosen, token_ids=ids.masked_fill(~real, -1), kept=kept)

    def read_on(self, x, memo):
        """What later positions read, x (R, T, F), of the episodes that the question chose: context (R, T, H, D)."""
        query = self.queries(x, memo["query"])
        for hop in range(self.config.hops):
            kept = {name: tensor[hop] for name, tensor in memo.items() if name != "query"}
            context = self.attend(hop, x, query, kept)[-1]
            query = query + self.hop_query[hop](context.mean(2)) if hop + 1 < self.config.hops else query
        return context

    def queries(self, x, of_all):
        """What positions x (R, T, F) ask with: their own part and that of the question as a whole, of_all (R, 1, H * C)."""
        return of_all + self.query_own(x) if self.config.query == "token" else of_all.expand(*x.shape[:2], -1)   # (R, T, H * C)

    def attend(self, hop, x, query, kept):
        """Every position for itself, among the episodes that are read. kept: what `read` found out about these.

        Returns log-weights (R, T, H, r + 1) of the episodes and null, attention inside each (R, T, H, r, M + 1), the end last,
        context (R, T, H, D).
        """
        # 4. Which of them, or null?
        weights = self.gnn.log_weights(self.heads(query), kept["keys"], kept["valid"], kept["count"], kept["evidence"])
        # 5. Which tokens inside them, or the end of what they have to say?
        inside = self.weigh_tokens(hop, x, kept.get("of_all"), kept.get("token_keys"), kept["real"], kept.get("said"))
        return weights, inside, self.gnn.pooled_context(weights, inside, kept["values"])

    def compare(self, hop, question, found, view, graph, best, keys):
        """Evidence (R, H, k) for the candidates `best` (R, k): each word of the question looks for its like among theirs.

        Late interaction as in ColBERT (https://arxiv.org/abs/2004.12832): of each word the best match counts, weighted by
        how telling the word is. found (R, D): what the hop before found is one word more. The other way round, a function
        tells how like each token of an episode is to what the question says: episodes (R, r) -> (R, H, r, M).
        """
        G, N = view.valid.shape
        telling = self.match_weight[hop](question.features).float().masked_fill(~question.mask[..., None], -1e4)   # (R, T, H)
        words = telling.detach().mean(-1).topk(min(WORDS, telling.shape[1]), dim=1).indices[..., None]             # (R, W, 1)
        telling = telling.gather(1, words.expand(-1, -1, telling.shape[-1]))
        q = self.match_query[hop](question.features.gather(1, words.expand(-1, -1, question.features.shape[-1])))
        if found is not None:
            q = torch.cat((q, self.match_found[hop - 1](found)[:, None].to(q.dtype)), 1)
            telling = F.pad(telling, (0, 0, 0, 1))
        q = F.normalize(self.heads(q).float(), dim=-1)                                                     # (R, W, H, C)
        real = F.pad(question.mask.gather(1, words[..., 0]), (0, int(found is not None)), value=True)
        q = q * real[..., None, None]                                                                      # padding is like nothing
        # Questions on one memory have candidates in common: each of these, and of those they may borrow from, is compared once.
        back = range(1 + LOOKBACK * self.config.time_edges)
        wanted = torch.stack([(best - b).clamp(min=0) for b in back])                                      # (B, R, k)
        needed = torch.zeros(G, N, device=q.device).scatter(1, wanted.transpose(0, 1).reshape(G, -1), 1.0)
        several = needed.topk(int(needed.sum(1).max()), dim=1).indices                                     # (G, U)
        like, said = zip(*(self.likeness(q, view.tokens, view.episodes.gather(1, some)) for some in several.split(256, dim=1)))
        like, said = torch.cat(like, -1), torch.cat(said, -2)                                              # (R, H, W, U), (R, H, U, M)
        slot = torch.zeros(G, N, dtype=torch.long, device=q.device).scatter(1, several, torch.arange(several.shape[1], device=q.device).expand_as(several))
        at = [slot[graph[:, None], row][:, None, None].expand(-1, *like.shape[1:3], -1) for row in wanted]
        nodes = self.gnn.standardise(view.nodes[graph[:, None], best])                                     # (R, k, D)
        most = like.gather(-1, at[0])                                                                      # (R, H, W, k)
        if self.config.time_edges:
            # Beside its own words a sentence may borrow those of the sentences before it: it may start with "she".
            # The - 1 keeps the gate mostly shut at first: few sentences do.
            borrow = torch.sigmoid(self.lookback(nodes).float() - 1).unflatten(-1, (LOOKBACK, -1)).permute(2, 0, 3, 1)     # (LOOKBACK, R, H, k)
            for b in back[1:]:
                most = torch.maximum(most, like.gather(-1, at[b]) * (borrow[b - 1] * (best >= b)[:, None])[:, :, None])
        match = torch.einsum("rhwk,rwh->rhk", most, telling.softmax(1))
        evidence = self.log_match_temperature.exp()[:, None] * (match - self.match_threshold[:, None])
        if self.config.similar_edges:
            told = best.masked_fill(~view.valid[graph[:, None], best], -1)                                 # an empty place silences nobody
            evidence = evidence + self.similarity(match.mean(1), keys, nodes, told)[:, None]

        def said_of(chosen):
            return said.gather(2, slot[graph[:, None], chosen][:, None, :, None].expand(-1, said.shape[1], -1, said.shape[-1]))
        return evidence, said_of

    def likeness(self, q, tokens, episodes):
        """How like each word of R questions is to the most similar word of each episode, and each word of an episode to the
        most similar one of the question: q (R, W, H, C), episodes (G, U) -> (R, H, W, U), (R, H, U, M), at least 0."""
        place, real = tokens.places(episodes)                                                              # (G, U, M)
        keys = self.heads(tokens.keys_at(place, self.match_by)) * real[..., None, None]
        q = q.unflatten(0, (len(episodes), -1)).to(keys.dtype)
        cosine = torch.einsum("gswhc,gumhc->gshwum", q, keys)
        return cosine.max(-1).values.clamp(min=0).flatten(0, 1).float(), cosine.max(3).values.clamp(min=0).flatten(0, 1).float()

    def judge(self, told, real, keys, episodes):
        """Evidence (R, H, r) for the episodes that are read, now that they have been read: told (R, r, M, dim) their tokens, of
        which `real` (R, r, M) exist, keys (R, r, H, C), episodes (R, r) their places in time."""
        length = real.sum(-1, keepdim=True).clamp(min=1)                                                   # (R, r, 1)
        fits = self.fits(told).float().masked_fill(~real[..., None], -1e4).logsumexp(2) - length.log()     # (R, r, H)
        if self.config.similar_edges:
            whole = (told * real[..., None]).sum(2) / length
            fits = fits + self.outdated(fits.mean(2), keys, whole, episodes)[..., None]
        return fits.mT

    def weigh_tokens(self, hop, x, of_all, keys, real, said):
        """Attention over the tokens of each episode and its end: (R, T, H, r, M + 1). With read="episode" all tokens weigh the same.

        said (R, H, r, M): what the question says itself is hardly its answer; what stands near it may be.
        """
        if self.config.read == "episode":
            real = F.pad(real[..., :-1], (0, 1))
            uniform = real / real.sum(-1, keepdim=True).clamp(min=1)
            return uniform[:, None, None].expand(-1, x.shape[1], self.config.heads, -1, -1)
        query = of_all + self.token_query_own(x) if self.config.query == "token" else of_all.expand(*x.shape[:2], -1)
        query = F.normalize(self.heads(query), dim=-1) * self.log_token_temperature.exp()[:, None]
        scores = torch.einsum("rthc,rkmhc->rthkm", query.to(keys.dtype), keys)
        if said is not None:
            around = F.pad(said, (NEAR, NEAR)).unfold(-1, 2 * NEAR + 1, 1)                                 # (R, H, r, M, 2 NEAR + 1)
            weight = self.said_weight[hop] * self.log_token_temperature.exp()[:, None]
            scores = scores + F.pad(torch.einsum("rhkmn,hn->rhkm", around, weight), (0, 1))[:, None].to(scores.dtype)
        return scores.masked_fill(~real[:, None, None], -1e4).softmax(-1)

    def inject(self, h, context, silent):
        """h + what was read, at the scale of each hidden state; `silent` (R, T) positions stay as they are."""
        delta = context.sum(2) @ self.value_map
        size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
        return h + (delta.float() * size).masked_fill(silent[..., None], 0.0).to(h.dtype)

    # -- the socket

    def begin(self, input_ids, attention_mask, question_mask, cache):
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        self.input_ids = input_ids
        self.speaking = real & (input_ids != BOS)                          # <bos>, an outlier, neither asks nor listens
        self.question = None if question_mask is None else question_mask.bool() & self.speaking
        self.memo = None if cache is None else cache.memory                # full while decoding: the question was put at prefill

    def after_layer(self, layer, h):
        if layer != self.config.inject_after or self.view is None:
            return h
        x = self.features(self.input_ids, h)
        if self.question is None and not self.memo:
            context, heard = self.read_everywhere(x)
            return self.inject(h, context, ~(self.speaking & heard))
        if self.memo:
            return self.inject(h, self.read_on(x, self.memo), ~self.speaking)
        self.reading = self.read(x, Question(x, self.question), self.view, self.memo)
        return self.inject(h, self.reading.context, ~self.speaking)

    def read_everywhere(self, x):
        """No prompt is marked: every position asks for itself, with the WINDOW tokens up to it, so that none sees its future.

        Returns the context (B, T, H, D), and where it is to be heard (B, T): text that asks nothing is left as it is, to the
        bit, so a position hears nothing unless the memory is nearly sure that it was asked.
        """
        B, T, _ = x.shape
        windows = F.pad(x, (0, 0, WINDOW - 1, 0)).unfold(1, WINDOW, 1).flatten(0, 1)                       # (B * T, F, WINDOW)
        masks = F.pad(self.speaking, (WINDOW - 1, 0)).unfold(1, WINDOW, 1).flatten(0, 1)                   # (B * T, WINDOW)
        parts = [self.read(at, Question(window.mT, mask), self.view)
                 for at, window, mask in zip(x.reshape(B * T, 1, -1).split(256), windows.split(256), masks.split(256))]
        null = torch.cat([part.ranked[-1][..., -1].exp().mean(1) for part in parts])                       # (B * T,)
        return torch.cat([part.context for part in parts]).unflatten(0, (B, T))[:, :, 0], (null < HUSHED).view(B, T)


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


class MemoryModel(nn.Module):
    """A frozen Gemma and what is trained beside it. Every design of a memory shares this: prompts, answers, files.

    A design says in `variant` what it is called and in `Config` what its settings are, makes `injection` (an nn.Module that is
    an Injection: all that trains) and, if it is told facts, `memory_graph` (what it holds: ids, texts, a length).
    gemma: a Gemma; tokenizer: its Tokenizer; config: a Config; base_name: what find_base() finds it by.
    """

    variant, Config = "", Settings
    saved_as = torch.float32             # dtype of matrices in files
    told = True                          # facts are told, with add_to_memory; False: what it knows was trained into it

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__()
        self.config = config or self.Config()
        self.gemma = gemma.eval().requires_grad_(False)
        self.tokenizer, self.base_name = tokenizer, base_name
        self.trained = {}                                                  # how the weights were made, saved with them
        self.answered = []                                                 # the tokens of the last answers, for --explain
        newlines = [i for i in range(END_OF_TURN + 1, tokenizer.vocab_size) if tokenizer.pieces.id_to_piece(i).startswith("\n")]
        self.stop = {EOS, END_OF_TURN, *tokenizer.encode("\n", bos=False), *newlines, tokenizer.pieces.piece_to_id("<0x0A>")}

    def train(self, mode=True):
        super().train(mode)
        self.gemma.eval()                                                  # the base stays in eval, whatever its parent does
        return self

    def trainable_parameters(self):
        """All that trains; the optimizer gets these and nothing else."""
        return list(self.injection.parameters())

    def parameter_groups(self):
        """The same as [(parameters, what the learning rate is multiplied by), ...]."""
        return [(self.trainable_parameters(), 1.0)]

    def token_ids(self, text):
        """The tokens of a fact, with <bos>. Raises InputError for an empty text, one that is no str, or one longer than the context."""
        most = self.gemma.config.max_position_embeddings
        far_too_long = isinstance(text, str) and len(text) > most * self.tokenizer.longest         # megabytes: not worth encoding
        ids = [] if far_too_long else self.tokenizer.encode(text)
        if not text.strip():
            raise InputError("expected a fact, got an empty text; leave it out.")
        if far_too_long or len(ids) > most:
            raise InputError(f"expected a fact of at most {most} tokens, got {f'{len(text)} characters' if far_too_long else len(ids)} "
                             f"({text[:40]!r}…); split it into sentences.")
        return ids

    # -- asking

    def _open(self):
        """Before anything is asked: point the injection at this model's own memory, as it is now."""

    def weights(self, hop=-1):
        """Of the last question(s): weights of what is remembered, (B, N + 1), null last; None for a design without such."""

    def best(self, top_k):
        """What `recall` returns, of the last question."""
        weights, graph = self.weights()[0], self.memory_graph
        best = weights[:-1].topk(min(top_k, len(graph)))
        return [(graph.ids[i], w, graph.texts[i]) for w, i in zip(best.values.tolist(), best.indices.tolist())], weights[-1].item()

    def forward(self, input_ids, attention_mask=None, question_mask=None):
        """Logits (B, T, V) of the base with its own memory; with an empty memory, bit-identical to the base.

        question_mask (B, T) marks the prompt, which asks as a whole; without it every position asks for itself.
        """
        self._open()
        return self.gemma(input_ids, attention_mask, question_mask, injection=self.injection)

    def stream(self, input_ids, **options):
        """As Gemma.stream, with the memory. The whole of input_ids is the question; with `compile`, decoding is compiled."""
        self._open()
        return self.gemma.stream(input_ids, injection=self.injection, **options)

    def generate(self, input_ids, max_new_tokens=32, temperature=0.0, **options):
        """Prompt and continuation, (B, T + new). Never refuses; see `answer`."""
        self._open()
        return self.gemma.generate(input_ids, max_new_tokens, temperature=temperature, injection=self.injection, **options)

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

    def answer(self, question, **options):
        """The answer to a question, or the list of answers to a list of questions, which are asked in one batch.

        Greedy unless options (max_new_tokens, temperature, top_k, top_p, seed, compile) say otherwise. DONT_KNOW where the null
        episode's weight passes the threshold, and whenever a memory that is told facts is empty.
        """
        questions = [question] if isinstance(question, str) else list(question)
        answers = ["".join(pieces) for pieces in zip(*self.answer_stream(questions, **options))]
        return answers[0] if isinstance(question, str) else answers

    @torch.no_grad()
    def answer_stream(self, questions, max_new_tokens=64, **options):
        """As `answer` for a list of questions, but yields the answers as they grow: at every step a list of new pieces."""
        ids, mask = self.batch(questions, max_new_tokens) if questions else (None, None)
        self.answered = tokens = [[] for _ in questions]
        if not questions or self.told and not len(self.memory_graph):
            yield [DONT_KNOW] * len(questions)
            return
        said = [""] * len(questions)
        for token in self.stream(ids, attention_mask=mask, max_new_tokens=max_new_tokens, stop=self.stop, **options):
            if not tokens[0]:
                weights = self.weights()
                known = [True] * len(questions) if weights is None else (weights[:, -1] <= self.config.null_threshold).tolist()
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

    def to_save(self):
        """The tensors that files hold, by name."""
        return self.injection.state_dict()

    def save_pretrained(self, folder):
        """Write memory.safetensors and memory.json: the memory's weights, its config, and which base they belong to.

        Not the base, and not the episodes: their text is the user's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / "memory.safetensors.new"
        with replacing(new) as temporary:
            save_file({name: t.detach().to("cpu", t.dtype if not t.is_floating_point() else self.saved_as if t.ndim > 1 else torch.float32).contiguous()
                       for name, t in self.to_save().items()}, temporary)
        write_json(folder / "memory.json", dict(
            variant=self.variant, memory=asdict(self.config), trained=self.trained, sha256=hashlib.sha256(new.read_bytes()).hexdigest(),
            base=dict(name=str(self.base_name), config=self.gemma.config.fingerprint(), tokenizer=self.tokenizer.hash,
                      weights=self.gemma.fingerprint())))
        new.replace(folder / "memory.safetensors")

    @classmethod
    def from_pretrained(cls, name=None, base=None, memory=None, dtype=None, device="cpu", config=None):
        """A trained memory on its base: "tiny", "gemma-3-270m", or a folder that save_pretrained wrote.

        base: another place to find the base (a folder or Hub id); with memory=None and name=None, a fresh memory on it, made
        as `config` (a Config) says.
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
            if saved.get("variant", "graph") != cls.variant:
                raise InputError(f"{folder}: expected a memory of the variant {cls.variant}, got {str(saved['variant'])[:40]!r}; variants.load opens every one.")
            base = base_of["name"] if base is None else base
        if base is None:
            raise InputError("expected the name of a memory or of a base model, got neither; try 'tiny'.")
        found = find_base(base)
        gemma = Gemma.from_pretrained(found, dtype=dtype, device=device)
        tokenizer = Tokenizer(find_model(found))
        if saved is None:
            return cls(gemma, tokenizer, config or cls.Config(chat=str(base).endswith("-it")), base).eval()
        for what, mine in (("config", gemma.config.fingerprint()), ("tokenizer", tokenizer.hash)):
            if base_of.get(what) != mine:
                raise InputError(f"{folder}: this memory was made for a base with {what} {base_of.get(what)!r}, got {mine!r}; "
                                 "use its own base or train a memory for this one.")
        if base_of.get("weights") != gemma.fingerprint():
            print(f"note: the memory in {folder} was trained on other weights of the same shape; recall may suffer.", file=sys.stderr)
        model = cls(gemma, tokenizer, cls.Config.from_dict(saved["memory"], f"{folder}/memory.json"), base)
        model.trained = saved.get("trained", {})
        model.load_memory(folder)
        return model.eval()

    def load_memory(self, folder):
        """Load the weights that save_pretrained wrote, strictly. Raises InputError where they are not those that memory.json
        names by their hash, or naming the tensor that is missing, unexpected or misshapen."""
        digest, file = read_json(Path(folder) / "memory.json").get("sha256"), Path(folder) / "memory.safetensors"
        try:
            new = file.with_name(file.name + ".new")                       # there if a save ended between its two files
            blobs = [f.read_bytes() for f in (file, new) if f.is_file()]
            if digest is not None:                                         # saved before memories had one: nothing to compare
                blobs = [blob for blob in blobs if hashlib.sha256(blob).hexdigest() == digest]
            if not blobs:
                raise InputError(f"{file}: expected the weights that memory.json was saved with, but they are missing or damaged; "
                                 "restore both files as they were saved.")
            tensors = load(blobs[0])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: expected a whole safetensors file ({str(error)[:100]}); restore the one that was saved.") from None
        mine = self.injection.state_dict()
        for name in sorted(set(mine) ^ set(tensors)):
            raise InputError(f"{file}: tensor {name} is {'missing' if name in mine else 'unexpected'}; restore the file that was saved.")
        for name, tensor in tensors.items():
            dtypes = (torch.float32, torch.bfloat16) if mine[name].is_floating_point() else (mine[name].dtype,)
            if tensor.shape != mine[name].shape or tensor.dtype not in dtypes or not bool(tensor.isfinite().all()):
                raise InputError(f"{file}: expected {name} to be finite, of shape {tuple(mine[name].shape)}, got {tensor.dtype} "
                                 f"{tuple(tensor.shape)}; restore the file that was saved.")
        self.injection.load_state_dict(tensors)


class GemmaWithMemory(MemoryModel):
    """A frozen Gemma and the graph memory that it answers from."""

    variant, Config, saved_as = "graph", MemoryConfig, torch.bfloat16

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        if self.config.inject_after > len(gemma.layers):
            raise InputError(f"expected inject_after to be one of the base's {len(gemma.layers)} layers, got {self.config.inject_after}.")
        end = tokenizer.encode("\n", bos=False)[0]
        self.injection = MemoryInjectionLayer(self.config, gemma.config.hidden_size, gemma.embed_tokens.weight, end).to(gemma.device)
        self.memory_graph = EpisodeGraph(self.config, gemma.config.hidden_size, gemma.device)

    def train(self, mode=True):
        was_training, graph = self.training, self.memory_graph
        super().train(mode)
        if was_training and not mode and len(graph):                       # training changed what the keys are made with
            tokens, nodes = zip(*self.written([self.token_ids(text) for text in graph.texts]))
            graph.tokens, graph.nodes, graph.states, graph.keys = tokens[0].joined(tokens[1:]), torch.cat(nodes), None, None
        return self

    # -- writing

    def states(self, batch):
        """Token ids (lists, each with <bos>) -> states after layer `inject_after`, without <bos>: a list of (M, D)."""
        return self.encode(batch).split([len(row) - 1 for row in batch])

    @torch.no_grad()
    def encode(self, facts, done=lambda count: None):
        """Token ids of facts (lists, each with <bos>) -> states of their tokens after layer `inject_after`, without <bos>, end
        to end: (all, D). Calls done(how many) after each batch."""
        gemma, device = self.gemma, self.gemma.device
        lengths = torch.tensor([len(row) for row in facts], device=device)
        starts = (lengths - 1).cumsum(0) - lengths                         # where a row's <bos> would be, one before its first token
        states = torch.empty(sum(len(row) - 1 for row in facts), gemma.config.hidden_size, dtype=gemma.dtype, device=device)
        # Sentences of like length together: less padding. Long ones in smaller batches: bounded memory.
        order = sorted(range(len(facts)), key=lambda i: len(facts[i]))
        while order:
            size = max(1, min(256, 8192 // len(facts[order[:256][-1]])))
            batch, order = order[:size], order[size:]
            longest = len(facts[batch[-1]])
            ids = torch.tensor([facts[i] + [PAD] * (longest - len(facts[i])) for i in batch], device=device)
            rows, offset = torch.tensor(batch, device=device), torch.arange(longest, device=device)
            real = offset < lengths[rows, None]
            h = gemma.run_layers(gemma.embed(ids), Places(gemma.config, *ids.shape, real, None, device), 1, self.config.inject_after)
            keep = real & (offset > 0)
            states[(starts[rows, None] + offset)[keep]] = h[keep]
            done(len(batch))
        return states

    @torch.no_grad()
    def written(self, facts, done=lambda count: None):
        """Token ids of facts (lists, each with <bos>) -> what the memory keeps of them, part by part: a TokenStore, nodes (n, D).

        Their states, far larger, are let go after each part: room for a hundred thousand facts is room for their keys.
        """
        while facts:
            size = max(1, min(PART, 2 ** 24 // max(map(len, facts[:PART])) ** 2))      # of long ones fewer: all pairs of tokens attend
            part, facts = facts[:size], facts[size:]
            states = self.encode(part, done)
            ids = torch.tensor([token for row in part for token in row[1:]], dtype=torch.long, device=states.device)
            lengths = torch.tensor([len(row) - 1 for row in part], device=states.device)
            features = node_features(self.config, states, self.gemma.embed_tokens.weight[ids])
            owner = torch.arange(len(part), device=states.device).repeat_interleave(lengths)
            total = features.new_zeros(len(part), features.shape[1]).index_add(0, owner, features)
            yield TokenStore(ids, self.injection.token_keys(ids, states, lengths).half(), lengths), total / lengths[:, None]

    @torch.no_grad()
    def add_to_memory(self, text, progress=False):
        """Remember a text, or a list of texts, each as one episode. Returns its id, or the list of ids in order.

        Raises InputError, with nothing stored, for an empty text, one that is no str, or one longer than the context.
        """
        texts = [text] if isinstance(text, str) else list(text)
        reading = tqdm(texts, desc="reading", unit="fact", disable=not progress, file=sys.stderr, leave=False, delay=2)
        encoded = [self.token_ids(t) for t in reading]
        self.check_room(sum(map(len, encoded)), len(encoded))
        with tqdm(total=len(texts), desc="remembering", unit="fact", disable=not progress, file=sys.stderr, leave=False, delay=2) as bar:
            new = self.memory_graph.add(texts, list(self.written(encoded, bar.update)))
        return new[0] if isinstance(text, str) else new

    def check_room(self, tokens, episodes):
        """Raise InputError where so many more can't be kept: a sentence now is better than a machine that stands still later."""
        if self.gemma.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.gemma.device)[0]
        elif hasattr(os, "sysconf"):
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        else:
            return
        # keys and ids of each token and a node for each episode, twice while the new are joined to the old
        node = node_width(self.config, self.gemma.config.hidden_size)
        needed = 2 * (tokens * (2 * sum(key_widths(self.config)) + 8) + episodes * 4 * node)
        if needed > room:
            raise InputError(f"expected facts that fit into memory, got {episodes:,} that need {needed / 2 ** 30:,.1f} GB of "
                             f"{room / 2 ** 30:,.1f}; remember fewer at a time, in several memories.")

    def forget(self, episode_id):
        """Remove one episode. Raises InputError for an unknown id."""
        self.memory_graph.forget(episode_id)

    def clear_memory(self):
        self.memory_graph.clear(self.gemma.config.hidden_size)

    # -- asking

    def _open(self):
        """Point the injection layer at this model's own memory, as it is now."""
        self.injection.reading, graph = None, self.memory_graph
        if self.training and graph.states is None and len(graph):
            graph.states = self.encode([self.token_ids(text) for text in graph.texts])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            self.injection.view = graph.view(self.injection) if len(graph) else None

    def weights(self, hop=-1):
        """Of the last question(s): episode weights at the last prompt position of a hop, (B, N + 1), null last."""
        reading = self.injection.reading
        weights = torch.zeros_like(reading.asked[hop][:, 0])               # an episode that was no candidate weighs nothing
        null = torch.full_like(reading.candidates[hop][:, :1], weights.shape[1] - 1)
        return weights.scatter(1, torch.cat((reading.candidates[hop], null), 1), reading.ranked[hop].exp().mean(1))

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
        return self.best(top_k)
