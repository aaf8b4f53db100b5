"""A program as the words of a file, for the library that runs it without Python (``src/native``).

Every structure that the library reads consists of 64-bit words: numbers, and addresses of tables, weights and plans. For a batch of N
images each number is a constant or grows by a constant with every image, which is found by asking for several N. So a file holds, for each
call, its words as constants, as pairs (constant, per image), or as references; no step is described twice, here and there.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.arena import Placement, place, settled
from lcnn_compile.kernels.cpu.elementwise import merged
from lcnn_compile.kernels.cpu.forward import PackedWeight, PlanHandle
from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.cpu.moves import Moved, move
from lcnn_compile.kernels.cpu.program import POOL_FROM, Program
from lcnn_compile.kernels.cpu.step import BYTES, MOST_READ, Native, Shape, Site
from lcnn_compile.kernels.cpu.steps import Recipe, pooled
from lcnn_compile.kernels.cpu.words import Tables, Words, file_of, put_weight

BATCHES = (2, 3, 5, 8)
"""Two batches tell how a number grows; the others whether it does so."""
CONSTANT, AFFINE, TABLE, PLAN = range(4)
"""lcnn::Tag, of a word."""
View = Callable[[Tensor], Tensor]


class Port(NamedTuple):
    """An input or output of a program: its name, and its sizes behind the batch."""

    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Rearranged(Moved):
    """``x`` [N, *] as strides over an image say, from ``offset`` on: what views of an output come to, in memory of its own."""

    x: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """[N, *sizes]."""
        return (shapes[self.x][0], *self.sizes)

    def native(self, site: Site) -> list[Native]:
        """One call."""
        source = (site.images[self.x], *self.strides)
        return move(self.x, site.shapes[site.y], source, site.strides_of(site.y), (self.offset, 0), site.elements[self.x])


def rearranged(shape: Shape, views: Sequence[View]) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Sizes, strides and offset inside of an image that views of a value [N, *] come to; None where they are all of it, as it lies.

    Raises:
        KernelError: they mix images.
    """
    image = math.prod(shape[1:])
    value = torch.arange(math.prod(shape)).view(shape)
    for view in views:
        value = view(value)
    if value.dim() < 1 or value.shape[0] != shape[0]:
        raise KernelError(f"an output of shape {tuple(value.shape)} has no batch of {shape[0]} in front")
    if shape[0] > 1 and value.shape[1:].numel() and not torch.equal(value[1], value[0] + image):
        raise KernelError("an output's images lie among each other")
    if torch.equal(value[0].reshape(-1), torch.arange(image)):
        return None
    first = value[0]
    sizes, strides = tuple(first.shape), tuple(_stride(first, d) for d in range(first.dim()))
    offset = int(first.reshape(-1)[0]) if first.numel() else 0
    places = torch.arange(image).as_strided(sizes, strides, offset) if min(strides, default=0) >= 0 else None
    if places is None or not torch.equal(places, first):
        raise KernelError(f"an output is a view {sizes} that no strides describe")
    return sizes, strides, offset


def _stride(value: Tensor, dim: int) -> int:
    """From one entry to the next in a dimension of a tensor of places."""
    if value.shape[dim] < 2 or not value.numel():
        return 0
    return int((value.select(dim, 1) - value.select(dim, 0)).reshape(-1)[0])


class _Instance(NamedTuple):
    """What the library is called with for one batch."""

    shapes: list[Shape]
    placement: Placement
    calls: list[tuple[int, Native]]  # the value that it makes


