"""What keeps code that re-arranges dense layers from silently missing a lookup layer: parametrizations, pruning, initialisation."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.modules.weight import refuse_write


class Parameters(dict[str, Any]):
    """The parameters of a lookup module, where weight norm, spectral norm, pruning and parametrizations look for its weight."""

    label = "lookup layer"

    def __missing__(self, name: str) -> Any:
        if name == "weight":
            raise refuse_write(self.label, _caller())
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name == "weight":
            raise refuse_write(self.label, _caller())
        super().__delitem__(name)

    def __contains__(self, name: object) -> bool:
        if name == "weight" and _caller().startswith("torch.nn.utils"):
            raise refuse_write(self.label, _caller())
        return super().__contains__(name)


def _caller() -> str:
    return str(sys._getframe(2).f_globals.get("__name__", "code"))


def check_initialiser(function: Callable[..., Any], layer: Any) -> None:
    """Raise WeightError where ``function``, which ``Module.apply`` gave ``layer`` to, would change the weight of the dense layer.

    Functions that initialise weights mostly ask ``isinstance(module, nn.Conv2d)``, which a lookup layer is not. Only functions whose
    code speaks of weights are tried, on a dense layer that is thrown away.
    """
    if not any("weight" in names for names in _names(function)):
        return
    dense = layer.to_dense()
    before = {name: value.detach().clone() for name, value in dense.named_parameters()}
    devices = [dense.weight.device] if dense.weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        function(dense)
    after = dict(dense.named_parameters())
    if "weight" not in after or not _same(before["weight"], after["weight"]):
        raise refuse_write(layer.label, f"apply({getattr(function, '__name__', type(function).__name__)})")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.device.type == "meta" or torch.equal(a, b))


def _names(function: Any, depth: int = 3) -> Iterator[tuple[str, ...]]:
    """The names that a function's code uses, and those of functions of the same program that it calls."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__"):
        function = vars(type(function)).get("__call__")
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return
    codes = [code]
    for found in codes:
        yield found.co_names
        codes += [constant for constant in found.co_consts if isinstance(constant, CodeType)]
    if depth:
        near = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=False))
        for name in (*code.co_names, *code.co_freevars):
            called = near.get(name, function.__globals__.get(name))
            if (
                callable(called)
                and not isinstance(called, type)
                and not str(getattr(called, "__module__", "")).startswith("torch")
            ):
                yield from _names(called, depth - 1)
