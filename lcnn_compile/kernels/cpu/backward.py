"""The backward pass of the lookup stage on the C++ kernels: two multiply-adds for each one of the forward pass."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from lcnn_compile.kernels.arguments import Geometry, Lookups, Weight
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


def pays(weight: Weight, geometry: Geometry) -> bool:
    """Whether these kernels take the backward pass of such a layer, and are faster than dense convolutions; by shapes alone."""
    dictionary, coefficients = weight[:2]
    whole = tuple(geometry.stride) == (1, 1) or skips_pixels(geometry)
    if not dictionary.is_cpu or dictionary.dtype != torch.float32 or not whole:
        return False
    entries = geometry.out_channels * dictionary.shape[1] * math.prod(geometry.kernel_size)
    return coefficients.shape[0] * coefficients.shape[1] <= SHARE * entries and is_available()


def gradients(grad: Tensor, s: Tensor, lookups: Lookups, groups: int, geometry: Geometry) -> tuple[Tensor, Tensor] | None:
    """The gradients of S and of the coefficients, contiguous; None where there is no memory for the scratch.

    Args:
        grad: of the output, float32 [N, n, H', W'].
        s: float32 [N, groups·k, H, W], not padded.
        lookups: of a validated lookup weight.
        groups: of the convolution.
        geometry: of the convolution; its stride is taken for 1.
    """
    library = cpu_build.library()
    assert library is not None
    tensors = [t.contiguous() for t in (grad, s, *lookups)]
    made = torch.empty_like(tensors[1]), torch.empty_like(tensors[2])
    n = grad.shape[1]
    _, kernel_size, _, padding, dilation = geometry
    sizes = [s.shape[0], groups, s.shape[1] // groups, n, *s.shape[2:], *grad.shape[2:], kernel_size[1], padding[0], padding[2]]
    problem = _Problem(*sizes, *dilation, *lookups.filters.shape, lookups.coefficients.shape[0], thread_count())
    failed = library.lcnn_gradients(ctypes.byref(problem), ctypes.byref(_Tensors(*map(address_of, (*tensors, *made)))))
    return None if failed else made
