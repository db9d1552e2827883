"""What the benches share: where they ran, how sure their numbers are, and how they are shown."""

import argparse
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from gemma import InputError, replacing, write_json  # noqa: F401  (benches import write_json from here)

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------ where it ran

def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hardware(device="cpu"):
    """One line: the processor that computed, and the versions that matter."""
    device = torch.device(device)
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else f"{device.type}, " if device.type != "cpu" else ""
    return f"{gpu}{cpu_name()}, {cores()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def commit():
    """The commit that is checked out, with a + if files differ from it; "unknown" outside of git."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------ how sure it is

def wilson(right, n, z=1.959964):
    """The 95% interval of a share, `right` of `n`, as (low, high): Wilson's, which is honest near 0 and 1 too.

    https://doi.org/10.1080/01621459.1927.10502953. Without any trials nothing is known: (0, 1).
    """
    if not n:
        return 0.0, 1.0
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half


def share(right, n):
    """A share as benches save it: {"share", "low", "high", "right", "n"}; share is None without trials."""
    low, high = wilson(right, n)
    return dict(share=right / n if n else None, low=round(low, 4), high=round(high, 4), right=int(right), n=int(n))


# -------------------------------------------------------------------------------------------------------- how it shows

def percent(value, interval=False):
    """94.1 or, of what `share` returns, 94.1 (90.5–96.4); – where nothing was measured."""
    if isinstance(value, dict):
        if value["share"] is None:
            return "–"
        return percent(value["share"]) + (f" ({percent(value['low'])}–{percent(value['high'])})" if interval else "")
    return "–" if value is None else f"{100 * value:.1f}"


def table(head, rows, left=1):
    """A Markdown table; the first `left` columns are left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |"
    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def plotting():
    """matplotlib.pyplot in this project's style, or None (and a sentence on standard error) where it isn't installed."""
    try:
        import matplotlib
    except ImportError:
        print("note: no plot, because matplotlib is missing; pip install matplotlib.", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                            "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.6, "lines.markersize": 4,
                            "legend.frameon": False, "legend.fontsize": 8, "figure.dpi": 150, "savefig.bbox": "tight",
                            "axes.prop_cycle": pyplot.cycler(color=["#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5",
                                                                    "#9b9a97", "#e03e3e", "#64473a"])})
    return pyplot


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


# -------------------------------------------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    """A bad option is one sentence and exit code 2, like every other bad input."""

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help.")


def numbers(least):
    """A type of argument: whole numbers from `least`, with commas between them -> sorted list of int."""
    def read(text):
        try:
            values = sorted({int(part) for part in text.split(",")})
        except ValueError:
            values = [least - 1]
        if values[0] < least:
            raise argparse.ArgumentTypeError(f"expected whole numbers from {least}, such as 4,16, got {text!r}")
        return values
    return read


def some_of(known):
    """A type of argument: some of these names, with commas between them -> list of str, in the order of `known`."""
    def read(text):
        chosen = text.split(",")
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text!r}")
        return [name for name in known if name in chosen]
    return read


def run(main):
    """Call main(); bad input becomes one sentence on standard error and exit code 2."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def out_folder(out, what, model):
    """The folder that a command writes to, by default out/WHAT-MODEL. Raises InputError where a file of that name stands."""
    out = out or Path("out") / f"{what}-{Path(model).name}"
    if out.exists() and not out.is_dir():
        raise InputError(f"expected --out to be a folder, got the file {out}; name another.")
    return out
