"""freeze(): a converted model as one callable with constant weights, for the least time per call."""

from __future__ import annotations

import inspect
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lcnn_compile.batches import Inputs, inputs_of, signature_of
from lcnn_compile.errors import ExportError, LcnnWarning
from lcnn_compile.export.capture import first_line, prepared, program_of, unlift
from lcnn_compile.export.dimensions import refuse_hidden_state
from lcnn_compile.export.engines import DEFAULT, ENGINES
from lcnn_compile.export.rivals import faster_rival
from lcnn_compile.export.writes import writes_to
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.modules import lookup_modules
from lcnn_compile.passes import gather_programs
from lcnn_compile.passes.programs import left_over, programs, single_program
from lcnn_compile.structures import Structure, difference, flatten, unflatten
from lcnn_compile.torch_private import least_size, plain_dtypes, pytree

_P = inspect.Parameter
_KINDS = {
    int(kind): kind for kind in (_P.POSITIONAL_ONLY, _P.POSITIONAL_OR_KEYWORD, _P.VAR_POSITIONAL, _P.KEYWORD_ONLY, _P.VAR_KEYWORD)
}


@dataclass(frozen=True)
class _Call:
    """How a model was called, and what it returned.

    Attributes:
        parameters: of its ``forward``: name, kind, whether there is a default, the default if it is no tensor.
        given: structure of the arguments: {parameter: value}.
        returned: structure of the outputs.
        form: of each tensor input: sizes (None for the batch), dtype, device.
    """

    parameters: tuple[tuple[str, int, bool, Any], ...]
    given: Structure
    returned: Structure
    form: tuple[tuple[Any, ...], ...]

    def signature(self) -> inspect.Signature:
        made = []
        for name, kind, has_default, default in self.parameters:
            made.append(inspect.Parameter(name, _KINDS[kind], default=default if has_default else inspect.Parameter.empty))
        return inspect.Signature(made)


class StepTime(NamedTuple):
    """A step of a native program and the time it takes.

    Attributes:
        name: the operation, with what its time depends on.
        shape: of the result.
        milliseconds: per call.
    """

    name: str
    shape: tuple[int, ...]
    milliseconds: float


