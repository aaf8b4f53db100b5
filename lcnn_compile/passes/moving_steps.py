"""Which nodes of a graph only move elements, and as what steps of a program."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from lcnn_compile.kernels.cpu.moves import MOVE_DIMENSIONS
from lcnn_compile.kernels.cpu.steps import Concat, Copy, Expand, Map, Permute, Slice, View
from lcnn_compile.passes.signatures import operation_of
from lcnn_compile.passes.step_form import Emit, Form, Values, is_value
from lcnn_compile.passes.targets import same_shape, shape_of

Move = Callable[[Emit, int], int]
"""Emits steps that move a value; returns the last one's value."""


def moving(node: fx.Node) -> Form | None:
    """The form of a call that moves elements: concatenations, slices, permutations, shuffles; None for others."""
    out = shape_of(node)
    if out is None or not 0 < len(out) <= MOVE_DIMENSIONS:
        return None
    if node.target is operator.getitem:
        return _indexed(node)
    found = operation_of(node)
    if found is None:
        return None
    name, given = found
    if name in ("cat", "stack"):
        return _joined(name, given, out)
    maker = _MAKERS.get(name)
    x = given.get("input")
    shape = shape_of(x) if is_value(x) else None
    if maker is None or not shape or not is_value(x) or not same_shape(shape[:1], out[:1]):
        return None
    move = maker(given, shape, out)
    return None if move is None else Form((x,), lambda emit, values: move(emit, values[0]), alias=name in _ALIASES)


def _joined(name: str, given: dict[str, Any], out: tuple[Any, ...]) -> Form | None:
    """Values in a row, in a dimension that is there already or is new."""
    parts, dim = given["tensors"], given["dim"]
    if not isinstance(parts, list | tuple) or not parts or not isinstance(dim, int) or not all(is_value(x) for x in parts):
        return None
    dim %= len(out)
    shapes = [shape_of(x) for x in parts]
    sizes = [shape[dim] for shape in shapes if shape and len(shape) == len(out)] if name == "cat" else [1] * len(parts)
    if not dim or len(sizes) < len(parts) or not all(isinstance(size, int) and size for size in sizes):
        return None
    inputs = tuple(dict.fromkeys(parts))
    tail = None if name == "cat" else (*out[1:dim], 1, *out[dim + 1 :])
    if tail is not None and not all(isinstance(size, int) for size in tail):
        return None

    def build(emit: Emit, values: Values) -> int:
        place = dict(zip(inputs, values, strict=True))
        found = [place[x] if tail is None else emit(View(place[x], tail)) for x in parts]
        return emit(Concat(tuple(found), dim))

    return Form(inputs, build)


def _indexed(node: fx.Node) -> Form | None:
    """``x[...]`` with slices, whole numbers and new dimensions."""
    x, index = node.args
    shape, out = shape_of(x) if is_value(x) else None, shape_of(node)
    if not is_value(x) or not shape or not out:
        return None
    parts = list(index) if isinstance(index, tuple | list) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, fx.Node)]:
        if parts.count(Ellipsis) > 1:
            return None
        place, used = parts.index(Ellipsis), sum(part is not None for part in parts) - 1
        parts[place : place + 1] = [slice(None)] * (len(shape) - used)
    moves: list[Move] = []
    dim = 0
    for part in parts:
        if part is None:
            continue
        if dim >= len(shape):
            return None
        made = _part(dim, shape[dim], part)
        if made is None:
            return None
        moves.append(made)
        dim += 1
    if not same_shape(shape[:1], out[:1]):
        return None
    return _chained(x, moves, shape, out)


def _whole(emit: Emit, value: int) -> int:
    return value


def _part(dim: int, size: Any, part: Any) -> Move | None:
    """One dimension's slice, or a single entry of it."""
    if isinstance(part, slice) and part.start in (0, None) and part.stop in (None, sys.maxsize) and part.step in (1, None):
        return _whole
    if dim == 0 or not isinstance(size, int):
        return None
    if isinstance(part, bool) or not isinstance(part, int | slice):
        return None
    if isinstance(part, int):
        part = slice(part % size, part % size + 1) if -size <= part < size else slice(0, 0)
    if not all(v is None or isinstance(v, int) for v in (part.start, part.stop, part.step)):
        return None
    found = range(*part.indices(size))
    if not found:
        return None
    if len(found) == size and found.step == 1:
        return _whole
    return lambda emit, value: emit(Slice(value, dim, found.start, len(found), found.step))


