"""Reports as pictures: bars for every layer, the Pareto curve, a layer's dictionary and how its filters use it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcnn_compile.errors import LcnnError
from lcnn_compile.files import replacing
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import LookupModule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lcnn_compile.report.layers import Report

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    paper: str
    ink: str
    faint: str
    before: str
    after: str
    error: str
    diverging: str
    rising: str


LIGHT = Theme("#ffffff", "#1f2933", "#d9e0e6", "#c3ccd5", "#0f766e", "#c2410c", "RdBu_r", "Greens")
DARK = Theme("#171c22", "#e4e9ee", "#39424d", "#4b5763", "#2dd4bf", "#fb923c", "managua_r", "magma")


def plot_pareto(points: Iterable[Any], path: str | os.PathLike[str]) -> None:
    """Write the Pareto curve of a sweep (.png, .svg or .pdf): error, and the metric where there is one, over the reduction.

    Args:
        points: of :func:`lcnn_compile.learning.sweep`.
        path: the file.

    Raises:
        LcnnError: if matplotlib is not installed, or the file cannot be written.
    """
    save_figure(pareto_figure(list(points)), path)


def plot_dictionary(layer: LookupModule | LookupWeight, path: str | os.PathLike[str], title: str = "") -> None:
    """Write a picture (.png, .svg or .pdf) of a layer's dictionary and of the usage of its vectors.

    From left to right: the dictionary D, one row per vector, scaled to unit length; multiply-adds per output pixel that use each vector; how strongly
    each filter uses each vector, ‖d‖·√Σ P² over kernel positions; the share of taps at each kernel position.

    Raises:
        LcnnError: if matplotlib is not installed, or the file cannot be written.
    """
    save_figure(dictionary_figure(layer, title), path)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all."""
    if Path(path).suffix not in SUFFIXES:
        raise LcnnError(f"{os.fspath(path)} is no name of a picture; it must end in one of {SUFFIXES}")
    with replacing(path) as made:
        figure.savefig(made, dpi=144)


