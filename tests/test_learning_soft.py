"""Supports that move while training: rules against their definitions, and hardening without a change in outputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_compile import LookupConv2d
from lcnn_compile.errors import ConfigError, ConversionError
from lcnn_compile.learning import distill, harden, soft_taps, soften, sparsity_penalty


def layer(sparsity=2.0, group_size=3, **options):
    torch.manual_seed(0)
    return LookupConv2d(6, 10, 3, padding=1, dictionary_size=4, sparsity=sparsity, group_size=group_size, **options)


def network(sparsity=None):
    torch.manual_seed(0)
    sizes = {"dictionary_size": 0.5, "sparsity": sparsity, "group_size": 2}
    return nn.Sequential(
        LookupConv2d(3, 12, 3, padding=1, dictionary_size=3, sparsity=sparsity, group_size=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        LookupConv2d(12, 16, 3, padding=1, **sizes),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def x(channels=6):
    return torch.randn(2, channels, 7, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"bias": False, "stride": 2, "dilation": 2}])
def test_softening_and_hardening_change_no_output(options):
    module = layer(**options)
    wanted = module(x())
    soft = soften(copy.deepcopy(module))
    torch.testing.assert_close(soft(x()), wanted, rtol=1e-5, atol=1e-6)
    hard = harden(soft)
    assert type(hard) is LookupConv2d
    assert hard.lookup_weight().validate().taps == module.lookup_weight().taps
    torch.testing.assert_close(hard(x()), wanted, rtol=1e-5, atol=1e-6)


def test_top_keeps_the_strongest_taps_of_the_layer_and_gradients_reach_all():
    soft = soften(layer(sparsity=None), sparsity=1.5)
    original = soft.parametrizations.coefficients.original
    with torch.no_grad():
        original[:36] *= 1e-3  # the first filter group has weak taps only
    members = (soft.filters >= 0).sum(1)
    strengths = (original.detach().square().sum(1).view(4, 36) / members[:, None]).sqrt()
    kept = (soft.coefficients != 0).any(1).view(4, 36)
    assert torch.equal(kept.sum(1) > 0, torch.ones(4, dtype=torch.bool))
    assert int((kept.sum(1) * members).sum()) <= 1.5 * 9 * 10 < int((kept.sum(1) * members).sum()) + 3
    assert strengths[1:][kept[1:]].min() >= strengths[1:][~kept[1:]].max()
    assert kept[0].sum() == 1
    soft(x()).square().sum().backward()
    assert (original.grad[:, 0] != 0).float().mean() > 0.95


def test_threshold_zeroes_weak_taps_and_their_gradient():
    soft = soften(layer(sparsity=None, group_size=1), rule="threshold", epsilon=0.05, penalty=0.3)
    original = soft.parametrizations.coefficients.original
    weak = original.detach().abs() <= 0.05
    assert 0.1 < weak.float().mean() < 0.9
    assert torch.equal(soft.coefficients == 0, weak)
    soft(x()).square().sum().backward()
    assert not original.grad[weak].any()
    assert (original.grad[~weak] != 0).float().mean() > 0.95
    torch.testing.assert_close(sparsity_penalty(soft), 0.3 * 0.05 * original.abs().sum())
    (sparsity_penalty(soft)).backward()
    assert original.grad[weak].all()
    hard = harden(soft)
    assert hard.lookup_weight().taps == int((~weak).sum())
    torch.testing.assert_close(hard(x()), soft(x()), rtol=1e-5, atol=1e-6)


def test_the_default_threshold_is_the_papers():
    module = layer(sparsity=None)
    rule = soften(module, rule="threshold").parametrizations.coefficients[0]
    sigma = float(nn.Conv2d(6, 4096, 3).weight.detach().std())
    assert rule.epsilon == pytest.approx(0.01 * sigma, rel=0.02)
    assert rule.penalty == pytest.approx(0.2 * rule.epsilon)


def task(count=256):
    """Four kinds of texture: stripes of two directions and two widths."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(4, (count,), generator=generator)
    axis = torch.arange(12.0)
    waves = torch.stack([torch.sin(axis * f) for f in (1.0, 2.2)])
    images = torch.stack(
        [waves[label // 2].expand(12, 12) if label % 2 else waves[label // 2, :, None].expand(12, 12) for label in labels]
    )
    return images[:, None] + 0.5 * torch.randn(count, 3, 12, 12, generator=generator), labels


@pytest.mark.parametrize("rule", [{"rule": "top", "sparsity": 0.5}, {"rule": "threshold", "epsilon": 0.04, "penalty": 0.01}])
def test_a_network_learns_from_scratch(rule):
    inputs, labels = task()
    model = soften(network(), **rule)
    before = dict(soft_taps(model))
    batches = list(zip(inputs.split(32), labels.split(32), strict=True))
    supports = {name: (module.coefficients != 0).any(1) for name, module in model.named_children() if name in before}
    distill(model, nn.Identity(), batches, epochs=12, lr=0.1, label_weight=1.0, progress=False)
    model.eval()
    hard = harden(model)
    torch.testing.assert_close(hard(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    assert float((hard(inputs).argmax(1) == labels).float().mean()) > 0.9
    moved = {n: (model.get_submodule(n).coefficients != 0).any(1) != support for n, support in supports.items()}
    assert any(change.any() for change in moved.values())
    if rule["rule"] == "top":
        assert all(taps <= 0.5 * 9 for taps in dict(soft_taps(model)).values())
    else:
        assert dict(soft_taps(model))["3"] < before["3"]


def test_a_moved_support_beats_a_poor_one():
    torch.manual_seed(0)
    teacher = nn.Conv2d(6, 8, 3, padding=1)
    inputs = [torch.randn(8, 6, 9, 9) for _ in range(8)]
    fixed = LookupConv2d(6, 8, 3, padding=1, dictionary_size=6, sparsity=1, group_size=2)
    moving = soften(copy.deepcopy(fixed))
    losses = [distill(m, teacher, inputs, epochs=25, lr=0.1, progress=False).epochs[-1].loss for m in (fixed, moving)]
    assert losses[1] < 0.85 * losses[0]
    assert harden(moving).lookup_weight().taps <= fixed.lookup_weight().taps


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConversionError, match="no lookup module"):
        soften(nn.Conv2d(3, 4, 3))
    with pytest.raises(ConversionError, match="no soft"):
        harden(layer())
    with pytest.raises(ConfigError, match="rule"):
        soften(layer(), rule="lasso")
    with pytest.raises(ConfigError, match="epsilon"):
        soften(layer(), rule="threshold", epsilon=-1.0)
    with pytest.raises(ConfigError, match="soft already"):
        soften(soften(layer()))


def test_full_precision_is_kept():
    module = layer().double()
    torch.testing.assert_close(harden(soften(copy.deepcopy(module)))(x().double()), module(x().double()))
    assert F.mse_loss(soften(module)(x().double()), module(x().double())) == 0
