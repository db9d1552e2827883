"""A frozen base: which gradients exist, and where the backward pass stops

difficulty: medium · importance: high · minutes: 25 · needs: nothing

A memory is added after `at` layers of a model that must not change. The layers above it still have to carry the gradient down to the memory;
the layers below it need none, and what they would keep for a backward pass is memory wasted.
 1. `prepare`: no parameter of the base asks for a gradient, and the base is in eval mode (no dropout)
 2. `forward`: the first `at` layers without recording anything; then h + memory(h); then the other layers, recorded
 3. `gradients`: of the sum of the result, one for each parameter of the memory, in their order; no .grad is left behind
"""

import torch


def slow_gradients(base, memory, at, x, step=1e-5):
    """The specification of step 3, in loops: change each number of the memory a little, and see what the result does."""
    def result():
        h = x
        for number, layer in enumerate(base, start=1):
            h = layer(h)
            if number == at:
                h = h + memory(h)
        return float(h.sum())
    found = []
    with torch.no_grad():
        for p in memory.parameters():
            gradient = torch.zeros_like(p)
            for i in range(p.numel()):
                before = p.view(-1)[i].item()
                p.view(-1)[i] = before + step
                more = result()
                p.view(-1)[i] = before - step
                gradient.view(-1)[i] = (more - result()) / (2 * step)
                p.view(-1)[i] = before
            found.append(gradient)
    return found


def prepare(base):
    """base: nn.Sequential. Changes it, returns nothing."""
    # solution:
    base.requires_grad_(False)
    base.eval()
    # end of solution


def forward(base, memory, at, x):
    """base: nn.Sequential, memory: a module, at: how many layers are below it, x (B, D) -> the output of the last layer."""
    # solution:
    with torch.no_grad():
        h = base[:at](x)
    h = h + memory(h)
    return base[at:](h)
    # end of solution


def gradients(base, memory, at, x):
    """As `forward`, but returns the list of gradients of the result's sum, one for each of memory.parameters()."""
    # solution:
    result = forward(base, memory, at, x).sum()
    return list(torch.autograd.grad(result, list(memory.parameters())))
    # end of solution


# ---- below: not in the learner's file

SLOW = {"gradients": "slow_gradients"}
HINTS = ["requires_grad_(False) and .eval() are two different things: one stops gradients, the other dropout. base[:2] are its first two layers.",
         "A frozen layer still passes a gradient on to what is below it; only torch.no_grad() (or detach) ends the way down.",
         "with torch.no_grad(): h = base[:at](x); then h = h + memory(h); return base[at:](h). "
         "gradients: list(torch.autograd.grad(forward(...).sum(), list(memory.parameters())))."]
MISTAKES = [
    ("the base left in training mode, with dropout", "base.eval()", "base.train()"),
    ("the base not frozen", "base.requires_grad_(False)", "pass"),
    ("the memory one layer too high", "h = base[:at](x)\n    h = h + memory(h)\n    return base[at:](h)", "h = base[:at + 1](x)\n    h = h + memory(h)\n    return base[at + 1:](h)"),
    ("h replaced by what the memory gives", "h = h + memory(h)", "h = memory(h)"),
    ("nothing recorded at all: no_grad reaches too far", "    h = h + memory(h)\n    return base[at:](h)", "        h = h + memory(h)\n        return base[at:](h)"),
    ("the layers below the memory recorded too", "with torch.no_grad():", "with torch.enable_grad():"),
    ("gradients left behind in .grad", "return list(torch.autograd.grad(result, list(memory.parameters())))",
     "result.backward()\n    return [p.grad for p in memory.parameters()]"),
    ("the mean of the result in place of its sum", "forward(base, memory, at, x).sum()", "forward(base, memory, at, x).mean()"),
]


def check(t):
    def made(m=None):
        torch.manual_seed(1)
        base = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(5, 5), torch.nn.Tanh()).double()
        memory, x = torch.nn.Linear(5, 5).double(), torch.randn(4, 3).double()
        if m:
            m.prepare(base)
        return base, memory, 3, x

    def result(m):
        base, *rest = made(m)
        return m.forward(base, *rest)

    def prepared(m):
        base, *_ = made(m)
        return [p.requires_grad for p in base.parameters()]

    def recorded(m):
        """Does anything below the memory hear of the backward pass?"""
        base, memory, at, x = made(m)
        x.requires_grad_()
        m.forward(base, memory, at, x).sum().backward()
        return x.grad is None

    def left_behind(m):
        base, memory, at, x = made(m)
        m.gradients(base, memory, at, x)
        return all(p.grad is None for p in [*base.parameters(), *memory.parameters()])

    if not t.values_only:
        t.true("the mode of the base", lambda m: not made(m)[0].training, "expected eval mode; this looks like the mistake: the base left in training mode, with dropout")
        t.equal("which parameters of the base ask for a gradient", prepared)
    t.equal("the result", result, tolerance=1e-6)
    t.true("the way up", lambda m: result(m).requires_grad, "no gradient can reach the memory; this looks like the mistake: nothing recorded at all: no_grad reaches too far")
    if not t.values_only:
        t.true("the way down", recorded, "the backward pass goes on below the memory; this looks like the mistake: the layers below the memory recorded too")
    t.equal("gradients of the memory", lambda m: list(m.gradients(*made(m))), tolerance=1e-6)
    t.true("nothing left behind", left_behind, "some parameter has a .grad now; this looks like the mistake: gradients left behind in .grad")
