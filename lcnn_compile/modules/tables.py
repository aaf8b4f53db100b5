"""The index tables of a lookup module: structure, which nothing may average, and a checksum that survives averaging.

Weight averaging (moving averages, SWA, model soups) runs over parameters and buffers and over the values of state dicts, whatever
their dtype, and an average of index tables, or one rounded down, is another network. So tables are neither parameters nor
buffers. A state dict holds copies of them and a checksum in floating point, which is a buffer. Averages of equal checksums are
that checksum, up to rounding; averages of different ones are none at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels.prepared import Prepared
from lcnn_compile.torch_private import without_transforms

TABLES = ("indices", "positions", "offsets", "filters")
CHECKSUM = "table_checksum"

_BITS = 32
_ONE, _ZERO = 2.0**8, 2.0**-8
"""How a bit is stored, followed by its complement: exact in half precision, and so far apart that a millionth of another checksum shows."""
_ROUNDING = 0.02
"""Relative deviation allowed to a stored bit; averaging in float32 for ever makes 0.003."""


def table_digest(tables: Mapping[str, Tensor]) -> int | None:
    """32 bits that depend on every entry and every shape; None for tables without values (meta, fake)."""
    if not all(has_values(table) for table in tables.values()):
        return None
    found = hashlib.blake2b(digest_size=_BITS // 8)
    for name in TABLES:
        table = tables[name].detach().cpu().contiguous()
        found.update(f"{name} {table.dtype} {tuple(table.shape)} ".encode())
        found.update(table.flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest(), "little")


def encode(digest: int | None) -> Tensor:
    """The checksum as the buffer holds it: float32 [64], bits and complements; zeros for None."""
    if digest is None:
        return torch.zeros(2 * _BITS)
    bits = [bool(digest >> i & 1) for i in range(_BITS)]
    return torch.tensor([_ONE if bit else _ZERO for bit in (*bits, *(not bit for bit in bits))])


def decode(checksum: Tensor) -> int | None:
    """The digest that a checksum stands for, rounded by averaging or not; None where it is a mixture of several."""
    values = checksum.detach().double().cpu().flatten()
    if values.numel() != 2 * _BITS:
        return None
    bits = values > 1
    exact = torch.where(bits, _ONE, _ZERO)
    if not bool(((values / exact - 1).abs() <= _ROUNDING).all()) or bool((bits[:_BITS] == bits[_BITS:]).any()):
        return None
    return sum(1 << i for i, bit in enumerate(bits[:_BITS].tolist()) if bit)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one in memory, not a fake, a meta or a wrapped one."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    return plain and without_transforms(tensor) is tensor


def _compare(*arguments: Any) -> bool:
    """Whether a checksum is that of the tables."""
    *tables, checksum = arguments
    return decode(checksum) == table_digest(dict(zip(TABLES, tables, strict=True)))


_compared = Prepared(_compare)


def check_tables(name: str, tables: Mapping[str, Tensor], checksum: Tensor) -> None:
    """Raise WeightError where the checksum is not that of the tables; looked at once until a tensor changes."""
    inner = without_transforms(checksum)
    tensors = (*(tables[key] for key in TABLES), inner)
    if not all(has_values(tensor) for tensor in tensors) or any(tensor.is_inference() for tensor in tensors):
        return
    # Models that share one set of tables may be stacked to be mapped over.
    rows = [inner] if inner is checksum else list(inner.reshape(-1, 2 * _BITS))
    if not all(_compared((*tensors[:-1], row)) for row in rows):
        raise WeightError(
            f"{name}: the index tables ({', '.join(TABLES)}) are not those that its {CHECKSUM} was made for. They were written to, or "
            "values of a layer with other tables were averaged or copied into this one; only copies of one converted model "
            "can be averaged. load_state_dict takes over all of a layer; tables are replaced by assigning them"
        )


def loaded_tables(
    name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], checksum: Tensor | None
) -> dict[str, Tensor] | None:
    """The tables that a state dict stands for, int32, or None where they are ``own``.

    Args:
        name: of the layer, for messages.
        own: the tables that the layer has.
        given: those of the state dict; averages of equal tables count as these.
        checksum: that of the state dict; version 0.1 had none.

    Raises:
        WeightError: if they are averages of different tables, or damaged.
    """
    wanted: int | None = None
    if checksum is not None:
        if not has_values(checksum):
            return None
        wanted = decode(checksum)
        if wanted is None:
            raise WeightError(
                f"{name}: the state dict is an average over layers with different index tables (its {CHECKSUM} is a mixture), which "
                "computes nothing; only copies of one converted model can be averaged"
            )
        if wanted == table_digest(own):
            return None
    if not all(has_values(table) for table in given.values()):
        return None
    rounded = {key: _integers(name, key, table) for key, table in given.items()}
    if wanted is not None and (set(rounded) != set(TABLES) or table_digest(rounded) != wanted):
        raise WeightError(
            f"{name}: the index tables of the state dict ({', '.join(TABLES)}) do not match its {CHECKSUM}: they were averaged or "
            "changed on the way. Load it into a copy of the converted model that it comes from, whose tables are kept"
        )
    return rounded


def _integers(name: str, key: str, table: Tensor) -> Tensor:
    """A table as int32, from any dtype that holds its values up to rounding."""
    if table.is_complex() or table.dtype == torch.bool:
        raise WeightError(f"{name}: {key} has dtype {table.dtype}; torch.int32 is required")
    if table.numel():
        wide = table.detach().double()
        whole = wide.round()
        error = (wide - whole).abs() - 1e-6 * wide.abs()
        if not bool((error <= 1e-3).all()) or float(whole.abs().max()) >= 2.0**31:
            raise WeightError(
                f"{name}: {key} of the state dict has values that are no integers: it is an average over layers with different "
                "index tables, which computes nothing; only copies of one converted model can be averaged"
            )
        table = whole
    return table.detach().to(torch.int32)
