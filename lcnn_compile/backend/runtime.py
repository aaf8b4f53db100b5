"""What a compiled graph does at each call: notice changed weights, and derive again what depends on them. Used by the backend."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lcnn_compile.backend.graphs import bind_weights, fingerprint, is_weight, unbind_weights
from lcnn_compile.backend.guard import attempt
from lcnn_compile.backend.sandbox import plain_tensors
from lcnn_compile.backend.symbols import unbox_floats
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.passes import (
    chain_lookups,
    choose_lowerings,
    fold_batch_norm,
    fold_factors,
    fuse_epilogues,
    gather_programs,
    narrow_convolutions,
    pool_first,
)
from lcnn_compile.passes.effects import written_inputs
from lcnn_compile.passes.programs import programs, single_program
from lcnn_compile.passes.targets import attribute
from lcnn_compile.torch_private import (
    FakeTensor,
    alone_with_dynamo,
    is_boxed_float,
    mark_static,
    storage_of,
    version,
    without_sources,
)

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
Transform = Callable[[fx.GraphModule], fx.GraphModule]
Mark = tuple[int, "weakref.ref[Tensor]", int, Any]
"""Position of an input, the tensor it was, and its fingerprint."""
RESTLESS = 3
"""Calls in a row that find a weight changed, after which it is no weight any more but data."""


@dataclass(frozen=True)
class Captured:
    """A graph of Dynamo's, and what is known of its inputs.

    Attributes:
        gm: the graph; it is not changed.
        names: attribute names of the inputs that are weights, by position.
        written: positions of the inputs that the graph writes.
        compile: what compiles graphs while Dynamo is at work.
        symbolic: whether there are numbers among the inputs.
    """

    gm: fx.GraphModule
    names: Mapping[int, str]
    written: frozenset[int]
    compile: Compile
    symbolic: bool

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str], compile: Compile) -> Captured:
        """What is known of a graph and its example inputs."""
        boxed = any(is_boxed_float(node) for node in gm.graph.find_nodes(op="placeholder"))
        symbolic = boxed or any(isinstance(value, torch.SymInt | torch.SymFloat | int | float) for value in inputs)
        return cls(gm, names, frozenset(written_inputs(gm, inputs)), compile, symbolic)

    def compile_later(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """As ``compile``, once Dynamo's work is done: then a graph with symbolic numbers needs another trace."""
        if not self.symbolic:
            return self.compile(graph, inputs)
        graph, boxed = unbox_floats(graph)
        run = torch.compile(graph, backend=self.compile, dynamic=True)
        weights = [i for i, node in enumerate(graph.graph.find_nodes(op="placeholder")) if is_weight(node)]

        def call(*args: Any) -> Any:
            for i in weights:
                mark_static(args[i])
            return run(*[value.item() if i in boxed else value for i, value in enumerate(args)])

        return call


class _State(NamedTuple):
    """What one version of the weights has become; replaced as a whole, so that threads never see a mixture."""

    marks: list[Mark] | None  # None: of no real weights yet
    structure: tuple[Any, ...]
    programs: list[Program]  # that the compiled graph finds by number only
    compiled: Callable[..., Any] | None  # what the compiler made; None where the graph is one program
    run: Callable[..., Any]  # takes the graph's original inputs


def is_real(inputs: Sequence[Any]) -> bool:
    """Whether the inputs have values; the fake tensors of DDP with several buckets have none."""
    return not any(isinstance(value, FakeTensor) for value in inputs)


