"""A whole network: calibrate once, settle sizes, then fit every layer, for one budget or for several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lcnn_compile.config import LayerConfig
from lcnn_compile.errors import ConversionError, LcnnWarning
from lcnn_compile.fitting.costs import Timer
from lcnn_compile.fitting.fitted import FittedNetwork
from lcnn_compile.fitting.network import Network
from lcnn_compile.fitting.processes import Processes
from lcnn_compile.fitting.sampling import Calibration, calibrate
from lcnn_compile.fitting.saved_fits import SavedFits, fingerprint
from lcnn_compile.fitting.stages import Fitting, Progress
from lcnn_compile.fitting.within import Limit
from lcnn_compile.geometry import Layer


def fit_model(
    model: nn.Module,
    layers: Mapping[str, Layer],
    configs: Mapping[str, LayerConfig],
    *,
    calibration: Iterable[Any] | None,
    call: Callable[[nn.Module, Any], Any],
    target_speedup: float | None = None,
    max_output_error: Limit | None = None,
    other: float = 0,
    timer: Timer | None = None,
    pixels: Mapping[str, tuple[int, int]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    resume: Path | None = None,
    distributed: bool = False,
) -> FittedNetwork:
    """Fit lookup weights for convolutions and fully connected layers of a network.

    Args:
        model: in eval mode; its parameters are not touched, hooks are removed again.
        layers: modules inside it, by any name.
        configs: the sizes asked of each.
        calibration: batches, iterated once, any number of them; None to work on the weights alone.
        call: runs the model on one batch.
        target_speedup: reduction of all multiply-adds (or seconds) to reach; the sizes in ``configs`` are then searched.
        max_output_error: allowed error of the network's outputs, see :mod:`~lcnn_compile.fitting.within`; a budget is then
            reached as far as that allows. Without calibration data it cannot be measured and does not count.
        other: multiply-adds (or seconds) per sample outside ``layers``.
        timer: measures what sizes of a layer cost in seconds, in place of multiply-adds.
        pixels: (output, input) pixels per sample of each layer; measured on the calibration data by default.
        seed: for the choice of pixels.
        progress: told (stage, done, of how many).
        resume: a folder that keeps what is fitted, and from which an interrupted call with the same arguments goes on.
        distributed: every process of the default torch.distributed group calls this, each with batches of its own (and a
            ``resume`` folder of its own); the fit is to the data of all, and all get the same.

    Raises:
        ConversionError: if calibration data holds no batch, there is no process group to work with, the target cannot be reached, or ``resume`` is of another call.
    """
    budgets = fit_budgets(
        model,
        layers,
        configs,
        calibration=calibration,
        call=call,
        target_speedups=(target_speedup,),
        max_output_error=max_output_error,
        other=other,
        timer=timer,
        pixels=pixels,
        seed=seed,
        progress=progress,
        resume=resume,
        distributed=distributed,
    )
    return next(budgets)


def fit_budgets(
    model: nn.Module,
    layers: Mapping[str, Layer],
    configs: Mapping[str, LayerConfig],
    *,
    calibration: Iterable[Any] | None,
    call: Callable[[nn.Module, Any], Any],
    target_speedups: Sequence[float | None],
    max_output_error: Limit | None = None,
    other: float = 0,
    timer: Timer | None = None,
    pixels: Mapping[str, tuple[int, int]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    resume: Path | None = None,
    distributed: bool = False,
) -> Iterator[FittedNetwork]:
    """As :func:`fit_model` for each budget in turn; statistics, dictionaries and error curves are made once.

    Either all budgets are None, or none is.
    """
    tell = progress or (lambda *_: None)
    network, processes = Network(model, layers, call), Processes(distributed)
    found: Calibration | None = None
    if calibration is not None:
        found = calibrate(network, calibration, seed, progress=lambda done: tell("calibrate", done, 0))
        if not found.batches:
            raise ConversionError("the calibration data holds no batch")
        found.combine(processes)
    free = target_speedups[0] is not None or (max_output_error is not None and found is not None)
    fitting = Fitting(network, configs, found, pixels, seed, free, tell, processes, timer, other)
    if found is None and not all(fitting.lossless(name) for name in layers):
        warnings.warn(
            "no calibration data: lookups are fitted to the weights alone, which is far less accurate than fitting them "
            "to a few batches of real inputs (calibration=...)",
            LcnnWarning,
            stacklevel=4,
        )
    for number, target in enumerate(target_speedups, 1):
        if resume is not None:
            batches = [] if found is None else found.batches
            fitting.saved = SavedFits(
                resume, fingerprint(network, configs, batches, (target, max_output_error), seed, fitting.costs.unit)
            )
        yield fitting.run(target, max_output_error, last=number == len(target_speedups))
