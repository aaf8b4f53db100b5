"""What the operator is called with, as values: a weight, the geometry, what follows the sums, and all of one call.

Inside the package these go from hand to hand, from the checks to the kernels; the flat list that PyTorch's dispatcher wants stands
in :mod:`lcnn_compile.kernels.operator` alone. All are tuples, the cheapest to make at every call, and hold nodes of a graph as
well as they hold tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Lookups(NamedTuple):
    """P as it is kept: a lookup weight without its dictionary; tensors as in :mod:`lcnn_compile.kernels.reference`."""

    coefficients: Tensor
    indices: Tensor
    positions: Tensor
    offsets: Tensor
    filters: Tensor


class Weight(NamedTuple):
    """The six tensors of a lookup weight; shapes and dtypes as in :mod:`lcnn_compile.kernels.reference`."""

    dictionary: Tensor
    coefficients: Tensor
    indices: Tensor
    positions: Tensor
    offsets: Tensor
    filters: Tensor

    @property
    def lookups(self) -> Lookups:
        """All but the dictionary."""
        return Lookups(*self[1:])


class Geometry(NamedTuple):
    """The numbers of a convolution; ``padding`` is (top, bottom, left, right)."""

    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]


class Epilogue(NamedTuple):
    """What follows the sums: ``activation(y + bias + residual)``, or the residual after it."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    residual_last: bool = False


class Arguments(NamedTuple):
    """All arguments of one call of the operator; ``lowering``, ``precision`` and ``ranges`` as it explains them."""

    input: Tensor
    weight: Weight
    geometry: Geometry
    epilogue: Epilogue = Epilogue()
    lowering: str = "lookup"
    precision: str = "float32"
    ranges: Tensor | None = None


def flat(call: Arguments) -> tuple[object, ...]:
    """What the operator is called with, in the order of its schema."""
    input, weight, geometry, (bias, residual, activation, residual_last), lowering, precision, ranges = call
    return (input, *weight, bias, *geometry, lowering, activation, residual, residual_last, precision, ranges)
