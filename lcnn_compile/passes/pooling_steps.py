"""Which nodes of a graph pool over windows, and as what steps of a program."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.steps import Pool, Resize, Step, View, Window
from lcnn_compile.passes.step_form import Form, is_value
from lcnn_compile.passes.targets import aten, bound, same_shape, shape_of

MAX_POOL = (F.max_pool2d, torch.max_pool2d, aten.max_pool2d.default)
MEAN_POOL = (F.avg_pool2d, aten.avg_pool2d.default)
ADAPTIVE = (F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default)
MAX_POOL_1D = (F.max_pool1d, torch.max_pool1d, aten.max_pool1d.default)
MEAN_POOL_1D = (F.avg_pool1d, aten.avg_pool1d.default)
ADAPTIVE_1D = (F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d, aten.adaptive_avg_pool1d.default)
LARGEST = (F.adaptive_max_pool2d, F.adaptive_max_pool1d, torch.adaptive_max_pool1d)
"""Adaptive maxima that may give indices too."""
_RANKS = {4: (MAX_POOL, MEAN_POOL, ADAPTIVE), 3: (MAX_POOL_1D, MEAN_POOL_1D, ADAPTIVE_1D)}
_WITH_INDICES: dict[Any, Callable[..., Any]] = {
    aten.max_pool2d_with_indices.default: aten.max_pool2d.default,
    aten.max_pool1d_with_indices.default: aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default: F.adaptive_max_pool2d,
    aten.adaptive_max_pool1d.default: F.adaptive_max_pool1d,
}


def without_indices(gm: fx.GraphModule) -> None:
    """Poolings whose indices nobody reads give maxima alone."""
    for node in list(gm.graph.nodes):
        users = list(node.users)
        if node.op != "call_function" or node.target not in _WITH_INDICES:
            continue
        if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in users):
            continue
        maxima = [user for user in users if user.args[1] == 0]
        if not maxima:
            continue
        with gm.graph.inserting_before(node):
            pooled = gm.graph.call_function(_WITH_INDICES[node.target], node.args, node.kwargs)
        pooled.meta = dict(maxima[0].meta)
        for user in users:
            if user in maxima:
                user.replace_all_uses_with(pooled)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def pooling(node: fx.Node) -> Form | None:
    """The form of a pooling of images or rows; None for others."""
    x = node.args[0] if node.args else None
    shape, out = shape_of(x) if is_value(x) else None, shape_of(node)
    if not is_value(x) or not shape or not out or len(shape) not in _RANKS or not same_shape(shape[:2], out[:2]):
        return None
    largest, mean, adaptive = _RANKS[len(shape)]
    rows = len(shape) == 3
    if rows and not all(isinstance(size, int) for size in (*shape[1:], *out[1:])):
        return None
    # A row is an image of one row.
    image, made = ((*shape[:2], 1, shape[2]), (*out[:2], 1, out[2])) if rows else (shape, out)
    make: Callable[[int], Step] | None = None
    if node.target in largest:
        make = _pooled(_largest(node, rows), image, made)
    elif node.target in mean:
        make = _pooled(_mean(node, rows), image, made)
    elif node.target in adaptive:
        make = _adaptive(image, made)
    elif node.target in LARGEST and bound(node, ("input", "output_size", "return_indices"), (None, None, False))[2] is False:
        make = _adaptive(image, made, largest=True)
    if make is None:
        return None
    if not rows:
        return Form((x,), lambda emit, values: emit(make(values[0])))
    return Form((x,), lambda emit, values: emit(View(emit(make(emit(View(values[0], image[1:])))), tuple(out[1:]))))


def _pooled(window: Window | None, shape: tuple[Any, ...], out: tuple[Any, ...]) -> Callable[[int], Step] | None:
    if window is None:
        return None
    if window.ceil and same_shape(replace(window, ceil=False).places(shape[2:]), out[2:]):
        window = replace(window, ceil=False)
    try:
        known = same_shape(window.shape(shape), out)
    except KernelError:
        return None
    return (lambda v: Pool(v, window)) if known else None


def _largest(node: fx.Node, rows: bool) -> Window | None:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    _, kernel, stride, padding, dilation, ceil, indices = bound(node, names, (None, None, None, 0, 1, False, False))
    if indices or not _numbers(kernel, stride, padding, dilation) or not isinstance(ceil, bool):
        return None
    sizes = (_pair(kernel, rows), _pair(stride or kernel, rows), _pair(padding, rows, 0))
    return Window(False, *sizes, dilation=_pair(dilation, rows), ceil=ceil)


def _mean(node: fx.Node, rows: bool) -> Window | None:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    _, kernel, stride, padding, ceil, counted, divisor = bound(node, names, (None, None, None, 0, False, True, None))
    if not _numbers(kernel, stride, padding, divisor) or not isinstance(ceil, bool) or not isinstance(counted, bool):
        return None
    sizes = (_pair(kernel, rows), _pair(stride or kernel, rows), _pair(padding, rows, 0))
    return Window(True, *sizes, ceil=ceil, counted=counted or sizes[2] == (0, 0), divisor=divisor)


def _adaptive(shape: tuple[Any, ...], out: tuple[Any, ...], largest: bool = False) -> Callable[[int], Step] | None:
    if tuple(out[2:]) == (1, 1):
        return lambda v: Pool(v, Window(not largest))
    sizes = (*shape[2:], *out[2:])
    if not all(isinstance(v, int) and v for v in sizes):
        return None
    if sizes[0] % sizes[2] or sizes[1] % sizes[3]:
        return None if largest else lambda v: Resize(v, "mean", tuple(out[2:]))
    kernel = (sizes[0] // sizes[2], sizes[1] // sizes[3])
    return lambda v: Pool(v, Window(not largest, kernel, kernel))


def _numbers(*values: Any) -> bool:
    """Whether a pooling's sizes are known: ints, pairs of them, or (a stride) left out."""
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return all(v is None or isinstance(v, int) for v in flat)


def _pair(value: Any, rows: bool, first: int = 1) -> tuple[int, int]:
    """Of rows and columns; a single row has ``first``."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return (first, int(values[0])) if rows else (int(values[0]), int(values[-1]))
