"""Checkpoints of training: all that --resume needs, in one file with one hash over all of it."""

import hashlib
import json
import re
import sys
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gemma import InputError, read_json, replacing

FREE = {"dropout", "null_threshold", "candidates", "readable", "chat"}     # settings that no weight depends on


def check_same(saved, model, what):
    """Raise InputError where `saved`, the settings of a memory as a dict, are others than the model's."""
    now = asdict(model.config)
    for name in saved.keys() & now.keys() - FREE:
        if saved[name] != now[name]:
            raise InputError(f"expected {what} with the settings it was made with, --{name.replace('_', '-')} {saved[name]}, got {now[name]}; say the same.")


def check_init(folder, model):
    """Raise InputError unless a folder holds a memory of the model's design; the graph's settings are to be the same too."""
    saved = read_json(Path(folder) / "memory.json")
    if saved.get("variant", "graph") != model.variant:
        raise InputError(f"expected a memory of the variant {model.variant} as --init, got {folder} of the variant {str(saved['variant'])[:40]}; name another.")
    if model.variant == "graph" and isinstance(saved.get("memory"), dict):
        check_same(saved["memory"], model, f"--init {folder}")


def set_aside(folder):
    """Rename a folder that holds an earlier run, `name` to the first free of `name-1`, `name-2`, …, and say so: nothing of it is lost. Raises
    InputError for the folder that this program works in, whose new name it would not learn."""
    if not any((folder / name).exists() for name in ("memory.json", "checkpoint.safetensors", "log.jsonl")):
        return
    folder = folder.resolve()
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"expected a folder without an earlier run as --out, or one that can be renamed, got the working folder {folder}; name another.")
    other = next(other for number in count(1) if not (other := folder.with_name(f"{folder.name}-{number}")).exists())
    folder.rename(other)
    folder.mkdir()                       # a link to this folder goes on leading somewhere
    print(f"note: {folder.name} held an earlier run, which is in {other} now.", file=sys.stderr)


def clear_halves(folder):
    """Remove what a killed run was still writing: files of the names that `replacing` gives, and no others."""
    for file in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.(checkpoint\.safetensors|memory\.(json|safetensors\.new)|log\.jsonl|curves\.png)\.\d+\.tmp", file.name) and file.is_file():
            file.unlink()


def save_checkpoint(folder, model, optimizer, progress):
    """Everything that --resume needs, in one file that is replaced whole. progress: a dict for JSON."""
    tensors = {f"model.{n}": t.detach().cpu().contiguous().clone() for n, t in model.injection.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{n}": t.detach().cpu().contiguous().clone() for n, t in state.items()})
    progress = json.dumps(dict(progress, settings=asdict(model.config)))
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
        progress = json.loads(meta["progress"])
        check_same(progress.pop("settings", {}), model, "--resume")
        model.injection.load_state_dict({n[6:]: t for n, t in every.items() if n.startswith("model.")})
    except InputError:
        raise
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: expected a checkpoint of a memory with these settings ({str(error)[:120]!r}); "
                         "resume with the settings and the version of the code it was made with, or train anew.") from None
    state = optimizer.state_dict()
    for name, tensor in every.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict(state)
    return progress
