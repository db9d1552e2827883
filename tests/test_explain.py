"""The page that shows the memory: what it is made of, on a toy model, and how it behaves in a real browser."""

import json
import re
import sys

import pytest
import torch

import generate
from browser import browser  # noqa: F401 (a fixture)
from extras import explain
from extras.memory_model import DONT_KNOW
from gemma import InputError
from memory import GemmaWithMemory
from toy import FACTS, one_thread, toy_model  # noqa: F401 (one_thread is a fixture)

QUESTION = "What belongs to Ana?"
HOSTILE = ["</script><script>document.title = 'taken over'</script>", "<img src=x onerror=\"document.title = 'taken over'\"> &lt;b&gt;",
           "{{data}} \u2028 \u202e backwards {{title}}", "Zoë drinks 東京 tea 🫖."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def load(folder):
    """load(*facts): a toy model that remembers them."""
    def load(*facts, folder=folder):
        model = GemmaWithMemory.from_pretrained(folder)
        model.config.null_threshold = 1.0                                  # it answers whatever it finds
        if facts:
            model.add_to_memory(list(facts))
        return model
    return load


def explained(model, question=QUESTION, **options):
    model.answer(question, **{"max_new_tokens": 8, **options})
    return explain.trace(model, question)


# ------------------------------------------------------------------------------------------------------------ what is in it

def test_it_shows_what_was_read_while_answering(load):
    """Catches a trace of other positions, hops or heads than those that generated the answer, of other tokens, or of another question's choice."""
    model = load(*FACTS)
    found = explained(model)
    ids, mask = model.batch([QUESTION])
    shown = list(found["steps"])
    assert len(shown) > 4 and [step["token"] for step in shown] == model.answered[0]
    attend, passes = model.injection.attend, []
    model.injection.attend = lambda *given: passes.append(attend(*given)) or passes[-1]
    generated = [token.item() for token in model.stream(ids, max_new_tokens=8, stop=model.stop)]
    del model.injection.attend
    reading, hops = model.injection.reading, model.config.hops
    for at, (step, token) in enumerate(zip(shown, generated, strict=True)):
        assert step["token"] == token
        of = lambda hop: passes[hop + at * (hop == hops - 1)]              # only the last hop reads at every position
        for hop in range(hops):
            torch.testing.assert_close(torch.tensor(step["weights"][hop]), of(hop)[0][0, -1].exp(), atol=1e-3, rtol=0)
            assert found["hops"][hop]["chosen"] == reading.chosen[hop][0].tolist()
        for head in range(model.config.heads):
            for c, inside in enumerate(step["inside"][head]):
                real, read = reading.token_ids[0, c] >= 0, of(hops - 1)[1][0, -1, head, c]
                assert sum(inside) == pytest.approx(1, abs=1e-2) and max(inside[:-1]) == pytest.approx(max(read[:int(real.sum())].tolist()), abs=1e-3)
                assert inside[-1] == pytest.approx(read[-1].item(), abs=1e-3)          # the end
    assert found["null"] == pytest.approx(model.recall(QUESTION)[1], abs=1e-3)
    for hop, of in enumerate(found["hops"]):                               # the three stages: by key, word by word, read
        for c, row in enumerate(of["candidates"]):
            assert [asked[row] for asked in of["asked"]] == [pytest.approx(x, abs=1e-3) for x in reading_at(model, hop)[0][:, row].tolist()]
            assert [ranked[c] for ranked in of["ranked"]] == [pytest.approx(x, abs=1e-3) for x in reading_at(model, hop)[1][:, c].tolist()]


def reading_at(model, hop):
    """Of the last question: (asked, ranked) of a hop."""
    reading = model.injection.reading
    return reading.asked[hop][0].exp(), reading.ranked[hop][0].exp()


def test_probabilities_with_and_without_memory(load):
    """Catches probabilities of the position before or after, the same ones twice, and an order of another column."""
    model = load(*FACTS)
    found = explained(model)
    said = model.answered[0]
    ids = torch.tensor([model.prompt(QUESTION) + said])
    mask = torch.arange(ids.shape[1]) < ids.shape[1] - len(said)
    both = model(ids, question_mask=mask[None])[0].softmax(-1), model.gemma(ids)[0].softmax(-1)
    for k, step in enumerate(found["steps"]):
        at = ids.shape[1] - len(said) - 1 + k
        assert step["p"] == [pytest.approx(p[at, said[k]].item(), abs=1e-3) for p in both]
        assert [p for _, p, _ in step["next"]] == sorted((p for _, p, _ in step["next"]), reverse=True)
        for column, p in zip((1, 2), both):
            assert max(row[column] for row in step["next"]) == pytest.approx(p[at].max().item(), abs=1e-3)
    assert any(abs(step["p"][0] - step["p"][1]) > 0.01 for step in found["steps"])


def test_similarity_edges(load):
    """Catches edges from earlier to later facts, of another hop, or whose probabilities aren't those that the memory used."""
    model, used = load(*FACTS), []
    model.injection.similarity.register_forward_hook(lambda module, inputs, output: used.append(output[0].exp()))
    found = explained(model)
    assert any(of["replaced"] for of in found["hops"])
    for of, still in zip(found["hops"], used):                             # the answer's prefill came first
        for c, fact in enumerate(of["candidates"]):
            silenced = torch.tensor([1 - p for later, earlier, p in of["replaced"] if earlier == fact])
            assert silenced.prod().item() == pytest.approx(still[c].item(), abs=0.05 * len(FACTS))
        assert all(found["facts"][later]["id"] > found["facts"][earlier]["id"] for later, earlier, _ in of["replaced"])


@pytest.mark.parametrize("options", [dict(hops=1), dict(read="episode"), dict(match=False), dict(similar_edges=False), dict(query="pooled")])
def test_other_designs(load, tmp_path, options):
    """Catches a page that only the default design has."""
    found = explained(load(*FACTS, folder=toy_model(tmp_path, **options)))
    assert len(found["hops"]) == options.get("hops", 2) and found["steps"] and json.dumps(found)


def test_another_memory_is_refused(load):
    """Catches a traceback for a memory that reads in another way."""
    model = load()
    model.injection = torch.nn.Identity()
    with pytest.raises(InputError, match="graph memory"):
        explain.trace(model, QUESTION)


def test_refused_sampled_and_empty(load):
    """Catches an answer that is made up where there was none, and one that was drawn anew for the page."""
    nothing = explained(load())
    assert nothing["refused"] and not nothing["steps"] and not nothing["facts"]
    model = load(*FACTS)
    model.config.null_threshold = 0.0
    refused = explained(model)
    assert refused["refused"] and len(refused["steps"]) == 1 and refused["null"] > 0
    model.config.null_threshold = 1.0
    sampled = explained(model, temperature=2.0, seed=3)
    assert [step["token"] for step in sampled["steps"]] == model.answered[0] != [step["token"] for step in explained(model)["steps"]]


def test_pieces_are_the_text(load):
    """Catches characters of several tokens that are torn or lost, and weights that are counted for another piece."""
    model = load()
    for text in [*HOSTILE, "  two  spaces", "\ufffd", "a\ufffd東"]:
        ids = model.token_ids(text)[1:]
        texts, owner = explain.pieces(model.tokenizer, ids)
        assert "".join(texts) == text and len(owner) == len(ids) and owner == sorted(owner) and set(owner) == set(range(len(texts)))
    found = explained(load("Zoë drinks 東京 tea."))
    assert "".join(found["pieces"][0]) == "Zoë drinks 東京 tea." and "東" in "".join(found["pieces"][0])


def test_large_memories_are_shown_in_part(load, monkeypatch):
    """Catches facts that are numbered by where they stand on the page, and a page that grows without end."""
    texts = [f"Person {i} lives in town {i * 7}." for i in range(60)]
    model = load(*texts)
    whole = explained(model)
    monkeypatch.setattr(explain, "MOST", 20)
    monkeypatch.setattr(explain, "AROUND", 1)
    part = explained(model)
    assert len(whole["facts"]) == part["total"] == 60 and len(part["facts"]) < 20
    named = lambda found, facts: [(found["facts"][i]["id"], found["facts"][i]["text"]) for i in facts]
    for a, b in zip(whole["hops"], part["hops"]):
        assert named(whole, a["chosen"]) == named(part, b["chosen"]) and named(whole, a["candidates"]) == named(part, b["candidates"])
        assert all(len(row) == len(part["facts"]) + 1 for row in b["asked"])
    assert [f["row"] for f in part["facts"]] == [f["id"] for f in part["facts"]]


def test_users_text_is_never_markup(load):
    """Catches a fact, a question or an answer that ends the script it stands in, or fills a place of the template."""
    for hostile in HOSTILE[:3]:
        page = explain.page(explained(load(*HOSTILE, *FACTS), hostile))
        assert len(re.findall("<script", page)) == 2 and len(re.findall("</script", page)) == 2 and "<img" not in page and "{{policy" not in page
        data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
        assert [fact["text"] for fact in data["facts"]] == HOSTILE + FACTS and data["question"] == " ".join(hostile.split())


# ------------------------------------------------------------------------------------------------------------ the command line

@pytest.fixture
def run(capsys, folder, tmp_path):
    facts = tmp_path / "facts.txt"
    facts.write_text("\n".join(FACTS) + "\n", encoding="utf-8")

    def run(*arguments):
        capsys.readouterr()
        try:
            code = generate.main(["--model", str(folder), "--memory", str(facts), "--max-tokens", "4", *map(str, arguments)]) or 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return run


def test_the_option(run, tmp_path, monkeypatch):
    """Catches another answer with the page than without it, a page of the first question of several, and half a file."""
    page = tmp_path / "page.html"
    plain = run(QUESTION)
    assert run("--explain", page, QUESTION) == plain and plain[0] == 0
    assert f"<title>{QUESTION}</title>" in page.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", __import__("io").TextIOWrapper(__import__("io").BytesIO(b"Where is Ana?\n/facts\nWhere is Tom?\n")))
    assert run("--explain", page)[0] == 0 and "<title>Where is Tom?</title>" in page.read_text(encoding="utf-8")
    code, _, err = run("--why", "--explain", page, QUESTION)
    assert code == 0 and "none of them" in err
    assert [p.name for p in tmp_path.iterdir()] == ["facts.txt", "page.html"]


@pytest.mark.parametrize("name", ["facts.txt", "page", "nowhere/page.html", "."])
def test_bad_names(run, tmp_path, name):
    """Catches a facts file that is replaced by the page, a traceback, and a minute of work before it is refused."""
    before = (tmp_path / "facts.txt").read_bytes()
    code, out, err = run("--explain", f"{tmp_path}/{name}", QUESTION)
    assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err) and (tmp_path / "facts.txt").read_bytes() == before


