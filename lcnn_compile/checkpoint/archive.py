"""save() and load(): lookup models as safetensors files with a versioned, checksummed header; no pickle anywhere."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from lcnn_compile.checkpoint.calls import Calls, adapt_lifted, are_calls, describe_calls, put_calls
from lcnn_compile.checkpoint.stored import DTYPES, from_stored, to_stored
from lcnn_compile.conversion.intercept import replace_layer
from lcnn_compile.errors import CheckpointError, LcnnError
from lcnn_compile.geometry import kind_of
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import FACTORS, LookupModule, dense_layer, lookup_layer, lookup_modules
from lcnn_compile.modules.tables import CHECKSUM, TABLES
from lcnn_compile.passes.lift import lift_functional_convolutions
from lcnn_compile.report import LayerReport, Report
from lcnn_compile.torch_private import BatchNorm, module_of

FORMAT = 1
MAX_HEADER = 1 << 25
"""Bytes of a file's header; a thousand layers need a hundredth of it."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        layers: qualified name of each lookup module -> {"kernel_size": [kh, kw], "lowering": str} and, where it is not
            "float32", {"precision": str}.
        aliases: state-dict key -> the key under which the same tensor is stored.
        report: the rows of ``lcnn_report``, empty if the model had none.
        shapes: stored tensor -> its shape.
        calls: the parameters that convolutions called as functions look up.
    """

    layers: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    report: list[dict[str, Any]]
    shapes: dict[str, list[int]]
    calls: Calls


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a converted model (compiled or not) to ``path``, atomically: the file is the old one or the whole new one.

    Parameters and buffers may have any dtype; buffers, other than statistics of batch norms, may hold any values, such as masks of -inf.

    Raises:
        CheckpointError: if the model has no lookup modules, a parameter or a statistic holds values that are not finite, something in its state
            dict is no dense tensor, or the file cannot be written.
    """
    model = module_of(model)
    layers = {name: _settings(module) for name, module in lookup_modules(model)}
    if not layers:
        raise CheckpointError(f"{type(model).__name__} has no lookup modules; convert it first, or save its state_dict")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[Any, str] = {}
    forms: dict[str, dict[str, Any]] = {}
    finite = {*_weights(model), *_factor_keys(layers)}
    for key, value in _state(model).items():
        stored, form = to_stored(key, value)
        if key in finite:
            _check_finite(key, value)
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else key
        if place in owners:
            aliases[key] = owners[place]
            continue
        owners[place] = key
        tensors[key] = stored
        if form is not None:
            forms[key] = form
    report = getattr(model, "lcnn_report", None)
    rows = report.to_dict()["layers"] if isinstance(report, Report) else []
    for row in rows:
        del row["precision"]  # stands with the layers: versions that do not know it read the report all the same
    described: dict[str, Any] = {"format": FORMAT, "layers": layers, "aliases": aliases, "report": rows}
    described |= {name: value for name, value in (("forms", forms), ("calls", describe_calls(model))) if value}
    body = json.dumps(described, sort_keys=True)
    metadata = {"lcnn": body, "digest": _digest(body, tensors)}
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A copy of the dense ``model`` with the lookup modules and all other tensors of the file put in.

    Everything is checked before a kernel can see it: format, checksum, dtypes, shapes, index ranges, finite values, and
    that the file fits the model.

    Raises:
        CheckpointError: naming what is wrong.
    """
    header, tensors = _read(Path(path))
    result = copy.deepcopy(module_of(model))
    state = {**tensors, **{key: _stored(tensors, key, source) for key, source in header.aliases.items()}}
    for key in _weights(result) & set(state):
        _check_finite(key, state[key])
    layers, adapted = header.layers, False
    put_calls(result, header.calls)
    if missing := [name for name in layers if not _has(result, name)]:
        if isinstance(result, fx.GraphModule):
            result = lift_functional_convolutions(result)
        else:
            layers, state = adapt_lifted(result, missing, layers, state)
            adapted = True
    if missing := [name for name in layers if not _has(result, name)]:
        raise CheckpointError(f"the model has no layers {missing}, which the file replaces")
    for name, settings in layers.items():
        new = _module(result.get_submodule(name), name, settings, state)
        result = replace_layer(result, result.get_submodule(name), new)
    # Version 0.1 dropped what a traced graph does not read.
    _load_state(result, {**result.state_dict(), **state} if adapted else state)
    result.lcnn_report = Report(tuple(_row(row) for row in header.report), title=f"lcnn: {type(model).__name__}")
    return result


def read_header(path: str | os.PathLike[str]) -> Header:
    """What the file says about itself, after every check that needs no model.

    Raises:
        CheckpointError: if the file is damaged or not a lookup checkpoint.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    try:
        with open(path, "rb") as start:
            size = int.from_bytes(start.read(8), "little")
        if size > MAX_HEADER:
            raise CheckpointError(
                f"{path} is not a readable safetensors file: its header has {size} bytes; {MAX_HEADER} are allowed"
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {type(error).__name__}: {error}") from error
    for key, value in tensors.items():
        if value.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {key} has dtype {value.dtype}; allowed are {DTYPES}")
    body = metadata.get("lcnn")
    if body is None or "digest" not in metadata:
        raise CheckpointError(f"{path} is not a lookup checkpoint: its header has no lcnn entry")
    if metadata["digest"] != _digest(body, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its contents")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else values
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    layers, aliases, report = values.get("layers"), values.get("aliases"), values.get("report")
    refusal = CheckpointError(f"{path} has a header that does not describe lookup layers")
    if not isinstance(layers, dict) or not isinstance(aliases, dict) or not isinstance(report, list):
        raise refusal
    calls = values.get("calls", [])
    if not are_calls(calls):
        raise refusal
    if not all(_layer_ok(v) for v in layers.values()) or not all(isinstance(v, str) for v in aliases.values()):
        raise refusal
    for row in report:
        if isinstance(row, dict) and isinstance(row.get("name"), str):
            row["precision"] = layers.get(row["name"], {}).get("precision", "float32")
    forms = values.get("forms", {})
    if not isinstance(forms, dict) or not set(forms) <= set(tensors):
        raise refusal
    tensors |= {key: from_stored(key, tensors[key], form) for key, form in forms.items()}
    for key in _factor_keys(layers) & set(tensors):
        _check_finite(key, tensors[key])
    return Header(layers, aliases, report, {key: list(value.shape) for key, value in tensors.items()}, calls), tensors


def _state(model: nn.Module) -> dict[str, Any]:
    """The state dict, with the index tables themselves, which may be shared, and without checksums: a file has its own."""
    state = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LookupModule):
            prefix = f"{name}." if name else ""
            state.pop(prefix + CHECKSUM, None)
            state.update({prefix + table: getattr(module, table) for table in TABLES})
    return state


def _weights(model: nn.Module) -> set[str]:
    """Keys of what must be finite: parameters and the statistics of batch norms. Other buffers are the user's business."""
    found = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BatchNorm):
            found |= {f"{name}.{key}" if name else key for key, _ in module.named_buffers(recurse=False)}
    return found


