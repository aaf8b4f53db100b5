"""The C++ kernels behind the lookup lowering on CPU: packing, plans and the launcher."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.arguments import Arguments, Weight
from lcnn_compile.kernels.checks import check_call, check_weight
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu.threads import thread_count
from lcnn_compile.kernels.prepared import Prepared

ACTIVATION_CODES = {name: code for code, name in enumerate(("none", "relu", "relu6", "silu", "hardswish"))}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("float32", "bfloat16")
PLANS = 64
POSITIONS = 1 << 14
"""Of a kernel: planning compares positions in pairs, so that larger kernels are left to the factored lowering."""


def is_available() -> bool:
    """Whether the C++ kernels can be used here; the first call compiles or loads them, and warns where that fails."""
    return cpu_build.library() is not None


def usable(device: str, dtype: torch.dtype) -> bool:
    """Whether the lookup lowering runs on these kernels for this device type and dtype."""
    return device == "cpu" and dtype in DTYPES and is_available()


def multiplies_pairs() -> bool:
    """Whether layers of precision "bfloat16" multiply in bfloat16: where the processor has a matrix unit for it (AMX).

    Elsewhere such a layer's weights are rounded, but multiplied in float32, which is faster there. ``LCNN_CPU_BFLOAT16=always``
    makes any processor round activations too, to test that.
    """
    library = cpu_build.library()
    return os.environ.get("LCNN_CPU_BFLOAT16") == "always" or (library is not None and bool(library.lcnn_multiplies_pairs()))


def takes(input: Tensor, dictionary: Tensor, kernel_size: Sequence[int]) -> bool:
    """Whether the lookup lowering of this input runs on these kernels."""
    fits = input.dim() == 4 and input.is_cpu and dictionary.is_cpu and input.dtype in DTYPES
    return fits and math.prod(kernel_size) <= POSITIONS and is_available()


def address_of(tensor: Tensor) -> int:
    """Where a tensor's values lie.

    Raises:
        KernelError: nowhere: its storage was resized to nothing, or it is a fake tensor.
    """
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise KernelError(f"a tensor of shape {tuple(tensor.shape)} has no memory: its storage was freed")
    return address


class Handle:
    """An object of the library, freed with this one."""

    __slots__ = ("_free", "address")

    def __init__(self, address: int | None, free: Callable[[int], None]):
        if not address:
            raise KernelError("lookup_conv2d: not enough memory, or more than 2^31 elements of S per band")
        self.address, self._free = address, free

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._free(self.address)


class PlanHandle(Handle):
    """A plan of the library, and what it was made of.

    Attributes:
        weight: the packed weight.
        geometry: the words of lcnn::Geometry.
        pool: those of lcnn::Pool, or None.
    """

    __slots__ = ("geometry", "pool", "weight")

    def __init__(
        self, address: int | None, free: Callable[[int], None], weight: object, geometry: Sequence[int], pool: Pooling | None
    ):
        super().__init__(address, free)
        self.weight, self.geometry, self.pool = weight, geometry, pool


_sources = ContextVar("_sources", default=False)


@contextmanager
def keep_sources() -> Iterator[None]:
    """Weights that are packed inside keep what they were packed from, so that they can be written to a file."""
    token = _sources.set(True)
    try:
        yield
    finally:
        _sources.reset(token)


class Pooling(ctypes.Structure):
    """lcnn::Pool: what is pooled of [planes, height, width]."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("planes", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride")),
        *((name, ctypes.c_int64) for name in ("top", "left", "mean", "lanes")),
        ("dilation", ctypes.c_int64 * 2),
    )


class _Plan(NamedTuple):
    """What is worked out once for all calls of the same geometry."""

    handle: Handle
    shape: tuple[int, int, int, int]


