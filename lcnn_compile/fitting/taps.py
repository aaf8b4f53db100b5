"""Which taps a filter group uses, and their coefficients, from the normal equations of the layer's least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORK_ELEMENTS = 1 << 26  # floats of working memory for the factors of all filter groups together
BLOCK_SHARE = 24  # once t taps are chosen, t / BLOCK_SHARE are chosen at a time


@dataclass(frozen=True)
class Selection:
    """Taps in the order of their choice, and what each left unexplained.

    Attributes:
        columns: int64 [F, T], columns of the Gram matrix, best first; the first t are the choice for t taps.
        counts: int64 [steps], numbers of taps at which the rest was noted.
        rest: [steps, F], squared output error of each filter group, summed over its filters.
    """

    columns: Tensor
    counts: Tensor
    rest: Tensor


def spread_taps(selection: Selection, energy: Tensor, members: Tensor, taps: int, *, even: bool = False) -> Tensor:
    """How many of its taps each filter group keeps so that filters have ``taps`` on average: where they gain most.

    Args:
        selection: taps of each filter group, in order.
        energy: [F], squared output error of each filter group without taps.
        members: int64 [F], filters of each group.
        taps: on average over filters; at most those selected.
        even: the same number for all.

    Returns:
        int64 [F], at least 1 each; a filter has at most ``taps`` on average.
    """
    groups = energy.shape[0]
    if even or groups == 1:
        return torch.full((groups,), taps, dtype=torch.int64, device=energy.device)
    order, costs, _ = _by_gain(selection, energy, members)
    kept = order[costs.cumsum(0) <= members.sum() * taps]
    lengths = selection.counts.diff(prepend=selection.counts[:1] * 0).to(energy.device)
    return torch.zeros_like(members).index_add_(0, kept % groups, lengths[kept // groups])


def spread_rest(selection: Selection, energy: Tensor, members: Tensor, taps: Sequence[int], *, even: bool = False) -> list[float]:
    """The squared output error left when taps are spread as :func:`spread_taps` does, for each average in ``taps``."""
    if even or energy.shape[0] == 1:
        places = torch.searchsorted(selection.counts, torch.tensor(taps), right=True) - 1
        return [float(r) for r in selection.rest[places.to(selection.rest.device)].double().sum(1)]
    order, costs, gains = _by_gain(selection, energy, members)
    left = energy.double().sum() - gains.flatten()[order].double().cumsum(0)
    budgets = torch.tensor([int(members.sum()) * t for t in taps], device=left.device)
    places = torch.searchsorted(costs.cumsum(0), budgets, right=True) - 1
    return [max(float(r), 0.0) for r in left[places]]


def _by_gain(selection: Selection, energy: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of all filter groups in the order in which to take them: the first of each, then those whose taps gain most.

    Returns:
        Steps·F numbers step·F + group; the multiply-adds that each costs; and what each step gains, [steps, F].
    """
    counts = selection.counts.to(energy.device)
    costs = counts.diff(prepend=counts[:1] * 0)[:, None] * members
    gains = -selection.rest.diff(dim=0, prepend=energy[None].to(selection.rest))
    rates = (gains / costs).cummin(0).values
    rates[0] = float("inf")
    order = rates.flatten().argsort(descending=True, stable=True)
    return order, costs.flatten()[order], gains


