"""Gemma 3 against transformers, its loader against bad files, its sampler against a plain loop, its sockets in their places."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma import (EOS, PAD, Gemma, GemmaConfig, Injection, InputError, KVCache, Places, check_device, check_sampling, find_model,
                   sample, write_json)

ROOT = Path(__file__).resolve().parent.parent

# D / H is not C, H / K is 2, the window is far shorter than the tests' texts, full layers stand inside and at the end,
# scores have a scale of their own, and positions of full layers are divided by 8 as in 4B and larger.
TINY = dict(vocab_size=97, hidden_size=72, intermediate_size=112, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, layer_types=("sliding_attention",) * 3 + ("full_attention",) +
            ("sliding_attention",) * 3 + ("full_attention",), sliding_window=8, query_pre_attn_scalar=24,
            max_position_embeddings=512, rope_factor=8.0)
T = 40


def random_gemma(seed=0, dtype=torch.float32, **changes):
    """A model whose every tensor is random, norms too: their official initial value 0 would hide the `1 +`."""
    torch.manual_seed(seed)
    model = Gemma(GemmaConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3 if p.ndim == 1 else 1 / math.sqrt(p.shape[1])).copy_(p.bfloat16())
        model.embed_tokens.weight.mul_(0.5)
    return model.to(dtype).eval().requires_grad_(False)


def oracle_of(model, dtype=torch.float32):
    """transformers' Gemma3ForCausalLM with the weights of `model`."""
    transformers = pytest.importorskip("transformers", reason="the oracle transformers isn't installed")
    config = model.config
    linear = dict(rope_type="linear", factor=config.rope_factor) if config.rope_factor != 1 else dict(rope_type="default")
    oracle = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        **{name: getattr(config, name) for name in TINY if name not in ("layer_types", "rope_factor")},
        layer_types=list(config.layer_types), rms_norm_eps=config.rms_norm_eps, attn_implementation="eager",
        rope_parameters=dict(full_attention=dict(linear, rope_theta=config.rope_theta),
                             sliding_attention=dict(rope_type="default", rope_theta=config.rope_local_base_freq))))
    state = {"model." + name: p for name, p in model.state_dict().items()}
    assert not oracle.load_state_dict(state, strict=False).unexpected_keys
    oracle.tie_weights()
    assert {name for name, _ in oracle.named_parameters()} == set(state)
    return oracle.to(dtype).eval()


def relative_error(ours, theirs):
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def random_ids(B=3, length=T, seed=1):
    return torch.randint(4, TINY["vocab_size"], (B, length), generator=torch.Generator().manual_seed(seed))


