"""Tensors of layers of bytes in files: float32 values that are whole steps, and tables of small integers, in as few bytes as hold them.

What is read is what was written, to the bit; a tensor that is not made of steps stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.errors import CheckpointError
from lcnn_compile.kernels.rounding import STEPS, short_scales

STEPPED, SMALL = "steps", "small"
"""What a form says of values that are steps, and of integers in fewer bytes."""
FORM_KEYS = {STEPPED: {"kind", "shape", "blocks", "turned"}, SMALL: {"kind", "shape", "bytes"}}


def stepped(values: Tensor, counts: Tensor, *, turned: bool = False) -> tuple[Tensor, dict[str, Any]] | None:
    """Values as steps of one byte and scales, uint8 [bytes], and their form; None where they are no whole steps.

    Args:
        values: float32 [*, R, C]; the dimensions before the last are rows.
        counts: rows that follow each other and share a scale for each column, int [F].
        turned: each row has one scale, for all of its columns, instead.
    """
    table = values.detach().cpu().reshape(-1, values.shape[-1])
    if values.dtype != torch.float32 or not values.numel():
        return None
    if turned:
        table, counts = table.T.contiguous(), torch.tensor([values.shape[-1]])
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    largest = torch.zeros(len(counts), table.shape[1]).scatter_reduce_(0, owner[:, None].expand(table.shape), table.abs(), "amax")
    for scales in (short_scales(largest.double() / STEPS).float(), largest):  # the second one is for an identity
        scales = torch.where(largest > 0, scales, 1.0)
        steps = (table.double() / scales.double()[owner]).round().clamp(-STEPS, STEPS).to(torch.int8)
        if torch.equal(_values(steps, scales, owner), table):
            parts = [counts.to(torch.int32), scales, steps]
            blob = torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
            return blob, {"kind": STEPPED, "shape": list(values.shape), "blocks": len(counts), "turned": turned}
    return None


def small(values: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
    """Integers from 0 on as uint8 [bytes], and their form; None where they need all of theirs."""
    most = int(values.max()) if values.numel() else 0
    if values.dtype != torch.int32 or not values.numel() or int(values.min()) < 0 or most >= 1 << 16:
        return None
    kind = torch.uint8 if most < 1 << 8 else torch.int16
    stored = values.detach().cpu().to(kind).contiguous().flatten().view(torch.uint8)
    return stored.clone(), {"kind": SMALL, "shape": list(values.shape), "bytes": kind.itemsize}


def expanded(key: str, stored: Tensor, form: dict[str, Any]) -> Tensor:
    """What :func:`stepped` or :func:`small` was given.

    Raises:
        CheckpointError: the tensor is not what the form says, or has scales that are none.
    """
    wrong = CheckpointError(f"{key} is said to be {form!r}, which the {stored.dtype} {tuple(stored.shape)} in the file is not")
    kind, shape = form.get("kind"), form.get("shape")
    if kind not in FORM_KEYS or set(form) != FORM_KEYS[kind] or stored.dtype != torch.uint8 or stored.dim() != 1:
        raise wrong
    if not isinstance(shape, list) or not shape or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise wrong
    total = math.prod(shape)
    if kind == SMALL:
        size = form["bytes"]
        if size not in (1, 2) or stored.numel() != size * total:
            raise wrong
        values = stored.int() if size == 1 else stored.clone().view(torch.int16).int() & 0xFFFF
        return values.view(shape)
    blocks, turned = form["blocks"], form["turned"]
    if type(blocks) is not int or not isinstance(turned, bool) or not 0 < blocks <= total:
        raise wrong
    columns = total // shape[-1] if turned else shape[-1]
    rows, head = total // columns, 4 * blocks * (1 + columns)
    if stored.numel() != head + total:
        raise wrong
    counts = stored[: 4 * blocks].clone().view(torch.int32)
    scales = stored[4 * blocks : head].clone().view(torch.float32).view(blocks, columns)
    if bool((counts < 0).any()) or int(counts.long().sum()) != rows:
        raise wrong
    if not bool((torch.isfinite(scales) & (scales > 0) & (scales < torch.finfo(torch.float32).max / STEPS)).all()):
        raise CheckpointError(
            f"{key} has scales from {float(scales.min())} to {float(scales.max())}; positive numbers are required"
        )
    owner = torch.repeat_interleave(torch.arange(blocks), counts.long())
    values = _values(stored[head:].clone().view(torch.int8).view(rows, columns), scales, owner)
    return (values.T if turned else values).reshape(shape).contiguous()


def _values(steps: Tensor, scales: Tensor, owner: Tensor) -> Tensor:
    return (steps.double() * scales.double()[owner]).float()
