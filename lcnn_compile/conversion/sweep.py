"""The front of cost against accuracy: one network at several budgets, on statistics and error curves made once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.batches import call_model, conversion_inputs
from lcnn_compile.config import LookupConfig
from lcnn_compile.conversion.eight_bits import to_eight_bits
from lcnn_compile.conversion.plan import Plan
from lcnn_compile.errors import ConfigError, ConversionError
from lcnn_compile.fitting.fitted import FittedLayer
from lcnn_compile.fitting.model import fit_budgets
from lcnn_compile.fitting.ranges import BATCHES
from lcnn_compile.fitting.sampling import BATCH_IMAGES, leading
from lcnn_compile.fitting.stages import Progress
from lcnn_compile.report import Report
from lcnn_compile.torch_private import module_of, pytree


@dataclass(frozen=True)
class SweepPoint:
    """One budget and what it costs.

    Attributes:
        target: the ``target_speedup`` asked for.
        speedup: the reduction of the network's multiply-adds that was reached.
        error: relative error of the network's outputs, ‖y − ŷ‖² / ‖y − mean(y)‖² over all their floating tensors, on (at
            most the first 1024 of) the calibration inputs.
        metric: what ``evaluate`` returned; None without it.
        report: the layers.
        model: the converted network, in evaluation mode.
    """

    target: float
    speedup: float
    error: float
    metric: float | None
    report: Report
    model: nn.Module


def sweep(
    model: nn.Module,
    speedups: Sequence[float],
    *,
    calibration: Iterable[Any] | None,
    example_inputs: Any = None,
    config: LookupConfig | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
) -> list[SweepPoint]:
    """Convert ``model`` for each of several budgets, as ``convert`` does for one.

    Args:
        model: any module; it is not changed.
        speedups: values of ``target_speedup``.
        calibration: batches, read once.
        example_inputs: one batch, to count multiply-adds; the first calibration batch by default.
        config: everything but ``target_speedup``.
        evaluate: a figure of merit of a converted network.
        progress: called with (what, done, total).

    Returns:
        One point for each budget, in their order.

    Raises:
        ConfigError: for a rule that matches nothing, or budgets that are not numbers over 1.
        ConversionError: without calibration data, or if a budget cannot be reached.
    """
    # Conversion uses learning; only here is it the other way round.
    config = config or LookupConfig()
    if not speedups:
        raise ConfigError("speedups is empty; at least one target_speedup is required")
    settings = [config.replace(target_speedup=float(speedup)) for speedup in speedups]
    batches = [] if calibration is None else list(calibration)
    if not batches:
        raise ConversionError("a sweep needs calibration data: batches of real inputs")
    private = copy.deepcopy(module_of(model)).eval()
    example, found = conversion_inputs(private, example_inputs, batches)
    batches = list(found or ())
    plan = Plan(private, settings[0], example)
    fits = fit_budgets(
        plan.model,
        plan.chosen,
        plan.configs,
        calibration=batches,
        call=call_model,
        target_speedups=[setting.target_speedup for setting in settings],
        max_output_error=config.max_output_error,
        other=plan.other(config.budget),
        timer=plan.timer(config.budget),
        pixels={name: (use.out_pixels, use.in_pixels) for name, use in plan.survey.usage.items()},
        seed=config.seed,
        progress=progress,
    )
    seen = _first_images(batches)
    truth = [_outputs(plan.model, batch) for batch in seen]
    points = []
    for setting, fitted in zip(settings, fits, strict=True):
        target = setting.target_speedup
        assert target is not None
        converted, rounded = to_eight_bits(_assemble(plan, fitted), plan, fitted, setting, batches[:BATCHES])
        rows = tuple(plan.row(name, fitted.get(name), rounded.get(name)) for name in plan.names())
        title = f"lcnn: {type(model).__name__} at {target:g}x"
        report = Report(rows, title=title, output_error=fitted.output_error, remarks=fitted.remarks)
        converted.lcnn_report = report  # type: ignore[assignment]
        error = _error(truth, [_outputs(converted, batch) for batch in seen])
        metric = None if evaluate is None else float(evaluate(converted))
        before, after = report.macs()
        points.append(SweepPoint(target, before / max(1, after), error, metric, report, converted))
    return points


def _assemble(plan: Plan, fitted: Mapping[str, FittedLayer]) -> nn.Module:
    """A copy of the plan's model with the fitted layers in place."""
    return plan.replace(copy.deepcopy(plan.model), fitted)


def _first_images(batches: Sequence[Any]) -> list[Any]:
    """Batches up to BATCH_IMAGES images."""
    chosen, images = [], 0
    for batch in batches:
        if images < BATCH_IMAGES:
            chosen.append(batch)
            images += leading(batch) or 1
    return chosen


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(call_model(model, batch))
    return [t.detach().double() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _error(truth: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> float:
    """‖y − ŷ‖² / ‖y − mean(y)‖², each tensor about the mean over its batch; nan where shapes differ."""
    pairs = [pair for old, new in zip(truth, found, strict=True) for pair in zip(old, new, strict=True)]
    if any(y.shape != t.shape for y, t in pairs):
        return float("nan")
    wrong = sum(float((y - t).square().sum()) for y, t in pairs)
    energy = sum(float((y - y.mean(0)).square().sum()) for y, _ in pairs)
    return wrong / max(energy, 1e-30)
