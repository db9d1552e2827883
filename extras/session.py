"""A conversation whose memory lasts:  python generate.py --session diary/

A session is a folder. `episodes.jsonl` is the truth, one change a line, only ever appended to, for any editor to read:

    {"id": 0, "time": "2025-03-01T09:30:00+00:00", "text": "Maria lives in Lisbon."}      told; or, with a known id, its new text
    {"id": 0, "time": "…", "forgotten": true}                                             no longer remembered
    {"undo": 2, "time": "…"}                                                              the last two changes didn't happen

A line counts once it is on the disk, and nothing is acknowledged before. An episode keeps its place in time whatever becomes
of it. `cache.safetensors` holds what the model made of the texts (see episode_cache.py) and may be deleted. `.lock` is held
while the file is read or written, so that two conversations in one session lose nothing and hear of each other.

`Session` is the file, and knows no model; `Chat` joins it to a model's memory and understands the commands.
"""

import json
import os
import stat
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout  # comes with huggingface_hub

import generate
from extras.episode_cache import Known, fill, keep, model_key, remember
from gemma import InputError
from memory import PART

WAIT = 30                            # seconds for another writer to finish
LARGEST_ID = 10 ** 15
TELL, FORGET, UNDO = {"id", "time", "text"}, {"id", "time", "forgotten"}, {"undo", "time"}     # the fields of a line
NEVER = (None, None)                 # what stands where nothing was told yet
HELP = """\
A statement is remembered, a question answered from all that was ever told here (--remember all | none changes that).
/add FACT      remember a fact           /facts         list what is remembered, with ids and times
/edit ID TEXT  say it in other words     /why           what the last answer drew on
/forget ID     forget one                /undo          take the last change back
/clear         forget everything         /import FILE   remember every line of a file
/help          this                      /export FILE   write what is remembered to a new file, one a line
End with Ctrl-D."""

ASKING = frozenset("who whom whose what which when where why how is are was were does did".split())


def is_question(line):
    """Ends with a question mark; or starts as questions do, and doesn't end as a sentence."""
    line = line.rstrip(" \"'”’)»")
    return line.endswith(("?", "？", "؟")) or (line.split(maxsplit=1)[:1] + [""])[0].lower() in ASKING and not line.endswith((".", "!"))


# --------------------------------------------------------------------------------------------------------- the file

