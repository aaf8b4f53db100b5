"""The steps of a program: what is computed from which value, without weights or addresses.

Values are numbered: a program's inputs come first, then each step's result. A program's text form fixes the shapes of its
outputs for any inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.reference import output_size

Shape = tuple[Any, ...]
"""Sizes, ints or symbolic ones."""


@dataclass(frozen=True)
class Window:
    """What is pooled: the maximum or mean over windows, of whole planes without a kernel size.

    With ``lanes``, so many images lie side by side in each pixel.
    """

    mean: bool
    kernel_size: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    lanes: int = 1

    def shape(self, x: Shape) -> Shape:
        """[N, C, H', W'] from [N, C, H, W]."""
        if len(x) != 4:
            raise KernelError(f"a program's pooling got an input of shape {tuple(x)}; [N, C, H, W] is required")
        if self.kernel_size is None:
            high, wide = (min(1, v) if isinstance(v, int) else 1 for v in x[2:])
        else:
            high, wide = self.places((x[2], x[3] if self.lanes == 1 else x[3] // self.lanes))
        if high < 1 or wide < 1:
            raise KernelError(f"a program's pooling over {self.kernel_size} does not fit its input of shape {tuple(x)}")
        return (*x[:2], high, wide if self.lanes == 1 else wide * self.lanes)

    def places(self, size: Shape) -> Shape:
        """(H', W'), the windows inside of a padded image of ``size`` (H, W); none, or fewer, where it is smaller than a window."""
        assert self.kernel_size is not None
        top, left = self.padding
        return output_size(size, self.kernel_size, self.stride, (top, top, left, left), (1, 1))


@dataclass(frozen=True)
class LookUp:
    """A lookup convolution of value ``x`` [N, C, H, W] with the epilogue of the operator; ``residual`` is a value or None.

    ``pool`` is done with the output before it is written; then there is no residual.
    """

    x: int
    residual: int | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    activation: str = "none"
    residual_last: bool = False
    pool: Window | None = None

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, n, H', W']."""
        shape = self.convolved(shapes)
        return shape if self.pool is None else self.pool.shape(shape)

    def convolved(self, shapes: Sequence[Shape]) -> Shape:
        """[N, n, H', W'] before pooling."""
        x = shapes[self.x]
        if len(x) != 4 or x[1] != self.in_channels:
            raise KernelError(f"a program's lookup convolution got an input of shape {tuple(x)}; [N, {self.in_channels}, H, W]")
        high, wide = output_size(x[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        shape = (x[0], self.out_channels, high, wide)
        if high < 1 or wide < 1:
            raise KernelError(f"a program's {self.kernel_size} kernel does not fit its input of shape {tuple(x)}")
        if self.residual is not None and tuple(shapes[self.residual]) != shape:
            raise KernelError(f"a program's residual has shape {tuple(shapes[self.residual])}; the output has {shape}")
        return shape


@dataclass(frozen=True)
class Pool:
    """The maximum or mean over windows of ``x`` [N, C, H, W]."""

    x: int
    window: Window

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, C, H', W']."""
        return self.window.shape(shapes[self.x])


@dataclass(frozen=True)
class Linear:
    """A dense linear layer of ``x`` [N, m]."""

    x: int
    in_features: int
    out_features: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, n]."""
        x = shapes[self.x]
        if len(x) != 2 or x[1] != self.in_features:
            raise KernelError(f"a program's linear layer got an input of shape {tuple(x)}; [N, {self.in_features}] is required")
        return (x[0], self.out_features)


@dataclass(frozen=True)
class View:
    """``x`` with other dimensions behind the first."""

    x: int
    tail: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *tail]."""
        x = shapes[self.x]
        if all(isinstance(v, int) for v in x[1:]) and math.prod(x[1:]) != math.prod(self.tail):
            raise KernelError(f"a program's view of {self.tail} does not fit its input of shape {tuple(x)}")
        return (x[0], *self.tail)


@dataclass(frozen=True)
class Turn:
    """``x`` with its images side by side (``inside``), in the last dimension, which is ``images`` times as long; or back."""

    x: int
    images: int
    inside: bool

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[1, ..., W · images] from [images, ..., W], or back."""
        x = shapes[self.x]
        if self.inside:
            return (1, *x[1:-1], x[-1] * self.images)
        return (self.images, *x[1:-1], x[-1] // self.images)


Step = LookUp | Pool | Linear | View | Turn
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (LookUp, Pool, Linear, View)}
"""By name in the text form; a turn has none, it is made for a batch."""


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
            read = [(number, value) for number, step in enumerate(made) for value in (step.x, getattr(step, "residual", None))]
            read += [(len(made), value) for value in outputs]
            if not all(value is None or 0 <= value < inputs + number for number, value in read):
                raise ValueError("it reads a value that nothing has made before")
            return Recipe(inputs, tuple(made), tuple(outputs))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise KernelError(f"{text[:80]!r} is no recipe of a program: {error}") from error


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Window(**{key: _value(entry) for key, entry in value.items()})
    return tuple(value) if isinstance(value, list) else value


def pooled(recipe: Recipe, shapes: Sequence[Shape], least: int) -> Recipe:
    """The same with poolings done by the lookup convolutions before them, where nothing else reads these.

    Only outputs of ``least`` elements are worth it: smaller ones wait in a cache, and bands of a few rows form S twice.
    """
    uses: dict[int, int] = dict.fromkeys(recipe.outputs, 1)
    for step in recipe.steps:
        residual = step.residual if isinstance(step, LookUp) else None
        for value in (step.x, *([] if residual is None else [residual])):
            uses[value] = uses.get(value, 0) + 1
    place = {value: value for value in range(recipe.inputs)}
    steps: list[Step] = []
    for number, step in enumerate(recipe.steps):
        before = steps[place[step.x] - recipe.inputs] if place[step.x] >= recipe.inputs else None
        large = isinstance(step, Pool) and uses[step.x] == 1 and math.prod(shapes[step.x]) >= least
        if large and isinstance(before, LookUp) and before.pool is None and before.residual is None:
            steps[place[step.x] - recipe.inputs] = replace(before, pool=cast(Pool, step).window)
            place[recipe.inputs + number] = place[step.x]
            continue
        step = replace(step, x=place[step.x])
        if isinstance(step, LookUp) and step.residual is not None:
            step = replace(step, residual=place[step.residual])
        steps.append(step)
        place[recipe.inputs + number] = recipe.inputs + len(steps) - 1
    return Recipe(recipe.inputs, tuple(steps), tuple(place[value] for value in recipe.outputs))
