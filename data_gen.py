"""Synthetic memories: sentences to store, questions about them, the answers, and the sentences that support each answer.

    python data_gen.py --n 20000 --out data.jsonl

A memory that is trained on closed lists of values learns to classify and never to copy. So many values here are made
from the tokenizer's whole vocabulary, whatever the question asks for: a locker code may be "Violet harbour", a sister
"4821-B". The sentence alone says what belongs to whom, and the answer has to be carried over token by token. An answer never
begins with an article, unless that counts: "a toothbrush" is answered "toothbrush", "an hour and a half" as it stands; nor with
"in", "on", "by" and the like: "in the bird feeder" is answered "bird feeder", "under the bench" and the set phrase "by heart" as they stand.

How the file goes, top to bottom:
  * `data_gen.json` holds attributes and relations with their sentence templates, names, things, lists and patterns of values
  * `data_scenes.json` holds scenes: sentences that tell several things at once, each with questions on every one of them
  * a `World` draws from one split of it: train, validation and test share no name, no thing and no value, train and test
    no template either; every draw comes from the seed
  * `World.bundle()` tells one to five attributes of a subject in one to six sentences, and asks about them
  * `World.memory()` weaves bundles with distinct subjects into one memory; `World.example()` is a line of the JSONL

Templates have holes: {a} the noun of an open attribute, {p} the subject ({P} where a sentence starts), {v} the value,
{Sub} {sub} {Poss} {poss} {obj} pronouns, {q} a second person, {f} a whole sentence. Patterns of values have holes named after
lists and other patterns, and # stands for a digit, ^ for a digit but 0, ? for a capital letter, * for a small one, ~ for a hexadecimal digit. A scene has wordings of
its `first` sentence and perhaps of a second one (`then`) that only a pronoun links to it, `questions` and `updates` for each hole,
`missing`: questions on the same matter that it does not answer, and `options`: lists of values of its own. Its holes are named after these or after any list or pattern, with a digit for a second.
"""

import argparse
import json
import re
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count
from operator import itemgetter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

from gemma import InputError, Tokenizer, read_json, replacing

KINDS = ("lookup", "update", "coreference", "two_hop", "list", "unanswerable")
SPLITS = ("train", "validation", "test")
HERE = Path(__file__).resolve().parent

# How often what is drawn. With these, most questions are lookups.
TWO_HOP, NOISE = 0.30, 0.04                 # bundles on two related persons; bundles that answer nothing
PERSON, FIRST_PERSON = 0.62, 0.10           # of the others, those on a person; of these, those on "I"
TWIN = 0.28                                 # two subjects with similar names and the same attributes: hard negatives
ATTRIBUTES = {1: 0.36, 2: 0.36, 3: 0.18, 4: 0.07, 5: 0.03}                      # how many are told of a subject
WAYS = dict(plain=0.15, joined=0.07, mentioned=0.12, continued=0.16, update=0.50)  # how one is told: see World.tell
STORY, OPEN_IN_STORY = 0.33, 0.07           # bundles of scenes; their values that may be anything
CHANGED, RETOLD = 0.9, 0.25                 # scenes that can change do; what has changed changes again, up to three times more
NEAR_MISS = 0.3                             # a scene is asked for what it nearly tells
OPEN_ATTRIBUTE = 0.3                        # attributes that are any noun: "Maria's tax advisor is 4821"
LIST = 0.37                                 # an attribute that may have two values is told with two
UNSAID, FRAMED, BOTH = 0.12, 0.45, 0.15     # the second of them without a word that it is one, up to here in a frame ("Besides, …"); questions for "both"
RESTATED, MARKED = 0.3, 0.2                 # updates that never say they are (besides a fifth of the rest); first values told as if they had changed;
                                            # these five only in training's words: the order decides, not who says "now"
SECOND_QUESTION, UNANSWERABLE = 0.3, 0.6    # a second phrasing; one more question, that can't be answered,
UNKNOWN = 0.3                               # because its subject is unknown (else: the attribute wasn't told)
INVENTED, OPEN_VALUE = 0.18, 0.35           # names, and values, that no list holds
SYLLABLES = 0.12                            # words of these that are no words at all: "quozannd timorlo"
QUOTED, WRAPPED = 0.1, 0.12                 # values in quotes; facts inside a longer utterance
FILLED, WORN = 0.15, 0.1                    # sentences with a filler, "I think", somewhere; and without some small word
SMALL = {"the", "a", "an", "is", "was", "that", "so", "just", "now", "and", "of", "to", "has", "it's"}
LEANING = SMALL | {"my", "in", "on", "at", "for", "with", "by", "from", "as", "no", "not", "what", "which", "whose"}   # on the word after
FORCED = dict(lookup=["plain"], coreference=["mentioned", "continued"], update=["update"], list=["list"])
MOST_SENTENCES = 6                          # about one subject
FEWEST_FACTS = dict(lookup=1, update=2, coreference=2, two_hop=2, list=2, unanswerable=1)

SYMBOLS = {"#": "0123456789", "^": "123456789", "?": "ABCDEFGHJKLMNPRSTUVWXYZ", "*": "abcdefghijkmnopqrstuvwxyz",
           "~": "0123456789abcdef"}
PRONOUN_HOLES = ("{Sub}", "{sub}", "{Poss}", "{poss}", "{obj}")
PRONOUNS = {"female": ("She", "she", "Her", "her", "her"), "male": ("He", "he", "His", "his", "him"),
            "it": ("It", "it", "Its", "its", "it")}
HOLE = re.compile(r"\{([a-z]\w*)\}(?<!\{p\})(?<!\{sub\})(?<!\{poss\})(?<!\{obj\})")     # of a value or of {q}
# With these no answer begins: articles, unless they count something, and prepositions that mostly say no more than the question did, but
# for set phrases, and "on Monday and on Friday".
ARTICLE = re.compile(r"(?:an?(?! (?:hour|minute|day|week|fortnight|month|year|decade|century|dozen|hundred|thousand|million|billion"
                     r"|few|couple|quarter|bit|lot|inch|foot|yard|metre|litre|pound)(?![\w-])| (?:third|fifth|tenth)(?: of|$))|the) ")
