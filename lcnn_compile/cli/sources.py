"""What a user names on the command line: a model, its weights, inputs, calibration data."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lcnn_compile.batches import Inputs, signature_of
from lcnn_compile.cli.images import ImageFolder, Images
from lcnn_compile.errors import ConversionError
from lcnn_compile.export.formats import load_pt2

_SHAPE = re.compile(r"(?P<size>[1-9]\d*(?:x[1-9]\d*)*)(?::(?P<dtype>\w+))?")
_NAME = re.compile(r"([A-Za-z_]\w*)=")
_WORDS = {"none": None, "true": True, "false": False}
_NUMBERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
_NAMED = 8


def load_factory(text: str) -> Callable[..., Any]:
    """The callable that "package.module:name" or "file.py:name" names.

    Raises:
        ConversionError: if there is no such file, module or name, or running it fails; names that exist are listed.
    """
    place, colon, name = text.rpartition(":")
    if not colon:
        place, name = text, ""
    module = _module(place)
    if not name:
        raise ConversionError(f"{text!r} names no factory; write {place}:NAME. {_choices(place, module)}")
    found = getattr(module, name, None)
    if not callable(found):
        problem = "has no" if found is None else f"has {name!r}, a {type(found).__name__}, but no callable"
        raise ConversionError(f"{place} {problem} {name!r}. {_choices(place, module)}")
    return found


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ConversionError(f"{place} is not a file; the folder searched is {path.resolve().parent}")
        spec = importlib.util.spec_from_file_location(path.stem, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Its neighbours can be imported, as when Python runs the file.
        sys.path.insert(0, str(path.resolve().parent))
        sys.modules[spec.name] = module
        load: Callable[[], Any] = lambda: spec.loader.exec_module(module)  # type: ignore[union-attr]  # noqa: E731
    elif not re.fullmatch(r"\w+(\.\w+)*", place):
        raise ConversionError(
            f"{place!r} is no module, .py file or .pt2 file; write package.module:factory, file.py:factory or model.pt2"
        )
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")
        load = lambda: importlib.import_module(place)  # noqa: E731
    try:
        return load() or module
    except Exception as error:
        # It is the user's code that runs here, which may raise anything.
        raise ConversionError(f"{place} cannot be imported: {describe(error)}") from error


def _choices(place: str, module: ModuleType) -> str:
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]
    return (
        f"It has {', '.join(own[:_NAMED])}{', …' if len(own) > _NAMED else ''}"
        if own
        else f"{place} defines no function or class"
    )


def describe(error: BaseException) -> str:
    """Type and message of an error in the user's code, and the line where it happened."""
    where = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "lcnn_compile" not in Path(frame.filename).parts[-3:-1]
    ]
    where = [frame for frame in where if not frame.filename.startswith("<frozen")]
    line = f", {where[-1].filename}, line {where[-1].lineno}" if where else ""
    return f"{type(error).__name__}: {error}{line}"


def load_model(text: str, weights: Path | None = None) -> nn.Module:
    """The model that a factory or a .pt2 file holds, in evaluation mode; a factory may also be an nn.Module instance or class.

    Raises:
        ConversionError: if it is no nn.Module, its factory fails, or the weights do not fit.
    """
    model: Any
    if text.endswith(".pt2"):
        model = load_pt2(text)
    else:
        factory = load_factory(text)
        if isinstance(factory, nn.Module):
            model = factory
        else:
            try:
                model = factory()
            except Exception as error:
                # It is the user's code that runs here, which may raise anything.
                raise ConversionError(f"{text} fails: {describe(error)}; a factory is called without arguments") from error
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{text} returned a {type(model).__name__}; an nn.Module is required")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict (.safetensors, or .pt and .pth without arbitrary objects) into ``model``.

    Raises:
        ConversionError: if the file cannot be read, or does not fit; the first names that differ are listed.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file fails in many ways inside zip files, pickles and safetensors.
        kind = "cannot be read" if isinstance(error, OSError | SafetensorError) else "is not a state dict of tensors alone"
        raise ConversionError(
            f"{path} {kind}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConversionError(f"{path} holds a {type(state).__name__}, not a state dict of tensors")
    if any(key.endswith("dictionary") for key in state) and not any(key.endswith("dictionary") for key in model.state_dict()):
        raise ConversionError(f"{path} is a checkpoint of a converted model; pass it with --checkpoint, not --weights")
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConversionError(f"{path} does not fit the model: {str(error).strip().splitlines()[-1].strip()}") from error
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for keys, what in (
                (missing, "tensors of the model are not in the file"),
                (unexpected, "tensors of the file are not in the model"),
            )
            if keys
        ]
        raise ConversionError(f"{path} does not fit the model: {'; '.join(parts)}")


