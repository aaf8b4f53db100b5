"""Passes: fold what only scales and shifts (batch norm in evaluation mode, constant factors) into the layer before it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, fx

from lcnn_compile.kernels.reference import output_format, tap_filter_groups
from lcnn_compile.passes.effects import eliminate_dead_code
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.functional import to_functional
from lcnn_compile.passes.targets import BATCH_NORM, CONV2D, DIVIDE, LINEAR, MULTIPLY, attribute, bound, is_get_attr

_BN = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN_BN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


def fold_batch_norm(gm: fx.GraphModule) -> fx.GraphModule:
    """y = γ·(conv(x) − μ)/√(σ² + ε) + β becomes one convolution with scaled filters and a bias.

    A lookup convolution is scaled through its coefficients, so dictionary and indices stay as they are. Folds where the
    convolution has no other user and all tensors are attributes of the module; everything else is left alone. The graph
    is changed in place and returned, in the form that :func:`to_functional` gives it.
    """
    to_functional(gm)
    for node in list(gm.graph.nodes):
        values = _batch_norm_arguments(node)
        if values is None:
            continue
        conv = values["input"]
        if not isinstance(conv, fx.Node) or not (is_lookup(conv) or _is_conv(conv)) or not _can_change(conv):
            continue
        statistics = [values[key] for key in ("running_mean", "running_var", "weight", "bias")]
        if values["running_mean"] is None or not all(a is None or is_get_attr(a) for a in statistics):
            continue
        tensors: list[Any] = [None if a is None else attribute(gm, a.target) for a in statistics]
        mean, var, gamma, beta = tensors
        with torch.no_grad():
            scale = torch.rsqrt(var.double() + values["eps"]) * (1.0 if gamma is None else gamma.double())
            shift = (0.0 if beta is None else beta.double()) - mean.double() * scale
            _scale(gm, conv, scale, shift)
        node.replace_all_uses_with(conv)
        gm.graph.erase_node(node)
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def fold_factors(gm: fx.GraphModule) -> fx.GraphModule:
    """c·layer(x) becomes one layer, dense or lookup convolution or linear, with its weight and bias times the number c.

    Folds where the layer has no other user and its tensors are attributes of the module; everything else is left alone. The
    graph is changed in place and returned, in the form that :func:`to_functional` gives it.
    """
    to_functional(gm)
    for node in list(gm.graph.nodes):
        factor = _factor(node)
        if factor is None:
            continue
        layer = node.args[0] if isinstance(node.args[0], fx.Node) else node.args[1]
        if not isinstance(layer, fx.Node) or not (is_lookup(layer) or _is_conv(layer) or _is_linear(layer)):
            continue
        if not _can_change(layer) or layer.kwargs.get("bias") is not None:
            continue
        weight: Tensor = attribute(gm, layer.args[2 if is_lookup(layer) else 1].target)  # type: ignore[union-attr]
        filters = cast(int, layer.args[8]) if is_lookup(layer) else weight.shape[0]
        with torch.no_grad():
            _scale(gm, layer, torch.full((filters,), factor, dtype=torch.float64, device=weight.device), None)
        node.replace_all_uses_with(layer)
        gm.graph.erase_node(node)
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _factor(node: fx.Node) -> float | None:
    """The finite number that a node multiplies its other argument by; None where it does not."""
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    if node.target in DIVIDE:
        divisor = node.args[1]
        found = 1 / divisor if isinstance(divisor, int | float) and divisor else None
    elif node.target in MULTIPLY:
        found = next((value for value in node.args if isinstance(value, int | float)), None)
    else:
        return None
    return float(found) if found is not None and math.isfinite(found) else None


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in LINEAR and len(node.args) >= 2


def _batch_norm_arguments(node: fx.Node) -> dict[str, Any] | None:
    if node.op != "call_function" or node.target not in BATCH_NORM:
        return None
    names = _BN if getattr(node.target, "__module__", "") == "torch.nn.functional" else _ATEN_BN
    values = dict(zip(names, bound(node, names, (None,) * 5 + (False, 0.1, 1e-5, False)[: len(names) - 5]), strict=True))
    return None if values["training"] else values


def _is_conv(node: fx.Node) -> bool:
    # Only positional weights: every tracer writes them so, and the rewrite below stays simple.
    return node.op == "call_function" and node.target in CONV2D and len(node.args) >= 2


def _has_epilogue(node: fx.Node) -> bool:
    return is_lookup(node) and (len(node.args) > 14 or bool(set(node.kwargs) & {"activation", "residual"}))


def _can_change(layer: fx.Node) -> bool:
    """Whether nothing else reads a layer's output as it is, and its weight and bias are attributes."""
    tensors = layer.args[1:8] if is_lookup(layer) else layer.args[1:3]
    return len(layer.users) == 1 and not _has_epilogue(layer) and all(a is None or is_get_attr(a) for a in tensors)


def _scale(gm: fx.GraphModule, conv: fx.Node, scale: Tensor, shift: Tensor | None) -> None:
    """Multiply the layer's filters by ``scale`` [n] and set its bias to ``bias·scale + shift``; without either it gets none."""
    place = 7 if is_lookup(conv) else 2
    bias = conv.args[place] if len(conv.args) > place else conv.kwargs.get("bias")
    if isinstance(bias, fx.Node):
        scaled = attribute(gm, bias.target).double() * scale
        shift = scaled if shift is None else shift + scaled
    weight = 2 if is_lookup(conv) else 1
    old = attribute(gm, conv.args[weight].target)  # type: ignore[union-attr]
    if is_lookup(conv):
        offsets, filters = (attribute(gm, conv.args[i].target) for i in (5, 6))  # type: ignore[union-attr]
        rows = filters[tap_filter_groups(offsets, old.shape[0])].long()
        new = old.double() * torch.where(rows >= 0, scale[rows.clamp(min=0)], 0.0)
    else:
        new = old.double() * scale.view(-1, *[1] * (old.dim() - 1))
    args = list(conv.args) + [None] * (place + 1 - len(conv.args))
    args[weight] = add_attribute(gm, conv, "weight", new.to(old.dtype))
    args[place] = None if shift is None else add_attribute(gm, conv, "bias", shift.to(old.dtype))
    conv.args = tuple(args)
    conv.kwargs = {key: value for key, value in conv.kwargs.items() if key != "bias"}


def add_attribute(gm: fx.GraphModule, before: fx.Node, suffix: str, value: Tensor) -> fx.Node:
    """A get_attr node, placed before ``before``, of a new buffer that holds ``value``."""
    name = f"_lcnn_{before.name}_{suffix}"
    number = 0
    while hasattr(gm, name if not number else f"{name}_{number}"):
        number += 1
    name = name if not number else f"{name}_{number}"
    # A filter bank in channels_last stays so: its convolution would copy it at every call.
    gm.register_buffer(name, value.detach().contiguous(memory_format=output_format(value)))
    with gm.graph.inserting_before(before):
        return gm.graph.get_attr(name)
