"""Spreading a budget over layers by marginal gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lcnn_compile.errors import ConversionError
from lcnn_compile.fitting.search import Point


def allocate(
    curves: Mapping[str, Sequence[Point]],
    *,
    target_speedup: float,
    other: float,
    unit: str = "multiply-adds",
    sensitivity: Mapping[str, float] | None = None,
) -> dict[str, Point]:
    """One point per layer: the least Σ sensitivity·loss for which the network's cost shrinks by the target.

    Minimises Σ sensitivity·loss + λ·cost for each λ, and finds by bisection the λ whose solution fits; what is left of
    the budget then buys the best single improvements.

    Args:
        curves: points of each layer, one of them the dense layer (``size`` 0).
        target_speedup: dense cost over that allowed.
        other: cost of everything that is not in ``curves``.
        unit: of the costs, for messages.
        sensitivity: weight of each layer's loss; 1 by default.

    Raises:
        ConversionError: if even the cheapest points are too many; it names the best that can be reached.
    """
    weight = dict.fromkeys(curves, 1.0) if sensitivity is None else dict(sensitivity)
    dense = other + sum(point.cost for points in curves.values() for point in points if not point.size)
    budget = dense / target_speedup - other
    least = sum(min(point.cost for point in points) for points in curves.values())
    if least > budget:
        best = dense / max(1e-30, other + least)
        raise ConversionError(
            f"target_speedup {target_speedup:g} cannot be reached: the layers that may change allow {best:.2f} at most "
            f"({other:,.6g} of {dense:,.6g} {unit} are outside them)"
        )

    def solve(price: float) -> dict[str, Point]:
        return {
            name: min(points, key=lambda p, name=name: (weight[name] * p.error + price * p.cost, p.cost))  # type: ignore[misc]
            for name, points in curves.items()
        }

    low, high = 0.0, 1e-12
    while _cost(solve(high)) > budget:
        high *= 4
        if high > 1e30:
            return {name: min(points, key=lambda p: (p.cost, p.loss)) for name, points in curves.items()}
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(solve(middle)) > budget else (low, middle)
    chosen = solve(high)
    while True:
        room = budget - _cost(chosen)
        better = [
            (weight[name] * (chosen[name].loss - point.loss) / max(1e-12, point.cost - chosen[name].cost), name, point)
            for name, points in curves.items()
            for point in points
            if point.loss < chosen[name].loss and point.cost - chosen[name].cost <= room
        ]
        if not better:
            return chosen
        _, name, point = max(better, key=lambda entry: entry[0])
        chosen[name] = point


def cheapest_within(curves: Mapping[str, Sequence[Point]], shares: Mapping[str, float], level: float) -> dict[str, Point]:
    """One point per layer: the least Σ cost for which Σ share·loss is at most ``level``.

    Args:
        curves: points of each layer, one of them the dense layer (``size`` 0, no loss).
        shares: error of the network's outputs for a loss of 1 of each layer.
        level: what all layers together may cause.
    """

    def caused(chosen: Mapping[str, Point]) -> float:
        return sum(shares[name] * point.loss for name, point in chosen.items())

    def solve(price: float) -> dict[str, Point]:
        return {
            name: min(points, key=lambda p, name=name: (p.cost + price * shares[name] * p.loss, p.loss))  # type: ignore[misc]
            for name, points in curves.items()
        }

    chosen = {name: min(points, key=lambda p: p.loss) for name, points in curves.items()}
    low, high = 0.0, 1.0
    while caused(solve(high)) > level and high < 1e60:
        low, high = high, 8 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if caused(solve(middle)) > level else (low, middle)
    if caused(solve(high)) <= level:
        chosen = solve(high)
    while True:
        room = level - caused(chosen)
        better = [
            ((chosen[name].cost - point.cost) / max(1e-30, shares[name] * (point.loss - chosen[name].loss)), name, point)
            for name, points in curves.items()
            for point in points
            if point.cost < chosen[name].cost and shares[name] * (point.loss - chosen[name].loss) <= room
        ]
        if not better:
            return chosen
        _, name, point = max(better, key=lambda entry: entry[0])
        chosen[name] = point


def _cost(chosen: Mapping[str, Point]) -> float:
    return sum(point.cost for point in chosen.values())
