"""Layers of every kind as 2-d convolutions: the one place that knows padding, stride and dilation."""

from torch import nn

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


def geometry_of(layer: Layer) -> Geometry:
    """The geometry of a layer of any kind."""
    kind = kind_of(layer)
    assert kind is not None
    return KINDS[kind].of(layer)


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
