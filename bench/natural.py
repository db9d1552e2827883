"""Does the memory understand sentences that no generator wrote?  python -m bench.natural --model gemma-3-270m

bench/natural.json holds twelve small memories as people write them (notes, e-mails, a diary, a shopping list), each with
questions in other words than its sentences, and questions that it does not answer. An answer counts as right if it is one of
the accepted wordings, all of which stand in the sentence; a refusal of a question with an answer is as wrong as a wrong answer.
Nothing may be tuned on this set: no training and no threshold, or it measures nothing any more.

Intervals are Wilson's 95%, as if questions were independent; those on the same memory are not quite.
"""

import sys
import time
from pathlib import Path

import torch

from bench.common import Parser, commit, hardware, out_folder, percent, run, share, table
from bench.recall import ask, remember
from extras.memory_model import DONT_KNOW
from gemma import InputError, check_device, read_json, write_json
from memory import GemmaWithMemory

SET = Path(__file__).with_name("natural.json")
COLUMNS = {"exact": "exact", "kindly": "kindly", "first": "right episode first", "refused_wrongly": "refused wrongly",
           "unrefused": "exact if it never refused", "refused_rightly": "refused rightly"}


def accepted(question):
    """The wordings of an answer that count as right: list of str."""
    answer = question["answer"]
    return [answer] if isinstance(answer, str) else answer


def kindly(text):
    """Without case and a trailing full stop."""
    return text.strip().removesuffix(".").strip().lower()


def as_asked(memory):
    """Questions of a memory as bench.recall.ask takes them, those without an answer last; `wordings` are the accepted ones."""
    known = [dict(question=q["question"], answer=max(accepted(q), key=len), wordings=accepted(q), support=[q["fact"]], kind="lookup")
             for q in memory["questions"]]
    # An unanswerable question's "answer" only says how many tokens to make room for.
    return known + [dict(question=q, answer=DONT_KNOW, wordings=[], support=[], kind="unanswerable") for q in memory["unanswerable"]]


def measure(replies, threshold):
    """Shares over replies to questions with and without an answer. `exact` is the headline: a refusal is as wrong as a wrong answer."""
    known, unknown = ([r for r in replies if bool(r.asked["wordings"]) == answered] for answered in (True, False))
    count = lambda test, of: share(sum(map(test, of)), len(of))
    right = lambda r: r.said in r.asked["wordings"]
    return dict(exact=count(lambda r: right(r) and r.null <= threshold, known),
                kindly=count(lambda r: kindly(r.said) in map(kindly, r.asked["wordings"]) and r.null <= threshold, known),
                first=count(lambda r: r.first, known), refused_wrongly=count(lambda r: r.null > threshold, known),
                unrefused=count(right, known), refused_rightly=count(lambda r: r.null > threshold, unknown))


def misses(replies, threshold):
    """What went wrong: dicts of question, expected, said; also what a refusal would have said, and whether it found the episode."""
    for r in replies:
        refused = r.null > threshold
        wrong = refused or r.said not in r.asked["wordings"] if r.asked["wordings"] else not refused
        if wrong:
            yield dict(question=r.asked["question"], expected=r.asked["wordings"] or [DONT_KNOW], said=DONT_KNOW if refused else r.said,
                       unrefused=r.said, null=round(r.null, 3), found=r.first)


def report(result):
    """The result as Markdown: str."""
    row = lambda name, r, interval: [name, f"{r['facts']:,}", f"{r['exact']['n']:,}", *(percent(r[c], interval) for c in COLUMNS)]
    blocks = [f"Answers from sentences that people write, %; threshold {result['threshold']:.3f}; kindly: ignoring case and a full stop",
              table(["memory", "facts", "questions", *COLUMNS.values()],
                    [row(m["title"], m, False) for m in result["memories"]] + [row("all (95% intervals)", result["all"], True)])]
    shown = lambda m: (f"- {m['question']} Expected: {' / '.join(m['expected'])}; said: {m['said'] or '(nothing)'}"
                       f"{'; would have said: ' + m['unrefused'] if m['said'] != m['unrefused'] and m['expected'] != [DONT_KNOW] else ''}"
                       f"{'' if m['found'] or m['expected'] == [DONT_KNOW] else '; looked elsewhere'}")
    for m in result["memories"]:
        if m["misses"]:
            blocks += [f"Missed in {m['title']}", "\n".join(map(shown, m["misses"]))]
    return "\n\n".join(blocks)


def parse_arguments(arguments):
    parser = Parser(prog="python -m bench.natural", description="Ask a memory about sentences that people wrote, in other words than theirs.",
                    epilog="example: python -m bench.natural --model gemma-3-270m --device cuda --out out/natural-270m")
    parser.add_argument("--model", default="tiny", help="tiny, gemma-3-270m, or a folder that train.py wrote (default tiny)")
    parser.add_argument("--base", help="another place to find the base: a folder or a Hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, help="folder for natural.json (default out/natural-MODEL)")
    args = parser.parse_args(arguments)
    args.out = out_folder(args.out, "natural", args.model)
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    check_device(args.device)
    model = GemmaWithMemory.from_pretrained(args.model, args.base, device=args.device)
    started, threshold = time.time(), model.config.null_threshold
    memories, everything = [], []
    for memory in read_json(SET)["memories"]:
        asked = as_asked(memory)
        replies = ask(model, [(remember(model, memory["facts"]), asked)], batch=len(asked))
        memories.append(dict(title=memory["title"], facts=len(memory["facts"]), **measure(replies, threshold), misses=list(misses(replies, threshold))))
        everything += replies
    result = dict(command="python -m bench.natural " + " ".join(sys.argv[1:] if arguments is None else arguments), model=args.model,
                  commit=commit(), hardware=hardware(args.device), trained=model.trained, threshold=threshold, seconds=round(time.time() - started, 1),
                  all=dict(facts=sum(m["facts"] for m in memories), **measure(everything, threshold)), memories=memories)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "natural.json", result)
    print(f"{result['command']}\n{result['hardware']}, commit {result['commit']}, {result['seconds']:.0f} s\n\n{report(result)}")
    print(f"saved {args.out}/natural.json", file=sys.stderr)
    return result


if __name__ == "__main__":
    run(main)
