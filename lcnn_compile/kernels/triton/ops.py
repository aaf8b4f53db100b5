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
from lcnn_compile.kernels.arguments import Arguments, Geometry, Weight
from lcnn_compile.kernels.triton.chain_pack import Chain
from lcnn_compile.kernels.triton.pack import INT32, ROW_BITS, pack, sizes_of

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


def _can(input: Tensor, dictionary: Tensor, kernel_size: Sequence[int]) -> bool:
    planes = dictionary.shape[0] * dictionary.shape[1] * kernel_size[1]
    fits = planes < 1 << (31 - ROW_BITS) and kernel_size[0] <= 1 << ROW_BITS
    return fits and input.dtype in DTYPES and str(input.device) not in _unusable


def forward(call: Arguments, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor | None:
    """The output [N, n, H, W] of the operator in ``memory_format``, or None where these kernels cannot compute it.

    All tensors as in :mod:`lcnn_compile.kernels.reference`, checked already, float16, bfloat16 or float32.
    """
    input, weight, geometry, epilogue, *_ = call
    if not _can(input, weight.dictionary, geometry.kernel_size):
        return None
    y = torch.empty(tuple(shape), dtype=input.dtype, device=input.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    if epilogue.residual is not None:
        epilogue = epilogue._replace(residual=epilogue.residual.contiguous(memory_format=memory_format))
    where = sizes_of(input.shape[2:], geometry, input.element_size())
    form = pack(weight, geometry.kernel_size[1])
    launch = (input, y, form, weight.dictionary.shape[0], epilogue, where)
    with attempt(input.device), torch.cuda.device_of(input):
        # Here and below: Triton takes a second to import, and is not there on every machine.
        from lcnn_compile.kernels.triton import forward as kernels
        from lcnn_compile.kernels.triton import tune

        return kernels.run(*launch, tune.configuration(*launch))
    return None


def coefficient_gradient(grad: Tensor, input: Tensor, weight: Weight, geometry: Geometry) -> Tensor | None:
    """The gradient of the coefficients [T, g] from that of the output, or None where these kernels cannot compute it."""
    if not _can(input, weight.dictionary, geometry.kernel_size) or grad.numel() == 0:
        return None
    where = sizes_of(input.shape[2:], geometry, input.element_size())
    form = pack(weight, geometry.kernel_size[1])
    groups, size, _ = weight.dictionary.shape
    with attempt(input.device), torch.cuda.device_of(input):
        from lcnn_compile.kernels.triton import backward, tune

        config = tune.dictionary_configs(size, input.element_size())[0]
        total = backward.coefficient_gradient(grad, input, form, groups, where, config)
        return total.to(input.dtype).contiguous()
    return None


def chain(call: Chain, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, Tensor | None] | None:
    """y of this shape and the product of :mod:`lcnn_compile.kernels.triton.chain_operator`; None where these kernels cannot compute them.

    Tensors are checked and channels_last. What is not wanted may be None.
    """
    input = call.input
    pixels = max(input.shape[0] * input.shape[2] * input.shape[3], shape[0] * shape[2] * shape[3])
    if str(input.device) in _unusable or pixels * max(input.shape[1], shape[1], call.next_channels) >= INT32:
        return None
    with attempt(input.device), torch.cuda.device_of(input):
        from lcnn_compile.kernels.triton import chain as kernels
        from lcnn_compile.kernels.triton import chain_tune as tune

        where = kernels.Window.of(call.geometry)
        tail = kernels.Tail(*call.epilogue, call.next)
        launch = tune.Call(input, call.weight, where, tail, shape, call.keep, call.next_channels)
        return tune.run(launch, tune.plan_for(launch))
    return None