class PackedWeight:
    """A validated lookup weight as the kernels want it, with the plans of the calls it has seen.

    With precision "bfloat16" dictionary and coefficients are rounded to it, and take half the memory.

    Attributes:
        out_channels: n.
        precision: "float32" or "bfloat16".
        kernel_size: (kh, kw).
        source: what it was packed from, where :func:`keep_sources` asked for it.
    """

    def __init__(self, weight: Weight, size: tuple[int, int], precision: str = "float32"):
        check_weight("lookup_conv2d", weight, size)
        dictionary, coefficients, *integers = weight
        filters = weight.filters
        library = cpu_build.library()
        if library is None:
            raise KernelError("lookup_conv2d: the C++ kernels are unavailable")
        if math.prod(size) > POSITIONS:
            raise KernelError(f"lookup_conv2d: the kernel has {size} positions; the C++ kernels take {POSITIONS} in all")
        self.out_channels = int((filters >= 0).sum())
        self.precision, self.kernel_size = precision, tuple(size)
        self._library = library
        self._plans: dict[tuple[object, ...], _Plan] = {}
        tensors = [t.detach().to(torch.float32).contiguous() for t in (dictionary, coefficients)]
        tensors += [t.contiguous() for t in integers]
        self.source = Weight(*tensors) if _sources.get() else None
        sizes = (ctypes.c_int64 * 8)(*dictionary.shape, *size, *filters.shape, precision == "bfloat16")
        packed = library.lcnn_weight_new(sizes, *[address_of(t) for t in tensors])
        self._handle = Handle(packed, library.lcnn_weight_free)

    def plan(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        out_shape: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        activation: str,
        residual_last: bool,
        threads: int,
        pool: Pooling | None = None,
        out_image: int | None = None,
        residual_image: int | None = None,
    ) -> PlanHandle:
        """What the kernels work out once for all calls of the same geometry; the input's rows have stride 1.

        ``out_shape`` is the convolution's; ``pool`` is done with it before it is written. From one image of the output and of the
        residual to the next there are ``out_image`` and ``residual_image`` elements, where they are not contiguous.
        """
        area = math.prod(out_shape[2:])
        images = (
            self.out_channels * (area if pool is None else pool.out_height * pool.out_width) if out_image is None else out_image,
            self.out_channels * area if residual_image is None else residual_image,
        )
        numbers = [*stride, *dilation, padding[0], padding[2], ACTIVATION_CODES[activation], int(residual_last), threads]
        numbers.append(self.precision == "bfloat16" and multiplies_pairs())
        geometry = [shape[0], *shape[2:], *strides, *out_shape[2:], *images, *numbers]
        pooling = None if pool is None else ctypes.byref(pool)
        made = self._library.lcnn_plan_new(self._handle.address, (ctypes.c_int64 * len(geometry))(*geometry), pooling)
        return PlanHandle(made, self._library.lcnn_plan_free, self, geometry, pool)

    def __call__(self, call: Arguments) -> Tensor:
        """``activation(conv(input, P·D) + bias + residual)``, contiguous, in the input's dtype.

        ``call`` is one of the operator with this weight. What ``check_call`` says of it is remembered with the plan.
        """
        input, _, geometry, (bias, residual, activation, residual_last), *_ = call
        x = input if input.dtype == torch.float32 else input.to(torch.float32)
        if x.stride(3) != 1:
            x = x.contiguous()
        threads = thread_count()
        key = (
            *(input.dtype, x.shape, x.stride(), geometry, activation, residual_last, threads),
            self.precision == "bfloat16" and multiplies_pairs(),
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            None if residual is None else (residual.shape, residual.dtype, residual.device),
        )
        plan = self._plans.get(key)
        if plan is None:
            out_channels, _, stride, padding, dilation = geometry
            if out_channels != self.out_channels:
                raise KernelError(f"lookup_conv2d: out_channels is {out_channels}; the weight has {self.out_channels} filters")
            shape = check_call(call)
            if len(self._plans) >= PLANS:
                self._plans = {}
            made = self.plan(x.shape, x.stride(), shape, stride, dilation, padding, activation, residual_last, threads)
            plan = self._plans[key] = _Plan(made, shape)
        bias = bias if bias is None else bias.to(torch.float32).contiguous()
        residual = residual if residual is None else residual.to(torch.float32).contiguous()
        y = torch.empty(plan.shape, dtype=torch.float32)
        failed = self._library.lcnn_run(
            plan.handle.address,
            address_of(x),
            None if bias is None else address_of(bias),
            None if residual is None else address_of(residual),
            y.data_ptr(),
        )
        if failed:
            raise KernelError(f"lookup_conv2d: no memory for the scratch of an input of shape {tuple(input.shape)}")
        return y if input.dtype == torch.float32 else y.to(input.dtype)


_packed_weight = Prepared(lambda *given: PackedWeight(Weight(*given[:6]), *given[6:]))


def packed_weight(weight: tuple[Tensor, ...], size: tuple[int, int], precision: str = "float32") -> PackedWeight:
    """The packed form of a weight's six tensors, from a cache where nothing has changed."""
    if _sources.get():
        return PackedWeight(Weight(*weight), size, precision)
    return _packed_weight(weight, size, precision)
