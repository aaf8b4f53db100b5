"""Rounding a lookup layer to eight bits: scales for its tensors, with those of S folded into the coefficients.

Values: per tensor; D and S: per vector; coefficients: per filter. No tap is spent on a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.quantized import LARGEST_SUM, SMOOTH, Finish, QuantizedLookup, Range, float32
from lcnn_compile.lookup import LookupWeight

STEPS = 127
"""Of a signed operand, in each direction."""
LARGEST_BIAS = 2.0**28
"""In steps of a filter's sums."""
SMALLEST = 2.0**-100
"""Of a scale: constant channels have some scale too."""


def quantize_lookup(
    weight: LookupWeight,
    bias: Tensor | None,
    x: Range,
    y: Range | None,
    vector_limits: Tensor,
    activation: str = "none",
    residual: Range | None = None,
    residual_last: bool = False,
    name: str = "layer",
) -> QuantizedLookup:
    """The layer of bytes that comes nearest to a lookup layer in floating point.

    Args:
        weight: the lookup weight.
        bias: [n], or None.
        x: the range of its input.
        y: that of its output; None: the output stays float32.
        vector_limits: [groups, k], the largest magnitude of each plane of S that does not saturate.
        activation: of the epilogue.
        residual: the range of the residual, where one is added.
        residual_last: after the activation.
        name: of the layer, for messages.

    Raises:
        WeightError: scales that are not finite or not positive, or a layer whose sums could leave 32 bits.
    """
    dictionary = weight.dictionary.detach().double()
    if vector_limits.shape != dictionary.shape[:2] or not bool(torch.isfinite(vector_limits).all()):
        raise WeightError(
            f"{name}: vector_limits are {tuple(vector_limits.shape)}; finite {tuple(dictionary.shape[:2])} is required"
        )
    rows, row_scales = _rounded(dictionary, dictionary.abs().amax(2))
    s_scales = vector_limits.double().clamp(min=SMALLEST) / STEPS
    x.check(f"{name}, input")
    groups = reference.tap_filter_groups(weight.offsets, weight.coefficients.shape[0])
    per_group = weight.filters.shape[0] // weight.groups
    folded = weight.coefficients.detach().double() * s_scales[groups // per_group, weight.indices.long()][:, None]
    return _assembled(
        weight, bias, x, y, activation, residual, residual_last, name, folded, rows, (x.scale * row_scales / s_scales).float()
    )


def quantize_dense(
    weight: Tensor,
    bias: Tensor | None,
    x: Range,
    y: Range | None,
    groups: int = 1,
    activation: str = "none",
    residual: Range | None = None,
    residual_last: bool = False,
    name: str = "layer",
    group_size: int = 8,
) -> QuantizedLookup:
    """The same of a dense convolution [n, m/groups, kh, kw]: lookups of x itself, ``group_size`` filters of it at a time.

    Raises:
        WeightError: as :func:`quantize_lookup`.
    """
    x.check(f"{name}, input")
    lookups = LookupWeight.lossless(weight.detach(), groups=groups, group_size=group_size)
    folded = lookups.coefficients.double() * x.scale
    return _assembled(lookups, bias, x, y, activation, residual, residual_last, name, folded, None, None)


def _rounded(values: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of a tensor whose last dimension has one scale, and the scales."""
    scales = limits.clamp(min=SMALLEST) / STEPS
    return (values / scales[..., None]).round().clamp(-STEPS, STEPS).to(torch.int8), scales


def _assembled(
    weight: LookupWeight,
    bias: Tensor | None,
    x: Range,
    y: Range | None,
    activation: str,
    residual: Range | None,
    residual_last: bool,
    name: str,
    folded: Tensor,
    dictionary: Tensor | None,
    vector_factors: Tensor | None,
) -> QuantizedLookup:
    """A quantized layer from coefficients that are multiplied by steps of S."""
    n = weight.out_channels
    tensors = [folded, *([] if bias is None else [bias])]
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise WeightError(f"{name}: coefficients or bias are not finite")
    rows = weight.filters.long()[reference.tap_filter_groups(weight.offsets, folded.shape[0])]
    member = rows >= 0
    limits = folded.new_zeros(n).scatter_reduce_(0, rows[member], folded.abs()[member], "amax")
    wanted = torch.zeros(n, dtype=torch.float64) if bias is None else bias.detach().double()
    scales = torch.maximum(limits / STEPS, wanted.abs() / LARGEST_BIAS).clamp(min=SMALLEST)
    coefficients = torch.where(member, folded / scales[rows.clamp(min=0)], 0.0).round().clamp(-STEPS, STEPS).to(torch.int8)
    middle = x.zero if dictionary is None else 128
    shifts = torch.zeros(n, dtype=torch.int64).index_add_(0, rows[member], coefficients.long()[member])
    steps = (wanted / scales).round().long() - middle * shifts
    if int(steps.abs().max()) > LARGEST_SUM:
        raise WeightError(f"{name}: a bias in steps is {int(steps.abs().max())}; 32 bits hold {LARGEST_SUM}")
    for key, used in (("output", y), ("residual", residual)):
        if used is not None:
            used.check(f"{name}, {key}")
    unit = 1.0 if y is None or activation in SMOOTH else y.scale
    finish = Finish(
        activation,
        residual_last,
        None if residual is None else (residual.zero, float32(residual.scale / unit)),
        float32(6 / unit),
        1.0 if y is None else float32(unit / y.scale),
        None if y is None else y.zero,
    )
    return QuantizedLookup(
        dictionary,
        coefficients,
        weight.indices,
        weight.positions,
        weight.offsets,
        weight.filters,
        weight.kernel_size,
        weight.groups,
        weight.dictionary_size,
        x.zero,
        vector_factors,
        steps.to(torch.int32),
        (scales / unit).float(),
        finish,
    ).validate(name)
