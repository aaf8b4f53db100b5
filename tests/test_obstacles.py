"""Layers that stay dense say what stands in the way; subclasses, lazy and shared layers are replaced where that is safe."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lcnn_compile import LookupConfig, LookupConv2d, LookupLinear, convert, explain
from lcnn_compile.conversion.obstacles import obstacle

SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.norm(), bias)


class OwnTransposed(nn.ConvTranspose1d):
    def forward(self, input, output_size=None):
        return super().forward(input, output_size) + 1


def replaced_forward():
    conv = nn.Conv1d(4, 4, 3)
    conv.forward = lambda x: x
    return conv


def strange_weight():
    class Wrapped(torch.Tensor):
        pass

    conv = nn.Conv2d(4, 4, 3)
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Wrapped))
    return conv


def test_first_layers_are_converted_where_their_sizes_are_searched():
    torch.manual_seed(0)
    grey = torch.randn(32, 1, 12, 12).expand(-1, 3, -1, -1)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3)).eval()
    batches = list(grey.split(8))
    fixed = convert(model, LookupConfig(), calibration=batches)
    assert "too few input channels (3)" in next(row.reason for row in fixed.lcnn_report if row.name == "0")
    # Of three channels that are the same, one vector says all.
    searched = convert(model, LookupConfig(target_speedup=2.5), calibration=batches)
    assert isinstance(searched[0], LookupConv2d)
    assert searched[0].dictionary_size == 1
    insisted = convert(model, LookupConfig(dictionary_size=2, sparsity=2), calibration=batches)
    assert insisted[0].dictionary_size == 2


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.ConvTranspose3d(4, 4, 2), "ConvTranspose3d has no lookup form"),
        (lambda: nn.Conv1d(8, 8, 3, groups=8), "depthwise"),
        (lambda: nn.ConvTranspose2d(8, 8, 4, groups=8), "depthwise"),
        (lambda: weight_norm(nn.Conv1d(4, 4, 3)), "torch.nn.utils.remove_weight_norm"),
        (lambda: spectral_norm(nn.Conv2d(4, 4, 3)), "torch.nn.utils.remove_spectral_norm"),
        (lambda: prune.random_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5), "torch.nn.utils.prune.remove"),
        (lambda: parametrizations.weight_norm(nn.Conv3d(4, 4, 3)), "WeightNorm; to convert it"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "SpectralNorm; to convert it"),
        (lambda: nn.LazyConv2d(4, 3), "lazy: its sizes are not known"),
        (lambda: OwnConvolution(4, 4, 3), "OwnConvolution has a forward of its own"),
        (lambda: OwnTransposed(4, 4, 3), "OwnTransposed has a forward of its own"),
        (replaced_forward, "replaced on the instance"),
        (strange_weight, "its weight is a Wrapped, not a plain tensor"),
        (lambda: nn.Conv2d(4, 4, 3).to(torch.complex64), "torch.complex64"),
        (lambda: torch.ao.nn.quantized.Conv2d(4, 4, 3), "quantised"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(4, 4), "quantised"),
        (lambda: nn.Conv2d(4, 4, 3), ""),
        (lambda: nn.ConvTranspose1d(4, 4, 3), ""),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_reasons(layer, reason):
    found = obstacle(layer())
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_listed_with_their_size():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 8)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    rows = convert(quantised, SMALL, calibration=[torch.randn(2, 4, 4, 4)]).lcnn_report
    assert [(row.name, row.replaced) for row in rows] == [("0", True), ("2", False)]
    assert "convert the float model" in rows["2"].reason
    assert (rows["2"].macs_before, rows["2"].bytes_before) == (128, 128)


class Named(nn.Conv2d):
    """A subclass that computes what its base does."""


def test_subclasses_and_shared_layers_are_replaced():
    conv = Named(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    converted = convert(model, SMALL.replace(include=(Named,)), calibration=[torch.randn(4, 4, 6, 6)])
    assert isinstance(converted[0], LookupConv2d)
    assert converted[0] is converted[2]
    assert converted.lcnn_report[0].kind == "Named"
    assert converted.lcnn_report[0].macs_before == 2 * 36 * 9 * 16


def test_lazy_layers_are_replaced_once_they_have_run():
    def build():
        return nn.Sequential(nn.LazyConv2d(6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))

    x = torch.randn(4, 8, 6, 6)
    model = build()
    assert "example_inputs" in explain(model)["0"].reason
    converted = convert(model, SMALL.replace(include=("*",)), calibration=[x])
    assert isinstance(converted[0], LookupConv2d)
    assert isinstance(converted[3], LookupLinear)
    assert converted(x).shape == (4, 5)
    assert isinstance(model[0].weight, nn.UninitializedParameter)
