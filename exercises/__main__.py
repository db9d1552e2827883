"""Exercises that check themselves:  python -m exercises"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from exercises.checking import SHORT, exercises, hints, load, run, run_all, stub
from generate import Parser, fail

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "workshop"
EPILOG = """commands:
  (none)         list the exercises: number, state, title, labels
  next           the first exercise that isn't solved yet
  check 03       check exercise 03; exits 1 if it isn't solved; check all: every one that can be solved. Open-ended ones have
                 a score instead, and their checks take minutes; with --short a tenth of that, for a look
  hint 03        a hint; again: the next one, three in all
  reset 03       start again; what was there is kept beside it
  watch [03]     check whatever is saved, until Ctrl-C; an open-ended exercise only where it is named, as with --short
  doctor         is this machine ready?
  grade FOLDER   check a folder of submissions, one folder a learner; --xml FILE writes JUnit XML; --open: open-ended ones too
  --use-mine ... as generate.py, with your solved parts in the model: --use-mine --memory facts.txt "Where does Maria live?"
"""


# ------------------------------------------------------------------------------------------------- the work folder

class Work:
    """The learner's folder: one file an exercise, and state.json: which version of each file passed or what it scored, how many
    hints were given."""

    def __init__(self, folder):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for exercise in exercises():
                if not self.path(exercise).exists():
                    self.write(self.path(exercise), stub(exercise))
        except OSError as error:
            fail(f"expected to write to {folder}, but can't ({error.strerror}); give another folder with --work.")
        try:
            self.state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.state = {}                                                # nothing in it that another check doesn't bring back
        if not isinstance(self.state, dict):
            self.state = {}

    def path(self, exercise):
        return self.folder / exercise.name

    @staticmethod
    def write(path, text):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def remember(self, key, value):
        self.state[key] = value
        self.write(self.folder / "state.json", json.dumps(self.state, indent=1))

    def hash(self, exercise):
        try:
            return hashlib.sha256(self.path(exercise).read_bytes()).hexdigest()
        except OSError:
            return ""                                                      # the check will say what is wrong with it

    def standing(self, exercise):
        """new (the stub as it was), begun, solved (this very file passed), or, of an open-ended exercise, this very file's score."""
        if self.state.get(f"solved {exercise.number}") == (now := self.hash(exercise)):
            score = self.state.get(f"score {exercise.number}")
            return f"{score:.0f}/100" if exercise.open and isinstance(score, (int, float)) else "solved"
        return "new" if now == hashlib.sha256(stub(exercise).encode()).hexdigest() else "begun"


    def left(self):
        """The exercises that are neither solved nor have a score, in order."""
        return [e for e in exercises() if self.standing(e) in ("new", "begun")]


def find(number):
    """The exercise of that number, "3" or "03"."""
    known = exercises()
    for exercise in known:
        if number is not None and exercise.number == number.zfill(2):
            return exercise
    fail(f"expected the number of an exercise, {known[0].number} to {known[-1].number}, got {number or 'none'}; "
         "python -m exercises lists them.")


def here(path):
    """A path as one would type it from the folder one is in."""
    return os.path.relpath(path) if Path.cwd() in path.parents else str(path)


# ---------------------------------------------------------------------------------------------------- the commands

def line(work, exercise):
    labels = exercise.labels
    return (f"{exercise.number}  {work.standing(exercise):<7}  {exercise.title:<48}  {labels['difficulty']}, "
            f"importance {labels['importance']}, {labels['minutes']} min, needs {labels['needs']}"
            + (f", a check takes {labels['check']}" if exercise.open else ""))


def check(work, exercise, part=1.0):
    """Check and print; True if solved, or if there is a score above 0."""
    before = work.hash(exercise)
    return report(work, exercise, before, run(exercise, work.path(exercise), part, show=True), part)


def report(work, exercise, before, result, part=1.0):
    """Print what a check found in the file whose hash was `before`; True if solved, or if there is a score above 0."""
    print(f"{exercise.number}  {exercise.title}  ({here(work.path(exercise))})")
    for name in result["passed"]:
        print(f"  ok    {name}")
    if result["printed"]:
        print("  your file printed:", *result["printed"].rstrip().split("\n"), sep="\n  | ")
    if result["failed"]:
        print(f"  FAIL  {result['failed']}")
        return False
    if exercise.open:
        print(f"  score {result['score']:.1f} of 100" + (", of a short check: it is not kept" if part < 1 else ""))
        if part == 1:
            work.remember(f"score {exercise.number}", result["score"])
            work.remember(f"solved {exercise.number}", before)
        return result["score"] > 0
    work.remember(f"solved {exercise.number}", before)
    left = work.left()
    print("  solved." + (f" Next: {left[0].number}" if left else " That was the last one."))
    return True


