"""freeze(): a converted model as one callable with constant weights, for the least time per call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.capture import export_program, unlift
from lcnn_compile.errors import ExportError
from lcnn_compile.kernels.program import Program
from lcnn_compile.passes import gather_programs
from lcnn_compile.passes.programs import programs, single_program
from lcnn_compile.torch_private import pytree


class Frozen:
    """A model whose weights are constants; called as the model was, without gradients.

    Attributes:
        graph: what runs, with its programs.
        alone: whether it is one native program, with nothing left to the compiler.
    """

    def __init__(self, graph: fx.GraphModule, in_spec: Any, out_spec: Any, inputs: list[Tensor], dynamic_batch: bool):
        self.graph = graph
        self._in_spec, self._out_spec = in_spec, out_spec
        self._first = 1 if dynamic_batch else 0
        self._form = [self._form_of(x) for x in inputs]
        alone = single_program(graph)
        self.alone = alone is not None
        self._program: Program | None = None
        self._rest: Callable[..., Any] | None = None
        if alone is not None:
            [self._program], (self._sources, self._returned) = programs(graph), alone
        else:
            self._rest = torch.compile(graph, options={"freezing": True}, dynamic=False)

    def _form_of(self, x: Tensor) -> tuple[Any, ...]:
        return (x.dim(), x.shape[self._first :], x.dtype, x.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs.

        Raises:
            ExportError: the inputs differ from those that the model was frozen for in more than the batch size.
        """
        if kwargs or len(args) != len(self._form) or not all(isinstance(x, Tensor) for x in args):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if spec != self._in_spec:
                raise ExportError(f"the frozen model takes {self._in_spec}; it got {spec}")
        else:
            leaves = list(args)
        if [self._form_of(x) for x in leaves] != self._form:
            given = [(tuple(x.shape), x.dtype, str(x.device)) for x in leaves]
            raise ExportError(
                f"the model is frozen for inputs of (dimensions, shape, dtype, device) {self._form}; it got {given}; freeze it again"
            )
        if self._program is not None:
            found = self._program(*[leaves[i] for i in self._sources])
            outputs = [found[i] for i in self._returned]
        else:
            assert self._rest is not None
            with torch.no_grad():
                outputs = pytree.tree_leaves(self._rest(*leaves))
        return pytree.tree_unflatten(outputs, self._out_spec)


def freeze(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> Frozen:
    """Make the weights of a converted model constants, and the model a callable that spends no time on noticing changes.

    A call of a compiled model checks every weight and every guard of Dynamo, which takes longer than a small network. Batch
    norm is folded, lowerings are settled by measurement, regions of lookups become native programs (float32 on a CPU); where
    something else remains, Inductor compiles it. Changing the model afterwards changes nothing: freeze it again.

    Args:
        model: a converted model, in evaluation mode or not; it is not changed.
        example_inputs: one batch: a tensor, a tuple of tensors, or a mapping of keyword arguments.
        dynamic_batch: take any batch size; False fixes it to the example's.

    Returns:
        A callable with the model's signature and outputs.

    Raises:
        ExportError: if the model has no lookup layers, or ``torch.export`` cannot capture it.
    """
    program = export_program(model, example_inputs, dynamic_batch=dynamic_batch)
    leaves = pytree.tree_leaves(example_inputs)
    with torch.no_grad():
        graph = gather_programs(unlift(program))
    return Frozen(graph, program.call_spec.in_spec, program.call_spec.out_spec, leaves, dynamic_batch)
