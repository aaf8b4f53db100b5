"""What one call of a graph writes and aliases, read off the operators' schemas; what is not known may do anything.

Schemas say what ``torch.ops.*`` mutate and alias; functions and methods resolve to them by name. Where schemas keep silent
(composite operators that return their input, batch norm that updates statistics) the exceptions stand here.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from lcnn_compile.errors import ConversionError
from lcnn_compile.torch_private import (
    DISPATCHED,
    BatchNorm,
    ConvolutionBase,
    DropoutBase,
    InstanceNormBase,
    OpOverload,
    OpOverloadPacket,
    dispatched_operators,
    has_hooks,
    is_composite,
)


@dataclass(frozen=True)
class Effect:
    """What a call does besides computing values from its arguments.

    Attributes:
        writes: arguments whose memory it may write.
        aliases: arguments whose memory its result may be in.
        only_views: whether the result is certainly in the memory of ``aliases``.
        random: whether it draws random numbers.
        fence: whether nothing may move across it.
        impure: whether it must run though nobody reads it.
        reads, written: memory that is not an argument: that of a module's own tensors.
    """

    writes: tuple[fx.Node, ...] = ()
    aliases: tuple[fx.Node, ...] = ()
    only_views: bool = False
    random: bool = False
    fence: bool = False
    impure: bool = False
    reads: frozenset[Any] = field(default_factory=frozenset)
    written: frozenset[Any] = field(default_factory=frozenset)


_PURE = Effect()
_FRESH = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear", "matmul"),
    *("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm", "local_response_norm", "softmax", "log_softmax"),
    *("relu", "relu6", "silu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "mish"),
    *("sigmoid", "tanh", "logsigmoid", "softplus", "threshold", "prelu", "glu"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool2d", "boolean_dispatch"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("interpolate", "grid_sample", "embedding", "one_hot", "cross_entropy", "mse_loss", "scaled_dot_product_attention"),
    *("subtract", "multiply", "divide", "true_divide", "square", "concat", "concatenate", "hstack", "vstack", "where", "clip"),
    *("max", "min", "std", "var", "norm", "unfold", "fold", "size", "cumsum", "softmax", "normalize"),
}
"""Composite operators, and functions of torch.nn.functional, whose result is new memory unless they are told to work in place."""
_STATISTICS = {
    "batch_norm": "training",
    "native_batch_norm": "training",
    "cudnn_batch_norm": "training",
    "miopen_batch_norm": "training",
    "_batch_norm_impl_index": "training",
    "instance_norm": "use_input_stats",
}
"""Operators that update running_mean and running_var when this argument is true, which their schemas do not say."""
_RESHAPED_IN_PLACE = {
    *("unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_", "as_strided_"),
    *("set_data", "unsafe_set_", "rename_", "sparse_resize_", "sparse_resize_and_clear_"),
}
_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul")
}
_IN_PLACE_OPERATORS |= {
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
_IN_PLACE_OPERATORS |= {operator.ilshift: operator.lshift, operator.irshift: operator.rshift}
_NO_TENSOR = {
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "item",
        "tolist",
        "element_size",
        "is_contiguous",
    ),
    *("is_floating_point", "is_complex", "get_device", "__len__", "data_ptr"),
}
_ALWAYS_RANDOM = {"gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d", "fractional_max_pool2d_with_indices"}
_ONLY_IMPURE = {
    "_set_grad_enabled",
    "_assert",
    "_assert_async",
    "_check",
    "_check_is_size",
    "_assert_scalar",
    "_assert_tensor_metadata",
}
_PLAIN_MODULES = {"_operator", "operator", "builtins", "math", "torch.fx.experimental.sym_node", "torch.functional"}
_FRESH_MODULES = (
    nn.Linear,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.LeakyReLU,
    nn.ELU,
    nn.PReLU,
)
_RANDOM_MODULES = (
    DropoutBase,
    nn.RReLU,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
)


def in_place_operator(target: Any) -> Callable[..., Any] | None:
    """The out-of-place operator of ``operator.iadd`` and its like; None for anything else."""
    return _IN_PLACE_OPERATORS.get(target) if callable(target) else None


def holds_tensors(node: fx.Node) -> bool:
    """Whether a node's value may be or contain tensors."""
    if node.op == "call_method" and node.target in _NO_TENSOR:
        return False
    if (
        node.op == "call_function"
        and node.target is getattr
        and node.args[1:2] in (("shape",), ("device",), ("dtype",), ("ndim",))
    ):
        return False
    for key in ("example_value", "val"):
        if key in node.meta and node.meta[key] is not None:
            return _any_tensor(node.meta[key])
    return True


