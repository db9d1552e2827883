"""An episodic memory for a frozen Gemma: the store, the injection layer, and `GemmaWithMemory`, which joins them.

    facts    -> Gemma layers 1-8 -> token states -> mean -> GNN -> keys of the episodes
    question -> Gemma layers 1-8 -> h --query--> which episodes? -> do their words match? -> which tokens? -> h + what was read
                                                              -> Gemma layers 9 onward -> answer

Four ideas do the work; `bench/ladder.py` measures the first three, and what else was changed on the way:
  * the reader first chooses episodes, then tokens inside them: one vector per sentence can't carry a code or a name;
  * nor can it tell Juraj from Juzaj: the best candidates are compared with the question word by word;
  * what it reads of a token is that token's row of the embedding table, through a map that starts as a small identity:
    the frozen output head is the same table, so the memory speaks its language from the first step;
  * a null episode, whose value is nothing, takes the attention when no episode answers: so the memory can be silent.
With `reading_layers`, as in the memories that are shipped, the few episodes that are read are laid beside the question first: in
"Since 2019 it takes 12 minutes" it depends on the question which number is the answer.

Letters: G memories of a batch (1 outside of training) · R rows, R / G questions to each memory · T tokens of a row ·
N episodes · k candidates, of which r are read · M tokens of an episode · H heads · D hidden size · F = 2 D features of a
token · C head width. Where words are compared: W words of a question · U episodes that questions on one memory look at.
"""

from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from extras.memory_model import MemoryModel, Settings
from extras.room import Growing, free
from gemma import BOS, PAD, Injection, InputError, Places
from gnn import EpisodicMemoryGNN, ReadingAttention, SentenceAttention, SimilarityEdges, rms_norm, sent, time_edges

PART = 1024                          # facts that are written at a time
PART_ON_GPU = 4 * PART               # there: with more to choose from, those of a batch are of like length
BLOCK = 2 ** 16                      # episodes whose keys are worked out at a time
ON_DEVICE = 2 ** 31                  # bytes of token keys that a GPU holds; more of them live in the host's memory


@dataclass
class MemoryConfig(Settings):
    """What the memory is made of. The plan that this project grew from is node_features="embedding", query="pooled",
    read="episode"."""

    inject_after: int = 8            # the decoder layer, counted from 1, whose output asks and is added to
    heads: int = 4                   # H: each with keys of its own, of episodes and of tokens; what they read is added up
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
    said: bool = True                # False: readers don't know which words of an episode the question says itself
    marks: bool = True               # False: the reading attention doesn't mark where the answer begins and ends
    follow: bool = True              # False: words of the answer that have just been said aren't looked for in the episodes
    graph: bool = True               # False: keys without the GAT
    time_edges: bool = True          # previous <-> next; and a pronoun's sentence borrows the words of the two before it
    similar_edges: bool = True       # later candidates may silence earlier ones; this, said and borrowing need match
    cosine_keys: bool = True         # False: plain dot products
    identity_values: bool = True     # the value map starts as identity x value_scale; False: as a small random matrix
    value_scale: float = 0.05
    dropout: float = 0.0             # of features, while training
    null_threshold: float = 0.5      # answer() says it doesn't know when the null weight is above; chosen on validation data
    chat: bool = False               # questions as Gemma's chat turns (instruction-tuned base) instead of "Question: … Answer:"

    def check(self, source):
        def expect(right, what, got):
            if not right:
                raise InputError(f"{source}: expected {what}, got {repr(got)[:20]}.")

        most = dict(heads=64, sentence_layers=64, reading_layers=64, hops=8)   # a file could ask for more than any machine has
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name.endswith("_layers") else 1
            if type(f.default) is int:
                expect(least <= value <= most.get(f.name, 4096), f"{f.name} from {least} to {most.get(f.name, 4096)}", value)
            elif type(f.default) is float:
                expect(abs(value) < 1e6, f"{f.name} to be an ordinary number", value)                  # nor is NaN
        for name in ("sentence_dim", "reading_dim"):
            expect(getattr(self, name) % 4 == 0, f"{name} to be a multiple of 4", getattr(self, name))
        for name, choices in dict(node_features=("both", "hidden", "embedding"), query=("token", "pooled"), read=("token", "episode")).items():
            expect(getattr(self, name) in choices, f"{name} to be one of {', '.join(choices)}", getattr(self, name))
        expect(0 <= self.dropout < 1, "dropout from 0 to below 1", self.dropout)


# ------------------------------------------------------------------------------------------------------- the store

class TokenStore:
    """Tokens of many episodes, end to end, without padding: ids (all,), keys (all, 2 * H * C + reading_dim): what they are read
    by, what they are matched by, and what they mean (see `key_widths`); and where each episode lies.

    The <bos> that every episode was encoded with is left out: its state is an outlier that would drown the others. Keys are
    most of what a memory takes. They are small numbers, so float16 keeps them to a few parts in ten thousand in half the room.
    """

    def __init__(self, ids, keys, lengths, longest=None):
        """longest: of the lengths, if it is known; a GPU would have to be waited for."""
        self.ids, self.keys, self.lengths = ids, keys, lengths
        self.starts = lengths.cumsum(0) - lengths
        self.longest = longest if longest is not None else int(lengths.max()) if len(lengths) else 0

    def places(self, episodes, spare=0):
        """episodes (R, k) -> where their tokens are (R, k, M), and which of them are real (R, k, M); M is the longest's, and `spare` more."""
        offset = torch.arange(self.longest + spare, device=episodes.device)
        place = (self.starts[episodes][..., None] + offset).clamp(max=len(self.ids) - 1)
        return place, offset < self.lengths[episodes][..., None]

    def keys_at(self, place, part):
        """A part (a slice) of the keys of the tokens at `place` (...): (..., width), on the device of `place`, wherever they
        are kept. What is kept in half precision is computed with in full."""
        keys = picked(self.keys[:, part], place.to(self.keys.device)).to(place.device)
        return keys.float() if keys.dtype == torch.float16 else keys

    def joined(self, others):
        """These tokens, then those of other stores."""
        stores = (self, *others)
        ids, keys, lengths = (torch.cat([getattr(store, name) for store in stores]) for name in ("ids", "keys", "lengths"))
        return TokenStore(ids, keys, lengths, max(store.longest for store in stores))


