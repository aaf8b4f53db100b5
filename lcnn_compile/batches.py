"""How a model is called on one batch of calibration or training data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in its lists, tuples and mappings on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    return value


def required_inputs(model: nn.Module) -> int:
    """Positional arguments that ``model.forward`` cannot do without."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def inputs_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``model`` in one batch.

    A tensor is the one input; a mapping is the keyword arguments; a list or tuple is the positional ones, of which only
    those that ``forward`` requires are passed (at least one), so that a data loader's (images, labels) serves as it is.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(batch[: max(1, required_inputs(model))]), {}
    return (batch,), {}


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on one batch (see :func:`inputs_of`), moved to the device of the model's first parameter."""
    first = next(iter(model.parameters()), None)
    args, kwargs = inputs_of(model, batch)
    if first is not None and not isinstance(first, torch.nn.parameter.UninitializedParameter):
        args, kwargs = tuple(to_device(list(args), first.device)), to_device(kwargs, first.device)
    return model(*args, **kwargs)
