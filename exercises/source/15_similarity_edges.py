"""Similarity edges: what is out of date

difficulty: medium · importance: medium · minutes: 25 · needs: nothing

"Maria moved to Oslo" makes "Maria lives in Lisbon" out of date. Among the k episodes that might answer a question, every later
one sends a message to every earlier one. The score of "j replaces i" is a sum:
    fits * (fit[j] - fit[i])  +  likes * alike[i, j]  +  replaces[j]  +  replaced[i]  +  bias
(how much better j fits the question; how alike they are; what each says by itself), and sigmoid(score) is how likely j has
replaced i. An episode is still true if none of those told later has replaced it: the product of 1 - sigmoid(score), of
which the logarithm is asked for. Note that log(1 - sigmoid(s)) = -softplus(s), which is exact for large scores too.
"""

import math

import torch


def slow_still_true(fit, alike, replaces, replaced, told, fits, likes, bias):
    """The specification, in loops."""
    result = []
    for i in range(len(fit)):
        total = 0.0
        for j in range(len(fit)):
            if told[j] > told[i]:
                score = float(fits * (fit[j] - fit[i]) + likes * alike[i, j] + replaces[j] + replaced[i] + bias)
                total -= score + math.log1p(math.exp(-score)) if score > 0 else math.log1p(math.exp(score))
        result.append(total)
    return torch.tensor(result)


def still_true(fit, alike, replaces, replaced, told, fits, likes, bias):
    """fit, replaces, replaced (k,), alike (k, k), told (k,) int64 places in time; fits, likes, bias: numbers -> (k,). No loops."""
    # solution:
    score = (fits * (fit[None, :] - fit[:, None]) + likes * alike + replaces[None, :] + replaced[:, None] + bias)
    later = told[None, :] > told[:, None]
    return -(torch.nn.functional.softplus(score) * later).sum(-1)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"still_true": "slow_still_true"}
HINTS = ["Make the table score[i, j] first: what belongs to j goes across, v[None, :]; what belongs to i goes down, v[:, None].",
         "told[None, :] > told[:, None] is True where j is later than i. Multiply, then sum over j, the last dimension.",
         "score = fits * (fit[None, :] - fit[:, None]) + likes * alike + replaces[None, :] + replaced[:, None] + bias; "
         "-(softplus(score) * later).sum(-1)"]
MISTAKES = [
    ("messages from earlier to later episodes", "told[None, :] > told[:, None]", "told[None, :] < told[:, None]"),
    ("every other episode may replace one, not only later ones", "told[None, :] > told[:, None]", "told[None, :] != told[:, None]"),
    ("an episode that replaces itself", "told[None, :] > told[:, None]", "told[None, :] >= told[:, None]"),
    ("later taken from the order in the list, not from told", "told[None, :] > told[:, None]",
     "torch.arange(len(told))[None, :] > torch.arange(len(told))[:, None]"),
    ("replaces and replaced swapped", "replaces[None, :] + replaced[:, None]", "replaced[None, :] + replaces[:, None]"),
    ("the better fit counted for the earlier one", "(fit[None, :] - fit[:, None])", "(fit[:, None] - fit[None, :])"),
    ("the sum over i, not over j", ".sum(-1)", ".sum(0)"),
    ("the largest replacement alone", ".sum(-1)", ".amax(-1)"),
    ("the probability, not its logarithm", "return -(torch.nn.functional.softplus(score) * later).sum(-1)",
     "return (-(torch.nn.functional.softplus(score) * later).sum(-1)).exp()"),
    ("log(1 - sigmoid), which is -inf for large scores", "return -(torch.nn.functional.softplus(score) * later).sum(-1)",
     "return torch.where(later, (1 - score.sigmoid()).log(), 0.0).sum(-1)"),
]


def check(t):
    torch.manual_seed(1)
    k = 5
    fit, replaces, replaced, alike = torch.rand(k), torch.randn(k), torch.randn(k), torch.rand(k, k)
    alike, told = (alike + alike.T) / 2, torch.tensor([3, 0, 7, 1, 4])
    call = lambda m, *inputs: m.still_true(*inputs, 10.0, 4.0, -5.0)
    t.equal("5 episodes", call, fit, alike, replaces, replaced, told)
    t.equal("two of them told at the same time", call, fit, alike, replaces, replaced, torch.tensor([3, 0, 3, 1, 4]))
    t.equal("scores of several hundred", call, fit * 50, alike, replaces, replaced, told, tolerance=1e-4)
    t.gradient("gradient", call, fit, alike, replaces, replaced, told, tolerance=1e-3)
    big = 400
    t.fast("400 episodes", call, torch.rand(big), torch.rand(big, big), torch.randn(big), torch.randn(big), torch.arange(big),
           because="work on all pairs at once, without a Python loop.")


def install(mine):
    import gnn

    def forward(self, match, keys, nodes, episodes):
        alike = gnn.torch.einsum("rihc,rjhc->rij", keys, keys) / keys.shape[2]
        replaces, replaced = self.says(nodes).float().unbind(-1)
        return gnn.torch.stack([mine.still_true(*row, self.fits, self.alike, self.bias)
                                for row in zip(match, alike, replaces, replaced, episodes)])

    gnn.SimilarityEdges.forward = forward
