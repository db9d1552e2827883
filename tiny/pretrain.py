"""Make the tiny base from nothing: its text, its tokenizer, its weights.

    python -m tiny.pretrain --out tiny            (one GPU, a few minutes; --steps 20 --documents 2000 --out /tmp/try to look)

A Gemma 3 in every respect but size: 12 layers of both types, grouped attention, q/k norms, tied head, Gemma's control
tokens at Gemma's ids, and the official file layout, so that gemma.py loads it like any other. Its world is data_gen.py's:
documents of facts, chatter, and questions answered from the facts above them, with values from everywhere. So it learns the
one thing a memory builds on, to copy an answer out of its context; it knows nothing of the world at large.

    python -m tiny.pretrain --chapters variants/configs/chapters.json --out out/tiny-bank

gives it a learned bank (variants/chapters.py) from the first step, which is saved in the folder `chapters` inside; with
"vanilla": true in the file, the same run without.
"""

import argparse
import io
import json
import math
import re
import sys
import time
from dataclasses import asdict
from multiprocessing import Pool
from pathlib import Path

import extras.threads  # noqa: F401  before torch

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data_gen import World, open_vocabulary
from extras.settings import from_file
from gemma import BOS, EOS, PAD, Gemma, GemmaConfig, InputError, Tokenizer, check_device, replacing
from train import TrainConfig
from variants.chapters import ChapterMemory, ChaptersConfig

CONFIG = dict(
    model_type="gemma3_text", vocab_size=4096, hidden_size=192, intermediate_size=352, num_hidden_layers=12,
    num_attention_heads=4, num_key_value_heads=1, head_dim=48, query_pre_attn_scalar=48, sliding_window=128,
    max_position_embeddings=1024)
LENGTH = 320                            # tokens of a training block: longer than the window, so that full layers matter


def anything(world, pieces):
    """One to six pieces of the vocabulary, whatever they are: a base knows how to copy every token that it has."""
    return "".join(world.pick(pieces) for _ in range(1 + int(world.random() * 6))).strip() or "-"


def document(world, pieces):
    """One document: facts and chatter, then questions with their answers, or a list of anything said twice (copying, pure)."""
    r = world.random()
    if r < 0.08:
        return f"{', '.join(anything(world, pieces) for _ in range(2 + int(world.random() * 10)))}\n" * 2
    if r < 0.12:
        return " ".join(world.noise() for _ in range(3 + int(world.random() * 8))) + "\n"
    facts, questions = world.memory(2 + int(world.random() ** 2 * 14), 1 + int(world.random() * 8))
    text = (" " if world.random() < 0.4 else "\n").join(facts) + "\n"
    text += "".join(f"Question: {q['question']}\nAnswer: {q['answer']}\n" for q in questions if q["support"])
    for value in sorted({q["answer"] for q in questions if q["kind"] != "list" and len(q["answer"]) > 2}):
        if world.random() < 0.5:
            other = anything(world, pieces)
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", lambda _: other, text)
    return text


def documents(task):
    """(seed, how many, words, pieces) -> list of str. A process of its own draws each part."""
    seed, n, words, pieces = task
    world = World("train", seed, words)
    return [document(world, pieces) for _ in range(n)]


def tokenized(task):
    """(seed, how many, folder of the tokenizer) -> int16 array of ids, documents set apart by <bos>."""
    seed, n, folder = task
    tokenizer = Tokenizer(folder)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size) if i not in tokenizer.control_ids]
    pieces = [piece for piece in pieces if piece.isprintable() and "\ufffd" not in piece]
    rows = [tokenizer.encode(text) for text in documents((seed, n, open_vocabulary(tokenizer), pieces))]
    return np.concatenate([np.array(row, dtype=np.int16) for row in rows])


