"""Pass: rewrite the modules that the other passes work on as function calls on get_attr nodes, one form for every graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lcnn_compile.kernels.ops import lookup_conv2d
from lcnn_compile.modules import LookupConv2d

Emit = Callable[[fx.Graph, str, nn.Module, fx.Node], fx.Node]


def _attr(graph: fx.Graph, name: str, module: nn.Module, key: str) -> fx.Node | None:
    return None if getattr(module, key) is None else graph.get_attr(f"{name}.{key}" if name else key)


def _pad(graph: fx.Graph, x: fx.Node, pads: tuple[int, int, int, int], mode: str) -> fx.Node:
    """F.pad by (top, bottom, left, right)."""
    top, bottom, left, right = pads
    return graph.call_function(F.pad, (x, (left, right, top, bottom)), {"mode": mode})


def _conv(graph: fx.Graph, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
    assert isinstance(module, nn.Conv2d)
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        left, right, top, bottom = module._reversed_padding_repeated_twice
        x, padding = _pad(graph, x, (top, bottom, left, right), module.padding_mode), (0, 0)
    weight, bias = _attr(graph, name, module, "weight"), _attr(graph, name, module, "bias")
    return graph.call_function(F.conv2d, (x, weight, bias, module.stride, padding, module.dilation, module.groups))


def _lookup(graph: fx.Graph, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
    assert isinstance(module, LookupConv2d)
    padding = module.pads
    if module.padding_mode != "zeros":
        x, padding = _pad(graph, x, padding, module.padding_mode), (0, 0, 0, 0)
    keys = ("dictionary", "coefficients", "indices", "positions", "offsets", "filters", "bias")
    tensors = [_attr(graph, name, module, key) for key in keys]
    geometry = (module.out_channels, module.kernel_size, module.stride, padding, module.dilation)
    return graph.call_function(lookup_conv2d, (x, *tensors, *geometry, module.lowering))


def _batch_norm(graph: fx.Graph, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
    assert isinstance(module, nn.BatchNorm2d)
    keys = ("running_mean", "running_var", "weight", "bias")
    return graph.call_function(F.batch_norm, (x, *(_attr(graph, name, module, k) for k in keys), False, 0.0, module.eps))


def _activation(function: Any) -> Emit:
    return lambda graph, name, module, x: graph.call_function(function, (x,))


EMITTERS: dict[type[nn.Module], Emit] = {
    nn.Conv2d: _conv,
    LookupConv2d: _lookup,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _activation(F.relu),
    nn.ReLU6: _activation(F.relu6),
    nn.SiLU: _activation(F.silu),
    nn.Hardswish: _activation(F.hardswish),
}


def to_functional(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite calls of Conv2d, LookupConv2d, BatchNorm2d (in eval mode) and activations as function calls.

    The graph is changed in place and returned; parameters stay where they are. Inputs of convolutions must be batched.
    In-place activations become out-of-place ones where nothing else reads their input, and are left alone elsewhere.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        module = gm.get_submodule(node.target)
        emit = EMITTERS.get(type(module))
        x = node.args[0] if node.args else None
        if emit is None or not isinstance(x, fx.Node) or _hooked(module):
            continue
        if isinstance(module, nn.BatchNorm2d) and (module.training or module.running_mean is None):
            continue
        if getattr(module, "inplace", False) and len(x.users) > 1:
            continue
        with gm.graph.inserting_before(node):
            call = emit(gm.graph, node.target, module, x)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def example(node: fx.Node) -> torch.Tensor | None:
    """The example (or fake) tensor that tracing left on a node; None where there is none."""
    for key in ("example_value", "val"):
        if isinstance(node.meta.get(key), torch.Tensor):
            value: torch.Tensor = node.meta[key]
            return value
    return None


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
