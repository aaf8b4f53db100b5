"""PyTorch's own engines for a graph whose weights are constants: Inductor, frozen or not, and eager in both memory formats."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lcnn_compile.export.dimensions import first_line
from lcnn_compile.passes.programs import is_handle
from lcnn_compile.passes.targets import attribute
from lcnn_compile.torch_private import inductor_freezing

log = logging.getLogger("lcnn_compile")
Run = Callable[..., Any]


def frozen_by_inductor(gm: fx.GraphModule) -> Run:
    """By Inductor with the tensors as constants: convolutions of weights that are laid out once, and no batch norm."""
    open_graph, handles = _with_handles(gm)
    run, plain = torch.compile(open_graph, dynamic=False), torch.compile(gm, dynamic=False)
    met: dict[tuple[Any, ...], bool] = {}

    def call(*leaves: Any) -> Any:
        form = tuple((x.shape, x.stride()) for x in leaves)
        works = met.get(form)
        if works is None:
            try:
                # Dynamo asks the configuration when it compiles, which an option of torch.compile does not reach.
                with inductor_freezing():
                    made = run(*leaves, *handles)
                met[form] = True
                return made
            except Exception as error:
                # Inductor freezes not all that it compiles: sizes that depend on data, for one. What is no fault of it raises again.
                log.info("Inductor cannot freeze what is left of a model (%s); it is compiled as it is", first_line(error))
                met[form] = False
        return run(*leaves, *handles) if works else plain(*leaves)

    return call


def _with_handles(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """A copy that takes the handles of its programs as inputs: Inductor's caches would keep constants of another process."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    handles: list[Tensor] = []
    for node in copied.graph.find_nodes(op="get_attr"):
        if is_handle(gm, node.target):
            handles.append(attribute(gm, node.target))
            with copied.graph.inserting_before(next(n for n in copied.graph.nodes if n.op != "placeholder")):
                given = copied.graph.placeholder(f"handle_{len(handles)}")
            given.meta = dict(node.meta)
            node.replace_all_uses_with(given)
            copied.graph.erase_node(node)
    copied.recompile()
    return copied, handles


def by_inductor(gm: fx.GraphModule) -> Run:
    """By Inductor as it is."""
    return torch.compile(gm, dynamic=False)


def eager(gm: fx.GraphModule) -> Run:
    """Operator by operator."""
    return gm


def eager_channels_last(gm: fx.GraphModule) -> Run:
    """Operator by operator, images and filters in channels_last; what comes out is contiguous."""
    last: Any = copy.deepcopy(gm).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(*leaves: Tensor) -> Any:
        given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in leaves]
        return fx.node.map_aggregate(last(*given), lambda y: y.contiguous() if isinstance(y, Tensor) else y)

    return call


ENGINES: dict[str, Callable[[fx.GraphModule], Run]] = {
    "Inductor, frozen": frozen_by_inductor,
    "Inductor": by_inductor,
    "eager": eager,
    "eager, channels_last": eager_channels_last,
}
"""By name."""
DEFAULT = "Inductor, frozen"
