"""What the open-ended exercises train and measure with: the tiny model, pools of sentences, and a clock.

Questions that give a score are never the ones a learner trained on: their people and values are of another split of the data,
and which of them are asked is drawn from a seed that is made of what the learner handed in.
"""

import time
import zlib

import torch

from exercises.checking import Failed
from extras.memory_model import question_prompt
from extras.pool import Pool, answer_tokens
from memory import GemmaWithMemory, MemoryConfig
from train import TrainConfig, evaluate, forward

TOKENS = 40                              # longest question with its answer
FACTS = 16                               # in a memory that is asked


def fresh(settings):
    """A memory on the tiny model that has learnt nothing. settings: dict of fields of MemoryConfig that are to be otherwise."""
    if not isinstance(settings, dict):
        raise Failed(f"expected a dict of settings of the memory, got {type(settings).__name__}; an empty one changes nothing")
    usual = vars(MemoryConfig())
    if unknown := sorted(map(str, settings.keys() - usual.keys())):
        raise Failed(f"MemoryConfig has no {unknown[0]}; memory.py lists its fields")
    torch.manual_seed(1609)                                                # not 0, from which the shipped memory started: `refusal` compares weights
    return GemmaWithMemory.from_pretrained(base="tiny", config=MemoryConfig.from_dict({**usual, **settings}, "settings"))


def seed_of(model):
    """A seed made of a memory's weights: who changes them to suit the questions gets other questions."""
    seed = 0
    for _, tensor in sorted(model.injection.state_dict().items()):
        seed = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), seed)
    return seed


class Lessons:
    """Time to learn from a pool of sentences. `for done in lessons:` goes on until the time is over; done grows from 0 to 1."""

    def __init__(self, model, pool, seconds, bar):
        self.model, self.pool, self.seconds, self.bar = model, pool, seconds, bar
        self.random, self.start = torch.Generator().manual_seed(0), time.monotonic()
        self.learnt = 0                  # questions drawn so far

    def __iter__(self):
        while (spent := time.monotonic() - self.start) < self.seconds:
            self.bar.n = min(100, int(100 * spent / self.seconds))
            self.bar.set_postfix_str(f"{self.learnt:,} questions")
            yield spent / self.seconds

    def draw(self, questions=64, facts=16):
        """A batch: memories of up to so many facts, 8 questions to each (questions: a multiple of 8), drawn anew at each call.
        Raises Failed when the time has been over for half a minute."""
        if time.monotonic() - self.start > self.seconds + 30:
            raise Failed("the lessons are over; end when they do")
        self.learnt += questions
        return self.pool.draw(questions // 8, questions, facts, 0.1, 0.06, self.random)

    def forward(self, batch):
        """Through memory and model: a dict with `logits` (answer tokens, V), `targets` (answer tokens,) and what losses need."""
        return forward(self.model, self.pool, batch, TOKENS)


def exam(model, pool, questions, seed):
    """Which share of about so many questions on memories of FACTS facts is answered right to the letter, in %, and for which share
    the right fact weighs most. The pool is to be made with this memory, or with one of the same settings."""
    settings = TrainConfig(batch=min(128, questions), tokens=TOKENS)
    result = evaluate(model, pool, settings, sizes=(FACTS,), questions=questions, seed=seed)[FACTS]
    return 100 * result["recall"], 100 * result["first"]


def shipped():
    """The memory that comes with the tiny model."""
    return GemmaWithMemory.from_pretrained("tiny")


def part_of(tokenizer, bundles, tokens=TOKENS):
    """What Pool makes of data_gen.py's bundles, of others: list of (facts, [(question, answer, support)], subjects)."""
    newline, part = tokenizer.encode("\n", bos=False), []
    for facts, asked, subjects in bundles:
        facts = [tokenizer.encode(fact) for fact in facts]
        questions = [(question_prompt(tokenizer, question, False), answer_tokens(tokenizer, [facts[support[-1]]], answer) + newline, support, 0, [])
                     for question, answer, support in asked]
        hashes = [zlib.crc32(subject.encode()) for subject in subjects]
        if max(map(len, facts)) <= 1.6 * tokens and all(len(prompt) + len(answer) <= tokens for prompt, answer, *_ in questions):
            part.append((facts, [False] * len(facts), questions, (hashes[0], hashes[-1])))
    return part
