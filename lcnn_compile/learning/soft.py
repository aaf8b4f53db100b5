"""Supports that move while a network trains, and training from scratch (LCNN, section 3.2).

In its soft form a lookup module has every (vector, r, c) as a tap, so that its coefficients are all of P, and a rule that
zeroes most of them in the forward pass. ``harden`` drops what is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lcnn_compile.errors import ConfigError, ConversionError
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import LookupModule, lookup_modules

Rule = Literal["top", "threshold"]
RULES = ("top", "threshold")


class _Support(nn.Module):
    """Which rows of the coefficients [F·K, g] count; ``members`` is how many filters each filter group has, [F]."""

    members: Tensor

    def __init__(self, members: Tensor) -> None:
        super().__init__()
        self.register_buffer("members", members)

    def strengths(self, coefficients: Tensor) -> Tensor:
        """Root mean square of each tap's coefficients over the filters that share it, [F, K]."""
        rows = coefficients.detach().unflatten(0, (self.members.shape[0], -1))
        return (rows.square().sum(2) / self.members[:, None]).sqrt()


class TopTaps(_Support):
    """The strongest taps of the layer, ``taps`` per filter on average and at least one each; gradients reach all taps."""

    def __init__(self, members: Tensor, taps: float) -> None:
        super().__init__(members)
        self.taps = taps

    def forward(self, coefficients: Tensor) -> Tensor:
        """[F·K, g] with the other rows zero."""
        strengths = self.strengths(coefficients)
        # A tap of a small filter group costs less; what counts is the gain for each multiply-add, the mean square.
        best = strengths.argmax(1, keepdim=True)
        order = strengths.scatter(1, best, float("inf")).flatten().argsort(descending=True, stable=True)
        costs = self.members[:, None].expand_as(strengths).flatten()[order].cumsum(0)
        kept = order[costs <= self.taps * self.members.sum()]
        mask = torch.zeros_like(strengths).flatten().index_fill(0, kept, 1.0)
        mask = mask.index_fill(0, best.flatten() + torch.arange(len(best), device=best.device) * strengths.shape[1], 1.0)
        return coefficients - (coefficients * (1 - mask[:, None])).detach()


class Threshold(_Support):
    """Taps stronger than ε; the others are zero and get no gradient (δ in LCNN, section 3.2)."""

    def __init__(self, members: Tensor, epsilon: float, penalty: float) -> None:
        super().__init__(members)
        self.epsilon, self.penalty = epsilon, penalty

    def forward(self, coefficients: Tensor) -> Tensor:
        """[F·K, g] with weak rows zero."""
        return coefficients * (self.strengths(coefficients) > self.epsilon).flatten()[:, None]


def soften(
    model: nn.Module,
    *,
    rule: Rule = "top",
    sparsity: float | None = None,
    epsilon: float | None = None,
    penalty: float = 0.2,
) -> nn.Module:
    """Let the supports of all lookup modules in ``model`` move while it trains, in place.

    Every (vector, r, c) becomes a tap, new ones with the coefficient zero; ``coefficients`` of each module is
    parametrised (``torch.nn.utils.parametrize``), and an optimizer must be made afterwards. For training from scratch, build
    the network from lookup modules with ``sparsity=None``, soften, train, :func:`harden`.

    Args:
        model: holds at least one lookup module.
        rule: "top" keeps the strongest taps after each step, with straight-through gradients; "threshold" zeroes what is
            weaker than ε and adds λ‖P‖₁ to the loss (see :func:`sparsity_penalty`), as the paper does.
        sparsity: of "top": taps per (filter, r, c) on average over a layer; as many as the layer has now by default.
        epsilon: of "threshold", for all layers; by default 0.01·σ of each layer, σ the standard deviation of its
            initialiser (the paper's setting for AlexNet; 0.001·σ for ResNets).
        penalty: λ′ of "threshold": λ = λ′·ε. The paper takes 0.1 to 0.3.

    Returns:
        ``model``.

    Raises:
        ConfigError: for arguments out of range, or a model that is soft already.
        ConversionError: if there is no lookup module.
    """
    if rule not in RULES:
        raise ConfigError(f"rule is {rule!r}; allowed are {RULES}")
    if (sparsity is not None and not sparsity > 0) or (epsilon is not None and not epsilon >= 0) or not penalty >= 0:
        raise ConfigError(f"sparsity is {sparsity}, epsilon {epsilon}, penalty {penalty}; positive numbers are required")
    modules = dict(lookup_modules(model))
    if not modules:
        raise ConversionError(f"{type(model).__name__} has no lookup module to soften")
    for name, module in modules.items():
        if parametrize.is_parametrized(module, "coefficients"):
            raise ConfigError(f"{name or type(module).__name__} is soft already; harden it first")
    for module in modules.values():
        weight = module.lookup_weight().detach()
        members = (weight.filters >= 0).sum(1)
        area = weight.kernel_size[0] * weight.kernel_size[1]
        taps = weight.taps / int(members.sum()) if sparsity is None else min(sparsity, weight.dictionary_size) * area
        deviation = (3 * weight.in_channels / weight.groups * area) ** -0.5
        level = 0.01 * deviation if epsilon is None else epsilon
        _set(module, _with_every_tap(weight), bool(module.coefficients.requires_grad))
        support = TopTaps(members, taps) if rule == "top" else Threshold(members, level, penalty * level)
        # Unsafe only in that the parametrisation may change the shape, which it does not.
        parametrize.register_parametrization(module, "coefficients", support, unsafe=True)
    return model


