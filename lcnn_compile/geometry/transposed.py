"""A transposed convolution as a stride-1 convolution with one filter for each output sub-pixel (phase) of each channel.

For learning it is a plain convolution over the input with zeros between its pixels. The operator never sees these zeros:
an output pixel of a given phase meets input pixels only under some kernel positions, so the taps are split by phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.geometry.plane import Call, Geometry, Usage
from lcnn_compile.kernels.reference import tap_filter_groups
from lcnn_compile.lookup import LookupWeight


class Axis(NamedTuple):
    """One spatial dimension of a transposed convolution."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    extra: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Output pixels from the first that one input pixel writes to the last, less one."""
        return self.dilation * (self.kernel - 1)

    def phase(self, r: int) -> int:
        """The sub-pixel that kernel position ``r`` writes."""
        return r * self.dilation % self.stride

    @property
    def step(self) -> int:
        """Dilation of the convolution that computes each phase."""
        return math.gcd(*(r * self.dilation // self.stride for r in range(self.kernel))) or 1

    @property
    def size(self) -> int:
        """Kernel size of that convolution."""
        return self.reach // self.stride // self.step + 1

    def position(self, r: int) -> int:
        """The position in that kernel of kernel position ``r``."""
        return self.size - 1 - r * self.dilation // self.stride // self.step

    @property
    def first(self) -> int:
        """The first whole pixel that is computed."""
        return min(self.padding // self.stride, (self.size - 1) * self.step)

    @property
    def crop(self) -> int:
        """Sub-pixels computed before the first of the output."""
        return self.padding - self.first * self.stride

    def pads(self, extra: int) -> tuple[int, int]:
        """Zeros before and after the input, for ``extra`` more output pixels at the end."""
        return (self.size - 1) * self.step - self.first, max(0, (self.reach + extra - self.padding) // self.stride)

    def length(self, size: int, extra: int) -> int:
        """Output pixels for ``size`` input pixels."""
        return (size - 1) * self.stride - 2 * self.padding + self.reach + extra + 1


@dataclass(frozen=True)
class TransposedGeometry(Geometry):
    """An ``nn.ConvTranspose2d``, or an ``nn.ConvTranspose1d`` over images of one row.

    As a plain convolution over stuffed input it has stride 1, the kernel flipped, and no output padding: that only adds
    pixels at the end.

    Attributes:
        axes: the layer's own kernel, stride, padding, output padding and dilation, of rows and columns.
        own_dimensions: 1 or 2.
    """

    axes: tuple[Axis, Axis] = (Axis(), Axis())
    own_dimensions: int = 2

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """The geometry of a transposed convolution."""
        settings = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation)
        axes = [Axis(*(int(v) for v in values)) for values in zip(*settings, strict=True)]
        rows, columns = [Axis(), *axes][-2:]
        (left, top) = (axis.reach - axis.padding for axis in (columns, rows))
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.groups,
            (rows.kernel, columns.kernel),
            padding=(left, left, top, top),
            dilation=(rows.dilation, columns.dilation),
            axes=(rows, columns),
            own_dimensions=len(axes),
        )

    @property
    def dimensions(self) -> int:
        """Spatial dimensions of the layer's own inputs."""
        return self.own_dimensions

    @property
    def phases(self) -> int:
        """Output sub-pixels of an input pixel."""
        return self.axes[0].stride * self.axes[1].stride

    def as_images(self, x: Tensor) -> Tensor:
        """The layer's own batched input or output as [N, C, H, W]."""
        return x.unsqueeze(2) if self.own_dimensions == 1 else x

    def images(self, x: Tensor) -> Tensor:
        """An input as float32 [N, C, (H - 1)·stride + 1, (W - 1)·stride + 1], with zeros between its pixels."""
        x = self.as_images(super().images(x))
        (down, right), (height, width) = (axis.stride for axis in self.axes), x.shape[2:]
        stuffed = x.new_zeros(*x.shape[:2], (height - 1) * down + 1, (width - 1) * right + 1)
        stuffed[:, :, ::down, ::right] = x
        return stuffed

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """An output as float32 [N, n, OH, OW], without the pixels that output padding adds."""
        high, wide = self.output_size(x.shape[2], x.shape[3])
        return self.as_images(super().outputs(y, x))[:, :, :high, :wide]

    def weight(self, own: Tensor) -> Tensor:
        """[m, n/groups, kh, kw] as [n, m/groups, kh, kw], flipped as for a plain convolution."""
        own = self.as_images(own)
        return own.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)

    def own_weight(self, weight: Tensor) -> Tensor:
        """The inverse of ``weight``."""
        own = weight.flip(2, 3).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return own.squeeze(2) if self.own_dimensions == 1 else own

    def usage(self, x: Tensor, y: Tensor) -> Usage:
        """Every input pixel meets every tap once."""
        size = (int(x.shape[-2]) if self.own_dimensions == 2 else 1, int(x.shape[-1]))
        return Usage(size[0] * size[1], size[0] * size[1], size)

    def extra(self, output_size: Any, size: Any) -> tuple[int, int]:
        """Output padding that gives the wanted ``output_size`` (H, W) for an input of ``size`` (H, W); the layer's own for None."""
        rows, columns = self.axes
        if output_size is None:
            return rows.extra, columns.extra
        wanted = [1, *output_size][-2:]
        return wanted[0] - rows.length(size[0], 0), wanted[1] - columns.length(size[1], 0)

    def call(self, extra: tuple[int, int] | None = None) -> Call:
        """How the operator computes all phases, for the given output padding or the layer's own."""
        rows, columns = self.axes
        down, right = (rows.extra, columns.extra) if extra is None else extra
        return Call(
            self.out_channels * self.phases,
            (rows.size, columns.size),
            (1, 1),
            (*rows.pads(down), *columns.pads(right)),
            (rows.step, columns.step),
        )

    def stored(self, weight: LookupWeight) -> LookupWeight:
        """The taps of a weight of the plain convolution, split by the phase that they write."""
        if self.phases == 1 or weight.kernel_size != self.kernel_size or weight.out_channels != self.out_channels:
            return weight
        rows, columns = self.axes
        high, wide = self.kernel_size
        own = [(high - 1 - p // wide, wide - 1 - p % wide) for p in range(self.area)]
        device = weight.positions.device
        phase_of = torch.tensor([rows.phase(r) * columns.stride + columns.phase(c) for r, c in own], device=device)
        position_of = torch.tensor([rows.position(r) * columns.size + columns.position(c) for r, c in own], device=device)
        phase = phase_of[weight.positions.long()]
        group = tap_filter_groups(weight.offsets, weight.positions.shape[0])
        per = weight.filters.shape[0] // self.groups
        # Filter groups of one convolution group stay together: first by convolution group, then by phase.
        target = (group // per * self.phases + phase) * per + group % per
        order = target.argsort(stable=True)
        counts = torch.bincount(target, minlength=weight.filters.shape[0] * self.phases)
        blocks = weight.filters.view(self.groups, 1, per, -1)
        numbers = torch.arange(self.phases, dtype=torch.int32, device=device).view(1, -1, 1, 1)
        filters = torch.where(blocks >= 0, blocks * self.phases + numbers, blocks)
        return replace(
            weight,
            coefficients=weight.coefficients[order],
            indices=weight.indices[order],
            positions=position_of[weight.positions.long()[order]].to(torch.int32),
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
            filters=filters.flatten(0, 2).contiguous(),
            kernel_size=(rows.size, columns.size),
        )

    def natural_weight(self, weight: Tensor) -> Tensor:
        """The plain convolution's weight [n, m/groups, kh, kw] from that of all phases."""
        rows, columns = self.axes
        split = weight.unflatten(0, (self.out_channels, rows.stride, columns.stride))
        # Position p of the flipped kernel is the layer's own position kernel - 1 - p.
        down, right = ([axis.kernel - 1 - p for p in range(axis.kernel)] for axis in self.axes)
        picked = split[:, [rows.phase(r) for r in down]][:, :, [columns.phase(c) for c in right]]
        # [n, kh, kw, m/groups, size, size]: the diagonal of kernel position and phase position.
        at_rows = torch.tensor([rows.position(r) for r in down], device=weight.device)
        at_columns = torch.tensor([columns.position(c) for c in right], device=weight.device)
        shape = (self.out_channels, rows.kernel, columns.kernel, self.channels, rows.size, columns.size)
        picked = picked.gather(4, at_rows.view(1, -1, 1, 1, 1, 1).expand(*shape[:4], 1, shape[5])).squeeze(4)
        picked = picked.gather(4, at_columns.view(1, 1, -1, 1, 1).expand(*shape[:4], 1)).squeeze(4)
        return picked.permute(0, 3, 1, 2)

    def interleave(self, y: Tensor, size: Any, extra: tuple[int, int]) -> Tensor:
        """All phases [N, n·phases, A, B] as the output [N, n, OH, OW] for an input of ``size`` (H, W)."""
        rows, columns = self.axes
        # Not pixel_shuffle, which is no faster and has wrong gradients for a batch of none.
        split = y.unflatten(1, (self.out_channels, rows.stride, columns.stride))
        y = split.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
        high, wide = rows.length(size[0], extra[0]), columns.length(size[1], extra[1])
        return y[:, :, rows.crop : rows.crop + high, columns.crop : columns.crop + wide]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
        """What the module would return for ``x`` with another weight [n, m/groups, kh, kw] and bias [n]."""
        images = self.as_images(self.batched(x))
        own = self.as_images(self.own_weight(weight))
        extra = self.extra(output_size, images.shape[2:])
        stride, padding, dilation = (
            tuple(getattr(axis, name) for axis in self.axes) for name in ("stride", "padding", "dilation")
        )
        y = F.conv_transpose2d(images, own, bias, stride, padding, extra, self.groups, dilation)
        y = y.squeeze(2) if self.own_dimensions == 1 else y
        return y if x.dim() == self.own_dimensions + 2 else y.squeeze(0)
