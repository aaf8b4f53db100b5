"""Where the operator meets the Triton kernels.

Triton takes a second to import and may be absent, so that modules with kernels are imported at the first call that can use them.
"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from lcnn_compile.errors import LcnnWarning
from lcnn_compile.kernels.triton.pack import INT32, ROW_BITS, Epilogue, geometry, pack

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_unusable: dict[str, str] = {}


def usable(device: str, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run for this device type and dtype, as far as is known before the first launch."""
    return device == "cuda" and dtype in DTYPES and not _unusable and _installed()


def failed() -> bool:
    """Whether they were given up on some device, and said so."""
    return bool(_unusable)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@contextmanager
def attempt(device: torch.device) -> Iterator[None]:
    """Go on where Triton is absent or fails (no compiler, an unknown device), never to try it there again; say so once."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        absent = isinstance(error, (ImportError, RuntimeError, OSError, subprocess.CalledProcessError))
        if not absent and not isinstance(error, import_module("triton.errors").TritonError):
            raise
        reason = str(error).strip().split("\n")[0]
        _unusable[str(device)] = reason
        message = (
            f"the Triton kernels cannot run on {device} ({type(error).__name__}: {reason}); lowering 'factored' is used instead"
        )
        warnings.warn(message, LcnnWarning, stacklevel=5)


Weight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""dictionary, coefficients, indices, positions, offsets, filters."""


def _can(input: Tensor, dictionary: Tensor, kernel_size: Sequence[int]) -> bool:
    planes = dictionary.shape[0] * dictionary.shape[1] * kernel_size[1]
    fits = planes < 1 << (31 - ROW_BITS) and kernel_size[0] <= 1 << ROW_BITS
    return fits and input.dtype in DTYPES and str(input.device) not in _unusable


def forward(
    input: Tensor,
    weight: Weight,
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
    if not _can(input, weight[0], kernel_size):
        return None
    y = torch.empty(tuple(shape), dtype=input.dtype, device=input.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    where = geometry(input.shape[2:], kernel_size, stride, padding, dilation, input.element_size())
    epilogue = Epilogue(bias, residual, activation, residual_last)
    form = pack(weight, kernel_size[1])
    call = (input, y, form, weight[0].shape[0], epilogue, where)
    with attempt(input.device), torch.cuda.device_of(input):
        from lcnn_compile.kernels.triton import forward as kernels
        from lcnn_compile.kernels.triton import tune

        return kernels.run(*call, tune.configuration(*call))
    return None


def coefficient_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Weight,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor | None:
    """The gradient of the coefficients [T, g] from that of the output, or None where these kernels cannot compute it."""
    if not _can(input, weight[0], kernel_size) or grad.numel() == 0:
        return None
    where = geometry(input.shape[2:], kernel_size, stride, padding, dilation, input.element_size())
    form = pack(weight, kernel_size[1])
    groups, size, _ = weight[0].shape
    with attempt(input.device), torch.cuda.device_of(input):
        from lcnn_compile.kernels.triton import backward, tune

        config = tune.dictionary_configs(size, input.element_size())[0]
        total = backward.coefficient_gradient(grad, input, form, groups, where, config)
        return total.to(input.dtype).contiguous()
    return None


def chain(
    input: Tensor,
    weight: Tensor,
    tail: tuple[Tensor | None, Tensor | None, str, bool, Tensor | None],
    window: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    shape: tuple[int, int, int, int],
    keep: bool,
    next_channels: int,
) -> tuple[Tensor | None, Tensor | None] | None:
    """y of this shape and the product of :mod:`lcnn_compile.kernels.triton.chain_operator`; None where these kernels cannot compute them.

    Tensors are checked and channels_last; ``tail`` is bias, residual, activation, whether the residual comes last, and the
    matrix of the 1x1 product; ``window`` kernel size, stride, padding and dilation. What is not wanted may be None.
    """
    pixels = max(input.shape[0] * input.shape[2] * input.shape[3], shape[0] * shape[2] * shape[3])
    if str(input.device) in _unusable or pixels * max(input.shape[1], shape[1], next_channels) >= INT32:
        return None
    with attempt(input.device), torch.cuda.device_of(input):
        from lcnn_compile.kernels.triton import chain as kernels
        from lcnn_compile.kernels.triton import chain_tune as tune

        kernel, stride, padding, dilation = window
        where = kernels.Window(
            (kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[2]), (dilation[0], dilation[1])
        )
        call = tune.Call(input, weight, where, kernels.Tail(*tail), shape, keep, next_channels)
        return tune.run(call, tune.plan_for(call))
    return None
