"""Pass: turn convolutions called as functions on a parameter into modules, so that they can be replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from lcnn_compile.geometry import kind_of
from lcnn_compile.modules import FunctionalWeight
from lcnn_compile.modules.calls import has_module, make_conv, settings_of
from lcnn_compile.passes.effects import mark_written
from lcnn_compile.passes.targets import CONVOLUTION, attribute, bound, convolution_of, is_get_attr, shape_of
from lcnn_compile.torch_private import children_of, tensor_names

_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_GENERAL = (*_PLAIN[:6], "transposed", "output_padding", "groups")
_SETTINGS = ("stride", "padding", "output_padding", "dilation", "groups")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1, "transposed": False}


def _convolution(gm: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """The function's name and arguments of a convolution node on known weights; None where something is computed."""
    function = convolution_of(node)
    if function is None and not (node.op == "call_function" and node.target in CONVOLUTION):
        return None
    names = _GENERAL if function is None else _TRANSPOSED if function.startswith("conv_transpose") else _PLAIN
    values = dict(zip(names, bound(node, names, [_DEFAULTS.get(name) for name in names]), strict=True))
    found = {"output_padding": 0, **values}
    static = all(
        not isinstance(v, fx.Node) for key in ("stride", "padding", "output_padding", "dilation") for v in _flat(found[key])
    )
    known = is_get_attr(found["weight"]) and (found["bias"] is None or is_get_attr(found["bias"]))
    if not static or not known or not isinstance(found["groups"], int):
        return None
    dimensions = attribute(gm, found["weight"].target).dim() - 2
    if function is None:
        function = f"conv{'_transpose' if values['transposed'] else ''}{dimensions}d"
    shape = shape_of(found["input"])
    # A graph without shapes is for batches.
    missing = 0 if shape is None else dimensions + 2 - len(shape)
    return {**found, "function": function, "single": missing == 1} if has_module(function) and missing in (0, 1) else None


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def lift_functional_convolutions(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every convolution called on get_attr weights by a call of a new module: ``nn.Conv2d``, ``nn.Conv1d`` and so on.

    It is named as the owner of its weight where that is a bare container, else after the weight and the function, as in
    "kernel_conv2d". The graph is changed in place and returned. Two calls with the same weight and geometry share one
    module. Convolutions whose weight or geometry is computed in the graph are left as they are. Calls on a
    :class:`~lcnn_compile.modules.FunctionalWeight` become calls of its layers.
    """
    mark_written(gm)
    made: dict[tuple[Any, ...], str] = {}
    for node in list(gm.graph.nodes):
        found = _convolution(gm, node)
        if found is None:
            continue
        weight, bias = str(found["weight"].target), None if found["bias"] is None else str(found["bias"].target)
        key = (found["function"], weight, bias, *(str(found[name]) for name in _SETTINGS))
        taken = attribute(gm, weight)
        if isinstance(taken, FunctionalWeight):
            layer = taken.layer_of(settings_of(found["function"], found), None if bias is None else attribute(gm, bias))
            if layer is None or (bias is not None and layer not in taken.biased):
                continue
            made[key] = f"{weight}.{layer}"
        if key not in made:
            made[key] = _name(gm, found["function"], weight, bias)
            tensors = attribute(gm, weight), None if bias is None else attribute(gm, bias)
            conv = make_conv(found["function"], *tensors, **{name: found[name] for name in _SETTINGS})
            gm.add_submodule(made[key], conv.train(gm.training))
        with gm.graph.inserting_before(node):
            if found["single"]:
                call = _call_on_one(gm, made[key], found["input"], node)
            else:
                call = gm.graph.call_module(made[key], (found["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    if made:
        _drop_dead_attributes(gm, set(made.values()))
        gm.graph.lint()
        gm.recompile()
    return gm


def _call_on_one(gm: fx.GraphModule, name: str, x: fx.Node, node: fx.Node) -> fx.Node:
    """Nodes that call a module on one image as on a batch of one, in place of ``node``."""
    batch = gm.graph.call_method("unsqueeze", (x, 0))
    result = gm.graph.call_module(name, (batch,))
    for made, source in ((batch, x), (result, node)):
        made.meta = {
            key: value.unsqueeze(0) if isinstance(value, Tensor) else value
            for key, value in source.meta.items()
            if key in ("example_value", "val")
        }
    return gm.graph.call_method("squeeze", (result, 0))


def _name(gm: fx.GraphModule, function: str, weight: str, bias: str | None) -> str:
    """The new module's name: the owner of weight and bias where it is a bare container of just these, else a new name."""
    owner, _, key = weight.rpartition(".")
    container = gm.get_submodule(owner)
    own = {f"{owner}.{name}" for name in tensor_names(container)}
    bare = owner and type(container) is nn.Module and not children_of(container)
    if bare and key == "weight" and own == {weight, bias or weight} and bias in (None, f"{owner}.bias"):
        return owner
    if kind_of(container) is not None:
        # A second convolution on a weight whose owner has become the first one.
        weight = owner
    taken = {name for name, _ in gm.named_modules()}
    name, number = f"{weight}_{function}", 1
    while name in taken:
        name, number = f"{weight}_{function}_{number}", number + 1
    return name


def _drop_dead_attributes(gm: fx.GraphModule, modules: set[str]) -> None:
    """Erase get_attr nodes without users, and the attributes that nothing reads any more, but for those of ``modules``."""
    dead = [node for node in gm.graph.nodes if node.op == "get_attr" and not node.users]
    for node in dead:
        gm.graph.erase_node(node)
    read = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for target in {str(node.target) for node in dead} - read:
        parent, _, name = target.rpartition(".")
        owner = gm.get_submodule(parent)
        if parent in modules:
            continue
        if name in tensor_names(owner):
            delattr(owner, name)
