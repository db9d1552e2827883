"""Checks a folder of submissions:  python -m exercises grade FOLDER --xml results.xml --open

FOLDER holds a folder for each learner, with the files of their work folder; a file that is missing was not handed in.
"""

import os
import xml.etree.ElementTree as tree
from pathlib import Path

from exercises.checking import exercises, run_all
from generate import fail


def plain(text):
    """Text that XML can hold: control characters are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def grade(folder, xml, open_ended=False, part=1.0):
    """Print a line for each learner and write JUnit XML, one suite a learner. Returns 0: failing is for the learners.

    open_ended: give scores too, which takes minutes for each file that isn't as it was handed out; part: of these checks.
    """
    if folder is None or not Path(folder).is_dir():
        fail(f"expected a folder of submissions, got {folder or 'none'}; give one that holds a folder for each learner.")
    learners = sorted(p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    if not learners:
        fail(f"expected a folder for each learner in {folder}, but there is none.")
    chosen = [exercise for exercise in exercises() if open_ended or not exercise.open]
    handed_in = [(learner, exercise) for learner in learners for exercise in chosen if (learner / exercise.name).is_file()]
    results = dict(zip(handed_in, run_all([(exercise, learner / exercise.name) for learner, exercise in handed_in], part)))
    suites = tree.Element("testsuites", name="exercises")
    for learner in learners:
        suite = tree.SubElement(suites, "testsuite", name=plain(learner.name))
        mine = [(exercise, results.get((learner, exercise))) for exercise in chosen]
        for exercise, result in mine:
            case = tree.SubElement(suite, "testcase", classname=plain(learner.name), name=f"{exercise.number} {exercise.title}")
            if result is None:
                tree.SubElement(case, "skipped", message="not handed in")
            elif result["failed"]:
                tree.SubElement(case, "failure", message=plain(result["failed"]))
            elif exercise.open:
                tree.SubElement(tree.SubElement(case, "properties"), "property", name="score", value=f"{result['score']:.1f}")
        found = [result for _, result in mine if result is not None]
        failures = sum(bool(result["failed"]) for result in found)
        scores = [f"{exercise.number}: {result['score']:.0f}/100" for exercise, result in mine if exercise.open and result and not result["failed"]]
        suite.attrib.update(tests=str(len(mine)), failures=str(failures), skipped=str(len(mine) - len(found)))
        print(f"{plain(learner.name):<24}  {len(found) - failures:>2} of {len(mine)} solved, {len(found)} handed in"
              + "".join(f", {score}" for score in scores))
    if xml:
        try:
            tree.indent(suites)
            temporary = xml.with_name(f".{xml.name}.{os.getpid()}.tmp")
            tree.ElementTree(suites).write(temporary, encoding="utf-8", xml_declaration=True)
            os.replace(temporary, xml)
        except OSError as error:
            fail(f"expected to write {xml}, but can't ({error.strerror}); give another --xml.")
    return 0
