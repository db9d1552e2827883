"""RMSNorm with (1 + weight)

difficulty: easy · importance: high · minutes: 10 · needs: nothing

Divide every row by its root mean square, so that its numbers have size 1 on average, and multiply by (1 + weight): a weight
of zero leaves the plain norm. Gemma computes all of this in float32, and only the result goes back to the dtype of x.
    y[i] = x[i] / sqrt(mean over the row of x[j] ** 2  +  eps) * (1 + weight[i])
"""

import torch


def slow_rms_norm(x, weight, eps=1e-6):
    """The specification, in loops: x (rows, D)."""
    y = torch.zeros_like(x)
    for r in range(x.shape[0]):
        squares = [float(v) ** 2 for v in x[r]]
        size = (sum(squares) / len(squares) + eps) ** 0.5
        for i in range(x.shape[1]):
            y[r, i] = float(x[r, i]) / size * (1 + float(weight[i]))
    return y


def rms_norm(x, weight, eps=1e-6):
    """x (..., D) of any floating dtype, weight (D,) -> (..., D) in the dtype of x. No loops."""
    # solution:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).to(x.dtype)
    # end of solution


# ---- below: not in the learner's file

SLOW = {"rms_norm": "slow_rms_norm"}
HINTS = ["mean(-1, keepdim=True) keeps the last dimension, so that the division broadcasts over the row.",
         "torch.rsqrt(v) is 1 / sqrt(v). eps belongs inside the root. Go to float32 first, back to x.dtype last.",
         "y = x.float(); y = y * rsqrt(mean of y squared over the last dimension + eps); then times (1 + weight.float()), then .to(x.dtype)."]
MISTAKES = [
    ("the norm without the + 1 on the weight", "(1.0 + weight.float())", "weight.float()"),
    ("the sum of squares in place of their mean", "y.pow(2).mean(-1, keepdim=True)", "y.pow(2).sum(-1, keepdim=True)"),
    ("LayerNorm, which takes the mean out first", "y = x.float()\n", "y = x.float() - x.float().mean(-1, keepdim=True)\n"),
    ("eps added after the root", "torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)", "1 / (y.pow(2).mean(-1, keepdim=True).sqrt() + eps)"),
    ("a result that stays in float32", "(y * (1.0 + weight.float())).to(x.dtype)", "y * (1.0 + weight.float())"),
    ("squares taken in the dtype of x", "y = x.float()\n", "y = x * 1\n"),
    ("the mean over all rows together", "y.pow(2).mean(-1, keepdim=True)", "y.pow(2).mean()"),
    ("the root's gradient cut off by detach", "torch.rsqrt(y.pow(2)", "torch.rsqrt(y.detach().pow(2)"),
]


def check(t):
    torch.manual_seed(1)
    x, weight = torch.randn(3, 8) * torch.tensor([[1.0], [5.0], [0.2]]) + 0.5, torch.randn(8) * 0.3
    call = lambda m, x, w: m.rms_norm(x, w)
    t.equal("three rows in float32", call, x, weight)
    t.equal("a row of tiny numbers, where eps counts", call, x[:1] * 1e-3, weight)
    t.equal("a row in bfloat16", call, (x[:1] * 7).bfloat16(), weight, tolerance=1e-4)
    t.equal("a row in float16, whose squares are too large for it", call, (x[:1] * 1000).half(), weight, tolerance=1e-3)
    if not t.values_only:
        t.equal("more dimensions", call, torch.randn(2, 3, 4, 8), weight)
    t.gradient("gradient", call, x, weight)
    t.fast("2,000 rows of 256", call, torch.randn(2000, 256), torch.randn(256), because="work on all rows at once, without a Python loop.")


def install(mine):
    import gemma
    gemma.RMSNorm.forward = lambda self, x: mine.rms_norm(x, self.weight, self.eps)