def padding(side, lengths=(T, 29, 11)):
    mask = torch.zeros(len(lengths), T, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    return mask.flip(1) if side == "left" else mask


# -------------------------------------------------------------------------------------------------- parity, float32

@torch.no_grad()
def test_float32_logits_match_transformers():
    """Catches nearly every trap: a window off by one, the RoPE bases swapped, the norm without `1 +`, heads in wrong groups."""
    model, ids = random_gemma(), random_ids()
    assert relative_error(model(ids), oracle_of(model)(ids).logits) < 1e-5


@pytest.mark.parametrize("changes", [dict(rope_factor=1.0), dict(num_key_value_heads=1), dict(num_key_value_heads=4),
                                     dict(layer_types=("sliding_attention",) * 8), dict(layer_types=("full_attention",) * 8),
                                     dict(rope_theta=3e4, rope_local_base_freq=500.0), dict(rms_norm_eps=1e-2),
                                     dict(sliding_window=1)], ids=str)
@torch.no_grad()
def test_every_shape_matches_transformers(changes):
    """Catches a field that is read but not used, which one config alone can't show."""
    model, ids = random_gemma(**changes), random_ids()
    assert relative_error(model(ids), oracle_of(model)(ids).logits) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_matches_transformers_and_rows_alone(side):
    """Catches padding that is seen, that takes a position, or that fills the window; and NaN from an empty softmax row."""
    model, ids, mask = random_gemma(), random_ids(), padding(side)
    logits, expected = model(ids, mask), oracle_of(model)(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for visible in Places(model.config, *ids.shape, mask, None, ids.device).visible.values():
        assert visible.any(-1).all()  # some kernels of PyTorch give NaN for an empty row, others 0
    real = mask.bool()
    assert relative_error(logits[real], expected[real]) < 1e-5
    for row in range(len(ids)):
        assert relative_error(logits[row, real[row]], model(ids[row][real[row]][None])[0]) < 1e-5


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("chunks", [[T - 5, 1, 1, 1, 1, 1], [1] * T, [13, 1, 20, 6], [7, 8, 9, 16]], ids=str)
@torch.no_grad()
def test_cached_matches_uncached_and_transformers(chunks, side):
    """Catches a cache off by one slot, positions that restart in each chunk, a window counted from the chunk, lost padding.

    The cache has exactly as many slots as there are tokens.
    """
    model, ids = random_gemma(), random_ids()
    mask = torch.ones_like(ids) if side is None else padding(side)
    cache = KVCache(model.config, len(ids), T, model.dtype, "cpu")
    pieces = zip(ids.split(chunks, 1), mask.split(chunks, 1))
    logits = torch.cat([model(i, None if side is None else m, cache=cache) for i, m in pieces], 1)
    real = mask.bool()
    assert relative_error(logits[real], model(ids, mask)[real]) < 1e-5
    assert relative_error(logits[real], oracle_of(model)(ids, attention_mask=mask).logits[real]) < 1e-5


@torch.no_grad()
def test_spare_slots_of_the_cache_are_not_seen():
    """Catches zeros of unused slots that take part in the softmax."""
    model, ids = random_gemma(), random_ids()
    longer = KVCache(model.config, 3, T + 50, model.dtype, "cpu")
    assert relative_error(model(ids, cache=longer), model(ids)) < 1e-5
    assert relative_error(model(ids, last_only=True), model(ids)[:, -1:]) < 1e-6


@torch.no_grad()
def test_no_position_sees_its_future():
    """Catches a mask that leaks: changing the last token may change no earlier logit."""
    model, ids = random_gemma(), random_ids()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 97
    assert torch.equal(model(ids)[:, :-1], model(changed)[:, :-1])


def test_full_cache_and_strange_ids_are_refused():
    """Catches an IndexError (or a silent overwrite of the oldest slot) where a sentence would help."""
    model, ids = random_gemma(), random_ids()
    cache = KVCache(model.config, 3, T, model.dtype, "cpu")
    model(ids, cache=cache)
    with pytest.raises(InputError, match="length of the cache"):
        model(ids[:, :1], cache=cache)
    for bad in (97, -1):
        with pytest.raises(InputError, match="token ids from 0 to 96"):
            model(torch.tensor([[2, bad]]))


# ---------------------------------------------------------------------------------------------------- parity, bf16

@torch.no_grad()
def test_bf16_is_as_close_to_the_truth_as_transformers():
    """Catches rounding where Gemma has none (norm, RoPE, softmax in bf16): our error may not be much above transformers'."""
    ours, theirs, rows = [], [], 0
    for seed in range(4):
        model, ids = random_gemma(seed), random_ids(B=4, seed=seed)
        truth = oracle_of(model)(ids).logits
        theirs.append(oracle_of(model, torch.bfloat16)(ids).logits.float() - truth)
        ours.append(random_gemma(seed, torch.bfloat16)(ids).float() - truth)
        rows += ids.numel()
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert ours.pow(2).mean().sqrt() < 1.2 * theirs.pow(2).mean().sqrt()
    assert ours.abs().max() < 1.5 * theirs.abs().max()


@pytest.mark.parametrize("hidden_size", [640, 1152, 2560])
@torch.no_grad()
def test_embeddings_are_scaled_by_a_rounded_root(hidden_size):
    """Catches sqrt(D) kept in float32: in bf16 sqrt(640) is 25.25, and a third of all elements would differ."""
    for dtype in (torch.bfloat16, torch.float32):
        model = random_gemma(dtype=dtype, hidden_size=hidden_size, num_hidden_layers=1, layer_types=("full_attention",))
        ids = random_ids()
        assert torch.equal(model.embed(ids), oracle_of(model, dtype).model.embed_tokens(ids))
    exact = model.bfloat16().embed_tokens(ids).float() * hidden_size ** 0.5
    assert (model.embed(ids) != exact.bfloat16()).float().mean() > 0.05 or hidden_size ** 0.5 % 1 < 0.01


# ------------------------------------------------------------------------------------------------ the exact 1B shape

OFFICIAL_1B = dict(
    architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None, bos_token_id=2,
    cache_implementation="hybrid", eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size=1152, initializer_range=0.02, intermediate_size=6912,
    max_position_embeddings=32768, model_type="gemma3_text", num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
    pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None,
    rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, torch_dtype="bfloat16", transformers_version="4.50.0.dev0",
    use_cache=True, vocab_size=262144)


@pytest.fixture(scope="module")
def folder_1b(tmp_path_factory):
    """A folder with the official config.json of 1B and random bf16 weights, 2 GB; removed afterwards."""
    folder = tmp_path_factory.mktemp("1b")
    write_json(folder / "config.json", OFFICIAL_1B)
    with torch.device("meta"):
        shapes = {"model." + name: p.shape for name, p in Gemma(GemmaConfig.from_dict(OFFICIAL_1B)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1, generator=generator).mul_(
        0.3 if len(shape) == 1 else (3 / shape[1]) ** 0.5) for name, shape in shapes.items()}, folder / "model.safetensors",
        metadata={"format": "pt"})
    yield folder
    shutil.rmtree(folder)


@torch.no_grad()
def test_exact_1b_shape_loads_and_matches_transformers(folder_1b):
    """Catches a loader or a shape that only fits the tiny models: 26 layers, one KV head, head width apart from D / H."""
    transformers = pytest.importorskip("transformers", reason="the oracle transformers isn't installed")
    ids = torch.randint(4, 262_144, (1, 24), generator=torch.Generator().manual_seed(0))
    model = Gemma.from_pretrained(folder_1b)
    assert model.dtype == torch.float32 and model.config.layer_types.count("full_attention") == 4
    assert sum(p.numel() for p in model.parameters()) == 999_885_952
    logits = model(ids)
    del model  # 4 GB each
    oracle = transformers.Gemma3ForCausalLM.from_pretrained(folder_1b, dtype=torch.float32)
    assert relative_error(logits, oracle(ids).logits) < 1e-5


MEASURE = """
import sys, torch
from gemma import Gemma
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = Gemma.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
sizes = [p.numel() * p.element_size() for p in model.parameters()]
print(peak() - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_weights_and_one_tensor(folder_1b, dtype):
    """Catches a loader that holds the whole file beside the model: 2 GB more than this machine may have.

    VmHWM and not ru_maxrss: the latter keeps the peak of the process that started this one.
    """
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder_1b), dtype], cwd=ROOT, capture_output=True, text=True)
    peak, weights, largest = map(int, run.stdout.split())
    assert peak < weights + largest + 100e6, (peak, weights, largest)


# ---------------------------------------------------------------------------------------------------- configurations

def test_both_spellings_of_a_config_say_the_same():
    """Catches a loader that knows only the spelling of its own day: rope_theta and torch_dtype, or rope_parameters and dtype."""
    older = GemmaConfig.from_dict(OFFICIAL_1B)
    assert older.layer_types == (("sliding_attention",) * 5 + ("full_attention",)) * 4 + ("sliding_attention",) * 2
    newer = {name: value for name, value in OFFICIAL_1B.items()
             if name not in ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern", "torch_dtype")}
    newer.update(dtype="bfloat16", layer_types=list(older.layer_types),
                 rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e6),
                                      sliding_attention=dict(rope_type="default", rope_theta=1e4)))
    assert GemmaConfig.from_dict(newer) == older
    # what the older spelling can say otherwise
    assert GemmaConfig.from_dict({**OFFICIAL_1B, "rope_theta": 5e5, "rope_local_base_freq": 7}).rope_theta == 5e5
    assert GemmaConfig.from_dict({**OFFICIAL_1B, "rope_theta": 5e5, "rope_local_base_freq": 7}).rope_local_base_freq == 7
    assert GemmaConfig.from_dict({**OFFICIAL_1B, "rope_scaling": dict(factor=8.0, rope_type="linear")}).rope_factor == 8
    assert GemmaConfig.from_dict({**OFFICIAL_1B, "rope_scaling": dict(factor=8.0, type="linear")}).rope_factor == 8
    newer["rope_parameters"]["full_attention"] = dict(rope_type="linear", factor=4.0, rope_theta=2e6)
    newer["rope_parameters"]["sliding_attention"]["rope_theta"] = 3e4
    read = GemmaConfig.from_dict(newer)
    assert (read.rope_theta, read.rope_factor, read.rope_local_base_freq) == (2e6, 4.0, 3e4)


def test_config_survives_a_round_trip_and_transformers_reads_it_the_same():
    """Catches a saved config that another reader takes differently: the layer pattern, the RoPE factor, the bases."""
    transformers = pytest.importorskip("transformers", reason="the oracle transformers isn't installed")
    config = GemmaConfig(**TINY, rope_theta=3e5, rope_local_base_freq=2e3)
    assert GemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    theirs = transformers.Gemma3TextConfig(**json.loads(json.dumps(config.to_dict())))
    assert GemmaConfig.from_dict(theirs.to_dict()) == config  # in the newer spelling, which transformers 5 writes
    assert theirs.rope_parameters["full_attention"] == dict(rope_type="linear", factor=8.0, rope_theta=3e5)


REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "sliding_window", "query_pre_attn_scalar", "max_position_embeddings"]
NUMBERS = REQUIRED + ["rope_theta", "rope_local_base_freq", "rms_norm_eps", "sliding_window_pattern"]
OTHER_WRONG = dict(
    model_type=["llama", "gemma2", "gemma3n_text", None, 3], hidden_activation=["silu", "gelu"], attention_bias=[True],
    tie_word_embeddings=[False], use_bidirectional_attention=[True], attn_logit_softcapping=[50.0], final_logit_softcapping=[30.0],
    layer_types=[["sliding_attention"] * 25, ["sliding_attention"] * 25 + ["linear"], "full", 7],
    rope_scaling=[[8], "linear", dict(rope_type="yarn", factor=8.0), dict(rope_type="linear", factor=0), dict(rope_type="linear", factor="8")],
    rope_parameters=[[1], "default", dict(rope_theta=1e6), dict(full_attention=3), dict(full_attention=dict(rope_theta="x")),
                     dict(full_attention=dict(rope_theta=1e6), sliding_attention=[1])],
    num_key_value_heads=[3, 8], head_dim=[255])


def test_a_missing_field_is_named():
    """Catches a config half written: a KeyError, or worse, a default that fits another size."""
    for name in REQUIRED:
        with pytest.raises(InputError, match=f"config.json: .*{name}"):
            GemmaConfig.from_dict({k: v for k, v in OFFICIAL_1B.items() if k != name}, "config.json")


@pytest.mark.parametrize("name", [*NUMBERS, *OTHER_WRONG])
def test_a_wrong_field_is_named(name):
    """Catches a value that is loaded as if it were right: a string, a fraction of a head, True as 1, another architecture."""
    wrong = OTHER_WRONG.get(name, [])
    if name in NUMBERS:
        wrong = wrong + ["many", "512", -1, [4], {}, True, float("nan"), float("inf")]
        wrong = wrong + ([0] if name != "rms_norm_eps" else []) + ([1.5, None] if name in REQUIRED else [])
    for value in wrong:
        with pytest.raises(InputError) as error:
            GemmaConfig.from_dict({**OFFICIAL_1B, name: value}, "config.json")
        said = str(error.value)
        names = dict(rope_parameters=["rope_parameters", "rope_theta"], rope_scaling=["RoPE scaling", "rope_scaling", "factor"]).get(name, [name])
        assert said.startswith("config.json: expected ") and any(n in said for n in names), (value, said)
        assert "\n" not in said and len(said) < 300


def test_multimodal_config_fills_gaps_as_transformers_does():
    """Catches 4B and larger, whose text_config leaves out what transformers defaults: heads, vocabulary, context."""
    transformers = pytest.importorskip("transformers", reason="the oracle transformers isn't installed")
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
                rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)  # all that 4B's file says
    config = GemmaConfig.from_dict(dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=text))
    theirs = transformers.Gemma3TextConfig(**text)
    assert config == GemmaConfig.from_dict(theirs.to_dict())
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.rope_factor == 8 and config.layer_types.count("full_attention") == 5
    for name in ("hidden_size", "num_hidden_layers"):
        with pytest.raises(InputError, match=name):
            GemmaConfig.from_dict(dict(text_config={k: v for k, v in text.items() if k != name}))


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'"gemma"', b"[" * 100_000], ids=["empty", "cut", "list", "binary", "text", "deep"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content):
    """Catches a traceback from the JSON reader."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json"):
        Gemma.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------- loading

