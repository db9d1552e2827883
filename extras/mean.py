"""The mean of two memories of one run of training:  python -m extras.mean out/grown out/270m out/mean

Where training went on from one memory to another, the mean of their weights often answers better than either of them: each
step's noise is averaged away, and what both know stays (https://arxiv.org/abs/2109.01903). Memories that were not trained from one
another have nothing in common, and their mean knows nothing.
"""

import argparse
import sys
from pathlib import Path

from extras.memory_model import new_folder
from gemma import InputError
from memory import GemmaWithMemory


def mean(one, other):
    """Set the weights of `other`, a GemmaWithMemory, to the mean of its own and those of `one`; what isn't trained it keeps."""
    theirs = dict(one.injection.named_parameters())
    for name, p in other.injection.named_parameters():
        p.data.lerp_(theirs[name].data, 0.5)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m extras.mean", description="The mean of two memories, of which one was trained from the other.",
                                     epilog="example: python -m extras.mean out/grown out/270m out/mean")
    parser.add_argument("before", help="the memory that training began with (train.py --init)")
    parser.add_argument("after", help="the one that it made")
    parser.add_argument("out", type=Path, help="folder for the mean of the two")
    args = parser.parse_args(arguments)
    new_folder(args.out)
    before, after = map(GemmaWithMemory.from_pretrained, (args.before, args.after))
    shapes = lambda model: {name: p.shape for name, p in model.injection.named_parameters()}
    if shapes(before) != shapes(after):
        raise InputError(f"expected two memories of the same settings, got {args.before} and {args.after}, which differ; was the second trained from the first?")
    mean(before, after)
    after.trained = dict(after.trained, mean_with=Path(args.before).name)
    after.save_pretrained(args.out)
    print(f"saved {args.out}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
