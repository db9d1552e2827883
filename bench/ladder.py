"""Why does the obvious memory fail, and what mends it?  python -m bench.ladder --model tiny

The road from this project's original plan to its final design, one change a rung. Every rung is trained alike, for the same
time or number of steps, from the same seed, on the same pool of sentences, and is asked the same questions about people and
values that training never saw. Three groups:

    ladder      from the plan to the final design; each rung keeps what the rungs before it brought
    without     the final design with one thing taken away
    after       the final design with the memory plugged in after another layer

What a change is worth depends on what is there already: a rung that gains nothing may be what the next one stands on, and the
second group shows what would be missed at the end. Runs are short, so these figures compare designs; longer training gives
more. One seed a rung: differences of a few points may be luck. An answer counts if greedy decoding would give all of it.
"""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import train
from bench.common import Parser, commit, hardware, out_folder, percent, plotting, run, save_figure, share, table
from data_gen import KINDS
from extras.memory_model import find_base
from gemma import Gemma, InputError, Tokenizer, check_device, find_model, read_json, write_json
from memory import GemmaWithMemory, MemoryConfig
from train import Pool, TrainConfig

SIZES = (16, 64)
ANSWERABLE = KINDS[:-1]
ROWS = 128                                  # questions asked at once: part of how they are drawn, so the same on every machine
HELD_OUT = 200                              # bundles in a held-out pool at least
LADDER, WITHOUT, AFTER = GROUPS = ("ladder", "without", "after")
UNENDING = 10**6                            # steps of a run that ends by the clock

# ------------------------------------------------------------------------------------------------------ the designs

PLAN = dict(node_features="embedding", query="pooled", read="episode", identity_values=False, cosine_keys=False, sentence_layers=0, reading_layers=0, match=False, said=False, marks=False, follow=False,
            graph=False, time_edges=False, similar_edges=False, hops=1, open_words=False, retrieval=0.0, copying=0.0)

# Edges in time and the GAT come together: neither does anything without the other, as long as no words are compared. So do the
# reader and its marks; following what is said is there without them too, but has not been measured by itself.
RUNGS = (
    ("plan", "the original plan: mean embeddings, one pooled query, closed word lists", {}),
    ("open-words", "values from the whole vocabulary", dict(open_words=True)),
    ("hidden-nodes", "nodes are mean hidden states", dict(node_features="hidden")),
    ("identity-values", "the value map starts as the identity", dict(identity_values=True)),
    ("cosine-keys", "keys and queries of length 1", dict(cosine_keys=True)),
    ("retrieval-loss", "a loss on which episode is found", dict(retrieval=TrainConfig.retrieval)),
    ("token-query", "every position asks for itself", dict(query="token")),
    ("token-read", "reads tokens inside the episode", dict(read="token")),
    ("copying-loss", "a loss on which token is read", dict(copying=TrainConfig.copying)),
    ("both-nodes", "nodes are states and embeddings", dict(node_features="both")),
    ("sentence", "an episode's tokens hear those after them", dict(sentence_layers=MemoryConfig.sentence_layers)),
    ("gat", "a GAT with edges in time", dict(graph=True, time_edges=True)),
    ("match", "candidates compared word by word", dict(match=True)),
    ("said", "readers know what the question says itself", dict(said=True)),
    ("similar-edges", "later episodes silence earlier ones", dict(similar_edges=True)),
    ("two-hops", "asks twice", dict(hops=2)),
    ("reading", "question and episode side by side: the final design", dict(reading_layers=1, marks=True, follow=True)),
)
TAKEN_AWAY = (
    ("without-time-edges", "no edges in time, and no words borrowed", dict(time_edges=False)),
    ("without-gat", "no GAT", dict(graph=False)),
    ("without-similar-edges", "no similarity edges", dict(similar_edges=False)),
    ("without-sentence", "tokens know only what stands before them", dict(sentence_layers=0)),
    ("without-reading", "no question beside the episode", dict(reading_layers=0)),
    ("without-match", "no words compared, and nothing that builds on it", dict(match=False)),
    ("without-copying-loss", "no copying loss", dict(copying=0.0)),
    ("without-retrieval-loss", "no retrieval loss", dict(retrieval=0.0)),
)
LAYERS = (2, 4, 8, 12, 16)


