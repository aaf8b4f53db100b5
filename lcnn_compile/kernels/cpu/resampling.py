"""Steps that read rows and columns by tables: padding of every mode, up- and down-sampling, uneven mean pooling."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.step import PICK, RESIZE, Native, Shape, Site, Step

aten = torch.ops.aten
PADDINGS = ("constant", "reflect", "replicate", "circular")
MODES = ("nearest", "nearest-exact", "linear", "bicubic", "mean")


class _Pick(ctypes.Structure):
    """lcnn::Pick."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "planes", "x_image", "y_image", "x_plane", "x_width", "height", "width")),
        *((name, ctypes.c_void_p) for name in ("rows", "columns")),
        *((name, ctypes.c_int64) for name in ("inner", "inner_end")),
        ("fill", ctypes.c_double),
    )


class _Resize(ctypes.Structure):
    """lcnn::Resize."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "planes", "x_image", "y_image")),
        *((name, ctypes.c_int64) for name in ("x_height", "x_width", "height", "width", "row_taps", "column_taps")),
        *((name, ctypes.c_void_p) for name in ("rows", "columns", "row_weights", "column_weights")),
    )


def _plane(shape: Shape) -> tuple[int, int, int]:
    """Planes, rows and columns of an image; what has no rows has one."""
    if len(shape) == 3:
        return shape[1], 1, shape[2]
    return math.prod(shape[1:-2]), shape[-2], shape[-1]


def _pick(site: Site, x: int, rows: Sequence[int], columns: Sequence[int], fill: float = 0.0) -> list[Native]:
    """The call that takes these rows and columns, -1 for none."""
    planes, height, width = _plane(site.shapes[x])
    tables = [(ctypes.c_int32 * len(values))(*values) for values in (rows, columns)]
    start, end = _longest_run(columns)
    sizes = (site.shapes[x][0], planes, site.images[x], site.images[site.y], height * width, width, len(rows), len(columns))
    made = _Pick(*sizes, *[ctypes.addressof(table) for table in tables], start, end, fill)
    return [Native(PICK, made, (x,), tuple(tables))]


def _longest_run(columns: Sequence[int]) -> tuple[int, int]:
    """Where most columns follow each other as they do in x."""
    best, start = (0, 0), 0
    for i in range(1, len(columns) + 1):
        if i == len(columns) or columns[i] != columns[i - 1] + 1 or columns[i - 1] < 0:
            if columns[start] >= 0 and i - start > best[1] - best[0]:
                best = (start, i)
            start = i
    return best


@dataclass(frozen=True)
class Pad(Step):
    """``x`` [N, C, *] with so many more columns and rows (left, right, top, bottom), fewer where negative, as ``F.pad`` has them."""

    x: int
    pads: tuple[int, int, int, int]
    mode: str = "constant"
    value: float = 0.0

    def _tables(self, shape: Shape) -> tuple[list[int], list[int]]:
        _, height, width = _plane(shape)
        left, right, top, bottom = self.pads
        return _padded(height, top, bottom, self.mode), _padded(width, left, right, self.mode)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, C, *]."""
        x = shapes[self.x]
        left, right, top, bottom = self.pads
        if len(x) < 3 or self.mode not in PADDINGS or (len(x) == 3 and (top or bottom)):
            raise KernelError(f"a program's padding {self} does not fit an input of shape {tuple(x)}; allowed are {PADDINGS}")
        sizes = [(x[-1], left, right)] if len(x) == 3 else [(x[-2], top, bottom), (x[-1], left, right)]
        for size, before, after in sizes:
            most = {"reflect": size - 1, "circular": size}.get(self.mode) if isinstance(size, int) else None
            if isinstance(size, int) and (
                size + before + after < 1 or size < 1 or (most is not None and max(before, after) > most)
            ):
                raise KernelError(f"a program's padding {self} does not fit an input of shape {tuple(x)}")
        return (*x[: len(x) - len(sizes)], *[size + before + after for size, before, after in sizes])

    def native(self, site: Site) -> list[Native]:
        """One call."""
        return _pick(site, self.x, *self._tables(site.shapes[self.x]), self.value)


