"""Choosing tokens: temperature, top-k, top-p

difficulty: medium · importance: medium · minutes: 25 · needs: nothing

From logits to the probabilities that the next token is drawn with, in this order:
 1. divide by the temperature and take the softmax;
 2. keep the k most probable tokens (top_k = 0 keeps all);
 3. of these keep the fewest best whose share of what step 2 kept reaches top_p: walking down from the best, a token stays
    if the share of all better ones is still below top_p, so the token that crosses the line stays;
 4. what is left is scaled to sum to 1, each at the place of its token in the vocabulary.
"""

import torch


def slow_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The specification, in loops: logits (B, V)."""
    result = torch.zeros_like(logits)
    for b in range(logits.shape[0]):
        scaled = [float(v) / temperature for v in logits[b]]
        best = max(scaled)
        exps = [2.718281828459045 ** (v - best) for v in scaled]
        order = sorted(range(len(exps)), key=lambda i: -exps[i])
        order = order[:top_k] if top_k else order
        total, better, kept = sum(exps[i] for i in order), 0.0, []
        for i in order:
            if better < top_p * total:
                kept.append(i)
            better += exps[i]
        for i in kept:
            result[b, i] = exps[i] / sum(exps[j] for j in kept)
    return result


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B, V), temperature above 0 -> (B, V), each row sums to 1. No loops."""
    # solution:
    ordered, tokens = (logits / temperature).softmax(-1).sort(-1, descending=True)
    if top_k:
        ordered = torch.cat((ordered[:, :top_k], torch.zeros_like(ordered[:, top_k:])), -1)
    before = ordered.cumsum(-1) - ordered
    total = ordered.sum(-1, keepdim=True)
    if top_p < 1:
        ordered = ordered.masked_fill(before >= top_p * total, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, tokens, ordered)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"probabilities": "slow_probabilities"}
HINTS = ["sort(-1, descending=True) gives the values and where they came from; scatter puts them back at the end.",
         "cumsum(-1) minus the values themselves is, at each token, the mass of all better ones. Compare that with top_p.",
         "ordered, tokens = softmax.sort(...); zero what is after top_k; zero where (cumsum - ordered) >= top_p * total; divide by the sum; "
         "torch.zeros_like(logits).scatter(-1, tokens, ordered)."]
MISTAKES = [
    ("the token that crosses top_p thrown away", "before = ordered.cumsum(-1) - ordered", "before = ordered.cumsum(-1) - 1e-9"),
    ("results in the order of the sort, not of the vocabulary", "torch.zeros_like(logits).scatter(-1, tokens, ordered)", "ordered"),
    ("multiplied by the temperature", "(logits / temperature)", "(logits * temperature)"),
    ("not scaled to sum to 1 again", "ordered = ordered / ordered.sum(-1, keepdim=True)", "pass"),
    ("top_p measured against all tokens and not against those that top-k kept", "before >= top_p * total", "before >= top_p"),
    ("the worst k tokens kept", "torch.cat((ordered[:, :top_k], torch.zeros_like(ordered[:, top_k:])), -1)",
     "torch.cat((torch.zeros_like(ordered[:, :-top_k]), ordered[:, -top_k:]), -1)"),
    ("top_k = 0 taken as 'keep one'", "if top_k:\n", "if top_k := max(1, top_k):\n"),
    ("the temperature applied after the softmax", "(logits / temperature).softmax(-1)", "(logits.softmax(-1) / temperature)"),
]


def check(t):
    torch.manual_seed(1)
    logits = torch.randn(3, 9) * 2
    call = lambda **options: lambda m, x: m.probabilities(x, **options)
    t.equal("no limits", call(), logits)
    t.equal("temperature 0.5", call(temperature=0.5), logits)
    t.equal("top_k=3", call(top_k=3), logits)
    t.equal("top_p=0.7", call(top_p=0.7), logits)
    t.equal("top_k=4 and top_p=0.8", call(top_k=4, top_p=0.8), torch.randn(4, 40))
    t.equal("top_p=0.01 keeps the best alone", call(top_p=0.01), logits)
    t.equal("large logits", call(temperature=0.1), logits * 100)
    t.fast("64 rows of 4,096 tokens", call(top_k=50, top_p=0.9), torch.randn(64, 4096), because="sort all rows at once, without a Python loop.")


def install(mine):
    import gemma

    def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(mine.probabilities(logits.float(), temperature, top_k, top_p), 1, generator=generator)[:, 0]

    gemma.sample = sample
