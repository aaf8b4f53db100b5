"""A recipe whose lookup convolutions have ranges, rewritten so that they take bytes, and what stands between them hands bytes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal

from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.cpu.moves import Moved
from lcnn_compile.kernels.cpu.steps import ByteLookUp, ByteMap, ByteMean, BytePool, Cast, LookUp, Map, Pool, Recipe, Step
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

    A value is bytes where some such layer reads it, or reads what maxima or moves make of it, or what is made so of the same value; one that
    is nobody's input stays float32, and so does what the program returns. Means and element-wise steps read and write either. What else reads
    bytes gets them widened.
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
            try:
                ends = wanted.get(value)
                layer = _quantized(unrounded[number], given[number][1], step, wanted, ends)
            except WeightError:  # the range of its reader is too fine for what the layer may put out
                ends = None
                layer = _quantized(unrounded[number], given[number][1], step, wanted, ends)
            packed.append((PackedBytes(layer),))
            moved = replace(step, x=writer.as_bytes(step.x))
            if step.residual is not None:
                of = writer.as_bytes if step.residual in wanted else writer.as_floats
                moved = replace(moved, residual=of(step.residual))
            fields = {f.name: getattr(moved, f.name) for f in dataclass_fields(moved)}
            writer.put(value, ByteLookUp(**fields, to_bytes=ends is not None), floats=ends is None)
        elif _keeps_bytes(step) and value in wanted:
            kept = step.renumbered({x: writer.as_bytes(x) for x in step.reads})
            writer.put(value, BytePool(kept.x, kept.window) if isinstance(kept, Pool) else kept)
        elif type(step) is Map or (type(step) is Pool and step.window.mean):
            if number in given:
                packed.append(given[number])
            places = {x: writer.as_found(x) for x in step.reads}
            read = tuple(_ends(wanted[x]) if writer.is_bytes(places[x]) else None for x in step.reads)
            fields = {f.name: getattr(step.renumbered(places), f.name) for f in dataclass_fields(step)}
            to = _ends(wanted[value]) if value in wanted else None
            writer.put(
                value, ByteMap(**fields, of=read, to=to) if isinstance(step, Map) else ByteMean(**fields, of=read[0], to=to)
            )
        else:
            if number in given:
                packed.append(given[number])
            writer.put(value, step.renumbered({x: writer.as_floats(x) for x in step.reads}), floats=True)
    return Recipe(recipe.inputs, tuple(writer.steps), tuple(writer.as_floats(value) for value in recipe.outputs)), packed


def _quantized(
    weight: Unrounded, bias: Tensor | None, step: LookUp, wanted: dict[int, Range], to: Range | None
) -> QuantizedLookup:
    residual: Range | Literal["float32"] | None = None if step.residual is None else wanted.get(step.residual, "float32")
    return quantize_lookup(
        weight.tensors,
        weight.kernel_size,
        bias,
        wanted[step.x],
        to,
        weight.vector_limits,
        step.activation,
        residual,
        step.residual_last,
        "a program's lookup convolution",
    )


def _ends(known: Range) -> tuple[float, int]:
    return known.scale, known.zero


def _keeps_bytes(step: Step) -> bool:
    """Whether a step makes bytes of bytes, of the same range."""
    return isinstance(step, Moved) or (type(step) is Pool and not step.window.mean and step.window.plain)


def _wanted_ranges(recipe: Recipe, unrounded: dict[int, Unrounded]) -> dict[int, Range]:
    """The range of every value that is bytes: one that holds those of all layers that read it, or what is moved from or to it."""
    same = list(range(recipe.inputs + len(recipe.steps)))

    def of(value: int) -> int:
        while same[value] != value:
            value = same[value]
        return value

    for number, step in enumerate(recipe.steps):
        if _keeps_bytes(step):
            for x in step.reads:
                same[of(x)] = of(recipe.inputs + number)
    found: dict[int, Range] = {}
    for number, weight in unrounded.items():
        kind = of(recipe.steps[number].reads[0])
        found[kind] = weight.x.joined(found[kind]) if kind in found else weight.x
    return {value: found[of(value)] for value in range(len(same)) if of(value) in found}


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

    def is_bytes(self, place: int) -> bool:
        """Whether what stands there is bytes."""
        return place in self._bytes.values()

    def as_found(self, value: int) -> int:
        """Where a value is, as whatever it is; as floats where it is both."""
        return self._floats[value] if value in self._floats else self._bytes[value]

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
