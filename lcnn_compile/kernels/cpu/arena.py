"""Where the values of a program lie: in the caller's tensors, in one arena of memory, in each other.

A value is one tensor whose images may lie apart; inside of an image it is contiguous. So a view lies where its source lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.elementwise import same_memory
from lcnn_compile.kernels.cpu.moves import View
from lcnn_compile.kernels.cpu.step import BYTES, Shape
from lcnn_compile.kernels.cpu.steps import Recipe

LINE = 64
"""Bytes of a cache line."""


@dataclass(frozen=True)
class Placement:
    """Where every value begins.

    Attributes:
        tensors: the caller's inputs and outputs are numbered in this order; -1 is the arena.
        offsets: bytes from the start of that.
        images: elements from one image to the next.
        size: bytes of the arena.
    """

    tensors: list[int]
    offsets: list[int]
    images: list[int]
    size: int


def place(recipe: Recipe, shapes: Sequence[Shape]) -> Placement:
    """Where the values of a recipe lie: they share memory where their lives do not overlap.

    Raises:
        KernelError: it returns an input, or a value twice.
    """
    elements = recipe.elements()
    root = list(range(len(shapes)))
    first, last = list(range(-recipe.inputs, len(recipe.steps))), [0] * len(shapes)
    for number, step in enumerate(recipe.steps):
        if isinstance(step, View):
            root[recipe.inputs + number] = root[step.x]
        for value in step.reads:
            last[root[value]] = number
    places: dict[int, tuple[int, int]] = {i: (i, 0) for i in range(recipe.inputs)}
    for i, value in enumerate(recipe.outputs):
        if root[value] in places:
            raise KernelError("a program may not return an input, nor a value twice")
        places[root[value]] = (recipe.inputs + i, 0)
    images = [math.prod(shape[1:]) for shape in shapes]
    live: list[tuple[int, int, int, int]] = []  # offset, end, last use, value
    size = 0
    for number in range(len(recipe.steps)):
        value = recipe.inputs + number
        if root[value] != value or value in places:
            continue
        live = sorted(entry for entry in live if entry[2] >= number)
        taken = -(-math.prod(shapes[value]) * BYTES[elements[value]] // LINE) * LINE
        offset = _over(recipe, number, shapes, root, live)
        if offset is None:
            offset = 0
            for start, end, *_ in live:
                if start - offset >= taken:
                    break
                offset = max(offset, end)
        places[value] = (-1, offset)
        live.append((offset, offset + taken, max(last[value], first[value]), value))
        size = max(size, offset + taken)
    found = [places[root[value]] for value in range(len(shapes))]
    return Placement([tensor for tensor, _ in found], [offset for _, offset in found], images, size)


def _over(
    recipe: Recipe, number: int, shapes: Sequence[Shape], root: list[int], live: list[tuple[int, int, int, int]]
) -> int | None:
    """Where a step writes its result over a value that nobody reads later; the value's memory is given to the result."""
    step = recipe.steps[number]
    for x in step.reads:
        if not same_memory(step, x, shapes, recipe.inputs + number):
            continue
        for i, (offset, _, last, value) in enumerate(live):
            if value == root[x] and last == number and not _read_otherwise(step.reads, x, root, shapes):
                del live[i]
                return offset
    return None


def _read_otherwise(reads: Sequence[int], x: int, root: list[int], shapes: Sequence[Shape]) -> bool:
    """Whether the memory of ``x`` is read under another shape too."""
    return any(root[other] == root[x] and tuple(shapes[other]) != tuple(shapes[x]) for other in reads)
