"""Convolutions called as functions become layers where they stand: a FunctionalWeight takes the place of the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.conversion.calls import Called
from lcnn_compile.conversion.survey import Survey
from lcnn_compile.errors import ConversionError
from lcnn_compile.modules import FunctionalWeight, LookupModule, replace_module
from lcnn_compile.modules.calls import make_conv, options
from lcnn_compile.torch_private import children_of, pytree, tensors_of

Orders = dict[str, list[str]]
"""Qualified names of modules -> the names of their parameters, in the order that they had."""


def put_weight(model: nn.Module, parameter: Tensor, weight: nn.Module) -> None:
    """Put ``weight`` wherever ``parameter`` hangs in ``model``."""
    for module in list(model.modules()):
        if isinstance(module, FunctionalWeight) or module in weight.modules():
            continue
        for kept in tensors_of(module):
            for name in [name for name, value in kept.items() if value is parameter]:
                del kept[name]
                children_of(module)[name] = weight


def settle(model: nn.Module, orders: Orders, only: Sequence[FunctionalWeight] | None = None) -> nn.Module:
    """Take out again every FunctionalWeight of ``model``, or of ``only`` these, none of whose layers became a lookup layer."""
    for path, module in list(model.named_modules()):
        children = children_of(module)
        for name, child in list(children.items()):
            if not isinstance(child, FunctionalWeight) or (only is not None and child not in only):
                continue
            if any(isinstance(layer, LookupModule) for layer in child.children()):
                continue
            del children[name]
            parameters = tensors_of(module)[0]
            parameters[name] = child.dense()  # type: ignore[assignment]
            order = orders.get(path, [])
            ordered = {key: parameters[key] for key in order if key in parameters}
            ordered.update(parameters)
            parameters.clear()
            parameters.update(ordered)
    return model


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """As :func:`replace_module`; the bias that calls of a function pass becomes the new layer's."""
    owners = [m for m in model.modules() if isinstance(m, FunctionalWeight) and any(child is old for child in m.children())]
    for owner in owners:
        if any(getattr(owner, name) is old for name in owner.biased):
            for module in model.modules():
                parameters = tensors_of(module)[0]
                for name in [name for name, value in parameters.items() if value is old.bias]:
                    parameters[name] = new.bias  # type: ignore[assignment]
    return replace_module(model, old, new)


@dataclass
class Intercepted:
    """What the model is with the calls taken over, and why others are not.

    Attributes:
        survey: of the model as it is now.
        left: the calls that stay, with their reasons.
        orders: see :func:`settle`.
    """

    survey: Survey
    left: list[Called]
    orders: Orders


def intercept(model: nn.Module, before: Survey, look: Callable[[], Survey]) -> Intercepted:
    """Let dense layers take the calls that ``before`` found, wherever the model then still computes what it did.

    ``look`` surveys the model again.
    """
    orders = {name: list(tensors_of(module)[0]) for name, module in model.named_modules()}
    groups: dict[int, list[Called]] = {}
    for call in before.calls:
        if not call.reason:
            groups.setdefault(id(call.weight), []).append(call)
    found = _Attempt(model, before, look, orders)
    survey = before
    if groups:
        tried, why = found.take(list(groups.values()), before)
        if tried is not None:
            survey = tried
        for calls in groups.values() if why else ():
            tried, reason = found.take([calls], survey)
            if tried is not None:
                survey = tried
            for call in calls:
                call.reason = reason
    return Intercepted(survey, [call for call in before.calls if call.reason], orders)


class _Attempt:
    def __init__(self, model: nn.Module, before: Survey, look: Callable[[], Survey], orders: Orders):
        self._model, self._before, self._look, self._orders = model, before, look, orders

    def take(self, groups: Sequence[Sequence[Called]], now: Survey) -> tuple[Survey | None, str]:
        """The survey with these calls taken, or None and the reason why they cannot be."""
        made: list[FunctionalWeight] = []
        try:
            for calls in groups:
                made.append(self._install(calls))
            survey = self._look()
            reason = self._changed(survey, groups)
        except ConversionError as error:
            survey, reason = now, f"the model fails where its weight is a layer ({error.__cause__ or error})"
        if reason:
            settle(self._model, self._orders, made)
            return None, reason
        return survey, ""

    def _install(self, calls: Sequence[Called]) -> FunctionalWeight:
        parameter = calls[0].weight
        assert parameter is not None
        holders = [m for m in self._model.modules() if any(v is parameter for v in tensors_of(m)[0].values())]
        if any(isinstance(module, torch.jit.ScriptModule) for module in holders):
            raise ConversionError("it belongs to a scripted module")
        weight = FunctionalWeight(parameter.shape)
        for call in calls:
            assert call.settings is not None
            bias = self._before.only_bias(call)
            layer = make_conv(call.function, parameter, bias, **options(call.settings))
            weight.add(call.settings, layer.train(holders[0].training), biased=bias is not None)
        put_weight(self._model, parameter, weight.train(holders[0].training))
        return weight

    def _changed(self, survey: Survey, groups: Sequence[Sequence[Called]]) -> str:
        """What is different now, "" where nothing is."""
        taken = {id(calls[0].weight) for calls in groups}
        if any(id(call.weight) in taken for call in survey.calls):
            return "its weight is reached in other ways than as an attribute of a module"
        if not _alike(self._before.outputs, survey.outputs):
            return "the model returns something else where its weight is a layer"
        return ""


def _alike(a: Any, b: Any) -> bool:
    """Whether two results agree up to rounding; what is no tensor is not compared."""
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    if len(left) != len(right):
        return False
    for x, y in zip(left, right, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return False
        if isinstance(x, Tensor) and (x.shape != y.shape or x.dtype != y.dtype or not _close(x, y)):
            return False
    return True


def _close(x: Tensor, y: Tensor) -> bool:
    if x.is_quantized or x.layout is not torch.strided:
        return True
    size = float(x.abs().max()) if x.numel() and x.is_floating_point() else 0.0
    return torch.allclose(x, y, rtol=1e-3, atol=1e-3 * size if size < float("inf") else 0.0, equal_nan=True)


def outer_names(model: nn.Module) -> Mapping[int, str]:
    """Qualified names of the parameters of ``model`` outside of any FunctionalWeight, by identity."""
    inside = {id(m) for weight in model.modules() if isinstance(weight, FunctionalWeight) for m in weight.modules()}
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        if id(module) not in inside:
            for name, value in tensors_of(module)[0].items():
                found.setdefault(id(value), f"{path}.{name}" if path else name)
    return found
