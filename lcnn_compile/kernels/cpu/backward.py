"""The backward pass of the lookup stage on the C++ kernels: two multiply-adds for each one of the forward pass."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu.forward import address_of, is_available
from lcnn_compile.kernels.cpu.threads import thread_count
from lcnn_compile.kernels.reference import skips_pixels

SHARE = 0.6
"""Of the entries of P: with more taps than that, dense convolutions with P are faster."""


class _Problem(ctypes.Structure):
    """lcnn::GradientProblem."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "batch", "groups", "k", "n", "height", "width", "out_height", "out_width", "kernel_width", "top", "left", "down",
            "right", "filter_groups", "size", "taps", "threads",
        )
    )  # fmt: skip


class _Tensors(ctypes.Structure):
    """lcnn::GradientTensors."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("grad", "s", "coefficients", "indices", "positions", "offsets", "filters", "grad_s", "grad_coefficients")
    )


def pays(dictionary: Tensor, coefficients: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether these kernels take the backward pass of such a layer, and are faster than dense convolutions; by shapes alone.

    ``geometry`` is (out_channels, kernel_size, stride, padding, dilation).
    """
    out_channels, kernel_size, stride, padding, _ = geometry
    whole = tuple(stride) == (1, 1) or skips_pixels(kernel_size, stride, padding)
    if not dictionary.is_cpu or dictionary.dtype != torch.float32 or not whole:
        return False
    entries = out_channels * dictionary.shape[1] * math.prod(kernel_size)
    return coefficients.shape[0] * coefficients.shape[1] <= SHARE * entries and is_available()


def gradients(
    grad: Tensor,
    s: Tensor,
    lookups: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    groups: int,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor] | None:
    """The gradients of S and of the coefficients, contiguous; None where there is no memory for the scratch.

    Args:
        grad: of the output, float32 [N, n, H', W'].
        s: float32 [N, groups·k, H, W], not padded.
        lookups: coefficients, indices, positions, offsets and filters of a validated lookup weight.
        groups: of the convolution.
        kernel_size, padding, dilation: of the convolution, whose stride is 1; padding is (top, bottom, left, right).
    """
    library = cpu_build.library()
    assert library is not None
    tensors = [t.contiguous() for t in (grad, s, *lookups)]
    made = torch.empty_like(tensors[1]), torch.empty_like(tensors[2])
    n = grad.shape[1]
    sizes = [s.shape[0], groups, s.shape[1] // groups, n, *s.shape[2:], *grad.shape[2:], kernel_size[1], padding[0], padding[2]]
    problem = _Problem(*sizes, *dilation, *lookups[4].shape, lookups[0].shape[0], thread_count())
    failed = library.lcnn_gradients(ctypes.byref(problem), ctypes.byref(_Tensors(*map(address_of, (*tensors, *made)))))
    return None if failed else made
