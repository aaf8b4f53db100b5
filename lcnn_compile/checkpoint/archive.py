"""save() and load(): lookup models as safetensors files with a versioned, checksummed header; no pickle anywhere."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from lcnn_compile.checkpoint.calls import adapt_lifted, describe_calls, put_calls
from lcnn_compile.checkpoint.compact import small, stepped
from lcnn_compile.checkpoint.header import check_finite, factor_keys, header_text, read_file
from lcnn_compile.checkpoint.stored import to_stored
from lcnn_compile.conversion.intercept import replace_layer
from lcnn_compile.errors import CheckpointError, LcnnError
from lcnn_compile.geometry import kind_of
from lcnn_compile.kernels.bytes_lowering import unpack_ranges
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import FACTORS, LookupModule, dense_layer, lookup_layer, lookup_modules
from lcnn_compile.modules.tables import CHECKSUM, TABLES
from lcnn_compile.passes.lift import lift_functional_convolutions
from lcnn_compile.report import LayerReport, Report
from lcnn_compile.torch_private import BatchNorm, module_of


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
    finite = {*_weights(model), *factor_keys(layers)}
    compact = _compact(model)
    for key, value in _state(model).items():
        stored, form = to_stored(key, value)
        if key in finite:
            check_finite(key, value)
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else key
        if place in owners:
            aliases[key] = owners[place]
            continue
        owners[place] = key
        found = compact[key](value) if key in compact else None
        tensors[key], form = found or (stored, form)
        if form is not None:
            forms[key] = form
    report = getattr(model, "lcnn_report", None)
    rows = report.to_dict()["layers"] if isinstance(report, Report) else []
    metadata = header_text(layers, aliases, rows, forms, describe_calls(model), tensors)
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
    header, tensors = read_file(Path(path))
    result = copy.deepcopy(module_of(model))
    state = {**tensors, **{key: _stored(tensors, key, source) for key, source in header.aliases.items()}}
    for key in _weights(result) & set(state):
        check_finite(key, state[key])
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


def _state(model: nn.Module) -> dict[str, Any]:
    """The state dict, with the index tables themselves, which may be shared, and without checksums: a file has its own."""
    state = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LookupModule):
            prefix = f"{name}." if name else ""
            state.pop(prefix + CHECKSUM, None)
            state.update({prefix + table: getattr(module, table) for table in TABLES})
    return state


def _compact(model: nn.Module) -> dict[str, Any]:
    """By key of the state dict what makes fewer bytes of a tensor of a layer of bytes, where it can."""
    found: dict[str, Any] = {}
    for name, module in lookup_modules(model):
        if module.precision == "int8" and module.ranges is not None:
            prefix, counts = f"{name}." if name else "", module.offsets.diff().cpu()
            found[f"{prefix}dictionary"] = partial(stepped, counts=counts, turned=True)
            found[f"{prefix}coefficients"] = partial(stepped, counts=counts)
            found |= {f"{prefix}{table}": small for table in ("indices", "positions")}
    return found


def _weights(model: nn.Module) -> set[str]:
    """Keys of what must be finite: parameters and the statistics of batch norms. Other buffers are the user's business."""
    found = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BatchNorm):
            found |= {f"{name}.{key}" if name else key for key, _ in module.named_buffers(recurse=False)}
    return found


def _settings(module: LookupModule) -> dict[str, Any]:
    rounding = {} if module.precision == "float32" else {"precision": module.precision}
    return {"kernel_size": list(module.call.kernel_size), "lowering": module.lowering, **rounding}


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
    precision, ranges = settings.get("precision", "float32"), state.get(f"{prefix}ranges")
    kernel = (settings["kernel_size"][0], settings["kernel_size"][1])
    bias = state.get(f"{prefix}bias")
    try:
        weight = LookupWeight(**factors, kernel_size=kernel).to(dense.weight.device)
        if ranges is not None:
            unpack_ranges(ranges, weight.dictionary, name)
        # This validates the weight.
        return lookup_layer(weight, dense, bias, settings["lowering"], precision)
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