SET_PHRASE = (r"(?:in (?:front|between|bed|case|chains|custody|exile|fact|honour|hospital|labour|love|memory|need|one (?:go|piece)|pairs|person|pieces|prison"
              r"|quarantine|return|rhyme|secret|shreds|tears|two minds)|on (?:account|behalf|board|duty|fire|foot|holiday|honeymoon|horseback|leave|loan"
              r"|purpose|sale|strike|tiptoe|top|trial)|at (?:hand|heart|home|least|most|once|random|risk|sea|war|work|\w+ own risk)|by (?:accident|all accounts"
              r"|appointment|chance|day|ear|far|hand|heart|mistake|night|now|way)|to and|from (?:memory|now|scratch|time to)|for (?:ever|example|fear|free|hire"
              r"|lack|love|rent|sale|want)|of (?:age|course)|with love|into (?:exile|pieces|shreds|tears)|(?:in (?:full|general|half|public|time|total)|on time"
              r"|at (?:all|first|last)|to (?:date|pieces)|for good)$)(?![\w-])")
LEADING = re.compile(rf"{ARTICLE.pattern}|as (?=an? |the )|(?!{SET_PHRASE})(in|on|at|by|to|towards?|from|into|onto|for|with|of) (?!.* (?:and|or) \1 )")
AFTER_ARTICLE = re.compile(r"\b([Aa]n?|[Tt]he|[Mm]y|[Oo]ur|[Yy]our) \{([a-z]\w*)\}")   # "a {job}"
QUOTABLE = re.compile(r"(^| )\{v\}($|[ .,;:!?])")
JOINABLE = re.compile(r"[^.!?:;\"]*\.")     # one plain sentence: ", and she …" may follow
STAYS_CAPITAL = re.compile(r"(I|(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?|January|June|December)\b|[A-Z][A-Z/]")


@dataclass
class Question:
    """A question about a bundle."""

    question: str
    answer: str             # the value as its sentence has it, but `bare`; two of them as "A and B"; "" if unanswerable
    support: list           # of int: the facts that answer it, in order of use; [] if unanswerable
    kind: str               # one of KINDS
    trained: bool           # whether its names, values and templates are all those of training

    def __post_init__(self):
        self.answer = bare(self.answer)


@dataclass
class Bundle:
    """A few sentences that belong together, and what can be asked of them."""

    facts: list             # of str
    follows: list           # of bool: fact i must stand directly after fact i - 1, because its pronoun refers to it
    questions: list         # of Question
    subjects: frozenset     # of str: who and what it is about; bundles of one memory share none ("I" for the first person)


class Subject(NamedTuple):
    """Somebody or something that facts are about."""

    name: str
    gender: str             # a key of PRONOUNS, or "I"
    type: str               # "person" or the kind of thing, as in data_gen.json
    key: str                # the same for two subjects that could be taken for each other


ME = Subject("I", "I", "person", "I")


def split_of(text):
    """The split that a made word or value belongs to: a hash of its letters decides, so that every seed agrees."""
    share = zlib.crc32(text.lower().encode()) % 100
    return "train" if share < 80 else "validation" if share < 85 else "test"


def open_vocabulary(tokenizer):
    """The plain words of a `gemma.Tokenizer`: 3 to 12 Latin letters, in pieces that follow a space. Sorted list of str."""
    word = re.compile("\u2581[A-Za-z\u00c0-\u024f]{3,12}")
    pieces = map(tokenizer.pieces.id_to_piece, range(tokenizer.vocab_size))
    return sorted({piece[1:] for piece in pieces if word.fullmatch(piece) and piece[1:].isalpha()})


def bare(value, leading=LEADING):
    """A value as an answer says it: without its article ("the 4th of May" -> "4th of May"), unless that counts ("a week"), and without
    "in", "on", "by" and the like ("in the bird feeder" -> "bird feeder"), but for set phrases ("by heart"). Titles have capitals: "The Tin Sea"."""
    while found := leading.match(value):
        value = value[found.end():]
    return value


def fill_in(template, values):
    """A template with `values` (dict of str) in its holes. After an article no second one; "a" becomes "an" where it must."""
    def after_article(found):
        article, value = found[1], bare(values.get(found[2], found[0].split(" ")[1]), ARTICLE)
        return article + "n" * (article in "Aa" and value[0] in "aeiou") + " " + value
    return HOLE.sub(lambda hole: values.get(hole[1], hole[0]), AFTER_ARTICLE.sub(after_article, template))


def of_split(lists, split):
    """What `split` uses of {"train": [...], "test": [...]}: validation is a tenth of train, by a hash."""
    if split == "test":
        return lists["test"]
    return [item for item in lists["train"] if (zlib.crc32(bare(item).lower().encode()) % 10 == 0) == (split == "validation")]


@cache                                      # of the same templates for every World
def sentence_start(template):
    """A template with {P} instead of {p} where a sentence starts."""
    return re.sub(r'(^"?|[.!?] "?)\{p\}', r"\1{P}", template)


def start_small(template):
    """A template as it goes on after a comma. A value keeps its case, and so do words that always have a capital."""
    if template.startswith("{P}"):
        return "{p}" + template[3:]
    return template if STAYS_CAPITAL.match(template) else template[0].lower() + template[1:]


def within(frame, template):
    """A template inside a longer utterance ("By the way, {f}")."""
    before, _, after = frame.partition("{f}")
    if before.rstrip().endswith((".", "!", "?")):
        template = template[0].upper() + template[1:]
    elif before:
        template = start_small(template)
    return before + template + ("." if after and template[-1] not in '.!?"' else "") + after


def joining(pronoun):
    """Of the templates with pronouns, those that may follow ", and"."""
    return [template[0] + template[1].lower() + template[2:] for template in pronoun if template.startswith(("{Sub}", "{Poss}"))]


def with_pronouns(template, gender):
    for hole, word in zip(PRONOUN_HOLES, PRONOUNS[gender]):
        template = template.replace(hole, word)
    return template


