"""How long every layer takes in the dense and in the lookup model, measured on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.batches import call_model
from lcnn_compile.config import LayerConfig
from lcnn_compile.geometry import geometry_of
from lcnn_compile.modules import lookup_layer, random_weight, replace_module
from lcnn_compile.report.layers import Report

WARM_UP, BURSTS, RUNS = 1, 5, 3


def time_layers(report: Report, dense: nn.Module, lookup: nn.Module, example_inputs: Any, *, budget: float = 20.0) -> Report:
    """The report with ``seconds_before`` and ``seconds_after`` of every layer that both models run by the same name.

    Both models run eagerly in evaluation mode, in turns, in bursts of warm runs; a layer's time is the median
    of its best burst's runs, all its calls in a run together. ``torch.compile`` also fuses what follows a layer, so a whole network gains more or less than
    the sum says.

    Args:
        report: of the conversion of ``dense`` to ``lookup``.
        dense: the model before.
        lookup: the model after.
        example_inputs: one batch, as :func:`~lcnn_compile.convert` takes it.
        budget: seconds after which no further burst is begun.
    """
    names = [row.name for row in report]
    models = {name: copy.deepcopy(model).eval() for name, model in (("dense", dense), ("lookup", lookup))}
    best: dict[str, dict[str, float]] = {name: {} for name in models}
    deadline = time.perf_counter() + budget
    with torch.no_grad():
        for _ in range(BURSTS):
            for name, model in models.items():
                runs = [_run(model, names, example_inputs) for _ in range(WARM_UP + RUNS)][WARM_UP:]
                for layer in runs[0]:
                    seconds = statistics.median(run[layer] for run in runs)
                    best[name][layer] = min(seconds, best[name].get(layer, seconds))
            if time.perf_counter() > deadline:
                break
    rows = [
        replace(row, seconds_before=best["dense"][row.name], seconds_after=best["lookup"][row.name])
        if row.name in best["dense"] and row.name in best["lookup"]
        else row
        for row in report
    ]
    return replace(report, layers=tuple(rows))


def time_planned(report: Report, model: nn.Module, example_inputs: Any) -> Report:
    """The report of a dry run with times: lookup layers of the planned sizes with random values against the model's own layers.

    Args:
        report: of ``explain``.
        model: the dense model.
        example_inputs: one batch.
    """
    lookup = copy.deepcopy(model)
    modules = dict(lookup.named_modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in report.replaced:
            layer = modules.get(row.name)
            geometry = None if layer is None else geometry_of(layer)
            if layer is None or geometry is None or row.dictionary_size is None or row.taps is None:
                continue
            sparsity, group_size = row.taps / geometry.area, row.group_size or 1
            config = LayerConfig(dictionary_size=row.dictionary_size, sparsity=sparsity, group_size=group_size)
            weight = random_weight(geometry.groups, geometry.in_channels, geometry.out_channels, geometry.kernel_size, config)
            new = lookup_layer(weight.to(layer.weight.device, layer.weight.dtype), layer, layer.bias, row.lowering, row.precision)
            lookup = replace_module(lookup, layer, new)
    found = time_layers(report, model, lookup, example_inputs)
    sized = {row.name for row in report.replaced if row.dictionary_size is not None}
    rows = [row if row.name in sized or not row.replaced else replace(row, seconds_after=None) for row in found]
    return replace(report, layers=tuple(rows))


def _run(model: nn.Module, names: Iterable[str], batch: Any) -> dict[str, float]:
    """Seconds spent in each of the named layers during one run."""
    modules = dict(model.named_modules())
    seconds: dict[str, float] = {}
    started: dict[str, float] = {}
    with ExitStack() as stack:
        for name in names:
            if name in modules:
                before, after = _stopwatch(name, started, seconds)
                stack.callback(modules[name].register_forward_pre_hook(before).remove)
                stack.callback(modules[name].register_forward_hook(after).remove)
        call_model(model, batch)
    return seconds


def _stopwatch(
    name: str, started: dict[str, float], seconds: dict[str, float]
) -> tuple[Callable[..., None], Callable[[nn.Module, Any, Any], None]]:
    def before(module: nn.Module, args: Any) -> None:
        _wait(args)
        started[name] = time.perf_counter()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        _wait(args)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started[name]

    return before, after


def _wait(args: Any) -> None:
    """Let a GPU finish, so that a layer's time is its own."""
    if any(isinstance(value, Tensor) and value.is_cuda for value in args):
        torch.cuda.synchronize()
