"""The element-wise step: a chain of functions of one or two operands, in one pass through memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.convolutions import Depthwise, LookUp
from lcnn_compile.kernels.cpu.step import MAP, Native, Shape, Site, Step, broadcast, coalesced, contiguous_strides, numbers

FUNCTIONS = {
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), 2),
    **dict.fromkeys(("neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sigmoid", "tanh", "erf"), 1),
    **dict.fromkeys(("relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "clamp", "mish"), 1),
    **{"softplus": 1, "prelu": 2, "logsigmoid": 1, "softsign": 1},
}
"""Functions and how many operands they take, in the order of lcnn::Function. Parameters: of ``add`` and ``sub`` the factor of the
second operand, of ``leaky_relu`` the slope, of ``elu`` alpha and scale, of ``clamp`` both bounds, of ``softplus`` beta and threshold."""
CODES = {name: code for code, name in enumerate(FUNCTIONS)}
PARAMETERS = {"add": (1.0,), "sub": (1.0,)}
DIMENSIONS, OPERANDS, OPERATIONS = 6, 8, 32
"""lcnn::MAP_DIMENSIONS and so on."""

Operation = tuple[str, tuple[int, ...], tuple[float, ...]]
"""A function, the registers of its operands, its parameters."""


class _Operation(ctypes.Structure):
    """lcnn::Operation."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("function", "a", "b", "to")),
        *((name, ctypes.c_double) for name in ("u", "v")),
    )


class NativeMap(ctypes.Structure):
    """lcnn::Map."""

    _fields_ = (
        ("sizes", numbers(DIMENSIONS)),
        ("to", numbers(DIMENSIONS)),
        ("operands", ctypes.c_int64),
        ("strides", numbers(DIMENSIONS) * OPERANDS),
        ("constants", ctypes.c_void_p * OPERANDS),
        ("count", ctypes.c_int64),
        ("buffers", ctypes.c_int64),
        ("operations", _Operation * OPERATIONS),
    )