def test_a_page_that_cannot_be_written(load, tmp_path):
    """Catches a traceback where a folder has the page's name."""
    model = load(*FACTS)
    explained(model)
    (tmp_path / "page.html").mkdir()
    with pytest.raises(InputError):
        explain.write_page(model, QUESTION, tmp_path / "page.html")


# ------------------------------------------------------------------------------------------------------------ in a browser

@pytest.fixture(scope="module")
def small(load, tmp_path_factory):
    """(the page of some facts, hostile ones among them, what is in it)"""
    model, path = load(*FACTS, *HOSTILE), tmp_path_factory.mktemp("page") / "page.html"
    found = explained(model)
    path.write_text(explain.page(found), encoding="utf-8")
    return path, found


def lit(browser):  # noqa: F811
    """Which rows of the memory are highlighted, and how much."""
    return dict(browser.js("[...document.querySelectorAll('#facts li.lit')].map(e => [[...e.parentNode.children].indexOf(e), +e.style.getPropertyValue('--w')])"))


def read_by(found, step, head=None, hop=-1):
    """What should be highlighted for a token."""
    weights = torch.tensor(found["steps"][step]["weights"][hop])
    weights = weights.mean(0) if head is None else weights[head]
    return {fact: pytest.approx(w, abs=1e-3) for fact, w in zip(found["hops"][hop]["chosen"], weights.tolist()) if w >= 0.005}


