"""The workshop: every stub fails, every solution passes, every seeded mistake is caught and named, and no learner's file breaks it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as tree

import pytest
from conftest import ROOT
from toy import interruptible, one_thread  # noqa: F401

from exercises.__main__ import Work
from exercises.checking import BEGIN, CUT, END, check, exercises, hints, load, mistaken, run, stub

ALL = exercises()
each = pytest.mark.parametrize("exercise", ALL, ids=[e.path.stem for e in ALL])


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
    passed, failed = check(exercise, tmp_path / exercise.name)
    assert "not written yet" in failed and not passed
    assert not any(word in text for word in (BEGIN, END, CUT, "HINTS", "MISTAKES", "install"))
    assert text.count("raise NotImplementedError") == exercise.text.count(BEGIN) >= 1
    for solution in re.findall(f"{BEGIN}\n(.*?){END}", exercise.text, re.DOTALL):
        lines = [line.strip() for line in solution.split("\n") if len(line.strip()) > 45]
        assert not any(line in text for line in lines)


@each
def test_solution_passes(exercise):
    """Catches a check that the solution itself fails, and labels or hints that are missing."""
    assert check(exercise, exercise.path)[1] is None
    assert set(exercise.labels) == {"difficulty", "importance", "minutes", "needs"} and 10 <= int(exercise.labels["minutes"]) <= 45
    assert len(hints(exercise)) == 3


@each
def test_slow_specification_agrees(exercise):
    """Catches a specification in loops that says something else than the solution does."""
    def slowly(module):
        for name, slow in module.SLOW.items():
            setattr(module, name, getattr(module, slow))
    passed, failed = check(exercise, exercise.path, values_only=True, change=slowly)
    assert failed is None and passed


@each
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


@pytest.mark.parametrize("body, sentence", [
    ("def (", r"the file can't be read: line \d+: invalid syntax"),
    ("return 'hello'", "expected a Tensor, got str"),
    ("return queries", r"shape: expected \(6, 6\), got \(6,\)"),
    ("return nonsense", r"line \d+: NameError"),
    ("raise SystemExit", r"line \d+: SystemExit"),
    ("import os; os._exit(0)", "the process ended by itself"),
    ("print('x' * 10_000); queries += 1; return (queries[:, None] > keys) & (queries[:, None] <= keys + window)", "input 0 was changed in place"),
])
def test_broken_file_gets_a_sentence(body, sentence, tmp_path):
    """Catches a learner's error that ends in a traceback of ours, or in silence."""
    file = tmp_path / MASK.name
    file.write_text(stub(MASK).replace("raise NotImplementedError", body + "  #"), encoding="utf-8")
    result = run(MASK, file)
    assert re.search(sentence, result["failed"]) and "\n" not in result["failed"] and len(result["printed"]) <= 4000


def test_endless_loop_is_stopped(tmp_path):
    """Catches a check that never ends, and one that doesn't say in which line it was."""
    file, loop, start = tmp_path / MASK.name, "while True: print('x' * 1000)", time.time()
    file.write_text(stub(MASK).replace("raise NotImplementedError", loop + "  #"), encoding="utf-8")
    line = next(n for n, text in enumerate(file.read_text().split("\n"), 1) if loop in text)
    failed = run(MASK, file)["failed"]
    assert f"in line {line}" in failed and "loop" in failed and time.time() - start < 20


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
    try:
        assert "watching" in process.stdout.readline()
        Work.write(work.path(MASK), MASK.text)
        lines = [process.stdout.readline() for _ in range(7)]
        assert lines[0].startswith("03 ") and "solved" in lines[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130 and "Traceback" not in process.stderr.read()
    finally:
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


def test_doctor(monkeypatch, capsys):
    """Catches a doctor that calls a machine without network unfit, or doesn't run the model."""
    from exercises import doctor
    def no_network(*_, **__):
        raise OSError
    monkeypatch.setattr(doctor.socket, "create_connection", no_network)
    assert doctor.doctor() == 0
    said = capsys.readouterr().out
    assert "no network" in said and "the tiny model runs" in said and "BAD" not in said
