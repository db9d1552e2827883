"""LoRA: adapters beside the base's tensors, merged and not, that never touch the base."""

import pytest
import torch

from gemma import Gemma, InputError
from tests.toy import one_thread, toy_base                                 # noqa: F401
from variants.lora import LoRA, LoraConfig

IDS = torch.tensor([[2, 150, 151, 300, 301, 302], [2, 400, 401, 402, 300, 150]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Gemma.from_pretrained(toy_base(tmp_path_factory.mktemp("base")))


def trained(base, **options):
    """A LoRA whose changes are not zero, as after training."""
    torch.manual_seed(0)
    lora = LoRA(LoraConfig(lora_rank=4, **options), base).eval()
    for name, p in lora.named_parameters():
        if name.endswith("up"):
            torch.nn.init.normal_(p, std=0.1)
    return lora


def test_starts_as_the_base(base):
    """Catches two random factors: an untrained adapter must leave every logit as it is, to the bit."""
    assert torch.equal(LoRA(LoraConfig(lora_rank=4), base).gemma(IDS), base(IDS))


def test_equals_the_formula(base):
    """Catches a transposed factor or a wrong scale: the adapted projection is W + alpha / r · up · down."""
    lora = trained(base, lora_alpha=6.0)
    adapter, projection = lora.adapters["layers/1/mlp/down_proj"], lora.gemma.layers[1].mlp.down_proj
    x = torch.randn(3, 64)
    torch.testing.assert_close(projection(x), x @ (base.layers[1].mlp.down_proj.weight + 1.5 * adapter.up @ adapter.down).T)


def test_merged_equals_unmerged_and_goes_back_to_the_bit(base):
    """Catches a merge that forgets the scale, counts the adapter twice, or leaves rounding errors behind when it is undone."""
    lora = trained(base)
    beside = lora.gemma(IDS)
    assert not torch.allclose(beside, base(IDS), atol=1e-2)
    lora.merge(), lora.merge()
    torch.testing.assert_close(lora.gemma(IDS), beside, rtol=1e-4, atol=1e-4)
    lora.unmerge()
    assert torch.equal(lora.gemma(IDS), beside)


def test_the_base_and_other_adapters_see_nothing(base):
    """Catches adapters, hooks or merged weights that leak into a base that other memories share."""
    before, fingerprint = base(IDS), base.fingerprint()
    one, other = trained(base), trained(base)
    alone = other.gemma(IDS)
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    one.train().gemma(IDS).logsumexp(-1).sum().backward()
    optimizer.step()
    one.merge()
    assert torch.equal(base(IDS), before) and base.fingerprint() == fingerprint and torch.equal(other.gemma(IDS), alone)
    assert all(p.grad is None for p in base.parameters())
    assert all(any(p is q for q in base.parameters()) for p in other.gemma.parameters() if p.requires_grad is False)


@pytest.mark.parametrize("targets, per_layer", [("attention", 4), ("mlp", 3), ("attention,mlp", 7), ("q_proj,v_proj", 2), ("mlp,down_proj", 3)])
def test_targets(base, targets, per_layer):
    """Catches a target that adapts other projections than it names; every factor gets a gradient, none of the base does."""
    lora = trained(base, lora_targets=targets)
    assert len(lora.adapters) == per_layer * 4
    lora.gemma(IDS)[..., 5].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters())


def test_dropout_only_while_training(base):
    """Catches adapters that stay in training mode because they are no submodules of the adapted model's parent."""
    lora = trained(base, lora_dropout=0.5)
    assert torch.equal(lora.gemma(IDS), lora.gemma(IDS))
    lora.train()
    assert not torch.equal(lora.gemma(IDS), lora.gemma(IDS))


@pytest.mark.parametrize("options", [dict(lora_rank=-1), dict(lora_dropout=1.0), dict(lora_targets="attention,heads"), dict(lora_targets=""),
                                     dict(lora_alpha=float("nan"))])
def test_bad_settings_are_named(options):
    """Catches a setting that fails somewhere inside PyTorch, or trains nothing."""
    with pytest.raises(InputError, match=next(iter(options))):
        LoraConfig(**options).check("test")
