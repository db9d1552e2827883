"""Graph attention by hand: against PyG's GATConv, against a dense version that is slow and obvious, and at its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gnn import EDGE_FEATURES, NEXT, Move, PREVIOUS, EpisodicMemoryGNN, GATLayer, ReadingAttention, SentenceAttention, SimilarityEdges, by_length, distances, softmax_by_target, time_edges

N, E, D, C, H, EDGE_DIM = 12, 40, 7, 5, 3, 4


def random_layer(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    layer = GATLayer(D, C, H, **options).to(dtype)
    torch.nn.init.normal_(layer.bias)
    return layer


def random_graph(seed=0, dtype=torch.float32, edge_dim=EDGE_DIM):
    """Nodes 0 and 1 are isolated, node 2 only sends, node 3 only receives; edges may be doubled, and be self-loops."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(4, N, (E,), generator=generator)
    target = torch.randint(4, N, (E,), generator=generator)
    source[:3], target[3:6] = 2, 3
    source[6:9], target[6:9] = source[9:12], target[9:12]
    source[12], target[12] = 7, 7
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    edge_attr = torch.randn(E, edge_dim, generator=generator, dtype=torch.float64).to(dtype) if edge_dim else None
    return x, torch.stack((source, target)), edge_attr


def pyg_twin(layer, edge_dim):
    """PyG's GATConv with the weights of `layer`, and the pairs (its parameter, ours)."""
    nn = pytest.importorskip("torch_geometric.nn", reason="the oracle torch-geometric isn't installed")
    twin = nn.GATConv(D, C, heads=H, edge_dim=edge_dim or None, add_self_loops=layer.self_loops, fill_value=0.0,
                      negative_slope=layer.negative_slope).to(layer.bias.dtype)
    pairs = [(twin.lin.weight, layer.project.weight), (twin.att_src, layer.score_source),
             (twin.att_dst, layer.score_target), (twin.bias, layer.bias)]
    if edge_dim:
        pairs += [(twin.lin_edge.weight, layer.project_edge.weight), (twin.att_edge, layer.score_edge)]
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours.view_as(theirs))
    assert len(pairs) == len(list(twin.parameters())) == len(list(layer.parameters()))
    return twin, pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("edge_dim", [0, EDGE_DIM])
def test_matches_pyg(edge_dim, self_loops, dtype):
    """Catches source and target swapped, the bias or an edge term left out, self-loops doubled, a detached softmax."""
    layer = random_layer(edge_dim=edge_dim, self_loops=self_loops, dtype=dtype)
    twin, pairs = pyg_twin(layer, edge_dim)
    x, edge_index, edge_attr = random_graph(edge_dim=edge_dim, dtype=dtype)
    x, x_twin = x.requires_grad_(), x.clone().detach().requires_grad_()
    out, expected = layer(x, edge_index, edge_attr), twin(x_twin, edge_index, edge_attr)
    assert (out - expected).abs().max() < 1e-6
    weight = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in [(x.grad, x_twin.grad), *((b.grad, a.grad) for a, b in pairs)]:
        assert (ours - theirs.view_as(ours)).abs().max() <= 1e-6 * max(1.0, theirs.abs().max())


