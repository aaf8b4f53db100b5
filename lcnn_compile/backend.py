"""The torch.compile backend "lcnn": lower and fuse lookup convolutions, replace dense ones by calibrating itself, then Inductor.

Registered through the entry-point group ``torch_dynamo_backends`` alone, so importing lcnn_compile is not needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lcnn_compile.config import LookupConfig
from lcnn_compile.errors import ConfigError, LcnnError, LcnnWarning
from lcnn_compile.graphs import bind_weights, weight_placeholders
from lcnn_compile.passes import find_convolutions, set_precision
from lcnn_compile.runtime import Calibrating, Lowered
from lcnn_compile.torch_private import compile_with_inductor, dynamo_signals, inductor_modes

MAX_ERROR = 0.05
_warned: set[str] = set()


def parse_options(options: Mapping[str, Any] | None) -> tuple[LookupConfig, int]:
    """The configuration and the number of calibration batches that ``torch.compile(options=…)`` asks for.

    Without sizes (dictionary_size, sparsity, target_speedup) these are found per layer within ``max_error``, 0.05 by default.

    Raises:
        ConfigError: for unknown keys or bad values.
    """
    given = dict(options or {})
    batches = given.pop("calibration_batches", 1)
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
        raise ConfigError(f"calibration_batches is {batches!r}; an int >= 1 is allowed")
    if not {"dictionary_size", "sparsity", "target_speedup"} & set(given):
        given = {"dictionary_size": "auto", "sparsity": "auto", "max_error": MAX_ERROR, **given}
    try:
        return LookupConfig.from_dict(given), batches
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
      layers are fitted on the inputs seen and replaced, each within its ``max_error``.
    * Training (gradients enabled for a weight): lookup convolutions train, dense ones stay dense with one warning.

    Args:
        gm: the captured graph; it is not changed.
        example_inputs: its inputs, parameters and buffers among them.
        mode: Inductor's mode ("reduce-overhead", "max-autotune", …).
        options: :class:`~lcnn_compile.config.LookupConfig`'s fields and ``calibration_batches``. Of these, a model that is
            converted already takes ``precision="bfloat16"`` only, for all of its layers.

    Raises:
        ConfigError: for unknown options or modes.
    """
    if unknown:
        raise ConfigError(f"unknown arguments {sorted(unknown)}; mode and options are allowed")
    config, batches = parse_options(options)
    patches = _mode_options(mode)

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        signals: tuple[type[BaseException], ...] = (*dynamo_signals(), LcnnError)
        try:
            compiled = compile_with_inductor(graph, list(inputs), patches)
        except signals:
            raise
        except Exception as error:
            # Inductor, or the compiler behind it, may fail in any way; the graph itself computes the same.
            reason = str(error).strip().split("\n")[0][:200]
            _once(
                "inductor", f"Inductor cannot compile a graph of lcnn's, which runs uncompiled: {type(error).__name__}: {reason}"
            )
            return graph
        return compiled

    places = weight_placeholders(gm, example_inputs)
    bound = bind_weights(gm, example_inputs, places)
    found = find_convolutions(bound)
    dense = [c for c in found if not c.lookup and c.name != c.node.name]
    training = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)
    if training:
        if dense and len(dense) == len(found):
            _once(
                "training",
                f"lcnn left {len(dense)} dense convolutions dense: their weights need gradients. To train lookup convolutions, "
                "convert the model first (lcnn_compile.convert); for inference call it under torch.no_grad().",
            )
        return compile_graph(gm, example_inputs)
    if not found:
        _once("nothing", "lcnn replaced nothing: a compiled graph has no convolution; Inductor compiles it as it is.")
        return compile_graph(gm, example_inputs)
    if len(dense) == len(found):
        return Calibrating(gm, example_inputs, places, config, batches, compile_graph)
    transform = None if config.precision == "float32" else partial(set_precision, precision=config.precision)
    return Lowered(gm, example_inputs, places, compile_graph, transform)


def _mode_options(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    known = inductor_modes()
    if mode not in known:
        raise ConfigError(f"mode is {mode!r}; allowed are {sorted(known)}")
    return dict(known[mode])


def _once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, LcnnWarning, stacklevel=2)
