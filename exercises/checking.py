"""Reads the exercises in source/, makes the learner's stubs from them, and checks what the learner made of these.

One file in source/ is a whole exercise, from top to bottom: what to do in words (its docstring, with a line of labels), a
slow specification in loops, the function to write, whose body lies between two marker lines, and, below CUT, what the learner
does not get to see: HINTS, MISTAKES, `check` and `install`. A mistake is (its name, a piece of the solution, what a learner
may write in its place): when a result is wrong, it is compared with what each mistake would have given, and the one that
gives the same is named.

An open-ended exercise (its labels say how long a check takes) has a score from 0 to 100 in place of MISTAKES: its `check` trains
and measures, with what exercises/training.py has for that, and puts the score into the Trial.

    python -m exercises.checking NUMBER FILE RESULT PART SECONDS    what `python -m exercises check` runs in a process of its
                                                            own, so that a learner's endless loop or crash ends there
"""

import ast
import contextlib
import faulthandler
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
BEGIN, END, CUT = "# solution:", "# end of solution", "# ---- below: not in the learner's file"
SECONDS = 15                         # for one check, the import of PyTorch included; then it is stopped
SHORT = 0.1                          # the part of an open-ended check that --short does


# ------------------------------------------------------------------------------------------------------ the sources

@dataclass(frozen=True)
class Exercise:
    number: str                      # "03"
    path: Path                       # its file in source/
    text: str
    title: str                       # first line of its docstring
    labels: dict = field(hash=False)  # difficulty, importance, minutes, needs; open-ended ones: check

    @property
    def name(self):
        return self.path.name

    @property
    def open(self):
        """Whether it has a score instead of a pass."""
        return "check" in self.labels

    @property
    def seconds(self):
        """After how long its check is stopped, whatever it does: open-ended ones take longer on a busy machine."""
        return 60 * 3 * int(self.labels["check"].split()[0]) if self.open else SECONDS


def exercises():
    """All exercises, in order. Reads text only: nothing is imported."""
    found = []
    for path in sorted((HERE / "source").glob("[0-9][0-9]_*.py")):
        text = path.read_text(encoding="utf-8")
        title, _, labels, *_ = ast.get_docstring(ast.parse(text)).split("\n")
        found.append(Exercise(path.name[:2], path, text, title, dict(part.split(": ", 1) for part in labels.split(" · "))))
    return found


def stub(exercise):
    """The learner's file: the source without what is below CUT, each solution replaced by a line that says it is missing."""
    lines, inside = [], False
    for line in exercise.text.split(CUT)[0].rstrip().split("\n"):
        if line.strip() == BEGIN:
            lines.append(line.replace(BEGIN, 'raise NotImplementedError  # your turn: replace this line'))
            inside = True
        elif line.strip() == END:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines) + "\n"


def hints(exercise):
    """Its HINTS, read without running the file: PyTorch takes seconds to import."""
    return next(ast.literal_eval(node.value) for node in ast.parse(exercise.text).body
                if isinstance(node, ast.Assign) and node.targets[0].id == "HINTS")


