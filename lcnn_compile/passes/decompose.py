"""Pass: rewrite lookup convolutions as ordinary operators that any compiler or format knows."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lcnn_compile.errors import ConversionError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Epilogue, Geometry
from lcnn_compile.passes.effects import eliminate_dead_code
from lcnn_compile.passes.find import arguments_of, is_lookup, weight_of
from lcnn_compile.passes.fold import add_attribute
from lcnn_compile.passes.functional import to_functional
from lcnn_compile.passes.targets import is_get_attr, shape_of
from lcnn_compile.torch_private import plain_dtypes


def decompose_lookups(gm: fx.GraphModule, lowering: str = "factored") -> fx.GraphModule:
    """Rewrite every lookup convolution, its epilogue included, as ordinary operators.

    "factored" is a 1x1 convolution with the dictionary, then a convolution with the sparse lookup tensor P [n, k, kh, kw],
    both in the form of :func:`suit_engines`; "dense" is one convolution with W = P·D. The graph is changed in place and returned; it needs nothing of ours to run.

    Raises:
        ConversionError: for another lowering, or a lookup convolution whose weight is computed in the graph.
    """
    if lowering not in ("factored", "dense"):
        raise ConversionError(f"lowering is {lowering!r}; ordinary operators are 'factored' or 'dense'")
    to_functional(gm)
    for node in list(gm.graph.nodes):
        if not is_lookup(node):
            continue
        if not has_constant_weight(node):
            raise ConversionError(
                f"{node.name}: its lookup weight is computed in the graph; only constant weights can be rewritten"
            )
        rewrite(gm, node, lowering, for_engines=True)
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def suit_engines(dictionary: Tensor, lookups: Tensor, *, pad: bool = True) -> tuple[Tensor, Tensor]:
    """D [groups, k, m/groups] and P [n, k, kh, kw] of the same product as other engines and eight bits like them best.

    Each vector is scaled by a power of two, so that its largest entry is at least 0.5 and less than 1, and P by the inverse: that is
    exact, and one scale of eight bits then serves all channels between the two convolutions. With ``pad``, vectors of zeros make
    the dictionary's size a multiple of 4 and at least 16: ONNX Runtime keeps its blocked layout for such numbers of channels.
    """
    groups, size, _ = dictionary.shape
    _, exponents = torch.frexp(dictionary.abs().amax(2).float())
    # Within what cannot leave the range of float32 in P.
    exponents = exponents.clamp(-30, 30)[:, :, None]
    dictionary = torch.ldexp(dictionary, -exponents).to(dictionary.dtype)
    grouped = torch.ldexp(lookups.unflatten(0, (groups, -1)), exponents[:, None, :, :, None])
    lookups = grouped.flatten(0, 1).to(lookups.dtype)
    extra = max(16, -(-size // 4) * 4) - size if pad else 0
    return F.pad(dictionary, (0, 0, 0, extra)), F.pad(lookups, (0, 0, 0, 0, 0, extra))


def has_constant_weight(node: fx.Node) -> bool:
    """Whether the weight's tensors and the bias are attributes of the module."""
    return all(a is None or is_get_attr(a) for a in node.args[1:8])


def rewrite(gm: fx.GraphModule, node: fx.Node, lowering: str, *, for_engines: bool = False) -> None:
    """Replace one lookup convolution with constant weights by its "factored" or "dense" form; see :func:`suit_engines`."""
    call, tensors = arguments_of(node), weight_of(gm, node)
    x, geometry, dictionary = call.input, call.geometry, tensors.dictionary
    groups, size, _ = dictionary.shape
    with torch.no_grad(), plain_dtypes():
        lookups = reference.lookup_tensor(*tensors.lookups, geometry.out_channels, size, geometry.kernel_size)
        if lowering == "factored" and for_engines:
            dictionary, lookups = suit_engines(dictionary, lookups, pad=not _is_pixel(x))
        weight = lookups if lowering == "factored" else reference.dense_weight(dictionary, lookups)
    graph = gm.graph
    filter_bank = add_attribute(gm, node, "weight", weight)
    pointwise = add_attribute(gm, node, "dictionary", reference.pointwise_weight(dictionary)) if lowering == "factored" else None
    with graph.inserting_before(node):
        y: Any = x
        if pointwise is not None:
            if reference.skips_pixels(geometry):
                every = (slice(None), slice(None), *(slice(None, None, step) for step in geometry.stride))
                y, geometry = graph.call_function(operator.getitem, (y, every)), geometry._replace(stride=(1, 1))
            point = Geometry(groups * size, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
            y = _convolve(graph, y, pointwise, None, point, groups, _is_pixel(x))
        pixel = _is_pixel(x) and geometry.kernel_size == (1, 1) and not any(geometry.padding)
        y = _convolve(graph, y, filter_bank, call.epilogue.bias, geometry, groups, pixel)
        y = _epilogue(graph, y, call.epilogue)
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    graph.erase_node(node)


def _epilogue(graph: fx.Graph, y: fx.Node, epilogue: Epilogue) -> fx.Node:
    """``activation(y + residual)``, or ``activation(y) + residual`` where ``residual_last``."""
    residual, activation, residual_last = cast(Any, epilogue[1:])
    if residual is not None and not residual_last:
        y = graph.call_function(torch.add, (y, residual))
    if activation != "none":
        y = graph.call_function(reference.ACTIVATIONS[activation], (y,))
    return graph.call_function(torch.add, (y, residual)) if residual is not None and residual_last else y


def _is_pixel(x: Any) -> bool:
    """Whether a node's images are known to be 1x1, as a fully connected layer sees them."""
    shape = shape_of(x)
    return shape is not None and len(shape) == 4 and all(isinstance(v, int) and v == 1 for v in shape[2:])


def _convolve(graph: fx.Graph, x: Any, weight: fx.Node, bias: Any, geometry: Geometry, groups: int, pixel: bool) -> fx.Node:
    """Nodes of a dense convolution; of a matrix product for a single pixel."""
    if pixel and groups == 1:
        matrix = graph.call_function(torch.flatten, (weight, 1))
        y = graph.call_function(F.linear, (graph.call_function(torch.flatten, (x, 1)), matrix, bias))
        return graph.call_function(torch.unflatten, (y, 1, (-1, 1, 1)))
    _, _, stride, padding, dilation = geometry
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x = graph.call_function(F.pad, (x, (left, right, top, bottom)))
        top = left = 0
    return graph.call_function(F.conv2d, (x, weight, bias, stride, (top, left), dilation, groups))