def dense_gat(layer, x, edge_index, edge_attr=None):
    """The same layer as a masked softmax over an (N, N) matrix, one head and one edge at a time."""
    n = len(x)
    edges = [(i, j, None if edge_attr is None else edge_attr[k]) for k, (i, j) in enumerate(edge_index.T.tolist())]
    if layer.self_loops:
        edges = [e for e in edges if e[0] != e[1]]
        edges += [(i, i, None if edge_attr is None else edge_attr.new_zeros(EDGE_DIM)) for i in range(n)]
    columns = []
    for head in range(layer.heads):
        rows = slice(head * layer.out_dim, (head + 1) * layer.out_dim)
        z = x @ layer.project.weight[rows].T
        out = []
        for target in range(n):
            scores, messages = [], []
            for source, listener, features in edges:
                if listener != target:
                    continue
                score = z[source] @ layer.score_source[head] + z[target] @ layer.score_target[head]
                message = z[source]
                if features is not None:
                    e = layer.project_edge.weight[rows] @ features
                    score = score + e @ layer.score_edge[head]
                    message = message + e if layer.edge_messages else message
                scores.append(F.leaky_relu(score, layer.negative_slope))
                messages.append(message)
            heard = torch.stack(messages).T @ torch.stack(scores).softmax(0) if scores else torch.zeros_like(z[0])
            out.append(heard)
        columns.append(torch.stack(out))
    return torch.cat(columns, dim=1) + layer.bias


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 7), self_loops=st.booleans(), edge_messages=st.booleans(), seed=st.integers(0, 99))
def test_matches_the_dense_version(data, n, self_loops, edge_messages, seed):
    """Catches what PyG's layer can't show (messages with edge features) and odd graphs: no edges, one node, doubled edges."""
    pairs = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=15))
    edge_index = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
    layer = random_layer(seed, torch.float64, edge_dim=EDGE_DIM, self_loops=self_loops, edge_messages=edge_messages)
    x, edge_attr = torch.randn(n, D, dtype=torch.float64), torch.randn(len(pairs), EDGE_DIM, dtype=torch.float64)
    assert (layer(x, edge_index, edge_attr) - dense_gat(layer, x, edge_index, edge_attr)).abs().max() < 1e-6


def test_isolated_nodes_get_the_bias_or_themselves():
    """Catches 0 / 0 in a softmax over no edges, and isolated nodes that hear other nodes."""
    x, edge_index, _ = random_graph()
    layer = random_layer(self_loops=False)
    out = layer(x, edge_index)
    assert torch.equal(out[:2], layer.bias.expand(2, -1)) and torch.equal(out[2], layer.bias)
    layer.self_loops = True
    out = layer(x, edge_index)
    assert torch.allclose(out[:3], layer.project(x[:3]) + layer.bias, atol=1e-6)
    no_edges = layer(x, torch.zeros(2, 0, dtype=torch.long))
    assert torch.allclose(no_edges, layer.project(x) + layer.bias, atol=1e-6)


def test_duplicate_edges_count_twice():
    """Catches an edge list silently made a set: told twice, an edge draws twice the weight, as in PyG."""
    scores = torch.tensor([[0.0], [0.0], [0.0]])
    assert torch.allclose(softmax_by_target(scores, torch.tensor([1, 1, 1]), 2), torch.full((3, 1), 1 / 3))
    layer = random_layer(self_loops=False)
    x = torch.randn(3, D)
    twice = layer(x, torch.tensor([[0, 0, 1], [2, 2, 2]])) - layer.bias
    z = layer.project(x).view(3, H, C)
    s = F.leaky_relu((z * layer.score_source).sum(-1) + (z[2] * layer.score_target).sum(-1), 0.2)
    expected = (2 * s[0].exp()[:, None] * z[0] + s[1].exp()[:, None] * z[1]) / (2 * s[0].exp() + s[1].exp())[:, None]
    assert torch.allclose(twice[2], expected.flatten(), atol=1e-6)


def test_scores_of_200_stay_finite_and_exact():
    """Catches a softmax stabilised with the global maximum: the neighbourhood at -200 would be 0 / 0; exp(200) overflows."""
    scores = torch.tensor([[200.0], [199.0], [-200.0], [-201.0], [200.0], [-200.0]], requires_grad=True)
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    weights = softmax_by_target(scores, target, 4)
    a = 1 / (1 + math.exp(-1))
    assert torch.allclose(weights[:, 0], torch.tensor([a, 1 - a, a, 1 - a, 1.0, 0.0]), atol=1e-6)
    (weights[:, 0] * torch.tensor([1.0, 0, 1, 0, 1, 0])).sum().backward()
    assert torch.allclose(scores.grad[:, 0], torch.tensor([1.0, -1, 1, -1, 0, 0]) * a * (1 - a), atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])  # 200 in float32: steps of 1.5e-5
