"""Train a memory on a frozen Gemma:  python train.py            (the tiny model, CPU, a few minutes)
                                      python train.py --model google/gemma-3-1b-it --out out/1b
                                      python train.py --config variants/configs/prefix.json      (another design, see variants/)
                                      torchrun --nproc_per_node=4 train.py --accumulate 4 …      (one process a GPU)

Everything below the injection layer is frozen, so its output never changes: a large *pool* of sentences, questions and
ordinary text is run through layers 1..8 once (extras/pool.py), and every training step draws memories and questions from it.
A step then runs the graph network, the injection and the layers above, forward and backward, with logits at answer positions
only. The loop is the same for every design; what a step and an evaluation are, its Lesson says.

A batch is G memories of up to N episodes with R / G questions each; nothing loops over it. Five losses:
  * cross-entropy on the answer's tokens,
  * retrieval: minus the log of the attention on the episodes that hold the answer, or on the null episode where none does,
  * copying: minus the log of the attention on the tokens, inside those episodes, that the answer goes on with,
  * judging: the same as retrieval, for what the reader alone makes of the few episodes that it has read,
  * marking: minus the log of the probability of where, in those episodes, the answer begins and ends.
With `--pairs` the last two, and retrieval, also count more questions, each with a memory of two sentences that belong together.

Letters as in memory.py, and P bundles of the pool (a bundle is a few sentences that belong together, see data_gen.py).
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import extras.threads  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import distributed
from tqdm import tqdm

import variants
from extras.checkpoint import check_init, clear_halves, load_checkpoint, save_checkpoint, set_aside
from extras.pool import TEXT, Pool, answer_tokens, autocast, groups, judged, pools as draw_pools, summary, wanted  # noqa: F401
from extras.settings import read_settings
from gemma import InputError, Places, check_device, replacing
from gnn import TokenLayer, by_length
from memory import GemmaWithMemory, MemoryView, Question, TokenStore


@dataclass
class TrainConfig:
    """How to train; each field is an option of the command line."""

    variant: str = field(default="graph", metadata={"help": f"the design of the memory: {', '.join(variants.NAMES)}"})
    model: str = field(default="tiny", metadata={"help": "the base: tiny, gemma-3-270m, a folder, or a Hub id"})
    out: str = field(default="out/memory", metadata={"help": "folder for the trained memory, its checkpoint and log; an earlier run's is renamed, to out/memory-1 say"})
    steps: int = field(default=360, metadata={"help": "optimizer steps"})
    minutes: float = field(default=0.0, metadata={"help": "end after so many minutes of training if the steps are not done by then; 0: never"})
    batch: int = field(default=64, metadata={"help": "R: questions a batch; a step has --accumulate of these"})
    accumulate: int = field(default=1, metadata={"help": "batches whose gradients are added up to one step; several processes share them out"})
    bundles: int = field(default=4000, metadata={"help": "P: bundles of sentences and questions in the pool"})
    facts: int = field(default=16, metadata={"help": "the largest memory in training; memories grow up to it"})
    first_facts: int = field(default=8, metadata={"help": "the memories that training begins with; some designs learn nothing at first of larger ones"})
    lr: float = field(default=2e-3, metadata={"help": "highest learning rate of AdamW"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW, on matrices"})
    warmup: int = field(default=50, metadata={"help": "steps of linear warm-up; cosine decay follows"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    retrieval: float = field(default=0.3, metadata={"help": "weight of the retrieval loss"})
    copying: float = field(default=0.5, metadata={"help": "weight of the copying loss"})
    judging: float = field(default=0.3, metadata={"help": "weight of the judging loss"})
    marking: float = field(default=0.3, metadata={"help": "weight of the marking loss"})
    pairs: int = field(default=0, metadata={"help": "more questions a batch, each with a memory of two sentences of its own bundle, for the losses of reading alone"})
    unknown: float = field(default=0.1, metadata={"help": "share of questions about somebody the memory never heard of"})
    text: float = field(default=0.06, metadata={"help": "share of rows that are ordinary text, for which the memory is to be silent"})
    hard: float = field(default=1.0, metadata={"help": "how often a question is drawn on an update, a list, one of several values of a sentence, or what was not told, against an easier one"})
    tokens: int = field(default=40, metadata={"help": "T: longest question with its answer, longer ones are left out; sentences may be 1.6 times as long"})
    open_words: bool = field(default=True, metadata={"help": "values from the whole vocabulary; without them the memory learns to classify, not to copy"})
    eval_every: int = field(default=200, metadata={"help": "steps between evaluations on held-out people and values"})
    patience: int = field(default=0, metadata={"help": "end after so many evaluations without a better one; 0: never"})
    seed: int = field(default=0, metadata={"help": "of every random draw"})
    device: str = field(default="", metadata={"help": "cpu, cuda, mps; default: a GPU if there is one"})
    workers: int = field(default=0, metadata={"help": "processes that draw the pool's sentences; 0: this one"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the layers above the injection, and those of the memory"})
    deterministic: bool = field(default=False, metadata={"help": "the same bits at every run on the same machine; slower on a GPU"})
    init: str = field(default="", metadata={"help": "folder of a trained memory to start from, with a fresh optimizer; default: from nothing"})
    resume: bool = field(default=False, metadata={"help": "go on from the checkpoint in --out"})

    def check(self):
        """Raise InputError for settings that can't be trained with."""
        variants.check_name(self.variant)
        for name, least in dict(steps=1, batch=8, bundles=1, facts=8, first_facts=1, pairs=0, eval_every=1, tokens=16, workers=0, warmup=0, patience=0, minutes=0,
                                lr=0, weight_decay=0, clip=0, retrieval=0, copying=0, judging=0, marking=0, unknown=0, text=0).items():
            if not getattr(self, name) >= least:
                raise InputError(f"expected --{name.replace('_', '-')} of at least {least}, got {getattr(self, name)}.")
        for name, least, most in (("hard", 0.001, 1000), ("lr", 0, 1000), ("tokens", 16, 4096), ("seed", -10 ** 10, 10 ** 10), ("accumulate", 1, 64)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"expected --{name} from {least} to {most}, got {getattr(self, name)}.")
        if self.accumulate % processes():
            raise InputError(f"expected --accumulate to be a multiple of the {processes()} processes, which share these batches out, got {self.accumulate}.")
        if self.deterministic and self.minutes:
            raise InputError(f"expected --deterministic with --steps alone, got --minutes {self.minutes}: what depends on the clock comes out differently each time.")
        if self.unknown + self.text > 1:
            raise InputError(f"expected --unknown and --text to be shares of the questions, got {self.unknown} and {self.text}.")
        out = Path(self.out)
        if out.exists() and not out.is_dir():
            raise InputError(f"expected a folder as --out, got the file {out}; name another.")
        if self.init and not (Path(self.init) / "memory.json").is_file():
            raise InputError(f"expected a folder that save_pretrained wrote as --init, got {self.init!r}, which holds no memory.json.")
        if self.init and Path(self.init).resolve().is_relative_to(out.resolve()):
            raise InputError(f"expected --init to lie outside of --out, whose earlier run is renamed, got {self.init} in {self.out}; name another --out.")
        if self.resume and not (out / "checkpoint.safetensors").is_file():
            raise InputError(f"{out}: expected a checkpoint to resume from, but there is none; train without --resume first.")


