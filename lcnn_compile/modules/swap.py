"""Dense layers and the lookup modules that take their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lcnn_compile.errors import ConversionError
from lcnn_compile.geometry import kind_of
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules.base import LookupModule
from lcnn_compile.modules.conv import LookupConv1d, LookupConv2d, LookupConv3d
from lcnn_compile.modules.linear import LookupLinear
from lcnn_compile.modules.transposed import LookupConvTranspose1d, LookupConvTranspose2d
from lcnn_compile.torch_private import children_of, move_hooks

LOOKUP_KINDS: dict[Any, type[LookupModule]] = {
    kind.dense_type: kind
    for kind in (LookupLinear, LookupConv1d, LookupConv2d, LookupConv3d, LookupConvTranspose1d, LookupConvTranspose2d)
}
"""The lookup module of each kind of dense layer."""


def dense_layer(module: LookupModule) -> Any:
    """The dense layer that a lookup module stands for."""
    return module.to_dense()


def lookup_layer(
    weight: LookupWeight, layer: Any, bias: Tensor | None, lowering: str = "auto", precision: str = "float32"
) -> LookupModule:
    """The lookup module that takes the place of ``layer``; see :meth:`LookupModule.from_weight`.

    Raises:
        ConversionError: if layers of this kind have no lookup form.
        WeightError: if the weight is invalid or does not fit the layer.
    """
    kind = kind_of(layer)
    if kind is None:
        known = ", ".join(k.__name__ for k in LOOKUP_KINDS)
        raise ConversionError(f"{type(layer).__name__} has no lookup form; there is one for {known}")
    return LOOKUP_KINDS[kind].from_weight(weight, layer, bias, lowering, precision)


def lookup_modules(model: nn.Module) -> Iterator[tuple[str, LookupModule]]:
    """Qualified name and module of every lookup module in ``model``."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LookupModule))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` hangs in ``model``, with its hooks; the model itself if that is ``old``."""
    move_hooks(old, new)
    if model is old:
        return new
    for path, parent in model.named_modules():
        children = children_of(parent)
        for name, child in children.items():
            if child is old:
                children[name] = new
                if isinstance(new, LookupModule):
                    new.path = new.path or f"{path}.{name}".lstrip(".")
    return model