def _any_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_any_tensor(item) for item in value)
    return not isinstance(
        value, int | float | bool | complex | str | torch.SymInt | torch.SymFloat | torch.SymBool | torch.device | torch.dtype
    )


def storages_of(value: Any) -> frozenset[Any]:
    """The memory of a tensor, by its storage; none of anything else."""
    if not isinstance(value, Tensor):
        return frozenset()
    if value.layout != torch.strided:
        return frozenset([("tensor", id(value))])
    return frozenset([("storage", value.untyped_storage()._cdata)])


def effect_of(gm: fx.GraphModule, node: fx.Node) -> Effect:
    """The effect of a call node.

    Raises:
        ConversionError: for a call that changes the shape or storage of a tensor in place.
    """
    if node.op == "call_module":
        return _of_module(gm.get_submodule(str(node.target)), node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if str(name).split(".")[0] in _RESHAPED_IN_PLACE:
        raise ConversionError(
            f"{node.name}: {name} changes a tensor's shape or memory in place; lcnn's passes cannot follow that"
        )
    found = _of_method(node) if node.op == "call_method" else _of_function(node)
    out = _nodes(node.kwargs.get("out"))
    return found if not out else _with(found, writes=(*found.writes, *out), aliases=(*found.aliases, *out))


def _with(effect: Effect, **changes: Any) -> Effect:
    return Effect(**{**effect.__dict__, **changes})


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda node: found.append(node))
    return tuple(found)


def _opaque(node: fx.Node, own: frozenset[Any] = frozenset()) -> Effect:
    inputs = tuple(node.all_input_nodes)
    return Effect(writes=inputs, aliases=inputs, random=True, fence=True, impure=True, reads=own, written=own)


def _views(node: fx.Node) -> Effect:
    return Effect(aliases=tuple(node.all_input_nodes))


def _of_method(node: fx.Node) -> Effect:
    name = str(node.target)
    if name in _NO_TENSOR:
        return _PURE
    if name in ("__setitem__", "__delitem__") or name in {f"__{f.__name__.rstrip('_')}__" for f in _IN_PLACE_OPERATORS}:
        return Effect(writes=_nodes(node.args[:1]), aliases=_nodes(node.args[:1]), only_views=True)
    if name in ("backward", "register_hook", "retain_grad"):
        return _opaque(node)
    overloads = _overloads(getattr(torch.ops.aten, name, None))
    if overloads:
        return _of_schemas(node, overloads)
    if name.endswith("_") and not name.endswith("__"):
        return Effect(writes=_nodes(node.args[:1]), aliases=_nodes(node.args[:1]))
    return _views(node)


def _of_function(node: fx.Node) -> Effect:
    target: Any = node.target
    if isinstance(target, OpOverload):
        return _of_schemas(node, [target])
    if isinstance(target, OpOverloadPacket):
        return _of_schemas(node, _overloads(target))
    if target in _IN_PLACE_OPERATORS or target in (operator.setitem, operator.delitem):
        return Effect(writes=_nodes(node.args[:1]), aliases=_nodes(node.args[:1]), only_views=True)
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    if name in _ONLY_IMPURE:
        return Effect(impure=True)
    if target is getattr or target is operator.getitem:
        return Effect(aliases=_nodes(node.args[:1]), only_views=target is operator.getitem)
    if module == "torch.functional" or name in ("broadcast_tensors", "einsum"):
        return _views(node)
    if module in _PLAIN_MODULES and name not in ("print", "setattr", "delattr"):
        return _PURE
    if module in ("torch.nn.functional", DISPATCHED):
        return _of_functional(node, target, name)
    builtin = inspect.isbuiltin(target) or type(target).__name__ in ("method_descriptor", "wrapper_descriptor")
    overloads = _overloads(getattr(torch.ops.aten, name, None)) if builtin or getattr(torch, name, None) is target else ()
    if overloads:
        return _of_schemas(node, overloads)
    if (module == "torch" and name.startswith("sym_")) or target in (torch.tensor, torch.is_tensor) or module == math.__name__:
        return _PURE
    if target is torch.as_tensor:
        return _views(node)
    return _opaque(node)


