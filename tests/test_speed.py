"""Speed that changes no answer: compiled decoding gives the same tokens and is compiled once, memories grow in place, benches run."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memory
from bench import decode, gat, memory_scale, timing, train_step
from extras import compiled
from extras.memory_model import find_base
from extras.room import Growing
from gemma import Gemma, GemmaConfig, InputError, KVCache, Tokenizer
from memory import GemmaWithMemory, MemoryConfig
from toy import FACTS, one_thread, toy_model  # noqa: F401 (one_thread is a fixture)

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ["Where does Maria live?", "Who has the red bike that we saw yesterday?", "Who?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def model(folder):
    model = GemmaWithMemory.from_pretrained(folder)
    model.config.null_threshold = 1.0                                      # random: it shall always speak
    return model


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler: code is traced as for one, then run as it is. Returns how many graphs were traced so far."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="eager", dynamic=options["dynamic"]))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------- writing

def test_nothing_that_is_written_waits_for_a_gpu(monkeypatch):
    """Catches what makes the host wait: a number asked of a tensor on the device, or a shape that depends on one. The meta device
    has no numbers to give."""
    monkeypatch.setattr(memory, "working_dtype", lambda device: torch.float32)             # nor an autocast
    with torch.device("meta"):
        gemma = Gemma(GemmaConfig.from_dict(timing.SHAPES["toy"]))
    model = GemmaWithMemory(gemma.eval(), Tokenizer(find_base("tiny")), MemoryConfig(inject_after=2)).eval()
    facts = memory_scale.facts(100) + ["x", "word " * 100]
    assert model.gemma.device.type == "meta" and model.add_to_memory(facts) == list(range(len(facts)))
    model.add_to_memory("One more.")
    tokens = model.memory_graph.tokens
    assert tokens.keys.device.type == "meta" and len(model.memory_graph.nodes) == len(tokens.lengths) == len(facts) + 1
    assert len(tokens.ids) == len(tokens.keys) == sum(len(model.token_ids(fact)) - 1 for fact in [*facts, "One more."]) and tokens.longest > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_gpu_writes_is_what_a_cpu_writes(folder):
    """Catches a wait that only a GPU knows, as for what is copied to it from ordinary memory, and a copy that is read before it has arrived."""
    gpu, cpu = (GemmaWithMemory.from_pretrained(folder, device=device, dtype=torch.float32) for device in ("cuda", "cpu"))
    facts = [f"{fact} {n}" + " and more" * (n % 5) for n in range(800) for fact in FACTS]
    gpu.add_to_memory(facts)                                               # a first time: libraries are loaded, memory is taken
    gpu.clear_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.add_to_memory(facts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu.add_to_memory(facts)
    a, b = gpu.memory_graph, cpu.memory_graph
    assert torch.equal(a.tokens.ids.cpu(), b.tokens.ids) and torch.equal(a.tokens.starts.cpu(), b.tokens.starts) and a.tokens.longest == b.tokens.longest
    torch.testing.assert_close(a.tokens.keys.cpu().float(), b.tokens.keys.float(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(a.nodes.cpu(), b.nodes, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ compiled

def test_compiled_answers_are_the_same_and_compiled_once(model, traced, capsys):
    """Catches a step that depends on the length of the prompt or on what is remembered, and is compiled again and again; one
    that reads another request's memory or cache; and code that can't be compiled in one piece."""
    model.add_to_memory(FACTS)
    expected = [model.answer(q, max_new_tokens=12) for q in QUESTIONS]
    assert len(set(expected)) > 1
    assert model.answer(QUESTIONS[0], max_new_tokens=12, compile=True) == expected[0]
    graphs = traced()
    assert graphs == 3                                                     # a sliding layer, a full one, and the step
    for question, answer in list(zip(QUESTIONS, expected))[::-1]:
        assert model.answer(question, max_new_tokens=12, compile=True) == answer
    model.add_to_memory("Maria moved to Oslo.")
    model.forget(1)
    for question in QUESTIONS:
        assert model.answer(question, max_new_tokens=12, compile=True) == model.answer(question, max_new_tokens=12)
    assert traced() == graphs and not torch._dynamo.utils.counters["graph_break"]
    assert model.gemma.compiles and "can't compile" not in capsys.readouterr().err


def test_two_compiled_streams_at_once(model, traced):
    """Catches two conversations that share a cache, and random draws that compiling changes."""
    options = dict(max_new_tokens=6, stop=(), temperature=1.0, seed=5)
    prompts = [torch.tensor([model.prompt(q)]) for q in QUESTIONS[:2]]
    alone = [torch.cat([*model.gemma.stream(ids, **options)]) for ids in prompts]
    both = zip(*(model.gemma.stream(ids, compile=True, **options) for ids in prompts))
    for got, expected in zip(zip(*both), alone):
        assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_where_compiling_is_impossible_it_says_so_and_goes_on(model, monkeypatch, capsys, when):
    """Catches a traceback, a message for each question, and an answer that suffers from the attempt."""
    def impossible(*_, **__):
        raise RuntimeError("no compiler\nand more of it")

    model.add_to_memory(FACTS)
    expected = [model.answer(q, max_new_tokens=8) for q in QUESTIONS]
    monkeypatch.setattr(torch, "compile", impossible if when == "at once" else lambda f, **_: impossible)
    assert [model.answer(q, max_new_tokens=8, compile=True) for q in QUESTIONS] == expected
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "can't compile here (RuntimeError: no compiler)" in said[0]


def test_bad_input_is_no_failure_to_compile(model, traced, capsys):
    with pytest.raises(InputError, match="token ids from 0"):
        list(model.gemma.stream(torch.tensor([[2, 10 ** 6]]), compile=True))
    assert model.gemma.compiles and "can't compile" not in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_the_tokens_of_eager(folder):
    """Catches a graph that reads a stale address: memories and prompts change between its replays. The first prompt of its
    length is not recorded, the second is, the third replays it; what was found is asked for too."""
    model = GemmaWithMemory.from_pretrained(folder, device="cuda", dtype=torch.float32)
    model.config.null_threshold = 1.0
    for facts in (FACTS[:4], FACTS[4:], ["Zoë moved to Graz and everybody was glad of it, since she had long wished to."]):
        model.add_to_memory(facts)
        for question in QUESTIONS * 3:
            expected, weights = model.answer(question), model.weights()
            assert model.answer(question, compile=True) == expected
            torch.testing.assert_close(model.weights(), weights, rtol=1e-3, atol=1e-5)
        assert model.answer(QUESTIONS, compile=True) == model.answer(QUESTIONS)
        assert any(decoder.prompts and all(decoder.prompts.values()) for decoder in model.gemma.decoders.values())
    model.forget(0)
    assert model.answer(QUESTIONS[0], compile=True) == model.answer(QUESTIONS[0])
    assert model.gemma.compiles


@pytest.mark.parametrize("options", [{}, dict(marks=False), dict(reading_layers=0)])
def test_reading_for_one_question_neither_waits_for_a_gpu_nor_sends_it_numbers(tmp_path, monkeypatch, options):
    """Catches what can't be recorded as a CUDA graph, where CI has no GPU: a number asked for, or a tensor made of some, at a prompt or a step."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name, masks = function.overloadpacket.__name__, arguments[1] if function.overloadpacket.__name__ == "index" else ()
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "repeat_interleave"), name
            assert not any(mask is not None and mask.dtype == torch.bool for mask in masks), "index by a mask"
            return function(*arguments, **(options or {}))

    model, read = GemmaWithMemory.from_pretrained(toy_model(tmp_path, **options)), []
    model.add_to_memory(FACTS)
    after_layer = model.injection.after_layer

    def watched(layer, h):
        read.append(layer)
        with Watch():
            return after_layer(layer, h)
    monkeypatch.setattr(model.injection, "after_layer", watched)
    list(model.stream(torch.tensor([model.prompt(QUESTIONS[0])]), max_new_tokens=3, stop=()))
    assert len(read) == 3 * len(model.gemma.layers)


