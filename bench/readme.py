"""Put measured figures and quoted code into README.md and docs/: python -m bench.readme   (--check only compares)

No figure there is typed by hand. Reads what other commands wrote: bench/results/NAME.json (python -m bench.recall --out …,
copied there), and the logs of the shipped memories. Replaces what stands between `<!-- figures: X -->` or
`<!-- code: FILE NAME -->` and `<!-- end -->`. README.md holds the short tables ("in-short"), docs/ what they are taken from.
"""

import argparse
import ast
import functools
import json
import re
import sys
import textwrap
from pathlib import Path

from bench import compare, decode, gat, memory_scale, prefix, train_step
from bench.common import percent, table
from bench.ladder import LADDER, designs
from bench.ladder import report as report_ladder
from bench.recall import ANSWERABLE, report
from gemma import InputError, replacing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEMORIES = {"tiny": ROOT / "tiny" / "memory", "gemma-3-270m": ROOT / "extras" / "gemma-3-270m"}


# ----------------------------------------------------------------------------------------------- the long tables of docs/

def saved(name):
    """What a bench wrote under bench/results."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def measured(name):
    """(What bench.recall wrote under bench/results, the command and the machine that made it)."""
    result = saved(name)
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
    """What is left after edits, what ordinary text feels of unrelated facts, and other ways to answer."""
    result, lead = measured(name)
    return f"{lead}\n\n" + report({what: result[what] for what in ("edits", "locality", "controls") if what in result})


def natural(name):
    """The last line of bench.natural's table."""
    result = saved(f"natural-{name}")
    cell = lambda what: percent(result["all"][what], True)
    return (f"`python -m bench.natural --model {name}`, {result['hardware']}: of {result['all']['exact']['n']} questions {cell('exact')}% "
            f"answered exactly, right episode first for {cell('first')}%, {cell('refused_wrongly')}% refused that had an answer; of "
            f"{result['all']['refused_rightly']['n']} without one {cell('refused_rightly')}% refused.")


def compared(name):
    """The table of bench.compare, with its plot, for a page in docs/; as long as nothing was measured, a sentence that says so."""
    if not (HERE / "results" / f"compare-{name}.json").is_file():
        return f"The designs have not been measured side by side on {name} yet: `python -m bench.compare --model {name}` does."
    result = saved(f"compare-{name}")
    jobs = [row for done in result["designs"].values() for row in done.values()]
    commands = dict.fromkeys(re.sub(r" --(out|workers|limit|designs) \S+", "", command) for command in result["commands"].values())
    return (f"{'; '.join(f'`{command}`' for command in commands)}; {'; '.join(dict.fromkeys(row['hardware'] for row in jobs))}, "
            f"{sum(row['job_seconds'] for row in jobs) / 60:.0f} minutes. Shares in %, with 95% intervals:\n\n{compare.report(result)}\n\n"
            f"![Recall of each design by facts in memory, and by turns since the fact was told](../bench/results/compare-{name}.png)")


def ablated(name):
    """The table of bench.prefix; as long as nothing was measured, a sentence that says so."""
    if not (HERE / "results" / f"prefix-{name}.json").is_file():
        return f"Not measured on {name} yet: `python -m bench.prefix --model {name}` does."
    result = saved(f"prefix-{name}")
    command = re.sub(r" --(out|workers|slots) \S+", "", result["command"])
    return f"`{command}`; {'; '.join(dict.fromkeys(row['hardware'] for row in result['rows'].values()))}, with 95% intervals:\n\n{prefix.report(result)}"


