"""Which nodes of a graph go over all of a dimension, and as what steps of a program: reductions, norms, softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lcnn_compile.kernels.cpu.steps import Map, Normalize, Reduce, Softmax, View
from lcnn_compile.passes.step_form import Emit, Form, Values, is_plain, operation_on_images
from lcnn_compile.passes.targets import attribute, is_get_attr

Make = Callable[[Emit, int], int]
_KINDS = {
    "mean": "mean",
    "sum": "sum",
    "amax": "max",
    "amin": "min",
    "var": "variance",
    "std": "variance",
    "linalg_vector_norm": "squares",
}


def reducing(gm: fx.GraphModule, node: fx.Node) -> Form | None:
    """The form of a reduction, a normalisation or a softmax; None for others."""
    found = operation_on_images(node)
    if found is None:
        return None
    name, given, x, shape, out = found
    if name in ("layer_norm", "group_norm", "instance_norm"):
        return _norm(gm, name, given, x, shape)
    if given.get("dtype") not in (None, torch.float32):
        return None
    make: Make | None = None
    if name in ("softmax", "log_softmax"):
        make = _softmax(name, given["dim"], len(shape))
    elif name == "normalize":
        make = _unit(given, shape)
    elif name in _KINDS:
        make = _reduction(name, given, shape, out)
    return None if make is None else Form((x,), lambda emit, values: make(emit, values[0]))


def _range(dim: Any, rank: int) -> tuple[int, int] | None:
    """Dimensions that follow each other, none of them the first, as (first, end)."""
    dims = [dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim
    if not isinstance(dims, list | tuple) or not dims or not all(isinstance(d, int) for d in dims):
        return None
    found = sorted(d % rank for d in dims)
    return (found[0], found[-1] + 1) if found[0] and found == list(range(found[0], found[-1] + 1)) else None


def _softmax(name: str, dim: Any, rank: int) -> Make | None:
    found = _range(dim, rank) if isinstance(dim, int) else None
    return None if found is None else lambda emit, value: emit(Softmax(value, name, *found))


def _reduction(name: str, given: dict[str, Any], shape: tuple[Any, ...], out: tuple[Any, ...]) -> Make | None:
    found, keep = _range(given["dim"], len(shape)), given.get("keepdim", False)
    tail = tuple(out[1:])
    if found is None or not isinstance(keep, bool) or not (keep or all(isinstance(size, int) for size in tail)):
        return None
    if name == "linalg_vector_norm" and given["ord"] != 2:
        return None
    correction = given.get("correction")
    if correction is None:
        correction = 1 if given.get("unbiased") in (None, True) else 0
    if not isinstance(correction, int | float):
        return None

    def make(emit: Emit, value: int) -> int:
        value = emit(Reduce(value, _KINDS[name], *found, float(correction)))
        if name in ("std", "linalg_vector_norm"):
            value = emit(Map((value,), (), (), (("sqrt", (0,), ()),)))
        return value if keep else emit(View(value, tail))

    return make


def _unit(given: dict[str, Any], shape: tuple[Any, ...]) -> Make | None:
    """``F.normalize``: divided by the norm, or by a small number where that is smaller."""
    found, eps = _range(given["dim"], len(shape)) if isinstance(given["dim"], int) else None, given["eps"]
    if found is None or given["p"] != 2 or given["out"] is not None or not isinstance(eps, int | float):
        return None

    def make(emit: Emit, value: int) -> int:
        squares = emit(Reduce(value, "squares", *found))
        norm = (("sqrt", (1,), ()), ("clamp", (2,), (float(eps), math.inf)), ("div", (0, 3), ()))
        return emit(Map((value, squares), (), (), norm))

    return make


def _norm(gm: fx.GraphModule, name: str, given: dict[str, Any], x: fx.Node, shape: tuple[Any, ...]) -> Form | None:
    parts: list[Tensor | None] = []
    for key in ("weight", "bias"):
        value = given.get(key)
        if value is not None and not is_get_attr(value):
            return None
        tensor = None if value is None else attribute(gm, value.target)
        if tensor is not None and not is_plain(tensor):
            return None
        parts.append(tensor)
    eps, rank = given["eps"], len(shape)
    if not isinstance(eps, int | float) or rank < 2:
        return None
    if name == "layer_norm":
        over = given["normalized_shape"]
        count = len(over) if isinstance(over, list | tuple) else 0
        if not 0 < count < rank:
            return None
        step: Callable[[int], Normalize] = lambda v: Normalize(v, "normalize", rank - count, rank, float(eps))  # noqa: E731
    else:
        groups = given.get("num_groups", shape[1])
        fixed = given.get("running_mean") is not None or given.get("running_var") is not None
        if (
            not isinstance(groups, int)
            or not isinstance(shape[1], int)
            or fixed
            or given.get("use_input_stats", True) is not True
        ):
            return None
        step = lambda v: Normalize(v, "normalize", 1, rank, float(eps), groups)  # noqa: E731

    def build(emit: Emit, values: Values) -> int:
        return emit(step(values[0]), *parts)

    return Form((x,), build)
