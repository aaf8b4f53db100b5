"""Random layers of every kind that has a lookup form, with inputs that fit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from lcnn_compile.testing import PADDING_MODES, random_tensor

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
BATCHES = (0, 1, 1, 2, 3, None)  # None: without a batch dimension


@dataclass(frozen=True)
class Case:
    """A layer and an input."""

    layer: Any
    inputs: torch.Tensor


def _each(draw, dimensions, low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(dimensions))


@st.composite
def layers(draw, kind):
    """A random layer of ``kind`` with odd sizes, and an input that it accepts."""
    transposed, dimensions = kind.__name__.startswith("ConvTranspose"), int(kind.__name__[-2])
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 7))
    kernel, stride = _each(draw, dimensions, 1, 4), _each(draw, dimensions, 1, 3)
    dilation = _each(draw, dimensions, 1, 3)
    settings = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        padding = tuple(draw(st.integers(0, min(3, r + 1))) for r in reach)
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        settings |= {"padding": padding, "output_padding": extra}
        # The output must not be empty.
        least = [1 + max(0, -(-(2 * p - r - e) // s)) for p, r, e, s in zip(padding, reach, extra, stride, strict=True)]
        mode = "zeros"
    else:
        mode = draw(st.sampled_from(PADDING_MODES))
        names = ["valid", "same"] if set(stride) == {1} else ["valid"]
        padding = draw(st.sampled_from(names) | st.just(_each(draw, dimensions, 0, 2)))
        pads = (
            [0 if padding == "valid" else (r + 1) // 2 if padding == "same" else p for r, p in zip(reach, padding, strict=False)]
            if not isinstance(padding, str)
            else [0 if padding == "valid" else (r + 1) // 2 for r in reach]
        )
        settings |= {"padding": padding, "padding_mode": mode}
        least = [
            max(1, r + 1 - (0 if padding == "valid" else 2 * p if padding != "same" else r), p + 1)
            for r, p in zip(reach, pads, strict=True)
        ]
    sizes = [low + draw(st.integers(0, 5)) for low in least]
    layer = kind(*channels, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random_tensor(draw, parameter.shape))
    batch = draw(st.sampled_from(BATCHES if mode == "zeros" else BATCHES[1:]))
    return Case(layer, random_tensor(draw, ([] if batch is None else [batch]) + [channels[0], *sizes]))
