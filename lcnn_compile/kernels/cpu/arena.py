"""Where the values of a program lie: in the caller's tensors, in one arena of memory, in each other.

A value is one tensor whose images may lie apart; inside of an image it is contiguous. So a view lies where its source lies, a
slice of channels in what it is a slice of, and what is concatenated is written straight into its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lcnn_compile.kernels.cpu.moves import Concat, Copy, Slice, Turn, View
from lcnn_compile.kernels.cpu.step import BYTES, Shape, Step
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
        elements: types, keys of ``BYTES``.
        copied: of each concatenation, by its value: the parts that must be copied into it.
        size: bytes of the arena.
    """

    tensors: list[int]
    offsets: list[int]
    images: list[int]
    elements: list[str]
    copied: dict[int, tuple[int, ...]]
    size: int


@dataclass
class _Family:
    """Which values lie in which others, as a forest: parents, and where in an image of the parent a value begins."""

    recipe: Recipe
    shapes: Sequence[Shape]
    parents: dict[int, tuple[int, int]] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    copied: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def root(self, value: int) -> tuple[int, int]:
        """The value in whose memory one lies, and where in an image of it."""
        start = 0
        while value in self.parents:
            value, offset = self.parents[value]
            start += offset
        return value, start

    def elements(self, value: int) -> int:
        """Of an image."""
        return math.prod(self.shapes[value][1:])

    def whole(self, value: int) -> bool:
        """Whether a value is all of the memory that it lies in."""
        root, _ = self.root(value)
        return math.prod(self.shapes[root]) == math.prod(self.shapes[value])

    def add(self, value: int, step: Step) -> None:
        """Note where a view lies, and what must stay contiguous over all images."""
        if isinstance(step, View):
            self.parents[value] = (step.x, 0)
            if self.shapes[step.x][:1] != self.shapes[value][:1]:
                self.fixed.add(self.root(value)[0])
        elif isinstance(step, Slice) and (start := step.inside(self.shapes)) is not None:
            self.parents[value] = (step.x, start)
        elif isinstance(step, Turn):
            self.fixed |= {value, self.root(step.x)[0]}

    def join(self, value: int, step: Concat) -> None:
        """Let the parts of a concatenation lie in it where they can."""
        shape = self.shapes[value]
        if math.prod(shape[1 : step.dim]) != 1:
            self.copied[value] = tuple(range(len(step.parts)))
            return
        found = [self.root(part) for part in step.parts]
        sizes = [self.elements(part) for part in step.parts]
        if value not in self.fixed and self._follow(found, sizes) and self._same_images(found[0][0], value):
            self.parents[value] = found[0]
            return
        copied, start, i = [], 0, 0
        while i < len(found):
            root, _ = self.root(step.parts[i])
            end = self._run(step.parts, sizes, i)
            free = root not in self.fixed and root != self.root(value)[0] and self._same_images(root, value)
            if end is not None and free:
                self.parents[root] = (value, start)
            else:
                copied.append(i)
                end = i + 1
            start += sum(sizes[i:end])
            i = end
        self.copied[value] = tuple(copied)

    def _same_images(self, root: int, value: int) -> bool:
        return self.shapes[root][:1] == self.shapes[value][:1]

    @staticmethod
    def _follow(found: Sequence[tuple[int, int]], sizes: Sequence[int]) -> bool:
        """Whether values follow each other in one memory."""
        start = found[0][1]
        for (root, offset), size in zip(found, sizes, strict=True):
            if root != found[0][0] or offset != start:
                return False
            start += size
        return True

    def _run(self, parts: Sequence[int], sizes: Sequence[int], first: int) -> int | None:
        """The end of the parts from ``first`` on that follow each other and are all of one memory; None where they are not."""
        root, total, end = self.root(parts[first])[0], 0, first
        while end < len(parts) and self.root(parts[end]) == (root, total):
            total += sizes[end]
            end += 1
            if total == self.elements(root):
                return end
        return None

    def images(self) -> list[int]:
        """Elements from one image of each value to the next."""
        made: dict[int, int] = {}

        def of(value: int) -> int:
            if value not in made:
                parent = self.parents.get(value)
                inside = parent is not None and self._same_images(parent[0], value)
                made[value] = of(parent[0]) if parent is not None and inside else self.elements(value)
            return made[value]

        return [of(value) for value in range(len(self.shapes))]


