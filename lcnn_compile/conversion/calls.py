"""Convolutions that a model calls as functions: on which weight, with which settings, and what else reads that weight."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lcnn_compile.conversion.fixed import attention_macs
from lcnn_compile.conversion.obstacles import DEPTHWISE, TRANSFORMED, obstacle
from lcnn_compile.modules import FunctionalWeight, LookupModule
from lcnn_compile.modules.calls import FUNCTIONS, Settings, arguments, has_module, make_conv, options, settings_of, whole
from lcnn_compile.modules.functional import CASTS, PLAIN_READS, name_of
from lcnn_compile.torch_private import inside_transform

MOST_CALLS = 8
"""Settings with which one weight may be called; more are as good as computed ones."""


@dataclass
class Called:
    """Calls of one convolution function on one weight with the same settings, or on computed weights in one module.

    Attributes:
        function: its name.
        where: the weight's qualified name, else that of the module that makes the call.
        reason: why they stay as they are; "" where a layer can take them.
        weight: the parameter.
        settings: of the calls.
        biases: what they pass as bias.
        macs: multiply-adds per sample of all of them.
    """

    function: str
    where: str
    reason: str
    weight: nn.Parameter | None = None
    settings: Settings | None = None
    biases: list[Tensor | None] = field(default_factory=list)
    macs: int = 0


class CallWatch(TorchFunctionMode):
    """While it is entered, records the calls of convolution functions outside of layers, and who reads parameters."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        super().__init__()
        self._model, self._layers = model, layers
        self._own = {id(layer): {id(p) for p in layer.parameters(recurse=False)} for layer in layers.values()}
        self._parameter_names = {id(p): (name, p) for name, p in model.named_parameters()}
        self._buffer_names = {id(b): name for name, b in model.named_buffers()}
        self._module_names: list[str] = [""]
        self._inside: list[nn.Module] = []
        self._calls: dict[Any, Called] = {}
        self._reads: dict[int, set[str]] = {}
        self._ran: set[int] = set()
        self.attention: dict[str, int] = {}
        """Multiply-adds per sample of ``scaled_dot_product_attention`` where models call it, by the module that does."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Enter, with hooks that know which module is running."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                stack.callback(module.register_forward_pre_hook(self._enter(name)).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            with self:
                yield

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._module_names.append(name)
            if id(module) in self._own or isinstance(module, LookupModule):
                self._inside.append(module)
                self._ran |= self._own.get(id(module), set())

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._module_names.pop()
        if self._inside and self._inside[-1] is module:
            self._inside.pop()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        layer = self._inside[-1] if self._inside else None
        if isinstance(layer, LookupModule):
            return result
        if func is torch.nn.functional.scaled_dot_product_attention:
            tensors = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))]
            name = self._module_names[-1]
            self.attention[name] = self.attention.get(name, 0) + attention_macs(*tensors)
        if func in FUNCTIONS:
            found = arguments(FUNCTIONS[func], args, kwargs)
            weight = found["weight"]
            if isinstance(weight, FunctionalWeight):
                return result
            # What a layer does with its own weight, or with one that it computes, is that layer's affair.
            if layer is None or (id(weight) in self._parameter_names and id(weight) not in self._own[id(layer)]):
                self._record(FUNCTIONS[func], found, result)
            args, kwargs = (found["input"],), {}
        own = set() if layer is None else self._own[id(layer)]
        for value in _flat((args, kwargs)):
            if id(value) in self._parameter_names and id(value) not in own:
                name = name_of(func)
                short = name.rpartition(".")[2]
                if short not in PLAIN_READS and not (short in CASTS and result is value):
                    self._reads.setdefault(id(value), set()).add(name)
        return result

    def _record(self, function: str, found: Mapping[str, Any], output: Any) -> None:
        weight = found["weight"]
        module = self._module_names[-1]
        name, parameter = self._parameter_names.get(id(weight), (self._buffer_names.get(id(weight), module), None))
        settings = settings_of(function, found)
        reason = _reason(settings, weight, parameter, id(weight) in self._buffer_names)
        if parameter is not None and not reason and _in_autograd_function():
            reason = f"{function} is called by a torch.autograd.Function, which may save its weight for the backward pass"
        if reason and parameter is not None:
            self._reads.setdefault(id(weight), set()).add(function)
        key = (function, name, reason) if reason else (id(weight), settings)
        call = self._calls.setdefault(key, Called(function, name, reason, None if reason else parameter, settings))
        if not any(bias is found["bias"] for bias in call.biases):
            call.biases.append(found["bias"])
        if isinstance(weight, Tensor) and isinstance(output, Tensor):
            measured = found["input"] if function.startswith("conv_transpose") else output
            call.macs += math.prod(measured.shape[-int(function[-2]) :]) * weight.numel()

    def calls(self) -> list[Called]:
        """What was seen, with all reasons."""
        found = list(self._calls.values())
        for call in found:
            if call.weight is None:
                continue
            same = [other for other in found if other.weight is call.weight]
            if id(call.weight) in self._ran:
                call.reason = "its weight is that of a layer, which is called too"
            elif readers := self._reads.get(id(call.weight)):
                call.reason = f"its weight is read by {', '.join(sorted(readers))} too"
            elif len(same) > MOST_CALLS:
                call.reason = f"its weight is called with {len(same)} different strides, paddings or dilations"
        return found

    def only_bias(self, call: Called) -> nn.Parameter | None:
        """The parameter that the calls pass as their bias, where nothing else reads it."""
        [bias, *others] = call.biases
        if others or id(bias) not in self._parameter_names or id(bias) in self._ran or id(bias) in self._reads:
            return None
        elsewhere = any(other is not call and any(b is bias for b in other.biases) for other in self._calls.values())
        return None if elsewhere else self._parameter_names[id(bias)][1]


def _in_autograd_function() -> bool:
    """Whether this runs inside of ``forward`` of a torch.autograd.Function."""
    classes, codes = [torch.autograd.Function], set()
    while classes:
        found = classes.pop()
        classes += found.__subclasses__()
        codes.add(getattr(found.forward, "__code__", None))
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _reason(settings: Settings, weight: Any, parameter: nn.Parameter | None, buffer: bool) -> str:
    """Why a layer cannot take a call; "" where one can."""
    function, groups = settings.function, settings.groups
    if not has_module(function):
        return f"{function} has no lookup form"
    if inside_transform():
        return f"{function} is called {TRANSFORMED}"
    if not all(whole(value) for value in settings[1:] if value != "same"):
        return f"{function} is called with strides, paddings or dilations that are computed"
    channels = weight.shape[0] if function.startswith("conv_transpose") else weight.shape[1] * groups
    if groups > 1 and groups == channels:
        return DEPTHWISE
    if buffer:
        return f"{function} is called on a buffer; only parameters are replaced"
    if parameter is None:
        return f"{function} is called on a weight that is computed at every call or comes from the data, not a parameter of the model"
    if nn.parameter.is_lazy(parameter):
        return "lazy: its sizes are not known before it has run once"
    return obstacle(make_conv(function, parameter, None, **options(settings)))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value
