"""The choice of lowering on a GPU by measurement: a layer of the same sizes with random values, timed in all three."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.testing import do_bench

from lcnn_compile.kernels import triton_store
from lcnn_compile.kernels.choose import Problem
from lcnn_compile.lookup import filter_table

_measured: dict[Problem, dict[str, float]] = {}


def _random_call(problem: Problem, device: torch.device) -> tuple[object, ...]:
    """Arguments of the operator up to the lowering, for a random layer of this problem; half precision is channels_last."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=problem.dtype)

    area = problem.kernel_size[0] * problem.kernel_size[1]
    filters = filter_table(problem.out_channels, problem.group_size, problem.groups).to(device)
    count, width = filters.shape
    taps = -(-problem.taps // (count * width))
    columns = torch.randint(problem.dictionary_size * area, (count * taps,), device=device, dtype=torch.int32)
    format = torch.contiguous_format if problem.dtype == torch.float32 else torch.channels_last
    x = random(problem.batch, problem.in_channels, *problem.size).contiguous(memory_format=format)
    dictionary = random(problem.groups, problem.dictionary_size, problem.in_channels // problem.groups)
    offsets = torch.arange(count + 1, device=device, dtype=torch.int32) * taps
    weight = (dictionary, random(count * taps, width), columns // area, columns % area, offsets, filters)
    geometry = (problem.kernel_size, problem.stride, problem.padding, problem.dilation)
    return (x, *weight, None, problem.out_channels, *geometry)


def _milliseconds(arguments: tuple[object, ...], lowering: str) -> float:
    def call() -> Tensor:
        y: Tensor = torch.ops.lcnn.lookup_conv2d(*arguments, lowering)
        return y

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def measured(problem: Problem) -> dict[str, float] | None:
    """Milliseconds of each lowering, measured once per device and kept on disk; None where nothing can be measured now."""
    found = _measured.get(problem)
    device = torch.device(problem.device)
    if found is not None or not triton_store.may_measure(device):
        return found
    path, key = triton_store.store_of(device), repr(problem)
    found = triton_store.known(path).get(key)
    if found is None:
        try:
            with torch.no_grad(), _disable_current_modes():
                arguments = _random_call(problem, device)
                found = {name: _milliseconds(arguments, name) for name in ("lookup", "factored", "dense")}
        except torch.OutOfMemoryError:
            return None
        triton_store.remember(path, key, found)
    _measured[problem] = found
    return found
