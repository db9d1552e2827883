"""What the speed benches share: rounds in turn, the limits of the machine, bases of any shape, transformers' models of the same weights."""

import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench.common import ROOT, commit, hardware, write_json
from extras.memory_model import find_base
from gemma import Gemma, GemmaConfig, InputError, Tokenizer
from memory import GemmaWithMemory, MemoryConfig

# The shape of google/gemma-3-1b-it, as its config.json gives it, and of something that is done in seconds.
SHAPES = {
    "1b": dict(vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
               head_dim=256, sliding_window=512, query_pre_attn_scalar=256, max_position_embeddings=32_768),
    "toy": dict(vocab_size=16_384, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                head_dim=32, layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=16, query_pre_attn_scalar=32, max_position_embeddings=32_768),
}


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(work, device):
    """How long work() takes, until the device is done with it."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def in_turn(contenders, rounds, device, done=lambda runs: None, forgiving=False):
    """Run each of {name: function} for its start (compiling above all) and once more, then all of them in turn, `rounds` times.

    Returns {name: {"start": seconds of the first run, "seconds": median of the later ones, "all": [...]}}; with `forgiving`,
    {"failed": why} of one that can't run here, a peer that doesn't compile say. done: what to do with the results so far, so that
    a bench that is stopped keeps what it measured.
    """
    runs = {}

    def again(name):
        spent = runs[name]["all"]
        spent.append(seconds(contenders[name], device))
        runs[name]["seconds"] = statistics.median(spent)

    for name in tqdm(contenders, desc="starting", file=sys.stderr, leave=False, delay=2):
        try:
            runs[name] = dict(start=seconds(contenders[name], device), all=[])
            again(name)
        except InputError:
            raise
        except Exception as error:                         # another version, no compiler, too little memory
            if not forgiving:
                raise
            runs[name] = dict(failed=f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}")
        done(runs)
    for _ in tqdm(range(rounds), desc="rounds", file=sys.stderr, leave=False, delay=2):
        for name in runs:
            if "failed" not in runs[name]:
                again(name)
        done(runs)
    return runs


def copy_bandwidth(device, size=2 ** 30):
    """Bytes a second, read and written, of the fastest of several copies of `size` bytes."""
    a, b = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(seconds(lambda: b.copy_(a), device) for _ in range(10))


def matrix_rate(device, dtype, n=8192):
    """Multiplications and additions a second of the fastest of several products of n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def random_base(shape, dtype, device):
    """A Gemma of one of SHAPES with random weights, of such a size that no activation overflows."""
    torch.manual_seed(0)
    config = GemmaConfig.from_dict(SHAPES[shape])
    with torch.device("meta"):
        gemma = Gemma(config)
    gemma = gemma.to_empty(device=device).to(dtype)
    for p in gemma.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.1)
    return gemma.eval().requires_grad_(False)


def model_of(name, dtype, device, **memory):
    """A model to measure: "gemma-3-270m" with its own weights and memory, "1b" or "toy" with random ones; a fresh memory for these.

    The tokenizer of 1b is Google's if 270M is to be had, else that of tiny, which makes more tokens of a sentence.
    """
    if name in SHAPES:
        try:
            tokenizer = Tokenizer(find_base("gemma-3-270m" if name == "1b" else "tiny"))
        except InputError:
            tokenizer = Tokenizer(find_base("tiny"))
        torch.manual_seed(0)
        gemma = random_base(name, dtype, device)
        config = MemoryConfig(inject_after=2 if name == "toy" else 8, **memory)
        return GemmaWithMemory(gemma, tokenizer, config, name).eval()
    return GemmaWithMemory.from_pretrained(name, dtype=dtype, device=device)


def transformers_of(gemma):
    """transformers' Gemma 3 with the very tensors of `gemma`."""
    try:
        import transformers
    except ImportError:
        raise InputError("expected transformers, which this bench compares with; pip install transformers.") from None
    c = gemma.config
    linear = dict(rope_type="linear", factor=c.rope_factor) if c.rope_factor != 1 else dict(rope_type="default")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "sliding_window", "query_pre_attn_scalar", "max_position_embeddings", "rms_norm_eps")
    with torch.device("meta"):
        theirs = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
            **{name: getattr(c, name) for name in same}, layer_types=list(c.layer_types), attn_implementation="sdpa",
            rope_parameters=dict(full_attention=dict(linear, rope_theta=c.rope_theta),
                                 sliding_attention=dict(rope_type="default", rope_theta=c.rope_local_base_freq))))
    # What isn't a weight (the tables of RoPE, the scale of embeddings) is made by a model on the device: the meta one has no numbers.
    small = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**theirs.config.to_dict(), "vocab_size": 128,
                                                                            "intermediate_size": 8}))
    for name, buffer in small.named_buffers():
        owner, _, leaf = name.rpartition(".")
        theirs.get_submodule(owner)._buffers[leaf] = buffer.to(gemma.device)
    theirs.load_state_dict({"model." + name: p for name, p in gemma.named_parameters()}, strict=False, assign=True)
    theirs.tie_weights()
    return theirs.eval().requires_grad_(False)


def save(result, out, arguments, module, device):
    """The result with its command, commit and hardware, written to the file `out` if there is one."""
    result = dict(dict(command=f"python -m bench.{module} " + " ".join(arguments), commit=commit(), hardware=hardware(device)), **result)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
    return result


def finish(result, out, arguments, module, device):
    """As `save`, and print the head."""
    result = save(result, out, arguments, module, device)
    print(f"{result['command']}\n{result['hardware']}, commit {result['commit']}\n")
    return result