def test_a_click_on_a_token_highlights_what_it_read(browser, small):  # noqa: F811
    """Catches the weights of another token, fact, head or hop on the screen, and tokens inside a fact that don't belong to it."""
    path, found = small
    browser.open(path)
    for k in (3, 0, len(found["steps"]) - 1):
        browser.point(f"#answer button:nth-child({k + 1})")
        assert lit(browser) == read_by(found, k)
        assert browser.js("[...document.querySelectorAll('#answer [aria-checked=true]')].map(e => [...e.parentNode.children].indexOf(e))") == [k]
        first = max(read := read_by(found, k), key=lambda fact: read[fact].expected)
        assert browser.js("document.querySelector('#read li bdi').textContent") == found["facts"][first]["text"]
        assert browser.js("document.querySelector('#said').textContent").count(f"fact {found['facts'][first]['id']}")
        assert browser.js("document.querySelectorAll('#next tbody tr').length") == len(found["steps"][k]["next"])
    browser.point("#heads label:nth-of-type(3) input")
    assert lit(browser) == read_by(found, k, head=1)
    browser.point("#hops label:nth-of-type(1) input")
    assert lit(browser) == read_by(found, k, head=1, hop=0)
    browser.open(path)
    browser.point("#answer button:nth-child(4)")
    browser.point("#answer button:nth-child(2)", "hover")
    assert lit(browser) == read_by(found, 1)
    browser.point("h1", "hover")
    assert lit(browser) == read_by(found, 3) and not browser.errors