class Lowered:
    """A graph whose batch norms are folded, epilogues fused and lookup regions gathered, kept up to date with its weights.

    Tensors derived from weights are extra inputs of the compiled graph, computed again when a weight has changed: by
    in-place update, ``load_state_dict``, ``.data =`` or a new parameter. So nothing is ever stale or compiled again. A weight
    that changes from call to call is left an input. A graph that is one program is not compiled at all.
    """

    def __init__(
        self, captured: Captured, inputs: Sequence[Any], compile: Compile | None = None, transform: Transform | None = None
    ):
        self._captured, self._compile = captured, compile or captured.compile
        self._transform = transform or (lambda bound: bound)
        self._lock = threading.Lock()
        self._names = dict(captured.names)
        self._calls = self._changed_at = 0
        self._streaks: dict[int, int] = {}
        real = is_real(inputs)
        self._gather = real  # programs are packed values
        self._shared = _shared_memory(inputs, captured.written) if real else None
        self._state = self._lower(inputs, None)
        self._compile = captured.compile_later

    def _lower(self, inputs: Sequence[Any], before: _State | None) -> _State:
        def unchanged() -> _State:
            compiled = self._compile(self._captured.gm, inputs)
            return _State([], (), [], compiled, compiled)

        with alone_with_dynamo():
            return attempt(lambda: self._passes(inputs, before), unchanged, "leaves a graph to Inductor as it was")

    def _passes(self, inputs: Sequence[Any], before: _State | None) -> _State:
        marks = self._marks(inputs) if is_real(inputs) else None  # before the values are read: a later change is then noticed
        with plain_tensors(), without_sources():
            bound = self._transform(bind_weights(self._captured.gm, inputs, self._names))
            bound = fuse_epilogues(choose_lowerings(narrow_convolutions(fold_factors(fold_batch_norm(bound)))))
            bound = pool_first(chain_lookups(bound))
            if self._gather:
                bound = gather_programs(bound)
            unbound = unbind_weights(bound, inputs, self._names)
            derived = [attribute(bound, name).detach() for name in unbound.derived]
        held, kept = programs(bound), unbound.kept
        structure = (unbound.derived, kept, [program.recipe for program in held])
        alone = single_program(unbound.gm)
        if alone is not None:
            [program], places = held, [kept[i] for i in alone.inputs]

            def run_alone(*inputs: Any) -> Any:
                return alone.returned(program(*[inputs[i] for i in places]))

            return _State(marks, structure, held, None, run_alone)
        known = before.compiled if before is not None and before.structure == structure else None
        compiled = known or self._compile(unbound.gm, [inputs[i] for i in kept] + derived)

        def run(*inputs: Any) -> Any:
            return compiled(*[inputs[i] for i in kept], *derived)

        return _State(marks, structure, held, compiled, run)

    def _marks(self, inputs: Sequence[Any]) -> list[Mark]:
        return [(i, weakref.ref(inputs[i]), *fingerprint(inputs[i])) for i in self._names]

    def __call__(self, *inputs: Any) -> Any:
        """The graph's outputs for its original inputs."""
        self._calls += 1
        if self._captured.written:
            shared = _shared_memory(inputs, self._captured.written)
            if self._shared is None:
                self._shared = shared
            elif shared != self._shared:
                # Writes reach other inputs than those that it was compiled for.
                return self._captured.gm(*inputs)
        state = self._state
        if _changed(inputs, state.marks):
            with self._lock:
                state = self._state
                if _changed(inputs, state.marks):
                    self._let_go(inputs, state.marks)
                    state = self._state = self._lower(inputs, state)
        return state.run(*inputs)

    def _let_go(self, inputs: Sequence[Any], marks: list[Mark] | None) -> None:
        """Weights that have changed at each of the last calls are weights no longer."""
        again = self._calls <= self._changed_at + 1
        changed = {mark[0] for mark in marks or () if _changed(inputs, [mark])}
        self._streaks = {i: 1 + (self._streaks.get(i, 0) if again else 0) for i in changed}
        self._changed_at = self._calls
        for i in [i for i, streak in self._streaks.items() if streak > RESTLESS]:
            del self._names[i]


def _changed(inputs: Sequence[Any], marks: list[Mark] | None) -> bool:
    """Whether an input is another tensor than it was, or one with other values; this runs at every call."""
    if marks is None:
        return True
    for i, same, address, stamp in marks:
        value: Tensor = inputs[i]
        was = same()
        if was is None or was is not value or value.data_ptr() != address:
            return True
        if (fingerprint(value)[1] if value.is_inference() else version(value)) != stamp:
            return True
    return False


def _shared_memory(inputs: Sequence[Any], written: frozenset[int]) -> list[list[int]]:
    """For each memory that the graph writes, the inputs that are in it."""
    groups: dict[int | None, list[int]] = {storage_of(inputs[i]): [] for i in sorted(written) if isinstance(inputs[i], Tensor)}
    for i, value in enumerate(inputs):
        if isinstance(value, Tensor) and (storage := storage_of(value)) in groups:
            groups[storage].append(i)
    return list(groups.values())
