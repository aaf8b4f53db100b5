"""Lookup convolution in plain PyTorch, for every dtype and device: the truth the kernels are tested against.

Shapes, as everywhere in the package: m ``in_channels``, n ``out_channels``, k ``dictionary_size``, g ``group_size``,
F filter groups, T taps in all filter groups together.

| tensor | shape | dtype | meaning |
| --- | --- | --- | --- |
| dictionary | [groups, k, m/groups] | floating | D |
| coefficients | [T, g] | floating | C, one row per tap, one column per filter of its filter group |
| indices | [T] | int32 | the dictionary vector of each tap |
| positions | [T] | int32 | the kernel position r·kw + c of each tap |
| offsets | [F + 1] | int32 | taps offsets[j] to offsets[j + 1] belong to filter group j |
| filters | [F, g] | int32 | the output channels of each filter group, -1 where it has fewer than g |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.kernels.arguments import Geometry, Lookups, Weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def output_format(input: Tensor) -> torch.memory_format:
    """The memory format of what has the input's: channels_last where only that fits it, else contiguous."""
    last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def tap_filter_groups(offsets: Tensor, taps: int) -> Tensor:
    """The filter group of each tap: int64 [T], without a data-dependent shape."""
    # The number of groups that end at or before each tap; ONNX has no searchsorted.
    ends = offsets[1:].long()
    marks = ends.new_zeros(taps + 1).index_put((ends,), torch.ones_like(ends), accumulate=True)
    return marks.cumsum(0)[:taps]


def lookup_tensor(
    coefficients: Tensor,
    indices: Tensor,
    positions: Tensor,
    offsets: Tensor,
    filters: Tensor,
    out_channels: int,
    dictionary_size: int,
    kernel_size: Sequence[int],
) -> Tensor:
    """P, [n, k, kh, kw]: the sparse tensor that indices and coefficients encode; repeated taps add up."""
    area = kernel_size[0] * kernel_size[1]
    rows = filters[tap_filter_groups(offsets, coefficients.shape[0])].long()
    columns = (indices.long() * area + positions.long()).unsqueeze(1).expand_as(rows)
    values = torch.where(rows >= 0, coefficients, coefficients.new_zeros(()))
    flat = coefficients.new_zeros(out_channels, dictionary_size * area)
    flat = flat.index_put((rows.clamp(min=0), columns), values, accumulate=True)
    return flat.view(out_channels, dictionary_size, kernel_size[0], kernel_size[1])


def dense_weight(dictionary: Tensor, lookups: Tensor) -> Tensor:
    """W = P·D, [n, m/groups, kh, kw], contiguous, from D [groups, k, m/groups] and P [n, k, kh, kw] (LCNN, section 3.1)."""
    groups = dictionary.shape[0]
    grouped = lookups.unflatten(0, (groups, -1))
    weight = torch.einsum("gokrc,gkm->gomrc", grouped, dictionary).flatten(0, 1)
    # The layout of a sum of products follows no rule, and that of a filter bank decides the layout of what is convolved with it:
    # even its strides along a dimension of one, which only flattening puts right.
    return weight.flatten().view_as(weight)


def pointwise_weight(dictionary: Tensor) -> Tensor:
    """The dictionary as the weight of a 1x1 convolution, [groups·k, m/groups, 1, 1]."""
    return dictionary.flatten(0, 1)[:, :, None, None]


