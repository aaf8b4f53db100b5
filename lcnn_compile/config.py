"""LookupConfig: what to convert and how far, validated on construction, JSON in and out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lcnn_compile.errors import ConfigError

Rule = str | type
Lowering = Literal["auto", "lookup", "factored", "dense"]
Budget = Literal["macs", "time"]
LOWERING_CHOICES = ("auto", "lookup", "factored", "dense")
BUDGETS = ("macs", "time")
Precision = Literal["float32", "bfloat16", "int8", "auto"]
PRECISIONS = ("float32", "bfloat16", "int8")
"""Those that a layer may have."""
PRECISION_CHOICES = (*PRECISIONS, "auto")
SCORES_ERROR, PICTURES_ERROR = 1e-2, 5e-4
"""What max_output_error="auto" allows: of outputs with up to three dimensions, and of pictures and maps; docs/real.md says how these were chosen."""
LAYER_FIELDS = ("dictionary_size", "sparsity", "group_size", "max_error", "lowering", "precision")


def _number(name: str, value: object, allowed: str, ok: bool) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; allowed is {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    # Written so that NaN is none, nor an int beyond every float.
    return (_is_int(value) or isinstance(value, float)) and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


@dataclass(frozen=True)
class LayerConfig:
    """The sizes asked of one layer.

    Attributes:
        dictionary_size: k, an int of at least 1; or a float in (0, 1], a fraction of the channels that one convolution
            group reads; or "auto", found by a search within ``max_error``, ``max_output_error`` or ``target_speedup``.
        sparsity: taps per (filter, r, c) on average over a filter's positions, may be fractional; None uses all k;
            "auto" as above.
        group_size: g, filters that share one set of indices; 1 is the paper; "auto" as above, where time is counted.
        max_error: largest relative output error allowed for the layer; None allows any.
        lowering: "auto" chooses by cost on this machine.
        precision: "bfloat16" lets lookups on a CPU round the dictionary, the coefficients, their inputs and S to bfloat16, which
            is faster where memory or, with instructions for it, arithmetic is what bounds a layer. Sums, bias and outputs
            stay float32. The fit knows of it: ``error`` and ``max_error`` include the rounding. "int8" computes in bytes, with sums
            of 32 bits, in ranges that calibration finds; convolutions that stay dense do so too. ``error`` includes that, and a layer
            whose rounding alone costs more than its share of ``max_error`` (a quarter of its own error, where there is none) is computed
            in bfloat16 or float32, as the report says. "auto" asks for the cheapest of the three that keeps ``max_error``: the same, but
            nothing is rounded without calibration data or off the CPU.
    """

    dictionary_size: int | float | Literal["auto"] = 0.25
    sparsity: float | Literal["auto"] | None = 6
    group_size: int | Literal["auto"] = 8
    max_error: float | None = None
    lowering: Lowering = "auto"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        size = self.dictionary_size
        fraction = isinstance(size, float) and 0 < size <= 1
        _number(
            "dictionary_size",
            size,
            'an int >= 1, a fraction in (0, 1], or "auto"',
            (isinstance(size, str) and size == "auto") or fraction or (_is_int(size) and size >= 1),
        )
        sparsity = self.sparsity
        ok = sparsity is None or (isinstance(sparsity, str) and sparsity == "auto") or (_is_real(sparsity) and sparsity > 0)
        _number("sparsity", sparsity, 'a number > 0, None for all taps, or "auto"', ok)
        group = self.group_size
        _number(
            "group_size",
            group,
            'an int >= 1, or "auto"',
            (isinstance(group, str) and group == "auto") or (_is_int(group) and group >= 1),
        )
        error = self.max_error
        _number("max_error", error, "None or a number >= 0", error is None or (_is_real(error) and error >= 0))
        lowering = self.lowering
        ok = isinstance(lowering, str) and lowering in LOWERING_CHOICES
        _number("lowering", lowering, f"one of {LOWERING_CHOICES}", ok)
        precision = self.precision
        ok = isinstance(precision, str) and precision in PRECISION_CHOICES
        _number("precision", precision, f"one of {PRECISION_CHOICES}", ok)

    def vectors(self, channels: int) -> int:
        """k for a layer whose convolution groups read ``channels`` channels each; never more than ``channels``."""
        size = self.dictionary_size
        if size == "auto":
            raise ConfigError('dictionary_size is "auto"; a search must settle it first')
        return min(channels, max(1, round(size * channels)) if isinstance(size, float) else size)

    def taps_per_filter(self, vectors: int, area: int) -> int:
        """Taps of one filter over all of its ``area`` kernel positions; at least 1, at most ``vectors * area``."""
        if self.sparsity == "auto":
            raise ConfigError('sparsity is "auto"; a search must settle it first')
        every = vectors * area
        return every if self.sparsity is None else max(1, round(min(every, self.sparsity * area)))

    def filters_per_group(self) -> int:
        """g."""
        if self.group_size == "auto":
            raise ConfigError('group_size is "auto"; a search must settle it first')
        return self.group_size

    @property
    def automatic(self) -> bool:
        """Whether a search has to settle k or the taps."""
        return "auto" in (self.dictionary_size, self.sparsity)


@dataclass(frozen=True)
class LookupConfig(LayerConfig):
    """What ``convert``, ``explain`` and the backend are asked to do. The sizes are :class:`LayerConfig`'s.

    Attributes:
        target_speedup: reduction of the whole network's multiply-adds, or time, to reach (> 1); sizes are then found per layer.
        max_output_error: largest relative error ‖y − ŷ‖² / ‖y − mean(y)‖² of any of the network's outputs on calibration samples
            that are held out, and, for outputs [samples, classes], largest mean divergence in nats (> 0). Sizes are then found
            per layer: what saves most for the error that it causes at the outputs comes first, and the network is measured end to
            end, so that it is never over. With ``target_speedup`` no more than that is saved. "auto" is 0.01, and 0.0005 where an
            output has four dimensions or more: pictures show what scores of classes hide. That is also what holds where no
            sizes are named and no other limit is given. To measure it, calibration data are needed.
        budget: what ``target_speedup`` and every search count: "macs", multiply-adds; or "time", seconds of convolutions and
            linear layers on this machine, one sample, with the threads that torch has: some layers of each shape are
            timed, which takes seconds.
        include: rules for the layers to convert; empty means every supported convolution. A rule is a module's
            qualified name, a glob over it ("layer1.*"), "re:" and a regular expression that matches it whole, a type,
            or "type:" and a type's full name. A rule that matches nothing is an error.
        exclude: rules for layers to leave dense; they win over ``include``.
        layers: per-layer overrides, rule -> mapping of LayerConfig fields; later rules win.
        seed: for everything that is random.
    """

    target_speedup: float | None = None
    max_output_error: float | Literal["auto"] | None = None
    budget: Budget = "macs"
    include: tuple[Rule, ...] = ()
    exclude: tuple[Rule, ...] = ()
    layers: Mapping[Rule, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        speed = self.target_speedup
        _number("target_speedup", speed, "None or a number > 1", speed is None or (_is_real(speed) and speed > 1))
        error = self.max_output_error
        ok = error is None or (isinstance(error, str) and error == "auto") or (_is_real(error) and error > 0)
        _number("max_output_error", error, 'None, a number > 0, or "auto"', ok)
        _number("budget", self.budget, f"one of {BUDGETS}", isinstance(self.budget, str) and self.budget in BUDGETS)
        self._check_groups(self)
        _number("seed", self.seed, "an int from 0 to 2^62", _is_int(self.seed) and 0 <= self.seed <= 1 << 62)
        for name in ("include", "exclude"):
            value = getattr(self, name)
            try:
                rules: tuple[Any, ...] = (value,) if isinstance(value, str | type) else tuple(value)
            except TypeError:
                raise ConfigError(f"{name} is {value!r}; a rule or a sequence of rules is allowed") from None
            object.__setattr__(self, name, rules)
            for rule in getattr(self, name):
                _check_rule(name, rule)
        if not isinstance(self.layers, Mapping):
            raise ConfigError(f"layers is {self.layers!r}; a mapping from rules to overrides is allowed")
        for rule, override in self.layers.items():
            if not isinstance(override, Mapping):
                raise ConfigError(f"layers[{rule!r}] is {override!r}; a mapping from fields to values is allowed")
        object.__setattr__(self, "layers", {rule: dict(override) for rule, override in self.layers.items()})
        for rule, override in self.layers.items():
            _check_rule("layers", rule)
            self._check_groups(self.override(override, f"layers[{rule!r}]"), f"layers[{rule!r}]: ")

    def _check_groups(self, config: LayerConfig, where: str = "") -> None:
        # By multiply-adds alone g = 1 always wins, and is slow.
        if config.group_size == "auto" and (self.budget != "time" or not (self.network_limit or config.automatic)):
            raise ConfigError(
                f"{where}group_size is 'auto', which needs budget='time' and sizes that are searched "
                "(target_speedup, max_output_error, or dictionary_size or sparsity 'auto')"
            )

    def override(self, changes: Mapping[str, Any], name: str = "layers") -> LayerConfig:
        """The layer configuration with some fields replaced; unknown fields and bad values are a ConfigError."""
        unknown = sorted(str(key) for key in changes if key not in LAYER_FIELDS)
        if unknown:
            raise ConfigError(f"{name} has unknown fields {unknown}; allowed are {list(LAYER_FIELDS)}")
        try:
            return LayerConfig(**{f: changes.get(f, getattr(self, f)) for f in LAYER_FIELDS})
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    @property
    def network_limit(self) -> bool:
        """Whether a limit of the whole network says what sizes are found."""
        return self.target_speedup is not None or self.max_output_error is not None

    @property
    def precisions(self) -> set[str]:
        """Those of the network and of single layers."""
        return {self.precision, *(str(override["precision"]) for override in self.layers.values() if "precision" in override)}

    @property
    def takes_bytes(self) -> bool:
        """Whether some layer may compute in bytes."""
        return not self.precisions.isdisjoint(("int8", "auto"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; types become "type:" rules."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["include"] = [_rule_text(rule) for rule in self.include]
        plain["exclude"] = [_rule_text(rule) for rule in self.exclude]
        plain["layers"] = {_rule_text(rule): dict(override) for rule, override in self.layers.items()}
        return plain

    def to_json(self) -> str:
        """One JSON object, as ``from_json`` reads it."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LookupConfig:
        """The configuration of these fields. Raises ConfigError for unknown ones."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a mapping from fields to values is required, not {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ConfigError(f"unknown options {unknown}; allowed are {known}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> LookupConfig:
        """Read what ``to_json`` wrote. Raises ConfigError for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"not a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"a JSON object is required, not {type(values).__name__}")
        return cls.from_dict(values)

    @classmethod
    def automatic_sizes(cls, **changes: Any) -> LookupConfig:
        """What is asked for where a user names no sizes: what makes the network faster here within the default error of its outputs."""
        given: dict[str, Any] = {"dictionary_size": "auto", "sparsity": "auto"}
        if changes.get("max_error") is None:
            given["budget"] = "time"
        return cls.from_dict({**given, **changes})

    def replace(self, **changes: Any) -> LookupConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


def _check_rule(name: str, rule: object) -> None:
    if not isinstance(rule, str | type) or rule == "":
        raise ConfigError(f"{name} has the rule {rule!r}; a name, a glob, 're:…', 'type:…' or a type is allowed")


def _rule_text(rule: Rule) -> str:
    return f"type:{rule.__module__}.{rule.__qualname__}" if isinstance(rule, type) else rule
