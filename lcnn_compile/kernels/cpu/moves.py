"""Steps that compute nothing: views, and values moved to other places."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.step import TURN, Native, Shape, Site, Step


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
