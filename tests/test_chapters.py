"""The learned bank: its matrices, its few bits, its router, and how it sits in a Gemma."""

import copy
import math

import pytest
import torch

from gemma import Gemma, InputError, KVCache
from tests.toy import one_thread, toy_base                                 # noqa: F401
from variants.chapters import Chapters, ChaptersConfig, Matrix, Reader, dequantise, groups, placed, quantise, rolling_mean, router_losses

IDS = torch.tensor([[2, 150, 151, 300, 301, 302], [2, 400, 401, 402, 300, 150]])
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Gemma.from_pretrained(toy_base(tmp_path_factory.mktemp("base")))


def bank(base, loud=True, **options):
    """A small bank; loud: it says something, as after training."""
    torch.manual_seed(0)
    config = ChaptersConfig(**{**dict(bank=24, heads=2, head_dim=8, placement="all", zero_output=not loud), **options})
    config.check("test")
    return Chapters(config, base.config.hidden_size, len(base.layers)).eval()


# ------------------------------------------------------------------------------------------------------------ matrices

def test_factors_equal_the_dense_product():
    """Catches a transposed or missing factor in the shortcuts that never make the dense matrix."""
    torch.manual_seed(0)
    bank, thin, full = Matrix(40, 24, 6, 1.0), Matrix(10, 24, 3, 1.0), Matrix(10, 24, 0, 1.0)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(bank(x), x @ (bank.a @ bank.b.T).T)
    for projection in (thin, full):
        torch.testing.assert_close(bank.through(projection), bank.dense() @ projection.dense().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2, 16, 128])
def test_factors_keep_the_variance(rank):
    """Catches factors drawn with the full matrix's own spread: the product's would grow or shrink with the rank."""
    torch.manual_seed(0)
    assert Matrix(1500, 1200, rank, 0.05).dense().std().item() == pytest.approx(0.05, rel=0.15 if rank == 2 else 0.05)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [6, 7])
def test_few_bits_within_half_a_step(bits, columns):
    """Catches clipping, mixed-up nibbles, a lost odd column, or a row of zeros that becomes NaN."""
    torch.manual_seed(0)
    matrix = torch.randn(9, columns) * torch.logspace(-3, 3, 9)[:, None]
    matrix[4] = 0.0
    whole, step = quantise(matrix, bits)
    again = dequantise(whole, step, columns)
    assert whole.element_size() * whole.shape[1] == (columns if bits == 8 else (columns + 1) // 2)
    assert ((again - matrix).abs() <= step[:, None] * 0.5001).all()
    assert torch.allclose(again.abs().amax(1), matrix.abs().amax(1)) and (again[4] == 0).all()
    assert all(torch.equal(x, y) for x, y in zip(quantise(again, bits)[:1], (whole,)))


@pytest.mark.parametrize("rank", [0, 4])
def test_packing_changes_no_answer(base, rank):
    """Catches training on other numbers than those that are kept; and packed banks that still train, or can't be unpacked."""
    for storage in ("int8", "int4"):
        model = bank(base, storage=storage, rank=rank)
        before, n = base(IDS, injection=model), sum(p.numel() for p in model.banks.parameters())
        kept = {name: t for i, bank in enumerate(model.banks) for name, t in bank.packed().items()}
        model.banks[0].pack()
        assert set(kept) == set(dict(model.banks[0].named_buffers()))
        assert torch.equal(base(IDS, injection=model), before) and not list(model.banks.parameters())
        stored = sum(b.numel() for name, b in model.banks.named_buffers() if name.endswith("packed"))
        assert stored == n if storage == "int8" else stored == n // 2
        model.banks[0].unpack()
        torch.testing.assert_close(base(IDS, injection=model), before)
        assert sum(p.numel() for p in model.banks.parameters()) == n


def test_rounding_lets_the_gradient_through(base):
    """Catches rounding whose gradient is zero everywhere: the bank would never learn."""
    model = bank(base, storage="int4").train()
    base(IDS, injection=model)[..., 5].sum().backward()
    assert model.banks[0].full.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------------------------- router

def test_losses_equal_hand_computed_values():
    """Catches a wrong formula: Switch's balance, the importance loss and the z-loss of two decisions on two chapters."""
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(9.0), 0.0]])     # probabilities 3/4 1/4 and 9/10 1/10
    P = (0.825, 0.175)
    losses = router_losses(logits, 1)
    assert losses["balance"].item() == pytest.approx(2 * (1.0 * P[0] + 0.0 * P[1]))
    assert losses["auxiliary"].item() == pytest.approx(((P[0] - P[1]) / 2) ** 2 / 0.25)
    assert losses["z_loss"].item() == pytest.approx((math.log(4.0) ** 2 + math.log(10.0) ** 2) / 2)
    assert router_losses(logits, 2)["balance"].item() == pytest.approx(1.0)     # each is chosen every time
    assert router_losses(torch.zeros(8, 4), 4)["balance"].item() == pytest.approx(1.0)


