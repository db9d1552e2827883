"""The command line on a toy model: what it prints where, what it refuses, and how it ends."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate
from extras.memory_model import DONT_KNOW
from gemma import END_OF_TURN, EOS
from memory import GemmaWithMemory
from toy import FACTS, interruptible, one_thread, toy_base, toy_model  # noqa: F401 (one_thread is a fixture)

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Who has a bike?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.txt"
    path.write_text("\n".join(FACTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(capsys, monkeypatch, folder):
    """main() in this process: run(*arguments, stdin=text or bytes) -> (exit code, stdout, stderr)."""
    def run(*arguments, stdin="", model=folder):
        blob = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(blob)))
        capsys.readouterr()
        try:
            code = generate.main(["--model", str(model), *map(str, arguments)]) or 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()
    return run


def command(folder, *arguments):
    return [sys.executable, str(ROOT / "generate.py"), "--model", str(folder), *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def expected(folder, question=QUESTION, facts=FACTS, dtype=None, **options):
    """What the library answers."""
    model = GemmaWithMemory.from_pretrained(folder, dtype=dtype)
    model.add_to_memory(list(facts))
    return model.answer(question, **options)


# ---------------------------------------------------------------------------------------------------------- one question

def test_first_command(folder, facts):
    """Catches a start-up that takes too long, needs a network or the repository as current folder, or talks on stdout."""
    start = time.monotonic()
    done = subprocess.run(command(folder, "--memory", facts, QUESTION), capture_output=True, text=True, cwd=facts.parent,
                          env={**ENVIRONMENT, "https_proxy": "http://localhost:9"}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected(folder) + "\n", "")
    assert time.monotonic() - start < 30                                   # under 10 s on a machine that does nothing else


def test_answer_equals_that_of_the_library(run, folder, facts):
    """Catches a command line that answers by other rules than model.answer."""
    assert run("--memory", facts, QUESTION) == (0, expected(folder) + "\n", "")
    assert run("--memory", facts, "--max-tokens", 3, QUESTION)[1] == expected(folder, max_new_tokens=3) + "\n"
    sampled = ["--memory", facts, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--max-tokens", 12, QUESTION]
    options = dict(temperature=1.5, top_k=50, top_p=0.95, max_new_tokens=12)
    assert run("--seed", 3, *sampled)[1] == run("--seed", 3, *sampled)[1] == expected(folder, seed=3, **options) + "\n"
    assert len({run("--seed", seed, *sampled)[1] for seed in range(4)}) > 1


def test_the_answer_streams(run, facts, monkeypatch):
    """Catches an answer that is printed only when it is whole."""
    class Recorder(io.StringIO):
        seen = []
        isatty = lambda self: False
        reconfigure = lambda self, **options: None

        def flush(self):
            self.seen.append(self.getvalue())

    out = Recorder()
    monkeypatch.setattr(sys, "stdout", out)
    run("--memory", facts, "--max-tokens", 8, "What belongs to Ana?")
    assert len(set(out.seen)) > 4 and all(later.startswith(sooner) for sooner, later in zip(out.seen, out.seen[1:]))


def speaks(monkeypatch, tokens):
    """Let every model say just these tokens."""
    monkeypatch.setattr(GemmaWithMemory, "stream", lambda self, ids, **options: (self._open(), self.injection.begin(ids, None, ids > 0, None),
        self.gemma(ids, None, ids > 0, injection=self.injection), iter(torch.tensor(tokens)[:, None]))[-1])


@pytest.mark.parametrize("stop", ["<eos>", "<end_of_turn>", "newline", "newline as a byte"])
def test_what_ends_an_answer(run, folder, facts, monkeypatch, stop):
    """Catches text after the end of an answer, and an answer of several lines, which a pipe would take for several answers."""
    tokenizer = GemmaWithMemory.from_pretrained(folder).tokenizer
    stop = {"<eos>": EOS, "<end_of_turn>": END_OF_TURN, "newline": tokenizer.encode("\n", bos=False)[0],
            "newline as a byte": tokenizer.pieces.piece_to_id("<0x0A>")}[stop]
    speaks(monkeypatch, tokenizer.encode(" Zoë in 東京", bos=False) + [stop] + tokenizer.encode(" more", bos=False))
    assert run("--memory", facts, QUESTION) == (0, "Zoë in 東京\n", "")


def test_terminals_get_no_control_characters(run, folder, facts, monkeypatch):
    """Catches a fact that moves the cursor or recolours the terminal of whoever asks about it; a pipe gets the text as it is."""
    tokenizer = GemmaWithMemory.from_pretrained(folder).tokenizer
    speaks(monkeypatch, tokenizer.encode(" a\x1b[2Jb", bos=False))
    assert run("--memory", facts, QUESTION)[1] == "a\x1b[2Jb\n"
    facts.write_text(facts.read_text() + "red \x1b[31m\n")
    shown = run("--memory", facts, "--why", QUESTION)[2]
    assert "red" in shown and "\x1b" not in shown
    out = io.StringIO()
    out.isatty, out.reconfigure = lambda: True, lambda **options: None
    monkeypatch.setattr(sys, "stdout", out)
    run("--memory", facts, QUESTION)
    assert out.getvalue() == "a\\x1b[2Jb\n"


def test_a_refusal_is_an_answer(run, folder, facts, tmp_path):
    """Catches a refusal that is an error, or one generated after some text was printed already."""
    careful = tmp_path / "careful"
    shutil.copytree(folder, careful)
    saved = json.loads((careful / "memory.json").read_text())
    saved["memory"]["null_threshold"] = 0.0
    (careful / "memory.json").write_text(json.dumps(saved))
    assert run("--memory", facts, QUESTION, model=careful) == (0, DONT_KNOW + "\n", "")
    assert run(QUESTION) == (0, DONT_KNOW + "\n", "")                      # and with nothing in memory


def bars(text):
    """[(percent, id or "-", text)] of the lines of --why."""
    return [(int(p), i, t) for p, i, t in re.findall(r"^ *(\d+)% [█░]{20} +(\S+)  (.*)$", text, re.M)]


def test_why(run, folder, facts):
    """Catches bars of another question, ids that don't belong to the texts, a missing null, and a first hop that is left out."""
    model = GemmaWithMemory.from_pretrained(folder)
    model.add_to_memory(FACTS)
    differ = lambda question: (model.recall(question), model.weights(0)[0, :-1].argmax() != model.weights(1)[0, :-1].argmax())[1]
    question = next(filter(differ, (f"{ask} {word}?" for ask in ("What about", "Who is", "Where was the", "") for fact in FACTS for word in fact.split())))      # whose two hops find different facts
    code, out, err = run("--memory", facts, "--why", question)
    assert (code, out) == (0, expected(folder, question) + "\n")
    *episodes, null = bars(err)
    assert len(err.splitlines()) == len(episodes) + 1 and 1 <= len(episodes) <= 5
    assert [p for p, *_ in episodes] == sorted((p for p, *_ in episodes), reverse=True)
    assert all(FACTS[int(i)] == text for _, i, text in episodes) and null[1] == "-"
    assert null[0] == round(100 * model.recall(question)[1])
    hops = [model.weights(hop)[0, :-1] for hop in range(2)]
    assert hops[0].argmax() != hops[1].argmax()
    assert {int(i) for _, i, _ in episodes} >= {int(hop.argmax()) for hop in hops}
    assert episodes[0][0] == round(100 * max(hop.max().item() for hop in hops))
    assert "nothing is remembered" in run("--why", QUESTION)[2]


