"""Layers of every kind as 2-d convolutions: the one place that knows padding, stride and dilation.

``plane`` is nn.Conv2d and the base of the others; ``row``, ``depth`` and ``transposed`` derive from it. May import ``lookup`` and ``kernels``.
"""

import numbers
import operator

from torch import nn

from lcnn_compile.errors import ConfigError
from lcnn_compile.geometry.depth import Conv3dGeometry, stack_frames, unstack_frames
from lcnn_compile.geometry.plane import Call, Geometry, Usage
from lcnn_compile.geometry.row import Conv1dGeometry, LinearGeometry
from lcnn_compile.geometry.transposed import TransposedGeometry

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d
"""The layers that have a lookup form."""

KINDS: dict[type[nn.Module], type[Geometry]] = {
    nn.Linear: LinearGeometry,
    nn.Conv1d: Conv1dGeometry,
    nn.Conv2d: Geometry,
    nn.Conv3d: Conv3dGeometry,
    nn.ConvTranspose1d: TransposedGeometry,
    nn.ConvTranspose2d: TransposedGeometry,
}


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The kind of layer that ``layer`` is or derives from; None where it has no lookup form."""
    return next((kind for kind in KINDS if isinstance(layer, kind)), None)


_DIMENSIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2}


def geometry_of(layer: Layer) -> Geometry:
    """The geometry of a layer of any kind.

    Raises:
        ConfigError: for settings that PyTorch lets pass until the layer is called: fractions, or too many numbers.
    """
    kind = kind_of(layer)
    assert kind is not None
    for name in ("in_features", "out_features") if kind is nn.Linear else ("in_channels", "out_channels", "groups"):
        value = getattr(layer, name)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; an int is required")
    for name in ("kernel_size", "stride", "padding", "output_padding", "dilation") if kind in _DIMENSIONS else ():
        values = getattr(layer, name)
        wanted = _DIMENSIONS[kind]
        if isinstance(values, str) and name == "padding":
            continue
        if not isinstance(values, tuple | list) or len(values) != wanted or not all(_is_int(value) for value in values):
            raise ConfigError(f"{name} is {values!r}; an int or {wanted} of them are required")
    return KINDS[kind].of(layer)


def _is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and abs(operator.index(value)) < 1 << 63


__all__ = [
    "KINDS",
    "Call",
    "Conv1dGeometry",
    "Conv3dGeometry",
    "Geometry",
    "Layer",
    "LinearGeometry",
    "TransposedGeometry",
    "Usage",
    "geometry_of",
    "kind_of",
    "stack_frames",
    "unstack_frames",
]
