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


def factored(grad: Tensor, saved: Sequence[Tensor], geometry: Sequence[Any], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients through the factored form, in operators that have gradients of their own; see :func:`gradients`."""
    input, dictionary, coefficients, indices, positions, offsets, filters = saved
    out_channels, kernel_size, stride, padding, dilation = geometry
    groups, size, _ = dictionary.shape
    x, step = reference.read_pixels(input, kernel_size, stride, padding)
    pointwise = reference.pointwise_weight(dictionary)
    p = reference.lookup_tensor(coefficients, indices, positions, offsets, filters, out_channels, size, kernel_size)
    s = reference.pad_spatial(torch.nn.functional.conv2d(x, pointwise, None, groups=groups), padding)
    with _deterministic():
        grad_s, grad_p, _ = torch.ops.aten.convolution_backward(
            grad, s, p, None, step, [0, 0], dilation, False, [0, 0], groups, [True, wanted[2], False]
        )
    top, _, left, _ = padding
    grad_s = grad_s[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    grad_x, grad_dictionary = _through_dictionary(grad_s, x, dictionary, wanted)
    return (
        None if grad_x is None else _spread(grad_x, input, stride),
        grad_dictionary,
        reference.gather_taps(grad_p, indices, positions, offsets, filters) if wanted[2] else None,
    )


def _through_dictionary(grad_s: Tensor, x: Tensor, dictionary: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of x and of the dictionary from that of S."""
    return (_by_convolution if dictionary.is_cpu else _by_product)(grad_s, x, dictionary, wanted)


def _by_convolution(grad_s: Tensor, x: Tensor, dictionary: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    grad_x, grad_pointwise, _ = torch.ops.aten.convolution_backward(
        *(grad_s, x, reference.pointwise_weight(dictionary), None, [1, 1], [0, 0], [1, 1], False, [0, 0], dictionary.shape[0]),
        [*wanted[:2], False],
    )
    return grad_x, grad_pointwise.view_as(dictionary) if wanted[1] else None


def _by_product(grad_s: Tensor, x: Tensor, dictionary: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """As matrix products, which are the same at every run on a GPU too."""
    groups, size, per_group = dictionary.shape
    flat = grad_s.unflatten(1, (groups, size)).flatten(3)
    channels = x.unflatten(1, (groups, per_group)).flatten(3)
    return (
        torch.einsum("gkm,ngkp->ngmp", dictionary, flat).reshape(x.shape) if wanted[0] else None,
        torch.einsum("ngkp,ngmp->gkm", flat, channels) if wanted[1] else None,
    )


def _on_gpu(
    grad: Tensor, saved: tuple[Tensor, ...], geometry: tuple[Any, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The coefficients' gradient at the taps, by a Triton kernel where it runs; the others through the factored form."""
    input, *weight = saved
    taps = triton_ops.coefficient_gradient(grad, input, tuple(weight), *geometry[1:]) if wanted[2] else None  # type: ignore[arg-type]
    if taps is None:
        return factored(grad, saved, geometry, wanted)
    rest = factored(grad, saved, geometry, (*wanted[:2], False)) if any(wanted[:2]) else (None, None)
    return *rest[:2], taps


def _on_cpu(
    grad: Tensor, saved: tuple[Tensor, ...], geometry: tuple[Any, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """All gradients at the taps, by the C++ kernels where they are faster."""
    input, dictionary, coefficients, indices, positions, offsets, filters = saved
    _, kernel_size, stride, padding, dilation = geometry
    lookups = (coefficients, indices, positions, offsets, filters)
    if cpu_backward.pays(dictionary, coefficients, geometry):
        x, _ = reference.read_pixels(input, kernel_size, stride, padding)
        s = torch.nn.functional.conv2d(x, reference.pointwise_weight(dictionary), None, groups=dictionary.shape[0])
        made = cpu_backward.gradients(grad, s, lookups, dictionary.shape[0], kernel_size, padding, dilation)
        if made is not None:
            grad_x, grad_dictionary = _through_dictionary(made[0], x, dictionary, wanted)
            return None if grad_x is None else _spread(grad_x, input, stride), grad_dictionary, made[1]
    return factored(grad, saved, geometry, wanted)


Arguments = tuple[tuple[Tensor, ...], tuple[Any, ...], Sequence[bool]]
"""Of the operator after ``grad``: what the forward operator was given, its geometry, and which gradients are wanted."""


def _parts(arguments: tuple[Any, ...]) -> Arguments:
    out_channels, kernel_size, stride, padding, dilation, wanted = arguments[7:]
    return arguments[:7], (out_channels, tuple(kernel_size), stride, padding, dilation), wanted


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    saved, geometry, wanted = _parts(arguments)
    _check(grad, saved, geometry)
    made = (_on_cpu if grad.is_cpu else _on_gpu)(grad, saved, geometry, wanted)
    return tuple(
        found.contiguous(memory_format=format) if found is not None and asked else grad.new_empty(0)
        for found, format, asked in zip(made, _formats(saved), wanted, strict=True)
    )


def _formats(saved: tuple[Tensor, ...]) -> tuple[torch.memory_format, ...]:
    """Of the three results."""
    return reference.output_format(saved[0]), torch.contiguous_format, torch.contiguous_format


def _check(grad: Tensor, saved: tuple[Tensor, ...], geometry: tuple[Any, ...]) -> None:
    _check_forms(grad, saved, geometry)
    input, *weight = saved
    known = output_channels(NAME, tuple(weight), geometry[1])
    if known != geometry[0]:
        raise KernelError(f"{NAME}: out_channels is {geometry[0]}; the weight has {known} filters")
    for tensor in (grad, input, *weight[:2]):
        check_storage(NAME, tensor)


def _check_forms(grad: Tensor, saved: tuple[Tensor, ...], geometry: tuple[Any, ...]) -> None:
    """What shapes, dtypes and devices tell; this serves the fake too."""
    check_present(NAME, grad, *saved)
    input, dictionary, *lookups = saved
    out_channels, kernel_size, stride, padding, dilation = geometry
    fused = ("none", None)
    shape = check_call(input, dictionary, None, out_channels, kernel_size, stride, padding, dilation, *fused, NAME)
    if tuple(grad.shape) != shape:
        raise WeightError(f"{NAME}: grad has shape {tuple(grad.shape)}; the output has {shape}")
    check_like(NAME, "grad", grad, input)
    for tensor in lookups:
        if tensor.device != input.device:
            raise WeightError(f"{NAME}: the weight has tensors on {tensor.device}, the input is on {input.device}")


library.impl("lookup_conv2d_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lcnn::lookup_conv2d_backward", lib=library)
def _fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    saved, geometry, wanted = _parts(arguments)
    _check_forms(grad, saved, geometry)
    return tuple(
        torch.empty_like(like, memory_format=format) if asked else grad.new_empty(0)
        for like, format, asked in zip(saved[:3], _formats(saved), wanted, strict=True)
    )


def gradients(
    grad: Tensor, saved: Sequence[Tensor], geometry: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of (input, dictionary, coefficients), None where not ``wanted``, for the operator's autograd formula.

    ``saved`` are the operator's first seven arguments, ``geometry`` (out_channels, kernel_size, stride, padding, dilation).
    """
    ours = grad.is_cuda or cpu_backward.pays(saved[1], saved[2], geometry)
    if torch.is_grad_enabled() or not ours:
        return factored(grad, saved, geometry, wanted)
    made = torch.ops.lcnn.lookup_conv2d_backward(grad, *saved, *geometry, list(wanted))
    return tuple(g if w else None for g, w in zip(made, wanted, strict=True))
