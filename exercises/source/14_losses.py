"""Answer-only loss, and the retrieval loss

difficulty: medium · importance: high · minutes: 25 · needs: nothing

What a memory learns from.
 1. `answer_loss`: the logits at position t predict token t + 1. Only tokens of the answer, those from place `start` on, count:
    minus the logarithm of each one's probability, as a mean. Learning to predict the question would be a waste.
 2. `retrieval_loss`: each head's weights over the episodes are given as logarithms, null last. The weights of all episodes that
    support the answer are summed up (null's alone if there are none); minus the logarithm of the sum, as a mean over heads.
"""

import math

import torch


def slow_answer_loss(logits, ids, start):
    """The specification of step 1, in loops."""
    losses = []
    for t in range(start, len(ids)):
        row = [float(v) for v in logits[t - 1]]
        best = max(row)
        losses.append(best + math.log(sum(math.exp(v - best) for v in row)) - row[int(ids[t])])
    return torch.tensor(sum(losses) / len(losses))


def slow_retrieval_loss(log_weights, support):
    """The specification of step 2, in loops."""
    total = 0.0
    for head in log_weights:
        chosen = [float(head[n]) for n in (support or [len(head) - 1])]
        best = max(chosen)
        total -= best + math.log(sum(math.exp(v - best) for v in chosen))
    return torch.tensor(total / len(log_weights))


def answer_loss(logits, ids, start):
    """logits (T, V), ids (T,) int64, start: place of the answer's first token, at least 1 -> a tensor without dimensions. No loops."""
    # solution:
    return torch.nn.functional.cross_entropy(logits[start - 1:-1], ids[start:])
    # end of solution


def retrieval_loss(log_weights, support):
    """log_weights (H, N + 1), support: list of places of episodes, perhaps empty -> a tensor without dimensions. No loops."""
    # solution:
    chosen = log_weights[:, support or [-1]]
    return -chosen.logsumexp(-1).mean()
    # end of solution


# ---- below: not in the learner's file

SLOW = {"answer_loss": "slow_answer_loss", "retrieval_loss": "slow_retrieval_loss"}
HINTS = ["The first answer token stands at `start`; the logits that predict it stand one place before.",
         "The logarithm of a sum of weights, from their logarithms: logsumexp. exp, sum and log one by one give -inf for tiny weights.",
         "cross_entropy(logits[start - 1:-1], ids[start:]); -log_weights[:, support or [-1]].logsumexp(-1).mean()"]
MISTAKES = [
    ("logits not shifted: each position scored on its own token", "logits[start - 1:-1], ids[start:]", "logits[start:], ids[start:]"),
    ("the question's tokens counted too", "logits[start - 1:-1], ids[start:]", "logits[:-1], ids[1:]"),
    ("the answer's first token left out", "logits[start - 1:-1], ids[start:]", "logits[start:-1], ids[start + 1:]"),
    ("the question's last token counted too", "logits[start - 1:-1], ids[start:]", "logits[start - 2:-1], ids[start - 1:]"),
    ("the sum over tokens in place of their mean", "logits[start - 1:-1], ids[start:])", 'logits[start - 1:-1], ids[start:], reduction="sum")'),
    ("null's weight counted beside the episodes'", "support or [-1]", "[*support, -1]"),
    ("episodes taken one by one, not their summed weight", "chosen.logsumexp(-1)", "chosen"),
    ("the heads averaged before the logarithm", "-chosen.logsumexp(-1).mean()", "-(chosen.logsumexp(-1).logsumexp(0) - math.log(len(chosen)))"),
    ("exp, sum and log one by one, which gives infinity for tiny weights", "chosen.logsumexp(-1)", "chosen.exp().sum(-1).log()"),
    ("the sign forgotten", "-chosen", "chosen"),
]


def check(t):
    torch.manual_seed(1)
    logits, ids = torch.randn(7, 10) * 2, torch.tensor([3, 1, 4, 1, 5, 9, 2])
    answer = lambda start: lambda m, logits, ids: m.answer_loss(logits, ids, start)
    t.equal("the answer is the last three of seven tokens", answer(4), logits, ids)
    t.equal("the answer is the last token", answer(6), logits, ids)
    t.equal("logits of several hundred", answer(4), logits * 200, ids, tolerance=1e-4)
    t.gradient("gradient of the answer loss", answer(4), logits, ids)
    weights = torch.randn(3, 6).mul(2).log_softmax(-1)
    found = lambda support: lambda m, weights: m.retrieval_loss(weights, support)
    t.equal("one episode supports the answer", found([2]), weights)
    t.equal("two episodes do", found([1, 4]), weights)
    t.equal("none does", found([]), weights)
    t.equal("tiny weights", found([0, 1]), weights - 200)
    t.gradient("gradient of the retrieval loss", found([1, 4]), weights)
