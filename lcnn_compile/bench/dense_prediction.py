"""Networks that are timed and give more than a class: segmentation, detection, super-resolution; written out after the papers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile.bench.classifiers import normalised


def _silu(channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*normalised(channels, out_channels, size, stride), nn.SiLU())


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with padding and batch norm: 64 to 512 channels, transposed convolutions, 3 classes."""

    def __init__(self, classes: int = 3):
        super().__init__()

        def double(channels: int, width: int) -> nn.Sequential:
            return nn.Sequential(*normalised(channels, width), nn.ReLU(), *normalised(width, width), nn.ReLU())

        widths = (64, 128, 256, 512)
        self.down = nn.ModuleList(double(m, n) for m, n in zip((3, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        pairs = [(widths[i + 1], widths[i]) for i in (2, 1, 0)]
        self.up = nn.ModuleList(nn.ConvTranspose2d(m, n, 2, 2) for m, n in pairs)
        self.join = nn.ModuleList(double(m, n) for m, n in pairs)
        self.last = nn.Conv2d(64, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, classes, H, W]; H and W are multiples of 8."""
        levels: list[Tensor] = []
        for number, level in enumerate(self.down):
            x = level(self.pool(x) if number else x)
            levels.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(levels[:-1]), strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        result: Tensor = self.last(x)
        return result


class C2f(nn.Module):
    """A cross-stage block whose bottlenecks each add their result to what is concatenated (Ultralytics YOLOv8)."""

    def __init__(self, channels: int, width: int, depth: int, shortcut: bool):
        super().__init__()
        part, self.shortcut = width // 2, shortcut
        self.first = _silu(channels, width, 1)
        self.blocks = nn.ModuleList(nn.Sequential(_silu(part, part), _silu(part, part)) for _ in range(depth))
        self.last = _silu((2 + depth) * part, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, width, H, W]."""
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            made = block(parts[-1])
            parts.append(parts[-1] + made if self.shortcut else made)
        result: Tensor = self.last(torch.cat(parts, 1))
        return result


class FastPyramidPooling(nn.Module):
    """The same maximum three times over, concatenated (SPPF)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.pool = _silu(channels, channels // 2, 1), nn.MaxPool2d(5, 1, 2)
        self.last = _silu(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to the same."""
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        result: Tensor = self.last(torch.cat(parts, 1))
        return result


class Detector(nn.Module):
    """A one-stage detector of C2f blocks and SiLU, of YOLOv8s' widths, with three scales of outputs before any decoding."""

    def __init__(self, classes: int = 80):
        super().__init__()
        self.stem = nn.Sequential(_silu(3, 32, 3, 2), _silu(32, 64, 3, 2), C2f(64, 64, 1, True))
        self.third = nn.Sequential(_silu(64, 128, 3, 2), C2f(128, 128, 2, True))
        self.fourth = nn.Sequential(_silu(128, 256, 3, 2), C2f(256, 256, 2, True))
        self.fifth = nn.Sequential(_silu(256, 512, 3, 2), C2f(512, 512, 1, True), FastPyramidPooling(512))
        self.up_fourth, self.up_third = C2f(768, 256, 1, False), C2f(384, 128, 1, False)
        self.down_fourth, self.down_fifth = _silu(128, 128, 3, 2), _silu(256, 256, 3, 2)
        self.out_fourth, self.out_fifth = C2f(384, 256, 1, False), C2f(768, 512, 1, False)
        self.boxes = nn.ModuleList(nn.Sequential(_silu(c, 64), _silu(64, 64), nn.Conv2d(64, 64, 1)) for c in (128, 256, 512))
        self.classes = nn.ModuleList(
            nn.Sequential(_silu(c, 128), _silu(128, 128), nn.Conv2d(128, classes, 1)) for c in (128, 256, 512)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W], multiples of 32, to [N, 64 + classes, places], those at 1/8, 1/16 and 1/32 of the resolution."""
        third = self.third(self.stem(x))
        fourth = self.fourth(third)
        fifth = self.fifth(fourth)
        up_fourth = self.up_fourth(torch.cat([F.interpolate(fifth, scale_factor=2.0, mode="nearest"), fourth], 1))
        small = self.up_third(torch.cat([F.interpolate(up_fourth, scale_factor=2.0, mode="nearest"), third], 1))
        medium = self.out_fourth(torch.cat([self.down_fourth(small), up_fourth], 1))
        large = self.out_fifth(torch.cat([self.down_fifth(medium), fifth], 1))
        scales = (small, medium, large)
        made = [torch.cat([box(y), kind(y)], 1) for box, kind, y in zip(self.boxes, self.classes, scales, strict=True)]
        return torch.cat([y.flatten(2) for y in made], 2)


class _ScaledResidual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.body(x)


class EDSR(nn.Module):
    """EDSR (Lim et al. 2017), the baseline: 16 residual blocks of 64 channels, pixel shuffle, twice the resolution."""

    def __init__(self, width: int = 64, depth: int = 16):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, 1, 1)
        self.body = nn.Sequential(*(_ScaledResidual(width) for _ in range(depth)), nn.Conv2d(width, width, 3, 1, 1))
        self.tail = nn.Sequential(nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 3, 2H, 2W]."""
        x = self.head(x)
        result: Tensor = self.tail(x + self.body(x))
        return result


class CompactSuperResolution(nn.Module):
    """Real-ESRGAN's compact generator (Wang et al. 2021, SRVGGNetCompact): 16 layers of 64 channels with PReLU, four times the resolution."""

    def __init__(self, width: int = 64, depth: int = 16, scale: int = 4):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.PReLU(width)]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 3 * scale * scale, 3, 1, 1), nn.PixelShuffle(scale))
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 3, 4H, 4W]."""
        result: Tensor = self.body(x) + F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return result


def unet() -> nn.Module:
    """A U-Net of 64 to 512 channels."""
    return UNet()


def detector() -> nn.Module:
    """A detector of C2f blocks."""
    return Detector()


def edsr() -> nn.Module:
    """EDSR, the baseline, x2."""
    return EDSR()


def compact_sr() -> nn.Module:
    """Real-ESRGAN's compact generator, x4."""
    return CompactSuperResolution()
