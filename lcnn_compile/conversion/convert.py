"""convert() and explain(): replace the dense convolutions of any nn.Module by lookup convolutions, or tell what would be."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lcnn_compile.batches import call_model, conversion_inputs
from lcnn_compile.config import LookupConfig
from lcnn_compile.conversion.eight_bits import to_eight_bits
from lcnn_compile.conversion.plan import Plan
from lcnn_compile.conversion.untouched import untouched
from lcnn_compile.errors import ConversionError, LcnnWarning
from lcnn_compile.fitting.model import fit_model
from lcnn_compile.fitting.ranges import BATCHES
from lcnn_compile.report import Report
from lcnn_compile.torch_private import module_of

log = logging.getLogger("lcnn_compile")
Progress = Callable[[str, int, int], None]


def convert(
    model: nn.Module,
    config: LookupConfig | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    example_inputs: Any = None,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
    distributed: bool = False,
) -> nn.Module:
    """A copy of ``model`` whose convolutions are lookup convolutions (LCNN, section 3), fitted without labels.

    ``model`` itself is not changed. The copy has ``lcnn_report``, one :class:`~lcnn_compile.report.LayerReport` per layer.
    It is of the model's own class, with its hooks, methods and attributes, also where convolutions are called as functions
    (``F.conv2d(x, self.w)``): such a parameter is then a :class:`~lcnn_compile.modules.FunctionalWeight`, which takes these calls.

    Args:
        model: any module, control flow included; of one that ``torch.compile`` wrapped, the module inside. Other wrappers
            (``DataParallel``, ``AveragedModel``) are kept.
        config: what to replace and with which sizes; by default, with calibration data, what makes the network faster on this
            machine within ``max_output_error``.
        calibration: batches that the model is run on (see :mod:`lcnn_compile.batches`): a few dozen unlabelled inputs
            like those of deployment. It is read once, front to back. Without any the fit sees the weights alone.
        example_inputs: the arguments of one call, to count multiply-adds and to find convolutions that are called as functions;
            the first calibration batch by default.
        progress: called with (what, done, total).
        resume: a folder that keeps every layer once it is fitted; after an interruption the same call goes on from there.
        distributed: every process of the default torch.distributed group (as torchrun makes it) calls this, each with
            calibration batches of its own, and all get the same network, fitted to the data of all.

    Raises:
        ConfigError: for a rule that matches nothing.
        ConversionError: if the model cannot be copied or run, or a budget cannot be reached.
    """
    model = module_of(model)
    private = _copy(model)
    modes = {name: module.training for name, module in private.named_modules()}
    title = f"lcnn: {type(model).__name__}"
    result, report = convert_in_place(
        private.eval(),
        config or (LookupConfig() if calibration is None else LookupConfig.automatic_sizes()),
        calibration,
        example_inputs=example_inputs,
        title=title,
        progress=progress,
        resume=resume,
        distributed=distributed,
    )
    for name, module in result.named_modules():
        # A new module is in the mode of the one that it hangs in.
        modes.setdefault(name, modes.get(name.rpartition(".")[0], model.training))
        module.training = modes[name]
    result.lcnn_report = report  # type: ignore[assignment]
    if not report.changed:
        reasons = {r.reason for r in report if "linear layers" not in r.reason} or {"the model has no convolution"}
        text = f"lcnn replaced nothing: 0 of {len(report)} layers. Reasons: {'; '.join(sorted(reasons))}"
        warnings.warn(text, LcnnWarning, stacklevel=2)
    return result


def convert_in_place(
    model: nn.Module,
    config: LookupConfig,
    calibration: Iterable[Any] | None,
    *,
    example_inputs: Any = None,
    title: str = "lcnn",
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
    distributed: bool = False,
) -> tuple[nn.Module, Report]:
    """Put fitted lookup layers into ``model`` itself, which must be in evaluation mode; see :func:`convert`.

    Its tensors are never changed, only its modules. Returns the model and the report.
    """
    example, batches = conversion_inputs(model, example_inputs, calibration)
    config = config if batches is None else limited(config)
    kept: list[Any] = []
    if batches is not None and config.takes_bytes:
        batches = _keeping(batches, kept)
    plan = Plan(model, config, example)
    with untouched(plan.model):
        fitted = fit_model(
            plan.model,
            plan.chosen,
            plan.configs,
            calibration=batches,
            call=call_model,
            target_speedup=config.target_speedup,
            max_output_error=config.max_output_error,
            other=plan.other(config.budget),
            timer=plan.timer(config.budget),
            pixels={name: (use.out_pixels, use.in_pixels) for name, use in plan.survey.usage.items()},
            seed=config.seed,
            progress=progress,
            resume=None if resume is None else Path(resume),
            distributed=distributed,
        )
    result, rounded = to_eight_bits(plan.replace(plan.model, fitted), plan, fitted, config, kept)
    rows = tuple(plan.row(name, fitted.get(name), rounded.get(name)) for name in plan.names())
    report = Report(rows, title=title, output_error=fitted.output_error, remarks=fitted.remarks)
    log.info("%s\n%s", report.title, report)
    return result, report


def limited(config: LookupConfig) -> LookupConfig:
    """The configuration with the default limit where sizes are to be found and nothing says how far."""
    settings = [config, *(config.override(override) for override in config.layers.values())]
    endless = any(each.automatic and each.max_error is None for each in settings)
    if config.network_limit or not endless:
        return config
    return config.replace(max_output_error="auto")


def _keeping(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """The batches, of which the first ones are kept: calibration data may be read only once."""
    for batch in batches:
        if len(kept) < BATCHES:
            kept.append(batch)
        yield batch


def explain(model: nn.Module, config: LookupConfig | None = None, *, example_inputs: Any = None) -> Report:
    """A dry run of :func:`convert`: what would be replaced, with which sizes, what not and why. Nothing is fitted.

    Raises:
        ConfigError: for a rule that matches nothing.
        ConversionError: if the model fails on the example inputs.
    """
    model = module_of(model)
    private = _copy(model).eval()
    config = config or LookupConfig()
    plan = Plan(private, config, example_inputs)
    rows = tuple(plan.row(name, None) for name in plan.names())
    return Report(rows, title=f"lcnn (dry run): {type(model).__name__}", remarks=tuple(plan.outlook(config)))


def _copy(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"an nn.Module is required, not {type(model).__name__}")
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ConversionError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error