def logged(path):
    """The lines of a training log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made(name):
    """(What to call the run that a shipped memory is from, its settings, the line of its log where it was saved, the last line)."""
    log = logged(MEMORIES[name] / "log.jsonl")
    trained = json.loads((MEMORIES[name] / "memory.json").read_text(encoding="utf-8"))["trained"]
    runs = len(list(MEMORIES[name].glob("log*.jsonl")))
    title = name + (f", the last of {runs} runs" if runs > 1 else "") + (", before the mean" if "mean_with" in trained else "")
    return title, trained, next(line for line in log if line["step"] == trained["step"]), log[-1]


def reached(held_out):
    """Shares of lookups answered, and of questions whose right episode came first, at two sizes."""
    return [f"{held_out[N]['lookup']:.0%} / {held_out[N]['first']:.0%}" for N in ("16", "64")]


def training(_):
    """What the logs of the shipped memories say about how they were made."""
    rows = [[title, f"{trained['step'] * trained['batch'] * trained['accumulate'] / 1e6:.1f} million", f"{kept['seconds']:.0f} s",
             f"{last['examples_per_second']:,}", *reached(trained["held_out"])] for title, trained, kept, last in map(made, MEMORIES)]
    return table(["memory", "questions learnt from", "training", "questions a second", "16 facts: lookups / right episode", "64 facts"], rows)


def default(name):
    """What `python train.py` without arguments reached: the last line of its log, copied to bench/results."""
    last = logged(HERE / "results" / f"{name}.jsonl")[-1]
    sizes = [f"{r['recall']:.0%} of all kinds of questions at {N} facts, {r['lookup']:.0%} of the lookups (right episode first {r['first']:.0%}; "
             f"the base without its memory answers {r['base_alone']:.0%})" for N, r in last["held_out"].items()]
    return (f"`python train.py` on 2 CPU cores: {last['step']} steps in {last['seconds']:.0f} s, after {last['pool_seconds']:.0f} s for the pool; "
            f"held-out people and values, trained phrasings: {', '.join(sizes)}.")


def ladder(name):
    """What each rung of bench.ladder changes ("rungs"), or what it measured on a base, with its plot."""
    if name == "rungs":
        return table(["", "rung", "what changed"], [[d.number, d.name, d.what] for d in designs() if d.group == LADDER], left=3)
    result = saved(f"ladder-{name}")
    said = lambda what: "; ".join(dict.fromkeys(row[what] for row in result["rungs"].values()))
    command = re.sub(r" --(out|workers) \S+| --resume", "", said("command"))
    return (f"`{command}`, {said('hardware')}.\n\n{report_ladder(result)}\n\n"
            f"![Recall of every rung, of the final design without each of its parts, and after other layers](../bench/results/ladder-{name}.png)")


def survival(_):
    """What sessions and training survived: kills, damaged bytes, fuzzing; a large session; a fact told long ago."""
    rows, where = [], []

    def row(name, what, found):
        r = saved(name)
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


def spread(r, name):
    """From the shortest to the longest of several openings of a large session."""
    return f"{min(o[name] for o in r['opened'])}–{max(o[name] for o in r['opened'])} s"


def large(r):
    return (f"imported in {r['import_s']} s ({r['import_cpu_s']} s of processor time, load average {r['import_load']}), at most {r['import_peak_GB']} GB; "
            f"{r['bytes_per_fact']['episodes.jsonl']} bytes a fact of text and {r['bytes_per_fact']['cache.safetensors']:,} of cache; opened again in {spread(r, 'session_s')} "
            f"({spread(r, 'session_cpu_s')} of processor time, load average {r['opened_load']}), the first answer {spread(r, 'first_answer_s')}, the next {spread(r, 'next_answer_s')}")


def speed(name):
    """What one of the speed benches printed, of the result that it saved as NAME.json; its kind is the name's first word."""
    result = saved(name)
    bench = dict(decode=decode, gat=gat, memory_scale=memory_scale, train_step=train_step)[name.split("-")[0]]
    command = re.sub(r" --out \S+", "", result["command"]).strip()
    return f"`{command}`, {result['hardware']}, {result['threads']} thread{'s'[:result['threads'] != 1]} on the CPU.\n\n{bench.report(result)}"


# ------------------------------------------------------------------------------------------- the short tables of README.md

SHOWN = (16, 100, 1000)                                                    # facts in memory


def recall_in_short():
    """A row for each shipped memory and size, a column for each kind of question."""
    rows, reach = [], 0.0
    for title, names in {"Gemma 3 270M": ("gemma-3-270m", "gemma-3-270m-large"), "tiny": ("tiny",)}.items():
        at = {(r["facts"], r["kind"], r["phrasings"]): r for name in names for r in saved(name)["recall"]}
        for N in (N for N in SHOWN if (N, "lookup", "test") in at):
            found = [at.get((N, *key), {}).get("recall") for key in (("lookup", "train"), *((kind, "test") for kind in ANSWERABLE))]
            reach = max([reach, *(max(s["high"] - s["share"], s["share"] - s["low"]) for s in found if s)])
            rows.append([title, f"{N:,}", *map(percent, found), percent(at[N, "lookup", "test"]["first"])])
    head = ["memory", "facts", "lookup, trained phrasings", *ANSWERABLE, "lookup: right sentence first"]
    return f"Answered exactly, % (95% intervals reach at most {100 * reach:.0f} points to either side):\n\n{table(head, rows)}"