class World:
    """Draws bundles and memories of one split, all from one seed.

    split: "train", "validation" or "test" chooses names, things and values; no two of them share any.
    phrasings: the templates, "train" or "test"; by default those of test for the split test, else those of train.
    words: an open vocabulary, list of str (see `open_vocabulary`); without it, words are built from syllables.
    Same arguments, same draws, on every platform and Python version: only Random.random() is used, since choice, shuffle
    and sample have changed between versions. Raises InputError for a split or phrasings that don't exist.
    """

    def __init__(self, split="train", seed=0, words=(), phrasings=None):
        phrasings = phrasings or ("test" if split == "test" else "train")
        if split not in SPLITS or phrasings not in ("train", "test"):
            raise InputError(f"expected a split of {', '.join(SPLITS)} and phrasings train or test, "
                             f"got {split!r} and {phrasings!r}.")
        data = read_json(HERE / "data_gen.json")
        self.split, self.random, self.trained = split, Random(seed).random, split == phrasings == "train"
        self.read_lists(data, words)
        self.read_templates(data, phrasings)
        self.read_scenes(read_json(HERE / "data_scenes.json"), phrasings)

    # ---------------------------------------------------------------------------------- what there is to draw from

    def read_lists(self, data, words):
        """Fill `self.choices`: for each list or pattern, what it may become, each a str or a tuple of parts (see `draw`)."""
        def listed(split):
            groups = (*names.values(), *data["things"].values(), *data["values"].values())
            return {item.lower() for group in groups for item in of_split(group, split)}

        split, names = self.split, data["names"]
        self.elsewhere = set().union(*(listed(other) for other in SPLITS if other != split))  # what the other splits' lists have
        self.foreign = set(re.findall(r"[^\W\d_]+", " ".join(self.elsewhere)))                # and the words of that
        words = [word for word in words if split_of(word) == split and word.lower() not in self.foreign]
        # A first name stands either alone or with a last name, a last name with a title or a first name: so "Maria" never
        # meets "Maria Lopez", who never meets "Dr. Lopez", and no question is ambiguous.
        first, last = {gender: of_split(names[gender], split) for gender in ("female", "male")}, of_split(names["last"], split)
        self.alone, self.full = ({gender: first[gender][half::2] for gender in first} for half in (0, 1))
        self.titled, self.last = last[::3], [name for i, name in enumerate(last) if i % 3]
        self.titles = data["titles"]
        self.things = {kind: of_split(lists, split) for kind, lists in data["things"].items()}
        self.choices = choices = {name: list(items) for name, items in data["parts"].items()}
        choices.update({name: list(of_split(lists, split)) for name, lists in data["values"].items()})
        choices.update({name: [] for name in data["shapes"]}, first=first["female"] + first["male"], last=last)
        choices["Syl"] = [syllable.capitalize() for syllable in choices["syl"]]
        for name, syllable, real in (("word", "{syl}", words), ("Word", "{Syl}", [word[0].upper() + word[1:] for word in words if word[1:].islower()])):
            made = [self.compile(syllable + "{syl}"), self.compile(syllable + "{syl}{coda}")]
            choices[name] = real + made * max(1, round(SYLLABLES / (1 - SYLLABLES) * len(real) / 2))
        choices["Name"] = [word for word in choices["Word"] if type(word) is tuple or len(word) > 3]
        for name, patterns in data["shapes"].items():
            choices[name] += map(self.compile, patterns)
        self.open = [choices[name] for name, weight in data["open"].items() for _ in range(weight)]
        self.invented = {kind: list(map(self.compile, patterns)) for kind, patterns in data["invented"].items()}

    def compile(self, pattern):
        """A pattern as a tuple of parts: a str stands for itself, a list for one of its members."""
        parts = re.split(r"(\{\w+\}|[#^?*~])", pattern)
        return tuple(self.choices[part[1:-1]] if part[0] == "{" else list(SYMBOLS[part]) if part in SYMBOLS else part
                     for part in parts if part)

    def read_templates(self, data, phrasings):
        """Fill `self.attributes`, a list per type of subject, `self.relations` and `self.prose`."""
        def templates(entry):       # every section in the phrasing in use
            return {section: list(map(sentence_start, lists[phrasings])) for section, lists in entry.items() if isinstance(lists, dict)}

        clashes = lambda entry: {entry["name"]}.union(*(group for group in data["confusable"] if entry["name"] in group))
        self.attributes = {}
        for entry in data["attributes"]:
            sections = {"also": [], **templates(entry)}
            self.attributes.setdefault(entry["subject"], []).append(SimpleNamespace(
                **sections, name=entry["name"], types=[self.choices[kind] for kind in entry["values"]],
                quoted=4 * QUOTED if entry["values"][0].endswith("_title") else QUOTED,
                clashes=clashes(entry),
                joinable=list(filter(JOINABLE.fullmatch, sections["facts"])),
                joining=joining(sections["pronoun"])))
        self.open_attributes = {kind: SimpleNamespace(**templates(entry)) for kind, entry in data["open_attributes"].items()}
        self.kinds = [kind for kind, attributes in self.attributes.items() for _ in attributes if kind != "person"]
        self.prose = templates(data["prose"])
        self.relations = [SimpleNamespace(**{**entry, **templates(entry)}, clashes=clashes(entry)) for entry in data["relations"] if entry["facts"][phrasings]]
        for relation in self.relations:
            relation.facts += [template.replace("{r}", relation.phrase) for template in self.prose["relation_facts"]]

    def read_scenes(self, scenes, phrasings):
        """Fill `self.scenes`: those of each type of subject whose holes this split has something for."""
        self.scenes = {}
        others = "train" if phrasings == "test" else "test"
        self.elsewhere.update(bare(option).lower() for raw in scenes[others] for options in raw.get("options", {}).values() for option in options)
        for number, raw in enumerate(scenes[phrasings]):
            wordings = {section: [sentence_start(t) for t in raw.get(section, [])] for section in ("first", "then")}
            several = {section: {hole: [sentence_start(t) for t in templates] for hole, templates in raw.get(section, {}).items()}
                       for section in ("questions", "updates")}
            # What a scene lists itself belongs to the split of its phrasings, train's with a share for validation.
            own = {name: [option for option in of_split({"train": [], "test": [], phrasings: options}, self.split)
                          if bare(option).lower() not in self.elsewhere] for name, options in raw.get("options", {}).items()}
            holes = {hole for templates in wordings.values() for t in templates for hole in HOLE.findall(t)} - {"q"}
            types = {hole: own[hole] if hole in own else self.choices[hole.rstrip("0123456789")] for hole in sorted(holes)}
            if all(types.values()):
                self.scenes.setdefault(raw.get("subject", "person"), []).append(
                    SimpleNamespace(**wordings, **several, types=types, key=f"scene {number}",
                                    missing=[sentence_start(t) for t in raw.get("missing", [])]))
        every = [(kind, scene) for kind, scenes in self.scenes.items() for scene in scenes]
        self.stories = dict(lookup=every, unanswerable=every, update=[x for x in every if x[1].updates], coreference=[x for x in every if x[1].then])

    # ------------------------------------------------------------------------------------------------------- values

    def pick(self, items):
        return items[int(self.random() * len(items))]

    def weighted(self, weights):
        """A key of a dict of weights that add up to 1."""
        chance = self.random()
        for key, weight in weights.items():
            chance -= weight
            if chance < 0:
                break
        return key

    def draw(self, choices):
        """One of `choices`; where that is a pattern, its holes are drawn in turn."""
        choice = self.pick(choices)
        return choice if type(choice) is str else "".join([part if type(part) is str else self.draw(part) for part in choice])

    def make(self, choices):
        """Like `draw`, but what a pattern makes is of this split: its hash says so, and no list of another split has it."""
        while True:
            choice = self.pick(choices)
            if type(choice) is str:
                return choice
            text = self.draw([choice])
            if self.owns(text):
                return text

    def owns(self, text):
        """Whether a made word or value is of this split."""
        return split_of(text) == self.split and text.lower() not in self.foreign and text.lower() not in self.elsewhere

    def value(self, attribute, taken):
        """A value that is not yet in the set `taken`, and joins it: of a type that suits the attribute, or anything at all."""
        while True:
            text = self.make(self.pick(self.open if self.random() < OPEN_VALUE else attribute.types))
            if text not in taken:
                taken.add(text)
                return text

    # ----------------------------------------------------------------------------------------------------- subjects

    def person(self, gender=None, titles=True):
        gender = gender or ("female" if self.random() < 0.5 else "male")
        chance = self.random()
        if chance < INVENTED:
            name = self.make(self.invented["person"])
        elif chance < 0.58:
            name = self.pick(self.alone[gender])
        elif chance < 0.9 or not titles:
            name = f"{self.pick(self.full[gender])} {self.last_name()}"
        elif chance < 0.96:
            name = f"{self.pick(self.titles['last'][gender])} {self.pick(self.titled)}"
        else:
            first = self.pick(self.alone[gender])
            return Subject(f"{self.pick(self.titles['first'][gender])} {first}", gender, "person", first.lower())
        return Subject(name, gender, "person", name.lower())

    def last_name(self):
        return self.make(self.choices["Name"]) if self.random() < INVENTED else self.pick(self.last)

    def thing(self, kind):
        name = self.make(self.invented[kind]) if self.random() < INVENTED else self.pick(self.things[kind])
        return Subject(name, "it", kind, name.lower())

    def lookalike(self, subject):
        """Another subject of the same type whose name differs in one word, or in one letter of it, if this split has such a name."""
        for _ in range(60):
            words, chance, at = subject.name.split(" "), self.random(), -1
            if subject.type != "person" and chance < 0.7:
                at = self.pick([i for i, word in enumerate(words) if len(word) > 3] or [-1])
                words[at] = self.make(self.choices["Word" if words[at][0].isupper() else "word"])
            elif subject.type == "person" and len(words) == 2 and words[0] in self.full[subject.gender] and chance < 0.8:
                at = int(self.random() * 2)
                words[at] = self.last_name() if at else self.pick(self.full[subject.gender])
            else:
                word = words[-1]
                at = len(word) - 1 - int(self.random() * max(1, len(word) - 1))
                words[-1] = word[:at] + self.pick("aeiou" if word[at] in "aeiou" else "bdfgklmnprstvz") + word[at + 1:]
                if split_of(words[-1]) != self.split:
                    continue
            name = " ".join(words)
            key = (name if subject.key == subject.name.lower() else words[-1]).lower()
            if key != subject.key and key not in self.foreign:
                return subject._replace(name=name, key=key)
        other = subject
        while other.key == subject.key:
            other = self.person(subject.gender) if subject.type == "person" else self.thing(subject.type)
        return other

    # ---------------------------------------------------------------------------------------------------- sentences

    def wear(self, template):
        """A template as people talk: with a filler between two of its words, or without one of its small ones."""
        words, chance = template.split(" "), self.random()
        if len(words) < 4:
            return template
        at = 1 + int(self.random() * (len(words) - 1))
        if chance < FILLED and words[at - 1].lower() not in LEANING and not words[at - 1].endswith("'s"):
            filler, comma = self.pick(self.prose["fillers"]), self.random() < 0.6 and words[at - 1][-1] not in ".,;:!?"
            words[at - 1:at] = [words[at - 1] + "," * comma, filler + "," * comma]
        elif FILLED <= chance < FILLED + WORN and words[at] in SMALL:
            del words[at]
        return " ".join(words)

    def say(self, template, subject, value="", quoted=0.0):
        """A sentence or question from a template, with the noise of real writing. The value itself is never touched."""
        template = self.wear(template)
        if quoted and self.random() < quoted and '"' not in template and QUOTABLE.search(template):
            template = template.replace("{v}", '"{v}"')
        name, chance, end = subject.name, self.random(), template[-1]
        if chance < 0.10 and end == "." or chance < 0.05 and end == "?":
            template = template[:-1]
        elif chance < 0.13 and end == ".":
            template = template[:-1] + "!"
        elif chance > 0.95:
            template, name = start_small(template), name if chance < 0.975 else name.lower()
        text = template.replace("{P}", name[0].upper() + name[1:]).replace("the {p}", "the " + bare(name)).replace("{p}", name)
        return fill_in(text, {"v": value}) if value else text

    def state(self, attribute, subject, value, frames=()):
        """A sentence that tells an attribute plainly, inside one of `frames` if there are any."""
        template = self.pick(attribute.first if subject is ME else attribute.facts)
        return [self.say(within(self.pick(frames), template) if frames else template, subject, value, attribute.quoted)]

    def ask(self, attribute, subject, answer, support, kind, frames=()):
        """One or two phrasings of the question on an attribute: list of Question, sentences as its support; inside one of `frames`."""
        templates = attribute.first_questions if subject is ME else attribute.questions
        chosen = {self.pick(templates): None, self.pick(templates) if self.random() < SECOND_QUESTION else None: None}
        return [Question(self.say(within(self.pick(frames), template) if frames else template, subject), answer, support, kind, self.trained)
                for template in chosen if template]

    # ------------------------------------------------------------------------------------------------------ bundles

    def plan(self, subject, kind):
        """What is told of a subject, and how: list of (way, attributes). `kind`: the first one must allow such a question."""
        pool, told, names = self.attributes[subject.type], [], set()
        for _ in range(self.weighted(ATTRIBUTES)):
            if (told or kind != "list" or self.prose["also"]) and self.random() < OPEN_ATTRIBUTE:
                attribute = self.open_attribute(subject.type)
            else:
                attribute = self.pick(pool if told or kind != "list" else [a for a in pool if a.also])
            if attribute.clashes.isdisjoint(names):
                told.append(attribute)
                names.add(attribute.name)
        plan, room = [], MOST_SENTENCES - len(told)
        while told:
            way = "list" if told[0].also and self.random() < LIST else self.weighted(WAYS)
            if kind in FORCED and not plan:
                way = self.pick(FORCED[kind])
            if way == "continued" and len(told) == 1:
                way = "mentioned"
            if (subject is ME and way != "update" and (way != "list" or not self.prose["also"]) or way in ("update", "list", "mentioned") and not room
                    or way == "joined" and (len(told) == 1 or not told[0].joinable or not told[1].joining)):
                way = "plain"
            room -= way in ("update", "list", "mentioned")
            takes = 1 + (way in ("joined", "continued")) + (way in ("mentioned", "continued") and self.random() < 0.3)
            plan.append((way, told[:takes]))
            told = told[takes:]
        return plan

    def tell(self, subject, plan, taken):
        """Say what is planned. taken: set of the values used so far, which grows. Returns (chunks, questions).

        A chunk is a list of sentences that stay together. A sentence is a list that holds its str: that gives it an
        identity, so that a question can point at it before its place is known. The ways:
          plain      "Maria's code is 4821."
          joined     "Maria's code is 4821, and she lives in Oslo."
          mentioned  "I met Maria." "Her code is 4821."
          continued  "Maria lives in Oslo." "Her code is 4821."
          update     "Maria's code is 4821." … "Maria's code has changed to 77."
          list       "Maria speaks Welsh." … "Maria also speaks Thai."
        """
        chunks, questions, later = [], [], []
        for way, attributes in plan:
            pairs = [(attribute, self.value(attribute, taken)) for attribute in attributes]
            attribute, value = pairs[0]
            if way == "joined":
                (second, other), = pairs[1:]
                template = self.pick(attribute.joinable)[:-1].replace("{v}", "{u}") + ", and " + \
                    with_pronouns(self.pick(second.joining), subject.gender)
                chunk = [[fill_in(self.say(template, subject, other), {"u": value})]]
                questions += self.ask(second, subject, other, chunk, "lookup")
            elif way == "mentioned":
                mentions = self.prose["mentions" if subject.type in ("person", "pet") else "mentions_thing"]
                chunk = [[self.say(self.pick(mentions), subject)]]
            elif way == "update" and self.prose["also"] and self.random() < MARKED:
                chunk = [self.state(attribute, subject, value, self.prose["change"])]
            else:
                wrapped = way != "continued" and self.random() < WRAPPED
                chunk = [self.state(attribute, subject, value, self.prose["wrap"] if wrapped else ())]
            if way in ("plain", "joined", "continued"):
                questions += self.ask(attribute, subject, value, chunk[:], "lookup")
            if way in ("mentioned", "continued"):
                for attribute, value in pairs[way == "continued":]:
                    template = with_pronouns(self.pick(attribute.pronoun), subject.gender)
                    chunk.append([self.say(template, subject, value, attribute.quoted)])
                    questions += self.ask(attribute, subject, value, chunk[-1:], "coreference")
            chunks.append(chunk)
            if way == "list":
                other = self.value(attribute, taken)
                sentence, frames = self.add(attribute, subject, other)
                later.append((chunk, [sentence]))
                questions += self.ask(attribute, subject, f"{value} and {bare(other)}", [chunk[0], sentence], way, frames)
            elif way == "update":
                for _ in range(self.changes()):
                    value = self.value(attribute, taken)
                    later.append((chunk, [self.update(attribute, subject, value)]))
                    chunk = later[-1][1]
                questions += self.ask(attribute, subject, value, chunk[:], way)
        self.insert(chunks, later)
        return chunks, questions

    def changes(self):
        """How often something changes that does."""
        return 2 + int(self.random() * 3) if self.random() < RETOLD else 1

    def insert(self, chunks, later):
        """Put into `chunks` those that go back to one of them: after it, with 0 to 2 chunks between. later: pairs (it, new)."""
        for chunk, new in later:
            at = 1 + next(i for i, other in enumerate(chunks) if other is chunk)
            chunks.insert(at + int(self.random() * min(3, len(chunks) - at + 1)), new)

    def add(self, attribute, subject, value):
        """The second sentence of a list, and frames for the questions. Where no word of it says that there are two, the question does."""
        chance = self.random() if self.prose["also"] else 1
        if chance < UNSAID:
            return self.state(attribute, subject, value), self.prose["both"]
        frames = self.prose["both"] if chance > 1 - BOTH and chance < 1 else ()
        if subject is ME or UNSAID < chance < FRAMED:
            return self.state(attribute, subject, value, self.prose["also"]), frames
        return [self.say(self.pick(attribute.also), subject, value, attribute.quoted)], frames

    def update(self, attribute, subject, value):
        """The later sentence of an update: it says that something changed, or simply tells the attribute again."""
        if self.prose["also"] and self.random() < RESTATED:
            return self.state(attribute, subject, value, self.prose["wrap"] if self.random() < WRAPPED else ())
        chance = self.random()
        if subject is not ME and chance < 0.6:
            return [self.say(self.pick(attribute.updates), subject, value, attribute.quoted)]
        return self.state(attribute, subject, value, self.prose["change"] if chance < 0.8 else ())

    def bundle(self, kind=None):
        """A random Bundle; `kind`, one of KINDS, asks for one with a question of this kind. Raises InputError for another."""
        if kind not in (None, *KINDS):
            raise InputError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}.")
        chance = self.random()
        if kind == "two_hop" or kind is None and chance < TWO_HOP:
            return self.relatives()
        if self.stories.get(kind or "lookup") and self.random() < STORY:
            return self.story(kind)
        if kind is None and chance > 1 - NOISE:
            noises = [self.noise_about() for _ in range(self.weighted({1: 0.6, 2: 0.3, 3: 0.1}))]
            question = Question(self.world_question(), "", [], "unanswerable", self.trained)
            return self.finish([[[text]] for text, _ in noises], [question], {key for _, key in noises if key})
        if kind == "list" and self.random() < 0.1:
            subject = self.thing("event")
        elif kind == "list" or self.random() < PERSON:
            subject = ME if kind not in ("list", "coreference") and self.random() < FIRST_PERSON else self.person()
        else:
            subject = self.thing(self.pick(self.kinds))
        plan, taken, keys = self.plan(subject, kind), set(), {subject.key}
        chunks, questions = self.tell(subject, plan, taken)
        if subject is not ME and sum(map(len, chunks)) <= MOST_SENTENCES // 2 and self.random() < TWIN:
            twin = self.lookalike(subject)
            more, asked = self.tell(twin, plan, taken)
            chunks, questions = self.weave(chunks, more), questions + asked
            keys.add(twin.key)
        if kind == "unanswerable" or self.random() < UNANSWERABLE:
            told = [attribute for _, attributes in plan for attribute in attributes]
            attribute = self.untold(subject, told)
            if attribute is None or self.random() < UNKNOWN:
                attribute = self.pick(told)
                while subject.key in keys:
                    subject = self.person() if subject is ME else ME if subject.type == "person" and self.random() < 0.1 \
                        else self.lookalike(subject)
                keys.add(subject.key)
            questions += self.ask(attribute, subject, "", [], "unanswerable")[:1]
        return self.finish(chunks, questions, keys)

    def open_attribute(self, kind):
        """An attribute named by any noun of the list, with templates that fit every noun ({a})."""
        open_ = self.open_attributes["person" if kind == "person" else "thing"]
        noun = self.pick(open_.nouns)
        sections = {section: [template.replace("{a}", noun) for template in templates]
                    for section, templates in vars(open_).items() if section != "nouns"}
        return SimpleNamespace(**sections, name=noun, types=self.open, quoted=QUOTED, clashes={noun},
                               joinable=list(filter(JOINABLE.fullmatch, sections["facts"])), joining=joining(sections["pronoun"]))

    def untold(self, subject, told):
        """An attribute that can't be taken for one of those told; None if there is hardly any."""
        names = {attribute.name for attribute in told}
        for _ in range(20):
            attribute = self.open_attribute(subject.type) if self.random() < OPEN_ATTRIBUTE else self.pick(self.attributes[subject.type])
            if attribute.clashes.isdisjoint(names):
                return attribute

    def relatives(self):
        """A Bundle on two persons: how they are related, and attributes of the second, asked for by way of the first."""
        relation, one = self.pick(self.relations), self.person()
        other = self.person(relation.gender, titles=False)
        while not set(one.key.split()).isdisjoint(other.key.split()):
            other = self.person(relation.gender, titles=False)
        template = self.pick(relation.facts).replace("{q}", "{v}")
        if self.random() < WRAPPED:
            template = within(self.pick(self.prose["wrap"]), template)
        link, taken = [self.say(template, one, other.name)], {other.name}
        if self.random() < STORY:
            return self.relative_story(relation, one, other, link, taken)
        plan = []
        while not plan:
            plan = [("plain", told[:1]) for _, told in self.plan(other, None)[:2] if told[0].clashes.isdisjoint((relation.name, relation.phrase))]
        chunks, questions = self.tell(other, plan, taken)
        told, stories = [attribute for _, (attribute,) in plan], [[[link]], chunks]
        by_way = one._replace(name=f"{one.name}'s {relation.phrase}")
        for attribute, (sentence,) in zip(told, chunks):
            answer = next(question.answer for question in questions if question.support[0] is sentence)
            if self.random() < 0.3:     # "the sister of Anna", unless that makes "the sister of Anna's code"
                by_way = one._replace(name=f"the {relation.phrase} of {one.name}")
                attribute = SimpleNamespace(questions=[t for t in attribute.questions if "}'" not in t] or attribute.questions)
            questions += self.ask(attribute, by_way, answer, [link, sentence], "two_hop")
        if self.random() < 0.3:
            template = self.pick(self.prose["relation_questions"])
            questions.append(Question(self.say(template, by_way), other.name, [link], "lookup", self.trained))
        if self.random() < 0.5:         # the first person's own value, a hard negative
            own, asked = self.tell(one, plan[:1], taken)
            stories.append(own)
            questions += asked
        if self.random() < UNANSWERABLE:
            attribute, phrase = self.untold(other, told), relation.phrase
            if self.random() < 0.5:     # what is told, but of another relative
                attribute = told[0]
                phrase = self.pick([another.phrase for another in self.relations if another.name not in relation.clashes])
            questions += self.ask(attribute, one._replace(name=f"{one.name}'s {phrase}"), "", [], "unanswerable")[:1]
        return self.finish(self.weave(*stories), questions, {one.key, other.key})

    def relative_story(self, relation, one, other, link, taken):
        """What `relatives` makes of a scene of the second person: its questions, asked by way of the first."""
        keys, by_way = {one.key, other.key}, f"{one.name}'s {relation.phrase}"
        while True:
            scene = self.pick(self.scenes["person"])
            chunks, questions = self.play(other, [scene], taken, keys)
            asked = [question for question in questions if question.kind == "lookup" and other.name in question.question]
            if asked:                           # a name in small letters can't be replaced: another scene
                break
        stories = [[[link]], chunks]
        by_ways = [Question(question.question.replace(other.name, by_way), question.answer, [link, *question.support], "two_hop", self.trained)
                   for question in asked]
        if self.random() < UNANSWERABLE:        # what is told, but of another relative
            phrase = self.pick([another.phrase for another in self.relations if another.name not in relation.clashes])
            by_ways.append(Question(self.pick(asked).question.replace(other.name, f"{one.name}'s {phrase}"), "", [], "unanswerable", self.trained))
        if self.random() < 0.5:                 # the first person's own, a hard negative
            own, more = self.play(one, [scene], taken, keys)
            stories.append(own)
            questions += more
        return self.finish(self.weave(*stories), questions + by_ways, keys)

    def story(self, kind=None):
        """A Bundle of one to three scenes of a subject (and perhaps of its twin), each of which tells several things at once."""
        type_, scene = self.pick(self.stories[kind or "lookup"])
        subject, told = ME if type_ == "none" else self.person() if type_ == "person" else self.thing(type_), [scene]
        for _ in range(self.weighted({0: 0.6, 1: 0.25, 2: 0.15})):
            scene = self.pick(self.scenes[type_])
            told += [scene] * (scene not in told)
        taken, keys = set(), {scene.key for scene in told} if subject is ME else {subject.key}
        chunks, questions = self.play(subject, told, taken, keys, kind)
        if subject is not ME and sum(map(len, chunks)) <= MOST_SENTENCES // 2 and self.random() < TWIN:
            twin = self.lookalike(subject)
            if twin.key not in keys:
                keys.add(twin.key)
                more, asked = self.play(twin, told, taken, keys)
                chunks, questions = self.weave(chunks, more), questions + asked
        if kind not in (None, "unanswerable") and kind not in {question.kind for question in questions}:
            return self.story(kind)         # the question of that kind spoke of what has changed since
        if kind == "unanswerable" or self.random() < UNANSWERABLE:
            others = [scene for scene in self.scenes[type_] if scene not in told]
            if others and (subject is ME or self.random() > UNKNOWN):      # what is not told of this one
                scene = self.pick(others)
                keys |= {scene.key} if subject is ME else set()
            elif subject is ME:
                return self.finish(chunks, questions, keys)
            else:
                scene = self.pick(told)
                while subject.key in keys:
                    subject = self.lookalike(subject)
                keys.add(subject.key)
            hole, templates = self.pick(sorted(scene.questions.items()))
            filled = self.fill(scene, subject, taken, keys)
            questions.append(Question(self.put(self.pick(templates), subject, filled), "", [], "unanswerable", self.trained))
        return self.finish(chunks, questions, keys)

    def fill(self, scene, subject, taken, keys):
        """Values for a scene's holes, dict of str; a second person joins `keys`."""
        filled = {hole: self.scene_value(choices, taken) for hole, choices in scene.types.items()}
        if any("{q}" in template for template in scene.first + scene.then):
            while True:
                other = self.person(titles=False)
                if other.key not in keys and set(other.key.split()).isdisjoint(subject.key.split()):
                    break
            keys.add(other.key)
            filled["q"] = other.name
        return filled

    def scene_value(self, choices, taken):
        """A value for a hole, as `value`. Where few suit it and all of these are taken, anything will do."""
        for attempt in count():
            choice = self.pick(self.pick(self.open) if self.random() < OPEN_IN_STORY or attempt > 20 else choices)
            text = self.draw([choice])
            if text not in taken and (type(choice) is str or self.owns(text)):
                taken.add(text)
                return text

    def put(self, template, subject, filled):
        """A sentence or question of a scene. What fills the holes goes in last, so that nothing touches it."""
        text = self.say(template if subject is ME else with_pronouns(template, subject.gender), subject)
        return fill_in(text, filled)

    def play(self, subject, scenes, taken, keys, kind=None):
        """Tell scenes of a subject: (chunks, questions), as `tell` does. The first allows a question of `kind`."""
        chunks, questions, later = [], [], []
        for scene in scenes:
            forced, filled = kind if scene is scenes[0] else None, self.fill(scene, subject, taken, keys)
            chunk = [[self.put(self.pick(scene.first), subject, filled)]]
            follows = set()
            if scene.then and (forced == "coreference" or self.random() < 0.6):
                template = self.pick(scene.then)
                follows = set(HOLE.findall(template))
                chunk.append([self.put(template, subject, filled)])
            changed = None
            can = sorted(hole for hole in scene.updates if hole in scene.questions and hole not in follows and hole != "q"
                         and any("{%s}" % hole in template for template in scene.first))
            if can and (forced == "update" or self.random() < CHANGED):
                changed, before = self.pick(can), chunk
                for _ in range(self.changes()):
                    new = {**filled, changed: self.scene_value(scene.types[changed], taken)}
                    sentence = [self.put(self.pick(scene.updates[changed]), subject, new)]
                    later.append((before, [sentence]))
                    before = later[-1][1]
            said = set(HOLE.findall(scene.first[0])) | follows
            asked = sorted(hole for hole in scene.questions if hole in said)
            # Three holes at most are asked about; among them the one that makes a question of the kind asked for.
            needed = changed if forced != "coreference" else self.pick(sorted(follows & set(asked)) or [None])
            while len(asked) > 3:
                gone = self.pick(asked)
                if gone != needed:
                    asked.remove(gone)
            for hole in asked:
                sentence_of, answer, sort = chunk[:1], filled[hole], "lookup"
                if hole == changed:
                    sentence_of, answer, sort = [sentence], new[hole], "update"
                elif hole in follows:
                    sentence_of, sort = chunk[1:], "coreference"
                templates = scene.questions[hole]
                chosen = {self.pick(templates): None, self.pick(templates) if self.random() < SECOND_QUESTION else None: None}
                # A question may mention other values, but none that isn't told or is no longer true.
                known = said - {changed}
                questions += [Question(self.put(t, subject, filled), answer, sentence_of, sort, self.trained)
                              for t in chosen if t and set(HOLE.findall(t)) <= known]
            if scene.missing and self.random() < NEAR_MISS:
                questions.append(Question(self.put(self.pick(scene.missing), subject, filled), "", [], "unanswerable", self.trained))
            chunks.append(chunk)
        self.insert(chunks, later)
        return chunks, questions

    def finish(self, chunks, questions, keys):
        """The Bundle of these chunks: sentences get their places, and questions point at those."""
        sentences = [sentence for chunk in chunks for sentence in chunk]
        place = {id(sentence): i for i, sentence in enumerate(sentences)}
        for question in questions:
            question.support = [place[id(sentence)] for sentence in question.support]
        follows = [i > 0 for chunk in chunks for i in range(len(chunk))]
        return Bundle([text for text, in sentences], follows, questions, frozenset(keys))

    def weave(self, *stories):
        """Lists of chunks as one: each keeps its order, and every interleaving is as likely as any other."""
        keyed = []
        for chunks in stories:
            keyed += zip(sorted([self.random() for _ in chunks]), chunks)
        return [chunk for _, chunk in sorted(keyed, key=itemgetter(0))]

    # ----------------------------------------------------------------------------------------------------- memories

    def noise_about(self):
        """(A sentence that answers nothing, the key of the person it mentions or "")."""
        template = self.pick(self.prose["noise"])
        subject = self.person() if "{p}" in template or "{P}" in template else ME
        return self.say(template, subject), "" if subject is ME else subject.key

    def noise(self):
        """A sentence that answers nothing."""
        return self.noise_about()[0]

    def world_question(self):
        """A question that nothing stored answers."""
        return self.say(self.pick(self.prose["world_questions"]), ME)

    def memory(self, n_facts, n_questions, kind=None):
        """A memory of exactly `n_facts` sentences, and up to `n_questions` different questions on it, of `kind` if given.

        Bundles are woven into each other; half of them stay in one piece, as in a conversation. No two share a subject.
        Returns (facts, questions): list of str, and list of dict with the fields of a Question, whose `support` are indices
        into these facts. Fewer questions come back if the sentences don't answer that many. Raises InputError if there
        is no room for even one, or for another kind.
        """
        if n_questions < 1 or n_facts < FEWEST_FACTS.get(kind, 1):
            raise InputError(f"expected at least {FEWEST_FACTS.get(kind, 1)} facts and 1 question (kind: {kind or 'any'}), "
                             f"got {n_facts} and {n_questions}.")
        bundles, subjects, missing, misfits = [], set(), n_questions, 0
        room = n_facts
        while room:
            bundle = self.bundle(kind if missing > 0 and (misfits < 1000 or missing == n_questions) else None)
            if len(bundle.facts) > room or not subjects.isdisjoint(bundle.subjects):
                misfits += 1
                continue
            bundles.append(bundle)
            subjects |= bundle.subjects
            room -= len(bundle.facts)
            missing -= sum(kind in (None, question.kind) for question in bundle.questions)
        order = []                               # (a moment, number of the bundle, index of the fact)
        for number, bundle in enumerate(bundles):
            chunks = bundle.follows.count(False)
            moments = sorted([self.random() for _ in range(chunks)]) if self.random() < 0.5 else [self.random()] * chunks
            chunk = -1
            for i, follows in enumerate(bundle.follows):
                chunk += not follows
                order.append((moments[chunk], number, i))
        order.sort()
        place = {(number, i): at for at, (_, number, i) in enumerate(order)}
        pool = {question.question: (number, question) for number, bundle in enumerate(bundles)
                for question in bundle.questions if kind in (None, question.kind)}
        pool, questions = list(pool.values()), []
        while pool and len(questions) < n_questions:
            at = int(self.random() * len(pool))
            pool[at], pool[-1] = pool[-1], pool[at]
            number, question = pool.pop()
            questions.append({**asdict(question), "support": [place[number, i] for i in question.support]})
        return [bundles[number].facts[i] for _, number, i in order], questions

    def example(self, n_facts, kind=None):
        """One line of the JSONL, a dict: a memory of exactly `n_facts` sentences and one question, of `kind` if given."""
        facts, (question,) = self.memory(n_facts, 1, kind)
        del question["trained"]
        return {"facts": facts, **question, "split": self.split}


