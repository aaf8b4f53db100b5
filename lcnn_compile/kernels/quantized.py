"""Lookup convolutions of bytes: what they are made of, and what they compute, in plain PyTorch: the truth the kernels equal, bit by bit.

All sums are integers, which are exact in any order, and what is not an integer follows one rule, written down in
:func:`convolve_bytes`. So every processor, number of threads and batch gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Geometry, Weight
from lcnn_compile.kernels.checks import check_weight

MIDDLE = 128
"""The byte that stands for zero in S."""
LARGEST_SUM = 2**31 - 1
LARGEST_VALUE = 2**30
"""Of an output before it saturates, in its steps."""
SMOOTH = ("silu", "hardswish")
"""Activations that are computed on values rather than on steps."""


@dataclass(frozen=True)
class Range:
    """What bytes stand for: ``scale * (byte - zero)``."""

    scale: float
    zero: int

    def check(self, name: str) -> None:
        """Raise WeightError unless scale and zero can be computed with."""
        if not (isinstance(self.zero, int) and 0 <= self.zero <= 255):
            raise WeightError(f"{name}: the zero of a range of bytes is {self.zero!r}; 0 to 255 are allowed")
        if not (math.isfinite(self.scale) and torch.finfo(torch.float32).tiny <= self.scale <= torch.finfo(torch.float32).max):
            raise WeightError(f"{name}: the scale of a range of bytes is {self.scale!r}; a normal positive float32 is required")

    def joined(self, other: Range) -> Range:
        """The range that holds both."""
        if self == other:
            return self
        low = min(-r.zero * r.scale for r in (self, other))
        high = max((255 - r.zero) * r.scale for r in (self, other))
        scale = (high - low) / 255
        return Range(scale, min(255, max(0, round(-low / scale))))

    def to_bytes(self, x: Tensor) -> Tensor:
        """uint8 of x's shape: rounded to the nearest, ties to even; saturated. NaN becomes zero."""
        steps = torch.nan_to_num(x.to(torch.float32) * float32(1 / self.scale), nan=0.0)
        return (steps.round().clamp(-256, 256) + self.zero).clamp(0, 255).to(torch.uint8)

    def to_floats(self, x: Tensor) -> Tensor:
        """float32 of the shape of x, uint8."""
        return (x.to(torch.int32) - self.zero).to(torch.float32) * float32(self.scale)


@dataclass(frozen=True)
class Finish:
    """What happens to a sum, in the order of its fields; :func:`finish_sums` has the arithmetic.

    Attributes:
        activation: as the operator knows them.
        residual_last: the residual is added after the activation.
        residual: the zero of the residual's bytes, or None where it is float32, and the factor that brings it to the units of the
            sum; None for no residual.
        six: 6 in these units.
        step: what brings the result to steps of the output; 1 where these are the units.
        zero: the byte that stands for zero in the output; None: the output is float32.
    """

    activation: str = "none"
    residual_last: bool = False
    residual: tuple[int | None, float] | None = None
    six: float = 6.0
    step: float = 1.0
    zero: int | None = 0