def others_in_short():
    """What Gemma 3 270M's memory makes of sentences by hand, of questions without an answer, of edits, and of ordinary text."""
    rows, by_hand, refused = [], saved("natural-gemma-3-270m")["all"], saved("gemma-3-270m")["refusal"]["rows"]
    rows.append(["sentences and questions written by hand", f"{percent(by_hand['exact'])} answered exactly, right sentence first for {percent(by_hand['first'])}"])
    rows.append(["the same, questions without an answer", f"{percent(by_hand['refused_rightly'])} refused, as are {percent(by_hand['refused_wrongly'])} of those with one"])
    r = max(refused, key=lambda r: r["facts"])
    rows.append([f"questions without an answer, a fifth of all, {r['facts']:,} facts", f"{percent(r['saved']['recall'])} refused "
                 f"({percent(r['saved']['by_sort']['near'])} where the person is known); {percent(r['saved']['precision'])} of refusals are right"])
    edited = {e["what"]: e for e in sorted(saved("gemma-3-270m-edits")["edits"], key=lambda e: e["facts"])}     # the largest memory's
    again, gone = edited["told again"], edited["forgotten"]
    rows.append([f"a fact told again with another value, {again['facts']:,} facts", f"{percent(again['recall'])} answer the new one, {percent(again['unchanged'])} the old one"])
    rows.append([f"a fact forgotten, {gone['facts']:,} facts", f"{percent(gone['gone'])} refused or answered otherwise, {percent(gone['others_kept'])} of the others kept"])
    many = edited["replaced, many times"]
    rows.append([f"{many['edits']:,} edits of {many['facts']:,} facts, one by one", f"{percent(many['retained'])} retained of what was right after its last edit "
                 f"({percent(many['edited'])} of all answer the latest value)"])
    for r in saved("gemma-3-270m-locality")["locality"]["rows"]:
        if r["facts"]:
            rows.append([f"ordinary text, {r['facts']:,} unrelated facts", f"perplexity {r['change']:+.2%}"])
    return table(["Gemma 3 270M", "%"], rows, left=2)


def survival_in_short():
    """What was done to sessions and training, and what was lost."""
    kills, talks, big = (saved(name) for name in ("kills", "sessions-kills-tiny", "sessions-large-tiny"))
    fuzzed = [saved(f"fuzz-{target}") for target in ("loaders", "tokenizer", "facts", "store")]
    return table(["what was done", "what came of it"], [
        [f"training killed {kills['kills']:,} times and resumed", f"{kills['other_end']} of {kills['runs']} runs ended with other bits than one that was never killed"],
        [f"conversations killed {talks['kills']:,} times", f"{talks['lost']} of {talks['acknowledged']:,} acknowledged changes lost"],
        [f"{sum(r['cases'] for r in fuzzed):,} spoilt inputs", f"{sum(r['outcomes'].get('trouble', 0) for r in fuzzed):,} of them neither worked nor were refused in a sentence"],
        [f"a session of {big['facts']:,} facts opened again", f"{spread(big, 'session_s')}, then {spread(big, 'next_answer_s')} an answer (tiny, CPU)"]], left=2)


