"""What every design of a memory has beside its own idea: settings that are read from files, prompts, answers, saving and loading.

`MemoryModel` joins a frozen Gemma with what is trained beside it: memory.GemmaWithMemory and the designs in variants/ derive
from it, and their configs from `Settings`. A saved memory is a folder of two files: memory.safetensors, and memory.json, which
names the base that it belongs to, and the other file by its hash.
"""

import hashlib
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn
from tqdm import tqdm

from extras.blocks import packed, unpacked
from gemma import END_OF_TURN, EOS, PAD, Gemma, InputError, Tokenizer, find_model, read_json, replacing, write_json

DONT_KNOW = "I don't know."
ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {"tiny": ROOT / "tiny" / "memory", "gemma-3-270m": ROOT / "extras" / "gemma-3-270m"}


class Settings:
    """What a dataclass of settings inherits to be read from a file: fields are bool, int, float or str, each with a default."""

    @classmethod
    def from_dict(cls, raw, source):
        """Raises InputError for a missing or unknown field, or one of the wrong type, and whatever `check` finds."""
        known = {f.name: type(f.default) for f in fields(cls)}
        for name in known.keys() - raw.keys():
            raise InputError(f"{source}: the memory setting {name} is missing; restore the file that was saved, or bring a memory of an earlier design up to date with `python -m extras.grow`.")
        for name, value in raw.items():
            if name not in known or not (type(value) is known[name] or (known[name] is float and type(value) is int)):
                raise InputError(f"{source}: unexpected memory setting {name} = {value!r}; restore the file that was saved.")
        config = cls(**raw)
        config.check(source)
        return config

    def check(self, source):
        """Raise InputError, with `source` in front, for values that make no sense."""


def question_prompt(tokenizer, question, chat):
    """Token ids that ask `question`: as a chat turn, or in the words that a base model continues with an answer."""
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"expected a question, got {question!r}; ask something.")
    if chat:
        return tokenizer.chat([("user", question)])
    return tokenizer.encode(f"Question: {' '.join(question.split())}\nAnswer:")


def find_base(name):
    """The two bases that need no account, by name; anything else is a folder or a Hub id."""
    if str(name) == "tiny":
        return ROOT / "tiny"
    if str(name) == "gemma-3-270m":
        from extras.weights_270m import ensure
        return ensure()
    return name


def new_folder(path):
    """`path`, a folder that a memory may be written to. Raises InputError where one lies there already, and for a file or a name that ships."""
    path = Path(path)
    if str(path) in SHIPPED or (path / "memory.json").exists() or path.exists() and not path.is_dir():
        what = "the name of a memory that ships" if str(path) in SHIPPED else "where there is a file" if path.is_file() else "which holds a memory"
        raise InputError(f"expected a new folder to write to, got {path}, {what}; name another.")
    return path


def facts_bar(doing, count, progress):
    """A progress bar of so many facts, once it takes more than a moment."""
    return tqdm(total=count, desc=doing, unit="fact", disable=not progress, file=sys.stderr, leave=False, delay=2)