def load(path, name="learner"):
    """Import a file as a module, without leaving compiled files beside it."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_text(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.py"
        path.write_text(text, encoding="utf-8")
        return load(path, "changed")


def mistaken(exercise, old, new):
    """The text of the source with a mistake in its solution."""
    before, begin, rest = exercise.text.partition(BEGIN)
    solution, end, after = rest.rpartition(f"    {END}\n")
    assert solution.count(old) == 1, f"{exercise.name}: {old!r} is in the solution {solution.count(old)} times, not once"
    return before + begin + solution.replace(old, new) + end + after


@functools.lru_cache(maxsize=1)
def wrong_ones(exercise):
    """The exercise with each of its mistakes: list of (its name, module)."""
    return [(name, load_text(mistaken(exercise, old, new))) for name, old, new in load(exercise.path, "right").MISTAKES]


# -------------------------------------------------------------------------------------------------------- comparing

class Failed(Exception):
    """A check did not pass; the message is for the learner."""


def difference(got, want, tolerance):
    """None if `got` is what is wanted; else what is wrong first: type, length, shape, dtype, value."""
    import torch
    if isinstance(want, (tuple, list)):
        if not isinstance(got, (tuple, list)):
            return f"expected {len(want)} results as a {type(want).__name__}, got {type(got).__name__}"
        if len(got) != len(want):
            return f"expected {len(want)} results, got {len(got)}"
        for i, (g, w) in enumerate(zip(got, want)):
            if problem := difference(g, w, tolerance):
                return f"result {i}: {problem}"
        return None
    if not isinstance(want, torch.Tensor):
        if type(got) is not type(want):
            return f"expected a result of type {type(want).__name__}, got {type(got).__name__}"
        return None if got == want else f"expected {want!r}, got {got!r}"
    if not isinstance(got, torch.Tensor):
        return f"expected a Tensor, got {type(got).__name__}" + ("; does every way through end in return?" if got is None else "")
    if got.shape != want.shape:
        return f"shape: expected {tuple(want.shape)}, got {tuple(got.shape)}"
    if got.dtype != want.dtype:
        return f"dtype: expected {want.dtype}, got {got.dtype}"
    wide = lambda t: t.detach().double() if t.is_floating_point() else t.detach()
    wrong = ~torch.isclose(wide(got), wide(want), rtol=tolerance, atol=tolerance, equal_nan=True) if want.is_floating_point() else got != want
    if not wrong.any():
        return None
    index = tuple(wrong.nonzero()[0].tolist())
    place = f" at [{', '.join(map(str, index))}]" if index else ""
    show = lambda t: f"{t[index].item():.6g}" if t.is_floating_point() else str(t[index].item())
    return f"value: expected {show(want)}{place}, got {show(got)} ({int(wrong.sum())} of {want.numel()} are wrong)"


def copies(inputs):
    import torch
    return [i.detach().clone() if isinstance(i, torch.Tensor) else i for i in inputs]


class Trial:
    """The checks of one exercise, which call these methods in turn; the first that does not pass raises Failed.

    mine: the learner's module; right: the source's; mistakes: a list of (name, module), or a function that makes it when
    needed. Everywhere, `call` is a function of a module and of the inputs, which it gets as copies. With `values_only`,
    checks of gradients, time and memory are left out: so the slow specification can be checked too.

    For open-ended exercises: part, how much of the full check is to be done, 0 to 1; terminal, a file for progress bars, or
    None; stopped, a file that gets the traceback when time is up, or None: no limits; score, 0 to 100, which the check sets.
    """

    def __init__(self, mine, right, mistakes, values_only=False, part=1.0, terminal=None, stopped=None):
        self.mine, self.right, self.mistakes, self.values_only = mine, right, mistakes, values_only
        self.part, self.terminal, self.stopped = part, terminal, stopped
        self.passed, self.score = [], None

    def bar(self, what, total=None):
        """A progress bar, as of tqdm; silent where nobody looks."""
        from tqdm import tqdm
        return tqdm(desc=what, total=total, file=self.terminal, disable=self.terminal is None, leave=False,
                    bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    @contextlib.contextmanager
    def within(self, seconds):
        """A limit of its own for calls of the learner's code in a check that is allowed minutes."""
        if self.stopped:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self.stopped)
        try:
            yield
        finally:
            if self.stopped:
                faulthandler.cancel_dump_traceback_later()

    def ask(self, what, call, inputs):
        """What the learner's code makes of the inputs."""
        try:
            return call(self.mine, *inputs)
        except Failed:
            raise
        except NotImplementedError:
            raise Failed("not written yet: the line with NotImplementedError is still there") from None
        except BaseException as error:  # SystemExit too: whatever the learner's code does, it gets a sentence
            raise Failed(f"{what}: {said(error, self.mine.__file__)}") from None

    def named(self, got, of, tolerance):
        """Which known mistakes give the same: a piece of a sentence, or nothing. of(module) -> what that module gives."""
        if callable(self.mistakes):
            self.mistakes = self.mistakes()
        names = []
        for name, module in self.mistakes:
            with contextlib.suppress(Exception):
                if difference(got, of(module), tolerance) is None:
                    names.append(name)
        return f". It equals what you get by this mistake: {', or '.join(names)}" if names else ""

    def equal(self, what, call, *inputs, tolerance=1e-5):
        """The result is the solution's, in type, shape, dtype and value; and the inputs are as they were."""
        import torch
        given = copies(inputs)
        got = self.ask(what, call, given)
        want = call(self.right, *copies(inputs))
        if problem := difference(got, want, tolerance):
            raise Failed(f"{what}: {problem}{self.named(got, lambda m: call(m, *copies(inputs)), tolerance)}")
        for i, (before, after) in enumerate(zip(inputs, given)):
            if isinstance(before, torch.Tensor) and difference(after, before, 0):
                raise Failed(f"{what}: the result is right, but input {i} was changed in place; work on a copy")
        self.passed.append(what)

    def gradients(self, module, call, inputs):
        """Gradients of a fixed weighted sum of the result, one per floating-point input."""
        import torch
        given = [i.requires_grad_() if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in copies(inputs)]
        result = self.ask("gradient", call, given) if module is self.mine else call(module, *given)
        if not isinstance(result, torch.Tensor) or not result.requires_grad:
            raise Failed("no gradient can pass through your result; look for loops over numbers, .item(), .detach(), "
                         "torch.tensor(…) or no_grad")
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result).cos()
        leaves = [g for g in given if isinstance(g, torch.Tensor) and g.requires_grad]
        found = torch.autograd.grad((result * weights).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)]

    def gradient(self, what, call, *inputs, tolerance=1e-4):
        """The gradients of all floating-point inputs are the solution's."""
        if self.values_only:
            return
        try:
            got = self.gradients(self.mine, call, inputs)
        except RuntimeError as error:
            raise Failed(f"{what}: the backward pass stops: {said(error, self.mine.__file__)}") from None
        except Failed as failure:
            raise Failed(f"{what}: {failure}") from None
        if problem := difference(got, self.gradients(self.right, call, inputs), tolerance):
            def of(module):                                                # the values were right: so is the mistake's
                if difference(call(module, *copies(inputs)), call(self.right, *copies(inputs)), tolerance):
                    raise Failed
                return self.gradients(module, call, inputs)
            raise Failed(f"{what}: of the gradients, {problem}{self.named(got, of, tolerance)}")
        self.passed.append(what)

    def fast(self, what, call, *inputs, times=20, because):
        """Not much slower than the solution: within `times` its time plus a tenth of a second."""
        if self.values_only:
            return
        def seconds(module):
            best = float("inf")
            for _ in range(2):
                given, start = copies(inputs), time.perf_counter()
                self.ask(what, call, given) if module is self.mine else call(module, *given)
                best = min(best, time.perf_counter() - start)
                if best > 2:
                    break
            return best
        mine, right = seconds(self.mine), seconds(self.right)
        if mine > times * right + 0.1:
            raise Failed(f"{what}: it takes {mine:.2f} s where {right:.4f} s are enough; {because}")
        self.passed.append(what)

    def small(self, what, call, *inputs, at_most, because):
        """No tensor made on the way has more than `at_most` elements."""
        if self.values_only:
            return
        import torch

        def storages(value):
            """The storages of the tensors in a value, by address, with their number of elements."""
            if isinstance(value, (tuple, list)):
                return {at: size for part in value for at, size in storages(part).items()}
            if isinstance(value, dict):
                return storages(list(value.values()))
            known = isinstance(value, torch.Tensor)
            return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() // value.element_size()} if known else {}

        class Watch(torch.overrides.TorchFunctionMode):
            largest = 0

            def __torch_function__(self, function, types, arguments=(), keywords=None):
                known = storages([arguments, keywords])                    # a view, or what was written in place, is nothing new
                result = function(*arguments, **(keywords or {}))
                new = [size for at, size in storages(result).items() if at not in known]
                Watch.largest = max(Watch.largest, *new, 0)
                return result

        given = copies(inputs)
        with Watch():
            self.ask(what, call, given)
        if Watch.largest > at_most:
            raise Failed(f"{what}: a tensor of {Watch.largest:,} elements was made where {at_most:,} are enough; {because}")
        self.passed.append(what)

    def true(self, what, call, because):
        """Something that is no comparison: call(mine) gives True or False."""
        if not self.ask(what, call, []):
            raise Failed(f"{what}: {because}")
        self.passed.append(what)


