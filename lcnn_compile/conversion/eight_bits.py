"""The last step of a conversion to eight bits: dense convolutions become layers of bytes too, and every such layer gets its ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from lcnn_compile.conversion.intercept import replace_layer
from lcnn_compile.errors import ConversionError
from lcnn_compile.fitting.ranges import Observer
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import LookupModule, lookup_layer, lookup_modules

SHARED = 8
"""Filters of a dense convolution that are computed together."""


def take_dense(model: nn.Module, left: Callable[[str], bool]) -> nn.Module:
    """Put the 2-d convolutions that stayed dense into bytes: lookups of their input itself, W as it is.

    Args:
        model: changed in place where that is possible.
        left: whether the layer of this name is to stay as it is.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Conv2d or left(name) or not layer.weight.is_cpu or layer.weight.dtype != torch.float32:
            continue
        weight = LookupWeight.lossless(layer.weight.detach(), groups=layer.groups, group_size=SHARED)
        bias = None if layer.bias is None else layer.bias.detach()
        model = replace_layer(model, layer, lookup_layer(weight, layer, bias, "lookup", "int8"))
    return model


def calibrate_ranges(model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any], seed: int = 0) -> list[str]:
    """Give every layer of precision "int8" the ranges that it has on these batches, by least error.

    The network is run as it is, in floating point where a layer has no ranges yet.

    Args:
        model: a network with lookup layers; only their ranges change.
        batches: a few dozen inputs like those of deployment.
        call: runs the model on one of them.
        seed: of the values that are kept.

    Returns:
        The names of layers that have none, because they never ran or saw values that are not finite: they compute in float32.

    Raises:
        ConversionError: there are no batches.
    """
    layers = {name: module for name, module in lookup_modules(model) if module.precision == "int8"}
    observers = {name: Observer(layer.dictionary, seed) for name, layer in layers.items()}
    hooks = []
    for name, layer in layers.items():
        layer.set_ranges(None)
        hooks.append(layer.register_forward_hook(partial(_show, observers[name]), with_kwargs=True))
    seen = False
    try:
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
                seen = True
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ConversionError('precision "int8" needs calibration batches: ranges are taken from them')
    without = []
    for name, layer in layers.items():
        found = observers[name].found()
        layer.set_ranges(found)
        if found is None:
            without.append(name)
    return without


def _show(observer: Observer, layer: LookupModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    observer.see(layer.geometry.images(args[0] if args else kwargs["input"]))