def _chained(x: fx.Node, moves: Sequence[Move], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Form | None:
    """Moves one after the other, then the shape of the result."""
    tail = tuple(out[1:])
    if not all(isinstance(size, int) for size in tail) and len(out) != len(shape):
        return None

    def build(emit: Emit, values: Values) -> int:
        value = values[0]
        for move in moves:
            value = move(emit, value)
        return (
            emit(View(value, tail))
            if all(isinstance(size, int) for size in tail)
            else emit(Copy(value))
            if value == values[0]
            else value
        )

    return Form((x,), build, view=all(move is _whole for move in moves) and all(isinstance(s, int) for s in tail), alias=True)


def _narrow(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    dim = given["dim"]
    if not isinstance(dim, int):
        return None
    dim %= len(shape)
    if "index" in given:
        part: Any = given["index"]
    elif "length" in given:
        start, length = given["start"], given["length"]
        if not isinstance(start, int) or not isinstance(length, int) or not isinstance(shape[dim], int):
            return None
        start %= shape[dim] or 1
        part = slice(start, start + length)
    else:
        part = slice(given["start"], given["end"], given["step"])
    move = _part(dim, shape[dim], part)
    tail = tuple(out[1:])
    if move is _whole and len(out) == len(shape):
        return lambda emit, value: value
    if move is None or not all(isinstance(size, int) for size in tail):
        return None
    return lambda emit, value: emit(View(move(emit, value), tail)) if "index" in given else move(emit, value)


def _permute(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    dims = list(range(len(shape)))
    if "dims" in given:
        dims = given["dims"]
    else:
        first, second = list(given.values())[1:3]
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        dims[first], dims[second] = dims[second], dims[first]
    if not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims) or len(dims) != len(shape):
        return None
    order = tuple(d % len(shape) for d in dims)
    return (lambda emit, value: emit(Permute(value, order))) if order[0] == 0 else None


def _movedim(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    source, target = given["source"], given["destination"]
    if not isinstance(source, int) or not isinstance(target, int):
        return None
    dims = [d for d in range(len(shape)) if d != source % len(shape)]
    dims.insert(target % len(shape), source % len(shape))
    return _permute({"dims": dims}, shape, out)


def _expand(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    tail = tuple(out[1:])
    if len(out) != len(shape) or not all(isinstance(size, int) for size in tail):
        return None
    return lambda emit, value: emit(Expand(value, tail))


def _flip(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    dims = given["dims"]
    found = [dims] if isinstance(dims, int) else dims
    if not isinstance(found, list | tuple) or not all(isinstance(d, int) for d in found):
        return None
    found = [d % len(shape) for d in found]
    if not all(d and isinstance(shape[d], int) and shape[d] for d in found):
        return None

    def move(emit: Emit, value: int) -> int:
        for d in found:
            value = emit(Slice(value, d, shape[d] - 1, shape[d], -1))
        return value

    return move if found else None


def _shuffled(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    """Pixel shuffle and its inverse, channel shuffle: dimensions taken apart, in another order."""
    if not all(isinstance(size, int) for size in (*shape[1:], *out[1:])) or len(shape) < 3:
        return None
    if "groups" in given:
        groups = given["groups"]
        apart, order = (groups, shape[1] // groups, *shape[2:]), (0, 2, 1, *range(3, len(shape) + 1))
    elif len(shape) != 4:
        return None
    elif "upscale_factor" in given:
        r = given["upscale_factor"]
        apart, order = (out[1], r, r, *shape[2:]), (0, 1, 4, 2, 5, 3)
    else:
        r = given["downscale_factor"]
        apart, order = (shape[1], out[2], r, out[3], r), (0, 1, 3, 5, 2, 4)
    tail = tuple(out[1:])
    return lambda emit, value: emit(View(emit(Permute(emit(View(value, apart)), order)), tail))


def _glu(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    """One half times the sigmoid of the other."""
    dim = given["dim"] % len(shape) if isinstance(given["dim"], int) else 0
    half = out[dim]
    if not dim or not isinstance(half, int) or not half:
        return None
    gate = (("sigmoid", (1,), ()), ("mul", (0, 2), ()))
    return lambda emit, value: emit(Map((emit(Slice(value, dim, 0, half)), emit(Slice(value, dim, half, half))), (), (), gate))


def _copied(given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Move | None:
    return lambda emit, value: emit(Copy(value))


_MAKERS: dict[str, Callable[[dict[str, Any], tuple[Any, ...], tuple[Any, ...]], Move | None]] = {
    **dict.fromkeys(("narrow", "select", "slice"), _narrow),
    **dict.fromkeys(("permute", "transpose"), _permute),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), _shuffled),
    "movedim": _movedim,
    "expand": _expand,
    "expand_as": _expand,
    "flip": _flip,
    "clone": _copied,
    "glu": _glu,
}
_ALIASES = {"narrow", "select", "slice", "permute", "transpose", "movedim", "expand", "expand_as"}
