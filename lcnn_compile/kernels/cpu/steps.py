"""The steps of a program: what is computed from which value, without weights or addresses.

Values are numbered: a program's inputs come first, then each step's result. A program's text form fixes the shapes of its
outputs for any inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.byte_steps import ByteLookUp, ByteMap, ByteMean, BytePool, Cast
from lcnn_compile.kernels.cpu.convolutions import Depthwise, Linear, LookUp
from lcnn_compile.kernels.cpu.elementwise import Map
from lcnn_compile.kernels.cpu.moves import Concat, Copy, Expand, Permute, Slice, Turn, View
from lcnn_compile.kernels.cpu.reductions import Normalize, Reduce, Softmax
from lcnn_compile.kernels.cpu.resampling import Pad, Resize
from lcnn_compile.kernels.cpu.step import Shape, Step
from lcnn_compile.kernels.cpu.windows import Pool, Window

__all__ = [
    "ByteLookUp",
    "ByteMap",
    "ByteMean",
    "BytePool",
    "Cast",
    "Concat",
    "Copy",
    "Depthwise",
    "Expand",
    "Linear",
    "LookUp",
    "Map",
    "Normalize",
    "Pad",
    "Permute",
    "Pool",
    "Recipe",
    "Reduce",
    "Resize",
    "Shape",
    "Slice",
    "Softmax",
    "Step",
    "Turn",
    "View",
    "Window",
    "pooled",
]


def _kinds(kind: type[Step]) -> list[type[Step]]:
    own = [kind] if kind.native is not Step.native else []
    return [*own, *(found for one in kind.__subclasses__() for found in _kinds(one))]


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in _kinds(Step) if kind is not Turn}
"""By name in the text form: all that this file imports, so that none is forgotten; a turn has none, it is made for a batch."""


@dataclass(frozen=True)
class Recipe:
    """The steps of a program with the number of its inputs and the values it returns."""

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        """The shapes of all values for inputs of these shapes.

        Raises:
            KernelError: they do not fit.
        """
        if len(inputs) != self.inputs:
            raise KernelError(f"a program got {len(inputs)} inputs; it takes {self.inputs}")
        shapes = [tuple(shape) for shape in inputs]
        for step in self.steps:
            shapes.append(step.shape(shapes))
        return shapes

    def elements(self) -> list[str]:
        """The type of each value's elements, a key of ``step.BYTES``; inputs are float32."""
        elements = ["float32"] * self.inputs
        for step in self.steps:
            elements.append(step.element(elements))
        return elements

    def to_json(self) -> str:
        """As text; equal for equal recipes."""
        steps = [[type(step).__name__, asdict(step)] for step in self.steps]
        return json.dumps([self.inputs, steps, self.outputs])

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe of a text made by ``to_json``.

        Raises:
            KernelError: for any other text.
        """
        try:
            inputs, steps, outputs = json.loads(text)
            made = [_KINDS[kind](**{key: _value(value) for key, value in fields.items()}) for kind, fields in steps]
            read = [(number, value) for number, step in enumerate(made) for value in step.reads]
            read += [(len(made), value) for value in outputs]
            if not all(0 <= value < inputs + number for number, value in read):
                raise ValueError("it reads a value that nothing has made before")
            return Recipe(inputs, tuple(made), tuple(outputs))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, KernelError) as error:
            raise KernelError(f"{text[:80]!r} is no recipe of a program: {error}") from error


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Window(**{key: _value(entry) for key, entry in value.items()})
    return tuple(_value(entry) for entry in value) if isinstance(value, list) else value


def pooled(recipe: Recipe, shapes: Sequence[Shape], least: int) -> Recipe:
    """The same with poolings done by the lookup convolutions before them, where nothing else reads these.

    Only outputs of ``least`` elements are worth it: smaller ones wait in a cache, and bands of a few rows form S twice.
    """
    uses: dict[int, int] = dict.fromkeys(recipe.outputs, 1)
    for step in recipe.steps:
        for value in step.reads:
            uses[value] = uses.get(value, 0) + 1
    place = {value: value for value in range(recipe.inputs)}
    steps: list[Step] = []
    for number, step in enumerate(recipe.steps):
        if type(step) is Pool and step.window.plain and uses[step.x] == 1 and math.prod(shapes[step.x]) >= least:
            before = steps[place[step.x] - recipe.inputs] if place[step.x] >= recipe.inputs else None
            if type(before) is LookUp and before.pool is None and before.residual is None:
                steps[place[step.x] - recipe.inputs] = replace(before, pool=step.window)
                place[recipe.inputs + number] = place[step.x]
                continue
        steps.append(step.renumbered(place))
        place[recipe.inputs + number] = recipe.inputs + len(steps) - 1
    return Recipe(recipe.inputs, tuple(steps), tuple(place[value] for value in recipe.outputs))
