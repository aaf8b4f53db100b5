"""One case: lookup models against every dense engine, checked for correctness before any time is taken.

The truth is the dense model with W = P·D in float64. A lookup model may be at most FACTOR times as far from it as PyTorch's
own float32 dense model is; one that is farther gets no time, only a reason. Dense float32 engines are held to DENSE_LIMIT, and
lookups that round their operands to bfloat16 to ROUNDED_LIMIT, networks in eight bits to BYTES_LIMIT (their errors are in the rows, as those
of other engines' eight bits are).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.batches import call_model
from lcnn_compile.bench import macs
from lcnn_compile.bench.cpu.engines import CALIBRATION_BATCHES, Engine, Runnable, run_torch
from lcnn_compile.bench.settings import dense_twin
from lcnn_compile.conversion.eight_bits import calibrate_ranges, take_dense
from lcnn_compile.export.frozen import freeze
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu import program
from lcnn_compile.modules import lookup_modules
from lcnn_compile.timing import alternate

FACTOR = 4.0
DENSE_LIMIT, ROUNDED_LIMIT, BYTES_LIMIT = 1e-4, 0.05, 0.3


def _compiled(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
    return run_torch(torch.compile(model, backend="lcnn"), example)


def _frozen(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
    return run_torch(freeze(model, example, dynamic_batch=False), example)


def rounding(model: nn.Module) -> nn.Module:
    """A copy whose lookups round to bfloat16."""
    model = copy.deepcopy(model)
    for _, module in lookup_modules(model):
        module.precision = "bfloat16"
    return model


def _rounded(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
    return _frozen(rounding(model), example, folder)


def in_bytes(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy in eight bits throughout, with ranges from the example and from random inputs like it."""
    model = copy.deepcopy(model)
    model, _ = take_dense(model, lambda name: False)
    for _, module in lookup_modules(model):
        module.precision = "int8"
    generator = torch.Generator().manual_seed(0)
    batches = [example, *(torch.randn(example.shape, generator=generator) for _ in range(CALIBRATION_BATCHES - 1))]
    calibrate_ranges(model, batches, call_model, 0)
    return model


def _bytes(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
    return _frozen(in_bytes(model, example), example, folder)


LIMITS = {"lcnn bf16": ROUNDED_LIMIT, "lcnn int8": BYTES_LIMIT}
LOOKUP_ENGINES = {
    "lcnn": Engine("lcnn", True, (), _compiled),
    "lcnn frozen": Engine("lcnn frozen", True, (), _frozen),
    "lcnn eager": Engine("lcnn eager", True, (), run_torch),
    "lcnn bf16": Engine("lcnn bf16", False, (), _rounded),
    "lcnn int8": Engine("lcnn int8", False, (), _bytes),
}


@dataclass(frozen=True)
class Case:
    """What is measured together: lookup models by setting, all replacing one dense model, on one input."""

    name: str
    lookups: Mapping[str, nn.Module]
    example: Tensor


@dataclass
class Row:
    """One model on one engine. Without ``seconds``, ``reason`` says why.

    Attributes:
        setting: "dense", or the setting of the lookup model.
        exact: float32 throughout.
        error: distance from the float64 truth, relative to its norm; ``allowed`` is the largest accepted.
        low, high: quartiles of ``bursts`` bursts.
        lookups: calls of the lookup operator in one call of the model; what "auto" keeps dense is not among them.
        kernels: instruction set of the C++ kernels, or "none" where lookups fall back to the factored lowering.
    """

    case: str
    setting: str
    engine: str
    exact: bool
    threads: int
    batch: int
    macs: int
    error: float | None = None
    allowed: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    bursts: int = 0
    reason: str = ""
    lookups: int | None = None
    kernels: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @property
    def failed(self) -> bool:
        """A model of ours that got no time."""
        return self.setting != "dense" and self.seconds is None


def distance(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖ / ‖truth‖, in float64; infinite where y is not finite or has another shape."""
    if y.shape != truth.shape or not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y.double() - truth).norm() / truth.norm())


def lookup_calls(call: Callable[[], object]) -> int:
    """How many lookup convolutions one call runs on kernels of ours, in programs or one by one."""
    before = program.lookups_run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    single = sum(event.count for event in profiler.key_averages() if event.key.startswith("lcnn::lookup_conv2d"))
    return single + program.lookups_run() - before


def _prepare(engine: Engine, model: nn.Module, case: Case, folder: Path, row: Row, truth: Tensor) -> Runnable | None:
    """The engine's runnable if it can run the model and is right; else None, and the row says why."""
    missing = engine.missing()
    if missing:
        row.reason = f"missing: {', '.join(missing)}"
        return None
    try:
        runnable = engine.prepare(model, case.example, folder)
        runnable.call()
        row.error = distance(runnable.output(), truth)
    except Exception as error:  # an engine of somebody else's may fail in any way; it is listed, the others still count
        row.reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        return None
    if row.allowed is not None and not row.error <= row.allowed:
        row.reason = f"wrong: error {row.error:.1e}, allowed {row.allowed:.1e}"
        return None
    return runnable


@torch.no_grad()
def measure(
    case: Case,
    engines: Sequence[Engine],
    seconds: float = 10.0,
    lookup_engines: Sequence[Engine] = tuple(LOOKUP_ENGINES.values()),
    folder: Path | None = None,
) -> list[Row]:
    """Check, then time, every lookup model and the dense model that the first of them replaces.

    Args:
        case: what to measure.
        engines: for the dense model.
        seconds: of timing, about, after all is prepared.
        lookup_engines: for the lookup models.
        folder: where engines keep converted models for the next time; a temporary one by default.

    Returns:
        One row for each model and engine.
    """
    if folder is None:
        with TemporaryDirectory() as temporary:
            return measure(case, engines, seconds, lookup_engines, Path(temporary))
    rows: list[Row] = []
    calls: dict[str, Runnable] = {}

    def add(setting: str, engine: Engine, model: nn.Module, multiply_adds: int, truth: Tensor, allowed: float | None) -> None:
        sizes = (torch.get_num_threads(), case.example.shape[0], multiply_adds)
        row = Row(case.name, setting, engine.name, engine.exact, *sizes, allowed=allowed)
        runnable = _prepare(engine, model, case, folder, row, truth)
        if runnable is not None:
            calls[str(len(rows))] = runnable
            if setting != "dense":
                row.lookups = lookup_calls(runnable.call)
                row.kernels = cpu_build.instruction_set() if cpu.is_available() else "none"
        rows.append(row)

    for number, (setting, model) in enumerate(case.lookups.items()):
        dense = dense_twin(model)
        truth = dense_twin(copy.deepcopy(model).double())(case.example.double())
        if number == 0:
            multiply_adds = macs.count(dense, case.example)
            for engine in engines:
                add("dense", engine, dense, multiply_adds, truth, DENSE_LIMIT if engine.exact else None)
        allowed = FACTOR * distance(dense(case.example), truth)
        multiply_adds = macs.count(model, case.example)
        for engine in lookup_engines:
            add(setting, engine, model, multiply_adds, truth, allowed if engine.exact else LIMITS[engine.name])
    for key, timing in alternate({key: runnable.call for key, runnable in calls.items()}, seconds).items():
        row = rows[int(key)]
        row.seconds, row.low, row.high, row.bursts = timing.median, timing.low, timing.high, timing.bursts
    return rows