def _factor_keys(layers: Mapping[str, Any]) -> set[str]:
    """Keys of the tensors of lookup layers."""
    return {f"{name}.{part}" if name else part for name in layers for part in (*FACTORS, "bias")}


def _settings(module: LookupModule) -> dict[str, Any]:
    rounding = {} if module.precision == "float32" else {"precision": module.precision}
    return {"kernel_size": list(module.call.kernel_size), "lowering": module.lowering, **rounding}


def _layer_ok(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("lowering"), str):
        return False
    if not isinstance(value.get("precision", ""), str):
        return False
    size = value.get("kernel_size")
    return isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and 0 < v < 2**15 for v in size)


def _row(row: Any) -> LayerReport:
    """A row of the report, every value of the type that its field has."""
    kinds = get_type_hints(LayerReport)
    try:
        wrong = [key for key, value in row.items() if not isinstance(value, kinds[key])]
        if wrong:
            raise TypeError(f"{wrong} have values of another type")
        return LayerReport(**row)
    except (TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"the report in the header has a row that is not one: {error}") from error


def _digest(body: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum of the description and of every tensor's name, dtype, shape and bytes."""
    found = hashlib.blake2b(body.encode(), digest_size=32)
    for key in sorted(tensors):
        value = tensors[key]
        found.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_finite(key: str, value: Tensor) -> None:
    if value.dtype.itemsize == 1 and value.is_floating_point():
        value = value.float()
    if (value.is_floating_point() or value.is_complex()) and not bool(value.isfinite().all()):
        raise CheckpointError(f"{key} has values that are not finite")


def _stored(tensors: Mapping[str, Tensor], key: str, source: str) -> Tensor:
    if source not in tensors:
        raise CheckpointError(f"{key} refers to {source!r}, which is not in the file")
    return tensors[source]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _module(old: nn.Module, name: str, settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> LookupModule:
    """The lookup module that the file puts in place of ``old``."""
    prefix = f"{name}." if name else ""
    dense = dense_layer(old) if isinstance(old, LookupModule) else old
    if kind_of(dense) is None:
        raise CheckpointError(f"{name} is a {type(old).__name__} in the model; the file has a lookup layer for it")
    absent = [key for key in FACTORS if prefix + key not in state]
    if absent:
        raise CheckpointError(f"{name} lacks the tensors {absent}")
    factors = {key: state[prefix + key] for key in FACTORS}
    kernel = (settings["kernel_size"][0], settings["kernel_size"][1])
    bias = state.get(f"{prefix}bias")
    try:
        weight = LookupWeight(**factors, kernel_size=kernel).to(dense.weight.device)
        # This validates the weight.
        return lookup_layer(weight, dense, bias, settings["lowering"], settings.get("precision", "float32"))
    except LcnnError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    wrong = {key: value for key, value in state.items() if key in own and value.dtype != own[key].dtype}
    for key, value in wrong.items():
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (value, own[key])]
        if kinds[0] != kinds[1]:
            raise CheckpointError(f"{key} has dtype {value.dtype}; the model has {own[key].dtype}")
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise CheckpointError(f"the file does not fit the model: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
