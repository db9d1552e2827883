"""Does the memory return what was put into it?  python -m bench.recall --model tiny

Greedy answers to questions about people, values and phrasings that training never saw, compared with the truth letter by
letter. What is measured, in parts that --only can choose among:

    recall      by number of facts and kind of question; with trained phrasings; by tokens in the answer; episodes found
    refusal     a fifth of the questions has no answer in memory: precision and recall of "I don't know.", any threshold
    edits       a fact told again, a fact forgotten, a long row of edits
    locality    perplexity on ordinary text with unrelated facts in memory
    controls    the same questions without a memory, with another's memory, and with facts in the prompt

A memory of N facts is asked many questions; small ones are drawn again and again until there are --questions of them.
Intervals are Wilson's 95%, as if questions were independent; those on the same memory are not quite.
"""

import ast
import math
import sys
import sysconfig
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import variants
from bench.common import Parser, commit, hardware, numbers, out_folder, percent, plotting, run, save_figure, share, some_of, table
from data_gen import FEWEST_FACTS, World, open_vocabulary
from extras.memory_model import SHIPPED
from gemma import PAD, InputError, KVCache, check_device, read_json, write_json
from memory import MemoryView, TokenStore

PARTS = ("recall", "refusal", "edits", "locality", "controls")
ANSWERABLE = ("lookup", "update", "coreference", "two_hop", "list")
SIZES = (4, 16, 64, 100, 256, 1000, 4000)
TOKENS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 9), (10, 99))        # tokens in the answer, from and to
FOUND = 5                                                                  # facts that embedding search puts in the prompt

MEMORY, NOTHING, OTHER = "memory", "base alone", "another's memory"
ALL, ALL_SHOTS, SEARCHED = "all facts in the prompt", "all facts, 3 examples first", f"best {FOUND} facts by search, 3 examples"
RIGHT, RIGHT_SHOTS = "right fact in the prompt", "right fact, 3 examples first"
METHODS = (MEMORY, NOTHING, OTHER, ALL, ALL_SHOTS, SEARCHED, RIGHT, RIGHT_SHOTS)


# --------------------------------------------------------------------------------------------------------- questions

@dataclass
class Reply:
    """What the model made of one question."""

    asked: dict          # question, answer, support, kind, as data_gen draws them
    said: str            # the answer it would give if it never refused
    null: float = 0.0    # the null weight: above the threshold, `answer` refuses
    first: bool = False  # the episode that holds the answer has the largest weight (of a list: one that holds a part)
    five: bool = False   # every episode that holds a part of the answer is among the five largest

    @property
    def right(self):
        return self.said == self.asked["answer"]


def memories(world, N, kind, questions):
    """Memories of N facts with their questions, (facts, asked), until there are at least `questions` in all."""
    while questions > 0:
        facts, asked = world.memory(N, questions, kind)
        questions -= len(asked)
        yield facts, asked


def remember(model, facts):
    """Fill the memory with these facts alone, if it is told any. Returns a snapshot of it that can be asked later, see `ask`."""
    model.clear_memory()
    if model.told:
        model.add_to_memory(facts)
    return snapshot(model)


def snapshot(model):
    """The memory as it is now, as the injection layer sees it: a MemoryView, which later writes leave alone. None if there is none."""
    with torch.no_grad():
        model._open()
    return model.injection.view if model.told else None


def side_by_side(views):
    """The MemoryViews of R memories as one of G = R, so that each row of a batch reads a memory of its own."""
    if all(view is views[0] for view in views):
        return views[0]
    if not isinstance(views[0], MemoryView):                       # of another design
        return views[0].side_by_side(views)
    distinct = {id(view): view for view in views}
    N, first, total = max(view.valid.shape[1] for view in views), {}, 0
    for name, view in distinct.items():
        first[name], total = total, total + len(view.tokens.lengths)
    pad = lambda t, value=0: F.pad(t, (0, 0) * (t.ndim - 2) + (0, N - t.shape[1]), value=value)
    stores = [view.tokens for view in distinct.values()]
    parts = [name for name, value in vars(stores[0]).items() if torch.is_tensor(value) and name != "starts"]   # as TokenStore takes them
    return MemoryView(torch.cat([pad(view.keys) for view in views]), torch.cat([pad(view.nodes) for view in views]),
                      torch.cat([pad(view.valid, False) for view in views]),
                      torch.cat([pad(view.episodes + first[id(view)]) for view in views]),
                      TokenStore(*(torch.cat([getattr(store, part) for store in stores]) for part in parts)))


def room_for(longest):
    """How many new tokens an answer may take when the longest true one has so many: what is longer is wrong anyway."""
    return 2 * longest + 4


def ask(model, cell, batch=64, max_new_tokens=None):
    """Ask snapshots of memories, never letting the model refuse. cell: list of (snapshot, asked). Returns a list of Reply.

    `batch` questions at once, of several memories if these are small: a memory of four facts answers few questions, and two
    rows take as long as sixty. Questions with long answers go together, so that short ones need not wait for them.
    """
    rows = [(view, q, len(model.tokenizer.encode(q["answer"], bos=False))) for view, asked in cell for q in asked]
    replies, threshold, own = [None] * len(rows), threshold_of(model), model._open
    order = sorted(range(len(rows)), key=lambda i: rows[i][2])
    model.config.null_threshold = math.inf
    try:
        while order:
            view, part = rows[order[0]][0], order[:batch]
            if view is not None and len(part) * view.valid.shape[1] > 30_000:   # large ones by themselves: their keys are not to be copied
                part = [i for i in order if rows[i][0] is view][:batch]
            taken = set(part)
            order = [i for i in order if i not in taken]
            together = side_by_side([rows[i][0] for i in part])
            if together is not None:
                model._open = lambda: vars(model.injection).update(view=together, reading=None)
            said = model.answer([rows[i][1]["question"] for i in part],
                                max_new_tokens=max_new_tokens or room_for(max(rows[i][2] for i in part)))
            weights = model.weights()                                                      # (B, N + 1)
            if weights is None:                                    # a design that doesn't say what it drew on, and never refuses
                for i, text in zip(part, said):
                    replies[i] = Reply(rows[i][1], text)
                continue
            weights = weights.float()
            best = weights[:, :-1].topk(min(5, weights.shape[1] - 1)).indices.tolist()
            for i, text, null, top in zip(part, said, weights[:, -1].tolist(), best):
                # The last fact of two hops holds the answer; the first only leads there.
                q = rows[i][1]
                holders = q["support"] if q["kind"] == "list" else q["support"][-1:]
                replies[i] = Reply(q, text, null, top[0] in holders, bool(holders) and set(holders) <= set(top))
    finally:
        model.config.null_threshold, model._open = threshold, own
    return replies


