"""The synthetic data: labels are right, splits share nothing, the same seed gives the same examples, bad input is refused."""

import hashlib
import json
import re
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

import data_gen
from data_gen import FEWEST_FACTS, HOLE, KINDS, LEADING, SMALL, SPLITS, World, bare, fill_in, joining, main, open_vocabulary, split_of
from gemma import InputError, read_json

SCENES = read_json(data_gen.HERE / "data_scenes.json")
DATA = read_json(data_gen.HERE / "data_gen.json")
# A vocabulary without a tokenizer: words that no list holds, of all shapes that a real one has.
WORDS = sorted({a + b + c for a in ("brim", "Klop", "zund", "FAR", "Oster", "quel") for b in ("a", "or", "iu") for c in
                ("ten", "lick", "mos", "dap", "ver", "sh")})
HASH = "22bb0912386468ea7c3cbbf94bceab015999c8819bbec8a446364ff0b3fb58e6"


@pytest.fixture(scope="module", params=SPLITS)
def bundles(request):
    world = World(request.param, 5, WORDS)
    return [world.bundle() for _ in range(1500)]


def answers(bundle):
    return [(question, [bundle.facts[i] for i in question.support]) for question in bundle.questions]


def test_same_seed_same_examples():
    """Catches anything but the seed that decides: hash order, global random state, a changed template (then renew HASH)."""
    world = World("train", 0, WORDS)
    lines = [json.dumps(world.example(4 + i % 12), ensure_ascii=False) for i in range(200)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == HASH
    assert World("train", 1, WORDS).example(8) != json.loads(lines[4])


def test_only_random_random_is_used():
    """Catches a draw by choice, shuffle or sample, which differ between Python versions."""
    source = (data_gen.HERE / "data_gen.py").read_text(encoding="utf-8")
    others = ("choice", "choices", "shuffle", "sample", "randint", "randrange", "uniform", "getrandbits")
    assert not any(f".{name}(" in source for name in others)


def test_answer_stands_in_its_facts(bundles):
    """Catches a support that points at another sentence, and noise (case, punctuation, quotes) that touched a value."""
    for bundle in bundles:
        for question, facts in answers(bundle):
            if question.kind == "unanswerable":
                assert (question.answer, question.support) == ("", [])
            elif question.kind == "list":
                parts = question.answer.split(" and ")         # a value may hold an "and" of its own
                halves = [(" and ".join(parts[:i]), " and ".join(parts[i:])) for i in range(1, len(parts))]
                assert len(facts) == 2 and question.support == sorted(question.support)
                assert any(one in facts[0] and other in facts[1] for one, other in halves)
            else:
                assert len(facts) == (2 if question.kind == "two_hop" else 1)
                assert question.answer and question.answer in facts[-1]


@pytest.mark.parametrize("value, answer", [
    ("a toothbrush", "toothbrush"), ("an old oar", "old oar"), ("the mayor's office", "mayor's office"), ("the 19th of November", "19th of November"),
    ("an hour and a half", None), ("a fortnight", None), ("a dozen eggs", None), ("a week's rent", None), ("a few", None), ("a couple of nails", None),
    ("a quarter turn", None), ("a third of it", None), ("a third man", "third man"), ("a half-built boat", "half-built boat"), ("a weekend", "weekend"),
    ("The Silver Tram", None), ("A Spoonful of Thunder", None), ("anchor", None), ("theatre", None), ("the", None), ("a", None),
    ("in the bird feeder", "bird feeder"), ("on a nail under the sill", "nail under the sill"), ("by semaphore flags", "semaphore flags"), ("at noon", "noon"),
    ("to water the plants", "water the plants"), ("for a week", "a week"), ("towards Oslo", "Oslo"), ("from in there", "there"),
    ("under the bench", None), ("behind the piano", None), ("in front of the gym", None), ("on top of it", None), ("at least 20", None), ("by heart", None),
    ("in an hour", "an hour"), ("in half", None), ("by halves", "halves"), ("as a hen house", "hen house"), ("as far as Rome", None), ("In the Mood for Love", None), ("inside", None), ("to-do list", None),
    ("in two minds", None), ("in one piece", None), ("at sea", None), ("in prison", None), ("by day", None), ("at your own risk", None), ("on Monday and on Friday", None),
    ("at half past six", "half past six"), ("from last season", "last season"), ("in total darkness", "total darkness"), ("in total", None), ("at first light", "first light"),
    ("at first", None), ("for good", None), ("for good luck", "good luck"), ("to time eggs", "time eggs"), ("on time", None), ("as a the", "the")])
def test_bare(value, answer):
    """Catches an answer that keeps an article or "in", so that one guesses where it begins, and one that loses what counts or is a title."""
    assert bare(value) == (answer or value) == bare(bare(value))


def test_no_answer_begins_with_an_article_or_in(bundles):
    """Catches a maker of answers that goes its own way, also with the second of two, and "the the Krebs cycle" or "a owl" in a sentence."""
    for bundle in bundles:
        for question, facts in answers(bundle):
            ends = [question.answer] + [question.answer[at.end():] for at in re.finditer(" and ", question.answer)] * (question.kind == "list")
            assert not LEADING.match(question.answer) and (len(ends) == 1 or any(end in facts[1] and not LEADING.match(end) for end in ends[1:])), question
        for text in [*bundle.facts, *(question.question for question in bundle.questions)]:
            assert not re.search(r"\b(an?|the) (an?|the) [a-z]", text), text
    assert fill_in("In the {place} a {job} met a {pet}: {pet}", dict(place="the old mill", job="actor", pet="a goat")) == "In the old mill an actor met a goat: a goat"
    assert fill_in("a {thing}", dict(thing="to do list")) == "a to do list"
    assert fill_in('my {time}, {u}, "{v}"', dict(time="an hour and a half", v="the end")) == 'my an hour and a half, {u}, "the end"'


def test_text_is_whole(bundles):
    """Catches a hole that nothing filled, doubled spaces, and values that could not be told from their sentence's end."""
    for bundle in bundles:
        assert len(bundle.facts) == len(bundle.follows) and not bundle.follows[0]
        for text in [*bundle.facts, *(question.question for question in bundle.questions)]:
            assert text == text.strip() and "  " not in text and "{" not in text and "\n" not in text
        for question in bundle.questions:
            assert question.answer == question.answer.strip() and '"' not in question.answer
            assert not question.answer.endswith((".", "!", "?", ","))


def test_unanswerable_was_not_told(bundles):
    """Catches an "unanswerable" question that the same bundle answers in the same words."""
    for bundle in bundles:
        told = {question.question for question in bundle.questions if question.kind != "unanswerable"}
        assert not told & {question.question for question in bundle.questions if question.kind == "unanswerable"}


def test_update_takes_the_later():
    """Catches an answer that is the old value, an update told before what it replaces, and things that change but once."""
    world, seen, lengths = World("train", 3, WORDS), 0, set()
    for _ in range(300):
        attribute = world.pick(world.attributes["person"])
        subject = world.person()
        chunks, questions = world.tell(subject, [("update", [attribute])], set())
        bundle = world.finish(chunks, questions, {subject.key})
        lengths.add(len(bundle.facts))
        for question in bundle.questions:
            assert question.kind == "update" and question.support == [len(bundle.facts) - 1] and question.answer in bundle.facts[-1]
            seen += not any(question.answer in fact for fact in bundle.facts[:-1])
    assert seen > 300 and lengths == {2, 3, 4, 5}


def test_a_list_can_be_told_from_an_update(monkeypatch):
    """Catches a second value that neither its sentence nor the question calls one: then the later of the two would count. And
    lists that only a few attributes have, or only "also" announces."""
    monkeypatch.setattr(data_gen, "FILLED", 0.0), monkeypatch.setattr(data_gen, "WORN", 0.0)
    both = {frame.replace("{f}", "").strip().lower() for frame in DATA["prose"]["both"]["train"]}
    for chance, frames in ((0.0, True), (data_gen.UNSAID + 0.01, False), (0.6, False), (0.99, True)):
        world = World("train", 15, WORDS)
        attribute, subject = world.open_attribute("person"), world.person()
        draw, first = world.random, []
        world.random = lambda: draw() if first else first.append(1) or chance
        (text,), asked = world.add(attribute, subject, "4821")
        assert "4821" in text and bool(asked) == frames
        question = world.ask(attribute, subject, "A and B", [], "list", asked)[0].question.lower()
        assert any(frame.rstrip(".,:?!") in question for frame in both) == frames, question
    drawn = [World("test", 15, WORDS).add(SimpleNamespace(also=["{p} also has {v}."], quoted=0), data_gen.Subject("Al", "male", "person", "al"), "4821") for _ in range(9)]
    assert all(frames == () and "4821" in text for (text,), frames in drawn)


@pytest.mark.parametrize("n_facts", [1, 2, 5, 16, 64, 300])
def test_memory_has_exactly_n_facts(n_facts):
    """Catches memories that are short, or long, by a bundle that didn't fit, and support that wasn't moved with its facts."""
    world = World("test", n_facts, WORDS)
    for _ in range(20):
        facts, questions = world.memory(n_facts, 4)
        assert len(facts) == n_facts and 1 <= len(questions) <= 4
        assert len({question["question"] for question in questions}) == len(questions)
        for question in questions:
            assert all(0 <= i < n_facts for i in question["support"])
            if question["support"] and question["kind"] != "list":
                assert question["answer"] in facts[question["support"][-1]]


def watched(world):
    """The world, and a list of all bundles that it will have drawn."""
    drawn, draw = [], world.bundle
    world.bundle = lambda kind=None: drawn.append(draw(kind)) or drawn[-1]
    return world, drawn


def test_weaving_keeps_order_and_adjacency():
    """Catches a pronoun that ends up behind somebody else's sentence, and an update that is woven in before the old fact."""
    world, drawn = watched(World("train", 8, WORDS))
    apart = 0
    for _ in range(200):
        drawn.clear()
        facts, _ = world.memory(20, 1)
        for bundle in drawn:
            if all(facts.count(fact) == 1 for fact in bundle.facts):          # else it was turned down, or is noise told twice
                places = [facts.index(fact) for fact in bundle.facts]
                assert places == sorted(places)
                assert all(b == a + 1 for a, b, follows in zip(places, places[1:], bundle.follows[1:]) if follows)
                apart += places[-1] - places[0] >= len(places)
    assert apart > 200


def test_subjects_of_a_memory_are_distinct():
    """Catches two bundles on one person, which makes questions ambiguous, "Maria" beside "Maria Lopez", and two "I"."""
    world, drawn = watched(World("test", 9, WORDS))
    for _ in range(100):
        drawn.clear()
        facts, _ = world.memory(60, 1)
        placed = [bundle for bundle in drawn if all(fact in facts for fact in bundle.facts)]
        keys = Counter(key for bundle in placed for key in bundle.subjects)
        assert keys["I"] <= 1
        assert sum(len(bundle.facts) for bundle in placed) >= 60
        first = {key.split()[0] for key in keys if " " in key and not key.startswith("the ")}
        assert not first & {name.lower() for gender in world.alone.values() for name in gender}


def test_large_memory_does_not_run_out_of_subjects():
    """Catches a draw that never ends once the list of names is used up."""
    facts, questions = World("validation", 2, WORDS).memory(2000, 50)
    assert len(facts) == 2000 and len(questions) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_kind_can_be_asked_for(kind):
    """Catches a kind that the bundle asked for doesn't have, also in the smallest memory that can hold it."""
    world = World("train", 4, WORDS)
    for n_facts in (FEWEST_FACTS[kind], 12):
        for _ in range(50):
            example = world.example(n_facts, kind)
            assert example["kind"] == kind and len(example["facts"]) == n_facts and example["split"] == "train"
    facts, questions = world.memory(100, 20, kind)
    assert len(questions) == 20 and {question["kind"] for question in questions} == {kind}


def test_kinds_in_proportion(bundles):
    """Catches constants that leave a kind out, or lookups far from half of all questions; and a world without "I"."""
    kinds = Counter(question.kind for bundle in bundles for question in bundle.questions)
    share = {kind: kinds[kind] / kinds.total() for kind in KINDS}
    assert 0.4 < share["lookup"] < 0.66 and min(share.values()) > 0.01
    assert sum("I" in bundle.subjects for bundle in bundles) > 30


def test_enough_variety():
    """Catches a data file that lost attributes or phrasings on its way."""
    people = [entry for entry in DATA["attributes"] if entry["subject"] == "person"]
    assert len(DATA["attributes"]) >= 40 and len({entry["name"] for entry in DATA["attributes"]}) == len(DATA["attributes"])
    for entry in DATA["attributes"]:
        for section, fewest in dict(facts=9, pronoun=4, updates=4, questions=9).items():
            assert len(set(entry[section]["train"])) >= fewest and len(set(entry[section]["test"])) >= 2
    assert all("first" in entry and "first_questions" in entry for entry in people)


def test_templates_have_their_holes():
    """Catches a template that can't be filled: it would tell no value, or nobody's."""
    holes = dict(facts=(1, 1), updates=(1, 1), also=(1, 1), pronoun=(0, 1), first=(0, 1), questions=(1, 0),
                 first_questions=(0, 0))
    for entry in DATA["attributes"]:
        for section, wanted in holes.items():
            for template in [t for side in entry.get(section, {}).values() for t in side]:
                assert (template.count("{p}"), template.count("{v}")) == wanted, (entry["name"], template)
    for entry in DATA["open_attributes"].values():
        for section in entry.keys() - {"nouns"}:
            for template in [t for side in entry[section].values() for t in side]:
                assert (template.count("{a}"), template.count("{p}"), template.count("{v}")) == (1, *holes[section]), template
    assert all(t.count("{a}") == 0 for entry in DATA["attributes"] for side in entry["facts"].values() for t in side)
    for entry in DATA["relations"]:
        assert all(t.count("{p}") == t.count("{q}") == 1 for side in entry["facts"].values() for t in side)
    assert all(t.count("{p}") == t.count("{q}") == t.count("{r}") == 1 for t in DATA["prose"]["relation_facts"]["train"])
    assert all(t.count("{f}") == 1 for frames in ("also", "both", "change", "wrap") for side in DATA["prose"][frames].values() for t in side)


def test_splits_share_no_template():
    """Catches a test template that training has seen."""
    for entry in [*DATA["attributes"], *DATA["relations"], *DATA["open_attributes"].values(), DATA["prose"]]:
        for section, sides in entry.items():
            if isinstance(sides, dict):
                plain = [{"".join(c for c in t.lower() if c.isalnum()) for t in sides[side]} for side in ("train", "test")]
                assert not plain[0] & plain[1], (entry.get("name"), section)


@pytest.mark.parametrize("side", ["train", "test"])
def test_scenes_can_be_told_and_asked(side):
    """Catches a scene whose wordings tell different things, a hole that nothing fills, a question that holds its answer or could
    be about anybody, an update that says nothing new."""
    known = DATA["values"].keys() | DATA["shapes"].keys() | DATA["parts"].keys()
    values = lambda template: set(HOLE.findall(template))
    for scene in SCENES[side]:
        sections = {name: [values(t) for t in scene.get(name, [])] for name in ("first", "then")}
        assert all(some == found[0] for found in sections.values() for some in found), scene
        told = set().union(*sections["first"], *sections["then"])
        assert sections["first"] and not (sections["then"] and sections["first"][0] & sections["then"][0]), scene
        assert all(hole == "q" or hole in scene.get("options", {}) or hole.rstrip("0123456789") in known for hole in told), scene
        named = scene.get("subject", "person") != "none"
        templates = [t for section in ("questions", "updates") for some in scene.get(section, {}).values() for t in some]
        assert not named or all("{p}" in t for t in templates + scene["first"]), scene
        for hole, questions in scene["questions"].items():
            assert hole in told and questions and not any(hole in values(t) or values(t) - told for t in questions), scene
        for hole, updates in scene.get("updates", {}).items():
            assert hole in told and all(values(t) == {hole} for t in updates), scene


def test_no_wording_of_training_is_part_of_one_that_tests():
    """Catches a template that is another one with a word more: what tests would then hardly be unseen."""
    plain = lambda template: re.sub(r"\W", "", re.sub(r"\{\w+\}", "X", template)).lower()
    for entry in (*DATA["attributes"], *DATA["relations"]):
        sections = {name: lists for name, lists in entry.items() if isinstance(lists, dict)}
        test = {name: [plain(template) for template in lists["test"]] for name, lists in sections.items()}
        for section, lists in sections.items():
            for template in filter(lambda t: len(t) > 9, map(plain, lists["train"])):
                assert not any(template in other for other in test[section]), (entry["name"], section, template)
                assert not any(other in template for others in test.values() for other in others), (entry["name"], section, template)


def test_scenes_share_nothing_between_train_and_test():
    """Catches a wording or a value of the test scenes in training."""
    def plain(side, *sections):
        texts = [t for scene in SCENES[side] for section in sections for some in [scene.get(section, [])]
                 for t in (some if isinstance(some, list) else [t for more in some.values() for t in more])]
        return {"".join(c for c in text.lower() if c.isalnum()) for text in texts}
    assert not plain("train", "first", "then", "questions", "updates") & plain("test", "first", "then", "questions", "updates")
    train, test = ({bare(value).lower() for scenes in World(split, 0, WORDS).scenes.values() for scene in scenes for hole, values in scene.types.items()
                    if isinstance(values[0], str) and hole.rstrip("0123456789") not in DATA["parts"] for value in values} for split in ("train", "test"))
    assert len(train) > 1000 and len(test) > 300 and not train & test


def test_a_scene_is_asked_about_as_it_stands_now(monkeypatch):
    """Catches a question whose answer, or whose words, are those from before a change; and changes that no question is about."""
    monkeypatch.setattr(data_gen, "OPEN_IN_STORY", 0.0)
    world, updates = World("train", 14, WORDS), 0
    for _ in range(300):
        bundle = world.story("update")
        asked = [question for question in bundle.questions if question.kind == "update"]
        updates += len(asked)
        assert asked and all(question.answer in bundle.facts[question.support[0]] and question.support[0] > 0 for question in asked), bundle
    assert updates > 320


def test_open_attributes_have_what_is_needed():
    """Catches nouns of the test split in training, also of the other kind of subject, a noun twice, and sections that aren't there."""
    entries = DATA["open_attributes"]
    nouns = {side: [noun for entry in entries.values() for noun in entry["nouns"][side]] for side in ("train", "test")}
    train, test = ({noun.lower().replace("-", " ") for noun in some} for some in nouns.values())
    assert not train & test and min(len(train), len(test)) > 200
    for entry in entries.values():
        for side in entry["nouns"].values():
            assert len(set(side)) == len(side) > 50 and all(noun == " ".join(noun.split()) and not set('{}".,?') & set(noun) for noun in side)
    sections = {"nouns", "facts", "pronoun", "updates", "also", "questions"}
    assert entries["thing"].keys() == sections and entries["person"].keys() == sections | {"first", "first_questions"}


@pytest.mark.parametrize("split", SPLITS)
def test_open_attributes_are_told_and_asked_by_their_noun(split, monkeypatch):
    """Catches a hole {a} that is left or filled differently in fact and question: the memory could only guess which value is meant."""
    monkeypatch.setattr(data_gen, "OPEN_ATTRIBUTE", 1.0)
    world, drawn, seen = World(split, 6, WORDS), [], Counter()
    draw = world.open_attribute
    world.open_attribute = lambda kind: drawn.append(draw(kind)) or drawn[-1]
    words = lambda text: set("".join(c if c.isalnum() else " " for c in text.lower().replace("'s", " ")).split()) - SMALL
    for _ in range(600):
        drawn.clear()
        bundle = world.bundle()
        nouns = [words(attribute.name) for attribute in drawn]
        for question, facts in answers(bundle):
            if question.kind in ("lookup", "update", "coreference", "two_hop") and question.answer.lower() not in bundle.subjects:   # not "Who is Omar's sister?"
                asked = [noun for noun in nouns if noun <= words(question.question)]
                seen[question.kind] += any(noun <= words(facts[-1]) for noun in asked)
                assert not asked or any(noun <= words(facts[-1]) for noun in asked), (question, facts)
    assert min(seen[kind] for kind in ("lookup", "update", "coreference", "two_hop")) > 20


def test_a_world_has_the_relations_that_its_phrasings_tell():
    """Catches a relation that a test couldn't word, one that is lost, and one that could be asked for as another: a manager is a boss."""
    for phrasings in ("train", "test"):
        relations = {r.name: r for r in World("test", 0, WORDS, phrasings).relations}
        assert relations.keys() == {entry["name"] for entry in DATA["relations"] if entry["facts"][phrasings]} and len(relations) >= 40
    assert "manager" in {r.name: r for r in World("train").relations}["boss"].clashes and "boss" not in relations["aunt"].clashes


def test_a_relation_is_no_open_attribute_of_the_same_name():
    """Catches "Maria's piano teacher is Tom" beside "Maria's piano teacher is 4821": a question about either has two answers."""
    world, picked = World("train", 12, WORDS), []
    one, another = world.relations = [relation for relation in world.relations if "_" in relation.name][:2]
    world.open_attributes["person"].nouns, pick = [one.phrase], world.pick
    world.pick = lambda items: picked.append(pick(items)) or picked[-1]
    asked = 0
    for _ in range(400):
        picked.clear()
        bundle = world.relatives()
        for question in bundle.questions if picked[0] is one else []:
            asked += question.kind == "two_hop"
            assert question.kind != "lookup" or one.phrase not in question.question or question.answer.lower() in bundle.subjects, bundle
    assert asked > 100


def test_scenes_are_asked_by_way_of_a_relative():
    """Catches a question that names the second person after all, one whose relation isn't told, and one on another relative that
    the memory could answer."""
    world, names, seen = World("train", 14, WORDS), {r.phrase: r.name for r in World("train").relations}, Counter()
    told = lambda name, text: re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.I)
    for _ in range(300):
        relation, one = world.pick(world.relations), world.person()
        other = world.person(relation.gender, titles=False)
        if told(other.name, one.name) or told(one.name, other.name):
            continue
        bundle = world.relative_story(relation, one, other, [f"{one.name} … {other.name}"], {other.name})
        for question in bundle.questions:
            by_way = next((phrase for phrase in sorted(names, key=len, reverse=True) if told(f"{one.name}'s {phrase}", question.question)), None)
            if question.kind == "two_hop":
                link, sentence = (bundle.facts[i] for i in question.support)
                assert link == f"{one.name} … {other.name}" and question.answer in sentence and told(other.name, sentence)
                assert by_way == relation.phrase and not told(other.name, question.question)
            elif question.kind == "unanswerable" and by_way:
                assert names[by_way] not in relation.clashes and relation.name in relation.clashes and not question.support
            seen[question.kind, by_way is not None] += 1
    assert seen["two_hop", True] > 300 and seen["unanswerable", True] > 50 and seen["lookup", False] > 300


