"""No memory: the base alone, what every other design has to beat.

    question -> Gemma, frozen -> answer

It may be told facts like the others and makes nothing of them; there is nothing to train, train.py measures and saves.
"""

from dataclasses import dataclass, field

from torch import nn

from extras.memory_model import Settings
from gemma import Injection
from variants.shared import PoolLesson, Told


@dataclass
class NoConfig(Settings):
    """There is nothing to choose."""

    chat: bool = field(default=False, metadata={"help": "questions as chat turns (instruction-tuned base)"})


class Nothing(nn.Module, Injection):
    """Every socket is the identity."""

    view, log_weights, separable = None, None, True


class NoMemory(Told):
    variant, Config, Lesson, told = "none", NoConfig, PoolLesson, False
    facts_layer = 0                                                        # the pool need not run any

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        self.injection = Nothing()

    def keep(self, turns):
        return [None] * len(turns)

    def make_view(self):
        return None

    def view_of(self, pool, batch):
        return None