def processes():
    """How many processes train together: what torchrun says, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------------------------------------ step

def memories(model, pool, batch):
    """The MemoryView of a drawn batch: keys with gradient, from the pool's node features."""
    injection, valid = model.injection, batch["valid"]
    G, N = valid.shape
    facts = batch["episodes"].flatten()
    x = pool.nodes[facts]                                                                      # (G * N, D)
    # The tokens of these episodes alone, end to end: their keys are worked out once, however many questions read them.
    lengths = pool.facts.lengths[facts]
    owner = torch.arange(G * N, device=x.device).repeat_interleave(lengths)
    place = pool.facts.starts[facts][owner] + torch.arange(len(owner), device=x.device) - (lengths.cumsum(0) - lengths)[owner]
    ids = pool.facts.ids[place]
    tokens = TokenStore(ids, injection.token_keys(ids, pool.facts.keys[place], lengths), lengths)
    return MemoryView(injection.gnn.keys(x, *injection.edges(valid)).unflatten(0, (G, N)), x.view(G, N, -1),
                      valid, torch.arange(G * N, device=x.device).view(G, N), tokens)


def read(model, pool, batch, T):
    """What the questions of a drawn batch find in their memories: (Asked, states h (R, T, D) after the injection layer's own, Reading)."""
    injection, asked = model.injection, pool.questions(batch, T)
    h = pool.sequences.keys[asked.place].masked_fill(~asked.real[..., None], 0.0)
    x = injection.features(asked.ids, h)
    question = Question(x[:, :asked.longest], asked.question[:, :asked.longest], asked.ids[:, :asked.longest])
    return asked, h, injection.read(x, question, memories(model, pool, batch), ids=asked.ids)