def written(
    program: Program,
    inputs: Sequence[Port],
    outputs: Sequence[tuple[str, int, Sequence[View]]],
    batch: int,
    dynamic: bool,
    order: Sequence[int | None] | None = None,
) -> bytes:
    """The file of a program, without its checksum (:func:`lcnn_compile.export.native.export_native` puts it in).

    Args:
        program: packed under :func:`lcnn_compile.kernels.cpu.keep_sources`.
        inputs: of the program, in order.
        outputs: names, which of the program's outputs, and the views of it that are returned.
        batch: of the example.
        dynamic: whether other batches are taken.
        order: the program's inputs as ``inputs`` lists them, None for one that it does not read; as they are unless given.

    Raises:
        KernelError: something in it does not grow evenly with the batch.
    """
    ordered = _ordered(program.recipe, order if order is not None else range(program.recipe.inputs))
    recipe, weights = _laid_out(ordered, program.weights, inputs, outputs, batch, dynamic)
    batches = BATCHES if dynamic else (batch,)
    made = [_instance(recipe, weights, inputs, n, dynamic) for n in batches]
    tables, words, plans = Tables(), Words(), Words()
    packed = [entry[0] for entry in weights if entry and isinstance(entry[0], PackedWeight | PackedBytes)]
    numbers = {id(weight): number for number, weight in enumerate(packed)}
    calls, plan_count = _calls(made, batches, tables, plans, numbers)

    words.put(batch, int(dynamic), MOST_READ)
    shapes = made[0].shapes
    words.put(len(inputs))
    for port in inputs:
        words.text(port.name)
        words.put(len(port.sizes), *port.sizes)
    words.put(len(outputs))
    for (name, _, views), value in zip(outputs, recipe.outputs, strict=True):
        found = torch.empty(shapes[value], device="meta")
        for view in views if _reshaped(recipe, value) else ():
            found = view(found)
        if 0 in found.shape[1:]:
            raise KernelError(f"the output {name} has the shape {list(found.shape[1:])} behind the batch, without elements")
        words.text(name)
        words.put(found.dim() - 1, *found.shape[1:])
    weight_words = Words()
    for weight in packed:
        put_weight(weight, weight_words, tables)
    words.put(len(packed), *weight_words.found)
    words.put(plan_count, *plans.found)
    _values(made, batches, words)
    words.put(*calls.found)
    return file_of(words, tables)


def _reshaped(recipe: Recipe, value: int) -> bool:
    """Whether an output is returned as the program made it, so that its views are but another shape."""
    return value < recipe.inputs or not isinstance(recipe.steps[value - recipe.inputs], _Rearranged)


def _ordered(recipe: Recipe, order: Sequence[int | None]) -> Recipe:
    """The same with its inputs in another order, and with some that nothing reads (None)."""
    place = {x: number for number, x in enumerate(order) if x is not None}
    place |= {recipe.inputs + i: len(order) + i for i in range(len(recipe.steps))}
    steps = tuple(step.renumbered(place) for step in recipe.steps)
    return Recipe(len(order), steps, tuple(place[y] for y in recipe.outputs))


def _laid_out(
    given: Recipe,
    weights: Sequence[tuple[Any, ...]],
    inputs: Sequence[Port],
    outputs: Sequence[tuple[str, int, Sequence[View]]],
    batch: int,
    dynamic: bool,
) -> tuple[Recipe, list[tuple[Any, ...]]]:
    """The recipe as the library runs it, for any batch: joined, pooled, its outputs in memory of their own."""

    def sizes(n: int) -> list[Shape]:
        return [(n, *port.sizes) for port in inputs]

    several = 3 if dynamic else batch
    known = given.shapes(sizes(several))
    steps, returned = list(given.steps), []
    for _, number, views in outputs:
        value = given.outputs[number]
        found = rearranged(known[value], views) if views else None
        if found is not None:
            steps.append(_Rearranged(value, *found))
            value = given.inputs + len(steps) - 1
        returned.append(value)
    recipe = Recipe(given.inputs, tuple(steps), tuple(returned))
    shapes = recipe.shapes(sizes(several))
    joined, results, held = merged(recipe.steps, recipe.inputs, recipe.outputs, weights, shapes)
    base = Recipe(recipe.inputs, joined, results)
    recipe = pooled(base, base.shapes(sizes(1 if dynamic else batch)), POOL_FROM)
    return settled(recipe, recipe.shapes(sizes(several))), held


def _instance(recipe: Recipe, weights: Sequence[tuple[Any, ...]], inputs: Sequence[Port], n: int, dynamic: bool) -> _Instance:
    shapes = recipe.shapes([(n, *port.sizes) for port in inputs])
    if dynamic and any(math.prod(shape) % n for shape in shapes):
        raise KernelError("a value does not grow with the batch: export it for one batch (dynamic_batch=False)")
    placement = place(recipe, shapes, n if dynamic else 1)
    calls: list[tuple[int, Native]] = []
    entries = iter(weights)
    for number, step in enumerate(recipe.steps):
        own = next(entries) if step.weighted else ()
        y = recipe.inputs + number
        site = Site(y, shapes, placement.images, {}, own, 1, placement.copied.get(y, ()), placement.elements)
        calls += [(y, made) for made in step.native(site)]
    return _Instance(shapes, placement, calls)


def _affine(values: Sequence[int], batches: Sequence[int], what: str) -> tuple[int, int]:
    """(a, b) with values a + b · batch."""
    if len(values) == 1:
        return values[0], 0
    slope, rest = divmod(values[1] - values[0], batches[1] - batches[0])
    first = values[0] - slope * batches[0]
    if rest or any(first + slope * n != value for n, value in zip(batches, values, strict=True)):
        raise KernelError(f"{what} does not grow evenly with the batch: {list(values)} for batches of {list(batches)}")
    return first, slope


