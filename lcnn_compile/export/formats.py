"""Each format by a function that writes it: plain dense networks, torch.export programs, AOTInductor packages, ONNX files."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from lcnn_compile.errors import ExportError, LcnnError
from lcnn_compile.export.aot import has_sizes, input_forms, load_aot, shown, standard_layouts, write_package
from lcnn_compile.export.capture import PLAIN, Lowering, export_program, first_line, private_copy, unlift
from lcnn_compile.export.onnx_check import check_onnx, largest_difference, onnx_differences
from lcnn_compile.export.onnx_form import portable_program
from lcnn_compile.files import replacing
from lcnn_compile.modules import dense_layer, lookup_modules, replace_module
from lcnn_compile.passes.decompose import decompose_lookups
from lcnn_compile.passes.lift import lift_functional_convolutions
from lcnn_compile.torch_private import check_calls, pytree

__all__ = [
    "check_onnx",
    "export_aot",
    "export_onnx",
    "export_program",
    "export_pt2",
    "largest_difference",
    "load_aot",
    "load_pt2",
    "onnx_differences",
    "to_dense",
]

EXTERNAL_BYTES = 1 << 30
"""Larger ONNX models keep their weights in a file of their own; a protobuf holds 2 GiB at most."""


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every lookup layer is the dense layer of the same function, W = P·D.

    The copy needs nothing of lcnn_compile to run, and has the module names of the model before conversion. Conversion may
    have given layers a bias that had none; they keep it.

    Raises:
        ExportError: if the model has no lookup layers.
    """
    result = private_copy(model)
    for _, module in list(lookup_modules(result)):
        result = replace_module(result, module, dense_layer(module))
    if isinstance(result, fx.GraphModule):
        result = decompose_lookups(result, "dense")
    if hasattr(result, "lcnn_report"):
        del result.lcnn_report
    return result


def export_pt2(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    lowering: Lowering = "auto",
    dynamic_batch: bool = True,
) -> None:
    """Write :func:`export_program`'s program; ``torch.export.load(path).module()`` runs it.

    With "auto" or "lookup" the process that loads it must ``import lcnn_compile`` first.

    Raises:
        ExportError: as :func:`export_program`, or if the file's name does not end in .pt2.
    """
    _check_suffix(path, ".pt2")
    program = export_program(model, example_inputs, lowering=lowering, dynamic_batch=dynamic_batch)
    with replacing(path) as made:
        torch.export.save(program, made)


def load_pt2(path: str | os.PathLike[str]) -> fx.GraphModule:
    """The program of a ``torch.export`` file as a module in evaluation mode that ``convert`` and ``load`` take.

    It refuses inputs of other sizes than the program is for: tracing made what depends on them constant.

    Raises:
        ExportError: if the file is none.
    """
    if not Path(path).is_file():
        raise ExportError(f"{os.fspath(path)} is not a file")
    try:
        with _quiet("torch.export"):
            program = torch.export.load(path)
            module = lift_functional_convolutions(unlift(program))
        check_calls(module, _Sizes(input_forms(program)))
    except Exception as error:
        # A damaged file fails in many ways inside zip files and JSON.
        raise ExportError(f"{os.fspath(path)} is not a torch.export program: {first_line(error)}") from error
    return module


class _Sizes:
    """A hook that refuses inputs of sizes that a program is not for."""

    def __init__(self, forms: list[dict[str, Any]]):
        self._forms = forms

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named: dict[str, int] = {}
        for place, (leaf, form) in enumerate(zip(pytree.tree_leaves((args, kwargs)), self._forms, strict=False)):
            known = dict(named)
            if "sizes" in form and isinstance(leaf, Tensor) and not has_sizes(leaf, form["sizes"], named):
                raise ExportError(
                    f"input {place} of the program has shape {shown(form['sizes'], known)}; it got {list(leaf.shape)}"
                )