def forward(model, pool, batch, T, silent=False):
    """One batch through graph, injection and the layers above. Returns what losses and scores are made of.

    silent: nothing of what was read is added, the base answers alone."""
    gemma, injection, after = model.gemma, model.injection, model.config.inject_after
    asked, h, reading = read(model, pool, batch, T)
    h = h if silent else injection.inject(h, reading.context, ~asked.spoken)
    h = run_above(gemma, h, asked.real, after) if after < len(gemma.layers) else h
    return dict(asked.answers(gemma, h), reading=reading, spoken=asked.spoken, answering=asked.answering)


def run_above(gemma, h, real, after):
    """The layers above `after`, on rows h (R, T, D) that are padded on the right; those of about the same length together."""
    T, parts, out = h.shape[1], by_length(real.sum(1), 3, h.shape[1]), []
    order = torch.cat([rows for rows, _ in parts])
    for part, (rows, width) in zip(h.index_select(0, order).split([len(rows) for rows, _ in parts]), parts):
        places = Places(gemma.config, len(rows), width, real[rows, :width], None, h.device)
        out.append(F.pad(gemma.run_layers(part[:, :width].clone(), places, after + 1), (0, 0, 0, T - width)))
    return torch.cat(out).index_select(0, order.argsort())


def among(target, rows):
    """Which of some episodes are wanted, and whether null is: target (R, N + 1), null last, rows (R, k) -> (R, k + 1)."""
    return torch.cat((target[:, :-1].gather(1, rows), target[:, -1:]), 1)


def retrieval_loss(batch, out, hops):
    """- log attention on what should be attended to, mean over heads and hops: (over all episodes, over the candidates
    compared word by word, at answer positions of the last hop). The right episode may be missing among the candidates: then only the first counts."""
    reading, is_text = out["reading"], (batch["kind"] == TEXT)[:, None]
    at_prompt = 0.0
    for hop in range(hops):
        asked = reading.asked[hop]                                                             # (R, H, N + 1)
        target = wanted(batch, hop, hops, asked.shape[-1] - 1)
        at_prompt = at_prompt - asked.masked_fill(~target[:, None], -torch.inf).logsumexp(-1).mean()
    right = among(target, reading.chosen[hops - 1])                                            # (R, r + 1)
    mass = reading.weights[hops - 1].masked_fill(~right[:, None, None], -1e4).logsumexp(-1).mean(-1)   # (R, T)
    care = torch.where(is_text, out["spoken"], out["answering"]) & right.any(1)[:, None]
    at_answer = -((mass * care).sum(1) / care.sum(1).clamp(min=1)).mean()
    return at_prompt / hops, ranking_loss(batch, reading, hops), at_answer


def ranking_loss(batch, reading, hops):
    """- log attention on what should be attended to, of the candidates, compared word by word and the best of them read, mean over heads and hops."""
    total = 0.0
    for hop in range(hops):
        right = among(wanted(batch, hop, hops, reading.asked[hop].shape[-1] - 1), reading.candidates[hop])     # (R, k + 1)
        mass = reading.ranked[hop].masked_fill(~right[:, None], -1e4).logsumexp(-1).mean(1)    # (R,)
        total = total - (mass * right.any(1)).mean()
    return total / hops


