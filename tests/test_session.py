"""Conversations that last: the file, the cache, the commands, and what all of it survives. On a toy model where any will do."""

import errno
import functools
import io
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import generate
import memory
from bench import sessions
from extras import episode_cache
from extras.episode_cache import Known, load, model_key, remember, save
from extras.session import Chat, HELP, Session, is_question, taken
from gemma import InputError
from memory import GemmaWithMemory
from toy import FACTS, one_thread, toy_model  # noqa: F401 (one_thread is a fixture)

QUESTION = "Who has a bike?"
anywhere = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def model(toy):
    return GemmaWithMemory.from_pretrained(toy)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "diary"


@pytest.fixture
def never_encodes(monkeypatch):
    """From now on no model can encode a fact."""
    def forbid():
        monkeypatch.setattr(GemmaWithMemory, "encode", lambda *a, **k: pytest.fail("a fact was encoded again"))
    return forbid


@pytest.fixture
def run(capsys, monkeypatch, toy):
    """main() in this process: run(*arguments, stdin=text) -> (exit code, stdout, stderr)."""
    def run(*arguments, stdin="", model=toy):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        try:
            code = generate.main(["--model", str(model), *map(str, arguments)]) or 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()
    return run


load_once = functools.lru_cache(GemmaWithMemory.from_pretrained)


def answer(toy, facts, question=QUESTION):
    """What the library answers, without any file."""
    model = load_once(toy)
    model.clear_memory()
    model.add_to_memory(list(facts))
    return model.answer(question)


# --------------------------------------------------------------------------------------------------------- the file

operations = st.lists(st.one_of(
    st.tuples(st.just("tell"), st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3)),
    st.tuples(st.just("edit"), st.integers(0, 9), st.text(min_size=1).filter(str.strip)),
    st.tuples(st.just("forget"), st.integers(0, 9)), st.tuples(st.just("undo")), st.tuples(st.just("clear"))), max_size=15)


@anywhere
@given(operations=operations)
def test_the_file_says_what_was_done(tmp_path_factory, operations):
    """Catches a change that is lost, done twice or undone wrongly when the session is opened again, and text that breaks a line."""
    folder = tmp_path_factory.mktemp("session")
    session, now, past, used = Session(folder), [], [], 0
    for name, *what in operations:
        try:
            if name == "tell":
                ids = session.tell(what[0])
                assert ids == list(range(used, used + len(ids)))
                used, new = used + len(ids), now + list(zip(ids, what[0]))
            elif name == "edit":
                session.edit(*what)
                new = [(i, what[1] if i == what[0] else t) for i, t in now]
            elif name == "undo":
                session.undo()
                new = past.pop()
            elif name == "forget" or now:
                gone = what or [i for i, _ in now]
                session.forget(gone)
                new = [(i, t) for i, t in now if i not in gone]
        except InputError:
            assert name == "undo" and not past or name != "undo" and what[0] not in dict(now)
            continue
        if name != "undo" and (name != "clear" or now):
            past.append(now)
        now = new if name != "clear" or now else now
        assert session.live() == Session(folder).live() == now
    assert Session(folder).notes == []


def test_a_line_cut_at_any_byte(folder):
    """Catches a torn last line that keeps a session from opening, takes an earlier one with it, or is glued to the next."""
    session = Session(folder)
    session.tell(["Zoë keeps bees.", "Tom is a baker."])
    whole = session.file.read_bytes()
    first, second = whole.index(b"\n") + 1, len(whole)
    for cut in range(len(whole) + 1):
        session.file.write_bytes(whole[:cut])
        again = Session(folder)
        count = (cut >= first - 1) + (cut >= second - 1)                   # a line that only lacks its newline is whole
        assert [text for _, text in again.live()] == ["Zoë keeps bees.", "Tom is a baker."][:count]
        torn = cut not in (0, first - 1, first, second - 1, second)
        assert [("cut off" in note) for note in again.notes] == [True] * torn
        again.tell(["Afterwards."])
        assert Session(folder).notes == [] and [t for _, t in Session(folder).live()][count:] == ["Afterwards."]


@anywhere
@given(lines=st.lists(st.one_of(st.binary(max_size=60), st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["id", "text", "time", "forgotten", "undo", "x"]), inner, max_size=5)),
    max_leaves=12).map(lambda value: json.dumps(value).encode())), max_size=6))