def pad_spatial(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Zero-pad [N, C, H, W] by (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x


def convolve(x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """A dense convolution, no bias."""
    _, _, stride, padding, dilation = geometry
    if tuple(x.shape[2:]) == (1, 1) and tuple(weight.shape[2:]) == (1, 1) and groups == 1 and not any(padding):
        # A fully connected layer: convolution kernels are slow on a single pixel.
        return F.linear(x[:, :, 0, 0], weight[:, :, 0, 0])[:, :, None, None]
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return F.conv2d(x, weight, None, tuple(stride), (top, left), tuple(dilation), groups)
    return F.conv2d(pad_spatial(x, padding), weight, None, tuple(stride), 0, tuple(dilation), groups)


def lower_factored(
    x: Tensor, dictionary: Tensor, lookups: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """S = D ∗ x, then a dense convolution with P: m·k + k·n·kh·kw multiply-adds per pixel; ``padding`` as in a :class:`Geometry`."""
    groups = dictionary.shape[0]
    sizes = (lookups.shape[2:], stride, padding, dilation)
    x, geometry = read_pixels(x, Geometry(lookups.shape[0], *sizes))  # type: ignore[arg-type]
    s = F.conv2d(x, pointwise_weight(dictionary), None, groups=groups)
    return convolve(s, lookups, geometry, groups)


def lower_lookup(x: Tensor, *weight_and_geometry: Any) -> Tensor:
    """S = D ∗ x, then y[o] = Σ over taps of C · shift(S[I]), literally (LCNN, section 3.1, equation 2).

    Args:
        x: [N, m, H, W].
        weight_and_geometry: what a :class:`Weight` and a :class:`Geometry` hold, one after the other: ``*weight, *geometry``.
    """
    dictionary, coefficients, indices, positions, offsets, filters = Weight(*weight_and_geometry[:6])
    out_channels, kernel_size, stride, padding, dilation = Geometry(*weight_and_geometry[6:])
    groups, size = dictionary.shape[0], dictionary.shape[1]
    s = pad_spatial(F.conv2d(x, pointwise_weight(dictionary), None, groups=groups), padding)
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    y = x.new_zeros(x.shape[0], out_channels, height, width)
    taps = coefficients.shape[0]
    group = tap_filter_groups(offsets, taps)
    rows = filters.long()[group]
    planes = (group // max(1, filters.shape[0] // groups)) * size + indices.long()
    for position in range(kernel_size[0] * kernel_size[1]):
        chosen = (positions == position).nonzero().flatten()
        r, c = divmod(position, kernel_size[1])
        top, left = r * dilation[0], c * dilation[1]
        view = s[
            :, :, top : top + (height - 1) * stride[0] + 1 : stride[0], left : left + (width - 1) * stride[1] + 1 : stride[1]
        ]
        for column in range(filters.shape[1]):
            member = chosen[rows[chosen, column] >= 0]
            terms = view[:, planes[member]] * coefficients[member, column][None, :, None, None]
            y = y.index_add(1, rows[member, column], terms)
    return y


def output_size(
    size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the output for an input of ``size`` (height, width) and padding (top, bottom, left, right)."""
    high = (size[0] + padding[0] + padding[1] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    wide = (size[1] + padding[2] + padding[3] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    return high, wide


def skips_pixels(geometry: Geometry) -> bool:
    """Whether a layer is a 1x1 convolution of every so many pixels, so that S is not needed at the others."""
    _, kernel_size, stride, padding, _ = geometry
    return tuple(kernel_size) == (1, 1) and tuple(stride) != (1, 1) and not any(isinstance(p, int) and p for p in padding)


def read_pixels(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """What a layer reads of its input, and the geometry that is left: a 1x1 convolution may skip pixels."""
    if not skips_pixels(geometry):
        return x, geometry
    high, wide = geometry.stride
    return x[:, :, ::high, ::wide], geometry._replace(stride=(1, 1))


def needed_pixels(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int]) -> int:
    """Pixels of an image of ``size`` (height, width) at which S is formed: those that some tap can read."""
    pixels = 1
    for length, kernel, step in zip(size, kernel_size, stride, strict=True):
        pixels *= length if kernel >= step else max(1, length // step)
    return pixels


def apply_epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, residual_last: bool) -> Tensor:
    """bias, then ``activation(y + residual)``, or ``activation(y) + residual`` where ``residual_last``: an :class:`Epilogue`."""
    if bias is not None:
        y = y + bias[:, None, None]
    if residual is not None and not residual_last:
        y = y + residual
    y = ACTIVATIONS[activation](y)
    return y + residual if residual is not None and residual_last else y


def gather_taps(p: Tensor, lookups: Lookups) -> Tensor:
    """The entries of a tensor shaped as P at the taps of ``lookups``, [T, g]; zero for filters that do not exist."""
    _, indices, positions, offsets, filters = lookups
    area = p.shape[2] * p.shape[3]
    rows = filters[tap_filter_groups(offsets, indices.shape[0])].long()
    columns = (indices.long() * area + positions.long()).unsqueeze(1).expand_as(rows)
    values = p.flatten(1)[rows.clamp(min=0), columns]
    return torch.where(rows >= 0, values, values.new_zeros(()))


def filter_table(out_channels: int, group_size: int, groups: int = 1, order: Tensor | None = None) -> Tensor:
    """The ``filters`` tensor, int32 [F, g], of filter groups of at most ``group_size`` consecutive filters of ``order``.

    ``order`` (int64 [n], a permutation that keeps every filter in its convolution group) defaults to the natural one. A
    filter group never straddles two convolution groups; the last of each convolution group may be smaller.
    """
    per_group = out_channels // groups
    size = min(group_size, per_group)
    blocks = -(-per_group // size)
    numbers = torch.arange(out_channels) if order is None else order.cpu()
    table = torch.full((groups, blocks * size), -1, dtype=torch.int32)
    table[:, :per_group] = numbers.to(torch.int32).view(groups, per_group)
    return table.view(groups * blocks, size)
