"""``lcnn-compile info`` and ``lcnn-compile demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from lcnn_compile.checkpoint.header import Header, read_header
from lcnn_compile.cli import options as given
from lcnn_compile.cli.output import output
from lcnn_compile.errors import LcnnError
from lcnn_compile.files import check_target
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import FACTORS
from lcnn_compile.report import LayerReport, Report, plot_dictionary


def info_command(
    file: Annotated[Path, typer.Argument(help="A checkpoint that convert or lcnn_compile.save wrote.")],
    layer: Annotated[str | None, typer.Option(help="With --plot: the layer whose dictionary and its use are drawn.")] = None,
    html: given.Html = None,
    plot: given.Plot = None,
    as_json: given.AsJson = False,
) -> None:
    """Show what a checkpoint holds, after checking that it is whole."""
    with output(as_json) as out:
        for path in (html, plot):
            if path is not None:
                check_target(path)
        if layer is not None and plot is None:
            raise LcnnError("--layer chooses what --plot draws: give --plot too")
        header = read_header(file)
        report = Report(tuple(LayerReport(**row) for row in header.report), title=str(file)) if header.report else None
        if report is None and (html is not None or (plot is not None and layer is None)):
            raise LcnnError(f"{file} holds no report: the model was not made by convert; --plot with --layer draws a dictionary")
        if html is not None and report is not None:
            report.to_html(html)
        if plot is not None and layer is not None:
            plot_dictionary(_weight(file, header, layer), plot, layer)
        elif plot is not None and report is not None:
            report.plot(plot)
        data: dict[str, Any] = {"layers": header.layers, "report": header.report, "shapes": header.shapes}
        out.result(report or _table(file, header), data)


def _table(file: Path, header: Header) -> Table:
    table = Table("layer", "dictionary", "coefficients", "lowering", "precision", title=str(file), box=box.SIMPLE_HEAD)
    for name, settings in header.layers.items():
        shapes = [str(header.shapes.get(f"{name}.{key}" if name else key)) for key in ("dictionary", "coefficients")]
        table.add_row(name, *shapes, settings["lowering"], settings.get("precision", "float32"))
    return table


def _weight(file: Path, header: Header, layer: str) -> LookupWeight:
    if layer not in header.layers:
        raise LcnnError(f"{layer!r} is no lookup layer of {file}; it has {', '.join(header.layers)}")
    tensors = load_file(file)
    prefix = f"{layer}." if layer else ""
    high, wide = header.layers[layer]["kernel_size"]
    return LookupWeight(**{key: tensors[prefix + key] for key in FACTORS}, kernel_size=(high, wide)).validate(layer)


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the figures.")] = Path("demo-output"),
    as_json: given.AsJson = False,
) -> None:
    """Train a small network on real images, convert, fine-tune, compile and compare it; a few minutes."""
    from lcnn_compile.demo import run  # a faster start of the other commands

    result = run(out, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))
