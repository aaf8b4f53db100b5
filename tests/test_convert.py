"""convert() and explain() on models of every kind."""

import warnings

import pytest
import torch
from nets import Functional, SmallResNet, Untraceable, pictures, randomise
from torch import nn
from torch.nn.utils import parametrizations

from lcnn_compile import LcnnError, LcnnWarning, LookupConfig, LookupConv2d, LookupLinear, convert, explain
from lcnn_compile.testing import assert_equivalent

FULL = LookupConfig(dictionary_size=1.0, sparsity=None)
SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)


def calibration():
    return [pictures(4), pictures(4)]


@pytest.mark.parametrize("factory", [SmallResNet, Untraceable, Functional])
def test_full_size_is_the_dense_network(factory):
    model = randomise(factory())
    converted = convert(model, FULL, calibration=calibration())
    assert converted.lcnn_report.replaced
    assert_equivalent(model, converted, pictures(3, 19), factor=16)


@pytest.mark.parametrize("factory", [SmallResNet, Untraceable])
def test_report_and_original_untouched(factory):
    model = randomise(factory())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    converted = convert(model, SMALL, calibration=calibration())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, LookupConv2d) for m in model.modules())
    convs = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {row.name for row in converted.lcnn_report if row.kind == "Conv2d"} == convs
    for row in converted.lcnn_report.replaced:
        layer = converted.get_submodule(row.name)
        assert isinstance(layer, LookupConv2d)
        assert (row.dictionary_size, row.group_size) == (layer.dictionary_size, layer.group_size)
        assert row.error is None or 0 <= row.error < 1.5
        assert row.bytes_after == layer.lookup_weight().nbytes() + (0 if layer.bias is None else layer.bias.numel() * 4)
        assert row.lowering in ("lookup", "factored", "dense")
    assert str(converted.lcnn_report)


def test_multiply_adds_are_counted():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 5))
    report = convert(model, SMALL, calibration=[pictures(4, 8, 8)]).lcnn_report
    assert report["0"].macs_before == 16 * 8 * 9 * 16
    assert report["0"].macs_after == 3 * 8 * 64 + 16 * 18 * 16
    assert report["3"].macs_before == 16 * 16 * 5


def test_a_module_used_twice_is_one_module():
    model = randomise(Untraceable())
    converted = convert(model, SMALL, calibration=calibration())
    assert converted.alias is converted.loop
    assert isinstance(converted.loop, LookupConv2d)


def test_the_better_size_has_the_smaller_error():
    model = randomise(SmallResNet())
    rows = [
        convert(model, LookupConfig(dictionary_size=k, sparsity=s), calibration=calibration()).lcnn_report["layers.0.conv1"]
        for k, s in ((2, 1), (6, 4), (1.0, None))
    ]
    assert rows[0].error > rows[1].error > rows[2].error
    assert rows[2].error < 1e-9


def test_convolutions_that_are_left_say_why():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
        Own(8, 8, 3, padding=1),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Conv2d(8, 8, 3),
    )
    report = explain(model, example_inputs=(pictures(1),))
    reasons = ["too few", "depthwise", "parametrised", "forward of its own", "", ""]
    for row, reason in zip(report, reasons, strict=True):
        assert reason in row.reason
        assert row.replaced == (not reason)
    converted = convert(model, SMALL.replace(exclude=("0",)), calibration=calibration())
    assert converted.lcnn_report["0"].reason == "excluded"
    assert [row.name for row in converted.lcnn_report.replaced] == ["4", "5"]


def test_nothing_replaced_is_said_loudly():
    with pytest.warns(LcnnWarning, match="replaced nothing"):
        convert(nn.Sequential(nn.Linear(4, 4)), calibration=[torch.randn(2, 4)])
    with pytest.raises(LcnnError, match="matches no layer"):
        convert(SmallResNet(), LookupConfig(exclude=("conv9",)), calibration=calibration())


def test_linear_layers_by_rule():
    model = randomise(SmallResNet())
    converted = convert(model, FULL.replace(include=("fc",)), calibration=calibration())
    assert isinstance(converted.fc, LookupLinear)
    assert [row.name for row in converted.lcnn_report.replaced] == ["fc"]
    assert_equivalent(model, converted, pictures(2))


def test_without_calibration_it_works_and_says_so():
    with pytest.warns(LcnnWarning, match="calibration"):
        converted = convert(randomise(SmallResNet()), SMALL, example_inputs=pictures(1))
    assert all(row.error is None for row in converted.lcnn_report.replaced)


def test_explain_agrees_with_convert():
    model = randomise(SmallResNet())
    planned, done = (
        explain(model, SMALL, example_inputs=pictures(1)),
        convert(model, SMALL, calibration=calibration()).lcnn_report,
    )
    for a, b in zip(planned, done, strict=True):
        assert (a.name, a.replaced, a.dictionary_size, a.group_size, a.macs_before) == (
            b.name,
            b.replaced,
            b.dictionary_size,
            b.group_size,
            b.macs_before,
        )
        if a.replaced:
            assert a.macs_after == b.macs_after


def test_deterministic_and_modes_kept():
    model = randomise(SmallResNet()).train()
    model.layers[0].bn1.eval()
    batches = calibration()
    one, two = (convert(model, SMALL, calibration=batches) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert one.training
    assert one.layers[0].conv1.training
    assert not one.layers[0].bn1.training


def test_calibration_may_be_a_loader_of_images_and_labels():
    data = torch.utils.data.TensorDataset(pictures(12), torch.arange(12))
    loader = torch.utils.data.DataLoader(data, batch_size=5)
    assert convert(SmallResNet(), SMALL, calibration=loader).lcnn_report.replaced
    with pytest.raises(LcnnError, match="no batches"):
        convert(SmallResNet(), SMALL, calibration=[])
    with pytest.raises(LcnnError, match="fails on the example inputs"):
        convert(SmallResNet(), SMALL, calibration=[torch.randn(2, 5, 8, 8)])


def test_hooks_stay():
    model, seen = randomise(SmallResNet()), []
    model.layers[0].conv1.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    converted = convert(model, SMALL, calibration=calibration())
    seen.clear()
    converted(pictures(1))
    assert seen == [LookupConv2d]


def test_a_single_convolution_is_a_model():
    converted = convert(nn.Conv2d(8, 8, 3), SMALL, calibration=[pictures(2, 8, 8)])
    assert isinstance(converted, LookupConv2d)


def test_max_error_keeps_a_layer_dense():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LcnnWarning)
        report = convert(randomise(SmallResNet()), SMALL.replace(max_error=1e-6), calibration=calibration()).lcnn_report
    assert not report.replaced
    assert "max_error" in report["layers.0.conv1"].reason
    assert report["layers.0.conv1"].error > 1e-6
