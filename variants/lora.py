"""LoRA (https://arxiv.org/abs/2106.09685): facts in the weights themselves, as small changes of low rank. The parametric yardstick.

             ┌──────────────── W, frozen ───────────────┐
        x ───┤                                          (+)──► y         merged:  x ──► W + scale · up · down ──► y
             └── dropout ──► down ──► up ──► x scale ───┘
                            (r, in)  (out, r), zero at first

The base is never touched, not even by merging: the adapted model is a second tree of modules around the same tensors. A
merged projection gets a matrix of its own, and unmerging goes back to the base's, where subtracting what was added would
leave rounding errors behind. Any memory can sit in the sockets of the adapted model.

Letters as in gemma.py, and r the rank.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from gemma import Injection, InputError
from variants.facts import TaughtConfig, TaughtLesson, read_facts, taught
from variants.shared import TrainedIn

PROJECTIONS = dict(attention=("q_proj", "k_proj", "v_proj", "o_proj"), mlp=("gate_proj", "up_proj", "down_proj"))


def option(default, text):
    return field(default=default, metadata={"help": text})


def expect(source, good, what, got):
    """Raise InputError unless a setting is good."""
    if not good:
        raise InputError(f"{source}: expected {what}, got {str(got)[:40]}.")


@dataclass
class LoraConfig(TaughtConfig):
    """What is adapted, and how much. Each field says why one would change it."""

    lora_rank: int = option(16, "r; 0: no LoRA. More facts need more")
    lora_alpha: float = option(32.0, "the change is multiplied by alpha / r")
    lora_dropout: float = option(0.0, "of what enters the adapters, while training")
    lora_targets: str = option("attention,mlp", "what is adapted: attention, mlp, or projections such as q_proj,down_proj; MLPs hold most facts")
    lora_lr: float = option(1.0, "its learning rate, as a multiple of --lr")

    def check(self, source):
        super().check(source)
        expect(source, 0 <= self.lora_rank <= 1024, "lora_rank from 0 to 1024", self.lora_rank)
        expect(source, 0 <= self.lora_dropout < 1, "lora_dropout from 0 to below 1", self.lora_dropout)
        expect(source, abs(self.lora_alpha) < 1e6, "lora_alpha to be an ordinary number", self.lora_alpha)
        expect(source, 0 <= self.lora_lr < 1e6, "lora_lr to be an ordinary number of at least 0", self.lora_lr)
        named = {*PROJECTIONS, *sum(PROJECTIONS.values(), ())}
        expect(source, set(self.lora_targets.split(",")) <= named, f"lora_targets of {', '.join(sorted(named))}, with commas", repr(self.lora_targets))


class Adapter(nn.Module):
    """The change to one projection: scale · up · down."""

    def __init__(self, config, rows, columns):
        super().__init__()
        # One factor is random and one zero: no change at first, and a gradient from the first step.
        self.down = nn.Parameter(torch.randn(config.lora_rank, columns) * columns ** -0.5)
        self.up = nn.Parameter(torch.zeros(rows, config.lora_rank))
        self.scale, self.dropout = config.lora_alpha / config.lora_rank, config.lora_dropout

    def forward(self, x):
        """x (…, in) -> (…, out), float32."""
        x = F.dropout(x.float(), self.dropout, self.training)
        return self.scale * F.linear(F.linear(x, self.down), self.up)


class AdaptedLinear(nn.Module):
    """A frozen projection and the adapter beside it; or, merged, one matrix for both."""

    def __init__(self, weight, adapter):
        super().__init__()
        self.weight, self.base, self.adapter, self.merged = weight, weight, adapter, False

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y if self.merged else y + self.adapter(x).to(y.dtype)

    @torch.no_grad()
    def merge(self):
        whole = self.base.float() + self.adapter.scale * self.adapter.up @ self.adapter.down
        self.weight, self.merged = nn.Parameter(whole.to(self.base.dtype), requires_grad=False), True

    def unmerge(self):
        self.weight, self.merged = self.base, False


class LoRA(nn.Module, Injection):
    """Adapters for every layer of a Gemma, and `gemma`, which is that Gemma with them. Two LoRAs of one base don't see each
    other. It leaves the sockets alone; they are free for a bank."""

    def __init__(self, config, gemma):
        super().__init__()
        self.config = config
        tensors = {id(p): p for p in gemma.parameters()}                   # deepcopy takes these as copied already
        adapted = copy.deepcopy(gemma, tensors)
        targets = [name for target in config.lora_targets.split(",") for name in PROJECTIONS.get(target, (target,))]
        self.adapters = nn.ModuleDict()
        for name, linear in list(adapted.named_modules()) if config.lora_rank else ():
            layer, _, leaf = name.rpartition(".")
            if leaf in targets:
                adapter = self.adapters[name.replace(".", "/")] = Adapter(config, *linear.weight.shape).to(gemma.device)
                setattr(adapted.get_submodule(layer), leaf, AdaptedLinear(linear.weight, adapter))
        self.beside = [adapted]                                            # in a list: its tensors are no part of this module

    @property
    def gemma(self):
        return self.beside[0]

    def merge(self):
        """One matrix for each projection: as fast as the base alone, for as much memory again. Later training isn't in it."""
        for module in self.gemma.modules():
            if isinstance(module, AdaptedLinear):
                module.merge()

    def unmerge(self):
        """Adapters beside the base's own matrices again."""
        for module in self.gemma.modules():
            if isinstance(module, AdaptedLinear):
                module.unmerge()


class LoraMemory(TrainedIn):
    """A Gemma whose facts are in adapters."""

    variant, Config, Lesson = "lora", LoraConfig, TaughtLesson

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        self.injection = self.make_injection()

    def make_injection(self):
        return LoRA(self.config, self.gemma)

    @property
    def adapted(self):
        """The Gemma that answers; `gemma` stays the base."""
        return self.injection.gemma

    def forward(self, input_ids, attention_mask=None, question_mask=None):
        return self.adapted(input_ids, attention_mask, question_mask, injection=self.injection)

    def stream(self, input_ids, **options):
        return self.adapted.stream(input_ids, injection=self.injection, **options)

    def parameter_groups(self):
        return [(self.trainable_parameters(), self.config.lora_lr)]

    def losses(self):
        """What the last forward pass adds to the loss, and its parts by name."""
        return 0.0, {}

    def taught(self):
        """The facts that were trained in, as variants.facts.taught returns them."""
        config = self.config
        return read_facts(config.facts_file) if config.facts_file else taught(self.tokenizer, config.known, self.trained.get("seed", 0))