class MemoryModel(nn.Module):
    """A frozen Gemma and what is trained beside it. Every design of a memory shares this: prompts, answers, files.

    A design says in `variant` what it is called and in `Config` what its settings are, makes `injection` (an nn.Module that is
    an Injection: all that trains) and, if it is told facts, `memory_graph` (what it holds: ids, texts, a length) and `remember`.
    gemma: a Gemma; tokenizer: its Tokenizer; config: a Config; base_name: what find_base() finds it by.
    """

    variant, Config = "", Settings
    eight_bits = False                   # whether files hold matrices in eight bits a number, or as float32
    told = True                          # facts are told, with add_to_memory; False: what it knows was trained into it

    def __init__(self, gemma, tokenizer, config=None, base_name=None):
        super().__init__()
        self.config = config or self.Config()
        self.gemma = gemma.eval().requires_grad_(False)
        self.tokenizer, self.base_name = tokenizer, base_name
        self.trained = {}                                                  # how the weights were made, saved with them
        self.answered = []                                                 # the tokens of the last answers, for --explain
        newlines = [i for i in range(END_OF_TURN + 1, tokenizer.vocab_size) if tokenizer.pieces.id_to_piece(i).startswith("\n")]
        self.stop = {EOS, END_OF_TURN, *tokenizer.encode("\n", bos=False), *newlines, tokenizer.pieces.piece_to_id("<0x0A>")}

    def train(self, mode=True):
        super().train(mode)
        self.gemma.eval()                                                  # the base stays in eval, whatever its parent does
        return self

    def trainable_parameters(self):
        """All that trains; the optimizer gets these and nothing else."""
        return list(self.injection.parameters())

    def parameter_groups(self):
        """The same as [(parameters, what the learning rate is multiplied by), ...]."""
        return [(self.trainable_parameters(), 1.0)]

    def token_ids(self, text):
        """The tokens of a fact, with <bos>. Raises InputError for an empty text, one that is no str, or one longer than the context."""
        return self.checked_ids([text])[0]

    def all_token_ids(self, texts, progress=False):
        """The same for a list of facts, sooner than one by one: a list of lists."""
        rows = []
        with facts_bar("reading", len(texts), progress) as bar:
            for start in range(0, len(texts), 1024):
                rows += self.checked_ids(texts[start:start + 1024])
                bar.update(len(rows) - start)
        return rows

    def checked_ids(self, texts):
        """Of some facts, encoded together; raises as `token_ids`."""
        most = self.gemma.config.max_position_embeddings
        far_too_long = [isinstance(text, str) and len(text) > most * self.tokenizer.longest for text in texts]     # megabytes: not worth encoding
        rows = self.tokenizer.encode_all(["" if far else text for text, far in zip(texts, far_too_long)])
        for text, ids, far in zip(texts, rows, far_too_long):
            if not text.strip():
                raise InputError("expected a fact, got an empty text; leave it out.")
            if far or len(ids) > most:
                raise InputError(f"expected a fact of at most {most} tokens, got {f'{len(text)} characters' if far else len(ids)} "
                                 f"({text[:40]!r}…); split it into sentences.")
        return rows

    # -- telling

    @torch.no_grad()
    def add_to_memory(self, text, progress=False):
        """Remember a text, or a list of texts, each as one episode. Returns its id, or the list of ids in order.

        Raises InputError, with nothing stored, for an empty text, one that is no str, or one longer than the context.
        """
        texts = [text] if isinstance(text, str) else list(text)
        encoded = self.all_token_ids(texts, progress)
        with facts_bar("remembering", len(texts), progress) as bar:
            new = self.remember(texts, encoded, bar.update)
        return new[0] if isinstance(text, str) else new

    def remember(self, texts, encoded, done):
        """Add episodes, given their texts and token ids (lists, each with <bos>), to the memory. Returns their ids, and on the
        way calls done(how many)."""
        raise NotImplementedError

    def forget(self, episode_id):
        """Remove one episode. Raises InputError for an unknown id."""
        self.memory_graph.forget(episode_id)

    def clear_memory(self):
        self.memory_graph.clear()

    # -- asking

    def _open(self):
        """Before anything is asked: point the injection at this model's own memory, as it is now."""

    def weights(self, hop=-1):
        """Of the last question(s): weights of what is remembered, (B, N + 1), null last; None for a design without such."""

    def best(self, top_k):
        """What `recall` returns, of the last question."""
        weights, graph = self.weights()[0], self.memory_graph
        best = weights[:-1].topk(min(top_k, len(graph)))
        return [(graph.ids[i], w, graph.texts[i]) for w, i in zip(best.values.tolist(), best.indices.tolist())], weights[-1].item()

    def forward(self, input_ids, attention_mask=None, question_mask=None):
        """Logits (B, T, V) of the base with its own memory; with an empty memory, bit-identical to the base.

        question_mask (B, T) marks the prompt, which asks as a whole; without it every position asks for itself.
        """
        self._open()
        return self.gemma(input_ids, attention_mask, question_mask, injection=self.injection)

    def stream(self, input_ids, **options):
        """As Gemma.stream, with the memory. The whole of input_ids is the question; with `compile`, decoding is compiled."""
        self._open()
        return self.gemma.stream(input_ids, injection=self.injection, **options)

    def generate(self, input_ids, max_new_tokens=32, temperature=0.0, **options):
        """Prompt and continuation, (B, T + new). Never refuses; see `answer`."""
        self._open()
        return self.gemma.generate(input_ids, max_new_tokens, temperature=temperature, injection=self.injection, **options)

    def prompt(self, question):
        """Token ids that ask `question` of this base."""
        return question_prompt(self.tokenizer, question, self.config.chat)

    def batch(self, questions, room=0):
        """Prompts padded on the left: input_ids (B, T), attention_mask (B, T).

        Raises InputError for a question so long that it leaves no `room` in the context for that many tokens of an answer.
        """
        prompts = [self.prompt(q) for q in questions]
        longest, most = max(map(len, prompts)), self.gemma.config.max_position_embeddings - room
        if longest > most:
            raise InputError(f"expected a question of at most {most} tokens, got {longest}; shorten it"
                             f"{f', or the {room} tokens of an answer' if room else ''}.")
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=self.gemma.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.gemma.device)
        return ids, mask

    def answer(self, question, **options):
        """The answer to a question, or the list of answers to a list of questions, which are asked in one batch.

        Greedy unless options (max_new_tokens, temperature, top_k, top_p, seed, compile) say otherwise. DONT_KNOW where the null
        episode's weight passes the threshold, and whenever a memory that is told facts is empty.
        """
        questions = [question] if isinstance(question, str) else list(question)
        answers = ["".join(pieces) for pieces in zip(*self.answer_stream(questions, **options))]
        return answers[0] if isinstance(question, str) else answers

    @torch.no_grad()
    def answer_stream(self, questions, max_new_tokens=64, **options):
        """As `answer` for a list of questions, but yields the answers as they grow: at every step a list of new pieces."""
        ids, mask = self.batch(questions, max_new_tokens) if questions else (None, None)
        self.answered = tokens = [[] for _ in questions]
        if not questions or self.told and not len(self.memory_graph):
            yield [DONT_KNOW] * len(questions)
            return
        said = [""] * len(questions)
        for token in self.stream(ids, attention_mask=mask, max_new_tokens=max_new_tokens, stop=self.stop, **options):
            if not tokens[0]:
                weights = self.weights()
                known = [True] * len(questions) if weights is None else (weights[:, -1] <= self.config.null_threshold).tolist()
            for row, t in zip(tokens, token.tolist()):
                row.append(t)
            now = [self.text(row, growing=True) if k else DONT_KNOW for row, k in zip(tokens, known)]
            yield [new[len(old):] for new, old in zip(now, said)]
            said = now
            if not any(known):
                return
        yield [self.text(row)[len(old):] if k else "" for row, old, k in zip(tokens, said, known)]

    def text(self, tokens, growing=False):
        """The text of generated tokens up to the first stop token; `growing`: as far as no further token can change it."""
        end = next((i for i, t in enumerate(tokens) if t in self.stop), len(tokens))
        text = self.tokenizer.decode(tokens[:end])
        # Bytes that are not yet a whole character decode to U+FFFD; a space may turn out to be the last one.
        return (text.rstrip("\ufffd") if growing else text).strip()

    # -- saving and loading

    def to_save(self):
        """The tensors that files hold, by name."""
        return self.injection.state_dict()

    def save_pretrained(self, folder):
        """Write memory.safetensors and memory.json: the memory's weights, its config, and which base they belong to.

        Not the base, and not the episodes: their text is the user's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / "memory.safetensors.new"
        with replacing(new) as temporary:
            tensors = {name: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype).contiguous() for name, t in self.to_save().items()}
            save_file(packed(tensors) if self.eight_bits else tensors, temporary)
        write_json(folder / "memory.json", dict(
            variant=self.variant, memory=asdict(self.config), trained=self.trained, sha256=hashlib.sha256(new.read_bytes()).hexdigest(),
            base=dict(name=str(self.base_name), config=self.gemma.config.fingerprint(), tokenizer=self.tokenizer.hash,
                      weights=self.gemma.fingerprint())))
        new.replace(folder / "memory.safetensors")

    @classmethod
    def from_pretrained(cls, name=None, base=None, memory=None, dtype=None, device="cpu", config=None):
        """A trained memory on its base: "tiny", "gemma-3-270m", or a folder that save_pretrained wrote.

        base: another place to find the base (a folder or Hub id); with memory=None and name=None, a fresh memory on it, made
        as `config` (a Config) says.
        Raises InputError where something is missing or damaged, or the memory was made for another config or tokenizer.
        """
        folder = memory or SHIPPED.get(str(name), name)
        if folder is not None and not (Path(folder) / "memory.json").is_file():
            raise InputError(f"expected 'tiny', 'gemma-3-270m' or a folder that save_pretrained wrote, got {str(folder)!r}, "
                             "which holds no memory.json.")
        saved = read_json(Path(folder) / "memory.json") if folder is not None else None
        if saved is not None:
            base_of = saved.get("base")
            if not isinstance(base_of, dict) or not isinstance(saved.get("memory"), dict) or not isinstance(base_of.get("name"), str):
                raise InputError(f"{folder}/memory.json: expected the entries 'memory' and 'base'; restore the file that was saved.")
            if saved.get("variant", "graph") != cls.variant:
                raise InputError(f"{folder}: expected a memory of the variant {cls.variant}, got {str(saved['variant'])[:40]!r}; variants.load opens every one.")
            base = base_of["name"] if base is None else base
        if base is None:
            raise InputError("expected the name of a memory or of a base model, got neither; try 'tiny'.")
        found = find_base(base)
        gemma = Gemma.from_pretrained(found, dtype=dtype, device=device)
        tokenizer = Tokenizer(find_model(found))
        if saved is None:
            return cls(gemma, tokenizer, config or cls.Config(chat=str(base).endswith("-it")), base).eval()
        for what, mine in (("config", gemma.config.fingerprint()), ("tokenizer", tokenizer.hash)):
            if base_of.get(what) != mine:
                raise InputError(f"{folder}: this memory was made for a base with {what} {base_of.get(what)!r}, got {mine!r}; "
                                 "use its own base or train a memory for this one.")
        if base_of.get("weights") != gemma.fingerprint():
            print(f"note: the memory in {folder} was trained on other weights of the same shape; recall may suffer.", file=sys.stderr)
        model = cls(gemma, tokenizer, cls.Config.from_dict(saved["memory"], f"{folder}/memory.json"), base)
        model.trained = saved.get("trained", {})
        model.load_memory(folder)
        return model.eval()

    def load_memory(self, folder):
        """Load the weights that save_pretrained wrote, strictly. Raises InputError where they are not those that memory.json
        names by their hash, or naming the tensor that is missing, unexpected or misshapen."""
        digest, file = read_json(Path(folder) / "memory.json").get("sha256"), Path(folder) / "memory.safetensors"
        try:
            new = file.with_name(file.name + ".new")                       # there if a save ended between its two files
            blobs = [f.read_bytes() for f in (file, new) if f.is_file()]
            if digest is not None:                                         # saved before memories had one: nothing to compare
                blobs = [blob for blob in blobs if hashlib.sha256(blob).hexdigest() == digest]
            if not blobs:
                raise InputError(f"{file}: expected the weights that memory.json was saved with, but they are missing or damaged; "
                                 "restore both files as they were saved.")
            tensors = unpacked(load(blobs[0]))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: expected a whole safetensors file ({str(error)[:100]}); restore the one that was saved.") from None
        mine = self.injection.state_dict()
        for name in sorted(set(mine) ^ set(tensors)):
            raise InputError(f"{file}: tensor {name} is {'missing' if name in mine else 'unexpected'}; restore the file that was saved, or bring a memory of an earlier design up to date with `python -m extras.grow`.")
        for name, tensor in tensors.items():
            dtypes = (torch.float32, torch.bfloat16) if mine[name].is_floating_point() else (mine[name].dtype,)
            if tensor.shape != mine[name].shape or tensor.dtype not in dtypes or not bool(tensor.isfinite().all()):
                raise InputError(f"{file}: expected {name} to be finite, of shape {tuple(mine[name].shape)}, got {tensor.dtype} "
                                 f"{tuple(tensor.shape)}; restore the file that was saved.")
        self.injection.load_state_dict(tensors)