@pytest.mark.parametrize("blob, stored", [
    ("\ufeffa b\nc\n".encode(), ["a b", "c"]), (b"a\r\n\r\nb", ["a", "b"]), (b"\n \n\t\n a  b \n", [" a  b "]),
    ("Zoë\u2028東京\x0bx\u0085y\n".encode(), ["Zoë\u2028東京\x0bx\u0085y"]), (b"a\rb\n", ["a", "b"]), (b"<eos>\n", ["<eos>"])])
def test_lines_of_a_facts_file(tmp_path, blob, stored):
    """Catches a byte-order mark inside the first fact, stripped or cut lines, and blank lines as facts."""
    path = tmp_path / "facts.txt"
    path.write_bytes(blob)
    assert generate.read_facts(path) == stored


def test_facts_from_a_pipe(folder, facts):
    """Catches a check for regular files that forbids `--memory <(grep …)`."""
    done = subprocess.run(["bash", "-c", '"$@" --memory <(cat "$FACTS")', "-", *command(folder, QUESTION)], capture_output=True, text=True,
                          env={**ENVIRONMENT, "FACTS": str(facts)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected(folder) + "\n", "")


def test_progress_bar_only_when_it_takes_long(run, facts, monkeypatch):
    """Catches a bar that flickers for every small file, and silence while a large one is read."""
    assert run("--memory", facts, QUESTION)[2] == ""
    clock = iter(range(10 ** 6))
    monkeypatch.setattr("tqdm.std.time", lambda: 3.0 * next(clock))
    code, out, err = run("--memory", facts, QUESTION)
    assert code == 0 and "remembering" in err and "remembering" not in out


def test_another_place_for_the_base(run, folder, facts, tmp_path):
    """Catches --base and --dtype that are accepted and ignored."""
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / "base" / name)
    assert run("--memory", facts, "--base", tmp_path / "base", QUESTION) == (0, expected(folder) + "\n", "")
    assert "other weights" in run("--memory", facts, "--base", toy_base(tmp_path / "other", seed=9), QUESTION)[2]
    assert run("--memory", facts, "--dtype", "bfloat16", QUESTION) == (0, expected(folder, dtype=torch.bfloat16) + "\n", "")


