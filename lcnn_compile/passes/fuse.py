"""Pass: fuse what follows a lookup convolution (an activation, a residual addition) into its epilogue."""

from __future__ import annotations

import operator

from torch import fx

from lcnn_compile.kernels.operator import lookup_conv2d_inference
from lcnn_compile.passes.effects import Effects
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.functional import to_functional
from lcnn_compile.passes.targets import ADD, RESHAPES, activation_of, bound, dtype_of, shape_of


def fuse_epilogues(gm: fx.GraphModule) -> fx.GraphModule:
    """Fuse relu, relu6, silu, hardswish and residual additions into the lookup convolutions before them (inference only).

    ``activation(conv(x) + residual)`` and ``activation(conv(x)) + residual`` are both recognised. A residual is fused only
    where shapes and dtypes are known (tracing by Dynamo or export leaves them, ``ShapeProp`` adds them) and equal. Every lookup
    convolution becomes a call of ``lookup_conv2d_inference``. The graph is changed in place and returned.
    """
    to_functional(gm)
    effects = Effects(gm)
    for node in list(gm.graph.nodes):
        if is_lookup(node):
            node.target = lookup_conv2d_inference
        elif activation_of(node) and not effects.written(node):
            _hoist(gm, effects, node)
    effects = Effects(gm)
    # Last ones first: where two convolutions are added, the later one takes the other as its residual, and neither moves far.
    for node in reversed(list(gm.graph.nodes)):
        if is_lookup(node) and len(node.args) <= 14 and not set(node.kwargs) & {"activation", "residual"}:
            fuse_epilogue(gm, effects, node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _hoist(gm: fx.GraphModule, effects: Effects, node: fx.Node) -> None:
    """Let an activation come before the views of its input, where a lookup convolution comes before those."""
    view = node.args[0] if node.args else None
    while isinstance(view, fx.Node) and view.target in RESHAPES and len(view.users) == 1:
        source = view.args[0]
        if not isinstance(source, fx.Node) or not effects.movable(view, node):
            return
        node.replace_input_with(view, source)
        node.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)  # noqa: B023
        view.replace_input_with(source, node)
        view.meta, node.meta = dict(node.meta), dict(source.meta)
        node.append(view)
        view = source


def fuse_epilogue(gm: fx.GraphModule, effects: Effects, conv: fx.Node) -> fx.Node:
    """Give a convolution what follows it as keyword arguments ``activation``, ``residual``, ``residual_last``; its new node."""
    activation, residual, residual_last = "none", None, False
    chain = [conv]
    while len(chain[-1].users) == 1:
        last, user = chain[-1], next(iter(chain[-1].users))
        # All is computed where the last one stands: no write in between may change what the others read.
        if not all(effects.movable(node, user, chain) for node in chain):
            break
        name = activation_of(user)
        if name and activation == "none" and user.args[:1] == (last,) and not residual_last:
            activation = name
        elif residual is None and (other := _added(user, last)) is not None:
            residual, residual_last = other, activation != "none"
        else:
            break
        chain.append(user)
    last = chain[-1]
    if last is conv:
        return conv
    kwargs = {**conv.kwargs, "activation": activation}
    if residual is not None:
        kwargs |= {"residual": residual, "residual_last": residual_last}
    with gm.graph.inserting_before(last):
        fused = gm.graph.call_function(conv.target, conv.args, kwargs)  # type: ignore[arg-type]
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    for node in reversed(chain):
        gm.graph.erase_node(node)
    return fused


def _added(user: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other operand where ``user`` adds a tensor of the same shape and dtype to ``value``, in place or not."""
    if user.op not in ("call_function", "call_method") or user.target not in ADD or "out" in user.kwargs:
        return None
    left, right, alpha = bound(user, ("input", "other", "alpha"), (None, None, 1))
    other = right if left is value else left
    in_place = user.target is operator.iadd or str(getattr(user.target, "__name__", user.target)).split(".")[0].endswith("_")
    if alpha != 1 or not isinstance(other, fx.Node) or other is value or (in_place and left is not value):
        return None
    known = shape_of(value), dtype_of(value)
    if None in known or known != (shape_of(other), dtype_of(other)):
        return None
    return other
