"""``torch.ops.lcnn.chain``: a convolution in channels_last, its epilogue, and the 1x1 product that follows it, as one operator.

Lookup layers become chains of it: S of a layer is the 1x1 product at the end of the layer before, and the layer itself a
convolution of S with the lookup tensor P. Packed matrices (:mod:`lcnn_compile.kernels.triton.chain_pack`) are plain tensors, so
that a compiler sees nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.errors import KernelError, WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.checks import LARGEST
from lcnn_compile.kernels.library import TAGS, library
from lcnn_compile.kernels.triton import ops as triton_ops
from lcnn_compile.kernels.triton.chain_pack import filled, filled_next, unpack_weight

HALVES = (torch.float16, torch.bfloat16)
"""Dtypes in which lookup convolutions run as chains."""
WIDEST = 128
"""Channels that the 1x1 product may have."""


library.define(
    "chain(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? next, SymInt out_channels, SymInt next_channels, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, str activation, bool residual_last, bool keep) "
    "-> (Tensor, Tensor)",
    tags=TAGS,
)


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    next: Tensor | None,
    out_channels: int,
    next_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    keep: bool,
) -> tuple[int, int, int, int]:
    """Raise unless the call makes sense; the output's shape."""
    if input.dim() != 4 or input.layout != torch.strided:
        raise WeightError(f"chain: input is {input.layout} {tuple(input.shape)}; strided [N, C, H, W] is required")
    for key, values, size, least in (
        ("kernel_size", kernel_size, 2, 1), ("stride", stride, 2, 1), ("dilation", dilation, 2, 1), ("padding", padding, 4, 0)
    ):  # fmt: skip
        if len(values) != size or min(values) < least or max(values) > LARGEST:
            raise WeightError(f"chain: {key} is {tuple(values)}; {size} integers from {least} to {LARGEST} are required")
    rows = kernel_size[0] * kernel_size[1] * (-(-input.shape[1] // 16) * 16)
    columns = filled(out_channels)
    if tuple(weight.shape) != (rows, columns):
        raise WeightError(f"chain: weight has shape {tuple(weight.shape)}; the input and the filters need {(rows, columns)}")
    if bias is not None and tuple(bias.shape) != (columns,):
        raise WeightError(f"chain: bias has shape {tuple(bias.shape)}; {(columns,)} is required")
    if next is not None and (tuple(next.shape) != (columns, filled_next(next_channels)) or not 1 <= next_channels <= WIDEST):
        raise WeightError(
            f"chain: next has shape {tuple(next.shape)} for {next_channels} channels (at most {WIDEST}); "
            f"{(columns, filled_next(next_channels))} is required"
        )
    if not keep and next is None:
        raise KernelError("chain: neither the output nor the product is wanted")
    if activation not in reference.ACTIVATIONS:
        raise KernelError(f"chain: activation is {activation!r}; allowed are {sorted(reference.ACTIVATIONS)}")
    high, wide = reference.output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    if high <= 0 or wide <= 0:
        raise WeightError(f"chain: input of {tuple(input.shape)} is smaller than the kernel, {tuple(kernel_size)}")
    shape = (input.shape[0], out_channels, high, wide)
    if residual is not None and tuple(residual.shape) != shape:
        raise WeightError(f"chain: residual has shape {tuple(residual.shape)}; the output has {shape}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual), ("next", next)):
        if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
            raise WeightError(f"chain: {name} is {tensor.dtype} on {tensor.device}, input {input.dtype} on {input.device}")
    return shape


def _empty(input: Tensor, shape: Sequence[int], wanted: bool) -> Tensor:
    if not wanted:
        return torch.empty(0, dtype=input.dtype, device=input.device)
    return torch.empty(tuple(shape), dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    next: Tensor | None,
    out_channels: int,
    next_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    residual_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    geometry = (kernel_size, stride, padding, dilation)
    shape = _check(input, weight, bias, residual, next, out_channels, next_channels, *geometry, activation, keep)
    s_shape = (shape[0], next_channels, *shape[2:])
    return _empty(input, shape, keep), _empty(input, s_shape, next is not None)


def _chain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    next: Tensor | None,
    out_channels: int,
    next_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    residual_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y [N, n, OH, OW] and the product [N, k, OH, OW], channels_last both; what is not wanted is empty, [0]."""
    geometry = (kernel_size, stride, padding, dilation)
    shape = _check(input, weight, bias, residual, next, out_channels, next_channels, *geometry, activation, keep)
    last = torch.channels_last
    input = input.contiguous(memory_format=last)
    residual = None if residual is None else residual.contiguous(memory_format=last)
    s_shape = (shape[0], next_channels, *shape[2:])
    if input.numel() and triton_ops.usable(input.device.type, input.dtype):
        tail = (bias, residual, activation, residual_last, next)
        made = triton_ops.chain(input, weight, tail, geometry, shape, keep, next_channels)
        if made is not None:
            y, s = made
            return (
                y if y is not None and keep else _empty(input, shape, False),
                s if s is not None else _empty(input, s_shape, False),
            )
    weights = unpack_weight(weight, input.shape[1], out_channels, kernel_size)
    y = reference.convolve(input, weights, stride, padding, dilation, 1)
    y = reference.apply_epilogue(y, None if bias is None else bias[:out_channels], residual, activation, residual_last)
    y = y.contiguous(memory_format=last)
    if next is None:
        return y, _empty(input, s_shape, False)
    product = F.conv2d(y, next[:out_channels, :next_channels].t()[:, :, None, None]).contiguous(memory_format=last)
    return (y if keep else _empty(input, shape, False)), product


library.impl("chain", _chain, "CompositeExplicitAutograd")
torch.library.register_fake("lcnn::chain", _fake, lib=library)
library.impl("chain", torch.library.fallthrough_kernel, "Autograd")

chain = torch.ops.lcnn.chain.default
