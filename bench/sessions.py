"""What a session survives, and what a large one costs:

    python -m bench.sessions kills --times 200         # conversations killed at random moments: is anything acknowledged lost?
    python -m bench.sessions flips                     # every byte of a small session and of its cache damaged, one at a time
    python -m bench.sessions large --facts 100000      # a large file imported, and the session opened again
    python -m bench.sessions evening                   # a fact, 120 other turns, the process ended, a new one asked

Each prints one line of figures and writes it to a file, or stops with exit code 1 at the first loss.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

import generate
import variants
from bench.common import ROOT, Parser, commit, hardware, out_folder, run, write_json
from extras.episode_cache import Known, load, model_key, remember
from extras.memory_model import SHIPPED
from extras.session import Chat, Session
from gemma import InputError, read_json
from memory import GemmaWithMemory


class Loss(Exception):
    """Something that was acknowledged is gone, or what is wrong was not noticed."""


# ------------------------------------------------------------------------------------------------------------- kills

def commands(rng, live, folder, count):
    """Random lines for a conversation about `live` episodes [(id, text)], with their states: [(line, [(id, text)] after it)].

    States follow from what the commands mean, not from extras/session.py. The ids of new episodes are left open: None.
    """
    out, past = [], []
    for n in range(count):
        kind = rng.choice(["tell", "tell", "tell", "edit", "forget", "undo", "import"])
        text = f"{rng.choice(['Maria', 'Tom', 'Zoë', 'Ana'])} keeps number {rng.randrange(10 ** 6)} in the {rng.choice(['red', 'blue'])} box."
        known = [i for i, _ in live if i is not None]
        before = live
        if kind in ("edit", "forget") and not known or kind == "undo" and not past:
            kind = "tell"
        if kind == "tell":
            line, live = text, [*live, (None, text)]
        elif kind == "import":
            facts = [f"Part {part} of {n}: {text}" for part in range(rng.randrange(2, 40))]
            file = folder / f"import{n}.txt"
            file.write_text("\n".join(facts) + "\n", encoding="utf-8")
            line, live = f"/import {file}", [*live, *((None, fact) for fact in facts)]
        elif kind == "undo":
            line, live = "/undo", past.pop()
            out.append((line, live))
            continue
        else:
            i = rng.choice(known)
            line = f"/edit {i} {text}" if kind == "edit" else f"/forget {i}"
            live = [(j, text if j == i else t) for j, t in live if kind == "edit" or j != i]
        past.append(before)
        out.append((line, live))
    return out


def converse_in_child(model, folder):
    """Fork a conversation that reads from a pipe. Returns its process id, a file to write lines to, and one of its notes."""
    lines, ours = os.pipe()
    theirs, notes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(ours)
            os.close(theirs)
            tqdm.set_lock(threading.RLock())                               # its own is shared with us, who would wait for it after the kill
            sys.stdin, sys.stderr = open(lines, encoding="utf-8"), open(notes, "w", encoding="utf-8")
            chat = Chat(model, folder, progress=False)
            print("open", file=sys.stderr, flush=True)
            generate.talk(model, argparse.Namespace(why=False), chat)
            chat.keep()
        except BaseException as error:                                     # whatever happens, the copy ends here
            print(f"error: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.close(lines)
    os.close(notes)
    return child, open(ours, "w", encoding="utf-8"), open(theirs, encoding="utf-8")


def kill_once(model, folder, scratch, rng):
    """One conversation, killed at a random moment: while it opens, or some milliseconds after it said one of its first sentences.
    Returns how many of its commands were acknowledged, and whether a line was torn."""
    live = Session(folder).live()
    script = commands(rng, live, scratch, 60)
    child, lines, notes = converse_in_child(model, folder)
    lines.write("".join(line + "\n" for line, _ in script))
    lines.close()
    said = [notes.readline().rstrip("\n") for _ in range(rng.choice([0, *[rng.randrange(1, 60)] * 4]))]
    time.sleep(rng.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    said += notes.read().splitlines()
    notes.close()
    os.waitpid(child, 0)
    if any("error" in line for line in said):
        raise Loss(f"a command was refused: {said}")
    acknowledged = sum(line.startswith(("remembered", "edited", "forgot", "took back")) for line in said)
    session = Session(folder)
    now = session.live()
    states = [live, *(state for _, state in script)]
    same = lambda state: len(state) == len(now) and all(t == u and i in (None, j) for (i, t), (j, u) in zip(state, now))
    # What was acknowledged is there; the next command may have been written too, and of an import, a part.
    after = states[acknowledged]
    following = states[acknowledged + 1] if acknowledged < len(script) else after
    part = following[:len(now)] if len(after) <= len(now) <= len(following) and following[:len(after)] == after else after
    if not (same(after) or same(following) or same(part)):
        raise Loss(f"{acknowledged} commands were acknowledged, but {folder} holds {now} instead of {after}")
    if len(set(i for i, _ in now)) != len(now):
        raise Loss(f"an id was given twice: {now}")
    return acknowledged, any("cut off" in note for note in session.notes)


def kills(model, times, seed=0):
    """Returns a dict of what happened. Raises Loss."""
    torch.set_num_threads(1)                                               # threads don't survive a fork
    rng, acknowledged, torn, before_opening = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for n in range(times):
            folder = Path(scratch) / f"session{n // 20}"
            done, cut = kill_once(model, folder, Path(scratch), rng)
            acknowledged, torn, before_opening = acknowledged + done, torn + cut, before_opening + (done == 0)
            if n % 20 == 19 or n == times - 1:
                check_keys(model, folder)
    return dict(kills=times, acknowledged=acknowledged, lost=0, torn_lines=torn, before_any_acknowledgement=before_opening)


def check_keys(model, folder):
    """Raise Loss unless a session opened with its cache has the keys that its texts have."""
    Chat(model, folder, progress=False)
    graph = model.memory_graph
    keys, ids = graph.tokens.keys, graph.ids
    texts = list(graph.texts)
    model.clear_memory()
    remember(model, ids, texts, Known.of(graph), progress=False)
    if keys.shape != graph.tokens.keys.shape or not torch.allclose(keys, graph.tokens.keys, rtol=2e-3, atol=1e-3):     # float16
        raise Loss(f"{folder}: the cache holds other keys than the texts give")
    model.clear_memory()


# ------------------------------------------------------------------------------------------------------------- flips

def flips(model, seed=0, cache_step=1):
    """Damage every byte of a small session, and every `cache_step`-th of its cache. Returns a dict; raises Loss."""
    rng, texts = random.Random(seed), ["Maria lives in Lisbon.", "Zoë keeps bees."]
    found = dict(bytes=0, unchanged=0, as_edited=0, noted=0, cache_bytes=0, cache_refused=0, cache_the_same=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "session"
        chat = Chat(model, folder, progress=False)
        chat.session.tell(texts)
        chat.session.forget([0])
        chat.session.undo()
        chat.sync()
        chat.keep()
        model.clear_memory()
        live, file = chat.session.live(), chat.session.file
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ rng.randrange(1, 256)]) + whole[i + 1:])
            session = Session(folder)
            kind = "noted" if session.notes else "unchanged" if session.live() == live else "as_edited"
            if not session.notes and len(session.live()) + 1 < len(live):
                raise Loss(f"byte {i}: an episode is gone without a word")
            session.tell(["Told afterwards."])                             # a damaged session can be gone on with
            if Session(folder).live()[-1][1] != "Told afterwards.":
                raise Loss(f"byte {i}: what is told after the damage is lost")
            found["bytes"], found[kind] = found["bytes"] + 1, found[kind] + 1
        file.write_bytes(whole)
        cache, key = folder / "cache.safetensors", model_key(model)
        whole, good = cache.read_bytes(), load(cache, key)
        if good.hashes == []:
            raise Loss("the cache that was just written isn't taken")
        good = good.hashes, *(t.clone() for t in (good.tokens.ids, good.tokens.keys, good.tokens.lengths, good.nodes))
        for i in range(0, len(whole), cache_step):
            cache.unlink()                                                 # a new file: the old one may still be mapped
            cache.write_bytes(whole[:i] + bytes([whole[i] ^ rng.randrange(1, 256)]) + whole[i + 1:])
            got = load(cache, key)
            if got.hashes:
                got = got.hashes, got.tokens.ids, got.tokens.keys, got.tokens.lengths, got.nodes
                if got[0] != good[0] or not all(map(torch.equal, got[1:], good[1:])):
                    raise Loss(f"byte {i} of the cache: a wrong tensor, unnoticed")
                found["cache_the_same"] += 1
            else:
                found["cache_refused"] += 1
            found["cache_bytes"] += 1
    return found


# ------------------------------------------------------------------------------------------------------------- large

OPEN = """
import json, resource, sys, time
import torch
from extras.session import Chat
from memory import GemmaWithMemory
start = time.time()
model = GemmaWithMemory.from_pretrained(sys.argv[2])
loaded, busy = time.time(), time.process_time()
chat = Chat(model, sys.argv[1])
opened, busy = time.time(), time.process_time() - busy
answer = model.answer("What is the code of locker 4821?")
asked = time.time()
again = model.answer("What is the code of locker 99?")
print(json.dumps(dict(model_s=round(loaded - start, 2), session_s=round(opened - loaded, 2), session_cpu_s=round(busy, 2), first_answer_s=round(asked - opened, 2),
      next_answer_s=round(time.time() - asked, 2), facts=len(model.memory_graph), peak_GB=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 1))))
