"""The failure lab: what went wrong in training?

difficulty: open · importance: high · minutes: 60 · needs: 12, 14 · check: 2 min

In exercises/runs are five training runs, 1 to 5, with the same settings and the same loop. One went well. In four
something was wrong: in its data, or in a part that never learnt. Find out what, and write down how you know: `diagnose` gets a
run and names the cause. The check tries it on these five first, and where it is wrong says what speaks against it. Then it
trains five new runs, which nobody has seen, for the score: 0 for guessing, 100 if it is right about all of them.

 nothing             it finds the right fact among 16, and says most values of it to the letter
 closed vocabulary   the values in its training data came from a short list
 one pooled vector   inside a fact it doesn't look for a token: it reads the mean of them all
 no negatives        each memory it learnt from held one fact, the right one
 dead gate           what it reads is never added to the hidden states

A run has, as files and for `diagnose` (exercises/lab.py, class Run, says more):
 - memory.json and memory.safetensors; run.model is the model with this memory. To talk to it:
   python generate.py --model exercises/runs/1 --memory facts.txt "What is Maria's locker code?"
 - log.jsonl; run.log: the losses, one batch every 20 steps. A loss that is low says little about what was learnt
 - sample.jsonl; run.sample: some of the sentences it learnt from
 - run.ask("new", 16) asks it about people and values that no run has seen, 16 facts to a memory; run.ask("sample", 1) about its
   own sentences, one fact to a memory. Both say which share of answers was right, and more

Begin with `measured(run)` in `diagnose` and look at what the check shows, or look for yourself, in Python:
   from exercises.lab import runs
   for run in runs("exercises/runs"): print(run.ask("new", 16))
"""

CAUSES = ("nothing", "closed vocabulary", "one pooled vector", "no negatives", "dead gate")


def measured(run):
    """The specification of what `diagnose` may go by: prints it. There is more to be had: run.model, run.sample, all of run.log."""
    for what in ("sample", "new"):
        for facts in (1, 16):
            print(f"{what}, {facts} facts:", *(f"{name} {share:.0%}" for name, share in run.ask(what, facts).items()))
    print(run.log[-1])


def diagnose(run):
    """run: see above -> one of CAUSES."""
    # solution:
    if not run.model.injection.value_map.any():
        return "dead gate"
    seen, new = run.ask("sample", 1), run.ask("new", 1)
    if seen["tokens"] < 0.3:
        return "one pooled vector"
    if seen["recall"] - new["recall"] > 0.4:
        return "closed vocabulary"
    if run.ask("new", 16)["first"] < 0.75:
        return "no negatives"
    return "nothing"
    # end of solution


# ---- below: not in the learner's file

HINTS = ["Ask each run about its own sentences and about new ones, with one fact and with 16: `measured(run)` prints it all. Which pairs of "
         "these numbers are far apart, in which run?",
         "A run that knows its sample and nothing new; one that is lost as soon as there are two facts; one whose attention inside a fact is "
         "spread evenly. And one of which a weight gives everything away: look at run.model.injection.value_map.",
         "dead gate: value_map is zero. one pooled vector: run.ask('sample', 1)['tokens'] below 0.3. no negatives: first below 75% among 16. "
         "closed vocabulary: with one fact, recall of the sample far above that of what is new. Else nothing."]


def evidence(run, cause):
    """What speaks against this cause, of a run that something else, or nothing, is wrong with: a sentence."""
    new, one, seen = run.ask("new", 16), run.ask("new", 1), run.ask("sample", 1)
    return {
        "nothing": f"it answers {new['recall']:.0%} of what is asked about new facts, 16 to a memory; a run that went well answers most",
        "closed vocabulary": f"such a run answers what it has seen and hardly anything new; this one, asked about a single fact, answers "
                             f"{seen['recall']:.0%} of its sample and {one['recall']:.0%} of what is new",
        "one pooled vector": f"such a run spreads its attention evenly inside a fact; this one has {seen['tokens']:.0%} of it on the tokens that the answer goes on with",
        "no negatives": f"such a run can't choose among facts; this one finds the right one first among 16 in {new['first']:.0%} of cases",
        "dead gate": f"such a run adds nothing to the hidden states; this one's value map has weights up to {run.model.injection.value_map.abs().max():.2f}",
    }[cause]


def check(t):
    import os
    import tempfile
    from exercises import lab
    from exercises.checking import HERE, Failed

    def found(run):
        for what, facts in (("sample", 1), ("sample", 16), ("new", 1), ("new", 16)):
            run.ask(what, facts)                                           # kept by the run: the limit is for the learner's own work
        with t.within(15):
            said = t.ask("diagnose", lambda m: m.diagnose(run), [])
        if not isinstance(said, str) or said not in CAUSES:
            raise Failed(f"diagnose: expected one of {', '.join(CAUSES)}, got {said!r:.60}")
        return said, said == t.right.diagnose(run)

    with t.bar("looking at runs", 5) as bar:
        for number, run in enumerate(lab.runs(HERE / "runs"), 1):
            said, right = found(run)
            if not right:
                raise Failed(f"run {number}: {said!r} is not it: {evidence(run, said)}")
            t.passed.append(f"run {number}: {said}")
            bar.update()
    n, seed = max(1, round(len(CAUSES) * t.part)), int.from_bytes(os.urandom(4), "little")
    with tempfile.TemporaryDirectory() as folder:
        with t.bar("training new runs", n * lab.STEPS) as bar:
            lab.make(seed, folder, bar, n)
        share = sum(found(run)[1] for run in lab.runs(folder)) / n
    t.passed.append(f"of {n} new runs (seed {seed}), {share * n:.0f} found")
    t.score = 100 * max(0.0, share - 0.2) / 0.8                            # one in five is guessing