def test_a_click_on_a_fact_shows_which_tokens_read_it(browser, small):  # noqa: F811
    """Catches shares of another fact, a fact that can't be let go of, and details that stay when it is."""
    path, found = small
    browser.open(path)
    fact = found["hops"][-1]["chosen"][1]
    shares = "[...document.querySelectorAll('#answer button')].map(e => +e.style.getPropertyValue('--w'))"
    browser.point(f"#facts li:nth-child({fact + 1})")
    browser.point("h1", "hover")
    of = [torch.tensor(step["weights"][-1]).mean(0)[1].item() for step in found["steps"]]
    assert browser.js(shares) == [pytest.approx(w, abs=1e-3) for w in of]
    assert browser.js("document.querySelector('#fact-text').textContent") == found["facts"][fact]["text"]
    browser.press("Escape")
    assert browser.js(shares) == [0] * len(of) and browser.js("document.querySelector('#fact').hidden")


def test_without_a_mouse(browser, small):  # noqa: F811
    """Catches controls that the keyboard or a screen reader doesn't reach, and a hundred stops on the way through the facts."""
    path, found = small
    browser.open(path)
    browser.js("document.querySelector('#answer [tabindex=\"0\"]').focus()")
    browser.press("Home", "ArrowRight", "ArrowRight")
    assert lit(browser) == read_by(found, 2)
    stops = []
    for _ in range(20):
        browser.press("Tab")
        stops.append(browser.js("document.activeElement.id || document.activeElement.name || document.activeElement.getAttribute('role') || document.activeElement.tagName"))
        if stops[-1] == "option":
            break
    assert stops == ["head", "hop", "looked", "find", "every", "option"]
    browser.press("End", "ArrowUp", "Enter")
    assert browser.js("document.querySelector('#facts [aria-selected=true] .text').textContent") == found["facts"][-2]["text"]
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    names = lambda role: [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == role and not node["ignored"]]
    assert len(names("radio")) == len(found["steps"]) + 1 + found["heads"] + len(found["hops"]) and all(names("radio"))
    assert len(names("option")) == len(found["facts"]) and found["facts"][0]["text"] in names("option")[0]
    assert "Escape lets go of it" in " ".join(names("StaticText")) and len(names("heading")) >= 6