def saved(folder, seed=0, **changes):
    model = random_gemma(seed, **changes)
    model.save_pretrained(folder)
    return model


def test_save_and_load_keep_every_bit(tmp_path):
    """Catches a tensor that isn't written, or a dtype that isn't honoured; and a loaded model that would train."""
    model, ids = saved(tmp_path), random_ids()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = Gemma.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(loaded(ids), random_gemma(dtype=dtype)(ids)) and loaded.dtype == dtype
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert loaded.fingerprint() == model.fingerprint()
    assert Gemma.from_pretrained(str(tmp_path)).dtype == torch.float32
    assert random_gemma(seed=1).fingerprint() != model.fingerprint()


@torch.no_grad()
def test_transformers_loads_what_we_save(tmp_path):
    """Catches a saved folder that only we can read: names, config spelling, tied head."""
    transformers = pytest.importorskip("transformers", reason="the oracle transformers isn't installed")
    model, ids = saved(tmp_path), random_ids()
    theirs = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative_error(model(ids), theirs(ids).logits) < 1e-5


def sharded(folder, model, prefix, vision_prefix, head):
    """The layout of 4B and larger: two files with an index, the text tower under a prefix, beside vision tensors."""
    text = {prefix + name: p.bfloat16() for name, p in model.named_parameters()}
    other = {vision_prefix + "vision_tower.vision_model.embeddings.patch_embedding.weight": torch.ones(4, 3, 2, 2),
             vision_prefix + "multi_modal_projector.mm_input_projection_weight": torch.ones(4, 4),
             head: model.embed_tokens.weight.bfloat16().clone()}
    names = sorted(text)
    shards = {"model-00001-of-00002.safetensors": {**{n: text[n] for n in names[::2]}, **other},
              "model-00002-of-00002.safetensors": {n: text[n] for n in names[1::2]}}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    write_json(folder / "model.safetensors.index.json", dict(metadata=dict(total_size=1), weight_map={
        name: file for file, tensors in shards.items() for name in tensors}))
    write_json(folder / "config.json", dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3",
                                            text_config=model.config.to_dict(), vision_config=dict(hidden_size=4)))


