"""Programs: several operations of a network in one native call, with their values in one arena of memory (CPU, float32).

A call of a small layer costs more in Python and in the dispatcher than in arithmetic, and a network is many layers. The
operator ``lcnn::run_program`` runs a program inside a larger compiled graph; a graph that is one program needs no compiler.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu.arena import Placement, place, settled
from lcnn_compile.kernels.cpu.elementwise import Weights, merged
from lcnn_compile.kernels.cpu.lanes import IMAGES, LARGEST, side_by_side
from lcnn_compile.kernels.cpu.step import MOST_READ, Shape, Site, Step
from lcnn_compile.kernels.cpu.steps import LookUp, Recipe, pooled
from lcnn_compile.kernels.cpu.threads import thread_count
from lcnn_compile.kernels.library import library

INSTANCES = 32
POOL_FROM = 2 << 20
"""Elements of an output that would push everything else out of the caches before it is pooled."""


class _Step(ctypes.Structure):
    """lcnn::Step."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("of", ctypes.c_void_p),
        ("y", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("x", ctypes.c_int64 * MOST_READ),
    )


class _Place(ctypes.Structure):
    """lcnn::Place."""

    _fields_ = (("tensor", ctypes.c_int64), ("offset", ctypes.c_int64))


class _Instance(NamedTuple):
    """A program for inputs of certain shapes and strides."""

    handle: cpu.Handle
    recipe: Recipe  # as it is run
    copied: list[int]  # the inputs that must be made contiguous
    shapes: list[Shape]  # of the outputs
    of: list[int]  # the number of the step that each call of the library belongs to
    owned: list[Any]  # what the library's program points to
    turned: bool  # the images lie side by side in between


class Program:
    """A recipe with its weights, ready to run.

    Args:
        recipe: the steps.
        weights: an entry for each step that has weights, in order: what the step's class says; float32 on the CPU. Tensors are copied.

    Attributes:
        handle: a number by which the operator finds it for as long as it lives.
        weights: as given.
        runs: calls so far.

    Raises:
        KernelError: the C++ kernels are unavailable.
    """

    def __init__(self, recipe: Recipe, weights: Sequence[tuple[cpu.PackedWeight | Tensor | None, ...]]):
        found = cpu_build.library()
        if found is None:
            raise KernelError("a program needs the C++ kernels, which are unavailable")
        self.recipe = recipe
        self._library = found
        self.weights = [tuple(_own(part) if isinstance(part, Tensor) else part for part in entry) for entry in weights]
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
        instance = self._instance(inputs)
        seconds = (ctypes.c_double * len(instance.of))()
        for _ in range(calls):
            self._run(inputs, seconds)
        recipe = instance.recipe
        shapes = recipe.shapes([x.shape for x in inputs])[recipe.inputs :]
        totals: dict[int, float] = {}
        for number, total in zip(instance.of, seconds, strict=True):
            totals[number] = totals.get(number, 0.0) + total
        return [(recipe.steps[number], shapes[number], total / calls) for number, total in totals.items()]

    def seconds(self, *inputs: Tensor) -> float:
        """Of one call, what its steps take, without what Python adds."""
        images = self._side_by_side(inputs)
        steps = (ctypes.c_double * len(self._instance(tuple(x[:images] for x in inputs) if images else inputs).of))()
        self._run(inputs, steps)
        return sum(steps)

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
        joined = merged(self.recipe.steps, self.recipe.inputs, self.recipe.outputs, self.weights, self.recipe.shapes(given))
        base, weights = Recipe(self.recipe.inputs, joined[0], joined[1]), joined[2]
        known = base.shapes(given)
        turned = side_by_side(base, known, self._images) if self._images else None
        recipe = pooled(base, known, POOL_FROM) if turned is None else pooled(turned, turned.shapes(given), LARGEST)
        shapes = recipe.shapes(given)
        recipe = settled(recipe, shapes)
        shapes = recipe.shapes(given)
        # Lookups read any strides but that of a row, everything else reads contiguous tensors.
        strided = {s.x for s in recipe.steps if isinstance(s, LookUp)} - {
            value for s in recipe.steps for value in (s.reads[1:] if isinstance(s, LookUp) else s.reads)
        }
        copied = [i for i, x in enumerate(inputs) if not (x.is_contiguous() or (i in strided and x.stride(3) == 1))]
        strides = {i: inputs[i].stride() for i in strided if i < len(inputs) and i not in copied}
        placement = place(recipe, shapes)
        calls, of, owned = self._calls(recipe, shapes, placement, strides, weights, threads)
        places = (_Place * len(shapes))(*map(_Place, placement.tensors, placement.offsets))
        array = (_Step * len(calls))(*calls)
        address = self._library.lcnn_program_new(array, len(calls), places, len(places), placement.size, threads)
        handle = cpu.Handle(address, self._library.lcnn_program_free)
        return _Instance(handle, recipe, copied, [shapes[v] for v in recipe.outputs], of, owned, turned is not None)

    def _calls(
        self, recipe: Recipe, shapes: list[Shape], placement: Placement, strides: dict[int, Any], weights: Weights, threads: int
    ) -> tuple[list[_Step], list[int], list[Any]]:
        """The library's steps, the steps that each belongs to, and the objects that must outlive them."""
        calls, of, owned = [], [], []
        entries = iter(weights)
        for number, step in enumerate(recipe.steps):
            own = next(entries) if step.weighted else ()
            y = recipe.inputs + number
            site = Site(y, shapes, placement.images, strides, own, threads, placement.copied.get(y, ()), placement.elements)
            for made in step.native(site):
                reads = (ctypes.c_int64 * MOST_READ)(*made.reads)
                calls.append(_Step(made.kind, ctypes.addressof(made.of), y, len(made.reads), reads))
                of.append(number)
                owned.append(made)
        return calls, of, owned


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy, without its history."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


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
