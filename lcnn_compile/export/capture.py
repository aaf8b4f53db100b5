"""A converted model as a ``torch.export`` program, whatever is done with that."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lcnn_compile.batches import inputs_of, unwrapped
from lcnn_compile.errors import ExportError
from lcnn_compile.export.dimensions import capture, captured, first_line, module_of_program, refuse_hidden_state, trial
from lcnn_compile.export.writes import writes_to, writes_values
from lcnn_compile.modules import LookupLinear, lookup_modules
from lcnn_compile.passes import choose_lowerings, fold_batch_norm, fold_factors, fuse_epilogues, narrow_convolutions
from lcnn_compile.passes.decompose import decompose_lookups
from lcnn_compile.passes.effects import eliminate_dead_code
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.torch_private import FakeTensorMode, SizeOfData, plain_dtypes, pytree, without_compilers

__all__ = ["PLAIN", "Lowering", "export_program", "first_line", "prepared", "private_copy", "program_of", "unlift"]

Lowering = Literal["auto", "lookup", "factored", "dense"]
PLAIN = ("factored", "dense")


def export_program(
    model: nn.Module, example_inputs: Any, *, lowering: Lowering = "auto", dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """The model as a ``torch.export`` program for inference: batch norm folded, lowerings settled, epilogues fused.

    Args:
        model: a converted model; of a wrapper (``torch.compile``, ``DataParallel``, ``AveragedModel``) the module inside.
        example_inputs: the arguments of one call: a tensor, a tuple of all positional arguments, a mapping of names, or
            :class:`~lcnn_compile.batches.Inputs`. What is no tensor becomes a constant of the program.
        lowering: "auto" settles each layer's lowering by measurement on this machine for the batch given; "lookup" uses our
            operator in every layer. Both make a program that calls ``torch.ops.lcnn``: the process that loads it must import
            lcnn_compile first. "factored" (a 1x1 convolution, then a convolution with the lookup tensor) and "dense" make a
            program of ordinary operators that needs nothing of ours.
        dynamic_batch: let the first dimension of every input whose size it shares with the first input vary, where the model
            allows it; of images without a batch dimension none varies.

    Raises:
        ExportError: if the model has no lookup layers, ``torch.export`` cannot capture it, it keeps a state in Python, or it writes to its inputs and two of
            the example inputs share memory: a program takes every input for a tensor of its own.
    """
    private = prepared(model, lowering)
    args, kwargs = inputs_of(private, example_inputs)
    refuse_hidden_state(private, args, kwargs)
    program = program_of(private, args, kwargs, lowering, dynamic_batch)
    places = [t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel()]
    if len(set(places)) < len(places) and writes_to(unlift(program), "placeholder"):
        raise ExportError("the model writes to its inputs, and two of the example inputs share memory; pass copies")
    return program


def prepared(model: nn.Module, lowering: Lowering) -> nn.Module:
    """A private copy of a converted model, without its wrappers, in evaluation mode with its lowerings chosen."""
    if lowering not in ("auto", "lookup", *PLAIN):
        raise ExportError(f"lowering is {lowering!r}; allowed are 'auto', 'lookup', 'factored' and 'dense'")
    private = private_copy(model).eval().requires_grad_(False)
    if lowering != "auto":
        for _, module in lookup_modules(private):
            module.lowering = lowering
    return private


def program_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], lowering: Lowering, dynamic_batch: bool
) -> torch.export.ExportedProgram:
    """The program of a model from :func:`prepared` for the arguments of one call."""
    args, kwargs = _apart((args, kwargs))
    dynamic_batch = dynamic_batch and not _unbatched(model, args, kwargs)
    with plain_dtypes():
        program, varying = captured(model, args, kwargs, dynamic_batch)
        gm = unlift(writes_values(program))
        _set_shapes(gm, args, kwargs)
        fold_factors(fold_batch_norm(gm))
        if lowering in PLAIN:
            decompose_lookups(gm, lowering)
        else:
            fuse_epilogues(choose_lowerings(narrow_convolutions(gm) if lowering == "auto" else gm))
        return capture(_without_dead_tensors(gm), args, kwargs, varying)


def private_copy(model: nn.Module) -> nn.Module:
    """A private copy, without its wrappers, of a model that must have lookup layers."""
    model = unwrapped(model)
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    if not any(True for _ in lookup_modules(model)) and not any(is_lookup(node) for node in nodes):
        raise ExportError(
            f"{type(model).__name__} has no lookup layers; convert it first (lcnn_compile.convert), or load a checkpoint. "
            "Where convert left every layer dense, its report says why"
        )
    return without_compilers(copy.deepcopy(model))


def _apart(inputs: Any) -> Any:
    """``inputs`` with a tensor of its own in each place: one that is passed twice would be taken for one input."""
    leaves, spec = pytree.tree_flatten(inputs)
    seen: set[int] = set()
    made = []
    for leaf in leaves:
        made.append(leaf.clone() if isinstance(leaf, Tensor) and id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return pytree.tree_unflatten(made, spec)


def _unbatched(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a lookup layer gets one image without a batch dimension."""
    found: list[bool] = []

    def look(module: Any, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].dim() < len(module.kernel_size) + 2:
            found.append(True)

    handles = [m.register_forward_pre_hook(look) for _, m in lookup_modules(model) if not isinstance(m, LookupLinear)]
    try:
        if handles:
            trial(model, args, kwargs)
    except Exception:
        return False  # what the user's code does not take, torch.export does not either, and says so
    finally:
        for handle in handles:
            handle.remove()
    return bool(found)


def unlift(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a plain GraphModule whose tensors are attributes, in evaluation mode."""
    module = module_of_program(program)
    return fx.GraphModule(module, module.graph).eval()


def _set_shapes(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note every node's shape for the example inputs, up to one whose size depends on data: lowerings are measured for their batch size."""
    leaves, _ = pytree.tree_flatten((args, kwargs))
    with suppress(SizeOfData):
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