@pytest.mark.parametrize("prefix, vision_prefix, head", [("language_model.model.", "", "language_model.lm_head.weight"),
                                                         ("model.language_model.", "model.", "lm_head.weight")], ids=["older", "newer"])
def test_multimodal_layouts_load(tmp_path, prefix, vision_prefix, head):
    """Catches 4B and larger: shards, both historical prefixes, vision tensors to leave out, a copy of the tied head."""
    model, ids = random_gemma(), random_ids()
    sharded(tmp_path, model, prefix, vision_prefix, head)
    assert torch.equal(Gemma.from_pretrained(tmp_path)(ids), model(ids))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors"):
        Gemma.from_pretrained(tmp_path)


@torch.no_grad()
def test_multimodal_folder_written_by_transformers_loads(tmp_path):
    """Catches what our own idea of that layout misses: transformers writes it, sharded, and its text tower is the oracle."""
    transformers = pytest.importorskip("transformers", reason="the oracle transformers isn't installed")
    text = transformers.Gemma3TextConfig(**{**GemmaConfig(**TINY).to_dict(), "layer_types": list(TINY["layer_types"]), "torch_dtype": "float32"})
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92)).eval()
    for p in whole.parameters():
        p.normal_(std=0.2)
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids = random_ids() % 90
    assert relative_error(Gemma.from_pretrained(tmp_path)(ids), whole(ids).logits) < 1e-5


