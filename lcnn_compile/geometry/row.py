"""Layers that are 2-d convolutions over images of one row: fully connected and 1-d ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.geometry.plane import Geometry, Usage, paddings
from lcnn_compile.kernels.reference import needed_pixels


@dataclass(frozen=True)
class LinearGeometry(Geometry):
    """A fully connected layer is a 1x1 convolution (LCNN, section 3): inputs [*, m], every row of numbers a pixel."""

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """The geometry of an ``nn.Linear``."""
        return cls(layer.in_features, layer.out_features)

    def images(self, x: Tensor) -> Tensor:
        """[N, *, C] as float32 [N, C, 1, *]; the inner dimensions become pixels."""
        rows = x.reshape(1, 1, -1) if x.dim() == 1 else x.reshape(x.shape[0], -1, x.shape[-1])
        return rows.transpose(1, 2).unsqueeze(2).detach().float()

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """As ``images``."""
        return self.images(y)

    def weight(self, own: Tensor) -> Tensor:
        """[n, m] as [n, m, 1, 1]."""
        return own[:, :, None, None]

    def own_weight(self, weight: Tensor) -> Tensor:
        """[n, m, 1, 1] as [n, m]."""
        return weight[:, :, 0, 0]

    def usage(self, x: Tensor, y: Tensor) -> Usage:
        """Every row of numbers is a pixel of its own image."""
        rows = y[..., 0].numel() // (max(1, x.shape[0]) if x.dim() > 1 else 1)
        return Usage(rows, rows, (1, 1))

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module would return for ``x`` with another weight [n, m, 1, 1] and bias [n]."""
        return F.linear(x, weight.flatten(1), bias)


@dataclass(frozen=True)
class Conv1dGeometry(Geometry):
    """An ``nn.Conv1d``: kernel (1, k) over images [N, m, 1, L]."""

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """The geometry of an ``nn.Conv1d``."""
        ((left, right),) = paddings(layer)
        along = ((1, layer.kernel_size[0]), (1, layer.stride[0]), (left, right, 0, 0), (1, layer.dilation[0]))
        return cls(layer.in_channels, layer.out_channels, layer.groups, *along, layer.padding_mode)

    @property
    def dimensions(self) -> int:
        """Spatial dimensions of the layer's own inputs."""
        return 1

    def images(self, x: Tensor) -> Tensor:
        """[N, C, L] or [C, L] as float32 [N, C, 1, L]."""
        return super().images(x).unsqueeze(2)

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """As ``images``."""
        return self.images(y)

    def weight(self, own: Tensor) -> Tensor:
        """[n, m/groups, k] as [n, m/groups, 1, k]."""
        return own.unsqueeze(2)

    def own_weight(self, weight: Tensor) -> Tensor:
        """[n, m/groups, 1, k] as [n, m/groups, k]."""
        return weight.squeeze(2)

    def usage(self, x: Tensor, y: Tensor) -> Usage:
        """How a call runs, per sample."""
        size = (1, int(x.shape[-1]))
        return Usage(int(y.shape[-1]), needed_pixels(size, self.kernel_size, self.stride), size)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module would return for ``x`` with another weight [n, m/groups, 1, k] and bias [n]."""
        y = super().apply(self.batched(x).unsqueeze(2), weight, bias).squeeze(2)
        return y if x.dim() == 3 else y.squeeze(0)
