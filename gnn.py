"""A graph attention network by hand, and the network that turns episodes into keys.

`GATLayer` is the layer of Velickovic et al., "Graph Attention Networks" (https://arxiv.org/abs/1710.10903), on an edge
list; `EpisodicMemoryGNN` uses one to let an episode hear its neighbours in time: the sentence before it may say who "she"
is. `SentenceAttention` and `ReadingAttention` are its dense form, on the tokens of a sentence, alone and beside a question.
`SimilarityEdges` let later episodes silence earlier ones that they have made out of date.

Letters: G graphs · N nodes (episodes) of a graph · E edges · D width of a node · H heads · C width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def softmax_by_target(scores, target, N):
    """Softmax of `scores` (E, H) over the edges that share a target node (E,), for N nodes. Returns (E, H).

    Stabilised with the maximum of each target's own edges: with the global maximum, a neighbourhood whose scores are
    all 200 below the best of the graph would underflow to 0 / 0.
    """
    index = target[:, None].expand_as(scores)
    highest = scores.new_full((N, scores.shape[1]), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - highest.index_select(0, target)).exp()
    total = weights.new_zeros(N, scores.shape[1]).index_add(0, target, weights)
    return weights * total.reciprocal().index_select(0, target)             # one division a node, not one an edge


class GATLayer(nn.Module):
    """Multi-head graph attention (GAT section 2.1), heads concatenated, with optional edge features.

    in_dim D -> out_dim C per head. `edge_dim` features of an edge add to its score; with `edge_messages` they also travel
    with the message, so that a node can hear *how* a neighbour relates to it and not only what it says.
    `self_loops` first drops the self-loops in the edge list and then gives every node one, with features of 0.
    """

    def __init__(self, in_dim, out_dim, heads=1, edge_dim=0, negative_slope=0.2, self_loops=True, edge_messages=False):
        super().__init__()
        self.heads, self.out_dim, self.negative_slope = heads, out_dim, negative_slope
        self.self_loops, self.edge_messages = self_loops, edge_messages
        self.project = nn.Linear(in_dim, heads * out_dim, bias=False)
        self.project_edge = nn.Linear(edge_dim, heads * out_dim, bias=False) if edge_dim else None
        self.score_source = nn.Parameter(torch.empty(heads, out_dim))
        self.score_target = nn.Parameter(torch.empty(heads, out_dim))
        self.score_edge = nn.Parameter(torch.empty(heads, out_dim)) if edge_dim else None
        self.bias = nn.Parameter(torch.zeros(heads * out_dim))
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)

    def forward(self, x, edge_index, edge_attr=None):
        """x (N, D), edge_index (2, E) int64 as (source, target), edge_attr (E, F) -> (N, H * C).

        A node without any edge (possible without `self_loops`) gets the bias alone. Duplicate edges count twice.
        """
        N, H, C, dropped = x.shape[0], self.heads, self.out_dim, None
        if self.self_loops:
            dropped = F.pad(edge_index[0] == edge_index[1], (0, N))                                  # hidden, not cut out: a GPU would have to be waited for
            edge_index = torch.cat((edge_index, torch.arange(N, device=x.device).expand(2, N)), dim=1)
            edge_attr = F.pad(edge_attr, (0, 0, 0, N)) if edge_attr is not None else None
        source, target = edge_index

        # 1. Project every node once.
        z = self.project(x).view(N, H, C)

        # 2. Score every edge. The score a . [z_i || z_j] of the paper is a sum, so each half is computed per node.
        # (index_select is [...] for one index, whose gradient needs no sorting.)
        scores = (z * self.score_source).sum(-1).index_select(0, source) + (z * self.score_target).sum(-1).index_select(0, target)   # (E, H)
        message = z.index_select(0, source)                                                          # (E, H, C)
        if self.project_edge is not None and edge_attr is not None:
            e = self.project_edge(edge_attr).view(-1, H, C)
            scores = scores + (e * self.score_edge).sum(-1)
            message = message + e if self.edge_messages else message
        scores = F.leaky_relu(scores, self.negative_slope)
        if dropped is not None:
            scores = scores.masked_fill(dropped[:, None], -torch.inf)

        # 3. Softmax over the edges that point to the same node.
        wide = torch.promote_types(z.dtype, torch.float32)  # never in bf16
        weights = softmax_by_target(scores.to(wide), target, N).to(z.dtype)

        # 4. Aggregate.
        out = z.new_zeros(N, H, C).index_add(0, target, message * weights[..., None])
        return out.view(N, H * C) + self.bias


class TokenLayer(nn.Module):
    """Graph attention on the complete graph of some tokens: since every pair of them is an edge, it is dense, scored by dot
    products (https://arxiv.org/abs/1706.03762), with the distance as the edge's feature; with `alike` also whether the two are
    the same word. A small network for each follows."""

    def __init__(self, dim, heads, reach, alike=False):
        super().__init__()
        self.heads = heads
        self.alike = nn.Parameter(torch.ones(heads)) if alike else None    # the same word is a place to look from the start
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.distance = nn.Parameter(torch.zeros(heads, 2 * reach + 1))

    def forward(self, h, real, same, far, alike=None):
        """h (E, M, dim) tokens of E graphs, of which `real` (E, M) are no padding; same (E, M, M): which two are of one text, and
        have a distance, far (M, M, 2 * reach + 1), see `distances`; all others are as far apart as can be; alike (E, M, M): which
        are one word in two texts -> (E, M, dim)."""
        q, k, v = self.qkv(rms_norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)       # each (E, H, M, C)
        near = (self.distance @ far.mT).transpose(0, 1)                                                 # (H, M, M)
        before, after = self.distance[:, 0, None, None], self.distance[:, -1, None, None]               # (H, 1, 1) each
        wide = torch.where(torch.ones_like(far[..., 0]).triu().bool(), after, before)                   # (H, M, M)
        # By hand: a bias that differs from graph to graph keeps torch's kernel from saving anything.
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.where(same[:, None], near, wide)                 # (E, H, M, M)
        if self.alike is not None:
            scores = scores + self.alike[:, None, None] * alike[:, None]
        weights = scores.float().masked_fill(~real[:, None, None], -1e4).softmax(-1).to(v.dtype)
        h = h + self.out((weights @ v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(rms_norm(h))))


def rms_norm(h):
    """h (..., dim) at a root mean square of 1, without a learned weight."""
    return F.rms_norm(h, h.shape[-1:])


def distances(place, reach):
    """How far each of the places (M,) is from each, at most `reach`, as the only 1 in a row of 0: (M, M, 2 * reach + 1). A product
    with it picks a row of a table, and adds up the row's gradient, faster than an index does."""
    far = (place - place[:, None]).clamp(-reach, reach) + reach
    return (far[..., None] == torch.arange(2 * reach + 1, device=place.device)).float()


def by_length(lengths, parts, widest):
    """Rows put together with others of about their length, so that little is worked out for padding: list of (rows, width).

    lengths (R,), of which none is above `widest`. Too few rows for `parts` stay together. Widths are multiples of 8, if they
    aren't `widest`: the fast kernels of attention want that.
    """
    if len(lengths) < 16 * parts:
        return [(torch.arange(len(lengths), device=lengths.device), widest)]
    ordered, rows = lengths.sort(stable=True)
    longest = torch.stack([part[-1] for part in ordered.chunk(parts)]).tolist()                 # the one word with the GPU
    return [(part, min(n + -n % 8, widest)) for part, n in zip(rows.chunk(parts), longest)]


def sent(x, device):
    """`x`, which may be on the host, on `device`; a GPU is not waited for: out of pinned memory it fetches x when it gets there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x.to(device)


class Move(torch.autograd.Function):
    """Rows to other places, at most one to each row: then the gradient too is moved, where an index would have to add up."""

    @staticmethod
    def forward(ctx, x, come, go):
        """x (n, dim); come (m,): which row each place gets, n for none; go (n,): the place that each row goes to, m for none -> (m, dim)."""
        ctx.save_for_backward(come, go)
        return Move.moved(x, come)

    @staticmethod
    def backward(ctx, grad):
        return Move.moved(grad, ctx.saved_tensors[1]), None, None

    @staticmethod
    def moved(x, come):
        return x.index_select(0, come.clamp(max=len(x) - 1)).masked_fill_((come >= len(x))[:, None], 0.0) if len(x) else x.new_zeros(len(come), x.shape[1])


class TokenAttention(nn.Module):
    """Several TokenLayers, on graphs of tokens that differ in size."""

    def __init__(self, dim, layers, heads=4, reach=8, alike=False):
        super().__init__()
        self.reach = reach
        self.layers = nn.ModuleList(TokenLayer(dim, heads, reach, alike) for _ in range(layers))
        self.echo = nn.Parameter(torch.zeros(dim)) if alike else None

    def run_layers(self, h, real, text, words=None):
        """h (E, M, dim) and real (E, M) as for a layer, text (E, M): which one a token is of, words (E, M): which word it is, if that
        counts -> (E, M, dim), normalised."""
        same, far = text[:, None] == text[..., None], distances(torch.arange(h.shape[1], device=h.device), self.reach)
        alike = None
        if self.echo is not None:                      # each token is told whether it stands in another text too, and where
            alike = (words[:, None] == words[..., None]) & ~same & real[:, None]
            h = h + (alike.any(-1)[..., None] * self.echo).to(h.dtype)             # bfloat16 while training on a GPU: float32 would spread
        for layer in self.layers:
            h = layer(h, real, same, far, alike)
        return rms_norm(h)

    def attend(self, tokens, graphs):
        """tokens (n, dim); graphs: list of (at, text) or (at, text, words), at (E, M) being the token that stands at each place of E
        graphs, n for none -> (n, dim). All graphs are filled and emptied at once."""
        n, every = len(tokens), torch.cat([at.flatten() for at, *_ in graphs])                  # (all places of all graphs,)
        lies = torch.full((n + 1,), len(every), device=every.device).scatter(0, every, torch.arange(len(every), device=every.device))[:n]
        out = []
        for h, (at, *rest) in zip(Move.apply(tokens, every, lies).split([at.numel() for at, *_ in graphs]), graphs):
            h = h.clone().unflatten(0, at.shape)       # (E, M, dim); a view that starts elsewhere would be compiled anew
            out.append(self.run_layers(h, at < n, *rest).flatten(0, 1))
        return Move.apply(torch.cat(out), lies, every)


class SentenceAttention(TokenAttention):
    """What each token means to its sentence.

    The frozen states look to the left only: in "Bookbinding takes up all of Tom's evenings" the state of the first word
    knows of nothing but itself. Here tokens hear those to their right too.
    """

    def __init__(self, in_dim, dim=128, layers=1, **options):
        super().__init__(dim, layers, **options)
        self.enter = nn.Linear(in_dim, dim, bias=False)

    def forward(self, x, lengths):
        """x (all, F) features of the tokens of E episodes that lie end to end, lengths (E,) -> (all, dim).

        With lengths on the host no GPU is waited for.
        """
        starts, graphs = lengths.cumsum(0) - lengths, []
        for rows, width in by_length(lengths, 3, int(lengths.max()) if len(lengths) else 0):
            place = torch.arange(width, device=lengths.device)
            at = sent((starts[rows, None] + place).masked_fill(place >= lengths[rows, None], len(x)), x.device)
            graphs.append((at, torch.zeros_like(at)))
        return self.attend(self.enter(x), graphs)


class ReadingAttention(TokenAttention):
    """What each token of an episode means to the question: the two side by side, each word hearing all others.

    The one step that sees question and sentence together, so it can tell "since 2019" from "for 12 years" by what was
    asked. It costs as much as the sentences are long, so only the few that are read get it. With `alike` each token also knows
    whether the other text has the same word: the plainest feature of a reader, and hard to learn from vectors (the exact match of
    Chen et al., https://arxiv.org/abs/1704.00051, section 3.2). With `lookback` the question's words are told, too, which of them stand in
    the sentences just before the episode, up to so many back: those may have said who its "she" is.
    """

    def __init__(self, in_dim, found_dim, dim, layers, lookback=0, **options):
        super().__init__(dim, layers, **options)
        self.ask = nn.Linear(in_dim, dim, bias=False)
        self.found = nn.Linear(found_dim, dim, bias=False)
        self.before = nn.Parameter(torch.zeros(lookback, dim)) if lookback else None

    def forward(self, question, asks, found, told, real, asks_words=None, told_words=None, before=None):
        """question (R, T, F), of which the tokens `asks` (R, T) count; found (R, D) of the hop before, or None; told
        (R, r, M, dim) the tokens of r episodes, of which `real` (R, r, M) exist; asks_words (R, T) and told_words (R, r, M) which
        word each token is, if that counts; before (R, r, T, lookback): whether the sentence so far before an episode has the
        question's word -> (R, r, M, dim)."""
        (R, r, M), q = real.shape, self.ask(question)
        each = lambda x: x[:, None].expand(-1, r, *x.shape[1:]).flatten(0, 1)                   # every episode has the question to itself
        asked = each(q)                                                                         # (E, T, dim), E = R * r
        if before is not None:
            asked = asked + (before.to(q.dtype) @ self.before.to(q.dtype)).flatten(0, 1)
        if found is not None:                                                                   # a text of one token, before the others
            asked, asks = torch.cat((each(self.found(found)[:, None].to(q.dtype)), asked), 1), F.pad(asks, (1, 0), value=True)
        tokens = torch.cat((asked, told.to(q.dtype).flatten(0, 1)), 1)                          # (E, T + M, dim)
        here = torch.cat((each(asks), real.flatten(0, 1)), 1)                                   # (E, T + M)
        if self.echo is not None:
            asks_words = F.pad(asks_words, (asks.shape[1] - asks_words.shape[1], 0), value=-1)  # what was found is no word
            words = torch.cat((each(asks_words), told_words.flatten(0, 1)), 1)                  # (E, T + M)
        (E, width), column = here.shape, torch.arange(here.shape[1], device=q.device)
        text = (column >= int(found is not None)).long() + (column >= width - M)
        # What is there moves to the front: graphs are as wide as they have tokens, and those of about the same width run together.
        order, lengths, graphs = here.byte().argsort(dim=1, descending=True, stable=True), here.sum(1), []
        for rows, most in by_length(lengths, 3, width):
            place = order[rows, :most]
            at = (rows[:, None] * width + place).masked_fill(column[:most] >= lengths[rows, None], E * width)
            graphs.append((at, text[place], *([words[rows].gather(1, place)] if self.echo is not None else [])))
        return self.attend(tokens.flatten(0, 1), graphs).view(E, width, -1)[:, -M:].unflatten(0, (R, r))


# Edge features, one column each. A self-loop is all zeros.
PREVIOUS, NEXT = range(2)
EDGE_FEATURES = 2


def time_edges(valid):
    """The edges in time of G episode graphs, nodes numbered g * N + n in the order they were told.

    valid (G, N) bool. Returns edge_index (2, E), edge_attr (E, EDGE_FEATURES). An edge points to the node that listens:
    previous -> node says who "she" is, next -> node what it led to.
    """
    G, N = valid.shape
    node = torch.arange(G * N, device=valid.device).view(G, N)
    both = valid[:, 1:] & valid[:, :-1]
    earlier, later = node[:, :-1][both], node[:, 1:][both]
    kind = torch.eye(EDGE_FEATURES, device=valid.device).repeat_interleave(len(earlier), dim=0)
    return torch.stack((torch.cat((earlier, later)), torch.cat((later, earlier)))), kind


class EpisodicMemoryGNN(nn.Module):
    """Node features -> keys; a query -> weights over the episodes, with a null episode for "none of them", and what they hold.

    A key is what the episode says, plus what its neighbours in time make of it:
        key = normalise(own + W (gate * GAT(neighbourhood)))        one gate a head
    `own` is a linear map of the node's features. GAT scores are additive, so a node could listen less only by a louder
    self-loop, which makes it louder to others too; the gate, a function of the node alone, is free of that ("I begin with 'she': tell me who came before").

    Similarity edges are drawn when a question is asked, among the episodes that might answer it: see `still_true`.
    """

    def __init__(self, in_dim, heads=4, key_dim=64, gat_dim=32, use_graph=True, cosine_keys=True):
        super().__init__()
        self.heads, self.key_dim, self.use_graph, self.cosine_keys = heads, key_dim, use_graph, cosine_keys
        # What every sentence has in common is most of its mean state (cosines of 0.98 between any two): taken out first.
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        self.own = nn.Linear(in_dim, heads * key_dim, bias=False)
        if use_graph:
            self.gat = GATLayer(in_dim, gat_dim, heads, EDGE_FEATURES, edge_messages=True)
            self.gate = nn.Linear(in_dim, heads)
            self.heard = nn.Linear(heads * gat_dim, heads * key_dim, bias=False)
        self.null_key = nn.Parameter(torch.randn(heads, key_dim) / math.sqrt(key_dim))
        self.log_temperature = nn.Parameter(torch.full((heads,), math.log(8.0)))

    def standardise(self, x):
        return ((x.float() - self.mean) / self.std).clamp(-10, 10)

    def keys(self, x, edge_index, edge_attr):
        """x (N, D) node features -> keys (N, H, C), of length 1 with `cosine_keys`."""
        x = self.standardise(x)
        key = self.own(x)
        if self.use_graph:
            heard = self.gat(x, edge_index, edge_attr).unflatten(-1, (self.heads, -1))
            key = key + self.heard((heard * torch.sigmoid(self.gate(x))[..., None]).flatten(-2))
        key = key.view(*key.shape[:-1], self.heads, self.key_dim)
        return F.normalize(key.float(), dim=-1) if self.cosine_keys else key.float()

    def scale(self, count):
        """What scores are multiplied by, an inverse temperature, per head for memories of `count` (G,) episodes -> (G, H).

        A softmax over more episodes spreads over more of them; the logarithm makes up for it (18 = 16 + 2 is where 8 was tuned).
        """
        if not self.cosine_keys:
            return torch.full((*count.shape, self.heads), self.key_dim ** -0.5, device=count.device)
        return self.log_temperature.exp() * (torch.log(count.float() + 2) / math.log(18))[:, None]

    def log_weights(self, query, keys, valid, count, evidence=None):
        """Attention of queries over episodes and null, as log-probabilities.

        query (G, S, H, C), keys (G, N, H, C), valid (G, N) bool, count (G,) episodes stored, evidence (G, H, N): what else
        speaks for an episode, added to its score -> (G, S, H, N + 1), null last.
        """
        query = F.normalize(query.float(), dim=-1) if self.cosine_keys else query.float()
        with torch.autocast(query.device.type, enabled=False):   # bf16 can't tell a cosine of 0.998 from 0.995
            scores = torch.einsum("gshc,gnhc->gshn", query, keys.float())
        null_key = F.normalize(self.null_key, dim=-1) if self.cosine_keys else self.null_key
        null = torch.einsum("gshc,hc->gsh", query, null_key)[..., None]
        scores = torch.cat((scores, null), -1) * self.scale(count)[:, None, :, None]
        if evidence is not None:
            scores = scores + F.pad(evidence, (0, 1))[:, None]
        # Masked after scaling: -inf times what scales it would make that number's gradient 0 * inf.
        return scores.masked_fill(~F.pad(valid, (0, 1), value=True)[:, None, None], -torch.inf).log_softmax(-1)

    @staticmethod
    def pooled_context(log_weights, inside, values):
        """What the attention finds: log_weights (R, T, H, k + 1), null last and worth nothing; inside (R, T, H, k, M), the
        attention over the tokens of each episode; values (R, k * M, D) -> context (R, T, H, D)."""
        mass = log_weights[..., :-1].exp()[..., None].to(inside.dtype) * inside
        return torch.einsum("rthn,rnd->rthd", mass.flatten(3), values.to(mass.dtype))


class SimilarityEdges(nn.Module):
    """Which of the episodes that might answer a question are out of date: messages from later ones to earlier ones.

    "Maria moved to Oslo" silences "Maria lives in Lisbon" if both answer the question equally well and are alike. That
    depends on the question, so these edges are drawn when it is asked, among its candidates only. The score of an edge is
    additive, as in a GAT: how much better the later one fits, how alike the two are, what each says ("also" replaces nothing).
    """

    def __init__(self, in_dim):
        super().__init__()
        self.says = nn.Linear(in_dim, 2)                        # "I replace what was", "I can be replaced"
        self.fits = nn.Parameter(torch.tensor(10.0))
        self.alike = nn.Parameter(torch.tensor(4.0))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def edges(self, match, keys, nodes, episodes):
        """match (R, k) how well each fits the question, keys (R, k, H, C), nodes (R, k, D) standardised features, episodes
        (R, k) their places in time -> scores (R, i, j) of "j replaces i", -inf where j wasn't told later."""
        alike = torch.einsum("rihc,rjhc->rij", keys, keys) / keys.shape[2]
        # Bounded: an edge that has been shut for good has no gradient left to open it.
        replaces, replaced = (4 * torch.tanh(self.says(nodes).float() / 4)).unbind(-1)
        score = (self.fits * (match[:, None] - match[..., None]) + self.alike * alike
                 + replaces[:, None] + replaced[..., None] + self.bias)
        return score.masked_fill(episodes[:, None] <= episodes[..., None], -torch.inf)

    def forward(self, match, keys, nodes, episodes):
        """As `edges` -> (R, k): log of how likely none of the others has replaced it, the product of 1 - sigmoid(score)."""
        return -F.softplus(self.edges(match, keys, nodes, episodes)).sum(-1)
