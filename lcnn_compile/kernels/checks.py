"""What the operator demands of its arguments, so that no kernel ever reads or writes out of bounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels import reference

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise WeightError(f"{name}: {message}")


def check_weight(
    name: str,
    dictionary: Tensor,
    coefficients: Tensor,
    indices: Tensor,
    positions: Tensor,
    offsets: Tensor,
    filters: Tensor,
    kernel_size: Sequence[int],
) -> None:
    """Raise WeightError unless the tensors form a lookup weight that a kernel may trust blindly."""
    dims = {"dictionary": 3, "coefficients": 2, "indices": 1, "positions": 1, "offsets": 1, "filters": 2}
    given = dict(zip(dims, (dictionary, coefficients, indices, positions, offsets, filters), strict=True))
    for key, tensor in given.items():
        _require(tensor.dim() == dims[key], name, f"{key} has shape {tuple(tensor.shape)}; {dims[key]} dimensions are allowed")
        _require(tensor.layout == torch.strided, name, f"{key} has layout {tensor.layout}; only strided tensors are allowed")
        _require(tensor.device == dictionary.device, name, f"{key} is on {tensor.device}, the dictionary on {dictionary.device}")
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
        len(kernel_size) == 2 and all(isinstance(v, int) and v > 0 for v in kernel_size),
        name,
        f"kernel_size is {kernel_size!r}; two positive integers are required",
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
    block = filters.view(groups, -1)
    block = block[block >= 0].view(-1) if n else block
    low = int(filters.min())
    _require(low >= -1, name, f"filters contain {low}; allowed are -1 and output channels")
    per_group = (filters.view(groups, -1) >= 0).sum(1)
    _require(
        bool((per_group == n // groups).all()) and torch.equal(block.view(groups, -1).sort(1).values, expected),
        name,
        f"filters must name each of the {n} output channels exactly once, in its own convolution group",
    )


def check_call(
    input: Tensor,
    dictionary: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    residual: Tensor | None,
    name: str = "lookup_conv2d",
) -> tuple[int, int, int, int]:
    """Raise WeightError unless the call fits the weight; return the output's shape (N, n, H, W).

    Only shapes, dtypes and devices are looked at, so this also serves the fake.
    """
    _require(input.dim() == 4, name, f"input has shape {tuple(input.shape)}; [N, C, H, W] is required")
    _require(dictionary.dim() == 3, name, f"dictionary has shape {tuple(dictionary.shape)}; 3 dimensions are required")
    channels = dictionary.shape[0] * dictionary.shape[2]
    _require(input.shape[1] == channels, name, f"input has {input.shape[1]} channels; the dictionary is for {channels}")
    _require(
        input.dtype == dictionary.dtype,
        name,
        f"input has dtype {input.dtype}, the dictionary {dictionary.dtype}; they must be equal",
    )
    _require(input.device == dictionary.device, name, f"input is on {input.device}, the dictionary on {dictionary.device}")
    for key, values, low in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("dilation", dilation, 1)):
        _require(len(values) == 2 and min(values) >= low, name, f"{key} is {tuple(values)}; two positive integers are required")
    _require(len(padding) == 4, name, f"padding is {tuple(padding)}; (top, bottom, left, right) is required")
    for value in padding:
        _require(value >= 0, name, f"padding is {tuple(padding)}; negative padding is not supported")
    _require(
        activation in reference.ACTIVATIONS, name, f"activation is {activation!r}; allowed are {sorted(reference.ACTIVATIONS)}"
    )
    high, wide = reference.output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    _require(
        high > 0 and wide > 0,
        name,
        f"the kernel {tuple(kernel_size)} with dilation {tuple(dilation)} does not fit the padded input of size {tuple(input.shape[2:])}",
    )
    shape = (input.shape[0], out_channels, high, wide)
    if bias is not None:
        _require(
            bias.dim() == 1 and bias.shape[0] == out_channels,
            name,
            f"bias has shape {tuple(bias.shape)}; [{out_channels}] is required",
        )
        _require(
            bias.dtype == input.dtype and bias.device == input.device,
            name,
            f"bias is {bias.dtype} on {bias.device}, input {input.dtype} on {input.device}",
        )
    if residual is not None:
        _require(tuple(residual.shape) == shape, name, f"residual has shape {tuple(residual.shape)}; the output has {shape}")
        _require(
            residual.dtype == input.dtype and residual.device == input.device,
            name,
            f"residual is {residual.dtype} on {residual.device}, input {input.dtype} on {input.device}",
        )
    return shape
