"""Convolutions called as functions, in files: which parameters are FunctionalWeights, and files in which they were modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from lcnn_compile.conversion.intercept import outer_names, put_weight
from lcnn_compile.errors import CheckpointError
from lcnn_compile.modules import FunctionalWeight
from lcnn_compile.modules.calls import FUNCTIONS, Settings, has_module, make_conv, options
from lcnn_compile.passes.lift import lift_functional_convolutions
from lcnn_compile.torch_private import children_of, tensors_of

Calls = list[tuple[str, dict[str, dict[str, Any]]]]
"""Qualified name of a FunctionalWeight, and for each layer in it by name the settings of its calls, and their bias."""

_CHILD = re.compile(r"conv(_transpose)?[123]d(_[0-9]{1,6})?")
_NUMBERS = ("stride", "padding", "output_padding", "dilation")


def describe_calls(model: nn.Module) -> Calls:
    """What a file says about the FunctionalWeights of ``model``."""
    names, found = outer_names(model), Calls()
    for path, weight in model.named_modules():
        if isinstance(weight, FunctionalWeight):
            layers = {}
            for name, settings in weight.calls.items():
                biased = name in weight.biased
                bias = names.get(id(weight.get_submodule(name).bias)) if biased else None
                layers[name] = {**settings._asdict(), "biased": biased, "bias": bias}
            found.append((path, layers))
    return found


def are_calls(value: object) -> bool:
    """Whether ``value``, of a file, has the form that :func:`describe_calls` gives."""
    if not isinstance(value, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in value):
        return False
    if not all(isinstance(path, str) and isinstance(layers, dict) and layers for path, layers in value):
        return False
    return all(_CHILD.fullmatch(name) and _is_call(told) for _, layers in value for name, told in layers.items())


def _is_call(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {*Settings._fields, "biased", "bias"}:
        return False
    function = value["function"]
    if function not in FUNCTIONS.values() or not has_module(function) or not _is_number(value["groups"]):
        return False
    for name in _NUMBERS:
        numbers = value[name]
        if name == "padding" and numbers == "same":
            continue
        if not isinstance(numbers, list) or len(numbers) != int(function[-2]) or not all(map(_is_number, numbers)):
            return False
    return isinstance(value["biased"], bool) and isinstance(value["bias"], str | None)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def put_calls(model: nn.Module, calls: Calls) -> None:
    """Put dense FunctionalWeights where the file has them.

    Raises:
        CheckpointError: for a parameter that the model does not have, or that settings do not fit.
    """
    for path, layers in calls:
        owner, _, name = path.rpartition(".")
        parameter = _parameter(model, owner, name)
        weight = FunctionalWeight(parameter.shape)
        for child, told in layers.items():
            settings = _settings(told)
            bias = None
            if told["biased"]:
                where, _, key = (told["bias"] or "").rpartition(".")
                # One that is no parameter of the model's any more is the layer's own.
                channels = parameter.shape[1] * settings.groups if "transpose" in settings.function else parameter.shape[0]
                bias = _parameter(model, where, key) if key else nn.Parameter(parameter.new_zeros(channels))
            try:
                layer = make_conv(settings.function, parameter, bias, **options(settings))
            except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
                raise CheckpointError(f"{path}: the model's parameter does not fit the file: {error}") from error
            if weight.add(settings, layer.train(model.training), biased=told["biased"]) != child:
                raise CheckpointError(f"{path}: the file has a layer {child!r} out of order")
        put_weight(model, parameter, weight.train(model.training))


def _settings(told: Mapping[str, Any]) -> Settings:
    return Settings._make(tuple(value) if isinstance(value := told[name], list) else value for name in Settings._fields)


def _parameter(model: nn.Module, owner: str, name: str) -> nn.Parameter:
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise CheckpointError(f"the model has no {owner!r}, whose parameter {name!r} the file replaces") from None
    found: Any = tensors_of(module)[0].get(name, children_of(module).get(name))
    if isinstance(found, FunctionalWeight):
        dense = nn.Parameter(found.dense().detach())
        for parent in model.modules():
            children = children_of(parent)
            for key in [key for key, child in children.items() if child is found]:
                del children[key]
                parent.register_parameter(key, dense)
        return dense
    if not isinstance(found, nn.Parameter):
        raise CheckpointError(f"the model has no parameter {f'{owner}.{name}'.lstrip('.')!r}, which the file replaces")
    return found


def adapt_lifted(
    model: nn.Module, missing: list[str], layers: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Layers and tensors of a file of version 0.1 under the names that they have in ``model``, whose weights are put in.

    That version traced models that call convolutions as functions, and made modules of these calls.

    Raises:
        CheckpointError: where the model cannot be traced, or has no such calls.
    """
    private = copy.deepcopy(model)
    names = {id(p): name for name, p in private.named_parameters()}
    try:
        lifted = lift_functional_convolutions(fx.symbolic_trace(private))
        convolutions: dict[str, Any] = {name: lifted.get_submodule(name) for name in missing}
    except Exception as error:
        # Tracing runs the user's code on proxies, which may raise anything.
        raise CheckpointError(f"the model has no layers {missing}, nor can torch.fx find them in it: {error}") from error
    strange = [name for name, conv in convolutions.items() if id(getattr(conv, "weight", None)) not in names]
    if strange:
        raise CheckpointError(f"the model has no layers {strange}, which the file replaces")
    calls: dict[str, dict[str, Any]] = {}
    renamed: dict[str, str] = {}
    biases = [id(conv.bias) for conv in convolutions.values()]
    state = dict(state)
    for name, conv in convolutions.items():
        function = f"conv{'_transpose' if conv.transposed else ''}{conv.weight.dim() - 2}d"
        padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
        told = {"function": function, "padding": padding, "groups": conv.groups, "bias": names.get(id(conv.bias))}
        told |= {key: list(getattr(conv, key)) for key in ("stride", "output_padding", "dilation")}
        if padding == "valid":
            told["padding"] = [0] * len(told["stride"])
        bias = told["bias"]
        told["biased"] = bias is not None and biases.count(id(conv.bias)) == 1 and bias not in state
        kept = calls.setdefault(names[id(conv.weight)], {})
        child = function if function not in kept else f"{function}_{sum(c.startswith(function) for c in kept)}"
        kept[child] = told
        renamed[name] = f"{names[id(conv.weight)]}.{child}"
        if told["biased"]:
            state[bias] = state[f"{name}.bias"]
        elif bias is not None and f"{name}.bias" in state:
            # The calls add a bias that others read too, so the layer keeps the difference.
            own = state.get(bias, dict(model.named_parameters())[bias].detach())
            state[f"{name}.bias"] = state[f"{name}.bias"] - own.to(state[f"{name}.bias"])
    put_calls(model, list(calls.items()))

    def rename(key: str) -> str:
        owner, _, last = key.rpartition(".")
        return f"{renamed[owner]}.{last}" if owner in renamed else key

    return {renamed.get(name, name): told for name, told in layers.items()}, {rename(k): v for k, v in state.items()}
