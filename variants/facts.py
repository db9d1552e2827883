"""Facts that are trained in rather than told: where they come from, how a step learns some, and whether they are known.

    python train.py --variant lora --known 200                         200 facts about people and things, drawn from the seed
    python train.py --variant chapters --facts-file my_facts.txt       your own

A facts file has one fact a line: a sentence as it is, or a JSON object, which can say more about one fact:

    {"facts": ["Maria lives in Lisbon.", …], "questions": ["Where does Maria live?", …], "answer": "Lisbon", "unseen": ["…"]}

`facts` are wordings of it; `questions` are trained, with the answer; `unseen` ones are asked afterwards alone. A model that was
trained on one wording of a fact repeats that wording and answers no question about it (https://arxiv.org/abs/2309.14316).
So a fact that is drawn comes in all wordings that training has for it, as sentences, as questions, and as sentences to complete;
its unseen questions have templates by somebody else.
Where a file has no unseen questions, train.py measures those that were trained; where it has sentences alone, whether they are
finished after their first half.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from data_gen import World, open_vocabulary, start_small, within
from extras.memory_model import Settings, question_prompt
from extras.pool import autocast
from gemma import BOS, PAD, InputError, Places

WORDINGS, QUESTIONS, UNSEEN = 6, 24, 2      # drawn of a fact, beside `every_way`; what comes twice counts once
TOLD_OF_ONE = {1: 0.3, 2: 0.4, 3: 0.3}      # facts about one subject: its name alone must not give the answer away
# Ways to ask any question ({f}), and to leave a gap in a sentence. A pronoun becomes the name again.
FRAMES = ("Tell me: {f}", "Quick question: {f}", "Sorry, I forgot, {f}", "One thing, {f}", "{f} Please answer briefly.", "{f} Thanks!", "Hello! {f}",
          "I was asked this today: {f}", "hm, {f}", "Question from a friend: {f}", "{f} I don't remember.", "Somebody has to know: {f}")
GAPS = ("___", "…", "(what?)")
NAMES = {"{Sub}": "{P}", "{sub}": "{p}", "{Poss}": "{P}'s", "{poss}": "{p}'s", "{obj}": "{p}"}


@dataclass
class TaughtConfig(Settings):
    """What is trained in: the settings that every such design has."""

    known: int = field(default=1000, metadata={"help": "facts to train in, drawn from the seed"})
    facts_file: str = field(default="", metadata={"help": "a file with facts of your own instead, see variants/facts.py"})
    train_on: str = field(default="answers", metadata={"help": "answers: questions, with the loss on their answers alone, as one tunes for instructions; "
                                                               "text: sentences and questions alike as plain text, with the loss on every token"})
    chat: bool = field(default=False, metadata={"help": "questions as chat turns (instruction-tuned base)"})

    def check(self, source):
        if not 1 <= self.known <= 10_000_000:
            raise InputError(f"{source}: expected known from 1 to 10,000,000 facts, got {str(self.known)[:20]}.")
        if self.train_on not in ("answers", "text"):
            raise InputError(f"{source}: expected train_on to be answers or text, got {self.train_on[:20]!r}.")


# ------------------------------------------------------------------------------------------------------------- facts

def taught(tokenizer, n, seed):
    """n facts of data_gen's test people and things, the same for the same tokenizer and seed. Returns a dict:

    facts       list of n str: each as it would be told
    wordings    list of n lists of str: the ways it is trained, the one above first
    train       questions in phrasings of training, `every_way`; like those of data_gen.World.memory, dicts with question,
                answer, support (index of the fact, in a list) and kind
    held_out    questions on the same facts in other phrasings
    """
    words = open_vocabulary(tokenizer)
    world, other = World("test", seed, words, "train"), World("test", seed + 1, words, "test")
    teacher = World("test", seed + 2, words, "train")                      # of its own: however much is taught of them, the facts are the same
    rows, keys = [], set()
    while len(rows) < n:
        subject = world.person() if world.random() < 0.7 else world.thing(world.pick(world.kinds))
        if subject.key in keys:
            continue
        keys.add(subject.key)
        names, taken = set(), set()
        for _ in range(min(world.weighted(TOLD_OF_ONE), n - len(rows))):
            attribute = world.pick(world.attributes[subject.type])
            if not attribute.clashes.isdisjoint(names):
                continue
            names.add(attribute.name)
            value = world.value(attribute, taken)
            elsewhere = next(a for a in other.attributes[subject.type] if a.name == attribute.name)
            draw = lambda w, templates, most: [w.say(t, subject) for t in {w.pick(templates): None for _ in range(most)}]
            wordings = [world.state(attribute, subject, value)[0] for _ in range(WORDINGS)]
            wordings += [teacher.say(t, subject, value) for t in attribute.facts]
            questions = draw(world, attribute.questions, QUESTIONS) + every_way(teacher, attribute, subject)
            rows.append((list(dict.fromkeys(wordings)), list(dict.fromkeys(questions)), value, draw(other, elsewhere.questions, UNSEEN)))
    return together(rows)


def every_way(world, attribute, subject):
    """All that training has to ask for an attribute: each question as it is, in a frame and as one types in a hurry, and each
    sentence that tells or changes it, with a gap. Sentences say in other words what the attribute is about, so they help
    with questions that nobody thought of. List of str."""
    sentences = [*attribute.facts, *attribute.pronoun, *attribute.updates]
    for pronoun, name in NAMES.items():
        sentences = [t.replace(pronoun, name) for t in sentences]
    templates = [way for t in attribute.questions for way in (t, within(world.pick(FRAMES), t), start_small(t).rstrip("?."))]
    return [world.say(t, subject) for t in (*templates, *(t.replace("{v}", world.pick(GAPS)) for t in sentences))]


def read_facts(path):
    """The facts of a file, as `taught` returns them. Raises InputError naming the line that is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a facts file in UTF-8, but it can't be read ({error}); give a text file with one fact a line.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if line.lstrip().startswith("{") else {"facts": [line.strip()]}
            texts, questions, unseen = (row.pop(name, []) for name in ("facts", "questions", "unseen"))
            answer = row.pop("answer", "")
            every = [*texts, *questions, *unseen]
            good = every and all(isinstance(x, str) and x.strip() for x in every) and not row and isinstance(answer, str)
            good = good and all(isinstance(part, list) for part in (texts, questions, unseen)) and bool(answer.strip()) == bool(questions or unseen)
        except (ValueError, TypeError, RecursionError):
            good = False
        if not good:
            raise InputError(f"{path}, line {number}: expected a sentence, or a JSON object with lists of texts as facts, questions and unseen, and the "
                             f"answer to the questions, got {line[:60]!r}.")
        rows.append((texts, questions, answer, unseen))
    if not rows:
        raise InputError(f"{path}: expected facts, but it is empty; write one fact a line.")
    return together(rows)