def picked(x, at):
    """x[at] for a tensor `at` of one dimension or more; unlike that of an index, its gradient is added up without sorting, ten times as fast on a CPU."""
    return x.index_select(0, at.flatten()).unflatten(0, at.shape)


@dataclass
class MemoryView:
    """What the injection layer sees of G memories, each in the order it was told."""

    keys: torch.Tensor               # (G, N, H, C)
    nodes: torch.Tensor              # (G, N, D or 2 D), see node_width
    valid: torch.Tensor              # (G, N)
    episodes: torch.Tensor           # (G, N) rows of `tokens`
    tokens: TokenStore


class EpisodeGraph:
    """The episodes of one memory in the order they were told, as tensors.

    Edges are not stored: those in time follow from the order, those of similarity are drawn when a question is asked. `keys`
    hold those of the first episodes, as many as no change has reached since; the next question has the others worked out, and while
    training all of them, since every step is a change. States that token keys are made of are kept while training alone: `states`
    (all tokens, D).
    """

    def __init__(self, config, hidden_size, device):
        self.config, self.device, self.width = config, device, node_width(config, hidden_size)
        self.next_id = 0
        self.clear()

    def clear(self):
        long = lambda *shape: torch.zeros(*shape, dtype=torch.long, device=self.device)
        self.ids, self.texts, self.room, self.last = [], [], Growing(), None
        self.tokens = TokenStore(long(0), torch.zeros(0, sum(key_widths(self.config)), dtype=torch.float16, device=self.device), long(0))
        self.nodes = torch.zeros(0, self.width, device=self.device)        # (N, D or 2 D)
        self.keys = torch.zeros(0, self.config.heads, self.config.key_dim, device=self.device)
        self.states = None

    def __len__(self):
        return len(self.ids)

    def add(self, texts, parts):
        """Append episodes. parts: what GemmaWithMemory.written made of the texts. Returns their ids."""
        old, new = self.tokens, [store for store, _ in parts]
        ids = self.room.append("ids", old.ids, *(store.ids for store in new))
        home = self.device if len(ids) * old.keys.shape[1] * old.keys.itemsize <= ON_DEVICE else "cpu"
        keys = self.room.append("token keys", old.keys, *(store.keys for store in new), device=home)
        lengths, longest = torch.cat([store.lengths for store in (old, *new)]), max(store.longest for store in (old, *new))
        nodes = self.room.append("nodes", self.nodes, *(nodes for _, nodes in parts))
        # Nothing is changed before there was room for everything.
        self.tokens, self.nodes = TokenStore(ids, keys, lengths, longest), nodes
        self.states, self.last, self.keys = None, None, self.keys[:-1]     # the last one has got another neighbour
        new_ids = list(range(self.next_id, self.next_id + len(texts)))
        self.next_id += len(texts)
        self.ids += new_ids
        self.texts += texts
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
        self.nodes, self.states, self.last, self.keys = self.nodes[keep], None, None, self.keys[:0]

    def view(self, injection):
        """The MemoryView of this one memory (G = 1), the same until it changes; with gradients while the injection layer trains."""
        N, training = len(self), injection.training
        parts = lambda: (self.keys, self.nodes, self.tokens)
        if self.last and not training and all(a is b for a, b in zip(self.last[0], parts())):
            return self.last[1]
        valid = torch.ones(1, N, dtype=torch.bool, device=self.device)
        if training:
            self.keys = injection.gnn.keys(self.nodes, *injection.edges(valid))
        for start in range(len(self.keys), N, BLOCK):                      # with a neighbour on either side
            stop, first, last = min(N, start + BLOCK), max(0, start - 1), min(N, start + BLOCK + 1)
            keys = injection.gnn.keys(self.nodes[first:last], *injection.edges(valid[:, first:last]))[start - first:stop - first]
            self.keys = self.room.append("keys", self.keys, keys)
        if training:
            self.tokens.keys = injection.token_keys(self.tokens.ids, self.states, self.tokens.lengths)
        view = MemoryView(self.keys[None], self.nodes[None], valid, torch.arange(N, device=self.device)[None], self.tokens)
        self.last = None if training else (parts(), view)
        return view


def node_width(config, hidden_size):
    """Width of an episode's node, of `node_features`."""
    return hidden_size * (2 if config.node_features == "both" else 1)


def key_widths(config):
    """Widths of the three parts of a token's key: what it is read by, what it is matched by, what it means to a reader."""
    width = config.heads * config.token_key_dim
    return width, width, config.reading_dim if config.reading_layers and config.read == "token" else 0


def node_features(config, states, embeddings):
    """What the mean of is an episode's node: states and embeddings, each (tokens, D) -> (tokens, D or 2 D)."""
    parts = dict(both=(states, embeddings), hidden=(states,), embedding=(embeddings,))[config.node_features]
    return torch.cat(parts, -1).float()


def working_dtype(device):
    """What features and keys are computed in: float32, but while training on a GPU."""
    return torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32


# ---------------------------------------------------------------------------------------------- the injection layer

PRECEDING = 2                        # tokens before one that the key it is read by knows
LOOKBACK = 2                         # sentences before a pronoun's that may say who is meant
NEAR = 2                             # tokens before and after one that may be what the question says
WORDS = 12                           # the most telling words of a question are compared
FOUND = 6                            # and so are the tokens that the first hop read most: those of a name, if it was asked by way of somebody
LEAST = -8.0                         # log-probability of what is as good as ruled out
FOLLOWED = 6                         # tokens of the answer up to now that are looked for in the episodes
NOTHING = -2                         # the id of no token: where no answer has been said yet
WINDOW = 32                          # tokens that ask together where no prompt is marked
HUSHED = 0.1                         # and what they find is heard where null weighs less than this: nobody may have asked


