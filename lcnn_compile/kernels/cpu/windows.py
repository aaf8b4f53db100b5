"""Steps that go over windows: poolings."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.forward import Pooling
from lcnn_compile.kernels.cpu.step import POOL, Native, Shape, Site, Step
from lcnn_compile.kernels.reference import output_size

SUM = 2
"""lcnn::Pool::mean of a sum."""


@dataclass(frozen=True)
class Window:
    """What is pooled: the maximum or mean over windows, of whole planes without a kernel size.

    With ``lanes``, so many images lie side by side in each pixel. ``ceil``, ``counted`` (whether padding counts in a mean) and
    ``divisor`` are ceil_mode, count_include_pad and divisor_override of PyTorch's poolings.
    """

    mean: bool
    kernel_size: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    lanes: int = 1
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False
    counted: bool = True
    divisor: int | None = None

    @property
    def plain(self) -> bool:
        """Whether all windows are alike, side by side, and may be pooled band by band."""
        return not self.ceil and self.counted and self.divisor is None and self.dilation == (1, 1)

    def shape(self, x: Shape) -> Shape:
        """[N, C, H', W'] from [N, C, H, W]."""
        if len(x) != 4:
            raise KernelError(f"a program's pooling got an input of shape {tuple(x)}; [N, C, H, W] is required")
        if self.kernel_size is None:
            high, wide = (min(1, v) if isinstance(v, int) else 1 for v in x[2:])
        else:
            high, wide = self.places((x[2], x[3] if self.lanes == 1 else x[3] // self.lanes))
        if high < 1 or wide < 1:
            raise KernelError(f"a program's pooling over {self.kernel_size} does not fit its input of shape {tuple(x)}")
        return (*x[:2], high, wide if self.lanes == 1 else wide * self.lanes)

    def places(self, size: Shape) -> Shape:
        """(H', W'), the windows inside of a padded image of ``size`` (H, W); none, or fewer, where it is smaller than a window."""
        assert self.kernel_size is not None
        top, left = self.padding
        floor = output_size(size, self.kernel_size, self.stride, (top, top, left, left), self.dilation)
        if not self.ceil:
            return floor
        made = []
        for i in range(2):
            rest = size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1
            count = -(-rest // self.stride[i]) + 1
            # The last window must begin in the image or in the padding before it.
            made.append(count - 1 if (count - 1) * self.stride[i] >= size[i] + self.padding[i] else count)
        return tuple(made)

    def factors(self, axis: int, size: int, count: int) -> list[float]:
        """What the sums in each of ``count`` rows or columns are multiplied with for a mean."""
        assert self.kernel_size is not None
        if self.divisor is not None:
            return [1 / self.divisor if axis == 0 else 1.0] * count
        found = []
        for i in range(count):
            start = i * self.stride[axis] - self.padding[axis]
            end = min(start + self.kernel_size[axis], size + self.padding[axis])
            if not self.counted:
                start, end = max(start, 0), min(end, size)
            found.append(1 / max(1, end - start))
        return found

    def pooling(self, shape: Shape, planes: int) -> Pooling:
        """The library's form for so many planes of an image of ``shape`` [N, C, H, W]."""
        height, width = shape[2:]
        pair = ctypes.c_int64 * 2
        kernel = pair(*(self.kernel_size or (height, width)))
        high, wide = self.shape(shape)[2:]
        # A single window may be said to tile its plane.
        stride = pair(
            *(size if out == 1 else step for size, out, step in zip(kernel, (high, wide // self.lanes), self.stride, strict=True))
        )
        top, left = self.padding
        return Pooling(
            planes,
            height,
            width,
            high,
            wide,
            kernel,
            stride,
            top,
            left * self.lanes,
            int(self.mean),
            self.lanes,
            pair(*self.dilation),
        )


class _Pool(ctypes.Structure):
    """lcnn::PoolStep."""

    _fields_ = (
        ("pool", Pooling),
        *((name, ctypes.c_int64) for name in ("images", "x_image", "y_image")),
        *((name, ctypes.c_void_p) for name in ("rows", "columns")),
    )


@dataclass(frozen=True)
class Pool(Step):
    """The maximum or mean over windows of ``x`` [N, C, H, W]."""

    x: int
    window: Window

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, C, H', W']."""
        return self.window.shape(shapes[self.x])

    def native(self, site: Site) -> list[Native]:
        """One call."""
        x, y = site.shapes[self.x], site.shapes[site.y]
        x_image, y_image = site.images[self.x], site.images[site.y]
        batch, channels = x[:2]
        if (x_image, y_image) == (math.prod(x[1:]), math.prod(y[1:])):  # planes of all images follow each other
            batch, channels = 1, batch * channels
        pooling = self.window.pooling(x, channels)
        made, tables = _Pool(pooling, batch, x_image, y_image), []
        if self.window.mean and not self.window.plain:
            made.pool.mean = SUM
            tables = [(ctypes.c_float * y[i])(*self.window.factors(i - 2, x[i], y[i])) for i in (2, 3)]
            made.rows, made.columns = (ctypes.addressof(table) for table in tables)
        return [Native(POOL, made, (self.x,), tuple(tables))]
