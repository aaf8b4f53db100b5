"""Why a layer cannot be, or should not be, replaced: every reason names what stands in the way and what to do about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lcnn_compile.config import LayerConfig
from lcnn_compile.geometry import geometry_of, kind_of
from lcnn_compile.torch_private import pre_hooks_of

QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.")
"""Where PyTorch's quantised layers and those of quantisation-aware training come from."""

TRANSFORMED = "inside of a torch.func transform, as torch.vmap, which hides its inputs"
DEPTHWISE = "depthwise: one input channel per group leaves nothing to look up"

_OLD_NORMS = {
    "WeightNorm": "weight norm (remove it with torch.nn.utils.remove_weight_norm)",
    "SpectralNorm": "spectral norm (remove it with torch.nn.utils.remove_spectral_norm)",
    "BasePruningMethod": "pruning (make it permanent with torch.nn.utils.prune.remove)",
}


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is one of PyTorch's quantised convolutions or linear layers, or one in quantisation-aware training."""
    return type(layer).__module__.startswith(QUANTISED) and hasattr(layer, "weight")


def obstacle(layer: nn.Module) -> str:
    """Why no lookup module can take the place of ``layer``; "" where one can."""
    name = type(layer).__name__
    if is_quantised(layer):
        return f"quantised ({type(layer).__module__}.{name}): convert the float model, before quantisation"
    kind = kind_of(layer)
    if kind is None:
        return f"{name} has no lookup form"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "lazy: its sizes are not known before it has run once; give example_inputs, or call the model once"
    if computed := _computed(layer, weight):
        return computed
    assert isinstance(weight, nn.Parameter)
    if not _plain_forward(layer, kind):
        return f"{name} has a forward of its own, which a lookup {kind.__name__} would not run"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if not weight.is_floating_point():
        return f"its weight has dtype {weight.dtype}; a floating-point one is required"
    if weight.numel() == 0:
        return f"its weight has shape {tuple(weight.shape)}, without elements"
    groups: Any = getattr(layer, "groups", 1)
    if groups > 1 and groups == layer.in_channels:
        return DEPTHWISE
    return ""


def _computed(layer: nn.Module, weight: object) -> str:
    """Which parametrisation computes the weight; "" where it is a parameter of its own."""
    if parametrize.is_parametrized(layer):
        found: Any = layer.parametrizations
        for tensor, steps in found.items():
            names = ", ".join(type(step).__name__.lstrip("_") for step in steps)
            return (
                f"its {tensor} is parametrised by {names}; to convert it, make it permanent with "
                f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{tensor}")'
            )
    if isinstance(weight, nn.Parameter):
        return ""
    hooks = [type(hook) for hook in pre_hooks_of(layer)]
    for base in (base for hook in hooks for base in hook.__mro__):
        if base.__name__ in _OLD_NORMS:
            return f"its weight is parametrised by {_OLD_NORMS[base.__name__]}"
    return "its weight is computed at every call (parametrised), not a parameter of its own"


def _plain_forward(layer: nn.Module, kind: Any) -> bool:
    """Whether a subclass computes what its base does."""
    own = type(layer)
    same = own.forward is kind.forward
    return same and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def too_narrow(layer: Any, config: LayerConfig) -> str:
    """Why a fractional dictionary makes no sense for ``layer``; "" where it does, or where a search finds the size."""
    if kind_of(layer) is None:
        return ""
    channels, size = geometry_of(layer).channels, config.dictionary_size
    if channels <= 3 and isinstance(size, float) and size < 1:
        return f"too few input channels ({channels}) for a smaller dictionary; give dictionary_size as an int to insist"
    return ""


def weight_of(layer: nn.Module) -> Tensor | None:
    """The dense weight of any layer, quantised ones included; None where it cannot be had."""
    weight = getattr(layer, "weight", None)
    if callable(weight) and not isinstance(weight, Tensor):
        weight = weight()
    return weight if isinstance(weight, torch.Tensor) and not nn.parameter.is_lazy(weight) else None
