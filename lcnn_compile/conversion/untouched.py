"""Running a model without leaving a trace: what it writes while it is looked at is taken back."""

from __future__ import annotations

import collections
import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.torch_private import tensors_of

_CONTAINERS = (list, dict, set, collections.deque, collections.OrderedDict)
_MACHINERY = frozenset((*vars(nn.Module()), "forward"))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's parameters, buffers and plain attributes, and all random numbers, are as before.

    Tensors keep their identity. Lazy layers stay as their first run has made them. What a model changes inside of objects of
    its own is not seen.
    """
    restore = [_tensors(model), *map(_attributes, _python_modules(model)), random_state()]
    try:
        yield
    finally:
        for step in restore:
            step()


def _python_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that keep their attributes in Python."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def _tensors(model: nn.Module) -> Callable[[], None]:
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not nn.parameter.is_lazy(tensor) and type(tensor.data) is Tensor and _ordinary(tensor):
            saved[id(tensor)] = tensor, tensor.detach().clone()

    def restore() -> None:
        for tensor, before in saved.values():
            _put_back(tensor, before)

    return restore


def _ordinary(tensor: Tensor) -> bool:
    """Whether a tensor's values can be compared and written."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_inference())


def _put_back(tensor: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        if tensor.shape != before.shape or tensor.dtype != before.dtype:
            tensor.data = before
        elif not _same(tensor, before):
            tensor.copy_(before)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, not a number being the same as itself."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _attributes(module: nn.Module) -> Callable[[], None]:
    tensors: list[tuple[Any, dict[str, Any]]] = [(kept, dict(kept)) for kept in tensors_of(module)]
    lazy = any(nn.parameter.is_lazy(tensor) for kept, _ in tensors for tensor in kept.values())
    plain = {name: value for name, value in vars(module).items() if name not in _MACHINERY}
    contents = {name: copy.copy(value) for name, value in plain.items() if type(value) in _CONTAINERS}
    copies = {name: value.detach().clone() for name, value in plain.items() if type(value) is Tensor and _ordinary(value)}

    def restore() -> None:
        if lazy:
            return
        for kept, before in tensors:
            if kept.keys() != before.keys() or any(kept[name] is not before[name] for name in before):
                kept.clear()
                kept.update(before)
        now = vars(module)
        for name in [name for name in now if name not in _MACHINERY and name not in plain]:
            del now[name]
        now.update(plain)
        for name, value in contents.items():
            _refill(plain[name], value)
        for name, tensor in copies.items():
            _put_back(plain[name], tensor)

    return restore


def _refill(container: Any, before: Any) -> None:
    if type(container) in (list, collections.deque):
        same = len(container) == len(before) and all(a is b for a, b in zip(container, before, strict=True))
        if not same:
            container.clear()
            container.extend(before)
    elif isinstance(container, dict):
        if container.keys() != before.keys() or any(container[key] is not before[key] for key in before):
            container.clear()
            container.update(before)
    elif container != before:
        container.clear()
        container.update(before)


def random_state() -> Callable[[], None]:
    """What puts the random numbers of PyTorch (every device in use), Python and NumPy back to where they are now."""
    found: list[tuple[Callable[[Any], Any], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    found.append((random.setstate, random.getstate()))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append((numpy.random.set_state, numpy.random.get_state()))

    def restore() -> None:
        for put, state in found:
            put(state)

    return restore
