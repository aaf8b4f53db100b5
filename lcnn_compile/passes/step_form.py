"""The form in which a node becomes steps of a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, fx

from lcnn_compile.kernels.cpu.step import Step
from lcnn_compile.passes.signatures import operation_of
from lcnn_compile.passes.targets import WRITTEN, example, same_shape, shape_of

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


class Operation(NamedTuple):
    """A call of an operation that works on each image by itself.

    Attributes:
        name: as in the tables of :mod:`lcnn_compile.passes.signatures`.
        given: its arguments.
        x: the node whose value it takes.
        shape: that value's shape.
        out: the shape of what it makes, of as many images.
    """

    name: str
    given: dict[str, Any]
    x: fx.Node
    shape: tuple[Any, ...]
    out: tuple[Any, ...]


def operation_on_images(node: fx.Node) -> Operation | None:
    """The operation that a node calls on a value of a program; None where it is not known, or the shapes are not."""
    found = operation_of(node)
    x = None if found is None else found[1].get("input")
    shape, out = shape_of(x) if is_value(x) else None, shape_of(node)
    if found is None or not is_value(x) or not shape or not out or not same_shape(shape[:1], out[:1]):
        return None
    return Operation(*found, x, shape, out)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of the kind that programs work on."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.layout == torch.strided


def is_value(node: object) -> TypeGuard[fx.Node]:
    """Whether an argument is a node whose value a program can read or make; constants that nobody writes are none."""
    if not isinstance(node, fx.Node) or (node.op == "get_attr" and not node.meta.get(WRITTEN, False)):
        return False
    found = example(node)
    return found is not None and is_plain(found)
