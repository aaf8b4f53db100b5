"""Moving tensors between a graph's inputs and its attributes: what Dynamo lifts to inputs, the passes want as attributes."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.passes.effects import written_inputs
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.targets import attribute
from lcnn_compile.torch_private import children_of, is_boxed_float, is_users_tensor, owned_by, version

_WEIGHT = "lcnn_"
_KEYWORD = "_keyword"


def weight_placeholders(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, str]:
    """The inputs that are parameters or buffers of the user's modules and that the graph only reads: position -> name.

    Dynamo marks them by type (nn.Parameter) or by the source in the placeholder's name; index tables are neither, and the
    operator that reads them tells. What the graph writes (counters,
    states of a stream, running statistics), itself or through another input in the same memory, is data.

    Raises:
        ConversionError: where it cannot be told what the graph writes.
    """
    written = written_inputs(gm, example_inputs)
    nodes = gm.graph.find_nodes(op="placeholder")
    places = [
        i
        for i, (node, value) in enumerate(zip(nodes, example_inputs, strict=True))
        if isinstance(value, Tensor)
        and i not in written
        and (isinstance(value, nn.Parameter) or is_users_tensor(node) or _is_table(node))
    ]
    return dict(zip(places, _names([nodes[i] for i in places]), strict=True))


def _is_table(node: fx.Node) -> bool:
    return any(is_lookup(user) and node in user.args[3:7] for user in node.users)


def open_attributes(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph with further inputs, after its own, in place of the tensors that it has as attributes; and these tensors.

    Where Inductor is told to freeze, Dynamo hands parameters over as attributes; they may change all the same.
    """
    reads = [node for node in gm.graph.find_nodes(op="get_attr") if isinstance(attribute(gm, node.target), Tensor)]
    targets = list(dict.fromkeys(str(node.target) for node in reads))
    if not targets:
        return gm, []
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {node: graph.node_copy(node) for node in gm.graph.find_nodes(op="placeholder")}
    made: dict[str, fx.Node] = {}
    for node in reads:
        target = str(node.target)
        if target not in made:
            made[target] = graph.placeholder(f"attribute_buffers_{_identifier(target)}")
            made[target].meta = dict(node.meta)
        copied[node] = made[target]
    for node in gm.graph.nodes:
        if node not in copied:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return fx.GraphModule(gm, graph), [attribute(gm, target) for target in targets]


def bind_weights(gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> fx.GraphModule:
    """A new GraphModule in which the inputs at the positions ``names`` are attributes of these names (the very tensors)."""
    attributes = nn.Module()
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    places = gm.graph.find_nodes(op="placeholder")
    for i, node in enumerate(places):
        if i not in names:
            copied[node] = graph.node_copy(node)
    for name, module in gm.named_children():
        attributes.add_module(name, module)
    for i, name in names.items():
        _attach(attributes, name, inputs[i])
        copied[places[i]] = graph.get_attr(name)
        copied[places[i]].meta = dict(places[i].meta)
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
            owner = [_identifier(source[0])] if several else []
            names.append(".".join([*owner, *map(_speakable, source[1])]))
    # A container may not be a tensor too, so one clash sends all of them back to Dynamo's own names, which are unique.
    owners = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    if len(set(names)) < len(names) or owners & set(names):
        return [_identifier(str(node.target)) for node in nodes]
    return names


def _identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)


def _speakable(name: str) -> str:
    """A name that the code of a graph can hold: "in" would be a keyword there, and a quote would end a string."""
    return f"{name}{_KEYWORD}" if keyword.iskeyword(name) else re.sub(r"[\"\\\n\r{}]", "_", name)


def users_name(name: str) -> str:
    """The user's name of a layer that is called ``name`` in a graph, where that had to be another one."""
    parts = name.split(".")
    return ".".join(part.removesuffix(_KEYWORD) if keyword.iskeyword(part.removesuffix(_KEYWORD)) else part for part in parts)


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


def unbind_weights(bound: fx.GraphModule, inputs: Sequence[Any], places: Collection[int]) -> Unbound:
    """A new GraphModule in which every tensor attribute is an input: an original input where it is one, else a derived one."""
    original = {id(inputs[i]): i for i in places}
    reads: dict[str, Tensor] = {}
    for node in bound.graph.find_nodes(op="get_attr"):
        value = attribute(bound, node.target)
        if isinstance(value, Tensor):
            reads[str(node.target)] = value
    data = dict(zip(_others(inputs, places), bound.graph.find_nodes(op="placeholder"), strict=True))
    # A float that has become a constant is nobody's input any more.
    kept = {i for i, node in data.items() if node.users or not is_boxed_float(node)}
    kept |= {original[id(value)] for value in reads.values() if id(value) in original}
    derived = [name for name, value in reads.items() if id(value) not in original]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    made: dict[Any, fx.Node] = {}
    for i in sorted(kept):
        if i in data:
            copied[data[i]] = graph.node_copy(data[i])
        else:
            made[i] = graph.placeholder(f"{_WEIGHT}weight_{i}")
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


def _others(inputs: Sequence[Any], places: Collection[int]) -> list[int]:
    return [i for i in range(len(inputs)) if i not in places]


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
