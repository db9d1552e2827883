"""A new kind of question

difficulty: open · importance: medium · minutes: 90 · needs: 14 · check: 8 min

The shipped memory was trained on the six kinds of question of data_gen.py. Think of one that it can't answer, write sentences
and questions of that kind, and let it learn them. `new_kind` makes one example: a few facts that belong together, a question,
its answer, and which facts are needed to know it. A memory can only say what stands in its facts: the answer is, to the
letter, part of the last of the facts that are needed. The check
 1. looks at a few hundred examples: are they well-formed, and do they differ?
 2. asks the shipped memory: less than half of your questions answered right, or the kind isn't new to it
 3. lets that memory learn for four minutes: half of what it sees is of your kind, half of the old ones
 4. asks about people and values that it never saw, 16 facts to a memory, all of your kind. The score is the share, in %, that
    is answered right to the letter, less what it has lost on the old kinds, in points

A check with --short takes a tenth of the time, for a look. Ideas: what it was before it changed; which of two;
what somebody said about somebody else; who has it, rather than what somebody has (does it know that already?).
"""


def old_kind(draw):
    """The specification, by way of a kind that is old: one fact, and the question what somebody's something is."""
    name, thing, value = draw.person(), draw.thing(), draw.value()
    fact = draw.pick([f"{name}'s {thing} is {value}.", f"The {thing} of {name} is {value}."])
    return [fact], f"What is {name}'s {thing}?", value, [0]


def new_kind(draw):
    """An example of your kind -> (facts, question, answer, needed).

    draw: .person(), a name; .thing(), a noun such as "locker code"; .value(), words, a name, a number or a code; .pick(list), one
    of a list. No other randomness: the same draws are to give the same example. No two of one example's draws are equal.
    facts: list of 1 to 4 str; question, answer: str; needed: list of one or two places in facts, the last one's fact holds the
    answer.
    """
    # solution:
    name, thing, before, now = draw.person(), draw.thing(), draw.value(), draw.value()
    told = draw.pick([f"{name}'s {thing} is {before}.", f"The {thing} of {name} is {before}."])
    changed = draw.pick([f"{name}'s {thing} is {now} now.", f"{name} has changed the {thing} to {now}.", f"By now {name}'s {thing} is {now}."])
    asked = draw.pick([f"What was {name}'s {thing} before?", f"What was {name}'s first {thing}?", f"What did {name}'s {thing} use to be?"])
    return [told, changed], asked, before, [0]
    # end of solution


# ---- below: not in the learner's file

HINTS = ["The shipped memory was trained to let the later of two facts win. A question may ask for the earlier one.",
         "Tell the same thing of a person twice, with two values. Several phrasings of facts and questions, not one, teach more.",
         "[f\"{name}'s {thing} is {before}.\", f\"{name} has changed the {thing} to {now}.\"], f\"What was {name}'s {thing} before?\", before, [0]"]
NOUNS = ("locker code", "tax advisor", "favourite song", "seat", "badge", "password", "dentist", "project", "team", "street", "hotel", "dish",
         "tram line", "choir", "landlord", "first car", "PIN", "cottage", "tutor", "ringtone")


class Draw:
    """What new_kind draws from: one split's people and values, no two alike in one example."""

    def __init__(self, world):
        self.world, self.taken = world, set()

    def another(self, draw):
        while (text := draw()) in self.taken:
            pass
        self.taken.add(text)
        return text

    def person(self):
        return self.another(lambda: self.world.person(titles=False).name)

    def thing(self):
        return self.another(lambda: self.world.pick(NOUNS))

    def value(self):
        return self.another(lambda: self.world.make(self.world.pick(self.world.open)))

    def pick(self, choices):
        return self.world.pick(list(choices))


def problem(example):
    """What is wrong with an example: a sentence, or None."""
    import re
    if not isinstance(example, (tuple, list)) or len(example) != 4:
        return f"expected (facts, question, answer, needed), got {example!r:.80}"
    facts, question, answer, needed = example
    if not isinstance(facts, list) or not 1 <= len(facts) <= 4 or not all(isinstance(fact, str) and fact.strip() for fact in facts):
        return f"expected facts to be a list of 1 to 4 texts, got {facts!r:.80}"
    if not all(isinstance(text, str) and text.strip() and "\n" not in text for text in (question, answer)):
        return f"expected question and answer to be texts of one line, got {question!r:.60} and {answer!r:.60}"
    if not isinstance(needed, list) or not 1 <= len(needed) <= 2 or not all(isinstance(i, int) and 0 <= i < len(facts) for i in needed):
        return f"expected needed to be a list of one or two places in the {len(facts)} facts, got {needed!r:.40}"
    if answer not in facts[needed[-1]]:
        return f"the answer {answer!r:.60} does not stand in the last fact that is needed, {facts[needed[-1]]!r:.80}: a memory can only say what it was told"
    if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", question.partition(" ")[2], re.IGNORECASE):       # values may be any word, even "What"
        return f"the question {question!r:.80} holds its answer, {answer!r:.40}"


