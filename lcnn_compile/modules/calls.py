"""Calls of convolution functions: their settings, and the layer that has the same."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS: dict[Callable[..., Any], str] = {
    getattr(F, name): name for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
}
"""The convolution functions and their names."""

_KINDS: dict[str, Any] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
}
_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}


class Settings(NamedTuple):
    """What a call of a convolution function is, but for its tensors; each number for every dimension."""

    function: str
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def options(settings: Settings) -> dict[str, Any]:
    """The settings as arguments of :func:`make_conv`."""
    return {name: value for name, value in settings._asdict().items() if name != "function"}


def has_module(function: str) -> bool:
    """Whether a lookup layer can take a call of this function."""
    return function in _KINDS


def arguments(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a convolution function by name, with its defaults."""
    names = _TRANSPOSED if function.startswith("conv_transpose") else _PLAIN
    found = dict(_DEFAULTS)
    found.update(zip(names, args, strict=False))
    found.update(kwargs)
    return found


def settings_of(function: str, found: Mapping[str, Any]) -> Settings:
    """The settings among the arguments of a call."""
    dimensions = int(function[-2])
    padding = found["padding"]
    return Settings(
        function,
        _sized(found["stride"], dimensions),
        _sized(0 if padding == "valid" else padding, dimensions) if padding != "same" else "same",
        _sized(found["output_padding"], dimensions),
        _sized(found["dilation"], dimensions),
        found["groups"],
    )


def _sized(value: Any, dimensions: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dimensions if len(values) == 1 else values


def make_conv(function: str, weight: Tensor, bias: Tensor | None, **settings: Any) -> nn.Module:
    """The module of the convolution ``function``, which shares ``weight`` and ``bias``; parameters stay parameters.

    ``settings`` are the function's own: stride, padding, output_padding, dilation, groups.
    """
    transposed, dimensions = function.startswith("conv_transpose"), weight.dim() - 2
    groups = settings["groups"]
    first, second = weight.shape[:2]
    channels = (first, second * groups) if transposed else (second * groups, first)
    if not transposed:
        settings.pop("output_padding", None)
    sized = {
        key: value if isinstance(value, str) else _sized(value, dimensions) for key, value in settings.items() if key != "groups"
    }
    conv = _KINDS[function](*channels, tuple(weight.shape[2:]), **sized, groups=groups, bias=bias is not None, device="meta")
    conv.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, weight.requires_grad)
    if bias is not None:
        conv.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, bias.requires_grad)
    return conv


def whole(value: Any) -> bool:
    """Whether every number among the settings is a whole one, known now."""
    values = value if isinstance(value, tuple) else (value,)
    try:
        return all(operator.index(v) == v for v in values)
    except TypeError:
        return False
