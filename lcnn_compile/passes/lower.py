"""Pass: choose the lowering of every lookup convolution and rewrite those that are best off as dense convolutions."""

from __future__ import annotations

from typing import Any

from torch import fx

from lcnn_compile.kernels import choose
from lcnn_compile.kernels.operator import has_lookup_kernel
from lcnn_compile.passes.decompose import has_constant_weight, rewrite
from lcnn_compile.passes.effects import eliminate_dead_code
from lcnn_compile.passes.find import arguments_of, is_lookup, ranges_of, weight_of
from lcnn_compile.passes.functional import to_functional
from lcnn_compile.passes.targets import dtype_of, example, shape_of
from lcnn_compile.torch_private import example_of_size


def choose_lowerings(gm: fx.GraphModule, device: str | None = None) -> fx.GraphModule:
    """Settle "auto" by measurement on this machine (remembered on disk), then rewrite "factored" and "dense" as ordinary convolutions that the compiler knows.

    Needs shapes on the nodes and the weight's tensors as attributes; calls that lack them keep what they have, and the
    operator then chooses when it runs. The graph is changed in place and returned.
    """
    to_functional(gm)
    for node in list(gm.graph.nodes):
        if not is_lookup(node) or len(node.args) > 14 or set(node.kwargs) & {"activation", "residual"}:
            continue
        if not has_constant_weight(node):
            continue
        if ranges_of(node) is not None:
            node.args = (*node.args[:13], "lookup")  # bytes have one lowering
            continue
        lowering = arguments_of(node).lowering
        if lowering == "auto":
            lowering = _cheapest(gm, node, device)
        if lowering in ("factored", "dense"):
            rewrite(gm, node, lowering)
        else:
            precision = arguments_of(node).precision
            rounding = {} if precision == "float32" else {"precision": precision}
            node.args, node.kwargs = (*node.args[:13], lowering), rounding
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _cheapest(gm: fx.GraphModule, node: fx.Node, device: str | None) -> str:
    call, weight = arguments_of(node), weight_of(gm, node)
    x: Any = call.input
    shape, dtype = shape_of(x), dtype_of(x)
    if shape is None or dtype is None or len(shape) != 4:
        return "auto"
    found = example(x)
    where = device or (found.device.type if found is not None else "cpu")
    sizes = [example_of_size(value) for value in shape]
    shapes = (sizes, weight.dictionary.shape, weight.coefficients.shape)
    problem = choose.problem_of(*shapes, call.geometry, where, dtype, call.precision)
    return choose.cheapest(problem, has_lookup_kernel(where, dtype), measure=True)
