"""The scaling benchmark's table and plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcnn_compile.bench.cpu.probe import Peak
from lcnn_compile.bench.cpu.report import NO_KERNELS, milliseconds, ratio
from lcnn_compile.bench.cpu.scaling import SWEEPS


def show_scaling(results: Sequence[dict[str, Any]], console: Console) -> None:
    """One table for each thread count, the probed peaks above it."""
    for result in results:
        if result["peak"]:
            console.print(str(Peak.from_dict(result["peak"])))
        if result["overhead"]:
            console.print(f"a call with nothing to compute: {result['overhead'] * 1e6:.0f} µs")
        console.print(_table(result))
        if any(point["kernels"] == "none" for point in result["points"]):
            console.print(NO_KERNELS, style="red")


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"scaling, {result['threads']} thread(s); roofline = the longest of arithmetic, L1 loads and traffic")
    for heading in (
        "axis",
        "value",
        "best dense ms",
        "lcnn ms",
        "speed-up",
        "MAC ratio",
        "arithmetic",
        "loads",
        "traffic",
        "reached",
    ):
        table.add_column(heading, justify="left" if heading == "axis" else "right")
    for point in result["points"]:
        c, limits = point["comparison"], point.get("roofline")
        cells = [milliseconds(c["dense_seconds"]), milliseconds(c["seconds"]), ratio(c["speedup"]), ratio(c["mac_ratio"])]
        if limits:
            cells += [milliseconds(limits[name]) for name in ("arithmetic", "loads", "traffic")]
            cells.append(f"{limits['reached']:.0%}")
        table.add_row(point["axis"], str(point["value"]), *cells)
    return table


def plot_scaling(results: Sequence[dict[str, Any]], path: Path) -> bool:
    """Time over each axis: dense, lookup and the roofline; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    axes_names = [axis for axis in SWEEPS if any(point["axis"] == axis for point in results[0]["points"])]
    figure = Figure(figsize=(3.2 * len(axes_names), 3.2 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(axes_names), squeeze=False)
    for line, result in zip(grid, results, strict=True):
        for axes, name in zip(line, axes_names, strict=True):
            _plot_axis(axes, name, [point for point in result["points"] if point["axis"] == name])
        line[0].set_ylabel(f"ms, {result['threads']} thread(s)")
    grid[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return True


def _plot_axis(axes: Any, name: str, points: list[dict[str, Any]]) -> None:
    def line(label: str, pairs: list[tuple[int, float | None]], style: str) -> None:
        known = [(x, y * 1e3) for x, y in pairs if y is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], style, label=label, markersize=4)

    line("best dense", [(p["value"], p["comparison"]["dense_seconds"]) for p in points], "s-")
    line("lookup", [(p["value"], p["comparison"]["seconds"]) for p in points], "o-")
    limits = [(p["value"], p["roofline"]) for p in points if "roofline" in p]
    line("roofline", [(x, max(r["arithmetic"], r["loads"], r["traffic"])) for x, r in limits], "k--")
    axes.set_xscale("log", base=2)
    values = [point["value"] for point in points]
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_yscale("log")
    axes.set_xlabel(name.replace("_", " "))