def change(edit):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
    return apply


def rewrite(edit):
    """A change of the file's bytes: 8 bytes length, the JSON header, the data."""
    def apply(folder):
        blob = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(edit(blob))
    return apply


def with_header(blob, edit):
    length = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8:8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob[8 + length:]


Q = "model.layers.4.self_attn.q_proj.weight"
DAMAGE = {
    "missing": (change(lambda t: t.pop(Q)), "layers.4.self_attn.q_proj.weight"),
    "unexpected": (
        change(lambda t: t.update({"model.layers.8.mlp.up_proj.weight": torch.ones(2)})),
        "model.layers.8.mlp.up_proj.weight"),
    "without prefix": (change(lambda t: t.update({"norm.weight": t.pop("model.norm.weight")})), "norm.weight"),
    "twice": (
        change(lambda t: t.update({"language_model.model.norm.weight": t["model.norm.weight"].clone()})),
        "norm.weight"),
    "misshapen": (
        change(lambda t: t.update({Q: t[Q].T.contiguous()})),
        r"layers.4.self_attn.q_proj.weight.*\(64, 72\).*\(72, 64\)"),
    "wrong size": (
        change(lambda t: t.update({"model.norm.weight": torch.zeros(71)})),
        r"model.norm.weight.*\(72,\).*\(71,\)"),
    "int8": (change(lambda t: t.update({Q: torch.zeros(64, 72, dtype=torch.int8)})), f"{Q}.*int8"),
    "bool": (change(lambda t: t.update({Q: torch.zeros(64, 72, dtype=torch.bool)})), f"{Q}.*bool"),
    "empty": (rewrite(lambda blob: b""), "whole safetensors file"),
    "cut in the header": (rewrite(lambda blob: blob[:500]), "whole safetensors file"),
    "cut in the data": (rewrite(lambda blob: blob[:-1000]), "whole safetensors file"),
    "a web page": (rewrite(lambda blob: b"<!DOCTYPE html><html>Access denied</html>" * 50), "whole safetensors file"),
    "length of 2^60": (rewrite(lambda blob: struct.pack("<Q", 1 << 60) + blob[8:]), "whole safetensors file"),
    "header no JSON": (rewrite(lambda blob: blob[:8] + b"\xff" * 50 + blob[58:]), "whole safetensors file"),
    "unknown dtype": (rewrite(lambda blob: with_header(blob, lambda h: h[Q].update(dtype="Q4"))), "whole safetensors file"),
    "other dtype": (rewrite(lambda blob: with_header(blob, lambda h: h[Q].update(dtype="F32"))), "whole safetensors file"),
    "offsets beyond the end": (
        rewrite(lambda blob: with_header(blob, lambda h: h[Q].update(data_offsets=[10 ** 9, 10 ** 9 + 9216]))),
        "whole safetensors file"),
    "offsets that overlap": (
        rewrite(lambda blob: with_header(blob, lambda h: h[Q].update(data_offsets=[0, 9216]))),
        "whole safetensors file"),
    "negative shape": (
        rewrite(lambda blob: with_header(blob, lambda h: h[Q].update(shape=[-64, -72]))),
        "whole safetensors file"),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors.*does not exist"),
    "a folder": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
        "model.safetensors"),
    "index with a path": (
        lambda folder: write_json(folder / "model.safetensors.index.json", dict(weight_map={Q: "../model.safetensors"})),
        "index.json.*weight_map"),
    "index without a map": (
        lambda folder: write_json(folder / "model.safetensors.index.json", dict(metadata={})),
        "index.json.*weight_map"),
    "another config": (
        lambda folder: write_json(folder / "config.json", GemmaConfig(**{**TINY, "head_dim": 32}).to_dict()),
        r"self_attn.k_norm.weight.*\(32,\).*\(16,\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_are_named(tmp_path, kind):
    """Catches silent loading: every damage must stop with one sentence that names the tensor, or the file where none is known."""
    saved(tmp_path)
    damage, expected = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(InputError, match=expected) as error:
        Gemma.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_offline_the_message_names_the_ways_without_an_account(tmp_path):
    """Catches a traceback of huggingface_hub, or minutes of retries, where someone has no network or no account."""
    code = """if True:
        import sys
        from gemma import Gemma, InputError
        try:
            Gemma.from_pretrained("google/gemma-3-1b-it")
        except InputError as error:
            print(error)"""
    for setting in (dict(HF_HUB_OFFLINE="1"), dict(HF_ENDPOINT="http://127.0.0.1:9")):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                             env={**os.environ, "HF_HOME": str(tmp_path), **setting})
        assert "Traceback" not in run.stderr, run.stderr
        assert "google/gemma-3-1b-it" in run.stdout and "'tiny'" in run.stdout and "'gemma-3-270m'" in run.stdout
        assert run.stdout.count("\n") == 1


