"""Every command that README.md and docs/ print is run, long ones in a shorter form, in the order they are printed.

COMMANDS says how: printed command -> what is run instead, with {toy} for a toy base with a memory, {tmp} for a scratch folder;
AS_PRINTED where nothing need be shorter; or the test that runs a short form already. Then what must be seen: a pattern in the
output, a file, or in that test the call. Whoever prints a new command puts it here.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.readme import code as source
from gemma import Gemma, GemmaConfig, Tokenizer
from memory import GemmaWithMemory, MemoryConfig
from toy import CONFIG, one_thread  # noqa: F401 (one_thread is a fixture)

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = re.compile(r"(python|uv|pip|torchrun|printf|git)\s")
AS_PRINTED = None
TRAIN = "python train.py --model {toy} --inject-after 2 --heads 1 --key-dim 8 --token-key-dim 8 --gat-dim 8 --sentence-dim 16 --no-match --no-said --no-similar-edges --steps 1 --batch 128 --bundles 40 --facts 8 --tokens 40 --eval-every 1 "
LARGE = "--candidates 8 --readable 2 --warmup 1 --lr 1.2e-3 --workers 0 --dropout 0.1 "
SHORT = " --model {toy} --steps 1 --batch 8 --eval-every 1 "              # of designs that train through all layers
POOL = SHORT + "--bundles 40 --facts 8 --tokens 40 --minutes 6 --workers 0 --warmup 1 "
GROW, MEAN = "tests/test_grow.py::test_a_grown_memory_answers_as_before_and_can_learn_more", "tests/test_grow.py::test_the_mean_lies_between_two_memories"
FRESH = "tests/test_grow.py::test_a_memory_of_an_earlier_design_is_brought_up_to_date"
RECALL = "python -m bench.recall --model {toy} --quick --sizes 4 --questions 8 --edits 5 --batch 16 --only "

COMMANDS = {
    'uv run generate.py --memory facts.txt "What is Maria\'s locker code?"': (AS_PRINTED, "^4821$"),
    'uv run --extra dev pytest': ("this very run", ""),
    'pip install torch safetensors sentencepiece huggingface_hub numpy': ("pyproject.toml", ""),
    'python generate.py --memory facts.txt "What is Maria\'s locker code?"': (AS_PRINTED, "^4821$"),
    'python generate.py --memory facts.txt --explain page.html "When is the deadline of the Falcon project?"': (AS_PRINTED, Path("page.html")),
    'python generate.py --session diary': (AS_PRINTED, Path("diary")),
    'printf \'%s\\n\' "Maria lives in Lisbon." "Tom works as a baker." | python generate.py --session diary': (AS_PRINTED, "remembered as 1"),
    'python generate.py --session diary --why "Where does Maria live?"': (AS_PRINTED, "Maria lives in Lisbon"),
    'uv run --extra weights generate.py --model gemma-3-270m --memory facts.txt "When is the deadline of the Falcon project?"': (AS_PRINTED, "^17 November$"),
    'python train.py': (TRAIN, Path("out/memory/curves.png")),
    'python generate.py --model out/memory --memory facts.txt "Where does Maria live?"': (AS_PRINTED, ""),
    'torchrun --nproc_per_node=2 train.py --model gemma-3-270m --sentence-layers 2 --reading-layers 3 --reading-dim 160 --candidates 32 --readable 6 '
    '--steps 20000 --minutes 6.6 --batch 512 --accumulate 2 --bundles 120000 --workers 16 --facts 256 --lr 1.2e-3 --warmup 100 --tokens 44 --eval-every 500 '
    '--dropout 0.1 --compile --out out/A':
        (TRAIN + LARGE + "--sentence-layers 2 --reading-layers 3 --reading-dim 8 --minutes 6.6 --out out/A", Path("out/A/memory.json")),
    'torchrun --nproc_per_node=2 train.py --model gemma-3-270m --sentence-layers 2 --reading-layers 3 --reading-dim 160 --candidates 32 --readable 6 '
    '--init out/A --seed 1 --steps 20000 --minutes 5.6 --batch 1024 --accumulate 2 --bundles 120000 --workers 15 --first-facts 32 --facts 256 --lr 1.2e-3 '
    '--warmup 50 --tokens 44 --eval-every 400 --dropout 0.1 --compile --out out/B':
        ("tests/test_train.py::test_two_processes_take_the_steps_of_one", "torch.distributed.run"),
    'torchrun --nproc_per_node=2 train.py --model gemma-3-270m --sentence-layers 2 --reading-layers 3 --reading-dim 160 --candidates 32 --readable 6 '
    '--init out/B --seed 2 --steps 20000 --minutes 8.0 --batch 1024 --accumulate 2 --bundles 120000 --workers 15 --first-facts 32 --facts 256 --lr 1.2e-3 '
    '--warmup 50 --tokens 44 --eval-every 600 --dropout 0.1 --compile --out out/270m':
        ("tests/test_train.py::test_two_processes_take_the_steps_of_one", "torch.distributed.run"),
    'python train.py --model tiny --reading-layers 1 --steps 20000 --minutes 6.9 --batch 1024 --bundles 100000 --workers 14 --facts 128 --warmup 100 --tokens 56 '
    '--eval-every 500 --compile --out out/tiny': (TRAIN + LARGE + "--reading-layers 1 --reading-dim 8 --minutes 6.9 --out out/tiny", Path("out/tiny/memory.json")),
    'python -m extras.grow out/270m out/grown --reading-dim 256 --reading-layers 4': (GROW, "grow.main("),
    'python train.py --model gemma-3-270m --init out/grown --sentence-layers 2 --reading-layers 4 --reading-dim 256 --candidates 32 --readable 6 --seed 3 '
    '--steps 20000 --minutes 16.2 --batch 1024 --bundles 170000 --workers 14 --first-facts 32 --facts 256 --unknown 0.12 --lr 1e-3 --warmup 100 --tokens 44 '
    '--eval-every 1500 --dropout 0.1 --compile --out out/C':
        (TRAIN + LARGE + "--sentence-layers 2 --reading-layers 4 --reading-dim 8 --unknown 0.12 --out out/C", Path("out/C/memory.json")),
    'python -m extras.mean out/grown out/C out/mean': (MEAN, "mean.main("),
    'python train.py --model gemma-3-270m --init out/mean --sentence-layers 2 --reading-layers 4 --reading-dim 256 --candidates 32 --readable 6 --seed 4 '
    '--steps 30000 --minutes 13.5 --batch 1024 --bundles 170000 --workers 16 --first-facts 32 --facts 256 --unknown 0.12 --text 0.05 --hard 3 --lr 7e-4 '
    '--warmup 100 --tokens 44 --eval-every 1500 --dropout 0.02 --out out/D':
        (TRAIN + LARGE + "--sentence-layers 2 --reading-layers 4 --reading-dim 8 --unknown 0.12 --hard 3 --out out/D", Path("out/D/memory.json")),
    'python -m extras.mean out/mean out/D out/mean-2': (MEAN, "mean.main("),
    'python -m extras.grow out/mean-2 out/marked --fresh outdated': (GROW, "grow.main("),
    **{f'python train.py --model gemma-3-270m --init out/{before} --sentence-layers 2 --reading-layers 4 --reading-dim 256 --candidates 32 --readable 6 --seed {seed} '
       f'--steps 30000 --minutes {minutes} --batch 1024 --bundles 170000 --workers 16 --first-facts 32 --facts 256 --unknown {unknown} --text 0.05 --hard 3 --lr {lr} '
       f'--warmup 60 --tokens 44 --eval-every {every} --dropout 0.02 --out out/{after}':
        (TRAIN + LARGE + f"--sentence-layers 2 --reading-layers 4 --reading-dim 8 --unknown {unknown} --hard 3 --out out/{after}", Path(f"out/{after}/memory.json"))
       for before, after, seed, minutes, unknown, lr, every in (("marked", "E", 5, 7, 0.12, "1e-3", 700), ("E", "F", 6, 6.4, 0.12, "9e-4", 600), ("F", "G", 7, 6.6, 0.15, "8e-4", 600))},
    'python -m extras.grow out/G out/following': (GROW, "grow.main("),
    **{f'python train.py --model gemma-3-270m --init out/{before} --sentence-layers 2 --reading-layers 4 --reading-dim 256 --candidates 32 --readable 6 --seed {seed} '
       f'--steps 30000 --minutes {minutes} --batch 1024 --bundles 170000 --workers 16 --first-facts 32 --facts 256 --unknown 0.15 --text 0.05 --hard 3 --judging 0.5 --lr {lr} '
       f'--warmup 60 --tokens 44 --eval-every 500 --dropout 0.04 --out out/{after}': ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init=")
       for before, after, seed, minutes, lr in (("following", "H", 8, 7, "1e-3"), ("H", "I", 9, 7.3, "8e-4"))},
    'python -m extras.grow out/I out/sharing --fresh understand.layers.0.alike understand.layers.1.alike understand.layers.2.alike understand.layers.3.alike':
        (FRESH, "grow.main("),
    'python -m extras.grow out/K out/wider --candidates 96': ("tests/test_grow.py::test_more_candidates_are_compared", "grow.main("),
    **{f'python train.py --model gemma-3-270m --init out/{before} --sentence-layers 2 --reading-layers 4 --reading-dim 256 --candidates 32 --readable 6 --seed {seed} '
       f'--steps 30000 --minutes {minutes} --batch 1024 --bundles {bundles} --workers 15 --first-facts 32 --facts 256 --unknown 0.12 --text 0.05 --hard 3 --judging 0.5 --lr {lr} '
       f'--warmup 60 --tokens 44 --eval-every 300 --dropout 0.04 --out out/{after}': ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init=")
       for before, after, seed, minutes, bundles, lr in (("sharing", "J", 12, 6.7, 130000, "1e-3"), ("J", "K", 13, 4.3, 100000, "7e-4"))},
    'python -m extras.grow out/wider out/deeper --reading-layers 6 --candidates 32': (GROW, "grow.main("),
    **{f'python train.py --model gemma-3-270m --init out/{before} --sentence-layers 2 --reading-layers 6 --reading-dim 256 --candidates 32 --readable 6 --seed {seed} '
       f'--steps 30000 --minutes {minutes} --batch 1024 --bundles {bundles} --workers {workers} --first-facts 32 --facts 256 --unknown 0.12 --text 0.05 --hard 3 --judging 0.5 '
       f'--marking 0.5 --lr {lr} --warmup 60 --tokens 44 --eval-every {every} --dropout 0.04 --out out/{after}':
        ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init=")
       for before, after, seed, minutes, bundles, workers, lr, every in (("deeper", "L", 14, "7.0", 110000, 15, "1e-3", 450), ("L", "M", 15, 4.2, 60000, 14, "6e-4", 280))},
    **{f'python -m extras.grow out/{before} out/{after} --candidates 96': ("tests/test_grow.py::test_more_candidates_are_compared", "grow.main(")
       for before, after in (("M", "widest"), ("N", "N-wide"), ("O", "O-wide"), ("P", "P-wide"))},
    **{f'python train.py --model gemma-3-270m --init out/{before} --sentence-layers 2 --reading-layers 6 --reading-dim 256 --candidates 32 --readable 6 --seed {seed} --steps 30000 '
       f'--minutes {minutes} --batch 768 --pairs {pairs} --bundles 105000 --workers 15 --first-facts 32 --facts 256 --unknown 0.12 --text 0.05 --hard 3 --judging 0.5 --marking 1 '
       f'--lr {lr} --warmup 60 --tokens 44 --eval-every 400 --dropout 0.04 --out out/{after}': ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init=")
       for before, after, seed, minutes, pairs, lr in (("widest", "N", 16, 6.9, 3072, "1e-3"), ("hearing", "O", 17, 6.9, 2304, "1e-3"), ("O", "P", 18, 6.4, 2304, "8e-4"))},
    'python -m extras.grow out/mean-3 out/hearing': (GROW, "grow.main("),
    **{f'python -m extras.mean {names}': (MEAN, "mean.main(")
       for names in ("out/widest out/N-wide out/mean-3", "out/hearing out/O-wide out/mean-4", "out/mean-4 out/P-wide out/mean-5")},
    'python -m extras.grow out/tiny-D out/tiny-following': (GROW, "grow.main("),
    'python -m extras.grow out/tiny-F out/tiny-sharing --fresh understand.layers.0.alike understand.layers.1.alike understand.layers.2.alike': (FRESH, "grow.main("),
    **{f'python train.py --model tiny --init out/tiny-{before} --reading-layers 3 --reading-dim 192 --seed {seed} --steps 30000 --minutes {minutes} --batch 1024 --bundles 110000 '
       f'--workers 10 --first-facts 16 --facts 128 --unknown 0.15 --hard 2 --judging 0.5 --lr {lr} --warmup 60 --tokens 56 --eval-every 600 --dropout 0 --compile --out out/tiny-{after}':
        ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init=")
       for before, after, seed, minutes, lr in (("sharing", "G", 10, 7.1, "1.5e-3"), ("G", "H", 11, 7.3, "1.2e-3"))},
    **{f'python train.py --model tiny --init out/tiny-{before} --reading-layers 3 --reading-dim 192 --seed {seed} --steps 30000 --minutes {minutes} --batch 1024 --bundles 120000 '
       f'--workers 12 --first-facts 16 --facts 128 --unknown 0.12 --hard 2 --judging 0.5 --lr {lr} --warmup 60 --tokens 56 --eval-every 600 --dropout 0 {compiled}--out out/tiny-{after}':
        ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init=")
       for before, after, seed, minutes, lr, compiled in (("following", "E", 8, 7.4, "1.5e-3", "--compile "), ("E", "F", 9, 7.7, "1.2e-3", ""))},
    'python -m extras.grow out/tiny-mean-2 out/tiny-marked --fresh outdated': (GROW, "grow.main("),
    'python train.py --model tiny --init out/tiny-marked --reading-layers 3 --reading-dim 192 --seed 5 --steps 30000 --minutes 7 --batch 1024 --bundles 120000 '
    '--workers 12 --first-facts 16 --facts 128 --unknown 0.12 --hard 2 --lr 1.5e-3 --warmup 60 --tokens 56 --eval-every 700 --dropout 0 --out out/tiny-D':
        ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init="),
    'python -m extras.grow out/tiny out/tiny-grown --reading-dim 128 --reading-layers 2': (GROW, "grow.main("),
    'python train.py --model tiny --init out/tiny-grown --reading-layers 2 --reading-dim 128 --seed 3 --steps 20000 --minutes 8 --batch 1024 --bundles 120000 '
    '--workers 8 --first-facts 16 --facts 128 --unknown 0.12 --lr 1.5e-3 --warmup 100 --tokens 56 --eval-every 1500 --dropout 0.05 --compile --out out/tiny-B':
        ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init="),
    'python -m extras.mean out/tiny-grown out/tiny-B out/tiny-mean': (MEAN, "mean.main("),
    'python -m extras.grow out/tiny-mean out/tiny-larger --reading-dim 192 --reading-layers 3': (GROW, "grow.main("),
    'python train.py --model tiny --init out/tiny-larger --reading-layers 3 --reading-dim 192 --seed 4 --steps 30000 --minutes 11.8 --batch 1024 --bundles 120000 '
    '--workers 8 --first-facts 16 --facts 128 --unknown 0.12 --hard 2 --lr 1.5e-3 --warmup 100 --tokens 56 --eval-every 1500 --dropout 0 --out out/tiny-C':
        ("tests/test_train.py::test_a_run_can_start_from_a_trained_memory", "init="),
    'python -m extras.mean out/tiny-larger out/tiny-C out/tiny-mean-2': (MEAN, "mean.main("),
    'python -m tiny.pretrain --out tiny --steps 15000 --documents 1000000':
        ("python -m tiny.pretrain --out {tmp}/pretrained --quick --steps 1 --batch 2 --documents 19200 --workers 1", Path("pretrained/model.safetensors")),
    'python -m tiny.pretrain --chapters variants/configs/chapters.json --out out/tiny-bank':
        ("tests/test_facts.py::test_from_scratch_with_a_bank", "pretrain("),
    'python train.py --deterministic': ("tests/test_train.py::test_resumed_is_unbroken", "deterministic=True"),
    'python train.py --config variants/configs/prefix.json --slots 4 --patience 3 --out out/prefix':
        ("python train.py --config variants/configs/prefix.json --slots 4 --patience 3 --gist-after 1 --out out/prefix" + POOL, Path("out/prefix/memory.json")),
    'python generate.py --model out/prefix --memory facts.txt "Where does Maria live?"': (AS_PRINTED, ""),
    **{f'python train.py --config variants/configs/{name}.json --model gemma-3-270m --steps 20000 --minutes 6 --batch 512 --bundles 60000 --workers 14 '
       f'--facts 16 --warmup 100 --eval-every 500 --out out/{name}-270m':
        (f"python train.py --config variants/configs/{name}.json --out out/{name}-270m" + (" --gist-after 1" if name == "prefix" else "") + POOL,
         Path(f"out/{name}-270m/memory.json")) for name in ("prefix", "cross")},
    'python -m bench.compare --quick': ("tests/test_compare.py::measured", "compare.main("),
    'python train.py --variant lora --lora-rank 8 --known 16 --steps 60 --batch 24 --lr 4e-3 --warmup 5 --eval-every 30 --out out/lora':
        ("python train.py --variant lora --lora-rank 8 --known 3 --lr 4e-3 --warmup 5 --out out/lora" + SHORT, Path("out/lora/memory.json")),
    'python train.py --variant chapters --bank 256 --placement 3,4,5,6,7 --bank-lr 5 --known 16 --steps 60 --batch 24 --lr 4e-3 --warmup 5 --eval-every 30 --out out/bank':
        ("python train.py --variant chapters --bank 16 --placement 2,3 --bank-lr 5 --known 3 --lr 4e-3 --warmup 5 --out out/bank" + SHORT, Path("out/bank/memory.json")),
    'python train.py --variant lora --facts-file facts.txt --train-on text --steps 60 --batch 24 --out out/mine':
        ("python train.py --variant lora --facts-file facts.txt --train-on text --out out/mine" + SHORT, Path("out/mine/memory.json")),
    'python train.py --config variants/configs/chapters.json --model gemma-3-270m':
        ("python train.py --config variants/configs/chapters.json --bank 16 --known 3 --out out/chapters" + SHORT, Path("out/chapters/memory.json")),
    'python generate.py --model out/bank "Where does Maria live?"': (AS_PRINTED, ""),
    'python -m exercises check 16 --short': ("tests/test_exercises.py::test_ten_minutes", "scored("),
    'python -m bench.ladder': ("tests/test_ladder.py::short", "ladder.main(["),
    'python -m exercises': ("python -m exercises --work {tmp}/workshop", "^01  new"),
    'python -m exercises next': ("python -m exercises next --work {tmp}/workshop", "^01  new"),
    'python -m exercises check 03': ("python -m exercises check 03 --work {tmp}/workshop", "FAIL"),
    'python -m exercises --use-mine --memory facts.txt "What is Maria\'s locker code?"':
        ('python -m exercises --work {tmp}/workshop --use-mine --memory facts.txt "What is Maria\'s locker code?"', "^4821$"),
    'python -m bench.recall --help': (AS_PRINTED, "--set-threshold"),
    'python -m bench.readme': ("python -m bench.readme --check", ""),
    'python -m extras.curves tiny/memory --out tiny.png': (AS_PRINTED, Path("tiny.png")),
    'python data_gen.py --n 3 --out data.jsonl --facts 6 --kind coreference': (AS_PRINTED, Path("data.jsonl")),
}
# Commands of the benches change with every measurement, and bench.readme prints them above its tables: start -> the same for any of them.
option = lambda name, printed: re.search(rf"--{name} (\S+)", printed)[1]
MEASURED = {
    "python -m bench.recall --model": (lambda printed: RECALL + ("locality,edits" if "edits" in option("only", printed) else "refusal,recall"), r"\| facts"),
    **{start: (lambda printed: "tests/test_speed.py::test_quick_benches", "bench.main([\"--quick\"") for start in (
        "python -m bench.decode", "python -m bench.memory_scale", "python -m bench.train_step", "python -m bench.gat", "torchrun --nproc_per_node=2 -m bench.train_step")},
    "python -m bench.compare --model": (lambda printed: "tests/test_compare.py::measured", "compare.main("),
    "python -m bench.prefix": (lambda printed: "tests/test_compare.py::test_what_keeps_the_prefix_from_answering", "prefix.main("),
    "python -m bench.ladder --model": (lambda printed: "tests/test_ladder.py::short", "ladder.main(["),
    "python -m bench.natural": (lambda printed: "tests/test_natural.py::test_whole_command", "natural.main(["),
    "python -m bench.sessions kills": (lambda printed: "python -m bench.sessions kills --model {toy} --times 1", "acknowledged"),
    "python -m bench.sessions flips": (lambda printed: "python -m bench.sessions flips --model {toy}", "cache_refused"),
    "python -m bench.sessions large": (lambda printed: "python -m bench.sessions large --model {toy} --facts 40", "bytes_per_fact"),
    "python -m bench.sessions evening": (lambda printed: "tests/test_session.py::test_told_long_ago", "sessions.evening("),
    "python -m bench.kills": (lambda printed: "tests/test_hostile.py::test_some_kills", "kills.main(["),
    "python -m bench.fuzz": (lambda printed: f"python -m bench.fuzz --target {option('target', printed)} --minutes 0.03 --out {{tmp}}/fuzz", "cases"),
}
EXIT = {"python -m exercises check 03": 1}                                 # not solved yet
ran = set()                                                                # two printed commands may have the same short form


def printed(text):
    """The commands of a page: lines of its code blocks, without their remarks, and what stands between backticks."""
    found = []

    def block(match):
        found.extend(line for line in (re.sub(r"\s{2,}#.*", "", line).strip() for line in match[1].splitlines()) if PROGRAMS.match(line))
        return ""
    prose = re.sub(r"^```\w*\n(.*?)^```$", block, text, flags=re.M | re.S)
    return found + [code for code in re.findall(r"`([^`\n]+)`", prose) if PROGRAMS.match(code)]


def every():
    return list(dict.fromkeys(command for page in PAGES for command in printed(page.read_text(encoding="utf-8"))))


def how(command):
    """(what is run for a printed command, what must be seen), or None where nobody said so."""
    for start, (shorten, seen) in MEASURED.items():
        if command.startswith(start):
            return shorten(command), seen
    return COMMANDS.get(command)


@pytest.fixture(scope="module")
def toy(tmp_path_factory, one_thread):  # noqa: F811
    """A base that is quicker than tiny, with tiny's tokenizer, since sentences in toy's bytes are long; and an untrained memory beside it."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copy(ROOT / "tiny" / "tokenizer.model", folder)
    tokenizer = Tokenizer(folder)
    torch.manual_seed(1)
    base = Gemma(GemmaConfig.from_dict({**CONFIG, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}))
    base.save_pretrained(folder)
    config = MemoryConfig(inject_after=2, heads=2, key_dim=16, token_key_dim=8, gat_dim=8, candidates=4, readable=2)
    GemmaWithMemory(Gemma.from_pretrained(folder), tokenizer, config, folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the repository's, for commands to write to: its entries are links."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("out", "workshop", "diary"):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_every_command_is_known():
    """Catches a command that was printed, or changed, without anybody having run it, and one that isn't printed any more."""
    unknown = [command for command in every() if how(command) is None]
    assert not unknown, f"COMMANDS in {Path(__file__).name} doesn't say how to run: {unknown}"
    gone = set(COMMANDS) - set(every())
    assert not gone, f"no page prints: {gone}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")             # as for any module that tests import too