# ---------------------------------------------------------------------------------------------------------- line by line

def test_lines_from_a_pipe(run, folder, facts):
    """Catches a prompt sign or a greeting in a pipe's output, and blank lines that are answered."""
    code, out, err = run("--memory", facts, stdin=f"{QUESTION}\n\n  \nWhere does Maria live?")
    assert (code, out, err) == (0, f"{expected(folder)}\n{expected(folder, 'Where does Maria live?')}\n", "")
    assert run(stdin="") == (0, "", "")


def test_commands(run, folder):
    """Catches a command that is answered as a question, prints to stdout, or leaves the memory as it was."""
    lines = ["/why", "/help", "/facts", "/add Ana works in Oslo.", "/add  Two  spaces \x1b[2J", "/facts", QUESTION, "/why", "/forget 0", "/facts",
             QUESTION, "/add", "/forget 0", "/forget x", "/forget", "/nonsense \x1b[2J", "/clear", "/facts", QUESTION, "/add Again.", "/facts"]
    code, out, err = run(stdin="\n".join(lines))
    first, second = "Ana works in Oslo.", " Two  spaces \x1b[2J"
    assert code == 0
    assert out.splitlines() == [expected(folder, facts=[first, second]), expected(folder, facts=[second]), DONT_KNOW]
    shown = " Two  spaces \\x1b[2J"
    parts = ["nothing was asked yet", *generate.HELP.splitlines(), "0 facts", "remembered as 0", "remembered as 1", f"   0  {first}",
             f"   1  {shown}", "2 facts", "WHY", "forgot 0", f"   1  {shown}", "1 facts", "error: .*", "error: .*", "error: .*", "error: .*",
             "error: .*", "forgot everything", "0 facts", "remembered as 2", "   2  Again.", "1 facts"]
    special = {"error: .*": "error: .*\n", "WHY": r"(?: *\d+% [█░]{20} .*\n)+"}
    assert re.fullmatch("".join(special.get(p, re.escape(p) + "\n") for p in parts), err), err
    assert {text for _, i, text in bars(err) if i != "-"} == {first, shown}
    for name in re.findall(r"/\w+", generate.HELP):
        assert "no command" not in run(stdin=name)[2]


def test_why_is_about_the_last_answer(run, facts):
    """Catches /why that looks at the memory as it is now, and --why that works for the first question only."""
    _, _, err = run("--memory", facts, stdin=f"{QUESTION}\n/clear\n/why\n")
    assert bars(err)[-1][1] == "-" and bars(err)[0][2] in FACTS
    _, _, err = run("--memory", facts, "--why", stdin=f"{QUESTION}\nWhere does Maria live?\n/clear\n{QUESTION}\n")
    assert sum(i == "-" for _, i, _ in bars(err)) == 2 and err.endswith("nothing is remembered\n")


