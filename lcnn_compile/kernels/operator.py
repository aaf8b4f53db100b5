"""Registration of ``torch.ops.lcnn.lookup_conv2d``: schema, dispatch by device and lowering, fake, autograd, autocast.

The operator computes ``activation(conv(x, P·D) + bias + residual)``. ``lowering`` picks one of three exact ways
("lookup", "factored", "dense"), "auto" the cheapest; all give the same values up to rounding. ``precision`` "bfloat16" lets the lookup
lowering on a CPU round its operands; "int8" with ``ranges`` (:mod:`lcnn_compile.kernels.bytes_lowering`) computes in bytes, whatever the
lowering is. The output is channels_last where the input is
(and is not contiguous too), contiguous otherwise. ``lookup_conv2d_inference`` is the same without gradients, and cheaper to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lcnn_compile.errors import KernelError, WeightError
from lcnn_compile.kernels import backward, bytes_lowering, choose, cpu, reference
from lcnn_compile.kernels.arguments import Arguments, Epilogue, Geometry, Weight
from lcnn_compile.kernels.checks import check_call, check_present, check_storage, output_channels
from lcnn_compile.kernels.library import TAGS, library
from lcnn_compile.kernels.prepared import Prepared
from lcnn_compile.kernels.triton import ops as triton_ops
from lcnn_compile.torch_private import without_autocast

T = TypeVar("T")
LOWERINGS = ("lookup", "factored", "dense")
PRECISIONS = (*cpu.PRECISIONS, "int8")
WEIGHTS = (1, 2, 7)
"""Places of the dictionary, the coefficients and the bias among the operator's arguments."""

NAMES = ("lookup_conv2d", "lookup_conv2d_inference")
SCHEMA = (
    "(Tensor input, Tensor dictionary, Tensor coefficients, Tensor indices, Tensor positions, Tensor offsets, "
    "Tensor filters, Tensor? bias, SymInt out_channels, int[] kernel_size, int[] stride, SymInt[] padding, int[] dilation, "
    'str lowering="lookup", str activation="none", Tensor? residual=None, bool residual_last=False, '
    'str precision="float32", Tensor? ranges=None) -> Tensor'
)
for _name in NAMES:
    library.define(_name + SCHEMA, tags=TAGS)


_cast_weight = Prepared(Tensor.to)
_lookups = Prepared(reference.lookup_tensor)
_dense_weights = Prepared(lambda dictionary, *rest: reference.dense_weight(dictionary, reference.lookup_tensor(*rest)))


