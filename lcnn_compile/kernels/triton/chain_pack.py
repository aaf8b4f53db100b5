"""The arguments of a chain, and its matrices as kernels read them.

| tensor | shape | meaning |
| --- | --- | --- |
| input | [N, C, H, W] | x, or S of a layer |
| weight | [kh·kw·C′, n′] | ``weight[(r·kw + c)·C′ + i, o]`` is the filter o's weight for channel i at (r, c) |
| bias | [n′] or None | |
| residual | [N, n, OH, OW] or None | |
| next | [n′, k′] or None | ``next[o, j]``: what channel o gives to output j of the 1x1 product |

C′ is C filled up to a multiple of 16, n′ and k′ are filled up as :func:`filled` says; all with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcnn_compile.kernels.arguments import Epilogue, Geometry


class Chain(NamedTuple):
    """The arguments of one call of ``lcnn::chain``, in the order of its schema; ``padding`` is (top, bottom, left, right)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    next: Tensor | None
    out_channels: int
    next_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    activation: str
    residual_last: bool
    keep: bool

    @property
    def geometry(self) -> Geometry:
        """Of its convolution."""
        return Geometry(self.out_channels, *map(tuple, self[7:11]))  # type: ignore[arg-type]

    @property
    def epilogue(self) -> Epilogue:
        """Of its convolution; the bias is filled up."""
        return Epilogue(self.bias, self.residual, self.activation, self.residual_last)


def filled(channels: int) -> int:
    """Columns that hold so many channels: a power of two from 16 to 64, or a multiple of 64."""
    return max(16, 1 << (channels - 1).bit_length()) if channels <= 64 else -(-channels // 64) * 64


def filled_next(channels: int) -> int:
    """Columns that hold so many channels of the 1x1 product: a power of two, 16 or more."""
    return max(16, 1 << (channels - 1).bit_length())


def _fill(t: Tensor, dim: int, size: int) -> Tensor:
    missing = list(t.shape)
    missing[dim] = size - t.shape[dim]
    return torch.cat([t, t.new_zeros(missing)], dim) if missing[dim] else t


def pad_rows(t: Tensor, multiple: int) -> Tensor:
    """A tensor whose first dimension is filled up to a multiple with zeros."""
    return _fill(t, 0, -(-t.shape[0] // multiple) * multiple)


def pack_weight(weight: Tensor) -> Tensor:
    """[kh·kw·C′, n′] from the weight [n, C, kh, kw] of a convolution."""
    taps = weight.permute(2, 3, 1, 0)
    channels = -(-weight.shape[1] // 16) * 16
    return _fill(_fill(taps, 2, channels), 3, filled(weight.shape[0])).flatten(0, 2).contiguous()


def pack_next(matrix: Tensor) -> Tensor:
    """[n′, k′] from the matrix [k, n] of a 1x1 product."""
    return _fill(_fill(matrix.t(), 0, filled(matrix.shape[1])), 1, filled_next(matrix.shape[0])).contiguous()


def pack_bias(bias: Tensor) -> Tensor:
    """[n′] from [n]."""
    return _fill(bias, 0, filled(bias.shape[0])).contiguous()


def unpack_weight(weight: Tensor, channels: int, out_channels: int, kernel_size: Sequence[int]) -> Tensor:
    """[n, C, kh, kw] from [kh·kw·C′, n′]."""
    taps = weight.view(kernel_size[0], kernel_size[1], -1, weight.shape[1])
    return taps[:, :, :channels, :out_channels].permute(3, 2, 0, 1)