def export_aot(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    lowering: Lowering = "auto",
    dynamic_batch: bool = True,
) -> None:
    """Compile :func:`export_program`'s program into an AOTInductor package; :func:`load_aot` runs it.

    The package is for this kind of processor and this version of torch. It refuses inputs of other dtypes, sizes and memory
    layouts than the examples' (contiguous or channels_last), whatever loads it; :func:`load_aot` copies other layouts. With
    "auto" or "lookup" the process that loads it must import lcnn_compile; "factored" and "dense" need torch alone
    (``torch._inductor.aoti_load_package``), or no Python at all.

    Raises:
        ExportError: as :func:`export_program`, if the file's name does not end in .pt2, or if Inductor fails.
    """
    _check_suffix(path, ".pt2")
    program = export_program(model, standard_layouts(example_inputs), lowering=lowering, dynamic_batch=dynamic_batch)
    with replacing(path) as made:
        try:
            write_package(program, str(made))
        except LcnnError:
            raise
        except Exception as error:
            # Inductor runs a C++ compiler and may raise anything.
            raise ExportError(f"AOTInductor cannot compile the model: {first_line(error)}; a C++ compiler is needed") from error


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    lowering: Literal["factored", "dense"] = "factored",
    dynamic_batch: bool = True,
    opset_version: int | None = None,
    allowed: float | None = 3e-2,
) -> None:
    """Write the model as ONNX with standard operators only, in a form that engines read alike; needs the extra ``onnx``.

    "factored" makes a lookup layer a 1x1 convolution followed by a convolution with the lookup tensor; "dense" one convolution.
    Weights of more than 1 GiB go to a second file beside it. Poolings with ceil_mode, circular padding, antialiased
    interpolation and a few more are written out in plain operators, since engines disagree on them.

    Args:
        model, example_inputs, lowering, dynamic_batch: as for :func:`export_program`.
        opset_version: ONNX operator set; by default the exporter's.
        allowed: the largest difference from the model that :func:`onnx_differences` may find on ``example_inputs``; None
            asks no engine. Models whose outputs jump (a maximum's index, random numbers) may need None.

    Raises:
        ExportError: as :func:`export_program`, if the exporter is not installed or fails, for an operator that engines
            disagree on, a model that keeps a state, or if an engine that is installed gives other outputs. Nothing is written then.
    """
    _check_suffix(path, ".onnx")
    _require("onnx", "onnxscript")
    if lowering not in PLAIN:
        raise ExportError(f"lowering is {lowering!r}; ONNX has no lookups: 'factored' and 'dense' are allowed")
    program = export_program(model, example_inputs, lowering=lowering, dynamic_batch=dynamic_batch)
    program = portable_program(program)
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    with replacing(path) as made, _quiet("torch.onnx"):
        try:
            names = _output_names(program)
            exported = torch.onnx.export(program, output_names=names, dynamo=True, opset_version=opset_version, verbose=False)
            assert exported is not None
            _name_batch(exported)
            exported.save(str(made), external_data=size > EXTERNAL_BYTES)
        except Exception as error:
            # The exporter translates any operator of the user's model and may raise anything.
            raise ExportError(f"torch.onnx cannot export the model: {first_line(error)}") from error
        if allowed is not None and importlib.util.find_spec("onnxruntime") is not None:
            for engine, found in onnx_differences(made, model, example_inputs).items():
                if not found <= allowed:
                    raise ExportError(
                        f"{engine} gives other outputs for the ONNX file than the model: they differ by {found:.2g} of the largest one; "
                        f"allowed is {allowed}"
                    )


def _name_batch(exported: Any) -> None:
    """Call the symbolic dimension of the inputs "batch" throughout."""
    import onnx_ir

    graph = exported.model.graph
    symbols = {str(dim) for place in graph.inputs for dim in (place.shape or ())[:1] if isinstance(dim, onnx_ir.SymbolicDim)}
    for value in [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]:
        for i, dim in enumerate(value.shape or ()):
            if isinstance(dim, onnx_ir.SymbolicDim) and str(dim) in symbols:
                value.shape[i] = "batch"


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """ "output" for a single tensor, else the keys of a mapping, or "output_0", "output_1" and so on."""
    spec = program.call_spec.out_spec
    assert spec is not None
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))[0]]
    parts = [[str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path] for path in paths]
    return ["_".join(path if path and not path[0].isdigit() else ["output", *path]) for path in parts]


def _check_suffix(path: str | os.PathLike[str], suffix: str) -> None:
    if Path(path).suffix != suffix:
        raise ExportError(f"{os.fspath(path)} does not end in {suffix}; such a file is written")


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} is not installed: pip install 'lcnn-compile[onnx]'")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the remarks of a library that do not concern the user."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
