"""The workshop: every stub fails, every solution passes, every seeded mistake is caught and named, and no learner's file breaks it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as tree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from toy import interruptible, one_thread  # noqa: F401

from exercises.__main__ import Work
from exercises.checking import BEGIN, CUT, END, Trial, check, exercises, hints, load, mistaken, run, stub

ALL = exercises()
CLOSED, OPEN = [e for e in ALL if not e.open], [e for e in ALL if e.open]
TEN_MINUTES, NEW_KIND, LAB = OPEN
each = pytest.mark.parametrize("exercise", ALL, ids=[e.path.stem for e in ALL])
each_closed = pytest.mark.parametrize("exercise", CLOSED, ids=[e.path.stem for e in CLOSED])


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "exercises", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, **options)


def solve(work, *which):
    """Put solutions into a work folder, as solved."""
    for exercise in which:
        Work.write(work.path(exercise), exercise.text)
        work.remember(f"solved {exercise.number}", work.hash(exercise))


@each
def test_stub_fails_and_hides_the_solution(exercise, tmp_path):
    """Catches a stub that passes, or one that shows the learner a solution, a hint or the list of mistakes."""
    text = stub(exercise)
    (tmp_path / exercise.name).write_text(text, encoding="utf-8")
    passed, failed, score = check(exercise, tmp_path / exercise.name)
    assert "not written yet" in failed and not passed and score is None
    assert not any(word in text for word in (BEGIN, END, CUT, "HINTS", "MISTAKES", "install"))
    assert text.count("raise NotImplementedError") == exercise.text.count(BEGIN) >= 1
    for solution in re.findall(f"{BEGIN}\n(.*?){END}", exercise.text, re.DOTALL):
        lines = [line.strip() for line in solution.split("\n") if len(line.strip()) > 45]
        assert not any(line in text for line in lines)


@each_closed
def test_solution_passes(exercise):
    """Catches a check that the solution itself fails."""
    assert check(exercise, exercise.path)[1] is None


@each
def test_labels_and_hints(exercise):
    """Catches labels or hints that are missing."""
    assert set(exercise.labels) - {"check"} == {"difficulty", "importance", "minutes", "needs"}
    assert exercise.open or 10 <= int(exercise.labels["minutes"]) <= 45
    assert len(hints(exercise)) == 3


@each_closed
def test_slow_specification_agrees(exercise):
    """Catches a specification in loops that says something else than the solution does."""
    def slowly(module):
        for name, slow in module.SLOW.items():
            setattr(module, name, getattr(module, slow))
    passed, failed, _ = check(exercise, exercise.path, values_only=True, change=slowly)
    assert failed is None and passed


@each_closed
def test_seeded_mistakes_are_named(exercise, tmp_path):
    """Catches a mistake that the checks let through, or for which they name another one."""
    names = [name for name, _, _ in load(exercise.path).MISTAKES]
    assert len(names) >= 7 and len(set(names)) == len(names)
    for name, old, new in load(exercise.path).MISTAKES:
        file = tmp_path / exercise.name
        file.write_text(mistaken(exercise, old, new), encoding="utf-8")
        failed = check(exercise, file)[1]
        assert failed is not None, f"not caught: {name}"
        assert [n for n in names if n in failed] == [name], f"{name}: {failed}"


MASK = ALL[2]


BROKEN = {                               # what a learner may write -> what they are told
    "def (": r"the file can't be read: line \d+: invalid syntax",
    "return 'hello'": "expected a Tensor, got str",
    "return queries": r"shape: expected \(6, 6\), got \(6,\)",
    "return nonsense": r"line \d+: NameError",
    "raise SystemExit": r"line \d+: SystemExit",
    "import os; os._exit(0)": "the process ended by itself",
    "print('x' * 10_000); queries += 1; return (queries[:, None] > keys) & (queries[:, None] <= keys + window)": "input 0 was changed in place",
}
ENDLESS = "while True: print('x' * 1000)"


@pytest.fixture(scope="module", autouse=True)
def running(request, tmp_path_factory):
    """The checks of broken files, as futures of (result, line of what is broken, file): they run, mostly waiting, while other tests do."""
    asked = {item.originalname for item in request.session.items}
    folder = tmp_path_factory.mktemp("broken")                             # here: in the threads, pytest could be at its own folders
    def checked(body):
        file = folder / f"{[ENDLESS, *BROKEN].index(body)}" / MASK.name
        file.parent.mkdir()
        file.write_text(stub(MASK).replace("raise NotImplementedError", body + "  #"), encoding="utf-8")
        return run(MASK, file, seconds=MASK.seconds if body == ENDLESS else 300), next(n for n, text in enumerate(file.read_text().split("\n"), 1) if body in text), file
    with ThreadPoolExecutor(2) as pool:
        yield {body: pool.submit(checked, body) for body in (ENDLESS, *BROKEN)
               if asked & {"test_endless_loop_is_stopped", "test_broken_file_gets_a_sentence"}}


# ------------------------------------------------------------------------------------------------ open-ended exercises

def scored(exercise, tmp_path, old=None, new=None, part=0.002):
    """check() of a solution, perhaps with a piece of it replaced, in a very short form."""
    file = tmp_path / exercise.name
    file.write_text(mistaken(exercise, old, new) if old else exercise.text, encoding="utf-8")
    return check(exercise, file, part=part)


def test_ten_minutes(tmp_path):
    """Catches a check of training that doesn't train, asks about what was trained on, or gives no score."""
    passed, failed, score = scored(TEN_MINUTES, tmp_path)
    assert failed is None and 0 <= score < 20                              # a second of training is next to nothing
    assert "learnt from" in passed[1] and "the frozen model is as it was" in passed[1]
    shipped = re.fullmatch(r"the shipped memory: ([\d.]+)% answered right, .*", passed[3])
    assert float(shipped[1]) > 40                                          # the same questions, by who has learnt