def _values(made: Sequence[_Instance], batches: Sequence[int], words: Words) -> None:
    placements = [instance.placement for instance in made]
    words.affine(*_affine([p.size for p in placements], batches, "the arena"))
    words.put(len(placements[0].tensors))
    for v, tensor in enumerate(placements[0].tensors):
        words.put(tensor)
        words.affine(*_affine([p.offsets[v] for p in placements], batches, "a value's place"))
        counts = [instance.shapes[v][0] if instance.shapes[v] else 1 for instance in made]
        words.affine(*_affine(counts, batches, "the images of a value"))
        images = {p.images[v] for p in placements}
        if len(images) != 1:
            raise KernelError("the images of a value lie apart by a distance that grows with the batch")
        words.put(images.pop(), math.prod(made[0].shapes[v][1:]), BYTES[placements[0].elements[v]])


def _calls(
    made: Sequence[_Instance], batches: Sequence[int], tables: Tables, plans: Words, numbers: dict[int, int]
) -> tuple[Words, int]:
    """Every call: kind, value made, values read, words. Plans are added as calls need them."""
    words, plan_count = Words(), 0
    words.put(len(made[0].calls))
    for same in zip(*(instance.calls for instance in made), strict=True):
        y, call = same[0]
        if any((other_y, other.kind, other.reads) != (y, call.kind, call.reads) for other_y, other in same):
            raise KernelError("a program's calls differ from batch to batch")
        words.put(call.kind, y, len(call.reads), *call.reads)
        images = [bytes(other.of) for _, other in same]
        addresses = set(_addresses(type(call.of)))
        words.put(len(images[0]) // 8)
        columns = zip(*(np.frombuffer(image, np.int64).tolist() for image in images), strict=True)
        for i, column in enumerate(columns):
            if i not in addresses or not column[0]:
                first, slope = _affine(column, batches, "a number of a call")
                words.put(*((AFFINE, first, slope) if slope else (CONSTANT, first)))
                continue
            owned = [_owned(other, address) for (_, other), address in zip(same, column, strict=True)]
            if isinstance(owned[0], PlanHandle):
                words.put(PLAN, plan_count)
                _plan(owned, batches, plans, numbers)
                plan_count += 1
            else:
                found = {tables.add(_values_of(each)) for each in owned}
                if len(found) != 1:
                    raise KernelError("a table of a call differs from batch to batch")
                words.put(TABLE, found.pop())
    return words, plan_count


def _addresses(kind: type[Any], start: int = 0) -> list[int]:
    """Which words of a structure are addresses."""
    found = []
    for name, of, *_ in kind._fields_:
        at = start + getattr(kind, name).offset // 8
        if of is ctypes.c_void_p:
            found.append(at)
        elif hasattr(of, "_fields_"):
            found += _addresses(of, at)
        elif getattr(of, "_type_", None) is ctypes.c_void_p:
            found += range(at, at + of._length_)
    return found


def _owned(call: Native, address: int) -> Any:
    """What lies at an address that a call was given."""
    for thing in call.owned:
        at = thing.data_ptr() if isinstance(thing, Tensor) else thing.address if isinstance(thing, PlanHandle) else None
        if at is None and thing is not None:
            at = ctypes.addressof(thing)
        if at == address:
            return thing
    raise KernelError(f"a call of kind {call.kind} refers to something that it does not own")


def _values_of(thing: Any) -> Tensor:
    if isinstance(thing, Tensor):
        return thing
    kinds: dict[Any, Any] = {ctypes.c_float: np.float32, ctypes.c_int32: np.int32}
    kind = kinds[getattr(thing, "_type_", None) if isinstance(thing, ctypes.Array) else type(thing)]
    return torch.from_numpy(np.frombuffer(bytes(thing), kind).copy())


def _plan(same: Sequence[PlanHandle], batches: Sequence[int], words: Words, numbers: dict[int, int]) -> None:
    """The weight, the words of the geometry, and those of the pooling, each (constant, per image)."""
    words.put(numbers[id(same[0].weight)])
    for column in zip(*(plan.geometry for plan in same), strict=True):
        words.affine(*_affine([int(v) for v in column], batches, "a plan"))
    pools = [np.frombuffer(bytes(plan.pool), np.int64).tolist() if plan.pool is not None else [] for plan in same]
    words.put(len(pools[0]))
    for column in zip(*pools, strict=True):
        words.affine(*_affine(column, batches, "a pooling"))
