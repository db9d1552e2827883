"""The curves of a training run:  python -m extras.curves out/memory      (train.py draws them by itself when it ends)

Reads log.jsonl in a folder that train.py wrote and writes curves.png beside it: the losses, and what was recalled and found of
held-out people and values.
"""

import json
import math
from pathlib import Path

from bench.common import Parser, plotting, run, save_figure
from gemma import InputError


def read_log(folder):
    """The lines of log.jsonl in `folder`, a list of dict. Raises InputError where there is none, or something else."""
    file = Path(folder) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if lines and all(isinstance(line, dict) and {"step", "loss"} <= line.keys() for line in lines):
            return lines
        raise ValueError("its lines hold no step and loss")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected the log that train.py writes, but it can't be read ({error}); give a folder that train.py wrote.") from None


def draw(folder, path=None):
    """Draw the log in `folder` as curves.png there, or as `path`. Returns the file, or None where matplotlib is missing."""
    lines, pyplot = read_log(folder), plotting()
    if pyplot is None:
        return None
    figure, (losses, recall, found) = pyplot.subplots(1, 3, figsize=(10.5, 3.1), layout="constrained")
    steps = [line["step"] for line in lines]
    for name, label in (("loss", "weighted sum"), ("answer_loss", "answer"), ("retrieval_loss", "retrieval"), ("copying_loss", "copying"), ("judging_loss", "judging"), ("marking_loss", "marking")):
        if all(name in line for line in lines):                            # the retrieval loss has several parts
            losses.plot(steps, [sum(x) if isinstance(x := line[name], list) else x for line in lines], label=label)
    measured = [line for line in lines if "held_out" in line]
    marker = "o" if len(measured) < 30 else ""
    for i, N in enumerate(dict.fromkeys(N for line in measured for N in line["held_out"])):
        for axis, name, label, style in ((recall, "recall", "all kinds", "-"), (recall, "lookup", "lookups", ":"),
                                         (found, "first", "right episode first", "-"), (found, "refused", "unanswerable refused", ":")):
            shares = [line["held_out"].get(N, {}).get(name) for line in measured]              # not every design has all of them
            if any(share is not None for share in shares):
                axis.plot([line["step"] for line in measured], [math.nan if share is None else 100 * share for share in shares],
                          style, color=f"C{i}", marker=marker, label=f"{label}, {N} facts")
    losses.set(title="losses", ylim=(0, None))
    recall.set(title="recall: exact match, %", ylim=(-2, 102))
    found.set(title="retrieval, %", ylim=(-2, 102))
    for axis in (losses, recall, found):
        axis.set(xlabel="step", xlim=(0, max(line["step"] for line in lines) * 1.02))
        if axis.lines:
            axis.legend()
    path = Path(path or Path(folder) / "curves.png")
    save_figure(figure, path)
    pyplot.close(figure)
    return path


def main(arguments=None):
    parser = Parser(prog="python -m extras.curves", description="Draw the curves of a training run.", epilog="example: python -m extras.curves out/memory")
    parser.add_argument("folder", type=Path, help="what train.py wrote: a folder with log.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="where to draw them (default: curves.png in that folder)")
    args = parser.parse_args(arguments)
    if drawn := draw(args.folder, args.out):
        print(drawn)


if __name__ == "__main__":
    run(main)
