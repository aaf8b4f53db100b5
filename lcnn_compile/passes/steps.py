"""Which nodes of a graph a program can run, and as what steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.bytes_lowering import unpack_ranges
from lcnn_compile.kernels.cpu.byte_recipe import Unrounded
from lcnn_compile.kernels.cpu.forward import POSITIONS
from lcnn_compile.kernels.cpu.steps import Linear, LookUp, Pool, View, Window
from lcnn_compile.passes.convolution_steps import convolving
from lcnn_compile.passes.elementwise_steps import elementwise
from lcnn_compile.passes.find import is_lookup, precision_of, ranges_of
from lcnn_compile.passes.moving_steps import moving
from lcnn_compile.passes.pooling_steps import pooling
from lcnn_compile.passes.reduction_steps import reducing
from lcnn_compile.passes.resampling_steps import resampling
from lcnn_compile.passes.step_form import Emit, Form, Values, is_plain, is_value
from lcnn_compile.passes.targets import LINEAR, RESHAPES, aten, attribute, bound, example, is_get_attr, same_shape, shape_of

VIEWS = (
    *(*RESHAPES, "view_as", "reshape_as", aten.view_as.default, aten.reshape_as.default),
    *("contiguous", "detach", "float", "to", "type_as"),
    *(
        aten.contiguous.default,
        aten.detach.default,
        aten.alias.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.type_as.default,
    ),
)
"""Calls whose value, float32 on the CPU as their input's is, has the input's elements in their order."""
DROPOUT = (F.dropout, F.dropout2d, aten.dropout.default)
REDUCTIONS = {
    **dict.fromkeys(("mean", torch.mean, aten.mean.dim), True),
    **dict.fromkeys(("amax", torch.amax, aten.amax.default), False),
}
LARGEST_LINEAR = 1 << 25
"""Elements of a linear layer's weight up to which it is run in a program: its weight is copied, and where there are many images a GEMM is faster."""
WEIGHT_AND_GEOMETRY = (
    *("input", "dictionary", "coefficients", "indices", "positions", "offsets", "filters", "bias"),
    *("out_channels", "kernel_size", "stride", "padding", "dilation"),
)


