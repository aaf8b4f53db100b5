"""Steps that compute nothing: views, and values moved to other places."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.step import BYTES, MOVE, TURN, Native, Shape, Site, Step, coalesced, numbers


@dataclass(frozen=True)
class Moved(Step):
    """What keeps the type of the elements."""

    def element(self, elements: Sequence[str]) -> str:
        """That of what it reads."""
        return elements[self.reads[0]]


@dataclass(frozen=True)
class View(Moved):
    """``x`` with other dimensions behind the first, which is what is left of the elements."""

    x: int
    tail: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *tail]."""
        x = shapes[self.x]
        if not self.tail and len(x) == 1:
            return tuple(x)
        if any(not isinstance(v, int) for v in x[1:]):
            return (x[0], *self.tail)
        image, tail = math.prod(x[1:]), math.prod(self.tail)
        if image == tail:
            return (x[0], *self.tail)
        if not tail or (isinstance(x[0], int) and x[0] * image % tail):
            raise KernelError(f"a program's view of {self.tail} does not fit its input of shape {tuple(x)}")
        return (x[0] * image // tail, *self.tail)

    def native(self, site: Site) -> list[Native]:
        """None: it lies where its source lies."""
        return []


class _Turn(ctypes.Structure):
    """lcnn::Turn."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "columns"))


@dataclass(frozen=True)
class Turn(Moved):
    """``x`` with its images side by side (``inside``), in the last dimension, which is ``images`` times as long; or back."""

    x: int
    images: int
    inside: bool

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[1, ..., W · images] from [images, ..., W], or back."""
        x = shapes[self.x]
        if self.inside:
            return (1, *x[1:-1], x[-1] * self.images)
        return (self.images, *x[1:-1], x[-1] // self.images)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        y = site.shapes[site.y]
        rows = self.images if self.inside else math.prod(y[1:])
        return [Native(TURN, _Turn(rows, math.prod(y) // rows), (self.x,))]


MOVE_DIMENSIONS = 6
"""lcnn::MOVE_DIMENSIONS."""


class _Move(ctypes.Structure):
    """lcnn::Move."""

    _fields_ = (
        *((name, numbers(MOVE_DIMENSIONS)) for name in ("sizes", "from", "to")),
        *((name, ctypes.c_int64) for name in ("from_offset", "to_offset", "bytes")),
    )


def move(
    x: int, sizes: Shape, source: Sequence[int], target: Sequence[int], offsets: tuple[int, int], element: str
) -> list[Native]:
    """The call that copies what is read of value ``x`` by strides ``source`` to where strides ``target`` say."""
    if not math.prod(sizes):
        return []
    found, (reads, writes) = coalesced(sizes, [tuple(source), tuple(target)], MOVE_DIMENSIONS)
    fields = [(ctypes.c_int64 * MOVE_DIMENSIONS)(*values) for values in (found, reads, writes)]
    return [Native(MOVE, _Move(*fields, *offsets, BYTES[element]), (x,))]


@dataclass(frozen=True)
class Copy(Moved):
    """``x`` in memory of its own."""

    x: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """As it is."""
        return tuple(shapes[self.x])

    def native(self, site: Site) -> list[Native]:
        """One call."""
        return move(self.x, site.shapes[self.x], site.strides_of(self.x), site.strides_of(site.y), (0, 0), site.elements[self.x])


@dataclass(frozen=True)
class Permute(Moved):
    """``x`` with its dimensions in another order; the first one stays."""

    x: int
    dims: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *]."""
        x = shapes[self.x]
        if sorted(self.dims) != list(range(len(x))) or self.dims[:1] != (0,):
            raise KernelError(f"a program's permutation {self.dims} does not fit its input of shape {tuple(x)}")
        return tuple(x[d] for d in self.dims)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        strides = site.strides_of(self.x)
        source = [strides[d] for d in self.dims]
        return move(self.x, site.shapes[site.y], source, site.strides_of(site.y), (0, 0), site.elements[self.x])


@dataclass(frozen=True)
class Slice(Moved):
    """Every ``step``-th of ``length`` entries of dimension ``dim`` of ``x`` from ``start`` on, or back where the step is negative."""

    x: int
    dim: int
    start: int
    length: int
    step: int = 1

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *]."""
        x = shapes[self.x]
        size = x[self.dim] if 0 < self.dim < len(x) else None
        last = self.start + (self.length - 1) * self.step
        if not isinstance(size, int) or self.length < 1 or not (0 <= self.start < size and 0 <= last < size):
            raise KernelError(f"a program's slice {self} does not fit its input of shape {tuple(x)}")
        return (*x[: self.dim], self.length, *x[self.dim + 1 :])

    def inside(self, shapes: Sequence[Shape]) -> int | None:
        """Where it begins in an image of ``x``, of which it is one contiguous part; None where it is not."""
        x = shapes[self.x]
        whole = math.prod(x[1 : self.dim]) == 1 and (self.step == 1 or self.length == 1)
        return self.start * math.prod(x[self.dim + 1 :]) if whole else None

    def native(self, site: Site) -> list[Native]:
        """One call, or none where it is a part of ``x``."""
        if self.inside(site.shapes) is not None:
            return []
        source = list(site.strides_of(self.x))
        offset = self.start * source[self.dim]
        source[self.dim] *= self.step
        return move(self.x, site.shapes[site.y], source, site.strides_of(site.y), (offset, 0), site.elements[self.x])


@dataclass(frozen=True)
class Expand(Moved):
    """``x`` with dimensions of one entry repeated: [N, *tail], behind the first of the same rank."""

    x: int
    tail: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *tail]."""
        x = shapes[self.x]
        if len(x) != len(self.tail) + 1 or any(size not in (1, wanted) for size, wanted in zip(x[1:], self.tail, strict=True)):
            raise KernelError(f"a program's input of shape {tuple(x)} cannot be repeated to {self.tail}")
        return (x[0], *self.tail)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        y = site.shapes[site.y]
        source = [
            0 if have != want else step for have, want, step in zip(site.shapes[self.x], y, site.strides_of(self.x), strict=True)
        ]
        return move(self.x, y, source, site.strides_of(site.y), (0, 0), site.elements[self.x])


@dataclass(frozen=True)
class Concat(Moved):
    """Values one behind the other in dimension ``dim``, not the first; they lie in each other's place where they can."""

    parts: tuple[int, ...]
    dim: int

    @property
    def reads(self) -> tuple[int, ...]:
        """The parts."""
        return self.parts

    def renumbered(self, place: Mapping[int, int] | Sequence[int]) -> Concat:
        """The same with other numbers."""
        return replace(self, parts=tuple(place[x] for x in self.parts))

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *]."""
        found = [shapes[x] for x in self.parts]
        first = found[0] if found else ()
        rest = [(*shape[: self.dim], *shape[self.dim + 1 :]) for shape in found]
        if not 0 < self.dim < len(first) or any(len(s) != len(first) or r != rest[0] for s, r in zip(found, rest, strict=True)):
            raise KernelError(f"a program cannot concatenate shapes {[tuple(s) for s in found]} in dimension {self.dim}")
        return (*first[: self.dim], sum(shape[self.dim] for shape in found), *first[self.dim + 1 :])

    def native(self, site: Site) -> list[Native]:
        """One call for each part that does not lie in it already."""
        made, start = [], 0
        target = site.strides_of(site.y)
        for i, x in enumerate(self.parts):
            if i in site.copied:
                offset = start * target[self.dim]
                made += move(x, site.shapes[x], site.strides_of(x), target, (0, offset), site.elements[x])
            start += site.shapes[x][self.dim]
        return made
