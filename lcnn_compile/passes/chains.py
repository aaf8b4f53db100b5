"""Pass: on a GPU in half precision, lookup convolutions become chains that hand S, not their output, to the next one."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from lcnn_compile.kernels import reference
from lcnn_compile.kernels.triton.chain_operator import HALVES, WIDEST, chain
from lcnn_compile.kernels.triton.chain_pack import Chain, pack_bias, pack_next, pack_weight, pad_rows
from lcnn_compile.passes.decompose import has_constant_weight
from lcnn_compile.passes.effects import Effects
from lcnn_compile.passes.find import arguments_of, is_lookup, weight_of
from lcnn_compile.passes.fold import add_attribute
from lcnn_compile.passes.functional import NO_EPILOGUE
from lcnn_compile.passes.fuse import fuse_epilogue
from lcnn_compile.passes.targets import CONV2D, attribute, bound, example, is_get_attr, shape_of

EPILOGUE = ("activation", "residual", "residual_last")


def chain_lookups(gm: fx.GraphModule, device: str | None = None) -> fx.GraphModule:
    """Rewrite lookup convolutions as calls of ``lcnn::chain``, S of the next one formed where the output before it is formed.

    Each becomes S = D ∗ x and a convolution of S with P, its epilogue included. Where x is the output of such a convolution, and
    nothing writes to it in between, that one forms S, and writes x only if somebody else reads it. Dense convolutions of the same
    graph become calls too, so that bias, activation and residual cost no pass of their own and S can come from them; a bias of
    the convolution whose output is the residual moves into the bias of the sum. For inference, in half precision but not under autocast, on a GPU (or on
    ``device``, to try it), batches in channels_last and sizes that are known; whatever else there is stays as it is. Needs
    :func:`fuse_epilogues` before. The graph is changed in place and returned.
    """
    where = device or "cuda"
    rounds = torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where)
    if rounds or any("autocast" in str(node.target) for node in gm.graph.nodes):
        return gm
    nodes = [node for node in gm.graph.nodes if is_lookup(node) and _can(gm, node, device)]
    if not nodes:
        return gm
    products = [_rewrite(gm, node) for node in nodes]
    effects = Effects(gm)
    for node in reversed(list(gm.graph.nodes)):
        if node.target in CONV2D and _is_plain(gm, node, device):
            _rewrite_dense(gm, fuse_epilogue(gm, effects, node))
    effects = Effects(gm)
    for product in products:
        _join(gm, effects, product)
    for node in list(gm.graph.nodes):
        if node.target is chain:
            _take_bias(gm, node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _reads(gm: fx.GraphModule, x: Any, device: str | None) -> torch.dtype | None:
    """The dtype of a value that the operator may read; None for any other."""
    found = example(x) if isinstance(x, fx.Node) else None
    if found is None or found.device.type != (device or "cuda") or found.dtype not in HALVES or not _last(gm, x):
        return None
    shape = shape_of(x)
    fixed = shape is not None and len(shape) == 4 and all(type(size) is int and size for size in shape)
    return found.dtype if fixed else None


def _can(gm: fx.GraphModule, node: fx.Node, device: str | None) -> bool:
    call = arguments_of(node)
    dtype = _reads(gm, call.input, device)
    if call.lowering != "lookup" or dtype is None or not has_constant_weight(node):
        return False
    dictionary = weight_of(gm, node).dictionary
    fixed = all(type(size) is int for sizes in call.geometry[1:4] for size in sizes)
    few = dictionary.shape[0] == 1 and -(-dictionary.shape[1] // 16) * 16 <= WIDEST
    return few and fixed and not reference.skips_pixels(call.geometry) and dictionary.dtype == dtype


def _last(gm: fx.GraphModule, x: fx.Node) -> bool:
    """Whether the network works in channels_last: the value or an input of the graph has that form and no other."""
    values = [example(node) for node in (x, *gm.graph.find_nodes(op="placeholder"))]
    return any(v is not None and v.dim() == 4 and reference.output_format(v) == torch.channels_last for v in values)


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replace a lookup convolution by two calls of the operator; the first of them, which forms S."""
    call, weight = arguments_of(node), weight_of(gm, node)
    x, geometry, dictionary = cast(Any, call.input), call.geometry, weight.dictionary
    bias, residual, activation, residual_last = cast(Any, call.epilogue)
    size, planes = dictionary.shape[1], -(-dictionary.shape[1] // 16) * 16
    with torch.no_grad():
        lookups = reference.lookup_tensor(*weight.lookups, geometry.out_channels, size, geometry.kernel_size)
        vectors = pad_rows(dictionary[0].detach(), 16)
        packed = pack_weight(pad_rows(lookups.transpose(0, 1), 16).transpose(0, 1))
        first = pack_weight(vectors[:, :, None, None])
        shift = None if bias is None else pack_bias(attribute(gm, cast(fx.Node, bias).target).detach())
    d, p = add_attribute(gm, node, "dictionary", first), add_attribute(gm, node, "lookups", packed)
    b = None if shift is None else add_attribute(gm, node, "bias", shift)
    point = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), "none", False, True)
    with gm.graph.inserting_before(node):
        product = gm.graph.call_function(chain, (x, d, None, None, None, planes, 0, *point))
        s = gm.graph.call_function(operator.getitem, (product, 0))
        epilogue = (activation, residual_last, True)
        convolution = gm.graph.call_function(chain, (s, p, b, residual, None, geometry.out_channels, 0, *geometry[1:], *epilogue))
        y = gm.graph.call_function(operator.getitem, (convolution, 0))
    product.meta["lcnn_vectors"] = vectors
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    gm.graph.erase_node(node)
    return product


