"""Programs in the form that is written as ONNX: functional, of operators that engines read alike."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.errors import ExportError, LcnnWarning
from lcnn_compile.export.capture import unlift
from lcnn_compile.passes.portable import write_portably
from lcnn_compile.torch_private import pytree


def portable_program(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program for other engines: writes in place resolved, and operators that engines disagree on written in others.

    Raises:
        ExportError: the program writes to a buffer, which ONNX cannot keep, or holds what has no such form.
    """
    program = program.run_decompositions({})
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        kept = ", ".join(sorted(signature.buffers_to_mutate.values()))
        raise ExportError(
            f"the model keeps a state from call to call (it writes to {kept}), which ONNX cannot; pass it in and out"
        )
    if signature.user_inputs_to_mutate:
        written = ", ".join(sorted(signature.user_inputs_to_mutate.values()))
        warnings.warn(
            f"the model writes to its inputs {written}; the ONNX file leaves them as they are", LcnnWarning, stacklevel=3
        )
    gm = write_portably(unlift(program))
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    with torch.no_grad():
        return torch.export.export(gm, args, kwargs, dynamic_shapes=_shapes(program), strict=False)


def _shapes(program: torch.export.ExportedProgram) -> Any:
    """Which sizes of the example inputs vary, as the program has it."""
    shapes, found = torch.export.ShapesCollection(), False
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[name].meta.get("val") if name in nodes else None for name in map(str, program.graph_signature.user_inputs)]
    dims: dict[str, torch.export.Dim] = {}
    for leaf, value in zip(pytree.tree_leaves(program.example_inputs), values, strict=True):
        if not isinstance(leaf, Tensor) or not isinstance(value, Tensor):
            continue
        varying = {i: str(size) for i, size in enumerate(value.shape) if not isinstance(size, int)}
        if varying:
            shapes[leaf] = {i: dims.setdefault(name, torch.export.Dim(f"size_{len(dims)}", min=1)) for i, name in varying.items()}
            found = True
    return shapes if found else None
