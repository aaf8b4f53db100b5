"""The lowerings of a CPU layer by measurement: a layer of the same sizes with random values, timed in turns."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.files import digest
from lcnn_compile.kernels.arguments import Arguments, Geometry, Weight, flat
from lcnn_compile.kernels.cpu.forward import PackedWeight
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import Depthwise, LookUp, Recipe, Step
from lcnn_compile.kernels.problem import Problem, estimate, estimated_seconds
from lcnn_compile.kernels.reference import filter_table
from lcnn_compile.kernels.store import cache_folder, known, remember
from lcnn_compile.timing import preemptions
from lcnn_compile.torch_private import without_modes

ROUNDS, WARM_UP, TIMED = 3, 1, 3
TRIES = 12
"""Calls of a burst that another process may disturb."""
GROUP = 8
"""Filters of a dense layer that share their taps in a program."""
LARGEST = 1 << 23
"""Elements of a dense layer's weight that a program is measured with."""
COPIES, WEIGHTS = 6, 1 << 22
"""Of a layer in the program that measures it: so many at most, and so many elements of weights in all, but two at least."""
HOPELESS = 4.0
"""A lowering whose estimate is so many times the cheapest one's is not worth measuring."""


@cache
def facts_file() -> Path:
    """The file of what was measured on this processor, with this torch and version of the kernels."""
    sources = sorted(
        [
            *(p for p in (Path(__file__).parent / "cpu").rglob("*") if p.suffix in (".py", ".h", ".cpp")),
            *Path(__file__).parent.glob("problem.py"),
            Path(__file__),  # how it is measured
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


def _caller(call: Arguments, lowering: str, precision: str) -> Callable[[], float]:
    """What runs a layer as a step of a program, or two, and tells the seconds that they take inside of it.

    The program has the layer several times, each with weights of its own: as in a network, the kernels' code is warm, and the
    weights have been pushed out of the near caches by those of other layers.
    """
    x, weight, geometry = call[:3]
    groups, size, per_group = weight.dictionary.shape
    kernel, channels = geometry.kernel_size, {"dense": per_group, "factored": size}.get(lowering, 0)
    elements = channels * max(groups * channels, geometry.out_channels * kernel[0] * kernel[1])
    if elements > LARGEST:
        return lambda: _operator(flat(call._replace(lowering=lowering)))
    if lowering == "lookup":
        elements = weight.dictionary.numel() + weight.coefficients.numel()
    copies = max(2, min(COPIES, WEIGHTS // elements))
    steps: list[Step] = []
    weights: list[tuple[Any, ...]] = []
    for _ in range(copies):
        if lowering == "lookup":
            steps.append(LookUp(0, None, x.shape[1], *geometry))
            weights.append((PackedWeight(weight, kernel, precision), None))
        elif lowering == "factored":
            inner = Geometry(groups * size, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
            steps.append(LookUp(0, None, x.shape[1], *inner))
            steps.append(LookUp(len(steps), None, groups * size, *geometry))
            weights += [(_dense(groups, per_group, inner), None), (_dense(groups, size, geometry), None)]
        elif per_group == 1 and groups > 1:
            steps.append(Depthwise(0, None, x.shape[1], *geometry))
            weights.append((torch.randn(geometry.out_channels, 1, *kernel), None))
        else:
            steps.append(LookUp(0, None, x.shape[1], *geometry))
            weights.append((_dense(groups, per_group, geometry), None))
    program = Program(Recipe(1, tuple(steps), (len(steps),)), weights)
    return lambda: program.seconds(x) / copies


def _operator(arguments: tuple[Any, ...]) -> float:
    """Seconds of a layer outside of programs, as one too large for them is run."""
    start = time.perf_counter()
    torch.ops.lcnn.lookup_conv2d_inference(*arguments)
    return time.perf_counter() - start


def _dense(groups: int, per_group: int, geometry: Geometry) -> PackedWeight:
    """A random dense layer as a program runs it: a lookup whose dictionary is the identity, and that has every tap."""
    area = geometry.kernel_size[0] * geometry.kernel_size[1]
    filters = filter_table(geometry.out_channels, GROUP, groups)
    count, width = filters.shape
    taps = per_group * area
    columns = torch.arange(taps, dtype=torch.int32).repeat(count)
    offsets = torch.arange(count + 1, dtype=torch.int32) * taps
    dictionary = torch.eye(per_group).expand(groups, per_group, per_group).contiguous()
    coefficients = torch.randn(count * taps, width) * (filters >= 0).repeat_interleave(taps, 0)
    weight = Weight(dictionary, coefficients, columns // area, columns % area, offsets, filters)
    return PackedWeight(weight, geometry.kernel_size)


def _burst(call: Callable[[], float]) -> float:
    """The least of TIMED calls in which no other process took the core away; of all, where there are none."""
    for _ in range(WARM_UP):
        call()
    calm: list[float] = []
    disturbed: list[float] = []
    while len(calm) < TIMED and len(disturbed) < TRIES:
        before = preemptions()
        seconds = call()
        (calm if preemptions() == before else disturbed).append(seconds)
    return min(calm or disturbed)


def measure(problem: Problem, lookup_kernel: bool) -> dict[str, float]:
    """Seconds of every lowering that may win, as steps of a program, kept on disk; those the estimate rules out are left out.

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
