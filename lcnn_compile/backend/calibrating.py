"""A compiled graph of dense convolutions that fits lookups to the inputs of its first calls. Used by the backend."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.backend.graphs import bind_weights, fingerprint, users_name
from lcnn_compile.backend.guard import attempt, once
from lcnn_compile.backend.runtime import Captured, Lowered, is_real
from lcnn_compile.backend.sandbox import Recorded, plain_tensors, record, replaying, without_effects
from lcnn_compile.config import LookupConfig, Rule
from lcnn_compile.conversion.convert import convert_in_place
from lcnn_compile.conversion.selection import matches
from lcnn_compile.errors import LcnnWarning
from lcnn_compile.geometry import kind_of
from lcnn_compile.modules import lookup_modules, replace_module
from lcnn_compile.passes import lift_functional_convolutions
from lcnn_compile.passes.targets import example
from lcnn_compile.report import Report
from lcnn_compile.torch_private import alone_with_dynamo, is_users_tensor

log = logging.getLogger("lcnn_compile")
PATIENCE = 4
"""Calls that bring no calibration (their data are constant, or the weights have just changed) until the user is told."""


class Fit:
    """Lookup layers fitted to the convolutions of one graph, and the tensors that they replace."""

    def __init__(self, model: nn.Module, report: Report, weights: Sequence[Tensor]):
        self.layers = dict(lookup_modules(model))
        self.report = report
        self.weights = _Snapshot(weights)

    def current(self, weights: Sequence[Tensor]) -> bool:
        """Whether it was made for these very tensors, unchanged since."""
        return self.weights.same(weights)

    def apply(self, bound: fx.GraphModule) -> fx.GraphModule:
        """Put the lookup layers into a freshly bound graph."""
        lift_functional_convolutions(bound)
        for name, layer in self.layers.items():
            replace_module(bound, bound.get_submodule(name), layer)
        bound.recompile()
        return bound


class _Snapshot:
    """Tensors as they were; it does not keep them alive."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._marks = [(weakref.ref(t), fingerprint(t)) for t in tensors]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        pairs = zip(self._marks, tensors, strict=False)
        return len(tensors) == len(self._marks) and all(ref() is t and mark == fingerprint(t) for (ref, mark), t in pairs)


_FITS: dict[tuple[Any, ...], Fit] = {}