def copying_loss(batch, out, hops):
    """- log of the attention on those tokens of the right episodes that the answer goes on with, mean over heads: each has
    to be right, since the frozen layers above hear their sum and can't tell which of two words was meant.

    After the answer's last word the right one is their end. Where there is none, nothing is counted.
    """
    reading, row, position = out["reading"], out["row"], out["position"]
    target = wanted(batch, hops - 1, hops, reading.asked[-1].shape[-1] - 1)
    right = target.gather(1, reading.chosen[-1])[row]                                          # (n, r)
    hit = (reading.token_ids[row] == out["targets"][:, None, None]) & right[..., None]         # (n, r, M)
    weights = reading.weights[-1][row, position][..., :-1].exp()                               # (n, H, r)
    ends = right & (out["targets"] == reading.end)[:, None]                                    # (n, r)
    inside = (reading.token_weights[row, position].float() * hit[:, None]).sum(-1) + reading.end_weights[row, position].float() * ends[:, None]
    mass = (weights * inside).sum(-1)                                                          # (n, H)
    can = hit.flatten(1).any(1) | ends.any(1)
    return -((mass + 1e-6).log().mean(1) * can).sum() / can.sum().clamp(min=1)


def judging_loss(batch, out, hops):
    """- log of the share that the right episodes among those read, or null, have in what the reader says of them, mean over heads and
    hops. Keys and words find most of what is asked in wordings that training knows, and would leave the reader nothing to learn."""
    reading, total = out["reading"], 0.0
    for hop, fits in enumerate(reading.fits):                                                  # (R, H, r)
        right = among(wanted(batch, hop, hops, reading.asked[hop].shape[-1] - 1), reading.chosen[hop])         # (R, r + 1)
        mass = F.pad(fits, (0, 1)).log_softmax(-1).masked_fill(~right[:, None], -1e4).logsumexp(-1).mean(1)    # (R,)
        total = total - (mass * right.any(1)).sum() / right.any(1).sum().clamp(min=1)
    return total / max(1, len(reading.fits))


def marking_loss(batch, out, hops):
    """- log of the probability that the reader gives to where the answer begins, and where it ends, in each right episode that it
    reads. In the first of two hops, what is marked there is the name that is asked on about."""
    reading, total = out["reading"], 0.0
    for hop, marks in enumerate(reading.marks):                                                # (R, r, M, 2)
        target = wanted(batch, hop, hops, reading.asked[hop].shape[-1] - 1)
        for row, known, places in zip(batch["support"].T, batch["known"].T, batch["marks"].unbind(1)):         # (R,), (R,), (R, 2)
            care = known & (places[:, 0] >= 0) & target.gather(1, row[:, None])[:, 0]
            here = (reading.chosen[hop] == row[:, None]) & care[:, None]                       # (R, r)
            mass = marks.gather(2, places.clamp(0, marks.shape[2] - 1)[:, None, None].expand(-1, marks.shape[1], -1, -1)).sum((2, 3))       # (R, r)
            total = total - (mass * here).sum() / here.sum().clamp(min=1)
    return total / max(1, len(reading.marks))


@torch.no_grad()
def scores(batch, out):
    """Per row: whether the whole answer is right, whether the right episode came first, and the null weight; see `judged`."""
    reading = out["reading"]
    weights = reading.ranked[-1].exp().mean(1)                                                 # (R, k + 1)
    first = reading.candidates[-1].gather(1, weights[:, :-1].argmax(1, keepdim=True))[:, 0]
    return judged(batch, out, first, weights[:, -1])


def evaluate(model, pool, settings, silent=False, **options):
    """What the memory answers of held-out questions, see `summary`. silent: the base alone."""
    model.eval()
    return summary(model, pool, settings, lambda batch: scores(batch, forward(model, pool, batch, settings.tokens, silent)), **options)


