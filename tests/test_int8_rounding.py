"""Rounding layers to eight bits: what the bytes stand for, and how near the layer stays to float64."""

import random

import pytest
import torch
from torch.nn import functional as F

from lcnn_compile import LcnnError, LookupWeight
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Geometry
from lcnn_compile.kernels.quantized import Range, convolve_bytes
from lcnn_compile.kernels.rounding import quantize_lookup


def lookup_weight(seed, m, n, k, kernel, group_size, groups=1, taps=9):
    generator = torch.Generator().manual_seed(seed)
    lookups = torch.randn(n, k, *kernel, generator=generator)
    keep = torch.rand(n // groups // group_size * groups, 1, k, *kernel, generator=generator).expand(-1, group_size, -1, -1, -1)
    lookups = lookups * (keep.reshape(lookups.shape) < taps / (k * kernel[0] * kernel[1]))
    return LookupWeight.from_lookup_tensor(
        torch.randn(groups, k, m // groups, generator=generator), lookups, group_size=group_size
    )


def quantized(weight, *args, **kwargs):
    return quantize_lookup(list(weight.tensors().values()), weight.kernel_size, *args, **kwargs)


def range_of(x, signed):
    return Range(float(x.abs().max()) / 127, 128) if signed else Range(float(x.max()) / 255, 0)


GEOMETRY = ((2, 1), (1, 0, 2, 1), (1, 2))


def run(layer, ranges, x, residual=None):
    more = None if residual is None else residual if layer.finish.residual[0] is None else ranges[2].to_bytes(residual)
    y = convolve_bytes(layer, ranges[0].to_bytes(x), *GEOMETRY, more)
    return y if ranges[1] is None else ranges[1].to_floats(y)


def truth_of(weight, bias, x, residual, activation, residual_last):
    geometry = Geometry(weight.shape[0], weight.shape[2:], *GEOMETRY)
    y = reference.convolve(x.double(), weight.double(), geometry, x.shape[1] // weight.shape[1])
    more = None if residual is None else residual.double()
    return reference.apply_epilogue(y, bias.double(), more, activation, residual_last)


def worst(y, truth):
    return float((y.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("seed", range(8))
def test_a_rounded_layer_is_near_the_layer(seed):
    rng = random.Random(seed)
    groups, dense = rng.choice([1, 2]), seed % 2 == 1
    m, n, kernel = 12 * groups, 8 * groups, (3, 2)
    weight = lookup_weight(seed, m, n, 7, kernel, rng.choice([1, 4]), groups)
    bias, signed = torch.randn(n), rng.random() < 0.5
    x = torch.randn(2, m, 11, 13) * (1 + torch.rand(m, 1, 1))
    x = x if signed else x.relu()
    activation, residual_last = rng.choice(["none", "relu", "silu", "hardswish"]), rng.random() < 0.5
    filters = weight.dense_weight()
    with_residual = rng.random() < 0.5
    plain = truth_of(filters, bias, x, None, "none", False)
    residual = torch.randn(plain.shape) * plain.std() if with_residual else None
    truth = truth_of(filters, bias, x, residual, activation, residual_last)
    ranges = [
        range_of(x, signed),
        rng.choice([range_of(truth, float(truth.min()) < 0), None]),
        None if residual is None else range_of(residual, True),
    ]
    floats = residual is not None and rng.random() < 0.5
    rest = (activation, "float32" if floats else ranges[2], residual_last)
    if dense:
        weight = LookupWeight.lossless(filters, groups=groups, group_size=4)
    s = F.conv2d(x, reference.pointwise_weight(weight.dictionary), groups=groups)
    layer = quantized(weight, bias, *ranges[:2], s.abs().amax((0, 2, 3)).view(groups, -1), *rest)
    assert (layer.dictionary is None) == dense
    assert worst(run(layer, ranges, x, residual), truth) < 0.025


def test_scales_waste_no_step():
    """Every dictionary vector, and every filter's coefficients, use all 127 steps, whatever scales S has."""
    weight = lookup_weight(1, 12, 8, 7, (3, 3), 1)
    limits = torch.rand(1, 7) * 100 + 0.01
    layer = quantized(weight, None, Range(0.1, 0), Range(0.1, 0), limits)
    assert (layer.dictionary.abs().amax(2) == 127).all()
    assert (layer.lookups().flatten(1).abs().amax(1) == 127).all()


def test_constant_channels_and_filters_without_taps_keep_their_bias():
    weight = lookup_weight(1, 12, 8, 7, (3, 3), 1)
    silent = LookupWeight.from_lookup_tensor(weight.dictionary * 0, weight.lookup_tensor() * 0)
    bias = torch.tensor([0.0, 1.0, -1.0, 1e-20, 1e4, 3.0, 0.5, -0.25])
    layer = quantized(silent, bias, Range(0.1, 0), None, torch.zeros(1, 7))
    y = convolve_bytes(layer, torch.zeros(1, 12, 4, 4, dtype=torch.uint8), (1, 1), (0, 0, 0, 0), (1, 1))
    assert torch.allclose(y[0, :, 0, 0], bias, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-42, 1e39])
def test_damaged_scales_are_refused(scale):
    weight = lookup_weight(1, 12, 8, 7, (3, 3), 1)
    limits = torch.ones(1, 7)
    for x, y, residual in ((scale, 1.0, 1.0), (1.0, scale, 1.0), (1.0, 1.0, scale)):
        with pytest.raises(LcnnError, match="first"):
            quantized(weight, None, Range(x, 0), Range(y, 0), limits, residual=Range(residual, 0), name="first")
    with pytest.raises(LcnnError, match="first"):
        quantized(weight, torch.full((8,), float("nan")), Range(1.0, 0), Range(1.0, 0), limits, name="first")
    with pytest.raises(LcnnError, match="vector_limits"):
        quantized(weight, None, Range(1.0, 0), Range(1.0, 0), limits * float("nan"), name="first")


def test_bytes_of_values():
    known = Range(0.5, 10)
    x = torch.tensor([0.0, 0.25, 0.75, 1.25, -5.0, -5.5, 200.0, float("inf"), float("-inf"), float("nan")])
    assert known.to_bytes(x).tolist() == [10, 10, 12, 12, 0, 0, 255, 255, 0, 10]
    assert known.to_floats(torch.tensor([0, 10, 255], dtype=torch.uint8)).tolist() == [-5.0, 0.0, 122.5]
