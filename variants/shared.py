"""What the designs share: the turns they were told, and how those that are told facts are trained."""

import torch
import torch.nn.functional as F

from extras.memory_model import MemoryModel
from extras.pool import groups, judged, pools as draw_pools, summary, wanted
from gemma import PAD, InputError, Places
from gnn import by_length


class Turns:
    """Texts in the order they were told, with their ids, and what a design keeps of each (`kept`)."""

    def __init__(self):
        self.next_id = 0
        self.clear()

    def __len__(self):
        return len(self.ids)

    def clear(self):
        self.ids, self.texts, self.kept = [], [], []

    def add(self, texts, kept):
        """Append turns; returns their ids."""
        new = list(range(self.next_id, self.next_id + len(texts)))
        self.next_id += len(texts)
        self.ids, self.texts, self.kept = self.ids + new, self.texts + texts, self.kept + kept
        return new

    def forget(self, turn_id):
        """Remove a turn. Raises InputError for an unknown id."""
        if turn_id not in self.ids:
            raise InputError(f"expected the id of a stored episode, got {turn_id!r}; recall() lists them.")
        row = self.ids.index(turn_id)
        del self.ids[row], self.texts[row], self.kept[row]


class TrainedIn(MemoryModel):
    """A design whose facts are trained in: nothing can be told to it."""

    told = False

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        self.memory_graph = Turns()                                        # stays empty

    def add_to_memory(self, *text, **options):
        raise InputError(f"expected a memory that facts can be told to, got the variant {self.variant}, which knows what it was trained on.")

    forget = add_to_memory

    def clear_memory(self):
        """Nothing was told, so nothing is forgotten."""

    def recall(self, text, top_k=5):
        return [], 0.0