def settled(recipe: Recipe, shapes: Sequence[Shape]) -> Recipe:
    """The same with copies where a value cannot lie where it would have to.

    These are outputs that are inputs, parts of other values or returned twice, and other shapes of values whose images lie apart.
    """
    family = _Family(recipe, shapes)
    steps: list[Step] = []
    number = {x: x for x in range(recipe.inputs)}

    def emit(step: Step) -> int:
        steps.append(step)
        return recipe.inputs + len(steps) - 1

    for i, step in enumerate(recipe.steps):
        value = recipe.inputs + i
        apart = isinstance(step, View) and shapes[step.x][0] not in (1, shapes[value][0]) and not family.whole(step.x)
        family.add(value, step)
        step = step.renumbered(number)
        number[value] = emit(View(emit(Copy(step.x)), step.tail)) if isinstance(step, View) and apart else emit(step)
    taken: set[int] = set()
    outputs = []
    for value in recipe.outputs:
        root, _ = family.root(value)
        own = root >= recipe.inputs and root not in taken and family.whole(value)
        taken.add(root)
        outputs.append(number[value] if own else emit(Copy(number[value])))
    return Recipe(recipe.inputs, tuple(steps), tuple(outputs))


def place(recipe: Recipe, shapes: Sequence[Shape], images: int = 1) -> Placement:
    """Where the values of a recipe from :func:`settled` lie: they share memory where their lives do not overlap.

    Each has whole lines for each of so many ``images``, a divisor of all batches; with the batch itself, all offsets grow with it.
    """
    family = _family(recipe, shapes)
    elements = recipe.elements()
    values = range(len(shapes))
    roots = [family.root(value) for value in values]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(recipe.steps):
        root = roots[recipe.inputs + number][0]
        first.setdefault(root, number)
        last[root] = number
        last |= {roots[value][0]: number for value in step.reads}
    places = {i: (i, 0) for i in range(recipe.inputs)}
    places |= {roots[value][0]: (recipe.inputs + i, 0) for i, value in enumerate(recipe.outputs)}
    live: list[tuple[int, int, int]] = []  # offset, end, whose
    size = 0
    for number in range(len(recipe.steps)):
        root = roots[recipe.inputs + number][0]
        if root in places or first[root] != number:
            continue
        live = sorted(entry for entry in live if last[entry[2]] >= number)
        taken = -(-math.prod(shapes[root]) * BYTES[elements[root]] // (LINE * images)) * LINE * images
        offset = _over(recipe, number, family, live, last)
        if offset is None:
            offset = 0
            for start, end, _ in live:
                if start - offset >= taken:
                    break
                offset = max(offset, end)
        places[root] = (-1, offset)
        live.append((offset, offset + taken, root))
        size = max(size, offset + taken)
    tensors = [places[root][0] for root, _ in roots]
    offsets = [places[root][1] + start * BYTES[elements[root]] for root, start in roots]
    return Placement(tensors, offsets, family.images(), elements, family.copied, size)


def _family(recipe: Recipe, shapes: Sequence[Shape]) -> _Family:
    family = _Family(recipe, shapes)
    family.fixed |= set(range(recipe.inputs))
    for number, step in enumerate(recipe.steps):
        family.add(recipe.inputs + number, step)
    family.fixed |= {family.root(value)[0] for value in recipe.outputs}
    # The last ones first: what grows by concatenation lies in the largest.
    for number, step in reversed(list(enumerate(recipe.steps))):
        if isinstance(step, Concat):
            family.join(recipe.inputs + number, step)
    return family


def _over(recipe: Recipe, number: int, family: _Family, live: list[tuple[int, int, int]], last: dict[int, int]) -> int | None:
    """Where a step writes its result over a value that nobody reads later; the value's memory is given to the result."""
    step, y = recipe.steps[number], recipe.inputs + number
    if not step.in_place or family.root(y) != (y, 0):
        return None
    for x in step.reads:
        root = family.root(x)[0]
        others = [other for other in step.reads if family.root(other)[0] == root and family.shapes[other] != family.shapes[x]]
        if family.shapes[x] != family.shapes[y] or not family.whole(x) or others or last[root] != number:
            continue
        for i, (offset, _, owner) in enumerate(live):
            if owner == root:
                del live[i]
                return offset
    return None