@dataclass(frozen=True)
class Map(Step):
    """Functions of values, constants and numbers that are broadcast against each other; the last one's result is the value.

    Registers are numbered: the ``inputs`` (values), the constants, the numbers, the result of each operation. Weights: the
    constants, tensors of these shapes.
    """

    inputs: tuple[int, ...]
    constants: tuple[Shape, ...]
    numbers: tuple[float, ...]
    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        operands = len(self.inputs) + len(self.constants) + len(self.numbers)
        if not self.inputs or operands > OPERANDS or not 0 < len(self.operations) <= OPERATIONS:
            raise KernelError(f"an element-wise step takes 1 to {OPERANDS} operands and {OPERATIONS} operations; it has {self}")
        for i, (name, registers, parameters) in enumerate(self.operations):
            if name not in FUNCTIONS or len(registers) != FUNCTIONS[name] or len(parameters) > 2:
                raise KernelError(f"{name!r} of {registers} is no element-wise operation; allowed are {sorted(FUNCTIONS)}")
            if not all(0 <= register < operands + i for register in registers):
                raise KernelError(f"an element-wise {name!r} reads register {registers}; there are {operands + i}")

    @property
    def reads(self) -> tuple[int, ...]:
        """The inputs."""
        return self.inputs

    def renumbered(self, place: Mapping[int, int] | Sequence[int]) -> Map:
        """The same with other numbers."""
        return replace(self, inputs=tuple(place[x] for x in self.inputs))

    @property
    def weighted(self) -> bool:
        """Where it has constants."""
        return bool(self.constants)

    @property
    def in_place(self) -> bool:
        """Each element is read before it is written."""
        return True

    @property
    def hands_on(self) -> bool:
        """Whether a step of the same kind may go on with the result as it stands in registers."""
        return True

    def joined_with(self, first: Map, made: Map) -> Map:
        """A step of this kind from ``made``, which does what ``first`` does and then this."""
        return made

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """That of the operands broadcast."""
        found = broadcast([*(shapes[x] for x in self.inputs), *self.constants])
        if len(found) > DIMENSIONS:
            raise KernelError(
                f"a program's element-wise step would make a value of shape {found}; {DIMENSIONS} dimensions at most"
            )
        return found

    def native(self, site: Site) -> list[Native]:
        """One call."""
        y = site.shapes[site.y]
        held = [ctypes.c_float(number) for number in self.numbers]
        addresses = [None] * len(self.inputs) + [constant.data_ptr() for constant in site.weights]
        addresses += [ctypes.addressof(number) for number in held]
        strides = [_broadcast_strides(site.shapes[x], y, site.images[x]) for x in self.inputs]
        strides += [_broadcast_strides(shape, y, None) for shape in self.constants] + [(0,) * len(y)] * len(held)
        to = (site.images[site.y], *contiguous_strides(y)[1:]) if y else ()
        sizes, (target, *sources) = coalesced(y, [to, *strides], DIMENSIONS)
        if target[-1] != 1 and sizes[-1] != 1:
            # Images of one element that lie apart: rows of one, as the library writes rows without gaps.
            sizes, target, sources = [*sizes[1:], 1], [*target[1:], 1], [[*row[1:], 0] for row in sources]
        operations, buffers = self._registers()
        made = NativeMap(
            (ctypes.c_int64 * DIMENSIONS)(*sizes),
            (ctypes.c_int64 * DIMENSIONS)(*target),
            len(sources),
            count=len(operations),
            buffers=buffers,
        )
        for i, (row, address) in enumerate(zip(sources, addresses, strict=True)):
            made.strides[i] = (ctypes.c_int64 * DIMENSIONS)(*row)
            made.constants[i] = address
        for i, operation in enumerate(operations):
            made.operations[i] = operation
        return [Native(MAP, made, self.inputs, (*held, *site.weights))]

    def _registers(self) -> tuple[list[_Operation], int]:
        """The operations with a buffer for each result, used again once nobody reads it any more; and how many there are."""
        operands = len(self.inputs) + len(self.constants) + len(self.numbers)
        last = {register: i for i, (_, registers, _) in enumerate(self.operations) for register in registers}
        place = {i: i for i in range(operands)}
        free: list[int] = []
        made, buffers = [], 0
        for i, (name, registers, parameters) in enumerate(self.operations):
            a, b = (place[registers[0]], place[registers[-1]])
            free += {place[r] for r in registers if r >= operands and last[r] == i}
            if not free:
                free.append(operands + buffers)
                buffers += 1
            place[operands + i] = free.pop()
            u, v = (*(parameters or PARAMETERS.get(name, ())), 0.0, 0.0)[:2]
            made.append(_Operation(CODES[name], a, b, place[operands + i], u, v))
        return made, buffers


def _broadcast_strides(shape: Shape, out: Shape, image: int | None) -> tuple[int, ...]:
    """Strides by which a value, or a contiguous constant, is read as one of shape ``out``."""
    strides = list(contiguous_strides(shape)) if shape else []
    if image is not None and strides:
        strides[0] = image
    return (0,) * (len(out) - len(shape)) + tuple(0 if size == 1 else step for size, step in zip(shape, strides, strict=True))


Weights = Sequence[tuple[Any, ...]]
EPILOGUES: dict[tuple[str, tuple[float, ...]], str] = {
    ("relu", ()): "relu",
    ("clamp", (0.0, 6.0)): "relu6",
    ("silu", ()): "silu",
    ("hardswish", ()): "hardswish",
}
"""Functions that a convolution applies to its sums before it writes them."""


def merged(steps: Sequence[Step], inputs: int, outputs: Sequence[int], weights: Weights, shapes: Sequence[Shape]) -> Any:
    """The same steps, outputs and weights with chains of element-wise steps joined where nothing else reads what is in between."""
    readers: dict[int, set[int]] = {}
    for number, step in enumerate(steps):
        for x in step.reads:
            readers.setdefault(x, set()).add(number)
    left: list[tuple[Step, tuple[Any, ...]] | None] = []
    given = iter(weights)
    for number, step in enumerate(steps):
        own = next(given) if step.weighted else ()
        while isinstance(step, Map):
            joined = None
            for x in step.inputs:
                before = left[x - inputs] if x >= inputs else None
                alone = readers[x] == {number} and x not in outputs
                first = before[0] if before is not None else None
                if isinstance(first, Map) and _joins(first, step) and alone and shapes[x] == shapes[inputs + number]:
                    joined = _joined(first, before[1], x, step, own)  # type: ignore[index]
                    if joined is not None:
                        left[x - inputs] = None
                        for source in first.inputs:
                            readers[source] = readers[source] - {x - inputs} | {number}
                        break
            if joined is None:
                break
            step, own = joined
        left.append((step, own))
    _absorb(left, inputs, outputs, readers, shapes)
    place = {x: x for x in range(inputs)}
    kept: list[Step] = []
    held: list[tuple[Any, ...]] = []
    for number, entry in enumerate(left):
        if entry is None:
            continue
        kept.append(entry[0].renumbered(place))
        if entry[0].weighted:
            held.append(entry[1])
        place[inputs + number] = inputs + len(kept) - 1
    return tuple(kept), tuple(place[y] for y in outputs), held


