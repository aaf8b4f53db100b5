"""Writes in an exported graph: made explicit at its end, and taken off while passes run, which then see values only.

``torch.export`` keeps writes in place where the model has them. Here they become values, and each buffer or input that was
written gets one ``copy_`` after everything that reads it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lcnn_compile.torch_private import has_implicit_kernel

aten = torch.ops.aten
_FRESH = {
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default),
    *(aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
    *(aten.batch_norm.default, aten.linear.default, aten.max_pool2d.default, aten.layer_norm.default, aten.group_norm.default),
}
"""Composite operators whose result is always a new tensor."""


def writes_values(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with writes as values, where there are others than of a new tensor that nothing else reads, as ``relu_(conv(x))``."""
    if not any(_matters(node) for module in _graphs(program.graph_module) for node in module.graph.nodes):
        return program
    program = program.run_decompositions({})
    _restore_batch_norm(program.graph)
    return program


def _graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def _matters(node: fx.Node) -> bool:
    """Whether a node writes to a tensor that anything but the node's users may see."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    written = [
        value
        for place, value in zip(schema.arguments, node.args, strict=False)
        if place.alias_info is not None and place.alias_info.is_write
    ]
    written += [
        node.kwargs[place.name]
        for place in schema.arguments
        if place.name in node.kwargs and place.alias_info is not None and place.alias_info.is_write
    ]
    return any(not isinstance(x, fx.Node) or len(x.users) != 1 or not node.users or not _fresh(x) for x in written)


def _fresh(node: fx.Node) -> bool:
    """Whether a node's value is memory of its own."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return False
    if schema.is_mutable:
        return isinstance(node.args[0], fx.Node) and not _matters(node) and _fresh(node.args[0])
    if any(returned.alias_info is not None for returned in schema.returns):
        return False
    return node.target in _FRESH or not has_implicit_kernel(node.target)


def _restore_batch_norm(graph: fx.Graph) -> None:
    """Batch norm in evaluation mode in the form that passes fold."""
    for node in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        users = list(node.users)
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in users):
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        for user in users:
            with graph.inserting_before(user):
                args = (x, weight, bias, mean, var, False, momentum, eps, False)
                call = graph.call_function(aten.batch_norm.default, args)
            call.meta = dict(user.meta)
            user.replace_all_uses_with(call)
            graph.erase_node(user)
        graph.erase_node(node)


@dataclass
class Writes:
    """What a graph writes when everything is computed.

    Attributes:
        targets: get_attr paths ("attribute") and positions of inputs ("input").
        returned: output -> the write whose target it is.
    """

    targets: list[tuple[str, Any]]
    returned: dict[int, int]

    @property
    def to_inputs(self) -> bool:
        """Whether an input is written."""
        return any(kind == "input" for kind, _ in self.targets)


def take_writes(gm: fx.GraphModule) -> Writes:
    """Make what the trailing ``copy_`` of a graph write its last outputs; see :func:`put_writes`."""
    places = gm.graph.find_nodes(op="placeholder")
    output = gm.graph.output_node()
    outputs = list(_outputs(output))
    found = Writes([], {})
    values: list[fx.Node] = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, value = node.args[:2]
        if not isinstance(target, fx.Node) or target.op not in ("placeholder", "get_attr") or _read_later(node, target):
            continue
        kind = ("input", places.index(target)) if target.op == "placeholder" else ("attribute", target.target)
        number = len(values)
        found.targets.append(kind)
        found.returned |= {i: number for i, y in enumerate(outputs) if y is node}
        values.append(value)
        outputs = [value if y is node else y for y in outputs]
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    if values:
        output.args = ([*outputs, *values],)
        output.meta.pop("val", None)
    return found


def put_writes(gm: fx.GraphModule, writes: Writes) -> None:
    """Write the last outputs where they belong, and no longer return them."""
    if not writes.targets:
        return
    places = gm.graph.find_nodes(op="placeholder")
    output = gm.graph.output_node()
    outputs = list(_outputs(output))
    count = len(outputs) - len(writes.targets)
    outputs, values = outputs[:count], outputs[count:]
    with gm.graph.inserting_before(output):
        # A value that is another buffer, or a view of one, must be read before any is written.
        values = [gm.graph.call_function(aten.clone.default, (v,)) if not _fresh(v) else v for v in values]
        copies = [
            gm.graph.call_function(aten.copy_.default, (places[what] if kind == "input" else gm.graph.get_attr(what), value))
            for (kind, what), value in zip(writes.targets, values, strict=True)
        ]
    output.args = ([copies[writes.returned[i]] if i in writes.returned else y for i, y in enumerate(outputs)],)
    gm.graph.lint()
    gm.recompile()


def _outputs(output: fx.Node) -> Any:
    returned = output.args[0]
    return returned if isinstance(returned, list | tuple) else (returned,)


def _read_later(copy: fx.Node, target: fx.Node) -> bool:
    """Whether anything but the output, or another copy of the end, comes after a ``copy_`` of a graph."""
    node = copy.next
    while node.op != "output":
        if node.target is not aten.copy_.default and node.op != "get_attr":
            return True
        node = node.next
    return False
