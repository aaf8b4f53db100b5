"""What a compiled graph does at each call: notice changed weights, calibrate, switch over. Used by the backend."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lcnn_compile.config import LookupConfig
from lcnn_compile.convert import convert_in_place
from lcnn_compile.errors import LcnnWarning
from lcnn_compile.geometry import kind_of
from lcnn_compile.graphs import bind_weights, fingerprint, is_weight, unbind_weights
from lcnn_compile.kernels.program import Program
from lcnn_compile.modules import lookup_modules, replace_module
from lcnn_compile.passes import (
    chain_lookups,
    choose_lowerings,
    fold_batch_norm,
    fold_factors,
    fuse_epilogues,
    gather_programs,
    lift_functional_convolutions,
    narrow_convolutions,
    pool_first,
)
from lcnn_compile.passes.programs import programs, single_program
from lcnn_compile.passes.targets import attribute
from lcnn_compile.report import Report
from lcnn_compile.selection import matches
from lcnn_compile.torch_private import FakeTensor, mark_static, version, without_sources

log = logging.getLogger("lcnn_compile")
Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
Transform = Callable[[fx.GraphModule], fx.GraphModule]
Mark = tuple[int, "weakref.ref[Tensor]", int, Any]
"""Position of an input, the tensor it was, and its fingerprint."""


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Without gradients, and with version counters on every tensor made, also where the caller is in inference mode."""
    # In this order: leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


class _State(NamedTuple):
    """What one version of the weights has become; replaced as a whole, so that threads never see a mixture."""

    marks: list[Mark] | None  # None: of no real weights yet
    structure: tuple[Any, ...]
    programs: list[Program]  # that the compiled graph finds by number only
    compiled: Callable[..., Any] | None  # what the compiler made; None where the graph is one program
    run: Callable[..., Any]  # takes the graph's original inputs


def _real(inputs: Sequence[Any]) -> bool:
    """Whether the inputs have values; the fake tensors of DDP with several buckets have none."""
    return not any(isinstance(value, FakeTensor) for value in inputs)


class Lowered:
    """A graph whose batch norms are folded, epilogues fused and lookup regions gathered, kept up to date with its weights.

    Tensors derived from weights are extra inputs of the compiled graph, computed again when a weight has changed: by
    in-place update, ``load_state_dict``, ``.data =`` or a new parameter. So nothing is ever stale or compiled again. A graph
    that is one program is not compiled at all.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        places: Sequence[int],
        compile: Compile,
        transform: Transform | None = None,
    ):
        self._gm, self._places, self._compile = gm, list(places), compile
        self._transform = transform or (lambda bound: bound)
        self._lock = threading.Lock()
        self._gather = _real(inputs)  # programs are packed values
        self._state = self._lower(inputs, None)

    def _lower(self, inputs: Sequence[Any], before: _State | None) -> _State:
        marks = self._marks(inputs) if _real(inputs) else None  # before the values are read: a later change is then noticed
        with _plain_tensors(), without_sources():
            bound = self._transform(bind_weights(self._gm, inputs, self._places))
            bound = fuse_epilogues(choose_lowerings(narrow_convolutions(fold_factors(fold_batch_norm(bound)))))
            bound = pool_first(chain_lookups(bound))
            if self._gather:
                bound = gather_programs(bound)
            unbound = unbind_weights(bound, inputs, self._places)
            derived = [attribute(bound, name).detach() for name in unbound.derived]
        held, kept = programs(bound), unbound.kept
        structure = (unbound.derived, kept, [program.recipe for program in held])
        alone = single_program(unbound.gm)
        if alone is not None:
            [program], (sources, returned) = held, alone
            places = [kept[i] for i in sources]

            def run_alone(*inputs: Any) -> Any:
                outputs = program(*[inputs[i] for i in places])
                return [outputs[i] for i in returned]

            return _State(marks, structure, held, None, run_alone)
        known = before.compiled if before is not None and before.structure == structure else None
        compiled = known or self._compile(unbound.gm, [inputs[i] for i in kept] + derived)

        def run(*inputs: Any) -> Any:
            return compiled(*[inputs[i] for i in kept], *derived)

        return _State(marks, structure, held, compiled, run)

    def _marks(self, inputs: Sequence[Any]) -> list[Mark]:
        return [(i, weakref.ref(inputs[i]), *fingerprint(inputs[i])) for i in self._places]

    def __call__(self, *inputs: Any) -> Any:
        """The graph's outputs for its original inputs."""
        state = self._state
        if _changed(inputs, state.marks):
            with self._lock:
                state = self._state
                if _changed(inputs, state.marks):
                    state = self._state = self._lower(inputs, state)
        return state.run(*inputs)


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


class Fit:
    """Lookup layers fitted to the convolutions of one graph, and the tensors that they replace."""

    def __init__(self, model: nn.Module, report: Report, weights: Sequence[Tensor]):
        self.layers = dict(lookup_modules(model))
        self.report = report
        self._weights = [(weakref.ref(w), fingerprint(w)) for w in weights]

    def current(self, weights: Sequence[Tensor]) -> bool:
        """Whether it was made for these very tensors, unchanged since."""
        pairs = zip(self._weights, weights, strict=False)
        return len(weights) == len(self._weights) and all(ref() is w and mark == fingerprint(w) for (ref, mark), w in pairs)

    def apply(self, bound: fx.GraphModule) -> fx.GraphModule:
        """Put the lookup layers into a freshly bound graph."""
        lift_functional_convolutions(bound)
        for name, layer in self.layers.items():
            replace_module(bound, bound.get_submodule(name), layer)
        bound.recompile()
        return bound


