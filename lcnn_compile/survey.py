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
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from lcnn_compile.batches import call_model
from lcnn_compile.config import LayerConfig
from lcnn_compile.errors import ConversionError
from lcnn_compile.geometry import Geometry
from lcnn_compile.modules import LookupModule

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION_FUNCTIONS = {
    getattr(F, name): name for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
}


@dataclass
class Usage:
    """How a layer runs in one call of the model, per sample: pixels written, pixels at which S is needed, multiply-adds.

    ``size`` is the (H, W) of the input, of the last call where there are several.
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


def obstacle(layer: nn.Module) -> str:
    """Why no lookup module can take the place of ``layer``; "" where one can."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"{type(layer).__name__} is not supported"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "lazy: its sizes are not known before it has run once"
    if parametrize.is_parametrized(layer) or not isinstance(weight, nn.Parameter):
        return "its weight is parametrised, not a parameter of its own"
    if isinstance(layer, nn.Conv2d):
        plain = type(layer).forward is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
    else:
        plain = type(layer).forward is nn.Linear.forward
    if not plain:
        return f"{type(layer).__name__} has a forward of its own"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if not weight.is_floating_point():
        return f"its weight has dtype {weight.dtype}; a floating-point one is required"
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels and layer.groups > 1:
        return "depthwise: one input channel per group leaves nothing to look up"
    return ""


def too_narrow(layer: nn.Module, config: LayerConfig) -> str:
    """Why a fractional dictionary makes no sense for ``layer``; "" where it does."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return ""
    channels, size = Geometry.of(layer).channels, config.dictionary_size
    if channels <= 3 and (size == "auto" or (isinstance(size, float) and size < 1)):
        return f"too few input channels ({channels}) for a smaller dictionary; give dictionary_size as an int to insist"
    return ""


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense convolution and linear layer of ``model`` by its first qualified name, ``model`` itself as ""."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LookupModule | nn.MultiheadAttention):
            # Attention reads the weights of its own projections without calling them.
            inside.append(f"{name}.")
        elif isinstance(module, (*CONVOLUTIONS, nn.Linear)) and not any(name.startswith(prefix) for prefix in inside):
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


def _usage(layer: nn.Module, input: Tensor, output: Tensor) -> Usage:
    """Pixels and multiply-adds per sample of one call."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        rows = output[..., 0].numel() // (input.shape[0] if input.dim() > 1 else 1)
        return Usage(rows, rows, rows * weight.numel())
    spatial = weight.dim() - 2
    pixels = {name: math.prod(tensor.shape[-spatial:]) for name, tensor in (("in", input), ("out", output))}
    macs = pixels["in" if getattr(layer, "transposed", False) else "out"] * weight.numel()
    if not isinstance(layer, nn.Conv2d):
        return Usage(pixels["out"], pixels["in"], macs)
    size = (input.shape[-2], input.shape[-1])
    needed = (s if k >= t else max(1, s // t) for s, k, t in zip(size, layer.kernel_size, layer.stride, strict=True))
    return Usage(pixels["out"], math.prod(needed), macs, size)


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