def select_taps(gram: Tensor, cross: Tensor, energy: Tensor, filters: Tensor, taps: int) -> Selection:
    """Simultaneous orthogonal least squares: each step takes the column that lowers the group's squared error most.

    A Cholesky factor grows by the chosen columns of every filter group at once, so the error for every smaller
    number of taps comes for free (orthogonal matching pursuit with exact gains; LCNN, section 3.1 fixes s per
    position instead).

    Args:
        gram: [K, K], second moments of the columns, positive definite.
        cross: [K, n], moments of columns and outputs.
        energy: [n], second moments of the outputs.
        filters: int64 [F, g], filters of each group, -1 for none.
        taps: T, at most K.
    """
    size = gram.shape[0]
    chunk = max(1, WORK_ELEMENTS // (taps * size))
    parts = [_select(gram, cross, energy, part, taps) for part in filters.split(chunk)]
    return Selection(
        torch.cat([part.columns for part in parts]), parts[0].counts, torch.cat([part.rest for part in parts], dim=1)
    )


def _select(gram: Tensor, cross: Tensor, energy: Tensor, filters: Tensor, taps: int) -> Selection:
    member = (filters >= 0).to(gram)
    rows = filters.clamp(min=0)
    left = cross.T[rows] * member[:, :, None]
    rest = (energy[rows] * member).sum(1)
    groups, size = filters.shape[0], gram.shape[0]
    pivots = gram.diagonal().repeat(groups, 1)
    floor = gram.diagonal() * 1e-6
    factor = gram.new_empty(groups, taps, size)
    columns = torch.empty(groups, taps, dtype=torch.int64, device=gram.device)
    free = torch.ones(groups, size, dtype=torch.bool, device=gram.device)
    counts, rests, done = [], [], 0
    while done < taps:
        block = min(taps - done, max(1, done // BLOCK_SHARE))
        gains = torch.where(free, left.square().sum(1) / pivots.maximum(floor), -1.0)
        chosen = gains.topk(block, dim=1).indices
        previous = factor[:, :done]
        at_chosen = previous.gather(2, chosen[:, None, :].expand(-1, done, -1))
        fresh = torch.baddbmm(gram[chosen], at_chosen.transpose(1, 2), previous, alpha=-1)
        corner = fresh.gather(2, chosen[:, None, :].expand(-1, block, -1))
        corner.diagonal(dim1=1, dim2=2).clamp_(min=floor[chosen])
        lower = cholesky(corner)
        wanted = left.gather(2, chosen[:, None, :].expand(-1, left.shape[1], -1)).transpose(1, 2)
        fresh, step = _forward(lower, fresh), _forward(lower, wanted)
        left = torch.baddbmm(left, step.transpose(1, 2), fresh, alpha=-1)
        pivots = pivots - fresh.square().sum(1)
        rest = rest - step.square().sum((1, 2))
        factor[:, done : done + block] = fresh
        columns[:, done : done + block] = chosen
        free.scatter_(1, chosen, False)
        done += block
        counts.append(done)
        rests.append(rest)
    return Selection(columns, torch.tensor(counts), torch.stack(rests).clamp(min=0))


def _forward(lower: Tensor, right: Tensor) -> Tensor:
    """Forward substitution; for one row a division is much faster."""
    return right / lower if lower.shape[-1] == 1 else torch.linalg.solve_triangular(lower, right, upper=False)


def solve_coefficients(gram: Tensor, cross: Tensor, columns: Tensor, filters: Tensor, counts: Tensor) -> Tensor:
    """Least-squares coefficients on chosen columns, by Cholesky in float64.

    Args:
        gram: [K, K].
        cross: [K, n].
        columns: int64 [F, T].
        filters: int64 [F, g].
        counts: int64 [F], how many of its columns each filter group uses.

    Returns:
        [F, T, g], of the Gram matrix's dtype; zero for filters that do not exist and columns that are not used.
    """
    taps = columns.shape[1]
    used = torch.arange(taps, device=columns.device) < counts[:, None]
    member = used[:, :, None] & (filters >= 0)[:, None, :]
    if taps == gram.shape[0] and bool(used.all()):
        solution = torch.cholesky_solve(cross.double(), cholesky(gram.double()))
        return (solution[columns[:, :, None], filters.clamp(min=0)[:, None, :]] * member).to(gram.dtype)
    parts = []
    chunk = max(1, WORK_ELEMENTS // (4 * taps * taps))
    for part, rows, real in zip(*(t.split(chunk) for t in (columns, filters, used)), strict=True):
        square = gram[part[:, :, None], part[:, None, :]].double()
        square.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0.0)
        square.diagonal(dim1=1, dim2=2).add_((~real).double())
        right = cross[part[:, :, None], rows.clamp(min=0)[:, None, :]].double()
        parts.append(torch.cholesky_solve(right, cholesky(square)).to(gram.dtype))
    return torch.cat(parts) * member


def cholesky(square: Tensor) -> Tensor:
    """The lower factor of positive semi-definite matrices, the diagonal raised as little as it takes."""
    scale = square.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None].clamp(min=1e-30)
    for power in (-12, -9, -6, -4, -2):
        raised = square.diagonal_scatter(square.diagonal(dim1=-2, dim2=-1) + scale * 10.0**power, dim1=-2, dim2=-1)
        factor, info = torch.linalg.cholesky_ex(raised)
        if not info.any():
            break
    return factor
