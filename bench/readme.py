"""Put the measured figures into README.md: python -m bench.readme   (no figure there is typed by hand; --check only compares)

Reads what other commands wrote: bench/results/NAME.json (python -m bench.recall --out …, copied there), and the logs of the
shipped memories. Replaces what stands between `<!-- figures: X -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from bench import decode, gat, memory_scale, train_step
from bench.common import percent, table
from bench.recall import report
from gemma import InputError, replacing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEMORIES = {"tiny": ROOT / "tiny" / "memory", "gemma-3-270m": ROOT / "extras" / "gemma-3-270m"}


def measured(name):
    """(What bench.recall wrote under bench/results, the command and the machine that made it)."""
    result = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    command = re.sub(r" --(out \S+|set-threshold)", "", result["command"])     # as printed it shall change nothing
    return result, f"`{command}`, {result['hardware']}, {result['seconds']['total']:.0f} s."


def recall(name):
    """Recall by kind of question, and how often the right episode came first."""
    result, lead = measured(name)
    head, shares, _, _, found, first = report({"recall": result["recall"]}).split("\n\n")[:6]
    return f"{lead} {head} (95% intervals):\n\n{shares}\n\n{found}\n\n{first}"


def refusal(name):
    """Precision and recall of refusals at the threshold that is saved with the memory."""
    result, lead = measured(name)
    rows = [[f"{r['facts']:,}", *(percent(r["saved"][what], True) for what in ("precision", "recall")),
             *(percent(r["saved"]["by_sort"][sort]) for sort in ("near", "unknown", "world"))] for r in result["refusal"]["rows"]]
    return (f"{lead} A fifth of the questions unanswerable, all phrasings unseen, null threshold {result['refusal']['threshold']:.2f}, %:\n\n" +
            table(["facts", "precision", "recall", "refused: not told of this person", "person unknown", "about the world"], rows))


def edits(name):
    """What is left after edits, and what ordinary text feels of unrelated facts."""
    result, lead = measured(name)
    return f"{lead}\n\n" + report({what: result[what] for what in ("edits", "locality")})


def natural(name):
    """The last line of bench.natural's table."""
    result = json.loads((HERE / "results" / f"natural-{name}.json").read_text(encoding="utf-8"))
    cell = lambda what: percent(result["all"][what], True)
    return (f"`python -m bench.natural --model {name}`, {result['hardware']}: of {result['all']['exact']['n']} questions {cell('exact')}% "
            f"answered exactly, right episode first for {cell('first')}%, {cell('refused_wrongly')}% refused that had an answer.")


def training(_):
    """What the logs of the shipped memories say about how they were made."""
    rows = []
    for name, folder in MEMORIES.items():
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        made = json.loads((folder / "memory.json").read_text())["trained"]
        kept = next(line for line in log if line["step"] == made["step"])
        rows.append([name + (", second run" if made["init"] else ""), f"{made['step'] * made['batch'] * made['accumulate'] / 1e6:.1f} million", f"{kept['seconds']:.0f} s",
                     f"{log[-1]['examples_per_second']:,}"] +
                    [f"{made['held_out'][N]['lookup']:.0%} / {made['held_out'][N]['first']:.0%}" for N in ("16", "64")])
    return table(["memory", "questions learnt from", "training", "questions a second", "16 facts: lookups / right episode", "64 facts"], rows)


def default(name):
    """What `python train.py` without arguments reached: the last line of its log, copied to bench/results."""
    last = json.loads((HERE / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    sizes = [f"{r['recall']:.0%} of all kinds of questions at {N} facts, {r['lookup']:.0%} of the lookups (right episode first {r['first']:.0%}; "
             f"the base without its memory answers {r['base_alone']:.0%})" for N, r in last["held_out"].items()]
    return (f"`python train.py` on 2 CPU cores: {last['step']} steps in {last['seconds']:.0f} s, after {last['pool_seconds']:.0f} s for the pool; "
            f"held-out people and values, trained phrasings: {', '.join(sizes)}.")


def speed(name):
    """What one of the speed benches printed, of the result that it saved as NAME.json; its kind is the name's first word."""
    result = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    bench = dict(decode=decode, gat=gat, memory_scale=memory_scale, train_step=train_step)[name.split("-")[0]]
    command = re.sub(r" --out \S+", "", result["command"]).strip()
    return f"`{command}`, {result['hardware']}, {result['threads']} thread{'s'[:result['threads'] != 1]} on the CPU.\n\n{bench.report(result)}"


def filled(text):
    """README text with every block of figures made anew."""
    def block(match):
        what, _, name = match[1].partition(" ")
        return f"<!-- figures: {match[1]} -->\n{dict(recall=recall, refusal=refusal, edits=edits, natural=natural, training=training, default=default, speed=speed)[what](name)}\n<!-- end -->"
    return re.sub(r"<!-- figures: ([\w. -]+?) -->.*?<!-- end -->", block, text, flags=re.S)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="example: python -m bench.readme --check")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 2 if README.md is not up to date")
    check = parser.parse_args(arguments).check
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if check and new != old:
        raise InputError("README.md does not hold the figures of bench/results; run python -m bench.readme.")
    if not check:
        with replacing(readme) as temporary:
            temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
