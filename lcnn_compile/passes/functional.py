"""Pass: rewrite the modules that the other passes work on as function calls on get_attr nodes, one form for every graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lcnn_compile.modules import LOOKUP_KINDS, LookupConvTranspose, LookupModule
from lcnn_compile.passes.effects import mark_written
from lcnn_compile.passes.find import is_lookup, precision_of, ranges_of
from lcnn_compile.passes.in_place import to_out_of_place
from lcnn_compile.passes.targets import attribute, example
from lcnn_compile.torch_private import FakeTensor, has_hooks, pads_of

NO_EPILOGUE = ("none", None, False)
Emit = Callable[[fx.Graph, str, nn.Module, fx.Node], fx.Node]


def _attr(graph: fx.Graph, name: str, module: nn.Module, key: str) -> fx.Node | None:
    return None if getattr(module, key) is None else graph.get_attr(f"{name}.{key}" if name else key)


def _conv(graph: fx.Graph, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
    conv: Any = module
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        x = graph.call_function(F.pad, (x, pads_of(conv)), {"mode": conv.padding_mode})
        padding = (0,) * len(conv.kernel_size)
    weight, bias = _attr(graph, name, module, "weight"), _attr(graph, name, module, "bias")
    return graph.call_function(CALLS[type(module)], (x, weight, bias, conv.stride, padding, conv.dilation, conv.groups))


def _transposed(graph: fx.Graph, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
    conv: Any = module
    weight, bias = _attr(graph, name, module, "weight"), _attr(graph, name, module, "bias")
    rest = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    return graph.call_function(CALLS[type(module)], (x, weight, bias, *rest))


def _lookup(graph: fx.Graph, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
    """The operations of the module's own forward."""
    copied: dict[fx.Node, fx.Node] = {}
    last = x
    fixed = {"output_size": None} if isinstance(module, LookupConvTranspose) else None
    for node in fx.Tracer().trace(module, fixed).nodes:
        if node.name.startswith("_assert_is_none"):
            continue  # of the output size, which nobody passes here
        if node.op == "placeholder":
            if not copied:
                copied[node] = x
        elif any(source not in copied for source in node.all_input_nodes):
            continue  # what the tracer asserts of arguments that are fixed
        elif node.op == "get_attr":
            # Not graph.get_attr, which warns of tables: they are neither parameters nor buffers.
            copied[node] = graph.create_node("get_attr", f"{name}.{node.target}" if name else str(node.target))
        elif node.op == "output":
            last = copied[node.args[0]]
        elif node.users:  # the tracer asserts, unused, that an argument fixed above is given so; here nobody can give another
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return last


def _batch_norm(graph: fx.Graph, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
    assert isinstance(module, nn.BatchNorm2d)
    keys = ("running_mean", "running_var", "weight", "bias")
    return graph.call_function(F.batch_norm, (x, *(_attr(graph, name, module, k) for k in keys), False, 0.0, module.eps))


def _activation(function: Any) -> Emit:
    return lambda graph, name, module, x: graph.call_function(function, (x,))


CALLS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
}
EMITTERS: dict[type[nn.Module], Emit] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    **dict.fromkeys(LOOKUP_KINDS.values(), _lookup),
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _activation(F.relu),
    nn.ReLU6: _activation(F.relu6),
    nn.SiLU: _activation(F.silu),
    nn.Hardswish: _activation(F.hardswish),
}


def to_functional(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite calls of convolutions, lookup modules, BatchNorm2d (in eval mode) and activations as function calls.

    The graph is changed in place and returned; parameters stay where they are. Inputs of convolutions must be batched.
    What works in place becomes out of place where nothing can tell the difference (see :func:`to_out_of_place`), else it stays as
    it is; attributes that the graph writes are marked, so that no pass takes them for constants. Calls of the lookup operator without an epilogue do not mention one, whether the tracer wrote its defaults or not.
    """
    to_out_of_place(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            _leave_out_defaults(node)
            continue
        module = gm.get_submodule(node.target)
        emit = EMITTERS.get(type(module))
        x = node.args[0] if node.args else None
        if emit is None or not isinstance(x, fx.Node) or len(node.args) > 1 or node.kwargs or _hooked(module):
            continue
        if getattr(module, "inplace", False):
            continue
        if isinstance(module, nn.BatchNorm2d) and (module.training or module.running_mean is None):
            continue
        with gm.graph.inserting_before(node):
            call = emit(gm.graph, node.target, module, x)
        if isinstance(module, LookupModule):
            _note_examples(gm, call, x)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    mark_written(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _leave_out_defaults(node: fx.Node) -> None:
    """A lookup's epilogue is not named where there is none, and its precision only where it is not float32."""
    if not is_lookup(node) or tuple(node.args[14:17]) != NO_EPILOGUE[: len(node.args) - 14]:
        return
    precision, ranges = precision_of(node), ranges_of(node)
    node.args = node.args[:14]
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("precision", "ranges")}
    kwargs = kwargs if precision == "float32" else {**kwargs, "precision": precision}
    node.kwargs = kwargs if ranges is None else {**kwargs, "ranges": ranges}


def _note_examples(gm: fx.GraphModule, last: fx.Node, first: fx.Node) -> None:
    """Leave fake tensors on the nodes that a module has become, from ``first`` to ``last``, where sizes are known and fixed."""
    start = example(first)
    if not isinstance(start, FakeTensor) or not all(isinstance(size, int) for size in start.shape):
        return
    values: dict[fx.Node, Any] = {first: start}

    def value(node: fx.Node) -> Any:
        if node not in values:
            if node.op == "get_attr":
                values[node] = start.fake_mode.from_tensor(attribute(gm, node.target), static_shapes=True)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                call = getattr(args[0], node.target) if isinstance(node.target, str) else node.target
                values[node] = call(*(args[1:] if isinstance(node.target, str) else args), **kwargs)
            if isinstance(values[node], torch.Tensor):
                node.meta["example_value"] = values[node]
        return values[node]

    with start.fake_mode:
        value(last)


def _hooked(module: nn.Module) -> bool:
    return has_hooks(module)