def _of_functional(node: fx.Node, target: Any, name: str) -> Effect:
    """A Python function of torch.nn.functional: ``inplace`` and ``training`` tell what it does."""
    try:
        values = inspect.signature(target).bind(*node.args, **node.kwargs)
        values.apply_defaults()
        given = values.arguments
    except (TypeError, ValueError):
        given = dict(node.kwargs)
    first = _nodes(node.args[:1] or tuple(node.kwargs.values())[:1])
    writes: tuple[fx.Node, ...] = first if given.get("inplace", False) is not False else ()
    training = given.get("training", False) is not False
    flag = _STATISTICS.get(name)
    if flag is not None and given.get(flag, False) is not False:
        writes += _nodes((given.get("running_mean"), given.get("running_var")))
        training = False
    if given.get("max_norm") is not None:
        writes += _nodes(given.get("weight"))
    fresh = name in _FRESH and not writes
    random = training or name in _ALWAYS_RANDOM or name == "rrelu"
    in_place = bool(writes) and writes == first
    return Effect(writes, () if fresh else first if in_place else tuple(node.all_input_nodes), in_place, random)


@cache
def _overloads(packet: Any) -> tuple[Any, ...]:
    """The overloads that take tensors; those of TorchScript's own lists and numbers are not known to the dispatcher."""
    found = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return tuple(overload for overload in found if overload.name() in dispatched_operators())


def _of_schemas(node: fx.Node, overloads: Iterable[Any]) -> Effect:
    writes: list[fx.Node] = []
    aliases: list[fx.Node] = []
    random = impure = False
    only_views = True
    for overload in overloads:
        schema, base = overload._schema, overload._schema.name.split("::")[-1]
        given = {a.name: _given(node, i, a) for i, a in enumerate(schema.arguments)}
        if any(a.is_out for a in schema.arguments) and not any(a.is_out and a.name in node.kwargs for a in schema.arguments):
            continue
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                writes += _nodes(given[argument.name])
        returned = [r for r in schema.returns if r.alias_info is not None]
        if returned:
            aliases += [n for a in schema.arguments if a.alias_info is not None for n in _nodes(given[a.name])]
        elif base not in _FRESH and ("unsafe" in base or is_composite(overload.name())):
            aliases += node.all_input_nodes
        only_views &= len(returned) == len(schema.returns) > 0 and all(r.alias_info.is_write for r in returned)
        idle = given.get("train", given.get("training")) is False or ("dropout_p" in given and not given["dropout_p"])
        random |= torch.Tag.nondeterministic_seeded in overload.tags and not idle
        impure |= not schema.returns or base in _ONLY_IMPURE or base.startswith("_assert")
        flag = _STATISTICS.get(base)
        if flag is not None and given.get(flag) is not False:
            writes += _nodes((given.get("running_mean"), given.get("running_var")))
    return Effect(tuple(writes), tuple(aliases), only_views and bool(aliases), random, False, impure)


def _given(node: fx.Node, place: int, argument: Any) -> Any:
    """What a call passes for an argument of a schema; Python's names differ from the schema's for the first ("input", "self")."""
    if place < len(node.args):
        return node.args[place]
    if argument.name in node.kwargs:
        return node.kwargs[argument.name]
    written = argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
    return tuple(node.all_input_nodes) if written and not argument.has_default_value() else node.kwargs.get("input")


def _of_module(module: nn.Module, node: fx.Node) -> Effect:
    own = frozenset().union(*(storages_of(t) for t in (*module.parameters(), *module.buffers())))
    known = type(module).__module__.startswith(("torch.nn.modules.", "lcnn_compile.modules"))
    children = [m for m in module.modules() if has_hooks(m) or is_parametrized(m)]
    if (
        not known
        or children
        or (module is not node.graph.owning_module and any(True for _ in module.children()) and module.training)
    ):
        return _opaque(node, own)
    inputs = tuple(node.all_input_nodes)
    writes = inputs[:1] if getattr(module, "inplace", False) else ()
    written: frozenset[Any] = frozenset()
    statistics = isinstance(module, BatchNorm | InstanceNormBase)
    if (module.training and statistics) or getattr(module, "max_norm", None) is not None:
        written = own
    random = module.training and isinstance(module, _RANDOM_MODULES)
    fresh = isinstance(module, (*_FRESH_MODULES, ConvolutionBase, BatchNorm)) or "lcnn_compile" in type(module).__module__
    return Effect(writes, () if fresh and not writes else inputs, False, random, False, False, own, written)


def inplace_parameter(target: Any) -> tuple[str, ...]:
    """The names of a function's arguments where ``inplace`` is one of them; none elsewhere."""
    if getattr(target, "__module__", "") != F.__name__:
        return ()
    try:
        names = tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return ()
    return names if "inplace" in names else ()
