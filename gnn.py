"""A graph attention network by hand, and the network that turns episodes into keys.

`GATLayer` is the layer of Velickovic et al., "Graph Attention Networks" (https://arxiv.org/abs/1710.10903), on an edge
list. `EpisodicMemoryGNN` uses one to let an episode hear its neighbours: the sentence before it, which may say who "she"
is, and later sentences like it, which may have made it out of date.

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
    weights = (scores - highest[target]).exp()
    total = weights.new_zeros(N, scores.shape[1]).index_add(0, target, weights)
    return weights / total[target]


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
        N, H, C = x.shape[0], self.heads, self.out_dim
        if self.self_loops:
            keep = edge_index[0] != edge_index[1]
            edge_index = torch.cat((edge_index[:, keep], torch.arange(N, device=x.device).expand(2, N)), dim=1)
            if edge_attr is not None:
                edge_attr = torch.cat((edge_attr[keep], edge_attr.new_zeros(N, edge_attr.shape[1])))
        source, target = edge_index

        # 1. Project every node once.
        z = self.project(x).view(N, H, C)

        # 2. Score every edge. The score a . [z_i || z_j] of the paper is a sum, so each half is computed per node.
        scores = (z * self.score_source).sum(-1)[source] + (z * self.score_target).sum(-1)[target]   # (E, H)
        message = z[source]                                                                          # (E, H, C)
        if self.project_edge is not None and edge_attr is not None:
            e = self.project_edge(edge_attr).view(-1, H, C)
            scores = scores + (e * self.score_edge).sum(-1)
            message = message + e if self.edge_messages else message
        scores = F.leaky_relu(scores, self.negative_slope)

        # 3. Softmax over the edges that point to the same node.
        wide = torch.promote_types(z.dtype, torch.float32)  # never in bf16
        weights = softmax_by_target(scores.to(wide), target, N).to(z.dtype)

        # 4. Aggregate.
        out = z.new_zeros(N, H, C).index_add(0, target, message * weights[..., None])
        return out.view(N, H * C) + self.bias


# Edge features, one column each. A self-loop is all zeros.
PREVIOUS, NEXT, LATER, COSINE = range(4)
EDGE_FEATURES = 4


def time_and_similarity_edges(similar, cosine, valid, time_edges=True):
    """The edge list of G episode graphs, nodes numbered g * N + n in the order they were told.

    similar (G, N, S): for each node up to S later nodes most like it, -1 for none; cosine (G, N, S); valid (G, N) bool.
    Returns edge_index (2, E), edge_attr (E, EDGE_FEATURES). An edge points to the node that listens:

        previous -> node    who "she" is            next -> node    what it led to
        later similar -> node    "Maria moved to Oslo" tells "Maria lives in Lisbon" that its time is over
    """
    G, N, S = similar.shape
    node = torch.arange(G * N, device=valid.device).view(G, N)
    sources, targets, attrs = [], [], []

    def add(source, target, keep, column, cos=None):
        features = torch.zeros(*source.shape, EDGE_FEATURES, device=valid.device)
        features[..., column] = 1.0
        if cos is not None:
            features[..., COSINE] = cos
        sources.append(source[keep]), targets.append(target[keep]), attrs.append(features[keep])

    if time_edges:
        both = valid[:, 1:] & valid[:, :-1]
        add(node[:, :-1], node[:, 1:], both, PREVIOUS)
        add(node[:, 1:], node[:, :-1], both, NEXT)
    if S:
        keep = (similar >= 0) & valid[..., None]
        first = node[:, :1, None]                                   # number of each graph's first node
        add(similar.clamp(min=0) + first, node[..., None].expand(G, N, S), keep, LATER, cosine)
    if not sources:
        return torch.zeros(2, 0, dtype=torch.long, device=valid.device), torch.zeros(0, EDGE_FEATURES, device=valid.device)
    return torch.stack((torch.cat(sources), torch.cat(targets))), torch.cat(attrs)


class EpisodicMemoryGNN(nn.Module):
    """Node features -> keys; a query -> weights over the episodes, with a null episode for "none of them".

    A key is what the episode says, plus what its neighbours make of it:
        key = normalise(own + gate * W GAT(neighbourhood))
    `own` is a linear map of the node's features. GAT scores are additive, so a node can't decide by them how much it wants
    to listen; the gate, a function of the node alone, does ("I begin with 'she': tell me who came before").
    """

    def __init__(self, in_dim, heads=4, key_dim=128, gat_dim=64, use_graph=True, cosine_keys=True):
        super().__init__()
        self.heads, self.key_dim, self.use_graph, self.cosine_keys = heads, key_dim, use_graph, cosine_keys
        # What every sentence has in common is most of its mean state (cosines of 0.98 between any two): taken out first.
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        self.own = nn.Linear(in_dim, heads * key_dim, bias=False)
        if use_graph:
            self.gat = GATLayer(in_dim, gat_dim, heads, EDGE_FEATURES, edge_messages=True)
            self.gate = nn.Linear(in_dim, heads * gat_dim)
            self.heard = nn.Linear(heads * gat_dim, heads * key_dim, bias=False)
        self.null_key = nn.Parameter(torch.randn(heads, key_dim) / math.sqrt(key_dim))
        self.log_temperature = nn.Parameter(torch.full((heads,), math.log(8.0)))

    def standardise(self, x):
        return ((x.float() - self.mean) / self.std).clamp(-10, 10)

    def own_keys(self, x):
        """(..., D) node features -> (..., H * C), unnormalised: what an episode says by itself."""
        return self.own(self.standardise(x))

    def keys(self, x, edge_index, edge_attr):
        """x (N, D) node features -> keys (N, H, C), of length 1 with `cosine_keys`."""
        key = self.own_keys(x)
        if self.use_graph:
            x = self.standardise(x)
            heard = self.gat(x, edge_index, edge_attr) * torch.sigmoid(self.gate(x))
            key = key + self.heard(heard)
        key = key.view(*key.shape[:-1], self.heads, self.key_dim)
        return F.normalize(key.float(), dim=-1) if self.cosine_keys else key.float()

    def scale(self, count):
        """Softmax temperature per head for memories of `count` (G,) episodes -> (G, H).

        A softmax over more episodes spreads over more of them; the logarithm makes up for it (18 = 16 + 2 is where 8 was tuned).
        """
        if not self.cosine_keys:
            return torch.full((*count.shape, self.heads), self.key_dim ** -0.5, device=count.device)
        return self.log_temperature.exp() * (torch.log(count.float() + 2) / math.log(18))[:, None]

    def log_weights(self, query, keys, valid, count):
        """Attention of queries over episodes and null, as log-probabilities.

        query (G, S, H, C), keys (G, N, H, C), valid (G, N) bool, count (G,) episodes stored -> (G, S, H, N + 1), null last.
        """
        query = F.normalize(query.float(), dim=-1) if self.cosine_keys else query.float()
        with torch.autocast(query.device.type, enabled=False):   # bf16 can't tell a cosine of 0.998 from 0.995
            scores = torch.einsum("gshc,gnhc->gshn", query, keys.float())
        null_key = F.normalize(self.null_key, dim=-1) if self.cosine_keys else self.null_key
        null = torch.einsum("gshc,hc->gsh", query, null_key)[..., None]
        scores = torch.cat((scores, null), -1) * self.scale(count)[:, None, :, None]
        # Masked after scaling: -inf times the temperature would make the temperature's gradient 0 * inf.
        return scores.masked_fill(~F.pad(valid, (0, 1), value=True)[:, None, None], -torch.inf).log_softmax(-1)


def most_similar_later(own, valid, S, floor=0.5):
    """For each node up to S later nodes of its graph whose own keys are most like its own.

    own (G, N, D), valid (G, N) -> similar (G, N, S) int64, -1 where none is above `floor`; cosine (G, N, S).
    Two episodes that would answer the same question have the same key, so this is where updates show.
    """
    own = F.normalize(own.float(), dim=-1)
    cosine = torch.einsum("gnd,gmd->gnm", own, own)
    N = own.shape[1]
    later = torch.ones(N, N, dtype=torch.bool, device=own.device).triu(1)
    cosine = cosine.masked_fill(~(later & valid[:, None, :] & valid[:, :, None]), -torch.inf)
    best, similar = cosine.topk(min(S, N), dim=-1)
    similar = similar.masked_fill(best < floor, -1)
    best = best.masked_fill(best < floor, 0.0)
    return F.pad(similar, (0, S - similar.shape[-1]), value=-1), F.pad(best, (0, S - best.shape[-1]))
