"""The header of a checkpoint, as it is written and read, and the checks that a file passes before anything in it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcnn_compile.checkpoint.calls import Calls, are_calls
from lcnn_compile.checkpoint.stored import DTYPES, from_stored
from lcnn_compile.errors import CheckpointError
from lcnn_compile.modules import FACTORS

FORMAT, FIRST_FORMAT = 2, 1
"""The newest, with tensors of layers of bytes in fewer bytes, and what version 0.1 reads too; files without such tensors have that."""
MAX_HEADER = 1 << 25
"""Bytes of a file's header; a thousand layers need a hundredth of it."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        layers: qualified name of each lookup module -> {"kernel_size": [kh, kw], "lowering": str} and, where it is not
            "float32", {"precision": str}.
        aliases: state-dict key -> the key under which the same tensor is stored.
        report: the rows of ``lcnn_report``, empty if the model had none.
        shapes: stored tensor -> its shape.
        calls: the parameters that convolutions called as functions look up.
    """

    layers: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    report: list[dict[str, Any]]
    shapes: dict[str, list[int]]
    calls: Calls


def header_text(
    layers: Mapping[str, Any],
    aliases: Mapping[str, str],
    report: Sequence[dict[str, Any]],
    forms: Mapping[str, Any],
    calls: Calls,
    tensors: Mapping[str, Tensor],
) -> dict[str, str]:
    """The metadata of a file that holds these tensors, as :func:`read_file` reads it.

    Args:
        layers, aliases, report, calls: as :class:`Header` has them.
        forms: of tensors that are stored as others, see :mod:`lcnn_compile.checkpoint.stored`.
        tensors: as they are stored.
    """
    for row in report:
        del row["precision"]  # stands with the layers: versions that do not know it read the report all the same
    newest = any("kind" in form for form in forms.values())
    described: dict[str, Any] = {
        "format": FORMAT if newest else FIRST_FORMAT,
        "layers": layers,
        "aliases": aliases,
        "report": report,
    }
    described |= {name: value for name, value in (("forms", forms), ("calls", calls)) if value}
    body = json.dumps(described, sort_keys=True)
    return {"lcnn": body, "digest": digest_of(body, tensors)}


def read_header(path: str | os.PathLike[str]) -> Header:
    """What the file says about itself, after every check that needs no model.

    Raises:
        CheckpointError: if the file is damaged or not a lookup checkpoint.
    """
    return read_file(Path(path))[0]


def read_file(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors by key, after the checks of :func:`read_header`."""
    try:
        with open(path, "rb") as start:
            size = int.from_bytes(start.read(8), "little")
        if size > MAX_HEADER:
            raise CheckpointError(
                f"{path} is not a readable safetensors file: its header has {size} bytes; {MAX_HEADER} are allowed"
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {type(error).__name__}: {error}") from error
    for key, value in tensors.items():
        if value.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {key} has dtype {value.dtype}; allowed are {DTYPES}")
    body = metadata.get("lcnn")
    if body is None or "digest" not in metadata:
        raise CheckpointError(f"{path} is not a lookup checkpoint: its header has no lcnn entry")
    if metadata["digest"] != digest_of(body, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its contents")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") not in (FORMAT, FIRST_FORMAT):
        found = values.get("format") if isinstance(values, dict) else values
        raise CheckpointError(f"{path} has format {found!r}; this version reads formats {FIRST_FORMAT} to {FORMAT}")
    layers, aliases, report = values.get("layers"), values.get("aliases"), values.get("report")
    refusal = CheckpointError(f"{path} has a header that does not describe lookup layers")
    if not isinstance(layers, dict) or not isinstance(aliases, dict) or not isinstance(report, list):
        raise refusal
    calls = values.get("calls", [])
    if not are_calls(calls):
        raise refusal
    if not all(_layer_ok(v) for v in layers.values()) or not all(isinstance(v, str) for v in aliases.values()):
        raise refusal
    for row in report:
        if isinstance(row, dict) and isinstance(row.get("name"), str):
            row["precision"] = layers.get(row["name"], {}).get("precision", "float32")
    forms = values.get("forms", {})
    if not isinstance(forms, dict) or not set(forms) <= set(tensors):
        raise refusal
    tensors |= {key: from_stored(key, tensors[key], form) for key, form in forms.items()}
    for key in factor_keys(layers) & set(tensors):
        check_finite(key, tensors[key])
    return Header(layers, aliases, report, {key: list(value.shape) for key, value in tensors.items()}, calls), tensors


def factor_keys(layers: Mapping[str, Any]) -> set[str]:
    """Keys of the tensors of lookup layers."""
    return {f"{name}.{part}" if name else part for name in layers for part in (*FACTORS, "bias")}


def _layer_ok(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("lowering"), str):
        return False
    if not isinstance(value.get("precision", ""), str):
        return False
    size = value.get("kernel_size")
    return isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and 0 < v < 2**15 for v in size)


def digest_of(body: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum of the description and of every tensor's name, dtype, shape and bytes."""
    found = hashlib.blake2b(body.encode(), digest_size=32)
    for key in sorted(tensors):
        value = tensors[key]
        found.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_finite(key: str, value: Tensor) -> None:
    """Raise CheckpointError where a value is infinite or not a number."""
    if value.dtype.itemsize == 1 and value.is_floating_point():
        value = value.float()
    if (value.is_floating_point() or value.is_complex()) and not bool(value.isfinite().all()):
        raise CheckpointError(f"{key} has values that are not finite")
