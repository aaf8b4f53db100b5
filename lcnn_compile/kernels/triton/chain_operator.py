"""``torch.ops.lcnn.chain``: a convolution in channels_last, its epilogue, and the 1x1 product that follows it, as one operator.

Lookup layers become chains of it: S of a layer is the 1x1 product at the end of the layer before, and the layer itself a
convolution of S with the lookup tensor P. Packed matrices (:mod:`lcnn_compile.kernels.triton.chain_pack`) are plain tensors, so
that a compiler sees nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.errors import KernelError, WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.checks import LARGEST
from lcnn_compile.kernels.library import TAGS, library
from lcnn_compile.kernels.triton import ops as triton_ops
from lcnn_compile.kernels.triton.chain_pack import Chain, filled, filled_next, unpack_weight

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


def _check(call: Chain) -> tuple[int, int, int, int]:
    """Raise unless the call makes sense; the output's shape."""
    input, weight, bias, residual, next, out_channels, next_channels, kernel_size, stride, padding, dilation, activation, *_ = (
        call
    )
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
    if not call.keep and next is None:
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


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = Chain(*args)
    shape = _check(call)
    s_shape = (shape[0], call.next_channels, *shape[2:])
    return _empty(call.input, shape, call.keep), _empty(call.input, s_shape, call.next is not None)


def _chain(*args: Any) -> tuple[Tensor, Tensor]:
    """y [N, n, OH, OW] and the product [N, k, OH, OW], channels_last both; what is not wanted is empty, [0]."""
    call = Chain(*args)
    shape = _check(call)
    last = torch.channels_last
    input = call.input.contiguous(memory_format=last)
    residual = None if call.residual is None else call.residual.contiguous(memory_format=last)
    call = call._replace(input=input, residual=residual)
    s_shape = (shape[0], call.next_channels, *shape[2:])
    if input.numel() and triton_ops.usable(input.device.type, input.dtype):
        made = triton_ops.chain(call, shape)
        if made is not None:
            y, s = made
            return (
                y if y is not None and call.keep else _empty(input, shape, False),
                s if s is not None else _empty(input, s_shape, False),
            )
    weights = unpack_weight(call.weight, input.shape[1], call.out_channels, call.kernel_size)
    bias = None if call.bias is None else call.bias[: call.out_channels]
    y = reference.convolve(input, weights, call.geometry, 1)
    y = reference.apply_epilogue(y, *call.epilogue._replace(bias=bias)).contiguous(memory_format=last)
    if call.next is None:
        return y, _empty(input, s_shape, False)
    product = F.conv2d(y, call.next[: call.out_channels, : call.next_channels].t()[:, :, None, None]).contiguous(
        memory_format=last
    )
    return (y if call.keep else _empty(input, shape, False)), product


library.impl("chain", _chain, "CompositeExplicitAutograd")
torch.library.register_fake("lcnn::chain", _fake, lib=library)
library.impl("chain", torch.library.fallthrough_kernel, "Autograd")

chain = torch.ops.lcnn.chain.default