@pytest.mark.parametrize("possible", [True, False])
def test_recorded_prompts_on_a_cpu(model, traced, monkeypatch, possible):
    """Catches a prompt that is answered from what another one found, or from a memory that has changed, and one that can't be recorded.
    A graph is stood in for by its work, done again, with its results put where the first ones were."""
    replays = []

    def captured(work):
        if not possible:
            raise RuntimeError("a wait for the GPU")
        first, memory, found = work(), decoder().cache.memory, model.injection.reading

        def replay():
            cache = decoder().cache
            assert cache.memory is memory
            cache.memory = {}
            first.copy_(work())
            for name, tensor in cache.memory.items():
                memory[name].copy_(tensor)
            cache.memory = memory
            vars(found).update(vars(model.injection.reading))
            model.injection.reading = None                                 # a graph sets nothing in Python
            replays.append(1)
        return argparse.Namespace(replay=replay), first

    made = []
    decoder = lambda: made[-1]
    begin = compiled.CompiledDecoder.prefill
    monkeypatch.setattr(compiled.CompiledDecoder, "prefill", lambda self, *prompt: (made.append(self), begin(self, *prompt))[1])
    monkeypatch.setattr(compiled.CompiledDecoder, "gpu", True)
    monkeypatch.setattr(compiled.CompiledDecoder, "record_step", lambda self: None)
    monkeypatch.setattr(compiled, "captured", captured)
    for facts in (FACTS[:4], FACTS[4:]):
        model.add_to_memory(facts)
        for question in [*QUESTIONS, QUESTIONS[1] + " And when was that, on which day?"] * 3:
            expected, weights = model.answer(question, max_new_tokens=6), model.weights()
            assert model.answer(question, max_new_tokens=6, compile=True) == expected
            torch.testing.assert_close(model.weights(), weights, rtol=1e-4, atol=1e-6)
    prompts = decoder().prompts
    assert model.gemma.compiles and len(prompts) == 3 and all(prompts.values()) == possible
    assert len(replays) == 2 * (12 - 3) * possible                         # of each of the three lengths the first was not recorded