def _joins(first: Map, second: Map) -> bool:
    """Whether one step may do what both do, as far as their kinds go."""
    return type(first) is type(second) and first.hands_on


def _joined(first: Map, first_weights: Sequence[Tensor], x: int, second: Map, second_weights: Sequence[Tensor]) -> Any:
    """One step that does both, the second of which reads the first as value ``x``; None where it would be too large."""
    inputs = list(dict.fromkeys([*first.inputs, *(v for v in second.inputs if v != x)]))
    numbers = list(dict.fromkeys([*first.numbers, *second.numbers]))
    constants = [*first.constants, *second.constants]
    operands = len(inputs) + len(constants) + len(numbers)
    if operands > OPERANDS or len(first.operations) + len(second.operations) > OPERATIONS:
        return None

    def registers(step: Map, constants_before: int, operations_before: int) -> list[int]:
        result = operands + len(first.operations) - 1
        found = [result if v == x and step is second else inputs.index(v) for v in step.inputs]
        found += [len(inputs) + constants_before + i for i in range(len(step.constants))]
        found += [len(inputs) + len(constants) + numbers.index(v) for v in step.numbers]
        return found + [operands + operations_before + i for i in range(len(step.operations))]

    operations: list[Operation] = []
    for step, before, done in ((first, 0, 0), (second, len(first.constants), len(first.operations))):
        place = registers(step, before, done)
        operations += [(name, tuple(place[r] for r in read), parameters) for name, read, parameters in step.operations]
    made = second.joined_with(first, Map(tuple(inputs), tuple(constants), tuple(numbers), tuple(operations)))
    return made, (*first_weights, *second_weights)


def _absorb(
    left: list[tuple[Step, tuple[Any, ...]] | None],
    inputs: int,
    outputs: Sequence[int],
    readers: Mapping[int, set[int]],
    shapes: Sequence[Shape],
) -> None:
    """Let convolutions do what follows them and what they can: an activation, the addition of a value of the same shape."""
    for number, entry in enumerate(left):
        if entry is None or type(entry[0]) is not Map or entry[0].constants:
            continue
        step, y = entry[0], inputs + number
        for x in step.inputs:
            before = left[x - inputs] if x >= inputs else None
            if before is None or readers[x] != {number} or x in outputs or shapes[x] != shapes[y]:
                continue
            ending = _ending(step, x, shapes, y)
            conv: Any = before[0]
            free = type(conv) in (LookUp, Depthwise) and conv.activation == "none" and conv.residual is None
            free = free and getattr(conv, "pool", None) is None
            if ending is None or not free:
                continue
            activation, residual, last = ending
            left[number] = (replace(conv, activation=activation, residual=residual, residual_last=last), before[1])
            left[x - inputs] = None
            break


def _ending(step: Map, x: int, shapes: Sequence[Shape], y: int) -> tuple[str, int | None, bool] | None:
    """Activation, residual and whether that comes last, where a step does no more than this to value ``x``."""
    if step.numbers or len(step.inputs) > 2 or len(step.operations) > 2:
        return None
    own = step.inputs.index(x)
    other = None if len(step.inputs) == 1 else step.inputs[1 - own]
    activation, residual, last, register = "none", None, False, own
    for i, (name, read, parameters) in enumerate(step.operations):
        if name == "add" and parameters in ((), (1.0,)) and other is not None and residual is None:
            if sorted(read) != sorted((register, 1 - own)) or tuple(shapes[other]) != tuple(shapes[y]):
                return None
            residual, last = other, activation != "none"
        elif (name, parameters) in EPILOGUES and read == (register,) and activation == "none" and not last:
            activation = EPILOGUES[name, parameters]
        else:
            return None
        register = len(step.inputs) + i
    return None if other is not None and residual is None else (activation, residual, last)