def test_ten_minutes_refuses(tmp_path):
    """Catches a score for what wasn't learnt in these ten minutes, and settings that end in a traceback."""
    from exercises.training import fresh, shipped
    model, usual, source = fresh({}), shipped(), load(TEN_MINUTES.path)
    base, weight = model.gemma.fingerprint(), model.injection.query_own.weight.data
    start = weight.clone()
    refused = lambda: source.refusal(model, base, start, usual)
    assert "nothing was learnt" in refused()
    weight.copy_(usual.injection.query_own.weight.data + 0.1 * start)
    assert "the shipped memory" in refused()
    weight.copy_(start.flip(0))
    assert refused() is None
    weight[0, 0] = torch.nan
    assert "not finite" in refused()
    model.gemma.layers[9].post_attention_layernorm.weight.data.add_(0.1)
    assert "the frozen model has changed" in refused()
    assert "MemoryConfig has no hopps" in scored(TEN_MINUTES, tmp_path, "dict(hops=1)", "dict(hopps=1)")[1]


def test_new_kind(tmp_path):
    """Catches a check that trains on nothing, or on other questions than it measures before and after."""
    passed, failed, score = scored(NEW_KIND, tmp_path)
    assert failed is None and 0 <= score <= 100
    before = re.fullmatch(r"the kind is new: the shipped memory answers ([\d.]+)% of its questions, ([\d.]+)% of the old kinds", passed[1])
    assert 2 * float(before[1]) < float(before[2]) > 40


@pytest.mark.parametrize("old, new, sentence", [
    ("return [told, changed], asked, before, [0]", "return old_kind(draw)", "no new kind: the shipped memory answers"),
    ("return [told, changed], asked, before, [0]", "return ['It is Lisbon.'], asked, 'Lisbon', [0]", "200 of 200 examples have the answer 'Lisbon'"),
    ("return [told, changed], asked, before, [0]", "import random; return [told, changed, str(random.random())], asked, before, [0]", "two different examples"),
])
def test_new_kind_refuses(old, new, sentence, tmp_path):
    """Catches a score for a kind that isn't new, or that needs no memory."""
    _, failed, score = scored(NEW_KIND, tmp_path, old, new)
    assert sentence in failed and score is None


