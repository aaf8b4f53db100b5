"""The networks that are timed, written out: what a user would deploy, and two on which lookups do not pay.

Layouts follow the papers (AlexNet in its one-tower form); weights are random, for speed does not depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcnn_compile.errors import ConfigError


def _normalised(channels: int, out_channels: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def alexnet(classes: int = 1000) -> nn.Module:
    """AlexNet (Krizhevsky 2014, one tower): 5 convolutions, 3 fully connected layers, 0.71 G multiply-adds."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, 1, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, classes),
    )


def vgg16(classes: int = 1000) -> nn.Module:
    """VGG-16 (Simonyan & Zisserman 2015, configuration D): 13 convolutions, 3 fully connected layers, 15.5 G multiply-adds."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, classes))


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``, the block of a ResNet."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def _basic(channels: int, width: int, stride: int) -> tuple[list[nn.Module], int]:
    first, second = _normalised(channels, width, 3, stride), _normalised(width, width)
    return [*first, nn.ReLU(), *second], width


def _bottleneck(channels: int, width: int, stride: int) -> tuple[list[nn.Module], int]:
    reduce, middle = _normalised(channels, width, 1), _normalised(width, width, 3, stride)
    return [*reduce, nn.ReLU(), *middle, nn.ReLU(), *_normalised(width, 4 * width, 1)], 4 * width


def _resnet(
    block: Callable[[int, int, int], tuple[list[nn.Module], int]], depths: tuple[int, int, int, int], classes: int
) -> nn.Module:
    layers: list[nn.Module] = [*_normalised(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            branch, out_channels = block(channels, 64 << stage, stride)
            same = stride == 1 and channels == out_channels
            shortcut = nn.Identity() if same else nn.Sequential(*_normalised(channels, out_channels, 1, stride))
            layers.append(Residual(nn.Sequential(*branch), shortcut))
            channels = out_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 (He et al. 2016): basic blocks, 1.8 G multiply-adds."""
    return _resnet(_basic, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al. 2016), stride in the 3x3 convolution: bottleneck blocks, 4.1 G multiply-adds."""
    return _resnet(_bottleneck, (3, 4, 6, 3), classes)


def mobilenet(classes: int = 1000) -> nn.Module:
    """MobileNet (Howard et al. 2017): depthwise 3x3 and pointwise convolutions, 0.57 G multiply-adds."""
    layers: list[nn.Module] = [*_normalised(3, 32, 3, 2), nn.ReLU()]
    channels = 32
    for width, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)):
        layers += [*_normalised(channels, channels, 3, stride, channels), nn.ReLU()]
        layers += [*_normalised(channels, width, 1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def narrow(classes: int = 10) -> nn.Module:
    """Eight 3x3 convolutions of 8 channels at 224²: too narrow for a dictionary to save anything."""
    layers: list[nn.Module] = []
    for number in range(8):
        layers += [*_normalised(8 if number else 3, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


NETWORKS: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (alexnet, vgg16, resnet18, resnet50, mobilenet, narrow)}
RESOLUTION = 224


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
