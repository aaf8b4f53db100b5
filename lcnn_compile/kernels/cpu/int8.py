"""The C++ kernels of bytes: packing a quantized lookup convolution, its plans, and calls of it alone."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lcnn_compile.errors import KernelError, WeightError
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu.forward import ACTIVATION_CODES, PLANS, POSITIONS, Handle, PlanHandle, address_of
from lcnn_compile.kernels.cpu.threads import thread_count
from lcnn_compile.kernels.quantized import QuantizedLookup
from lcnn_compile.kernels.reference import output_size


class _Finish(ctypes.Structure):
    """lcnn::ByteFinish."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("activation", "residual_last", "has_residual", "residual_zero", "to_bytes", "zero")
        ),
        *((name, ctypes.c_double) for name in ("residual_factor", "six", "step")),
    )


class PackedBytes:
    """A validated quantized layer as the kernels want it, with the plans of the calls it has seen.

    Attributes:
        layer: what is packed.
        out_channels: n.
        sizes, ending, starts: what the library is told beside the layer's tensors: sizes, lcnn::ByteFinish, the sums of D at zero.
    """

    def __init__(self, layer: QuantizedLookup, name: str = "convolve_bytes"):
        layer.validate(name)
        library = cpu_build.library()
        if library is None:
            raise KernelError(f"{name}: the C++ kernels are unavailable")
        if math.prod(layer.kernel_size) > POSITIONS:
            raise KernelError(f"{name}: the kernel has {layer.kernel_size} positions; the C++ kernels take {POSITIONS} in all")
        self.layer, self.out_channels = layer, layer.out_channels
        self._library = library
        self._plans: dict[tuple[object, ...], PlanHandle] = {}
        self.starts: Tensor | None = None
        identity = layer.dictionary is None
        per_group = layer.in_channels // layer.groups
        self.sizes = [
            layer.groups,
            layer.vectors,
            per_group,
            *layer.kernel_size,
            *layer.filters.shape,
            identity,
            layer.middle,
            layer.input_zero,
        ]
        finish = layer.finish
        zero, factor = finish.residual or (0, 0.0)
        kind = 0 if finish.residual is None else 2 if zero is None else 1
        codes = (ACTIVATION_CODES[finish.activation], finish.residual_last, kind, zero or 0)
        self.ending = _Finish(*codes, finish.zero is not None, finish.zero or 0, factor, finish.six, finish.step)
        tensors: list[Tensor | None] = [
            None,
            layer.coefficients.float(),
            layer.indices,
            layer.positions,
            layer.offsets,
            layer.filters,
            None,
            None,
        ]
        if layer.dictionary is not None:
            self.starts = -layer.input_zero * layer.dictionary.sum(2, dtype=torch.int32)
            tensors[0], tensors[6:] = layer.dictionary.float(), [self.starts, layer.vector_factors]
        tensors += [layer.bias, layer.filter_factors]
        held = [None if t is None else t.contiguous() for t in tensors]
        addresses = [None if t is None else address_of(t) for t in held]
        numbers = (ctypes.c_int64 * len(self.sizes))(*self.sizes)
        packed = library.lcnn_bytes_new(numbers, ctypes.byref(self.ending), *addresses)
        self._handle = Handle(packed, library.lcnn_bytes_free)

    def out_shape(
        self, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> tuple[int, int, int, int]:
        """[N, n, H', W'] for an input of ``shape`` [N, m, H, W].

        Raises:
            WeightError: the input does not fit.
        """
        if len(shape) != 4 or shape[1] != self.layer.in_channels:
            raise WeightError(f"convolve_bytes: input has shape {tuple(shape)}; [N, {self.layer.in_channels}, H, W] is required")
        if min(*stride, *dilation) < 1 or min(padding) < 0:
            raise WeightError(
                f"convolve_bytes: stride {tuple(stride)}, dilation {tuple(dilation)} or padding {tuple(padding)} is too small"
            )
        high, wide = output_size(shape[2:], self.layer.kernel_size, stride, padding, dilation)
        if min(high, wide) < 1:
            raise WeightError(f"convolve_bytes: a {self.layer.kernel_size} kernel does not fit an input of shape {tuple(shape)}")
        return (shape[0], self.out_channels, high, wide)

    def plan(
        self,
        shape: Sequence[int],
        out_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        threads: int,
        images: tuple[int, int, int] | None = None,
    ) -> PlanHandle:
        """What is worked out once for all calls of the same geometry.

        Images are contiguous inside; ``images``: elements from one to the next of the input, of the output, and of the residual, where these
        do not follow each other.
        """
        _, channels, height, width = shape
        whole = math.prod(out_shape[1:])
        x_image, y_image, residual_image = images or (channels * height * width, whole, whole)
        strides = (x_image, height * width, width, 1)
        rest = (*stride, *dilation, padding[0], padding[2], 0, 0, threads, 0)
        geometry = [shape[0], height, width, *strides, *out_shape[2:], y_image, residual_image, *rest]
        made = self._library.lcnn_bytes_plan_new(self._handle.address, (ctypes.c_int64 * len(geometry))(*geometry))
        return PlanHandle(made, self._library.lcnn_bytes_plan_free, self, geometry, None)

    def __call__(
        self,
        x: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        residual: Tensor | None = None,
    ) -> Tensor:
        """As :func:`lcnn_compile.kernels.quantized.convolve_bytes`, contiguous.

        Raises:
            WeightError: arguments that do not fit the layer.
            KernelError: no memory.
        """
        if x.dtype != torch.uint8 or not x.is_cpu:
            raise WeightError(f"convolve_bytes: input is {x.dtype} on {x.device}; uint8 on the CPU is required")
        shape = self.out_shape(x.shape, stride, padding, dilation)
        if (residual is None) != (self.layer.finish.residual is None):
            raise WeightError("convolve_bytes: a residual is given exactly where the layer adds one")
        wanted = torch.float32 if self.layer.finish.residual and self.layer.finish.residual[0] is None else torch.uint8
        if residual is not None and (residual.dtype != wanted or tuple(residual.shape) != shape or not residual.is_cpu):
            raise WeightError(
                f"convolve_bytes: residual is {residual.dtype} {tuple(residual.shape)}; {wanted} {shape} is required"
            )
        threads = thread_count()
        key = (tuple(x.shape), *stride, *padding, *dilation, threads)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= PLANS:
                self._plans = {}
            plan = self._plans[key] = self.plan(x.shape, shape, stride, padding, dilation, threads)
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        y = torch.empty(shape, dtype=torch.float32 if self.layer.finish.zero is None else torch.uint8)
        more = None if residual is None else address_of(residual)
        if self._library.lcnn_bytes_run(plan.address, address_of(x), more, y.data_ptr()):
            raise KernelError(f"convolve_bytes: no memory for the scratch of an input of shape {tuple(x.shape)}")
        return y
