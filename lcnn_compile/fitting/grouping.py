"""Filter groups of similar filters: output channels can be permuted freely, so those that want the same taps share them."""

from __future__ import annotations

import torch
from torch import Tensor


def group_filters(profiles: Tensor, group_size: int) -> Tensor:
    """Filter groups of at most ``group_size`` filters whose profiles look alike.

    The filter with the most left to explain opens a group and takes the free filters most similar to it.

    Args:
        profiles: [n, K], how much each filter wants each tap, at least 0.
        group_size: g.

    Returns:
        int64 [F, g], each filter once, -1 where the last group has fewer.
    """
    n = profiles.shape[0]
    size = min(group_size, n)
    count = -(-n // size)
    table = torch.full((count, size), -1, dtype=torch.int64, device=profiles.device)
    if size == 1:
        table[:, 0] = torch.arange(n, device=profiles.device)
        return table
    norms = profiles.norm(dim=1)
    unit = profiles / norms.clamp(min=1e-30)[:, None]
    likeness = unit @ unit.T
    free = torch.ones(n, dtype=torch.bool, device=profiles.device)
    for row in range(count):
        seed = int(torch.where(free, norms, -1.0).argmax())
        near = torch.where(free, likeness[seed], -2.0)
        near[seed] = 2.0
        members = near.topk(min(size, int(free.sum()))).indices
        table[row, : members.numel()] = members
        free[members] = False
    return table
