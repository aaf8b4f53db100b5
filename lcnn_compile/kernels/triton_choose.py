"""The choice of lowering on a GPU by measurement: a layer of the same sizes with random values, timed in all three."""

from __future__ import annotations

import torch
from torch import Tensor

from lcnn_compile.kernels import triton_store
from lcnn_compile.kernels.choose import Problem
from lcnn_compile.kernels.measured import random_call
from lcnn_compile.kernels.store import known, remember
from lcnn_compile.torch_private import without_modes

_measured: dict[Problem, dict[str, float]] = {}


def _milliseconds(arguments: tuple[object, ...], lowering: str) -> float:
    def call() -> Tensor:
        y: Tensor = torch.ops.lcnn.lookup_conv2d_inference(*arguments, lowering)
        return y

    assert isinstance(arguments[0], Tensor)
    return triton_store.milliseconds(call, arguments[0].device)


def measured(problem: Problem) -> dict[str, float] | None:
    """Milliseconds of each lowering, measured once per device and kept on disk; None where nothing can be measured now."""
    found = _measured.get(problem)
    device = torch.device(problem.device)
    if found is not None or not triton_store.may_measure(device):
        return found
    path, key = triton_store.store_of(device), repr(problem)
    found = known(path).get(key)
    if found is None:
        try:
            with torch.no_grad(), without_modes():
                arguments = random_call(problem, device)
                found = {name: _milliseconds(arguments, name) for name in ("lookup", "factored", "dense")}
        except torch.OutOfMemoryError:
            return None
        remember(path, key, found)
    _measured[problem] = found
    return found
