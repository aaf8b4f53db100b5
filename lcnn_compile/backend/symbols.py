"""Numbers that Dynamo made symbolic: those that layers are built with become plain again, the others stay inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lcnn_compile.passes.targets import BATCH_NORM, CONVOLUTION, CONVOLUTIONS
from lcnn_compile.torch_private import fixed_number, is_boxed_float

_LAYERS = {*BATCH_NORM, *CONVOLUTION, *(target for targets in CONVOLUTIONS.values() for target in targets)}
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def settle_numbers(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with plain numbers where convolutions and batch norms take symbolic ones: strides, paddings, epsilons.

    Dynamo is told to compile anew where such a number changes, as it would be by Inductor. The graph itself is not changed;
    where nothing is to be done it is returned.
    """
    wanted = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _LAYERS]
    if not any(_is_number(source) for node in wanted for source in node.all_input_nodes):
        return gm
    graph, copied = _copied(gm)
    for node in wanted:
        copy = copied[node]
        copy.args = fx.node.map_arg(copy.args, _settled)
        copy.kwargs = fx.node.map_arg(copy.kwargs, _settled)
    for node in reversed(list(graph.nodes)):
        if not node.users and (_is_number(node) and node.op in ("call_function", "call_method")):
            graph.erase_node(node)
    return fx.GraphModule(gm, graph)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), _SYMBOLIC)


def _settled(node: fx.Node) -> Any:
    return fixed_number(node.meta["example_value"]) if _is_number(node) else node


def unbox_floats(gm: fx.GraphModule) -> tuple[fx.GraphModule, set[int]]:
    """A graph with floats for inputs where Dynamo made tensors of the user's floats, and their positions.

    Outside of the trace that made it, no compiler can read a number out of such a tensor. The graph given is not changed.
    """
    graph, _ = _copied(gm)
    places = graph.find_nodes(op="placeholder")
    boxed = {i for i, node in enumerate(places) if is_boxed_float(node)}
    for i in boxed:
        for user in list(places[i].users):
            user.replace_all_uses_with(places[i])
            graph.erase_node(user)
        places[i].meta["example_value"] = places[i].meta["example_value"].item_memo
    return fx.GraphModule(gm, graph), boxed


def _copied(gm: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copied))
    return graph, copied
