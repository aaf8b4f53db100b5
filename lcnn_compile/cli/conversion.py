"""``lcnn-compile explain`` and ``lcnn-compile convert``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text
from torch import Tensor, nn

from lcnn_compile.batches import Inputs, batch_inputs
from lcnn_compile.checkpoint.archive import save
from lcnn_compile.cli import options as given
from lcnn_compile.cli.output import Output, output
from lcnn_compile.cli.sources import load_calibration, load_factory, load_inputs, load_model
from lcnn_compile.config import LookupConfig
from lcnn_compile.conversion.convert import convert, explain
from lcnn_compile.errors import ConversionError, LcnnError
from lcnn_compile.files import check_target
from lcnn_compile.learning import sweep
from lcnn_compile.progress import progress_bars
from lcnn_compile.report import Report, plot_pareto, time_layers, time_planned
from lcnn_compile.report.table import pareto_table
from lcnn_compile.torch_private import pytree

NOTHING = 3
"""Exit code where no layer was replaced."""


def explain_command(
    model: given.Model,
    weights: given.Weights = None,
    input: given.Input = None,
    config: given.Config = None,
    dictionary_size: given.DictionarySize = None,
    sparsity: given.Sparsity = None,
    group_size: given.GroupSize = None,
    max_error: given.MaxError = None,
    max_output_error: given.MaxOutputError = None,
    target_speedup: given.TargetSpeedup = None,
    budget: given.Budget = None,
    include: given.Include = None,
    exclude: given.Exclude = None,
    lowering: given.Lowering = None,
    precision: given.Precision = None,
    seed: given.Seed = None,
    time: given.Timed = False,
    html: given.Html = None,
    plot: given.Plot = None,
    as_json: given.AsJson = False,
) -> None:
    """Show what would be replaced, with which sizes, what not and why. Nothing is changed or fitted.

    With --time, layers of the planned sizes with random values are timed against the model's own.
    """
    limits = (dictionary_size, sparsity, group_size, max_error, max_output_error, target_speedup, budget)
    changes = given.sizes(*limits, include, exclude, lowering, precision, seed)
    with output(as_json) as out:
        _check_targets(html, plot)
        settings = given.configuration(config, changes)
        network, inputs = load_model(model, weights), load_inputs(input) if input else None
        report = explain(network, settings, example_inputs=inputs)
        if time:
            if inputs is None:
                raise LcnnError("--time needs inputs: give --input, a shape like 1x3x224x224")
            report = time_planned(report, network, inputs)
        _show(out, report, html, plot)


def convert_command(
    model: given.Model,
    checkpoint: Annotated[Path | None, typer.Argument(metavar="[OUTPUT]", help="Checkpoint to write (.safetensors).")] = None,
    weights: given.Weights = None,
    calibration: given.Calibration = None,
    batch: given.Batch = 16,
    input: given.Input = None,
    config: given.Config = None,
    dictionary_size: given.DictionarySize = None,
    sparsity: given.Sparsity = None,
    group_size: given.GroupSize = None,
    max_error: given.MaxError = None,
    max_output_error: given.MaxOutputError = None,
    target_speedup: given.TargetSpeedup = None,
    budget: given.Budget = None,
    include: given.Include = None,
    exclude: given.Exclude = None,
    lowering: given.Lowering = None,
    precision: given.Precision = None,
    seed: given.Seed = None,
    image_size: given.ImageSize = None,
    image_resize: given.ImageResize = None,
    image_mean: given.ImageMean = given.MEAN,
    image_std: given.ImageStd = given.STD,
    image_limit: given.ImageLimit = 512,
    reductions: Annotated[
        str | None,
        typer.Option("--sweep", help="Reductions to try, like 2,4,8,16: the Pareto curve, and with OUTPUT a checkpoint each."),
    ] = None,
    evaluate: Annotated[str | None, typer.Option(help="With --sweep: module:function of a model that returns a metric.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps fitted layers; the same command goes on from there after an interruption."),
    ] = None,
    time: given.Timed = True,
    html: given.Html = None,
    plot: given.Plot = None,
    as_json: given.AsJson = False,
) -> None:
    """Convert a model and save it; lcnn_compile.load(model, OUTPUT) loads it again."""
    limits = (dictionary_size, sparsity, group_size, max_error, max_output_error, target_speedup, budget)
    changes = given.sizes(*limits, include, exclude, lowering, precision, seed)
    if checkpoint is None and reductions is None:
        raise LcnnError("name the checkpoint to write (OUTPUT), or the reductions of a --sweep")
    if resume is not None and reductions is not None:
        raise LcnnError("--resume keeps one conversion; it does not go with --sweep")
    with output(as_json) as out:
        _check_targets(checkpoint, html, plot)
        settings = given.configuration(config, changes)
        network, inputs = load_model(model, weights), load_inputs(input) if input else None
        batches: Iterable[Any] | None = None
        if calibration is not None:
            pictures = given.images(image_size, image_resize, image_mean, image_std, image_limit, inputs)
            batches = load_calibration(calibration, batch, pictures, network)
        if reductions is not None:
            _sweep(
                out, network, given.numbers("--sweep", reductions), settings, batches, inputs, evaluate, checkpoint, html, plot
            )
            return
        assert checkpoint is not None
        example, batches = (inputs, batches) if inputs is not None or batches is None else _first(network, batches)
        with progress_bars(out.errors) as tell:
            made = convert(network, settings, calibration=batches, example_inputs=example, progress=tell, resume=resume)
        report: Report = made.lcnn_report  # type: ignore[assignment]
        if time and example is not None and report.replaced:
            report = time_layers(report, network, made, example)
            made.lcnn_report = report  # type: ignore[assignment]
        if report.replaced:
            save(made, checkpoint)
        _show(out, report, html, plot, made, checkpoint)
        if not report.replaced:
            out.note(f"nothing was replaced, so {checkpoint} is not written")
            raise typer.Exit(NOTHING)


def _check_targets(*paths: Path | None) -> None:
    """Complain before the work, not after it, about files that could not be written."""
    for path in paths:
        if path is not None:
            check_target(path)


def _first(network: nn.Module, batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """One sample of the first batch, and all batches; an iterator is not shortened by the look."""
    iterator: Iterator[Any] = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise ConversionError("the calibration data holds no batch") from None
    sample = _sample(batch_inputs(network, first))
    return sample, chain([first], iterator) if iterator is batches else batches


def _sample(inputs: Inputs) -> Inputs:
    """The first sample of every tensor that has as many as the first one: an image without a batch is a sample already."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].dim() < 4:
        return inputs
    count = len(tensors[0])
    sample: Inputs = pytree.tree_map_only(Tensor, lambda t: t[:1] if t.dim() and len(t) == count else t, inputs)
    return sample