class Calibrating:
    """A graph with dense convolutions that runs dense while it collects inputs, fits, and switches over to lookups.

    When a weight changes afterwards, it calibrates again once the weights have come to rest; a second graph of the same
    operations on the same weights (for dynamic shapes) takes over what the first one learned.
    """

    def __init__(self, captured: Captured, inputs: Sequence[Any], config: LookupConfig, batches: int):
        self._captured, self._wanted = captured, batches
        self._lock = threading.RLock()
        self._batches: list[Recorded] = []
        self._lowered: Lowered | None = None
        self._fit: Fit | None = None
        self._dense: Callable[..., Any] = captured.gm
        self._fruitless = 0  # calls in a row that did not serve to calibrate
        self._failed = False
        self._seen: _Snapshot | None = None
        bound = lift_functional_convolutions(bind_weights(captured.gm, inputs, captured.names))
        modules = {name: module for name, module in bound.named_modules() if kind_of(module) is not None}
        position = {id(inputs[i]): i for i in captured.names}
        tensors = [t for m in modules.values() for t in (m.weight, m.bias) if id(t) in position]
        self._sources = sorted({position[id(tensor)] for tensor in tensors})
        self._config = _rules_that_match(config, modules)
        operations = tuple(str(node.target) for node in captured.gm.graph.nodes if example(node) is not None and node.args)
        self._key = (self._config.to_json(), tuple(f"{name}: {module}" for name, module in modules.items()), operations)
        if is_real(inputs):
            known = _FITS.get(self._key)
            if known is not None and known.current(self._weights(inputs)):
                # Dynamo is at work, so symbolic sizes can be compiled at once.
                self._switch(known, Lowered(captured, inputs, None, known.apply))

    def _weights(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[i] for i in self._sources]

    def __call__(self, *inputs: Any) -> Any:
        """The graph's outputs for its original inputs."""
        lowered, fit = self._lowered, self._fit
        if lowered is not None and fit is not None and fit.current(self._weights(inputs)):
            return lowered(*inputs)
        if self._failed:
            return self._dense(*inputs)
        with self._lock:
            if self._lowered is not None:
                log.info("lcnn: a weight has changed; calibrating again")
                self._lowered = self._fit = None
            return self._dense_call(inputs)

    def _dense_call(self, inputs: Sequence[Any]) -> Any:
        """The dense result, whose inputs are kept; after enough of them layers are fitted."""
        weights = self._weights(inputs)
        resting = self._seen is None or self._seen.same(weights)
        if self._seen is None or not resting:
            self._seen = _Snapshot(weights)
        kept = len(self._batches)
        if kept < self._wanted:
            call = self._record(inputs)
            if call is not None and self._is_useful(call, inputs):
                self._batches.append(call)
        ready = resting and len(self._batches) >= self._wanted
        if ready:
            log.warning("lcnn: fitting the convolutions of a compiled graph; a large network takes a minute or two")
        outputs = self._dense(*inputs)
        if ready:
            self._learn(inputs)
        elif len(self._batches) == kept:
            self._wait(resting)
        return outputs

    def _record(self, inputs: Sequence[Any]) -> Recorded | None:
        """The call, but for its weights; None where something in it cannot be copied."""
        data = [value for i, value in enumerate(inputs) if i not in self._captured.names]
        return attempt(lambda: record(data), lambda: None, "cannot copy the inputs of a compiled graph to calibrate")

    def _is_useful(self, call: Recorded, inputs: Sequence[Any]) -> bool:
        """Whether a call tells how the network is used: its data differ, or without that what reaches every convolution does."""
        places = self._captured.gm.graph.find_nodes(op="placeholder")
        own = [is_users_tensor(node) for i, node in enumerate(places) if i not in self._captured.names]
        data = [v for v, users in zip(call.inputs, own, strict=True) if isinstance(v, Tensor) and not users]
        if any(map(_varies, data)):
            return True
        return self._fruitless < PATIENCE and self._reaches_layers(call, inputs)

    def _reaches_layers(self, call: Recorded, inputs: Sequence[Any]) -> bool:
        """Whether every convolution sees data that differ, as in a network that makes images of a constant."""
        seen: dict[str, bool] = {}

        def watch(name: str, module: nn.Module) -> None:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen[name] = seen.get(name, False) or _varies(args[0])

            module.register_forward_pre_hook(see)

        def run() -> bool:
            with without_effects():
                bound = self._bound(inputs)
                for name, module in bound.named_modules():
                    if kind_of(module) is not None:
                        watch(name, module)
                bound(call)
            return bool(seen) and all(seen.values())

        return attempt(run, lambda: False, "cannot look at what reaches the convolutions of a compiled graph")

    def _wait(self, resting: bool) -> None:
        """Tell the user, after some calls in vain, why layers stay dense."""
        self._fruitless += 1
        if self._fruitless != PATIENCE:
            return
        why = "the inputs of its calls are constant" if resting else "its weights change from call to call"
        once(
            f"lcnn leaves the convolutions of a compiled graph dense for now, because {why}; it calibrates as soon as that ends."
        )
        self._dense = self._compile_dense

    def _compile_dense(self, *inputs: Any) -> Any:
        gm = self._captured.gm

        def compiled() -> Callable[..., Any]:
            return self._captured.compile_later(gm, inputs)

        self._dense = attempt(compiled, lambda: gm.forward, "cannot compile a graph that stays dense")
        return self._dense(*inputs)

    def _bound(self, inputs: Sequence[Any]) -> fx.GraphModule:
        """The graph with modules for its convolutions, on the user's own weights; it takes a recorded call."""
        bound = bind_weights(self._captured.gm, inputs, self._captured.names)
        return replaying(lift_functional_convolutions(bound).eval())

    def _learn(self, inputs: Sequence[Any]) -> None:
        batches, self._batches = self._batches, []

        def work() -> None:
            with without_effects():
                model, found = convert_in_place(self._bound(inputs), self._config, batches, title="lcnn: compiled graph")
            rows = tuple(replace(row, name=users_name(row.name)) for row in found)
            fit = Fit(model, replace(found, layers=rows), self._weights(inputs))
            _FITS[self._key] = fit
            self._switch(fit, Lowered(self._captured, inputs, self._captured.compile_later, fit.apply))
            if fit.report.changed:
                log.warning("%s", fit.report)
            else:
                reasons = "; ".join(sorted({row.reason for row in rows})) or "it has no convolution"
                once(f"lcnn replaced nothing in a compiled graph: {reasons}")

        def stay() -> None:
            self._failed, self._dense = True, self._compile_dense

        with alone_with_dynamo():
            attempt(work, stay, "leaves the convolutions of a compiled graph dense, which it could not fit")

    def _switch(self, fit: Fit, lowered: Lowered) -> None:
        self._lowered, self._fit, self._fruitless = lowered, fit, 0
        self._seen = fit.weights  # a later change has to come to rest first


def _varies(value: Any) -> bool:
    """Whether a tensor is finite and of more than one value."""
    if not isinstance(value, Tensor) or value.numel() < 2 or value.layout != torch.strided or value.is_quantized:
        return False
    with plain_tensors():
        return bool(value.isfinite().all()) and bool((value != value.flatten()[0]).any())


def _rules_that_match(config: LookupConfig, layers: Mapping[str, nn.Module]) -> LookupConfig:
    """The configuration in the graph's names, without rules that match nothing here: a model may be compiled as several graphs."""

    def used(rule: Rule) -> list[Rule]:
        own = [name for name, layer in layers.items() if matches(rule, name, layer)]
        found = [name for name, layer in layers.items() if name not in own and matches(rule, users_name(name), layer)]
        if not own and not found:
            text = f"lcnn: the rule {rule!r} matches no layer of a compiled graph; its layers are {list(map(users_name, layers))}"
            warnings.warn(text, LcnnWarning, stacklevel=2)
        return [*([rule] if own else []), *found]

    include = tuple(name for rule in config.include for name in used(rule))
    if config.include and not include:
        return config.replace(include=(), exclude=("*",), layers={})
    exclude = tuple(name for rule in config.exclude for name in used(rule))
    overrides = {name: override for rule, override in config.layers.items() for name in used(rule)}
    return config.replace(include=include, exclude=exclude, layers=overrides)
