"""Pass: run dense convolutions over few channels (a network's first) on the lookup kernels, exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lcnn_compile.kernels.operator import has_lookup_kernel, lookup_conv2d
from lcnn_compile.kernels.triton.chain_operator import HALVES
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.passes.fold import add_attribute
from lcnn_compile.passes.functional import to_functional
from lcnn_compile.passes.targets import CONV2D, attribute, bound, dtype_of, example, is_get_attr, shape_of

FEW = 4
"""Input channels up to which a dense convolution is offered to the lookup kernels."""


def narrow_convolutions(gm: fx.GraphModule, device: str | None = None) -> fx.GraphModule:
    """Rewrite dense convolutions of up to four input channels as lossless lookup convolutions: D the identity, P = W.

    The values stay the same; what changes is that bias, activation and residual can be fused, and that few channels do
    not starve the kernel. ``choose_lowerings`` then decides by measurement and may turn them back. Convolutions whose
    device and dtype have no lookup kernel are left alone. Changed in place and returned.
    """
    to_functional(gm)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in CONV2D:
            _rewrite(gm, node, device)
    gm.graph.lint()
    gm.recompile()
    return gm


def _rewrite(gm: fx.GraphModule, node: fx.Node, device: str | None) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = bound(node, names, (None, None, None, 1, 0, 1, 1))
    static = all(isinstance(v, int) for value in (stride, padding, dilation) for v in _pair(value))
    if groups != 1 or not static or not is_get_attr(weight) or not (bias is None or is_get_attr(bias)):
        return
    value: torch.Tensor = attribute(gm, weight.target)
    found = example(x)
    where = device or (found.device.type if found is not None else value.device.type)
    known = dtype_of(x) in (None, value.dtype)
    if where == "cuda" and value.dtype in HALVES:
        return  # chains read few channels better as they are
    shape = shape_of(x)
    if (
        value.dim() != 4
        or (shape is not None and len(shape) != 4)
        or value.shape[1] > FEW
        or not known
        or not has_lookup_kernel(where, value.dtype)
    ):
        return
    lossless = LookupWeight.lossless(value.detach(), group_size=8)
    tensors = [add_attribute(gm, node, name, tensor) for name, tensor in lossless.tensors().items()]
    (top, left), size = _pair(padding), tuple(value.shape[2:])
    geometry = (value.shape[0], size, _pair(stride), (top, top, left, left), _pair(dilation))
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(lookup_conv2d, (x, *tensors, bias, *geometry, "auto"))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)


def _pair(value: Any) -> tuple[Any, Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0], values[-1]