@dataclass(frozen=True, eq=False)
class QuantizedLookup:
    """A lookup convolution of bytes with its epilogue.

    Attributes:
        dictionary: D, int8 [groups, k, m/groups]; None where it is the identity, as in a dense convolution: S is x.
        coefficients: C, int8 [T, g], of S in steps.
        indices, positions, offsets, filters, kernel_size: as in :mod:`lcnn_compile.kernels.reference`.
        groups: convolution groups.
        vectors: k, vectors in the dictionary of each convolution group.
        input_zero: the byte that stands for zero in x, and pads it.
        vector_factors: float32 [groups, k], from sums over channels to steps of S; None without a dictionary.
        bias: int32 [n], added to the sums of taps; in it is what the zero of S adds to them.
        filter_factors: float32 [n], from sums of taps to the units of ``finish``.
        finish: the epilogue.
    """

    dictionary: Tensor | None
    coefficients: Tensor
    indices: Tensor
    positions: Tensor
    offsets: Tensor
    filters: Tensor
    kernel_size: tuple[int, int]
    groups: int
    vectors: int
    input_zero: int
    vector_factors: Tensor | None
    bias: Tensor
    filter_factors: Tensor
    finish: Finish

    @property
    def in_channels(self) -> int:
        """m, over all convolution groups."""
        return self.groups * (self.vectors if self.dictionary is None else self.dictionary.shape[2])

    @property
    def out_channels(self) -> int:
        """n, over all convolution groups."""
        return self.bias.shape[0]

    @property
    def middle(self) -> int:
        """The byte that stands for zero in S, and pads it."""
        return self.input_zero if self.dictionary is None else MIDDLE

    def lookups(self) -> Tensor:
        """P in steps, int64 [n, k, kh, kw]."""
        structure = (self.indices, self.positions, self.offsets, self.filters)
        made = reference.lookup_tensor(self.coefficients.double(), *structure, self.out_channels, self.vectors, self.kernel_size)
        return made.long()

    def validate(self, name: str = "quantized lookup") -> QuantizedLookup:
        """Check every invariant, and that no sum can leave 32 bits; return self.

        Raises:
            WeightError: naming ``name``, the offending value and what is allowed.
        """
        for key in ("dictionary", "coefficients"):
            tensor = getattr(self, key)
            if tensor is not None and tensor.dtype != torch.int8:
                raise WeightError(f"{name}: {key} has dtype {tensor.dtype}; torch.int8 is required")
        identity = torch.zeros(1, 1, 1).expand(self.groups, self.vectors, self.vectors)
        dictionary = identity if self.dictionary is None else self.dictionary.float()
        structure = (self.indices, self.positions, self.offsets, self.filters)
        check_weight(name, Weight(dictionary, self.coefficients.float(), *structure), self.kernel_size)
        if tuple(dictionary.shape[:2]) != (self.groups, self.vectors):
            raise WeightError(
                f"{name}: dictionary has shape {tuple(dictionary.shape)}; ({self.groups}, {self.vectors}, …) is required"
            )
        n = int((self.filters >= 0).sum())
        wanted: dict[str, tuple[int, ...]] = {"bias": (n,), "filter_factors": (n,)}
        if (self.dictionary is None) != (self.vector_factors is None):
            raise WeightError(f"{name}: vector_factors are for a dictionary, and only for one")
        if self.dictionary is not None:
            wanted["vector_factors"] = (self.groups, self.vectors)
        for key, shape in wanted.items():
            tensor, dtype = getattr(self, key), torch.int32 if key == "bias" else torch.float32
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise WeightError(f"{name}: {key} is {tensor.dtype} {tuple(tensor.shape)}; {dtype} {shape} is required")
            if dtype == torch.float32 and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
                raise WeightError(
                    f"{name}: {key} has {float(tensor.min())} to {float(tensor.max())}; finite numbers from 0 on are required"
                )
        for key, zero in (("input_zero", self.input_zero), ("finish.zero", self.finish.zero)):
            if zero is not None and not (isinstance(zero, int) and 0 <= zero <= 255):
                raise WeightError(f"{name}: {key} is {zero!r}; 0 to 255 are allowed")
        self._check_finish(name)
        self._check_sums(name)
        return self

    def _check_finish(self, name: str) -> None:
        finish = self.finish
        if finish.activation not in reference.ACTIVATIONS:
            raise WeightError(f"{name}: activation is {finish.activation!r}; allowed are {sorted(reference.ACTIVATIONS)}")
        factors = {"six": finish.six, "step": finish.step, "residual": 1.0 if finish.residual is None else finish.residual[1]}
        for key, value in factors.items():
            if not (math.isfinite(value) and 0 <= value == float32(value)):
                raise WeightError(f"{name}: finish.{key} is {value!r}; a float32 from 0 on is required")
        zero = None if finish.residual is None else finish.residual[0]
        if zero is not None and not (isinstance(zero, int) and 0 <= zero <= 255):
            raise WeightError(f"{name}: the zero of the residual is {zero!r}; 0 to 255 are allowed")

    def _check_sums(self, name: str) -> None:
        if self.dictionary is not None:
            bound = 255 * self.dictionary.long().abs().sum(2)
            self._check_bound(name, "over channels", 2 * bound)
            assert self.vector_factors is not None
            if float((bound * self.vector_factors.double()).max()) >= LARGEST_VALUE:
                raise WeightError(f"{name}: vector_factors up to {float(self.vector_factors.max())} could take S past 2^30 steps")
        sums = torch.zeros(self.out_channels, dtype=torch.int64)
        group = reference.tap_filter_groups(self.offsets, self.coefficients.shape[0])
        rows = self.filters.long()[group]
        sums.index_add_(0, rows[rows >= 0], self.coefficients.long().abs()[rows >= 0])
        bound = 255 * sums + self.bias.long().abs()
        self._check_bound(name, "over taps", bound)
        residual = 0.0 if self.finish.residual is None or self.finish.residual[0] is None else 255 * self.finish.residual[1]
        value = float((bound * self.filter_factors.double()).max()) + residual if bound.numel() else 0.0
        if value * max(1.0, self.finish.step) >= LARGEST_VALUE:
            raise WeightError(
                f"{name}: filter_factors up to {float(self.filter_factors.max())} could take the output past 2^30 steps"
            )

    def _check_bound(self, name: str, what: str, bound: Tensor) -> None:
        if bound.numel() and int(bound.max()) > LARGEST_SUM:
            raise WeightError(f"{name}: a sum {what} could reach {int(bound.max())}; 32 bits hold {LARGEST_SUM}")


def float32(value: float) -> float:
    """The nearest number of 32 bits."""
    return float(torch.tensor(value, dtype=torch.float32))


