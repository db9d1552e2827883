"""README.md and docs/: every name they mention is still there, links lead somewhere, figures were measured, quoted code is the code."""

import re
from pathlib import Path

import pytest

from bench.readme import FIGURES, ROOT, code, filled, find
from gemma import InputError
from test_commands import PAGES, PROGRAMS

FILES = ("gemma.py", "gnn.py", "memory.py", "data_gen.py", "train.py", "generate.py")


def prose(page):
    """A page's text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def known(name):
    """Whether any of the six files, or what the third and the fifth are built on, defines a name such as Gemma.run_layers."""
    for file in (*FILES, "extras/memory_model.py", "extras/pool.py"):
        try:
            return bool(find(file, name))
        except InputError:
            pass
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_they_name(page):
    """Catches a function that was renamed or moved to another file, and a file, a picture or a section that is gone."""
    links = re.findall(r"!?\[([^\]]*)\]\(([^)]+)\)", prose(page))
    for text, target in links:
        if "://" in target:
            continue
        name, _, section = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT) and file.is_file(), target
        if section:
            assert section in anchors(file), target
        if name.endswith(".py"):
            find(file.relative_to(ROOT), text.strip("`"))
    assert links


def anchors(page):
    """What the headings of a page are called in a link."""
    return [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)", prose(page), re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_between_backticks_is_there(page):
    """Catches an option, a file, a setting or a function that a page goes on talking about when it is gone."""
    source = "\n".join(path.read_text(encoding="utf-8") for part in ("*.py", "extras/*.py", "variants/*.py", "bench/*.py", "exercises/*.py", "tiny/*.py")
                       for path in sorted(ROOT.glob(part)))
    source += (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"<!-- figures.*?<!-- end -->", "", prose(page), flags=re.S)):
        if PROGRAMS.match(span):                                           # a command: test_commands.py runs it
            continue
        words = re.findall(r"(?<!\S)--?\w[\w-]*|[\w./-]*\w", span)
        for word in words:
            option = re.search(rf"^    {word[2:].replace('-', '_')}: \w+ = ", source, re.M) if word.startswith("--") else None     # a field of TrainConfig or MemoryConfig
            there = option or known(word) or (ROOT / word).exists() or re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", source) or Path(word).name in source
            assert there or re.fullmatch(r"[\d.,e-]+", word), f"{page.name} mentions {span!r}, but nothing is called {word!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_and_code_are_what_they_say(page):
    """Catches a figure typed by hand, a result that was measured again and code that was changed, each without python -m bench.readme."""
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text
    emptied, blocks = re.subn(r"(<!-- (?:code|figures): .*? -->).*?(<!-- end -->)", r"\1\2", text, flags=re.S)
    assert blocks >= 1 and len(emptied) < len(text) and filled(emptied) == text


def test_every_figure_is_on_a_page():
    """Catches a kind of figures that no page shows any more, and one that is asked for under another name."""
    shown = [block for page in PAGES for block in re.findall(r"<!-- figures: (.*?) -->", page.read_text(encoding="utf-8"))]
    assert len(shown) == len(set(shown)) and {block.split()[0] for block in shown} == set(FIGURES)
    with pytest.raises(InputError, match="survivel"):
        filled("<!-- figures: survivel -->\n<!-- end -->")


def test_finding_names(tmp_path):
    """Catches a search that finds whatever it is asked for, or the wrong one of two methods with one name."""
    assert find("memory.py", "Reading.asked").lineno < find("memory.py", "MemoryInjectionLayer.read").lineno
    assert find("gemma.py", "MLP.forward").lineno != find("gemma.py", "RMSNorm.forward").lineno
    assert find("memory.py", "MemoryInjectionLayer.reading") and find("generate.py", "Parser.error") and find("bench/ladder.py", "RUNGS")
    (tmp_path / "some.py").write_text("class A:\n    def f(self):\n        self.x = y = 1\n\nclass B(A):\n    z: int = 2\n")
    assert find(tmp_path / "some.py", "B.f").lineno == 2 and find(tmp_path / "some.py", "B.x") and find(tmp_path / "some.py", "B.z")
    for file, name in ((tmp_path / "some.py", "B.y"), (tmp_path / "some.py", "A.z"), ("memory.py", "Reading.nothing"), ("gnn.py", "Gemma"), ("memory.py", "nothing"), ("memory.py", "Reading.asked.more")):
        with pytest.raises(InputError):
            find(file, name)
    assert code("gnn.py", "softmax_by_target").startswith("```python\ndef softmax_by_target(") and code("gemma.py", "Injection.begin").splitlines()[1].startswith("def")


def test_reading_names_all_six_files():
    """Catches a file that the guided reading forgets."""
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \d\. (\w+\.py)", text, re.M) == list(FILES)
