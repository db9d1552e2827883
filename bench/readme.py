"""Put the measured figures into README.md, and quoted code into docs/: python -m bench.readme   (--check only compares)

No figure there is typed by hand. Reads what other commands wrote: bench/results/NAME.json (python -m bench.recall --out …,
copied there), and the logs of the shipped memories. Replaces what stands between `<!-- figures: X -->` or
`<!-- code: FILE NAME -->` and `<!-- end -->`.
"""

import argparse
import ast
import functools
import json
import re
import sys
import textwrap
from pathlib import Path

from bench import compare, decode, gat, memory_scale, train_step
from bench.common import percent, table
from bench.ladder import LADDER, designs
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
    return f"{lead}\n\n" + report({what: result[what] for what in ("edits", "locality") if what in result})


def natural(name):
    """The last line of bench.natural's table."""
    result = json.loads((HERE / "results" / f"natural-{name}.json").read_text(encoding="utf-8"))
    cell = lambda what: percent(result["all"][what], True)
    return (f"`python -m bench.natural --model {name}`, {result['hardware']}: of {result['all']['exact']['n']} questions {cell('exact')}% "
            f"answered exactly, right episode first for {cell('first')}%, {cell('refused_wrongly')}% refused that had an answer.")


def compared(name):
    """The table of bench.compare, with its plot; as long as nothing was measured, a sentence that says so."""
    file = HERE / "results" / f"compare-{name}.json"
    if not file.is_file():
        return f"The designs have not been measured side by side on {name} yet: `python -m bench.compare --model {name}` does."
    result = json.loads(file.read_text(encoding="utf-8"))
    jobs = [row for done in result["designs"].values() for row in done.values()]
    commands = dict.fromkeys(re.sub(r" --(out|workers|limit) \S+", "", command) for command in result["commands"].values())
    return (f"{'; '.join(f'`{command}`' for command in commands)}; {'; '.join(dict.fromkeys(row['hardware'] for row in jobs))}, "
            f"{sum(row['job_seconds'] for row in jobs) / 60:.0f} minutes. Shares in %, with 95% intervals:\n\n{compare.report(result)}\n\n"
            f"![Recall of each design by facts in memory, and by turns since the fact was told](bench/results/compare-{name}.png)")


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


def ladder(_):
    """What each rung of bench.ladder changes."""
    return table(["", "rung", "what changed"], [[d.number, d.name, d.what] for d in designs() if d.group == LADDER], left=3)


@functools.lru_cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def find(file, name):
    """The syntax tree of what `name` ("Class.method", say) stands for in a file of this repository: where it is first said, on the
    top level, in a class or one that it comes from, or as self.name in a method. Raises InputError if it isn't there."""
    tree = top = parsed(ROOT / file)
    for part in name.split("."):
        tree, classes = None, [tree]
        while tree is None and classes:
            scope = classes.pop(0)
            said = [(node, target) for node in getattr(scope, "body", ()) for target in names(node)]
            if isinstance(scope, ast.ClassDef):
                said += [(node, node.attr) for node in ast.walk(scope) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                         and isinstance(node.value, ast.Name) and node.value.id == "self"]
                bases = {base.id for base in scope.bases if isinstance(base, ast.Name)}
                classes += [node for node in top.body if isinstance(node, ast.ClassDef) and node.name in bases]
            tree = next((node for node, target in said if target == part), None)
        if tree is None:
            raise InputError(f"expected {name} in {file}, but there is no {part}; find out what became of it.")
    return tree


