"""The decoder block

difficulty: easy · importance: high · minutes: 20 · needs: RMSNorm (01)

`mlp`: two maps of x; the first goes through GELU (its tanh approximation) and gates the second; a third map leads back:
    down (gelu(gate x) * up x)       gelu(a) = a / 2 * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 a ** 3)))
`block`: attention, then the MLP, each with a norm before and another after it; what comes out is added to what went in. The
sum itself is never normalised: it is the residual stream, which runs from the embeddings to the head.
"""

import math

import torch


def slow_mlp(x, gate, up, down):
    """The specification of `mlp`, in loops."""
    out, dot = torch.zeros_like(x), lambda row, vector: sum(float(a) * float(b) for a, b in zip(row, vector))
    for t in range(x.shape[0]):
        inner = []
        for g, u in zip(gate, up):
            a = dot(g, x[t])
            inner.append(a / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a ** 3))) * dot(u, x[t]))
        for i, row in enumerate(down):
            out[t, i] = dot(row, inner)
    return out


def slow_block(h, norms, attention, feed_forward):
    """The specification of `block`, in loops over the numbers of the residual stream."""
    stream = h.tolist()
    for before, part, after in ((norms[0], attention, norms[1]), (norms[2], feed_forward, norms[3])):
        found = after(part(before(torch.tensor(stream))))
        for t in range(len(stream)):
            for i in range(len(stream[t])):
                stream[t][i] += float(found[t, i])
    return torch.tensor(stream)


def mlp(x, gate, up, down):
    """x (..., D), gate and up (W, D), down (D, W) -> (..., D). No loops."""
    # solution:
    return (torch.nn.functional.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T
    # end of solution


def block(h, norms, attention, feed_forward):
    """h (..., T, D); norms: four functions, in the order of their use; attention, feed_forward: functions of one tensor."""
    # solution:
    h = h + norms[1](attention(norms[0](h)))
    return h + norms[3](feed_forward(norms[2](h)))
    # end of solution


# ---- below: not in the learner's file

SLOW = {"mlp": "slow_mlp", "block": "slow_block"}
HINTS = ["torch.nn.functional.gelu has an argument `approximate`. A weight of shape (out, in) is applied as x @ weight.T.",
         "The block is two lines of the same form: h = h + after(part(before(h))).",
         "(gelu(x @ gate.T, approximate='tanh') * (x @ up.T)) @ down.T; block: norms 0 and 1 around attention, 2 and 3 around the MLP."]
MISTAKES = [
    ("the exact GELU in place of its tanh approximation", ', approximate="tanh"', ""),
    ("gate and up swapped", 'x @ gate.T, approximate="tanh") * (x @ up.T)', 'x @ up.T, approximate="tanh") * (x @ gate.T)'),
    ("SiLU in place of GELU", 'gelu(x @ gate.T, approximate="tanh")', "silu(x @ gate.T)"),
    ("no norms after attention and MLP, as in Llama", "h = h + norms[1](attention(norms[0](h)))\n    return h + norms[3](feed_forward(norms[2](h)))",
     "h = h + attention(norms[0](h))\n    return h + feed_forward(norms[2](h))"),
    ("the sum normalised, not what is added", "h = h + norms[1](attention(norms[0](h)))", "h = norms[1](h + attention(norms[0](h)))"),
    ("the residual taken after the first norm", "h = h + norms[1](attention(norms[0](h)))", "h = norms[0](h)\n    h = h + norms[1](attention(h))"),
    ("attention and MLP both fed with h, side by side", "h = h + norms[1](attention(norms[0](h)))\n    return h +",
     "return h + norms[1](attention(norms[0](h))) +"),
    ("no residual around the MLP", "return h + norms[3]", "return norms[3]"),
    ("the second and third norm swapped", "h = h + norms[1](attention(norms[0](h)))\n    return h + norms[3](feed_forward(norms[2](h)))",
     "h = h + norms[2](attention(norms[0](h)))\n    return h + norms[3](feed_forward(norms[1](h)))"),
    ("a residual stream cut off from its gradient", "return h + norms[3]", "return h.detach() + norms[3]"),
]


def check(t):
    torch.manual_seed(1)
    D, W = 6, 10
    h, gate, up, down, w = torch.randn(5, D), torch.randn(W, D), torch.randn(W, D), torch.randn(D, W), torch.rand(4, D) + 0.5
    feed = lambda m, *inputs: m.mlp(*inputs)
    attend = lambda x: x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1)[:, None]

    def call(m, h, w, gate):
        norms = [lambda x, row=row: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * row for row in w]
        return m.block(h, norms, attend, lambda x: torch.tanh(x @ gate.T @ gate))

    t.equal("the MLP on 5 tokens", feed, h, gate, up, down, tolerance=1e-4)
    t.equal("the block on 5 tokens", call, h * 3, w, gate, tolerance=1e-4)
    t.gradient("gradient of the MLP", feed, h, gate, up, down)
    t.gradient("gradient of the block", call, h, w, gate)
    t.fast("500 tokens", feed, torch.randn(500, 64), torch.randn(128, 64), torch.randn(128, 64), torch.randn(64, 128),
           because="work on all tokens at once, without a Python loop.")


def install(mine):
    import gemma

    def forward(self, h, places, slots=None, layer=0, injection=None):
        # The block as exercised has no socket between attention and MLP; this project's memory uses none there.
        norms = (self.input_layernorm, self.post_attention_layernorm, self.pre_feedforward_layernorm, self.post_feedforward_layernorm)
        return mine.block(h, norms, lambda x: self.self_attn(x, places, slots), self.mlp)

    gemma.DecoderLayer.forward = forward
    gemma.MLP.forward = lambda self, h: mine.mlp(h, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