def check(t):
    from collections import Counter

    import torch
    from torch.nn.functional import cross_entropy

    from data_gen import World, open_vocabulary
    from exercises.checking import HERE, Failed
    from exercises.training import TOKENS, Lessons, Pool, exam, part_of, shipped
    from gemma import Tokenizer
    from extras.pool import draw_part
    from train import copying_loss, retrieval_loss
    tokenizer = Tokenizer(HERE.parent / "tiny")
    words = open_vocabulary(tokenizer)

    def drawn(split, seed, n):
        world = World(split, seed, words)
        return [t.ask("new_kind", lambda m: m.new_kind(Draw(world)), []) for _ in range(n)]

    with t.within(15):
        some, again = drawn("train", 1, 200), drawn("train", 1, 200)
    for example in some:
        if wrong := problem(example):
            raise Failed(f"new_kind: {wrong}")
    if some != again:
        raise Failed("new_kind: the same draws gave two different examples; let draw be the only thing that is random")
    answer, times = Counter(answer for _, _, answer, _ in some).most_common(1)[0]
    if times > 10:
        raise Failed(f"new_kind: {times} of 200 examples have the answer {answer!r:.40}: that can be learnt without a memory; draw answers")
    if len({(*facts, question) for facts, question, *_ in some}) < 190:
        raise Failed("new_kind: many of 200 examples are the same; draw people and values for each")
    t.passed.append("200 examples are well-formed, and they differ")

    def parts(split, seed, n):
        """n examples as a part of a pool. What a question names is what tells examples apart: two alike never share a memory."""
        with t.within(15 + n // 20):
            examples = drawn(split, seed, n)
        part = part_of(tokenizer, [(facts, [(question, answer, needed)], [question]) for facts, question, answer, needed in examples])
        if len(part) < n // 2:
            raise Failed(f"new_kind: {n - len(part)} of {n} examples are too long: at most {TOKENS} tokens for question and answer")
        return part

    model = shipped()
    with t.bar("asking the shipped memory", 2) as bar:
        n = max(48, int(300 * t.part))
        held_out = Pool(model, "test", n, TOKENS, 0, draw=lambda *_: [parts("test", 3, n)], progress=False)
        bar.update()
        old = Pool(model, "test", n, TOKENS, 3, phrasings="train", progress=False)
        questions = max(64, int(768 * t.part))
        (before, _), (old_before, _) = exam(model, held_out, questions, 1), exam(model, old, questions, 1)
        bar.update()
    if before >= 50:
        raise Failed(f"new_kind: no new kind: the shipped memory answers {before:.0f}% of its questions already; less than 50% is asked for")
    t.passed.append(f"the kind is new: the shipped memory answers {before:.1f}% of its questions, {old_before:.1f}% of the old kinds")

    with t.bar("drawing sentences", 1):
        n = max(48, int(2000 * t.part))
        mixed = lambda task, tasks: [part for one in tasks for part in (draw_part(one),)] + [parts("train", 2, n)]
        pool = Pool(model, "train", n, TOKENS, 2, texts=max(8, n // 8), draw=mixed, progress=False)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    with t.bar("training", 100) as bar:
        lessons = Lessons(model, pool, 240 * t.part, bar)
        for done in lessons:
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * min(1.0, done / 0.05 + 0.1) * (1.02 - done)
            batch = lessons.draw(questions=64, facts=16)
            out = lessons.forward(batch)
            hops = model.config.hops
            loss = cross_entropy(out["logits"], out["targets"]) + 0.5 * copying_loss(batch, out, hops) + 0.3 * sum(retrieval_loss(batch, out, hops))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
            optimizer.step()
    with t.bar("asking again", 1):
        (after, first), (old_after, _) = exam(model, held_out, questions, 1), exam(model, old, questions, 1)
    t.passed.append(f"after {lessons.learnt:,} questions: {after:.1f}% answered right, the right fact first for {first:.1f}%")
    t.passed.append(f"the old kinds: {old_after:.1f}%, {old_before:.1f}% before")
    t.score = max(0.0, after - max(0.0, old_before - old_after))