def test_joining():
    """Catches a pronoun that keeps its capital after ", and", and templates that can't follow it."""
    assert joining(["{Sub} lives in {v}.", "In {v} {sub} lives.", "{Poss} code is {v}.", "Code of {obj}: {v}"]) == \
        ["{sub} lives in {v}.", "{poss} code is {v}."]


def test_wear_leaves_holes_alone():
    """Catches a filler inside a hole or at an end, a word lost that matters, and sentences that are all worn, or none."""
    world, worn = World("train", 13, WORDS), Counter()
    templates = [t for entry in DATA["attributes"] for section in ("facts", "questions") for t in entry[section]["train"]]
    for template in templates:
        before, after = template.split(" "), world.wear(template).split(" ")
        core = lambda words: [word.rstrip(",") for word in words]
        kept = iter(core(after))
        lost = Counter(core(before)) - Counter(core(after))
        assert after[0].rstrip(",") == before[0].rstrip(",") and after[-1] == before[-1], (template, after)
        assert lost.total() <= 1 and set(lost) <= SMALL
        assert all(any(word == other for other in kept) for word in core(before) if not lost[word]), (template, after)
        worn[(len(after) > len(before)) - (len(after) < len(before))] += 1
    share = {change: count / worn.total() for change, count in worn.items()}
    assert 0.05 < share[1] < 0.3 and 0.01 < share[-1] < 0.15


