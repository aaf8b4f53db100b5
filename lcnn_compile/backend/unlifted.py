"""Why convolutions of a graph have no weight of their own that could be replaced."""

from __future__ import annotations

from typing import Any

from torch import fx

from lcnn_compile.passes.targets import CONVOLUTION, aten, convolution_of, is_get_attr, shape_of
from lcnn_compile.torch_private import is_users_tensor

_NO_FORM = ("conv_transpose3d", aten.conv_transpose3d.input)


def unlifted(gm: fx.GraphModule) -> dict[str, str]:
    """Name and reason of every convolution that is still called as a function in a bound graph whose weights were lifted."""
    reasons = {node.name: _reason(node) for node in gm.graph.nodes if _is_convolution(node)}
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            inside = "it is inside a nested graph (of control flow, or of checkpointing)"
            reasons |= {f"{name}.{node.name}": inside for node in child.graph.nodes if _is_convolution(node)}
    return reasons


def _is_convolution(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return convolution_of(node) is not None or node.target in CONVOLUTION or _is_without_form(node)


def _is_without_form(node: fx.Node) -> bool:
    return node.target in _NO_FORM or getattr(node.target, "__name__", "") in _NO_FORM


def _reason(node: fx.Node) -> str:
    if _is_without_form(node):
        return "conv_transpose3d has no lookup form"
    weight: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    for name, value in (("weight", weight), ("bias", bias)):
        if isinstance(value, fx.Node) and not is_get_attr(value):
            return f"its {name} is {_origin(value)}"
    if any(isinstance(value, fx.Node) for value in _flat([node.args[3:], {**node.kwargs, "input": None, "weight": None}])):
        return "its stride, padding or dilation is computed in the graph"
    first = node.args[0] if node.args else node.kwargs.get("input")
    shape = shape_of(first) if isinstance(first, fx.Node) else None
    return f"its input has shape {tuple(shape)}" if shape else "its form is not known to lcnn"


def _origin(value: fx.Node) -> str:
    if value.op != "placeholder":
        name = value.target if isinstance(value.target, str) else getattr(value.target, "__name__", str(value.target))
        return f"computed at every call (by {name}), not a parameter of its own"
    if is_users_tensor(value):
        return "written by the graph itself"
    return "an input of the graph, neither a parameter nor a buffer"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for entry in value.values() for item in _flat(entry)]
    return [item for entry in value for item in _flat(entry)] if isinstance(value, list | tuple) else [value]
