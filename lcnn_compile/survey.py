"""What convolutions and linear layers a model has, how often and on what sizes they run, and which could be replaced."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lcnn_compile.batches import call_model
from lcnn_compile.errors import ConversionError
from lcnn_compile.geometry import geometry_of, kind_of
from lcnn_compile.modules import LookupModule
from lcnn_compile.obstacles import is_quantised, obstacle, weight_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION_FUNCTIONS = {
    getattr(F, name): name for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
}


@dataclass
class Usage:
    """How a layer runs in one call of the model, per sample.

    Attributes:
        out_pixels: pixels at which each tap of a filter is applied: the output's; for a transposed convolution the input's.
        in_pixels: pixels at which S is needed.
        macs: multiply-adds of the dense layer.
        size: (H, W) of the images that the operator would see, of the last call where there are several.
    """

    out_pixels: int = 0
    in_pixels: int = 0
    macs: int = 0
    size: tuple[int, int] = (1, 1)


@dataclass
class Survey:
    """The layers of a model in the order in which they run (those that never ran last), their usage and obstacles.

    Attributes:
        layers: convolutions and linear layers by qualified name.
        reasons: why a layer cannot be replaced; "" where it can.
        usage: how the layers ran on the example inputs; empty without any.
        functions: convolutions called as functions: name of the weight (or of the function) -> name of the function.
    """

    layers: dict[str, nn.Module]
    reasons: dict[str, str]
    usage: dict[str, Usage] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense convolution and linear layer of ``model`` by its first qualified name, ``model`` itself as ""."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, LookupModule | nn.MultiheadAttention):
            # Attention reads the weights of its own projections without calling them.
            inside.append(f"{name}.")
        elif is_quantised(module):
            inside.append(f"{name}.")
            found[name] = module
        elif isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            found[name] = module
    return found


class _FunctionWatch(TorchFunctionMode):
    """Records convolutions that are called as functions, outside the known layers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.found: dict[str, str] = {}
        self.inside = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTION_FUNCTIONS and not self.inside:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            self.found[self._names.get(id(weight), func.__name__)] = CONVOLUTION_FUNCTIONS[func]
        return func(*args, **kwargs)


def _usage(layer: Any, input: Tensor, output: Tensor) -> Usage:
    """Pixels and multiply-adds per sample of one call."""
    weight = weight_of(layer)
    elements = 0 if weight is None else weight.numel()
    if kind_of(layer) is not None:
        taps, inputs, size = geometry_of(layer).usage(input, output)
        return Usage(taps, inputs, taps * elements, size)
    if weight is None or weight.dim() < 3:
        rows = output[..., 0].numel() // (max(1, input.shape[0]) if input.dim() > 1 else 1)
        return Usage(rows, rows, rows * elements)
    spatial = weight.dim() - 2
    pixels = {name: math.prod(tensor.shape[-spatial:]) for name, tensor in (("in", input), ("out", output))}
    return Usage(pixels["out"], pixels["in"], pixels["in" if getattr(layer, "transposed", False) else "out"] * elements)


def survey(model: nn.Module, batch: Any = None) -> Survey:
    """Find the layers of ``model`` and, given a batch, run it once to see which run, in which order and on what sizes.

    Raises:
        ConversionError: if the model fails on the batch.
    """
    layers = find_layers(model)
    usage: dict[str, Usage] = {}
    functions: dict[str, str] = {}
    if batch is not None:
        names = {id(layer): name for name, layer in layers.items()}

        watch = _FunctionWatch(model)

        def enter(layer: nn.Module, args: Any) -> None:
            watch.inside += 1

        def record(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            watch.inside -= 1
            input = args[0] if args else kwargs.get("input")
            if isinstance(input, Tensor) and isinstance(output, Tensor):
                seen, new = usage.setdefault(names[id(layer)], Usage()), _usage(layer, input, output)
                seen.out_pixels += new.out_pixels
                seen.in_pixels += new.in_pixels
                seen.macs += new.macs
                seen.size = new.size

        with ExitStack() as stack:
            for layer in layers.values():
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(record, with_kwargs=True).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(watch)
            try:
                call_model(model, batch)
            except Exception as error:
                raise ConversionError(f"the model fails on the example inputs: {type(error).__name__}: {error}") from error
        functions = watch.found
        order = [*usage, *(name for name in layers if name not in usage)]
        layers = {name: layers[name] for name in order}
    return Survey(layers, {name: obstacle(layer) for name, layer in layers.items()}, usage, functions)
