"""Which layers a LookupConfig's rules choose, and with which sizes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from torch import nn

from lcnn_compile.config import LayerConfig, LookupConfig, Rule
from lcnn_compile.errors import ConfigError

EXCLUDED = "excluded"
"""Why a layer stays dense that a rule of ``exclude`` names."""


def matches(rule: Rule, name: str, layer: nn.Module) -> bool:
    """Whether ``rule`` chooses the layer with the qualified ``name``."""
    if isinstance(rule, type):
        return isinstance(layer, rule)
    if rule.startswith("type:"):
        return any(f"{base.__module__}.{base.__qualname__}" == rule[5:] for base in type(layer).__mro__)
    if rule.startswith("re:"):
        try:
            return re.fullmatch(rule[3:], name) is not None
        except re.error as error:
            raise ConfigError(f"the rule {rule!r} is not a regular expression: {error}") from None
    return rule == name or fnmatch.fnmatchcase(name, rule)


def check_rules(config: LookupConfig, layers: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError for every rule that matches none of ``layers``."""
    named: Sequence[tuple[str, Sequence[Rule]]] = (
        ("include", config.include),
        ("exclude", config.exclude),
        ("layers", tuple(config.layers)),
    )
    for field, rules in named:
        for rule in rules:
            if not any(matches(rule, name, layer) for name, layer in layers.items()):
                known = ", ".join(list(layers)[:8]) + (", …" if len(layers) > 8 else "")
                raise ConfigError(f"{field}: the rule {rule!r} matches no layer; the layers are: {known or 'none'}")


def select(config: LookupConfig, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each of ``layers`` the reason why the rules leave it dense, or "" where they choose it.

    Linear layers are chosen only by a rule of ``include``: a network's convolutions are what is asked for by default.
    """
    reasons = {}
    for name, layer in layers.items():
        included = any(matches(rule, name, layer) for rule in config.include)
        if any(matches(rule, name, layer) for rule in config.exclude):
            reasons[name] = EXCLUDED
        elif config.include and not included:
            reasons[name] = "not included"
        elif not config.include and isinstance(layer, nn.Linear):
            reasons[name] = "linear layers are converted only where include names them"
        else:
            reasons[name] = ""
    return reasons


def layer_config(config: LookupConfig, name: str, layer: nn.Module) -> LayerConfig:
    """The sizes asked of one layer: the configuration's own, then every matching override in order."""
    changes: dict[str, object] = {}
    for rule, override in config.layers.items():
        if matches(rule, name, layer):
            changes.update(override)
    if config.target_speedup is not None:
        changes = {"dictionary_size": "auto", "sparsity": "auto", **changes}
    return config.override(changes)
