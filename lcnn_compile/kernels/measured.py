"""The lowerings of a CPU layer by measurement: a layer of the same sizes with random values, timed in turns."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lcnn_compile.files import digest
from lcnn_compile.kernels.arguments import Arguments, Geometry, Weight, flat
from lcnn_compile.kernels.cpu.forward import packed_weight
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import LookUp, Recipe
from lcnn_compile.kernels.problem import Problem, estimate, estimated_seconds
from lcnn_compile.kernels.reference import filter_table
from lcnn_compile.kernels.store import cache_folder, known, remember
from lcnn_compile.torch_private import without_modes

ROUNDS, WARM_UP, TIMED = 3, 1, 3
HOPELESS = 4.0
"""A lowering whose estimate is so many times the cheapest one's is not worth measuring."""


@cache
def facts_file() -> Path:
    """The file of what was measured on this processor, with this torch and version of the kernels."""
    sources = sorted(
        [
            *(p for p in (Path(__file__).parent / "cpu").rglob("*") if p.suffix in (".py", ".h", ".cpp")),
            *Path(__file__).parent.glob("problem.py"),
        ]
    )
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(line for line in lines if line.startswith(("model", "flags", "Features")))[:10_000]
    except OSError:
        processor = platform.processor()
    texts = (processor, platform.machine(), torch.__version__, torch.backends.cpu.get_cpu_capability())
    return cache_folder() / "lowerings" / f"cpu-{digest(texts, [source for source in sources if source.is_file()])}.json"


def _key(problem: Problem) -> str:
    return f"{problem} threads={torch.get_num_threads()} isa={os.environ.get('LCNN_CPU_ISA', '')} pairs={os.environ.get('LCNN_CPU_BFLOAT16', '')}"


def remembered(problem: Problem) -> dict[str, float] | None:
    """Seconds of the lowerings that were measured for this problem on this machine; None if they were not."""
    return known(facts_file()).get(_key(problem))


def random_call(problem: Problem, device: torch.device | None = None) -> Arguments:
    """Arguments of the operator for a random layer of this problem; on a GPU half precision is channels_last."""
    device = device or torch.device("cpu")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=problem.dtype)

    area = problem.kernel_size[0] * problem.kernel_size[1]
    filters = filter_table(problem.out_channels, problem.group_size, problem.groups).to(device)
    count, width = filters.shape
    taps = -(-problem.taps // (count * width))
    columns = torch.randint(problem.dictionary_size * area, (count * taps,), device=device, dtype=torch.int32)
    last = device.type == "cuda" and problem.dtype != torch.float32
    x = random(problem.batch, problem.in_channels, *problem.size)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    dictionary = random(problem.groups, problem.dictionary_size, problem.in_channels // problem.groups)
    coefficients = random(count * taps, width) * (filters >= 0).repeat_interleave(taps, 0)
    offsets = torch.arange(count + 1, device=device, dtype=torch.int32) * taps
    weight = Weight(dictionary, coefficients, columns // area, columns % area, offsets, filters)
    return Arguments(
        x, weight, Geometry(problem.out_channels, problem.kernel_size, problem.stride, problem.padding, problem.dilation)
    )


def _caller(call: Arguments, lowering: str, precision: str) -> Callable[[], object]:
    """What runs a layer as a compiled graph does: lookups in a program, the others as operators."""
    x, weight, geometry = call[:3]
    if lowering == "lookup":
        step = LookUp(0, None, x.shape[1], *geometry)
        program = Program(Recipe(1, (step,), (1,)), [(packed_weight(weight, geometry.kernel_size, precision), None)])
        return lambda: program(x)
    arguments = flat(call._replace(lowering=lowering))
    return lambda: torch.ops.lcnn.lookup_conv2d_inference(*arguments)


def _burst(call: Callable[[], object]) -> float:
    seconds = []
    for number in range(WARM_UP + TIMED):
        start = time.perf_counter()
        call()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(problem: Problem, lookup_kernel: bool) -> dict[str, float]:
    """Seconds of every lowering that may win, kept on disk; those the estimate rules out are left out.

    LCNN_TUNE=0 turns measuring off; the estimates take its place then.
    """
    costs = estimate(problem, lookup_kernel)
    least = min(costs.values())
    # Dense is what a user has: it is never ruled out by a guess.
    names = [name for name, cost in costs.items() if cost <= HOPELESS * least or name == "dense"]
    if os.environ.get("LCNN_TUNE") == "0":
        return estimated_seconds(problem, lookup_kernel)
    found = remembered(problem)
    if found is None:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), without_modes():
            call = random_call(problem)
            callers = {name: _caller(call, name, problem.precision) for name in names}
            bursts = [{name: _burst(call) for name, call in callers.items()} for _ in range(ROUNDS)]
        found = {name: min(burst[name] for burst in bursts) for name in names}
        remember(facts_file(), _key(problem), found)
    return found
