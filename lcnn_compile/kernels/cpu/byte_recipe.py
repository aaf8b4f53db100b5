"""A recipe whose lookup convolutions have ranges, rewritten so that they take bytes, and hand bytes on wherever they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal

from torch import Tensor

from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.cpu.steps import ByteLookUp, BytePool, Cast, LookUp, Pool, Recipe, Step, View
from lcnn_compile.kernels.quantized import QuantizedLookup, Range
from lcnn_compile.kernels.rounding import quantize_lookup


@dataclass(frozen=True, eq=False)
class Unrounded:
    """The weight of a lookup convolution that is to be rounded to bytes.

    Attributes:
        tensors: dictionary, coefficients, indices, positions, offsets and filters.
        kernel_size: (kh, kw).
        x: the range of the input that it was calibrated for.
        vector_limits: [groups, k], of S.
    """

    tensors: tuple[Tensor, ...]
    kernel_size: tuple[int, int]
    x: Range
    vector_limits: Tensor


def in_bytes(recipe: Recipe, weights: Sequence[tuple[Any, ...]]) -> tuple[Recipe, list[tuple[Any, ...]]]:
    """The recipe and its weights with layers that are to be rounded in bytes.

    A value is bytes where some such layer reads it, or reads what maxima or views make of it; one that is nobody's input stays
    float32, and so does what the program returns. What both kinds read is kept as bytes, and widened for the others.
    """
    owners = [number for number, step in enumerate(recipe.steps) if step.weighted]
    given = dict(zip(owners, weights, strict=True))
    unrounded = {number: own[0] for number, own in given.items() if own and isinstance(own[0], Unrounded)}
    if not unrounded:
        return recipe, list(weights)
    wanted = _wanted_ranges(recipe, unrounded)
    writer = _Writer(recipe, wanted)
    packed: list[tuple[Any, ...]] = []
    for number, step in enumerate(recipe.steps):
        value = recipe.inputs + number
        if number in unrounded:
            assert isinstance(step, LookUp)
            layer = _quantized(unrounded[number], given[number][1], step, wanted, value)
            packed.append((PackedBytes(layer),))
            moved = replace(step, x=writer.as_bytes(step.x))
            if step.residual is not None:
                of = writer.as_bytes if step.residual in wanted else writer.as_floats
                moved = replace(moved, residual=of(step.residual))
            fields = {f.name: getattr(moved, f.name) for f in dataclass_fields(moved)}
            writer.put(value, ByteLookUp(**fields, to_bytes=value in wanted))
        elif _keeps_bytes(step) and step.reads[0] in wanted:
            x = writer.as_bytes(step.reads[0])
            wanted.setdefault(value, wanted[step.reads[0]])
            writer.put(value, BytePool(x, step.window) if isinstance(step, Pool) else step.renumbered({step.reads[0]: x}))
        else:
            if number in given:
                packed.append(given[number])
            writer.put(value, step.renumbered({x: writer.as_floats(x) for x in step.reads}), floats=True)
    return Recipe(recipe.inputs, tuple(writer.steps), tuple(writer.as_floats(value) for value in recipe.outputs)), packed


def _quantized(weight: Unrounded, bias: Tensor | None, step: LookUp, wanted: dict[int, Range], value: int) -> QuantizedLookup:
    residual: Range | Literal["float32"] | None = None if step.residual is None else wanted.get(step.residual, "float32")
    return quantize_lookup(
        weight.tensors,
        weight.kernel_size,
        bias,
        wanted[step.x],
        wanted.get(value),
        weight.vector_limits,
        step.activation,
        residual,
        step.residual_last,
        "a program's lookup convolution",
    )


def _keeps_bytes(step: Step) -> bool:
    """Whether a step makes bytes of bytes, of the same range."""
    return isinstance(step, View) or (type(step) is Pool and not step.window.mean and step.window.plain)


def _wanted_ranges(recipe: Recipe, unrounded: dict[int, Unrounded]) -> dict[int, Range]:
    """The range of every value that is bytes: that of the last layer to read it, which all others share."""
    wanted: dict[int, Range] = {}
    for number, step in reversed(list(enumerate(recipe.steps))):
        result = wanted.get(recipe.inputs + number)
        if number in unrounded:
            wanted.setdefault(step.reads[0], unrounded[number].x)
        elif result is not None and _keeps_bytes(step):
            wanted.setdefault(step.reads[0], result)
    return wanted


class _Writer:
    """The steps written so far, and where each value of the old recipe is found, as floats and as bytes."""

    def __init__(self, recipe: Recipe, ranges: dict[int, Range]):
        self.steps: list[Step] = []
        self._inputs, self._ranges = recipe.inputs, ranges
        self._floats = {value: value for value in range(recipe.inputs)}
        self._bytes: dict[int, int] = {}

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return self._inputs + len(self.steps) - 1

    def put(self, value: int, step: Step, floats: bool = False) -> None:
        """Write the step that makes a value: bytes where it has a range, unless it makes ``floats``."""
        (self._floats if floats or value not in self._ranges else self._bytes)[value] = self._add(step)

    def as_bytes(self, value: int) -> int:
        """Where the bytes of a value are; made of its floats where there are none yet."""
        if value not in self._bytes:
            known = self._ranges[value]
            self._bytes[value] = self._add(Cast(self._floats[value], known.scale, known.zero, True))
        return self._bytes[value]

    def as_floats(self, value: int) -> int:
        """Where its floats are; made of its bytes where there are none yet."""
        if value not in self._floats:
            known = self._ranges[value]
            self._floats[value] = self._add(Cast(self._bytes[value], known.scale, known.zero, False))
        return self._floats[value]
