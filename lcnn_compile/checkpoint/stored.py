"""Tensors of any dtype as the few dtypes that every version of safetensors knows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.checkpoint.compact import expanded
from lcnn_compile.errors import CheckpointError

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
"""Those that stand in a file as they are."""
_OTHER_NAMES = (
    *("complex32", "complex64", "complex128", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
OTHERS: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _OTHER_NAMES if hasattr(torch, name)}
"""Those that stand there as bytes, by name; the header tells."""


def to_stored(key: str, value: Any) -> tuple[Tensor, dict[str, Any] | None]:
    """A value of a state dict as a tensor of :data:`DTYPES` of its own, and what the header says of it, None for nothing.

    Raises:
        CheckpointError: naming ``key``, for what is no dense tensor of a dtype that is kept.
    """
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{key} is a {type(value).__name__}; only tensors can be saved")
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        raise CheckpointError(
            f"{key} is a {type(value).__name__}, a kind of tensor that a file would lose; register a plain torch.Tensor"
        )
    if value.layout != torch.strided or value.device.type == "meta":
        raise CheckpointError(f"{key} is {value.layout} on {value.device}; only dense tensors with values can be saved")
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()
    if value.dtype in DTYPES:
        return plain, None
    name = str(value.dtype).removeprefix("torch.")
    if name not in OTHERS:
        raise CheckpointError(f"{key} has dtype {value.dtype}; allowed are {(*DTYPES, *OTHERS.values())}")
    return plain.flatten().view(torch.uint8), {"dtype": name, "shape": list(value.shape)}


def from_stored(key: str, stored: Tensor, form: Any) -> Tensor:
    """What :func:`to_stored` was given.

    Raises:
        CheckpointError: if the tensor is not what ``form`` says.
    """
    if isinstance(form, dict) and "kind" in form:
        return expanded(key, stored, form)
    shape = form.get("shape") if isinstance(form, dict) else None
    dtype = OTHERS.get(str(form.get("dtype"))) if isinstance(form, dict) else None
    if dtype is None or not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise CheckpointError(f"{key} is said to be {form!r}; a dtype of {sorted(OTHERS)} and a shape are required")
    if stored.dtype != torch.uint8 or stored.dim() != 1 or stored.numel() != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{key} is said to be {form!r}; the file has {stored.dtype} {tuple(stored.shape)} for it")
    return stored.clone().view(dtype).view(shape)
