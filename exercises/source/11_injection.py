"""The injection layer

difficulty: medium · importance: high · minutes: 25 · needs: nothing

What the memory read is added to the residual stream, halfway up the frozen model.
 1. each of H heads read one vector (D); they are summed, and one map (D, D) is applied as sum @ value_map
 2. hidden states are large and differ in size: the sum is multiplied by the root mean square of the hidden state it goes to.
    This size is a mere number: no gradient passes through it (detach)
 3. it is added to h, and the result has the dtype of h. Where `silent` is True, h stays as it is, to the bit
"""

import torch


def slow_inject(h, context, value_map, silent):
    """The specification, in loops: one batch row."""
    result = h.clone()
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            if silent[b, t]:
                continue
            D = h.shape[2]
            size = (sum(float(v) ** 2 for v in h[b, t]) / D) ** 0.5
            for e in range(D):
                total = sum(float(context[b, t, i, d]) * float(value_map[d, e]) for i in range(context.shape[2]) for d in range(D))
                result[b, t, e] = float(h[b, t, e]) + total * size
    return result


def inject(h, context, value_map, silent):
    """h (B, T, D), context (B, T, H, D), value_map (D, D), silent (B, T) bool -> (B, T, D). No loops."""
    # solution:
    added = context.float().sum(2) @ value_map.float()
    size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
    added = (added * size).masked_fill(silent[..., None], 0.0)
    return (h.float() + added).to(h.dtype)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"inject": "slow_inject"}
HINTS = ["The heads are a dimension of `context`: sum over it, then one matrix product does all positions at once.",
         "size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt(). masked_fill with silent[..., None] mutes positions.",
         "added = context.sum(2) @ value_map * size; h + added.masked_fill(silent[..., None], 0), back to the dtype of h."]
MISTAKES = [
    ("the map applied transposed", "@ value_map.float()", "@ value_map.float().T"),
    ("the first head alone", "context.float().sum(2)", "context.float()[:, :, 0]"),
    ("the mean over the heads, not their sum", "added = (added * size)", "added = (added / context.shape[2] * size)"),
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
    h, context, value_map = torch.randn(2, 3, 6) * 20, torch.randn(2, 3, 2, 6), torch.randn(6, 6) * 0.1
    silent = torch.tensor([[False, True, False], [False, False, True]])
    call = lambda m, *inputs: m.inject(*inputs)
    t.equal("2 heads, two of six positions silent", call, h, context, value_map, silent, tolerance=1e-4)
    t.equal("bfloat16", call, h.bfloat16(), context, value_map, silent, tolerance=1e-2)
    t.gradient("gradient", call, h, context, value_map, silent, tolerance=1e-3)
    t.fast("4 rows of 100 tokens", call, torch.randn(4, 100, 64), torch.randn(4, 100, 4, 64), torch.randn(64, 64), torch.zeros(4, 100, dtype=torch.bool),
           because="work on all positions at once, without a Python loop.")


def install(mine):
    import memory
    memory.MemoryInjectionLayer.inject = lambda self, h, context, silent: mine.inject(h, context, self.value_map, silent)
