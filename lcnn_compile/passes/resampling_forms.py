"""Interpolation, adaptive pooling and circular padding in forms that ONNX engines read alike.

Interpolation is linear and separable: one matrix for each dimension, which PyTorch's own operator tells. Nearest neighbours
are a gather. A matrix product spreads an infinity or NaN over its whole row and column, as it does not in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lcnn_compile.passes.pooling_forms import Form, padded_max_pool, plain_avg_pool
from lcnn_compile.passes.targets import aten, bound
from lcnn_compile.torch_private import without_modes

_NEAREST = {"upsample_nearest": aten.upsample_nearest2d, "_upsample_nearest_exact": aten._upsample_nearest_exact2d}
_LINEAR = {
    "upsample_linear": aten.upsample_bilinear2d,
    "upsample_bilinear": aten.upsample_bilinear2d,
    "upsample_trilinear": aten.upsample_bilinear2d,
    "upsample_bicubic": aten.upsample_bicubic2d,
    "_upsample_bilinear2d_aa": aten._upsample_bilinear2d_aa,
    "_upsample_bicubic2d_aa": aten._upsample_bicubic2d_aa,
}
ADAPTIVE_AVG = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
}
ADAPTIVE_MAX = {
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}


def is_interpolation(target: Any) -> bool:
    """Whether an operator is one of PyTorch's interpolations."""
    name = str(target).removeprefix("aten.")
    return any(name.startswith(start) for start in (*_NEAREST, *_LINEAR))


def interpolation_form(node: fx.Node, shape: Sequence[int], made: Sequence[int]) -> Form | None:
    """The form of an interpolation from ``shape`` to ``made``; None where engines agree, which is without antialias.

    Nearest neighbours are gathered where the factors are not whole: which of two equally near ones is taken hangs on rounding.
    """
    name = str(node.target).removeprefix("aten.")
    image, sizes = list(shape[2:]), list(made[2:])
    nearest = next((op for start, op in _NEAREST.items() if name.startswith(start)), None)
    rest: list[Any] = [*node.args[2:], *node.kwargs.values()]
    corners = bool(rest.pop(0)) if nearest is None else False
    if name.endswith(".vec"):
        # Given sizes, the scales are not used.
        rest = list(rest[0] or []) if rest and node.args[1] is None else []
    scales: list[Any] = rest + [None] * (len(image) - len(rest))
    whole = all(
        out % size == 0 and (scale is None or size * scale == out) for size, out, scale in zip(image, sizes, scales, strict=True)
    )
    if nearest is not None:
        if whole and "exact" not in name:
            return None
        return gathered, (), tuple(_neighbours(nearest, *pair) for pair in zip(image, sizes, scales, strict=True))
    op = next(op for start, op in _LINEAR.items() if name.startswith(start))
    if op in (aten.upsample_bilinear2d, aten.upsample_bicubic2d):
        return None
    return separable, (), tuple(_matrix(op, corners, *pair) for pair in zip(image, sizes, scales, strict=True))


def _neighbours(op: Any, size: int, out: int, scale: float | None) -> Tensor:
    with without_modes():
        return op.default(torch.arange(float(size)).view(1, 1, 1, size), [1, out], None, scale).flatten().long()


def _matrix(op: Any, corners: bool, size: int, out: int, scale: float | None) -> Tensor:
    """[out, size]: what the operator makes of each pixel of one row."""
    with without_modes():
        rows = op.default(torch.eye(size).view(1, size, 1, size), [1, out], corners, None, scale)
        return rows[0, :, 0].T.contiguous()


def gathered(x: Tensor, *neighbours: Tensor) -> Tensor:
    """The pixels of the given indices, in each dimension behind the channels."""
    for i, indices in enumerate(neighbours):
        x = x.index_select(i + 2, indices)
    return x


