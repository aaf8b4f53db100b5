"""Several calls in a row, and everything that they leave behind: outputs, inputs, state, random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lcnn_compile.testing.source import Call
from lcnn_compile.torch_private import module_of, pytree

NOISE = 1e-6
"""Relative to the largest value: some units of rounding of float32, of a convolution summed in another order."""
_LAYERS = (
    torch.nn.functional.linear, torch.nn.functional.batch_norm, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d, torch.batch_norm,
)  # fmt: skip


@dataclass
class Record:
    """What calls left behind.

    Attributes:
        tensors: by a name that says what and when.
        layouts: which of them share memory after the last call, and what else must be equal.
        random: the state of the random number generator in the end.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, Any] = field(default_factory=dict)
    random: Tensor = field(default_factory=lambda: torch.empty(0))


class _Noise(TorchFunctionMode):
    """Rounding errors on the results of layers, from a generator of their own."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _LAYERS and isinstance(result, Tensor) and result.numel() and result.is_floating_point():
            noise = torch.randn(result.shape, generator=self._generator) * (NOISE * float(result.detach().abs().max()))
            return result + noise.to(result.dtype)
        return result


def own_copy(call: Call) -> Call:
    """Arguments with memory of their own, in which views of one tensor are views of one tensor again."""
    return copy.deepcopy(call)


def record(run: Callable[..., Any], calls: Sequence[Call], state: Any = None, seed: int = 0) -> Record:
    """Call ``run`` with copies of ``calls``, one after the other, without gradients.

    Args:
        run: a module or any callable.
        calls: the arguments.
        state: the module whose parameters and buffers are looked at; by default ``run`` itself, where it is one.
        seed: PyTorch's random numbers start with it; the state before is put back.
    """
    found, module = Record(), module_of(run) if state is None else state
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, call in enumerate(map(own_copy, calls)):
            output = run(*call.args, **call.kwargs)
            leaves = {"output": output, "input": (call.args, call.kwargs)}
            held = {}
            for what, tree in leaves.items():
                for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
                    name = f"{what} {pytree.keystr(path)} of call {number}"
                    if isinstance(leaf, Tensor):
                        held[name] = leaf
                    else:
                        found.layouts[name] = leaf
            found.layouts[f"structure of call {number}"] = str(pytree.tree_structure(output))
            state_now = dict(_state(module))
            for name, tensor in {**held, **state_now}.items():
                found.tensors[name if name in held else f"{name} after call {number}"] = tensor.detach().clone()
            for name, tensor in held.items():
                if name.startswith("output"):
                    strides = [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
                    found.layouts[f"memory of {name}, strides"] = strides if tensor.numel() else []
                    shared = sorted(other for other, t in {**held, **state_now}.items() if other != name and _shares(t, tensor))
                    found.layouts[f"memory of {name}"] = shared
        found.random = torch.get_rng_state()
    return found


def _state(module: Any) -> list[tuple[str, Tensor]]:
    if not isinstance(module, nn.Module):
        return []
    return [
        (f"{name} ({kind})", t)
        for kind, named in (("parameter", module.named_parameters), ("buffer", module.named_buffers))
        for name, t in named()
    ]


def _shares(a: Tensor, b: Tensor) -> bool:
    return bool(a.numel() and b.numel() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())


def spread(model: nn.Module, calls: Sequence[Call], own: Record, seed: int = 0, draws: int = 3) -> dict[str, float]:
    """How far rounding errors of layers move each tensor of ``own``, the record of ``model``."""
    found = dict.fromkeys(own.tensors, 0.0)
    for draw in range(draws):
        with _Noise(draw):
            noisy = record(copy.deepcopy(model), calls, seed=seed)
        for name, tensor in own.tensors.items():
            found[name] = max(found[name], _distance(noisy.tensors[name], tensor))
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.numel():
        return 0.0
    return float((a.double() - b.double()).abs().nan_to_num(float("inf")).max())


def differences(found: Record, own: Record, allowed: dict[str, float], *, random: bool = True, memory: bool = True) -> list[str]:
    """What ``found`` has otherwise than ``own``, in words.

    Args:
        found: the record of what is tested; state that it does not have is not compared.
        own: the record of the original.
        allowed: the spread of each tensor.
        random: whether the random state must be equal.
        memory: whether outputs must have the strides of the original's and share memory with what those do.
    """
    texts = []
    for name, tensor in own.tensors.items():
        result = found.tensors.get(name)
        if result is None:
            if name.startswith(("output", "input")):
                texts.append(f"{name} is missing")
            continue
        if (result.shape, result.dtype) != (tensor.shape, tensor.dtype):
            if name.startswith(("output", "input")) or result.dtype != tensor.dtype:
                texts.append(f"{name} is {result.dtype} {tuple(result.shape)}, not {tensor.dtype} {tuple(tensor.shape)}")
            continue
        largest = float(tensor.double().abs().max()) if tensor.numel() else 0.0
        limit = 16 * allowed[name] + (1e-5 * max(1.0, largest) if tensor.is_floating_point() else 0.0)
        if not (distance := _distance(result, tensor)) <= limit:
            texts.append(f"{name} is off by {distance:.3g} where {limit:.3g} is allowed")
    for name, value in own.layouts.items():
        if name.startswith("memory of") and not memory:
            continue
        other: Any = found.layouts.get(name)
        if name.startswith("memory of") and not name.endswith(", strides"):
            known = {o.split(" after ")[0] for o in found.tensors}
            value = [v for v in value if v in known or v.startswith(("output", "input"))]
            other = [
                v for v in other or [] if v in {o.split(" after ")[0] for o in own.tensors} or v.startswith(("output", "input"))
            ]
        if other != value:
            texts.append(f"{name} is {other}, not {value}")
    if random and not torch.equal(found.random, own.random):
        texts.append("other random numbers were consumed")
    return texts


def assert_same_calls(
    model: nn.Module,
    compiled: Any,
    calls: Sequence[Call | tuple[Any, ...]],
    *,
    state: Any = None,
    seed: int = 0,
    random: bool = True,
    memory: bool = True,
) -> None:
    """Assert that ``compiled`` does what ``model`` does in calls in a row: outputs, what becomes of inputs, parameters and buffers.

    Allowed is what the original's values move when the results of its layers have rounding errors, times 16.

    Args:
        model: the original; it is not changed.
        compiled: what stands for it. Parameters and buffers are compared where it has any of the same name.
        calls: arguments of the calls: :class:`Call` or tuples of positional ones. They are copied.
        state: the module whose parameters and buffers count; by default the one in ``compiled``.
        seed: of PyTorch's random numbers.
        random: whether the state of PyTorch's random numbers must be the same in the end.
        memory: whether outputs must have the original's strides and share memory with the inputs, outputs and buffers that its do.

    Raises:
        AssertionError: it lists what is different.
    """
    given = [call if isinstance(call, Call) else Call(call, {}) for call in calls]
    own = record(copy.deepcopy(model), given, seed=seed)
    allowed = spread(model, given, own, seed)
    texts = differences(record(compiled, given, state, seed), own, allowed, random=random, memory=memory)
    if texts:
        raise AssertionError("; ".join(texts))
