"""Compile kernels for a GPU that is not there, or not yet asked: launches go to Triton's compiler and its cache on disk only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _Driver:
    """As much of a driver as compiling asks for; every compute capability is a device of its own."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Within, a launch compiles for this compute capability (90: Hopper) and appends the kernel to the list; nothing runs.

    Tensors may be on the CPU or meta device. Not for use beside threads that launch kernels.
    """
    kernels: list[Any] = []
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver = mock.patch.object(triton.runtime.driver, "_active", _Driver(capability))
    with driver, mock.patch.object(JITFunction, "run", launch):
        yield kernels


def kernels_of(launch: Callable[[], object], capability: int) -> set[str]:
    """What tells the kernels of a launch from all others, without compiling them."""
    found: set[str] = set()

    def note(*_: Any, key: str, fn: Any, **__: Any) -> bool:
        found.add(f"{fn.name} {key}")
        return True

    with compiling(capability), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        launch()
    return found
