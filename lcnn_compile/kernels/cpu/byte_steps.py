"""Steps whose values are bytes: lookup convolutions, maxima over windows, and the ways there and back."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lcnn_compile.kernels.cpu.convolutions import LookUp
from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.cpu.step import CAST, LOOK_UP_BYTES, POOL_BYTES, Native, Shape, Site, Step
from lcnn_compile.kernels.cpu.windows import Pool


class _ByteLookUp(ctypes.Structure):
    """lcnn::ByteLookUpStep."""

    _fields_ = (("plan", ctypes.c_void_p),)


@dataclass(frozen=True)
class ByteLookUp(LookUp):
    """A lookup convolution of bytes; its output is of bytes or, without ``to_bytes``, float32. Weights: the packed layer, which says what the
    residual is and what comes behind the sums.
    """

    to_bytes: bool = True

    def element(self, elements: Sequence[str]) -> str:
        """As ``to_bytes`` says."""
        return "uint8" if self.to_bytes else "float32"

    def native(self, site: Site) -> list[Native]:
        """One call."""
        (packed,) = site.weights
        assert isinstance(packed, PackedBytes)
        y_image = site.images[site.y]
        images = (site.images[self.x], y_image, y_image if self.residual is None else site.images[self.residual])
        geometry = (self.stride, self.padding, self.dilation)
        plan = packed.plan(site.shapes[self.x], self.convolved(site.shapes), *geometry, site.threads, images)
        return [Native(LOOK_UP_BYTES, _ByteLookUp(plan.address), self.reads, (plan,))]


@dataclass(frozen=True)
class BytePool(Pool):
    """The maximum over windows of bytes."""

    def element(self, elements: Sequence[str]) -> str:
        """Bytes."""
        return "uint8"

    def native(self, site: Site) -> list[Native]:
        """One call."""
        [made] = super().native(site)
        return [made._replace(kind=POOL_BYTES)]


class _Cast(ctypes.Structure):
    """lcnn::CastStep."""

    _fields_ = (
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("zero", "to_bytes", "images", "count", "x_image", "y_image")),
    )


@dataclass(frozen=True)
class Cast(Step):
    """``x`` as bytes that stand for ``scale * (byte - zero)``, rounded and saturated; or such bytes as float32."""

    x: int
    scale: float
    zero: int
    to_bytes: bool

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """That of x."""
        return shapes[self.x]

    def element(self, elements: Sequence[str]) -> str:
        """As ``to_bytes`` says."""
        return "uint8" if self.to_bytes else "float32"

    def native(self, site: Site) -> list[Native]:
        """One call."""
        shape = site.shapes[site.y]
        count, images = math.prod(shape[1:]), shape[0]
        x_image, y_image = site.images[self.x], site.images[site.y]
        if x_image == y_image == count:
            count, images = count * images, 1
        scale = 1 / self.scale if self.to_bytes else self.scale  # what rounds multiplies by the inverse, as Range does
        return [Native(CAST, _Cast(scale, self.zero, self.to_bytes, images, count, x_image, y_image), (self.x,))]
