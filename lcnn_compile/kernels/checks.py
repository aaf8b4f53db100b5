"""What the operator demands of its arguments, so that no kernel ever reads or writes out of bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Arguments, Weight
from lcnn_compile.kernels.prepared import Prepared

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 2**31 - 1
"""Of a kernel size, stride, dilation or padding: far beyond use, and no product of two of them overflows."""


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise WeightError(f"{name}: {message}")


def check_weight(name: str, weight: Weight, kernel_size: Sequence[int]) -> None:
    """Raise WeightError unless the tensors form a lookup weight that a kernel may trust blindly."""
    dims = {"dictionary": 3, "coefficients": 2, "indices": 1, "positions": 1, "offsets": 1, "filters": 2}
    dictionary, coefficients, _, _, offsets, filters = weight
    given = weight._asdict()
    for key, tensor in given.items():
        _require(tensor.dim() == dims[key], name, f"{key} has shape {tuple(tensor.shape)}; {dims[key]} dimensions are allowed")
        _require(tensor.layout == torch.strided, name, f"{key} has layout {tensor.layout}; only strided tensors are allowed")
        _require(tensor.device == dictionary.device, name, f"{key} is on {tensor.device}, the dictionary on {dictionary.device}")
        _require(
            within_storage(tensor), name, f"{key} of shape {tuple(tensor.shape)} reaches past its storage, which was resized"
        )
        if dims[key] == 1 or key == "filters":
            _require(tensor.dtype == torch.int32, name, f"{key} has dtype {tensor.dtype}; torch.int32 is required")
    _require(dictionary.dtype in FLOATING, name, f"dictionary has dtype {dictionary.dtype}; allowed are {FLOATING}")
    _require(
        coefficients.dtype == dictionary.dtype,
        name,
        f"coefficients have dtype {coefficients.dtype}, the dictionary {dictionary.dtype}; they must be equal",
    )
    groups, size, _ = dictionary.shape
    _require(dictionary.numel() > 0, name, f"dictionary has shape {tuple(dictionary.shape)}; every dimension must be positive")
    _require(
        len(kernel_size) == 2 and all(isinstance(v, int) and 0 < v <= LARGEST for v in kernel_size),
        name,
        f"kernel_size is {kernel_size!r}; two positive integers are required, at most {LARGEST}",
    )
    taps, width = coefficients.shape
    count = filters.shape[0]
    _require(
        filters.numel() > 0 and filters.shape[1] == width,
        name,
        f"filters has shape {tuple(filters.shape)}, coefficients {(taps, width)}",
    )
    _require(count % groups == 0, name, f"{count} filter groups cannot be split over {groups} convolution groups")
    for key in ("indices", "positions"):
        _require(given[key].shape[0] == taps, name, f"{key} has {given[key].shape[0]} entries; coefficients have {taps} taps")
    _require(
        offsets.shape[0] == count + 1, name, f"offsets has {offsets.shape[0]} entries; {count} filter groups need {count + 1}"
    )
    steps = offsets.diff()
    _require(
        int(offsets[0]) == 0 and int(offsets[-1]) == taps and bool((steps >= 0).all()),
        name,
        f"offsets must ascend from 0 to {taps} taps; they run from {int(offsets[0])} to {int(offsets[-1])}",
    )
    area = kernel_size[0] * kernel_size[1]
    for key, bound in (("indices", size), ("positions", area)):
        if taps:
            low, high = (int(v) for v in given[key].aminmax())
            _require(low >= 0 and high < bound, name, f"{key} range from {low} to {high}; allowed is 0 to {bound - 1}")
    channels = filters[filters >= 0]
    n = channels.numel()
    _require(n % groups == 0 and n > 0, name, f"{n} filters cannot be split over {groups} convolution groups")
    expected = torch.arange(n, device=filters.device, dtype=torch.int32).view(groups, -1)
    block = filters.reshape(groups, -1)
    block = block[block >= 0].view(-1) if n else block
    low = int(filters.min())
    _require(low >= -1, name, f"filters contain {low}; allowed are -1 and output channels")
    per_group = (filters.reshape(groups, -1) >= 0).sum(1)
    _require(
        bool((per_group == n // groups).all()) and torch.equal(block.view(groups, -1).sort(1).values, expected),
        name,
        f"filters must name each of the {n} output channels exactly once, in its own convolution group",
    )


def within_storage(tensor: Tensor) -> bool:
    """Whether all elements lie in the tensor's memory; a storage may be resized under a tensor."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type == "meta" or not tensor.numel():
        return True
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()


