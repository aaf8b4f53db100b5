"""The report as a table in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lcnn_compile.report.layers import LayerReport, Report

GOOD, FAIR = 0.01, 0.05
"""Relative output errors up to which a layer is shown as good, as fair."""
EXPENDABLE = ("at output", "fewer", "faster", "kB", "g", "taps", "ms")
"""What a narrow terminal does without first."""


def report_table(report: Report, width: int | None = None) -> Table:
    """One row per layer, sums below; columns that no layer fills are left out, and the least telling ones to keep to a width."""
    names = [row.name or "(the model)" for row in report]
    cells = {heading: [cell(row) for row in report] for heading, cell, _ in COLUMNS}
    sums = {heading: total(report) for heading, _, total in COLUMNS}
    shown = [heading for heading, column in cells.items() if any(column)]
    widths = {heading: 1 + max(cell_len(_plain(text)) for text in (heading, sums[heading], *cells[heading])) for heading in shown}
    for heading in EXPENDABLE:
        needed = 2 + max(map(cell_len, [*names, "(the model)"])) + sum(widths[other] for other in shown)
        if width is not None and needed > width and heading in shown:
            shown.remove(heading)
    table = Table(title=report.title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0), show_footer=True)
    table.add_column("layer", "sum", overflow="fold", min_width=8)
    for heading in shown:
        table.add_column(heading, sums[heading], justify="left" if heading == "lowering" else "right", no_wrap=True)
    for number, row in enumerate(report):
        style = None if row.replaced else "dim"
        table.add_row(names[number], *(cells[heading][number] for heading in shown), style=style)
    return table


def _plain(text: str) -> str:
    return Text.from_markup(text).plain


def pareto_table(points: Sequence[Any]) -> Table:
    """One row per point of a sweep."""
    table = Table(title="Pareto curve", box=box.SIMPLE_HEAD, title_justify="left")
    measured = any(getattr(point, "metric", None) is not None for point in points)
    for heading in ("asked", "fewer multiply-adds", "error", *(["metric"] if measured else []), "layers replaced", "MB"):
        table.add_column(heading, justify="right")
    for point in points:
        metric = [f"{point.metric:.4g}"] if measured else []
        replaced = f"{len(point.report.replaced)} of {len(point.report)}"
        size = f"{point.report.nbytes()[1] / 1e6:.2f}"
        table.add_row(f"{point.target:g}x", f"{point.speedup:.2f}x", percent(point.error), *metric, replaced, size)
    return table


def percent(value: float) -> str:
    """A share with three significant digits, never rounded to nothing."""
    return f"{100 * value:.2f} %" if value >= 1e-3 or not value else f"{100 * value:.1g} %"


def times(before: float | None, after: float | None) -> str:
    """Like 3.2x, how many times less it is; empty where one is not known."""
    return f"{before / after:.1f}x" if before and after else ""


def _error(row: LayerReport) -> str:
    if row.error is None:
        return ""
    colour = "green" if row.error <= GOOD else "yellow" if row.error <= FAIR else "red"
    return f"[{colour}]{percent(row.error)}[/{colour}]" if row.replaced else percent(row.error)


def _change(before: float | None, after: float | None, digits: int, changed: bool) -> str:
    if before is None:
        return ""
    return f"{before:.{digits}f}" + (f" → {after:.{digits}f}" if changed and after is not None else "")


def _total(pair: tuple[float, float], unit: float, digits: int) -> str:
    return _change(pair[0] / unit, pair[1] / unit, digits, True)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _macs(row: LayerReport) -> str:
    return _change(_scaled(row.macs_before, 1e6), _scaled(row.macs_after, 1e6), 2, row.replaced)


def _milliseconds(row: LayerReport) -> str:
    return _change(_scaled(row.seconds_before, 1e-3), _scaled(row.seconds_after, 1e-3), 2, row.replaced)


def _nothing(report: Report) -> str:
    return ""


def lowering_text(row: LayerReport) -> str:
    """How a layer is computed, in words."""
    if not row.replaced:
        return "left dense" if row.precision == "float32" else f"dense, {row.precision}"
    exact = row.precision == "float32" or (row.lowering != "lookup" and row.precision != "int8")
    return row.lowering if exact else f"lookup, {row.precision}"


def _at_output(report: Report) -> str:
    return "" if report.output_error is None else percent(max(report.output_error.errors, default=0.0))


def _worst(report: Report) -> str:
    errors = [row.error for row in report.replaced if row.error is not None]
    return f"≤ {percent(max(errors))}" if errors else ""


COLUMNS: tuple[tuple[str, Callable[[LayerReport], str], Callable[[Report], str]], ...] = (
    ("k", lambda row: "" if row.dictionary_size is None else str(row.dictionary_size), _nothing),
    ("taps", lambda row: "" if row.taps is None else f"{row.taps:g}", _nothing),
    ("g", lambda row: "" if row.group_size is None else str(row.group_size), _nothing),
    ("error", _error, _worst),
    ("at output", lambda row: "" if row.output_error is None else percent(row.output_error), _at_output),
    ("MMACs", _macs, lambda report: _total(report.macs(), 1e6, 2)),
    ("fewer", lambda row: times(row.macs_before, row.macs_after) if row.replaced else "", lambda report: times(*report.macs())),
    ("ms", _milliseconds, lambda report: _total(report.seconds(), 1e-3, 2)),
    ("faster", lambda row: times(row.seconds_before, row.seconds_after) if row.replaced else "", lambda r: times(*r.seconds())),
    (
        "kB",
        lambda row: _change(row.bytes_before / 1e3, row.bytes_after / 1e3, 0, row.replaced),
        lambda report: _total(report.nbytes(), 1e3, 0),
    ),
    ("lowering", lowering_text, _nothing),
)
