"""Facts that are trained in rather than told: where they come from, batches of them, and whether they were learned.

    python train.py --variant lora --learn 200                         200 facts of data_gen.py's world, drawn from the seed
    python train.py --variant chapters --facts-file facts.txt          your own

A facts file has one fact a line: a sentence as it is, or a JSON object, which may say more about the one fact:

    {"facts": ["Maria lives in Lisbon.", …], "questions": ["Where does Maria live?", …], "answer": "Lisbon", "unseen": ["…"]}

`facts` are wordings of it; `questions` are trained, with the answer; `unseen` are asked afterwards alone. Weights that were
trained on a single wording of a fact repeat that wording and answer no question about it
(https://arxiv.org/abs/2309.14316), so a drawn fact has several of each; unseen questions have templates by somebody else.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from data_gen import World, open_vocabulary
from gemma import PAD, InputError
from memory import question_prompt

WORDINGS, QUESTIONS, UNSEEN = 6, 12, 2      # of a drawn fact
TOLD_OF_ONE = {1: 0.3, 2: 0.4, 3: 0.3}      # facts about one subject: its name alone must not give the answer away


class Fact(NamedTuple):
    """One thing to learn."""

    facts: list             # of str: sentences that say it
    questions: list         # of str: trained
    answer: str             # "" where there are no questions
    unseen: list            # of str: asked after training


def draw_facts(n, seed, tokenizer):
    """n facts of data_gen's world, as list of Fact: people and things, each with one to three attributes."""
    words = open_vocabulary(tokenizer)
    world, other = World("train", seed, words), World("train", seed + 1, words, phrasings="test")
    drawn, keys = [], set()
    while len(drawn) < n:
        subject = world.person() if world.random() < 0.7 else world.thing(world.pick(world.kinds))
        if subject.key in keys:
            continue
        keys.add(subject.key)
        told, taken = set(), set()
        for _ in range(min(world.weighted(TOLD_OF_ONE), n - len(drawn))):
            attribute = world.pick(world.attributes[subject.type])
            if not attribute.clashes.isdisjoint(told):
                continue
            told.add(attribute.name)
            value = world.value(attribute, taken)
            elsewhere = next(a for a in other.attributes[subject.type] if a.name == attribute.name)
            ask = lambda w, a, most: [w.say(t, subject) for t in {w.pick(a.questions): None for _ in range(most)}]
            drawn.append(Fact([world.state(attribute, subject, value)[0] for _ in range(WORDINGS)],
                              ask(world, attribute, QUESTIONS), value, ask(other, elsewhere, UNSEEN)))
    return drawn


def read_facts(path):
    """The facts of a file, as list of Fact. Raises InputError naming the line that is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a facts file in UTF-8 ({error}); give a text file with one fact a line.") from None
    read = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            read.append(Fact([line.strip()], [], "", []))
            continue
        try:
            row = json.loads(line)
            fact = Fact(*(row.get(name, default) for name, default in (("facts", []), ("questions", []), ("answer", ""), ("unseen", []))))
            texts = [*fact.facts, *fact.questions, *fact.unseen]
            good = all(isinstance(t, str) and t.strip() for t in texts) and texts and isinstance(fact.answer, str) and \
                bool(fact.answer.strip()) >= bool(fact.questions or fact.unseen)
        except (ValueError, TypeError, RecursionError):
            good = False
        if not good:
            raise InputError(f"{path}, line {number}: expected a sentence, or a JSON object with lists of texts as facts, questions, unseen, and "
                             f"an answer, got {line[:60]!r}.")
        read.append(fact)
    if not read:
        raise InputError(f"{path}: expected facts, but it is empty; write one fact a line.")
    return read


class Drill:
    """Facts as token sequences, and batches of them."""

    def __init__(self, facts, tokenizer, chat, as_text, device, longest):
        """as_text: the loss is on every token, of sentences and of questions alike; else on the answers to questions alone.

        Raises InputError where that leaves nothing to learn, or a sequence has more than `longest` tokens.
        """
        newline = tokenizer.encode("\n", bos=False)
        self.device, self.as_text = device, as_text
        ask = lambda q, a: (question_prompt(tokenizer, q, chat), tokenizer.encode(a if chat else " " + a, bos=False) + newline)
        said = lambda text: (tokenizer.encode(text)[:1], tokenizer.encode(text)[1:] + newline)
        # Of each fact: sentences and questions, each (what is given, what is to be learned) as token ids.
        self.told = [[said(text) for text in fact.facts] if as_text else [] for fact in facts]
        self.asked = [[ask(q, fact.answer) for q in fact.questions] for fact in facts]
        self.unseen = [ask(q, fact.answer) for fact in facts for q in fact.unseen]
        self.learning = [i for i in range(len(facts)) if self.told[i] or self.asked[i]]
        if not self.learning:
            raise InputError("expected questions to train the answers of, but the facts have none; train on their text instead "
                             "(--train-on text).")
        most = max(len(a) + len(b) for rows in (*self.told, *self.asked, self.unseen) for a, b in rows)
        if most > longest:
            raise InputError(f"expected facts and questions of at most {longest} tokens, got one of {most}; split it.")

    def draw(self, R, generator):
        """R sequences to learn from, as `batch`. A sentence of a fact is as likely as a question on it, where it has both."""
        rows = []
        for f, kind, which in torch.rand(R, 3, generator=generator, dtype=torch.float64).tolist():
            i = self.learning[int(f * len(self.learning))]
            pool = (self.told if (kind < 0.5 and self.told[i]) or not self.asked[i] else self.asked)[i]
            rows.append(pool[int(which * len(pool))])
        return self.batch(rows)

    def batch(self, rows):
        """(given, learned) token ids -> what Gemma.forward takes, input_ids, attention_mask and question_mask, each (R, T), and
        learned (R, T - 1): which next tokens the loss is on."""
        T = max(len(a) + len(b) for a, b in rows)
        tensor = lambda values: torch.tensor(values, device=self.device)
        ids = tensor([a + b + [PAD] * (T - len(a) - len(b)) for a, b in rows])
        given, whole = tensor([[len(a)] for a, b in rows]), tensor([[len(a) + len(b)] for a, b in rows])
        at = torch.arange(T, device=self.device)
        # A text is not a question: where all of it is learned, no part of it may be looked at before its time.
        prompt = None if self.as_text else at < given
        learned = (at >= (1 if self.as_text else given)) & (at < whole)
        return dict(input_ids=ids, attention_mask=at < whole, question_mask=prompt, learned=learned[:, 1:])
