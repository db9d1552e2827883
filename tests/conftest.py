"""What every test shares: the repository's root on sys.path, two threads, and the folder with real weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Some virtual machines announce AMX, Intel's matrix instructions, and stop a process that uses them, as oneDNN does for bf16.
# Tried in a process of its own, and before this one loads torch: later oneDNN doesn't ask any more.
CPUINFO = Path("/proc/cpuinfo")
if CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text(encoding="utf-8", errors="replace"):
    TRY = "import torch; torch.ones(64, 256, dtype=torch.bfloat16) @ torch.ones(256, 512, dtype=torch.bfloat16)"
    if subprocess.run([sys.executable, "-c", TRY], capture_output=True).returncode < 0:
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")    # what came before AMX

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import extras.threads  # noqa: F401  before torch

import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def weights_270m():
    """The folder of Gemma 3 270M in the official layout; skips, with the reason, where its packages are missing."""
    from extras import weights_270m
    from gemma import InputError
    try:
        return weights_270m.ensure(progress=False)
    except InputError as error:
        pytest.skip(f"no real weights: {error}")
