"""Our graph attention against PyG's GATConv:  python -m bench.gat --device cuda

The same weights, the same random graphs of 10^3 to 10^6 edges (eight edges a node), forward alone and forward with backward, run
after run in turn. Their outputs are compared first.
"""

import sys

import torch

from bench.common import Parser, run, table
from bench.timing import finish, in_turn, save
from gemma import InputError, check_device
from gnn import GATLayer

DEGREE = 8                               # edges a node


def pair(D, C, H, device):
    """Our layer and PyG's with the same weights."""
    try:
        from torch_geometric.nn import GATConv
    except ImportError:
        raise InputError("expected torch-geometric, which this bench compares with; pip install torch-geometric.") from None
    torch.manual_seed(0)
    ours = GATLayer(D, C, H).to(device)
    theirs = GATConv(D, C, heads=H).to(device)
    theirs.load_state_dict({"lin.weight": ours.project.weight, "att_src": ours.score_source[None], "att_dst": ours.score_target[None], "bias": ours.bias})
    return ours, theirs


def measure(E, args):
    """Seconds of both on one graph of E edges: {"forward": (ours, theirs), "forward and backward": ...}."""
    N = max(2, E // DEGREE)
    generator = torch.Generator().manual_seed(E)
    edges = torch.randint(N, (2, E), generator=generator).to(args.device)
    x = torch.randn(N, args.width, generator=generator).to(args.device)
    ours, theirs = pair(args.width, args.head_width, args.heads, args.device)
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), rtol=1e-3, atol=1e-3)
    times = max(1, min(args.repeat, 2 * 10 ** 6 // E))                     # a small graph several times, or the clock would be too coarse

    def forward(layer):
        with torch.no_grad():
            for _ in range(times):
                layer(x, edges)

    def both(layer):
        for _ in range(times):
            layer(x, edges).square().sum().backward()

    found = {}
    for name, work in (("forward", forward), ("forward and backward", both)):
        runs = in_turn({"ours": lambda: work(ours), "theirs": lambda: work(theirs)}, args.rounds, args.device)
        found[name] = {who: r["seconds"] / times for who, r in runs.items()}
    return dict(edges=E, nodes=N, **found)


def report(result):
    rows = [[f"{r['edges']:,}"] + [cell for what in ("forward", "forward and backward") for cell in
                                   (f"{1000 * r[what]['ours']:.3f}", f"{1000 * r[what]['theirs']:.3f}", f"{r[what]['theirs'] / r[what]['ours']:.2f} ×")]
            for r in result["rows"]]
    return (f"D {result['width']}, {result['heads']} heads of {result['head_width']}, {DEGREE} edges a node, float32; ms:\n\n" +
            table(["edges", "forward, ours", "PyG", "ratio", "with backward, ours", "PyG", "ratio"], rows))


def main(arguments=None):
    parser = Parser(prog="python -m bench.gat", description="Our graph attention against PyG's GATConv.", epilog="example: python -m bench.gat --edges 1000,100000")
    parser.add_argument("--edges", default="1000,10000,100000,1000000", help="sizes of graphs (default 1000,10000,100000,1000000)")
    parser.add_argument("--width", type=int, default=128, help="of a node (default 128)")
    parser.add_argument("--heads", type=int, default=4, help="default 4")
    parser.add_argument("--head-width", type=int, default=32, help="default 32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each, in turn (default 7)")
    parser.add_argument("--repeat", type=int, default=20, help="passes in a run of a small graph (default 20)")
    parser.add_argument("--quick", action="store_true", help="toy sizes whatever else is said, to see that it works")
    parser.add_argument("--out", help="file for the result, JSON")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.quick:
        args.edges, args.rounds, args.repeat = "100,1000", 1, 2
    try:
        sizes = [int(n) for n in args.edges.split(",")]
    except ValueError:
        raise InputError(f"expected numbers of edges with commas between them, got {args.edges!r}.") from None
    if min(sizes) < 1 or min(args.width, args.heads, args.head_width, args.rounds, args.repeat) < 1:
        raise InputError("expected --edges, --width, --heads, --head-width, --rounds and --repeat of at least 1.")
    args.device = check_device(args.device)
    result = dict(width=args.width, heads=args.heads, head_width=args.head_width, rounds=args.rounds, threads=torch.get_num_threads(), rows=[])
    for E in sizes:
        result["rows"].append(measure(E, args))
        save(result, args.out, given, "gat", args.device)
    result = finish(result, args.out, given, "gat", args.device)
    print(report(result))
    return result


if __name__ == "__main__":
    run(main)
