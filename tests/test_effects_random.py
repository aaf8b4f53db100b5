"""What the analysis of writes says may happen, against what happens to real memory when the graph runs node by node."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx
from ways import quiet

from lcnn_compile.errors import LcnnError
from lcnn_compile.passes.effects import RANDOM, Effects, written_inputs
from lcnn_compile.testing import source_networks
from lcnn_compile.torch_private import pytree


def tensors(value):
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]


def place(tensor):
    return tensor.untyped_storage()._cdata


def bytes_of(tensor):
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


class Observed(fx.Interpreter):
    """Runs a graph and compares every node with what the analysis said of it before."""

    def __init__(self, gm, inputs=None):
        super().__init__(gm, garbage_collect_values=False)
        self.effects = Effects(gm)
        self.inputs = None if inputs is None else written_inputs(gm, inputs)
        self.held = {}  # memory: tensors in it
        self.nodes = {}  # memory: nodes whose values are in it
        self.touching = {}  # memory: nodes that could see it
        self.writers = []  # (node, memory)
        self.placeholders = {}
        for tensor in [*gm.parameters(), *gm.buffers()]:
            self.held[place(tensor)] = tensor

    def run_node(self, node):
        before = {key: bytes_of(tensor) for key, tensor in self.held.items()}
        random = torch.get_rng_state()
        args = [t for value in self.map_nodes_to_values((node.args, node.kwargs), node) for t in tensors(value)]
        seen = {place(t) for t in args}
        if node.op == "call_module":
            seen |= {
                place(t)
                for t in [*self.module.get_submodule(node.target).parameters(), *self.module.get_submodule(node.target).buffers()]
            }
        result = super().run_node(node)
        changed = {key for key in before if not torch.equal(before[key], bytes_of(self.held[key]))}
        for key in seen | changed:
            self.touching.setdefault(key, []).append(node)
        for tensor in tensors(result) if node.op != "output" else ():
            key = place(tensor)
            self.held.setdefault(key, tensor)
            for other in self.nodes.get(key, ()):
                assert self.effects.memory(node) & self.effects.memory(other), f"{node} and {other} share memory"
            self.nodes.setdefault(key, []).append(node)
        for key in changed:
            self.writers.append((node, key))
            assert self.effects.has_effect(node), f"{node.format_node()} wrote"
            for other in self.nodes.get(key, ()):
                assert self.effects.is_fence(node) or self.effects.memory(other) & self.effects.written(node), (
                    f"{node.format_node()} wrote {other}"
                )
        if not torch.equal(random, torch.get_rng_state()):
            assert self.effects.is_fence(node) or RANDOM in self.effects.written(node), (
                f"{node.format_node()} drew random numbers"
            )
        return result

    def finish(self, inputs):
        for node, key in self.writers:
            for other in self.touching.get(key, ()):
                assert other is node or other.op == "output" or self.effects.conflict(node, other), (
                    f"{node.format_node()} before {other.format_node()}"
                )
            for other in self.nodes.get(key, ()):
                assert not self.effects.is_constant(other), f"{other} is written"
            if self.inputs is not None:
                for i, value in enumerate(inputs):
                    if isinstance(value, Tensor) and value.numel() and place(value) == key:
                        assert i in self.inputs, f"input {i} is written"


def observe(gm, inputs):
    try:
        observed = Observed(gm, inputs)
    except LcnnError:
        return gm(*inputs)
    result = observed.run(*inputs)
    observed.finish(inputs)
    return result


def compiled(case):
    """Every graph of Dynamo's."""
    torch.compiler.reset()
    with quiet():
        run = torch.compile(case.build(), backend=lambda gm, _: lambda *inputs: observe(gm, inputs))
        for call in case.calls()[:2]:
            run(*call.args, **call.kwargs)


def traced(case):
    """The graph of torch.fx; modules of the user's are single nodes."""
    try:
        gm = fx.symbolic_trace(case.build())
    except Exception:
        return
    call = case.call()
    given = list(call.args)
    if call.kwargs or any(not isinstance(value, Tensor) for value in given):
        return
    try:
        fx.Interpreter(gm).run(*(value.clone() for value in given))
    except Exception:
        return  # the trace left something out
    observe(gm, given)


def exported(case):
    """The graph of torch.export, with functions and modules as ATen operators."""
    call = case.call()
    try:
        gm = torch.export.export(case.build(), call.args, call.kwargs, strict=False).module(check_guards=False)
    except Exception:
        return
    observe(gm, pytree.tree_leaves((call.args, call.kwargs)))


@settings(max_examples=settings.default.max_examples if settings.default.max_examples > 25 else 15)
@pytest.mark.parametrize("graph", [compiled, traced, exported])
@given(case=source_networks())
def test_nothing_happens_that_the_analysis_excludes(graph, case):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        graph(case)