def test_splits_share_no_name_thing_or_word():
    """Catches names, values and open words that leak from training into validation or test."""
    worlds = [World(split, 0, WORDS) for split in SPLITS]
    for i, one in enumerate(worlds):
        for other in worlds[i + 1:]:
            mine, theirs = ({word.lower() for word in world.choices["word"] if isinstance(word, str)} for world in (one, other))    # made ones: see below
            assert mine and not mine & theirs
            for kind in one.things:
                assert one.things[kind] and not set(one.things[kind]) & set(other.things[kind])
            for name in [*DATA["values"], "first", "last"]:
                mine, theirs = ({item for item in world.choices[name] if isinstance(item, str)} for world in (one, other))
                assert mine and theirs and not mine & theirs, name


def test_splits_share_no_drawn_value_or_subject():
    """The same for what comes out: also dates, codes, invented names and names with a letter changed. Months, numerals
    (with or without a unit), numbers of two digits and the years and spans of time that scenes list are too few to divide; scenes have
    their phrasings' split."""
    part = "(" + "|".join(map(re.escape, sorted({part for parts in DATA["parts"].values() for part in parts}))) + r"|\d\d?)"
    closed = re.compile(f"{part}( {part})?", re.I)
    span = re.compile(r"\w+( and a half)? (second|minute|hour|day|week|month|year)s?( and a half)?", re.I)
    years = {option.lower() for scene in SCENES["train"] for options in scene.get("options", {}).values() for option in options
             if option.isdigit() or span.fullmatch(option)}
    drawn = []
    for split in SPLITS:
        world = World(split, 11, WORDS)
        drawn.append([world.bundle() for _ in range(1500)])
    for pick in (lambda b: {q.answer.lower() for q in b.questions if q.answer and q.kind != "list"},
                 lambda b: {subject for subject in b.subjects if subject != "I" and not subject.startswith("scene ")}):
        values = [{v for v in set().union(*map(pick, some)) if not closed.fullmatch(v)} - years for some in drawn]
        assert min(map(len, values)) > 500
        assert not values[0] & values[1] and not values[0] & values[2] and not values[1] & values[2]


