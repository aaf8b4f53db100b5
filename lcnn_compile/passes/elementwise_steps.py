"""Which nodes of a graph a program computes element by element, and how."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from lcnn_compile.kernels.cpu.elementwise import DIMENSIONS, Map, Operation
from lcnn_compile.passes.signatures import operation_of
from lcnn_compile.passes.step_form import Emit, Form, Values, is_plain, is_value
from lcnn_compile.passes.targets import BATCH_NORM, attribute, bound, is_get_attr, shape_of

PLAIN = {
    *("neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "sigmoid", "tanh", "logsigmoid", "softsign"),
    *("relu", "silu", "hardswish", "hardsigmoid", "mish", "mul", "maximum", "minimum"),
}
"""Operations that are a function of the same name, without parameters."""
SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
POWERS = {1.0: (), 2.0: ("square",), 0.5: ("sqrt",), -1.0: ("reciprocal",), -0.5: ("rsqrt",), 4.0: ("square", "square")}
"""Exponents, and the functions that raise to them one after the other."""


def elementwise(gm: fx.GraphModule, node: fx.Node) -> Form | None:
    """The form of an element-wise operation on float32 tensors, constants and numbers; None where it is none, or another kind."""
    out = shape_of(node)
    if out is None or not 0 < len(out) <= DIMENSIONS:
        return None
    if node.target in BATCH_NORM:
        return _batch_norm(gm, node, len(out))
    found = operation_of(node)
    if found is None:
        return None
    name, arguments = found
    if "input" not in arguments:
        return None
    operands = [arguments.pop("input")]
    for key in ("other", "weight"):
        if key in arguments:
            operands.append(arguments.pop(key))
    chain = _functions(name, arguments)
    if chain is None:
        return None
    if name == "rsub":
        operands.reverse()
    if name == "celu":
        operands.append(1 / arguments["alpha"])
    if name == "prelu":
        operands[1] = _per_channel(gm, operands[1], len(out))
    return _form(gm, operands, chain)


def _functions(name: str, arguments: dict[str, Any]) -> list[tuple[str, tuple[float, ...]]] | None:
    """Functions with parameters, the first of all operands, the others of its result."""
    given = {key: value for key, value in arguments.items() if key != "inplace"}
    if any(value is not None and not isinstance(value, int | float | str) for value in given.values()):
        return None
    if name in PLAIN:
        return [(name, ())]
    if name in ("add", "sub", "rsub"):
        return [(name.removeprefix("r"), (float(given.get("alpha", 1)),))]
    if name == "div":
        return [("div", ())] if given.get("rounding_mode") is None else None
    if name == "prelu":
        return [("prelu", ())]
    if name == "leaky_relu":
        return [("leaky_relu", (float(given["negative_slope"]),))]
    if name == "elu":
        plain = given.get("input_scale", 1) == 1
        return [("elu", (float(given["alpha"]), float(given.get("scale", 1))))] if plain else None
    if name == "celu":  # alpha·elu(x / alpha)
        return [("mul", ()), ("elu", (1.0, float(given["alpha"])))] if given["alpha"] else None
    if name == "selu":
        return [("elu", SELU)]
    if name == "gelu":
        return [("gelu" if given["approximate"] == "none" else "gelu_tanh", ())]
    if name == "softplus":
        return [("softplus", (float(given["beta"]), float(given["threshold"])))]
    if name == "pow":
        exponent = given["exponent"]
        functions = POWERS.get(float(exponent)) if isinstance(exponent, int | float) else None
        return [(function, ()) for function in functions] if functions else None
    if name == "relu6":
        return [("clamp", (0.0, 6.0))]
    low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
    if name not in ("clamp", "clamp_min", "clamp_max", "hardtanh") or (low is None and high is None):
        return None
    return [("clamp", (-math.inf if low is None else float(low), math.inf if high is None else float(high)))]


def _form(gm: fx.GraphModule, operands: list[Any], chain: list[tuple[str, tuple[float, ...]]]) -> Form | None:
    sorts: dict[str, list[Any]] = {"value": [], "constant": [], "number": []}
    places: list[tuple[str, int]] = []
    for operand in operands:
        found = _operand(gm, operand)
        if found is None:
            return None
        sort, value = found
        if sort != "value" or value not in sorts[sort]:
            sorts[sort].append(value)
        places.append((sort, sorts[sort].index(value) if sort == "value" else len(sorts[sort]) - 1))
    inputs, constants, numbers = sorts.values()
    if not inputs or any(math.isnan(p) for _, parameters in chain for p in parameters):
        return None
    first = {"value": 0, "constant": len(inputs), "number": len(inputs) + len(constants)}
    registers = tuple(first[sort] + i for sort, i in places)
    count = len(inputs) + len(constants) + len(numbers)
    operations: list[Operation] = []
    for i, (name, parameters) in enumerate(chain):
        operations.append((name, registers if i == 0 else (count + i - 1,), parameters))
    shapes = tuple(tuple(constant.shape) for constant in constants)

    def build(emit: Emit, values: Values) -> int:
        return emit(Map(tuple(values), shapes, tuple(numbers), tuple(operations)), *constants)

    return Form(tuple(inputs), build)


def _operand(gm: fx.GraphModule, operand: Any) -> tuple[str, Any] | None:
    """Whether an operand is a value, a constant or a number, and which; None for what a program cannot read."""
    if is_get_attr(operand):
        operand = attribute(gm, operand.target)
    if isinstance(operand, Tensor):
        return ("constant", operand) if is_plain(operand) and operand.dim() <= DIMENSIONS and operand.numel() else None
    if is_value(operand):
        return "value", operand
    number = isinstance(operand, int | float) and not isinstance(operand, bool) and operand == operand
    return ("number", float(operand)) if number else None


def _per_channel(gm: fx.GraphModule, weight: Any, rank: int) -> Any:
    """A PReLU's weight as it is broadcast against a value of so many dimensions; as it is where it is no constant."""
    if not is_get_attr(weight):
        return None
    value: Tensor = attribute(gm, weight.target)
    return value.reshape(-1, *[1] * max(0, rank - 2)) if value.numel() > 1 else value.reshape(())


