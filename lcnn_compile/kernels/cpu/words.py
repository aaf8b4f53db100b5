"""The words and tables of a file of a program, and the weights among them; ``serial`` says what programs are in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.forward import PackedWeight
from lcnn_compile.kernels.cpu.int8 import PackedBytes

VERSION = 1
MAGIC = b"LCNNPROG"
ALIGN = 64
"""Bytes to whose multiples tables are aligned in the file, which is mapped to memory as it is."""
TYPES = {torch.float32: 0, torch.int32: 1, torch.int8: 2, torch.uint16: 3, torch.uint8: 4}
"""lcnn::Type."""
FLOATS, HALVES, QUADS = range(3)
"""lcnn::Packing, of a weight: float32, bfloat16, bytes."""


class Words:
    """64-bit words, one after the other.

    Attributes:
        found: so far.
    """

    def __init__(self) -> None:
        self.found: list[int] = []

    def put(self, *values: int) -> None:
        """Each as it is."""
        self.found += [int(v) for v in values]

    def text(self, value: str) -> None:
        """Its length in bytes, and as many words as hold them."""
        data = value.encode()
        self.put(len(data))
        self.found += np.frombuffer(data + bytes(-len(data) % 8), np.int64).tolist()

    def affine(self, first: int, slope: int) -> None:
        """A number that grows by ``slope`` with each image."""
        self.put(first, slope)


@dataclass
class Tables:
    """What addresses refer to: tables of the file, each once."""

    data: bytearray = field(default_factory=bytearray)
    entries: list[tuple[int, int, int]] = field(default_factory=list)  # type, elements, offset
    known: dict[tuple[int, bytes], int] = field(default_factory=dict)

    def add(self, values: Tensor) -> int:
        """The number of a table with these values."""
        values = values.detach().reshape(-1).contiguous()
        content = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
        key = (TYPES[values.dtype], content)
        if key not in self.known:
            self.data += bytes(-len(self.data) % ALIGN)
            self.known[key] = len(self.entries)
            self.entries.append((key[0], values.numel(), len(self.data)))
            self.data += content
        return self.known[key]

    def small(self, values: Tensor) -> int:
        """The same for integers from 0 on, in as few bytes as they need."""
        most = int(values.max()) if values.numel() else 0
        return self.add(values.to(torch.uint8 if most < 1 << 8 else torch.uint16 if most < 1 << 16 else torch.int32))


def put_weight(packed: PackedWeight | PackedBytes, words: Words, tables: Tables) -> None:
    """Packing, sizes, and the tables of what a weight is packed from.

    Taps are in the order in which kernels with vectors of 16 want them, so that these need no copy of what is mapped.
    """
    dictionary: Tensor | None
    rest: list[Tensor | None] = []
    if isinstance(packed, PackedBytes):
        layer = packed.layer
        words.put(QUADS, *packed.sizes, *np.frombuffer(bytes(packed.ending), np.int64).tolist())
        dictionary, coefficients = layer.dictionary, layer.coefficients
        indices, positions, offsets, filters = layer.indices, layer.positions, layer.offsets, layer.filters
        rest = [packed.starts, layer.vector_factors, layer.bias, layer.filter_factors]
    elif packed.source is not None:
        dictionary, coefficients, indices, positions, offsets, filters = packed.source
        groups, k, m = dictionary.shape
        identity = k == m and torch.equal(dictionary, torch.eye(k).expand(groups, k, m))
        packing = HALVES if packed.precision == "bfloat16" else FLOATS
        words.put(packing, groups, k, m, *packed.kernel_size, *filters.shape, int(identity))
        dictionary = None if identity else dictionary
    else:
        raise KernelError("a weight was packed without keep_sources")
    order = _order(indices, positions, offsets)
    numbers = [
        None if dictionary is None else tables.add(dictionary),
        tables.add(coefficients[order]),
        tables.small(indices[order]),
        tables.small(positions[order]),
        *(None if part is None else tables.add(part) for part in (offsets, filters, *rest)),
    ]
    words.put(*(-1 if number is None else number for number in numbers))


def _order(indices: Tensor, positions: Tensor, offsets: Tensor) -> Tensor:
    """Taps by index, then position, within each group of filters."""
    group = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())
    order = torch.argsort(positions, stable=True)
    order = order[torch.argsort(indices[order], stable=True)]
    return order[torch.argsort(group[order], stable=True)]


def file_of(words: Words, tables: Tables) -> bytes:
    """Header, words, tables: magic, version, bytes in all, checksum (zero here), words, tables, where the tables' data begins."""
    entries = [word for entry in tables.entries for word in entry]
    start = -(-(64 + 8 * (len(words.found) + len(entries))) // ALIGN) * ALIGN
    tables.data += bytes(-len(tables.data) % ALIGN + ALIGN)  # kernels read whole vectors, past the last table too
    header = np.array([VERSION, start + len(tables.data), 0, len(words.found), len(tables.entries), start, 0], np.int64)
    body = np.array([*entries, *words.found], np.int64).tobytes()
    head = MAGIC + header.tobytes() + body
    return head + bytes(start - len(head)) + bytes(tables.data)
