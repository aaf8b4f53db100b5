"""Per-weight work that must not be repeated at every call: validation and packing, cached until a tensor changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
_PLAIN = (Tensor, torch.nn.Parameter)


class _Entry(Generic[T]):
    """A prepared value with what is needed to see that the tensors it was made from are still the same."""

    __slots__ = ("storages", "value", "versions")

    def __init__(self, tensors: tuple[Tensor, ...], versions: tuple[int, ...], value: T):
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        self.versions = versions
        self.value = value

    def alive(self) -> bool:
        """False once a storage is freed: its address may then belong to another tensor."""
        return not any(storage.expired() for storage in self.storages)


class Prepared(Generic[T]):
    """Cache of ``build(*tensors)``, keyed by where the tensors lie and by their version counters.

    In-place updates, ``load_state_dict``, ``.data =`` and new parameters are all noticed. Inference tensors have no
    version counter, and fake tensors no memory, so nothing is cached for them. Thread-safe; values of dead tensors are dropped.
    """

    def __init__(self, build: Callable[..., T]):
        self._build = build
        self._entries: dict[tuple[Any, ...], _Entry[T]] = {}
        self._lock = threading.Lock()
        self._sweep_at = 64

    def __call__(self, tensors: tuple[Tensor, ...], *extra: object) -> T:
        """``build(*tensors, *extra)``, from the cache where nothing has changed; ``extra`` must be hashable."""
        for t in tensors:
            if t.is_inference() or type(t) not in _PLAIN:
                return self._build(*tensors, *extra)
        key = (*[(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors], *extra)
        versions = tuple([t._version for t in tensors])
        entry = self._entries.get(key)
        if entry is not None and entry.versions == versions and entry.alive():
            return entry.value
        with torch.no_grad():
            value = self._build(*tensors, *extra)
        with self._lock:
            if len(self._entries) >= self._sweep_at:
                self._entries = {k: e for k, e in self._entries.items() if e.alive()}
                self._sweep_at = max(64, 2 * len(self._entries))
            self._entries[key] = _Entry(tensors, versions, value)
        return value
