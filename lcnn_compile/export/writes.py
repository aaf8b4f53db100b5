"""Writes in an exported program, as values: each buffer or input that is written gets one ``copy_`` after all that reads it.

``torch.export`` keeps writes in place where the model has them. Passes are right on those too (``passes/effects.py``), but fuse and
gather more where there are none in between.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.errors import ExportError
from lcnn_compile.kernels.read_only import read_only
from lcnn_compile.passes.effects import refuse_lost_writes
from lcnn_compile.passes.in_place import ATEN_DROPOUT
from lcnn_compile.passes.targets import bound
from lcnn_compile.torch_private import has_implicit_kernel, pytree, tensors_of

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
    for module in _graphs(program.graph_module):
        _without_idle_dropout(module.graph)
    try:
        program = program.run_decompositions({})
    except Exception as error:
        # PyTorch's own tracing may raise anything.
        raise ExportError(f"writes in place cannot be captured: {type(error).__name__}: {error}") from error
    _restore_batch_norm(program.graph)
    return program


@contextmanager
def calling(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of ``model`` runs ``forward`` in the place of its own."""
    own = vars(model).get("forward")
    object.__setattr__(model, "forward", forward)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(model, "forward")
        else:
            object.__setattr__(model, "forward", own)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Inside, a call of ``model`` that puts another tensor in the place of a buffer, as ``self.state = y``, writes its values to the buffer.

    ``torch.export`` loses what is put in the place of a buffer of a submodule.

    Raises:
        ExportError: on the call, for a tensor of another shape or dtype, or None.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        held = [(tensors_of(module)[1], name, old) for module in model.modules() for name, old in tensors_of(module)[1].items()]
        output = plain(*args, **kwargs)
        replaced = [
            (kept, name, old, kept.get(name)) for kept, name, old in held if old is not None and kept.get(name) is not old
        ]
        values: list[Tensor] = []
        for _, name, old, new in replaced:
            if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
                found = "nothing" if new is None else f"{new.dtype} {tuple(new.shape)}"
                raise ExportError(
                    f"buffer {name!r}, {old.dtype} {tuple(old.shape)}, is replaced by {found}; a program keeps its form"
                )
            values.append(new.clone())  # it may be another's old one
        if replaced:
            # The buffer's old values may be returned.
            output = pytree.tree_map_only(Tensor, torch.clone, output)
        for (kept, name, old, _), value in zip(replaced, values, strict=True):
            old.copy_(value)
            kept[name] = old
        return output

    with calling(model, forward):
        yield


def unmarked(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without the marks of dense weights, once it is known that nothing writes to them; it is changed in place.

    Raises:
        WriteError: something does.
    """
    for module in _graphs(program.graph_module):
        refuse_lost_writes(module)
        for mark in module.graph.find_nodes(op="call_function", target=read_only):
            mark.target, mark.args = aten.clone.default, mark.args[:1]
    return program


def _without_idle_dropout(graph: fx.Graph) -> None:
    """Dropout in evaluation mode returns its input itself, but its schema says nothing of it: decomposing loses writes to the result."""
    for target in ATEN_DROPOUT:
        for node in graph.find_nodes(op="call_function", target=target):
            x, train = node.args[0], bound(node, ("input", "p", "train"), (None, 0.5, True))[2]
            if train is False:
                node.replace_all_uses_with(x)
                graph.erase_node(node)


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


def writes_to(gm: fx.GraphModule, op: str) -> bool:
    """Whether a graph from :func:`writes_values` writes to inputs ("placeholder") or attributes ("get_attr")."""
    return any(
        isinstance(value, fx.Node) and value.op == op for node in gm.graph.nodes if _matters(node) for value in node.args[:1]
    )
