"""A 3-d convolution as a 2-d one: the frames that its kernel spans in depth are stacked as input channels.

A dictionary vector then spans the kernel's depth, where neighbouring frames mostly repeat each other, and taps have a row and
a column as in two dimensions. It is exact, for every stride, dilation and padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.geometry.plane import Geometry, Usage, paddings
from lcnn_compile.kernels.reference import needed_pixels


class Depth(NamedTuple):
    """How a kernel moves in depth; ``padding`` is (front, back)."""

    size: int = 1
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Frames from the first that the kernel sees to the last."""
        return self.dilation * (self.size - 1) + 1


def stack_frames(x: Tensor, depth: Depth, groups: int, mode: str) -> tuple[Tensor, int]:
    """[N, C, D, H, W] as [N·OD, size·C, H, W], and OD: every output frame with the ``size`` frames that it sees as channels.

    Channels are ordered by convolution group, then frame. Where the frames follow each other (a batch of one, no dilation,
    one group) the windows overlap in memory instead of being copied.
    """
    if any(depth.padding):
        x = F.pad(x, (0, 0, 0, 0, *depth.padding), mode="constant" if mode == "zeros" else mode)
    frames = x.transpose(1, 2)
    if depth.size > 1:
        windows = frames.contiguous().unfold(1, depth.reach, depth.stride)[..., :: depth.dilation]
        grouped = windows.unflatten(2, (groups, -1)).permute(0, 1, 2, 6, 3, 4, 5)
        frames = grouped.flatten(2, 4)
    elif depth.stride > 1:
        frames = frames[:, :: depth.stride]
    return frames.flatten(0, 1), frames.shape[1]


def unstack_frames(y: Tensor, frames: int) -> Tensor:
    """[N·OD, n, OH, OW] as [N, n, OD, OH, OW], contiguous."""
    return y.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Conv3dGeometry(Geometry):
    """An ``nn.Conv3d``; ``in_channels`` counts the stacked frames, kd·m.

    Attributes:
        depth: size kd, stride, padding and dilation in depth.
    """

    depth: Depth = field(default_factory=Depth)

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """The geometry of an ``nn.Conv3d``."""
        front_back, (top, bottom), (left, right) = paddings(layer)
        kernel, stride, dilation = (tuple(int(v) for v in t) for t in (layer.kernel_size, layer.stride, layer.dilation))
        depth = Depth(kernel[0], stride[0], front_back, dilation[0])
        flat = (kernel[1:], stride[1:], (left, right, top, bottom), dilation[1:], layer.padding_mode)
        return cls(layer.in_channels * depth.size, layer.out_channels, layer.groups, *flat, depth)  # type: ignore[arg-type]

    @property
    def dimensions(self) -> int:
        """Spatial dimensions of the layer's own inputs."""
        return 3

    def images(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] or [C, D, H, W] as float32 [N·OD, kd·C, H, W]."""
        return stack_frames(super().images(x), self.depth, self.groups, self.padding_mode)[0]

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """[N, n, OD, OH, OW] or unbatched as float32 [N·OD, n, OH, OW]."""
        return super().outputs(y, x).transpose(1, 2).flatten(0, 1)

    def weight(self, own: Tensor) -> Tensor:
        """[n, m/groups, kd, kh, kw] as [n, kd·m/groups, kh, kw]."""
        return own.transpose(1, 2).flatten(1, 2)

    def own_weight(self, weight: Tensor) -> Tensor:
        """[n, kd·m/groups, kh, kw] as [n, m/groups, kd, kh, kw]."""
        return weight.unflatten(1, (self.depth.size, -1)).transpose(1, 2)

    def usage(self, x: Tensor, y: Tensor) -> Usage:
        """Every output frame is an image of its own, with an S of its own."""
        size, frames = (int(x.shape[-2]), int(x.shape[-1])), int(y.shape[-3])
        return Usage(y.shape[-3:].numel(), frames * needed_pixels(size, self.kernel_size, self.stride), size)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module would return for ``x`` with another weight [n, kd·m/groups, kh, kw] and bias [n]."""
        stacked, frames = stack_frames(self.batched(x), self.depth, self.groups, self.padding_mode)
        y = unstack_frames(super().apply(stacked, weight, bias), frames)
        return y if x.dim() == 5 else y.squeeze(0)
