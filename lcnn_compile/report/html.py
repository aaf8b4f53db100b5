"""The report as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from lcnn_compile.errors import LcnnError
from lcnn_compile.files import replacing
from lcnn_compile.modules import LookupModule, lookup_modules
from lcnn_compile.report import plots
from lcnn_compile.report.table import lowering_text, percent, times
from lcnn_compile.torch_private import module_of

if TYPE_CHECKING:
    from lcnn_compile.report.layers import Report

MOST_LAYERS = 12


def write_html(
    report: Report,
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    layers: Sequence[str] | None = None,
    points: Sequence[Any] = (),
) -> None:
    """Write ``report`` with everything it shows inside; see :meth:`Report.to_html`."""
    text = render(report, model, layers, points)
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8")


def render(report: Report, model: nn.Module | None, layers: Sequence[str] | None, points: Sequence[Any]) -> str:
    """The file's text."""
    environment = Environment(
        loader=PackageLoader("lcnn_compile.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"lowering": lowering_text, "percent": percent, "size": size}
    environment.globals["times"] = times
    pictures: dict[str, tuple[str, str]] = {}
    drawn = plots.available()
    if drawn:
        pictures = {name: _picture(partial(plots.dictionary_figure, layer)) for name, layer in _shown(model, layers)}
    return environment.get_template("template.html").render(
        report=report,
        points=points,
        curve=_picture(partial(plots.pareto_figure, points)) if drawn and points else None,
        pictures=pictures,
        drawn=drawn,
        most={
            "error": max([row.error for row in report.replaced if row.error is not None], default=0) or 1,
            "macs": max([row.macs_before or 0 for row in report], default=0) or 1,
            "seconds": max([max(row.seconds_before or 0, row.seconds_after or 0) for row in report], default=0) or 1,
            "bytes": max([row.bytes_before for row in report], default=0) or 1,
        },
        machine=f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    )


def size(value: float | None) -> str:
    """A number of things with three significant digits and a prefix: 1230 is 1.23 k."""
    if value is None:
        return ""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.3g}"


def _shown(model: nn.Module | None, layers: Sequence[str] | None) -> list[tuple[str, LookupModule]]:
    """The layers whose dictionaries are shown."""
    if model is None:
        if layers:
            raise LcnnError("pictures of dictionaries need the converted model: pass model=")
        return []
    found = dict(lookup_modules(module_of(model)))
    if layers is None:
        return list(found.items())[:MOST_LAYERS]
    missing = [name for name in layers if name not in found]
    if missing:
        raise LcnnError(f"{missing} are no lookup layers of the model; it has {list(found)}")
    return [(name, found[name]) for name in layers]


def _picture(draw: Callable[..., Any]) -> tuple[str, str]:
    """Data URIs of a picture for light and for dark screens."""
    uris = []
    for theme in (plots.LIGHT, plots.DARK):
        buffer = io.BytesIO()
        draw(theme=theme).savefig(buffer, format="png", dpi=110)
        uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris[0], uris[1]