def test_losses_are_weighted_and_reach_the_router(base):
    """Catches weights that are mixed up, and losses computed from values without a gradient."""
    model = bank(base, chapters=4, balance=2.0, auxiliary=3.0, z_loss=5.0)
    base(IDS, injection=model)
    total, each = model.losses()
    torch.testing.assert_close(total, 2 * each["balance"] + 3 * each["auxiliary"] + 5 * each["z_loss"])
    total.backward()
    assert all(reader.router.weight.grad.abs().sum() > 0 for reader in model.readers.values())
    assert bank(base).losses() == (0, {})                                  # without chapters there is nothing to balance


@pytest.mark.parametrize("routing", ["rolling", "token"])
def test_losses_are_of_words_alone(base, routing):
    """Catches padding and <bos> that are balanced among the chapters as if they were read for."""
    model = bank(base, chapters=4, routing=routing, window=2)
    with torch.no_grad():
        base(IDS[:1, :4], injection=model)
        alone, decisions = model.losses()[0], len(model.logits[0])
        base(torch.tensor([[0, 0, *IDS[0, :4]]]), torch.tensor([[0, 0, 1, 1, 1, 1]]), injection=model)
    assert decisions == len(model.logits[0]) == 3
    torch.testing.assert_close(model.losses()[0], alone)