"""


def large(name, facts, folder, times=3):
    """Import `facts` facts by the command line, then open the session again, so many times. Returns a dict.

    The load average (processes that wanted a processor in the last minute) says how far the seconds are to be trusted."""
    rng, folder = random.Random(0), Path(folder)
    file = folder / "facts.txt"
    file.write_text("".join(f"The code of locker {i} is {rng.randrange(10 ** 6)}.\n" for i in range(facts)))
    session = folder / "session"
    start = time.time()
    subprocess.run([sys.executable, "generate.py", "--model", name, "--session", session], input=f"/import {file}\n", text=True, cwd=ROOT, check=True)
    imported, load = time.time() - start, os.getloadavg()[0]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    sizes = {path: (session / path).stat().st_size / facts for path in ("episodes.jsonl", "cache.safetensors")}
    opened = [json.loads(subprocess.run([sys.executable, "-c", OPEN, session, name], capture_output=True, text=True, cwd=ROOT, check=True).stdout)
              for _ in range(times)]
    return dict(facts=facts, import_s=round(imported), import_cpu_s=round(used.ru_utime + used.ru_stime), import_peak_GB=round(used.ru_maxrss / 2 ** 20, 1),
                import_load=round(load, 1), bytes_per_fact={k: round(v) for k, v in sizes.items()}, opened=opened, opened_load=round(os.getloadavg()[0], 1))


# ----------------------------------------------------------------------------------------------------------- evening

def evening(name, folder):
    """Tell a fact, go on for 120 turns (80 facts, 40 questions), and ask for it in a new process. Returns a dict."""
    people = "Ana Ben Carla David Eva Felix Gina Hugo Iris Jonas Karin Leo Nora Nils Olga Paul Rita Sven Tina Uwe".split()
    kinds = (("{} lives in {}.", "Oslo Rome Paris Vienna"), ("Where does {} live?", "-"), ("{} works as a {}.", "baker nurse pilot"),
             ("{}'s favourite drink is {}.", "cocoa water milk"), ("What does {} work as?", "-"), ("{} was born in {}.", "May June July"))
    turns = [kind.format(person, values.split()[i % len(values.split())]) for kind, values in kinds for i, person in enumerate(people)]
    command = [sys.executable, "generate.py", "--model", name, "--session", Path(folder) / "diary", "--max-tokens", "8"]
    told = subprocess.run(command, input="\n".join(["Maria's locker code is 4821.", *turns]), capture_output=True, text=True, cwd=ROOT, check=True)
    asked = subprocess.run([*command, "What is Maria's locker code?"], capture_output=True, text=True, cwd=ROOT, check=True)
    return dict(turns=len(turns), remembered=told.stderr.count("remembered as"), answered=len(told.stdout.splitlines()), answer=asked.stdout.strip())


def main(arguments=None):
    parser = Parser(prog="python -m bench.sessions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "flips", "large", "evening"])
    parser.add_argument("--model", default="tiny", help="a memory (default: tiny)")
    parser.add_argument("--times", type=int, default=200, help="of kills (default: 200)")
    parser.add_argument("--facts", type=int, default=100_000, help="of large (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for sessions.json (default out/sessions-WHAT-MODEL)")
    args = parser.parse_args(arguments)
    if args.facts < 1:
        raise InputError(f"expected --facts of at least 1, got {args.facts}.")
    if variants.find(read_json(Path(SHIPPED.get(args.model, args.model)) / "memory.json").get("variant", "graph")).variant != "graph":
        raise InputError(f"expected a graph memory, which alone has sessions, got {args.model}; name another as --model.")
    out, start = out_folder(args.out, f"sessions-{args.what}", args.model), time.time()
    try:
        if args.what in ("large", "evening"):
            with tempfile.TemporaryDirectory() as folder:
                found = large(args.model, args.facts, folder) if args.what == "large" else evening(args.model, folder)
        else:
            torch.set_num_threads(1)
            model = GemmaWithMemory.from_pretrained(args.model)
            found = kills(model, args.times, seed=args.seed) if args.what == "kills" else flips(model, args.seed)
    except Loss as loss:
        sys.exit(print(f"error: {loss}", file=sys.stderr) or 1)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sessions.json", dict(command="python -m bench.sessions " + " ".join(sys.argv[1:] if arguments is None else arguments),
                                           commit=commit(), hardware=hardware(), seconds=round(time.time() - start), **found))
    print(f"{json.dumps(found)} ({hardware()}, {time.time() - start:.0f} s)")


if __name__ == "__main__":
    run(main)