class Session:
    """The episodes in a folder, which is made if it isn't there.

    episodes: {id: (text, or None once forgotten, and the time of telling)} in the order told; notes: sentences about what
    couldn't be read, to be shown once. Raises InputError where the folder can't be used.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.file = self.folder / "episodes.jsonl"
        if taken(self.folder):
            raise InputError(f"expected the folder of a session, or a new one, but {folder} holds something else; choose another.")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)     # a diary is nobody else's
            os.close(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o600))
            if not self.file.is_file():
                raise ValueError("its episodes.jsonl is no file")
            if os.name != "nt":                                            # the file's name must be on the disk too
                entry = os.open(self.folder, os.O_RDONLY)
                os.fsync(entry)
                os.close(entry)
        except (OSError, ValueError) as error:
            raise InputError(f"expected a folder to keep a session in, but {folder} can't be used ({error}); choose another.") from None
        self.lock = FileLock(self.folder / ".lock", timeout=WAIT)
        self.notes, self.seen = [], None
        self.catch_up()

    @contextmanager
    def locked(self):
        try:
            with self.lock:
                self.read()
                yield
        except Timeout:
            raise InputError(f"expected to write in {self.folder}, but another conversation has kept it for {WAIT} s; end that one.") from None
        except OSError as error:
            raise InputError(f"expected to read and write {self.file} ({error}); make room, or repair its permissions.") from None

    def catch_up(self):
        """Read what others have written since."""
        with self.locked():
            pass

    def state(self):
        """What tells whether somebody else has touched the file. Raises OSError where it has become a pipe, to be read for ever."""
        s = os.stat(self.file)
        if not stat.S_ISREG(s.st_mode):
            raise OSError("it is no file")
        return s.st_ino, s.st_size, s.st_mtime_ns

    def read(self):
        """Read the file anew if it isn't as we left it. What is no change is left out with a note, and stays in the file."""
        if self.state() == self.seen:
            return
        self.episodes, self.changes, self.next_id = {}, [], 0              # changes: (id, what stood there before, time)
        *lines, rest = self.file.read_bytes().split(b"\n")
        bad = [number for number, line in enumerate(lines, 1) if line.strip() and not self.apply(line)]
        for number in bad[:5]:
            self.notes.append(f"line {number} of {self.file} can't be read as an episode and is left out; the file is as it was.")
        if len(bad) > 5:
            self.notes.append(f"so are {len(bad) - 5} further lines.")
        self.next_id += len(bad)                                           # whatever ids they had
        self.end = self.file.stat().st_size
        self.open_line = bool(rest.strip()) and self.apply(rest)           # an editor that ends the file without a newline
        if rest and not self.open_line:
            self.notes.append(f"the last line of {self.file} was cut off and is dropped: it was never acknowledged.")
            self.end -= len(rest)
        self.seen = self.state()

    def apply(self, line):
        """Do what a line (bytes) says. Returns whether it makes sense."""
        try:
            change = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return False
        if not isinstance(change, dict):
            return False
        fields, i, text, time, undo = change.keys(), change.get("id"), change.get("text"), change.get("time"), change.get("undo")
        if time is not None and not isinstance(time, str):
            return False
        if fields <= UNDO and whole(undo, len(self.changes)):
            for _ in range(undo):
                i, before, _ = self.changes.pop()
                self.episodes[i] = before
            return True
        if not whole(i, LARGEST_ID):
            return False
        known = self.episodes.get(i, NEVER)
        if fields <= TELL and isinstance(text, str) and text.strip() and encodable(text):
            after = (text, time if known is NEVER else known[1])
        elif fields <= FORGET and change.get("forgotten") is True and known[0] is not None:
            after = (None, known[1])
        else:
            return False
        self.changes.append((i, known, time))
        self.episodes[i] = after
        self.next_id = max(self.next_id, i + 1)
        return True

    def write(self, changes):
        """Append changes, and return when they are on the disk; to be called with the lock held. All of them, or none."""
        lines = [json.dumps(change, ensure_ascii=False).encode() for change in changes]
        blob = b"\n" * self.open_line + b"".join(line + b"\n" for line in lines)
        with open(self.file, "r+b", buffering=0) as file:
            file.truncate(self.end)
            file.seek(self.end)
            try:
                at = 0
                while at < len(blob):                                      # a disk that fills up takes a part first
                    at += file.write(blob[at:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self.end)
                self.seen = None
                raise
        for line in lines:
            assert self.apply(line), f"wrote a line that can't be read: {line}"
        self.end, self.open_line, self.seen = self.end + len(blob), False, self.state()

    # -- what can be done

    def live(self):
        """[(id, text)] of what is remembered, in the order told."""
        return [(i, text) for i, (text, _) in self.episodes.items() if text is not None]

    def tell(self, texts):
        """Remember texts; returns their ids."""
        with self.locked():
            ids = list(range(self.next_id, self.next_id + len(texts)))
            self.write([dict(id=i, time=now, text=text) for now in [time_now()] for i, text in zip(ids, texts)])
        return ids

    def edit(self, i, text):
        """Give an episode another text, at its place in time. Raises InputError for an unknown id."""
        with self.locked():
            self.check(i)
            self.write([dict(id=i, time=time_now(), text=text)])

    def forget(self, ids):
        """Forget episodes; their lines stay in the file. Raises InputError for an unknown id."""
        with self.locked():
            for i in ids:
                self.check(i)
            self.write([dict(id=i, time=now, forgotten=True) for now in [time_now()] for i in ids])

    def undo(self):
        """Take back the last change: all that one command did. Returns how many episodes that touched."""
        with self.locked():
            if not self.changes:
                raise InputError("expected something to undo, but nothing was told yet.")
            last, count = self.changes[-1][2], 1
            while last is not None and count < len(self.changes) and self.changes[-1 - count][2] == last:
                count += 1
            self.write([dict(undo=count, time=time_now())])
        return count

    def check(self, i):
        if self.episodes.get(i, NEVER)[0] is None:
            raise InputError(f"expected the id of a fact, got {i!r}; /facts lists them.")


def taken(folder):
    """Whether a folder holds files, but no session. Hidden ones, such as our own lock, don't count."""
    try:
        files = {name for name in os.listdir(folder) if not name.startswith(".")}
    except OSError:                                                        # it isn't there, or will be refused for that
        return False
    return "episodes.jsonl" not in files and not files <= {"cache.safetensors"}


def whole(number, most):
    return type(number) is int and 0 <= number <= most


def encodable(text):
    try:
        return bool(text.encode())
    except UnicodeEncodeError:                                             # JSON can spell half a character
        return False


def time_now():
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


# ---------------------------------------------------------------------------------------------------- the conversation

class Chat:
    """A session in a model's memory. remembers: "facts", "all" or "none" of the lines, as --remember says."""

    def __init__(self, model, folder, remembers="facts", progress=True):
        self.model, self.remembers, self.progress = model, remembers, progress
        self.session = Session(folder)
        self.cache, self.key = self.session.folder / "cache.safetensors", model_key(model)
        self.left_out = set()                                              # (id, text) that the model can't take
        self.held = None                                                   # what the cache holds, once it was looked at
        self.sync()

    def sync(self):
        """Make the model's memory what the session says."""
        graph = self.model.memory_graph
        live = [episode for episode in self.session.live() if episode not in self.left_out]
        while self.held is None or live != (now := list(zip(graph.ids, graph.texts))):
            ids, texts = [i for i, _ in live], [text for _, text in live]
            try:
                if self.held is None:
                    self.held = fill(self.model, ids, texts, self.cache, self.key, self.progress)
                elif live[:len(now)] == now and len(live) - len(now) < PART:   # told a little more: the rest stays where it is
                    self.model.add_to_memory(texts[len(now):])
                    graph.ids, graph.next_id = ids, max(graph.next_id, ids[-1] + 1)
                else:
                    remember(self.model, ids, texts, Known.of(graph), self.progress)
            except InputError:
                self.leave_out(live)
                rest = [episode for episode in live if episode not in self.left_out]
                if rest == live:                                           # it is all of them that are too much
                    raise
                live = rest

    def leave_out(self, live):
        """Find the episodes that the model can't take, which only an editor or another model's session can have put there."""
        for i, text in live:
            try:
                self.model.token_ids(text)
            except InputError as error:
                self.left_out.add((i, text))
                self.session.notes.append(f"episode {i} is left out: {error}")

    def notes(self, say):
        while self.session.notes:
            say(f"note: {generate.one_line(self.session.notes.pop(0))}")

    def keep(self):
        """Bring the cache up to date. Not after Ctrl-C: the memory may then be in the middle of a change."""
        self.held = keep(self.cache, self.key, self.model.memory_graph, self.held)

    def told(self, episode):
        """When an episode was told, in local time, for the terminal."""
        time = self.session.episodes[episode][1] or ""
        try:
            time = datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")
        except (ValueError, OverflowError, OSError):                       # an editor's own way to write it
            pass
        return f"{generate.one_line(time):16}  "

    # -- lines

    def handles(self, line, say):
        """Do what a line says unless it is for generate.talk (a question, /why), and return whether that is so. Raises InputError."""
        self.session.catch_up()
        self.sync()
        self.notes(say)
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if self.remembers == "none" or is_question(line):
                return False
            self.add([line], say)
        elif command == "/add":
            self.add([rest], say)
        elif command == "/edit":
            i, _, text = rest.partition(" ")
            self.model.token_ids(text)
            self.session.edit(self.id(i), text)
            say(f"edited {i}")
        elif command == "/forget":
            self.session.forget([self.id(rest)])
            say(f"forgot {rest}")
        elif command == "/clear":
            self.session.forget([i for i, _ in self.session.live()])
            say("forgot everything; /undo brings it back")
        elif command == "/undo":
            say(f"took back {self.session.undo()} change(s)")
        elif command == "/facts":
            live = self.session.live()
            say(*(f"{i:4}  {self.told(i)}{generate.one_line(text)}" for i, text in live), f"{len(live)} facts")
        elif command == "/import":
            self.import_(rest, say)
        elif command == "/export":
            self.export(rest, say)
        elif command == "/help":
            say(HELP)
        else:
            return False
        self.sync()
        return True

    def answered(self, line, say):
        """A question was answered; with --remember all it becomes an episode now."""
        if self.remembers == "all":
            self.add([line], say)
            self.sync()

    def add(self, texts, say):
        lengths = list(map(len, self.model.all_token_ids(texts, self.progress)))       # what the model can't take is refused, not stored
        self.model.check_room(sum(lengths), len(lengths))
        ids = self.session.tell(texts)
        say(f"remembered as {ids[0]}" + (f" to {ids[-1]}, {len(ids)} facts" if len(ids) > 1 else ""))

    def id(self, text):
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else text

    def import_(self, path, say):
        try:
            facts = generate.read_facts(path)
        except SystemExit:                                                 # it has said what is wrong
            return
        self.add(facts, say)
        self.sync()
        self.keep()                                                        # a long import is worth keeping at once

    def export(self, path, say):
        live = self.session.live()
        if not path:
            raise InputError("expected the name of a new file after /export.")
        try:
            with open(path, "x", encoding="utf-8") as file:                # never over a file that is there
                file.writelines(" ".join(text.splitlines()) + "\n" for _, text in live)
        except (OSError, ValueError) as error:
            raise InputError(f"expected the name of a new file, but {path!r} can't be written ({error}); choose another.") from None
        say(f"wrote {len(live)} facts to {path}")


def converse(model, args):
    """What `python generate.py --session DIR` does once the model is loaded."""
    chat = Chat(model, args.session, args.remember)
    say = lambda *lines: print(*lines, sep="\n", file=sys.stderr, flush=True)
    chat.notes(say)
    if args.question is None:
        generate.talk(model, args, chat)
        chat.keep()
    else:                                                                  # asked in passing: not remembered
        generate.answer(model, args.question, args)
        if args.why:
            say(*generate.why(model, told=chat.told))
