"""Two custom operators that random networks call: one writes its input, one does not."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lcnn_testing::halve", mutates_args=("x",))
def halve(x: Tensor) -> None:
    """Halve ``x`` ([...], floating point) in place."""
    x.mul_(0.5)


@halve.register_fake
def _halve(x: Tensor) -> None:
    return None


@torch.library.custom_op("lcnn_testing::shifted", mutates_args=())
def shifted(x: Tensor) -> Tensor:
    """``x`` ([...], floating point) plus 0.25."""
    return x + 0.25


@shifted.register_fake
def _shifted(x: Tensor) -> Tensor:
    return torch.empty_like(x)
