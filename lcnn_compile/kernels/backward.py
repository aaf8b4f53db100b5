"""``torch.ops.lcnn.lookup_conv2d_backward``: the gradients of the operator's input, dictionary and coefficients.

Through the factored form, which costs k/m of the dense backward pass, or at the taps alone, by kernels of ours. Where a
gradient of these gradients is wanted they are formed by PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.errors import KernelError, WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Arguments, Geometry, Weight
from lcnn_compile.kernels.checks import check_call, check_like, check_present, check_storage, output_channels
from lcnn_compile.kernels.cpu import backward as cpu_backward
from lcnn_compile.kernels.library import library
from lcnn_compile.kernels.triton import ops as triton_ops

NAME = "lookup_conv2d_backward"
library.define(
    "lookup_conv2d_backward(Tensor grad, Tensor input, Tensor dictionary, Tensor coefficients, Tensor indices, Tensor positions, "
    "Tensor offsets, Tensor filters, SymInt out_channels, int[] kernel_size, int[] stride, SymInt[] padding, int[] dilation, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _spread(read: Tensor, like: Tensor, stride: Sequence[int]) -> Tensor:
    """The gradient of the input from that of what was read of it."""
    if read.shape == like.shape:
        return read
    spread = torch.zeros_like(like)
    spread[:, :, :: stride[0], :: stride[1]] = read
    return spread


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of the input, the dictionary and the coefficients; None where not wanted."""