@pytest.mark.parametrize("error, expected", [("GatedRepoError", "accept Gemma's licence on its Hub page and run `hf auth login`"),
                                             ("RepositoryNotFoundError", "not on the Hub")])
def test_gated_and_unknown_repositories(monkeypatch, error, expected):
    """Catches a 401 shown raw: the user must read that the licence is to be accepted, or that there is no such model."""
    import huggingface_hub.errors
    kind = getattr(huggingface_hub.errors, error)

    def refuse(*_, **__):
        raise kind.__new__(kind)  # without __init__, which wants the response of an HTTP library
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=expected) as raised:
        find_model("google/gemma-3-1b-it")
    assert "'tiny'" in str(raised.value) and "'gemma-3-270m'" in str(raised.value)


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "../x y", "gemma 3", "~/models", "https://huggingface.co/google/gemma-3-1b-it", "x" * 5000, "a/" + "b" * 300])
def test_an_unknown_model_is_refused_before_any_download(name, monkeypatch):
    """Catches a mistyped folder that is asked of the Hub."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match="expected a model folder or a Hub id"):
        find_model(name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "vulkan"])
def test_a_device_that_is_not_there_is_refused(device):
    """Catches `--device cuda` on a machine without a GPU that ends in a traceback."""
    with pytest.raises(InputError, match="expected a device of this machine"):
        check_device(device)


# ---------------------------------------------------------------------------------------------------------- sampler

def plain_distribution(logits, temperature, top_k, top_p):
    """{token: probability} by a plain loop over the tokens, best first."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    best = sorted(range(len(logits)), key=lambda i: -weights[i])
    if top_k:
        best = best[:top_k]
    total, mass, kept = sum(weights[i] for i in best), 0.0, []
    for i in best:
        if mass >= top_p * total * (1 + 1e-6):
            break
        kept.append(i)
        mass += weights[i]
    return {i: weights[i] / mass for i in kept}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (5, 1.0), (1000, 1.0), (0, 0.9), (0, 0.5), (0, 1e-9), (7, 0.6), (3, 0.999)])