@dataclass
class Design:
    """One thing to train and measure."""

    number: int
    name: str            # --rungs finds it by this, and the result keeps it under this
    group: str           # one of GROUPS
    what: str            # what was changed, in a few words
    changes: dict        # the same as fields of MemoryConfig and TrainConfig: against the rung before, or the final design
    choices: dict        # all that designs differ in

    def configs(self, settings, chat):
        """(TrainConfig, MemoryConfig); settings: the fields of TrainConfig that all designs share."""
        own = lambda config_class: {f.name: self.choices[f.name] for f in fields(config_class) if f.name in self.choices}
        return TrainConfig(**{**settings, **own(TrainConfig)}), MemoryConfig(chat=chat, **own(MemoryConfig))


def designs(layers=10**3):
    """All designs for a base of so many layers, in the order they are trained in: list of Design."""
    final_layer = MemoryConfig.inject_after if layers > MemoryConfig.inject_after else max(1, layers // 2)
    found, choices = [], {**PLAN, "inject_after": final_layer}
    add = lambda number, name, group, what, changes: found.append(Design(number, name, group, what, changes, {**choices, **changes}))
    for number, (name, what, changes) in enumerate(RUNGS, 1):
        add(number, name, LADDER, what, changes)
        choices = found[-1].choices
    for number, (name, what, changes) in enumerate(TAKEN_AWAY, len(RUNGS) + 1):
        add(number, name, WITHOUT, what, changes)
    others = [layer for layer in LAYERS if layer != MemoryConfig.inject_after]     # numbered alike for every base
    for number, layer in enumerate(others, len(RUNGS) + len(TAKEN_AWAY) + 1):
        if layer <= layers and layer != final_layer:
            add(number, f"after-{layer}", AFTER, f"injected after layer {layer}", dict(inject_after=layer))
    return found


FINAL = RUNGS[-1][0]


# ------------------------------------------------------------------------------------------------ training, measuring

@torch.no_grad()
def measure(model, pool, tokens, questions, seed=1):
    """What `model` answers of questions drawn from a held-out pool, at least `questions` for each size of memory.

    Drawn and judged as in train.evaluate, but with counts: a dict per size, of shares (see bench.common.share).
    """
    model.eval()
    result = {}
    for N in SIZES:
        generator = torch.Generator(model.gemma.device).manual_seed(seed)
        parts = []
        for _ in range(math.ceil(questions / ROWS)):
            batch = pool.draw(ROWS // 8, ROWS, N, 0.1, 0.0, generator)
            with train.autocast(model):
                scores = train.scores(batch, train.forward(model, pool, batch, tokens))
            parts.append((*scores, batch["kind"], batch["known"].any(1)))
        right, found, null, kind, known = map(torch.cat, zip(*parts))
        of = lambda hit, among: share(int((hit & among).sum()), int(among.sum()))
        result[str(N)] = dict(recall=of(right, known), first=of(found, known), refused=of(null > 0.5, ~known), refused_wrongly=of(null > 0.5, known),
                              **{name: of(right, known & (kind == i)) for i, name in enumerate(ANSWERABLE)})
    return result


@contextmanager
def bars(label, minutes):
    """While this lasts, what train.py shows is one bar that goes away when it is done: its last line would name a folder
    that goes away as well."""
    def bar(*iterable, **options):
        if options.get("desc") == "training":
            options.update(desc=label, leave=False)
            if minutes:                     # the number of steps is not known: a share of UNENDING would say nothing
                options["bar_format"] = "{desc}: {n_fmt} steps in {elapsed} of %d:%02d [{rate_fmt}{postfix}]" % divmod(60 * minutes, 60)
        return tqdm(*iterable, **options)
    try:
        vars(train).update(tqdm=bar, print=lambda *line, **options: None)
        yield
    finally:
        train.tqdm = tqdm
        del train.print


class Bench:
    """Trains designs on one base and measures them. args: see `parse_arguments`."""

    def __init__(self, args):
        self.args, self.layer, self.pools = args, None, {}
        self.load()

    def load(self):
        found = find_base(self.args.model)
        self.gemma, self.tokenizer = Gemma.from_pretrained(found, device=self.args.device), Tokenizer(find_model(found))

    def model(self, config):
        return GemmaWithMemory(self.gemma, self.tokenizer, config, self.args.model)

    def settings(self, **changes):
        """What all designs are trained with, as fields of TrainConfig."""
        args = self.args
        steps = args.steps or UNENDING
        return dict(model=args.model, steps=steps, minutes=args.minutes or 0.0, batch=args.batch, bundles=args.bundles, facts=args.facts,
                    lr=args.lr, warmup=min(args.warmup, steps // 4), tokens=args.tokens, eval_every=steps, seed=args.seed,
                    device=str(args.device), compile=args.compile, **changes)

    def prepared(self, model, settings):
        """(training pool, {"held_out": pool, "unseen_phrasings": pool}) for a design.

        Designs that share the layer and the word lists share the pool; only the nodes, which are means, are worked out again.
        """
        if self.layer != model.config.inject_after:
            self.pools, self.layer = {}, model.config.inject_after       # let go of the old before the new are made: GPUs are small
        with multiprocessing.get_context("spawn").Pool(self.args.workers) if self.args.workers else nullcontext() as processes:
            draw = processes.imap if processes else map
            if settings.open_words not in self.pools:
                self.pools.pop(not settings.open_words, None)
                self.pools[settings.open_words] = Pool(model, "train", settings.bundles, settings.tokens, settings.seed, settings.open_words,
                                                       texts=min(4096, settings.bundles // 8), draw=draw)
            for i, (name, split) in enumerate((("held_out", "validation"), ("unseen_phrasings", "test")), 1):
                if name not in self.pools:
                    self.pools[name] = Pool(model, split, max(HELD_OUT, settings.bundles // 20), settings.tokens, settings.seed + i, draw=draw)
        for pool in self.pools.values():
            pool.nodes = pool.node_features(model)
        return self.pools[settings.open_words], {name: self.pools[name] for name in ("held_out", "unseen_phrasings")}

    def measured(self, design):
        """Train and measure one design: dict. One whose gradients explode is a result too, {"failed": why}."""
        moved = self.layer != design.choices["inject_after"]
        if self.args.compile and moved and self.layer is not None:
            self.load()                     # a base of its own: other layers would stay compiled
        with tempfile.TemporaryDirectory() as folder, bars(design.name, self.args.minutes):
            settings, config = design.configs(self.settings(out=folder), self.args.model.rstrip("/").endswith("-it"))
            base = self.model(config)
            pool, held_out = self.prepared(base, settings)
            if moved and (self.args.compile or base.gemma.device.type == "cuda"):
                # The first step on a GPU loads and compiles: that is no design's fault.
                train.train(TrainConfig(**{**asdict(settings), "steps": 1, "eval_every": 1, "warmup": 0, "out": f"{folder}/warm"}), config, base, (pool, held_out["held_out"]))
            try:
                model, _ = train.train(settings, config, base, (pool, held_out["held_out"]))
            except InputError as error:
                return dict(failed=str(error).split(";")[0])
            log = json.loads((Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        learnt = {name: log[name] for name in ("loss", "answer_loss", "retrieval_loss", "copying_loss")}
        return dict(steps=log["step"], questions_learnt_from=log["step"] * settings.batch, seconds_of_training=log["seconds"],
                    questions_per_second=log["examples_per_second"], last_batch=learnt,
                    parameters=sum(p.numel() for p in model.trainable_parameters()),
                    **{name: measure(model, pool, settings.tokens, self.args.questions) for name, pool in held_out.items()})


# ------------------------------------------------------------------------------------------------------------- report

def recalled(row, N, where="held_out", what="recall"):
    """A share of a rung's result, or None where there is none."""
    return row[where][str(N)][what] if row and where in row else None


def gain(row, before, N):
    """The difference in recall, in points."""
    now, then = recalled(row, N), recalled(before, N)
    return f"{100 * (now['share'] - then['share']):+.1f}" if now and then and None not in (now["share"], then["share"]) else "–"


def lines(result):
    """What the tables and the plot show, group by group: {group: [(Design, its result, the result to compare it with)]}.

    The final design stands first in the second group and, as one of the layers, in the third; only if these were measured.
    """
    every, rows = designs(result["layers"]), result["rungs"]
    final = next(d for d in every if d.name == FINAL)
    shown = {group: [(d, rows[d.name], rows.get(FINAL)) for d in every if d.group == group and d.name in rows] for group in GROUPS}
    shown[LADDER] = [(d, rows[d.name], rows.get(before.name) if before else None)
                     for before, d in zip([None, *every], every) if d.group == LADDER and d.name in rows]
    if FINAL in rows:
        layer = final.choices["inject_after"]
        for group, what in ((WITHOUT, "the final design"), (AFTER, f"injected after layer {layer}: the final design")):
            if shown[group]:
                shown[group].append((Design(final.number, FINAL, group, what, {}, final.choices), rows[FINAL], None))
        shown[WITHOUT].sort(key=lambda line: line[0].number)
        shown[AFTER].sort(key=lambda line: line[0].choices["inject_after"])
    return {group: found for group, found in shown.items() if found}


TITLES = {LADDER: "From the plan to the final design; each rung keeps what the rungs before it brought",
          WITHOUT: "The final design with one thing taken away; gains against the final design",
          AFTER: "The final design after other layers; gains against the final design"}


def report(result):
    """The result as Markdown: str."""
    blocks = []
    for group, found in lines(result).items():
        rows, kinds = [], []
        for d, row, before in found:
            start = [d.number, d.what]
            if "failed" in row:
                rows.append([*start, "failed", *["–"] * 6])
                continue
            pair = lambda *what: " / ".join(percent(recalled(row, N, *what)) for N in SIZES)
            rows.append([*start, *(cell for N in SIZES for cell in (percent(recalled(row, N), True), gain(row, before, N))),
                         pair("held_out", "first"), pair("unseen_phrasings"), f"{row['questions_learnt_from'] / 1000:,.0f}"])
            kinds.append([*start, *(pair("held_out", kind) for kind in ANSWERABLE)])
        sizes = " / ".join(map(str, SIZES))
        blocks += [f"{TITLES[group]}. Recall, exact match in % (95% intervals), and what was gained",
                   table(["", "what changed", *(cell for N in SIZES for cell in (f"{N} facts", "gain")), f"right episode first, {sizes}",
                          f"unseen phrasings, {sizes}", "thousand questions learnt from"], rows, left=2)]
        if kinds:
            blocks += [f"The same by kind of question, {sizes} facts", table(["", "what changed", *ANSWERABLE], kinds, left=2)]
        blocks += [f"{d.name} failed: {row['failed']}." for d, row, _ in found if "failed" in row]
    return "\n\n".join(blocks)


def plot(result, path):
    """ladder.png: recall of every rung, a line for each size of memory, and beside it the other groups. False without matplotlib."""
    shown = {group: [line for line in found if "failed" not in line[1]] for group, found in lines(result).items()}
    shown = {group: found for group, found in shown.items() if found}
    pyplot = plotting() if shown else None
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(1, len(shown), figsize=(1.6 + 0.42 * sum(map(len, shown.values())), 3.8), sharey=True, squeeze=False,
                                   width_ratios=[len(found) + 1 for found in shown.values()])
    title = {LADDER: "one change a rung", WITHOUT: "final design without …", AFTER: "injected after layer …"}
    for axis, (group, found) in zip(axes[0], shown.items()):
        label = {LADDER: lambda d: d.name, WITHOUT: lambda d: "–" if d.name == FINAL else d.name.removeprefix("without-"),
                 AFTER: lambda d: str(d.choices["inject_after"])}[group]
        for N in SIZES:
            shares = [recalled(row, N) for _, row, _ in found]
            line, = axis.plot([100 * s["share"] if s["share"] is not None else math.nan for s in shares], label=f"{N} facts",
                              marker="o", linestyle="none" if group == WITHOUT else "-")
            axis.vlines(range(len(found)), [100 * s["low"] for s in shares], [100 * s["high"] for s in shares], color=line.get_color(), alpha=0.35)
            axis.plot([100 * (recalled(row, N, "held_out", "first")["share"] or 0) for _, row, _ in found], color=line.get_color(), linewidth=0.8,
                      linestyle="none" if group == WITHOUT else ":", marker="_" if group == WITHOUT else "", label=f"right episode first, {N}")
        axis.set_xticks(range(len(found)), [label(d) for d, _, _ in found], rotation=45 if group != AFTER else 0,
                        ha="right" if group != AFTER else "center", rotation_mode="anchor")
        axis.set(title=title[group], ylim=(-2, 102), xlim=(-0.6, len(found) - 0.4))
    axes[0, 0].set_ylabel("exact match, %")
    axes[0, 0].legend(loc="upper left")
    save_figure(figure, path)
    pyplot.close(figure)
    return True


# --------------------------------------------------------------------------------------------------- the command line

def selection(text):
    """Numbers, ranges, names and groups -> the names of the designs that are meant."""
    every, names = designs(), set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = (int(x) if x.isdecimal() else 0 for x in (first, last or first))
        meant = {d.name for d in every if part in (d.name, d.group) or 0 < low <= d.number <= high <= every[-1].number}
        if not meant:
            raise argparse.ArgumentTypeError(f"expected numbers from 1 to {every[-1].number}, ranges such as 1-6, groups ({', '.join(GROUPS)}) "
                                             f"or names (such as plan or without-gat), got {part!r}")
        names |= meant
    return names


def parse_arguments(arguments):
    listed = "\n".join(f"  {d.number:2d}  {d.name:24s}{d.what}" for d in designs())
    parser = Parser(prog="python -m bench.ladder", description="Measure what each step from the original plan to the final design is worth.",
                    epilog=f"rungs:\n{listed}\n\nexample: python -m bench.ladder --model gemma-3-270m --device cuda --workers 14 --compile "
                           "--rungs 1-6 --out out/ladder-270m\n         and then the same with --rungs 7-14 --resume",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the base: tiny, gemma-3-270m, a folder, or a Hub id (default tiny)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, help="folder for ladder.json and ladder.png (default out/ladder-MODEL)")
    parser.add_argument("--rungs", type=selection, metavar="RUNG,…", help="of the list below: numbers, ranges such as 1-6, names, or groups "
                                                                          f"({', '.join(GROUPS)}; default all, with --quick the ladder)")
    parser.add_argument("--resume", action="store_true", help="go on with --out: what it holds is not measured again")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="of training for each rung (default 1 on a GPU, 4 otherwise; with --quick 0.65)")
    length.add_argument("--steps", type=int, help="of training for each rung, instead of --minutes")
    parser.add_argument("--batch", type=int, help="questions a step (default 1024 on a GPU, 128 otherwise; with --quick 64)")
    parser.add_argument("--bundles", type=int,
                        help="of sentences and questions in the pool (default 20000 on a GPU, 6000 otherwise; with --quick 600)")
    parser.add_argument("--facts", type=int, help="the largest memory in training (default 64, with --quick 16)")
    parser.add_argument("--questions", type=int,
                        help="asked of each rung for each size of memory (default 2048 on a GPU, 512 otherwise; with --quick 256)")
    parser.add_argument("--tokens", type=int, default=TrainConfig.tokens, help=f"longest question with its answer (default {TrainConfig.tokens})")
    parser.add_argument("--lr", type=float, default=TrainConfig.lr, help=f"highest learning rate (default {TrainConfig.lr:g})")
    parser.add_argument("--warmup", type=int,
                        help=f"steps of warm-up (default {TrainConfig.warmup}; with --quick 10), at most a quarter of --steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw the pool's sentences (default 0: this one)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers above the injection")
    parser.add_argument("--quick", action="store_true", help="little training and few questions: a look, not a measurement")
    args = parser.parse_args(arguments)
    check_device(args.device)
    gpu = str(args.device).startswith("cuda")
    for name, quick, on_gpu, otherwise in (("batch", 64, 1024, 128), ("bundles", 600, 20_000, 6000), ("facts", 16, 64, 64),
                                           ("questions", 256, 2048, 512)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else on_gpu if gpu else otherwise)
    if args.rungs is None:
        args.rungs = selection(LADDER if args.quick else ",".join(GROUPS))
    if args.warmup is None:
        args.warmup = 10 if args.quick else TrainConfig.warmup
    if args.steps is None and args.minutes is None:
        args.minutes = 0.65 if args.quick else 1.0 if gpu else 4.0
    for name in ("steps", "minutes", "questions"):
        if getattr(args, name) is not None and not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            raise InputError(f"expected --{name} above 0, got {getattr(args, name)}.")
    args.out = out_folder(args.out, "ladder", args.model)
    TrainConfig(batch=args.batch, bundles=args.bundles, facts=args.facts, tokens=args.tokens, lr=args.lr, warmup=args.warmup,
                workers=args.workers, out=str(args.out)).check()
    if (args.out / "ladder.json").exists() and not args.resume:
        raise InputError(f"{args.out / 'ladder.json'} holds results; go on from them with --resume, or name another --out.")
    return args


# What must be the same for two rungs to be compared.
ALIKE = ("model", "seed", "minutes", "steps", "batch", "bundles", "facts", "questions", "tokens", "lr", "warmup")


def begun(args, layers):
    """The result so far: what --resume finds, or one without rungs. Raises InputError if it was made with other settings."""
    settings = {name: getattr(args, name) for name in ALIKE}
    settings["device"] = torch.device(args.device).type
    seeds = dict(training=args.seed, training_pool=args.seed, held_out_pool=args.seed + 1, unseen_phrasings_pool=args.seed + 2, questions=1)
    if not (args.resume and (args.out / "ladder.json").exists()):
        return dict(model=args.model, layers=layers, settings=settings, seeds=seeds, rungs={})
    file = args.out / "ladder.json"
    result = read_json(file)
    if not isinstance(result.get("rungs"), dict) or not isinstance(result.get("settings"), dict):
        raise InputError(f"{file}: expected the entries 'rungs' and 'settings'; restore the file, or name another --out.")
    for name, value in settings.items():
        if result["settings"].get(name) != value:
            raise InputError(f"{file}: its rungs were measured with {name} = {result['settings'].get(name)}, got {value}; "
                             "only equal settings compare: use the same, or name another --out.")
    return result


def main(arguments=None):
    args = parse_arguments(arguments)
    bench = Bench(args)
    layers = len(bench.gemma.layers)
    asked = [d for d in designs(layers) if d.name in args.rungs]
    if not asked:
        raise InputError(f"expected --rungs that this base of {layers} layers has, got none.")
    result = begun(args, layers)
    where = dict(commit=commit(), hardware=hardware(args.device),
                 command="python -m bench.ladder " + " ".join(sys.argv[1:] if arguments is None else map(str, arguments)))
    todo = [d for d in asked if d.name not in result["rungs"]]
    args.out.mkdir(parents=True, exist_ok=True)
    with tqdm(todo, unit="rung", file=sys.stderr, dynamic_ncols=True, disable=not todo) as bar:
        for design in bar:
            bar.set_description(f"{design.number}: {design.what}")
            started = time.time()
            row = bench.measured(design)
            result["rungs"][design.name] = dict(what=design.what, changes=design.changes, choices=design.choices, **row,
                                                seconds=round(time.time() - started, 1), **where)
            write_json(args.out / "ladder.json", result)
            shares = f"failed: {row['failed']}" if "failed" in row else ", ".join(f"{percent(recalled(row, N))}% at {N} facts" for N in SIZES)
            tqdm.write(f"{design.number}: {design.what}: {shares}", file=sys.stderr)
    drawn = plot(result, args.out / "ladder.png")
    made = sorted({f"{row['hardware']}, commit {row['commit']}" for row in result["rungs"].values()})
    print("\n".join([where["command"], *made, f"{sum(row['seconds'] for row in result['rungs'].values()):.0f} s for {len(result['rungs'])} rungs",
                     "", report(result)]))
    print(f"saved {args.out}/ladder.json{' and ladder.png' if drawn else ''}", file=sys.stderr)
    return result


if __name__ == "__main__":
    run(main)
