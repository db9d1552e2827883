"""Which memory does what?  python -m bench.compare --model tiny

All designs of variants/ on one base: each is trained on as many examples, with about as many parameters as the others, then
told, or taught, the same facts and asked the same questions about people, values and phrasings that training never saw:

    recall      4 to 256 facts, whole answers
    update      facts told again with another value: the later one counts
    refusal     questions that nothing told answers
    turns       a fact told first, asked after 1 to 120 other turns
    locality    perplexity of ordinary text with 100 facts held
    cost        seconds to remember a fact and to answer, bytes of a fact, parameters

Beside them stand the facts in the prompt, with three worked examples, and the base alone. Chapters and LoRA are taught by
training, anew for every number of facts: their time to remember is that training's, and nothing can be told to them later.

Training and measuring are jobs; each job's result is saved when it is done, in a file for each design, and a call ends before
--limit minutes are over. The same command again goes on where the last one ended. Designs may be measured by several processes, each
on a GPU of its own (--designs), that write to the same folder, or to folders whose files are put into one afterwards; any call makes
compare.json, the table and the plot of all that its folder holds.

With --shipped the graph memory is the one that ships with the base, not one that is trained like the others: the table says how many
examples it saw, and for how long.
"""

import json
import math
import sys
import time
import zlib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import train
import variants
from bench.common import Parser, commit, hardware, numbers, out_folder, percent, plotting, run, save_figure, share, some_of, table
from bench.recall import (ask, complete, examples, memories, mixed, ordinary_text, perplexity, prompt_with, remember, room_for, threshold_of)
from data_gen import World, open_vocabulary
from extras.memory_model import SHIPPED, find_base
from extras.settings import from_file
from gemma import InputError, check_device, find_model, read_json, write_json
from variants.facts import taught

ROOT = Path(__file__).resolve().parent.parent
TOLD, TAUGHT, PROMPT, NONE = ("graph", "prefix", "cross"), ("chapters", "lora"), "prompt", "none"
DESIGNS = (*TOLD, *TAUGHT, PROMPT, NONE)
TITLES = dict(graph="graph", prefix="prefix", cross="cross-attention", chapters="chapters", lora="LoRA", prompt="facts in the prompt", none="no memory")
HELD = 100                                   # facts in memory while ordinary text is read


# ------------------------------------------------------------------------------------------------------ what is asked

def world(args, tokenizer, *purpose):
    return World("test", zlib.crc32(repr((args.seed, *purpose)).encode()), open_vocabulary(tokenizer))