def test_layer_with_scores_of_200_matches_pyg(dtype, tolerance):
    """Catches the same inside the layer, in outputs and gradients: per head the largest |score| of the graph is 200."""
    layer = random_layer(dtype=dtype)
    layer.negative_slope = 1.0  # so that -200 stays -200
    twin, pairs = pyg_twin(layer, 0)
    x, (source, target), _ = random_graph(dtype=dtype)
    with torch.no_grad():
        z = layer.project(x).view(N, H, C)
        scores = (z * layer.score_source).sum(-1)[source] + (z * layer.score_target).sum(-1)[target]
        for theirs, ours in pairs[1:3]:
            ours.mul_((200 / scores.abs().amax(0))[:, None])
            theirs.copy_(ours.view_as(theirs))
        assert (scores.amax(0) > 0).all() and (scores.amin(0) < 0).all()
    out, expected = layer(x, torch.stack((source, target))), twin(x, torch.stack((source, target)))
    assert (out - expected).abs().max() < tolerance
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for theirs, ours in pairs:
        assert (ours.grad - theirs.grad.view_as(ours)).abs().max() <= tolerance * max(1.0, theirs.grad.abs().max())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), e=st.integers(0, 20), n=st.integers(1, 6), shift=st.floats(-500, 500))
def test_softmax_by_target_is_a_softmax_per_target(seed, e, n, shift):
    """Catches weights that leak between targets: each target's sum to 1, and moving one target's scores moves nobody's."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(e, 2, generator=generator, dtype=torch.float64) * 30
    target = torch.randint(0, n, (e,), generator=generator)
    weights = softmax_by_target(scores, target, n)
    for node in range(n):
        mine = target == node
        if mine.any():
            assert torch.allclose(weights[mine], scores[mine].softmax(0), atol=1e-12)
    assert torch.allclose(softmax_by_target(scores + shift * (target == 0)[:, None], target, n), weights, atol=1e-9)


# ------------------------------------------------------------------------------------------------ the episode graph

def test_time_edges_of_a_hand_worked_example():
    """Catches a swapped direction, numbers without the graph's offset, and edges to, from or across empty places.

    Three graphs with room for three; the second holds two, the third has a hole.

        PREVIOUS    0 -> 1 -> 2        3 -> 4    .        6    .    8
        NEXT        0 <- 1 <- 2        3 <- 4
    """
    valid = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    edge_index, edge_attr = time_edges(valid)
    assert edge_index.dtype == torch.long and edge_attr.shape == (6, EDGE_FEATURES) and (edge_attr.sum(1) == 1).all()
    found = {(source, target, kind) for (source, target), kind in zip(edge_index.T.tolist(), edge_attr.argmax(1).tolist())}
    assert found == {(0, 1, PREVIOUS), (1, 2, PREVIOUS), (3, 4, PREVIOUS), (1, 0, NEXT), (2, 1, NEXT), (4, 3, NEXT)}
    for nothing in (valid[:, :1], valid[:, :0], valid & False):            # one episode each, no room at all, nothing told
        edge_index, edge_attr = time_edges(nothing)
        assert edge_index.shape == (2, 0) and edge_attr.shape == (0, EDGE_FEATURES)


def random_candidates(R=3, k=5, seed=0):
    """A SimilarityEdges with random weights, and what it is asked about; candidates stand in any order."""
    torch.manual_seed(seed)
    edges = SimilarityEdges(D)
    with torch.no_grad():
        edges.bias.fill_(-1.0)                                             # at its start nearly nothing is silenced
    places = torch.stack([torch.randperm(20)[:k] for _ in range(R)])
    return edges, [torch.rand(R, k), F.normalize(torch.randn(R, k, H, C), dim=-1), torch.randn(R, k, D), places]


@torch.no_grad()
def test_similarity_edges_match_a_loop():
    """Catches replacer and replaced mixed up, a mean where the sum over later candidates belongs, and heads not averaged."""
    edges, (match, keys, nodes, places) = random_candidates()
    silenced = edges(match, keys, nodes, places)
    for r in range(3):
        for i in range(5):
            still = 1.0
            for j in range(5):
                if places[r, j] > places[r, i]:
                    alike = sum(float(keys[r, i, h] @ keys[r, j, h]) for h in range(H)) / H
                    score = edges.fits * (match[r, j] - match[r, i]) + edges.alike * alike + edges.bias
                    score = score + sum(4 * torch.tanh(edges.says(nodes[r, node])[side] / 4) for side, node in enumerate((j, i)))
                    still *= 1 - float(torch.sigmoid(score))
            assert float(silenced[r, i]) == pytest.approx(math.log(still), rel=1e-3, abs=1e-5)


@torch.no_grad()
def test_only_later_candidates_silence():
    """Catches an old fact that silences a new one, an episode that silences itself, and one question's candidates in another's."""
    edges, (match, keys, nodes, places) = random_candidates()
    silenced = edges(match, keys, nodes, places)
    latest = places.argmax(1, keepdim=True)
    assert (silenced.gather(1, latest) == 0).all() and (silenced < 0).sum() == silenced.numel() - len(silenced)
    for j in range(5):
        other = nodes.clone()
        other[0, j] += 3 * edges.says.weight[0]                            # speaks up: replaces more
        changed = edges(match, keys, other, places) != silenced
        assert not changed[0, places[0] > places[0, j]].any() and not changed[1:].any()
        assert changed[0, places[0] < places[0, j]].all()
    order = torch.randperm(5)
    shuffled = edges(match[:, order], keys[:, order], nodes[:, order], places[:, order])
    torch.testing.assert_close(shuffled, silenced[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_fits_better_and_is_alike_silences_more():
    """Catches a sign the wrong way round: "moved to Oslo" must silence "lives in Lisbon", not the fact about somebody else."""
    edges = SimilarityEdges(D)
    keys, places = F.normalize(torch.randn(1, 1, H, C), dim=-1).repeat(1, 2, 1, 1), torch.tensor([[3, 8]])
    silenced = lambda old, new, keys=keys: float(edges(torch.tensor([[old, new]]), keys, torch.zeros(1, 2, D), places)[0, 0])
    twins, other = silenced(0.5, 0.5), keys * torch.tensor([1.0, -1.0])[:, None, None]
    assert silenced(0.5, 0.9) < twins < silenced(0.9, 0.5) < 0
    assert twins < silenced(0.5, 0.5, other) < 0


def test_similarity_edges_learn_from_silence():
    """Catches a detached score, and a log of 1 - sigmoid that is -inf or without a gradient where a score is large."""
    edges, parts = random_candidates()
    with torch.no_grad():
        edges.fits.fill_(300.0)
    parts = [part.requires_grad_(part.is_floating_point()) for part in parts]
    silenced = edges(*parts)
    assert silenced.isfinite().all() and silenced.min() < -100
    silenced.sum().backward()
    for p in [*edges.parameters(), *parts[:3]]:
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ EpisodicMemoryGNN

def random_gnn(seed=0, **options):
    torch.manual_seed(seed)
    gnn = EpisodicMemoryGNN(D, heads=2, key_dim=6, gat_dim=3, **options)
    with torch.no_grad():
        gnn.mean.normal_()
        gnn.std.uniform_(0.5, 2.0)
    return gnn.eval()


def keys_of_graphs(gnn, x, valid):
    """x (G, N, D) -> keys (G, N, H, C)."""
    return gnn.keys(x.flatten(0, 1), *time_edges(valid)).view(*valid.shape, gnn.heads, gnn.key_dim)


@torch.no_grad()
def test_who_hears_whom():
    """Catches messages that run further than to the neighbours, or not to them: "she" must hear the sentence before it."""
    gnn, x, valid = random_gnn(), torch.randn(1, 6, D), torch.ones(1, 6, dtype=torch.bool)
    before = keys_of_graphs(gnn, x, valid)
    for node, listeners in ((2, {1, 2, 3}), (5, {4, 5}), (0, {0, 1})):
        changed = x.clone()
        changed[0, node] += 1
        after = keys_of_graphs(gnn, changed, valid)
        assert {i for i in range(6) if not torch.equal(before[0, i], after[0, i])} == listeners


@torch.no_grad()
def test_each_head_has_a_gate_of_its_own():
    """Catches one gate for all heads, and heads that are gated by another's: a closed gate leaves what the node itself says."""
    gnn, x, valid = random_gnn(), torch.randn(1, 3, D), torch.ones(1, 3, dtype=torch.bool)
    heard = gnn.heard.weight.view(gnn.heads, gnn.key_dim, gnn.heads, -1)
    heard[0, :, 1], heard[1, :, 0] = 0.0, 0.0                              # key head h hears GAT head h alone
    own = F.normalize(gnn.own(gnn.standardise(x)).view(1, 3, 2, 6), dim=-1)
    gnn.gate.weight.zero_()
    gnn.gate.bias.copy_(torch.tensor([-100.0, 100.0]))
    keys = keys_of_graphs(gnn, x, valid)
    assert torch.allclose(keys[:, :, 0], own[:, :, 0], atol=1e-6)
    assert ((keys - own)[:, :, 1].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_previous_and_next_are_told_apart():
    """Catches edge features that don't reach the message: a node between A and B must not have the key of one between B and A."""
    gnn, x, valid = random_gnn(), torch.randn(1, 3, D), torch.ones(1, 3, dtype=torch.bool)
    forwards, backwards = keys_of_graphs(gnn, x, valid), keys_of_graphs(gnn, x.flip(1), valid)
    assert (forwards[0, 1] - backwards[0, 1]).abs().max() > 1e-3


def test_coreference_can_be_learned():
    """Catches a dead path from the sentence before to the key: its gradient must reach that node and every GAT parameter."""
    gnn, valid = random_gnn(), torch.ones(1, 2, dtype=torch.bool)
    x = torch.randn(1, 2, D, requires_grad=True)
    keys_of_graphs(gnn, x, valid)[0, 1].pow(3).sum().backward()
    assert x.grad[0, 0].abs().sum() > 0
    for name, p in gnn.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (name not in ("null_key", "log_temperature")), name


@torch.no_grad()
def test_graphs_of_a_batch_do_not_mix():
    """Catches time edges across the border of two graphs, and padding that changes a graph's keys."""
    gnn, x = random_gnn(), torch.randn(3, 5, D)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
    together = keys_of_graphs(gnn, x, valid)
    for g in range(3):
        n = int(valid[g].sum())
        alone = keys_of_graphs(gnn, x[g:g + 1, :n], valid[g:g + 1, :n])
        assert torch.allclose(together[g, :n], alone[0], atol=1e-6)


@torch.no_grad()
def test_keys_do_not_depend_on_what_all_sentences_share():
    """Catches keys of raw states, any two of which have a cosine of 0.98, and a key whose length carries a preference."""
    gnn, x, valid = random_gnn(), torch.randn(1, 4, D), torch.ones(1, 4, dtype=torch.bool)
    keys = keys_of_graphs(gnn, x, valid)
    assert torch.allclose(keys.norm(dim=-1), torch.ones(1, 4, 2), atol=1e-6)
    shifted = random_gnn()
    shifted.mean += 100.0
    assert torch.allclose(keys_of_graphs(shifted, x + 100.0, valid), keys, atol=1e-4)
    own = random_gnn(use_graph=False)
    scaled = keys_of_graphs(own, own.mean + (x - own.mean) * 0.5, valid)
    assert torch.allclose(scaled, keys_of_graphs(own, x, valid), atol=1e-5)


@pytest.mark.parametrize("cosine_keys", [True, False])
@torch.no_grad()
def test_weights_over_episodes_and_null_sum_to_one(cosine_keys):
    """Catches weight on empty places, a null outside the softmax, NaN for an empty memory, and a batch row that sees others."""
    gnn, S = random_gnn(cosine_keys=cosine_keys), 3
    valid = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    query, keys = torch.randn(3, S, 2, 6), torch.randn(3, 4, 2, 6)
    weights = gnn.log_weights(query, keys, valid, valid.sum(1)).exp()
    assert weights.shape == (3, S, 2, 5)
    assert torch.allclose(weights.sum(-1), torch.ones(3, S, 2), atol=1e-6)
    assert torch.equal(weights[2, ..., 4], torch.ones(S, 2)) and (weights[2, ..., :4] == 0).all()
    assert (weights[1][..., [1, 3]] == 0).all() and (weights[0] > 0).all()
    for g in range(3):  # the order of episodes, and what stands beside them, doesn't matter
        order = torch.randperm(4)
        alone = gnn.log_weights(query[g:g + 1], keys[g:g + 1, order], valid[g:g + 1, order], valid[g:g + 1].sum(1)).exp()
        assert torch.allclose(alone[0][..., :4], weights[g][..., order], atol=1e-6)
        assert torch.allclose(alone[0][..., 4], weights[g][..., 4], atol=1e-6)


@torch.no_grad()
def test_evidence_is_added_to_the_scores():
    """Catches evidence that reaches null or another row, is scaled by the temperature, or wakes an empty place."""
    gnn, valid = random_gnn(), torch.tensor([[True] * 4, [True, True, False, True]])
    query, keys, evidence = torch.randn(2, 3, 2, 6), torch.randn(2, 4, 2, 6), 3 * torch.randn(2, 2, 4)
    plain = gnn.log_weights(query, keys, valid, valid.sum(1))
    odds = lambda log_weights: log_weights[..., :-1] - log_weights[..., -1:]     # against null, which has no evidence
    added = (odds(gnn.log_weights(query, keys, valid, valid.sum(1), evidence)) - odds(plain)).permute(0, 3, 1, 2)   # (G, N, S, H)
    torch.testing.assert_close(added[valid], evidence.mT[valid][:, None].expand(-1, 3, -1), rtol=1e-3, atol=1e-4)
    assert torch.isneginf(gnn.log_weights(query, keys, valid, valid.sum(1), evidence)[1, ..., 2]).all()


@torch.no_grad()
def test_pooled_context_matches_a_loop():
    """Catches null that counts as an episode, values in the wrong order, and heads or rows that are mixed."""
    R, T, k, M, width = 2, 3, 4, 5, 6
    log_weights, inside = torch.randn(R, T, H, k + 1).log_softmax(-1), torch.rand(R, T, H, k, M)
    values = torch.randn(R, k * M, width)
    context = EpisodicMemoryGNN.pooled_context(log_weights, inside, values)
    assert context.shape == (R, T, H, width)
    for r, t, h in [(0, 0, 0), (1, 2, 2), (1, 0, 1), (0, 2, 1)]:
        slow = sum(log_weights[r, t, h, n].exp() * inside[r, t, h, n, m] * values[r, n * M + m] for n in range(k) for m in range(M))
        torch.testing.assert_close(context[r, t, h], slow, rtol=1e-4, atol=1e-5)
    null = torch.full((R, T, H, k + 1), -torch.inf)
    null[..., -1] = 0
    assert (EpisodicMemoryGNN.pooled_context(null, inside, values) == 0).all()


def test_empty_places_leave_gradients_finite():
    """Catches -inf put in before the temperature: its gradient is then 0 * inf, and one padded batch ends the training."""
    gnn, valid = random_gnn(), torch.tensor([[True, True, False], [False] * 3])
    query, keys = torch.randn(2, 1, 2, 6, requires_grad=True), torch.randn(2, 3, 2, 6, requires_grad=True)
    gnn.log_weights(query, keys, valid, valid.sum(1))[..., -1].sum().backward()
    for gradient in (gnn.log_temperature.grad, gnn.null_key.grad, query.grad, keys.grad):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert (keys.grad[~valid] == 0).all()


@torch.no_grad()
def test_temperature_knows_the_number_of_episodes():
    """Catches a softmax that spreads out as the memory grows: the scale is the learned one at 16, and grows like log(N + 2)."""
    gnn = random_gnn()
    scale = gnn.scale(torch.tensor([16, 256]))
    assert torch.allclose(scale[0], torch.full((2,), 8.0), atol=1e-5)
    assert torch.allclose(scale[1] / scale[0], torch.full((2,), math.log(258) / math.log(18)), atol=1e-6)
    assert torch.isfinite(gnn.scale(torch.tensor([0]))).all()


# ------------------------------------------------------------------------------------------------ attention in a sentence

def random_sentence_attention(seed=0, layers=2):
    torch.manual_seed(seed)
    attention = SentenceAttention(6, dim=8, layers=layers, heads=2, reach=3)
    for layer in attention.layers:
        torch.nn.init.normal_(layer.distance)                              # zero at the start of training: would hide a bug
    return attention


@torch.no_grad()
def test_sentence_attention_matches_a_loop():
    """Catches distances with the wrong sign, heads that are mixed, a missing scale, and padding that is listened to."""
    attention, lengths = random_sentence_attention(), [7, 1, 4]
    x = torch.randn(sum(lengths), 6)
    norm = lambda v: v / (v.pow(2).mean(-1, keepdim=True) + torch.finfo(v.dtype).eps).sqrt()
    expected, start = [], 0
    for length in lengths:
        h = attention.enter(x[start:start + length])
        start += length
        for layer in attention.layers:
            q, k, v = layer.qkv(norm(h)).chunk(3, -1)
            heard = torch.zeros_like(h)
            for i in range(length):
                for head in range(2):
                    at = slice(4 * head, 4 * head + 4)
                    far = [max(-3, min(3, j - i)) + 3 for j in range(length)]
                    scores = torch.stack([q[i, at] @ k[j, at] / 2 + layer.distance[head, far[j]] for j in range(length)])
                    heard[i, at] = scores.softmax(0) @ v[:, at]
            h = h + layer.out(heard)
            h = h + layer.down(F.gelu(layer.up(norm(h))))
        expected.append(norm(h))
    torch.testing.assert_close(attention(x, torch.tensor(lengths)), torch.cat(expected), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("alike", [False, True])
def test_reading_attention_is_sentence_attention_on_both(alike):
    """Catches words of the question that don't count but are heard, what was found put elsewhere, places that run on from the
    question into the episode, and episodes of one question that hear each other; words that are taken for the same within one text,
    where one of them doesn't count, or because of what was found."""
    sentence = random_sentence_attention()
    reading = ReadingAttention(5, 3, dim=8, layers=2, lookback=2 * alike, heads=2, reach=3, alike=alike)
    reading.load_state_dict({name: t for name, t in sentence.state_dict().items() if not name.startswith("enter")}, strict=False)
    for name, p in reading.named_parameters():
        if "alike" in name or name in ("echo", "before"):
            p.copy_(torch.randn_like(p))
    asks_words, told_words = torch.tensor([[3, 1, 1, 2], [5, 1, 2, 5]]), torch.tensor([[1, 1, 2, 7, 8, 1], [2, 5, 7, 7, 8, 9], [3, 4, 5, 6, 7, 8]]).repeat(2, 1, 1)
    question, found, told = torch.randn(2, 4, 5), torch.randn(2, 3), torch.randn(2, 3, 6, 8)
    asks = torch.tensor([[True, True, True, True], [False, True, True, False]])
    real = torch.arange(6) < torch.tensor([[6, 2, 1], [3, 6, 4]])[..., None]
    before = torch.rand(2, 3, 4, 2) < 0.4 if alike else None               # words of the question that stand in the sentences before
    for what in (None, found):
        out = reading(question, asks, what, told, real, asks_words, told_words, before)
        for i in range(2):
            for e in range(3):
                words = [-1, *asks_words[i].tolist(), *told_words[i, e].tolist()]
                ask = reading.ask(question[i])
                for t, back in before[i, e].nonzero().tolist() if alike else ():
                    ask[t] += reading.before[back]
                h = torch.cat((reading.found(found[i:i + 1]), ask, told[i, e]))
                counts = torch.cat((torch.tensor([what is not None]), asks[i], real[i, e]))
                place = torch.cat((torch.tensor([-9]), torch.arange(4), 20 + torch.arange(6)))        # further apart than `reach`
                h, at = h[None, counts], counts.nonzero()[:, 0].tolist()
                same = torch.tensor([[[words[a] == words[b] and (a < 5) != (b < 5) for b in at] for a in at]])
                if alike:
                    h = h + same.any(-1)[..., None] * reading.echo
                for layer in reading.layers:
                    far, one = distances(place[counts], 3), torch.ones(1, h.shape[1], dtype=torch.bool)
                    h = layer(h, one, one[..., None] & one[:, None], far, same)
                torch.testing.assert_close(out[i, e, real[i, e]], F.rms_norm(h, (8,))[0, -int(real[i, e].sum()):], rtol=1e-4, atol=1e-5)


def test_shared_words_leave_the_precision_alone():
    """Catches a reader that goes on in float32, at twice the memory, where training on a GPU is done in bfloat16."""
    reading = ReadingAttention(5, 3, dim=8, layers=1, heads=2, alike=True)
    h, text = torch.randn(2, 4, 8, dtype=torch.bfloat16), torch.tensor([[0, 0, 1, 1]]).expand(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert reading.run_layers(h, torch.ones(2, 4, dtype=torch.bool), text, torch.tensor([[1, 2, 1, 3]]).expand(2, 4)).dtype == torch.bfloat16


def test_rows_are_moved_and_their_gradients_back():
    """Catches a gradient that goes to another row, rows that are told of by the wrong index, and places without a row that aren't zero."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    come, go = torch.tensor([4, 5, 0, 2, 5, 1]), torch.tensor([2, 5, 3, 6, 0])                 # row 3 stands nowhere, places 1 and 4 are empty
    torch.testing.assert_close(Move.apply(x, come, go), torch.stack([x[4], 0 * x[0], x[0], x[2], 0 * x[0], x[1]]))
    assert torch.autograd.gradcheck(lambda x: Move.apply(x, come, go), x)
    torch.manual_seed(3)
    attention, lengths = random_sentence_attention(), torch.randint(1, 20, (60,))
    x = torch.randn(int(lengths.sum()), 6, requires_grad=True)
    w = torch.randn(len(x), 8)
    together, = torch.autograd.grad((attention(x, lengths) * w).sum(), x)
    alone, = torch.autograd.grad(sum((attention(part, n[None]) * v).sum() for part, n, v in zip(x.split(lengths.tolist()), lengths, w.split(lengths.tolist()))), x)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_many_sentences_are_heard_as_one():
    """Catches rows that come back in another order or trimmed when they are put together by length, in both attentions."""
    torch.manual_seed(1)
    attention, reading = random_sentence_attention(), ReadingAttention(5, 3, dim=8, layers=2, heads=2, reach=3)
    lengths = torch.randint(1, 30, (200,))
    x = torch.randn(int(lengths.sum()), 6)
    alone = [attention(part, lengths[i:i + 1]) for i, part in enumerate(x.split(lengths.tolist()))]
    assert len(by_length(lengths, 3, 29)) == 3 and len(by_length(lengths[:20], 3, 29)) == 1
    torch.testing.assert_close(attention(x, lengths), torch.cat(alone), rtol=1e-4, atol=1e-5)
    question, found, told = torch.randn(80, 11, 5), torch.randn(80, 3), torch.randn(80, 2, 29, 8)
    asks, real = torch.arange(11) < torch.randint(1, 12, (80, 1)), torch.arange(29) < lengths[:160].view(80, 2, 1)
    asks[:, 0] = False                                                     # <bos>
    one = lambda i, found: reading(question[i:i + 1], asks[i:i + 1], found, told[i:i + 1], real[i:i + 1])[0]
    for what in (None, found):
        out = reading(question, asks, what, told, real)
        alone = torch.stack([one(i, None if what is None else found[i:i + 1]) for i in range(80)])
        torch.testing.assert_close(out[real], alone[real], rtol=1e-4, atol=1e-5)


def test_sentence_attention_hears_both_sides_and_no_other_sentence():
    """Catches a causal mask, which is what the frozen states already have, and sentences of a batch that mix."""
    attention, lengths = random_sentence_attention(layers=1), torch.tensor([3, 4])
    x = torch.randn(7, 6, requires_grad=True)
    attention(x, lengths)[3].sum().backward()                              # the first token of the second sentence
    heard = x.grad.abs().sum(-1) > 0
    assert heard.tolist() == [False] * 3 + [True] * 4
    assert attention(x[:0], lengths[:0]).shape == (0, 8)
