"""Decoding that is compiled: gemma.Decoder with torch.compile and, on a GPU, CUDA graphs.

A step of decoding is hundreds of small kernels, and a short prompt no fewer. Python starts them more slowly than a GPU runs
them, so they are fused where a compiler can do that, and recorded: a CUDA graph runs them again and again on the same addresses,
without Python. Token, cache and what an injection keeps in `cache.memory` have fixed places therefore, and a step reads nothing
else that changes, so one CompiledDecoder serves any request of its shape.
"""

import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma import Decoder, DecoderLayer, Gemma, InputError

KEPT = 4                                 # decoders that wait for another request; each has a KV cache
ALIKE = 16                               # prompts that a recorded pass serves differ by less than so many tokens
SHORT = 256                              # and have at most so many: longer ones keep a GPU busy without being recorded


def decoder_for(model, B, length, injection):
    """A CompiledDecoder of a Gemma for B rows of up to `length` tokens: one that waits for a request, or a new one. It is made a
    little longer, so that it serves others too."""
    length = -(-(length + ALIKE - 1) // 128) * 128
    while len(model.decoders) >= KEPT:
        model.decoders.pop(next(iter(model.decoders)))
    return model.decoders.pop((B, length, injection), None) or CompiledDecoder(model, B, length, injection)


def captured(work):
    """A CUDA graph of work(), and what work returned: the tensors that the graph will write to."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


class CompiledDecoder(Decoder):
    """Prompts by compiled layers, steps compiled as a whole; where that can't be done, one line says so, and it is a plain Decoder."""

    def __init__(self, model, B, length, injection=None):
        super().__init__(model, B, length, injection)
        self.token = torch.zeros(B, 1, dtype=torch.long, device=model.device)
        self.graph = self.logits = None                    # of a step
        self.prompts, self.source = {}, None               # by length: None after the first of it, then what record_prompt returns
        self.layer, self.whole = DecoderLayer.__call__, Gemma.__call__
        self.tried(self.compile_passes)

    @property
    def gpu(self):
        """Whether passes can be recorded."""
        return self.token.is_cuda

    def compile_passes(self):
        """Compile layers for prompts of any length, and a whole pass for the one shape that steps have."""
        if self.model.compiles:                            # not when `tried` calls a second time, to go on without
            # Without the first, products of matrix and vector are slow; without the second, each program of the MLP's
            # products works out the norm, or gelu, for itself; without the third, q, k and v are three kernels.
            tuned = {"coordinate_descent_tuning": True, "realize_opcount_threshold": 5, "combo_kernels": True} if self.gpu else None
            self.layer = torch.compile(DecoderLayer.forward, dynamic=True)
            self.whole = torch.compile(Gemma.forward, dynamic=False, options=tuned)

    def prefill(self, input_ids, attention_mask, question_mask):
        before, self.cache.memory = self.cache.memory, {}
        logits = self.tried(lambda: self.read_prompt(input_ids, attention_mask, question_mask))
        shapes = lambda memory: {name: torch.is_tensor(t) and (t.shape, t.dtype) for name, t in memory.items()}
        if all(shapes(before).values()) and shapes(before) == shapes(self.cache.memory):
            for name, tensor in self.cache.memory.items():
                before[name].copy_(tensor)
            self.cache.memory = before
        else:
            self.graph = None
        return logits[:, -1]

    def read_prompt(self, input_ids, attention_mask, question_mask):
        """The pass over a prompt from an empty cache: logits (B, 1, V). That of a single short one is recorded when the second of
        about its length comes, and good until the memory changes."""
        def work(*prompt):
            self.cache.position.zero_(), self.cache.seen.zero_()
            self.cache.memory = {}                         # a try that failed may have left a part of it
            return self.model(*prompt, self.cache, self.injection, True, self.layer)

        (B, T), source = input_ids.shape, self.model if self.injection is None else self.injection.source()
        if not (self.model.compiles and self.gpu and B == 1 and T <= SHORT and source is not None):
            return work(input_ids, attention_mask, question_mask)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompt = [F.pad(t, (-T % ALIKE, 0)) for t in (input_ids, attention_mask, question_mask)]
        if self.source is not source:
            self.prompts, self.source = {}, source
        T = prompt[0].shape[1]
        if T not in self.prompts:                          # the first: what has to be compiled is compiled now
            self.prompts[T] = None
            return work(*prompt)
        if self.prompts[T] is None:
            self.prompts[T] = self.record_prompt(work, prompt)
        if not self.prompts[T]:
            return work(*prompt)
        inputs, graph, logits, self.cache.memory, reading = self.prompts[T]
        for recorded, new in zip(inputs, prompt):
            recorded.copy_(new)
        graph.replay()
        if self.injection is not None:
            self.injection.reading = reading
        return logits

    def record_prompt(self, work, prompt):
        """Make a CUDA graph of work(*prompt). Returns its inputs, itself, and what it leaves: logits, memory, reading; () where
        that can't be done, as with a memory whose keys are too many for the GPU."""
        try:
            graph, logits = captured(lambda: work(*prompt))
        except Exception:                                  # the same, not recorded, will say what is wrong, if anything is
            self.cache.memory = {}
            return ()
        return prompt, graph, logits, self.cache.memory, getattr(self.injection, "reading", None)

    def step(self, token):
        self.token.copy_(token[:, None])
        if self.model.compiles and self.graph is None and self.gpu:
            self.tried(self.record_step)
        if self.graph is None:
            return self.tried(self.run)
        self.graph.replay()
        return self.logits

    def run(self):
        """A step on what `token` holds: logits (B, V)."""
        # Kernels made for many queries leave most of a GPU idle with one: 14 of 61 microseconds a layer of 1B on an H200.
        plain = sdpa_kernel(SDPBackend.MATH) if self.model.compiles and self.gpu else nullcontext()
        with plain:
            return self.whole(self.model, self.token, None, None, self.cache, self.injection, True)[:, -1]

    def record_step(self):
        """Make a CUDA graph of a step. What is not to be recorded, compiling above all, happens in a few steps before."""
        position, seen = self.cache.position.clone(), self.cache.seen.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run()
                self.cache.position.copy_(position), self.cache.seen.copy_(seen)
        torch.cuda.current_stream().wait_stream(side)
        self.graph, self.logits = captured(self.run)

    def tried(self, work):
        """work(), once more without compiling where that is impossible, which is then said once."""
        if not self.model.compiles:
            return work()
        position, seen = self.cache.position.clone(), self.cache.seen.clone()
        try:
            return work()
        except InputError:
            raise
        except Exception as error:                         # no compiler, no Triton, another PyTorch: there are many ways to fail
            reason = next(iter(str(error).strip().splitlines()), "")[:200]
            print(f"note: can't compile here ({type(error).__name__}: {reason}); going on without.", file=sys.stderr)
            self.model.compiles = False
            self.layer, self.whole, self.graph = DecoderLayer.__call__, Gemma.__call__, None
            self.cache.position.copy_(position), self.cache.seen.copy_(seen)
            return work()