@pytest.mark.parametrize("command", every())
def test_command(command, toy, checkout, monkeypatch, capfd, request):  # noqa: F811
    """Catches options that are gone, steps in the wrong order, and output that isn't as the page says."""
    run, seen = how(command)
    line = (run or command).format(toy=toy, tmp=checkout) if run else command
    if line == "this very run":
        return command_of_ci(command)
    if line == "pyproject.toml":
        return packages(command)
    if line.startswith("tests/"):
        assert seen in source(*line.split("::"))
        return
    if line in ran:
        return
    ran.add(line)
    said, line = "", re.sub(r"^uv run (--extra \w+ )?(?=\S+\.py )", "python ", line)
    if command.startswith("uv run --extra"):
        assert f"\n{shlex.split(command)[3]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if "--model gemma-3-270m" in line:
        request.getfixturevalue("weights_270m")
    if line.startswith("printf"):
        said, _, line = line.partition(" | ")
        said = "".join(text + "\n" for text in shlex.split(said)[2:])
    program, *arguments = shlex.split(line)
    assert program == "python"
    monkeypatch.chdir(checkout)
    if "pretrain" in line:                                                 # starts processes, which import what is __main__
        done = subprocess.run([sys.executable, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
        code = done.returncode
    else:
        code = in_this_process(arguments, said, monkeypatch)
    output = "\n".join(capfd.readouterr())
    assert code == EXIT.get(command, 0), output
    if isinstance(seen, Path):
        assert (checkout / seen).stat().st_size > 0, output
    else:
        assert re.search(seen, output, re.M), output


def in_this_process(arguments, said, monkeypatch):
    """Run `python ARGUMENTS` with `said` on its standard input, as Python itself would, but without starting anew. Returns the exit code."""
    if arguments[0] == "-m":
        arguments = arguments[1:]
        start = lambda: runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        start = lambda: runpy.run_path(arguments[0], run_name="__main__")
    read, write = os.pipe()
    os.write(write, said.encode())
    os.close(write)
    monkeypatch.setattr(sys, "argv", arguments)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            start()
        except SystemExit as end:
            return 0 if end.code is None else end.code
    return 0


def command_of_ci(command):
    """The command that runs the tests is how CI runs them."""
    program, rest = command.split(" ", 1)
    assert f'"${program}" {rest}' in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def packages(command):
    """What pip is told to install is what pyproject.toml depends on."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)[1]
    assert sorted(re.findall(r'^ *"([\w-]+)', block, re.M)) == sorted(command.split()[2:])