@dataclass
class Question:
    """What asks: R questions of up to T tokens."""

    features: torch.Tensor           # (R, T, F)
    mask: torch.Tensor               # (R, T): which tokens belong to the question
    ids: torch.Tensor                # (R, T)

    def pool(self):
        return pooled(self.features, self.mask)[:, None]                                       # (R, 1, F)

    def last(self):
        """Index of each question's last token, (R,)."""
        return (self.mask * torch.arange(self.mask.shape[1], device=self.mask.device)).argmax(1)


@dataclass
class Found:
    """What a hop found, for the next to ask on with."""

    context: torch.Tensor            # (R, D) mean of what was read
    keys: torch.Tensor               # (R, w, H, C) of the tokens that were read most: what they are matched by
    weights: torch.Tensor            # (R, w) how much each was read


@dataclass
class Reading:
    """What a question found. Weights are log-probabilities, the null episode last; lists hold one entry a hop."""

    context: torch.Tensor            # (R, T, H, D) what was read, before the value map
    asked: list                      # (R, H, N + 1): over all episodes by their keys, at the last position of the question
    candidates: list                 # (R, k): the best of them, rows of the memory
    ranked: list                     # (R, H, k + 1): over the candidates, compared word by word, at the same position
    chosen: list                     # (R, r): the best of those, rows of the memory
    weights: list                    # (R, T, H, r + 1): over these, at every position; before the last hop, T = 1: where the question asks
    token_ids: torch.Tensor          # (R, r, M) what stands in them; -1 where nothing does; at the last hop
    token_weights: torch.Tensor      # (R, T, H, r, M): inside each of them, at the last hop
    end_weights: torch.Tensor = None # (R, T, H, r): on the end that stands behind each, "I have nothing more to say"
    end: int = -1                    # the token that this end is
    place: torch.Tensor = None       # (R, r, M) where these tokens are in the TokenStore, at the last hop
    fits: list = None                # (R, H, r): what the reader alone says for each of them, against 0 for null
    marks: list = None               # (R, r, M, 2): where in each of them an answer begins, and where it ends


