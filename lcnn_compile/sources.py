"""What a user names on the command line: a model, inputs, calibration data."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcnn_compile.errors import ConversionError

_SHAPE = re.compile(r"(?P<size>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def load_factory(text: str) -> Callable[[], Any]:
    """The callable that "package.module:name" or "file.py:name" names.

    Raises:
        ConversionError: if there is no such file, module or name.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise ConversionError(f"{text!r} names no factory; write package.module:function or file.py:function")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None or not Path(place).is_file():
                raise ConversionError(f"{place} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(place)
    except ImportError as error:
        raise ConversionError(f"{place} cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConversionError(f"{place} has no callable {name!r}")
    return found


def load_model(text: str) -> nn.Module:
    """The model that a factory returns, in evaluation mode; a factory may also be an nn.Module instance or class.

    Raises:
        ConversionError: if it is no nn.Module.
    """
    factory = load_factory(text)
    model = factory if isinstance(factory, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{text} returned a {type(model).__name__}; an nn.Module is required")
    return model.eval()


def load_inputs(texts: Iterable[str]) -> tuple[Tensor, ...]:
    """One tensor for each of "1x3x224x224", "1x16:int64" (normal or zero values) or a .npy file.

    Raises:
        ConversionError: for anything else.
    """
    return tuple(_input(text) for text in texts)


def _input(text: str) -> Tensor:
    if text.endswith(".npy"):
        return torch.from_numpy(_array(text))
    match = _SHAPE.fullmatch(text)
    dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise ConversionError(f"{text!r} is no input; write 1x3x224x224, 1x3x224x224:float32 or a .npy file")
    size = [int(v) for v in match["size"].split("x")]
    if dtype.is_floating_point:
        return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(size, dtype=dtype)


def _array(path: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error


def load_calibration(text: str, batch: int = 16) -> Iterable[Any]:
    """Batches from a .npy or .npz file (its first array, samples first), or from a factory of an iterable of batches.

    Raises:
        ConversionError: for anything else.
    """
    if text.endswith((".npy", ".npz")):
        found = _array(text)
        array = found[found.files[0]] if text.endswith(".npz") else found
        return torch.from_numpy(array).split(batch)
    batches = load_factory(text)()
    if not isinstance(batches, Iterable):
        raise ConversionError(f"{text} returned a {type(batches).__name__}; an iterable of batches is required")
    return batches
