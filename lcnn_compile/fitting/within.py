"""The search for the cheapest network whose outputs stay within an error, measured end to end on samples that were held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lcnn_compile.config import PICTURES_ERROR, SCORES_ERROR
from lcnn_compile.errors import ConversionError
from lcnn_compile.fitting.allocate import allocate, cheapest_within
from lcnn_compile.fitting.fitted import FittedLayer, FittedNetwork
from lcnn_compile.fitting.output_error import OutputError, Reference, output_tensors
from lcnn_compile.fitting.search import Point

if TYPE_CHECKING:
    from lcnn_compile.fitting.stages import Fitting

Limit = float | Literal["auto"]
"""Of the error of the network's outputs; see :class:`~lcnn_compile.LookupConfig`."""
ROUNDS = 4
"""Fits of the whole network at most: the first goes by the predicted error, the others correct it by what was measured."""
ENOUGH = 0.6
"""A network that uses so much of the allowed error is not fitted again."""
AIM = 0.8
"""Of the allowed error, what a next fit aims at."""
SAME_DATA = 0.5
"""Of the allowed error, what is used where nothing can be held out."""
WORTHWHILE = 1.1
"""A network that would not get cheaper by this factor is left alone."""


class Within:
    """One search; see :func:`fit_within`."""

    def __init__(self, fitting: Fitting, limit: Limit) -> None:
        self._fitting = fitting
        self._reference = Reference(self._outputs(compressed=False), fitting.processes)
        self.remarks: list[str] = []
        if not self._reference.outputs:
            raise ConversionError(
                "the model returns no tensor, so max_output_error cannot be measured; give max_error or target_speedup"
            )
        pictures = any(values.dim() > 3 for output in self._reference.outputs for values in output.values)
        self.limit = (PICTURES_ERROR if pictures else SCORES_ERROR) if limit == "auto" else limit
        if fitting.calibration is not None and fitting.calibration.held_rows(0) is None:
            self.limit *= SAME_DATA
            self.remarks.append(
                "the output error was measured on the data of the fit, because nothing could be held out (one sample, or a first "
                "layer that is called several times); half of the allowed error was used. Give more calibration samples"
            )

    def _outputs(self, *, compressed: bool) -> list[list[Tensor]]:
        """The outputs of each kept batch, of the samples that were held out."""
        fitting, found = self._fitting, []
        assert fitting.calibration is not None
        for number, batch in enumerate(fitting.calibration.batches):
            rows = fitting.calibration.held_rows(number)
            if rows is None or rows.any():
                tensors = output_tensors(fitting.network.run(batch, {}, compressed=compressed))
                found.append([_rows(t, rows) for t in tensors])
        return found

    def measure(self, fitted: Mapping[str, FittedLayer]) -> OutputError:
        """The error of the network with these layers."""
        self._fitting.install_all(fitted)
        return self._reference.measure(self._outputs(compressed=True))

    def run(self, names: Sequence[str], target: float | None, outside: float) -> FittedNetwork:
        """The cheapest fit within the limit; every layer dense where that does not pay."""
        fitting = self._fitting
        fitting.look(names)
        shares = {name: 1.0 if (found := fitting.sensitivity[name].share) is None else found for name in names}
        dense = outside + sum(map(fitting.costs.dense, names))
        least = None if target is None else allocate(fitting.curves, target_speedup=target, other=outside)
        level, low, high = self.limit, 0.0, float("inf")
        best: tuple[float, FittedNetwork] | None = None
        last: FittedNetwork | None = None
        for number in range(ROUNDS):
            points = cheapest_within(fitting.curves, shares, level)
            if least is not None and _cost(points) < _cost(least):
                points = least
            gain = dense / max(1e-30, outside + _cost(points))
            if gain < WORTHWHILE:
                break
            last = self._fit(names, points, shares, number)
            cost = outside + _cost(points)
            assert last.output_error is not None
            if last.output_error.worst <= self.limit:
                best = (cost, last) if best is None or cost < best[0] else best
                low = level
                if last.output_error.worst >= ENOUGH * self.limit or points is least or _cheapest(points, fitting.curves):
                    break
            else:
                high = level
            level *= min(8.0, max(0.02, AIM * self.limit / max(last.output_error.worst, 1e-30)))
            if not low < level < high:
                level = (max(low, high / 50) * high) ** 0.5
        if best is None and last is not None:
            best = self._stepped_back(names, last, outside)
        gain = 1.0 if best is None else dense / max(1e-30, best[0])
        if best is None or gain < WORTHWHILE:
            unit = "in time" if fitting.costs.unit == "seconds" else "in multiply-adds"
            reason = f"within output error {self.limit:.3g} the network would be {gain:.2f}x cheaper {unit}; {WORTHWHILE:g}x is worth it"
            left = {name: fitting.stay(name, reason) for name in names}
            return FittedNetwork(left, None, [*self.remarks, f"the network is left alone: {reason}"])
        network = best[1]
        text = f"output error {network.output_error}, within {self.limit:.3g}; {gain:.2f}x fewer {fitting.costs.unit} expected"
        return FittedNetwork(network, network.output_error, [*self.remarks, text])

    def _fit(self, names: Sequence[str], points: Mapping[str, Point], shares: Mapping[str, float], number: int) -> FittedNetwork:
        """Fit these sizes and measure the network; each layer gets what it is expected to cause."""
        stage = "fit" if not number else f"fit {number + 1}"
        fitted = self._fitting.fit_all(names, points, stage=stage)
        for name, layer in fitted.items():
            point = points[name]
            if not layer.reason and layer.error is not None and self._fitting.sensitivity[name].share is not None:
                ratio = layer.error / max(point.error, 1e-30)
                fitted[name] = replace(layer, output_error=shares[name] * point.loss * ratio)
        return FittedNetwork(fitted, self.measure(fitted))

    def _stepped_back(self, names: Sequence[str], last: FittedNetwork, outside: float) -> tuple[float, FittedNetwork] | None:
        """The same with as few layers as possible dense again, those first that cause most error for what they save."""
        fitting = self._fitting

        def cost(name: str, layer: FittedLayer) -> float:
            if layer.reason:
                return fitting.costs.dense(name)
            weight = layer.weight
            taps = round(weight.taps / weight.out_channels)
            return fitting.costs.lookup(name, weight.dictionary_size, taps, weight.group_size)

        def rate(name: str) -> float:
            saved = fitting.costs.dense(name) - cost(name, last[name])
            return (last[name].output_error or last[name].error or 0.0) / max(saved, 1e-30)

        order = sorted((name for name in names if not last[name].reason), key=rate, reverse=True)
        reason = f"taken back: with it the output error is over {self.limit:.3g}"
        few, many, found = 0, len(order), None
        while few < many:
            middle = (few + many) // 2
            back = set(order[: middle + 1])
            tried = {name: fitting.stay(name, reason) if name in back else layer for name, layer in last.items()}
            error = self.measure(tried)
            if error.worst <= self.limit:
                many, found = middle, FittedNetwork(tried, error)
            else:
                few = middle + 1
        return None if found is None else (outside + sum(cost(name, layer) for name, layer in found.items()), found)


