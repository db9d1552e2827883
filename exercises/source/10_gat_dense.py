"""Graph attention as a dense masked softmax

difficulty: medium · importance: medium · minutes: 25 · needs: graph attention on a list of edges (09)

The same layer as exercise 09, for graphs with few nodes: every pair of nodes gets a score, and a mask lets only the pairs
through that have an edge. For N = 30 this is faster than a list of edges; its memory grows with N * N.
 1. `adjacency`: edges (source, target) -> a table with True at [target, source]
 2. `dense_gat`: z = x @ weight; score at [target, source]: leaky_relu(z[source] . a_source + z[target] . a_target), slope 0.2;
    softmax over the sources of each target, edges only; the result is the weighted sum of z. A node without any edge gets 0.
No edge is given twice here. The last check compares with exercise 09.
"""

import math

import torch


def slow_adjacency(edges, N):
    """The specification of step 1, in loops."""
    table = torch.zeros(N, N, dtype=torch.bool)
    for source, target in zip(edges[0].tolist(), edges[1].tolist()):
        table[target, source] = True
    return table


def slow_dense_gat(x, mask, weight, a_source, a_target):
    """The specification of step 2, in loops."""
    N, D, C = x.shape[0], x.shape[1], weight.shape[1]
    z = [[sum(float(x[n, d]) * float(weight[d, c]) for d in range(D)) for c in range(C)] for n in range(N)]
    dot = lambda row, vector: sum(a * float(b) for a, b in zip(row, vector))
    result = torch.zeros(N, C)
    for i in range(N):
        scores = {j: dot(z[j], a_source) + dot(z[i], a_target) for j in range(N) if mask[i, j]}
        exps = {j: math.exp(s if s > 0 else 0.2 * s) for j, s in scores.items()}
        for j in exps:
            for c in range(C):
                result[i, c] += exps[j] / sum(exps.values()) * z[j][c]
    return result


def adjacency(edges, N):
    """edges (2, E) int64 as (source, target) -> (N, N) bool, True at [target, source]. No loops."""
    # solution:
    table = torch.zeros(N, N, dtype=torch.bool)
    table[edges[1], edges[0]] = True
    return table
    # end of solution


def dense_gat(x, mask, weight, a_source, a_target):
    """x (N, D), mask (N, N) bool at [target, source], weight (D, C), a_source and a_target (C,) -> (N, C). No loops."""
    # solution:
    z = x @ weight
    scores = torch.nn.functional.leaky_relu((z @ a_source)[None, :] + (z @ a_target)[:, None], 0.2)
    weights = scores.masked_fill(~mask, -1e9).softmax(-1).masked_fill(~mask, 0.0)
    return weights @ z
    # end of solution


# ---- below: not in the learner's file

SLOW = {"adjacency": "slow_adjacency", "dense_gat": "slow_dense_gat"}
HINTS = ["table[edges[1], edges[0]] = True sets all places at once. A sum of a row (1, N) and a column (N, 1) is a table (N, N).",
         "Mask after leaky_relu, before softmax. A row that is masked everywhere would be 0 / 0 with -inf: fill with -1e9, and set "
         "the weights of missing edges to 0 after the softmax.",
         "scores = leaky_relu((z @ a_source)[None, :] + (z @ a_target)[:, None], 0.2); "
         "scores.masked_fill(~mask, -1e9).softmax(-1).masked_fill(~mask, 0.0) @ z"]
MISTAKES = [
    ("the table with sources down and targets across", "table[edges[1], edges[0]] = True", "table[edges[0], edges[1]] = True"),
    ("edges taken to go both ways", "table[edges[1], edges[0]] = True", "table[edges[1], edges[0]] = True; table[edges[0], edges[1]] = True"),
    ("a_source and a_target swapped", "(z @ a_source)[None, :] + (z @ a_target)[:, None]", "(z @ a_target)[None, :] + (z @ a_source)[:, None]"),
    ("the softmax over the targets", "softmax(-1)", "softmax(0)"),
    ("the mean of all nodes for a node without edges", ".masked_fill(~mask, 0.0)", ""),
    ("nan for a node without edges: its softmax is 0 / 0", ".masked_fill(~mask, -1e9).softmax(-1).masked_fill(~mask, 0.0)", ".masked_fill(~mask, -torch.inf).softmax(-1)"),
    ("the mask only after the softmax, so that weights don't sum to 1", ".masked_fill(~mask, -1e9).softmax(-1)", ".softmax(-1)"),
    ("the mask before leaky_relu, which makes it five times weaker", "leaky_relu((z @ a_source)[None, :] + (z @ a_target)[:, None], 0.2)\n    weights = scores.masked_fill(~mask, -1e9)",
     "leaky_relu(((z @ a_source)[None, :] + (z @ a_target)[:, None]).masked_fill(~mask, -20.0), 0.2)\n    weights = scores"),
    ("no leaky_relu on the scores", "torch.nn.functional.leaky_relu((z @ a_source)[None, :] + (z @ a_target)[:, None], 0.2)", "(z @ a_source)[None, :] + (z @ a_target)[:, None]"),
]


def check(t):
    torch.manual_seed(1)
    N = 5
    x, weight, a_source, a_target = torch.randn(N, 3), torch.randn(3, 4), torch.randn(4), torch.randn(4)
    edges = torch.tensor([[0, 1, 2, 3, 1, 0, 3], [1, 1, 1, 0, 2, 3, 3]])
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[edges[1], edges[0]] = True
    call = lambda m, *inputs: m.dense_gat(*inputs)
    t.equal("the table of 7 edges", lambda m, e: m.adjacency(e, N), edges)
    t.equal("a full graph", call, x, torch.ones(N, N, dtype=torch.bool), weight, a_source, a_target)
    t.equal("7 edges, node 4 without any", call, x, mask, weight, a_source, a_target)
    t.gradient("gradient", call, x, mask, weight, a_source, a_target)
    if not t.values_only:
        from exercises.checking import HERE, load
        by_edges = load(HERE / "source" / "09_gat_edges.py", "edges").gat
        some = torch.rand(12, 12) < 0.3
        inputs = torch.randn(12, 3), some.nonzero().T, weight, a_source, a_target
        t.true("the same as on a list of edges, 12 nodes", lambda m: torch.allclose(
            m.dense_gat(inputs[0], m.adjacency(inputs[1], 12), *inputs[2:]), by_edges(*inputs), atol=1e-5), "the two layers disagree on a random graph")
    t.fast("300 nodes", call, torch.randn(300, 3), torch.rand(300, 300) < 0.1, weight, a_source, a_target, because="work on all pairs at once, without a Python loop.")
