"""Room for memories: how much of it there is, and tensors that grow without being copied each time."""

import os

import torch


def free(device):
    """Bytes that a GPU has left, or that the machine has in all; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


class Growing:
    """Tensors with room behind their end: to append to one copies what is new, and the old only now and then, as in a list."""

    def __init__(self):
        self.buffers, self.used = {}, {}

    def append(self, name, old, *new, device=None):
        """`old` (N, ...), usually what the last call of this name returned, with all `new` (n, ...) behind it, on `device`, by
        default that of the first."""
        if not new:
            return old
        device = torch.device(device or new[0].device)
        buffer, at, n = self.buffers.get(name), len(old), len(old) + sum(map(len, new))
        if buffer is None or buffer.data_ptr() != old.data_ptr() or self.used[name] != len(old) or n > len(buffer) or buffer.device != device:
            buffer = new[0].new_empty(max(n, 3 * len(old) // 2), *new[0].shape[1:], device=device)
            buffer[:len(old)] = old
            self.buffers[name] = buffer
        for part in new:
            buffer[at:at + len(part)] = part
            at += len(part)
        self.used[name] = n
        return buffer[:n]
