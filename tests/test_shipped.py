"""What is shipped, as it is shipped: the trained memories on their own bases, and what the repository carries."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from data_gen import World
from extras.memory_model import DONT_KNOW
from memory import GemmaWithMemory

ROOT = Path(__file__).resolve().parent.parent


def exact_match(model, n_memories, per_memory):
    """Share of lookup questions answered exactly, over memories of four facts about people and values of the test split."""
    world, right, total = World("test", seed=1, phrasings="train"), 0, 0
    for _ in range(n_memories):
        facts, questions = world.memory(4, per_memory, "lookup")
        model.clear_memory()
        model.add_to_memory(facts)
        answers = model.answer([q["question"] for q in questions], max_new_tokens=24)
        right += sum(a == q["answer"] for a, q in zip(answers, questions))
        total += len(questions)
    model.clear_memory()
    return right, total


def silent_when_empty(model):
    ids, mask = model.batch(["Where does Maria live?", "What is the code of the red locker in the hall?"])
    with torch.no_grad():
        base = model.gemma(ids, mask)
        assert torch.equal(model(ids, mask), base) and torch.equal(model(ids, mask, mask), base)
    assert model.answer("Where does Maria live?") == DONT_KNOW


@pytest.fixture(scope="module")
def tiny():
    return GemmaWithMemory.from_pretrained("tiny")


def test_tiny_answers(tiny):
    """Catches a shipped memory that no longer fits the code or the base: a floor, bench/recall.py measures the real figure."""
    right, total = exact_match(tiny, 20, 2)
    print(f"tiny, 4 facts, lookup: {right} of {total}")
    assert 35 <= total and right >= 0.65 * total, f"{right} of {total}"


def test_tiny_is_silent_when_empty(tiny):
    """Catches an injection that touches the base's logits when there is nothing to read."""
    silent_when_empty(tiny)


def test_tiny_says_when_it_does_not_know(tiny):
    """Catches a null threshold that was lost or left untuned: every question would get an answer, or none would."""
    tiny.clear_memory()
    tiny.add_to_memory(["Maria lives in Lisbon.", "Tom's locker code is 4821.", "Ana works at the harbour."])
    known = tiny.recall("Where does Maria live?")[1]
    unknown = tiny.recall("Where does Zacharias live?")[1]
    tiny.clear_memory()
    assert known < tiny.config.null_threshold and known < unknown


def test_gemma_3_270m_answers(weights_270m):
    """Catches a shipped memory for the real weights that no longer fits; skips where these can't be had."""
    model = GemmaWithMemory.from_pretrained("gemma-3-270m")
    silent_when_empty(model)
    right, total = exact_match(model, 12, 2)
    print(f"gemma-3-270m, 4 facts, lookup: {right} of {total}")
    assert 20 <= total and right >= 0.65 * total, f"{right} of {total}"


# -------------------------------------------------------------------------------------------------------- the repository

@pytest.fixture(scope="module")
def committed():
    """The files that git knows, as {path: contents}; skips in a copy without git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {name: (ROOT / name).read_bytes() for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()}


def test_the_clone_stays_small(committed):
    """Catches a checkpoint, a picture or the real base committed by mistake."""
    binaries = {name: len(blob) for name, blob in committed.items() if b"\0" in blob[:8192]}
    assert sum(binaries.values()) < 24e6, binaries
    assert not [name for name in committed if name.endswith("checkpoint.safetensors")]
    assert sum(len(blob) for name, blob in committed.items() if name.startswith("tiny/")) < 12 * 2 ** 20


def test_no_path_of_one_machine(committed):
    """Catches an absolute path that exists on the author's machine alone, in code, logs or saved settings."""
    path = re.compile(rb"(?<![\w./~-])/(work|root|home)/[\w.-]")
    found = [name for name, blob in committed.items() if b"\0" not in blob[:8192] and path.search(blob)]
    assert found == []
