"""Images side by side: a recipe for a batch rewritten so that each pixel holds the values of several images.

Small images do not fill vectors: of eight lanes over the pixels of a 4x4 image and its margins, half do nothing. With as many
images as a vector has lanes next to each other in memory, [C, H, W, images], every vector is full and aligned. To the kernels
such a value is one image that is ``images`` times as wide, under a convolution that is dilated and padded as much more.
Linear layers read them turned back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lcnn_compile.kernels.cpu.steps import Linear, LookUp, Map, Pool, Recipe, Shape, Step, Turn, View, Window

IMAGES = {"avx2": 8, "avxvnni": 8}
"""Images side by side, by instruction set: where it has been found to pay."""
LARGEST = 1 << 19
"""Elements of a value of that many images, at most: larger ones fill vectors by themselves and would leave the caches,
which those of this size do if they are not pooled before they are written."""


def side_by_side(recipe: Recipe, shapes: Sequence[Shape], images: int) -> Recipe | None:
    """The recipe for ``images`` images with the same inputs and outputs, in between side by side; None where it cannot be.

    Args:
        recipe: what is to be computed.
        shapes: of its values, for a batch of ``images``.
        images: the batch.
    """
    if any(len(shape) < 2 or shape[0] != images or math.prod(shape) > LARGEST for shape in shapes):
        return None
    if any(isinstance(step, LookUp) and step.stride[1] != 1 for step in recipe.steps) or "uint8" in recipe.elements():
        return None
    steps: list[Step] = [Turn(x, images, True) for x in range(recipe.inputs)]
    place = {x: recipe.inputs + x for x in range(recipe.inputs)}
    back: dict[int, int] = {}  # values as the caller has them

    def turned_back(value: int) -> int:
        if value not in back:
            steps.append(Turn(place[value], images, False))
            back[value] = recipe.inputs + len(steps) - 1
        return back[value]

    for number, step in enumerate(recipe.steps):
        result = recipe.inputs + number
        if isinstance(step, Linear):
            steps.append(replace(step, x=turned_back(step.x)))
            back[result] = recipe.inputs + len(steps) - 1
            continue
        if any(x not in place for x in step.reads):
            return None
        moved = step.renumbered(place)
        if isinstance(step, LookUp) and isinstance(moved, LookUp):
            top, bottom, left, right = moved.padding
            moved = replace(
                moved,
                padding=(top, bottom, left * images, right * images),
                dilation=(moved.dilation[0], moved.dilation[1] * images),
                pool=None if moved.pool is None else _widened(moved.pool, step.convolved(shapes), images),
            )
        elif isinstance(step, Pool) and isinstance(moved, Pool) and step.window.plain:
            moved = replace(moved, window=_widened(moved.window, shapes[step.x], images))
        elif isinstance(moved, View) and len(shapes[result]) > 1 and shapes[result][0] == images:
            moved = replace(moved, tail=(*moved.tail[:-1], moved.tail[-1] * images))
        elif not isinstance(step, Map) or not _alike(step, shapes, shapes[result]):
            return None
        steps.append(moved)
        place[result] = recipe.inputs + len(steps) - 1
    outputs = tuple(turned_back(value) for value in recipe.outputs)
    return Recipe(recipe.inputs, tuple(steps), outputs)


def _alike(step: Map, shapes: Sequence[Shape], out: Shape) -> bool:
    """Whether the operands have the same columns as the result, or say nothing about columns and images."""
    alone = all(not shape or (shape[-1] == 1 and (len(shape) < len(out) or shape[0] == 1)) for shape in step.constants)
    return alone and all(len(shapes[x]) == len(out) and shapes[x][-1] == out[-1] for x in step.inputs)


def _widened(window: Window, shape: Shape, images: int) -> Window:
    return replace(window, kernel_size=window.kernel_size or (shape[2], shape[3]), lanes=images)
