"""Poolings in forms that ONNX engines read alike: explicit padding and no ceil_mode.

Engines disagree on the size of a pooling with ceil_mode and on what its last windows are divided by, and exporters drop the
divisor. PyTorch's rules: a window starts inside the image or its left padding; an average counts the padding on both sides,
but not what a last window reaches beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lcnn_compile.errors import ExportError
from lcnn_compile.passes.targets import aten, bound

Form = tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]
"""A function, its plain arguments after the input, and its tensors after those."""

_MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOLS = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
}
_MAX_NAMES = ("self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_MAX_DEFAULTS = (None, None, (), 0, 1, False)
_AVG_NAMES = ("self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_AVG_DEFAULTS = (None, None, (), 0, False, True, None)
AVG_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}


def uses_ceil_mode(node: fx.Node) -> bool:
    """Whether a pooling has ceil_mode set."""
    if node.target in MAX_POOLS:
        return bool(bound(node, _MAX_NAMES, _MAX_DEFAULTS)[5])
    return bool(bound(node, _AVG_NAMES, _AVG_DEFAULTS)[4])


def has_divisor(node: fx.Node) -> bool:
    """Whether an average pooling divides by a number of its own."""
    return bound(node, _AVG_NAMES, _AVG_DEFAULTS)[6] is not None


def max_pool_form(node: fx.Node, shape: Sequence[int], made: Sequence[int], dimensions: int) -> Form | None:
    """The form of a max pooling; None where it is fine as it is.

    Raises:
        ExportError: a window that holds no pixel.
    """
    _, kernel, stride, padding, dilation, ceil = bound(node, _MAX_NAMES, _MAX_DEFAULTS)
    if not ceil and set(_each(dilation, 1)) == {1}:
        return None
    kernel, padding, dilation = (_each(value, dimensions) for value in (kernel, padding, dilation))
    stride = _each(stride, dimensions) if stride not in ((), [], None) else kernel
    if any(
        _misses(*each) for each in zip(shape[-dimensions:], made[-dimensions:], kernel, stride, padding, dilation, strict=True)
    ):
        raise ExportError(f"{node.name}: a dilated window holds no pixel; PyTorch's maximum is -inf there, other engines' is not")
    if not ceil:
        return None
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    extra = _extra(shape[-dimensions:], reach, stride, padding)
    tie = all(d == 1 for d in dilation)
    indices = "with_indices" in str(node.target)
    return padded_max_pool, (kernel, stride, padding, dilation, extra, tie, indices), ()


def padded_max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    extra: Sequence[int],
    tie: bool,
    indices: bool,
) -> Any:
    """Max pooling of an image that ends ``extra`` later.

    A window that reaches the extra pixels holds the last one of the image too, unless it is dilated (``tie`` is false), so
    repeating that one changes no maximum; and it puts no infinities into a network that is to be quantized.
    """
    pads = [n for amount in reversed(extra) for n in (0, amount)]
    if any(extra):
        if tie and x.is_floating_point():
            x = F.pad(x, pads, mode="replicate")
        else:
            x = F.pad(x, pads, value=-torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min)
    y = _MAX[len(kernel)](x, kernel, stride, padding, dilation, ceil_mode=False)
    return (y,) if indices else y


def avg_pool_form(node: fx.Node, shape: Sequence[int], dimensions: int) -> Form | None:
    """The form of an average pooling; None where it is fine as it is."""
    _, kernel, stride, padding, ceil, count_pads, divisor = bound(node, _AVG_NAMES, _AVG_DEFAULTS)
    if not ceil and divisor is None:
        return None
    kernel, padding = _each(kernel, dimensions), _each(padding, dimensions)
    stride = _each(stride, dimensions) if stride not in ((), [], None) else kernel
    image = shape[-dimensions:]
    extra = _extra(image, kernel, stride, padding) if ceil else [0] * dimensions
    if not any(extra) and divisor is None:
        return plain_avg_pool, (kernel, stride, padding, count_pads), ()
    sizes = [
        (size + more + 2 * pad - k) // step + 1
        for size, more, pad, k, step in zip(image, extra, padding, kernel, stride, strict=True)
    ]
    if divisor is None:
        counts = torch.ones(())
        for count, size, k, step, pad in zip(sizes, image, kernel, stride, padding, strict=True):
            low, high = (-pad, size + pad) if count_pads else (0, size)
            starts = torch.arange(count) * step - pad
            pixels = (starts + k).clamp(max=high) - starts.clamp(min=low)
            counts = counts[..., None] * pixels
    else:
        counts = torch.full(sizes, float(divisor))
    return scaled_avg_pool, (kernel, stride, padding, extra), (prod(kernel) / counts,)


def plain_avg_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], count_pads: bool) -> Tensor:
    """Average pooling without ceil_mode."""
    return _AVG[len(kernel)](x, kernel, stride, padding, False, count_pads)


def scaled_avg_pool(
    x: Tensor, scale: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], extra: Sequence[int]
) -> Tensor:
    """Average pooling of a zero-padded image, times what each window's divisor differs by."""
    x = F.pad(x, [n for pad, more in zip(reversed(padding), reversed(extra), strict=True) for n in (pad, pad + more)])
    return _AVG[len(kernel)](x, kernel, stride) * scale.to(x.dtype)


def _extra(image: Sequence[int], reach: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """How many pixels the last windows of a pooling with ceil_mode reach beyond the padding, in each dimension."""
    found = []
    for size, window, step, pad in zip(image, reach, stride, padding, strict=True):
        count = -((window - size - 2 * pad) // step) + 1
        if (count - 1) * step >= size + pad:
            count -= 1
        found.append(max(0, (count - 1) * step + window - 2 * pad - size))
    return found


def _misses(size: int, count: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether one of ``count`` windows of a pooling lies in the padding alone."""
    starts = (i * stride - padding for i in range(count))
    return any(not any(0 <= start + j * dilation < size for j in range(kernel)) for start in starts)


def _each(value: Any, dimensions: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * dimensions if len(values) == 1 else values