# ------------------------------------------------------------------------------------------------------ command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see python data_gen.py --help.")


def sizes(text):
    """ "4:32" -> (4, 32); "16" -> (16, 16)."""
    low, _, high = text.partition(":")
    return int(low), int(high or low)


def replaceable(path):
    """Whether nothing is lost when `path` is written: it isn't there, is empty, or begins with an example as JSON."""
    if not path.is_file():                                                 # a pipe or a device would be read without end
        return not path.exists()
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(1 << 26)
        return not line or {"facts", "question", "answer"} <= json.loads(line).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def main(arguments=None):
    parser = Parser(description="Write synthetic memories with one question each as JSONL: facts, question, answer, support "
                                "(indices into the facts), kind, split.",
                    epilog="example: python data_gen.py --n 20000 --out data.jsonl --facts 4:32 --kind update")
    parser.add_argument("--n", type=int, required=True, help="how many examples")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same examples (default: 0)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose names, values and templates (default: train)")
    parser.add_argument("--facts", type=sizes, default="4:32", metavar="LOW:HIGH", help="sentences in a memory (default: 4:32)")
    parser.add_argument("--kind", choices=KINDS, help="only questions of this kind (default: all)")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, for its words (default: tiny beside this file; "
                                                       "while that is missing, words are made of syllables)")
    try:
        args = parser.parse_args(arguments)
        fewest = FEWEST_FACTS.get(args.kind, 1)
        if args.n < 1 or not fewest <= args.facts[0] <= args.facts[1]:
            raise InputError(f"expected --n of at least 1 and --facts LOW:HIGH with {fewest} <= LOW <= HIGH, "
                             f"got {args.n} and {args.facts[0]}:{args.facts[1]}.")
        if not args.out.parent.is_dir() or args.out.is_dir():
            raise InputError(f"{args.out}: expected a file in a folder that exists; make the folder or choose another.")
        if not replaceable(args.out):
            raise InputError(f"{args.out}: expected a new file, or examples that were written before, and this is another; choose another name.")
        folder = args.tokenizer or HERE / "tiny"
        words = open_vocabulary(Tokenizer(folder)) if args.tokenizer or (folder / "tokenizer.model").is_file() else ()
        world = World(args.split, args.seed, words)
        with replacing(args.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for _ in tqdm(range(args.n), unit="example"):
                n_facts = args.facts[0] + int(world.random() * (args.facts[1] - args.facts[0] + 1))
                file.write(json.dumps(world.example(n_facts, args.kind), ensure_ascii=False) + "\n")
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