def has_lookup_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether the lookup lowering runs on a kernel of ours for this device type and dtype."""
    return cpu.usable(device, dtype) or triton_ops.usable(device, dtype)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise KernelError(f"lookup_conv2d: precision is {precision!r}; allowed are {PRECISIONS}")


def _forward(call: Arguments) -> Tensor:
    input, weight, geometry, epilogue, lowering, precision, ranges = call
    dictionary, coefficients = weight[:2]
    check_present("lookup_conv2d", input, *weight)
    _check_precision(precision)
    if precision == "int8":
        if ranges is not None and input.dtype in cpu.DTYPES:
            check_call(call)
            output_channels("lookup_conv2d", weight, geometry.kernel_size)
            return bytes_lowering.forward(call).contiguous(memory_format=reference.output_format(input))
        precision = "float32"  # until there are ranges
    if lowering == "auto":
        check_call(call)
        if coefficients.dim() != 2:
            raise WeightError(f"lookup_conv2d: coefficients have shape {tuple(coefficients.shape)}; 2 dimensions are required")
        shapes = (input.shape, dictionary.shape, coefficients.shape)
        problem = choose.problem_of(*shapes, geometry, input.device.type, input.dtype, precision)
        lowering = choose.cheapest(problem, has_lookup_kernel(input.device.type, input.dtype))
    if lowering == "lookup" and cpu.takes(input, dictionary, geometry.kernel_size):
        precision = "bfloat16" if input.dtype == torch.bfloat16 else precision
        y = cpu.packed_weight(weight, geometry.kernel_size, precision)(call)
        format = reference.output_format(input)
        return y if format is torch.contiguous_format else y.contiguous(memory_format=format)
    shape = check_call(call)
    for tensor in (input, dictionary, coefficients, epilogue.bias, epilogue.residual):
        if tensor is not None:
            check_storage("lookup_conv2d", tensor)
    known = output_channels("lookup_conv2d", weight, geometry.kernel_size)
    if known != geometry.out_channels:
        raise KernelError(f"lookup_conv2d: out_channels is {geometry.out_channels}; the weight has {known} filters")
    if lowering == "lookup" and input.is_cpu and input.dtype in cpu.DTYPES:
        lowering = "factored"  # the kernels are unavailable, and have said so, or the kernel is huge
    if lowering == "lookup" and input.device.type == "cuda":
        made = triton_ops.forward(call, shape, reference.output_format(input))
        if made is not None:
            return made
        lowering = "factored"
    sizes = (geometry.out_channels, dictionary.shape[1], geometry.kernel_size)
    if lowering == "lookup":
        y = reference.lower_lookup(input, *weight, *geometry)
    elif lowering == "dense":
        y = reference.convolve(input, _dense_weights(weight, *sizes), geometry, dictionary.shape[0])
    elif lowering == "factored":
        y = reference.lower_factored(input, dictionary, _lookups(weight[1:], *sizes), *geometry[2:])
    else:
        raise KernelError(f"lookup_conv2d: lowering is {lowering!r}; allowed are {LOWERINGS}")
    return reference.apply_epilogue(y, *epilogue).contiguous(memory_format=reference.output_format(input))


def _fake(call: Arguments) -> Tensor:
    input, weight = call.input, call.weight
    check_present("lookup_conv2d", input, *weight)
    _check_precision(call.precision)
    shape = check_call(call)
    # This also runs where one argument is on the meta device; the others are real then, and so would be the empty output.
    for tensor in weight.lookups:
        if tensor.device != input.device:
            raise WeightError(f"lookup_conv2d: the weight has tensors on {tensor.device}, the input is on {input.device}")
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=reference.output_format(input))


def _adapted(function: Callable[[Arguments], T]) -> Callable[..., T]:
    """A function of a call as one of the flat arguments, in the order of the schema; the dispatcher leaves out those that have their default."""
    # This runs at every call: making tuples directly takes half the time of calling their classes.
    new = tuple.__new__

    def call(
        input: Tensor,
        dictionary: Tensor,
        coefficients: Tensor,
        indices: Tensor,
        positions: Tensor,
        offsets: Tensor,
        filters: Tensor,
        bias: Tensor | None,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        lowering: str = "lookup",
        activation: str = "none",
        residual: Tensor | None = None,
        residual_last: bool = False,
        precision: str = "float32",
        ranges: Tensor | None = None,
    ) -> T:
        weight = new(Weight, (dictionary, coefficients, indices, positions, offsets, filters))
        geometry = new(Geometry, (out_channels, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)))
        epilogue = new(Epilogue, (bias, residual, activation, residual_last))
        return function(new(Arguments, (input, weight, geometry, epilogue, lowering, precision, ranges)))

    return call


arguments = _adapted(lambda call: call)
"""The flat arguments of the operator as one value; also those of a graph's node."""

for _name in NAMES:
    library.impl(_name, _adapted(_forward), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lcnn::{_name}", _adapted(_fake), lib=library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = arguments(*inputs)
    activation, residual = call.epilogue.activation, call.epilogue.residual
    if activation != "none" or residual is not None:
        raise KernelError(
            f"lookup_conv2d: activation {activation!r} and residual are for inference; no gradient is defined through them"
        )
    ctx.save_for_backward(call.input, *call.weight)
    ctx.has_bias = call.epilogue.bias is not None
    ctx.geometry = call.geometry


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
    input, *weight = ctx.saved_tensors
    gradients = backward.gradients(grad, input, Weight(*weight), ctx.geometry, ctx.needs_input_grad[:3])
    return (*gradients, None, None, None, None, grad_bias, *[None] * 11)


torch.library.register_autograd("lcnn::lookup_conv2d", _backward, setup_context=_setup_context, lib=library)
library.impl("lookup_conv2d_inference", torch.library.fallthrough_kernel, "Autograd")


def _autocast(name: str, device: str) -> Any:
    operator = getattr(torch.ops.lcnn, name).default

    def call(*args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(value: Any, place: int = 0) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
                return value
            constant = place in WEIGHTS and not (torch.is_grad_enabled() and value.requires_grad)
            return _cast_weight((value,), dtype) if constant and value.dtype != dtype else value.to(dtype)

        with without_autocast(device):
            cast_args = [cast(a, place) for place, a in enumerate(args)]
            return operator(*cast_args, **{k: cast(v) for k, v in kwargs.items()})

    return call


for _name in NAMES:
    for _device in ("cpu", "cuda"):
        library.impl(_name, _autocast(_name, _device), f"Autocast{_device.upper()}")

lookup_conv2d = torch.ops.lcnn.lookup_conv2d.default
lookup_conv2d_inference = torch.ops.lcnn.lookup_conv2d_inference.default
