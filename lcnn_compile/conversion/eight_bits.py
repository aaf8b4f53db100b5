"""The last step of a conversion to eight bits: dense convolutions become layers of bytes too, every such layer gets its ranges, and
those whose rounding costs too much are computed in more bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.batches import call_model
from lcnn_compile.config import LayerConfig, LookupConfig
from lcnn_compile.conversion.intercept import replace_layer
from lcnn_compile.conversion.plan import Plan, Rounding
from lcnn_compile.errors import ConversionError, LcnnWarning, WeightError
from lcnn_compile.fitting.fitted import FittedLayer
from lcnn_compile.fitting.ranges import Observer
from lcnn_compile.geometry import geometry_of
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.bytes_lowering import unpack_ranges
from lcnn_compile.kernels.quantized import Range
from lcnn_compile.kernels.rounding import quantize_lookup, snapped
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import LookupModule, lookup_layer, lookup_modules

SHARED = 8
"""Filters of a dense convolution that are computed together."""
LARGEST = 1 << 24
"""Elements of a dense weight that is put into bytes: its lookups take several times its memory until they are packed."""
SHARE = 0.25
"""Of a layer's error without rounding: so much more may rounding cost it where no error is asked for, and always ..."""
LEAST = 2e-3
"""... so much; eight bits of a value that fills its range cost a tenth of it."""
MEASURED = 8
"""Batches on which the cost of rounding is measured."""


def to_eight_bits(
    model: nn.Module, plan: Plan, fitted: Mapping[str, FittedLayer], config: LookupConfig, batches: Sequence[Any]
) -> tuple[nn.Module, dict[str, Rounding]]:
    """Bytes for the layers that may be so, where that is worth it.

    Args:
        model: what ``plan`` made of a network; changed in place where that is possible.
        plan: with the configuration of every lookup layer.
        fitted: its layers.
        config: of the network. Where its precision is "int8" or "auto", the convolutions that stayed dense may be of bytes too.
        batches: for ranges, and to measure what rounding costs; without any, "auto" is float32.

    Returns:
        The model, and what became of each layer.

    Raises:
        ConversionError: a layer is to be of bytes, and there are no batches.
    """
    if not config.takes_bytes or not (batches or "int8" in config.precisions):
        return model, {}
    layers = dict(lookup_modules(model))
    for name, settings in plan.configs.items():
        weight = layers[name].dictionary if name in layers else None
        if settings.precision == "auto" and weight is not None and weight.is_cpu and weight.dtype == torch.float32:
            layers[name].precision = "int8"
    dense: dict[str, nn.Module] = {}
    if config.precision in ("int8", "auto"):
        model, dense = take_dense(model, plan.excluded.__contains__)
    without = calibrate_ranges(model, batches, call_model, config.seed)
    if without:
        text = f'lcnn: {without} have no ranges (they never ran, or on values that are not finite, or their sums could leave 32 bits) and stay float32, not "int8"'
        warnings.warn(text, LcnnWarning, stacklevel=5)
    found: dict[str, Rounding] = {}
    costs = rounding_costs(model, batches[:MEASURED], call_model)
    layers = dict(lookup_modules(model))
    for name, cost in costs.items():
        error = None if name in dense or name not in fitted else fitted[name].error
        most = _allowed(plan.configs.get(name, config), error or 0.0)
        if cost["int8"] <= most:
            found[name] = Rounding("int8", cost["int8"], "")
            continue
        # Nothing is gained by bfloat16 where no instruction multiplies it.
        halves = cpu.multiplies_pairs() and name not in dense and cost["bfloat16"] <= most
        precision = "bfloat16" if halves else "float32"
        reason = f"{precision}: in eight bits rounding alone would cost {cost['int8']:.2g}, and {max(most, 0.0):.2g} is its share"
        found[name] = Rounding(precision, cost["bfloat16"] if halves else 0.0, reason)
        if name in dense:
            model = replace_layer(model, layers[name], dense[name])
        else:
            layers[name].precision = precision
            layers[name].set_ranges(None)
    for name, rounding in found.items():
        if rounding.precision == "int8":
            _snap(layers[name])
    for name in without:
        if name in dense:
            model = replace_layer(model, layers[name], dense[name])
        else:
            found[name] = Rounding("float32", 0.0, "float32: it has no range of bytes")
    return model, found


def _allowed(config: LayerConfig, error: float) -> float:
    """The error that rounding may add to that of a layer."""
    return max(LEAST, SHARE * error) if config.max_error is None else config.max_error - error


