"""Checkpoints of training: all that --resume needs, in one file with one hash over all of it."""

import hashlib
import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gemma import InputError, replacing


def save_checkpoint(folder, model, optimizer, progress):
    """Everything that --resume needs, in one file that is replaced whole. progress: a dict for JSON."""
    tensors = {f"model.{n}": t.detach().cpu().contiguous().clone() for n, t in model.injection.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{n}": t.detach().cpu().contiguous().clone() for n, t in state.items()})
    progress = json.dumps(progress)
    with replacing(folder / "checkpoint.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"progress": progress, "sha256": fingerprint(tensors, progress)})


def fingerprint(tensors, progress):
    """A hash of all that a checkpoint holds."""
    digest = hashlib.sha256(progress.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(folder, model, optimizer):
    """Put a checkpoint's weights and moments in their places. Returns what was saved as its progress."""
    file = folder / "checkpoint.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            every = {name: tensors.get_tensor(name) for name in tensors.keys()}
            meta = tensors.metadata()
        if fingerprint(every, meta["progress"]) != meta["sha256"]:
            raise ValueError("it is not what was saved")
        model.injection.load_state_dict({n[6:]: t for n, t in every.items() if n.startswith("model.")})
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: expected a checkpoint of a memory with these settings ({str(error)[:120]!r}); "
                         "resume with the settings it was made with, or train anew.") from None
    state = optimizer.state_dict()
    for name, tensor in every.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict(state)
    return json.loads(meta["progress"])