def separable(x: Tensor, *matrices: Tensor) -> Tensor:
    """One matrix [out, size] applied to each of the last dimensions; those that shrink the image most come first."""
    first = x.dim() - len(matrices)
    for i, matrix in sorted(enumerate(matrices), key=lambda pair: pair[1].shape[0] / pair[1].shape[1]):
        matrix = matrix.to(x.dtype)
        if i == len(matrices) - 1:
            x = x @ matrix.T
            continue
        behind = x.shape[first + i + 1 :]
        x = (matrix @ x.flatten(first + i + 1)).unflatten(-1, behind)
    return x


def adaptive_avg_form(node: fx.Node, shape: Sequence[int], dimensions: int) -> Form | None:
    """The form of an adaptive average pooling; None for the mean of all pixels."""
    image = shape[-dimensions:]
    sizes = _sizes(node, image)
    if all(out == 1 for out in sizes):
        return None
    if all(size % out == 0 for size, out in zip(image, sizes, strict=True)):
        window = [size // out for size, out in zip(image, sizes, strict=True)]
        return plain_avg_pool, (window, window, [0] * dimensions, True), ()
    return separable, (), tuple(_averages(*pair) for pair in zip(image, sizes, strict=True))


def adaptive_max_form(node: fx.Node, shape: Sequence[int], dimensions: int) -> Form | None:
    """The form of an adaptive max pooling: windows gathered with their last pixel repeated, then maxima."""
    image = shape[-dimensions:]
    sizes = _sizes(node, image)
    if all(size % out == 0 for size, out in zip(image, sizes, strict=True)):
        window = [size // out for size, out in zip(image, sizes, strict=True)]
        return padded_max_pool, (window, window, [0] * dimensions, [1] * dimensions, [0] * dimensions, True, True), ()
    return window_maxima, (), tuple(_windows(*pair) for pair in zip(image, sizes, strict=True))


def window_maxima(x: Tensor, *windows: Tensor) -> tuple[Tensor]:
    """Maxima over windows of pixel numbers [out, pixels], in each of the last dimensions."""
    for i, window in enumerate(windows):
        dim = x.dim() - len(windows) + i
        x = x.index_select(dim, window.flatten()).unflatten(dim, tuple(window.shape)).amax(dim + 1)
    return (x,)


def _sizes(node: fx.Node, image: Sequence[int]) -> list[int]:
    given: Any = node.args[1]
    values = list(given) if isinstance(given, list | tuple) else [given]
    return [
        size if out is None else out for size, out in zip(image, values * len(image) if len(values) == 1 else values, strict=True)
    ]


def _windows(size: int, out: int) -> Tensor:
    """[out, pixels]: the pixels of each window of an adaptive pooling; shorter ones repeat their last."""
    starts = torch.arange(out) * size // out
    ends = ((torch.arange(out) + 1) * size + out - 1) // out
    return torch.minimum(starts[:, None] + torch.arange(int((ends - starts).max())), ends[:, None] - 1)


def _averages(size: int, out: int) -> Tensor:
    matrix = torch.zeros(out, size).scatter_(1, _windows(size, out), 1)
    return matrix / matrix.sum(1, keepdim=True)


def padding_form(node: fx.Node, shape: Sequence[int]) -> Form | None:
    """The form of a circular padding; None for other modes."""
    _, pads, mode, _ = bound(node, ("self", "pad", "mode", "value"), (None, None, "constant", None))
    return (wrapped, (list(pads),), ()) if mode == "circular" else None


def wrapped(x: Tensor, pads: Sequence[int]) -> Tensor:
    """Circular padding as slices that are put together; ``pads`` as for ``F.pad``, negative ones cut."""
    for i in range(len(pads) // 2):
        dim, (before, after) = x.dim() - 1 - i, pads[2 * i : 2 * i + 2]
        size = x.shape[dim]
        parts = [x.narrow(dim, max(0, -before), size - max(0, -before) - max(0, -after))]
        if before > 0:
            parts.insert(0, x.narrow(dim, size - before + min(0, after), before))
        if after > 0:
            parts.append(x.narrow(dim, max(0, -before), after))
        x = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    return x
