"""LookupConv1d, LookupConv2d and LookupConv3d: drop-in, trainable convolutions whose weight is a lookup weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile.config import LayerConfig
from lcnn_compile.geometry import Conv3dGeometry, stack_frames, unstack_frames
from lcnn_compile.modules.base import LookupModule

SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")


class LookupConv(LookupModule):
    """What the convolutions share. Abstract."""

    attributes = (*SETTINGS, "output_padding", "transposed")

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dictionary_size: int | float = 0.25,
        sparsity: float | None = 6,
        group_size: int = 8,
        lowering: str = "auto",
        precision: str = "float32",
    ):
        args = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._initialise(args, device, dtype, dictionary_size, sparsity, group_size, lowering, precision)

    @classmethod
    def from_conv(cls, conv: Any, config: LayerConfig | None = None) -> Any:
        """Fit a lookup convolution to the weight of ``conv`` alone; ``convert`` with calibration data fits far better.

        Exact (W itself, to the last bit) with ``dictionary_size=1.0, sparsity=None``.
        """
        return cls._fit(conv, config)

    def to_conv(self) -> Any:
        """The dense convolution that computes the same function."""
        return self._fill(self._skeleton())

    def _skeleton(self) -> Any:
        args = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return type(self).dense_type(*args, self.bias is not None, self.padding_mode, device="meta")

    def to_dense(self) -> Any:
        """As ``to_conv``."""
        return self.to_conv()

    def _convolve(self, x: Tensor) -> Tensor:
        """[N, C, H, W] padded as the mode asks, then the operator."""
        if self.padding_mode != "zeros" and any(self.geometry.padding):
            x = F.pad(x, self.geometry.padding, mode=self.padding_mode)
        elif self.padding_mode == "circular":
            x = x.contiguous()  # as circular padding by nothing returns it to dense layers
        return self._lookup(x, self.bias)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, and the sizes."""
        ones, zeros = (1,) * len(self.kernel_size), (0,) * len(self.kernel_size)
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        optional = {"padding": zeros, "output_padding": zeros, "dilation": ones, "groups": 1}
        text += "".join(f", {name}={getattr(self, name)!r}" for name, d in optional.items() if getattr(self, name) != d)
        text += "" if self.bias is not None else ", bias=False"
        text += "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode!r}"
        return f"{text}, {self._sizes_text()}"


class LookupConv2d(LookupConv):
    """A drop-in ``nn.Conv2d`` whose weight is a lookup weight: [N, m, H, W] or [m, H, W] in, as ``nn.Conv2d`` out.

    All arguments of ``nn.Conv2d`` mean what they mean there, with every padding_mode and string padding; the sizes
    (``dictionary_size``, ``sparsity``, ``group_size``) are :class:`~lcnn_compile.config.LayerConfig`'s.

    Raises:
        ConfigError: for arguments that ``nn.Conv2d`` would refuse, and sizes out of range.
    """

    dense_type = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """[N, m, H, W] or [m, H, W] of the module's dtype to [N, n, H', W'] or [n, H', W']."""
        batched = self._batched(input)
        y = self._convolve(input if batched else input.unsqueeze(0))
        return y if batched else y.squeeze(0)


class LookupConv1d(LookupConv):
    """A drop-in ``nn.Conv1d`` whose weight is a lookup weight: [N, m, L] or [m, L] in, as ``nn.Conv1d`` out.

    It runs as a 2-d convolution over one row. Arguments are those of ``nn.Conv1d``, sizes as for :class:`LookupConv2d`.

    Raises:
        ConfigError: for arguments that ``nn.Conv1d`` would refuse, and sizes out of range.
    """

    dense_type = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        """[N, m, L] or [m, L] of the module's dtype to [N, n, L'] or [n, L']."""
        batched = self._batched(input)
        # As PyTorch does: a transposed input would pass for an image in channels_last, and so would the output.
        input = input.contiguous()
        y = self._convolve((input if batched else input.unsqueeze(0)).unsqueeze(2)).squeeze(2)
        return y if batched else y.squeeze(0)


class LookupConv3d(LookupConv):
    """A drop-in ``nn.Conv3d`` whose weight is a lookup weight: [N, m, D, H, W] or [m, D, H, W] in, as ``nn.Conv3d`` out.

    It runs as a 2-d convolution whose input channels are the kd frames that an output frame sees, so a dictionary vector has
    kd·m numbers, of which ``dictionary_size`` may be a fraction. Arguments are those of ``nn.Conv3d``.

    Raises:
        ConfigError: for arguments that ``nn.Conv3d`` would refuse, and sizes out of range.
    """

    dense_type = nn.Conv3d
    geometry: Conv3dGeometry

    def forward(self, input: Tensor) -> Tensor:
        """[N, m, D, H, W] or [m, D, H, W] of the module's dtype to [N, n, D', H', W'] or [n, D', H', W']."""
        batched = self._batched(input)
        x = input if batched else input.unsqueeze(0)
        stacked, frames = stack_frames(x, self.geometry.depth, self.groups, self.padding_mode)
        y = unstack_frames(self._convolve(stacked), frames)
        return y if batched else y.squeeze(0)