def load_inputs(texts: Iterable[str]) -> Inputs:
    """The arguments of one call, from texts VALUE (by position) and NAME=VALUE.

    A value is a shape of normal or zero values ("1x3x224x224", "1x16:int64"), a .npy file, a .npz file (all of its arrays, by
    position only), or what Python calls "none", "true", "false", "int:3", "float:0.5", "str:text".

    Raises:
        ConversionError: for anything else, a name that is given twice, or a value by position after one by name.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        named = _NAME.match(text)
        if named is None:
            if kwargs:
                raise ConversionError(f"--input {text} is given by position after {', '.join(kwargs)} by name")
            args += _inputs(text)
            continue
        name, values = named[1], _inputs(text[named.end() :])
        if name in kwargs or len(values) != 1:
            raise ConversionError(f"--input {text}: {name} is {'given twice' if name in kwargs else 'not one array'}")
        kwargs[name] = values[0]
    return Inputs(*args, **kwargs)


def _inputs(text: str) -> list[Any]:
    if text.endswith((".npy", ".npz")):
        return _arrays(text)
    if text in _WORDS:
        return [_WORDS[text]]
    kind, colon, rest = text.partition(":")
    if colon and kind in _NUMBERS:
        try:
            return [_NUMBERS[kind](rest)]
        except ValueError:
            raise ConversionError(f"{text!r} is no input: {rest!r} is no {kind}") from None
    match = _SHAPE.fullmatch(text)
    dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise ConversionError(
            f"{text!r} is no input; write a shape like 1x3x224x224 or 1x16:int64, name a .npy or .npz file, or give a constant: "
            "none, true, false, int:3, float:0.5, str:text"
        )
    size = [int(v) for v in match["size"].split("x")]
    if dtype.is_floating_point:
        return [torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)]
    return [torch.zeros(size, dtype=dtype)]


def _arrays(path: str) -> list[Tensor]:
    return list(_named_arrays(path).values())


def _named_arrays(path: str) -> dict[str, Tensor]:
    """The arrays of a file by name; float64 becomes torch's default dtype."""
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {name: found[name] for name in found.files} if path.endswith(".npz") else {"": found}
        # ascontiguousarray makes a vector of a number.
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a).reshape(a.shape)) for name, a in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not tensors:
        raise ConversionError(f"{path} holds no array")
    return {name: t.to(torch.get_default_dtype()) if t.dtype == torch.float64 else t for name, t in tensors.items()}


def load_calibration(text: str, batch: int = 16, images: Images | None = None, model: nn.Module | None = None) -> Iterable[Any]:
    """Batches of a folder of images, of a .npy or .npz file (samples first), or of a factory of an iterable of batches.

    Several arrays of one length in a .npz file are the parts of each batch: by name where all are parameters of the ``model``'s
    ``forward``, else in the file's order.

    Raises:
        ConversionError: for anything else.
    """
    if text.endswith((".npy", ".npz")):
        named = _named_arrays(text)
        arrays = list(named.values())
        if arrays[0].dtype == torch.uint8:
            raise ConversionError(f"{text} holds bytes; store the values that the model takes, as float32, scaled and normalised")
        if not arrays[0].dim() or not len(arrays[0]):
            raise ConversionError(f"{text} holds no samples: its shape is {tuple(arrays[0].shape)}")
        parts = [array for array in arrays if array.dim() and len(array) == len(arrays[0])]
        if model is not None and len(parts) == len(named) and set(named) <= set(signature_of(model).parameters):
            return [dict(zip(named, pieces, strict=True)) for pieces in zip(*(a.split(batch) for a in arrays), strict=True)]
        return arrays[0].split(batch) if len(parts) == 1 else list(zip(*(array.split(batch) for array in parts), strict=True))
    if Path(text).is_dir():
        return ImageFolder(Path(text), images or Images((224, 224)), batch)
    if ":" not in text:
        raise ConversionError(
            f"{text!r} is no calibration data; name a folder of images, a .npy or .npz file, or package.module:factory"
        )
    try:
        batches = load_factory(text)()
    except ConversionError:
        raise
    except Exception as error:
        # It is the user's code that runs here, which may raise anything.
        raise ConversionError(f"{text} fails: {describe(error)}; a factory is called without arguments") from error
    if not isinstance(batches, Iterable):
        raise ConversionError(f"{text} returned a {type(batches).__name__}; an iterable of batches is required")
    return batches
