"""Operations by one name and one list of arguments, whatever form a graph calls them in."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lcnn_compile.passes.targets import bound
from lcnn_compile.torch_private import NATIVE_FUNCTIONS, OpOverload

REQUIRED = object()
_X = {"input": REQUIRED}
_PAIR = {**_X, "other": REQUIRED}
_AFFINE = {"weight": None, "bias": None}
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
    "cat": {"tensors": REQUIRED, "dim": 0},
    "stack": {"tensors": REQUIRED, "dim": 0},
    "narrow": {**_X, "dim": REQUIRED, "start": REQUIRED, "length": REQUIRED},
    "select": {**_X, "dim": REQUIRED, "index": REQUIRED},
    "permute": {**_X, "dims": REQUIRED},
    "transpose": {**_X, "dim0": REQUIRED, "dim1": REQUIRED},
    "movedim": {**_X, "source": REQUIRED, "destination": REQUIRED},
    "expand": {**_X, "size": REQUIRED},
    "expand_as": _PAIR,
    "flip": {**_X, "dims": REQUIRED},
    "pixel_shuffle": {**_X, "upscale_factor": REQUIRED},
    "pixel_unshuffle": {**_X, "downscale_factor": REQUIRED},
    "channel_shuffle": {**_X, "groups": REQUIRED},
    "clone": {**_X, "memory_format": None},
    "pad": {**_X, "pad": REQUIRED, "mode": "constant", "value": None},
    "interpolate": {**_X, "size": None, "scale_factor": None, "mode": "nearest", "align_corners": None},
    **{
        name: {**_X, "padding": REQUIRED}
        for name in ("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
    },
    "constant_pad_nd": {**_X, "pad": REQUIRED, "value": 0},
    **{
        f"upsample_{kind}": {**_X, "output_size": None}
        for kind in ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d")
    },
    "glu": {**_X, "dim": -1},
    **{name: {**_X, "dim": REQUIRED, "keepdim": False, "dtype": None} for name in ("mean", "sum")},
    **{name: {**_X, "dim": REQUIRED, "keepdim": False} for name in ("amax", "amin")},
    **{name: {**_X, "dim": REQUIRED, "unbiased": True, "keepdim": False, "correction": None} for name in ("var", "std")},
    "linalg_vector_norm": {**_X, "ord": 2, "dim": None, "keepdim": False, "dtype": None},
    "normalize": {**_X, "p": 2.0, "dim": 1, "eps": 1e-12, "out": None},
    **{name: {**_X, "dim": None, "dtype": None} for name in ("softmax", "log_softmax")},
    "layer_norm": {**_X, "normalized_shape": REQUIRED, **_AFFINE, "eps": 1e-5},
    "group_norm": {**_X, "num_groups": REQUIRED, **_AFFINE, "eps": 1e-5},
    "instance_norm": {
        **_X,
        "running_mean": None,
        "running_var": None,
        **_AFFINE,
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
    },
    "slice": {**_X, "dim": 0, "start": None, "end": None, "step": 1},
}
_SPLIT = {"split": "split_size_or_sections", "chunk": "chunks", "tensor_split": "indices_or_sections"}
SIGNATURES |= {name: {**_X, key: REQUIRED, "dim": 0} for name, key in _SPLIT.items()} | {"unbind": {**_X, "dim": 0}}
PARTS = frozenset((*_SPLIT, "unbind"))
"""Operations that return parts of their input in a row."""
VARIADIC = {"permute": "dims", "expand": "size", "flip": "dims"}
"""Methods that take a list as several arguments too."""
"""Arguments of Python's functions and methods, and what they are where they are left out; an operator of ATen has its schema."""
_OTHER_NAMES = {
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "negative": "neg"},
    **{"absolute": "abs", "clip": "clamp", "logsigmoid": "logsigmoid", "log_sigmoid": "logsigmoid"},
    **{"__add__": "add", "__sub__": "sub", "__mul__": "mul", "__truediv__": "div", "__neg__": "neg", "__pow__": "pow"},
    **{
        "concat": "cat",
        "concatenate": "cat",
        "swapaxes": "transpose",
        "swapdims": "transpose",
        "moveaxis": "movedim",
        "split_with_sizes": "split",
    },
    **{"__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub"},
}


def _targets() -> dict[Any, str]:
    found: dict[Any, str] = {}
    names = {name: name for name in SIGNATURES} | _OTHER_NAMES
    for spelled, name in names.items():
        for holder in (F, torch, NATIVE_FUNCTIONS, operator):
            target = getattr(holder, spelled, None)
            if callable(target) and target is not slice:
                found[target] = name
        if spelled not in ("slice", "cat", "stack"):
            found[spelled] = name
        packet = getattr(torch.ops.aten, spelled, None)
        if packet is not None and not spelled.startswith("__"):
            found |= {getattr(packet, overload): name for overload in packet.overloads()}
    found[torch.ops.aten.log_sigmoid.default] = "logsigmoid"
    return found


_BY_TARGET = _targets()


def operation_of(node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """The name and the arguments, those left out too, of a call of an operation in the tables; None for others."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = _BY_TARGET.get(node.target)
    if name is None:
        return None
    if isinstance(node.target, OpOverload):
        return name, _of_schema(node)
    if inspect.isfunction(node.target) and node.target.__module__ == F.__name__:
        try:
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        except TypeError:
            return None
        given.apply_defaults()
        return name, dict(given.arguments)
    if node.target is torch.instance_norm:
        return None  # its arguments have another order
    known, args = SIGNATURES[name], node.args
    if name in VARIADIC and len(args) > 1 and not isinstance(args[1], list | tuple):
        return (name, {"input": args[0], VARIADIC[name]: list(args[1:])}) if not node.kwargs else None
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


def part_sizes(name: str, arguments: dict[str, Any], size: int) -> list[int] | None:
    """The sizes of the parts that an operation of ``PARTS`` cuts a dimension of ``size`` into; None where they are not known."""
    if name == "unbind":
        return [1] * size
    how = next((value for key, value in arguments.items() if key not in ("input", "dim")), None)
    if isinstance(how, list | tuple):
        if not all(isinstance(value, int) for value in how):
            return None
        if name == "split":
            return list(how)
        ends = [min(max(0, value), size) if value >= 0 else max(0, size + value) for value in (*how, size)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)] if ends == sorted(ends) else None
    if not isinstance(how, int) or how < 1:
        return None
    if name == "tensor_split":
        return [size // how + (i < size % how) for i in range(how)]
    length = how if name == "split" else -(-size // how)
    return [min(length, size - start) for start in range(0, size, length)] if length else None
