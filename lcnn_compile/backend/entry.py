"""The torch.compile backend "lcnn": lower and fuse lookup convolutions, replace dense ones by calibrating itself, then Inductor.

Registered through the entry-point group ``torch_dynamo_backends`` alone, so importing lcnn_compile is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.backend.calibrating import Calibrating
from lcnn_compile.backend.graphs import bind_weights, open_attributes, weight_placeholders
from lcnn_compile.backend.guard import attempt, once
from lcnn_compile.backend.runtime import Captured, Lowered
from lcnn_compile.backend.symbols import settle_numbers
from lcnn_compile.backend.unlifted import unlifted
from lcnn_compile.config import LookupConfig
from lcnn_compile.errors import ConfigError, LcnnError
from lcnn_compile.geometry import kind_of
from lcnn_compile.passes import find_convolutions, lift_functional_convolutions, set_precision
from lcnn_compile.passes.effects import refuse_lost_writes
from lcnn_compile.torch_private import compile_with_inductor, dynamo_signals, inductor_modes


def parse_options(options: Mapping[str, Any] | None) -> tuple[LookupConfig, int]:
    """The configuration and the number of calibration batches that ``torch.compile(options=…)`` asks for.

    Without sizes (dictionary_size, sparsity, target_speedup) these are found per layer: within ``max_error`` of each layer where
    that is given, else so that the network is faster and its outputs stay within ``max_output_error``, "auto" by default.

    Raises:
        ConfigError: for unknown keys or bad values.
    """
    given = dict(options or {})
    batches = given.pop("calibration_batches", 1)
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
        raise ConfigError(f"calibration_batches is {batches!r}; an int >= 1 is allowed")
    sizes = {"dictionary_size", "sparsity", "target_speedup"} & set(given)
    try:
        return LookupConfig.from_dict(given) if sizes else LookupConfig.automatic_sizes(**given), batches
    except ConfigError as error:
        raise ConfigError(f'options of torch.compile(backend="lcnn"): {error}; calibration_batches is allowed too') from None


def lcnn(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's; what ``torch.compile(model, backend="lcnn", options=…)`` calls.

    * Graph with lookup convolutions, inference: batch norm is folded, lowerings are chosen, epilogues fused; what was left
      dense stays dense.
    * Dense convolutions on parameters, inference: the first ``calibration_batches`` calls return the dense result; then
      layers are fitted on the inputs seen and replaced, as far as ``max_output_error`` (or each layer's ``max_error``) allows.
    * Training (gradients enabled for a weight): lookup convolutions train, dense ones stay dense with one warning.

    Args:
        gm: the captured graph; it is not changed.
        example_inputs: its inputs, parameters and buffers among them.
        mode: Inductor's mode ("reduce-overhead", "max-autotune", …).
        options: :class:`~lcnn_compile.config.LookupConfig`'s fields and ``calibration_batches``. Of these, a model that is
            converted already takes ``precision="bfloat16"`` only, for all of its layers.

    Raises:
        ConfigError: for unknown options or modes.
        WriteError: the graph writes to the dense weight of a lookup layer.
    """
    if unknown:
        raise ConfigError(f"unknown arguments {sorted(unknown)}; mode and options are allowed")
    config, batches = parse_options(options)
    patches = _mode_options(mode)
    refuse_lost_writes(gm)

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        signals: tuple[type[BaseException], ...] = (*dynamo_signals(), LcnnError)
        try:
            compiled = compile_with_inductor(graph, list(inputs), patches)
        except signals:
            raise
        except Exception as error:
            # Inductor, or the compiler behind it, may fail in any way; the graph itself computes the same.
            reason = str(error).strip().split("\n")[0][:200]
            once(f"Inductor cannot compile a graph of lcnn's, which runs uncompiled: {type(error).__name__}: {reason}")
            return graph
        return compiled

    def opened() -> Callable[..., Any]:
        graph, tensors = open_attributes(settle_numbers(gm))
        compiled = lower(graph, [*example_inputs, *tensors])
        if compiled is None:
            return compile_graph(gm, example_inputs)
        return (lambda *inputs: compiled(*inputs, *tensors)) if tensors else compiled

    def lower(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any] | None:
        names = weight_placeholders(graph, example_inputs)
        bound = bind_weights(graph, example_inputs, names)
        found = find_convolutions(bound)
        lookups = [convolution for convolution in found if convolution.lookup]
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs):
            if found and not lookups:
                once(
                    f"lcnn left {len(found)} dense convolutions dense: their weights need gradients. To train lookup convolutions, "
                    "convert the model first (lcnn_compile.convert); for inference call it under torch.no_grad()."
                )
            return None
        captured = Captured.of(graph, example_inputs, names, compile_graph)
        if lookups:
            transform = None if config.precision == "float32" else partial(set_precision, precision=config.precision)
            return Lowered(captured, example_inputs, transform=transform)
        lift_functional_convolutions(bound)
        if any(kind_of(module) not in (None, nn.Linear) for module in bound.modules()):
            return Calibrating(captured, example_inputs, config, batches)
        left = unlifted(bound)
        if left:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
            once(f"lcnn replaced nothing in a compiled graph: {reasons}")
        else:
            once("lcnn replaced nothing: a compiled graph has no convolution; Inductor compiles it as it is.")
        return None

    return attempt(opened, lambda: compile_graph(gm, example_inputs), "leaves a graph to Inductor as it was")


def _mode_options(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    known = inductor_modes()
    if mode not in known:
        raise ConfigError(f"mode is {mode!r}; allowed are {sorted(known)}")
    return dict(known[mode])