def test_facts_stay_text_and_nothing_is_fetched(browser, small):  # noqa: F811
    """Catches markup in a fact that becomes part of the page, a script of somebody else's that runs, and a request to anywhere."""
    path, found = small
    browser.open(path)
    assert browser.js("[...document.querySelectorAll('#facts .text')].map(e => e.textContent)") == FACTS + HOSTILE
    assert browser.js("document.title") == QUESTION and browser.js("document.images.length + document.scripts.length") == 2
    for row in range(len(FACTS), len(found["facts"])):
        browser.point(f"#facts li:nth-child({row + 1})")
        assert browser.js("document.querySelector('#fact-text').textContent") == found["facts"][row]["text"]
    assert browser.js("document.title") == QUESTION and not browser.errors
    assert set(browser.requests) <= {path.resolve().as_uri(), "data:,"}
    browser.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.taken = 1'}))")
    assert browser.js("window.taken === undefined") and browser.js("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert not any(url.startswith("http") for url in browser.requests)


CONTRAST = """(() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number), light = c => { const [r, g, b] = rgb(c).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const under = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0.99) return getComputedStyle(e).backgroundColor; } };
  return Math.min(...[...document.querySelectorAll('h1, p, .soft, #facts .text, #next td, #read bdi')].filter(e => e.offsetParent && !e.closest('.lit')).map(e => {
    const a = light(getComputedStyle(e).color), b = light(under(e)); return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) })) })()"""


def test_phone_paper_and_dark(browser, small):  # noqa: F811
    """Catches a page that is wider than a phone, text that can't be told from its background, and controls or unread facts on paper."""
    path, found = small
    back = []
    for scheme in ("light", "dark"):
        browser.open(path, 360, 740, phone=True, prefers_color_scheme=scheme)
        assert browser.js("document.documentElement.scrollWidth") <= 360
        assert browser.js(CONTRAST) >= 4.5
        back.append(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert back[0] != back[1]
    assert browser.js("Math.min(...[...document.querySelectorAll('#answer button')].map(e => Math.min(e.offsetWidth, e.offsetHeight)))") >= 40
    browser.js("document.querySelector('#looked').checked && document.querySelector('#looked').click()")
    browser("Emulation.setEmulatedMedia", media="print")
    browser.js("dispatchEvent(new Event('beforeprint'))")
    looked = {fact for hop in found["hops"] for fact in hop["candidates"]}
    seen = browser.js("[...document.querySelectorAll('#facts li')].flatMap((e, i) => e.offsetParent ? [i] : [])")
    assert set(seen) == looked and len(looked) < len(found["facts"]) and browser.js("document.querySelector('#tools').offsetParent === null")
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.js("dispatchEvent(new Event('afterprint'))")
    assert not browser.js("document.querySelector('#looked').checked")
    browser("Emulation.setEmulatedMedia", media="")


def test_a_thousand_facts(browser, load, tmp_path):  # noqa: F811
    """Catches a page that shows a thousand lines where a few count, or doesn't show them all when asked, and a fact that was read but can't be seen."""
    texts = [f"Person {i} has a {colour} bike." for i in range(250) for colour in ("red", "blue", "green", "grey")]
    found = explained(load(*texts))
    (tmp_path / "page.html").write_text(explain.page(found), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    shown = "[...document.querySelectorAll('#facts li')].filter(e => e.offsetParent).length"
    assert browser.js(shown) == len({fact for hop in found["hops"] for fact in hop["candidates"]})
    browser.point("#looked")
    assert browser.js(shown) == 1000
    for k in range(len(found["steps"])):
        browser.point(f"#answer button:nth-child({k + 1})")
        assert lit(browser) == read_by(found, k)
        assert browser.js("(r => (b => r.top >= b.top - 1 && r.bottom <= b.bottom + 1)(document.querySelector('#memory').getBoundingClientRect()))"
                          f"(document.querySelectorAll('#facts li')[{max(lit(browser).items(), key=lambda row: row[1])[0]}].getBoundingClientRect())")
    browser.js("(e => { e.value = 'PERSON 249 '; e.dispatchEvent(new Event('input')) })(document.querySelector('#find'))")
    assert browser.js(shown) == 4 and browser.js("document.querySelector('#count').textContent") == "4 shown" and not browser.errors


def test_an_answer_that_is_none(browser, load, tmp_path):  # noqa: F811
    """Catches a script that stops where nothing was read."""
    for facts, threshold in (((), 1.0), (FACTS, 0.0)):
        model = load(*facts)
        model.config.null_threshold = threshold
        (tmp_path / "page.html").write_text(explain.page(explained(model)), encoding="utf-8")
        browser.open(tmp_path / "page.html")
        assert DONT_KNOW in browser.js("document.querySelector('#refusal').textContent") and not browser.errors
        assert browser.js("document.querySelectorAll('#answer button').length") == len(facts[:1])
