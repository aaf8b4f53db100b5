"""How a model is called on example inputs and on batches of calibration or training data.

What is given is one of

- a tensor, or any other single object (a dataclass, say): the one input;
- a list or tuple: the positional arguments, optional ones included, in the order of ``forward``. What is left over is not
  passed, so that a data loader's (images, labels) serves where ``forward`` takes one input;
- a mapping: arguments by name, whatever their kind;
- an :class:`Inputs`: exactly these arguments.

Wrappers (``DataParallel``, ``AveragedModel``, ``torch.compile``) take what the module inside takes. To pass one list, tuple or
mapping, put it into a tuple: ``([first, second],)``.

One case has no certain answer: batches of calibration data that are longer than what ``forward`` requires, where the rest may
be optional inputs or labels: (x, labels) for ``forward(x, mask=None)`` or ``forward(*inputs)``. Then ``example_inputs`` says how
many positional arguments there are. Without them optional inputs are passed, except what looks like labels: whole
numbers for each sample, texts, or a tensor where the default is a flag or number. A warning names what is left out.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.errors import ConversionError, LcnnWarning
from lcnn_compile.structures import Structure, flatten, map_tensors, unflatten
from lcnn_compile.torch_private import called_eagerly, module_of, pytree

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ANY = inspect.Signature(
    [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL), inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
)


class Inputs:
    """The arguments of one call: ``Inputs(x, mask, scale=2)``.

    Attributes:
        args: the positional ones.
        kwargs: those by name.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        return f"Inputs({flatten(list(self.args), known=lambda _: True)[1]}, {flatten(self.kwargs, known=lambda _: True)[1]})"


def _flatten_inputs(inputs: Inputs) -> tuple[list[Any], Structure]:
    return flatten((inputs.args, inputs.kwargs), known=lambda _: True)


def _unflatten_inputs(leaves: Iterable[Any], structure: Structure) -> Inputs:
    args, kwargs = unflatten(structure, list(leaves))
    return Inputs(*args, **kwargs)


# Batches are cut, counted and copied as trees; this one has all tensors as leaves, those in dataclasses too.
pytree.register_pytree_node(Inputs, _flatten_inputs, _unflatten_inputs, serialized_type_name="lcnn_compile.batches.Inputs")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel``, however nested."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        inner = module_of(model)
        if isinstance(inner, wrappers):
            inner = inner.module
        if inner is model:
            return model
        model = inner


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of ``forward`` of the module inside wrappers; any arguments where it cannot be had."""
    try:
        return inspect.signature(unwrapped(model).forward)
    except (TypeError, ValueError):
        return _ANY


def inputs_of(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``model`` in example inputs: a list or tuple is all positional arguments."""
    inputs = _inputs(signature_of(model), given, None)
    return inputs.args, inputs.kwargs


def _inputs(signature: inspect.Signature, given: Any, count: int | None) -> Inputs:
    """``given`` as arguments; of a list or tuple, ``count`` are passed, or as many as ``forward`` takes."""
    if isinstance(given, Inputs):
        return given
    if isinstance(given, Mapping):
        return _by_name(signature, given)
    if isinstance(given, list | tuple):
        parameters = list(signature.parameters.values())
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            room = len(given)
        else:
            room = max(1, sum(p.kind in _POSITIONAL for p in parameters))
        return Inputs(*given[: room if count is None else min(count, room)])
    return Inputs(given)


