"""The failure lab: five training runs, of which four went wrong, each in a way of its own.

    python -m exercises.lab --seed 3 --out exercises/runs        made the set that is handed out; a check trains another one

All runs of a set have the same settings and the same loop; what is wrong with one is in its data, or in a part that never
learnt. The seed draws people, sentences and weights, and the order of the runs. A run is a folder: memory.json and
memory.safetensors, as any trained memory has them; log.jsonl, its losses; sample.jsonl, some of the sentences it learnt from.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from data_gen import World, open_vocabulary
from exercises.training import part_of
from extras.pool import Pool
from gemma import InputError, replacing
from memory import GemmaWithMemory, MemoryConfig
from train import copying_loss, forward, retrieval_loss, scores

CAUSES = ("nothing", "closed vocabulary", "one pooled vector", "no negatives", "dead gate")
# Read after the last layer, a memory speaks to the output head itself: no layers to run above it, forward or backward.
CONFIG = dict(inject_after=12, heads=1, key_dim=16, token_key_dim=16, sentence_layers=0, reading_layers=0, match=False, said=False, follow=False, graph=False, time_edges=False,
              similar_edges=False, hops=1, candidates=8, readable=4)
STEPS, QUESTIONS, FACTS, TOKENS = 240, 64, 16, 32
CLOSED = 24                              # values, where the vocabulary is closed
BUNDLES, SAMPLE = 800, 64
NOUNS = ("locker code", "tax advisor", "favourite song", "seat", "badge", "password", "dentist", "project", "team", "street", "hotel", "dish")
TOLD = ("{p}'s {a} is {v}.", "The {a} of {p} is {v}.", "{p} said that the {a} is {v}.")
ASKED = ("What is {p}'s {a}?", "What is the {a} of {p}?")


def order(seed):
    """The causes of a set's runs, in the order of the runs."""
    random, left = Random(seed).random, list(CAUSES)
    return [left.pop(int(random() * len(left))) for _ in CAUSES]


def sentences(tokenizer, split, seed, n, closed=0):
    """n times (fact, question, answer); closed: of so many values all are drawn."""
    world = World(split, seed, open_vocabulary(tokenizer))
    value, found = lambda: world.make(world.pick(world.open)), []
    values = [value() for _ in range(closed)]
    for _ in range(n):
        filled = dict(p=world.person(titles=False).name, a=world.pick(NOUNS), v=world.pick(values) if closed else value())
        found.append((world.pick(TOLD).format(**filled), world.pick(ASKED).format(**filled), filled["v"]))
    return found


def pool_of(model, told):
    """A Pool of (fact, question, answer)s: memories are drawn from the facts, none about anybody who is in them already."""
    bundles = [([fact], [(question, answer, [0])], [question]) for fact, question, answer in told]
    return Pool(model, "train", len(told), TOKENS, 0, draw=lambda *_: [part_of(model.tokenizer, bundles, TOKENS)], progress=False)