class GraphLesson:
    """How the graph memory is trained; every design has such a lesson, see variants/__init__.py."""

    def __init__(self, model, settings, pools=None, progress=True):
        self.model, self.settings = model, settings
        if settings.pairs and not hasattr(model.injection, "marks"):
            raise InputError(f"expected --pairs 0 with a memory whose reader marks no answers, got {settings.pairs}; give it a reader with --reading-layers 1.")
        self.pool, self.held_out = pools or draw_pools(model, settings, progress)
        self.pool.set_statistics(model)
        # Most of a step's work, for --compile.
        self.layers = [*model.gemma.layers[model.config.inject_after:], *(module for module in model.injection.modules() if isinstance(module, TokenLayer))]

    def loss(self, N, generator):
        """One batch with memories of at most N facts -> {"loss": to be minimised, and its parts}, drawn by the generator alone."""
        settings, model = self.settings, self.model
        batch = self.pool.draw(groups(settings.batch, N), settings.batch, N, settings.unknown, settings.text, generator)
        out = forward(model, self.pool, batch, settings.tokens)
        answer_loss = F.cross_entropy(out["logits"].float(), out["targets"])
        retrieval = retrieval_loss(batch, out, model.config.hops)
        copying, judging, marking = (torch.as_tensor(loss(batch, out, model.config.hops)) for loss in (copying_loss, judging_loss, marking_loss))
        if settings.pairs:
            batch = self.pool.pairs(settings.pairs, generator)
            reading = read(model, self.pool, batch, settings.tokens)[2]
            marking, judging = (total + loss(batch, dict(reading=reading), model.config.hops) for total, loss in ((marking, marking_loss), (judging, judging_loss)))
            retrieval = (*retrieval, ranking_loss(batch, reading, model.config.hops))
        return dict(loss=answer_loss + settings.retrieval * sum(retrieval) + settings.copying * copying + settings.judging * judging + settings.marking * marking,
                    answer_loss=answer_loss, retrieval_loss=torch.stack(retrieval), copying_loss=copying, judging_loss=judging, marking_loss=marking)

    def evaluate(self, **options):
        return evaluate(self.model, self.held_out, self.settings, **options)


# ------------------------------------------------------------------------------------------------------------ loop

def schedule(settings, step, seconds):
    """(learning rate, N, done): warm-up and cosine; memories grow from settings.first_facts to settings.facts by doubling.

    What is done (0 to 1) is the share of the steps or of the minutes, whichever is larger.
    """
    done = max(step / settings.steps, seconds / (60 * settings.minutes) if settings.minutes else 0.0)
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    rate = settings.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    least = min(settings.first_facts, settings.facts)
    stages = math.ceil(math.log2(settings.facts / least)) + 1
    # small memories are quick to learn from: the first stages are short
    stage = min(stages - 1, int(stages * done ** 0.5 * 1.1))
    return rate, min(settings.facts, least * 2 ** stage), done


def gradients(lesson, settings, step, N, parts):
    """Add up the gradients of some of a step's batches, numbers below `accumulate`. Returns the loss of the last, and its parts."""
    for part in parts:
        # Every draw is a function of seed, step and batch, of which a step has 64 at most: a resumed run sees what the unbroken one would have.
        generator = torch.Generator(lesson.model.gemma.device).manual_seed((settings.seed * 1_000_003 + step) * 64 + part)
        torch.manual_seed((settings.seed * 1_000_003 + step) * 64 + part)                    # for dropout
        with autocast(lesson.model):
            loss = lesson.loss(N, generator)
        (loss["loss"] / settings.accumulate).backward()
    return loss


def compile_layers(layers):
    """Have the forward pass of some layers compiled, where it trains: the few batches of an evaluation don't pay for another minute of
    compiling. All layers of a class that are alike share what was compiled; a stack of them compiled as one takes many times as long."""
    fast = {plain: torch.compile(plain, dynamic=True) for plain in {type(layer).forward for layer in layers}}
    for layer in layers:
        layer.forward = lambda *inputs, layer=layer, plain=type(layer).forward: (fast[plain] if torch.is_grad_enabled() else plain)(layer, *inputs)


