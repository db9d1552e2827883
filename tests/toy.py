"""A toy Gemma with random weights and its own little tokenizer: everything that a real one has, in a fraction of a second."""

import signal
from pathlib import Path

import pytest
import sentencepiece
import torch

from gemma import EOS, END_OF_TURN, Gemma, GemmaConfig, Tokenizer
from memory import GemmaWithMemory, MemoryConfig

FACTS = ["Maria lives in Lisbon.", "Tom's locker code is 4821.", "The red bike belongs to Ana.", "Ana works in Oslo.",
         "Her brother is Tom.", "Maria moved to Porto.", "Zoë drinks green tea every morning.", "Ben was born on 3 May 1990."]

CONFIG = dict(vocab_size=600, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
              num_key_value_heads=1, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, max_position_embeddings=128,
              layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])


def toy_tokenizer(folder):
    """Train tokenizer.model in `folder`, with Gemma's ids for everything that isn't ordinary text. Returns the Tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    control = ["<mask>", "[multimodal]", *(f"<unused{i}>" for i in range(99)), "<start_of_turn>", "<end_of_turn>", "\n"]
    lines = [f + " Question: Where does she live? Answer: She is in Rome." for f in FACTS] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=CONFIG["vocab_size"],
        hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        user_defined_symbols=control, num_threads=1, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    tokenizer = Tokenizer(folder)
    assert tokenizer.pieces.id_to_piece(END_OF_TURN) == "<end_of_turn>" and tokenizer.pieces.eos_id() == EOS
    assert tokenizer.encode("\n", bos=False) == [END_OF_TURN + 1]
    return tokenizer


def toy_base(folder, seed=0, **changes):
    """Save a random Gemma in the official layout in `folder`, beside its tokenizer. Returns the folder."""
    tokenizer = toy_tokenizer(folder)
    config = GemmaConfig.from_dict({**CONFIG, "vocab_size": tokenizer.vocab_size, **changes})
    torch.manual_seed(seed)
    base = Gemma(config)
    for name, p in base.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, std=0.1)                              # norms that multiply by (1 + 0) would hide a bug
    torch.nn.init.normal_(base.embed_tokens.weight, std=0.3)               # small: or every token would be followed by itself
    base.save_pretrained(folder)
    return Path(folder)


def toy_model(folder, seed=0, **memory_options):
    """Save a toy base and an untrained memory for it in one folder; both are random. Returns the folder.

    The memory speaks loudly (value_scale) and cares which episode it reads (temperature), so that answers depend on the facts;
    words of random vectors are alike by chance (threshold), and later episodes silence earlier ones (similarity).
    """
    folder = toy_base(Path(folder).resolve(), seed)
    options = dict(inject_after=2, heads=2, key_dim=16, token_key_dim=8, gat_dim=8, candidates=4, readable=2, value_scale=2.0, reading_layers=1, reading_dim=16)
    torch.manual_seed(seed + 1)
    model = GemmaWithMemory(Gemma.from_pretrained(folder), Tokenizer(folder), MemoryConfig(**{**options, **memory_options}), folder)
    for name, p in model.injection.named_parameters():
        if name.startswith(("hop_query", "token_key_before.1", "goes_on.weight")) or name == "gnn.gat.bias":
            torch.nn.init.normal_(p, std=0.1)                              # zero at the start of training: would hide a bug
        if "temperature" in name:
            p.data.fill_(3.0)                                              # sharp: reads one token rather than the mean of all
        if name == "goes_on.bias":
            p.data.fill_(2.0)
        if name == "match_threshold":
            p.data.copy_(torch.linspace(0.5, 0.6, len(p)))
        if name == "log_match_temperature":
            p.data.fill_(1.5)
        if name == "similarity.bias":
            p.data.fill_(-3.0)
        if name == "said_weight":
            torch.nn.init.normal_(p)
    model.injection.state_mean.normal_(std=0.1)
    model.injection.gnn.mean.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def interruptible():
    """For preexec_fn of a process that is to hear Ctrl-C: what a shell starts in the background ignores it, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For test modules to import. Toy tensors are too small to share out: two threads that wait for each other on a busy machine are many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
