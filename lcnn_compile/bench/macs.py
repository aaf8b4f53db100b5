"""Multiply-adds of a model, dense and lookup layers alike, counted on the shapes of a real call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.modules import LookupConv2d, LookupLinear, LookupModule

Counted = nn.Conv2d | nn.Linear | LookupConv2d | LookupLinear


def _pixels(module: Counted, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Output pixels, and input pixels that any output reads."""
    if isinstance(module, nn.Linear | LookupLinear):
        rows = y.numel() // y.shape[-1]
        return rows, rows
    outputs, inputs = y.numel() // y.shape[-3], x.numel() // x.shape[-3]
    area = module.kernel_size[0] * module.kernel_size[1]
    return outputs, min(inputs, outputs * area)


def count(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of convolutions and fully connected layers in ``model(example)``."""
    total = 0

    def hook(module: Counted, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        outputs, read = _pixels(module, inputs[0], output)
        if isinstance(module, LookupModule):
            total += module.lookup_weight().macs(outputs, read)
        else:
            total += outputs * module.weight.numel()

    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, Counted)]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return total