def test_sample_matches_a_plain_loop(temperature, top_k, top_p):
    """Catches top-p that drops the token which crosses p, mass not renormalised after top-k, and filters before the temperature."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 2
    expected, n = plain_distribution(logits.tolist(), temperature, top_k, top_p), 20_000
    drawn = Counter(sample(logits.expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0)).tolist())
    assert set(drawn) <= set(expected)
    for token, p in expected.items():
        assert abs(drawn[token] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1, (token, drawn[token], n * p)


def test_sample_at_its_edges():
    """Catches an exact boundary of top-p read the wrong way, a tiny temperature that overflows, and greedy that draws."""
    half = torch.log(torch.tensor([[0.125, 0.5, 0.25, 0.125]]))
    draw = lambda **options: set(sample(half.expand(4000, -1), 1.0, generator=torch.Generator().manual_seed(0), **options).tolist())
    assert draw(top_p=0.49) == {1} and draw(top_p=0.51) == {1, 2} and draw(top_p=0.74) == {1, 2}
    assert draw(top_p=0.76) in ({1, 2, 0}, {1, 2, 3}) and draw(top_p=1.0) == {0, 1, 2, 3} and draw(top_k=2) == {1, 2}
    assert draw(top_k=2, top_p=0.6) == {1}  # of the two, the better one has two thirds
    assert sample(half, 0).tolist() == [1]
    for temperature in (1e-3, 1e-10, 1e-38, 1e-300, 5e-324):
        assert sample(half * 20, temperature).tolist() == [1]
    assert set(sample(half.expand(4000, -1), 1e9, generator=torch.Generator().manual_seed(0)).tolist()) == {0, 1, 2, 3}
    rows = sample(torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]]), 0.0)
    assert rows.tolist() == [1, 0]
    assert sample(torch.tensor([[-math.inf, 0.0, -math.inf]]), 1.0).tolist() == [1]


def test_a_seed_gives_the_same_text_and_leaves_the_global_one_alone():
    """Catches a sampler on the global generator: the same seed must give the same tokens, whatever was drawn before."""
    model, ids = random_gemma(), random_ids(B=2, length=5)
    options = dict(max_new_tokens=12, temperature=1.5, stop=())
    state = torch.get_rng_state()
    first = model.generate(ids, seed=7, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(9)
    assert torch.equal(model.generate(ids, seed=7, **options), first)
    assert not torch.equal(model.generate(ids, seed=8, **options), first)
    assert first.shape == (2, 17) and torch.equal(first[:, :5], ids)


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_p=0.0),
                                 dict(top_p=1.1), dict(top_p=-1), dict(top_p=math.nan), dict(top_k=-1), dict(max_new_tokens=0)], ids=str)
def test_sampling_parameters_without_meaning_are_refused(bad):
    """Catches `--temperature -1`, which would pick the worst token, and its like."""
    with pytest.raises(InputError, match="expected"):
        check_sampling(**{**dict(temperature=1.0, top_k=0, top_p=1.0), **bad})
    with pytest.raises(InputError, match="expected"):
        list(random_gemma().stream(random_ids(), **bad))


# ---------------------------------------------------------------------------------------------------------- generate

def test_rows_of_a_left_padded_batch_say_what_they_say_alone():
    """Catches batched generation that depends on its neighbours: positions, padding in the cache, the window."""
    model, ids, mask = random_gemma(), random_ids(), padding("left")
    ids = ids.masked_fill(mask == 0, PAD)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=20, stop=())[:, T:]
    for row in range(len(ids)):
        alone = ids[row][mask[row].bool()][None]
        assert torch.equal(model.generate(alone, max_new_tokens=20, stop=())[0, alone.shape[1]:], together[row])


def test_greedy_generation_is_the_argmax_of_uncached_logits():
    """Catches a generation loop that feeds the wrong token, or reads the wrong position: here the whole text runs again."""
    model, ids = random_gemma(), random_ids(B=2, length=5)
    slow = ids
    for _ in range(15):
        slow = torch.cat((slow, model(slow)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=15, stop=()), slow)


def test_a_row_stops_at_its_stop_token():
    """Catches rows that go on after their stop token, stop all others with them, or lose the stop token itself."""
    model, ids = random_gemma(), random_ids(B=3, length=6)
    free = model.generate(ids, max_new_tokens=16, stop=())[:, 6:]
    stop = (int(free[0, 4]), int(free[1, 9]))
    ends = [next((i for i, token in enumerate(row) if token in stop), 15) for row in free.tolist()]
    assert len(set(ends)) > 1, "choose another seed"
    stopped = model.generate(ids, max_new_tokens=16, stop=stop)[:, 6:]
    assert stopped.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, :end + 1], free[row, :end + 1]) and (stopped[row, end + 1:] == PAD).all()
    assert len(list(model.stream(ids, max_new_tokens=1))) == 1


def test_prompts_that_cannot_be_continued_are_refused():
    """Catches right padding, after which the next token would follow padding; and empty prompts."""
    model = random_gemma()
    with pytest.raises(InputError, match="padded on the left"):
        next(model.stream(random_ids(), padding("right")))
    for empty in (torch.zeros(1, 0, dtype=torch.long), torch.tensor([1, 2])):
        with pytest.raises(InputError, match=r"shape \(B, T\)"):
            next(model.stream(empty))


# ----------------------------------------------------------------------------------------------------------- sockets

class Recorder(Injection):
    """Writes down every call with its h; falsy on purpose, as an empty memory may be."""

    def __init__(self):
        self.calls = []

    def __len__(self):
        return 0

    def begin(self, *arguments):
        self.calls.append(("begin", 0, arguments))

    def on_embeddings(self, h):
        self.calls.append(("on_embeddings", 0, h))
        return h

    def before_attention(self, layer, h):
        self.calls.append(("before_attention", layer, h))
        return h

    def after_attention(self, layer, h):
        self.calls.append(("after_attention", layer, h))
        return h

    def after_layer(self, layer, h):
        self.calls.append(("after_layer", layer, h))
        return h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_injection_that_returns_h_leaves_every_bit(dtype):
    """Catches a socket that casts, copies or adds zero: the logits must be bit-identical, cached and uncached."""
    model, ids, mask = random_gemma(dtype=dtype), random_ids(), padding("left")
    for injection in (Injection(), Recorder()):
        assert torch.equal(model(ids, mask, injection=injection), model(ids, mask))
        assert torch.equal(model.generate(ids, max_new_tokens=5, injection=injection), model.generate(ids, max_new_tokens=5))


def test_every_socket_is_called_in_its_place():
    """Catches a socket at the wrong place or layers counted from 0: every h is compared with what PyTorch's hooks see there."""
    model, ids, mask, recorder = random_gemma(), random_ids(), padding("left"), Recorder()
    seen = {}
    for i, layer in enumerate(model.layers, start=1):
        layer.input_layernorm.register_forward_hook(lambda m, args, out, i=i: seen.update({("before_attention", i): out}))
        layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda m, args, i=i: seen.update({("after_attention", i): args[0]}))
        layer.register_forward_hook(lambda m, args, out, i=i: seen.update({("after_layer", i): out}))
    seen[("on_embeddings", 0)] = model.embed(ids)
    question_mask = torch.ones_like(ids)
    model(ids, mask, question_mask, None, recorder)
    expected = ["begin", "on_embeddings"] + ["before_attention", "after_attention", "after_layer"] * 8
    assert [name for name, _, _ in recorder.calls] == expected
    assert [layer for _, layer, _ in recorder.calls[2:]] == [layer for layer in range(1, 9) for _ in range(3)]
    begin = recorder.calls[0][2]
    assert begin[0] is ids and begin[1] is mask and begin[2] is question_mask and begin[3] is None
    for name, layer, h in recorder.calls[1:]:
        assert torch.equal(h, seen[name, layer]), (name, layer)


