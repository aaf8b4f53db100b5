"""The form in which a node becomes steps of a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, fx

from lcnn_compile.kernels.cpu.step import Step
from lcnn_compile.passes.targets import WRITTEN, example

Values = Sequence[int]


class Emit(Protocol):
    """Adds a step with its weights to a program; returns the number of the value that it makes."""

    def __call__(self, step: Step, *weights: Any) -> int:
        """Add it."""
        ...


@dataclass(frozen=True)
class Form:
    """How a program computes a node's value.

    Attributes:
        inputs: the nodes whose values it reads.
        build: emits the steps for those values; returns the last one's value.
        view: whether the value is the first input's, of another shape.
        alias: whether PyTorch's value lies in the first input's memory.
    """

    inputs: tuple[fx.Node, ...]
    build: Callable[[Emit, Values], int]
    view: bool = False
    alias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "alias", self.alias or self.view)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of the kind that programs work on."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.layout == torch.strided


def is_value(node: object) -> TypeGuard[fx.Node]:
    """Whether an argument is a node whose value a program can read or make; constants that nobody writes are none."""
    if not isinstance(node, fx.Node) or (node.op == "get_attr" and not node.meta.get(WRITTEN, False)):
        return False
    found = example(node)
    return found is not None and is_plain(found)
