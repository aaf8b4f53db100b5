"""Steps that go over all of a dimension: reductions, normalisation, softmax."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.step import REDUCE, Native, Shape, Site, Step

KINDS = ("mean", "sum", "max", "min", "squares", "variance", "normalize", "softmax", "log_softmax")
"""lcnn::Reduction."""


class _Reduce(ctypes.Structure):
    """lcnn::Reduce."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "images", "outer", "size", "inner", "x_image", "y_image")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("per_outer", "per_entry")),
        ("number", ctypes.c_double),
    )


@dataclass(frozen=True)
class _Over(Step):
    """What goes over dimensions ``first`` to ``end`` (without it) of ``x``, none of them the first."""

    x: int
    kind: str
    first: int
    end: int

    def _sizes(self, shape: Shape) -> tuple[int, int, int]:
        """(outer, size, inner) of an image."""
        return math.prod(shape[1 : self.first]), math.prod(shape[self.first : self.end]), math.prod(shape[self.end :])

    def _check(self, shape: Shape, kinds: Sequence[str]) -> None:
        if self.kind not in kinds:
            raise KernelError(f"a program's reduction is {self.kind!r}; allowed are {kinds}")
        if not 0 < self.first < self.end <= len(shape) or 0 in shape[self.first : self.end]:
            raise KernelError(
                f"a program's {self.kind} over dimensions {self.first} to {self.end} does not fit shape {tuple(shape)}"
            )

    def _call(self, site: Site, outer: int, size: int, inner: int, *affine: object, number: float = 0.0) -> list[Native]:
        images = (site.images[self.x], site.images[site.y])
        made = _Reduce(KINDS.index(self.kind), site.shapes[self.x][0], outer, size, inner, *images, *affine, number=number)
        return [Native(REDUCE, made, (self.x,), site.weights)]


@dataclass(frozen=True)
class Reduce(_Over):
    """The mean, sum, maximum, minimum, sum of squares or variance; these dimensions have one entry then.

    A variance is divided by ``correction`` less than the number of elements.
    """

    correction: float = 0.0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *] with ones."""
        x = shapes[self.x]
        self._check(x, KINDS[:6])
        return (*x[: self.first], *[1] * (self.end - self.first), *x[self.end :])

    def native(self, site: Site) -> list[Native]:
        """One call."""
        return self._call(site, *self._sizes(site.shapes[self.x]), number=self.correction)


@dataclass(frozen=True)
class Softmax(_Over):
    """Softmax or its logarithm over one dimension."""

    @property
    def in_place(self) -> bool:
        """A row is read before it is written."""
        return True

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """As it is."""
        x = shapes[self.x]
        self._check(x, KINDS[7:])
        return tuple(x)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        return self._call(site, *self._sizes(site.shapes[self.x]))


@dataclass(frozen=True)
class Normalize(_Over):
    """(x - mean) / sqrt(variance + eps) · weight + bias.

    With ``groups`` over each group of the channels and all dimensions behind them, weights by channel (as group and instance norm
    have them); else over the dimensions, weights by element of these. Weights: weight and bias, either of them or None.
    """

    eps: float = 1e-5
    groups: int | None = None

    @property
    def weighted(self) -> bool:
        """Always."""
        return True

    @property
    def in_place(self) -> bool:
        """A group is read before it is written."""
        return True

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """As it is."""
        x = shapes[self.x]
        self._check(x, ("normalize",))
        if self.groups is not None and (self.groups < 1 or x[1] % self.groups):
            raise KernelError(f"a program's {x[1]} channels cannot be normalised in {self.groups} groups")
        return tuple(x)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        weight, bias = site.weights
        shape = site.shapes[self.x]
        entries = math.prod(shape[self.first : self.end]) if self.groups is None else shape[1]
        for part in (weight, bias):
            if part is not None and part.numel() != entries:
                raise KernelError(
                    f"a program's normalisation of {tuple(shape)} has {part.numel()} weights; {entries} are required"
                )
        affine = [None if part is None else part.data_ptr() for part in (weight, bias)]
        if self.groups is None:
            outer, size, inner = self._sizes(shape)
            return self._call(site, outer, size, inner, *affine, 0, 1, number=self.eps)
        channels, area = shape[1] // self.groups, math.prod(shape[2:])
        return self._call(site, self.groups, channels * area, 1, *affine, channels, area, number=self.eps)