def said(error, file):
    """An exception of the learner's code in one line, with the last line of their file that it came through."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    text = " ".join(str(error).split())[:300]
    return (f"line {lines[-1]}: " if lines else "") + type(error).__name__ + (f": {text}" if text else "")


def check(exercise, file, change=None, **options):
    """Check the file of a learner, in this process: (names of the checks that passed, None or why the next one failed, the score
    of an open-ended one or None).

    change(module): something to do to the learner's module before; options: of Trial.
    """
    right = load(exercise.path, "right")
    mistakes = lambda: wrong_ones(exercise)
    try:
        mine = load(file)
    except BaseException as error:
        return [], f"the file can't be read: {said(error, file)}", None
    if change:
        change(mine)
    trial = Trial(mine, right, mistakes, **options)
    try:
        right.check(trial)
    except Failed as failure:
        return trial.passed, str(failure), None
    return trial.passed, None, trial.score


# ---------------------------------------------------------------------------------------- in a process of its own

class Short(io.StringIO):
    """What the learner prints, up to a limit: an endless loop may print too."""

    def write(self, text):
        return super().write(text[:max(0, 4000 - self.tell())])


def run(exercise, file, part=1.0, show=False, seconds=None):
    """Check a file in another process. Returns a dict: passed (names), failed (None or a sentence), score, printed.

    part: of an open-ended check; show: whether its progress bars are to be seen; seconds: when it is stopped, if not as usual.
    """
    seconds = seconds or exercise.seconds
    with tempfile.TemporaryDirectory() as folder:
        result, stopped = Path(folder) / "result.json", Path(folder) / "result.json.stopped"
        command = [sys.executable, "-m", "exercises.checking", exercise.number, str(Path(file).resolve()), str(result), str(part), str(seconds)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), **({} if exercise.open else {"OMP_NUM_THREADS": "1"})}
        try:                                                               # it ends itself after its seconds, but has to start first
            code = subprocess.run(command, cwd=HERE.parent, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=None if exercise.open and show else subprocess.DEVNULL, timeout=seconds * 4 / 3).returncode
        except subprocess.TimeoutExpired:
            code = None
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        trace = stopped.read_text(encoding="utf-8", errors="replace") if stopped.is_file() else ""
        late = re.search(r"Timeout \((\d+):(\d+):(\d+)", trace)
        if late or code is None:
            seconds = sum(int(n) * unit for n, unit in zip(late.groups(), (3600, 60, 1))) if late else seconds
            at = re.search(rf'"{re.escape(str(Path(file).resolve()))}", line (\d+)', trace)
            failed = f"stopped after {seconds} s" + (f", in line {at[1]}" if at else "") + "; is there a loop that never ends?"
        else:
            failed = f"the process ended by itself (code {code}): a crash, too much memory, or a call that ends Python"
        return dict(passed=[], failed=failed, score=None, printed="")


def run_all(jobs, part=1.0):
    """run() on a list of (exercise, file): one at a time for each core, up to eight; open-ended ones, which use all cores, after them."""
    results = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        closed = [job for job in jobs if not job[0].open]
        results.update(zip(closed, pool.map(lambda job: run(*job), closed)))
    results.update((job, run(*job, part)) for job in jobs if job[0].open)
    return [results[job] for job in jobs]


def main(number, file, result, part, seconds):
    exercise = next(e for e in exercises() if e.number == number)
    printed, terminal = Short(), sys.stderr
    with open(f"{result}.stopped", "w", encoding="utf-8") as stopped, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        faulthandler.dump_traceback_later(int(seconds), exit=True, file=stopped)   # says in which line it was
        import torch
        if not exercise.open:
            torch.set_num_threads(1)
        passed, failed, score = check(exercise, file, part=float(part), terminal=terminal if exercise.open else None,
                                      stopped=stopped if exercise.open else None)
        faulthandler.cancel_dump_traceback_later()
    temporary = f"{result}.tmp"
    Path(temporary).write_text(json.dumps(dict(passed=passed, failed=failed, score=score, printed=printed.getvalue())), encoding="utf-8")
    os.replace(temporary, result)


if __name__ == "__main__":
    from exercises import checking                                         # as exercises import it, or there would be two of Failed
    checking.main(*sys.argv[1:])
