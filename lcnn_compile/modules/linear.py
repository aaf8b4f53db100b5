"""LookupLinear: a drop-in, trainable fully connected layer whose weight is a lookup weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.config import LayerConfig
from lcnn_compile.errors import WeightError
from lcnn_compile.modules.base import LookupModule


class LookupLinear(LookupModule):
    """A drop-in ``nn.Linear`` as a 1x1 lookup convolution (LCNN, section 3.1): [*, m] in, [*, n] out.

    Raises:
        ConfigError: for arguments that ``nn.Linear`` would refuse, and sizes out of range.
    """

    dense_type = nn.Linear
    attributes = ("in_features", "out_features")

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dictionary_size: int | float = 0.25,
        sparsity: float | None = 6,
        group_size: int = 8,
        lowering: str = "auto",
        precision: str = "float32",
    ):
        args = (in_features, out_features, bias)
        self._initialise(args, device, dtype, dictionary_size, sparsity, group_size, lowering, precision)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: LayerConfig | None = None) -> LookupLinear:
        """Fit a lookup layer to the weight of ``linear`` alone; ``convert`` with calibration data fits far better."""
        return cls._fit(linear, config)

    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` that computes the same function."""
        return self._fill(self._skeleton())

    def _skeleton(self) -> Any:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def to_dense(self) -> Any:
        """As ``to_linear``."""
        return self.to_linear()

    def forward(self, input: Tensor) -> Tensor:
        """[*, m] of the module's dtype to [*, n]."""
        if not isinstance(input, fx.Proxy) and (input.dim() == 0 or input.shape[-1] != self.in_features):
            raise WeightError(f"LookupLinear: input has shape {tuple(input.shape)}; [*, {self.in_features}] is required")
        y = self._lookup(input.reshape(-1, self.in_features, 1, 1), self.bias)
        return y.reshape(input.shape[:-1] + (self.out_features,))  # noqa: RUF005 (a traced shape cannot be unpacked)

    def extra_repr(self) -> str:
        """Features, bias and sizes."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self._sizes_text()}"
