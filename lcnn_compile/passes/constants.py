"""Constants that a graph forms from constants (``weight[:, None, None]``, ``gamma.view(1, -1, 1, 1)``), formed once."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from lcnn_compile.passes.effects import Effects
from lcnn_compile.passes.fold import add_attribute
from lcnn_compile.passes.signatures import operation_of
from lcnn_compile.passes.targets import RESHAPES, attribute, is_get_attr
from lcnn_compile.torch_private import plain_dtypes


def fold_constants(gm: fx.GraphModule) -> None:
    """Replace calls that only read constants, to tensors that nobody writes, by their values. The graph is changed in place."""
    effects = Effects(gm)
    written = frozenset().union(*map(effects.written, effects.writers()))
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes or effects.has_effect(node):
            continue
        known = node.target in RESHAPES or node.target is operator.getitem or operation_of(node) is not None
        if not known or not all(is_get_attr(source) for source in node.all_input_nodes) or effects.memory(node) & written:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: attribute(gm, source.target))
        with torch.no_grad(), plain_dtypes():
            value = (
                getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)
            )
        if isinstance(value, Tensor):
            constant = add_attribute(gm, node, "constant", value.detach().clone())
            node.replace_all_uses_with(constant)
            gm.graph.erase_node(node)
