"""What a layer becomes when a network is fitted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lcnn_compile.geometry import Geometry
from lcnn_compile.lookup import LookupWeight, filter_table


@dataclass(frozen=True)
class FittedLayer:
    """What a layer becomes.

    Attributes:
        weight: in the layer's dtype, on its device; without taps where nothing was fitted.
        bias: [n]; None only where the layer has none and none is gained.
        error: relative output error ‖y - ŷ‖² / ‖y - mean(y)‖² on calibration pixels that were held out, with the
            compressed network's own inputs; None without calibration data.
        reason: why the layer should stay dense; empty if it should not.
    """

    weight: LookupWeight
    bias: Tensor | None
    error: float | None
    reason: str


def dense_layer(geometry: Geometry, like: Tensor, bias: Tensor | None, reason: str) -> FittedLayer:
    """A layer that stays as it is, with a lookup weight that has no taps, of the dtype and on the device of ``like``."""
    filters = filter_table(geometry.out_channels, 1, geometry.groups).to(like.device)
    none = filters.new_zeros(0)
    weight = LookupWeight(
        dictionary=like.new_zeros(geometry.groups, 1, geometry.channels),
        coefficients=like.new_zeros(0, 1),
        indices=none,
        positions=none,
        offsets=filters.new_zeros(filters.shape[0] + 1),
        filters=filters,
        kernel_size=geometry.kernel_size,
    )
    return FittedLayer(weight, bias, None, reason)
