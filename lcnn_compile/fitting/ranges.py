"""Ranges of bytes by least error: what is clipped at the ends against how coarse the steps are, on values that were seen."""

from __future__ import annotations

import torch
from torch import Tensor

from lcnn_compile.kernels import reference
from lcnn_compile.kernels.quantized import Range

SHARES = torch.linspace(0.3, 1.0, 57, dtype=torch.float64)
"""Of the largest magnitude, that are tried as the end of a range."""
VALUES = 1 << 13
"""Of a tensor that are kept of each batch."""
PIXELS = 1 << 10
"""At which S is kept of each batch."""
BATCHES = 32
"""Of which values are kept."""
NOTHING = 1e-12
"""Of a range: less is as good as always zero."""
SMALLEST = 1e-30
"""Of a scale: what is always zero has some range too."""


def least_error_range(values: Tensor, low: float, high: float) -> Range:
    """The range whose rounding of ``values`` (any shape) has the smallest mean squared error.

    Zero is a byte of its own: padding and ReLU make many.

    Args:
        values: a sample.
        low: the smallest value ever seen.
        high: the largest one.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < NOTHING:
        return Range(1 / 255, 0)  # of an idle layer, which may wake up: coarse, but no sum leaves its bounds
    x = torch.cat([values.flatten().double(), torch.tensor([low, high], dtype=torch.float64)])
    best, least = Range(max(high - low, 255 * SMALLEST) / 255, 0), torch.inf
    for share in SHARES.flip(0).tolist():
        scale = max((high - low) * share / 255, SMALLEST)
        zero = min(255, max(0, round(-low * share / scale)))
        rounded = ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)
        error = float((rounded - x).square().mean())
        if error < least:
            best, least = Range(scale, zero), error
    return best


def least_error_limits(values: Tensor, limits: Tensor) -> Tensor:
    """For each plane of ``values`` [k, pixels] the magnitude [k] at which 127 steps that end there round it best.

    Args:
        values: a sample.
        limits: [k], the largest magnitudes ever seen.
    """
    x, best, least = values.double(), limits.double().clone(), torch.full(limits.shape, torch.inf, dtype=torch.float64)
    for share in SHARES.flip(0):
        end = limits.double() * share
        step = (end / 127).clamp(min=SMALLEST)[:, None]
        error = ((x / step).round().clamp(-128, 127) * step - x).square().mean(1)
        better = error < least
        best, least = torch.where(better, end, best), torch.where(better, error, least)
    return best.float()


class Observer:
    """What a lookup layer's input and its S have been on some batches.

    Args:
        dictionary: [groups, k, m/groups].
        seed: of the sample.
    """

    def __init__(self, dictionary: Tensor, seed: int = 0):
        self.dictionary = dictionary.detach()
        self._generator = torch.Generator().manual_seed(seed)
        self._values: list[Tensor] = []
        self._s: list[Tensor] = []
        self._low, self._high = 0.0, 0.0
        self._limits = torch.zeros(dictionary.shape[0] * dictionary.shape[1])

    def see(self, x: Tensor) -> None:
        """A batch [N, m, H, W]."""
        if not x.numel():
            return
        s = torch.nn.functional.conv2d(x, reference.pointwise_weight(self.dictionary.to(x)), groups=self.dictionary.shape[0])
        low, high = x.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        self._limits = torch.maximum(self._limits, s.abs().amax((0, 2, 3)).float().cpu())
        if len(self._values) < BATCHES:
            self._values.append(self._some(x.flatten()[:, None], VALUES)[:, 0])
            self._s.append(self._some(s.permute(0, 2, 3, 1).flatten(0, 2), PIXELS))

    def _some(self, rows: Tensor, count: int) -> Tensor:
        chosen = torch.randint(rows.shape[0], (min(count, rows.shape[0]),), generator=self._generator)
        return rows[chosen.to(rows.device)].float().cpu()

    def found(self) -> tuple[Range, Tensor] | None:
        """The range of the input and the limits [groups, k] of S; None where nothing was seen, or what is not finite."""
        if not self._values or not bool(torch.isfinite(self._limits).all()) or not abs(self._low) + abs(self._high) < torch.inf:
            return None
        limits = least_error_limits(torch.cat(self._s).T, self._limits)
        return least_error_range(torch.cat(self._values), self._low, self._high), limits.view(self.dictionary.shape[:2])
