"""Per-weight work that must not be repeated at every call: validation and packing, cached until a tensor changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lcnn_compile.torch_private import version

T = TypeVar("T")
_PLAIN = (Tensor, torch.nn.Parameter)


def _marks(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    """What differs once a tensor's values may differ: in-place updates count versions, ``.data =`` moves or reshapes."""
    return [(version(t), t.data_ptr(), t.shape, t.stride()) for t in tensors]


class Prepared(Generic[T]):
    """Cache of ``build(*tensors, *extra)`` for as long as the tensors live and do not change.

    In-place updates, ``load_state_dict``, ``.data =`` and new parameters are all noticed. Inference tensors have no
    version counter, and fake tensors no memory, so nothing is cached for them. Thread-safe.
    """

    def __init__(self, build: Callable[..., T]):
        self._build = build
        self._entries: dict[tuple[Any, ...], tuple[list[Any], list[tuple[Any, ...]], T]] = {}
        self._lock = threading.Lock()

    def __call__(self, tensors: tuple[Tensor, ...], *extra: object) -> T:
        """``build(*tensors, *extra)``, from the cache where nothing has changed; ``extra`` must be hashable."""
        for t in tensors:
            if type(t) not in _PLAIN or t.is_inference():
                return self._build(*tensors, *extra)
        key = (*map(id, tensors), *extra)
        marks = _marks(tensors)
        entry = self._entries.get(key)
        if entry is not None and entry[1] == marks:
            # A dead tensor's id may belong to another one by now; its reference then gives None. A plain loop: this runs at every call.
            for ref, t in zip(entry[0], tensors, strict=True):
                if ref() is not t:
                    break
            else:
                return entry[2]
        # A value made of inference tensors could not be cached against in its turn.
        with torch.inference_mode(False), torch.no_grad():
            value = self._build(*tensors, *extra)
        entries = self._entries

        def forget(_: object) -> None:
            entries.pop(key, None)

        with self._lock:
            entries[key] = ([weakref.ref(t, forget) for t in tensors], marks, value)
        return value
