"""What a large memory costs:  python -m bench.memory_scale --model 1b --device cuda

For 10^2 to 10^6 facts: adding them (facts a second, in batches), bytes a fact, saving and opening (memory-mapped), the time to
the first token of an answer, which is when the memory is searched, and the time for each further token, in turn with a memory of
64 facts: the candidates were chosen by then, so it should not depend on how many facts there are.
"""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench.common import Parser, run, table
from bench.timing import SHAPES, finish, in_turn, model_of, save, seconds, wait
from extras import episode_cache
from gemma import InputError, check_device
from memory import GemmaWithMemory

CHUNK = 2 ** 15                          # facts added at a time


def facts(n, first=0):
    """n different sentences, the same in every run."""
    rng = random.Random(first)
    say = ["{}'s locker code is {}.", "{} moved to {} last week.", "The password of {} is {}.", "{} has lived in {} since May."]
    name = lambda: "".join(rng.choice(part) for part in (["Ma", "Jo", "Te", "Ka", "Lu"], ["ri", "na", "lo", "sa", "mi"], ["a", "ko", "ne", "ra", "th"]))
    return [rng.choice(say).format(f"{name()} {name()}", f"{name()} {rng.randrange(10 ** 6)}") for _ in range(n)]


def fill(model, n):
    """Add facts until the model has n. Returns seconds for these."""
    spent = 0.0
    for start in tqdm(range(len(model.memory_graph), n, CHUNK), desc=f"{n:,} facts", file=sys.stderr, leave=False, delay=2):
        some = facts(min(CHUNK, n - start), start)
        spent += seconds(lambda: model.add_to_memory(some), model.gemma.device)
    return spent


def bytes_of(graph):
    """Bytes of all tensors of a memory, as {where: bytes}."""
    found = {}
    for tensor in (graph.tokens.ids, graph.tokens.keys, graph.tokens.lengths, graph.tokens.starts, graph.nodes, graph.keys):
        found[tensor.device.type] = found.get(tensor.device.type, 0) + tensor.nbytes
    return found


def pace(model, ids, args):
    """Median seconds for one more token."""
    arrived = []
    for _ in model.stream(ids, max_new_tokens=args.tokens, stop=(), compile=args.compile):
        arrived.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(arrived[args.tokens // 4:], arrived[args.tokens // 4 + 1:]))


def saved(model, folder):
    """Seconds to save the memory and to open it again, and the bytes of the file."""
    graph, path = model.memory_graph, Path(folder) / "cache.safetensors"
    save = seconds(lambda: episode_cache.save(path, "bench", graph), model.gemma.device)
    again = GemmaWithMemory(model.gemma, model.tokenizer, model.config).eval()
    opened = seconds(lambda: episode_cache.remember(again, graph.ids, graph.texts, episode_cache.load(path, "bench"), progress=False), model.gemma.device)
    size = path.stat().st_size
    path.unlink()
    return dict(save=save, open=opened, file=size)


def measure(n, model, small, ids, args):
    """One row: a memory that is grown to n facts, beside a `small` one."""
    had = len(model.memory_graph)
    spent = fill(model, n)
    first = lambda m: lambda: next(m.stream(ids, max_new_tokens=args.tokens, compile=args.compile))
    runs = in_turn({"this": first(model), "small": first(small)}, args.rounds, args.device)
    per_token = {name: [] for name in runs}
    for m, _ in ((model, 0), (small, 0)):
        pace(m, ids, args)
    for _ in range(args.rounds):
        for name, m in (("this", model), ("small", small)):
            per_token[name].append(pace(m, ids, args))
    row = dict(facts=n, added=n - had, add_seconds=spent, bytes=bytes_of(model.memory_graph), first={name: r["seconds"] for name, r in runs.items()},
               keys_seconds=runs["this"]["start"], per_token={name: statistics.median(values) for name, values in per_token.items()})
    if n <= args.save_up_to:
        with tempfile.TemporaryDirectory() as folder:
            row.update(saved(model, folder))
    return row


def report(result):
    rows = []
    for r in result["rows"]:
        per, whole = r["per_token"], sum(r["bytes"].values())
        rows.append([f"{r['facts']:,}", f"{r['added'] / r['add_seconds']:,.0f}", f"{whole / r['facts']:,.0f}", f"{whole / 2 ** 20:,.0f}",
                     *(f"{r[what]:.2f}" if what in r else "–" for what in ("save", "open")),
                     f"{1000 * r['first']['this']:.1f}", f"{1000 * r['first']['small']:.1f}",
                     f"{1000 * per['this']:.3f}", f"{1000 * per['small']:.3f}", f"{100 * (per['this'] / per['small'] - 1):+.1f}"])
    return f"{result['model']}, {result['dtype']}{', compiled' if result['compile'] else ''}; the small memory has {result['small']} facts:\n\n" + table(
        ["facts", "added a second", "bytes a fact", "MB", "save, s", "open, s", "first token, ms", "small", "one more token, ms", "small", "difference, %"], rows)


def main(arguments=None):
    parser = Parser(prog="python -m bench.memory_scale", description="What a large memory costs: to add to, to keep, to save and open, to ask.",
                    epilog="example: python -m bench.memory_scale --model 1b --device cuda --compile --out out/scale.json")
    parser.add_argument("--model", default="tiny", help="tiny, gemma-3-270m, or 1b and toy, which have random weights (default tiny)")
    parser.add_argument("--sizes", default="100,1000,10000,100000,1000000", help="facts (default 100 to 1000000)")
    parser.add_argument("--small", type=int, default=64, help="facts of the memory to compare with (default 64)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of an answer (default 64)")
    parser.add_argument("--save-up-to", type=int, default=100_000, help="facts; larger memories are not written to a file (default 100000)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile decoding")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, in turn (default 5)")
    parser.add_argument("--quick", action="store_true", help="toy sizes whatever else is said, to see that it works")
    parser.add_argument("--out", help="file for the result, JSON")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.quick:
        args.model, args.sizes, args.small, args.tokens, args.rounds = "toy", "16,48", 8, 8, 1
    try:
        sizes = sorted(int(n) for n in args.sizes.split(","))
    except ValueError:
        raise InputError(f"expected numbers of facts with commas between them, got {args.sizes!r}.") from None
    if sizes[0] < 1 or args.small < 1 or args.tokens < 4 or args.rounds < 1:
        raise InputError("expected --sizes, --small and --rounds of at least 1 and --tokens of at least 4.")
    args.device = check_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16"))
    model = model_of(args.model, dtype, args.device)
    small = GemmaWithMemory(model.gemma, model.tokenizer, model.config).eval()
    small.injection.load_state_dict(model.injection.state_dict())
    ids = torch.tensor([model.prompt("What is Maria Jona's locker code?")], device=args.device)
    model.add_to_memory(facts(256)), model.clear_memory(), wait(args.device)                   # the first call of everything is slow
    fill(small, args.small)
    result = dict(model=f"{args.model}, random weights" if args.model in SHAPES else args.model, dtype=str(dtype).split(".")[1], small=args.small,
                  compile=args.compile, threads=torch.get_num_threads(), rows=[])
    with torch.no_grad():
        for n in sizes:
            result["rows"].append(measure(n, model, small, ids, args))
            save(result, args.out, given, "memory_scale", args.device)
    result = finish(result, args.out, given, "memory_scale", args.device)
    print(report(result))
    return result


if __name__ == "__main__":
    run(main)
