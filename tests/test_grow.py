"""Files in eight bits a number, and memories with a larger reader that answer as before."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from extras import grow, mean
from extras.blocks import BLOCK, pack, packed, unpack, unpacked
from gemma import InputError, read_json, write_json
from gnn import rms_norm
from memory import GemmaWithMemory
from toy import FACTS, one_thread, toy_model  # noqa: F401 (one_thread is a fixture)

QUESTIONS = ["Where does Maria live?", "What is Tom's locker code?", "Who?"]


@given(st.integers(0, 10 ** 6), st.sampled_from([1e-7, 1e-3, 1.0, 1e3]), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_eight_bits_are_within_half_a_step_and_packed_twice_the_same(seed, size, blocks):
    """Catches a step for a whole row, numbers that are cut instead of rounded, and files that change each time they are saved."""
    t = torch.randn(3, blocks * BLOCK, generator=torch.Generator().manual_seed(seed)) * size
    t[0, 0] *= 50                                                          # an outlier coarsens its own block alone
    whole, step = pack(t)
    again = unpack(whole, step)
    largest = t.view(3, blocks, BLOCK).abs().amax(-1, keepdim=True)
    assert ((again - t).view(3, blocks, BLOCK).abs() <= (largest / 127 * 0.502).clamp(min=2 ** -15)).all()
    assert all(torch.equal(a, b) for a, b in zip(pack(again), (whole, step)))


def test_what_is_no_matrix_of_whole_blocks_is_kept_as_it_was():
    """Catches vectors and odd widths that are packed all the same, a file without steps that is refused, and one whose steps
    don't fit that is not left to the loader to refuse."""
    tensors = dict(bias=torch.randn(64), odd=torch.randn(3, 20), wide=torch.randn(4, 64), count=torch.arange(3))
    kept = packed(tensors)
    assert set(kept) == {*tensors, "wide.scale"} and kept["wide"].dtype == torch.int8
    opened = unpacked(kept)
    assert set(opened) == set(tensors) and all(torch.equal(opened[name], tensors[name]) for name in ("bias", "odd", "count"))
    assert all(torch.equal(a, b) for a, b in zip(unpacked(tensors).values(), tensors.values()))
    for broken in (torch.zeros(4, 3).half(), torch.zeros(4, 2)):
        assert "wide.scale" in unpacked({**kept, "wide.scale": broken})


@pytest.mark.parametrize("change", ["step", "whole"])
def test_damaged_eight_bits_are_refused(tmp_path, change):
    """Catches a step of the wrong shape or an integer matrix without its step that is loaded as if it were the numbers."""
    folder = toy_model(tmp_path)
    tensors = load_file(folder / "memory.safetensors")
    assert tensors["token_key_own.weight"].dtype == torch.int8
    if change == "step":
        tensors["token_key_own.weight.scale"] = tensors["token_key_own.weight.scale"][:, :-1].contiguous()
    else:
        del tensors["token_key_own.weight.scale"]
    save_file(tensors, folder / "memory.safetensors")
    saved = (folder / "memory.json").read_text()
    (folder / "memory.json").write_text(saved.replace('"sha256"', '"was"'))
    with pytest.raises(InputError, match="token_key_own.weight"):
        GemmaWithMemory.from_pretrained(folder)


@pytest.mark.parametrize("options", [["--reading-dim", "32"], ["--reading-layers", "3"], ["--reading-dim", "64", "--reading-layers", "2"]], ids=" ".join)
def test_a_grown_memory_answers_as_before_and_can_learn_more(tmp_path, options):
    """Catches widths that are not made up for in RMSNorm or in the scale of the scores, heads that are mixed up, and new parts
    that no gradient reaches."""
    folder = toy_model(tmp_path / "toy", sentence_dim=32)
    old = GemmaWithMemory.from_pretrained(folder)
    grow.main([str(folder), str(tmp_path / "grown"), *options])
    new = GemmaWithMemory.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    assert sum(p.numel() for p in new.trainable_parameters()) > sum(p.numel() for p in old.trainable_parameters())
    for model in (old, new):
        model.add_to_memory(FACTS)
    for question in QUESTIONS:
        (one, null), (other, null_too) = old.recall(question, top_k=8), new.recall(question, top_k=8)
        assert dict((i, w) for i, w, _ in one) == pytest.approx(dict((i, w) for i, w, _ in other), abs=2e-2)
        assert null == pytest.approx(null_too, abs=2e-2)
    new.train()
    ids = torch.tensor([new.prompt(QUESTIONS[0])])
    new.forward(ids, None, torch.ones_like(ids)).float().pow(2).mean().backward()
    asks = new.injection.understand.ask.weight.grad
    assert asks is not None and (asks.abs().sum(1) > 0).all()              # every width, the new ones too