def threshold_of(model):
    """Above which null weight `answer` refuses; a design without one never does."""
    return getattr(model.config, "null_threshold", math.inf)


def summary(replies, threshold):
    """Shares over replies to answerable questions. `recall` is the headline: a refusal is as wrong as a wrong answer."""
    count = lambda test: share(sum(map(test, replies)), len(replies))
    return dict(recall=count(lambda r: r.right and r.null <= threshold), unrefused=count(lambda r: r.right),
                first=count(lambda r: r.first), five=count(lambda r: r.five), refused=count(lambda r: r.null > threshold))


def loosely(text):
    """For judging the base's own answers more kindly: without case, quotes, and the full stop at the end."""
    return text.strip().strip("\"'“”").rstrip(".!").strip().lower()


# ----------------------------------------------------------------------------------------------------------- refusal

def refusals(nulls_known, nulls_unknown, threshold):
    """Precision and recall of refusing at a threshold, given null weights of answerable and unanswerable questions."""
    wrongly, rightly = (sum(n > threshold for n in nulls) for nulls in (nulls_known, nulls_unknown))
    return dict(precision=share(rightly, rightly + wrongly), recall=share(rightly, len(nulls_unknown)))


def choose_threshold(nulls_known, nulls_unknown):
    """The highest threshold whose F1 of refusing is within a standard error of the best, in the middle of a gap between null weights.

    F1 = 2 · rightly refused / (refused + unanswerable). Of thresholds that validation can hardly tell apart, the one that refuses least
    is wanted: the less a wording is like those of training and validation, the larger null weighs. (The one-standard-error rule,
    Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 7.10.) Raises InputError without unanswerable questions.
    """
    if not nulls_unknown:
        raise InputError("expected unanswerable questions to choose a threshold on, got none; raise --questions.")
    cuts = sorted({0.0, 1.0, *nulls_known, *nulls_unknown})
    scored = []
    for middle in ((low + high) / 2 for low, high in zip(cuts, cuts[1:])):
        wrongly, rightly = (sum(n > middle for n in nulls) for nulls in (nulls_known, nulls_unknown))
        scored.append((2 * rightly / (wrongly + rightly + len(nulls_unknown)), middle))
    best = max(scored)[0]
    enough = best - math.sqrt(best * (1 - best) / len(nulls_unknown))
    return max(middle for f1, middle in scored if f1 >= enough)


GRID = (0.001, 0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99, 0.999)


def curve(nulls_known, nulls_unknown):
    """Precision and recall of refusing over the threshold: list of dict."""
    rows = []
    for threshold in GRID:
        r = refusals(nulls_known, nulls_unknown, threshold)
        rows.append(dict(threshold=threshold, precision=r["precision"]["share"], recall=r["recall"]["share"]))
    return rows


def mixed(world, N, questions):
    """Memories with four answerable questions of any kind to one unanswerable: yields (facts, asked).

    Unanswerable ones are in turn `near` (something untold of somebody known, or of one with a similar name: data_gen's
    own), `unknown` (of somebody whose name occurs nowhere in the memory) and `world` (general knowledge).
    """
    turn, sorts, owed = 0, ("near", "unknown", "world"), 0.0
    while questions > 0:
        facts, drawn = world.memory(N, 2 * questions, None)
        near = [q for q in drawn if not q["support"]]
        asked = [q for q in drawn if q["support"]][:max(1, round(0.8 * questions))]
        owed += len(asked) / 4
        text = " ".join(facts).lower()
        while owed >= 1:
            sort = sorts[turn % 3]
            turn, owed = turn + 1, owed - 1
            if sort == "near" and near:
                q = near.pop()
            elif sort == "world":
                q = dict(question=world.world_question(), answer="", support=[])
            else:
                sort, q = "unknown", dict(question=stranger(world, text), answer="", support=[])
            asked.append({**q, "kind": "unanswerable", "sort": sort})
        questions -= len(asked)
        yield facts, asked


def stranger(world, text):
    """A question about somebody, or something, no word of whose name occurs in `text` (lower case)."""
    while True:
        bundle = world.bundle("lookup")
        lookups = [q.question for q in bundle.questions if q.kind == "lookup"]
        if lookups and not any(word in text for key in bundle.subjects for word in key.lower().split()):
            return lookups[0]


def set_threshold(folder, threshold):
    """Write the threshold into the memory.json of a saved memory; the file is replaced whole or not at all."""
    path = Path(folder) / "memory.json"
    saved = read_json(path)
    saved["memory"]["null_threshold"] = threshold
    write_json(path, saved)


# ------------------------------------------------------------------------------------------------- the base by itself

def prompt_with(model, question, context=""):
    """Token ids that ask the bare base, with `context` (lines of text, or nothing) before the question."""
    question = " ".join(question.split())
    return (model.tokenizer.chat([("user", context + question)]) if model.config.chat else
            model.tokenizer.encode(f"{context}Question: {question}\nAnswer:"))