def test_anything_as_a_file(tmp_path_factory, lines):
    """Catches a traceback, or a session that can't be gone on with, whatever an editor or a disk made of the file."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "episodes.jsonl").write_bytes(b"\n".join(lines))
    session = Session(folder)
    before = session.live()
    assert all(type(i) is int and text.strip() for i, text in before)
    (new,) = session.tell(["Afterwards."])
    assert new not in dict(before) and Session(folder).live() == [*before, (new, "Afterwards.")]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "9" * 5000 + ', "text": "x"}', '{"id": true, "text": "x"}', '{"id": -1, "text": "x"}',
                                  '{"id": 0, "text": "\\ud800"}', '{"id": 0, "text": " "}', '{"id": 7, "forgotten": true}', '{"undo": 5}', '{"id": 0, "text": NaN}'])
def test_lines_that_make_no_sense(folder, line):
    """Catches RecursionError, numbers without end, a bool as an id, half a character, and a note that doesn't name the line."""
    Session(folder).tell(["Good."])
    with open(folder / "episodes.jsonl", "a") as file:
        file.write(line + "\n" + '{"id": 50, "text": "By hand."}\n')
    session = Session(folder)
    assert [t for _, t in session.live()] == ["Good.", "By hand."] and len(session.notes) == 1 and "line 2 " in session.notes[0]


def test_on_the_disk_before_it_counts(folder, monkeypatch):
    """Catches an episode that is acknowledged from the page cache, and half an import left behind by a full disk."""
    session = Session(folder)
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (synced.append(os.fstat(f).st_size), real(f)))
    session.tell(["Safe."])
    assert synced == [session.file.stat().st_size]

    def full(f):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    before = session.file.read_bytes()
    with pytest.raises(InputError, match="make room"):
        session.tell(["Lost."] * 3)
    assert session.file.read_bytes() == before
    monkeypatch.setattr(os, "fsync", real)
    session.tell(["Again."])
    assert [t for _, t in session.live()] == [t for _, t in Session(folder).live()] == ["Safe.", "Again."]