@pytest.mark.parametrize("dim, layers", [(32, 2), (16, 3), (64, 3)])
@torch.no_grad()
def test_a_grown_reader_says_the_same(tmp_path, dim, layers):
    """Catches each factor that RMSNorm over more widths and scores over wider heads have to be made up for by: to the last bits."""
    old = GemmaWithMemory.from_pretrained(toy_model(tmp_path, reading_layers=2))
    torch.manual_seed(3)
    for p in old.injection.understand.parameters():
        p.normal_(std=0.3)                                                 # fresh ones say so little that mistakes would not show
    new = GemmaWithMemory(old.gemma, old.tokenizer, replace(old.config, reading_dim=dim, reading_layers=layers), old.base_name).eval()
    grow.grow(old.injection.state_dict(), new.injection.state_dict())
    question, found, tokens = torch.randn(2, 5, 96), torch.randn(2, 48), torch.randn(2, 3, 4, old.injection.meaning.in_features)

    def said(injection):
        meant = injection.understand(question, torch.ones(2, 5, dtype=torch.bool), found, rms_norm(injection.meaning(tokens)), torch.ones(2, 3, 4, dtype=torch.bool),
                                     torch.arange(5).expand(2, 5), torch.arange(4, 28).view(2, 3, 4))
        return torch.cat((injection.understood_key(meant), injection.fits(meant), injection.outdated.says(meant)), -1)
    torch.testing.assert_close(said(new.injection), said(old.injection), rtol=1e-4, atol=1e-4)


def test_a_memory_of_an_earlier_design_is_brought_up_to_date(tmp_path):
    """Catches weights that are lost where only others have come or gone, and parts that were asked for anew and keep what they learnt."""
    folder, out = toy_model(tmp_path / "toy"), tmp_path / "out"
    tensors, saved = unpacked(load_file(folder / "memory.safetensors")), read_json(folder / "memory.json")
    settings = saved["memory"]
    del settings["marks"], settings["follow"]                              # settings that it didn't know yet, and one that is gone
    settings["gone"] = 3
    silent = [name for name in tensors if name == "understand.echo" or name.startswith("understand.") and name.endswith(".alike")]
    for name in [*silent, *(name for name in tensors if name.startswith(("marks", "mark_query", "goes_on")))]:
        del tensors[name]
    tensors["outdated.says.weight"] += 1
    save_file({**tensors, "match_found.0.weight": torch.zeros(3), "marks.bias": torch.zeros(3)}, folder / "memory.safetensors")
    write_json(folder / "memory.json", saved)
    with pytest.raises(InputError):                                        # memory.json names the hash of other weights, and settings are amiss
        GemmaWithMemory.from_pretrained(folder)
    with pytest.raises(InputError, match="marks.bias of shape"):
        grow.main([str(folder), str(out)])
    grow.main([str(folder), str(out), "--fresh", "outdated", "marks"])
    new = GemmaWithMemory.from_pretrained(out).injection.state_dict()
    same = {name for name in tensors if torch.allclose(new[name].float(), tensors[name].float(), atol=2e-2)}
    assert tensors.keys() - same == {"outdated.says.weight", "outdated.says.bias"} and (new["marks.weight"] != 0).any() and (new["mark_query.0.weight"] == 0).all()
    assert (new["goes_on.weight"] == 0).all() and (new["goes_on.bias"] == 0.5).all()
    assert len(silent) > 1 and not any(new[name].any() for name in silent)
    grow.main([str(folder), str(tmp_path / "again"), "--fresh", "understand.layers.0.alike", "marks", "outdated"])
    assert (GemmaWithMemory.from_pretrained(tmp_path / "again").injection.state_dict()["understand.layers.0.alike"] == 1).all()


