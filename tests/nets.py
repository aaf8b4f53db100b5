"""Small networks that several tests use."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A residual block as in ResNet, with in-place additions and activations."""

    def __init__(self, channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        short = [nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)]
        self.down = nn.Sequential(*short) if stride != 1 or channels != out_channels else None

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += identity
        return self.relu(y)


class SmallResNet(nn.Module):
    """[N, 3, H, W] to [N, 10]."""

    def __init__(self, channels=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(Block(channels, channels), Block(channels, 2 * channels, 2))
        self.fc = nn.Linear(2 * channels, 10)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Untraceable(nn.Module):
    """Data-dependent control flow, a loop over one module, a module used twice under two names, a branch never taken."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.loop = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(channels, 2 * channels, (1, 3), stride=2, padding="valid", groups=2)
        self.same = nn.Conv2d(2 * channels, channels, (4, 3), padding="same")
        self.alias = self.loop
        self.never = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x = self.first(x).relu()
        for _ in range(2):
            x = F.silu(self.loop(x))
        x = self.same(self.grouped(x).relu())
        if x.sum() > float("inf"):
            x = self.never(x)
        return self.alias(x)


class Functional(nn.Module):
    """Convolutions called as functions, one of them twice on the same weight."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3) / 9)
        self.offset = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(F.conv2d(x, self.kernel, self.offset, padding=1))
        return torch.conv2d(x, self.kernel, stride=2)


def randomise(model):
    """Batch statistics and affine parameters that are not the trivial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def pictures(count, size=16, channels=3):
    """Smooth random images: neighbouring pixels correlate as in photographs."""
    return F.interpolate(torch.randn(count, channels, size // 3 + 2, size // 3 + 2), size=(size, size), mode="bicubic")
