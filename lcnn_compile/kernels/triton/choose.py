"""The choice of lowering on a GPU by measurement: a layer of the same sizes with random values, timed in all three.

In half precision lookups run as chains (:mod:`lcnn_compile.kernels.triton.chain_operator`), whose epilogue costs nothing, while a compiler adds a
pass over the output of a dense convolution for bias and activation: so that is what is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Arguments, flat
from lcnn_compile.kernels.measured import random_call
from lcnn_compile.kernels.problem import Problem
from lcnn_compile.kernels.store import known, remember
from lcnn_compile.kernels.triton import store as triton_store
from lcnn_compile.kernels.triton.chain_operator import HALVES, WIDEST
from lcnn_compile.kernels.triton.chain_pack import pack_weight, pad_rows
from lcnn_compile.torch_private import without_modes

_measured: dict[Problem, dict[str, float]] = {}


def _milliseconds(call: Arguments, lowering: str) -> float:
    arguments = flat(call._replace(lowering=lowering))
    return triton_store.milliseconds(lambda: torch.ops.lcnn.lookup_conv2d_inference(*arguments), call.input.device)


def _chain_milliseconds(call: Arguments) -> float:
    """S by a kernel of its own, which the layer before may save, and the convolution with P, bias and ReLU."""
    x, weight, geometry = call[:3]
    vectors = pad_rows(weight.dictionary[0], 16)
    lookups = reference.lookup_tensor(*weight.lookups, geometry.out_channels, weight.dictionary.shape[1], geometry.kernel_size)
    first, second = pack_weight(vectors[:, :, None, None]), pack_weight(pad_rows(lookups.transpose(0, 1), 16).transpose(0, 1))
    bias = x.new_zeros(second.shape[1])
    point = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), "none", False, True)

    def product() -> Tensor:
        s: Tensor = torch.ops.lcnn.chain(x, first, None, None, None, vectors.shape[0], 0, *point)[0]
        return s

    s = product()
    rest = (geometry.out_channels, 0, *geometry[1:], "relu", False, True)
    return triton_store.milliseconds(product, x.device) + triton_store.milliseconds(
        lambda: torch.ops.lcnn.chain(s, second, bias, None, None, *rest), x.device
    )


def _times(problem: Problem, call: Arguments) -> dict[str, float]:
    planes = -(-problem.dictionary_size // 16) * 16
    if problem.dtype not in HALVES or problem.groups > 1 or planes > WIDEST:
        return {name: _milliseconds(call, name) for name in ("lookup", "factored", "dense")}
    x = call.input
    y = torch.empty(problem.batch, problem.out_channels, problem.out_pixels // problem.batch, dtype=x.dtype, device=x.device)
    after = triton_store.milliseconds(lambda: torch.relu(y), x.device)
    return {"lookup": _chain_milliseconds(call), "dense": _milliseconds(call, "dense") + after}


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
                found = _times(problem, random_call(problem, device))
        except torch.OutOfMemoryError:
            return None
        remember(path, key, found)
    _measured[problem] = found
    return found
