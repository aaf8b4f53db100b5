"""How a 2-d convolution reads its input, and what the other kinds of layers say of themselves in its terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile.kernels import arguments
from lcnn_compile.kernels.reference import needed_pixels, output_size
from lcnn_compile.lookup import LookupWeight

Call = arguments.Geometry
"""What the operator is called with besides tensors; modules pickled by version 0.1 name it so."""


class Usage(NamedTuple):
    """How one call of a layer runs, per sample.

    Attributes:
        taps: pixels at which each tap of a filter is applied.
        inputs: pixels at which S is needed.
        size: (H, W) of the images that the operator sees.
    """

    taps: int
    inputs: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Shapes of a layer as a 2-d convolution. This class is ``nn.Conv2d``; the other kinds derive from it.

    Attributes:
        in_channels: m over all convolution groups.
        out_channels: n over all convolution groups.
        groups: convolution groups.
        kernel_size: (kh, kw).
        stride: (rows, columns).
        padding: (left, right, top, bottom), as ``F.pad`` wants it.
        dilation: (rows, columns).
        padding_mode: as nn.Conv2d's.
    """

    in_channels: int
    out_channels: int
    groups: int = 1
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """The geometry of a module of this kind."""
        (top, bottom), (left, right) = paddings(layer)
        rest = (_pair(layer.stride), (left, right, top, bottom), _pair(layer.dilation), layer.padding_mode)
        return cls(layer.in_channels, layer.out_channels, layer.groups, _pair(layer.kernel_size), *rest)

    @property
    def dimensions(self) -> int:
        """Spatial dimensions of the layer's own inputs, which have two more when batched."""
        return 2

    @property
    def phases(self) -> int:
        """Filters that the operator has for each of the layer's: output sub-pixels of a transposed convolution, else 1."""
        return 1

    @property
    def area(self) -> int:
        """Kernel positions, kh·kw."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def channels(self) -> int:
        """Input channels of one convolution group."""
        return self.in_channels // self.groups

    @property
    def filters(self) -> int:
        """Filters of one convolution group."""
        return self.out_channels // self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense layer where each of its taps is applied once."""
        return self.out_channels * self.channels * self.area

    def batched(self, x: Tensor) -> Tensor:
        """An input or output of the layer with a batch dimension."""
        return x if x.dim() == self.dimensions + 2 else x.unsqueeze(0)

    def images(self, x: Tensor) -> Tensor:
        """An input of the layer as float32 [N, in_channels, H, W]."""
        return self.batched(x).detach().float()

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """An output of the layer as float32 [N, out_channels, OH, OW]; ``x`` is the input as ``images`` gives it."""
        return self.batched(y).detach().float()

    def weight(self, own: Tensor) -> Tensor:
        """The layer's own weight as [n, m/groups, kh, kw]."""
        return own

    def own_weight(self, weight: Tensor) -> Tensor:
        """The inverse of ``weight``."""
        return weight

    def usage(self, x: Tensor, y: Tensor) -> Usage:
        """How a call with input ``x`` and output ``y``, both the layer's own, runs."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        return Usage(math.prod(y.shape[-2:]), needed_pixels(size, self.kernel_size, self.stride), size)

    def call(self) -> Call:
        """How the operator computes the layer; where the padding is not of zeros, the input is padded before."""
        left, right, top, bottom = self.padding if self.padding_mode == "zeros" else (0, 0, 0, 0)
        return Call(self.out_channels, self.kernel_size, self.stride, (top, bottom, left, right), self.dilation)

    def stored(self, weight: LookupWeight) -> LookupWeight:
        """A fitted weight [n, m/groups, kh, kw] as the operator wants it; one that is so already stays."""
        return weight

    def natural_weight(self, weight: Tensor) -> Tensor:
        """The weight [n, m/groups, kh, kw] that ``stored`` took apart."""
        return weight

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        left, right, top, bottom = self.padding
        return output_size((height, width), self.kernel_size, self.stride, (top, bottom, left, right), self.dilation)

    def pad(self, x: Tensor) -> Tensor:
        """[N, C, H, W] with the layer's padding around it."""
        if not any(self.padding):
            return x
        return F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module would return for ``x`` with another weight [n, m/groups, kh, kw] and bias [n]."""
        left, right, top, bottom = self.padding
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)
        return F.conv2d(self.pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def patches(self, s: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
        """What each kernel position sees at chosen output pixels.

        Args:
            s: [N, C, H, W], the input or a pointwise function of it (padding commutes with those).
            image: int64 [p], which image.
            pixel: int64 [p], which output pixel, row-major.

        Returns:
            [p, kh·kw, C].
        """
        wide = self.output_size(s.shape[2], s.shape[3])[1]
        s = self.pad(s)
        width = s.shape[3]
        start = (pixel // wide) * (self.stride[0] * width) + (pixel % wide) * self.stride[1]
        rows = torch.arange(self.kernel_size[0], device=s.device) * (self.dilation[0] * width)
        columns = torch.arange(self.kernel_size[1], device=s.device) * self.dilation[1]
        offset = (rows[:, None] + columns).flatten()
        flat = s.permute(0, 2, 3, 1).reshape(s.shape[0], -1, s.shape[1])
        return flat[image[:, None], start[:, None] + offset]


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def paddings(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """(before, after) of each spatial dimension of a convolution, string paddings worked out."""
    if layer.padding == "same":
        reach = [d * (size - 1) for d, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    if isinstance(layer.padding, str):
        return [(0, 0)] * len(layer.kernel_size)
    return [(int(p), int(p)) for p in layer.padding]
