"""A converted model as a ``torch.export`` program, whatever is done with that."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lcnn_compile.batches import inputs_of
from lcnn_compile.errors import ExportError, LcnnError
from lcnn_compile.modules import lookup_modules
from lcnn_compile.passes import choose_lowerings, fold_batch_norm, fold_factors, fuse_epilogues, narrow_convolutions
from lcnn_compile.passes.decompose import decompose_lookups
from lcnn_compile.passes.effects import eliminate_dead_code
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.torch_private import FakeTensorMode, module_of, pytree

Lowering = Literal["auto", "lookup", "factored", "dense"]
PLAIN = ("factored", "dense")


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
    private = private_copy(model).eval().requires_grad_(False)
    if lowering != "auto":
        for _, module in lookup_modules(private):
            module.lowering = lowering
    args, kwargs = inputs_of(private, example_inputs)
    gm = unlift(_capture(private, args, kwargs, dynamic_batch))
    _set_shapes(gm, args, kwargs)
    fold_factors(fold_batch_norm(gm))
    if lowering in PLAIN:
        decompose_lookups(gm, lowering)
    else:
        fuse_epilogues(choose_lowerings(narrow_convolutions(gm) if lowering == "auto" else gm))
    return _capture(_without_dead_tensors(gm), args, kwargs, dynamic_batch)


def private_copy(model: nn.Module) -> nn.Module:
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
        raise ExportError(f"torch.export cannot capture {type(model).__name__}: {first_line(error)}{hint}") from error


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
    _Shapes(gm, FakeTensorMode()).propagate(*leaves)


class _Shapes(FakeTensorProp):
    """Propagation over fake attributes: on real ones, a graph that writes its buffers would change them."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


def _without_dead_tensors(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over a module that holds only what it reads."""
    eliminate_dead_code(gm)
    for node in [node for node in gm.graph.nodes if node.op == "get_attr" and not node.users]:
        gm.graph.erase_node(node)
    return fx.GraphModule(gm, gm.graph)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
