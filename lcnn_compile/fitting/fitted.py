"""What a layer becomes when a network is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lcnn_compile.fitting.output_error import OutputError
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
        output_error: relative error of the network's output that this layer alone is expected to cause, summed over the
            outputs: its error times its :class:`~lcnn_compile.fitting.sensitivity.Sensitivity`'s share; None where not known.
    """

    weight: LookupWeight
    bias: Tensor | None
    error: float | None
    reason: str
    output_error: float | None = None


class FittedNetwork(dict[str, FittedLayer]):
    """What every layer of a network becomes, by name.

    Attributes:
        output_error: of the network's outputs, measured end to end on samples that were held out; None where it was not.
        remarks: what there is to know about the whole: which part of the data was used, what was given up and why.
    """

    def __init__(
        self, layers: Mapping[str, FittedLayer], output_error: OutputError | None = None, remarks: Sequence[str] = ()
    ) -> None:
        super().__init__(layers)
        self.output_error, self.remarks = output_error, tuple(remarks)


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