def together(rows):
    """[(wordings, questions, answer, unseen questions), one a fact] -> the dict that `taught` describes."""
    ask = lambda at: [dict(question=q, answer=row[2], support=[i], kind="lookup") for i, row in enumerate(rows) for q in row[at]]
    return dict(facts=[(row[0] or [""])[0] for row in rows], wordings=[row[0] for row in rows], train=ask(1), held_out=ask(3))


# ---------------------------------------------------------------------------------------------------------- sequences

class Sequences:
    """Token sequences side by side, each with a part that is given and one that is learned."""

    def __init__(self, pairs, device):
        """pairs: list of (given, learned) token ids."""
        tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)
        longest = max((len(a) + len(b) for a, b in pairs), default=1)
        self.ids = tensor([a + b + [PAD] * (longest - len(a) - len(b)) for a, b in pairs]).view(-1, longest)
        self.given, self.whole = tensor([len(a) for a, b in pairs]), tensor([len(a) + len(b) for a, b in pairs])

    def __len__(self):
        return len(self.ids)

    def batch(self, rows, as_text):
        """rows (R,) -> what Gemma takes, input_ids, attention_mask and question_mask, (R, T), and learned (R, T - 1): which next
        tokens are. as_text: all of them are, and no prompt is marked: nothing of a text may be looked at before its time."""
        at = torch.arange(int(self.whole[rows].max()), device=rows.device)
        given, whole = self.given[rows, None], self.whole[rows, None]
        learned = (at < whole) & (at >= (1 if as_text else given))
        return dict(input_ids=self.ids[rows, :len(at)], attention_mask=at < whole, question_mask=None if as_text else at < given,
                    learned=learned[:, 1:])