def made(cause, seed, place, folder, bar):
    """Train one run and save it."""
    torch.manual_seed(seed * 10 + place)
    model = GemmaWithMemory.from_pretrained(base="tiny", config=MemoryConfig(**CONFIG))
    told = sentences(model.tokenizer, "train", seed * 10 + place, BUNDLES, CLOSED if cause == "closed vocabulary" else 0)
    pool, injection = pool_of(model, told), model.injection
    pool.set_statistics(model)
    dead = {"dead gate": [injection.value_map], "one pooled vector": [injection.token_query_own.weight, injection.token_query_pool[0].weight]}
    for parameter in dead.get(cause, []):
        parameter.requires_grad_(False).zero_()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    random, log = torch.Generator().manual_seed(seed), []
    memories, facts = (QUESTIONS, 1) if cause == "no negatives" else (QUESTIONS // 8, FACTS)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1.02 - step / STEPS)
        batch = pool.draw(memories, QUESTIONS, facts, 0.1, 0.0, random)
        out = forward(model, pool, batch, TOKENS)
        answer, copying, retrieval = cross_entropy(out["logits"], out["targets"]), copying_loss(batch, out, 1), retrieval_loss(batch, out, 1)
        (answer + 0.5 * copying + 0.3 * sum(retrieval)).backward()
        torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            log.append(dict(step=step + 1, answer_loss=round(answer.item(), 4), retrieval_loss=round(retrieval[0].item(), 4),
                            copying_loss=round(copying.item(), 4)))
            bar.set_postfix(log[-1])
        bar.update()
    model.trained = dict(seed=seed, place=place, steps=STEPS)
    model.save_pretrained(folder)
    for name, lines in (("log.jsonl", log), ("sample.jsonl", [dict(fact=f, question=q, answer=a) for f, q, a in told[:SAMPLE]])):
        with replacing(folder / name) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------- looking at a run

def lines(file):
    """A file of JSON lines, as a list."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class Run:
    """A run to be looked at. Nothing in here knows what is wrong with it.

    model: its GemmaWithMemory, to be asked, or for its weights; log: list of dict, losses of every 20th step, each of one batch;
    sample: list of dict(fact, question, answer), what it learnt from at first; new: the same, of people and values that no run
    has seen.
    """

    pools = {}                           # of new sentences: the base is the same for all runs, and so is what it makes of them

    def __init__(self, model, folder, new):
        self.model, self.log, self.sample, self.new = model, lines(folder / "log.jsonl"), lines(folder / "sample.jsonl"), new
        self.asked = {}

    @torch.no_grad()
    def ask(self, what="new", facts=16):
        """Ask about `new` sentences or about the `sample`, all of them, in memories of at most `facts` facts: a dict of shares.

        recall: the whole answer is right; first: the right fact has the largest weight; begun: the answer's first token is right;
        tokens: so much of the attention inside the right fact, as a mean over heads, is on tokens that the answer goes on with.
        """
        if (what, facts) in self.asked:
            return self.asked[what, facts]
        told = tuple((line["fact"], line["question"], line["answer"]) for line in getattr(self, what))
        if told not in Run.pools:
            Run.pools[told] = pool_of(self.model, told)
        pool, random = Run.pools[told], torch.Generator().manual_seed(0)
        memories = 64 if facts == 1 else 8
        batch = pool.draw(memories, 64, facts, 0.0, 0.0, random)
        out = forward(self.model, pool, batch, TOKENS)
        right, first, _ = scores(batch, out)
        begins = torch.cat((torch.ones(1, dtype=torch.bool), out["row"][1:] != out["row"][:-1]))
        begun = (out["logits"].argmax(-1) == out["targets"])[begins]
        mean = lambda x: x.float().mean().item()
        self.asked[what, facts] = dict(recall=mean(right), first=mean(first), begun=mean(begun), tokens=torch.exp(-copying_loss(batch, out, 1)).item())
        return self.asked[what, facts]


def runs(folder):
    """The runs of a set, in order: yields Runs."""
    folders = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    base = GemmaWithMemory.from_pretrained(folders[0])
    new = [dict(fact=f, question=q, answer=a) for f, q, a in sentences(base.tokenizer, "test", 1, SAMPLE)]
    for path in folders:
        model = GemmaWithMemory(base.gemma, base.tokenizer, base.config, base.base_name)
        model.load_memory(path)
        yield Run(model.eval(), path, new)


def make(seed, folder, bar, n=len(CAUSES)):
    """Train a set, or the first n runs of it, into folder/1, folder/2, …; bar: a tqdm over n * STEPS steps."""
    for place, cause in enumerate(order(seed)[:n], 1):
        bar.set_description(f"training run {place}")
        made(cause, seed, place, Path(folder) / str(place), bar)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m exercises.lab", description="Train a set of runs for the failure lab: five, four of them broken.",
                                     epilog="example: python -m exercises.lab --seed 7 --out workshop/runs")
    parser.add_argument("--seed", type=int, required=True, help="draws people, sentences, weights and the order of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, 1 to 5")
    args = parser.parse_args(arguments)
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"expected a folder as --out, got the file {args.out}; name another.")
    with tqdm(total=len(CAUSES) * STEPS, desc="training", unit="step") as bar:
        make(args.seed, args.out, bar)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