def test_a_memory_looks_the_same_until_it_changes(model):
    """Catches a recorded pass that goes on with what was forgotten, or that is recorded anew for every question."""
    look = lambda: (model._open(), model.injection.source())[1]
    assert look() is None
    model.add_to_memory(FACTS)
    first = look()
    model.answer(QUESTIONS[0])
    assert look() is first
    for change in (lambda: model.add_to_memory("Ben was born."), lambda: model.forget(1), lambda: model.train().eval(), model.clear_memory):
        before = look()
        change()
        assert look() is not before


def test_what_is_kept_of_a_question_is_tensors_of_few_shapes(model):
    """Catches state outside of cache.memory's tensors, which no CUDA graph would see change, and shapes that follow each fact's length."""
    shapes = set()
    for facts in (FACTS, ["Ana works in Oslo today."], ["Ben was born."]):
        model.add_to_memory(facts)
        model._open()
        ids = torch.tensor([model.prompt(QUESTIONS[0])])
        cache = KVCache(model.gemma.config, 1, 64, torch.float32, "cpu")
        model.gemma(ids, None, torch.ones_like(ids), cache, model.injection)
        shapes.add(tuple((name, tuple(tensor.shape)) for name, tensor in cache.memory.items()))
    assert len(shapes) == 1 and "query" in cache.memory


# -------------------------------------------------------------------------------------------------------------- growth

def test_growing_copies_rarely_and_never_mixes_up():
    """Catches an append that writes over what another tensor still shows, or copies everything each time."""
    room, whole, copies = Growing(), torch.zeros(0, 2), 0
    for i in range(200):
        before = whole.data_ptr()
        whole = room.append("x", whole, torch.full((1, 2), float(i)))
        copies += whole.data_ptr() != before
    assert torch.equal(whole[:, 0], torch.arange(200.0)) and copies < 20
    short = whole[:100]
    other = room.append("x", short, torch.full((1, 2), -1.0))              # as after forgetting: not the newest
    assert whole[100, 0] == 100 and other[100, 0] == -1 and len(other) == 101
    assert torch.equal(room.append("x", torch.ones(3, 2), torch.ones(1, 2)), torch.ones(4, 2))
    several = room.append("y", torch.zeros(1, 2), torch.ones(2, 2), torch.full((1, 2), 2.0))
    assert several[:, 0].tolist() == [0, 1, 1, 2] and room.append("y", several) is several