def rounding_costs(
    model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]
) -> dict[str, dict[str, float]]:
    """What "int8" and "bfloat16" cost each layer that has ranges: ‖y − ŷ‖² / ‖y − mean(y)‖² against itself in float32.

    The network runs in bytes, so that layers see what earlier ones make of their inputs.
    """
    layers = {name: layer for name, layer in lookup_modules(model) if layer.precision == "int8" and layer.ranges is not None}
    sums = {name: _Sums() for name in layers}
    hooks = [layer.register_forward_hook(partial(_compare, sums[name]), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.relative() for name, found in sums.items() if found.count}


class _Sums:
    """Sums over what a layer has put out, for each channel."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.wrong = dict.fromkeys(("int8", "bfloat16"), 0.0)

    def relative(self) -> dict[str, float]:
        """Each precision's error."""
        first, second = torch.as_tensor(self.first), torch.as_tensor(self.second)
        # A constant output has no deviation but what rounding leaves of one.
        deviation = float((second - first.square() / self.count).clamp(min=0).sum() + 1e-12 * second.sum())
        return {precision: wrong / max(deviation, 1e-30) for precision, wrong in self.wrong.items()}


def _compare(sums: _Sums, layer: LookupModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    made = {"int8": output}
    try:
        for precision in ("float32", "bfloat16"):
            layer.precision = precision
            made[precision] = layer.forward(*args, **kwargs)
    finally:
        layer.precision = "int8"
    y = made.pop("float32")
    channels = y.movedim(y.dim() - 1 - layer.geometry.dimensions, -1).flatten(0, -2).double()
    sums.count += len(channels)
    sums.first, sums.second = sums.first + channels.sum(0), sums.second + channels.square().sum(0)
    for precision, rounded in made.items():
        sums.wrong[precision] += float((rounded.double() - y.double()).square().sum())


def take_dense(model: nn.Module, left: Callable[[str], bool]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Put the 2-d convolutions and linear layers that stayed dense into bytes: lookups of their input itself, W as it is.

    Args:
        model: changed in place where that is possible.
        left: whether the layer of this name is to stay as it is.

    Returns:
        The model, and the layers that were replaced.
    """
    taken: dict[str, nn.Module] = {}
    for name, layer in list(model.named_modules()):
        if (
            type(layer) not in (nn.Conv2d, nn.Linear)
            or left(name)
            or not layer.weight.is_cpu
            or layer.weight.dtype != torch.float32
        ):
            continue
        if not 0 < layer.weight.numel() <= LARGEST:
            continue
        geometry = geometry_of(layer)
        weight = LookupWeight.lossless(geometry.weight(layer.weight.detach()), groups=geometry.groups, group_size=SHARED)
        bias = None if layer.bias is None else layer.bias.detach()
        model = replace_layer(model, layer, lookup_layer(weight, layer, bias, "lookup", "int8"))
        taken[name] = layer
    return model, taken


def calibrate_ranges(model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any], seed: int = 0) -> list[str]:
    """Give every layer of precision "int8" the ranges that it has on these batches, by least error.

    The network is run as it is, in floating point where a layer has no ranges yet.

    Args:
        model: a network with lookup layers; only their ranges change.
        batches: a few dozen inputs like those of deployment.
        call: runs the model on one of them.
        seed: of the values that are kept.

    Returns:
        The names of layers that have none, because they never ran or saw values that are not finite, or because their sums could leave 32
        bits: they compute in float32.

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
        if found is not None and not _fits(layer, found):
            found = None
        layer.set_ranges(found)
        if found is None:
            without.append(name)
    return without


def _snap(layer: LookupModule) -> None:
    """Make the layer's weight what its bytes stand for: a file holds the bytes, and gives back the same layer."""
    assert layer.ranges is not None
    x, limits = unpack_ranges(layer.ranges, layer.dictionary)
    tables = [getattr(layer, name) for name in ("indices", "positions", "offsets", "filters")]
    with torch.no_grad():
        dictionary, coefficients, limits = snapped(layer.dictionary.detach(), layer.coefficients.detach(), tables, x, limits)
        layer.dictionary.copy_(dictionary)
        layer.coefficients.copy_(coefficients)
    layer.set_ranges((x, limits))


def _fits(layer: LookupModule, found: tuple[Range, Tensor]) -> bool:
    """Whether the layer's sums stay within 32 bits."""
    weight = layer.lookup_weight()
    filters = int((weight.filters >= 0).sum())
    bias = layer.bias if layer.bias is not None and len(layer.bias) == filters else None  # transposed layers add theirs later
    try:
        quantize_lookup(list(weight.tensors().values()), weight.kernel_size, bias, found[0], None, found[1])
    except WeightError:
        return False
    return True


def _show(observer: Observer, layer: LookupModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    observer.see(layer.geometry.images(args[0] if args else kwargs["input"]))