def factored(grad: Tensor, input: Tensor, weight: Weight, geometry: Geometry, wanted: Sequence[bool]) -> Gradients:
    """The gradients through the factored form, in operators that have gradients of their own; see :func:`gradients`."""
    dictionary, padding = weight.dictionary, geometry.padding
    groups, size, _ = dictionary.shape
    x, read = reference.read_pixels(input, geometry)
    pointwise = reference.pointwise_weight(dictionary)
    p = reference.lookup_tensor(*weight.lookups, geometry.out_channels, size, geometry.kernel_size)
    s = reference.pad_spatial(torch.nn.functional.conv2d(x, pointwise, None, groups=groups), padding)
    with _deterministic():
        grad_s, grad_p, _ = torch.ops.aten.convolution_backward(
            grad, s, p, None, read.stride, [0, 0], read.dilation, False, [0, 0], groups, [True, wanted[2], False]
        )
    top, _, left, _ = padding
    grad_s = grad_s[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    grad_x, grad_dictionary = _through_dictionary(grad_s, x, dictionary, wanted)
    return (
        None if grad_x is None else _spread(grad_x, input, geometry.stride),
        grad_dictionary,
        reference.gather_taps(grad_p, weight.lookups) if wanted[2] else None,
    )


def _through_dictionary(
    grad_s: Tensor, x: Tensor, dictionary: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the dictionary from that of S."""
    return (_by_convolution if dictionary.is_cpu else _by_product)(grad_s, x, dictionary, wanted)


def _by_convolution(grad_s: Tensor, x: Tensor, dictionary: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    grad_x, grad_pointwise, _ = torch.ops.aten.convolution_backward(
        *(grad_s, x, reference.pointwise_weight(dictionary), None, [1, 1], [0, 0], [1, 1], False, [0, 0], dictionary.shape[0]),
        [*wanted[:2], False],
    )
    return grad_x, grad_pointwise.view_as(dictionary) if wanted[1] else None


def _by_product(grad_s: Tensor, x: Tensor, dictionary: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """As matrix products, which are the same at every run on a GPU too."""
    groups, size, per_group = dictionary.shape
    flat = grad_s.unflatten(1, (groups, size)).flatten(3)
    channels = x.unflatten(1, (groups, per_group)).flatten(3)
    return (
        torch.einsum("gkm,ngkp->ngmp", dictionary, flat).reshape(x.shape) if wanted[0] else None,
        torch.einsum("ngkp,ngmp->gkm", flat, channels) if wanted[1] else None,
    )


def _on_gpu(grad: Tensor, input: Tensor, weight: Weight, geometry: Geometry, wanted: Sequence[bool]) -> Gradients:
    """The coefficients' gradient at the taps, by a Triton kernel where it runs; the others through the factored form."""
    taps = triton_ops.coefficient_gradient(grad, input, weight, geometry) if wanted[2] else None
    if taps is None:
        return factored(grad, input, weight, geometry, wanted)
    rest = factored(grad, input, weight, geometry, (*wanted[:2], False)) if any(wanted[:2]) else (None, None)
    return rest[0], rest[1], taps


def _on_cpu(grad: Tensor, input: Tensor, weight: Weight, geometry: Geometry, wanted: Sequence[bool]) -> Gradients:
    """All gradients at the taps, by the C++ kernels where they are faster."""
    dictionary = weight.dictionary
    if cpu_backward.pays(weight, geometry):
        x, _ = reference.read_pixels(input, geometry)
        s = torch.nn.functional.conv2d(x, reference.pointwise_weight(dictionary), None, groups=dictionary.shape[0])
        made = cpu_backward.gradients(grad, s, weight.lookups, dictionary.shape[0], geometry)
        if made is not None:
            grad_x, grad_dictionary = _through_dictionary(made[0], x, dictionary, wanted)
            return None if grad_x is None else _spread(grad_x, input, geometry.stride), grad_dictionary, made[1]
    return factored(grad, input, weight, geometry, wanted)


def _parts(input: Tensor, *rest: Any) -> tuple[Tensor, Weight, Geometry, Sequence[bool]]:
    """The operator's arguments after ``grad`` as values."""
    weight, (out_channels, *sizes, wanted) = rest[:6], rest[6:]
    return input, Weight(*weight), Geometry(out_channels, *map(tuple, sizes)), wanted


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    input, weight, geometry, wanted = _parts(*arguments)
    _check(grad, input, weight, geometry)
    made = (_on_cpu if grad.is_cpu else _on_gpu)(grad, input, weight, geometry, wanted)
    return tuple(
        found.contiguous(memory_format=format) if found is not None and asked else grad.new_empty(0)
        for found, format, asked in zip(made, _formats(input), wanted, strict=True)
    )


def _formats(input: Tensor) -> tuple[torch.memory_format, ...]:
    """Of the three results."""
    return reference.output_format(input), torch.contiguous_format, torch.contiguous_format


def _check(grad: Tensor, input: Tensor, weight: Weight, geometry: Geometry) -> None:
    _check_forms(grad, input, weight, geometry)
    known = output_channels(NAME, weight, geometry.kernel_size)
    if known != geometry.out_channels:
        raise KernelError(f"{NAME}: out_channels is {geometry.out_channels}; the weight has {known} filters")
    for tensor in (grad, input, *weight[:2]):
        check_storage(NAME, tensor)


def _check_forms(grad: Tensor, input: Tensor, weight: Weight, geometry: Geometry) -> None:
    """What shapes, dtypes and devices tell; this serves the fake too."""
    check_present(NAME, grad, input, *weight)
    shape = check_call(Arguments(input, weight, geometry), NAME)
    if tuple(grad.shape) != shape:
        raise WeightError(f"{NAME}: grad has shape {tuple(grad.shape)}; the output has {shape}")
    check_like(NAME, "grad", grad, input)
    for tensor in weight.lookups:
        if tensor.device != input.device:
            raise WeightError(f"{NAME}: the weight has tensors on {tensor.device}, the input is on {input.device}")


library.impl("lookup_conv2d_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lcnn::lookup_conv2d_backward", lib=library)
def _fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    input, weight, geometry, wanted = _parts(*arguments)
    _check_forms(grad, input, weight, geometry)
    return tuple(
        torch.empty_like(like, memory_format=format) if asked else grad.new_empty(0)
        for like, format, asked in zip((input, *weight[:2]), _formats(input), wanted, strict=True)
    )


def gradients(grad: Tensor, input: Tensor, weight: Weight, geometry: Geometry, wanted: Sequence[bool]) -> Gradients:
    """The gradients of (input, dictionary, coefficients), None where not ``wanted``, for the operator's autograd formula."""
    ours = grad.is_cuda or cpu_backward.pays(weight, geometry)
    if torch.is_grad_enabled() or not ours:
        return factored(grad, input, weight, geometry, wanted)
    made = torch.ops.lcnn.lookup_conv2d_backward(grad, input, *weight, *geometry, list(wanted))
    return tuple(g if w else None for g, w in zip(made, wanted, strict=True))  # type: ignore[return-value]
