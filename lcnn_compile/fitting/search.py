"""A layer's choice of sizes: what each dictionary size and number of taps costs, and the error it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcnn_compile.config import LayerConfig
from lcnn_compile.fitting.dictionary import Basis, most_vectors
from lcnn_compile.fitting.grouping import group_filters
from lcnn_compile.fitting.layer import Choice, Problem
from lcnn_compile.fitting.sampling import Sample
from lcnn_compile.fitting.taps import Selection, select_taps, spread_rest, spread_taps
from lcnn_compile.geometry import Geometry

FRACTIONS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)  # of the input channels, tried as k
GROUP_SIZES = (1, 4, 8, 16)  # tried as g
SHARED = 8  # filters to a group that estimates of work go by
NARROW = 4  # input channels up to which every k is tried
MARGIN = 1.5  # a layer whose sizes are searched must get cheaper by this factor, or stays dense
STEP = 1.12  # neighbouring numbers of taps on a curve differ by at least this factor
MOST_SPARSITY = 48  # taps per kernel position beyond which lookups are not worth their loads
MOST_COLUMNS = (
    4608  # k·kh·kw up to which dictionary sizes are tried: 512 vectors of a 3x3 kernel; more than the pixels of a sample tell
)
SELECTION_WORK = 1.5e10  # multiply-adds of one selection of taps, which bounds the taps of large kernels


@dataclass(frozen=True)
class Point:
    """One choice of sizes.

    Attributes:
        size: k; 0 for the dense layer.
        taps: of each filter.
        group_size: g.
        cost: per sample, in the unit of the budget.
        error: relative output error to expect.
        loss: the same with each output channel weighted by what it means to the network's output.
    """

    size: int
    taps: int
    group_size: int
    cost: float
    error: float
    loss: float


Cost = Callable[[int, int, int], float]
"""What (k, taps per filter, g) cost."""


def ladder(geometry: Geometry, config: LayerConfig, free: bool) -> list[int]:
    """The dictionary sizes to try, ascending; ``free`` ignores the one in the configuration."""
    most = most_vectors(geometry)
    if config.dictionary_size == "auto" or free:
        if geometry.channels <= NARROW:
            return list(range(1, most + 1))
        sizes = sorted({min(most, max(1, round(f * geometry.channels))) for f in FRACTIONS})
        largest = max(sizes[0], MOST_COLUMNS // geometry.area)
        return sorted({min(size, largest) for size in sizes})
    return [min(most, config.vectors(geometry.channels))]


def error_curve(
    geometry: Geometry,
    basis: Basis,
    sample: Sample | None,
    sizes: Sequence[int],
    config: LayerConfig,
    most_taps: Callable[[int], int],
    cost: Cost,
    *,
    free: bool = False,
) -> list[Point]:
    """Points of every size in ``sizes`` and every group size that the configuration allows.

    Args:
        geometry: of the layer.
        basis: of at least the largest size.
        sample: patches and outputs; None for the weight alone.
        sizes: values of k.
        config: for group_size, and for sparsity unless ``free``.
        most_taps: of each filter, for a dictionary size.
        cost: of each point.
        free: whether taps are searched even if the configuration names them.
    """
    points = []
    group_sizes = GROUP_SIZES if config.group_size == "auto" else (config.group_size,)
    for group_size in sorted({min(g, geometry.filters) for g in group_sizes}):
        for size in sizes:
            most = most_taps(size)
            if config.sparsity != "auto" and not free:
                wanted = config.taps_per_filter(size, geometry.area)
                most = wanted if wanted <= most else 0
            if most >= 1:
                points += [
                    Point(size, taps, group_size, cost(size, taps, group_size), error, loss)
                    for taps, error, loss in _errors(geometry, basis.first(size), sample, most, group_size)
                    if config.sparsity == "auto" or free or taps == most
                ]
    return points


def most_taps(geometry: Geometry, pixels: tuple[int, int], size: int) -> int:
    """Taps per filter with which k = ``size`` vectors still make a layer cheaper by MARGIN in multiply-adds; may be below 1."""
    outputs, inputs = pixels
    room = geometry.macs * outputs / MARGIN - geometry.in_channels * size * inputs
    # A selection of T taps out of K columns for F filter groups takes F·K·T²/2.
    fast = math.sqrt(2 * SELECTION_WORK * SHARED / (geometry.out_channels * size * geometry.area))
    most = min(size * geometry.area, MOST_SPARSITY * geometry.area, max(1, math.floor(fast)))
    return min(most, math.floor(room / max(1, geometry.out_channels * outputs)))


def _errors(
    geometry: Geometry, basis: Basis, sample: Sample | None, taps: int, group_size: int
) -> list[tuple[int, float, float]]:
    """(taps, relative error, weighted relative error) up to ``taps``, spread over filter groups.

    From the fit, scaled to what held-out pixels say at a few places.
    """
    counts = _places(taps)
    problems, fitted, total = [], [0.0] * len(counts), 0.0
    for group in range(geometry.groups):
        problem = Problem.of(sample, basis, group)
        filters = group_filters(problem.profiles(), group_size)
        selection = select_taps(problem.gram, problem.cross, problem.energy, filters, taps)
        rest = spread_rest(selection, problem.group_energy(filters), (filters >= 0).sum(1), counts)
        fitted = [a + b for a, b in zip(fitted, rest, strict=True)]
        total += float(problem.energy.sum())
        problems.append((problem, filters, selection))
    fitted = [rest / max(total, 1e-30) for rest in fitted]
    probes = sorted({_nearest(counts, taps * share) for share in (0.1, 0.35, 1.0)})
    plain: list[float] = []
    weighted: list[float] = []
    for i in probes:
        errors = torch.cat([_held(*entry, counts[i]) for entry in problems], dim=1).double()
        weights = torch.cat([problem.weights for problem, *_ in problems]).double()
        for ratios, scale in ((plain, torch.ones_like(weights)), (weighted, weights)):
            wrong, deviation = (errors * scale).sum(1)
            ratios.append(float(wrong) / max(float(deviation), 1e-30) / max(fitted[i], 1e-12))
    places = [counts[i] for i in probes]
    return [
        (count, rest * _interpolate(count, places, plain), rest * _interpolate(count, places, weighted))
        for count, rest in zip(counts, fitted, strict=True)
    ]


def _places(taps: int) -> list[int]:
    """Numbers of taps up to ``taps``, neighbours differing by at least STEP."""
    places, value = [], 1.0
    while value < taps:
        places.append(round(value))
        value = max(value * STEP, value + 1)
    return [*places, taps]


def _held(problem: Problem, filters: Tensor, selection: Selection, taps: int) -> Tensor:
    counts = spread_taps(selection, problem.group_energy(filters), (filters >= 0).sum(1), taps)
    choice = Choice(filters, selection.columns[:, : int(counts.max())], counts)
    matrix = problem.rows(problem.solve(choice), choice)
    return problem.held_error(matrix, problem.bias(matrix))


def _nearest(counts: Sequence[int], value: float) -> int:
    return min(range(len(counts)), key=lambda i: abs(counts[i] - value))


def _interpolate(count: int, places: Sequence[int], ratios: Sequence[float]) -> float:
    """Linear in the logarithm of the number of taps, constant outside."""
    for (low, a), (high, b) in zip(zip(places, ratios, strict=True), zip(places[1:], ratios[1:], strict=True), strict=False):
        if count <= high:
            share = (math.log(max(count, low)) - math.log(low)) / (math.log(high) - math.log(low))
            return a + share * (b - a)
    return ratios[-1]
