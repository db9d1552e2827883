"""The sliding mask

difficulty: easy · importance: high · minutes: 15 · needs: nothing

Which keys may a query see in a layer with a sliding window? Those that are not later than itself, and of these only the last
`window`, itself included. With a cache there are more keys than queries, so places are given, not counted. Window 3:
    1 0 0 0 0
    1 1 0 0 0
    1 1 1 0 0
    0 1 1 1 0
    0 0 1 1 1
"""

import torch


def slow_sliding_mask(queries, keys, window):
    """The specification, in loops: queries (T,), keys (L,) places."""
    mask = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for i, q in enumerate(queries.tolist()):
        for j, k in enumerate(keys.tolist()):
            mask[i, j] = k <= q and k > q - window
    return mask


def sliding_mask(queries, keys, window):
    """queries (T,) int64, keys (L,) int64 -> (T, L) bool, True where the query may look. No loops."""
    # solution:
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance < window)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"sliding_mask": "slow_sliding_mask"}
HINTS = ["queries[:, None] - keys[None, :] is a table of distances, (T, L).",
         "A distance of 0 is the token itself; it counts as one of the window. Distances below 0 are the future.",
         "Two comparisons of that table joined by &: at least 0, and below window."]
MISTAKES = [
    ("window keys before the query, and the query as one more", "(distance < window)", "(distance <= window)"),
    ("a query that does not see itself", "(distance >= 0)", "(distance > 0)"),
    ("no look at the future forbidden", "(distance >= 0) & (distance < window)", "distance < window"),
    ("a window to both sides", "(distance >= 0) & (distance < window)", "distance.abs() < window"),
    ("True and False swapped", "(distance >= 0) & (distance < window)", "~((distance >= 0) & (distance < window))"),
    ("keys down and queries across", "queries[:, None] - keys[None, :]", "queries[None, :] - keys[:, None]"),
    ("places counted from 0 in place of those given", "queries[:, None] - keys[None, :]", "torch.arange(len(queries))[:, None] - torch.arange(len(keys))"),
    ("0 and -inf to add, where True and False are asked for", "return (distance >= 0) & (distance < window)",
     "return torch.zeros(distance.shape).masked_fill(~((distance >= 0) & (distance < window)), -torch.inf)"),
]


def check(t):
    call = lambda window: lambda m, q, k: m.sliding_mask(q, k, window)
    t.equal("6 tokens, window 3", call(3), torch.arange(6), torch.arange(6))
    t.equal("window 1: each sees itself alone", call(1), torch.arange(4), torch.arange(4))
    t.equal("2 new tokens at places 7 and 8 of a cache of 12", call(4), torch.tensor([7, 8]), torch.arange(12))
    t.equal("a window wider than the text", call(100), torch.arange(5), torch.arange(5))
    t.fast("1,500 tokens", call(512), torch.arange(1500), torch.arange(1500), because="compare all pairs at once, without a Python loop.")


def install(mine):
    import gemma
    original = gemma.Places.__init__

    def places(self, config, *arguments):
        original(self, config, *arguments)
        full = self.visible["full_attention"]                              # knows which slots hold padding
        keys = gemma.torch.arange(full.shape[-1], device=full.device)
        self.visible["sliding_attention"] = full & mine.sliding_mask(self.slots, keys, config.sliding_window)

    gemma.Places.__init__ = places
