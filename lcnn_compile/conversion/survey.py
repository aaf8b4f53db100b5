"""What convolutions and linear layers a model has, how often and on what sizes they run, and which could be replaced."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.batches import call_model
from lcnn_compile.conversion.calls import Called, CallWatch
from lcnn_compile.conversion.fixed import ATTENTION, Fixed, fixed, fixed_layers, fixed_macs
from lcnn_compile.conversion.obstacles import TRANSFORMED, is_quantised, obstacle, weight_of
from lcnn_compile.conversion.untouched import untouched
from lcnn_compile.errors import ConversionError
from lcnn_compile.geometry import geometry_of, kind_of
from lcnn_compile.modules import FunctionalWeight, LookupModule
from lcnn_compile.torch_private import inside_transform

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
        calls: convolutions called as functions on the example inputs.
        only_bias: the bias that a call alone reads, if it has one; see :meth:`~lcnn_compile.conversion.calls.CallWatch.only_bias`.
        outputs: what the model returned.
        fixed: recurrent layers and attention, which are counted and stay.
    """

    layers: dict[str, nn.Module]
    reasons: dict[str, str]
    usage: dict[str, Usage] = field(default_factory=dict)
    calls: list[Called] = field(default_factory=list)
    only_bias: Callable[[Called], nn.Parameter | None] = lambda call: None
    outputs: Any = None
    fixed: dict[str, Fixed] = field(default_factory=dict)


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
        elif isinstance(getattr(module, "weight", None), FunctionalWeight):
            continue  # It only keeps a weight; the layers in that stand for it.
        elif isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            found[name] = module
    return found


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
    transformed: set[str] = set()
    watch = CallWatch(model, layers)
    staying = fixed_layers(model)
    counted = {name: fixed(layer) for name, layer in staying.items()}
    outputs: Any = None
    if batch is not None:
        names = {id(layer): name for name, layer in layers.items()}

        def record(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            input = args[0] if args else kwargs.get("input")
            if inside_transform():
                transformed.add(names[id(layer)])
            if isinstance(input, Tensor) and isinstance(output, Tensor):
                seen, new = usage.setdefault(names[id(layer)], Usage()), _usage(layer, input, output)
                seen.out_pixels += new.out_pixels
                seen.in_pixels += new.in_pixels
                seen.macs += new.macs
                seen.size = new.size

        def count(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                counted[name].macs = (counted[name].macs or 0) + fixed_macs(layer, args, kwargs)

            return hook

        with ExitStack() as stack:
            stack.enter_context(untouched(model))
            for layer in layers.values():
                stack.callback(layer.register_forward_hook(record, with_kwargs=True).remove)
            for name, layer in staying.items():
                stack.callback(layer.register_forward_hook(count(name), with_kwargs=True).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(watch.watching())
            try:
                outputs = call_model(model, batch)
            except Exception as error:
                raise ConversionError(f"the model fails on the example inputs: {type(error).__name__}: {error}") from error
        order = [*usage, *(name for name in layers if name not in usage)]
        layers = {name: layers[name] for name in order}
    reasons = {
        name: obstacle(layer) or (f"called {TRANSFORMED}" if name in transformed else "") for name, layer in layers.items()
    }
    for name, macs in watch.attention.items():
        if name not in counted:  # attention of PyTorch's own has been counted with its projections
            function = "scaled_dot_product_attention"
            counted[f"{name}.{function}" if name else function] = Fixed(function, ATTENTION, 0, macs)
    return Survey(layers, reasons, usage, watch.calls(), watch.only_bias, outputs, counted)
