"""``torch.ops.lcnn.lookup_conv2d_backward``: the three gradients on a GPU, the same at every run.

The gradient of S goes through P and cuDNN, told to be deterministic; that of the coefficients is taken at the taps alone,
by a kernel of ours, where Triton runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.kernels import reference, triton_ops

library = torch.library.Library("lcnn", "FRAGMENT")
library.define(
    "lookup_conv2d_backward(Tensor grad, Tensor input, Tensor dictionary, Tensor coefficients, Tensor indices, Tensor positions, "
    "Tensor offsets, Tensor filters, SymInt out_channels, int[] kernel_size, int[] stride, SymInt[] padding, int[] dilation, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _like(input: Tensor) -> Tensor:
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.empty_like(input, memory_format=torch.channels_last if last else torch.contiguous_format)


def _backward(
    grad: Tensor,
    input: Tensor,
    dictionary: Tensor,
    coefficients: Tensor,
    indices: Tensor,
    positions: Tensor,
    offsets: Tensor,
    filters: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    groups, size, per_group = dictionary.shape
    weight = (dictionary, coefficients, indices, positions, offsets, filters)
    grad_input, grad_dictionary, grad_coefficients = (input.new_empty(0) for _ in range(3))
    taps = triton_ops.coefficient_gradient(grad, input, weight, kernel_size, stride, padding, dilation) if wanted[2] else None
    dense = wanted[2] and taps is None
    if taps is not None:
        grad_coefficients = taps
    if wanted[0] or wanted[1] or dense:
        pointwise = reference.pointwise_weight(dictionary)
        p = reference.lookup_tensor(*weight[1:], out_channels, size, kernel_size)
        s = reference.pad_spatial(torch.nn.functional.conv2d(input, pointwise, None, groups=groups), padding)
        with _deterministic():
            grad_s, grad_p, _ = torch.ops.aten.convolution_backward(
                grad, s, p, None, stride, [0, 0], dilation, False, [0, 0], groups, [True, dense, False]
            )
        if dense:
            grad_coefficients = reference.gather_taps(grad_p, indices, positions, offsets, filters)
        top, _, left, _ = padding
        grad_s = grad_s[:, :, top : top + input.shape[2], left : left + input.shape[3]]
        flat = grad_s.unflatten(1, (groups, size)).flatten(3)
        if wanted[0]:
            columns = torch.einsum("gkm,ngkp->ngmp", dictionary, flat)
            grad_input = _like(input).copy_(columns.reshape(input.shape))
        if wanted[1]:
            channels = input.unflatten(1, (groups, per_group)).flatten(3)
            grad_dictionary = torch.einsum("ngkp,ngmp->gkm", flat, channels).contiguous()
    return grad_input, grad_dictionary, grad_coefficients


library.impl("lookup_conv2d_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lcnn::lookup_conv2d_backward", lib=library)
def _fake(grad: Tensor, input: Tensor, dictionary: Tensor, coefficients: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    wanted = rest[-1]
    assert isinstance(wanted, (list, tuple))
    none = [input.new_empty(0) for _ in range(3)]
    return (
        _like(input) if wanted[0] else none[0],
        torch.empty_like(dictionary, memory_format=torch.contiguous_format) if wanted[1] else none[1],
        torch.empty_like(coefficients, memory_format=torch.contiguous_format) if wanted[2] else none[2],
    )


def gradients(
    grad: Tensor, saved: Sequence[Tensor], geometry: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of (input, dictionary, coefficients), None where not ``wanted``, for the operator's autograd formula.

    ``saved`` are the operator's first seven arguments, ``geometry`` (out_channels, kernel_size, stride, padding, dilation).
    """
    made = torch.ops.lcnn.lookup_conv2d_backward(grad, *saved, *geometry, list(wanted))
    return tuple(g if w else None for g, w in zip(made, wanted, strict=True))
