"""What every step of a program is: it makes one value from values before it, and tells the library how."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lcnn_compile.errors import KernelError

Shape = tuple[Any, ...]
"""Sizes, ints or symbolic ones."""
BYTES = {"float32": 4, "bfloat16": 2, "int32": 4, "uint8": 1, "int8": 1}
"""Of the types that the elements of a value may have."""
(
    LOOK_UP,
    POOL,
    TURN,
    LINEAR,
    MAP,
    MOVE,
    PICK,
    REDUCE,
    RESIZE,
    LOOK_UP_BYTES,
    POOL_BYTES,
    CAST,
    DEPTHWISE,
    MAP_BYTES,
    MEAN_BYTES,
) = range(15)
"""lcnn::Kind."""
MOST_READ = 8
"""Values that one call of the library reads."""


class Site(NamedTuple):
    """Where a step stands in a program for inputs of certain shapes.

    Attributes:
        y: the number of the value that it makes.
        shapes: of all values.
        images: of each value, elements from one image to the next; inside of an image values are contiguous.
        strides: of the program's inputs that are not contiguous.
        weights: of this step.
        threads: that work on it.
        copied: of a concatenation, the parts that do not lie in it already.
        elements: the type of each value's elements.
    """

    y: int
    shapes: Sequence[Shape]
    images: Sequence[int]
    strides: Mapping[int, tuple[int, ...]]
    weights: tuple[Any, ...]
    threads: int
    copied: tuple[int, ...]
    elements: Sequence[str]

    def strides_of(self, value: int) -> tuple[int, ...]:
        """Of a value that is contiguous inside of its images."""
        strides = contiguous_strides(self.shapes[value]) if self.shapes[value] else ()
        return (self.images[value], *strides[1:])


class Native(NamedTuple):
    """One call of the library.

    Attributes:
        kind: lcnn::Kind.
        of: the structure that the kind wants.
        reads: the values that it reads.
        owned: what must outlive the program, besides ``of``.
    """

    kind: int
    of: ctypes.Structure
    reads: tuple[int, ...]
    owned: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step; values are numbers."""

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads."""
        return (self.x,)  # type: ignore[attr-defined]

    def renumbered(self, place: Mapping[int, int] | Sequence[int]) -> Step:
        """The same with other numbers for the values that it reads."""
        return replace(self, x=place[self.x])  # type: ignore[attr-defined, call-arg]

    @property
    def weighted(self) -> bool:
        """Whether it has weights, an entry in the program's list."""
        return False

    @property
    def in_place(self) -> bool:
        """Whether it may write its result over a value of the same shape that it reads."""
        return False

    def described(self) -> str:
        """What it does, for people: the name of its kind, and what its time depends on."""
        return type(self).__name__.lower()

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of what it makes; the batch is the first dimension.

        Raises:
            KernelError: the values that it reads do not fit.
        """
        raise NotImplementedError

    def element(self, elements: Sequence[str]) -> str:
        """The type of the elements of what it makes, a key of ``BYTES``, for those of the values before it."""
        return "float32"

    def native(self, site: Site) -> list[Native]:
        """The calls of the library that do it; none where its value lies in another one's memory."""
        raise NotImplementedError


def numbers(count: int) -> Any:
    """A field of ``count`` 64-bit integers."""
    return ctypes.c_int64 * count


def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape of several that are broadcast against each other.

    Raises:
        KernelError: they do not fit.
    """
    rank = max((len(shape) for shape in shapes), default=0)
    out: list[Any] = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            if isinstance(out[i], int) and out[i] == 1:
                out[i] = size
            elif isinstance(size, int) and isinstance(out[i], int) and size not in (1, out[i]):
                raise KernelError(f"a program's operands have shapes {[tuple(s) for s in shapes]}, which do not fit each other")
    return tuple(out)


def coalesced(sizes: Shape, strides: Sequence[tuple[int, ...]], dimensions: int) -> tuple[list[int], list[list[int]]]:
    """Sizes and several strides over them with as few dimensions as say the same, filled up to ``dimensions`` in front."""
    found: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if found and all(row[-1] == given[i] * size for row, given in zip(steps, strides, strict=True)):
            found[-1] *= size
            for row, given in zip(steps, strides, strict=True):
                row[-1] = given[i]
            continue
        found.append(size)
        for row, given in zip(steps, strides, strict=True):
            row.append(given[i])
    missing = dimensions - len(found)
    if missing < 0:
        raise KernelError(f"a program's value of shape {tuple(sizes)} has more than {dimensions} dimensions")
    return [1] * missing + found, [[0] * missing + row for row in steps]