def speed_in_short():
    """Ours and what it is compared with, a row for each bench; – where one side was not measured or failed."""
    rows, device = [], lambda r: r["hardware"].split(",")[0] if "NVIDIA" in r["hardware"] else "CPU"
    ms = lambda seconds: f"{1000 * seconds:.1f} ms" if seconds else "–"
    for name in ("decode-1b-h100", "decode-gemma-3-270m-cpu"):
        r = saved(name)
        per = lambda way: ms(r["decoding"].get(way, {}).get("seconds", 0) / r["tokens"])
        ours, theirs = (("ours, compiled, with memory", "transformers, static cache, compiled") if "ours, compiled, with memory" in r["decoding"] else
                        ("ours, eager, with memory", "transformers, eager"))
        rows.append([f"a token of an answer, {r['model'].split(',')[0]}, {device(r)}", per(ours), f"{theirs}, no memory", per(theirs)])
        if "first" in r:
            first = lambda way: ms(r["first"].get(way, {}).get("seconds"))
            rows.append([f"the first token, {r['in_prompt']:,} facts in memory, {r['model'].split(',')[0]}, {device(r)}", first("memory, compiled"),
                         "the same facts in transformers' prompt", first("prompt, transformers")])
    r = saved("decode-1b")
    if "batch" in r.get("many", {}):                                       # many questions at once were measured there alone
        rows.append([f"{r['many']['questions']} questions at once, {r['tokens']} tokens each, {r['model'].split(',')[0]}, {device(r)}",
                     f"{r['many']['batch']:.2f} s", "one by one", f"{r['many']['one_by_one']:.2f} s"])
    r = saved("memory_scale-1b")
    largest = max(r["rows"], key=lambda row: row["facts"])
    rows.append([f"a token with {largest['facts']:,} facts, {r['model'].split(',')[0]}, {device(r)}", ms(largest["per_token"]["this"]),
                 f"with {r['small']} facts", ms(largest["per_token"]["small"])])
    r = saved("train_step-1b")
    rows.append([f"training, {r['model'].split(',')[0]}, {device(r)}", f"{r['ours']:,.0f} questions a second", "the loop as first planned, transformers and PyG",
                 f"{r['theirs']:,.1f} a second" if "theirs" in r else "–"])
    r = saved("gat")
    largest = max(r["rows"], key=lambda row: row["edges"])
    rows.append([f"graph attention, {largest['edges']:,} edges, {device(r)}", ms(largest["forward and backward"]["ours"]), "PyG", ms(largest["forward and backward"]["theirs"])])
    return table(["what", "ours", "compared with", "theirs"], rows, left=4)


def training_in_short():
    """How long `python train.py` and the runs behind the shipped memories took, and what they reached."""
    last = logged(HERE / "results" / "train-tiny-cpu.jsonl")[-1]
    rows = [["tiny, `python train.py` on 2 CPU cores", f"{last['seconds'] / 60:.0f}", *reached(last["held_out"])]]
    rows += [[title, f"{kept['seconds'] / 60:.0f}", *reached(trained["held_out"])] for title, trained, kept, _ in map(made, MEMORIES)]
    return table(["memory", "minutes", "16 facts: lookups / right sentence first", "64 facts"], rows)


def designs_in_short():
    """A row for each design that bench.compare measured on Gemma 3 270M; where it wasn't run, a sentence that says so."""
    if not (HERE / "results" / "compare-gemma-3-270m.json").is_file():
        return compared("gemma-3-270m")
    result = saved("compare-gemma-3-270m")
    sizes = compare.taught_sizes(result["settings"])
    rows = []
    for name in (name for name in compare.DESIGNS if result["designs"].get(name)):
        get = lambda job, what: result["designs"][name].get(job, {}).get(what)
        held = get("cost", "bytes_per_fact")
        rows.append([compare.TITLES[name], *(percent(get(f"recall {N}", "recall")) for N in sizes), percent(get("update", "recall")),
                     percent(get("refusal", "rightly")), percent(get("refusal", "wrongly")), f"{held:,.0f}" if held is not None else "–"])
    return "Gemma 3 270M, %:\n\n" + table(["design", *(f"recall, {N:,} facts" for N in sizes), "update", "refused, without an answer", "refused, with one", "bytes a fact"], rows)


def in_short(name):
    return dict(recall=recall_in_short, others=others_in_short, survival=survival_in_short, training=training_in_short, speed=speed_in_short, designs=designs_in_short)[name]()


# ------------------------------------------------------------------------------------------------------------ quoted code

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


# --------------------------------------------------------------------------------------------------------- filling pages

FIGURES = {"in-short": in_short, "recall": recall, "refusal": refusal, "edits": edits, "controls": edits, "natural": natural, "compared": compared, "ablated": ablated,
           "training": training, "default": default, "ladder": ladder, "speed": speed, "survival": survival}


def filled(text):
    """The text of a page with every block of figures and code made anew."""
    text = re.sub(r"<!-- code: (\S+) (\S+) -->.*?<!-- end -->", lambda match: f"<!-- code: {match[1]} {match[2]} -->\n{code(match[1], match[2])}\n<!-- end -->",
                  text, flags=re.S)

    def block(match):
        what, _, name = match[1].partition(" ")
        if what not in FIGURES:
            raise InputError(f"expected figures of {', '.join(FIGURES)}, got {match[1]!r}; correct the page.")
        return f"<!-- figures: {match[1]} -->\n{FIGURES[what](name)}\n<!-- end -->"
    return re.sub(r"<!-- figures: ([\w. -]+?) -->.*?<!-- end -->", block, text, flags=re.S)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Put measured figures and quoted code into README.md and docs/.",
                                     epilog="example: python -m bench.readme --check")
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
