"""Converted models for other runtimes: plain dense networks, torch.export programs, AOTInductor packages, ONNX files."""

from __future__ import annotations

import copy
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
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lcnn_compile.batches import inputs_of
from lcnn_compile.errors import ExportError, LcnnError
from lcnn_compile.files import replacing
from lcnn_compile.modules import dense_layer, lookup_modules, replace_module
from lcnn_compile.passes import choose_lowerings, fold_batch_norm, fuse_epilogues, narrow_convolutions
from lcnn_compile.passes.decompose import decompose_lookups
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.lift import lift_functional_convolutions
from lcnn_compile.torch_private import FakeTensorMode, compile_package, module_of, pytree

Lowering = Literal["auto", "lookup", "factored", "dense"]
PLAIN = ("factored", "dense")
EXTERNAL_BYTES = 1 << 30
"""Larger ONNX models keep their weights in a file of their own; a protobuf holds 2 GiB at most."""


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every lookup layer is the dense layer of the same function, W = P·D.

    The copy needs nothing of lcnn_compile to run, and has the module names of the model before conversion. Conversion may
    have given layers a bias that had none; they keep it.

    Raises:
        ExportError: if the model has no lookup layers.
    """
    result = _copy(model)
    for _, module in list(lookup_modules(result)):
        result = replace_module(result, module, dense_layer(module))
    if isinstance(result, fx.GraphModule):
        result = decompose_lookups(result, "dense")
    if hasattr(result, "lcnn_report"):
        del result.lcnn_report
    return result


def export_program(
    model: nn.Module, example_inputs: Any, *, lowering: Lowering = "auto", dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """The model as a ``torch.export`` program for inference: batch norm folded, lowerings settled, epilogues fused.

    Args:
        model: a converted model.
        example_inputs: one batch: a tensor, a tuple of tensors, or a mapping of keyword arguments.
        lowering: "auto" settles each layer's lowering by measurement on this machine for the batch given; "lookup" uses our
            operator in every layer. Both make a program that calls ``torch.ops.lcnn``: the process that loads it must import
            lcnn_compile first. "factored" (a 1x1 convolution, then a convolution with the lookup tensor) and "dense" make a
            program of ordinary operators that needs nothing of ours.
        dynamic_batch: let the first dimension of every input whose size it shares with the first input vary.

    Raises:
        ExportError: if the model has no lookup layers, or ``torch.export`` cannot capture it.
    """
    if lowering not in ("auto", "lookup", *PLAIN):
        raise ExportError(f"lowering is {lowering!r}; allowed are 'auto', 'lookup', 'factored' and 'dense'")
    private = _copy(model).eval().requires_grad_(False)
    if lowering != "auto":
        for _, module in lookup_modules(private):
            module.lowering = lowering
    args, kwargs = inputs_of(private, example_inputs)
    gm = unlift(_capture(private, args, kwargs, dynamic_batch))
    _set_shapes(gm, args, kwargs)
    fold_batch_norm(gm)
    if lowering in PLAIN:
        decompose_lookups(gm, lowering)
    else:
        fuse_epilogues(choose_lowerings(narrow_convolutions(gm) if lowering == "auto" else gm))
    return _capture(_without_dead_tensors(gm), args, kwargs, dynamic_batch)


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
    """The program of a ``torch.export`` file as a module in evaluation mode that ``convert`` and ``load`` take; shapes are not guarded.

    Raises:
        ExportError: if the file is none.
    """
    if not Path(path).is_file():
        raise ExportError(f"{os.fspath(path)} is not a file")
    try:
        with _quiet("torch.export"):
            return lift_functional_convolutions(unlift(torch.export.load(path)))
    except Exception as error:
        # A damaged file fails in many ways inside zip files and JSON.
        raise ExportError(f"{os.fspath(path)} is not a torch.export program: {_first_line(error)}") from error


def export_aot(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    lowering: Lowering = "auto",
    dynamic_batch: bool = True,
) -> None:
    """Compile :func:`export_program`'s program into an AOTInductor package; ``torch._inductor.aoti_load_package(path)`` runs it.

    The package is for this kind of processor and this version of torch. With "auto" or "lookup" the process that loads it
    must ``import lcnn_compile`` first; "factored" and "dense" need torch alone, or no Python at all.

    Raises:
        ExportError: as :func:`export_program`, if the file's name does not end in .pt2, or if Inductor fails.
    """
    _check_suffix(path, ".pt2")
    program = export_program(model, example_inputs, lowering=lowering, dynamic_batch=dynamic_batch)
    with replacing(path) as made:
        try:
            compile_package(program, str(made))
        except Exception as error:
            # Inductor runs a C++ compiler and may raise anything.
            raise ExportError(f"AOTInductor cannot compile the model: {_first_line(error)}; a C++ compiler is needed") from error


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    lowering: Literal["factored", "dense"] = "factored",
    dynamic_batch: bool = True,
    opset_version: int | None = None,
) -> None:
    """Write the model as ONNX with standard operators only; needs the extra ``onnx``.

    "factored" makes a lookup layer a 1x1 convolution followed by a convolution with the lookup tensor; "dense" one convolution.
    Weights of more than 1 GiB go to a second file beside it. See :func:`check_onnx`.

    Raises:
        ExportError: as :func:`export_program`, or if the exporter is not installed or fails.
    """
    _check_suffix(path, ".onnx")
    _require("onnx", "onnxscript")
    if lowering not in PLAIN:
        raise ExportError(f"lowering is {lowering!r}; ONNX has no lookups: 'factored' and 'dense' are allowed")
    program = export_program(model, example_inputs, lowering=lowering, dynamic_batch=dynamic_batch)
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
            raise ExportError(f"torch.onnx cannot export the model: {_first_line(error)}") from error


def check_onnx(path: str | os.PathLike[str], model: nn.Module, example_inputs: Any) -> float:
    """The largest difference between ONNX Runtime's outputs and the model's own, relative to the largest own value.

    Raises:
        ExportError: if onnxruntime is not installed, or the file's inputs or outputs are not those of the model.
    """
    _require("onnxruntime")
    import onnxruntime

    private = _copy(model).eval()
    args, kwargs = inputs_of(private, example_inputs)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    names = [place.name for place in session.get_inputs()]
    if len(names) != len(tensors):
        raise ExportError(f"{path} has the inputs {names}; the example inputs hold {len(tensors)} tensors")
    found = session.run(None, {name: t.detach().cpu().numpy() for name, t in zip(names, tensors, strict=True)})
    with torch.no_grad():
        wanted = pytree.tree_leaves(private(*args, **kwargs))
    return largest_difference([torch.from_numpy(y) for y in found], wanted)


def largest_difference(found: Any, wanted: Any) -> float:
    """max |found - wanted| / max |wanted| over all tensors of two outputs.

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
            scale = float(own.double().abs().max()) or 1.0
            worst = max(worst, float((y.double() - own.double()).abs().max()) / scale)
    return worst