@pytest.mark.parametrize("socket", ["on_embeddings", "before_attention", "after_attention", "after_layer"])
def test_what_a_socket_returns_is_what_goes_on(socket):
    """Catches a socket whose result is dropped, or used in one place and not in another."""
    model, ids = random_gemma(), random_ids()
    injection, marker = Injection(), torch.randn(72, generator=torch.Generator().manual_seed(0)) * 0.1
    if socket == "on_embeddings":
        injection.on_embeddings = lambda h: h + marker
        expected = lambda: model.embed_tokens.register_forward_hook(lambda m, args, out: out + marker / torch.tensor(72 ** 0.5))
    else:
        setattr(injection, socket, lambda layer, h: h + marker if layer == 3 else h)
        layer = model.layers[2]
        expected = {"before_attention": lambda: layer.input_layernorm.register_forward_hook(lambda m, args, out: out + marker),
                    # what is added between attention and MLP could as well have come out of the attention's norm
                    "after_attention": lambda: layer.post_attention_layernorm.register_forward_hook(lambda m, args, out: out + marker),
                    "after_layer": lambda: layer.register_forward_hook(lambda m, args, out: out + marker)}[socket]
    logits = model(ids, injection=injection)
    assert relative_error(logits, model(ids)) > 1e-3
    expected()
    assert relative_error(logits, model(ids)) < 1e-5


def test_begin_gets_the_cache_in_every_pass():
    """Catches a memory that loses what it worked out at prefill: the same cache, with its dict, comes back each time."""
    model, ids, recorder = random_gemma(), random_ids(B=1, length=6), Recorder()
    model.generate(ids, max_new_tokens=4, injection=recorder, stop=())
    begins = [arguments for name, _, arguments in recorder.calls if name == "begin"]
    assert len(begins) == 4 and len({id(cache) for _, _, _, cache in begins}) == 1
    assert isinstance(begins[0][3].memory, dict)
    assert begins[0][2].all() and [begin[2] for begin in begins[1:]] == [None] * 3   # the question is the prompt
    assert [begin[0].shape[1] for begin in begins] == [6, 1, 1, 1]


# ----------------------------------------------------------------------------------------------------- real weights

PROMPTS = ["The capital of Portugal is", "Question: Where does Maria live?\nAnswer:", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,",
           "Die Hauptstadt von Norwegen ist", "1, 1, 2, 3, 5, 8,", "The three laws of thermodynamics are:\n1.", "Dear Ms Núñez,\n\nthank you for"]


@pytest.fixture(scope="module")
def real(weights_270m):
    """(our model, transformers' model, our tokenizer) with Gemma 3 270M in float32."""
    transformers = pytest.importorskip("transformers", reason="the oracle transformers isn't installed")
    from gemma import Tokenizer
    return (Gemma.from_pretrained(weights_270m), transformers.Gemma3ForCausalLM.from_pretrained(weights_270m, dtype=torch.float32),
            Tokenizer(weights_270m))


def left_padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def test_real_270m_logits_match_transformers(real):
    """Catches what random weights hide: outlier channels, real norms, a text of 700 tokens beyond the real window of 512."""
    ours, theirs, tokenizer = real
    for text in (PROMPTS[3], (ROOT / "gemma.py").read_text(encoding="utf-8")):
        ids = torch.tensor([tokenizer.encode(text)[:700]])
        assert relative_error(ours(ids), theirs(ids).logits) < 1e-4


@torch.no_grad()
def test_real_270m_continues_as_transformers_does(real):
    """Catches an error that grows with the cache: 8 prompts in one batch, 64 greedy tokens each, all identical."""
    ours, theirs, tokenizer = real
    ids, mask = left_padded([tokenizer.encode(prompt) for prompt in PROMPTS])
    mine = ours.generate(ids, attention_mask=mask, max_new_tokens=64)[:, ids.shape[1]:]
    other = theirs.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, top_k=None, top_p=None)[:, ids.shape[1]:]
    assert mine.shape == other.shape
    for prompt, row, expected in zip(PROMPTS, mine.tolist(), other.tolist()):
        assert row == expected, prompt
    assert (mine != PAD).sum() > 300 and EOS not in mine[0, :5]
