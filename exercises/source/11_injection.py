"""The injection layer

difficulty: medium · importance: high · minutes: 25 · needs: nothing

What the memory read is added to the residual stream, halfway up the frozen model.
 1. each of H heads read one vector (D); its own map (D, D) is applied as context @ map, and the heads' results are summed
 2. hidden states are large and differ in size: the sum is multiplied by the root mean square of the hidden state it goes to.
    This size is a mere number: no gradient passes through it (detach)
 3. it is added to h, and the result has the dtype of h. Where `silent` is True, h stays as it is, to the bit
"""

import torch


def slow_inject(h, context, maps, silent):
    """The specification, in loops: one batch row."""
    result = h.clone()
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            if silent[b, t]:
                continue
            D = h.shape[2]
            size = (sum(float(v) ** 2 for v in h[b, t]) / D) ** 0.5
            for e in range(D):
                total = sum(float(context[b, t, i, d]) * float(maps[i, d, e]) for i in range(maps.shape[0]) for d in range(D))
                result[b, t, e] = float(h[b, t, e]) + total * size
    return result


def inject(h, context, maps, silent):
    """h (B, T, D), context (B, T, H, D), maps (H, D, D), silent (B, T) bool -> (B, T, D). No loops."""
    # solution:
    added = torch.einsum("bthd,hde->bte", context.float(), maps.float())
    size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
    added = (added * size).masked_fill(silent[..., None], 0.0)
    return (h.float() + added).to(h.dtype)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"inject": "slow_inject"}
HINTS = ["torch.einsum names dimensions by letters; those that are missing on the right of -> are summed over.",
         "size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt(). masked_fill with silent[..., None] mutes positions.",
         "added = einsum('bthd,hde->bte', context, maps) * size; h + added.masked_fill(silent[..., None], 0), back to the dtype of h."]
MISTAKES = [
    ("the maps applied transposed", '"bthd,hde->bte"', '"bthe,hde->btd"'),
    ("one map for all heads", "maps.float())", "maps[:1].float().expand_as(maps))"),
    ("the mean over the heads, not their sum", "added = (added * size)", "added = (added / maps.shape[0] * size)"),
    ("not multiplied by the size of the hidden state", "(added * size)", "added"),
    ("silent the wrong way round", "silent[..., None]", "~silent[..., None]"),
    ("silent not heeded", "(added * size).masked_fill(silent[..., None], 0.0)", "added * size"),
    ("h replaced by what was read", "(h.float() + added)", "added"),
    ("a result that stays in float32", "(h.float() + added).to(h.dtype)", "h.float() + added"),
    ("the length of the hidden state, not its root mean square", ".mean(-1, keepdim=True).sqrt()", ".sum(-1, keepdim=True).sqrt()"),
    ("a gradient through the size; detach it", "h.detach().float()", "h.float()"),
    ("no gradient to what was read", "context.float()", "context.detach().float()"),
]


def check(t):
    torch.manual_seed(1)
    h, context, maps = torch.randn(2, 3, 6) * 20, torch.randn(2, 3, 2, 6), torch.randn(2, 6, 6) * 0.1
    silent = torch.tensor([[False, True, False], [False, False, True]])
    call = lambda m, *inputs: m.inject(*inputs)
    t.equal("2 heads, two of six positions silent", call, h, context, maps, silent, tolerance=1e-4)
    t.equal("bfloat16", call, h.bfloat16(), context, maps, silent, tolerance=1e-2)
    t.gradient("gradient", call, h, context, maps, silent, tolerance=1e-3)
    t.fast("4 rows of 100 tokens", call, torch.randn(4, 100, 64), torch.randn(4, 100, 4, 64), torch.randn(4, 64, 64), torch.zeros(4, 100, dtype=torch.bool),
           because="work on all positions at once, without a Python loop.")


def install(mine):
    import memory
    memory.MemoryInjectionLayer.inject = lambda self, h, context, silent: mine.inject(h, context, self.value_map, silent)