def available() -> bool:
    """Whether pictures can be drawn: whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float, theme: Theme) -> Figure:
    if not available():
        raise LcnnError("pictures need matplotlib: pip install 'lcnn-compile[plot]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=theme.paper)


def _dress(axes: Axes, theme: Theme, title: str, grid: bool = True) -> None:
    axes.set_facecolor(theme.paper)
    axes.set_title(title, loc="left", fontsize=9, color=theme.ink)
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    if grid:
        axes.grid(axis="x", color=theme.faint, linewidth=0.6)
        axes.set_axisbelow(True)


def layers_figure(report: Report, theme: Theme = LIGHT) -> Figure:
    """Bars for every layer: error, multiply-adds before and after, and time before and after where measured."""
    rows = list(report)
    timed = any(row.seconds_before for row in rows)
    panels = [any(row.error is not None for row in rows), any(row.macs_before for row in rows), timed]
    count = max(1, sum(panels))
    width = 2.6 + 3.0 * count
    figure = _figure(width, max(2.2, 1.5 + 0.24 * len(rows)), theme)
    figure.suptitle(report.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=theme.ink)
    figure.supxlabel(report.summary().replace(", ", "\n", 1), x=0.01, ha="left", fontsize=8, color=theme.ink)
    grid: Sequence[Axes] = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    places = range(len(rows))
    left = iter(grid)
    if panels[0]:
        axes = next(left)
        _dress(axes, theme, "relative output error, %")
        errors = [100 * (row.error or 0) if row.replaced else 0 for row in rows]
        axes.barh(places, errors, 0.62, color=theme.error)
        texts = [
            f"{error:.2g}" if row.replaced and row.error is not None else "" for row, error in zip(rows, errors, strict=True)
        ]
        _label(axes, places, texts, theme, errors)
    if panels[1]:
        pairs = [((row.macs_before or 0) / 1e6, (row.macs_after or 0) / 1e6) for row in rows]
        _pairs(next(left), theme, "million multiply-adds per sample", pairs, [row.replaced for row in rows])
    if panels[2]:
        pairs = [(1e3 * (row.seconds_before or 0), 1e3 * (row.seconds_after or 0)) for row in rows]
        _pairs(next(left), theme, "milliseconds, eager", pairs, [row.replaced for row in rows])
    grid[0].set_yticks(list(places), [row.name or "(the model)" for row in rows])
    grid[0].set_ylim(len(rows) - 0.4, -0.6)
    for label, row in zip(grid[0].get_yticklabels(), rows, strict=True):
        label.set_alpha(1.0 if row.replaced else 0.55)
    return figure


def _pairs(axes: Axes, theme: Theme, title: str, pairs: Sequence[tuple[float, float]], replaced: Sequence[bool]) -> None:
    """A bar for after on a wider one for before, and how many times less."""
    _dress(axes, theme, title)
    places = range(len(pairs))
    axes.barh(places, [before for before, _ in pairs], 0.74, color=theme.before, label="before")
    shown = [after if new else 0 for (_, after), new in zip(pairs, replaced, strict=True)]
    axes.barh(places, shown, 0.4, color=theme.after, label="after")
    ends = [f"{before / after:.1f}x" if new and after else "" for (before, after), new in zip(pairs, replaced, strict=True)]
    _label(axes, places, ends, theme, [max(pair) for pair in pairs])
    axes.legend(fontsize=7, frameon=False, labelcolor=theme.ink, loc="lower right")


def _label(axes: Axes, places: Iterable[int], texts: Sequence[str], theme: Theme, ends: Sequence[float]) -> None:
    """Text at the end of every bar."""
    room = max([*ends, 1e-12])
    axes.set_xlim(0, 1.16 * room)
    for place, text, end in zip(places, texts, ends, strict=True):
        axes.text(end + 0.012 * room, place, text, va="center", fontsize=7, color=theme.ink)


def pareto_figure(points: Sequence[Any], theme: Theme = LIGHT) -> Figure:
    """Error over the reduction of multiply-adds; the metric, where there is one, in a second panel."""
    if not points:
        raise LcnnError("a Pareto curve needs at least one point")
    measured = all(getattr(point, "metric", None) is not None for point in points)
    figure = _figure(10 if measured else 6, 3.6, theme)
    panels: Sequence[Axes] = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    reached = [point.speedup for point in points]
    curves = [("relative output error, %", [100 * point.error for point in points], theme.error)]
    if measured:
        curves.append(("metric", [point.metric for point in points], theme.after))
    for axes, (title, values, colour) in zip(panels, curves, strict=True):
        _dress(axes, theme, title)
        axes.grid(color=theme.faint, linewidth=0.6)
        axes.plot(reached, values, "o-", color=colour, markersize=5)
        for x, y in zip(reached, values, strict=True):
            axes.annotate(f"{y:.3g}", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=theme.ink)
        axes.margins(0.08, 0.18)
        axes.set_xscale("log")
        axes.set_xticks(reached, [f"{x:.3g}x" for x in reached])
        axes.minorticks_off()
        axes.set_xlabel("fewer multiply-adds", fontsize=8, color=theme.ink)
    return figure


@dataclass(frozen=True)
class Usage:
    """How the filters of a layer use its dictionary.

    Attributes:
        dictionary: [groups·k, m/groups], one row per vector, scaled to unit length.
        uses: [groups·k], multiply-adds per output pixel that read each vector's plane of S.
        strength: [groups·k, n], ‖d‖·√Σ P² over kernel positions, which no scaling of vectors changes; zero where a filter does
            not use a vector.
        positions: [kh, kw], share of the multiply-adds at each kernel position.
    """

    dictionary: Tensor
    uses: Tensor
    strength: Tensor
    positions: Tensor


def usage_of(layer: LookupModule | LookupWeight) -> Usage:
    """How the filters of ``layer`` use its dictionary."""
    weight = (layer.lookup_weight() if isinstance(layer, LookupModule) else layer).detach()
    lookups = weight.lookup_tensor().float().cpu()
    n, k = lookups.shape[:2]
    groups = weight.groups
    taps = weight.offsets.diff().cpu()
    members = (weight.filters >= 0).sum(1).cpu().repeat_interleave(taps)
    owner = torch.arange(len(taps)).repeat_interleave(taps) // max(1, len(taps) // groups)
    uses = torch.zeros(groups * k, dtype=torch.long).index_add(0, owner * k + weight.indices.long().cpu(), members)
    area = lookups[0, 0].numel()
    positions = torch.zeros(area, dtype=torch.long).index_add(0, weight.positions.long().cpu(), members)
    strength = torch.zeros(groups, k, n)
    per_group = n // groups
    for group in range(groups):
        chosen = slice(group * per_group, (group + 1) * per_group)
        strength[group, :, chosen] = lookups[chosen].flatten(2).norm(dim=2).T
    shares = positions.float() / positions.sum().clamp(min=1)
    dictionary = weight.dictionary.float().cpu().flatten(0, 1)
    length = dictionary.norm(dim=1, keepdim=True)
    return Usage(
        dictionary=dictionary / length.clamp(min=torch.finfo(torch.float32).tiny),
        uses=uses,
        strength=strength.flatten(0, 1) * length,
        positions=shares.view(-1, lookups.shape[-1]),
    )


def dictionary_figure(layer: LookupModule | LookupWeight, title: str = "", theme: Theme = LIGHT) -> Figure:
    """The dictionary beside the usage of its vectors; see :func:`plot_dictionary`."""
    usage = usage_of(layer)
    rows = len(usage.uses)
    figure = _figure(12, min(7.0, max(2.6, 1.2 + 0.05 * rows)), theme)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=theme.ink)
    axes: Sequence[Axes] = figure.subplots(1, 4, width_ratios=(3, 1.3, 4, 1.4))
    limit = float(usage.dictionary.abs().max()) or 1.0
    _dress(axes[0], theme, f"dictionary: {rows} vectors of {usage.dictionary.shape[1]} channels", grid=False)
    shown = axes[0].imshow(
        usage.dictionary.numpy(), cmap=theme.diverging, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    axes[0].set_xlabel("input channel", fontsize=8, color=theme.ink)
    axes[0].set_ylabel("vector", fontsize=8, color=theme.ink)
    _colour_bar(figure, shown, axes[0], theme)
    unused = int((usage.uses == 0).sum())
    _dress(axes[1], theme, f"taps · filters{f', {unused} unused' if unused else ''}")
    axes[1].barh(range(rows), usage.uses.tolist(), 0.8 if rows < 80 else 1.0, color=theme.after)
    axes[1].set_ylim(rows - 0.5, -0.5)
    _dress(axes[2], theme, "strength of use", grid=False)
    shown = axes[2].imshow(usage.strength.numpy(), cmap=theme.rising, aspect="auto", interpolation="nearest")
    axes[2].set_xlabel("filter", fontsize=8, color=theme.ink)
    _colour_bar(figure, shown, axes[2], theme)
    _dress(axes[3], theme, "taps by position, %", grid=False)
    axes[3].imshow(usage.positions.numpy(), cmap=theme.rising, vmin=0)
    axes[3].set_xticks([])
    axes[3].set_yticks([])
    middle = float(usage.positions.max()) / 2
    for r, c in _places(usage.positions):
        share = float(usage.positions[r, c])
        text = "white" if (share > middle) != (theme is DARK) else "black"
        axes[3].text(c, r, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=text)
    return figure


def _places(grid: Tensor) -> list[tuple[int, int]]:
    """Every place of a small grid; none of one too large for numbers in it."""
    high, wide = grid.shape
    return [(r, c) for r in range(high) for c in range(wide)] if high * wide <= 49 else []


def _colour_bar(figure: Figure, shown: Any, axes: Axes, theme: Theme) -> None:
    bar = figure.colorbar(shown, ax=axes, pad=0.02, aspect=30)
    bar.ax.tick_params(colors=theme.ink, labelsize=7, length=0)
    bar.outline.set_visible(False)