@pytest.mark.parametrize("example, sentence", [
    ("a fact", "expected (facts, question, answer, needed)"),
    ((["Tom is here."], "Where?", "here", 0), "expected needed to be a list"),
    ((["Tom is here."], "Where?", "here", [1]), "one or two places in the 1 facts"),
    (([], "Where?", "here", [0]), "a list of 1 to 4 texts"),
    ((["Tom is here."], "Where?\n", "here", [0]), "texts of one line"),
    ((["Tom is here."], "Where?", "there", [0]), "does not stand in the last fact that is needed"),
    ((["Tom is here."], "Is Tom here?", "here", [0]), "holds its answer"),
    ((["Tom is here."], "Where is Tom?", "here", [0]), None),
])
def test_examples_of_a_new_kind(example, sentence):
    """Catches an example that no memory can learn from, and one that is refused though it is good."""
    wrong = load(NEW_KIND.path).problem(example)
    assert wrong is None if sentence is None else sentence in wrong


def test_failure_lab():
    """Catches runs whose fault doesn't show, a solution that can't tell it, and wrong causes that aren't contradicted by the run."""
    from exercises import lab
    solution, seen = load(LAB.path), {}
    for place, (run_, cause) in enumerate(zip(lab.runs(ROOT / "exercises" / "runs"), lab.order(3), strict=True), 1):
        seen[place] = run_
        assert solution.diagnose(run_) == cause and run_.model.config == seen[1].model.config
    for run_ in seen.values():
        for cause in set(lab.CAUSES) - {solution.diagnose(run_)}:
            assert len(solution.evidence(run_, cause)) > 60
    assert run_.new[0] not in run_.sample and sorted(lab.order(3)) == sorted(lab.CAUSES) == sorted(solution.CAUSES)


def test_failure_lab_scores(monkeypatch):
    """Catches a score for knowing the handed-out runs by heart, and one that counts other runs than the new ones."""
    from exercises import lab
    def of(seed):                                                          # stand-ins for runs: no models
        return [SimpleNamespace(seed=seed, place=place, cause=cause, ask=lambda what, facts: None) for place, cause in enumerate(lab.order(seed))]
    monkeypatch.setattr(lab, "make", lambda *_: None)
    monkeypatch.setattr(lab, "runs", lambda folder: of(3 if Path(folder).name == "runs" else 6))
    for diagnose, score in ((lambda run: run.cause, 100.0), (lambda run: lab.order(3)[run.place], 0.0),
                            (lambda run: "nothing" if (run.seed, run.place) == (6, 0) else run.cause, 75.0)):
        trial = Trial(SimpleNamespace(diagnose=diagnose, __file__=""), SimpleNamespace(diagnose=lambda run: run.cause), [])
        load(LAB.path).check(trial)
        assert trial.score == score


def test_failure_lab_refuses(tmp_path):
    """Catches a wrong cause that passes, or is refused without what speaks against it in this very run."""
    file = tmp_path / LAB.name
    for answer, sentence in (("'dead gate'", r"run 1: 'dead gate' is not it: .* weights up to \d\.\d\d"), ("'bad luck'", "expected one of nothing, closed")):
        file.write_text(stub(LAB).replace("raise NotImplementedError", f"return {answer}  #"), encoding="utf-8")
        result = run(LAB, file)
        assert re.search(sentence, result["failed"]) and result["score"] is None


def test_lab_makes_runs(tmp_path, monkeypatch):
    """Catches a command that makes other files than the lab reads, and a fault that training mends."""
    from exercises import lab
    for name, few in dict(STEPS=2, BUNDLES=24, QUESTIONS=16, SAMPLE=8).items():
        monkeypatch.setattr(lab, name, few)
    lab.main(["--seed", "6", "--out", str(tmp_path)])
    runs = list(lab.runs(tmp_path))
    assert [bool(run_.model.injection.value_map.any()) for run_ in runs] == [cause != "dead gate" for cause in lab.order(6)]
    assert [bool(run_.model.injection.token_query_own.weight.any()) for run_ in runs] == [cause != "one pooled vector" for cause in lab.order(6)]
    assert all(len(run_.sample) == 8 for run_ in runs)