def sparsity_penalty(model: nn.Module) -> Tensor | float:
    """Σ λ‖P‖₁ over the modules of ``model`` that are soft by threshold, a scalar that trains P; 0.0 without any."""
    total: Tensor | float = 0.0
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for rule in module:
                if isinstance(rule, Threshold) and rule.penalty:
                    total = total + rule.penalty * module.original.abs().sum()
    return total


def harden(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which soft modules are lookup modules with the taps they have now; outputs do not change.

    Raises:
        ConversionError: if no module is soft.
    """
    result = copy.deepcopy(model)
    soft = [module for _, module in lookup_modules(result) if parametrize.is_parametrized(module, "coefficients")]
    if not soft:
        raise ConversionError(f"{type(model).__name__} has no soft lookup module; soften() makes them")
    for module in soft:
        if len(module.parametrizations) > 1:  # type: ignore[arg-type]
            raise ConversionError(f"{module}: other parametrisations than soften()'s must be removed first")
        learns = module.parametrizations["coefficients"].original.requires_grad  # type: ignore[index, union-attr]
        weight = _without_zero_taps(module.lookup_weight().detach())
        # torch's own removal takes the property off the class, which the copy shares with the model that stays soft.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        _set(module, weight, learns)
    return result


def _set(module: LookupModule, weight: LookupWeight, learns: bool) -> None:
    """Give the module the taps and coefficients of a weight whose other tensors it has."""
    module.coefficients = nn.Parameter(weight.coefficients.clone(), requires_grad=learns)
    for name in ("indices", "positions", "offsets"):
        setattr(module, name, getattr(weight, name))


def _with_every_tap(weight: LookupWeight) -> LookupWeight:
    """The same weight with all k·kh·kw taps in every filter group, ordered by vector and position."""
    groups, area = weight.filters.shape[0], weight.kernel_size[0] * weight.kernel_size[1]
    size = weight.dictionary_size * area
    owner = torch.repeat_interleave(torch.arange(groups, device=weight.offsets.device), weight.offsets.diff().long())
    columns = weight.indices.long() * area + weight.positions.long()
    coefficients = weight.coefficients.new_zeros(groups * size, weight.group_size)
    coefficients.index_add_(0, owner * size + columns, weight.coefficients)
    every = torch.arange(size, dtype=torch.int32, device=weight.indices.device).repeat(groups)
    offsets = torch.arange(groups + 1, dtype=torch.int32, device=weight.offsets.device) * size
    tensors = weight.tensors() | {
        "coefficients": coefficients,
        "indices": every // area,
        "positions": every % area,
        "offsets": offsets,
    }
    return LookupWeight(**tensors, kernel_size=weight.kernel_size)


def _without_zero_taps(weight: LookupWeight) -> LookupWeight:
    """The same weight less the taps whose coefficients are all zero, but for one in each filter group."""
    lengths = weight.offsets.diff().long()
    used = (weight.coefficients != 0).any(1)
    starts = weight.offsets[:-1].long()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    empty = torch.zeros_like(lengths).index_add_(0, owner, used.long()) == 0
    used[starts[empty & (lengths > 0)]] = True
    counts = torch.zeros_like(lengths).index_add_(0, owner[used], torch.ones_like(owner[used]))
    tensors = weight.tensors() | {name: getattr(weight, name)[used] for name in ("coefficients", "indices", "positions")}
    tensors["offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return LookupWeight(**tensors, kernel_size=weight.kernel_size)


def soft_taps(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Name and taps per filter, as they are now, of each lookup module; to watch a support while it trains."""
    for name, module in lookup_modules(model):
        weight = module.lookup_weight().detach()
        rows = (weight.coefficients != 0).any(1)
        owner = torch.repeat_interleave((weight.filters >= 0).sum(1), weight.offsets.diff().long())
        yield name, float((rows * owner).sum()) / max(1, weight.out_channels)
