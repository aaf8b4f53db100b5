"""The plan of a conversion: which layers the rules choose, with which sizes, and a report row for every one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from lcnn_compile.config import Budget, LayerConfig, LookupConfig
from lcnn_compile.conversion.calls import Called
from lcnn_compile.conversion.intercept import Orders, intercept, replace_layer, settle
from lcnn_compile.conversion.obstacles import too_narrow, weight_of
from lcnn_compile.conversion.selection import EXCLUDED, check_rules, layer_config, select
from lcnn_compile.conversion.survey import Survey, Usage, survey
from lcnn_compile.errors import ConversionError
from lcnn_compile.fitting.costs import Timer
from lcnn_compile.fitting.dictionary import most_vectors
from lcnn_compile.fitting.fitted import FittedLayer
from lcnn_compile.geometry import Layer, geometry_of, kind_of
from lcnn_compile.kernels import choose
from lcnn_compile.kernels.operator import has_lookup_kernel
from lcnn_compile.kernels.problem import RATE
from lcnn_compile.modules import lookup_layer
from lcnn_compile.passes.lift import lift_functional_convolutions
from lcnn_compile.report import LayerReport


@dataclass(frozen=True)
class Rounding:
    """What has become of a layer that was to be rounded to eight bits.

    Attributes:
        precision: that it has now.
        error: what its rounding costs, ‖y − ŷ‖² / ‖y − mean(y)‖² against itself in float32 on the inputs that the rounded network gives it.
        reason: why it is not of bytes; empty where it is.
    """

    precision: str
    error: float
    reason: str


class Plan:
    """The layers that the rules choose, their sizes, and the reason for every other one."""

    def __init__(self, model: nn.Module, config: LookupConfig, example_inputs: Any):
        self.model = model
        self.survey: Survey = survey(model, example_inputs)
        self.orders: Orders = {}
        self.searched = config.network_limit
        self._left: dict[str, Called] = {}
        if isinstance(model, fx.GraphModule):
            self._lift(example_inputs)
        elif self.survey.calls:
            found = intercept(model, self.survey, lambda: survey(model, example_inputs))
            self.survey, self.orders = found.survey, found.orders
            self._left = _named(found.left, self.survey.layers)
        check_rules(config, self.survey.layers)
        ruled = select(config, self.survey.layers)
        self.configs: dict[str, LayerConfig] = {}
        self.reasons: dict[str, str] = {}
        for name, layer in self.survey.layers.items():
            settings = layer_config(config, name, layer)
            reason = self.survey.reasons[name] or ruled[name]
            if not reason and not config.network_limit and not any(name == str(rule) for rule in config.layers):
                reason = too_narrow(layer, settings)
            self.reasons[name] = reason
            if not reason:
                self.configs[name] = settings

    def _lift(self, example_inputs: Any) -> None:
        """Make modules of the convolutions that a graph calls as functions."""
        try:
            self.model = lift_functional_convolutions(self.model)  # type: ignore[arg-type]
            self.survey = survey(self.model, example_inputs)
            why = "called as a function on a weight or geometry that is computed, or of a kind that has no lookup form"
        except Exception as error:
            # A graph may hold anything; module calls can still be replaced.
            first = (str(error).splitlines() or [""])[0]
            why = f"called as a function in a graph that cannot be changed ({type(error).__name__}: {first})"
        for call in self.survey.calls:
            call.reason = call.reason or why
        self._left = _named(self.survey.calls, self.survey.layers)

    def replace(self, model: nn.Module, fitted: Mapping[str, FittedLayer]) -> nn.Module:
        """``model``, which is the plan's or a copy of it, with the fitted layers in place."""
        layers = {name: model.get_submodule(name) for name, fit in fitted.items() if not fit.reason}
        for name, layer in layers.items():
            fit, settings = fitted[name], self.configs[name]
            new = lookup_layer(fit.weight, layer, fit.bias, settings.lowering, _stated(settings.precision))
            model = replace_layer(model, layer, new)
        return settle(model, self.orders)

    @property
    def chosen(self) -> dict[str, Layer]:
        """The layers to replace, by name."""
        return {name: self.survey.layers[name] for name in self.configs}  # type: ignore[misc]

    @property
    def excluded(self) -> set[str]:
        """The layers that a rule excludes."""
        return {name for name, reason in self.reasons.items() if reason == EXCLUDED}

    def names(self) -> list[str]:
        """Rows of the report: layers, then convolutions called as functions that stay so, then recurrent layers and attention."""
        return [*self.survey.layers, *self._left, *self.survey.fixed]

    def other(self, budget: Budget) -> float:
        """Multiply-adds per sample, or seconds where they can be measured, of the layers that are not chosen."""
        others = {name: use for name, use in self.survey.usage.items() if name not in self.configs}
        fixed = sum(layer.macs or 0 for layer in self.survey.fixed.values())
        if budget == "macs":
            return sum(use.macs for use in others.values()) + sum(call.macs for call in self._left.values()) + fixed
        kinds = [name for name in others if kind_of(self.survey.layers[name]) is not None and not self.survey.reasons[name]]
        return sum(self.seconds(name, 0, 0, 1) for name in kinds) + fixed / RATE

    def outlook(self, config: LookupConfig) -> list[str]:
        """What can be said of a budget before anything is fitted."""
        before = sum(use.macs for use in self.survey.usage.values())
        outside = self.other("macs")
        before += sum(call.macs for call in self._left.values()) + sum(layer.macs or 0 for layer in self.survey.fixed.values())
        if config.target_speedup is None or not before:
            return []
        room = before / config.target_speedup - outside
        share = (
            f"the layers that may change hold {100 * (1 - outside / before):.0f} % of {before / 1e6:.1f} million multiply-adds"
        )
        if config.budget == "time":
            return [f"target_speedup {config.target_speedup:g} is of time, which is measured in a conversion; {share}"]
        if room <= 0:
            return [
                f"target_speedup {config.target_speedup:g} cannot be reached: {share}, so {before / outside:.2f}x is beyond any sizes"
            ]
        return [
            f"target_speedup {config.target_speedup:g} would leave {before / config.target_speedup / 1e6:.1f} million multiply-adds: {share}, "
            f"which have to get {(before - outside) / room:.2f}x cheaper. What that costs in accuracy only a conversion with calibration data tells"
        ]

    def timer(self, budget: Budget) -> Timer | None:
        """What measures a layer, where time is counted."""
        return self.seconds if budget == "time" else None

    def seconds(self, name: str, size: int, taps: int, group_size: int) -> float:
        """Seconds of a layer for one sample, measured here on random values.

        Args:
            name: of a layer that ran on the example inputs.
            size: k; 0 for the dense layer.
            taps: of each filter.
            group_size: g.

        Raises:
            ConversionError: if the layer has not run.
        """
        layer, use = self.survey.layers[name], self.survey.usage.get(name)
        if use is None:
            raise ConversionError(f"{name}: budget='time' needs a layer to run on the example inputs; exclude it")
        geometry = geometry_of(layer)  # type: ignore[arg-type]
        problem = self._problem(name, layer, use, max(1, size), geometry.out_channels * max(1, taps), group_size)  # type: ignore[arg-type]
        found = choose.seconds(problem, has_lookup_kernel(problem.device, problem.dtype))
        wanted = self.configs[name].lowering if name in self.configs else "auto"
        lowering = "dense" if not size else wanted if wanted in found else "lookup" if "lookup" in found else "factored"
        return found[lowering] * use.out_pixels / problem.out_pixels

    def row(self, name: str, fit: FittedLayer | None, rounding: Rounding | None = None) -> LayerReport:
        """The report's row for a layer: as fitted and rounded, or as it would be."""
        row = self._row(name, fit)
        if rounding is None:
            return row if fit is None else replace(row, precision=_stated(row.precision))
        error = rounding.error if row.error is None and not row.replaced else row.error
        if row.replaced and error is not None:
            error += rounding.error
        in_bytes = "" if row.replaced or rounding.precision != "int8" else "computed in eight bits all the same"
        reason = "; ".join(filter(None, (row.reason, rounding.reason, in_bytes)))
        return replace(row, precision=rounding.precision, error=error, reason=reason)

    def _row(self, name: str, fit: FittedLayer | None) -> LayerReport:
        if name in self.survey.fixed:
            stays = self.survey.fixed[name]
            row = LayerReport(name, stays.kind, False, reason=stays.reason, macs_before=stays.macs, macs_after=stays.macs)
            return replace(row, bytes_before=stays.nbytes, bytes_after=stays.nbytes)
        if name in self._left:
            call = self._left[name]
            return LayerReport(name, call.function, False, reason=call.reason, macs_before=call.macs, macs_after=call.macs)
        layer, use = self.survey.layers[name], self.survey.usage.get(name)
        kind, macs = type(layer).__name__, None if use is None else use.macs
        size = _dense_bytes(layer)
        reason = self.reasons[name] or (fit.reason if fit else "")
        if reason or kind_of(layer) is None:
            error = fit.error if fit else None
            dense = {"macs_before": macs, "macs_after": macs, "bytes_before": size, "bytes_after": size}
            return LayerReport(name, kind, False, error=error, reason=reason, **dense)  # type: ignore[arg-type]
        if fit is None:
            return self._planned(name, self.chosen[name], use, size)
        weight, stored = fit.weight, geometry_of(layer).stored(fit.weight)  # type: ignore[arg-type]
        bias = 0 if fit.bias is None else fit.bias.numel() * fit.bias.element_size()
        return LayerReport(
            name,
            kind,
            True,
            weight.dictionary_size,
            weight.taps / weight.out_channels,
            weight.group_size,
            fit.error,
            macs_before=macs,
            macs_after=None if use is None else weight.macs(use.out_pixels, use.in_pixels),
            bytes_before=size,
            bytes_after=stored.nbytes() + bias,
            lowering=self._lowering(name, layer, weight.dictionary_size, weight.taps, weight.group_size),  # type: ignore[arg-type]
            reason="never ran on the example inputs" if use is None and self.survey.usage else "",
            precision=self.configs[name].precision,
            output_error=fit.output_error,
        )

    def _planned(self, name: str, layer: Layer, use: Usage | None, size: int) -> LayerReport:
        """The row of a layer that would be replaced."""
        config, kind = self.configs[name], type(layer).__name__
        macs = None if use is None else use.macs
        if config.automatic or config.group_size == "auto" or self.searched:
            remark = "sizes found by a search when it is converted"
            same = {"macs_before": macs, "macs_after": macs, "bytes_before": size, "bytes_after": size}
            return LayerReport(name, kind, True, reason=remark, precision=config.precision, **same)  # type: ignore[arg-type]
        geometry = geometry_of(layer)
        k = min(config.vectors(geometry.channels), most_vectors(geometry))
        taps = config.taps_per_filter(k, geometry.area)
        g = min(config.filters_per_group(), geometry.filters)
        rows = geometry.groups * -(-geometry.filters // g) * taps
        element = layer.weight.element_size()
        bias = 0 if layer.bias is None else geometry.out_channels
        return LayerReport(
            name,
            kind,
            True,
            k,
            taps,
            g,
            macs_before=macs,
            macs_after=None
            if use is None
            else k * geometry.in_channels * use.in_pixels + geometry.out_channels * taps * use.out_pixels,
            bytes_before=size,
            bytes_after=element * (k * geometry.in_channels + rows * g + bias) + 8 * rows,
            lowering=self._lowering(name, layer, k, geometry.out_channels * taps, g),
            precision=config.precision,
        )

    def _lowering(self, name: str, layer: Layer, k: int, taps: int, group_size: int) -> str:
        """The lowering that this layer runs with on one sample."""
        wanted, use = self.configs[name].lowering, self.survey.usage.get(name)
        if wanted != "auto":
            return wanted
        problem = self._problem(name, layer, use, k, taps, group_size)
        return choose.cheapest(problem, has_lookup_kernel(problem.device, problem.dtype))

    def _problem(self, name: str, layer: Layer, use: Usage | None, k: int, taps: int, group_size: int) -> choose.Problem:
        """A layer of these sizes on one sample; ``taps`` of all filters."""
        geometry = geometry_of(layer)
        call, size = geometry.call(), use.size if use else (28, 28) if geometry.area > 1 else (1, 1)
        wanted = _stated(self.configs[name].precision) if name in self.configs else "float32"
        return choose.Problem(
            # Rows of numbers are pixels that a fully connected layer takes together.
            batch=use.out_pixels if use and size == (1, 1) else 1,
            in_channels=geometry.in_channels,
            out_channels=call.out_channels,
            groups=geometry.groups,
            dictionary_size=k,
            taps=taps,
            group_size=group_size,
            size=size,
            kernel_size=call.kernel_size,
            stride=call.stride,
            padding=call.padding,
            dilation=call.dilation,
            device=layer.weight.device.type,
            dtype=layer.weight.dtype,
            precision=choose.known_precision(wanted, layer.weight.device.type, layer.weight.dtype),
        )


def _stated(precision: str) -> str:
    """The precision of a layer until its rounding is measured."""
    return "float32" if precision == "auto" else precision


def _named(calls: Sequence[Called], layers: Mapping[str, Any]) -> dict[str, Called]:
    """A name for each row of the report: where the call is and its function, numbered where that is not enough."""
    found: dict[str, Called] = {}
    for call in calls:
        name = base = f"{call.where}.{call.function}" if call.where else call.function
        number = 1
        while name in found or name in layers:
            name, number = f"{base}_{number}", number + 1
        found[name] = call
    return found


def _dense_bytes(layer: nn.Module) -> int:
    """Bytes of a dense layer's parameters, or of its packed weight where it is quantised."""
    size = sum(p.numel() * p.element_size() for p in layer.parameters() if not nn.parameter.is_lazy(p))
    weight = weight_of(layer)
    return size or (0 if weight is None else weight.numel() * weight.element_size())
