"""Frozen models against the models they were made of."""

import pytest
import torch
from nets import SmallResNet, randomise
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d, convert, freeze
from lcnn_compile.kernels import cpu


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = SmallResNet(8)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x, scale):
        return {"scores": self.net(x), "map": (self.conv(x) * scale, scale)}


def lookups(model, lowering="lookup", precision="float32"):
    batches = [torch.randn(4, 3, 16, 16)]
    config = LookupConfig(dictionary_size=0.5, sparsity=4, group_size=4, lowering=lowering, precision=precision)
    return convert(
        randomise(model).eval(),
        config,
        calibration=batches if not isinstance(model, TwoOutputs) else [(batches[0], torch.tensor(2.0))],
    )


@pytest.mark.parametrize("lowering", ["lookup", "factored"])
def test_frozen_is_the_model(lowering):
    model = lookups(SmallResNet(8), lowering)
    frozen = freeze(model, torch.randn(2, 3, 16, 16))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            exact = model.double()(x.double())
            model.float()
        torch.testing.assert_close(frozen(x).double(), exact, rtol=1e-4, atol=1e-4)
    assert not frozen(x).requires_grad


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
def test_rounding_leaves_one_program():
    model, x = lookups(SmallResNet(8), precision="bfloat16"), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    with torch.no_grad():
        expected = model.eval()(x)
    assert frozen.alone == freeze(lookups(SmallResNet(8)), x).alone
    assert not any("batch_norm" in str(node.target) for node in frozen.graph.graph.nodes)
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
def test_programs_hold_linear_layers_and_factors():
    class Scaled(SmallResNet):
        def forward(self, x):
            return super().forward(x) * 0.125

    model, x = lookups(Scaled(8)), torch.randn(3, 3, 16, 16)
    frozen = freeze(model, x)
    # The first convolution may stay dense: that is measured.
    assert not any(word in str(node.target) for node in frozen.graph.graph.nodes for word in ("linear", "mul"))
    with torch.no_grad():
        exact = model.double()(x.double())
    torch.testing.assert_close(frozen(x).double(), exact, rtol=1e-4, atol=1e-5)


def test_structured_outputs_and_several_inputs():
    model = lookups(TwoOutputs())
    inputs = (torch.randn(2, 3, 16, 16), torch.tensor(-1.5))
    frozen = freeze(model, inputs)
    with torch.no_grad():
        expected = model(*inputs)
    found = frozen(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
def test_weights_are_constants():
    layers = [LookupConv2d(*sizes, dictionary_size=4, sparsity=2, group_size=3) for sizes in ((5, 9, 3), (9, 7, 1))]
    for layer in layers:
        layer.lowering = "lookup"
    model = nn.Sequential(layers[0], nn.ReLU(), nn.MaxPool2d(2), layers[1]).eval()
    x = torch.randn(2, 5, 17, 14)
    frozen = freeze(model, x)
    assert frozen.alone
    before = frozen(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    assert torch.equal(frozen(x), before)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    model = lookups(SmallResNet(8))
    frozen = freeze(model, torch.randn(2, 3, 16, 16))
    for wrong in (torch.randn(2, 3, 16, 17), torch.randn(2, 3, 16, 16).double(), torch.randn(3, 16, 16)):
        with pytest.raises(LcnnError, match="freeze it again"):
            frozen(wrong)
    with pytest.raises(LcnnError, match="takes"):
        frozen(torch.randn(2, 3, 16, 16), 3)
    with pytest.raises(LcnnError, match="lookup"):
        freeze(SmallResNet(8), torch.randn(2, 3, 16, 16))
    fixed = freeze(model, torch.randn(2, 3, 16, 16), dynamic_batch=False)
    with pytest.raises(LcnnError, match="freeze it again"):
        fixed(torch.randn(3, 3, 16, 16))
