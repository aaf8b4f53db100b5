"""Hypothesis strategies of convolutions, lookup weights and networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor

from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import LookupConv2d
from lcnn_compile.testing.cases import (
    ACTIVATIONS,
    HEADS,
    JOINS,
    LAYOUTS,
    ConvCase,
    NetworkCase,
    laid_out,
    normal,
    random_lookup_weight,
)

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_SEEDS = st.integers(0, 2**32 - 1)


def _reproducible(names: str, expression: str) -> None:
    """Print, where a test fails, the program that makes the same case."""
    note(f"To make it again:\n\nimport torch\nfrom lcnn_compile.testing import {names}\n\n{expression}\n")


@st.composite
def geometries(draw: st.DrawFn, max_kernel: int = 7) -> dict[str, Any]:
    """Keyword arguments of ``nn.Conv2d``: kernel sizes 1x1 to 7x7 and not square, stride, padding, dilation, groups, bias."""
    kernel = (draw(st.integers(1, max_kernel)), draw(st.integers(1, max_kernel)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    mode = draw(st.sampled_from(PADDING_MODES))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    named = ["valid", "same"] if stride == (1, 1) else ["valid"]
    padding: Any = draw(st.sampled_from(named) | st.integers(0, 3) | st.tuples(st.integers(0, 3), st.integers(0, 3)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return {
        "in_channels": groups * draw(st.integers(1, 9)),
        "out_channels": groups * draw(st.integers(1, 11)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }


@st.composite
def _shapes(draw: st.DrawFn, channels: int, geometry: dict[str, Any]) -> tuple[int, ...]:
    """[N, channels, H, W] that a convolution of this geometry accepts, N of zero included."""
    sides = []
    padding = geometry["padding"]
    for axis in range(2):
        reach = geometry["dilation"][axis] * (geometry["kernel_size"][axis] - 1)
        pad = 0 if padding == "valid" else (reach + 1) // 2 if padding == "same" else _at(padding, axis)
        # Reflection needs a side longer than its padding, circular padding one as long.
        least = max(1, reach + 1 - (0 if padding == "valid" else 2 * pad if padding != "same" else reach), pad + 1)
        sides.append(draw(st.integers(least, least + 12)))
    batch = draw(st.sampled_from([1, 1, 2, 3, 5, 0]))
    return (batch, channels, *sides)


@st.composite
def images(draw: st.DrawFn, channels: int, geometry: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, channels, H, W] that a convolution of this geometry accepts, in any layout of memory, N of zero included."""
    shape, layout = draw(_shapes(channels, geometry)), draw(st.sampled_from(LAYOUTS))
    return laid_out(random_tensor(draw, shape, dtype), layout)


def _at(value: Any, axis: int) -> int:
    return int(value[axis] if isinstance(value, tuple) else value)


def random_tensor(draw: st.DrawFn, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values from a drawn seed: Hypothesis shrinks the seed, not thousands of numbers."""
    return normal(draw(_SEEDS), tuple(shape), dtype)


@st.composite
def conv_layers(draw: st.DrawFn, max_kernel: int = 7, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> ConvCase:
    """A random ``nn.Conv2d`` (``case.conv``) with an input (``case.inputs``)."""
    arguments = draw(geometries(max_kernel))
    shape, layout = draw(_shapes(arguments["in_channels"], arguments)), draw(st.sampled_from(LAYOUTS))
    case = ConvCase(arguments, shape, draw(_SEEDS), layout, draw(st.sampled_from(tuple(dtypes))))
    _reproducible("ConvCase", f"case = {case!r}\nconv, x = case.conv, case.inputs")
    return case


@st.composite
def lookup_weights(
    draw: st.DrawFn,
    in_channels: int | None = None,
    out_channels: int | None = None,
    kernel_size: tuple[int, int] | None = None,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> LookupWeight:
    """A random valid lookup weight: any dictionary size, any number of taps (none included) per filter group, any order."""
    size = kernel_size or (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    channels = (in_channels or groups * draw(st.integers(1, 9)), out_channels or groups * draw(st.integers(1, 19)))
    sizes: dict[str, Any] = {
        "dictionary_size": draw(st.integers(1, 12)),
        "group_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "taps": draw(st.integers(0, 30)),
        "groups": groups,
        "seed": draw(_SEEDS),
        "dtype": dtype,
    }
    text = ", ".join([*map(str, channels), str(size), *(f"{key}={value}" for key, value in sizes.items())])
    _reproducible("random_lookup_weight", f"weight = random_lookup_weight({text})")
    return random_lookup_weight(*channels, size, **sizes)


@st.composite
def lookup_layers(
    draw: st.DrawFn, max_kernel: int = 5, dtypes: Iterable[torch.dtype] = (torch.float32,)
) -> tuple[LookupConv2d, Tensor]:
    """A random ``LookupConv2d`` with an input."""
    case = draw(conv_layers(max_kernel, dtypes))
    sizes = {name: case.arguments[name] for name in ("in_channels", "out_channels", "kernel_size", "groups")}
    weight = draw(lookup_weights(**sizes, dtype=case.dtype))
    note("from lcnn_compile import LookupConv2d\n\nlayer = LookupConv2d.from_weight(weight, conv, conv.bias)")
    return LookupConv2d.from_weight(weight, case.conv, case.conv.bias), case.inputs


@st.composite
def networks(draw: st.DrawFn, max_steps: int = 3) -> NetworkCase:
    """A random small network in evaluation mode (``case.model``) with an input (``case.inputs``)."""
    flags = ("grouped", "bias", "norm_first", "norm", "inplace", "residual")
    steps: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, max_steps))):
        step: dict[str, Any] = {flag: draw(st.booleans()) for flag in flags}
        step["kernel"] = draw(st.sampled_from([3, 3, 1, (1, 3), 5]))
        # Padding modes other than zeros go through another operator, which in turn needs larger images.
        step["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"]))
        step["activation"] = draw(st.integers(0, len(ACTIVATIONS) - 1))
        step["join"] = draw(st.sampled_from(JOINS))
        steps.append(step)
    shape = (draw(st.sampled_from([1, 2, 3, 9])), 3, draw(st.integers(8, 14)), draw(st.integers(8, 14)))
    case = NetworkCase(draw(st.sampled_from([4, 6, 10])), steps, shape, draw(_SEEDS), draw(st.sampled_from(HEADS)))
    _reproducible("NetworkCase", f"case = {case!r}\nmodel, x = case.model, case.inputs")
    return case
