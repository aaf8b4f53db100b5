"""``lcnn-compile export``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from lcnn_compile import export
from lcnn_compile.batches import inputs_of
from lcnn_compile.checkpoint.archive import load
from lcnn_compile.cli import options as given
from lcnn_compile.cli.output import output
from lcnn_compile.cli.sources import load_inputs, load_model
from lcnn_compile.errors import ExportError, LcnnError
from lcnn_compile.export.frozen import frozen_form
from lcnn_compile.files import check_target, replacing
from lcnn_compile.modules import lookup_modules
from lcnn_compile.torch_private import pytree

ALLOWED = {"float32": 1e-3, "bfloat16": 3e-2, "int8": 1e-1}
"""Largest difference from the model, relative to its largest output, that rounding explains, for each precision of its layers."""


def export_command(
    model: given.Model,
    checkpoint: given.Checkpoint = None,
    weights: given.Weights = None,
    input: given.Input = None,
    onnx: Annotated[Path | None, typer.Option(help="ONNX of standard operators (.onnx); extra onnx.")] = None,
    pt2: Annotated[Path | None, typer.Option(help="torch.export program (.pt2).")] = None,
    aot: Annotated[Path | None, typer.Option(help="AOTInductor package for this kind of processor (.pt2).")] = None,
    native: Annotated[
        Path | None,
        typer.Option(help="Folder of a model file and the library that runs it: needs neither Python nor a compiler."),
    ] = None,
    dense: Annotated[Path | None, typer.Option(help="State dict of the plain dense network (.safetensors).")] = None,
    lowering: Annotated[
        str | None,
        typer.Option(
            help="auto or lookup call our operator: import lcnn_compile where the file is loaded. factored or dense need nothing of ours. "
            "By default auto, for ONNX factored."
        ),
    ] = None,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Only the batch size of --input.")] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set.")] = None,
    as_json: given.AsJson = False,
) -> None:
    """Write a converted model for other runtimes, and compare each file's outputs with the model's own."""
    chosen = {"onnx": onnx, "pt2": pt2, "aot": aot, "native": native, "dense": dense}
    wanted = {name: path for name, path in chosen.items() if path is not None}
    if not wanted:
        raise LcnnError("nothing to write: give at least one of --onnx, --pt2, --aot, --native and --dense with a file name")
    with output(as_json) as out:
        for name, path in wanted.items():
            check_target(path / "model.lcnn" if name == "native" and path.exists() else path)
        network = load_model(model, weights)
        if checkpoint is not None:
            network = load(network, checkpoint).eval()
        if input is None and set(wanted) != {"dense"}:
            raise LcnnError("--input is needed to trace the model: give a shape like 1x3x224x224 for each input")
        inputs = load_inputs(input) if input else None
        how: dict[str, Any] = {"dynamic_batch": not fixed_batch} | ({"lowering": lowering} if lowering else {})
        writers: dict[str, Callable[[Path], dict[str, float]]] = {
            "onnx": partial(_onnx, network, inputs, {**how, "opset_version": opset}),
            "pt2": partial(_pt2, network, inputs, how),
            "aot": partial(_aot, network, inputs, how),
            "native": partial(_native, network, inputs, not fixed_batch),
            "dense": partial(_dense, network, inputs),
        }
        rounding = {layer.precision for _, layer in lookup_modules(network)} or {"float32"}
        allowed = max(ALLOWED[precision] for precision in rounding)
        files = []
        for name, path in wanted.items():
            with out.errors.status(f"writing {path}"):
                found = writers[name](path)
            difference = max(found.values(), default=None)
            for engine, far in found.items():
                if not far <= (ALLOWED["float32"] if name == "native" else allowed):
                    raise ExportError(
                        f"{path} gives other outputs than the model in {engine}: they differ by {far:.2g} of the largest one"
                    )
            parts = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
            files.append(
                {"format": name, "path": str(path), "bytes": sum(part.stat().st_size for part in parts), "difference": difference}
            )
        out.result(_table(files), {"files": files})


def _table(files: list[dict[str, Any]]) -> Table:
    table = Table("format", "file", box=box.SIMPLE_HEAD)
    table.add_column("MB", justify="right")
    table.add_column("largest difference", justify="right")
    for row in files:
        difference = "not compared" if row["difference"] is None else f"{row['difference']:.1g}"
        table.add_row(row["format"], row["path"], f"{row['bytes'] / 1e6:.2f}", difference)
    return table


def _own(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs_of(model, inputs))  # models write to their inputs
    with torch.no_grad():
        return model(*args, **kwargs)


def _onnx(model: nn.Module, inputs: Any, how: dict[str, Any], path: Path) -> dict[str, float]:
    export.export_onnx(model, path, inputs, allowed=None, **how)
    return export.onnx_differences(path, model, inputs)


def _pt2(model: nn.Module, inputs: Any, how: dict[str, Any], path: Path) -> dict[str, float]:
    export.export_pt2(model, path, inputs, **how)
    return {"torch.export": export.largest_difference(_own(torch.export.load(path).module(), inputs), _own(model, inputs))}


def _aot(model: nn.Module, inputs: Any, how: dict[str, Any], path: Path) -> dict[str, float]:
    export.export_aot(model, path, inputs, **how)
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs_of(model, inputs))
    return {"AOTInductor": export.largest_difference(export.load_aot(path)(*args, **kwargs), _own(model, inputs))}


def _native(model: nn.Module, inputs: Any, dynamic: bool, path: Path) -> dict[str, float]:
    """Compared with the frozen model, whose bits it must have: eight-bit networks differ from the converted one by design."""
    export.export_native(model, path, inputs, dynamic_batch=dynamic)
    frozen = frozen_form(model, inputs, dynamic, may_stay_dense=False)
    args, kwargs = inputs_of(model, inputs)
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    found = export.load_native(path)(*leaves)
    return {"the library": export.largest_difference(found, frozen(*args, **kwargs))}


def _dense(model: nn.Module, inputs: Any, path: Path) -> dict[str, float]:
    plain = export.to_dense(model).eval()
    with replacing(path) as made:
        save_file({key: value.detach().contiguous().clone() for key, value in plain.state_dict().items()}, made)
    return {} if inputs is None else {"PyTorch": export.largest_difference(_own(plain, inputs), _own(model, inputs))}
