"""Single layers: those of the targets, batch 1, against every engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lcnn_compile.bench.cpu.measure import Case
from lcnn_compile.bench.settings import random_lookup
from lcnn_compile.config import LayerConfig


@dataclass(frozen=True)
class LayerShape:
    """A square convolution on a square image, "same" padding."""

    in_channels: int
    out_channels: int
    resolution: int
    size: int = 3
    stride: int = 1

    @property
    def name(self) -> str:
        """As in tables: channels, kernel and resolution."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.in_channels}→{self.out_channels} {self.size}×{self.size}{stride} @{self.resolution}²"

    def conv(self) -> nn.Conv2d:
        """The dense layer, with a bias, as it is left when batch norm is folded in."""
        return nn.Conv2d(self.in_channels, self.out_channels, self.size, self.stride, self.size // 2).eval()


def sizes(taps: float, group_size: int, dictionary_size: float | int = 0.25, area: int = 9) -> LayerConfig:
    """Layer sizes with so many taps per filter over all kernel positions, on the lookup kernel whatever the cost model says."""
    return LayerConfig(dictionary_size=dictionary_size, sparsity=taps / area, group_size=group_size, lowering="lookup")


PAPER, OURS = "k=m/4 27 taps g=1", "k=m/4 54 taps g=8"
TARGETS: dict[LayerShape, dict[str, LayerConfig]] = {
    LayerShape(64, 128, 224): {"k=10 9 taps g=1": sizes(9, 1, 10)},
    **{
        LayerShape(channels, channels, resolution): {PAPER: sizes(27, 1), OURS: sizes(54, 8)}
        for channels, resolution in ((64, 56), (128, 28), (256, 14), (512, 7))
    },
    LayerShape(64, 64, 224): {OURS: sizes(54, 8)},
    LayerShape(128, 128, 112): {OURS: sizes(54, 8)},
}
QUICK = (LayerShape(64, 64, 56), LayerShape(512, 512, 7))


def layer_case(shape: LayerShape, settings: dict[str, LayerConfig], batch: int = 1) -> Case:
    """The lookup layers of every setting on a random input."""
    torch.manual_seed(0)
    conv = shape.conv()
    lookups = {name: random_lookup(conv, config).eval() for name, config in settings.items()}
    return Case(shape.name, lookups, torch.randn(batch, shape.in_channels, shape.resolution, shape.resolution))


def cases(quick: bool, batches: tuple[int, ...] = (1,)) -> list[Case]:
    """All target layers, or two of them."""
    chosen = {shape: TARGETS[shape] for shape in QUICK} if quick else TARGETS
    return [layer_case(shape, settings, batch) for batch in batches for shape, settings in chosen.items()]
