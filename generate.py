"""Ask questions about a text file:  python generate.py --memory facts.txt "Where does Maria live?"

Each line of the file becomes an episode of the memory; none of them is ever in the prompt. The answer goes to standard
output, character by character as it is generated, everything else to standard error. Without a question, each line that
you type (or pipe in) is answered; /help lists the commands that change the memory as you go.

The file does three things, in this order: check what the user gave us, load and remember, answer. PyTorch takes longer to
import than all the checks, so it is imported after them.
"""

import argparse
import os
import sys

import extras.threads  # noqa: F401  before torch

HELP = """\
/add FACT     remember a fact        /facts    list what is remembered, with ids
/forget ID    forget one             /why      what the last answer drew on
/clear        forget everything      /help     this
Everything else is a question. End with Ctrl-D."""
MOST_BYTES = 1 << 28                     # of a facts file: an endless one, such as /dev/zero, is refused too


# ------------------------------------------------------------------------------------------- what the user gave us

class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; see --help")


def fail(message):
    """Say what is wrong in one line, and stop."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def number(kind, good, expected):
    """An argparse type: the text as an int or float, if `good` finds it so."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value
    return parse


def parse_arguments(arguments):
    parser = Parser(description="Answer questions from a text file that is never in the prompt.",
                    epilog='example: python generate.py --memory facts.txt --why "Where does Maria live?"')
    parser.add_argument("question", nargs="?", help="what to ask; without it, every line of standard input is answered")
    parser.add_argument("--memory", metavar="FILE", help="facts to remember, one a line, UTF-8 (default: an empty memory)")
    parser.add_argument("--session", metavar="DIR", help="a conversation whose memory lasts, kept in this folder; /help in it says more")
    parser.add_argument("--remember", choices=["facts", "all", "none"], default="facts",
                        help="which lines a session remembers: statements, questions too, or only what /add says (default: facts)")
    parser.add_argument("--model", default="tiny", help="tiny, gemma-3-270m, or a folder that train.py wrote (default: tiny)")
    parser.add_argument("--base", help="another place to find the model's base: a folder or a Hub id (default: where the model says)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the base (default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--compile", action="store_true", help="compile the model: slow to start, then fast; for many questions or long answers")
    parser.add_argument("--why", action="store_true", help="show which facts each answer drew on, and how much")
    parser.add_argument("--explain", metavar="PAGE.html", help="write a page that shows what the last answer drew on, token by token")
    choice = parser.add_argument_group("choosing tokens")
    choice.add_argument("--temperature", type=number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0"), default=0.0,
                        help="0 always takes the likeliest token, 1 follows the model's probabilities (default: 0)")
    choice.add_argument("--top-k", type=number(int, lambda x: 0 <= x < 2 ** 31, "a whole number of at least 0"), default=0,
                        help="choose among the k likeliest tokens; 0 for all (default: 0)")
    choice.add_argument("--top-p", type=number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1"), default=1.0,
                        help="choose among the likeliest tokens that hold this much probability (default: 1)")
    choice.add_argument("--seed", type=number(int, lambda x: 0 <= x < 2 ** 63, "a whole number from 0 to 2**63 - 1"),
                        help="the same seed gives the same answer (default: another one each time)")
    choice.add_argument("--max-tokens", type=number(int, lambda x: 0 < x < 2 ** 31, "a whole number of at least 1"), default=64,
                        help="the longest answer (default: 64)")
    args = parser.parse_args(arguments)
    if args.question is not None and not args.question.strip():
        fail("expected a question, got an empty one; leave it out to type questions one by one.")
    if args.explain is not None and not (args.explain.endswith(".html") and os.path.isdir(os.path.dirname(args.explain) or ".")):
        fail(f"expected --explain to name an .html file in a folder that is there, got {args.explain}; name another.")
    if args.session is not None and args.memory is not None:
        fail("expected --memory or --session, got both; /import FILE puts a file's facts into a session.")
    return args