def names(node):
    """What a statement names."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def code(file, name):
    """The source of a function or class."""
    node = find(file, name)
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[node.lineno - 1:node.end_lineno]
    return "```python\n" + textwrap.dedent("\n".join(lines)) + "\n```"


def survival(_):
    """What sessions and training survived: kills, damaged bytes, fuzzing; a large session; a fact told long ago."""
    def result(name):
        return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows, where = [], []

    def row(name, what, found):
        r = result(name)
        where.append((r["hardware"], r["seconds"]))
        rows.append(f"- {what} (`{r['command']}`): {found(r)}")
    row("kills", "training killed and resumed", lambda r: f"{r['kills']} kills, {r['while_writing']} of them inside the writing of a file; of {r['runs']} runs "
        f"{r['other_end']} ended with other bits than the one that was never killed; {r['memory_that_does_not_open']} times the folder held a memory that does not open")
    row("sessions-kills-tiny", "conversations killed", lambda r: f"{r['kills']} kills, {r['acknowledged']:,} changes acknowledged, {r['lost']} lost; every session opened")
    row("sessions-flips-tiny", "each byte of a session and of its cache damaged", lambda r: f"of {r['bytes']} bytes of text {r['noted']} left out one line and said so, "
        f"{r['as_edited']} were another valid text, {r['unchanged']} nothing; of {r['cache_bytes']:,} of the cache {r['cache_refused']:,} had it made anew, {r['cache_the_same']:,} changed no tensor")
    for target in ("loaders", "tokenizer", "facts", "store"):
        row(f"fuzz-{target}", f"spoilt input: {target}", lambda r: f"{r['cases']:,} cases: " + ", ".join(f"{n:,} {what}" for what, n in sorted(r["outcomes"].items()))
            + ("" if "trouble" in r["outcomes"] else "; no trouble"))
    row("sessions-large-tiny", "100,000 facts", large)
    for model in ("tiny", "gemma-3-270m"):
        row(f"sessions-evening-{model}", "a fact, other turns, a new process", lambda r: f"after {r['turns']} turns: “{r['answer']}”")
    machines = list(dict.fromkeys(hardware for hardware, _ in where))      # one, unless something was measured again elsewhere
    return f"{'; '.join(machines)}, {sum(seconds for _, seconds in where) / 60:.0f} minutes.\n\n" + "\n".join(rows)


def large(r):
    spread = lambda name: f"{min(o[name] for o in r['opened'])}–{max(o[name] for o in r['opened'])} s"
    return (f"imported in {r['import_s']} s ({r['import_cpu_s']} s of processor time, load average {r['import_load']}), at most {r['import_peak_GB']} GB; "
            f"{r['bytes_per_fact']['episodes.jsonl']} bytes a fact of text and {r['bytes_per_fact']['cache.safetensors']:,} of cache; opened again in {spread('session_s')} "
            f"({spread('session_cpu_s')} of processor time, load average {r['opened_load']}), the first answer {spread('first_answer_s')}, the next {spread('next_answer_s')}")


def speed(name):
    """What one of the speed benches printed, of the result that it saved as NAME.json; its kind is the name's first word."""
    result = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    bench = dict(decode=decode, gat=gat, memory_scale=memory_scale, train_step=train_step)[name.split("-")[0]]
    command = re.sub(r" --out \S+", "", result["command"]).strip()
    return f"`{command}`, {result['hardware']}, {result['threads']} thread{'s'[:result['threads'] != 1]} on the CPU.\n\n{bench.report(result)}"


def filled(text):
    """The text of a page with every block of figures and code made anew."""
    text = re.sub(r"<!-- code: (\S+) (\S+) -->.*?<!-- end -->", lambda match: f"<!-- code: {match[1]} {match[2]} -->\n{code(match[1], match[2])}\n<!-- end -->",
                  text, flags=re.S)

    def block(match):
        what, _, name = match[1].partition(" ")
        return f"<!-- figures: {match[1]} -->\n{dict(recall=recall, refusal=refusal, edits=edits, natural=natural, compared=compared, training=training, default=default, ladder=ladder, speed=speed, survival=survival)[what](name)}\n<!-- end -->"
    return re.sub(r"<!-- figures: ([\w. -]+?) -->.*?<!-- end -->", block, text, flags=re.S)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Put measured figures and quoted code into README.md and docs/.", epilog="example: python -m bench.readme --check")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 2 if a page is not up to date")
    check = parser.parse_args(arguments).check
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if check and new != old:
            raise InputError(f"{page.name} does not hold the figures of bench/results or the code it quotes; run python -m bench.readme.")
        if new != old:
            with replacing(page) as temporary:
                temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
