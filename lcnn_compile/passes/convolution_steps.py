"""Dense convolutions as steps of a program: depthwise ones have a kernel of their own, others are lookups of x itself."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, fx

from lcnn_compile.geometry.transposed import TransposedGeometry
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu.forward import POSITIONS
from lcnn_compile.kernels.cpu.steps import Depthwise, LookUp, Permute, Slice, View
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.passes.step_form import Emit, Form, is_plain, is_value
from lcnn_compile.passes.targets import CONVOLUTIONS, attribute, bound, is_get_attr, shape_of

GROUP = 8
"""Filters that share their taps."""
LARGEST = 1 << 24
"""Elements of a weight that is packed for a program."""
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def convolving(gm: fx.GraphModule, node: fx.Node) -> Form | None:
    """The form of a dense convolution of images or rows with a constant weight, transposed or not; None for others."""
    name = next((name for name, targets in CONVOLUTIONS.items() if node.target in targets), None)
    if name is None or name == "conv3d":
        return None
    transposed = "transpose" in name
    if transposed:
        x, weight, bias, stride, padding, extra, groups, dilation = bound(node, _TRANSPOSED, (None, None, None, 1, 0, 0, 1, 1))
    else:
        x, weight, bias, stride, padding, dilation, groups = bound(node, _NAMES, (None, None, None, 1, 0, 1, 1))
        extra = 0
    if not is_value(x) or not is_get_attr(weight) or not (bias is None or is_get_attr(bias)) or not isinstance(groups, int):
        return None
    own: Tensor = attribute(gm, weight.target)
    added: Tensor | None = None if bias is None else attribute(gm, bias.target)
    shape, out = shape_of(x), shape_of(node)
    rank = 1 if name.endswith("1d") else 2
    if (
        not is_plain(own)
        or own.dim() != rank + 2
        or not 0 < own.numel() <= LARGEST
        or (added is not None and not is_plain(added))
    ):
        return None
    if not shape or not out or len(shape) != rank + 2 or math.prod(own.shape[2:]) > POSITIONS or not isinstance(shape[1], int):
        return None
    sizes = [_sizes(value, rank) for value in (stride, dilation, extra)]
    pads = _pads(padding, own.shape[2:], dilation, stride, rank)
    if pads is None or any(value is None for value in sizes):
        return None
    steps, dilations, extras = cast("list[tuple[int, ...]]", sizes)
    image, made = (_as_image(shape), _as_image(out)) if rank == 1 else (shape, out)
    if rank == 1 and not all(isinstance(size, int) for size in (*image[1:], *made[1:])):
        return None
    if transposed:
        build = _transposed(own, added, steps, pads, extras, groups, dilations, image, made)
    else:
        plane = own.unsqueeze(2) if rank == 1 else own
        build = _plain(plane, added, _as_pair(steps), _as_pair(dilations), pads, groups)
    if build is None:
        return None
    if rank == 2:
        return Form((x,), lambda emit, values: build(emit, values[0]))
    return Form((x,), lambda emit, values: emit(View(build(emit, emit(View(values[0], image[1:]))), tuple(out[1:]))))


def _as_image(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*shape[:2], 1, shape[2])


def _as_pair(values: tuple[int, ...], first: int = 1) -> tuple[int, int]:
    return (first, values[0]) if len(values) == 1 else (values[0], values[1])


def _sizes(value: Any, rank: int) -> tuple[int, ...] | None:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * rank
    values = values * rank if len(values) == 1 else values
    return values if len(values) == rank and all(isinstance(v, int) for v in values) else None


def _pads(padding: Any, kernel: Any, dilation: Any, stride: Any, rank: int) -> tuple[int, int, int, int] | None:
    """(top, bottom, left, right)."""
    if padding in ("same", "valid"):
        dilations = _sizes(dilation, rank)
        if dilations is None:
            return None
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        sizes = _sizes(padding, rank)
        if sizes is None:
            return None
        pairs = [(p, p) for p in sizes]
    (top, bottom), (left, right) = [(0, 0), *pairs][-2:]
    return (top, bottom, left, right)


def _plain(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
    groups: int,
) -> Any:
    out_channels, per_group, *kernel = weight.shape
    sizes = (per_group * groups, out_channels, (kernel[0], kernel[1]), stride, pads, dilation)
    if per_group == 1 and groups > 1:
        return lambda emit, value: emit(Depthwise(value, None, *sizes), weight, bias)

    def build(emit: Emit, value: int) -> int:
        return emit(
            LookUp(value, None, *sizes), _packed(LookupWeight.lossless(weight.detach(), groups=groups, group_size=GROUP)), bias
        )

    return build


def _packed(lossless: LookupWeight) -> Any:
    return cpu.packed_weight(tuple(lossless.tensors().values()), lossless.kernel_size)


def _transposed(
    own: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    pads: tuple[int, int, int, int],
    extra: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
    shape: tuple[Any, ...],
    out: tuple[Any, ...],
) -> Any:
    """All sub-pixels of an output pixel as filters of one convolution, then put where they belong."""
    if not all(isinstance(size, int) for size in (*shape[1:], *out[1:])):
        return None
    padding = pads[2:3] if len(stride) == 1 else (pads[0], pads[2])
    layer = SimpleNamespace(
        in_channels=own.shape[0],
        out_channels=own.shape[1] * groups,
        groups=groups,
        kernel_size=tuple(own.shape[2:]),
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
    )
    geometry = cast(TransposedGeometry, TransposedGeometry.of(layer))
    call, (rows, columns) = geometry.call(), geometry.axes
    n, down, right = geometry.out_channels, rows.stride, columns.stride
    sizes = (own.shape[0], n * geometry.phases, call.kernel_size, call.stride, call.padding, call.dilation)
    lossless = LookupWeight.lossless(geometry.weight(own.detach()), groups=groups, group_size=GROUP)
    all_biases = None if bias is None else bias.detach().repeat_interleave(geometry.phases)
    made = LookUp(0, None, *sizes).shape([(1, *shape[1:])])
    high, wide = made[2:]

    def build(emit: Emit, value: int) -> int:
        value = emit(LookUp(value, None, *sizes), _packed(geometry.stored(lossless)), all_biases)
        if geometry.phases > 1:
            value = emit(View(value, (n, down, right, high, wide)))
            value = emit(View(emit(Permute(value, (0, 1, 4, 2, 5, 3))), (n, high * down, wide * right)))
        for dim, axis, size, length in ((2, rows, high * down, out[2]), (3, columns, wide * right, out[3])):
            if axis.crop or size != length:
                value = emit(Slice(value, dim, axis.crop, length))
        return value

    return build
