"""What was worked out for episodes once, kept in a file: so that a large memory opens again in seconds.

The text of the episodes is the truth; this file can be deleted at any time. It is found again by text: an episode whose text
it holds takes its rows from there, all others are encoded, so forgetting, editing or telling more never encodes what was
encoded before. It holds what the memory itself holds, to the bit, so that an answer is the same with it and without:

    texts   (N, 16) uint8    a hash of each text
    lengths (N,)    int64    tokens of each episode, without <bos>
    ids     (all,)  int64    token ids of all episodes, end to end
    keys    (all, 2 H C)     token keys of the memory, in float16 as it keeps them: most of the file
    nodes   (N, D or 2 D)    the episodes' nodes in the graph, in float32: they tell sentences apart by small differences of
                             large numbers, of which a shorter format would round away too much to save a tenth

The states that keys are made of aren't there: only training needs them, and makes them anew. Nor are the episodes' own keys,
which depend on the neighbours in time and take no time to speak of.

Two things must agree before anything in it is used: `model_key`, a hash of base, memory weights, settings and tokenizer (not
of dtype or device: what a GPU worked out in bf16 serves a CPU), and a checksum of all tensors. The file is safetensors and
is mapped into memory, so what no question looks at is only read once, for the checksum. It is replaced whole when it changes,
and must be: to write into it in place would change the memory of a conversation that has it open.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from extras.weights_270m import default_cache
from gemma import InputError, replacing
from memory import TokenStore, node_width

FORMAT = 2                           # to be counted up whenever the same weights would give other keys than before
WORTH_KEEPING = 256                  # facts of a file; fewer are encoded sooner than a cache is looked for
BLOCK, PART = 2 ** 16, 2 ** 26       # bytes that the checksum adds up, and bytes that it then hashes the sums of


def text_hash(text):
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def model_key(model):
    """A hash of everything but the text that an episode's keys depend on."""
    settings = dict(format=FORMAT, memory=asdict(model.config), base=model.gemma.config.fingerprint(),
                    weights=model.gemma.fingerprint(), tokenizer=model.tokenizer.hash)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.injection.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Known:
    """Episodes that need no encoding: hashes of their texts, in the order of `tokens` and `nodes` (N, D)."""

    hashes: list
    tokens: TokenStore
    nodes: torch.Tensor

    @classmethod
    def of(cls, graph):
        """What a memory knows now."""
        return cls([text_hash(text) for text in graph.texts], graph.tokens, graph.nodes)


# -------------------------------------------------------------------------------------------------- filling a memory

def remember(model, ids, texts, known, progress=True):
    """Make `texts` the memory of `model`, under these episode ids, in this order. Returns how many had to be encoded.

    Raises InputError, with the memory as it was, for a text that the model can't take (see GemmaWithMemory.token_ids).
    """
    graph, device = model.memory_graph, model.gemma.device
    hashes = [text_hash(text) for text in texts]
    row = {h: i for i, h in enumerate(known.hashes)}
    rows = [row.get(h) for h in hashes]
    new = [i for i, r in enumerate(rows) if r is None]
    encoded = dict(zip(new, model.all_token_ids([texts[i] for i in new], progress)))
    if not texts:
        model.clear_memory()
        return 0
    if hashes == known.hashes:                                             # nothing is copied: what is mapped from a file stays so
        tokens = TokenStore(known.tokens.ids.to(device), known.tokens.keys.to(device), known.tokens.lengths.to(device))
        nodes = known.nodes.to(device)
    else:
        tokens, nodes = assemble(model, rows, encoded, known, progress)
    graph.ids, graph.texts, graph.next_id = list(ids), list(texts), max(graph.next_id, max(ids) + 1)
    graph.tokens, graph.nodes, graph.states, graph.keys = tokens, nodes, None, graph.keys[:0]
    return len(encoded)


@torch.no_grad()
def assemble(model, rows, encoded, known, progress):
    """The TokenStore and nodes of episodes: rows[i] says where in `known` episode i is, or None: then encoded[i] are its tokens.

    Room for all of it is made once; what is encoded comes in parts.
    """
    graph, device = model.memory_graph, model.gemma.device
    length_of, start_of = known.tokens.lengths.tolist(), known.tokens.starts.tolist()
    lengths = [len(encoded[i]) - 1 if row is None else length_of[row] for i, row in enumerate(rows)]
    ids = torch.empty(sum(lengths), dtype=torch.long, device=device)
    keys = torch.empty(len(ids), graph.tokens.keys.shape[1], dtype=graph.tokens.keys.dtype, device=device)
    nodes = torch.empty(len(rows), node_width(model.config, model.gemma.config.hidden_size), device=device)
    at = 0
    with tqdm(total=len(encoded), desc="remembering", unit="fact", disable=not progress, file=sys.stderr, leave=False, delay=2) as bar:
        for first, last in runs(rows):
            if rows[first] is None:
                parts = model.written([encoded[i] for i in range(first, last)], bar.update)
            else:
                there = slice(start_of[rows[first]], start_of[rows[last - 1]] + length_of[rows[last - 1]])
                piece = slice(rows[first], rows[last - 1] + 1)
                parts = [(TokenStore(known.tokens.ids[there], known.tokens.keys[there], known.tokens.lengths[piece]), known.nodes[piece])]
            for part, part_nodes in parts:
                here = slice(at, at + len(part.ids))
                ids[here], keys[here], nodes[first:first + len(part_nodes)] = part.ids, part.keys, part_nodes
                first, at = first + len(part_nodes), here.stop
    return TokenStore(ids, keys, torch.tensor(lengths, device=device)), nodes


