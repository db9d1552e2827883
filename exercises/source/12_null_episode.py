"""The null episode, and refusing

difficulty: medium · importance: high · minutes: 25 · needs: nothing

A softmax has to put its weight somewhere. So one episode more, "none of these", stands last in every memory: it has a
learned key and nothing to read. A question that no episode answers finds it, and the model can say that it doesn't know.
 1. `weigh`: the query and all keys, the null key too, are brought to length 1; each head's scores are their dot
    products times that head's temperature; episodes that are not valid are left out (null never is); log-softmax
 2. `refuses`: True if the null episode's weight (not its logarithm), as a mean over the heads, is above the threshold
"""

import math

import torch


def slow_weigh(query, keys, null_key, temperature, valid):
    """The specification of step 1, in loops."""
    H, N = query.shape[0], keys.shape[0]
    result = torch.zeros(H, N + 1)
    unit = lambda v: [float(a) / sum(float(b) ** 2 for b in v) ** 0.5 for a in v]
    for h in range(H):
        candidates = [keys[n, h] for n in range(N)] + [null_key[h]]
        scores = [float(temperature[h]) * sum(a * b for a, b in zip(unit(query[h]), unit(key))) for key in candidates]
        scores = [s if n == N or valid[n] else -math.inf for n, s in enumerate(scores)]
        total = math.log(sum(math.exp(s) for s in scores))
        for n, s in enumerate(scores):
            result[h, n] = s - total
    return result


def slow_refuses(log_weights, threshold):
    """The specification of step 2, in a loop."""
    total = 0.0
    for head in log_weights:
        total += math.exp(float(head[-1]))
    return total / len(log_weights) > threshold


def weigh(query, keys, null_key, temperature, valid):
    """query (H, C), keys (N, H, C), null_key (H, C), temperature (H,), valid (N,) bool -> (H, N + 1) logarithms, null last."""
    # solution:
    unit = lambda v: torch.nn.functional.normalize(v, dim=-1)
    every = torch.cat((unit(keys), unit(null_key)[None]))
    scores = torch.einsum("hc,nhc->hn", unit(query), every) * temperature[:, None]
    allowed = torch.cat((valid, valid.new_ones(1)))
    return scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    # end of solution


def refuses(log_weights, threshold):
    """log_weights (H, N + 1), null last -> True or False, as a bool of Python."""
    # solution:
    return bool(log_weights[:, -1].exp().mean() > threshold)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"weigh": "slow_weigh", "refuses": "slow_refuses"}
HINTS = ["torch.cat((keys, null_key[None])) puts null last. torch.nn.functional.normalize brings vectors to length 1.",
         "Mask after multiplying by the temperature: -inf times a temperature has no usable gradient. log_softmax(-1) comes last.",
         "scores = einsum('hc,nhc->hn', unit query, unit keys) * temperature[:, None]; masked_fill(~allowed, -inf).log_softmax(-1). "
         "refuses: bool(log_weights[:, -1].exp().mean() > threshold)."]
MISTAKES = [
    ("keys not brought to length 1", "torch.cat((unit(keys), unit(null_key)[None]))", "torch.cat((keys, null_key[None]))"),
    ("the null key not brought to length 1", "unit(null_key)[None]", "null_key[None]"),
    ("the query not brought to length 1", 'unit(query), every', 'query, every'),
    ("null first, not last", "torch.cat((unit(keys), unit(null_key)[None]))", "torch.cat((unit(null_key)[None], unit(keys)))"),
    ("divided by the temperature", "every) * temperature", "every) / temperature"),
    ("episodes that are not valid still weighed", "scores.masked_fill(~allowed, -torch.inf)", "scores"),
    ("weights in place of their logarithms", ".log_softmax(-1)", ".softmax(-1)"),
    ("null left out when all episodes are invalid", "valid.new_ones(1)", "valid.any()[None]"),
    ("the mean of logarithms, not of weights", "log_weights[:, -1].exp().mean() > threshold", "log_weights[:, -1].mean().exp() > threshold"),
    ("the largest head, not their mean", "log_weights[:, -1].exp().mean()", "log_weights[:, -1].exp().max()"),
    ("the first episode's weight in place of null's", "log_weights[:, -1]", "log_weights[:, 0]"),
]


def check(t):
    torch.manual_seed(1)
    H, N, C = 3, 5, 4
    inputs = torch.randn(H, C) * 2, torch.randn(N, H, C) * 3, torch.randn(H, C) * 0.5, torch.tensor([4.0, 8.0, 2.0])
    call = lambda m, *inputs: m.weigh(*inputs)
    t.equal("5 episodes", call, *inputs, torch.ones(N, dtype=torch.bool))
    t.equal("two of them not valid", call, *inputs, torch.tensor([True, False, True, False, True]))
    t.equal("no valid episode: all weight is null's", call, *inputs, torch.zeros(N, dtype=torch.bool))
    t.gradient("gradient, two of them not valid", lambda m, *inputs: m.weigh(*inputs)[:, [0, 2, 4, 5]], *inputs, torch.tensor([True, False, True, False, True]))
    weights = torch.tensor([[0.30, 0.1, 0.60], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]]).log()
    t.equal("refusing at several thresholds", lambda m, w: [m.refuses(w, threshold) for threshold in (0.2, 0.25, 0.4, 0.5, 0.7)], weights)
