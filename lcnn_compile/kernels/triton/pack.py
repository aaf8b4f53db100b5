"""What the Triton kernels read instead of the operator's tensors: a packed weight, and the sizes of one call.

S lies as ``[images, groups·k, kw, rows, pitch]``: one copy per kernel column, already shifted (and strided) by it, so that a
tap is one offset, a row of output pixels is contiguous, and every load of 16 bytes is aligned whatever the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.kernels.arguments import Epilogue, Geometry, Weight
from lcnn_compile.kernels.prepared import Prepared
from lcnn_compile.kernels.reference import output_size, tap_filter_groups

ROW_BITS = 8
"""Low bits of a code, which hold the kernel row; the rest is the plane of S, row of D times kw plus kernel column."""

INT32 = 2**31
"""Elements from which offsets take 64 bits."""

BLOCK = 64
"""Filters of the table of g = 1 come in multiples of this, so that kernels read it without a mask."""


class Taps(NamedTuple):
    """The integers of a lookup weight, packed; they change far less often than the coefficients.

    Attributes:
        codes: int32 [T], plane of S and kernel row of each tap, ``plane << ROW_BITS | row``.
        slots: int64 [L, F′], the tap in each entry of the table of g = 1; L is the largest number of taps of a filter, at
            least 1, F′ is F rounded up to 64. Where a filter has run out of taps, its last one.
        used: bool [L, F′], false there.
        longest: taps of the filter group that has most.
        offsets: int32 [F + 1], as in the weight.
        filters: int32 [F, G], output channels, -1 for none; G is 1 or :func:`padded_group` of g.
        ordered: whether channel ``j·g + i`` is column i of filter group j, so that kernels compute what they else look up.
        places: int32 [n], the ``j·g + i`` of each channel.
    """

    codes: Tensor
    slots: Tensor
    used: Tensor
    longest: int
    offsets: Tensor
    filters: Tensor
    ordered: bool
    places: Tensor


class Packed(NamedTuple):
    """A lookup weight as the kernels read it.

    Attributes:
        dictionary: [groups·k, m/groups], contiguous.
        coefficients: where g = 1 an int64 table [L, F′], tap t of each filter, its coefficient's float32 bits over its code;
            otherwise [T, G], zeros beyond g.
        taps: the integers.
        group_size: g.
    """

    dictionary: Tensor
    coefficients: Tensor
    taps: Taps
    group_size: int


def padded_group(size: int) -> int:
    """Rows of a matrix product that hold ``size`` filters: 16, 32, 64 or a multiple of 128."""
    return max(16, 1 << (size - 1).bit_length()) if size <= 128 else -(-size // 128) * 128


def _taps(
    indices: Tensor, positions: Tensor, offsets: Tensor, filters: Tensor, groups: int, size: int, kernel_width: int
) -> Taps:
    count, width = filters.shape
    owner = tap_filter_groups(offsets, indices.shape[0])
    plane = (owner // (count // groups) * size + indices) * kernel_width + positions % kernel_width
    codes = (plane << ROW_BITS | positions // kernel_width).to(torch.int32)
    natural = torch.arange(count * width, device=filters.device, dtype=torch.int32).view(count, width)
    extra = 0 if width == 1 else padded_group(width) - width
    slots, used = _slots(offsets.long()) if width == 1 else (codes.new_empty(0), codes.new_empty(0))
    return Taps(
        codes=codes,
        slots=slots,
        used=used,
        longest=int(offsets.diff().max()),
        offsets=offsets.clone(memory_format=torch.contiguous_format),
        filters=F.pad(filters, (0, extra), value=-1).contiguous(),
        ordered=torch.equal(filters, natural),
        places=natural[filters >= 0][filters[filters >= 0].argsort()],
    )


def _slots(offsets: Tensor) -> tuple[Tensor, Tensor]:
    count = offsets.shape[0] - 1
    ends = F.pad(offsets, (0, -count % BLOCK), value=int(offsets[-1]))
    counts = ends.diff()
    number = torch.arange(max(1, int(counts.max())), device=offsets.device)[:, None]
    return torch.minimum(ends[:-1] + number, (ends[1:] - 1).clamp(min=0)), number < counts


def _coefficients(coefficients: Tensor, codes: Tensor, slots: Tensor, used: Tensor, width: int) -> Tensor:
    if width > 1:
        return F.pad(coefficients, (0, width - coefficients.shape[1]))
    if not codes.numel():
        return torch.zeros_like(slots)
    values = torch.where(used, coefficients[slots, 0].float(), 0.0)
    return values.view(torch.int32).long() << 32 | codes[slots].long()


_prepared_taps = Prepared(_taps)
_prepared_coefficients = Prepared(_coefficients)


def pack(weight: Weight, kernel_width: int) -> Packed:
    """Pack a weight; each part once until its tensors change.

    Only new integers make the host wait for the device; new coefficients do not, so training steps can be captured. Cached
    values are copies: a view would keep the tensors alive whose death ends the entry.
    """
    dictionary, coefficients, *integers = weight
    groups, size, _ = dictionary.shape
    taps = _prepared_taps(tuple(integers), groups, size, kernel_width)
    width = taps.filters.shape[1]
    if width > 1 and width == coefficients.shape[1]:
        values = coefficients.contiguous()
    else:
        values = _prepared_coefficients((coefficients, taps.codes, taps.slots, taps.used), width)
    return Packed(dictionary.flatten(0, 1).contiguous(), values, taps, coefficients.shape[1])


class Sizes(NamedTuple):
    """Sizes of one call. Rows and columns of S are those that some tap reads; ``padded_width`` is W with its padding."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel_width: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int
    padded_width: int
    rows: int
    pitch: int

    @property
    def plane(self) -> int:
        """Elements of S between two planes of an image."""
        return self.rows * self.pitch

    def image(self, planes: int) -> int:
        """Elements of S per image, for ``planes`` = groups·k dictionary vectors."""
        return planes * self.kernel_width * self.plane


def vector(element_size: int) -> int:
    """Elements in 16 bytes."""
    return 16 // element_size


def sizes_of(size: Sequence[int], geometry: Geometry, element_size: int) -> Sizes:
    """The sizes of a call on images of ``size`` (height, width) whose elements take ``element_size`` bytes."""
    _, kernel_size, stride, padding, dilation = geometry
    high, wide = output_size(size, kernel_size, stride, padding, dilation)
    lanes = vector(element_size)
    return Sizes(
        height=size[0],
        width=size[1],
        out_height=high,
        out_width=wide,
        kernel_width=kernel_size[1],
        stride=(stride[0], stride[1]),
        dilation=(dilation[0], dilation[1]),
        top=padding[0],
        left=padding[2],
        padded_width=size[1] + padding[2] + padding[3],
        rows=(high - 1) * stride[0] + (kernel_size[0] - 1) * dilation[0] + 1,
        pitch=-(-wide // lanes) * lanes,
    )


def flags(epilogue: Epilogue, y: Tensor) -> dict[str, Any]:
    """Compile-time arguments of :func:`lcnn_compile.kernels.triton.epilogue.store_tile`; the residual's strides are those of y."""
    aligned = gcd(vector(y.element_size()), y.shape[3], *y.stride()[:3]) if y.stride(3) == 1 else 1
    return {"RESIDUAL_LAST": epilogue.residual_last, "ACTIVATION": epilogue.activation, "VEC": aligned}
