"""Pass: operators whose ONNX form engines read differently, written in operators that they read alike."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from lcnn_compile.errors import ExportError
from lcnn_compile.passes.fold import add_attribute
from lcnn_compile.passes.pooling_forms import (
    AVG_POOLS,
    MAX_POOLS,
    Form,
    avg_pool_form,
    has_divisor,
    max_pool_form,
    uses_ceil_mode,
)
from lcnn_compile.passes.resampling_forms import (
    ADAPTIVE_AVG,
    ADAPTIVE_MAX,
    adaptive_avg_form,
    adaptive_max_form,
    interpolation_form,
    is_interpolation,
    padding_form,
)
from lcnn_compile.passes.targets import aten, shape_of


def write_portably(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite poolings with ceil_mode or a divisor, adaptive poolings, interpolations and circular paddings.

    The graph is one of ``torch.export`` with shapes; it is changed in place and returned. Each node is replaced where it
    stands, so that writes in place keep their order.

    Raises:
        ExportError: an operator that has no such form here: sizes that vary, or indices of a pooling that are used.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        form = _form(node)
        if form is None:
            continue
        function, plain, tensors = form
        attributes = tuple(add_attribute(gm, node, str(i), value) for i, value in enumerate(tensors))
        with gm.graph.inserting_before(node):
            made = gm.graph.call_function(function, (node.args[0], *attributes, *plain))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _form(node: fx.Node) -> Form | None:
    target: Any = node.target
    dimensions = next((kind[target] for kind in (MAX_POOLS, AVG_POOLS, ADAPTIVE_AVG, ADAPTIVE_MAX) if target in kind), None)
    resized = is_interpolation(target)
    if dimensions is None and not resized and target is not aten.pad.default:
        return None
    if target is aten.pad.default:
        return padding_form(node, ())
    source: Any = node.args[0]
    shape, made = shape_of(source), _first(node.meta.get("val"))
    first = 2 if resized else -(dimensions or 0)
    spatial = None if shape is None or made is None else [*shape[first:], *made[first:]]
    if shape is None or made is None or not all(isinstance(size, int) for size in spatial or ()):
        if _plain(node):
            return None
        raise ExportError(f"{node.name}: ONNX engines disagree on {target} of varying sizes {spatial}; fix the sizes")
    if dimensions is None:
        return interpolation_form(node, shape, made)
    if target in AVG_POOLS:
        return avg_pool_form(node, shape, dimensions)
    if target in ADAPTIVE_AVG:
        return adaptive_avg_form(node, shape, dimensions)
    form = max_pool_form(node, shape, made, dimensions) if target in MAX_POOLS else adaptive_max_form(node, shape, dimensions)
    reads = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
    if form is not None and 1 in reads:
        raise ExportError(f"{node.name}: ONNX engines disagree on the indices of {target} with ceil_mode or varying windows")
    return form


def _first(value: Any) -> tuple[Any, ...] | None:
    """The shape of a value, or of the first of several."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _plain(node: fx.Node) -> bool:
    """Whether a node of unknown sizes needs no other form."""
    target: Any = node.target
    if target in MAX_POOLS:
        return not uses_ceil_mode(node)
    return target in AVG_POOLS and not uses_ceil_mode(node) and not has_divisor(node)
