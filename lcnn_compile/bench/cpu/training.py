"""One step of training of single layers, forwards and backwards: lookup layers at their taps, factored, and dense ones.

The gradients of input and parameters are compared with those of the dense form in float64 before any time is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lcnn_compile.bench.cpu.layers import OURS, PAPER, LayerShape, layer_case, sizes
from lcnn_compile.bench.cpu.report import milliseconds, ratio
from lcnn_compile.bench.settings import dense_twin
from lcnn_compile.kernels.cpu import backward as cpu_backward
from lcnn_compile.modules import LookupModule
from lcnn_compile.timing import alternate

LIMIT = 1e-4
SHAPES = (
    (LayerShape(64, 64, 56), 4),
    (LayerShape(128, 128, 28), 16),
    (LayerShape(256, 256, 14), 32),
    (LayerShape(512, 512, 7), 64),
)
QUICK = ((LayerShape(64, 64, 14), 4),)
FORMATS = {"dense": torch.contiguous_format, "dense channels_last": torch.channels_last}


@dataclass(frozen=True)
class Step:
    """The seconds of one step; ``seconds`` is None where the gradients are wrong.

    Attributes:
        setting: "dense", or the sizes of a lookup layer.
        way: how it runs.
        error: distance of the gradients from the float64 truth, relative to its norm; the largest of all.
    """

    case: str
    setting: str
    way: str
    batch: int
    threads: int
    error: float
    seconds: float | None


def _gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    layer(x).backward(grad)
    assert x.grad is not None
    return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def _truth(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """In float64; of a lookup layer through its factored form."""
    exact = copy.deepcopy(layer).double()
    if isinstance(exact, LookupModule):
        exact.lowering = "factored"
    return _gradients(exact, x.double(), grad.double())


def _error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, truth, strict=True))


def _at_taps(call: Callable[[], object], share: float) -> Callable[[], object]:
    """The call with the backward pass at the taps up to this share of P's entries."""

    def run() -> object:
        before = cpu_backward.SHARE
        cpu_backward.SHARE = share
        try:
            return call()
        finally:
            cpu_backward.SHARE = before

    return run


def run(quick: bool) -> list[dict[str, Any]]:
    """Every layer and way as plain JSON."""
    rows: list[Step] = []
    for shape, batch in QUICK if quick else SHAPES:
        case = layer_case(shape, {OURS: sizes(54, 8), PAPER: sizes(27, 1)}, batch)
        x = case.example
        grad = torch.randn(batch, shape.out_channels, shape.resolution, shape.resolution)
        layers: list[tuple[str, str, nn.Module, torch.memory_format, float | None]] = [
            ("dense", way, dense_twin(case.lookups[OURS]), format, None) for way, format in FORMATS.items()
        ]
        for setting, lookups in case.lookups.items():
            layers += [
                (setting, way, lookups, torch.contiguous_format, share) for way, share in (("taps", 1.0), ("factored", 0.0))
            ]
        calls: dict[str, Callable[[], object]] = {}
        errors: list[float] = []
        for number, (_, _, layer, format, share) in enumerate(layers):
            layer.train().to(memory_format=format)  # type: ignore[call-overload]
            arguments = (layer, x.contiguous(memory_format=format), grad.contiguous(memory_format=format))
            call = lambda arguments=arguments: _gradients(*arguments)  # noqa: E731
            ready = call if share is None else _at_taps(call, share)
            errors.append(_error(ready(), _truth(layer, x, grad)))  # type: ignore[arg-type]
            if errors[-1] <= LIMIT:
                calls[str(number)] = ready
        times = alternate(calls, 1.0 if quick else 10.0)
        for number, (setting, way, *_) in enumerate(layers):
            taken = times[str(number)].median if str(number) in times else None
            rows.append(Step(shape.name, setting, way, batch, torch.get_num_threads(), errors[number], taken))
    return [asdict(row) for row in rows]


def show_training(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One line for each layer and setting: how many times faster than the faster dense step."""
    table = Table(title="a step of training, forwards and backwards")
    for heading in ("layer", "batch", "threads", "sizes", "way", "ms", "faster than dense", "error"):
        table.add_column(heading, justify="left" if heading in ("layer", "sizes", "way") else "right")
    for row in rows:
        dense = [r["seconds"] for r in rows if (r["case"], r["threads"], r["setting"]) == (row["case"], row["threads"], "dense")]
        known = [seconds for seconds in dense if seconds is not None]
        faster = min(known) / row["seconds"] if known and row["seconds"] else None
        cells = [row["case"], str(row["batch"]), str(row["threads"]), row["setting"], row["way"]]
        table.add_row(*cells, milliseconds(row["seconds"]), ratio(faster), f"{row['error']:.0e}")
    console.print(table)