_FITS: dict[tuple[str, tuple[str, ...]], Fit] = {}


class Calibrating:
    """A graph with dense convolutions that runs dense while it collects inputs, fits, and switches over to lookups.

    When a weight changes afterwards, it calibrates again on the next calls; a second graph of the same weights (for dynamic
    shapes) takes over what the first one learned.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        places: Sequence[int],
        config: LookupConfig,
        batches: int,
        compile: Compile,
    ):
        self._gm, self._places, self._config, self._wanted, self._compile = gm, list(places), config, batches, compile
        self._lock = threading.RLock()
        self._batches: list[tuple[Any, ...]] = []
        self._lowered: Lowered | None = None
        self._fit: Fit | None = None
        bound = lift_functional_convolutions(bind_weights(gm, inputs, places))
        modules: dict[str, nn.Module] = {name: m for name, m in bound.named_modules() if kind_of(m) is not None}
        position = {id(inputs[i]): i for i in places}
        self._sources = sorted({position[id(m.weight)] for m in modules.values() if id(m.weight) in position})
        self._config = _rules_that_match(config, modules)
        self._key = (self._config.to_json(), tuple(modules))
        # A graph with symbolic sizes can only be compiled while Dynamo is at work, or by a compiler of its own.
        self._dynamic = False
        if _real(inputs):
            known = _FITS.get(self._key)
            if known is not None and known.current(self._weights(inputs)):
                self._switch(inputs, known)
        self._dynamic = any(isinstance(value, torch.SymInt | int) for value in inputs)

    def _weights(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[i] for i in self._sources]

    def __call__(self, *inputs: Any) -> Any:
        """The graph's outputs for its original inputs."""
        lowered, fit = self._lowered, self._fit
        if lowered is not None and fit is not None and fit.current(self._weights(inputs)):
            return lowered(*inputs)
        with self._lock:
            if self._lowered is not None:
                log.info("lcnn: a weight has changed; calibrating again")
                self._lowered = self._fit = None
            batch = self._data(inputs)
            if batch is not None and len(self._batches) + 1 == self._wanted:
                log.warning("lcnn: fitting the convolutions of a compiled graph; a large network takes a minute or two")
            outputs = self._gm(*inputs)
            if batch is not None:
                self._batches.append(batch)
            if len(self._batches) >= self._wanted:
                self._learn(inputs)
            return outputs

    def _data(self, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
        """A copy of what is not a weight; None for a batch without information (all zeros, all the same)."""
        skip = set(self._places)
        with _plain_tensors():
            data = tuple(v.detach().clone() if isinstance(v, Tensor) else v for i, v in enumerate(inputs) if i not in skip)
        floating = [v for v in data if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
        useful = any(bool(v.isfinite().all()) and bool((v != v.flatten()[0]).any()) for v in floating)
        return data if useful else None

    def _learn(self, inputs: Sequence[Any]) -> None:
        batches, self._batches = self._batches, []
        with _plain_tensors():
            bound = bind_weights(self._gm, inputs, self._places)
            model, report = convert_in_place(bound.eval(), self._config, batches, title="lcnn: compiled graph")
        fit = Fit(model, report, self._weights(inputs))
        _FITS[self._key] = fit
        self._switch(inputs, fit)
        if report.replaced:
            log.warning("%s", report)
        else:
            reasons = "; ".join(sorted({row.reason for row in report})) or "it has no convolution"
            warnings.warn(f"lcnn replaced nothing in a compiled graph: {reasons}", LcnnWarning, stacklevel=2)

    def _switch(self, inputs: Sequence[Any], fit: Fit) -> None:
        with _plain_tensors():
            self._lowered = Lowered(self._gm, inputs, self._places, self._later, fit.apply)
        self._fit = fit

    def _later(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if not self._dynamic:
            return self._compile(graph, inputs)
        run = torch.compile(graph, backend="inductor", dynamic=True)
        data = {i for i, node in enumerate(graph.graph.find_nodes(op="placeholder")) if not is_weight(node)}

        def call(*args: Any) -> Any:
            for i, value in enumerate(args):
                if i not in data:
                    mark_static(value)
            return run(*args)

        return call


def _rules_that_match(config: LookupConfig, layers: dict[str, nn.Module]) -> LookupConfig:
    """The configuration without rules that match nothing here: a model may be compiled as several graphs."""

    def used(rule: Any) -> bool:
        found = any(matches(rule, name, layer) for name, layer in layers.items())
        if not found:
            text = f"lcnn: the rule {rule!r} matches no layer of a compiled graph; its layers are {list(layers)}"
            warnings.warn(text, LcnnWarning, stacklevel=2)
        return found

    include = tuple(rule for rule in config.include if used(rule))
    if config.include and not include:
        return config.replace(include=(), exclude=("*",), layers={})
    exclude = tuple(rule for rule in config.exclude if used(rule))
    return config.replace(include=include, exclude=exclude, layers={r: o for r, o in config.layers.items() if used(r)})
