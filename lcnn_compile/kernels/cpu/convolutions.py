"""Steps that multiply with weights: lookup convolutions, depthwise ones and linear layers."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.forward import ACTIVATION_CODES, PackedWeight
from lcnn_compile.kernels.cpu.step import DEPTHWISE, LINEAR, LOOK_UP, Native, Shape, Site, Step, contiguous_strides
from lcnn_compile.kernels.cpu.windows import Window
from lcnn_compile.kernels.reference import output_size


@dataclass(frozen=True)
class Convolution(Step):
    """A convolution of value ``x`` [N, C, H, W] with the epilogue of the operator; ``residual`` is a value or None."""

    x: int
    residual: int | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    activation: str = "none"
    residual_last: bool = False
    named: ClassVar[str]
    """In errors."""

    @property
    def reads(self) -> tuple[int, ...]:
        """``x``, and the residual."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def renumbered(self, place: Mapping[int, int] | Sequence[int]) -> Self:
        """The same with other numbers."""
        return replace(self, x=place[self.x], residual=None if self.residual is None else place[self.residual])

    @property
    def weighted(self) -> bool:
        """Always."""
        return True

    def described(self) -> str:
        """Name, channels, kernel, stride, and what follows."""
        high, wide = self.kernel_size
        stride = "" if self.stride == (1, 1) else f", stride {self.stride[0]}x{self.stride[1]}"
        ending = "" if self.activation == "none" else f", {self.activation}"
        added = "" if self.residual is None else ", residual"
        return f"{self.named} {self.in_channels} to {self.out_channels}, {high}x{wide}{stride}{ending}{added}"

    def convolved(self, shapes: Sequence[Shape]) -> Shape:
        """[N, n, H', W'].

        Raises:
            KernelError: the input or the residual does not fit.
        """
        x = shapes[self.x]
        if len(x) != 4 or x[1] != self.in_channels:
            raise KernelError(f"a program's {self.named} got an input of shape {tuple(x)}; [N, {self.in_channels}, H, W]")
        high, wide = output_size(x[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        shape = (x[0], self.out_channels, high, wide)
        if high < 1 or wide < 1:
            raise KernelError(f"a program's {self.kernel_size} kernel does not fit its input of shape {tuple(x)}")
        if self.residual is not None and tuple(shapes[self.residual]) != shape:
            raise KernelError(f"a program's residual has shape {tuple(shapes[self.residual])}; the output has {shape}")
        return shape


class _LookUp(ctypes.Structure):
    """lcnn::LookUpStep."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("plan", "bias"))


@dataclass(frozen=True)
class LookUp(Convolution):
    """A lookup convolution.

    ``pool`` is done with the output before it is written; then there is no residual. Weights: the packed weight, the bias or None.
    """

    pool: Window | None = None
    named: ClassVar[str] = "lookup convolution"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, n, H', W']."""
        shape = self.convolved(shapes)
        return shape if self.pool is None else self.pool.shape(shape)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        packed, bias = site.weights
        assert isinstance(packed, PackedWeight)
        x = site.shapes[self.x]
        strides = site.strides.get(self.x) or (site.images[self.x], *contiguous_strides(x)[1:])
        convolved = self.convolved(site.shapes)
        pool = None if self.pool is None else self.pool.pooling(convolved, convolved[0] * convolved[1])
        geometry = (self.stride, self.dilation, self.padding, self.activation, self.residual_last, site.threads, pool)
        images = (site.images[site.y], None if self.residual is None else site.images[self.residual])
        plan = packed.plan(x, strides, convolved, *geometry, *images)
        made = _LookUp(plan.address, None if bias is None else bias.data_ptr())
        return [Native(LOOK_UP, made, self.reads, (plan, bias))]


class _Depthwise(ctypes.Structure):
    """lcnn::Depthwise."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("images", "channels", "multiplier", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "dilation")),
        *((name, ctypes.c_int64) for name in ("top", "left", "activation", "residual_last")),
        *((name, ctypes.c_int64) for name in ("x_image", "y_image", "residual_image")),
    )


@dataclass(frozen=True)
class Depthwise(Convolution):
    """A dense convolution each of whose filters reads one channel of ``x``.

    Weights: [n, 1, kh, kw], n a multiple of C, and the bias [n] or None.
    """

    named: ClassVar[str] = "depthwise convolution"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, n, H', W']."""
        shape = self.convolved(shapes)
        if self.out_channels % self.in_channels or self.activation not in ACTIVATION_CODES:
            raise KernelError(f"a program's {self} is no depthwise convolution with an activation of {sorted(ACTIVATION_CODES)}")
        return shape

    def native(self, site: Site) -> list[Native]:
        """One call."""
        weight, bias = site.weights
        if tuple(weight.shape) != (self.out_channels, 1, *self.kernel_size):
            raise KernelError(f"a program's depthwise convolution {self} has a weight of shape {tuple(weight.shape)}")
        x, y = site.shapes[self.x], site.shapes[site.y]
        sizes = (x[0], self.out_channels, self.out_channels // self.in_channels, *x[2:], *y[2:])
        pairs = [(ctypes.c_int64 * 2)(*values) for values in (self.kernel_size, self.stride, self.dilation)]
        ending = (self.padding[0], self.padding[2], ACTIVATION_CODES[self.activation], int(self.residual_last))
        images = (site.images[self.x], site.images[site.y], 0 if self.residual is None else site.images[self.residual])
        made = _Depthwise(weight.data_ptr(), None if bias is None else bias.data_ptr(), *sizes, *pairs, *ending, *images)
        return [Native(DEPTHWISE, made, self.reads, (weight, bias))]


class _Linear(ctypes.Structure):
    """lcnn::Linear."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("images", "rows", "inputs", "outputs", "x_image", "y_image")),
    )


@dataclass(frozen=True)
class Linear(Step):
    """A dense linear layer of ``x`` [N, *, m]. Weights: [n, m], and the bias [n] or None."""

    x: int
    in_features: int
    out_features: int

    def described(self) -> str:
        """Name and sizes."""
        return f"linear {self.in_features} to {self.out_features}"

    @property
    def weighted(self) -> bool:
        """Always."""
        return True

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *, n]."""
        x = shapes[self.x]
        if len(x) < 2 or x[-1] != self.in_features:
            raise KernelError(f"a program's linear layer got an input of shape {tuple(x)}; [N, {self.in_features}] is required")
        return (*x[:-1], self.out_features)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        weight, bias = site.weights
        rows = 1
        for size in site.shapes[self.x][1:-1]:
            rows *= size
        sizes = (site.shapes[self.x][0], rows, self.in_features, self.out_features)
        images = (site.images[self.x], site.images[site.y])
        made = _Linear(weight.data_ptr(), None if bias is None else bias.data_ptr(), *sizes, *images)
        return [Native(LINEAR, made, (self.x,), (weight, bias))]
