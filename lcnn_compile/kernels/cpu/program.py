"""Programs: several operations of a network in one native call, with their values in one arena of memory (CPU, float32).

A call of a small layer costs more in Python and in the dispatcher than in arithmetic, and a network is many layers. The
operator ``lcnn::run_program`` runs a program inside a larger compiled graph; a graph that is one program needs no compiler.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu.lanes import IMAGES, LARGEST, side_by_side
from lcnn_compile.kernels.cpu.steps import Linear, LookUp, Pool, Recipe, Shape, Step, Turn, View, Window, pooled
from lcnn_compile.kernels.cpu.threads import thread_count
from lcnn_compile.kernels.library import library

LINE = 16
"""Floats in a cache line."""
INSTANCES = 32
POOL_FROM = 2 << 20
"""Elements of an output that would push everything else out of the caches before it is pooled."""
LOOK_UP, POOL, TURN, LINEAR = range(4)
"""lcnn::Kind."""


class _Linear(ctypes.Structure):
    """lcnn::Linear."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("images", "inputs", "outputs")),
    )


class _Step(ctypes.Structure):
    """lcnn::Step."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("plan", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x", "residual", "y")),
        ("pool", cpu.Pooling),
        ("linear", _Linear),
    )


class _Instance(NamedTuple):
    """A program for inputs of certain shapes and strides."""

    handle: cpu.Handle
    recipe: Recipe  # as it is run
    copied: list[int]  # the inputs that must be made contiguous
    shapes: list[Shape]  # of the outputs
    owned: list[Any]  # what the library's program points to
    turned: bool  # the images lie side by side in between


class Program:
    """A recipe with its weights, ready to run.

    Args:
        recipe: the steps.
        weights: of each lookup convolution and linear layer, in order: the packed weight, or the weight [n, m], and the bias
            [n] or None; float32 on the CPU. Tensors are copied.

    Attributes:
        handle: a number by which the operator finds it for as long as it lives.
        runs: calls so far.

    Raises:
        KernelError: the C++ kernels are unavailable.
    """

    def __init__(self, recipe: Recipe, weights: Sequence[tuple[cpu.PackedWeight | Tensor, Tensor | None]]):
        found = cpu_build.library()
        if found is None:
            raise KernelError("a program needs the C++ kernels, which are unavailable")
        self.recipe = recipe
        self._library = found
        self._weights = [
            (_own(weight) if isinstance(weight, Tensor) else weight, None if bias is None else _own(bias))
            for weight, bias in weights
        ]
        self._instances: dict[tuple[Any, ...], _Instance] = {}
        self._images = IMAGES.get(cpu_build.instruction_set(), 0)
        self.runs = 0
        self.handle = next(_numbers)
        _alive[self.handle] = self

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs, new and contiguous, for float32 CPU tensors.

        Raises:
            KernelError: for other dtypes or devices, or shapes that do not fit.
        """
        return self._run(inputs, None)

    def profile(self, *inputs: Tensor, calls: int = 10) -> list[tuple[Step, Shape, float]]:
        """Every step but views, with the shape of its result and its mean seconds over some calls, after one that is not counted.

        A batch that is run in parts counts as one of its whole parts.
        """
        self._run(inputs, None)
        images = self._side_by_side(inputs)
        inputs = tuple(x[:images] for x in inputs) if images else inputs
        recipe = self._instance(inputs).recipe
        steps = [(i, step) for i, step in enumerate(recipe.steps) if not isinstance(step, View)]
        seconds = (ctypes.c_double * len(steps))()
        for _ in range(calls):
            self._run(inputs, seconds)
        shapes = recipe.shapes([x.shape for x in inputs])[recipe.inputs :]
        return [(step, shapes[i], total / calls) for (i, step), total in zip(steps, seconds, strict=True)]

    def _instance(self, inputs: tuple[Tensor, ...]) -> _Instance:
        threads = thread_count()
        key = (threads, *[(x.shape, x.stride(), x.dtype, x.device) for x in inputs])
        instance = self._instances.get(key)
        if instance is None:
            instance = self._prepare(inputs, threads)
            if len(self._instances) >= INSTANCES:
                self._instances = {}
            self._instances[key] = instance
        return instance

    def _side_by_side(self, inputs: tuple[Tensor, ...]) -> int:
        """How many images are run at a time, side by side; 0 where the batch is run as it is."""
        images = self._images
        if not images or not inputs or any(x.dim() < 2 or x.shape[0] != inputs[0].shape[0] for x in inputs):
            return 0
        if inputs[0].shape[0] < images:
            return 0
        return images if self._instance(tuple(x[:images] for x in inputs)).turned else 0

    def _run(self, inputs: tuple[Tensor, ...], seconds: Any) -> list[Tensor]:
        # Values that are negated when read, as parts of conjugated tensors are; the dispatcher sees to it for operators.
        inputs = tuple(x.resolve_neg() if x.is_neg() else x for x in inputs)
        self.runs += 1
        images = self._side_by_side(inputs)
        if not images:
            instance = self._instance(inputs)
            outputs = [torch.empty(shape, dtype=torch.float32) for shape in instance.shapes]
            self._run_part(instance, inputs, outputs, seconds)
            return outputs
        batch = len(inputs[0])
        outputs = []
        for start in range(0, batch, images):
            part = inputs if batch == images else tuple(x[start : start + images] for x in inputs)
            instance = self._instance(part)
            if not start:
                outputs = [torch.empty((batch, *shape[1:]), dtype=torch.float32) for shape in instance.shapes]
            self._run_part(instance, part, [y[start : start + images] for y in outputs], seconds)
        return outputs

    def _run_part(self, instance: _Instance, inputs: Sequence[Tensor], outputs: Sequence[Tensor], seconds: Any) -> None:
        if instance.copied:
            inputs = tuple(x.contiguous() if i in instance.copied else x for i, x in enumerate(inputs))
        addresses = (ctypes.c_void_p * (len(inputs) + len(outputs)))(*[cpu.address_of(t) for t in (*inputs, *outputs)])
        if self._library.lcnn_program_run(instance.handle.address, addresses, seconds):
            raise KernelError(f"no memory for a program with inputs of shapes {[tuple(x.shape) for x in inputs]}")

    def _prepare(self, inputs: Sequence[Tensor], threads: int) -> _Instance:
        for x in inputs:
            if x.dtype != torch.float32 or not x.is_cpu or x.layout != torch.strided:
                raise KernelError(f"a program got an input of {x.dtype} on {x.device}; float32 on the CPU is required")
        given = [x.shape for x in inputs]
        known = self.recipe.shapes(given)
        turned = side_by_side(self.recipe, known, self._images) if self._images else None
        recipe = pooled(self.recipe, known, POOL_FROM) if turned is None else pooled(turned, turned.shapes(given), LARGEST)
        shapes = recipe.shapes(given)
        # Lookups read any strides but that of a row, everything else reads contiguous tensors.
        strided = {s.x for s in recipe.steps if isinstance(s, LookUp)} - {
            value for s in recipe.steps for value in ([s.residual] if isinstance(s, LookUp) else [s.x]) if value is not None
        }
        copied = [i for i, x in enumerate(inputs) if not (x.is_contiguous() or (i in strided and x.stride(3) == 1))]
        strides = {i: inputs[i].stride() if i not in copied else None for i in strided if i < len(inputs)}
        places, arena = allocate(recipe, shapes)
        steps, owned = self._steps(recipe, shapes, strides, threads)
        array, numbers = (_Step * len(steps))(*steps), (ctypes.c_int64 * len(places))(*places)
        address = self._library.lcnn_program_new(array, len(steps), numbers, len(places), arena, threads)
        handle = cpu.Handle(address, self._library.lcnn_program_free)
        return _Instance(handle, recipe, copied, [shapes[v] for v in recipe.outputs], owned, turned is not None)

    def _steps(self, recipe: Recipe, shapes: list[Shape], strides: dict[int, Any], threads: int) -> tuple[list[_Step], list[Any]]:
        """The library's steps and the objects that must outlive them; views take none."""
        steps, owned = [], []
        weights = iter(self._weights)
        for number, step in enumerate(recipe.steps):
            y = recipe.inputs + number
            if isinstance(step, LookUp):
                packed, bias = next(weights)
                assert isinstance(packed, cpu.PackedWeight)
                x, strides_of_x = shapes[step.x], strides.get(step.x) or contiguous_strides(shapes[step.x])
                epilogue = (step.activation, step.residual_last)
                convolved = step.convolved(shapes)
                pool = None if step.pool is None else _pooling(step.pool, convolved)
                geometry = (step.stride, step.dilation, step.padding)
                plan = packed.plan(x, strides_of_x, convolved, *geometry, *epilogue, threads, pool)
                owned.append(plan)
                bias_address = None if bias is None else bias.data_ptr()
                residual = -1 if step.residual is None else step.residual
                steps.append(_Step(LOOK_UP, plan.address, bias_address, step.x, residual, y))
            elif isinstance(step, Pool):
                steps.append(_Step(POOL, None, None, step.x, -1, y, _pooling(step.window, shapes[step.x])))
            elif isinstance(step, Linear):
                weight, bias = next(weights)
                assert isinstance(weight, Tensor)
                bias_address = None if bias is None else bias.data_ptr()
                layer = _Linear(weight.data_ptr(), bias_address, shapes[y][0], step.in_features, step.out_features)
                steps.append(_Step(LINEAR, None, None, step.x, -1, y, linear=layer))
            elif isinstance(step, Turn):
                rows = step.images if step.inside else math.prod(shapes[y][1:])
                matrix = cpu.Pooling(planes=rows, width=math.prod(shapes[y]) // rows)
                steps.append(_Step(TURN, None, None, step.x, -1, y, matrix))
        return steps, owned


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy, without its history."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _pooling(window: Window, shape: Shape) -> cpu.Pooling:
    batch, channels, height, width = shape
    pair = ctypes.c_int64 * 2
    kernel = pair(*(window.kernel_size or (height, width)))
    high, wide = window.shape(shape)[2:]
    # A single window may be said to tile its plane.
    stride = pair(
        *(size if out == 1 else step for size, out, step in zip(kernel, (high, wide // window.lanes), window.stride, strict=True))
    )
    sizes = (batch * channels, height, width, high, wide)
    top, left = window.padding
    return cpu.Pooling(*sizes, kernel, stride, top, left * window.lanes, int(window.mean), window.lanes)


def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def allocate(recipe: Recipe, shapes: Sequence[Shape]) -> tuple[list[int], int]:
    """The place of every value, and the floats of the arena: values share memory where their lives do not overlap.

    An offset in the arena, or -1 - i for tensor i of the caller's inputs and outputs. A view lies where its source lies.
    """
    root = list(range(len(shapes)))
    last = [0] * len(shapes)
    for number, step in enumerate(recipe.steps):
        if isinstance(step, View):
            root[recipe.inputs + number] = root[step.x]
        for value in (step.x, getattr(step, "residual", None)):
            if value is not None:
                last[root[value]] = number
    places: dict[int, int] = {i: -1 - i for i in range(recipe.inputs)}
    for i, value in enumerate(recipe.outputs):
        if root[value] in places:
            raise KernelError("a program may not return an input, nor a value twice")
        places[root[value]] = -1 - recipe.inputs - i
    live: list[tuple[int, int, int]] = []  # offset, end, last use
    arena = 0
    for number in range(len(recipe.steps)):
        value = recipe.inputs + number
        if root[value] != value or value in places:
            continue
        live = sorted(entry for entry in live if entry[2] >= number)
        size = math.prod(shapes[value])
        size = -(-size // LINE) * LINE
        offset = 0
        for start, end, _ in live:
            if start - offset >= size:
                break
            offset = max(offset, end)
        places[value] = offset
        live.append((offset, offset + size, last[value]))
        arena = max(arena, offset + size)
    return [places[root[value]] for value in range(len(shapes))], arena


_numbers = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()


def lookups_run() -> int:
    """Lookup convolutions that programs alive now have run."""
    return sum(p.runs * sum(isinstance(step, LookUp) for step in p.recipe.steps) for p in list(_alive.values()))


_recipe = lru_cache(maxsize=256)(Recipe.from_json)

library.define("run_program(Tensor[] inputs, Tensor handle, str recipe) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def _run(inputs: Sequence[Tensor], handle: Tensor, recipe: str) -> list[Tensor]:
    if handle.numel() != 1 or handle.dtype != torch.int64:
        raise KernelError(f"run_program: the handle is {handle.dtype} {tuple(handle.shape)}; one int64 is required")
    program = _alive.get(int(handle))
    if program is None or program.recipe != _recipe(recipe):
        raise KernelError(f"run_program: no program of that recipe lives under the handle {int(handle)}")
    return program(*inputs)


def _fake(inputs: Sequence[Tensor], handle: Tensor, recipe: str) -> list[Tensor]:
    shapes = _recipe(recipe).shapes([x.shape for x in inputs])
    if not inputs:
        raise KernelError("run_program: a program without inputs")
    return [inputs[0].new_empty(shapes[value], dtype=torch.float32) for value in _recipe(recipe).outputs]


library.impl("run_program", _run, "CPU")
torch.library.register_fake("lcnn::run_program", _fake, lib=library)
run_program = torch.ops.lcnn.run_program.default
