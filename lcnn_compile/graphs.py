"""Moving tensors between a graph's inputs and its attributes: what Dynamo lifts to inputs, the passes want as attributes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.targets import attribute
from lcnn_compile.torch_private import children_of, is_users_tensor, owned_by, version

_WEIGHT = "lcnn_"


def weight_placeholders(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[int]:
    """Positions of the inputs that are parameters or buffers of the user's modules, not data.

    Dynamo marks them by type (nn.Parameter) or by the source in the placeholder's name. Index tables are neither parameters nor
    buffers; the operator that reads them tells.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    return [
        i
        for i, (node, value) in enumerate(zip(nodes, example_inputs, strict=True))
        if isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or is_users_tensor(node) or _is_table(node))
    ]


def _is_table(node: fx.Node) -> bool:
    return any(is_lookup(user) and node in user.args[3:7] for user in node.users)


def bind_weights(gm: fx.GraphModule, inputs: Sequence[Any], places: Sequence[int]) -> fx.GraphModule:
    """A new GraphModule in which the inputs at ``places`` are attributes (the very tensors); the others stay inputs."""
    attributes = nn.Module()
    chosen = set(places)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if i not in chosen:
            copied[node] = graph.node_copy(node)
    for name, module in gm.named_children():
        attributes.add_module(name, module)
    weights = {i: node for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if i in chosen}
    for (i, node), name in zip(weights.items(), _names(list(weights.values())), strict=True):
        _attach(attributes, name, inputs[i])
        copied[node] = graph.get_attr(name)
        copied[node].meta = dict(node.meta)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr" and not hasattr(attributes, str(node.target).split(".")[0]):
            _attach(attributes, str(node.target), attribute(gm, node.target))
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    return fx.GraphModule(attributes, graph)


def _names(nodes: Sequence[fx.Node]) -> list[str]:
    """An attribute path for each placeholder, no two alike: the qualified name of the user's parameter where it is known.

    Where parameters of several objects meet in one graph, their qualified names may be the same: the object comes first then.
    """
    sources = [owned_by(node) for node in nodes]
    several = len({source[0] for source in sources if source}) > 1
    names = []
    for node, source in zip(nodes, sources, strict=True):
        if source is None:
            names.append(_identifier(str(node.target)))
        else:
            names.append(".".join([*([_identifier(source[0])] if several else []), *source[1]]))
    # A container may not be a tensor too, so one clash sends all of them back to Dynamo's own names, which are unique.
    owners = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    if len(set(names)) < len(names) or owners & set(names):
        return [_identifier(str(node.target)) for node in nodes]
    return names


def _identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)


def _attach(root: nn.Module, path: str, value: Any) -> None:
    """Set an attribute by its dotted path, in bare containers made as needed."""
    *owners, name = path.split(".")
    module = root
    for owner in owners:
        if owner not in children_of(module):
            module.add_module(owner, nn.Module())
        module = module.get_submodule(owner)
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif isinstance(value, Tensor):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


@dataclass(frozen=True)
class Unbound:
    """A graph whose tensors are inputs again.

    Attributes:
        gm: its inputs are the kept ones of the original graph, in order, then the derived ones.
        kept: positions in the original inputs.
        derived: attribute paths in the bound graph, whose tensors are the derived inputs.
    """

    gm: fx.GraphModule
    kept: list[int]
    derived: list[str]


def unbind_weights(bound: fx.GraphModule, inputs: Sequence[Any], places: Sequence[int]) -> Unbound:
    """A new GraphModule in which every tensor attribute is an input: an original input where it is one, else a derived one."""
    original = {id(inputs[i]): i for i in places}
    reads: dict[str, Tensor] = {}
    for node in bound.graph.find_nodes(op="get_attr"):
        value = attribute(bound, node.target)
        if isinstance(value, Tensor):
            reads[str(node.target)] = value
    kept = {i for i in range(len(inputs)) if i not in set(places)}
    kept |= {original[id(value)] for value in reads.values() if id(value) in original}
    derived = [name for name, value in reads.items() if id(value) not in original]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    made: dict[Any, fx.Node] = {}
    data = iter(bound.graph.find_nodes(op="placeholder"))
    for i in sorted(kept):
        if i in set(places):
            made[i] = graph.placeholder(f"{_WEIGHT}weight_{i}")
        else:
            node = next(data)
            copied[node] = graph.node_copy(node)
    for number, name in enumerate(derived):
        made[name] = graph.placeholder(f"{_WEIGHT}derived_{number}")
    for node in bound.graph.nodes:
        if node.op == "placeholder":
            continue
        name = str(node.target)
        if node.op == "get_attr" and name in reads:
            copied[node] = made[original.get(id(reads[name]), name)]
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return Unbound(fx.GraphModule(bound, graph), sorted(kept), derived)


def is_weight(node: fx.Node) -> bool:
    """Whether a placeholder of an unbound graph is a weight, kept or derived, not data."""
    return str(node.target).startswith(_WEIGHT)


def fingerprint(tensor: Tensor) -> tuple[int, Any]:
    """Address and version: what changes when the tensor's values may have changed; sums of its values without a version."""
    if tensor.is_inference():
        with torch.inference_mode():
            wide = tensor.double()
            return tensor.data_ptr(), (float(wide.sum()), float(wide.square().sum()))
    return tensor.data_ptr(), version(tensor)