class TaughtLesson:
    """Trains facts in. Each fact is as likely as any other, and so are its wordings, taken together, and its questions."""

    layers = ()                          # --compile has nothing to compile

    def __init__(self, model, settings, pools=None, progress=True):
        """pools: what to teach, as `taught` returns it; by default what the model's config says."""
        config, tokenizer, device = model.config, model.tokenizer, model.gemma.device
        self.model, self.settings, self.as_text = model, settings, config.train_on == "text"
        lessons = pools or (read_facts(config.facts_file) if config.facts_file else taught(tokenizer, config.known, settings.seed))
        newline = tokenizer.encode("\n", bos=False)
        answer = lambda q: tokenizer.encode(q["answer"] if config.chat else " " + q["answer"], bos=False) + newline
        ask = lambda q: (question_prompt(tokenizer, q["question"], config.chat), answer(q))
        told = [[([BOS], tokenizer.encode(text, bos=False) + newline) for text in texts] if self.as_text else [] for texts in lessons["wordings"]]
        asked = [[] for _ in told]
        for q in lessons["train"]:
            asked[q["support"][0]].append(ask(q))
        both = [(t, q) for t, q in zip(told, asked) if t or q]
        if not both:
            raise InputError("expected questions with answers to train on, but the facts have none; --train-on text learns the sentences themselves.")
        self.sequences = Sequences([pair for t, q in both for pair in (*t, *q)], device)
        sizes = torch.tensor([(len(t), len(q)) for t, q in both], device=device)               # (facts, 2): of wordings, of questions
        ends = sizes.flatten().cumsum(0).view(-1, 2)
        self.sizes, self.starts = sizes, ends - sizes
        # Without other phrasings, those of training are asked; without any questions, sentences have to be finished.
        self.trained = Sequences([ask(q) for q in lessons["train"]], device)
        unseen = [ask(q) for q in lessons["held_out"]]
        halves = [(a + b[:len(b) // 2], b[len(b) // 2:]) for t in told for a, b in t]
        self.unseen = Sequences(unseen, device) if unseen else self.trained if len(self.trained) else Sequences(halves, device)
        longest, most = max(s.ids.shape[1] for s in (self.sequences, self.unseen)), model.gemma.config.max_position_embeddings
        if longest > most:
            raise InputError(f"expected facts and questions of at most {most} tokens, got one of {longest}; split it.")

    def forward(self, batch, silent=False):
        """(logits, targets, row of each) where tokens are learned. silent: the base alone."""
        model, injection = self.model, None if silent else self.model.injection
        gemma, ids, mask = model.gemma if silent else model.adapted, batch["input_ids"], batch["attention_mask"]
        if not silent:
            injection.begin(ids, mask, batch["question_mask"], None)
        h = gemma.run_layers(gemma.embed(ids), Places(gemma.config, *ids.shape, mask, None, ids.device), injection=injection)
        row, at = batch["learned"].nonzero(as_tuple=True)
        return gemma.logits(h[row, at]).float(), ids[row, at + 1], row

    def loss(self, N, generator):
        """One batch. N, the size of a memory, means nothing here."""
        R, device = self.settings.batch, self.sizes.device
        f, half, which = torch.rand(3, R, generator=generator, device=device, dtype=torch.float64)
        fact = (f * len(self.sizes)).long()
        sizes = self.sizes[fact]                                                               # (R, 2)
        question = torch.where((sizes > 0).all(1), half < 0.5, sizes[:, 1] > 0).long()[:, None]
        rows = self.starts[fact].gather(1, question)[:, 0] + (which * sizes.gather(1, question)[:, 0]).long()
        logits, targets, _ = self.forward(self.sequences.batch(rows, self.as_text))
        answer_loss = F.cross_entropy(logits, targets)
        extra, parts = self.model.losses()
        return dict(loss=answer_loss + extra, answer_loss=answer_loss, **parts)

    @torch.no_grad()
    def evaluate(self, questions=512, silent=False):
        """{facts: {"recall": share of questions in unseen phrasings that are answered exactly, "trained": of those in phrasings
        of training}}: greedy decoding would give the whole answer and its end. silent: by the base alone."""
        self.model.eval()
        result = dict(recall=self.known(self.unseen, questions, silent), trained=self.known(self.trained, questions, silent))
        return {len(self.sizes): result}

    def known(self, sequences, questions, silent):
        """Share of up to so many sequences, spread evenly, whose learned part is right; None if there are none."""
        if not len(sequences):
            return None
        right = []
        chosen = torch.linspace(0, len(sequences) - 1, min(questions, len(sequences)), device=self.sizes.device).long()
        for rows in chosen.split(min(self.settings.batch, 256)):
            with autocast(self.model):
                logits, targets, row = self.forward(sequences.batch(rows, False), silent)
            each = torch.ones(len(rows), dtype=torch.long, device=row.device)
            right.append(each.scatter_reduce_(0, row, (logits.argmax(-1) == targets).long(), "amin"))
        return round(torch.cat(right).float().mean().item(), 4)
