"""Few-shot and few-iteration learning (LCNN, sections 3.3 and 4.3): dictionaries that are kept or carried over."""

from __future__ import annotations

import torch
from torch import nn

from lcnn_compile.errors import ConversionError
from lcnn_compile.modules import LookupModule, lookup_modules


def freeze_dictionaries(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Let only coefficients, biases and dense layers of ``model`` learn, in place; ``frozen=False`` undoes it.

    Raises:
        ConversionError: if there is no lookup module.
    """
    for module in _found(model):
        module.dictionary.requires_grad_(not frozen)
    return model


def carry_dictionaries(source: nn.Module, target: nn.Module) -> dict[str, str]:
    """Give lookup modules of ``target`` the dictionaries of ``source``, a network that may have another depth, in place.

    Each module takes that of the module of its kind and input channels whose place, as a share of the modules of
    its network that read so many channels, is nearest. Where k differs, the first min(k) vectors are taken.

    Returns:
        Names in ``target`` with the names in ``source`` that they took from; modules without a match are not in it.

    Raises:
        ConversionError: if either has no lookup module, or nothing matches.
    """
    _found(source), _found(target)
    places = _by_shape(source)
    taken: dict[str, str] = {}
    with torch.no_grad():
        for shape, names in _by_shape(target).items():
            offers = places.get(shape, [])
            for number, (name, module) in enumerate(names if offers else []):
                share = number / max(1, len(names) - 1)
                other, giver = offers[round(share * (len(offers) - 1))]
                size = min(module.dictionary_size, giver.dictionary_size)
                module.dictionary[:, :size] = giver.dictionary[:, :size].to(module.dictionary)
                taken[name] = other
    if not taken:
        raise ConversionError("no lookup modules of the two networks have the same kind, groups and input channels")
    return taken


def _found(model: nn.Module) -> list[LookupModule]:
    modules = [module for _, module in lookup_modules(model)]
    if not modules:
        raise ConversionError(f"{type(model).__name__} has no lookup module")
    return modules


def _by_shape(model: nn.Module) -> dict[tuple[type, int, int], list[tuple[str, LookupModule]]]:
    """Lookup modules by kind, groups and channels that a group reads, in their order."""
    found: dict[tuple[type, int, int], list[tuple[str, LookupModule]]] = {}
    for name, module in lookup_modules(model):
        found.setdefault((type(module), *module.dictionary.shape[::2]), []).append((name, module))
    return found
