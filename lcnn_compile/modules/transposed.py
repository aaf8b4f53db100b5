"""LookupConvTranspose1d and LookupConvTranspose2d: drop-in, trainable transposed convolutions with a lookup weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.errors import WeightError
from lcnn_compile.geometry import TransposedGeometry
from lcnn_compile.kernels.reference import output_format
from lcnn_compile.modules.conv import LookupConv


class LookupConvTranspose(LookupConv):
    """What the transposed convolutions share. Abstract.

    One stride-1 lookup convolution computes every sub-pixel (phase) of the output; the phases share the dictionary.
    """

    geometry: TransposedGeometry
    output_padding: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
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
        args = (in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        self._initialise(args, device, dtype, dictionary_size, sparsity, group_size, lowering, precision)

    def to_conv(self) -> Any:
        """The dense transposed convolution that computes the same function."""
        return self._fill(self._skeleton())

    def _skeleton(self) -> Any:
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.output_padding)
        rest = (self.groups, self.bias is not None, self.dilation, self.padding_mode)
        return type(self).dense_type(*sizes, *rest, device="meta")

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """[N, m, *] or [m, *] of the module's dtype to [N, n, *'] or [n, *'], * one or two dimensions.

        ``output_size`` chooses among the sizes that the stride leaves open, as for PyTorch's layer.
        """
        geometry = self.geometry
        batched = self._batched(input)
        if geometry.dimensions == 1:
            input = input.contiguous()  # as PyTorch does: transposed, it would pass for an image in channels_last
        x = geometry.as_images(input if batched else input.unsqueeze(0))
        size = x.shape[2], x.shape[3]
        extra = geometry.extra(None if output_size is None else list(output_size)[-geometry.dimensions :], size)
        if not isinstance(input, fx.Proxy):
            self._check(extra, size)
        call = self.call if output_size is None else geometry.call(extra)
        y = geometry.interleave(self._lookup(x, None, call), size, extra)
        y = y.contiguous() if self.bias is None else y + _like_output(self.bias, y)[:, None, None]
        if geometry.dimensions == 1:
            y = y.squeeze(2)
        elif not isinstance(input, fx.Proxy):
            y = y.contiguous(memory_format=output_format(x))
        return y if batched else y.squeeze(0)

    def _check(self, extra: tuple[int, int], size: tuple[int, int]) -> None:
        for axis, more, length in zip(self.geometry.axes, extra, size, strict=True):
            if not 0 <= more < max(axis.stride, axis.dilation):
                least = axis.length(length, 0)
                most = least + max(axis.stride, axis.dilation) - 1
                raise WeightError(f"{type(self).__name__}: output_size {least + more} is not possible; {least} to {most} are")
            if axis.length(length, more) <= 0:
                raise WeightError(f"{type(self).__name__}: input of size {size} is too small for padding {self.padding}")


def _like_output(bias: Tensor, y: Tensor) -> Tensor:
    # A cast where none is needed would stand in every traced graph.
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return bias.to(y.dtype) if autocast else bias


class LookupConvTranspose2d(LookupConvTranspose):
    """A drop-in ``nn.ConvTranspose2d`` with a lookup weight: [N, m, H, W] or [m, H, W] in, as ``nn.ConvTranspose2d`` out.

    Arguments are those of ``nn.ConvTranspose2d``, sizes as for :class:`~lcnn_compile.LookupConv2d`.

    Raises:
        ConfigError: for arguments that ``nn.ConvTranspose2d`` would refuse, and sizes out of range.
    """

    dense_type = nn.ConvTranspose2d


class LookupConvTranspose1d(LookupConvTranspose):
    """A drop-in ``nn.ConvTranspose1d`` with a lookup weight: [N, m, L] or [m, L] in, as ``nn.ConvTranspose1d`` out.

    Arguments are those of ``nn.ConvTranspose1d``, sizes as for :class:`~lcnn_compile.LookupConv2d`.

    Raises:
        ConfigError: for arguments that ``nn.ConvTranspose1d`` would refuse, and sizes out of range.
    """

    dense_type = nn.ConvTranspose1d
