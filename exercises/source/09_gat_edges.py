"""Graph attention on a list of edges

difficulty: hard · importance: high · minutes: 40 · needs: nothing

The layer of Velickovic et al., with one head. An edge (source, target) carries a message from source to target.
 1. z = x @ weight, one row per node
 2. the score of an edge: leaky_relu(z[source] . a_source + z[target] . a_target), slope 0.2
 3. softmax of the scores over the edges that end in the same target. Take out the largest score of *each target*
    before exp: if only the largest of the whole graph is taken out, a target with low scores divides 0 by 0
 4. the result of a target: the sum of z[source] times the edge's weight. Without any edge it is 0.
Edges may come in any order. Memory grows with the number of edges E, never with N * N.
"""

import math

import torch


def slow_gat(x, edges, weight, a_source, a_target):
    """The specification, in loops."""
    N, D, C = x.shape[0], x.shape[1], weight.shape[1]
    z = [[sum(float(x[n, d]) * float(weight[d, c]) for d in range(D)) for c in range(C)] for n in range(N)]
    result = torch.zeros(N, C, dtype=x.dtype)
    pairs = list(zip(edges[0].tolist(), edges[1].tolist()))
    for node in range(N):
        sources = [s for s, target in pairs if target == node]
        scores = [sum(z[s][c] * float(a_source[c]) + z[node][c] * float(a_target[c]) for c in range(C)) for s in sources]
        scores = [v if v > 0 else 0.2 * v for v in scores]
        exps = [math.exp(v - max(scores)) for v in scores]
        for s, e in zip(sources, exps):
            for c in range(C):
                result[node, c] += e / sum(exps) * z[s][c]
    return result


def softmax_by_target(scores, target, N):
    """scores (E, H), target (E,) int64 below N -> (E, H): softmax over the edges that share a target. No loops."""
    # solution:
    index = target[:, None].expand_as(scores)
    highest = scores.new_full((N, scores.shape[1]), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    exps = (scores - highest[target]).exp()
    total = exps.new_zeros(N, scores.shape[1]).index_add(0, target, exps)
    return exps / total[target]
    # end of solution


def gat(x, edges, weight, a_source, a_target):
    """x (N, D), edges (2, E) int64 as (source, target), weight (D, C), a_source and a_target (C,) -> (N, C). No loops."""
    # solution:
    source, target = edges
    z = x @ weight
    scores = torch.nn.functional.leaky_relu((z @ a_source)[source] + (z @ a_target)[target], 0.2)
    weights = softmax_by_target(scores[:, None], target, len(x))
    return z.new_zeros(z.shape).index_add(0, target, z[source] * weights)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"gat": "slow_gat"}
HINTS = ["x[source] takes one row per edge. zeros.index_add(0, target, rows) adds rows up by target: with it, totals need no loop.",
         "The largest score of each target: torch.full((N, H), -inf).scatter_reduce(0, index, scores, 'amax'), index being the target "
         "expanded to the shape of scores.",
         "softmax: exps = (scores - highest[target]).exp(); exps / zeros(N, H).index_add(0, target, exps)[target]. "
         "gat: zeros(N, C).index_add(0, target, z[source] * weights)."]
MISTAKES = [
    ("source and target swapped", "source, target = edges", "target, source = edges"),
    ("the softmax over the edges that leave a source", "softmax_by_target(scores[:, None], target, len(x))", "softmax_by_target(scores[:, None], source, len(x))"),
    ("the softmax over all edges together", "softmax_by_target(scores[:, None], target, len(x))", "scores[:, None].softmax(0)"),
    ("no leaky_relu on the scores", "torch.nn.functional.leaky_relu((z @ a_source)[source] + (z @ a_target)[target], 0.2)",
     "(z @ a_source)[source] + (z @ a_target)[target]"),
    ("leaky_relu with its default slope of 0.01", "(z @ a_target)[target], 0.2)", "(z @ a_target)[target])"),
    ("the messages not projected", "z[source] * weights", "x[source] * weights"),
    ("the message of the target itself", "z[source] * weights", "z[target] * weights"),
    ("the largest score of the whole graph taken out, which makes 0 / 0", "(scores - highest[target]).exp()", "(scores - scores.max()).exp()"),
    ("a dense N x N table; use index_add and scatter_reduce", "weights = softmax_by_target(scores[:, None], target, len(x))",
     "weights = softmax_by_target(scores[:, None], target, len(x)) + torch.zeros(len(x), len(x)).sum()"),
    ("the softmax's gradient cut off by detach", "softmax_by_target(scores[:, None], target", "softmax_by_target(scores[:, None].detach(), target"),
]


def check(t):
    torch.manual_seed(1)
    N, D, C = 5, 4, 4
    x, weight, a_source, a_target = torch.randn(N, D), torch.randn(D, C), torch.randn(C), torch.randn(C)
    edges = torch.tensor([[0, 1, 2, 3, 1, 0, 3, 2], [1, 1, 1, 0, 2, 3, 3, 0]])
    call = lambda m, *inputs: m.gat(*inputs)
    t.equal("5 nodes, 8 edges, node 4 without any", call, x, edges, weight, a_source, a_target)
    t.equal("two neighbourhoods whose scores are far apart", call, x * torch.tensor([1, 1, 1, 300, 300])[:, None],
            torch.tensor([[0, 1, 4, 3, 2], [0, 0, 3, 3, 1]]), weight, a_source, a_target, tolerance=1e-4)
    if not t.values_only:
        t.equal("softmax_by_target with 2 heads", lambda m, s, g: m.softmax_by_target(s, g, 4), torch.randn(6, 2), torch.tensor([0, 2, 0, 2, 2, 3]))
    t.gradient("gradient", call, x, edges, weight, a_source, a_target)
    big = torch.randint(0, 2000, (2, 6000))
    inputs = torch.randn(2000, D), big, weight, a_source, a_target
    t.small("memory for 2,000 nodes and 6,000 edges", call, *inputs, at_most=400_000,
            because="this looks like a dense N x N table; use index_add and scatter_reduce.")
    t.fast("time for 2,000 nodes and 6,000 edges", call, *inputs, because="work on all edges at once, without a Python loop.")


def install(mine):
    import gnn
    gnn.softmax_by_target = mine.softmax_by_target
