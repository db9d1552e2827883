"""Training that is killed:  python -m bench.kills --kills 100

A short run on the tiny model is killed (SIGKILL) at random moments, each time gone on with by `--resume`, and its end compared
bit by bit with that of a run that was never killed: weights, the optimizer's moments, the saved memory, the losses in the log.
After each kill the folder must hold a memory that opens, if it holds one at all.

Each run is a process of its own that starts as a copy of this one, which has imported PyTorch and encoded the pool: so the
kills hit the training and the files it writes, and not the start. One thread on the CPU: sums are
always added up in the same order.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

import train
from bench.common import Parser, commit, hardware, out_folder, run, write_json
from gemma import InputError
from memory import GemmaWithMemory, MemoryConfig

SETTINGS = train.TrainConfig(device="cpu", steps=8, batch=8, facts=8, tokens=40, warmup=2, eval_every=2, deterministic=True)
AGAIN = 0.3                              # how often a resumed run is killed too
QUESTIONS = 8                            # of an evaluation: it is the files that are tested here


def child(settings, model, pools):
    """One training run, in a process that may be killed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    evaluate = train.evaluate
    train.evaluate = lambda *inputs, **options: evaluate(*inputs, **{**options, "questions": QUESTIONS})
    train.train(settings, MemoryConfig(dropout=0.1), model, pools)


def end(folder):
    """What must be the same at the end, as a dict of bytes and values: all but the time it took."""
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes() for name in file.keys()}
        found["progress"] = {k: v for k, v in json.loads(file.metadata()["progress"]).items() if k != "seconds"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found["log"] = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    return {**found, **{name: (folder / name).read_bytes() for name in ("memory.safetensors", "memory.json")}}


def kill_and_resume(kills, seed, model, pools, top):
    """Kill as often as that. Returns counts: runs, those that ended otherwise, and where the kills fell."""
    rng, start = random.Random(seed), multiprocessing.get_context("fork").Process
    launch = lambda folder, resume: start(target=child, args=(replace(SETTINGS, out=str(folder), resume=resume), model, pools))
    whole, began = launch(top / "whole", False), time.time()
    whole.start(), whole.join()
    if whole.exitcode:
        raise InputError(f"expected the run that is not killed to end well, got exit code {whole.exitcode}; train.py says why.")
    length, expected = time.time() - began, end(top / "whole")
    counts = dict(kills=0, runs=0, other_end=0, memory_that_does_not_open=0, before_the_first_checkpoint=0, while_writing=0, seconds_of_a_run=round(length, 1))
    bar = tqdm(total=kills, desc="killing", unit="kill")
    while counts["kills"] < kills:
        folder, resume = top / f"run{counts['runs']}", False
        while True:
            process = launch(folder, resume)
            process.start()
            if counts["kills"] < kills and (not resume or rng.random() < AGAIN):
                process.join(rng.uniform(0, length))
                if process.is_alive():
                    process.kill()
                    process.join()
            else:
                process.join()
            if process.exitcode >= 0:
                break
            counts["kills"] += 1
            bar.update()
            resume = (folder / "checkpoint.safetensors").is_file()         # else --resume says to train anew
            counts["before_the_first_checkpoint"] += not resume
            counts["while_writing"] += any(folder.glob(".*.tmp")) or (folder / "memory.safetensors.new").exists()
            if (folder / "memory.json").is_file():
                try:
                    GemmaWithMemory(model.gemma, model.tokenizer, MemoryConfig()).load_memory(folder)
                except InputError as error:
                    counts["memory_that_does_not_open"] += 1
                    print(error, file=sys.stderr)
        counts["runs"] += 1
        counts["other_end"] += process.exitcode != 0 or end(folder) != expected
    bar.close()
    return counts


def main(arguments=None):
    parser = Parser(prog="python -m bench.kills", description="Kill training at random moments, resume it, and compare the end bit by bit.")
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--out", type=Path, help="folder for kills.json (default out/kills-tiny)")
    args = parser.parse_args(arguments)
    out, started = out_folder(args.out, "kills", "tiny"), time.time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = GemmaWithMemory.from_pretrained("tiny")
    pools = [train.Pool(model, split, 60, SETTINGS.tokens, i, texts=8, progress=False) for i, split in enumerate(("train", "validation"))]
    with tempfile.TemporaryDirectory() as top:
        counts = kill_and_resume(args.kills, args.seed, model, pools, Path(top))
    torch.set_num_threads(threads)
    result = dict(command="python -m bench.kills " + " ".join(sys.argv[1:] if arguments is None else arguments), commit=commit(),
                  hardware=hardware(), seconds=round(time.time() - started), **counts)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "kills.json", result)
    print(f"{result['command']}\n{result['hardware']}, commit {result['commit']}, {result['seconds']} s\n\n"
          f"{counts['kills']} kills in {counts['runs']} runs ({counts['before_the_first_checkpoint']} before the first checkpoint, "
          f"{counts['while_writing']} inside the writing of a file): {counts['other_end']} runs ended otherwise than the one that was never "
          f"killed, {counts['memory_that_does_not_open']} times the folder held a memory that did not open")
    return result


if __name__ == "__main__":
    run(main)
