"""How a convolution or a fully connected layer reads its input: the one place that knows padding, stride and dilation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """Shapes of a layer; a fully connected layer is a 1x1 convolution (LCNN, section 3).

    Attributes:
        in_channels: m over all convolution groups.
        out_channels: n over all convolution groups.
        groups: convolution groups.
        kernel_size: (kh, kw).
        stride: (rows, columns).
        padding: (left, right, top, bottom), as ``F.pad`` wants it.
        dilation: (rows, columns).
        padding_mode: as nn.Conv2d's.
        linear: whether inputs are [*, m] instead of [N, m, H, W] or [m, H, W].
    """

    in_channels: int
    out_channels: int
    groups: int = 1
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"
    linear: bool = False

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear) -> Geometry:
        """The geometry of a module."""
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features, linear=True)
        kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
        if layer.padding == "same":
            total = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
            padding = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
        elif isinstance(layer.padding, str):
            padding = (0, 0, 0, 0)
        else:
            rows, columns = _pair(layer.padding)
            padding = (columns, columns, rows, rows)
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.groups,
            kernel,
            _pair(layer.stride),
            padding,
            dilation,
            layer.padding_mode,
        )

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
        """Multiply-adds of the dense layer at one output pixel."""
        return self.out_channels * self.channels * self.area

    def images(self, x: Tensor) -> Tensor:
        """An input or output of the layer as float32 [N, C, H, W]; the inner dimensions of [N, *, C] become pixels."""
        if self.linear:
            rows = x.reshape(1, 1, -1) if x.dim() == 1 else x.reshape(x.shape[0], -1, x.shape[-1])
            x = rows.transpose(1, 2).unsqueeze(2)
        elif x.dim() == 3:
            x = x.unsqueeze(0)
        return x.detach().float()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        left, right, top, bottom = self.padding
        high = (height + top + bottom - self.dilation[0] * (self.kernel_size[0] - 1) - 1) // self.stride[0] + 1
        wide = (width + left + right - self.dilation[1] * (self.kernel_size[1] - 1) - 1) // self.stride[1] + 1
        return high, wide

    def pad(self, x: Tensor) -> Tensor:
        """[N, C, H, W] with the layer's padding around it."""
        if not any(self.padding):
            return x
        return F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module would return for ``x`` with another weight [n, m/groups, kh, kw] and bias [n]."""
        if self.linear:
            return F.linear(x, weight.flatten(1), bias)
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


def _pair(value: tuple[int, ...] | int | str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])
