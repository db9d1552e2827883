"""How fast it learns:  python -m bench.train_step --model 1b --device cuda

A training step of ours (train.py: drawn from a pool of frozen states, the layers above the injection forward and backward, logits
at answer positions, AdamW) in turn with one of the same technique as first planned, built from transformers and PyG: for every
example the memory is cleared, each sentence added to it, and the question run by itself. The limit is the rate of matrix
products. Counted as needed: four operations for each weight of the layers above and each real token (forward, and backward to the
inputs; these weights don't learn), as many for each entry of the output head and each answer token. Attention and the memory's own
part are not counted, so the true share is higher.

Several GPUs: torchrun --nproc_per_node=2 -m bench.train_step --model 1b --device cuda --no-peer --against ONE.json
"""

import os
import sys

import torch
import torch.nn.functional as F
from torch import distributed, nn

import train
from bench.common import Parser, percent, run, table
from bench.timing import SHAPES, finish, in_turn, matrix_rate, model_of, seconds, transformers_of
from data_gen import World
from extras.memory_model import question_prompt
from gemma import InputError, check_device, read_json

TOKENS, AFTER = 56, 8                    # longest question with its answer; the layer that the plan's memory follows


class Ours:
    """A step of train.py on a pool of its own."""

    def __init__(self, model, args, rank):
        self.settings = train.TrainConfig(batch=args.batch, facts=args.facts, tokens=TOKENS, lr=1e-4)
        self.model, self.rank, self.steps = model, rank, 0
        self.pool = train.Pool(model, "train", args.bundles, TOKENS, 0, texts=min(256, args.bundles // 8), progress=rank == 0)
        self.lesson = train.GraphLesson(model, self.settings, (self.pool, None))
        self.parameters = model.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=model.gemma.device.type == "cuda")
        if args.compile:
            train.compile_layers(self.lesson.layers)
        model.train()

    def generator(self):
        return torch.Generator(self.model.gemma.device).manual_seed(self.steps * 64 + self.rank)

    def step(self):
        self.steps += 1
        with train.autocast(self.model):
            loss = self.lesson.loss(self.settings.facts, self.generator())["loss"]
        loss.backward()
        if train.processes() > 1:
            train.add_up(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def needed(self):
        """Operations that the last step could not do without."""
        s, gemma = self.settings, self.model.gemma
        asked = self.pool.questions(self.pool.draw(train.groups(s.batch, s.facts), s.batch, s.facts, s.unknown, s.text, self.generator()), s.tokens)
        weights = sum(p.numel() for layer in gemma.layers[self.model.config.inject_after:] for p in layer.parameters() if p.ndim > 1)
        return 4 * weights * int(asked.real.sum()) + 4 * gemma.embed_tokens.weight.numel() * int(asked.answering.sum())


class Plan(nn.Module):
    """The plan's memory: mean embeddings as nodes, PyG's GATConv along time, one pooled query, one vector read, added after a layer."""

    def __init__(self, peer, tokenizer, heads=4):
        super().__init__()
        from torch_geometric.nn import GATConv
        D = peer.config.hidden_size
        self.frozen, self.tokenizer = [peer], tokenizer
        self.gat, self.query, self.out = GATConv(D, D // heads, heads=heads), nn.Linear(D, D), nn.Linear(D, D)
        layers = peer.model.layers
        layers[min(AFTER, len(layers)) - 1].register_forward_hook(self.inject)
        self.clear_memory()

    def clear_memory(self):
        self.nodes = []

    def add_to_memory(self, text):
        peer = self.frozen[0]
        ids = torch.tensor(self.tokenizer.encode(text, bos=False), device=peer.device)
        self.nodes.append(peer.get_input_embeddings().weight[ids].float().mean(0))

    def inject(self, module, inputs, output):
        h = output[0] if isinstance(output, tuple) else output
        at = torch.arange(len(self.nodes) - 1, device=h.device)
        edges = torch.cat((torch.stack((at, at + 1)), torch.stack((at + 1, at))), 1)
        keys = self.gat(torch.stack(self.nodes), edges)
        weights = (self.query(h.float().mean(1)) @ keys.T / keys.shape[1] ** 0.5).softmax(-1)
        h = h + self.out(weights @ keys)[:, None].to(h.dtype)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def loss(self, example):
        """One example, (facts, question, answer), by itself."""
        facts, question, answer = example
        self.clear_memory()
        for fact in facts:
            self.add_to_memory(fact)
        prompt, answer = question_prompt(self.tokenizer, question, False), self.tokenizer.encode(" " + answer + "\n", bos=False)
        ids = torch.tensor([prompt + answer], device=self.frozen[0].device)
        logits = self.frozen[0](ids, use_cache=False).logits[0, len(prompt) - 1:-1]
        return F.cross_entropy(logits.float(), ids[0, len(prompt):])


class Theirs:
    """A step of the plan: an example after the other, then AdamW."""

    def __init__(self, model, args):
        self.peer = transformers_of(model.gemma)
        self.plan = Plan(self.peer, model.tokenizer).to(model.gemma.device)
        self.optimizer = torch.optim.AdamW(self.plan.parameters(), lr=1e-4)
        world, self.examples = World("train", 1), []
        while len(self.examples) < args.peer_batch:
            facts, (q,) = world.memory(args.facts, 1, "lookup")
            self.examples.append((facts, q["question"], q["answer"]))

    def step(self):
        for example in self.examples:
            (self.plan.loss(example) / len(self.examples)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def report(result):
    rows = [["ours", f"{result['ours']:,.0f}", f"{1000 * result['ours_seconds']:.1f}", f"{result['compile_seconds']:.0f}"]]
    if "theirs" in result:
        rows.append(["the plan's loop, transformers + PyG", f"{result['theirs']:,.1f}", f"{1000 * result['theirs_seconds']:.1f}", "–"])
    text = (f"{result['model']}, {result['dtype']}, {result['processes']} × batch {result['batch']}, {result['facts']} facts; pool of {result['bundles']:,} bundles in "
            f"{result['pool_seconds']:.0f} s:\n\n" + table(["step", "questions a second", "a step, ms", "to start, s"], rows) +
            f"\n\n{percent(result['share'])}% of the measured matrix rate ({result['rate'] / 1e12:,.2f} TFLOP/s) on the needed operations")
    if "theirs" in result:
        text += f"; {result['ours'] / result['theirs']:,.0f} × the plan's loop"
    if "failed" in result:
        text += f"; the plan's loop failed: {result['failed']}"
    if "against" in result:
        text += f"; {result['ours'] / result['against']:.2f} × one process"
    return text


def main(arguments=None):
    parser = Parser(prog="python -m bench.train_step", description="Training speed against the plan's loop and against the rate of matrix products.",
                    epilog="example: python -m bench.train_step --model 1b --device cuda --out out/train-1b.json")
    parser.add_argument("--model", default="tiny", help="tiny, gemma-3-270m, or 1b and toy, which have random weights (default tiny)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--batch", type=int, default=0, help="questions a step (default 512 on a GPU, else 64)")
    parser.add_argument("--peer-batch", type=int, default=8, help="examples of a step of the plan's loop, whose speed doesn't depend on it (default 8)")
    parser.add_argument("--facts", type=int, default=64, help="largest memory (default 64)")
    parser.add_argument("--bundles", type=int, default=4000, help="of the pool (default 4000)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each, in turn (default 10)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="don't compile; on a CPU nothing is compiled anyway")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--against", metavar="FILE", help="a result of one process, to compare several with")
    parser.add_argument("--quick", action="store_true", help="toy sizes whatever else is said, to see that it works")
    parser.add_argument("--out", help="file for the result, JSON")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.quick:
        args.model, args.batch, args.peer_batch, args.facts, args.bundles, args.rounds = "toy", 8, 2, 8, 40, 1
    args.device = check_device(args.device)
    cuda = args.device.type == "cuda"
    args.batch, args.compile = args.batch or (512 if cuda else 64), args.compile and cuda
    if min(args.batch, args.facts) < 8 or min(args.peer_batch, args.bundles, args.rounds) < 1:
        raise InputError("expected --batch and --facts of at least 8, --peer-batch, --bundles and --rounds of at least 1.")
    against = read_json(args.against).get("ours") if args.against else None
    if args.against and not isinstance(against, (int, float)):
        raise InputError(f"{args.against}: expected a result of bench.train_step, with an entry 'ours'; name another.")
    rank, together = int(os.environ.get("RANK", 0)), train.processes()
    if together > 1:
        distributed.init_process_group("nccl" if cuda else "gloo")
        if cuda:
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        args.no_peer = True
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if cuda else torch.float32
    model = model_of(args.model, dtype, args.device)
    made = []
    pool_seconds = seconds(lambda: made.append(Ours(model, args, rank)), args.device)
    ours = made[0]
    ways = {"ours": ours.step}
    if not args.no_peer:
        ways["theirs"] = Theirs(model, args).step
    runs = in_turn(ways, args.rounds, args.device, forgiving=True)
    if "failed" in runs["ours"]:
        raise InputError(f"expected a machine that our step runs on, but {runs['ours']['failed']}; try a smaller --batch or --no-compile.")
    spent = runs["ours"]["seconds"]
    rate = matrix_rate(args.device, dtype, 256 if args.quick else 8192 if cuda else 2048)
    result = dict(model=f"{args.model}, random weights" if args.model in SHAPES else args.model, dtype=str(dtype).split(".")[1], processes=together,
                  batch=args.batch, facts=args.facts, bundles=args.bundles, rounds=args.rounds, threads=torch.get_num_threads(), pool_seconds=pool_seconds,
                  ours=together * args.batch / spent, ours_seconds=spent, compile_seconds=runs["ours"]["start"] - spent, rate=rate,
                  share=ours.needed() / spent / rate)
    if "failed" in runs.get("theirs", {}):
        result["failed"] = runs["theirs"]["failed"]
    elif "theirs" in runs:
        result.update(theirs=args.peer_batch / runs["theirs"]["seconds"], theirs_seconds=runs["theirs"]["seconds"])
    if args.against:
        result["against"] = against
    if together > 1:
        distributed.destroy_process_group()
    if rank == 0:
        result = finish(result, args.out, given, "train_step", args.device)
        print(report(result))
    return result


if __name__ == "__main__":
    run(main)
