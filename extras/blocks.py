"""Matrices in eight bits a number, for files: whole numbers from -127 to 127, and a step for every block of 32 of a row.

As in the Q8_0 format of llama.cpp. A step for a whole row would be that of its largest number, and a value map, with its large
diagonal, would lose the small numbers beside it.
"""

import torch

BLOCK = 32
SCALE = ".scale"                     # a packed tensor's steps are saved under its name and this


def packed(tensors):
    """Tensors by name, with those packed that have rows of whole blocks: int8, their steps beside them. The rest is float32, or as it was."""
    kept = {}
    for name, t in tensors.items():
        if t.is_floating_point() and t.ndim > 1 and t.shape[-1] % BLOCK == 0:
            kept[name], kept[name + SCALE] = pack(t)
        else:
            kept[name] = t.float() if t.is_floating_point() else t
    return kept


def unpacked(tensors):
    """What `packed` made, or tensors that never were packed -> tensors by name. What does not fit together is left as it is."""
    kept = dict(tensors)
    for name, step in tensors.items():
        whole = tensors.get(name.removesuffix(SCALE))
        if name.endswith(SCALE) and whole is not None and whole.dtype == torch.int8 and step.dtype == torch.float16 \
                and (*step.shape[:-1], step.shape[-1] * BLOCK) == tuple(whole.shape):
            kept[name.removesuffix(SCALE)] = unpack(whole, step)
            del kept[name]
    return kept


def pack(t):
    """t (..., n) -> int8 (..., n), and steps float16 (..., n / BLOCK). What was packed before is packed to the same bits."""
    blocks = t.float().unflatten(-1, (-1, BLOCK))
    step = (blocks.abs().amax(-1) / 127).clamp(min=2 ** -14).half()        # normal numbers alone: smaller ones are less precise
    whole = (blocks / step.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return whole.flatten(-2), step


def unpack(whole, step):
    """What `pack` made -> float32 (..., n)."""
    return (whole.float().unflatten(-1, (-1, BLOCK)) * step.float()[..., None]).flatten(-2)
