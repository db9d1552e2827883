"""What every test shares: the repository's root on sys.path, two threads, and the folder with real weights."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