class MemoryInjectionLayer(nn.Module, Injection):
    """Reads the memory with the hidden states after layer `inject_after` and adds what it read to them."""

    def __init__(self, config, hidden_size, embedding, end, words):
        """embedding: the base's frozen table, (V, D), kept out of this module's parameters; end: the token that ends an answer;
        words: see Tokenizer.words."""
        super().__init__()
        D, H = hidden_size, config.heads
        self.config, self.end = config, end
        read, match, meaning = key_widths(config)
        self.read_by, self.match_by, self.meaning_at = slice(read), slice(read, read + match), slice(read + match, None)
        self.table = [embedding]     # in a list, so that it is neither saved nor trained with this module
        nodes = node_width(config, D)
        self.gnn = EpisodicMemoryGNN(nodes, H, config.key_dim, config.gat_dim, config.graph, config.cosine_keys)
        self.register_buffer("state_mean", torch.zeros(D))
        self.register_buffer("state_std", torch.ones(D))
        self.register_buffer("word", torch.tensor([*words, *range(len(words), len(embedding))]), persistent=False)             # (V,): which word
        self.sentence = SentenceAttention(2 * D, config.sentence_dim, config.sentence_layers) if config.sentence_layers else None
        told = 2 * D + (config.sentence_dim if self.sentence else 0)       # what is known of an episode's token; of a question's, 2 D
        linear = lambda width: nn.Linear(2 * D, H * width, bias=False)
        key = lambda: nn.Linear(told, H * config.token_key_dim, bias=False)
        each_hop = lambda make: nn.ModuleList(make() for _ in range(config.hops))
        self.query_own, self.query_pool = linear(config.key_dim), linear(config.key_dim)
        self.hop_query = nn.ModuleList(nn.Linear(D, H * config.key_dim, bias=False) for _ in range(config.hops - 1))
        for hop in self.hop_query:
            nn.init.zeros_(hop.weight)                                     # hop 2 starts by asking what hop 1 asked
        if config.read == "token":
            self.token_query_own = linear(config.token_key_dim)
            self.token_query_pool = each_hop(lambda: linear(config.token_key_dim))
            self.token_key_own = key()
            self.token_key_before = nn.ModuleList(key() for _ in range(PRECEDING))
            nn.init.zeros_(self.token_key_before[-1].weight)               # which starts silent
            self.log_token_temperature = nn.Parameter(torch.full((H,), 5.0).log())
            self.end_key = nn.Parameter(torch.randn(H, config.token_key_dim) / config.token_key_dim ** 0.5)
            if config.follow:
                self.goes_on = nn.Linear(2 * D, H)
                nn.init.zeros_(self.goes_on.weight), nn.init.constant_(self.goes_on.bias, 0.5)             # true from the start
        if meaning:
            self.meaning = nn.Linear(told, meaning, bias=False)
            alike = config.said and config.match
            self.understand = ReadingAttention(2 * D, D, meaning, config.reading_layers, LOOKBACK * (alike and config.time_edges), alike=alike)
            self.understood_key = nn.Linear(meaning, read, bias=False)
            self.fits = nn.Linear(meaning, H)
            with torch.no_grad():                                          # the other parts lead at first
                self.understood_key.weight.mul_(0.2), self.fits.weight.mul_(0.2)
            if config.similar_edges:
                self.outdated = SimilarityEdges(meaning)
            if config.marks:
                self.marks = nn.Linear(meaning, 2)
                self.mark_query = each_hop(lambda: nn.Linear(2 * D, 2 * H))
                for query in self.mark_query:                              # marks are heard when they have become true
                    nn.init.zeros_(query.weight), nn.init.zeros_(query.bias)
        if config.match:
            self.match_query, self.match_key = each_hop(lambda: linear(config.token_key_dim)), key()
            self.match_weight = each_hop(lambda: nn.Linear(2 * D, H))
            self.by_way = nn.ModuleList(nn.Linear(2 * D, H) for _ in range(config.hops - 1))
            for way in self.by_way:                                        # how much a question is asked by way of what was found
                nn.init.zeros_(way.weight), nn.init.zeros_(way.bias)
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
        return rms_norm(F.embedding(ids, self.table[0]))

    def features(self, ids, states):
        """What asks and what is asked: a token's state in its sentence, and the token as such. (...,), (..., D) -> (..., F)."""
        x = torch.cat((((states.float() - self.state_mean) / self.state_std).clamp(-10, 10), self.values(ids).float()), -1)
        return F.dropout(x.to(working_dtype(x.device)), self.config.dropout, self.training)

    def token_keys(self, ids, states, lengths):
        """Keys of the tokens of episodes that lie end to end: ids (all,), states (all, D), lengths (episodes,) -> (all, 2 * H * C + reading_dim).
        With lengths on the host no GPU is waited for.

        The key that a token is read by also says what stands before it: "the token after the one I just said" is then one
        lookup, as in an induction head (https://arxiv.org/abs/2209.11895). One token isn't enough: 4471 has two 4s.
        """
        x = self.features(ids, states)
        if self.sentence is not None:
            x = torch.cat((x, self.sentence(x, lengths).to(x.dtype)), -1)
        unit = lambda key: F.normalize(self.heads(key).float(), dim=-1).flatten(1)
        read = match = torch.zeros(len(ids), self.config.heads * self.config.token_key_dim, device=ids.device)
        meaning = read[:, :0]
        if self.config.read == "token":
            starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=len(ids))
            place = sent(torch.arange(len(ids), device=lengths.device) - starts, ids.device)
            before = [key(x).roll(back, 0).masked_fill((place < back)[:, None], 0.0) for back, key in enumerate(self.token_key_before, 1)]
            read = unit(self.token_key_own(x) + sum(before))
        if self.config.match:
            match = unit(self.match_key(x))
        if hasattr(self, "meaning"):
            meaning = rms_norm(self.meaning(x).float())
        return torch.cat((read, match, meaning), 1).to(working_dtype(ids.device))

    # -- asking

    def read(self, x, question, view, memo=None, ids=None):
        """x (R, T, F) features of the positions that read; question: a Question. Returns a Reading.

        memo: a dict that keeps what the question chose, for `read_on` at later positions. ids (R, T): the tokens at these positions,
        if the answer is among them.
        """
        asks = torch.arange(len(x), device=x.device), question.last().clamp(max=x.shape[1] - 1)            # its last position chooses for all
        of_all = self.query_pool(question.pool())                          # what the question as a whole asks
        asking = x[asks][:, None]                                          # (R, 1, F)
        spare = 0 if memo is None else -(view.tokens.longest + 1) % 32     # what is kept differs less in shape: see extras/compiled.py
        reading, found = Reading(None, [], [], [], [], [], None, None, None, self.end, fits=[], marks=[]), None
        for hop in range(self.config.hops):
            if hop:
                # What was found asks on: "Maria's brother is Tom" turns a question about Maria into one about Tom.
                weights, *read = self.attend(hop - 1, asking, query, kept)
                found = self.found(weights, *read, reading.place, view.tokens)
                reading.weights.append(weights)
                of_all = of_all + self.hop_query[hop - 1](found.context)[:, None]
            query = self.queries(self.query_own, asking, of_all)
            kept = self.choose(hop, question, self.heads(query)[:, 0], found, view, spare, reading)
        answer = None if ids is None else ids.masked_fill(F.pad(question.mask, (0, ids.shape[1] - question.mask.shape[1])), NOTHING)
        weights, inside, reading.context = self.attend(hop, x, self.queries(self.query_own, x, of_all), kept, self.so_far(answer, memo))
        reading.weights.append(weights)
        reading.token_weights, reading.end_weights = inside[..., :-1], inside[..., -1]
        if memo is not None:
            memo.update(kept, query=of_all)
        return reading

    def found(self, weights, inside, context, place, tokens):
        """What a hop found where the question asks, as a Found: attention over episodes (R, 1, H, r + 1), inside them (R, 1, H, r, M + 1),
        what was read (R, 1, H, D), and where its tokens are (R, r, M). A name is several of them: each is looked for by itself."""
        read = (weights[..., :-1, None].exp() * inside[..., :-1]).mean((1, 2)).flatten(1)                  # (R, r * M)
        most, at = read.topk(min(FOUND, read.shape[1]))
        return Found(context.mean((1, 2)), self.heads(tokens.keys_at(place.flatten(1).gather(1, at), self.match_by)), most)

    def choose(self, hop, question, at, found, view, spare, reading):
        """Which episodes are read: told to the reading, and returned as a dict of what `attend` needs to know of them.

        at (R, H, C): what asks; found by the hop before, or None; spare: empty places behind an episode's tokens.
        """
        config, (G, N), R = self.config, view.valid.shape, len(at)
        memory, count = torch.arange(R, device=at.device)[:, None] // (R // G), view.valid.sum(1)          # (R, 1), (G,)
        # 1. Which episodes? The best k by their keys.
        asked = self.gnn.log_weights(at.view(G, R // G, config.heads, -1), view.keys, view.valid, count).view(R, config.heads, N + 1)
        best = heaviest(asked, config.candidates)                                                          # (R, k)
        keys, valid, count = picked(view.keys.flatten(0, 1), memory * N + best), view.valid[memory, best], count.repeat_interleave(R // G)
        told = best.masked_fill(~valid, -1)                                                                # an empty place silences nobody
        weigh = lambda evidence: self.gnn.log_weights(at[:, None], keys, valid, count, evidence)[:, 0]     # (R, H, k + 1)
        evidence = keys.new_zeros(R, config.heads, best.shape[1])
        if config.match:
            # 2. Compared word by word, which of these? Of those that match alike, the later one counts.
            match, said = self.compare(hop, question, found, view, memory, best)
            evidence = self.log_match_temperature.exp()[:, None] * (match - self.match_threshold[:, None])
            if config.similar_edges:
                evidence = evidence + self.similarity(match.mean(1), keys, self.gnn.standardise(view.nodes[memory, best]), told)[:, None]
        # The best few will be read.
        ranked, meant = weigh(evidence), None
        top = heaviest(ranked, config.readable)                                                            # (R, r)
        chosen, keys_read, valid_read = best.gather(1, top), keys.take_along_dim(top[..., None, None], 1), valid.gather(1, top)
        place, real = view.tokens.places(view.episodes[memory, chosen], spare)                             # (R, r, M)
        if hasattr(self, "meaning"):
            # 3. Side by side with the question, what do these say to it?
            before = None if self.understand.before is None else self.said_before(question, view, memory, chosen)
            meant = self.understand(question.features, question.mask, found.context if found else None, view.tokens.keys_at(place, self.meaning_at), real,
                                    self.word[question.ids], self.word[view.tokens.ids[place]], before)    # (R, r, M, dim)
            fits = self.judge(meant, real, keys_read, told.gather(1, top)).masked_fill(~valid_read[:, None], -1e4)
            evidence = evidence.scatter_add(2, top[:, None].expand_as(fits), fits)
            ranked = weigh(evidence)
            reading.fits.append(fits)
        reading.asked.append(asked), reading.candidates.append(best), reading.ranked.append(ranked), reading.chosen.append(chosen)
        kept = dict(keys=keys_read, valid=valid_read, count=count, evidence=evidence.take_along_dim(top[:, None], 2),
                    **self.open_tokens(hop, question, view.tokens, place, real, meant, reading))
        if hasattr(self, "said_weight"):
            kept["said"] = F.pad(said.take_along_dim(top[:, None, :, None], 2), (0, spare))                # (R, H, r, M)
        return kept

    def open_tokens(self, hop, question, tokens, place, real, meant, reading):
        """What `attend` needs to know of the tokens of the episodes that are read, as a dict, and told to the reading: they lie at `place`
        (R, r, M) among `tokens`, `real` (R, r, M) of them exist, and the question takes them as `meant` (R, r, M, dim), if it was asked."""
        ids, keys = tokens.ids[place], self.heads(tokens.keys_at(place, self.read_by))                     # (R, r, M), (R, r, M, H, C)
        dtype = question.features.dtype
        reading.token_ids, reading.place = ids.masked_fill(~real, -1), place
        kept = dict(real=F.pad(real, (0, 1), value=True), values=self.values(F.pad(ids, (0, 1), value=self.end)).flatten(1, 2).to(dtype))
        if meant is not None:
            keys = F.normalize(keys + self.heads(self.understood_key(meant)).float(), dim=-1).to(keys.dtype)
        if self.config.read == "token":
            end = F.normalize(self.end_key, dim=-1).to(keys.dtype).expand(*keys.shape[:2], 1, -1, -1)
            kept["token_keys"] = torch.cat((keys, end), 2)                                                 # (R, r, M + 1, H, C)
            kept["of_all"] = self.token_query_pool[hop](question.pool())
        marks = None
        if hasattr(self, "marks"):
            marks = self.marks(meant).float().masked_fill(~real[..., None], -1e4).log_softmax(2)           # (R, r, M, 2)
            kept["marks"] = F.pad(marked(marks), (0, 0, 0, 1)).to(dtype)                                   # nothing speaks against the end
            reading.marks.append(marks)
        if hasattr(self, "goes_on") and hop == self.config.hops - 1:
            # Where nobody has marked that, an answer may begin and end anywhere; half of LEAST leaves room for longer runs to count more.
            bounds = F.pad(keys.new_full((1,), LEAST / 2), (0, 1)) if marks is None else (marks - marks.amax(2, keepdim=True)).clamp(min=LEAST)
            kept["begins"], kept["ends"] = (bound.contiguous() for bound in bounds.expand(*ids.shape, 2).to(dtype).unbind(-1))
            kept["ids"] = reading.token_ids
        return kept

    def read_on(self, x, memo, ids):
        """What later positions read, x (R, T, F), their tokens ids (R, T), of the episodes that the question chose: context (R, T, H, D)."""
        query = self.queries(self.query_own, x, memo["query"])
        return self.attend(self.config.hops - 1, x, query, memo, self.so_far(ids, memo))[2]

    def so_far(self, answer, memo):
        """Tokens of the answer (R, T) at the positions of this pass, NOTHING in the question's place, behind those before: (R, FOLLOWED - 1 + T).

        memo keeps the last ones, each at its place in the cache modulo FOLLOWED: a step of one token may run once more.
        """
        if answer is None or not hasattr(self, "goes_on"):
            return None
        if memo is None:
            return F.pad(answer, (FOLLOWED - 1, 0), value=NOTHING)
        if "answer" not in memo:
            memo["answer"] = torch.full_like(answer[:, :1], NOTHING).repeat(1, FOLLOWED)
        said, T = memo["answer"], answer.shape[1]
        slots = (self.position - T + torch.arange(1 - FOLLOWED, T, device=answer.device)) % FOLLOWED
        answer = torch.cat((said[:, slots[:FOLLOWED - 1]], answer), 1)
        said.index_copy_(1, slots[-FOLLOWED:], answer[:, -FOLLOWED:])
        return answer

    def queries(self, own, x, of_all):
        """What positions x (R, T, F) ask with: their own part and that of the question as a whole, of_all (R, 1, H * C)."""
        return of_all + own(x) if self.config.query == "token" else of_all.expand(*x.shape[:2], -1)        # (R, T, H * C)

    def attend(self, hop, x, query, kept, answer=None):
        """Every position for itself, among the episodes that are read. kept: what `choose` found out about these; answer: see `so_far`.

        Returns log-weights (R, T, H, r + 1) of the episodes and null, attention inside each (R, T, H, r, M + 1), the end last,
        context (R, T, H, D).
        """
        # 4. Which of them, or null?
        weights = self.gnn.log_weights(self.heads(query), kept["keys"], kept["valid"], kept["count"], kept["evidence"])
        # 5. Which tokens inside them, or the end of what they have to say?
        inside = self.weigh_tokens(hop, x, kept, answer)
        return weights, inside, self.gnn.pooled_context(weights, inside, kept["values"])

    def compare(self, hop, question, found, view, memory, best):
        """How well candidates `best` (R, k) of `memory` (R, 1) match, (R, H, k): each word of the question looks for its like among
        theirs, as does what the hop before found. And the other way round, how like each of their tokens is to what the question
        says, (R, H, k, M).

        Late interaction as in ColBERT (https://arxiv.org/abs/2004.12832): of each word the best match counts, weighted by
        how telling the word is.
        """
        (G, N), device = view.valid.shape, best.device
        q, telling, own_words = self.words(hop, question, found)
        # Questions on one memory have candidates in common: each of these, and of those they may borrow from, is compared once.
        back = torch.arange(1 + LOOKBACK * self.config.time_edges, device=device)
        wanted = (best[..., None] - back).clamp(min=0)                                                     # (R, k, B)
        needed = torch.zeros(G, N, device=device).scatter(1, wanted.view(G, -1), 1.0)
        U = min(N, wanted[0].numel()) if len(best) == G else int(needed.sum(1).max())          # one question has nothing to wait for
        several = needed.topk(U, dim=1).indices                                                            # (G, U)
        like, said = zip(*(self.likeness(q, own_words, view.tokens, view.episodes.gather(1, some)) for some in several.split(256, dim=1)))
        like, said = torch.cat(like, -1), torch.cat(said, -2)                                              # (R, H, W, U), (R, H, U, M)
        slot = torch.zeros_like(view.episodes).scatter(1, several, torch.arange(several.shape[1], device=device).expand_as(several))
        own, *before = slot[memory[..., None], wanted].unbind(-1)                                          # (R, k) each: where among the U
        matched = like.take_along_dim(own[:, None, None], -1)                                              # (R, H, W, k)
        if before:
            # Beside its own words a sentence may borrow those of the sentences before it: it may start with "she".
            # The - 1 keeps the gate mostly shut at first: few sentences do.
            gates = torch.sigmoid(self.lookback(self.gnn.standardise(view.nodes[memory, best])).float() - 1)       # (R, k, LOOKBACK * H)
            gates = gates.unflatten(-1, (LOOKBACK, -1)).permute(2, 0, 3, 1)                                # (LOOKBACK, R, H, k)
            for b, (at, gate) in enumerate(zip(before, gates), 1):
                matched = torch.maximum(matched, like.take_along_dim(at[:, None, None], -1) * (gate * (best >= b)[:, None])[:, :, None])
        match = torch.einsum("rhwk,rwh->rhk", matched, telling)
        return match, said.take_along_dim(own[:, None, :, None], 2)

    def words(self, hop, question, found):
        """What is to be matched: the most telling words of the question, then those that the hop before found, if it isn't the
        first. Returns q (R, W, H, C), how telling each is (R, W, H), and how many are the question's own."""
        telling = self.match_weight[hop](question.features).float().masked_fill(~question.mask[..., None], -1e4)   # (R, T, H)
        words = telling.detach().mean(-1).topk(min(WORDS, telling.shape[1]), dim=1).indices[..., None]             # (R, W, 1)
        telling, real = telling.take_along_dim(words, 1), question.mask[..., None].gather(1, words)
        q = self.match_query[hop](question.features.take_along_dim(words, 1))
        q = F.normalize(self.heads(q).float(), dim=-1) * real[..., None]                                   # padding is like nothing
        own = q.shape[1]
        if found is not None:
            q = torch.cat((q, found.keys), 1)
            by_way = self.by_way[hop - 1](question.pool()).float()                                     # (R, 1, H)
            telling = torch.cat((telling, by_way + (found.weights.float() + 1e-8).log()[..., None]), 1)
        return q, telling.softmax(1), own

    def likeness(self, q, own, tokens, episodes):
        """How like each word of R questions is to the most similar word of each episode, and each word of an episode to the most similar
        of the first `own`, the question's: q (R, W, H, C), episodes (G, U) -> (R, H, W, U), (R, H, U, M), at least 0."""
        place, real = tokens.places(episodes)                                                              # (G, U, M)
        keys = self.heads(tokens.keys_at(place, self.match_by)) * real[..., None, None]
        q = q.unflatten(0, (len(episodes), -1)).to(keys.dtype)
        cosine = torch.einsum("gswhc,gumhc->gshwum", q, keys)
        return cosine.max(-1).values.clamp(min=0).flatten(0, 1).float(), cosine[:, :, :, :own].max(3).values.clamp(min=0).flatten(0, 1).float()

    def said_before(self, question, view, memory, chosen):
        """Which words of the question stand in the sentences before the `chosen` (R, r) of `memory` (R, 1): (R, r, T, LOOKBACK), the one
        just before first."""
        earlier = chosen[..., None] - torch.arange(1, 1 + LOOKBACK, device=chosen.device)                  # (R, r, LOOKBACK)
        place, real = view.tokens.places(view.episodes[memory[..., None], earlier.clamp(min=0)])           # (R, r, LOOKBACK, M)
        words = self.word[view.tokens.ids[place]].masked_fill(~real | (earlier < 0)[..., None], -1)
        return (words[:, :, None] == self.word[question.ids][:, None, :, None, None]).any(-1)

    def judge(self, meant, real, keys, told):
        """Evidence (R, H, r) for the episodes that are read, now that they have been read: meant (R, r, M, dim) what their tokens
        say to the question, of which `real` (R, r, M) exist, keys (R, r, H, C), told (R, r) their places in time."""
        length = real.sum(-1, keepdim=True).clamp(min=1)                                                   # (R, r, 1)
        fits = self.fits(meant).float().masked_fill(~real[..., None], -1e4).logsumexp(2) - length.log()     # (R, r, H)
        if self.config.similar_edges:
            whole = (meant * real[..., None]).sum(2) / length
            fits = fits + self.outdated(fits.mean(2), keys, whole, told)[..., None]
        return fits.mT

    def weigh_tokens(self, hop, x, kept, answer=None):
        """Attention over the tokens of each episode and its end: (R, T, H, r, M + 1). With read="episode" all tokens weigh the same."""
        if self.config.read == "episode":
            real = F.pad(kept["real"][..., :-1], (0, 1))
            uniform = real / real.sum(-1, keepdim=True).clamp(min=1)
            return uniform[:, None, None].expand(-1, x.shape[1], self.config.heads, -1, -1)
        query, keys = self.queries(self.token_query_own, x, kept["of_all"]), kept["token_keys"]
        query = F.normalize(self.heads(query), dim=-1) * self.log_token_temperature.exp()[:, None]
        scores = torch.einsum("rthc,rkmhc->rthkm", query.to(keys.dtype), keys)
        if "said" in kept:
            # What the question says itself is hardly its answer; what stands near it may be.
            around = F.pad(kept["said"], (NEAR, NEAR)).unfold(-1, 2 * NEAR + 1, 1)                         # (R, H, r, M, 2 NEAR + 1)
            weight = self.said_weight[hop] * self.log_token_temperature.exp()[:, None]
            scores = scores + F.pad(torch.einsum("rhkmn,hn->rhkm", around, weight), (0, 1))[:, None].to(scores.dtype)
        if "marks" in kept:
            # Where the question ends the answer begins; later it goes on inside.
            scores = scores + torch.einsum("rthf,rkmf->rthkm", self.heads(self.mark_query[hop](x)).to(scores.dtype), kept["marks"].to(scores.dtype))
        if answer is not None:
            # What stands behind the words that have just been said goes on with them.
            follow = followed(answer, kept["ids"], kept["begins"], kept["ends"])                           # (R, T, r, M + 1)
            scores = scores + (self.goes_on(x)[..., None, None] * follow[:, :, None]).to(scores.dtype)
        return scores.masked_fill(~kept["real"][:, None, None], -1e4).softmax(-1)

    def inject(self, h, context, silent):
        """h + what was read, at the scale of each hidden state; `silent` (R, T) positions stay as they are."""
        delta = context.sum(2) @ self.value_map
        size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
        return h + (delta.float() * size).masked_fill(silent[..., None], 0.0).to(h.dtype)

    # -- the socket

    def source(self):
        return self.view

    def begin(self, input_ids, attention_mask, question_mask, cache):
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        self.input_ids, self.position = input_ids, None if cache is None else cache.position               # which this pass moves on
        self.speaking = real & (input_ids != BOS)                          # <bos>, an outlier, neither asks nor listens
        self.question = None if question_mask is None else question_mask.bool() & self.speaking
        self.memo = None if cache is None else cache.memory                # full while decoding: the question was put at prefill

    def after_layer(self, layer, h):
        if layer != self.config.inject_after or self.view is None:
            return h
        x, heard = self.features(self.input_ids, h), self.speaking
        if self.memo:
            context = self.read_on(x, self.memo, self.input_ids)
        elif self.question is not None:
            self.reading = self.read(x, Question(x, self.question, self.input_ids), self.view, self.memo, self.input_ids)
            context = self.reading.context
        else:
            context, sure = self.read_everywhere(x)
            heard = heard & sure
        return self.inject(h, context, ~heard)

    def read_everywhere(self, x):
        """No prompt is marked: every position asks for itself, with the WINDOW tokens up to it, so that none sees its future.

        Returns the context (B, T, H, D), and where it is to be heard (B, T): text that asks nothing is to be left as
        it is, so a position hears nothing unless the memory is nearly sure that it was asked.
        """
        B, T, _ = x.shape
        windows = F.pad(x, (0, 0, WINDOW - 1, 0)).unfold(1, WINDOW, 1).flatten(0, 1)                       # (B * T, F, WINDOW)
        masks, ids = (F.pad(each, (WINDOW - 1, 0)).unfold(1, WINDOW, 1).flatten(0, 1) for each in (self.speaking, self.input_ids))     # (B * T, WINDOW)
        parts = [self.read(at, Question(window.mT, mask, asked), self.view)
                 for at, window, mask, asked in zip(x.reshape(B * T, 1, -1).split(256), windows.split(256), masks.split(256), ids.split(256))]
        null = torch.cat([part.ranked[-1][..., -1].exp().mean(1) for part in parts])                       # (B * T,)
        return torch.cat([part.context for part in parts]).unflatten(0, (B, T))[:, :, 0], (null < HUSHED).view(B, T)


def marked(marks):
    """Where an answer begins and ends (..., M, 2), log-probabilities -> what each token has to it (..., M, 2): log of how likely it
    is the first, and of how likely it is one of them all, each against the likeliest."""
    upto = torch.ones(marks.shape[-2], marks.shape[-2], device=marks.device).triu()            # a sum up to each; cumsum is not deterministic on a GPU
    with torch.autocast(marks.device.type, enabled=False):
        begun, over = marks[..., 0].exp() @ upto, marks[..., 1].exp() @ upto.mT
    both = torch.stack((marks[..., 0], (begun * over).clamp(min=1e-6).log()), -1)
    return (both - both.amax(-2, keepdim=True)).clamp(min=LEAST)


@torch.no_grad()
def followed(answer, ids, begins, ends):
    """How well each token of the episodes, and the end behind them, goes on with what has been said: (R, T, r, M + 1), LEAST to 0.

    answer (R, FOLLOWED - 1 + T): token ids up to each of T positions, NOTHING where none is of the answer; ids (R, r, M); begins and
    ends (R, r, M): how likely it is that the answer begins and ends there, log, against the likeliest. What stands behind the token that
    was said last goes on with it, the better the more of those before it stand there too, back to where the answer may have begun:
    "3B3J9J" has two J. Where it may have ended, its end does. An answer that has begun hardly begins once more, but "Oslo and Rome" does.
    """
    T, M, here, said = answer.shape[1] - FOLLOWED + 1, ids.shape[2], True, begins.new_full((), LEAST)
    before = lambda x, back, fill: F.pad(x, (back, 0), value=fill)[..., :M]
    for back in range(FOLLOWED):
        at = FOLLOWED - 1 - back
        here = here & (answer[:, at:at + T, None, None] == before(ids, back, -1)[:, None])                 # (R, T, r, M)
        begun = (answer[:, at - 1:at - 1 + T] != NOTHING)[..., None, None] * LEAST / 2 if at else 0.0      # before these
        start = (before(begins, back, LEAST)[:, None] + begun).clamp(min=LEAST) / 2 ** back
        said = torch.where(here, torch.maximum(said, start.to(said.dtype)), said)
    end = (said + ends[:, None]).amax(-1, keepdim=True).clamp(min=LEAST)
    return torch.cat((before(said, 1, LEAST), end), -1)


def heaviest(log_weights, k):
    """Which k weigh most to all heads together: log_weights (R, H, N + 1), null last -> (R, k), or (R, N) where k is more."""
    weights = log_weights[..., :-1].exp().mean(1)
    return weights.topk(min(k, weights.shape[1]), dim=1).indices


def pooled(x, mask):
    """Mean of x (B, T, D) over the marked positions (B, T) -> (B, D)."""
    mask = mask.to(x.dtype)[..., None]
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def end_to_end(rows):
    """Lists of token ids as one tensor, on the host: (all,)."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64))


def parted(facts, most):
    """Token ids of facts (lists) in parts of up to so many that follow each other; of long ones fewer: room for their tokens, all
    pairs of which attend, is bounded."""
    part, longest = [], 0
    for fact in facts:
        longest, n = max(longest, len(fact)), len(part) + 1
        if part and (n > most or n * longest > 2 ** 17 or n * longest ** 2 > 2 ** 24):
            yield part
            part, longest = [], len(fact)
        part.append(fact)
    if part:
        yield part


# ------------------------------------------------------------------------------------------------ Gemma with memory

class GemmaWithMemory(MemoryModel):
    """A frozen Gemma and the graph memory that it answers from."""

    variant, Config, eight_bits = "graph", MemoryConfig, True

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        if self.config.inject_after > len(gemma.layers):
            raise InputError(f"expected inject_after to be one of the base's {len(gemma.layers)} layers, got {self.config.inject_after}.")
        end = tokenizer.encode("\n", bos=False)[0]
        self.injection = MemoryInjectionLayer(self.config, gemma.config.hidden_size, gemma.embed_tokens.weight, end, tokenizer.words()).to(gemma.device)
        self.memory_graph = EpisodeGraph(self.config, gemma.config.hidden_size, gemma.device)

    def train(self, mode=True):
        was_training, graph = self.training, self.memory_graph
        super().train(mode)
        if was_training and not mode and len(graph):                       # training changed what the keys are made with
            tokens, nodes = zip(*self.written([self.token_ids(text) for text in graph.texts]))
            graph.tokens, graph.nodes, graph.states, graph.keys = tokens[0].joined(tokens[1:]), torch.cat(nodes), None, graph.keys[:0].detach()
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
        most, tokens = (1024, 2 ** 15) if device.type == "cuda" else (256, 2 ** 13)                # of a batch
        # What lies where is worked out on the host: a GPU that is never asked never has to be waited for, and never waits.
        every, lengths = end_to_end(facts), torch.tensor([len(row) for row in facts])
        starts, states = lengths.cumsum(0) - lengths, torch.empty(len(every) - len(facts), gemma.config.hidden_size, dtype=gemma.dtype, device=device)
        # Sentences of like length together: less padding. Long ones in smaller batches: bounded memory.
        order = lengths.argsort(descending=True, stable=True)
        while len(order):
            longest = int(lengths[order[0]])
            size = max(1, min(most, tokens // longest))
            rows, order, offset = order[:size, None], order[size:], torch.arange(longest)
            real, place = offset < lengths[rows], starts[rows] + offset                            # (B, T) each
            ids = sent(every[place.clamp(max=len(every) - 1)].masked_fill(~real, PAD), device)
            keep = real & (offset > 0)
            come, go = sent(torch.stack((keep.flatten().nonzero()[:, 0], (place - rows - 1)[keep])), device)     # a <bos> fewer of each row up to this
            h = gemma.run_layers(gemma.embed(ids), Places(gemma.config, *ids.shape, sent(real, device), None, device), 1, self.config.inject_after)
            states.index_copy_(0, go, h.flatten(0, 1).index_select(0, come))
            done(len(rows))
        return states

    @torch.no_grad()
    def written(self, facts, done=lambda count: None):
        """Token ids of facts (lists, each with <bos>) -> what the memory keeps of them, part by part: a TokenStore, nodes (n, D).

        Their states, far larger, are let go after each part: room for a hundred thousand facts is room for their keys.
        """
        device = self.gemma.device
        for part in parted(facts, PART_ON_GPU if device.type == "cuda" else PART):
            states, ids = self.encode(part, done), sent(end_to_end([row[1:] for row in part]), device)
            lengths = torch.tensor([len(row) - 1 for row in part])
            keys = self.injection.token_keys(ids, states, lengths).half()
            longest, lengths = int(lengths.max()), sent(lengths, device)
            features = node_features(self.config, states, self.gemma.embed_tokens.weight[ids])
            owner = torch.repeat_interleave(lengths, output_size=len(ids))
            total = features.new_zeros(len(part), features.shape[1]).index_add(0, owner, features)
            yield TokenStore(ids, keys, lengths, longest), total / lengths[:, None]

    def remember(self, texts, encoded, done):
        self.check_room(sum(map(len, encoded)), len(encoded))
        return self.memory_graph.add(texts, list(self.written(encoded, done)))

    def check_room(self, tokens, episodes):
        """Raise InputError where so many more can't be kept: a sentence now is better than a machine that stands still later."""
        # keys and ids of each token and a node for each episode, twice while the new are joined to the old
        needed = 2 * (tokens * (2 * sum(key_widths(self.config)) + 8) + episodes * 4 * self.memory_graph.width)
        room = free(self.gemma.device)
        if room is not None and needed > room:
            raise InputError(f"expected facts that fit into memory, got {episodes:,} that need {needed / 2 ** 30:,.1f} GB of "
                             f"{room / 2 ** 30:,.1f}; remember fewer at a time, in several memories.")

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
        places = Places(self.gemma.config, *ids.shape, mask, None, ids.device)
        self.gemma.run_layers(self.gemma.embed(ids), places, 1, self.config.inject_after, injection=self.injection)
        return self.best(top_k)
