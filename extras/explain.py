"""A page to look into the memory with:  python generate.py --memory facts.txt --explain page.html "Where does Maria live?"

For every token of the last answer: which episodes and which of their tokens were read, by each head, and what the model would
have said next with and without its memory. `trace` collects it, `page` puts it into `explain.html`: one file that asks for
nothing else. What users wrote is in it as JSON without a single "<", and reaches the screen as text; the page's own policy
forbids every script and style but its own, and every connection.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import torch

from extras.memory_model import DONT_KNOW
from gemma import InputError, replacing
from memory import MemoryInjectionLayer

TEMPLATE = Path(__file__).with_name("explain.html")
LIKELY = 5                           # next tokens that are shown, of those with and of those without the memory
MOST, AROUND = 2000, 50              # a larger memory is shown around what was looked at, so many facts to either side


# --------------------------------------------------------------------------------------------------------- collecting

@torch.no_grad()
def trace(model, question):
    """What the last answer, the one to `question`, drew on: a dict for JSON, described where it is put together.

    The tokens are those that were generated; all else comes from two passes over question and answer, one with the memory
    and one without. In both, every token is followed by the one that was said, so the two differ by the memory alone.
    Raises InputError for a memory of another design.
    """
    if not isinstance(model.injection, MemoryInjectionLayer):
        raise InputError(f"expected a graph memory for --explain, got {type(model).__name__}; leave --explain out.")
    graph, config, said = model.memory_graph, model.config, model.answered[0]
    result = dict(question=" ".join(question.split()), threshold=config.null_threshold, heads=config.heads, total=len(graph),
                  refusal=DONT_KNOW, refused=True, null=1.0, facts=[], hops=[], pieces={}, steps=[])
    if not said:                                                           # nothing is remembered, and nothing was asked
        return result
    prompt = model.prompt(question)
    ids = torch.tensor([prompt + said[:-1]], device=model.gemma.device)
    asks = (torch.arange(ids.shape[1], device=ids.device) < len(prompt))[None]
    edges, similarity = [], getattr(model.injection, "similarity", None)
    if similarity is not None:
        hook = similarity.register_forward_hook(lambda module, inputs, _: edges.append(module.edges(*inputs)[0].sigmoid()))
    logits = model(ids, question_mask=asks)[0, len(prompt) - 1:]                               # (answer tokens, V)
    if similarity is not None:
        hook.remove()
    reading, null = model.injection.reading, model.weights()[0, -1].item()
    alone = model.gemma(ids)[0, len(prompt) - 1:]

    looked = sorted({row for hop in reading.candidates for row in hop[0].tolist()})
    rows = range(len(graph)) if len(graph) <= MOST else \
        sorted({row for near in looked for row in range(max(0, near - AROUND), min(len(graph), near + AROUND + 1))})
    place = {row: i for i, row in enumerate(rows)}                         # row of the memory -> index into `facts`
    places = lambda found: [place[row] for row in found[0].tolist()]
    result.update(refused=null > config.null_threshold, null=rounded(null),
                  facts=[dict(id=graph.ids[row], row=row, text=graph.texts[row]) for row in rows])

    for hop in range(config.hops):
        pairs = (edges[hop] >= 0.05).nonzero().tolist() if edges else []
        candidates = places(reading.candidates[hop])
        result["hops"].append(dict(
            asked=rounded(reading.asked[hop][0, :, [*rows, -1]].exp()),    # [head][fact, null last]: by their keys
            candidates=candidates,                                         # facts that were compared word by word
            ranked=rounded(reading.ranked[hop][0].exp()),                  # [head][candidate, null last]
            chosen=places(reading.chosen[hop]),                            # facts that were read
            # [later fact, earlier fact, how likely it is that the later one has made the earlier one out of date]
            replaced=[[candidates[j], candidates[i], rounded(edges[hop][i, j])] for i, j in pairs]))

    # Characters may take several tokens: what was read of these is added up.
    groups = []
    for fact, tokens in zip(result["hops"][-1]["chosen"], reading.token_ids[0]):
        texts, owner = pieces(model.tokenizer, tokens[tokens >= 0].tolist())
        groups.append(torch.tensor(owner, device=ids.device))
        result["pieces"][fact] = texts
    for k, token in enumerate(said):
        at = len(prompt) - 1 + k                                           # where this token was what comes next
        inside = reading.token_weights[0, at].float()                      # (H, r, M)
        added = [torch.zeros(len(inside), int(g.max()) + 1, device=g.device).index_add(1, g, inside[:, c, :len(g)]) for c, g in enumerate(groups)]
        added = [torch.cat((part, reading.end_weights[0, at, :, c:c + 1].float()), 1) for c, part in enumerate(added)]
        p, q = logits[k].float().softmax(-1), alone[k].float().softmax(-1)
        likely = sorted({*p.topk(LIKELY).indices.tolist(), *q.topk(LIKELY).indices.tolist(), token}, key=lambda t: -p[t])
        result["steps"].append(dict(
            token=token, text=label(model.tokenizer, token), ends=token in model.stop, p=[rounded(p[token]), rounded(q[token])],
            weights=[rounded(w[0, min(at, w.shape[1] - 1)].exp()) for w in reading.weights],    # [hop][head][chosen, null last]
            inside=[[rounded(part[head]) for part in added] for head in range(config.heads)],  # [head][chosen][piece, and the end last], at the last hop
            next=[[label(model.tokenizer, t), rounded(p[t]), rounded(q[t])] for t in likely]))  # with the memory, without it
    return result


def rounded(x):
    """A number, or a tensor as lists, to four places: more isn't seen."""
    if isinstance(x, torch.Tensor) and x.ndim:
        return [rounded(part) for part in x.tolist()] if x.ndim == 1 else [rounded(part) for part in x]
    return round(float(x), 4)


def label(tokenizer, token):
    """How one token of the vocabulary is shown."""
    return tokenizer.pieces.id_to_piece(token).replace("\u2581", " ")


def pieces(tokenizer, ids):
    """Token ids of a text -> its pieces, which together are the text, and for each token which piece it belongs to."""
    texts, owner, done = [], [], ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[:i + 1])
        if i + 1 < len(ids):                                               # bytes that are not yet a whole character
            text = text.rstrip("\ufffd")
        owner.append(len(texts))
        if len(text) > len(done):
            texts.append(text[len(done):])
            done = text
    return texts or [""], [min(o, max(0, len(texts) - 1)) for o in owner]


# ------------------------------------------------------------------------------------------------------------ the page

def page(found):
    """The page of what `trace` found: str."""
    template = TEMPLATE.read_text(encoding="utf-8")
    data = json.dumps(found, separators=(",", ":")).translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})
    own = lambda tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1].encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; script-src 'sha256-{own('script')}'; style-src 'sha256-{own('style')}'; base-uri 'none'; form-action 'none'"
    parts = {"policy": policy, "title": html.escape(found["question"]), "data": data}
    return re.sub(r"\{\{(policy|title|data)\}\}", lambda match: parts[match[1]], template)


def write_page(model, question, path):
    """Write the page of the last answer, the one to `question`. Raises InputError where the file can't be written."""
    with replacing(path) as temporary:
        temporary.write_text(page(trace(model, question)), encoding="utf-8")
