"""Nested inputs and outputs as their tensors and a description of the rest: lists, dictionaries, records, constants."""

from __future__ import annotations

import dataclasses
import enum
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcnn_compile.errors import ExportError
from lcnn_compile.torch_private import pytree

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Numbers that depend on a symbolic size."""
_CONSTANTS = (
    *(type(None), bool, str, bytes, type, range, np.generic, enum.Enum, numbers.Number),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


@dataclass(frozen=True)
class Structure:
    """A value without its tensors.

    Attributes:
        kind: "tensor", "constant", or how the parts are held: "sequence", "mapping", "named", "record", "registered".
        type: of the value.
        detail: the constant, the keys or names of the parts, or what a registered type keeps.
        parts: structures of what it holds.
    """

    kind: str
    type: Any = None
    detail: Any = None
    parts: tuple[Structure, ...] = ()

    def __str__(self) -> str:
        """As it is written in Python, with "tensor" for each tensor."""
        texts = [str(part) for part in self.parts]
        if self.kind == "tensor":
            return "tensor"
        if self.kind == "constant":
            return repr(self.detail)
        if self.kind == "sequence":
            inside = ", ".join(texts)
            return f"[{inside}]" if self.type is list else f"({inside}{',' if len(texts) == 1 else ''})"
        if self.kind == "mapping":
            return "{" + ", ".join(f"{key!r}: {text}" for key, text in zip(self.detail, texts, strict=True)) + "}"
        names = self.detail if self.kind in ("named", "record") else [""] * len(texts)
        parts = [f"{name}={text}" if name else text for name, text in zip(names, texts, strict=True)]
        return f"{self.type.__name__}({', '.join(parts)})"


_TENSOR = Structure("tensor")


def _parts(value: Any) -> tuple[str, Any, list[Any]] | None:
    """How a container holds its parts: kind, detail, parts; None for anything else."""
    own = type(value)
    if own in (list, tuple, torch.Size):
        return "sequence", None, list(value)
    if own is dict:
        return "mapping", tuple(value), list(value.values())
    if isinstance(value, tuple) and hasattr(own, "_fields"):
        return "named", own._fields, list(value)
    if own in pytree.SUPPORTED_NODES:
        parts, context = pytree.SUPPORTED_NODES[own].flatten_fn(value)
        return "registered", context, list(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        names += [name for name in getattr(value, "__dict__", {}) if name not in names]
        return "record", tuple(names), [getattr(value, name) for name in names]
    return None


def _build(structure: Structure, parts: list[Any]) -> Any:
    kind, own, detail = structure.kind, structure.type, structure.detail
    if kind == "sequence":
        return own(parts)
    if kind == "mapping":
        return dict(zip(detail, parts, strict=True))
    if kind == "named":
        return own._make(parts)
    if kind == "registered":
        return pytree.SUPPORTED_NODES[own].unflatten_fn(parts, detail)
    made = object.__new__(own)  # what __init__ and __post_init__ have done is in the fields
    for name, part in zip(detail, parts, strict=True):
        object.__setattr__(made, name, part)
    return made


def is_leaf(value: Any) -> bool:
    """Whether a value is a tensor, or a number that depends on a symbolic size."""
    return isinstance(value, (Tensor, *SYMBOLS))


def flatten(value: Any, place: str = "", known: Callable[[Any], bool] | None = None) -> tuple[list[Any], Structure]:
    """The tensors of a value, and its structure.

    Raises:
        ExportError: an object that may hold tensors is neither a list, tuple, dictionary or dataclass nor registered with
            ``torch.utils._pytree``. ``place`` names it. With ``known``, objects for which it is true are constants.
    """
    if is_leaf(value):
        return [value], _TENSOR
    found = _parts(value)
    if found is None:
        if isinstance(value, _CONSTANTS) or (known is not None and known(value)):
            return [], Structure("constant", type(value), value)
        raise ExportError(
            f"{place or 'the value'} is a {type(value).__name__}; tensors, numbers, strings, None, lists, tuples, dictionaries, "
            "dataclasses and what is registered as a pytree are allowed"
        )
    kind, detail, parts = found
    leaves, structures = [], []
    for name, part in zip(_names(kind, detail, len(parts)), parts, strict=True):
        inside, structure = flatten(part, f"{place}{name}", known)
        leaves += inside
        structures.append(structure)
    return leaves, Structure(kind, type(value), detail, tuple(structures))


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The value that has this structure and these tensors."""
    return _unflatten(structure, iter(leaves))


def _unflatten(structure: Structure, leaves: Iterator[Any]) -> Any:
    if structure.kind == "tensor":
        return next(leaves)
    if structure.kind == "constant":
        return structure.detail
    return _build(structure, [_unflatten(part, leaves) for part in structure.parts])


def _names(kind: str, detail: Any, count: int) -> list[str]:
    """How the parts of a container are reached."""
    if kind == "mapping":
        return [f"[{key!r}]" for key in detail]
    if kind in ("named", "record"):
        return [f".{name}" for name in detail]
    return [f"[{i}]" for i in range(count)]


def difference(wanted: Structure, given: Structure, place: str = "") -> str:
    """Where two structures differ, in words; "" where they are the same. Constants are part of a structure."""
    if wanted.kind != given.kind or wanted.type is not given.type:
        return f"{place} is {wanted}; it got {given}"
    if wanted.kind == "constant":
        return "" if _same(wanted.detail, given.detail) else f"{place} is {wanted}; it got {given}"
    if wanted.kind != "tensor":
        if len(wanted.parts) != len(given.parts) or not _same(wanted.detail, given.detail):
            return f"{place} is {wanted}; it got {given}"  # keys in another order too: a model may go through them
        names = _names(wanted.kind, wanted.detail, len(wanted.parts))
        for name, part, other in zip(names, wanted.parts, given.parts, strict=True):
            if found := difference(part, other, f"{place}{name}"):
                return found
    return ""


def _same(a: Any, b: Any) -> bool:
    """Whether two constants are interchangeable: -0.0 is not 0.0, and NaN is NaN."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float | complex | np.generic):
        return repr(a) == repr(b)
    return bool(a == b)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor changed, each once however often it is held; objects of unknown types stay as they are."""
    leaves, structure = flatten(value, known=lambda _: True)
    changed: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in changed:
            changed[id(leaf)] = change(leaf)
    return unflatten(structure, [changed.get(id(leaf), leaf) for leaf in leaves])