class Frozen:
    """A model whose weights are constants; called as the model was, without gradients.

    Arguments may be given by position or name, and left out where ``forward`` has defaults. What was no tensor when the model
    was frozen (flags, numbers, texts, None, the keys of a dictionary) is a constant, and must be the same in every call. Buffers
    that ``forward`` writes are this object's own: they start as the model's were, and no call changes the model's.

    It can be copied (``copy.deepcopy``) and pickled (``torch.save`` too); a copy has a state of its own from there on, and gives the same bits.

    Attributes:
        graph: what runs, with its programs.
        alone: whether it is one native program, with nothing left to the compiler.
        left_over: otherwise, the operations that keep it from being one, with the shapes of their results.
        writes: whether calls write to inputs or buffers.
        program, single: that program, and how it is called; or None.
        kept_dense: why the whole model runs on an engine of PyTorch's own instead, with both times; "" where it does not.
        form: of each tensor input: the smallest batch (0 where it has none), sizes, dtype, device.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        call: _Call,
        engine: str = DEFAULT,
        kept_dense: str = "",
        dense_too: bool = False,
    ):
        self._exported, self._call, self._engine, self.kept_dense = program, call, engine, kept_dense
        with torch.no_grad():
            gm = gather_programs(unlift(program), dense_too)
        self.graph: fx.GraphModule = gm
        self._writes_inputs = writes_to(gm, "placeholder")
        self.writes = self._writes_inputs or writes_to(gm, "get_attr")
        self._signature = call.signature()
        self.form = list(call.form)
        names = list(self._signature.parameters)[: len(self.form)]
        self._plain = call.given.detail[: len(names)] == tuple(names) and self._only_tensors()
        alone = single_program(gm)
        self.alone = alone is not None
        self.left_over = [] if self.alone else left_over(gm)
        self.program: Program | None = None
        self._rest: Callable[..., Any] | None = None
        if alone is not None:
            [self.program], self.single = programs(gm), alone
        else:
            # Frozen, Inductor loses writes to inputs, and takes buffers for constants.
            self._rest = ENGINES["Inductor" if self.writes else engine](gm)
            if kept_dense:
                self.left_over = [kept_dense]

    @property
    def input_names(self) -> list[str]:
        """Of the tensors in the model's arguments: the parameter, with a number where it holds several."""
        found = []
        for name, part in zip(self._call.given.detail, self._call.given.parts, strict=True):
            count = _tensors(part)
            found += [name] if part.kind == "tensor" else [f"{name}.{i}" for i in range(count)]
        return found

    def _only_tensors(self) -> bool:
        """Whether the first arguments are one tensor each, and the others have their defaults."""
        count = len(self.form)
        parts, parameters = self._call.given.parts, self._call.parameters
        if any(part.kind != "tensor" for part in parts[:count]) or any(kind > 1 for _, kind, *_ in parameters[:count]):
            return False
        try:
            given = self._bind(tuple(torch.empty(0) for _ in range(count)), {})[1]
        except ExportError:
            return False
        return not difference(self._call.given, given)

    def __reduce__(self) -> tuple[Any, ...]:
        buffers = dict(self.graph.named_buffers())
        for name, value in [*self._exported.state_dict.items(), *self._exported.constants.items()]:
            if name in buffers and isinstance(value, Tensor) and buffers[name] is not value:
                with torch.no_grad():
                    value.copy_(buffers[name])
        file = io.BytesIO()
        try:
            torch.export.save(self._exported, file)
        except Exception as error:
            # Export writes whatever operators and attributes the model has, and may raise anything.
            raise ExportError(f"the frozen model cannot be written: {first_line(error)}") from error
        return _restore, (file.getvalue(), self._call, self._engine, self.kept_dense)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Structure]:
        """The tensors of a call, and the structure of its arguments by parameter."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ExportError(f"the frozen model takes {self._signature}: {error}") from error
        bound.apply_defaults()
        return _arguments(bound)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs.

        Raises:
            ExportError: the arguments differ from those that the model was frozen for in more than tensors' values and the batch size.
        """
        if self._plain and not kwargs and len(args) == len(self.form) and all(isinstance(x, Tensor) for x in args):
            leaves = list(args)
        else:
            leaves, given = self._bind(args, kwargs)
            if found := _first_difference(self._call.given, given):
                raise ExportError(f"the model is frozen for other arguments: {found}; freeze it again")
        self._check(leaves)
        return unflatten(self._call.returned, self.run(*leaves))

    def run(self, *leaves: Tensor) -> list[Any]:
        """The tensors of the outputs for those of the inputs, which nobody has looked at."""
        if self.program is not None:
            return self.single.returned(self.program(*[leaves[i] for i in self.single.inputs]))
        assert self._rest is not None
        with torch.no_grad(), plain_dtypes():
            return pytree.tree_leaves(self._rest(*leaves))

    def profile(self, *args: Any, calls: int = 10, **kwargs: Any) -> list[StepTime]:
        """Where the time of a call goes: every step of the model's native program, with its mean over ``calls`` calls.

        A step that only gives a value another shape takes no time and is left out. A batch that is run in parts counts as one part.

        Raises:
            ExportError: the model is not one program (``alone``), or the arguments are not those it was frozen for.
        """
        if self.program is None:
            raise ExportError(f"the frozen model is not one program, whose steps could be timed: {'; '.join(self.left_over)}")
        leaves, _ = self._bind(args, kwargs)
        self._check(leaves)
        rows = self.program.profile(*[leaves[i] for i in self.single.inputs], calls=calls)
        return [StepTime(step.described(), tuple(shape), seconds * 1e3) for step, shape, seconds in rows]

    def _check(self, leaves: list[Any]) -> None:
        """Complain about other sizes, dtypes or devices than the model was frozen for."""
        batch = None
        for x, (least, shape, dtype, device) in zip(leaves, self.form, strict=True):
            known = x.dtype == dtype and x.device == device and x.dim() == len(shape)
            if known and least:
                batch = x.shape[0] if batch is None else batch
                known = x.shape[0] == batch >= least and x.shape[1:] == shape[1:]
            if not (known and (least or x.shape == shape)):
                forms = [
                    (["batch", *shape[1:]] if least else list(shape), str(dtype), str(device))
                    for least, shape, dtype, device in self.form
                ]
                smallest = max((least for least, *_ in self.form), default=0)
                remark = f", with a batch of {smallest} at least" if smallest > 1 else ""
                got = [(list(t.shape), str(t.dtype), str(t.device)) for t in leaves]
                raise ExportError(f"the model is frozen for tensors {forms}{remark}; it got {got}; freeze it again")
        if self._writes_inputs and len({t.untyped_storage().data_ptr() for t in leaves}) < len(leaves):
            raise ExportError("the model writes to its inputs, and two of them share memory; pass copies")


def _arguments(bound: inspect.BoundArguments) -> tuple[list[Any], Structure]:
    leaves: list[Any] = []
    parts = []
    for name, value in bound.arguments.items():
        inside, structure = flatten(value, f"the input {name}")
        leaves += inside
        parts.append(structure)
    return leaves, Structure("mapping", dict, tuple(bound.arguments), tuple(parts))


def _tensors(structure: Structure) -> int:
    return 1 if structure.kind == "tensor" else sum(_tensors(part) for part in structure.parts)


def _first_difference(wanted: Structure, given: Structure) -> str:
    for name, part, other in zip(wanted.detail, wanted.parts, given.parts, strict=True):
        if found := difference(part, other, name):
            return found
    return ""