def _copy(model: nn.Module) -> nn.Module:
    """A private copy of a model that must have lookup layers."""
    model = module_of(model)
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    if not any(True for _ in lookup_modules(model)) and not any(is_lookup(node) for node in nodes):
        raise ExportError(
            f"{type(model).__name__} has no lookup layers; convert it first (lcnn_compile.convert), or load a checkpoint"
        )
    return copy.deepcopy(model)


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool
) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic_batch:
        args, kwargs, shapes = _dynamic(args, kwargs)
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except LcnnError:
        raise
    except Exception as error:
        # Export runs the user's code on proxies, which may raise anything.
        hint = "; with dynamic_batch=False the batch size may be fixed" if dynamic_batch else ""
        raise ExportError(f"torch.export cannot capture {type(model).__name__}: {_first_line(error)}{hint}") from error


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs with at least two samples, and shapes that let their number vary; a single sample would be taken for a constant."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        raise ExportError("the example inputs hold no tensor with a batch dimension; use dynamic_batch=False")
    size = tensors[0].shape[0]
    batch, shapes = torch.export.Dim("batch", min=1), torch.export.ShapesCollection()

    def vary(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != size:
            return tensor
        # A copy each: shapes are kept by object, and one tensor may be passed twice.
        made = torch.cat([tensor, tensor]) if size == 1 else tensor.clone()
        shapes[made] = {0: batch}
        return made

    args, kwargs = pytree.tree_map_only(Tensor, vary, (args, kwargs))
    return args, kwargs, shapes


def unlift(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a plain GraphModule whose tensors are attributes, in evaluation mode."""
    module: Any = program.module(check_guards=False)
    return fx.GraphModule(module, module.graph).eval()


def _set_shapes(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note every node's shape for the example inputs: lowerings are measured for their batch size."""
    leaves, _ = pytree.tree_flatten((args, kwargs))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(gm, mode).propagate(*leaves)


def _without_dead_tensors(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over a module that holds only what it reads."""
    gm.graph.eliminate_dead_code()
    for node in [node for node in gm.graph.nodes if node.op == "get_attr" and not node.users]:
        gm.graph.erase_node(node)
    return fx.GraphModule(gm, gm.graph)


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


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