@pytest.mark.parametrize("routing", ["sequence", "rolling", "token", "hybrid"])
def test_all_chapters_are_no_routing(base, routing):
    """Catches chapters that are normalised one by one, weighted by the router, or put together in the wrong order."""
    routed, plain = bank(base, chapters=4, top_k=4, routing=routing), bank(base)
    plain.load_state_dict({name: t for name, t in routed.state_dict().items() if "router" not in name})
    torch.testing.assert_close(base(IDS, None, PROMPT, injection=routed), base(IDS, None, PROMPT, injection=plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base(IDS, injection=plain), base(IDS), atol=1e-2)


def test_chosen_chapters_alone_are_read(base):
    """Catches reading what wasn't chosen, a gate other than the chosen chapters' share of the probability, and a gradient that
    tells the router of another chapter than the one that was read: here each token's score has its chapter's share added."""
    model = bank(base, chapters=4, top_k=2)
    reader, h = model.readers["1"], torch.randn(1, 3, base.config.hidden_size)
    model.begin(IDS[:1, :3], None, None, None)
    route = model.route(reader, 1, h)
    k, v = reader.keys_and_values(model.banks[0])                          # (C, S, H, c)
    expected = []
    for row in range(3):
        chosen, share = route.chosen[row], route.log_share[row]
        q = reader.q_norm(reader.q_proj(reader.norm(h[0, row])).view(2, 8))
        scores = torch.einsum("hc,kshc->hks", q, k[chosen]) / 8 ** 0.5 + (share - share.detach())[:, None]
        weights = scores.flatten(1).softmax(-1)
        expected.append(reader.o_proj(torch.einsum("hs,shc->hc", weights, v[chosen].flatten(0, 1)).flatten() * share.exp().sum()))
    expected, read = torch.stack(expected), reader(h, model.banks[0], route)[0]
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    gradient = lambda out: torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), reader.router.weight, retain_graph=True)[0]
    torch.testing.assert_close(gradient(read), gradient(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_answer_teaches_the_router(base, top_k):
    """Catches a choice through which no gradient reaches the router: it would learn from its own losses alone. With one chapter
    it comes through the gate; with all of them, whose gate is always 1, through which of them is attended to."""
    model = bank(base, chapters=4, top_k=top_k)
    base(IDS, None, PROMPT, injection=model)[..., 5].sum().backward()
    assert all(reader.router.weight.grad.abs().sum() > 1e-3 for reader in model.readers.values())


def test_what_the_router_looks_at(base):
    """Catches <bos>, whose state is an outlier, or an answer in the mean of a prompt; each kind of routing by hand."""
    h = torch.randn(2, 6, base.config.hidden_size)
    first, second = h[0, 1:3].mean(0), h[1, 1:4].mean(0)                   # what PROMPT marks, without <bos>
    model = bank(base, chapters=4, window=2)
    model.begin(IDS, None, PROMPT, None)
    torch.testing.assert_close(model.state(1, h)[:, 0], torch.stack((first, second)))
    model.config.routing = "hybrid"
    rolling = [h[0, i - 1:i + 1].mean(0) for i in (3, 4, 5)]
    torch.testing.assert_close(model.state(1, h)[0], torch.stack((torch.zeros_like(first), first, first, *rolling)))


def test_rolling_mean_by_hand():
    """Catches a window that is one too long or too short, counts padding, or forgets what came before it."""
    x, mask = torch.arange(1.0, 7.0).view(1, 6, 1), torch.tensor([[False, True, True, False, True, True]])
    mean, _ = rolling_mean(x, mask, None, 3)
    assert mean.flatten().tolist() == pytest.approx([0, 2, 2.5, 2.5, 4, 5.5])
    start, before = rolling_mean(x[:, :2], mask[:, :2], None, 3)
    middle, before = rolling_mean(x[:, 2:3], mask[:, 2:3], before, 3)
    end, _ = rolling_mean(x[:, 3:], mask[:, 3:], before, 3)
    assert torch.allclose(torch.cat((start, middle, end), 1), mean)


# ------------------------------------------------------------------------------------------------------------ in Gemma

EVERY = [dict(), dict(order="B"), dict(sharing="layer"), dict(sharing="every:2"), dict(width=20, rank=4, projection_rank=3),
         dict(chapters=4), dict(chapters=4, top_k=2, routing="rolling", window=2), dict(chapters=4, routing="token"),
         dict(chapters=4, routing="hybrid", window=2), dict(placement="2,4", storage="int4")]


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_starts_as_the_base_and_leaves_it_so(base, options):
    """Catches an output that isn't zero at first, a bank that trains the base, and options under which nothing learns."""
    model, before, fingerprint = bank(base, loud=False, **options).train(), base(IDS), base.fingerprint()
    assert torch.equal(base(IDS, None, PROMPT, injection=model), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):              # o_proj moves first, then what is behind it
        optimizer.zero_grad()
        (base(IDS, None, PROMPT, injection=model)[..., 5].sum() + model.losses()[0]).backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in model.banks.parameters())
    assert not torch.allclose(base(IDS, None, PROMPT, injection=model), before, atol=1e-3)
    assert torch.equal(base(IDS), before) and base.fingerprint() == fingerprint and base.embed_tokens.weight.grad is None


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_cached_equals_uncached(base, options):
    """Catches a pool or kept keys that a later token of the same request doesn't find again, or finds in another layer."""
    model, whole = bank(base, **options), torch.cat((IDS, torch.tensor([[303, 304, 305], [151, 160, 161]])), 1)
    prompt = torch.tensor([[1] * 6 + [0] * 3] * 2)
    with torch.no_grad():
        for marked in (prompt, None):
            expected, cache = base(whole, None, marked, injection=model), KVCache(base.config, 2, 9, base.dtype, base.device)
            parts = [base(whole[:, :6], None, None if marked is None else marked[:, :6], cache, model)]
            parts += [base(whole[:, i:i + 1], None, None, cache, model) for i in range(6, 9)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_keys_are_worked_out_once_a_request(base, monkeypatch):
    """Catches a whole bank that is projected anew for every token, and one that a later request finds as it was before."""
    model, calls, worked_out = bank(base), [], Reader.keys_and_values
    monkeypatch.setattr(Reader, "keys_and_values", lambda self, bank: calls.append(self) or worked_out(self, bank))
    first = base.generate(IDS, max_new_tokens=3, stop=(), injection=model)
    assert len(calls) == len(model.readers) == 4
    with torch.no_grad():
        model.banks[0].full.mul_(-1.0)
    assert not torch.equal(base.generate(IDS, max_new_tokens=3, stop=(), injection=model), first) and len(calls) == 8


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_rows_and_padding_do_not_mix(base, options):
    """Catches a router that averages over padding or over the batch, and <bos> in the pool."""
    model = bank(base, **options)
    with torch.no_grad():
        alone = base(IDS[:1, :4], None, torch.ones(1, 4), injection=model)
        padded, mask = torch.cat((torch.zeros(1, 2, dtype=torch.long), IDS[:1, :4]), 1), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        both = base(torch.cat((padded, IDS[1:])), mask, mask, injection=model)
    torch.testing.assert_close(both[:1, 2:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ["sequence", "rolling", "token", "hybrid"])
def test_no_position_sees_its_future(base, routing):
    """Catches a router that looks at the whole of a text while it trains on predicting it."""
    model, other = bank(base, chapters=4, routing=routing), IDS.clone()
    other[:, 4:] = 333
    with torch.no_grad():
        for marked in (None, PROMPT):
            one, two = base(IDS, None, marked, injection=model), base(other, None, marked, injection=model)
            torch.testing.assert_close(one[:, :4], two[:, :4], rtol=1e-4, atol=1e-4)


def test_routing_may_change_when_asking(base):
    """Catches a router whose kind is fixed when it is made: what was trained one way may be asked another."""
    model = bank(base, chapters=4)
    with torch.no_grad():
        said = []
        for model.config.routing in ("sequence", "rolling", "token", "hybrid"):
            model.config.window = 2
            said.append(base(IDS, None, PROMPT, injection=model))
    assert all(not torch.equal(a, b) for i, a in enumerate(said) for b in said[:i])
    question = PROMPT.bool()[..., None]
    torch.testing.assert_close(said[3][question.expand_as(said[3])], said[0][question.expand_as(said[0])], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(chapters=4, top_k=2), dict(rank=4, projection_rank=3, storage="int4")], ids=str)
def test_half_precision(base, options):
    """Catches tensors of two types that meet, as on a GPU: bfloat16 weights, or autocast while training."""
    model = bank(base, **options)
    exact = base(IDS, None, PROMPT, injection=model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = base(IDS, None, PROMPT, injection=model)
        (mixed.float().sum() + model.losses()[0]).backward()
    half = copy.deepcopy(base).to(torch.bfloat16)(IDS, None, PROMPT, injection=model)
    assert half.dtype == torch.bfloat16
    for other in (mixed, half):
        assert torch.corrcoef(torch.stack((other.float().flatten(), exact.flatten())))[0, 1] > 0.98


def test_bos_and_padding_are_left_alone(base):
    """Catches reading at <bos>: what is added grows with the state it is added to, and that of <bos> is enormous."""
    model, h, mask = bank(base), torch.randn(2, 6, base.config.hidden_size), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    model.begin(IDS, mask, PROMPT, None)
    changed = (model.read(1, h) != h).any(-1)
    assert torch.equal(changed, mask.bool() & (IDS != 2))


def test_orders_differ_and_vanilla_is_the_base(base):
    """Catches an order that is read but not used, and a vanilla run that still has something to train."""
    a, b, none = bank(base), bank(base, order="B"), bank(base, vanilla=True)
    b.load_state_dict(a.state_dict())
    assert not torch.allclose(base(IDS, injection=a), base(IDS, injection=b), atol=1e-2)
    assert torch.equal(base(IDS, injection=none), base(IDS)) and not list(none.parameters())


def test_placement_and_sharing():
    """Catches layers counted from 0, and banks that are shared by other layers than asked."""
    assert placed("all", 4) == [1, 2, 3, 4] and placed("first:2", 12) == [1, 2] and placed("last:2", 12) == [11, 12]
    assert placed("every:4", 12) == [4, 8, 12] and placed("9, 5,2", 12) == [2, 5, 9]
    assert groups("one", 5) == [0] * 5 and groups("layer", 3) == [0, 1, 2] and groups("every:2", 5) == [0, 0, 1, 1, 2]
    for text in ("", "first:0", "last:13", "every:x", "0,1", "13", "2,2,x", "middle", "first"):
        with pytest.raises(InputError, match="placement"):
            placed(text, 12)
    for text in ("", "none", "every:0", "every"):
        assert groups(text, 4) is None, text


def test_parameter_groups(base):
    """Catches a parameter that no group holds, or two do, and multiples that land on another part."""
    model = bank(base, chapters=4, bank_lr=3.0, router_lr=0.5)
    grouped = model.parameter_groups()
    assert [factor for _, factor in grouped] == [3.0, 0.5, 1.0, 1.0]
    assert sorted(id(p) for part, _ in grouped for p in part) == sorted(map(id, model.parameters()))
    assert grouped[0][0] == list(model.banks.parameters()) and len(grouped[1][0]) == 4


@pytest.mark.parametrize("options", [dict(bank=0), dict(chapters=5), dict(top_k=2), dict(placement="5"), dict(sharing="some"), dict(order="C"),
                                     dict(routing="never"), dict(storage="int2"), dict(balance=-1.0), dict(z_loss=float("nan")), dict(rank=-1)], ids=str)
def test_bad_settings_are_named(base, options):
    """Catches a setting that fails somewhere inside PyTorch."""
    with pytest.raises(InputError, match=next(iter(options))):
        bank(base, **options)