def test_a_bad_line_is_one_error(run, folder, facts):
    """Catches a line that ends the whole conversation: bytes that are no UTF-8, a question or fact longer than the context."""
    long = "word " * 200
    code, out, err = run("--memory", facts, stdin=b"caf\xe9?\n" + f"{long}\n/add {long}\n{QUESTION}\n".encode())
    assert (code, out) == (0, expected(folder) + "\n")
    assert len(err.splitlines()) == 3 and all(line.startswith("error: ") for line in err.splitlines())


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_by_hand(folder, facts):
    """Catches a prompt sign that is missing by hand or lands in a redirected stdout, and an end of input that isn't quiet."""
    import pty
    for redirected in (False, True):
        ours, theirs = pty.openpty()
        out = subprocess.PIPE if redirected else theirs
        process = subprocess.Popen(command(folder, "--memory", facts, "--max-tokens", 4), stdin=theirs, stdout=out, stderr=theirs, env=ENVIRONMENT)
        os.write(ours, f"{QUESTION}\n".encode() + b"\x04")
        printed = process.communicate(timeout=60)[0]
        os.close(theirs)
        terminal = b""
        try:
            while chunk := os.read(ours, 4096):
                terminal += chunk
        except OSError:                                                    # Linux says so when the other end is closed
            pass
        os.close(ours)
        answer = expected(folder, max_new_tokens=4).encode()
        assert process.returncode == 0 and b"Traceback" not in terminal and b"8 facts" in terminal
        if redirected:
            assert printed == answer + b"\n" and b"> " not in terminal
        else:
            assert answer in terminal and terminal.count(b"> ") >= 2


# ---------------------------------------------------------------------------------------------------------- how it ends

@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_quiet(folder, facts):
    """Catches a traceback on Ctrl-C."""
    process = subprocess.Popen(command(folder, "--memory", facts), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=ENVIRONMENT, preexec_fn=interruptible)
    process.stdin.write(f"{QUESTION}\n")
    process.stdin.flush()
    assert process.stdout.readline() == expected(folder) + "\n"            # answered while the input is still open
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("merge", ["", "2>&1"])
def test_a_broken_pipe_is_quiet(folder, facts, merge):
    """Catches a traceback, or Python's own complaint at exit, when `| head` has read enough."""
    lines = f"{QUESTION}\n/facts\n" * 50
    script = f'"$@" {merge} | head -c 1 >/dev/null; echo "status ${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", script, "-", *command(folder, "--memory", facts, "--max-tokens", 4)], input=lines,
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.stdout == "status 0\n"
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr and "Exception" not in done.stderr


# ------------------------------------------------------------------------------------------------------------ bad input

@pytest.fixture
def refused(run, tmp_path):
    """Run, and check that it is refused as promised: one sentence, exit code 2, nothing written. Returns the sentence."""
    def refused(*arguments, **options):
        files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        code, out, err = run(*arguments, **options)
        assert (code, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err), (code, out, err)
        assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        return err
    return refused


@pytest.mark.parametrize("blob, says", [
    (None, "can't be read"), (b"", "empty"), (b" \n\n\t", "empty"), ("\ufeff".encode(), "empty"), ("café".encode("latin-1"), "UTF-8"),
    ("Maria lives in Lisbon.".encode("utf-16"), "UTF-8"), ("Maria".encode("utf-16-le"), "binary"), (b"\x89PNG\r\n\x1a\n\0\0", "UTF-8"),
    (b"fact\nnull \0 byte", "binary"), (b"good fact.\n" + b"word " * 200, "at most 128 tokens")])
def test_bad_facts_files(refused, tmp_path, blob, says):
    """Catches a traceback, or a quiet start without the facts."""
    path = tmp_path / "facts.txt"
    if blob is not None:
        path.write_bytes(blob)
    assert says in refused("--memory", path, QUESTION)
    assert says in refused("--memory", path)                               # as well without a question


def test_a_folder_as_facts_file(refused, tmp_path):
    """Catches IsADirectoryError."""
    assert "can't be read" in refused("--memory", tmp_path, QUESTION)
    for name in ("x" * 5000, ""):
        assert "can't be read" in refused("--memory", name, QUESTION)


