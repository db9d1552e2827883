"""A trained memory with a larger reader, that answers as it did:  python -m extras.grow tiny out/grown --reading-dim 256
Or one of an earlier design brought up to date:                    python -m extras.grow out/old out/new --fresh outdated
Or one that looks at more candidates:                              python -m extras.grow out/K out/wider --candidates 96

What was learnt is put into the corner of larger matrices, and the new rest starts silent, as in Net2Net
(https://arxiv.org/abs/1511.05641): new widths hold 0 until training writes into them, new layers add 0. Where the memory's design
has got new parts since it was saved, they start as in a fresh memory, but for `alike`, which would be heard at once: it starts at 0.
Parts that --fresh names start anew, `alike` too; parts that the design has no longer are left out. `train.py --init` goes on from there.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from extras.blocks import unpacked
from extras.memory_model import SHIPPED, new_folder
from gemma import InputError, read_json
from memory import GemmaWithMemory, MemoryConfig

HEADS = 4                            # of the reading attention
# What becomes of a tensor of the reader: it is multiplied by this power of k (see `grow`), and the new rest is 0 or stays random.
RULES = {"meaning.weight": (0, True), "understand.ask.weight": (1, True), "understand.found.weight": (1, True),         # these join
         "understand.echo": (1, True), "understand.before": (1, True), "down.weight": (1, True), "down.bias": (1, True), "up.weight": (-1, False), "up.bias": (0, False),
         "understood_key.weight": (-1, False), "fits.weight": (-1, False), "outdated.says.weight": (-1, False),
         "marks.weight": (-1, False)}         # these read


def grow(old, fresh, anew=()):
    """old: tensors of a memory, by name; fresh: those of a new one, whose reader is as wide and deep or more, changed in place, but
    for those whose names begin like one of `anew`.

    RMSNorm divides by the mean square of all widths. Where the new ones are 0 its result is larger by `k`, so what reads it is
    made smaller by as much, and what joins it larger.
    """
    d, D = (tensors["understand.ask.weight"].shape[0] for tensors in (old, fresh))
    k = (D / d) ** 0.5
    for name, new in fresh.items():
        layer, part = name.startswith("understand.layers."), name.split(".", 3)[-1]
        if name.startswith(tuple(anew)):
            continue
        if name not in old:                                                # a new layer: h + 0; or a new part of an old one
            new.mul_(part not in ("out.weight", "down.weight", "down.bias", "distance") and not (layer and part == "alike"))
        elif layer and part == "qkv.weight":
            wide, was = (t.view(3, HEADS, -1, t.shape[1]) for t in (new, old[name] / k))
            wide[1, :, d // HEADS:] = 0                                    # new widths of q meet nothing in the keys yet
            wide[:, :, :d // HEADS, :d] = was * torch.tensor([k, 1, 1])[:, None, None, None]      # scores are divided by the root of the width
        elif layer and part == "out.weight":
            new.zero_().view(D, HEADS, -1)[:d, :, :d // HEADS] = old[name].view(d, HEADS, -1) * k
        else:
            power, silent = RULES.get(part if layer else name, (0, False))
            new.mul_(not silent)
            new[tuple(map(slice, old[name].shape))] = old[name] * k ** power


def opened(name, fresh):
    """A memory of this design or an earlier one: (a fresh model with its settings, its weights by name but for those that begin like one
    of `fresh`). Raises InputError as opening a memory does, but for settings and tensors that the design didn't have yet, or has no longer."""
    folder = Path(SHIPPED.get(str(name), name))
    saved = read_json(folder / "memory.json")
    known, theirs = asdict(MemoryConfig()), saved.get("memory")
    if not isinstance(theirs, dict) or not isinstance(saved.get("base"), dict):
        raise InputError(f"{folder}/memory.json: expected the entries 'memory' and 'base'; restore the file that was saved.")
    config = MemoryConfig.from_dict({**known, **{field: value for field, value in theirs.items() if field in known}}, f"{folder}/memory.json")
    model = GemmaWithMemory.from_pretrained(base=saved["base"].get("name"), config=config)
    model.trained = saved.get("trained", {})
    names = [tensor for tensor, _ in model.injection.named_parameters()]
    if unknown := [part for part in fresh if not any(tensor.startswith(part) for tensor in names)]:
        raise InputError(f"expected parts of the memory as --fresh, got {unknown[0]!r}; they begin like one of {', '.join(sorted({t.split('.')[0] for t in names}))}.")
    try:
        weights = {tensor: value for tensor, value in unpacked(load_file(folder / "memory.safetensors")).items() if not tensor.startswith(tuple(fresh))}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: expected a whole memory.safetensors ({str(error)[:100]}); restore the one that was saved.") from None
    for tensor, mine in model.injection.state_dict().items():
        if tensor in weights and weights[tensor].shape != mine.shape:
            raise InputError(f"{folder}: expected {tensor} of shape {tuple(mine.shape)}, got {tuple(weights[tensor].shape)}; --fresh {tensor} leaves it out.")
    return model, weights


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m extras.grow", description="A trained memory with a larger reader, that answers as it did.",
                                     epilog="example: python -m extras.grow tiny out/grown --reading-dim 256 --reading-layers 4")
    parser.add_argument("memory", help="tiny, gemma-3-270m, or a folder that train.py wrote")
    parser.add_argument("out", type=Path, help="folder for the larger one")
    parser.add_argument("--reading-dim", type=int, help="width of the reading attention (default: as it is)")
    parser.add_argument("--reading-layers", type=int, help="its layers (default: as they are)")
    parser.add_argument("--candidates", type=int, help="episodes that are compared word by word: more find more in large memories (default: as it is)")
    parser.add_argument("--readable", type=int, help="episodes of these that are read (default: as it is)")
    parser.add_argument("--fresh", nargs="+", default=[], metavar="NAME", help="parts that start anew, by the beginnings of their tensors' names, such as outdated")
    parser.add_argument("--seed", type=int, default=0, help="of what starts at random (default 0)")
    args = parser.parse_args(arguments)
    new_folder(args.out)
    old, weights = opened(args.memory, args.fresh)
    asked = {name: value for name in ("reading_dim", "reading_layers", "candidates", "readable") if (value := getattr(args, name)) is not None}
    config = replace(old.config, **asked)
    config.check("--reading-dim, --reading-layers, --candidates, --readable")
    if "understand.ask.weight" not in weights or config.reading_dim < old.config.reading_dim or config.reading_layers < old.config.reading_layers:
        raise InputError(f"expected a memory that has a reader, and at least its {old.config.reading_layers} layers of width {old.config.reading_dim}, "
                         f"got {config.reading_layers} of {config.reading_dim}.")
    if not 0 <= args.seed < 2 ** 63:
        raise InputError(f"expected --seed from 0 to 2**63 - 1, got {args.seed}.")
    torch.manual_seed(args.seed)
    new = GemmaWithMemory(old.gemma, old.tokenizer, config, old.base_name)
    grow(weights, new.injection.state_dict(), args.fresh)
    new.trained = dict(old.trained, grown_from=Path(args.memory).name)
    new.save_pretrained(args.out)
    kept = sum(weights[name].numel() for name, _ in old.injection.named_parameters() if name in weights)
    print(f"saved {args.out}: {sum(p.numel() for p in new.trainable_parameters()):,} parameters, {kept:,} of them from before", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
