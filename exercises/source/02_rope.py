"""RoPE, with two bases

difficulty: medium · importance: high · minutes: 25 · needs: nothing

A head's C numbers are C / 2 pairs: number i goes with number i + C / 2 (the half-split convention of Gemma's checkpoints). A
token at position p has each pair turned by an angle, and pair i turns by
    p / base ** (2 i / C)
so the first pairs turn fast and the last slowly. Layers with a sliding window use base 10 000, full layers base 1 000 000,
whose slow pairs can tell far positions apart. Turning (a, b) by an angle gives (a cos - b sin, b cos + a sin). Angles and turning are
computed in float32; the result goes back to the dtype of x.
"""

import math

import torch

BASES = {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}


def slow_rope(x, positions, layer_type):
    """The specification, in loops: x (H, T, C), positions (T,)."""
    y, C = torch.zeros_like(x), x.shape[-1]
    for h in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(C // 2):
                angle = float(positions[t]) / BASES[layer_type] ** (2 * i / C)
                a, b = float(x[h, t, i]), float(x[h, t, i + C // 2])
                y[h, t, i] = a * math.cos(angle) - b * math.sin(angle)
                y[h, t, i + C // 2] = b * math.cos(angle) + a * math.sin(angle)
    return y


def rope(x, positions, layer_type):
    """x (H, T, C), positions (T,) int64, layer_type a key of BASES -> (H, T, C) in the dtype of x. No loops."""
    # solution:
    C = x.shape[-1]
    frequencies = 1.0 / BASES[layer_type] ** (torch.arange(0, C, 2, device=x.device).float() / C)
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"rope": "slow_rope"}
HINTS = ["First the table of angles, (T, C / 2): positions down, pairs across. torch.arange(0, C, 2) gives 2 i for every pair.",
         "x.chunk(2, dim=-1) gives the first halves and the second halves of all pairs at once.",
         "angles = positions[:, None].float() * (1 / base ** (torch.arange(0, C, 2).float() / C)); a, b = x.float().chunk(2, -1); join "
         "a cos - b sin and b cos + a sin with torch.cat."]
MISTAKES = [
    ("the bases of sliding and full layers swapped", "BASES[layer_type] **",
     "BASES['full_attention' if layer_type == 'sliding_attention' else 'sliding_attention'] **"),
    ("neighbours paired (0 with 1, 2 with 3), the convention of other checkpoints",
     "a, b = x.float().chunk(2, dim=-1)\n    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)",
     "a, b = x.float()[..., ::2], x.float()[..., 1::2]\n    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)"),
    ("turned the other way round", "(a * cos - b * sin, b * cos + a * sin)", "(a * cos + b * sin, b * cos - a * sin)"),
    ("positions counted 0, 1, 2 … in place of those given", "positions[:, None].float()", "torch.arange(len(positions))[:, None].float()"),
    ("the exponent i / C in place of 2 i / C", "torch.arange(0, C, 2, device=x.device)", "torch.arange(C // 2, device=x.device)"),
    ("base 10 000 for both kinds of layers", "BASES[layer_type] **", "10_000.0 **"),
    ("turning in bfloat16", "a, b = x.float().chunk(2, dim=-1)", "cos, sin = cos.to(x.dtype), sin.to(x.dtype); a, b = x.chunk(2, dim=-1)"),
    ("a result that stays in float32", "dim=-1).to(x.dtype)", "dim=-1)"),
]


def check(t):
    torch.manual_seed(1)
    x, near = torch.randn(2, 4, 8), torch.arange(4)
    call = lambda kind: lambda m, x, p: m.rope(x, p, kind)
    t.equal("positions 0 to 3, in a sliding and in a full layer", lambda m, x, p: [m.rope(x, p, kind) for kind in m.BASES], x, near,
            tolerance=1e-4)
    t.equal("positions that start at 37, as with a cache", call("sliding_attention"), x, near + 37, tolerance=1e-4)
    t.equal("bfloat16", call("full_attention"), x.bfloat16(), near + 300, tolerance=1e-3)
    t.gradient("gradient", call("sliding_attention"), x, near)
    if not t.values_only:
        q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
        t.equal("scores depend on the distance alone", lambda m, q, k: torch.stack(
            [(m.rope(q, torch.tensor([p + 5]), "full_attention") * m.rope(k, torch.tensor([p]), "full_attention")).sum() for p in (0, 100)]),
            q, k, tolerance=1e-3)
    t.fast("8 heads, 1,000 tokens", call("full_attention"), torch.randn(8, 1000, 64), torch.arange(1000),
           because="work on all tokens at once, without a Python loop.")


def install(mine):
    import gemma

    def angles(positions, base, config, factor=1.0):
        """What `rotate` needs is not a table of angles here but which positions and which kind of layer."""
        kind = "full_attention" if base == config.rope_theta else "sliding_attention"
        mine.BASES[kind] = base
        return positions, (kind, factor)

    def rotate(x, positions, kind_and_factor):
        kind, factor = kind_and_factor
        scaled = positions if factor == 1.0 else positions / factor
        return gemma.torch.stack([mine.rope(row, p, kind) for row, p in zip(x, scaled)])

    gemma.Places.angles, gemma.rotate = staticmethod(angles), rotate
