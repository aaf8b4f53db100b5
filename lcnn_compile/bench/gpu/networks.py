"""GPU benchmark, whole networks: every wide 3x3 layer at its fastest sizes and lowering, compiled by our backend, against dense."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.backend.entry import lcnn
from lcnn_compile.bench.gpu.budget import Budget, at_most
from lcnn_compile.bench.gpu.cases import Sizes
from lcnn_compile.bench.gpu.layers import distance, plain_cudnn
from lcnn_compile.bench.gpu.machine import Machine, allowed, set_mode
from lcnn_compile.bench.networks import NETWORKS, RESOLUTION, build, example_input
from lcnn_compile.bench.settings import dense_twin, random_lookup
from lcnn_compile.kernels.operator import LOWERINGS
from lcnn_compile.modules import LookupConv2d

COMPILE_SECONDS = 60.0
SEARCH_SECONDS = 200.0
"""What max-autotune takes for a network, at least; it is left out where less time is left."""
REPEATED = 8
"""Calls of a layer in one replay, so that starting the replay does not count; its input is in the cache, as in a network."""


def wide(module: nn.Module) -> bool:
    """Whether a layer of a network gets lookups: 3x3, on 64 channels and more."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels >= 64 and module.groups == 1


def _inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each wide layer of the model reads."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].clone()))
        for name, module in model.named_modules()
        if wide(module)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def fastest_layers(
    machine: Machine, budget: Budget, model: nn.Module, x: Tensor, settings: Sequence[Sizes]
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """A copy with every wide layer at its fastest sizes and lowering on its own input; the milliseconds of all, by layer.

    Layers of equal shape are measured once. A layer that is fastest dense stays an ordinary convolution.
    """
    result, record = copy.deepcopy(model), {}
    known: dict[Any, dict[str, float]] = {}
    for name, given in _inputs_of(model, x).items():
        conv = result.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        modules = {sizes.name: random_lookup(conv, sizes.config()) for sizes in settings}
        key = (tuple(given.shape), conv.out_channels, conv.stride)
        if key not in known:
            inputs = [given] * REPEATED
            times = {"dense": machine.milliseconds(conv, inputs)}
            for sizes, module in modules.items():
                module.to(conv.weight.device, conv.weight.dtype)
                for lowering in LOWERINGS[:2]:
                    module.lowering = lowering
                    try:
                        times[f"{sizes} {lowering}"] = machine.milliseconds(module, inputs)
                    except Exception as error:
                        if not machine.usable():
                            raise
                        budget.skip(f"{name} {sizes} {lowering}", error)
            known[key] = times
        times = known[key]
        best = min(times, key=lambda way: times[way])
        record[name] = {"ms": times, "taken": best}
        if best != "dense":
            sizes, lowering = best.split()
            chosen = modules[sizes].to(conv.weight.device, conv.weight.dtype)
            assert isinstance(chosen, LookupConv2d)
            chosen.lowering = lowering
            result.set_submodule(name, chosen)
    return result.eval(), record


@torch.no_grad()
def _dense(machine: Machine, budget: Budget, model: nn.Module, images: list[Tensor], label: str) -> dict[str, float]:
    times = {}
    for name, compile_mode in (("eager", None), ("inductor", "default"), ("max-autotune", "max-autotune-no-cudagraphs")):
        limit = SEARCH_SECONDS if name == "max-autotune" else COMPILE_SECONDS
        if name == "max-autotune" and budget.left() < limit:
            budget.skip(f"{label} dense {name}")
            continue
        try:
            with at_most(max(1.0, min(limit, budget.left() - 5))):
                torch.compiler.reset()
                call = model if compile_mode is None else torch.compile(model, mode=compile_mode)
                times[name] = machine.milliseconds(call, images)
        except Exception as error:
            if not machine.usable():
                raise
            budget.skip(f"{label} dense {name}", error)
    return times


@torch.no_grad()
def network(
    machine: Machine, budget: Budget, network: str, mode: str, batch: int, settings: Sequence[Sizes], side: int = RESOLUTION
) -> list[dict[str, Any]]:
    """One network, channels_last: lookups against the fastest of eager, Inductor, and Inductor with max-autotune."""
    label = f"{network} b{batch} {mode}"
    torch.manual_seed(0)
    dtype = set_mode(mode)
    model = build(network) if network in NETWORKS else _small()
    model = model.to(machine.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = [example_input(batch, side, seed).to(machine.device, dtype, memory_format=torch.channels_last) for seed in range(2)]
    lookups, record = fastest_layers(machine, budget, model, images[0], settings)
    taken = {name: entry["taken"] for name, entry in record.items()}
    if set(taken.values()) == {"dense"}:
        budget.skip(label, "no layer is faster with lookups")
        return [{"network": network, "mode": mode, "batch": batch, "ms": {}, "dense_ms": {}, "speedup": 1.0, "layers": record}]
    with plain_cudnn():
        twin = dense_twin(lookups)
        truth = copy.deepcopy(twin).double()(images[0][:4].double())
        own = distance(twin(images[0][:4]), truth)
    torch.compiler.reset()
    compiled = torch.compile(lookups, backend=lcnn)
    found = distance(compiled(images[0])[:4], truth)
    if not found <= allowed(mode, own):
        raise ArithmeticError(f"wrong values, so no times: {label}: error {found:.2g}, dense {own:.2g}")
    times = {"lookup": machine.milliseconds(compiled, images)}
    print(f"{label}: lookup {times['lookup']:.3f} ms; {taken}", flush=True)
    dense = _dense(machine, budget, model, images, label)
    speedup = min(dense.values()) / times["lookup"]
    print(f"{label}: dense {', '.join(f'{name} {ms:.3f}' for name, ms in dense.items())} ms  {speedup:.2f}x", flush=True)
    return [
        {"network": network, "mode": mode, "batch": batch, "ms": times, "dense_ms": dense, "speedup": speedup, "layers": record}
    ]


def _small() -> nn.Module:
    """A network for rehearsals."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 4, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