def _show(
    out: Output,
    report: Report,
    html: Path | None,
    plot: Path | None,
    model: nn.Module | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Write and print a report."""
    if html is not None:
        report.to_html(html, model if report.replaced else None)
    if plot is not None:
        report.plot(plot)
    written = [str(path) for path in (checkpoint if report.replaced else None, html, plot) if path is not None]
    out.result(Group(report, *_end(written)), {**report.to_dict(), **report.totals(), "written": written})


def _sweep(
    out: Output,
    network: nn.Module,
    speedups: tuple[float, ...],
    config: LookupConfig,
    batches: Iterable[Any] | None,
    inputs: Any,
    evaluate: str | None,
    checkpoint: Path | None,
    html: Path | None,
    plot: Path | None,
) -> None:
    """The Pareto curve as a table, JSON, HTML and picture; a checkpoint for each point where one is named."""
    metric = None if evaluate is None else load_factory(evaluate)
    with progress_bars(out.errors) as tell:
        points = sweep(
            network, speedups, calibration=batches, example_inputs=inputs, config=config, evaluate=metric, progress=tell
        )
    written = []
    for point in points:
        if checkpoint is not None and point.report.replaced:
            path = checkpoint.with_stem(f"{checkpoint.stem}-{point.target:g}x")
            save(point.model, path)
            written.append(path)
    if html is not None:
        points[-1].report.to_html(html, points[-1].model, points=points)
        written.append(html)
    if plot is not None:
        plot_pareto(points, plot)
        written.append(plot)
    data = [
        {
            "target": p.target,
            "speedup": p.speedup,
            "error": p.error,
            "metric": p.metric,
            **p.report.to_dict(),
            **p.report.totals(),
        }
        for p in points
    ]
    names = [str(path) for path in written]
    out.result(Group(pareto_table(points), *_end(names)), {"points": data, "written": names})


def _end(written: list[str]) -> list[Text]:
    return [Text(f"written: {', '.join(written)}", style="dim")] if written else []
