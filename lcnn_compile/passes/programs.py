"""Pass: run whole regions of a graph (lookup convolutions, pooling and linear layers between them) as one native call each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu.byte_recipe import in_bytes
from lcnn_compile.kernels.cpu.program import Program, run_program
from lcnn_compile.kernels.cpu.steps import Permute, Recipe, Step
from lcnn_compile.passes.constants import fold_constants
from lcnn_compile.passes.effects import Effects, eliminate_dead_code, sort
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.functional import to_functional
from lcnn_compile.passes.pooling_steps import without_indices
from lcnn_compile.passes.signatures import PARTS, operation_of, part_sizes
from lcnn_compile.passes.step_form import Form, is_value
from lcnn_compile.passes.steps import steps_of
from lcnn_compile.passes.targets import aten, dimension_order, shape_of

NAME = "lcnn_program"


class HeldProgram(nn.Module):
    """Keeps a program alive in a graph module, with the tensor by which the operator finds it."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        self.register_buffer("handle", torch.tensor(program.handle))


def programs(gm: fx.GraphModule) -> list[Program]:
    """The programs that a graph runs; they must live as long as it does."""
    return [module.program for module in gm.children() if isinstance(module, HeldProgram)]


def is_handle(gm: fx.GraphModule, name: Any) -> bool:
    """Whether an attribute is the tensor by which the operator finds a program."""
    holder, _, own = str(name).rpartition(".")
    return own == "handle" and isinstance(getattr(gm, holder, None), HeldProgram)


VIEWS_OF_RESULTS = {
    *(torch.narrow, torch.select, operator.getitem, "permute", "transpose"),
    *(
        aten.slice.Tensor,
        aten.select.int,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.flatten.using_ints,
    ),
}
"""Views of what a program returns that cost nothing, and that keep its memory the memory of several results."""
View = Callable[[torch.Tensor], torch.Tensor]


