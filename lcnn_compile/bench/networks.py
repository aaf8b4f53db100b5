"""The networks that are timed, by name; weights are random, for speed does not depend on their values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcnn_compile.bench.classifiers import (
    alexnet,
    densenet121,
    mobilenet,
    mobilenet_v2,
    mobilenet_v3,
    narrow,
    resnet18,
    resnet50,
    vgg16,
)
from lcnn_compile.bench.dense_prediction import compact_sr, detector, edsr, unet
from lcnn_compile.errors import ConfigError

_ALL = (
    *(alexnet, vgg16, resnet18, resnet50, mobilenet, mobilenet_v2, mobilenet_v3, densenet121),
    *(unet, detector, edsr, compact_sr, narrow),
)
NETWORKS: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in _ALL}
RESOLUTION = 224
RESOLUTIONS = {"unet": 256, "detector": 320, "edsr": 128, "compact_sr": 128}
"""Of networks whose images have another size."""


def build(name: str) -> nn.Module:
    """The network of that name, in evaluation mode, with He-initialised random weights so that signals keep their size.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in NETWORKS:
        raise ConfigError(f"network is {name!r}; allowed are {sorted(NETWORKS)}")
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model.eval()


def example_input(batch: int, resolution: int = RESOLUTION, seed: int = 0) -> Tensor:
    """A random image batch, [batch, 3, resolution, resolution]."""
    return torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed))
