"""Sizes of lookup layers: the published settings and ours, and dense models with random lookups of those sizes.

The papers state dictionary sizes but no sparsity (it follows from an L1 penalty). We take one tap per kernel position for
"fast" and four for "accurate"; fully connected layers, which have a single position, eight and thirty-two. The paper
gives sizes for AlexNet and ResNet-18; its rule for ResNet-18 (k = width/4 and 2·width) serves the other networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lcnn_compile.config import LayerConfig
from lcnn_compile.modules import LookupModule, dense_layer, lookup_layer, random_weight

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Setting:
    """A named rule for the sizes of every layer of a network.

    Attributes:
        name: short name, as in tables and on the command line.
        sizes: (network's name, layer) to the layer's sizes; None leaves the layer dense.
    """

    name: str
    sizes: Callable[[str, Layer], LayerConfig | None]


def _channels(layer: Layer) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels // layer.groups, layer.out_channels


def _depthwise(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels


def _published(fast: bool) -> Callable[[str, Layer], LayerConfig | None]:
    def sizes(network: str, layer: Layer) -> LayerConfig | None:
        channels, filters = _channels(layer)
        classic = network in ("alexnet", "vgg16")
        if _depthwise(layer):
            return None
        if isinstance(layer, nn.Linear):
            size, taps = (512, 8) if fast else (1024, 32)
            return LayerConfig(dictionary_size=size, sparsity=taps, group_size=1) if classic else None
        if channels == 3:
            size = 3
        elif network == "alexnet":
            size = 30 if fast else 500
        else:
            # A ResNet bottleneck's wide 1x1 layers belong to a stage of a quarter of their width.
            width = min(channels, filters) if layer.kernel_size == (1, 1) else filters
            size = width // 4 if fast else 2 * width
        return LayerConfig(dictionary_size=max(1, size), sparsity=1 if fast else 4, group_size=1)

    return sizes


def _ours(network: str, layer: Layer) -> LayerConfig | None:
    """k = m/4, 54 taps per filter (all there are, where there are fewer), eight filters per group.

    Layers that read an image keep their three channels as a dictionary: there is no smaller one. Where there is one kernel
    position only, a dictionary of more vectors than a quarter of the filters would cost as much as the layer.
    """
    channels, filters = _channels(layer)
    if _depthwise(layer):
        return None
    area = 1 if isinstance(layer, nn.Linear) else layer.kernel_size[0] * layer.kernel_size[1]
    size = min(channels, filters) // 4 if area == 1 else channels // 4
    size = channels if channels <= 4 else max(1, size)
    return LayerConfig(dictionary_size=size, sparsity=min(size, 54 / area), group_size=8)


SETTINGS = {
    setting.name: setting
    for setting in (Setting("ours", _ours), Setting("paper-fast", _published(True)), Setting("paper-accurate", _published(False)))
}


def random_lookup(layer: Layer, sizes: LayerConfig) -> LookupModule:
    """A lookup layer with the geometry and bias of ``layer`` and a random He-scaled weight of the given sizes."""
    shape = (1, 1) if isinstance(layer, nn.Linear) else layer.kernel_size
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    channels, filters = _channels(layer)
    weight = random_weight(groups, channels * groups, filters, (shape[0], shape[1]), sizes)
    # random_weight has Conv2d's default variance, 1 / (3 fan_in); ReLU networks keep their signal at 2 / fan_in.
    weight = replace(weight, coefficients=weight.coefficients * 6**0.5)
    return lookup_layer(weight, layer, layer.bias, sizes.lowering, sizes.precision)


def _swap(model: nn.Module, choose: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    replacement = choose(model)
    if replacement is not None:
        return replacement
    for name, child in list(model.named_children()):
        setattr(model, name, _swap(child, choose))
    return model


def lookup_network(network: str, model: nn.Module, setting: Setting) -> nn.Module:
    """A copy of ``model`` whose layers are random lookup layers wherever the setting gives sizes."""

    def choose(module: nn.Module) -> nn.Module | None:
        sizes = setting.sizes(network, module) if isinstance(module, nn.Conv2d | nn.Linear) else None
        return random_lookup(module, sizes) if sizes is not None and isinstance(module, nn.Conv2d | nn.Linear) else None

    return _swap(copy.deepcopy(model), choose).eval()


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with every lookup layer replaced by the dense layer that computes the same function."""
    return _swap(copy.deepcopy(model), lambda m: dense_layer(m) if isinstance(m, LookupModule) else None).eval()
