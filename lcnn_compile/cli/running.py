"""``lcnn-compile run``: an exported model on arrays and images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from lcnn_compile.cli import options as given
from lcnn_compile.cli.images import read_image
from lcnn_compile.cli.output import output
from lcnn_compile.errors import LcnnError
from lcnn_compile.export.native import loader
from lcnn_compile.files import check_target, replacing

SHOWN = 5
"""Entries of an output that are shown, the largest first."""


def run_command(
    model: Annotated[Path, typer.Argument(help="A model.lcnn that export --native wrote; its library lies beside it.")],
    inputs: Annotated[
        list[Path], typer.Argument(help="For each input of the model an image or a .npy file of float32, batch first.")
    ],
    save: Annotated[Path | None, typer.Option(help="Write the outputs: a .npy file, or .npz where there are several.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="That work on one call.")] = 1,
    times: Annotated[bool, typer.Option("--times", help="Show the time of every step.")] = False,
    image_mean: given.ImageMean = given.MEAN,
    image_std: given.ImageStd = given.STD,
    as_json: given.AsJson = False,
) -> None:
    """Run an exported model, without PyTorch's part in it; outputs as numbers."""
    with output(as_json) as out:
        if save is not None:
            check_target(save)
        try:
            with loader.Model(model, threads) as opened:
                arrays = [_array(path, port, image_mean, image_std) for path, port in zip(inputs, opened.inputs, strict=False)]
                arrays += [np.load(path) for path in inputs[len(opened.inputs) :]]  # which the model refuses
                found = dict(zip((port.name for port in opened.outputs), opened(*arrays), strict=True))
                steps = [step._asdict() for step in opened.profile(*arrays)] if times else []
        except (loader.NativeError, OSError, ValueError) as error:
            raise LcnnError(str(error)) from error
        if save is not None:
            with replacing(save) as made, made.open("wb") as file:
                np.savez(file, **found) if len(found) > 1 else np.save(file, next(iter(found.values())))
        data = {name: y.tolist() for name, y in found.items()} if save is None else {}
        out.result(_table(found, steps), {"outputs": data, "steps": steps})


def _array(path: Path, port: Any, mean: str, std: str) -> Any:
    """A file as the model's input."""
    if path.suffix == ".npy":
        return np.load(path)
    sizes = port.shape[1:]
    if len(sizes) != 3 or sizes[0] not in (1, 3):
        raise LcnnError(f"{path} is no .npy file, and the input {port.name} takes {port.shape}, no image")
    try:
        return read_image(path, given.images(f"{sizes[1]}x{sizes[2]}", None, mean, std, 1, None)).numpy()[None]
    except ImportError as error:
        raise LcnnError("images need Pillow: pip install 'lcnn-compile[images]'") from error


def _table(found: dict[str, Any], steps: list[dict[str, Any]]) -> Table:
    table = Table("output", "shape", "image", "largest entries", box=box.SIMPLE_HEAD)
    for name, y in found.items():
        for i, image in enumerate(y):
            flat = image.reshape(-1)
            best = np.argsort(-flat, kind="stable")[:SHOWN]
            table.add_row(name, str(y.shape), str(i), ", ".join(f"[{j}] {flat[j]:.4g}" for j in best))
    for step in steps:
        table.add_row(f"step {step['value']}", step["kind"], "", f"{1e6 * step['seconds']:.1f} µs")
    return table