def test_open_word_is_no_listed_word_of_another_split():
    """Catches an open vocabulary that trains on "Coimbra", a city of the test split."""
    city = next(city for city in DATA["values"]["city"]["test"] if city.isalpha() and split_of(city) == "train")
    assert city not in World("train", 0, [*WORDS, city]).choices["word"]


def test_open_vocabulary():
    """Catches pieces that are no plain word: inside a word, too short or long, with digits, or of another script."""
    pieces = ["<pad>", "▁house", "house", "▁ab", "▁abc1", "▁Zoë", "▁мир", "▁a" + 12 * "b", "▁apple", "▁×××", "▁▁two", "▁apple"]
    tokenizer = SimpleNamespace(vocab_size=len(pieces), pieces=SimpleNamespace(id_to_piece=pieces.__getitem__))
    assert open_vocabulary(tokenizer) == ["Zoë", "apple", "house"]


def test_trained_marks_training_only():
    """Catches a held-out World that counts its questions as trained."""
    trained = [World(*arguments).bundle().questions[0].trained for arguments in
               [("train", 0), ("validation", 0), ("test", 0), ("train", 0, (), "test")]]
    assert trained == [True, False, False, False]


def test_bad_arguments_of_the_world():
    """Catches input that fails late or silently: a split, phrasing or kind that doesn't exist, a memory without room."""
    world = World()
    for wrong in (lambda: World("dev"), lambda: World(phrasings="validation"), lambda: world.bundle("three_hop"),
                  lambda: world.memory(0, 1), lambda: world.memory(5, 0), lambda: world.example(1, "two_hop")):
        with pytest.raises(InputError):
            wrong()