def _by_name(signature: inspect.Signature, given: Mapping[str, Any]) -> Inputs:
    """Arguments by name; those of names that Python takes by position only become positional."""
    parameters = signature.parameters
    variadic = [p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not open_ended and given and not any(key in parameters for key in given):
        needed = [p for p in parameters.values() if p.kind in _POSITIONAL and p.default is p.empty]
        if len(needed) == 1:
            return Inputs(given)  # no name fits: the mapping itself is the input
    kwargs, args = dict(given), []
    spread = not open_ended and bool(variadic) and variadic[0] in kwargs
    for p in parameters.values():
        if p.kind is p.POSITIONAL_ONLY or (spread and p.kind is p.POSITIONAL_OR_KEYWORD):
            if p.name not in kwargs:
                break
            args.append(kwargs.pop(p.name))
        elif p.kind is p.VAR_POSITIONAL and spread:
            args.extend(kwargs.pop(p.name))
    return Inputs(*args, **kwargs)


def conversion_inputs(
    model: nn.Module, example_inputs: Any, calibration: Iterable[Any] | None
) -> tuple[Any, Iterator[Inputs] | None]:
    """Example inputs (the first batch where None is given) and calibration data as arguments; see the head of this module.

    Raises:
        ConversionError: calibration data without a batch.
    """
    signature = signature_of(model)
    example = None if example_inputs is None else _inputs(signature, example_inputs, None)
    if calibration is None:
        return example, None
    batches = iter(calibration)
    try:
        first = next(batches)
    except StopIteration:
        raise ConversionError("calibration has no batches; pass None to fit on the weights alone") from None
    if example is None:
        count, remark = _count(signature, first)
        if remark:
            warnings.warn(remark, LcnnWarning, stacklevel=4)
        example = _inputs(signature, first, count)
    elif isinstance(example_inputs, Mapping | Inputs):
        count = _positions(signature, example)
    else:
        count = len(example.args)
    return example, (_inputs(signature, batch, count) for batch in chain([first], batches))


def batch_inputs(model: nn.Module, batch: Any) -> Inputs:
    """One batch of a loader as arguments, without a word about labels."""
    signature = signature_of(model)
    return _inputs(signature, batch, _count(signature, batch)[0])


def _positions(signature: inspect.Signature, inputs: Inputs) -> int | None:
    """How many positional parameters, from the first on, have an argument."""
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError:
        return None
    count = 0
    for p in signature.parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            return count + len(bound.get(p.name, ()))
        if p.kind not in _POSITIONAL or p.name not in bound:
            break
        count += 1
    return max(1, count)


def _count(signature: inspect.Signature, batch: Any) -> tuple[int | None, str]:
    """How many entries of a loader's batch are positional arguments, and a remark about those that only look like labels."""
    if not isinstance(batch, list | tuple):
        return None, ""
    parameters = [p for p in signature.parameters.values() if p.kind in (*_POSITIONAL, inspect.Parameter.VAR_POSITIONAL)]
    required = max(1, sum(p.kind in _POSITIONAL and p.default is p.empty for p in parameters))
    samples = next((len(part) for part in batch if isinstance(part, Tensor) and part.dim()), 0)
    for i, part in enumerate(batch[required:], required):
        if i >= len(parameters) and not (parameters and parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL):
            return i, ""
        p = parameters[min(i, len(parameters) - 1)]
        if _looks_like_labels(part, p.default, samples):
            what = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            return i, (
                f"entry {i} of the calibration batches ({what}) is taken for labels and not passed as {p.name!r}, which is optional; "
                "if it is an input, give batches as mappings of names, or example_inputs with all inputs"
            )
    return len(batch), ""


def _looks_like_labels(part: Any, default: Any, samples: int) -> bool:
    if isinstance(part, Tensor):
        if isinstance(default, bool | int | float | str):
            return part.numel() != 1
        whole = not part.is_floating_point() and not part.is_complex() and part.dtype != torch.bool
        return whole and part.dim() > 0 and len(part) == samples
    if isinstance(part, list | tuple):
        return bool(part) and all(isinstance(entry, str | int) for entry in part)
    return isinstance(part, str | int) and not isinstance(part, bool) and (default is None or default is inspect.Parameter.empty)


def call_model(model: nn.Module, given: Any) -> Any:
    """Run ``model`` on example inputs (see :func:`inputs_of`), on copies of their tensors on the device of its first parameter.

    Copies, because a model may write to its inputs. Modules inside that ``torch.compile`` made run as they are written.
    """
    first = next(iter(model.parameters()), None)
    device = None if first is None or isinstance(first, nn.parameter.UninitializedParameter) else first.device
    args, kwargs = map_tensors(lambda t: _own(t, device), inputs_of(model, given))
    with called_eagerly(model):
        return model(*args, **kwargs)


def _own(tensor: Tensor, device: torch.device | None) -> Tensor:
    moved = tensor if device is None else tensor.to(device)
    return moved.detach().clone() if moved is tensor else moved
