"""Model files made word by word, for what no exporter writes: what a stranger could."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcnn_compile.export.native import _checked
from lcnn_compile.kernels.cpu.build import shared_library
from lcnn_compile.kernels.cpu.serial import CONSTANT, PLAN, TABLE
from lcnn_compile.kernels.cpu.step import MOST_READ
from lcnn_compile.kernels.cpu.words import Tables, Words, file_of

Affine = int | tuple[int, int]
"""A number, or one that grows by the second with every image."""
ARENA = -1
"""The tensor of a value that lies in no input and no output."""


@dataclass
class Value:
    """Where a value lies: the number of an input or (behind these) output or ARENA; offset in bytes; sizes in elements."""

    tensor: int
    elements: int
    offset: Affine = 0
    images: Affine = (0, 1)
    image: int | None = None
    size: int = 4  # bytes of an element


@dataclass
class Call:
    """A call of a kind: its structure, and the tables (by words of the structure) or plan that it refers to."""

    kind: int
    of: ctypes.Structure
    y: int
    reads: Sequence[int]
    tables: dict[int, Tensor] = field(default_factory=dict)
    plan: int | None = None


@dataclass
class ModelFile:
    """A file for `calls` on `values`; inputs and outputs are sizes behind the batch. `weights`, `plans`: words, with a function of tables."""

    calls: Sequence[Call]
    values: Sequence[Value]
    inputs: Sequence[tuple[int, ...]] = ((8,),)
    outputs: Sequence[tuple[int, ...]] = ((8,),)
    arena: Affine = 0
    batch: int = 1
    dynamic: bool = True
    weights: Sequence[Any] = ()
    plans: Sequence[tuple[int, Sequence[Affine], Sequence[Affine]]] = ()
    name: bytes = b"x"

    def data(self) -> bytes:
        """The file, its checksum right."""
        words, tables, numbers = Words(), Tables(), dict[int, int]()
        words.put(self.batch, int(self.dynamic), MOST_READ)
        for ports in (self.inputs, self.outputs):
            words.put(len(ports))
            for sizes in ports:
                words.put(len(self.name), *np.frombuffer(self.name + bytes(-len(self.name) % 8), np.int64), len(sizes), *sizes)
        words.put(len(self.weights))
        for weight in self.weights:
            weight(words, tables)
        words.put(len(self.plans))
        for weight, geometry, pool in self.plans:
            words.put(weight)
            for number in geometry:
                _affine(words, number)
            words.put(len(pool))
            for number in pool:
                _affine(words, number)
        _affine(words, self.arena)
        words.put(len(self.values))
        for value in self.values:
            words.put(value.tensor)
            _affine(words, value.offset)
            _affine(words, value.images)
            words.put(value.elements if value.image is None else value.image, value.elements, value.size)
        words.put(len(self.calls))
        for call in self.calls:
            found = np.frombuffer(bytes(call.of), np.int64)
            words.put(call.kind, call.y, len(call.reads), *call.reads, len(found))
            for i, word in enumerate(found):
                if i in call.tables:
                    table = call.tables[i]
                    if id(table) not in numbers:
                        numbers[id(table)] = tables.add(table)
                    words.put(TABLE, numbers[id(table)])
                elif i == 0 and call.plan is not None:
                    words.put(PLAN, call.plan)
                else:
                    words.put(CONSTANT, int(word))
        return _checked(file_of(words, tables), shared_library())

    def write(self, folder: Path) -> Path:
        """Put it beside the library, as ``load_native`` wants it."""
        folder.mkdir(exist_ok=True)
        library = folder / "liblcnn.so"
        if not library.exists():
            library.symlink_to(shared_library())
        (folder / "model.lcnn").write_bytes(self.data())
        return folder


def _affine(words: Words, number: Affine) -> None:
    words.put(*(number if isinstance(number, tuple) else (number, 0)))


def structure(kind: type[Any], /, **values: Any) -> Any:
    """A structure of a call with these fields, sequences where they are arrays; zero elsewhere."""
    made = kind()
    for name, value in values.items():
        if isinstance(value, Sequence):
            field_ = getattr(made, name)
            for i, one in enumerate(value):
                field_[i] = one
        else:
            setattr(made, name, value)
    return made


def word_of(kind: type[Any], name: str) -> int:
    """Which word of a structure a field is."""
    return int(getattr(kind, name).offset) // 8


def lookup_weight(
    taps: int = 2, width: int = 2, k: int = 1, m: int = 1, kernel: tuple[int, int] = (1, 1), packing: int = 0, **changed: Any
) -> Any:
    """A float32 weight of one block of filters that share all taps; `changed`: tables by name."""

    identity = bool(changed.pop("identity", False))
    parts = {
        "dictionary": torch.ones(1 if identity else k * m),
        "coefficients": torch.ones(taps * width),
        "indices": torch.zeros(taps, dtype=torch.uint8),
        "positions": torch.zeros(taps, dtype=torch.uint8),
        "offsets": torch.tensor([0, taps], dtype=torch.int32),
        "filters": torch.arange(width, dtype=torch.int32),
    } | changed
    known: dict[int, list[int]] = {}  # numbers of the tables, by file: a weight may be there many times

    def put(words: Words, tables: Tables) -> None:
        if id(tables) not in known:
            known[id(tables)] = [tables.add(part) for part in parts.values()]
        words.put(packing, 1, k, m, *kernel, 1, width, int(identity))
        words.put(-1 if identity else known[id(tables)][0], *known[id(tables)][1:])

    return put


def geometry(
    height: int, width: int, channels: int, filters: int, out_height: int, out_width: int, **changed: Affine
) -> list[Affine]:
    """Words of lcnn::Geometry for a batch of any size."""
    fields: dict[str, Affine] = {
        "batch": (0, 1),
        "height": height,
        "width": width,
        "stride_n": channels * height * width,
        "stride_c": height * width,
        "stride_h": width,
        "stride_w": 1,
        "out_height": out_height,
        "out_width": out_width,
        "out_image": filters * out_height * out_width,
        "residual_image": 0,
        "stride0": 1,
        "stride1": 1,
        "dilation0": 1,
        "dilation1": 1,
        "top": 0,
        "left": 0,
        "activation": 0,
        "residual_last": 0,
        "threads": 1,
        "pairs": 0,
    }
    assert set(changed) <= set(fields)
    return list((fields | changed).values())
