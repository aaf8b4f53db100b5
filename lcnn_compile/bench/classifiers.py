"""Networks that are timed and give classes, written out: what a user would deploy, and two on which lookups do not pay.

Layouts follow the papers (AlexNet in its one-tower form).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalised(channels: int, out_channels: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm."""
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
    first, second = normalised(channels, width, 3, stride), normalised(width, width)
    return [*first, nn.ReLU(), *second], width


def _bottleneck(channels: int, width: int, stride: int) -> tuple[list[nn.Module], int]:
    reduce, middle = normalised(channels, width, 1), normalised(width, width, 3, stride)
    return [*reduce, nn.ReLU(), *middle, nn.ReLU(), *normalised(width, 4 * width, 1)], 4 * width


def _resnet(
    block: Callable[[int, int, int], tuple[list[nn.Module], int]], depths: tuple[int, int, int, int], classes: int
) -> nn.Module:
    layers: list[nn.Module] = [*normalised(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            branch, out_channels = block(channels, 64 << stage, stride)
            same = stride == 1 and channels == out_channels
            shortcut = nn.Identity() if same else nn.Sequential(*normalised(channels, out_channels, 1, stride))
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
    layers: list[nn.Module] = [*normalised(3, 32, 3, 2), nn.ReLU()]
    channels = 32
    for width, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)):
        layers += [*normalised(channels, channels, 3, stride, channels), nn.ReLU()]
        layers += [*normalised(channels, width, 1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def narrow(classes: int = 10) -> nn.Module:
    """Eight 3x3 convolutions of 8 channels at 224²: too narrow for a dictionary to save anything."""
    layers: list[nn.Module] = []
    for number in range(8):
        layers += [*normalised(8 if number else 3, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


class InvertedResidual(nn.Module):
    """A block of MobileNetV2 or V3: to more channels, a depthwise convolution, a gate or none, back to few."""

    def __init__(
        self, channels: int, wide: int, width: int, size: int, stride: int, activation: type[nn.Module], gated: bool = False
    ):
        super().__init__()
        layers: list[nn.Module] = []
        if wide != channels:
            layers += [*normalised(channels, wide, 1), activation()]
        layers += [*normalised(wide, wide, size, stride, wide), activation()]
        if gated:
            layers.append(SqueezeExcite(wide))
        self.layers = nn.Sequential(*layers, *normalised(wide, width, 1))
        self.same = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, width, H', W']."""
        y: Tensor = self.layers(x)
        return x + y if self.same else y


class SqueezeExcite(nn.Module):
    """A factor for each channel, from the means of all (Hu et al. 2018); hard sigmoid, as in MobileNetV3."""

    def __init__(self, channels: int):
        super().__init__()
        few = max(8, (channels // 4 + 4) // 8 * 8)
        self.less, self.more = nn.Conv2d(channels, few, 1), nn.Conv2d(few, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to the same."""
        return x * F.hardsigmoid(self.more(F.relu(self.less(F.adaptive_avg_pool2d(x, 1)))))


def mobilenet_v2(classes: int = 1000) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018): 0.3 G multiply-adds."""
    layers: list[nn.Module] = [*normalised(3, 32, 3, 2), nn.ReLU6()]
    channels = 32
    for expand, width, depth, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for number in range(depth):
            layers.append(InvertedResidual(channels, channels * expand, width, 3, 1 if number else stride, nn.ReLU6))
            channels = width
    layers += [*normalised(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers)


def mobilenet_v3(classes: int = 1000) -> nn.Module:
    """MobileNetV3-Large (Howard et al. 2019): 0.22 G multiply-adds."""
    layers: list[nn.Module] = [*normalised(3, 16, 3, 2), nn.Hardswish()]
    channels = 16
    for size, wide, width, gated, hard, stride in (
        *((3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1), (5, 72, 40, True, False, 2)),
        *((5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1), (3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1)),
        *((3, 184, 80, False, True, 1), (3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1)),
        *((5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
    ):
        layers.append(InvertedResidual(channels, wide, width, size, stride, nn.Hardswish if hard else nn.ReLU, gated))
        channels = width
    layers += [*normalised(160, 960, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, classes))


class DenseBlock(nn.Module):
    """Layers that each read all values before them."""

    def __init__(self, channels: int, depth: int, growth: int = 32):
        super().__init__()
        self.layers = nn.ModuleList()
        for number in range(depth):
            wide = channels + number * growth
            self.layers.append(
                nn.Sequential(
                    *(nn.BatchNorm2d(wide), nn.ReLU(), *normalised(wide, 4 * growth, 1), nn.ReLU()),
                    nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, channels + depth * growth, H, W]."""
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)))
        return torch.cat(values, 1)


def densenet121(classes: int = 1000) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017): 2.9 G multiply-adds."""
    layers: list[nn.Module] = [*normalised(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for number, depth in enumerate((6, 12, 24, 16)):
        if number:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
        layers.append(DenseBlock(channels, depth))
        channels += 32 * depth
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)
