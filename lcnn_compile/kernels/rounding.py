"""Rounding a lookup layer to eight bits: scales for its tensors, with those of S folded into the coefficients.

Values: per tensor; D and S: per vector; coefficients: per filter. No tap is spent on a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.quantized import LARGEST_SUM, MIDDLE, SMOOTH, Finish, QuantizedLookup, Range, float32

STEPS = 127
"""Of a signed operand, in each direction."""
LARGEST_BIAS = 2.0**28
"""In steps of a filter's sums."""
FINEST = 2.0**29
"""Steps from zero to the largest value that S may ever have."""
SMALLEST = 2.0**-100
"""Of a scale: constant channels have some scale too."""


def quantize_lookup(
    weight: Sequence[Tensor],
    kernel_size: tuple[int, int],
    bias: Tensor | None,
    x: Range,
    y: Range | None,
    vector_limits: Tensor,
    activation: str = "none",
    residual: Range | Literal["float32"] | None = None,
    residual_last: bool = False,
    name: str = "layer",
) -> QuantizedLookup:
    """The layer of bytes that comes nearest to a lookup layer in floating point.

    A dictionary that is the identity takes no multiplications: the layer is then a dense convolution.

    Args:
        weight: dictionary, coefficients, indices, positions, offsets and filters, as in :mod:`lcnn_compile.kernels.reference`.
        kernel_size: (kh, kw).
        bias: [n], or None.
        x: the range of its input.
        y: that of its output; None: the output stays float32.
        vector_limits: [groups, k], the largest magnitude of each plane of S that does not saturate.
        activation: of the epilogue.
        residual: the range of the residual, or "float32" for one that is no bytes, where one is added.
        residual_last: after the activation.
        name: of the layer, for messages.

    Raises:
        WeightError: scales that are not finite or not positive, or a layer whose sums could leave 32 bits.
    """
    dictionary, coefficients, indices, positions, offsets, filters = (t.detach().cpu() for t in weight)
    groups, vectors, channels = dictionary.shape
    x.check(f"{name}, input")
    for key, used in (("output", y), ("residual", residual)):
        if isinstance(used, Range):
            used.check(f"{name}, {key}")
    if tuple(vector_limits.shape) != (groups, vectors) or not bool(torch.isfinite(vector_limits).all()):
        raise WeightError(f"{name}: vector_limits are {tuple(vector_limits.shape)}; finite {(groups, vectors)} is required")
    group = reference.tap_filter_groups(offsets, coefficients.shape[0])
    wanted = torch.zeros(int((filters >= 0).sum()), dtype=torch.float64) if bias is None else bias.detach().cpu().double()
    if not all(bool(torch.isfinite(t).all()) for t in (dictionary, coefficients, wanted)):
        raise WeightError(f"{name}: dictionary, coefficients or bias are not finite")
    dense = vectors == channels and bool((dictionary == torch.eye(channels)).all())
    if dense:
        rows, factors, middle = None, None, x.zero
        folded = coefficients.double() * x.scale
    else:
        row_scales = dictionary.double().abs().amax(2).clamp(min=SMALLEST) / STEPS
        s_scales = vector_limits.detach().cpu().double().clamp(min=SMALLEST) / STEPS
        # What was always zero on calibration data may be something else one day: its steps are no finer than what it may ever be allows.
        most = 255 * x.scale * (dictionary.double().abs() + row_scales[:, :, None]).sum(2)
        s_scales = torch.maximum(s_scales, most / FINEST)
        rows, factors, middle = (
            _steps(dictionary.double() / row_scales[:, :, None]),
            (x.scale * row_scales / s_scales).float(),
            MIDDLE,
        )
        folded = coefficients.double() * s_scales[group // (filters.shape[0] // groups), indices.long()][:, None]
    # Filters: the scale of each, its coefficients, and its bias in steps of its sums.
    members = filters.long()[group]
    member = members >= 0
    limits = folded.new_zeros(wanted.shape).scatter_reduce_(0, members[member], folded.abs()[member], "amax")
    scales = torch.maximum(limits / STEPS, wanted.abs() / LARGEST_BIAS).clamp(min=SMALLEST)
    rounded = _steps(torch.where(member, folded / scales[members.clamp(min=0)], 0.0))
    sums = torch.zeros(wanted.shape, dtype=torch.int64).index_add_(0, members[member], rounded.long()[member])
    steps = (wanted / scales).round().long() - middle * sums
    if int(steps.abs().max()) > LARGEST_SUM:
        raise WeightError(f"{name}: a bias in steps is {int(steps.abs().max())}; 32 bits hold {LARGEST_SUM}")
    unit = 1.0 if y is None or activation in SMOOTH else y.scale
    added = None
    if residual is not None:
        added = (residual.zero, float32(residual.scale / unit)) if isinstance(residual, Range) else (None, float32(1 / unit))
    return QuantizedLookup(
        dictionary=rows,
        coefficients=rounded,
        indices=indices,
        positions=positions,
        offsets=offsets,
        filters=filters,
        kernel_size=kernel_size,
        groups=groups,
        vectors=vectors,
        input_zero=x.zero,
        vector_factors=factors,
        bias=steps.to(torch.int32),
        filter_factors=(scales / unit).float(),
        finish=Finish(
            activation,
            residual_last,
            added,
            float32(6 / unit),
            1.0 if y is None else float32(unit / y.scale),
            None if y is None else y.zero,
        ),
    ).validate(name)


def _steps(values: Tensor) -> Tensor:
    return values.round().clamp(-STEPS, STEPS).to(torch.int8)


def short_scales(scales: Tensor) -> Tensor:
    """The nearest float64 numbers of 16 bits: multiples by whole steps, and the scale found from the largest of these, are exact in float32."""
    mantissa, exponent = torch.frexp(scales.double())
    return torch.ldexp((mantissa * 2**16).round(), exponent - 16)


def snapped(
    dictionary: Tensor, coefficients: Tensor, tables: Sequence[Tensor], x: Range, limits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer that is made of whole steps: what bytes stand for, in float32, so that rounding it again changes nothing.

    Args:
        dictionary, coefficients: D [groups, k, m/groups] and C [T, g].
        tables: indices, positions, offsets and filters.
        x: the range of the input.
        limits: of S, [groups, k].

    Returns:
        D, C and limits: 1 for all vectors, whose scales C has taken; the identity and its limits stay as they are.
    """
    indices, _, offsets, filters = tables
    groups, vectors, channels = dictionary.shape
    d, c = dictionary.double(), coefficients.double()
    group = reference.tap_filter_groups(offsets, coefficients.shape[0])
    if not (vectors == channels and bool((dictionary == torch.eye(channels)).all())):
        most = (255 * x.scale * d.abs().sum(2)).clamp(min=SMALLEST)  # of what was always zero on calibration data
        ends = torch.where(limits > 0, limits.double(), most)
        d = d / ends[:, :, None]
        c = c * ends[group // (filters.shape[0] // groups), indices.long()][:, None]
        limits = torch.ones_like(limits)
        scales = short_scales(d.abs().amax(2).clamp(min=SMALLEST) / STEPS)[:, :, None]
        d = (d / scales).round().clamp(-STEPS, STEPS) * scales
    largest = torch.zeros(filters.shape, dtype=torch.float64).scatter_reduce_(0, group[:, None].expand(c.shape), c.abs(), "amax")
    scales = short_scales(largest.clamp(min=SMALLEST) / STEPS)[group]
    c = (c / scales).round().clamp(-STEPS, STEPS) * scales
    return d.to(dictionary.dtype), c.to(coefficients.dtype), limits
