"""Registration of ``torch.ops.lcnn.read_only``: the values of a layer's dense weight in a graph, which nothing may write to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("lcnn", "FRAGMENT")
library.define("read_only(Tensor x, str layer) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _copy(x: Tensor, layer: str) -> Tensor:
    return x.clone()


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


library.impl("read_only", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("lcnn::read_only", _copy, lib=library)
torch.library.register_autograd("lcnn::read_only", _backward, lib=library)

read_only = torch.ops.lcnn.read_only.default
"""``x`` as new memory, marked as the dense weight of the layer of this name: passes refuse graphs that write to it."""
