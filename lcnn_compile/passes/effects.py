"""What the nodes of a graph write, read and alias: every pass asks this before it deletes, moves, fuses or gathers.

The graphs of Dynamo, symbolic tracing and ``torch.export`` are not functional: calls write in place, results of writes go unread,
views alias. The analysis is conservative. Memory is named by where it comes from (its *roots*: the node that makes it, an
attribute's storage, the graph's inputs); a value *may* be in any of its roots.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise

import torch
from torch import Tensor, fx

from lcnn_compile.errors import ConversionError
from lcnn_compile.kernels.read_only import read_only
from lcnn_compile.modules.weight import refuse_write
from lcnn_compile.passes.operations import Effect, effect_of, holds_tensors, storages_of
from lcnn_compile.passes.targets import WRITTEN, attribute

Root = Hashable
INPUTS: Root = "inputs"
"""The memory of all inputs: a caller may pass views of one tensor."""
_VIEWS = {
    *("detach", "data", "view", "reshape", "flatten", "unflatten", "getitem", "select", "narrow", "slice", "chunk", "split"),
    *("transpose", "permute", "t", "T", "mT", "H", "mH", "numpy_T", "adjoint", "squeeze", "unsqueeze", "unbind", "view_as"),
    *(
        "diagonal",
        "real",
        "alias",
        "expand",
        "expand_as",
        "broadcast_to",
        "as_strided",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
    ),
    *(
        "contiguous",
        "to",
        "type_as",
        "float",
        "cpu",
        "unfold",
        "ravel",
        "positive",
        "requires_grad_",
        "lift_fresh",
        "split_with_sizes",
    ),
    *("tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_chunk", "unsafe_split", "atleast_1d", "atleast_2d", "atleast_3d"),
    *("view_as_real", "resolve_conj", "resolve_neg"),
}
RANDOM: Root = "the random number generator"


class Effects:
    """The effects of a graph's nodes, as the graph is when this is made.

    Args:
        gm: any GraphModule; it is not changed.
        root_of: the memory of a placeholder; by default all share one root.

    Raises:
        ConversionError: where a node changes what a tensor is (its shape, its storage) in place.
        WriteError: where a node writes to the dense weight of a lookup layer.
    """

    def __init__(self, gm: fx.GraphModule, root_of: Callable[[fx.Node], Root] | None = None):
        self._memory: dict[fx.Node, frozenset[Root]] = {}
        self._touched: dict[fx.Node, frozenset[Root]] = {}
        self._written: dict[fx.Node, frozenset[Root]] = {}
        self._effects: dict[fx.Node, Effect] = {}
        self._order = {node: i for i, node in enumerate(gm.graph.nodes)}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                self._memory[node] = frozenset([INPUTS if root_of is None else root_of(node)])
            elif node.op == "get_attr":
                self._memory[node] = storages_of(attribute(gm, node.target))
            elif node.op == "output":
                self._touched[node] = self._of(node.all_input_nodes)
            else:
                self._add(gm, node)
        self._all_written: frozenset[Root] = frozenset().union(*self._written.values())

    def _add(self, gm: fx.GraphModule, node: fx.Node) -> None:
        effect = self._effects[node] = effect_of(gm, node)
        for target in effect.writes:
            _refuse_lost(target, node)
        own = frozenset([RANDOM]) if effect.random else frozenset()
        self._touched[node] = self._of(node.all_input_nodes) | effect.reads | own
        self._written[node] = self._of(effect.writes) | effect.written | own
        made: frozenset[Root] = frozenset() if effect.only_views else frozenset([node])
        self._memory[node] = self._of(effect.aliases) | made if holds_tensors(node) else frozenset()

    def _of(self, nodes: Iterable[fx.Node]) -> frozenset[Root]:
        return frozenset().union(*(self._memory[node] for node in nodes))

    def memory(self, node: fx.Node) -> frozenset[Root]:
        """Where a node's value may be."""
        return self._memory.get(node, frozenset())

    def touched(self, node: fx.Node) -> frozenset[Root]:
        """What a node may read or write."""
        return self._touched.get(node, frozenset())

    def written(self, node: fx.Node) -> frozenset[Root]:
        """What a node may write."""
        return self._written.get(node, frozenset())

    def writers(self) -> list[fx.Node]:
        """The nodes that may write, or across which nothing may move, in order."""
        return [node for node, effect in self._effects.items() if self._written[node] or effect.fence]

    def is_fence(self, node: fx.Node) -> bool:
        """Whether nothing may move across a node: what it does is unknown, or it changes how others run (autocast)."""
        return node in self._effects and self._effects[node].fence

    def has_effect(self, node: fx.Node) -> bool:
        """Whether a node does more than to return a value, so that it must stay though nobody reads it."""
        effect = self._effects.get(node)
        return effect is not None and (effect.impure or effect.fence or bool(self._written[node]))

    def conflict(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether the order of two nodes matters, data that one gives to the other aside."""
        if self.is_fence(a) or self.is_fence(b):
            return True
        return bool(self.written(a) & self.touched(b) or self.written(b) & self.touched(a))

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node is an attribute that the graph does not write."""
        return node.op == "get_attr" and not self.memory(node) & self._all_written

    def movable(self, node: fx.Node, target: fx.Node, but: Iterable[fx.Node] = ()) -> bool:
        """Whether ``node`` may be computed right before ``target``, a later node, instead; the nodes ``but`` are not asked."""
        left, step = set(but), node.next
        while step is not target:
            if step.op == "root":
                return False
            if step not in left and self.conflict(node, step):
                return False
            step = step.next
        return True

    def order_edges(self) -> list[tuple[fx.Node, fx.Node]]:
        """Pairs of nodes, the first before the second, whose order matters."""
        edges = []
        for writer in self.writers():
            place = self._order[writer]
            for node in self._effects:
                if node is not writer and self.conflict(writer, node):
                    edges.append((writer, node) if place < self._order[node] else (node, writer))
        return edges


def refuse_lost_writes(gm: fx.GraphModule) -> None:
    """Refuse a graph that writes to the dense weight of a lookup layer, whatever else is in it.

    Raises:
        WriteError: it does.
    """
    if gm.graph.find_nodes(op="call_function", target=read_only):
        with suppress(ConversionError):  # what cannot be followed is Inductor's
            Effects(gm)


def _refuse_lost(target: fx.Node, node: fx.Node) -> None:
    """Refuse a write to the dense weight of a lookup layer, itself or through a view: it is formed anew at every call."""
    while target.op.startswith("call_") and _name(target) in _VIEWS and isinstance(target.args[0], fx.Node):
        target = target.args[0]
    if target.target is read_only:
        raise refuse_write(str(target.args[1]), node.name)


def _name(node: fx.Node) -> str:
    named = str(node.args[1]) if node.target is getattr else str(getattr(node.target, "__name__", node.target))
    return named.split(".")[0]


def written_inputs(gm: fx.GraphModule, inputs: Iterable[object]) -> set[int]:
    """Positions of the graph's inputs that some node may write, themselves or through another input in the same memory.

    Args:
        gm: a graph.
        inputs: its inputs, real or fake tensors among them.

    Raises:
        ConversionError: as for :class:`Effects`.
    """
    places = gm.graph.find_nodes(op="placeholder")
    roots = {
        node: value.untyped_storage()._cdata if isinstance(value, Tensor) and value.layout == torch.strided else node
        for node, value in zip(places, inputs, strict=True)
    }
    effects = Effects(gm, roots.__getitem__)
    written = frozenset().union(*map(effects.written, effects.writers()))
    return {i for i, node in enumerate(places) if roots[node] in written}


def mark_written(gm: fx.GraphModule) -> None:
    """Mark the get_attr nodes whose attributes the graph writes, for :func:`~lcnn_compile.passes.targets.is_get_attr`."""
    effects = Effects(gm)
    for node in gm.graph.find_nodes(op="get_attr"):
        node.meta.pop(WRITTEN, None)
        if not effects.is_constant(node):
            node.meta[WRITTEN] = True


def eliminate_dead_code(gm: fx.GraphModule) -> None:
    """Erase what nobody reads and what has no effect: no write, no random number, no assertion. The graph is changed in place."""
    effects = Effects(gm)
    for node in reversed(list(gm.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users and not effects.has_effect(node):
            gm.graph.erase_node(node)


def sort(gm: fx.GraphModule, edges: Iterable[tuple[fx.Node, fx.Node]], groups: Sequence[Sequence[fx.Node]] = ()) -> bool:
    """Sort a graph so that every node comes after its inputs, pairs keep their order, and groups stand together.

    Args:
        gm: the graph to change.
        edges: pairs of nodes whose order matters (see :meth:`Effects.order_edges`).
        groups: nodes in order, no node in two groups; other nodes move as little as possible.

    Returns:
        Whether there is such an order; without one the graph stays as it is.
    """
    nodes = list(gm.graph.nodes)
    heads = {node: group[-1] for group in groups for node in group}
    members = {group[-1]: group for group in groups}

    def head(node: fx.Node) -> fx.Node:
        return heads.get(node, node)

    place = {node: i for i, node in enumerate(nodes)}
    later: dict[fx.Node, set[fx.Node]] = {head(node): set() for node in nodes}
    for first, second in chain(edges, ((node, user) for node in nodes for user in node.users)):
        if head(first) is not head(second):
            later[head(first)].add(head(second))
    waiting = dict.fromkeys(later, 0)
    for followers in later.values():
        for node in followers:
            waiting[node] += 1
    ready = [place[node] for node, count in waiting.items() if not count]
    heapify(ready)
    order: list[fx.Node] = []
    while ready:
        node = nodes[heappop(ready)]
        order.extend(members.get(node, (node,)))
        for follower in later[node]:
            waiting[follower] -= 1
            if not waiting[follower]:
                heappush(ready, place[follower])
    if len(order) < len(nodes):
        return False
    for before, node in pairwise(order):
        before.append(node)
    return True
