"""The library ``torch.ops.lcnn`` that all operators are defined in."""

from __future__ import annotations

import torch

library = torch.library.Library("lcnn", "DEF")
# Inputs may have any strides. Without the last tag Inductor insists on those it saw when it traced, by copies: in half precision
# on a GPU it turned channels_last inputs of whole stages into contiguous ones, which made their lookups three times slower.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