def make_tokenizer(out, texts):
    """A BPE tokenizer of CONFIG's size with Gemma's first 107 ids (design of the official tokenizer.model)."""
    control = ["<mask>", "[multimodal]"] + [f"<unused{i}>" for i in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
    white = ["\n" * n for n in range(1, 5)] + ["\u2581" * n for n in range(2, 5)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n") if line), model_writer=model,
        model_type="bpe", vocab_size=CONFIG["vocab_size"], byte_fallback=True, split_digits=True, character_coverage=0.9995,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=control + white, num_threads=1, minloglevel=2)
    with replacing(out / "tokenizer.model") as temporary:
        temporary.write_bytes(model.getvalue())


def chapters_config(path):
    """The bank's part of a config file of train.py. Raises InputError for a LoRA: there is nothing yet that it could adapt."""
    settings, defaults = from_file(path, TrainConfig, ChaptersConfig), asdict(ChaptersConfig())
    config = ChaptersConfig.from_dict({**defaults, **{name: settings[name] for name in settings.keys() & defaults.keys()}}, path)
    if config.lora_rank:
        raise InputError(f"{path}: expected lora_rank 0 where the base itself is trained, got {config.lora_rank}; leave it out.")
    return config


def pretrain(config, data, options, bank_config=None):
    """Train a Gemma of this config on `data`, a stream of ids (all,), with a bank beside it if there is a config for one.

    Saves both in options.out; its other fields are those of the command line.
    """
    out, device = Path(options.out), data.device
    model = Gemma(config).to(device)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            # The embedding is multiplied by sqrt(D) and is the output head too: small, or the first losses explode.
            torch.nn.init.normal_(p, std=0.02 if "o_proj" not in name and "down_proj" not in name else 0.02 / math.sqrt(2 * config.num_hidden_layers))
    bank, groups = None, [(list(model.parameters()), 1.0)]
    if bank_config is not None:
        bank = ChapterMemory(model, Tokenizer(out), bank_config, str(out))
        groups += bank.parameter_groups()
        model.requires_grad_(True)                                         # a memory freezes its base
    injection = bank.injection if bank is not None else None
    parameters = [p for group, _ in groups for p in group]
    optimizer = torch.optim.AdamW([dict(params=some, factor=factor, weight_decay=decay) for group, factor in groups for some, decay in
                                   (([p for p in group if p.ndim > 1], 0.05), ([p for p in group if p.ndim == 1], 0.0)) if some],
                                  lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    run = torch.compile(model) if device.type == "cuda" and injection is None else model
    generator = torch.Generator(device).manual_seed(options.seed)
    started, lines = time.time(), []
    bar = tqdm(range(options.steps), desc="pretraining", unit="step")
    for step in bar:
        rate = options.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        start = torch.randint(len(data) - LENGTH - 1, (options.batch, 1), generator=generator, device=device)
        block = data[start + torch.arange(LENGTH + 1, device=device)].long()
        block[:, 0] = BOS
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = run(block[:, :-1], injection=injection)
            loss = F.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())
            if bank is not None:
                loss = loss + bank.losses()[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step + 1 == options.steps:
            lines.append(json.dumps(dict(step=step + 1, loss=round(loss.item(), 4), seconds=round(time.time() - started, 1))))
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(out)
    if bank is not None:
        bank.save_pretrained(out / "chapters")
    with replacing(out / "pretrain.jsonl") as temporary:
        temporary.write_text(json.dumps(dict(vars(options), tokens=len(data), device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                                             parameters=sum(p.numel() for p in parameters))) + "\n" + "\n".join(lines) + "\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="example: python -m tiny.pretrain --out out/tiny")
    parser.add_argument("--out", default="out/tiny", help="folder for config.json, model.safetensors, tokenizer.model, pretrain.jsonl")
    parser.add_argument("--documents", type=int, default=800_000, help="documents to draw")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=128, help=f"blocks of {LENGTH} tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=8, help="processes that draw text; the text does not depend on it")
    parser.add_argument("--chapters", metavar="FILE", help="a JSON file of settings of variants/chapters.py: train the base with such a bank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few parts of the text and few questions: does it run?")
    options = parser.parse_args(arguments)
    out, device = Path(options.out), check_device(options.device)
    bank_config = chapters_config(options.chapters) if options.chapters else None
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")

    # 1. Text and tokenizer. Each of 64 parts has a seed of its own, so the number of processes changes nothing.
    part, parts, questions = max(1, options.documents // 64), 2 if options.quick else 64, 16 if options.quick else 256
    with Pool(options.workers) as processes:
        make_tokenizer(out, sum(processes.map(documents, [(options.seed * 1000 + 500 + i, min(part, 300), (), list("abcdefghijklmnopqrstuvwxyz 0123456789")) for i in range(parts)]), []))
        tasks = [(options.seed * 1000 + i, part, str(out)) for i in range(parts)]
        ids = np.concatenate(list(tqdm(processes.imap(tokenized, tasks), total=parts, desc="drawing text", unit="part")))
    data = torch.from_numpy(ids.astype(np.int16)).to(device)
    print(f"{len(data):,} tokens of text", file=sys.stderr)

    # 2. Weights.
    pretrain(GemmaConfig.from_dict(CONFIG), data, options, bank_config)

    # 3. Does it answer from its prompt? Held-out people and values, four facts.
    model = Gemma.from_pretrained(out, device=device)
    injection = ChapterMemory.from_pretrained(out / "chapters", device=device).injection if options.chapters else None
    tokenizer = Tokenizer(out)
    newline = tokenizer.encode("\n", bos=False)
    for phrasings in ("train", "test"):
        world = World("test", options.seed, open_vocabulary(tokenizer), phrasings)
        examples = [world.example(4, "lookup") for _ in range(questions)]
        prompts = [tokenizer.encode("\n".join(e["facts"]) + f"\nQuestion: {e['question']}\nAnswer:") for e in examples]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        made = model.generate(ids, max_new_tokens=24, attention_mask=mask, stop=(EOS, *newline), injection=injection)[:, longest:].tolist()
        said = [tokenizer.decode([t for t in row if t not in (PAD, EOS)]).split("\n")[0].strip() for row in made]
        right = sum(text == e["answer"] for text, e in zip(said, examples))
        print(f"answers from 4 facts in its prompt, unseen people and values, {phrasings} phrasings: {right / questions:.1%} of {questions}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