def test_facts_for_which_there_is_no_room_change_nothing(model, monkeypatch):
    """Catches a memory that counts facts whose keys it could not keep."""
    model.add_to_memory(FACTS)
    graph, append = model.memory_graph, Growing.append
    before = model.answer(QUESTIONS), list(graph.ids), len(graph.tokens.lengths), graph.nodes.clone()

    def full(self, name, *parts, **options):
        if name == "nodes":
            raise torch.OutOfMemoryError("no room")
        return append(self, name, *parts, **options)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Growing, "append", full)
        model.add_to_memory(["Ben was born.", "Ana works in Oslo."])
    assert (model.answer(QUESTIONS), graph.ids, len(graph.tokens.lengths)) == before[:3] and len(graph.texts) == len(graph) == len(FACTS)
    assert torch.equal(graph.nodes, before[3]) and model.add_to_memory("Ben was born.") == len(FACTS)


@torch.no_grad()
def test_keys_of_what_changed_are_the_keys_of_all(model, monkeypatch):
    """Catches a neighbour in time that is forgotten at the edge of a block, or that a new episode does not reach."""
    monkeypatch.setattr(memory, "BLOCK", 3)
    graph = model.memory_graph
    for some in (FACTS[:4], FACTS[4:5], FACTS[5:]):
        model.add_to_memory(some)
        graph.view(model.injection)
        whole = model.injection.gnn.keys(graph.nodes, *model.injection.edges(torch.ones(1, len(graph), dtype=torch.bool)))
        torch.testing.assert_close(graph.keys, whole, rtol=1e-5, atol=1e-5)
    model.forget(2)
    graph.view(model.injection)
    whole = model.injection.gnn.keys(graph.nodes, *model.injection.edges(torch.ones(1, len(graph), dtype=torch.bool)))
    torch.testing.assert_close(graph.keys, whole, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- benches

def test_transformers_has_the_same_weights():
    """Catches a peer that is measured with other work to do: both give the same logits."""
    base = timing.random_base("toy", torch.float32, "cpu")
    ids = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(timing.transformers_of(base)(ids).logits, base(ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bench, options", [(decode, ["--no-compile"]), (gat, []), (memory_scale, []), (train_step, [])], ids=lambda x: getattr(x, "__name__", ""))
def test_quick_benches(bench, options, tmp_path, capsys):
    """Catches a bench that fails on the GPU for which it was written, after minutes: all of it runs, and its report is whole."""
    pytest.importorskip("transformers"), pytest.importorskip("torch_geometric")
    out = tmp_path / "result.json"
    result = bench.main(["--quick", *options, "--out", str(out)])
    saved = json.loads(out.read_text())
    assert saved["hardware"] and saved["command"].startswith("python -m bench.") and bench.report(saved) == bench.report(result)
    assert "| " in capsys.readouterr().out
    if bench is decode:
        assert set(result["decoding"]) == {"ours, eager", "ours, eager, with memory", "transformers, eager"}
        assert result["alike"]["transformers, eager"] == 1.0
    if bench is train_step:
        assert 0 < result["share"] < 1 and math.isfinite(result["theirs"])


@pytest.mark.parametrize("bench, options", [(decode, ["--rounds", "0"]), (gat, ["--edges", "x"]), (memory_scale, ["--sizes", "0"]), (train_step, ["--batch", "3"])],
                         ids=lambda x: getattr(x, "__name__", ""))
def test_bad_input_is_one_sentence(bench, options, capsys, monkeypatch):
    from bench.common import run
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(SystemExit) as stopped:
        run(bench.main)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: expected")


@pytest.mark.parametrize("program", ["generate", "train", "bench.decode", "tiny.pretrain"])
def test_threads_wait_as_they_should(program):
    """Catches threads that spin for as long as another program has their core, which torch decides when it is loaded, and a user's own choice undone."""
    see = f"""import os, sys, importlib.abc
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
import {program}
{program}.main(["--memory", "facts.txt", "?"])"""
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    ran = lambda more: subprocess.run([sys.executable, "-c", see], cwd=ROOT, env={**plain, **more}, capture_output=True, text=True).stdout.split()
    assert ran({}) == ["PASSIVE", "5000"] and ran({"OMP_WAIT_POLICY": "ACTIVE"}) == ["ACTIVE", "None"] and ran({"GOMP_SPINCOUNT": "7"}) == ["None", "7"]