def runs(rows):
    """Cut episodes into pieces [first, last) that are either known, one row after the other, or all to be encoded."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != (None if rows[i - 1] is None else rows[i - 1] + 1):
            yield first, i
            first = i


# ------------------------------------------------------------------------------------------------------------ the file

def checksum(key, tensors):
    """A hash of `key` and tensors ({name: tensor on the CPU}): names, dtypes, shapes and bytes.

    Hashing gigabytes would take longer than the opening that it guards. So blocks are added up first, as 64-bit numbers, and
    the sums are hashed: any damage to one block, and all but a vanishing part of damage to several, changes the sums.
    """
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        blob = tensor.contiguous().flatten().view(torch.uint8).numpy()
        for start in range(0, len(blob), PART):
            part = blob[start:start + PART]
            whole = len(part) // BLOCK * BLOCK
            digest.update(part[:whole].view("<u8").reshape(-1, BLOCK // 8).sum(0).tobytes() + part[whole:].tobytes())
    return digest.hexdigest()


def load(path, key):
    """What the cache at `path` knows for the model with this key; nothing if it is missing, stale or damaged."""
    nothing = Known([], TokenStore(torch.zeros(0, dtype=torch.long), torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)), torch.zeros(0, 0))
    if not Path(path).is_file():                                           # nor is anything waited for, as in a pipe
        return nothing
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if said.get("model") != key:
                return nothing
            t = {name: file.get_tensor(name) for name in file.keys()}
        if set(t) != {"texts", "lengths", "ids", "keys", "nodes"} or said.get("checksum") != checksum(key, t):
            return nothing
    except (OSError, SafetensorError, ValueError, RuntimeError):           # whatever is wrong with it: it can be made again
        return nothing
    hashes = t["texts"].numpy().tobytes()
    return Known([hashes[i:i + 16] for i in range(0, len(hashes), 16)], TokenStore(t["ids"], t["keys"], t["lengths"]), t["nodes"])


def save(path, key, graph):
    """Write what the memory knows to `path`. A folder that is full or can't be written stays without it.

    Written by hand, eight bytes of length, a JSON header, then the tensors: safetensors' own writer wants all of it twice in memory.
    """
    hashes = [list(text_hash(text)) for text in graph.texts]
    tensors = dict(texts=torch.tensor(hashes, dtype=torch.uint8).view(-1, 16), lengths=graph.tokens.lengths,
                   ids=graph.tokens.ids, keys=graph.tokens.keys, nodes=graph.nodes)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header, end = {"__metadata__": dict(model=key, checksum=checksum(key, tensors))}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = dict(dtype={torch.uint8: "U8", torch.int64: "I64", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[start, end])
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)                                        # tensors begin at a multiple of 8
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(len(blob).to_bytes(8, "little") + blob)
            for tensor in tensors.values():
                file.write(tensor.flatten().view(torch.uint8).numpy())
    except (OSError, InputError):        # the second is what `replacing` makes of the first
        pass


def keep(path, key, graph, held):
    """Write the cache if it differs enough from what it `held` (a set of hashes) to be worth it. Returns what it holds now.

    A hundredth: to write gigabytes for each line of a large session would be slower than to encode a few lines at its next start.
    """
    now = {text_hash(text) for text in graph.texts}
    if 100 * len(now ^ held) < max(1, len(now)):
        return held
    save(path, key, graph)
    return now


def fill(model, ids, texts, path, key, progress=True):
    """Make `texts` the memory of `model` with the help of the cache at `path`, and bring that up to date. Returns what it holds."""
    known = load(path, key)
    remember(model, ids, texts, known, progress)
    return keep(path, key, model.memory_graph, set(known.hashes))


def remember_file(model, facts, path, name):
    """Make the facts that were read from the file at `path` the memory of `model`; a large file is encoded once for each model `name`.

    The cache lies in the user's cache folder and is found by where file and model are, so that an edited file's cache takes the
    place of the one before. A pipe has no place.
    """
    ids = range(len(facts))
    try:
        folder = default_cache() / "facts"
    except RuntimeError:                                                   # a user without a home has no cache either
        folder = None
    if folder is None or len(facts) < WORTH_KEEPING or not Path(path).is_file():
        remember(model, ids, facts, Known.of(model.memory_graph))
        return
    place = f"{Path(path).resolve()}\0{Path(name).resolve() if Path(name).is_dir() else name}"
    fill(model, ids, facts, folder / f"{text_hash(place).hex()}.safetensors", model_key(model))