def test_what_cannot_be_grown_is_refused(tmp_path):
    """Catches a reader that is made smaller without a word, and a memory without one."""
    folder = toy_model(tmp_path / "toy")
    with pytest.raises(InputError, match="at least its 1 layers of width 16"):
        grow.main([str(folder), str(tmp_path / "out"), "--reading-dim", "8"])
    with pytest.raises(InputError, match="at least its 1 layers of width 16"):
        grow.main([str(folder), str(tmp_path / "out"), "--reading-layers", "0"])
    with pytest.raises(InputError, match="that has a reader"):
        grow.main([str(toy_model(tmp_path / "without", reading_layers=0)), str(tmp_path / "out"), "--reading-dim", "32"])
    with pytest.raises(InputError, match="'outdate_d'; they begin like one of .*marks"):
        grow.main([str(folder), str(tmp_path / "out"), "--fresh", "outdate_d"])
    assert not (tmp_path / "out").exists()


def test_the_mean_lies_between_two_memories(tmp_path):
    """Catches a mean of one memory with itself, statistics of inputs that are averaged too, and two that have nothing in common."""
    folder = toy_model(tmp_path / "before")
    one = GemmaWithMemory.from_pretrained(folder)
    for p in one.trainable_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    one.injection.state_mean += 1
    one.save_pretrained(tmp_path / "after")
    mean.main([str(folder), str(tmp_path / "after"), str(tmp_path / "mean")])
    before, after, found = (GemmaWithMemory.from_pretrained(tmp_path / name).injection for name in ("before", "after", "mean"))
    for (name, a), b, m in zip(before.named_parameters(), after.parameters(), found.parameters()):
        torch.testing.assert_close(m, (a + b) / 2, rtol=0, atol=(a.abs() + b.abs()).max().item() / 127, msg=name)
        assert not torch.equal(a, m) and not torch.equal(b, m), name
    assert torch.equal(found.state_mean, after.state_mean)
    with pytest.raises(InputError, match="same settings"):
        mean.main([str(toy_model(tmp_path / "other", reading_layers=2)), str(tmp_path / "after"), str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_no_memory_is_written_over(tmp_path, monkeypatch):
    """Catches a trained memory that is gone because another was to be called the same, and files among those of the project."""
    folder = toy_model(tmp_path / "toy")
    (tmp_path / "file").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    monkeypatch.chdir(tmp_path)
    for out, what in ((str(folder), "which holds a memory"), ("file", "where there is a file"), ("tiny", "the name of a memory that ships")):
        with pytest.raises(InputError, match=f"expected a new folder to write to, got .*, {what}"):
            grow.main([str(folder), out])
        with pytest.raises(InputError, match="expected a new folder"):
            mean.main([str(folder), str(folder), out])
    assert before == {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} and (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "tiny").exists()


def test_more_candidates_are_compared(tmp_path):
    """Catches a setting that isn't saved, weights that are another memory's after that, and a number that no memory can have."""
    folder = toy_model(tmp_path / "toy")
    grow.main([str(folder), str(tmp_path / "wider"), "--candidates", "96"])
    old, new = map(GemmaWithMemory.from_pretrained, (folder, tmp_path / "wider"))
    assert new.config == replace(old.config, candidates=96) and old.config.candidates != 96
    assert all(torch.equal(p, q) for p, q in zip(old.injection.parameters(), new.injection.parameters()))
    deeper = old.config.reading_layers + 2                                 # both at once, and back to what training had
    grow.main([str(tmp_path / "wider"), str(tmp_path / "deeper"), "--reading-layers", str(deeper), "--candidates", str(old.config.candidates), "--readable", "3"])
    config = GemmaWithMemory.from_pretrained(tmp_path / "deeper").config
    assert config == replace(old.config, reading_layers=deeper, readable=3) and old.config.readable != 3
    with pytest.raises(InputError, match="candidates from 1 to 4096"):
        grow.main([str(folder), str(tmp_path / "none"), "--candidates", "0"])
