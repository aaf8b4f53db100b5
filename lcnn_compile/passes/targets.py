"""The call targets by which the same operation appears in graphs of symbolic tracing, Dynamo and torch.export."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lcnn_compile.torch_private import known_size

aten = torch.ops.aten

CONV2D = (F.conv2d, torch.conv2d, aten.conv2d.default, aten.conv2d.padding)
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "conv1d": (F.conv1d, torch.conv1d, aten.conv1d.default, aten.conv1d.padding),
    "conv2d": CONV2D,
    "conv3d": (F.conv3d, torch.conv3d, aten.conv3d.default, aten.conv3d.padding),
    "conv_transpose1d": (F.conv_transpose1d, torch.conv_transpose1d, aten.conv_transpose1d.default),
    "conv_transpose2d": (F.conv_transpose2d, torch.conv_transpose2d, aten.conv_transpose2d.input),
}
"""The convolutions that have a lookup form, by the name of the function."""
CONVOLUTION = (torch.convolution, aten.convolution.default)
LINEAR = (F.linear, aten.linear.default)
BATCH_NORM = (F.batch_norm, torch.batch_norm, aten.batch_norm.default)
MULTIPLY = (torch.mul, operator.mul, aten.mul.Tensor, aten.mul.Scalar, "mul")
DIVIDE = (torch.div, operator.truediv, aten.div.Tensor, aten.div.Scalar, "div")
ADD = (torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor, "add", "add_")
ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "relu": (F.relu, F.relu_, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default, "relu", "relu_"),
    "relu6": (F.relu6, aten.relu6.default),
    "silu": (F.silu, aten.silu.default, aten.silu_.default),
    "hardswish": (F.hardswish, aten.hardswish.default, aten.hardswish_.default),
}
RESHAPES = (
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze),
    *(
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unflatten.int,
    ),
)
CLAMP = (F.hardtanh, torch.clamp, aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default, "clamp", "clamp_")


def bound(node: fx.Node, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """The node's arguments by position or name, in the order of ``names``, with ``defaults`` for those left out."""
    values = list(node.args) + [None] * (len(names) - len(node.args))
    for i, (name, default) in enumerate(zip(names, defaults, strict=True)):
        if i >= len(node.args):
            values[i] = node.kwargs.get(name, default)
    return values


def convolution_of(node: fx.Node) -> str | None:
    """The name of the function that a node calls, where it is a convolution that has a lookup form; None otherwise."""
    if node.op != "call_function":
        return None
    return next((name for name, targets in CONVOLUTIONS.items() if node.target in targets), None)


def activation_of(node: fx.Node) -> str | None:
    """The epilogue name of an activation node, None for anything else."""
    if node.op not in ("call_function", "call_method"):
        return None
    for name, targets in ACTIVATIONS.items():
        if node.target in targets:
            return name
    if node.target in CLAMP:
        _, low, high, _ = bound(node, ("input", "min", "max", "inplace"), (None, None, None, False))
        if "min_val" in node.kwargs or "max_val" in node.kwargs or node.target is F.hardtanh:
            _, low, high, _ = bound(node, ("input", "min_val", "max_val", "inplace"), (None, -1.0, 1.0, False))
        if low == 0 and high == 6:
            return "relu6"
        if low == 0 and high is None:
            return "relu"
    return None


WRITTEN = "lcnn_written"
"""The mark of a get_attr node whose attribute the graph writes (see :func:`to_functional`): it is no constant."""


def is_get_attr(value: object) -> bool:
    """Whether an argument is a node that reads an attribute of the module, one that the graph does not write."""
    return isinstance(value, fx.Node) and value.op == "get_attr" and not value.meta.get(WRITTEN, False)


def attribute(module: torch.nn.Module, path: object) -> Any:
    """The attribute that a get_attr node's target names."""
    value: Any = module
    for part in str(path).split("."):
        value = getattr(value, part)
    return value


def example(node: fx.Node) -> torch.Tensor | None:
    """The example (or fake) tensor that tracing left on a node; None where there is none."""
    for key in ("example_value", "val"):
        if isinstance(node.meta.get(key), torch.Tensor):
            value: torch.Tensor = node.meta[key]
            return value
    return None


def dimension_order(node: fx.Node) -> list[int] | None:
    """The dimensions of a node's value from the widest stride in memory to the narrowest; None where it is not known.

    Where strides do not tell, the order is that of the dimensions.
    """
    value = example(node)
    if value is None or value.layout != torch.strided:
        return None
    sizes, strides = ([known_size(v) for v in values] for values in (value.shape, value.stride()))
    if None in sizes or None in strides:
        return None
    telling = [i for i, size in enumerate(sizes) if size != 1]
    ordered = iter(sorted(telling, key=lambda i: -cast(int, strides[i])))
    return [next(ordered) if i in telling else i for i in range(len(sizes))]


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """The shape of a node's value as tracing, export or ShapeProp left it; entries may be symbolic."""
    found = example(node)
    if found is None:
        found = node.meta.get("tensor_meta")
    return None if found is None or not hasattr(found, "shape") else tuple(found.shape)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's value, None where it is not known."""
    found = example(node)
    if found is None:
        found = node.meta.get("tensor_meta")
    return getattr(found, "dtype", None)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes, whose sizes may be symbolic, are known to be equal; no guard is added."""
    return len(a) == len(b) and all(x is y or bool(statically_known_true(x == y)) for x, y in zip(a, b, strict=True))