def steps_of(gm: fx.GraphModule, node: fx.Node) -> Form | None:
    """How a program computes a node's value; None where it cannot.

    Shapes must be known, the batch may be symbolic.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    found = example(node)
    if found is None or not is_plain(found):
        return None
    if is_lookup(node):
        return _lookup(gm, node)
    return (
        elementwise(gm, node)
        or moving(node)
        or _of_one(gm, node)
        or reducing(gm, node)
        or resampling(node)
        or pooling(node)
        or convolving(gm, node)
    )


def _of_one(gm: fx.GraphModule, node: fx.Node) -> Form | None:
    """What reads one value, its first argument."""
    x = node.args[0] if node.args else None
    shape, out = shape_of(x) if is_value(x) else None, shape_of(node)
    if not is_value(x) or not shape or not out:
        return None
    if node.target in VIEWS or (node.target in DROPOUT and bound(node, ("x", "p", "training"), (None, 0.5, True))[2] is False):
        return _view(x, shape, out)
    if not same_shape(shape[:1], out[:1]):
        return None
    if node.target in LINEAR:
        return _linear(gm, node, shape)
    if len(shape) == 4 and node.target in REDUCTIONS:
        return _reduction(node, x, out)
    return None


def _step(x: fx.Node, make: Callable[[int], Any], view: bool = False) -> Form:
    return Form((x,), lambda emit, values: emit(make(values[0])), view)


def _view(x: fx.Node, shape: tuple[Any, ...], out: tuple[Any, ...]) -> Form | None:
    tail = tuple(out[1:])
    if not all(isinstance(v, int) for v in tail):
        return None
    try:
        known = same_shape(View(0, tail).shape([shape]), out)
    except KernelError:
        return None
    return _step(x, lambda v: View(v, tail), view=True) if known else None


def _reduction(node: fx.Node, x: fx.Node, out: tuple[Any, ...]) -> Form | None:
    dims = bound(node, ("input", "dim"), (None, None))[1]
    if not isinstance(dims, list | tuple) or sorted(d % 4 for d in dims) != [2, 3] or node.kwargs.get("dtype") is not None:
        return None
    window, tail = Window(REDUCTIONS[node.target]), tuple(out[1:])
    if len(out) == 4:
        return _step(x, lambda v: Pool(v, window))
    if not all(isinstance(v, int) for v in tail):
        return None
    return Form((x,), lambda emit, values: emit(View(emit(Pool(values[0], window)), tail)))


def _epilogue(node: fx.Node) -> list[Any]:
    """lowering, activation, residual, residual_last."""
    names = ("lowering", "activation", "residual", "residual_last", "precision", "ranges")
    defaults = ("lookup", "none", None, False, "float32", None)
    return bound(node, (*WEIGHT_AND_GEOMETRY, *names), (*[None] * len(WEIGHT_AND_GEOMETRY), *defaults))[-6:-2]


def _lookup(gm: fx.GraphModule, node: fx.Node) -> Form | None:
    args = node.args
    lowering, activation, residual, residual_last = _epilogue(node)
    ranges = ranges_of(node)
    if (lowering != "lookup" and ranges is None) or len(args) < len(WEIGHT_AND_GEOMETRY):
        return None
    bias = args[7]
    if ranges is not None and not is_get_attr(ranges):
        return None
    if not all(is_get_attr(a) for a in args[1:7]) or not (bias is None or is_get_attr(bias)):
        return None
    out_channels, *geometry = cast("tuple[Any, ...]", args[8:13])
    if not isinstance(out_channels, int) or not all(isinstance(v, int) for values in geometry for v in values):
        return None
    groups, _, per_group = attribute(gm, args[1].target).shape  # type: ignore[union-attr]
    kernel_size, stride, padding, dilation = (tuple(values) for values in geometry)
    if math.prod(kernel_size) > POSITIONS:
        return None
    sizes = (groups * per_group, out_channels, kernel_size, stride, padding, dilation)
    inputs = (args[0],) if residual is None else (args[0], residual)
    if not all(is_value(x) for x in inputs):
        return None
    epilogue = (activation, bool(residual_last))

    def build(emit: Emit, values: Values) -> int:
        weight = tuple(attribute(gm, cast(fx.Node, a).target) for a in args[1:7])
        precision = precision_of(node)
        packed: Any = None
        if ranges is not None:
            packed = Unrounded(weight, kernel_size, *unpack_ranges(attribute(gm, ranges.target), weight[0]))
        else:
            packed = cpu.packed_weight(weight, kernel_size, "float32" if precision == "int8" else precision)
        found = None if bias is None else attribute(gm, cast(fx.Node, bias).target)
        own = None if found is None else found.detach().to(torch.float32).contiguous()
        return emit(LookUp(values[0], None if residual is None else values[1], *sizes, *epilogue), packed, own)

    return Form(cast("tuple[fx.Node, ...]", inputs), build)


def _linear(gm: fx.GraphModule, node: fx.Node, shape: tuple[Any, ...]) -> Form | None:
    x, weight, bias = bound(node, ("input", "weight", "bias"), (None, None, None))
    if not is_get_attr(weight) or not (bias is None or is_get_attr(bias)) or len(shape) < 2 or not isinstance(shape[-1], int):
        return None
    found = (attribute(gm, weight.target), None if bias is None else attribute(gm, bias.target))
    if found[0].dim() != 2 or not 0 < found[0].numel() <= LARGEST_LINEAR or any(t is not None and not is_plain(t) for t in found):
        return None
    out_features, in_features = found[0].shape
    return Form((x,), lambda emit, values: emit(Linear(values[0], in_features, out_features), *found))
