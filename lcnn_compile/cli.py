"""The command line: ``lcnn-compile explain|convert|info|bench|demo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from lcnn_compile.checkpoint import read_header, save
from lcnn_compile.config import LookupConfig
from lcnn_compile.convert import convert, explain
from lcnn_compile.errors import LcnnError
from lcnn_compile.report import LayerReport, Report
from lcnn_compile.sources import load_calibration, load_inputs, load_model

cli = typer.Typer(help="Make convolutional networks faster by learned lookup convolutions.", no_args_is_help=True)
Model = Annotated[str, typer.Argument(help="package.module:factory or file.py:factory; the factory returns an nn.Module.")]
Input = Annotated[list[str] | None, typer.Option("--input", help="Shape (1x3x224x224, 1x8:int64) or .npy file; one per input.")]
Config = Annotated[Path | None, typer.Option("--config", help="JSON file with LookupConfig's fields.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _config(path: Path | None) -> LookupConfig:
    if path is None:
        return LookupConfig()
    try:
        return LookupConfig.from_json(path.read_text())
    except OSError as error:
        raise LcnnError(f"{path} cannot be read: {error}") from error


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        print(report.to_json())
    else:
        Console().print(report)


@cli.command("explain")
def explain_command(model: Model, input: Input = None, config: Config = None, as_json: AsJson = False) -> None:
    """Show what would be replaced, what not and why. Nothing is changed."""
    inputs = load_inputs(input) if input else None
    _print(explain(load_model(model), _config(config), example_inputs=inputs), as_json)


@cli.command("convert")
def convert_command(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Checkpoint to write (.safetensors).")],
    calibration: Annotated[str | None, typer.Option(help=".npy/.npz of samples, or module:factory of batches.")] = None,
    input: Input = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model and save it; load it again with lcnn_compile.load(model, file)."""
    batches = load_calibration(calibration) if calibration else None
    with Progress(console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total or None)
            progress.update(tasks[what], completed=done, total=total or None)

        inputs = load_inputs(input) if input else None
        made = convert(load_model(model), _config(config), calibration=batches, example_inputs=inputs, progress=tell)
    save(made, output)
    report: Any = made.lcnn_report
    _print(report, as_json)


@cli.command("info")
def info_command(file: Path, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds, after checking that it is whole."""
    header = read_header(file)
    if as_json:
        print(json.dumps({"layers": header.layers, "report": header.report, "shapes": header.shapes}))
        return
    if header.report:
        Console().print(Report(tuple(LayerReport(**row) for row in header.report), title=str(file)))
        return
    table = Table("layer", "dictionary", "coefficients", "lowering", title=str(file), box=box.SIMPLE_HEAD)
    for name, layer in header.layers.items():
        prefix = f"{name}." if name else ""
        shapes = [str(header.shapes.get(prefix + key)) for key in ("dictionary", "coefficients")]
        table.add_row(name, *shapes, layer["lowering"])
    Console().print(table)


@cli.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the figures.")] = Path("demo-output"),
) -> None:
    """Train a small network on real images, convert, fine-tune, compile and compare it; a few minutes."""
    from lcnn_compile.demo import run

    run(out, Console())


def _add_bench() -> None:
    from lcnn_compile.bench.cli import app as bench

    cli.add_typer(bench, name="bench", help="Time lookup layers and networks against dense engines.")


_add_bench()


def app() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    try:
        cli()
    except LcnnError as error:
        Console(stderr=True).print(f"lcnn-compile: {error}", style="red", markup=False)
        sys.exit(2)
