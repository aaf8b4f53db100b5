"""Tables on the terminal, a JSON file, a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcnn_compile.bench import hardware
from lcnn_compile.bench.cpu.measure import Row
from lcnn_compile.bench.cpu.summary import Comparison, compare
from lcnn_compile.bench.cpu.targets import judge

WIDTH = 180
NO_KERNELS = "the C++ kernels were not available: lookups ran as the factored lowering"


def wide_console() -> Console:
    """A console for the tables: as wide as the terminal, and wide enough for them in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, or a dash."""
    return "–" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def ratio(value: float | None) -> str:
    """Like 12.3×, or a dash."""
    return "–" if value is None else f"{value:.2f}×" if value < 9.995 else f"{value:.1f}×"


def comparison_table(comparisons: Sequence[Comparison], title: str) -> Table:
    """Lookups against the best dense engine."""
    table = Table(title=title)
    for heading in ("case", "setting"):
        table.add_column(heading)
    for heading in (
        "threads",
        "batch",
        "best dense ms",
        "lcnn ms",
        "speed-up",
        "MAC ratio",
        "efficiency",
        "÷ int8",
        "bf16",
        "bf16 ÷ int8",
    ):
        table.add_column(heading, justify="right")
    table.add_column("best dense, or why there is no time")
    for c in comparisons:
        efficiency = "–" if c.efficiency is None else f"{c.efficiency:.2f}"
        times = (milliseconds(c.dense_seconds), milliseconds(c.seconds), ratio(c.speedup), ratio(c.mac_ratio))
        rounded = (ratio(c.speedup_bf16), ratio(c.speedup_bf16_int8))
        numbers = (str(c.threads), str(c.batch), *times, efficiency, ratio(c.speedup_int8), *rounded)
        table.add_row(c.case, c.setting, *numbers, c.reason or c.best_dense)
    return table


def engine_table(rows: Sequence[Row], title: str) -> Table:
    """Milliseconds of every engine, a column each."""
    engines = list(dict.fromkeys(row.engine for row in rows))
    table = Table(title=title)
    table.add_column("case")
    table.add_column("setting")
    for heading in ("threads", "batch", *engines):
        table.add_column(heading, justify="right")
    lines: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.case, row.setting, row.threads, row.batch), {})[row.engine] = row
    for (case, setting, threads, batch), found in lines.items():
        cells = [milliseconds(found[engine].seconds) if engine in found else "" for engine in engines]
        table.add_row(case, setting, str(threads), str(batch), *cells)
    return table


def target_table(comparisons: Sequence[Comparison]) -> Table | None:
    """The targets that this run can judge."""
    judged = judge(comparisons)
    if not judged:
        return None
    table = Table(title="targets, one thread, batch 1")
    for heading in ("case", "setting", "quantity"):
        table.add_column(heading)
    for heading in ("at least", "reached", ""):
        table.add_column(heading, justify="right")
    for target, value in judged:
        case = target.cases[0] if len(target.cases) == 1 else f"{len(target.cases)} layers, geometric mean"
        verdict = "yes" if value >= target.least else "no"
        table.add_row(case, target.setting, target.quantity, f"{target.least:g}", f"{value:.2f}", verdict)
    return table


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print all tables, and every row that got no time."""
    comparisons = compare(rows)
    console.print(comparison_table(comparisons, title))
    console.print(engine_table(rows, "milliseconds"))
    targets = target_table(comparisons)
    if targets is not None:
        console.print(targets)
    if any(row.kernels == "none" for row in rows):
        console.print(NO_KERNELS, style="red")
    for reason in dict.fromkeys(f"{row.engine}, {row.setting}: {row.reason}" for row in rows if row.reason):
        console.print(reason, style="yellow", highlight=False)


def document(benchmark: str, command: str, **content: Any) -> dict[str, Any]:
    """The JSON document of one benchmark: hardware, versions and command first."""
    return {
        "benchmark": benchmark,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware.describe(),
        "versions": hardware.versions(),
        **content,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def plot_comparisons(comparisons: Sequence[Comparison], path: Path, title: str) -> bool:
    """Bars of speed-up beside the MAC ratio; False where matplotlib is not installed or nothing was timed."""
    timed = [(c, c.speedup) for c in comparisons if c.speedup is not None]
    if importlib.util.find_spec("matplotlib") is None or not timed:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.42 * len(timed)), layout="constrained")
    axes = figure.subplots()
    places = range(len(timed))
    axes.barh([p - 0.2 for p in places], [speedup for _, speedup in timed], 0.4, label="speed-up over the best dense engine")
    axes.barh([p + 0.2 for p in places], [c.mac_ratio for c, _ in timed], 0.4, label="fewer multiply-adds", color="lightgrey")
    axes.set_yticks(list(places), [f"{c.case}, {c.setting}, batch {c.batch}, {c.threads} thr." for c, _ in timed], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times")
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True