@torch.no_grad()
def complete(model, prompts, max_new_tokens, batch=64, room=None):
    """Greedy answers of the bare base to prompts (lists of token ids): list of str.

    What all prompts begin with, such as the facts, goes through the layers once. `room`: bytes, roughly, for a batch.
    """
    gemma, config, device = model.gemma, model.gemma.config, model.gemma.device
    room = room or (16e9 if device.type == "cuda" else 1e9)
    shared = 0
    while shared < min(map(len, prompts)) - 1 and len({p[shared] for p in prompts}) == 1:
        shared += 1
    stem = KVCache(config, 1, shared, gemma.dtype, device)
    head = torch.tensor([prompts[0][:shared]], dtype=torch.long, device=device)
    for start in range(0, shared, 1024):
        gemma(head[:, start:start + 1024], cache=stem, last_only=True)

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said = [""] * len(prompts)
    stop = torch.tensor(sorted(model.stop), device=device)
    while order:
        T = len(prompts[order[-1]]) - shared                       # longest first: later batches are smaller and wider
        length = shared + T + max_new_tokens
        row_bytes = 2 * len(gemma.layers) * config.num_key_value_heads * config.head_dim * length * stem.layers[0].k.element_size()
        B = int(max(1, min(batch, room // row_bytes, room // (80_000 * T), len(order))))
        rows, order = order[-B:], order[:-B]
        cache = KVCache(config, B, length, gemma.dtype, device)
        # Each row ends at the same slot, so a shorter one begins later. Padding between the beginning and the rest would be
        # easier but wrong: sliding windows count slots. What of the beginning is in the last T tokens is computed again.
        kept = torch.tensor([max(0, len(prompts[i]) - T) for i in rows], device=device)            # (B,) tokens from the stem
        source = torch.arange(shared, device=device) - (shared - kept)[:, None]                    # (B, shared) their places in it
        for wide, narrow in zip(cache.layers, stem.layers):
            wide.k[:, :, :shared] = narrow.k[0][:, source.clamp(min=0)].transpose(0, 1)
            wide.v[:, :, :shared] = narrow.v[0][:, source.clamp(min=0)].transpose(0, 1)
        cache.real[:, :shared] = source >= 0
        cache.position += shared
        cache.seen += kept
        rest = [prompts[i][-T:] for i in rows]
        ids = torch.tensor([[PAD] * (T - len(r)) + r for r in rest], device=device)
        mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rest], device=device)
        done, tokens = torch.zeros(B, dtype=torch.bool, device=device), []
        for _ in range(max_new_tokens):
            token = gemma(ids, mask, cache=cache, last_only=True)[:, -1].argmax(-1).masked_fill(done, PAD)
            tokens.append(token)
            done |= torch.isin(token, stop)
            if done.all():
                break
            ids, mask = token[:, None], None
        for i, row in zip(rows, torch.stack(tokens, 1).tolist()):
            said[i] = model.text(row)
    return said


def examples(world, n=3):
    """n small worked examples as text, to show the base what an answer looks like."""
    text = ""
    for _ in range(n):
        facts, (q,) = world.memory(4, 1, "lookup")
        text += "".join(f"{fact}\n" for fact in facts) + f"Question: {q['question']}\nAnswer: {q['answer']}\n\n"
    return text


@torch.no_grad()
def search(model, facts, questions, how, k=FOUND):
    """Plain embedding search: per question the k facts with the nearest mean vector (cosine, the facts' mean taken out).

    how: "embedding", the rows of the embedding table, or "hidden", the states after layer `inject_after`.
    """
    def means(texts):
        ids = [model.tokenizer.encode(t) for t in texts]
        if how == "embedding":
            table = model.gemma.embed_tokens.weight
            return torch.stack([table[torch.tensor(row[1:], device=table.device)].float().mean(0) for row in ids])
        return torch.stack([s.float().mean(0) for i in range(0, len(ids), 64) for s in model.states(ids[i:i + 64])])

    stored, asking = means(facts), means(questions)
    stored, asking = stored - stored.mean(0), asking - (asking.mean(0) if len(questions) > 8 else stored.mean(0))
    cosine = F.normalize(asking, dim=-1) @ F.normalize(stored, dim=-1).T
    return cosine.topk(min(k, len(facts))).indices.tolist()


# ------------------------------------------------------------------------------------------------------ ordinary text

def docstrings(characters):
    """English prose that is on every machine with Python: the longer docstrings of its standard library, in order of name."""
    text, folder = [], Path(sysconfig.get_path("stdlib"))
    for file in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        text += [doc for node in ast.walk(tree) if isinstance(node, documented) and len(doc := ast.get_docstring(node) or "") > 300]
        if sum(map(len, text)) > characters:
            break
    return "\n\n".join(text)


@torch.no_grad()
def ordinary_text(model, rows, length, source, seed):
    """(rows, length) token ids of ordinary text, each row with <bos> in front, and in words what it is.

    source: "docstrings", "sampled" (what the base itself writes), a text file, or "" for what suits the base.
    """
    device = model.gemma.device
    # A base with a small vocabulary was never taught prose: to it, docstrings are noise and their perplexity means nothing.
    source = source or ("sampled" if model.gemma.config.vocab_size < 32768 else "docstrings")
    if source == "sampled":
        ids = torch.full((rows, 1), 2, device=device)
        ids = model.gemma.generate(ids, max_new_tokens=length - 1, temperature=1.0, stop=(), seed=seed)
        return ids, "text that the base itself wrote (temperature 1)"
    if source == "docstrings":
        text, name = docstrings(rows * length * 12), f"docstrings of Python {sys.version_info.major}.{sys.version_info.minor}'s standard library"
    else:
        try:
            text, name = Path(source).read_text(encoding="utf-8"), Path(source).name
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"expected --text to be docstrings, sampled or a UTF-8 file, got {source!r} ({error}).") from None
    ids = model.tokenizer.encode(text, bos=False)
    rows = min(rows, len(ids) // (length - 1))
    if not rows:
        raise InputError(f"expected at least {length - 1} tokens of ordinary text, got {len(ids)}; give a longer file to --text.")
    return torch.tensor([[2] + ids[i * (length - 1):(i + 1) * (length - 1)] for i in range(rows)], device=device), name


@torch.no_grad()
def perplexity(network, ids):
    """exp of the mean cross-entropy of ids (rows, T) under network(ids) -> logits (B, T, V); <bos> is given."""
    total = 0.0
    for part in ids.split(2):                                      # few rows at once: logits are the largest tensor of all
        total += F.cross_entropy(network(part)[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / ids[:, 1:].numel())


# ---------------------------------------------------------------------------------------------------------- the bench

class Bench:
    """Measures one model. Each part is a method that yields (label, job) pairs; the jobs write into `result`."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.words = open_vocabulary(model.tokenizer)
        self.result, self.kept = {}, {}

    def world(self, split, *purpose, phrasings=None):
        """A World of its own for every purpose, so that leaving out one part changes no other."""
        return World(split, zlib.crc32(repr((self.args.seed, split, *purpose)).encode()), self.words, phrasings)

    def ask(self, cell, **options):
        return ask(self.model, cell, self.args.batch, **options)

    @property
    def threshold(self):
        return threshold_of(self.model)

    def drawn(self, N, kind, phrasings=None):
        """A cell: its memories, a list of (facts, asked), and the replies to all questions in order.

        Lookups are kept, because the controls ask them again.
        """
        if (N, kind, phrasings) in self.kept:
            return self.kept[N, kind, phrasings]
        if hasattr(self.model, "taught"):                          # what was trained in: questions as in training, and in words that it never saw
            asked = self.model.taught()["train" if phrasings else "held_out"][:4 * self.args.questions]
            return None, self.ask([(None, [{"support": [], "kind": kind, **q} for q in asked])])
        cell = list(memories(self.world("test", N, kind, phrasings=phrasings), N, kind, self.args.questions))
        replies = self.ask([(remember(self.model, facts), asked) for facts, asked in cell])
        if kind == "lookup" and not phrasings:
            self.kept[N, kind, phrasings] = cell, replies
        return cell, replies

    # -- recall

    def recall(self):
        rows = self.result["recall"] = []
        if hasattr(self.model, "taught"):
            for phrasings in (None, "train"):
                yield f"what was trained in{', as in training' if phrasings else ''}", self.recall_job(rows, self.model.config.known, "lookup", phrasings)
            return
        for N in self.args.sizes:
            for kind, phrasings in [(kind, None) for kind in ANSWERABLE] + [("lookup", "train")]:
                if N >= FEWEST_FACTS[kind]:
                    yield f"{N} facts, {kind}{' as in training' if phrasings else ''}", self.recall_job(rows, N, kind, phrasings)

    def recall_job(self, rows, N, kind, phrasings):
        def job():
            _, replies = self.drawn(N, kind, phrasings)
            row = dict(facts=N, kind=kind, phrasings=phrasings or "test", **summary(replies, self.threshold))
            if kind == "lookup" and not phrasings:
                lengths = [len(self.model.tokenizer.encode(" " + r.asked["answer"], bos=False)) for r in replies]
                row["by_tokens"] = [dict(tokens=[low, high], **share(sum(r.right for r in of), len(of))) for low, high in TOKENS
                                    for of in [[r for r, n in zip(replies, lengths) if low <= n <= high]]]
                row["misses"] = [dict(question=r.asked["question"], expected=r.asked["answer"], said=r.said, null=round(r.null, 3),
                                      found=r.first) for r in replies if not r.right][:20]
            rows.append(row)
        return job

    # -- refusal

    def nulls(self, split, N, questions, **options):
        """Replies to a mix of answerable and unanswerable questions: (answerable, unanswerable)."""
        cell = [(remember(self.model, facts), asked) for facts, asked in mixed(self.world(split, "mixed", N), N, questions)]
        known = self.ask([(view, [q for q in asked if q["support"]]) for view, asked in cell], **options)
        unknown = self.ask([(view, [q for q in asked if not q["support"]]) for view, asked in cell], max_new_tokens=1)
        return known, unknown

    def refusal(self):
        self.result["refusal"] = dict(threshold=self.threshold, rows=[])
        yield "a threshold, on validation data", self.choose
        for N in self.args.sizes:
            yield f"{N} facts, a fifth of the questions unanswerable", lambda N=N: self.refuse(N)

    def choose(self):
        """On validation people and values, at 16 and 100 facts together."""
        known, unknown = [], []
        for N in sorted({min(n, max(self.args.sizes)) for n in (16, 100)}):
            more = self.nulls("validation", N, 2 * self.args.questions, max_new_tokens=1)
            known, unknown = known + [r.null for r in more[0]], unknown + [r.null for r in more[1]]
        chosen = round(choose_threshold(known, unknown), 6)
        self.result["refusal"].update(chosen=chosen, validation=dict(refusals(known, unknown, chosen), curve=curve(known, unknown)))
        if self.args.set_threshold:
            set_threshold(SHIPPED.get(self.args.model, self.args.model), chosen)
            self.model.config.null_threshold = self.result["refusal"]["threshold"] = chosen

    def refuse(self, N):
        known, unknown = self.nulls("test", N, 2 * self.args.questions)
        nulls = [r.null for r in known], [r.null for r in unknown]
        row = dict(facts=N, known=len(known), unknown=len(unknown), curve=curve(*nulls))
        for name, threshold in (("saved", self.threshold), ("chosen", self.result["refusal"]["chosen"])):
            row[name] = dict(refusals(*nulls, threshold), right=share(sum(r.right and r.null <= threshold for r in known), len(known)),
                             by_sort={sort: share(sum(r.null > threshold for r in of), len(of)) for sort in ("near", "unknown", "world")
                                      for of in [[r for r in unknown if r.asked["sort"] == sort]]})
        self.result["refusal"]["rows"].append(row)

    # -- edits

    def edits(self):
        self.result["edits"] = []
        for N in [n for n in (16, 100) if n <= max(self.args.sizes)] or [max(self.args.sizes)]:
            yield f"{N} facts, some told again", lambda N=N: self.told_again(N)
            yield f"{N} facts, some forgotten", lambda N=N: self.forgotten(N)
        N = min(100, max(self.args.sizes))
        for replace in (True, False):
            yield f"{self.args.edits} edits of {N} facts, {'replaced' if replace else 'told again'}", lambda r=replace: self.many_edits(N, r)

    def told_again(self, N):
        """Store what was told before an update, ask; then tell the update, ask again."""
        before, after = [], []
        for facts, asked in memories(self.world("test", "again", N), N, "update", self.args.questions):
            later = sorted({q["support"][-1] for q in asked})
            earlier = [i for i in range(N) if i not in later]
            before.append((remember(self.model, [facts[i] for i in earlier]), asked))
            self.model.add_to_memory([facts[i] for i in later])
            row = {i: row for row, i in enumerate([*earlier, *later])}
            after.append((snapshot(self.model), [{**q, "support": [row[i] for i in q["support"]]} for q in asked]))
        before, after = self.ask(before), self.ask(after)
        changed = [(b, a) for b, a in zip(before, after) if not b.right]
        self.result["edits"].append(dict(
            what="told again", facts=N, **summary(after, self.threshold),
            unchanged=share(sum(b.said == a.said and a.null <= self.threshold for b, a in changed), len(changed))))

    def forgotten(self, N):
        """Ask, forget every second of the facts that were asked for, ask again. Of those it had known before."""
        before, after, asked_of_gone = [], [], []
        for facts, asked in memories(self.world("test", "forget", N), N, "lookup", 2 * self.args.questions):
            before.append((remember(self.model, facts), asked))
            gone = sorted({q["support"][0] for q in asked})[::2]
            for i in gone if len(gone) < N else ():
                self.model.forget(self.model.memory_graph.ids[i - sum(g < i for g in gone)])
            after.append((snapshot(self.model), asked))
            asked_of_gone += [q["support"][0] in gone for q in asked]
        known = [(a, was) for b, a, was in zip(self.ask(before), self.ask(after), asked_of_gone)
                 if b.right and b.null <= self.threshold]
        pairs, kept = [a for a, was in known if was], [a for a, was in known if not was]
        count = lambda test, of: share(sum(map(test, of)), len(of))
        refused = lambda r: r.null > self.threshold
        self.result["edits"].append(dict(
            what="forgotten", facts=N, gone=count(lambda r: refused(r) or not r.right, pairs), refused=count(refused, pairs),
            others_kept=count(lambda r: r.right and not refused(r), kept)))

    def many_edits(self, N, replace):
        """A row of single edits: a fact gets a new value, either in place of the old one or told after it.

        Every fourth of the facts that are asked for is never edited. What is retained at the end is counted as in the literature on
        editing (https://arxiv.org/abs/2211.11031): of what was answered right after its last edit, how much still is.
        """
        world = self.world("test", "edits", N, replace)
        facts, asked = world.memory(N, 4 * N, "lookup")
        values = sorted({q["answer"] for q in world.memory(4 * N, 4 * N, "lookup")[1]} - {q["answer"] for q in asked})
        before = self.ask([(remember(self.model, facts), asked)])
        texts, ids = list(facts), [[i] for i in self.model.memory_graph.ids]
        questions = [dict(q) for q in asked]
        can = sorted({q["support"][0] for q in asked if facts[q["support"][0]].count(q["answer"]) == 1})
        can, edited, latest = [f for i, f in enumerate(can) if i % 4], set(), {}
        if not can or not values:
            raise InputError(f"expected facts to edit among {N}, got none; raise --sizes.")
        pick = lambda items: items[int(world.random() * len(items))]
        for _ in range(self.args.edits):
            fact, value = pick(can), pick(values)
            old = pick([q["answer"] for q in questions if q["support"][0] == fact])
            if texts[fact].count(old) != 1 or value in texts[fact]:
                continue
            texts[fact] = texts[fact].replace(old, value)
            if replace:
                for episode in ids[fact]:
                    self.model.forget(episode)
                ids[fact] = []
            ids[fact].append(self.model.add_to_memory(texts[fact]))
            for q in questions:
                if q["support"][0] == fact and q["answer"] == old:
                    q["answer"] = value
            edited.add(fact)
            row = {episode: i for i, episode in enumerate(self.model.memory_graph.ids)}
            latest[fact] = snapshot(self.model), [{**q, "support": [row[ids[fact][-1]]]} for q in questions if q["support"][0] == fact]
        row = {episode: i for i, episode in enumerate(self.model.memory_graph.ids)}
        after = self.ask([(snapshot(self.model), [{**q, "support": [row[ids[q["support"][0]][-1]]]} for q in questions])])
        at_once = iter(self.ask(list(latest.values())))
        at_once = {(fact, q["question"]): next(at_once) for fact, (_, asked_then) in latest.items() for q in asked_then}
        good = lambda r: r.right and r.null <= self.threshold
        part = lambda replies, mine: share(sum(good(r) for r, q in zip(replies, questions) if mine(q)),
                                           sum(mine(q) for q in questions))
        was_edited = lambda q: q["support"][0] in edited
        known = [r for r, q in zip(after, questions) if was_edited(q) and good(at_once[q["support"][0], q["question"]])]
        self.result["edits"].append(dict(
            what="replaced, many times" if replace else "told again, many times", facts=N, edits=self.args.edits,
            facts_at_the_end=len(self.model.memory_graph), before=part(before, was_edited), edited=part(after, was_edited), retained=share(sum(map(good, known)), len(known)),
            untouched_before=part(before, lambda q: not was_edited(q)), untouched=part(after, lambda q: not was_edited(q))))

    # -- locality

    def locality(self):
        self.result["locality"] = dict(rows=[])
        for N in (0, 100, 1000) if not self.args.quick else (0, 100):
            yield f"ordinary text, {N} facts", lambda N=N: self.ordinary(N)

    def ordinary(self, N):
        model, args, result = self.model, self.args, self.result["locality"]
        if not N:
            length = min(256 if not args.quick else 64, model.gemma.config.max_position_embeddings)
            self.text, result["text"] = ordinary_text(model, 4 if args.quick else 16 if model.gemma.device.type == "cpu" else 128,
                                                      length, args.text, args.seed)
            result.update(tokens=self.text[:, 1:].numel(), base=perplexity(model.gemma, self.text))
        facts = self.world("test", "locality", N).memory(N, 1)[0] if N else []
        model.clear_memory()
        model.add_to_memory(facts)
        value = perplexity(model.forward, self.text)
        result["rows"].append(dict(facts=N, perplexity=value, change=value / result["base"] - 1))

    # -- controls

    def controls(self):
        self.result["controls"] = []
        for N in self.args.sizes:
            for method in METHODS:
                yield f"{N} facts, {method}", lambda N=N, method=method: self.control(N, method)

    def control(self, N, method):
        """The lookups of the recall table, answered in another way."""
        cell, replies = self.drawn(N, "lookup")
        row = dict(facts=N, method=method)
        if method == MEMORY:
            pairs = [(r.said if r.null <= self.threshold else "", r.asked["answer"]) for r in replies]
        elif method == OTHER:
            pairs = self.other(N, cell)
        else:
            pairs = self.prompted(N, method, cell, row)
        row.update(recall=None, kindly=None) if pairs is None else row.update(
            recall=share(sum(said == truth for said, truth in pairs), len(pairs)),
            kindly=share(sum(loosely(said) == loosely(truth) for said, truth in pairs), len(pairs)))
        self.result["controls"].append(row)

    def other(self, N, cell):
        """The memory of the next example instead; 64 questions will do."""
        facts = [facts for facts, _ in cell[1:]] + [self.world("test", "other", N).memory(N, 1)[0]]
        exchanged = []
        for (_, asked), facts in zip(cell, facts):
            exchanged.append((remember(self.model, facts), asked))
            if sum(len(asked) for _, asked in exchanged) >= 64:
                break
        return [(r.said, r.asked["answer"]) for r in self.ask(exchanged)]

    def prompted(self, N, method, cell, row):
        """The bare base with facts in its prompt: (said, truth) pairs, or None where the prompt is too long."""
        model, lines = self.model, lambda facts: "".join(f"{fact}\n" for fact in facts)
        shots = examples(self.world("train", "examples")) if method in (ALL_SHOTS, SEARCHED, RIGHT_SHOTS) else ""
        how = self.best_search(cell, row) if method == SEARCHED else None
        groups = []                                                # of (prompt, truth) pairs
        for facts, asked in cell:
            questions = [q["question"] for q in asked]
            if method in (ALL, ALL_SHOTS):
                contexts = [lines(facts)] * len(asked)
            elif method == SEARCHED:
                contexts = [lines(facts[i] for i in sorted(best)) for best in search(model, facts, questions, how)]
            else:
                contexts = [lines(facts[i] for i in q["support"]) if method != NOTHING else "" for q in asked]
            groups.append([(prompt_with(model, q["question"], shots + context), q["answer"]) for q, context in zip(asked, contexts)])
        if method not in (ALL, ALL_SHOTS) or N <= (16 if model.gemma.device.type == "cuda" else 4):
            groups = [sum(groups, [])]                             # short prompts: no need to go memory by memory
        longest = max(len(model.tokenizer.encode(truth, bos=False)) for group in groups for _, truth in group)
        limit = min(self.args.prompt_tokens, model.gemma.config.max_position_embeddings) - room_for(longest)
        row["prompt_tokens"] = max(len(prompt) for group in groups for prompt, _ in group)
        if row["prompt_tokens"] > limit:
            return None
        return [(said, truth) for group in groups for said, (_, truth) in
                zip(complete(model, [prompt for prompt, _ in group], room_for(longest), self.args.batch), group)]

    def best_search(self, cell, row):
        """Which of the two plain searches finds more; both are noted in the row."""
        hows = ("embedding", "hidden") if self.model.variant == "graph" else ("embedding",)    # the layer of `hidden` is the graph's
        for how in hows:
            hits = [[q["support"][0] in best[:k] for k in (1, FOUND)] for facts, asked in cell
                    for q, best in zip(asked, search(self.model, facts, [q["question"] for q in asked], how))]
            row[f"found_by_{how}"] = dict(first=share(sum(h[0] for h in hits), len(hits)), five=share(sum(h[1] for h in hits), len(hits)))
        return max(hows, key=lambda how: row[f"found_by_{how}"]["five"]["share"])

    def run(self):
        """Everything that --only asks for. Returns the result, which can be written as JSON."""
        started = time.time()
        jobs = []
        # The threshold comes first, because everything else is judged with it.
        for part in sorted(self.args.only, key=lambda part: (part != "refusal", PARTS.index(part))):
            jobs += [(part, label, job) for label, job in getattr(self, part)()]
        with tqdm(jobs, unit="cell", file=sys.stderr, dynamic_ncols=True) as bar:
            for part, label, job in bar:
                bar.set_description(f"{part}: {label}")
                before = time.time()
                job()
                self.result.setdefault("seconds", {}).setdefault(part, 0.0)
                self.result["seconds"][part] = round(self.result["seconds"][part] + time.time() - before, 1)
        self.result["seconds"]["total"] = round(time.time() - started, 1)
        return self.result


# ------------------------------------------------------------------------------------------------------------- report

def report(result):
    """The result as Markdown: str."""
    blocks = []
    if rows := result.get("recall"):
        at = {(r["facts"], r["kind"], r["phrasings"]): r for r in rows}
        sizes = sorted({r["facts"] for r in rows})
        cell = lambda N, kind, phrasings, what, interval=False: \
            percent(at[N, kind, phrasings][what], interval) if (N, kind, phrasings) in at else "–"
        blocks += ["Recall, exact match in %; a refusal counts as wrong", table(
            ["facts", "lookup", "lookup, trained phrasings", *ANSWERABLE[1:]],
            [[f"{N:,}", cell(N, "lookup", "test", "recall", True), cell(N, "lookup", "train", "recall", True),
              *(cell(N, kind, "test", "recall", True) for kind in ANSWERABLE[1:])] for N in sizes])]
        blocks += ["The same if it never refused, and how many it refuses", table(
            ["facts", "lookup", "trained phrasings", *ANSWERABLE[1:], "lookups refused"],
            [[f"{N:,}", cell(N, "lookup", "test", "unrefused"), cell(N, "lookup", "train", "unrefused"),
              *(cell(N, kind, "test", "unrefused") for kind in ANSWERABLE[1:]), cell(N, "lookup", "test", "refused")] for N in sizes])]
        blocks += ["Right episode first / in the first five, %", table(
            ["facts", "lookup", "trained phrasings", *ANSWERABLE[1:]],
            [[f"{N:,}"] + [f"{cell(N, *key, 'first')} / {cell(N, *key, 'five')}" for key in
                           (("lookup", "test"), ("lookup", "train"), *((kind, "test") for kind in ANSWERABLE[1:]))] for N in sizes])]
        name = lambda low, high: f"{low}" if low == high else f"{low}–{high}" if high < 99 else f"{low} and more"
        blocks += ["Lookups by number of tokens in the answer, % (how many)", table(
            ["facts", *(name(*pair) for pair in TOKENS)],
            [[f"{N:,}"] + [f"{percent(b)} ({b['n']})" for b in at[N, "lookup", "test"]["by_tokens"]] for N in sizes])]
    if refusal := result.get("refusal"):
        blocks += [f"Refusal with a fifth of the questions unanswerable, %; threshold {refusal['threshold']:.3f} is saved, "
                   f"{refusal['chosen']:.3f} chosen on validation data" + (" and now saved" if refusal["threshold"] == refusal["chosen"] else ""),
                   table(["facts", "threshold", "precision", "recall", "near", "unknown", "world", "answerable and right"],
                         [[f"{r['facts']:,}", name, percent(r[name]["precision"], True), percent(r[name]["recall"], True),
                           *(percent(r[name]["by_sort"][s]) for s in ("near", "unknown", "world")), percent(r[name]["right"])]
                          for r in refusal["rows"] for name in ("saved", "chosen")])]
        blocks += ["Precision / recall of refusal over the threshold, %", table(
            ["threshold", *(f"{r['facts']:,} facts" for r in refusal["rows"])],
            [[f"{t:g}", *(f"{percent(r['curve'][i]['precision'])} / {percent(r['curve'][i]['recall'])}" for r in refusal["rows"])]
             for i, t in enumerate(GRID) if i % 2 == 0])]
    if edits := result.get("edits"):
        lines = []
        for e in edits:
            if e["what"] == "told again":
                said = f"new value {percent(e['recall'], True)}, still the old answer {percent(e['unchanged'])}"
            elif e["what"] == "forgotten":
                said = (f"refused or answered otherwise {percent(e['gone'], True)}, refused {percent(e['refused'])}, "
                        f"other facts kept {percent(e['others_kept'])}")
            else:
                said = (f"{e['edits']:,} edits, latest value {percent(e['edited'], True)} (before any edit {percent(e['before'])}), "
                        f"retained {percent(e['retained'], True)} of what was right after its last edit, "
                        f"untouched facts {percent(e['untouched'])} (before {percent(e['untouched_before'])}), "
                        f"{e['facts_at_the_end']:,} facts at the end")
            lines.append([e["what"], f"{e['facts']:,}", said])
        blocks += ["Edits, %", table(["edit", "facts", "then"], lines, left=3)]
    if locality := result.get("locality"):
        blocks += [f"Perplexity on {locality['tokens']:,} tokens of {locality['text']}", table(
            ["facts in memory", "perplexity", "change"],
            [["bare base", f"{locality['base']:.4f}", ""]] +
            [[f"{r['facts']:,}", f"{r['perplexity']:.4f}", f"{r['change']:+.2%}"] for r in locality["rows"]])]
    if controls := result.get("controls"):
        at = {(r["facts"], r["method"]): r for r in controls}
        sizes = sorted({r["facts"] for r in controls})
        blocks += ["The same lookups answered in other ways, exact match in % (in brackets: ignoring case, quotes and a full stop; "
                   "– where the prompt is too long)", table(
                       ["method", *(f"{N:,} facts" for N in sizes)],
                       [[method] + [f"{percent(r['recall'])} ({percent(r['kindly'])})" if (r := at[N, method])["recall"] else "–" for N in sizes]
                        for method in METHODS])]
        found = [at[N, SEARCHED] for N in sizes]
        blocks += ["Embedding search: right fact first / in the first five, %", table(
            ["mean of", *(f"{N:,} facts" for N in sizes)],
            [[how] + [f"{percent(r[f'found_by_{how}']['first'])} / {percent(r[f'found_by_{how}']['five'])}" for r in found]
             for how in ("embedding", "hidden") if all(f"found_by_{how}" in r for r in found)])]
    return "\n\n".join(blocks)


def plot(result, path):
    """recall.png: recall against number of facts, one line a method, and one a kind. False if there is nothing to draw with."""
    kinds = {}
    for r in (r for r in result.get("recall", []) if r["recall"]["n"]):
        kinds.setdefault("trained phrasings" if r["phrasings"] == "train" else r["kind"], []).append((r["facts"], r["recall"]))
    methods = {}
    for r in result.get("controls", []):
        if r["recall"] and r["recall"]["n"]:
            methods.setdefault(r["method"], []).append((r["facts"], r["recall"]))
    methods = methods or {MEMORY: kinds["lookup"]} if "lookup" in kinds else methods
    panels = [(title, lines) for title, lines in (("lookup, by method", methods), ("memory, by kind of question", kinds)) if any(lines.values())]
    pyplot = plotting() if panels else None
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels):
        for name, points in lines.items():
            x, shares = zip(*sorted(points, key=lambda p: p[0]))
            line, = axis.plot(x, [100 * s["share"] for s in shares], marker="o", label=name, linewidth=2.4 if name == MEMORY else 1.4)
            axis.fill_between(x, [100 * s["low"] for s in shares], [100 * s["high"] for s in shares], color=line.get_color(), alpha=0.12, linewidth=0)
        ticks = sorted({N for points in lines.values() for N, _ in points})
        axis.set(xscale="log", title=title, xlabel="facts in memory", ylim=(-2, 102))
        axis.set_xticks(ticks, [f"{N:,}" for N in ticks], rotation=45)
        axis.minorticks_off()
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2)
    axes[0, 0].set_ylabel("exact match, %")
    save_figure(figure, path)
    pyplot.close(figure)
    return True


# --------------------------------------------------------------------------------------------------- the command line

def parse_arguments(arguments):
    parser = Parser(prog="python -m bench.recall", description="Measure what a memory returns of what was put into it.",
                    epilog="example: python -m bench.recall --model gemma-3-270m --device cuda --out out/recall-270m")
    parser.add_argument("--model", default="tiny", help="tiny, gemma-3-270m, or a folder that train.py wrote (default tiny)")
    parser.add_argument("--base", help="another place to find the base: a folder or a Hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, help="folder for recall.json and recall.png (default out/recall-MODEL)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    parser.add_argument("--only", type=some_of(PARTS), default=list(PARTS), metavar="PART,…", help=f"of {','.join(PARTS)} (default all)")
    parser.add_argument("--sizes", type=numbers(2), metavar="N,…", help=f"numbers of facts, from 2 (default {','.join(map(str, SIZES))}; with --quick 4,16,64)")
    parser.add_argument("--questions", type=int, help="at least so many a cell (default 256, with --quick 32)")
    parser.add_argument("--edits", type=int, help="in a row of edits (default 1000, with --quick 50)")
    parser.add_argument("--batch", type=int, help="questions asked at once (default 256 on a GPU, 64 otherwise)")
    parser.add_argument("--prompt-tokens", type=int, help="leave out controls with longer prompts, to save time (default 32768 on a GPU, "
                                                          "4096 otherwise); they end where the base's context ends anyway")
    parser.add_argument("--text", default="", help="ordinary text for the perplexity: docstrings, sampled (the base writes it), or a UTF-8 "
                                                   "file (default: sampled for a vocabulary under 32768, else docstrings)")
    parser.add_argument("--set-threshold", action="store_true", help="write the threshold chosen on validation data into the memory's folder")
    parser.add_argument("--quick", action="store_true", help="few questions and small memories: a look, not a measurement")
    args = parser.parse_args(arguments)
    gpu = str(args.device).startswith("cuda")
    for name, quick, default in (("sizes", [4, 16, 64], list(SIZES)), ("questions", 32, 256), ("edits", 50, 1000),
                                 ("batch", 256 if gpu else 64, 256 if gpu else 64), ("prompt_tokens", 32768 if gpu else 4096, 32768 if gpu else 4096)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else default)
        elif name != "sizes" and getattr(args, name) < 1:
            raise InputError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(args, name)}.")
    if args.set_threshold and "refusal" not in args.only:
        raise InputError("expected 'refusal' among --only, because --set-threshold chooses the threshold there; add it.")
    if args.text not in ("", "docstrings", "sampled") and not Path(args.text).is_file():
        raise InputError(f"expected --text to be docstrings, sampled or a UTF-8 file, got {args.text!r}, which is no file.")
    args.out = out_folder(args.out, "recall", args.model)
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    check_device(args.device)
    model = variants.load(args.model, args.base, device=args.device)
    if not model.told and args.only != ["recall"]:
        raise InputError(f"expected --only recall for the variant {model.variant}, to which nothing can be told, got {','.join(args.only)}.")
    head = dict(command="python -m bench.recall " + " ".join(sys.argv[1:] if arguments is None else arguments), model=args.model,
                commit=commit(), hardware=hardware(args.device), seed=args.seed, questions=args.questions, trained=model.trained)
    result = {**head, **Bench(model, args).run()}
    text = f"{result['command']}\n{result['hardware']}, commit {result['commit']}, {result['seconds']['total']:.0f} s\n\n{report(result)}"
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "recall.json", result)
    drawn = plot(result, args.out / "recall.png")
    print(text)
    print(f"saved {args.out}/recall.json{' and recall.png' if drawn else ''}", file=sys.stderr)
    return result


if __name__ == "__main__":
    run(main)
