"""Running a graph so that nobody notices: on copies of what it was called with, with that call's modes and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lcnn_compile.conversion.untouched import random_state
from lcnn_compile.torch_private import autocast_depth, storage_of

Restore = Callable[[], None]


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Without gradients, and with version counters on every tensor made, also where the caller is in inference mode."""
    # In this order: leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@contextmanager
def same_modes() -> Iterator[None]:
    """Autocast and gradient mode are afterwards as before, also where a graph that switches them was left half-way."""
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _devices()]
    depth, cached, grad = autocast_depth(), torch.is_autocast_cache_enabled(), torch.is_grad_enabled()
    try:
        yield
    finally:
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        for _ in range(autocast_depth() - depth):
            torch.autocast_decrement_nesting()
        torch.set_autocast_cache_enabled(cached)
        torch.set_grad_enabled(grad)


@contextmanager
def without_effects() -> Iterator[None]:
    """Plain tensors, no autocast, and random numbers and modes that are afterwards as before."""
    restore = random_state()
    try:
        with same_modes(), plain_tensors(), ExitStack() as stack:
            for device in _devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        restore()


def copies(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values whose tensors are copies: of the same sizes and strides, and in one memory where the originals are."""
    storages = [storage_of(value) if isinstance(value, Tensor) else None for value in values]
    shared = {s for s in storages if s is not None and storages.count(s) > 1}
    made: dict[int, Any] = {}

    def copy(value: Any, storage: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if storage is None or storage not in shared:
            clone = value.clone()
            if storage is None or clone.stride() == value.stride() or value.is_conj() or value.is_neg():
                return clone
        if storage not in made:
            made[storage] = value.untyped_storage().clone()
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(made[storage], value.storage_offset(), value.shape, value.stride())

    with plain_tensors():
        return tuple(copy(value, storage) for value, storage in zip(values, storages, strict=True))


@dataclass(frozen=True, eq=False)
class Recorded:
    """One call of a graph: copies of its inputs, and the modes and random numbers that it found.

    It is no sequence, so that nothing takes a part of it for a batch: graphs have sizes in them.
    """

    inputs: tuple[Any, ...]
    restore: Restore
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    def run(self, function: Callable[..., Any]) -> Any:
        """What ``function`` returns for the call's inputs, of which it gets copies."""
        with same_modes(), ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            self.restore()
            return function(*copies(self.inputs))


def record(inputs: Sequence[Any]) -> Recorded:
    """The call that is about to be made with ``inputs``."""
    autocast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _devices())
    return Recorded(copies(inputs), random_state(), autocast)


def replaying(gm: fx.GraphModule) -> fx.GraphModule:
    """The same module, which from now on takes a :class:`Recorded` call for its only input."""
    # On the instance: the class gets a new ``forward`` whenever the graph is compiled anew.
    object.__setattr__(gm, "forward", lambda call: call.run(lambda *inputs: type(gm).forward(gm, *inputs)))
    return gm