def convolve_bytes(
    layer: QuantizedLookup,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """The layer applied to x, uint8 [N, m, H, W], padded by (top, bottom, left, right) zeros.

    1. Sums over channels of D·(x - zero), int32; to float32, times ``vector_factors``, rounded to the nearest (ties to even), plus 128,
       saturated: S, bytes. Without a dictionary S is x.
    2. Sums over taps of C·S, plus ``bias``, int32.
    3. :func:`finish_sums`.

    Returns:
        uint8, or float32 where ``finish.zero`` is None: [N, n, H', W'].
    """
    s = x
    if layer.dictionary is not None:
        assert layer.vector_factors is not None
        centred = (x.to(torch.int32) - layer.input_zero).double()
        sums = torch.nn.functional.conv2d(centred, reference.pointwise_weight(layer.dictionary.double()), groups=layer.groups)
        steps = (sums.float() * layer.vector_factors.flatten()[:, None, None]).round()
        s = (steps + MIDDLE).clamp(0, 255)
    top, bottom, left, right = padding
    padded = torch.nn.functional.pad(s.double(), (left, right, top, bottom), value=float(layer.middle))
    sizes = ((stride[0], stride[1]), (0, 0, 0, 0), (dilation[0], dilation[1]))
    geometry = Geometry(layer.out_channels, layer.kernel_size, *sizes)
    sums = reference.convolve(padded, layer.lookups().double(), geometry, layer.groups)
    sums = (sums + layer.bias.double()[:, None, None]).to(torch.int32)
    return finish_sums(layer.finish, layer.filter_factors, sums, residual)


def finish_sums(finish: Finish, factors: Tensor, sums: Tensor, residual: Tensor | None) -> Tensor:
    """What comes of int32 sums [N, n, H, W] in float32, one IEEE operation after the other, each rounded.

    v = sum·factor; v = v + (residual - zero)·factor; the activation; the residual where it comes last; v·step; rounded to the nearest
    (ties to even), plus ``zero``, saturated; NaN, which a float32 residual may bring, becomes ``zero``.
    """
    v = sums.float() * factors[:, None, None]
    more = None
    if finish.residual is not None:
        assert residual is not None
        zero, factor = finish.residual
        more = (residual if zero is None else (residual.to(torch.int32) - zero).float()) * factor
    if more is not None and not finish.residual_last:
        v = v + more
    v = activate(finish, v)
    if more is not None and finish.residual_last:
        v = v + more
    if finish.zero is None:
        return v
    return (torch.nan_to_num(v * finish.step, nan=0.0).round().clamp(-1024, 1024) + finish.zero).clamp(0, 255).to(torch.uint8)


def mean_of_bytes(sums: Tensor, rows: Sequence[float], columns: Sequence[float], to: Range | None) -> Tensor:
    """Means over windows from their sums [N, C, H', W'], exact integers: float32 times the factor of each row [H'], then of each column [W'];
    rounded to the nearest (ties to even), plus the zero of ``to``, saturated. In the factors are the scales, and ``to`` None gives floats.
    """
    v = sums.float() * torch.tensor(rows, dtype=torch.float32)[:, None] * torch.tensor(columns, dtype=torch.float32)
    return v if to is None else (v.round().clamp(-256, 256) + to.zero).clamp(0, 255).to(torch.uint8)


def sums_of_floats(windows: Tensor) -> Tensor:
    """Sums over the last dimension of float32 values, in an order that is the same everywhere: sixteen sums, each of every sixteenth value,
    which are then joined two by two.
    """
    padded = torch.nn.functional.pad(windows, (0, -windows.shape[-1] % 16)).unflatten(-1, (-1, 16))
    found = torch.zeros_like(padded[..., 0, :])
    for part in padded.unbind(-2):
        found = found + part
    for half in (8, 4, 2, 1):
        found = found[..., :half] + found[..., half : 2 * half]
    return found[..., 0]


def activate(finish: Finish, v: Tensor) -> Tensor:
    """The activation in float32, with an exponential of its own: that of every processor's library is another."""
    if finish.activation == "relu":
        return v.clamp(min=0)
    if finish.activation == "relu6":
        return v.clamp(0, finish.six)
    if finish.activation == "silu":
        return v / (exponential(-v) + 1.0)
    if finish.activation == "hardswish":
        return v * (v + 3.0).clamp(0, 6) * float32(1 / 6)
    return v


def exponential(x: Tensor) -> Tensor:
    """exp of float32 within 2 ulp on [-87, 88], constant outside, as ``vector.h`` has it, without fused operations."""
    x = x.clamp(-87.0, 88.0)
    shift = 12582912.0  # 1.5 · 2^23: adding it rounds to the nearest integer
    n = (x * float32(1.44269504) + shift) - shift
    r = x - n * 0.693359375
    r = r + n * float32(2.12194440e-4)
    p = r * float32(1.9875691500e-4) + float32(1.3981999507e-3)
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + float32(coefficient)
    p = p * (r * r) + r + 1.0
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)