def fit_within(fitting: Fitting, names: Sequence[str], limit: Limit, target: float | None, outside: float) -> FittedNetwork:
    """Layers in the order of what they save for the error that they cause at the network's outputs, as far as ``limit`` allows.

    Each layer's error curve times its sensitivity predicts that error. Sizes are chosen by it, all layers fitted, and the network
    run on samples that no layer was fitted to; what is measured there corrects the prediction for the next fit. Where no fit is
    within the limit, layers become dense again until it is.

    Args:
        fitting: the state of the conversion, with calibration data.
        names: the layers that may change.
        limit: of :attr:`~lcnn_compile.fitting.output_error.OutputError.worst`.
        target: no more than this reduction of the cost is wanted; None for as much as the limit allows.
        outside: cost of everything else.

    Raises:
        ConversionError: the model returns no tensor, or the target is beyond the cheapest sizes.
    """
    return Within(fitting, limit).run(names, target, outside)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The held-out samples of an output; all of it where it does not count them in one of its first two dimensions."""
    if rows is None:
        return tensor
    for dimension in range(min(2, tensor.dim())):
        if tensor.shape[dimension] == rows.shape[0]:
            return tensor.index_select(dimension, rows.nonzero().flatten().to(tensor.device))
    return tensor


def _cost(points: Mapping[str, Point]) -> float:
    return sum(point.cost for point in points.values())


def _cheapest(points: Mapping[str, Point], curves: Mapping[str, Sequence[Point]]) -> bool:
    return all(points[name].cost <= min(p.cost for p in curve) for name, curve in curves.items())
