"""What each of the three lowerings costs for a weight and a shape, by estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Geometry
from lcnn_compile.kernels.cpu.forward import POSITIONS

RATE = 5e10
"""Multiply-adds a second that estimates stand for where nothing can be measured."""


@dataclass(frozen=True)
class Problem:
    """Everything that the cost of a lookup convolution depends on: sizes and shapes, never values.

    ``taps`` counts the multiply-adds of all filters at one output pixel; ``size`` is the input's (H, W); ``padding`` is
    (top, bottom, left, right); ``precision`` is that of the lookup lowering.
    """

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    dictionary_size: int
    taps: int
    group_size: int
    size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str = "float32"

    @property
    def out_pixels(self) -> int:
        """Output pixels of the whole batch."""
        high, wide = reference.output_size(self.size, self.kernel_size, self.stride, self.padding, self.dilation)
        return self.batch * high * wide

    @property
    def in_pixels(self) -> int:
        """Pixels at which S is formed, those that some tap reads."""
        return self.batch * reference.needed_pixels(self.size, self.kernel_size, self.stride)

    def macs(self) -> dict[str, int]:
        """Multiply-adds of each lowering, of the whole batch."""
        per_group = self.in_channels // self.groups
        area = self.kernel_size[0] * self.kernel_size[1]
        dictionary = self.in_channels * self.dictionary_size * self.in_pixels
        return {
            "lookup": dictionary + self.taps * self.out_pixels,
            "factored": dictionary + self.dictionary_size * self.out_channels * area * self.out_pixels,
            "dense": per_group * self.out_channels * area * self.out_pixels,
        }


def narrow(channels: int) -> float:
    """The share of its peak that a dense convolution reaches over so few channels per group."""
    return min(1.0, (channels + 16) / 48)


def estimate(problem: Problem, lookup_kernel: bool) -> dict[str, float]:
    """Cost of each lowering in multiply-adds of a well-shaped dense convolution; "lookup" only where a kernel of ours exists."""
    macs = problem.macs()
    per_group = problem.in_channels // problem.groups
    call = 5e5
    dictionary = problem.in_channels * problem.dictionary_size * problem.in_pixels
    cost = {
        "dense": call + macs["dense"] / narrow(min(per_group, problem.out_channels // problem.groups)),
        "factored": 2 * call + dictionary / 0.7 + (macs["factored"] - dictionary) / narrow(problem.dictionary_size),
    }
    if lookup_kernel and problem.kernel_size[0] * problem.kernel_size[1] <= POSITIONS:
        rate = {1: 0.45, 2: 0.6, 3: 0.7}.get(problem.group_size, 0.9)
        cost["lookup"] = 2 * call + dictionary / 0.9 + (macs["lookup"] - dictionary) / rate
    return cost


def estimated_seconds(problem: Problem, lookup_kernel: bool) -> dict[str, float]:
    """The estimates at a nominal rate."""
    return {name: cost / RATE for name, cost in estimate(problem, lookup_kernel).items()}


def known_precision(precision: str, device: str, dtype: torch.dtype) -> str:
    """The precision where kernels know it: float32 on a CPU; elsewhere it makes no other problem. Bytes have one lowering, not chosen here."""
    return precision if precision != "int8" and device == "cpu" and dtype == torch.float32 else "float32"


def problem_of(
    input_shape: Sequence[int],
    dictionary_shape: Sequence[int],
    coefficients_shape: Sequence[int],
    geometry: Geometry,
    device: str,
    dtype: torch.dtype,
    precision: str = "float32",
) -> Problem:
    """The problem of one call of the operator, from its arguments' shapes."""
    out_channels, kernel_size, stride, padding, dilation = geometry
    groups, size, per_group = dictionary_shape
    return Problem(
        batch=int(input_shape[0]),
        in_channels=groups * per_group,
        out_channels=out_channels,
        groups=groups,
        dictionary_size=size,
        taps=int(coefficients_shape[0] * coefficients_shape[1]),
        group_size=int(coefficients_shape[1]),
        size=(int(input_shape[2]), int(input_shape[3])),
        kernel_size=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=(int(padding[0]), int(padding[1]), int(padding[2]), int(padding[3])),
        dilation=(dilation[0], dilation[1]),
        device=device,
        dtype=dtype,
        precision=known_precision(precision, device, dtype),
    )
