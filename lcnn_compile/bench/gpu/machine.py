"""Where the GPU benchmark runs: a GPU, or a CPU that stands in for it when the programme itself is tried.

Every time on a GPU is the median replay of a CUDA graph that holds the call on several inputs in turn, together larger than
the second-level cache, divided by their number: launches cost the same for everyone, and nothing is found in a cache by luck.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lcnn_compile.bench.gpu.cases import MODES
from lcnn_compile.kernels.triton import ops as triton_ops

REPLAYS = 9
MOST_INPUTS = 256
KERNELS = {
    "dictionary_kernel": "dictionary", "lookup_kernel": "lookups", "grouped_kernel": "lookups",
    "permute_kernel": "permute",
}  # fmt: skip
"""Kernels of ours and what tables call them."""


class Machine(Protocol):
    """What the measurements need of the device they run on."""

    device: str

    def describe(self) -> dict[str, Any]:
        """Device and versions, plain JSON."""

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> list[Tensor]:
        """Random inputs to take turns."""

    def milliseconds(self, call: Callable[[Tensor], Any], inputs: list[Tensor]) -> float:
        """Median time of one call."""

    def kernel_times(self, call: Callable[[Tensor], Any], inputs: list[Tensor]) -> dict[str, float]:
        """Milliseconds of each kernel of ours in one call."""

    def ceilings(self) -> dict[str, float]:
        """What this device reaches: "copy", "l2" and "l1" in bytes/s, each mode in flop/s."""

    def usable(self) -> bool:
        """Whether it still computes after something failed."""


def set_mode(mode: str) -> torch.dtype:
    """Allow TF32 in mode "tf32" alone; the dtype of the mode."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    return MODES[mode]


def step(mode: str) -> float:
    """The rounding step of a mode, relative."""
    return 2.0**-11 if mode == "tf32" else torch.finfo(MODES[mode]).eps


def allowed(mode: str, own: float) -> float:
    """The relative distance to float64 that is right in this mode, where a dense layer's own is ``own``.

    Float32 on matrix units is three products of TF32, 22 bits of each factor instead of 24.
    """
    return (8 if mode == "float32" else 4) * max(own, step(mode))


class Gpu:
    """The first NVIDIA GPU."""

    device = "cuda"

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)

    def describe(self) -> dict[str, Any]:
        """Device and versions, plain JSON."""
        import triton

        found = self.properties
        return {
            "gpu": found.name, "multiprocessors": found.multi_processor_count, "l2": found.L2_cache_size,
            "memory": found.total_memory, "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__, "python": platform.python_version(),
        }  # fmt: skip

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> list[Tensor]:
        """Random inputs, together more than twice the second-level cache, 2 to MOST_INPUTS of them."""
        size = torch.Size(shape).numel() * dtype.itemsize
        count = max(2, min(MOST_INPUTS, -(-2 * self.properties.L2_cache_size // size)))
        return [torch.randn(shape, device=self.device).to(dtype).contiguous(memory_format=format) for _ in range(count)]

    @torch.no_grad()
    def milliseconds(self, call: Callable[[Tensor], Any], inputs: list[Tensor]) -> float:
        """Median time of one call, from replays of a CUDA graph of a call per input."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for x in inputs[:2] * 2:
                call(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in inputs:
                call(x)
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / len(inputs))
        del graph
        return statistics.median(times)

    @torch.no_grad()
    def kernel_times(self, call: Callable[[Tensor], Any], inputs: list[Tensor]) -> dict[str, float]:
        """Milliseconds of each kernel of ours in one call, by the profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for x in inputs:
                call(x)
            torch.cuda.synchronize()
        return sum_kernels(profile.key_averages(), len(inputs))

    def ceilings(self) -> dict[str, float]:
        """A large copy, a copy within the second-level cache, a large product in each mode, and L1 at 128 bytes per clock and
        multiprocessor."""
        a = torch.randn(1 << 28, device=self.device)
        found = {"copy": 8 * a.numel() / self.milliseconds(lambda x: x.clone(), [a]) * 1e3}
        part = a[: self.properties.L2_cache_size // 16]
        room = torch.empty_like(part)
        found["l2"] = 8 * part.numel() / self.milliseconds(room.copy_, [part] * 32) * 1e3
        del a, part, room
        for mode in MODES:
            x = torch.randn(4096, 4096, device=self.device).to(set_mode(mode))
            found[mode] = 2 * 4096**3 / self.milliseconds(lambda x: x @ x, [x, x]) * 1e3
        clock = getattr(self.properties, "clock_rate", 1_755_000) * 1e3
        return {**found, "l1": 128 * self.properties.multi_processor_count * clock}

    def usable(self) -> bool:
        """False after an illegal access, say, which leaves a process without its GPU, or where kernels of ours were given up."""
        if triton_ops.failed():
            return False
        try:
            torch.cuda.synchronize()
            return bool((torch.ones(8, device=self.device).sum() == 8).item())
        except RuntimeError:
            return False


def sum_kernels(events: Any, calls: int) -> dict[str, float]:
    """Milliseconds per call of each kernel of ours among a profile's averages."""
    found: dict[str, float] = {}
    for event in events:
        name = KERNELS.get(event.key)
        if name is not None:
            found[name] = found.get(name, 0.0) + event.self_device_time_total / 1e3 / calls
    return found


class Rehearsal:
    """A CPU in place of the GPU: everything runs once, on our CPU kernels, and the times mean nothing."""

    device = "cpu"

    def describe(self) -> dict[str, Any]:
        """Device and versions, plain JSON."""
        return {"gpu": "none: a rehearsal on the CPU, its times mean nothing", "torch": torch.__version__}

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> list[Tensor]:
        """Two of them."""
        return [torch.randn(shape).to(dtype).contiguous(memory_format=format) for _ in range(2)]

    @torch.no_grad()
    def milliseconds(self, call: Callable[[Tensor], Any], inputs: list[Tensor]) -> float:
        """Of one call."""
        start = time.perf_counter()
        call(inputs[0])
        return max(1e-6, 1e3 * (time.perf_counter() - start))

    def kernel_times(self, call: Callable[[Tensor], Any], inputs: list[Tensor]) -> dict[str, float]:
        """As if both kernels took half of the time."""
        half = self.milliseconds(call, inputs) / 2
        return {"dictionary": half, "lookups": half}

    def ceilings(self) -> dict[str, float]:
        """An H100's by its datasheet."""
        return {"copy": 3e12, "l2": 5.5e12, "l1": 3e13, "float32": 5e13, "tf32": 4e14, "float16": 8e14, "bfloat16": 8e14}

    def usable(self) -> bool:
        """Always."""
        return True