def show(work, exercise):
    print(line(work, exercise))
    print(f"edit {here(work.path(exercise))}, then: python -m exercises check {exercise.number}{'' if work.folder == WORK else f' --work {here(work.folder)}'}")


def hint(work, exercise):
    three = hints(exercise)
    given = work.state.get(f"hints {exercise.number}", 0)
    level = min(given + 1 if isinstance(given, int) else 1, len(three))
    work.remember(f"hints {exercise.number}", level)
    print(f"hint {level} of {len(three)}: {three[level - 1]}")


def reset(work, exercise):
    path = work.path(exercise)
    if work.standing(exercise) != "new":
        kept = next(p for n in range(1, 10_000) if not (p := path.with_name(f"{path.name}.{n}")).exists())
        shutil.move(path, kept)
        print(f"kept what was there as {here(kept)}")
    work.write(path, stub(exercise))
    for key in ("solved", "score", "hints"):
        work.remember(f"{key} {exercise.number}", None)
    show(work, exercise)


def watch(work, chosen):
    """Check each file when it is saved."""
    seen = {e: work.hash(e) for e in chosen}                               # before anybody is told to save
    print("watching", here(work.folder), "- save a file to check it; Ctrl-C ends", flush=True)
    while True:
        time.sleep(0.3)
        for exercise in chosen:
            if (now := work.hash(exercise)) and now != seen[exercise]:
                seen[exercise] = now
                check(work, exercise, SHORT if exercise.open else 1.0)
                sys.stdout.flush()


def use_mine(work, arguments):
    """generate.py, with the learner's solved functions in place of the model's own."""
    solved = [e for e in exercises() if work.standing(e) == "solved"]
    fitting = [(e, source) for e in solved if hasattr(source := load(e.path), "install")]
    print("yours:", ", ".join(e.title for e, _ in fitting) or "nothing yet; solve an exercise first", file=sys.stderr)
    for exercise, source in fitting:
        source.install(load(work.path(exercise)))
    import generate
    try:
        generate.main(arguments)
    except Exception as error:
        fail(f"with your parts the model stopped ({type(error).__name__}: {error}); check them again, or reset the one that is at fault.")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    own, rest = arguments, None
    if "--use-mine" in arguments:
        at = arguments.index("--use-mine")
        own, rest = arguments[:at], arguments[at + 1:]
    import argparse
    parser = Parser(prog="python -m exercises", description="Exercises that check themselves.", epilog=EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ["list", "next", "check", "hint", "reset", "watch", "doctor", "grade"]
    parser.add_argument("command", nargs="?", default="list", choices=commands, metavar="command", help=", ".join(commands))
    parser.add_argument("which", nargs="?", help="the number of an exercise, or the folder to grade")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"where your files are (default: {WORK.name}/ beside the code)")
    parser.add_argument("--xml", type=Path, metavar="FILE", help="grade: write JUnit XML here")
    parser.add_argument("--short", action="store_true", help="of open-ended exercises: a look in a tenth of the time")
    parser.add_argument("--open", action="store_true", help="grade: open-ended exercises too, which takes minutes each")
    args = parser.parse_args(own)
    part = SHORT if args.short else 1.0
    if args.command == "doctor":
        from exercises.doctor import doctor
        return doctor()
    if args.command == "grade":
        from exercises.grade import grade
        return grade(args.which, args.xml, args.open, part)
    work = Work(args.work.resolve())
    if rest is not None:
        return use_mine(work, rest)
    if args.command == "list":
        for exercise in exercises():
            print(line(work, exercise))
        return 0
    if args.command == "watch":
        return watch(work, [find(args.which)] if args.which else [e for e in exercises() if not e.open])
    if args.command == "next":
        left = work.left()
        if left:
            show(work, left[0])
        else:
            print("all solved")
        return 0
    if (args.command, args.which) == ("check", "all"):
        closed = [e for e in exercises() if not e.open]
        before = [work.hash(e) for e in closed]
        results = run_all([(e, work.path(e)) for e in closed])
        return 0 if all([report(work, *found) for found in zip(closed, before, results)]) else 1
    exercise = find(args.which)
    if args.command == "check":
        return 0 if check(work, exercise, part) else 1
    {"hint": hint, "reset": reset}[args.command](work, exercise)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                                # the reader, say `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