@pytest.mark.parametrize("arguments", [
    ["--temperature", "-1"], ["--temperature=-0.1"], ["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "hot"], ["--top-p", "1.1"],
    ["--top-p", "0"], ["--top-p", "nan"], ["--top-k", "-1"], ["--top-k", "1.5"], ["--top-k", "9" * 30], ["--max-tokens", "0"], ["--max-tokens", "many"],
    ["--seed", "-1"], ["--seed", "9" * 30], ["--dtype", "float7"], ["--device", "toaster"], ["--device", ""], ["--nonsense"], ["one", "two"], ["--memory"]])
def test_bad_arguments(refused, arguments):
    """Catches argparse's own two-line message, and a number that only the sampler, or nobody, refuses."""
    assert len(refused(QUESTION, *arguments)) > 20


@pytest.mark.parametrize("question", ["", " ", "\n", "word " * 200, "caf\udce9"])
def test_bad_questions(refused, facts, question):
    """Catches an empty prompt, and a question that is cut to the context without a word."""
    assert "expected" in refused("--memory", facts, question)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the GPU that this test asks for in vain")
def test_no_gpu(refused, facts):
    """Catches PyTorch's own assertion."""
    assert "cuda" in refused("--memory", facts, "--device", "cuda", QUESTION)


def test_unknown_models(refused, facts, tmp_path, monkeypatch):
    """Catches a message that doesn't say what would work."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nonsense", "nobody/nothing", str(facts), str(tmp_path), ""):
        assert "'tiny'" in refused(QUESTION, model=name)
    for name in ("nonsense", "nobody/nothing", str(facts), "", "x" * 5000):
        assert refused("--base", name, QUESTION)
    assert refused(QUESTION, model="x" * 5000)


def edit(name, change):
    def apply(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))
    return apply


def patch(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGE = {
    "weights cut short": patch("model.safetensors", lambda b: b[:-100]),
    "weights empty": patch("model.safetensors", lambda b: b""),
    "weights with a lying header": patch("model.safetensors", lambda b: b"\xff" * 8 + b[8:]),
    "weights with another name": patch("model.safetensors", lambda b: b.replace(b"layers.0.mlp", b"layers.9.mlp")),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "memory cut short": patch("memory.safetensors", lambda b: b[:-100]),
    "memory with another dtype": patch("memory.safetensors", lambda b: b.replace(b'"F32"', b'"I32"')),
    "memory with NaN": patch("memory.safetensors", lambda b: b[:-2] + b"\xc0\x7f"),
    "config without a field": edit("config.json", lambda c: c.pop("head_dim")),
    "config with a wrong field": edit("config.json", lambda c: c.update(num_hidden_layers="four")),
    "config of another shape": edit("config.json", lambda c: c.update(sliding_window=9)),
    "config that is no JSON": patch("config.json", lambda b: b[:40]),
    "config gone": lambda folder: (folder / "config.json").unlink(),
    "tokenizer gone": lambda folder: (folder / "tokenizer.model").unlink(),
    "tokenizer broken": patch("tokenizer.model", lambda b: b[:100]),
    "another tokenizer": patch("tokenizer.model", lambda b: b.replace(b"<unused7>", b"<unused#>")),
    "memory settings without a field": edit("memory.json", lambda c: c["memory"].pop("hops")),
    "memory settings with a wrong field": edit("memory.json", lambda c: c["memory"].update(heads=2.5)),
    "memory settings nested too deep": patch("memory.json", lambda b: b"[" * 100_000),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models(refused, folder, facts, tmp_path, name):
    """Catches a damaged file that is loaded, or refused with a traceback."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    DAMAGE[name](broken)
    refused("--memory", facts, "--base", broken, QUESTION, model=broken)


def test_help_and_argument_errors_are_quick(tmp_path):
    """Catches torch imported before the arguments are checked: three seconds to learn of a typing error."""
    (tmp_path / "empty.txt").write_text("")
    script = ("import sys, generate\n"
              "for arguments in (['--help'], ['--top-p', '2'], [''], ['--memory', 'empty.txt', 'Who?'], ['--nonsense']):\n"
              "    try: generate.main(arguments)\n"
              "    except SystemExit as end: print(end.code)\n"
              "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-6:] == ["0", "2", "2", "2", "2", ""] and "example: python generate.py" in done.stdout
    assert len(done.stderr.splitlines()) == 4
