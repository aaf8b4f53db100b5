"""Where the operator meets the Triton kernels; Triton itself is imported at the first call that can use it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from lcnn_compile.errors import LcnnWarning
from lcnn_compile.kernels.triton_pack import ROW_BITS, Epilogue, geometry, pack

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_unusable: dict[str, str] = {}


def usable(device: str, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run for this device type and dtype, as far as is known before the first launch."""
    return device == "cuda" and dtype in DTYPES and find_spec("triton") is not None and not _unusable


def _kernels(name: str) -> ModuleType:
    return import_module(f"lcnn_compile.kernels.triton_{name}")


def _give_up(device: str, error: Exception) -> None:
    """Remember that Triton fails here, and say so once."""
    if device not in _unusable:
        reason = str(error).strip().split("\n")[0]
        _unusable[device] = reason
        message = (
            f"the Triton kernels cannot run on {device} ({type(error).__name__}: {reason}); lowering 'factored' is used instead"
        )
        warnings.warn(message, LcnnWarning, stacklevel=4)


def forward(
    input: Tensor,
    weight: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    shape: Sequence[int],
    kernel_size: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    residual: Tensor | None,
    residual_last: bool,
    memory_format: torch.memory_format,
) -> Tensor | None:
    """The output [N, n, H, W] of the operator in ``memory_format``, or None where these kernels cannot compute it.

    All tensors as in :mod:`lcnn_compile.kernels.reference`, checked already, float16, bfloat16 or float32.
    """
    device = str(input.device)
    planes = weight[0].shape[0] * weight[0].shape[1] * kernel_size[1]
    if input.dtype not in DTYPES or device in _unusable or planes >= 1 << (31 - ROW_BITS) or kernel_size[0] > 1 << ROW_BITS:
        return None
    y = torch.empty(tuple(shape), dtype=input.dtype, device=input.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    try:
        run = _kernels("forward")
        failures: tuple[type[Exception], ...] = (import_module("triton.errors").TritonError,)
    except ImportError as error:
        _give_up(device, error)
        return None
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    where = geometry(input.shape[2:], kernel_size, stride, padding, dilation, input.element_size())
    epilogue = Epilogue(bias, residual, activation, residual_last)
    form = pack(weight, kernel_size[1])
    groups = weight[0].shape[0]
    try:
        return run.run(input, y, form, groups, epilogue, where, run.heuristic(input, form, groups, where))
    except failures as error:
        _give_up(device, error)
        return None
