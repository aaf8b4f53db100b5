"""Operations by one name and one list of arguments, whatever form a graph calls them in."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lcnn_compile.passes.targets import bound
from lcnn_compile.torch_private import OpOverload

REQUIRED = object()
_X = {"input": REQUIRED}
_PAIR = {**_X, "other": REQUIRED}
_ACTIVATION = {**_X, "inplace": False}
SIGNATURES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "sigmoid", "tanh"), _X),
    **dict.fromkeys(("logsigmoid", "softsign"), _X),
    **dict.fromkeys(("relu", "relu6", "silu", "hardswish", "hardsigmoid", "mish", "selu"), _ACTIVATION),
    **{name: {**_PAIR, "alpha": 1} for name in ("add", "sub", "rsub")},
    **dict.fromkeys(("mul", "maximum", "minimum"), _PAIR),
    "prelu": {**_X, "weight": REQUIRED},
    "div": {**_PAIR, "rounding_mode": None},
    "pow": {**_X, "exponent": REQUIRED},
    "leaky_relu": {**_X, "negative_slope": 0.01, "inplace": False},
    "elu": {**_X, "alpha": 1.0, "inplace": False},
    "celu": {**_X, "alpha": 1.0, "inplace": False},
    "gelu": {**_X, "approximate": "none"},
    "hardtanh": {**_X, "min_val": -1.0, "max_val": 1.0, "inplace": False},
    "clamp": {**_X, "min": None, "max": None},
    "clamp_min": {**_X, "min": REQUIRED},
    "clamp_max": {**_X, "max": REQUIRED},
    "softplus": {**_X, "beta": 1, "threshold": 20},
}
"""Arguments of Python's functions and methods, and what they are where they are left out; an operator of ATen has its schema."""
_OTHER_NAMES = {
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "negative": "neg"},
    **{"absolute": "abs", "clip": "clamp", "logsigmoid": "logsigmoid", "log_sigmoid": "logsigmoid"},
    **{"__add__": "add", "__sub__": "sub", "__mul__": "mul", "__truediv__": "div", "__neg__": "neg", "__pow__": "pow"},
    **{"__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub"},
}


def _targets() -> dict[Any, str]:
    found: dict[Any, str] = {}
    names = {name: name for name in SIGNATURES} | _OTHER_NAMES
    for spelled, name in names.items():
        for holder in (F, torch, torch._C._nn, operator):
            target = getattr(holder, spelled, None)
            if callable(target):
                found[target] = name
        found[spelled] = name
        packet = getattr(torch.ops.aten, spelled, None)
        if packet is not None and not spelled.startswith("__"):
            found |= {getattr(packet, overload): name for overload in packet.overloads()}
    found[torch.ops.aten.log_sigmoid.default] = "logsigmoid"
    return found


_BY_TARGET = _targets()


def operation_of(node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """The name and the arguments, those left out too, of a call that computes something element by element; None for others."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = _BY_TARGET.get(node.target)
    if name is None:
        return None
    if isinstance(node.target, OpOverload):
        return name, _of_schema(node)
    known = SIGNATURES[name]
    if len(node.args) > len(known) or not node.kwargs.keys() <= known.keys():
        return None
    arguments = dict(zip(known, bound(node, tuple(known), tuple(known.values())), strict=True))
    return None if any(value is REQUIRED for value in arguments.values()) else (name, arguments)


def _of_schema(node: fx.Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found["input" if argument.name == "self" else argument.name] = value
    return found
