"""Every kernel that tuning may try, compiled before the GPU benchmark by all cores at once, into Triton's cache on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import nn

from lcnn_compile.bench.gpu.cases import CHECKED_BATCH, FORMATS, Job, Layer, Sizes
from lcnn_compile.bench.gpu.layers import lookup_of
from lcnn_compile.bench.gpu.machine import set_mode
from lcnn_compile.bench.gpu.networks import wide
from lcnn_compile.bench.networks import build, example_input
from lcnn_compile.kernels.arguments import Epilogue, Geometry
from lcnn_compile.kernels.reference import output_format


class Call(NamedTuple):
    """One lookup layer on one kind of input."""

    layer: Layer
    sizes: Sizes
    mode: str
    format: str
    batch: int
    checked: bool = False


def calls(jobs: Iterable[Job]) -> Iterator[Call]:
    """The calls of these jobs: those that are tuned, and those that are checked, which are not, but backward too."""
    for job in jobs:
        given = job.arguments
        if job.kind == "check":
            for format in FORMATS:
                yield Call(given["layer"], given["sizes"], given["mode"], format, CHECKED_BATCH, True)
        elif job.kind == "layer":
            for sizes in given["settings"]:
                yield Call(given["layer"], sizes, given["mode"], given["format"], given["batch"])
        elif job.kind == "network":
            for layer in wide_layers(given["network"]):
                for sizes in given["settings"]:
                    yield Call(layer, sizes, given["mode"], "channels_last", given["batch"])


def wide_layers(network: str) -> list[Layer]:
    """The shapes of a network's wide layers, each once."""
    model = build(network).to("meta")
    found: dict[Layer, None] = {}

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        found[Layer(module.in_channels, module.out_channels, int(args[0].shape[2]), module.stride[0])] = None

    for module in model.modules():
        if wide(module):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(example_input(1).to("meta"))
    return list(found)


@lru_cache(maxsize=64)
def _launches(call: Call) -> list[Callable[[], object]]:
    from lcnn_compile.kernels.triton import backward as triton_backward  # needs Triton
    from lcnn_compile.kernels.triton import tune as triton_tune
    from lcnn_compile.kernels.triton.pack import pack, sizes_of

    dtype = set_mode(call.mode)
    module = lookup_of(call.layer, call.sizes, "cpu", dtype)
    form = pack(module.lookup_weight().operands(), 3)
    x = torch.empty(call.layer.shape(call.batch), dtype=dtype, device="meta").contiguous(memory_format=FORMATS[call.format])
    side = -(-call.layer.side // call.layer.stride)
    shape = (call.batch, call.layer.filters, side, side)
    y = torch.empty(shape, dtype=dtype, device="meta", memory_format=output_format(x))
    stride = (call.layer.stride, call.layer.stride)
    where = sizes_of(x.shape[2:], Geometry(y.shape[1], (3, 3), stride, (1, 1, 1, 1), (1, 1)), dtype.itemsize)
    epilogue = Epilogue(module.bias)
    launches = triton_tune.candidates(x, y, form, 1, epilogue, where)
    if not call.checked:
        return launches
    dictionary = triton_tune.dictionary_configs(module.dictionary_size, dtype.itemsize)[0]
    return [launches[0], partial(triton_backward.coefficient_gradient, y, x, form, 1, where, dictionary)]


def compile_one(call: Call, number: int, capability: int) -> None:
    """Compile the kernels of launch ``number`` of a call."""
    from lcnn_compile.kernels.triton.ahead import compiling  # needs Triton

    torch.set_num_threads(1)
    set_mode(call.mode)
    with compiling(capability):
        _launches(call)[number]()


def distinct(jobs: Iterable[Job], capability: int) -> list[tuple[Call, int]]:
    """Launches that together have every kernel of these jobs, in the order in which they are needed."""
    from lcnn_compile.kernels.triton.ahead import kernels_of  # needs Triton

    found: list[tuple[Call, int]] = []
    seen: set[str] = set()
    for call in dict.fromkeys(calls(jobs)):
        set_mode(call.mode)
        for number, launch in enumerate(_launches(call)):
            kernels = kernels_of(launch, capability)
            if kernels - seen:
                found.append((call, number))
                seen |= kernels
    return found


def compile_ahead(
    jobs: Sequence[Job], capability: tuple[int, int], seconds: float, workers: int | None = None
) -> tuple[int, list[str]]:
    """Compile the kernels that these jobs may try within ``seconds``; how many launches were, and what failed.

    What is not ready in time is compiled where it is needed.
    """
    start, done = time.monotonic(), 0
    failures: list[str] = []
    target = capability[0] * 10 + capability[1]
    tasks = distinct(jobs, target)
    workers = workers or max(1, (os.cpu_count() or 2) - 1)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    pending = [pool.submit(compile_one, *task, target) for task in tasks]
    processes = list((pool._processes or {}).values())
    try:
        for future in as_completed(pending, timeout=seconds):
            error = future.exception()
            done += error is None
            if error is not None:
                failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    except TimeoutError:
        failures.append(f"not all compiled within {seconds:.0f} s")
        for process in processes:
            process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled {done} of {len(tasks)} launches in {time.monotonic() - start:.0f} s by {workers} processes", flush=True)
    for failure in failures[:3]:
        print(f"  not compiled: {failure}", flush=True)
    return done, failures
