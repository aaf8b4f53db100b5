"""Steps whose values are bytes: lookup convolutions, maxima and means over windows, chains of functions, and the ways there and back."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.convolutions import LookUp
from lcnn_compile.kernels.cpu.elementwise import OPERANDS, Map, NativeMap
from lcnn_compile.kernels.cpu.forward import Pooling
from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.cpu.step import CAST, LOOK_UP_BYTES, MAP_BYTES, MEAN_BYTES, POOL_BYTES, Native, Shape, Site, Step
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


Bytes = tuple[float, int] | None
"""Scale and zero of values that are bytes; None for floats."""


class _ByteMean(ctypes.Structure):
    """lcnn::ByteMean."""

    _fields_ = (
        ("pool", Pooling),
        *((name, ctypes.c_int64) for name in ("images", "x_image", "y_image")),
        *((name, ctypes.c_void_p) for name in ("rows", "columns")),
        *((name, ctypes.c_int64) for name in ("reads_bytes", "x_zero", "writes_bytes", "y_zero")),
    )


@dataclass(frozen=True)
class ByteMean(Pool):
    """The mean over windows, of bytes or floats (``of``) to bytes or floats (``to``): :func:`lcnn_compile.kernels.quantized.mean_of_bytes`."""

    of: Bytes = None
    to: Bytes = None

    def element(self, elements: Sequence[str]) -> str:
        """As ``to`` says."""
        return "float32" if self.to is None else "uint8"

    def factors(self, shape: Shape, out: Shape) -> list[list[float]]:
        """For windows of an image of ``shape`` [N, C, H, W], what the sums of each row and of each column are multiplied with."""
        scale = (1.0 if self.of is None else self.of[0]) / (1.0 if self.to is None else self.to[0])
        if self.window.kernel_size is None:
            return [[scale / shape[2]], [1 / shape[3]]]
        rows, columns = (self.window.factors(i - 2, shape[i], out[i]) for i in (2, 3))
        return [[row * scale for row in rows], columns]

    def native(self, site: Site) -> list[Native]:
        """One call."""
        x, y = site.shapes[self.x], site.shapes[site.y]
        if not x[2] * x[3]:
            raise KernelError(f"a program cannot take means over an input of shape {tuple(x)}")
        if self.of is not None and 255 * math.prod(self.window.kernel_size or x[2:]) >= 1 << 31:
            raise KernelError(f"sums of bytes over windows of {self.window.kernel_size or x[2:]} could leave 32 bits")
        tables = [(ctypes.c_float * len(found))(*found) for found in self.factors(x, y)]
        images = (x[0], site.images[self.x], site.images[site.y])
        ends = [int(end is not None) if part else (end or (0.0, 0))[1] for end in (self.of, self.to) for part in (True, False)]
        made = _ByteMean(self.window.pooling(x, x[1]), *images, *map(ctypes.addressof, tables), *ends)
        return [Native(MEAN_BYTES, made, (self.x,), tuple(tables))]


class _ByteMap(ctypes.Structure):
    """lcnn::ByteMap."""

    _fields_ = (
        ("map", NativeMap),
        ("scales", ctypes.c_double * OPERANDS),
        ("zeros", ctypes.c_int64 * OPERANDS),
        ("scale", ctypes.c_double),
        ("zero", ctypes.c_int64),
    )


@dataclass(frozen=True)
class ByteMap(Map):
    """A chain of functions in float32 whose inputs may be bytes (``of``, one for each) and whose result may be (``to``).

    No two operations are fused, so that every processor gives the same bits.
    """

    of: tuple[Bytes, ...] = ()
    to: Bytes = None

    @property
    def in_place(self) -> bool:
        """Where nothing is bytes."""
        return self.to is None and not any(self.of)

    @property
    def hands_on(self) -> bool:
        """Unless the result is rounded."""
        return self.to is None

    def joined_with(self, first: Map, made: Map) -> Map:
        """The chain with the bytes of both."""
        assert isinstance(first, ByteMap)
        known = dict(zip((*first.inputs, *self.inputs), (*first.of, *self.of), strict=True))
        fields = {f.name: getattr(made, f.name) for f in dataclass_fields(Map)}
        return ByteMap(**fields, of=tuple(known[x] for x in made.inputs), to=self.to)

    def element(self, elements: Sequence[str]) -> str:
        """As ``to`` says."""
        return "float32" if self.to is None else "uint8"

    def native(self, site: Site) -> list[Native]:
        """One call."""
        [plain] = super().native(site)
        made = _ByteMap(plain.of, zero=0 if self.to is None else self.to[1], scale=0.0 if self.to is None else 1 / self.to[0])
        for i, known in enumerate(self.of):
            if known is not None:
                made.scales[i], made.zeros[i] = known
        return [Native(MAP_BYTES, made, plain.reads, plain.owned)]


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