def open_at_once(path, flags):
    """An opener for open(): a pipe that nobody writes to is empty, where it would else be waited for without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def read_facts(path):
    """The lines of a UTF-8 file, as they are, without the blank ones."""
    try:
        with open(path, "rb", opener=open_at_once if hasattr(os, "O_NONBLOCK") else None) as file:
            blob = file.read(MOST_BYTES + 1)
        if len(blob) > MOST_BYTES:
            fail(f"expected at most {MOST_BYTES >> 20} MB of facts, got more in {path}; split the file.")
        text = blob.decode("utf-8-sig")
    except OSError as error:
        fail(f"expected a facts file, but {path or 'an empty name'} can't be read ({error.strerror}); give a text file with one fact a line.")
    except UnicodeDecodeError as error:
        fail(f"expected UTF-8 text in {path}, but byte {error.start} isn't; save the file as UTF-8.")
    if "\0" in text:
        fail(f"expected text in {path}, got binary data; give a text file with one fact a line.")
    facts = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
    if not facts:
        fail(f"expected facts in {path}, but it is empty; write one fact a line.")
    return facts


# ------------------------------------------------------------------------------------------------------- answering

def answer(model, question, args):
    """Print the answer as it is generated."""
    longest = model.gemma.config.max_position_embeddings // 2              # the other half of the context is for the question
    pieces = model.answer_stream([question], max_new_tokens=min(args.max_tokens, longest), temperature=args.temperature,
                                 top_k=args.top_k, top_p=args.top_p, seed=args.seed, compile=args.compile)
    for (piece,) in pieces:
        print(one_line(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print(flush=True)
    if args.explain is not None:
        from extras.explain import write_page
        write_page(model, question, args.explain)


def why(model, at_most=5, told=lambda episode: ""):
    """Lines that show what the last answer drew on: each episode's share of the attention at the end of the question,
    and before its text what `told` says of it.

    Mean over the heads; where the question was put in several hops, the hop in which the episode's share was largest.
    """
    graph = model.memory_graph
    if not model.told:
        return [f"nothing that it was told: the variant {model.variant} answers from what it was trained on"]
    if not len(graph):
        return ["nothing is remembered"]
    hops = [model.weights(hop)[0].tolist() for hop in range(getattr(model.config, "hops", 1))]      # each (N + 1,), null last
    shares = sorted(zip(map(max, zip(*hops)), graph.ids, graph.texts), key=lambda row: -row[0])
    bar = lambda share, label, text: f"{share:5.0%} {'█' * round(20 * share):░<20} {label:>4}  {text}"
    return [*(bar(share, i, told(i) + one_line(text)) for share, i, text in shares[:at_most] if share >= 0.005),
            bar(hops[-1][-1], "-", f"none of them (above {model.config.null_threshold:.0%} it says that it doesn't know)")]


def one_line(text):
    """A fact for the terminal: control characters, which could move its cursor, are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def talk(model, args, chat=None):
    """Answer line after line of standard input, by hand or from a pipe, until it ends.

    chat: an extras.session.Chat, which sees every line first, where the memory is to last.
    """
    from gemma import InputError
    by_hand = sys.stdin.isatty()
    if not by_hand:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # a bad byte is then one bad question, not the end
    say = lambda *lines: print("".join(line + "\n" for line in lines), end="", file=sys.stderr, flush=True)
    last = ["nothing was asked yet"]
    if by_hand:
        say(f"{len(model.memory_graph)} facts. Ask, or /help.")
    while True:
        try:
            line = input("> " if by_hand and sys.stdout.isatty() else "").removeprefix("\ufeff").strip()      # some editors' first character
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            elif "\0" in line:                                             # as in a facts file, which couldn't take it back
                raise InputError("expected text, got a NUL character; leave it out.")
            elif chat is not None and chat.handles(line, say):
                continue
            elif not line.startswith("/"):
                answer(model, line, args)
                last = why(model) if chat is None else why(model, told=chat.told)
                say(*last if args.why else ())
                if chat is not None:
                    chat.answered(line, say)
            elif command == "/add":
                say(f"remembered as {model.add_to_memory(rest)}")
            elif command == "/forget":
                if rest not in map(str, model.memory_graph.ids):
                    raise InputError(f"expected the id of a fact, got {rest!r}; /facts lists them.")
                model.forget(int(rest))
                say(f"forgot {rest}")
            elif command == "/facts":
                graph = model.memory_graph
                say(*(f"{i:4}  {one_line(text)}" for i, text in zip(graph.ids, graph.texts)), f"{len(graph)} facts")
            elif command == "/why":
                say(*last)
            elif command == "/clear":
                model.clear_memory()
                say("forgot everything")
            elif command == "/help":
                say(HELP)
            else:
                say(f"error: there is no command {one_line(command)}; see /help.")
        except InputError as error:
            say(f"error: {error}")


# ------------------------------------------------------------------------------------------------------------ main

def main(arguments=None):
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")                      # a terminal that lacks a character gets its number
    args = parse_arguments(arguments)
    facts = read_facts(args.memory) if args.memory is not None else []

    from gemma import InputError
    try:
        import torch
        import variants
        model = variants.load(args.model, args.base, dtype=args.dtype and getattr(torch, args.dtype), device=args.device)
        if args.explain is not None and model.variant != "graph":
            raise InputError(f"expected a graph memory for --explain, got the variant {model.variant}; --why says which facts it drew on.")
        if args.session is not None:
            if model.variant != "graph":
                raise InputError(f"expected a graph memory for --session, got the variant {model.variant}; give its facts with --memory.")
            from extras.session import converse
            return converse(model, args)
        if args.memory is not None and not model.told:
            print(f"note: --memory is ignored: the variant {model.variant} answers from what it was trained on.", file=sys.stderr)
        elif args.memory is not None and model.variant == "graph":
            from extras.episode_cache import remember_file
            remember_file(model, facts, args.memory, args.model)
        elif args.memory is not None:
            model.add_to_memory(facts, progress=True)
        if args.question is None:
            return talk(model, args)
        answer(model, args.question, args)
        if args.why:
            print(*why(model), sep="\n", file=sys.stderr)
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        fail(error)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has left (`| head`). Nothing more to say, and no complaint from Python's final flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