class Told(MemoryModel):
    """A design that is told facts, and keeps something of each. It says what in `keep`, and in `make_view` what its injection
    sees of that."""

    with_response = False                # is what was answered a part of the turn that `generate` remembers?

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__(gemma, tokenizer, config, base_name)
        self.memory_graph, self.view = Turns(), None

    def keep(self, turns):
        """Token ids (lists, each with <bos>) -> what is kept of each turn: a list."""
        raise NotImplementedError

    def make_view(self):
        """What the injection sees of the turns that are stored, of which there is at least one."""
        raise NotImplementedError

    def remember(self, texts, encoded, done):
        kept, size = [], max(1, min(64, 8192 // max(map(len, encoded), default=1)))            # long ones a few at a time: bounded memory
        for start in range(0, len(encoded), size):
            kept += self.keep(encoded[start:start + size])
            done(len(encoded[start:start + size]))
        self.view = None
        return self.memory_graph.add(texts, kept)

    def forget(self, episode_id):
        self.view = None
        super().forget(episode_id)

    def clear_memory(self):
        self.view = None
        super().clear_memory()

    def train(self, mode=True):
        super().train(mode)
        if len(self.memory_graph):                                         # training changed what they are kept by
            self.memory_graph.kept = [kept for text in self.memory_graph.texts for kept in self.keep([self.token_ids(text)])]
        self.view = None
        return self

    def _open(self):
        if self.view is None and len(self.memory_graph):
            with torch.no_grad():
                self.view = self.make_view()
        self.injection.view = self.view

    def set_statistics(self, pool):
        """Before training: save what the turns of a pool look like on average, if it matters."""

    def weights(self, hop=-1):
        weights = self.injection.log_weights                               # (B, …, N + 1)
        return None if weights is None else weights.exp().flatten(1, -2).mean(1)

    def generate(self, input_ids, max_new_tokens=32, temperature=0.0, **options):
        """Prompt and continuation, (B, T + new), as the plans have it: each turn is remembered once it is complete."""
        made = super().generate(input_ids, max_new_tokens, temperature, **options)
        if self.told:
            turns = [[t for t in row if t != PAD] for row in (made if self.with_response else input_ids).tolist()]
            self.memory_graph.add([self.tokenizer.decode(turn) for turn in turns], self.keep(turns))
            self.view = None
        return made

    def copying(self, pool, batch, out):
        """What else tells training where the answers are, for the weight `copying`: a loss, or 0.0 where there is no such thing."""
        return 0.0

    def arranged(self, asked):
        """The questions of a batch (an extras.pool.Asked) as this design puts them to the base."""
        return asked

    def states(self, input_ids, attention_mask, question_mask):
        """The last layer's states (B, T, D), with what the injection adds, of rows that are padded on the right. Those of about the
        same length go through the layers together, where the injection lets them."""
        injection, T = self.injection, input_ids.shape[1]
        injection.begin(input_ids, attention_mask, question_mask, None)
        h, parts = injection.on_embeddings(self.gemma.embed(input_ids)), by_length(attention_mask.sum(1), 3, T)
        if len(parts) == 1 or not injection.separable:
            return self.gemma.run_layers(h, Places(self.gemma.config, *input_ids.shape, attention_mask, None, h.device), injection=injection)
        out = []
        for rows, width in parts:
            injection.part = rows, width
            places = Places(self.gemma.config, len(rows), width, attention_mask[rows, :width], None, h.device)
            out.append(F.pad(self.gemma.run_layers(h[rows, :width], places, injection=injection), (0, 0, 0, T - width)))
        return torch.cat(out).index_select(0, torch.cat([rows for rows, _ in parts]).argsort())

    @torch.no_grad()
    def recall(self, text, top_k=5):
        """Which turns a question draws on: ([(id, weight, text), ...] best first, null weight). Generates nothing."""
        if not len(self.memory_graph):
            return [], 1.0
        next(self.stream(self.batch([text])[0], max_new_tokens=1))
        return self.best(top_k)


class PoolLesson:
    """Questions about memories that are drawn from a pool (see extras/pool.py), answered through all layers of the base.

    The design says in `facts_layer` up to which layer the pool runs its facts, and in `view_of(pool, batch)` what its
    injection sees of the memories of a batch; there `log_weights` (R, ..., N + 1), if it has such, are held to the right turn.
    The injection says in `separable` whether rows may go through the layers a few at a time; its `part` is then set to them.
    """

    def __init__(self, model, settings, pools=None, progress=True):
        self.model, self.settings, self.layers = model, settings, []
        self.pool, self.held_out = pools or draw_pools(model, settings, progress, layers=(model.facts_layer, 0))
        model.set_statistics(self.pool)

    def forward(self, pool, batch, silent=False):
        """One batch -> logits and targets where answers are spoken, and what was found. silent: nothing is remembered."""
        model = self.model
        model.injection.view = None if silent else model.view_of(pool, batch)
        asked = pool.questions(batch, self.settings.tokens)
        asked = asked if silent else model.arranged(asked)
        out = asked.answers(model.gemma, model.states(asked.ids, asked.real, asked.question))
        return dict(out, log_weights=None if silent else model.injection.log_weights)

    def loss(self, N, generator):
        settings = self.settings
        batch = self.pool.draw(groups(settings.batch, N), settings.batch, N, settings.unknown, settings.text, generator)
        out = self.forward(self.pool, batch)
        answer_loss = F.cross_entropy(out["logits"].float(), out["targets"])
        retrieval = retrieval_loss(batch, out["log_weights"])
        copying = self.model.copying(self.pool, batch, out)
        return dict(loss=answer_loss + settings.retrieval * retrieval + settings.copying * copying, answer_loss=answer_loss, retrieval_loss=retrieval,
                    **({"copying_loss": copying} if torch.is_tensor(copying) else {}))

    def evaluate(self, silent=False, **options):
        model = self.model.eval()

        def score(batch):
            out = self.forward(self.held_out, batch, silent)
            weights = None if silent else model.weights()
            if weights is None:
                nothing = torch.zeros(len(batch["known"]), device=out["row"].device)
                return judged(batch, out, nothing.long() - 1, nothing)
            return judged(batch, out, weights[:, :-1].argmax(1), weights[:, -1])
        try:
            return summary(model, self.held_out, self.settings, score, **options)
        finally:
            model._open()


def retrieval_loss(batch, log_weights):
    """- log of the attention on the turns that hold the answer, or on null: log_weights (R, ..., N + 1), mean over the rest.

    A question of two facts needs both at once: here nothing is asked twice.
    """
    target = torch.zeros(len(log_weights), log_weights.shape[-1], dtype=torch.bool, device=log_weights.device)
    for hop in range(2):
        target |= wanted(batch, hop, 2, log_weights.shape[-1] - 1)
    log_weights = log_weights.flatten(1, -2)
    return -log_weights.masked_fill(~target[:, None], -torch.inf).logsumexp(-1).mean()
