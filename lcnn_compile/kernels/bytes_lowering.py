"""A lookup convolution of floats that is computed in bytes: rounded, convolved, and float32 again.

Its ``ranges`` are one tensor, float32 [2 + groups * k]: scale and zero of the input, then the largest magnitude of each plane of S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Arguments
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.prepared import Prepared
from lcnn_compile.kernels.quantized import QuantizedLookup, Range, convolve_bytes
from lcnn_compile.kernels.rounding import quantize_lookup


def pack_ranges(x: Range, vector_limits: Tensor) -> Tensor:
    """The tensor of a range and of limits [groups, k]."""
    return torch.cat([torch.tensor([x.scale, float(x.zero)]), vector_limits.detach().float().cpu().flatten()])


def unpack_ranges(ranges: Tensor, dictionary: Tensor, name: str = "lookup_conv2d") -> tuple[Range, Tensor]:
    """Range and limits [groups, k] of a layer with this dictionary.

    Raises:
        WeightError: the tensor is not one of ranges, or not of this layer.
    """
    groups, size, _ = dictionary.shape
    if tuple(ranges.shape) != (2 + groups * size,) or not ranges.is_floating_point():
        raise WeightError(f"{name}: ranges are {ranges.dtype} {tuple(ranges.shape)}; float32 [{2 + groups * size}] is required")
    scale, zero, *_ = ranges.detach().cpu().double().tolist()
    if not (zero == zero and 0 <= zero <= 255 and zero == int(zero)):
        raise WeightError(f"{name}: the zero of a range of bytes is {zero}; whole numbers from 0 to 255 are allowed")
    found = Range(scale, int(zero))
    found.check(name)
    limits = ranges[2:].detach().cpu().float().view(groups, size)
    if not bool((torch.isfinite(limits) & (limits >= 0)).all()):
        raise WeightError(
            f"{name}: limits of S are {float(limits.min())} to {float(limits.max())}; finite numbers from 0 on are required"
        )
    return found, limits


def _quantize(*arguments: object) -> tuple[Range, QuantizedLookup, PackedBytes | None]:
    *tensors, kernel_size, biased = arguments
    weight, ranges, bias = tensors[:6], tensors[6], tensors[7] if biased else None
    x, limits = unpack_ranges(ranges, weight[0])  # type: ignore[arg-type]
    layer = quantize_lookup(weight, kernel_size, bias, x, None, limits, name="lookup_conv2d")  # type: ignore[arg-type]
    return x, layer, None if cpu_build.library() is None else PackedBytes(layer)


_quantized = Prepared(_quantize)


def forward(call: Arguments) -> Tensor:
    """What the operator computes, with the convolution in bytes; weights are rounded once until they change."""
    input, weight, geometry, (bias, residual, activation, residual_last), _, _, ranges = call
    assert ranges is not None
    tensors = (*weight, ranges, *([] if bias is None else [bias]))
    known, layer, packed = _quantized(tensors, geometry.kernel_size, bias is not None)
    x, sizes = known.to_bytes(input.cpu()), (geometry.stride, geometry.padding, geometry.dilation)
    y = convolve_bytes(layer, x, *sizes) if packed is None else packed(x, *sizes)
    return reference.apply_epilogue(y.to(input.device, input.dtype), None, residual, activation, residual_last)
