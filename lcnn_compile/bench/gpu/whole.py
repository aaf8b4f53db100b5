"""GPU benchmark, half precision: pairs of layers and whole networks as chains, against the best dense result of the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile.backend.entry import lcnn
from lcnn_compile.bench.gpu.budget import Budget, at_most
from lcnn_compile.bench.gpu.chains import CHECKED, SIZES, lookups_in, subject, with_lookups
from lcnn_compile.bench.gpu.layers import distance, plain_cudnn
from lcnn_compile.bench.gpu.machine import Machine, allowed, set_mode
from lcnn_compile.bench.settings import dense_twin
from lcnn_compile.kernels.triton.chain_pack import pack_bias, pack_next, pack_weight
from lcnn_compile.torch_private import inductor_freezing

CHECKED_IMAGES = 4


def _eager(model: nn.Module) -> Callable[[Tensor], Any]:
    return model


def _inductor(model: nn.Module, mode: str | None = None) -> Callable[[Tensor], Any]:
    torch.compiler.reset()
    return torch.compile(model, mode=mode)


def _frozen(model: nn.Module) -> Callable[[Tensor], Any]:
    """Inductor with constant weights: batch norm folded, filters laid out once."""
    torch.compiler.reset()
    compiled = torch.compile(model)

    def call(x: Tensor) -> Any:
        with inductor_freezing():
            return compiled(x)

    return call


DENSE: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], Any]], float]] = {
    "frozen": (_frozen, 60.0),
    "inductor": (_inductor, 60.0),
    "eager": (_eager, 30.0),
    "max-autotune": (partial(_inductor, mode="max-autotune-no-cudagraphs"), 200.0),
}
"""Ways to run the dense network, and the seconds that each may take."""


def _plans(machine: Machine) -> dict[str, str]:
    """How each kind of call that was measured so far runs."""
    if machine.device != "cuda":
        return {}
    from lcnn_compile.kernels.triton.chain_tune import chosen  # needs Triton

    return chosen()


def trace(machine: Machine, call: Callable[[Tensor], Any], x: Tensor) -> list[tuple[str, float]]:
    """Kernels of one call in order, and their microseconds; empty where there is no GPU."""
    if machine.device != "cuda":
        call(x)
        return []
    for _ in range(2):
        call(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(x)
        torch.cuda.synchronize()
    events = [event for event in profile.events() or [] if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name[:100], round(event.time_range.elapsed_us(), 2)) for event in events]


@torch.no_grad()
def check(machine: Machine, mode: str, batch: int = 5) -> list[dict[str, Any]]:
    """Every plan of odd calls against float64: each as near as a dense convolution may be. On a CPU the operator's reference."""
    torch.manual_seed(0)
    dtype, rows = set_mode(mode), []
    for channels, filters, k, size, kernel, stride, added in CHECKED:
        x = torch.randn(batch, channels, *size, device=machine.device).to(dtype, memory_format=torch.channels_last)
        weight = (torch.randn(filters, channels, kernel, kernel, device=machine.device) / (3 * channels**0.5)).to(dtype)
        bias = torch.randn(filters, device=machine.device).to(dtype)
        dense = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
        residual = torch.randn_like(dense).to(dtype, memory_format=torch.channels_last) if added else None
        matrix = (torch.randn(k, filters, device=machine.device) / filters**0.5).to(dtype)
        truth = dense.relu() if residual is None else (dense + residual.double()).relu()
        product = F.conv2d(truth, matrix.double()[:, :, None, None]) if k else None
        own = distance(F.conv2d(x, weight, bias, stride, kernel // 2), dense)
        next = pack_next(matrix) if k else None
        packed = (x, pack_weight(weight), pack_bias(bias), residual, next)
        geometry = ((kernel, kernel), (stride, stride), (kernel // 2,) * 4, (1, 1))
        for name, (y, s) in _answers(machine, packed, tuple(truth.shape), k, geometry).items():
            error = max(distance(y, truth), 0.0 if product is None else distance(s, product))
            case = f"{channels}->{filters}+{k}@{size} {kernel}x{kernel}/{stride} {mode} {name}"
            rows.append({"case": case, "error": error, "dense_error": own, "agrees": error <= 2 * allowed(mode, own)})
            if not rows[-1]["agrees"]:
                print(f"WRONG {case}: error {error:.2g}, dense {own:.2g}", flush=True)
    return rows


def _answers(machine: Machine, packed: Any, shape: Any, k: int, geometry: Any) -> dict[str, tuple[Any, Any]]:
    """y and the product by every plan that compiles here."""
    x, weight, bias, residual, next = packed
    if machine.device != "cuda":
        return {"reference": torch.ops.lcnn.chain(*packed, shape[1], k, *geometry, "relu", False, True)}
    from triton.errors import TritonError

    from lcnn_compile.kernels.triton import chain_tune as tune  # needs Triton
    from lcnn_compile.kernels.triton.chain import Tail, Window

    kernel, stride, padding, dilation = geometry
    window, tail = Window(kernel, stride, (padding[0], padding[2]), dilation), Tail(bias, residual, "relu", False, next)
    call = tune.Call(x, weight, window, tail, shape, True, k)
    found: dict[str, tuple[Any, Any]] = {}
    for plan in tune.plans(call):
        try:
            found[repr(plan)] = tune.run(call, plan)
        except (TritonError, RuntimeError):
            continue  # too large for this device: it loses where plans are measured, too
    return found


@torch.no_grad()
def whole(
    machine: Machine,
    budget: Budget,
    network: str,
    mode: str,
    batch: int,
    ways: tuple[str, ...],
    side: int = 0,
    traced: bool = True,
) -> list[dict[str, Any]]:
    """One network or pair, channels_last; lookups with k = m/4 in every 3x3 layer on 64 channels and more. Wrong values get no time."""
    label = f"{network} b{batch} {mode}"
    torch.manual_seed(0)
    dtype, last = set_mode(mode), torch.channels_last
    model, (channels, natural) = subject(network)
    model = model.to(machine.device)
    lookups = with_lookups(copy.deepcopy(model))
    shape = (batch, channels, side or natural, side or natural)
    images = [torch.randn(shape, device=machine.device).to(dtype).contiguous(memory_format=last) for _ in range(2)]
    lookups = lookups.to(dtype, memory_format=last)  # type: ignore[call-overload]
    few = images[0][:CHECKED_IMAGES]
    with plain_cudnn():
        truth = dense_twin(copy.deepcopy(lookups).double())(few.double())
        own = distance(dense_twin(lookups)(few), truth)
    torch.compiler.reset()
    compiled = torch.compile(lookups, backend=lcnn)
    outputs: Tensor = compiled(images[0])  # type: ignore[no-untyped-call]
    found = distance(outputs[:CHECKED_IMAGES], truth)
    row: dict[str, Any] = {"network": network, "mode": mode, "batch": batch, "sizes": SIZES.name, "layers": lookups_in(lookups)}
    row |= {"error": found, "dense_error": own}
    print(f"{label}: error {found:.2g}, a dense network's own {own:.2g}", flush=True)
    if not found <= allowed(mode, own):
        raise ArithmeticError(f"wrong values, so no times: {label}: error {found:.2g}, dense {own:.2g}")
    row["ms"] = {"lookup": machine.milliseconds(compiled, images)}
    if traced:
        row["trace"] = trace(machine, compiled, images[0])
    row["plans"] = _plans(machine)
    print(f"{label}: lookups {row['ms']['lookup']:.4f} ms, {len(row.get('trace', []))} kernels", flush=True)
    dense = row["dense_ms"] = {}
    model = model.to(dtype, memory_format=last)  # type: ignore[call-overload]
    for name in ways:
        make, seconds = DENSE[name]
        if budget.left() < min(seconds, 15):
            budget.skip(f"{label} dense {name}")
            continue
        try:
            with at_most(max(1.0, min(seconds, budget.left() - 5))):
                call = make(model)
                dense[name] = machine.milliseconds(call, images)
                if traced:
                    row.setdefault("dense_traces", {})[name] = trace(machine, call, images[0])
        except Exception as error:
            if not machine.usable():
                raise
            budget.skip(f"{label} dense {name}", error)
    row["speedup"] = min(dense.values()) / row["ms"]["lookup"] if dense else None
    print(
        f"{label}: dense {', '.join(f'{name} {ms:.4f}' for name, ms in dense.items())} ms; {row['speedup'] or 0:.2f}x", flush=True
    )
    return [row]
