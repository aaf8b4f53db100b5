"""Pass: choose the lowering of every lookup convolution and rewrite those that are best off as dense convolutions."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

from lcnn_compile.kernels import choose, reference
from lcnn_compile.kernels.ops import has_lookup_kernel
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.fold import add_attribute
from lcnn_compile.passes.functional import dtype_of, example, shape_of, to_functional
from lcnn_compile.passes.targets import attribute, is_get_attr


def choose_lowerings(gm: fx.GraphModule, device: str | None = None) -> fx.GraphModule:
    """Settle "auto" by measurement on this machine (remembered on disk), then rewrite "factored" and "dense" as ordinary convolutions that the compiler knows.

    Needs shapes on the nodes and the weight's tensors as attributes; calls that lack them keep what they have, and the
    operator then chooses when it runs. The graph is changed in place and returned.
    """
    to_functional(gm)
    for node in list(gm.graph.nodes):
        if not is_lookup(node) or len(node.args) > 14 or set(node.kwargs) & {"activation", "residual"}:
            continue
        if not all(a is None or is_get_attr(a) for a in node.args[1:8]):
            continue
        lowering = node.args[13] if len(node.args) > 13 else node.kwargs.get("lowering", "lookup")
        if lowering == "auto":
            lowering = _cheapest(gm, node, device)
        if lowering in ("factored", "dense"):
            _rewrite(gm, node, lowering)
        else:
            node.args = (*node.args[:13], lowering)
            node.kwargs = {}
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def _cheapest(gm: fx.GraphModule, node: fx.Node, device: str | None) -> str:
    x: Any = node.args[0]
    shape, dtype = shape_of(x), dtype_of(x)
    if shape is None or dtype is None or len(shape) != 4:
        return "auto"
    found = example(x)
    where = device or (found.device.type if found is not None else "cpu")
    dictionary, coefficients = (attribute(gm, node.args[i].target) for i in (1, 2))  # type: ignore[union-attr]
    sizes = [_hint(value) for value in shape]
    out_channels, kernel_size, stride, padding, dilation = cast(Any, node.args[8:13])
    geometry = (out_channels, kernel_size, stride, padding, dilation)
    problem = choose.problem_of(sizes, dictionary.shape, coefficients.shape, *geometry, where, dtype)
    return choose.cheapest(problem, has_lookup_kernel(where, dtype), measure=True)


def _hint(value: Any) -> int:
    """The size that a symbolic dimension was traced with."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) and value.node.hint is not None else int(value)


def _rewrite(gm: fx.GraphModule, node: fx.Node, lowering: str) -> None:
    x, *_, bias = node.args[:8]
    dictionary, coefficients, indices, positions, offsets, filters = (
        attribute(gm, a.target)  # type: ignore[union-attr]
        for a in node.args[1:7]
    )
    out_channels, kernel_size, stride, padding, dilation = cast(Any, node.args[8:13])
    groups, size, _ = dictionary.shape
    with torch.no_grad():
        lookups = reference.lookup_tensor(
            coefficients,
            indices,
            positions,
            offsets,
            filters,
            out_channels,
            size,
            kernel_size,
        )
        weight = lookups if lowering == "factored" else reference.dense_weight(dictionary, lookups)
    graph = gm.graph
    filter_bank = add_attribute(gm, node, "weight", weight)
    pointwise = add_attribute(gm, node, "dictionary", reference.pointwise_weight(dictionary)) if lowering == "factored" else None
    with graph.inserting_before(node):
        y: Any = x
        if pointwise is not None:
            y = _convolve(graph, y, pointwise, None, (1, 1), (0,) * 4, (1, 1), groups, _is_pixel(x))
        pixel = _is_pixel(x) and tuple(kernel_size) == (1, 1) and not any(padding)
        y = _convolve(graph, y, filter_bank, bias, stride, padding, dilation, groups, pixel)
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    graph.erase_node(node)


def _is_pixel(x: Any) -> bool:
    """Whether a node's images are known to be 1x1, as a fully connected layer sees them."""
    shape = shape_of(x)
    return shape is not None and len(shape) == 4 and all(isinstance(v, int) and v == 1 for v in shape[2:])


def _convolve(
    graph: fx.Graph, x: Any, weight: fx.Node, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, pixel: bool
) -> fx.Node:
    """Nodes of a dense convolution with padding (top, bottom, left, right); of a matrix product for a single pixel."""
    if pixel and groups == 1:
        matrix = graph.call_function(torch.flatten, (weight, 1))
        y = graph.call_function(F.linear, (graph.call_function(torch.flatten, (x, 1)), matrix, bias))
        return graph.call_function(torch.unflatten, (y, 1, (-1, 1, 1)))
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x = graph.call_function(F.pad, (x, (left, right, top, bottom)))
        top = left = 0
    return graph.call_function(F.conv2d, (x, weight, bias, tuple(stride), (top, left), tuple(dilation), groups))