def told_and_asked(args, tokenizer, N):
    """Memories of N facts with their questions, (facts, asked): enough for --questions. Designs that are taught get the first."""
    cell, left = [], args.questions
    while left > 0:
        lesson = taught(tokenizer, N, args.seed * 1000 + len(cell))
        asked = lesson["held_out"][::max(1, len(lesson["held_out"]) // left)][:left]
        cell.append((lesson["facts"], asked))
        left -= len(asked)
    return cell


def conversations(args, tokenizer, turns):
    """Memories whose first turn is a fact and whose others, `turns` of them, are about other things; one question each, on the first."""
    drawn, cell = world(args, tokenizer, "turns", turns), []
    while len(cell) < max(8, args.questions // 4):
        facts, asked = drawn.memory(turns + 4, 8, "lookup")
        q = asked[0]
        first = q["support"][0]
        others = [fact for i, fact in enumerate(facts) if i != first][:turns]
        cell.append(([facts[first], *others], [{**q, "support": [0]}]))
    return cell


# -------------------------------------------------------------------------------------------------------- how it is asked

def answered(model, how, cell, args):
    """Shares of right answers (a refusal is wrong) and of the right turn first. how: a design, PROMPT or NONE."""
    if how in TOLD:
        replies = ask(model, [(remember(model, facts), asked) for facts, asked in cell], args.batch)
        right = [r.right and r.null <= threshold_of(model) for r in replies]
        return dict(recall=share(sum(right), len(right)), first=share(sum(r.first for r in replies), len(replies)))
    if how in TAUGHT:
        replies = ask(model, [(None, asked) for _, asked in cell], args.batch)
        return dict(recall=share(sum(r.right for r in replies), len(replies)))
    shots = examples(World("train", args.seed, open_vocabulary(model.tokenizer))) if how == PROMPT else ""
    context = lambda facts: shots + "".join(f"{fact}\n" for fact in facts) if how == PROMPT else ""
    groups = [[(prompt_with(model, q["question"], context(facts)), q["answer"]) for q in asked] for facts, asked in cell]
    room = room_for(max(len(model.tokenizer.encode(truth, bos=False)) for group in groups for _, truth in group))
    longest = max(len(prompt) for group in groups for prompt, _ in group)
    if longest + room > model.gemma.config.max_position_embeddings:
        return dict(recall=None, why=f"a prompt of {longest:,} tokens is too long for the base")
    groups = [sum(groups, [])] if longest < 1024 else groups               # what long prompts have in common is read once
    right = [said == truth for group in groups for said, (_, truth) in zip(complete(model, [p for p, _ in group], room, args.batch), group)]
    return dict(recall=share(sum(right), len(right)))


def refused(model, args):
    """Shares of refusals: of what was never told (rightly), and of what was (wrongly)."""
    cell = [(remember(model, facts), asked) for facts, asked in mixed(world(args, model.tokenizer, "mixed"), 16, args.questions)]
    replies = ask(model, cell, args.batch, max_new_tokens=1)
    of = lambda known: [r.null > threshold_of(model) for r in replies if bool(r.asked["support"]) == known]
    return dict(rightly=share(sum(of(False)), len(of(False))), wrongly=share(sum(of(True)), len(of(True))))


def disturbed(model, args):
    """What ordinary text feels: the change of its perplexity with HELD facts in memory, or with what was trained in."""
    gpu = model.gemma.device.type == "cuda"
    ids, what = ordinary_text(model, 64 if gpu else 4, min(256 if gpu else 64, model.gemma.config.max_position_embeddings), "", args.seed)
    model.clear_memory()
    if model.told:
        model.add_to_memory(world(args, model.tokenizer, "locality").memory(HELD, 1)[0])
    return dict(text=what, change=perplexity(model.forward, ids) / perplexity(model.gemma, ids) - 1)


def cost(model, how, args):
    """Seconds to remember one more fact and to answer one question, alone, with 64 facts held; bytes of a fact; parameters."""
    cell = told_and_asked(SimpleNamespace(**{**vars(args), "questions": 8}), model.tokenizer, 64)
    facts, asked = cell[0]
    row = dict(parameters=sum(p.numel() for p in model.trainable_parameters()) if how != PROMPT else 0)
    if how in TOLD:
        remember(model, facts)
        row.update(bytes_per_fact=held_bytes(model) / len(facts), write=timed(model, [lambda fact=fact: model.add_to_memory(fact) for fact in facts[:8]]))
        remember(model, facts)
    elif how in TAUGHT:
        row["bytes_per_fact"] = sum(p.numel() * p.element_size() for p in model.trainable_parameters()) / model.config.known
    elif how == PROMPT:
        config, tokens = model.gemma.config, sum(len(model.tokenizer.encode(fact + "\n", bos=False)) for fact in facts)
        row.update(bytes_per_fact=tokens / len(facts) * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * model.gemma.dtype.itemsize)
    if how in (PROMPT, NONE):
        context = "".join(f"{fact}\n" for fact in facts) if how == PROMPT else ""
        jobs = [lambda q=q: complete(model, [prompt_with(model, q["question"], context)], 16) for q in asked]
    else:
        jobs = [lambda q=q: model.answer(q["question"], max_new_tokens=16) for q in asked]
    return dict(row, answer=timed(model, jobs))


def held_bytes(model):
    """Bytes that the memory needs to answer from: those of its tensors that no training needs."""
    graph = model.memory_graph
    if model.variant == "graph":
        tensors = [graph.tokens.ids, graph.tokens.keys, graph.nodes]
    else:
        tensors = [t for kept in graph.kept for t in (kept if isinstance(kept, tuple) else vars(kept).values())]
    return sum(t.numel() * t.element_size() for t in tensors)


def timed(model, jobs):
    """Seconds that a job takes, the first left out: it warms up."""
    wait = torch.cuda.synchronize if model.gemma.device.type == "cuda" else lambda: None
    jobs[0](), wait()
    started = time.perf_counter()
    for job in jobs[1:]:
        job()
    wait()
    return (time.perf_counter() - started) / (len(jobs) - 1)


# ---------------------------------------------------------------------------------------------------------- training

def settings_of(name, args, folder, **changes):
    """(TrainConfig, the design's config): those of variants/configs/, with what all designs have alike, and `changes`."""
    config_class = variants.find(name).Config
    file = from_file(ROOT / "variants" / "configs" / f"{name}.json", train.TrainConfig, config_class)
    steps = max(1, (args.taught_examples if name in TAUGHT else args.examples) // args.batch_size)
    alike = dict(variant=name, model=args.model, device=str(args.device), out=str(folder), steps=steps, minutes=args.minutes, batch=args.batch_size, bundles=args.bundles,
                 facts=args.facts, workers=args.workers, seed=args.seed, warmup=min(100, steps // 4), eval_every=max(50, steps // 8))
    values = {**file, **alike, **changes, "chat": args.model.rstrip("/").endswith("-it")}
    layers = read_json(find_model(find_base(args.model)) / "config.json").get("num_hidden_layers", 26)
    values.update({where: max(1, layers // 2) for where in ("inject_after", "gist_after")      # a base too small for where a design plugs in
                   if values.get(where, getattr(config_class, where, 0)) > layers})
    pick = lambda cls: cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
    config = pick(config_class)
    config.check(name)
    return pick(train.TrainConfig), config


def trained(name, args, folder, **changes):
    """Train a design, with `changes` of its settings, and save it in a folder. Returns what that took."""
    settings, config = settings_of(name, args, folder, **changes)
    if (folder / "checkpoint.safetensors").is_file():                      # a call that was cut off has left it
        settings = replace(settings, resume=True)
    started = time.time()
    model, last = train.train(settings, config)
    log = [line for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return dict(seconds=round(time.time() - started, 1), steps=model.trained["step"], examples=model.trained["step"] * settings.batch, log_lines=len(log),
                held_out={str(N): r for N, r in last.items()})


def shipped(args):
    """What training the shipped memory took, by its logs: `examples` and `seconds` of all its runs, each the start of the next."""
    folder = Path(SHIPPED[args.model])
    lasts = [json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) for log in sorted(folder.glob("log*.jsonl"))]
    return dict(shipped=True, seconds=round(sum(last["seconds"] for last in lasts), 1),
                examples=sum(round(last["examples_per_second"] * last["seconds"]) for last in lasts))


# -------------------------------------------------------------------------------------------------------------- jobs

class Compare:
    """The jobs of all designs, and their results: result["designs"][name][job] is what a job returned."""

    def __init__(self, args, result):
        self.args, self.result, self.opened = args, result, (None, None)

    def jobs(self):
        """(design, job, does it train) in the order they are done."""
        args = self.args
        for name in args.designs:
            sizes = [f"recall {N}" for N in args.sizes]
            turns = [f"turns {T}" for T in args.turns]
            if name in TAUGHT:
                for N in reversed(taught_sizes(vars(args))):               # the hardest first, should time run out
                    yield from ((name, f"train {N}", True), (name, f"recall {N}", False))
                yield from ((name, "locality", False), (name, "cost", False))
                continue
            if name in TOLD:
                yield name, "train", not (name == "graph" and args.shipped)
            more = ["refusal", "locality"] if name in TOLD else []
            yield from ((name, job, False) for job in (*sizes, "update", *turns, *more, "cost"))

    def model(self, name, N=None):
        """The trained design, kept open while its jobs last."""
        folder = NONE if name in (PROMPT, NONE) else name if N is None else f"{name}-{N}"
        if self.opened[0] != folder:
            self.opened = None, None                                       # let go of the old before the new is there
            args = self.args
            model = variants.find(NONE).from_pretrained(base=args.model, device=args.device) if folder == NONE else \
                variants.load(args.model if folder == "graph" and args.shipped else args.out / folder, device=args.device)
            self.opened = folder, model
        return self.opened[1]

    def do(self, name, job):
        args = self.args
        what, _, number = job.partition(" ")
        N = int(number) if number else None
        if what == "train":
            self.opened = None, None
            if name == "graph" and args.shipped:
                return shipped(args)
            return trained(name, args, args.out / name) if N is None else trained(name, args, args.out / f"{name}-{N}", known=N, seed=args.seed * 1000)
        model = self.model(name, (N or taught_sizes(vars(args))[-1]) if name in TAUGHT else None)
        if what == "recall":
            cell = told_and_asked(args, model.tokenizer, N)
            return answered(model, name, cell[:1] if name in TAUGHT else cell, args)
        if what == "turns":
            return answered(model, name, conversations(args, model.tokenizer, N), args)
        if what == "update":
            return answered(model, name, list(memories(world(args, model.tokenizer, "update"), 16, "update", args.questions)), args)
        return cost(model, name, args) if what == "cost" else dict(refusal=refused, locality=disturbed)[what](model, args)

    def run(self):
        """Do what is not done yet, as long as --limit allows. Returns how many jobs are left."""
        args, started, longest = self.args, time.time(), {True: 0.0, False: 0.0}
        todo = [job for job in self.jobs() if job[1] not in self.result["designs"].get(job[0], {})]
        with tqdm(todo, unit="job", file=sys.stderr, dynamic_ncols=True, disable=not todo) as bar:
            for done, (name, job, trains) in enumerate(bar):
                now = time.time() - started
                if done and args.limit and now + longest[trains] > 60 * args.limit:
                    return len(todo) - done
                bar.set_description(f"{name}: {job}")
                before = time.time()
                row = self.do(name, job)
                took = time.time() - before
                longest[trains] = max(longest[trains], took)
                self.result["designs"].setdefault(name, {})[job] = dict(row, job_seconds=round(took, 1), hardware=hardware(args.device), commit=commit())
                write_json(args.out / f"{name}.json", dict(settings=self.result["settings"], command=self.result["command"], jobs=self.result["designs"][name]))
        return 0


def taught_sizes(settings):
    """How many facts chapters and LoRA are taught: those that the others are told, and --taught."""
    return [*settings["sizes"], *[N for N in (settings["taught"],) if N > settings["sizes"][-1]]]


# ------------------------------------------------------------------------------------------------------------- report

def report(result):
    """The result as Markdown: str. A row for each measurement, a column for each design."""
    designs = {name: jobs for name, jobs in result["designs"].items() if jobs}
    settings, names = result["settings"], [name for name in DESIGNS if name in result["designs"]]
    get = lambda name, job, what: designs.get(name, {}).get(job, {}).get(what)
    line = lambda title, job, what, show: [title, *("–" if get(name, job, what) is None else show(get(name, job, what)) for name in names)]
    shares = lambda s: percent(s, True)
    rows = [line(f"recall, {N} facts", f"recall {N}", "recall", shares) for N in taught_sizes(settings)]
    rows += [line("update, 16 facts", "update", "recall", shares)]
    rows += [line(f"told in turn 1, {T} turns later", f"turns {T}", "recall", shares) for T in settings["turns"]]
    rows += [line("refused what it wasn't told", "refusal", "rightly", percent), line("refused what it was told", "refusal", "wrongly", percent),
             line(f"perplexity with {HELD} facts", "locality", "change", lambda x: f"{x:+.2%}"),
             line("trainable parameters", "cost", "parameters", lambda n: f"{n:,}"),
             line("bytes a fact", "cost", "bytes_per_fact", lambda n: f"{n:,.0f}"),
             line("seconds to answer", "cost", "answer", lambda s: f"{s:.3f}")]
    largest = taught_sizes(settings)[-1]
    wrote = lambda name: get(name, "cost", "write") if name in TOLD else (get(name, f"train {largest}", "seconds") or math.nan) / largest if name in TAUGHT else None
    rows += [["seconds to remember a fact", *("–" if not (s := wrote(name)) or math.isnan(s) else f"{s:.3f}" for name in names)]]
    learnt = lambda name: get(name, "train" if name in TOLD else f"train {largest}", "examples")
    rows += [["examples trained on", *(f"{n:,}" if (n := learnt(name)) else "–" for name in names)],
             ["minutes of training, pool included", *(f"{s / 60:.1f}" if (s := get(name, "train" if name in TOLD else f"train {largest}", "seconds")) else "–"
                                                      for name in names)]]
    notes = sorted({f"{TITLES[name]}, {job}: {row['why']}." for name, jobs in designs.items() for job, row in jobs.items() if row.get("why")})
    if get("graph", "train", "shipped"):
        notes.append("graph: the shipped memory, which wasn't trained for this comparison; examples and minutes (without the pool's) are those of all its runs.")
    return "\n\n".join([table(["%", *(TITLES[name] for name in names)], rows), *notes])


def plot(result, path):
    """compare.png: recall by number of facts, and by turns since the fact was told. False without matplotlib."""
    pyplot = plotting()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.4), sharey=True)
    for axis, what, counts, label in ((axes[0], "recall", taught_sizes(result["settings"]), "facts in memory"),
                                       (axes[1], "turns", result["settings"]["turns"], "other turns since the fact was told")):
        for name, colour in zip(DESIGNS, pyplot.rcParams["axes.prop_cycle"].by_key()["color"]):        # the same in both, whatever was measured
            points = [(n, row["recall"]) for n in counts if (row := result["designs"].get(name, {}).get(f"{what} {n}")) and row["recall"]]
            if points:
                x, shares = zip(*points)
                axis.plot(x, [100 * s["share"] for s in shares], marker="o", label=TITLES[name], color=colour, linestyle="--" if name in (PROMPT, NONE) else "-")
                axis.fill_between(x, [100 * s["low"] for s in shares], [100 * s["high"] for s in shares], color=colour, alpha=0.1, linewidth=0)
        axis.set(xscale="log", xlabel=label, ylim=(-2, 102))
        axis.set_xticks(counts, [f"{n:,}" for n in counts])
        axis.minorticks_off()
    axes[0].set_ylabel("exact match, %")
    if any(axis.lines for axis in axes):
        (axes[0] if axes[0].lines else axes[1]).legend(loc="upper center", bbox_to_anchor=(1.0, -0.2), ncols=4)
    save_figure(figure, path)
    pyplot.close(figure)
    return True


# --------------------------------------------------------------------------------------------------- the command line

# Name: (with --quick, on a GPU, otherwise, help)
SIZES = dict(examples=(64, 500_000, 20_000, "that each design that is told facts is trained on"),
             taught_examples=(64, 800_000, 20_000, "that chapters and LoRA are taught by, anew for each number of facts; fewer where nothing is left to learn"),
             taught=(0, 1000, 0, "facts that chapters and LoRA are taught beside those numbers; 0: no more"), batch_size=(16, 512, 64, "examples a step"),
             bundles=(20, 40_000, 3000, "of sentences and questions in the pool of those that are told facts"), facts=(8, 64, 32, "the largest memory in training"),
             questions=(8, 256, 64, "of each measurement"), batch=(8, 256, 64, "questions asked at once"))


def add_sizes(parser, sizes):
    for name, (quick, gpu, otherwise, text) in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{text} (default {gpu:,} on a GPU, {otherwise:,} otherwise; with --quick {quick:,})")


def sized(args, sizes):
    """The arguments with the default of each size that was not given. Raises InputError for one that is too small."""
    gpu = str(args.device).startswith("cuda")
    for name, (quick, on_gpu, otherwise, _) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else on_gpu if gpu else otherwise)
        if getattr(args, name) < (name != "taught"):
            raise InputError(f"expected --{name.replace('_', '-')} of at least {int(name != 'taught')}, got {getattr(args, name)}.")
    return args


def parse_arguments(arguments):
    parser = Parser(prog="python -m bench.compare", description="Measure all designs of a memory on the same base, facts and questions.",
                    epilog="example: python -m bench.compare --model gemma-3-270m --device cuda --workers 14 --out out/compare-270m\n"
                           "         and the same again until it says that nothing is left; --designs prefix on one GPU and --designs cross on another share the work")
    parser.add_argument("--model", default="tiny", help="the base: tiny, gemma-3-270m, a folder, or a Hub id (default tiny)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, help="folder for compare.json, compare.png and the trained designs (default out/compare-MODEL); what it holds is not done again")
    parser.add_argument("--designs", type=some_of(DESIGNS), default=list(DESIGNS), metavar="NAME,…", help=f"of {','.join(DESIGNS)} (default all)")
    parser.add_argument("--sizes", type=numbers(1), metavar="N,…", help="numbers of facts (default 4,16,64,256; with --quick 4)")
    parser.add_argument("--turns", type=numbers(1), metavar="T,…", help="other turns before the question (default 1,5,20,50,120; with --quick 1,5)")
    add_sizes(parser, SIZES)
    parser.add_argument("--minutes", type=float, default=0.0, help="end each training after so many, examples or not; 0: never (default 0)")
    parser.add_argument("--limit", type=float, default=8.5, help="minutes of a call: no job begins that might not end within; 0: no limit (default 8.5)")
    parser.add_argument("--shipped", action="store_true", help="measure the graph memory that ships with the base instead of training one")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw sentences (default 0: this one)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    parser.add_argument("--quick", action="store_true", help="next to no training and few questions: does it run?")
    args = sized(parser.parse_args(arguments), SIZES)
    args.sizes = args.sizes or ([4] if args.quick else [4, 16, 64, 256])
    args.turns = args.turns or ([1, 5] if args.quick else [1, 5, 20, 50, 120])
    if args.shipped and args.model not in SHIPPED:
        raise InputError(f"expected --shipped with a base that a memory ships with ({', '.join(SHIPPED)}), got {args.model}; leave it out.")
    args.out = out_folder(args.out, "compare", args.model)
    return args


# What must be the same for jobs to be compared.
ALIKE = ("model", "seed", "sizes", "turns", "examples", "batch_size", "bundles", "facts", "questions", "minutes", "taught_examples", "taught", "shipped")


def begun(args):
    """The result so far: what --out holds, or an empty one. Raises InputError if it was made with other settings."""
    settings = {name: getattr(args, name) for name in ALIKE}
    result = dict(settings=settings, commands={}, designs={})
    for name in DESIGNS:
        file = args.out / f"{name}.json"
        if not file.exists():
            continue
        part = read_json(file)
        if not isinstance(part.get("jobs"), dict) or not isinstance(part.get("settings"), dict):
            raise InputError(f"{file}: expected the entries 'jobs' and 'settings'; restore the file, or name another --out.")
        for what, value in settings.items():
            if part["settings"].get(what) != value:
                raise InputError(f"{file}: it was made with {what} = {part['settings'].get(what)}, got {value}; only equal settings compare: "
                                 "use the same, or name another --out.")
        result["designs"][name], result["commands"][name] = part["jobs"], part.get("command", "")
    return result


def main(arguments=None):
    args = parse_arguments(arguments)
    check_device(args.device)
    command = "python -m bench.compare " + " ".join(sys.argv[1:] if arguments is None else map(str, arguments))
    args.out.mkdir(parents=True, exist_ok=True)
    left = Compare(args, dict(begun(args), command=command)).run()
    result = begun(args)                                                   # with what other processes have done by now
    write_json(args.out / "compare.json", result)
    drawn = plot(result, args.out / "compare.png")
    made = sorted({f"{row['hardware']}, commit {row['commit']}" for jobs in result["designs"].values() for row in jobs.values()})
    seconds = sum(row["job_seconds"] for jobs in result["designs"].values() for row in jobs.values())
    print("\n".join([*dict.fromkeys(result["commands"].values()), *made, f"{seconds:.0f} s", "", report(result)]))
    print(f"saved {args.out}/compare.json{' and compare.png' if drawn else ''}; " +
          (f"{left} jobs are left: run the same command again." if left else "nothing is left to do."), file=sys.stderr)
    return result


if __name__ == "__main__":
    run(main)
