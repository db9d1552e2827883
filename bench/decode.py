"""How fast it answers:  python -m bench.decode --model 1b --device cuda

Ours and transformers' generate with the very same tensors, greedy, one prompt, run after run in turn: eager and compiled, and ours
with facts in memory. Then the time to the first token with facts in memory against the same facts in the prompt, and many questions
in one batch against one by one. The limit is the memory's bandwidth: each token needs every weight once, the output head (the
embedding table) with them. So a share of bandwidth is bytes of all weights / time for one more token / measured copy bandwidth.

Compile time (the first run less a later one) is apart. --model 1b has random weights: speed does not depend on them, and the
greedy tokens of random weights are not worth reading.
"""

import statistics
import sys
import time

import torch

from bench.common import Parser, percent, run, table
from bench.timing import SHAPES, copy_bandwidth, finish, in_turn, model_of, save, transformers_of
from data_gen import World
from gemma import InputError, check_device


def facts_of(n):
    """n facts about as many people."""
    world, facts = World("test", 0), []
    while len(facts) < n:
        facts += world.memory(min(100, n - len(facts)) if n - len(facts) >= 4 else 4, 1, "lookup")[0]
    return facts[:n]


def ours(stream, ids, n, **options):
    """A run of ours: n greedy tokens after ids, and seconds for one more of them, once the first quarter has arrived."""
    def work():
        tokens, arrived = [], []
        for token in stream(ids, max_new_tokens=n, stop=(), **options):
            tokens.append(token), arrived.append(time.perf_counter())
        return torch.stack(tokens, 1), (arrived[-1] - arrived[n // 4]) / (n - 1 - n // 4) if n > 3 else None
    return work


def theirs(peer, ids, n, **options):
    """The same with transformers' generate, which doesn't say when a token arrives."""
    peer.generation_config.eos_token_id = None
    return lambda: (peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                  top_k=None, top_p=None, pad_token_id=0, **options)[:, ids.shape[1]:].cpu(), None)


def same(a, b):
    """Share of tokens that are the same until they first differ."""
    alike = (a == b).float().cumprod(-1)
    return alike.mean().item()


def decoding(model, peer, args, done):
    """Seconds for each of the ways to make args.tokens tokens, and for one more token of ours; which tokens are the same as eager's.

    Calls done(these, as a part of the result) whenever more is known."""
    n, ids = args.tokens, torch.tensor([model.prompt("Where does Maria live?")], device=args.device)
    model.clear_memory(), model.add_to_memory(facts_of(args.facts))
    ways = {"ours, eager": ours(model.gemma.stream, ids, n), "ours, eager, with memory": ours(model.stream, ids, n)}
    if peer is not None:
        ways["transformers, eager"] = theirs(peer, ids, n)
    if not args.no_compile:
        ways["ours, compiled"] = ours(model.gemma.stream, ids, n, compile=True)
        ways["ours, compiled, with memory"] = ours(model.stream, ids, n, compile=True)
        if peer is not None:
            ways["transformers, static cache, compiled"] = theirs(peer, ids, n, cache_implementation="static")
    made, paces = {}, {name: [] for name in ways}

    def kept(name):
        made[name], pace = ways[name]()
        paces[name].append(pace)

    def known(runs):
        part = dict(decoding={}, alike={})
        for name, run in runs.items():
            if name.startswith("ours, compiled") and not model.gemma.compiles:
                run = dict(failed="it can't be compiled here: see the note on standard error")
            later = [pace for pace in paces[name][1:] if pace]
            part["decoding"][name] = dict(run, per_token=statistics.median(later)) if later and "failed" not in run else run
            if "failed" not in run:
                part["alike"][name] = same(made[name], made["ours, eager, with memory" if "memory" in name else "ours, eager"])
        done(part)

    in_turn({name: lambda name=name: kept(name) for name in ways}, args.rounds, args.device, known, forgiving=True)


def first_token(model, peer, args):
    """Seconds to the first token of an answer: facts in memory, and the same facts in the prompt."""
    model.clear_memory()
    facts, question = facts_of(args.in_prompt), model.prompt("Where does Maria live?")
    in_prompt = lambda: model.tokenizer.encode("\n".join(facts) + "\n") + question[1:]
    while len(in_prompt()) >= model.gemma.config.max_position_embeddings:
        facts = facts[:-max(1, len(facts) // 8)]                           # the context has no room for more
    model.add_to_memory(facts)
    ids, long = torch.tensor([question], device=args.device), torch.tensor([in_prompt()], device=args.device)
    first = lambda **options: lambda: next(model.stream(ids, max_new_tokens=args.tokens, **options))
    ways = {"memory, eager": first(), "prompt, ours": ours(model.gemma.stream, long, 1)}
    if not args.no_compile and model.gemma.compiles:
        ways["memory, compiled"] = first(compile=True)
    if peer is not None:
        ways["prompt, transformers"] = theirs(peer, long, 1)
    return dict(first=in_turn(ways, args.rounds, args.device, forgiving=True), prompt_tokens=long.shape[1], in_prompt=len(facts))


def many(model, args):
    """Seconds for many questions in one batch, and one by one (a few of them, scaled up)."""
    model.clear_memory()
    model.add_to_memory(facts_of(args.facts))
    ids, mask = model.batch([f"What is the locker code of person {i}?" for i in range(args.questions)])
    n, few = args.tokens, min(4, args.questions)
    options = dict(compile=not args.no_compile and model.gemma.compiles, stop=())
    ways = {"batch": lambda: model.generate(ids, n, attention_mask=mask, **options),
            "one by one": lambda: [model.generate(ids[i:i + 1], n, attention_mask=mask[i:i + 1], **options) for i in range(few)]}
    runs = in_turn(ways, args.rounds, args.device, forgiving=True)
    if failed := [r["failed"] for r in runs.values() if "failed" in r]:
        return dict(failed=failed[0])
    return dict(batch=runs["batch"]["seconds"], one_by_one=runs["one by one"]["seconds"] * args.questions / few, questions=args.questions, **options)


def report(result):
    """The tables of a result, as Markdown."""
    found, limit = result["decoding"], result["bytes_per_token"] / result["bandwidth"]
    runs = {name: r for name, r in found.items() if "failed" not in r}
    peer = {kind: runs[name]["seconds"] for kind, name in (("eager", "transformers, eager"), ("compiled", "transformers, static cache, compiled")) if name in runs}
    rows = []
    for name, r in runs.items():
        per = r.get("per_token")
        rows.append([name, f"{1000 * r['seconds'] / result['tokens']:.2f}", f"{1000 * per:.2f}" if per else "–", percent(limit / per) if per else "–",
                     *(f"{peer[kind] / r['seconds']:.2f} ×" if kind in peer else "–" for kind in ("eager", "compiled")),
                     f"{r['start'] - r['seconds']:.0f}", percent(result["alike"].get(name))])
    text = (f"{result['model']}, {result['dtype']}, {result['facts']} facts, {result['tokens']} new tokens, batch 1; {result['bytes_per_token'] / 2 ** 20:,.0f} MB "
            f"a token, copies run at {result['bandwidth'] / 1e9:,.0f} GB/s:\n\n" +
            table(["way", "ms a token", "one more token, ms", "share of bandwidth, %", "against transformers eager", "against theirs compiled",
                   "to compile, s", "same tokens, %"], rows))
    if "first" in result:
        found = {**found, **result["first"]}
        text += "\n\n" + table([f"first token, {result['in_prompt']:,} facts ({result['prompt_tokens']:,} tokens in the prompt)", "ms"],
                               [[name, f"{1000 * r['seconds']:.1f}"] for name, r in result["first"].items() if "failed" not in r])
    m = result.get("many", {})
    found = dict(found, **{"many questions": m} if "failed" in m else {})
    if "batch" in m:
        text += f"\n\n{m['questions']} questions in one batch {m['batch']:.2f} s, one by one {m['one_by_one']:.2f} s: {m['one_by_one'] / m['batch']:.1f} ×"
    return text + "".join(f"\n\n{name} failed: {r['failed']}." for name, r in found.items() if "failed" in r)


def main(arguments=None):
    parser = Parser(prog="python -m bench.decode", description="Decoding speed against transformers and against the memory's bandwidth.",
                    epilog="example: python -m bench.decode --model 1b --device cuda --out out/decode-1b.json")
    parser.add_argument("--model", default="gemma-3-270m", help="gemma-3-270m, tiny, or 1b and toy, which have random weights (default gemma-3-270m)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of a run (default 256)")
    parser.add_argument("--facts", type=int, default=64, help="facts in memory (default 64)")
    parser.add_argument("--in-prompt", type=int, default=1000, help="facts for the time to the first token; 0: leave it out (default 1000)")
    parser.add_argument("--questions", type=int, default=64, help="of a batch; 0: leave it out (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, in turn (default 5)")
    parser.add_argument("--no-compile", action="store_true", help="only what is not compiled")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--quick", action="store_true", help="toy sizes whatever else is said, to see that it works")
    parser.add_argument("--out", help="file for the result, JSON")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.quick:
        args.model, args.tokens, args.facts, args.in_prompt, args.questions, args.rounds = "toy", 8, 4, min(args.in_prompt, 8), min(args.questions, 4), 1
    if args.tokens < 4 or args.rounds < 1 or args.facts < 1:
        raise InputError("expected --tokens of at least 4, --rounds and --facts of at least 1.")
    args.device = check_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16"))
    model = model_of(args.model, dtype, args.device)
    peer = None if args.no_peer else transformers_of(model.gemma)
    result = dict(model=f"{args.model}, random weights" if args.model in SHAPES else args.model, dtype=str(dtype).split(".")[1], tokens=args.tokens,
                  facts=args.facts, rounds=args.rounds, threads=torch.get_num_threads(), bandwidth=copy_bandwidth(args.device, 2 ** 24 if args.quick else 2 ** 30),
                  bytes_per_token=sum(p.nbytes for p in model.gemma.parameters()))

    def done(part):
        result.update(part)
        save(result, args.out, given, "decode", args.device)

    with torch.no_grad():
        decoding(model, peer, args, done)
        if args.in_prompt:
            done(first_token(model, peer, args))
        if args.questions:
            done(dict(many=many(model, args)))
    result = finish(result, args.out, given, "decode", args.device)
    print(report(result))
    return result


if __name__ == "__main__":
    run(main)