def test_command_line_writes_jsonl(tmp_path, capsys):
    """Catches a file that isn't JSONL, sizes outside the range, and a seed that doesn't decide."""
    for name in ("a", "b"):
        main(["--n", "30", "--out", str(tmp_path / name), "--seed", "7", "--facts", "3:6", "--split", "test"])
    capsys.readouterr()
    text = (tmp_path / "a").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert text == (tmp_path / "b").read_text(encoding="utf-8") and len(lines) == 30 and len(list(tmp_path.iterdir())) == 2
    assert {len(line["facts"]) for line in lines} == {3, 4, 5, 6}
    assert all(list(line) == ["facts", "question", "answer", "support", "kind", "split"] and line["split"] == "test" for line in lines)


@pytest.mark.parametrize("wrong", [["--n", "0"], ["--n", "many"], ["--facts", "9:3"], ["--facts", "0:3"], ["--facts", "x"],
                                   ["--facts", "1:3", "--kind", "list"], ["--kind", "all"], ["--split", "dev"], ["--seed", "x"],
                                   ["--tokenizer", "nowhere"], ["--out", "nowhere/data.jsonl"], ["--out", "."], ["--colour", "red"]])
def test_command_line_refuses(wrong, tmp_path, capsys, monkeypatch):
    """Catches a traceback, a usage text instead of one sentence, exit code 0 or 1, and a file left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--n", "5", "--out", "data.jsonl", *wrong])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("held, good", [("Maria lives in Lisbon.\n", False), ("[1]\n", False), ('{"facts": 1}\n', False), ("\0", False), ("", True),
                                        ('{"facts": [], "question": "", "answer": ""}\n', True)])
def test_another_file_is_not_written_over(held, good, tmp_path, capsys):
    """Catches somebody's facts that are gone because they were named in --out."""
    file = tmp_path / "facts.txt"
    file.write_text(held)
    if good:
        main(["--n", "2", "--out", str(file)])
        assert file.read_text().count("\n") == 2
    else:
        with pytest.raises(SystemExit):
            main(["--n", "2", "--out", str(file)])
        assert file.read_text() == held and "expected a new file" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device here")
def test_a_device_is_no_file_for_examples(capsys):
    """Catches a device that is read without end, or replaced."""
    with pytest.raises(SystemExit):
        main(["--n", "2", "--out", "/dev/zero"])
    assert "expected a new file" in capsys.readouterr().err and not os.path.isfile("/dev/zero")


def test_help_runs():
    """Catches a command line that can't even explain itself; run as a learner would, with another hash seed."""
    done = subprocess.run([sys.executable, str(data_gen.HERE / "data_gen.py"), "--help"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "1"})
    assert done.returncode == 0 and "example: python data_gen.py" in done.stdout