def _batch_norm(gm: fx.GraphModule, node: fx.Node, rank: int) -> Form | None:
    """Batch norm with fixed statistics: a scale and a shift for each channel."""
    aten = node.target is torch.ops.aten.batch_norm.default or node.target is torch.batch_norm
    names = ("weight", "bias", "running_mean", "running_var") if aten else ("running_mean", "running_var", "weight", "bias")
    defaults = (None, None, None, None, None, False, 0.1, 1e-5)
    x, *parts, training, _, eps = bound(node, ("input", *names, "training", "momentum", "eps"), defaults)[:8]
    given = dict(zip(names, parts, strict=True))
    if training is not False or not is_value(x) or not isinstance(eps, int | float) or rank < 2:
        return None
    if any(value is not None and not is_get_attr(value) for value in parts) or given["running_mean"] is None:
        return None
    if given["running_var"] is None:
        return None
    tensors: dict[str, Tensor] = {name: attribute(gm, value.target) for name, value in given.items() if value is not None}
    if not all(is_plain(value) for value in tensors.values()):
        return None
    exact = {name: value.detach().double() for name, value in tensors.items()}
    scale = (exact["running_var"] + eps).rsqrt() * exact.get("weight", 1)
    shift = exact.get("bias", 0) - exact["running_mean"] * scale
    shape = (-1, *[1] * (rank - 2))
    constants = [value.float().reshape(shape) for value in (scale, shift)]
    shapes = tuple(tuple(constant.shape) for constant in constants)
    operations: tuple[Operation, ...] = (("mul", (0, 1), ()), ("add", (3, 2), (1.0,)))
    return Form((x,), lambda emit, values: emit(Map(tuple(values), shapes, (), operations), *constants))
