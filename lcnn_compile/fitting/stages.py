"""Layer after layer: sizes by error curves and a budget, then fits on the compressed network's own inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from lcnn_compile.config import LayerConfig
from lcnn_compile.fitting.allocate import allocate
from lcnn_compile.fitting.costs import Costs, MultiplyAdds, Seconds, Timer
from lcnn_compile.fitting.dictionary import Basis, fit_dictionary, most_vectors
from lcnn_compile.fitting.fitted import FittedLayer, FittedNetwork, dense_layer
from lcnn_compile.fitting.layer import Fit, fit_layer, fit_lossless, refit_layer
from lcnn_compile.fitting.network import Network
from lcnn_compile.fitting.processes import Processes
from lcnn_compile.fitting.sampling import PATCH_ELEMENTS, Calibration, Sample, Sampler
from lcnn_compile.fitting.saved_fits import SavedFits
from lcnn_compile.fitting.search import MARGIN, Point, error_curve, ladder, most_taps
from lcnn_compile.fitting.sensitivity import Seen, Sensitivity, output_sensitivity
from lcnn_compile.fitting.within import Limit, fit_within

DEFAULT_MAX_ERROR = 0.05  # where sizes are "auto" and nothing else limits them
PASSES = 64  # runs through the calibration sample that fit layers; deeper networks fit several layers in each
CURVE_ELEMENTS = 100_000_000  # floats of patches held at once while error curves are measured

Progress = Callable[[str, int, int], None]


class Fitting:
    """The state of one call of :func:`~lcnn_compile.fitting.model.fit_budgets`: what it has found of every layer so far."""

    def __init__(
        self,
        network: Network,
        configs: Mapping[str, LayerConfig],
        calibration: Calibration | None,
        pixels: Mapping[str, tuple[int, int]] | None,
        seed: int,
        free: bool,
        tell: Progress,
        processes: Processes,
        timer: Timer | None,
        other: float,
    ) -> None:
        self.network, self.configs, self.calibration, self.free, self.tell = network, configs, calibration, free, tell
        self.seed, self.processes = seed, processes
        self.saved: SavedFits | None = None
        self.sampler = None if calibration is None else Sampler(network, calibration, seed, processes)
        self.pixels = {name: self._pixels(name, pixels) for name in network.layers}
        self.bases: dict[str, Basis] = {}
        self.points: dict[str, Point] = {}
        self.sensitivity: dict[str, Sensitivity] = {}
        self.curves: dict[str, list[Point]] = {}
        self.seen = Seen()
        self.costs: Costs = (
            MultiplyAdds(network.geometry, self.pixels, int(other))
            if timer is None
            else Seconds(timer, network.geometry, self.most_taps, other, processes)
        )

    def _pixels(self, name: str, given: Mapping[str, tuple[int, int]] | None) -> tuple[int, int]:
        if given is not None and name in given:
            return given[name]
        if self.calibration is None or not self.calibration.moments[name].images:
            return 1, 1
        moments = self.calibration.moments[name]
        return moments.out_pixels // moments.images, moments.in_pixels // moments.images

    def run(self, target_speedup: float | None, max_output_error: Limit | None = None, *, last: bool = True) -> FittedNetwork:
        """Fit every layer; unless this is the ``last`` run, what the next one can use is kept."""
        result = {name: self.stay(name, reason) for name in self.network.layers if (reason := self._hopeless(name))}
        order = [name for name in self._order() if name not in result]
        outside = self.costs.other + sum(self.costs.dense(name) for name in result if self._runs(name))
        within = max_output_error is not None and self.calibration is not None
        if max_output_error is not None and within:
            found = fit_within(self, order, max_output_error, target_speedup, outside)
        else:
            points = {} if target_speedup is None else self._allocate(order, target_speedup, outside)
            found = FittedNetwork(self.fit_all(order, points, saved=True))
            self._refit(found, [name for name in order if self._lossy(name, found)])
        for name in order:  # S has been white until here, which a fit wants and descent does not
            if self._lossy(name, found):
                found[name] = replace(found[name], weight=found[name].weight.balanced())
        if last:
            self.bases.clear()
        remarks = [*found.remarks, *([self.seen.remark] if self.seen.remark else [])]
        layers = {name: found[name] if name in found else result[name] for name in self.network.layers}
        return FittedNetwork(layers, found.output_error, remarks)

    def fit_all(
        self, order: Sequence[str], points: Mapping[str, Point], *, stage: str = "fit", saved: bool = False
    ) -> dict[str, FittedLayer]:
        """Fit the layers one after the other, with these sizes or those of their configurations, on the compressed network's inputs.

        Args:
            order: of the layers.
            points: sizes of each; empty for those of the configurations.
            stage: for progress.
            saved: whether layers are kept in, and taken from, the folder of an interrupted conversion.
        """
        self.network.fitted.clear()
        self.points = dict(points)
        result: dict[str, FittedLayer] = {}
        if self.sampler is not None:
            self.sampler.remember({name: self._planes(name) for name in order if not self._stays_dense(name)})
        for names in self._steps(order):
            known = self._known(names) if saved else {}
            wanted = [name for name in names if name not in known and not self._stays_dense(name)]
            samples = self._samples(wanted, compressed=True)
            for name in names:
                result[name] = known.get(name) or self._fit(name, samples.pop(name, None))
                if saved and self.saved is not None and name not in known:
                    self.saved.put(name, result[name])
                self._install(name, result[name])
            self.tell(stage, order.index(names[-1]) + 1, len(order))
        return result

    def _lossy(self, name: str, found: Mapping[str, FittedLayer]) -> bool:
        return not found[name].reason and not self.lossless(name)

    def _runs(self, name: str) -> bool:
        """Whether a layer costs anything: it was called, or there are no data that could tell."""
        return self.calibration is None or bool(self.calibration.moments[name].images)

    def _steps(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """The layers that one run through the calibration sample serves, one run after the other."""
        step = max(1, -(-len(names) // PASSES))
        return (names[start : start + step] for start in range(0, len(names), step))

    def _install(self, name: str, fit: FittedLayer) -> None:
        """Let the compressed network have a fitted layer."""
        if not fit.reason:
            self.network.fitted[name] = (fit.weight.dense_weight(), fit.bias)

    def install_all(self, fitted: Mapping[str, FittedLayer]) -> None:
        """Let the compressed network have exactly these layers."""
        self.network.fitted.clear()
        for name, fit in fitted.items():
            self._install(name, fit)

    def _refit(self, result: dict[str, FittedLayer], names: Sequence[str]) -> None:
        """Coefficients anew from the first layer on, now from all pixels: those held out have told the errors, which stay.

        The errors are those of the first fit, to which none of these pixels was known in any layer.
        """
        if self.sampler is None:
            return
        self.network.fitted = {name: fitted for name, fitted in self.network.fitted.items() if name not in names}
        self.sampler.remember({name: self._planes(name) for name in names})
        for part in self._steps(names):
            samples = self._samples(part, compressed=True)
            for name in part:
                old = result[name]
                if name in samples:
                    basis = self._basis(name).first(old.weight.dictionary_size)
                    geometry, rounded = self.network.geometry[name], self._rounded(name)
                    weight, bias = refit_layer(geometry, basis, samples.pop(name), old.weight, rounded=rounded)
                    if torch.isfinite(weight.coefficients).all() and torch.isfinite(bias).all():
                        like = self.network.weight(name)
                        result[name] = replace(old, weight=weight.to(like.device, like.dtype), bias=bias.to(like))
                self._install(name, result[name])
            self.tell("refit", names.index(part[-1]) + 1, len(names))

    def _known(self, names: Sequence[str]) -> dict[str, FittedLayer]:
        """The layers that an earlier call has fitted."""
        if self.saved is None:
            return {}
        return {name: fit for name in names if (fit := self.saved.get(name, self.network.weight(name)))}

    def _allocate(self, names: Sequence[str], target_speedup: float, other: float) -> dict[str, Point]:
        self.look(names)
        weights = {name: found.layer for name, found in self.sensitivity.items()}
        return allocate(self.curves, target_speedup=target_speedup, other=other, unit=self.costs.unit, sensitivity=weights)

    def look(self, names: Sequence[str]) -> None:
        """Measure the sensitivities and error curves of these layers, once."""
        if not self.curves:
            self.sensitivity = self._sensitivity(names)
            self.curves = self._curves(names)

    def _order(self) -> list[str]:
        return list(self.network.layers) if self.calibration is None else self.calibration.order

    def _sensitivity(self, names: Sequence[str]) -> dict[str, Sensitivity]:
        if self.calibration is None:
            return dict.fromkeys(names, Sensitivity(1.0, None))
        return output_sensitivity(self.network, self.calibration.batches, names, self.seed, self.processes, self.seen)

    def _hopeless(self, name: str) -> str:
        if not torch.isfinite(self.network.weight(name)).all():
            return "the weight is not finite"
        if self.calibration is None:
            return ""
        if not self.calibration.moments[name].images:
            return "never called during calibration"
        return self.calibration.moments[name].degenerate

    def lossless(self, name: str) -> bool:
        """Whether the layer is to keep every direction and every tap."""
        config, geometry = self.configs[name], self.network.geometry[name]
        if self.free or config.automatic:
            return False
        m, taps = geometry.channels, geometry.channels * geometry.area
        return config.vectors(m) == m and config.taps_per_filter(m, geometry.area) == taps

    def _rounded(self, name: str) -> bool:
        """Whether the layer may run in bfloat16, so that its error is to include that."""
        return self.configs[name].precision == "bfloat16"

    def _stays_dense(self, name: str) -> bool:
        return name in self.points and not self.points[name].size

    def _basis(self, name: str) -> Basis:
        """The dictionary of the layer's size, or of the largest it may get."""
        if name not in self.bases:
            geometry = self.network.geometry[name]
            size = ladder(geometry, self.configs[name], self.free)[-1]
            moments = None if self.calibration is None else self.calibration.moments[name]
            weights = self.sensitivity[name].channels if name in self.sensitivity else None
            self.bases[name] = fit_dictionary(self.network.weight(name), geometry, size, moments, weights)
        basis = self.bases[name]
        return basis.first(self.points[name].size) if name in self.points else basis

    def _planes(self, name: str) -> int:
        """Planes of S that the layer's sample is to have."""
        geometry = self.network.geometry[name]
        if self.lossless(name):
            return geometry.in_channels
        size = self.points[name].size if name in self.points else ladder(geometry, self.configs[name], self.free)[-1]
        return geometry.groups * size

    def _samples(self, names: Sequence[str], *, compressed: bool) -> dict[str, Sample]:
        if self.sampler is None or not names:
            return {}
        wanted = {name: None if self.lossless(name) else self._basis(name).dictionary for name in names}
        rounded = [name for name in names if self._rounded(name)]
        return self.sampler.collect(wanted, compressed=compressed, rounded=rounded)

    def _curves(self, names: Sequence[str]) -> dict[str, list[Point]]:
        """The error curve of every layer, all on the original network's inputs."""
        curves: dict[str, list[Point]] = {}
        step = max(1, CURVE_ELEMENTS // PATCH_ELEMENTS)
        for start in range(0, len(names), step):
            part = names[start : start + step]
            known = {} if self.saved is None else {name: curve for name in part if (curve := self.saved.curve(name))}
            samples = self._samples([name for name in part if name not in known], compressed=False)
            for name in part:
                curves[name] = known.get(name) or [*self._curve(name, samples.pop(name, None)), self._dense_point(name)]
                if self.saved is not None and name not in known:
                    self.saved.put_curve(name, curves[name])
            self.tell("search", start + len(part), len(names))
        return curves

    def _dense_point(self, name: str) -> Point:
        return Point(0, 0, 1, self.costs.dense(name), 0.0, 0.0)

    def most_taps(self, name: str, size: int) -> int:
        """Taps per filter that are worth trying with k = ``size`` vectors."""
        return most_taps(self.network.geometry[name], self.pixels[name], size)

    def _curve(self, name: str, sample: Sample | None) -> list[Point]:
        geometry, config = self.network.geometry[name], self.configs[name]
        points = error_curve(
            geometry,
            self._basis(name),
            sample,
            ladder(geometry, config, self.free),
            config,
            partial(self.most_taps, name),
            partial(self.costs.lookup, name),
            free=self.free,
        )
        allowed = config.max_error
        return points if allowed is None else [point for point in points if point.error <= allowed]

    def _fit(self, name: str, sample: Sample | None) -> FittedLayer:
        config, geometry = self.configs[name], self.network.geometry[name]
        if self._stays_dense(name):
            return self.stay(name, "dense fits the budget best")
        if self.calibration is not None and sample is None:
            return self.stay(name, "never called by the compressed network")
        if self.lossless(name):
            bias = self.network.bias(name)
            zero = torch.zeros(geometry.out_channels, device=self.network.weight(name).device)
            fit = fit_lossless(
                geometry,
                self.network.weight(name),
                zero if bias is None else bias.float(),
                sample,
                config.filters_per_group(),
                rounded=self._rounded(name),
            )
            return self._finish(name, replace(fit, bias=bias))
        if name in self.points:
            return self._finish(name, self._at(name, sample, self.points[name]))
        if config.automatic:
            return self._search(name, sample)
        size = min(most_vectors(geometry), config.vectors(geometry.channels))
        taps = config.taps_per_filter(size, geometry.area)
        return self._finish(name, self._at(name, sample, Point(size, taps, config.filters_per_group(), 0.0, 0.0, 0.0)))

    def _at(self, name: str, sample: Sample | None, point: Point) -> Fit:
        basis = self._basis(name).first(point.size)
        even = self.configs[name].sparsity != "auto" and not self.free
        sizes = (point.taps, point.group_size)
        return fit_layer(self.network.geometry[name], basis, sample, *sizes, even=even, rounded=self._rounded(name))

    def _search(self, name: str, sample: Sample | None) -> FittedLayer:
        """The cheapest sizes within the allowed error, as measured."""
        allowed = self._allowed(name)
        curve = sorted(self._curve(name, sample), key=lambda point: point.cost)
        best: Fit | None = None
        for slack in (1.0, 0.9, 0.75):
            point = next((point for point in curve if point.error <= allowed * slack), None)
            if point is None:
                break
            best = self._at(name, sample, point)
            if best.error <= allowed:
                return self._finish(name, best)
        return self.stay(name, f"no size within max_error {allowed:g} is {MARGIN:g} times cheaper than dense")

    def _allowed(self, name: str) -> float:
        error = self.configs[name].max_error
        return DEFAULT_MAX_ERROR if error is None else error

    def _finish(self, name: str, fit: Fit) -> FittedLayer:
        like = self.network.weight(name)
        bias = None if fit.bias is None else fit.bias.to(like)
        limit = self.configs[name].max_error
        measured = self.calibration is not None
        reason = ""
        if not math.isfinite(fit.error):
            reason = "the fit is not finite"
        elif limit is not None and fit.error > limit:
            reason = f"error {fit.error:.3g} is over max_error {limit:g}"
        return FittedLayer(fit.weight.to(like.device, like.dtype), bias, fit.error if measured else None, reason)

    def stay(self, name: str, reason: str) -> FittedLayer:
        """The layer as it is."""
        return dense_layer(self.network.geometry[name], self.network.weight(name), self.network.bias(name), reason)