def test_two_writers(folder):
    """Catches an id given twice, a line overwritten, and a conversation that doesn't hear of another."""
    mine, theirs = Session(folder), Session(folder)
    assert mine.tell(["A."]) == [0] and theirs.tell(["B.", "C."]) == [1, 2] and mine.tell(["D."]) == [3]
    theirs.catch_up()
    assert theirs.live() == mine.live() == list(enumerate(["A.", "B.", "C.", "D."]))

    def write(name):
        session = Session(folder)
        for n in range(60):
            session.tell([name + str(n)])
    writers = [multiprocessing.get_context("fork").Process(target=write, args=name) for name in "xy"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    told = Session(folder).live()[4:]
    assert sorted(t for _, t in told) == sorted(name + str(n) for name in "xy" for n in range(60))
    assert [i for i, _ in told] == list(range(4, 124))


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_killed_at_random_moments(model):
    """Catches an acknowledged change that a kill takes with it. The long form: python -m bench.sessions kills --times 200."""
    found = sessions.kills(model, 12)
    assert found["lost"] == 0 and found["kills"] == 12 and found["acknowledged"] > 0


def test_results_are_kept(toy, tmp_path, capsys):
    """Catches a figure that nobody can quote, and a loss that is none."""
    sessions.main(["kills", "--times", "1", "--model", str(toy), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "sessions.json").read_text())["kills"] == 1 and '"lost": 0' in capsys.readouterr().out


def test_a_large_session(toy, tmp_path):
    """Catches an import that loses facts or keeps no cache. The long form: python -m bench.sessions large."""
    found = sessions.large(str(toy), 300, tmp_path, times=1)
    assert found["opened"][0]["facts"] == 300 and 0 < found["bytes_per_fact"]["episodes.jsonl"] < found["bytes_per_fact"]["cache.safetensors"]


def test_every_byte_flipped(model):
    """Catches a traceback, a silent loss, and a wrong tensor that nobody notices. The whole cache: python -m bench.sessions flips."""
    found = sessions.flips(model, cache_step=19)
    assert found["bytes"] == found["unchanged"] + found["as_edited"] + found["noted"] > 250 and found["cache_refused"] > 100


# -------------------------------------------------------------------------------------------------------- the cache

def opened(toy, folder, **options):
    model = GemmaWithMemory.from_pretrained(toy, **options)
    return Chat(model, folder, progress=False)


def test_opened_from_the_cache(toy, folder, never_encodes):
    """Catches a cache that is written and never used, or gives other answers, and a file that safetensors can't read."""
    chat = opened(toy, folder)
    chat.session.tell(FACTS)
    chat.sync()
    said, keys = chat.model.answer(QUESTION), chat.model.memory_graph.tokens.keys.clone()
    chat.keep()
    assert said == answer(toy, FACTS)
    assert set(load_file(folder / "cache.safetensors")) == {"texts", "lengths", "ids", "keys", "nodes"}
    never_encodes()
    again = opened(toy, folder).model
    assert torch.equal(again.memory_graph.tokens.keys, keys) and again.answer(QUESTION) == said


def test_only_what_is_new_is_encoded(toy, folder, monkeypatch):
    """Catches a session that encodes everything again after one line was forgotten, edited, brought back or told."""
    chat, session = opened(toy, folder), None
    session = chat.session
    session.tell(FACTS)
    chat.sync()
    chat.keep()
    encoded, encode = [], GemmaWithMemory.encode
    monkeypatch.setattr(GemmaWithMemory, "encode", lambda self, facts, *rest: (encoded.extend(facts), encode(self, facts, *rest))[1])
    changes = [(lambda: session.forget([3]), 0), (lambda: session.edit(1, "Tom's code is 7."), 1), (session.undo, 1), (session.undo, 1),
               (lambda: session.tell(["Last."]), 1), (lambda: session.tell(["Last."]), 1)]
    for change, count in changes:
        encoded.clear()
        change()
        chat.sync()
        assert len(encoded) == count
        encoded.clear()
        texts = [t for _, t in session.live()]
        assert chat.model.memory_graph.texts == texts and chat.model.answer(QUESTION) == answer(toy, texts)
    chat.keep()
    encoded.clear()
    assert opened(toy, folder).model.memory_graph.texts == texts and encoded == []


DAMAGE = {
    "gone": lambda path, key, graph: path.unlink(),
    "cut short": lambda path, key, graph: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path, key, graph: path.write_bytes(b""),
    "lying header": lambda path, key, graph: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "one bit": lambda path, key, graph: path.write_bytes(path.read_bytes()[:-5] + bytes([path.read_bytes()[-5] ^ 1]) + path.read_bytes()[-4:]),
    "a folder": lambda path, key, graph: (path.unlink(), path.mkdir()),
    "a pipe": lambda path, key, graph: (path.unlink(), os.mkfifo(path)),
    "of another model": lambda path, key, graph: save(path, "0" * 64, graph),
}


@pytest.mark.skipif(os.name == "nt", reason="pipes")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_cache_that_can_not_be_used(toy, folder, name):
    """Catches a missing, damaged or foreign cache that is believed, waited for, or keeps the session shut."""
    chat = opened(toy, folder)
    chat.session.tell(FACTS)
    chat.sync()
    keys = chat.model.memory_graph.tokens.keys.clone()
    chat.keep()
    DAMAGE[name](chat.cache, chat.key, chat.model.memory_graph)
    for _ in range(2):
        again = opened(toy, folder)
        assert torch.equal(again.model.memory_graph.tokens.keys, keys) and again.model.answer(QUESTION) == answer(toy, FACTS)
        again.keep()


def test_other_weights_other_cache(toy, model):
    """Catches a cache that outlives the memory, or the settings, it was made with; dtype and device don't count."""
    key = model_key(model)
    assert key == model_key(GemmaWithMemory.from_pretrained(toy)) == model_key(GemmaWithMemory.from_pretrained(toy, dtype=torch.bfloat16))
    with torch.no_grad():
        model.injection.match_key.weight[0, 0] += 1
    assert model_key(model) != key


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_a_bf16_cache_serves_a_cpu(toy, folder, device, never_encodes):
    """Catches a cache whose dtype or device is that of the machine that wrote it."""
    chat = opened(toy, folder, dtype=torch.bfloat16, device=device)
    chat.session.tell(FACTS)
    chat.sync()
    chat.keep()
    never_encodes()
    graph = opened(toy, folder).model.memory_graph
    assert graph.tokens.keys.dtype == torch.float16 and graph.nodes.dtype == torch.float32 and torch.equal(graph.tokens.keys, chat.model.memory_graph.tokens.keys.cpu())
    assert graph.texts == FACTS


def test_a_folder_that_can_not_hold_a_cache(toy, folder, monkeypatch):
    """Catches a full disk under the cache that ends the conversation or leaves half a file."""
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(episode_cache, "replacing", full)
    chat = opened(toy, folder)
    chat.session.tell(FACTS)
    chat.sync()
    chat.keep()
    assert {p.name for p in folder.iterdir()} == {"episodes.jsonl", ".lock"}
    assert opened(toy, folder).model.answer(QUESTION) == answer(toy, FACTS)


def test_sessions_know_nothing_of_each_other(toy, folder, tmp_path):
    """Catches a cache, a model or a file that carries facts from one session into another: also where it was copied there."""
    chats = []
    for name, facts in (("one", FACTS[:5]), ("two", FACTS[3:])):
        chat = opened(toy, tmp_path / name)
        chat.session.tell(facts)
        chat.sync()
        chat.keep()
        chats.append(chat)
    chats[0].cache.replace(chats[1].cache)
    again = opened(toy, tmp_path / "two").model
    assert again.memory_graph.texts == chats[1].model.memory_graph.texts == FACTS[3:]
    assert again.answer(QUESTION) == chats[1].model.answer(QUESTION) == answer(toy, FACTS[3:])
    assert chats[0].model.answer(QUESTION) == answer(toy, FACTS[:5])


def test_training_after_a_cache(toy, model):
    """Catches a memory from a cache that can't be trained, or keys that aren't made anew from the changed weights."""
    remember(model, range(len(FACTS)), FACTS, Known.of(model.memory_graph))
    keys = model.memory_graph.tokens.keys.clone()
    model.train().eval()
    torch.testing.assert_close(model.memory_graph.tokens.keys, keys)
    with torch.no_grad():
        model.injection.match_key.weight.mul_(-1)
    assert not torch.allclose(model.train().eval().memory_graph.tokens.keys, keys)


def test_pieces_are_as_the_whole(model, monkeypatch):
    """Catches rows that end up at another episode when known and new ones alternate, or parts are put together, and states of
    all facts at once in memory."""
    texts = [f"{fact} {n}" for n in range(4) for fact in FACTS]
    mixed = texts[:10] + texts[14:] + texts[12:14] + texts[15:16]
    whole, added = (GemmaWithMemory(model.gemma, model.tokenizer, model.config).eval() for _ in range(2))
    for other in (whole, added):
        other.injection.load_state_dict(model.injection.state_dict())
    whole.add_to_memory(mixed)
    sizes, encode = [], GemmaWithMemory.encode
    monkeypatch.setattr(memory, "PART", 3)
    monkeypatch.setattr(GemmaWithMemory, "encode", lambda self, facts, *rest: (sizes.append(len(facts)), encode(self, facts, *rest))[1])
    remember(model, range(8, 16), texts[8:16], Known.of(model.memory_graph))
    remember(model, range(len(mixed)), mixed, Known.of(model.memory_graph))
    added.add_to_memory(mixed)
    assert max(sizes) == 3
    for got in (model.memory_graph, added.memory_graph):
        assert got.texts == whole.memory_graph.texts and torch.equal(got.tokens.ids, whole.memory_graph.tokens.ids)
        torch.testing.assert_close(got.tokens.keys, whole.memory_graph.tokens.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got.nodes, whole.memory_graph.nodes)
    assert list(episode_cache.runs([None, None, 3, 4, 6, 5, None])) == [(0, 2), (2, 4), (4, 5), (5, 6), (6, 7)]


def test_a_large_facts_file_is_encoded_once(run, toy, tmp_path, monkeypatch, never_encodes):
    """Catches --memory that doesn't use the cache, an edited file that is answered from the old one, and a cache per edit."""
    cache, file = tmp_path / "cache", tmp_path / "facts.txt"
    monkeypatch.setenv("GEMMA_MEMORY_CACHE", str(cache))
    facts = [f"Tom's number {n} is {n * n}." for n in range(episode_cache.WORTH_KEEPING)]
    write = lambda lines: file.write_text("\n".join(lines) + "\n")
    write(FACTS)
    run("--memory", file, QUESTION)
    assert not cache.exists()                                              # a small one isn't worth a file
    write(facts + FACTS)
    first = run("--memory", file, QUESTION)
    write(facts[:-1] + FACTS[:2])
    shorter = run("--memory", file, QUESTION)
    assert shorter == (0, answer(toy, facts[:-1] + FACTS[:2]) + "\n", "") and first == (0, answer(toy, facts + FACTS) + "\n", "")
    assert len(list(cache.rglob("*.safetensors"))) == 1
    never_encodes()
    assert run("--memory", file, QUESTION) == shorter
    monkeypatch.undo()
    monkeypatch.setenv("GEMMA_MEMORY_CACHE", str(file))                    # a file where the folder should be
    assert run("--memory", file, QUESTION)[:2] == shorter[:2]


# -------------------------------------------------------------------------------------------------- the conversation

def test_a_conversation_goes_on(run, toy, folder):
    """Catches a restart that forgets, a fact or a question on the wrong side of the line, and anything but answers on stdout."""
    code, out, err = run("--session", folder, stdin=f"{FACTS[0]}\n{FACTS[2]}\n{QUESTION}\n")
    assert (code, out, err) == (0, answer(toy, [FACTS[0], FACTS[2]]) + "\n", "remembered as 0\nremembered as 1\n")
    code, out, err = run("--session", folder, stdin=f"{FACTS[3]}\n{QUESTION}\n")
    facts = [FACTS[0], FACTS[2], FACTS[3]]
    assert (code, out, err) == (0, answer(toy, facts) + "\n", "remembered as 2\n")
    assert run("--session", folder, QUESTION) == (0, answer(toy, facts) + "\n", "")
    assert [t for _, t in Session(folder).live()] == facts
    assert not set(HELP.splitlines()) - set(run("--session", folder, stdin="/help\n")[2].splitlines())


def test_commands(run, folder, tmp_path):
    """Catches a command that does nothing, does too much, shows no time, or can't be taken back."""
    (tmp_path / "facts.txt").write_text("One.\nTwo.\nThree.\n")
    lines = ["Zero \x1b[2J.", f"/import {tmp_path / 'facts.txt'}", "/facts", "/forget 2", "/edit 1 Uno.", f"/export {tmp_path / 'out.txt'}",
             f"/export {tmp_path / 'out.txt'}", "/undo", "/undo", "/undo", "/facts", "/clear", "/facts", "/undo", "/facts", "/undo", "/undo", "/edit 9 x",
             "/edit 0", "/forget x", f"/import {tmp_path / 'none.txt'}", "/add", "/nonsense", QUESTION, "/why"]
    code, out, err = run("--session", folder, stdin="\n".join(lines))
    time = r"20\d\d-\d\d-\d\d \d\d:\d\d  "
    fact = lambda i, text: rf"   {i}  {time}{re.escape(text)}"
    zero = fact(0, "Zero \\x1b[2J.")
    expected = ["remembered as 0", "remembered as 1 to 3, 3 facts", zero, fact(1, "One."), fact(2, "Two."), fact(3, "Three."), "4 facts", "forgot 2",
                "edited 1", "wrote 3 facts to .*", "error: .*", r"took back 1 change\(s\)", r"took back 1 change\(s\)", r"took back 3 change\(s\)",
                zero, "1 facts", "forgot everything; .*", "0 facts", r"took back 1 change\(s\)", zero, "1 facts", r"took back 1 change\(s\)", "error: .*",
                "error: .*", "error: .*", "error: .*", "error: .*", "error: .*", "error: .*", "nothing is remembered"]
    assert code == 0 and len(err.splitlines()) == len(expected), err
    for line, pattern in zip(err.splitlines(), expected):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert out == "I don't know.\n"
    assert (tmp_path / "out.txt").read_text() == "Zero \x1b[2J.\nUno.\nThree.\n"
    assert re.search(rf"% .* 9  {time}Ana\.", run("--session", folder, "--why", stdin=f"Ana.\n{QUESTION}\n")[2].replace("   4  ", "   9  "))


@pytest.mark.parametrize("mode, stored", [("facts", ["Ana works.", "a note"]), ("all", ["Ana works.", "Who works?", "a note"]), ("none", ["a note"])])
def test_what_is_remembered(run, folder, mode, stored):
    """Catches --remember that is accepted and ignored, and a question that is remembered before it is answered."""
    out = run("--session", folder, "--remember", mode, stdin="Ana works.\nWho works?\n/add a note\n")[1]
    assert [t for _, t in Session(folder).live()] == stored and len(out.splitlines()) == 1 + (mode == "none")
    folder = folder.with_name("empty")
    assert run("--session", folder, "--remember", mode, stdin="Who?\n")[1] == "I don't know.\n"


@pytest.mark.parametrize("line, question", [
    ("Where does Maria live?", True), ("where does maria live", True), ("Maria lives where？", True), ('He asked "why?"', True), ("Is Ana here", True),
    ("When I was young I lived in Oslo.", False), ("How nice!", False), ("Maria lives in Lisbon", False), ("What's up doc.", False), ("?", True), ("\"", False)])
def test_questions(line, question):
    """Catches a question without its mark that is stored, and a fact that starts like a question and isn't."""
    assert is_question(line) is question


def test_more_than_the_machine_can_hold(toy, folder, monkeypatch):
    """Catches a conversation that tries for ever to remember what does not fit, and an import that is stored before it is refused."""
    chat, lines = opened(toy, folder), []
    (folder / "facts.txt").write_text("Maria lives in Lisbon.\n" * 20_000)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 20 if name == "SC_PHYS_PAGES" else 4)     # a machine of 4 MB
    with pytest.raises(InputError, match="20,000 that need"):
        chat.handles(f"/import {folder / 'facts.txt'}", lines.append)
    assert chat.session.live() == []
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    chat.session.tell(FACTS)
    with pytest.raises(InputError, match="8 that need"):
        chat.sync()


