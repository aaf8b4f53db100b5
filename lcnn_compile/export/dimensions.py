"""Which dimensions of a model's inputs may vary in its exported program, tried rather than guessed."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.errors import ExportError, LcnnError
from lcnn_compile.export.writes import buffers_kept, calling, unmarked
from lcnn_compile.torch_private import least_size, pytree, sizes_apart, version

_CLOSE = 1e-3
"""Difference, relative to the largest value, that rounding explains."""


@dataclass(frozen=True)
class Dimensions:
    """The inputs whose first dimension is the batch.

    Attributes:
        places: among the tensors of the inputs, in order.
        least: the smallest batch.
    """

    places: list[int]
    least: int


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def module_of_program(program: torch.export.ExportedProgram) -> Any:
    """What the program computes, as a module.

    Raises:
        ExportError: a part of the model has a name that no code can hold.
    """
    try:
        return program.module(check_guards=False)
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise ExportError(
            f"a module or tensor of the model is named by a word of Python's own, which exported code cannot hold: {text[:120]!r}; rename it"
        ) from error


def captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool
) -> tuple[torch.export.ExportedProgram, Dimensions]:
    """The model's program, and which inputs have a batch dimension: those of the first one's size, but where the model needs that very size.

    A batch of one is left out where the model treats it in another way than larger ones, of which ``torch.export`` says nothing.

    Raises:
        ExportError: a batch dimension is wanted and there is no tensor with one, or the model cannot be captured.
    """
    if not dynamic_batch:
        fixed = Dimensions([], 1)
        return capture(model, args, kwargs, fixed), fixed
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    first = next((t for t in tensors if t.dim()), None)
    if first is None:
        raise ExportError("the example inputs hold no tensor with a batch dimension; use dynamic_batch=False")
    found = Dimensions([i for i, t in enumerate(tensors) if t.dim() and t.shape[0] == first.shape[0]], 1)
    try:
        program = capture(model, args, kwargs, found)
    except ExportError:
        if len(found.places) == 1:
            raise
        found = Dimensions(_needed(model, args, kwargs, found.places), 1)  # sizes may be alike by chance
        program = capture(model, args, kwargs, found)
    if _one_is_alike(model, program, args, kwargs, found):
        return program, found
    found = Dimensions(found.places, 2)
    return capture(model, args, kwargs, found), found


def _needed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], places: list[int]) -> list[int]:
    """Of several inputs of one size, those that may vary with the first."""
    with sizes_apart():
        free = capture(model, args, kwargs, Dimensions(places, 1), alone=True)
    inputs = free.graph.find_nodes(op="placeholder")
    inputs = inputs[len(inputs) - len(free.graph_signature.user_inputs) :]
    tensors = [node.meta["val"] for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    return [i for i in places if i == places[0] or least_size(free, tensors[i].shape[0])]


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], varying: Dimensions, *, alone: bool = False
) -> torch.export.ExportedProgram:
    """``torch.export`` for inputs of which some vary; with ``alone``, only the first must, and others do where they can.

    Raises:
        ExportError: it cannot capture the model.
        WriteError: the model writes to the dense weight of a lookup layer.
    """
    shapes = None
    if varying.places:
        args, kwargs, shapes = _shapes(args, kwargs, varying, alone)
    try:
        with torch.no_grad(), _arguments_named(model, args, kwargs), buffers_kept(model):
            return unmarked(torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False))
    except LcnnError:
        raise
    except Exception as error:
        # Export runs the user's code on proxies, which may raise anything.
        hint = "; with dynamic_batch=False the batch size may be fixed" if varying.places else ""
        raise ExportError(f"torch.export cannot capture {type(model).__name__}: {first_line(error)}{hint}") from error


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any], varying: Dimensions, alone: bool) -> tuple[Any, Any, Any]:
    """Inputs with at least two samples, and shapes that let their number vary; a single sample would be taken for a constant."""
    batch, shapes = torch.export.Dim("batch", min=varying.least), torch.export.ShapesCollection()
    leaves, spec = pytree.tree_flatten((args, kwargs))
    numbers = iter(range(len(leaves)))
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        number = next(numbers)
        if number in varying.places:
            # A copy each: shapes are kept by object.
            leaves[i] = torch.cat([leaf, leaf]) if leaf.shape[0] == 1 else leaf.clone()
            shapes[leaves[i]] = {0: torch.export.Dim.AUTO if alone and number != varying.places[0] else batch}
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs, shapes


@contextmanager
def _arguments_named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """``model`` with a ``forward`` that names its arguments: torch.export knows no sizes of those in ``**kwargs``."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        yield
        return

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [*names[: len(args)], *(f"input_{i}" for i in range(len(names), len(args)))]
    made = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names if name not in kwargs]
    made += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs]
    named.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    with calling(model, named):
        yield


def trial(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a copy of the model returns for copies of the inputs, with the same random numbers each time."""
    return _answer(copy.deepcopy(model), args, kwargs)


def _answer(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    devices = sorted({t.device.index or 0 for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_cuda})
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        return model(*args, **kwargs)


def refuse_hidden_state(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a model that answers the same call in another way the second time, though none of its tensors was written.

    It keeps a state in Python (a counter, a tensor put in the place of another), of which a program has the first value for good.

    Raises:
        ExportError: it does.
    """
    twin, answers = copy.deepcopy(model), []

    def versions() -> list[tuple[int, int]]:
        return [(id(t), 0 if t.is_inference() else version(t)) for t in (*twin.parameters(), *twin.buffers())]

    before = versions()
    for _ in range(2):
        try:
            output = _answer(twin, args, kwargs)
        except Exception:
            return  # what is wrong with the call is said by what captures it
        answers.append(pytree.tree_leaves(pytree.tree_map_only(Tensor, torch.clone, output)))
    if before != versions():
        return
    for number, (first, second) in enumerate(zip(*answers, strict=False)):
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            same = _alike(first, second)
        else:
            same = not isinstance(first, int | float | str) or first == second
        if not same:
            raise ExportError(
                f"{type(model).__name__} gives another output {number} when it is called again: it keeps a state in Python that a "
                "program cannot follow. Keep it in a buffer that forward writes in place"
            )


def _one_is_alike(
    model: nn.Module, program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], varying: Dimensions
) -> bool:
    """Whether the program computes for one sample what the model does.

    Export takes sizes that vary for larger than one, and settles ``if len(x) == 1`` by that.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for number in varying.places:
        leaves[places[number]] = leaves[places[number]][:1]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    outputs = []
    captured = module_of_program(program)
    try:
        for run in (model, captured):
            outputs.append([y for y in pytree.tree_leaves(trial(run, args, kwargs)) if isinstance(y, Tensor)])
    except Exception:
        return False  # the user's code, or the program of it, fails for one sample
    return len(outputs[0]) == len(outputs[1]) and all(_alike(a, b) for a, b in zip(*outputs, strict=True))


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    if a.dtype == torch.bool or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b) or bool((a == b).double().mean() > 1 - _CLOSE)  # an argmax may fall on the other of two
    a, b = a.to(torch.complex128), b.to(torch.complex128)
    return torch.allclose(
        a, b, rtol=_CLOSE, atol=_CLOSE * float(a[a.isfinite()].abs().max() if a.isfinite().any() else 1), equal_nan=True
    )