def check_call(call: Arguments, name: str = "lookup_conv2d") -> tuple[int, int, int, int]:
    """Raise WeightError unless the call fits the weight; return the output's shape (N, n, H, W).

    Only shapes, dtypes and devices are looked at, so this also serves the fake.
    """
    input, (dictionary, *_), geometry, (bias, residual, activation, _), *_ = call
    out_channels, kernel_size, stride, padding, dilation = geometry
    # Messages are formed only for what is wrong: this runs at every call.
    if input.layout != torch.strided:
        raise WeightError(f"{name}: input is {input.layout}; a strided tensor is required")
    if input.dim() != 4:
        raise WeightError(f"{name}: input has shape {tuple(input.shape)}; [N, C, H, W] is required")
    if dictionary.dim() != 3:
        raise WeightError(f"{name}: dictionary has shape {tuple(dictionary.shape)}; 3 dimensions are required")
    channels = dictionary.shape[0] * dictionary.shape[2]
    if input.shape[1] != channels:
        raise WeightError(f"{name}: input has {input.shape[1]} channels; the dictionary is for {channels}")
    check_like(name, "dictionary", dictionary, input)
    for key, values in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if len(values) != 2 or min(values) < 1 or max(values) > LARGEST:
            # The words of nn.Conv2d for the same mistake come first: code may look for them.
            known = "non-positive stride is not supported: " if key == "stride" and len(values) == 2 and min(values) < 1 else ""
            raise WeightError(f"{name}: {known}{key} is {tuple(values)}; two integers from 1 to {LARGEST} are required")
    if len(padding) != 4:
        raise WeightError(f"{name}: padding is {tuple(padding)}; (top, bottom, left, right) is required")
    for value in padding:
        if value < 0 or value > LARGEST:
            known = "negative padding is not supported: " if value < 0 else ""
            raise WeightError(f"{name}: {known}padding is {tuple(padding)}; four integers from 0 to {LARGEST} are required")
    if activation not in reference.ACTIVATIONS:
        raise WeightError(f"{name}: activation is {activation!r}; allowed are {sorted(reference.ACTIVATIONS)}")
    high, wide = reference.output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    if high <= 0 or wide <= 0:
        padded = [input.shape[2 + i] + padding[2 * i] + padding[2 * i + 1] for i in range(2)]
        extent = [dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)]
        raise WeightError(
            f"{name}: Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: ({extent[0]} x {extent[1]}). "
            f"Kernel size can't be greater than actual input size"
        )
    shape = (input.shape[0], out_channels, high, wide)
    if all(type(v) is int for v in shape) and math.prod(shape) >= 2**48:
        raise WeightError(f"{name}: the output would have shape {shape}, more than any memory holds")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != out_channels:
            raise WeightError(f"{name}: bias has shape {tuple(bias.shape)}; [{out_channels}] is required")
        check_like(name, "bias", bias, input)
    if residual is not None:
        if tuple(residual.shape) != shape:
            raise WeightError(f"{name}: residual has shape {tuple(residual.shape)}; the output has {shape}")
        check_like(name, "residual", residual, input)
    return shape


def check_present(name: str, *tensors: Tensor | None) -> None:
    """Raise WeightError for None, which the dispatcher lets pass for a tensor."""
    for tensor in tensors:
        if tensor is None:
            raise WeightError(f"{name}: a tensor of the input or of the weight is None")


def check_storage(name: str, tensor: Tensor) -> None:
    """Raise WeightError where a tensor reaches past its memory: PyTorch's own operators may crash on it."""
    if not within_storage(tensor):
        raise WeightError(f"{name}: a tensor of shape {tuple(tensor.shape)} reaches past its storage, which was resized")


def check_like(name: str, key: str, value: Tensor, input: Tensor) -> None:
    """Raise WeightError unless ``value`` has the dtype, device and layout of the input."""
    if value.dtype != input.dtype or value.device != input.device or value.layout != input.layout:
        found, wanted = (f"{t.dtype} on {t.device} ({t.layout})" for t in (value, input))
        raise WeightError(f"{name}: {key} is {found}, input {wanted}")


def _validated(*arguments: Any) -> int:
    indices, positions, offsets, filters, *floating, kernel_size, name = arguments
    # Of the floating tensors only the form matters, and it outlives their values, which change at every training step.
    for form in floating:
        if len(form) == 1:
            raise WeightError(f"{name}: dictionary or coefficients are {form[0]}; strided tensors are required")
    dictionary, coefficients = (torch.empty((), dtype=kind, device=where).expand(shape) for shape, kind, where in floating)
    check_weight(name, Weight(dictionary, coefficients, indices, positions, offsets, filters), kernel_size)
    return int((filters >= 0).sum())


_prepared_validated = Prepared(_validated)


def output_channels(name: str, weight: Weight, kernel_size: tuple[int, int]) -> int:
    """Check a weight, once until it changes, and return its number of output channels."""
    dictionary, coefficients, *integers = weight
    forms = [(t.shape, t.dtype, t.device) if t.layout == torch.strided else (str(t.layout),) for t in (dictionary, coefficients)]
    return _prepared_validated(tuple(integers), *forms, kernel_size, name)