class Alone(NamedTuple):
    """A graph that does nothing but run a program.

    Attributes:
        inputs: the inputs of the graph that the program takes.
        outputs: which of the program's outputs the graph returns, and the views of it that are taken one after the other.
    """

    inputs: list[int]
    outputs: list[tuple[int, tuple[View, ...]]]

    def returned(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the graph returns for the program's outputs."""
        made = []
        for i, views in self.outputs:
            value = outputs[i]
            for view in views:
                value = view(value)
            made.append(value)
        return made


def single_program(gm: fx.GraphModule) -> Alone | None:
    """How a graph runs its program, where it does nothing else."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    rest = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    calls = [node for node in rest if node.target is run_program]
    returned = gm.graph.output_node().args[0]
    if len(calls) != 1 or not isinstance(returned, list | tuple):
        return None
    known: dict[Any, tuple[int, tuple[View, ...]]] = {}
    for node in rest:
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and source is calls[0]:
            known[node] = (cast(int, node.args[1]), ())
        elif source in known and node.target in VIEWS_OF_RESULTS and node.all_input_nodes == [source]:
            index, views = known[source]
            known[node] = (index, (*views, _view_of(node)))
    inputs = cast("list[fx.Node]", calls[0].args[0])
    if len(known) + 1 != len(rest) or any(x not in placeholders for x in inputs) or any(y not in known for y in returned):
        return None
    return Alone([placeholders.index(x) for x in inputs], [known[y] for y in returned])


def _view_of(node: fx.Node) -> View:
    """What a node with one input does, on another tensor."""
    args, kwargs, target = node.args[1:], node.kwargs, node.target
    if isinstance(target, str):
        return lambda value: getattr(value, target)(*args, **kwargs)
    assert callable(target)
    return lambda value: target(value, *args, **kwargs)


def left_over(gm: fx.GraphModule) -> list[str]:
    """What a graph does beside running programs, and how often: the operations that keep it from being one."""
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        own = node.target is run_program or (
            node.target is operator.getitem and getattr(node.args[0], "target", None) is run_program
        )
        if node.op.startswith("call_") and not own:
            shape = shape_of(node)
            name = str(getattr(node.target, "__name__", node.target))
            text = name if shape is None else f"{name} -> {[str(size) for size in shape]}".replace("'", "")
            found[text] = found.get(text, 0) + 1
    return [text if count == 1 else f"{text} ({count} times)" for text, count in found.items()]


class _Among(OperatorSupportBase):
    def __init__(self, nodes: set[fx.Node]):
        self._nodes = nodes

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        return node in self._nodes


def gather_programs(gm: fx.GraphModule, dense_too: bool = False) -> fx.GraphModule:
    """Replace regions of lookup convolutions, pooling, linear layers and views by calls of ``run_program``: float32, CPU, for inference.

    A region has one lookup convolution at least, unless ``dense_too`` (where nothing else can run it); its lowering is settled and its
    epilogue fused. The weights move into the
    program, copied: where they change, the pass must run again on the original graph. Graphs under autocast are left alone.
    A region lies between two writes in place, where these touch what it reads. The graph is changed in place and returned.
    """
    to_functional(gm)
    autocast = torch.is_autocast_enabled("cpu") or any("autocast" in str(node.target) for node in gm.graph.nodes)
    if autocast or not cpu.is_available() or not (dense_too or any(is_lookup(node) for node in gm.graph.nodes)):
        return gm
    fold_constants(gm)
    without_indices(gm)
    _name_parts(gm)
    _split_views(gm)
    effects = Effects(gm)
    edges = effects.order_edges()
    # A region's nodes come to stand together; where writes elsewhere forbid that, every write bounds regions.
    for every_write in (False, True):
        regions = _regions(gm, effects, every_write, dense_too)
        if sort(gm, edges, regions):
            break
    gathered = {node for region in regions for node in region}
    for number, region in enumerate(regions):
        _rewrite(gm, region, f"{NAME}_{number}", gathered)
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _regions(gm: fx.GraphModule, effects: Effects, every_write: bool, dense_too: bool) -> list[list[fx.Node]]:
    """The regions to gather, each in order: between two writes that touch what regions read, or between any two writes."""
    runnable = [node for node in gm.graph.nodes if steps_of(gm, node) is not None and not effects.has_effect(node)]
    read = frozenset().union(*(effects.touched(node) | effects.memory(node) for node in runnable))
    bounds = {w for w in effects.writers() if every_write or effects.is_fence(w) or effects.written(w) & read}
    stretches: list[set[fx.Node]] = [set()]
    left = set(runnable)
    for node in gm.graph.nodes:
        if node in bounds:
            stretches.append(set())
        elif node in left:
            stretches[-1].add(node)
    regions = []
    for stretch in filter(None, stretches):
        partitioner = CapabilityBasedPartitioner(gm, _Among(stretch), allows_single_node_partition=True)
        with _hidden_items(gm):
            partitions = partitioner.propose_partitions()
        for partition in partitions:
            _drop_views(gm, partition.nodes)
            if dense_too or any(is_lookup(node) for node in partition.nodes):
                regions.append(sorted(partition.nodes))
    return regions


def _index(value: Any, index: Any) -> Any:
    """``value[index]``, under a name that the partitioner does not know."""
    return value[index]


@contextmanager
def _hidden_items(gm: fx.GraphModule) -> Iterator[None]:
    """Without calls of ``getitem``: the partitioner takes them for parts of tuples, and never ends where a slice's bounds are computed."""
    items = gm.graph.find_nodes(op="call_function", target=operator.getitem)
    for node in items:
        node.target = _index
    try:
        yield
    finally:
        for node in items:
            node.target = operator.getitem


def _is_alias(gm: fx.GraphModule, node: fx.Node) -> bool:
    steps = steps_of(gm, node)
    return steps is not None and steps.alias


def _name_parts(gm: fx.GraphModule) -> None:
    """Parts of what is split become slices, views as they were; their places must be known."""
    for node in list(gm.graph.nodes):
        found = operation_of(node) if node.op in ("call_function", "call_method") else None
        if found is None or found[0] not in PARTS or any(user.target is not operator.getitem for user in node.users):
            continue
        given = found[1]
        source, dim = given["input"], given["dim"]
        shape = shape_of(source) if is_value(source) else None
        if not shape or not isinstance(dim, int) or not isinstance(shape[dim], int) or not node.users:
            continue
        sizes = part_sizes(found[0], given, shape[dim])
        if sizes is None or any(not isinstance(user.args[1], int) or user.args[1] >= len(sizes) for user in node.users):
            continue
        for user in list(node.users):
            start = sum(sizes[: user.args[1] % len(sizes)])
            arguments = (source, dim, start) if found[0] == "unbind" else (source, dim, start, sizes[user.args[1]])
            with gm.graph.inserting_before(user):
                part = gm.graph.call_function(torch.select if found[0] == "unbind" else torch.narrow, arguments)
            part.meta = dict(user.meta)
            user.replace_all_uses_with(part)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _split_views(gm: fx.GraphModule) -> None:
    """A view of its own for each reader, so that a region can do without one.

    Not where the memory is written: ``contiguous`` and ``reshape`` may copy, and a copy made anew has other values.
    """
    effects = Effects(gm)
    written = frozenset().union(*map(effects.written, effects.writers()))
    for node in reversed(list(gm.graph.nodes)):
        if len(node.users) > 1 and _is_alias(gm, node) and not effects.memory(node) & written:
            for user in list(node.users)[1:]:
                with gm.graph.inserting_before(user):
                    twin = gm.graph.node_copy(node)
                user.replace_input_with(node, twin)


def _drop_views(gm: fx.GraphModule, nodes: dict[fx.Node, Any]) -> None:
    """Leave views to the compiler where a region would return one of its inputs, or the same memory twice."""
    while True:
        roots: dict[fx.Node, fx.Node] = {}
        for node in sorted(nodes):
            view = _is_alias(gm, node)
            source = cast(fx.Node, node.args[0]) if view else node
            roots[node] = roots.get(source, source)
        returned = [node for node in nodes if any(user not in nodes for user in node.users)]
        shared = [roots[node] for node in returned]
        wrong = [n for n in returned if n is not roots[n] and (roots[n] not in nodes or shared.count(roots[n]) > 1)]
        if not wrong:
            return
        for node in wrong:
            del nodes[node]


def _rewrite(gm: fx.GraphModule, nodes: list[fx.Node], name: str, gathered: Container[fx.Node]) -> None:
    """Replace the nodes of a region, in order, by one call of the operator."""
    forms = {node: cast(Form, steps_of(gm, node)) for node in nodes}
    values: dict[fx.Node, int] = {}
    for source in (source for form in forms.values() for source in form.inputs):
        if source not in forms:
            values.setdefault(source, len(values))
    inputs = list(values)
    steps: list[Step] = []
    weights: list[tuple[Any, ...]] = []

    def emit(step: Step, *own: Any) -> int:
        steps.append(step)
        if step.weighted:
            weights.append(own)
        return len(inputs) + len(steps) - 1

    for node, form in forms.items():
        values[node] = form.build(emit, [values[source] for source in form.inputs])
    returned = [node for node in nodes if any(user not in nodes for user in node.users)]
    orders = [_order_outside(node, nodes, gathered) for node in returned]
    inside = [order is not None and order[0] == 0 for order in orders]  # as the program's last steps
    outputs = [
        emit(Permute(values[node], cast("tuple[int, ...]", order))) if last else values[node]
        for node, order, last in zip(returned, orders, inside, strict=True)
    ]
    recipe = Recipe(len(inputs), tuple(steps), tuple(outputs))
    recipe, weights = in_bytes(recipe, weights)
    gm.add_submodule(name, HeldProgram(Program(recipe, weights)))
    with gm.graph.inserting_after(nodes[-1]):
        handle = gm.graph.get_attr(f"{name}.handle")
    with gm.graph.inserting_after(handle):
        call = gm.graph.call_function(run_program, (inputs, handle, recipe.to_json()))
    for i, node in reversed(list(enumerate(returned))):
        with gm.graph.inserting_after(call):
            item = gm.graph.call_function(operator.getitem, (call, i))
        order = orders[i]
        if order is not None:
            item = _turned(gm, item, order, inside[i])
        item.meta = dict(node.meta)
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in nodes)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def _order_outside(node: fx.Node, region: Container[fx.Node], gathered: Container[fx.Node]) -> tuple[int, ...] | None:
    """The order of a returned value's dimensions in memory where it is another one than their own, and somebody can tell.

    Strides, views and the caller depend on it; programs do not.
    """
    order = dimension_order(node)
    if order is None or order == sorted(order):
        return None
    outside = [user for user in node.users if user not in region]
    return None if all(user in gathered or user.target is run_program for user in outside) else tuple(order)


def _turned(gm: fx.GraphModule, item: fx.Node, order: tuple[int, ...], inside: bool) -> fx.Node:
    """A returned value in the strides that it had; ``inside``: the program has put it in the order of memory already."""
    if not inside:
        with gm.graph.inserting_after(item):
            item = gm.graph.call_method("permute", (item, order))
        with gm.graph.inserting_after(item):
            item = gm.graph.call_method("contiguous", (item,))
    with gm.graph.inserting_after(item):
        return gm.graph.call_method("permute", (item, tuple(order.index(d) for d in range(len(order)))))