def _padded(size: int, before: int, after: int, mode: str) -> list[int]:
    """Of which entry of ``size`` each entry of what is padded is a copy, -1 for none."""
    found = []
    for i in range(-before, size + after):
        if mode == "circular":
            i %= size
        elif mode == "replicate":
            i = min(max(i, 0), size - 1)
        elif mode == "reflect":
            i = -i if i < 0 else 2 * (size - 1) - i if i >= size else i
        found.append(i if 0 <= i < size else -1)
    return found


@dataclass(frozen=True)
class Resize(Step):
    """``x`` [N, C, H, W] or [N, C, W] in another size: ``size`` where it is known, else by ``scales``, both of as many dimensions.

    ``mode``: "nearest", "nearest-exact", "linear", "bicubic" (both in each dimension), or "mean" over the windows of adaptive pooling.
    ``scales``, where given, are what coordinates are computed with, as in PyTorch.
    """

    x: int
    mode: str
    size: tuple[int, ...] | None
    scales: tuple[float, ...] | None = None
    align_corners: bool = False
    antialias: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, C, *]."""
        x = shapes[self.x]
        given = self.size if self.size is not None else self.scales
        if self.mode not in MODES or given is None or len(x) not in (3, 4) or len(given) != len(x) - 2:
            raise KernelError(f"a program's resizing {self} does not fit an input of shape {tuple(x)}; modes are {MODES}")
        if self.size is not None:
            out: tuple[object, ...] = self.size
        else:
            out = tuple(int(size * scale) for size, scale in zip(x[2:], self.scales or (), strict=True))
        if any(isinstance(size, int) and size < 1 for size in (*x[2:], *out)):
            raise KernelError(f"a program's resizing {self} does not fit an input of shape {tuple(x)}")
        return (*x[:2], *out)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        x, y = site.shapes[self.x], site.shapes[site.y]
        scales = self.scales or (None,) * (len(x) - 2)
        how = [(x[i], y[i], self.mode, scales[i - 2], self.align_corners, self.antialias) for i in range(2, len(x))]
        if len(x) == 3:
            how.insert(0, (1, 1, "nearest", None, False, False))
        if self.mode.startswith("nearest"):
            rows, columns = (_taps(*axis)[0][:, 0].tolist() for axis in how)
            return _pick(site, self.x, rows, columns)
        planes, height, width = _plane(x)
        (rows_of, row_weights), (columns_of, column_weights) = (_taps(*axis) for axis in how)
        tables = (rows_of, columns_of, row_weights, column_weights)
        sizes = (height, width, *_plane(y)[1:], rows_of.shape[1], columns_of.shape[1])
        made = _Resize(x[0], planes, site.images[self.x], site.images[site.y], *sizes, *[table.data_ptr() for table in tables])
        return [Native(RESIZE, made, (self.x,), tables)]


@lru_cache(maxsize=256)
def _taps(size: int, out: int, mode: str, scale: float | None, corners: bool, antialias: bool) -> tuple[Tensor, Tensor]:
    """What each entry of ``out`` reads of ``size`` entries: int32 and float32 [out, taps], found by asking PyTorch."""
    if mode.startswith("nearest"):  # whose coordinates are computed in float32
        resize = aten.upsample_nearest1d if mode == "nearest" else aten._upsample_nearest_exact1d
        index = resize(torch.arange(size, dtype=torch.float32)[None, None], [out], scale)[0, 0]
        if size > 1 << 24:
            raise KernelError(f"a program enlarges {size} rows or columns; {1 << 24} are allowed")
        return index.to(torch.int32)[:, None].contiguous(), torch.ones(out, 1)
    unit = torch.eye(size, dtype=torch.float64)[:, None]
    if mode == "mean":
        matrix = F.adaptive_avg_pool1d(unit, out)[:, 0]
    elif mode == "linear" and not antialias:
        matrix = aten.upsample_linear1d(unit, [out], corners, scale)[:, 0]
    else:
        flat = unit[:, :, None]
        names = {("linear", True): aten._upsample_bilinear2d_aa, ("bicubic", True): aten._upsample_bicubic2d_aa}
        resize = names.get((mode, antialias), aten.upsample_bicubic2d)
        matrix = resize(flat, [1, out], corners, None, scale)[:, 0, 0]
    count = max(1, int((matrix != 0).sum(0).max()))
    weights, index = matrix.T.abs().topk(count, dim=1)
    weights = matrix.T.gather(1, index)
    return index.to(torch.int32).contiguous(), weights.float().contiguous()
