"""What keeps the prefix memory from answering?  python -m bench.prefix --model tiny

Three things could: the wrong turn is found, a turn doesn't fit into the slots, or the frozen base can't read what stands before its
prompt. So prefix memories with --slots 1, 8 and 32 are trained alike, by the settings of bench.compare, and asked three times: with 4
facts told, with the right one alone, where nothing can be mistaken, and so before any training, when the slots hold means of
neighbouring words. Beside them stands the oracle: the right fact's own words where the slots would be, each as the base embeds
it, which no slots can say better without training; and the same as a line of text after three worked examples, which show the
base what an answer looks like.

Each row is saved when it is done: what ran out of time goes on with the same command, and --slots 8 does that row alone.
"""

import sys
from pathlib import Path

import torch

import variants
from bench import compare
from bench.common import Parser, commit, hardware, numbers, out_folder, percent, run, share, table
from bench.recall import ask, complete, prompt_with, remember, room_for
from gemma import BOS, InputError, check_device, read_json, write_json

TOLD, ORACLE = 4, "oracle"
ALIKE = ("model", "seed", "examples", "batch_size", "bundles", "facts", "questions", "minutes")
TITLES = {ORACLE: "its words as the base embeds them", "examples": "its words as text, after three worked examples"}


def by_itself(cell):
    """The same questions, each with a memory of its own that holds the right fact alone."""
    return [([facts[q["support"][0]]], [{**q, "support": [0]}]) for facts, asked in cell for q in asked]


def asked(model, cell, args):
    """Shares of right answers, whatever null weighs, and of the right turn first."""
    with torch.no_grad():
        replies = ask(model, [(remember(model, facts), questions) for facts, questions in cell], args.batch)
    return dict(recall=share(sum(r.right for r in replies), len(replies)), first=share(sum(r.first for r in replies), len(replies)))


def slots(K, args):
    """The row of K slots; trains them."""
    settings, config = compare.settings_of("prefix", args, args.out / f"slots-{K}", slots=K)
    torch.manual_seed(args.seed)
    model = variants.find("prefix").from_pretrained(base=args.model, config=config, device=args.device)
    cell = compare.told_and_asked(args, model.tokenizer, TOLD)
    row = dict(untrained=asked(model.eval(), by_itself(cell), args)["recall"])
    took = compare.trained("prefix", args, args.out / f"slots-{K}", slots=K)
    model = variants.load(args.out / f"slots-{K}", device=args.device)
    told = asked(model, cell, args)
    return dict(row, told=told["recall"], first=told["first"], alone=asked(model, by_itself(cell), args)["recall"],
                parameters=sum(p.numel() for p in model.trainable_parameters()), seconds=took["seconds"], examples=took["examples"])


def oracle(args):
    """The rows that need no training: {name: row}."""
    model = variants.find("none").from_pretrained(base=args.model, device=args.device)
    cell = compare.told_and_asked(args, model.tokenizer, TOLD)
    alone, encode = by_itself(cell), lambda text: model.tokenizer.encode(text, bos=False)
    prompts = [[BOS, *encode(facts[0]), *prompt_with(model, q["question"])[1:]] for facts, (q,) in alone]
    truth = [q["answer"] for _, (q,) in alone]
    said = complete(model, prompts, room_for(max(len(encode(answer)) for answer in truth)), args.batch)
    return {ORACLE: dict(untrained=share(sum(a == b for a, b in zip(said, truth)), len(truth))),
            "examples": dict(untrained=compare.answered(model, compare.PROMPT, alone, args)["recall"],
                             told=compare.answered(model, compare.PROMPT, cell, args)["recall"])}


def report(result):
    """The result as Markdown: str. A row for each way to say a turn."""
    order = sorted((int(K) for K in result["rows"] if K.isdecimal()))
    names = [*((str(K), f"{K} slot{'s' if K > 1 else ''}") for K in order), *((name, title) for name, title in TITLES.items() if name in result["rows"])]
    shown = lambda row, *what: [percent(row.get(part), True) if row.get(part) else "–" for part in what]
    rows = [[title, *shown(row := result["rows"][name], "told", "first", "alone", "untrained"), f"{row['parameters']:,}" if "parameters" in row else "–",
             f"{row['examples']:,}" if "examples" in row else "–"] for name, title in names]
    return table(["before the prompt, %", f"{TOLD} facts told", "right turn first", "right turn alone", "the same, untrained", "parameters", "examples"], rows)


def parse_arguments(arguments):
    parser = Parser(prog="python -m bench.prefix", description="What keeps the prefix memory from answering: the search, the slots, or the base?",
                    epilog="example: python -m bench.prefix --model gemma-3-270m --device cuda --workers 14 --facts 16 --minutes 4 --slots 8")
    parser.add_argument("--model", default="tiny", help="the base: tiny, gemma-3-270m, a folder, or a Hub id (default tiny)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--slots", type=numbers(1), default=[1, 8, 32], metavar="K,…", help="numbers of slots to train and measure now (default 1,8,32)")
    parser.add_argument("--out", type=Path, help="folder for prefix.json and the trained memories (default out/prefix-MODEL); rows that it holds are not done again")
    sizes = {name: compare.SIZES[name] for name in ("examples", "batch_size", "bundles", "facts", "questions", "batch")}
    compare.add_sizes(parser, sizes)
    parser.add_argument("--minutes", type=float, default=0.0, help="end each training after so many, examples or not; 0: never (default 0)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw sentences (default 0: this one)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    parser.add_argument("--quick", action="store_true", help="next to no training and few questions: does it run?")
    args = compare.sized(parser.parse_args(arguments), sizes)
    args.out = out_folder(args.out, "prefix", args.model)
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    check_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    file, settings = args.out / "prefix.json", {name: getattr(args, name) for name in ALIKE}
    result = read_json(file) if file.exists() else dict(settings=settings, rows={})
    if result.get("settings") != settings or not isinstance(result.get("rows"), dict):
        raise InputError(f"{file}: it was made with other settings, {result.get('settings')}; only equal ones compare: use the same, or name another --out.")
    result["command"] = "python -m bench.prefix " + " ".join(sys.argv[1:] if arguments is None else map(str, arguments))
    for name, measure in {ORACLE: lambda: oracle(args), **{str(K): lambda K=K: {str(K): slots(K, args)} for K in args.slots}}.items():
        if name not in result["rows"]:
            made = dict(hardware=hardware(args.device), commit=commit())
            result["rows"].update({name: dict(row, **made) for name, row in measure().items()})
            write_json(file, result)
    print(report(result))
    return result


if __name__ == "__main__":
    run(main)
