"""The random weight that a lookup layer begins with."""

from __future__ import annotations

import torch
from torch import nn

from lcnn_compile.config import LayerConfig
from lcnn_compile.lookup import LookupWeight, filter_table


def random_weight(
    groups: int, in_channels: int, out_channels: int, kernel_size: tuple[int, int], config: LayerConfig
) -> LookupWeight:
    """A random lookup weight, float32, whose dense weight has the variance of ``nn.Conv2d``'s initialisation.

    The support of each filter group is drawn without replacement from all (vector, r, c). At full size (k = m and all
    taps) it is the identity dictionary with ``nn.Conv2d``'s own random weight.
    """
    channels, area = in_channels // groups, kernel_size[0] * kernel_size[1]
    size = config.vectors(channels)
    taps = config.taps_per_filter(size, area)
    if size == channels and taps == size * area:
        weight = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, bias=False).weight.detach()
        return LookupWeight.lossless(weight, groups=groups, group_size=config.filters_per_group())
    filters = filter_table(out_channels, config.filters_per_group(), groups)
    columns = torch.stack([torch.randperm(size * area)[:taps].sort().values for _ in range(filters.shape[0])]).flatten()
    members = (filters >= 0).repeat_interleave(taps, 0)
    return LookupWeight(
        dictionary=torch.randn(groups, size, channels) / channels**0.5,
        # Var W = taps/area · Var C · Var D has to be 1 / (3 · fan_in).
        coefficients=torch.randn(members.shape) * members / (3 * taps) ** 0.5,
        indices=(columns // area).to(torch.int32),
        positions=(columns % area).to(torch.int32),
        offsets=torch.arange(filters.shape[0] + 1, dtype=torch.int32) * taps,
        filters=filters,
        kernel_size=kernel_size,
    )