class _OfTensors(nn.Module):
    """A model as a function of the tensors in its arguments, returning those in its outputs."""

    def __init__(self, model: nn.Module, signature: inspect.Signature, given: Structure, found: list[Structure]):
        super().__init__()
        self.model = model
        self._signature, self._given, self._found = signature, given, found

    def forward(self, *leaves: Tensor) -> list[Any]:
        inputs = _inputs(self._signature, unflatten(self._given, leaves))
        tensors, structure = flatten(self.model(*inputs.args, **inputs.kwargs), "the output")
        if torch.compiler.is_exporting():  # else sizes that vary are plain numbers
            self._found.append(structure)
        return tensors


def _inputs(signature: inspect.Signature, values: dict[str, Any]) -> Inputs:
    bound = inspect.BoundArguments(signature, OrderedDict(values))
    return Inputs(*bound.args, **bound.kwargs)


def freeze(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> Frozen:
    """Make the weights of a converted model constants, and the model a callable that spends no time on noticing changes.

    A call of a compiled model checks every weight and every guard of Dynamo, which takes longer than a small network. Batch
    norm is folded, lowerings are settled by measurement, regions of lookups become native programs (float32 on a CPU); where
    something else remains, Inductor compiles it. Where all lowerings are "auto" and the whole dense network is faster here on an
    engine of PyTorch's own (eager in both memory formats, Inductor, frozen or not), that runs it, with a warning; both are
    timed once where it is close, and remembered. Changing the model afterwards changes nothing: freeze it again. Autocast
    around this call, or around calls of what it returns, has no effect.

    Args:
        model: a converted model, in evaluation mode or not; it is not changed. Of a wrapper (``torch.compile``,
            ``DataParallel``, ``AveragedModel``) the module inside is taken.
        example_inputs: the arguments of one call: a tensor, a tuple of all positional arguments, a mapping of names, or
            :class:`~lcnn_compile.batches.Inputs`. Lists, dictionaries and dataclasses may hold tensors; everything else is a constant.
        dynamic_batch: take any batch size; False fixes it to the example's. The batch is the first dimension of every tensor
            that shares its size with the first one's; of an image without a batch dimension nothing varies. Where the model
            treats a batch of one in a way of its own, the callable takes two or more.

    Returns:
        A callable with the model's signature and outputs.

    Raises:
        ExportError: if the model has no lookup layers, ``torch.export`` cannot capture it, or it keeps a state in Python.
    """
    return frozen_form(model, example_inputs, dynamic_batch)


def frozen_form(model: nn.Module, example_inputs: Any, dynamic_batch: bool, may_stay_dense: bool = True) -> Frozen:
    """:func:`freeze`; where the model may not stay dense, no engine of PyTorch's own takes its place, however fast."""
    private = prepared(model, "auto")
    args, kwargs = inputs_of(private, example_inputs)
    refuse_hidden_state(private, args, kwargs)
    signature = signature_of(private)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(f"the model takes {signature}: {error}") from error
    bound.apply_defaults()
    leaves, given = _arguments(bound)
    found: list[Structure] = []
    program = program_of(_OfTensors(private, signature, given, found), tuple(leaves), {}, "auto", dynamic_batch)
    form = _form(program, leaves)
    parameters = tuple((p.name, int(p.kind), p.default is not p.empty, _default(p)) for p in signature.parameters.values())
    made = _Call(parameters, given, found[-1], form)
    frozen = Frozen(program, made, dense_too=not may_stay_dense)
    layers = [module for _, module in lookup_modules(private)]
    if (
        not may_stay_dense
        or not layers
        or frozen.writes
        or any(layer.lowering != "auto" or layer.precision != "float32" for layer in layers)
    ):
        return frozen
    dense: list[torch.export.ExportedProgram] = []

    def dense_form() -> fx.GraphModule:
        dense.append(program_of(_OfTensors(private, signature, given, []), tuple(leaves), {}, "dense", dynamic_batch))
        return unlift(dense[-1])

    rival = faster_rival(frozen.run, frozen.graph, dense_form, leaves)
    if rival is None:
        return frozen
    if not dense:
        dense_form()
    warnings.warn(f"the frozen model is {rival}", LcnnWarning, stacklevel=3)
    return Frozen(dense[-1], made, rival.engine, str(rival))


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is parameter.empty else parameter.default


def _form(program: torch.export.ExportedProgram, leaves: list[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Of each input: the smallest batch (0 where it has none), sizes, dtype, device."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    form = []
    for name, leaf in zip(names, leaves, strict=True):
        sizes = nodes[str(name)].meta["val"].shape
        least = least_size(program, sizes[0]) if sizes else 0
        form.append((least, leaf.shape, leaf.dtype, leaf.device))
    return tuple(form)


def _restore(data: bytes, call: _Call, engine: str, kept_dense: str) -> Frozen:
    """What :meth:`Frozen.__reduce__` wrote."""
    return Frozen(torch.export.load(io.BytesIO(data)), call, engine, kept_dense)