def test_what_the_model_can_not_take(run, folder):
    """Catches a fact that is stored first and refused then, which would keep the session shut for ever; and one that an editor wrote."""
    long = "word " * 200
    code, out, err = run("--session", folder, stdin=f"{long}\nGood.\n")
    assert code == 0 and re.fullmatch("error: .*at most 128 tokens.*\nremembered as 0\n", err)
    with open(folder / "episodes.jsonl", "a") as file:
        file.write(json.dumps(dict(id=1, text=long)) + "\n" + json.dumps(dict(id=2, text="Better.", time="a while ago \x1b")) + "\n")
    code, out, err = run("--session", folder, stdin="/facts\n")
    assert code == 0 and re.search("note: episode 1 is left out: expected a fact of at most 128", err) and "a while ago \\x1b" in err


def test_what_a_file_could_not_take_back(run, folder, tmp_path):
    """Catches a character that /export writes and /import refuses, and a byte order mark that becomes part of the first fact."""
    code, out, err = run("--session", folder, stdin=f"\ufeffMaria lives in Lisbon.\nTom\0 lives in Porto.\n/export {tmp_path / 'out.txt'}\n/export\n")
    assert code == 0 and "NUL character" in err and "the name of a new file after /export" in err
    assert (tmp_path / "out.txt").read_bytes() == b"Maria lives in Lisbon.\n"


