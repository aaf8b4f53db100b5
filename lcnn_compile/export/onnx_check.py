"""What the engines that are installed make of an ONNX file, against the model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.batches import inputs_of
from lcnn_compile.errors import ExportError
from lcnn_compile.export.capture import first_line, private_copy
from lcnn_compile.torch_private import pytree

Run = Callable[[dict[str, Any]], Sequence[Any]]


def check_onnx(path: str | os.PathLike[str], model: nn.Module, example_inputs: Any) -> float:
    """The largest difference between engines' outputs and the model's own, relative to the largest own value.

    The engines and batch sizes are those of :func:`onnx_differences`, which tells them apart.

    Raises:
        ExportError: as :func:`onnx_differences`.
    """
    return max(onnx_differences(path, model, example_inputs).values())


def onnx_differences(path: str | os.PathLike[str], model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """The largest difference from the model by engine: "ONNX Runtime", and "OpenVINO" where it is installed.

    Where the file's batch size varies, the batch size of ``example_inputs``, 1 and 3 are tried. Both engines compute in float32.

    Raises:
        ExportError: if onnxruntime is not installed, an engine cannot run the file, or the file's inputs or outputs (their
            number and shapes) are not those of the model; it names the engine and the batch size.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ExportError("onnxruntime is not installed: pip install 'lcnn-compile[onnx]'")
    private = private_copy(model).eval()
    leaves, spec = pytree.tree_flatten(inputs_of(private, example_inputs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    names, varying = _inputs(path)
    if len(names) != len(tensors):
        raise ExportError(f"{path} has the inputs {names}; the example inputs hold {len(tensors)} tensors")
    sizes = [next((len(t) for t, free in zip(tensors, varying, strict=True) if free), 0)]
    if any(varying):
        sizes += [size for size in (1, 3) if size not in sizes]
    cases = []
    for size in sizes:
        batch = iter([_resized(t, size) if free else t for t, free in zip(tensors, varying, strict=True)])
        given = pytree.tree_unflatten([next(batch) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        own = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]
        feeds = {name: t.detach().cpu().numpy().copy() for name, t in zip(names, own, strict=True)}
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, given)
        with torch.no_grad():
            cases.append((size, feeds, pytree.tree_leaves(private(*args, **kwargs))))
    return {engine: _difference(engine, run, cases) for engine, run in _engines(path)}


def largest_difference(found: Any, wanted: Any) -> float:
    """max |found - wanted| / max |wanted| over all tensors of two outputs; infinite where one of them is not a number.

    Raises:
        ExportError: if they have different numbers of tensors or shapes.
    """
    pairs = [[t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)] for outputs in (found, wanted)]
    shapes = [[tuple(t.shape) for t in tensors] for tensors in pairs]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the outputs have shapes {shapes[0]}; the model's own have {shapes[1]}")
    worst = 0.0
    for y, own in zip(*pairs, strict=True):
        if own.numel():
            y, own = y.double(), own.double()
            # Infinities of one sign, and values that are no numbers in both, are the same.
            same = (y == own) | (y.isnan() & own.isnan())
            finite = own[own.isfinite()].abs()
            scale = float(finite.max()) if finite.numel() else 0.0
            far = torch.where(same, 0.0, (y - own).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
            worst = max(worst, float(far.max()) / (scale or 1.0))
    return worst


def _difference(engine: str, run: Run, cases: list[tuple[int, dict[str, Any], list[Any]]]) -> float:
    worst = 0.0
    for size, feeds, wanted in cases:
        where = f"{engine}, batch size {size}" if size else engine
        try:
            found = [torch.from_numpy(y) for y in run(feeds)]
        except Exception as error:
            # An engine may refuse a file or a shape with errors of its own kinds.
            raise ExportError(f"{where}: {first_line(error)}") from error
        try:
            worst = max(worst, largest_difference(found, wanted))
        except ExportError as error:
            raise ExportError(f"{where}: {error}") from error
    return worst


def _resized(tensor: Tensor, size: int) -> Tensor:
    return tensor if len(tensor) == size else tensor[torch.arange(size, device=tensor.device) % len(tensor)]


def _inputs(path: str | os.PathLike[str]) -> tuple[list[str], list[bool]]:
    """The names of a file's inputs, and whether the first dimension of each varies."""
    import onnxruntime

    places = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"]).get_inputs()
    return [place.name for place in places], [bool(place.shape) and not isinstance(place.shape[0], int) for place in places]


def _engines(path: str | os.PathLike[str]) -> list[tuple[str, Run]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    engines: list[tuple[str, Run]] = [("ONNX Runtime", lambda feeds: session.run(None, feeds))]
    if importlib.util.find_spec("openvino") is not None:
        engines.append(("OpenVINO", _openvino(path)))
    return engines


def _openvino(path: str | os.PathLike[str]) -> Run:
    import openvino

    def run(feeds: dict[str, Any]) -> Sequence[Any]:
        if not made:
            # On processors with bfloat16 units it would round to that.
            options = {"INFERENCE_PRECISION_HINT": "f32"}
            made.append(openvino.compile_model(os.fspath(path), "CPU", options))
        return list(made[0](feeds).values())

    made: list[Any] = []
    return run
