"""What the examples share: a table of a dense network beside its lookup networks, with error, multiply-adds, weights and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

from lcnn_compile.report import Report


def call(model: Any, batch: Any) -> Any:
    """Run a model on a tensor or on keyword arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def pictures(count: int, size: int) -> Tensor:
    """[count, 3, size, size] of smooth noise: neighbouring pixels are alike, as in photographs."""
    return F.interpolate(torch.randn(count, 3, size // 8, size // 8), size=(size, size), mode="bicubic")


def output_error(model: nn.Module, other: nn.Module, batch: Any) -> float:
    """Largest relative error of an output, ‖y - ŷ‖² / ‖y - mean(y)‖²."""
    with torch.no_grad():
        pairs = zip(tree_leaves(call(model, batch)), tree_leaves(call(other, batch)), strict=True)
        return max(
            float((a - b).square().sum() / (a - a.mean()).square().sum())
            for a, b in pairs
            if isinstance(a, Tensor) and a.is_floating_point() and a.numel() > 1 and bool((a != a.flatten()[0]).any())
        )


def milliseconds(run: Any, batch: Any) -> float:
    """Median time of a call on the threads that torch uses."""
    with torch.no_grad():
        call(run, batch)
        timer = Timer("call(run, batch)", globals={"call": call, "run": run, "batch": batch}, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=0.5).median


def compare(title: str, rows: Mapping[str, tuple[nn.Module, str]], report: Report, batch: Any, compiled: bool) -> Table:
    """Print what became of every layer, then a line per network with its quality and its time.

    Args:
        title: of the table.
        rows: name -> (network, its quality in words); the first is the dense one.
        report: of the conversion.
        batch: what is timed.
        compiled: whether to time ``torch.compile`` as well: Inductor for the dense network, "lcnn" for the others.
    """
    before, after = report.macs()
    table = Table(title=title, title_justify="left")
    for heading in (
        "network",
        "quality",
        "million multiply-adds",
        "MB of weights",
        "ms eager",
        *(["ms compiled"] if compiled else []),
    ):
        table.add_column(heading, justify="left" if heading in ("network", "quality") else "right")
    for i, (name, (model, quality)) in enumerate(rows.items()):
        cells = [name, quality, f"{(after if i else before) / 1e6:.1f}", f"{report.nbytes()[1 if i else 0] / 1e6:.2f}"]
        cells.append(f"{milliseconds(model, batch):.2f}")
        if compiled:
            cells.append(f"{milliseconds(torch.compile(model, backend='lcnn' if i else 'inductor'), batch):.2f}")
        table.add_row(*cells)
    console = Console(width=130)
    console.print(report)
    console.print(table)
    return table
