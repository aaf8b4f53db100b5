"""Pass: on a GPU, take the largest of a window before bias and ReLU instead of after them."""

from __future__ import annotations

import torch
from torch import fx

from lcnn_compile.passes.effects import Effects
from lcnn_compile.passes.pooling_steps import MAX_POOL
from lcnn_compile.passes.targets import CONV2D, activation_of, attribute, example, is_get_attr


def pool_first(gm: fx.GraphModule, device: str | None = None) -> fx.GraphModule:
    """``max_pool(relu(conv(x) + b))`` becomes ``relu(max_pool(conv(x)) + b)``.

    That is the same: adding a number, rounding and ReLU keep the order of what they are given. Bias and ReLU then pass over a quarter
    of the pixels, together with the pooling. For dense convolutions that are left to the compiler, on a GPU (or on ``device``),
    where nobody else reads what is in between. The graph is changed in place and returned.
    """
    effects = Effects(gm)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in MAX_POOL:
            _swap(gm, effects, node, device or "cuda")
    gm.graph.lint()
    gm.recompile()
    return gm


def _swap(gm: fx.GraphModule, effects: Effects, pool: fx.Node, device: str) -> None:
    relu = pool.args[0] if pool.args else None
    if not isinstance(relu, fx.Node) or activation_of(relu) != "relu" or len(relu.users) > 1:
        return
    conv = relu.args[0] if len(relu.args) == 1 else None
    if not isinstance(conv, fx.Node) or conv.op != "call_function" or conv.target not in CONV2D or len(conv.users) > 1:
        return
    bias = conv.args[2] if len(conv.args) > 2 else None
    found = example(conv)
    if not is_get_attr(bias) or "bias" in conv.kwargs or found is None or found.device.type != device or found.dim() != 4:
        return
    if pool.kwargs.get("return_indices") or len(pool.args) > 6 or not effects.written(relu) <= effects.memory(conv):
        return
    if not found.is_floating_point() or attribute(gm, bias.target).dtype != found.dtype:  # type: ignore[union-attr]
        return
    with gm.graph.inserting_after(pool):
        column = gm.graph.call_function(torch.reshape, (bias, (-1, 1, 1)))
    with gm.graph.inserting_after(column):
        moved = gm.graph.call_function(torch.add, (pool, column))
    with gm.graph.inserting_after(moved):
        last = gm.graph.call_function(torch.relu, (moved,))
    for node in (moved, last):
        node.meta = dict(pool.meta)
    pool.replace_all_uses_with(last, delete_user_cb=lambda user: user is not moved)
    pool.replace_input_with(relu, conv)
    conv.args = (*conv.args[:2], None, *conv.args[3:])
    gm.graph.erase_node(relu)
