"""Grouped attention with norms of queries and keys

difficulty: medium · importance: high · minutes: 30 · needs: RMSNorm (01) and masks (03)

H query heads share K heads of keys and values, H / K neighbours each: query head h looks at key head h // (H / K).
 1. `head_norm`: every query and every key, one head at a time, goes through RMSNorm with (1 + weight), over its C numbers.
 2. `attention`: scores are the dot products of queries and keys times `scale` (Gemma's is its own number, not always
    C ** -0.5); where the mask is False a query may not look; softmax over the keys; then the weighted sum of the values.
RoPE comes between the two steps; that is exercise 02.
"""

import math

import torch


def slow_attention(q, k, v, mask, scale):
    """The specification of step 2, in loops: shapes as below."""
    out, (B, H, T, C), K = torch.zeros_like(q), q.shape, k.shape[1]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                group = h // (H // K)
                seen = [j for j in range(k.shape[2]) if mask[b, 0, t, j]]
                scores = [scale * sum(float(q[b, h, t, c]) * float(k[b, group, j, c]) for c in range(C)) for j in seen]
                exps = [math.exp(s - max(scores)) for s in scores]
                for j, e in zip(seen, exps):
                    for c in range(C):
                        out[b, h, t, c] += e / sum(exps) * float(v[b, group, j, c])
    return out


def slow_head_norm(x, weight, eps=1e-6):
    """The specification of step 1, in loops."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for t in range(x.shape[2]):
                size = (sum(float(n) ** 2 for n in x[b, h, t]) / x.shape[3] + eps) ** 0.5
                for c in range(x.shape[3]):
                    y[b, h, t, c] = float(x[b, h, t, c]) / size * (1 + float(weight[c]))
    return y


def head_norm(x, weight, eps=1e-6):
    """x (B, heads, T, C), weight (C,) -> the same shape."""
    # solution:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)
    # end of solution


def attention(q, k, v, mask, scale):
    """q (B, H, T, C), k and v (B, K, L, C), mask (B, 1, T, L) bool -> (B, H, T, C). No loops, no ready-made attention."""
    # solution:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    # end of solution


# ---- below: not in the learner's file

SLOW = {"head_norm": "slow_head_norm", "attention": "slow_attention"}
HINTS = ["head_norm is exercise 01 on the last dimension. For the groups, give k and v as many heads as q has.",
         "k.repeat_interleave(H // K, dim=1) repeats each head in place: 0 0 1 1. k.repeat would give 0 1 0 1.",
         "scores = (q @ k.mT) * scale; scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v"]
MISTAKES = [
    ("key heads repeated as 0 1 0 1 in place of 0 0 1 1", "k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)",
     "k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)"),
    ("scores without their scale", "(q @ k.mT) * scale", "q @ k.mT"),
    ("scores scaled by C ** -0.5 in place of the scale given", "(q @ k.mT) * scale", "(q @ k.mT) * q.shape[-1] ** -0.5"),
    ("the mask the wrong way round", "~mask", "mask"),
    ("no mask at all", "scores.masked_fill(~mask, -torch.inf)", "scores"),
    ("forbidden scores set to 0, which still get weight", "~mask, -torch.inf", "~mask, 0.0"),
    ("the softmax over the queries", "softmax(-1)", "softmax(-2)"),
    ("the norm without the + 1 on the weight", "(1.0 + weight)", "weight"),
    ("the norm over all heads together", "x.pow(2).mean(-1, keepdim=True)", "x.pow(2).mean((1, 3), keepdim=True)"),
    ("scores turned to numbers without gradient", "scores.masked_fill(", "scores.detach().masked_fill("),
]


def check(t):
    torch.manual_seed(1)
    q, k, v, weight = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6), torch.randn(6) * 0.3
    mask = (torch.arange(3)[:, None] + 2 >= torch.arange(5)).expand(2, 1, 3, 5)
    norm, call = lambda m, x, w: m.head_norm(x, w), lambda m, *inputs: m.attention(*inputs, 0.3)
    t.equal("norms of 4 heads", norm, q, weight)
    t.equal("4 query heads on 2 key heads, 3 queries at the end of 5 tokens", call, q, k, v, mask)
    t.equal("as many key heads as query heads", call, q[:, :2], k, v, mask)
    t.gradient("gradient of the norm", norm, q, weight)
    t.gradient("gradient of the attention", call, q, k, v, mask)
    long = torch.randn(1, 4, 200, 16)
    t.fast("200 tokens", call, long, long[:, :2], long[:, :2], torch.ones(1, 1, 200, 200, dtype=torch.bool).tril(),
           because="work on all heads and tokens at once, without a Python loop.")


def install(mine):
    import gemma

    def forward(self, h, places, slots):
        split = lambda x: x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = split(self.q_proj(h)), split(self.k_proj(h)), split(self.v_proj(h))
        q, k = (gemma.rotate(mine.head_norm(x, norm.weight, norm.eps), *places.rope[self.layer_type])
                for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        if slots is not None:
            k, v = slots.write(places.slots, k, v)
        out = mine.attention(q, k, v, places.visible[self.layer_type], self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    gemma.Attention.forward = forward
