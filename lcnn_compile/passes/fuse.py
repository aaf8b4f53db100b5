"""Pass: fuse what follows a lookup convolution (an activation, a residual addition) into its epilogue."""

from __future__ import annotations

from torch import fx

from lcnn_compile.kernels.ops import lookup_conv2d_inference
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.functional import dtype_of, shape_of, to_functional
from lcnn_compile.passes.targets import ADD, RESHAPES, activation_of, bound


def fuse_epilogues(gm: fx.GraphModule) -> fx.GraphModule:
    """Fuse relu, relu6, silu, hardswish and residual additions into the lookup convolutions before them (inference only).

    ``activation(conv(x) + residual)`` and ``activation(conv(x)) + residual`` are both recognised. A residual is fused only
    where shapes and dtypes are known (tracing by Dynamo or export leaves them, ``ShapeProp`` adds them) and equal. Every lookup
    convolution becomes a call of ``lookup_conv2d_inference``. The graph is changed in place and returned.
    """
    to_functional(gm)
    for node in list(gm.graph.nodes):
        if is_lookup(node):
            node.target = lookup_conv2d_inference
        elif activation_of(node):
            _hoist(gm, node)
    for node in list(gm.graph.nodes):
        if is_lookup(node) and len(node.args) <= 14 and not set(node.kwargs) & {"activation", "residual"}:
            _fuse(gm, node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _hoist(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let an activation come before the views of its input, where a lookup convolution comes before those."""
    view = node.args[0] if node.args else None
    while isinstance(view, fx.Node) and view.target in RESHAPES and len(view.users) == 1 and not writes(node):
        source = view.args[0]
        if not isinstance(source, fx.Node):
            return
        node.replace_input_with(view, source)
        node.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)  # noqa: B023
        view.replace_input_with(source, node)
        view.meta, node.meta = dict(node.meta), dict(source.meta)
        node.append(view)
        view = source


def _fuse(gm: fx.GraphModule, conv: fx.Node) -> None:
    activation, residual, residual_last = "none", None, False
    last = conv
    while len(last.users) == 1:
        user = next(iter(last.users))
        name = activation_of(user)
        if name and activation == "none" and user.args[:1] == (last,) and not residual_last:
            activation = name
        elif residual is None and (other := _added(user, last)) is not None and _movable(conv, user, last):
            residual, residual_last = other, activation != "none"
        else:
            break
        last = user
    if last is conv:
        return
    kwargs = {**conv.kwargs, "activation": activation}
    if residual is not None:
        kwargs |= {"residual": residual, "residual_last": residual_last}
    with gm.graph.inserting_before(last):
        fused = gm.graph.call_function(conv.target, conv.args, kwargs)  # type: ignore[arg-type]
    fused.meta = dict(last.meta)
    chain = [last]
    while chain[-1] is not conv:
        chain.append(next(n for n in chain[-1].all_input_nodes if n is conv or _leads(n, conv)))
    last.replace_all_uses_with(fused)
    for node in chain:
        gm.graph.erase_node(node)


def _leads(node: fx.Node, conv: fx.Node) -> bool:
    """Whether the chain of single users from ``conv`` passes through ``node``."""
    step = conv
    while len(step.users) == 1:
        step = next(iter(step.users))
        if step is node:
            return True
    return False


def _added(user: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other operand where ``user`` adds a tensor of the same shape and dtype to ``value``."""
    if user.op not in ("call_function", "call_method") or user.target not in ADD:
        return None
    left, right, alpha = bound(user, ("input", "other", "alpha"), (None, None, 1))
    other = right if left is value else left
    if alpha != 1 or not isinstance(other, fx.Node) or other is value or (writes(user) and left is not value):
        return None
    known = shape_of(value), dtype_of(value)
    if None in known or known != (shape_of(other), dtype_of(other)):
        return None
    return other


def writes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    base = name.split(".")[0]
    in_place = (base.endswith("_") and not base.endswith("__")) or base in ("iadd", "isub", "imul", "itruediv", "setitem")
    return in_place or node.kwargs.get("inplace") is True or (len(node.args) > 1 and node.args[-1] is True and base in _FLAGGED)


_FLAGGED = ("relu", "relu6", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "dropout", "dropout2d")


def _movable(conv: fx.Node, target: fx.Node, last: fx.Node) -> bool:
    """Whether ``conv`` may be computed at ``target`` instead: nothing in between writes in place, but for the chain itself."""
    node = conv.next
    while node is not target:
        if writes(node) and node is not last and not _leads(node, conv):
            return False
        node = node.next
    return True
