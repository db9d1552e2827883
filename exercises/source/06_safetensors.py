"""Loading safetensors by name

difficulty: medium · importance: medium · minutes: 30 · needs: nothing

A safetensors file is: 8 bytes, a whole number n, little-endian, unsigned; then n bytes of JSON, the header; then the numbers. The
header maps a tensor's name to {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}; offsets count bytes from
the end of the header. An entry "__metadata__" is no tensor. Official Gemma checkpoints put "model." before every name and
store BF16: the upper half of a float32, 2 bytes, little-endian.

Return the tensors that `wanted` (name without prefix -> shape) asks for, as float32. Be strict: raise KeyError that names
a tensor that is missing, ValueError that names one of another shape. Other tensors in the file are left alone.
"""

import json
import struct
from pathlib import Path

import torch


def slow_load(path, wanted, prefix="model."):
    """The specification, in loops."""
    blob = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8:8 + n])
    result = {}
    for name, shape in wanted.items():
        entry = header[prefix + name]                                      # raises KeyError
        if entry["shape"] != list(shape):
            raise ValueError(f"{name}: expected shape {list(shape)}, got {entry['shape']}")
        begin, end = (8 + n + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "F32":
            numbers = [struct.unpack("<f", blob[i:i + 4])[0] for i in range(begin, end, 4)]
        else:
            numbers = [struct.unpack("<f", b"\0\0" + blob[i:i + 2])[0] for i in range(begin, end, 2)]
        result[name] = torch.tensor(numbers).reshape(shape)
    return result


def load(path, wanted, prefix="model."):
    """path of a file, wanted {name: shape as a tuple} -> {name: float32 tensor}. No loop over numbers."""
    # solution:
    blob = bytearray(Path(path).read_bytes())
    (n,) = struct.unpack("<Q", blob[:8])
    header, result = json.loads(blob[8:8 + n]), {}
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    for name, shape in wanted.items():
        if prefix + name not in header:
            raise KeyError(name)
        entry = header[prefix + name]
        if tuple(entry["shape"]) != tuple(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(entry['shape'])}")
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(blob[8 + n + begin:8 + n + end], dtype=dtypes[entry["dtype"]])
        result[name] = flat.float().reshape(shape)
    return result
    # end of solution


# ---- below: not in the learner's file

SLOW = {"load": "slow_load"}
HINTS = ["struct.unpack('<Q', blob[:8]) reads n; json.loads(blob[8:8 + n]) the header. The numbers begin at 8 + n.",
         "torch.frombuffer(bytes, dtype=torch.bfloat16) makes a tensor of many numbers at once; a bytearray spares you a warning.",
         "For every wanted name: look up prefix + name, compare shapes, slice blob[8 + n + begin:8 + n + end], frombuffer with the dtype "
         "of the entry, .float(), .reshape(shape)."]
MISTAKES = [
    ("offsets counted from the start of the file", "blob[8 + n + begin:8 + n + end]", "blob[begin:end]"),
    ("the 8 bytes before the header forgotten", "blob[8 + n + begin:8 + n + end]", "blob[n + begin:n + end]"),
    ("BF16 read as F16", '"BF16": torch.bfloat16', '"BF16": torch.float16'),
    ("shapes not compared, so that a transposed tensor gets through", 'if tuple(entry["shape"]) != tuple(shape):', "if False:"),
    ("a missing tensor left out in silence", "raise KeyError(name)", "continue"),
    ("results left in bfloat16", "flat.float()", "flat"),
    ("names kept with their prefix", "result[name] =", "result[prefix + name] ="),
]


def file(folder, tensors):
    """Write a safetensors file by hand."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        header[name] = {"dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-(len(text)) % 8)
    path = Path(folder) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def check(t):
    import tempfile
    torch.manual_seed(1)
    norm, weight, other = torch.randn(4), torch.randn(3, 5).bfloat16(), torch.randn(2)
    with tempfile.TemporaryDirectory() as folder:
        path = file(folder, {"model.norm": norm, "other": other, "model.weight": weight})

        def call(wanted):
            def of(m):
                found = m.load(path, wanted)
                return [sorted(found), *(found[name] for name in sorted(found))] if isinstance(found, dict) else found
            return of

        def error(kind, name, wanted):
            def of(m):
                try:
                    m.load(path, wanted)
                except kind as e:
                    return name in str(e)
                return False
            return of

        t.equal("a float32 tensor", call({"norm": (4,)}))
        t.equal("a bfloat16 tensor after others", call({"weight": (3, 5)}))
        t.equal("both", call({"norm": (4,), "weight": (3, 5)}))
        t.true("a tensor that is not there", error(KeyError, "bias", {"norm": (4,), "bias": (4,)}),
               "expected KeyError that names 'bias'; this looks like the mistake: a missing tensor left out in silence")
        t.true("a tensor of another shape", error(ValueError, "weight", {"weight": (5, 3)}),
               "expected ValueError that names 'weight'; this looks like the mistake: shapes not compared, so that a transposed tensor gets through")
        big = file(folder, {"model.norm": norm, "model.large": torch.randn(300, 300)})
        t.fast("90,000 numbers", lambda m: m.load(big, {"large": (300, 300)}), because="let torch.frombuffer read them all at once.")
