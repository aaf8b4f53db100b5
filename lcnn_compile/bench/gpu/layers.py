"""GPU benchmark, single layers: values against float64, then times against the best dense layer of the same dtype."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.bench.gpu.budget import Budget, at_most
from lcnn_compile.bench.gpu.cases import CHECKED_BATCH, FORMATS, Layer, Sizes
from lcnn_compile.bench.gpu.floors import floors, over_floor, to_json
from lcnn_compile.bench.gpu.machine import Machine, allowed, set_mode, step
from lcnn_compile.bench.settings import random_lookup
from lcnn_compile.modules import LookupConv2d

AUTOTUNE_SECONDS = 45.0


def distance(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖ / ‖truth‖; infinite where anything is not a number."""
    error = float((y.detach().double() - truth.detach()).norm() / truth.detach().norm())
    return error if error == error else float("inf")


def lookup_of(layer: Layer, sizes: Sizes, device: str, dtype: torch.dtype) -> LookupConv2d:
    """A random lookup layer."""
    module = random_lookup(layer.conv(), sizes.config())
    assert isinstance(module, LookupConv2d)
    if sizes.shuffled:
        filters, order = module.filters, torch.randperm(layer.filters, dtype=torch.int32)
        module.filters = torch.where(filters >= 0, order[filters.clamp(min=0).long()], filters)
    return module.to(device, dtype)


@contextmanager
def without_tuning() -> Iterator[None]:
    """Configurations are guessed within, which saves most of the compiling."""
    before = os.environ.get("LCNN_TUNE")
    os.environ["LCNN_TUNE"] = "0"
    try:
        yield
    finally:
        del os.environ["LCNN_TUNE"]
        if before is not None:
            os.environ["LCNN_TUNE"] = before


@contextmanager
def plain_cudnn() -> Iterator[None]:
    """No search for algorithms within: for results that are needed once."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def check(machine: Machine, budget: Budget, layer: Layer, sizes: Sizes, mode: str) -> list[dict[str, Any]]:
    """Output and gradients of a lookup layer in both memory formats against float64, not farther than a dense layer may be."""
    torch.manual_seed(0)
    dtype, rows = set_mode(mode), []
    module = lookup_of(layer, sizes, machine.device, dtype)
    for name, format in FORMATS.items():
        x = torch.randn(layer.shape(CHECKED_BATCH), device=machine.device).to(dtype).contiguous(memory_format=format)
        exact = copy.deepcopy(module).double()
        with without_tuning(), plain_cudnn():
            truth = exact.to_conv()(x.double())
            own = distance(module.to_conv()(x), truth)
            y = module(x)
            found = distance(y, truth)
            found_gradients = torch.autograd.grad(y.square().sum(), [module.dictionary, module.coefficients])
            wide = exact(x.double()).square().sum()
            gradients = torch.autograd.grad(wide, [exact.dictionary, exact.coefficients])
        back = max(distance(g, w) for g, w in zip(found_gradients, gradients, strict=True))
        agrees = found <= allowed(mode, own) and back <= 8 * allowed(mode, own)
        case = f"{layer.name} {sizes.name} {mode} {name}"
        rows.append({"case": case, "error": found, "dense_error": own, "gradient_error": back, "agrees": agrees})
        if not agrees:
            print(f"WRONG {case}: error {found:.2g}, dense {own:.2g}, gradients {back:.2g}", flush=True)
    return rows


@torch.no_grad()
def dense_times(
    machine: Machine, budget: Budget, conv: nn.Module, inputs: Sequence[Tensor], format: str, autotune: bool, label: str
) -> dict[str, float]:
    """Milliseconds of the dense layer: eager in both memory formats, and Inductor's in ``format`` where asked for."""
    found = {}
    for name, form in FORMATS.items():
        same = list(inputs) if name == format else [x.contiguous(memory_format=form) for x in inputs]
        conv = conv.to(memory_format=form)  # type: ignore[call-overload]
        found[f"eager {name}"] = machine.milliseconds(conv, same)
    if autotune and budget.left() > 60:
        try:
            with at_most(AUTOTUNE_SECONDS):
                torch.compiler.reset()
                conv = conv.to(memory_format=FORMATS[format])  # type: ignore[call-overload]
                compiled = torch.compile(conv, mode="max-autotune-no-cudagraphs")
                found["max-autotune"] = machine.milliseconds(compiled, list(inputs))
        except Exception as error:
            budget.skip(f"{label}: torch.compile(mode='max-autotune')", error)
    elif autotune:
        budget.skip(f"{label}: torch.compile(mode='max-autotune')")
    return found


@torch.no_grad()
def layer(
    machine: Machine,
    budget: Budget,
    layer: Layer,
    settings: Sequence[Sizes],
    mode: str,
    format: str,
    batch: int,
    autotune: bool,
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    """One layer, dense and with lookups of every setting; wrong values get no time."""
    torch.manual_seed(0)
    dtype, rows = set_mode(mode), []
    label = f"{layer.name} b{batch} {mode} {format}"
    inputs = machine.inputs(layer.shape(batch), dtype, FORMATS[format])
    conv = layer.conv().to(machine.device, dtype)
    dense = dense_times(machine, budget, conv, inputs, format, autotune, label)
    best = min(dense.values())
    for sizes in settings:
        row: dict[str, Any] = {"layer": layer.name, "sizes": sizes.name, "mode": mode, "format": format, "batch": batch}
        try:
            rows.append({**row, **_lookup_times(machine, layer, sizes, mode, batch, dtype, inputs, ceilings), "dense_ms": dense})
        except Exception as error:
            if not machine.usable():
                raise
            budget.skip(f"{label} {sizes.name}", error)
            continue
        row = rows[-1]
        row["speedup"] = best / row["ms"]["lookup"]
        ratios = " ".join(f"{name} {ratio:.2f}" for name, ratio in row["over_floor"].items())
        print(
            f"{label:36} {sizes.name:8} dense {best:8.4f}  lookup {row['ms']['lookup']:8.4f}  factored "
            f"{row['ms']['factored']:8.4f} ms  {row['speedup']:5.2f}x  over floor: {ratios}",
            flush=True,
        )
    return rows


def _lookup_times(
    machine: Machine,
    layer: Layer,
    sizes: Sizes,
    mode: str,
    batch: int,
    dtype: torch.dtype,
    inputs: list[Tensor],
    ceilings: dict[str, float],
) -> dict[str, Any]:
    module = lookup_of(layer, sizes, machine.device, dtype)
    with plain_cudnn():
        apart = distance(module(inputs[0]), module.to_conv()(inputs[0]).double())
    if not apart <= 16 * step(mode):
        raise ArithmeticError(f"wrong values, so no times: {apart:.2g} from the dense layer")
    times = {}
    for lowering in ("factored", "lookup"):
        module.lowering = lowering
        times[lowering] = machine.milliseconds(module, inputs)
    kernels: dict[str, float] = {}
    try:
        kernels = machine.kernel_times(module, inputs)
    except RuntimeError as error:
        print(f"no times of single kernels: {error}", flush=True)
    least = floors(layer, sizes, mode, batch, ceilings)
    return {
        "sizes_of": asdict(sizes),
        "ms": times,
        "kernels_ms": kernels,
        "floors": to_json(least),
        "over_floor": over_floor(kernels, times["lookup"], least),
    }
