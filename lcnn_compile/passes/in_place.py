"""Pass: what is computed in place becomes out of place where nothing can tell the difference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lcnn_compile.passes.operations import Effect, effect_of, holds_tensors, in_place_operator, inplace_parameter
from lcnn_compile.passes.targets import bound, dtype_of, same_shape, shape_of
from lcnn_compile.torch_private import DropoutBase, OpOverload, has_hooks

_UNARY = {
    *("relu", "relu6", "silu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "selu", "celu", "mish", "threshold"),
    *("sigmoid", "tanh", "neg", "abs", "clamp", "clamp_min", "clamp_max", "clip"),
}
"""Elementwise operations that keep their input's dtype, also under autocast; their other arguments are numbers."""
_BINARY = {"add", "sub", "mul", "div", "subtract", "multiply", "divide", "truediv"}
_DROPOUT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)

ATEN_DROPOUT = tuple(
    getattr(torch.ops.aten, f"{kind}dropout{mark}").default
    for kind in ("", "feature_", "alpha_", "feature_alpha_")
    for mark in ("", "_")
)


def to_out_of_place(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``relu_``, ``x += y``, ``F.silu(x, inplace=True)``, ``out=`` and their like as functions of new memory.

    That is done where the tensor written is a whole one that the graph itself has made, no view of it is read later, and
    dtype and shape stay; later readers then read the result. Other writes (of inputs, attributes, slices, ``copy_``) stay where they
    are. The graph is changed in place and returned.
    """
    _Rewriter(gm).run()
    return gm


class _Rewriter:
    """One walk over a graph, in order, that knows the memory of every value so far."""

    def __init__(self, gm: fx.GraphModule):
        self._gm, self._graph = gm, gm.graph
        self._order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._memory: dict[fx.Node, frozenset[fx.Node | None]] = {}
        self._holders: defaultdict[fx.Node | None, list[fx.Node]] = defaultdict(list)

    def run(self) -> None:
        calls = [node for node in self._graph.nodes if node.op.startswith("call_")]
        if not any(effect_of(self._gm, node).writes for node in calls):
            return
        inference: set[fx.Node] = set()  # modes that are on: new tensors would be of a kind that cannot be written to behind them
        for node in list(self._graph.nodes):
            if not node.op.startswith("call_"):
                self._note(node, frozenset([None]))  # of others
                continue
            if _name(node.target) == "_enter_inference_mode":
                inference.add(node)
            elif _name(node.target) == "_exit_inference_mode":
                inference.discard(node.args[0])
            effect = effect_of(self._gm, node)  # again: its arguments may be others now
            if (same := self._identity(node)) is not None:
                node.replace_all_uses_with(same)
                self._graph.erase_node(node)
            elif not inference and (made := self._rewritten(node, effect)) is not None:
                self._note(made, frozenset([made]))
            else:
                found = frozenset().union(*(self._memory[n] for n in effect.aliases)) if holds_tensors(node) else frozenset()
                self._note(node, found if effect.only_views or not holds_tensors(node) else found | {node})

    def _note(self, node: fx.Node, memory: frozenset[fx.Node | None]) -> None:
        self._memory[node] = memory
        for root in memory:
            self._holders[root].append(node)

    def _identity(self, node: fx.Node) -> fx.Node | None:
        """The input that a dropout in evaluation mode returns as it is."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        if node.op == "call_module":
            module = self._gm.get_submodule(str(node.target))
            idle = isinstance(module, nn.Identity) or (isinstance(module, DropoutBase) and not module.training)
            return first if idle and not has_hooks(module) else None
        if node.target in _DROPOUT:
            return first if bound(node, ("input", "p", "training"), (None, 0.5, True))[2] is False else None
        if node.target in ATEN_DROPOUT:
            return first if bound(node, ("input", "p", "train"), (None, 0.5, True))[2] is False else None
        return None

    def _rewritten(self, node: fx.Node, effect: Effect) -> fx.Node | None:
        """The out-of-place call that has taken a node's place; None where the node stays."""
        target = effect.writes[0] if len(set(effect.writes)) == 1 else None
        form = None if target is None or effect.random or effect.fence else _out_of_place(self._gm, node)
        if target is None or form is None or self._memory[target] != {target} or not self._alone(target, node):
            return None
        function, args, kwargs = form
        if not _keeps_type(_name(function), target, args, kwargs):
            return None
        with self._graph.inserting_before(node):
            made = self._graph.call_function(function, args, kwargs)
        self._order[made] = place = self._order[node]
        made.meta = dict(target.meta)
        for user in list(target.users):
            if self._order[user] > place:
                user.replace_input_with(target, made)
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)
        return made

    def _alone(self, target: fx.Node, node: fx.Node) -> bool:
        """Whether no other value in the memory of ``target`` is read behind ``node``."""
        others = [other for other in self._holders[target] if other is not target]
        return all(self._order[user] < self._order[node] for other in others for user in other.users)


def _name(function: object) -> str:
    return getattr(function, "__name__", "").split(".")[0]


def _out_of_place(gm: fx.GraphModule, node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """The function, and its arguments, that computes new memory what a node computes in place."""
    args, kwargs, target = tuple(node.args), dict(node.kwargs), node.target
    if node.op == "call_module":
        found = _MODULES.get(type(gm.get_submodule(str(target))))
        module = gm.get_submodule(str(target))
        if found is None or len(args) != 1 or kwargs or has_hooks(module):
            return None
        return found[0], (*args, *(getattr(module, name) for name in found[1])), {}
    if node.op == "call_method":
        name = str(target)
        plain = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        return (plain, args, kwargs) if name.endswith("_") and not name.endswith("__") and plain is not None else None
    if isinstance(target, OpOverload):
        packet = getattr(torch.ops.aten, _name(target)[:-1], None) if target.namespace == "aten" else None
        same = packet is not None and _name(target).endswith("_") and target._overloadname in packet.overloads()
        return (getattr(packet, target._overloadname), args, kwargs) if same else None
    assert callable(target)
    if (plain := in_place_operator(target)) is not None:
        return plain, args, kwargs
    if "out" in kwargs:
        return target, args, {key: value for key, value in kwargs.items() if key != "out"}
    name = _name(target)
    if name.endswith("_"):
        plain = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        return None if plain is None else (plain, args, kwargs)
    return (target, *_without_inplace(target, args, kwargs)) if inplace_parameter(target) else None


def _without_inplace(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = list(inplace_parameter(function))
    place = names.index("inplace")
    return (*args[:place], *args[place + 1 :]), {key: value for key, value in kwargs.items() if key != "inplace"}


def _keeps_type(name: str, target: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operation ``name``, out of place, gives what fits into ``target``, in the same dtype."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node) and holds_tensors(a)]
    if name in _UNARY:
        return tensors == [target] and args[:1] == (target,)
    if name not in _BINARY or "rounding_mode" in kwargs:
        return False
    dtype, shape = dtype_of(target), shape_of(target)
    if dtype is None or shape is None or not dtype.is_floating_point:
        return False
    shapes = [shape_of(other) for other in tensors]
    known = all(found is not None and len(found) <= len(shape) for found in shapes) and any(
        same_shape(found, shape) for found in shapes if found
    )
    return known and all(dtype_of(other) == dtype for other in tensors)


_MODULES: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.SiLU: (F.silu, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Mish: (F.mish, ()),
    nn.SELU: (F.selu, ()),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.CELU: (F.celu, ("alpha",)),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.Threshold: (F.threshold, ("threshold", "value")),
}
"""Activations with an ``inplace`` attribute, as functions."""
__all__ = ["to_out_of_place"]
