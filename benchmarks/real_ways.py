"""What the real networks are measured as: our conversions, and other engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from real_cases import Case
from torch import Tensor, nn

from lcnn_compile import LookupConfig, convert, freeze, load, save
from lcnn_compile.errors import LcnnError


def _converted(config: LookupConfig | None, model: nn.Module, case: Case, file: Path) -> nn.Module:
    """Convert, keep what came out, and return it; the dense network where nothing was replaced."""
    made = convert(model, config, calibration=case.calibration(), example_inputs=(case.example(),))
    if made.lcnn_report.replaced or (config is not None and config.precision != "float32"):  # type: ignore[union-attr]
        save(made, file)
    else:
        file.unlink(missing_ok=True)
    return made.eval()


Conversion = Callable[[nn.Module, Case, Path], Any]
CONVERSIONS: dict[str, Conversion] = {
    "one line": partial(_converted, None),
    "2x": partial(_converted, LookupConfig(target_speedup=2.0)),
    "4x": partial(_converted, LookupConfig(target_speedup=4.0)),
    "2x, int8": partial(_converted, LookupConfig(target_speedup=2.0, precision="int8")),
    "4x, int8": partial(_converted, LookupConfig(target_speedup=4.0, precision="int8")),
}
"""Ours: the default of the one-line use, and budgets of multiply-adds."""


def load_converted(case: Case, x: Tensor, file: Path) -> Callable[[Tensor], Any]:
    """What serves a conversion: frozen where that can be, else compiled."""
    if not file.exists():
        return torch.compile(case.build())
    model = load(case.build(), file).eval()
    try:
        return freeze(model, x)
    except LcnnError:
        return torch.compile(model, backend="lcnn")


def _openvino(precision: str, model: nn.Module, case: Case) -> Callable[[Tensor], Tensor]:
    """OpenVINO on one thread; "int8" as NNCF's quantize gives it with the same calibration data."""
    import openvino as ov

    x = case.example()
    found = ov.convert_model(model, example_input=x)
    if precision.startswith("int8"):
        import nncf

        inputs = [part.numpy() for batch in case.calibration() for part in batch.split(x.shape[0])]
        recurrent = [op.get_friendly_name() for op in found.get_ops() if op.get_type_name() == "LSTMSequence"]
        left = nncf.IgnoredScope(names=recurrent) if precision == "int8, LSTM left out" else None
        found = nncf.quantize(found, nncf.Dataset(inputs), subset_size=len(inputs), ignored_scope=left)
    hint = {"bfloat16": "bf16"}.get(precision, "f32")
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": hint}
    compiled = ov.Core().compile_model(found, "CPU", options)
    return lambda inputs: torch.from_numpy(next(iter(compiled(inputs.numpy()).values())).copy())


ENGINES = {f"OpenVINO {precision}": precision for precision in ("float32", "bfloat16", "int8", "int8, LSTM left out")}
"""The last one for networks with recurrent layers, of which eight bits leave nothing."""


def engine(way: str, model: nn.Module, case: Case) -> Callable[[Tensor], Tensor]:
    """The network in another engine."""
    with torch.no_grad():
        return _openvino(ENGINES[way], model, case)