def _dense_settings(node: fx.Node) -> list[Any]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return bound(node, names, (None, None, None, 1, 0, 1, 1))


def _pair(value: Any) -> tuple[Any, Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0], values[-1]


def _is_plain(gm: fx.GraphModule, node: fx.Node, device: str | None) -> bool:
    """Whether a dense convolution may become a call: constant weights, one group, padding in numbers."""
    x, weight, bias, *settings, groups = _dense_settings(node)
    fixed = all(type(number) is int for value in settings for number in _pair(value))
    known = is_get_attr(weight) and (bias is None or is_get_attr(bias))
    dtype = _reads(gm, x, device)
    return fixed and known and groups == 1 and dtype is not None and attribute(gm, weight.target).dtype == dtype


def _rewrite_dense(gm: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, _ = _dense_settings(node)
    filters: Tensor = attribute(gm, weight.target).detach()
    top, left = _pair(padding)
    window = (tuple(filters.shape[2:]), _pair(stride), (top, top, left, left), _pair(dilation))
    with torch.no_grad():
        w = add_attribute(gm, node, "filters", pack_weight(filters))
        b = None if bias is None else add_attribute(gm, node, "bias", pack_bias(attribute(gm, bias.target).detach()))
    activation, residual, last = (node.kwargs.get(key, default) for key, default in zip(EPILOGUE, NO_EPILOGUE, strict=True))
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(chain, (x, w, b, residual, None, filters.shape[0], 0, *window, activation, last, True))
        y = gm.graph.call_function(operator.getitem, (call, 0))
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    gm.graph.erase_node(node)


def _given(node: fx.Node, name: str) -> Any:
    return node.args[Chain._fields.index(name)]


def _set(node: fx.Node, **values: Any) -> None:
    node.args = tuple(values.get(name, value) for name, value in zip(Chain._fields, node.args, strict=True))


def _join(gm: fx.GraphModule, effects: Effects, product: fx.Node) -> None:
    """Let the chain whose output ``product`` multiplies form the product, if there is one and it forms none yet."""
    vectors = product.meta.pop("lcnn_vectors")
    y = cast(fx.Node, product.args[0])
    call = y.args[0] if y.target is operator.getitem and y.args[1] == 0 else None
    if not isinstance(call, fx.Node) or call.target is not chain or _given(call, "next") is not None:
        return
    step = call.next
    while step is not product:
        if effects.conflict(step, product):
            return
        step = step.next
    [s] = product.users
    with torch.no_grad():
        matrix = add_attribute(gm, call, "next", pack_next(vectors))
    with gm.graph.inserting_after(call):
        made = gm.graph.call_function(operator.getitem, (call, 1))
    made.meta = dict(s.meta)
    s.replace_all_uses_with(made)
    gm.graph.erase_node(s)
    gm.graph.erase_node(product)
    _set(call, next=matrix, next_channels=vectors.shape[0], keep=bool(y.users))
    if not y.users:
        gm.graph.erase_node(y)


def _take_bias(gm: fx.GraphModule, call: fx.Node) -> None:
    """Add the bias of the convolution that makes the residual to the chain's own, where the two are added at once."""
    item, bias = _given(call, "residual"), _given(call, "bias")
    if (
        not isinstance(item, fx.Node)
        or item.target is not operator.getitem
        or _given(call, "residual_last")
        or len(item.users) > 1
    ):
        return
    conv = cast(fx.Node, item.args[0])
    if conv.target is not chain or item.args[1] != 0 or len(conv.users) > 1 or _given(conv, "bias") is None:
        return
    if _given(conv, "activation") != "none" or _given(conv, "residual") is not None:
        return
    with torch.no_grad():
        total = attribute(gm, _given(conv, "bias").target).double()
        total = total if bias is None else total + attribute(gm, bias.target).double()
    like = attribute(gm, _given(conv, "bias").target)
    _set(call, bias=add_attribute(gm, call, "bias", total.to(like.dtype)))
    _set(conv, bias=None)