# ------------------------------------------------------------------------------------------------------- the command

def test_a_learners_way_through(tmp_path):
    """Catches a state that is wrong: solved where the file has changed since, hints that don't go on, work that reset loses."""
    work = Work(tmp_path)
    listed = command("--work", tmp_path).stdout.splitlines()
    assert [line[:2] for line in listed] == [e.number for e in ALL] and all(" new " in line for line in listed)
    unsolved = command("check", "3", "--work", tmp_path)
    assert unsolved.returncode == 1 and "not written yet" in unsolved.stdout and not unsolved.stderr
    Work.write(work.path(MASK), MASK.text)
    solved = command("check", "03", "--work", tmp_path)
    assert solved.returncode == 0 and "solved. Next: 01" in solved.stdout
    assert Work(tmp_path).standing(MASK) == "solved"
    Work.write(work.path(MASK), MASK.text + "\n# changed\n")
    assert Work(tmp_path).standing(MASK) == "begun"
    assert command("next", "--work", tmp_path).stdout.startswith("01 ")
    given = [command("hint", "03", "--work", tmp_path).stdout for _ in range(4)]
    assert [h[:11] for h in given] == ["hint 1 of 3", "hint 2 of 3", "hint 3 of 3", "hint 3 of 3"]
    assert command("reset", "03", "--work", tmp_path).returncode == 0
    assert work.path(MASK).read_text() == stub(MASK) and "# changed" in (tmp_path / f"{MASK.name}.1").read_text()
    assert Work(tmp_path).standing(MASK) == "new"
    for wrong in (["check", "99"], ["check"], ["hint"], ["nonsense"], ["grade", tmp_path / "none"]):
        refused = command(*wrong, "--work", tmp_path)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_watch_checks_what_is_saved(tmp_path):
    """Catches a watch that misses a save, or that Ctrl-C ends with a traceback."""
    work = Work(tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "exercises", "watch", "--work", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
    late = threading.Timer(120, process.kill)                              # a line that never comes is an empty one then
    late.start()
    try:
        assert "watching" in process.stdout.readline()
        Work.write(work.path(MASK), MASK.text)
        lines = [process.stdout.readline() for _ in range(7)]
        assert lines[0].startswith("03 ") and "solved" in lines[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    finally:
        late.cancel()
        process.kill()


def test_use_mine(tmp_path):
    """Catches an exercise whose solution changes what the real model says, and a solved part that is never called."""
    work = Work(tmp_path)
    solve(work, *ALL)
    answered = command("--work", tmp_path, "--use-mine", "--memory", "facts.txt", "What is Maria's locker code?")
    assert answered.stdout == "4821\n" and answered.returncode == 0
    counted = """
import json, sys
from exercises.checking import exercises, load
calls = {}
for exercise in exercises():
    source, mine = load(exercise.path), load(exercise.path)
    if hasattr(source, "install"):
        for name in ("softmax_by_target", *source.SLOW):
            if hasattr(mine, name) and name != "gat":
                def count(*a, _name=name, _of=getattr(mine, name), **k):
                    calls[_name] = calls.get(_name, 0) + 1
                    return _of(*a, **k)
                setattr(mine, name, count)
                calls[name] = 0
        source.install(mine)
import generate
generate.main(["--memory", "facts.txt", "--temperature", "0.01", "--seed", "1", "What is Maria's locker code?"])
print(json.dumps(calls))
"""
    ran = subprocess.run([sys.executable, "-c", counted], cwd=ROOT, capture_output=True, text=True, timeout=120)
    answer, calls = ran.stdout.splitlines()
    assert answer == "4821" and len(json.loads(calls)) == 12 and min(json.loads(calls).values()) > 0, calls
    broken = MASK.text.replace("distance = ", "raise RuntimeError('mine')\n    distance = ")
    Work.write(work.path(MASK), broken)
    work.remember(f"solved {MASK.number}", work.hash(MASK))
    stopped = command("--work", tmp_path, "--use-mine", "--memory", "facts.txt", "Where does Maria live?")
    assert stopped.returncode == 2 and "RuntimeError: mine" in stopped.stderr and "Traceback" not in stopped.stderr


def test_grading(tmp_path):
    """Catches results that go to the wrong learner, and a report that is no XML because of what a learner wrote."""
    solve(Work(tmp_path / "in" / "ada"), MASK)
    for exercise in ALL:
        if exercise is not MASK:
            os.remove(tmp_path / "in" / "ada" / exercise.name)
    (tmp_path / "in" / "bob\x07").mkdir()
    (tmp_path / "in" / "bob\x07" / MASK.name).write_text("raise ValueError('<&\\x00\\x1b>')", encoding="utf-8")
    (tmp_path / "in" / "bob\x07" / ALL[0].name).write_text(stub(ALL[0]), encoding="utf-8")
    graded = command("grade", tmp_path / "in", "--xml", tmp_path / "out.xml")
    assert graded.returncode == 0 and re.search(r"ada +1 of 15 solved, 1 handed in", graded.stdout)
    suites = tree.parse(tmp_path / "out.xml").getroot()
    assert [(s.get("tests"), s.get("failures"), s.get("skipped")) for s in suites] == [("15", "0", "14"), ("15", "2", "13")]
    assert "<&\\x00\\x1b>" in suites[1][2][0].get("message")


def test_scores_are_graded_and_kept(tmp_path, monkeypatch, capsys):
    """Catches a score that is lost, that a short check overwrites, or that stays when the file has changed."""
    from exercises import __main__ as command_line, grade
    result = dict(passed=["run 1: dead gate"], failed=None, score=62.5, printed="")
    work = Work(tmp_path / "in" / "ada")
    monkeypatch.setattr(grade, "run_all", lambda jobs, part: [result for _ in jobs])
    assert grade.grade(tmp_path / "in", tmp_path / "out.xml", open_ended=True) == 0
    assert "18 of 18 solved, 18 handed in, 16: 62/100, 17: 62/100, 18: 62/100" in capsys.readouterr().out
    assert [p.get("value") for p in tree.parse(tmp_path / "out.xml").getroot().iter("property")] == ["62.5"] * 3
    report = lambda part, **changes: command_line.report(work, LAB, work.hash(LAB), {**result, **changes}, part)
    assert report(0.1) and work.standing(LAB) == "new" and not report(1.0, score=0.0) and report(1.0)
    assert work.standing(LAB) == "62/100" and LAB not in work.left() and "score 62.5 of 100" in capsys.readouterr().out
    assert not report(0.1, failed="run 1: wrong") and work.standing(LAB) == "62/100"
    Work.write(work.path(LAB), "changed")
    assert work.standing(LAB) == "begun"


def test_doctor(monkeypatch, capsys):
    """Catches a doctor that calls a machine without network unfit, or doesn't run the model."""
    from exercises import doctor
    def no_network(*_, **__):
        raise OSError
    monkeypatch.setattr(doctor.socket, "create_connection", no_network)
    assert doctor.doctor() == 0
    said = capsys.readouterr().out
    assert "no network" in said and "the tiny model runs" in said and "BAD" not in said


def test_endless_loop_is_stopped(running):
    """Catches a check that never ends, and one that doesn't say in which line it was."""
    result, line, file = running[ENDLESS].result()
    assert re.fullmatch(r"stopped after 15 s(, in line \d+)?; is there a loop that never ends\?", result["failed"]) and MASK.seconds * 4 / 3 <= 20
    if "in line" not in result["failed"]:                                  # a busy machine may take longer than that to start Python
        result = run(MASK, file, seconds=60)
    assert f"in line {line};" in result["failed"]


@pytest.mark.parametrize("body", BROKEN)
def test_broken_file_gets_a_sentence(body, running):
    """Catches a learner's error that ends in a traceback of ours, or in silence."""
    result, *_ = running[body].result()
    assert re.search(BROKEN[body], result["failed"]) and "\n" not in result["failed"] and len(result["printed"]) <= 4000