def test_an_edit_with_an_editor_counts(run, toy, folder):
    """Catches a cache that is believed over the text."""
    run("--session", folder, stdin="\n".join(FACTS[:4]))
    file = folder / "episodes.jsonl"
    file.write_text(file.read_text().replace("Maria lives in Lisbon.", "Maria drinks green tea."), encoding="utf-8")
    facts = ["Maria drinks green tea.", *FACTS[1:4]]
    assert run("--session", folder, QUESTION) == (0, answer(toy, facts) + "\n", "")


def test_folders_that_are_none(run, tmp_path):
    """Catches a traceback for a file, a pipe or a folder in the session's place, and --memory beside a session."""
    (tmp_path / "file").write_text("")
    (tmp_path / "a" / "episodes.jsonl").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "episodes.jsonl")
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "a", tmp_path / "b", "x" * 5000):
        code, out, err = run("--session", path, QUESTION)
        assert (code, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / ".hidden").write_text("a file browser's")
    assert not taken(tmp_path / "e")
    (tmp_path / "e" / "novel.txt").write_text("mine")
    code, out, err = run("--session", tmp_path / "e", QUESTION)
    assert (code, out) == (2, "") and "holds something else" in err and {file.name for file in (tmp_path / "e").iterdir()} == {".hidden", "novel.txt"}
    session = Session(tmp_path / "d")
    session.file.unlink()
    os.mkfifo(session.file)                                                # while it is open
    with pytest.raises(InputError, match="no file"):
        session.catch_up()
    code, out, err = run("--session", tmp_path / "c", "--memory", tmp_path / "file", QUESTION)
    assert code == 2 and "/import" in err and not (tmp_path / "c").exists()


def test_told_long_ago(tmp_path):
    """Catches a memory that is full after an evening. With real weights: python -m bench.sessions evening --model gemma-3-270m."""
    assert sessions.evening("tiny", tmp_path)["answer"] == "4821"
