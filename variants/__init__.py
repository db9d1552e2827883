"""The other ways to give a frozen Gemma a memory, one file each, and what train.py, generate.py and the benches ask of them.

    python train.py --variant prefix --slots 8 --out out/prefix       or: --config variants/configs/prefix.json
    python generate.py --model out/prefix --memory facts.txt "Where does Maria live?"
    python -m bench.recall --model out/prefix
    python -m bench.compare                                            all of them, on the same facts and questions

    graph      memory.py              episodes in a graph, read by their tokens after one layer: this project's own design
    prefix     prefix.py              what a graph of past turns returns is put in front of the prompt as embeddings
    cross      cross_attention.py     every layer attends to the final states of past turns
    chapters   chapters.py            a bank of learned tokens that layers attend to; facts are trained in
    lora       lora.py                low-rank changes of the base's own matrices; facts are trained in
    none       none.py                the base alone: what all others have to beat

A design is one class in its file, found by NAMES below, and derives from MemoryModel (extras/memory_model.py), which brings
telling, prompts, answers, `forward`, saving and loading (memory.json names the variant; `load` picks the class by it). It has

    variant            its name
    Config             a dataclass that derives from Settings (there too): bool, int, float or str fields, each with a default
                       and, under metadata={"help": …}, its reason. Each is an option of train.py and a name in a JSON file
                       (--config; examples in variants/configs/). `check(source)` raises InputError for bad values. No name
                       that TrainConfig has; `chat` is a must, and `null_threshold` where the design can tell what it
                       doesn't know. All of it is saved.
    told               True: facts are told to it with add_to_memory; False: they are trained in, --memory is ignored
    Lesson             how it is trained, see below
    __init__           as MemoryModel's; makes self.injection, an nn.Module that is a gemma.Injection and holds all that
                       trains. The base's parameters stay as they are, to the bit.
    parameter_groups   only where parts learn at rates of their own: [(parameters, factor of the learning rate), …]

and if it is told facts also (shared.Told has most of it)

    remember(texts, token ids of each, done) -> ids: what add_to_memory does with them;  recall(text, top_k)
    memory_graph       what it holds: `ids` and `texts` in the order told, a length, forget(id), clear() (shared.Turns is one)
    _open()            sets self.injection.view to the memory as it is now (None: nothing, then logits are the base's to the
                       bit), before anything is asked. Views of several memories become one, a row each, by their static
                       method `side_by_side([view, …])`: the benches ask many small memories at once.
    weights()          (B, N + 1) of the last question: weight of each turn, and last of none of them

and if they are trained in (shared.TrainedIn says so to whoever tells it some)

    taught()           what was: {"facts", "train", "held_out"}, as variants/facts.py draws it; the benches ask by it

A Lesson is what train.py's loop asks for steps and figures:

    Lesson(model, settings, pools=None, progress=True)      draws its data, as TrainConfig and model.config say
    loss(N, generator) -> {"loss": …, name: …}              one batch; tensors, "loss" is minimised, all go to the log. Every
                                                            draw comes from the generator: runs can be resumed
    evaluate(questions=512, silent=False) -> {size: {"recall": share, …}}     held out; silent: what the base alone answers
    layers                                                  those that --compile compiles

`shared.PoolLesson` is that of designs which are told facts: the graph's own data, through all layers of the base;
`facts.TaughtLesson` is that of facts that are trained in.
"""

from importlib import import_module
from pathlib import Path

from extras.memory_model import SHIPPED
from gemma import InputError, read_json

NAMES = {"graph": "memory.GemmaWithMemory", "prefix": "variants.prefix.PrefixMemory", "cross": "variants.cross_attention.CrossAttentionMemory",
         "chapters": "variants.chapters.ChapterMemory", "lora": "variants.lora.LoraMemory", "none": "variants.none.NoMemory"}


def check_name(name):
    """Raise InputError unless `name` is that of a design."""
    if not isinstance(name, str) or name not in NAMES:
        raise InputError(f"expected the variant to be one of {', '.join(NAMES)}, got {str(name)[:40]!r}.")


def find(name):
    """The class of a design. Raises InputError for an unknown name."""
    check_name(name)
    module, _, cls = NAMES[name].rpartition(".")
    return getattr(import_module(module), cls)


def load(name="tiny", base=None, dtype=None, device="cpu"):
    """A trained memory of any design: a shipped one by its name, or a folder that train.py wrote. See MemoryModel.from_pretrained."""
    file = Path(SHIPPED.get(str(name), name)) / "memory.json"
    variant = read_json(file).get("variant", "graph") if file.is_file() else "graph"          # if not, from_pretrained says what is missing
    return find(variant).from_pretrained(name, base, dtype=dtype, device=device)