def add_up(parameters):
    """Replace gradients by their sum over all processes."""
    parameters = [p for p in parameters if p.grad is not None]             # the same in every process: what the design leaves unused has none
    flat = torch.cat([p.grad.flatten() for p in parameters])
    distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def train(settings, memory_config=None, model=None, pools=None):
    """Train and save a memory; the folder keeps the weights of the best evaluation. Returns (model as it is after the last
    step, last evaluation). pools: (training, held-out), to share among runs.

    Under torchrun every process holds the whole pool and takes its share of the `accumulate` batches of a step; with the
    gradients added up, all of them take the step that one process would have taken. The first measures, saves and speaks.
    """
    settings.check()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, together = int(os.environ.get("RANK", 0)), processes()
    if together > 1:
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    device, first = check_device(device), rank == 0
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    if settings.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"                  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(True)
    Model = variants.find(settings.variant)
    if model is None:
        model = Model.from_pretrained(base=settings.model, device=device, config=memory_config)
    elif memory_config is not None:
        model = Model(model.gemma, model.tokenizer, memory_config, model.base_name)
    folder = Path(settings.out)
    if settings.init:
        check_init(settings.init, model)
    if first and not settings.resume:
        set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if first:
        clear_halves(folder)
    started = time.time()
    lesson = (GraphLesson if Model is GemmaWithMemory else Model.Lesson)(model, settings, pools, first)
    if settings.init:
        model.load_memory(settings.init)
    parameters = model.trainable_parameters()
    if not parameters:                                                     # --variant none: measured and saved, there is nothing to train
        last = lesson.evaluate() if first else {}
        for alone in last.values():
            alone["base_alone"] = alone["recall"]
        model.trained = dict(asdict(settings), held_out=last)
        if first:
            model.save_pretrained(folder)
        if together > 1:
            distributed.destroy_process_group()
        return model, last
    optimizer = torch.optim.AdamW([dict(params=some, factor=factor, weight_decay=decay) for group, factor in model.parameter_groups() for some, decay in
                                   (([p for p in group if p.ndim > 1], settings.weight_decay), ([p for p in group if p.ndim <= 1], 0.0)) if some],
                                  lr=settings.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    progress = dict(step=0, best=None, seconds=0.0, broken=0, skipped=0, waited=0)
    if settings.resume:
        progress.update(load_checkpoint(folder, model, optimizer))
    if first and not settings.resume:   # a run that is killed before its first evaluation can be resumed too
        save_checkpoint(folder, model, optimizer, progress)
    start, best, spent, broken, skipped, waited = (progress[name] for name in ("step", "best", "seconds", "broken", "skipped", "waited"))
    layers = lesson.layers if settings.compile else None
    compile_layers(layers or ())
    ready = time.time()
    seen, last, lines, log = 0, {}, [], folder / "log.jsonl"
    if settings.resume and log.is_file():
        try:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= start]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{log}: expected a JSON object with a step on each line; move this file away, the checkpoint is good without it.") from None
    step, bar = start - 1, tqdm(range(start, settings.steps), desc="training", unit="step", initial=start, total=settings.steps, disable=not first)
    for step in bar:
        elapsed = spent + time.time() - ready
        if together > 1:                # one clock for all, or they would end at different steps
            clock = torch.tensor([elapsed], dtype=torch.float64, device=device)
            distributed.broadcast(clock, 0)
            elapsed = clock.item()
        rate, N, done = schedule(settings, step, elapsed)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        model.train()
        try:
            parts = gradients(lesson, settings, step, N, range(rank, settings.accumulate, together))
        except Exception as error:      # a compiler can fail in any way, and only when a step is taken
            if not layers or isinstance(error, (InputError, torch.OutOfMemoryError)):
                raise
            for layer in layers:
                del layer.forward
            layers, reason = None, f"{type(error).__name__}: {error}".splitlines()[0]
            tqdm.write(f"--compile doesn't work here ({reason}): going on without.", file=sys.stderr)
            optimizer.zero_grad(set_to_none=True)                          # of batches of this step that came through
            parts = gradients(lesson, settings, step, N, range(rank, settings.accumulate, together))
        if together > 1:
            add_up(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        broken = 0 if norm.isfinite() else broken + 1
        if broken == 5:
            raise InputError(f"step {step + 1}: the gradient was not finite 5 times in a row; what {folder} holds "
                             "from before is good: train with a lower --lr.")
        if broken:
            skipped += 1
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += settings.batch * settings.accumulate
        last_step = step + 1 == settings.steps or done >= 1
        measure = (step + 1) % settings.eval_every == 0 or last_step
        if first and (step % 20 == 0 or measure):
            told = lambda part: [round(x, 4) for x in part] if isinstance(part, list) else round(part, 4)
            values = dict(step=step + 1, facts=N, **{name: told(part.tolist()) for name, part in parts.items()}, seconds=round(time.time() - ready, 1),
                          examples_per_second=round(seen / (time.time() - ready)))
            if measure:
                if not all(bool(p.isfinite().all()) for p in parameters):  # before anything is saved
                    raise InputError(f"step {step + 1}: the weights are no longer finite; what {folder} holds from before is good: train with a lower --lr.")
                last = lesson.evaluate(questions=2048 if device.type == "cuda" else 512)
                values["held_out"] = last
                score = sum(r["recall"] or 0.0 for r in last.values())
                waited = waited + 1 if best is not None and score <= best else 0
                last_step = last_step or 0 < settings.patience <= waited
                if last_step:
                    for size, alone in lesson.evaluate(silent=True, questions=128).items():
                        last[size]["base_alone"] = alone["recall"]
                if best is None or score >= best - 0.005:                  # within chance, what has learnt more counts as better
                    best = score if best is None else max(best, score)
                    model.trained = dict({k: v for k, v in asdict(settings).items() if k not in ("out", "init", "device", "resume", "workers")},
                                         init=Path(settings.init).name,
                                         step=step + 1, held_out=last)
                    model.save_pretrained(folder)
            values["skipped"] = skipped
            values["pool_seconds"] = round(ready - started, 1)
            lines.append(json.dumps(values))
            with replacing(log) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            if measure:
                save_checkpoint(folder, model, optimizer, dict(step=step + 1, best=best, seconds=elapsed, broken=broken, skipped=skipped, waited=waited))
            shown = {f"recall@{n}": f"{r['recall']:.0%}" for n, r in last.items() if r["recall"] is not None}
            bar.set_postfix(N=N, loss=f"{parts['loss'].item():.3f}", **shown)
        if together > 1 and measure and settings.patience:
            ends = torch.tensor([float(last_step)], device=device)         # the first has measured, all end together
            distributed.broadcast(ends, 0)
            last_step = bool(ends)
        if last_step:
            break
    bar.close()
    model.eval()
    if together > 1:
        distributed.destroy_process_group()
    if first:
        without = f" ({skipped} of them skipped: their gradients were not finite)" if skipped else ""
        where = f"{together} x {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}"
        print(f"trained {step + 1} steps{without}, {seen:,} examples in {time.time() - ready:.0f} s (and {ready - started:.0f} s for the pool) "
              f"on {where}; saved in {folder}", file=sys.stderr)
    return model, last


def main(arguments=None):
    settings, config = read_settings(arguments, TrainConfig, "Train a memory on a frozen Gemma.",
                                     "python train.py --model gemma-3-270m --minutes 6 --steps 20000 --batch 1024 --out out/270m")
    try:
        _, result = train(settings, config)
    except KeyboardInterrupt:
        saved = (Path(settings.out) / "checkpoint.safetensors").is_file()
        sys.exit(print(f"\nstopped; {f'--resume goes on from the checkpoint in {settings.out}' if saved else 'nothing was saved yet'}.", file=sys.stderr) or 130)
    share = lambda value: "none asked" if value is None else f"{value:.1%}"
    for N, r in result.items():
        found = f", right episode first {share(r['first'])}, refused {share(r['refused'])} of the unanswerable and {share(r['refused_wrongly'])} of " \
                "the answerable" if "first" in r else ""
        print(f"{N:4d} facts: exact match {share(r['recall'])} (the base alone {share(r.get('base_alone'))}){found}")
    if (Path(settings.out) / "log.jsonl").is_file() and result:            # not in the other processes of torchrun, nor where nothing trains
        from extras.curves import draw
        draw(settings.out)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
