"""The static KV cache

difficulty: medium · importance: high · minutes: 30 · needs: the sliding mask (03)

Keys and values of earlier tokens are kept, so that a new token costs one step and not the whole text again. The two tensors
have their final size from the start and are written in place: nothing grows, nothing is copied.

A cache is a dict: "k" and "v" of shape (..., L, C), and "position", the number of slots in use. `append` writes T new keys and
values into the next free slots, moves "position", and returns k, v (the cache's own tensors, whole) and a mask (T, L): each
of the T new tokens sees every slot up to and including its own. If they don't fit it raises ValueError and changes nothing.
"""

import torch


def slow_append(cache, k, v):
    """The specification, in loops."""
    T, L = k.shape[-2], cache["k"].shape[-2]
    if cache["position"] + T > L:
        raise ValueError(f"{T} more tokens don't fit into {L} slots, of which {cache['position']} are in use")
    mask = torch.zeros(T, L, dtype=torch.bool)
    for t in range(T):
        slot = cache["position"] + t
        cache["k"][..., slot, :] = k[..., t, :]
        cache["v"][..., slot, :] = v[..., t, :]
        for j in range(slot + 1):
            mask[t, j] = True
    cache["position"] += T
    return cache["k"], cache["v"], mask


def append(cache, k, v):
    """cache as above, k and v (..., T, C) -> cache["k"], cache["v"], mask (T, L) bool. No loops."""
    # solution:
    start, T, L = cache["position"], k.shape[-2], cache["k"].shape[-2]
    if start + T > L:
        raise ValueError(f"{T} more tokens don't fit into {L} slots, of which {start} are in use")
    cache["k"][..., start:start + T, :] = k
    cache["v"][..., start:start + T, :] = v
    cache["position"] = start + T
    mask = torch.arange(L, device=k.device) <= torch.arange(start, start + T, device=k.device)[:, None]
    return cache["k"], cache["v"], mask
    # end of solution


# ---- below: not in the learner's file

SLOW = {"append": "slow_append"}
HINTS = ["cache['k'][..., a:b, :] = k writes in place; cache['k'] = torch.cat(...) would make a new tensor.",
         "The new tokens take slots position to position + T - 1. Compare these, as a column, with torch.arange(L).",
         "start = cache['position']; check start + T <= L; write k and v to [..., start:start + T, :]; set the position; "
         "mask = arange(L) <= arange(start, start + T)[:, None]."]
MISTAKES = [
    ("the position never moved", 'cache["position"] = start + T\n', "pass\n"),
    ("always written from slot 0", 'cache["k"][..., start:start + T, :] = k\n    cache["v"][..., start:start + T, :] = v',
     'cache["k"][..., :T, :] = k\n    cache["v"][..., :T, :] = v'),
    ("all used slots visible, later ones among the new tokens too", "torch.arange(start, start + T, device=k.device)[:, None]",
     "torch.full((T, 1), start + T - 1)"),
    ("a new token that doesn't see itself", "device=k.device) <= torch", "device=k.device) < torch"),
    ("a mask that forgets the tokens before these", "torch.arange(start, start + T, device", "torch.arange(0, T, device"),
    ("keys written as values", 'cache["v"][..., start:start + T, :] = v', 'cache["v"][..., start:start + T, :] = k'),
    ("new tensors made in place of writing into the cache's own", 'cache["k"][..., start:start + T, :] = k',
     'cache["k"] = cache["k"].clone(); cache["k"][..., start:start + T, :] = k'),
    ("no look whether the new tokens fit", "if start + T > L:", "if start >= L:"),
]


def check(t):
    torch.manual_seed(1)
    k, v = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    fresh = lambda L=7: {"k": torch.zeros(2, 2, L, 4), "v": torch.zeros(2, 2, L, 4), "position": 0}

    def steps(*sizes):
        def call(m, k, v):
            cache, at, results = fresh(), 0, []
            for T in sizes:
                found = m.append(cache, k[..., at:at + T, :], v[..., at:at + T, :])
                results += [*(x.clone() if isinstance(x, torch.Tensor) else x for x in found), cache["position"]]
                at += T
            return results
        return call

    def same_tensors(m):
        cache = fresh()
        before = cache["k"], cache["v"]
        now = m.append(cache, k, v)
        return all(a is b and a is c for a, b, c in zip(before, now, (cache["k"], cache["v"])))

    def too_many(m):
        cache = fresh(6)
        m.append(cache, k, v)
        try:
            m.append(cache, k[..., :2, :], v[..., :2, :])
        except ValueError:
            return cache["position"] == 5 and bool((cache["k"][..., 5:, :] == 0).all())
        except RuntimeError:
            pass
        return False

    t.equal("2 tokens, then 1, then 2", steps(2, 1, 2), k, v)
    t.equal("one at a time", steps(1, 1, 1, 1, 1), k, v)
    t.true("in place", same_tensors, "the tensors in the cache, and those returned, have to be the ones it began with; this looks like the mistake: "
           "new tensors made in place of writing into the cache's own")
    t.true("more tokens than room", too_many, "expected ValueError and an unchanged cache; this looks like the mistake: no look whether the new tokens fit")
    big = torch.zeros(4, 5_000, 16)
    t.small("memory for one token with 5,000 slots", lambda m, new: m.append({"k": big, "v": big, "position": 4_000}, new, new), torch.randn(4, 1, 16),
            at_most=50_000, because="write into the slots; don't copy the cache.")


def install(mine):
    import gemma
    gemma.Slots.write = lambda self, slots, k, v: mine.append({"k": self.k, "v": self.v, "position": int(slots[0])}, k, v)[:2]
